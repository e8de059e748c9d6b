"""KFRA's recursion: the Gauss-Newton matrix at a node's output, averaged over the batch at each backward step.

G(f) = Σ_n ∂²loss/∂f_n² at the output, and G(v) = 1/N Σ_n J_nᵀ G(u) J_n with u the first node on all paths from v to
the output, and J_n = ∂u_n/∂v_n (Botev et al. 2017). In a sequential network u is the next node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from fxcurv.contractions.definitions import Recursive
from fxcurv.contractions.entries import per_sample
from fxcurv.core.shapes import Samples, resolve
from fxcurv.ir import ops
from fxcurv.ir.backward_ops import InputPositions, OutputPositions
from fxcurv.ir.nodes import module_of, output_of
from fxcurv.losses.terms import LossTerms
from fxcurv.quantities.factors import Exact
from fxcurv.quantities.plan import Job
from fxcurv.runtime.program import Program

__all__ = ["recursive", "recursive_sums"]


def recursive(jobs: Sequence[Job]) -> list[tuple[Job, str, Recursive]]:
    """The jobs with a statistic of the recursion, its name, and the statistic."""
    found = ((job, name, s) for job in jobs for name, s in job.quantity.statistics(job.usage).items())
    return [(job, name, s) for job, name, s in found if isinstance(s, Recursive)]


def recursive_sums(program: Program, inputs: Sequence[Tensor], terms: LossTerms) -> dict[str, Tensor]:
    """Return the sums of the recursion for all jobs, over a whole batch; the canonical graph must be bound."""
    wanted = recursive(program.plan.jobs)
    if not wanted:
        return {}
    with torch.enable_grad():
        walk = _Recursion(program.canonical, inputs, terms)
        return {job.sums[name]: walk.sum_of(job.usage.name, statistic.kind) for job, name, statistic in wanted}


class _Recursion:
    """G at the nodes of a canonical graph, computed once per node."""

    def __init__(self, canonical: fx.GraphModule, inputs: Sequence[Tensor], terms: LossTerms) -> None:
        run = fx.Interpreter(canonical, garbage_collect_values=False)
        run.run(*inputs)
        output = output_of(canonical)
        self.canonical = canonical
        self.values: Mapping[fx.Node, Any] = {node: value for node, value in run.env.items() if node.op != "output"}
        self.samples = len(self.values[output])
        flow: nx.DiGraph[fx.Node] = nx.DiGraph()
        flow.add_node(output)
        flow.add_edges_from((n, x) for n in self.values for x in n.all_input_nodes if self._reads(n) and self._reads(x))
        self.above = nx.immediate_dominators(flow, output)
        self.reached = {output, *self.above}
        columns = terms.columns(Exact(), 1, None)
        S = torch.cat([column.flatten(2)[0] for column in columns])  # [v·n, c]
        self.matrices: dict[fx.Node, Tensor] = {output: S.mT @ S}

    def _reads(self, node: fx.Node) -> bool:
        return isinstance(self.values[node], Tensor) and self.values[node].requires_grad

    def matrix(self, node: fx.Node) -> Tensor:
        """G at a node, `[d, d]` over the entries of one sample, in the order of its axes."""
        path = [node]
        while path[-1] not in self.matrices:
            path.append(self.above[path[-1]])
        while len(path) > 1:
            u, v = path.pop(), path[-1]
            self.matrices[v] = self._step(_root(self.matrices[u]), u, v)
        return self.matrices[node]

    def _step(self, root: Tensor, u: fx.Node, v: fx.Node) -> Tensor:
        """1/N Σ_n J_nᵀ R Rᵀ J_n, from the columns R `[r, d]`."""
        place, above, G = v.meta["samples"], u.meta["samples"], None
        y = (
            self.values[u].reshape(1, -1) if above is None else _apart(self.values[u], above)
        )  # the same for all samples: one row
        for column in root:
            directions = [column.expand_as(y)]
            if place is None:  # a shared value needs a pullback per sample
                directions = list(torch.diag_embed(column.expand_as(y).mT).permute(1, 2, 0))
            for direction in directions:
                (S,) = torch.autograd.grad(y, self.values[v], direction, retain_graph=True)
                rows = S.reshape(1, -1) if place is None else _apart(S, place)
                G = rows.mT @ rows if G is None else G + rows.mT @ rows
        d = self.values[v].numel() // (1 if place is None else self.samples)
        return y.new_zeros(d, d) if G is None else G / len(y)

    def sum_of(self, parameter: str, kind: str) -> Tensor:
        """G `[g,o,o]` for a Kronecker block, or a dense block or its diagonal; several uses count as independent."""
        total: Tensor | None = None
        for node in self.canonical.graph.nodes:
            for slot, source in node.meta.get("slots", {}).items():
                if source.expression is None and source.names[0] == parameter and node in self.reached:
                    part = self._of_use(node, slot, kind)
                    total = part if total is None else total + part
        assert total is not None
        return total

    def _of_use(self, node: fx.Node, slot: str, kind: str) -> Tensor:
        op, place, G = module_of(node), node.meta["samples"], self.matrix(node)
        if isinstance(op, ops.Parameter):
            return G if kind == "dense" else G.diagonal().view(1, -1, 1)
        at = _entries(op, place, resolve(node.meta["shape"], 1))  # [s,g,o]
        if kind == "kronecker":
            at = at.movedim(1, 0)
            return G[at.unsqueeze(-1), at.unsqueeze(-2)].sum(1)
        (x,) = node.all_input_nodes
        with torch.no_grad():
            seen = InputPositions(op, place)(self.values[x]) if slot == "weight" else None
            S = _root(G)[:, at].unsqueeze(1).expand(-1, 1 if seen is None else len(seen), -1, -1, -1)
            J = per_sample([seen], [S])
            if kind == "diagonal":
                return J.square().sum((0, 1)) / S.shape[1]
            rows = J.flatten(2).flatten(0, 1)
            return rows.mT @ rows / S.shape[1]


def _apart(value: Tensor, place: Samples) -> Tensor:
    """Move samples to the first axis and flatten the others: `[n, d]`."""
    return place.apart(value).flatten(1)


def _entries(op: Any, place: Samples, shape: tuple[int, ...]) -> Tensor:
    """Indices into G of the positions [s,g,o] of one sample."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    order = _apart(numbers, place)[0].long().argsort()
    return order[OutputPositions(op, place)(numbers.unsqueeze(0))[0, 0].long()]


def _root(G: Tensor) -> Tensor:
    """R `[r, d]` with Rᵀ R = G, where r is the rank of G."""
    values, vectors = torch.linalg.eigh(G.detach())
    seen = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return (vectors * values.clamp(min=0).sqrt()).mT[seen]
