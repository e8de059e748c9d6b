"""Patches: where a convolution's weight meets its input, and what can be summed over the patches without forming them.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.costs import Cost, copying, moment, product, rates_of
from fxcurv.gemm import batched_times_transpose
from fxcurv.meetings import NOTHING, Meeting, Meetings
from fxcurv.pages import new_empty

__all__ = ["Patches"]


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


@dataclass(frozen=True)
class Axis:
    """The kernel along one axis."""

    size: int
    stride: int
    padding: int
    dilation: int

    @property
    def reach(self) -> int:
        """From the first tap to the last."""
        return self.dilation * (self.size - 1)

    def outputs(self, length: int) -> int:
        """Output pixels along an input of this length."""
        return (length + 2 * self.padding - self.reach - 1) // self.stride + 1

    def window(self, tap: int, length: int) -> slice:
        """The entries of the input that a tap meets, over all output pixels."""
        first = self.dilation * tap - self.padding
        start = first % self.stride if first < 0 else first
        stop = min(length, first + self.stride * (self.outputs(length) - 1) + 1)
        return slice(start, max(start, stop), self.stride)

    def meetings(self, length: int) -> list[list[Meeting]]:
        """What every pair of taps meets from the output pixels from which both see the input."""
        return [[self._meeting(a, b, length) for b in range(self.size)] for a in range(self.size)]

    def _meeting(self, a: int, b: int, length: int) -> Meeting:
        offsets = [self.dilation * tap - self.padding for tap in (a, b)]
        first = max(0, -(min(offsets) // self.stride))
        stop = min(self.outputs(length), (length - 1 - max(offsets)) // self.stride + 1)
        if stop <= first:
            return NOTHING
        left, right = (self.stride * first + offset for offset in offsets)
        return Meeting(left, right, stop - first, self.stride if stop - first > 1 else 1)

    @cached_property
    def displacements(self) -> dict[Displacement, list[tuple[int, int]]]:
        """The pairs of taps by what lies between the entries that they meet."""
        pairs: defaultdict[Displacement, list[tuple[int, int]]] = defaultdict(list)
        for a, b in itertools.product(range(self.size), repeat=2):
            (shift, phase), (shift2, phase2) = (
                divmod(self.dilation * tap - self.padding, self.stride) for tap in (a, b)
            )
            pairs[Displacement(phase, phase2, shift2 - shift)].append((a, b))
        return dict(pairs)

    def beyond(self, length: int) -> list[Beyond]:
        """The positions before and behind the output pixels from which the kernel still sees some of the input."""
        first, end = -((self.reach - self.padding) // self.stride), (length - 1 + self.padding) // self.stride + 1
        outside = (p for p in range(first, end) if not 0 <= p < self.outputs(length))
        seen = [Beyond(range(p, p + 1), self._seen(p, length)) for p in outside]
        return [beyond for beyond in seen if beyond.taps]

    def _seen(self, position: int, length: int) -> range:
        """The taps that meet an entry of the input from a position."""
        start = self.stride * position - self.padding
        first = max(0, -(start // self.dilation))
        return range(first, max(first, min(self.size, (length - 1 - start) // self.dilation + 1)))


@dataclass(frozen=True)
class Patches:
    """The patches of a convolution over inputs `z[n, g·c, …]`."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, op: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Patches:
        """The patches that an op of the vocabulary, which pads with zeros alone, sees."""
        padding = tuple(int(p) for p in op.padding)
        return cls(tuple(op.kernel_size), tuple(op.stride), padding, tuple(op.dilation), op.groups)

    @property  # not cached: torch.compile reads no locks
    def axes(self) -> tuple[Axis, ...]:
        return tuple(itertools.starmap(Axis, zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)))

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def outputs(self, z: Tensor) -> tuple[int, ...]:
        """The output pixels along each axis."""
        return tuple(axis.outputs(length) for axis, length in zip(self.axes, z.shape[2:], strict=True))

    def positions(self, z: Tensor) -> Tensor:
        """x[n,s,g,i], what the kernel sees at output pixel s, as in `weight.flatten(1)`; in memory [n,g,i,s]."""
        count, windows = len(self.axes), self.windows(z, [range(size) for size in self.outputs(z)])
        windows = windows.movedim(tuple(range(2, 2 + count)), tuple(range(2 + count, 2 + 2 * count)))
        return windows.reshape(len(z), self.groups, -1, windows.shape[2 + count :].numel()).permute(0, 3, 1, 2)

    def windows(self, z: Tensor, positions: Sequence[range]) -> Tensor:
        """What the kernel sees from these positions along each axis: a view `[n, g·c, *positions, *taps]`."""
        count = len(positions)
        for k, (axis, met) in enumerate(zip(self.axes, positions, strict=True)):
            before = axis.padding - axis.stride * met.start
            behind = axis.stride * (met.stop - 1) - axis.padding + axis.reach + 1 - z.shape[k + 2]
            z = F.pad(z, [0] * 2 * (count - 1 - k) + [before, behind])
        for k, axis in enumerate(self.axes):  # appends one axis of window entries
            z = z.unfold(k + 2, axis.reach + 1, axis.stride)[..., :: axis.dilation]
        return z

    def sums(self, z: Tensor) -> Tensor:
        """Σ_s x[n,s,g,i], by windows of the input: `[n,g,i]`."""
        for k, axis in enumerate(self.axes):
            windows = [axis.window(tap, z.shape[2]) for tap in range(axis.size)]
            z = torch.stack([z[:, :, window].sum(2) for window in windows], 2 + k if z.ndim == 3 else -1)
        return z.reshape(z.shape[0], self.groups, -1)

    def covariance(self, z: Tensor) -> Tensor:
        """Σ_ns x xᵀ, `[g,i,i]`, the cheapest way."""
        return self._way(z).covariance(self, z)

    def cost(self, z: Tensor) -> Cost:
        """What `covariance` takes."""
        return self._way(z).cost(self, z)

    def _way(self, z: Tensor) -> Way:
        rates = rates_of(z.device, z.dtype)
        return min(WAYS, key=lambda way: way.cost(self, z).seconds(rates))

    def unfolded(self, z: Tensor) -> Tensor:
        """Σ_ns x xᵀ from the patches themselves: `[g,i,i]`."""
        rows = self.positions(z).permute(2, 3, 0, 1).flatten(2)  # [g, i, n·s]
        return batched_times_transpose(rows, rows)

    def unfolding_cost(self, z: Tensor) -> Cost:
        g, d, m, size = *self._sides(z), z.element_size()
        return copying(g * d * m, size) * 2 + moment(d, m, size) * g + Cost(calls=8, temporary=2 * size * g * d * m)

    def correlated(self, z: Tensor) -> Tensor:
        """Σ_ns x xᵀ as correlations of the input with itself, one per displacement: `[g,i,i]`."""
        return _Correlations(self, z).covariance()

    def correlation_cost(self, z: Tensor) -> Cost:
        (g, d, _), size, correlations = self._sides(z), z.element_size(), _Correlations(self, z)
        c, entries = d // self.taps, len(z) * math.prod(correlations.sizes)
        displacements = math.prod(len(axis.displacements) for axis in self.axes)
        cost = product(c, c, entries, size) * (g * (displacements + 1) / 2)
        for cell in itertools.islice(itertools.product(*correlations.kinds), 1, None):
            side = c * math.prod(len(k.taps) for k in cell)
            seen = len(z) * math.prod(len(k.positions) for k in cell)
            cost += (product(side, side, seen, size) + copying(side * (side + seen), size) + Cost(calls=3)) * g
        buffers = size * g * c * entries * math.prod(self.stride)
        calls = 4 * math.prod(self.stride) + self.taps**2 + displacements
        return Cost(cost.flops, cost.bytes + 3 * buffers + WRITING * size * g * d * d, cost.calls + calls, buffers)

    def met(self, z: Tensor) -> Tensor:
        """Σ_ns x xᵀ of what pairs of taps meet, every different sum once: `[g,i,i]`."""
        return self._meetings(z).covariance()

    def meeting_cost(self, z: Tensor) -> Cost:
        return self._meetings(z).cost()

    def _meetings(self, z: Tensor) -> Meetings:
        tables = [axis.meetings(length) for axis, length in zip(self.axes, z.shape[2:], strict=True)]
        return Meetings(tables, self.groups, z)

    def _sides(self, z: Tensor) -> tuple[int, int, int]:
        """(g, i, n·s)."""
        return self.groups, z.shape[1] // self.groups * self.taps, len(z) * math.prod(self.outputs(z))


WRITING = 8
"""Passes over the matrix that its writing costs, block by block at strides."""


class _Correlations:
    """Correlations of one batch.

    The entries of a phase are laid out channel by channel, as `[g, c, n·row·…]` with enough zeros behind every row that
    a displacement is a shift of the whole: one product of two views sums over all entries of all samples.
    """

    def __init__(self, patches: Patches, z: Tensor) -> None:
        self.patches, self.z = patches, z
        self.channels = z.shape[1] // patches.groups
        gaps = [max(abs(d.by) for d in axis.displacements) for axis in patches.axes]
        lengths = [-(-length // axis.stride) for axis, length in zip(patches.axes, z.shape[2:], strict=True)]
        self.sizes = [length + gap for length, gap in zip(lengths, gaps, strict=True)]
        self.strides = [math.prod(self.sizes[k + 1 :]) for k in range(len(self.sizes))]
        self.furthest = sum(gap * stride for gap, stride in zip(gaps, self.strides, strict=True))
        self.kinds = [
            [Beyond(range(axis.outputs(length)), range(axis.size)), *axis.beyond(length)]
            for axis, length in zip(patches.axes, z.shape[2:], strict=True)
        ]
        self.buffers: dict[tuple[int, ...], Tensor] = {}

    def covariance(self) -> Tensor:
        p, c = self.patches, self.channels
        A = new_empty(self.z, p.groups, c, *p.kernel, c, *p.kernel)
        self._fill(A)
        self._take_beyond(A)
        return A.view(p.groups, c * p.taps, c * p.taps)

    def _fill(self, A: Tensor) -> None:
        """What all positions of the kernel together see, the same for all pairs of taps at one displacement."""
        axes = self.patches.axes
        blocks = A.movedim((1, 2 + len(axes)), (-2, -1))  # [g, *tap, *tap', c, c']
        for displacements in itertools.product(*(axis.displacements for axis in axes)):
            mirrored = tuple(d.mirrored for d in displacements)
            if displacements > mirrored:
                continue
            block = self._correlation(displacements)
            for pairs in itertools.product(
                *(axis.displacements[d] for axis, d in zip(axes, displacements, strict=True))
            ):
                left, right = (tuple(ends) for ends in zip(*pairs, strict=True))
                blocks[(slice(None), *left, *right)] = block
                if displacements != mirrored:
                    blocks[(slice(None), *right, *left)] = block.mT

    def _correlation(self, displacements: Sequence[Displacement]) -> Tensor:
        """Σ_q z[g,c,q] z'[g,c',q + displacement]: `[g,c,c']`."""
        left, right = self._phase([d.phase for d in displacements]), self._phase([d.other for d in displacements])
        shift = sum(d.by * stride for d, stride in zip(displacements, self.strides, strict=True))
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


class Way(NamedTuple):
    """A way to Σ_ns x xᵀ, and what it takes."""

    cost: Callable[[Patches, Tensor], Cost]
    covariance: Callable[[Patches, Tensor], Tensor]


WAYS = (
    Way(Patches.unfolding_cost, Patches.unfolded),
    Way(Patches.correlation_cost, Patches.correlated),
    Way(Patches.meeting_cost, Patches.met),
)
