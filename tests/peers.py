"""Libraries that compute some of the same, if they are installed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from comparison import TOLERANCE
from torch import Tensor

__all__ = ["assert_close", "peer"]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal to `TOLERANCE` of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))


def peer(name: str) -> Any:
    """The library, or skip; its own warnings on import are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)
