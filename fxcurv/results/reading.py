"""Reading a result from a file. Nothing is unpickled, and the manifest cannot cause allocations.

Every tensor is stored in the file; safetensors checks its offsets against the size of the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxcurv.blocks.base import KINDS, Block
from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.convolution.patches import Patches
from fxcurv.core.errors import FxcurvError
from fxcurv.core.fingerprint import Fingerprint
from fxcurv.results.curvature import Curvature
from fxcurv.results.entry import Entries, Entry
from fxcurv.results.json import Json, broken, strict_json
from fxcurv.results.validity import (
    mistake_of_entry,
    mistake_of_gram,
    mistake_of_parts,
    mistake_of_result,
    mistake_of_value,
)
from fxcurv.results.writing import SCHEMA, checksum, safetensors_package

__all__ = ["load", "read"]


# Reading ----------------------------------------------------------------------------------------------------------


def load(path: str | Path, model: nn.Module | None = None) -> Curvature:
    """Read a result written by `Curvature.save`, bitwise equal, with tensors on the CPU.

    A given `model` must match the file: the same names, shapes and dtypes of parameters. Raises a FxcurvError for a
    file that is not of fxcurv, has another schema, or is truncated or inconsistent (FXC423), and for another model
    (FXC424).
    """
    return read(Path(path), model)[0]


def read(path: Path, model: nn.Module | None = None) -> tuple[Curvature, Json | None]:
    """Read the result in a file, as `load` does, and the progress of a checkpoint, after a check of its checksum."""
    safetensors = safetensors_package()
    metadata = _metadata(path)
    manifest = Json(strict_json(path, metadata.get("manifest")), path)
    recorded = manifest["model"]
    fingerprint = None if recorded.value is None else _fingerprint(recorded)
    difference = model is not None and (
        "its model is unknown" if fingerprint is None else fingerprint.difference(Fingerprint.of(model))
    )
    if difference:
        raise FxcurvError(
            f"{path} belongs to another model: {difference}", remedy="give the model of the result", code="FXC424"
        )
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise broken(path, f"it is truncated or inconsistent ({error})") from None
    progress = metadata.get("progress", "")
    if progress and metadata.get("checksum") != checksum(metadata, tensors):
        raise broken(path, "it is damaged: its checksum does not match its contents")
    held = Json(strict_json(path, progress), path, "progress") if progress else None
    return _Reader(manifest, tensors, fingerprint).result(), held


_VERSION = re.compile("[0-9]{1,9}")


def _metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a file of this schema from its header; never read beyond the end of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise broken(path, "it is truncated, or not a safetensors file")
            header = strict_json(path, file.read(length))
    except OSError as error:
        raise broken(path, f"it cannot be read ({error.strerror})") from None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    name, _, version = str(metadata.get("format")).partition(" ") if isinstance(metadata, dict) else ("", "", "")
    if not isinstance(metadata, dict) or name != "fxcurv" or not _VERSION.fullmatch(version):
        raise broken(path, "it does not contain a result of fxcurv")
    if int(version) != SCHEMA:
        age, remedy = ("older", "compute and save it again") if int(version) < SCHEMA else ("newer", "update fxcurv")
        raise FxcurvError(f"{path} has the {age} schema {version}, not {SCHEMA}", remedy=remedy, code="FXC423")
    return metadata


def _fingerprint(node: Json) -> Fingerprint:
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, kind in node["parameters"].items():
        if len(kind.of(list)) != 2:
            raise kind.wrong("is not a shape and a dtype")
        shape, dtype = kind.each()
        kinds[name] = shape.numbers(), dtype.of(str)
    fingerprint = Fingerprint(kinds)
    if fingerprint.digest != node["digest"].of(str):
        raise node.wrong("has a digest of other parameters")
    return fingerprint


class _Reader:
    """Builds a result from a manifest and its tensors."""

    def __init__(self, manifest: Json, tensors: Mapping[str, Tensor], model: Fingerprint | None) -> None:
        self.manifest, self.tensors, self.model = manifest, tensors, model

    def result(self) -> Curvature:
        m = self.manifest
        self._check_tensors(m["tensors"])
        values = [self._value(node) for node in m["values"].each()]
        quantities = {name: self._entries(name, entries, values) for name, entries in m["quantities"].items()}
        divisor = None if m["divisor"].value is None else m["divisor"].of(float)
        loss, output, samples = self.tensors["loss"], self.tensors["output"], m["samples"].of(int)
        result = Curvature(quantities, loss, output, samples, m["reduction"].of(str), divisor, self.model)
        if cause := mistake_of_result(result):
            raise m.wrong(cause)
        return result

    def _entries(self, quantity: str, node: Json, values: list[Tensor | Block]) -> Entries:
        """Read the entries of a quantity; duplicate parameters are an error."""
        listed = node.each()
        entries = Entries(self._entry(quantity, item, values) for item in listed)
        if len(entries.entries) < len(listed):
            raise node.wrong("has a parameter twice")
        return entries

    def _check_tensors(self, listed: Json) -> None:
        """Check that the file and the manifest have the same tensors, with the same dtypes and shapes."""
        names = set(listed.of(dict))
        if names != set(self.tensors) or not names >= {"loss", "output"}:
            raise listed.wrong(f"and the file differ: {', '.join(sorted(names ^ set(self.tensors))[:3])}")
        for name, node in listed.items():
            found = self.tensors[name]
            if node.of(list) != [str(found.dtype), list(found.shape)]:
                raise node.wrong(f"differs from the file, {list(found.shape)} of {found.dtype}")

    def _entry(self, quantity: str, node: Json, values: list[Tensor | Block]) -> Entry:
        names = ("parameter", "status", "factor", "reduction", "reason", "structure", "combine")
        fields = {name: node[name].of(str) for name in names}
        shape, definition, at = node["shape"].numbers(), node["definition"].of(str), node["value"]
        if at.value is not None and not 0 <= at.of(int) < len(values):
            raise at.wrong("is out of range")
        value = None if at.value is None else values[at.value]
        given: dict[str, Any] = {"value": value, "definition": definition, "degree": node["degree"].of(int), **fields}
        entry = Entry(quantity=quantity, shape=shape, **given)
        if cause := mistake_of_entry(entry, self.model):
            raise node.wrong(cause)
        return entry

    def _value(self, node: Json) -> Tensor | Block:
        name, tensors = node["form"].of(str), node["tensors"]
        if name == "tensor":
            value = self._tensor(tensors["value"])
            if cause := mistake_of_value(value):
                raise node.wrong(cause)
            return value
        if name not in KINDS or not KINDS[name].fields:
            raise node.wrong(f"has the unknown form {name!r}")
        kind, shape = KINDS[name], node["shape"].numbers()
        make: Any = kind
        held = {at: self._held(tensors[key]) for key, at in kind.fields.items()}
        if cause := mistake_of_parts(kind, shape, held):
            raise node.wrong(cause)
        labels = {label: node[label].of(str) for label in ("status", "reduction")}
        numbers = {label: node[label].of(kind) for label, kind in kind.options.items()}
        block: Block = make(shape, parameters=node["parameters"].texts(), **labels, **numbers, **held)
        if cause := mistake_of_value(block):
            raise node.wrong(cause)
        return block

    def _tensor(self, node: Json) -> Tensor:
        name = node.of(str)
        if name not in self.tensors:
            raise node.wrong(f"names {name!r}, which does not exist")
        return self.tensors[name]

    def _held(self, node: Json) -> Tensor | LazyGram:
        if isinstance(node.value, str):
            return self._tensor(node)
        scale, geometry = node["scale"].of(float), node["patches"]
        vectors = tuple(self._tensor(part) for part in node["vectors"].each())
        patches = None if geometry.value is None else _patches(geometry)
        moment = LazyGram(vectors, patches, scale)
        if cause := mistake_of_gram(moment):
            raise node.wrong(cause)
        return moment


def _patches(node: Json) -> Patches:
    """Read the geometry of a convolution."""
    axes = [node[name].numbers() for name in ("kernel", "stride", "padding", "dilation")]
    groups = node["groups"].of(int)
    rows = list(zip(*axes, strict=False))
    possible = all(min(k, s, d) >= 1 for k, s, _, d in rows)
    if not possible or groups < 1 or not 1 <= len(rows) <= 3 or {len(axis) for axis in axes} != {len(rows)}:
        raise node.wrong("is not the geometry of a convolution")
    return Patches(*axes, groups)  # pyright: ignore[reportCallIssue, reportArgumentType]
