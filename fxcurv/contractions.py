"""The definitions of what is summed, over samples n and columns v, from the positions of a parameter's uses.

A use is a pair `x[n,s,g,i]`, `S[v,n,s,g,o]`; for a bias `x` is None and stands for 1. Every statistic takes the uses of
one parameter as two lists, so that a parameter used twice keeps its cross terms. Batches, chunks of columns and data
sets simply add, unless a statistic keeps samples or columns apart: then it says along which axis they are laid side by
side. forms.py has cheaper equal forms; passes/contract.py chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxcurv.costs import CACHE, Cost, copying, product
from fxcurv.gemm import times_transpose, transpose_times
from fxcurv.moments import SecondMoment
from fxcurv.pages import new_empty

__all__ = [
    "CHUNK",
    "Columns",
    "Covariance",
    "Diagonal",
    "DiagonalPerSample",
    "Gradient",
    "Gram",
    "HessianDiagonal",
    "InputCovariance",
    "Inputs",
    "OutputCovariance",
    "Outputs",
    "PerOutput",
    "Recursive",
    "RotatedDiagonal",
    "SquaredEntries",
    "SquaredNorms",
    "Statistic",
    "Sum",
    "combined",
    "entries_of",
    "per_sample",
    "widened",
    "with_ones",
]

Xs = Sequence[Tensor | None]
Ss = Sequence[Tensor]
Sum = Tensor | SecondMoment

CHUNK = 1 << 22
"""Entries of the largest temporary of per-sample quantities."""


class Statistic(nn.Module):
    """A sum over samples and columns; `reads` says of what: "x" (once a batch), "S" or "xS" (once a chunk of v).

    One that reads "loss" is in no graph: see fxcurv/hessian.py and fxcurv/kfra.py.

    `samples` and `columns` are the axes along which the parts of a batch, and chunks of columns, are laid side by side;
    where they are None, these add.
    """

    reads: Literal["x", "S", "xS", "loss"]
    scales: ClassVar = False
    """Whether `scaled` is there."""
    grows: ClassVar = False
    """Whether what a call returns is larger for more samples or columns."""
    samples: ClassVar[int | None] = None
    columns: ClassVar[int | None] = None

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        """What a call would have returned for S[v,n,s,g,o] · scale[g·o]."""
        raise NotImplementedError

    cost: Callable[..., Cost]
    """What a call takes, from the shapes of its arguments."""

    def sum_of(self, returned: Tensor) -> Sum:
        """The sum that a call returned: the tensor itself, or what it stands for."""
        return returned


def combined(sums: dict[str, Sum], key: str, part: Sum, axis: int | None) -> None:
    """Put one more part to what is there under `key`: add it, or lay it beside along an axis."""
    if key not in sums:
        sums[key] = part
    elif axis is None:
        sums[key] = sums[key] + part
    else:
        sums[key] = torch.cat([sums[key], part], axis)  # pyright: ignore[reportArgumentType]


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
        return _per_channel(x, S)
    v, n, s, g, o = S.shape
    if s == 1:  # outer products: written once, and nothing is summed
        result = new_empty(S, v, n, g, o, x.shape[-1])
        return torch.mul(S[:, :, 0].unsqueeze(-1), x[:, 0].unsqueeze(-2), out=result)
    if v == 1:  # one matrix product per sample and group, [o,s] @ [s,i], written where it stays
        result = new_empty(S, 1, n, g, o, x.shape[-1])
        left, right = S[0].permute(0, 2, 3, 1).flatten(0, 1), x.transpose(1, 2).flatten(0, 1)
        torch.bmm(left, right, out=result.view(n * g, o, -1))
        return result
    # [n,g,v·o,s] @ [n,g,s,i]
    product = S.permute(1, 3, 0, 4, 2).reshape(n, g, v * o, s) @ x.transpose(1, 2)
    return product.view(n, g, v, o, -1).permute(2, 0, 1, 3, 4)


def _per_channel(x: Tensor, S: Tensor) -> Tensor:
    """Σ_s S[v,n,s,g,1] x[n,s,g,1], `[v,n,g,1,1]`; many products part by part, each in the memory of the one before."""
    n, s, g = S.shape[1:4]
    if S.device.type != "cpu" or torch.compiler.is_compiling() or S.numel() <= CACHE:
        return (S * x).sum(2).unsqueeze(-1)
    samples = min(n, max(1, CACHE // (s * g)))
    columns = max(1, CACHE // (s * g * samples))
    parts = [
        torch.cat([(c * xs).sum(2) for c in cut.split(columns)])
        for cut, xs in zip(S.split(samples, 1), x.split(samples), strict=True)
    ]
    return torch.cat(parts, 1).unsqueeze(-1)


def _entries_cost(xs: Xs, Ss: Ss) -> Cost:
    """`per_sample`, and one more pass over its entries."""
    cost = Cost()
    for x, S in zip(xs, Ss, strict=True):
        v, n, s, g, o = S.shape
        i, size = 1 if x is None else x.shape[-1], S.element_size()
        cost += product(v * o, i, s, size) * (n * g) + copying(S.numel(), size) + copying(v * n * g * o * i, size) * 4
    return Cost(cost.flops, cost.bytes, 6 * len(xs), cost.temporary)


class PerOutput(Statistic):
    """A statistic of S to some `power`, `[g,o,i]`."""

    reads = "xS"
    scales = True
    power: ClassVar[int]

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        return returned * (scale**self.power).view(*returned.shape[:2], 1)


class SquaredEntries(Statistic):
    """Σ J[v,n,g,o,i]² over some axes of the per-sample entries, of which no more than a chunk are there at once."""

    reads = "xS"
    over: ClassVar[tuple[int, ...]]

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        return self.total(per_sample, (xs, Ss), entries_of(xs, Ss)[1])

    def total(self, entries: Callable[[Xs, Ss], Tensor], uses: tuple[Xs, Ss], size: int) -> Tensor:
        """The sums over what `entries` gives for a cut of the uses along n and v: `size` entries for each of them."""
        parts = ((cut, self._summed(entries(xs, Ss).square_())) for cut, xs, Ss in _chunks(*uses, size))
        (_, result), samples = next(parts), uses[1][0].shape[1]
        if self.samples is not None and len(result) < samples:
            first, result = result, new_empty(result, samples, *result.shape[1:])
            result[: len(first)] = first
        for (n, v), part in parts:
            rows = result if self.samples is None else result[n : n + len(part)]
            if v or self.samples is None:
                rows.add_(part)
            else:
                rows.copy_(part)
        return result

    def _summed(self, squares: Tensor) -> Tensor:
        return squares[0] if self.over == (0,) and len(squares) == 1 else squares.sum(self.over)

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        rows, side = entries_of(xs, Ss)
        return _entries_cost(xs, Ss) + Cost(temporary=2 * Ss[0].element_size() * min(CHUNK, rows * side))


def _chunks(xs: Xs, Ss: Ss, size: int) -> Iterator[tuple[tuple[int, int], list[Tensor | None], list[Tensor]]]:
    """The uses cut along n and v, and their first n and v, so that `size` entries for each n and v are in `CHUNK`."""
    v, n = Ss[0].shape[:2]
    samples = max(1, min(n, CHUNK // max(1, size * v)))
    columns = max(1, min(v, CHUNK // max(1, size * samples)))
    for a in range(0, n, samples):
        x = [None if x is None else x[a : a + samples] for x in xs]
        for b in range(0, v, columns):
            yield (a, b), x, [S[b : b + columns, a : a + samples] for S in Ss]


class Gradient(PerOutput):
    """Σ_vns S[v,n,s,g,o] x[n,s,g,i]: `[g,o,i]`."""

    power = 1

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        terms = [self._of_use(x, S[0] if len(S) == 1 else S.sum(0)) for x, S in zip(xs, Ss, strict=True)]
        return sum((t.reshape_as(terms[0]) for t in terms[1:]), start=terms[0])

    def _of_use(self, x: Tensor | None, S: Tensor) -> Tensor:
        if x is None:
            return S.sum((0, 1)).unsqueeze(-1)
        if x.shape[-1] == S.shape[-1] == 1:  # a product per channel
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
    X = X.movedim((-2, -1), (0, 1)).flatten(2)  # [g,d,m]: positions lie side by side, as a convolution leaves them
    if X.shape[0] == 1:
        rows = X[0]
        return times_transpose(rows, rows).unsqueeze(0)
    return X @ X.mT


class Diagonal(SquaredEntries, PerOutput):
    """Σ_vn (Σ_s S[v,n,s,g,o] x[n,s,g,i])²: `[g,o,i]`."""

    power, over = 2, (0, 1)


class RotatedDiagonal(Diagonal):
    """`Diagonal` of U_Aᵀ x and U_Gᵀ S, with the eigenvectors of the sums called "A" and "G", in a second pass.

    With `ones` the constant 1 stands behind x. The arguments of a call are rotated already.
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
        return _entries_cost(xs, Ss) + product(side, side, rows, Ss[0].element_size())


def entries_of(xs: Xs, Ss: Ss) -> tuple[int, int]:
    """(v·n, g·o·i): the shape of the per-sample entries as a matrix."""
    v, n, _, g, o = Ss[0].shape
    return v * n, g * o * (1 if xs[0] is None else xs[0].shape[-1])


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
    """`Covariance` of the inputs, with `ones` that of the constant 1 behind them too: the factor A, unscaled."""

    reads = "x"

    def __init__(self, pooled: bool = False, ones: bool = False) -> None:
        super().__init__(pooled)
        self.ones = ones

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        return self.covariance([with_ones(x) if self.ones else x for x in xs])

    def extra_repr(self) -> str:
        return f"pooled={self.pooled}, ones={self.ones}"


def widened(t: Tensor) -> Tensor:
    """Half precision as float32: it is widened before anything is summed."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def with_ones(x: Tensor) -> Tensor:
    """x with the constant 1 behind the entries of its last axis."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


class OutputCovariance(Covariance):
    """`Covariance` of the cotangents: the factor G."""

    reads = "S"
    scales = True

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        scale = scale.view(returned.shape[:2])
        return returned * scale.unsqueeze(-1) * scale.unsqueeze(-2)

    def forward(self, Ss: Ss) -> Tensor:
        return self.covariance(Ss)


# Samples and columns apart ------------------------------------------------------------------------------------------


class Columns(Statistic):
    """J[v,n,g,o,i] = Σ_s S[v,n,s,g,o] x[n,s,g,i]: the columns of every sample; in memory [v,n,g,i,o] if `inputs_first`.

    That is how a weight that lies as `W[i,o]` takes them.
    """

    reads = "xS"
    samples, columns, grows = 1, 0, True

    def __init__(self, inputs_first: bool = False) -> None:
        super().__init__()
        self.inputs_first = inputs_first

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        if not self.inputs_first or len(Ss) > 1 or len(Ss[0]) > 1 or xs[0] is None:
            return per_sample(xs, Ss).contiguous()
        return per_sample([Ss[0][0]], [xs[0].unsqueeze(0)]).mT  # x and S change places

    def extra_repr(self) -> str:
        return f"inputs_first={self.inputs_first}"

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        return _entries_cost(xs, Ss)


class DiagonalPerSample(SquaredEntries):
    """Σ_v (Σ_s S[v,n,s,g,o] x[n,s,g,i])²: `[n,g,o,i]`."""

    samples, grows, over = 0, True, (0,)


class SquaredNorms(SquaredEntries):
    """Σ_v ‖J_vn‖² of the per-sample entries J[v,n,g·o·i]: `[n]`."""

    samples, grows, over = 0, True, (0, 2, 3, 4)


class Inputs(Statistic):
    """x[n,s,g,i] itself, the positions of all uses one behind the other."""

    reads = "x"
    samples, grows = 0, True

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        return torch.cat([*xs], 1)

    def cost(self, xs: Sequence[Tensor]) -> Cost:
        return copying(sum(x.numel() for x in xs), xs[0].element_size())


class Outputs(Statistic):
    """S[v,n,s,g,o] itself, the positions of all uses one behind the other."""

    reads = "S"
    samples, columns, grows = 1, 0, True

    def forward(self, Ss: Ss) -> Tensor:
        return torch.cat([*Ss], 2)

    def cost(self, Ss: Ss) -> Cost:
        return copying(sum(S.numel() for S in Ss), Ss[0].element_size())


class HessianDiagonal(Statistic):
    """diag ∂²loss/∂θ², `[*θ]`, or with `per_sample` that of each sample's part of the loss, `[n, *θ]`."""

    reads = "loss"

    def __init__(self, per_sample: bool = False) -> None:
        super().__init__()
        self.per_sample = per_sample

    def extra_repr(self) -> str:
        return f"per_sample={self.per_sample}"


class Recursive(Statistic):
    """What KFRA's recursion gives: G `[g,o,o]` ("kronecker"), a "dense" block or its "diagonal"."""

    reads = "loss"

    def __init__(self, kind: Literal["kronecker", "dense", "diagonal"]) -> None:
        super().__init__()
        self.kind = kind

    def extra_repr(self) -> str:
        return self.kind
