"""Algorithms for Σ_ns x xᵀ over the patches of a convolution, equal up to rounding, and the choice among them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fxcurv.convolution.lag_correlation import LagCorrelations
from fxcurv.convolution.patches import Patches
from fxcurv.convolution.row_products import RowProducts
from fxcurv.convolution.unfold import Unfolding
from fxcurv.linalg.cost import Cost, rates_of

__all__ = ["ALGORITHMS", "Algorithm", "second_moment"]


class Algorithm(Protocol):
    """Σ_ns x xᵀ for the patches of one input `z[n, g·c, …]`; the cost depends on its shape alone."""

    def __init__(self, patches: Patches, z: Tensor) -> None: ...

    def cost(self) -> Cost:
        """Cost of `covariance`."""
        ...

    def covariance(self) -> Tensor:
        """Σ_ns x xᵀ, `[g,i,i]`."""
        ...


ALGORITHMS: dict[str, type[Algorithm]] = {
    "unfold": Unfolding,
    "row_products": RowProducts,
    "lag_correlation": LagCorrelations,
}


def second_moment(patches: Patches, z: Tensor, algorithm: str | None = None) -> Algorithm:
    """The algorithm of that name for an input `z`, by default the one with the lowest estimated time."""
    if algorithm is not None:
        return ALGORITHMS[algorithm](patches, z)
    rates = rates_of(z.device, z.dtype)
    return min((kind(patches, z) for kind in ALGORITHMS.values()), key=lambda one: one.cost().seconds(rates))
