"""Keys by value: objects get equal keys only if no computation can distinguish them. Keys never depend on a repr."""

from __future__ import annotations

import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.core.torch_compat import version_of

__all__ = ["Hashed", "Same", "attributes_of", "frozen", "identity_of", "live_options_of", "options_of", "structure_of"]


class Same:
    """A key of one object, equal only to itself.

    It does not keep the object alive, unless the object's type has no weak references.
    """

    def __init__(self, value: object) -> None:
        self.id = id(value)
        try:
            self.of: Callable[[], object] = weakref.ref(value)
        except TypeError:
            self.of = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.of() is not None and self.of() is other.of()

    def __hash__(self) -> int:
        return self.id


class Hashed:
    """A key whose hash is computed once."""

    def __init__(self, key: object) -> None:
        self.key, self.hash = key, hash(key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashed) and self.key == other.key

    def __hash__(self) -> int:
        return self.hash


_PLAIN = frozenset((bool, int, str, bytes, type(None), torch.dtype, torch.device))


_CONTAINERS = (list, tuple, set, frozenset, dict)


_EMPTY = frozenset((*_CONTAINERS, OrderedDict))  # empty hook dictionaries, a dozen in every module


def frozen(value: Any, depth: int = 4) -> Hashable:
    """Return the key of a value: numbers, strings, containers, arrays, frozen dataclasses by value, else by identity.

    The key of a tensor includes its version, which every in-place operation increments.
    Containers deeper than `depth` are compared by identity.
    """
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind is float:
        return kind, value.hex()  # NaN equals itself, and -0.0 is not 0.0
    if kind is complex:
        return kind, value.real.hex(), value.imag.hex()
    if kind in _EMPTY and not value:
        return kind
    if isinstance(value, Tensor):
        return Same(value), version_of(value)
    if kind.__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
        return kind, value.dtype.str, value.shape, value.tobytes()
    if depth and dataclasses.is_dataclass(value) and not isinstance(value, type | nn.Module) and _is_frozen(value):
        return kind, tuple(frozen(getattr(value, f.name), depth - 1) for f in dataclasses.fields(value))
    if depth and isinstance(value, _CONTAINERS):
        items: Any = value.items() if isinstance(value, dict) else value
        keys = [frozen(item, depth - 1) for item in items]
        return kind, frozenset(keys) if isinstance(value, set | frozenset) else tuple(keys)
    return Same(value)


def options_of(value: Any) -> Hashable:
    """Return the key of an object of options: as `frozen`, or of a mutable object the identity and its attributes."""
    key = frozen(value, 16)
    if not isinstance(key, Same):
        return key
    return key, tuple((name, frozen(held, 16)) for name, held in getattr(value, "__dict__", {}).items())


def live_options_of(value: Any) -> Hashable:
    """Return the key of an object that is read again later: with its identity if an option can change in place."""
    try:
        hash(value)
    except TypeError:
        return Same(value), options_of(value)
    return options_of(value)


def _is_frozen(value: Any) -> bool:
    """Whether a dataclass compares by its fields, and is frozen."""
    parameters = type(value).__dataclass_params__
    return parameters.frozen and parameters.eq


_BOOKKEEPING = frozenset(vars(nn.Module()))


def attributes_of(module: nn.Module) -> Hashable:
    """Return the key of a module's attributes, without tensors, submodules, hooks and mode."""
    return tuple([(name, frozen(value)) for name, value in vars(module).items() if name not in _BOOKKEEPING])


def identity_of(module: nn.Module) -> Hashable:
    """Return the key of a module's computation: type, attributes by value, tensors by identity, submodules likewise."""
    tensors = tuple((name, Same(t)) for name, t in _tensors(module))
    children = tuple((name, identity_of(child)) for name, child in module.named_children())
    return type(module), attributes_of(module), tensors, children


def structure_of(module: nn.Module) -> Hashable:
    """Return the key of a module for any tensor values: tensors by shape and dtype, submodules recursively."""
    tensors = tuple((name, t if t is None else (tuple(t.shape), t.dtype, t.device)) for name, t in _tensors(module))
    children = tuple((name, structure_of(child)) for name, child in module.named_children())
    return type(module), attributes_of(module), tensors, children


def _tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [(name, t) for key in ("_parameters", "_buffers") for name, t in vars(module)[key].items()]
