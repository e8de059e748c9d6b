"""recognize_idioms: idiom recognition replaces activations written as formulas by their modules, which have kernels.

Several steps, each with a saved slope and a product in the pullback, become one. Results are equal up to rounding.
"""

from __future__ import annotations

import math

import torch
from torch import fx, nn

from fxcurv.core.identity import structure_of
from fxcurv.ir import calls, ops
from fxcurv.ir.nodes import inputs_of, module_of
from fxcurv.ir.rewriting import Rewrite, instead, rewrites

__all__ = ["recognize"]


def recognize(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with x · sigmoid(x) as SiLU, and GELU by tanh as GELU."""
    return rewrites(gm, *RECOGNIZED)


def silu(node: fx.Node, op: nn.Module) -> fx.Node | None:
    """Replace x · sigmoid(x) by SiLU(x)."""
    if isinstance(op, ops.Mul):
        for x, gate in _either_way(node):
            if _behind(gate, nn.Sigmoid()) is x:
                return instead(node, nn.SiLU().eval(), (x,))
    return None


def gelu(node: fx.Node, op: nn.Module) -> fx.Node | None:
    """Replace ½x · (1 + tanh(√(2/π) (x + 0.044715 x³))) by GELU(x) in its tanh approximation."""
    if isinstance(op, ops.Mul):
        for half, gate in _either_way(node):
            x, inner = _behind(half, ops.Scale(0.5)), _behind(gate, ops.Shift(1.0), nn.Tanh(), ops.Scale(SLOPE))
            if x is not None and inner is not None and _is_cubic(inner, x):
                return instead(node, nn.GELU("tanh").eval(), (x,))
    return None


RECOGNIZED: tuple[Rewrite, ...] = (silu, gelu)


SLOPE = math.sqrt(2 / math.pi)


def _is_cubic(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is x + 0.044715 x³."""
    op = module_of(node) if node.op == "call_module" else None
    if not isinstance(op, ops.Add) or op.alpha != 1 or x not in inputs_of(node):
        return False
    cubes = (_behind(term, ops.Scale(0.044715)) for term in inputs_of(node))
    return any(cube is not None and _is_cube(cube, x) for cube in cubes)


def _is_cube(node: fx.Node, x: fx.Node) -> bool:
    op = module_of(node) if node.op == "call_module" else None
    if not isinstance(op, calls.Pointwise) or op.function is not torch.ops.aten.pow.Tensor_Scalar:
        return False
    return op.args == (calls.INPUT, 3) and inputs_of(node) == [x]


def _either_way(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Return the two inputs of a node, in both orders."""
    a, b = inputs_of(node)
    return [(a, b), (b, a)]


def _behind(node: fx.Node, *chain: nn.Module) -> fx.Node | None:
    """Return the argument of a chain of ops, the last of them first, if the node is its result."""
    for expected in chain:
        op = module_of(node) if node.op == "call_module" else None
        if op is None or structure_of(op) != structure_of(expected):
            return None
        (node,) = inputs_of(node)
    return node
