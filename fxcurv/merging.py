"""merge: two results -> that of the union of their batches, as if it had been one batch of the same model.

A loss is a sum of terms over a divisor: what `mean` divides by, 1 for `sum`. Everything but A is linear in the terms,
so that results of divisors D and D' add with the weights D/(D + D') and D'/(D + D'), for `sum` with 1 and 1; A is a
mean over samples (and positions, for expand) and is weighted with their numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcurv.blocks import Block, Dense, Diagonal, Kronecker
from fxcurv.contractions import Sum
from fxcurv.errors import FxcurvError
from fxcurv.family import APART
from fxcurv.files import load
from fxcurv.result import Curvature, Entries, Entry

__all__ = ["merge"]


def merge(first: Curvature | str | Path, second: Curvature | str | Path) -> Curvature:
    """The curvature of the union of two batches, exactly, from the results of both or the files they were saved to.

    Both must be of one model at the same parameters, of the same quantities and loss (of which the reduction is
    checked). Results of sampled factors add as columns of independent draws do. Tensors of the second go where those
    of the first are; outputs are stacked, or left empty, `[N, 0]`, where their samples have different shapes. Raises a
    FxcurvError (FXC425) that says what does not fit.
    """
    a, b = (x if isinstance(x, Curvature) else load(x) for x in (first, second))
    _check_alike(a, b)
    weights, values = _weights(a, b), dict[tuple[int, int], Tensor | Block]()

    def merged(mine: Entry, its: Entry) -> Entry:
        status = _status(mine, its)
        if mine.value is None or its.value is None:
            return mine
        key = id(mine.value), id(its.value)  # a block that several parameters share stays one
        if key not in values:
            values[key] = _Merge(weights, _name(mine)).value(mine.value, its.value, status)
        return replace(mine, status=status, value=values[key], reason=mine.reason or its.reason)

    quantities = {
        name: Entries(map(merged, entries.entries.values(), b.quantities[name].entries.values()))
        for name, entries in a.quantities.items()
    }
    divisor = sum(map(float, (a.divisor or 0, b.divisor or 0))) if a.reduction == "mean" else 1.0
    loss = a.loss * weights[0] + b.loss.to(a.loss.device) * weights[1]
    samples = a.samples + b.samples
    return replace(a, quantities=quantities, loss=loss, output=_stacked(a, b), samples=samples, divisor=divisor)


def _check_alike(a: Curvature, b: Curvature) -> None:
    """An error where the results are not of the same things."""
    difference = a.model.difference(b.model) if a.model and b.model else "one of them does not know its model"
    if difference:
        raise _unfit(f"the results are of different models: {difference}")
    if a.reduction != b.reduction:
        raise _unfit(f"the losses have the reductions {a.reduction!r} and {b.reduction!r}")
    if list(a) != list(b):
        raise _unfit(f"the quantities are {', '.join(a)} and {', '.join(b)}")
    for name in a:
        ours, theirs = a[name].entries, b[name].entries
        if list(ours) != list(theirs):
            raise _unfit(f"{name} is of other parameters")
        for mine, its in zip(ours.values(), theirs.values(), strict=True):
            if mine.definition.startswith(APART):
                raise _unfit(f"{name} of two batches is not made of {name} of each")
            if mine.definition != its.definition:
                raise _unfit(f"{name} is {mine.definition} and {its.definition}")


def _weights(a: Curvature, b: Curvature) -> tuple[float, float]:
    """What sums over loss terms are multiplied with before they are added."""
    if a.reduction != "mean":
        return 1.0, 1.0
    if a.divisor is None or b.divisor is None:
        raise _unfit("one of the results does not know what its mean divides by")
    first, second = float(a.divisor), float(b.divisor)
    return first / (first + second), second / (first + second)


def _status(mine: Entry, its: Entry) -> str:
    """Exact and fallback are the same number by different ways; any other two statuses do not fit."""
    both = {mine.status, its.status}
    if len(both) > 1 and both != {"exact", "fallback"}:
        raise _unfit(f"{_name(mine)} is {mine.status} and {its.status}")
    return max(both)


def _stacked(a: Curvature, b: Curvature) -> Tensor:
    if a.output.shape[1:] != b.output.shape[1:]:
        return a.output.new_empty(a.samples + b.samples, 0)
    return torch.cat([a.output, b.output.to(a.output.device)])


@dataclass(frozen=True)
class _Merge:
    """Of the values of one entry."""

    weights: tuple[float, float]
    name: str

    def value(self, mine: Tensor | Block, its: Tensor | Block, status: str) -> Tensor | Block:
        """The value of the union."""
        if isinstance(mine, Tensor) and isinstance(its, Tensor):
            return self._sum(mine, its.to(mine.device))
        if (
            isinstance(mine, Tensor)
            or isinstance(its, Tensor)
            or type(mine) is not type(its)
            or mine.shape != its.shape
        ):
            raise _unfit(f"{self.name} has another form in each of the results")
        return replace(mine, status=status, **self._changes(mine, its.to(device=mine.device)))

    def _changes(self, mine: Block, its: Block) -> Mapping[str, Sum | int]:
        """The fields of a block that change."""
        match mine, its:
            case Diagonal(), Diagonal():
                return {"values": self._sum(mine.values, its.values)}
            case Dense(), Dense():
                return {"moment": self._sum(mine.moment, its.moment)}
            case Kronecker(), Kronecker() if mine.averaged and its.averaged:
                count = mine.averaged + its.averaged
                shares = replace(self, weights=(mine.averaged / count, its.averaged / count))
                return {
                    "input_moment": shares._sum(mine.input_moment, its.input_moment),
                    "output_moment": self._sum(mine.output_moment, its.output_moment),
                    "averaged": count,
                }
            case Kronecker(), _:
                raise _unfit(f"{self.name} does not know how many inputs its A averages")
            case _:
                raise _unfit(f"{self.name} is a {type(mine).__name__} block, which does not add over batches")

    def _sum(self, mine: Sum, its: Sum) -> Any:
        """The weighted sum."""
        first, second = self.weights
        return (mine if first == 1 else mine * first) + (its if second == 1 else its * second)


def _name(entry: Entry) -> str:
    return f"{entry.quantity} of {entry.parameter!r}"


def _unfit(cause: str) -> FxcurvError:
    return FxcurvError(
        cause, remedy="merge results of one model, loss and choice of quantities, as they are returned", code="FXC425"
    )
