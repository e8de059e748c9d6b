"""Batches of a data set, an interruption of them, and results to compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from curvatures import batch as images
from curvatures import same
from torch import Tensor

import fxcurv
from fxcurv.results.merging import values_of

__all__ = ["BATCHES", "Interrupting", "alike", "cut", "emptied", "seeded"]


def cut(x: Tensor, y: Tensor, sizes: tuple[int, ...] = (2, 1, 4)) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def emptied(result: fxcurv.Curvature) -> fxcurv.Curvature:
    """Without outputs, as accumulated results are."""
    return dataclasses.replace(result, output=result.output.new_empty(result.samples, 0))


def alike(a: fxcurv.Curvature, b: fxcurv.Curvature) -> None:
    """The same bits."""
    assert (a.samples, a.divisor, list(a)) == (b.samples, b.divisor, list(b))
    same(a.loss, b.loss)
    for mine, its in zip(values_of(a), values_of(b), strict=True):
        same(mine, its)


# Checkpoints ------------------------------------------------------------------------------------------------------


class Interrupting:
    """A loader that is interrupted before one of its batches."""

    def __init__(self, batches: list[Any], at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.batches, self.at, self.error = batches, at, error

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for k, batch in enumerate(self.batches):
            if k == self.at:
                raise self.error
            yield batch


BATCHES = [images(2, seed) for seed in range(6)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
