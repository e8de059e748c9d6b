"""Algorithms for covariances of inputs and outputs: from patches, pooled, or as lazy Grams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.contractions.entries import entries_of, per_sample, widened, with_ones
from fxcurv.contractions.statistic import Ss, Statistic, StatisticValue, Xs
from fxcurv.convolution.patches import Patches
from fxcurv.convolution.second_moment import second_moment
from fxcurv.linalg.cost import Cost, copying, moment

__all__ = ["CovarianceOfPatches", "KeptEntries", "KeptInputs", "KeptOutputs", "PooledPatches"]


# Inputs -----------------------------------------------------------------------------------------------------------


class _OfPatches(Statistic):
    """A sum over the patches of one convolution, with the constant 1 appended if `ones`."""

    reads = "x"

    def __init__(self, patches: Patches, ones: bool = False) -> None:
        super().__init__()
        self.patches, self.ones = patches, ones

    def extra_repr(self) -> str:
        return f"{self.patches}, ones={self.ones}"


class CovarianceOfPatches(_OfPatches):
    """`InputCovariance` of one convolution, from its input `z[n,c,…]`, by `algorithm` or the cheapest one."""

    def __init__(self, patches: Patches, ones: bool = False, algorithm: str | None = None) -> None:
        super().__init__(patches, ones)
        self.algorithm = algorithm

    def forward(self, zs: Sequence[Tensor]) -> Tensor:
        (z,) = map(widened, zs)
        A = second_moment(self.patches, z, self.algorithm).covariance()
        if not self.ones:
            return A
        sums = self.patches.sums(z.sum(0, keepdim=True))[0].unsqueeze(-1)  # [g,i,1]
        count = sums.new_full((1, 1, 1), len(z) * self.patches.pixels(z)).expand(len(A), 1, 1)
        return torch.cat([torch.cat([A, sums], 2), torch.cat([sums.mT, count], 2)], 1)

    def cost(self, zs: Sequence[Tensor]) -> Cost:
        return second_moment(self.patches, zs[0], self.algorithm).cost()


class PooledPatches(_OfPatches):
    """`InputCovariance(pooled=True)` of one convolution, from its input: sums over windows, no patches.

    It applies where every sample is one input of the convolution, not several (as with the frames of a film).
    """

    def forward(self, zs: Sequence[Tensor]) -> Tensor:
        (z,) = map(widened, zs)
        sums = self.patches.sums(z)
        if self.ones:
            positions = self.patches.pixels(z)
            sums = torch.cat([sums, sums.new_full((*sums.shape[:-1], 1), positions)], -1)
        rows = sums.transpose(0, 1)
        return rows.mT @ rows

    def cost(self, zs: Sequence[Tensor]) -> Cost:
        z, g = zs[0], self.patches.groups
        d = z.shape[1] // g * self.patches.taps
        return copying(z.numel() * self.patches.kernel[0] / 2, z.element_size()) + moment(d, len(z), 4) * g


class KeptInputs(Statistic):
    """`InputCovariance` of one use as a lazy Gram, from the input of a convolution or the positions `x[n,s,g,i]`."""

    reads = "x"
    grows = True

    def __init__(self, patches: Patches | None, ones: bool = False) -> None:
        super().__init__()
        self.patches, self.ones = patches, ones

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        (x,) = map(widened, xs)
        return with_ones(x) if self.ones else x.clone(memory_format=torch.contiguous_format)

    def sum_of(self, returned: Tensor) -> StatisticValue:
        return LazyGram((returned,), self.patches).smaller()

    def cost(self, xs: Sequence[Tensor]) -> Cost:
        return copying(xs[0].numel(), xs[0].element_size())

    def extra_repr(self) -> str:
        return f"{self.patches}, ones={self.ones}"


# Cotangents -------------------------------------------------------------------------------------------------------


class KeptOutputs(Statistic):
    """`OutputCovariance` of one use as a lazy Gram of positions S[v,n,s,g,o], or with `pooled` of their sums over s."""

    reads = "S"
    grows = True
    scales = True

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled

    def forward(self, Ss: Ss) -> Tensor:
        (S,) = Ss
        return S.sum(2, keepdim=True) if self.pooled else S.clone(memory_format=torch.contiguous_format)

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        return returned * scale.view(returned.shape[3:])

    def sum_of(self, returned: Tensor) -> StatisticValue:
        return LazyGram((returned,)).smaller()

    def cost(self, Ss: Ss) -> Cost:
        return copying(Ss[0].numel(), Ss[0].element_size())

    def extra_repr(self) -> str:
        return f"pooled={self.pooled}"


# Inputs and cotangents --------------------------------------------------------------------------------------------


class KeptEntries(Statistic):
    """`Gram` as a lazy Gram of the per-sample entries J[v,n,1,1,g·o·i]."""

    reads = "xS"
    grows = True
    scales = True

    def forward(self, xs: Xs, Ss: Ss) -> Tensor:
        return per_sample(xs, Ss).flatten(2)[:, :, None, None, :].contiguous()

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        return returned * scale.repeat_interleave(returned.shape[-1] // len(scale))

    def sum_of(self, returned: Tensor) -> StatisticValue:
        return LazyGram((returned,)).smaller()

    def cost(self, xs: Xs, Ss: Ss) -> Cost:
        rows, side = entries_of(xs, Ss)
        return copying(Ss[0].numel() + rows * side, Ss[0].element_size())
