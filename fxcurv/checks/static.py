"""The static level: what every parameter would get, from the graph alone, on the meta device.

Where the samples of a tensor lie is what compiling probes with random numbers; here it is assumed that they stay apart,
so a model that passes may still be refused by the level above, for samples that mix.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcurv import ops
from fxcurv.capture import Inputs, Output
from fxcurv.program import Job
from fxcurv.quantities import Quantity
from fxcurv.shapes import Samples
from fxcurv.spec import module_of
from passes import lowered
from passes.rewrite import copied
from passes.uses import parameter_uses, used

__all__ = ["static_statuses"]

Statuses = dict[str, dict[str, str]]


def static_statuses(
    model: nn.Module, inputs: Inputs, output: Output, quantities: Mapping[str, Quantity]
) -> tuple[Statuses, fx.GraphModule]:
    """Quantity -> parameter -> status, and the graph that they are read off."""
    on_meta: Any = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), inputs)
    gm = _assumed_apart(lowered(_without_memory(model), on_meta, output)["folded"])
    parameters = dict(model.named_parameters())
    uses = parameter_uses(gm, [name for name, p in parameters.items() if p.requires_grad])

    def status(name: str, quantity: Quantity) -> str:
        if name not in uses:
            return "unreached" if parameters[name].requires_grad else "frozen"
        return Job("", quantity, used(name, uses), (name,), {}).status

    return {key: {name: status(name, quantity) for name in parameters} for key, quantity in quantities.items()}, gm


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy of the modules whose tensors have shapes and types, but no entries."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(t): _on_meta(t) for t in tensors}
    return copy.deepcopy(model, memo)


def _on_meta(t: Tensor) -> Tensor:
    bare = torch.empty_like(t, device="meta")
    return nn.Parameter(bare, t.requires_grad) if isinstance(t, nn.Parameter) else bare


def _assumed_apart(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with the samples of whatever depends on the input along one axis, the first where nothing says else."""
    gm = copied(gm)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.meta["samples"] = Samples(0)
        elif node.op == "call_module":
            op = module_of(node)
            axis = op.axis if isinstance(op, ops.Repeat | ops.Blank) else 0
            shared = all(x.meta["samples"] is None for x in node.all_input_nodes)
            node.meta["samples"] = None if shared else Samples(axis)
    return gm
