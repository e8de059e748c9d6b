"""The contents of an object: the objects that it consists of, if a computation that reads it may depend on them."""

from __future__ import annotations

import functools
import hashlib
import sys
import types
import weakref
from array import array
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any

from torch import Tensor, nn

from fxcurv.signature.code import class_facts, code_facts, is_library

__all__ = ["BYTES", "ENTRIES", "Bounds", "Parts", "own_parts", "parts_of"]


ENTRIES = 1000
"""Largest container and plain object that is compared by content; larger ones by identity and length."""


BYTES = 1 << 16
"""Largest array, in bytes, that is compared by content; larger ones by identity, shape and dtype."""


Parts = tuple[tuple[Hashable, ...], Sequence[Any]]
"""A label, and the parts: two objects with equal labels and parts of equal contents have equal contents."""


_MISSING = object()


@dataclass(frozen=True)
class Bounds:
    """The largest container, in entries, and array, in bytes, with parts; and whether functions have their globals."""

    entries: int = ENTRIES
    bytes: int = BYTES
    entered: bool = True


def parts_of(value: Any, bounds: Bounds) -> Parts | None:
    """Return the label and the parts of an object; None if it is compared by identity."""
    kind = type(value)
    split = _BUILTIN.get(kind) or _SPLITS.get(kind)
    if split is None:
        split = _SPLITS[kind] = _split_of(kind)
    return split(value, bounds)


# Containers -------------------------------------------------------------------------------------------------------


def _opaque(value: Any, bounds: Bounds) -> Parts | None:
    return None


def _sequence(value: Any, bounds: Bounds) -> Parts | None:
    return (
        None if len(value) > bounds.entries else _with_attributes((type(value), len(value)), list(value), value, bounds)
    )


def _mapping(value: Any, bounds: Bounds) -> Parts | None:
    if len(value) > bounds.entries:
        return None
    return _with_attributes((type(value), len(value)), [x for pair in value.items() for x in pair], value, bounds)


def _wrapped_container(value: Any, bounds: Bounds) -> Parts | None:
    return None if len(value) > bounds.entries else _object(value, bounds)


def _with_attributes(label: tuple[Hashable, ...], parts: list[Any], value: Any, bounds: Bounds) -> Parts:
    """Return the parts of a container with those of its subclass."""
    attributes: Any = getattr(value, "__dict__", None)
    if not attributes or len(attributes) > bounds.entries:
        return label, parts
    return (*label, *attributes), [*parts, *attributes.values()]


# Objects ----------------------------------------------------------------------------------------------------------


def _object(value: Any, bounds: Bounds) -> Parts | None:
    """The attributes of an object, and its class, whose attributes and methods it may use."""
    kind = type(value)
    attributes: Any = getattr(value, "__dict__", None)
    if type(attributes) is not dict:
        attributes = {}
    if slots := _slots(kind):
        attributes = {**attributes, **{name: getattr(value, name, _MISSING) for name in slots}}
    if len(attributes) > bounds.entries:
        return None
    if _HASH in attributes:
        attributes = {name: content for name, content in attributes.items() if name != _HASH}
    return (kind, *attributes), [*attributes.values(), kind]


_HASH = "_original_object_hash"
"""An attribute of the generation configs of Hugging Face, with another value in every process."""


def _attributes_of(function: types.FunctionType) -> dict[str, Any] | None:
    """Return the attributes of a function, without marks of torch.compile, which contain identities."""
    found = vars(function)
    return (found and {name: value for name, value in found.items() if not name.startswith("_torchdynamo")}) or None


_SLOTS: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _slots(kind: type) -> tuple[str, ...]:
    """Return the names of an object's slots."""
    names = _SLOTS.get(kind)
    if names is None:
        spaces = [vars(c) for c in kind.__mro__ if "__slots__" in vars(c)]
        names = tuple(n for space in spaces for n, v in space.items() if type(v) is types.MemberDescriptorType)
        _SLOTS[kind] = names
    return names


def _enum(value: Any, bounds: Bounds) -> Parts:
    return (type(value), value.name), [value.value]


def _text(value: Any, bounds: Bounds) -> Parts:
    return (type(value), str(value)), ()


def _plain(value: Any, bounds: Bounds) -> Parts:
    """An instance of a subclass of a number or string: the value and its attributes."""
    base: Any = next(b for b in (int, float, complex, str, bytes) if isinstance(value, b))
    content: Any = base.__new__(base, value)
    return _with_attributes((type(value),), [content], value, bounds)


def _array(value: Any, bounds: Bounds) -> Parts | None:
    if value.nbytes > bounds.bytes:
        return None
    label = type(value), value.shape, str(value.dtype), value.strides
    if value.dtype.hasobject:
        return None if value.size > bounds.entries or value.dtype != object else (label, list(value.flat))
    return (*label, _digest(value.tobytes())), ()


def _bytes(value: Any, bounds: Bounds) -> Parts | None:
    content = memoryview(value)
    return None if content.nbytes > bounds.bytes else ((type(value), content.nbytes, _digest(content.tobytes())), ())


def _digest(content: bytes) -> bytes:
    return content if len(content) <= 64 else hashlib.blake2b(content, digest_size=16).digest()


def _partial(value: Any, bounds: Bounds) -> Parts:
    return (type(value),), [value.func, value.args, value.keywords]


def _method(value: Any, bounds: Bounds) -> Parts:
    return (type(value),), [value.__func__, value.__self__]


def _reference(value: Any, bounds: Bounds) -> Parts:
    return (type(value),), [value()]


def _slice(value: Any, bounds: Bounds) -> Parts:
    return (slice,), [value.start, value.stop, value.step]


def _namespace(value: Any, bounds: Bounds) -> Parts:
    return (type(value), *vars(value)), list(vars(value).values())


def _module(value: Any, bounds: Bounds) -> Parts:
    return (type(value), value.__name__), ()


def _wrapper(value: Any, bounds: Bounds) -> Parts:
    return (type(value),), [value.__wrapped__]


def _property(value: Any, bounds: Bounds) -> Parts:
    return (type(value),), [value.fget]


# Functions and classes --------------------------------------------------------------------------------------------


def own_parts(function: types.FunctionType) -> int:
    """Return the number of parts of a function that are its own; the others are globals."""
    return 3 + len(function.__closure__ or ())


def _function(function: types.FunctionType, bounds: Bounds) -> Parts:
    """The code of a function, its defaults and closure, and if it is entered the globals that it names."""
    facts = code_facts(function.__code__)
    if is_library(function.__module__):
        return (types.FunctionType, facts), ()
    parts: list[Any] = [function.__defaults__, function.__kwdefaults__, _attributes_of(function)]
    parts += [_content(cell) for cell in function.__closure__ or ()]
    if not bounds.entered:
        return (types.FunctionType, facts, False), parts
    space = function.__globals__
    for name in facts.globals:
        value = space.get(name, _MISSING)
        if isinstance(value, types.ModuleType):
            _add_module(parts, value, facts.attributes)
        elif value is not _MISSING:  # otherwise a builtin
            parts.append(value)
    for name in facts.imports:
        _add_module(parts, sys.modules.get(name), facts.attributes)
    return (types.FunctionType, facts, len(parts)), parts


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _add_module(parts: list[Any], module: types.ModuleType | None, names: frozenset[str]) -> None:
    """Add the values in a module that code names, unless it is of a library."""
    if module is None or is_library(module.__name__):
        parts.append(module and module.__name__)
        return
    space = vars(module)
    if len(space) < len(names):
        found = [name for name in space if name in names]
    else:
        found = sorted(name for name in names if name in space)
    parts.append(module.__name__)
    for name in found:
        parts += (name, space[name])


def _class(value: type, bounds: Bounds) -> Parts | None:
    """The functions of a class by code, and its other attributes by content."""
    facts = class_facts(value)
    if is_library(value.__module__) or issubclass(value, Enum):
        return (value, facts.key) if issubclass(value, nn.Module) else (value,), ()
    functions, attributes = facts.functions(value), facts.attributes(value)
    label = value, facts.key, len(functions), *(name for name, _ in attributes)
    return label, [*functions, *(content for _, content in attributes)]


# Choice -----------------------------------------------------------------------------------------------------------


_Split = Callable[[Any, Bounds], Parts | None]


_BUILTIN: dict[type, _Split] = {
    **dict.fromkeys((tuple, list, set, frozenset, deque), _sequence),
    **dict.fromkeys((dict, OrderedDict, defaultdict, types.MappingProxyType), _mapping),
    type: _class,
    types.FunctionType: _function,
    types.MethodType: _method,
    functools.partial: _partial,
    functools.partialmethod: _partial,
    type(functools.lru_cache(len)): _wrapper,
    property: _property,
    staticmethod: _wrapper,
    classmethod: _wrapper,
    weakref.ref: _reference,
    weakref.WeakMethod: _reference,
    slice: _slice,
    bytearray: _bytes,
    array: _bytes,
    types.SimpleNamespace: _namespace,
}


_SPLITS: weakref.WeakKeyDictionary[type, _Split] = weakref.WeakKeyDictionary()


_OF_BASES: tuple[tuple[type | tuple[type, ...], _Split], ...] = (
    (Tensor, _opaque),
    (types.ModuleType, _module),
    (type, _class),
    (Enum, _enum),
    ((tuple, list, set, frozenset, deque), _sequence),
    (dict, _mapping),
    ((UserDict, UserList), _wrapped_container),
    (types.SimpleNamespace, _namespace),
    (functools.partial, _partial),
    (weakref.ref, _reference),
    ((PurePath, Decimal, date, time, timedelta), _text),
)


_OPEN = ("torch.distributions", "torch.nn", "argparse", "fractions", "collections", "dataclasses", "types")
"""Libraries whose objects are compared by content; objects of all others, such as optimizers, have much other state."""


_CLOSED = ("lightning", "pytorch_lightning", "accelerate", "deepspeed")
"""Packages of trainers, which change in every step."""


def _split_of(kind: type) -> _Split:
    for bases, split in _OF_BASES:
        if issubclass(kind, bases):
            return split
    if any(c.__module__ == "numpy" and c.__name__ in ("ndarray", "generic") for c in kind.__mro__):
        return _array
    if issubclass(kind, int | float | complex | str | bytes):
        return _plain
    name = kind.__module__
    opened = any(name == each or name.startswith(f"{each}.") for each in _OPEN)
    if name.partition(".")[0] in _CLOSED or (is_library(name) and not opened):
        return _opaque
    return _object
