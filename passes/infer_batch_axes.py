"""infer_batch_axes: infer the axis of the samples of every tensor; refuse ops that mix samples.

Per-sample curvature is only defined where sample n of the output depends on sample n of the input alone. For ops with
parameters and elementwise ops the kind of their rule determines the axis. For ops that only move entries, the samples'
numbers are moved instead. Any other op is probed (fxcurv/trials/samples.py): it is run on random batches of several
sizes, and each sample's entries of the output may depend on that sample alone. The probe needs no row per op and cannot
become outdated. Samples may have any axis, and share it with other positions (tokens or windows folded into the batch).

A constant that depends on the batch size, such as `torch.arange(N)`, is evaluated at several sizes. If it differs for
different samples or sizes, the ops that read it are probed, and must give the same result for a sample anywhere.

Unless `strict`, a node that mixes samples is marked with its refusal, and row n of its result counts as sample n:
parameters after it have per-sample curvature, parameters before it have not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
from torch import Tensor, fx, nn

from fxcurv.core.errors import FxcurvError, UnsupportedError, frames_of
from fxcurv.core.generators import fresh_generator
from fxcurv.core.identity import structure_of
from fxcurv.core.shapes import BatchSize, Samples, Shape, resolve
from fxcurv.frontend.custom_gradients import refusal, without_nested_backward
from fxcurv.ir import calls, ops
from fxcurv.ir.custom_gradients import CustomCall, CustomGradient
from fxcurv.ir.nodes import describe, inputs_of, module_of
from fxcurv.ir.rewriting import copied, settled
from fxcurv.ir.rules import rule_of
from fxcurv.trials.custom_gradients import Trial
from fxcurv.trials.samples import LARGEST, Inconclusive, Operand, Probe, Sizes, candidates, drawn, same
from passes.parameter_usage import reaching

__all__ = ["locate"]


SHARED = 255


ENTRYWISE = (ops.Add, ops.Sub, ops.Mul, ops.Neg, ops.Shift, ops.Scale, ops.Cast, ops.Detach)


MOVES = (ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Select, ops.Cat)


def locate(gm: fx.GraphModule, device: torch.device, strict: bool = True) -> fx.GraphModule:
    """Set `samples` on every node of the canonical graph: the axis of its samples, or None if all samples share it."""
    gm, places = copied(gm), _Places(device)
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                node.meta["samples"] = Samples(0)
            elif node.op == "call_module":
                try:
                    node.meta["samples"] = places.of(node, module_of(node))
                except UnsupportedError as error:
                    if strict:
                        raise
                    node.meta |= {"samples": _assumed(node.meta["shape"], error), "refusal": error}
        _try_custom_gradients(gm, device, strict)
    output = gm.graph.output_node().args[0]
    assert isinstance(output, fx.Node)
    if output.meta["samples"] != Samples(0):
        place = output.meta["samples"]
        where = "does not depend on the input" if place is None else f"has its samples along axis {place}"
        raise UnsupportedError(
            f"the output {where}",
            node=describe(output),
            remedy="return the samples along axis 0",
            code="FXC207" if place is None else "FXC404",
            location=frames_of(output),
        )
    return settled(gm)


def _assumed(shape: Shape, error: UnsupportedError) -> Samples | None:
    """Return the position of a refused node's rows, if it has one row per sample."""
    if shape[:1] == (BatchSize(),):
        return Samples(0)
    if any(isinstance(size, BatchSize) for size in shape):
        raise error
    return None


@dataclass
class _Places:
    """Positions of samples, and the probes of a compilation: their sizes, and their outcomes by kind of op."""

    device: torch.device
    sizes: Sizes = field(default_factory=Sizes.drawn)
    outcomes: dict[object, Samples | None] = field(default_factory=dict)

    def of(self, node: fx.Node, op: nn.Module) -> Samples | None:
        """Return the position of the samples in a node's output; None if all samples share it."""
        inputs = inputs_of(node)
        places: list[Samples | None] = [x.meta["samples"] for x in node.all_input_nodes]
        constant = self._known(node, op)
        if constant is not None:
            return self._of_constant(node, constant)
        if all(place is None for place in places):
            if any(x.meta.get("counts") for x in inputs):
                raise _mixing(node, "its entries depend on the batch size")
            return None
        if isinstance(op, ops.Repeat) and not inputs[0].meta.get("counts"):  # equal for all samples, so in any order
            return candidates(node.meta["shape"])[0]
        rule = rule_of(op)
        if rule.kind == "elementwise":
            return places[0]
        if rule.usage is not None and places[0] is not None:
            axis, last = places[0].axis, len(node.all_input_nodes[0].meta["shape"]) - 1
            if axis == last or (axis != 0 and rule.usage.batch_first):
                raise _mixing(node, f"it treats the samples along axis {axis} as features")
            return places[0]
        if any(x.meta.get("counts") for x in inputs):
            return self._probed(node, op)
        place = _aligned(node) if _is_entrywise(op) else self._followed(node, op) if isinstance(op, MOVES) else None
        if place is not None:
            return place
        key = _kind(node, op)
        if key not in self.outcomes:
            self.outcomes[key] = self._probed(node, op)
        return self.outcomes[key]

    def _known(self, node: fx.Node, op: nn.Module) -> Callable[[int], Tensor] | None:
        """Return the value, by number of samples, of a node that depends on no input except the batch size."""
        sized = bool(getattr(op, "sized", False))
        inputs = inputs_of(node)[: -1 if sized else None]
        values = [value for value in map(_constant, inputs) if value is not None]
        if len(values) < len(inputs) or not (sized or any("known" in x.meta for x in inputs)):
            return None

        @cache
        def known(samples: int) -> Tensor:
            like = [torch.empty(samples, device=self.device)] if sized else []
            return op(*(value(samples) for value in values), *like)

        return known

    def _of_constant(self, node: fx.Node, constant: Callable[[int], Tensor]) -> Samples | None:
        """Return the position of samples in a constant; mark a constant that differs for some of them."""
        shape = node.meta["shape"]
        sizes = [n for n in self.sizes if n == self.sizes.traced or math.prod(resolve(shape, n)) <= LARGEST]
        values = [constant(n) for n in sizes]
        possible = candidates(shape)
        alike = [place for place in possible if _alike(values, place)]
        counts = not alike if possible else not all(same(values[0], value) for value in values)
        node.meta |= {"known": constant, "counts": counts}
        return next(iter([*alike, *possible]), None)

    def _followed(self, node: fx.Node, op: nn.Module) -> Samples | None:
        """Return the position of each sample's entries after a move, from the moved samples' numbers."""
        possible = candidates(node.meta["shape"])
        for samples in (self.sizes.traced, self.sizes.middle):
            y = op(*(_numbers(x, samples) for x in inputs_of(node)))
            possible = [p for p in possible if all(_only_of(n, rows) for n, rows in enumerate(p.apart(y)))]
        return next(iter(possible), None)

    def _probed(self, node: fx.Node, op: nn.Module) -> Samples | None:
        """Return the position of samples in the output of any op, by running it."""
        operands = [
            Operand(x.meta["shape"], x.meta["dtype"], x.meta["samples"], _constant(x), bool(x.meta.get("counts")))
            for x in inputs_of(node)
        ]
        probe = Probe(op, operands, node.meta["shape"], fresh_generator(self.device))
        try:
            places = probe.run(self.sizes)
        except Inconclusive as error:
            raise _mixing(node, f"the probe is inconclusive, random inputs {error}") from error
        if places:
            return places[0]
        if places is None:
            return None
        on_position = "its entries depend on the sample's position in the batch, or on the batch size"
        raise _mixing(node, on_position if probe.distinguishing else "a sample of its output depends on other samples")


def _is_entrywise(op: nn.Module) -> bool:
    """Whether an entry of the output depends on the corresponding entries of the inputs alone."""
    if not isinstance(op, calls.Call) or op.sized or op.part is not None:
        return isinstance(op, ENTRYWISE)
    tags = getattr(op.function, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _aligned(node: fx.Node) -> Samples | None:
    """Return the axis of samples of an elementwise op, if all inputs have the same."""
    inputs = [x for x in inputs_of(node) if x.meta["samples"] is not None]
    from_last = {replace(x.meta["samples"], axis=x.meta["samples"].axis - len(x.meta["shape"])) for x in inputs}
    if len(from_last) != 1:
        return None
    place = from_last.pop()
    place = replace(place, axis=place.axis + len(node.meta["shape"]))
    return place if place in candidates(node.meta["shape"]) else None


def _numbers(x: fx.Node, samples: int) -> Tensor:
    """Return the number of each entry's sample, or `SHARED`."""
    shape, place = resolve(x.meta["shape"], samples), x.meta["samples"]
    if place is None:
        return torch.tensor(SHARED, dtype=torch.uint8).expand(shape)
    numbers = torch.arange(samples, dtype=torch.uint8).view(-1, 1).expand(place.outer, -1, place.inner).flatten()
    return numbers.view(*(-1 if axis == place.axis else 1 for axis in range(len(shape)))).expand(shape)


def _only_of(n: int, rows: Tensor) -> bool:
    """Whether the entries belong to sample n, or are shared, but are not all shared."""
    return bool(((rows == n) | (rows == SHARED)).all()) and bool((rows == n).any())


def _kind(node: fx.Node, op: nn.Module) -> object:
    """Return the key of a probe's outcome: the op, and for each input its kind, or the constant itself."""
    kinds = tuple(
        (x.meta["shape"], x.meta["dtype"], x.meta["samples"]) if _constant(x) is None else x for x in inputs_of(node)
    )
    return structure_of(op), kinds, node.meta["shape"]


def _constant(x: fx.Node) -> Callable[[int], Tensor] | None:
    """Return the value, by number of samples, of a node that depends on no input except the batch size."""
    if x.op == "call_module" and isinstance(constant := module_of(x), ops.Constant):
        return lambda samples: constant.value
    return x.meta.get("known")


def _alike(values: Sequence[Tensor], place: Samples) -> bool:
    """Whether the entries at `place` are equal for all samples, and for all batch sizes."""
    rows = [row for value in values for row in place.apart(value)]
    return all(same(rows[0], row) for row in rows)


# Custom gradients -------------------------------------------------------------------------------------------------


def _try_custom_gradients(gm: fx.GraphModule, device: torch.device, strict: bool) -> None:
    """Refuse every custom gradient between a trainable parameter and the output that has no Jacobian per sample."""
    parts: dict[CustomCall, list[fx.Node]] = {}
    trained, reached = set[fx.Node](), reaching(gm)
    for node in (n for n in gm.graph.nodes if n.op == "call_module"):
        op = module_of(node)
        below = any(x in trained for x in inputs_of(node))
        if below or any(p.requires_grad for p in op.parameters()):
            trained.add(node)
        if below and node in reached and isinstance(op, CustomGradient):
            parts.setdefault(op.call, []).append(node)
    for call, nodes in parts.items():
        ks = [k for k, x in enumerate(inputs_of(nodes[0])) if x in trained and call.direct[k]]
        why = _fault(call, nodes, ks, device)
        if why is None:
            continue
        error = refusal(call.name, why, call.location, describe(nodes[0]))
        if strict:
            raise error
        for node in nodes:
            node.meta["refusal"] = error


def _fault(call: CustomCall, nodes: Sequence[fx.Node], ks: Sequence[int], device: torch.device) -> str | None:
    """Return why a custom gradient has no Jacobian of each sample, or None."""
    inputs = inputs_of(nodes[0])
    outputs: dict[int, Samples | None] = {}
    for node in nodes:
        op = module_of(node)
        assert isinstance(op, CustomGradient)
        outputs[op.part] = node.meta["samples"]
    why: str | None = None
    for positive in (False, True):
        generator = fresh_generator(device)
        draw = partial(_random_inputs, inputs, generator, positive)
        trial = Trial(call, draw, ks, [x.meta["samples"] for x in inputs], outputs, generator)
        try:
            with without_nested_backward():
                why = trial.fault()
        except FxcurvError as error:
            return error.cause.partition(": ")[2] or error.cause
        except Exception as error:
            why = f"its backward fails on random numbers: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if why is None:
            return None
    return why


def _random_inputs(inputs: Sequence[fx.Node], generator: torch.Generator, positive: bool, samples: int) -> list[Tensor]:
    """Return random values of nodes for a batch size, and the values of constants."""
    known = [_constant(x) for x in inputs]
    return [
        value(samples) if value else drawn(resolve(x.meta["shape"], samples), x.meta["dtype"], generator, positive)
        for x, value in zip(inputs, known, strict=True)
    ]


def _mixing(node: fx.Node, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"samples of the batch mix here: {why}",
        node=describe(node),
        remedy="make each sample's output depend on that sample alone",
        code="FXC401",
        location=frames_of(node),
    )
