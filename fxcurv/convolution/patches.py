"""Patches of a convolution's input, formed as windows, and their sums without forming them."""

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
        """Distance from the first tap to the last."""
        return self.dilation * (self.size - 1)

    def outputs(self, length: int) -> int:
        """Number of output pixels along an input of this length."""
        return (length + 2 * self.padding - self.reach - 1) // self.stride + 1

    def behind(self, length: int) -> int:
        """Entries of padding seen after an input of this length; negative for unseen entries of the input."""
        return self.stride * (self.outputs(length) - 1) - self.padding + self.reach + 1 - length

    def window(self, tap: int, length: int) -> slice:
        """The entries of the input that a tap sees, over all output pixels."""
        first = self.dilation * tap - self.padding
        start = first % self.stride if first < 0 else first
        stop = min(length, first + self.stride * (self.outputs(length) - 1) + 1)
        return slice(start, max(start, stop), self.stride)


def margins(axes: Sequence[Axis], lengths: Sequence[int]) -> list[int]:
    """The padding before and after each axis that the kernel sees, in `F.pad`'s order: the last axis first."""
    seen = ((axis.padding, axis.behind(length)) for axis, length in zip(axes, lengths, strict=True))
    return [*itertools.chain(*reversed(list(seen)))]


def unfolded(padded: Tensor, axes: Sequence[Axis], first: int) -> Tensor:
    """Unfold the axes from `first` on into output pixels, with one axis appended for the taps of each: a view."""
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
        """The patches of a convolution of the op vocabulary, which pads with zeros only."""
        padding = tuple(int(p) for p in op.padding)
        return cls(tuple(op.kernel_size), tuple(op.stride), padding, tuple(op.dilation), op.groups)

    @property  # not cached: torch.compile reads no locks
    def axes(self) -> tuple[Axis, ...]:
        return tuple(itertools.starmap(Axis, zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)))

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def outputs(self, z: Tensor) -> tuple[int, ...]:
        """Number of output pixels along each axis."""
        return tuple(axis.outputs(length) for axis, length in zip(self.axes, z.shape[2:], strict=True))

    def pixels(self, z: Tensor) -> int:
        """Number of output pixels of one input."""
        return math.prod(self.outputs(z))

    def positions(self, z: Tensor) -> Tensor:
        """Patches x[n,s,g,i] at each output pixel s, in the order of `weight.flatten(1)`; in memory [n,g,i,s]."""
        count, windows = len(self.axes), self._windows(z)
        windows = windows.movedim(tuple(range(2, 2 + count)), tuple(range(2 + count, 2 + 2 * count)))
        return windows.reshape(len(z), self.groups, -1, windows.shape[2 + count :].numel()).permute(0, 3, 1, 2)

    def _windows(self, z: Tensor) -> Tensor:
        """Windows of the kernel: a view `[n, g·c, *pixels, *taps]` of the padded input."""
        return unfolded(F.pad(z, margins(self.axes, z.shape[2:])), self.axes, 2)

    def sums(self, z: Tensor) -> Tensor:
        """Σ_s x[n,s,g,i], by windows of the input: `[n,g,i]`."""
        for k, axis in enumerate(self.axes):
            windows = [axis.window(tap, z.shape[2]) for tap in range(axis.size)]
            z = torch.stack([z[:, :, window].sum(2) for window in windows], 2 + k if z.ndim == 3 else -1)
        return z.reshape(z.shape[0], self.groups, -1)
