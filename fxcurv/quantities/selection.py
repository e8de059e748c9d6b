"""Selection: the quantities requested for each parameter."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from typing import cast

from torch import nn

from fxcurv.core.errors import QuantityError
from fxcurv.quantities.protocol import Quantity
from fxcurv.quantities.registry import named, names_of

__all__ = ["Asked", "Pattern", "Selection", "chosen"]


Pattern = str | type[nn.Module]
"""A shell-style pattern of parameter names, or the type of the module that a parameter belongs to."""


OfOne = str | Quantity


Asked = OfOne | Iterable[OfOne] | Mapping[Pattern, OfOne | Iterable[OfOne] | None]
"""Quantities for every parameter, or by pattern; None requests nothing."""


@dataclass(frozen=True)
class Selection:
    """Quantities by name, and by pattern the names of the requested ones; the last matching pattern counts."""

    quantities: Mapping[str, Quantity]
    patterns: Mapping[Pattern, tuple[str, ...]]
    among: Collection[str] | None = None

    def only(self, parameters: Collection[str]) -> Selection:
        """The same selection, restricted to these parameters."""
        return replace(self, among=parameters)

    def of(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Maps each quantity to the parameters that it is requested for, by their first names and in the model's order.

        Raises a QuantityError for a pattern without a parameter, and for a trainable parameter without a pattern.
        """
        aliases = _aliases(model)
        asked: dict[str, tuple[str, ...] | None] = dict.fromkeys(aliases)
        for pattern, names in self.patterns.items():
            matched = [first for first, others in aliases.items() if any(_matches(model, n, pattern) for n in others)]
            if not matched:
                raise _matchless(pattern, aliases)
            asked |= dict.fromkeys(matched, names)
        for name, names in asked.items():
            if names is None and model.get_parameter(name).requires_grad:
                raise QuantityError(
                    f"no pattern of quantities= matches the parameter {name!r}",
                    remedy="add one, such as '*'; the value None requests nothing",
                    code="FXC409",
                )
        counted = {name: names or () for name, names in asked.items() if self.among is None or name in self.among}
        return {q: tuple(name for name, names in counted.items() if q in names) for q in self.quantities}


def chosen(quantities: Asked) -> Selection:
    """The selection for the argument `quantities`."""
    if not isinstance(quantities, Mapping):
        names = named(quantities)
        return Selection(names, {"*": tuple(names)})
    given = cast("Mapping[Pattern, OfOne | Iterable[OfOne] | None]", quantities)
    for pattern in given:
        if not isinstance(pattern, str | type):  # pyright: ignore[reportUnnecessaryIsInstance]
            remedy = "write '*.bias', as in a shell, or a type such as nn.Linear"
            raise QuantityError(f"{pattern!r} is not a pattern of parameters", remedy=remedy, code="FXC409")
    by_pattern = {pattern: _listed(asked) for pattern, asked in given.items()}
    asked = [item for items in by_pattern.values() for item in items]
    quantities_by_name = named(asked)
    names = iter(names_of(asked))
    return Selection(quantities_by_name, {p: tuple(islice(names, len(items))) for p, items in by_pattern.items()})


def _listed(asked: OfOne | Iterable[OfOne] | None) -> list[OfOne]:
    if asked is None:
        return []
    return list(asked) if isinstance(asked, Iterable) and not isinstance(asked, str) else [asked]


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Maps the first name of every parameter to all its names."""
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return aliases


def _matches(model: nn.Module, name: str, pattern: Pattern) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern)
    return isinstance(model.get_submodule(name.rpartition(".")[0]), pattern)


def _matchless(pattern: Pattern, aliases: Mapping[str, list[str]]) -> QuantityError:
    every = [name for names in aliases.values() for name in names]
    close = difflib.get_close_matches(pattern, every, n=3) if isinstance(pattern, str) else []
    shown = pattern if isinstance(pattern, str) else pattern.__name__
    return QuantityError(
        f"no parameter of the model matches {shown!r}",
        remedy=f"did you mean {' or '.join(close)}?" if close else "see model.named_parameters() for the names",
        code="FXC409",
    )
