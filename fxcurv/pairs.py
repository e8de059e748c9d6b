"""Pairs: inner products of the columns of samples, from the columns themselves or from the positions they are made of.

A parameter's column at sample n is J[v,n,g,o,i] = Σ_s S[v,n,s,g,o] x[n,s,g,i]. For two of them
⟨J_vn, J'_wm⟩ = Σ_g Σ_st (x_ns x'_mt) (S_vns S'_wmt), which forms no J: cheaper where positions are few beside weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fxcurv.contractions import CHUNK, Columns, Inputs, Outputs, Statistic, Sum, per_sample
from fxcurv.gemm import times_transpose
from fxcurv.quantities import Used

__all__ = ["Kept", "Strategy", "kept", "kept_of", "products"]

Strategy = Literal["jacobian", "structured"]


@dataclass(frozen=True, eq=False)
class Kept:
    """One parameter's columns, as their positions `S[v,n,s,g,o]` and `x[n,s,g,i]`; without x entries S[v,n,1,1,p]."""

    S: Tensor
    x: Tensor | None = None

    def entries(self) -> Tensor:
        """J[v,n,g·o·i]."""
        return per_sample([self.x], [self.S]).flatten(2)


def kept(used: Used, strategy: Strategy | None = None) -> dict[str, Statistic]:
    """What to keep of a parameter's columns: positions, if these are fewer numbers than entries (or by `strategy`)."""
    positions = used.positions * (used.inputs + used.outputs)
    fewer = positions < used.inputs * used.outputs if strategy is None else strategy == "structured"
    return {"x": Inputs(), "S": Outputs()} if used.matrix and fewer else {"entries": Columns()}


def kept_of(sums: Mapping[str, Sum]) -> Kept:
    """The columns, from the sums of `kept`."""
    tensors = {name: t for name, t in sums.items() if isinstance(t, Tensor)}
    if "entries" in tensors:
        return Kept(tensors["entries"].flatten(2)[:, :, None, None, :])
    return Kept(tensors["S"], tensors["x"])


def products(left: Kept, right: Kept, alike: bool = False, strategy: Strategy | None = None) -> Tensor:
    """K[v,n,w,m] = ⟨J_vn, J'_wm⟩, or with `alike` of equal columns v = w only: [v,n,m]."""
    structured = left.x is not None and right.x is not None
    if strategy is None:
        strategy = "structured" if structured and _cheaper(left, right, alike) else "jacobian"
    if structured and strategy == "structured":
        return _by_positions(left, right, alike)
    L, R = left.entries(), right.entries()
    if alike:
        return L @ R.mT
    return times_transpose(L.flatten(0, 1), R.flatten(0, 1)).unflatten(0, L.shape[:2]).unflatten(2, R.shape[:2])


def _cheaper(left: Kept, right: Kept, alike: bool) -> bool:
    """Whether products of positions take fewer operations than products of entries, with these."""
    assert left.x is not None
    (v, n, s, _, o), (w, m, t, _, _), i = left.S.shape, right.S.shape, left.x.shape[-1]
    columns = v if alike else v * w
    return n * m * s * t * (i + columns * o) < o * i * (v * n * s + w * m * t + n * m * columns)


def _by_positions(left: Kept, right: Kept, alike: bool) -> Tensor:
    """The products, sample by sample of the left side where all of them at once are too large."""
    assert left.x is not None
    assert right.x is not None
    (v, n, s, groups, _), (w, m, t) = left.S.shape, right.S.shape[:3]
    K = left.S.new_zeros((v, n, m) if alike else (v, n, w, m))
    rows = max(1, CHUNK // (s * m * t * (1 if alike else w)))
    for g in range(groups):
        x, S = right.x[:, :, g].flatten(0, 1), right.S[..., g, :].flatten(1, 2)  # [m·t,i], [w,m·t,o]
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            inputs = times_transpose(left.x[part, :, g].flatten(0, 1), x).view(-1, s, 1, m, t)
            for a in range(v):
                ours = left.S[a, part, :, g].flatten(0, 1)
                theirs = S[a : a + 1] if alike else S
                outputs = times_transpose(ours, theirs.flatten(0, 1)).view(-1, s, len(theirs), m, t)
                found = (outputs * inputs).sum((1, 4))
                K[a, part] += found[:, 0] if alike else found
    return K
