"""Per-sample entries J[v,n,g,o,i] = Σ_s S[v,n,s,g,o] x[n,s,g,i], their squares in chunks, and their cost.

A use is a pair `x[n,s,g,i]`, `S[v,n,s,g,o]`; for a bias `x` is None and stands for 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fxcurv.contractions.statistic import Ss, Statistic, Xs
from fxcurv.linalg.allocation import new_empty
from fxcurv.linalg.cost import CACHE, Cost, copying, product

__all__ = ["CHUNK", "PerOutput", "SquaredEntries", "entries_of", "per_sample", "widened", "with_ones"]


CHUNK = 1 << 22
"""Maximum number of entries of a temporary of per-sample quantities."""


def per_sample(xs: Xs, Ss: Ss) -> Tensor:
    """J[v,n,g,o,i] = Σ_s S[v,n,s,g,o] x[n,s,g,i], summed over the uses."""
    total = _per_sample(xs[0], Ss[0])
    for x, S in zip(xs[1:], Ss[1:], strict=True):
        total = total + _per_sample(x, S).view_as(total)
    return total


def _per_sample(x: Tensor | None, S: Tensor) -> Tensor:
    if x is None:
        return S.sum(2).unsqueeze(-1)
    if x.shape[-1] == S.shape[-1] == 1:  # one product per channel, without matrix products
        return _per_channel(x, S)
    v, n, s, g, o = S.shape
    if s == 1:  # outer products: written once, without a sum
        result = new_empty(S, v, n, g, o, x.shape[-1])
        return torch.mul(S[:, :, 0].unsqueeze(-1), x[:, 0].unsqueeze(-2), out=result)
    if v == 1:  # one matrix product per sample and group, [o,s] @ [s,i], written in place
        result = new_empty(S, 1, n, g, o, x.shape[-1])
        left, right = S[0].permute(0, 2, 3, 1).flatten(0, 1), x.transpose(1, 2).flatten(0, 1)
        torch.bmm(left, right, out=result.view(n * g, o, -1))
        return result
    # [n,g,v·o,s] @ [n,g,s,i]
    product = S.permute(1, 3, 0, 4, 2).reshape(n, g, v * o, s) @ x.transpose(1, 2)
    return product.view(n, g, v, o, -1).permute(2, 0, 1, 3, 4)


def _per_channel(x: Tensor, S: Tensor) -> Tensor:
    """Σ_s S[v,n,s,g,1] x[n,s,g,1], `[v,n,g,1,1]`; many products are computed in parts that reuse one buffer."""
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


def entries_cost(xs: Xs, Ss: Ss) -> Cost:
    """Cost of `per_sample`, plus one pass over its entries."""
    cost = Cost()
    for x, S in zip(xs, Ss, strict=True):
        v, n, s, g, o = S.shape
        i, size = 1 if x is None else x.shape[-1], S.element_size()
        cost += product(v * o, i, s, size) * (n * g) + copying(S.numel(), size) + copying(v * n * g * o * i, size) * 4
    return Cost(cost.flops, cost.bytes, 6 * len(xs), cost.temporary)


class PerOutput(Statistic):
    """A statistic `[g,o,i]` that is homogeneous in S of degree `power`."""

    reads = "xS"
    scales = True
    power: ClassVar[int]

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        return returned * (scale**self.power).view(*returned.shape[:2], 1)


class SquaredEntries(Statistic):
    """Σ J[v,n,g,o,i]² over some axes of the per-sample entries, formed one chunk at a time."""

    reads = "xS"
    over: ClassVar[tuple[int, ...]]

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        return self.total(per_sample, (xs, Ss), entries_of(xs, Ss)[1])

    def total(self, entries: Callable[[Xs, Ss], Tensor], uses: tuple[Xs, Ss], size: int) -> Tensor:
        """Sum the squares of `entries` over chunks of the uses along n and v, with `size` entries per n and v."""
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
        return entries_cost(xs, Ss) + Cost(temporary=2 * Ss[0].element_size() * min(CHUNK, rows * side))


def _chunks(xs: Xs, Ss: Ss, size: int) -> Iterator[tuple[tuple[int, int], list[Tensor | None], list[Tensor]]]:
    """Split the uses along n and v, so that `size` entries per n and v fit in `CHUNK`; also yield the first n and v."""
    v, n = Ss[0].shape[:2]
    samples = max(1, min(n, CHUNK // max(1, size * v)))
    columns = max(1, min(v, CHUNK // max(1, size * samples)))
    for a in range(0, n, samples):
        x = [None if x is None else x[a : a + samples] for x in xs]
        for b in range(0, v, columns):
            yield (a, b), x, [S[b : b + columns, a : a + samples] for S in Ss]


def entries_of(xs: Xs, Ss: Ss) -> tuple[int, int]:
    """(v·n, g·o·i): the shape of the per-sample entries as a matrix."""
    v, n, _, g, o = Ss[0].shape
    return v * n, g * o * (1 if xs[0] is None else xs[0].shape[-1])


def widened(t: Tensor) -> Tensor:
    """Convert half precision to float32, before any sum."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def with_ones(x: Tensor) -> Tensor:
    """x with the constant 1 appended along the last axis."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
