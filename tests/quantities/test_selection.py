"""Which quantities of which parameter: patterns, module types, precedence, and errors instead of silence."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from samples import seeded
from torch import nn

import fxcurv
from fxcurv.quantities.selection import chosen


@pytest.fixture
def model() -> nn.Sequential:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))

    return cast("nn.Sequential", seeded(make, "choice"))


X, Y = torch.arange(12.0, dtype=torch.float64).view(4, 3).sin(), torch.tensor([0, 1, 2, 1])


def test_the_last_pattern_that_matches_counts(model: nn.Sequential) -> None:
    asked = {"*": "kfac", "*.bias": ["diag_ggn", "grad"], nn.LayerNorm: None, "1.weight": "diag_ggn"}
    result = fxcurv.compile(model, quantities=asked)(X, Y)
    found = {quantity: sorted(entries) for quantity, entries in result.items()}
    biases = ["0.bias", "3.bias"]
    assert found == {"kfac": ["0.weight", "3.weight"], "diag_ggn": ["0.bias", "1.weight", "3.bias"], "grad": biases}
    assert "1.bias" not in result["diag_ggn"].status


def test_values_do_not_depend_on_what_is_asked_of_others(model: nn.Sequential) -> None:
    everything = fxcurv.compile(model, quantities=["diag_ggn", "kflr"])(X, Y)
    some = fxcurv.compile(model, quantities={"*": None, "0.*": "diag_ggn", "3.weight": "kflr"})(X, Y)
    for name in ("0.weight", "0.bias"):
        torch.testing.assert_close(some["diag_ggn"][name], everything["diag_ggn"][name])
    torch.testing.assert_close(some["kflr"]["3.weight"].G, everything["kflr"]["3.weight"].G)


def test_columns_are_carried_no_further_than_asked(model: nn.Sequential) -> None:
    compiled = fxcurv.compile(model, quantities={"*": None, "3.*": "diag_ggn"}, example_inputs=X)
    assert not any(str(n.target).startswith("pull.") for n in compiled.stages["backward[exact]"].graph.nodes)


def test_a_joint_bias_needs_the_same_quantity(model: nn.Sequential) -> None:
    joint = fxcurv.KFAC(fxcurv.Exact(), joint=True)
    together = fxcurv.compile(model, quantities={"*": joint})(X, Y)["kfac"]
    assert together["0.weight"].A.shape == (4, 4)
    alone = fxcurv.compile(model, quantities={"*": joint, "0.bias": "diag_ggn"})(X, Y)["kfac"]
    assert alone["0.weight"].A.shape == (3, 3)


def test_tied_parameters_match_by_any_of_their_names() -> None:
    a, b = nn.Linear(3, 3, device="meta"), nn.Linear(3, 3, device="meta")
    b.weight = a.weight
    tied = nn.ModuleDict({"a": a, "b": b})
    selection = chosen({"*": "grad", "b.weight": "kfac"})
    assert selection.of(tied) == {"grad": ("a.bias", "b.bias"), "kfac": ("a.weight",)}


def test_a_parameter_without_a_pattern_is_an_error(model: nn.Sequential) -> None:
    with pytest.raises(fxcurv.QuantityError, match=r"matches the parameter '0\.bias'.*None requests nothing"):
        fxcurv.compile(model, quantities={"*.weight": "kfac"})
    for name in ("0.bias", "1.bias", "3.bias"):
        model.get_parameter(name).requires_grad_(False)
    fxcurv.compile(model, quantities={"*.weight": "kfac"})


def test_a_pattern_without_a_parameter_is_an_error(model: nn.Sequential) -> None:
    with pytest.raises(fxcurv.QuantityError, match=r"matches '0\.wieght'; did you mean 0\.weight"):
        fxcurv.compile(model, quantities={"*": "kfac", "0.wieght": "diag_ggn"})
    with pytest.raises(fxcurv.QuantityError, match="matches 'Conv2d'"):
        fxcurv.compile(model, quantities={"*": "kfac", nn.Conv2d: "diag_ggn"})


def test_nothing_at_all_is_an_error(model: nn.Sequential) -> None:
    with pytest.raises(fxcurv.QuantityError, match="no quantity was requested"):
        fxcurv.compile(model, quantities={"*": None})
