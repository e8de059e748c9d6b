"""Rows of the table of lowerings: elementwise, arithmetic, shape, reductions and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.core.errors import InputError, UnsupportedError, frames_of
from fxcurv.core.shapes import BatchSize
from fxcurv.frontend.embeddings import scaled_by_frequency
from fxcurv.ir import calls, ops
from fxcurv.ir.custom_gradients import CustomGradient
from passes.functionalize import packet_of
from passes.lowering_table import (
    FILLS,
    PERMUTES,
    RESHAPES,
    Arguments,
    Builder,
    arguments,
    first,
    flexible,
    generic,
    kind_of_call,
    lowers,
    order_of,
    rank,
    shape_at,
    unary,
    where,
)

__all__ = ["part"]


def _dims(a: Arguments, key: str = "dim") -> tuple[int, ...]:
    """Return the axes of a reduction; all if none is given."""
    dims = a.get(key)
    dims = (dims,) if isinstance(dims, int) else dims
    return tuple(dims) if dims else tuple(range(rank(first(a))))


# Elementwise ------------------------------------------------------------------------------------------------------

unary("relu", lambda a: nn.ReLU())


unary("relu6", lambda a: nn.ReLU6())


unary(
    "hardtanh",
    lambda a: nn.ReLU6() if (a["min_val"], a["max_val"]) == (0, 6) else nn.Hardtanh(a["min_val"], a["max_val"]),
)


unary("threshold", lambda a: nn.Threshold(a["threshold"], a["value"]))


unary("hardshrink", lambda a: nn.Hardshrink(a["lambd"]))


unary("softshrink", lambda a: nn.Softshrink(a["lambd"]))


unary("sigmoid", lambda a: nn.Sigmoid())


unary("tanh", lambda a: nn.Tanh())


unary("log_sigmoid", lambda a: nn.LogSigmoid())


unary("silu", lambda a: nn.SiLU())


unary("leaky_relu", lambda a: nn.LeakyReLU(a["negative_slope"]))


unary("selu", lambda a: nn.SELU())


unary("celu", lambda a: nn.CELU(a["alpha"]))


unary("gelu", lambda a: nn.GELU(a["approximate"]))


unary("mish", lambda a: nn.Mish())


unary("softplus", lambda a: nn.Softplus(a["beta"], a["threshold"]))


unary("hardsigmoid", lambda a: nn.Hardsigmoid())


unary("hardswish", lambda a: nn.Hardswish())


unary("neg", lambda a: ops.Neg())


@lowers("prelu")
def _prelu(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    """Lower to relu(x) + w · (x - relu(x)), w along axis 1."""
    x, weight = low.value(a["self"], node), low.value(a["weight"], node)
    positive = low.emit(node, nn.ReLU(), x)
    negative = low.emit(node, ops.Sub(), x, positive)
    per_channel = low.emit(node, ops.Reshape((-1, *(1,) * (rank(a["self"]) - 2))), weight)
    per_channel.meta["shape"] = (weight.meta["shape"][0], *(1,) * (rank(a["self"]) - 2))
    return low.emit(node, ops.Add(), positive, low.emit(node, ops.Mul(), negative, per_channel))


@lowers("elu")
def _elu(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    if a["scale"] != 1 or a["input_scale"] != 1:
        return generic(calls.Pointwise)(low, node, a)
    return low.emit(node, nn.ELU(a["alpha"]), low.value(a["self"], node))


# Arithmetic -------------------------------------------------------------------------------------------------------


@lowers("add")
def _add(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    if not isinstance(a["other"], fx.Node):
        return low.emit(node, ops.Shift(a["alpha"] * a["other"]), low.value(a["self"], node))
    return low.emit(node, ops.Add(a["alpha"]), low.value(a["self"], node), low.value(a["other"], node))


@lowers("sub")
def _sub(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    if not isinstance(a["other"], fx.Node):
        return low.emit(node, ops.Shift(-a["alpha"] * a["other"]), low.value(a["self"], node))
    return low.emit(node, ops.Sub(a["alpha"]), low.value(a["self"], node), low.value(a["other"], node))


# Shape ------------------------------------------------------------------------------------------------------------


@lowers(*RESHAPES)
def _reshape(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    shape = shape_at(node, node)
    if sum(isinstance(size, BatchSize) for size in shape) > 1:
        raise UnsupportedError(
            "the result has no single batch axis",
            node=where(node),
            remedy="keep samples along one axis",
            code="FXC204",
            location=frames_of(node),
        )
    return low.emit(node, ops.Reshape(flexible(shape)), low.value(first(a), node))


@lowers(*PERMUTES)
def _permute(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    return low.emit(node, ops.Permute(order_of(node)), low.value(first(a), node))


@lowers("expand", "expand_as")
def _expand(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    return _expanded(low, node, first(a))


@lowers(*FILLS)
def _blank(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    shape, value = shape_at(node, node), a.get("fill_value", int("ones" in packet_of(node)))
    if len([size for size in shape if isinstance(size, BatchSize)]) != 1 or isinstance(value, fx.Node):
        raise UnsupportedError(
            "a new tensor has no single batch axis",
            node=where(node),
            remedy="fill in a constant",
            code="FXC204",
            location=frames_of(node),
        )
    return low.emit(node, ops.Blank(shape, value, node.meta["val"].dtype), low.batch())


@lowers("index")
def _index(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    """Lower an index that selects entries for each sample: `x[torch.arange(len(x)), …]`."""
    kind = kind_of_call(node)
    rows, *others = a["indices"]
    if not isinstance(rows, fx.Node) or not _counts_samples(rows) or shape_at(a["self"], node)[0] != BatchSize():
        return generic(kind)(low, node, a)
    indices = [rank(rows) - 1, *(calls.INPUT if isinstance(i, fx.Node) else i for i in others)]
    tensors = [a["self"], *(i for i in others if isinstance(i, fx.Node))]
    return low.emit(node, kind(calls.pick, [calls.INPUT, indices], {}), *(low.value(t, node) for t in tensors))


def _counts_samples(node: fx.Node) -> bool:
    """Whether a node is 0, 1, … over the samples of the batch, followed by axes of size one."""
    shape = node.meta["val"].shape
    if packet_of(node) in RESHAPES:
        source = node.args[0]
        return isinstance(source, fx.Node) and _counts_samples(source) and all(size == 1 for size in shape[1:])
    return _range_step(node) == 1 and shape_at(node, node) == (BatchSize(),)


def _range_step(node: fx.Node) -> object:
    """Return the step of an arange from zero over the batch; None for any other node."""
    over_batch = packet_of(node) == "arange" and isinstance(shape_at(node, node)[0], BatchSize)
    a = arguments(node) if over_batch else {}
    return a.get("step", 1) if a and a.get("start", 0) == 0 else None


@lowers("embedding")
def _embedding(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    _check_frequencies(low, node, a)
    if a["sparse"]:  # concerns the layout of autograd's gradient alone
        node.args, node.kwargs = (a["weight"], a["indices"], a["padding_idx"]), {}
        a = arguments(node)
    return generic(kind_of_call(node))(low, node, a)


def _check_frequencies(low: Builder, node: fx.Node, a: Arguments) -> None:
    """Refuse gradients scaled by counts over the batch, unless the weight is frozen."""
    if a["scale_grad_by_freq"] and (low.placeholders(a["weight"]) or not low.holdable(a["weight"])):
        raise scaled_by_frequency(where(node), frames_of(node))


def _bags(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    """Lower the bags of `nn.EmbeddingBag` on [N, T]: the same number of indices for all samples."""
    _check_frequencies(low, node, a)
    size = shape_at(a["indices"], node)
    step = _range_step(a["offsets"])
    if not isinstance(step, int) or size != (BatchSize(step),):
        raise UnsupportedError(
            "the bags have different lengths",
            node=where(node),
            remedy="give indices [N, T] without offsets",
            code="FXC210",
            location=frames_of(node),
        )
    weights = a["per_sample_weights"]
    tensors = [a["weight"], a["indices"], *([weights] if isinstance(weights, fx.Node) else [])]
    args = [
        calls.INPUT,
        calls.INPUT,
        step,
        a["mode"],
        calls.INPUT if isinstance(weights, fx.Node) else None,
        a["padding_idx"],
    ]
    return low.emit(node, calls.Opaque(calls.embedding_bags, args, {}), *(low.value(t, node) for t in tensors))


@lowers("copy")
def _copy(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    """Lower to the source, in the dtype and shape of the destination."""
    dtype = node.meta["val"].dtype
    x = _expanded(low, node, a["src"])
    return x if x.meta["dtype"] == a["src"].meta["val"].dtype == dtype else low.emit(node, ops.Cast(dtype), x)


def _expanded(low: Builder, node: fx.Node, source: fx.Node) -> fx.Node:
    """Return the source repeated to the shape of the node."""
    shape, x = shape_at(node, node), low.value(source, node)
    if not low.depends(source) and any(isinstance(size, BatchSize) for size in shape):
        return low.emit(node, ops.Repeat(shape), x, low.batch())
    return low.emit(node, ops.Expand(flexible(shape)), x)


@lowers("slice")
def _slice(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    size, stop = a["self"].meta["val"].shape[a["dim"]], a["end"]
    start, stop = a["start"] or 0, size if stop is None else stop
    if not isinstance(size, int):
        if isinstance(start, int) and start == 0 and a["step"] == 1 and node.meta["val"].shape[a["dim"]] == size:
            return low.emit(node, nn.Identity(), low.value(a["self"], node))
        raise UnsupportedError(
            "the batch axis is sliced",
            node=where(node),
            remedy="keep every sample",
            code="FXC205",
            location=frames_of(node),
        )
    if isinstance(start, fx.Node) or isinstance(stop, fx.Node):
        raise UnsupportedError(
            "a constant is cut to the batch size, so that its entries depend on the sample's position in the batch",
            node=where(node),
            remedy="give every sample the same constant, or pass it as an input with the samples along axis 0",
            code="FXC205",
            location=frames_of(node),
        )
    start, stop, step = slice(start, stop, a["step"]).indices(size)
    return low.emit(node, ops.Slice(a["dim"], start, stop, step), low.value(a["self"], node))


@lowers("narrow")
def _narrow(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    start = a["start"] % _number(a["self"].meta["val"].shape[a["dim"]], node)
    return low.emit(node, ops.Slice(a["dim"], start, start + a["length"]), low.value(a["self"], node))


@lowers("select")
def _select(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    size = _number(a["self"].meta["val"].shape[a["dim"]], node)
    return low.emit(node, ops.Select(a["dim"], a["index"] % size), low.value(a["self"], node))


def part(low: Builder, node: fx.Node, whole: fx.Node, index: int) -> fx.Node:
    """Return one of the tensors that chunk, split or unbind return."""
    packet, a = packet_of(whole), arguments(whole)
    if "custom_call" in whole.meta:
        return _custom(low, node, whole, index)
    parts: Sequence[Tensor] = whole.meta["val"]
    if packet == "embedding_bag" and isinstance(a["offsets"], fx.Node):
        return _bags(low, node, a)
    if packet == "unbind":
        return low.emit(node, ops.Select(a["dim"], index % len(parts)), low.value(a["self"], node))
    if packet not in ("chunk", "split", "split_with_sizes"):
        return generic(kind_of_call(node))(low, node, {})
    sizes = [_number(p.shape[a["dim"]], node) for p in parts]
    start = sum(sizes[:index])
    return low.emit(node, ops.Slice(a["dim"], start, start + sizes[index]), low.value(a["self"], node))


def _custom(low: Builder, node: fx.Node, whole: fx.Node, index: int) -> fx.Node:
    """Return one of the outputs of a custom gradient."""
    call, tensors = whole.meta["custom_call"], arguments(whole)["tensors"]
    values = [low.value(t, node) for t in tensors]
    own = [
        x if direct else low.emit(t, ops.Detach(), x) for t, x, direct in zip(tensors, values, call.direct, strict=True)
    ]
    y = low.emit(node, CustomGradient(call, index), *own)
    return y if call.differentiable[index] else low.emit(node, ops.Detach(), y)


def _number(size: int | torch.SymInt, node: fx.Node) -> int:
    if not isinstance(size, int):
        raise UnsupportedError(
            "the batch axis is split",
            node=where(node),
            remedy="keep every sample",
            code="FXC205",
            location=frames_of(node),
        )
    return size


@lowers("cat", "concat", "concatenate")
def _cat(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    return low.emit(node, ops.Cat(a["dim"]), *(low.value(t, node) for t in a["tensors"]))


unary("pad", lambda a: ops.Pad(a["pad"], a["mode"], a["value"]))


unary("constant_pad_nd", lambda a: ops.Pad(a["pad"], "constant", a["value"]))


unary("contiguous", lambda a: nn.Identity())


unary("clone", lambda a: nn.Identity())


unary("alias", lambda a: nn.Identity())


unary("detach", lambda a: ops.Detach())


@lowers("to", "_to_copy")
def _to(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    x, dtype = low.value(a["self"], node), node.meta["val"].dtype
    if not dtype.is_floating_point:
        raise UnsupportedError(
            f"the data is converted to {dtype}",
            node=where(node),
            remedy="keep it in floating point",
            code="FXC206",
            location=frames_of(node),
        )
    return low.emit(node, nn.Identity() if x.meta["dtype"] == dtype else ops.Cast(dtype), x)


def _dropout(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
    if a["train"] and a["p"] > 0:
        raise InputError(
            "Dropout is random in training mode",
            node=where(node),
            remedy="call model.eval()",
            code="FXC403",
            location=frames_of(node),
        )
    return low.emit(node, nn.Dropout(a["p"]), low.value(first(a), node))


for stochastic in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
    lowers(stochastic)(_dropout)


# Reductions and pooling -------------------------------------------------------------------------------------------

unary("mean", lambda a: ops.Mean(_dims(a), bool(a.get("keepdim"))))


unary("sum", lambda a: ops.Sum(_dims(a), bool(a.get("keepdim"))))


def _max_pool(pool: type[nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d], a: Arguments) -> nn.Module:
    return pool(a["kernel_size"], a["stride"] or None, a["padding"], a["dilation"], ceil_mode=a["ceil_mode"])


unary("max_pool1d", lambda a: _max_pool(nn.MaxPool1d, a))


unary("max_pool2d", lambda a: _max_pool(nn.MaxPool2d, a))


unary("max_pool3d", lambda a: _max_pool(nn.MaxPool3d, a))


def _avg_pool(pool: Any, a: Arguments) -> nn.Module:
    divisor = {"divisor_override": a["divisor_override"]} if a.get("divisor_override") else {}
    return pool(a["kernel_size"], a["stride"] or None, a["padding"], a["ceil_mode"], a["count_include_pad"], **divisor)


unary("avg_pool1d", lambda a: _avg_pool(nn.AvgPool1d, a))


unary("avg_pool2d", lambda a: _avg_pool(nn.AvgPool2d, a))


unary("avg_pool3d", lambda a: _avg_pool(nn.AvgPool3d, a))


unary("adaptive_avg_pool1d", lambda a: nn.AdaptiveAvgPool1d(a["output_size"]))


unary("adaptive_avg_pool2d", lambda a: nn.AdaptiveAvgPool2d(a["output_size"]))


unary("adaptive_avg_pool3d", lambda a: nn.AdaptiveAvgPool3d(a["output_size"]))
