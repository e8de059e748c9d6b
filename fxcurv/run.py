"""run: a batch through a program's forward graph, chunks of columns through its backward graphs, sums into results."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxcurv.blocks import Block
from fxcurv.capture import Inputs, as_call, without_autocast
from fxcurv.contractions import Sum
from fxcurv.losses import LossTerms, loss_terms
from fxcurv.memory import Chunks
from fxcurv.program import Plan, Program
from fxcurv.quantities import Factor, Quantity
from fxcurv.result import Curvature, Entries, Entry
from fxcurv.shapes import resolve
from fxcurv.spec import module_of, output_of

__all__ = ["COLUMN_BYTES", "Batch", "assembled", "bind", "default_columns", "fresh_generator", "run"]

COLUMN_BYTES = 1 << 29
"""How much memory one chunk of columns may take at the widest place of the backward graph."""


@dataclass(frozen=True)
class Batch:
    """What a program is run on; `generator` draws sampled columns, `progress` shows a bar on a terminal."""

    inputs: Inputs
    target: Tensor
    generator: torch.Generator | None = None
    progress: bool = False


def run(program: Program, model: nn.Module, loss: nn.Module, batch: Batch, chunks: Chunks) -> Curvature:
    """The curvature of `loss` at a batch, with `chunks` of its samples and of columns at once.

    However it is cut, the terms of the loss and the columns drawn are those of the whole batch.
    """
    inputs = [t for t in pytree.tree_leaves(as_call(batch.inputs)) if isinstance(t, Tensor)]
    N, n = len(inputs[0]), chunks.samples
    parts = [slice(a, a + n) for a in range(0, N, n)]
    with torch.no_grad(), without_autocast():
        bind(program.canonical, model)
        first = program.forward(*inputs) if len(parts) == 1 else None
        output = torch.cat([program.canonical(*_cut(inputs, p)) for p in parts]) if first is None else first[0]
        terms = loss_terms(loss, output, batch.target)
        generator = batch.generator or fresh_generator(output.device)
        batch, state = dataclasses.replace(batch, generator=generator), generator.get_state()
        sums: dict[str, Sum] = {}
        for part in parts:
            generator.set_state(state)  # each part takes its samples out of the same draws
            _, kept, found = first or program.forward(*_cut(inputs, part))
            _add(program, found, sums)
            for factor in program.backwards:
                _pull_back(program, factor, kept, _columns(factor, terms, chunks, batch, part), sums)
            first = kept = None
        return assembled(program.plan, sums, terms, output, str(loss.reduction))


def _cut(inputs: Sequence[Tensor], part: slice) -> list[Tensor]:
    return [t[part] for t in inputs]


def _add(program: Program, parts: dict[str, Tensor], sums: dict[str, Sum]) -> None:
    """Add what a graph returned to the sums of earlier chunks, and let go of it part by part."""
    for key in list(parts):
        part = program.statistics[key].sum_of(parts.pop(key))
        sums[key] = sums[key] + part if key in sums else part


def bind(canonical: fx.GraphModule, model: nn.Module) -> None:
    """Point every slot at the model's tensors as they are now."""
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    tensors: dict[str, Tensor] = {**dict(parameters), **dict(buffers)}
    for node in canonical.graph.nodes:
        for slot, source in node.meta.get("slots", {}).items():
            _hold(module_of(node), slot, source(tensors))


def _hold(op: nn.Module, slot: str, tensor: Tensor) -> None:
    is_parameter = isinstance(tensor, nn.Parameter) or slot not in dict(op.named_parameters(recurse=False))
    setattr(op, slot, tensor if is_parameter else nn.Parameter(tensor, requires_grad=False))


def _columns(factor: Factor, terms: LossTerms, chunks: Chunks, batch: Batch, part: slice) -> Iterable[Tensor]:
    """The columns of a factor at some samples, chunk by chunk; with a bar, if there are several."""
    size, count = chunks.columns[factor], terms.count(factor)
    quiet = None if batch.progress and count > size else True
    columns = terms.columns(factor, size, batch.generator, part)
    return tqdm(columns, str(factor), -(-count // size), disable=quiet)


def _pull_back(
    program: Program, factor: Factor, kept: Mapping[str, Any], columns: Iterable[Tensor], sums: dict[str, Sum]
) -> None:
    """Add the sums of one factor, over chunks of its columns."""
    backward = program.backwards[factor]
    needed = {name: kept[name] for name in program.kept(factor)}
    dtype = output_of(program.canonical).meta["dtype"]
    for S in columns:
        _add(program, backward(S.to(dtype), **needed), sums)


def default_columns(program: Program, samples: int) -> int:
    """How many columns to pull back at once, so that those of the widest node stay within `COLUMN_BYTES`."""
    nodes = [node for node in program.canonical.graph.nodes if "shape" in node.meta]
    sizes = [
        math.prod(resolve(n.meta["shape"], samples)) * (samples if n.meta["samples"] is None else 1) for n in nodes
    ]
    bytes_each = max(4, output_of(program.canonical).meta["dtype"].itemsize)  # columns of half precision are widened
    return max(1, COLUMN_BYTES // (max(sizes) * bytes_each))


def assembled(plan: Plan, sums: Mapping[str, Sum], terms: LossTerms, output: Tensor, reduction: str) -> Curvature:
    """Sums -> values, by quantity and parameter."""
    samples, values = len(output), dict[tuple[str, str], Tensor | Block]()
    owners = Counter(id(sums[key]) for job in plan.jobs for key in job.sums.values())
    for job in plan.jobs:
        own = {
            name: sums[key] if owners[id(sums[key])] == 1 else sums[key].clone()  # results share no memory
            for name, key in job.sums.items()
        }
        value = job.quantity.finish(job.used, own, samples)
        if isinstance(value, Block):
            value = dataclasses.replace(value, parameters=job.parameters, status=job.status, reduction=reduction)
        values |= {(job.name, parameter): value for parameter in job.parameters}

    def entry(name: str, quantity: Quantity, parameter: str, status: str) -> Entry:
        value, reason = values.get((name, parameter)), str(plan.refusals.get(parameter, ""))
        shape, factor = plan.shapes[parameter], str(quantity.factor)
        return Entry(name, parameter, shape, status, factor, reduction, value, reason, repr(quantity))

    quantities = {
        name: Entries(entry(name, quantity, *item) for item in plan.statuses[name].items())
        for name, quantity in plan.quantities.items()
    }
    return Curvature(quantities, terms.value, output, samples, reduction, terms.divisor, plan.fingerprint)


def fresh_generator(device: torch.device) -> torch.Generator:
    """A generator of its own, so that the caller's global one is left alone."""
    generator = torch.Generator(device)
    generator.seed()
    return generator
