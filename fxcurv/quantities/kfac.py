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
from fxcurv.contractions.definitions import Diagonal as DiagonalOf
from fxcurv.contractions.definitions import Gram, InputCovariance, OutputCovariance
from fxcurv.contractions.statistic import Statistic
from fxcurv.quantities.factors import Factor, Sampled
from fxcurv.quantities.protocol import Sums, Used, WithOptions
from fxcurv.results.entry import Combine, Structure

__all__ = ["KFAC"]


@dataclass(frozen=True)
class KFAC(WithOptions):
    """G ⊗ A per weight (Martens & Grosse 2015; Grosse & Martens 2016; expand and reduce: Eschenhagen et al. 2023).

    expand: A = 1/(N·S_l) Σ_ns x xᵀ, G = Σ_vns S Sᵀ; reduce: A = 1/N Σ_n x̄ x̄ᵀ with x̄ = mean_s x, G = Σ_vn ŝ ŝᵀ with
    ŝ = Σ_s S. One pair per group of a grouped convolution; A ⊗ G for a weight that lies as `W[i,o]`. A bias has its
    exact dense block, or with `joint` the constant 1 is appended to x and weight and bias share one block over the rows
    `[W | b]`, or W with b below it. A scale has its exact dense block.
    """

    structure: ClassVar[Structure] = "block"
    combine: ClassVar[Combine] = "add"
    factor: Factor = Sampled(1)
    approx: Literal["expand", "reduce"] = "expand"
    joint: bool = False
    family: str = field(default="kfac", init=False, repr=False)

    def owner(self, used: Used) -> str:
        joined = self.joint and used.partner is not None and not used.matrix
        return str(used.partner) if joined else used.name

    def _joined(self, used: Used) -> bool:
        return self.joint and used.matrix and used.partner is not None

    def _form(self, used: Used) -> Literal["kronecker", "dense", "diagonal"]:
        return "kronecker" if used.matrix else "dense" if used.numel <= quantities.DENSE_LIMIT else "diagonal"

    def statistics(self, used: Used) -> dict[str, Statistic]:
        pooled = self.approx == "reduce"
        if self._form(used) == "kronecker":
            return {"A": InputCovariance(pooled, ones=self._joined(used)), "G": OutputCovariance(pooled)}
        return {"matrix": Gram()} if self._form(used) == "dense" else {"diagonal": DiagonalOf()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Block:
        if self._form(used) == "dense":
            return Dense(used.shape, used.laid_matrix(sums["matrix"]))
        if self._form(used) == "diagonal":
            return Diagonal(used.shape, used.laid(formed(sums["diagonal"])))
        positions = used.positions**2 if self.approx == "reduce" else used.positions
        A = sums["A"].div_(samples * positions) if isinstance(sums["A"], Tensor) else sums["A"] / (samples * positions)
        averaged = samples * (1 if self.approx == "reduce" else used.positions)
        return Kronecker(self._shape(used), A, sums["G"], averaged=averaged, inputs_first=used.inputs_first)

    def _shape(self, used: Used) -> tuple[int, ...]:
        """The block's: that of the parameter, or of a weight with its bias."""
        return used.joint_shape if self._joined(used) else used.shape

    def approximation(self, used: Used) -> str | None:
        return "diagonal" if self._form(used) == "diagonal" else None
