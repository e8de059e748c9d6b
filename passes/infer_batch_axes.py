"""infer_batch_axes: infer the axis of the samples of every tensor; refuse ops that mix samples.

Per-sample curvature is only defined where sample n of the output depends on sample n of the input alone. For ops with
parameters and elementwise ops the kind of their rule determines the axis. For ops that only move entries, the samples'
numbers are moved instead. Any other op is probed: it is run on random inputs, one sample is redrawn, and only that
sample's entries of the output may change. A random real function that ignores an input it depends on is an event of
probability zero, so the probe needs no row per op and cannot become outdated. Samples may have any axis, and share it
with other positions (tokens or windows folded into the batch).

Unless `strict`, a node that mixes samples is marked with its refusal, and row n of its result counts as sample n:
parameters after it have per-sample curvature, parameters before it have not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from fxcurv.core.errors import FxcurvError, UnsupportedError, frames_of
from fxcurv.core.identity import structure_of
from fxcurv.core.shapes import BatchSize, Samples, Shape, resolve
from fxcurv.frontend.custom_gradients import refusal, without_nested_backward
from fxcurv.ir import ops
from fxcurv.ir.custom_gradients import CustomCall, CustomGradient
from fxcurv.ir.nodes import describe, inputs_of, module_of
from fxcurv.ir.rewriting import copied, settled
from fxcurv.ir.rules import rule_of
from fxcurv.ir.trials import Trial
from passes.parameter_usage import reaching

__all__ = ["locate"]


SAMPLES, SHARED = 3, 255


ENTRYWISE = (ops.Add, ops.Sub, ops.Mul)


MOVES = (ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Select, ops.Cat)


def locate(gm: fx.GraphModule, device: torch.device, strict: bool = True) -> fx.GraphModule:
    """Set `samples` on every node of the canonical graph: the axis of its samples, or None if all samples share it."""
    gm, probes = copied(gm), dict[object, Samples | None]()
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                node.meta["samples"] = Samples(0)
            elif node.op == "call_module":
                try:
                    node.meta["samples"] = _place(node, module_of(node), device, probes)
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


def _place(node: fx.Node, op: nn.Module, device: torch.device, probes: dict[object, Samples | None]) -> Samples | None:
    places: list[Samples | None] = [x.meta["samples"] for x in node.all_input_nodes]
    if all(place is None for place in places):
        return None
    rule, axes = rule_of(op), _batch_axes(node)
    constant = _known(node, op, device)
    if constant is not None:
        place = _alike(constant, axes)
        node.meta |= {"known": constant, "counts": place is None}
        return place or next(place for axis, multiple in axes.items() for place in _candidates(axis, multiple))
    if isinstance(op, ops.Repeat):  # equal for all samples, so in any order
        return next(place for axis, multiple in axes.items() for place in _candidates(axis, multiple))
    if rule.kind == "elementwise":
        return places[0]
    if rule.usage is not None and places[0] is not None:
        axis, last = places[0].axis, len(node.all_input_nodes[0].meta["shape"]) - 1
        if axis == last or (axis != 0 and rule.usage.batch_first):
            raise _mixing(node, f"it treats the samples along axis {axis} as features")
        return places[0]
    place = _aligned(node) if isinstance(op, ENTRYWISE) else _followed(node, op) if isinstance(op, MOVES) else None
    if place is not None:
        return place
    key = _kind(node, op)
    if key is None or key not in probes:
        probes[key] = _probed(node, op, device)
    return probes[key]


def _aligned(node: fx.Node) -> Samples | None:
    """Return the axis of samples of an elementwise op, if all inputs have the same."""
    inputs = [x for x in inputs_of(node) if x.meta["samples"] is not None]
    from_last = {replace(x.meta["samples"], axis=x.meta["samples"].axis - len(x.meta["shape"])) for x in inputs}
    if len(from_last) != 1 or any(x.meta.get("counts") for x in inputs):
        return None
    place = from_last.pop()
    return replace(place, axis=place.axis + len(node.meta["shape"]))


def _followed(node: fx.Node, op: nn.Module) -> Samples | None:
    """Return the position of each sample's entries after a move, from the moved samples' numbers."""
    inputs = inputs_of(node)
    if any(x.meta.get("counts") for x in inputs):
        return None
    y = op(*map(_numbers, inputs))
    places = (p for axis, multiple in _batch_axes(node).items() for p in _candidates(axis, multiple))
    return next((p for p in places if all(_only_of(n, rows) for n, rows in enumerate(p.apart(y)))), None)


def _numbers(x: fx.Node) -> Tensor:
    """Return the number of each entry's sample, or `SHARED`."""
    shape, place = resolve(x.meta["shape"], SAMPLES), x.meta["samples"]
    if place is None:
        return torch.tensor(SHARED, dtype=torch.uint8).expand(shape)
    numbers = torch.arange(SAMPLES, dtype=torch.uint8).view(-1, 1).expand(place.outer, -1, place.inner).flatten()
    return numbers.view(*(-1 if axis == place.axis else 1 for axis in range(len(shape)))).expand(shape)


def _only_of(n: int, rows: Tensor) -> bool:
    """Whether the entries belong to sample n, or are shared, but are not all shared."""
    return bool(((rows == n) | (rows == SHARED)).all()) and bool((rows == n).any())


def _kind(node: fx.Node, op: nn.Module) -> object:
    """Return the key of a probe's outcome; None if it depends on values other than samples."""
    inputs = inputs_of(node)
    if any(_constant(x) is not None for x in inputs):
        return None
    kinds = tuple((x.meta["shape"], x.meta["dtype"], x.meta["samples"]) for x in inputs)
    return structure_of(op), kinds, node.meta["shape"]


def _probed(node: fx.Node, op: nn.Module, device: torch.device) -> Samples | None:
    """Return the position where redrawing sample n of the inputs changes sample n of the output alone."""
    probe, y, changed = _tried(node, op, device)
    axes = _batch_axes(node)
    if any(bool(c.any()) for c in changed):
        places = [p for axis, multiple in axes.items() for p in _candidates(axis, multiple)]
        place = next((p for p in places if all(_only(p.apart(c), n) for n, c in enumerate(changed))), None)
    else:
        place = _alike(y, axes)  # a constant, such as ones_like
    if place is None and (axes or any(bool(c.any()) for c in changed)):
        raise _mixing(node, "a sample of its output depends on other samples")
    if place is not None and not probe.ignores_order(y, place):
        raise _mixing(node, "its entries depend on the sample's position in the batch")
    return place


def _tried(node: fx.Node, op: nn.Module, device: torch.device) -> tuple[_Probe, Tensor, list[Tensor]]:
    """Run the first probe without error or NaN: small integers for indices, positive numbers for logarithms."""
    failure: Exception | None = None
    for positive, top in ((False, 2), (False, 1), (True, 2), (True, 1)):
        probe = _Probe(node, op, torch.Generator(device).manual_seed(0), positive, top)
        try:
            y, changed = probe.redraw_each()
        except (RuntimeError, IndexError) as error:
            failure = error
            continue
        if not bool(y.isnan().any()) or (positive and any(bool(c.any()) for c in changed)):
            return probe, y, changed
    why = f"fail: {str(failure).splitlines()[0]}" if failure else "give NaN"
    raise _mixing(node, f"the probe is inconclusive, random inputs {why}") from failure


def _batch_axes(node: fx.Node) -> dict[int, int]:
    """Return every axis whose size is a multiple of the batch size, and the multiple."""
    return {axis: size.multiple for axis, size in enumerate(node.meta["shape"]) if isinstance(size, BatchSize)}


def _known(node: fx.Node, op: nn.Module, device: torch.device) -> Tensor | None:
    """Return the value, for `SAMPLES` samples, of a node that depends on no input except the batch size."""
    sized = bool(getattr(op, "sized", False))
    inputs = inputs_of(node)[: -1 if sized else None]
    values = [_constant(x) for x in inputs]
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not _batch_axes(node):
        return None
    like = [torch.empty(SAMPLES, device=device)] if sized else []
    return op(*known, *like)


def _constant(x: fx.Node) -> Tensor | None:
    """Return the value of a node that depends on no input except the batch size."""
    if x.op == "call_module" and isinstance(constant := module_of(x), ops.Constant):
        return constant.value
    return x.meta.get("known")


def _candidates(axis: int, multiple: int) -> Iterator[Samples]:
    """Yield the possible positions of samples along an axis of size multiple · N."""
    yield from (Samples(axis, multiple // b, b) for b in range(multiple, 0, -1) if multiple % b == 0)


def _alike(y: Tensor, axes: Mapping[int, int]) -> Samples | None:
    """Return the position at which the entries are equal for each sample, if there is one."""
    places = [place for axis, multiple in axes.items() for place in _candidates(axis, multiple)]
    rows = (place.apart(y) for place in places)
    same = (all(torch.equal(row, first) for row in others) for first, *others in rows)
    return next((place for place, alike in zip(places, same, strict=True) if alike), None)


def _only(changed: Tensor, n: int) -> bool:
    """Whether entries of sample n changed, and none of other samples."""
    return all(bool(changed[m].any()) == (m == n) for m in range(SAMPLES))


class _Probe:
    """Random inputs of a node, of which one sample at a time is redrawn: positive or not, integers below `top`."""

    def __init__(self, node: fx.Node, op: nn.Module, generator: torch.Generator, positive: bool, top: int) -> None:
        self.op, self.generator, self.positive, self.top = op, generator, positive, top
        self.inputs = inputs_of(node)
        self.values = self.draw(SAMPLES)

    def redraw_each(self) -> tuple[Tensor, list[Tensor]]:
        """Return the output at random inputs, and for each sample a mask of the entries that its redrawing changes."""
        y, changed = self.op(*self.values), list[Tensor]()
        for n in range(SAMPLES):
            difference = torch.zeros_like(y, dtype=torch.bool)
            for _ in range(16):  # an index, a comparison or a masked entry often does not change
                other = self.op(*(self._redrawn(x, v, n) for x, v in zip(self.inputs, self.values, strict=True)))
                difference |= (other != y) & ~(other.isnan() & y.isnan())
                if y.is_floating_point() and bool(difference.any()):
                    break
            changed.append(difference)
        return y, changed

    def ignores_order(self, y: Tensor, place: Samples) -> bool:
        """Whether permuting the samples permutes the result, where constants distinguish samples."""
        if not any(x.meta.get("counts") for x in self.inputs):
            return True
        moved = self.op(*(self._moved(x, v) for x, v in zip(self.inputs, self.values, strict=True)))
        return torch.equal(place.apart(moved), place.apart(y).roll(1, 0))

    def draw(self, samples: int) -> list[Tensor]:
        """Return random inputs for a number of samples; constants have their values."""
        return [self._draw(x, samples) for x in self.inputs]

    def _draw(self, x: fx.Node, samples: int = SAMPLES) -> Tensor:
        constant = _constant(x)
        if constant is not None and (samples == SAMPLES or x.meta["samples"] is None):
            return constant
        return self._random(resolve(x.meta["shape"], samples), x.meta["dtype"])

    def _redrawn(self, x: fx.Node, value: Tensor, n: int) -> Tensor:
        place: Samples | None = x.meta["samples"]
        if place is None or _constant(x) is not None:
            return value
        fresh = value.clone()
        sample = fresh.unflatten(place.axis, (place.outer, -1, place.inner)).select(place.axis + 1, n)
        sample.copy_(self._random(sample.shape, value.dtype))
        return fresh

    def _moved(self, x: fx.Node, value: Tensor) -> Tensor:
        place: Samples | None = x.meta["samples"]
        if place is None or _constant(x) is not None:
            return value
        rows = value.unflatten(place.axis, (place.outer, -1, place.inner)).roll(1, place.axis + 1)
        return rows.flatten(place.axis, place.axis + 2)

    def _random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Draw normal numbers, fair coins, or integers below `top`."""
        device = self.generator.device
        if dtype == torch.bool:
            return torch.rand(shape, device=device, generator=self.generator) < 0.5
        if not dtype.is_floating_point and not dtype.is_complex:
            return torch.randint(self.top, shape, dtype=dtype, device=device, generator=self.generator)
        drawn = torch.randn(shape, dtype=dtype, device=device, generator=self.generator)
        return drawn.abs() if self.positive and dtype.is_floating_point else drawn


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
        generator = torch.Generator(device).manual_seed(0)
        probe = _Probe(nodes[0], module_of(nodes[0]), generator, positive, 2)
        trial = Trial(call, probe.draw, ks, [x.meta["samples"] for x in inputs], outputs, generator)
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


def _mixing(node: fx.Node, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"samples of the batch mix here: {why}",
        node=describe(node),
        remedy="make each sample's output depend on that sample alone",
        code="FXC401",
        location=frames_of(node),
    )
