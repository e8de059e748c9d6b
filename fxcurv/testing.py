"""testing: assertions for a test suite, and checkers of rules, quantities, losses and compiled models.

`assert_compatible` is for models. `check_rule`, `check_quantity` and `check_loss` check an op, a quantity and a loss as
`torch.autograd.gradcheck` checks a function: each compares with autograd and raises an AssertionError. `bisect` finds
the first difference between a compiled model and autograd. No checker draws from the global generator.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.api import Compiled
from fxcurv.blocks.base import Block
from fxcurv.checks import Policy, Report, check
from fxcurv.checks.policy import Level, Require
from fxcurv.contractions.definitions import Gradient
from fxcurv.core.errors import InputError, Location, UnsupportedError, frames_of
from fxcurv.core.rounding import close
from fxcurv.core.shapes import Samples
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.checked_gradients import CustomGradients
from fxcurv.frontend.inputs import Inputs, Output, as_call, batch_size, selector
from fxcurv.frontend.isolation import without_autocast
from fxcurv.ir.backward_ops import InputPositions, OutputPositions, Unbroadcast
from fxcurv.ir.calls import Opaque
from fxcurv.ir.closed_form_vjps import closed_form
from fxcurv.ir.nodes import describe, inputs_of, module_of, output_of
from fxcurv.ir.rules import rule_of
from fxcurv.losses.base import Loss, as_loss
from fxcurv.losses.terms import LossTerms
from fxcurv.quantities.factors import Exact, Factor, Rademacher, Sampled, Stratified
from fxcurv.quantities.protocol import Quantity, facts_of
from fxcurv.quantities.selection import Asked, chosen
from fxcurv.results.curvature import Curvature
from fxcurv.results.entry import Entry
from fxcurv.results.merging import merge
from fxcurv.results.reading import load
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.memory import Chunks
from fxcurv.runtime.program import Program
from fxcurv.runtime.run import Minibatch, bind, run
from passes.parameter_usage import parameter_uses
from passes.pipeline import Emitted, canonicalize, emit

__all__ = ["Difference", "assert_compatible", "bisect", "check_loss", "check_quantity", "check_rule"]

Gradients = Mapping[str, Tensor]
COLUMNS = 4000
"""Number of columns of a random factor drawn by `check_loss`."""


def assert_compatible(
    model: nn.Module,
    inputs: Inputs,
    quantities: Asked = ("kfac", "diag_ggn"),
    *,
    require: Require = "approx",
    level: Level = "shape",
    loss: object = "cross_entropy",
    output: Output = None,
) -> Report:
    """Return the report of `fxcurv.check`; raise an AssertionError with its table if a parameter misses `require`."""
    __tracebackhide__ = True  # pytest then shows the line of the test
    policy = Policy(require=require)
    report = check(model, inputs, quantities, loss=loss, output=output, level=level, policy=policy)
    if not report.ok:
        raise AssertionError(f"not compatible with curvature\n{report}")
    return report


# Comparisons ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """A value and its reference; where the reference is smaller than `floor`, errors are relative to `floor`."""

    name: str
    found: Tensor
    expected: Tensor
    floor: float = 0.0

    def agrees(self, tolerance: float | None = None) -> bool:
        return close(self.found, self.expected, tolerance, self.floor)

    @property
    def error(self) -> float:
        """The largest difference, relative to the largest entry of the reference; infinite for different shapes."""
        if self.found.shape != self.expected.shape:
            return math.inf
        scale = max(float(self.expected.abs().max()), self.floor)
        difference = float((self.found - self.expected).abs().max())
        return difference / scale if scale else math.inf if difference else 0.0

    def __str__(self) -> str:
        if self.found.shape != self.expected.shape:
            return f"{self.name} has shape {list(self.found.shape)}, not {list(self.expected.shape)}"
        return f"{self.name} is off by {self.error:.2g}, relative to its largest entry"


def _assert_agree(subject: str, pairs: Iterable[_Pair], tolerance: float | None = None) -> None:
    """Raise an AssertionError for the first pair that differs."""
    __tracebackhide__ = True
    for pair in pairs:
        if not pair.agrees(tolerance):
            raise AssertionError(f"{subject}: {pair}")


def _generator(device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _random(columns: int, like: Tensor) -> Tensor:
    """Normal columns `[v, *like.shape]`, the same on every device."""
    return torch.randn(columns, *like.shape, generator=_generator(), dtype=torch.float64).to(like)


# Rules ------------------------------------------------------------------------------------------------------------


def check_rule(op: nn.Module, *inputs: Tensor, columns: int = 3, tolerance: float | None = None) -> None:
    """Check the derivative rule of an op of the vocabulary against `torch.autograd` of the op itself.

    `op` is a module whose type has a row in `fxcurv.ir.rules.RULES`. `inputs` are example inputs, in float64 like its
    parameters, with the samples along axis 0. Random columns `S[v, *y.shape]`, the first separately and the others at
    once, are pulled back to every floating-point input; the closed form of an opaque op is checked too. For an affine
    op, the gradients of `weight` and `bias` are computed from the positions of `x` and `S`. Non-differentiable ops are
    not checked. Errors are relative to the largest entry; `tolerance` depends on the dtype, 4e-11 for float64.

    Raises an AssertionError that names op, input and error, and a SpecError (FXC301) for an op without a rule.

        check_rule(nn.Conv2d(2, 4, 3).double(), torch.randn(5, 2, 8, 8, dtype=torch.float64))
    """
    __tracebackhide__ = True
    values = inputs[:-1] if getattr(op, "sized", False) else inputs  # the last input of a sized op only gives a size
    wrt = [k for k, x in enumerate(values) if x.is_floating_point()]
    _assert_agree(str(op), _pullbacks(op, inputs, wrt, columns, Samples(0)), tolerance)


@torch.no_grad()
def _pullbacks(op: nn.Module, xs: Sequence[Tensor], wrt: list[int], columns: int, place: Samples | None) -> list[_Pair]:
    """Pull back random columns to the inputs `wrt`, and to parameters if the samples are at `place`."""
    rule = rule_of(op)
    if rule.kind == "non_differentiable" or not (y := op(*(x.clone() for x in xs))).is_floating_point():
        return []
    held = ("weight", "bias") if rule.usage is not None and place is not None else ()
    slots = [slot for slot in held if isinstance(getattr(op, slot, None), Tensor)]
    S, saved = _random(columns, y), rule.save(op, tuple(xs), y)
    pulled = [torch.cat([rule.pull(op, part, saved, k) for part in (S[:1], S[1:]) if len(part)]) for k in wrt]
    found = [(f"input {k}", f"input {k}", _unbroadcast(op, xs[k], y)(S_k)) for k, S_k in zip(wrt, pulled, strict=True)]
    if isinstance(op, Opaque) and (closed := closed_form(op, S, xs, wrt)) is not None:
        found += [(f"input {k}, in closed form,", f"input {k}", S_k) for k, S_k in zip(wrt, closed, strict=True)]
    if place is not None:
        found += [(slot, slot, _parameter_gradient(op, slot, xs[0], S, place)) for slot in slots]
    expected, floor = _by_autograd(op, xs, S, wrt, slots), 1e-3 * _largest([S])
    return [_Pair(f"the pullback to {name}", value, expected[key], floor) for name, key, value in found]


def _unbroadcast(op: nn.Module, x: Tensor, y: Tensor) -> Unbroadcast:
    """The sum over the axes along which the op broadcast x, as emitted by the compiler."""
    lead = y.ndim - x.ndim
    if not getattr(op, "broadcasts", False):
        return Unbroadcast(0, ())
    return Unbroadcast(lead, [a for a, size in enumerate(x.shape) if size == 1 and y.shape[a + lead] != 1])


def _parameter_gradient(op: nn.Module, slot: str, x: Tensor, S: Tensor, place: Samples) -> Tensor:
    """The gradient of `weight` or `bias` for every column, `[v, *θ]`, from the positions of x and S."""
    usage, shape = rule_of(op).usage, getattr(op, slot).shape
    assert usage is not None
    at_x, at_S = InputPositions(op, place)(x) if slot == "weight" else None, OutputPositions(op, place)(S)
    each = [Gradient()([at_x], [column.unsqueeze(0)]) for column in at_S]  # [g,o,i]
    turned = slot == "weight" and usage.weight == "in_out"
    return torch.stack([(g[0].mT if turned else g).reshape(shape) for g in each])


def _by_autograd(op: nn.Module, xs: Sequence[Tensor], S: Tensor, wrt: list[int], slots: list[str]) -> dict[str, Tensor]:
    """The pullback of every column to the inputs `wrt` and to the parameters in `slots`, by autograd."""
    leaves = [x.detach().clone().requires_grad_(k in wrt) for k, x in enumerate(xs)]
    held = {slot: getattr(op, slot).detach().clone().requires_grad_() for slot in slots}
    wanted = {f"input {k}": leaves[k] for k in wrt} | held
    with torch.enable_grad():
        y = torch.func.functional_call(op, held, tuple(x.clone() for x in leaves))
    if not wanted or not y.requires_grad:
        return {name: t.new_zeros(len(S), *t.shape) for name, t in wanted.items()}
    given = {"retain_graph": True, "materialize_grads": True}
    columns = [torch.autograd.grad(y, list(wanted.values()), column, **given) for column in S]
    return {name: torch.stack(each) for name, each in zip(wanted, zip(*columns, strict=True), strict=True)}


# Quantities -------------------------------------------------------------------------------------------------------


def check_quantity(
    quantity: str | Quantity, model: nn.Module, loss: object, inputs: Inputs, target: Tensor
) -> UnsupportedError | None:
    """Check a quantity on a model: against autograd, over half batches, and through a file.

    `quantity` is an object or a name, `loss` is given as to `fxcurv.compile`, `inputs` and `target` hold at least two
    samples along axis 0. There are three checks:

    - The compiled value of every parameter equals the value by plain autograd on the model. Sampled factors draw
      from equal generators. Blocks are compared by their `invariants`. Errors are relative to the largest entry, with
      the tolerance of the model's dtype; float64 is best.
    - If the quantity has `combine == "add"` or `"concatenate"`, the merged results of two half batches equal the
      result of the whole. `Exact` replaces a random factor there.
    - A result has the same bits after saving and loading; this check needs safetensors.

    Returns None, or the UnsupportedError of a quantity without an autograd reference, such as KFRA: its first check is
    skipped. Raises an AssertionError that names the quantity, the parameter and the error.

        check_quantity(fxcurv.KFAC(fxcurv.Exact()), model.double().eval(), "cross_entropy", x, y)
    """
    __tracebackhide__ = True
    halves = list(zip(_halves(inputs), _halves(target), strict=True))
    compiled, refusal = Compiled(model, as_loss(loss), chosen(quantity)), None
    ((name, asked),) = compiled.selection.quantities.items()
    found = compiled(inputs, target, _generator(target.device))
    try:
        batch = Minibatch(inputs, target, _generator(target.device))
        expected = by_autograd(model, compiled.loss, compiled.selection, batch)
        _assert_agree(f"{name}, compiled and by autograd", _entry_pairs(found, expected))
    except UnsupportedError as error:
        refusal = error
    if facts_of(asked)["combine"] != "refuse" and (exact := _exact(asked)) is not None:
        of_exact = compiled.choosing(chosen(exact))
        merged = merge(*(of_exact(*half) for half in halves))
        _assert_agree(f"{name}, merged and whole", _entry_pairs(merged, of_exact(inputs, target)))
    _check_file(name, found)
    return refusal


def _exact(quantity: Quantity) -> Quantity | None:
    """The quantity with `Exact` for a random factor, whose columns differ for halves; None if its factor is fixed."""
    if not isinstance(quantity.factor, Sampled | Rademacher | Stratified):
        return quantity
    given: Any = quantity
    return replace(given, factor=Exact()) if any(f.name == "factor" and f.init for f in fields(given)) else None


def _halves(batch: Any) -> list[Any]:
    """Both halves of a tensor or of inputs, at least one sample each."""
    size = batch_size(batch)
    if size < 2:
        raise InputError("the batch holds one sample", remedy="give two or more", code="FXC110")
    cuts = (slice(size // 2), slice(size // 2, None))
    return [pytree.tree_map_only(Tensor, lambda t, cut=cut: t[cut], batch) for cut in cuts]


def _check_file(name: str, found: Curvature) -> None:
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.safetensors"
        found.save(path)
        loaded = load(path)
    for ours, its in zip(found.entries, loaded.entries, strict=True):
        saved, read = ours.tensors(), its.tensors()
        same = list(saved) == list(read) and all(torch.equal(saved[key].cpu(), read[key]) for key in saved)
        if not same or ours.status != its.status or ours.form() != its.form():
            raise AssertionError(f"{name} of {ours.parameter!r} differs after saving and loading")


def _entry_pairs(found: Curvature, expected: Curvature) -> Iterator[_Pair]:
    """Yield the values of each parameter; errors of tiny values are relative to the largest of the quantity."""
    theirs = {entry.parameter: entry for entry in expected.entries}
    largest = _largest(t for entry in theirs.values() for t in _compared(entry).values())
    for entry in found.entries:
        ours, its = _compared(entry), _compared(theirs[entry.parameter])
        if entry.form() != theirs[entry.parameter].form() or list(ours) != list(its):
            forms = f"a {entry.form()} and a {theirs[entry.parameter].form()}"
            raise AssertionError(f"{entry.quantity} of {entry.parameter!r} has two formats, {forms}")
        for part, value in ours.items():
            yield _Pair(f"{part} of {entry.parameter!r}", value, its[part], 1e-6 * largest)


def _largest(tensors: Iterable[Tensor]) -> float:
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


def _compared(entry: Entry) -> dict[str, Tensor]:
    return entry.value.invariants if isinstance(entry.value, Block) else entry.tensors()


# Losses -----------------------------------------------------------------------------------------------------------


def check_loss(loss: object, output: Tensor, target: Tensor) -> None:
    """Check the terms of a loss against autograd of its module, at one output and target.

    `loss` is given as to `fxcurv.compile`, or as a `fxcurv.losses.base.Loss`. `output` is `[N, …]` in float64, with
    moderate values and few entries, since the dense Hessian is formed; N is at least two. The checks:

    - value and gradient equal those of the module;
    - the Hessian is block diagonal over samples, and equals `Σ_v S_v S_vᵀ` of the exact columns;
    - `hessian(v)` is its product with v;
    - divisors of two halves of the batch add, and so do their values and gradients times their divisors;
    - `Σ_v S_v S_vᵀ` of 4000 `Sampled` or `Rademacher` columns is within five standard errors of the Hessian, in the
      Frobenius norm.

    Raises an AssertionError that names the loss, the failed check and the error.

        check_loss(nn.CrossEntropyLoss(), torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1]))
    """
    __tracebackhide__ = True
    kind, output = as_loss(loss), output.detach()
    terms, name = kind.terms(output, target), kind.name
    hessian: Any = torch.func.jacrev(torch.func.grad(lambda f: kind.value(f, target)))  # reverse mode only
    H = hessian(output).reshape(len(output), output[0].numel(), len(output), -1)
    blocks = H.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    _assert_agree(name, _value_pairs(kind, terms, output, target))
    _assert_agree(name, [_Pair("the Hessian between samples", H.sum((0, 2)), blocks.sum(0))])
    _assert_agree(name, _curvature_pairs(terms, blocks))
    for factor in (Sampled(COLUMNS), Rademacher(COLUMNS)):
        _check_second_moment(name, terms, factor, blocks)


def _value_pairs(kind: Loss, terms: LossTerms, output: Tensor, target: Tensor) -> Iterator[_Pair]:
    """Compare value and gradient, also with the sum over two halves unless a half has no valid target."""
    leaf = output.clone().requires_grad_()
    value = kind.value(leaf, target)
    yield _Pair("the value", terms.value, value.detach())
    yield _Pair("the gradient", terms.gradient, torch.autograd.grad(value, leaf)[0])
    if not all(map(kind.counts, _halves(target))):
        return
    first, second = map(kind.terms, _halves(output), _halves(target))
    D, a, b = (torch.as_tensor(t.divisor).to(output) for t in (terms, first, second))
    yield _Pair("the divisor of two halves", a + b if kind.reduction == "mean" else a * b, D)
    yield _Pair("the value of two halves", a * first.value + b * second.value, D * terms.value)
    yield _Pair("the gradient of two halves", torch.cat([a * first.gradient, b * second.gradient]), D * terms.gradient)


def _curvature_pairs(terms: LossTerms, blocks: Tensor) -> Iterator[_Pair]:
    """The exact columns, at once and in chunks, and products, against the Hessian of each sample."""
    S = terms.exact(0, terms.exact_columns).flatten(2)
    yield _Pair("Σ_v S_v S_vᵀ of the exact columns", torch.einsum("vni,vnj->nij", S, S), blocks)
    chunks = torch.cat([*terms.columns(Exact(), 1, None, slice(1, None))]).flatten(2)
    yield _Pair("the exact columns one by one, of all samples but the first,", chunks, S[:, 1:])
    v = _random(3, terms.gradient)
    expected = torch.einsum("nij,knj->kni", blocks, v.flatten(2)).view_as(v)
    yield _Pair("hessian(v)", terms.hessian(v), expected)


def _check_second_moment(name: str, terms: LossTerms, factor: Factor, blocks: Tensor) -> None:
    """Check the mean of S Sᵀ over columns against its standard error, bounded by their fourth moments."""
    __tracebackhide__ = True
    S = torch.cat([*terms.columns(factor, COLUMNS, _generator(terms.gradient.device))]).flatten(2)
    error, norm = float((torch.einsum("vni,vnj->nij", S, S) - blocks).norm()), float(blocks.norm())
    standard_error = float(S.square().sum(2).norm())  # of a mean of K columns √K S: (E ‖√K S‖⁴ / K)^½
    if error > 5 * standard_error + 1e-9 * norm:
        raise AssertionError(
            f"{name}: Σ_v S_v S_vᵀ of {factor} is {error:.2g} from the Hessian, of norm {norm:.2g}, "
            f"where the standard error is {standard_error:.2g}"
        )


# Compiled models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The first difference between a compiled model and autograd: `print(difference)` is a sentence.

    `stage` is `canonical`, `rules`, or the graph after a pass, as `forward:concatenate`; `node` is the path of a node
    of the canonical graph, `description` the value that differs, `error` its largest difference relative to its largest
    entry, and `location` the lines of the model that created the node, innermost first.
    """

    stage: str
    node: str
    description: str
    error: float
    location: Location = ()

    def __str__(self) -> str:
        line = f"; {self.location[0]}" if self.location else ""
        return f"{self.stage}: {self.description} differs from autograd, relative error {self.error:.2g}{line}"


def bisect(model: nn.Module, inputs: Inputs, target: Tensor, loss: object = "cross_entropy") -> Difference | None:
    """Return the first difference between the compiled gradient of a model and autograd, or None.

    `inputs`, `target` and `loss` are as for a call of `fxcurv.compile(model, loss)`. The model is compiled again and
    not modified. The tolerance is that of its dtype: float32 hides small errors, float64 shows them. The steps:

    - `canonical`: the output of the canonical graph, and its gradients by autograd, against those of the model;
    - `rules`: from the output to the inputs, the pullback of every node at its actual inputs, against autograd of the
      node's module;
    - `forward:PASS`, then `backward[gradient]:PASS`: the gradients by the graphs after every pass, against autograd of
      the canonical graph.

    Raises the FxcurvError of a model that the compiler rejects, and the error of a pass or graph that fails to run.

        print(bisect(model, x, y) or "no difference")
    """
    kind = as_loss(loss)
    with torch.enable_grad(), without_autocast():
        stages = canonicalize(model, inputs)
        emitted = emit(model, stages, chosen("grad"), inputs)
        bind(canonical := stages["canonical"], model)
        search = _Search(model, kind, emitted, canonical, Minibatch(inputs, target))
        steps = (search.canonical, search.rules, search.passes)
        return next((difference for step in steps for difference in step()), None)


@dataclass(frozen=True)
class _Search:
    """A model with its emitted graphs and canonical `graph`, at a batch; each step yields differences in order."""

    model: nn.Module
    loss: Loss
    emitted: Emitted
    graph: fx.GraphModule
    batch: Minibatch

    @cached_property
    def values(self) -> dict[fx.Node, Tensor]:
        """The value of every canonical node, with autograd's graph, which ends at non-differentiable ops."""
        values: dict[fx.Node, Tensor] = {}

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                stops = n.op == "call_module" and rule_of(module_of(n)).kind == "non_differentiable"
                values[n] = value = value.detach() if stops else value
                return value

        tensors = [t for t in pytree.tree_leaves(as_call(self.batch.inputs)) if isinstance(t, Tensor)]
        Recorder(self.graph, garbage_collect_values=False).run(*tensors)
        return values

    @cached_property
    def expected(self) -> Gradients:
        """The gradients of the canonical graph by autograd."""
        return self._gradients(self.values[output_of(self.graph)])

    def canonical(self) -> Iterator[Difference]:
        """Compare the output of the canonical graph, and its gradients by autograd, with those of the model."""
        (args, kwargs), node = as_call(self.batch.inputs), output_of(self.graph)
        with CustomGradients().checked():
            theirs = selector(None)(self.model(*args, **kwargs))
        if not (pair := _Pair("", self.values[node].detach(), theirs.detach())).agrees():
            yield _difference("canonical", node, f"the output {describe(node)}", pair)
        yield from self._of_gradients("canonical", self.expected, self._gradients(theirs))

    def rules(self) -> Iterator[Difference]:
        """Check the rule of every node at its values for this batch, from the output to the inputs."""
        for node in reversed(self.graph.graph.find_nodes(op="call_module")):
            xs = [self.values[x] for x in inputs_of(node)]
            wrt = [k for k, x in enumerate(xs) if x.requires_grad]
            for pair in _pullbacks(module_of(node), [x.detach() for x in xs], wrt, 3, node.meta["samples"]):
                if not pair.agrees():
                    yield _difference("rules", node, f"{pair.name} of {describe(node)}", pair)

    def passes(self) -> Iterator[Difference]:
        """Check the gradients by the graphs after every pass: first the forward graph, then each factor's graph."""
        stages = self.emitted.stages
        names = [name.partition(":")[2] for name in stages if name.startswith("forward:")]
        graphs = ["forward", *(f"backward[{factor}]" for factor in self.emitted.factors)]
        current = {graph: stages[f"{graph}:augment"] for graph in graphs}
        for stage in (f"{graph}:{name}" for graph in graphs for name in names):
            current[stage.partition(":")[0]] = stages[stage]
            yield from self._of_gradients(stage, self._by_graphs(current), self.expected)

    def _gradients(self, output: Tensor) -> Gradients:
        """The gradient of every trainable parameter, by autograd."""
        wanted = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        value = self.loss.value(output, self.batch.target)
        if not value.requires_grad:
            return {name: torch.zeros_like(p) for name, p in wanted.items()}
        found = torch.autograd.grad(value, list(wanted.values()), materialize_grads=True)
        return dict(zip(wanted, found, strict=True))

    def _by_graphs(self, graphs: Mapping[str, fx.GraphModule]) -> Gradients:
        """The gradients computed by a forward graph and backward graphs."""
        emitted = replace(self.emitted, stages={**self.emitted.stages, **graphs})
        chunks = Chunks(batch_size(self.batch.inputs), dict.fromkeys(emitted.factors, 1))
        return dict(run(Program.of(emitted), self.model, self.loss, self.batch, chunks)["grad"])

    def _of_gradients(self, stage: str, found: Gradients, expected: Gradients) -> Iterator[Difference]:
        """Yield a difference for each wrong parameter; gradients that cancel to zero are compared with the largest."""
        largest, uses = _largest(expected.values()), parameter_uses(self.graph, expected)
        for name, gradient in expected.items():
            pair = _Pair("", found.get(name, torch.zeros_like(gradient)), gradient, 0.1 * largest)
            if not pair.agrees():
                node = uses[name][0][0] if name in uses else output_of(self.graph)
                yield _difference(stage, node, f"the gradient of {name!r}, at {describe(node)},", pair)


def _difference(stage: str, node: fx.Node, description: str, pair: _Pair) -> Difference:
    return Difference(stage, str(node.target), description, pair.error, frames_of(node))
