"""The static level: the status of every parameter, from the graph alone, on the meta device.

Compilation infers batch axes by probing with random numbers. This level assumes that samples do not mix, so a model
that passes may still be refused by the shape level for samples that mix.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.checks.rows import Outcome
from fxcurv.core.shapes import BatchSize, Samples, Shape
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import Inputs, Output
from fxcurv.ir.rewriting import copied, settled
from fxcurv.quantities.selection import Selection
from passes.pipeline import lowered
from passes.plan import plan

__all__ = ["static_found"]


def static_found(model: nn.Module, inputs: Inputs, output: Output, selection: Selection) -> Outcome:
    """Return the status of each parameter, and the lowered graph."""
    on_meta: Any = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), inputs)
    gm = _assumed_apart(lowered(_without_memory(model), on_meta, output)["lowered"])
    return Outcome(plan(model, gm, selection).statuses, gm)


def _without_memory(model: nn.Module) -> nn.Module:
    """Return a copy of the modules with meta tensors: shapes and dtypes, no data."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(t): _on_meta(t) for t in tensors}
    return copy.deepcopy(model, memo)


def _on_meta(t: Tensor) -> Tensor:
    bare = torch.empty_like(t, device="meta")
    return nn.Parameter(bare, t.requires_grad) if isinstance(t, nn.Parameter) else bare


def _assumed_apart(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with assumed batch axes: the first axis of batch size, for nodes that depend on the input."""
    gm = copied(gm)
    for node in gm.graph.nodes:
        shared = node.op != "placeholder" and all(x.meta["samples"] is None for x in node.all_input_nodes)
        node.meta["samples"] = None if shared else _first(node.meta.get("shape", ()))
    return settled(gm)


def _first(shape: Shape) -> Samples | None:
    """Return the layout with samples in order along the first axis whose size is a multiple of the batch size."""
    sizes = ((axis, size.multiple) for axis, size in enumerate(shape) if isinstance(size, BatchSize))
    return next((Samples(axis, multiple) for axis, multiple in sizes), None)
