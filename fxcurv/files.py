"""Files: a result as a safetensors file with a JSON manifest in its metadata, written whole or not at all.

Tensors are called `quantity/parameter/tensor`, those of a factor that is kept as vectors `…/A.0`, `…/A.1`; beside them
are `loss` and `output`. The manifest names each of them with type and shape, and says what is made of them; a block
that parameters share is there once. Nothing is unpickled, and nothing in the manifest makes a reader allocate: every
tensor is one of the file, whose offsets safetensors checks against its size.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.blocks import Block, Dense, Diagonal, Eigenbasis, Kronecker
from fxcurv.errors import FxcurvError
from fxcurv.family import APART
from fxcurv.fingerprint import Fingerprint, digest
from fxcurv.moments import SecondMoment
from fxcurv.patches import Patches
from fxcurv.result import Curvature, Entries, Entry

__all__ = ["SCHEMA", "Json", "checksum", "load", "read", "save"]

SCHEMA = 3
"""The version of the manifest; 1 had none, and could not be read back, 2 knew one order of Kronecker factors."""


@dataclass(frozen=True)
class Form:
    """How a block is written: its tensors' names and the fields that hold them, and the numbers beside them."""

    kind: type[Block]
    tensors: Mapping[str, str]
    numbers: Mapping[str, type] = field(default_factory=dict[str, type])


FORMS: dict[str, Form] = {
    form.kind.__name__: form
    for form in (
        Form(Diagonal, {"values": "values"}),
        Form(Dense, {"matrix": "moment"}),
        Form(Kronecker, {"A": "input_moment", "G": "output_moment"}, {"averaged": int, "inputs_first": bool}),
        Form(
            Eigenbasis,
            {"U": "input_vectors", "Q": "output_vectors", "values": "values"},
            {"rest": float, "inputs_first": bool},
        ),
    )
}


# Writing ----------------------------------------------------------------------------------------------------------


def save(result: Curvature, path: Path, progress: str = "") -> None:
    """Write a result, to a temporary file that then takes the place of `path`; a checkpoint has `progress` beside it.

    A checkpoint also has a checksum of all that it holds.
    """
    safetensors = _safetensors()
    if not path.parent.is_dir():
        raise FxcurvError(f"there is no folder {path.parent}", remedy="create it first", code="FXC007")
    writer = _Writer()
    manifest = writer.manifest(result)
    metadata = {f"{e.quantity}/{e.parameter}": e.status for e in result.entries} | {
        "format": f"fxcurv {SCHEMA}",
        "reduction": result.reduction,
        "samples": str(result.samples),
        "loss": repr(result.loss.item()),
        "manifest": json.dumps(manifest, ensure_ascii=False, allow_nan=False),
    }
    tensors = writer.unshared()
    if progress:
        metadata |= {"progress": progress}
        metadata |= {"checksum": checksum(metadata, tensors)}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        safetensors.torch.save_file(tensors, str(temporary), metadata=metadata)
        _synchronize(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        _synchronize(path.parent)


def _safetensors() -> Any:
    try:
        importlib.import_module("safetensors.torch")
    except ImportError:
        raise FxcurvError(
            "files of results need the safetensors package", remedy='pip install "fxcurv[save]"', code="FXC006"
        ) from None
    return importlib.import_module("safetensors")


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2 of the texts and tensors of a file, as hexadecimal digits."""
    texts = {key: text for key, text in metadata.items() if key != "checksum"}
    return digest((sorted(texts.items()), dict(sorted(tensors.items()))))


def _synchronize(path: Path) -> None:
    """Wait until a file, or the entry of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Writer:
    """Collects the tensors of a result under their names."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.values: list[dict[str, Any]] = []
        self._at: dict[int, int] = {}

    def manifest(self, result: Curvature) -> dict[str, Any]:
        """What the file says of the tensors, in the order of the entries."""
        import fxcurv

        self.tensors |= {"loss": result.loss, "output": result.output}
        return {
            "versions": {"fxcurv": fxcurv.__version__, "torch": torch.__version__},
            "model": result.model and {"digest": result.model.digest, "parameters": dict(result.model.parameters)},
            "reduction": result.reduction,
            "samples": result.samples,
            "divisor": None if result.divisor is None else float(result.divisor),
            "quantities": {
                name: [self._entry(e) for e in entries.entries.values()] for name, entries in result.quantities.items()
            },
            "values": self.values,
            "tensors": {key: [str(t.dtype), list(t.shape)] for key, t in self.tensors.items()},
        }

    def unshared(self) -> dict[str, Tensor]:
        """The tensors, contiguous and in memory of their own, as safetensors wants them."""
        seen, found = set[int](), dict[str, Tensor]()
        for key, t in self.tensors.items():
            t = t.detach().contiguous()
            storage = t.untyped_storage()
            found[key] = t.clone() if storage.data_ptr() in seen or storage.nbytes() > t.nbytes else t
            seen.add(storage.data_ptr())
        return found

    def _entry(self, entry: Entry) -> dict[str, Any]:
        value = entry.value
        if value is not None and id(value) not in self._at:
            self._at[id(value)] = len(self.values)
            self.values.append(self._value(f"{entry.quantity}/{entry.parameter}", value))
        fields = ("parameter", "shape", "status", "factor", "reduction", "reason", "definition")
        return {name: getattr(entry, name) for name in fields} | {"value": self._at.get(id(value))}

    def _value(self, prefix: str, value: Tensor | Block) -> dict[str, Any]:
        if isinstance(value, Tensor):
            return {"form": "tensor", "tensors": {"value": self._held(f"{prefix}/value", value)}}
        name = type(value).__name__
        if name not in FORMS or type(value) is not FORMS[name].kind:
            raise FxcurvError(
                f"{prefix} is a block of the form {name}, which has no place in a file",
                remedy=f"save one of {', '.join(FORMS)}, such as its as_dense()",
                code="FXC423",
            )
        form = FORMS[name]
        return {
            "form": name,
            **{label: getattr(value, label) for label in ("shape", "parameters", "status", "reduction", *form.numbers)},
            "tensors": {
                key: self._held(f"{prefix}/{key}", _ungrouped(value, getattr(value, at)))
                for key, at in form.tensors.items()
            },
        }

    def _held(self, key: str, held: Tensor | SecondMoment) -> object:
        """The name of a tensor, or the parts of a moment."""
        if isinstance(held, Tensor):
            self.tensors[key] = held
            return key
        keys = [f"{key}.{k}" for k in range(len(held.kept))]
        self.tensors |= dict(zip(keys, held.kept, strict=True))
        return {"kept": keys, "scale": held.scale, "patches": held.patches and asdict(held.patches)}


def _ungrouped(block: Block, held: Tensor | SecondMoment) -> Tensor | SecondMoment:
    """A factor of a single group as it is read, `[d,d]`."""
    if isinstance(held, Tensor) and isinstance(block, Kronecker | Dense) and held.ndim == 3 and len(held) == 1:
        return held[0]
    return held


# Reading ----------------------------------------------------------------------------------------------------------


def load(path: str | Path, model: nn.Module | None = None) -> Curvature:
    """The result that `Curvature.save` wrote, equal to the last bit, its tensors on the CPU.

    With a `model`, it must be that of the file: the same names, shapes and types of parameters. Raises a FxcurvError
    for a file that is none of fxcurv, of another schema, truncated or inconsistent (FXC423), and for another model
    (FXC424).
    """
    return read(Path(path), model)[0]


def read(path: Path, model: nn.Module | None = None) -> tuple[Curvature, Json | None]:
    """The result in a file, as `load` gives it, and the progress in a checkpoint, of which the checksum is checked."""
    safetensors = _safetensors()
    metadata = _metadata(path)
    manifest = Json(_json(path, metadata.get("manifest")), path)
    recorded = manifest["model"]
    fingerprint = None if recorded.value is None else _fingerprint(recorded)
    difference = model is not None and (
        "its model is not known" if fingerprint is None else fingerprint.difference(Fingerprint.of(model))
    )
    if difference:
        raise FxcurvError(
            f"{path} belongs to another model: {difference}", remedy="give the model that it is of", code="FXC424"
        )
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise _broken(path, f"it is truncated or inconsistent ({error})") from None
    progress = metadata.get("progress", "")
    if progress and metadata.get("checksum") != checksum(metadata, tensors):
        raise _broken(path, "it is damaged: its checksum is that of other contents")
    held = Json(_json(path, progress), path, "progress") if progress else None
    return _Reader(manifest, tensors, fingerprint).result(), held


_VERSION = re.compile("[0-9]{1,9}")


def _metadata(path: Path) -> dict[str, str]:
    """What a file of this schema says of itself, out of its header, which is read only as far as the file goes."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _broken(path, "it is truncated, or no safetensors file")
            header = _json(path, file.read(length))
    except OSError as error:
        raise _broken(path, f"it cannot be read ({error.strerror})") from None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    name, _, version = str(metadata.get("format")).partition(" ") if isinstance(metadata, dict) else ("", "", "")
    if not isinstance(metadata, dict) or name != "fxcurv" or not _VERSION.fullmatch(version):
        raise _broken(path, "it holds no result of fxcurv")
    if int(version) != SCHEMA:
        age, remedy = ("older", "compute and save it anew") if int(version) < SCHEMA else ("newer", "update fxcurv")
        raise FxcurvError(f"{path} is of the {age} schema {version}, not {SCHEMA}", remedy=remedy, code="FXC423")
    return metadata


def _json(path: Path, text: Any) -> Any:
    """Strict JSON, in which no key comes twice and no number is NaN or infinite."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise _broken(path, f"the key {twice!r} is there twice")
        return found

    def finite(number: str) -> float:
        if math.isfinite(value := float(number)):
            return value
        raise ValueError(number)

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=finite, parse_float=finite)
    except (ValueError, TypeError, RecursionError):
        raise _broken(path, "its JSON is malformed") from None


def _broken(path: Path, cause: str) -> FxcurvError:
    return FxcurvError(f"{path}: {cause}", remedy="give a file that Curvature.save wrote", code="FXC423")


@dataclass(frozen=True)
class Json:
    """A value out of a file, read as the type that it must have; `at` is where it stands."""

    value: Any
    path: Path
    at: str = "manifest"

    def __getitem__(self, key: str) -> Json:
        value = self.of(dict)
        if key not in value:
            raise self.wrong(f"lacks {key!r}")
        return Json(value[key], self.path, f"{self.at}.{key}")

    def of(self, kind: type) -> Any:
        """The value, of this very type."""
        if type(self.value) is not kind:
            raise self.wrong(f"is no {kind.__name__}")
        return self.value

    def items(self) -> list[tuple[str, Json]]:
        """The members of an object."""
        return [(key, self[key]) for key in self.of(dict)]

    def each(self) -> list[Json]:
        """The members of a list."""
        return [Json(value, self.path, f"{self.at}[{k}]") for k, value in enumerate(self.of(list))]

    def texts(self) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(node.of(str) for node in self.each())

    def numbers(self) -> tuple[int, ...]:
        """A list of whole numbers, 0 or above."""
        found = tuple(node.of(int) for node in self.each())
        if any(number < 0 for number in found):
            raise self.wrong("holds a negative number")
        return found

    def wrong(self, cause: str) -> FxcurvError:
        """The error that something is not as it must be here."""
        return _broken(self.path, f"{self.at} {cause}")


def _fingerprint(node: Json) -> Fingerprint:
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, kind in node["parameters"].items():
        if len(kind.of(list)) != 2:
            raise kind.wrong("is no shape and type")
        shape, dtype = kind.each()
        kinds[name] = shape.numbers(), dtype.of(str)
    fingerprint = Fingerprint(kinds)
    if fingerprint.digest != node["digest"].of(str):
        raise node.wrong("has a digest of other parameters")
    return fingerprint


class _Reader:
    """Makes a result out of a manifest and the tensors that it names."""

    def __init__(self, manifest: Json, tensors: Mapping[str, Tensor], model: Fingerprint | None) -> None:
        self.manifest, self.tensors, self.model = manifest, tensors, model

    def result(self) -> Curvature:
        m = self.manifest
        self._check_tensors(m["tensors"])
        values = [self._value(node) for node in m["values"].each()]
        quantities = {name: self._entries(name, entries, values) for name, entries in m["quantities"].items()}
        divisor = None if m["divisor"].value is None else m["divisor"].of(float)
        loss, output, samples = self.tensors["loss"], self.tensors["output"], m["samples"].of(int)
        if loss.ndim or output.ndim == 0 or len(output) != samples or (divisor is not None and divisor < 0):
            raise m.wrong("has another loss, output, number of samples or divisor than a result has")
        reduction = m["reduction"].of(str)
        if reduction not in ("mean", "sum"):
            raise m["reduction"].wrong("is neither mean nor sum")
        return Curvature(quantities, loss, output, samples, reduction, divisor, self.model)

    def _entries(self, quantity: str, node: Json, values: list[Tensor | Block]) -> Entries:
        """The entries of a quantity, each of another parameter."""
        listed = node.each()
        entries = Entries(self._entry(quantity, item, values) for item in listed)
        if len(entries.entries) < len(listed):
            raise node.wrong("has a parameter twice")
        return entries

    def _check_tensors(self, listed: Json) -> None:
        """The tensors of the file are those of the manifest, of the same type and shape."""
        names = set(listed.of(dict))
        if names != set(self.tensors) or not names >= {"loss", "output"}:
            raise listed.wrong(f"and the file differ: {', '.join(sorted(names ^ set(self.tensors))[:3])}")
        for name, node in listed.items():
            found = self.tensors[name]
            if node.of(list) != [str(found.dtype), list(found.shape)]:
                raise node.wrong(f"is not what the file holds, {list(found.shape)} of {found.dtype}")
            if not found.is_floating_point():
                raise node.wrong("is of no floating-point type")

    def _entry(self, quantity: str, node: Json, values: list[Tensor | Block]) -> Entry:
        fields = {name: node[name].of(str) for name in ("parameter", "status", "factor", "reduction", "reason")}
        shape, definition, at = node["shape"].numbers(), node["definition"].of(str), node["value"]
        if at.value is not None and not 0 <= at.of(int) < len(values):
            raise at.wrong("is not there")
        value = None if at.value is None else values[at.value]
        fits = (
            value.shape == shape or definition.startswith(APART)
            if isinstance(value, Tensor)
            else value is None or fields["parameter"] in value.parameters
        )
        if not fits or (self.model and self.model.parameters.get(fields["parameter"], ((), ""))[0] != shape):
            raise node.wrong("has a value or a shape of another parameter")
        return Entry(quantity=quantity, shape=shape, value=value, definition=definition, **fields)

    def _value(self, node: Json) -> Tensor | Block:
        name, tensors = node["form"].of(str), node["tensors"]
        if name == "tensor":
            return self._tensor(tensors["value"])
        if name not in FORMS:
            raise node.wrong(f"has the unknown form {name!r}")
        form, shape = FORMS[name], node["shape"].numbers()
        make: Any = form.kind
        held = {at: self._held(tensors[key]) for key, at in form.tensors.items()}
        if not _consistent(form.kind, shape, held):
            raise node.wrong(f"has tensors that do not fit a {name} block on {list(shape)}")
        labels = {label: node[label].of(str) for label in ("status", "reduction")}
        numbers = {label: node[label].of(kind) for label, kind in form.numbers.items()}
        if numbers.get("averaged", 0) < 0:
            raise node["averaged"].wrong("is negative")
        return make(shape, parameters=node["parameters"].texts(), **labels, **numbers, **held)

    def _tensor(self, node: Json) -> Tensor:
        name = node.of(str)
        if name not in self.tensors:
            raise node.wrong(f"names {name!r}, which is not there")
        return self.tensors[name]

    def _held(self, node: Json) -> Tensor | SecondMoment:
        if isinstance(node.value, str):
            return self._tensor(node)
        scale, geometry = node["scale"].of(float), node["patches"]
        kept = tuple(self._tensor(part) for part in node["kept"].each())
        patches = None if geometry.value is None else _patches(geometry)
        rank = {3, 4, 5, 6} if patches is None else {2 + len(patches.kernel)}
        if not kept or not 0 <= scale < math.inf or {t.ndim for t in kept} - rank:
            raise node.wrong("holds no vectors")
        moment = SecondMoment(kept, patches, scale)
        fits = len({t.shape[1 if patches else -2 :] for t in kept}) == 1
        if fits and patches is not None:
            fits = kept[0].shape[1] % patches.groups == 0 and min(patches.outputs(kept[0])) >= 1
        if not fits or not 0 < moment.count < moment.side:
            raise node.wrong("holds vectors that do not fit each other")
        return moment


def _patches(node: Json) -> Patches:
    """The geometry of a convolution."""
    axes = [node[name].numbers() for name in ("kernel", "stride", "padding", "dilation")]
    groups = node["groups"].of(int)
    rows = list(zip(*axes, strict=False))
    possible = all(min(k, s, d) >= 1 for k, s, _, d in rows)
    if not possible or groups < 1 or not 1 <= len(rows) <= 3 or {len(axis) for axis in axes} != {len(rows)}:
        raise node.wrong("is no convolution's")
    return Patches(*axes, groups)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _consistent(kind: type[Block], shape: tuple[int, ...], held: Mapping[str, Tensor | SecondMoment]) -> bool:
    """Whether a block of this form on vectors of this shape has tensors of these shapes."""
    numel, sizes = math.prod(shape), [t.shape for t in held.values()]
    if kind is Diagonal:
        return sizes == [shape]
    if kind is Eigenbasis:
        if [len(size) for size in sizes] != [3, 3, 3]:
            return False
        (g, i, a), (h, o, b), values = sizes
        return g == h and g * i * o == numel and values == (g, b, a)
    if not all(len(size) in (2, 3) and size[-1] == size[-2] for size in sizes):
        return False
    sides = [(1, *size)[-3:-1] for size in sizes]  # (g, d)
    if kind is Dense:
        return sides == [(1, numel)]
    (g, i), (h, o) = sides
    return g == h and g * i * o == numel
