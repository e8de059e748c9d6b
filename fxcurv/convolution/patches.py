"""Patches: where a convolution's weight meets its input, formed as windows; and their sums, without forming them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Axis", "Patches", "margins", "unfolded"]


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

    def behind(self, length: int) -> int:
        """Entries of padding that the kernel sees behind an input of this length; negative for those it never sees."""
        return self.stride * (self.outputs(length) - 1) - self.padding + self.reach + 1 - length

    def window(self, tap: int, length: int) -> slice:
        """The entries of the input that a tap meets, over all output pixels."""
        first = self.dilation * tap - self.padding
        start = first % self.stride if first < 0 else first
        stop = min(length, first + self.stride * (self.outputs(length) - 1) + 1)
        return slice(start, max(start, stop), self.stride)


def margins(axes: Sequence[Axis], lengths: Sequence[int]) -> list[int]:
    """The padding before and behind each axis that the kernel sees, in `F.pad`'s order: the last axis first."""
    seen = ((axis.padding, axis.behind(length)) for axis, length in zip(axes, lengths, strict=True))
    return [*itertools.chain(*reversed(list(seen)))]


def unfolded(padded: Tensor, axes: Sequence[Axis], first: int) -> Tensor:
    """The axes from `first` on as output pixels; what their taps see is appended, one axis for each: a view."""
    for k, axis in enumerate(axes, first):
        padded = padded.unfold(k, axis.reach + 1, axis.stride)[..., :: axis.dilation]
    return padded


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
        count, windows = len(self.axes), self._windows(z)
        windows = windows.movedim(tuple(range(2, 2 + count)), tuple(range(2 + count, 2 + 2 * count)))
        return windows.reshape(len(z), self.groups, -1, windows.shape[2 + count :].numel()).permute(0, 3, 1, 2)

    def _windows(self, z: Tensor) -> Tensor:
        """What the kernel sees: a view `[n, g·c, *pixels, *taps]` of the padded input."""
        return unfolded(F.pad(z, margins(self.axes, z.shape[2:])), self.axes, 2)

    def sums(self, z: Tensor) -> Tensor:
        """Σ_s x[n,s,g,i], by windows of the input: `[n,g,i]`."""
        for k, axis in enumerate(self.axes):
            windows = [axis.window(tap, z.shape[2]) for tap in range(axis.size)]
            z = torch.stack([z[:, :, window].sum(2) for window in windows], 2 + k if z.ndim == 3 else -1)
        return z.reshape(z.shape[0], self.groups, -1)
