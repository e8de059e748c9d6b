"""What is legal at each stage: an executable grammar, checked before and after every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx, nn

from fxcurv import pullback, rules
from fxcurv.contractions import Statistic
from fxcurv.errors import SpecError, frames_of
from fxcurv.shapes import show_shape

__all__ = ["Source", "Stage", "describe", "inputs_of", "module_of", "output_of", "verify"]

Stage = Literal["captured", "lowered", "canonical", "forward", "backward"]


# Nodes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a slot's tensor comes from: a tensor by name, or an expression of several; `constants` are no model's."""

    names: tuple[str, ...]
    expression: fx.GraphModule | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor, from the model's tensors as they are now."""
        values = [self.constants[name] if name in self.constants else tensors[name] for name in self.names]
        return values[0] if self.expression is None else self.expression(*values)


def module_of(node: fx.Node) -> nn.Module:
    """The module that a call_module node calls."""
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(str(node.target))


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node is called on, in order, as often as it is."""
    return [x for x in node.args if isinstance(x, fx.Node)]


def describe(node: fx.Node) -> str:
    """'layer1.0.relu' ReLU [N, 64, 8, 8]: how errors name a node."""
    name = node.target if node.op == "call_module" else node.name
    kind = type(module_of(node)).__name__ if node.op == "call_module" else node.op
    shape = f" {show_shape(node.meta['shape'])}" if "shape" in node.meta else ""
    return f"'{name}' {kind}{shape}"


# The grammar ------------------------------------------------------------------------------------------------------


def _functional_aten(node: fx.Node) -> str | None:
    schema = getattr(node.target, "_schema", None)
    return "an in-place operator" if schema is not None and schema.is_mutable else None


def _vocabulary(node: fx.Node) -> str | None:
    op = module_of(node)
    if type(op) not in rules.RULES:
        return f"module type {type(op).__name__} has no rule"
    if node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
        return "arguments other than nodes"
    return None if "shape" in node.meta and "dtype" in node.meta else "no shape or dtype"


def _located(node: fx.Node) -> str | None:
    return _vocabulary(node) or (None if "samples" in node.meta else "unknown where the samples are")


def _augmentation(node: fx.Node) -> str | None:
    op = module_of(node)
    if isinstance(op, pullback.Keep | pullback.InputPositions | pullback.Selected) or (
        isinstance(op, Statistic) and op.reads == "x"
    ):
        return None
    return _located(node)


def _backward(node: fx.Node) -> str | None:
    op = module_of(node)
    kinds = (pullback.Pull, pullback.PullInputs, pullback.Part, pullback.PullScaled, pullback.PullToParameter)
    kinds += (pullback.Unbroadcast, pullback.Apart, pullback.Accumulate, pullback.Joined)
    kinds += (pullback.InputPositions, pullback.OutputPositions, pullback.ParameterPositions, pullback.Rotate)
    if isinstance(op, kinds) or (isinstance(op, Statistic) and op.reads != "x"):
        return None
    return f"module type {type(op).__name__} does not belong here"


_GRAMMAR: dict[Stage, tuple[str, Callable[[fx.Node], str | None]]] = {
    "captured": ("call_function", _functional_aten),
    "lowered": ("call_module", _vocabulary),
    "canonical": ("call_module", _located),
    "forward": ("call_module", _augmentation),
    "backward": ("call_module", _backward),
}


def verify(gm: fx.GraphModule, stage: Stage) -> fx.GraphModule:
    """The graph itself if it is a sentence of its stage's grammar, else a SpecError that names the node and the law."""
    opcode, law = _GRAMMAR[stage]
    gm.graph.lint()
    for node in gm.graph.nodes:
        broken = law(node) if node.op == opcode else _frame(node, opcode)
        if broken:
            raise SpecError(
                f"not legal in a {stage} graph: {broken}",
                node=f"'{node.name}' {node.op} {node.target}",
                code="FXC901",
                location=frames_of(node),
            )
    return gm


def _frame(node: fx.Node, opcode: str) -> str | None:
    if node.op not in ("placeholder", "output"):
        return f"{node.op}, where only {opcode} may compute"
    return None


def output_of(canonical: fx.GraphModule) -> fx.Node:
    """The node that a canonical graph returns."""
    (output,) = canonical.graph.output_node().all_input_nodes
    return output
