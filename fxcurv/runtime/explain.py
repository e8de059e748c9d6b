"""explain: the estimated cost of a call, node by node, before it runs.

The emitted graphs run on fake tensors, which have shapes and no values. A statistic reports its own cost and the cost
of the alternative algorithms. For all other nodes the operators are counted: their floating-point operations, by
torch.utils.flop_counter, and the bytes that they read and write.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from tabulate import tabulate
from torch import Tensor, fx

from fxcurv.contractions.statistic import Statistic
from fxcurv.core.torch_compat import FakeTensorMode, TorchDispatchMode, flops_of, pytree, schema_of
from fxcurv.frontend.inputs import Inputs, tensors_of
from fxcurv.ir.nodes import module_of, output_of, title_of
from fxcurv.linalg.cost import Cost, Rates, rates_of
from fxcurv.losses.base import Loss
from fxcurv.runtime.memory import Chunks, forecast
from fxcurv.runtime.program import Program, sums_of

__all__ = ["Explanation", "Step", "explained"]


GRADIENT_OF_A_FORWARD = 3
"""Cost of a gradient in forward passes."""


@dataclass(frozen=True)
class Step:
    """One node of an emitted graph: its module, cost, quantities, and alternative algorithms with their seconds."""

    graph: str
    node: str
    does: str
    cost: Cost
    seconds: float
    quantities: tuple[str, ...]
    instead: Mapping[str, float]


@dataclass(frozen=True)
class Explanation:
    """The forecast of a call: its steps, and its peak bytes beyond the model and the inputs."""

    steps: tuple[Step, ...]
    peak_bytes: float
    samples: int
    comparison: tuple[float, float] = (0.0, 0.0)
    """Estimated seconds of the comparison with the model: once per program, and at each new batch size."""

    @property
    def seconds(self) -> float:
        """Estimated seconds of the call."""
        return sum(step.seconds for step in self.steps)

    @property
    def flops(self) -> float:
        """Floating-point operations of the call."""
        return sum(step.cost.flops for step in self.steps)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the time of each quantity; steps of several quantities are divided among them."""
        shares: defaultdict[str, float] = defaultdict(float)
        for step in self.steps:
            for quantity in step.quantities:
                shares[quantity] += step.seconds / len(step.quantities) / self.seconds
        return dict(shares)

    def table(self, fmt: str = "simple") -> str:
        """Return a table: graph, node, module, GFLOP, MiB moved, ms, % of the time, and alternatives with their ms."""
        rows = [
            (
                step.graph,
                step.node,
                step.does,
                step.cost.flops / 1e9,
                step.cost.bytes / 2**20,
                1e3 * step.seconds,
                100 * step.seconds / self.seconds,
                ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in step.instead.items()),
            )
            for step in self.steps
        ]
        headers = ("graph", "node", "module", "GFLOP", "MiB", "ms", "%", "alternatives (ms)")
        return tabulate(rows, headers, tablefmt=fmt, floatfmt=("", "", "", ".3g", ".3g", ".3g", ".1f", ""))

    def __str__(self) -> str:
        shares = ", ".join(f"{quantity} {share:.0%}" for quantity, share in self.shares.items())
        total = (
            f"{self.flops / 1e9:.3g} GFLOP, about {1e3 * self.seconds:.3g} ms, peak {self.peak_bytes / 2**20:.4g} MiB"
        )
        once, each = (f"{1e3 * seconds:.3g} ms" for seconds in self.comparison)
        comparison = f"\ncomparison with the model: about {once} once, and {each} at each new batch size"
        lines = f"{self.table()}\n\n{self.samples} samples: {total}\nshares: {shares}"
        return lines + (comparison if any(self.comparison) else "")


def explained(program: Program, inputs: Inputs, loss: Loss, chunks: Chunks, compared: bool = True) -> Explanation:
    """Estimate the cost of a call on a batch like `inputs`; only their shapes, types and devices are read.

    With `compared`, the comparison of the graph with the model is included: a gradient of two samples by both and a
    forward pass of three once, and two forward passes of the model at each new batch size.
    """
    given = tensors_of(inputs)
    rates = rates_of(given[0].device, output_of(program.canonical).meta["dtype"])
    steps: list[Step] = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        graph, *backwards = program.graphs
        forward = _Counted(graph)
        arguments = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given]
        output, saved, _ = forward.run(*arguments)
        steps += _steps("forward", forward, rates)
        for factor, gm in zip(program.backwards, backwards, strict=True):
            backward = _Counted(gm)
            S = output.new_empty(loss.columns(factor, output.shape), *output.shape)
            read = program.given(factor).items()
            backward.run(S, *(output.new_empty(bases) if bases else saved[name] for name, bases in read))
            steps += _steps(f"backward[{factor}]", backward, rates)
    peak = forecast(program, inputs, chunks.samples, chunks.columns).peak
    layers = {str(node.target) for node in program.canonical.graph.find_nodes(op="call_module")}
    forward_pass = sum(step.seconds for step in steps if step.graph == "forward" and step.node in layers)
    once = (2 * GRADIENT_OF_A_FORWARD * 2 + 3) * forward_pass / len(given[0])
    return Explanation(tuple(steps), peak, len(given[0]), (once, 2 * forward_pass) if compared else (0.0, 0.0))


def _steps(name: str, counted: _Counted, rates: Rates) -> Iterator[Step]:
    needed = _needed(counted.module)
    for node, cost in counted.costs.items():
        contraction: Any = node.meta.get("contraction")
        others: dict[str, float] = {} if contraction is None else contraction.others
        does = title_of(module_of(node))
        yield Step(name, str(node.target), does, cost, cost.seconds(rates), needed.get(node, ()), others)


def _needed(gm: Any) -> dict[fx.Node, tuple[str, ...]]:
    """Node -> the quantities that need it."""
    flow: nx.DiGraph[fx.Node] = nx.DiGraph((x, node) for node in gm.graph.nodes for x in node.all_input_nodes)
    needed: dict[fx.Node, dict[str, None]] = {}
    for key, node in sums_of(gm).items():
        for below in (node, *nx.ancestors(flow, node)):
            needed.setdefault(below, {})[key.partition(".")[0]] = None
    return {node: tuple(quantities) for node, quantities in needed.items()}


class _Counted(fx.Interpreter):
    """Runs a graph and records the cost of each module call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.costs: dict[fx.Node, Cost] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of the node; None for a statistic, whose value no node reads."""
        if n.op != "call_module":
            return super().run_node(n)
        op = module_of(n)
        if isinstance(op, Statistic) and hasattr(op, "cost"):  # a user's own may have none
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.costs[n] = op.cost(*args)
            return None
        with _Count() as counted:
            value = super().run_node(n)
        self.costs[n] = counted.cost
        return value


aten = torch.ops.aten


_FREE = {aten._unsafe_view, aten.empty, aten.new_empty, aten.empty_strided, aten.empty_like}
"""Operators, besides views, that neither compute nor move data."""


class _Count(TorchDispatchMode):
    """Counts the floating-point operations and memory traffic of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema_of(func).returns)
        if views or func.overloadpacket in _FREE:
            return out
        flops = flops_of(func.overloadpacket)
        moved = sum(t.numel() * t.element_size() for t in pytree.tree_leaves((args, out)) if isinstance(t, Tensor))
        entries = sum(t.numel() for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
        self.cost += Cost(flops(*args, **(kwargs or {}), out_val=out) if flops else entries, moved, 1)
        return out
