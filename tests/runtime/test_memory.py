"""Memory budgets: the same results however a batch is cut, forecasts that hold, and peaks that stay inside."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import SAMPLES, Sample, find, inputs, targets
from torch import Tensor, nn

import fxcurv
from fxcurv import DiagGGN, FxcurvError, QuantityError, Rademacher, Sampled, Stratified
from fxcurv.cli.main import main
from fxcurv.contractions.definitions import SumOfSquares
from fxcurv.contractions.diagonals import DiagonalByPairs, DiagonalBySample
from fxcurv.contractions.statistic import Statistic
from fxcurv.linalg.cost import Cost
from fxcurv.losses.base import as_loss
from fxcurv.quantities.factors import Exact
from fxcurv.quantities.registry import NAMES
from fxcurv.results.curvature import Curvature
from fxcurv.runtime import memory
from fxcurv.runtime.memory import Chunks, bytes_of, cut, forecast
from fxcurv.runtime.run import Minibatch, run

N = 5
QUANTITIES = [NAMES["grad"], NAMES["kflr"], NAMES["kfac_empirical"], NAMES["diag_ggn"], fxcurv.KFAC(Sampled(3))]
CUT = [
    "cross_entropy.all.mean",
    "cross_entropy.positions_all_signal.mean",
    "cross_entropy.soft_all.sum",
    "mse.over_image.mean",
    "bce.all_on_tokens.mean",
]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def tensors(result: Curvature) -> dict[str, Tensor]:
    """Every tensor of a result."""
    found: dict[str, Tensor] = {"loss": result.loss, "output": result.output}
    for quantity, entries in result.items():
        for name, value in entries.items():
            parts = {"": value} if isinstance(value, Tensor) else value.tensors
            found |= {f"{quantity} {name} {part}": t for part, t in parts.items()}
    return found


def assert_equal(ours: Curvature, theirs: Curvature) -> None:
    left, right = tensors(ours), tensors(theirs)
    assert left.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=1e-11, atol=1e-15, msg=lambda m, name=name: f"{name}: {m}")


# The same results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUT)
def test_chunks_make_no_difference(name: str) -> None:
    row = find(name)
    model, x, y = row.build(), inputs(row, N), targets(row, N)
    classes = [DiagGGN(Stratified(1, 2))] if name.startswith("cross_entropy") else []
    compiled = fxcurv.compile(model, row.loss(), [*QUANTITIES, DiagGGN(Rademacher(3)), *classes])
    draws = generator()
    whole = compiled(x, y, draws)
    for samples, columns in ((5, 1), (2, 100), (2, 1), (1, 2), (3, 4)):
        again, chunks = generator(), Chunks(samples, dict.fromkeys(compiled.program.backwards, columns))
        assert_equal(run(compiled.program, model, as_loss(row.loss()), Minibatch(x, y, again), chunks), whole)
        assert torch.equal(draws.get_state(), again.get_state())


def wide(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Activations of some size, and few parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = (nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 6)).to(dtype).eval()


def batch(n: int) -> tuple[Tensor, Tensor]:
    g = generator()
    return torch.randn(n, 2, 16, 16, generator=g, dtype=torch.float64), torch.randint(6, (n,), generator=g)


def test_budgets_make_no_difference_but_to_the_chunks() -> None:
    model, (x, y) = wide(), batch(8)
    quantities = ["diag_ggn", "kfac"]
    free = fxcurv.compile(model, quantities=quantities)
    whole = free(x, y, generator())
    seen = list[tuple[int, int]]()
    for samples, columns in ((1, 1), (8, 2), (8, 6)):
        budget = int(forecast(free.program, x, samples, columns).peak / memory.MARGIN) + 1
        compiled = fxcurv.compile(model, quantities=quantities, memory_budget=budget)
        assert_equal(compiled(x, y, generator()), whole)
        chunks = compiled.chunks(x)
        assert forecast(free.program, x, chunks.samples, chunks.columns).peak <= budget
        seen.append((chunks.samples, chunks.columns[Exact()]))
    assert (seen[0], seen[2]) == ((1, 1), (8, 6))
    assert seen[1] in ((8, 2), (8, 3), (8, 4), (8, 5))


def test_the_choice_is_made_once_for_each_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(program: Any, inputs: Tensor, budget: int, columns: int) -> Chunks:
        asked.append(len(inputs))
        return cut(program, inputs, budget, columns)

    monkeypatch.setattr("fxcurv.api.cut", counted)
    compiled = fxcurv.compile(wide(), quantities="grad", memory_budget="1GiB")
    for n in (2, 3, 2, 3):
        compiled(*batch(n))
    assert asked == [2, 3]


def test_several_inputs_are_cut_alike() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = wide()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.net(a + 2 * b)

    model, (x, y) = Two().eval(), batch(5)
    given = {"b": x.flip(0), "a": x}
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    whole = compiled(given, y)
    assert_equal(
        run(compiled.program, model, as_loss("cross_entropy"), Minibatch(given, y), Chunks(2, {Exact(): 3})), whole
    )


# Budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "number"),
    [
        (None, None),
        (4096, 4096),
        ("4096", 4096),
        ("2GiB", 2 << 30),
        ("1.5 MiB", 3 << 19),
        ("3kib", 3072),
        ("1GB", 10**9),
        ("20 MB", 2 * 10**7),
        ("5KB", 5000),
    ],
)
def test_budgets_are_read(budget: int | str | None, number: int | None) -> None:
    assert bytes_of(budget) == number


@pytest.mark.parametrize(
    "budget", [0, -1, True, 1.5, "", "GiB", "-2GiB", "2 TiB", "two GiB", "0MB", "1e9", "nan", "1.2.3GB"]
)
def test_bad_budgets_are_refused(budget: Any) -> None:
    with pytest.raises(QuantityError, match=r"memory_budget=.*; give bytes as .* \[FXC502\]"):
        fxcurv.compile(wide(), memory_budget=budget)


def test_a_budget_that_nothing_fits_is_refused_with_the_forecast() -> None:
    compiled = fxcurv.compile(wide(), memory_budget="10KiB")
    with pytest.raises(FxcurvError, match=r"one column needs at least .* KiB \(forward .*\), more than") as caught:
        compiled(*batch(4))
    assert caught.value.code == "FXC503"
    assert caught.value.remedy is not None
    enough = re.search(r"allow (\S+ KiB),", caught.value.remedy)
    assert enough
    fxcurv.compile(wide(), memory_budget=enough[1])(*batch(4))


def test_the_command_line_takes_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compute", "torchvision:squeezenet1_1?num_classes=3", "--input", "3x32x32", "--batch", "3"]
    assert main([*command, "--quantities", "grad", "--memory-budget", "64MiB"]) == 0
    assert "grad" in capsys.readouterr().out
    assert main([*command, "--quantities", "grad", "--memory-budget", "64 apples"]) == 2
    assert "[FXC502]" in capsys.readouterr().err


# Forecasts --------------------------------------------------------------------------------------------------------


def test_a_forecast_says_what_is_held() -> None:
    x, y = batch(4)
    compiled = fxcurv.compile(wide(), quantities=["grad", "diag_ggn"])
    result = compiled(x, y)
    found = forecast(compiled.program, x, 4, 5)
    values = [t for name, t in tensors(result).items() if name.startswith(("grad", "diag_ggn"))]
    assert found.results == sum(t.nbytes for t in values)
    assert found.kept > 4 * (8 + 8) * 256, "two masks, a byte for each entry"
    assert found.peak == max(found.forward, *found.backward.values())
    assert found.backward[Exact()] > forecast(compiled.program, x, 4, 1).backward[Exact()]
    assert found.forward > forecast(compiled.program, x, 2, 5).forward - found.results
    assert "forward" in str(found)


def test_a_forecast_does_not_read_values_and_leaves_the_program_alone() -> None:
    x, y = batch(4)
    compiled = fxcurv.compile(wide(), quantities="diag_ggn")
    before = compiled(x, y)
    assert forecast(compiled.program, x.to("meta").expand(4, -1, -1, -1), 2, 1).peak > 0
    assert_equal(compiled(x, y), before)


def test_diagonals_are_charged_what_they_say_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = batch(4)
    program = fxcurv.compile(wide(), quantities="diag_ggn").prepare(x)
    plain, seen = forecast(program, x, 4, 5), list[torch.Size]()

    def cost(self: Statistic, xs: list[Tensor], Ss: list[Tensor]) -> Cost:
        seen.append(Ss[0].shape[:2])
        return Cost(temporary=1e9)

    for kind in (SumOfSquares, DiagonalBySample, DiagonalByPairs):
        monkeypatch.setattr(kind, "cost", cost)
    found = forecast(program, x, 4, 5)
    assert 1e9 < found.peak < 1e9 + plain.peak
    assert found.results == plain.results
    assert set(seen) == {torch.Size([5, 4])}


@pytest.mark.parametrize("row", SAMPLES[::20], ids=lambda row: row.name)
def test_every_kind_of_module_can_be_forecast(row: Sample) -> None:
    x = inputs(row, 2)
    program = fxcurv.compile(row.build(), row.loss(), ["grad", "diag_ggn"]).prepare(x)
    found = forecast(program, x, 2, 2)
    assert found.peak >= found.results > 0


# Measured peaks ---------------------------------------------------------------------------------------------------

MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from torch import nn
import fxcurv
from fxcurv.runtime.memory import forecast

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

def peak(step):
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = step()
    return status("VmHWM") - before

torch.set_num_threads(1)
torch.manual_seed(0)
layers = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(8))
model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10)).eval()
x, y = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
for budget in json.loads(sys.argv[1]):
    compiled = fxcurv.compile(model, quantities="diag_ggn", memory_budget=budget)
    measured = peak(lambda: compiled(x, y))
    chunks = compiled.chunks(x)
    foreseen = forecast(compiled.program, x, chunks.samples, chunks.columns).peak
    print(json.dumps([chunks.samples, min(chunks.columns.values()), foreseen, measured]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system cannot tell a peak")
def test_measured_peaks_stay_inside_of_the_budget() -> None:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"MKL_DISABLE_FAST_MM": "1", "PYTHONPATH": str(Path(fxcurv.__file__).parent.parent)}
    command = [sys.executable, "-c", MEASURE, json.dumps([None, "64MiB", "24MiB"])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    free, columns, samples = (json.loads(line) for line in done.stdout.splitlines())
    assert free[3] > 100 << 20, "without a budget it takes more"
    assert columns[3] <= 64 << 20
    assert samples[3] <= 24 << 20
    assert columns[0] == 8
    assert columns[1] < 9
    assert samples[0] < 8
    for _, _, foreseen, measured in (free, columns, samples):
        assert 0.75 * measured <= foreseen <= 1.3 * measured, "forecasts hold"


# Nothing piles up -------------------------------------------------------------------------------------------------

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def status(field: str) -> int:
    """Bytes of the process: VmRSS that it has, VmHWM that it had at most since CLEAR was written."""
    return 1024 * next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))


@pytest.mark.skipif(not os.access(CLEAR, os.W_OK), reason="the system cannot tell a peak")
def test_the_peak_of_a_data_set_is_that_of_few_batches() -> None:
    """100 batches of 1.6 MB, outputs of 0.4 MB: what kept any of them would show."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10)).eval()
    compiled = fxcurv.compile(model, quantities=["kflr", "diag_ggn", "grad"])

    def peak(batches: int) -> int:
        g = torch.Generator().manual_seed(0)
        loader = ((torch.randn(512, 28, 28, generator=g), torch.arange(512) % 10) for _ in range(batches))
        gc.collect()
        CLEAR.write_text("5")
        before = status("VmRSS")
        compiled.accumulate(loader)
        return status("VmHWM") - before

    peak(5)
    assert peak(100) < peak(5) + (16 << 20)


@pytest.mark.skipif(not STATUS.exists(), reason="the system cannot tell the memory of a process")
def test_a_thousand_calls_leave_nothing() -> None:
    """With any batch size that came before: neither memory nor objects."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    compiled = fxcurv.compile(model, quantities=["kfac", "diag_ggn", "grad"])
    x, y = torch.linspace(-1, 1, 32 * 8).view(32, 8), torch.arange(32) % 3

    def after(calls: int) -> tuple[int, int]:
        for k in range(calls):
            compiled(x[: 16 * (1 + k % 2)], y[: 16 * (1 + k % 2)])
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return status("VmRSS"), len(gc.get_objects())

    memory_before, objects_before = after(100)
    memory_after, objects_after = after(1000)
    assert memory_after - memory_before < 1 << 20
    assert objects_after - objects_before < 200
