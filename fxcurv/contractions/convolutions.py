"""Algorithms for a convolution's weight that form no patches: per-sample entries as torch's weight gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxcurv.contractions.definitions import Columns, DiagonalPerSample, SquaredNorms, SumOfSquares
from fxcurv.contractions.entries import CHUNK, PerOutput, SquaredEntries, widened
from fxcurv.contractions.statistic import Ss, Statistic, Xs
from fxcurv.convolution.patches import Patches
from fxcurv.linalg.allocation import new_empty
from fxcurv.linalg.cost import Cost, copying, product

__all__ = [
    "ColumnsByConvolution",
    "ColumnsBySample",
    "DiagonalByConvolution",
    "DiagonalPerSampleByConvolution",
    "GradientOfConvolution",
    "SquaredNormsByConvolution",
]


class ColumnsBySample(Statistic):
    """`Columns` for one use of a convolution's weight, from its input `z[n,c,…]`: the patches of one sample at a time.

    It applies where every sample is one input of the convolution.
    """

    reads = "xS"
    samples, columns, grows = 1, 0, True

    def __init__(self, patches: Patches) -> None:
        super().__init__()
        self.patches = patches

    def empty(self, zs: Sequence[Tensor], Ss: Ss) -> Tensor:
        """Allocate the result."""
        (z,), (S,) = zs, Ss
        return new_empty(S, *S.shape[:2], *S.shape[3:], z.shape[1] // self.patches.groups * self.patches.taps)

    def forward(self, zs: Sequence[Tensor], Ss: Ss) -> Tensor:
        (z,), (S,), J = map(widened, zs), Ss, self.empty(zs, Ss)
        v, n, groups, _, _ = J.shape
        for a in range(n):
            x = self.patches.positions(z[a : a + 1])[0]  # [s,g,i]
            for c, g in itertools.product(range(v), range(groups)):
                torch.mm(S[c, a, :, g].mT, x[:, g], out=J[c, a, g])
        return J

    def cost(self, zs: Sequence[Tensor], Ss: Ss) -> Cost:
        (S,), i = Ss, self.empty(zs, Ss).shape[-1]
        (v, n, s, g, o), size = S.shape, S.element_size()
        patches = copying(s * g * i, size) + Cost(calls=8)
        return (patches + product(o, i, s, size) * (v * g)) * n + Cost(temporary=2 * size * g * s * i)

    def extra_repr(self) -> str:
        return f"{self.patches}"


class GradientOfConvolution(PerOutput):
    """`Gradient` of one convolution's weight, from its input `z[n,c,…]` and S[v,n,o,…]: autograd's own kernel."""

    power = 1

    def __init__(self, op: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.op = op

    def forward(self, zs: Sequence[Tensor], Ss: Ss) -> Tensor:
        (z,), (S,), op = map(widened, zs), map(widened, Ss), self.op
        weight = S.new_empty(()).expand(op.weight.shape)  # read for its shape only
        geometry = (op.stride, op.padding, op.dilation, False, (0,) * (z.ndim - 2), op.groups)
        S = S[0] if len(S) == 1 else S.sum(0)
        gradient = torch.ops.aten.convolution_backward(S, z, weight, None, *geometry, (False, True, False))[1]
        return gradient.unflatten(0, (op.groups, -1)).flatten(2)

    def cost(self, zs: Sequence[Tensor], Ss: Ss) -> Cost:
        z, S, op = zs[0], Ss[0], self.op
        inputs = z.shape[1] // op.groups * torch.Size(op.kernel_size).numel()
        return (
            copying(S.numel() + z.numel(), S.element_size())
            + product(S.shape[2] // op.groups, inputs, S[0, :, 0].numel(), S.element_size()) * op.groups
        )

    def extra_repr(self) -> str:
        return self.op.extra_repr()


class _ByConvolution(Statistic):
    """A statistic of the per-sample entries of one convolution, from its input `z[n,c,…]` and S[v,n,o,…].

    The entries are the weight gradients of one convolution with a group per sample and the outputs of all columns; no
    patch is formed. It applies where every sample is one input of the convolution.
    """

    def __init__(self, op: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.op = op

    def entries(self, xs: Xs, Ss: Ss) -> Tensor:
        """J[v,n,g,o,i]."""
        (z,), (S,), op = xs, Ss, self.op
        assert z is not None
        z, S, (v, n) = widened(z), widened(S), S.shape[:2]
        outputs = S.unflatten(2, (op.groups, -1)).permute(1, 2, 0, 3, *range(4, S.ndim + 1))  # [n,g,v,o,…]
        weight = S.new_empty(()).expand(n * v * S.shape[2], *op.weight.shape[1:])  # read for its shape only
        geometry = (op.stride, op.padding, op.dilation, False, (0,) * (z.ndim - 2), n * op.groups)
        arguments = outputs.flatten(0, 3).unsqueeze(0), z.flatten(0, 1).unsqueeze(0), weight, None
        gradient = torch.ops.aten.convolution_backward(*arguments, *geometry, (False, True, False))[1]
        return gradient.view(n, op.groups, v, S.shape[2] // op.groups, -1).permute(2, 0, 1, 3, 4)

    def size(self) -> int:
        """Number of entries per sample and column."""
        return self.op.weight.numel()

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        (z,), (S,), op = xs, Ss, self.op
        assert z is not None
        (v, n, o), size, s = S.shape[:3], S.element_size(), S[0, 0, 0].numel()
        inputs = self.size() // o
        flops, calls = _slowness(op, v, size) * 2 * v * n * o * inputs * s, n * op.groups if size > 4 else 0
        return (
            Cost(flops, size * WRITTEN * v * n * o * inputs, 8 + calls)  # torch's own kernel loops over the groups
            + copying(S.numel() + z.numel(), size)
            + Cost(temporary=self._temporary(z, S))
        )

    def _temporary(self, z: Tensor, S: Tensor) -> float:
        """Bytes of copies of both sides, also in the kernel's layout, and of a chunk of entries and their squares."""
        v, n = S.shape[:2]
        chunk = 2 * min(v * n * self.size(), max(CHUNK, self.size()))
        return S.element_size() * (2 * S.numel() + 2 * z.numel() + chunk)

    def extra_repr(self) -> str:
        return self.op.extra_repr()


WRITTEN = 16
"""Cost of writing the entries, in passes over them: a kernel first writes them by blocks of channels."""


def _slowness(op: nn.Conv1d | nn.Conv2d | nn.Conv3d, columns: int, size: int) -> float:
    """Slowdown of a weight gradient relative to a large matrix product: larger for few channels and taps.

    oneDNN's single-precision kernels have a separate algorithm for one input and one output, which is fast for few
    taps.
    """
    inputs, outputs, wide = op.in_channels // op.groups, columns * op.out_channels // op.groups, max(op.kernel_size) > 3
    if inputs == outputs == 1 and size <= 4:
        return 72 if wide else 18
    channels = inputs * (4 if wide and outputs > 1 else 1)
    return 12 / math.sqrt(channels) if size > 4 else max(2.5, 40 / channels)


class ColumnsByConvolution(_ByConvolution, Columns):
    """`Columns` of one convolution's weight, without patches."""

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        return self.entries(xs, Ss).contiguous()

    def _temporary(self, z: Tensor, S: Tensor) -> float:
        v, n = S.shape[:2]
        return S.element_size() * (2 * S.numel() + 2 * z.numel() + 2 * v * n * self.size())


class _SquaresByConvolution(_ByConvolution, SquaredEntries):
    """Squared entries of one convolution, in chunks."""

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        return self.total(self.entries, (xs, Ss), self.size())


class DiagonalByConvolution(_SquaresByConvolution, SumOfSquares):
    """`Diagonal` of one convolution's weight, without patches."""


class DiagonalPerSampleByConvolution(_SquaresByConvolution, DiagonalPerSample):
    """`DiagonalPerSample` of one convolution's weight, without patches."""


class SquaredNormsByConvolution(_SquaresByConvolution, SquaredNorms):
    """`SquaredNorms` of one convolution's weight, without patches."""
