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

    The default tolerance is `tolerance_of` the expected dtype.
    """
    if value.shape != expected.shape or not expected.numel():
        return value.shape == expected.shape
    relative = tolerance_of(expected.dtype) if tolerance is None else tolerance
    scale = max(float(expected.nan_to_num().abs().max()), floor)
    return torch.allclose(value, expected.to(value.dtype), rtol=0, atol=relative * scale, equal_nan=True)
