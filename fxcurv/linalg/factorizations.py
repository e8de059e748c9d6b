"""Factorisations of positive semi-definite matrices, with errors that name the matrix and the cause."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxcurv.core.errors import FxcurvError, InputError

__all__ = ["cholesky", "damping_of", "decomposed", "rank", "singular", "without_rounding"]


JITTERS = (0.0, 1.0, 10.0, 100.0)
"""Shifts to try in turn where rounding makes a damped matrix indefinite, in units of its rounding error."""


def damping_of(damping: float) -> float:
    """A damping δ as a number, in the units of the curvature; an InputError if it is not finite or is negative."""
    try:
        value = float(damping)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"the damping is {damping!r}", remedy="give a finite number, 0 or above", code="FXC421")
    return value


def singular(what: str, rank: int, side: int) -> FxcurvError:
    """The error for a singular matrix."""
    return FxcurvError(f"{what} is singular: its rank is {rank} of {side}", remedy="give damping > 0", code="FXC420")


def rank(values: Tensor, side: int) -> int:
    """The minimum rank of matrices with eigenvalues `[g,r]`: the number above rounding, side · eps · the largest."""
    return int((without_rounding(values, side) > 0).sum(-1).min()) if values.shape[-1] else 0


def without_rounding(values: Tensor, side: int) -> Tensor:
    """Set values `[g,r]` of at most side · eps · the largest, which are 0 to rounding, to zero."""
    if values.shape[-1] == 0:
        return values
    bound = side * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True).clamp(min=0)
    return torch.where(values > bound, values, 0)


def decomposed(
    decompose: Callable[[Tensor], tuple[Tensor, Tensor]], matrix: Tensor, what: str
) -> tuple[Tensor, Tensor]:
    """Apply `decompose` to a matrix, again in float64 if it does not converge; then raise an error."""
    for attempt in (matrix, matrix.double()):
        try:
            values, vectors = decompose(attempt)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            continue
        if bool(values.isfinite().all()):
            return values.to(matrix.dtype), vectors.to(matrix.dtype)
    raise FxcurvError(
        f"{what} has no eigenvalues: it holds NaN or infinity, or they do not converge",
        remedy="check the parameters of the model and the data",
        code="FXC420",
    )


def cholesky(matrix: Tensor, damping: Tensor | float, what: str) -> Tensor:
    """The lower Cholesky factors of `matrix[g,d,d]` + damping · I, `damping` one number or `[g]`.

    If it fails, it is tried again in float64, and for damping > 0 with `JITTERS` times the rounding error of the
    matrix, eps · max diag, on the diagonal. `what` names a singular or indefinite matrix in the error.
    """
    shift = torch.as_tensor(damping, dtype=matrix.dtype, device=matrix.device).reshape(-1, 1).expand(len(matrix), 1)
    undamped, side = not bool((shift > 0).all()), matrix.shape[-1]
    L, info = torch.linalg.cholesky_ex(_shifted(matrix, shift))
    rounding = torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    for jitter in JITTERS[: 1 if undamped else None]:
        if not bool(info.any()):
            break
        L, info = torch.linalg.cholesky_ex(_shifted(matrix.double(), (shift + jitter * rounding).double()))
    if bool(info.any()) or not bool(L.isfinite().all()):
        if undamped and bool(matrix.isfinite().all()):
            raise singular(what, rank(torch.linalg.eigvalsh(matrix.double()).to(matrix.dtype), side), side)
        raise FxcurvError(
            f"{what} is not positive definite, even in float64",
            remedy="give more damping, and check that it is finite",
            code="FXC420",
        )
    pivots = L.diagonal(dim1=-2, dim2=-1).square()
    if undamped and bool((pivots <= side * rounding).any()):
        raise singular(what, rank(pivots.to(matrix.dtype), side), side)
    return L.to(matrix.dtype)


def _shifted(matrix: Tensor, shift: Tensor) -> Tensor:
    """Return matrix + shift · I, in its own memory."""
    matrix = matrix.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(shift)
    return matrix
