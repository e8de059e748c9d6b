"""The codes are closed: each one used is in the table, each one in the table is used, and no error has none."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from bad_inputs import CASES, Case
from torch import Tensor, nn

import fxcurv
from fxcurv.checks.codes import CODES, Category, Severity, as_json, explain
from fxcurv.cli.main import main
from fxcurv.core import errors
from fxcurv.core.errors import FxcurvError
from fxcurv.models import targets

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("fxcurv", "passes") for path in sorted((ROOT / folder).rglob("*.py"))]


def errors_made(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls that make an error of this package."""
    kinds = {name for name in errors.__all__ if name.endswith("Error")} | {
        "DemoError",
        "MissingPackageError",
        "TargetError",
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_error_has_a_code(path: Path) -> None:
    for call in errors_made(ast.parse(path.read_text(encoding="utf-8"))):
        code = next((keyword.value for keyword in call.keywords if keyword.arg == "code"), None)
        assert code is not None, f"{path}:{call.lineno}: an error without a code"
        if isinstance(code, ast.Constant):
            assert code.value in CODES, f"{path}:{call.lineno}: {code.value} is not in the table"


def test_the_codes_in_the_sources_are_those_of_the_table() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert set(re.findall(r'"(FXC\d{3})"', text)) == set(CODES)


def test_the_table_is_sorted_complete_and_in_words_of_its_own() -> None:
    assert list(CODES) == sorted(CODES)
    for code, row in CODES.items():
        assert re.fullmatch(r"FXC[0-59]\d\d", code)
        assert row.kind in get_args(Category)
        assert row.severity in get_args(Severity)
        assert row.title[0].islower() or row.title.split()[0] in ("BatchNorm",)
        assert row.explanation.endswith(".")
        assert not row.remedy.endswith(".")
    assert len({row.title for row in CODES.values()}) == len(CODES)
    assert json.loads(as_json(CODES.values()))[0]["code"] == "FXC001"


# What produces them -----------------------------------------------------------------------------------------------

BY_CASE = {
    "batchnorm_train": "FXC402",
    "batchnorm_untracked": "FXC402",
    "dropout_train": "FXC403",
    "random_python": "FXC403",
    "loss_unsupported": "FXC406",
    "loss_reduction": "FXC406",
    "target_range": "FXC407",
    "mse_shape": "FXC407",
    "input_nan": "FXC112",
    "input_dtype": "FXC111",
    "input_empty": "FXC110",
    "input_batches": "FXC110",
    "input_shape": "FXC102",
    "output_nonfinite": "FXC405",
    "output_tuple": "FXC105",
    "control_flow": "FXC101",
    "input_overwritten": "FXC201",
    "batch_fixed": "FXC106",
    "samples_mix": "FXC401",
    "quantity_name": "FXC409",
    "no_parameters": "FXC408",
}


@pytest.mark.filterwarnings("ignore:.*target size:UserWarning")
@pytest.mark.parametrize("case", [case for case in CASES if case.name in BY_CASE], ids=lambda case: case.name)
def test_bad_input_has_its_code(case: Case) -> None:
    with pytest.raises(FxcurvError) as caught:
        fxcurv.compile(case.model(), case.loss, case.quantities)(case.x, case.y)  # pyright: ignore[reportArgumentType]
    assert caught.value.code == BY_CASE[case.name]
    assert str(caught.value).endswith(f"[{caught.value.code}]")


class Lambda(nn.Module):
    """A linear layer, and a function of its output and of the input."""

    def __init__(self, function: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        with torch.device("meta"):
            layer = nn.Linear(3, 2)
        self.fc, self.function = layer.to_empty(device="cpu"), function
        for p in self.parameters():
            nn.init.constant_(p, 0.5)

    def forward(self, x: Tensor) -> object:
        return self.function(self.fc(x), x)


class Uncopyable:
    def __deepcopy__(self, memo: object) -> object:
        raise TypeError("one of a kind")


def uncopyable() -> nn.Module:
    model = Lambda(lambda y, x: y)
    vars(model)["handle"] = Uncopyable()
    return model


def in_autocast(y: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return y + x[:, :2]


def through_windows(y: Tensor, x: Tensor) -> Tensor:
    y = y * 1
    y.unfold(1, 1, 1).mul_(2)
    return y


def with_clipped_gradient(y: Tensor, x: Tensor) -> Tensor:
    y.register_hook(lambda g: g.clamp(-1, 1))
    return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "FXC104": lambda: Lambda(in_autocast),
    "FXC108": lambda: Lambda(with_clipped_gradient),
    "FXC202": lambda: Lambda(through_windows),
    "FXC204": lambda: Lambda(lambda y, x: torch.cat([y, y.new_ones(1, 2)])),
    "FXC205": lambda: Lambda(lambda y, x: y[:2]),
    "FXC207": lambda: Lambda(lambda y, x: torch.zeros(2)),
    "FXC211": lambda: Lambda(lambda y, x: y * x.sum().item()),
    "FXC212": lambda: Lambda(lambda y, x: y + y[y > 0].sum()),
    "FXC404": lambda: Lambda(lambda y, x: y.T),
}


@pytest.mark.parametrize("code", MODELS)
def test_a_model_has_its_code_and_its_line(code: str) -> None:
    report = fxcurv.check(MODELS[code](), torch.ones(2, 3), "grad")
    (found,) = {row.code for row in report.failures}
    assert found == code
    assert {row.file for row in report.failures} == {"tests/checks/test_codes.py"}
    assert {row.line is not None and row.line > 0 for row in report.failures} == {True}


def test_a_model_that_cannot_be_copied_is_traced_itself() -> None:
    model, x = uncopyable(), torch.ones(2, 3)
    assert fxcurv.check(model, x, "grad").ok
    with pytest.raises(fxcurv.CaptureError, match="FXC103"):
        fxcurv.jacobian_operator(model, [(x, torch.zeros(2, dtype=torch.int64))]).mv(torch.ones(1))


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("resnet18", "FXC001"),
        ("torchvision:resnet81", "FXC002"),
        ("no_such_module:model", "FXC003"),
        ("json:dumps?obj=1", "FXC004"),
        ("torchvision:resnet18?weights=none.pth", "FXC005"),
    ],
)
def test_a_target_has_its_code(target: str, code: str) -> None:
    with pytest.raises(FxcurvError) as caught:
        targets.resolve(target)
    assert caught.value.code == code


# fxcurv explain, fxcurv codes -------------------------------------------------------------------------------------


def test_explain_says_what_a_code_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "fxc401", "FXC402"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("FXC401  samples mix  (unsupportable, error)\n\n")
    assert f"Remedy: {CODES['FXC402'].remedy}\n" in out
    assert explain("FXC401") is CODES["FXC401"]
    assert main(["explain", "FXC499"]) == 2
    assert "there is no code 'FXC499'; did you mean" in capsys.readouterr().err


def test_rules_lists_all_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(CODES)
    assert main(["rules", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["code"]: row["severity"] for row in rows} == {code: row.severity for code, row in CODES.items()}
