"""Example batches for a model, from the shape of one sample or a function that returns the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcurv.core.errors import InputError
from fxcurv.frontend.inputs import Inputs
from fxcurv.models import targets

__all__ = ["example", "like", "shape_of_one"]


BATCH = 2


def like(target: targets.Target) -> Tensor:
    """Return a tensor with the dtype and device of the model."""
    return next(target.model.parameters(), torch.empty(0)).detach()


def shape_of_one(target: targets.Target, given: str | None) -> tuple[int, ...]:
    """Return the shape of one sample: given as `3x64x64`, or the model's `input_shape`."""
    if given is not None:
        return _sizes(given)
    if target.input_shape is None:
        remedy = "give --input, e.g. --input 3x32x32"
        raise InputError(f"{target.name} does not define the shape of its input", remedy=remedy, code="FXC007")
    return target.input_shape


def _sizes(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        remedy = "give the sizes of one input, e.g. 3x32x32"
        raise InputError(f"--input {text} is not a shape", remedy=remedy, code="FXC007")
    return tuple(map(int, sizes))


def example(target: targets.Target, given: str | None = None, seed: int = 0) -> Inputs:
    """Return two random samples: `3x32x32`, `16:int64`, a list with commas, `name=16:int64` or `@module:function`."""
    if given is not None and given.startswith("@"):
        return _made(given[1:])
    model = like(target)
    generator = torch.Generator().manual_seed(seed)
    if given is None or not set(given) & set(",=:"):
        return _random(shape_of_one(target, given), model.dtype, generator).to(model.device)
    named: dict[str, Tensor] = {}
    for part in given.split(","):
        name, equals, rest = part.rpartition("=")
        sizes, _, dtype = rest.partition(":")
        drawn = _random(_sizes(sizes), _dtype(dtype, model.dtype), generator)
        named[name if equals else f"#{len(named)}"] = drawn.to(model.device)
    if not any(name.startswith("#") for name in named):
        return named
    if not all(name.startswith("#") for name in named):
        remedy = "name all of the inputs, or none"
        raise InputError(f"--input {given} names some inputs only", remedy=remedy, code="FXC007")
    return tuple(named.values())


def _dtype(name: str, default: torch.dtype) -> torch.dtype:
    found = getattr(torch, name, None) if name else default
    if not isinstance(found, torch.dtype):
        raise InputError(f"torch has no type {name!r}", remedy="give one such as int64", code="FXC007")
    return found


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return normal numbers; for integers and booleans zeros and ones, valid indices for at least two entries."""
    if dtype.is_floating_point:
        return torch.randn(BATCH, *shape, dtype=dtype, generator=generator)
    return torch.randint(0, 2, (BATCH, *shape), generator=generator).to(dtype)


def _made(locator: str) -> Inputs:
    made: Any = targets.lookup(locator)
    try:
        return made()
    except Exception as error:
        remedy = "let it return a tensor, a tuple or a dict, without arguments"
        cause = f"@{locator} fails: {type(error).__name__}: {error}"
        raise InputError(cause, remedy=remedy, code="FXC004") from error
