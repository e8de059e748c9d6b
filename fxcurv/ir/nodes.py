"""Nodes of a graph: their modules, inputs and descriptions, and the sources of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from fxcurv.core.shapes import show_shape

__all__ = ["Source", "describe", "inputs_of", "module_of", "output_of"]


# Nodes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Source of a slot's tensor: a tensor by name, or an expression of several; the model does not own `constants`."""

    names: tuple[str, ...]
    expression: fx.GraphModule | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor, computed from the model's current tensors."""
        values = [self.constants[name] if name in self.constants else tensors[name] for name in self.names]
        return values[0] if self.expression is None else self.expression(*values)


def module_of(node: fx.Node) -> nn.Module:
    """The module that a call_module node calls."""
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(str(node.target))


def title_of(module: nn.Module) -> str:
    """Name of a module in tables: its type, or `Pull(ReLU)` if it applies a part of a rule."""
    return getattr(module, "title", type(module).__name__)


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The input nodes of a node, in order, with repetitions."""
    return [x for x in node.args if isinstance(x, fx.Node)]


def describe(node: fx.Node) -> str:
    """Name of a node in errors: 'layer1.0.relu' ReLU [N, 64, 8, 8]."""
    name = node.target if node.op == "call_module" else node.name
    kind = type(module_of(node)).__name__ if node.op == "call_module" else node.op
    shape = f" {show_shape(node.meta['shape'])}" if "shape" in node.meta else ""
    return f"'{name}' {kind}{shape}"


def output_of(canonical: fx.GraphModule) -> fx.Node:
    """The output node of a canonical graph."""
    (output,) = canonical.graph.output_node().all_input_nodes
    return output
