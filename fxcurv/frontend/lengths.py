"""The batch size by `len(x)`: Python makes it a number, which would fix the graph to the traced batch size."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

__all__ = ["traced_lengths"]


@contextmanager
def traced_lengths(model: nn.Module) -> Generator[None]:
    """Let `len(x)` of a tensor be `x.shape[0]` in the code of the model's modules; restored at the end."""
    spaces = {id(space): space for space in map(_globals, _functions(model)) if "len" not in space}
    for space in spaces.values():
        space["len"] = _length
    try:
        yield
    finally:
        for space in spaces.values():
            space.pop("len", None)


def _length(value: Any, /) -> int:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else len(value)


def _globals(function: FunctionType) -> dict[str, Any]:
    return function.__globals__


def _functions(model: nn.Module) -> Iterator[FunctionType]:
    """Yield the functions of the modules, in classes and on instances, that name `len`."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    values = [value for kind in kinds if not kind.__module__.startswith("torch.") for value in vars(kind).values()]
    values += [value for module in model.modules() for value in vars(module).values()]
    for value in values:
        function = value.__func__ if isinstance(value, MethodType | staticmethod | classmethod) else value
        if isinstance(function, FunctionType) and "len" in _names(function.__code__):
            yield function


def _names(code: CodeType) -> set[str]:
    """Return the global names in a piece of code and in the functions inside it."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)
