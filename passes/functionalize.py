"""functionalize: every in-place op `op_(x)` becomes `op(x)`, and what reads x afterwards reads the new value.

Which names share memory is read off the traced tensors themselves, so nothing is assumed about which operators
return views. A write through a view is replayed: the new value is put back into what the view was taken of, and other
views that are read later are taken again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxcurv.errors import CaptureError

__all__ = ["described", "functionalize", "packet_of"]


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
    node.target = _out_of_place(node)
    _evaluate(node)
    root = _put_back(target, node)
    for alias in aliases:
        if any(user in later for user in alias.users):
            current = node if _same_entries(alias, target) else _taken_again(alias, root)
            alias.replace_all_uses_with(current, delete_user_cb=later.__contains__)


def _put_back(view: fx.Node, value: fx.Node) -> fx.Node:
    """The tensor that `view` was taken of, directly or not, with `value` in its place."""
    while (parent := _parent(view)) is not None:
        value = _scattered(view, parent, value)
        view = parent
    return value


def _taken_again(view: fx.Node, root: fx.Node) -> fx.Node:
    """The same view of the new root."""
    parent = _parent(view)
    if parent is None:
        return root
    return _emit(root, view.target, (_taken_again(parent, root), *view.args[1:]), view.kwargs, view)


def _parent(view: fx.Node) -> fx.Node | None:
    """What a view was taken of; None for a tensor with memory of its own."""
    first = view.args[0] if view.args else None
    return first if isinstance(first, fx.Node) and _shares(first, view) else None


def _scattered(view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
    """`parent` with `value` where `view` shows it."""
    name, aten = packet_of(view), torch.ops.aten
    if _same_entries(view, parent):
        return value
    if name in ("slice", "select"):
        scatter = aten.slice_scatter.default if name == "slice" else aten.select_scatter.default
        return _emit(value, scatter, (parent, value, *view.args[1:]), view.kwargs, view)
    if name == "permute":
        dims = cast("list[int]", view.args[1])
        axes = [axis % len(dims) for axis in dims]
        inverse = sorted(range(len(axes)), key=axes.__getitem__)
        return _emit(value, view.target, (value, inverse), {}, view)
    if name in ("transpose", "t"):
        return _emit(value, view.target, (value, *view.args[1:]), view.kwargs, view)
    if name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"):
        return _emit(value, aten.view_as.default, (value, parent), {}, view)
    raise CaptureError(
        f"an in-place op writes through a view that {view.target} takes",
        node=described(view),
        remedy="write it out of place: x = op(x) instead of op_(x)",
    )


def _emit(after: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], like: fx.Node) -> fx.Node:
    """A call behind `after` that errors describe as they would describe `like`."""
    operands = {after, *(a for a in args if isinstance(a, fx.Node))}
    with after.graph.inserting_after([n for n in after.graph.nodes if n in operands][-1]):
        node = after.graph.call_function(target, args, dict(kwargs))
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    _evaluate(node)
    return node


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _evaluate(node: fx.Node) -> None:
    """Give the node the tensor that its operator returns for those of its arguments."""
    operator: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    node.meta["val"] = operator(*args, **kwargs)


def _shares(a: fx.Node, b: fx.Node) -> bool:
    """Whether b is, or holds, memory of a."""
    value = b.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(v, Tensor) and v.untyped_storage()._cdata == _memory(a) for v in values)


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
    module, _, buffer = sources[placeholder.name].rpartition(".")
    return CaptureError(
        f"the model updates its buffer {buffer}, as BatchNorm in training mode does, which couples the samples",
        node=f"'{module}'",
        remedy="call model.eval(), or keep state out of forward",
    )


def packet_of(node: fx.Node) -> str:
    """`conv2d` of aten.conv2d.default."""
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def described(node: fx.Node) -> str:
    """'layer1.0' aten.add_.Tensor: how errors name a captured node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return f"'{(stack[-1][0] if stack else '') or node.name}' {node.target}"
