"""The benchmark: a tiny problem from the command line to the files; what cannot be measured is a row that says why."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcurv

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("bench", ROOT / "tools/bench.py")
assert SPEC is not None
assert SPEC.loader is not None
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

from benchmark import devices, machine, measure, picture, problems, report, rows, scaling  # noqa: E402  found by the tool


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def refusing(model: nn.Module) -> Any:
    raise NotImplementedError("not for\nthis one")


def deadly(model: nn.Module) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def endless(model: nn.Module) -> Any:
    def run(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        until = time.process_time() + 60
        while time.process_time() < until:
            pass
        return {}

    return rows.Computation(run)


def greedy(model: nn.Module) -> Any:
    return rows.Computation(lambda x, y: {"0.weight": torch.empty(2**40)})


def first_only(model: nn.Module) -> Any:
    """One parameter of six, and a forecast."""
    return rows.Computation(
        lambda x, y: {"0.weight": model(x)}, forecast=lambda x: rows.Forecast(seconds=0.25, peak_bytes=2.0**20)
    )


OURS = ("fxcurv grad", "fxcurv kfac", "fxcurv kfac dense", "fxcurv ntk (x,x)")
ROWS = (
    *(row for row in rows.ROWS if row.library in ("torch", "functorch")),
    *(row for row in rows.ROWS if row.name in OURS),
    rows.Row("toys", "refusing", refusing),
    rows.Row("toys", "greedy", greedy),
    rows.Row("toys", "deadly", deadly),
    rows.Row("toys", "first only", first_only, note="a toy"),
)
PROBLEMS = {
    "tiny": problems.Problem(network, batch=4, shape=(6,), classes=3),
    "elsewhere": problems.Problem(network, batch=4, shape=(6,), package="no_such_package"),
}


def in_a_process(call: str) -> None:
    """A call of this file in a process of its own: the tool forks, which autograd's threads of other tests forbid."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]),
    }
    command = [sys.executable, "-c", f"import test_bench; test_bench.{call}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_tool(path: str, *options: str) -> None:
    vars(tool).update(PROBLEMS=PROBLEMS, ROWS=ROWS)
    assert tool.main(["--repeats", "4", "--memory", "64", "--output", path, *options]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of one run of the tool."""
    path = tmp_path_factory.mktemp("bench")
    in_a_process(f"run_tool({str(path)!r})")
    return path


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of bench.csv by library and quantity."""
    lines = (folder / "bench.csv").read_text(encoding="utf-8").splitlines()
    return {f"{r['library']} {r['quantity']}": r for r in csv.DictReader(t for t in lines if not t.startswith("#"))}


def test_the_files_begin_with_the_command_and_have_all_columns(folder: Path) -> None:
    table, page = ((folder / name).read_text(encoding="utf-8") for name in ("bench.csv", "bench.md"))
    command = "python tools/bench.py --repeats 4 --memory 64"
    assert table.startswith(f"# {command}\n")
    assert page.startswith(f"<!-- {command} -->\n\n# Benchmark\n\n`{command}`\n\n- ")
    assert "\nproblem,library,quantity,ms,spread,ratio," in table
    for column in report.COLUMNS.values():
        assert column.header == "problem" or f" {column.header} " in page
    assert "## tiny\n\nN=4, 6, C=3\n\n|" in page
    assert "## elsewhere\n\nN=4, 6, C=10\n\nskipped: no_such_package is not installed" in page


def test_what_was_written_is_read_back_to_be_added_to(folder: Path, tmp_path: Path) -> None:
    facts, lines = report.read(folder)
    assert {line.problem for line in lines} == set(PROBLEMS)
    report.write(tmp_path, facts, lines, PROBLEMS)
    assert (tmp_path / "bench.csv").read_text(encoding="utf-8") == (folder / "bench.csv").read_text(encoding="utf-8")
    assert report.read(tmp_path) == (facts, lines)
    assert report.read(tmp_path / "nowhere") == ([], [])


@pytest.mark.parametrize("row", [row.name for row in ROWS if row.library != "toys"])
def test_a_row_is_measured(records: dict[str, dict[str, str]], row: str) -> None:
    record = records[row]
    assert record["state"] == "timed"
    assert all(float(record[name]) > 0 for name in ("ms", "ratio", "half_ms"))
    assert float(record["spread"]) >= 0
    assert record["covers"] == ("" if row == "torch forward" else "100.000")
    assert bool(record["compile_s"]) == row.startswith("fxcurv")
    if Path("/proc/self/clear_refs").exists():
        assert float(record["peak_mib"]) >= 0


def test_the_gradient_is_the_unit(records: dict[str, dict[str, str]]) -> None:
    assert float(records["torch gradient"]["ratio"]) == 1


def test_every_quantity_is_one_row() -> None:
    names = [row.name for row in rows.ROWS]
    ours = [fxcurv.NAMES[row.quantity] for row in rows.ROWS if row.library == "fxcurv" and row.quantity in fxcurv.NAMES]
    assert len(ours) == len(set(ours))
    assert set(ours) == set(fxcurv.NAMES.values())
    assert {"fxcurv kfac dense", "fxcurv kflr dense"} <= set(names)
    assert len(names) == len(set(names))
    assert all(names.index(row.cheaper) < names.index(row.name) for row in rows.ROWS if row.cheaper)


def test_a_smoke_test_has_rows_of_every_library() -> None:
    quick, whole = (tool.parse(arguments).rows for arguments in (["--quick"], []))
    assert {row.library for row in quick} == {row.library for row in whole}
    assert {row.quantity for row in quick if row.library == "fxcurv"} == tool.QUICK | {"kfac dense", "kflr dense"}
    assert whole == list(rows.ROWS)


@pytest.mark.parametrize(
    ("ours", "theirs", "package"),
    [
        ("fxcurv ntk (x,x)", "functorch ntk (x,x)", "torch"),
        ("fxcurv GGN product", "curvlinops GGN product", "curvlinops"),
    ],
)
def test_rows_side_by_side_compute_the_same(ours: str, theirs: str, package: str) -> None:
    pytest.importorskip(package)
    with torch.random.fork_rng(devices=[]):
        model, x, y = PROBLEMS["tiny"].make()
    named = {row.name: row for row in rows.ROWS}
    left, right = (named[name].prepare(model).run(x, y) for name in (ours, theirs))
    assert left.keys() == right.keys() == dict(model.named_parameters()).keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-6)


def test_a_row_over_the_limit_is_stopped_and_its_relative_not_tried() -> None:
    asked = (rows.Row("toys", "endless", endless), rows.Row("toys", "patient", first_only, cheaper="toys endless"))
    lines = measure.measured("tiny", PROBLEMS["tiny"], asked, measure.Settings(repeats=1, limit=0.3, gibibytes=64))
    assert [line.state for line in lines] == ["over the limit", "over the limit"]
    assert [line.note for line in lines] == ["over the limit of 0.3 s", "not tried: toys endless is over the limit"]


def test_what_cannot_be_measured_is_a_row_that_says_why(records: dict[str, dict[str, str]], folder: Path) -> None:
    said = {name: (r["state"], r["note"]) for name, r in records.items() if r["state"] != "timed"}
    assert said == {
        "toys refusing": ("refused", "refuses: NotImplementedError: not for"),
        "toys deadly": ("crashed", "the process ended with SIGKILL"),
        "toys greedy": ("over the limit", "over the limit of 64 GiB"),
        " ": ("skipped", "skipped: no_such_package is not installed"),
    }
    overview = (folder / "bench.md").read_text(encoding="utf-8").partition("\n## ")[0]
    cells = {line.split("|")[2].strip(): line.split("|")[3].strip() for line in overview.splitlines() if "toys" in line}
    assert cells["refusing"] == "–"
    assert cells["greedy"] == "> limit"
    assert cells["deadly"] == "crashed"
    assert cells["first only"].endswith(" (48 %)")


def test_forecasts_and_what_is_not_covered_are_told(records: dict[str, dict[str, str]]) -> None:
    record = records["toys first only"]
    assert (record["predicted_ms"], record["predicted_mib"]) == ("250.000", "1.000")
    assert record["note"] == "a toy; without 3 of Linear, 2 of LayerNorm"


def test_the_picture_has_a_panel_for_every_problem(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "<!-- tiny -->" in (folder / "bench.svg").read_text(encoding="utf-8")  # its text is drawn as outlines
    names = (("fxcurv", "kfac"), ("fxcurv", "grad"), ("toys", "KFAC"))
    places = picture.heights(measure.Line("tiny", *name) for name in names)
    assert places["toys KFAC"] - places["fxcurv kfac"] == 1
    assert places["fxcurv grad"] - places["toys KFAC"] > 1


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_problems_are_the_same_at_every_call(name: str) -> None:
    problem = replace(problems.PROBLEMS[name], batch=1)
    if problem.absent or math.prod(problem.shape) > 50_000:
        pytest.skip("not installed, or large")
    with torch.random.fork_rng(devices=[]):
        (model, x, y), (again, z, labels) = problem.make(), problem.make()
    assert torch.equal(x, z)
    assert torch.equal(y, labels)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert nn.CrossEntropyLoss()(model(x), y).isfinite()


def test_a_slope_is_the_exponent() -> None:
    found = [scaling.Point("net", "N", n, "row", 3 * n**1.5) for n in (2, 4, 8)]
    assert scaling.slope(found) == pytest.approx(1.5)
    assert scaling.table(found).split("|")[-5].strip() == "1.50"


def test_an_error_in_another_process_is_raised_here() -> None:
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError: "):
        measure.apart(lambda: 1 / 0)
    with pytest.raises(measure.Ended, match=r"ended with 3"):
        measure.apart(os._exit, 3)


def test_the_facts_name_the_versions() -> None:
    assert machine.version("torch") == f"torch {torch.__version__.partition('+')[0]}"
    assert machine.version("no-such-package") == "no-such-package not installed"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    in_a_process(f"run_tool({str(tmp_path)!r}, '--device', 'cuda')")
    facts, lines = report.read(tmp_path)
    timed = [line for line in lines if line.state == "timed"]
    assert any("TF32" in fact for fact in facts)
    assert timed
    assert all(line.ms and line.peak_mib is not None for line in timed)


def test_a_gpu_is_asked_for_the_end_of_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for torch.cuda that counts: what is allocated, how high it was, when it was waited for."""
    waits: list[float] = []
    occupied, highest = iter((100,)), iter((170,))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(time.perf_counter()))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(occupied))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(highest))
    gpu = devices.CUDA()
    begin = gpu.now()
    assert waits[0] <= begin
    assert gpu.peak(lambda: None) == 70
    assert measure.seconds(gpu, lambda: time.sleep(0.01)) >= 0.01
    assert len(waits) == 5
    with gpu.within(60):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.parse(["--device", "cuda"])
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_scaling_writes_its_points_and_slopes(tmp_path: Path) -> None:
    in_a_process(f"check_scaling({str(tmp_path)!r})")


def check_scaling(path: str) -> None:
    net = scaling.Net("small", scaling.mlp, (), scaling.Size(N=4, V=1, depth=1, width=3))
    found = [p for axis in ("N", "V") for p in measure.apart(scaling.points, net, axis, (1, 2), measure.Settings(1))]
    assert [(p.axis, p.value) for p in found if p.row == "fxcurv kfac"] == [("N", 1), ("N", 2), ("V", 1), ("V", 2)]
    assert {p.row for p in found if p.axis == "V"} == {"fxcurv kfac", "fxcurv diag_ggn"}
    assert scaling.crossing(net, found).startswith("small: N 1, 2; V 1, 2; ")
    points, page = scaling.write(Path(path), ["the command", "a fact"], found)
    assert points.read_text(encoding="utf-8").startswith("# the command\n# a fact\nnet,axis,value,row,ms\nsmall,N,1,")
    assert "| net   | row" in page.read_text(encoding="utf-8")


def test_the_roofline_is_three_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SIDES", {"cpu": 64})
    monkeypatch.setattr(machine, "FLOATS", 2**18)
    assert machine.roofline("cpu", time.process_time).count("/s (") == 3
