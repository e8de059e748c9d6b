"""augment: from the canonical graph to the pair of graphs that computes curvature.

`forward(inputs)` is the canonical graph; it also returns the tensors saved for backward and the statistics of inputs.
`backward(S, saved)`, one per factor, applies the rules in reverse order and pulls the columns S back from the output
to every wanted parameter. Sums at a fan-out and reductions over broadcast axes are added here, once, for every op. S
is pulled back only along paths to a wanted parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxcurv.contractions.definitions import RotatedDiagonal, SumOfSquares
from fxcurv.contractions.statistic import Statistic
from fxcurv.core.identity import identity_of
from fxcurv.core.shapes import Shape
from fxcurv.ir import ops
from fxcurv.ir.backward_ops import (
    Accumulate,
    Apart,
    GetItem,
    InputPositions,
    OutputPositions,
    ParameterPositions,
    Pull,
    PullInputs,
    PullToParameter,
    Rotate,
    SaveForBackward,
    Unbroadcast,
)
from fxcurv.ir.nodes import inputs_of, module_of, output_of
from fxcurv.ir.rewriting import Targets
from fxcurv.ir.rules import rule_of
from fxcurv.quantities.ekfac import bases, rotated
from fxcurv.quantities.factors import Factor, SecondPass
from fxcurv.quantities.plan import Job, Plan
from passes.parameter_usage import Usages, carrying, inputs_layout_of, layout_of, parameter_uses

__all__ = ["Augmented", "augment"]


@dataclass(frozen=True)
class Augmented:
    """The forward graph, and a backward graph per factor; a second pair, `SecondPass`, for sums in eigenbases."""

    forward: fx.GraphModule
    backwards: Mapping[Factor, fx.GraphModule]


def augment(gm: fx.GraphModule, plan: Plan) -> Augmented:
    """Return the forward graph and the backward graphs for the sums of a plan; none for a factor without columns."""
    emitter = _Emitter(gm, parameter_uses(gm, {name for job in plan.jobs for name in job.parameters}))
    backwards: dict[Factor, fx.GraphModule] = {}
    for factor in dict.fromkeys(quantity.factor for quantity in plan.quantities.values()):
        jobs = [job for job in plan.jobs if job.quantity.factor == factor]
        backward = emitter.pull_back({job.usage.name for job in jobs if _reads_columns(job)})
        for job in jobs:
            emitter.reduce(backward, job)
        if backward.results:
            backwards[factor] = backward.finished()
        if again := list(rotated(jobs)):
            second = emitter.pull_back({job.usage.name for job, _, _ in again})
            for job, statistic, module in again:
                emitter.rotate(second, job, (statistic, module.ones), bases(jobs, job))
            backwards[SecondPass(factor)] = second.finished()
    return Augmented(emitter.forward.finished(), backwards)


def _reads_columns(job: Job) -> bool:
    return any(module.reads in ("S", "xS") for module in job.quantity.statistics(job.usage).values())


# Emission ---------------------------------------------------------------------------------------------------------


@dataclass
class _Graph:
    """A graph under construction whose nodes are module calls; equal calls are one node."""

    name: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    targets: Targets = field(default_factory=Targets)
    calls: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)
    placeholders: dict[str, fx.Node] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    def call(self, target: str, module: nn.Module, args: tuple[Any, ...], shape: Shape | None = None) -> fx.Node:
        """Return the node that calls `module` on `args`."""
        key = (identity_of(module), _hashable(args))
        if key not in self.calls:
            target = self.targets.free(target)
            self.modules[target] = module.eval()
            self.calls[key] = self.graph.call_module(target, args)
            if shape is not None:
                self.calls[key].meta["shape"] = shape
        return self.calls[key]

    def placeholder(self, name: str, shape: Shape | None = None) -> fx.Node:
        """Return the input of that name, placed before all computation."""
        if name not in self.placeholders:
            last = next(reversed(self.placeholders.values()), None)
            with self.graph.inserting_after(last) if last is not None else self.graph.inserting_before(None):
                self.placeholders[name] = self.graph.placeholder(name)
            if shape is not None:
                self.placeholders[name].meta["shape"] = shape
        return self.placeholders[name]

    def finished(self) -> fx.GraphModule:
        self.graph.output(self.results)
        return fx.GraphModule(self.modules, self.graph, class_name=self.name)


def _hashable(args: Any) -> Any:
    return tuple(_hashable(a) for a in args) if isinstance(args, list | tuple) else args


class _Emitter:
    """The forward graph, shared by all factors, and the emission of the backward graph of one factor."""

    def __init__(self, gm: fx.GraphModule, uses: Usages) -> None:
        self.gm, self.uses = gm, uses
        self.forward = _Forward(gm)

    def pull_back(self, wanted: Collection[str]) -> _Backward:
        """Emit a backward graph that pulls S back from the output to every node that uses a wanted parameter."""
        using = {node for name in self.uses if name in wanted for node, _ in self.uses[name]}
        pulled, backward, output = carrying(self.gm, using), _Backward(), output_of(self.gm)
        arriving: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        arriving[output].append(backward.placeholder("S", _columns(output)))
        for node in reversed(self.gm.graph.nodes):
            if node not in pulled or node not in arriving:
                continue
            S = backward.accumulated(node, arriving[node])
            if node in using:
                backward.S[node] = backward.output_positions(node, S)
            for x, pulled_S in self._pulls(backward, node, S, pulled):
                arriving[x].append(pulled_S)
        return backward

    def _pulls(
        self, backward: _Backward, node: fx.Node, S: fx.Node, pulled: Collection[fx.Node]
    ) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Return every input of a node at which columns are needed, with S there."""
        together: list[int] = []
        own, opaque = node.meta["samples"] is None, rule_of(module_of(node)).kind == "opaque"
        for k, x in enumerate(inputs_of(node)):
            if x in pulled and x.meta["samples"] is None and not own:
                yield x, self._pull_to_parameter(backward, node, S, k)
            elif x in pulled and not opaque:
                yield x, self._pull(backward, node, S, k)
            elif x in pulled:
                together.append(k)
        if together:
            yield from self._pull_inputs(backward, node, S, together)

    def _pull(self, backward: _Backward, node: fx.Node, S: fx.Node, k: int) -> fx.Node:
        """Pull S back to one input of a node."""
        op, own, x, name = module_of(node), node.meta["samples"] is None, inputs_of(node)[k], _pull_name(node, k)
        saved = backward.placeholder(self.forward.save_for_backward(node))
        lead, axes = _broadcast(x.meta["shape"], node)
        pulled = backward.call(name, Pull(op, k, own), (S, saved), _columns(node if lead or axes else x, own))
        if not lead and not axes:
            return pulled
        undo = Unbroadcast(lead, axes, 2 if own else 1)
        return backward.call(f"unbroadcast.{node.target}.{k}", undo, (pulled,), _columns(x))

    def _pull_inputs(
        self, backward: _Backward, node: fx.Node, S: fx.Node, ks: list[int]
    ) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Pull S back to several inputs of an opaque node, in one call."""
        op, own, name = module_of(node), node.meta["samples"] is None, f"pull.{node.target}"
        pulled = backward.call(name, PullInputs(op, ks, own), (S, self._saved(backward, node)))
        for index, k in enumerate(ks):
            x = inputs_of(node)[k]
            yield x, backward.call(f"{name}.{k}", GetItem(index), (pulled,), _columns(x, own))

    def _pull_to_parameter(self, backward: _Backward, node: fx.Node, S: fx.Node, k: int) -> fx.Node:
        """Pull S back to an input shared by all samples, kept per sample in the rest of the graph."""
        places, x, op = [n.meta["samples"] for n in (*inputs_of(node), node)], inputs_of(node)[k], module_of(node)
        name = _pull_name(node, k)
        if not getattr(op, "broadcasts", False):
            pull = PullToParameter(op, k, places)
            return backward.call(name, pull, (S, self._saved(backward, node)), _columns(x))
        saved, repeated = backward.placeholder(self.forward.save_for_backward(node)), _broadcast(x.meta["shape"], node)
        pulled = backward.call(name, Pull(op, k), (S, saved), _columns(node))
        apart = backward.call(f"apart.{node.target}.{k}", Apart(places[-1]), (pulled,))
        undo = Unbroadcast(*repeated, 2)
        return backward.call(f"unbroadcast.{node.target}.{k}", undo, (apart,), _columns(x))

    def _saved(self, backward: _Backward, node: fx.Node) -> list[fx.Node]:
        """Return the inputs of a node in the backward graph."""
        return [backward.saved(self.forward.save_value(x), x) for x in inputs_of(node)]

    def reduce(self, backward: _Backward, job: Job) -> None:
        """Emit the sums of one job."""
        for statistic, module in job.quantity.statistics(job.usage).items():
            if isinstance(module, RotatedDiagonal) or module.reads == "loss":
                continue
            graph, args = self._arguments(backward, job.usage.name, module)
            graph.results[job.sums[statistic]] = graph.call(job.sums[statistic], module, args)

    def rotate(self, backward: _Backward, job: Job, sum: tuple[str, bool], names: tuple[str, str]) -> None:
        """Emit a diagonal in the bases under these names; the flag of `sum` appends 1 to the inputs."""
        statistic, ones = sum
        _, (xs, Ss) = self._arguments(backward, job.usage.name, SumOfSquares())
        U_A, U_G = (backward.placeholder(name) for name in names)
        for U, d in ((U_A, job.usage.inputs + ones), (U_G, job.usage.outputs)):
            U.meta["shape"] = U.meta["eigenvectors"] = (job.usage.groups, d, d)
        rotated = [[backward.rotated(x, U_A, ones) for x in xs], [backward.rotated(S, U_G) for S in Ss]]
        key = job.sums[statistic]
        backward.results[key] = backward.call(key, SumOfSquares(), tuple(rotated))

    def _arguments(self, backward: _Backward, name: str, module: Statistic) -> tuple[_Graph, tuple[Any, ...]]:
        """Return the graph in which a statistic is computed, and the positions of all uses of its parameter."""
        uses = self.uses[name]
        if module.reads == "x":
            return self.forward, ([self.forward.input_positions(node) for node, _ in uses],)
        Ss = [backward.S[node] for node, _ in uses]
        if module.reads == "S":
            return backward, (Ss,)
        return backward, ([self._input(backward, node) if role == "weight" else None for node, role in uses], Ss)

    def _input(self, backward: _Backward, node: fx.Node) -> fx.Node:
        (x,) = node.all_input_nodes
        return backward.input_positions(node, backward.saved(self.forward.save_value(x), x))


def _pull_name(node: fx.Node, k: int) -> str:
    return f"pull.{node.target}" if len(inputs_of(node)) == 1 else f"pull.{node.target}.{k}"


def _columns(node: fx.Node, own: bool = False) -> Shape:
    """Return the shape of S at a node: columns, samples if the node has no batch axis, and the node's shape."""
    alone = node.meta["samples"] is None or own
    return ("V", "N", *node.meta["shape"]) if alone else ("V", *node.meta["shape"])


def _broadcast(shape: Shape, node: fx.Node) -> tuple[int, tuple[int, ...]]:
    """Return the broadcasting of an input of `shape` to the output's shape, for ops that broadcast."""
    if not getattr(module_of(node), "broadcasts", False):
        return 0, ()
    full = node.meta["shape"]
    lead = len(full) - len(shape)
    return lead, tuple(a for a, size in enumerate(shape) if size == 1 and full[a + lead] != 1)


class _Forward(_Graph):
    """The canonical graph, with saved tensors and sums appended."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__("Forward")
        output = self.graph.graph_copy(gm.graph, values := {})
        self.output: Any = output
        self.modules = {self.targets.free(str(n.target)): module_of(n) for n in gm.graph.nodes if n.op == "call_module"}
        self.nodes: dict[fx.Node, fx.Node] = values
        for old, new in values.items():
            new.meta = dict(old.meta)
        self.saved: dict[str, fx.Node] = {}

    def save_for_backward(self, node: fx.Node) -> str:
        """Save the tensors for the pullback through a node; return their name in the forward graph's results."""
        here = self.nodes[node]
        name = f"saved_{node.name}"
        self.saved[name] = self.call(f"save.{node.target}", SaveForBackward(module_of(node)), (here, *here.args))
        return name

    def save_value(self, x: fx.Node) -> str:
        """Save a node's value itself."""
        self.saved[f"value_{x.name}"] = self.nodes[x]
        return f"value_{x.name}"

    def input_positions(self, node: fx.Node) -> fx.Node:
        here = self.nodes[node]
        positions = InputPositions(module_of(node), node.meta["samples"])
        x = self.call(f"x.{node.target}", positions, here.args, ("N", *inputs_layout_of(node)))
        x.meta["dtype"] = node.meta["dtype"]
        return x

    def finished(self) -> fx.GraphModule:
        self.graph.output((self.output, self.saved, self.results))
        return fx.GraphModule(self.modules, self.graph, class_name=self.name)


class _Backward(_Graph):
    """A backward graph, and the positions of S at the nodes that use wanted parameters."""

    def __init__(self) -> None:
        super().__init__("Backward")
        self.S: dict[fx.Node, fx.Node] = {}

    def saved(self, name: str, x: fx.Node) -> fx.Node:
        """Return the placeholder of a value that the forward graph saved."""
        placeholder = self.placeholder(name, x.meta["shape"])
        placeholder.meta["dtype"] = x.meta["dtype"]
        return placeholder

    def accumulated(self, node: fx.Node, arriving: list[fx.Node]) -> fx.Node:
        if len(arriving) == 1:
            return arriving[0]
        return self.call(f"sum.{node.target}", Accumulate(), tuple(arriving), _columns(node))

    def output_positions(self, node: fx.Node, S: fx.Node) -> fx.Node:
        op = module_of(node)
        held = isinstance(op, ops.Parameter)
        positions = ParameterPositions() if held else OutputPositions(op, node.meta["samples"])
        return self.call(f"S.{node.target}", positions, (S,), ("V", "N", *layout_of(node)))

    def rotated(self, X: fx.Node, U: fx.Node, ones: bool = False) -> fx.Node:
        """Return positions in the basis U."""
        *lead, d = X.meta["shape"]
        node = self.call(f"rotate.{X.target}", Rotate(ones), (X, U), (*lead, d + ones))
        node.meta["dtype"] = X.meta.get("dtype", torch.float32)
        return node

    def input_positions(self, node: fx.Node, x: fx.Node) -> fx.Node:
        positions = InputPositions(module_of(node), node.meta["samples"])
        return self.call(f"x.{node.target}", positions, (x,), ("N", *inputs_layout_of(node)))
