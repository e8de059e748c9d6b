"""Linear operators on all parameters at once, which take and return flat vectors or dicts of parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from fxcurv.core.errors import FxcurvError, InputError

__all__ = ["LinearOperator", "Space", "Vector", "checked_count"]


Vector = Tensor | Mapping[str, Tensor]


CHUNK = 1 << 22
"""Number of entries of the columns that `dense()` multiplies at once."""


ENDS = ("LA", "SA", "LM", "SM", "BE")
"""The ends of a spectrum, as scipy calls them."""


@dataclass(frozen=True)
class Space:
    """Named tensors of these shapes, concatenated in order, each row-major: the layout of a flat vector."""

    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The slice of each tensor in a flat vector."""
        found: dict[str, slice] = {}
        start = 0
        for name, shape in self.shapes.items():
            found[name] = slice(start, start + math.prod(shape))
            start = found[name].stop
        return found

    @cached_property
    def numel(self) -> int:
        """Number of entries of a flat vector."""
        return sum(map(math.prod, self.shapes.values()))

    def flat(self, v: Vector) -> Tensor:
        """Flatten a vector to `[numel]`; raise an InputError if it has other names or sizes."""
        if isinstance(v, Tensor):
            if v.shape != (self.numel,):
                raise InputError(
                    f"a vector of shape {list(v.shape)} for {self.numel} entries",
                    remedy=f"give [{self.numel}], or a dict of tensors by name",
                    code="FXC411",
                )
            return v
        if set(v) != set(self.shapes):
            odd = ", ".join(sorted(set(v) ^ set(self.shapes))[:3])
            raise InputError(
                f"a vector whose names differ: {odd}", remedy=f"give {', '.join(self.shapes)}", code="FXC411"
            )
        for name, shape in self.shapes.items():
            if v[name].shape != shape:
                raise InputError(
                    f"{name!r} of shape {list(v[name].shape)}", remedy=f"give {list(shape)}", code="FXC411"
                )
        return torch.cat([v[name].reshape(-1) for name in self.shapes]) if v else torch.empty(0)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a flat vector into named tensors, views of it."""
        return {name: flat[at].view(self.shapes[name]) for name, at in self.slices.items()}


class LinearOperator(ABC):
    """A linear map from vectors of `domain` to vectors of `codomain`; it computes products and stores no matrix.

    A subclass defines `_mm` and, unless it is symmetric, `_rmm`. `dtype` and `device` are the vectors'.
    """

    domain: Space
    codomain: Space
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def _mm(self, matrix: Tensor) -> Tensor:
        """The product with the columns of `[domain.numel, k]`."""

    def _rmm(self, matrix: Tensor) -> Tensor:
        """The adjoint's product with `[codomain.numel, k]`; by default the same as `_mm`."""
        return self._mm(matrix)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the operator's matrix."""
        return self.codomain.numel, self.domain.numel

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns of the matrix; for a `Block`, the shape of its vectors."""
        return self.size

    @overload
    def mv(self, v: Tensor) -> Tensor: ...
    @overload
    def mv(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def mv(self, v: Vector) -> Tensor | dict[str, Tensor]:
        """The product with a vector: flat for a flat vector, a dict for a dict."""
        product = self._mm(self.domain.flat(v).unsqueeze(1))[:, 0]
        return product if isinstance(v, Tensor) else self.codomain.split(product)

    def mm(self, matrix: Tensor) -> Tensor:
        """The product with the columns of `[domain.numel, k]`."""
        if matrix.ndim != 2 or len(matrix) != self.domain.numel:
            raise InputError(
                f"a matrix of shape {list(matrix.shape)} for an operator of shape {list(self.size)}",
                remedy=f"give [{self.domain.numel}, k]",
                code="FXC411",
            )
        return self._mm(matrix)

    def __matmul__(self, right: Any) -> Any:
        """`mm` of a matrix, `mv` of a vector or a dict."""
        return self.mm(right) if isinstance(right, Tensor) and right.ndim == 2 else self.mv(right)

    @property
    def T(self) -> LinearOperator:
        """The adjoint."""
        return _Adjoint(self)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """The sum of two operators between the same spaces."""
        if not isinstance(other, LinearOperator):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        if (self.domain, self.codomain) != (other.domain, other.codomain):
            raise InputError(
                f"the operators {list(self.size)} and {list(other.size)} act on different spaces",
                remedy="add operators on the same parameters",
                code="FXC426",
            )
        return _Sum(self, other)

    def __mul__(self, factor: float) -> LinearOperator:
        return _Scaled(self, float(factor))

    def __rmul__(self, factor: float) -> LinearOperator:
        return self * factor

    def dense(self) -> Tensor:
        """The matrix, column by column."""
        n = self.domain.numel
        size = max(1, CHUNK // max(1, n))
        identity = torch.eye(n, dtype=self.dtype, device=self.device)
        return torch.cat([self._mm(identity[:, k : k + size]) for k in range(0, n, size)], 1)

    def to_scipy(self) -> Any:
        """Convert to a `scipy.sparse.linalg.LinearOperator`, which converts from and to numpy (extra `scipy`)."""
        linalg, out = _scipy(), torch.float32 if self.dtype.itemsize < 4 else self.dtype

        def converted(multiply: Any) -> Any:
            def product(array: Any) -> Any:
                given = torch.as_tensor(array).to(device=self.device, dtype=self.dtype)
                return multiply(given.reshape(len(given), -1)).to("cpu", out).reshape(-1, *given.shape[1:]).numpy()

            return product

        forth, back = converted(self._mm), converted(self._rmm)
        dtype = torch.empty(0, dtype=out).numpy().dtype
        return linalg.LinearOperator(self.size, matvec=forth, matmat=forth, rmatvec=back, rmatmat=back, dtype=dtype)

    def eigsh(self, k: int = 6, which: str = "LA", tol: float = 0.0) -> tuple[Tensor, Tensor]:
        """k eigenvalues, ascending, `[k]`, and eigenvectors `[n, k]` of a symmetric operator, by Lanczos' method.

        `which` selects the largest ("LA"), the smallest ("SA"), the largest or smallest in magnitude ("LM", "SM") or
        both ends ("BE"). `tol` is the relative accuracy, 0 for the accuracy of the dtype. The starting vector is always
        the same.
        """
        self.require_square()
        n = self.size[0]
        checked_count("k", k, max(1, n - 1))
        if which not in ENDS:
            raise InputError(f"which={which!r}", remedy=f"choose one of {', '.join(ENDS)}", code="FXC426")
        if n == 1:
            one = torch.ones(1, 1, dtype=self.dtype, device=self.device)
            return self._mm(one)[0], one
        start = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        linalg = _scipy()
        try:
            values, vectors = linalg.eigsh(self.to_scipy(), k, which=which, tol=tol, v0=start.numpy())
        except linalg.ArpackError as error:
            if not bool(self._mm(start.to(device=self.device, dtype=self.dtype).unsqueeze(1)).any()):  # the operator 0
                identity = torch.eye(n, k, dtype=self.dtype, device=self.device)
                return identity.new_zeros(k), identity
            raise FxcurvError(
                f"Lanczos' method failed: {error}", remedy="give a larger tol, or another k", code="FXC426"
            ) from error
        order = values.argsort()
        columns = torch.as_tensor(vectors[:, order].copy()), torch.as_tensor(values[order].copy())
        vectors, values = (t.to(device=self.device, dtype=self.dtype) for t in columns)
        return values, vectors

    def require_square(self) -> None:
        """Raise an error unless the operator maps a space to itself."""
        if self.domain != self.codomain:
            raise FxcurvError(
                f"an operator of shape {list(self.size)} has no eigenvalues, trace or diagonal",
                remedy="take the Gram matrix, A.T @ (A @ v), or a square operator",
                code="FXC426",
            )


def checked_count(name: str, count: int, most: float = math.inf) -> int:
    """Return a whole number ≥ 1, at most `most`; raise an InputError otherwise."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:  # pyright: ignore[reportUnnecessaryIsInstance]
        limit = "on" if most == math.inf else f"to {most:g}"
        raise InputError(f"{name}={count!r}", remedy=f"give a whole number from 1 {limit}", code="FXC426")
    return count


def _scipy() -> Any:
    try:
        import scipy.sparse.linalg as linalg
    except ImportError:
        raise FxcurvError("this needs the scipy package", remedy='pip install "fxcurv[scipy]"', code="FXC006") from None
    return linalg


class _Of(LinearOperator):
    """An operator derived from another, between the same spaces."""

    def __init__(self, first: LinearOperator) -> None:
        self.first, self.domain, self.codomain = first, first.domain, first.codomain
        self.dtype, self.device = first.dtype, first.device


class _Adjoint(_Of):
    def __init__(self, first: LinearOperator) -> None:
        super().__init__(first)
        self.domain, self.codomain = first.codomain, first.domain

    def _mm(self, matrix: Tensor) -> Tensor:
        return self.first._rmm(matrix)

    def _rmm(self, matrix: Tensor) -> Tensor:
        return self.first._mm(matrix)

    @property
    def T(self) -> LinearOperator:
        return self.first


class _Scaled(_Of):
    def __init__(self, first: LinearOperator, factor: float) -> None:
        super().__init__(first)
        self.factor = factor

    def _mm(self, matrix: Tensor) -> Tensor:
        return self.first._mm(matrix) * self.factor

    def _rmm(self, matrix: Tensor) -> Tensor:
        return self.first._rmm(matrix) * self.factor


class _Sum(_Of):
    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        super().__init__(first)
        self.second = second

    def _mm(self, matrix: Tensor) -> Tensor:
        return self.first._mm(matrix) + self.second._mm(matrix)

    def _rmm(self, matrix: Tensor) -> Tensor:
        return self.first._rmm(matrix) + self.second._rmm(matrix)
