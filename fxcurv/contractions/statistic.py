"""Statistic: the interface of sums over samples n and columns v."""

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
    """A sum over samples and columns; `reads` names its argument: "x" (once a batch), "S" or "xS" (once a chunk of v).

    Statistics that read "loss" are not in a graph: see fxcurv/runtime/second_derivatives.py and fxcurv/runtime/kfra.py.

    `samples` and `columns` are the axes along which parts of a batch, and chunks of columns, are concatenated; where
    they are None, the parts are added.
    """

    reads: Literal["x", "S", "xS", "loss"]
    scales: ClassVar = False
    """Whether this statistic implements `scaled`."""
    grows: ClassVar = False
    """Whether the returned tensor grows with the number of samples or columns."""
    loops: ClassVar = False
    """Whether a call loops over samples or columns; a memory forecast then uses `empty` and `cost` instead."""
    samples: ClassVar[int | None] = None
    columns: ClassVar[int | None] = None

    def scaled(self, returned: Tensor, scale: Tensor) -> Tensor:
        """Convert the result for S to the result for S[v,n,s,g,o] · scale[g·o]."""
        raise NotImplementedError

    cost: Callable[..., Cost]
    """Cost of a call, from the shapes of its arguments."""

    empty: Callable[..., Tensor]
    """Allocate the result of a call."""

    def memory(self, part: Tensor, samples: int, columns: int) -> tuple[int, int]:
        """Bytes of a sum over so many chunks like `part`, and temporary bytes when one is added."""
        size, times = part.untyped_storage().nbytes(), samples * columns
        if self.samples is not None:
            size *= samples * (1 if self.columns is None else columns)
        return size, size if times > 1 else 0

    def sum_of(self, returned: Tensor) -> StatisticValue:
        """The sum as a value: the returned tensor itself, or a lazy Gram of it."""
        return returned


def combined(sums: dict[str, StatisticValue], key: str, part: StatisticValue, axis: int | None) -> None:
    """Accumulate `part` into `sums[key]`: add it, or concatenate along `axis`."""
    if key not in sums:
        sums[key] = part
    elif axis is None:
        sums[key] = sums[key] + part
    else:
        sums[key] = torch.cat([sums[key], part], axis)  # pyright: ignore[reportArgumentType]
