"""All constructs, by name."""

from __future__ import annotations

from hostile import batches, gradients, state, structure
from hostile.constructs import Construct

__all__ = ["CONSTRUCTS"]

_ROWS = (*gradients.ROWS, *structure.ROWS, *state.ROWS, *batches.ROWS)

CONSTRUCTS: dict[str, Construct] = {row.name: row for row in _ROWS}

assert len(CONSTRUCTS) == len(_ROWS), "two constructs have one name"
