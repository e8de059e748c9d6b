"""The interface of a quantity, and the usage of a parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol, TypedDict, get_args, get_origin, get_type_hints

from torch import Tensor

from fxcurv.blocks.base import Block
from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.contractions.statistic import Statistic, StatisticValue
from fxcurv.core.errors import QuantityError
from fxcurv.core.fingerprint import described
from fxcurv.quantities.factors import Exact, Factor, check_factor
from fxcurv.results.entry import Combine, Structure

__all__ = ["EXACT", "OfEach", "ParameterUsage", "Quantity", "Sums", "WithOptions", "owners"]


# The usage of a parameter -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterUsage:
    """Usage of a parameter with `positions` positions in all: `W[g,o,i]`, or a vector (a bias, a scale).

    `partner` is the requested bias that is added at exactly the uses of this matrix, and for that bias the matrix. With
    `in_out` the parameter is stored as `W[i,o]`; only the methods here depend on it. Unless it is `nonlinear`, the
    output is piecewise linear in it.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    outputs: int
    inputs: int
    positions: int
    matrix: bool
    partner: str | None = None
    in_out: bool = False
    nonlinear: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def joint_shape(self) -> tuple[int, int]:
        """The shape of this matrix with a bias appended: `[W | b]`, or W with b below."""
        o, i = self.groups * self.outputs, self.inputs + 1
        return (i, o) if self.in_out else (o, i)

    def to_layout(self, entries: Tensor, *lead: int) -> Tensor:
        """Convert entries `[*lead, g, o, i]` to the parameter layout: `[*lead, *shape]`."""
        if self.in_out:
            entries = entries.reshape(*lead, self.outputs, self.inputs).mT.contiguous()
        return entries.reshape((*lead, *self.shape))

    def flat(self, to_layout: Tensor) -> Tensor:
        """Convert a tensor in the parameter layout to entries `[g·o·i]`."""
        return (to_layout.mT if self.in_out else to_layout).reshape(-1)

    def matrix_to_layout(self, matrix: StatisticValue) -> StatisticValue:
        """Convert a matrix over the entries `[g·o·i]` to one over the parameter's entries, flattened."""
        if not self.in_out:
            return matrix
        if isinstance(matrix, LazyGram):
            return replace(matrix, vectors=tuple(self.to_layout(t, *t.shape[:-1]).flatten(-2) for t in matrix.vectors))
        sides = (self.outputs, self.inputs)
        return matrix.view(*sides, *sides).permute(1, 0, 3, 2).reshape(self.numel, self.numel)


Sums = Mapping[str, StatisticValue]


class Quantity(Protocol):
    """A frozen dataclass with a factor, its statistics, and the result from their sums.

    Two facts are optional: `structure`, by default "array", and `combine`, by default "refuse", with the `degree` 1;
    see `fxcurv.results.entry`.
    """

    @property
    def factor(self) -> Factor: ...

    @property
    def family(self) -> str:
        """The name of its results."""
        ...

    def owner(self, usage: ParameterUsage) -> str:
        """The parameter whose entry has this one's result: itself, or the weight that it is joined to."""
        ...

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        """The sums needed for a parameter."""
        ...

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor | Block:
        """The result, from the sums over all samples and columns, whose memory it may reuse."""
        ...

    def approximation(self, usage: ParameterUsage) -> str | None:
        """The name of the approximation to the quantity's definition, if the result is one."""
        ...


class Facts(TypedDict):
    """Facts of a quantity in an entry."""

    definition: str
    structure: Structure
    combine: Combine
    degree: int


def facts_of(quantity: Quantity) -> Facts:
    """The facts of a quantity, with defaults for missing ones; a QuantityError for an unknown value."""
    facts: Facts = {
        "definition": definition_of(quantity),
        "structure": getattr(quantity, "structure", "array"),
        "combine": getattr(quantity, "combine", "refuse"),
        "degree": getattr(quantity, "degree", 1),
    }
    for fact, value, choices in (
        ("structure", facts["structure"], get_args(Structure)),
        ("combine", facts["combine"], get_args(Combine)),
    ):
        if value not in choices:
            raise QuantityError(
                f"{type(quantity).__name__} has {fact}={value!r}",
                remedy=f"choose {' or '.join(map(repr, choices))}",
                code="FXC409",
            )
    if type(facts["degree"]) is not int or facts["degree"] < 0:  # pyright: ignore[reportUnnecessaryComparison]
        raise QuantityError(
            f"{type(quantity).__name__} has degree={facts['degree']!r}",
            remedy="give a whole number: 0 for values that do not depend on the loss, 1 for values linear in it",
            code="FXC409",
        )
    return facts


def definition_of(quantity: Quantity) -> str:
    """`KFAC(factor=Sampled(k=1), approx='expand', joint=False)`: type and options of a quantity, by value."""
    text = described(quantity)
    return f"{type(quantity).__name__}{text[text.index('(') :]}" if "(" in text else f"{type(quantity).__name__}()"


def owners(quantity: Quantity, usage: Mapping[str, ParameterUsage]) -> dict[str, tuple[str, ...]]:
    """Maps each parameter whose entry has a result of the quantity to the parameters of that result."""
    owned: dict[str, tuple[str, ...]] = {}
    for parameter in usage.values():
        owner: Any = quantity.owner(parameter)
        if not isinstance(owner, str) or owner not in usage or quantity.owner(usage[owner]) != owner:
            raise QuantityError(
                f"{type(quantity).__name__}.owner returned {owner!r} for {parameter.name!r}",
                remedy="return usage.name, or the name of another parameter with this quantity, which owns itself",
                code="FXC409",
            )
        owned[owner] = (*owned.get(owner, ()), parameter.name)
    return owned


@dataclass(frozen=True)
class WithOptions:
    """Options of a quantity, each of its field's declared type; a QuantityError for any other value."""

    structure: ClassVar[Structure] = "array"
    combine: ClassVar[Combine] = "refuse"
    degree: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for option in fields(self):
            value, kind = getattr(self, option.name), _declared(type(self), option.name)
            if option.name == "factor":
                check_factor(value, type(self).__name__)
            choices = (False, True) if kind is bool else get_args(kind) if get_origin(kind) is Literal else None
            if choices and not any(type(value) is type(selection) and value == selection for selection in choices):
                raise QuantityError(
                    f"{type(self).__name__}({option.name}={value!r})",
                    remedy=f"choose {' or '.join(map(repr, choices))}",
                    code="FXC409",
                )


def _declared(quantity: type, option: str) -> Any:
    """The declared type of an option; None where its annotation names something that the module does not have."""
    home = next(kind for kind in quantity.__mro__ if option in vars(kind).get("__annotations__", {}))
    alone = type(
        "alone", (), {"__annotations__": {option: home.__annotations__[option]}, "__module__": home.__module__}
    )
    try:
        return get_type_hints(alone)[option]
    except NameError:
        return None


@dataclass(frozen=True)
class OfEach(WithOptions):
    """A quantity of each parameter separately, always equal to its definition."""

    def owner(self, usage: ParameterUsage) -> str:
        return usage.name

    def approximation(self, usage: ParameterUsage) -> str | None:
        return None


def tensor_of(sums: Sums, name: str) -> Tensor:
    t = sums[name]
    assert isinstance(t, Tensor)
    return t


def columns_of(sums: Sums, usage: ParameterUsage) -> Tensor:
    """`[V, N, *θ]`."""
    entries = tensor_of(sums, "entries")
    return usage.to_layout(entries, *entries.shape[:2])


EXACT = Exact()
