"""eager: the same quantities by plain autograd on the model as it is, one column of one sample at a time.

Nothing is traced, so that it works for any model that runs, control flow on values and samples that mix included; each
column costs a backward pass per sample. It is what `on_unsupported="fallback"` falls back on, and what the compiled
graphs are compared with. Linear layers and convolutions are seen as they are called: a zero added to what they return
receives the cotangent S, and where Σ_s S xᵀ is all of a weight's gradient, the weight has Kronecker factors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxcurv import ops
from fxcurv.capture import Inputs, Output, as_call, batch_size, selector, structural_copy, without_autocast
from fxcurv.choice import Choice
from fxcurv.contractions import RotatedDiagonal, Statistic, Sum, combined, per_sample
from fxcurv.ekfac import bases, diagonalized, rotated
from fxcurv.errors import FxcurvError, InputError, UnsupportedError
from fxcurv.hessian import entries_apart, twice
from fxcurv.kfra import recursive
from fxcurv.losses import loss_terms, loss_value
from fxcurv.program import Job, Plan, jobs_for
from fxcurv.pullback import Rotate
from fxcurv.quantities import Exact, Factor, Used
from fxcurv.result import Curvature
from fxcurv.rules import Use, positions, rule_of
from fxcurv.run import Batch, assembled, fresh_generator

__all__ = ["by_autograd", "check_repeatable"]


def by_autograd(
    model: nn.Module,
    loss: nn.Module,
    choice: Choice,
    batch: Batch,
    output: Output = None,
) -> Curvature:
    """The chosen quantities at a batch; every value has the status `fallback`.

    A weight whose samples mix, or which is not used by linear layers and convolutions alone, has a dense block or a
    named diagonal under KFAC. Columns of a sampled factor are those that the compiled model draws from `generator`.
    Raises an InputError if the model's output or buffers change from call to call, as in training mode.
    """
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), without_autocast(), sdpa_kernel(SDPBackend.MATH):
        passes = _forward(model, batch.inputs, output)
        whole = torch.cat([p.output for p in passes]).detach()
        terms = loss_terms(loss, whole, batch.target)
        generator = batch.generator or fresh_generator(whole.device)
        wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
        used = _used(wanted, passes)
        described = {q: _among({p: used[p] for p in names if p in used}) for q, names in choice.of(model).items()}
        jobs = jobs_for(choice.quantities, described, fallback=True)
        for job, _, _ in recursive(jobs):
            raise UnsupportedError(
                f"{job.name} of {job.used.name!r} is a recursion over the nodes of a graph, and autograd has none",
                remedy="ask for kflr, or leave the parameter out",
                code="FXC322",
            )
        sums: dict[str, Sum] = {}
        for one in passes:
            _over_samples(sums, _input_sums(jobs, one))
        quiet = None if batch.progress else True
        factors = dict.fromkeys(quantity.factor for quantity in choice.quantities.values())
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
            each = [_second(loss, whole, batch.target, (one, wanted[job.used.name])) for one in passes]
            stacked = torch.cat(each)
            sums[job.sums[name]] = stacked if statistic.per_sample else stacked.sum(0)
    return assembled(Plan.of(model, choice, jobs, {}), sums, terms, whole, str(loss.reduction))


def _idle(factor: Factor, jobs: Sequence[Job]) -> bool:
    """Whether no column of a factor is read, or drawn."""
    return isinstance(factor, Exact) and all(statistic.reads == "loss" for _, statistic in _statistics(jobs))


def _over_columns(
    sums: dict[str, Sum], jobs: Sequence[Job], columns: Iterable[Iterator[tuple[_Pass, _Pulled]]]
) -> None:
    """Put the parts of columns, each pulled back sample by sample, to what is there."""
    for column in columns:
        found: dict[str, Sum] = {}
        for _, pulled in column:
            _over_samples(found, _summands(jobs, pulled))
        for key, statistic in _statistics(jobs):
            if key in found:
                combined(sums, key, found[key], statistic.columns)


def _over_samples(sums: dict[str, Sum], parts: Iterable[tuple[str, Statistic, Tensor]]) -> None:
    """Put the parts of one more sample to those of the samples before."""
    for key, statistic, part in parts:
        combined(sums, key, part, statistic.samples)


def _statistics(jobs: Sequence[Job]) -> Iterator[tuple[str, Statistic]]:
    """The statistics of jobs, by the names of their sums."""
    for job in jobs:
        for name, statistic in job.quantity.statistics(job.used).items():
            yield job.sums[name], statistic


def _among(used: Mapping[str, Used]) -> dict[str, Used]:
    """The descriptions, without partners of which the quantity is not asked."""
    return {name: u if u.partner in used else replace(u, partner=None) for name, u in used.items()}


# Sums of one column of one pass -------------------------------------------------------------------------------------


def _samples(passes: Sequence[_Pass], S: Tensor, wanted: Mapping[str, Tensor]) -> Iterator[tuple[_Pass, _Pulled]]:
    """A column of all samples, pulled back for each sample alone."""
    for one in passes:
        for S_n in one.columns(S):
            yield one, one.pulled(S_n, wanted)


def _second(loss: nn.Module, whole: Tensor, target: Tensor, at: tuple[_Pass, Tensor]) -> Tensor:
    """The diagonal of the loss Hessian with respect to a parameter, of each sample of a pass: `[n, *θ]`."""
    one, parameter = at
    found: list[Tensor] = []
    for n in range(len(whole))[one.samples]:
        alone = torch.cat([whole[:n], one.output[n - one.samples.start :][:1], whole[n + 1 :]])
        found.append(entries_apart(loss_value(loss, alone, target), parameter))
    return torch.stack(found)


def _rotated(
    jobs: Sequence[Job], one: _Pass, pulled: _Pulled, eigenvectors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Statistic, Tensor]]:
    """The summands of the second pass."""
    for job, name, statistic in rotated(jobs):
        U_A, U_G = (eigenvectors[basis] for basis in bases(jobs, job))
        xs = [Rotate(statistic.ones)(x, U_A) for x in one.inputs(job.used.name)]
        Ss = [Rotate()(S, U_G) for S in pulled.positions(job.used.name)]
        yield job.sums[name], statistic, statistic(xs, Ss)


def _summands(jobs: Sequence[Job], pulled: _Pulled) -> Iterator[tuple[str, Statistic, Tensor]]:
    """The summands of every statistic that reads S, by the names of the sums."""
    for job in jobs:
        for statistic, module in job.quantity.statistics(job.used).items():
            if module.reads == "S" and job.used.matrix:
                yield job.sums[statistic], module, module(pulled.positions(job.used.name))
            elif module.reads in ("S", "xS") and not isinstance(module, RotatedDiagonal):
                entries = job.used.flat(pulled.gradients[job.used.name]).view(1, 1, 1, 1, -1)  # [v,n,s,g,o]
                summand = module([entries]) if module.reads == "S" else module([None], [entries])
                yield job.sums[statistic], module, summand


def _input_sums(jobs: Sequence[Job], one: _Pass) -> Iterator[tuple[str, Statistic, Tensor]]:
    """The summands of every statistic of inputs."""
    for job in jobs:
        for statistic, module in job.quantity.statistics(job.used).items():
            if module.reads == "x":
                yield job.sums[statistic], module, module(one.inputs(job.used.name))


# How parameters are used --------------------------------------------------------------------------------------------


def _used(wanted: Mapping[str, Tensor], passes: Sequence[_Pass]) -> dict[str, Used]:
    """The parameters that reach the output, as their uses see them."""
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(p.output.shape, generator=generator).to(p.output) for p in passes]
    pulled = [one.pulled(S, wanted) for one, S in zip(passes, random, strict=True)]
    reached = [name for name in wanted if any(p.reached[name] for p in pulled)]
    matrices = {name: _matrix(name, wanted[name], passes, pulled) for name in reached}
    partners = {name: _partner(name, reached, passes, pulled) for name, used in matrices.items() if used is not None}
    weights = {bias: name for name, bias in partners.items()}
    return {
        name: replace(used, partner=partners[name])
        if (used := matrices[name]) is not None
        else Used(name, tuple(wanted[name].shape), 1, wanted[name].numel(), 1, 1, False, weights.get(name))
        for name in reached
    }


def _matrix(name: str, weight: Tensor, passes: Sequence[_Pass], pulled: Sequence[_Pulled]) -> Used | None:
    """The description of a weight that is used by linear layers and convolutions alone, each sample by itself."""
    inputs_first, *more = {call.inputs_first for one in passes for call in one.calls_of(name)} or (False,)
    if more or not all(one.single and one.calls_of(name) for one in passes):
        return None
    inputs = [one.inputs(name) for one in passes]
    layouts = {tuple(x.shape[1:] for x in xs) for xs in inputs}
    reads = any(call.reads for one in passes for call in one.calls_of(name))
    shared = len(passes) > 1 and not reads and all(_equal(xs, inputs[0]) for xs in inputs[1:])
    if shared or len(layouts) > 1 or len({x.shape[2:] for x in inputs[0]}) > 1:
        return None
    (groups, size), s = inputs[0][0].shape[2:], sum(x.shape[1] for x in inputs[0])
    outputs = weight.numel() // (groups * size)
    used = Used(name, tuple(weight.shape), groups, outputs, size, s, True, inputs_first=inputs_first)
    alike = (
        _close(used.laid(per_sample(xs, p.positions(name))[0, 0]), p.gradients[name])
        for xs, p in zip(inputs, pulled, strict=True)
    )
    return used if all(alike) else None


def _partner(name: str, reached: Collection[str], passes: Sequence[_Pass], pulled: Sequence[_Pulled]) -> str | None:
    """The bias that exactly the uses of this weight add."""
    biases = {call.bias for one in passes for call in one.calls_of(name)}
    bias = biases.pop()
    if biases or bias is None or bias not in reached:
        return None
    sums = [torch.stack([S.sum((0, 1, 2)).flatten() for S in p.positions(name)]).sum(0) for p in pulled]
    return bias if all(_close(s, p.gradients[bias]) for s, p in zip(sums, pulled, strict=True)) else None


def _equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding."""
    return a.shape == b.shape and bool((a - b).abs().max() <= torch.finfo(b.dtype).eps ** (2 / 3) * b.abs().max())


# Forward passes -------------------------------------------------------------------------------------------------------

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS: Mapping[Any, type[Convolution]] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
PRODUCTS: Mapping[Any, Sequence[str]] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), ("input", "weight")),
    **dict.fromkeys((torch.addmm, Tensor.addmm), ("bias", "input", "weight")),
}
NORMS = (F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm)
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class _Call:
    """One call of a linear layer or convolution, whose output has the zero `z` added: its input, its parameters."""

    op: nn.Linear | ops.MatMul | Convolution
    x: Tensor
    weight: str
    bias: str | None
    z: Tensor
    reads: bool
    """Whether what the layer sees is differentiable in the model's inputs."""

    @property
    def _use(self) -> Use:
        use = rule_of(self.op).use
        assert use is not None
        return use

    @property
    def inputs_first(self) -> bool:
        """Whether the weight lies as `W[i,o]`."""
        return self._use.weight == "inputs_first"

    def input_positions(self) -> Tensor:
        """x[1,s,g,i]: what the layer sees, all rows of it positions of one sample."""
        if isinstance(self.op, nn.Linear | ops.MatMul):
            return positions(self.x.reshape(1, -1, self.x.shape[-1]), lead=1)
        return self._use.x(self.op, self.x).flatten(0, 1).unsqueeze(0)

    def output_positions(self, S: Tensor) -> Tensor:
        """S[1,1,s,g,o]: what arrives at the layer's output."""
        if isinstance(self.op, nn.Linear | ops.MatMul):
            return positions(S.reshape(1, 1, -1, S.shape[-1]), lead=2)
        batched = S.reshape(1, -1, *S.shape[-len(self.op.kernel_size) - 1 :])
        return self._use.S(self.op, batched).flatten(1, 2).unsqueeze(1)


@dataclass(frozen=True)
class _Pulled:
    """One column of the factor, pulled back: at every parameter, and at the output of every call."""

    gradients: Mapping[str, Tensor]
    reached: Mapping[str, bool]
    calls: Sequence[tuple[_Call, Tensor]]

    def positions(self, weight: str) -> list[Tensor]:
        """S[1,1,s,g,o] at each call of a weight."""
        return [call.output_positions(S) for call, S in self.calls if call.weight == weight]


@dataclass(frozen=True)
class _Pass:
    """One forward pass over some samples, with its graph."""

    samples: slice
    output: Tensor
    calls: Sequence[_Call]

    @property
    def single(self) -> bool:
        return len(self.output) == 1

    def calls_of(self, weight: str) -> list[_Call]:
        return [call for call in self.calls if call.weight == weight]

    def inputs(self, weight: str) -> list[Tensor]:
        """x[1,s,g,i] at each call of a weight."""
        return [call.input_positions() for call in self.calls_of(weight)]

    def columns(self, S: Tensor) -> Iterator[Tensor]:
        """A column `[N, …]` of all samples -> one for each sample of this pass, zero at its others."""
        for n, rows in enumerate(S[self.samples]):
            alone = torch.zeros_like(S[self.samples])
            alone[n] = rows
            yield alone

    def pulled(self, S: Tensor, wanted: Mapping[str, Tensor]) -> _Pulled:
        """The column `S` of the output's shape, pulled back."""
        at = [*wanted.values(), *(call.z for call in self.calls)]
        found = _gradients(self.output, at, S)
        zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(at, found, strict=True)]
        return _Pulled(
            dict(zip(wanted, zeros, strict=False)),
            {name: g is not None for name, g in zip(wanted, found, strict=False)},
            list(zip(self.calls, zeros[len(wanted) :], strict=True)),
        )


def _gradients(y: Tensor, at: Sequence[Tensor], S: Tensor) -> Sequence[Tensor | None]:
    """(∂y/∂t)ᵀ S for each tensor t, None where y does not depend on it."""
    return torch.autograd.grad(y, at, S, retain_graph=True, allow_unused=True) if at else ()


def _forward(model: nn.Module, inputs: Inputs, output: Output) -> list[_Pass]:
    """A pass per sample where each sample's output is its own, else one over the whole batch."""
    copy, select = structural_copy(model, *model.parameters()), selector(output)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    number = batch_size(inputs)

    def forward(samples: slice) -> _Pass:
        given = pytree.tree_map_only(Tensor, lambda t: _leaf(t[samples]), as_call(inputs))
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, given)  # which the model may write into
        with _Recorder(names, [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]) as recorder:
            y = select(copy(*args, **kwargs))
        if not y.requires_grad:
            raise InputError(
                "the output depends on no trainable parameter", node="output", remedy="see requires_grad", code="FXC207"
            )
        found = _gradients(y, [call.z for call in recorder.calls], torch.ones_like(y))
        return _Pass(samples, y, [call for call, g in zip(recorder.calls, found, strict=True) if g is not None])

    whole = forward(slice(0, number))
    check_repeatable(model, copy, whole.output, forward(slice(0, number)).output)
    if number == 1:
        return [whole]
    try:
        single = [forward(slice(n, n + 1)) for n in range(number)]
    except FxcurvError:
        raise
    except Exception:  # whatever a model raises that only takes whole batches
        return [whole]
    apart = all(_close(one.output.detach(), whole.output[one.samples].detach()) for one in single)
    return single if apart else [whole]


def _leaf(t: Tensor) -> Tensor:
    """A leaf of autograd's graph with these values."""
    return t.detach().requires_grad_(t.is_floating_point())


def check_repeatable(model: nn.Module, copy: nn.Module, first: Tensor, second: Tensor) -> None:
    """An InputError if two calls of `copy`, a copy of the model, gave two outputs, or if they updated its buffers."""
    buffers = zip(model.named_buffers(), copy.buffers(), strict=False)
    updated = [name for (name, before), after in buffers if before.shape == after.shape and not _same(before, after)]
    if updated:
        raise InputError(f"the model updates its buffer {updated[0]}", remedy="call model.eval()", code="FXC402")
    if not _same(first, second):
        raise InputError("the model's output changes from call to call", remedy="call model.eval()", code="FXC403")


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


class _Recorder(TorchFunctionMode):
    """Records the calls of linear layers and convolutions on the parameters of the given names, by identity."""

    def __init__(self, names: Mapping[int, str], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.names, self.inputs = names, inputs
        self.reading: dict[Any, bool] = {}
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # a Python function, whose body calls linear layers
            with self:
                return _body(func)(*args, **kwargs)
        y = func(*args, **kwargs)
        if func in NORMS and y.requires_grad:  # see `autograd_pull_each`
            y.register_hook(torch.Tensor.contiguous)
        if func is not F.linear and func not in CONVOLUTIONS and func not in PRODUCTS:
            return y
        given: dict[str, Any] = {**dict(zip(PRODUCTS.get(func, ARGUMENTS), args, strict=False)), **kwargs}
        weight, swapped = self._weight(given.get("weight"))
        if weight is None or not given.keys().isdisjoint(("alpha", "beta")):
            return y
        z = torch.zeros_like(y, requires_grad=True)
        op, x = _convolution(func, **given) if func in CONVOLUTIONS else (_product(func, swapped), given["input"])
        bias = self.names.get(id(given.get("bias")))
        self.calls.append(_Call(op, x.detach(), weight, bias, z, self._reads(x.grad_fn)))
        return y + z

    def _weight(self, given: Any) -> tuple[str | None, bool]:
        """The name of a parameter that is given, and whether it is given as its transpose."""
        base = getattr(given, "_base", None)
        if base is None or id(base) not in self.names or base.ndim != 2:
            return self.names.get(id(given)), False
        swapped = given.shape == base.mT.shape and given.stride() == base.mT.stride()
        return (self.names[id(base)], True) if swapped else (None, False)

    def _reads(self, end: Any) -> bool:
        """Whether the graph of autograd leads from a node to an input of the model; `reading` remembers."""
        stack = [end]
        while stack:
            node = stack[-1]
            before = [] if node is None else [n for n, _ in node.next_functions]
            new = [n for n in before if n not in self.reading and n is not None]
            if node is not None and node not in self.reading and new:
                stack += new
                continue
            leaf = getattr(node, "variable", None)
            self.reading[node] = any(t is leaf for t in self.inputs) or any(self.reading.get(n, False) for n in before)
            stack.pop()
        return self.reading[end]


def _product(func: Any, swapped: bool) -> nn.Linear | ops.MatMul:
    """The module that a call with a matrix, or its transpose, amounts to."""
    return ops.MatMul(1, 1) if (func in PRODUCTS) != swapped else nn.Linear(1, 1, device="meta")


def _body(func: FunctionType) -> FunctionType:
    """A Python function of torch that does not ask first whether its arguments or a mode override it."""
    plain = {**func.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(func.__code__, plain, func.__name__, func.__defaults__, func.__closure__)


def _convolution(
    func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, **geometry: Any
) -> tuple[Convolution, Tensor]:
    """The module that a call of a convolution amounts to, and its input, batched and padded."""
    kernel = tuple(weight.shape[2:])
    x = input if input.ndim == weight.ndim else input.unsqueeze(0)
    groups, padding = geometry.pop("groups", 1), geometry.pop("padding", 0)
    kind: Any = CONVOLUTIONS[func]
    op = kind(weight.shape[1] * groups, len(weight), kernel, groups=groups, device="meta", **geometry)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, op.dilation, strict=True)]
        return op, F.pad(x, [p for t in reversed(totals) for p in (t // 2, t - t // 2)])
    if padding != "valid":
        each = (padding,) * len(kernel) if isinstance(padding, int) else tuple(padding)
        op.padding = each * len(kernel) if len(each) == 1 else each
    return op, x
