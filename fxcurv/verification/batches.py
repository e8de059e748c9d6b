"""Batches for the comparison: some samples of a batch, and the same samples among others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import Inputs, batch_size

__all__ = ["Rearranged", "among_others", "rows_of", "varied"]


@dataclass(frozen=True)
class Rearranged:
    """A batch whose row `rows[k]` is sample `samples[k]` of another batch; all other rows were replaced."""

    inputs: Inputs
    rows: Tensor
    samples: Tensor


def varied(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Return the inputs with random numbers in place of a floating-point tensor whose entries are all equal."""

    def drawn(t: Tensor) -> Tensor:
        constant = t.is_floating_point() and t.numel() > 1 and bool((t == t.flatten()[0]).all())
        return torch.randn(t.shape, generator=generator).to(t) if constant else t

    return pytree.tree_map_only(Tensor, drawn, inputs)


def rows_of(inputs: Inputs, rows: Tensor) -> Inputs:
    """Return a batch of these rows, as copies."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach()[rows.to(t.device)], inputs)


def among_others(inputs: Inputs, size: int, generator: torch.Generator) -> Rearranged:
    """Return `size` rows, in random order: at least one is new, the others are samples of the batch.

    No sample keeps its row, if possible. A new row of a floating-point input is a random mean of two samples, and so
    within the range of the data; of any other input, it is a sample. Where all samples are equal, it is random.
    """
    number = batch_size(inputs)
    kept = min(number, size - max(1, size // 4))
    samples = torch.randperm(number, generator=generator)[:kept]
    rows = _moved(samples, size, generator)
    taken = torch.randint(number, (size,), generator=generator)
    taken[rows] = samples
    new = torch.ones(size, dtype=torch.bool)
    new[rows] = False
    return Rearranged(
        pytree.tree_map_only(Tensor, lambda t: _with_new_rows(t.detach(), taken, new, generator), inputs), rows, samples
    )


def _moved(samples: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw a row for each sample, other than its own if possible."""
    rows = torch.randperm(size, generator=generator)[: len(samples)]
    for _ in range(20):
        if not bool((rows == samples).any()):
            break
        rows = torch.randperm(size, generator=generator)[: len(samples)]
    return rows


def _with_new_rows(t: Tensor, taken: Tensor, new: Tensor, generator: torch.Generator) -> Tensor:
    """Return the rows `taken` of a tensor, those at `new` replaced."""
    rows, at = t[taken.to(t.device)].clone(), new.to(t.device)
    others, count = rows[at], int(new.sum())
    partners = t[torch.randint(len(t), (count,), generator=generator).to(t.device)]
    if t.is_floating_point():
        weights = torch.rand(count, *(1,) * (t.ndim - 1), generator=generator).to(t)
        mixed = weights * others + (1 - weights) * partners
        rows[at] = torch.where(mixed.isfinite(), mixed, others)
    if not bool((t == t[:1]).all()):
        return rows
    if t.is_floating_point():
        rows[at] = others + torch.randn(others.shape, generator=generator).to(t)
    elif t.ndim > 1:
        order = torch.randperm(others[0].numel(), generator=generator).to(t.device)
        rows[at] = others.flatten(1)[:, order].view_as(others)
    return rows
