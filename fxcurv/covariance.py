"""Σ_ns x xᵀ over the patches of a convolution, by the way that costs least: all are equal up to rounding."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fxcurv.costs import Cost, copying, moment, rates_of
from fxcurv.gemm import batched_times_transpose
from fxcurv.meetings import Meetings
from fxcurv.patches import Patches
from fxcurv.rows import RowProducts

__all__ = ["WAYS", "Way", "cheapest"]


class Way(Protocol):
    """Σ_ns x xᵀ for the patches of one input `z[n, g·c, …]`; the cost reads its shape alone."""

    def __init__(self, patches: Patches, z: Tensor) -> None: ...

    def cost(self) -> Cost:
        """What `covariance` takes."""
        ...

    def covariance(self) -> Tensor:
        """Σ_ns x xᵀ, `[g,i,i]`."""
        ...


class Unfolding:
    """The product of the patches themselves."""

    def __init__(self, patches: Patches, z: Tensor) -> None:
        self.patches, self.z = patches, z

    def cost(self) -> Cost:
        """What `covariance` takes."""
        size, g, m = self.z.element_size(), self.patches.groups, len(self.z) * self.patches.pixels(self.z)
        d = self.z.shape[1] // g * self.patches.taps
        copies, products = copying(g * d * m, size) * (2 if g == 1 else 4), moment(d, m, size) * g
        return copies + products + Cost(calls=8, temporary=2 * size * g * d * m)

    def covariance(self) -> Tensor:
        """Σ_ns x xᵀ, `[g,i,i]`."""
        rows = self.patches.positions(self.z).permute(2, 3, 0, 1).flatten(2)  # [g, i, n·s]
        return batched_times_transpose(rows, rows)


WAYS: tuple[type[Way], ...] = (Unfolding, RowProducts, Meetings)


def cheapest(patches: Patches, z: Tensor) -> Way:
    """The way that takes least time for an input."""
    rates = rates_of(z.device, z.dtype)
    return min((way(patches, z) for way in WAYS), key=lambda way: way.cost().seconds(rates))
