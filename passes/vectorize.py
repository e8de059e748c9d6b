"""vectorize: columns that autograd pulls back one by one are vectorized, where a trial gives equal results."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor, fx, nn

from fxcurv.core.identity import structure_of
from fxcurv.core.rounding import close
from fxcurv.core.shapes import resolve
from fxcurv.ir.backward_ops import PullInputs, PullToParameter
from fxcurv.ir.rewriting import instead, rewrites
from passes.setting import Setting

__all__ = ["vectorize"]


def vectorize(gm: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """Return a backward graph with vectorized pullbacks by autograd, wherever a trial gives equal results."""
    return rewrites(gm, partial(vectorized, setting=setting))


def vectorized(node: fx.Node, op: nn.Module, setting: Setting) -> fx.Node | None:
    """Vectorize a pullback by autograd over columns (and samples), if a trial gives equal results.

    torch's batching rules are not correct for every operator, so each use of them is tried on random numbers in
    float64; the setting caches the outcome for equal ops on equal shapes.
    """
    if isinstance(op, PullToParameter) and not op.vectorized:
        candidate: nn.Module = PullToParameter(op.op, op.k, op.places, vectorized=True)
    elif isinstance(op, PullInputs) and not op.vectorized:
        candidate = PullInputs(op.op, op.ks, op.per_sample, vectorized=True)
    else:
        return None
    inputs = tuple((n.meta["shape"], n.meta.get("dtype")) for n in node.all_input_nodes)
    key = (structure_of(candidate), inputs)
    if key not in setting.trials:
        setting.trials[key] = _equal(op, candidate, node, setting.device)
    return instead(node, candidate, node.args) if setting.trials[key] else None


def _equal(op: nn.Module, candidate: nn.Module, node: fx.Node, device: torch.device) -> bool:
    """Whether two pullbacks agree on random columns and inputs for two samples."""
    generator = torch.Generator().manual_seed(0)
    arguments = fx.map_arg(node.args, lambda n: _random(n, generator).to(device))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # a missing batching rule only gives a warning
            expected, value = op(*arguments), candidate(*arguments)
    except Exception:  # an operator without a batching rule, or not for float64
        return False
    pairs = zip(_listed(value), _listed(expected), strict=True)
    return all(close(ours, theirs, tolerance=1e-9, floor=1.0) for ours, theirs in pairs)


def _listed(pulled: Tensor | list[Tensor]) -> list[Tensor]:
    return [pulled] if isinstance(pulled, Tensor) else pulled


def _random(node: fx.Node, generator: torch.Generator) -> Tensor:
    shape, dtype = node.meta["shape"], node.meta.get("dtype", torch.float64)
    sizes = resolve(tuple({"V": 2, "N": 2}.get(s, s) if isinstance(s, str) else s for s in shape), 2)
    if dtype.is_complex:
        return torch.randn(sizes, dtype=torch.complex128, generator=generator)
    if not dtype.is_floating_point:
        return torch.zeros(sizes, dtype=dtype)
    return torch.rand(sizes, dtype=torch.float64, generator=generator) + 0.1
