"""Tolerances of a comparison of graph and model.

They are relative: outputs to the largest entry of the output, all gradients together to their norm, the gradient of one
parameter to its own norm, plus a share of the norm of all. Both computations are correct to rounding, in a different
order, so that the tolerance is a property of the model's conditioning. `tools/guard.py` measures it on real models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Tolerance", "different_parameters", "different_samples", "tolerance_for"]


@dataclass(frozen=True)
class Tolerance:
    """Relative errors up to which outputs, all gradients, and the gradient of one parameter are equal."""

    output: float
    gradients: float
    parameter: float


_TOLERANCES = {
    torch.float64: Tolerance(1e-7, 1e-7, 1e-5),
    torch.float32: Tolerance(1e-4, 1e-4, 1e-2),
    torch.float16: Tolerance(2e-2, 3e-2, math.inf),
    torch.bfloat16: Tolerance(1e-1, 1e-1, math.inf),
}
"""Half precision does not resolve the gradients of single parameters: these are compared in float32."""


def tolerance_for(dtype: torch.dtype) -> Tolerance:
    """Return the tolerance of a model that computes in a dtype."""
    return _TOLERANCES.get(dtype, _TOLERANCES[torch.float32])


def different_samples(found: Tensor, expected: Tensor, tolerance: float) -> list[int]:
    """Return the samples (indices along axis 0) whose entries differ; NaN equals NaN, and an infinity itself."""
    if found.shape != expected.shape:
        return list(range(len(expected)))
    expected, found = expected.double(), found.double()
    finite = expected.isfinite()
    scale = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    same = torch.isclose(found, expected, rtol=0.0, atol=tolerance * scale, equal_nan=True)
    return [n for n, equal in enumerate(same.flatten(1).all(1) if same.ndim > 1 else same) if not bool(equal)]


def different_parameters(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], tolerance: Tolerance
) -> list[str]:
    """Return the parameters whose gradients differ, the largest difference first; None stands for zero.

    If only the gradient as a whole differs, it is the parameters with the largest share of the difference.
    """
    whole = math.sqrt(sum(_norm(g) ** 2 for g in expected.values()))
    errors = {name: _distance(found.get(name), g) for name, g in expected.items()}
    allowed = {n: tolerance.parameter * _norm(g) + tolerance.gradients * whole for n, g in expected.items()}
    wrong = [name for name, error in errors.items() if not error <= allowed[name]]
    total = math.sqrt(sum(error**2 for error in errors.values()))
    if not wrong and not total <= tolerance.gradients * whole:
        wrong = [name for name, error in errors.items() if error > 0.3 * total]
    return sorted(wrong, key=lambda name: errors[name], reverse=True)


def _norm(t: Tensor | None) -> float:
    """Return the norm of the finite entries."""
    return 0.0 if t is None else float(torch.linalg.vector_norm(t[t.isfinite()].double()))


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    """Return the norm of a difference, without entries that are infinite or NaN in both."""
    if a is None or b is None:
        return _norm(b if a is None else a)
    if a.shape != b.shape:
        return math.inf
    compared = a.isfinite() | b.isfinite()
    return float(torch.linalg.vector_norm((a.double() - b.double())[compared]))
