"""Σ_ns x xᵀ over the patches of a convolution, by the cheapest algorithm: all are equal up to rounding."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fxcurv.convolution.lag_correlation import LagCorrelations
from fxcurv.convolution.patches import Patches
from fxcurv.convolution.row_products import RowProducts
from fxcurv.convolution.unfold import Unfolding
from fxcurv.linalg.cost import Cost, rates_of

__all__ = ["WAYS", "Algorithm", "cheapest"]


class Algorithm(Protocol):
    """Σ_ns x xᵀ for the patches of one input `z[n, g·c, …]`; the cost depends on its shape alone."""

    def __init__(self, patches: Patches, z: Tensor) -> None: ...

    def cost(self) -> Cost:
        """Cost of `covariance`."""
        ...

    def covariance(self) -> Tensor:
        """Σ_ns x xᵀ, `[g,i,i]`."""
        ...


WAYS: tuple[type[Algorithm], ...] = (Unfolding, RowProducts, LagCorrelations)


def cheapest(patches: Patches, z: Tensor) -> Algorithm:
    """Return the fastest algorithm for an input."""
    rates = rates_of(z.device, z.dtype)
    return min((way(patches, z) for way in WAYS), key=lambda way: way.cost().seconds(rates))
