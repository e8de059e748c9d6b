"""Diagonal: a block that is a diagonal matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fxcurv.blocks.base import Block, Function

__all__ = ["Diagonal"]


@dataclass(frozen=True, eq=False)
class Diagonal(Block):
    """diag(values), `values` of the block's shape."""

    fields: ClassVar = {"values": "values"}

    values: Tensor

    @classmethod
    def fits(cls, shape: tuple[int, ...], sizes: Sequence[torch.Size]) -> bool:
        return list(sizes) == [shape]

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

    def __mul__(self, factor: float) -> Self:
        return replace(self, values=self.values * self._factor(factor))
