"""JSON of a file, read strictly: every value has the type that it must have, or an error says where it has not."""

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
    """Strict JSON, in which no key comes twice and no number is NaN or infinite."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise broken(path, f"the key {twice!r} is there twice")
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
    """A value out of a file, read as the type that it must have; `at` is where it stands."""

    value: Any
    path: Path
    at: str = "manifest"

    def __getitem__(self, key: str) -> Json:
        value = self.of(dict)
        if key not in value:
            raise self.wrong(f"lacks {key!r}")
        return Json(value[key], self.path, f"{self.at}.{key}")

    def of(self, kind: type) -> Any:
        """The value, of this very type."""
        if type(self.value) is not kind:
            raise self.wrong(f"is no {kind.__name__}")
        return self.value

    def items(self) -> list[tuple[str, Json]]:
        """The members of an object."""
        return [(key, self[key]) for key in self.of(dict)]

    def each(self) -> list[Json]:
        """The members of a list."""
        return [Json(value, self.path, f"{self.at}[{k}]") for k, value in enumerate(self.of(list))]

    def texts(self) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(node.of(str) for node in self.each())

    def numbers(self) -> tuple[int, ...]:
        """A list of whole numbers, 0 or above."""
        found = tuple(node.of(int) for node in self.each())
        if any(number < 0 for number in found):
            raise self.wrong("holds a negative number")
        return found

    def wrong(self, cause: str) -> FxcurvError:
        """The error that something is not as it must be here."""
        return broken(self.path, f"{self.at} {cause}")
