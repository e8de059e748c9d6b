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
    """Arguments of the selection: numbers of samples and columns, device and dtype; the name of an algorithm to force.

    Without `loops`, algorithms that loop over samples or columns are excluded. `trials` caches outcomes of trials.
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
        """Rates of the device for the dtype."""
        return rates_of(self.device, self.dtype)

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a node's tensor."""
        sizes: dict[Any, int] = {"V": self.columns, "N": self.samples}
        return resolve(tuple(sizes.get(s, s) if isinstance(s, str) else s for s in node.meta["shape"]), self.samples)
