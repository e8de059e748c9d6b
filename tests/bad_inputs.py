"""Inputs that must be refused, with the messages that say why."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcurv

__all__ = ["ANEW", "CASES", "MESSAGES", "OPTIONS", "Case", "X", "Y", "said", "small", "write_catalogue"]


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


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * random.random()


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
    """A model, and how it is used wrongly."""

    name: str
    model: Callable[[], nn.Module] = small
    x: object = X
    y: object = Y
    loss: object = "cross_entropy"
    quantities: object = "kfac"


CASES = (
    Case("batchnorm_train", lambda: train(small(), nn.BatchNorm2d)),
    Case("batchnorm_untracked", lambda: Untracked()),
    Case("dropout_train", lambda: train(small(), nn.Dropout)),
    Case("loss_unsupported", loss=nn.L1Loss()),
    Case("loss_subclass", loss=Smooth()),
    Case("loss_name", loss="hinge"),
    Case("loss_reduction", loss=nn.MSELoss(reduction="none")),
    Case("loss_weights", loss=nn.CrossEntropyLoss(torch.ones(3))),
    Case("loss_negative_weight", loss=nn.CrossEntropyLoss(torch.tensor([2.0, -1.0]))),
    Case("target_missing", y=None),
    Case("target_dtype", y=Y.int()),
    Case("target_shape", y=Y[:, None]),
    Case("target_count", y=torch.zeros(3, dtype=torch.int64)),
    Case("target_range", y=torch.tensor([0, 2])),
    Case("target_negative", y=torch.tensor([0, -1])),
    Case("target_all_ignored", y=torch.tensor([-100, -100])),
    Case("target_nan", y=torch.full((2, 2), float("nan"))),
    Case("target_probabilities", y=torch.full((2, 2), -0.5)),
    Case("mse_shape", y=torch.zeros(2), loss="mse"),
    Case("mse_dtype", y=torch.zeros(2, 2, dtype=torch.int64), loss="mse"),
    Case("bce_range", y=torch.full((2, 2), 2.0), loss="bce_with_logits"),
    Case("input_nan", x=X * float("nan")),
    Case("input_inf", x=X / 0),
    Case("input_integer", x=X.long()),
    Case("input_dtype", x=X.double()),
    Case("input_empty", x=X[:0]),
    Case("input_list", x=[X]),
    Case("input_none", x=()),
    Case("input_scalar", x=torch.tensor(1.0)),
    Case("input_batches", x=(X, X[:1])),
    Case("input_device", x=X.to("meta")),
    Case("input_shape", x=X[:, :2]),
    Case("output_nonfinite", exploding),
    Case("output_tuple", lambda: Returns(lambda y: (y, y))),
    Case("output_dict", lambda: Returns(lambda y: {"logits": y})),
    Case("output_number", lambda: Returns(lambda y: 1.0)),
    Case("control_flow", Branch),
    Case("random_python", Draws),
    Case("input_overwritten", Overwrites),
    Case("batch_fixed", OneBatch),
    Case("samples_mix", BatchSoftmax),
    Case("quantity_name", quantities="kfca"),
    Case("quantity_none", quantities=[]),
    Case("quantity_kind", quantities=[5]),
    Case("no_parameters", frozen),
    Case("no_parameters_at_all", nn.Identity),
    Case("loss_none", loss=None),
    Case("loss_class", loss=nn.CrossEntropyLoss),
    Case("loss_function", loss=lambda output, target: output.sum()),
    Case("loss_bce", loss=nn.BCELoss()),
    Case("loss_smoothing", loss=smoothed(2.0)),
    Case("loss_zero_weights", loss=nn.CrossEntropyLoss(torch.zeros(2))),
    Case("bce_weight_shape", y=torch.zeros(2, 2), loss=nn.BCEWithLogitsLoss(torch.ones(3))),
    Case("bce_pos_weight_shape", y=torch.zeros(2, 2), loss=nn.BCEWithLogitsLoss(pos_weight=torch.ones(3, 2, 2))),
    Case("bce_negative_weight", y=torch.zeros(2, 2), loss=nn.BCEWithLogitsLoss(-torch.ones(2))),
    Case("bce_dtype", loss="bce_with_logits"),
    Case("bce_nan", y=torch.full((2, 2), float("nan")), loss="bce_with_logits"),
    Case("mse_inf", y=torch.full((2, 2), float("inf")), loss="mse"),
    Case("mse_complex", y=torch.zeros(2, 2, dtype=torch.complex64), loss="mse"),
    Case("mse_list", y=[[0.0, 0.0]] * 2, loss="mse"),
    Case("mse_count", y=torch.zeros(3, 2), loss="mse"),
    Case("mse_sparse", y=torch.zeros(2, 2).to_sparse(), loss="mse"),
    Case("mse_device", y=X[:, 0, 0, :2].to("meta"), loss="mse"),
    Case("target_device", y=Y.to("meta")),
    Case("target_bool", y=Y > 0),
    Case("target_number", y=1),
    Case("target_array", y=Y.numpy()),
    Case("target_text", y="cat"),
    Case("target_scalar", y=torch.tensor(1)),
    Case("target_one_hot", y=torch.eye(2, dtype=torch.int64)),
    Case("target_float_indices", y=Y.float()),
    Case("target_classes", y=torch.full((2, 3), 1 / 3)),
    Case("target_empty", y=Y[:0]),
    Case("target_huge", y=torch.tensor([0, 2**62])),
    Case("input_array", x=X.numpy()),
    Case("input_text", x="x"),
    Case("input_missing", x=None),
    Case("input_set", x={1, 2}),
    Case("input_empty_dict", x={}),
    Case("input_keyword", x={"nope": X}),
    Case("input_too_many", x=(X, X)),
    Case("input_sparse", x=X.to_sparse()),
    Case("input_complex", x=X.to(torch.complex64)),
    Case("input_bool", x=X > 0),
    Case("input_half", x=X.half()),
    Case("input_no_batch", x=X[0]),
    Case("input_small", x=X[..., :2, :2]),
    Case("input_no_pixels", x=X[:, :, :0]),
    Case("model_none", lambda: ODD[0]),
    Case("model_class", lambda: ODD[1]),
    Case("model_function", lambda: ODD[2]),
    Case("model_lazy", lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(2)).eval()),
    Case("parameters_nan", lambda: exploding(float("nan"))),
    Case("output_none", lambda: Returns(lambda y: None)),
    Case("output_complex", lambda: Returns(lambda y: y + 0j)),
    Case("output_cut", lambda: Returns(lambda y: y[:1])),
    Case("output_sum", lambda: Returns(Tensor.sum)),
    Case("output_sorted", lambda: Returns(lambda y: y.sort(0)[0])),
    Case("output_shifted", lambda: Returns(lambda y: y.roll(1, 0))),
    Case("output_random", lambda: Returns(lambda y: y + torch.randn_like(y))),
    Case("output_array", lambda: Returns(lambda y: y.detach().numpy())),
    Case("forward_raises", lambda: Returns(lambda y: 1 / 0)),
    Case("quantity_missing", quantities=None),
    Case("quantity_class", quantities=fxcurv.KFAC),
    Case("quantity_factor", quantities=fxcurv.Exact()),
    Case("quantity_of_classes", y=X[:, 0, 0, :2], loss="mse", quantities=fxcurv.DiagGGN(fxcurv.Stratified(1, 1))),
    Case("pattern_matchless", quantities={"nope*": "kfac"}),
    Case("pattern_incomplete", quantities={"0.*": "kfac"}),
    Case("pattern_type", quantities={nn.LSTM: "kfac", "*": "kfac"}),
    Case("pattern_number", quantities={3: "kfac"}),
    Case("pattern_nothing", quantities={"*": None}),
)


OPTIONS: dict[str, Callable[[], object]] = {
    "sampled_none": lambda: fxcurv.Sampled(0),
    "sampled_half": lambda: fxcurv.Sampled(1.5),  # pyright: ignore[reportArgumentType]
    "rademacher_negative": lambda: fxcurv.Rademacher(-1),
    "stratified_negative": lambda: fxcurv.Stratified(-1, 1),
    "kfac_approx": lambda: fxcurv.KFAC(approx="foo"),  # pyright: ignore[reportArgumentType]
    "kfac_factor": lambda: fxcurv.KFAC(3),  # pyright: ignore[reportArgumentType]
    "diag_ggn_factor": lambda: fxcurv.DiagGGN("exact"),  # pyright: ignore[reportArgumentType]
    "kfac_joint": lambda: fxcurv.KFAC(joint="yes"),  # pyright: ignore[reportArgumentType]
    "ekfac_joint": lambda: fxcurv.EKFAC(joint=1),  # pyright: ignore[reportArgumentType]
    "diag_hessian_per_sample": lambda: fxcurv.DiagHessian(None),  # pyright: ignore[reportArgumentType]
    "sqrt_ggn_factor": lambda: fxcurv.SqrtGGN("exact"),  # pyright: ignore[reportArgumentType]
    "memory_budget_none": lambda: fxcurv.compile(small(), memory_budget=0),
    "backend_unknown": lambda: fxcurv.compile(small(), backend="jit"),  # pyright: ignore[reportArgumentType]
    "on_unsupported_unknown": lambda: fxcurv.compile(small(), on_unsupported="no"),  # pyright: ignore[reportArgumentType]
    "output_unknown": lambda: fxcurv.compile(small(), output="x")(X, Y),
    "output_no_tensor": lambda: fxcurv.compile(small(), output=lambda _: 3)(X, Y),  # pyright: ignore[reportArgumentType]
    "generator_number": lambda: fxcurv.compile(small())(X, Y, generator=3),  # pyright: ignore[reportArgumentType]
    "memory_budget_small": lambda: fxcurv.compile(small(), memory_budget=1000)(X, Y),
}


# What they say ----------------------------------------------------------------------------------------------------

CATALOGUE = Path(__file__).with_name("messages.txt")


ANEW = "if that is what it should say: python tests/bad_inputs.py writes tests/messages.txt anew"


def catalogued() -> dict[str, str]:
    """The message of each case, by its name, as the catalogue has it: a name, and the message below it."""
    lines = CATALOGUE.read_text(encoding="utf-8").splitlines()
    return {name: message.strip() for name, message in zip(lines[::2], lines[1::2], strict=True)}


MESSAGES = catalogued() if CATALOGUE.exists() else {}


def said(error: fxcurv.FxcurvError) -> str:
    """The whole message, but for what is not of its own: the words of torch, lines of this file, all names."""
    text = str(error).replace(", ".join(fxcurv.NAMES), "<every name>")
    words = [line for line in str(error.__cause__ or "").splitlines() if line.strip()]
    if words:
        text = text.replace(words[0], "<what torch says>")
    return re.sub(re.escape(__file__) + r":\d+", f"{Path(__file__).name}:<line>", text)


def refusal(case: Case) -> fxcurv.FxcurvError:
    """The error of a case."""
    with pytest.raises(fxcurv.FxcurvError) as caught:
        fxcurv.compile(case.model(), case.loss, case.quantities)(copy.deepcopy(case.x), case.y)  # pyright: ignore[reportArgumentType]
    return caught.value


def write_catalogue() -> None:
    """Every message, as it is said now."""
    messages = {case.name: said(refusal(case)) for case in CASES}
    for name, make in OPTIONS.items():
        with pytest.raises(fxcurv.FxcurvError) as caught:
            make()
        messages[name] = said(caught.value)
    text = "".join(f"{name}\n    {message}\n" for name, message in messages.items())
    CATALOGUE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_catalogue()
