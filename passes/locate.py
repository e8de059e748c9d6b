"""locate: which axis of every tensor holds the samples; an op that lets samples mix is refused.

Per-sample curvature is only defined where sample n of the output depends on sample n of the input alone. For ops with
parameters and elementwise ops the axis follows from the kind of their rule. Any other op is probed: it is run on random
inputs, one sample is redrawn, and only that sample's entries of the output may change. A random real function that
ignores an input it depends on is an event of probability zero, so the probe needs no row per op and cannot go stale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from fxcurv import ops
from fxcurv.errors import UnsupportedError
from fxcurv.rules import rule_of
from fxcurv.spec import Batch, describe, module_of, resolve
from passes.rewrite import copied

__all__ = ["locate"]

SAMPLES = 3


def locate(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The canonical graph with `batch_axis` on every node: the axis of its samples, or None for a constant."""
    gm = copied(gm)
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                node.meta["batch_axis"] = 0
            elif node.op == "call_module":
                node.meta["batch_axis"] = _batch_axis(node, module_of(node), device)
    output = gm.graph.output_node().args[0]
    assert isinstance(output, fx.Node)
    if output.meta["batch_axis"] != 0:
        where = (
            "has no batch axis"
            if output.meta["batch_axis"] is None
            else f"has its samples at axis {output.meta['batch_axis']}"
        )
        raise UnsupportedError(f"the output {where}", node=describe(output), remedy="return the samples along axis 0")
    return gm


def _batch_axis(node: fx.Node, op: nn.Module, device: torch.device) -> int | None:
    axes = [x.meta["batch_axis"] for x in node.all_input_nodes]
    if all(axis is None for axis in axes):
        return None
    rule = rule_of(op)
    if isinstance(op, ops.Repeat):
        return op.axis
    if rule.kind == "elementwise":
        return axes[0]
    if rule.use is not None:
        x = node.all_input_nodes[0]
        last = len(x.meta["shape"]) - 1
        if axes[0] == last or (axes[0] != 0 and rule.use.batch_first):
            raise _mixing(node, f"it treats the samples along axis {axes[0]} as features")
        return axes[0]
    return _probed(node, op, device)


def _probed(node: fx.Node, op: nn.Module, device: torch.device) -> int | None:
    """The axis along which redrawing sample n of the inputs changes entry n of the output and nothing else."""
    y, changed = _redraw_each(node, op, torch.Generator(device).manual_seed(0), positive=False)
    if bool(y.isnan().any()):  # a square root or a logarithm
        y, changed = _redraw_each(node, op, torch.Generator(device).manual_seed(0), positive=True)
    if not any(bool(c.any()) for c in changed):
        if bool(y.isnan().any()):
            raise _mixing(node, "it cannot be told, for random inputs give NaN")
        return next((a for a, size in enumerate(node.meta["shape"]) if isinstance(size, Batch)), None)  # ones_like
    for axis in (a for a in range(y.ndim) if y.shape[a] == SAMPLES):
        moved = [c.movedim(axis, 0) for c in changed]
        if all(bool(c[n].any()) and not _elsewhere(c, n) for n, c in enumerate(moved)):
            return axis
    raise _mixing(node, "a sample of its output depends on other samples, or samples share an axis with something else")


def _redraw_each(
    node: fx.Node, op: nn.Module, generator: torch.Generator, positive: bool
) -> tuple[Tensor, list[Tensor]]:
    """The output at random inputs, and for each sample which entries change when that sample is redrawn."""

    def run(tensors: list[Tensor]) -> Tensor:
        return op(*(t.abs() if positive and t.is_floating_point() else t for t in tensors))

    inputs = [x for x in node.args if isinstance(x, fx.Node)]
    xs = [_draw(x, generator) for x in inputs]
    y, changed = run(xs), list[Tensor]()
    for n in range(SAMPLES):
        other = run([_redrawn(x, value, n, generator) for x, value in zip(inputs, xs, strict=True)])
        changed.append((other != y) & ~(other.isnan() & y.isnan()))
    return y, changed


def _elsewhere(changed: Tensor, n: int) -> bool:
    return any(bool(changed[m].any()) for m in range(SAMPLES) if m != n)


def _draw(x: fx.Node, generator: torch.Generator) -> Tensor:
    if x.meta["batch_axis"] is None and isinstance(constant := module_of(x), ops.Constant):
        return constant.value
    return _random(resolve(x.meta["shape"], SAMPLES), x.meta["dtype"], generator)


def _redrawn(x: fx.Node, value: Tensor, n: int, generator: torch.Generator) -> Tensor:
    axis = x.meta["batch_axis"]
    if axis is None:
        return value
    fresh = value.clone()
    sample = fresh.select(axis, n)
    sample.copy_(_random(sample.shape, value.dtype, generator))
    return fresh


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers, fair coins, or zeros for integers, which are valid as indices."""
    if dtype == torch.bool:
        return torch.rand(shape, device=generator.device, generator=generator) < 0.5
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=generator.device)
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)


def _mixing(node: fx.Node, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"samples of the batch mix here: {why}",
        node=describe(node),
        remedy="let each sample's output depend on that sample alone",
    )
