"""Quantities of the generalised Gauss-Newton matrix: diagonals, square roots, blocks, Gram matrices, Jacobians."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fxcurv import quantities
from fxcurv.blocks.base import Block
from fxcurv.blocks.dense import Dense
from fxcurv.blocks.lazy_gram import LazyGram, formed
from fxcurv.contractions.definitions import Columns, DiagonalPerSample, Gram
from fxcurv.contractions.definitions import SumOfSquares as DiagonalOf
from fxcurv.contractions.statistic import Statistic
from fxcurv.quantities.factors import Exact, Factor, Identity
from fxcurv.quantities.inner_products import products, stored_columns, stored_of
from fxcurv.quantities.protocol import EXACT, OfEach, ParameterUsage, Sums, WithOptions, columns_of, tensor_of
from fxcurv.results.entry import Combine, Structure

__all__ = ["BatchDiagGGN", "DiagGGN", "GGNBlock", "GGNGram", "Jacobian", "SqrtGGN"]


@dataclass(frozen=True)
class DiagGGN(WithOptions):
    """diag(G)[o,i] = Σ_vn (Σ_s S[v,n,s,o] x[n,s,i])², a tensor like the parameter (Schraudolph 2002; Dangel 2020)."""

    structure: ClassVar[Structure] = "diagonal"
    combine: ClassVar[Combine] = "add"
    factor: Factor = Exact()
    family: str = field(default="diag_ggn", init=False, repr=False)

    def owner(self, usage: ParameterUsage) -> str:
        return usage.name

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {"diagonal": DiagonalOf()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        return usage.to_layout(formed(sums["diagonal"]))

    def approximation(self, usage: ParameterUsage) -> str | None:
        return None


# GGN ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchDiagGGN(OfEach):
    """Σ_v (Σ_s S[v,n,s,o] x[n,s,i])²: each sample's part of the GGN's diagonal, `[N, *θ]`."""

    factor: Factor = EXACT
    family: str = field(default="batch_diag_ggn", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {"diagonal": DiagonalPerSample()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        return usage.to_layout(tensor_of(sums, "diagonal"), samples)


@dataclass(frozen=True)
class SqrtGGN(OfEach):
    """V[v,n,*θ] = J_nᵀ S_vn with Σ_vn V Vᵀ the GGN, `[V, N, *θ]`: its symmetric factor (Dangel et al. 2022, ViViT)."""

    factor: Factor = EXACT
    family: str = field(default="sqrt_ggn", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {"entries": Columns()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        return columns_of(sums, usage)


@dataclass(frozen=True)
class GGNBlock(OfEach):
    """Σ_vn J Jᵀ, J[v,n,o·i] = Σ_s S xᵀ: the GGN's block of each parameter, a `Dense`.

    While there are fewer columns J than entries, it stores a lazy Gram of them; the matrix is formed when read.
    """

    structure: ClassVar[Structure] = "block"
    combine: ClassVar[Combine] = "add"
    factor: Factor = EXACT
    family: str = field(default="ggn_block", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {"matrix": Gram()} if usage.numel <= quantities.DENSE_LIMIT else {"entries": Columns()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Block:
        if "matrix" in sums:
            return Dense(usage.shape, usage.matrix_to_layout(sums["matrix"]))
        return Dense(usage.shape, LazyGram((columns_of(sums, usage).flatten(2)[:, :, None, None, :],)))


@dataclass(frozen=True)
class GGNGram(OfEach):
    """K[(v,n),(w,m)] = ⟨J_vn, J_wm⟩, `[V·N, V·N]`: its nonzero eigenvalues are those of the GGN's block.

    The sum over parameters is the Gram matrix of the whole GGN (Dangel et al. 2022, ViViT); rows run over v, then n.
    """

    factor: Factor = EXACT
    family: str = field(default="ggn_gram", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return stored_columns(usage)

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        columns = stored_of(sums)
        return products(columns, columns).flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Jacobian(OfEach):
    """J[n,c,*θ] = ∂f(x_n)_c / ∂θ, `[N, C, *θ]`; c counts one sample's output entries. Independent of the loss."""

    factor: Factor = field(default=Identity(), init=False)
    family: str = field(default="jacobian", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {"entries": Columns()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        return columns_of(sums, usage).transpose(0, 1).contiguous()
