"""Lowerings of ops with parameters: linear layers in every notation, convolutions, scales and normalizations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxcurv.core.errors import InputError, frames_of
from fxcurv.ir import calls, ops
from passes.functionalize import packet_of
from passes.lowering_table import (
    PERMUTES,
    Arguments,
    Builder,
    Slots,
    arguments,
    called,
    first,
    flexible,
    generic,
    lowers,
    order_of,
    per_axis,
    rank,
    shape_at,
    where,
)

__all__: list[str] = []


def _hold(op: nn.Module, **slots: Tensor | None) -> nn.Module:
    """Set the op's slots to live tensors: parameters themselves, other tensors as frozen parameters."""
    for slot, tensor in slots.items():
        value = (
            tensor
            if isinstance(tensor, nn.Parameter) or tensor is None
            else nn.Parameter(tensor.detach(), requires_grad=False)
        )
        setattr(op, slot, value)
    return op


@dataclass(frozen=True)
class _Product:
    """x Wᵀ + b, or x W + b with `in_out`; `operand` is the call's argument for W, the weight or its transpose."""

    x: fx.Node
    operand: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    in_out: bool


PRODUCTS = {
    "linear": ("input", "weight", "bias", False),
    "matmul": ("self", "other", None, True),
    "mm": ("self", "mat2", None, True),
    "addmm": ("mat1", "mat2", "self", True),
}
"""Operators that multiply rows x by a matrix: the argument names of x, W and b, and whether W has in–out layout."""


def _product(low: Builder, node: fx.Node) -> _Product | None:
    """Return a call as the product of data with a matrix that an op can hold; None if it is not one."""
    if packet_of(node) not in PRODUCTS:
        return None
    rows, matrix, added, in_out = PRODUCTS[packet_of(node)]
    a = arguments(node)
    x, operand, swapped = a[rows], a[matrix], _swaps(a[matrix])
    weight = operand.args[0] if swapped else operand
    plain = a.get("alpha", 1) == a.get("beta", 1) == 1 and rank(weight) == 2 <= rank(x)
    if not plain or not low.depends(x) or not low.holdable(weight):
        return None
    return _Product(x, operand, weight, a[added] if added else None, in_out != swapped)


def _swaps(node: fx.Node) -> bool:
    """Whether a node is the transpose of a matrix."""
    return node.op == "call_function" and packet_of(node) in PERMUTES and order_of(node) == [1, 0]


def _rows_are_inputs(low: Builder, weight: fx.Node) -> bool:
    """Whether a weight is only used in x W: one with another use has no single layout for all its uses."""
    forms = [form for p in low.placeholders(weight) for form in (p, *filter(_swaps, p.users))]
    readers = [(form, user) for form in forms for user in form.users if user not in forms]
    found = [(form, _product(low, user)) for form, user in readers]
    return all(p is not None and p.in_out and p.operand is form is not p.bias for form, p in found)


@lowers(*PRODUCTS)
def _linear(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    found = _product(low, node)
    if found is None or (found.in_out and not _rows_are_inputs(low, found.weight)):
        return generic(calls.Opaque)(low, node, a)
    weight = low.slot(found.weight)
    assert weight is not None
    inputs, outputs = weight.shape if found.in_out else reversed(weight.shape)
    bias = found.bias
    held = bias if bias is not None and low.holdable(bias) and shape_at(bias, node) == (outputs,) else None
    op = ops.MatMul(inputs, outputs) if found.in_out else nn.Linear(inputs, outputs, device="meta")
    slots: Slots = {"weight": found.weight, "bias": held}
    y = low.emit(node, _hold(op, weight=weight, bias=low.slot(held)), low.value(found.x, node), slots=slots)
    return y if bias is None or held is not None else _biased(low, node, y, bias)


@lowers("conv1d", "conv2d", "conv3d")
def _conv(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    if not low.depends(a["input"]) or not low.holdable(a["weight"]):
        return generic(calls.Opaque)(low, node, a)
    if not low.holdable(a["bias"]):
        return _biased(low, node, _conv(low, node, {**a, "bias": None}), a["bias"], rank(a["weight"]) - 2)
    weight, bias = low.slot(a["weight"]), low.slot(a["bias"])
    assert weight is not None
    kernel, x = tuple(weight.shape[2:]), low.value(a["input"], node)
    stride, dilation = per_axis(a["stride"], kernel), per_axis(a["dilation"], kernel)
    padding, extra = _padding(a["padding"], kernel, dilation)
    if any(extra):  # 'same' with an even kernel: one more row at the end than at the start
        shape = x.meta["shape"]
        x = low.emit(node, ops.Pad([p for e in reversed(extra) for p in (0, e)]), x)
        x.meta["shape"] = (*shape[:2], *(size + e for size, e in zip(shape[2:], extra, strict=True)))
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
    inputs, outputs = weight.shape[1] * a["groups"], weight.shape[0]
    op = kind(inputs, outputs, kernel, stride, padding, dilation, a["groups"], bias is not None, device="meta")
    return low.emit(node, _hold(op, weight=weight, bias=bias), x, slots={"weight": a["weight"], "bias": a["bias"]})


def _biased(low: Builder, node: fx.Node, y: fx.Node, bias: fx.Node, behind: int = 0) -> fx.Node:
    """Return y + b for a computed bias, where `behind` axes follow the features."""
    b = low.value(bias, node)
    size = (*shape_at(bias, node), *(1,) * behind)
    if behind:
        b = low.emit(node, ops.Reshape(flexible(size)), b)
        b.meta["shape"] = size
    return low.emit(node, ops.Add(), y, b)


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return symmetric padding per axis, and the additional padding of 'same' at the end."""
    if padding == "valid":
        padding = 0
    if padding != "same":
        return per_axis(padding, kernel), (0,) * len(kernel)
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple(t // 2 for t in totals), tuple(t % 2 for t in totals)


@lowers("batch_norm")
def _batch_norm(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    if a["training"] and low.depends(a["input"]):
        raise InputError(
            "BatchNorm uses the statistics of the batch, which couples its samples",
            node=where(node),
            remedy="call model.eval() (with track_running_stats=True), or replace it",
            code="FXC402",
            location=frames_of(node),
        )
    slots: Slots = {"weight": a["weight"], "bias": a["bias"], "mean": a["running_mean"], "var": a["running_var"]}
    if not low.depends(a["input"]) or not low.holdable(*slots.values()):
        return generic(calls.Opaque)(low, node, a)
    weight, bias, mean, var = (low.slot(n) for n in slots.values())
    assert mean is not None
    assert var is not None
    op = ops.Affine(mean, var, a["eps"])
    return low.emit(node, _hold(op, weight=weight, bias=bias), low.value(a["input"], node), slots=slots)


@lowers("layer_norm", "rms_norm", "group_norm")
def _normalization(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    """Lower a normalization to the normalization itself, followed by γ x̂ + β."""
    slots: Slots = {"weight": a["weight"], "bias": a.get("bias")}
    if a["weight"] is None or not low.depends(first(a)) or not low.holdable(*slots.values()):
        return generic(calls.Opaque)(low, node, a)
    op, *inputs = called(calls.Opaque, low, node)
    names = list(a)
    given = [None if name in slots else value for name, value in zip(names, op.args, strict=False)]
    kwargs = {name: None if name in slots else value for name, value in op.kwargs.items()}
    unit = low.emit(node, calls.Opaque(op.function, given, kwargs, op.sized), inputs[0])
    behind = rank(first(a)) - 2 if "num_groups" in a else 0
    return _scale_shift(low, node, unit, slots, behind)


def _scale_shift(low: Builder, node: fx.Node, x: fx.Node, slots: Slots, behind: int = 0) -> fx.Node:
    tensors = {slot: low.slot(argument) for slot, argument in slots.items()}
    return low.emit(node, _hold(ops.ScaleShift(behind), **tensors), x, slots=slots)


@lowers("mul")
def _mul(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    if not isinstance(a["other"], fx.Node):
        return low.emit(node, ops.Scale(a["other"]), low.value(a["self"], node))
    for x, scale in ((a["self"], a["other"]), (a["other"], a["self"])):
        if low.depends(x) and _scales(low, scale, x):
            return _scale_shift(low, node, low.value(x, node), {"weight": scale, "bias": None})
    return low.emit(node, ops.Mul(), low.value(a["self"], node), low.value(a["other"], node))


def _scales(low: Builder, scale: fx.Node, x: fx.Node) -> bool:
    """Whether `scale` is a parameter with the shape of the last axes of x."""
    if scale.op != "placeholder" or low.depends(scale) or not isinstance(low.slot(scale), nn.Parameter):
        return False
    own, shape = scale.meta["val"].shape, x.meta["val"].shape
    last = shape[len(shape) - len(own) :]
    return 0 < len(own) < len(shape) and all(isinstance(size, int) for size in last) and tuple(own) == tuple(last)
