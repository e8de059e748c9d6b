"""Dense: a block stored as a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from fxcurv.blocks.base import Block, Damping, Function
from fxcurv.blocks.eigenbasis import Eigenbasis
from fxcurv.blocks.lazy_gram import (
    LazyGram,
    an_entry,
    damped_inverse,
    grouped_sides,
    matrix_of,
    moment_of,
    shape_of,
)
from fxcurv.linalg.factorizations import rank

__all__ = ["Dense"]


@dataclass(frozen=True, eq=False)
class Dense(Block):
    """A matrix `[numel, numel]`, or a lazy Gram while that is smaller; `.matrix` is formed when it is read."""

    fields: ClassVar = {"matrix": "moment"}
    symmetric: ClassVar = True

    moment: Tensor | LazyGram

    @cached_property
    def matrix(self) -> Tensor:
        """The matrix, `[numel, numel]`."""
        return matrix_of(self.moment)

    @classmethod
    def fits(cls, shape: tuple[int, ...], sizes: Sequence[torch.Size]) -> bool:
        return grouped_sides(sizes) == [(1, math.prod(shape))]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}

    @property
    def sizes(self) -> dict[str, torch.Size]:
        return {"matrix": shape_of(self.moment)}

    def _mm(self, matrix: Tensor) -> Tensor:
        return moment_of(self.moment).mm(matrix.unsqueeze(0))[0]

    def dense(self) -> Tensor:
        return self.matrix

    def diag(self) -> Tensor:
        return moment_of(self.moment).diagonal().reshape(self.shape)

    def frobenius_norm(self) -> Tensor:
        return moment_of(self.moment).frobenius_norm()[0]

    @cached_property
    def eigenbasis(self) -> Eigenbasis:
        """The block in its eigenvectors."""
        values, vectors = moment_of(self.moment).eigen(self.name)
        one = values.new_ones(1, 1, 1)
        return Eigenbasis(self.shape, one, vectors, values.unsqueeze(-1), **self.labels)

    def decomposed(self) -> Block:
        return self.eigenbasis

    def _mapped(self, f: Function) -> Eigenbasis:
        return self.eigenbasis._mapped(f)

    def _ranks(self) -> Iterator[tuple[str, int, int]]:
        yield self.name, rank(self.eigenbasis.values[..., 0], self.numel), self.numel

    @property
    def _like(self) -> Tensor:
        return an_entry(self.moment)

    def eigvalsh(self) -> Tensor:
        return self.eigenbasis.eigvalsh()

    def eigh(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self.matrix)

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        """By Cholesky decomposition, with as many equations as the smaller of the numbers of vectors and entries."""
        return moment_of(self.moment).solve(columns.unsqueeze(0), damping, self.name)[0]

    def _inverse(self, damping: float, method: Damping) -> Dense:
        return replace(self, moment=damped_inverse(moment_of(self.moment), damping, self.name)[0])

    def power(self, exponent: float) -> Dense:
        return replace(self, moment=super().power(exponent).dense())

    def __mul__(self, factor: float) -> Self:
        return replace(self, moment=self.moment * self._factor(factor))
