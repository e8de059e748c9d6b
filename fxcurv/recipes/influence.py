"""Influence: the effect of a training sample on the loss of a test sample."""

from __future__ import annotations

from torch import Tensor

from fxcurv.api import Compiled
from fxcurv.core.errors import InputError
from fxcurv.frontend.inputs import Inputs
from fxcurv.recipes.samples import gradients
from fxcurv.results.curvature import Curvature

__all__ = ["influence"]


Data = tuple[Inputs, Tensor]


def influence(compiled: Compiled, result: Curvature, train: Data, test: Data, damping: float) -> Tensor:
    """Increase of the loss of each test sample when a training sample is left out, `[tests, trains]`.

    ∇ℓ_tᵀ (D (B + δI))⁻¹ ∇ℓ_i, to first order in the sample's weight (Koh & Liang 2017, eq. 2; with Kronecker factors
    Grosse et al. 2023). `result` is the result of `compiled` on all the training data, with one quantity, B. D is the
    divisor of "mean", 1 for "sum". δ is at least the weight decay of the training. `train` and `test` are inputs and
    targets. Their per-sample gradients `[N, P]` are formed: choose batch sizes for which these fit in memory.
    Only parameters for which the quantity is requested may change. Raises an InputError (FXC440) for several
    quantities.
    """
    if len(result) != 1 or result.divisor is None:
        raise InputError(f"an influence by {', '.join(result)}", remedy="give a result of one quantity", code="FXC440")
    (quantity,) = result
    curvature = result.operator(quantity)
    names = curvature.domain.shapes
    removed, asked = (gradients(compiled, names, x, y).to(curvature.dtype) for x, y in (train, test))
    moved = curvature.inverse(damping).mm(removed.T) / float(result.divisor)
    return asked @ moved
