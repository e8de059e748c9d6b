"""check(): a row for every parameter × quantity, the reasons of refusals, and nothing changed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.checks import Allowance, Policy
from fxcurv.checks.anchors import Anchors, defined_at
from fxcurv.core.errors import Frame
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.options import OnUnsupported


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer of halves, drawn from no generator."""
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
    layer.to_empty(device="cpu")
    for p in layer.parameters():
        nn.init.constant_(p, 0.5)
    return layer


class Partly(nn.Module):
    """A frozen layer, a layer to compute, and one that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc, self.spare = linear(3, 4).requires_grad_(False), linear(4, 2), linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).relu())


class Mixing(nn.Module):
    """Centres over the batch: its samples depend on each other. The bias is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = linear(3, 2)
        self.fc.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y - y.mean(0)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x)
        return y, 2 * y


X = torch.ones(2, 3, dtype=torch.float64)


def test_every_parameter_has_a_row_per_quantity() -> None:
    report = fxcurv.check(Partly(), X, ["grad", "kfac"])
    statuses = {
        "body.weight": "frozen",
        "body.bias": "frozen",
        "fc.weight": "exact",
        "fc.bias": "exact",
        "spare.weight": "unreached",
        "spare.bias": "unreached",
    }
    assert {(row.quantity, row.parameter): row.status for row in report.rows} == {
        (quantity, name): status for quantity in ("grad", "kfac") for name, status in statuses.items()
    }
    assert len(report.rows) == 12
    row = next(row for row in report.rows if row.parameter == "fc.weight")
    assert (row.module, row.module_type, row.shape, row.numel) == ("fc", "Linear", (2, 4), 8)
    assert (row.message, row.suggestion) == ("", "")
    assert report.ok
    assert report.failures == ()
    assert {(row.parameter, row.code, row.severity) for row in report.findings} == {
        ("spare.weight", "FXC430", "note"),
        ("spare.bias", "FXC430", "note"),
    }
    report.raise_if_failed()


def test_statuses_are_those_of_the_results() -> None:
    model, quantities = Partly(), ["kfac", "diag_ggn", "grad"]
    result = fxcurv.compile(model, quantities=quantities)(X, torch.tensor([0, 1]))
    found = {(row.quantity, row.parameter): row.status for row in fxcurv.check(model, X, quantities).rows}
    assert found == {(q, name): status for q in quantities for name, status in result[q].status.items()}


def test_an_approximation_passes_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcurv.quantities.DENSE_LIMIT", 1)
    report = fxcurv.check(Partly(), X)
    assert {(row.quantity, row.status) for row in report.rows if row.parameter == "fc.bias"} == {
        ("kfac", "approx(diagonal)"),
        ("diag_ggn", "exact"),
    }
    assert report.ok
    (bias,) = (row for row in report.findings if row.parameter == "fc.bias")
    assert (bias.code, bias.severity, bias.approximation) == ("FXC320", "warning", "diagonal")
    assert not fxcurv.check(Partly(), X, policy=Policy(require="exact")).ok
    assert not fxcurv.check(Partly(), X, policy=Policy(fail_on="warning")).ok


def test_a_refusal_names_the_node_and_the_remedy() -> None:
    report = fxcurv.check(Mixing(), X, "kfac")
    weight, bias = report.rows
    assert (weight.status, bias.status) == ("unsupported", "frozen")
    assert report.failures == (weight,)
    assert not report.ok
    line = next(
        n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "return y - y.mean(0)" in text
    )
    assert (weight.code, weight.severity, weight.file) == ("FXC401", "error", "tests/checks/test_check.py")
    assert (weight.line, weight.column) == (line, 9)
    assert weight.stack == (f"tests/checks/test_check.py:{line} in forward",)
    assert weight.message.startswith("node 'mean' ")
    assert "samples of the batch mix" in weight.message
    assert weight.suggestion
    assert (bias.message, bias.suggestion) == ("", "")
    with pytest.raises(fxcurv.FxcurvError, match=r"node 'mean' .*mix") as caught:
        report.raise_if_failed()
    assert (caught.value.remedy, caught.value.code) == (weight.suggestion, "FXC401")


def test_one_of_several_outputs() -> None:
    refused, taken = fxcurv.check(Pair(), X, "kfac"), fxcurv.check(Pair(), X, "kfac", output=1)
    assert "output=" in refused.rows[0].message + refused.rows[0].suggestion
    assert not refused.ok
    assert taken.ok


def test_every_loss_and_mode_is_checked() -> None:
    assert fxcurv.check(Partly(), X, "diag_ggn", loss=nn.MSELoss(reduction="sum")).ok
    with pytest.raises(fxcurv.LossError):
        fxcurv.check(Partly(), X, "diag_ggn", loss=nn.L1Loss())
    with pytest.raises(fxcurv.QuantityError, match=r"did you mean 'kfac'\?"):
        fxcurv.check(Partly(), X, "kfca")
    trained = nn.Sequential(linear(3, 2), nn.BatchNorm1d(2).double()).train()
    report = fxcurv.check(trained, X, "kfac")
    assert {row.status for row in report.rows} == {"unsupported"}
    assert "eval" in report.rows[0].message + report.rows[0].suggestion


def test_a_model_without_parameters_is_an_error_not_an_empty_pass() -> None:
    with pytest.raises(fxcurv.QuantityError, match="no trainable parameters"):
        fxcurv.check(nn.Sequential(nn.ReLU()), X)


def test_nothing_is_changed() -> None:
    model = Partly()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    fxcurv.check(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]


def test_values_do_not_matter() -> None:
    """Weights of NaN, which a call of the compiled model refuses."""
    model = Partly()
    for p in model.parameters():
        nn.init.constant_(p, torch.nan)
    with pytest.raises(fxcurv.FxcurvError):
        fxcurv.compile(model)(X, torch.tensor([0, 1]))
    assert fxcurv.check(model, X).ok


def test_to_dict_is_plain() -> None:
    report = fxcurv.check(Mixing(), X, ["kfac", "grad"], target="file.py:Mixing")
    document = json.loads(json.dumps(report.to_dict()))
    assert document["schema_version"] == 1
    assert document["tool"] == {"name": "fxcurv", "version": fxcurv.__version__}
    assert document["environment"]["torch"] == torch.__version__
    assert document["summary"]["ok"] is False
    assert document["summary"]["statuses"] == {"unsupported": 2, "frozen": 2}
    assert document["summary"]["codes"] == {"FXC401": 2}
    (target,) = document["targets"]
    assert (target["name"], target["input"], target["level"]) == ("file.py:Mixing", "2x3:float64", "shape")
    assert target["coverage"] == {"kfac": 0.0, "grad": 0.0}
    assert target["seconds"] == round(report.seconds, 3)
    assert (target["parameters"], target["numel"]) == (2, 8)
    weight = document["rows"][0]
    assert weight.pop("message").startswith("node 'mean'")
    assert weight.pop("suggestion")
    assert weight.pop("line") > 0
    assert len(weight.pop("stack")) == 1
    assert len(weight.pop("fingerprint")) == 64
    assert weight.pop("node").startswith("'mean' ")
    assert weight == {
        "target": "file.py:Mixing",
        "parameter": "fc.weight",
        "module": "fc",
        "module_type": "Linear",
        "op": "Linear",
        "shape": [2, 3],
        "numel": 6,
        "quantity": "kfac",
        "status": "unsupported",
        "approximation": "",
        "code": "FXC401",
        "severity": "error",
        "file": "tests/checks/test_check.py",
        "column": 9,
        "suppressed": "",
    }


def test_text_has_a_line_per_parameter_each_reason_once_and_a_verdict() -> None:
    refused = str(fxcurv.check(Mixing(), X, ["kfac", "grad"]))
    header, _, weight, bias, reason, last = refused.splitlines()
    assert header.split() == ["parameter", "op", "shape", "kfac", "grad", "code", "where"]
    assert weight.split()[:-1] == ["fc.weight", "Linear", "[2,", "3]", "unsupported", "unsupported", "FXC401"]
    assert bias.split() == ["fc.bias", "Linear", "[2]", "frozen", "frozen"]
    assert reason.startswith("  FXC401  error  tests/checks/test_check.py:")
    assert "fc.weight: node 'mean' " in reason
    assert last.startswith("Mixing: 2 parameters: 2 unsupported, 2 frozen; kfac 0.0%, grad 0.0% -> FAIL ")
    passed = str(fxcurv.check(Partly(), X, "grad"))
    assert "Partly: 6 parameters: 2 frozen, 2 exact, 2 unreached; grad 100.0% -> PASS " in passed.splitlines()[-1]


# Levels, places and demands ---------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Attention over tokens behind an embedding of patches: an added parameter, LayerNorm, a packed weight."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embed, self.norm = nn.Conv2d(1, 4, 2, 2), nn.LayerNorm(4)
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
            self.position = nn.Parameter(torch.empty(1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).flatten(2).transpose(1, 2) + self.position)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_the_static_level_needs_no_memory_and_says_the_same() -> None:
    model = Tokens().eval()
    static = fxcurv.check(model, torch.empty(2, 1, 4, 4, device="meta"), level="static")
    assert static.ok
    assert static.nodes > 5
    filled = Tokens().to_empty(device="cpu").eval()
    for p in filled.parameters():
        nn.init.constant_(p, 0.1)
    shape = fxcurv.check(filled, torch.ones(2, 1, 4, 4))
    assert [(r.parameter, r.quantity, r.status, r.op) for r in static.rows] == [
        (r.parameter, r.quantity, r.status, r.op) for r in shape.rows
    ]
    assert {row.parameter for row in static.rows} == {name for name, _ in model.named_parameters()}


def test_the_static_level_assumes_that_samples_stay_apart() -> None:
    assert fxcurv.check(Mixing(), X, "kfac", level="static").ok
    frozen, *_ = fxcurv.check(Partly(), X, "kfac", level="static").rows
    assert frozen.status == "frozen"


def test_a_library_s_line_is_kept_and_the_finding_anchored_at_the_class() -> None:
    """BatchNorm without running statistics couples samples in a line of torch, which is no line of the model."""
    model = nn.Sequential(linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False).double())
    row = fxcurv.check(model, X, "kfac").rows[0]
    assert (row.code, row.file, row.stack) == ("FXC402", None, ())
    (place,) = defined_at(Mixing)
    anchored = Anchors(fallbacks=(place,)).place((Frame("/x/site-packages/timm/layers/mlp.py", 7, "forward"),))
    assert anchored["file"] == "tests/checks/test_check.py"
    assert anchored["line"] == place.line
    assert anchored["stack"] == ("/x/site-packages/timm/layers/mlp.py:7 in forward",)


def test_enough_coverage_turns_failures_into_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcurv.quantities.DENSE_LIMIT", 1)
    strict = fxcurv.check(Partly(), X, "kfac", policy=Policy(require="exact"))
    assert strict.coverage("kfac") == pytest.approx(8 / 10)
    assert not strict.ok
    assert fxcurv.check(Partly(), X, "kfac", policy=Policy(require="exact", min_coverage=0.8)).ok
    assert not fxcurv.check(Partly(), X, "kfac", policy=Policy(require="exact", min_coverage=0.81)).ok


def test_findings_can_be_ignored_selected_allowed_and_known() -> None:
    def rows(**policy: Any) -> list[str]:
        report = fxcurv.check(Mixing(), X, "kfac", policy=Policy(**policy))
        assert report.ok is all(row.suppressed or row.severity != "error" for row in report.rows)
        return [row.suppressed for row in report.rows]

    assert rows() == ["", ""]
    assert rows(ignore=("FXC4",)) == ["ignored", ""]
    assert rows(select=("FXC1", "FXC2")) == ["not selected", ""]
    assert rows(select=("FXC401",)) == ["", ""]
    allowance = Allowance("FXC401", "centred on purpose", "fc.*")
    assert rows(allow=(allowance,)) == ["allowed: centred on purpose", ""]
    assert rows(allow=(Allowance("FXC401", "another", "head.*"),)) == ["", ""]
    assert rows(allow=(Allowance("FXC401", "another", target="Other"),)) == ["", ""]
    known = fxcurv.check(Mixing(), X, "kfac").rows[0].fingerprint
    assert rows(known=frozenset({known})) == ["baseline", ""]


def test_an_unforeseen_exception_is_a_finding_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("passes.pipeline.lower", broken)
    report = fxcurv.check(Partly(), X, "kfac")
    assert {(r.status, r.code) for r in report.failures} == {("error", "FXC904")}
    assert report.failures[0].message == "ZeroDivisionError: a defect"
    assert report.failures[0].file == "tests/checks/test_check.py"


# The numeric level, and what falls back ---------------------------------------------------------------------------


def test_the_numeric_level_agrees_with_autograd() -> None:
    report = fxcurv.check(Partly(), X, ["kfac", "diag_ggn", "grad"], level="numeric")
    assert report.ok
    assert {row.code for row in report.findings} == {"FXC430"}


def test_the_numeric_level_finds_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the oracle is made to see another weight than the compiled graph."""

    def elsewhere(model: nn.Module, *args: Any) -> fxcurv.Curvature:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter("fc.weight")[0] += 0.01
        return by_autograd(other, *args)

    monkeypatch.setattr("fxcurv.checks.numeric.by_autograd", elsewhere)
    assert fxcurv.check(Partly(), X, "diag_ggn", level="shape").ok
    report = fxcurv.check(Partly(), X, "diag_ggn", level="numeric")
    assert {(row.parameter, row.status, row.code, row.severity) for row in report.failures} == {
        ("fc.weight", "error", "FXC903", "error"),
        ("fc.bias", "error", "FXC903", "error"),
    }
    assert "relative error " in report.failures[0].message
    assert " in float64, more than 1e-08" in report.failures[0].message


def test_a_value_in_another_form_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    def transposed(*args: Any) -> fxcurv.Curvature:
        found = by_autograd(*args)
        entry = found["grad"].entries["fc.weight"]
        return found._mapped(lambda e: replace(e, value=cast("Tensor", e.value).T) if e is entry else e)

    monkeypatch.setattr("fxcurv.checks.numeric.by_autograd", transposed)
    report = fxcurv.check(Partly(), X, "grad", level="numeric")
    assert report.ok
    (row,) = (row for row in report.findings if row.severity == "warning")
    assert (row.parameter, row.status, row.code) == ("fc.weight", "exact", "FXC905")


class HalfMixing(nn.Module):
    """Samples mix between two layers: behind, curvature is per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = linear(3, 4), linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y - y.mean(0))


@pytest.mark.parametrize(
    ("on_unsupported", "body", "head"),
    [("skip", "unsupported", "exact"), ("error", "unsupported", "unsupported"), ("fallback", "fallback", "exact")],
)
def test_parameters_are_refused_one_by_one(on_unsupported: OnUnsupported, body: str, head: str) -> None:
    report = fxcurv.check(HalfMixing(), X, "grad", on_unsupported=on_unsupported, policy=Policy(require="any"))
    assert {row.parameter: row.status for row in report.rows} == {
        "body.weight": body,
        "body.bias": body,
        "head.weight": head,
        "head.bias": head,
    }
    assert report.ok is (on_unsupported == "fallback")
    fallen = [row for row in report.rows if row.status == "fallback"]
    assert all(row.code == "FXC321" and "[FXC401]" in row.message for row in fallen)
    assert not fxcurv.check(HalfMixing(), X, "grad", on_unsupported=on_unsupported).ok


class AnotherGradient(nn.Module):
    """A forward that a trace does not see: its own backward doubles a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h if torch.compiler.is_exporting() else 2 * h - h.detach())


@pytest.mark.parametrize("level", ["shape", "numeric"])
def test_a_graph_that_is_not_the_model_is_found(level: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AnotherGradient().eval()
    report = fxcurv.check(model, torch.zeros(2, 3), loss="mse", level=level)
    assert not report.ok
    assert {row.code for row in report.rows} == {"FXC107"}
    assert "'a.weight'" in str(report.rows[0].message)


def test_a_parameter_with_a_gradient_hook_is_found() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).eval()
    model.weight.register_hook(lambda g: 2 * g)
    report = fxcurv.check(model, torch.zeros(2, 3), "grad", loss="mse")
    assert {row.parameter: row.code for row in report.rows} == {"weight": "FXC109", "bias": ""}
