"""Declarators of derivative rules, one per kind, and pullbacks by autograd for rules without one.

A rule gives the tensors saved for backward and the pullback of a cotangent through the op. With `v` columns of the
factor along axis 0, `S[v, *y.shape] -> S[v, *x.shape]` for each input `x`; the caller undoes broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fxcurv.core.errors import SpecError
from fxcurv.ir import calls
from fxcurv.ir.closed_form_vjps import closed_form
from fxcurv.ir.custom_gradients import CustomGradient
from fxcurv.linalg.allocation import multiplied, new_empty

__all__ = [
    "RULES",
    "Rule",
    "RuleKind",
    "Shape",
    "WeightUsage",
    "affine",
    "autograd_pull",
    "autograd_pull_each",
    "bilinear",
    "elementwise",
    "fused",
    "gather",
    "linear",
    "masked",
    "non_differentiable",
    "opaque",
    "pull_together",
]


RuleKind = Literal["elementwise", "linear", "bilinear", "gather", "affine", "opaque", "parameter", "non_differentiable"]


Layout = Literal["out_in", "in_out", "per_channel"]


Shape = Sequence[int]


M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class WeightUsage:
    """How an affine op uses its parameters: at positions `x[n,s,g,i]` of its input and `S[v,n,s,g,o]` of its output.

    `pull(op, weight, S, shape)` is the pullback through `weight` to an input of this shape.
    """

    x: Callable[[Any, Tensor], Tensor]
    S: Callable[[Any, Tensor], Tensor]
    pull: Callable[[Any, Tensor, Tensor, Shape], Tensor]
    batch_first: bool = True
    """Whether the samples must be along axis 0 of the input; otherwise any axis but the last is allowed."""
    weight: Layout = "out_in"
    """Layout of the weight: W[g·o,i], `W[i,o]`, or one scale per channel g, of any shape."""


@dataclass(frozen=True)
class Rule:
    """`save(op, xs, y)` returns the tensors saved for backward, `pull(op, S, saved, k)` the cotangent of input k."""

    kind: RuleKind
    save: Callable[[Any, tuple[Tensor, ...], Tensor], Any]
    pull: Callable[[Any, Tensor, Any, int], Tensor]
    usage: WeightUsage | None = None
    nonlinear: bool = False
    """Whether y has a nonzero second derivative where it is differentiable."""
    axes: int = 0
    """Number of last axes of x that the flat indices of a gather index."""


RULES: dict[type[nn.Module], Rule] = {}


# Declarators, one per kind ----------------------------------------------------------------------------------------


def declare(op: type[nn.Module], rule: Rule) -> None:
    if op in RULES:
        raise SpecError(f"a second rule for module type {op.__name__}", remedy="keep one row per op", code="FXC302")
    RULES[op] = rule


def elementwise(op: type[M], derivative: Callable[[M, Tensor, Tensor], Tensor] | None = None) -> None:
    """y = f(x) elementwise, with f'(x) given as a function of (op, x, y), or computed by autograd."""
    slope: Callable[[M, Tensor, Tensor], Tensor] = derivative or _autograd_derivative
    declare(op, Rule("elementwise", lambda op, xs, y: slope(op, xs[0], y), _times, nonlinear=True))


def masked(op: type[M], mask: Callable[[M, Tensor, Tensor], Tensor]) -> None:
    """y = f(x) elementwise, piecewise linear, with f'(x), 0 or 1, as a function of (op, x, y)."""
    declare(op, Rule("elementwise", lambda op, xs, y: mask(op, xs[0], y), _times))


def _times(op: nn.Module, S: Tensor, slope: Tensor, k: int) -> Tensor:
    """S · f'(x), where f'(x) may be a mask: torch multiplies by bytes many times faster than by booleans."""
    return multiplied(S, slope.view(torch.uint8) if slope.dtype == torch.bool else slope)


def fused(op: type[M], backward: Callable[[M, Tensor, Tensor], Tensor], nonlinear: bool = True) -> None:
    """y = f(x) elementwise, with one kernel S, x -> S · f'(x), called on a single column, or on ones for many."""

    def pull(op: M, S: Tensor, x: Tensor, k: int) -> Tensor:
        x = x.to(S.dtype)
        return backward(op, S[0], x).unsqueeze(0) if len(S) == 1 else S * backward(op, torch.ones_like(x), x)

    declare(op, Rule("elementwise", lambda op, xs, y: xs[0], pull, nonlinear=nonlinear))


def linear(op: type[M], transpose: Callable[[M, Tensor, tuple[Shape, ...], int], Tensor] | None = None) -> None:
    """y = L x, with Lᵀ given as a function of (op, S, input shapes, k), or computed by autograd."""
    declare(op, Rule("linear", lambda op, xs, y: tuple(x.shape for x in xs), transpose or autograd_transpose))


def bilinear(op: type[M], pull: Callable[[M, Tensor, tuple[Tensor, ...], int], Tensor]) -> None:
    """y = B(a, b), linear in each input."""
    declare(op, Rule("bilinear", lambda op, xs, y: xs, pull, nonlinear=True))


def gather(op: type[M], indices: Callable[[M, Tensor], Tensor], axes: int) -> None:
    """y = x[indices], with flat indices into the last `axes` axes of x."""

    def save(op: M, xs: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor, Shape]:
        return indices(op, xs[0]), xs[0].shape

    def pull(op: M, S: Tensor, saved: tuple[Tensor, Shape], k: int) -> Tensor:
        return _scatter(S, *saved, axes)

    declare(op, Rule("gather", save, pull, axes=axes))


def affine(
    op: type[M],
    pull: Callable[[M, Tensor, Tensor, Shape], Tensor],
    x: Callable[[M, Tensor], Tensor],
    S: Callable[[M, Tensor], Tensor],
    batch_first: bool = True,
    weight: Layout = "out_in",
) -> None:
    """y = W x + b: the pullback of S to x, and the positions `x[n,s,g,i]`, `S[v,n,s,g,o]` at which W and b are used."""
    declare(
        op,
        Rule(
            "affine",
            lambda op, xs, y: xs[0].shape,
            lambda op, S, shape, k: pull(op, op.weight, S, shape),
            WeightUsage(x, S, pull, batch_first, weight),
        ),
    )


def opaque(op: type[nn.Module]) -> None:
    """Any differentiable op without parameters; passes/vectorize.py vectorizes the columns where that is correct."""
    declare(
        op,
        Rule(
            "opaque", lambda op, xs, y: xs, lambda op, S, xs, k: autograd_pull_each(op, S, xs, [k])[0], nonlinear=True
        ),
    )


def non_differentiable(op: type[nn.Module]) -> None:
    """y does not depend differentiably on x."""
    declare(op, Rule("non_differentiable", lambda op, xs, y: None, lambda op, S, saved, k: torch.zeros_like(S)))


# Pullbacks by autograd --------------------------------------------------------------------------------------------


def _autograd_derivative(op: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.func.vjp(op, x)[1](torch.ones_like(y))[0]


def vjp_of(op: nn.Module, xs: Sequence[Tensor], ks: Sequence[int]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The pullback to the inputs `ks`; the op runs once for any number of columns."""

    def varied(*given: Tensor) -> Tensor:
        return op(*(given[ks.index(k)] if k in ks else x for k, x in enumerate(xs)))

    return torch.func.vjp(varied, *(xs[k] for k in ks))[1]


def autograd_pull_each(op: nn.Module, S: Tensor, xs: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor]:
    """S[v, *y.shape] -> S[v, *x_k.shape] for every k, one column at a time.

    Cotangents are made contiguous: otherwise torch 2.15's batch_norm has wrong CPU gradients, as for one sample.
    """
    if isinstance(op, CustomGradient):
        return op.pull(S, xs, ks)
    pull = vjp_of(op, xs, ks)
    return [torch.stack(columns) for columns in zip(*(pull(column) for column in S.contiguous()), strict=True)]


def autograd_transpose(op: nn.Module, S: Tensor, shapes: tuple[Shape, ...], k: int) -> Tensor:
    return autograd_pull(op, S, [S.new_zeros(shape) for shape in shapes], [k])[0]


def autograd_pull(op: nn.Module, S: Tensor, xs: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor]:
    """S[v, *y.shape] -> S[v, *x_k.shape] for every k, all columns at once; relies on torch's batching rules."""
    if isinstance(op, CustomGradient):
        return op.pull_together(S, xs, ks)
    return list(torch.func.vmap(vjp_of(op, xs, ks))(S.contiguous()))


# Other pullbacks --------------------------------------------------------------------------------------------------


def _scatter(S: Tensor, indices: Tensor, shape: Shape, axes: int) -> Tensor:
    """S[v, …, out] added into zeros[v, …, in] at the flat positions `indices[…, out]` of the last `axes` axes."""
    flat = new_empty(S, S.shape[0], *shape[:-axes], math.prod(shape[-axes:])).zero_()
    at = indices.flatten(-axes).expand(S.shape[0], *indices.shape[:-axes], -1)
    return flat.scatter_add_(-1, at, S.flatten(-axes)).view(S.shape[0], *shape)


def pull_together(op: nn.Module, S: Tensor, xs: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor]:
    """S[v, *y.shape] -> S[v, *x_k.shape] for every k, all columns at once: in closed form, or by autograd."""
    pulled = closed_form(op, S, xs, ks) if isinstance(op, calls.Opaque) else None
    return autograd_pull(op, S, xs, ks) if pulled is None else pulled
