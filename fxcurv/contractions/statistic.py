"""Statistic: the interface of what is summed over samples n and columns v."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.linalg.cost import Cost

__all__ = ["Ss", "Statistic", "StatisticValue", "Xs", "combined"]


Xs = Sequence[Tensor | None]


Ss = Sequence[Tensor]


StatisticValue = Tensor | LazyGram


class Statistic(nn.Module):
    """A sum over samples and columns; `reads` says of what: "x" (once a batch), "S" or "xS" (once a chunk of v).

    One that reads "loss" is in no graph: see fxcurv/hessian.py and fxcurv/kfra.py.

    `samples` and `columns` are the axes along which the parts of a batch, and chunks of columns, are laid side by side;
    where they are None, these add.
    """

    reads: Literal["x", "S", "xS", "loss"]
    scales: ClassVar = False
    """Whether `scaled` is there."""
    grows: ClassVar = False
    """Whether what a call returns is larger for more samples or columns."""
    samples: ClassVar[int | None] = None
    columns: ClassVar[int | None] = None

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        """What a call would have returned for S[v,n,s,g,o] · scale[g·o]."""
        raise NotImplementedError

    cost: Callable[..., Cost]
    """What a call takes, from the shapes of its arguments."""

    def sum_of(self, returned: Tensor) -> StatisticValue:
        """The sum that a call returned: the tensor itself, or what it stands for."""
        return returned


def combined(sums: dict[str, StatisticValue], key: str, part: StatisticValue, axis: int | None) -> None:
    """Put one more part to what is there under `key`: add it, or lay it beside along an axis."""
    if key not in sums:
        sums[key] = part
    elif axis is None:
        sums[key] = sums[key] + part
    else:
        sums[key] = torch.cat([sums[key], part], axis)  # pyright: ignore[reportArgumentType]
