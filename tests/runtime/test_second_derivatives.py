"""The diagonal of the loss Hessian against torch.func, on layers of every kind, and where the network bends."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import samples
import torch
from comparison import assert_close
from samples import Sample
from torch import Tensor, nn

import fxcurv
from fxcurv.losses.base import as_loss
from fxcurv.quantities.selection import chosen
from fxcurv.runtime import second_derivatives as hessian
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.run import Minibatch

NAMES = (
    *("linear.vector", "linear.tokens", "linear.rank4", "linear.transposed", "conv2d.everything", "conv2d.plain"),
    *("conv2d.groups", "conv2d.depthwise", "conv2d.same", "norm.2d", "norm.layer_norm_image", "act.gelu"),
    *("act.silu_inplace", "act.relu_inplace", "join.add", "join.mul", "join.gated", "pool2d.max"),
    *("param.applied_twice_tokens", "param.tied_weight", "param.conv_reused", "param.dense_residual"),
    *("param.frozen_weight", "free.additive", "free.scale", "free.computed_weight", "generic.attention"),
    *("attention.causal", "transformer.encoder_pre_norm", "cross_entropy.ignore_class.mean", "mse.on_tokens.sum"),
    *("bce.all.mean", "cross_entropy.soft.mean"),
)
ROWS = tuple(map(samples.find, NAMES))
QUANTITIES = ("diag_hessian", "batch_diag_hessian")


def data(row: Sample) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    return row.build(), row.loss(), samples.inputs(row, 2), samples.targets(row, 2)


def check(result: Any, model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> None:
    whole = reference.diag_hessian(model, loss, x, y)
    parts = [reference.diag_hessian(model, loss, x, y, n) for n in range(len(x))]
    for name, expected in whole.items():
        if name not in result["diag_hessian"]:
            assert not expected.any()
            continue
        assert_close(result["diag_hessian"][name], expected, name)
        assert_close(result["batch_diag_hessian"][name], torch.stack([part[name] for part in parts]), f"each {name}")


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_rule(row: Sample) -> None:
    model, loss, x, y = data(row)
    check(fxcurv.compile(model, loss, QUANTITIES)(x, y), model, loss, x, y)


FALLBACK = tuple(row for row in ROWS if row.name in ("conv2d.groups", "param.tied_weight", "attention.causal"))


@pytest.mark.parametrize("row", FALLBACK, ids=[row.name for row in FALLBACK])
def test_by_autograd(row: Sample) -> None:
    model, loss, x, y = data(row)
    check(by_autograd(model, as_loss(loss), chosen(QUANTITIES), Minibatch(x, y)), model, loss, x, y)


class Residual(nn.Module):
    """Convolutions, BatchNorm, pools and a skip connection, with an activation in the middle and one behind."""

    def __init__(self, middle: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.stem, self.bn, self.conv = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1)
        self.middle, self.last, self.pool, self.fc = middle, last, nn.MaxPool2d(2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.bn(self.stem(x)))
        return self.fc(self.pool(self.last(self.conv(x) + x)).flatten(1))


STRAIGHT = (
    nn.ReLU(),
    nn.ReLU6(),
    nn.LeakyReLU(0.2),
    nn.Hardtanh(-0.5, 0.5),
    nn.Threshold(0.1, 0.0),
    nn.Hardshrink(0.2),
)


@pytest.mark.parametrize("straight", STRAIGHT, ids=[type(op).__name__ for op in STRAIGHT])
def test_it_is_the_ggn_where_nothing_bends(straight: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Residual(straight, nn.ReLU()).double().eval()
    x, y = samples.normal((3, 1, 4, 4), torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1])
    monkeypatch.delattr(hessian, "_grad")  # no product with the Hessian is taken
    result = fxcurv.compile(model, quantities=(*QUANTITIES, "diag_ggn"))(x, y)
    check(result, model, nn.CrossEntropyLoss(), x, y)
    for name, diagonal in result["diag_ggn"].items():
        assert_close(result["diag_hessian"][name], diagonal, name)


def test_only_what_lies_below_a_bend_is_differentiated_twice() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Residual(nn.Softplus(), nn.ReLU()).double().eval()
    x, y = samples.normal((3, 1, 4, 4), torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1])
    compiled = fxcurv.compile(model, quantities=QUANTITIES)
    check(compiled(x, y), model, nn.CrossEntropyLoss(), x, y)
    bent = {job.usage.name for job in compiled.program.plan.jobs if job.usage.nonlinear}
    assert bent == {"stem.weight", "stem.bias", "bn.weight", "bn.bias"}


def test_a_linear_layer_takes_one_product_per_output(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(40, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x, y = samples.normal((4, 40), torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    taken: list[torch.Size] = []
    original = hessian._grad  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(
        "fxcurv.runtime.second_derivatives._grad", lambda s, at, d: (taken.append(d.shape), original(s, at, d))[1]
    )
    check(fxcurv.compile(model, quantities=QUANTITIES)(x, y), model, nn.CrossEntropyLoss(), x, y)
    assert len(taken) == 2 * 5  # the last layer is followed by no bend: its diagonal is that of the GGN
