"""J v in forward mode, where forward and backward derivatives agree.

Forward mode takes one pass per column besides the first, while differentiating a graph twice takes two backward passes.
Backward derivatives stop where a model computes without gradients, continue through tensors saved from earlier
computations, and may be changed by hooks; for some ops torch has only one of the two kinds. So one pass checks every
tensor in the computation, and the caller handles models that forward mode does not support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from fxcurv.core.torch_compat import has_backward_hooks, pytree
from fxcurv.frontend.copying import structural_copy

__all__ = ["carried"]


def carried(
    model: nn.Module,
    parameters: Sequence[Tensor],
    columns: Iterable[Sequence[Tensor]],
    run: Callable[[nn.Module], Tensor],
) -> tuple[Tensor, Tensor] | None:
    """The output of `run` on a copy of the model, with its graph, and J times each column: `[k, N, …]`.

    Returns None if torch has no forward mode for the model, or on an error that a pass without it will report.
    """
    if any(has_backward_hooks(p) for p in model.parameters()):
        return None  # they may change the results of backward passes
    outputs: list[Tensor] = []
    images: list[Tensor] = []
    try:
        for v in columns:
            with torch.set_grad_enabled(not outputs):  # one graph is enough, and one checked pass
                output, image = _one_pass(model, parameters, v, run, looking=not outputs)
            outputs.append(output)
            images.append(image)
        return outputs[0], torch.stack(images)
    except Exception:
        return None


def _one_pass(
    model: nn.Module,
    parameters: Sequence[Tensor],
    v: Sequence[Tensor],
    run: Callable[[nn.Module], Tensor],
    looking: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output of a copy whose parameters change along v, and its derivative."""
    with forward_ad.dual_level():
        duals = {p: forward_ad.make_dual(p, t) for p, t in zip(parameters, v, strict=True)}
        copy = structural_copy(model, *model.parameters(), instead=duals)
        with _Alike(looking):
            output = run(copy)
        if looking:
            _check(output)
        primal, tangent = forward_ad.unpack_dual(output)
        return primal, torch.zeros_like(primal) if tangent is None else tangent.detach()


ONE_WAY = {torch.Tensor.register_hook, F.embedding_bag, torch.embedding, torch.embedding_bag}
"""Calls that may change backward passes but not forward mode."""


class _Alike(TorchFunctionMode):
    """Restrict forward mode to tensors with backward derivatives; `looking`, raise at the first with only one kind."""

    def __init__(self, looking: bool) -> None:
        super().__init__()
        self.looking = looking

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.looking:
            if func in ONE_WAY:
                raise RuntimeError(f"derivatives of {func} in one direction")
            for t in pytree.tree_leaves((args, kwargs)):
                if isinstance(t, Tensor):
                    _check(t)
        return _embedded(*args, **kwargs) if func is F.embedding else func(*args, **kwargs)


def _embedded(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Embed as torch does, but without a forward derivative for the padding row, as in the backward pass."""
    entries = F.embedding(input, weight, padding_idx, *args, **kwargs)
    if padding_idx is None:
        return entries
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), entries.detach(), entries)


def _check(t: Tensor) -> None:
    forward = forward_ad.unpack_dual(t).tangent is not None
    backward = t.requires_grad and torch.is_grad_enabled()
    if forward != backward:
        raise RuntimeError("derivatives of only one direction")
