"""The setting for which algorithms are selected: batch size, columns, device and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from fxcurv.core.shapes import resolve
from fxcurv.linalg.cost import Rates, rates_of

__all__ = ["Setting", "matches"]


def matches(pattern: str, statistic: str) -> bool:
    """Whether a pattern matches a statistic's full name, its parameter or the module path of that."""
    parameter = statistic.partition(".")[2].rpartition(".")[0]
    return any(fnmatchcase(name, pattern) for name in (statistic, parameter, parameter.rpartition(".")[0]))


@dataclass(frozen=True)
class Setting:
    """The batch for which algorithms are selected: samples, columns, device and dtype.

    `algorithms` maps patterns of statistics, parameters or module paths to the algorithm to use wherever it applies.
    Without `loops` no algorithm runs a loop over samples or columns. `trials` caches the outcomes of trials.
    """

    samples: int
    columns: int
    device: torch.device
    dtype: torch.dtype
    loops: bool = True
    algorithms: Mapping[str, str] = field(default_factory=dict)
    trials: dict[object, bool] = field(default_factory=dict)

    @property
    def rates(self) -> Rates:
        """Rates of the device for the dtype."""
        return rates_of(self.device, self.dtype)

    def asked(self, statistic: str) -> list[str]:
        """The algorithms that are asked for the statistic `quantity.module.parameter.name`, the last one first."""
        return [name for pattern, name in self.algorithms.items() if matches(pattern, statistic)][::-1]

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a node's tensor."""
        sizes: dict[Any, int] = {"V": self.columns, "N": self.samples}
        return resolve(tuple(sizes.get(s, s) if isinstance(s, str) else s for s in node.meta["shape"]), self.samples)
