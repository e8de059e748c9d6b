"""fxcurv.core.identity: equal keys for equal computations alone, and never by the name that an object shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.contractions.statistic import Statistic
from fxcurv.core.fingerprint import digest
from fxcurv.core.identity import frozen, identity_of, structure_of
from fxcurv.linalg.cost import Cost
from fxcurv.quantities.factors import Exact


class Option(nn.Module):
    """A module with an option that its repr does not show."""

    def __init__(self, option: object) -> None:
        super().__init__()
        self.option = option


@dataclass(frozen=True)
class Fields:
    value: float


class Lying(float):
    def __repr__(self) -> str:
        return "1.0"


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (1, True), (0.0, -0.0), (Lying(2.0), Lying(3.0)), (Fields(1.0), Fields(2.0)), ([1], (1,)), ({1}, {2})],
    ids=str,
)
def test_values_that_a_computation_can_tell_apart_have_different_keys(one: object, other: object) -> None:
    assert frozen(one) != frozen(other)
    assert identity_of(Option(one)) != identity_of(Option(other))
    assert structure_of(Option(one)) != structure_of(Option(other))


@pytest.mark.parametrize("make", [lambda: [1, "a"], lambda: math.nan, lambda: Fields(math.nan), lambda: {2, 1}, dict])
def test_equal_values_have_equal_keys(make: Any) -> None:
    assert frozen(make()) == frozen(make())
    assert identity_of(Option(make())) == identity_of(Option(make()))


def test_a_tensor_counts_by_object_in_an_identity_and_by_shape_in_a_structure() -> None:
    first, second, wider = (nn.utils.skip_init(nn.Linear, 2, out) for out in (3, 3, 4))
    assert identity_of(first) == identity_of(first) != identity_of(second)
    assert structure_of(first) == structure_of(second) != structure_of(wider)


def test_a_digest_reads_every_value_of_an_array() -> None:
    first, second = np.zeros(5000), np.zeros(5000)
    second[2500] = 1.0
    assert repr(first) == repr(second)
    assert digest({"x": first}) != digest({"x": second})


class PowerSum(Statistic):
    """Σ |S|ᵖ, of an option that no `extra_repr` shows."""

    reads = "S"

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def forward(self, Ss: Any) -> torch.Tensor:
        return sum(S.abs().pow(self.power).sum() for S in Ss).reshape(1)  # pyright: ignore[reportAttributeAccessIssue]

    def cost(self, Ss: Any) -> Cost:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Cost(0, 0)


@dataclass(frozen=True)
class Power:
    """The sum of a power of the backpropagated square roots."""

    power: int
    factor: Any = Exact()

    @property
    def family(self) -> str:
        return f"power_{self.power}"

    def owner(self, usage: Any) -> str:
        return usage.name

    def statistics(self, usage: Any) -> dict[str, Statistic]:
        return {"sum": PowerSum(self.power)}

    def finish(self, usage: Any, sums: Any, samples: int) -> torch.Tensor:
        return sums["sum"]

    def approximation(self, usage: Any) -> str | None:
        return None


def test_two_statistics_with_different_options_are_computed_apart() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    loss = nn.CrossEntropyLoss()
    both = fxcurv.compile(model, loss, [Power(2), Power(4)])(x, y)
    for power in (2, 4):
        alone = fxcurv.compile(model, loss, [Power(power)])(x, y)[f"power_{power}"]
        for name, value in both[f"power_{power}"].items():
            assert torch.equal(value, alone[name])
    assert not torch.equal(both["power_2"]["0.weight"], both["power_4"]["0.weight"])
