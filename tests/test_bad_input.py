"""Wrong use gets an error that says node, cause and remedy, and leaves the model and the caller as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def exploding(value: float = float("inf")) -> nn.Module:
    model = small()
    model[5].bias.data.fill_(value)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue, reportCallIssue]
    return model


def frozen() -> nn.Module:
    return small().requires_grad_(False)


class Smooth(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(2 * input, target)


def smoothed(label_smoothing: float) -> nn.Module:
    loss = nn.CrossEntropyLoss()
    loss.label_smoothing = label_smoothing
    return loss


ODD: tuple[Any, ...] = (None, nn.Linear, lambda x: x)
"""What is given in the place of a model."""


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
    Case("loss_none", "the loss NoneType is not supported; use nn.CrossEntropyLoss", loss=None),
    Case("loss_class", "the loss type is not supported; use nn.CrossEntropyLoss", loss=nn.CrossEntropyLoss),
    Case("loss_function", "the loss function is not supported; use", loss=lambda output, target: output.sum()),
    Case("loss_bce", "the loss BCELoss is not supported; use", loss=nn.BCELoss()),
    Case("loss_smoothing", "label_smoothing=2.0; smooth by 0 to 1", loss=smoothed(2.0)),
    Case("loss_zero_weights", "the loss is not finite; check that some", loss=nn.CrossEntropyLoss(torch.zeros(2))),
    Case(
        "bce_weight_shape",
        r"a weight of shape \[3\] for an output of shape \[2, 2\]; give one that broadcasts to the output",
        y=torch.zeros(2, 2),
        loss=nn.BCEWithLogitsLoss(torch.ones(3)),
    ),
    Case(
        "bce_pos_weight_shape",
        r"a pos_weight of shape \[3, 2, 2\] for an output of shape \[2, 2\]",
        y=torch.zeros(2, 2),
        loss=nn.BCEWithLogitsLoss(pos_weight=torch.ones(3, 2, 2)),
    ),
    Case(
        "bce_negative_weight",
        "a term of the loss has a negative weight; its Hessian has no real square root: use weights ≥ 0",
        y=torch.zeros(2, 2),
        loss=nn.BCEWithLogitsLoss(-torch.ones(2)),
    ),
    Case("bce_dtype", r"a target of type torch.int64 of shape \[2\]", loss="bce_with_logits"),
    Case("bce_nan", "the target holds NaN or infinity", y=torch.full((2, 2), float("nan")), loss="bce_with_logits"),
    Case("mse_inf", "the target holds NaN or infinity", y=torch.full((2, 2), float("inf")), loss="mse"),
    Case("mse_complex", "a target of type torch.complex64", y=torch.zeros(2, 2, dtype=torch.complex64), loss="mse"),
    Case("mse_list", "the target is a list, not a tensor; call it as curv", y=[[0.0, 0.0]] * 2, loss="mse"),
    Case("mse_count", r"of shape \[3, 2\] for an output of shape \[2, 2\]", y=torch.zeros(3, 2), loss="mse"),
    Case("mse_sparse", "the target is sparse; convert it: y.to_dense()", y=torch.zeros(2, 2).to_sparse(), loss="mse"),
    Case("mse_device", "the target is on meta, the output on cpu; move them", y=X[:, 0, 0, :2].to("meta"), loss="mse"),
    Case("target_device", "the target is on meta, the output on cpu; move them to one device", y=Y.to("meta")),
    Case("target_bool", "class indices of type torch.bool; give torch.int64 indices, or probabilities", y=Y > 0),
    Case("target_number", "the target is a int, not a tensor", y=1),
    Case("target_array", "the target is a ndarray, not a tensor", y=Y.numpy()),
    Case("target_text", "the target is a str, not a tensor", y="cat"),
    Case("target_scalar", r"class indices of shape \[\] for an output of shape \[2, 2\]", y=torch.tensor(1)),
    Case(
        "target_one_hot", r"indices of shape \[2, 2\].*; give indices of shape \[2\]", y=torch.eye(2, dtype=torch.int64)
    ),
    Case("target_float_indices", r"class probabilities of shape \[2\] for an output", y=Y.float()),
    Case("target_classes", r"class probabilities of shape \[2, 3\] for an output", y=torch.full((2, 3), 1 / 3)),
    Case("target_empty", r"class indices of shape \[0\] for an output", y=Y[:0]),
    Case("target_huge", "class index 4611686018427387904 for 2 classes", y=torch.tensor([0, 2**62])),
    Case("input_array", "the input is a ndarray; give a tensor, a tuple", x=X.numpy()),
    Case("input_text", "the input is a str; give a tensor", x="x"),
    Case("input_missing", "the input is a NoneType; give a tensor", x=None),
    Case("input_set", "the input is a set; give a tensor", x={1, 2}),
    Case("input_empty_dict", "no input tensor was given", x={}),
    Case("input_keyword", "cannot be traced .*missing a required argument: 'input'", x={"nope": X}),
    Case("input_too_many", "cannot be traced .*too many positional arguments", x=(X, X)),
    Case("input_sparse", r"the input is sparse; convert it: x.to_dense\(\)", x=X.to_sparse()),
    Case("input_complex", r"of type torch.complex64.*convert it: x.float\(\)", x=X.to(torch.complex64)),
    Case("input_bool", r"the input is of type torch.bool.*convert it: x.float\(\)", x=X > 0),
    Case("input_half", "of type torch.float16, the model of torch.float32; convert it", x=X.half()),
    Case("input_no_batch", r"expected 4D input \(got 3D input\); give inputs of the shape", x=X[0]),
    Case("input_small", "Kernel size can't be greater than actual input size; give inputs", x=X[..., :2, :2]),
    Case("input_no_pixels", "cannot be traced: .*Kernel size can't be greater", x=X[:, :, :0]),
    Case("model_none", "the model is a NoneType, not a torch.nn.Module; give an instance of one", lambda: ODD[0]),
    Case("model_class", "the model is the class Linear, not a torch.nn.Module; give an instance", lambda: ODD[1]),
    Case("model_function", "the model is a function, not a torch.nn.Module", lambda: ODD[2]),
    Case(
        "model_lazy",
        "the parameter '1.weight' has no shape yet; call the model on a batch first",
        lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(2)).eval(),
    ),
    Case("parameters_nan", "node output: the model's output holds NaN or infinity", lambda: exploding(float("nan"))),
    Case("output_none", "returns a NoneType, not a tensor", lambda: Returns(lambda y: None)),
    Case("output_complex", "the output is of type torch.complex64; give a real one", lambda: Returns(lambda y: y + 0j)),
    Case("output_cut", "the batch axis is cut; keep every sample", lambda: Returns(lambda y: y[:1])),
    Case("output_sum", "samples of the batch mix here", lambda: Returns(Tensor.sum)),
    Case("output_sorted", "samples of the batch mix here", lambda: Returns(lambda y: y.sort(0)[0])),
    Case("output_shifted", "samples of the batch mix here", lambda: Returns(lambda y: y.roll(1, 0))),
    Case("output_random", "samples of the batch mix here", lambda: Returns(lambda y: y + torch.randn_like(y))),
    Case("output_array", r"numpy\(\) is not supported", lambda: Returns(lambda y: y.detach().numpy())),
    Case("forward_raises", "cannot be traced at .*ZeroDivisionError", lambda: Returns(lambda y: 1 / 0)),
    Case("quantity_missing", "None is no quantity; give a name", quantities=None),
    Case("quantity_class", "<class 'fxcurv.quantities.KFAC'> is no quantity; give a name", quantities=fxcurv.KFAC),
    Case("quantity_factor", r"Exact\(\) is no quantity; give a name", quantities=fxcurv.Exact()),
    Case(
        "quantity_of_classes",
        "draws classes, and this loss has none; use Exact",
        y=X[:, 0, 0, :2],
        loss="mse",
        quantities=fxcurv.DiagGGN(fxcurv.Stratified(1, 1)),
    ),
    Case("pattern_matchless", r"no parameter of the model matches 'nope\*'", quantities={"nope*": "kfac"}),
    Case(
        "pattern_incomplete", "no pattern of quantities= matches the parameter '1.weight'", quantities={"0.*": "kfac"}
    ),
    Case("pattern_type", "no parameter of the model matches 'LSTM'", quantities={nn.LSTM: "kfac", "*": "kfac"}),
    Case("pattern_number", "3 is no pattern of parameters; write", quantities={3: "kfac"}),
    Case("pattern_nothing", "no quantity was asked for", quantities={"*": None}),
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
        t[:2] == u[:2] and torch.allclose(t[2], u[2], 0, 0, equal_nan=True) and t[3:] == u[3:]
        for t, u in zip(tensors.values(), tensors_after.values(), strict=True)
    )
    return equal and list(tensors) == list(tensors_after) and modes == modes_after


@pytest.mark.filterwarnings("ignore:.*target size:UserWarning", "ignore:Lazy modules:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_with_a_reason(case: Case) -> None:
    """Nothing of the model, the input and the random state changes, and a second call says the same."""
    model = case.model()
    watched = isinstance(model, nn.Module) and case.name != "model_lazy"
    x, state = copy.deepcopy(case.x), torch.get_rng_state()
    before, values = snapshot(model) if watched else (), copy.deepcopy(x)
    messages: list[str] = []
    compiled: fxcurv.Compiled | None = None
    for _ in range(2):
        with pytest.raises(fxcurv.FxcurvError, match=f"(?s){case.message}") as caught:  # noqa: PT012
            compiled = compiled or fxcurv.compile(model, case.loss, case.quantities)  # pyright: ignore[reportArgumentType]
            compiled(x, case.y)  # pyright: ignore[reportArgumentType]
        assert caught.value.remedy, "every error says what to do"
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert not watched or same(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())
    if isinstance(x, Tensor) and isinstance(values, Tensor) and x.device.type == "cpu" and x.layout == torch.strided:
        assert torch.equal(x.nan_to_num(), values.nan_to_num())
    if compiled is not None and case.model is small and case.loss == "cross_entropy" and case.quantities == "kfac":
        assert len(compiled(X, Y)["kfac"]) == 6, "it can be used again"


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 80
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fxcurv.Sampled(0), r"Sampled\(k=0\); k is a whole number of columns, at least 1"),
        (lambda: fxcurv.Sampled(1.5), r"Sampled\(k=1.5\); k is a whole number"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.Rademacher(-1), r"Rademacher\(k=-1\); k is a whole number"),
        (lambda: fxcurv.Stratified(-1, 1), r"Stratified\(top=-1, k=1\); top is a whole number of columns, at least 0"),
        (lambda: fxcurv.KFAC(approx="foo"), "choose 'expand' or 'reduce'"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.KFAC(3), "3 is no factor; give one such as"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.DiagGGN("exact"), "'exact' is no factor; give one"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.KFAC(joint="yes"), r"KFAC\(joint='yes'\); choose False or True"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.EKFAC(joint=1), r"EKFAC\(joint=1\); choose False or True"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.DiagHessian(None), r"DiagHessian\(per_sample=None\); choose"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.SqrtGGN("exact"), "'exact' is no factor; give one"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.compile(small(), memory_budget=0), "memory_budget=0; give bytes"),
        (lambda: fxcurv.compile(small(), backend="jit"), "backend='jit'; choose one of eager, inductor"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.compile(small(), on_unsupported="no"), "choose one of error, skip, fallback"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.compile(small(), output="x")(X, Y), "nothing that output='x' names; choose one with output="),
        (lambda: fxcurv.compile(small(), output=lambda _: 3)(X, Y), "returns a int, not a tensor"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.compile(small())(X, Y, generator=3), "the generator is a int; give a torch.Generator"),  # pyright: ignore[reportArgumentType]
        (lambda: fxcurv.compile(small(), memory_budget=1000)(X, Y), "one column needs at least .*; allow"),
    ],
)
def test_options_are_refused_with_a_reason(make: Callable[[], object], message: str) -> None:
    with pytest.raises(fxcurv.FxcurvError, match=message):
        make()


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
