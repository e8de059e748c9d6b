"""autograd: the same quantities by plain autograd on the original model, one column of one sample at a time.

Nothing is traced. This works for any model that runs, also with control flow on values or samples that mix; each
column costs a backward pass per sample. It is the fallback of `on_unsupported="fallback"` and the reference for the
compiled graphs. Calls of linear layers and convolutions are recorded: a zero added to their output receives the
cotangent S, and if Σ_s S xᵀ equals the whole gradient of a weight, the weight has Kronecker factors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from fxcurv.contractions.definitions import RotatedDiagonal
from fxcurv.contractions.entries import per_sample
from fxcurv.contractions.statistic import Statistic, StatisticValue, combined
from fxcurv.core.errors import UnsupportedError
from fxcurv.core.generators import fresh_generator
from fxcurv.core.rounding import close
from fxcurv.frontend.inputs import Output
from fxcurv.frontend.isolation import without_autocast
from fxcurv.ir.backward_ops import Rotate
from fxcurv.losses.base import Loss
from fxcurv.quantities.ekfac import bases, diagonalized, rotated
from fxcurv.quantities.factors import Exact, Factor
from fxcurv.quantities.plan import Job, Plan, jobs_for
from fxcurv.quantities.protocol import ParameterUsage
from fxcurv.quantities.selection import Selection
from fxcurv.results.curvature import Curvature
from fxcurv.runtime.kfra import recursive
from fxcurv.runtime.recorder import Pulled, RecordedPass, recorded, same_tensors
from fxcurv.runtime.run import Minibatch, assembled
from fxcurv.runtime.second_derivatives import entries_apart, twice

__all__ = ["by_autograd"]


def by_autograd(
    model: nn.Module,
    loss: Loss,
    selection: Selection,
    batch: Minibatch,
    output: Output = None,
) -> Curvature:
    """Return the selected quantities at a batch; every value has the status `fallback`.

    Under KFAC, a weight whose samples mix, or that is not only used by linear layers and convolutions, has a dense
    block or a named diagonal. A sampled factor draws the same columns from `generator` as the compiled model.
    Raises an InputError if the model's output or buffers change from call to call, as in training mode.
    """
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), without_autocast(), sdpa_kernel(SDPBackend.MATH):
        passes = recorded(model, batch.inputs, output)
        whole = torch.cat([p.output for p in passes]).detach()
        terms = loss.terms(whole, batch.target)
        generator = batch.generator or fresh_generator(whole.device)
        wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
        usage = _used(wanted, passes)
        described = {q: _among({p: usage[p] for p in names if p in usage}) for q, names in selection.of(model).items()}
        jobs = jobs_for(selection.quantities, described, fallback=True)
        for job, _, _ in recursive(jobs):
            raise UnsupportedError(
                f"{job.name} of {job.usage.name!r} is a recursion over the nodes of a graph, "
                "which autograd does not have",
                remedy="ask for kflr, or leave the parameter out",
                code="FXC322",
            )
        sums: dict[str, StatisticValue] = {}
        for one in passes:
            _over_samples(sums, _input_sums(jobs, one))
        quiet = None if batch.progress else True
        factors = dict.fromkeys(quantity.factor for quantity in selection.quantities.values())
        for factor in factors if batch.bases is None else batch.bases.factors:
            mine = [job for job in jobs if job.quantity.factor == factor]
            if _idle(factor, mine):
                continue
            again = generator.clone_state()
            if batch.bases is None:
                columns = tqdm(terms.columns(factor, 1, generator), str(factor), terms.count(factor), disable=quiet)
                _over_columns(sums, mine, (_samples(passes, S[0].to(whole.dtype), wanted) for S in columns))
            else:
                terms.skip(factor, generator)
            eigenvectors = diagonalized(mine, factor, sums, batch.bases)
            for S in terms.columns(factor, 1, again) if eigenvectors else ():
                for one, pulled in _samples(passes, S[0].to(whole.dtype), wanted):
                    _over_samples(sums, _rotated(mine, one, pulled, eigenvectors))
        for job, name, statistic in twice(jobs):
            passes[0].gradients.require_second()
            each = [_second(loss, whole, batch.target, (one, wanted[job.usage.name])) for one in passes]
            stacked = torch.cat(each)
            sums[job.sums[name]] = stacked if statistic.per_sample else stacked.sum(0)
    return assembled(
        Plan.of(model, selection.quantities, selection.of(model), jobs, {}), sums, terms, whole, loss.reduction
    )


def _idle(factor: Factor, jobs: Sequence[Job]) -> bool:
    """Whether no column of a factor is read or drawn."""
    return isinstance(factor, Exact) and all(statistic.reads == "loss" for _, statistic in _statistics(jobs))


def _over_columns(
    sums: dict[str, StatisticValue], jobs: Sequence[Job], columns: Iterable[Iterator[tuple[RecordedPass, Pulled]]]
) -> None:
    """Accumulate the parts of columns, each pulled back sample by sample, into `sums`."""
    for column in columns:
        found: dict[str, StatisticValue] = {}
        for _, pulled in column:
            _over_samples(found, _summands(jobs, pulled))
        for key, statistic in _statistics(jobs):
            if key in found:
                combined(sums, key, found[key], statistic.columns)


def _over_samples(sums: dict[str, StatisticValue], parts: Iterable[tuple[str, Statistic, Tensor]]) -> None:
    """Accumulate the parts of one more sample into `sums`."""
    for key, statistic, part in parts:
        combined(sums, key, part, statistic.samples)


def _statistics(jobs: Sequence[Job]) -> Iterator[tuple[str, Statistic]]:
    """The statistics of jobs, by the names of their sums."""
    for job in jobs:
        for name, statistic in job.quantity.statistics(job.usage).items():
            yield job.sums[name], statistic


def _among(usage: Mapping[str, ParameterUsage]) -> dict[str, ParameterUsage]:
    """The usages, without partners for which the quantity is not requested."""
    return {name: u if u.partner in usage else replace(u, partner=None) for name, u in usage.items()}


# Sums of one column of one pass -------------------------------------------------------------------------------------


def _samples(
    passes: Sequence[RecordedPass], S: Tensor, wanted: Mapping[str, Tensor]
) -> Iterator[tuple[RecordedPass, Pulled]]:
    """A column of all samples, pulled back for each sample separately."""
    for one in passes:
        for S_n in one.columns(S):
            yield one, one.pulled(S_n, wanted)


def _second(loss: Loss, whole: Tensor, target: Tensor, at: tuple[RecordedPass, Tensor]) -> Tensor:
    """The diagonal of the loss Hessian with respect to a parameter, of each sample of a pass: `[n, *θ]`."""
    one, parameter = at
    found: list[Tensor] = []
    for n in range(len(whole))[one.samples]:
        alone = torch.cat([whole[:n], one.output[n - one.samples.start :][:1], whole[n + 1 :]])
        found.append(entries_apart(loss.value(alone, target), parameter))
    return torch.stack(found)


def _rotated(
    jobs: Sequence[Job], one: RecordedPass, pulled: Pulled, eigenvectors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Statistic, Tensor]]:
    """The summands of the second pass."""
    for job, name, statistic in rotated(jobs):
        U_A, U_G = (eigenvectors[basis] for basis in bases(jobs, job))
        xs = [Rotate(statistic.ones)(x, U_A) for x in one.inputs(job.usage.name)]
        Ss = [Rotate()(S, U_G) for S in pulled.positions(job.usage.name)]
        yield job.sums[name], statistic, statistic(xs, Ss)


def _summands(jobs: Sequence[Job], pulled: Pulled) -> Iterator[tuple[str, Statistic, Tensor]]:
    """The summands of every statistic that reads S, by the names of the sums."""
    for job in jobs:
        for statistic, module in job.quantity.statistics(job.usage).items():
            if module.reads == "S" and job.usage.matrix:
                yield job.sums[statistic], module, module(pulled.positions(job.usage.name))
            elif module.reads in ("S", "xS") and not isinstance(module, RotatedDiagonal):
                entries = job.usage.flat(pulled.gradients[job.usage.name]).view(1, 1, 1, 1, -1)  # [v,n,s,g,o]
                summand = module([entries]) if module.reads == "S" else module([None], [entries])
                yield job.sums[statistic], module, summand


def _input_sums(jobs: Sequence[Job], one: RecordedPass) -> Iterator[tuple[str, Statistic, Tensor]]:
    """The summands of every statistic that reads x, by the names of the sums."""
    for job in jobs:
        for statistic, module in job.quantity.statistics(job.usage).items():
            if module.reads == "x":
                yield job.sums[statistic], module, module(one.inputs(job.usage.name))


# How parameters are used --------------------------------------------------------------------------------------------


def _used(wanted: Mapping[str, Tensor], passes: Sequence[RecordedPass]) -> dict[str, ParameterUsage]:
    """The usages of the parameters that reach the output."""
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(p.output.shape, generator=generator).to(p.output) for p in passes]
    pulled = [one.pulled(S, wanted) for one, S in zip(passes, random, strict=True)]
    reached = [name for name in wanted if any(p.reached[name] for p in pulled)]
    matrices = {name: _matrix(name, wanted[name], passes, pulled) for name in reached}
    partners = {name: _partner(name, reached, passes, pulled) for name, usage in matrices.items() if usage is not None}
    weights = {bias: name for name, bias in partners.items()}
    return {
        name: replace(usage, partner=partners[name])
        if (usage := matrices[name]) is not None
        else ParameterUsage(name, tuple(wanted[name].shape), 1, wanted[name].numel(), 1, 1, False, weights.get(name))
        for name in reached
    }


def _matrix(
    name: str, weight: Tensor, passes: Sequence[RecordedPass], pulled: Sequence[Pulled]
) -> ParameterUsage | None:
    """The usage of a weight used only by linear layers and convolutions, separately for each sample; else None."""
    in_out, *more = {call.in_out for one in passes for call in one.calls_of(name)} or (False,)
    if more or not all(one.single and one.calls_of(name) for one in passes):
        return None
    inputs = [one.inputs(name) for one in passes]
    layouts = {tuple(x.shape[1:] for x in xs) for xs in inputs}
    reads = any(call.reads for one in passes for call in one.calls_of(name))
    shared = len(passes) > 1 and not reads and all(same_tensors(xs, inputs[0]) for xs in inputs[1:])
    if shared or len(layouts) > 1 or len({x.shape[2:] for x in inputs[0]}) > 1:
        return None
    (groups, size), s = inputs[0][0].shape[2:], sum(x.shape[1] for x in inputs[0])
    outputs = weight.numel() // (groups * size)
    usage = ParameterUsage(name, tuple(weight.shape), groups, outputs, size, s, True, in_out=in_out)
    alike = (
        close(usage.to_layout(per_sample(xs, p.positions(name))[0, 0]), p.gradients[name])
        for xs, p in zip(inputs, pulled, strict=True)
    )
    return usage if all(alike) else None


def _partner(
    name: str, reached: Collection[str], passes: Sequence[RecordedPass], pulled: Sequence[Pulled]
) -> str | None:
    """The bias that is added by the uses of this weight and nowhere else, if any."""
    biases = {call.bias for one in passes for call in one.calls_of(name)}
    bias = biases.pop()
    if biases or bias is None or bias not in reached:
        return None
    sums = [torch.stack([S.sum((0, 1, 2)).flatten() for S in p.positions(name)]).sum(0) for p in pulled]
    return bias if all(close(s, p.gradients[bias]) for s, p in zip(sums, pulled, strict=True)) else None
