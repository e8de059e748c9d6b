"""fxcurv and its oracle against the peers, on what those support; skipped where they are not installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference
import samples
import torch
from test_samples import TOLERANCE
from torch import Tensor, nn

import fxcurv


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal to `TOLERANCE` of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))


def peer(name: str) -> Any:
    """The library, or skip; its own warnings on import are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def peer_tokens() -> nn.Module:
    """Linear layers on tokens, pooled."""
    parts = {"first": nn.Linear(3, 4), "second": nn.Linear(4, 3), "head": nn.Linear(3, 3)}
    return samples.Model(lambda m, x: m.head(m.second(m.first(x).tanh()).relu().mean(1)), **parts)


def peer_conv() -> nn.Module:
    """Convolutions with stride, padding and dilation."""
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 4, (2, 1), dilation=(1, 2)), nn.ReLU()),
        *(nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(12, 3)),
    )


def peer_norm() -> nn.Module:
    """A BatchNorm in eval mode, which BackPACK supports and curvlinops does not."""
    layers = (nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3))
    return nn.Sequential(*layers)


# What curvlinops supports: Linear on any rank, Conv2d with zero padding and without groups, outputs [N, C].
PEER_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: samples.mlp(4, 5, 3), (4,)),
    "tokens": (peer_tokens, (5, 3)),
    "conv": (peer_conv, (2, 8, 7)),
    "norm": (peer_norm, (2, 8, 7)),
}
PEER_LOSSES = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)


def regression(make: Callable[[], nn.Module], *shape: int, batch: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """A seeded float64 model in eval mode, x, and a target for it."""
    model = samples.seeded(make, "regression")
    generator = torch.Generator().manual_seed(1)
    x = samples.normal((batch, *shape), generator)
    return model, x, samples.normal(tuple(model(x).shape), generator)


def peer_data(model_name: str, loss: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """A seeded model of `PEER_MODELS`, x, and a target that suits the loss."""
    make, shape = PEER_MODELS[model_name]
    model, x, y = regression(make, *shape, batch=4)
    if isinstance(loss, nn.CrossEntropyLoss):
        return model, x, torch.tensor([0, 2, 1, 1])
    return model, x, (y > 0).to(y.dtype) if isinstance(loss, nn.BCEWithLogitsLoss) else y


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_type", PEER_LOSSES)
@pytest.mark.parametrize("name", ["mlp", "tokens", "conv"])
def test_factors_agree_with_curvlinops(
    name: str, loss_type: type[nn.Module], reduction: str, fisher: str, approx: Any, joint: bool
) -> None:
    loss = loss_type(reduction=reduction)
    model, x, y = peer_data(name, loss)
    operator = peer("curvlinops").KFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [(x, y)],
        fisher_type=fisher,
        kfac_approx=approx,
        separate_weight_and_bias=not joint,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    columns = reference.exact_columns if fisher == "type-2" else reference.empirical_columns
    factors = reference.kfac(model, x, columns(loss, reference.outputs(model, x), y), approx, joint)
    factor = fxcurv.Exact() if fisher == "type-2" else fxcurv.Empirical()
    blocks = fxcurv.compile(model, loss, fxcurv.KFAC(factor, approx, joint))(x, y)["kfac"]
    assert {f"{layer}.weight" for layer in operator._input_covariances} == set(factors)
    for layer, A in operator._input_covariances.items():
        G, weight = operator._gradient_covariances[layer], f"{layer}.weight"
        assert_close(factors[weight][0], A)
        assert_close(factors[weight][1], G)
        assert_close(blocks[weight].A, A)
        assert_close(blocks[weight].G, G)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_type", PEER_LOSSES)
@pytest.mark.parametrize("name", ["mlp", "tokens", "conv"])
def test_ggn_agrees_with_curvlinops(name: str, loss_type: type[nn.Module], reduction: str) -> None:
    loss = loss_type(reduction=reduction)
    model, x, y = peer_data(name, loss)
    operator = peer("curvlinops").GGNLinearOperator(
        model, loss, list(model.parameters()), [(x, y)], check_deterministic=False
    )
    G = reference.ggn_matrix(model, loss, x, y)
    assert_close(G, operator @ torch.eye(G.shape[0], dtype=torch.float64))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_type", [nn.CrossEntropyLoss, nn.MSELoss])
@pytest.mark.parametrize("name", ["mlp", "conv", "norm"])
def test_diagonal_agrees_with_backpack(name: str, loss_type: type[nn.Module], reduction: str) -> None:
    backpack = peer("backpack")
    from backpack.extensions import DiagGGNExact

    loss = loss_type(reduction=reduction)
    model, x, y = peer_data(name, loss)
    expected = reference.diag_ggn(model, loss, x, y)
    result = fxcurv.compile(model, loss, "diag_ggn")(x, y)["diag_ggn"]
    extended, extended_loss = backpack.extend(model), backpack.extend(loss)
    with backpack.backpack(DiagGGNExact()):
        extended_loss(extended(x), y).backward()
    for key, p in model.named_parameters():
        assert_close(expected[key], p.diag_ggn_exact)  # type: ignore
        assert_close(result[key], p.diag_ggn_exact)  # type: ignore
