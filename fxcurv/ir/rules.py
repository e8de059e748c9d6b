"""The table of derivative rules: one call per op, declared by kind.

A rule gives the tensors saved for backward and the pullback of a cotangent through the op. With `v` columns of the
factor along axis 0, `S[v, *y.shape] -> S[v, *x.shape]` for each input `x`; the caller undoes broadcasting.
An affine rule also gives the use of the op's parameters, `y[n,s,g,o] = Σ_i W[g,o,i] x[n,s,g,i] + b[g,o]`.

| kind               | y          | saved          | pullback                                     |
|--------------------|------------|----------------|----------------------------------------------|
| elementwise        | f(x)       | f'(x), or x    | S · f'(x)                                    |
| linear             | L x        | shapes         | Lᵀ S                                         |
| bilinear           | B(a, b)    | a, b           | B(·, b)ᵀ S, B(a, ·)ᵀ S                       |
| gather             | x[indices] | indices, shape | S scattered to the indices                   |
| affine             | W x + b    | shape          | Wᵀ S; and the positions of x and S, for W, b |
| opaque             | f(x, …)    | x, …           | vjp(f), column by column, or in closed form  |
| parameter          | θ          | nothing        | S, the cotangent of θ for each sample        |
| non_differentiable | x          | nothing        | zero                                         |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.convolution.patches import Patches
from fxcurv.core.errors import SpecError
from fxcurv.ir import calls, ops
from fxcurv.ir.custom_gradients import CustomGradient
from fxcurv.ir.declare import (
    RULES,
    Rule,
    Shape,
    affine,
    autograd_transpose,
    bilinear,
    declare,
    elementwise,
    fused,
    gather,
    linear,
    masked,
    non_differentiable,
    opaque,
    vjp_of,
)
from fxcurv.linalg.matmul import times

__all__ = ["positions", "rule_of"]


aten: Any = torch.ops.aten


def rule_of(op: nn.Module) -> Rule:
    """The rule of an op of the vocabulary."""
    try:
        return RULES[type(op)]
    except KeyError:
        raise SpecError(
            f"no rule for module type {type(op).__name__}", remedy="declare one in fxcurv/ir/rules.py", code="FXC301"
        ) from None


def _pool_transpose(op: nn.Module, S: Tensor, shapes: tuple[Shape, ...], k: int) -> Tensor:
    """Pools treat all entries of their first axis the same, so columns are folded into it."""
    (first, *others) = shapes[0]
    pull = vjp_of(op, [S.new_zeros(S.shape[0] * first, *others)], [0])
    return pull(S.flatten(0, 1).contiguous())[0].unflatten(0, S.shape[:2])


def _place(S: Tensor, shape: Shape, index: tuple[slice | int, ...]) -> Tensor:
    """Zeros[v, *shape] with S at `index`."""
    x = S.new_zeros(S.shape[0], *shape)
    x[(slice(None), *index)] = S
    return x


def _expanded(op: ops.Sum | ops.Mean, S: Tensor, shape: Shape) -> Tensor:
    """S[v, *y.shape] repeated along the reduced axes: the transpose of a sum."""
    axes = sorted(d % len(shape) for d in op.dims)
    for axis in () if op.keepdim else axes:
        S = S.unsqueeze(axis + 1)
    return S.expand(S.shape[0], *shape)


def _select_index(op: ops.Select, ndim: int) -> tuple[slice | int, ...]:
    return (*(slice(None),) * (op.dim % ndim), op.index)


def _pad_transpose(op: ops.Pad, S: Tensor, shapes: tuple[Shape, ...], k: int) -> Tensor:
    if op.mode == "constant":  # the constant has no derivative, and cropping undoes padding
        return F.pad(S, tuple(-p for p in op.pad))
    return autograd_transpose(op, S, shapes, k)


def _cat_transpose(op: ops.Cat, S: Tensor, shapes: tuple[Shape, ...], k: int) -> Tensor:
    axis = op.dim % len(shapes[0])
    return S.narrow(axis + 1, sum(shape[axis] for shape in shapes[:k]), shapes[k][axis])


Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def _conv_pull(op: Conv, weight: Tensor, S: Tensor, shape: Shape) -> Tensor:
    """[v, n, o, …] -> [v, n, c, …]: the transposed convolution, with v folded into the batch."""
    lead, axes = S.shape[:2], len(op.kernel_size)
    x = S.new_empty(()).expand(lead.numel(), *shape[1:])  # only its shape is read
    geometry = (op.stride, op.padding, op.dilation, False, (0,) * axes, op.groups)
    pulled = torch.ops.aten.convolution_backward(S.flatten(0, 1), x, weight, None, *geometry, (True, False, False))
    return pulled[0].unflatten(0, lead)


def _channels(S: Tensor, axis: int, groups: int) -> Tensor:
    """[…, c, …] with channels at `axis` -> […, s, g, c/g]: the axes after the channels are the positions."""
    S = S.flatten(axis + 1) if S.ndim > axis + 1 else S.unsqueeze(-1)
    return S.transpose(axis, axis + 1).unflatten(-1, (groups, -1))


def positions(x: Tensor, lead: int) -> Tensor:
    """[*lead, …, i] -> [*lead, s, 1, i]: axes between the leading ones and the last one are positions."""
    x = x.unsqueeze(lead) if x.ndim == lead + 1 else x.flatten(lead, -2)
    return x.unsqueeze(-2)


def _per_channel(vector: Tensor, ndim: int) -> Tensor:
    return vector.view(-1, *(1,) * (ndim - 2))


# The table --------------------------------------------------------------------------------------------------------

# parameters
affine(
    nn.Linear,  # y[n,…,o] = W[o,i] x[n,…,i] + b[o]
    pull=lambda op, weight, S, shape: times(S, weight),
    x=lambda op, x: positions(x, lead=1),
    S=lambda op, S: positions(S, lead=2),
    batch_first=False,
)


affine(
    ops.MatMul,  # y[n,…,o] = x[n,…,i] W[i,o] + b[o]
    pull=lambda op, weight, S, shape: times(S, weight.mT),
    x=lambda op, x: positions(x, lead=1),
    S=lambda op, S: positions(S, lead=2),
    batch_first=False,
    weight="in_out",
)


for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):  # y[n,o,s] = W[o,i] patches(x)[n,s,i] + b[o]
    affine(
        conv, pull=_conv_pull, x=lambda op, x: Patches.of(op).positions(x), S=lambda op, S: _channels(S, 2, op.groups)
    )


affine(
    ops.Affine,  # y[n,c,s] = γ[c] x̂[n,c,s] + β[c]: one group per channel
    pull=lambda op, weight, S, shape: S * _per_channel(op.slope(), len(shape)),
    x=lambda op, x: _channels(op.normalized(x), 1, x.shape[1]),
    S=lambda op, S: _channels(S, 2, S.shape[2]),
    weight="per_channel",
)


affine(
    ops.ScaleShift,  # y[n,s,c] = γ[c] x[n,s,c] + β[c]
    pull=lambda op, weight, S, shape: S * op.along(weight),
    x=lambda op, x: op.channels(x, lead=1),
    S=lambda op, S: op.channels(S, lead=2),
    batch_first=False,
    weight="per_channel",
)


# elementwise: by a mask
masked(nn.ReLU, lambda op, x, y: y > 0)


masked(nn.ReLU6, lambda op, x, y: (y > 0) & (y < 6))


masked(nn.Hardtanh, lambda op, x, y: (x > op.min_val) & (x < op.max_val))


masked(nn.Threshold, lambda op, x, y: x > op.threshold)


masked(nn.Hardshrink, lambda op, x, y: y != 0)


masked(nn.Softshrink, lambda op, x, y: y != 0)


# elementwise: by the output
elementwise(nn.Sigmoid, lambda op, x, y: y * (1 - y))


elementwise(nn.Tanh, lambda op, x, y: 1 - y * y)


elementwise(nn.LogSigmoid, lambda op, x, y: torch.sigmoid(-x))


elementwise(nn.SiLU, lambda op, x, y: torch.sigmoid(x) * (1 - y) + y)


# elementwise: by autograd's kernels S, x -> S · f'(x)
fused(nn.GELU, lambda op, S, x: aten.gelu_backward(S, x, approximate=op.approximate))


fused(nn.LeakyReLU, lambda op, S, x: aten.leaky_relu_backward(S, x, op.negative_slope, False), nonlinear=False)


fused(nn.Mish, lambda op, S, x: aten.mish_backward(S, x))


fused(nn.Softplus, lambda op, S, x: aten.softplus_backward(S, x, op.beta, op.threshold))


fused(nn.Hardsigmoid, lambda op, S, x: aten.hardsigmoid_backward(S, x))


fused(nn.Hardswish, lambda op, S, x: aten.hardswish_backward(S, x))


# elementwise: by autograd
elementwise(nn.ELU)


elementwise(nn.SELU)


elementwise(nn.CELU)


elementwise(calls.Pointwise)


# arithmetic
linear(ops.Add, lambda op, S, shapes, k: S if k == 0 or op.alpha == 1 else op.alpha * S)


linear(ops.Sub, lambda op, S, shapes, k: S if k == 0 else -op.alpha * S)


linear(ops.Neg, lambda op, S, shapes, k: -S)


linear(ops.Shift, lambda op, S, shapes, k: S)


linear(ops.Scale, lambda op, S, shapes, k: S * op.value)


bilinear(ops.Mul, lambda op, S, xs, k: S * xs[1 - k])


# shape
linear(ops.Reshape, lambda op, S, shapes, k: S.reshape(S.shape[0], *shapes[0]))


linear(ops.Permute, lambda op, S, shapes, k: S.permute(0, *(axis + 1 for axis in op.inverse)))


linear(ops.Expand, lambda op, S, shapes, k: S)  # undone as a broadcast


linear(ops.Slice, lambda op, S, shapes, k: _place(S, shapes[0], op.index(len(shapes[0]))))


linear(ops.Select, lambda op, S, shapes, k: _place(S, shapes[0], _select_index(op, len(shapes[0]))))


linear(ops.Cat, _cat_transpose)


linear(ops.Pad, _pad_transpose)


# reductions and pooling
linear(ops.Sum, lambda op, S, shapes, k: _expanded(op, S, shapes[0]))


linear(ops.Mean, lambda op, S, shapes, k: _expanded(op, S, shapes[0]) * (S[0].numel() / math.prod(shapes[0])))


linear(nn.AvgPool1d, _pool_transpose)


linear(nn.AvgPool2d, _pool_transpose)


linear(nn.AvgPool3d, _pool_transpose)


linear(nn.AdaptiveAvgPool1d, _pool_transpose)


linear(nn.AdaptiveAvgPool2d, _pool_transpose)


linear(nn.AdaptiveAvgPool3d, _pool_transpose)


def _pool_indices(pool: Callable[..., Any]) -> Callable[[Any, Tensor], Tensor]:
    def indices(op: nn.MaxPool2d, x: Tensor) -> Tensor:
        return pool(x, op.kernel_size, op.stride, op.padding, op.dilation, op.ceil_mode)[1]

    return indices


gather(nn.MaxPool1d, _pool_indices(torch.ops.aten.max_pool1d_with_indices), axes=1)


gather(nn.MaxPool2d, _pool_indices(torch.ops.aten.max_pool2d_with_indices), axes=2)


gather(nn.MaxPool3d, _pool_indices(torch.ops.aten.max_pool3d_with_indices), axes=3)


# the rest
opaque(calls.Opaque)


opaque(CustomGradient)


declare(ops.Cast, Rule("linear", lambda op, xs, y: xs[0].dtype, lambda op, S, dtype, k: S.to(dtype)))


linear(ops.Repeat, lambda op, S, shapes, k: S)  # undone as a broadcast


declare(ops.Parameter, Rule("parameter", lambda op, xs, y: None, lambda op, S, saved, k: S))


non_differentiable(ops.Detach)


non_differentiable(ops.Constant)


non_differentiable(ops.Blank)


non_differentiable(calls.Discrete)


for identity in (nn.Identity, nn.Dropout):  # removed by passes/eliminate_identities.py
    linear(identity, lambda op, S, shapes, k: S)
