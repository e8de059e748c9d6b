"""contract: definitions become cheaper equal contractions where the graph shows, or a trial proves, that they may."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.contractions import Diagonal, DiagonalOfSinglePositions
from fxcurv.pullback import Pull, PullToParameter
from fxcurv.shapes import resolve
from passes.rewrite import rewrites

__all__ = ["contract", "single_positions", "together"]


def contract(gm: fx.GraphModule, trials: dict[object, bool]) -> fx.GraphModule:
    """A backward graph with the contractions that are always the cheapest; `trials` are shared by all of a model."""
    return rewrites(gm, single_positions, partial(together, trials=trials))


def single_positions(node: fx.Node, op: nn.Module) -> fx.Node | None:
    """(Σ_s S x)² with one use and one position s is S² x²: no per-sample entries are formed."""
    if type(op) is not Diagonal:
        return None
    Ss: Any = node.args[1]
    if len(Ss) != 1 or Ss[0].meta["shape"][2] != 1:
        return None
    return _instead(node, DiagonalOfSinglePositions(), "single")


def together(node: fx.Node, op: nn.Module, trials: dict[object, bool]) -> fx.Node | None:
    """Columns (and samples) that autograd pulls back one by one are pulled back at once, if that gives the same.

    torch's batching rules are not right for every operator, so each use of them is tried on random numbers in float64;
    `trials` remembers the outcome for equal ops on equal shapes.
    """
    if isinstance(op, PullToParameter) and not op.together:
        candidate: nn.Module = PullToParameter(op.op, op.k, op.places, together=True)
    elif isinstance(op, Pull) and op.rule.kind == "opaque" and not op.together:
        candidate = Pull(op.op, op.k, op.per_sample, together=True)
    else:
        return None
    inputs = tuple((n.meta["shape"], n.meta.get("dtype")) for n in node.all_input_nodes)
    key = (candidate._get_name(), candidate.extra_repr(), op.op.extra_repr(), inputs)
    if key not in trials:
        trials[key] = _equal(op, candidate, node)
    return _instead(node, candidate, "together") if trials[key] else None


def _equal(op: nn.Module, candidate: nn.Module, node: fx.Node) -> bool:
    """Whether two pullbacks agree on random columns and inputs for two samples."""
    generator = torch.Generator().manual_seed(0)
    arguments = fx.map_arg(node.args, lambda n: _random(n, generator))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # that an operator has no batching rule is only said by a warning
            expected, value = op(*arguments), candidate(*arguments)
    except Exception:  # an operator without a batching rule, or not for float64
        return False
    if value.shape != expected.shape or not expected.numel():
        return value.shape == expected.shape
    scale, error = float(expected.abs().max()), float((value - expected).abs().max())
    if not math.isnan(scale + error):
        return error <= 1e-9 * max(scale, 1.0)
    scale = float(expected.nan_to_num().abs().max())
    return torch.allclose(value, expected, rtol=0, atol=1e-9 * max(scale, 1.0), equal_nan=True)


def _random(node: fx.Node, generator: torch.Generator) -> Tensor:
    shape, dtype = node.meta["shape"], node.meta.get("dtype", torch.float64)
    sizes = resolve(tuple({"V": 2, "N": 2}.get(s, s) if isinstance(s, str) else s for s in shape), 2)
    if dtype.is_complex:
        return torch.randn(sizes, dtype=torch.complex128, generator=generator)
    if not dtype.is_floating_point:
        return torch.zeros(sizes, dtype=dtype)
    return torch.rand(sizes, dtype=torch.float64, generator=generator) + 0.1


def _instead(node: fx.Node, op: nn.Module, suffix: str) -> fx.Node:
    """A call of `op` in the place of a node."""
    gm = node.graph.owning_module
    assert gm is not None
    target = f"{node.target}_{suffix}"
    gm.add_submodule(target, op)
    with node.graph.inserting_before(node):
        replacement = node.graph.call_module(target, node.args)
    replacement.meta = dict(node.meta)
    return replacement
