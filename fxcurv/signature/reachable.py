"""The objects that a model may read when it is called, as a flat key.

The walk is breadth first: from modules to their parameters, buffers, hooks and attributes, from there to the contents
of objects (fxcurv/signature/contents.py), and from functions to the globals and closures that their code names
(fxcurv/signature/code.py). An object that is met again is a reference to its first place. Objects beyond the bounds are
compared by identity.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from types import EllipsisType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from fxcurv.core.identity import Same
from fxcurv.core.torch_compat import address_of, version_of
from fxcurv.signature.contents import Bounds, Parts, own_parts, parts_of

__all__ = ["DEPTH", "LEVELS", "OBJECTS", "Walk", "modules_of"]


DEPTH = 6
"""Number of steps from an attribute into the parts of its value; parts beyond are compared by identity."""


LEVELS = 2
"""Number of steps from forward to functions that code names; of functions beyond, globals are not compared."""


OBJECTS = 2000
"""Number of objects besides the model's modules that are compared by content; objects beyond by identity."""


_BY_VALUE = frozenset((bool, int, str, bytes, type(None), torch.dtype, torch.device, EllipsisType, range))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_OPTIONS_OF_HOOKS = ("_with_kwargs", "_always_called")


BOOKKEEPING = frozenset(vars(nn.Module()))


class Walk:
    """A walk over the objects that are reachable from a model, given by its modules, and from noted values."""

    entered, closed = Bounds(), Bounds(entered=False)
    depth, objects = DEPTH, OBJECTS

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        self.out: list[Hashable] = []
        self.modules = modules
        self._places = {id(m): k for k, m in enumerate(modules)}
        self._queue: list[tuple[Any, int, int]] = []  # object, depth, level; it keeps objects, so that ids are unique
        self._tensors: dict[int, int] = {}

    def key(self, *values: object) -> tuple[Hashable, ...]:
        """Return the key of the model, the hooks of every module, and other values."""
        out = self.out
        for module in self.modules:
            self.module(module)
        self.global_hooks()
        for value in values:
            self.note(value)
        self.drain()
        return tuple(out)

    def global_hooks(self) -> None:
        """Add the hooks of every module."""
        self._hooks_among(vars(every_module), "_global", 0, 0)

    def note(self, value: Any, depth: int = 0, level: int = 0) -> None:
        """Add a value to the key, and to the queue if it has parts."""
        kind, out = type(value), self.out
        if kind in _BY_VALUE:
            out += (kind, value)
        elif kind is float:
            out += (kind, value.hex())  # NaN equals itself, and -0.0 is not 0.0
        elif kind is complex:
            out += (kind, value.real.hex(), value.imag.hex())
        elif (place := self._places.get(id(value))) is not None:
            out += (Walk, place)
        elif isinstance(value, Tensor):
            self.tensor(value)
        elif depth > self.depth or len(self._queue) >= self.objects:
            self.identity(value)
        else:
            self._places[id(value)] = len(self.modules) + len(self._queue)
            self._queue.append((value, depth, level))
            out.append(Walk)

    def drain(self) -> None:
        """Add the parts of the objects in the queue."""
        for value, depth, level in self._queue:
            if isinstance(value, nn.Module):
                self.module(value, depth, level, own=False)
                continue
            found = self.parts(value, self.entered if level <= LEVELS else self.closed)
            if found is None:
                self.identity(value)
                continue
            label, parts = found
            self.label(label)
            if type(value) is FunctionType:
                own = own_parts(value)
                for k, part in enumerate(parts):
                    self.note(part, depth, level if k < own else level + 1)
            else:
                for part in parts:
                    self.note(part, depth + 1, level)

    def module(self, module: nn.Module, depth: int = 0, level: int = 0, own: bool = True) -> None:
        """Add a module; the key omits the values of parameters and buffers of the model's `own` modules."""
        out, attributes = self.out, vars(module)
        self.note(type(module), depth, level)
        self.structure(module, depth, level, own)
        self.hooks(module, depth, level)
        for name, value in attributes.items():
            if name in BOOKKEEPING or (name in _OWN_TENSORS and _are_parameters(value, attributes)):
                continue
            kind = type(value)
            if kind in _BY_VALUE:
                out += (name, kind, value)
            else:
                out.append(name)
                self.note(value, depth, level)

    def structure(self, module: nn.Module, depth: int = 0, level: int = 0, own: bool = True) -> None:
        """Add a module's mode, its parameters and buffers, and the places of submodules."""
        out, attributes, places = self.out, vars(module), self._places
        out.append(attributes.get("training"))
        tensors = self._own_tensor if own else self.tensor
        for kind in ("_parameters", "_buffers"):
            held = attributes.get(kind)
            if not held:
                continue
            out.append(len(held))
            for name, t in held.items():
                out.append(name)
                if t is None:
                    out.append(None)
                else:
                    tensors(t)
        for name, child in (attributes.get("_modules") or {}).items():
            if own and child is not None:
                out += (name, places[id(child)])
            else:
                out.append(name)
                self.note(child, depth + 1, level)

    def hooks(self, module: nn.Module, depth: int = 0, level: int = 0) -> None:
        """Add the hooks of a module's forward and backward."""
        attributes = vars(module)
        if any(map(attributes.get, _HOOKS)):
            self._hooks_among(attributes, "", depth, level)

    def _hooks_among(self, attributes: Mapping[str, Any], prefix: str, depth: int, level: int) -> None:
        """Add hooks in their order, without the numbers by which they are removed."""
        for name in _HOOKS:
            if not (hooks := attributes.get(f"{prefix}{name}")):
                continue
            options = [attributes.get(f"{prefix}{name}{option}") or () for option in _OPTIONS_OF_HOOKS]
            self.out += (name, len(hooks), attributes.get(f"{prefix}_is_full_backward_hook"))
            for number, hook in hooks.items():
                self.out += [number in chosen for chosen in options]
                self.note(hook, depth, level)

    def parts(self, value: object, bounds: Bounds) -> Parts | None:
        """Return the label and parts of an object."""
        return parts_of(value, bounds)

    def label(self, label: tuple[Hashable, ...]) -> None:
        """Add the label of an object with parts."""
        self.out.append(label)

    def identity(self, value: object) -> None:
        """Add an object that is compared by identity."""
        self.out.append(Same(value))

    def tensor(self, t: Tensor) -> None:
        """Add a tensor that is neither parameter nor buffer of the model, and part of the graph as a constant."""
        out = self.out
        out += (Same(t), version_of(t), address_of(t), t.shape, t.dtype, t.device, t.requires_grad)
        if t.layout == torch.strided:
            out.append(t.stride())
        self._hooks_of(t)

    def _own_tensor(self, t: Tensor) -> None:
        place = self._tensors.get(id(t))
        if place is not None:
            self.out.append(place)
            return
        self._tensors[id(t)] = len(self._tensors)
        self.out += (type(t), t.shape, t.dtype, t.device, t.requires_grad)
        self._hooks_of(t)

    def _hooks_of(self, t: Tensor) -> None:
        if hooks := t._backward_hooks:
            self.out.append(len(hooks))
            for hook in hooks.values():
                self.note(hook)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return a model's modules, each once; `model.modules()` takes several times as long."""
    found, seen = [model], {id(model)}
    for module in found:
        for child in (vars(module).get("_modules") or {}).values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


_OWN_TENSORS = ("_flat_weights", "_flat_weight_refs")
"""Lists in which nn.LSTM holds its parameters once more."""


def _are_parameters(value: object, attributes: dict[str, Any]) -> bool:
    """Whether a list holds just parameters of its module, or references to them."""
    own = {id(t) for t in attributes["_parameters"].values()}
    return type(value) is list and all(id(t() if isinstance(t, weakref.ref) else t) in own for t in value)
