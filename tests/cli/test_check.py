"""fxcurv check as CI runs it: exit codes, baseline, processes, time limits, patterns, inputs and reports in files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxcurv.checks.levels import Request
from fxcurv.checks.policy import Policy
from fxcurv.checks.pool import Task, perform_all
from fxcurv.checks.report import Report
from fxcurv.cli.main import main
from fxcurv.core.errors import FxcurvError
from fxcurv.losses.base import as_loss
from fxcurv.models import targets
from fxcurv.models.examples import example
from fxcurv.models.targets import TargetError, matching, resolve
from fxcurv.quantities.selection import chosen

NETS = """
import os, time
import torch
from torch import nn

class Good(nn.Module):
    input_shape = (3,)
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
    def forward(self, x):
        return self.fc(x)

class Mixing(Good):
    def forward(self, x):
        y = self.fc(x)
        return y - y.mean(0)  # samples mix

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(5, 4), nn.Linear(4, 2)
    def forward(self, ids, scale):
        return self.fc(self.table(ids).mean(1) * scale)

def batch():
    return torch.zeros(2, 3)

def slow():
    time.sleep(60)

def dying():
    os._exit(7)

def noisy():
    print("noise")
    return Good()
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own, in which commands run; no variable is set."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("FXCURV_", "GITHUB_"))]:
        monkeypatch.delenv(name)
    return tmp_path


def check(capsys: Capture, *argv: str) -> tuple[int, str, str]:
    code = main(["check", "--quantities", "grad", *argv])
    out, err = capsys.readouterr()
    return code, out, err


# Exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["nets.py:Good"], 0),
        (["nets.py:Mixing"], 1),
        (["nets.py:Mixing", "--exit-zero"], 0),
        (["nets.py:Mixing", "--ignore", "FXC401"], 0),
        (["nets.py:Mixing", "--min-coverage", "0"], 0),
        (["nets.py:Mixing", "--min-coverage", "0", "--fail-on", "warning"], 1),
        (["nets.py:Mixing", "--level", "static"], 0),
        (["nets.py:Mixing", "--on-unsupported", "fallback"], 1),
        (["nets.py:Mixing", "--on-unsupported", "fallback", "--require", "any"], 0),
        (["nets.py:Good", "--mode", "train"], 0),
        (["nets.py:Good", "--level", "numeric"], 0),
        (["nets.py:Good", "nets.py:Missing"], 2),
        (["nets.py:Good", "nets.py:Missing", "--exit-zero"], 2),
        (["nets.py:Pair"], 2),
        (["nets.py:Pair", "--input", "7:int64,4"], 0),
        (["nets.py:Pair", "--input", "ids=7:int64,scale=4"], 0),
        (["nets.py:Pair", "--input", "ids=7:int64,4"], 2),
        (["nets.py:Pair", "--input", "7:integer,4"], 2),
        (["nets.py:Good", "--input", "@nets.py:batch"], 0),
        (["nets.py:Good", "--input", "@nets.py:dyingg"], 2),
        (["nets.py:Good", "--timeout", "never"], 2),
        ([], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_exit_codes(folder: Path, capsys: Capture, argv: list[str], code: int) -> None:
    found, _, err = check(capsys, *argv)
    assert found == code, err
    assert (err != "") == (code == 2)


def test_what_could_be_checked_is_reported_beside_what_could_not(folder: Path, capsys: Capture) -> None:
    code, out, err = check(capsys, "nets.py:Missing", "nets.py:Good", "--format", "json")
    assert code == 2
    assert [target["name"] for target in json.loads(out)["targets"]] == ["nets.py:Good"]
    assert "has no 'Missing'; did you mean Mixing? [FXC002]" in err


def test_what_a_model_prints_stays_out_of_the_report(folder: Path, capsys: Capture) -> None:
    code, out, _ = check(capsys, "nets.py:noisy", "--format", "json")
    assert code == 0
    assert json.loads(out)["summary"]["ok"] is True


def test_an_unexpected_error_is_no_finding(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("fxcurv.cli.check.perform_all", broken)
    code, _, err = check(capsys, "nets.py:Good")
    assert (code, err.count("\n")) == (2, 1)
    assert "unexpected ZeroDivisionError: a defect; see --traceback [FXC904]" in err
    code, _, err = check(capsys, "nets.py:Good", "--traceback")
    assert code == 2
    assert err.startswith("Traceback")


# The project, the baseline, the files -----------------------------------------------------------------------------


def test_targets_of_the_project_and_the_line_that_lists_them(folder: Path, capsys: Capture) -> None:
    (folder / "pyproject.toml").write_text(
        "[tool.fxcurv]\n\n[[tool.fxcurv.target]]\n"
        'name = "torch.nn:BatchNorm1d?num_features=3&track_running_stats=False"\n'
        'input = "3"\n\n[[tool.fxcurv.target]]\nname = "nets:Mixing"\n'
        'allow = [{ code = "FXC401", reason = "centred" }]\n'
    )
    code, out, _ = check(capsys, "--format", "json")
    document = json.loads(out)
    assert code == 1
    assert [target["ok"] for target in document["targets"]] == [False, True]
    norm, allowed = document["rows"][0], document["rows"][-1]
    assert (norm["code"], norm["file"], norm["line"]) == ("FXC402", "pyproject.toml", 3)
    assert (allowed["file"], allowed["suppressed"]) == ("nets.py", "allowed: centred")
    assert NETS.splitlines()[allowed["line"] - 1].endswith("# samples mix")
    assert check(capsys, "nets:Mixing")[0] == 0, "named, it has the settings that the project gives it"
    assert check(capsys, "nets:Mixing", "--isolated")[0] == 1


def test_the_baseline_holds_what_is_known_and_loses_what_is_fixed(folder: Path, capsys: Capture) -> None:
    names = ("nets.py:Mixing", "nets.py:Good")
    assert check(capsys, *names)[0] == 1
    code, out, err = check(capsys, *names, "--write-baseline")
    assert (code, "2 known findings in .fxcurv-baseline.json" in err) == (0, True)
    assert "2 suppressed: baseline" in out
    file = folder / ".fxcurv-baseline.json"
    lines = file.read_text().splitlines()
    assert [json.loads(line.rstrip(","))["parameter"] for line in lines if "target" in line] == ["fc.bias", "fc.weight"]
    assert check(capsys, *names)[0] == 0
    (folder / "nets.py").write_text(f"# another line number\n{NETS}")
    assert check(capsys, *names)[0] == 0
    (folder / "nets.py").write_text(NETS.replace("y - y.mean(0)", "y"))
    code, _, err = check(capsys, *names)
    assert code == 0
    assert err.count("fixed, remove it with --write-baseline: FXC401 nets.py:Mixing fc.") == 2
    assert check(capsys, *names, "--strict-baseline")[0] == 1
    assert check(capsys, "nets.py:Good", "--strict-baseline")[0] == 0, (
        "nothing is said about targets that were not checked"
    )
    assert check(capsys, "nets.py:Good", "--write-baseline")[0] == 0
    assert len(json.loads(file.read_text())["findings"]) == 2
    assert check(capsys, *names, "--write-baseline")[0] == 0
    assert json.loads(file.read_text()) == {"version": 1, "findings": []}
    assert check(capsys, *names, "--strict-baseline")[0] == 0


@pytest.mark.parametrize("text", ["", "[]", '{"findings": [{}]}', "[" * 200_000])
def test_a_broken_baseline_is_refused(folder: Path, capsys: Capture, text: str) -> None:
    (folder / "known.json").write_text(text)
    code, _, err = check(capsys, "nets.py:Good", "--baseline", "known.json")
    assert code == 2
    assert "known.json is not a baseline" in err
    assert check(capsys, "nets.py:Good", "--baseline", "none.json")[0] == 2


def test_reports_go_into_files(folder: Path, capsys: Capture) -> None:
    argv = ("--output", "a.csv", "--format", "csv", "--also", "sarif=a.sarif,junit=a.xml", "--statistics")
    code, out, err = check(capsys, "nets.py:Mixing", *argv)
    assert (code, out) == (1, "")
    assert err == "     2  FXC401  samples mix\n"
    assert (folder / "a.csv").read_text().startswith("model,input,")
    assert json.loads((folder / "a.sarif").read_text())["version"] == "2.1.0"
    assert "<testsuites" in (folder / "a.xml").read_text()
    code, _, err = check(capsys, "nets.py:Good", "--output", "no/such/a.txt")
    assert (code, "cannot write no/such/a.txt" in err) == (2, True)


# Processes --------------------------------------------------------------------------------------------------------


def tasks(folder: Path, *names: str) -> list[Task]:
    request = Request(chosen("grad"), as_loss("cross_entropy"), policy=Policy(require="exact"))
    return [Task(name, request, folder) for name in names]


def test_targets_in_processes_of_their_own(folder: Path) -> None:
    """One that dies, one that takes too long and one that is no model are findings or errors of their own."""
    names = ("nets.py:Mixing", "nets.py:dying", "nets.py:Good", "nets.py:batch")
    mixing, dying, good, batch = perform_all(tasks(folder, *names), jobs=2)
    (slow,) = perform_all(tasks(folder, "nets.py:slow"), timeout=0.5)
    assert isinstance(mixing, Report)
    assert isinstance(good, Report)
    assert (mixing.target, mixing.ok, good.target, good.ok) == ("nets.py:Mixing", False, "nets.py:Good", True)
    assert [row.line for row in mixing.rows] == [NETS[: NETS.index("# samples mix")].count("\n") + 1] * 2
    assert isinstance(slow, Report)
    (row,) = slow.failures
    assert (row.status, row.code, row.message) == ("error", "FXC501", "not checked within 0.5 s")
    assert slow.coverage("grad") == 0
    assert isinstance(dying, Report)
    (row,) = dying.failures
    assert (row.code, row.message) == ("FXC902", "the process of the check ended with exit code 7")
    assert isinstance(batch, FxcurvError)
    assert batch.code == "FXC004"
    assert "returns a Tensor" in str(batch)


# Targets and inputs -----------------------------------------------------------------------------------------------


def test_patterns_stand_for_the_models_of_a_library() -> None:
    pytest.importorskip("torchvision")
    assert matching("torchvision:vit_b_*?num_classes=3") == [
        "torchvision:vit_b_16?num_classes=3",
        "torchvision:vit_b_32?num_classes=3",
    ]
    assert matching("torchvision:resnet18") == ["torchvision:resnet18"]
    assert matching("nets.py:test_*") == ["nets.py:test_*"]
    with pytest.raises(TargetError, match="no model of torchvision is called nothing_"):
        matching("torchvision:nothing_*")


def test_patterns_of_timm() -> None:
    pytest.importorskip("timm")
    assert {"timm:test_vit", "timm:test_resnet"} <= set(matching("timm:test_*"))


def test_an_example_is_drawn_from_its_seed(folder: Path) -> None:
    target = resolve("nets.py:Good")
    x = example(target)
    assert isinstance(x, Tensor)
    assert x.shape == (2, 3)
    again, other = example(target), example(target, seed=1)
    assert isinstance(again, Tensor)
    assert isinstance(other, Tensor)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    named = example(target, "ids=7:int64,mask=7:bool,x=2x5")
    assert isinstance(named, dict)
    assert [(name, t.dtype, tuple(t.shape)) for name, t in named.items()] == [
        ("ids", torch.int64, (2, 7)),
        ("mask", torch.bool, (2, 7)),
        ("x", torch.float32, (2, 2, 5)),
    ]
    assert set(named["ids"].flatten().tolist()) <= {0, 1}


def test_a_target_remembers_what_built_it(folder: Path) -> None:
    assert getattr(resolve("nets.py:Good").factory, "__name__", "") == "Good"
    assert targets.lookup("json:dumps") is json.dumps
