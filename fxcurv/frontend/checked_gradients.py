"""Plain autograd through custom gradients: each is tried when a forward pass first calls it.

Plain autograd calls the backward of every `torch.autograd.Function` and every hook itself. Columns of a Jacobian pulled
back one by one are right only if these are linear in the gradient; otherwise they are refused by name. Reentrant
checkpoints, which `torch.autograd.grad` does not support, run their function.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import BackwardHook

from fxcurv.core.errors import FxcurvError, UnsupportedError, called_at
from fxcurv.core.torch_compat import outside_of_trace
from fxcurv.frontend.custom_gradients import (
    Forward,
    arguments_of,
    inspected,
    intercepted,
    is_dual,
    refusal,
)
from fxcurv.ir.custom_gradients import CustomCall
from fxcurv.ir.held_tensors import title_of
from fxcurv.trials.custom_gradients import nonlinearity, undifferentiable

__all__ = ["CustomGradients", "once_differentiable"]


Pull = Callable[[dict[int, Tensor], bool], Sequence[Tensor]]
"""From cotangents to gradients, with a graph if the flag is set."""


@dataclass(frozen=True)
class _Outcome:
    """A custom gradient, why it is not linear, and why it cannot be differentiated; None if it is, or can."""

    name: str
    fault: str | None
    once: str | None


class CustomGradients:
    """The custom gradients that forward passes of a model have called, each tried once by what is called and where."""

    def __init__(self) -> None:
        self.outcomes: dict[object, _Outcome] = {}

    def __bool__(self) -> bool:
        return bool(self.outcomes)

    @contextmanager
    def checked(self) -> Generator[None]:
        """Inside, raise an error (FXC108) for a Function or hook whose backward is not linear, where it is called."""
        with intercepted(self._function, lambda *args: _Module(self, *args)), _Hooks(self):
            yield

    def require_second(self) -> None:
        """Raise an error (FXC301) for a Function or hook whose backward autograd cannot differentiate."""
        for outcome in self.outcomes.values():
            if outcome.once is not None:
                raise once_differentiable(outcome.name, outcome.once)

    def _function(self, function: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, tensors = CustomCall.of(function, arguments_of(function, args), kwargs, called_at())
        ks = [k for k, t in enumerate(tensors) if t.requires_grad and call.direct[k]]
        if ks and not any(map(is_dual, tensors)):
            pull = lambda Ss, graph: call.pull(tensors, ks, Ss, graph=graph)  # noqa: E731
            self.check((function, call.location[:1]), call.name, lambda: _outputs(call, tensors), pull)
        return forward(*args, **kwargs)

    def check(self, key: object, name: str, like: Callable[[], Mapping[int, Tensor]], pull: Pull) -> None:
        """Raise an error if a custom gradient is not linear in cotangents like some tensors."""
        if key not in self.outcomes:
            with outside_of_trace(), torch.random.fork_rng(devices=[]), saved_tensors_hooks(_same, _same):
                self.outcomes[key] = _tried(name, {j: t.detach() for j, t in like().items()}, pull)
        outcome = self.outcomes[key]
        if outcome.fault is not None:
            raise refusal(name, outcome.fault, called_at())


def _same(t: Tensor) -> Tensor:
    return t  # in place of the hooks of a checkpoint, which count the tensors that are saved


def _tried(name: str, like: Mapping[int, Tensor], pull: Pull) -> _Outcome:
    if not like:
        return _Outcome(name, None, None)
    generator = torch.Generator(next(iter(like.values())).device).manual_seed(0)
    try:
        with torch.no_grad():
            fault = nonlinearity(lambda Ss: pull(Ss, False), like, generator)
    except FxcurvError as error:
        fault = error.cause.partition(": ")[2] or error.cause
    except Exception as error:
        fault = f"its backward fails on random numbers: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    once = None if fault else undifferentiable(lambda Ss: pull(Ss, True), like, generator)
    return _Outcome(name, fault, once)


def _outputs(call: CustomCall, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return the outputs of a call that have gradients."""
    found, _ = inspected(call, tensors)
    outputs = [t for t in found if isinstance(t, Tensor)]
    return {j: y for j, y in enumerate(outputs) if call.differentiable[j]}


def once_differentiable(name: str, why: str) -> UnsupportedError:
    """Return the error for a custom gradient in a quantity that differentiates twice."""
    return UnsupportedError(
        f"torch cannot differentiate {name} twice: {why}",
        remedy="write its backward in differentiable ops, or use a quantity without second derivatives",
        code="FXC301",
    )


class _Hooks(TorchFunctionMode):
    """Tries the hooks that are registered on tensors other than leaves."""

    def __init__(self, gradients: CustomGradients) -> None:
        super().__init__()
        self.gradients = gradients

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.register_hook:
            self._try(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _try(self, tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
        if tensor.is_leaf or is_dual(tensor):
            return
        where = called_at()[:1]

        def pull(Ss: dict[int, Tensor], graph: bool) -> list[Tensor]:
            new = hook(given := Ss[0].clone())
            return [given if new is None else new]

        name = f"the hook {title_of(hook)} on a tensor{f' at {where[0]}' if where else ''}"
        self.gradients.check((getattr(hook, "__code__", type(hook)), where), name, lambda: {0: tensor}, pull)


class _Module(BackwardHook):
    """Torch's own backward hooks of a module, tried."""

    def __init__(self, gradients: CustomGradients, module: nn.Module, hooks: Any, pre_hooks: Any) -> None:
        super().__init__(module, hooks, pre_hooks)
        self.gradients = gradients
        self.arguments: tuple[Any, ...] = ()

    def setup_input_hook(self, args: tuple[Any, ...]) -> Any:
        """Return the arguments behind the hooks, as torch does."""
        self.arguments = args
        return super().setup_input_hook(args)

    def setup_output_hook(self, args: Any) -> Any:
        """Try all hooks; return the result behind the hooks, as torch does."""
        results = args if isinstance(args, tuple) else (args,)
        like, count = [*results, *self.arguments], len(results)
        tensors = {k: t for k, t in enumerate(like) if isinstance(t, Tensor) and t.requires_grad}
        if tensors and not any(map(is_dual, tensors.values())):
            for hook in (*self.user_pre_hooks, *self.user_hooks):
                pre = hook in self.user_pre_hooks
                own = {k: t for k, t in tensors.items() if not pre or k < count}
                name = f"the backward hook {title_of(hook)} on a {type(self.module).__name__}"
                pull = self._pull(hook, pre, len(like), count)
                key = getattr(hook, "__code__", type(hook)), name
                self.gradients.check(key, name, lambda own=own: own, pull)
        return super().setup_output_hook(args)

    def _pull(self, hook: Any, pre: bool, size: int, count: int) -> Pull:
        """Return the function from gradients of results and arguments to those that a hook returns."""

        def pull(Ss: dict[int, Tensor], graph: bool) -> list[Tensor]:
            given = [Ss[k].clone() if k in Ss else None for k in range(size)]
            results, arguments = tuple(given[:count]), tuple(given[count:])
            old = results if pre else arguments
            new = hook(self.module, results) if pre else hook(self.module, arguments, results)
            new = old if new is None else new if isinstance(new, tuple | list) else (new,)
            return [t for t in new if isinstance(t, Tensor)]

        return pull
