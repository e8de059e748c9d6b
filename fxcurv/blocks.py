"""Blocks: the curvature of one parameter as a symmetric positive semi-definite operator on it, flattened row-major."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fxcurv.errors import InputError
from fxcurv.moments import Moment, SecondMoment, moment_of

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

    @property
    def sizes(self) -> dict[str, torch.Size]:
        """Their shapes; nothing is formed for it."""
        return {name: t.shape for name, t in self.tensors.items()}

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
    """A matrix `[numel, numel]`, or what it is made of while that is smaller; `.matrix` is formed when it is read."""

    moment: Tensor | SecondMoment

    @cached_property
    def matrix(self) -> Tensor:
        """The matrix, `[numel, numel]`."""
        return _matrix(self.moment)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}

    @property
    def sizes(self) -> dict[str, torch.Size]:
        return {"matrix": _size(self.moment)}

    def _mv(self, v: Tensor) -> Tensor:
        return moment_of(self.moment).mm(v.view(1, -1, 1)).view(-1)

    def dense(self) -> Tensor:
        return self.matrix

    def diag(self) -> Tensor:
        return moment_of(self.moment).diagonal().reshape(self.shape)

    def trace(self) -> Tensor:
        return moment_of(self.moment).diagonal().sum()


@dataclass(frozen=True, eq=False)
class Kronecker(Block):
    """G ⊗ A with `A[i,i]` and `G[o,o]`, or blockdiag_g(G_g ⊗ A_g) with a leading group axis on both.

    A factor with fewer vectors than entries is kept as these vectors; `.A` and `.G` are formed when they are read.
    """

    input_moment: Tensor | SecondMoment
    output_moment: Tensor | SecondMoment

    @cached_property
    def A(self) -> Tensor:
        """The factor of the inputs."""
        return _matrix(self.input_moment)

    @cached_property
    def G(self) -> Tensor:
        """The factor of the outputs."""
        return _matrix(self.output_moment)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "G": self.G}

    @property
    def sizes(self) -> dict[str, torch.Size]:
        return {"A": _size(self.input_moment), "G": _size(self.output_moment)}

    @property
    def _factors(self) -> tuple[Moment, Moment]:
        """A and G with a group axis."""
        return moment_of(self.input_moment), moment_of(self.output_moment)

    def _mv(self, v: Tensor) -> Tensor:
        A, G = self._factors
        v = v.view(A.shape[0], G.shape[-1], A.shape[-1])
        return G.mm(A.mm(v.mT).mT).reshape(-1)

    def dense(self) -> Tensor:
        A, G = (f if f.ndim == 3 else f.unsqueeze(0) for f in (self.A, self.G))
        return torch.block_diag(*(torch.kron(g, a) for g, a in zip(G.contiguous(), A.contiguous(), strict=True)))

    def diag(self) -> Tensor:
        A, G = (f.diagonal() for f in self._factors)
        return (G.unsqueeze(-1) * A.unsqueeze(-2)).reshape(self.shape)

    def trace(self) -> Tensor:
        A, G = (f.diagonal().sum(-1) for f in self._factors)
        return (A * G).sum()


def _matrix(moment: Tensor | SecondMoment) -> Tensor:
    """The matrix `[d,d]`, or `[g,d,d]` of several groups."""
    dense = moment_of(moment).dense()
    return dense[0] if len(dense) == 1 else dense


def _size(moment: Tensor | SecondMoment) -> torch.Size:
    """The shape of `_matrix`."""
    shape = moment_of(moment).shape
    return shape[1:] if shape[0] == 1 else shape
