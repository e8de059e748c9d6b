"""The grammar of each stage, checked after every pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import fx

from fxcurv.contractions.statistic import Statistic
from fxcurv.core.errors import SpecError, frames_of
from fxcurv.core.torch_compat import schema_of
from fxcurv.ir import backward_ops as pullback
from fxcurv.ir import rules
from fxcurv.ir.nodes import module_of

__all__ = ["Stage", "verify"]


Stage = Literal["captured", "lowered", "canonical", "forward", "backward"]


# The grammar ------------------------------------------------------------------------------------------------------


def _functional_aten(node: fx.Node) -> str | None:
    schema = schema_of(node.target)
    return "an in-place operator" if schema is not None and schema.is_mutable else None


def _vocabulary(node: fx.Node) -> str | None:
    op = module_of(node)
    if type(op) not in rules.RULES:
        return f"module type {type(op).__name__} has no rule"
    if node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
        return "arguments other than nodes"
    return None if "shape" in node.meta and "dtype" in node.meta else "no shape or dtype"


def _located(node: fx.Node) -> str | None:
    return _vocabulary(node) or (None if "samples" in node.meta else "the sample axis is unknown")


def _augmentation(node: fx.Node) -> str | None:
    op = module_of(node)
    if isinstance(op, pullback.SaveForBackward | pullback.InputPositions | pullback.Gather) or (
        isinstance(op, Statistic) and op.reads == "x"
    ):
        return None
    return _located(node)


def _backward(node: fx.Node) -> str | None:
    op = module_of(node)
    kinds = (pullback.Pull, pullback.PullInputs, pullback.GetItem, pullback.PullScaled, pullback.PullToParameter)
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
    """Return the graph if it follows the grammar of its stage; else raise a SpecError with the node and the rule."""
    opcode, law = _GRAMMAR[stage]
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise SpecError(f"not well-formed: {error}", code="FXC901") from error
    for node in gm.graph.nodes:
        broken = law(node) if node.op == opcode else _frame(node, opcode)
        if broken:
            error = SpecError(
                f"not legal in a {stage} graph: {broken}",
                node=f"'{node.name}' {node.op} {node.target}",
                code="FXC901",
                location=frames_of(node),
            )
            error.add_note(neighbourhood(node))
            raise error
    return gm


def neighbourhood(node: fx.Node) -> str:
    """The lines of the graph around a node: its inputs, the marked node, and its users."""
    lines = [f"    {x.format_node()}" for x in dict.fromkeys(node.all_input_nodes)]
    lines.append(f"  > {node.format_node()}")
    return "\n".join((*lines, *(f"    {user.format_node()}" for user in node.users)))


def _frame(node: fx.Node, opcode: str) -> str | None:
    if node.op not in ("placeholder", "output"):
        return f"{node.op}, where only {opcode} may compute"
    return None
