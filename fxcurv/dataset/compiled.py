"""Interface of compiled models for accumulation; implemented by `fxcurv.api.Compiled`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from fxcurv.frontend.inputs import Inputs
from fxcurv.losses.base import Loss
from fxcurv.quantities.ekfac import Bases
from fxcurv.quantities.selection import Selection
from fxcurv.results.curvature import Curvature
from fxcurv.runtime.options import Options

__all__ = ["CompiledModel"]


class CompiledModel(Protocol):
    """A model, a loss and the requested quantities, called with a batch."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def loss(self) -> Loss: ...

    @property
    def selection(self) -> Selection: ...

    @property
    def options(self) -> Options: ...

    @property
    def bases(self) -> Bases | None: ...

    def __call__(self, inputs: Inputs, target: Tensor, generator: torch.Generator | None = None) -> Curvature:
        """Return the curvature of a batch."""
        ...

    def summed(self) -> CompiledModel:
        """Return the same compiled model for the sum of the loss terms."""
        ...

    def choosing(self, selection: Selection, bases: Bases | None = None) -> CompiledModel:
        """Return a compiled model with the same model, loss and options for other quantities."""
        ...
