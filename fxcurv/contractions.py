"""The numeric kernels: what is summed, over samples n and columns v, from the positions of a parameter's uses.

A use is a pair `x[n,s,g,i]`, `S[v,n,s,g,o]`; for a bias `x` is None and stands for 1. Every kernel takes the uses of
one parameter as two lists, so that a parameter used twice keeps its cross terms, and returns a plain sum: batches,
chunks of columns and data sets simply add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "Covariance",
    "Diagonal",
    "DiagonalOfSinglePositions",
    "Gradient",
    "Gram",
    "InputCovariance",
    "OutputCovariance",
    "Statistic",
    "per_sample",
]

Xs = Sequence[Tensor | None]
Ss = Sequence[Tensor]

CHUNK = 1 << 22
"""Entries of the largest temporary of per-sample quantities, about what a core's caches hold."""


class Statistic(nn.Module):
    """A sum over samples and columns; `reads` says of what: "x" (once a batch), "S" or "xS" (once a chunk of v)."""

    reads: ClassVar[Literal["x", "S", "xS"]]


def per_sample(xs: Xs, Ss: Ss) -> Tensor:
    """J[v,n,g,o,i] = Σ_s S[v,n,s,g,o] x[n,s,g,i], summed over the uses."""
    total = _per_sample(xs[0], Ss[0])
    for x, S in zip(xs[1:], Ss[1:], strict=True):
        total = total + _per_sample(x, S).view_as(total)
    return total


def _per_sample(x: Tensor | None, S: Tensor) -> Tensor:
    if x is None:
        return S.sum(2).unsqueeze(-1)
    if x.shape[-1] == S.shape[-1] == 1:  # a product per channel: no matrix is multiplied
        return (S * x).sum(2).unsqueeze(-1)
    # one matrix product per sample and group: [n,g,v·o,s] @ [n,g,s,i]
    v, n, s, g, o = S.shape
    product = S.permute(1, 3, 0, 4, 2).reshape(n, g, v * o, s) @ x.transpose(1, 2)
    return product.view(n, g, v, o, -1).permute(2, 0, 1, 3, 4)


def _chunks(xs: Xs, Ss: Ss) -> Iterator[tuple[list[Tensor | None], list[Tensor]]]:
    """The uses cut along n and v so that the per-sample entries of one cut stay within `CHUNK`."""
    v, n = Ss[0].shape[:2]
    inputs = 1 if xs[0] is None else xs[0].shape[-1]
    size = Ss[0].shape[3:].numel() * inputs
    samples = max(1, min(n, CHUNK // max(1, size * v)))
    columns = max(1, min(v, CHUNK // max(1, size * samples)))
    for a in range(0, n, samples):
        x = [None if x is None else x[a : a + samples] for x in xs]
        for b in range(0, v, columns):
            yield x, [S[b : b + columns, a : a + samples] for S in Ss]


class Gradient(Statistic):
    """Σ_vns S[v,n,s,g,o] x[n,s,g,i]: `[g,o,i]`."""

    reads = "xS"

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        terms = [
            S.sum((0, 1, 2)).unsqueeze(-1) if x is None else _product(S.sum(0), x) for x, S in zip(xs, Ss, strict=True)
        ]
        return sum((t.reshape_as(terms[0]) for t in terms[1:]), start=terms[0])


def _product(S: Tensor, x: Tensor) -> Tensor:
    """Σ_m S[m,g,o] x[m,g,i], m over all leading axes: `[g,o,i]`."""
    S, x = S.flatten(0, -3), x.flatten(0, -3)
    if S.shape[1] == 1:
        return (S[:, 0].T @ x[:, 0]).unsqueeze(0)
    return S.permute(1, 2, 0) @ x.transpose(0, 1)


def _second_moment(X: Tensor) -> Tensor:
    """Σ_m X[m,g,d] X[m,g,d'], m over all leading axes: `[g,d,d]`."""
    if X.stride(-3) != 1 or X.shape[-3] < X.shape[-1]:
        return _product(X, X)
    X = X.movedim(-3, -1).flatten(0, -4)  # [m,g,d,s]: positions lie side by side, as a convolution leaves them
    return (X @ X.mT).sum(0)  # no larger than X, for d ≤ s


class Diagonal(Statistic):
    """Σ_vn (Σ_s S[v,n,s,g,o] x[n,s,g,i])²: `[g,o,i]`."""

    reads = "xS"

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        total: Tensor | None = None
        for x, S in _chunks(xs, Ss):
            part = per_sample(x, S).square().sum((0, 1))
            total = part if total is None else total + part
        assert total is not None
        return total


class DiagonalOfSinglePositions(Statistic):
    """`Diagonal` for one use with one position per sample: Σ_n (Σ_v S[v,n,g,o]²) x[n,g,i]², one product of squares."""

    reads = "xS"

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        (x,), (S,) = xs, Ss
        squares = S.square().sum(0)
        return squares.sum((0, 1)).unsqueeze(-1) if x is None else _product(squares, x.square())


class Gram(Statistic):
    """The dense block Σ_vn J Jᵀ of the per-sample entries J[v,n,g·o·i]: `[g·o·i, g·o·i]`."""

    reads = "xS"

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        J = per_sample(xs, Ss).flatten(2).flatten(0, 1)
        return J.T @ J


class Covariance(Statistic):
    """Σ X Xᵀ over samples, columns and positions, or with `pooled` of the sums of X over the positions: `[g,d,d]`."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled

    def covariance(self, Xs: Sequence[Tensor]) -> Tensor:
        """`Xs` are `[*, s, g, d]`, one per use."""
        if self.pooled:
            pooled = sum((X.sum(-3, keepdim=True) for X in Xs[1:]), start=Xs[0].sum(-3, keepdim=True))
            return _product(pooled, pooled)
        terms = [_second_moment(X) for X in Xs]
        return sum(terms[1:], start=terms[0])

    def extra_repr(self) -> str:
        return f"pooled={self.pooled}"


class InputCovariance(Covariance):
    """`Covariance` of the inputs, with `ones` that of the constant 1 behind them too: the factor A, unscaled."""

    reads = "x"

    def __init__(self, pooled: bool = False, ones: bool = False) -> None:
        super().__init__(pooled)
        self.ones = ones

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        return self.covariance([torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1) if self.ones else x for x in xs])

    def extra_repr(self) -> str:
        return f"pooled={self.pooled}, ones={self.ones}"


class OutputCovariance(Covariance):
    """`Covariance` of the cotangents: the factor G."""

    reads = "S"

    def forward(self, Ss: Ss) -> Tensor:
        return self.covariance(Ss)
