"""Forms: the statistics of contractions.py by other computations, equal up to rounding, each with its cost.

A form says in its docstring which definition it equals and when it applies; passes/contract.py chooses by cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxcurv.contractions import (
    CHUNK,
    Columns,
    Diagonal,
    DiagonalPerSample,
    PerOutput,
    SquaredEntries,
    SquaredNorms,
    Ss,
    Statistic,
    Sum,
    Xs,
    entries_of,
    per_sample,
    widened,
    with_ones,
)
from fxcurv.costs import CACHE, Cost, copying, moment, product
from fxcurv.covariance import cheapest
from fxcurv.gemm import times_transpose, transpose_times
from fxcurv.kernels import sum_of_squared_products
from fxcurv.moments import SecondMoment
from fxcurv.pages import new_empty
from fxcurv.patches import Patches

__all__ = [
    "ColumnsByConvolution",
    "ColumnsBySample",
    "CovarianceOfPatches",
    "DiagonalByConvolution",
    "DiagonalByPairs",
    "DiagonalBySample",
    "DiagonalFused",
    "DiagonalOfSinglePositions",
    "DiagonalPerSampleByConvolution",
    "DiagonalPerSampleByPairs",
    "DiagonalPerSampleOfSinglePositions",
    "GradientOfConvolution",
    "KeptEntries",
    "KeptInputs",
    "KeptOutputs",
    "PooledPatches",
    "SquaredNormsByConvolution",
    "SquaredNormsByPairs",
]


# Of the inputs ----------------------------------------------------------------------------------------------------


class _OfPatches(Statistic):
    """A sum over the patches of one convolution, with `ones` of the constant 1 behind them too."""

    reads = "x"

    def __init__(self, patches: Patches, ones: bool = False) -> None:
        super().__init__()
        self.patches, self.ones = patches, ones

    def extra_repr(self) -> str:
        return f"{self.patches}, ones={self.ones}"


class CovarianceOfPatches(_OfPatches):
    """`InputCovariance` of one convolution, from its input `z[n,c,…]`: by the way that is cheapest."""

    def forward(self, zs: Sequence[Tensor]) -> Tensor:
        (z,) = map(widened, zs)
        A = cheapest(self.patches, z).covariance()
        if not self.ones:
            return A
        sums = self.patches.sums(z.sum(0, keepdim=True))[0].unsqueeze(-1)  # [g,i,1]
        count = sums.new_full((1, 1, 1), len(z) * self.patches.pixels(z)).expand(len(A), 1, 1)
        return torch.cat([torch.cat([A, sums], 2), torch.cat([sums.mT, count], 2)], 1)

    def cost(self, zs: Sequence[Tensor]) -> Cost:
        return cheapest(self.patches, zs[0]).cost()


class PooledPatches(_OfPatches):
    """`InputCovariance(pooled=True)` of one convolution, from its input: sums over windows, no patches.

    It applies where every sample is one input of the convolution, and not several, as the frames of a film are.
    """

    def forward(self, zs: Sequence[Tensor]) -> Tensor:
        (z,) = map(widened, zs)
        sums = self.patches.sums(z)
        if self.ones:
            positions = self.patches.pixels(z)
            sums = torch.cat([sums, sums.new_full((*sums.shape[:-1], 1), positions)], -1)
        rows = sums.transpose(0, 1)
        return rows.mT @ rows

    def cost(self, zs: Sequence[Tensor]) -> Cost:
        z, g = zs[0], self.patches.groups
        d = z.shape[1] // g * self.patches.taps
        return copying(z.numel() * self.patches.kernel[0] / 2, z.element_size()) + moment(d, len(z), 4) * g


class KeptInputs(Statistic):
    """`InputCovariance` of one use, kept as the input of a convolution, or as the positions `x[n,s,g,i]`."""

    reads = "x"
    grows = True

    def __init__(self, patches: Patches | None, ones: bool = False) -> None:
        super().__init__()
        self.patches, self.ones = patches, ones

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        (x,) = map(widened, xs)
        return with_ones(x) if self.ones else x.clone(memory_format=torch.contiguous_format)

    def sum_of(self, returned: Tensor) -> Sum:
        return SecondMoment((returned,), self.patches).smaller()

    def cost(self, xs: Sequence[Tensor]) -> Cost:
        return copying(xs[0].numel(), xs[0].element_size())

    def extra_repr(self) -> str:
        return f"{self.patches}, ones={self.ones}"


# Of the cotangents ------------------------------------------------------------------------------------------------


class KeptOutputs(Statistic):
    """`OutputCovariance` of one use, kept as the positions S[v,n,s,g,o], or with `pooled` as their sums over s."""

    reads = "S"
    grows = True
    scales = True

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled

    def forward(self, Ss: Ss) -> Tensor:
        (S,) = Ss
        return S.sum(2, keepdim=True) if self.pooled else S.clone(memory_format=torch.contiguous_format)

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        return returned * scale.view(returned.shape[3:])

    def sum_of(self, returned: Tensor) -> Sum:
        return SecondMoment((returned,)).smaller()

    def cost(self, Ss: Ss) -> Cost:
        return copying(Ss[0].numel(), Ss[0].element_size())

    def extra_repr(self) -> str:
        return f"pooled={self.pooled}"


# Of both ----------------------------------------------------------------------------------------------------------


class KeptEntries(Statistic):
    """`Gram`, kept as the per-sample entries J[v,n,1,1,g·o·i]."""

    reads = "xS"
    grows = True
    scales = True

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        return per_sample(xs, Ss).flatten(2)[:, :, None, None, :].contiguous()

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        return returned * scale.repeat_interleave(returned.shape[-1] // len(scale))

    def sum_of(self, returned: Tensor) -> Sum:
        return SecondMoment((returned,)).smaller()

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        rows, side = entries_of(xs, Ss)
        return copying(Ss[0].numel() + rows * side, Ss[0].element_size())


class ColumnsBySample(Statistic):
    """`Columns` of one use of a convolution's weight, from its input `z[n,c,…]`: the patches of one sample at a time.

    It applies where every sample is one input of the convolution.
    """

    reads = "xS"
    samples, columns, grows = 1, 0, True

    def __init__(self, patches: Patches) -> None:
        super().__init__()
        self.patches = patches

    def empty(self, zs: Sequence[Tensor], Ss: Ss) -> Tensor:
        """The result without its numbers."""
        (z,), (S,) = zs, Ss
        return new_empty(S, *S.shape[:2], *S.shape[3:], z.shape[1] // self.patches.groups * self.patches.taps)

    def forward(self, zs: Sequence[Tensor], Ss: Ss) -> Tensor:
        (z,), (S,), J = map(widened, zs), Ss, self.empty(zs, Ss)
        v, n, groups, _, _ = J.shape
        for a in range(n):
            x = self.patches.positions(z[a : a + 1])[0]  # [s,g,i]
            for c, g in itertools.product(range(v), range(groups)):
                torch.mm(S[c, a, :, g].mT, x[:, g], out=J[c, a, g])
        return J

    def cost(self, zs: Sequence[Tensor], Ss: Ss) -> Cost:
        (S,), i = Ss, self.empty(zs, Ss).shape[-1]
        (v, n, s, g, o), size = S.shape, S.element_size()
        patches = copying(s * g * i, size) + Cost(calls=8)
        return (patches + product(o, i, s, size) * (v * g)) * n + Cost(temporary=2 * size * g * s * i)

    def extra_repr(self) -> str:
        return f"{self.patches}"


class GradientOfConvolution(PerOutput):
    """`Gradient` of one convolution's weight, from its input `z[n,c,…]` and S[v,n,o,…]: autograd's own kernel."""

    power = 1

    def __init__(self, op: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.op = op

    def forward(self, zs: Sequence[Tensor], Ss: Ss) -> Tensor:
        (z,), (S,), op = map(widened, zs), map(widened, Ss), self.op
        weight = S.new_empty(()).expand(op.weight.shape)  # read for its shape only
        geometry = (op.stride, op.padding, op.dilation, False, (0,) * (z.ndim - 2), op.groups)
        S = S[0] if len(S) == 1 else S.sum(0)
        gradient = torch.ops.aten.convolution_backward(S, z, weight, None, *geometry, (False, True, False))[1]
        return gradient.unflatten(0, (op.groups, -1)).flatten(2)

    def cost(self, zs: Sequence[Tensor], Ss: Ss) -> Cost:
        z, S, op = zs[0], Ss[0], self.op
        inputs = z.shape[1] // op.groups * torch.Size(op.kernel_size).numel()
        return (
            copying(S.numel() + z.numel(), S.element_size())
            + product(S.shape[2] // op.groups, inputs, S[0, :, 0].numel(), S.element_size()) * op.groups
        )

    def extra_repr(self) -> str:
        return self.op.extra_repr()


class _ByConvolution(Statistic):
    """A statistic of the per-sample entries of one convolution, from its input `z[n,c,…]` and S[v,n,o,…].

    They are the weight gradients of one convolution that has a group per sample, whose outputs are those of all
    columns; no patch is formed. It applies where every sample is one input of the convolution.
    """

    def __init__(self, op: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.op = op

    def entries(self, xs: Xs, Ss: Ss) -> Tensor:
        """J[v,n,g,o,i]."""
        (z,), (S,), op = xs, Ss, self.op
        assert z is not None
        z, S, (v, n) = widened(z), widened(S), S.shape[:2]
        outputs = S.unflatten(2, (op.groups, -1)).permute(1, 2, 0, 3, *range(4, S.ndim + 1))  # [n,g,v,o,…]
        weight = S.new_empty(()).expand(n * v * S.shape[2], *op.weight.shape[1:])  # read for its shape only
        geometry = (op.stride, op.padding, op.dilation, False, (0,) * (z.ndim - 2), n * op.groups)
        arguments = outputs.flatten(0, 3).unsqueeze(0), z.flatten(0, 1).unsqueeze(0), weight, None
        gradient = torch.ops.aten.convolution_backward(*arguments, *geometry, (False, True, False))[1]
        return gradient.view(n, op.groups, v, S.shape[2] // op.groups, -1).permute(2, 0, 1, 3, 4)

    def size(self) -> int:
        """The entries of a sample and column."""
        return self.op.weight.numel()

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        (z,), (S,), op = xs, Ss, self.op
        assert z is not None
        (v, n, o), size, s = S.shape[:3], S.element_size(), S[0, 0, 0].numel()
        inputs = self.size() // o
        flops, calls = _slowness(op, v, size) * 2 * v * n * o * inputs * s, n * op.groups if size > 4 else 0
        return (
            Cost(flops, size * WRITTEN * v * n * o * inputs, 8 + calls)  # torch's own kernel loops over the groups
            + copying(S.numel() + z.numel(), size)
            + Cost(temporary=self._temporary(z, S))
        )

    def _temporary(self, z: Tensor, S: Tensor) -> float:
        """Bytes of copies of both sides, in the kernel's order too, and of a chunk of entries and their squares."""
        v, n = S.shape[:2]
        chunk = 2 * min(v * n * self.size(), max(CHUNK, self.size()))
        return S.element_size() * (2 * S.numel() + 2 * z.numel() + chunk)

    def extra_repr(self) -> str:
        return self.op.extra_repr()


WRITTEN = 16
"""Passes over the entries that writing them costs, which a kernel orders by blocks of channels first."""


def _slowness(op: nn.Conv1d | nn.Conv2d | nn.Conv3d, columns: int, size: int) -> float:
    """How much slower a weight gradient is than a product of large matrices: the more so the fewer channels and taps.

    oneDNN's kernels of single precision have a way of their own for one input and one output, which likes few taps.
    """
    inputs, outputs, wide = op.in_channels // op.groups, columns * op.out_channels // op.groups, max(op.kernel_size) > 3
    if inputs == outputs == 1 and size <= 4:
        return 72 if wide else 18
    channels = inputs * (4 if wide and outputs > 1 else 1)
    return 12 / math.sqrt(channels) if size > 4 else max(2.5, 40 / channels)


class ColumnsByConvolution(_ByConvolution, Columns):
    """`Columns` of one convolution's weight, without patches."""

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        return self.entries(xs, Ss).contiguous()

    def _temporary(self, z: Tensor, S: Tensor) -> float:
        v, n = S.shape[:2]
        return S.element_size() * (2 * S.numel() + 2 * z.numel() + 2 * v * n * self.size())


class _SquaresByConvolution(_ByConvolution, SquaredEntries):
    """Squared entries of one convolution, chunk by chunk."""

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        return self.total(self.entries, (xs, Ss), self.size())


class DiagonalByConvolution(_SquaresByConvolution, Diagonal):
    """`Diagonal` of one convolution's weight, without patches."""


class DiagonalPerSampleByConvolution(_SquaresByConvolution, DiagonalPerSample):
    """`DiagonalPerSample` of one convolution's weight, without patches."""


class SquaredNormsByConvolution(_SquaresByConvolution, SquaredNorms):
    """`SquaredNorms` of one convolution's weight, without patches."""


class DiagonalOfSinglePositions(PerOutput):
    """`Diagonal` of one use with one position per sample: Σ_n (Σ_v S[v,n,g,o]²) x[n,g,i]², one product of squares."""

    power = 2

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        (x,), (S,) = xs, Ss
        squares = S.square().sum(0)[:, 0]
        if x is None:
            return squares.sum(0).unsqueeze(-1)
        inputs = x[:, 0].square().unbind(1)
        return _stacked([transpose_times(o, i) for o, i in zip(squares.unbind(1), inputs, strict=True)])

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        (x,), (S,) = xs, Ss
        squares = copying(S.numel(), S.element_size())
        if x is None:
            return squares
        _, n, _, g, o = S.shape
        return squares + product(o, x.shape[-1], n, S.element_size()) * g


def _stacked(groups: Sequence[Tensor]) -> Tensor:
    """The results of all groups; one alone is not copied."""
    return groups[0].unsqueeze(0) if len(groups) == 1 else torch.stack(list(groups))


class DiagonalBySample(PerOutput):
    """`Diagonal` of weights, each product of a sample and column squared while it is in the cache."""

    power = 2

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        _, _, _, g, o = Ss[0].shape
        weights = [x.permute(2, 0, 3, 1) for x in xs if x is not None]  # [g,n,i,s]
        columns = [S.permute(3, 0, 1, 4, 2) for S in Ss]  # [g,v,n,o,s]
        inputs = weights[0].shape[2]
        total, rows = Ss[0].new_zeros(g, o, inputs), max(1, CACHE // inputs)
        for group in range(g):
            x = [w[group].unbind() for w in weights]
            for start in range(0, o, rows):
                block = total[group, start : start + rows]
                for v in range(len(Ss[0])):
                    S = [c[group, v, :, start : start + rows].unbind() for c in columns]
                    for pairs in zip(zip(*S, strict=True), zip(*x, strict=True), strict=True):
                        entries = _entries(*pairs)
                        block.addcmul_(entries, entries)
        return total

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        v, n, _, g, o = Ss[0].shape
        x = xs[0]
        assert x is not None
        inputs, size = x.shape[-1], Ss[0].element_size()
        s = sum(S.shape[2] for S in Ss)
        calls = 4 * v * n * g * -(-o // max(1, CACHE // inputs))
        entries = v * n * g * o * inputs
        return Cost(2 * entries * s, 0.75 * size * entries, calls, size * min(CACHE, o * inputs))


def _entries(Ss: Sequence[Tensor], xs: Sequence[Tensor]) -> Tensor:
    """Σ_s S[o,s] x[i,s] over all uses."""
    total = times_transpose(Ss[0], xs[0])
    for S, x in zip(Ss[1:], xs[1:], strict=True):
        total = total + times_transpose(S, x)
    return total


class DiagonalFused(PerOutput):
    """`Diagonal` on a GPU, in one kernel that writes no entry of a column and sample to memory (kernels.py)."""

    power = 2

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        S, x = torch.cat([*Ss], 2), torch.cat([x for x in xs if x is not None], 1)  # positions of all uses
        return sum_of_squared_products(S, x)

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        v, n, _, g, o = Ss[0].shape
        x = xs[0]
        assert x is not None
        positions, inputs = sum(S.shape[2] for S in Ss), x.shape[-1]
        return Cost(2 * TILES * v * n * g * o * inputs * positions, Ss[0].element_size() * Ss[0].numel(), 2)


TILES = 3
"""How much slower the kernel's tiles multiply than a library that uses TF32 or larger tiles."""


class DiagonalByPairs(PerOutput):
    """`Diagonal` of one use by pairs of positions: Σ_n Σ_{s≤t} (2-δ_st) (Σ_v S_vns S_vnt) (x_ns x_nt), one product.

    It forms nothing per column and weight: for few positions, or many columns (design §6.2's Gram trick).
    """

    power = 2

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        (x,), (S,) = xs, Ss
        assert x is not None
        x, S = x.permute(2, 1, 0, 3).contiguous(), S.permute(3, 2, 0, 1, 4).contiguous()  # [g,s,n,i], [g,s,v,n,o]
        return _stacked([self._group(*group) for group in zip(x, S, strict=True)])

    def _group(self, x: Tensor, S: Tensor) -> Tensor:
        total: Tensor | None = None
        pairs = [(a, b) for a in range(len(x)) for b in range(a, len(x))]
        size = max(1, CHUNK // (x.shape[1] * (x.shape[2] + S.shape[3])))
        for start in range(0, len(pairs), size):
            chunk = pairs[start : start + size]
            inputs = torch.stack([x[a] * x[b] for a, b in chunk]).flatten(0, 1)
            outputs = torch.stack([(S[a] * S[b]).sum(0) * (1 if a == b else 2) for a, b in chunk]).flatten(0, 1)
            part = transpose_times(outputs, inputs)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        (x,), (S,) = xs, Ss
        assert x is not None
        v, n, s, g, o = S.shape
        pairs, i, size = s * (s + 1) // 2, x.shape[-1], S.element_size()
        forming = copying(pairs * n * (2 * i + 1.2 * v * o), size) + Cost(calls=6 * pairs)
        return (forming + product(o, i, n * pairs, size)) * g + Cost(
            temporary=size * (min(2 * CHUNK, 2 * pairs * n * (i + o)) + S.numel() + x.numel())
        )


class DiagonalPerSampleOfSinglePositions(Statistic):
    """`DiagonalPerSample` of one use with one position per sample: (Σ_v S[v,n,g,o]²) x[n,g,i]²."""

    reads = "xS"
    samples, grows = 0, True

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        (x,), (S,) = xs, Ss
        squares = S[:, :, 0].square().sum(0).unsqueeze(-1)  # [n,g,o,1]
        return squares if x is None else squares * x[:, 0].square().unsqueeze(-2)

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        (x,), (S,) = xs, Ss
        _, n, _, g, o = S.shape
        entries = n * g * o * (1 if x is None else x.shape[-1])
        return copying(S.numel(), S.element_size()) + copying(entries / 2, S.element_size())


class DiagonalPerSampleByPairs(Statistic):
    """`DiagonalPerSample` of one use by pairs of positions: Σ_{s≤t} (2-δ_st) (Σ_v S_vns S_vnt) (x_ns x_nt).

    Each entry is written once, whatever the number of columns: for few positions.
    """

    reads = "xS"
    samples, grows = 0, True

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        (x,), (S,) = xs, Ss
        assert x is not None
        n, s, g, i = x.shape
        result = new_empty(S, n, g, S.shape[-1], i)
        first, second = torch.triu_indices(s, s, device=S.device)
        twice = 2 - (first == second).to(S.dtype).view(-1, 1, 1)
        size = max(1, CHUNK // max(1, len(first) * (S[:, 0, 0].numel() + x[0, 0].numel())))
        for start in range(0, n, size):
            inputs, outputs = x[start : start + size], S[:, start : start + size]
            inputs = inputs[:, first] * inputs[:, second]  # [n,st,g,i]
            outputs = (outputs[:, :, first] * outputs[:, :, second]).sum(0) * twice
            left, right = outputs.permute(0, 2, 3, 1).flatten(0, 1), inputs.transpose(1, 2).flatten(0, 1)
            torch.bmm(left, right, out=result[start : start + size].flatten(0, 1))
        return result

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        (x,), (S,) = xs, Ss
        assert x is not None
        v, n, s, g, o = S.shape
        pairs, i, size = s * (s + 1) // 2, x.shape[-1], S.element_size()
        forming = copying(n * pairs * g * (4.5 * i + 4 * v * o), size) + Cost(calls=12)
        held = Cost(temporary=size * min(3 * CHUNK, 3 * n * pairs * g * (i + v * o)))
        return forming + product(o, i, pairs, size) * (n * g) + held


class SquaredNormsByPairs(Statistic):
    """`SquaredNorms` of weights by pairs of positions: Σ_v Σ_st (x_ns x_nt) (S_vns S_vnt); no entry is formed."""

    reads = "xS"
    samples, grows = 0, True

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        x = torch.cat([x for x in xs if x is not None], 1).transpose(1, 2)  # [n,g,s,i]
        S = torch.cat([*Ss], 2).transpose(2, 3)  # [v,n,g,s,o]
        total = S.new_zeros(len(x))
        samples = max(1, CHUNK // (len(S) * S.shape[2] * S.shape[3] ** 2))
        for start in range(0, len(x), samples):
            rows = slice(start, start + samples)
            inputs, outputs = x[rows] @ x[rows].mT, S[:, rows] @ S[:, rows].mT
            total[rows] = (outputs.sum(0) * inputs).sum((1, 2, 3))
        return total

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        v, n, _, g, o = Ss[0].shape
        assert xs[0] is not None
        s, i, size = sum(S.shape[2] for S in Ss), xs[0].shape[-1], Ss[0].element_size()
        pairs = (product(s, s, i, size) + product(s, s, o, size) * v) * (n * g)
        return Cost(pairs.flops, pairs.bytes, 6, 2 * size * min(CHUNK, v * n * g * s * s)) + copying(
            n * g * s * (i + v * o), size
        )
