"""Kronecker: a block G ⊗ A, with one pair of factors per group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from fxcurv.blocks.base import Block, Damping, Function
from fxcurv.blocks.eigenbasis import Eigenbasis, in_layout_order, kronecker_product
from fxcurv.blocks.lazy_gram import (
    LazyGram,
    Matrix,
    Moment,
    an_entry,
    damped_inverse,
    grouped_sides,
    matrix_of,
    moment_of,
    shape_of,
    ungrouped,
)
from fxcurv.core.deprecation import Renamed
from fxcurv.linalg.factorizations import rank

__all__ = ["Kronecker"]


@dataclass(frozen=True, eq=False)
class Kronecker(Block):
    """G ⊗ A with `A[i,i]` and `G[o,o]`, or blockdiag_g(G_g ⊗ A_g) with a leading group axis on both.

    With `in_out` it is A ⊗ G, for a weight stored as `W[i,o]`. A factor with fewer vectors than entries is stored as a
    lazy Gram; `.A` and `.G` are formed when they are read. `averaged` is the number of input vectors that A averages, 0
    if unknown.
    """

    fields: ClassVar = {"A": "input_moment", "G": "output_moment"}
    options: ClassVar = {"averaged": int, "in_out": bool}
    symmetric: ClassVar = True

    input_moment: Tensor | LazyGram
    output_moment: Tensor | LazyGram
    averaged: int = field(default=0, kw_only=True)
    in_out: bool = field(default=False, kw_only=True)
    inputs_first: ClassVar = Renamed("in_out")

    @cached_property
    def A(self) -> Tensor:
        """The factor of the inputs."""
        return matrix_of(self.input_moment)

    @cached_property
    def G(self) -> Tensor:
        """The factor of the outputs."""
        return matrix_of(self.output_moment)

    @classmethod
    def fits(cls, shape: tuple[int, ...], sizes: Sequence[torch.Size]) -> bool:
        sides = grouped_sides(sizes)
        if len(sides) != 2:
            return False
        (g, i), (h, o) = sides
        return g == h and g * i * o == math.prod(shape)

    @property
    def count(self) -> int:
        return self.averaged

    def counted(self, count: int) -> Self:
        return replace(self, averaged=count)

    def weights(self, terms: float, inputs: float) -> tuple[float, ...]:
        return inputs, terms

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "G": self.G}

    @property
    def sizes(self) -> dict[str, torch.Size]:
        return {"A": shape_of(self.input_moment), "G": shape_of(self.output_moment)}

    @property
    def _factors(self) -> tuple[Moment, Moment]:
        """A and G with a group axis."""
        return moment_of(self.input_moment), moment_of(self.output_moment)

    def _mm(self, matrix: Tensor) -> Tensor:
        first, second = in_layout_order(self.in_out, *self._factors)
        return kronecker_product(matrix, (first.shape[-1], second.shape[-1]), first.mm, second.mm)

    def dense(self) -> Tensor:
        A, G = (f if f.ndim == 3 else f.unsqueeze(0) for f in (self.A, self.G))
        pairs = zip(*in_layout_order(self.in_out, A.contiguous(), G.contiguous()), strict=True)
        return torch.block_diag(*(torch.kron(first, second) for first, second in pairs))

    def diag(self) -> Tensor:
        first, second = in_layout_order(self.in_out, *(f.diagonal() for f in self._factors))
        return (first.unsqueeze(-1) * second.unsqueeze(-2)).reshape(self.shape)

    def trace(self) -> Tensor:
        A, G = (f.diagonal().sum(-1) for f in self._factors)
        return (A * G).sum()

    def frobenius_norm(self) -> Tensor:
        A, G = (f.frobenius_norm() for f in self._factors)
        return torch.linalg.vector_norm(A * G)

    @cached_property
    def eigenbasis(self) -> Eigenbasis:
        """The block in the eigenvectors of its factors, where it is diagonal; eigenvalues are products of theirs."""
        return self._in_eigenvectors(*self._eigen)

    def _in_eigenvectors(self, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> Eigenbasis:
        """The block in the eigenvectors of A and G, from their eigenvalues and eigenvectors."""
        (a, U), (g, Q) = inputs, outputs
        values = g.unsqueeze(-1) * a.unsqueeze(-2)
        return Eigenbasis(self.shape, U, Q, values, in_out=self.in_out, **self.labels)

    def decomposed(self) -> Block:
        return self.eigenbasis

    def _mapped(self, f: Function) -> Eigenbasis:
        return self.eigenbasis._mapped(f)

    @cached_property
    def _eigen(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Eigenvalues and eigenvectors of A and G."""
        A, G = self._factors
        return A.eigen(f"the factor A of {self.name}"), G.eigen(f"the factor G of {self.name}")

    def _ranks(self) -> Iterator[tuple[str, int, int]]:
        for factor, (values, vectors) in zip("AG", self._eigen, strict=True):
            side = vectors.shape[1]
            yield f"the factor {factor} of {self.name}", rank(values, side), side

    @property
    def _like(self) -> Tensor:
        return an_entry(self.input_moment)

    def eigvalsh(self) -> Tensor:
        return self.eigenbasis.eigvalsh()

    def eigh(self) -> tuple[Tensor, Tensor]:
        A, G = (Matrix(f.dense()).eigen() for f in self._factors)
        return self._in_eigenvectors(A, G).eigh()

    def inverse(self, damping: float = 0.0, method: Damping = "exact") -> Block:
        """(G ⊗ A + δI)⁻¹, exactly or with damped factors, per group.

        - `exact`: an `Eigenbasis` block, from the eigendecompositions of both factors.
        - `plain`: a `Kronecker` block (G + √δ I)⁻¹ ⊗ (A + √δ I)⁻¹, which adds the extra term √δ (G ⊗ I + I ⊗ A).
        - `pi`: (G + √δ/π I)⁻¹ ⊗ (A + π√δ I)⁻¹ with π² = (tr A / i) / (tr G / o), which minimizes a bound on the extra
          term (Martens & Grosse 2015, §6.3); π = 1 where a trace is zero.
        """
        return super().inverse(damping, method)

    def _inverse(self, damping: float, method: Damping) -> Block:
        if method == "exact":
            return super()._inverse(damping, method)
        (A, G), root = self._factors, damping**0.5
        a, g = (f.diagonal().mean(-1) for f in (A, G))
        pi = torch.where((a > 0) & (g > 0), (a / g).sqrt(), 1.0) if method == "pi" else torch.ones_like(a)
        inputs = damped_inverse(A, pi * root, f"the factor A of {self.name}")
        outputs = damped_inverse(G, root / pi, f"the factor G of {self.name}")
        return replace(self, input_moment=ungrouped(inputs), output_moment=ungrouped(outputs), averaged=0)

    def power(self, exponent: float) -> Kronecker:
        if exponent < 0:
            self._require_regular(0.0)
        A, G = (_power(exponent, *eigen) for eigen in self._eigen)
        return replace(self, input_moment=ungrouped(A), output_moment=ungrouped(G), averaged=0)

    def __mul__(self, factor: float) -> Self:
        """Scale G."""
        return replace(self, output_moment=self.output_moment * self._factor(factor))

    def plus(self, other: Block) -> Block | None:
        if not isinstance(other, Kronecker) or other.in_out != self.in_out:
            return None
        if other.input_moment is self.input_moment:
            return replace(self, output_moment=self.output_moment + other.output_moment)
        if other.output_moment is self.output_moment:
            return replace(self, input_moment=self.input_moment + other.input_moment, averaged=0)
        return None


def _power(exponent: float, values: Tensor, vectors: Tensor) -> Tensor:
    """The power of matrices from eigenvalues `[g,r]` and vectors `[g,d,r]`; the null-space eigenvalue is 0."""
    if exponent == 0:
        return torch.eye(vectors.shape[1]).to(vectors).repeat(len(vectors), 1, 1)
    return vectors * (values**exponent).unsqueeze(-2) @ vectors.mT
