"""Costs: what a computation takes, and how long a device of some kind needs for it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cost"]


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes read and written, and bytes held between its inputs and its output."""

    flops: float = 0.0
    bytes: float = 0.0
    temporary: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """One after the other: temporaries of the first are gone when the second begins."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes, max(self.temporary, other.temporary))
