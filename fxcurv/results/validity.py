"""Validity of results for files: the same checks when a result is written and when it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, get_args

import torch
from torch import Tensor

from fxcurv.blocks.base import KINDS, Block
from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.core.fingerprint import Fingerprint
from fxcurv.results.entry import Combine, Entry, Structure

__all__ = [
    "mistake_of_entry",
    "mistake_of_gram",
    "mistake_of_parts",
    "mistake_of_result",
    "mistake_of_value",
    "stored",
]


WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Dtypes besides floating-point ones that a plain tensor may have."""

RESERVED = ("form", "shape", "parameters", "status", "reduction", "tensors")
"""Names in a file that are not options of a block."""


class Result(Protocol):
    """The values of a result that belong to the whole call."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def output(self) -> Tensor: ...

    @property
    def samples(self) -> int: ...

    @property
    def reduction(self) -> str: ...

    @property
    def divisor(self) -> Tensor | float | None: ...


def mistake_of_result(result: Result) -> str:
    """Describe an invalid loss, output, number of samples, divisor or reduction; empty if all are valid."""
    loss, output, divisor = result.loss, result.output, 0.0 if result.divisor is None else float(result.divisor)
    valid = not loss.ndim and output.ndim and len(output) == result.samples and 0 <= divisor < math.inf
    if not valid or not (loss.is_floating_point() and output.is_floating_point()):
        return "has an invalid loss, output, number of samples or divisor"
    return "" if result.reduction in ("mean", "sum") else "has a reduction that is neither mean nor sum"


def mistake_of_entry(entry: Entry, model: Fingerprint | None) -> str:
    """Describe an entry with an invalid property, or with the value of another parameter."""
    for name, kind in (("structure", Structure), ("combine", Combine)):
        if getattr(entry, name) not in get_args(kind):
            return f"has a {name} that is not one of {', '.join(get_args(kind))}"
    if type(entry.degree) is not int or entry.degree < 0:  # pyright: ignore[reportUnnecessaryComparison]
        return "has a degree that is not a whole number"
    value, shape = entry.value, entry.shape
    fits = (
        value.shape == shape or entry.structure == "array"
        if isinstance(value, Tensor)
        else value is None or entry.parameter in value.parameters
    )
    if not fits or (model and model.parameters.get(entry.parameter, ((), ""))[0] != shape):
        return "has the value or shape of another parameter"
    return ""


def mistake_of_value(value: Tensor | Block) -> str:
    """Describe a value that a file cannot hold: its dtype, the form of a block, its options or its tensors."""
    if isinstance(value, Tensor):
        known = value.is_floating_point() or value.dtype in WHOLE
        return "" if known else f"is of type {value.dtype}"
    name, kind = type(value).__name__, type(value)
    if not kind.fields or KINDS.get(name) is not kind:
        return f"is a block of the form {name}, which is not registered or has no fields"
    for option, declared in kind.options.items():
        x = getattr(value, option)
        if declared not in (bool, int, float, str) or option in RESERVED:
            return (
                f"has the option {option}, and options are numbers with a name that is not one of {', '.join(RESERVED)}"
            )
        if type(x) is not declared or (isinstance(x, float) and not math.isfinite(x)):
            return f"has {option}={x!r}, not a finite value of type {declared.__name__}"
    return mistake_of_parts(kind, value.shape, stored(value)) or mistake_of_count(value)


def mistake_of_parts(kind: type[Block], shape: tuple[int, ...], parts: Mapping[str, Tensor | LazyGram]) -> str:
    """Describe parts, as they are stored, that do not make a block on vectors of this shape."""
    for key, part in parts.items():
        tensors = part.vectors if isinstance(part, LazyGram) else (part,)
        if not all(t.is_floating_point() for t in tensors):
            return f"has the tensor {key} of type {tensors[0].dtype}"
        if isinstance(part, LazyGram) and (cause := mistake_of_gram(part)):
            return f"has the lazy Gram {key}, which {cause}"
    if not kind.fits(shape, [part.shape for part in parts.values()]):
        return f"has tensors that do not fit a {kind.__name__} block on {list(shape)}"
    return ""


def mistake_of_count(block: Block) -> str:
    """Describe a negative number of inputs."""
    if block.count is None or block.count >= 0:
        return ""
    name = next((option for option in block.options if getattr(block, option) == block.count), "count")
    return f"has a number of inputs, {name}, that is negative"


def mistake_of_gram(moment: LazyGram) -> str:
    """Describe a lazy Gram whose vectors are inconsistent, or at least as many as its entries."""
    vectors, patches = moment.vectors, moment.patches
    rank = {3, 4, 5, 6} if patches is None else {2 + len(patches.kernel)}
    scale: object = moment.scale
    if not vectors or not (isinstance(scale, float) and 0 <= scale < math.inf) or {t.ndim for t in vectors} - rank:
        return "has no valid vectors"
    fits = len({t.shape[1 if patches else -2 :] for t in vectors}) == 1
    if fits and patches is not None:
        fits = vectors[0].shape[1] % patches.groups == 0 and min(patches.outputs(vectors[0])) >= 1
    return "" if fits and 0 < moment.count < moment.side else "has vectors of inconsistent shapes"


def stored(block: Block) -> dict[str, Tensor | LazyGram]:
    """Return the parts of a block by their names in a file; a factor with a single group has no group axis, `[d,d]`."""
    parts: Sequence[Tensor | LazyGram] = block.parts
    return {key: _ungrouped(block, part) for key, part in zip(block.fields, parts, strict=True)}


def _ungrouped(block: Block, held: Tensor | LazyGram) -> Tensor | LazyGram:
    if isinstance(held, Tensor) and block.symmetric and held.ndim == 3 and len(held) == 1:
        return held[0]
    return held
