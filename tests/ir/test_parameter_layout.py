"""Weights that lie as `W[i,o]`: what their layout changes beyond the numbers, which test_samples and others compare."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import reference
import samples
import torch
from comparison import assert_close
from samples import Sample
from torch import Tensor, nn

import fxcurv
from fxcurv import recipes
from fxcurv.ir import ops
from fxcurv.ir.nodes import module_of
from fxcurv.losses.base import as_loss
from fxcurv.quantities.selection import chosen
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.run import Minibatch

ROWS = tuple(row for row in samples.SAMPLES if row.name.startswith("right."))
JOINT = fxcurv.KFAC(fxcurv.Exact(), joint=True)


def drawn(name: str, batch: int = 3) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    row = samples.find(name)
    return row.build(), row.loss(), samples.inputs(row, batch), samples.targets(row, batch)


def ops_of(name: str) -> list[type[nn.Module]]:
    """The layers that a sample is lowered to."""
    model, loss, x, _ = drawn(name)
    nodes = fxcurv.compile(model, loss, example_inputs=x).stages["canonical"].graph.nodes
    called = [type(module_of(node)) for node in nodes if node.op == "call_module"]
    return [op for op in called if op in (nn.Linear, ops.MatMul)]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("right.conv1d", [ops.MatMul, nn.Linear]),
        ("right.mm", [ops.MatMul, nn.Linear]),
        ("right.linear", [ops.MatMul, nn.Linear]),
        ("right.reshaped_bias", [ops.MatMul, nn.Linear]),
        ("right.frozen_weight", [ops.MatMul, nn.Linear]),
        ("right.transposed", [ops.MatMul, nn.Linear]),
        ("right.twice", [ops.MatMul, ops.MatMul, nn.Linear]),
        ("right.scaled", [nn.Linear]),  # alpha and beta: as it stands
        ("right.and_left", [nn.Linear]),  # a weight that is read otherwise too
        ("right.own_bias", [nn.Linear]),
        ("right.autoencoder", [nn.Linear, nn.Linear]),  # W and Wᵀ: the layout is that of F.linear
        ("right.autoencoder_rows", [nn.Linear, nn.Linear]),
    ],
)
def test_products_are_recognised(name: str, layers: list[type[nn.Module]]) -> None:
    assert ops_of(name) == layers


def test_of_one_sample_joint_blocks_are_the_ggn() -> None:
    """Without sharing, of W with b below it; the operator finds both in the vector of all parameters."""
    model, loss, x, y = drawn("right.vector", 1)
    result = fxcurv.compile(model, loss, [JOINT, fxcurv.EKFAC(fxcurv.Exact(), joint=True)])(x, y)
    matrix = reference.ggn_matrix(model, loss, x, y)
    expected = torch.block_diag(matrix[:16, :16], matrix[16:, 16:])
    block = result["kfac"]["fc.weight"]
    assert block is result["kfac"]["fc.bias"]
    assert block.shape == (4, 4)  # square: [i+1, o] and [o, i+1] are told apart by the weight's shape
    for quantity in result:
        assert_close(result.operator(quantity).dense(), expected, quantity)
    v = torch.linspace(-1, 1, len(matrix), dtype=torch.float64)
    damped = expected + 0.1 * torch.eye(len(v), dtype=torch.float64)
    assert_close(result.operator("kfac").solve(v, 0.1), torch.linalg.solve(damped, v), "solve")
    made = result._mapped(lambda e: replace(e, value=e.value.as_dense() if isinstance(e.value, fxcurv.Block) else None))
    assert_close(made.operator("kfac").dense(), expected, "made dense")


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_equals_autograd(row: Sample) -> None:
    """The fallback finds the same forms, with the same factors and entries."""
    model, loss, x, y = drawn(row.name)
    quantities = ("kflr", "diag_ggn", "batch_grad", "ggn_block", "diag_hessian", JOINT)
    compiled, plain = (
        fxcurv.compile(model, loss, quantities)(x, y),
        by_autograd(model, as_loss(loss), chosen(quantities), Minibatch(x, y)),
    )
    for ours, theirs in zip(compiled.entries, plain.entries, strict=True):
        assert ours.form() == theirs.form(), f"{ours.quantity} of {ours.parameter}"
        a, b = (e.value.dense() if isinstance(e.value, fxcurv.Block) else e.value for e in (ours, theirs))
        if a is not None:
            assert b is not None
            assert_close(a, b, f"{ours.quantity} of {ours.parameter}")


@pytest.mark.parametrize("strategy", ["jacobian", "structured", "ntvp"])
@pytest.mark.parametrize("name", ["right.conv1d", "right.twice", "right.autoencoder"])
def test_kernels(name: str, strategy: Any) -> None:
    model, _, x, _ = drawn(name)
    J = torch.cat([J_p.flatten(2) for J_p in reference.jacobians(model, x).values()], 2)
    assert_close(fxcurv.ntk(model, x, strategy=strategy), torch.einsum("ncp,mdp->nmcd", J, J), name)


def test_a_data_set_in_two_passes() -> None:
    """Bases and eigenvalues of a data set are those of one batch."""
    model, loss, x, y = drawn("right.conv1d", 6)
    compiled = fxcurv.compile(model, loss, [fxcurv.EKFAC(fxcurv.Exact(), joint=joint) for joint in (False, True)])
    whole, total = compiled(x, y), compiled.accumulate([(x[:2], y[:2]), (x[2:], y[2:])])
    for entry in whole.entries:
        assert isinstance(entry.value, fxcurv.Block)
        found = total[entry.quantity][entry.parameter]
        assert_close(found.dense(), entry.value.dense(), f"{entry.quantity} of {entry.parameter}", 1e-7)


@pytest.mark.parametrize("quantity", ["kflr", "ekfac_exact", JOINT], ids=str)
def test_an_optimizer_goes_on_from_a_file(quantity: Any) -> None:
    ended: list[Tensor] = []
    for interrupted in (False, True):
        model, loss, x, y = drawn("right.conv1d", 6)
        optimizer = recipes.Preconditioned(fxcurv.compile(model, loss, quantity), decay=0.5)
        for k in range(4):
            if k == 2 and interrupted:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = recipes.Preconditioned(fxcurv.compile(model, loss, quantity))
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            optimizer.update_curvature(x, y)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        ended.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ended)


def test_half_precision_is_widened() -> None:
    model, loss, x, y = drawn("right.conv1d", 6)
    exact = fxcurv.compile(model, loss, ["grad", "kflr"])(x, y)
    half = fxcurv.compile(model.bfloat16(), loss, ["grad", "kflr"])(x.bfloat16(), y)
    for name, expected in exact["kflr"].items():
        gradient, block = half["grad"][name], half["kflr"][name].dense()
        assert gradient.dtype == block.dtype == torch.float32
        assert (block - expected.dense()).norm() <= 0.1 * expected.dense().norm()
        assert (gradient - exact["grad"][name]).norm() <= 0.1 * exact["grad"][name].norm()


def test_two_orders_of_factors_do_not_merge() -> None:
    """A square weight that one forward pass has on the left, and another on the right."""

    class Square(nn.Module):
        def __init__(self, right: bool) -> None:
            super().__init__()
            self.weight, self.right = nn.Parameter(torch.arange(9, dtype=torch.float64).view(3, 3) / 9), right

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight if self.right else self.weight.T)

    x, y = torch.eye(3, dtype=torch.float64), torch.tensor([0, 2, 1])
    left, right = (fxcurv.compile(Square(right), quantities="kflr")(x, y) for right in (False, True))
    assert fxcurv.merge(left, left)["kflr"]["weight"].in_out is False
    assert fxcurv.merge(right, right)["kflr"]["weight"].in_out is True
    with pytest.raises(fxcurv.FxcurvError, match="'weight' has different options in the two results"):
        fxcurv.merge(left, right)
