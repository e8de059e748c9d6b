"""The table of lowerings: declaration and lookup of rows, and reading of ATen calls.

An operator without a row becomes `Pointwise` if it is an elementwise function of one tensor, otherwise `Opaque`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn

from fxcurv.core.errors import UnsupportedError, frames_of
from fxcurv.core.shapes import BatchSize, Shape, shape_of, size_of
from fxcurv.core.torch_compat import pytree, schema_of
from fxcurv.ir import calls
from passes.functionalize import described, packet_of

__all__ = [
    "FILLS",
    "PERMUTES",
    "RESHAPES",
    "Arguments",
    "Builder",
    "Slots",
    "arguments",
    "called",
    "first",
    "flexible",
    "generic",
    "lowering_of",
    "lowers",
    "order_of",
    "per_axis",
    "rank",
    "shape_at",
    "unary",
    "where",
]


Slots = dict[str, fx.Node | None]


Arguments = dict[str, Any]


class Builder(Protocol):
    """Interface to the canonical graph under construction, used by lowerings."""

    def emit(self, node: fx.Node, op: nn.Module, *args: fx.Node, slots: Slots | None = None) -> fx.Node: ...

    def value(self, argument: Any, user: fx.Node) -> fx.Node: ...

    def slot(self, argument: fx.Node | None) -> Tensor | None: ...

    def holdable(self, *arguments: fx.Node | None) -> bool: ...

    def depends(self, argument: Any) -> bool: ...

    def placeholders(self, argument: fx.Node) -> list[fx.Node]: ...

    def batch(self) -> fx.Node: ...


Lowering = Callable[[Builder, fx.Node, Arguments], fx.Node]


LOWERINGS: dict[str, Lowering] = {}


FILLS = ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")


RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as")


PERMUTES = ("permute", "transpose", "t", "movedim", "swapaxes", "T", "numpy_T", "mT")


MOVES = {*RESHAPES, *PERMUTES, "expand", "expand_as", "slice", "narrow", "select", "cat", "copy", "index"}
"""Operators that only move entries, and have the same lowering for every dtype."""


def lowers(*packets: str) -> Callable[[Lowering], Lowering]:
    """Declare a function as the lowering of the ATen operators `packets`."""

    def declare(lowering: Lowering) -> Lowering:
        for packet in packets:
            assert packet not in LOWERINGS, packet
            LOWERINGS[packet] = lowering
        return lowering

    return declare


def unary(packet: str, make: Callable[[Arguments], nn.Module]) -> None:
    """Declare the lowering of an operator of one tensor to a module, made from its other arguments."""
    lowers(packet)(lambda low, node, a: low.emit(node, make(a), low.value(first(a), node)))


def lowering_of(node: fx.Node) -> Lowering:
    """Return the row of an ATen call."""
    packet, dtype = packet_of(node), node.meta["val"].dtype
    operands = [n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if packet in FILLS or (packet in MOVES and set(operands) == {dtype}):
        return LOWERINGS[packet]
    if not dtype.is_floating_point or any(d.is_complex for d in operands):
        return generic(kind_of_call(node))
    return LOWERINGS.get(packet) or generic(calls.Pointwise if _is_pointwise(node) else calls.Opaque)


# Reading ATen calls -----------------------------------------------------------------------------------------------


def arguments(node: fx.Node) -> Arguments:
    """Return the arguments of an ATen call by name, with defaults."""
    schema = schema_of(node.target)
    if schema is None:
        raise UnsupportedError(
            f"{node.target} is not an operator",
            node=where(node),
            remedy="remove such calls from forward",
            code="FXC203",
            location=frames_of(node),
        )
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    return {a.name: _plain(given.get(a.name, node.kwargs.get(a.name, a.default_value))) for a in schema.arguments}


def _plain(argument: Any) -> Any:
    """Convert the lists of a graph to Python lists, as arguments of modules."""
    return [_plain(a) for a in cast("list[Any]", argument)] if isinstance(argument, list) else argument


def where(node: fx.Node) -> str:
    """Describe an ATen node in an error: 'layer1.0' aten.add.Tensor at file.py:7 in forward."""
    location = frames_of(node)
    return described(node) + (f" at {location[0]}" if location else "")


def first(a: Arguments) -> Any:
    return next(iter(a.values()))


def per_axis(value: Sequence[int] | int, kernel: Sequence[int]) -> tuple[int, ...]:
    """Return one number per spatial axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values


def rank(node: Any) -> int:
    return node.meta["val"].ndim


def shape_at(argument: Any, user: fx.Node) -> Shape:
    return shape_of(argument.meta["val"], where(user), frames_of(user))


def kind_of_call(node: fx.Node) -> type[calls.Call]:
    """Return the kind of call for any operator, by the dtype of its entries."""
    dtype = node.meta["val"].dtype
    return calls.Opaque if dtype.is_floating_point or dtype.is_complex else calls.Discrete


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and len(node.all_input_nodes) == 1


def generic(kind: type[calls.Call]) -> Lowering:
    """Lower an operator to itself, called on its tensors; or to one of the tensors that it returns."""

    def lowering(low: Builder, node: fx.Node, a: Arguments) -> fx.Node:
        if node.target is not operator.getitem:
            return low.emit(node, *called(kind, low, node))
        whole, index = node.args
        assert isinstance(whole, fx.Node)
        assert isinstance(index, int)
        op, *inputs = called(kind, low, whole)
        op.part = index
        return low.emit(node, op, *inputs)

    return lowering


def called(kind: type[calls.Call], low: Builder, node: fx.Node) -> tuple[calls.Call, *tuple[fx.Node, ...]]:
    """Return the call as a module, and the nodes of its tensors."""
    inputs: list[fx.Node] = []

    sized = False

    def take(argument: fx.Node) -> Any:
        nonlocal sized
        value = argument.meta.get("val")
        if isinstance(value, Tensor):
            inputs.append(low.value(argument, node))
            return calls.INPUT
        sized = True
        return calls.Size(_multiple(value, node))

    function: Any = node.target
    args: Any = [_plain(a) for a in fx.map_arg(node.args, take)]
    kwargs: Any = {key: _plain(a) for key, a in fx.map_arg(node.kwargs, take).items()}
    if sized and not _sizes_alone(node):
        raise UnsupportedError(
            "the op computes with the batch size",
            node=where(node),
            remedy="make every value independent of the number of samples",
            code="FXC208",
            location=frames_of(node),
        )
    return kind(function, args, kwargs, sized), *inputs, *([low.batch()] if sized else [])


def _multiple(value: Any, node: fx.Node) -> int:
    size = size_of(value, where(node), frames_of(node)) if isinstance(value, torch.SymInt) else None
    if not isinstance(size, BatchSize):
        raise UnsupportedError(
            "an argument depends on the batch size",
            node=where(node),
            remedy="write it with -1 or another op",
            code="FXC204",
            location=frames_of(node),
        )
    return size.multiple


def _sizes_alone(node: fx.Node) -> bool:
    """Whether every argument that depends on the batch size is a size rather than a value."""
    types = {a.name: str(a.type) for a in schema_of(node.target).arguments}
    given = {**dict(zip(types, node.args, strict=False)), **node.kwargs}
    symbolic = [name for name, value in given.items() if any(_is_size(leaf) for leaf in pytree.tree_leaves(value))]
    return packet_of(node) == "arange" or all("int" in types[name].lower() for name in symbolic)


def _is_size(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and not isinstance(argument.meta.get("val"), Tensor)


def flexible(shape: Shape) -> list[int]:
    """Return the shape for any batch size."""
    return [size if isinstance(size, int) else -1 for size in shape]


def order_of(node: fx.Node) -> list[int]:
    """Return the new order of the axes that a node permutes."""
    axes = torch.empty(tuple(range(1, 1 + rank(node))), device="meta")  # a distinct size for every axis
    operator: Any = node.target
    return [size - 1 for size in operator(axes, *node.args[1:], **node.kwargs).shape]
