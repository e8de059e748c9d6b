"""What must not change a result, or must change it in a known way: order, cuts, names, copies, threads, time."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxcurv

QUANTITIES = [
    fxcurv.Grad(),
    fxcurv.DiagGGN(),
    fxcurv.KFAC(fxcurv.Exact()),
    fxcurv.KFAC(fxcurv.Empirical(), approx="reduce", joint=True),
]
N, CLASSES = 4, 3


class Net(nn.Module):
    """A residual network with a grouped convolution, a BatchNorm and a layer that is used twice."""

    stem: nn.Module
    norm: nn.Module
    conv: nn.Module
    mix: nn.Module
    head: nn.Module

    def __init__(self, order: tuple[str, ...] = ("stem", "norm", "conv", "mix", "head")) -> None:
        super().__init__()
        make: dict[str, Callable[[], nn.Module]] = {
            "stem": lambda: nn.Conv2d(2, 4, 3, padding=1),
            "norm": lambda: nn.BatchNorm2d(4),
            "conv": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
            "mix": lambda: nn.Linear(4, 4),
            "head": lambda: nn.Linear(4, CLASSES),
        }
        for name in order:
            setattr(self, name, make[name]())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.conv(x).tanh()).mean((2, 3))
        return self.head(self.mix(self.mix(x).tanh()))


def made(make: Callable[[], nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double().eval()


net = functools.partial(made, Net)


def batch(size: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(size, 2, 5, 4, generator=g, dtype=torch.float64), torch.randint(CLASSES, (size,), generator=g)


def tensors(result: fxcurv.Curvature) -> dict[str, Tensor]:
    """Every tensor of a result, moments as matrices."""
    return {
        f"{entry.quantity} {entry.parameter} {kind}": t
        for entry in result.entries
        for kind, t in entry.tensors().items()
    }


def close(found: fxcurv.Curvature, expected: fxcurv.Curvature, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(tensors(found), tensors(expected), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def expected() -> fxcurv.Curvature:
    return fxcurv.compile(net(), quantities=QUANTITIES)(*batch())


# The batch and the loss -------------------------------------------------------------------------------------------


def test_the_order_of_samples_does_not_matter(expected: fxcurv.Curvature) -> None:
    (x, y), order = batch(), torch.tensor([2, 0, 3, 1])
    found = fxcurv.compile(net(), quantities=QUANTITIES)(x[order], y[order])
    close(found, expected)
    assert torch.equal(found.output, expected.output[order])


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (1, 1, 2)])
def test_the_parts_of_a_batch_merge_to_the_whole(expected: fxcurv.Curvature, sizes: tuple[int, ...]) -> None:
    (x, y), compiled = batch(), fxcurv.compile(net(), quantities=QUANTITIES)
    parts = [compiled(*pair) for pair in zip(x.split(sizes), y.split(sizes), strict=True)]
    close(functools.reduce(fxcurv.merge, parts), expected, 1e-11)


def test_a_sample_twice_counts_twice() -> None:
    (x, y), loss = batch(), nn.CrossEntropyLoss(reduction="sum")
    compiled = fxcurv.compile(net(), loss, QUANTITIES[:2])
    once, twice = compiled(x, y), compiled(torch.cat([x, x]), torch.cat([y, y]))
    for quantity in ("grad", "diag_ggn"):
        for name, value in once[quantity].items():
            torch.testing.assert_close(twice[quantity][name], 2 * value, rtol=1e-12, atol=1e-12)


def test_the_loss_weight_scales_the_curvature() -> None:
    """A weight of 3 on every class: gradients, diagonals and G are three times as large, A is not."""
    one, three = (nn.CrossEntropyLoss(torch.full((CLASSES,), w).double(), reduction="sum") for w in (1.0, 3.0))
    plain, scaled = (tensors(fxcurv.compile(net(), loss, QUANTITIES)(*batch())) for loss in (one, three))
    assert plain.keys() == scaled.keys()
    for name, value in plain.items():
        factor = 1 if name.endswith(" A") else 3
        torch.testing.assert_close(scaled[name], factor * value, rtol=1e-12, atol=1e-12)


# The model --------------------------------------------------------------------------------------------------------


def test_the_order_of_construction_does_not_matter(expected: fxcurv.Curvature) -> None:
    other = made(lambda: Net(("head", "mix", "conv", "norm", "stem")))
    other.load_state_dict(net().state_dict())
    close(fxcurv.compile(other, quantities=QUANTITIES)(*batch()), expected, 0)


def test_names_do_not_matter(expected: fxcurv.Curvature) -> None:
    wrapped = nn.Sequential(nn.Identity(), nn.ModuleDict({"a b": net()})["a b"])
    found = tensors(fxcurv.compile(wrapped, quantities=QUANTITIES)(*batch()))
    plain = {name.replace(" 1.", " "): t for name, t in found.items()}
    torch.testing.assert_close(plain, tensors(expected), rtol=0, atol=0)


def test_copies_of_the_model_and_of_the_compiled_object(expected: fxcurv.Curvature) -> None:
    compiled = fxcurv.compile(net(), quantities=QUANTITIES)
    early = copy.deepcopy(compiled)
    compiled(*batch())
    late, of_copy = copy.deepcopy(compiled), fxcurv.compile(copy.deepcopy(compiled.model), quantities=QUANTITIES)
    for each in (early, late, of_copy):
        close(each(*batch()), expected, 0)
    with torch.no_grad():
        late.model.get_parameter("head.weight").mul_(2)
    close(compiled(*batch()), expected, 0)
    assert not torch.equal(late(*batch())["grad"]["head.bias"], expected["grad"]["head.bias"])


def test_another_type_and_back(expected: fxcurv.Curvature) -> None:
    model, (x, y) = net(), batch()
    compiled = fxcurv.compile(model, quantities=QUANTITIES)
    close(compiled(x, y), expected, 0)
    model.float()
    found = compiled(x.float(), y)
    assert found["diag_ggn"]["stem.weight"].dtype == torch.float32
    torch.testing.assert_close(
        found["diag_ggn"]["stem.weight"].double(), expected["diag_ggn"]["stem.weight"], rtol=1e-3, atol=1e-5
    )
    model.double()
    close(compiled(x, y), expected, 1e-4)


def test_a_structure_that_changes_is_noticed() -> None:
    model, (x, y) = made(lambda: nn.Sequential(net(), nn.Tanh(), nn.Linear(CLASSES, CLASSES))), batch()
    assert isinstance(model, nn.Sequential)
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    assert "2.weight" in compiled(x, y)["diag_ggn"]
    del model[2]
    assert set(compiled(x, y)["diag_ggn"]) == {f"0.{name}" for name, _ in net().named_parameters()}
    model[1] = nn.Sigmoid()
    again = fxcurv.compile(copy.deepcopy(model), quantities="diag_ggn")(x, y)
    close(compiled(x, y), again, 0)


# Files, pickles, generators ---------------------------------------------------------------------------------------


def test_a_result_survives_a_file_and_a_pickle(expected: fxcurv.Curvature, tmp_path: Path) -> None:
    close(pickle.loads(pickle.dumps(expected)), expected, 0)
    close(copy.deepcopy(expected), expected, 0)
    pytest.importorskip("safetensors")
    expected.save(tmp_path / "result.safetensors")
    close(fxcurv.load(tmp_path / "result.safetensors"), expected, 0)


@pytest.mark.parametrize("factor", [fxcurv.Sampled(2), fxcurv.Stratified(1, 1), fxcurv.Rademacher(2)], ids=str)
def test_equal_generators_give_equal_bits(factor: object) -> None:
    quantities = [fxcurv.KFAC(factor), fxcurv.DiagGGN(factor)]  # pyright: ignore[reportArgumentType]
    first, second, other = (
        fxcurv.compile(net(), quantities=quantities)(*batch(), generator=torch.Generator().manual_seed(seed))
        for seed in (7, 7, 8)
    )
    close(second, first, 0)
    assert not torch.equal(other["diag_ggn"]["stem.weight"], first["diag_ggn"]["stem.weight"])


# Threads and time -------------------------------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_does_not_matter(expected: fxcurv.Curvature) -> None:
    with threads(2):
        close(fxcurv.compile(net(), quantities=QUANTITIES)(*batch()), expected)


def test_compiled_objects_are_used_from_two_threads(expected: fxcurv.Curvature) -> None:
    """Of one model and of several, compiled and called at the same time."""
    model = net()
    compiled = [fxcurv.compile(m, quantities=QUANTITIES) for m in (model, model, net(), net())]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda k: compiled[k % 4](*batch()), range(24)))
    for result in found:
        close(result, expected)


def test_a_thousand_calls_leave_nothing_behind() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    compiled = fxcurv.compile(model, quantities=["kfac", "diag_ggn"])
    x, y = torch.linspace(-1, 1, 6).view(2, 3).double(), torch.tensor([0, 1])

    def objects(calls: int) -> int:
        for _ in range(calls):
            compiled(x, y)
        gc.collect()
        return len(gc.get_objects())

    objects(20)
    before = objects(20)
    assert objects(960) - before < 100
