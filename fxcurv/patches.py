"""Patches: where a convolution's weight meets its input, formed as windows; and their sums, without forming them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Axis", "Patches"]


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

    def pixels(self, z: Tensor) -> int:
        """The output pixels of one input."""
        return math.prod(self.outputs(z))

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
