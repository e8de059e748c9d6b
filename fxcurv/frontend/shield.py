"""Calls of the user's own model, after which the model and the process are as before.

A structural copy has modules of its own, so a closure, a global variable or a weak reference that leads to a module
leads past it. `shielded` therefore calls the model itself: its parameters are replaced by leaves that share their
values, so that gradients, and hooks that act on finished gradients (optimizers, DistributedDataParallel), stay away
from the model; attributes, containers, buffers, gradients and generators are restored afterwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.core.torch_compat import autograd_nodes, gradient_hooks, hold, version_of
from fxcurv.frontend.copying import named_tensors
from fxcurv.frontend.isolation import TRACING, generators_beside_torch, reseeded, without_autocast

__all__ = ["Shield", "restored", "shielded"]


DEPTH, OBJECTS = 4, 200_000
"""Depth, and number of objects per level, to which contents of a module's attributes are restored."""


@dataclass(frozen=True)
class Shield:
    """The model during a shielded call: `leaves[name]` stands in for the parameter of that name."""

    leaves: dict[str, Tensor]
    originals: dict[str, Tensor]
    tensors: dict[str, Tensor]
    """The parameters and buffers under all of their names, as the model sees them."""
    has_drawn: Callable[[], bool]
    """Whether the model has drawn from a global generator."""

    def backward(self, output: Tensor, cotangent: Tensor, wanted: Collection[str]) -> dict[str, Tensor | None]:
        """Return the gradients that `output.backward(cotangent)` leaves on the wanted parameters, or None.

        The gradients of all other parameters are freed when they are computed. A parameter that a closure holds
        directly receives its gradient beside its leaf: both are added. No gradient of other tensors changes, and none
        of their hooks on finished gradients is called.
        """
        if not output.requires_grad:
            return dict.fromkeys(wanted)
        ours = set(map(id, self.leaves.values()))
        leaves = (node.variable for node in autograd_nodes(output) if hasattr(node, "variable"))
        held = {id(t): t for t in (*leaves, *self.originals.values()) if id(t) not in ours}
        with ExitStack() as stack:
            for t in held.values():
                stack.enter_context(_without_gradient(t))
            for name, leaf in self.leaves.items():
                leaf.grad = None
                if name not in wanted:
                    stack.callback(leaf.register_post_accumulate_grad_hook(_freed).remove)
            output.backward(cotangent)
            return {name: _sum(_dense(self.leaves[name]), _dense(self.originals[name])) for name in wanted}


@contextmanager
def shielded(model: nn.Module, dtype: torch.dtype | None = None) -> Generator[Shield]:
    """Replace the parameters of a model by leaves of equal values, and restore everything at the end.

    With `dtype`, floating-point parameters and buffers are copies in that dtype. Global generators are seeded afresh,
    so that calls differ in random numbers. One thread at a time is inside.
    """
    with restored(model), reseeded() as has_drawn:
        originals: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fresh = {id(p): _leaf(p, dtype) for p in model.parameters()}
        leaves = {name: fresh[id(p)] for name, p in originals.items()}
        for module in list(model.modules()):
            for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                hold(module, name, fresh[id(p)])
            for name, b in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                if dtype is not None and b.is_floating_point():
                    hold(module, name, b.to(dtype))
        with torch.inference_mode(False), torch.enable_grad(), without_autocast():
            tensors = {name: t.detach() for name, t in named_tensors(model).items()}
            yield Shield(leaves, originals, tensors, has_drawn)


@contextmanager
def restored(model: nn.Module) -> Generator[None]:
    """Restore attributes, containers, buffers and all global generators at the end."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with TRACING, torch.random.fork_rng(devices=devices), generators_beside_torch():
        buffers = [(b, version_of(b), b.detach().clone()) for b in model.buffers()]
        restores = [*_modules(model), *_contents(model)]
        try:
            yield
        finally:
            for restore in restores:
                restore()
            with torch.no_grad():
                for buffer, version, value in buffers:
                    if version_of(buffer) != version:
                        buffer.copy_(value)


# Leaves -----------------------------------------------------------------------------------------------------------


def _leaf(p: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a parameter that shares the values of `p`, with its attributes."""
    value = p.detach() if dtype is None or not p.is_floating_point() else p.detach().to(dtype)
    leaf = nn.Parameter(value, requires_grad=p.requires_grad)
    vars(leaf).update(vars(p))
    return leaf


def _freed(leaf: Tensor) -> None:
    leaf.grad = None


@contextmanager
def _without_gradient(t: Tensor) -> Generator[None]:
    """Set the gradient and the hooks of a leaf aside."""
    gradient, hooks = t.grad, [(hooks, dict(hooks)) for hooks in gradient_hooks(t)]
    t.grad = None
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        t.grad = gradient
        for registered, before in hooks:
            registered.update(before)


def _dense(leaf: Tensor) -> Tensor | None:
    """Return the gradient of a leaf as a dense tensor."""
    return leaf.grad if leaf.grad is None or leaf.grad.layout == torch.strided else leaf.grad.to_dense()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b.to(a)


# Attributes -------------------------------------------------------------------------------------------------------

_ATOMS = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, Tensor, nn.Module)


_CODE = (FunctionType, MethodType, BuiltinFunctionType, ModuleType)


def _modules(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield a function per module that restores its attributes, and the dictionaries that hold tensors and hooks."""
    for module in model.modules():
        yield _mapping(vars(module))


def _contents(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield a function per container or plain object reachable from attributes that restores its contents."""
    seen = set[int]()
    level: list[Any] = [value for module in model.modules() for value in vars(module).values()]
    for _ in range(DEPTH):
        following: list[Any] = []
        for value in level:
            if isinstance(value, _ATOMS) or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, dict):
                yield _mapping(value)
                following += value.values()
            elif isinstance(value, list | deque):
                yield _sequence(value)
                following += value
            elif isinstance(value, set):
                yield _set(value)
            elif isinstance(value, tuple):
                following += value
            elif _is_plain(value):
                yield _mapping(vars(value))
                following += vars(value).values()
        level = following[:OBJECTS]


def _is_plain(value: Any) -> bool:
    """Whether a value is an object with attributes, and not a function or a module of code."""
    return not isinstance(value, _CODE) and isinstance(getattr(value, "__dict__", None), dict)


def _mapping(mapping: MutableMapping[Any, Any]) -> Callable[[], None]:
    before = list(mapping.items())

    def restore() -> None:
        now = list(mapping.items())
        if len(now) == len(before) and all(a is c and b is d for (a, b), (c, d) in zip(now, before, strict=True)):
            return
        mapping.clear()
        mapping.update(before)

    return restore


def _sequence(values: Any) -> Callable[[], None]:
    before = list(values)

    def restore() -> None:
        if len(values) != len(before) or any(a is not b for a, b in zip(values, before, strict=True)):
            values.clear()
            values.extend(before)

    return restore


def _set(values: set[Any]) -> Callable[[], None]:
    before = set(values)

    def restore() -> None:
        values.clear()
        values.update(before)

    return restore
