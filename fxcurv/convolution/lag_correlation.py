"""Lag correlations of a convolution's input: each distinct sum of products of two taps is computed once.

The overlap of two taps is the set of pairs of entries that they see, from the output pixels where both see the input;
each pair has the same offset. Overlaps differ by offset, and otherwise only at the border: of the 81 pairs of taps of a
padded 3 × 3 kernel 49 differ, and half of these are transposes of others. Overlaps at one offset follow from the widest
one by subtracting the few rows and columns at the border outside them. No overlap reads padding. Pairs of taps without
an overlap, as on a small map, give zero.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fxcurv.convolution.patches import Axis, Patches
from fxcurv.linalg.allocation import new_empty
from fxcurv.linalg.cost import CACHE, Cost, at_once, copying, of_groups, product
from fxcurv.linalg.matmul import batched_times_transpose

__all__ = ["LagCorrelations"]


PART = 2 * CACHE
"""Number of entries of the samples whose windows are copied and multiplied at a time."""


WRITING = 2
"""Cost of assembling the matrix, in passes over it."""


SHORT = 64
"""Inner size below which computing a product is faster than transposing another."""


class Overlap(NamedTuple):
    """Overlap of two taps along an axis: pairs `first + k·stride` and `other + k·stride`, k < length."""

    first: int
    other: int
    length: int
    stride: int

    @property
    def mirrored(self) -> Overlap:
        return Overlap(self.other, self.first, self.length, self.stride)

    @property
    def last(self) -> int:
        """Last entry of the first tap."""
        return self.first + self.stride * (self.length - 1)

    @property
    def window(self) -> slice:
        """Entries of the first tap."""
        return slice(self.first, self.last + 1, self.stride)

    def part(self, start: int, stop: int) -> Overlap:
        """Return the pairs with start ≤ k < stop."""
        shift = self.stride * start
        return Overlap(self.first + shift, self.other + shift, stop - start, self.stride)

    def without(self, part: Overlap) -> list[Overlap]:
        """Return the pairs before and after a part."""
        start = (part.first - self.first) // self.stride
        outside = self.part(0, start), self.part(start + part.length, self.length)
        return [one for one in outside if one.length]


EMPTY = Overlap(0, 0, 0, 1)


Overlaps = tuple[Overlap, ...]
"""Overlap of two taps along every axis."""


class AxisOverlaps(NamedTuple):
    """Overlaps of all pairs of taps of one axis."""

    pairs: list[list[Overlap]]
    """Overlap of each pair of taps."""
    follows: dict[Overlap, list[Overlap]]
    """Maps an overlap to the widest one at its offset, followed by the strips to subtract, where that is cheaper."""

    @property
    def different(self) -> set[Overlap]:
        """The distinct overlaps of all pairs, without the empty one."""
        return set(itertools.chain(*self.pairs)) - {EMPTY}

    @property
    def multiplied(self) -> list[Overlap]:
        """The overlaps to multiply, from which all others follow."""
        return sorted((self.different | set(itertools.chain(*self.follows.values()))) - set(self.follows))


@lru_cache
def axis_overlaps(axis: Axis, length: int) -> AxisOverlaps:
    """Overlaps of the taps of an axis, for an input of this length."""
    pairs = [[_overlap(axis, a, b, length) for b in range(axis.size)] for a in range(axis.size)]
    groups: defaultdict[tuple[int, int], set[Overlap]] = defaultdict(set)
    for overlap in set(itertools.chain(*pairs)) - {EMPTY}:
        groups[overlap.other - overlap.first, overlap.first % overlap.stride].add(overlap)
    follows: dict[Overlap, list[Overlap]] = {}
    for group in groups.values():
        first, last = min(group), max(overlap.last for overlap in group)
        widest = first.part(0, (last - first.first) // first.stride + 1)
        for overlap in group:
            outside = widest.without(overlap)
            if 0 < sum(one.length for one in outside) < overlap.length:
                follows[overlap] = [widest, *outside]
    return AxisOverlaps(pairs, follows)


def _overlap(axis: Axis, a: int, b: int, length: int) -> Overlap:
    """Overlap of two taps, over the output pixels from which both see the input."""
    offsets = [axis.dilation * tap - axis.padding for tap in (a, b)]
    first = max(0, -(min(offsets) // axis.stride))
    stop = min(axis.outputs(length), (length - 1 - max(offsets)) // axis.stride + 1)
    if stop <= first:
        return EMPTY
    left, right = (axis.stride * first + offset for offset in offsets)
    return Overlap(left, right, stop - first, axis.stride)


class LagCorrelations:
    """Lag correlations of all pairs of taps in one batch `z[n, g·c, …]`."""

    def __init__(self, patches: Patches, z: Tensor) -> None:
        self.groups, self.taps, self.z = patches.groups, patches.taps, z
        self.channels = z.shape[1] // patches.groups
        self.axes = [axis_overlaps(axis, length) for axis, length in zip(patches.axes, z.shape[2:], strict=True)]

    def cost(self) -> Cost:
        """Cost of `covariance`."""
        z, size, c, g = self.z, self.z.element_size(), self.channels, self.groups
        multiplied = [axis.multiplied for axis in self.axes]
        seen = len(z) * math.prod(sum(one.length for one in axis) for axis in multiplied)
        products = math.prod(map(len, multiplied))
        sums = products + math.prod(len(axis.different) for axis in self.axes)
        flops = of_groups(product(c, c, seen / 2, size), g).flops
        copied = z.numel() + g * c * (seen + c * sums)
        matrix, part = g * (c * self.taps) ** 2, min(z.numel(), self._samples * z[0].numel())
        calls = 3 * products * -(-len(z) // self._samples) + 2 * sums + 2 * self.taps * -(-g * c // self._rows)
        moved = copying(copied, size).bytes + WRITING * size * matrix
        return Cost(flops, moved, calls, size * (3 * part + g * c * c * sums + 2 * CACHE))

    def covariance(self) -> Tensor:
        """Σ_ns x xᵀ, `[g,i,i]`."""
        rows, c, sums = self.groups * self.channels, self.channels, self._products()
        taps = list(itertools.product(*(range(len(axis.pairs)) for axis in self.axes)))
        blocks = [[self._sum(self._met(a, b), sums) for b in taps] for a in taps]
        A = new_empty(self.z, rows, self.taps, c * self.taps)
        for start in range(0, rows, self._rows):
            part = slice(start, min(rows, start + self._rows))
            for tap, row in enumerate(blocks):
                A[part, tap] = _interleaved(torch.cat([block[part] for block in row], 1), self.taps)
        return A.view(self.groups, c * self.taps, c * self.taps)

    @property
    def _rows(self) -> int:
        """Number of channels to assemble at a time, in the cache."""
        return max(1, CACHE // (self.taps * self.channels))

    @property
    def _samples(self) -> int:
        """Number of samples to multiply at a time."""
        count = len(self.z)
        return count if torch.compiler.is_compiling() else at_once(self.z, self.z[0].numel(), count, PART)

    def _met(self, a: Sequence[int], b: Sequence[int]) -> Overlaps:
        """Overlaps of two taps along every axis; if one is empty, the taps do not overlap."""
        overlap = tuple(axis.pairs[i][j] for axis, i, j in zip(self.axes, a, b, strict=True))
        return (EMPTY,) * len(overlap) if EMPTY in overlap else overlap

    def _products(self) -> dict[Overlaps, Tensor]:
        """Σ z[g,c,q] z[g,c',q'] over q and q' of the overlaps from which all others follow: `[g·c, c']`."""
        sums: dict[Overlaps, Tensor] = {}
        multiplied = list(itertools.product(*(axis.multiplied for axis in self.axes)))
        for part in self.z.split(self._samples):
            entries = part.unflatten(1, (self.groups, -1)).movedim(0, -1).contiguous()  # long runs to copy
            for overlap in multiplied:
                mirrored = _mirrored(overlap)
                if mirrored < overlap and len(self.z) * math.prod(one.length for one in overlap) >= SHORT:
                    continue  # computed as a transpose
                left = _window(entries, overlap)
                right = left if mirrored == overlap else _window(entries, mirrored)
                products = batched_times_transpose(left, right).flatten(0, 1)
                sums[overlap] = sums[overlap].add_(products) if overlap in sums else products
        return sums

    def _sum(self, overlap: Overlaps, sums: dict[Overlaps, Tensor]) -> Tensor:
        """Sum of products of any overlap, cached in `sums`."""
        if overlap not in sums:
            sums[overlap] = self._following(overlap, sums)
        return sums[overlap]

    def _following(self, overlap: Overlaps, sums: dict[Overlaps, Tensor]) -> Tensor:
        if EMPTY in overlap:
            return self.z.new_zeros(self.groups * self.channels, self.channels)
        for k, (axis, one) in enumerate(zip(self.axes, overlap, strict=True)):
            if one in axis.follows:
                parts = (self._sum((*overlap[:k], part, *overlap[k + 1 :]), sums) for part in axis.follows[one])
                return functools.reduce(torch.sub, parts)
        return sums[_mirrored(overlap)].unflatten(0, (self.groups, -1)).mT.flatten(0, 1).contiguous()


def _mirrored(overlap: Overlaps) -> Overlaps:
    return tuple(one.mirrored for one in overlap)


def _window(entries: Tensor, overlap: Overlaps) -> Tensor:
    """Entries of the first taps, from `[g, c, …, n]`: `[g, c, q·n]`."""
    return entries[(slice(None), slice(None), *(one.window for one in overlap))].flatten(2)


def _interleaved(rows: Tensor, taps: int) -> Tensor:
    """`[r, t·c] -> [r, c·t]`, by torch's channel shuffle, its fastest transpose of narrow blocks."""
    count, width = rows.shape
    pixels = rows.as_strided((count, width, 1, 1), (width, 1, width, width))
    return torch.native_channel_shuffle(pixels, taps).view(count, width)
