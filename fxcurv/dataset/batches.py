"""Batches of a loader: split into inputs and target, and moved to the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxcurv.core.errors import InputError, a_value
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import Inputs

__all__ = ["TARGETS", "Split", "split_batch"]


Split = Callable[[Any], tuple[Inputs, Tensor]]


TARGETS = ("labels", "label", "targets", "target")
"""Keys of the target in a batch that is a dict."""


# Batches ----------------------------------------------------------------------------------------------------------


def split_batch(batch: Any) -> tuple[Inputs, Tensor]:
    """Split a batch into (inputs, target): (input, …, target), or a dict with the target under one of `TARGETS`."""
    if isinstance(batch, Mapping):
        named = [name for name in TARGETS if name in batch]
        if len(named) == 1:
            return {key: value for key, value in batch.items() if key != named[0]}, batch[named[0]]
    elif isinstance(batch, tuple | list) and len(batch) >= 2 and isinstance(batch[-1], Tensor):
        *inputs, target = batch
        only = inputs[0]
        if len(inputs) > 1:
            return tuple(inputs), target
        return tuple(only) if isinstance(only, list) else only, target
    raise InputError(
        f"a batch is {a_value(batch)} without inputs and a target",
        remedy=f"give (input, …, target), a dict with one of {', '.join(TARGETS)}, or split=, a function that returns "
        "inputs and target",
        code="FXC110",
    )


def on_device(batch: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)
