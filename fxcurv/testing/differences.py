"""bisect: the first difference between a compiled model and autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.core.errors import Location, frames_of
from fxcurv.frontend.checked_gradients import CustomGradients
from fxcurv.frontend.inputs import Inputs, as_call, batch_size, selector, tensors_of
from fxcurv.frontend.isolation import without_autocast
from fxcurv.ir.nodes import describe, inputs_of, module_of, output_of
from fxcurv.ir.rules import rule_of
from fxcurv.losses.base import Loss, as_loss
from fxcurv.quantities.selection import chosen
from fxcurv.runtime.memory import Chunks
from fxcurv.runtime.program import Program
from fxcurv.runtime.run import Minibatch, bind, run
from fxcurv.testing.comparison import Pair, largest_of
from fxcurv.testing.rules import BrokenRule, pullbacks
from passes.parameter_usage import parameter_uses
from passes.pipeline import Emitted, canonicalize, emit

__all__ = ["Difference", "bisect"]


Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The first difference between a compiled model and autograd: `print(difference)` is a sentence.

    `stage` is `canonical`, `rules`, or the graph after a pass, as `forward:concatenate`; `node` is the path of a node
    of the canonical graph, `description` the value that differs, `error` its largest difference relative to its largest
    entry, and `location` the lines of the model that created the node, innermost first. Where values cannot be
    compared, as where a rule raises an exception, `problem` describes this, and `error` is infinite.
    """

    stage: str
    node: str
    description: str
    error: float
    location: Location = ()
    problem: str = ""

    def __str__(self) -> str:
        line = f"; {self.location[0]}" if self.location else ""
        problem = self.problem or f"differs from autograd, relative error {self.error:.2g}"
        return f"{self.stage}: {self.description} {problem}{line}"


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
        bind(stages["canonical"], model)
        search = _Search(model, kind, stages, Minibatch(inputs, target))
        kind.terms(search.values[output_of(search.graph)].detach(), target)  # an InputError for a target that is wrong
        steps = (search.canonical, search.rules, search.passes)
        return next((difference for step in steps for difference in step()), None)


@dataclass(frozen=True)
class _Search:
    """A model with its graphs up to the canonical one, at a batch; each step yields differences in order."""

    model: nn.Module
    loss: Loss
    stages: Mapping[str, fx.GraphModule]
    batch: Minibatch

    @property
    def graph(self) -> fx.GraphModule:
        """The canonical graph."""
        return self.stages["canonical"]

    @cached_property
    def emitted(self) -> Emitted:
        """The emitted graphs; passes try the rules, which are checked before."""
        return emit(self.model, self.stages, chosen("grad"), self.batch.inputs)

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

        Recorder(self.graph, garbage_collect_values=False).run(*tensors_of(self.batch.inputs))
        return values

    @cached_property
    def expected(self) -> Gradients:
        """The gradients of the canonical graph by autograd."""
        return self._gradients(self.values[output_of(self.graph)])

    def canonical(self) -> Iterator[Difference]:
        """Compare the canonical graph with the model: the output, and the gradients by autograd."""
        args, kwargs = as_call(self.batch.inputs)
        with CustomGradients().checked():
            theirs, node = selector(None)(self.model(*args, **kwargs)), output_of(self.graph)
        pair = Pair("", self.values[node].detach(), theirs.detach())
        if not pair.agrees():
            yield _difference("canonical", node, f"the output {describe(node)}", pair)
        yield from self._of_gradients("canonical", self.expected, self._gradients(theirs))

    def rules(self) -> Iterator[Difference]:
        """Check the rule of every node at its values for this batch, from the output to the inputs."""
        for node in reversed(self.graph.graph.find_nodes(op="call_module")):
            xs = [self.values[x] for x in inputs_of(node)]
            wrt = [k for k, x in enumerate(xs) if x.requires_grad]
            try:
                pairs = pullbacks(module_of(node), [x.detach() for x in xs], wrt, 3, node.meta["samples"])
            except BrokenRule as broken:
                described = f"{broken.name} of {describe(node)}"
                yield Difference("rules", str(node.target), described, math.inf, frames_of(node), f"{broken.problem}")
                continue
            for pair in pairs:
                if not pair.agrees():
                    yield _difference("rules", node, f"{pair.name} of {describe(node)}", pair)

    def passes(self) -> Iterator[Difference]:
        """Check the gradients by the graphs after every pass: first the forward graph, then each factor's graph."""
        stages, names = (
            self.emitted.stages,
            [name.partition(":")[2] for name in self.emitted.stages if name.startswith("forward:")],
        )
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
        largest, uses = largest_of(expected.values()), parameter_uses(self.graph, expected)
        for name, gradient in expected.items():
            pair = Pair("", found.get(name, torch.zeros_like(gradient)), gradient, 0.1 * largest)
            if not pair.agrees():
                node = uses[name][0][0] if name in uses else output_of(self.graph)
                yield _difference(stage, node, f"the gradient of {name!r}, at {describe(node)},", pair)


def _difference(stage: str, node: fx.Node, description: str, pair: Pair) -> Difference:
    return Difference(stage, str(node.target), description, pair.error, frames_of(node), pair.problem)
