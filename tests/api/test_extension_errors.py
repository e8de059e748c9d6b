"""Extensions that are wrong or unusual: the right value, or an error that names the extension and its mistake."""

from __future__ import annotations

import copy
import sys
import types
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.blocks.base import KINDS as BLOCKS
from fxcurv.blocks.base import Block
from fxcurv.contractions.definitions import SumOfSquares
from fxcurv.contractions.entries import per_sample
from fxcurv.contractions.statistic import Statistic
from fxcurv.core.fingerprint import described
from fxcurv.ir.declare import RULES
from fxcurv.losses.base import KINDS as LOSSES
from fxcurv.losses.base import Loss, as_loss
from fxcurv.losses.mse import MeanSquaredError
from fxcurv.losses.terms import ScalarTerms
from fxcurv.optim.preconditioned import _average
from fxcurv.quantities.factors import Exact, SecondPass
from fxcurv.quantities.protocol import OfEach, ParameterUsage
from fxcurv.quantities.registry import NAMES
from fxcurv.results.entry import Entries, Entry
from fxcurv.results.merging import check_sums
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.run import Minibatch
from fxcurv.testing import check_quantity
from passes import pipeline

TABLES: tuple[dict[Any, Any], ...] = (BLOCKS, LOSSES, NAMES, RULES)


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Every table of extensions as before, after the test."""
    before = [dict(table) for table in TABLES]
    yield
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net = net.to_empty(device="cpu").double()
    for seed, p in enumerate(net.parameters()):
        p.data.copy_(normal(*p.shape, seed=seed + 1) / 2)
    return net.eval()


X, Y = normal(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
PARTS = [(X[:2], Y[:2]), (X[2:], Y[2:])]
"""Batches of different sizes."""


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@dataclass(frozen=True)
class Squares:
    """A quantity of the sum of squares of every entry's columns, the base of those below."""

    factor: Any = Exact()
    family = "squares"
    combine = "add"
    structure = "array"

    def owner(self, usage: Any) -> str:
        return usage.name

    def statistics(self, usage: Any) -> dict[str, Any]:
        return {"diagonal": SumOfSquares()}

    def finish(self, usage: Any, sums: Any, samples: int) -> Any:
        return usage.to_layout(sums["diagonal"])

    def approximation(self, usage: Any) -> str | None:
        return None


# Blocks with options ----------------------------------------------------------------------------------------------


def scaled_kind() -> Any:
    """A kind of block with an option that its matrix depends on, and a count."""

    @dataclass(frozen=True, eq=False)
    class Scaled(Block):
        fields: ClassVar = {"values": "values"}
        options: ClassVar = {"scale": float, "inputs": int}

        values: Tensor
        scale: float = 1.0
        inputs: int = 1

        @classmethod
        def fits(cls, shape: Any, sizes: Any) -> bool:
            return list(sizes) == [torch.Size(shape)]

        tensors = property(lambda self: {"values": self.values})
        count = property(lambda self: self.inputs)
        _like = property(lambda self: self.values)

        def counted(self, count: int) -> Any:
            return replace(self, inputs=count)

        def _mm(self, matrix: Tensor) -> Tensor:
            return self.diag().reshape(-1, 1) * matrix

        def dense(self) -> Tensor:
            return self.diag().reshape(-1).diag()

        def diag(self) -> Tensor:
            return self.values * self.scale

        def _mapped(self, f: Any) -> Any:
            return replace(self, values=f(self.diag()), scale=1.0)

        def eigvalsh(self) -> Tensor:
            return self.diag().flatten().sort().values

        def eigh(self) -> Any:
            return torch.linalg.eigh(self.dense())

        def __mul__(self, factor: float) -> Any:
            return replace(self, values=self.values * factor)

    return Scaled


def scaled_quantity(kind: Any, scale: Any) -> Any:
    """Blocks `Scaled` of the diagonal GGN, whose option is a function of the number of samples."""

    @dataclass(frozen=True)
    class OfScale(Squares):
        family = "of_scale"
        structure = "block"

        def finish(self, usage: Any, sums: Any, samples: int) -> Any:
            return kind(usage.shape, usage.to_layout(sums["diagonal"]) / scale(samples), scale(samples), samples)

    return OfScale()


def test_blocks_with_other_options_do_not_add(net: nn.Module) -> None:
    kind = scaled_kind()
    one, two = (kind((4,), normal(4).abs(), scale, 3) for scale in (2.0, 3.0))
    assert one.plus(two) is None
    close((one + replace(one, inputs=5)).dense(), 2 * one.dense())
    with pytest.raises(fxcurv.InputError, match=r"two Scaled blocks have different options: scale is 2.0 and 3.0; add"):
        _ = one + two
    close((one.as_dense() + two.as_dense()).dense(), one.dense() + two.dense())


def test_results_with_other_options_do_not_merge(net: nn.Module, tmp_path: Path) -> None:
    loss, kind = nn.CrossEntropyLoss(), scaled_kind()
    equal, differing = scaled_quantity(kind, lambda n: 3.0), scaled_quantity(kind, float)
    expected = reference.diag_ggn(net, loss, X, Y)
    compiled = fxcurv.compile(net, loss, equal)
    for found in (compiled.accumulate(PARTS, progress=False), fxcurv.merge(*(compiled(*part) for part in PARTS))):
        for name, value in expected.items():
            close(found["of_scale"][name].diag(), value)
            assert found["of_scale"][name].inputs == 6
    other, says = fxcurv.compile(net, loss, differing), "has different options in the two results: scale is 2.0 and 4.0"
    with pytest.raises(fxcurv.FxcurvError, match=says):
        other.accumulate(PARTS, progress=False)
    with pytest.raises(fxcurv.FxcurvError, match=says):
        fxcurv.merge(*(other(*part) for part in PARTS))
    accumulator = other.accumulator(decay=0.5)
    accumulator.update(PARTS[0])
    with pytest.raises(fxcurv.FxcurvError, match=says):
        accumulator.update(PARTS[1])
    assert check_quantity(equal, net, loss, X, Y) is None


def test_a_running_average_of_other_options_is_refused(net: nn.Module) -> None:
    kind = scaled_kind()
    one, two = (kind((4,), normal(4).abs(), scale, 3, parameters=("w",)) for scale in (2.0, 3.0))
    close(_average(one, replace(one, values=one.values * 3), 0.5).dense(), 2 * one.dense())
    with pytest.raises(fxcurv.QuantityError, match=r"the block of 'w' changes its options: scale is 2.0 and 3.0"):
        _average(one, two, 0.5)


def test_the_checker_compares_options_and_matrices(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks with equal tensors and different options are different."""
    quantity, calls = scaled_quantity(scaled_kind(), lambda n: 3.0), []
    finish = type(quantity).finish

    def wrong(self: Any, usage: Any, sums: Any, samples: int) -> Any:
        block = finish(self, usage, sums, samples)
        calls.append(usage.name)
        return replace(block, scale=4.0) if calls.count(usage.name) == 2 else block

    monkeypatch.setattr(type(quantity), "finish", wrong)
    with pytest.raises(AssertionError, match=r"of_scale, compiled and by autograd: (scale|the matrix) of '0.weight'"):
        check_quantity(quantity, net, nn.CrossEntropyLoss(), X, Y)


# Degree in the loss -----------------------------------------------------------------------------------------------


def of_degree(exponent: int) -> Any:
    """A quantity that adds and scales as the loss to the power of `exponent`."""

    @dataclass(frozen=True)
    class OfDegree(Squares):
        family = f"of_degree_{exponent}"
        degree = exponent
        factor: Any = (fxcurv.Exact(), fxcurv.Exact(), None)[exponent]

        def finish(self, usage: Any, sums: Any, samples: int) -> Any:
            return torch.tensor(float(samples)).double() if exponent == 0 else usage.to_layout(sums["diagonal"])

    if exponent == 2:  # squared gradients
        return replace(OfDegree(fxcurv.SumGradSquared().factor))
    return OfDegree()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sum_of_batches_has_the_degree_of_the_quantity(net: nn.Module, reduction: Any, tmp_path: Path) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    quantities = [of_degree(k) for k in range(3)]
    compiled = fxcurv.compile(net, loss, quantities)
    samples = reference.batch_grad(net, loss, X, Y)
    diagonal = reference.diag_ggn(net, loss, X, Y)
    merged = fxcurv.merge(*(compiled(*part) for part in PARTS))
    three = [(X[:1], Y[:1]), (X[1:3], Y[1:3]), (X[3:], Y[3:])]
    results = merged, compiled(X, Y), *(compiled.accumulate(parts, progress=False) for parts in (PARTS, three))
    for found in results:
        for name in samples:
            close(found["of_degree_0"][name], torch.tensor(6.0).double())
            close(found["of_degree_1"][name], diagonal[name])
            close(found["of_degree_2"][name], samples[name].square().sum(0))
    for quantity in quantities:
        assert check_quantity(quantity, net, loss, X, Y) is None


def test_what_processes_cannot_add_is_refused(net: nn.Module) -> None:
    @dataclass(frozen=True)
    class Counted(Squares):
        whole: bool = False

        def finish(self, usage: Any, sums: Any, samples: int) -> Any:
            return torch.tensor(samples) if self.whole else sums["diagonal"]

    @dataclass(frozen=True)
    class Apart(Counted):
        combine = "concatenate"

    for quantity, says in (
        (Counted(whole=True), "of type torch.int64, which processes do not add"),
        (Apart(), "holds the samples of this process"),
    ):
        result = fxcurv.compile(net, "cross_entropy", quantity)(X, Y)
        with pytest.raises(fxcurv.FxcurvError, match=f"squares of '0.weight' .*{says}") as raised:
            check_sums(result)
        assert raised.value.code == "FXC425"


def test_a_wrong_degree_is_refused(net: nn.Module) -> None:
    @dataclass(frozen=True)
    class Wrong(Squares):
        degree = 0.5

    with pytest.raises(fxcurv.QuantityError, match=r"Wrong has degree=0.5; give a whole number"):
        fxcurv.compile(net, nn.CrossEntropyLoss(), Wrong())(X, Y)


# Losses with settings ---------------------------------------------------------------------------------------------


class Weighted(nn.MSELoss):
    """A squared error with a setting of any type, that nothing shows."""

    def __init__(self, setting: object) -> None:
        super().__init__()
        self.setting = setting


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1.0, 2.0), (1.0, 3.0)),
        ([1, [2, {"a": 3}]], [1, [2, {"a": 4}]]),
        ({"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0])}),
        (nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))),
        (np.zeros(5000), np.append(np.zeros(4999), 1.0)),
        (Exact(), fxcurv.Sampled(2)),
        (lambda f: f + 1, lambda f: f + 2),
        ({1, 2}, {1, 3}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_checkpoint_of_another_loss_is_refused(net: nn.Module, one: Any, other: Any, tmp_path: Path) -> None:
    class OfWeighted(MeanSquaredError):
        name = "weighted_error"
        module_type = Weighted

    target = normal(6, 2, seed=9)
    batches, path = [(X[:3], target[:3]), (X[3:], target[3:])], tmp_path / "checkpoint"
    first = fxcurv.compile(net, OfWeighted(Weighted(one)), "grad")
    first.accumulate(batches, checkpoint=path, progress=False)
    again = fxcurv.compile(net, OfWeighted(Weighted(copy.deepcopy(one))), "grad")
    again.accumulate(batches, checkpoint=path, progress=False)
    with pytest.raises(fxcurv.FxcurvError, match="loss: ") as raised:
        fxcurv.compile(net, OfWeighted(Weighted(other)), "grad").accumulate(batches, checkpoint=path, progress=False)
    assert raised.value.code == "FXC427"


def test_descriptions_tell_values_apart_and_do_not_depend_on_the_object() -> None:
    class Slots:
        __slots__ = ("a",)

    class Lying(float):
        def __repr__(self) -> str:
            return "1.0"

    def slots(a: object) -> Slots:
        held = Slots()
        held.a = a
        return held

    pairs = [
        (slots([1]), slots([2])),
        (Lying(1.0), Lying(2.0)),
        (partial(max, 1), partial(max, 2)),
        (range(3), range(4)),
        (deque([1]), deque([2])),
        (0.0, -0.0),
        (nn.Linear, nn.Conv1d),
        (torch.relu, torch.tanh),
        ([1], (1,)),
    ]
    for one, other in pairs:
        assert described(one) == described(copy.deepcopy(one)) != described(other)
    cyclic: list[object] = [1]
    cyclic.append(cyclic)
    assert described(cyclic) == "[1, …]"


# Factors ----------------------------------------------------------------------------------------------------------


class NotAFactor:
    def __repr__(self) -> str:
        return "mine"


@pytest.mark.parametrize(
    ("factor", "says"),
    [
        (fxcurv.Exact, "the class Exact"),
        (None, "None"),
        ("exact", "'exact'"),
        (NotAFactor(), "mine"),
        (SecondPass(Exact()), "SecondPass"),
    ],
    ids=str,
)
def test_a_wrong_factor_is_refused_when_compiling(net: nn.Module, factor: Any, says: str) -> None:
    for make in (lambda: Squares(factor), lambda: fxcurv.DiagGGN(factor)):
        with pytest.raises(fxcurv.QuantityError, match=rf"{says}.* is not a factor, in (Squares|DiagGGN)") as raised:
            fxcurv.compile(net, "cross_entropy", make())
        assert raised.value.code == "FXC409"
    terms = as_loss("cross_entropy").terms(net(X), Y)
    if not isinstance(factor, SecondPass):
        with pytest.raises(fxcurv.LossError, match="is not a factor"):
            next(terms.columns(factor, 1, None))


def test_a_quantity_without_a_factor_is_refused(net: nn.Module) -> None:
    class Without:
        family = "without"

        def statistics(self, usage: Any) -> dict[str, Any]:
            return {}

    with pytest.raises(fxcurv.QuantityError, match="None is not a factor, in Without"):
        fxcurv.compile(net, "cross_entropy", Without())  # pyright: ignore[reportArgumentType]


# Results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "value", "says"),
    [
        ("array", None, "returned None; return a tensor or a block"),
        ("array", 3.0, "returned a float; return a tensor or a block"),
        ("array", (X, X), "returned a tuple; return a tensor or a block"),
        ("array", fxcurv.Diagonal, "returned the class Diagonal; return a tensor or a block"),
        ("array", fxcurv.Diagonal((2,), X[0, :2]), r"returned a block on \[2\]; give the block the shape of the param"),
        (
            "array",
            X.to_sparse(),
            "returned a tensor of type torch.float64, torch.sparse_coo; return a dense real tensor",
        ),
        ("array", X.to(torch.complex64), "returned a tensor of type torch.complex64, torch.strided; return a dense"),
        ("block", X, "returned a tensor; return a block, or set another structure"),
        ("vector", X, r"returned a tensor of shape \[6, 3\]; return one of \[4, 3\], or set structure='array'"),
        ("vector", X[:4].long(), "returned a tensor of type torch.int64; return floating point"),
        (
            "diagonal",
            fxcurv.Diagonal((4, 3), X[:4]),
            "returned a Diagonal block; return a tensor, or set structure='bl",
        ),
    ],
    ids=str,
)
def test_a_wrong_result_is_refused(net: nn.Module, structure: str, value: Any, says: str) -> None:
    @dataclass(frozen=True)
    class Finished(Squares):
        def finish(self, usage: Any, sums: Any, samples: int) -> Any:
            return value

    Finished.structure = structure
    (compiled, y) = fxcurv.compile(net, "cross_entropy", {"*": None, "0.weight": Finished()}), Y
    for call in (lambda: compiled(X, y), lambda: by_autograd(net, compiled.loss, compiled.selection, Minibatch(X, y))):
        with pytest.raises(fxcurv.QuantityError, match=f"squares of '0.weight'.*Finished.finish {says}") as raised:
            call()
        assert raised.value.code == "FXC409"


@pytest.mark.parametrize("owner", [None, 3, "nothing", "0.bias", "2.weight"])
def test_a_wrong_owner_is_refused(net: nn.Module, owner: Any) -> None:
    @dataclass(frozen=True)
    class Owned(Squares):
        def owner(self, usage: Any) -> str:
            return owner if usage.name == "0.weight" else "0.weight" if usage.name == "0.bias" else usage.name

    compiled = fxcurv.compile(net, "cross_entropy", {"*": None, "0.*": Owned()})
    with pytest.raises(fxcurv.QuantityError, match=r"Owned.owner returned .* for '0.(weight|bias)'; return usage.name"):
        compiled(X, Y)


def test_statistics_must_be_statistics(net: nn.Module) -> None:
    @dataclass(frozen=True)
    class Wrong(Squares):
        def statistics(self, usage: Any) -> Any:
            return [SumOfSquares()]

    with pytest.raises(fxcurv.QuantityError, match=r"squares of '0.weight': Wrong.statistics returned a list; return"):
        fxcurv.compile(net, "cross_entropy", Wrong())(X, Y)


# Algorithms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["unfold", ["unfold"], {"0": ["unfold"]}, {nn.Conv2d: "unfold"}])
def test_algorithms_of_another_type_are_refused(net: nn.Module, given: Any) -> None:
    with pytest.raises(fxcurv.QuantityError, match=r"algorithms=.* is not a dict of names.*FXC409"):
        fxcurv.compile(net, algorithms=given)


def test_an_algorithm_of_the_first_pass_holds_in_two_passes() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).double().eval()
        x, y = torch.randn(6, 1, 4, 4).double(), torch.randint(3, (6,))
    compiled = fxcurv.compile(model, "cross_entropy", "ekfac_exact", algorithms={"0": "unfold"})
    found = compiled.accumulate([(x[:3], y[:3]), (x[3:], y[3:])], progress=False)["ekfac_exact"]
    expected = compiled(x, y)["ekfac_exact"]
    for name, block in expected.items():
        torch.testing.assert_close(found[name].dense(), block.dense())


def test_a_statistic_without_a_cost_is_explained(net: nn.Module) -> None:
    class Fourth(Statistic):
        reads = "xS"

        def forward(self, xs: Any, Ss: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return per_sample(xs, Ss).pow(4).sum((0, 1))

    class Fourths(OfEach):
        factor, family, combine, structure = Exact(), "fourths", "refuse", "array"

        def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
            return {"fourth": Fourth()}

        def finish(self, usage: ParameterUsage, sums: Any, samples: int) -> Tensor:
            return usage.to_layout(sums["fourth"])

    assert fxcurv.compile(net, "cross_entropy", Fourths()).explain(X).seconds > 0  # pyright: ignore[reportArgumentType]


# Files ------------------------------------------------------------------------------------------------------------


def with_value(value: Any, **entry: Any) -> fxcurv.Curvature:
    """A result of one value."""
    if isinstance(value, Block):
        value = replace(value, parameters=("w",))
    given = {"value": value, "structure": "array", "factor": "exact", "reduction": "sum", "status": "exact", **entry}
    entries = Entries([Entry("q", "w", (2,), **given)])
    return fxcurv.Curvature({"q": entries}, torch.tensor(1.0), torch.zeros(1, 0), 1, "sum")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16, torch.float64])
def test_integers_and_booleans_are_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.tensor([[1, 0, 1]]).to(dtype)
    with_value(value).save(tmp_path / "a")
    found = fxcurv.load(tmp_path / "a")["q"]["w"]
    assert found.dtype == dtype
    assert torch.equal(found, value)


def own_kind(declared: type, option: Any, right: bool = True) -> Any:
    @dataclass(frozen=True, eq=False)
    class Optioned(fxcurv.Diagonal):
        options: ClassVar = {"option": declared}
        option: Any = None

        @classmethod
        def fits(cls, shape: Any, sizes: Any) -> bool:
            return right and super().fits(shape, sizes)

    return Optioned((2,), torch.ones(2), option=option)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: with_value(torch.ones(2).to(torch.complex64)), "q/w cannot be saved: it is of type torch.complex64"),
        (lambda: with_value(own_kind(float, 3)), r"it has option=3, not a finite value of type float"),
        (lambda: with_value(own_kind(int, True)), r"it has option=True, not a finite value of type int"),
        (lambda: with_value(own_kind(float, float("nan"))), r"it has option=nan, not a finite value of type float"),
        (lambda: with_value(own_kind(tuple, (1, 2))), r"it has the option option, and options are numbers"),
        (lambda: with_value(own_kind(float, np.float64(3.0))), r"it has option=.*3.0.*, not a finite value of type"),
        (lambda: with_value(own_kind(float, 3.0, False)), r"it has tensors that do not fit a Optioned block on \[2\]"),
        (
            lambda: with_value(fxcurv.Diagonal((2,), torch.ones(2, dtype=torch.int64))),
            "the tensor values of type torch.i",
        ),
        (lambda: with_value(torch.ones(3), structure="vector"), "it has the value or shape of another parameter"),
        (lambda: with_value(torch.ones(2), structure="tensor"), "it has a structure that is not one of vector"),
        (lambda: with_value(torch.ones(2), degree=0.5), "it has a degree that is not a whole number"),
        (lambda: replace(with_value(torch.ones(2)), samples=2), "the result cannot be saved: it has an invalid loss"),
        (lambda: replace(with_value(torch.ones(2)), divisor=float("nan")), "it has an invalid loss"),
        (lambda: replace(with_value(torch.ones(2)), reduction="none"), "a reduction that is neither mean nor sum"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(make: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(fxcurv.FxcurvError, match=says) as raised:
        make().save(tmp_path / "a")
    assert raised.value.code == "FXC423"
    assert not list(tmp_path.iterdir())


def test_two_tensors_of_one_name_are_not_saved(tmp_path: Path) -> None:
    result = with_value(torch.ones(2))
    other = Entries([replace(result["q"].entries["w"], quantity="q/w", parameter="value/v", value=torch.ones(2))])
    first = Entries([replace(result["q"].entries["w"], quantity="q", parameter="w/value/v")])
    with pytest.raises(fxcurv.FxcurvError, match="q/w/value/v/value cannot be saved: it is the name of two tensors"):
        replace(result, quantities={"q": first, "q/w": other}).save(tmp_path / "a")


@pytest.mark.parametrize("kind", ["count", "flag"])
def test_quantities_of_integers_and_booleans(net: nn.Module, kind: str, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Counted(Squares):
        """How many entries of the diagonal are not zero; or whether there are any."""

        family = "counted"
        degree = 0
        combine = "add" if kind == "count" else "refuse"

        def finish(self, usage: Any, sums: Any, samples: int) -> Any:
            return torch.tensor(samples) if kind == "count" else usage.to_layout(sums["diagonal"]) > 0

    loss = nn.CrossEntropyLoss()
    assert check_quantity(Counted(), net, loss, X, Y) is None
    compiled = fxcurv.compile(net, loss, Counted())
    if kind == "count":
        for dtype in (None, torch.float64):
            found = compiled.accumulate(PARTS, dtype=dtype, progress=False)["counted"]["0.weight"]
            assert (found.dtype, found.item()) == (torch.int64, 6)
    else:
        assert torch.equal(compiled(X, Y)["counted"]["0.weight"], torch.ones(4, 3, dtype=torch.bool))


def test_integers_and_booleans_have_no_weighted_sum(net: nn.Module) -> None:
    @dataclass(frozen=True)
    class Whole(Squares):
        flags: bool = False

        def finish(self, usage: Any, sums: Any, samples: int) -> Any:
            return usage.to_layout(sums["diagonal"]) > 0 if self.flags else torch.tensor(samples)

    for flags, says in ((False, "values .* have no weighted sum"), (True, "booleans, which do not add")):
        compiled = fxcurv.compile(net, nn.CrossEntropyLoss(), Whole(flags=flags))
        with pytest.raises(fxcurv.FxcurvError, match=f"squares of '0.weight' holds {says}"):
            compiled.accumulate(PARTS, progress=False)


# Options ----------------------------------------------------------------------------------------------------------


def weighted_by(make: Any) -> Any:
    """Quantities with an option of any type, which `make` turns into a number that scales the value."""

    @dataclass(frozen=True)
    class Scaled(Squares):
        option: Any = None
        family = "scaled"

        def finish(self, usage: Any, sums: Any, samples: int) -> Any:
            return usage.to_layout(sums["diagonal"]) * make(self.option)

    return Scaled


@pytest.mark.parametrize(
    ("one", "other", "number"),
    [
        ([1, 2], [1, 3], sum),
        ({"a": [1]}, {"a": [2]}, lambda option: option["a"][0]),
        ({1, 2}, {1, 3}, sum),
        (np.array([1.0, 2.0]), np.array([1.0, 3.0]), np.sum),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), torch.sum),
        ([[[[[[1]]]]]], [[[[[[2]]]]]], lambda option: option[0][0][0][0][0][0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_options_of_any_type_are_read_by_value(
    net: nn.Module, one: Any, other: Any, number: Any, tmp_path: Path
) -> None:
    Scaled, loss = weighted_by(number), nn.CrossEntropyLoss()
    expected = reference.diag_ggn(net, loss, X, Y)
    compiled = fxcurv.compile(net, loss, {"*": [Scaled(option=one), Scaled(option=other)]})
    for found in (compiled(X, Y), compiled.accumulate(PARTS, checkpoint=tmp_path / "c", progress=False)):
        for name, value in expected.items():
            close(found["scaled"][name], value * float(number(one)))
            close(found["scaled_1"][name], value * float(number(other)))
    if not isinstance(one, Tensor):
        twice = fxcurv.compile(net, loss, [Scaled(option=one), Scaled(option=copy.deepcopy(one))])
        assert list(twice(X, Y)) == ["scaled"]
    results = [fxcurv.compile(net, loss, Scaled(option=option))(*PARTS[0]) for option in (one, other)]
    with pytest.raises(fxcurv.FxcurvError, match="scaled is Scaled"):
        fxcurv.merge(*results)


def test_an_option_that_changes_is_compiled_again(net: nn.Module) -> None:
    @dataclass(frozen=True)
    class Chosen(Squares):
        names: Any = ()

        def statistics(self, usage: Any) -> dict[str, Any]:
            return {name: SumOfSquares() for name in self.names}

        def finish(self, usage: Any, sums: Any, samples: int) -> Any:
            return torch.stack([usage.to_layout(t) for t in sums.values()])

    for quantity in (Chosen(names=["a"]), Chosen(names=np.array(["a", "b"]))):
        compiled = fxcurv.compile(net, "cross_entropy", quantity)
        first = compiled(X, Y)["squares"]["0.weight"]
        if isinstance(quantity.names, list):
            quantity.names.append("b")
        else:
            quantity.names[1] = "c"
        assert len(first) == 1 + (not isinstance(quantity.names, list))
        assert len(compiled(X, Y)["squares"]["0.weight"]) == 2


def test_an_equal_quantity_does_not_read_the_options_of_another(net: nn.Module) -> None:
    Scaled, loss = weighted_by(sum), nn.CrossEntropyLoss()
    changing = Scaled(option=[1, 2])
    fxcurv.compile(net, loss, changing)(X, Y)
    changing.option.append(5)
    found = fxcurv.compile(net, loss, Scaled(option=[1, 2]))(X, Y)["scaled"]
    close(found["0.weight"], 3 * reference.diag_ggn(net, loss, X, Y)["0.weight"])


def test_annotations_may_name_what_a_function_imports(net: nn.Module) -> None:
    source = """
from __future__ import annotations
from dataclasses import dataclass
from typing import Literal
import fxcurv

def make():
    from collections import OrderedDict

    @dataclass(frozen=True)
    class Local(fxcurv.DiagGGN):
        table: OrderedDict | None = None
        kind: Literal["a", "b"] = "a"
        factor: fxcurv.Exact = fxcurv.Exact()

    return Local
"""
    module = types.ModuleType("of_a_function")
    sys.modules[module.__name__] = module
    try:
        exec(source, vars(module))
        Local = module.make()
        found = fxcurv.compile(net, "cross_entropy", Local())(X, Y)["diag_ggn"]
        for name, value in reference.diag_ggn(net, nn.CrossEntropyLoss(), X, Y).items():
            close(found[name], value)
        with pytest.raises(fxcurv.QuantityError, match=r"Local\(kind='c'\); choose 'a' or 'b'"):
            Local(kind="c")
    finally:
        del sys.modules[module.__name__]


# Kinds of losses --------------------------------------------------------------------------------------------------


def works(net: nn.Module) -> None:
    """All other losses compile as before."""
    for name in ("cross_entropy", "mse", nn.BCEWithLogitsLoss(), nn.functional.mse_loss):
        fxcurv.compile(net, name)


def test_bases_of_kinds_are_not_selected(net: nn.Module) -> None:
    before = dict(LOSSES)

    class Abstract(Loss):
        @abstractmethod
        def extra(self) -> None: ...

    class Concrete(Abstract):
        extra = compute = random_target = None  # pyright: ignore

    assert before == LOSSES

    class Named(MeanSquaredError):
        name = "named_error"

    works(net)
    assert type(fxcurv.compile(net, nn.MSELoss()).loss) is MeanSquaredError
    assert type(fxcurv.compile(net, "named_error").loss) is Named
    with pytest.raises(fxcurv.LossError, match="the kind of loss Concrete has the module a MSELoss; give it a name"):
        fxcurv.compile(net, Concrete(nn.MSELoss()))


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"module_type": nn.L1Loss}, "the kind of loss Half has name=None; give the name"),
        ({"name": "half"}, "the kind of loss Half has module_type=None; give the type of its module"),
        ({"name": 3, "module_type": nn.L1Loss}, "the kind of loss Half has name=3; give"),
        ({"name": "half", "module_type": nn.L1Loss()}, r"the kind of loss Half has module_type=L1Loss\(\); give"),
    ],
)
def test_an_incomplete_kind_is_refused_alone(net: nn.Module, facts: dict[str, Any], says: str) -> None:
    methods = {"compute": None, "random_target": None}
    with pytest.raises(fxcurv.LossError, match=says) as raised:
        type("Half", (Loss,), {**methods, **facts})
    assert raised.value.code == "FXC406"
    works(net)


class Required(nn.MSELoss):
    def __init__(self, delta: float) -> None:
        super().__init__()
        self.delta = delta


class Bare(nn.Module):
    def forward(self, f: Tensor, target: Tensor) -> Tensor:
        return (f - target).square().mean()


def test_losses_with_modules_that_do_not_fit(net: nn.Module) -> None:
    class OfRequired(MeanSquaredError):
        name, module_type, function = "required", Required, torch.nn.functional.huber_loss

    class OfBare(MeanSquaredError):
        name, module_type = "bare", Bare

    class Nothing(MeanSquaredError):
        name, module_type = "nothing", type("NothingLoss", (nn.MSELoss,), {})

        def compute(self, output: Tensor, target: Tensor) -> Any:
            return None

    for loss in ("required", nn.functional.huber_loss):
        with pytest.raises(
            fxcurv.LossError, match=r"'required' has options without a default: .*'delta'; give a modul"
        ):
            fxcurv.compile(net, loss)
    assert type(fxcurv.compile(net, Required(1.0)).loss) is OfRequired
    for loss in ("bare", Bare(), OfBare(Bare())):
        with pytest.raises(fxcurv.LossError, match="the loss Bare has no attribute 'reduction'; give its module one"):
            fxcurv.compile(net, loss)
    with pytest.raises(fxcurv.LossError, match="Nothing has compute returning None; return LossTerms"):
        fxcurv.compile(net, "nothing", "grad")(X, normal(6, 2))
    with pytest.raises(fxcurv.LossError, match="the loss has reduction 'none'"):
        fxcurv.compile(net, nn.MSELoss(reduction="none"))
    with pytest.raises(
        fxcurv.LossError, match="OfRequired has the module a MSELoss, of another type; make it of a Requ"
    ):
        fxcurv.compile(net, OfRequired(nn.MSELoss()))
    works(net)


def test_a_loss_that_is_not_convex_is_refused(net: nn.Module) -> None:
    class Concave(MeanSquaredError):
        name, module_type = "concave", type("ConcaveLoss", (nn.MSELoss,), {})

        def compute(self, output: Tensor, target: Tensor) -> Any:
            terms, checks = super().compute(output, target)
            assert isinstance(terms, ScalarTerms)
            return replace(terms, curvature=torch.where(output > 0, terms.curvature, -1.0)), checks

    with pytest.raises(fxcurv.LossError, match="a term of the loss has a negative second derivative; its Hessian"):
        fxcurv.compile(net, "concave", "diag_ggn")(X, normal(6, 2))


# Passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["TRACED", "CANONICAL", "EMITTED"])
@pytest.mark.parametrize(
    ("run", "stage", "says"),
    [
        (lambda gm, context: None, None, "the pass 'mine' returned None, not a GraphModule; return an fx.GraphModule"),
        (lambda gm, context: gm.graph, None, "the pass 'mine' returned a Graph, not a GraphModule"),
        (lambda gm, context: gm, "optimized", "the pass 'mine' has the stage 'optimized'; choose one of captured, low"),
    ],
)
def test_a_pass_without_a_graph_or_stage_is_named(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, table: str, run: Any, stage: Any, says: str
) -> None:
    monkeypatch.setattr(pipeline, table, (*getattr(pipeline, table), pipeline.Pass("mine", run, stage)))
    with pytest.raises(fxcurv.SpecError, match=says) as raised:
        fxcurv.compile(net, "cross_entropy", "grad", example_inputs=X)
    assert raised.value.code == "FXC901"
