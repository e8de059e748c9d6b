"""merge: combine the results of two batches into the result of their union, for the same model.

A loss is a sum of terms over a divisor: the divisor of `mean`, or 1 for `sum`. Everything except A is linear in the
terms, so results with divisors D and D' are added with weights D/(D + D') and D'/(D + D'), for `sum` with 1 and 1. For
a quantity of another degree in the loss, the weights are taken to the power of this degree. A is a mean over samples
(and positions, for expand), weighted by their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fxcurv.blocks.base import Block, differing
from fxcurv.core.errors import FxcurvError
from fxcurv.results.curvature import Curvature
from fxcurv.results.entry import Entries, Entry
from fxcurv.results.reading import load

__all__ = ["Value", "blended", "check_adds", "merge", "values_changed", "values_of"]


Value = Tensor | Block


def merge(first: Curvature | str | Path, second: Curvature | str | Path) -> Curvature:
    """Return the exact curvature of the union of two batches, from two results or their files.

    Both need the same model at the same parameters, the same quantities and the same loss (only its reduction is
    checked). Sampled factors are added as independent draws. Tensors of the second result are moved to the device of
    the first. Outputs are concatenated, or empty, `[N, 0]`, if their samples have different shapes. Raises a
    FxcurvError (FXC425) with the mismatch.
    """
    a, b = (x if isinstance(x, Curvature) else load(x) for x in (first, second))
    _check_alike(a, b)
    divisor = sum(map(float, (a.divisor or 0, b.divisor or 0))) if a.reduction == "mean" else 1.0
    weights = _weights(a, b)
    return replace(_combined(a, b, _Merge(weights)), divisor=divisor)


def blended(a: Curvature, b: Curvature, share: float) -> Curvature:
    """Return the average of both with weights 1 - share and share, independent of their numbers of samples.

    It is not a sum over a batch: its divisor and number of averaged inputs are unknown, and it cannot be merged.
    """
    _check_alike(a, b)
    return replace(_combined(a, b, _Merge((1 - share, share), counted=False)), divisor=None)


def _combined(a: Curvature, b: Curvature, merge: _Merge) -> Curvature:
    """Combine the values, losses, outputs and samples of both."""
    values = dict[tuple[int, int], Value]()

    def merged(mine: Entry, its: Entry) -> Entry:
        status = _status(mine, its)
        if mine.value is None or its.value is None:
            return mine
        key = id(mine.value), id(its.value)  # a block shared by several parameters remains shared
        if key not in values:
            values[key] = replace(merge, entry=mine).value(mine.value, its.value, status)
        return replace(mine, status=status, value=values[key], reason=mine.reason or its.reason)

    quantities = {
        name: Entries(map(merged, entries.entries.values(), b.quantities[name].entries.values()))
        for name, entries in a.quantities.items()
    }
    first, second = merge.weights
    loss = a.loss * first + b.loss.to(a.loss.device) * second
    return replace(a, quantities=quantities, loss=loss, output=_stacked(a, b), samples=a.samples + b.samples)


def values_of(result: Curvature) -> list[Value]:
    """Return the values of a result in the order of its entries, shared values once."""
    return list({id(e.value): e.value for e in result.entries if e.value is not None}.values())


def values_changed(result: Curvature, changed: Sequence[Value]) -> Curvature:
    """Return the result with the values `values_of(result)` replaced by `changed`."""
    new = dict(zip(map(id, values_of(result)), changed, strict=True))
    quantities = {
        name: Entries(e if e.value is None else replace(e, value=new[id(e.value)]) for e in entries.entries.values())
        for name, entries in result.quantities.items()
    }
    return replace(result, quantities=quantities)


def degrees_of(result: Curvature) -> list[int]:
    """Return the degree of every value of `values_of(result)`."""
    return list({id(e.value): e.degree for e in result.entries if e.value is not None}.values())


def check_adds(result: Curvature) -> None:
    """Raise if a quantity of two batches is not determined by the quantity of each."""
    for e in result.entries:
        if e.combine == "refuse":
            raise _unfit(f"{e.quantity} of two batches is not determined by {e.quantity} of each")


def check_sums(result: Curvature) -> None:
    """Raise if a value of several processes is not a weighted sum of theirs."""
    check_adds(result)
    for e in result.entries:
        if e.combine == "concatenate":
            raise _unfit(f"{_name(e)} holds the samples of this process, which are not sent to the others")
        if isinstance(e.value, Block) and not e.value.additive:
            raise _unfit(f"{_name(e)} is a {e.form()} block, which is not additive over batches")
        if isinstance(e.value, Tensor) and not e.value.is_floating_point():
            raise _unfit(f"{_name(e)} holds values of type {e.value.dtype}, which processes do not add")


def _check_alike(a: Curvature, b: Curvature) -> None:
    """Raise if the results differ in model, loss reduction, quantities or parameters."""
    difference = a.model.difference(b.model) if a.model and b.model else "the model of one of them is unknown"
    if difference:
        raise _unfit(f"the results are of different models: {difference}")
    check_adds(a)
    if a.reduction != b.reduction:
        raise _unfit(f"the losses have the reductions {a.reduction!r} and {b.reduction!r}")
    if list(a) != list(b):
        raise _unfit(f"the quantities are {', '.join(a)} and {', '.join(b)}")
    for name in a:
        ours, theirs = a[name].entries, b[name].entries
        if list(ours) != list(theirs):
            raise _unfit(f"{name} has other parameters")
        for mine, its in zip(ours.values(), theirs.values(), strict=True):
            if mine.definition != its.definition:
                raise _unfit(f"{name} is {mine.definition} and {its.definition}")


def _weights(a: Curvature, b: Curvature) -> tuple[float, float]:
    """Return the weights of sums over loss terms."""
    if a.reduction != "mean":
        return 1.0, 1.0
    if a.divisor is None or b.divisor is None:
        raise _unfit("one of the results does not have the divisor of its mean")
    first, second = float(a.divisor), float(b.divisor)
    if not first + second:  # neither has a counted term
        return 1.0, 1.0
    return first / (first + second), second / (first + second)


def _status(mine: Entry, its: Entry) -> str:
    """Return the common status; exact and fallback are equal values, any other pair is an error."""
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
    """Merge of the values of one entry; `counted`: weight averages over inputs by their number, not by `weights`."""

    weights: tuple[float, float]
    entry: Entry | None = None
    counted: bool = True

    def value(self, mine: Value, its: Value, status: str) -> Value:
        """Return the value of the union."""
        if self.apart and not all(isinstance(value, Tensor) and value.ndim for value in (mine, its)):
            raise _unfit(f"{self.name} has no axis of samples to concatenate along")
        if isinstance(mine, Tensor) and isinstance(its, Tensor):
            return self._of_tensors(mine, its.to(mine.device))
        if (
            isinstance(mine, Tensor)
            or isinstance(its, Tensor)
            or type(mine) is not type(its)
            or mine.shape != its.shape
        ):
            raise _unfit(f"{self.name} has different forms in the two results")
        if mine.layout != its.layout:
            raise _unfit(f"{self.name} has different options in the two results: {differing(mine, its)}")
        if not mine.additive:
            raise _unfit(f"{self.name} is a {type(mine).__name__} block, which is not additive over batches")
        inputs = self._inputs(mine.count, its.count) if self.counted else None
        return replace(mine.weighted_sum(its.to(device=mine.device), self.of_values, inputs), status=status)

    @property
    def apart(self) -> bool:
        """Whether samples are concatenated."""
        return self.entry is not None and self.entry.combine == "concatenate"

    @property
    def name(self) -> str:
        """Description of the entry."""
        return "a value" if self.entry is None else _name(self.entry)

    @property
    def of_values(self) -> tuple[float, float]:
        """The weights of the two values: the weights of the loss terms, to the power of the quantity's degree.

        An average is of the values themselves, whatever their degree.
        """
        first, second = self.weights
        degree = 1 if self.entry is None or not (self.counted or self.apart) else self.entry.degree
        return first**degree, second**degree

    def _of_tensors(self, mine: Tensor, its: Tensor) -> Tensor:
        """Return the weighted sum, or the concatenation of weighted samples along axis 0."""
        first, second = self.of_values
        if mine.dtype == torch.bool and not self.apart:
            raise _unfit(f"{self.name} holds booleans, which do not add")
        if not (mine.is_floating_point() or first == second == 1):
            raise _unfit(f"{self.name} holds values of type {mine.dtype}, which have no weighted sum")
        if self.apart and first == second == 1:
            return torch.cat([mine, its])
        if self.apart:
            return torch.cat([mine * first, its * second])
        return (mine if first == 1 else mine * first) + (its if second == 1 else its * second)

    def _inputs(self, mine: int | None, its: int | None) -> tuple[float, float]:
        """Return the weights of both in an average over inputs."""
        if mine is None or its is None:
            return self.of_values
        if not mine or not its:
            raise _unfit(f"{self.name} lacks the number of inputs that its A averages")
        return mine / (mine + its), its / (mine + its)


def _name(entry: Entry) -> str:
    return f"{entry.quantity} of {entry.parameter!r}"


def _unfit(cause: str) -> FxcurvError:
    return FxcurvError(cause, remedy="merge unmodified results with the same model, loss and quantities", code="FXC425")
