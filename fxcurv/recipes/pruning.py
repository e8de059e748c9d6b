"""Pruning: saliencies of weights, masks, and the update of the remaining weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxcurv.core.errors import InputError
from fxcurv.linalg.conjugate_gradients import conjugate_gradients
from fxcurv.linalg.factorizations import damping_of
from fxcurv.linalg.operator import LinearOperator
from fxcurv.results.block_diagonal import BlockDiagonal

__all__ = ["compensated", "masks", "saliencies"]


Weights = Mapping[str, Tensor]


def saliencies(curvature: BlockDiagonal, weights: Weights) -> dict[str, Tensor]:
    """½ B_ii w_i², the increase of the loss when w_i becomes 0 (LeCun et al. 1990, Optimal brain damage, eq. 5)."""
    diagonal = curvature.diag()
    return {name: diagonal[name].to(w) * w.detach().square() / 2 for name, w in weights.items()}


def masks(scores: Weights, sparsity: float) -> dict[str, Tensor]:
    """Masks, False for the share `sparsity` of lowest scores over all tensors together, True for the rest.

    Raises an InputError (FXC440) for a share that is not from 0 to 1.
    """
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity={sparsity!r}", remedy="give a share from 0 to 1", code="FXC440")
    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[flat.argsort(stable=True)[: round(sparsity * len(flat))]] = False
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def compensated(
    curvature: LinearOperator, weights: Weights, kept: Weights, damping: float = 1e-4, steps: int = 200
) -> dict[str, Tensor]:
    """Set the weights where `kept` is False to zero, and move the others to the minimum of the quadratic.

    The update d minimizes ½ dᵀ(B + δI)d with d = −w for removed weights (Hassibi & Stork 1993, Optimal brain surgeon,
    eq. 5, for many weights at once). It is solved by conjugate gradients, so B may be any operator. `weights` are all
    its parameters; parameters without a mask stay free.
    """
    space, damping = curvature.domain, damping_of(damping)
    w = space.flat({name: p.detach() for name, p in weights.items()}).to(curvature.dtype)
    free = space.flat({name: kept.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in weights.items()})

    def product(d: Tensor) -> Tensor:
        return free * (curvature.mv(d) + damping * d)

    right = free * curvature.mv(w * ~free)
    moved = free * w + conjugate_gradients(product, right, torch.zeros_like(w), steps)
    return {name: part.to(weights[name].dtype) for name, part in space.split(moved).items()}
