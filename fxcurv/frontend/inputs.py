"""Inputs of a model, and the selection of its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxcurv.core.errors import CaptureError, InputError, a_value
from fxcurv.core.torch_compat import pytree

__all__ = ["Inputs", "Output", "as_call", "batch_size", "device_of", "selector", "tensors_of"]


Inputs = Tensor | tuple[Any, ...] | dict[str, Any]


Output = str | int | Callable[[Any], Tensor] | None


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: a tensor or a tuple is positional, a dict gives keywords."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Return the tensors among the arguments, in order."""
    return [t for t in pytree.tree_leaves(as_call(inputs)) if isinstance(t, Tensor)]


def batch_size(inputs: Inputs) -> int:
    """Return the length of axis 0, shared by all input tensors."""
    tensors = tensors_of(inputs)
    if not tensors:
        raise InputError("no input tensor was given", remedy="call it as curv(inputs, target)", code="FXC110")
    for t in tensors:
        if t.ndim == 0:
            raise InputError("an input is a scalar", remedy="give every input a leading batch axis", code="FXC110")
    sizes = {t.shape[0] for t in tensors}
    if len(sizes) != 1:
        raise InputError(
            f"inputs have different batch sizes {sorted(sizes)}",
            remedy="make axis 0 of every input the batch axis",
            code="FXC110",
        )
    return sizes.pop()


def device_of(inputs: Inputs) -> torch.device:
    """Return the device of the inputs."""
    return next((t.device for t in tensors_of(inputs)), torch.device("cpu"))


def selector(output: Output) -> Callable[[Any], Tensor]:
    """Return the function that selects the tensor to differentiate from the model's return value."""

    def select(returned: Any) -> Tensor:
        if callable(output):
            chosen = output(returned)
        elif output is None:
            chosen = returned
        else:
            chosen = _item(returned, output)
        if isinstance(chosen, Tensor):
            return chosen
        raise _choose(f"the model returns {_described(chosen)}, not a tensor")

    return select


def _item(returned: Any, output: str | int) -> Any:
    """Return the item of the model's return value with a name or an index."""
    try:
        if isinstance(output, str) and not isinstance(returned, dict):
            return getattr(returned, output)
        return returned[output]
    except (LookupError, AttributeError, TypeError) as error:
        raise _choose(
            f"the model returns {_described(returned)}, and output={output!r} does not name an item of it"
        ) from error


def _choose(cause: str) -> CaptureError:
    remedy = "choose one with output= (an index, a name, or a function of the model's return value)"
    return CaptureError(cause, node="output", remedy=remedy, code="FXC105")


def _described(returned: Any) -> str:
    parts = _parts(returned)
    return "a tensor" if isinstance(returned, Tensor) else a_value(returned) + (f" of {parts}" if parts else "")


def _parts(returned: Any) -> str:
    if isinstance(returned, dict):
        return ", ".join(map(repr, returned))
    return f"{len(returned)} items" if isinstance(returned, list | tuple) else ""
