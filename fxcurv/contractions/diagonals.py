"""Algorithms for diagonals, per-sample diagonals and squared norms: by single positions, by sample, by pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcurv.contractions.entries import CHUNK, PerOutput
from fxcurv.contractions.kernels import sum_of_squared_products
from fxcurv.contractions.statistic import Ss, Statistic, Xs
from fxcurv.linalg.allocation import new_empty
from fxcurv.linalg.cost import CACHE, Cost, copying, product
from fxcurv.linalg.matmul import times_transpose, transpose_times

__all__ = [
    "DiagonalByPairs",
    "DiagonalBySample",
    "DiagonalFused",
    "DiagonalOfSinglePositions",
    "DiagonalPerSampleByPairs",
    "DiagonalPerSampleOfSinglePositions",
    "SquaredNormsByPairs",
]


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
    """Stack the results of all groups; a single one is not copied."""
    return groups[0].unsqueeze(0) if len(groups) == 1 else torch.stack(list(groups))


class DiagonalBySample(PerOutput):
    """`Diagonal` of weights: each sample and column's product is squared while it is in the cache."""

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
    """`Diagonal` on a GPU, in one fused kernel that does not write per-sample entries to memory (kernels.py)."""

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
"""Slowdown of the kernel's tiled products relative to a library that uses TF32 or larger tiles."""


class DiagonalByPairs(PerOutput):
    """`Diagonal` of one use by pairs of positions: Σ_n Σ_{s≤t} (2-δ_st) (Σ_v S_vns S_vnt) (x_ns x_nt), one product.

    It forms nothing per column and weight: for few positions, or many columns (the Gram trick, design §6.2).
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

    Each entry is written once, for any number of columns: for few positions.
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
