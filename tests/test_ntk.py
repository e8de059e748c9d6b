"""The neural tangent kernel by every strategy against Jacobians by brute force; linearized models against their ODE."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import samples
import torch
from samples import Sample
from test_samples import assert_close
from torch import Tensor, nn

import fxcurv

NAMES = (
    *("linear.vector", "linear.tokens", "conv2d.everything", "conv2d.plain", "conv2d.groups", "conv2d.depthwise"),
    *("norm.2d", "join.add", "param.applied_twice_tokens", "param.tied_weight", "param.grouped_reused"),
    *("free.additive", "free.scale", "generic.attention", "transformer.encoder_pre_norm", "mse.on_tokens.sum"),
)
ROWS = tuple(map(samples.find, NAMES))
STRATEGIES: tuple[Any, ...] = (None, "jacobian", "structured")


def summands(model: nn.Module, x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    """K[n, m, c, d] of each parameter, from Jacobians."""
    left, right = reference.jacobians(model, x1), reference.jacobians(model, x2)
    return {name: torch.einsum("ncp,mdp->nmcd", J.flatten(2), right[name].flatten(2)) for name, J in left.items()}


def batches(row: Sample) -> tuple[nn.Module, Tensor, Tensor]:
    x = samples.inputs(row, 5)
    return row.build(), x[:3], x[3:]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_two_batches(row: Sample, strategy: Any) -> None:
    """Kernels of two batches of different sizes, each parameter's summand, by Jacobians or without, to 1e-10."""
    model, x1, x2 = batches(row)
    kernel, expected = fxcurv.NTK(model, strategy), summands(model, x1, x2)
    found = kernel.of_each(x1, x2)
    assert all(not expected[name].any() for name in expected.keys() - found.keys())
    for name, K in found.items():
        assert_close(K, expected[name], name, 1e-10)
    total = torch.stack([*expected.values()]).sum(0)
    assert_close(kernel(x1, x2), total, "full", 1e-10)
    diagonal = total.diagonal(dim1=2, dim2=3)
    assert_close(kernel(x1, x2, "diagonal"), diagonal, "diagonal", 1e-10)
    assert_close(kernel(x1, x2, "trace"), diagonal.sum(2), "trace", 1e-10)
    itself = torch.stack([*summands(model, x1, x1).values()]).sum(0)
    assert_close(kernel(x1), itself, "one batch", 1e-10)


@pytest.mark.parametrize("name", ["linear.vector", "join.add", "param.tied_weight", "attention.causal"])
def test_products_with_vectors(name: str) -> None:
    row = samples.find(name)
    model, x1, x2 = batches(row)
    expected = torch.stack([*summands(model, x1, x2).values()]).sum(0)
    v = samples.normal((2, *row.out), torch.Generator().manual_seed(0))
    product = fxcurv.NTK(model).product(v, x1, x2)
    assert_close(product.flatten(1), torch.einsum("nmcd,md->nc", expected, v.flatten(1)), "product", 1e-10)
    for kind in ("full", "diagonal", "trace"):
        ours: Any = fxcurv.ntk(model, x1, x2, kind, "ntvp")
        assert_close(ours, fxcurv.ntk(model, x1, x2, kind), kind, 1e-10)
    itself = torch.stack([*summands(model, x1, x1).values()]).sum(0)
    assert_close(fxcurv.ntk(model, x1, strategy="ntvp"), itself, "one batch", 1e-10)


@pytest.mark.parametrize("strategy", ["jacobian", "ntvp"])
def test_one_of_several_outputs(strategy: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        body = nn.Linear(4, 3).double().eval()
    pair: Any = lambda m, x: (x, m.body(x).tanh())  # noqa: E731
    both = samples.Model(pair, body=body).eval()
    alone = samples.Model(lambda m, x: m.body(x).tanh(), body=body).eval()
    x = samples.normal((3, 4), torch.Generator().manual_seed(0))
    assert_close(fxcurv.NTK(both, strategy, output=1)(x), fxcurv.ntk(alone, x), "the second output", 1e-10)


def test_large_products_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x1, x2 = batches(samples.find("linear.tokens"))
    expected = fxcurv.ntk(model, x1, x2)
    monkeypatch.setattr("fxcurv.pairs.CHUNK", 1)
    monkeypatch.setattr("fxcurv.run.COLUMN_BYTES", 1)
    for kind, value in (("full", expected), ("diagonal", expected.diagonal(dim1=2, dim2=3))):
        cut: Any = fxcurv.ntk(model, x1, x2, kind, "structured")  # pyright: ignore[reportArgumentType]
        assert_close(cut, value, kind, 1e-10)


def test_the_cheaper_strategy_is_taken() -> None:
    """Without positions nothing is formed for a wide layer; a small kernel over many positions has its Jacobian."""
    from fxcurv.pairs import kept
    from fxcurv.quantities import Used

    wide = Used("w", (64, 64), 1, 64, 64, 1, True)
    small = Used("w", (4, 3, 3, 3), 1, 4, 27, 900, True)
    assert set(kept(wide)) == {"x", "S"}
    assert set(kept(small)) == {"entries"}


@pytest.mark.parametrize(("argument", "value"), [("kind", "half"), ("strategy", "guess")])
def test_refusals(argument: str, value: str) -> None:
    model, x, _ = batches(samples.find("linear.vector"))
    with pytest.raises(fxcurv.QuantityError, match=f"{argument}='{value}'; choose one of"):
        fxcurv.ntk(model, x, **{argument: value})  # type: ignore[arg-type]


def test_shapes_are_checked() -> None:
    model, x, _ = batches(samples.find("linear.vector"))
    with pytest.raises(fxcurv.InputError, match="a vector of shape"):
        fxcurv.NTK(model).product(torch.zeros(2, 3).double(), x)
    with pytest.raises(fxcurv.InputError, match="targets of shape"):
        fxcurv.Linearized(fxcurv.NTK(model), x, torch.zeros(2, 3).double())(x)


# Linearized models --------------------------------------------------------------------------------------------------


def flow(model: nn.Module, x: Tensor, y: Tensor, x_test: Tensor, scaled_time: float) -> Tensor:
    """f_t(x_test) of the linearized model by solving its ODE in parameter space: θ' = -Jᵀ (f_0 + J (θ - θ_0) - y)."""
    names = reference.trainable(model)
    J, J_test = (
        torch.cat([jacobian[n].flatten(2) for n in names], 2).flatten(0, 1)
        for jacobian in (reference.jacobians(model, x), reference.jacobians(model, x_test))
    )
    residual = (reference.outputs(model, x) - y).flatten()
    P = J.shape[1]
    system = torch.zeros(P + 1, P + 1, dtype=J.dtype)  # of (θ - θ_0, 1)
    system[:P, :P], system[:P, P] = -J.T @ J, -J.T @ residual
    step = torch.linalg.matrix_exp(scaled_time * system)[:P, P]
    f_0 = reference.outputs(model, x_test)
    return f_0 + (J_test @ step).view_as(f_0)


@pytest.mark.parametrize("time", [0.0, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", ["linear.vector", "join.add"])
def test_gradient_flow_in_closed_form(name: str, time: float) -> None:
    row = samples.find(name)
    model, x, x_test = batches(row)
    y = samples.normal((3, *row.out), torch.Generator().manual_seed(1))
    linearized = fxcurv.Linearized(fxcurv.NTK(model), x, y)
    assert_close(linearized(x_test, time, rate=0.5), flow(model, x, y, x_test, 0.5 * time), "f_t", 1e-8)


def test_at_infinity_it_is_kernel_regression() -> None:
    row = samples.find("join.add")
    model, x, x_test = batches(row)
    y = samples.normal((3, *row.out), torch.Generator().manual_seed(1))
    kernel = fxcurv.NTK(model)
    K, K_test = (k.transpose(1, 2).flatten(2).flatten(0, 1) for k in (kernel(x), kernel(x_test, x)))
    residual = (y - reference.outputs(model, x)).flatten()
    for jitter in (0.0, 0.3):
        weights = torch.linalg.solve(K + jitter * torch.eye(len(K)).to(K), residual)
        expected = reference.outputs(model, x_test) + (K_test @ weights).view(2, *row.out)
        assert_close(fxcurv.Linearized(kernel, x, y, jitter)(x_test, math.inf), expected, f"jitter {jitter}", 1e-8)
    assert_close(fxcurv.Linearized(kernel, x, y)(x), y, "it interpolates", 1e-8)
