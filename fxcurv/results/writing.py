"""Writing a result to a safetensors file with a JSON manifest in its metadata, atomically.

Tensors are called `quantity/parameter/tensor`, the vectors of a lazy Gram `…/A.0`, `…/A.1`; `loss` and `output` are
stored too. The manifest lists each tensor with dtype and shape; a block shared by several parameters is stored once.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fxcurv.blocks.base import Block
from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.core.errors import FxcurvError
from fxcurv.core.fingerprint import Fingerprint, digest
from fxcurv.core.version import __version__
from fxcurv.results import validity
from fxcurv.results.entry import Entries, Entry
from fxcurv.results.validity import mistake_of_entry, mistake_of_result, mistake_of_value, stored

__all__ = ["SCHEMA", "checksum", "save"]


SCHEMA = 4
"""Version of the manifest; 1 had no manifest and was not readable, 2 supported one order of Kronecker factors,
3 did not have the combination rule of results."""


class Result(validity.Result, Protocol):
    """Interface of `fxcurv.results.curvature.Curvature` for writing."""

    @property
    def quantities(self) -> Mapping[str, Entries]: ...

    @property
    def entries(self) -> list[Entry]: ...

    @property
    def model(self) -> Fingerprint | None: ...


# Writing ----------------------------------------------------------------------------------------------------------


def save(result: Result, path: Path, progress: str = "") -> None:
    """Write a result to a temporary file, then rename it to `path`; a checkpoint also stores `progress`.

    A checkpoint also has a checksum of its contents.
    """
    safetensors = safetensors_package()
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


def safetensors_package() -> Any:
    try:
        importlib.import_module("safetensors.torch")
    except ImportError:
        raise FxcurvError(
            "result files need the safetensors package", remedy='pip install "fxcurv[save]"', code="FXC006"
        ) from None
    return importlib.import_module("safetensors")


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the BLAKE2 hash of the texts and tensors of a file, in hexadecimal digits."""
    texts = {key: text for key, text in metadata.items() if key != "checksum"}
    return digest((sorted(texts.items()), dict(sorted(tensors.items()))))


def _synchronize(path: Path) -> None:
    """Wait until a file or folder is written to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Writer:
    """Collects the tensors of a result by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.values: list[dict[str, Any]] = []
        self._at: dict[int, int] = {}

    def manifest(self, result: Result) -> dict[str, Any]:
        """Return the manifest of the tensors, in the order of the entries."""
        if cause := mistake_of_result(result):
            raise _unsaved("the result", cause)
        self.tensors |= {"loss": result.loss, "output": result.output}
        return {
            "versions": {"fxcurv": __version__, "torch": torch.__version__},
            "model": result.model and {"digest": result.model.digest, "parameters": dict(result.model.parameters)},
            "reduction": result.reduction,
            "samples": result.samples,
            "divisor": None if result.divisor is None else float(result.divisor),
            "quantities": {
                name: [self._entry(e, result.model) for e in entries.entries.values()]
                for name, entries in result.quantities.items()
            },
            "values": self.values,
            "tensors": {key: [str(t.dtype), list(t.shape)] for key, t in self.tensors.items()},
        }

    def unshared(self) -> dict[str, Tensor]:
        """Return the tensors contiguous and in separate memory, as safetensors requires."""
        seen, found = set[int](), dict[str, Tensor]()
        for key, t in self.tensors.items():
            t = t.detach().contiguous()
            storage = t.untyped_storage()
            found[key] = t.clone() if storage.data_ptr() in seen or storage.nbytes() > t.nbytes else t
            seen.add(storage.data_ptr())
        return found

    def _entry(self, entry: Entry, model: Fingerprint | None) -> dict[str, Any]:
        value = entry.value
        if cause := mistake_of_entry(entry, model):
            raise _unsaved(f"{entry.quantity}/{entry.parameter}", cause)
        if value is not None and id(value) not in self._at:
            self._at[id(value)] = len(self.values)
            self.values.append(self._value(f"{entry.quantity}/{entry.parameter}", value))
        fields = ("parameter", "shape", "status", "factor", "reduction", "reason", "definition")
        fields += ("structure", "combine", "degree")
        return {name: getattr(entry, name) for name in fields} | {"value": self._at.get(id(value))}

    def _value(self, prefix: str, value: Tensor | Block) -> dict[str, Any]:
        if cause := mistake_of_value(value):
            raise _unsaved(prefix, cause)
        if isinstance(value, Tensor):
            return {"form": "tensor", "tensors": {"value": self._held(f"{prefix}/value", value)}}
        return {
            "form": type(value).__name__,
            **{
                label: getattr(value, label) for label in ("shape", "parameters", "status", "reduction", *value.options)
            },
            "tensors": {key: self._held(f"{prefix}/{key}", held) for key, held in stored(value).items()},
        }

    def _held(self, key: str, held: Tensor | LazyGram) -> object:
        """Store a tensor or a lazy Gram; return its description in the manifest."""
        keys = [key] if isinstance(held, Tensor) else [f"{key}.{k}" for k in range(len(held.vectors))]
        for one in self.tensors.keys() & keys:
            raise _unsaved(one, "is the name of two tensors")
        if isinstance(held, Tensor):
            self.tensors[key] = held
            return key
        self.tensors |= dict(zip(keys, held.vectors, strict=True))
        return {"vectors": keys, "scale": held.scale, "patches": held.patches and asdict(held.patches)}


def _unsaved(name: str, cause: str) -> FxcurvError:
    return FxcurvError(
        f"{name} cannot be saved: it {cause}",
        remedy="save real tensors, and registered blocks with options of their declared types, such as its as_dense()",
        code="FXC423",
    )
