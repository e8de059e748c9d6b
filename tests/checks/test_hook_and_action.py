"""The pre-commit hook and the GitHub action: what they run is run here, as they run it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from fxcurv.cli.config import options
from fxcurv.testing import assert_compatible

ROOT = Path(__file__).resolve().parents[2]
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
ACTION = yaml.safe_load((ROOT / ".github/actions/check/action.yml").read_text(encoding="utf-8"))

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
    def forward(self, x):
        y = self.fc(x)
        return y
"""
PROJECT = '[tool.fxcurv]\nquantities = ["grad"]\n\n[[tool.fxcurv.target]]\nname = "nets:Net"\ninput = "3"\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    return tmp_path


def broken(project: Path) -> int:
    """Break the model as a change would; the line that does it."""
    (project / "nets.py").write_text(NETS.replace("return y", "return y - y.mean(0)"))
    return NETS[: NETS.index("return y")].count("\n") + 1


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command with this clone's fxcurv; `fxcurv` and `python` on its path are those of the test."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FXCURV_", "GITHUB_"))}
    path = os.pathsep.join((str(folder / "bin"), str(Path(sys.executable).parent), clean.get("PATH", "")))
    (folder / "bin").mkdir(exist_ok=True)
    script = folder / "bin" / "fxcurv"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fxcurv "$@"\n')
    script.chmod(0o755)
    environment = {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path, **variables}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


# The hook ---------------------------------------------------------------------------------------------------------


def test_the_hook_runs_in_the_environment_of_the_project() -> None:
    assert HOOK["id"] == "fxcurv-check"
    assert HOOK["language"] == "system"
    assert HOOK["pass_filenames"] is False
    assert set(HOOK["stages"]) == {"pre-push", "manual"}


def test_the_hook_stops_a_change_at_the_line_that_broke_it(project: Path) -> None:
    command = shlex.split(HOOK["entry"])
    passed = run(command, project)
    assert (passed.returncode, passed.stderr) == (0, "")
    assert "nets:Net: 2 parameters: 2 exact; grad 100.0% -> PASS" in passed.stdout
    line = broken(project)
    failed = run(command, project)
    assert failed.returncode == 1
    assert f"FXC401  error  nets.py:{line}  fc.weight and 1 more: node 'mean'" in failed.stdout


# The action -------------------------------------------------------------------------------------------------------


def step(number: int) -> dict[str, Any]:
    return ACTION["runs"]["steps"][number]


def variables(number: int, **inputs: str) -> dict[str, str]:
    """The variables of a step, as the runner fills them from the inputs and their defaults."""
    given = {name: str(spec["default"]) for name, spec in ACTION["inputs"].items()} | inputs
    known = {f"inputs.{name}": value for name, value in given.items()}
    filled: dict[str, str] = {}
    for name, text in step(number)["env"].items():
        expression = re.fullmatch(r"\$\{\{ (.+?) \}\}", text)
        assert expression
        first = expression[1].partition(" || ")[0]
        filled[name] = known[first]
    return filled


def script(number: int) -> list[str]:
    """The script of a step, as the runner starts it."""
    assert step(number)["shell"] == "bash"
    return ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step(number)["run"]]


def test_the_action_uses_each_of_its_inputs() -> None:
    assert ACTION["runs"]["using"] == "composite"
    text = (ROOT / ".github/actions/check/action.yml").read_text(encoding="utf-8")
    assert {name for name in ACTION["inputs"] if f"inputs.{name}" in text} == set(ACTION["inputs"])
    assert all(spec["description"] for spec in ACTION["inputs"].values())
    assert {option.name for option in options()} >= {"format", "also"}


def test_the_action_installs_fxcurv_only_where_it_is_missing(tmp_path: Path) -> None:
    python = tmp_path / "python"
    calls = tmp_path / "calls"
    for missing, expected in ((0, ""), (1, "-m pip install some/folder\n")):
        calls.write_text("")
        python.write_text(
            f'#!/bin/sh\nif [ "$1" = -c ]; then exit {missing}; fi\necho "$@" >> {shlex.quote(str(calls))}\n'
        )
        python.chmod(0o755)
        given = variables(0, python=str(python), requirement="some/folder")
        assert run(script(0), tmp_path, **given).returncode == 0
        assert calls.read_text() == expected


def test_the_action_annotates_the_line_and_writes_the_summary(project: Path) -> None:
    line, summary = broken(project), project / "summary.md"
    given = variables(1, python=sys.executable, **{"sarif-file": "check.sarif"})
    done = run(script(1), project, **given, GITHUB_STEP_SUMMARY=str(summary))
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f"::error title=fxcurv (FXC401),file=nets.py,line={line},col=9::nets:Net: fc.weight")
    assert "| `nets:Net` | ❌" in summary.read_text(encoding="utf-8")
    assert f'"startLine": {line}' in (project / "check.sarif").read_text(encoding="utf-8")


def test_the_action_takes_targets_and_options_and_leaves_the_summary(tmp_path: Path) -> None:
    """What it calls, seen by a Python that writes it down; a pattern is fxcurv's, not the shell's."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/sh\necho "$GITHUB_STEP_SUMMARY|$*" > {shlex.quote(str(calls))}\n')
    python.chmod(0o755)
    arguments = {"targets": "nets:Net timm:test_*", "args": "--level numeric", "summary": "false"}
    (tmp_path / "timm:test_me").touch()
    run(script(1), tmp_path, **variables(1, python=str(python), **arguments), GITHUB_STEP_SUMMARY="summary.md")
    assert calls.read_text() == "|-m fxcurv check --format github --level numeric nets:Net timm:test_*\n"
    run(script(1), tmp_path, **variables(1, python=str(python)), GITHUB_STEP_SUMMARY="summary.md")
    assert calls.read_text() == "summary.md|-m fxcurv check --format github\n"


# The assertion for test suites ------------------------------------------------------------------------------------


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            layer = nn.Linear(3, 2)
        self.fc = layer.to_empty(device="cpu")
        for p in self.parameters():
            nn.init.constant_(p, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y - y.mean(0)


def test_assert_compatible_returns_the_report_or_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert assert_compatible(Centred().fc, torch.ones(2, 3)).ok
    with pytest.raises(AssertionError, match=r"(?s)not compatible.*FXC401 +error +tests/checks/test_hook.*-> FAIL"):
        assert_compatible(Centred(), torch.ones(2, 3), "kfac")
    monkeypatch.setattr("fxcurv.quantities.DENSE_LIMIT", 1)
    assert assert_compatible(Centred().fc, torch.ones(2, 3), "kfac").ok
    with pytest.raises(AssertionError, match=r"approx\(diagonal\)"):
        assert_compatible(Centred().fc, torch.ones(2, 3), "kfac", require="exact")
