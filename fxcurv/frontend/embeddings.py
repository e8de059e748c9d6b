"""Embeddings with `scale_grad_by_freq`, whose backward is not the derivative: it divides by counts over the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxcurv.core.errors import Location, UnsupportedError

__all__ = ["UnscaledGradients", "check_embedding", "scaled_by_frequency"]


_PLACES: Mapping[Any, tuple[int, int]] = {
    F.embedding: (1, 5),
    F.embedding_bag: (1, 5),
    torch.embedding: (0, 3),
    torch.embedding_bag: (0, 3),
}
"""Positions of the arguments `weight` and `scale_grad_by_freq`."""


def scaled_by_frequency(node: str, location: Location = ()) -> UnsupportedError:
    """Return the refusal of an embedding whose gradient is scaled by the counts of its indices."""
    return UnsupportedError(
        "scale_grad_by_freq divides the gradient of a row by the number of times it occurs in the batch, "
        "so the gradients of samples and batches do not add up",
        node=node,
        remedy="set scale_grad_by_freq=False",
        code="FXC213",
        location=location,
    )


def check_embedding(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise the refusal (FXC213) for a call of an embedding that scales the gradient of a trainable weight."""
    if function not in _PLACES:
        return
    at = _PLACES[function]
    weight, scaled = (
        args[k] if k < len(args) else kwargs.get(name)
        for k, name in zip(at, ("weight", "scale_grad_by_freq"), strict=True)
    )
    if scaled and isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise scaled_by_frequency(f"'{function.__name__}'")


class UnscaledGradients(TorchFunctionMode):
    """Applies `check_embedding` to every call."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        check_embedding(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
