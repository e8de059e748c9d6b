"""Comparison of values with their references, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcurv.core.errors import InputError
from fxcurv.core.rounding import close
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import batch_size

__all__ = ["Pair", "assert_agree", "halves_of", "largest_of", "normal", "seeded"]


@dataclass(frozen=True)
class Pair:
    """A value and its reference; where the reference is smaller than `floor`, errors are relative to `floor`."""

    name: str
    found: Tensor
    expected: Tensor
    floor: float = 0.0

    def agrees(self, tolerance: float | None = None) -> bool:
        return self.found.dtype == self.expected.dtype and close(self.found, self.expected, tolerance, self.floor)

    @property
    def error(self) -> float:
        """The largest difference relative to the reference's largest entry; infinite for another shape or dtype."""
        if (self.found.shape, self.found.dtype) != (self.expected.shape, self.expected.dtype):
            return math.inf
        found, expected = (t.double() for t in (self.found, self.expected))
        scale = max(float(expected.abs().max()), self.floor)
        difference = float((found - expected).abs().max())
        return difference / scale if scale else math.inf if difference else 0.0

    @property
    def problem(self) -> str:
        """A shape or dtype that differs; empty if both are equal."""
        if self.found.shape != self.expected.shape:
            return f"has shape {list(self.found.shape)}, not {list(self.expected.shape)}"
        if self.found.dtype != self.expected.dtype:
            return f"has dtype {self.found.dtype}, not {self.expected.dtype}"
        return ""

    def __str__(self) -> str:
        return (
            f"{self.name} {self.problem}"
            if self.problem
            else f"{self.name} is off by {self.error:.2g}, relative to its largest entry"
        )


def assert_agree(subject: str, pairs: Iterable[Pair], tolerance: float | None = None) -> None:
    """Raise an AssertionError for the first pair that differs."""
    __tracebackhide__ = True
    for pair in pairs:
        if not pair.agrees(tolerance):
            raise AssertionError(f"{subject}: {pair}")


def seeded(device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def normal(columns: int, like: Tensor) -> Tensor:
    """Normal columns `[v, *like.shape]`, the same on every device."""
    return torch.randn(columns, *like.shape, generator=seeded(), dtype=torch.float64).to(like)


def largest_of(tensors: Iterable[Tensor]) -> float:
    """The largest magnitude of all entries."""
    return max((float(t.double().abs().max()) for t in tensors if t.numel()), default=0.0)


def halves_of(batch: Any) -> list[Any]:
    """Both halves of a tensor or of inputs, at least one sample each."""
    size = batch_size(batch)
    if size < 2:
        raise InputError("the batch holds one sample", remedy="give two or more", code="FXC110")
    cuts = (slice(size // 2), slice(size // 2, None))
    return [pytree.tree_map_only(Tensor, lambda t, cut=cut: t[cut], batch) for cut in cuts]
