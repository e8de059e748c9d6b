"""Identification of a model by the names, shapes and dtypes of its parameters, and digests of values."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.core.torch_compat import pytree

__all__ = ["Fingerprint", "digest", "values_digest"]


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
