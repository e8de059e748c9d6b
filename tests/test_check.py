"""check(): a row for every parameter × quantity, the reasons of refusals, and nothing run or changed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import fxcurv


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
    assert all(row.ok for row in report.rows)
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


def test_a_refusal_names_the_node_and_the_remedy() -> None:
    report = fxcurv.check(Mixing(), X, "kfac")
    weight, bias = report.rows
    assert (weight.status, bias.status) == ("unsupported", "frozen")
    assert not weight.ok
    assert bias.ok
    assert not report.ok
    assert weight.message.startswith("node 'mean' ")
    assert "samples of the batch mix" in weight.message
    assert weight.suggestion
    assert (bias.message, bias.suggestion) == ("", "")
    with pytest.raises(fxcurv.FxcurvError, match=r"node 'mean' .*mix") as caught:
        report.raise_if_failed()
    assert caught.value.remedy == weight.suggestion


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


def test_nothing_is_run() -> None:
    """Weights of NaN, which a run of the model refuses."""
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
    assert document["tool"] == {"fxcurv": fxcurv.__version__, "torch": torch.__version__}
    assert document["target"] == "file.py:Mixing"
    assert document["summary"]["ok"] is False
    assert document["summary"]["statuses"] == {"unsupported": 2, "frozen": 2}
    assert document["summary"]["seconds"] == round(report.seconds, 3)
    weight = document["rows"][0]
    assert weight.pop("message").startswith("node 'mean'")
    assert weight.pop("suggestion")
    assert weight == {
        "parameter": "fc.weight",
        "module": "fc",
        "module_type": "Linear",
        "shape": [2, 3],
        "numel": 6,
        "quantity": "kfac",
        "status": "unsupported",
    }


def test_text_has_a_line_per_parameter_each_reason_once_and_a_verdict() -> None:
    refused = str(fxcurv.check(Mixing(), X, ["kfac", "grad"]))
    header, _, weight, bias, reason, last = refused.splitlines()
    assert header.split() == ["parameter", "module", "shape", "kfac", "grad"]
    assert weight.split() == ["fc.weight", "Linear", "[2,", "3]", "unsupported", "unsupported"]
    assert bias.split() == ["fc.bias", "Linear", "[2]", "frozen", "frozen"]
    assert reason.startswith("  node 'mean' ")
    assert last.startswith("Mixing: 2 parameters: 2 unsupported, 2 frozen -> FAIL ")
    passed = str(fxcurv.check(Partly(), X, "grad"))
    assert "Partly: 6 parameters: 2 frozen, 2 exact, 2 unreached -> PASS " in passed.splitlines()[-1]
