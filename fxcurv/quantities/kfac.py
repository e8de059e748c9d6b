"""KFAC: Kronecker factors of the GGN."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fxcurv import quantities
from fxcurv.blocks.base import Block
from fxcurv.blocks.dense import Dense
from fxcurv.blocks.diagonal import Diagonal
from fxcurv.blocks.kronecker import Kronecker
from fxcurv.blocks.lazy_gram import formed
from fxcurv.contractions.definitions import Gram, InputCovariance, OutputCovariance
from fxcurv.contractions.definitions import SumOfSquares as DiagonalOf
from fxcurv.contractions.statistic import Statistic
from fxcurv.quantities.factors import Factor, Sampled
from fxcurv.quantities.protocol import ParameterUsage, Sums, WithOptions
from fxcurv.results.entry import Combine, Structure

__all__ = ["KFAC"]


@dataclass(frozen=True)
class KFAC(WithOptions):
    """G ⊗ A per weight (Martens & Grosse 2015; Grosse & Martens 2016; expand and reduce: Eschenhagen et al. 2023).

    expand: A = 1/(N·S_l) Σ_ns x xᵀ, G = Σ_vns S Sᵀ; reduce: A = 1/N Σ_n x̄ x̄ᵀ with x̄ = mean_s x, G = Σ_vn ŝ ŝᵀ with
    ŝ = Σ_s S. One pair per group of a grouped convolution; A ⊗ G for a weight stored as `W[i,o]`. A bias has its exact
    dense block, or with `joint` the constant 1 is appended to x and weight and bias share one block over the rows
    `[W | b]`, or W with b below it. A scale has its exact dense block.
    """

    structure: ClassVar[Structure] = "block"
    combine: ClassVar[Combine] = "add"
    factor: Factor = Sampled(1)
    approx: Literal["expand", "reduce"] = "expand"
    joint: bool = False
    family: str = field(default="kfac", init=False, repr=False)

    def owner(self, usage: ParameterUsage) -> str:
        joined = self.joint and usage.partner is not None and not usage.matrix
        return str(usage.partner) if joined else usage.name

    def _joined(self, usage: ParameterUsage) -> bool:
        return self.joint and usage.matrix and usage.partner is not None

    def _form(self, usage: ParameterUsage) -> Literal["kronecker", "dense", "diagonal"]:
        return "kronecker" if usage.matrix else "dense" if usage.numel <= quantities.DENSE_LIMIT else "diagonal"

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        pooled = self.approx == "reduce"
        if self._form(usage) == "kronecker":
            return {"A": InputCovariance(pooled, ones=self._joined(usage)), "G": OutputCovariance(pooled)}
        return {"matrix": Gram()} if self._form(usage) == "dense" else {"diagonal": DiagonalOf()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Block:
        if self._form(usage) == "dense":
            return Dense(usage.shape, usage.matrix_to_layout(sums["matrix"]))
        if self._form(usage) == "diagonal":
            return Diagonal(usage.shape, usage.to_layout(formed(sums["diagonal"])))
        positions = usage.positions**2 if self.approx == "reduce" else usage.positions
        A = sums["A"].div_(samples * positions) if isinstance(sums["A"], Tensor) else sums["A"] / (samples * positions)
        averaged = samples * (1 if self.approx == "reduce" else usage.positions)
        return Kronecker(self._shape(usage), A, sums["G"], averaged=averaged, in_out=usage.in_out)

    def _shape(self, usage: ParameterUsage) -> tuple[int, ...]:
        """Shape of the block: the parameter's, or that of a weight with its bias."""
        return usage.joint_shape if self._joined(usage) else usage.shape

    def approximation(self, usage: ParameterUsage) -> str | None:
        return "diagonal" if self._form(usage) == "diagonal" else None
