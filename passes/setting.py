"""The setting for which algorithms are selected: batch size, columns, device and dtype."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxcurv.core.shapes import resolve
from fxcurv.linalg.cost import Rates, rates_of

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """For what the forms are chosen: samples, columns, device and type; a form's name where it is forced.

    Without `loops` no form runs a loop over samples or columns. `trials` remembers what trials showed.
    """

    samples: int
    columns: int
    device: torch.device
    dtype: torch.dtype
    loops: bool = True
    forced: str | None = None
    trials: dict[object, bool] = field(default_factory=dict)

    @property
    def rates(self) -> Rates:
        """How fast the device is."""
        return rates_of(self.device, self.dtype)

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of what a node will hold."""
        sizes: dict[Any, int] = {"V": self.columns, "N": self.samples}
        return resolve(tuple(sizes.get(s, s) if isinstance(s, str) else s for s in node.meta["shape"]), self.samples)
