"""lower: functional ATen -> the all-module canonical graph, with nodes named after the modules of the model."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxcurv.core.errors import CaptureError, UnsupportedError, frames_of
from fxcurv.core.shapes import BatchSize, shape_of
from fxcurv.frontend.capture import Captured
from fxcurv.ir import ops
from fxcurv.ir.nodes import Source
from fxcurv.ir.rewriting import Targets
from passes import layers as layers  # registers its rows in the table
from passes import lowerings
from passes.functionalize import packet_of
from passes.lowering_table import Slots, arguments, lowering_of, where

__all__ = ["lower"]


READS = ("item", "_local_scalar_dense")
"""Operators that read a tensor as a number."""


def lower(captured: Captured, model: nn.Module) -> fx.GraphModule:
    """Return the canonical graph of a captured model; its modules hold the model's own live tensors."""
    low = _Lowering(captured, model)
    for node in captured.graph.graph.nodes:
        low.mark(node)
    for node in captured.graph.graph.nodes:
        low.visit(node)
    return fx.GraphModule(low.modules, low.graph, class_name="Canonical")


@dataclass
class _Lowering:
    """The graph under construction, and the lowered value of each ATen node.

    `live` nodes depend on an input or on a trainable parameter, `data` nodes on an input; all others are constants.
    """

    captured: Captured
    model: nn.Module
    graph: fx.Graph = field(default_factory=fx.Graph)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    targets: Targets = field(default_factory=Targets)
    live: set[fx.Node] = field(default_factory=set)
    data: set[fx.Node] = field(default_factory=set)
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = (self.model.named_parameters(remove_duplicate=False), self.model.named_buffers(remove_duplicate=False))
        self.tensors: dict[str, Tensor] = {**dict(named[0]), **dict(named[1])}
        self.trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}

    # The walks

    def mark(self, node: fx.Node) -> None:
        """Record the dependencies of an ATen node; its predecessors are recorded already."""
        if node.op == "placeholder":
            source = self.captured.sources.get(node.name)
            if source is None and isinstance(node.meta.get("val"), Tensor):  # else a number: a constant of the graph
                self.data.add(node)
            if node in self.data or source in self.trainable:
                self.live.add(node)
        elif node.op != "output" and any(n in self.live for n in node.all_input_nodes) and not _is_blank(node):
            self.live.add(node)
            if any(n in self.data and isinstance(n.meta.get("val"), Tensor | Sequence) for n in node.all_input_nodes):
                self.data.add(node)

    def visit(self, node: fx.Node) -> None:
        """Lower an ATen node, if it depends on an input or a trainable parameter."""
        if node.op == "output":
            self.graph.output(self.value(node.args[0], node))
        elif node.op == "placeholder":
            if node in self.data:
                self._input(node)
            elif node in self.live:
                _check_real(self.captured.sources[node.name], node)
        elif node in self.live and isinstance(node.meta.get("val"), Tensor):
            self.values[node] = self._lowered(node)  # otherwise a size or several tensors, lowered where read

    def _input(self, node: fx.Node) -> None:
        value = node.meta["val"]
        if shape_of(value, node.name)[0] != BatchSize():
            raise CaptureError(
                f"the model supports only the batch size {value.shape[0]}",
                node=f"'{node.name}'",
                remedy="use -1 or x.shape[0] where it reshapes",
                code="FXC106",
            )
        self.values[node] = _annotated(self.graph.placeholder(node.name), node)

    def _lowered(self, node: fx.Node) -> fx.Node:
        if node.target is operator.getitem:
            whole, part = node.args
            assert isinstance(whole, fx.Node)
            assert isinstance(part, int)
            return lowerings.part(self, node, whole, part)
        return lowering_of(node)(self, node, arguments(node))

    # Building blocks of lowerings

    def emit(self, node: fx.Node, op: nn.Module, *args: fx.Node, slots: Slots | None = None) -> fx.Node:
        """Call `op` on canonical nodes, named after the ATen node; `slots` are ATen nodes of the tensors it holds."""
        sources = {slot: self._source(n) for slot, n in (slots or {}).items() if n is not None}
        return self._call(node, _path(node, self.model, bool(sources)), op, args, sources)

    def value(self, argument: Any, user: fx.Node) -> fx.Node:
        """Return the canonical node of an ATen node: its lowered value, a parameter, or a constant."""
        if not isinstance(argument, fx.Node):
            raise UnsupportedError(
                f"{argument!r} is not a tensor",
                node=where(user),
                remedy="return a tensor that depends on the input",
                code="FXC207",
                location=frames_of(user),
            )
        if argument not in self.values:
            source = self._source(argument)
            tensor = source(self.tensors)
            held = source.expression is None and source.names[0] in self.trainable
            op = ops.Parameter(cast("nn.Parameter", tensor)) if held else ops.Constant(tensor.detach())
            path = source.names[0] if source.expression is None else argument.name
            self.values[argument] = self._call(argument, path, op, (), {"value": source})
        return self.values[argument]

    def batch(self) -> fx.Node:
        """Return an input, whose axis 0 is the batch."""
        return next(value for node, value in self.values.items() if node.op == "placeholder" and node in self.data)

    def depends(self, argument: Any) -> bool:
        """Whether an ATen node depends on an input."""
        return argument in self.data

    def holdable(self, *arguments: fx.Node | None) -> bool:
        """Whether an op can hold these tensors: parameters and constants, nothing computed from data or parameters."""
        return all(n is None or n.op == "placeholder" or n not in self.live for n in arguments)

    def placeholders(self, argument: fx.Node) -> list[fx.Node]:
        """Return all placeholders of a trainable parameter, given one of them; an empty list for any other node."""
        source, nodes = self.captured.sources.get(argument.name), self.captured.graph.graph.find_nodes(op="placeholder")
        return [n for n in nodes if source in self.trainable and self.captured.sources.get(n.name) == source]

    def slot(self, argument: fx.Node | None) -> Tensor | None:
        """Return the live tensor that an op holds: a parameter itself, or an expression of constants."""
        return None if argument is None else self._source(argument)(self.tensors)

    def _source(self, node: fx.Node) -> Source:
        """Return the source of a tensor that does not depend on an input."""
        if node.op == "placeholder":
            return Source((self.captured.sources[node.name],), constants=self.captured.constants)
        ancestors = _ancestors(node)
        live = [n for n in ancestors if n in self.live and n.op != "placeholder"]
        if any(packet_of(n) in READS for n in live):
            raise UnsupportedError(
                "a number is read from a tensor that depends on the input or a parameter",
                node=where(node),
                remedy="compute with the tensor itself, without .item(), float() or .tolist()",
                code="FXC211",
                location=frames_of(node),
            )
        if live:
            raise UnsupportedError(
                "a constant depends on the batch size",
                node=where(node),
                remedy="compute it from the input's values",
                code="FXC204",
                location=frames_of(node),
            )
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for n in (n for n in node.graph.nodes if n in ancestors):
            copies[n] = _blank(n, graph) if _is_blank(n) else graph.node_copy(n, copies.__getitem__)
        graph.output(copies[node])
        names = tuple(self.captured.sources[n.name] for n in copies if n.op == "placeholder")
        return Source(names, fx.GraphModule({}, graph), self.captured.constants)

    def _call(
        self, node: fx.Node, path: str, op: nn.Module, args: tuple[fx.Node, ...], sources: dict[str, Source]
    ) -> fx.Node:
        target = self.targets.free(path)
        self.modules[target] = op.eval()
        called = _annotated(self.graph.call_module(target, args), node)
        called.meta["slots"] = sources
        return called


def _check_real(name: str, node: fx.Node) -> None:
    if node.meta["val"].dtype.is_complex:
        raise UnsupportedError(
            f"parameter '{name}' is complex",
            node=f"'{node.name}'",
            remedy="store the real and imaginary parts: torch.view_as_complex(p) of a real p[…, 2]",
            code="FXC209",
        )


def _annotated(new: fx.Node, old: fx.Node) -> fx.Node:
    value = old.meta["val"]
    new.meta = {
        "shape": shape_of(value, where(old), frames_of(old)),
        "dtype": value.dtype,
        "stack": old.meta.get("stack_trace"),
        "slots": {},
    }
    return new


BLANKS = {"new_zeros": 0, "zeros_like": 0, "new_ones": 1, "ones_like": 1, "new_empty": 0, "empty_like": 0}
"""ATen operators that read the dtype and shape of a tensor but not its values, and their fill values."""


def _is_blank(node: fx.Node) -> bool:
    """Whether a node is a constant although it reads an input: a new tensor whose size is independent of the batch."""
    value = node.meta.get("val")
    return (
        packet_of(node) in BLANKS
        and isinstance(value, Tensor)
        and not any(isinstance(size, torch.SymInt) for size in value.shape)
    )


def _blank(node: fx.Node, graph: fx.Graph) -> fx.Node:
    """Return the same constant without arguments."""
    value = node.meta["val"]
    options = {"dtype": value.dtype, "device": value.device}
    return graph.call_function(torch.full, (tuple(value.shape), BLANKS[packet_of(node)]), options)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """Return the node and all its ancestors."""
    seen, stack = {node}, [node]
    while stack:
        last = stack.pop()
        new = [n for n in last.all_input_nodes if n not in seen and not _is_blank(last)]
        seen.update(new)
        stack.extend(new)
    return seen


def _part_name(node: fx.Node) -> str:
    """Return the name of one of several results."""
    call = node.all_input_nodes[0].meta.get("custom_call")
    return "slice" if call is None else "hook" if call.hook is not None else call.title


def _path(node: fx.Node, model: nn.Module, holds: bool) -> str:
    """Return a node's name: the path of the leaf module that is this op, or its module's path and the op's name."""
    name = _part_name(node) if node.target is operator.getitem else packet_of(node).strip("_")
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return f"{path}.{name}".lstrip(".")
    if not path or any(True for _ in module.children()):
        return f"{path}.{name}".lstrip(".")
    auxiliary = not holds and any(True for _ in module.parameters())
    return f"{path}_{name}" if auxiliary else path
