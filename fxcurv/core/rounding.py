"""The definition of «equal up to rounding»."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["close", "tolerance_of"]


def tolerance_of(dtype: torch.dtype) -> float:
    """eps^(2/3): the relative rounding error allowed for a computation of a few operators."""
    return torch.finfo(dtype).eps ** (2 / 3)


def close(value: Tensor, expected: Tensor, tolerance: float | None = None, floor: float = 0.0) -> bool:
    """Whether max |value - expected| ≤ tolerance · max(max |expected|, floor); NaN equals NaN.

    The default tolerance is `tolerance_of` the expected dtype. Values of two dtypes are compared in the wider one.
    Integers and booleans must be equal.
    """
    if not any(t.is_floating_point() or t.is_complex() for t in (value, expected)):
        return torch.equal(value, expected)
    if value.shape != expected.shape or not expected.numel():
        return value.shape == expected.shape
    relative = tolerance_of(expected.dtype) if tolerance is None else tolerance
    scale = max(float(expected.nan_to_num().abs().max()), floor)
    wider = torch.promote_types(value.dtype, expected.dtype)
    return torch.allclose(value.to(wider), expected.to(wider), rtol=0, atol=relative * scale, equal_nan=True)
