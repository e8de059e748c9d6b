"""fxcurv and its oracle against the peers, on what those support; skipped where they are not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import samples
import torch
from peers import assert_close, peer
from torch import Tensor, nn

import fxcurv


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


def extended(name: str, loss: nn.Module, *extensions: Any) -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    """A model of `PEER_MODELS` on whose parameters BackPACK has left what the extensions save; and one left alone."""
    backpack = peer("backpack")
    model, x, y = peer_data(name, loss)
    theirs, their_loss = (
        backpack.extend(peer_data(name, loss)[0]),
        backpack.extend(type(loss)(reduction=loss.reduction)),
    )
    with backpack.backpack(*extensions):
        their_loss(theirs(x), y).backward()
    return model, x, y, theirs


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_type", [nn.CrossEntropyLoss, nn.MSELoss])
@pytest.mark.parametrize("name", ["mlp", "conv", "norm"])
def test_the_family_agrees_with_backpack(name: str, loss_type: type[nn.Module], reduction: str) -> None:
    """First-order extensions, each sample's diagonal, and what the square root is a root of."""
    peer("backpack")
    from backpack.extensions import BatchGrad, BatchL2Grad, SqrtGGNExact, SumGradSquared, Variance

    extensions = (BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance())
    extensions += () if name == "norm" else (SqrtGGNExact(),)
    model, x, y, theirs = extended(name, loss := loss_type(reduction=reduction), *extensions)
    asked = ["batch_grad", "batch_l2", "sum_grad_squared", "variance", "sqrt_ggn"]
    result = fxcurv.compile(model, loss, asked)(x, y)
    for key, p in theirs.named_parameters():
        found: Any = p
        assert_close(result["batch_grad"][key], found.grad_batch)
        assert_close(result["batch_l2"][key], found.batch_l2)
        assert_close(result["sum_grad_squared"][key], found.sum_grad_squared)
        assert_close(result["variance"][key], found.variance)
        if name != "norm":
            ours, root = (V.flatten(2).flatten(0, 1) for V in (result["sqrt_ggn"][key], found.sqrt_ggn_exact))
            assert_close(ours.T @ ours, root.T @ root)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_type", [nn.CrossEntropyLoss, nn.MSELoss])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_diagonals_of_samples_and_of_the_hessian_agree_with_backpack(name: str, loss_type: type[nn.Module]) -> None:
    peer("backpack")
    from backpack.extensions import BatchDiagGGNExact, BatchDiagHessian, DiagHessian

    extensions = (BatchDiagGGNExact(), DiagHessian(), BatchDiagHessian())
    model, x, y, theirs = extended(name, loss := loss_type(reduction="mean"), *extensions)
    result = fxcurv.compile(model, loss, ["batch_diag_ggn", "diag_hessian", "batch_diag_hessian"])(x, y)
    for key, p in theirs.named_parameters():
        found: Any = p
        assert_close(result["batch_diag_ggn"][key], found.diag_ggn_exact_batch)
        assert_close(result["diag_hessian"][key], found.diag_h)
        assert_close(result["batch_diag_hessian"][key], found.diag_h_batch)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("loss_type", PEER_LOSSES)
@pytest.mark.parametrize(
    ("name", "approx"),
    [("mlp", "expand"), ("mlp", "reduce"), ("tokens", "expand"), ("tokens", "reduce"), ("conv", "expand")],
)
def test_ekfac_agrees_with_curvlinops(name: str, approx: Any, loss_type: type[nn.Module], joint: bool) -> None:
    """Of weights: biases by themselves have exact blocks here. Factors of low rank leave a basis open."""
    loss = loss_type()
    model, x, y = peer_data(name, loss)
    operator = peer("curvlinops").EKFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [(x, y)],
        fisher_type="type-2",
        kfac_approx=approx,
        separate_weight_and_bias=not joint,
        check_deterministic=False,
    )
    ours = fxcurv.compile(model, loss, fxcurv.EKFAC(fxcurv.Exact(), approx, joint))(x, y)["ekfac"]
    check_operator(operator, model, {name: b for name, b in ours.items() if isinstance(b, fxcurv.Eigenbasis)})


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["mlp", "tokens", "conv"])
def test_foof_agrees_with_curvlinops(name: str, approx: Any) -> None:
    loss = nn.MSELoss()
    model, x, y = peer_data(name, loss)
    operator = peer("curvlinops").KFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [(x, y)],
        fisher_type="forward-only",
        kfac_approx=approx,
        separate_weight_and_bias=True,
        check_deterministic=False,
    )
    check_operator(operator, model, fxcurv.compile(model, loss, fxcurv.FOOF(approx))(x, y)["foof"])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "tokens", "conv"])
def test_ekfac_of_a_data_set_agrees_with_curvlinops(name: str, fisher: str, reduction: str, joint: bool) -> None:
    """Both take two passes over three unequal batches."""
    make, shape = PEER_MODELS[name]
    loss, (model, x, _) = nn.CrossEntropyLoss(reduction=reduction), regression(make, *shape, batch=40)
    y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(0))
    batches = list(zip(x.split((20, 7, 13)), y.split((20, 7, 13)), strict=True))
    operator = peer("curvlinops").EKFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        batches,
        fisher_type=fisher,
        kfac_approx="expand",
        separate_weight_and_bias=not joint,
        check_deterministic=False,
    )
    factor = fxcurv.Exact() if fisher == "type-2" else fxcurv.Empirical()
    ours = fxcurv.compile(model, loss, fxcurv.EKFAC(factor, joint=joint)).accumulate(batches)["ekfac"]
    check_operator(operator, model, {name: b for name, b in ours.items() if isinstance(b, fxcurv.Eigenbasis)})


def check_operator(operator: Any, model: nn.Module, blocks: Any) -> None:
    """An operator on all parameters equals the block-diagonal one of these blocks, on their parameters."""
    parameters = dict(model.named_parameters())
    matrix = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    start, places = 0, {}
    for name, p in parameters.items():
        places[name] = range(start, start := start + p.numel())
    expected, compared = torch.zeros_like(matrix), torch.zeros_like(matrix)
    for block in {id(block): block for block in blocks.values()}.values():
        owners = [torch.tensor(places[name]).view(len(parameters[name]), -1) for name in block.parameters]
        rows = torch.cat(owners, 1).flatten()
        expected[rows[:, None], rows] = block.dense()
        compared[rows] = 1
    assert_close(expected, matrix * compared * compared.T)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mlp", "tokens", "conv"])
def test_jacobians_and_empirical_fisher_agree_with_curvlinops(name: str) -> None:
    curvlinops, loss = peer("curvlinops"), nn.CrossEntropyLoss()
    model, x, y = peer_data(name, loss)
    parameters = list(model.parameters())
    result = fxcurv.compile(model, loss, ["jacobian", fxcurv.GGNBlock(fxcurv.Empirical())])(x, y)
    J = curvlinops.JacobianLinearOperator(model, parameters, [(x, y)], check_deterministic=False)
    ours = torch.cat([j.flatten(2).flatten(0, 1) for j in result["jacobian"].values()], 1)
    assert_close(ours, J @ torch.eye(J.shape[1], dtype=torch.float64))
    F = curvlinops.EFLinearOperator(model, loss, parameters, [(x, y)], check_deterministic=False)
    matrix, start = F @ torch.eye(F.shape[1], dtype=torch.float64), 0
    for block in result["ggn_block"].values():
        part = slice(start, start := start + block.numel)
        assert_close(block.dense(), matrix[part, part])
