"""Standard error of a weighted mean over batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcurv.blocks.base import Block
from fxcurv.core.errors import QuantityError
from fxcurv.results.curvature import Curvature

__all__ = ["StandardError"]


@dataclass(frozen=True)
class StandardError:
    """Sums over batches b of w_b, w_b², and for each value of w_b t_b, w_b² t_b, w_b² t_b².

    t_b is the trace of a block or the sum of a diagonal; gradients have no trace. For `mean`, w_b is the batch's
    divisor; for `sum`, t_b is per sample and w_b the number of samples.
    """

    batches: int = 0
    weights: tuple[float, float] = (0.0, 0.0)
    sums: tuple[tuple[float, float, float], ...] = ()

    def with_batch(self, result: Curvature) -> StandardError:
        """Return the sums with one more batch; synchronizes with the device once."""
        values = {id(e.value): e.value for e in result.entries if e.value is not None and e.structure != "vector"}
        if not values:
            raise QuantityError(
                "until_rel_error measures traces, and gradients have no trace",
                remedy="request a curvature too, or give max_batches",
                code="FXC409",
            )
        traces = torch.stack([_trace(value).double() for value in values.values()]).tolist()
        mean = result.reduction == "mean"
        w = float(result.divisor or 0) if mean else float(result.samples)
        scaled = traces if mean else [t / result.samples for t in traces]
        old = self.sums or ((0.0, 0.0, 0.0),) * len(scaled)
        sums = tuple((a + w * t, b + w * w * t, c + w * w * t * t) for (a, b, c), t in zip(old, scaled, strict=True))
        return StandardError(self.batches + 1, (self.weights[0] + w, self.weights[1] + w * w), sums)

    def rel_error(self) -> float:
        """Return the largest relative standard error of a weighted mean m = Σ w t / Σ w over the batches.

        It is √(n/(n-1) Σ w² (t - m)²) / (Σ w · |m|), for batches as independent draws; means of 0 are omitted.
        """
        n, (w, ww) = self.batches, self.weights
        if n < 2 or not w:
            return math.inf
        means = ((a / w, b, c) for a, b, c in self.sums)
        errors = (
            math.sqrt(max(0.0, c - 2 * m * b + m * m * ww) * n / (n - 1)) / (w * abs(m)) for m, b, c in means if m
        )
        return max(errors, default=0.0)


def _trace(value: Tensor | Block) -> Tensor:
    return value.trace() if isinstance(value, Block) else value.sum()
