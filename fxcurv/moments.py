"""Second moments that are kept as what they are made of, while that is smaller than the matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxcurv.gemm import transpose_times
from fxcurv.patches import Patches

__all__ = ["Matrix", "Moment", "SecondMoment", "formed", "moment_of"]


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """scale · Σ_m X_m X_mᵀ for every group, `[g,d,d]`, as the vectors X that it sums over.

    They are the positions `[*, s, g, d]` that are kept, or with `patches` the patches of the inputs that are kept. With
    fewer vectors than entries, r < d, it takes r·d numbers or fewer for d², and a system is solved with r equations.
    """

    kept: tuple[Tensor, ...]
    patches: Patches | None = None
    scale: float = 1.0

    def rows(self) -> Tensor:
        """The vectors, `[g, m, d]`, unscaled."""
        positions = self.kept if self.patches is None else [self.patches.positions(z) for z in self.kept]
        return torch.cat([x.flatten(0, -3) for x in positions]).transpose(0, 1)

    @property
    def side(self) -> int:
        """d."""
        first = self.kept[0]
        return first.shape[-1] if self.patches is None else first.shape[1] // self.patches.groups * self.patches.taps

    @property
    def count(self) -> int:
        """How many vectors each group has."""
        if self.patches is None:
            return sum(x.shape[:-2].numel() for x in self.kept)
        return sum(len(z) * torch.Size(self.patches.outputs(z)).numel() for z in self.kept)

    @property
    def shape(self) -> torch.Size:
        """[g, d, d]."""
        groups = self.kept[0].shape[-2] if self.patches is None else self.patches.groups
        return torch.Size((groups, self.side, self.side))

    def dense(self) -> Tensor:
        """The matrices, `[g,d,d]`."""
        if self.patches is not None:
            value = self.patches.covariance(torch.cat(self.kept))
        else:
            rows = self.rows()
            value = transpose_times(rows[0], rows[0]).unsqueeze(0) if len(rows) == 1 else rows.mT @ rows
        return value if self.scale == 1 else value.mul_(self.scale)

    def __add__(self, other: SecondMoment | Tensor) -> SecondMoment | Tensor:
        """The sum, kept in this form as long as that is smaller."""
        if isinstance(other, Tensor):
            return self.dense() + other
        alike = self.patches == other.patches and self.scale == other.scale
        if not alike or self.count + other.count >= self.side:
            return self.dense() + other.dense()
        return replace(self, kept=(*self.kept, *other.kept))

    __radd__ = __add__

    def __truediv__(self, divisor: float) -> SecondMoment:
        return replace(self, scale=self.scale / divisor)

    def clone(self) -> SecondMoment:
        """The same in memory of its own."""
        return replace(self, kept=tuple(t.clone() for t in self.kept))

    def diagonal(self) -> Tensor:
        """The diagonals, `[g,d]`."""
        return self.rows().square().sum(1) * self.scale

    def mm(self, matrix: Tensor) -> Tensor:
        """The product with `[g,d,k]`."""
        rows = self.rows()
        return rows.mT @ (rows @ matrix) * self.scale

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(A + damping·I)⁻¹ matrix, `[g,d,k]`, for damping > 0 (Woodbury's identity: r equations in place of d)."""
        rows = self.rows() * self.scale**0.5
        small = rows @ rows.mT
        small.diagonal(dim1=-2, dim2=-1).add_(damping)
        return (matrix - rows.mT @ torch.cholesky_solve(rows @ matrix, torch.linalg.cholesky(small))) / damping


@dataclass(frozen=True, eq=False)
class Matrix:
    """Second moments that are formed: `[g,d,d]`."""

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

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """(A + damping·I)⁻¹ matrix, `[g,d,k]`."""
        damped = self.entries.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping)
        return torch.cholesky_solve(matrix, torch.linalg.cholesky(damped))


Moment = Matrix | SecondMoment


def formed(value: Tensor | SecondMoment) -> Tensor:
    """A sum as a tensor."""
    return value.dense() if isinstance(value, SecondMoment) else value


def moment_of(value: Tensor | SecondMoment) -> Moment:
    """A moment, from a sum: `[d,d]` or `[g,d,d]`."""
    if isinstance(value, SecondMoment):
        return value
    return Matrix(value if value.ndim == 3 else value.unsqueeze(0))
