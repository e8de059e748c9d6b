"""A probe of an op on random inputs: the position of the samples in its output, if it keeps samples apart.

The op is run on a batch, on a few of the batch's samples in another order, and on these with all samples but one
replaced. A sample's entries must be equal in all three. So an op passes only if its result for a sample depends neither
on the other samples, nor on the position in the batch, nor on the batch size. Batches have several sizes, drawn afresh
like the values; in some of them the samples are in ascending or descending order, or several are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fxcurv.core.generators import fresh_generator
from fxcurv.core.shapes import BatchSize, Samples, Shape, resolve

__all__ = ["LARGEST", "Inconclusive", "Operand", "Probe", "Sizes", "candidates", "drawn", "same"]


Order = Literal["random", "ascending", "descending"]


CHEAP, COSTLY, LARGEST = 1 << 12, 1 << 18, 1 << 22
"""Entries of a sample up to which an op gets every trial, and above which it gets one; entries of a large batch."""


TOLERANCE = {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative differences of one sample's results in batches of different sizes, 1e-3 for other dtypes."""


class Inconclusive(Exception):
    """The op fails, or gives NaN, on all random inputs."""


@dataclass(frozen=True)
class Sizes:
    """The batch sizes of a probe: the size of the trace, two larger ones, and a large one for positions."""

    traced: int
    middle: int
    larger: int
    large: int

    @classmethod
    def drawn(cls, traced: int = 3) -> Sizes:
        """Draw sizes that no two compilations need have in common."""
        generator = fresh_generator(torch.device("cpu"))

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        return cls(traced, between(4, 6), between(7, 12), between(40, 64))

    def __iter__(self) -> Iterator[int]:
        return iter((self.traced, self.middle, self.larger, self.large))


@dataclass(frozen=True)
class Operand:
    """An input of the op: its samples are at `place`; a `constant` depends on the batch size alone."""

    shape: Shape
    dtype: torch.dtype
    place: Samples | None
    constant: Callable[[int], Tensor] | None = None
    distinguishes: bool = False
    """Whether a constant differs for different samples or batch sizes."""


@dataclass(frozen=True)
class _Draw:
    """A kind of random batch: its size, the order of its samples, and the range of its values."""

    size: int
    order: Order = "random"
    ties: bool = False
    whole: bool = False
    """Whether all samples are taken in another order, rather than a few of them."""
    twin: bool = False
    """Whether the first sample that is taken equals one that is not."""
    positive: bool = False
    top: int = 2


def candidates(shape: Shape) -> list[Samples]:
    """Return the possible positions of samples in a tensor: along each axis of size multiple · N, in order."""
    axes = [(axis, size.multiple) for axis, size in enumerate(shape) if isinstance(size, BatchSize)]
    return [Samples(axis, m // b, b) for axis, m in axes for b in range(m, 0, -1) if m % b == 0]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, as by another kernel."""
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return a.shape == b.shape and torch.equal(a, b)
    if torch.equal(a, b):
        return True
    tolerance, size = TOLERANCE.get(a.dtype, 1e-3), a.abs().float()
    finite = size[size.isfinite()]
    scale = float(finite.mean()) if len(finite) else 0.0
    return bool(torch.isclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True).all())


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


class Probe:
    """An op with its operands, the shape of its output, and a generator on its device."""

    def __init__(
        self, op: Callable[..., Tensor], operands: Sequence[Operand], shape: Shape, generator: torch.Generator
    ) -> None:
        self.op, self.operands, self.shape, self.generator = op, operands, shape, generator
        self.device, self.positive, self.top = generator.device, False, 2

    def run(self, sizes: Sizes) -> list[Samples] | None:
        """Return the positions of the samples that all trials allow; None if the output is equal in all of them.

        Raises Inconclusive if random inputs fail.
        """
        trials = self._required(sizes)
        for draw in self._optional(sizes):
            try:
                trials.append(_Trial(self, draw))
            except (RuntimeError, IndexError):  # the op does not take such values
                continue
        if not candidates(self.shape):
            first = trials[0].results[0]
            return None if all(same(first, y) for trial in trials for y in trial.results) else []
        return [place for place in candidates(self.shape) if all(trial.allows(place) for trial in trials)]

    @property
    def distinguishing(self) -> bool:
        """Whether an operand differs for different samples."""
        return any(x.distinguishes for x in self.operands)

    @cached_property
    def entries(self) -> int:
        """Entries of the inputs and of the output that a sample has."""
        return sum(math.prod(resolve(shape, 1)) for shape in (self.shape, *(x.shape for x in self.operands)))

    def _required(self, sizes: Sizes) -> list[_Trial]:
        """Run random batches in the first range of values that the op takes."""
        cause = ""
        for positive, top in self._ranges():
            self.positive, self.top = positive, top
            try:
                trials = [_Trial(self, draw) for draw in self._random(sizes)]
            except (RuntimeError, IndexError) as error:
                cause = f"fail: {(str(error).splitlines() or [type(error).__name__])[0]}"
                continue
            y = trials[0].results[0]
            if not bool(y.isnan().any()) or (self.positive and not bool(y.isnan().all())):
                return trials
            cause = "give NaN"
        raise Inconclusive(cause)

    def _ranges(self) -> list[tuple[bool, int]]:
        """Return ranges of values: positive numbers for logarithms, zeros alone for indices."""
        drawn = [x.dtype for x in self.operands if x.constant is None]
        signs = (False, True) if any(dtype.is_floating_point for dtype in drawn) else (False,)
        tops = (2,) if all(d.is_floating_point or d.is_complex or d == torch.bool for d in drawn) else (2, 1)
        return [(positive, top) for positive in signs for top in tops]

    def _random(self, sizes: Sizes) -> list[_Draw]:
        """Random batches of a size that the op can afford; every position of large ones, if samples differ by it."""
        options: dict[str, Any] = {"positive": self.positive, "top": self.top}
        if self.distinguishing:
            found = [_Draw(sizes.larger, whole=True, **options), _Draw(sizes.larger, **options)]
            large = sizes.large * max(1, self.entries // 8) <= LARGEST and self._fits(sizes.large)
            return [*found, *([_Draw(sizes.large, whole=True, **options)] if large else [])]
        if self.entries > COSTLY:
            return [_Draw(sizes.traced, **options)]
        return [_Draw(sizes.larger if self.entries <= CHEAP else sizes.middle, **options)]

    def _fits(self, size: int) -> bool:
        shapes = (self.shape, *(x.shape for x in self.operands))
        return sum(math.prod(resolve(shape, size)) for shape in shapes) <= LARGEST

    def _optional(self, sizes: Sizes) -> list[_Draw]:
        """Batches in order, with equal samples or larger integers, and of the traced size; costly ops get none."""
        options: dict[str, Any] = {"positive": self.positive, "top": self.top}
        found = list[_Draw]()
        if self.entries > COSTLY:
            return found
        up: Order = "ascending" if torch.rand((), generator=self.generator, device=self.device) < 0.5 else "descending"
        ties = self.device.type == "cpu"  # other devices order equal entries by the size of the batch
        found.append(_Draw(sizes.traced, up, ties, **options))
        if self.entries > CHEAP:
            return found
        down: Order = "descending" if up == "ascending" else "ascending"
        found += [_Draw(sizes.middle, down, **options), _Draw(sizes.middle, ties=ties, **options)]
        found += [_Draw(sizes.traced, twin=ties, **options), _Draw(sizes.larger, up, ties, **options)]
        if self.device.type == "cpu" and any(not x.dtype.is_floating_point for x in self.operands):
            found += [_Draw(sizes.larger, positive=self.positive, top=5), _Draw(sizes.larger, **options)]
        return found


class _Trial:
    """The results of an op on a batch, on some of its samples, and on these with all but the first replaced."""

    def __init__(self, probe: Probe, draw: _Draw) -> None:
        self.probe, self.draw = probe, draw
        self.order = self._moved() if draw.whole else self._some()
        values = [self._drawn(x, draw.size) for x in probe.operands]
        if draw.twin:
            values = [self._with_twin(x, v) for x, v in zip(probe.operands, values, strict=True)]
        part = [self._taken(x, v) for x, v in zip(probe.operands, values, strict=True)]
        other = [self._replaced(x, v) for x, v in zip(probe.operands, part, strict=True)]
        self.results = [probe.op(*batch) for batch in (values, part, other)]

    def allows(self, place: Samples) -> bool:
        """Whether each sample's entries, at `place`, depend on that sample alone."""
        try:
            whole, part, other = (place.apart(y) for y in self.results)
        except RuntimeError:  # the result has another shape
            return False
        return same(whole[self.order], part) and _identical(part[0], other[0])

    def _moved(self) -> Tensor:
        """A random order of the samples, none of which stays in its position."""
        cycle, order = self._permutation(), torch.empty(self.draw.size, dtype=torch.int64, device=self.probe.device)
        order[cycle] = cycle.roll(1)
        return order

    def _some(self) -> Tensor:
        """Two to four samples in a random order, of which sample 0 is not the first.

        In a batch in random order without equal samples, the last sample is the first.
        """
        order = self._permutation()
        order = order.roll(1) if int(order[0]) == 0 else order
        if self.draw.order == "random" and not self.draw.ties:
            last = self.draw.size - 1
            order = torch.cat([order[order == last], order[order != last]])
        return order[: min(4, self.draw.size - 1)]

    def _permutation(self) -> Tensor:
        return torch.randperm(self.draw.size, generator=self.probe.generator, device=self.probe.device)

    def _drawn(self, x: Operand, size: int) -> Tensor:
        if x.constant is not None:
            return x.constant(size)
        drawn = self._random(resolve(x.shape, size), x.dtype)
        if x.place is None or x.dtype.is_complex or self.draw.order == "random":
            return drawn
        rows = _split(x.place, drawn).sort(x.place.axis + 1, descending=self.draw.order == "descending").values
        return rows.flatten(x.place.axis, x.place.axis + 2)

    def _with_twin(self, x: Operand, value: Tensor) -> Tensor:
        """The operand with the first taken sample in place of one that is not taken."""
        if x.constant is not None or x.place is None:
            return value
        value, axis = value.clone(memory_format=torch.contiguous_format), x.place.axis + 1
        left_out = next(n for n in range(self.draw.size) if n not in self.order.tolist())
        rows = _split(x.place, value)
        rows.select(axis, left_out).copy_(rows.select(axis, int(self.order[0])))
        return value

    def _taken(self, x: Operand, value: Tensor) -> Tensor:
        """The samples `order` of an operand."""
        if x.constant is not None:
            return x.constant(len(self.order))
        if x.place is None:
            return value
        axis = x.place.axis
        return _split(x.place, value).index_select(axis + 1, self.order).flatten(axis, axis + 2)

    def _replaced(self, x: Operand, value: Tensor) -> Tensor:
        """The operand with new values of all samples but the first, some of them far larger."""
        if x.constant is not None or x.place is None:
            return value
        value = value.clone(memory_format=torch.contiguous_format)
        others = _split(x.place, value).narrow(x.place.axis + 1, 1, len(self.order) - 1)
        fresh = self._random(others.shape, x.dtype)
        others.copy_(fresh * 10 if x.dtype.is_floating_point and not self.draw.ties else fresh)
        return value

    def _random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Draw the values of an operand."""
        value = drawn(shape, dtype, self.probe.generator, self.draw.positive, self.draw.top)
        real = dtype.is_floating_point or dtype.is_complex
        return value.round() + self.draw.positive if self.draw.ties and real else value


def drawn(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, positive: bool = False, top: int = 2
) -> Tensor:
    """Draw normal numbers, `positive` or not, fair coins, or integers below `top`."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    if dtype == torch.bool:
        return torch.rand(shape, **options) < 0.5
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(top, shape, dtype=dtype, **options)
    normal = torch.randn(shape, dtype=dtype, **options)
    return normal.abs() if positive and dtype.is_floating_point else normal


def _split(place: Samples, value: Tensor) -> Tensor:
    """[…, outer·N·inner, …] -> […, outer, N, inner, …]."""
    return value.unflatten(place.axis, (place.outer, -1, place.inner))
