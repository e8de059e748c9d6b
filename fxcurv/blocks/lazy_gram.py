"""Symmetric matrices Σ X Xᵀ, per group: `LazyGram` stores the vectors X, `Matrix` the entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxcurv.convolution.patches import Patches
from fxcurv.convolution.second_moment import second_moment
from fxcurv.linalg.factorizations import cholesky, decomposed, singular, without_rounding
from fxcurv.linalg.matmul import transpose_times

__all__ = ["LazyGram", "Matrix", "Moment", "formed", "moment_of"]


def damped_inverse(moment: Moment, damping: Tensor | float, what: str) -> Tensor:
    """Return (moment + damping I)⁻¹, `[g,d,d]`."""
    if isinstance(moment, Matrix):
        return torch.cholesky_inverse(cholesky(moment.entries, damping, what))
    like = moment.vectors[0]
    identity = torch.eye(moment.side, dtype=like.dtype, device=like.device).expand(moment.shape)
    return moment.solve(identity, damping, what)


def ungrouped(matrices: Tensor) -> Tensor:
    """Return `[d,d]`, or `[g,d,d]` for several groups."""
    return matrices[0] if len(matrices) == 1 else matrices


def matrix_of(moment: Tensor | LazyGram) -> Tensor:
    """Return the matrix `[d,d]`, or `[g,d,d]` for several groups."""
    return ungrouped(moment_of(moment).dense())


def an_entry(moment: Tensor | LazyGram) -> Tensor:
    """Return one of its tensors."""
    return moment.vectors[0] if isinstance(moment, LazyGram) else moment


def shape_of(moment: Tensor | LazyGram) -> torch.Size:
    """Shape of `matrix_of`."""
    shape = moment_of(moment).shape
    return shape[1:] if shape[0] == 1 else shape


@dataclass(frozen=True, eq=False)
class LazyGram:
    """scale · Σ_m X_m X_mᵀ per group, `[g,d,d]`, stored as the vectors X.

    The vectors are stored as positions `[*, s, g, d]`, or with `patches` as inputs whose patches they are. With fewer
    vectors than entries, r < d, it stores at most r·d numbers in place of d², and a system is solved with r equations.
    """

    vectors: tuple[Tensor, ...]
    patches: Patches | None = None
    scale: float = 1.0

    def smaller(self) -> LazyGram | Tensor:
        """Return this, or the matrices if they are smaller."""
        return self if self.count < self.side else self.dense()

    def rows(self) -> Tensor:
        """The vectors, `[g, m, d]`, unscaled."""
        positions = self.vectors if self.patches is None else [self.patches.positions(z) for z in self.vectors]
        return torch.cat([x.flatten(0, -3) for x in positions]).transpose(0, 1)

    @property
    def side(self) -> int:
        """d."""
        first = self.vectors[0]
        return first.shape[-1] if self.patches is None else first.shape[1] // self.patches.groups * self.patches.taps

    @property
    def count(self) -> int:
        """Number of vectors per group."""
        if self.patches is None:
            return sum(x.shape[:-2].numel() for x in self.vectors)
        return sum(len(z) * self.patches.pixels(z) for z in self.vectors)

    @property
    def shape(self) -> torch.Size:
        """[g, d, d]."""
        groups = self.vectors[0].shape[-2] if self.patches is None else self.patches.groups
        return torch.Size((groups, self.side, self.side))

    def dense(self) -> Tensor:
        """The matrices, `[g,d,d]`."""
        if self.scale <= 0:  # for a difference
            return replace(self, scale=1.0).dense().mul_(self.scale)
        vectors = [t if self.scale == 1 else t * self.scale**0.5 for t in self.vectors]  # smaller than the matrices
        if self.patches is not None:
            return second_moment(self.patches, torch.cat(vectors)).covariance()
        rows = replace(self, vectors=tuple(vectors)).rows()
        return transpose_times(rows[0], rows[0]).unsqueeze(0) if len(rows) == 1 else rows.mT @ rows

    def __add__(self, other: LazyGram | Tensor) -> LazyGram | Tensor:
        """The sum, as a lazy Gram while that is smaller."""
        if isinstance(other, Tensor):
            return self.dense() + other
        if self.patches != other.patches or self.count + other.count >= self.side or self.scale <= 0:
            return self.dense() + other.dense()
        ratio = (other.scale / self.scale) ** 0.5
        return replace(self, vectors=(*self.vectors, *(t if ratio == 1 else t * ratio for t in other.vectors)))

    __radd__ = __add__

    def __mul__(self, factor: float) -> LazyGram:
        return replace(self, scale=self.scale * factor)

    def __truediv__(self, divisor: float) -> LazyGram:
        return replace(self, scale=self.scale / divisor)

    def clone(self) -> LazyGram:
        """A copy in its own memory."""
        return replace(self, vectors=tuple(t.clone() for t in self.vectors))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LazyGram:
        """The lazy Gram on another device or in another dtype."""
        return replace(self, vectors=tuple(t.to(device=device, dtype=dtype) for t in self.vectors))

    def diagonal(self) -> Tensor:
        """The diagonals, `[g,d]`."""
        return self.rows().square().sum(1) * self.scale

    def mm(self, matrix: Tensor) -> Tensor:
        """The product with `[g,d,k]`."""
        rows = self.rows()
        return rows.mT @ (rows @ matrix) * self.scale

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norms, `[g]`, from r × r products."""
        rows = self.rows()
        return torch.linalg.matrix_norm(rows @ rows.mT) * self.scale

    def eigen(self, what: str = "the matrix") -> tuple[Tensor, Tensor]:
        """Eigenvalues `[g,r]` and orthonormal eigenvectors `[g,d,r]`; the null-space eigenvalue is 0.

        They come from the singular value decomposition of the r × d matrix of vectors, so nothing is squared. Singular
        values that are zero to rounding are set to zero: a small power would make them large.
        """
        if self.count >= self.side:
            return Matrix(self.dense()).eigen(what)
        values, vectors = decomposed(_right_singular, self.rows() * self.scale**0.5, what)
        return without_rounding(values, self.side).square(), vectors.mT

    def solve(self, matrix: Tensor, damping: Tensor | float, what: str = "the matrix") -> Tensor:
        """(A + damping·I)⁻¹ matrix, `[g,d,k]` (Woodbury's identity: r equations in place of d); damping may be `[g]`.

        Without damping it raises an error, naming the matrix by `what`, unless there are as many vectors as entries.
        """
        shift = torch.as_tensor(damping, dtype=matrix.dtype, device=matrix.device).reshape(-1, 1, 1)
        if self.count >= self.side:
            return Matrix(self.dense()).solve(matrix, damping, what)
        if not bool((shift > 0).all()):
            raise singular(what, self.count, self.side)
        rows = self.rows() * self.scale**0.5
        root = cholesky(rows @ rows.mT, damping, what)
        return (matrix - rows.mT @ torch.cholesky_solve(rows @ matrix, root)) / shift


@dataclass(frozen=True, eq=False)
class Matrix:
    """Formed matrices, `[g,d,d]`."""

    entries: Tensor

    @property
    def shape(self) -> torch.Size:
        """[g, d, d]."""
        return self.entries.shape

    def dense(self) -> Tensor:
        """The matrices, `[g,d,d]`."""
        return self.entries

    def diagonal(self) -> Tensor:
        """The diagonals, `[g,d]`."""
        return self.entries.diagonal(dim1=-2, dim2=-1)

    def mm(self, matrix: Tensor) -> Tensor:
        """The product with `[g,d,k]`."""
        return self.entries @ matrix

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norms, `[g]`."""
        return torch.linalg.matrix_norm(self.entries)

    def eigen(self, what: str = "the matrix") -> tuple[Tensor, Tensor]:
        """Eigenvalues `[g,d]`, those that are zero to rounding set to zero, and orthonormal eigenvectors `[g,d,d]`."""
        values, vectors = decomposed(torch.linalg.eigh, self.entries, what)
        return without_rounding(values, self.entries.shape[-1]), vectors

    def solve(self, matrix: Tensor, damping: Tensor | float, what: str = "the matrix") -> Tensor:
        """(A + damping·I)⁻¹ matrix, `[g,d,k]`; damping may be `[g]`; `what` names the matrix in errors."""
        return torch.cholesky_solve(matrix, cholesky(self.entries, damping, what))


def _right_singular(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values `[g,r]` and right singular vectors `[g,r,d]`."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return values, vectors


Moment = Matrix | LazyGram


def formed(value: Tensor | LazyGram) -> Tensor:
    """Return a sum as a tensor."""
    return value.dense() if isinstance(value, LazyGram) else value


def moment_of(value: Tensor | LazyGram) -> Moment:
    """Return a sum `[d,d]` or `[g,d,d]` as a `Moment`."""
    if isinstance(value, LazyGram):
        return value
    return Matrix(value if value.ndim == 3 else value.unsqueeze(0))


def grouped_sides(sizes: Sequence[torch.Size]) -> list[tuple[int, int]]:
    """(g, d) of symmetric matrices `[d,d]` or `[g,d,d]`; an empty list if any has another shape."""
    if not all(len(size) in (2, 3) and size[-1] == size[-2] for size in sizes):
        return []
    return [(1 if len(size) == 2 else size[0], size[-1]) for size in sizes]
