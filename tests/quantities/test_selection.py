"""Which quantities of which parameter: patterns, module types, precedence, and errors instead of silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
import reference
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


# Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_a_name_always_has_its_own_quantity(model: nn.Sequential, swapped: bool) -> None:
    """Objects of the same family are numbered around a requested name, in any order."""
    model, loss = model.double(), nn.CrossEntropyLoss()
    asked = [fxcurv.DiagGGN(fxcurv.Empirical()), "diag_ggn"]
    result = fxcurv.compile(model, loss, asked[::-1] if swapped else asked)(X, Y)
    exact = reference.diag_ggn(model, loss, X, Y)
    columns = reference.empirical_columns(loss, reference.outputs(model, X), Y)
    empirical = reference.diagonal(model, X, columns)
    assert set(result) == {"diag_ggn", "diag_ggn_1"}
    for name in exact:
        torch.testing.assert_close(result["diag_ggn"][name], exact[name])
        torch.testing.assert_close(result["diag_ggn_1"][name], empirical[name])


@dataclass(frozen=True)
class Foo(fxcurv.DiagGGN):
    """A quantity of a family that other objects' numbers may meet, with an option that `==` cannot compare."""

    family: str = "foo"  # pyright: ignore[reportGeneralTypeIssues]
    option: Any = None


KFAC, EMPIRICAL, REDUCE = fxcurv.KFAC(), fxcurv.KFAC(fxcurv.Empirical()), fxcurv.KFAC(fxcurv.Exact(), approx="reduce")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["kfac_empirical", EMPIRICAL], {"kfac_empirical": EMPIRICAL, "kfac": EMPIRICAL}),
        ([EMPIRICAL, "kfac_empirical"], {"kfac": EMPIRICAL, "kfac_empirical": EMPIRICAL}),
        ([REDUCE, "kfac"], {"kfac_1": REDUCE, "kfac": KFAC}),
        (["kfac", KFAC, REDUCE, REDUCE], {"kfac": KFAC, "kfac_1": REDUCE}),
        (
            [Foo(option=k) for k in range(3)] + [Foo(family="foo_2")],
            {f"foo{end}": Foo(option=k) for k, end in enumerate(("", "_1", "_3"))} | {"foo_2": Foo(family="foo_2")},
        ),
        ([Foo(option=[1]), Foo(option=[1]), Foo(option=[2])], {"foo": Foo(option=[1]), "foo_1": Foo(option=[2])}),
    ],
    ids=str,
)
def test_no_result_is_overwritten(asked: list[Any], expected: dict[str, Any]) -> None:
    for selection in (chosen(asked), chosen({f"*{k}": item for k, item in enumerate(asked)})):
        assert dict(selection.quantities) == expected
    names = chosen({f"*{k}": item for k, item in enumerate(asked)}).patterns.values()
    assert [expected[name] for (name,) in names] == [fxcurv.NAMES.get(q, q) if isinstance(q, str) else q for q in asked]


def test_a_family_must_be_a_name() -> None:
    with pytest.raises(fxcurv.QuantityError, match=r"Foo has family=3; give a name"):
        chosen(Foo(family=3))  # pyright: ignore[reportArgumentType]
