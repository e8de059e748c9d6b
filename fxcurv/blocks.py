"""Blocks: the curvature of one parameter as a symmetric positive semi-definite operator on it, flattened row-major."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxcurv.errors import InputError

__all__ = ["Block", "Dense", "Diagonal", "Kronecker"]


@dataclass(frozen=True, eq=False)
class Block(ABC):
    """An operator on vectors of `shape` (the parameter's, or `[o, i+1]` for a joint weight and bias).

    `parameters` says whose block it is, `status` whether it is exact to its definition, and `reduction` how the loss
    scales it.
    """

    shape: tuple[int, ...]
    parameters: tuple[str, ...] = field(default=(), kw_only=True)
    status: str = field(default="exact", kw_only=True)
    reduction: str = field(default="sum", kw_only=True)

    @property
    def numel(self) -> int:
        """Entries of the vectors that the block acts on."""
        return math.prod(self.shape)

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""

    @abstractmethod
    def _mv(self, v: Tensor) -> Tensor:
        """The product with `v[numel]`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix, `[numel, numel]`."""

    @abstractmethod
    def diag(self) -> Tensor:
        """The diagonal, of the block's shape."""

    @abstractmethod
    def trace(self) -> Tensor:
        """The trace, a scalar tensor."""

    def mv(self, v: Tensor) -> Tensor:
        """The product with a vector of the block's shape, or flat; the result has the shape of `v`."""
        if v.numel() != self.numel:
            raise InputError(
                f"a vector of {v.numel()} entries for a block on {list(self.shape)}",
                remedy=f"give {self.numel} entries",
                code="FXC411",
            )
        return self._mv(v.reshape(-1)).reshape(v.shape)


@dataclass(frozen=True, eq=False)
class Diagonal(Block):
    """diag(values), `values` of the block's shape."""

    values: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def _mv(self, v: Tensor) -> Tensor:
        return self.values.reshape(-1) * v

    def dense(self) -> Tensor:
        return torch.diag(self.values.reshape(-1))

    def diag(self) -> Tensor:
        return self.values

    def trace(self) -> Tensor:
        return self.values.sum()


@dataclass(frozen=True, eq=False)
class Dense(Block):
    """A matrix `[numel, numel]`."""

    matrix: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}

    def _mv(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def dense(self) -> Tensor:
        return self.matrix

    def diag(self) -> Tensor:
        return self.matrix.diagonal().reshape(self.shape)

    def trace(self) -> Tensor:
        return self.matrix.trace()


@dataclass(frozen=True, eq=False)
class Kronecker(Block):
    """G ⊗ A with `A[i,i]` and `G[o,o]`, or blockdiag_g(G_g ⊗ A_g) with a leading group axis on both."""

    A: Tensor
    G: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "G": self.G}

    @property
    def _grouped(self) -> tuple[Tensor, Tensor]:
        """A and G with a group axis."""
        return (self.A, self.G) if self.A.ndim == 3 else (self.A.unsqueeze(0), self.G.unsqueeze(0))

    def _mv(self, v: Tensor) -> Tensor:
        A, G = self._grouped
        return (G @ v.view(A.shape[0], G.shape[-1], A.shape[-1]) @ A).reshape(-1)

    def dense(self) -> Tensor:
        A, G = self._grouped
        return torch.block_diag(*(torch.kron(g, a) for g, a in zip(G.contiguous(), A.contiguous(), strict=True)))

    def diag(self) -> Tensor:
        A, G = (f.diagonal(dim1=-2, dim2=-1) for f in self._grouped)
        return (G.unsqueeze(-1) * A.unsqueeze(-2)).reshape(self.shape)

    def trace(self) -> Tensor:
        A, G = (f.diagonal(dim1=-2, dim2=-1).sum(-1) for f in self._grouped)
        return (A * G).sum()
