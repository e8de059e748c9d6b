"""Tiling of the kernel of two batches, so that it stays within a memory budget.

A tile holds the columns of some samples and output entries after their pullback. The kernel consists of the products
of every tile of one batch with every tile of the other; one tile of each is in memory at a time. For one batch with
itself, each pair of tiles is computed once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fxcurv.core.errors import FxcurvError
from fxcurv.core.shapes import resolve
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import Inputs, batch_size
from fxcurv.ir.nodes import output_of
from fxcurv.quantities.inner_products import ROOM, Strategy, room_needed, stored_like
from fxcurv.runtime.memory import MARGIN, Forecast, forecast, largest, show_bytes
from fxcurv.runtime.program import Program
from fxcurv.runtime.run import default_columns

__all__ = ["KernelInput", "Peak", "Request", "Tile", "Tiles", "tiles_for"]


@dataclass(frozen=True, eq=False)
class KernelInput:
    """A batch, and the program that pulls back the output columns of the model."""

    program: Program
    inputs: Inputs
    known: dict[tuple[int, int], Forecast] = field(default_factory=dict, repr=False)
    """Forecasts by samples and columns."""

    @property
    def samples(self) -> int:
        return batch_size(self.inputs)

    @property
    def outputs(self) -> int:
        """Number of output entries per sample."""
        return math.prod(resolve(output_of(self.program.canonical).meta["shape"], 1))

    def part(self, samples: slice) -> Inputs:
        """The inputs of some samples."""
        cut: Any = pytree.tree_map_only(Tensor, lambda t: t[samples], self.inputs)
        return cut

    def pulled(self, samples: int, columns: int) -> Forecast:
        """The memory forecast of the columns of a tile."""
        key = samples, columns
        if key not in self.known:
            at_once, inputs = min(columns, default_columns(self.program, samples)), self.part(slice(samples))
            self.known[key] = forecast(self.program, inputs, samples, at_once, columns)
        return self.known[key]


@dataclass(frozen=True)
class Request:
    """The requested kernel: equal output entries only if `alike`, summed over them if `traced`; `count` of them."""

    alike: bool = False
    traced: bool = False
    count: int = 1
    strategy: Strategy | None = None


@dataclass(frozen=True)
class Tile:
    """Slices of the samples of a batch and of the output entries."""

    samples: slice
    columns: slice


@dataclass(frozen=True)
class Tiles:
    """Numbers of samples and columns of a tile; `room` is the number of temporary entries of products."""

    samples: int
    columns: int
    room: int = ROOM

    def of(self, batch: KernelInput) -> list[Tile]:
        """The tiles of a batch."""
        samples, columns = _cut(batch.samples, self.samples), _cut(batch.outputs, self.columns)
        return [Tile(*pair) for pair in itertools.product(samples, columns)]


def _cut(whole: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, whole)) for start in range(0, whole, at_once)]


def tiles_for(left: KernelInput, right: KernelInput | None, request: Request, budget: int | None) -> Tiles:
    """The largest tiles that fit in `budget` bytes: all columns of some samples, or some columns of one sample.

    `right` is None for the kernel of a batch with itself. Without a budget there is one tile. Raises FxcurvError
    (FXC503) with the forecast if the kernel and one column of one sample of each batch need more.
    """
    samples, columns = max(b.samples for b in (left, right or left)), max(b.outputs for b in (left, right or left))
    if budget is None:
        return Tiles(samples, columns)
    allowed = int(MARGIN * budget)
    spare = allowed // (4 * _size(left))

    def peak(n: int, v: int) -> int:
        return Peak.of(left, right, request, Tiles(n, v, spare)).highest

    kernel = _kernel(left, right or left, request) * _size(left)
    least = kernel if kernel > allowed else Peak.of(left, right, request, Tiles(1, 1, 1)).highest
    if least > allowed:
        raise FxcurvError(
            f"the kernel takes {show_bytes(kernel)}, with one column of one sample of each batch at a time at least "
            f"{show_bytes(least)}, more than memory_budget={show_bytes(budget)}",
            remedy=f"allow {show_bytes(math.ceil(1.001 * least / MARGIN))}, ask for kind='trace', or for fewer samples",
            code="FXC503",
        )
    found = largest(samples, allowed, lambda n: peak(n, columns))
    n = math.ceil(samples / math.ceil(samples / found)) if found else 1
    v = columns if found else max(1, largest(columns, allowed, lambda v: peak(1, v)))
    beside = Peak.of(left, right, request, Tiles(n, v, spare)).beside
    roomy = Tiles(n, v, max(1, min(ROOM, (allowed - beside) // _size(left))))
    return roomy if Peak.of(left, right, request, roomy).highest <= allowed else Tiles(n, v, spare)


def _size(batch: KernelInput) -> int:
    """Bytes per entry."""
    return max(4, output_of(batch.program.canonical).meta["dtype"].itemsize)


def _kernel(left: KernelInput, right: KernelInput, request: Request) -> int:
    """Number of entries of the result."""
    each = (1 if request.traced else left.outputs) if request.alike else left.outputs * right.outputs
    return request.count * left.samples * right.samples * each


@dataclass(frozen=True)
class Peak:
    """Peak bytes of the pullbacks (`pulling`) and of the products: temporaries (`forming`) and all else (`beside`)."""

    pulling: int
    beside: int
    forming: int

    @property
    def highest(self) -> int:
        return max(self.pulling, self.beside + self.forming)

    @classmethod
    def of(cls, left: KernelInput, right: KernelInput | None, request: Request, tiles: Tiles) -> Peak:
        """The peaks for two batches, or for one with itself, with these tiles."""
        other, size = right or left, _size(left)
        one = right is None and tiles.samples >= left.samples and tiles.columns >= left.outputs
        (n, v), (m, w) = ((min(tiles.samples, b.samples), min(tiles.columns, b.outputs)) for b in (left, other))
        ours, theirs = left.pulled(n, v), other.pulled(m, w)
        result, block = size * _kernel(left, other, request), size * n * m * v * (1 if request.alike else w)
        forming = 0
        for job in left.program.plan.jobs:
            L = stored_like(job.usage, request.strategy, v, n)
            R = L if one else stored_like(job.usage, request.strategy, w, m)
            forming = max(forming, room_needed(L, R, request.alike, request.strategy, tiles.room))
        pulling = max(ours.peak, 0 if one else ours.results + theirs.peak)
        held = ours.results + (0 if one else theirs.results)
        return cls(result + pulling, result + held + 2 * block, size * forming)
