"""Block: the interface of every kind of block.

Blocks B are used with a damping δ ≥ 0, in the units of the curvature: solving, sampling and inverting use B + δI. Do
not write into a block's tensors: decompositions are cached with it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self, get_args, overload

import torch
from torch import Tensor

from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.core.errors import InputError
from fxcurv.core.identity import frozen
from fxcurv.core.registry import register
from fxcurv.linalg.factorizations import damping_of, singular
from fxcurv.linalg.operator import LinearOperator, Space, Vector

__all__ = ["Block", "Damping", "Function", "differing"]


Damping = Literal["plain", "pi", "exact"]
"""How the inverse of Kronecker factors is damped; kinds without factors support `exact` only."""


Function = Callable[[Tensor], Tensor]
"""A function of eigenvalues, elementwise."""


KINDS: dict[str, type[Block]] = {}
"""All kinds of block by class name; a subclass of `Block` registers itself."""


Component = Tensor | LazyGram
"""A tensor of a block, or a lazy Gram."""


@dataclass(frozen=True, eq=False)
class Block(LinearOperator, ABC):
    """An operator on vectors of `shape` (the parameter's, or `[o, i+1]` or `[i+1, o]` for a joint weight and bias).

    `parameters` are the names of its parameters, `status` says whether it is exact to its definition, and `reduction`
    how the loss scales it.

    A kind of block is a dataclass that declares its contents: `fields`, the parts by their names in files, and
    `options`, plain numbers. Files, processes, merging and running averages use only these.
    """

    fields: ClassVar[Mapping[str, str]] = {}
    """Maps the name of each part in a file to the attribute that holds it."""
    options: ClassVar[Mapping[str, type]] = {}
    """The attributes that are plain numbers, and their types."""
    symmetric: ClassVar[bool] = False
    """Whether every part is a symmetric matrix, or one per group."""
    additive: ClassVar[bool] = True
    """Whether the blocks of two batches combine part by part."""

    shape: tuple[int, ...] = field()  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    parameters: tuple[str, ...] = field(default=(), kw_only=True)
    status: str = field(default="exact", kw_only=True)
    reduction: str = field(default="sum", kw_only=True)

    def __init_subclass__(cls) -> None:
        register(KINDS, cls.__name__, cls, "kind of block")

    # Defined by each kind ---------------------------------------------------------------------------------------------

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
        """A tensor of the block's dtype and device."""

    @abstractmethod
    def eigvalsh(self) -> Tensor:
        """All eigenvalues, ascending: `[numel]`."""

    @abstractmethod
    def eigh(self) -> tuple[Tensor, Tensor]:
        """All eigenvalues, ascending, `[numel]`, and an orthonormal basis of eigenvectors, `[numel, numel]`."""

    @classmethod
    @abstractmethod
    def fits(cls, shape: tuple[int, ...], sizes: Sequence[torch.Size]) -> bool:
        """Whether parts of these sizes make a block on vectors of this shape."""

    @abstractmethod
    def __mul__(self, factor: float) -> Self:
        """The block times a number ≥ 0."""

    # Parts ------------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[Component, ...]:
        """The parts in the order of `fields`."""
        return tuple(getattr(self, name) for name in self.fields.values())

    def with_parts(self, parts: Iterable[Component]) -> Self:
        """The block with other parts."""
        return replace(self, **dict(zip(self.fields.values(), parts, strict=True)))

    def mapped(self, change: Callable[[Component], Component]) -> Self:
        """Apply `change` to every part."""
        return self.with_parts(map(change, self.parts))

    @property
    def layout(self) -> object:
        """Settings that two blocks must share, besides their shape, to be added part by part: all options but `count`.

        A kind whose blocks with different values of an option combine overrides it, with `averaged_with`.
        """
        alike = self if self.count is None else self.counted(0)
        return tuple((name, frozen(getattr(alike, name))) for name in self.options)

    @property
    def count(self) -> int | None:
        """Number of inputs that a part averages, 0 if unknown; None for a kind without such a part."""
        return None

    def counted(self, count: int) -> Self:
        """The block whose part averages `count` inputs."""
        return self

    def weights(self, terms: float, inputs: float) -> tuple[float, ...]:
        """The weight of each part in a sum over batches: of loss terms, or of inputs for a part that averages these."""
        return (terms,) * len(self.fields)

    def weighted_sum(self, other: Self, terms: tuple[float, float], inputs: tuple[float, float] | None) -> Self:
        """terms[0] · self + terms[1] · other, part by part; without `inputs`, all parts use the weights of terms."""
        ours, theirs = (self.weights(t, t if inputs is None else inputs[k]) for k, t in enumerate(terms))
        pairs = zip(self.parts, other.parts, ours, theirs, strict=True)
        total = self.with_parts(_sum(a if v == 1 else a * v, b if w == 1 else b * w) for a, b, v, w in pairs)
        return total.counted(0 if inputs is None else (self.count or 0) + (other.count or 0))

    def averaged_with(self, old: Self, weight: float) -> Self:
        """weight · old + (1 - weight) · self: a step of a running average, for blocks of one layout."""
        return self.weighted_sum(old, (1 - weight, weight), None)

    @property
    def decomposition_cost(self) -> int:
        """Multiplications of a decomposition or inverse, up to a factor: Σ d³ over the matrices of side d."""
        return sum(size.numel() * size[-1] for size in self.sizes.values()) if self.symmetric else self.numel

    # Derived ----------------------------------------------------------------------------------------------------------

    @cached_property
    def domain(self) -> Space:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The space of vectors that the block acts on, under the names of its parameters."""
        return Space({" + ".join(self.parameters) or "block": self.shape})

    @property
    def codomain(self) -> Space:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The space of its results: the same as `domain`."""
        return self.domain

    @property
    def T(self) -> Self:
        """The block itself: it is symmetric."""
        return self

    @property
    def numel(self) -> int:
        """Number of entries of a vector."""
        return math.prod(self.shape)

    @property
    def invariants(self) -> dict[str, Tensor]:
        """Tensors that the operator determines, for comparing two blocks."""
        return self.tensors

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The device of its tensors."""
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dtype of its tensors."""
        return self._like.dtype

    @property
    def sizes(self) -> dict[str, torch.Size]:
        """The shapes of the stored tensors, without forming any."""
        return {name: t.shape for name, t in self.tensors.items()}

    @property
    def name(self) -> str:
        """The block's name in messages, from its parameters."""
        return f"the block of {' and '.join(map(repr, self.parameters)) or 'no parameter'}"

    def trace(self) -> Tensor:
        """The trace, a scalar tensor."""
        return self.diag().sum()

    def frobenius_norm(self) -> Tensor:
        """√Σ B_ij², a scalar tensor."""
        return torch.linalg.vector_norm(self.eigvalsh())

    @overload
    def mv(self, v: Tensor) -> Tensor: ...
    @overload
    def mv(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def mv(self, v: Vector) -> Tensor | dict[str, Tensor]:
        """B v for a vector of the block's shape, a flat one or a dict; the result has the structure of `v`."""
        if not isinstance(v, Tensor):
            return super().mv(v)
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

    def __matmul__(self, right: Any) -> Any:
        """`mm` of a matrix `[numel, k]`, `mv` of anything else."""
        matrix = isinstance(right, Tensor) and right.ndim == 2 and tuple(right.shape) != self.shape
        return self.mm(right) if matrix else self.mv(right)

    @overload
    def solve(self, v: Tensor, damping: float = 0.0) -> Tensor: ...
    @overload
    def solve(self, v: Mapping[str, Tensor], damping: float = 0.0) -> dict[str, Tensor]: ...
    def solve(self, v: Vector, damping: float = 0.0) -> Tensor | dict[str, Tensor]:
        """(B + δI)⁻¹ v, in the structure of `v`, as for `mv`; a singular block needs δ > 0."""
        if not isinstance(v, Tensor):
            return self.domain.split(self.solve(self.domain.flat(v), damping))
        return self._solve(self._column(v), self._damped(damping)).reshape(v.shape)

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        self._require_regular(damping)
        return self._mapped(lambda x: 1 / (x + damping))._mm(columns)

    def inverse(self, damping: float = 0.0, method: Damping = "exact") -> Block:
        """(B + δI)⁻¹ as a block; `Kronecker.inverse` describes the methods."""
        if method not in get_args(Damping):
            raise InputError(f"method={method!r}", remedy=f"choose one of {get_args(Damping)}", code="FXC421")
        return self._inverse(self._damped(damping), method)

    def _inverse(self, damping: float, method: Damping) -> Block:
        self._require_regular(damping)
        return self._mapped(lambda x: 1 / (x + damping))

    def decomposed(self) -> Block:
        """The same operator, already decomposed: the matrix, or the factors, in their eigenvectors."""
        return self

    def sqrt(self) -> Block:
        """The symmetric root: R R = B."""
        return self.power(0.5)

    def power(self, exponent: float) -> Block:
        """Bᵖ of the same kind, for any real p; p < 0 needs a nonsingular block. B⁰ = I."""
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
        """det(B + δI), a scalar tensor; may overflow where `logdet` does not."""
        return self.logdet(damping).exp()

    def sample(self, generator: torch.Generator | None = None, damping: float = 0.0) -> Tensor:
        """Draw from N(0, (B + δI)⁻¹), of the block's shape: B + δI is the precision, as in a Laplace approximation."""
        damping = self._damped(damping)
        self._require_regular(damping)
        noise = torch.randn(self.numel, 1, dtype=self.dtype, device=self.device, generator=generator)
        return self._mapped(lambda x: (x + damping).rsqrt())._mm(noise).reshape(self.shape)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The block on another device, or in another floating-point dtype."""
        return self.mapped(lambda t: t.to(device=device, dtype=dtype))

    def as_dense(self) -> Block:
        """The same operator as a `Dense` block."""
        make: Any = KINDS["Dense"]
        return make(self.shape, self.dense(), **self.labels)

    @overload
    def __add__(self, other: Block) -> Block: ...
    @overload
    def __add__(self, other: LinearOperator) -> LinearOperator: ...
    def __add__(self, other: LinearOperator) -> LinearOperator:
        """The sum of two blocks of a kind that is closed under addition; add others as `a.as_dense() + b.as_dense()`.

        The sum of two Kronecker products is not a Kronecker product, unless they share a factor.
        """
        if not isinstance(other, Block):
            return super().__add__(other)
        if self.shape != other.shape:
            raise InputError(
                f"{self.name}, {list(self.shape)}, plus {other.name}, {list(other.shape)}",
                remedy="add blocks of one shape",
                code="FXC422",
            )
        total = self.plus(other)
        if total is None:
            cause = f"the sum of a {type(self).__name__} and a {type(other).__name__} block is of neither kind"
            if type(self) is type(other) and self.layout != other.layout:
                cause = f"two {type(self).__name__} blocks have different options: {differing(self, other)}"
            raise InputError(
                cause,
                remedy="add a.as_dense() + b.as_dense()",
                code="FXC422",
            )
        return total

    def plus(self, other: Block) -> Block | None:
        """The sum as a block of the same kind, if it is one; else None."""
        if type(other) is not type(self) or not self.additive or len(self.fields) > 1 or other.layout != self.layout:
            return None
        return self.weighted_sum(other, (1, 1), None)

    def __rmul__(self, factor: float) -> Self:
        return self * factor

    def _factor(self, factor: float) -> float:
        """Check a factor to multiply a block with."""
        if not 0 <= factor < math.inf:
            raise InputError(
                f"a block times {factor!r}", remedy="blocks are positive semi-definite: give 0 or more", code="FXC422"
            )
        return factor

    def _damped(self, damping: float) -> float:
        return damping_of(damping)

    def _column(self, v: Tensor) -> Tensor:
        """v as `[numel, 1]`."""
        flat = v.ndim < 2 or v.shape[1:] == (1,)
        if v.numel() != self.numel or not (flat or tuple(v.shape) == tuple(self.shape)):
            raise InputError(
                f"a vector of shape {list(v.shape)} for a block on {list(self.shape)}",
                remedy=f"give {self.numel} entries, in the shape {list(self.shape)} or flat",
                code="FXC411",
            )
        return v.reshape(-1, 1)

    def _require_regular(self, damping: float) -> None:
        """Raise an error if the block is singular."""
        for what, found, side in () if damping else self._ranks():
            if found < side:
                raise singular(what, found, side)

    def _ranks(self) -> Iterator[tuple[str, int, int]]:
        """The name, rank and side of each matrix to test for singularity; stored eigenvalues are used directly."""
        yield self.name, int((self.eigvalsh() > 0).sum()), self.numel

    @property
    def labels(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "status": self.status, "reduction": self.reduction}


def differing(a: Block, b: Block) -> str:
    """Describe the options of two blocks of one kind that differ: `scale is 1.0 and 2.0`."""
    pairs = ((name, getattr(a, name), getattr(b, name)) for name in a.options)
    return ", ".join(f"{name} is {x!r} and {y!r}" for name, x, y in pairs if frozen(x) != frozen(y)) or "their layout"


def _sum(a: Component, b: Component) -> Component:
    return a + b
