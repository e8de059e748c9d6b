"""Quantities of gradients: their sum, single samples' gradients, and their norms, products and moments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fxcurv.blocks.lazy_gram import formed
from fxcurv.contractions.definitions import Columns, Gradient, SquaredNorms
from fxcurv.contractions.definitions import SumOfSquares as DiagonalOf
from fxcurv.contractions.statistic import Statistic
from fxcurv.quantities.factors import Factor, LossGradient
from fxcurv.quantities.inner_products import products, stored_columns, stored_of
from fxcurv.quantities.protocol import OfEach, ParameterUsage, Sums, WithOptions, columns_of, tensor_of
from fxcurv.results.entry import Combine, Structure

__all__ = ["BatchDot", "BatchGrad", "BatchL2", "Grad", "SumGradSquared", "Variance"]


@dataclass(frozen=True)
class Grad(WithOptions):
    """∇loss[o,i] = Σ_ns S[n,s,o] x[n,s,i] with S = ∂loss/∂output backpropagated; a tensor of the parameter's shape."""

    structure: ClassVar[Structure] = "vector"
    combine: ClassVar[Combine] = "add"
    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="grad", init=False, repr=False)

    def owner(self, usage: ParameterUsage) -> str:
        return usage.name

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {"gradient": Gradient()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        return usage.to_layout(formed(sums["gradient"]))

    def approximation(self, usage: ParameterUsage) -> str | None:
        return None


# Single samples' gradients ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchGrad(OfEach):
    """g_n = Σ_s S[n,s,o] x[n,s,i] with S = ∂loss/∂output backpropagated: `[N, *θ]`; their sum is the gradient."""

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="batch_grad", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {"entries": Columns(usage.in_out)}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        return columns_of(sums, usage)[0]


@dataclass(frozen=True)
class BatchL2(OfEach):
    """‖g_n‖²: `[N]`; for weights Σ_st (x_ns x_nt)(S_ns S_nt) where that is cheaper than g_n (Goodfellow 2015)."""

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="batch_l2", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {"norms": SquaredNorms()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        return tensor_of(sums, "norms")


@dataclass(frozen=True)
class BatchDot(OfEach):
    """⟨g_n, g_m⟩: `[N, N]`; for weights Σ_st (x_ns x_mt)(S_ns S_mt) where that is cheaper than g (Dangel 2020)."""

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="batch_dot", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return stored_columns(usage)

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        columns = stored_of(sums)
        return products(columns, columns)[0, :, 0]


@dataclass(frozen=True)
class SumGradSquared(OfEach):
    """Σ_n g_n², a tensor like the parameter (Dangel 2020: the gradients' second moment)."""

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="sum_grad_squared", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {"diagonal": DiagonalOf()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        return usage.to_layout(tensor_of(sums, "diagonal"))


@dataclass(frozen=True)
class Variance(OfEach):
    """1/N Σ_n g_n² - (1/N Σ_n g_n)², a tensor like the parameter, as in BackPACK: g_n is scaled as the loss is.

    For reduction "mean" it is N² times smaller than the variance of the gradients of the samples' own losses. Values
    that are negative by rounding are set to zero.
    """

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="variance", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {"gradient": Gradient(), "diagonal": DiagonalOf()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        squares, mean = tensor_of(sums, "diagonal") / samples, tensor_of(sums, "gradient") / samples
        return usage.to_layout((squares - mean.view_as(squares).square()).clamp_(min=0))
