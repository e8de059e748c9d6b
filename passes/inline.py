"""inline: replace `torch.no_grad()` and disabled `torch.autocast()` blocks by their bodies, and hooks by identities.

The results of a block without gradients are detached. Other calls with a subgraph (`torch.cond`) are refused. A tensor
with a hook is read through an identity whose gradient is the hook's, by all its users. Hooks that leave random
gradients as they are only observe, and are dropped.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.core.errors import CaptureError, frames_of
from fxcurv.core.shapes import resolve, shape_of
from fxcurv.core.torch_compat import HIGHER_ORDER, schema_of
from fxcurv.frontend.custom_gradients import refusal
from fxcurv.ir import custom_gradients as custom_gradients  # registers the operators

__all__ = ["inline"]


def inline(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the captured graph with ATen calls and custom gradients alone."""
    gm = _flat(gm)
    for node in [n for n in gm.graph.nodes if n.target is HOOK]:
        _hook(node)
    for node in [n for n in gm.graph.nodes if n.target is CUSTOM]:
        if _observes(node):
            _drop(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _flat(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with the bodies of its blocks in their place."""
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph), class_name="Captured")
    for node in [n for n in gm.graph.nodes if isinstance(n.target, HIGHER_ORDER)]:
        for position, value in enumerate(_copied(node, *_block(gm, node))):
            for user in [user for user in node.users if user.args[1] == position]:
                user.replace_all_uses_with(value)
                gm.graph.erase_node(user)
        gm.graph.erase_node(node)
    return gm


CUSTOM, HOOK = torch.ops.fxcurv.custom_gradient.default, torch.ops.fxcurv.gradient_hook.default


def _hook(mark: fx.Node) -> None:
    """Replace the mark of a tensor's hook: all users read the tensor through the hook, the first hook last."""
    given: Any = mark.args
    x, held, key = given
    while (before := _hooked_tensor(x)) is not None:
        x = before
    tensors: list[fx.Node] = [*held, x]
    graph, later = mark.graph, set(_after(mark))
    early = set(tensors) <= set(_until(x))
    with graph.inserting_after(x) if early else graph.inserting_before(mark):
        call = graph.call_function(CUSTOM, (tensors, key))
    with graph.inserting_after(call):
        hooked = graph.call_function(operator.getitem, (call, 0))
    shared = {name: mark.meta[name] for name in ("stack_trace", "nn_module_stack", "custom_call") if name in mark.meta}
    call.meta, hooked.meta = {**shared, "on_tensor": True}, dict(shared)
    call.meta["val"] = CUSTOM([t.meta["val"] for t in tensors], key)
    hooked.meta["val"] = call.meta["val"][0]
    others = [user for user in x.users if user not in later and user not in (call, mark)]
    if not early and (given[0] is not x or any(map(_differentiable, others))):
        why = "it reads a tensor that is computed after other uses of the hooked tensor"
        raise refusal(shared["custom_call"].name, why, frames_of(mark), f"'{x.name}'")
    graph.erase_node(mark)
    x.replace_all_uses_with(hooked, delete_user_cb=lambda user: user is not call and (early or user in later))


def _drop(node: fx.Node) -> None:
    """Drop a node that is the identity."""
    given: Any = node.args[0]
    tensors = [x for x, own in zip(given, node.meta["custom_call"].direct, strict=True) if own]
    for user in list(node.users):
        index: Any = user.args[1]
        user.replace_all_uses_with(tensors[index])
        node.graph.erase_node(user)


def _hooked_tensor(x: Any) -> fx.Node | None:
    """Return the tensor of which x is the identity with a hook."""
    call = x.args[0] if x.target is operator.getitem else None
    return call.args[0][-1] if call is not None and call.meta.get("on_tensor") else None


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _until(node: fx.Node) -> Iterator[fx.Node]:
    while node.op != "root":
        yield node
        node = node.prev


def _differentiable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    floating = not isinstance(value, Tensor) or value.is_floating_point()
    return floating and node.target is not torch.ops.aten.detach.default


def _observes(node: fx.Node) -> bool:
    """Whether a node is the identity of hooks that change no gradient."""
    call = node.meta["custom_call"]
    if call.hook is None:
        return False
    given: Any = node.args[0]
    values: list[Tensor] = [x.meta["val"] for x in given]
    generator = torch.Generator(values[0].device).manual_seed(0)

    def random(value: Tensor) -> Tensor:
        shape = resolve(shape_of(value, node.name), 3)
        if not value.is_floating_point():
            return torch.zeros(shape, dtype=value.dtype, device=value.device)
        return torch.randn(shape, dtype=value.dtype, device=value.device, generator=generator)

    def draw(scale: float) -> tuple[list[Tensor], list[Tensor]]:
        drawn = [(direct, random(value)) for direct, value in zip(call.direct, values, strict=True)]
        return [scale * t for direct, t in drawn if direct], [t for direct, t in drawn if not direct]

    with torch.no_grad():
        return call.hook.observes(draw)


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
    return _flat(gm.get_submodule(str(body.target))), args[behind + 1 :], bool(enabled)  # pyright: ignore[reportArgumentType]


def _copied(node: fx.Node, body: fx.GraphModule, args: Sequence[Any], enabled: bool) -> list[Any]:
    """Copy the body's nodes before `node`; return the body's results."""
    values: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), args, strict=True))
    outside = set(values)
    with node.graph.inserting_before(node):
        for n in (n for n in body.graph.nodes if n.op == "call_function"):
            schema = schema_of(n.target)  # None for an entry of several results
            if (
                n.target is not HOOK
                and not enabled
                and schema is not None
                and schema.is_mutable
                and n.args[0] in outside
            ):
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
