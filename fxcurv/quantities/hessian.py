"""The diagonal of the loss Hessian."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fxcurv.contractions.definitions import DiagonalPerSample, HessianDiagonal
from fxcurv.contractions.definitions import SumOfSquares as DiagonalOf
from fxcurv.contractions.statistic import Statistic
from fxcurv.quantities.factors import Exact, Factor
from fxcurv.quantities.protocol import OfEach, ParameterUsage, Sums, tensor_of
from fxcurv.results.entry import Combine, Structure

__all__ = ["DiagHessian"]


# Hessian ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiagHessian(OfEach):
    """diag ∂²loss/∂θ², a tensor like the parameter, or with `per_sample` each sample's part of it, `[N, *θ]`.

    Not a Gauss-Newton: where the network is nonlinear in the parameter, entries may be negative (Dangel et al. 2020).
    Where it is piecewise linear in the parameter, as in a layer followed by ReLUs and other layers, the diagonal equals
    the GGN's, and is computed as such. Scaled as the loss is.
    """

    per_sample: bool = False
    factor: Factor = field(default=Exact(), init=False)

    @property
    def structure(self) -> Structure:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A diagonal, or with `per_sample` an array."""
        return "array" if self.per_sample else "diagonal"

    @property
    def combine(self) -> Combine:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How batches combine: they add, unless samples are kept separate."""
        return "refuse" if self.per_sample else "add"

    @property
    def family(self) -> str:
        return "batch_diag_hessian" if self.per_sample else "diag_hessian"

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        if usage.nonlinear:
            return {"hessian": HessianDiagonal(self.per_sample)}
        return {"hessian": DiagonalPerSample() if self.per_sample else DiagonalOf()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        lead = (samples,) if self.per_sample else ()
        diagonal = tensor_of(sums, "hessian")
        return diagonal.reshape(*lead, *usage.shape) if usage.nonlinear else usage.to_layout(diagonal, *lead)
