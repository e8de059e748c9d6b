"""Pullbacks of opaque operators in closed form, for all columns at once, and to all requested inputs.

Autograd runs an operator again to pull back through it, and torch's batching rules multiply its calls. Transformers
consist of a few operators whose vector-Jacobian products take one or two lines. A closed form is used only if it agrees
with autograd on random inputs (passes/vectorize.py). On a CPU, columns and samples are split into parts whose
intermediate results fit in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcurv.core.torch_compat import safe_softmax, schema_of
from fxcurv.ir import calls
from fxcurv.linalg.allocation import new_empty
from fxcurv.linalg.cost import CACHE, at_once

__all__ = ["closed_form"]


Named = dict[str, Any]


Pullback = Callable[[Tensor, Named, Sequence[str]], list[Tensor] | None]
"""(S[v, *y.shape], arguments by name, requested names) -> S[v, *argument.shape] of each, or None if not applicable."""


CLOSED_FORMS: dict[str, Pullback] = {}


def closed_form(op: calls.Opaque, S: Tensor, xs: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor] | None:
    """S[v, *y.shape] -> S[v, *x_k.shape] for every k, or None if no closed form is known."""
    form = CLOSED_FORMS.get(str(getattr(op.function, "overloadpacket", "")).removeprefix("aten."))
    if form is None or op.part is not None or op.sized:
        return None
    named, inputs = _named(op, xs)
    return form(S, named, [inputs[k] for k in ks]) if len(inputs) == len(xs) else None


def _named(op: calls.Opaque, xs: Sequence[Tensor]) -> tuple[Named, list[str]]:
    """All arguments of an operator by name, and the names of the inputs."""
    schema = schema_of(op.function)
    given = {**dict(zip((a.name for a in schema.arguments), op.args, strict=False)), **op.kwargs}
    inputs = [name for name, argument in given.items() if argument is calls.INPUT]
    named = {a.name: given.get(a.name, a.default_value) for a in schema.arguments}
    return {**named, **dict(zip(inputs, xs, strict=False))}, inputs


def _form(*packets: str) -> Callable[[Pullback], Pullback]:
    """Declare the closed form of the ATen operators `packets`."""

    def declare(form: Pullback) -> Pullback:
        CLOSED_FORMS.update(dict.fromkeys(packets, form))
        return form

    return declare


def _summed_to(S: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum over the axes, after the columns, along which an input of this shape was broadcast."""
    lead = S.ndim - 1 - len(shape)
    S = S.sum(tuple(range(1, 1 + lead))) if lead else S
    axes = [1 + k for k, size in enumerate(shape) if size == 1 and S.shape[1 + k] != 1]
    return S.sum(axes, keepdim=True) if axes else S


def _in_parts(S: Tensor, entries: int, pull: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    """`pull` of S; on a CPU in chunks of columns, of `entries` intermediate numbers each, that fit in the cache."""
    size = at_once(S, entries, len(S), CACHE)
    if size >= len(S):
        return pull(S)
    results: list[Tensor] = []
    for start in range(0, len(S), size):
        found = pull(S[start : start + size])
        results = results or [new_empty(t, len(S), *t.shape[1:]) for t in found]
        for result, part in zip(results, found, strict=True):
            result[start : start + size] = part
    return results


# Normalization ----------------------------------------------------------------------------------------------------


def _scaled(S: Tensor, unit: Tensor, a: Named, wanted: Sequence[str], pull: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Pullback of y = γ x̂ + β, from `unit` x̂ and the pullback from x̂ to x."""
    weight = a["weight"]
    found: list[Tensor] = []
    for name in wanted:
        if name == "bias":
            pulled = _summed_to(S, a["bias"].shape)
        elif name == "weight":
            pulled = _summed_to(S * unit, weight.shape)
        else:
            (pulled,) = _in_parts(S, 3 * unit.numel(), lambda S: [pull(S if weight is None else S * weight)])
        found.append(pulled.to(a[name].dtype))
    return found


@_form("layer_norm")
def _layer_norm(S: Tensor, a: Named, wanted: Sequence[str]) -> list[Tensor]:
    """x̂ = (x - mean)/deviation over the last axes: dx = (g - ḡ - x̂ mean(g x̂))/deviation, one kernel of torch."""
    shape = a["normalized_shape"]
    x = a["input"].to(torch.promote_types(a["input"].dtype, torch.float32))
    unit, mean, rate = torch.native_layer_norm(x, shape, None, None, a["eps"])

    def pull(g: Tensor) -> Tensor:
        centre, inverse = (t.expand(len(g), *t.shape).contiguous() for t in (mean, rate))
        xs = x.expand(len(g), *x.shape)
        mask = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(g, xs, shape, centre, inverse, None, None, mask)[0]

    return _scaled(S.to(x.dtype), unit, a, wanted, pull)


@_form("rms_norm")
def _rms_norm(S: Tensor, a: Named, wanted: Sequence[str]) -> list[Tensor]:
    """x̂ = x/√(mean x² + ε) over the last axes: dx = (g - x̂ mean(g x̂))/√(mean x² + ε)."""
    axes = list(range(-len(a["normalized_shape"]), 0))
    x = a["input"].to(torch.promote_types(a["input"].dtype, torch.float32))
    eps = torch.finfo(x.dtype).eps if a["eps"] is None else a["eps"]
    rate = (x.square().mean(axes, keepdim=True) + eps).rsqrt()
    unit = x * rate
    return _scaled(S.to(x.dtype), unit, a, wanted, lambda g: (g - unit * (g * unit).mean(axes, keepdim=True)) * rate)


@_form("softmax", "_softmax")
def _softmax(S: Tensor, a: Named, wanted: Sequence[str]) -> list[Tensor]:
    """Sx = p (S - Σ p S)."""
    x = a["self"]
    p = torch.softmax(x.to(S.dtype), a["dim"])
    axis = a["dim"] % x.ndim - x.ndim
    return _in_parts(S, 2 * x.numel(), lambda S: [(p * (S - (p * S).sum(axis, keepdim=True))).to(x.dtype)])


# Products ---------------------------------------------------------------------------------------------------------


@_form("matmul", "mm", "bmm")
def _matmul(S: Tensor, a: Named, wanted: Sequence[str]) -> list[Tensor] | None:
    left, right = (a[name] for name in list(a)[:2])
    if min(left.ndim, right.ndim) < 2:
        return None
    return [_factor(S, left, right, first=name == next(iter(a))) for name in wanted]


def _factor(S: Tensor, left: Tensor, right: Tensor, first: bool) -> Tensor:
    """Pullback of y = left @ right: S rightᵀ or leftᵀ S, summed to the input's shape."""
    if first:
        return _summed_to(S @ right.mT, left.shape)
    if right.ndim == 2:  # one product over all rows
        return left.flatten(0, -2).mT @ S.flatten(1, -2)
    return _summed_to(left.mT @ S, right.shape)


@_form("addmm")
def _addmm(S: Tensor, a: Named, wanted: Sequence[str]) -> list[Tensor]:
    def pulled(name: str) -> Tensor:
        if name == "self":
            S_x, factor = _summed_to(S, a["self"].shape), a["beta"]
        else:
            S_x, factor = _factor(S, a["mat1"], a["mat2"], first=name == "mat1"), a["alpha"]
        return S_x if factor == 1 else S_x * factor

    return [pulled(name) for name in wanted]


@_form("scaled_dot_product_attention")
def _attention(S: Tensor, a: Named, wanted: Sequence[str]) -> list[Tensor] | None:
    """y = P v with P = softmax(scale q kᵀ + mask), samples in parts whose probabilities fit in the cache."""
    if a["dropout_p"] or a["enable_gqa"] or "attn_mask" in wanted:
        return None
    names = ["query", "key", "value"]
    if a["attn_mask"] is not None and a["attn_mask"].ndim == a["query"].ndim and len(a["attn_mask"]) > 1:
        names.append("attn_mask")
    q, count = a["query"], S.shape[1]
    alike = q.ndim >= 3 and all(a[name].ndim == S.ndim - 1 and len(a[name]) == count for name in names)
    each = q.numel() // max(1, len(q) * q.shape[-1]) * a["key"].shape[-2]  # probabilities of one sample
    size = at_once(S, each, count, CACHE)
    if not alike or size >= count:
        return _attended(S, a, wanted)
    results = [new_empty(S, len(S), *a[name].shape) for name in wanted]
    for start in range(0, count, size):
        part = slice(start, start + size)
        given = {**a, **{name: a[name][part] for name in names}}
        for result, found in zip(results, _attended(S[:, part], given, wanted), strict=True):
            result[:, part] = found
    return results


def _attended(S: Tensor, a: Named, wanted: Sequence[str]) -> list[Tensor]:
    """dv = Pᵀ S; dq = A k and dk = Aᵀ q with A = scale P (dP - Σ dP P), dP = S vᵀ; all columns use the same P."""
    q, k, v = a["query"], a["key"], a["value"]
    scale = 1 / math.sqrt(q.shape[-1]) if a["scale"] is None else a["scale"]
    P = _probabilities((q * scale) @ k.mT, a)

    def pull(S: Tensor) -> list[Tensor]:
        found = {"value": P.mT @ S} if "value" in wanted else {}
        if wanted != ["value"]:
            dP = S @ v.mT
            A = dP.sub_((dP * P).sum(-1, keepdim=True)).mul_(P).mul_(scale)
            found |= {"query": A @ k, "key": A.mT @ q}
        return [_summed_to(found[name], a[name].shape) for name in wanted]

    return _in_parts(S, P.numel(), pull)


def _probabilities(logits: Tensor, a: Named) -> Tensor:
    """Softmax of the masked logits; zero for a query whose keys are all masked."""
    mask = a["attn_mask"]
    if a["is_causal"]:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is None:
        return torch.softmax(logits, -1)
    logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return safe_softmax(logits, -1)


# Tables -----------------------------------------------------------------------------------------------------------


@_form("embedding")
def _embedding(S: Tensor, a: Named, wanted: Sequence[str]) -> list[Tensor]:
    """Add rows of S at the indices of the lookup, except at the padding index."""
    weight, indices = a["weight"], a["indices"].flatten()
    rows = S.flatten(1, -2) * (indices != a["padding_idx"]).unsqueeze(-1)
    return [S.new_zeros(len(S), *weight.shape).index_add(1, indices, rows)]
