"""Diagonal: a block that is a diagonal matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from fxcurv.blocks.base import Block, Function
from fxcurv.blocks.lazy_gram import SecondMoment

__all__ = ["Diagonal"]


@dataclass(frozen=True, eq=False)
class Diagonal(Block):
    """diag(values), `values` of the block's shape."""

    values: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def _mm(self, matrix: Tensor) -> Tensor:
        return self.values.reshape(-1, 1) * matrix

    def dense(self) -> Tensor:
        return torch.diag(self.values.reshape(-1))

    def diag(self) -> Tensor:
        return self.values

    def _mapped(self, f: Function) -> Diagonal:
        return replace(self, values=f(self.values.clamp(min=0)))

    @property
    def _like(self) -> Tensor:
        return self.values

    def eigvalsh(self) -> Tensor:
        return self.values.flatten().sort().values

    def eigh(self) -> tuple[Tensor, Tensor]:
        values, order = self.values.flatten().sort()
        return values, torch.eye(self.numel, dtype=values.dtype, device=values.device)[:, order]

    def _changed(self, change: Callable[[Tensor | SecondMoment], Any]) -> Self:
        return replace(self, values=change(self.values))

    def __mul__(self, factor: float) -> Self:
        return replace(self, values=self.values * self._factor(factor))

    def plus(self, other: Block) -> Block | None:
        return replace(self, values=self.values + other.values) if isinstance(other, Diagonal) else None
