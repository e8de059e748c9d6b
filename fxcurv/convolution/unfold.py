"""Σ_ns x xᵀ as the product of the patches."""

from __future__ import annotations

from torch import Tensor

from fxcurv.convolution.patches import Patches
from fxcurv.linalg.cost import Cost, copying, moment
from fxcurv.linalg.matmul import batched_times_transpose

__all__ = ["Unfolding"]


class Unfolding:
    """The product of the patches."""

    def __init__(self, patches: Patches, z: Tensor) -> None:
        self.patches, self.z = patches, z

    def cost(self) -> Cost:
        """Cost of `covariance`."""
        size, g, m = self.z.element_size(), self.patches.groups, len(self.z) * self.patches.pixels(self.z)
        d = self.z.shape[1] // g * self.patches.taps
        copies, products = copying(g * d * m, size) * (2 if g == 1 else 4), moment(d, m, size) * g
        return copies + products + Cost(calls=8, temporary=2 * size * g * d * m)

    def covariance(self) -> Tensor:
        """Σ_ns x xᵀ, `[g,i,i]`."""
        rows = self.patches.positions(self.z).permute(2, 3, 0, 1).flatten(2)  # [g, i, n·s]
        return batched_times_transpose(rows, rows)
