"""Structural copies of a model that share its tensors, and a check that the model is deterministic."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxcurv.core.errors import CaptureError, InputError, UnsupportedError

__all__ = ["check_parameters", "check_repeatable", "named_tensors", "structural_copy"]


def check_parameters(model: nn.Module) -> None:
    """Raise an error if parameters are sharded over processes, by FSDP or tensor parallelism."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # not imported: no DTensors
    for name, p in model.named_parameters():
        if module is not None and isinstance(p, module.DTensor):
            raise UnsupportedError(
                f"parameter {name!r} is a DTensor, sharded over processes",
                remedy="load the full state dict into a model with whole parameters, one copy per process",
                code="FXC429",
            )


def structural_copy(model: nn.Module, *shared: Tensor, instead: Mapping[Tensor, Tensor] | None = None) -> nn.Module:
    """Copy the modules; the copy shares the given tensors, and computed tensors that the model stores, with `model`.

    Wherever the model holds a key of `instead`, the copy holds its value.
    """
    check_parameters(model)
    kept = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf)
    try:
        return copy.deepcopy(model, {id(t): (instead or {}).get(t, t) for t in (*shared, *kept)})
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied ({error})", remedy="make its attributes deep-copyable", code="FXC103"
        ) from error


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model under all of their names."""
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return {**dict(parameters), **dict(buffers)}


def check_repeatable(model: nn.Module, copy: nn.Module, first: Tensor, second: Tensor) -> None:
    """Raise an InputError if two calls of `copy`, a copy of the model, differ in output or updated its buffers."""
    buffers = zip(model.named_buffers(), copy.buffers(), strict=False)
    updated = [name for (name, before), after in buffers if before.shape == after.shape and not _same(before, after)]
    if updated:
        raise InputError(f"the model updates its buffer {updated[0]}", remedy="call model.eval()", code="FXC402")
    if not _same(first, second):
        raise InputError("the model's output changes from call to call", remedy="call model.eval()", code="FXC403")


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())
