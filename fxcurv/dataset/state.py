"""State and settings of an accumulation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcurv.blocks.base import Block
from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.core.errors import QuantityError
from fxcurv.dataset.batches import Split
from fxcurv.dataset.standard_error import StandardError
from fxcurv.results.curvature import Curvature
from fxcurv.results.merging import values_changed, values_of

__all__ = ["Settings", "State", "length_of", "owned"]


@dataclass(frozen=True)
class State:
    """Result over `batches` batches, and all other state of an accumulation; `weight` is their weight in an average.

    `digest` is of all batches; `digests` has its first 8 digits after each of the first batches.
    """

    total: Curvature | None = None
    batches: int = 0
    standard_error: StandardError = field(default_factory=StandardError)
    digest: str = ""
    digests: str = ""
    generator: Tensor | None = None
    weight: float = 0.0


def length_of(loader: Iterable[Any]) -> int | None:
    """Return the number of batches; None for a stream, or a DataLoader of an IterableDataset without a length."""
    try:
        return len(loader)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


@dataclass(frozen=True)
class Settings:
    """Settings of an accumulation; see `Compiled.accumulate`."""

    split: Split | None = None
    generator: torch.Generator | None = None
    dtype: torch.dtype | None = None
    max_batches: int | None = None
    until_rel_error: float | None = None
    min_batches: int = 8
    checkpoint: str | Path | None = None
    every: int = 10
    progress: bool = True
    timeout: float = 600.0
    check_deterministic: bool = True

    def __post_init__(self) -> None:
        wrong = [
            name
            for name, least in (("max_batches", 1), ("min_batches", 2), ("every", 1), ("timeout", 0))
            if (value := getattr(self, name)) is not None and not value >= least
        ]
        wrong += ["until_rel_error"] * (self.until_rel_error is not None and not self.until_rel_error > 0)
        for name in wrong:
            raise QuantityError(
                f"{name}={getattr(self, name)!r}", remedy="give a positive number, min_batches ≥ 2", code="FXC409"
            )


def owned(result: Curvature, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Curvature:
    """Return the values contiguous, in separate memory, with this dtype and device; outputs are empty, `[N, 0]`."""

    def own(held: Tensor | LazyGram) -> Any:
        if isinstance(held, LazyGram):
            return replace(held, vectors=tuple(own(t) for t in held.vectors))
        kind = dtype if held.is_floating_point() else None  # integers and booleans stay
        moved = held.detach().to(dtype=kind or held.dtype, device=device or held.device)
        return moved.clone(memory_format=torch.contiguous_format)

    changed = [v.mapped(own) if isinstance(v, Block) else own(v) for v in values_of(result)]
    divisor = result.divisor if result.divisor is None else float(result.divisor)
    output = result.output.new_empty(result.samples, 0)
    return replace(values_changed(result, changed), loss=own(result.loss), output=output, divisor=divisor)
