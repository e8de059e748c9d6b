"""Inner products of the columns of samples, from the columns themselves or from their positions.

A parameter's column at sample n is J[v,n,g,o,i] = Σ_s S[v,n,s,g,o] x[n,s,g,i]. For two of them ⟨J_vn, J'_wm⟩ = Σ_g Σ_st
(x_ns x'_mt) (S_vns S'_wmt), which forms no J: cheaper for few positions relative to weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxcurv.contractions.definitions import Columns, Inputs, Outputs
from fxcurv.contractions.entries import CHUNK, per_sample
from fxcurv.contractions.statistic import Statistic, StatisticValue
from fxcurv.linalg.matmul import times_transpose
from fxcurv.quantities.protocol import ParameterUsage

__all__ = [
    "ROOM",
    "StoredColumns",
    "Strategy",
    "products",
    "room_needed",
    "stored_columns",
    "stored_like",
    "stored_of",
]


Strategy = Literal["jacobian", "structured"]


ROOM = 1 << 28
"""Number of temporary entries that products form at once, unless a single sample needs more."""


@dataclass(frozen=True, eq=False)
class StoredColumns:
    """One parameter's columns as positions `S[v,n,s,g,o]` and `x[n,s,g,i]`; without x they are entries S[v,n,1,1,p]."""

    S: Tensor
    x: Tensor | None = None

    @property
    def numel(self) -> int:
        """Number of entries of one column."""
        return self.S.shape[3:].numel() * (1 if self.x is None else self.x.shape[-1])

    def part(self, samples: slice) -> StoredColumns:
        """The columns of some samples."""
        return StoredColumns(self.S[:, samples], None if self.x is None else self.x[samples])

    def entries(self) -> Tensor:
        """J[v,n,g·o·i]."""
        return self.S.flatten(2) if self.x is None else per_sample([self.x], [self.S]).flatten(2)


def stored_columns(usage: ParameterUsage, strategy: Strategy | None = None) -> dict[str, Statistic]:
    """The statistics that store a parameter's columns: positions if fewer than entries, or as `strategy` says."""
    return {"x": Inputs(), "S": Outputs()} if _as_positions(usage, strategy) else {"entries": Columns()}


def _as_positions(usage: ParameterUsage, strategy: Strategy | None) -> bool:
    positions = usage.positions * (usage.inputs + usage.outputs)
    fewer = positions < usage.inputs * usage.outputs if strategy is None else strategy == "structured"
    return usage.matrix and fewer


def stored_of(sums: Mapping[str, StatisticValue]) -> StoredColumns:
    """The columns, from the sums of `stored_columns`."""
    tensors = {name: t for name, t in sums.items() if isinstance(t, Tensor)}
    if "entries" in tensors:
        return StoredColumns(tensors["entries"].flatten(2)[:, :, None, None, :])
    return StoredColumns(tensors["S"], tensors["x"])


def stored_like(usage: ParameterUsage, strategy: Strategy | None, columns: int, samples: int) -> StoredColumns:
    """The shapes of the columns stored by `stored_columns`, for a number of columns and samples."""
    if not _as_positions(usage, strategy):
        return StoredColumns(torch.empty(columns, samples, 1, 1, usage.numel, device="meta"))
    lead = samples, usage.positions, usage.groups
    x = torch.empty(*lead, usage.inputs, device="meta")
    return StoredColumns(torch.empty(columns, *lead, usage.outputs, device="meta"), x)


def products(
    left: StoredColumns, right: StoredColumns, alike: bool = False, strategy: Strategy | None = None, room: int = ROOM
) -> Tensor:
    """K[v,n,w,m] = ⟨J_vn, J'_wm⟩, or with `alike` for equal columns v = w only: [v,n,m].

    At most `room` temporary entries are formed, unless one sample on each side needs more (`room_needed`).
    """
    if _structured(left, right, alike, strategy):
        return _by_positions(left, right, alike, min(room, 2 * CHUNK))
    return _by_entries(left, right, alike, room)


def room_needed(left: StoredColumns, right: StoredColumns, alike: bool, strategy: Strategy | None, room: int) -> int:
    """Number of temporary entries that `products` forms, from the shapes of its arguments."""
    (v, n, s), (w, m, t) = left.S.shape[:3], right.S.shape[:3]
    if _structured(left, right, alike, strategy):
        rows, others = _pairs_at_once(left, right, alike, min(room, 2 * CHUNK))
        both = left.S[0].numel() + right.S.numel() + (right.x.numel() if right.x is not None else 0)
        return rows * s * others * t * (1 + 2 * (1 if alike else w)) + both
    rows, others = _samples_at_once(left, right, room)
    block = 0 if (rows, others) == (n, m) else v * rows * (1 if alike else w) * others
    return _formed(left, rows) + (0 if left is right and rows == n else _formed(right, others)) + block


def _structured(left: StoredColumns, right: StoredColumns, alike: bool, strategy: Strategy | None) -> bool:
    """Whether to multiply positions: they are stored, and `strategy` requests it or it takes fewer operations."""
    if left.x is None or right.x is None or strategy == "jacobian":
        return False
    (v, n, s, _, o), (w, m, t, _, _), i = left.S.shape, right.S.shape, left.x.shape[-1]
    columns = v if alike else v * w
    cheaper = n * m * s * t * (i + columns * o) < o * i * (v * n * s + w * m * t + n * m * columns)
    return strategy == "structured" or cheaper


# By entries -------------------------------------------------------------------------------------------------------


def _formed(columns: StoredColumns, samples: int) -> int:
    """Maximum number of temporary entries while forming the matrix of entries of a number of samples."""
    if columns.x is None:
        return 0
    s, groups = columns.S.shape[2:4]
    entries = len(columns.S) * columns.numel
    return samples * (entries if s == 1 else (1 if groups == 1 else 2) * entries + columns.S[:, 0].numel())


def _samples_at_once(left: StoredColumns, right: StoredColumns, room: int) -> tuple[int, int]:
    """Numbers of samples on each side to form entries for: many on the left, as the right is formed per part."""
    n, m, one, other = left.S.shape[1], right.S.shape[1], _formed(left, 1), _formed(right, 1)
    if _formed(left, n) + _formed(right, m) <= room:
        return n, m
    rows = max(1, min(n, min(3 * room // 4, room - other) // one if one else n))
    return rows, max(1, min(m, (room - rows * one) // other if other else m))


def _by_entries(left: StoredColumns, right: StoredColumns, alike: bool, room: int) -> Tensor:
    """The products, in blocks of samples if the entries do not fit in `room`."""
    (v, n), (w, m) = left.S.shape[:2], right.S.shape[:2]
    rows, others = _samples_at_once(left, right, room)
    if rows == n and others == m:
        L = left.entries()
        return _block(L, L if left is right else right.entries(), alike)
    K = left.S.new_empty((v, n, m) if alike else (v, n, w, m))
    for a in range(0, n, rows):
        L = left.part(slice(a, a + rows)).entries()
        for b in range(0, m, others):
            R = right.part(slice(b, b + others)).entries()
            K[:, a : a + rows, ..., b : b + others] = _block(L, R, alike)
            del R
        del L
    return K


def _block(L: Tensor, R: Tensor, alike: bool) -> Tensor:
    """The products of entries J[v,n,p], with rows ordered by column or by sample."""
    if alike:
        return L @ R.mT
    (rows, here), (others, there) = _matrix(L), _matrix(R)
    K = times_transpose(rows, rows if R is L else others)
    K = K.unflatten(1, R.shape[1::-1] if there else R.shape[:2]).unflatten(0, L.shape[1::-1] if here else L.shape[:2])
    K = K.transpose(0, 1) if here else K
    return K.transpose(2, 3) if there else K


def _matrix(J: Tensor) -> tuple[Tensor, bool]:
    """The rows of J[v,n,p] in memory order, and whether they are ordered by sample."""
    swapped = J.transpose(0, 1).is_contiguous() and not J.is_contiguous()
    return (J.transpose(0, 1) if swapped else J).flatten(0, 1), swapped


# By positions -----------------------------------------------------------------------------------------------------


def _pairs_at_once(left: StoredColumns, right: StoredColumns, alike: bool, room: int) -> tuple[int, int]:
    """Numbers of samples on each side whose pairs of positions are formed at once."""
    s, (w, m, t) = left.S.shape[2], right.S.shape[:3]
    pairs = room // max(1, 2 * s * t * (1 if alike else w))
    return max(1, pairs // m), max(1, min(m, pairs))


def _by_positions(left: StoredColumns, right: StoredColumns, alike: bool, room: int) -> Tensor:
    """The products, in blocks of samples if the pairs of positions do not fit in `room`."""
    assert left.x is not None
    assert right.x is not None
    (v, n, s, groups, _), (w, m, t) = left.S.shape, right.S.shape[:3]
    K = left.S.new_zeros((v, n, m) if alike else (v, n, w, m))
    rows, others = _pairs_at_once(left, right, alike, room)
    for g in range(groups):
        for b in range(0, m, others):
            there = slice(b, b + others)
            x, S = right.x[there, :, g].flatten(0, 1), right.S[:, there, :, g].flatten(1, 2)  # [m·t,i], [w,m·t,o]
            for a in range(0, n, rows):
                here = slice(a, a + rows)
                inputs = times_transpose(left.x[here, :, g].flatten(0, 1), x).view(-1, s, 1, len(x) // t, t)
                for c in range(v):
                    ours = left.S[c, here, :, g].flatten(0, 1)
                    theirs = S[c : c + 1] if alike else S
                    outputs = times_transpose(ours, theirs.flatten(0, 1)).view(-1, s, len(theirs), len(x) // t, t)
                    found = (outputs * inputs).sum((1, 4))
                    K[c, here, ..., there] += found[:, 0] if alike else found
    return K
