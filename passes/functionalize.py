"""functionalize: every in-place op `op_(x)` becomes `op(x)`, and later reads of x read the new value.

Shared memory is detected from the traced tensors themselves, without assumptions on the operators that return views.
A write through a view is replayed: the new value is scattered into the view's base, and views that are read later
are recreated.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxcurv.core.errors import CaptureError, FxcurvError, Location, frames_of
from fxcurv.core.shapes import shape_of, show_shape
from fxcurv.core.torch_compat import overload_name, schema_of, storage_id

__all__ = ["described", "functionalize", "packet_of"]


DIM_PLACES = {"unbind": 1, "chunk": 2, "split": 2, "split_with_sizes": 2, "tensor_split": 2}
"""ATen operators that return several views, and the argument that gives the axis."""


def functionalize(gm: fx.GraphModule, sources: Mapping[str, str]) -> fx.GraphModule:
    """Return the captured graph without in-place ops and dead code; `sources` names placeholders other than inputs."""
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph), class_name="Captured")
    written = {_memory(n.args[0]) for n in gm.graph.nodes if _is_inplace(n)}
    for node in [n for n in gm.graph.nodes if n.target is operator.getitem and _memory(n) in written]:
        _name_part(node)
    for node in [n for n in gm.graph.nodes if _is_inplace(n)]:
        _replace(node, sources)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _name_part(node: fx.Node) -> None:
    """Turn one of the views that chunk, split or unbind return into a view of its own: a slice or a selection."""
    whole, index = node.args
    assert isinstance(whole, fx.Node)
    assert isinstance(index, int)
    source, parts = whole.args[0], whole.meta["val"]
    if not isinstance(source, fx.Node) or not _shares(source, whole):
        return
    if packet_of(whole) not in DIM_PLACES:
        raise _unknown_view(whole)
    place = DIM_PLACES[packet_of(whole)]
    dim: Any = whole.args[place] if len(whole.args) > place else whole.kwargs.get("dim", 0)
    if packet_of(whole) == "unbind":
        node.target, node.args = torch.ops.aten.select.int, (source, dim, index % len(parts))
    else:
        start = sum(part.shape[dim] for part in parts[:index])
        stop = start + parts[index].shape[dim]
        node.target, node.args = torch.ops.aten.slice.Tensor, (source, dim, start, stop)
    _evaluate(node)


def _replace(node: fx.Node, sources: Mapping[str, str]) -> None:
    target = node.args[0]
    assert isinstance(target, fx.Node)
    if node.target is torch.ops.aten.detach_.default:  # changes no entries
        node.target = torch.ops.aten.detach.default
        return
    behind = list(_after(node))
    later, memory = set(behind), _memory(target)
    aliases = [n for n in node.graph.nodes if n not in later and n is not node and _memory(n) == memory]
    for alias in aliases:
        if alias.op == "placeholder":
            raise _overwrites(alias, sources, frames_of(node))
    node.target = _out_of_place(node)
    _evaluate(node)
    root = _put_back(target, node)
    names = [(alias, alias) for alias in aliases] + ([(node, target)] if root is not node else [])
    for name, view in names:
        if any(user in later for user in name.users):
            current = node if root is node and _same_entries(view, target) else _taken_again(view, root)
            name.replace_all_uses_with(current, delete_user_cb=later.__contains__)
    for view in behind:
        if memory in _memories(view):  # views of the written tensor become views of the new value
            _evaluate(view)


def _put_back(view: fx.Node, value: fx.Node) -> fx.Node:
    """Return the tensor of which `view` is, directly or not, a view, with `value` in its place."""
    while (parent := _parent(view)) is not None:
        value = _scattered(view, parent, value)
        view = parent
    return value


def _taken_again(view: fx.Node, root: fx.Node) -> fx.Node:
    """Recreate the view on the new root."""
    parent = _parent(view)
    if parent is None:
        return root
    return _emit(root, view.target, (_taken_again(parent, root), *view.args[1:]), view.kwargs, view)


def _parent(view: fx.Node) -> fx.Node | None:
    """Return the base of a view; None for a tensor with memory of its own."""
    first = view.args[0] if view.args else None
    return first if isinstance(first, fx.Node) and _shares(first, view) else None


def _scattered(view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
    """Return `parent` with `value` scattered into the entries of `view`."""
    name, aten = packet_of(view), torch.ops.aten
    if name == "detach":  # autograd's result for such a write is not the derivative
        raise _unknown_view(view)
    if _same_entries(view, parent):
        return value
    if name in ("slice", "select"):
        scatter = aten.slice_scatter.default if name == "slice" else aten.select_scatter.default
        return _emit(value, scatter, (parent, value, *view.args[1:]), view.kwargs, view)
    if name == "narrow":
        dim, start, length = cast("tuple[int, int, int]", view.args[1:4])
        start %= parent.meta["val"].shape[dim]
        return _emit(value, aten.slice_scatter.default, (parent, value, dim, start, start + length), {}, view)
    if name == "diagonal":
        return _emit(value, aten.diagonal_scatter.default, (parent, value, *view.args[1:]), view.kwargs, view)
    if name in ("transpose", "t"):
        return _emit(value, view.target, (value, *view.args[1:]), view.kwargs, view)
    if name == "permute":
        dims: Any = view.args[1]
        inverse = sorted(range(len(dims)), key=lambda axis: dims[axis] % len(dims))
        return _emit(value, view.target, (value, inverse), {}, view)
    if name in ("view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"):
        return _emit(value, aten.view_as.default, (value, parent), {}, view)
    raise _unknown_view(view)


def _unknown_view(view: fx.Node) -> CaptureError:
    return CaptureError(
        f"an in-place op writes through a view by {view.target}",
        node=described(view),
        remedy="write it out of place: x = op(x) instead of op_(x)",
        code="FXC202",
        location=frames_of(view),
    )


def _emit(after: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], like: fx.Node) -> fx.Node:
    """Emit a call after `after` that errors describe as they would describe `like`."""
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
    """Evaluate the node's operator on the tensors of its arguments."""
    operator: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    node.meta["val"] = operator(*args, **kwargs)


def _shares(a: fx.Node, b: fx.Node) -> bool:
    """Whether b is, or contains, memory of a."""
    return _memory(a) in _memories(b)


def _memory(node: fx.Node) -> int | None:
    """Return an identifier of the memory of the node's tensor, equal for names that share it."""
    value = node.meta.get("val")
    return storage_id(value) if isinstance(value, Tensor) else None


def _memories(node: fx.Node) -> set[int]:
    """Return the memory of the node's tensor, or of each of several."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return {storage_id(v) for v in values if isinstance(v, Tensor)}


def _same_entries(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors that share memory are one tensor under two names."""
    x, y = a.meta["val"], b.meta["val"]
    return (x.shape, x.stride(), x.storage_offset(), x.dtype) == (y.shape, y.stride(), y.storage_offset(), y.dtype)


def _is_inplace(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    return schema is not None and schema.is_mutable


def _out_of_place(node: fx.Node) -> Any:
    """Return the out-of-place variant of an in-place operator."""
    operator: Any = node.target
    name = operator.overloadpacket.__name__
    plain = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")  # `__ior__` is `__or__`
    packet = getattr(torch.ops.aten, plain, None) if plain != name else None
    functional = getattr(packet, overload_name(node.target), None)
    if functional is None or schema_of(functional).is_mutable:
        raise CaptureError(
            f"{node.target} changes a tensor in place",
            node=described(node),
            remedy="write it out of place",
            code="FXC202",
            location=frames_of(node),
        )
    return functional


def _overwrites(placeholder: fx.Node, sources: Mapping[str, str], location: Location) -> CaptureError:
    if placeholder.name not in sources:
        return CaptureError(
            "the model overwrites its input in place",
            node=f"'{placeholder.name}'",
            remedy="give the first op inplace=False, or clone the input in forward",
            code="FXC201",
            location=location,
        )
    module, _, buffer = sources[placeholder.name].rpartition(".")
    return CaptureError(
        f"the model updates its buffer {buffer}, as BatchNorm in training mode does, which couples the samples",
        node=f"'{module}'",
        remedy="call model.eval(), or keep state out of forward",
        code="FXC402",
        location=location,
    )


def packet_of(node: fx.Node) -> str:
    """Return the packet's name: `conv2d` of aten.conv2d.default."""
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def described(node: fx.Node) -> str:
    """Describe a captured node in an error: 'layer1.0' aten.add_.Tensor [N, 8]."""
    stack, value = list(node.meta.get("nn_module_stack", {}).values()), node.meta.get("val")
    target = node.all_input_nodes[0].target if node.target is operator.getitem else node.target
    try:
        shape = f" {show_shape(shape_of(value, node.name))}" if isinstance(value, Tensor) else ""
    except FxcurvError:
        shape = ""  # of a size that is not a multiple of the batch size
    return f"'{(stack[-1][0] if stack else '') or node.name}' {target}{shape}"
