"""one_pass: batch after batch into one result, as if a whole data set were one batch, with or without checkpoints.

The result so far is merged with that of every batch (fxcurv/merging.py), so that memory does not grow with the number
of batches; outputs are dropped. Everything that a further batch depends on is one `State`, which changes whole: it is
what a checkpoint holds, and what is left when an accumulation is interrupted.
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


# One batch more ---------------------------------------------------------------------------------------------------


class Accumulator:
    """Adds batches to a result, or with `decay` averages over them exponentially.

    With `decay`, every batch counts `decay` times as much as the one after it, whatever its size, and the weights sum
    to 1 from the first batch on. `state` is all that a further batch depends on, besides the model.
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
        """Add a batch, of which inputs and target are told apart as `accumulate` does, and moved to the model."""
        self.state = self.after(batch)

    def after(self, batch: Any) -> State:
        """The state with a batch more; the object itself stays as it is, but for its generator."""
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
        """Forget all batches; the generator goes on."""
        self.state = State()

    @property
    def result(self) -> Curvature:
        """The curvature over all batches so far."""
        if self.state.total is None:
            raise InputError("there was no batch", remedy="give at least one", code="FXC110")
        if self.state.total.divisor == 0:
            raise InputError("every target is ignored", remedy="give at least one that counts", code="FXC407")
        return self.state.total

    def _of(self, inputs: Inputs, target: Tensor) -> Curvature:
        """The result of a batch, in memory of its own and of the type in which it is added; without the output."""
        if not self.compiled.loss.counts(target):
            found = _mean_of_none(self.compiled.summed()(inputs, target, self.generator))
        else:
            found = self.compiled(inputs, target, self.generator)
        return owned(found, self.settings.dtype)


def _mean_of_none(result: Curvature) -> Curvature:
    """A sum in which no term counts, as the mean that it also is."""
    values = [replace(v, reduction="mean") if isinstance(v, Block) else v for v in values_of(result)]
    labelled = values_changed(result, values)._mapped(lambda e: replace(e, reduction="mean"))
    return replace(labelled, reduction="mean", divisor=0.0)


# All batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """A pass over a loader: what its bar says, and what is shown every batch, those read from a checkpoint too."""

    title: str = "batches"
    watch: Callable[[Any], None] = lambda batch: None


def one_pass(
    compiled: CompiledModel, loader: Iterable[Any], settings: Settings, over: Pass | None = None
) -> Accumulator:
    """An accumulator that holds the curvature over all batches of a loader, of all processes."""
    processes = Processes.of_group(settings.timeout)
    with processes.telling_errors():
        accumulator = Accumulator(compiled, settings)
        _run(accumulator, loader, processes, over or Pass())
        accumulator.state = replace(accumulator.state, total=processes.total(accumulator.state.total, compiled.model))
    return accumulator


def _run(accumulator: Accumulator, loader: Iterable[Any], processes: Processes, over: Pass) -> None:
    """Add the batches of this process, from where its checkpoint stands."""
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
            accumulator.state = state  # all of it at once, so that an interruption finds a state between two batches
            processes.beat(state.batches)
            if checkpoint is not None and state.batches % settings.every == 0:
                written = checkpoint.write(state)
    except BaseException as error:
        if checkpoint is not None and (state := accumulator.state).batches:
            if state is not written:
                checkpoint.write(state)
            error.add_note(f"{state.batches} batches are in {checkpoint.path}: the same call continues from there")
        raise
    if checkpoint is not None and accumulator.state is not written:
        checkpoint.write(accumulator.state)


def settled(accumulator: Accumulator) -> bool:
    """Whether the estimates are as sure as was asked for."""
    settings, standard_error = accumulator.settings, accumulator.state.standard_error
    bound = settings.until_rel_error
    return (
        bound is not None and accumulator.state.batches >= settings.min_batches and standard_error.rel_error() <= bound
    )


def _with_bar(loader: Iterable[Any], settings: Settings, processes: Processes, over: Pass) -> Iterator[Any]:
    """The batches, with a bar on the first process's terminal."""
    length, most = length_of(loader), settings.max_batches
    total = most if length is None else min(length, most or length)
    quiet = None if settings.progress and processes.rank == 0 else True
    for batch in tqdm(islice(loader, most), over.title, total, disable=quiet, unit="batch"):
        over.watch(batch)
        yield batch
