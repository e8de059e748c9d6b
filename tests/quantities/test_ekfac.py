"""EKFAC and FOOF against brute force: bases that diagonalize KFAC's factors, and the exact diagonal in them."""

from __future__ import annotations

import pytest
import reference
import samples
import torch
from by_hand import Approx, check, check_foof
from comparison import assert_close
from samples import Sample
from torch import Tensor, nn

import fxcurv
from fxcurv.losses.base import as_loss
from fxcurv.quantities.selection import chosen
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.run import Minibatch

NAMES = (
    *("linear.vector", "linear.tokens", "linear.rank4", "conv2d.everything", "conv2d.plain", "conv2d.groups"),
    *("conv2d.depthwise", "conv2d.same", "conv3d.groups", "norm.2d", "join.add", "param.applied_twice_tokens"),
    *("param.tied_weight", "param.grouped_reused", "param.frozen_bias", "free.additive", "generic.attention"),
    *("right.conv1d", "right.linear", "right.twice", "right.frozen_bias", "right.autoencoder"),
    *("transformer.encoder_pre_norm", "cross_entropy.ignore_class.mean", "mse.plain.sum", "bce.all_on_tokens.mean"),
)


ROWS = tuple(map(samples.find, NAMES))


def data(row: Sample) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    return row.build(), row.loss(), samples.inputs(row, 3), samples.targets(row, 3)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_ekfac(row: Sample, approx: Approx, joint: bool) -> None:
    model, loss, x, y = data(row)
    output = reference.outputs(model, x)
    factors = {
        fxcurv.Exact(): reference.exact_columns(loss, output, y),
        fxcurv.Empirical(): reference.empirical_columns(loss, output, y),
    }
    quantities = [fxcurv.EKFAC(factor, approx, joint) for factor in factors]
    for blocks, columns in zip(fxcurv.compile(model, loss, quantities)(x, y).values(), factors.values(), strict=True):
        check(model, x, blocks, columns, approx=approx, joint=joint)


FALLBACK = tuple(row for row in ROWS if row.name in ("conv2d.groups", "param.applied_twice_tokens", "right.twice"))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("row", FALLBACK, ids=[row.name for row in FALLBACK])
def test_by_autograd(row: Sample, joint: bool) -> None:
    model, loss, x, y = data(row)
    columns = reference.exact_columns(loss, reference.outputs(model, x), y)
    quantities = chosen([fxcurv.EKFAC(fxcurv.Exact(), joint=joint), "foof"])
    result = by_autograd(model, as_loss(loss), quantities, Minibatch(x, y))
    check(model, x, result["ekfac"], columns, approx="expand", joint=joint)
    check_foof(result["foof"], reference.kfac(model, x, columns))


def test_the_second_pass_sees_the_same_sampled_columns() -> None:
    model, loss, x, y = data(samples.find("conv2d.groups"))
    quantities = ["diag_ggn_mc", "ekfac", fxcurv.EKFAC(fxcurv.Sampled(3)), fxcurv.DiagGGN(fxcurv.Sampled(3))]
    result = fxcurv.compile(model, loss, quantities)(x, y, torch.Generator().manual_seed(0))
    for name in result["ekfac"]:
        assert_close(result["ekfac"][name].trace(), result["diag_ggn_mc"][name].sum(), name)
        assert_close(result["ekfac_1"][name].trace(), result["diag_ggn"][name].sum(), name)


def test_a_block_is_its_matrix() -> None:
    for sample in ("conv2d.groups", "linear.tokens"):
        model, loss, x, y = data(samples.find(sample))
        for block in fxcurv.compile(model, loss, "ekfac_exact")(x, y)["ekfac_exact"].values():
            matrix, v = block.dense(), samples.normal(block.shape, torch.Generator().manual_seed(0))
            assert_close(block.mv(v).flatten(), matrix @ v.flatten(), "product")
            assert_close(block.diag().flatten(), matrix.diagonal(), "diagonal")


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_foof(row: Sample, approx: Approx, joint: bool) -> None:
    model, loss, x, y = data(row)
    result = fxcurv.compile(model, loss, fxcurv.FOOF(approx, joint))(x, y)["foof"]
    columns = reference.exact_columns(loss, reference.outputs(model, x), y)
    check_foof(result, reference.kfac(model, x, columns, approx, joint))


def test_joint_weights_take_no_pullback() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    compiled = fxcurv.compile(model, quantities=fxcurv.FOOF(joint=True), example_inputs=torch.ones(2, 3))
    assert not compiled.program.backwards
    separate = fxcurv.compile(model, quantities="foof", example_inputs=torch.ones(2, 3))
    assert list(separate.program.backwards) == [fxcurv.LossGradient()]


def test_forecasts_and_explanations_know_the_second_pass() -> None:
    model, _, x, _ = data(samples.find("conv2d.groups"))
    compiled = fxcurv.compile(model, quantities=["ekfac_exact", "batch_grad", "ggn_gram"], example_inputs=x)
    told = compiled.explain(x)
    assert {"backward[exact]", "backward[exact again]"} <= {step.graph for step in told.steps}
    assert set(told.shares) == {"ekfac_exact", "batch_grad", "ggn_gram"}
    assert told.peak_bytes > 0
