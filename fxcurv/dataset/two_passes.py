"""accumulate: a data set in one pass, or in two passes for EKFAC.

The first pass computes KFAC instead of EKFAC, and all other quantities. Then the eigenvectors of its factors are
computed. The second pass accumulates Λ = Σ_vn (U_Gᵀ J_vn U_A)² in this basis, from the same columns. Both passes are
ordinary accumulations: with several processes, the factors are summed first, then process 0 computes the eigenvectors
for all. The second pass has its own checkpoint, `PATH.second`. For it, torch's global generator is reset to its state
before the first pass, so that shuffling and augmentation give the same data again; its state is restored afterwards.
The stopping rule uses KFAC's traces, in the first pass.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxcurv.blocks.diagonal import Diagonal
from fxcurv.blocks.eigenbasis import Eigenbasis
from fxcurv.blocks.kronecker import Kronecker
from fxcurv.blocks.lazy_gram import moment_of
from fxcurv.contractions.entries import widened
from fxcurv.core.errors import InputError
from fxcurv.core.rounding import close, tolerance_of
from fxcurv.dataset.accumulation import Accumulator, Pass, one_pass, settled
from fxcurv.dataset.compiled import CompiledModel
from fxcurv.dataset.processes import Processes
from fxcurv.dataset.state import Settings, length_of
from fxcurv.quantities.ekfac import EKFAC, Bases, Eigenvalues, eigenvectors
from fxcurv.quantities.factors import Factor
from fxcurv.quantities.kfac import KFAC
from fxcurv.quantities.protocol import facts_of
from fxcurv.quantities.selection import Pattern, Selection
from fxcurv.results.curvature import Curvature
from fxcurv.results.entry import Entries, Entry
from fxcurv.signature.stable import batch_digest

__all__ = ["accumulate"]


Key = tuple[str, tuple[str, ...]]
"""A quantity and the parameters of one of its blocks."""


def accumulate(compiled: CompiledModel, loader: Iterable[Any], settings: Settings) -> Curvature:
    """Return the curvature over all batches of a loader, of all processes; see `Compiled.accumulate`.

    Raises an InputError for EKFAC if the data can be read only once (FXC110, before reading), or if they change
    between the passes (FXC431).
    """
    if not any(isinstance(quantity, EKFAC) for quantity in compiled.selection.quantities.values()):
        return one_pass(compiled, loader, settings).result
    if isinstance(loader, Iterator):
        raise InputError(
            "EKFAC takes two passes, and the data can be read only once",
            remedy="give a list or a DataLoader, or request kfac",
            code="FXC110",
        )
    start, shuffling = settings.generator and settings.generator.clone_state(), torch.get_rng_state()
    order = _Order(settings)
    accumulator = one_pass(_first(compiled), loader, settings, Pass("first pass", order.record))
    first = accumulator.result
    order.close(accumulator, loader)
    if not (blocks := _blocks(first, compiled)):
        return _corrected(first, compiled, {})
    bases = Bases(_vectors(compiled.model, blocks, settings), _factors(compiled))
    generator = start or torch.Generator(accumulator.device).manual_seed(accumulator.generator.initial_seed())
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(shuffling)
        over, again = Pass("second pass", order.compare), order.settings(generator)
        second = one_pass(_second(compiled, blocks, bases), loader, again, over).state.total
    second = _check_same(compiled.model, first, second, settings.check_deterministic)
    return _corrected(first, compiled, _eigenbases(blocks, bases, second))


# Quantities of each pass ------------------------------------------------------------------------------------------


def _first(compiled: CompiledModel) -> CompiledModel:
    """Return the compiled model with KFAC instead of EKFAC."""
    quantities = {
        name: KFAC(q.factor, q.approx, q.joint) if isinstance(q, EKFAC) else q
        for name, q in compiled.selection.quantities.items()
    }
    selection = replace(compiled.selection, quantities=quantities)
    return compiled.choosing(selection)


def _second(compiled: CompiledModel, blocks: Iterable[Key], bases: Bases) -> CompiledModel:
    """Return the compiled model for the eigenvalues of these blocks."""
    asked: dict[str, Eigenvalues] = {}
    patterns: dict[Pattern, tuple[str, ...]] = {"*": ()}
    for name, parameters in blocks:
        whole = compiled.selection.quantities[name]
        assert isinstance(whole, EKFAC)
        asked[name] = Eigenvalues(whole.factor, whole.approx, whole.joint)
        for parameter in map(glob.escape, parameters):
            patterns[parameter] = (*patterns.get(parameter, ()), name)
    return compiled.choosing(Selection(asked, patterns), bases)


def _blocks(first: Curvature, compiled: CompiledModel) -> dict[Key, Kronecker]:
    """Return the KFAC blocks whose eigenvalues EKFAC corrects."""
    return {
        (e.quantity, e.value.parameters): e.value
        for e in first.entries
        if isinstance(e.value, Kronecker) and isinstance(compiled.selection.quantities[e.quantity], EKFAC)
    }


def _factors(compiled: CompiledModel) -> tuple[Factor, ...]:
    """Return the factors whose columns the first pass uses, in order."""
    selection, trainable = (
        compiled.selection,
        {name for name, p in compiled.model.named_parameters() if p.requires_grad},
    )
    asked = selection.of(compiled.model)
    return tuple(
        dict.fromkeys(q.factor for name, q in selection.quantities.items() if trainable.intersection(asked[name]))
    )


def _vectors(model: nn.Module, blocks: Mapping[Key, Kronecker], settings: Settings) -> dict[Key, tuple[Tensor, Tensor]]:
    """Return U_A and U_G of every block, in the dtype of its computation, bitwise equal on each process."""
    processes = Processes.of_group(settings.timeout)
    quiet = None if settings.progress and processes.rank == 0 else True

    def found() -> list[Tensor]:
        each = tqdm(blocks.values(), "eigenvectors", disable=quiet, unit="block")
        return [
            eigenvectors(moment, f"the factor {kind} of {block.name}").to(dtype(block))
            for block in each
            for kind, moment in (("A", block.input_moment), ("G", block.output_moment))
        ]

    def like() -> list[Tensor]:
        moments = ((b, m) for b in blocks.values() for m in (b.input_moment, b.output_moment))
        return [torch.empty(moment_of(m).shape, dtype=dtype(b), device=b.device) for b, m in moments]

    def dtype(block: Kronecker) -> torch.dtype:
        return widened(model.get_parameter(block.parameters[0])).dtype

    vectors = iter(processes.of_first(found, like))
    return {key: (next(vectors), next(vectors)) for key in blocks}


def _eigenbases(blocks: Mapping[Key, Kronecker], bases: Bases, second: Curvature) -> dict[Key, Eigenbasis]:
    """Return the blocks with the eigenvalues of the second pass."""
    found: dict[Key, Eigenbasis] = {}
    for key, block in blocks.items():
        name, parameters = key
        diagonal = next(e.value for p in parameters if (e := second[name].entries[p]).value is not None)
        assert isinstance(diagonal, Diagonal)
        U_A, U_G = (U.to(diagonal.values) for U in bases.vectors[key])
        values = diagonal.values.view(len(U_A), U_G.shape[-1], U_A.shape[-1])
        found[key] = Eigenbasis(block.shape, U_A, U_G, values, in_out=block.in_out, **block.labels)
    return found


def _corrected(first: Curvature, compiled: CompiledModel, blocks: Mapping[Key, Eigenbasis]) -> Curvature:
    """Return the first pass's result with EKFAC blocks instead of KFAC blocks."""

    def corrected(e: Entry) -> Entry:
        value = blocks[e.quantity, e.value.parameters] if isinstance(e.value, Kronecker) else e.value
        return replace(e, value=value, **facts_of(compiled.selection.quantities[e.quantity]))

    quantities = {
        name: Entries(map(corrected, entries.entries.values()))
        if isinstance(compiled.selection.quantities[name], EKFAC)
        else entries
        for name, entries in first.quantities.items()
    }
    return replace(first, quantities=quantities)


# The same data ----------------------------------------------------------------------------------------------------


@dataclass
class _Order:
    """Batches of the first pass; if it was partial, the second pass must use the same batches in order."""

    asked: Settings
    digests: list[str] = field(default_factory=list[str])
    partial: bool = False
    seen: int = 0

    def record(self, batch: Any) -> None:
        """Record a batch of the first pass."""
        if self.asked.max_batches is not None or self.asked.until_rel_error is not None:
            self.digests.append(batch_digest(batch))

    def close(self, accumulator: Accumulator, loader: Iterable[Any]) -> None:
        """Finish the first pass."""
        taken, length = accumulator.state.batches, length_of(loader)
        stopped = settled(accumulator) or taken == self.asked.max_batches
        self.partial = stopped and (length is None or taken < length)

    def compare(self, batch: Any) -> None:
        """Check a batch of the second pass; raise an InputError if it differs from the first pass."""
        if self.partial and batch_digest(batch) != self.digests[self.seen]:
            raise _changed(
                f"with max_batches or until_rel_error both passes take the same batches, and batch {self.seen + 1} "
                "is another one"
            )
        self.seen += 1

    def settings(self, generator: torch.Generator) -> Settings:
        """Return the settings of the second pass."""
        most = max(1, len(self.digests)) if self.partial else self.asked.max_batches
        path = self.asked.checkpoint and Path(self.asked.checkpoint)
        beside = path.with_name(f"{path.name}.second") if path else None
        return replace(self.asked, max_batches=most, until_rel_error=None, checkpoint=beside, generator=generator)


def _check_same(model: nn.Module, first: Curvature, second: Curvature | None, values: bool) -> Curvature:
    """Return the second pass's result; raise if the number of samples, or with `values` the loss, differs."""
    samples = 0 if second is None else second.samples
    if second is None or first.samples != samples:
        raise _changed(f"the first pass over the data saw {first.samples} samples, the second {samples}")
    tolerance = max(tolerance_of(p.dtype) for p in model.parameters() if p.is_floating_point())
    if values and not close(second.loss, first.loss, tolerance):
        losses = f"{first.loss.item():.9g} in the first pass over the data and {second.loss.item():.9g} in the second"
        raise _changed(f"the loss was {losses}")
    return second


def _changed(cause: str) -> InputError:
    return InputError(
        cause,
        remedy="shuffle and augment by torch's global generator, which is reset, or not at all; "
        "check_deterministic=False accepts random augmentation",
        code="FXC431",
    )
