"""The diagonal of the loss Hessian against torch.func, on layers of every kind, and where the network bends."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import samples
import torch
from samples import Sample
from test_samples import assert_close
from torch import Tensor, nn

import fxcurv
from fxcurv import hessian
from fxcurv.choice import chosen
from fxcurv.eager import by_autograd
from fxcurv.run import Batch

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
    check(by_autograd(model, loss, chosen(QUANTITIES), Batch(x, y)), model, loss, x, y)


def test_it_is_the_ggn_where_nothing_bends() -> None:
    """With piecewise linear activations and an affine layer last, the last layer's Hessian is its GGN."""
    model, loss, x, y = data(samples.find("act.relu_inplace"))
    result = fxcurv.compile(model, loss, ["diag_hessian", "diag_ggn"])(x, y)
    last = list(result["diag_ggn"])[-1]
    assert_close(result["diag_hessian"][last], result["diag_ggn"][last], last)


def test_a_linear_layer_takes_one_product_per_output(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(40, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x, y = samples.normal((4, 40), torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    taken: list[torch.Size] = []
    original = hessian._grad  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr("fxcurv.hessian._grad", lambda s, at, d: (taken.append(d.shape), original(s, at, d))[1])
    check(fxcurv.compile(model, quantities=QUANTITIES)(x, y), model, nn.CrossEntropyLoss(), x, y)
    assert len(taken) == 2 * (5 + 3)
