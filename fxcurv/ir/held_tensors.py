"""Functions that hold tensors, in their closure or default arguments, as functions of these tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import CellType, FunctionType
from typing import Any

from torch import Tensor

from fxcurv.core.torch_compat import pytree
from fxcurv.ir.calls import INPUT

__all__ = ["Held", "held", "title_of"]


class Held:
    """A function without the tensors that it holds: `rebound` returns it with others in their place, in order.

    The tensors of a trace are inputs of its graph, and the function is called with their values in a run.
    """

    def __init__(self, function: Any, leaves: Sequence[Any], spec: Any) -> None:
        self.leaves, self.spec = [INPUT if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        self.title = title_of(function)
        self.partial: Any = function.func if isinstance(function, functools.partial) else None
        if isinstance(function, FunctionType):
            self.code, self.globals, self.kwdefaults = function.__code__, function.__globals__, function.__kwdefaults__

    def rebound(self, tensors: Sequence[Tensor]) -> Any:
        """Return the function that holds these tensors."""
        given = iter(tensors)
        filled = [next(given) if leaf is INPUT else leaf for leaf in self.leaves]
        cells, defaults = pytree.tree_unflatten(filled, self.spec)
        if self.partial is not None:
            return functools.partial(self.partial, *cells, **defaults)
        closure = tuple(value if isinstance(value, CellType) else CellType(value) for value in cells)
        new = FunctionType(self.code, self.globals, self.code.co_name, defaults or None, closure)
        new.__kwdefaults__ = self.kwdefaults
        return new


def held(function: Any) -> tuple[Any, list[Tensor]]:
    """Return a function as `Held`, and the tensors that it holds; or itself and no tensors."""
    if isinstance(function, FunctionType):
        cells = tuple(_contents(cell) for cell in function.__closure__ or ())
        parts = cells, function.__defaults__ or ()
    elif isinstance(function, functools.partial):
        parts = function.args, function.keywords
    else:
        return function, []
    leaves, spec = pytree.tree_flatten(parts)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return (Held(function, leaves, spec), tensors) if tensors else (function, [])


def title_of(function: Any) -> str:
    """Return the name of a function in errors."""
    if isinstance(function, Held):
        return function.title
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__).replace("<locals>.", "")


def _contents(cell: CellType) -> Any:
    """The value of a cell, if it is or contains a tensor; otherwise the cell itself, which is shared."""
    try:
        value = cell.cell_contents
    except ValueError:
        return cell
    return value if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)) else cell
