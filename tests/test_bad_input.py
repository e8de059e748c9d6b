"""Wrong use gets an error that says node, cause and remedy, and leaves the model and the caller as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcurv

X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
Y = torch.tensor([0, 1])


def small() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(8, 2)
        ).eval()


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.net(x)
        return -self.net(x)


class Returns(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.net, self.wrap = small(), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.net(x))


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.add_(1))


class OneBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(3, 3, 4, 4))


class Untracked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(3, track_running_stats=False), small())
        self.eval()


class BatchSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(0)


def train(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    for module in model.modules():
        if isinstance(module, kind):
            module.train()
    return model


def exploding() -> nn.Module:
    model = small()
    model[5].bias.data.fill_(float("inf"))  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue, reportCallIssue]
    return model


def frozen() -> nn.Module:
    return small().requires_grad_(False)


class Smooth(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(2 * input, target)


@dataclass(frozen=True)
class Case:
    """A model, how it is used wrongly, and what the error says."""

    name: str
    message: str
    model: Callable[[], nn.Module] = small
    x: object = X
    y: object = Y
    loss: object = "cross_entropy"
    quantities: object = "kfac"


CASES = (
    Case(
        "batchnorm_train",
        "node '1': .*num_batches_tracked, as BatchNorm in training mode.*; call model.eval",
        lambda: train(small(), nn.BatchNorm2d),
    ),
    Case("batchnorm_untracked", "node '0' aten.batch_norm.*statistics of the batch.*replace it", lambda: Untracked()),
    Case("dropout_train", "node '3' aten.dropout.*training mode; call model.eval", lambda: train(small(), nn.Dropout)),
    Case("loss_unsupported", "the loss L1Loss is not supported; use nn.CrossEntropyLoss", loss=nn.L1Loss()),
    Case("loss_subclass", "the loss Smooth is not supported", loss=Smooth()),
    Case("loss_name", "no loss is called 'hinge'; use", loss="hinge"),
    Case("loss_reduction", "reduction 'none'; use", loss=nn.MSELoss(reduction="none")),
    Case("loss_weights", r"class weights of shape \[3\] for 2 classes", loss=nn.CrossEntropyLoss(torch.ones(3))),
    Case("loss_negative_weight", "negative weight", loss=nn.CrossEntropyLoss(torch.tensor([2.0, -1.0]))),
    Case("target_missing", "the target is a NoneType, not a tensor", y=None),
    Case("target_dtype", "class indices of type torch.int32; give torch.int64", y=Y.int()),
    Case("target_shape", r"class indices of shape \[2, 1\].*give indices of shape \[2\]", y=Y[:, None]),
    Case(
        "target_count",
        r"class indices of shape \[3\] for an output of shape \[2, 2\]",
        y=torch.zeros(3, dtype=torch.int64),
    ),
    Case("target_range", "class index 2 for 2 classes; give indices from 0 to 1", y=torch.tensor([0, 2])),
    Case("target_negative", "class index -1 for 2 classes", y=torch.tensor([0, -1])),
    Case("target_all_ignored", "every target is ignored", y=torch.tensor([-100, -100])),
    Case("target_nan", "the target holds NaN", y=torch.full((2, 2), float("nan"))),
    Case("target_probabilities", "a class probability is negative", y=torch.full((2, 2), -0.5)),
    Case("mse_shape", r"of shape \[2\] for an output of shape \[2, 2\]", y=torch.zeros(2), loss="mse"),
    Case("mse_dtype", "a target of type torch.int64", y=torch.zeros(2, 2, dtype=torch.int64), loss="mse"),
    Case("bce_range", r"outside of \[0, 1\]", y=torch.full((2, 2), 2.0), loss="bce_with_logits"),
    Case("input_nan", "the input holds NaN or infinity", x=X * float("nan")),
    Case("input_inf", "the input holds NaN or infinity", x=X / 0),
    Case("input_integer", r"the input is of type torch.int64.*convert it: x.float\(\)", x=X.long()),
    Case("input_dtype", "the input is of type torch.float64, the model of torch.float32", x=X.double()),
    Case("input_empty", "the batch holds no samples", x=X[:0]),
    Case("input_list", "the input is a list; give a tensor", x=[X]),
    Case("input_none", "no input tensor was given", x=()),
    Case("input_scalar", "an input is a scalar", x=torch.tensor(1.0)),
    Case("input_batches", r"different batch sizes \[1, 2\]", x=(X, X[:1])),
    Case("input_device", "the input is on meta, the model on cpu; move it", x=X.to("meta")),
    Case("input_shape", "cannot be traced", x=X[:, :2]),
    Case("output_nonfinite", "node output: the model's output holds NaN or infinity", exploding),
    Case(
        "output_tuple",
        "returns a tuple of 2 items, not a tensor; choose one with output=",
        lambda: Returns(lambda y: (y, y)),
    ),
    Case(
        "output_dict",
        "returns a dict of 'logits', not a tensor; choose one with output=",
        lambda: Returns(lambda y: {"logits": y}),
    ),
    Case("output_number", "returns a float", lambda: Returns(lambda y: 1.0)),
    Case(
        "control_flow",
        r"data-dependent control flow at .*test_bad_input.py:\d+ in \"forward\".*use torch.where",
        Branch,
    ),
    Case("input_overwritten", "node 'x': the model overwrites its input in place; .*clone", Overwrites),
    Case("batch_fixed", "one batch size only, 3; use -1 or x.shape", OneBatch),
    Case("samples_mix", r"samples of the batch mix here.* Opaque|samples of the batch mix here", BatchSoftmax),
    Case("quantity_name", "no quantity is called 'kfca'; did you mean 'kfac'", quantities="kfca"),
    Case("quantity_none", "no quantity was asked for", quantities=[]),
    Case("quantity_kind", "5 is no quantity", quantities=[5]),
    Case("no_parameters", "no trainable parameters; set requires_grad_", frozen),
    Case("no_parameters_at_all", "no trainable parameters", nn.Identity),
)


def snapshot(model: nn.Module) -> tuple[object, ...]:
    """Everything of a model that a call must not change."""
    tensors = {
        name: (id(t), t._version, t.detach().clone(), t.requires_grad, t.grad)
        for name, t in model.state_dict(keep_vars=True).items()
    }
    modes = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    return tensors, modes


def same(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    (tensors, modes), (tensors_after, modes_after) = a, b
    assert isinstance(tensors, dict)
    assert isinstance(tensors_after, dict)
    equal = all(
        t[:2] == u[:2] and torch.equal(t[2], u[2]) and t[3:] == u[3:]
        for t, u in zip(tensors.values(), tensors_after.values(), strict=True)
    )
    return equal and list(tensors) == list(tensors_after) and modes == modes_after


@pytest.mark.filterwarnings("ignore:.*target size:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_with_a_reason(case: Case) -> None:
    model = case.model()
    x = copy.deepcopy(case.x)
    before, values = snapshot(model), copy.deepcopy(x)
    with pytest.raises(fxcurv.FxcurvError, match=f"(?s){case.message}") as caught:
        fxcurv.compile(model, case.loss, case.quantities)(x, case.y)  # pyright: ignore[reportArgumentType]
    assert caught.value.remedy, "every error says what to do"
    assert same(before, snapshot(model))
    if isinstance(x, Tensor) and isinstance(values, Tensor) and x.device.type == "cpu":
        assert torch.equal(x.nan_to_num(), values.nan_to_num())


def test_a_compiled_object_can_be_used_after_an_error() -> None:
    compiled = fxcurv.compile(small())
    for x, y in ((X * float("nan"), Y), (X[:, :2], Y), (X, Y + 5)):
        with pytest.raises(fxcurv.FxcurvError):
            compiled(x, y)
    assert len(compiled(X, Y)["kfac"]) == 6


def test_a_call_changes_nothing_of_the_model() -> None:
    model = small()
    model[0].register_forward_hook(lambda *_: None)
    F.cross_entropy(model(X), Y).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    before = snapshot(model)
    fxcurv.compile(model, quantities=list(fxcurv.NAMES))(X, Y)
    assert same(before, snapshot(model))
    assert all(
        p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True)
    )


def test_results_are_looked_up_by_names_that_exist() -> None:
    model = small()
    model[0].bias.requires_grad_(False)  # pyright: ignore[reportOptionalMemberAccess]
    result = fxcurv.compile(model)(X, Y)
    with pytest.raises(fxcurv.QuantityError, match="'diag_ggn' was not computed; there are kfac"):
        result["diag_ggn"]
    with pytest.raises(fxcurv.QuantityError, match="the model has no parameter 'nope'"):
        result["kfac"]["nope"]
    with pytest.raises(fxcurv.QuantityError, match=r"kfac of '0.bias' has no value: frozen; set requires_grad_"):
        result["kfac"]["0.bias"]


def test_stages_before_compiling() -> None:
    with pytest.raises(fxcurv.FxcurvError, match="nothing is compiled yet; call it on a batch first"):
        _ = fxcurv.compile(small()).stages


def test_a_mode_changed_after_compiling_is_noticed() -> None:
    model = small()
    compiled = fxcurv.compile(model)
    compiled(X, Y)
    model.train()
    with pytest.raises(fxcurv.CaptureError, match=r"call model\.eval"):
        compiled(X, Y)
    model.eval()
    compiled(X, Y)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad]
)
def test_contexts_make_no_difference(context: Callable[[], object]) -> None:
    model = small()
    expected = fxcurv.compile(model, quantities=["kflr", "diag_ggn", "grad"])(X, Y)
    with context():  # pyright: ignore[reportGeneralTypeIssues]
        result = fxcurv.compile(model, quantities=["kflr", "diag_ggn", "grad"])(X, Y)
        inside = fxcurv.compile(model, quantities=["diag_ggn"])(X * 1, Y)
    for name in expected["diag_ggn"]:
        torch.testing.assert_close(result["diag_ggn"][name], expected["diag_ggn"][name], rtol=0, atol=0)
        torch.testing.assert_close(inside["diag_ggn"][name], expected["diag_ggn"][name], rtol=0, atol=0)
        torch.testing.assert_close(result["kflr"][name].dense(), expected["kflr"][name].dense(), rtol=0, atol=0)
