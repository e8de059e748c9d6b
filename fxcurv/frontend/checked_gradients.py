"""Plain autograd through custom gradients: each is tried when a forward pass first calls it.

Plain autograd calls the backward of every `torch.autograd.Function` and every hook itself. Columns of a Jacobian pulled
back one by one are right only if these are linear in the gradient; otherwise they are refused by name. Reentrant
checkpoints, which `torch.autograd.grad` does not support, run their function.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import BackwardHook

from fxcurv.core.errors import called_at
from fxcurv.core.torch_compat import outside_of_trace, pytree
from fxcurv.frontend.custom_gradients import (
    Forward,
    arguments_of,
    inspected,
    intercepted,
    is_dual,
    refusal,
    title_of_hook,
)
from fxcurv.ir.custom_gradients import CustomCall
from fxcurv.ir.trials import nonlinearity

__all__ = ["CustomGradients"]


class CustomGradients:
    """The custom gradients that forward passes of a model have called: `names`, by what is called and where."""

    def __init__(self) -> None:
        self.names: dict[object, str] = {}

    @contextmanager
    def checked(self) -> Generator[None]:
        """Inside, raise an error (FXC108) for a Function or hook whose backward is not linear, where it is called."""
        with intercepted(self._function, lambda *args: _Module(self, *args)), _Hooks(self):
            yield

    def _function(self, function: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = CustomCall(function, arguments_of(function, args), kwargs, called_at())
        tensors = [t for t in pytree.tree_leaves((arguments_of(function, args), kwargs)) if isinstance(t, Tensor)]
        ks = [k for k, t in enumerate(tensors) if t.requires_grad and call.direct[k]]
        if ks and not any(map(is_dual, tensors)):
            self.check((function, call.location[:1]), call.name, lambda: _fault(call, tensors, ks))
        return forward(*args, **kwargs)

    def check(self, key: object, name: str, fault: Callable[[], str | None]) -> None:
        """Raise an error if a custom gradient, tried once per key, has a fault."""
        if key in self.names:
            return
        self.names[key] = name
        with outside_of_trace(), torch.random.fork_rng(devices=[]):
            why = fault()
        if why is not None:
            raise refusal(name, why, called_at())


def linear_fault(pull: Callable[[dict[int, Tensor]], Sequence[Tensor]], like: Mapping[int, Tensor]) -> str | None:
    """Return how a function of cotangents like these tensors is not linear, or None."""
    first = next(iter(like.values()), None)
    if first is None:
        return None
    generator = torch.Generator(first.device).manual_seed(0)
    with torch.no_grad():
        return nonlinearity(pull, {j: t.detach() for j, t in like.items()}, generator)


def _fault(call: CustomCall, tensors: Sequence[Tensor], ks: Sequence[int]) -> str | None:
    found, _ = inspected(call, tensors)
    outputs = [t for t in found if isinstance(t, Tensor)]
    like = {j: y for j, y in enumerate(outputs) if call.differentiable[j]}
    return linear_fault(lambda Ss: call.pull(tensors, ks, Ss), like)


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

        def pull(Ss: dict[int, Tensor]) -> list[Tensor]:
            new = hook(given := Ss[0].clone())
            return [given if new is None else new]

        name = f"the hook {title_of_hook(hook)} on a tensor{f' at {where[0]}' if where else ''}"
        self.gradients.check(
            (getattr(hook, "__code__", type(hook)), where), name, lambda: linear_fault(pull, {0: tensor})
        )


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
                name = f"the backward hook {title_of_hook(hook)} on a {type(self.module).__name__}"
                pull = self._pull(hook, pre, len(like), count)
                self.gradients.check(
                    (getattr(hook, "__code__", type(hook)), name), name, lambda f=pull, t=own: linear_fault(f, t)
                )
        return super().setup_output_hook(args)

    def _pull(self, hook: Any, pre: bool, size: int, count: int) -> Callable[[dict[int, Tensor]], list[Tensor]]:
        """Return the function from gradients of results and arguments to those that a hook returns."""

        def pull(Ss: dict[int, Tensor]) -> list[Tensor]:
            given = [Ss[k].clone() if k in Ss else None for k in range(size)]
            results, arguments = tuple(given[:count]), tuple(given[count:])
            old = results if pre else arguments
            new = hook(self.module, results) if pre else hook(self.module, arguments, results)
            new = old if new is None else new if isinstance(new, tuple | list) else (new,)
            return [t for t in new if isinstance(t, Tensor)]

        return pull
