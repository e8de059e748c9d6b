"""Blocks: the curvature of one parameter as a symmetric positive semi-definite operator on it, flattened row-major.

A block B is used with a damping δ ≥ 0, in the units of the curvature: what is solved, sampled and inverted is B + δI.
Its tensors are not to be written into: decompositions are kept with it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self, TypeVar, get_args

import torch
from torch import Tensor

from fxcurv.errors import InputError
from fxcurv.linalg import cholesky, damping_of, rank, singular
from fxcurv.moments import Matrix, Moment, SecondMoment, moment_of

__all__ = ["Block", "Damping", "Dense", "Diagonal", "Eigenbasis", "Kronecker"]

Damping = Literal["plain", "pi", "exact"]
"""How an inverse of Kronecker factors is damped; the forms without factors have one way, `exact`."""

Function = Callable[[Tensor], Tensor]
"""Of eigenvalues, elementwise."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Block(ABC):
    """An operator on vectors of `shape` (the parameter's, or `[o, i+1]` or `[i+1, o]` for a joint weight and bias).

    `parameters` says whose block it is, `status` whether it is exact to its definition, and `reduction` how the loss
    scales it.
    """

    shape: tuple[int, ...]
    parameters: tuple[str, ...] = field(default=(), kw_only=True)
    status: str = field(default="exact", kw_only=True)
    reduction: str = field(default="sum", kw_only=True)

    # What a form defines ----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""

    @abstractmethod
    def _mm(self, matrix: Tensor) -> Tensor:
        """The product with `[numel, k]`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix, `[numel, numel]`."""

    @abstractmethod
    def diag(self) -> Tensor:
        """The diagonal, of the block's shape."""

    @abstractmethod
    def _mapped(self, f: Function) -> Block:
        """f(B): the same eigenvectors with the eigenvalues f(λ)."""

    @property
    @abstractmethod
    def _like(self) -> Tensor:
        """A tensor of the block's type and place."""

    @abstractmethod
    def eigvalsh(self) -> Tensor:
        """All eigenvalues, ascending: `[numel]`."""

    @abstractmethod
    def eigh(self) -> tuple[Tensor, Tensor]:
        """All eigenvalues, ascending, `[numel]`, and an orthonormal basis of eigenvectors, `[numel, numel]`."""

    @abstractmethod
    def _changed(self, change: Callable[[Tensor | SecondMoment], Any]) -> Self:
        """With every stored tensor changed."""

    @abstractmethod
    def __mul__(self, factor: float) -> Self:
        """The block times a number ≥ 0."""

    # What follows -----------------------------------------------------------------------------------------------------

    @property
    def numel(self) -> int:
        """Entries of the vectors that the block acts on."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its tensors."""
        return self._like.dtype

    @property
    def sizes(self) -> dict[str, torch.Size]:
        """The shapes of the stored tensors; nothing is formed for it."""
        return {name: t.shape for name, t in self.tensors.items()}

    @property
    def name(self) -> str:
        """Whose block it is, in words."""
        return f"the block of {' and '.join(map(repr, self.parameters)) or 'no parameter'}"

    def trace(self) -> Tensor:
        """The trace, a scalar tensor."""
        return self.diag().sum()

    def frobenius_norm(self) -> Tensor:
        """√Σ B_ij², a scalar tensor."""
        return torch.linalg.vector_norm(self.eigvalsh())

    def mv(self, v: Tensor) -> Tensor:
        """B v for a vector of the block's shape, or flat; the result has the shape of `v`."""
        return self._mm(self._column(v)).reshape(v.shape)

    def mm(self, matrix: Tensor) -> Tensor:
        """B times the columns of `[numel, k]`."""
        if matrix.ndim != 2 or len(matrix) != self.numel:
            raise InputError(
                f"a matrix of shape {list(matrix.shape)} for a block on {list(self.shape)}",
                remedy=f"give [{self.numel}, k]",
                code="FXC411",
            )
        return self._mm(matrix)

    def __matmul__(self, right: Tensor) -> Tensor:
        """`mm` of a matrix `[numel, k]`, `mv` of anything else."""
        return self.mm(right) if right.ndim == 2 and tuple(right.shape) != self.shape else self.mv(right)

    def solve(self, v: Tensor, damping: float = 0.0) -> Tensor:
        """(B + δI)⁻¹ v, in the shape of `v`; a singular block needs δ > 0."""
        return self._solve(self._column(v), self._damped(damping)).reshape(v.shape)

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        self._require_regular(damping)
        return self._mapped(lambda x: 1 / (x + damping))._mm(columns)

    def inverse(self, damping: float = 0.0, method: Damping = "exact") -> Block:
        """(B + δI)⁻¹ as a block of its own; what the methods are is said at `Kronecker.inverse`."""
        if method not in get_args(Damping):
            raise InputError(f"method={method!r}", remedy=f"choose one of {get_args(Damping)}", code="FXC421")
        return self._inverse(self._damped(damping), method)

    def _inverse(self, damping: float, method: Damping) -> Block:
        self._require_regular(damping)
        return self._mapped(lambda x: 1 / (x + damping))

    def decomposed(self) -> Block:
        """The same operator with nothing left to decompose: its matrix, or factors, in their eigenvectors."""
        return self

    def sqrt(self) -> Block:
        """The symmetric root: R R = B."""
        return self.power(0.5)

    def power(self, exponent: float) -> Block:
        """Bᵖ of the same form, for any real p; for p < 0 of a block that is not singular. B⁰ = I."""
        if exponent < 0:
            self._require_regular(0.0)
        return self._mapped(lambda x: x**exponent)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(B + δI), a scalar tensor; -inf where it is singular to rounding."""
        damping = self._damped(damping)
        singular = not damping and any(found < side for _, found, side in self._ranks())
        values = self.eigvalsh()
        return values.new_full((), -math.inf) if singular else (values.clamp(min=0) + damping).log().sum()

    def det(self, damping: float = 0.0) -> Tensor:
        """det(B + δI), a scalar tensor, which overflows where `logdet` does not."""
        return self.logdet(damping).exp()

    def sample(self, generator: torch.Generator | None = None, damping: float = 0.0) -> Tensor:
        """A draw of N(0, (B + δI)⁻¹), of the block's shape: B + δI is the precision, as in a Laplace approximation."""
        damping = self._damped(damping)
        self._require_regular(damping)
        noise = torch.randn(self.numel, 1, dtype=self.dtype, device=self.device, generator=generator)
        return self._mapped(lambda x: (x + damping).rsqrt())._mm(noise).reshape(self.shape)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The block elsewhere, or in another floating-point type."""
        return self._changed(lambda t: t.to(device=device, dtype=dtype))

    def as_dense(self) -> Dense:
        """The same operator as a `Dense` block."""
        return Dense(self.shape, self.dense(), **self._labels)

    def __add__(self, other: Block) -> Block:
        """The sum of two blocks of a form that is closed under it; others are added as `a.as_dense() + b.as_dense()`.

        The sum of two Kronecker products is none, unless they share a factor.
        """
        if not isinstance(other, Block):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        if self.shape != other.shape:
            raise InputError(
                f"{self.name}, {list(self.shape)}, plus {other.name}, {list(other.shape)}",
                remedy="add blocks of one shape",
                code="FXC422",
            )
        total = self.plus(other)
        if total is None:
            raise InputError(
                f"the sum of a {type(self).__name__} and a {type(other).__name__} block is of neither form",
                remedy="add a.as_dense() + b.as_dense()",
                code="FXC422",
            )
        return total

    def plus(self, other: Block) -> Block | None:
        """The sum in a form of its own, if it has one."""
        return None

    def __rmul__(self, factor: float) -> Self:
        return self * factor

    def _factor(self, factor: float) -> float:
        """What a block may be multiplied with."""
        if not 0 <= factor < math.inf:
            raise InputError(
                f"a block times {factor!r}", remedy="blocks are positive semi-definite: give 0 or more", code="FXC422"
            )
        return factor

    def _damped(self, damping: float) -> float:
        return damping_of(damping)

    def _column(self, v: Tensor) -> Tensor:
        """v as `[numel, 1]`."""
        if v.numel() != self.numel:
            raise InputError(
                f"a vector of {v.numel()} entries for a block on {list(self.shape)}",
                remedy=f"give {self.numel} entries",
                code="FXC411",
            )
        return v.reshape(-1, 1)

    def _require_regular(self, damping: float) -> None:
        """An error where the block has no inverse."""
        for what, found, side in () if damping else self._ranks():
            if found < side:
                raise singular(what, found, side)

    def _ranks(self) -> Iterator[tuple[str, int, int]]:
        """What is singular if the block is: its name, rank and side; stored eigenvalues stand for themselves."""
        yield self.name, int((self.eigvalsh() > 0).sum()), self.numel

    @property
    def _labels(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "status": self.status, "reduction": self.reduction}


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
        """The block in its own eigenvectors."""
        values, vectors = moment_of(self.moment).eigen(self.name)
        one = values.new_ones(1, 1, 1)
        return Eigenbasis(self.shape, one, vectors, values.unsqueeze(-1), **self._labels)

    def decomposed(self) -> Block:
        return self.eigenbasis

    def _mapped(self, f: Function) -> Eigenbasis:
        return self.eigenbasis._mapped(f)

    def _ranks(self) -> Iterator[tuple[str, int, int]]:
        yield self.name, rank(self.eigenbasis.values[..., 0], self.numel), self.numel

    @property
    def _like(self) -> Tensor:
        return _entry(self.moment)

    def eigvalsh(self) -> Tensor:
        return self.eigenbasis.eigvalsh()

    def eigh(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self.matrix)

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        """By Cholesky's decomposition, of as many equations as there are vectors or entries."""
        return moment_of(self.moment).solve(columns.unsqueeze(0), damping, self.name)[0]

    def _inverse(self, damping: float, method: Damping) -> Dense:
        return replace(self, moment=_inverted(moment_of(self.moment), damping, self.name)[0])

    def power(self, exponent: float) -> Dense:
        return replace(self, moment=super().power(exponent).dense())

    def _changed(self, change: Callable[[Tensor | SecondMoment], Any]) -> Self:
        return replace(self, moment=change(self.moment))

    def __mul__(self, factor: float) -> Self:
        return replace(self, moment=self.moment * self._factor(factor))

    def plus(self, other: Block) -> Block | None:
        return replace(self, moment=self.moment + other.moment) if isinstance(other, Dense) else None


@dataclass(frozen=True, eq=False)
class Kronecker(Block):
    """G ⊗ A with `A[i,i]` and `G[o,o]`, or blockdiag_g(G_g ⊗ A_g) with a leading group axis on both.

    With `inputs_first` it is A ⊗ G: the block of a weight that lies as `W[i,o]`. A factor with fewer vectors than
    entries is kept as these vectors; `.A` and `.G` are formed when they are read. `averaged` is the number of input
    vectors whose mean A is, 0 where that is not known.
    """

    input_moment: Tensor | SecondMoment
    output_moment: Tensor | SecondMoment
    averaged: int = field(default=0, kw_only=True)
    inputs_first: bool = field(default=False, kw_only=True)

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

    def _mm(self, matrix: Tensor) -> Tensor:
        first, second = _ordered(self, *self._factors)
        return _along_factors(matrix, (first.shape[-1], second.shape[-1]), first.mm, second.mm)

    def dense(self) -> Tensor:
        A, G = (f if f.ndim == 3 else f.unsqueeze(0) for f in (self.A, self.G))
        pairs = zip(*_ordered(self, A.contiguous(), G.contiguous()), strict=True)
        return torch.block_diag(*(torch.kron(first, second) for first, second in pairs))

    def diag(self) -> Tensor:
        first, second = _ordered(self, *(f.diagonal() for f in self._factors))
        return (first.unsqueeze(-1) * second.unsqueeze(-2)).reshape(self.shape)

    def trace(self) -> Tensor:
        A, G = (f.diagonal().sum(-1) for f in self._factors)
        return (A * G).sum()

    def frobenius_norm(self) -> Tensor:
        A, G = (f.frobenius_norm() for f in self._factors)
        return torch.linalg.vector_norm(A * G)

    @cached_property
    def eigenbasis(self) -> Eigenbasis:
        """The block in the eigenvectors of its factors, where it is diagonal: eigenvalues are products of theirs."""
        return self._in_eigenvectors(*self._eigen)

    def _in_eigenvectors(self, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> Eigenbasis:
        """The block in eigenvectors of A and of G, from these and their eigenvalues."""
        (a, U), (g, Q) = inputs, outputs
        values = g.unsqueeze(-1) * a.unsqueeze(-2)
        return Eigenbasis(self.shape, U, Q, values, inputs_first=self.inputs_first, **self._labels)

    def decomposed(self) -> Block:
        return self.eigenbasis

    def _mapped(self, f: Function) -> Eigenbasis:
        return self.eigenbasis._mapped(f)

    @cached_property
    def _eigen(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Eigenvalues and eigenvectors of A and of G."""
        A, G = self._factors
        return A.eigen(f"the factor A of {self.name}"), G.eigen(f"the factor G of {self.name}")

    def _ranks(self) -> Iterator[tuple[str, int, int]]:
        for factor, (values, vectors) in zip("AG", self._eigen, strict=True):
            side = vectors.shape[1]
            yield f"the factor {factor} of {self.name}", rank(values, side), side

    @property
    def _like(self) -> Tensor:
        return _entry(self.input_moment)

    def eigvalsh(self) -> Tensor:
        return self.eigenbasis.eigvalsh()

    def eigh(self) -> tuple[Tensor, Tensor]:
        A, G = (Matrix(f.dense()).eigen() for f in self._factors)
        return self._in_eigenvectors(A, G).eigh()

    def inverse(self, damping: float = 0.0, method: Damping = "exact") -> Block:
        """(G ⊗ A + δI)⁻¹, exactly or with damped factors, per group.

        - `exact`: an `Eigenbasis` block, through the eigendecompositions of both factors.
        - `plain`: a `Kronecker` block (G + √δ I)⁻¹ ⊗ (A + √δ I)⁻¹, which adds √δ (G ⊗ I + I ⊗ A) too.
        - `pi`: (G + √δ/π I)⁻¹ ⊗ (A + π√δ I)⁻¹ with π² = (tr A / i) / (tr G / o), which makes what is added too as small
          as its bound (Martens & Grosse 2015, §6.3); π = 1 where a trace is zero.
        """
        return super().inverse(damping, method)

    def _inverse(self, damping: float, method: Damping) -> Block:
        if method == "exact":
            return super()._inverse(damping, method)
        (A, G), root = self._factors, damping**0.5
        a, g = (f.diagonal().mean(-1) for f in (A, G))
        pi = torch.where((a > 0) & (g > 0), (a / g).sqrt(), 1.0) if method == "pi" else torch.ones_like(a)
        inputs = _inverted(A, pi * root, f"the factor A of {self.name}")
        outputs = _inverted(G, root / pi, f"the factor G of {self.name}")
        return replace(self, input_moment=_ungrouped(inputs), output_moment=_ungrouped(outputs), averaged=0)

    def power(self, exponent: float) -> Kronecker:
        if exponent < 0:
            self._require_regular(0.0)
        A, G = ((values**exponent, vectors) for values, vectors in (Matrix(f.dense()).eigen() for f in self._factors))
        inputs, outputs = (_ungrouped(vectors * values.unsqueeze(-2) @ vectors.mT) for values, vectors in (A, G))
        return replace(self, input_moment=inputs, output_moment=outputs, averaged=0)

    def _changed(self, change: Callable[[Tensor | SecondMoment], Any]) -> Self:
        return replace(self, input_moment=change(self.input_moment), output_moment=change(self.output_moment))

    def __mul__(self, factor: float) -> Self:
        """Scales G."""
        return replace(self, output_moment=self.output_moment * self._factor(factor))

    def plus(self, other: Block) -> Block | None:
        if not isinstance(other, Kronecker) or other.inputs_first != self.inputs_first:
            return None
        if other.input_moment is self.input_moment:
            return replace(self, output_moment=self.output_moment + other.output_moment)
        if other.output_moment is self.output_moment:
            return replace(self, input_moment=self.input_moment + other.input_moment, averaged=0)
        return None


@dataclass(frozen=True, eq=False)
class Eigenbasis(Block):
    """Q diag(values) Qᵀ + rest (I - Q Qᵀ) with Q = blockdiag_g(Q_g ⊗ U_g) of orthonormal columns.

    `input_vectors` are U `[g,i,a]`, `output_vectors` Q `[g,o,b]`, `values` `[g,b,a]`; `rest` is the eigenvalue of what
    the columns do not span (George et al. 2018 call it the Kronecker-factored eigenbasis). With `inputs_first` Q is
    U_g ⊗ Q_g. The damped inverse and every function of a Kronecker product are of this form.
    """

    input_vectors: Tensor
    output_vectors: Tensor
    values: Tensor
    rest: float = 0.0
    inputs_first: bool = field(default=False, kw_only=True)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"U": self.input_vectors, "Q": self.output_vectors, "values": self.values}

    @property
    def _full(self) -> bool:
        """Whether the columns span everything."""
        return self.values.numel() == self.numel

    @property
    def _vectors(self) -> tuple[Tensor, Tensor]:
        """Q and U in the order of the product."""
        return _ordered(self, self.input_vectors, self.output_vectors)

    @property
    def _values(self) -> Tensor:
        """The values in the order of the product: `[g,b,a]` or `[g,a,b]`."""
        return self.values.mT if self.inputs_first else self.values

    def _mm(self, matrix: Tensor) -> Tensor:
        first, second = self._vectors
        inside = _along_factors(matrix, (first.shape[1], second.shape[1]), first.mT.matmul, second.mT.matmul)
        scaled = self._back(self._values.reshape(-1, 1) * inside)
        if self._full or not self.rest:
            return scaled
        return scaled + self.rest * (matrix - self._back(inside))

    def _back(self, inside: Tensor) -> Tensor:
        """Q times coefficients `[g·b·a, k]`."""
        first, second = self._vectors
        return _along_factors(inside, (first.shape[2], second.shape[2]), first.matmul, second.matmul)

    def dense(self) -> Tensor:
        return self._mm(torch.eye(self.numel, dtype=self.values.dtype, device=self.values.device))

    def diag(self) -> Tensor:
        first, second = self._vectors
        squares = first.square() @ (self._values - self.rest) @ second.square().mT
        return (squares + self.rest).reshape(self.shape)

    def _mapped(self, f: Function) -> Eigenbasis:
        rest = 0.0 if self._full else float(f(self.values.new_full((), self.rest)))
        return replace(self, values=f(self.values.clamp(min=0)), rest=rest)

    @property
    def _like(self) -> Tensor:
        return self.values

    def eigvalsh(self) -> Tensor:
        values = self.values.flatten()
        return torch.cat([values, values.new_full((self.numel - len(values),), self.rest)]).sort().values

    def eigh(self) -> tuple[Tensor, Tensor]:
        if not self._full:
            return torch.linalg.eigh(self.dense())
        columns = self._back(torch.eye(self.numel, dtype=self.values.dtype, device=self.values.device))
        values, order = self._values.flatten().sort()
        return values, columns[:, order]

    def _changed(self, change: Callable[[Tensor | SecondMoment], Any]) -> Self:
        U, Q, values = (change(t) for t in self.tensors.values())
        return replace(self, input_vectors=U, output_vectors=Q, values=values)

    def __mul__(self, factor: float) -> Self:
        return replace(self, values=self.values * self._factor(factor), rest=self.rest * factor)


def _ordered(block: Kronecker | Eigenbasis, inputs: T, outputs: T) -> tuple[T, T]:
    """What belongs to a block's inputs and outputs, in the order of its product."""
    return (inputs, outputs) if block.inputs_first else (outputs, inputs)


def _along_factors(
    matrix: Tensor, sides: tuple[int, int], first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> Tensor:
    """(first ⊗ second) of columns `[g·p·q, k]`, each a function from `[g,d,m]` to `[g,d',m]`."""
    p, q = sides
    k = matrix.shape[-1]
    right = second(matrix.reshape(-1, p, q, k).transpose(1, 2).flatten(2))  # [g, q', p·k]
    right = right.unflatten(2, (p, k)).transpose(1, 2)  # [g, p, q', k]
    return first(right.flatten(2)).reshape(-1, k)


def _inverted(moment: Moment, damping: Tensor | float, what: str) -> Tensor:
    """The matrices (moment + damping I)⁻¹, `[g,d,d]`."""
    if isinstance(moment, Matrix):
        return torch.cholesky_inverse(cholesky(moment.entries, damping, what))
    like = moment.kept[0]
    identity = torch.eye(moment.side, dtype=like.dtype, device=like.device).expand(moment.shape)
    return moment.solve(identity, damping, what)


def _ungrouped(matrices: Tensor) -> Tensor:
    """`[d,d]`, or `[g,d,d]` of several groups."""
    return matrices[0] if len(matrices) == 1 else matrices


def _matrix(moment: Tensor | SecondMoment) -> Tensor:
    """The matrix `[d,d]`, or `[g,d,d]` of several groups."""
    return _ungrouped(moment_of(moment).dense())


def _entry(moment: Tensor | SecondMoment) -> Tensor:
    """A tensor that it holds."""
    return moment.kept[0] if isinstance(moment, SecondMoment) else moment


def _size(moment: Tensor | SecondMoment) -> torch.Size:
    """The shape of `_matrix`."""
    shape = moment_of(moment).shape
    return shape[1:] if shape[0] == 1 else shape
