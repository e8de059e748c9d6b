"""How a derivative rule is declared, by its kind, and the pullbacks that autograd gives where a rule has none.

A rule says what the forward graph keeps and how a cotangent is pulled back through the op. With `v` columns of the
factor stacked in front, `S[v, *y.shape] -> S[v, *x.shape]` for each input `x`; broadcasting is undone by the caller."""

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
    """How an affine op uses its parameters: as positions `x[n,s,g,i]` of its input and `S[v,n,s,g,o]` of its output.

    `pull(op, weight, S, shape)` is its pullback by a weight of that shape.
    """

    x: Callable[[Any, Tensor], Tensor]
    S: Callable[[Any, Tensor], Tensor]
    pull: Callable[[Any, Tensor, Tensor, Shape], Tensor]
    batch_first: bool = True
    """Whether the samples must lie along axis 0 of the input; otherwise any axis but the last will do."""
    weight: Layout = "out_in"
    """How the weight lies: as W[g·o,i], as `W[i,o]`, or as a scale for every channel g, of whatever shape."""


@dataclass(frozen=True)
class Rule:
    """`keep(op, xs, y)` is what the forward graph saves, `pull(op, S, kept, k)` the cotangent of input k."""

    kind: RuleKind
    save: Callable[[Any, tuple[Tensor, ...], Tensor], Any]
    pull: Callable[[Any, Tensor, Any, int], Tensor]
    usage: WeightUsage | None = None
    nonlinear: bool = False
    """Whether y has a second derivative, where it has a first."""
    axes: int = 0
    """The last axes of x whose entries a selection's indices count."""


RULES: dict[type[nn.Module], Rule] = {}


# Declarators, one per kind ----------------------------------------------------------------------------------------


def declare(op: type[nn.Module], rule: Rule) -> None:
    if op in RULES:
        raise SpecError(f"a second rule for module type {op.__name__}", remedy="keep one row per op", code="FXC302")
    RULES[op] = rule


def elementwise(op: type[M], derivative: Callable[[M, Tensor, Tensor], Tensor] | None = None) -> None:
    """y = f(x) entry by entry, with f'(x) given as a function of (op, x, y), or taken from autograd."""
    slope: Callable[[M, Tensor, Tensor], Tensor] = derivative or _autograd_derivative
    declare(op, Rule("elementwise", lambda op, xs, y: slope(op, xs[0], y), _times, nonlinear=True))


def masked(op: type[M], mask: Callable[[M, Tensor, Tensor], Tensor]) -> None:
    """y = f(x) entry by entry, piecewise linear, with f'(x), 0 or 1, as a function of (op, x, y)."""
    declare(op, Rule("elementwise", lambda op, xs, y: mask(op, xs[0], y), _times))


def _times(op: nn.Module, S: Tensor, slope: Tensor, k: int) -> Tensor:
    """S · f'(x), where f'(x) may be a mask: torch multiplies by 0 and 1 as bytes many times faster than as booleans."""
    return multiplied(S, slope.view(torch.uint8) if slope.dtype == torch.bool else slope)


def fused(op: type[M], backward: Callable[[M, Tensor, Tensor], Tensor], nonlinear: bool = True) -> None:
    """y = f(x) entry by entry, with S, x -> S · f'(x) as one kernel: of one column, or of ones, for many."""

    def pull(op: M, S: Tensor, x: Tensor, k: int) -> Tensor:
        x = x.to(S.dtype)
        return backward(op, S[0], x).unsqueeze(0) if len(S) == 1 else S * backward(op, torch.ones_like(x), x)

    declare(op, Rule("elementwise", lambda op, xs, y: xs[0], pull, nonlinear=nonlinear))


def linear(op: type[M], transpose: Callable[[M, Tensor, tuple[Shape, ...], int], Tensor] | None = None) -> None:
    """y = L x, with Lᵀ given as a function of (op, S, input shapes, k), or taken from autograd."""
    declare(op, Rule("linear", lambda op, xs, y: tuple(x.shape for x in xs), transpose or autograd_transpose))


def bilinear(op: type[M], pull: Callable[[M, Tensor, tuple[Tensor, ...], int], Tensor]) -> None:
    """y = B(a, b), linear in each input."""
    declare(op, Rule("bilinear", lambda op, xs, y: xs, pull, nonlinear=True))


def gather(op: type[M], indices: Callable[[M, Tensor], Tensor], axes: int) -> None:
    """y = x[indices], where the indices count the entries of the last `axes` axes of x."""

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
    """Any differentiable op without parameters; passes/contract.py vectorizes the columns where that is right."""
    declare(
        op,
        Rule(
            "opaque", lambda op, xs, y: xs, lambda op, S, xs, k: autograd_pull_each(op, S, xs, [k])[0], nonlinear=True
        ),
    )


def non_differentiable(op: type[nn.Module]) -> None:
    """y does not depend differentiably on x."""
    declare(op, Rule("non_differentiable", lambda op, xs, y: None, lambda op, S, saved, k: torch.zeros_like(S)))


# What autograd knows ----------------------------------------------------------------------------------------------


def _autograd_derivative(op: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.func.vjp(op, x)[1](torch.ones_like(y))[0]


def vjp_of(op: nn.Module, xs: Sequence[Tensor], ks: Sequence[int]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The pullback to the inputs `ks`, which runs the op once, however many columns it then takes."""

    def varied(*given: Tensor) -> Tensor:
        return op(*(given[ks.index(k)] if k in ks else x for k, x in enumerate(xs)))

    return torch.func.vjp(varied, *(xs[k] for k in ks))[1]


def autograd_pull_each(op: nn.Module, S: Tensor, xs: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor]:
    """S[v, *y.shape] -> S[v, *x_k.shape] for every k, one column after the other.

    Cotangents are contiguous: for one sample and others, torch 2.15's batch_norm has a wrong gradient on the CPU.
    """
    pull = vjp_of(op, xs, ks)
    return [torch.stack(columns) for columns in zip(*(pull(column) for column in S.contiguous()), strict=True)]


def autograd_transpose(op: nn.Module, S: Tensor, shapes: tuple[Shape, ...], k: int) -> Tensor:
    return autograd_pull(op, S, [S.new_zeros(shape) for shape in shapes], [k])[0]


def autograd_pull(op: nn.Module, S: Tensor, xs: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor]:
    """S[v, *y.shape] -> S[v, *x_k.shape] for every k, all columns at once: as right as torch's batching rules are."""
    return list(torch.func.vmap(vjp_of(op, xs, ks))(S.contiguous()))


# Pullbacks with a body --------------------------------------------------------------------------------------------


def _scatter(S: Tensor, indices: Tensor, shape: Shape, axes: int) -> Tensor:
    """S[v, …, out] added into zeros[v, …, in] at the flat positions `indices[…, out]` of the last `axes` axes."""
    flat = new_empty(S, S.shape[0], *shape[:-axes], math.prod(shape[-axes:])).zero_()
    at = indices.flatten(-axes).expand(S.shape[0], *indices.shape[:-axes], -1)
    return flat.scatter_add_(-1, at, S.flatten(-axes)).view(S.shape[0], *shape)


def pull_together(op: nn.Module, S: Tensor, xs: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor]:
    """S[v, *y.shape] -> S[v, *x_k.shape] for every k, all columns at once: in closed form, or else by autograd."""
    pulled = closed_form(op, S, xs, ks) if isinstance(op, calls.Opaque) else None
    return autograd_pull(op, S, xs, ks) if pulled is None else pulled
