"""inline: replace `torch.no_grad()` and disabled `torch.autocast()` blocks by their bodies.

The results of a block without gradients are detached. Other calls with a subgraph (`torch.cond`) are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxcurv.core.errors import CaptureError, frames_of
from fxcurv.core.torch_compat import HIGHER_ORDER, schema_of

__all__ = ["inline"]


def inline(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the captured graph with ATen calls alone."""
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph), class_name="Captured")
    for node in [n for n in gm.graph.nodes if isinstance(n.target, HIGHER_ORDER)]:
        for position, value in enumerate(_copied(node, *_block(gm, node))):
            for user in [user for user in node.users if user.args[1] == position]:
                user.replace_all_uses_with(value)
                gm.graph.erase_node(user)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _block(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, Sequence[Any], bool]:
    """Return the body of a block, its arguments, and whether gradients pass."""
    name, args = str(node.target), node.args
    enabled, behind = (args[0], 1) if name == "wrap_with_set_grad_enabled" else (True, 4)
    if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast") or (behind == 4 and args[2]):
        raise CaptureError(
            f"a block with a subgraph ({name})",
            node=f"'{node.name}'",
            remedy="use torch.where instead of torch.cond, and no autocast inside of forward",
            code="FXC104",
            location=frames_of(node),
        )
    body = args[behind]
    assert isinstance(body, fx.Node)
    return inline(gm.get_submodule(str(body.target))), args[behind + 1 :], bool(enabled)  # pyright: ignore[reportArgumentType]


def _copied(node: fx.Node, body: fx.GraphModule, args: Sequence[Any], enabled: bool) -> list[Any]:
    """Copy the body's nodes before `node`; return the body's results."""
    values: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), args, strict=True))
    outside = set(values)
    with node.graph.inserting_before(node):
        for n in (n for n in body.graph.nodes if n.op == "call_function"):
            schema = schema_of(n.target)  # None for an entry of several results
            if not enabled and schema is not None and schema.is_mutable and n.args[0] in outside:
                raise CaptureError(
                    "an in-place op in a block without gradients changes a tensor from outside the block",
                    node=f"'{n.name}'",
                    remedy="write it out of place: x = op(x) instead of op_(x)",
                    code="FXC202",
                    location=frames_of(n),
                )
            values[n] = node.graph.node_copy(n, values.__getitem__)
        returned: Any = body.graph.output_node().args[0]
        outputs = [values[n] for n in returned]
        return outputs if enabled else [_detached(value) for value in outputs]


def _detached(node: fx.Node) -> fx.Node:
    detached = node.graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached
