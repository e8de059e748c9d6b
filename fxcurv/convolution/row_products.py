"""Σ_ns x xᵀ from products of the rows of a convolution's input with one another: for few channels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.convolution.patches import Patches, margins, unfolded
from fxcurv.linalg.allocation import new_empty
from fxcurv.linalg.cost import Cost, copying, of_groups, product

__all__ = ["RowProducts"]


BATCHED = 2.5
"""Slowdown of small matrix products, one per group, relative to a large one."""


SCATTERED = 30
"""Slowdown of adding strided entries relative to a matrix product."""


WRITING = 8
"""Cost of writing the matrix with strides, in passes over it."""


class RowProducts:
    """Products of the rows of one batch: a row is one entry along the first axis, over all other axes.

    Two taps of the first axis see pairs of rows. The sum of these rows' products, P[c,x,c',x'], contains the sums for
    all taps of the other axes: along each axis, sums over x and x' with a common shift. Rows in the padding are
    skipped; pairs of taps at one distance share most of their rows.
    """

    def __init__(self, patches: Patches, z: Tensor) -> None:
        (self.axis, *self.others), self.length, self.z = patches.axes, z.shape[2], z
        self.patches, self.channels = patches, z.shape[1] // patches.groups

    def cost(self) -> Cost:
        """Cost of `covariance`."""
        z, g, c, size, axis = self.z, self.patches.groups, self.channels, self.z.element_size(), self.axis
        side, pairs = z[0, :, 0].numel() // g, axis.size * (axis.size + 1) // 2
        summed = (c * math.prod(other.size for other in self.others)) ** 2 * math.prod(self.patches.outputs(z)[1:])
        products = of_groups(product(side, side, len(z) * (z.shape[2] + axis.reach // 2), size), g) * axis.size
        passes = copying(z.numel(), size) + copying(g * side**2, size) * (2 * pairs)
        return Cost(
            BATCHED * products.flops + 2 * SCATTERED * pairs * g * summed,
            products.bytes + passes.bytes + WRITING * size * g * (c * self.patches.taps) ** 2,
            products.calls + pairs * (10 + 8 * len(self.others)),
            size * (z.numel() + 4 * g * side**2),
        )

    @cached_property
    def phases(self) -> list[Tensor]:
        """The rows of each phase, `[g, r, n, c·…]`."""
        rows = self.z.unflatten(1, (self.patches.groups, -1)).movedim((1, 3), (0, 1))  # [g, r, n, c, …]
        phases = (rows[:, phase :: self.axis.stride] for phase in range(self.axis.stride))
        return [phase.reshape(*phase.shape[:3], -1).contiguous() for phase in phases]

    def covariance(self) -> Tensor:
        """Σ_ns x xᵀ, `[g,i,i]`."""
        p, c, count = self.patches, self.channels, len(self.others)
        A = new_empty(self.z, p.groups, c, *p.kernel, c, *p.kernel)
        blocks, across = A.movedim(3 + count, 2), (slice(None),) * count  # [g, c, c', *tap, *tap']
        for distance in range(self.axis.size):
            for tap, products in self._products(distance):
                seen = self._seen(products)
                blocks[(slice(None),) * 3 + (tap, *across, tap + distance)] = seen
                if distance:
                    left, right = range(3, 3 + count), range(3 + count, 3 + 2 * count)
                    blocks[(slice(None),) * 3 + (tap + distance, *across, tap)] = seen.permute(0, 2, 1, *right, *left)
        return A.view(p.groups, c * p.taps, c * p.taps)

    def _products(self, distance: int) -> Iterator[tuple[int, Tensor]]:
        """Yield each tap with Σ_n of the products of all its rows with rows at a distance: `[g, c·x, c·x]`."""
        met: defaultdict[int, dict[int, range]] = defaultdict(dict)
        for tap in range(self.axis.size - distance):
            phase, rows = self._met(tap, distance)
            met[phase][tap] = rows
        for phase, taps in met.items():
            common = range(max(rows.start for rows in taps.values()), min(rows.stop for rows in taps.values()))
            shared = torch.bmm(*self._factors(phase, common, distance))
            for tap, rows in taps.items():
                products = shared
                parts = (range(rows.start, common.start), range(common.stop, rows.stop)) if common else (rows,)
                for part in filter(len, parts):
                    products = torch.baddbmm(products, *self._factors(phase, part, distance))
                yield tap, products

    def _met(self, tap: int, distance: int) -> tuple[int, range]:
        """The phase of a tap, and its rows for which a tap at a distance also sees rows of the input."""
        axis, shift = self.axis, self.axis.dilation * distance
        own, other = axis.window(tap, self.length), axis.window(tap + distance, self.length)
        start, stop = max(own.start, other.start - shift), min(own.stop, other.stop - shift)
        phase = own.start % axis.stride
        first, end = ((bound - phase + axis.stride - 1) // axis.stride for bound in (start, stop))
        return phase, range(first, max(first, end))

    def _factors(self, phase: int, rows: range, distance: int) -> tuple[Tensor, Tensor]:
        """Rows of a phase and rows at a distance, as factors of a sum over them: `[g, c·x, m], [g, m, c·x]`."""
        shift, other = divmod(phase + self.axis.dilation * distance, self.axis.stride)
        left = self.phases[phase][:, rows.start : rows.start + len(rows)]
        right = self.phases[other][:, rows.start + shift : rows.start + shift + len(rows)]
        return left.flatten(1, 2).mT, right.flatten(1, 2)

    def _seen(self, products: Tensor) -> Tensor:
        """Sum P[g, c·x, c'·x'] over output pixels per pair of taps of the other axes: `[g, c, c', *tap, *tap']`."""
        count, lengths = len(self.others), self.z.shape[3:]
        P = products.view(-1, *(self.channels, *lengths) * 2)
        if not count:
            return P
        padding = margins(self.others, lengths)
        P = F.pad(P, [*padding, 0, 0, *padding])
        for first in (2, 3 + count):
            P = unfolded(P, self.others, first)
        for k in range(count):  # x and x' of one output pixel
            P = P.diagonal(0, 2, 3 + count - k)
        return P.sum(tuple(range(-count, 0)))
