"""Identification of a model by the names, shapes and dtypes of its parameters; digests and descriptions of values."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.core.torch_compat import pytree

__all__ = ["Fingerprint", "described", "digest", "values_digest"]


def digest(value: Any, before: str = "") -> str:
    """Return the BLAKE2 digest of a pytree: dtype, shape and every byte of tensors, and the pickle of all else.

    `before` is a digest to continue, so that a chain of digests represents an ordered sequence.
    """
    leaves, structure = pytree.tree_flatten(value)
    found = hashlib.blake2b(f"{before} {structure}".encode(), digest_size=16)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            found.update(pickle.dumps(leaf, protocol=5))
            continue
        found.update(f"{leaf.dtype} {list(leaf.shape)}".encode())
        found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def values_digest(model: nn.Module) -> str:
    """Return a digest of the values of all parameters and buffers."""
    return digest({**dict(model.named_parameters()), **dict(model.named_buffers())})


# Descriptions -----------------------------------------------------------------------------------------------------


_SHOWN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def described(value: Any, within: tuple[int, ...] = ()) -> str:
    """Return a text that is the same in every process for equal values, and different for different ones.

    Containers, dataclasses, modules and other objects are described by their contents, tensors and arrays by a digest,
    functions by their code, and other objects by their pickle, or if they have none by their identity.
    """
    if type(value) in _SHOWN:
        return repr(value)
    if id(value) in within:
        return "…"
    within = (*within, id(value))
    name = type(value).__qualname__
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        return f"{name}({digest(value)})"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{described(k, within)}: {described(v, within)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple | set | frozenset):
        items = [described(item, within) for item in value]
        items = sorted(items) if isinstance(value, set | frozenset) else items
        text = f"[{', '.join(items)}]" if isinstance(value, list) else f"({', '.join(items)})"
        return text if type(value) in (list, tuple) else f"{name}{text}"
    if isinstance(value, CodeType):
        return digest((value.co_code, value.co_names, [described(constant, within) for constant in value.co_consts]))
    if isinstance(value, _SUBCLASSED) and not isinstance(value, Enum):
        return f"{name}({next(kind for kind in _SUBCLASSED if isinstance(value, kind)).__repr__(value)})"
    contents = _contents(value)
    if contents is None:
        return f"{name}({_pickled(value)})"
    return f"{name}({', '.join(f'{key}={described(held, within)}' for key, held in contents.items())})"


_SUBCLASSED: tuple[Any, ...] = (int, float, complex, str, bytes)


def _pickled(value: Any) -> str:
    try:
        return digest(pickle.dumps(value, protocol=5))
    except Exception:  # an object decides which
        return f"at {id(value)}"


def _contents(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object that determine it; None if it cannot have any."""
    if isinstance(value, nn.Module):
        return _module_contents(value)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        found = {"name": value.__qualname__, "code": value.__code__, "defaults": value.__defaults__, "cells": cells}
        return {key: held for key, held in found.items() if held}
    if isinstance(value, MethodType):
        return {"of": value.__self__, "function": value.__func__}
    if isinstance(value, BuiltinFunctionType):
        return {"name": f"{value.__module__}.{value.__qualname__}"}
    if isinstance(value, partial):
        return {"function": value.func, "args": value.args, "keywords": value.keywords}
    if is_dataclass(value):
        options = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return options | {key: held for key, held in vars(value).items() if key not in {f.name for f in fields(value)}}
    if isinstance(value, Enum):
        return {"value": value.name}
    slots = [slot for kind in type(value).__mro__ for slot in vars(kind).get("__slots__", ()) if hasattr(value, slot)]
    if not slots and not hasattr(value, "__dict__"):
        return None
    return dict(sorted({**getattr(value, "__dict__", {}), **{slot: getattr(value, slot) for slot in slots}}.items()))


_BOOKKEEPING = frozenset(vars(nn.Module()))


def _module_contents(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes, tensors and submodules, without hooks and mode."""
    held = {key: value for key, value in vars(module).items() if key not in _BOOKKEEPING}
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {**held, **tensors, **dict(module.named_children())}


# Models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fingerprint:
    """name -> (shape, dtype) of every parameter, tied copies once, in `named_parameters()` order."""

    parameters: Mapping[str, tuple[tuple[int, ...], str]]

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """Return the fingerprint of a model."""
        return cls({name: (tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()})

    @property
    def digest(self) -> str:
        """Return the SHA-256 digest of the parameters, in hexadecimal."""
        rows = [[name, list(shape), dtype] for name, (shape, dtype) in self.parameters.items()]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def difference(self, other: Fingerprint) -> str | None:
        """Describe the first parameter in which another model differs; None if there is none."""
        ours, theirs = self.parameters, other.parameters
        for name in (*ours, *theirs):
            if ours.get(name) != theirs.get(name):
                return f"{name!r} is {_kind(ours, name)} here and {_kind(theirs, name)} there"
        return None if list(ours) == list(theirs) else "the parameters are in a different order"


def _kind(parameters: Mapping[str, tuple[tuple[int, ...], str]], name: str) -> str:
    if name not in parameters:
        return "missing"
    shape, dtype = parameters[name]
    return f"{list(shape)} of {dtype}"
