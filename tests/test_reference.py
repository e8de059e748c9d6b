"""The oracle against closed forms, identities that need no oracle and other libraries; wrong variants must fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import reference as ref
import samples
import torch
from samples import Sample
from torch import Tensor, nn
from torch.nn import functional as F

import fxcurv

ORDINARY = (*samples.SAMPLES, *samples.LOSSES, *samples.MODELS)
EVERYTHING = (*ORDINARY, *samples.TRICKY)


def named(*rows: Sample) -> Any:
    """A parametrisation over samples, by name."""
    return pytest.mark.parametrize("sample", rows, ids=lambda row: row.name)


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-9 of the largest entry."""
    scale = max(expected.abs().max().item(), 1e-30) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * scale)


def differ(actual: Tensor, expected: Tensor) -> None:
    """Apart by more than a thousandth of the largest entry: what a wrong variant must do."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() > 1e-3 * expected.abs().max()


def drawn(sample: Sample, batch: int = 2) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """model, loss, x, y."""
    return sample.build(), sample.loss(), samples.inputs(sample, batch), samples.targets(sample, batch)


def regression(make: Callable[[], nn.Module], *shape: int, batch: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """A seeded float64 model in eval mode, x, and a target for it."""
    model = samples.seeded(make, "regression")
    generator = torch.Generator().manual_seed(1)
    x = samples.normal((batch, *shape), generator)
    return model, x, samples.normal(tuple(model(x).shape), generator)


def exact(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The exact columns at the model's output."""
    return ref.exact_columns(loss, ref.outputs(model, x), y)


# The table itself


def test_names_are_unique() -> None:
    names = [row.name for row in (*EVERYTHING, *samples.MIXING)]
    assert len(set(names)) == len(names)


@named(*ORDINARY)
def test_build_is_seeded_and_leaves_the_global_state_alone(sample: Sample) -> None:
    before = torch.random.get_rng_state()
    first, second = sample.build().state_dict(), sample.build().state_dict()
    drawn(sample)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(tensor.dtype == torch.float64 for tensor in first.values() if tensor.is_floating_point())


@named(*EVERYTHING)
def test_samples_of_a_batch_are_independent(sample: Sample) -> None:
    model, _, x, _ = drawn(sample, 3)
    output = model(x.clone())
    assert output.shape == (3, *sample.out)
    same(ref.outputs(model, x), output.detach())


@named(*samples.MIXING)
def test_mixing_samples_do_mix(sample: Sample) -> None:
    model, _, x, _ = drawn(sample, 3)
    differ(ref.outputs(model, x), model(x).detach())


@named(*ORDINARY)
def test_every_reached_parameter_has_curvature(sample: Sample) -> None:
    model, loss, x, y = drawn(sample)
    diagonals = ref.diag_ggn(model, loss, x, y)
    dead = {name for name, diagonal in diagonals.items() if not diagonal.abs().max() > 1e-9}
    unreached = {"unused.weight", "unused.bias", "wasted.weight", "wasted.bias"}
    assert dead <= (unreached if sample.name == "param.never_called" else {"before.bias"})
    before = model(x).detach()
    with torch.no_grad():
        for name in dead:  # softmax, norms and differences do not see a constant: it moves nothing
            model.get_parameter(name).add_(1)
    same(model(x).detach(), before)
    assert all(diagonal.isfinite().all() and diagonal.min() > -1e-12 for diagonal in diagonals.values())


# First order


@named(*EVERYTHING)
def test_grad_is_what_autograd_says(sample: Sample) -> None:
    model, loss, x, y = drawn(sample)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(loss(model(x), y), list(parameters.values()), allow_unused=True)
    actual = ref.grad(model, loss, x, y)
    assert list(actual) == list(parameters)
    largest = max(gradient.abs().max().item() for gradient in expected if gradient is not None)
    for (name, p), gradient in zip(parameters.items(), expected, strict=True):
        zeros = torch.zeros_like(p)  # where an op does not see a constant, a bias has rounding for a gradient
        torch.testing.assert_close(
            actual[name], zeros if gradient is None else gradient, rtol=1e-9, atol=1e-9 * largest
        )


# Loss Hessians and columns


@named(*samples.LOSSES)
def test_loss_hessian_has_the_closed_form(sample: Sample) -> None:
    """ω (diag(p) - p pᵀ) for cross entropy, 2ω for MSE, ω p(1-p) with p = sigmoid(f) for BCE."""
    model, loss, x, y = drawn(sample, 4)
    f = ref.outputs(model, x)
    omega = ref.term_weights(loss, f, y).expand_as(f)
    if isinstance(loss, nn.CrossEntropyLoss):
        p = f.softmax(1)
        diagonal, outer = torch.diag_embed((omega * p).flatten(1)), torch.zeros(4, f[0].numel(), f[0].numel())
        position = torch.arange(f[0].numel()) % math.prod(f.shape[2:])
        together = position[:, None] == position[None, :]
        outer = together * torch.einsum("nc,nd->ncd", (omega * p).flatten(1), p.flatten(1))
        expected = diagonal - outer
    else:
        curvature = torch.full_like(f, 2.0) if isinstance(loss, nn.MSELoss) else f.sigmoid() * (1 - f.sigmoid())
        expected = torch.diag_embed((omega * curvature).flatten(1) if f.ndim > 1 else (omega * curvature).unsqueeze(1))
    same(ref.loss_hessians(loss, f, y), expected)


@named(*samples.LOSSES)
def test_exact_columns_are_a_square_root(sample: Sample) -> None:
    model, loss, x, y = drawn(sample, 4)
    f = ref.outputs(model, x)
    S = ref.exact_columns(loss, f, y)
    assert S.shape[1:] == f.shape
    S = S.reshape(*S.shape[:2], -1)
    same(torch.einsum("vnc,vnd->ncd", S, S), ref.loss_hessians(loss, f, y))


def test_empirical_columns_have_the_closed_form() -> None:
    """√w (p - onehot(y)), 2√(1/numel) (f - y), √(w/numel) (sigmoid - y), with w = 1/N for the mean cross entropy."""
    generator = torch.Generator().manual_seed(0)
    f = samples.normal((4, 3), generator)
    y, target, labels = torch.tensor([0, 2, 1, 1]), samples.normal((4, 3), generator), f.sign().clamp(min=0)
    onehot = F.one_hot(y, 3)
    same(ref.empirical_columns(nn.CrossEntropyLoss(), f, y)[0], (f.softmax(1) - onehot) / 2)
    same(ref.empirical_columns(nn.CrossEntropyLoss(reduction="sum"), f, y)[0], f.softmax(1) - onehot)
    same(ref.empirical_columns(nn.MSELoss(), f, target)[0], 2 * (f - target) / math.sqrt(12))
    same(ref.empirical_columns(nn.BCEWithLogitsLoss(), f, labels)[0], (f.sigmoid() - labels) / math.sqrt(12))
    w = samples.constant(0.5, 2.0, 0.0)
    weighted = ref.empirical_columns(nn.CrossEntropyLoss(weight=w), f, y)[0]
    same(weighted, (w[y] / w[y].sum()).sqrt().unsqueeze(1) * (f.softmax(1) - onehot))
    assert weighted[1].count_nonzero() == 0  # class 2 weighs nothing


@named(*samples.LOSSES)
def test_empirical_columns_times_root_weight_are_the_gradient(sample: Sample) -> None:
    model, loss, x, y = drawn(sample, 4)
    f = ref.outputs(model, x).requires_grad_()
    omega = ref.term_weights(loss, f, y)
    same(ref.empirical_columns(loss, f, y)[0] * omega.sqrt(), torch.autograd.grad(loss(f, y), f)[0])


@named(*samples.PARAMETERS)
def test_the_model_is_left_as_it_was(sample: Sample) -> None:
    model, loss, x, y = drawn(sample)
    before = list(model.named_parameters(remove_duplicate=False))
    values = [p.detach().clone() for _, p in before]
    ref.ggn(model, loss, x, y)
    ref.kfac(model, x, exact(model, loss, x, y))
    after = list(model.named_parameters(remove_duplicate=False))
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(p is q and q.grad is None for (_, p), (_, q) in zip(before, after, strict=True))
    assert all(torch.equal(p, value) for (_, p), value in zip(after, values, strict=True))


def test_a_loss_that_mixes_samples_is_refused() -> None:
    f = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="mixes samples"):
        ref.loss_hessians(lambda f, y: (f - y).sum().square(), f, f)


def test_train_mode_is_refused() -> None:
    model, _, x, _ = drawn(samples.NORMS[0])
    with pytest.raises(AssertionError, match="eval"):
        ref.outputs(model.train(), x)


# The GGN


def test_ggn_of_linear_regression() -> None:
    """MSE and f = W x + b: G = 2c (I ⊗ XᵀX) for the weight, 2c N I for the bias, 2c (I ⊗ Σ x) between them."""
    model, x, y = regression(lambda: nn.Linear(4, 3), 4, batch=5)
    c, eye = 1 / y.numel(), torch.eye(3, dtype=torch.float64)
    G = ref.ggn(model, nn.MSELoss(), x, y)
    same(G["weight", "weight"], 2 * c * torch.kron(eye, x.T @ x))
    same(G["bias", "bias"], 2 * c * 5 * eye)
    same(G["weight", "bias"], 2 * c * torch.kron(eye, x.sum(0).unsqueeze(1)))
    same(G["bias", "weight"], G["weight", "bias"].T)
    differ(2 * c * torch.kron(x.T @ x, torch.eye(4)[:3, :3].double()), G["weight", "weight"])  # the other order


@named(*(row for row in samples.LOSSES if row.out == (3,)))
def test_ggn_is_the_hessian_where_the_model_is_linear(sample: Sample) -> None:
    loss, y = sample.loss(), samples.targets(sample)
    model, x, _ = regression(lambda: nn.Linear(4, 3), 4, batch=2)

    def total(theta: Tensor) -> Tensor:
        W, b = theta.split((12, 3))
        return loss(x @ W.view(3, 4).T + b, y)

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    same(ref.ggn_matrix(model, loss, x, y), torch.func.jacrev(torch.func.jacrev(total))(theta))


@named(*samples.PARAMETERS, *samples.LOSSES)
def test_ggn_is_positive_semidefinite_and_consistent(sample: Sample) -> None:
    model, loss, x, y = drawn(sample)
    G, S = ref.ggn_matrix(model, loss, x, y), exact(model, loss, x, y)
    same(G, G.T)
    assert torch.linalg.eigvalsh(G).min() > -1e-12
    same(G.diag(), torch.cat([d.flatten() for d in ref.diag_ggn(model, loss, x, y).values()]))
    same(G.diag(), torch.cat([d.flatten() for d in ref.diagonal(model, x, S).values()]))
    for name in ref.trainable(model):
        same(ref.dense_block(model, x, S, name), ref.ggn_block(model, loss, x, y, name))


def test_tied_weights_are_the_untied_model_with_summed_jacobians() -> None:
    row = samples.find("param.tied_weight")
    tied, loss, x, y = drawn(row, 3)
    untied = samples.seeded(samples.two_layers, "untied")
    untied.load_state_dict(tied.state_dict())
    G = ref.ggn(untied, loss, x, y)
    names = ("fc1.weight", "fc2.weight")
    assert "fc2.weight" not in ref.trainable(tied)
    same(ref.ggn_block(tied, loss, x, y, "fc1.weight"), sum(G[p, q] for p in names for q in names))  # type: ignore
    differ(G[names[0], names[0]] + G[names[1], names[1]], ref.ggn_block(tied, loss, x, y, names[0]))  # no cross terms


# Kronecker factors: identities


def kfac_error(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, name: str, **options: Any) -> float:
    """|G ⊗ A - GGN block| relative to the largest entry."""
    A, G = ref.kfac(model, x, exact(model, loss, x, y), **options)[name]
    block = ref.ggn_block(model, loss, x, y, name)
    return ((ref.kronecker_block(A, G) - block).abs().max() / block.abs().max()).item()


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@named(*(row for row in samples.LOSSES if row.out == (3,)))
def test_kfac_is_the_ggn_for_one_sample_without_sharing(sample: Sample, approx: str) -> None:
    """N = 1 and S_l = 1: the block is (Σ_v S Sᵀ) ⊗ (x xᵀ), whatever the net; for N = 2 it is not."""
    model, loss, x, y = drawn(sample, 1)
    for name in ("0.weight", "2.weight"):
        assert kfac_error(model, loss, x, y, name, approx=approx) < 1e-9
    model, loss, x, y = drawn(sample, 2)
    if "zero_weight" not in sample.name and "ignore" not in sample.name and "all" not in sample.name:
        assert kfac_error(model, loss, x, y, "0.weight", approx=approx) > 1e-3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_kfac_is_the_ggn_for_deep_linear_regression(approx: str, reduction: str) -> None:
    """MSE, linear layers only, no sharing, any N: H and the pulled-back Jacobian do not depend on the sample."""
    model, x, y = regression(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2, bias=False)), 4)
    loss = nn.MSELoss(reduction=reduction)
    for name in ("0.weight", "1.weight", "2.weight"):
        assert kfac_error(model, loss, x, y, name, approx=approx) < 1e-9


def test_joint_kfac_is_the_joint_ggn_for_deep_linear_regression() -> None:
    model, x, y = regression(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 4)
    loss = nn.MSELoss()
    A, G = ref.kfac(model, x, exact(model, loss, x, y), joint=True)["0.weight"]
    blocks = ref.ggn(model, loss, x, y, ["0.weight", "0.bias"])
    W, b = "0.weight", "0.bias"
    expected = torch.zeros(3, 5, 3, 5, dtype=torch.float64)
    expected[:, :4, :, :4] = blocks[W, W].view(3, 4, 3, 4)
    expected[:, :4, :, 4] = blocks[W, b].view(3, 4, 3)
    expected[:, 4, :, :4] = blocks[b, W].view(3, 3, 4)
    expected[:, 4, :, 4] = blocks[b, b]
    same(ref.kronecker_block(A, G), expected.view(15, 15))


def test_expand_is_the_ggn_for_a_linear_token_model_with_a_loss_per_token() -> None:
    """Linear layers on [N, T, D], MSE on every token: positions do not mix, so all N·T are like samples."""
    model, x, y = regression(lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), 4, 3)
    for name in ("0.weight", "1.weight"):
        assert kfac_error(model, nn.MSELoss(), x, y, name, approx="expand") < 1e-9
        assert kfac_error(model, nn.MSELoss(), x, y, name, approx="reduce") > 1e-3


def pooled_tokens() -> nn.Module:
    """head(mean_t second(first(x))), linear throughout."""
    parts = {"first": nn.Linear(3, 2), "second": nn.Linear(2, 4), "head": nn.Linear(4, 2)}
    return samples.Model(lambda m, x: m.head(m.second(m.first(x)).mean(1)), **parts)


def test_reduce_is_the_ggn_for_a_linear_token_model_with_pooled_tokens() -> None:
    """Linear layers on [N, T, D], then the mean over T, MSE: S does not depend on the position."""
    model, x, y = regression(pooled_tokens, 4, 3)
    for name in ("first.weight", "second.weight"):
        assert kfac_error(model, nn.MSELoss(), x, y, name, approx="reduce") < 1e-9
        assert kfac_error(model, nn.MSELoss(), x, y, name, approx="expand") > 1e-3


@pytest.mark.parametrize("groups", [1, 2])
def test_reduce_is_the_ggn_for_one_pooled_convolution(groups: int) -> None:
    """A convolution and a global mean, MSE: exact per group; off-diagonal groups are what KFAC leaves out."""

    def pooled() -> nn.Module:
        conv = nn.Conv2d(4, 4, 2, stride=2, padding=1, groups=groups)
        return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    model, x, y = regression(pooled, 4, 5, 4)
    assert kfac_error(model, nn.MSELoss(), x, y, "0.weight", approx="reduce") < 1e-9


# Kronecker factors: definitions


def windows(conv: nn.Module, x: Tensor) -> Tensor:
    """x[n, s, g, i] of a convolution by slicing the padded input at every output pixel."""
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    axes = list(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True))
    if conv.padding == "same":
        totals = [d * (k - 1) for k, _, d in axes]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(0, 0)] * len(axes) if isinstance(conv.padding, str) else [(p, p) for p in conv.padding]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, [side for pair in reversed(sides) for side in pair], mode=mode)
    spans = [(k - 1) * d + 1 for k, _, d in axes]
    pixels = product(*[range((X - span) // s + 1) for X, span, (_, s, _) in zip(x.shape[2:], spans, axes, strict=True)])
    cuts: list[Tensor] = []
    for pixel in pixels:
        at = [slice(o * s, o * s + span, d) for o, span, (_, s, d) in zip(pixel, spans, axes, strict=True)]
        cuts.append(x[(slice(None), slice(None), *at)].unflatten(1, (conv.groups, -1)).flatten(2))
    return torch.stack(cuts, dim=1)


def plain_convolutions() -> list[Sample]:
    """Samples whose op is one convolution module."""
    return [
        row for row in samples.CONVS if isinstance(row.build().get_submodule("op"), nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]


@named(*plain_convolutions())
def test_unfolded_inputs_are_the_windows(sample: Sample) -> None:
    model, loss, x, y = drawn(sample)
    with torch.no_grad():
        seen = model.get_submodule("before")(x)
    expected = windows(model.get_submodule("op"), seen)
    S = exact(model, loss, x, y)
    for n in range(2):
        uses, _ = ref.uses(model, x[n], S[:, n])
        same(next(use.x for use in uses if use.weight == "op.weight"), expected[n])
    A, _ = ref.kfac(model, x, S)["op.weight"]
    same(A, torch.einsum("nsgi,nsgj->gij", expected, expected).squeeze(0) / math.prod(expected.shape[:2]))
    A, _ = ref.kfac(model, x, S, approx="reduce")["op.weight"]
    mean = expected.mean(1)
    same(A, torch.einsum("ngi,ngj->gij", mean, mean).squeeze(0) / 2)


OTHERWISE = {
    "weight.standardized": {"op.weight"},
    "weight.bias_of_weight": {"op.c.weight"},
    "tricky.weight_through_batch_norm": {"op.weight"},
    **{
        f"right.{name}": {"fc.weight"} for name in ("autoencoder", "autoencoder_rows", "and_left", "own_bias", "scaled")
    },
    "transformer.weights": {"op.attention.in_proj_weight"},
    "transformer.decoder": {"op.layer.multihead_attn.in_proj_weight"},
}
"""Weights that are consumed otherwise than by their layer, such as in slices, by sample."""


@named(*EVERYTHING)
def test_uses_carry_the_whole_gradient(sample: Sample) -> None:
    """All trainable weights of linear and convolution layers are found, and Σ_s S, Σ_s S x are the gradients."""
    model, loss, x, y = drawn(sample)
    S = exact(model, loss, x, y)
    layers = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | samples.Right
    weights = {id(layer.weight) for layer in model.modules() if isinstance(layer, layers)}
    for attention in (m for m in model.modules() if isinstance(m, nn.MultiheadAttention)):
        packed = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights |= {id(getattr(attention, name)) for name in packed} - {id(None)}
    reached = {name for name, d in ref.diag_ggn(model, loss, x, y).items() if d.abs().max() > 0}
    expected = {name for name, p in model.named_parameters() if id(p) in weights and name in reached}
    if sample.name in ("linear.functional", "norm.functional"):
        expected |= {"op.kernel", "op.matrix"} & reached
    if sample.name in ("free.matmul", "with.transposed_weight"):
        expected |= {"op.free"}
    expected -= OTHERWISE.get(sample.name, set())
    factors = ref.kfac(model, x, S)
    assert set(factors) == expected
    for name, (A, G) in factors.items():
        trace = torch.einsum("...ii,...jj->...", A, G).sum()
        assert trace.isfinite()
        assert A.shape[-1] * G.shape[-1] * (A.shape[0] if A.ndim == 3 else 1) == model.get_parameter(name).numel()


def test_factors_do_not_depend_on_the_root_of_the_loss_hessian() -> None:
    row = samples.find("cross_entropy.positions_all_signal.mean")
    model, loss, x, y = drawn(row, 3)
    S = exact(model, loss, x, y)
    generator = torch.Generator().manual_seed(3)
    Q, _ = torch.linalg.qr(samples.normal((S.shape[0], S.shape[0]), generator))
    for approx in ("expand", "reduce"):
        rotated = ref.kfac(model, x, torch.einsum("vw,wn...->vn...", Q, S), approx)
        for name, (A, G) in ref.kfac(model, x, S, approx).items():
            same(rotated[name][0], A)
            same(rotated[name][1], G)


def test_one_column_for_all_positions_is_wrong() -> None:
    """Summing the columns of all loss terms into one changes G where positions mix."""
    row = samples.find("mse.on_tokens.mean")
    model, loss, x, y = drawn(row, 3)
    S = exact(model, loss, x, y)
    term = (S != 0).flatten(3).any(-1).to(torch.float64).argmax(-1)[:, 0]  # the token that column v belongs to
    assert term.bincount().tolist() == [3, 3, 3, 3]
    merged = torch.stack([S[term == t] for t in range(4)]).sum(0)
    right, wrong = ref.kfac(model, x, S), ref.kfac(model, x, merged)
    differ(wrong["fc.weight"][1], right["fc.weight"][1])
    same(wrong["fc.weight"][0], right["fc.weight"][0])


def test_a_grouped_convolution_has_a_pair_per_group() -> None:
    row = samples.find("conv2d.groups")
    model, loss, x, y = drawn(row, 1)
    A, G = ref.kfac(model, x, exact(model, loss, x, y))["op.weight"]
    assert A.shape == (2, 8, 8)
    assert G.shape == (2, 3, 3)
    block = ref.kronecker_block(A, G)
    assert block[:24, 24:].count_nonzero() == 0
    average = ref.kronecker_block(A.mean(0).expand_as(A), G)
    differ(average, block)


def test_reused_and_tied_weights_concatenate_positions() -> None:
    """S_l counts all uses: A averages over them, G sums, and cross terms stay in reduce."""
    row = samples.find("param.applied_twice")
    model, loss, x, y = drawn(row, 1)
    S = exact(model, loss, x, y)
    uses, _ = ref.uses(model, x[0], S[:, 0])
    first, second = (use for use in uses if use.weight == "fc.weight")
    same(first.x.flatten(), x[0])
    A, G = ref.kfac(model, x, S)["fc.weight"]
    same(A, (first.x.flatten().outer(first.x.flatten()) + second.x.flatten().outer(second.x.flatten())) / 2)
    same(G, sum(torch.einsum("vsgo,vsgp->op", use.S, use.S) for use in (first, second)))  # type: ignore
    _, G_reduce = ref.kfac(model, x, S, approx="reduce")["fc.weight"]
    total = (first.S + second.S).flatten(1)
    same(G_reduce, total.T @ total)
    differ(G, G_reduce)


@pytest.mark.parametrize(
    ("name", "joined", "alone"),
    [
        ("param.tied_weight", set(), {"fc1.weight"}),  # one weight, two biases
        ("param.tied_bias", set(), {"fc1.weight", "fc2.weight"}),  # one bias, two weights
        ("param.tied_both", {"fc1.weight"}, set()),
        ("param.frozen_bias", {"fc1.weight"}, {"fc2.weight"}),
        ("param.applied_twice", {"fc.weight", "head.weight"}, set()),
    ],
)
def test_joint_appends_one_where_the_bias_is_the_weights_own(name: str, joined: set[str], alone: set[str]) -> None:
    model, loss, x, y = drawn(samples.find(name))
    S = exact(model, loss, x, y)
    separate, joint = ref.kfac(model, x, S), ref.kfac(model, x, S, joint=True)
    assert set(joint) == joined | alone
    for weight, (A, G) in joint.items():
        bigger = int(weight in joined)
        assert A.shape[-1] == separate[weight][0].shape[-1] + bigger
        same(A[:3, :3], separate[weight][0][:3, :3])
        same(G, separate[weight][1])
        if bigger:
            same(A[-1, -1], torch.ones((), dtype=torch.float64))


def test_columns_of_zero_do_not_join_what_is_used_apart() -> None:
    """Weight and bias have no gradient here, which alone would not tell that the weight is used without the bias."""
    model, _, x, _ = drawn(samples.find("param.tied_weight"))
    S = torch.zeros(1, *ref.outputs(model, x).shape, dtype=torch.float64)
    separate, joint = (ref.kfac(model, x, S, joint=joint)["fc1.weight"][0] for joint in (False, True))
    same(joint, separate)


def test_a_weight_with_another_consumer_has_no_kronecker_form() -> None:
    row = samples.find("free.weight_and_penalty")
    model, loss, x, y = drawn(row)
    assert set(ref.kfac(model, x, exact(model, loss, x, y))) == {"before.weight", "head.weight"}


def test_the_mean_gradient_squared_is_not_the_empirical_diagonal() -> None:
    row = samples.find("cross_entropy.plain.mean")
    model, loss, x, y = drawn(row, 4)
    S = ref.empirical_columns(loss, ref.outputs(model, x), y)
    diagonal, gradient = ref.diagonal(model, x, S), ref.grad(model, loss, x, y)
    u = ref.column_gradients(model, x, S)
    for name, g in gradient.items():
        same(u[name].sum((0, 1)) / 2, g)  # √ω = 1/2
        differ(4 * g.square(), diagonal[name])


def test_batch_norm_before_a_transpose_has_the_gradient_of_differences() -> None:
    """torch 2.15's own is wrong here, for one sample and a cotangent that is not contiguous (CPU)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4)
        layers = (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 1), bias=False), norm, nn.Flatten(2), Transposed())
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(84, 3)).double().eval()
        for t in (norm.weight, norm.bias, norm.get_buffer("running_mean")):
            nn.init.normal_(t)
        x = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    y, loss, weight = torch.tensor([0, 2]), nn.CrossEntropyLoss(), model.get_parameter("0.weight")
    differences = torch.zeros_like(weight)
    with torch.no_grad():
        for k, step in product(range(weight.numel()), (1e-6, -1e-6)):
            weight.view(-1)[k] += step
            differences.view(-1)[k] += loss(model(x), y) / (2 * step)
            weight.view(-1)[k] -= step
    torch.testing.assert_close(ref.grad(model, loss, x, y)["0.weight"], differences, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        fxcurv.compile(model, loss, "grad")(x, y)["grad"]["0.weight"], differences, rtol=1e-6, atol=1e-8
    )


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
