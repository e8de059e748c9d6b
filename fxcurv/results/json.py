"""Strict JSON of a file: every value must have the expected type; errors give the location."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxcurv.core.errors import FxcurvError

__all__ = ["Json"]


def strict_json(path: Path, text: Any) -> Any:
    """Parse JSON strictly: no duplicate keys, no NaN or infinite numbers."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise broken(path, f"the key {twice!r} is duplicated")
        return found

    def finite(number: str) -> float:
        if math.isfinite(value := float(number)):
            return value
        raise ValueError(number)

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=finite, parse_float=finite)
    except (ValueError, TypeError, RecursionError):
        raise broken(path, "its JSON is malformed") from None


def broken(path: Path, cause: str) -> FxcurvError:
    return FxcurvError(f"{path}: {cause}", remedy="give a file that Curvature.save wrote", code="FXC423")


@dataclass(frozen=True)
class Json:
    """A JSON value of a file, read with type checks; `at` is its location."""

    value: Any
    path: Path
    at: str = "manifest"

    def __getitem__(self, key: str) -> Json:
        value = self.of(dict)
        if key not in value:
            raise self.wrong(f"lacks {key!r}")
        return Json(value[key], self.path, f"{self.at}.{key}")

    def of(self, kind: type) -> Any:
        """Return the value, if it has exactly this type."""
        if type(self.value) is not kind:
            raise self.wrong(f"is not of type {kind.__name__}")
        return self.value

    def items(self) -> list[tuple[str, Json]]:
        """Return the members of an object."""
        return [(key, self[key]) for key in self.of(dict)]

    def each(self) -> list[Json]:
        """Return the members of a list."""
        return [Json(value, self.path, f"{self.at}[{k}]") for k, value in enumerate(self.of(list))]

    def texts(self) -> tuple[str, ...]:
        """Return a list of strings."""
        return tuple(node.of(str) for node in self.each())

    def numbers(self) -> tuple[int, ...]:
        """Return a list of integers, 0 or above."""
        found = tuple(node.of(int) for node in self.each())
        if any(number < 0 for number in found):
            raise self.wrong("holds a negative number")
        return found

    def wrong(self, cause: str) -> FxcurvError:
        """Return an error about the value at this location."""
        return broken(self.path, f"{self.at} {cause}")
