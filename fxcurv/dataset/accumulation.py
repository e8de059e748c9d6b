"""one_pass: accumulate all batches of a data set into one result, as if they were one batch; checkpoints are optional.

The running result is merged with the result of every batch (fxcurv/results/merging.py), so memory does not grow with
the number of batches; outputs are dropped. One `State` has everything that the next batch depends on. It is replaced
atomically; checkpoints store it, and it remains valid after an interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fxcurv.blocks.base import Block
from fxcurv.core.errors import InputError, QuantityError
from fxcurv.core.generators import fresh_generator
from fxcurv.dataset.batches import on_device, split_batch
from fxcurv.dataset.checkpoints import Checkpoint
from fxcurv.dataset.compiled import CompiledModel
from fxcurv.dataset.processes import Processes
from fxcurv.dataset.state import Settings, State, length_of, owned
from fxcurv.frontend.copying import check_parameters
from fxcurv.frontend.inputs import Inputs
from fxcurv.quantities.ekfac import EKFAC
from fxcurv.results.curvature import Curvature
from fxcurv.results.merging import blended, merge, values_changed, values_of

__all__ = ["Accumulator", "Pass", "one_pass", "settled"]


# Accumulator ------------------------------------------------------------------------------------------------------


class Accumulator:
    """Sum of the results of batches, or with `decay` an exponential moving average.

    With `decay`, every batch has `decay` times the weight of the next one, independent of its size. The weights always
    sum to 1. `state` has everything that the next batch depends on, except the model.
    """

    def __init__(self, compiled: CompiledModel, settings: Settings, decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise QuantityError(f"decay={decay!r}", remedy="give a number of at least 0 and below 1", code="FXC409")
        if settings.dtype not in (None, torch.float32, torch.float64):
            raise QuantityError(
                f"dtype={settings.dtype}", remedy="accumulate in torch.float32 or torch.float64", code="FXC409"
            )
        for name, quantity in compiled.selection.quantities.items():
            if type(quantity) is EKFAC:
                raise QuantityError(
                    f"{name} takes each batch twice, the second time in the eigenbases of all batches",
                    remedy="give all batches to compiled.accumulate(loader), or add up kfac",
                    code="FXC425",
                )
        check_parameters(compiled.model)
        self.compiled, self.settings, self.decay = compiled, settings, decay
        self.device = next(compiled.model.parameters()).device
        self.generator = settings.generator or fresh_generator(self.device)
        self.state = State()

    def update(self, batch: Any) -> None:
        """Add a batch; it is split into inputs and target as in `accumulate`, and moved to the model's device."""
        self.state = self.after(batch)

    def after(self, batch: Any) -> State:
        """Return the state after one more batch; of this object, only the generator changes."""
        inputs, target = (on_device(part, self.device) for part in (self.settings.split or split_batch)(batch))
        result, state = self._of(inputs, target), self.state
        weight = 1 + (self.decay or 0) * state.weight
        total = state.total
        if total is None:
            total = result if self.decay is None else replace(result, divisor=None)
        else:
            total = merge(total, result) if self.decay is None else blended(total, result, 1 / weight)
        standard_error = (
            state.standard_error if self.settings.until_rel_error is None else state.standard_error.with_batch(result)
        )
        return replace(state, total=total, batches=state.batches + 1, standard_error=standard_error, weight=weight)

    def reset(self) -> None:
        """Forget all batches; the generator keeps its state."""
        self.state = State()

    @property
    def result(self) -> Curvature:
        """Curvature over all batches so far."""
        if self.state.total is None:
            raise InputError("there was no batch", remedy="give at least one", code="FXC110")
        if self.state.total.divisor == 0:
            raise InputError("every target is ignored", remedy="give at least one that counts", code="FXC407")
        return self.state.total

    def _of(self, inputs: Inputs, target: Tensor) -> Curvature:
        """Return the result of a batch, in separate memory and the dtype of accumulation; without the output."""
        if not self.compiled.loss.counts(target):
            found = _mean_of_none(self.compiled.summed()(inputs, target, self.generator))
        else:
            found = self.compiled(inputs, target, self.generator)
        return owned(found, self.settings.dtype)


def _mean_of_none(result: Curvature) -> Curvature:
    """Relabel a sum without any counted term as a mean with divisor 0."""
    values = [replace(v, reduction="mean") if isinstance(v, Block) else v for v in values_of(result)]
    labelled = values_changed(result, values)._mapped(lambda e: replace(e, reduction="mean"))
    return replace(labelled, reduction="mean", divisor=0.0)


# Pass over a loader -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """A pass over a loader: `title` of the progress bar, and `watch`, called with every batch, resumed ones too."""

    title: str = "batches"
    watch: Callable[[Any], None] = lambda batch: None


def one_pass(
    compiled: CompiledModel, loader: Iterable[Any], settings: Settings, over: Pass | None = None
) -> Accumulator:
    """Return an accumulator with the curvature over all batches of a loader and all processes."""
    processes = Processes.of_group(settings.timeout)
    with processes.telling_errors():
        accumulator = Accumulator(compiled, settings)
        _run(accumulator, loader, processes, over or Pass())
        accumulator.state = replace(accumulator.state, total=processes.total(accumulator.state.total, compiled.model))
    return accumulator


def _run(accumulator: Accumulator, loader: Iterable[Any], processes: Processes, over: Pass) -> None:
    """Add the batches of this process, starting after its checkpoint."""
    settings = accumulator.settings
    batches = _with_bar(loader, settings, processes, over)
    checkpoint = (
        None
        if settings.checkpoint is None
        else Checkpoint.of(accumulator.compiled, settings, accumulator.generator, loader, processes)
    )
    if checkpoint is not None:
        accumulator.state = checkpoint.resumed(batches, processes.beat)
    written = accumulator.state
    try:
        while not settled(accumulator) and (batch := next(batches, batches)) is not batches:
            state = accumulator.after(batch)
            if checkpoint is not None:
                state = checkpoint.marked(state, batch)
            accumulator.state = state  # atomic: an interruption leaves a state between two batches
            processes.beat(state.batches)
            if checkpoint is not None and state.batches % settings.every == 0:
                written = checkpoint.write(state)
    except BaseException as error:
        if checkpoint is not None and (state := accumulator.state).batches:
            if state is not written:
                checkpoint.write(state)
            error.add_note(
                f"{state.batches} batches are saved in {checkpoint.path}: repeat the call to continue from there"
            )
        raise
    if checkpoint is not None and accumulator.state is not written:
        checkpoint.write(accumulator.state)


def settled(accumulator: Accumulator) -> bool:
    """Whether the relative standard error is within the requested bound."""
    settings, standard_error = accumulator.settings, accumulator.state.standard_error
    bound = settings.until_rel_error
    return (
        bound is not None and accumulator.state.batches >= settings.min_batches and standard_error.rel_error() <= bound
    )


def _with_bar(loader: Iterable[Any], settings: Settings, processes: Processes, over: Pass) -> Iterator[Any]:
    """Yield the batches, with a progress bar on the terminal of process 0."""
    length, most = length_of(loader), settings.max_batches
    total = most if length is None else min(length, most or length)
    quiet = None if settings.progress and processes.rank == 0 else True
    for batch in tqdm(islice(loader, most), over.title, total, disable=quiet, unit="batch"):
        over.watch(batch)
        yield batch
