"""The modules of the augmented graphs: tensors saved by the forward graph, and pullbacks of the backward graph.

`S[v, *y.shape]` holds v backpropagated vectors (columns of the factor) at a node with output y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.contractions.entries import widened, with_ones
from fxcurv.contractions.statistic import Statistic, StatisticValue
from fxcurv.core.shapes import Samples
from fxcurv.ir import ops
from fxcurv.ir.declare import autograd_pull_each, pull_together
from fxcurv.ir.rules import rule_of
from fxcurv.linalg.cost import Cost

__all__ = [
    "Accumulate",
    "Apart",
    "Gather",
    "GetItem",
    "InputPositions",
    "Joined",
    "OutputPositions",
    "ParameterPositions",
    "Pull",
    "PullInputs",
    "PullScaled",
    "PullToParameter",
    "Rotate",
    "SaveForBackward",
    "Scaled",
    "Unbroadcast",
]


class _OfOp(nn.Module):
    """A module that applies one part of the rule of `op`; `op` is shared with the canonical graph."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op
        self.rule = rule_of(op)

    @property
    def title(self) -> str:
        """Name in tables: `Pull(ReLU)`."""
        return f"{type(self).__name__}({type(self.op).__name__})"


class SaveForBackward(_OfOp):
    """Save tensors and shapes of this run for the pullback through `op`: (y, *xs) -> tensors and shapes."""

    def forward(self, y: Tensor, *xs: Tensor) -> Any:
        return self.rule.save(self.op, xs, y)


class Gather(nn.Module):
    """y = x[indices] with the saved indices of a gather, flat indices into the last `axes` axes of x."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor, saved: tuple[Tensor, Any]) -> Tensor:
        indices = saved[0]
        return x.flatten(-self.axes).gather(-1, indices.flatten(-self.axes)).view(indices.shape)

    def extra_repr(self) -> str:
        return f"axes={self.axes}"


class Pull(_OfOp):
    """S[v, *y.shape] -> S[v, *x_k.shape], before `Unbroadcast`; with `per_sample`, S[v, n, …] at constants."""

    def __init__(self, op: nn.Module, k: int, per_sample: bool = False) -> None:
        super().__init__(op)
        self.k, self.per_sample = k, per_sample

    def forward(self, S: Tensor, saved: Any) -> Tensor:
        if not self.per_sample:
            return self.rule.pull(self.op, S, saved, self.k)
        return self.rule.pull(self.op, S.flatten(0, 1), saved, self.k).unflatten(0, S.shape[:2])

    def extra_repr(self) -> str:
        return f"k={self.k}, per_sample={self.per_sample}"


class PullInputs(_OfOp):
    """`Pull` through an opaque op to several of its inputs, from their values: [S[v, *x_k.shape] for k in ks].

    By autograd, one column at a time, or `vectorized`.
    """

    def __init__(self, op: nn.Module, ks: Sequence[int], per_sample: bool = False, vectorized: bool = False) -> None:
        super().__init__(op)
        self.ks, self.per_sample, self.vectorized = tuple(ks), per_sample, vectorized

    def forward(self, S: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
        pull = pull_together if self.vectorized else autograd_pull_each
        if not self.per_sample:
            return pull(self.op, S, xs, self.ks)
        return [pulled.unflatten(0, S.shape[:2]) for pulled in pull(self.op, S.flatten(0, 1), xs, self.ks)]

    def extra_repr(self) -> str:
        return f"ks={self.ks}, per_sample={self.per_sample}, vectorized={self.vectorized}"


class GetItem(nn.Module):
    """One of several results."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, results: Sequence[Tensor]) -> Tensor:
        return results[self.index]

    def extra_repr(self) -> str:
        return str(self.index)


class PullScaled(_OfOp):
    """`Pull` through a convolution and the `scale` of its output channels at once: the weight is scaled, not S."""

    def __init__(self, op: nn.Module, scale: ops.Affine) -> None:
        super().__init__(op)
        self.scale = scale

    def forward(self, S: Tensor, saved: Any) -> Tensor:
        weight: Any = self.op.weight
        scale = self.scale.slope().view(-1, *(1,) * (weight.ndim - 1))
        assert self.rule.usage is not None
        return self.rule.usage.pull(self.op, weight * scale, S, saved)

    def extra_repr(self) -> str:
        return f"scale={self.scale.extra_repr()}"


class Scaled(Statistic):
    """A statistic at the outputs of a convolution, computed from the cotangents after their `scale`, then scaled."""

    def __init__(self, statistic: Statistic, scale: ops.Affine) -> None:
        super().__init__()
        self.statistic, self.scale, self.reads = statistic, scale, statistic.reads

    def forward(self, *args: Any) -> Tensor:
        return self.statistic.scaled(self.statistic(*args), self.scale.slope())

    def cost(self, *args: Any) -> Cost:
        return self.statistic.cost(*args)

    def sum_of(self, returned: Tensor) -> StatisticValue:
        return self.statistic.sum_of(returned)

    @property
    def title(self) -> str:
        """Name in tables: `Scaled(Diagonal)`."""
        return f"Scaled({type(self.statistic).__name__})"


class PullToParameter(_OfOp):
    """S[v, *y.shape] -> S[v, n, *θ.shape] where input k of `op`, θ, is the same for all samples.

    `places` gives the sample axes of the inputs and, last, of the output. Each sample is pulled back separately by
    autograd, one at a time or `vectorized`.
    """

    def __init__(self, op: nn.Module, k: int, places: Sequence[Samples | None], vectorized: bool = False) -> None:
        super().__init__(op)
        self.k, self.places, self.vectorized = k, tuple(places), vectorized

    def forward(self, S: Tensor, saved: Sequence[Tensor]) -> Tensor:
        *places, last = self.places
        assert last is not None
        S = last.apart(S, lead=1)  # [v, n, …]
        xs = [x if place is None else place.apart(x) for x, place in zip(saved, places, strict=True)]
        if self.vectorized:
            axes = [None if place is None else 0 for place in places]
            return torch.func.vmap(lambda S, *xs: pull_together(self.op, S, xs, [self.k])[0], (1, *axes), 1)(S, *xs)
        own = [[x if place is None else x[n] for x, place in zip(xs, places, strict=True)] for n in range(S.shape[1])]
        return torch.stack([autograd_pull_each(self.op, S[:, n], x, [self.k])[0] for n, x in enumerate(own)], 1)

    def extra_repr(self) -> str:
        return f"k={self.k}, places=({', '.join(map(str, self.places))}), vectorized={self.vectorized}"


class Unbroadcast(nn.Module):
    """Sum over the axes along which an input was broadcast: `lead` leading axes, and its `axes` of size one.

    Axes are counted after the first `columns` axes of S.
    """

    def __init__(self, lead: int, axes: Sequence[int], columns: int = 1) -> None:
        super().__init__()
        self.lead, self.axes, self.columns = lead, tuple(axes), columns

    def forward(self, S: Tensor) -> Tensor:
        S = S.sum(tuple(range(self.columns, self.columns + self.lead))) if self.lead else S
        return S.sum(tuple(axis + self.columns for axis in self.axes), keepdim=True) if self.axes else S

    def extra_repr(self) -> str:
        return f"lead={self.lead}, axes={self.axes}, columns={self.columns}"


class Apart(nn.Module):
    """S[v, *y.shape] -> S[v, n, …]: move the samples at `place` to axis 1; the rest of their axis stays."""

    def __init__(self, place: Samples) -> None:
        super().__init__()
        self.place = place

    def forward(self, S: Tensor) -> Tensor:
        return self.place.apart(S, lead=1)

    def extra_repr(self) -> str:
        return f"samples at {self.place}"


class Accumulate(nn.Module):
    """Σ of the cotangents of a node with several consumers."""

    def forward(self, *Ss: Tensor) -> Tensor:
        total = Ss[0]
        for S in Ss[1:]:
            total = total + S
        return total


class Joined(nn.Module):
    """Cotangents of parts that tile a tensor -> cotangent of the whole, joined along `dim`, stacked if it is `new`."""

    def __init__(self, dim: int, new: bool) -> None:
        super().__init__()
        self.dim, self.new = dim, new

    def forward(self, *Ss: Tensor) -> Tensor:
        return torch.stack(Ss, self.dim) if self.new else torch.cat(Ss, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, new={self.new}"


class InputPositions(_OfOp):
    """x -> x[n,s,g,i]: the input of `op` at its weight-sharing positions; the samples of x are at `place`."""

    def __init__(self, op: nn.Module, place: Samples) -> None:
        super().__init__(op)
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        assert self.rule.usage is not None
        x = self.rule.usage.x(self.op, widened(x).movedim(self.place.axis, 0))
        return self.place.regrouped(x)

    def extra_repr(self) -> str:
        return f"samples at {self.place}"


class ParameterPositions(nn.Module):
    """S[v, n, *θ.shape] -> S[v,n,s,g,o] with one position and one group, as for a bias."""

    def forward(self, S: Tensor) -> Tensor:
        return widened(S).reshape(*S.shape[:2], 1, 1, -1)


class OutputPositions(_OfOp):
    """S -> S[v,n,s,g,o]: the cotangents of `op` at its weight-sharing positions; the samples of S are at `place`."""

    def __init__(self, op: nn.Module, place: Samples) -> None:
        super().__init__(op)
        self.place = place

    def forward(self, S: Tensor) -> Tensor:
        assert self.rule.usage is not None
        S = self.rule.usage.S(self.op, widened(S).movedim(self.place.axis + 1, 1))
        return self.place.regrouped(S, lead=1)

    def extra_repr(self) -> str:
        return f"samples at {self.place}"


class Rotate(nn.Module):
    """X[*,s,g,d] -> Σ_d U[g,d,e] X[*,s,g,d]: rotate positions to the basis U; with `ones`, 1 is appended to X first."""

    def __init__(self, ones: bool = False) -> None:
        super().__init__()
        self.ones = ones

    def forward(self, X: Tensor, U: Tensor) -> Tensor:
        X = with_ones(X) if self.ones else X
        return (X.transpose(-3, -2) @ U).transpose(-3, -2)

    def extra_repr(self) -> str:
        return f"ones={self.ones}"
