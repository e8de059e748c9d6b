"""Calls of a `torch.autograd.Function`, whose gradient is defined by its own backward, as single ops.

A traced call is one node, a call of `fxcurv::custom_gradient` with the tensors among its arguments and a key. The key
identifies a `CustomCall`, which holds the Function and its other arguments. The entry of the table lives as long as the
call itself: nodes hold it in `meta["custom_call"]`, and modules of the vocabulary in `call`. Hooks that change
gradients are calls, too, of the identity `Hooked`, whose backward is the hook. A hook on a tensor is traced as
`fxcurv::gradient_hook`, which marks the tensor and computes nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fxcurv.core.errors import Location
from fxcurv.core.torch_compat import FakeTensor, pytree
from fxcurv.ir.calls import INPUT
from fxcurv.ir.held_tensors import Held, held

__all__ = ["CustomCall", "CustomGradient", "GradientHook", "Hooked", "call_of", "is_running"]


# Calls ------------------------------------------------------------------------------------------------------------


_CALLS: WeakValueDictionary[int, CustomCall] = WeakValueDictionary()


_KEYS = itertools.count()


class _State(threading.local):
    running = 0


_STATE = _State()


def is_running() -> bool:
    """Whether this thread is inside `CustomCall.run`."""
    return _STATE.running > 0


@contextmanager
def _running() -> Generator[None]:
    _STATE.running += 1
    try:
        yield
    finally:
        _STATE.running -= 1


class CustomCall:
    """One call `function.apply(*args, **kwargs)`, for any values of the tensors in `args` and `kwargs`.

    `direct` tells for each tensor whether it is an argument itself. Others are items of containers or held by
    functions, and autograd takes them as constants. `differentiable` tells for each output tensor whether it has a
    gradient; `overwrites` maps an output to the input that the Function overwrites with it. `twice` is set once the
    backward was differentiated.
    """

    def __init__(self, function: Any, location: Location = ()) -> None:
        self.function, self.location, self.key = function, location, next(_KEYS)
        self.leaves: list[Any] = []
        self.spec: Any = None
        self.direct: tuple[bool, ...] = ()
        self.differentiable: tuple[bool, ...] = ()
        self.overwrites: dict[int, int] = {}
        self.twice = False
        _CALLS[self.key] = self

    @classmethod
    def of(
        cls, function: Any, args: Sequence[Any], kwargs: dict[str, Any], location: Location = ()
    ) -> tuple[CustomCall, list[Tensor]]:
        """Return the call and its tensors: of `args` and `kwargs`, and those that functions among these hold."""
        call, tensors, direct = cls(function, location), list[Tensor](), list[bool]()
        arguments = {id(a) for a in (*args, *kwargs.values())}
        leaves, call.spec = pytree.tree_flatten((tuple(args), kwargs))
        for leaf in leaves:
            kept, found = (INPUT, [leaf]) if isinstance(leaf, Tensor) else held(leaf)
            call.leaves.append(kept)
            tensors += found
            direct += [kept is INPUT and id(t) in arguments for t in found]
        call.direct = tuple(direct)
        return call, tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> CustomCall:
        return self

    @property
    def hook(self) -> GradientHook | None:
        """The hook, if this is the call of one."""
        first = self.leaves[0] if self.leaves else None
        return first if isinstance(first, GradientHook) else None

    @property
    def title(self) -> str:
        """Name of the Function, or of the hook."""
        return self.function.__name__ if self.hook is None else self.hook.title

    @property
    def name(self) -> str:
        """Name in errors, with the line of the call."""
        where = f" at {self.location[0]}" if self.location else ""
        return f"{f'the autograd.Function {self.title}' if self.hook is None else f'the {self.title}'}{where}"

    def returned(self, tensors: Sequence[Tensor]) -> Any:
        """Call the Function on these tensors; return all that it returns."""
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten([_filled_in(leaf, given) for leaf in self.leaves], self.spec)
        with _running():
            return self.function.apply(*args, **kwargs)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the output tensors of the Function, in order."""
        tensors = [t.clone() for t in tensors] if self.overwrites else tensors
        return [t for t in pytree.tree_leaves(self.returned(tensors)) if isinstance(t, Tensor)]

    def pull(
        self,
        xs: Sequence[Tensor],
        ks: Sequence[int],
        Ss: dict[int, Tensor],
        batched: bool = False,
        graph: bool = False,
    ) -> list[Tensor]:
        """Pull cotangents `Ss` of some outputs back to the inputs `ks`, by the Function's backward after a new call.

        The cotangents of all other outputs are zero. With `batched`, the first axis of all cotangents are columns; with
        `graph`, the results are differentiable.
        """
        with torch.enable_grad():
            leaves = [
                x.detach().requires_grad_() if k in ks and self.direct[k] else x.detach() for k, x in enumerate(xs)
            ]
            ys = {j: y for j, y in enumerate(self.run(leaves)) if y.requires_grad}
            given = [self._cotangent(Ss, j, y, batched) for j, y in ys.items()]
            at = [leaves[k] for k in ks if leaves[k].requires_grad]
            found: Any = iter(())
            if ys and at:
                with _running():
                    found = torch.autograd.grad(
                        list(ys.values()),
                        at,
                        given,
                        create_graph=graph,
                        allow_unused=True,
                        is_grads_batched=batched,
                    )
        pulled, lead = iter(found), next(iter(Ss.values())).shape[: int(batched)]
        return [_filled(next(pulled, None) if leaves[k].requires_grad else None, xs[k], lead, graph) for k in ks]

    def _cotangent(self, Ss: dict[int, Tensor], j: int, y: Tensor, batched: bool) -> Tensor:
        """A copy of the cotangent of output j: a backward may write into its argument."""
        if j in Ss:
            return Ss[j].to(y.dtype).clone(memory_format=torch.contiguous_format)
        lead = next(iter(Ss.values())).shape[: int(batched)]
        return y.new_zeros(*lead, *y.shape)


def _filled_in(leaf: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the argument, with its own tensors replaced by the next ones."""
    if isinstance(leaf, Held):
        return leaf.rebound([next(tensors) for part in leaf.leaves if part is INPUT])
    return next(tensors) if leaf is INPUT else leaf


def _filled(pulled: Tensor | None, x: Tensor, lead: Sequence[int], graph: bool) -> Tensor:
    if pulled is None:
        return x.new_zeros(*lead, *x.shape)
    return pulled if graph else pulled.detach()


def call_of(key: int) -> CustomCall:
    """Return the call of a node's key."""
    return _CALLS[key]


class CustomGradient(nn.Module):
    """y = output `part` of a `torch.autograd.Function`, pulled back by the Function's own backward."""

    def __init__(self, call: CustomCall, part: int) -> None:
        super().__init__()
        self.call, self.part = call, part

    def forward(self, *xs: Tensor) -> Tensor:
        return self.call.run(xs)[self.part]

    def pull(self, S: Tensor, xs: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor]:
        """S[v, *y.shape] -> S[v, *x_k.shape] for every k, one column at a time."""
        if isinstance(S, FakeTensor):  # only shapes are asked
            return [xs[k].new_zeros(len(S), *xs[k].shape) for k in ks]
        columns = [self.call.pull(xs, ks, {self.part: column}) for column in S]
        return [torch.stack(each) for each in zip(*columns, strict=True)]

    def pull_together(self, S: Tensor, xs: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor]:
        """`pull` with one call of the backward for all columns, by torch's batching rules."""
        if isinstance(S, FakeTensor):
            return self.pull(S, xs, ks)
        return self.call.pull(xs, ks, {self.part: S}, batched=True)

    def extra_repr(self) -> str:
        return f"{self.call.title}, part={self.part}" if self.part else self.call.title


# Hooks ------------------------------------------------------------------------------------------------------------


class GradientHook:
    """Hooks as a function of gradients; `pull` returns those that replace them, None for an unchanged one.

    `title` names the hook in errors.
    """

    title: str

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientHook:
        return self

    def pull(self, grads: Sequence[Tensor], held: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the new gradients; `held` are the current values of the tensors that the hook holds."""
        raise NotImplementedError

    def probe(self, grads: Sequence[Tensor], held: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """`pull` for random gradients; by default the same."""
        return self.pull(grads, held)

    def observes(self, draw: Callable[[float], tuple[Sequence[Tensor], Sequence[Tensor]]]) -> bool:
        """Whether the hook leaves random gradients of several scales as they are; `draw` also returns `held`."""
        for scale in (1e-6, 1.0, 1e6):
            grads, held = draw(scale)
            given = [g.clone() for g in grads]
            new = self.probe(given, held)
            if any(n is not None and n is not g for n, g in zip(new, given, strict=True)):
                return False
            if not all(torch.equal(a, b) for a, b in zip(given, grads, strict=True)):
                return False
        return True


class Hooked(torch.autograd.Function):
    """The identity of several tensors, whose backward calls a hook."""

    @staticmethod
    def forward(ctx: Any, hook: GradientHook, held: Sequence[Tensor], *tensors: Tensor) -> Any:
        """Return `tensors`."""
        ctx.hook, ctx.held = hook, held
        ctx.mark_non_differentiable(*[t for t in tensors if not t.requires_grad])
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients that the hook returns, or leaves."""
        given = [g.clone() for g in grads]
        new = ctx.hook.pull(given, ctx.held)
        return None, None, *(g if n is None else n for n, g in zip(new, given, strict=True))


# Operators --------------------------------------------------------------------------------------------------------


_LIBRARY = torch.library.Library("fxcurv", "FRAGMENT")
_LIBRARY.define("custom_gradient(Tensor[] tensors, int key) -> Tensor[]")
_LIBRARY.define("gradient_hook(Tensor(a!) x, Tensor[] held, int key) -> ()")  # as if it wrote, so that no pass drops it


def _custom_gradient(tensors: Sequence[Tensor], key: int) -> list[Tensor]:
    """The outputs in memory of their own, without a graph."""
    with torch.no_grad():
        return [t.clone() for t in call_of(key).run([t.detach() for t in tensors])]


def _gradient_hook(x: Tensor, held: Sequence[Tensor], key: int) -> None:
    """Nothing: the call marks x."""


_LIBRARY.impl("custom_gradient", _custom_gradient, "CompositeExplicitAutograd")
_LIBRARY.impl("gradient_hook", _gradient_hook, "CompositeExplicitAutograd")
torch.library.register_fake("fxcurv::custom_gradient", _custom_gradient, lib=_LIBRARY)
torch.library.register_fake("fxcurv::gradient_hook", _gradient_hook, lib=_LIBRARY)
