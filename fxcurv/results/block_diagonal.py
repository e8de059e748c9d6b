"""Block-diagonal operator of one quantity over all parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from fxcurv.blocks.base import Block, Damping
from fxcurv.blocks.diagonal import Diagonal
from fxcurv.core.errors import QuantityError
from fxcurv.linalg.operator import LinearOperator, Space, Vector
from fxcurv.results.entry import Entries, Entry

__all__ = ["BlockDiagonal", "PlacedBlock"]


@dataclass(frozen=True, eq=False)
class PlacedBlock:
    """A block and its entries of the flat vector: a slice, or `[numel]` indices for a joint block."""

    block: Block
    at: slice | Tensor


class BlockDiagonal(LinearOperator):
    """blockdiag(B_1, B_2, …) over the parameters of a quantity, in order; damping B + δI is as for a block.

    Unreached parameters have the block 0. Frozen parameters, and parameters without this quantity, are not part of
    the vectors. `domain.shapes` lists the parameters of the vectors.
    """

    def __init__(self, space: Space, parts: Sequence[PlacedBlock]) -> None:
        self.domain = self.codomain = space
        self.parts = tuple(parts)
        self.dtype, self.device = parts[0].block.dtype, parts[0].block.device

    @classmethod
    def of(cls, entries: Entries) -> BlockDiagonal:
        """Return the operator of a quantity; raise a QuantityError if it is not a matrix or has unsupported entries.

        A plain tensor is used as a diagonal.
        """
        taken = {name: entry for name, entry in entries.entries.items() if entry.status != "frozen"}
        blocks = {name: _block(entry) for name, entry in taken.items()}
        present = [block for block in blocks.values() if block is not None]
        if not present:
            raise QuantityError("no parameter has a block", remedy="see result.table()", code="FXC426")
        dtype = present[0].dtype
        for block in present[1:]:
            dtype = torch.promote_types(dtype, block.dtype)
        space = Space({name: entry.shape for name, entry in taken.items()})
        parts: list[PlacedBlock] = []
        for name, block in blocks.items():
            if block is None:
                zeros = torch.zeros(taken[name].shape, dtype=dtype, device=present[0].device)
                parts.append(PlacedBlock(Diagonal(zeros.shape, zeros, parameters=(name,)), space.slices[name]))
            elif block.parameters[0] == name:
                block = block if block.dtype == dtype else block.to(dtype=dtype)
                parts.append(PlacedBlock(block, _entries_of(block, space)))
        return cls(space, parts)

    # Vectors ----------------------------------------------------------------------------------------------------------

    def _mm(self, matrix: Tensor) -> Tensor:
        return self._each(matrix, lambda block, rows: block.mm(rows))

    def _each(self, matrix: Tensor, f: Callable[[Block, Tensor], Tensor]) -> Tensor:
        """Apply f to each block and its rows of `[numel, k]`."""
        result = torch.empty_like(matrix)
        for part in self.parts:
            result[part.at] = f(part.block, matrix[part.at])
        return result

    @overload
    def solve(self, v: Tensor, damping: float = 0.0) -> Tensor: ...
    @overload
    def solve(self, v: Mapping[str, Tensor], damping: float = 0.0) -> dict[str, Tensor]: ...
    def solve(self, v: Vector, damping: float = 0.0) -> Tensor | dict[str, Tensor]:
        """Return (B + δI)⁻¹ v, a dict for a dict; a singular block needs δ > 0."""
        flat = self.domain.flat(v).unsqueeze(1)
        solved = self._each(flat, lambda block, rows: block.solve(rows, damping))[:, 0]
        return solved if isinstance(v, Tensor) else self.domain.split(solved)

    def sample(self, generator: torch.Generator | None = None, damping: float = 0.0) -> dict[str, Tensor]:
        """Draw from N(0, (B + δI)⁻¹), by parameter."""
        like = torch.empty(self.domain.numel, 1, dtype=self.dtype, device=self.device)
        drawn = self._each(like, lambda block, _: block.sample(generator, damping).reshape(-1, 1))
        return self.domain.split(drawn[:, 0])

    def diag(self) -> dict[str, Tensor]:
        """Return the diagonal, by parameter."""
        like = torch.empty(self.domain.numel, 1, dtype=self.dtype, device=self.device)
        return self.domain.split(self._each(like, lambda block, _: block.diag().reshape(-1, 1))[:, 0])

    def dense(self) -> Tensor:
        """Return the matrix, `[numel, numel]`."""
        result = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        index = torch.arange(self.domain.numel, device=self.device)
        for part in self.parts:
            rows = index[part.at]
            result[rows.unsqueeze(1), rows] = part.block.dense()
        return result

    # Numbers ----------------------------------------------------------------------------------------------------------

    def trace(self) -> Tensor:
        """Return the trace."""
        return self._sum(lambda block: block.trace())

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return log det(B + δI); -inf if δ = 0 and a block is zero or singular to rounding."""
        return self._sum(lambda block: block.logdet(damping))

    def det(self, damping: float = 0.0) -> Tensor:
        """Return det(B + δI); it may overflow where `logdet` does not."""
        return self.logdet(damping).exp()

    def frobenius_norm(self) -> Tensor:
        """Return √Σ B_ij²."""
        return self._sum(lambda block: block.frobenius_norm().square()).sqrt()

    def eigvalsh(self) -> Tensor:
        """Return all eigenvalues, ascending: `[numel]`."""
        return torch.cat([part.block.eigvalsh() for part in self.parts]).sort().values

    def _sum(self, f: Callable[[Block], Tensor]) -> Tensor:
        return torch.stack([f(part.block) for part in self.parts]).sum()

    # Operators --------------------------------------------------------------------------------------------------------

    def inverse(self, damping: float = 0.0, method: Damping = "exact") -> BlockDiagonal:
        """Return (B + δI)⁻¹, each block damped by `method` (see `Kronecker.inverse`)."""
        return self._mapped(lambda block: block.inverse(damping, method))

    def decomposed(self) -> BlockDiagonal:
        """Return the decomposed operator; see `fxcurv.dataset.processes.mapped` for several processes."""
        return self._mapped(lambda block: block.decomposed())

    def sqrt(self) -> BlockDiagonal:
        """Return the symmetric root."""
        return self.power(0.5)

    def power(self, exponent: float) -> BlockDiagonal:
        """Return Bᵖ for real p; p < 0 requires nonsingular blocks."""
        return self._mapped(lambda block: block.power(exponent))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BlockDiagonal:
        """Return the operator on another device, or in another floating-point dtype."""
        moved = [
            PlacedBlock(part.block.to(device, dtype), part.at if isinstance(part.at, slice) else part.at.to(device))
            for part in self.parts
        ]
        return BlockDiagonal(self.domain, moved)

    def __mul__(self, factor: float) -> BlockDiagonal:
        return self._mapped(lambda block: block * factor)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """Add block by block if each pair of forms is closed under addition; otherwise return a lazy sum."""
        total = super().__add__(other)
        if not isinstance(other, BlockDiagonal) or len(self.parts) != len(other.parts):
            return total
        pairs = list(zip(self.parts, other.parts, strict=True))
        sums = [a.block.plus(b.block) if a.block.shape == b.block.shape else None for a, b in pairs]
        parts = [PlacedBlock(block, a.at) for block, (a, _) in zip(sums, pairs, strict=True) if block is not None]
        return BlockDiagonal(self.domain, parts) if len(parts) == len(pairs) else total

    @property
    def T(self) -> BlockDiagonal:
        """The operator itself, which is symmetric."""
        return self

    def _mapped(self, f: Callable[[Block], Block]) -> BlockDiagonal:
        return BlockDiagonal(self.domain, [PlacedBlock(f(part.block), part.at) for part in self.parts])


def _block(entry: Entry) -> Block | None:
    """Return the block of an entry, None for an unreached entry."""
    if entry.status == "unreached":
        return None
    cause = None
    if isinstance(entry.value, Tensor) and (entry.structure != "diagonal" or entry.value.shape != entry.shape):
        cause = f"{entry.quantity} is a vector, not a matrix"
    elif entry.value is None:
        cause = f"{entry.quantity} of {entry.parameter!r} has no value: {entry.status}"
    if cause:
        raise QuantityError(
            cause, remedy="compile with on_unsupported='fallback', or choose another quantity", code="FXC426"
        )
    value: Any = entry.value
    return Diagonal(entry.shape, value, parameters=(entry.parameter,)) if isinstance(value, Tensor) else value


def _entries_of(block: Block, space: Space) -> slice | Tensor:
    """Return the positions of a block in a flat vector; a joint block acts on [W | b], or on W with b below."""
    if len(block.parameters) == 1:
        return space.slices[block.parameters[0]]
    index = torch.arange(space.numel, device=block.device)
    W, b = (index[space.slices[name]] for name in block.parameters)
    rows = space.shapes[block.parameters[0]][0]
    return torch.cat([W, b]) if block.shape[0] != rows else torch.cat([W.view(rows, -1), b.view(-1, 1)], 1).flatten()
