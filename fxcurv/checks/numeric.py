"""The numeric level: compares compiled values with autograd on the model itself, in float64, on a tiny batch.

If the model converts to a shorter type internally, both computations stay in float64. The remaining difference is an
error, not rounding.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxcurv.api import Compiled
from fxcurv.blocks.base import Block
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import Inputs, as_call, selector
from fxcurv.results.entry import Entry
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.run import Minibatch

__all__ = ["disagreements", "doubled"]


SAMPLES = 2


SEED = 0


NEGLIGIBLE = 1e-6
"""Relative size, to the largest value of the quantity, below which values are rounding (e.g. cancelled gradients)."""


def doubled(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Any]:
    """Return copies of the model and of the first samples in float64."""

    def in_double(t: Tensor) -> Tensor:
        return t[:SAMPLES].double() if t.is_floating_point() else t[:SAMPLES]

    return copy.deepcopy(model).double(), pytree.tree_map_only(Tensor, in_double, inputs)


class _InDouble(TorchFunctionMode):
    """Replace every shorter floating-point type by float64, in conversions and factory functions."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        longer: Any = pytree.tree_map_only(torch.dtype, _longer, (args, kwargs or {}))
        return func(*longer[0], **longer[1])


def _longer(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def disagreements(compiled: Compiled, inputs: Inputs) -> dict[tuple[str, str], float]:
    """Return the relative error by quantity and parameter; NaN where the two values have different forms."""
    with _InDouble():
        target = _targets(compiled, inputs)
        found = compiled(inputs, target, torch.Generator().manual_seed(SEED))
        batch = Minibatch(inputs, target, torch.Generator().manual_seed(SEED))
        expected = by_autograd(compiled.model, compiled.loss, compiled.selection, batch, compiled.options.output)
    errors: dict[tuple[str, str], float] = {}
    for quantity, entries in found.items():
        theirs = expected[quantity].entries
        scale = _scales(list(theirs.values()))
        for name, entry in entries.entries.items():
            if entry.value is not None:
                errors[quantity, name] = _error(entry, theirs[name], scale)
    return errors


def _scales(entries: list[Entry]) -> dict[str, float]:
    """Return the largest absolute value of each kind of tensor."""
    largest: defaultdict[str, float] = defaultdict(float)
    for entry in entries:
        for kind, t in _compared(entry).items():
            largest[kind] = max(largest[kind], float(t.abs().max()))
    return largest


def _error(found: Entry, expected: Entry, scales: dict[str, float]) -> float:
    ours, theirs = _compared(found), _compared(expected)
    if {kind: t.shape for kind, t in ours.items()} != {kind: t.shape for kind, t in theirs.items()}:
        return math.nan
    errors = (
        float((ours[kind] - t).abs().max()) / max(float(t.abs().max()), NEGLIGIBLE * scales[kind], 1e-300)
        for kind, t in theirs.items()
    )
    return max(errors)


def _compared(entry: Entry) -> dict[str, Tensor]:
    """Return the tensors to compare: invariants of the value, independent of its basis."""
    return entry.value.invariants if isinstance(entry.value, Block) else entry.tensors()


def _targets(compiled: Compiled, inputs: Inputs) -> Tensor:
    """Return random targets of a valid shape for the loss."""
    args, kwargs = as_call(inputs)
    with torch.enable_grad():  # models register hooks on tensors with gradients
        output = selector(compiled.options.output)(compiled.model(*args, **kwargs)).detach()
    return compiled.loss.random_target(output, torch.Generator().manual_seed(SEED))
