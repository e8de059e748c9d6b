"""Averaging: the average of several models, each weighted by its curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fxcurv.core.errors import InputError
from fxcurv.linalg.conjugate_gradients import conjugate_gradients
from fxcurv.linalg.factorizations import damping_of
from fxcurv.linalg.operator import LinearOperator
from fxcurv.results.block_diagonal import BlockDiagonal

__all__ = ["weighted_average"]


def weighted_average(
    weights: Sequence[Mapping[str, Tensor]],
    curvatures: Sequence[LinearOperator],
    damping: float = 1e-6,
    steps: int = 500,
) -> dict[str, Tensor]:
    """θ = (Σ_m (B_m + δI))⁻¹ Σ_m (B_m + δI) θ_m, the minimum of Σ_m ½ (θ − θ_m)ᵀ(B_m + δI)(θ − θ_m).

    With diagonals this is Fisher-weighted averaging (Matena & Raffel 2022, eq. 5); multiply a B to weight its model.
    Large δ gives the plain average. The system is solved block by block if the sum has blocks, as for diagonal and
    dense ones. Otherwise, also for operators without blocks such as `fxcurv.ggn_operator`, it is solved by at most
    `steps` steps of conjugate gradients from the plain average. Raises an InputError (FXC440) unless every model has
    a curvature.
    """
    if not weights or len(weights) != len(curvatures):
        raise InputError(
            f"{len(weights)} models and {len(curvatures)} curvatures", remedy="give one for each", code="FXC440"
        )
    space, dtype, damping = curvatures[0].domain, curvatures[0].dtype, damping_of(damping)
    flat = [space.flat({name: w[name].detach() for name in space.shapes}).to(dtype) for w in weights]
    total: LinearOperator = curvatures[0]
    for B in curvatures[1:]:
        total = total + B
    right = sum((B.mv(w) + damping * w for B, w in zip(curvatures, flat, strict=True)), flat[0] * 0)
    shift = damping * len(flat)
    if isinstance(total, BlockDiagonal):
        solved = total.solve(right, shift)
    else:
        plain = sum(flat, flat[0] * 0) / len(flat)
        solved = conjugate_gradients(lambda v: total.mv(v) + shift * v, right, plain, steps)
    return {name: part.to(weights[0][name].dtype) for name, part in space.split(solved).items()}
