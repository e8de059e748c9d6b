"""Definitions of the statistics, sums over samples n and columns v of the positions of a parameter's uses.

A use is a pair `x[n,s,g,i]`, `S[v,n,s,g,o]`; for a bias `x` is None and stands for 1. Every statistic takes the uses of
one parameter as two lists, so that a parameter used twice has its cross terms. Batches, chunks of columns and data sets
add, unless a statistic keeps samples or columns separate: then it names the axis of their concatenation. The other
files have cheaper equal algorithms; passes/select_algorithms.py selects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fxcurv.contractions.entries import (
    CHUNK,
    PerOutput,
    SquaredEntries,
    entries_cost,
    entries_of,
    per_sample,
    with_ones,
)
from fxcurv.contractions.statistic import Ss, Statistic, Xs
from fxcurv.linalg.cost import Cost, copying, product
from fxcurv.linalg.matmul import times_transpose, transpose_times

__all__ = [
    "Columns",
    "Covariance",
    "DiagonalPerSample",
    "Gradient",
    "Gram",
    "HessianDiagonal",
    "InputCovariance",
    "Inputs",
    "OutputCovariance",
    "Outputs",
    "Recursive",
    "RotatedDiagonal",
    "SquaredNorms",
    "SumOfSquares",
]


class Gradient(PerOutput):
    """Σ_vns S[v,n,s,g,o] x[n,s,g,i]: `[g,o,i]`."""

    power = 1

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        terms = [self._of_use(x, S[0] if len(S) == 1 else S.sum(0)) for x, S in zip(xs, Ss, strict=True)]
        return sum((t.reshape_as(terms[0]) for t in terms[1:]), start=terms[0])

    def _of_use(self, x: Tensor | None, S: Tensor) -> Tensor:
        if x is None:
            return S.sum((0, 1)).unsqueeze(-1)
        if x.shape[-1] == S.shape[-1] == 1:  # one product per channel
            return (S * x).sum((0, 1)).unsqueeze(-1)
        return _product(S, x)

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        cost = Cost()
        for x, S in zip(xs, Ss, strict=True):
            _, n, s, g, o = S.shape
            i = 1 if x is None else x.shape[-1]
            cost += copying(S.numel(), S.element_size()) + product(o, i, n * s, S.element_size()) * g
        return cost


def _product(S: Tensor, x: Tensor) -> Tensor:
    """Σ_m S[m,g,o] x[m,g,i], m over all leading axes: `[g,o,i]`."""
    same, S, x = S is x, S.flatten(0, -3), x.flatten(0, -3)
    if S.shape[1] == 1:
        left = S[:, 0]
        return transpose_times(left, left if same else x[:, 0]).unsqueeze(0)
    return S.permute(1, 2, 0) @ x.transpose(0, 1)


def _second_moment(X: Tensor) -> Tensor:
    """Σ_m X[m,g,d] X[m,g,d]ᵀ, m over all leading axes: `[g,d,d]`."""
    if X.stride(-3) != 1 or X.shape[-1] == 1:
        return _product(X, X)
    if X.ndim > 4 and X.numel() > CHUNK:
        return sum((_second_moment(column) for column in X[1:]), start=_second_moment(X[0]))
    X = X.movedim((-2, -1), (0, 1)).flatten(2)  # [g,d,m]: positions are contiguous, as in a convolution's output
    if X.shape[0] == 1:
        rows = X[0]
        return times_transpose(rows, rows).unsqueeze(0)
    return X @ X.mT


class SumOfSquares(SquaredEntries, PerOutput):
    """Σ_vn (Σ_s S[v,n,s,g,o] x[n,s,g,i])²: `[g,o,i]`."""

    power, over = 2, (0, 1)


class RotatedDiagonal(SumOfSquares):
    """`Diagonal` of U_Aᵀ x and U_Gᵀ S in a second pass, with the eigenvectors of the sums named "A" and "G".

    With `ones` the constant 1 is appended to x. The arguments of a call are already rotated.
    """

    def __init__(self, ones: bool = False) -> None:
        super().__init__()
        self.ones = ones

    def extra_repr(self) -> str:
        return f"ones={self.ones}"


class Gram(Statistic):
    """The dense block Σ_vn J Jᵀ of the per-sample entries J[v,n,g·o·i]: `[g·o·i, g·o·i]`."""

    reads = "xS"
    scales = True

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        J = per_sample(xs, Ss).flatten(2).flatten(0, 1)
        return transpose_times(J, J)

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        scale = scale.repeat_interleave(len(returned) // len(scale))
        return returned * scale.unsqueeze(-1) * scale

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        rows, side = entries_of(xs, Ss)
        return entries_cost(xs, Ss) + product(side, side, rows, Ss[0].element_size())


class Covariance(Statistic):
    """Σ X Xᵀ over samples, columns and positions, or with `pooled` of the sums of X over the positions: `[g,d,d]`."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled

    def covariance(self, Xs: Sequence[Tensor]) -> Tensor:
        """Sum over the uses' `Xs`, `[*, s, g, d]` each."""
        if self.pooled:
            pooled = sum((X.sum(-3, keepdim=True) for X in Xs[1:]), start=Xs[0].sum(-3, keepdim=True))
            return _product(pooled, pooled)
        terms = [_second_moment(X) for X in Xs]
        return sum(terms[1:], start=terms[0])

    def cost(self, Xs: Sequence[Tensor]) -> Cost:
        cost = Cost()
        for X in Xs:
            *lead, s, g, d = X.shape
            rows = Cost(0, X.element_size() * X.numel() * 2, 2)
            m = torch.Size(lead).numel() * (1 if self.pooled else s)
            cost += rows + product(d, d, m, X.element_size()) * g + Cost(temporary=X.element_size() * X.numel())
        return cost

    def extra_repr(self) -> str:
        return f"pooled={self.pooled}"


class InputCovariance(Covariance):
    """`Covariance` of the inputs, with the constant 1 appended if `ones`: the factor A, unscaled."""

    reads = "x"

    def __init__(self, pooled: bool = False, ones: bool = False) -> None:
        super().__init__(pooled)
        self.ones = ones

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        return self.covariance([with_ones(x) if self.ones else x for x in xs])

    def extra_repr(self) -> str:
        return f"pooled={self.pooled}, ones={self.ones}"


class OutputCovariance(Covariance):
    """`Covariance` of the cotangents: the factor G."""

    reads = "S"
    scales = True

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        scale = scale.view(returned.shape[:2])
        return returned * scale.unsqueeze(-1) * scale.unsqueeze(-2)

    def forward(self, Ss: Ss) -> Tensor:
        return self.covariance(Ss)


# Separate samples and columns ---------------------------------------------------------------------------------------


class Columns(Statistic):
    """J[v,n,g,o,i] = Σ_s S[v,n,s,g,o] x[n,s,g,i], per sample; stored as [v,n,g,i,o] if `in_out`.

    This is the in–out layout, of a weight stored as `W[i,o]`.
    """

    reads = "xS"
    samples, columns, grows = 1, 0, True

    def __init__(self, in_out: bool = False) -> None:
        super().__init__()
        self.in_out = in_out

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        if not self.in_out or len(Ss) > 1 or len(Ss[0]) > 1 or xs[0] is None:
            return per_sample(xs, Ss).contiguous()
        return per_sample([Ss[0][0]], [xs[0].unsqueeze(0)]).mT  # x and S exchange roles

    def extra_repr(self) -> str:
        return f"in_out={self.in_out}"

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        return entries_cost(xs, Ss)


class DiagonalPerSample(SquaredEntries):
    """Σ_v (Σ_s S[v,n,s,g,o] x[n,s,g,i])²: `[n,g,o,i]`."""

    samples, grows, over = 0, True, (0,)


class SquaredNorms(SquaredEntries):
    """Σ_v ‖J_vn‖² of the per-sample entries J[v,n,g·o·i]: `[n]`."""

    samples, grows, over = 0, True, (0, 2, 3, 4)


class Inputs(Statistic):
    """x[n,s,g,i], the positions of all uses concatenated."""

    reads = "x"
    samples, grows = 0, True

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        return torch.cat([*xs], 1)

    def cost(self, xs: Sequence[Tensor]) -> Cost:
        return copying(sum(x.numel() for x in xs), xs[0].element_size())


class Outputs(Statistic):
    """S[v,n,s,g,o], the positions of all uses concatenated."""

    reads = "S"
    samples, columns, grows = 1, 0, True

    def forward(self, Ss: Ss) -> Tensor:
        return torch.cat([*Ss], 2)

    def cost(self, Ss: Ss) -> Cost:
        return copying(sum(S.numel() for S in Ss), Ss[0].element_size())


class HessianDiagonal(Statistic):
    """diag ∂²loss/∂θ², `[*θ]`, or with `per_sample` the diagonal per sample's part of the loss, `[n, *θ]`."""

    reads = "loss"

    def __init__(self, per_sample: bool = False) -> None:
        super().__init__()
        self.per_sample = per_sample

    def extra_repr(self) -> str:
        return f"per_sample={self.per_sample}"


class Recursive(Statistic):
    """Results of KFRA's recursion: G `[g,o,o]` ("kronecker"), a "dense" block or its "diagonal"."""

    reads = "loss"

    def __init__(self, kind: Literal["kronecker", "dense", "diagonal"]) -> None:
        super().__init__()
        self.kind = kind

    def extra_repr(self) -> str:
        return self.kind
