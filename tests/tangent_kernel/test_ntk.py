"""The neural tangent kernel by every strategy against Jacobians by brute force; linearized models against their ODE."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import samples
import torch
from comparison import assert_close
from samples import Sample
from torch import Tensor, nn

import fxcurv
from fxcurv.quantities import inner_products as pairs
from fxcurv.runtime.memory import bytes_of
from fxcurv.tangent_kernel.tiling import KernelInput, Peak, Request, Tile, tiles_for

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
    monkeypatch.setattr("fxcurv.quantities.inner_products.CHUNK", 1)
    monkeypatch.setattr("fxcurv.runtime.run.COLUMN_BYTES", 1)
    for kind, value in (("full", expected), ("diagonal", expected.diagonal(dim1=2, dim2=3))):
        cut: Any = fxcurv.ntk(model, x1, x2, kind, "structured")  # pyright: ignore[reportArgumentType]
        assert_close(cut, value, kind, 1e-10)


def test_the_cheaper_strategy_is_taken() -> None:
    """Without positions nothing is formed for a wide layer; a small kernel over many positions has its Jacobian."""
    from fxcurv.quantities.inner_products import stored_columns
    from fxcurv.quantities.protocol import ParameterUsage

    wide = ParameterUsage("w", (64, 64), 1, 64, 64, 1, True)
    small = ParameterUsage("w", (4, 3, 3, 3), 1, 4, 27, 900, True)
    assert set(stored_columns(wide)) == {"x", "S"}
    assert set(stored_columns(small)) == {"entries"}


@pytest.mark.parametrize("room", [1, 400, 3000])
@pytest.mark.parametrize("name", ["linear.tokens", "conv2d.groups", "param.applied_twice_tokens"])
def test_entries_are_formed_in_pieces(name: str, room: int) -> None:
    """However little room there is, the products of positions and of the entries that they make are the same."""
    model, x1, x2 = batches(samples.find(name))
    kernel = fxcurv.NTK(model, "structured")
    jobs = kernel.compiled.prepare(x1).plan.jobs
    sides = [kernel._columns(KernelInput(kernel.compiled.prepare(x), x), Tile(slice(9), slice(0, 2))) for x in (x1, x2)]
    for name in (job.usage.name for job in jobs):
        left, right = (side[name] for side in sides)
        for alike in (False, True):
            expected = pairs.products(left, right, alike, "structured")
            cut = pairs.products(left, right, alike, "jacobian", room)
            assert_close(cut, expected, f"{name} {alike}", 1e-10)
            assert_close(pairs.products(left, right, alike, "structured", room), expected, f"{name} {alike}", 1e-10)
            assert_close(pairs.products(left, left, alike, "jacobian", room), pairs.products(left, left, alike), name)


# Memory -----------------------------------------------------------------------------------------------------------


def convolutions(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Weights of which columns are kept as entries, and a last layer whose positions are."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 6)).to(dtype).eval()


def images(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(n), dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "budget", "samples", "columns"),
    [("full", "2MiB", 7, 6), ("full", "1MiB", 3, 6), ("diagonal", "800KiB", 2, 6), ("trace", "200KiB", 1, 3)],
)
def test_a_budget_changes_the_tiles_and_not_the_kernel(kind: Any, budget: str, samples: int, columns: int) -> None:
    model, x1, x2 = convolutions(), images(7), images(4)
    free, bounded = fxcurv.NTK(model), fxcurv.NTK(model, memory_budget=budget)
    for pair in ((x1, None), (x2, x1)):
        assert_close(bounded(*pair, kind), free(*pair, kind), f"{kind} in {budget}", 1e-12)
    left, request = KernelInput(bounded.compiled.prepare(x1), x1), Request(kind != "full", kind == "trace")
    tiles = tiles_for(left, None, request, bytes_of(budget))
    assert (tiles.samples, tiles.columns) == (samples, columns)
    assert Peak.of(left, None, request, tiles).highest <= (bytes_of(budget) or 0)


def test_a_budget_bounds_the_summands_too() -> None:
    model, x1, x2 = convolutions(), images(7), images(4)
    expected = fxcurv.NTK(model).of_each(x1, x2)
    for name, K in fxcurv.NTK(model, memory_budget="400KiB").of_each(x1, x2).items():
        assert_close(K, expected[name], name, 1e-12)


def test_a_kernel_beyond_the_budget_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convolutions(), images(2)
    kernel = fxcurv.NTK(model, memory_budget="1MiB")
    kernel(x)
    monkeypatch.setattr(kernel, "_columns", lambda *_: pytest.fail("it ran"))
    with pytest.raises(
        fxcurv.FxcurvError, match=r"the kernel takes 1\.056 MiB, .* memory_budget=1 MiB; allow .* MiB"
    ) as e:
        kernel(images(62))
    assert e.value.code == "FXC503"
    with pytest.raises(fxcurv.FxcurvError, match=r"one column of one sample of each batch .* at least .* KiB") as e:
        fxcurv.ntk(model, x, memory_budget="10KiB")
    assert e.value.code == "FXC503"


def test_budgets_that_bound_nothing() -> None:
    model, x = convolutions(), images(2)
    with pytest.raises(fxcurv.QuantityError, match="plain autograd"):
        fxcurv.ntk(model, x, strategy="ntvp", memory_budget="1GiB")
    with pytest.raises(fxcurv.QuantityError, match=r"memory_budget='much'; give bytes"):
        fxcurv.NTK(model, memory_budget="much")


MEASURE = """
import json
import torch
from torch import nn
import fxcurv
from benchmark.devices import CPU

torch.set_num_threads(1)
torch.manual_seed(0)
CPU().limited(gibibytes=64)
layers = (nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10)).eval(), torch.randn(40, 3, 20, 20)
for budget in (None, "20MiB"):
    kernel = fxcurv.NTK(model, memory_budget=budget)
    kernel(x)
    print(json.dumps(CPU().peak(lambda: kernel(x))))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system cannot tell a peak")
def test_the_measured_peak_stays_inside_of_the_budget() -> None:
    root = Path(fxcurv.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tools")])}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    free, bounded = map(json.loads, done.stdout.split())
    assert free > 30 << 20, "without a budget it takes more"
    assert bounded <= 20 << 20


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
