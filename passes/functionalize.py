"""functionalize: every in-place op `op_(x)` becomes `op(x)`, and what reads x afterwards reads the new value.

Which names share memory is read off the traced tensors themselves, so nothing is assumed about which operators return
views. A write through a view whose other names are read afterwards is refused: it would need the write to be replayed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import CaptureError

__all__ = ["functionalize"]


def functionalize(gm: fx.GraphModule, sources: Mapping[str, str]) -> fx.GraphModule:
    """The captured graph without in-place ops and dead code; `sources` names the placeholders that are no inputs."""
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph), class_name="Captured")
    for node in [n for n in gm.graph.nodes if _is_inplace(n)]:
        _replace(node, sources)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _replace(node: fx.Node, sources: Mapping[str, str]) -> None:
    target = node.args[0]
    assert isinstance(target, fx.Node)
    if node.target is torch.ops.aten.detach_.default:  # changes no entries
        node.target = torch.ops.aten.detach.default
        return
    later = set(_after(node))
    aliases = [n for n in node.graph.nodes if n not in later and n is not node and _memory(n) == _memory(target)]
    for alias in aliases:
        if alias.op == "placeholder":
            raise _overwrites(alias, sources)
        if not _same_entries(alias, target) and any(user in later for user in alias.users):
            raise CaptureError(
                "an in-place op writes through a view that is read afterwards",
                node=described(node),
                remedy="write it out of place: x = op(x) instead of op_(x)",
            )
    node.target = _out_of_place(node)
    for alias in aliases:
        if _same_entries(alias, target):
            alias.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _memory(node: fx.Node) -> int | None:
    """Which memory the node's tensor occupies: equal for names that share it."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _same_entries(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors that share memory are one tensor under two names."""
    x, y = a.meta["val"], b.meta["val"]
    return (x.shape, x.stride(), x.storage_offset(), x.dtype) == (y.shape, y.stride(), y.storage_offset(), y.dtype)


def _is_inplace(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _out_of_place(node: fx.Node) -> Any:
    """The operator that returns what an in-place operator writes."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target.overloadpacket.__name__
    packet = getattr(torch.ops.aten, name.rstrip("_"), None) if name.endswith("_") else None
    functional = getattr(packet, node.target._overloadname, None)
    if functional is None or functional._schema.is_mutable:
        raise CaptureError(
            f"{node.target} changes a tensor in place", node=described(node), remedy="write it out of place"
        )
    return functional


def _overwrites(placeholder: fx.Node, sources: Mapping[str, str]) -> CaptureError:
    if placeholder.name not in sources:
        return CaptureError(
            "the model overwrites its input in place",
            node=f"'{placeholder.name}'",
            remedy="give the first op inplace=False, or clone the input in forward",
        )
    return CaptureError(
        "the model updates this buffer, as BatchNorm in training mode does, which couples the samples of a batch",
        node=f"'{sources[placeholder.name]}'",
        remedy="call model.eval(), or keep state out of forward",
    )


def described(node: fx.Node) -> str:
    """'layer1.0' aten.add_.Tensor: how errors name a captured node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return f"'{(stack[-1][0] if stack else '') or node.name}' {node.target}"
