"""What two taps of a convolution meet: every different sum of products once, however many pairs of taps share it.

From the output pixels from which both see the input, two taps meet entries of it pair by pair, at one displacement.
Away from the border that is all that tells pairs of taps apart, and the border makes few more kinds: of the 81 pairs of
a padded 3 × 3 kernel 49 differ, half of them the transposes of others. None reads padding, and pairs that on a small
map never see the input from the same pixel are zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxcurv.costs import Cost, copying, product
from fxcurv.gemm import batched_times_transpose
from fxcurv.pages import new_empty
from fxcurv.patches import Axis, Patches

__all__ = ["Meetings"]

CACHED = 1 << 20
"""Bytes of the rows that are put together at a time, so that they are read and written in the cache."""

WRITING = 2
"""Passes over the matrix that putting it together costs."""

SHORT = 64
"""Inner size below which a product is made faster than the transpose of another."""


class Meeting(NamedTuple):
    """Entries along an axis that two taps meet: `first + k·stride` with `other + k·stride`, k < length."""

    first: int
    other: int
    length: int
    stride: int

    @property
    def mirrored(self) -> Meeting:
        return Meeting(self.other, self.first, self.length, self.stride)

    @property
    def window(self) -> slice:
        """The entries that the first of the taps meets."""
        return slice(self.first, self.first + self.stride * (self.length - 1) + 1, self.stride)


NOTHING = Meeting(0, 0, 0, 1)


def meetings(axis: Axis, length: int) -> list[list[Meeting]]:
    """What every pair of taps meets from the output pixels from which both see the input."""
    return [[_meeting(axis, a, b, length) for b in range(axis.size)] for a in range(axis.size)]


def _meeting(axis: Axis, a: int, b: int, length: int) -> Meeting:
    offsets = [axis.dilation * tap - axis.padding for tap in (a, b)]
    first = max(0, -(min(offsets) // axis.stride))
    stop = min(axis.outputs(length), (length - 1 - max(offsets)) // axis.stride + 1)
    if stop <= first:
        return NOTHING
    left, right = (axis.stride * first + offset for offset in offsets)
    return Meeting(left, right, stop - first, axis.stride if stop - first > 1 else 1)


class Meetings:
    """The meetings of all pairs of taps in one batch `z[n, g·c, …]`; `tables[k][a][b]` are those along axis k."""

    def __init__(self, patches: Patches, z: Tensor) -> None:
        self.groups, self.taps, self.z = patches.groups, patches.taps, z
        self.channels = z.shape[1] // patches.groups
        self.tables = [meetings(axis, length) for axis, length in zip(patches.axes, z.shape[2:], strict=True)]

    def cost(self) -> Cost:
        """What `covariance` takes."""
        size, c, g = self.z.element_size(), self.channels, self.groups
        different = [set(itertools.chain(*table)) - {NOTHING} for table in self.tables]
        windows = [{(m.first, m.length, m.stride) for m in axis} for axis in different]
        sums = math.prod(len(axis) for axis in different)
        summed = len(self.z) * math.prod(sum(m.length for m in axis) for axis in different)
        copied = self.z.numel() + g * c * len(self.z) * math.prod(sum(w[1] for w in axis) for axis in windows)
        held, matrix = (sums + 1) * g * c * c, g * (c * self.taps) ** 2
        cost = product(c, c, summed / 2, size) * g + copying(copied + held, size)
        calls = 3 * sums + 2 * self.taps * -(-g * c // self._rows)
        return Cost(cost.flops, cost.bytes + WRITING * size * matrix, calls, size * (copied + held) + 2 * CACHED)

    def covariance(self) -> Tensor:
        """Σ_ns x xᵀ, `[g,i,i]`."""
        taps = list(itertools.product(*(range(len(table)) for table in self.tables)))
        met = [[self._met(a, b) for b in taps] for a in taps]
        places = {pair: k for k, pair in enumerate(dict.fromkeys(itertools.chain(*met)))}
        sums = self._sums(places)
        rows, c = self.groups * self.channels, self.channels
        A = new_empty(self.z, rows, self.taps, c * self.taps)
        for start in range(0, rows, self._rows):
            part = slice(start, min(rows, start + self._rows))
            for tap, row in enumerate(met):
                blocks = torch.cat([sums[places[pair], part] for pair in row], 1)
                A[part, tap] = _interleaved(blocks, self.taps)
        return A.view(self.groups, c * self.taps, c * self.taps)

    @property
    def _rows(self) -> int:
        """How many channels are put together at a time."""
        return max(1, CACHED // (self.taps * self.channels * self.z.element_size()))

    def _met(self, a: Sequence[int], b: Sequence[int]) -> tuple[Meeting, ...]:
        """The meetings of two taps along every axis; without one along some axis they meet nothing."""
        met = tuple(table[i][j] for table, i, j in zip(self.tables, a, b, strict=True))
        return (NOTHING,) * len(met) if NOTHING in met else met

    def _sums(self, places: dict[tuple[Meeting, ...], int]) -> Tensor:
        """Σ z[g,c,q] z[g,c',q'] over the q and q' of every meeting: `[k, g·c, c']`."""
        z, c, windows = self.z, self.channels, _Windows(self.z, self.groups)
        sums = new_empty(z, len(places), self.groups, c, c)
        for met, k in places.items():
            mirrored = tuple(m.mirrored for m in met)
            if NOTHING in met:
                sums[k].zero_()
            elif places[mirrored] < k and len(z) * math.prod(m.length for m in met) >= SHORT:
                sums[k] = sums[places[mirrored]].mT
            else:
                sums[k] = batched_times_transpose(windows.of(met), windows.of(mirrored))
        return sums.flatten(1, 2)


def _interleaved(rows: Tensor, taps: int) -> Tensor:
    """`[r, t·c] -> [r, c·t]`: what torch calls a shuffle of channels, by far its fastest transpose of narrow blocks."""
    count, width = rows.shape
    pixels = rows.as_strided((count, width, 1, 1), (width, 1, width, width))
    return torch.native_channel_shuffle(pixels, taps).view(count, width)


class _Windows:
    """The entries that the first tap of a meeting meets, each window laid out once."""

    def __init__(self, z: Tensor, groups: int) -> None:
        self.entries = z.unflatten(1, (groups, -1)).movedim(0, -1).contiguous()  # the samples last: long runs to copy
        self.windows: dict[tuple[tuple[int, int, int], ...], Tensor] = {}

    def of(self, met: Sequence[Meeting]) -> Tensor:
        """`[g, c, q·n]`."""
        key = tuple((m.first, m.length, m.stride) for m in met)
        if key not in self.windows:
            self.windows[key] = self.entries[(slice(None), slice(None), *(m.window for m in met))].flatten(2)
        return self.windows[key]
