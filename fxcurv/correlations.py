"""Correlations of a convolution's input with itself, of which Σ_ns x xᵀ is made.

Output pixel p sees, through tap a of an axis, the input at q = stride·p + dilation·a - padding, or zero outside of it.
Split by the phase q mod stride, the tap reads entry p + shift of one phase, so that a pair of taps reads two phases at
a constant displacement. Over all integers p, and not those of the output alone, Σ_p x xᵀ therefore depends on the
displacement alone: it is made of one correlation for each, without the patches at the p that are no output pixels,
which are few and see little of the input.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from fxcurv.costs import Cost, copying, of_groups, product
from fxcurv.gemm import batched_times_transpose
from fxcurv.pages import new_empty
from fxcurv.patches import Axis, Patches

__all__ = ["Correlations"]

WRITING = 8
"""Passes over the matrix that its writing costs, block by block at strides."""


class Displacement(NamedTuple):
    """From an entry of one phase to an entry of another, `by` entries further."""

    phase: int
    other: int
    by: int

    @property
    def mirrored(self) -> Displacement:
        return Displacement(self.other, self.phase, -self.by)


class Beyond(NamedTuple):
    """Positions of the kernel along an axis, and the taps through which they see anything."""

    positions: range
    taps: range


@lru_cache
def displacements(axis: Axis) -> dict[Displacement, list[tuple[int, int]]]:
    """The pairs of taps by what lies between the entries that they meet."""
    pairs: defaultdict[Displacement, list[tuple[int, int]]] = defaultdict(list)
    for a, b in itertools.product(range(axis.size), repeat=2):
        (shift, phase), (shift2, phase2) = (divmod(axis.dilation * tap - axis.padding, axis.stride) for tap in (a, b))
        pairs[Displacement(phase, phase2, shift2 - shift)].append((a, b))
    return dict(pairs)


def beyond(axis: Axis, length: int) -> list[Beyond]:
    """The positions before and behind the output pixels from which the kernel still sees some of the input."""
    first, end = -((axis.reach - axis.padding) // axis.stride), (length - 1 + axis.padding) // axis.stride + 1
    outside = (p for p in range(first, end) if not 0 <= p < axis.outputs(length))
    seen = [Beyond(range(p, p + 1), _seen(axis, p, length)) for p in outside]
    return [one for one in seen if one.taps]


def _seen(axis: Axis, position: int, length: int) -> range:
    """The taps that meet an entry of the input from a position."""
    start = axis.stride * position - axis.padding
    first = max(0, -(start // axis.dilation))
    return range(first, max(first, min(axis.size, (length - 1 - start) // axis.dilation + 1)))


class Correlations:
    """Correlations of one batch.

    The entries of a phase are laid out channel by channel, as `[g, c, n·row·…]` with enough zeros behind every row that
    a displacement is a shift of the whole: one product of two views sums over all entries of all samples.
    """

    def __init__(self, patches: Patches, z: Tensor) -> None:
        self.patches, self.z = patches, z
        self.channels = z.shape[1] // patches.groups
        gaps = [max(abs(d.by) for d in displacements(axis)) for axis in patches.axes]
        lengths = [-(-length // axis.stride) for axis, length in zip(patches.axes, z.shape[2:], strict=True)]
        self.sizes = [length + gap for length, gap in zip(lengths, gaps, strict=True)]
        self.strides = [math.prod(self.sizes[k + 1 :]) for k in range(len(self.sizes))]
        self.furthest = sum(gap * stride for gap, stride in zip(gaps, self.strides, strict=True))
        self.kinds = [
            [Beyond(range(axis.outputs(length)), range(axis.size)), *beyond(axis, length)]
            for axis, length in zip(patches.axes, z.shape[2:], strict=True)
        ]
        self.buffers: dict[tuple[int, ...], Tensor] = {}

    def cost(self) -> Cost:
        """What `covariance` takes."""
        p, size, g, c = self.patches, self.z.element_size(), self.patches.groups, self.channels
        entries, count = len(self.z) * math.prod(self.sizes), math.prod(len(displacements(axis)) for axis in p.axes)
        cost = of_groups(product(c, c, entries, size), g) * ((count + 1) / 2)
        for cell in itertools.islice(itertools.product(*self.kinds), 1, None):
            side = c * math.prod(len(k.taps) for k in cell)
            seen = len(self.z) * math.prod(len(k.positions) for k in cell)
            cost += of_groups(product(side, side, seen, size) + copying(side * (side + seen), size), g) + Cost(calls=3)
        buffers, matrix = size * g * c * entries * math.prod(p.stride), size * g * (c * p.taps) ** 2
        calls = cost.calls + 4 * math.prod(p.stride) + p.taps**2 + count
        return Cost(cost.flops, cost.bytes + 3 * buffers + WRITING * matrix, calls, buffers)

    def covariance(self) -> Tensor:
        """Σ_ns x xᵀ, `[g,i,i]`."""
        p, c = self.patches, self.channels
        A = new_empty(self.z, p.groups, c, *p.kernel, c, *p.kernel)
        self._fill(A)
        self._take_beyond(A)
        return A.view(p.groups, c * p.taps, c * p.taps)

    def _fill(self, A: Tensor) -> None:
        """What all positions of the kernel together see, the same for all pairs of taps at one displacement."""
        axes = self.patches.axes
        blocks = A.movedim((1, 2 + len(axes)), (-2, -1))  # [g, *tap, *tap', c, c']
        for one in itertools.product(*(displacements(axis) for axis in axes)):
            mirrored = tuple(d.mirrored for d in one)
            if one > mirrored:
                continue
            block = self._correlation(one)
            for pairs in itertools.product(*(displacements(axis)[d] for axis, d in zip(axes, one, strict=True))):
                left, right = (tuple(ends) for ends in zip(*pairs, strict=True))
                blocks[(slice(None), *left, *right)] = block
                if one != mirrored:
                    blocks[(slice(None), *right, *left)] = block.mT

    def _correlation(self, one: Sequence[Displacement]) -> Tensor:
        """Σ_q z[g,c,q] z'[g,c',q + displacement]: `[g,c,c']`."""
        left, right = self._phase([d.phase for d in one]), self._phase([d.other for d in one])
        shift = sum(d.by * stride for d, stride in zip(one, self.strides, strict=True))
        return batched_times_transpose(self._from(left, max(0, -shift)), self._from(right, max(0, shift)))

    def _phase(self, phases: Sequence[int]) -> Tensor:
        """The buffer with the entries of a phase, and zeros behind its end for the furthest shift."""
        key = tuple(phases)
        if key not in self.buffers:
            buffer = self.z.new_zeros(self.z.shape[0] * self.z.shape[1] * math.prod(self.sizes) + self.furthest)
            steps = (slice(f, None, axis.stride) for f, axis in zip(phases, self.patches.axes, strict=True))
            entries = self.z[(slice(None), slice(None), *steps)].transpose(0, 1)
            grid = self._from(buffer, 0).view(self.z.shape[1], self.z.shape[0], *self.sizes)
            grid[(slice(None), slice(None), *(slice(size) for size in entries.shape[2:]))] = entries
            self.buffers[key] = buffer
        return self.buffers[key]

    def _from(self, buffer: Tensor, shift: int) -> Tensor:
        """[g, c, n·…] from an entry on: what a row lacks at its end is the next one's, and meets zeros there."""
        stop = shift + len(buffer) - self.furthest
        return buffer[shift:stop].view(self.patches.groups, self.channels, -1)

    def _take_beyond(self, A: Tensor) -> None:
        """Subtract what the kernel sees from positions that are no output pixels."""
        kinds, count = self.kinds, len(self.sizes)
        spans = [range(min(k.positions.start for k in kind), max(k.positions.stop for k in kind)) for kind in kinds]
        windows = self.patches.windows(self.z, spans)
        for cell in itertools.islice(itertools.product(*kinds), 1, None):
            positions = (
                slice(k.positions.start - s.start, k.positions.stop - s.start) for k, s in zip(cell, spans, strict=True)
            )
            taps = tuple(slice(k.taps.start, k.taps.stop) for k in cell)
            seen = windows[(slice(None), slice(None), *positions, *taps)]
            rows = seen.movedim((1, *range(2 + count, 2 + 2 * count)), tuple(range(1 + count)))
            rows = rows.reshape(self.patches.groups, -1, seen.shape[0] * seen.shape[2 : 2 + count].numel())
            block = A[(slice(None), slice(None), *taps, slice(None), *taps)]
            block -= batched_times_transpose(rows, rows).view_as(block)
