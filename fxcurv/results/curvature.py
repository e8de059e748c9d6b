"""Curvature: the results of one call, by quantity and original parameter name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

from fxcurv.blocks.base import Block
from fxcurv.core.errors import QuantityError
from fxcurv.core.fingerprint import Fingerprint
from fxcurv.results.block_diagonal import BlockDiagonal
from fxcurv.results.entry import Entries, Entry
from fxcurv.results.writing import save

__all__ = ["Curvature"]


@dataclass(frozen=True, eq=False)
class Curvature(Mapping[str, Entries]):
    """Results `result[quantity][parameter]`, with the loss and the output of the call.

    `divisor` is the divisor of the loss terms for `mean`, 1 for `sum`; `model` is the fingerprint of the model. Both
    are None if unknown.
    """

    quantities: Mapping[str, Entries]
    loss: Tensor
    output: Tensor
    samples: int
    reduction: str
    divisor: Tensor | float | None = None
    model: Fingerprint | None = None

    def __getitem__(self, quantity: str) -> Entries:
        if quantity not in self.quantities:
            raise QuantityError(
                f"{quantity!r} was not computed", remedy=f"there are {', '.join(self.quantities)}", code="FXC410"
            )
        return self.quantities[quantity]

    def __iter__(self) -> Iterator[str]:
        return iter(self.quantities)

    def __len__(self) -> int:
        return len(self.quantities)

    @property
    def entries(self) -> list[Entry]:
        """Entries of every parameter × quantity, including entries without a value."""
        return [entry for entries in self.quantities.values() for entry in entries.entries.values()]

    def updated(self, other: Curvature) -> Curvature:
        """Return the result with its entries replaced by the entries of `other`."""
        theirs = {name: entries.entries for name, entries in other.quantities.items()}
        return self._mapped(lambda e: theirs.get(e.quantity, {}).get(e.parameter, e))

    def explained(self, reasons: Mapping[str, object]) -> Curvature:
        """Return the result with these reasons, by parameter."""
        return self._mapped(lambda e: replace(e, reason=str(reasons.get(e.parameter, e.reason))))

    def _mapped(self, change: Callable[[Entry], Entry]) -> Curvature:
        changed = {name: Entries(map(change, e.entries.values())) for name, e in self.quantities.items()}
        return replace(self, quantities=changed)

    def operator(self, quantity: str) -> BlockDiagonal:
        """Return a quantity as one operator: unreached parameters have the block 0, frozen parameters are omitted."""
        return BlockDiagonal.of(self[quantity])

    def table(self, fmt: str = "simple") -> str:
        """Return a row per parameter × quantity: shape, factor, status, form, tensor shapes, and trace (or sum)."""
        rows = [
            (e.parameter, list(e.shape), e.quantity, e.factor, e.status, e.form(), _shapes(e), _trace(e))
            for e in self.entries
        ]
        headers = ("parameter", "shape", "quantity", "factor", "status", "form", "tensors", "trace")
        return tabulate(rows, headers, tablefmt=fmt, floatfmt=".4g")

    def __str__(self) -> str:
        loss = f"loss {self.loss.item():.6g} ({self.reduction}) over {self.samples} sample{'s' * (self.samples != 1)}"
        reasons = dict.fromkeys(f"{e.status}: {e.reason}" for e in self.entries if e.reason)
        return "\n".join((loss, self.table(), *reasons))

    def _repr_html_(self) -> str:
        return self.table("html")

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers: quantity -> parameter -> status, factor, shape, tensors; and the other fields."""
        quantities = {
            name: {
                e.parameter: {
                    "status": e.status,
                    "factor": e.factor,
                    "shape": list(e.shape),
                    "form": e.form(),
                    "tensors": e.tensors(),
                }
                for e in entries.entries.values()
            }
            for name, entries in self.quantities.items()
        }
        scalars = {"loss": self.loss.item(), "samples": self.samples, "reduction": self.reduction}
        return {**scalars, "output": self.output, "quantities": quantities}

    def save(self, path: str | Path) -> None:
        """Write the result to a safetensors file for `fxcurv.load`; see fxcurv/results/writing.py."""
        save(self, Path(path))


def _shapes(entry: Entry) -> str:
    sizes = entry.value.sizes if isinstance(entry.value, Block) else {}
    return ", ".join(f"{name} {list(size)}" for name, size in sizes.items())


def _trace(entry: Entry) -> float | str:
    if entry.value is None:
        return ""
    return float(entry.value.trace() if isinstance(entry.value, Block) else entry.value.sum())
