"""Eigenbasis: a block that is diagonal in a Kronecker product of orthonormal bases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor

from fxcurv.blocks.base import Block, Function
from fxcurv.core.deprecation import Renamed

__all__ = ["Eigenbasis"]


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Eigenbasis(Block):
    """Q diag(values) Qᵀ + rest (I - Q Qᵀ) with Q = blockdiag_g(Q_g ⊗ U_g) of orthonormal columns.

    `input_vectors` are U `[g,i,a]`, `output_vectors` Q `[g,o,b]`, `values` `[g,b,a]`; `rest` is the null-space
    eigenvalue, outside the span of the columns (George et al. 2018: the Kronecker-factored eigenbasis). With `in_out` Q
    is U_g ⊗ Q_g. The damped inverse and every function of a Kronecker product have this form.
    """

    fields: ClassVar = {"U": "input_vectors", "Q": "output_vectors", "values": "values"}
    options: ClassVar = {"null_eigenvalue": float, "in_out": bool}
    additive: ClassVar = False

    input_vectors: Tensor
    output_vectors: Tensor
    values: Tensor
    null_eigenvalue: float = 0.0
    in_out: bool = field(default=False, kw_only=True)
    inputs_first: ClassVar = Renamed("in_out")
    rest: ClassVar = Renamed("null_eigenvalue")

    @classmethod
    def fits(cls, shape: tuple[int, ...], sizes: Sequence[torch.Size]) -> bool:
        if [len(size) for size in sizes] != [3, 3, 3]:
            return False
        (g, i, a), (h, o, b), values = sizes
        return g == h and g * i * o == math.prod(shape) and values == (g, b, a)

    @property
    def invariants(self) -> dict[str, Tensor]:
        """The trace: where eigenvalues of the factors coincide, the basis is not unique."""
        return {"trace": self.trace()}

    @property
    def layout(self) -> object:
        return self.in_out

    def averaged_with(self, old: Self, weight: float) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Average in the columns of this block, with the diagonal of `old` in them (nearest in Frobenius norm)."""
        outputs = (self.output_vectors.mT @ old.output_vectors).square()
        inputs = (self.input_vectors.mT @ old.input_vectors).square()
        projected = old.null_eigenvalue + outputs @ (old.values - old.null_eigenvalue) @ inputs.mT
        values = weight * projected.to(self.values) + (1 - weight) * self.values
        return replace(
            self, values=values, null_eigenvalue=weight * old.null_eigenvalue + (1 - weight) * self.null_eigenvalue
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"U": self.input_vectors, "Q": self.output_vectors, "values": self.values}

    @property
    def _full(self) -> bool:
        """Whether the columns span the whole space."""
        return self.values.numel() == self.numel

    @property
    def _vectors(self) -> tuple[Tensor, Tensor]:
        """Q and U in the order of the Kronecker product."""
        return in_layout_order(self.in_out, self.input_vectors, self.output_vectors)

    @property
    def _values(self) -> Tensor:
        """The values in the order of the Kronecker product: `[g,b,a]` or `[g,a,b]`."""
        return self.values.mT if self.in_out else self.values

    def _mm(self, matrix: Tensor) -> Tensor:
        first, second = self._vectors
        inside = kronecker_product(matrix, (first.shape[1], second.shape[1]), first.mT.matmul, second.mT.matmul)
        scaled = self._back(self._values.reshape(-1, 1) * inside)
        if self._full or not self.null_eigenvalue:
            return scaled
        return scaled + self.null_eigenvalue * (matrix - self._back(inside))

    def _back(self, inside: Tensor) -> Tensor:
        """Q times coefficients `[g·b·a, k]`."""
        first, second = self._vectors
        return kronecker_product(inside, (first.shape[2], second.shape[2]), first.matmul, second.matmul)

    def dense(self) -> Tensor:
        return self._mm(torch.eye(self.numel, dtype=self.values.dtype, device=self.values.device))

    def diag(self) -> Tensor:
        first, second = self._vectors
        squares = first.square() @ (self._values - self.null_eigenvalue) @ second.square().mT
        return (squares + self.null_eigenvalue).reshape(self.shape)

    def _mapped(self, f: Function) -> Eigenbasis:
        null_eigenvalue = 0.0 if self._full else float(f(self.values.new_full((), self.null_eigenvalue)))
        return replace(self, values=f(self.values.clamp(min=0)), null_eigenvalue=null_eigenvalue)

    @property
    def _like(self) -> Tensor:
        return self.values

    def eigvalsh(self) -> Tensor:
        values = self.values.flatten()
        return torch.cat([values, values.new_full((self.numel - len(values),), self.null_eigenvalue)]).sort().values

    def eigh(self) -> tuple[Tensor, Tensor]:
        if not self._full:
            return torch.linalg.eigh(self.dense())
        columns = self._back(torch.eye(self.numel, dtype=self.values.dtype, device=self.values.device))
        values, order = self._values.flatten().sort()
        return values, columns[:, order]

    def __mul__(self, factor: float) -> Self:
        return replace(self, values=self.values * self._factor(factor), null_eigenvalue=self.null_eigenvalue * factor)


def in_layout_order(in_out: bool, inputs: T, outputs: T) -> tuple[T, T]:
    """The input part and the output part of a block, in the order of its Kronecker product."""
    return (inputs, outputs) if in_out else (outputs, inputs)


def kronecker_product(
    matrix: Tensor, sides: tuple[int, int], first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply first ⊗ second to columns `[g·p·q, k]`, each a function from `[g,d,m]` to `[g,d',m]`."""
    p, q = sides
    k = matrix.shape[-1]
    right = second(matrix.reshape(-1, p, q, k).transpose(1, 2).flatten(2))  # [g, q', p·k]
    right = right.unflatten(2, (p, k)).transpose(1, 2)  # [g, p, q', k]
    return first(right.flatten(2)).reshape(-1, k)
