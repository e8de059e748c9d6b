"""The sweep over model libraries: one process per model, within limits, and a table that says what became of it."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("sweep", ROOT / "tools/coverage.py")
assert SPEC is not None
assert SPEC.loader is not None
tool = sys.modules["sweep"] = importlib.util.module_from_spec(SPEC)  # rows are unpickled by the module's name
SPEC.loader.exec_module(tool)


class Mixing(nn.Module):
    """A model that fxcurv refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0, keepdim=True))


class Endless(nn.Module):
    """A model that takes longer than it may."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(600)
        return self.linear(x)


def build(name: str) -> tuple[nn.Module, Tensor]:
    if name == "absent":
        raise LookupError("no such\nmodel")
    if name == "deadly":
        os._exit(3)
    model = {"mixing": Mixing, "endless": Endless}.get(name, lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh()))()
    if name == "frozen":
        model.get_parameter("0.weight").requires_grad_(False)
    return model.eval(), torch.zeros(2, 3)


def swept(names: tuple[str, ...], seconds: float) -> dict[str, Any]:
    rows: list[Any] = []
    tool.sweep([tool.Row("toys", name, "unknown") for name in names], 2, tool.Limits(seconds, 64), rows.append)
    return {row.model: row for row in rows}


@pytest.fixture
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "GROUPS", {"toys": tool.Group("torch", lambda: (), build)})


FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@FORKS
@pytest.mark.usefixtures("_toys")
def test_a_model_that_takes_too_long_is_ended() -> None:
    """What is known of it by then stays known: all its parameters are refused."""
    row = swept(("endless",), seconds=10)["endless"]
    assert (row.outcome, row.elements, row.counts["kfac_refused"]) == ("out of time", 16, 16)


@FORKS
@pytest.mark.usefixtures("_toys")
def test_every_model_has_a_row_whatever_becomes_of_it(tmp_path: Path) -> None:
    found = swept(("plain", "frozen", "mixing", "absent", "deadly"), seconds=300)
    assert {name: row.outcome for name, row in found.items()} == {
        "plain": "compiled",
        "frozen": "compiled",
        "mixing": "refused",
        "absent": "crashed",
        "deadly": "crashed",
    }
    assert (found["plain"].coverage, found["mixing"].coverage, found["frozen"].coverage) == (1, 0, 1)
    assert found["plain"].counts == {
        f"{q}_exact{of}": n for q in tool.QUANTITIES for of, n in (("", 16), ("_tensors", 2))
    }
    assert found["frozen"].counts["kfac_idle"] == 12
    assert (found["mixing"].counts["kfac_refused"], found["mixing"].counts["diag_ggn_refused_tensors"]) == (16, 2)
    assert "mix" in found["mixing"].cause
    assert found["absent"].cause == "no such"
    assert "ended with 3" in found["deadly"].cause
    tool.write(tmp_path / "coverage.csv", found.values())
    again = {row.model: row for row in tool.read(tmp_path / "coverage.csv").values()}
    assert [line[5:] for line in tool.totals(list(again.values()), {"toys": 5})] == [
        ["kfac", "41.67 (3)", "", "", "33.33 (2)", "25.00 (1)"],
        ["diag_ggn", "41.67 (3)", "", "", "33.33 (2)", "25.00 (1)"],
    ]
    assert {name: row.outcome for name, row in again.items()} == {name: row.outcome for name, row in found.items()}


def row(name: str, outcome: str, **counts: int) -> Any:
    return tool.Row("timm", name, outcome, seconds=2.0, revision="abc", cause="why", counts=counts)


def test_the_summary_counts_elements_and_tensors() -> None:
    good = row("a", "compiled", kfac_exact=75, kfac_exact_tensors=2, diag_ggn_exact=75, diag_ggn_exact_tensors=2)
    bad = row("b", "refused", kfac_refused=25, kfac_refused_tensors=1, diag_ggn_refused=25, diag_ggn_refused_tensors=1)
    page = tool.summary([good, bad], {"timm": 9})
    (kfac,) = [line for line in page.splitlines() if "| kfac" in line]
    cells = [cell.strip() for cell in kfac.strip("|").split("|")]
    assert cells == ["timm", "2 of 9", "1", "2.0", "2.0", "kfac", "75.00 (2)", "", "", "25.00 (1)", ""]
    assert "- timm:b, refused: why" in page
    assert "Not compiled" not in tool.summary([good], {"timm": 1})


def test_what_is_known_is_not_examined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("vit_a", "vit_b", "vit_c", "resnet")
    monkeypatch.setattr(tool, "GROUPS", {"timm": tool.Group("torch", lambda: names, build)})
    known = {r.key: r for r in (row("vit_a", "compiled"), row("vit_b", "refused"))}

    def asked(*options: str) -> list[str]:
        arguments = tool.parse(["--groups", "timm", "--filter", "vit*", *options])
        return [r.model for r in tool.chosen(arguments, known)]

    assert asked() == ["vit_c"]
    assert asked("--retry-failed") == ["vit_b", "vit_c"]
    assert asked("--again") == ["vit_a", "vit_b", "vit_c"]


def test_causes_name_no_place_on_this_machine() -> None:
    assert tool.relative('at "/opt/venv/lib/site-packages/timm/x.py", line 3') == 'at "timm/x.py", line 3'
