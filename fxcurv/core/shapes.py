"""The shape language: sizes that are numbers or multiples of the batch size, and the axis of a tensor's samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcurv.core.errors import CaptureError, Location
from fxcurv.core.torch_compat import depends_on_values

__all__ = ["BatchSize", "BatchSizes", "Samples", "Shape", "resolve", "shape_of", "show_shape", "size_of"]


@dataclass(frozen=True)
class BatchSize:
    """A size of `multiple` · N."""

    multiple: int = 1

    def __str__(self) -> str:
        return "N" if self.multiple == 1 else f"{self.multiple}N"


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes for which a graph is valid: they satisfy every condition, one per branch of the model."""

    conditions: tuple[tuple[Any, str, int], ...] = ()

    def __contains__(self, size: int) -> bool:
        return all(self._holds(relation, size) for relation, _, _ in self.conditions)

    @staticmethod
    def _holds(relation: Any, size: int) -> bool:
        return bool(relation.subs(dict.fromkeys(relation.free_symbols, size)) == True)  # noqa: E712 (a SymPy truth value)


Shape = tuple[int | BatchSize | str, ...]
"""A shape; V denotes the number of columns."""


def shape_of(value: Tensor, node: str, location: Location = ()) -> Shape:
    """Return the shape of a traced tensor."""
    return tuple(size_of(size, node, location) for size in value.shape)


def size_of(size: int | torch.SymInt, node: str, location: Location = ()) -> int | BatchSize:
    """Return a traced size as a number or a multiple of the batch size."""
    if isinstance(size, int):
        return size
    expression: Any = size.node.expr
    symbols = expression.free_symbols
    if not symbols:
        return int(expression)
    if depends_on_values(size):
        raise CaptureError(
            "a size depends on the values of a tensor",
            node=node,
            remedy="keep all entries, and multiply by a mask or use torch.where",
            code="FXC212",
            location=location,
        )
    multiple = expression / next(iter(symbols)) if len(symbols) == 1 else None
    if multiple is None or not multiple.is_Integer:
        raise CaptureError(
            f"a size of {expression} is not a multiple of the batch size",
            node=node,
            remedy="keep the samples separate",
            code="FXC204",
            location=location,
        )
    return BatchSize(int(multiple))


def resolve(shape: Shape, batch: int) -> tuple[int, ...]:
    """Return the shape for a given batch size."""
    return tuple(size.multiple * batch if isinstance(size, BatchSize) else int(size) for size in shape)


def show_shape(shape: Shape) -> str:
    """Format a shape: [N, 64, 8, 8]."""
    return f"[{', '.join(map(str, shape))}]"


@dataclass(frozen=True)
class Samples:
    """The position of samples in a tensor: sample n at indices (a·N + n)·inner + b of `axis`, a < outer, b < inner."""

    axis: int
    outer: int = 1
    inner: int = 1

    @property
    def parts(self) -> int:
        """Number of indices of the axis that belong to one sample."""
        return self.outer * self.inner

    def apart(self, x: Tensor, lead: int = 0) -> Tensor:
        """[*lead, …, outer·N·inner, …] -> [*lead, N, …, outer·inner, …]: samples first, their parts at `axis`."""
        axis = self.axis + lead
        x = x.unflatten(axis, (self.outer, -1, self.inner)).movedim(axis + 1, lead)
        return x.flatten(axis + 1, axis + 2)

    def regrouped(self, x: Tensor, lead: int = 0) -> Tensor:
        """[*lead, outer·N·inner, s, …] -> [*lead, N, outer·inner·s, …]: a sample's parts as additional positions."""
        if self.parts == 1:
            return x
        x = x.unflatten(lead, (self.outer, -1, self.inner)).movedim(lead + 1, lead)
        return x.flatten(lead + 1, lead + 3)

    def __str__(self) -> str:
        return str(self.axis) if self.parts == 1 else f"{self.axis} ({self.outer}·N·{self.inner})"
