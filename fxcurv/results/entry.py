"""Entries: one result for each parameter × quantity, with its status."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fxcurv.blocks.base import Block
from fxcurv.core.errors import QuantityError

__all__ = ["Combine", "Entries", "Entry", "Structure"]


Structure = Literal["vector", "diagonal", "block", "array"]
"""A vector such as a gradient, the diagonal of a matrix, a block, or an array of any other shape."""

Combine = Literal["add", "concatenate", "refuse"]
"""Merging of the values of two batches: weighted sum, concatenation of samples along axis 0, or an error."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter × quantity: its status, and its value if computed.

    `status` is `exact` (equal to the quantity's definition), `approx(<name>)`, `fallback` (exact or named, by plain
    autograd), `frozen` (requires_grad is False), `unreached` (the output does not depend on it) or `unsupported`;
    `reason` explains the last status, or a fallback. `value` is a tensor of the parameter's shape or a block;
    `definition` is the quantity with its options; `structure` and `combine` are properties of the quantity. If the
    loss is scaled by c, values scale by c to the power `degree`.
    """

    quantity: str
    parameter: str
    shape: tuple[int, ...]
    status: str
    factor: str
    reduction: str
    value: Tensor | Block | None = None
    reason: str = ""
    definition: str = ""
    structure: Structure = "array"
    combine: Combine = "refuse"
    degree: int = 1

    def tensors(self) -> dict[str, Tensor]:
        """Return the entry's stored tensors by name; a plain tensor is called `value`."""
        if self.value is None:
            return {}
        return self.value.tensors if isinstance(self.value, Block) else {"value": self.value}

    def form(self) -> str:
        """Return the type of the value: a block class, `tensor`, or `-` for none."""
        if self.value is None:
            return "-"
        return type(self.value).__name__ if isinstance(self.value, Block) else "tensor"


class Entries(Mapping[str, Any]):
    """Values of one quantity by parameter name, in `named_parameters()` order, with `.status` of each."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = {entry.parameter: entry for entry in entries}

    @property
    def status(self) -> dict[str, str]:
        """Status of every parameter, including parameters without a value."""
        return {name: entry.status for name, entry in self.entries.items()}

    def __getitem__(self, parameter: str) -> Any:
        if parameter not in self.entries:
            raise QuantityError(
                f"the model has no parameter {parameter!r}", remedy="see result.table() for the names", code="FXC410"
            )
        entry = self.entries[parameter]
        if entry.value is None:
            why = f" ({entry.reason})" if entry.reason else ""
            raise QuantityError(
                f"{entry.quantity} of {parameter!r} has no value: {entry.status}{why}",
                remedy=_REMEDIES.get(entry.status),
                code="FXC410",
            )
        return entry.value

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.entries and self.entries[str(parameter)].value is not None

    def __iter__(self) -> Iterator[str]:
        return (name for name, entry in self.entries.items() if entry.value is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


_REMEDIES = {
    "frozen": "set requires_grad_(True) on it",
    "unreached": "its curvature is zero: the output does not depend on it",
    "unsupported": "compile with on_unsupported='fallback'",
}
