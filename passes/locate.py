"""locate: where every tensor holds its samples; an op that lets samples mix is refused.

Per-sample curvature is only defined where sample n of the output depends on sample n of the input alone. For ops with
parameters and elementwise ops the place follows from the kind of their rule. Any other op is probed: it is run on
random inputs, one sample is redrawn, and only that sample's entries of the output may change. A random real function
that ignores an input it depends on is an event of probability zero, so the probe needs no row per op and cannot go
stale. Samples may lie along any axis, and share it with other positions (tokens or windows folded into the batch).

Unless `strict`, a node that lets samples mix is marked with its refusal, and row n of what it returns counts as sample
n from there on: parameters behind it have per-sample curvature, those before it have not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from fxcurv import ops
from fxcurv.errors import UnsupportedError
from fxcurv.rules import rule_of
from fxcurv.shapes import Batch, Samples, Shape, resolve
from fxcurv.spec import describe, module_of
from passes.rewrite import copied

__all__ = ["locate"]

SAMPLES = 3


def locate(gm: fx.GraphModule, device: torch.device, strict: bool = True) -> fx.GraphModule:
    """The canonical graph with `samples` on every node: where they lie, or None for what all share."""
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
    output = gm.graph.output_node().args[0]
    assert isinstance(output, fx.Node)
    if output.meta["samples"] != Samples(0):
        place = output.meta["samples"]
        where = "does not depend on the input" if place is None else f"has its samples at axis {place}"
        raise UnsupportedError(f"the output {where}", node=describe(output), remedy="return the samples along axis 0")
    return gm


def _assumed(shape: Shape, error: UnsupportedError) -> Samples | None:
    """Where a refused node has its rows, if it has one for each sample."""
    if shape[:1] == (Batch(),):
        return Samples(0)
    if any(isinstance(size, Batch) for size in shape):
        raise error
    return None


def _place(node: fx.Node, op: nn.Module, device: torch.device, probes: dict[object, Samples | None]) -> Samples | None:
    places: list[Samples | None] = [x.meta["samples"] for x in node.all_input_nodes]
    if all(place is None for place in places):
        return None
    rule, axes = rule_of(op), _batch_axes(node)
    constant = _known(node, op, device)
    if constant is not None:
        node.meta["known"] = constant
        place = _alike(constant, axes)
        if place is None:
            raise _mixing(node, "its entries depend on which sample of the batch they are for")
        return place
    if isinstance(op, ops.Repeat):  # the same for all, so in any order
        return next(place for axis, multiple in axes.items() for place in _candidates(axis, multiple))
    if rule.kind == "elementwise":
        return places[0]
    if rule.use is not None and places[0] is not None:
        axis, last = places[0].axis, len(node.all_input_nodes[0].meta["shape"]) - 1
        if axis == last or (axis != 0 and rule.use.batch_first):
            raise _mixing(node, f"it treats the samples along axis {axis} as features")
        return places[0]
    key = _kind(node, op)
    if key is None or key not in probes:
        probes[key] = _probed(node, op, device)
    return probes[key]


def _kind(node: fx.Node, op: nn.Module) -> object:
    """What the outcome of a probe depends on; None if on values that are no samples."""
    inputs = [x for x in node.args if isinstance(x, fx.Node)]
    if any(_constant(x) is not None for x in inputs):
        return None
    kinds = tuple((x.meta["shape"], x.meta["dtype"], x.meta["samples"]) for x in inputs)
    return type(op), op.extra_repr(), kinds, node.meta["shape"]


def _probed(node: fx.Node, op: nn.Module, device: torch.device) -> Samples | None:
    """The place where redrawing sample n of the inputs changes sample n of the output and nothing else."""
    y, changed = _redraw_each(node, op, torch.Generator(device).manual_seed(0), positive=False)
    if bool(y.isnan().any()):  # a square root or a logarithm
        y, changed = _redraw_each(node, op, torch.Generator(device).manual_seed(0), positive=True)
    axes = _batch_axes(node)
    if not any(bool(c.any()) for c in changed):
        if bool(y.isnan().any()):
            raise _mixing(node, "it cannot be told, for random inputs give NaN")
        return _alike(y, axes)  # a constant, such as ones_like
    for place in (p for axis, multiple in axes.items() for p in _candidates(axis, multiple)):
        if all(_only(place.apart(c), n) for n, c in enumerate(changed)):
            return place
    raise _mixing(node, "a sample of its output depends on other samples")


def _batch_axes(node: fx.Node) -> dict[int, int]:
    """Every axis whose size is a multiple of the batch size, and which."""
    return {axis: size.multiple for axis, size in enumerate(node.meta["shape"]) if isinstance(size, Batch)}


def _known(node: fx.Node, op: nn.Module, device: torch.device) -> Tensor | None:
    """The value for `SAMPLES` samples of what depends on no other input than the batch size."""
    sized = bool(getattr(op, "sized", False))
    inputs = [x for x in node.args if isinstance(x, fx.Node)][: -1 if sized else None]
    values = [_constant(x) for x in inputs]
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not _batch_axes(node):
        return None
    like = [torch.empty(SAMPLES, device=device)] if sized else []
    return op(*known, *like)


def _constant(x: fx.Node) -> Tensor | None:
    """The value of a node that depends on no other input than the batch size."""
    if x.op == "call_module" and isinstance(constant := module_of(x), ops.Constant):
        return constant.value
    return x.meta.get("known")


def _candidates(axis: int, multiple: int) -> Iterator[Samples]:
    """The places along an axis of size multiple · N."""
    yield from (Samples(axis, multiple // b, b) for b in range(multiple, 0, -1) if multiple % b == 0)


def _alike(y: Tensor, axes: Mapping[int, int]) -> Samples | None:
    """The place at which the entries are the same for each sample, if there is one."""
    places = [place for axis, multiple in axes.items() for place in _candidates(axis, multiple)]
    rows = (place.apart(y) for place in places)
    same = (all(torch.equal(row, first) for row in others) for first, *others in rows)
    return next((place for place, alike in zip(places, same, strict=True) if alike), None)


def _only(changed: Tensor, n: int) -> bool:
    """Whether something of sample n changed, and nothing of the others."""
    return all(bool(changed[m].any()) == (m == n) for m in range(SAMPLES))


def _redraw_each(
    node: fx.Node, op: nn.Module, generator: torch.Generator, positive: bool
) -> tuple[Tensor, list[Tensor]]:
    """The output at random inputs, and for each sample which entries change when that sample is redrawn."""

    def run(tensors: list[Tensor]) -> Tensor:
        try:
            return op(*(t.abs() if positive and t.is_floating_point() else t for t in tensors))
        except RuntimeError as error:
            raise _mixing(node, f"it cannot be told, for random inputs fail: {str(error).splitlines()[0]}") from error

    inputs = [x for x in node.args if isinstance(x, fx.Node)]
    xs = [_draw(x, generator) for x in inputs]
    y, changed = run(xs), list[Tensor]()
    for n in range(SAMPLES):
        difference = torch.zeros_like(y, dtype=torch.bool)
        for _ in range(16):  # an index, a comparison, or what a mask hides often stays as it is
            other = run([_redrawn(x, value, n, generator) for x, value in zip(inputs, xs, strict=True)])
            difference |= (other != y) & ~(other.isnan() & y.isnan())
            if y.is_floating_point() and bool(difference.any()):
                break
        changed.append(difference)
    return y, changed


def _draw(x: fx.Node, generator: torch.Generator) -> Tensor:
    constant = _constant(x)
    return constant if constant is not None else _random(resolve(x.meta["shape"], SAMPLES), x.meta["dtype"], generator)


def _redrawn(x: fx.Node, value: Tensor, n: int, generator: torch.Generator) -> Tensor:
    place: Samples | None = x.meta["samples"]
    if place is None or _constant(x) is not None:
        return value
    fresh = value.clone()
    sample = fresh.unflatten(place.axis, (place.outer, -1, place.inner)).select(place.axis + 1, n)
    sample.copy_(_random(sample.shape, value.dtype, generator))
    return fresh


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers, fair coins, or zeros for integers, which are valid as indices."""
    if dtype == torch.bool:
        return torch.rand(shape, device=generator.device, generator=generator) < 0.5
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.zeros(shape, dtype=dtype, device=generator.device)
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)


def _mixing(node: fx.Node, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"samples of the batch mix here: {why}",
        node=describe(node),
        remedy="let each sample's output depend on that sample alone",
    )
