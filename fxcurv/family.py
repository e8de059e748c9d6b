"""The family: quantities of single samples, square roots, blocks and Gram matrices of the GGN, input covariances.

Each is a factor × statistics, as those of quantities.py. Scaling is that of the loss: with reduction "mean", the
gradient of sample n is that of its summand of the mean, ∂(ℓ_n/N)/∂θ, as in BackPACK; exact columns hold √ω.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fxcurv.blocks import Block, Dense, Diagonal
from fxcurv.contractions import (
    Columns,
    DiagonalPerSample,
    Gradient,
    Gram,
    HessianDiagonal,
    Recursive,
    SquaredNorms,
    Statistic,
)
from fxcurv.contractions import Diagonal as DiagonalOf
from fxcurv.moments import SecondMoment
from fxcurv.pairs import kept, kept_of, products
from fxcurv.quantities import DENSE_LIMIT, KFAC, Exact, Factor, Identity, LossGradient, Sums, Used, WithOptions

__all__ = [
    "APART",
    "FOOF",
    "KFRA",
    "BatchDiagGGN",
    "BatchDot",
    "BatchGrad",
    "BatchL2",
    "DiagHessian",
    "GGNBlock",
    "GGNGram",
    "Jacobian",
    "OfEach",
    "SqrtGGN",
    "SumGradSquared",
    "Variance",
]


EXACT = Exact()

APART = (
    *("BatchGrad(", "BatchL2(", "BatchDot(", "BatchDiagGGN(", "SqrtGGN(", "GGNGram(", "Jacobian("),
    *("DiagHessian(per_sample=True", "SumGradSquared(", "Variance(", "EKFAC(", "KFRA(", "FOOF("),
)
"""The definitions that keep samples apart, or are no sums over the terms of the loss: two batches do not add up."""


@dataclass(frozen=True)
class OfEach(WithOptions):
    """A quantity of each parameter by itself, always equal to its definition."""

    def owner(self, used: Used) -> str:
        return used.name

    def approximation(self, used: Used) -> str | None:
        return None


# Of single samples' gradients ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchGrad(OfEach):
    """g_n = Σ_s S[n,s,o] x[n,s,i] with S = ∂loss/∂output pulled back: `[N, *θ]`; their sum is the gradient."""

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="batch_grad", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return {"entries": Columns(used.inputs_first)}

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        return _columns(sums, used)[0]


@dataclass(frozen=True)
class BatchL2(OfEach):
    """‖g_n‖²: `[N]`; for weights Σ_st (x_ns x_nt)(S_ns S_nt) where that is cheaper than g_n (Goodfellow 2015)."""

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="batch_l2", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return {"norms": SquaredNorms()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        return _tensor(sums, "norms")


@dataclass(frozen=True)
class BatchDot(OfEach):
    """⟨g_n, g_m⟩: `[N, N]`; for weights Σ_st (x_ns x_mt)(S_ns S_mt) where that is cheaper than g (Dangel 2020)."""

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="batch_dot", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return kept(used)

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        columns = kept_of(sums)
        return products(columns, columns)[0, :, 0]


@dataclass(frozen=True)
class SumGradSquared(OfEach):
    """Σ_n g_n², a tensor like the parameter (Dangel 2020: the gradients' second moment)."""

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="sum_grad_squared", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return {"diagonal": DiagonalOf()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        return used.laid(_tensor(sums, "diagonal"))


@dataclass(frozen=True)
class Variance(OfEach):
    """1/N Σ_n g_n² - (1/N Σ_n g_n)², a tensor like the parameter, as BackPACK's: g_n is scaled as the loss is.

    For reduction "mean" these are N² times smaller than the variance of the gradients of the samples' own losses.
    Where rounding would make it negative it is zero.
    """

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="variance", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return {"gradient": Gradient(), "diagonal": DiagonalOf()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        squares, mean = _tensor(sums, "diagonal") / samples, _tensor(sums, "gradient") / samples
        return used.laid((squares - mean.view_as(squares).square()).clamp_(min=0))


# Of the GGN ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchDiagGGN(OfEach):
    """Σ_v (Σ_s S[v,n,s,o] x[n,s,i])²: each sample's part of the GGN's diagonal, `[N, *θ]`."""

    factor: Factor = EXACT
    family: str = field(default="batch_diag_ggn", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return {"diagonal": DiagonalPerSample()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        return used.laid(_tensor(sums, "diagonal"), samples)


@dataclass(frozen=True)
class SqrtGGN(OfEach):
    """V[v,n,*θ] = J_nᵀ S_vn with Σ_vn V Vᵀ the GGN, `[V, N, *θ]`: its symmetric factor (Dangel et al. 2022, ViViT)."""

    factor: Factor = EXACT
    family: str = field(default="sqrt_ggn", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return {"entries": Columns()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        return _columns(sums, used)


@dataclass(frozen=True)
class GGNBlock(OfEach):
    """Σ_vn J Jᵀ, J[v,n,o·i] = Σ_s S xᵀ: the GGN's block of each parameter, a `Dense`.

    While the columns J are fewer than entries, they are kept in the place of the matrix, which is formed when read.
    """

    factor: Factor = EXACT
    family: str = field(default="ggn_block", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return {"matrix": Gram()} if used.numel <= DENSE_LIMIT else {"entries": Columns()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Block:
        if "matrix" in sums:
            return Dense(used.shape, used.laid_matrix(sums["matrix"]))
        return Dense(used.shape, SecondMoment((_columns(sums, used).flatten(2)[:, :, None, None, :],)))


@dataclass(frozen=True)
class GGNGram(OfEach):
    """K[(v,n),(w,m)] = ⟨J_vn, J_wm⟩, `[V·N, V·N]`: its eigenvalues are those of the GGN's block, but for zeros.

    Summed over parameters it belongs to the whole GGN (Dangel et al. 2022, ViViT); rows run over columns v, then n.
    """

    factor: Factor = EXACT
    family: str = field(default="ggn_gram", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return kept(used)

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        columns = kept_of(sums)
        return products(columns, columns).flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Jacobian(OfEach):
    """J[n,c,*θ] = ∂f(x_n)_c / ∂θ, `[N, C, *θ]`; c counts the entries of one sample's output. The loss plays no part."""

    factor: Factor = field(default=Identity(), init=False)
    family: str = field(default="jacobian", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return {"entries": Columns()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        return _columns(sums, used).transpose(0, 1).contiguous()


# Of the Hessian -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiagHessian(OfEach):
    """diag ∂²loss/∂θ², a tensor like the parameter, or with `per_sample` that of each sample's part, `[N, *θ]`.

    Not a Gauss-Newton: where the network bends, entries may be negative (Dangel et al. 2020). Where it does not bend in
    a parameter, as behind a layer that ReLUs and other layers follow, the diagonal is that of the GGN, and is computed
    so. Scaled as the loss is.
    """

    per_sample: bool = False
    factor: Factor = field(default=Exact(), init=False)

    @property
    def family(self) -> str:
        return "batch_diag_hessian" if self.per_sample else "diag_hessian"

    def statistics(self, used: Used) -> dict[str, Statistic]:
        if used.bends:
            return {"hessian": HessianDiagonal(self.per_sample)}
        return {"hessian": DiagonalPerSample() if self.per_sample else DiagonalOf()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        lead = (samples,) if self.per_sample else ()
        diagonal = _tensor(sums, "hessian")
        return diagonal.reshape(*lead, *used.shape) if used.bends else used.laid(diagonal, *lead)


# Of the inputs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FOOF(KFAC):
    """I ⊗ A per weight, A of the inputs as KFAC's, by `approx` and `joint` (Benzing 2022): the loss plays no part.

    A parameter that is no weight of a linear layer or convolution sees the constant 1: its block is the identity.
    Weights alone, or with `joint` those with their biases, take a forward pass only.
    """

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="foof", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        found = super().statistics(used)
        return {"A": found["A"]} if "A" in found else {"gradient": Gradient()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Block:
        if "A" not in sums:
            return Diagonal(used.shape, torch.ones_like(_tensor(sums, "gradient")).reshape(used.shape))
        A = sums["A"]
        identity = torch.eye(used.outputs).to(A.kept[0] if isinstance(A, SecondMoment) else A)
        return super().finish(used, {"A": A, "G": identity.expand(A.shape[0], -1, -1)}, samples)

    def approximation(self, used: Used) -> str | None:
        return None


@dataclass(frozen=True)
class KFRA(KFAC):
    """G ⊗ A per weight, A as KFAC's, G by a recursion that averages over the batch (Botev et al. 2017).

    G(f) = Σ_n ∂²loss/∂f_n², G(v) = 1/N Σ_n J_nᵀ G(u) J_n with u the first node that all paths from v to the output
    pass, J_n = ∂u_n/∂v_n: in sequential networks the next one. A weight has the sum of G over positions s = t, a bias
    and any other parameter the block of all of G; several uses of a parameter count as independent. For small networks:
    it holds G, with a side of all entries of one sample. Not by autograd: `fallback` is refused.
    """

    factor: Factor = field(default=EXACT, init=False)
    approx: Literal["expand", "reduce"] = field(default="expand", init=False, repr=False)
    family: str = field(default="kfra", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        found = super().statistics(used)
        if "A" in found:
            return {"A": found["A"], "G": Recursive("kronecker")}
        return {"matrix": Recursive("dense")} if "matrix" in found else {"diagonal": Recursive("diagonal")}


def _tensor(sums: Sums, name: str) -> Tensor:
    t = sums[name]
    assert isinstance(t, Tensor)
    return t


def _columns(sums: Sums, used: Used) -> Tensor:
    """`[V, N, *θ]`."""
    entries = _tensor(sums, "entries")
    return used.laid(entries, *entries.shape[:2])
