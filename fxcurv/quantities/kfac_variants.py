"""Variants of KFAC: FOOF, from the inputs alone, and KFRA, by a recursion over averages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from fxcurv.blocks.base import Block
from fxcurv.blocks.diagonal import Diagonal
from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.contractions.definitions import Gradient, Recursive
from fxcurv.contractions.statistic import Statistic
from fxcurv.quantities.factors import Factor, LossGradient
from fxcurv.quantities.kfac import KFAC
from fxcurv.quantities.protocol import EXACT, ParameterUsage, Sums, tensor_of
from fxcurv.results.entry import Combine, Structure

__all__ = ["FOOF", "KFRA"]


# Inputs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FOOF(KFAC):
    """I ⊗ A per weight, A of the inputs as in KFAC, by `approx` and `joint` (Benzing 2022): independent of the loss.

    Parameters other than weights of linear layers and convolutions get the identity, since their input is the constant
    1. Weights alone, or with `joint` weights with their biases, need a forward pass only.
    """

    structure: ClassVar[Structure] = "block"
    combine: ClassVar[Combine] = "refuse"
    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="foof", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        found = super().statistics(usage)
        return {"A": found["A"]} if "A" in found else {"gradient": Gradient()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Block:
        if "A" not in sums:
            return Diagonal(usage.shape, torch.ones_like(tensor_of(sums, "gradient")).reshape(usage.shape))
        A = sums["A"]
        identity = torch.eye(usage.outputs).to(A.vectors[0] if isinstance(A, LazyGram) else A)
        return super().finish(usage, {"A": A, "G": identity.expand(A.shape[0], -1, -1)}, samples)

    def approximation(self, usage: ParameterUsage) -> str | None:
        return None


@dataclass(frozen=True)
class KFRA(KFAC):
    """G ⊗ A per weight, A as in KFAC, G by a recursion that averages over the batch (Botev et al. 2017).

    G(f) = Σ_n ∂²loss/∂f_n², G(v) = 1/N Σ_n J_nᵀ G(u) J_n with u the first node on all paths from v to the output, J_n =
    ∂u_n/∂v_n: in sequential networks the next one. A weight has the sum of G over positions s = t, a bias and any other
    parameter the block of all of G; several uses of a parameter count as independent. For small networks: it stores G,
    whose side is the number of entries of one sample. `fallback` to autograd is an error.
    """

    structure: ClassVar[Structure] = "block"
    combine: ClassVar[Combine] = "refuse"
    factor: Factor = field(default=EXACT, init=False)
    approx: Literal["expand", "reduce"] = field(default="expand", init=False, repr=False)
    family: str = field(default="kfra", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        found = super().statistics(usage)
        if "A" in found:
            return {"A": found["A"], "G": Recursive("kronecker")}
        return {"matrix": Recursive("dense")} if "matrix" in found else {"diagonal": Recursive("diagonal")}
