"""run: run a batch through the forward graph, chunks of columns through the backward graphs, and assemble results."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxcurv.blocks.base import Block
from fxcurv.contractions.statistic import StatisticValue, combined
from fxcurv.core.generators import fresh_generator
from fxcurv.core.shapes import resolve
from fxcurv.core.torch_compat import holds
from fxcurv.frontend.copying import named_tensors
from fxcurv.frontend.inputs import Inputs, tensors_of
from fxcurv.frontend.isolation import without_autocast
from fxcurv.ir.nodes import module_of, output_of
from fxcurv.losses.base import Loss
from fxcurv.losses.terms import LossTerms
from fxcurv.quantities.ekfac import Bases, diagonalized
from fxcurv.quantities.factors import Factor, SecondPass
from fxcurv.quantities.plan import Plan
from fxcurv.quantities.protocol import Quantity, facts_of
from fxcurv.results.curvature import Curvature
from fxcurv.results.entry import Entries, Entry
from fxcurv.runtime.kfra import recursive_sums
from fxcurv.runtime.memory import Chunks
from fxcurv.runtime.program import Program
from fxcurv.runtime.second_derivatives import hessian_diagonals

__all__ = [
    "COLUMN_BYTES",
    "Gathered",
    "Minibatch",
    "assembled",
    "bind",
    "bind_tensors",
    "default_columns",
    "pull_back",
    "run",
]


COLUMN_BYTES = 1 << 29
"""Bytes that one chunk of columns may take at the widest node of the backward graph."""


@dataclass(frozen=True)
class Minibatch:
    """A batch of a run; `generator` draws sampled columns, `progress` shows a progress bar on a terminal.

    With `bases`, only the second pass runs, in these bases.
    """

    inputs: Inputs
    target: Tensor
    generator: torch.Generator | None = None
    progress: bool = False
    bases: Bases | None = None


def run(program: Program, model: nn.Module, loss: Loss, batch: Minibatch, chunks: Chunks) -> Curvature:
    """Compute the curvature of `loss` at a batch, in `chunks` of samples and columns.

    For any chunks, the terms of the loss and the drawn columns are the same as for the whole batch.
    """
    inputs = tensors_of(batch.inputs)
    N, n = len(inputs[0]), chunks.samples
    parts = [slice(a, a + n) for a in range(0, N, n)]
    with torch.no_grad(), without_autocast():
        bind(program.canonical, model)
        first = program.forward(*inputs) if len(parts) == 1 else None
        output = torch.cat([program.canonical(*_cut(inputs, p)) for p in parts]) if first is None else first[0]
        terms = loss.terms(output, batch.target)
        batch = dataclasses.replace(batch, generator=batch.generator or fresh_generator(output.device))
        walk = _Walk(program, inputs, terms, chunks, batch)
        if batch.bases is None:
            walk.through([f for f in program.backwards if not isinstance(f, SecondPass)], first)
        else:
            walk.past(batch.bases.factors)
        walk.again([f for f in program.backwards if isinstance(f, SecondPass)], first)
        parameters = dict(model.named_parameters())
        second = hessian_diagonals(program, parameters, inputs, partial(loss.value, target=batch.target))
        second |= recursive_sums(program, inputs, terms)
        return assembled(program.plan, {**walk.sums.whole, **second}, terms, output, loss.reduction)


def _cut(inputs: Sequence[Tensor], part: slice) -> list[Tensor]:
    return [t[part] for t in inputs]


class Gathered:
    """Sums over chunks of columns for one part of the batch, and over all parts."""

    def __init__(self, program: Program) -> None:
        self.statistics = program.statistics
        self.whole: dict[str, StatisticValue] = {}
        self.part: dict[str, StatisticValue] = {}

    def add(self, parts: dict[str, Tensor]) -> None:
        """Accumulate the sums returned by a graph, and free them one by one."""
        for key in list(parts):
            statistic = self.statistics[key]
            into = self.whole if statistic.samples is None else self.part
            combined(into, key, statistic.sum_of(parts.pop(key)), statistic.columns)

    def close(self) -> None:
        """Finish a part of the batch: concatenate its per-sample sums with those of earlier parts."""
        while self.part:
            key, part = self.part.popitem()
            combined(self.whole, key, part, self.statistics[key].samples)


@dataclass
class _Walk:
    """The run of a batch through a program, in parts; `draws` holds the generator state at each factor's start."""

    program: Program
    inputs: Sequence[Tensor]
    terms: LossTerms
    chunks: Chunks
    batch: Minibatch
    draws: dict[Factor, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sums = Gathered(self.program)

    def through(self, factors: Sequence[Factor], first: Any) -> None:
        """Compute the sums over inputs and of these factors; `first` is the forward result of an uncut batch."""
        for part in self._parts():
            _, saved, found = first or self.program.forward(*_cut(self.inputs, part))
            self.sums.add(found)
            for factor in factors:
                self._pull_back(factor, factor, saved, part)
            self.sums.close()
            del saved, found

    def past(self, factors: Sequence[Factor]) -> None:
        """Advance the generator as `through` would, without a backward pass."""
        assert self.batch.generator is not None
        for factor in factors:
            self.draws[factor] = self.batch.generator.get_state()
            self.terms.skip(factor, self.batch.generator)

    def again(self, factors: Sequence[SecondPass], first: Any) -> None:
        """Compute the sums of these factors, from the same columns, in the eigenbases of the sums so far or `bases`."""
        if not factors:
            return
        assert self.batch.generator is not None
        state = self.batch.generator.get_state()
        jobs, bases = self.program.plan.jobs, self.batch.bases
        given = {f: diagonalized(jobs, f.factor, self.sums.whole, bases) for f in factors}
        for part in self._parts():
            _, saved, _ = first or self.program.forward(*_cut(self.inputs, part))
            for factor in factors:
                self._pull_back(factor, factor.factor, {**saved, **given[factor]}, part)
            self.sums.close()
            del saved
        self.batch.generator.set_state(state)

    def _parts(self) -> list[slice]:
        n = self.chunks.samples
        return [slice(a, a + n) for a in range(0, len(self.inputs[0]), n)]

    def _pull_back(self, factor: Factor, drawn: Factor, saved: Mapping[str, Any], part: slice) -> None:
        """Compute the sums of one factor at some samples; every part and pass uses the same draws."""
        generator, size, count = self.batch.generator, self.chunks.columns[factor], self.terms.count(drawn)
        assert generator is not None
        generator.set_state(self.draws.setdefault(drawn, generator.get_state()))
        quiet = None if self.batch.progress and count > size else True
        columns = self.terms.columns(drawn, size, generator, part)
        columns = tqdm(columns, str(factor), -(-count // size), disable=quiet)
        pull_back(self.program, factor, saved, columns, self.sums)


def pull_back(
    program: Program, factor: Factor, saved: Mapping[str, Any], columns: Iterable[Tensor], sums: Gathered
) -> None:
    """Accumulate the sums of one factor into `sums`, over chunks of its columns."""
    backward = program.backwards[factor]
    needed = {name: saved[name] for name in program.given(factor)}
    dtype = output_of(program.canonical).meta["dtype"]
    for S in columns:
        sums.add(backward(S.to(dtype), **needed))


def default_columns(program: Program, samples: int) -> int:
    """Number of columns to pull back at once, so that columns of the widest node fit in `COLUMN_BYTES`."""
    nodes = [node for node in program.canonical.graph.nodes if "shape" in node.meta]
    sizes = [
        math.prod(resolve(n.meta["shape"], samples)) * (samples if n.meta["samples"] is None else 1) for n in nodes
    ]
    bytes_each = max(4, output_of(program.canonical).meta["dtype"].itemsize)  # columns of half precision are widened
    return max(1, COLUMN_BYTES // (max(sizes) * bytes_each))


def bind(canonical: fx.GraphModule, model: nn.Module) -> None:
    """Set every slot to the model's current tensors."""
    bind_tensors(canonical, named_tensors(model))


def bind_tensors(canonical: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
    """Set every slot to tensors by the names of the model's parameters and buffers."""
    for node in canonical.graph.nodes:
        for slot, source in node.meta.get("slots", {}).items():
            _hold(module_of(node), slot, source(tensors))


def _hold(op: nn.Module, slot: str, tensor: Tensor) -> None:
    if holds(op, slot, tensor):
        return
    is_parameter = isinstance(tensor, nn.Parameter) or slot not in dict(op.named_parameters(recurse=False))
    setattr(op, slot, tensor if is_parameter else nn.Parameter(tensor, requires_grad=False))


def assembled(
    plan: Plan, sums: Mapping[str, StatisticValue], terms: LossTerms, output: Tensor, reduction: str
) -> Curvature:
    """Turn sums into values by quantity and parameter."""
    samples, values = len(output), dict[tuple[str, str], Tensor | Block]()
    owners = Counter(id(sums[key]) for job in plan.jobs for key in job.sums.values())
    for job in plan.jobs:
        own = {
            name: sums[key] if owners[id(sums[key])] == 1 else sums[key].clone()  # results share no memory
            for name, key in job.sums.items()
        }
        value = job.finished(own, samples, plan.shapes)
        if isinstance(value, Block):
            value = dataclasses.replace(value, parameters=job.parameters, status=job.status, reduction=reduction)
        values |= {(job.name, parameter): value for parameter in job.parameters}

    def entry(name: str, quantity: Quantity, parameter: str, status: str) -> Entry:
        value, reason = values.get((name, parameter)), str(plan.refusals.get(parameter, ""))
        shape, factor = plan.shapes[parameter], str(quantity.factor)
        return Entry(name, parameter, shape, status, factor, reduction, value, reason, **facts_of(quantity))

    quantities = {
        name: Entries(entry(name, quantity, *item) for item in plan.statuses[name].items())
        for name, quantity in plan.quantities.items()
    }
    return Curvature(quantities, terms.value, output, samples, reduction, terms.divisor, plan.fingerprint)
