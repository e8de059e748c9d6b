"""The exact diagonal of the loss Hessian, by differentiating the gradient again, for any model.

Each product with the Hessian is a backward pass through the graph of the gradient for the whole batch, one at a time,
so the memory is that of two backward passes. For the weight or bias of a single layer, the zero z added to its output
y = W x + b + z suffices: ∂²L/∂W_oi² = Σ_st x_si x_ti ∂²L/∂z_so∂z_to for each sample, with the smaller of s·o and o·i
products (a linear layer without positions: o), for all samples at once. Any other parameter takes one product per
entry, or one per sample and entry for per-sample diagonals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxcurv.contractions.definitions import HessianDiagonal
from fxcurv.contractions.entries import per_sample
from fxcurv.core.shapes import Samples
from fxcurv.frontend.checked_gradients import once_differentiable
from fxcurv.ir.backward_ops import InputPositions, OutputPositions
from fxcurv.ir.custom_gradients import CustomGradient, Hooked
from fxcurv.ir.nodes import inputs_of, module_of
from fxcurv.quantities.plan import Job
from fxcurv.runtime.program import Program
from fxcurv.trials.custom_gradients import undifferentiable

__all__ = ["entries_apart", "hessian_diagonals", "twice"]


LossOfOutput = Callable[[Tensor], Tensor]


_Slot = tuple[fx.Node, str]
"""A node that holds a parameter, and the slot."""


def twice(jobs: Sequence[Job]) -> Iterator[tuple[Job, str, HessianDiagonal]]:
    """Yield the jobs with a Hessian diagonal, its name, and the statistic."""
    for job in jobs:
        for name, statistic in job.quantity.statistics(job.usage).items():
            if isinstance(statistic, HessianDiagonal):
                yield job, name, statistic


# Compiled -----------------------------------------------------------------------------------------------------------


def hessian_diagonals(
    program: Program, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor], loss: LossOfOutput
) -> dict[str, Tensor]:
    """Return the Hessian diagonals of all jobs at `inputs`; the canonical graph must be bound."""
    wanted = list(twice(program.plan.jobs))
    if not wanted:
        return {}
    names = {job.usage.name for job, _, _ in wanted}
    uses = _single_uses(program.canonical, names)
    found: dict[str, Tensor] = {}
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        watched = _Watched(program.canonical, {node for node, _ in uses.values()})
        value = loss(watched.run(*inputs))
        each = {name: _of_use(value, watched, use) for name, use in uses.items()}
        for job, statistic, module in wanted:
            name, key = job.usage.name, job.sums[statistic]
            if name in each:
                to_layout = job.usage.to_layout(each[name], len(each[name]))
                found[key] = to_layout.clone() if module.per_sample else to_layout.sum(0)
            elif module.per_sample:
                found[key] = _each_sample(program.canonical, parameters[name], inputs, loss)
            else:
                found[key] = entries_apart(value, parameters[name])
    return found


def _single_uses(canonical: fx.GraphModule, names: set[str]) -> dict[str, _Slot]:
    """Node and slot of the parameters among `names` that are used once, by an affine layer."""
    uses: dict[str, list[_Slot]] = {}
    for node in canonical.graph.nodes:
        for slot, source in node.meta.get("slots", {}).items():
            for name in names.intersection(source.names):
                uses.setdefault(name, []).append((node, slot if source.expression is None else "value"))
    affine = {name: found[0] for name, found in uses.items() if len(found) == 1 and found[0][1] in ("weight", "bias")}
    return {name: (node, slot) for name, (node, slot) in affine.items() if node.meta["samples"] is not None}


class _Watched(fx.Interpreter):
    """Runs the canonical graph with zeros added to the outputs of some nodes; stores zeros and node inputs."""

    def __init__(self, gm: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(gm)
        self.nodes = nodes
        self.seen: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        y = super().run_node(n)
        op = module_of(n) if n.op == "call_module" else None
        if isinstance(op, CustomGradient):
            _check_twice(op, [self.env[x] for x in inputs_of(n)])
        if n not in self.nodes:
            return y
        z = torch.zeros_like(y, requires_grad=True)
        (x,) = n.all_input_nodes
        self.seen[n] = self.env[x].detach(), z
        return y + z


def _check_twice(op: CustomGradient, xs: Sequence[Tensor]) -> None:
    """Raise an error for a custom gradient whose backward autograd cannot differentiate; tried once per call."""
    ks = [k for k, x in enumerate(xs) if x.requires_grad and op.call.direct[k]]
    if op.call.twice or not ks:
        return
    if op.call.function is Hooked:
        why = "autograd also applies the hook to the second derivative, through tensors saved before it"
        raise once_differentiable(op.call.name, why)
    generator = torch.Generator(xs[0].device).manual_seed(0)
    like = {j: y.detach() for j, y in enumerate(op.call.run(xs)) if y.requires_grad}
    why = undifferentiable(lambda Ss: op.call.pull(xs, ks, Ss, graph=True), like, generator) if like else None
    if why is not None:
        raise once_differentiable(op.call.name, why)
    op.call.twice = True


def _of_use(value: Tensor, watched: _Watched, use: _Slot) -> Tensor:
    """The per-sample diagonal, [n,g,o,i], of a parameter used by one layer."""
    node, slot = use
    x, z = watched.seen[node]
    op, place = module_of(node), node.meta["samples"]
    assert isinstance(place, Samples)
    (slope,) = torch.autograd.grad(value, z, create_graph=True)
    positions = OutputPositions(op, place)
    with torch.no_grad():
        seen = InputPositions(op, place)(x) if slot == "weight" else None
        first = positions(z.detach().unsqueeze(0))
        total = first.new_zeros(*first.shape[1:2], *first.shape[3:], 1 if seen is None else seen.shape[-1])
        back: Any = torch.func.vjp(positions, torch.zeros_like(z).unsqueeze(0))[1]  # a permutation, and its inverse
    for column, E in _columns(first, seen):
        (direction,) = back(E)
        row = _grad(slope, z, direction[0])
        R = positions(row.unsqueeze(0)).detach()
        J = per_sample([seen], [R])[0]  # [n,g,o,i]
        if column is None:
            total += per_sample([seen], [E])[0] * J
        else:
            g, o, i = column
            total[:, g, o, i] = J[:, g, o, i]
    return total


def _columns(like: Tensor, x: Tensor | None) -> Iterator[tuple[tuple[int, int, int] | None, Tensor]]:
    """Yield directions E[1,n,s,g,o] at a layer's output: one per output entry, or per parameter entry if fewer.

    The latter come with the indices g, o, i of the entry.
    """
    _, _, s, groups, outputs = like.shape
    inputs = 1 if x is None else x.shape[-1]
    for g in range(groups):
        for o in range(outputs):
            for k in range(min(s, inputs)):
                E = torch.zeros_like(like)
                if s < inputs:
                    E[0, :, k, g, o] = 1
                    yield None, E
                else:
                    E[0, :, :, g, o] = 1 if x is None else x[:, :, g, k]
                    yield (g, o, k), E


def _each_sample(canonical: fx.GraphModule, parameter: Tensor, inputs: Sequence[Tensor], loss: LossOfOutput) -> Tensor:
    """The diagonal per sample, `[n, *θ]`: one sample at a time, with the outputs of the others fixed."""
    with torch.no_grad():
        held = canonical(*inputs)
    found: list[Tensor] = []
    for n in range(len(held)):
        output = torch.cat([held[:n], canonical(*(t[n : n + 1] for t in inputs)), held[n + 1 :]])
        found.append(entries_apart(loss(output), parameter))
    return torch.stack(found)


# By autograd --------------------------------------------------------------------------------------------------------


def entries_apart(value: Tensor, parameter: Tensor) -> Tensor:
    """The diagonal of ∂²value/∂θ², one entry at a time."""
    (slope,) = torch.autograd.grad(value, parameter, create_graph=True, materialize_grads=True, allow_unused=True)
    diagonal = torch.zeros_like(slope).flatten()
    direction = torch.zeros_like(diagonal)
    for k in range(direction.numel()):
        direction[k] = 1
        diagonal[k] = _grad(slope, parameter, direction.view_as(slope)).flatten()[k]
        direction[k] = 0
    return diagonal.view_as(slope).detach()


def _grad(slope: Tensor, at: Tensor, direction: Tensor) -> Tensor:
    """The product of the second derivative with a direction, zero if the slope is constant."""
    if not slope.requires_grad:
        return torch.zeros_like(at)
    return torch.autograd.grad(slope, at, direction, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
