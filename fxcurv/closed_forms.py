"""Pullbacks of opaque operators in closed form, for all columns at once.

Autograd runs an operator again to pull back through it, and torch's batching rules multiply its calls. Transformers are
made of a few operators whose vector-Jacobian products are a line or two. They are used as batched ones are: where a
trial on random numbers gives what autograd gives (passes/contract.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcurv import ops

__all__ = ["closed_form"]

Named = dict[str, Any]
Pullback = Callable[[Tensor, Named, str], Tensor | None]
"""(S[v, *y.shape], arguments by name, which of them) -> S[v, *argument.shape], or None where it does not apply."""

FORMS: dict[str, Pullback] = {}


def closed_form(op: ops.Opaque, S: Tensor, xs: Sequence[Tensor], k: int) -> Tensor | None:
    """S[v, *y.shape] -> S[v, *x_k.shape], or None where no form is known."""
    form = FORMS.get(str(getattr(op.function, "overloadpacket", "")).removeprefix("aten."))
    if form is None or op.part is not None or op.sized:
        return None
    named, inputs = _named(op, xs)
    return form(S, named, inputs[k]) if len(inputs) == len(xs) else None


def _named(op: ops.Opaque, xs: Sequence[Tensor]) -> tuple[Named, list[str]]:
    """All arguments of an operator by name, and the names of those that are inputs."""
    schema: Any = op.function._schema  # pyright: ignore[reportFunctionMemberAccess]
    given = {**dict(zip((a.name for a in schema.arguments), op.args, strict=False)), **op.kwargs}
    inputs = [name for name, argument in given.items() if argument is ops.INPUT]
    named = {a.name: given.get(a.name, a.default_value) for a in schema.arguments}
    return {**named, **dict(zip(inputs, xs, strict=False))}, inputs


def _form(*packets: str) -> Callable[[Pullback], Pullback]:
    """Declare the closed form of the ATen operators `packets`."""

    def declare(form: Pullback) -> Pullback:
        FORMS.update(dict.fromkeys(packets, form))
        return form

    return declare


def _summed_to(S: Tensor, shape: Sequence[int]) -> Tensor:
    """Sums over the axes, behind the columns, along which an input of this shape was repeated."""
    lead = S.ndim - 1 - len(shape)
    S = S.sum(tuple(range(1, 1 + lead))) if lead else S
    axes = [1 + k for k, size in enumerate(shape) if size == 1 and S.shape[1 + k] != 1]
    return S.sum(axes, keepdim=True) if axes else S


# Normalization ----------------------------------------------------------------------------------------------------


def _normalized(S: Tensor, a: Named, wanted: str, axes: list[int], centred: bool) -> Tensor:
    """y = γ x̂ + β with x̂ = (x - mean) / deviation over the last `axes` of x: dx = (g - ḡ - x̂ mean(g x̂)) / deviation."""
    x, weight, eps = a["input"], a["weight"], a["eps"]
    wide = torch.promote_types(x.dtype, torch.float32)
    x, S = x.to(wide), S.to(wide)
    eps = torch.finfo(wide).eps if eps is None else eps
    centre = x - x.mean(axes, keepdim=True) if centred else x
    rate = (centre.square().mean(axes, keepdim=True) + eps).rsqrt()
    if wanted == "bias":
        return _summed_to(S, a["bias"].shape).to(a["bias"].dtype)
    unit = centre * rate
    if wanted == "weight":
        return _summed_to(S * unit, weight.shape).to(weight.dtype)
    g = S if weight is None else S * weight
    inner = unit * (g * unit).mean(axes, keepdim=True)
    return ((g - g.mean(axes, keepdim=True) - inner if centred else g - inner) * rate).to(a["input"].dtype)


def _last(count: int) -> list[int]:
    return list(range(-count, 0))


@_form("layer_norm")
def _layer_norm(S: Tensor, a: Named, wanted: str) -> Tensor:
    return _normalized(S, a, wanted, _last(len(a["normalized_shape"])), centred=True)


@_form("rms_norm")
def _rms_norm(S: Tensor, a: Named, wanted: str) -> Tensor:
    return _normalized(S, a, wanted, _last(len(a["normalized_shape"])), centred=False)


@_form("softmax", "_softmax")
def _softmax(S: Tensor, a: Named, wanted: str) -> Tensor:
    """Sx = p (S - Σ p S)."""
    x = a["self"]
    p = torch.softmax(x.to(S.dtype), a["dim"])
    axis = a["dim"] % x.ndim - x.ndim
    return (p * (S - (p * S).sum(axis, keepdim=True))).to(x.dtype)


# Products ---------------------------------------------------------------------------------------------------------


@_form("matmul", "mm", "bmm")
def _matmul(S: Tensor, a: Named, wanted: str) -> Tensor | None:
    left, right = (a[name] for name in list(a)[:2])
    if min(left.ndim, right.ndim) < 2:
        return None
    return _factor(S, left, right, first=wanted == next(iter(a)))


def _factor(S: Tensor, left: Tensor, right: Tensor, first: bool) -> Tensor:
    """Of y = left @ right: S rightᵀ or leftᵀ S, summed to the input's shape."""
    if first:
        return _summed_to(S @ right.mT, left.shape)
    if right.ndim == 2:  # one product over all rows
        return left.flatten(0, -2).mT @ S.flatten(1, -2)
    return _summed_to(left.mT @ S, right.shape)


@_form("addmm")
def _addmm(S: Tensor, a: Named, wanted: str) -> Tensor:
    if wanted == "self":
        pulled, factor = _summed_to(S, a["self"].shape), a["beta"]
    else:
        pulled, factor = _factor(S, a["mat1"], a["mat2"], first=wanted == "mat1"), a["alpha"]
    return pulled if factor == 1 else pulled * factor


@_form("scaled_dot_product_attention")
def _attention(S: Tensor, a: Named, wanted: str) -> Tensor | None:
    """y = P v with P = softmax(scale q kᵀ + mask); the same P serves all columns."""
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if a["dropout_p"] or a["enable_gqa"] or wanted == "attn_mask":
        return None
    scale = 1 / math.sqrt(q.shape[-1]) if a["scale"] is None else a["scale"]
    logits = (q * scale) @ k.mT
    if a["is_causal"]:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    P = torch.ops.aten._safe_softmax(logits, -1)
    if wanted == "value":
        return _summed_to(P.mT @ S, v.shape)
    dP = S @ v.mT
    dA = P * (dP - (dP * P).sum(-1, keepdim=True)) * scale
    return _summed_to(dA @ k if wanted == "query" else dA.mT @ q, a[wanted].shape)


# Tables -----------------------------------------------------------------------------------------------------------


@_form("embedding")
def _embedding(S: Tensor, a: Named, wanted: str) -> Tensor:
    """Rows of S added at the indices that they were read from; nothing is added at the index of padding."""
    weight, indices = a["weight"], a["indices"].flatten()
    rows = S.flatten(1, -2) * (indices != a["padding_idx"]).unsqueeze(-1)
    return S.new_zeros(len(S), *weight.shape).index_add(1, indices, rows)
