"""The modules of the augmented graphs: what the forward graph keeps, and how the backward graph carries S.

`S[v, *y.shape]` holds v columns of the factor, pulled back to a node with output y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.rules import rule_of

__all__ = ["Accumulate", "InputPositions", "Keep", "OutputPositions", "Pull", "Unbroadcast"]


class _OfOp(nn.Module):
    """A module that applies one part of the rule of `op`, which it shares with the canonical graph."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op
        self.rule = rule_of(op)

    def _get_name(self) -> str:
        return f"{type(self).__name__}({type(self.op).__name__})"


class Keep(_OfOp):
    """What the pullback through `op` needs to know about this run: (y, *xs) -> tensors and shapes."""

    def forward(self, y: Tensor, *xs: Tensor) -> Any:
        return self.rule.keep(self.op, xs, y)


class Pull(_OfOp):
    """S[v, *y.shape] -> S[v, *x_k.shape], before broadcasting is undone."""

    def __init__(self, op: nn.Module, k: int) -> None:
        super().__init__(op)
        self.k = k

    def forward(self, S: Tensor, kept: Any) -> Tensor:
        return self.rule.pull(self.op, S, kept, self.k)


class Unbroadcast(nn.Module):
    """Sum over the axes along which an input was repeated: `lead` in front of it, and its `axes` of size one."""

    def __init__(self, lead: int, axes: Sequence[int]) -> None:
        super().__init__()
        self.lead, self.axes = lead, tuple(axes)

    def forward(self, S: Tensor) -> Tensor:
        S = S.sum(tuple(range(1, 1 + self.lead))) if self.lead else S
        return S.sum(tuple(axis + 1 for axis in self.axes), keepdim=True) if self.axes else S

    def extra_repr(self) -> str:
        return f"lead={self.lead}, axes={self.axes}"


class Accumulate(nn.Module):
    """Σ of the cotangents that arrive at a node with several consumers."""

    def forward(self, *Ss: Tensor) -> Tensor:
        total = Ss[0]
        for S in Ss[1:]:
            total = total + S
        return total


def _accurate(t: Tensor) -> Tensor:
    """Half precision is widened before anything is summed."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


class InputPositions(_OfOp):
    """x -> x[n,s,g,i]: where the parameters of `op` meet its input, whose samples lie along `batch_axis`."""

    def __init__(self, op: nn.Module, batch_axis: int) -> None:
        super().__init__(op)
        self.batch_axis = batch_axis

    def forward(self, x: Tensor) -> Tensor:
        assert self.rule.use is not None
        return self.rule.use.x(self.op, _accurate(x).movedim(self.batch_axis, 0))


class OutputPositions(_OfOp):
    """S -> S[v,n,s,g,o]: the cotangents where the parameters of `op` meet its output."""

    def __init__(self, op: nn.Module, batch_axis: int) -> None:
        super().__init__(op)
        self.batch_axis = batch_axis

    def forward(self, S: Tensor) -> Tensor:
        assert self.rule.use is not None
        return self.rule.use.S(self.op, _accurate(S).movedim(self.batch_axis + 1, 1))
