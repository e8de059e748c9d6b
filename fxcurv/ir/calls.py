"""Modules that call an operator without its own row: pointwise, opaque, or of integers and booleans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["Call", "Discrete", "Opaque", "Pointwise", "Size", "embedding_bags", "pick"]


class _Input:
    """Marks the arguments of an operator that are input tensors, in order."""

    def __repr__(self) -> str:
        return "INPUT"

    def __deepcopy__(self, memo: dict[int, Any]) -> _Input:
        return self


INPUT = _Input()


@dataclass(frozen=True)
class Size:
    """Marks an argument that is `multiple` times the batch size."""

    multiple: int


def _filled(argument: Any, tensors: Iterator[Tensor], batch: int) -> Any:
    """Replace every `INPUT` in the argument by the next tensor, and every `Size` by its number."""
    if isinstance(argument, list):
        return [_filled(a, tensors, batch) for a in cast("list[Any]", argument)]
    if isinstance(argument, Size):
        return argument.multiple * batch
    return next(tensors) if argument is INPUT else argument


class Call(nn.Module):
    """y = function(*args, **kwargs), with input tensors for each `INPUT`; or `part` of several results."""

    part: int | None = None

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], sized: bool = False
    ) -> None:
        super().__init__()
        self.function, self.args, self.kwargs, self.sized = function, tuple(args), dict(kwargs), sized

    def forward(self, *xs: Tensor) -> Tensor:
        tensors, batch = iter(xs), xs[-1].shape[0] if self.sized else 0
        args = [_filled(a, tensors, batch) for a in self.args]
        y = self.function(*args, **{k: _filled(a, tensors, batch) for k, a in self.kwargs.items()})
        return y if self.part is None else y[self.part]

    def extra_repr(self) -> str:
        arguments = ", ".join([*map(repr, self.args), *(f"{key}={value!r}" for key, value in self.kwargs.items())])
        return f"{self.function}({arguments}){'' if self.part is None else f'[{self.part}]'}"


class Pointwise(Call):
    """y = f(x) for an elementwise operator f of one tensor without its own row; f' is computed by autograd."""


class Opaque(Call):
    """y = f(x, …) for any other operator without parameters, pulled back by its vector-Jacobian product."""


class Discrete(Call):
    """y = f(x, …) where y holds integers or booleans; non-differentiable."""


def pick(x: Tensor, indices: Sequence[Tensor | int | None]) -> Tensor:
    """x[indices], where an integer k stands for 0, 1, … along the samples, followed by k axes of size one."""
    each = torch.arange(len(x), device=x.device)
    filled = [each.view(-1, *(1,) * index) if isinstance(index, int) else index for index in indices]
    return torch.ops.aten.index.Tensor(x, filled)


def embedding_bags(
    weight: Tensor, indices: Tensor, length: int, mode: int, weights: Tensor | None, padding: int | None
) -> Tensor:
    """Sum, mean or maximum (`mode` 0, 1, 2) of rows of `weight` over each bag of `length` consecutive `indices`."""
    offsets = torch.arange(0, len(indices), length, device=indices.device)
    bag = torch.ops.aten.embedding_bag.padding_idx
    return bag(weight, indices, offsets, False, mode, False, weights, False, padding)[0]
