"""What goes wrong elsewhere, one test each: the right number or a refusal, and that the wrong number differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import reference
import samples
import torch
from comparison import assert_close, check_against_oracle
from torch import Tensor, nn

import fxcurv
from fxcurv.losses.base import as_loss
from fxcurv.quantities.selection import chosen
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.run import Minibatch

EXACT = fxcurv.KFAC(fxcurv.Exact())


def differ(wrong: Tensor, right: Tensor) -> None:
    """Apart by more than one percent of the largest entry."""
    assert wrong.shape == right.shape
    assert (wrong - right).abs().max() > 0.01 * right.abs().max()


def seeded(*layers: Callable[[], nn.Module]) -> nn.Module:
    return samples.seeded(lambda: nn.Sequential(*(layer() for layer in layers)), "regressions")


def data(*shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, dtype=torch.float64, generator=g), torch.randint(classes, (shape[0],), generator=g)


def factors(model: nn.Module, x: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    loss = nn.CrossEntropyLoss()
    return reference.kfac(model, x, reference.exact_columns(loss, reference.outputs(model, x), y))[name]


def test_grouped_convolutions_are_not_averaged_over_groups() -> None:
    model, (x, y) = seeded(lambda: nn.Conv2d(4, 6, 3, groups=2), nn.Flatten, lambda: nn.Linear(24, 3)), data(2, 4, 4, 4)
    block = fxcurv.compile(model, quantities=EXACT)(x, y)["kfac"]["0.weight"]
    A, G = factors(model, x, y, "0.weight")
    assert_close(block.A, A, "A")
    assert_close(block.G, G, "G")
    averaged = torch.kron(torch.block_diag(*G), A.mean(0))
    differ(averaged, block.dense())


def test_dilation_counts() -> None:
    model, (x, y) = (
        seeded(lambda: nn.Conv2d(2, 3, 2, dilation=2), nn.Flatten, lambda: nn.Linear(12, 3)),
        data(2, 2, 4, 4),
    )
    A = fxcurv.compile(model, quantities=EXACT)(x, y)["kfac"]["0.weight"].A
    assert_close(A, factors(model, x, y, "0.weight")[0], "A")
    undilated = torch.nn.functional.unfold(x, 2).transpose(1, 2).flatten(0, 1)
    differ(undilated.T @ undilated / len(undilated), A)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(torch.tensor([1.0, 9.0, 0.1]).double()), nn.CrossEntropyLoss(ignore_index=1)]
)
def test_class_weights_and_ignored_targets_count(loss: nn.CrossEntropyLoss) -> None:
    model, x, y = seeded(lambda: nn.Linear(4, 3)), data(3, 4)[0], torch.tensor([0, 1, 2])
    value = fxcurv.compile(model, loss, "diag_ggn")(x, y)["diag_ggn"]["0.weight"]
    assert_close(value, reference.diag_ggn(model, loss, x, y)["0.weight"], "diagonal")
    differ(fxcurv.compile(model, nn.CrossEntropyLoss(), "diag_ggn")(x, y)["diag_ggn"]["0.weight"], value)


def test_positions_that_mix_have_columns_of_their_own() -> None:
    """One column for all positions of a sample adds cross terms that the Hessian does not have."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(3, 3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            h = h + (h @ h.mT).softmax(-1) @ h
            return self.head(h).transpose(1, 2)

    model, x = samples.seeded(Mixing, "mixing"), data(2, 5, 3)[0]
    y = torch.tensor([[0, 1, 2, 3, 0], [1, 1, 2, 0, 3]])
    value = fxcurv.compile(model, quantities="diag_ggn")(x, y)["diag_ggn"]["embed.weight"]
    assert_close(value, reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)["embed.weight"], "diagonal")
    columns = reference.exact_columns(nn.CrossEntropyLoss(), reference.outputs(model, x), y)
    merged = columns.sum(0, keepdim=True)
    differ(reference.diagonal(model, x, merged)["embed.weight"], value)


def test_convolutions_are_expand_or_reduce_and_nothing_between() -> None:
    model, (x, y) = seeded(lambda: nn.Conv2d(2, 3, 3), nn.Flatten, lambda: nn.Linear(48, 3)), data(2, 2, 6, 6)
    expand = fxcurv.compile(model, quantities=EXACT)(x, y)["kfac"]["0.weight"]
    reduce = fxcurv.compile(model, quantities=fxcurv.KFAC(fxcurv.Exact(), approx="reduce"))(x, y)["kfac"]["0.weight"]
    kinds: tuple[tuple[fxcurv.Kronecker, reference.Approx], ...] = ((expand, "expand"), (reduce, "reduce"))
    for block, approx in kinds:
        columns = reference.exact_columns(nn.CrossEntropyLoss(), reference.outputs(model, x), y)
        A, G = reference.kfac(model, x, columns, approx)["0.weight"]
        assert_close(block.A, A, f"A {approx}")
        assert_close(block.G, G, f"G {approx}")
    between = 16 * expand.A.trace() * reduce.G.trace()  # A summed over positions with the G of reduce
    assert between > 5 * expand.trace()


TIED = [s for s in samples.PARAMETERS if any(word in s.name for word in ("tied", "tie", "reuse", "twice", "siamese"))]


@pytest.mark.parametrize("sample", TIED, ids=lambda sample: sample.name)
def test_tied_and_reused_parameters_keep_their_cross_terms(sample: samples.Sample) -> None:
    check_against_oracle(sample)


def test_data_changed_in_place_is_seen() -> None:
    """Nothing is cached by the address of a tensor."""
    model, (x, y) = seeded(lambda: nn.Linear(4, 3)), data(3, 4)
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    before = compiled(x, y)["diag_ggn"]["0.weight"]
    x.mul_(2)
    differ(compiled(x, y)["diag_ggn"]["0.weight"], before)
    assert_close(
        compiled(x, y)["diag_ggn"]["0.weight"],
        reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)["0.weight"],
        "diagonal",
    )


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes_count(mode: Literal["circular", "reflect", "replicate"]) -> None:
    model = seeded(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), nn.Flatten, lambda: nn.Linear(48, 3))
    x, y = data(2, 2, 4, 4)
    A = fxcurv.compile(model, quantities=EXACT)(x, y)["kfac"]["0.weight"].A
    assert_close(A, factors(model, x, y, "0.weight")[0], "A")
    zeros = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    differ(zeros.T @ zeros / len(zeros), A)


def test_channels_last_inputs() -> None:
    model, (x, y) = seeded(lambda: nn.Conv2d(3, 3, 2), nn.ReLU, nn.Flatten, lambda: nn.Linear(27, 3)), data(2, 3, 4, 4)
    result = fxcurv.compile(model, quantities=["grad", "diag_ggn"])(x.to(memory_format=torch.channels_last), y)
    assert_close(
        result["diag_ggn"]["0.weight"], reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)["0.weight"], "diagonal"
    )
    assert_close(result["grad"]["0.weight"], reference.grad(model, nn.CrossEntropyLoss(), x, y)["0.weight"], "gradient")


def test_a_linear_layer_on_tokens_has_n_samples_not_n_times_t() -> None:
    model, (x, y) = seeded(lambda: nn.Linear(3, 4), lambda: nn.Flatten(), lambda: nn.Linear(20, 3)), data(2, 5, 3)
    value = fxcurv.compile(model, quantities="diag_ggn")(x, y)["diag_ggn"]["0.weight"]
    assert_close(value, reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)["0.weight"], "diagonal")
    columns = reference.exact_columns(nn.CrossEntropyLoss(), reference.outputs(model, x), y)
    with torch.no_grad():
        S = torch.einsum("vnc,ctd->vntd", columns, model.get_parameter("2.weight").view(3, 5, 4))
    differ(torch.einsum("vnto,nti->oi", S.square(), x.square()), value)  # the squares alone, without cross terms


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardised before it is used."""

    def forward(self, input: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return torch.nn.functional.conv2d(input, (self.weight - mean) / std, self.bias)


def standardized(weight: Tensor) -> Tensor:
    flat = weight.reshape(1, len(weight), -1)
    return torch.nn.functional.batch_norm(flat, None, None, training=True).reshape_as(weight)


class StandardizedByBatchNorm(nn.Module):
    """A convolution whose weight goes through batch_norm before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 2, bias=False), nn.Linear(27, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.conv2d(x, standardized(self.conv.weight))
        return self.head(y.flatten(1))


class Attending(nn.Module):
    """`nn.MultiheadAttention` with the batch at axis 1, as it is by default."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        return self.head(self.attention(y, y, y)[0].mean(0))


class Positioned(nn.Module):
    """Tokens with a learned position embedding, a class token and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed, self.token = nn.Parameter(torch.zeros(1, 6, 3)), nn.Parameter(torch.zeros(1, 1, 3))
        self.scale, self.head = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.scale * x[:, 0])


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: seeded(lambda: Standardized(2, 3, 2), nn.Flatten, lambda: nn.Linear(27, 3)), (2, 2, 4, 4)),
        (lambda: samples.seeded(Positioned, "positioned"), (2, 5, 3)),
        (lambda: seeded(lambda: nn.LayerNorm(3), lambda: nn.Linear(3, 3)), (2, 3)),
        (lambda: seeded(lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten), (2, 3, 4)),
        (lambda: samples.seeded(Attending, "attending"), (2, 3, 4)),
    ],
    ids=["weight_standardised", "position_embedding", "layer_norm", "encoder_layer", "attention"],
)
def test_parameters_are_never_dropped(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """Every parameter has a value, and it is right."""
    model, (x, y) = build(), data(*shape)
    result = fxcurv.compile(model, quantities="diag_ggn")(x, y)["diag_ggn"]
    expected = reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)
    assert set(result) == set(expected) == set(dict(model.named_parameters()))
    for name, value in expected.items():
        assert_close(result[name], value, name)


def test_a_weight_standardised_by_batch_norm_is_seen_through() -> None:
    """timm's form: the weight's channels as a batch of one, in training mode though the model is not."""
    model, (x, y) = samples.seeded(StandardizedByBatchNorm, "regressions"), data(2, 2, 4, 4)
    value = fxcurv.compile(model, quantities="diag_ggn")(x, y)["diag_ggn"]["conv.weight"]
    assert_close(value, reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)["conv.weight"], "diagonal")
    plain = seeded(lambda: nn.Conv2d(2, 3, 2, bias=False), nn.Flatten, lambda: nn.Linear(27, 3))
    with torch.no_grad():
        plain.get_parameter("0.weight").copy_(standardized(model.get_parameter("conv.weight")))
        plain.load_state_dict({f"2.{k}": v for k, v in model.get_submodule("head").state_dict().items()}, strict=False)
    ignorant = fxcurv.compile(plain, quantities="diag_ggn")(x, y)["diag_ggn"]["0.weight"]
    differ(ignorant, value)  # the standardised weight taken for the parameter


def test_the_empirical_fisher_is_not_the_square_of_the_mean_gradient() -> None:
    model, (x, y) = seeded(lambda: nn.Linear(4, 3)), data(5, 4)
    result = fxcurv.compile(model, quantities=["grad", fxcurv.DiagGGN(fxcurv.Empirical())])(x, y)
    columns = reference.empirical_columns(nn.CrossEntropyLoss(), reference.outputs(model, x), y)
    assert_close(result["diag_ggn"]["0.weight"], reference.diagonal(model, x, columns)["0.weight"], "diagonal")
    differ(result["grad"]["0.weight"].square(), result["diag_ggn"]["0.weight"])


def test_nothing_is_traced_again_for_another_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: nn.Linear(4, 3))
    compiled = fxcurv.compile(model, quantities="diag_ggn", example_inputs=data(2, 4)[0])

    def traced(*_: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr("passes.pipeline.capture", traced)
    for n in (1, 7, 3):
        compiled(*data(n, 4))


@pytest.mark.parametrize("inplace", [False, True])
def test_modules_keep_their_settings(inplace: bool) -> None:
    model = seeded(
        lambda: nn.Conv2d(2, 3, 2),
        lambda: nn.BatchNorm2d(3),
        lambda: nn.ReLU(inplace),
        nn.Flatten,
        lambda: nn.Linear(27, 3),
    )
    settings = [(type(m), m.training, getattr(m, "inplace", None), m.extra_repr()) for m in model.modules()]
    tracked = int(model.get_buffer("1.num_batches_tracked"))
    fxcurv.compile(model, quantities=list(fxcurv.NAMES))(*data(2, 2, 4, 4))
    assert settings == [(type(m), m.training, getattr(m, "inplace", None), m.extra_repr()) for m in model.modules()]
    assert tracked == int(model.get_buffer("1.num_batches_tracked"))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_frozen_parameters_stay_frozen() -> None:
    model, (x, y) = samples.freeze(seeded(lambda: nn.Linear(4, 4), lambda: nn.Linear(4, 3)), "0.weight"), data(2, 4)
    result = fxcurv.compile(model, quantities=list(fxcurv.NAMES))(x, y)
    assert {name: p.requires_grad for name, p in model.named_parameters()}["0.weight"] is False
    assert all(result[quantity].status["0.weight"] == "frozen" for quantity in fxcurv.NAMES)
    assert all("0.weight" not in result[quantity] for quantity in fxcurv.NAMES)


def test_the_global_random_state_is_not_consumed() -> None:
    model, (x, y) = seeded(lambda: nn.Linear(4, 3)), data(2, 4)
    state = torch.get_rng_state()
    fxcurv.compile(model, quantities=["kfac", "diag_ggn_mc"])(x, y)
    assert torch.equal(state, torch.get_rng_state())


def test_sampled_columns_where_the_classes_are_not_last() -> None:
    """Targets are drawn position by position from outputs [N, C, T], whose classes are no last axis."""
    model = samples.seeded(lambda: nn.Conv1d(2, 3, 1), "positions")
    x, y = torch.arange(20.0, dtype=torch.float64).view(2, 2, 5).sin(), torch.arange(10).view(2, 5) % 3
    many = fxcurv.DiagGGN(fxcurv.Sampled(4000))
    result = fxcurv.compile(model, quantities=["diag_ggn", many])(x, y, torch.Generator().manual_seed(0))
    exact, sampled = result["diag_ggn"]["weight"], result["diag_ggn_1"]["weight"]
    torch.testing.assert_close(sampled, exact, rtol=0.1, atol=0)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_one_sample_whose_cotangent_is_permuted(norm: Callable[[int], nn.Module]) -> None:
    """torch 2.15's batch_norm has a wrong gradient for one sample on the CPU unless the cotangent is contiguous."""
    model = samples.seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 1), norm(4), nn.Flatten(2), Transposed(), nn.Softmax(-1), nn.Flatten(), nn.Linear(24, 3)
        ),
        "permuted",
    )
    x, y = torch.arange(12.0, dtype=torch.float64).view(1, 2, 2, 3).sin(), torch.tensor([2])
    quantities = ["grad", "diag_ggn"]
    one = fxcurv.compile(model, quantities=quantities)(x, y)
    two = fxcurv.compile(model, quantities=quantities)(x.expand(2, -1, -1, -1).contiguous(), y.expand(2))
    eager = by_autograd(model, as_loss(nn.CrossEntropyLoss()), chosen(quantities), Minibatch(x, y))
    for quantity, entries in two.items():
        for name, twice in entries.items():
            assert_close(one[quantity][name], twice, f"{quantity} {name}")
            assert_close(eager[quantity][name], twice, f"{quantity} {name} by autograd")


class Transposed(nn.Module):
    """Tokens of channels out of channels of positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Frames(nn.Module):
    """A convolution over frames that are folded into the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, frames = x.shape[:2]
        y = self.conv(x.flatten(0, 1)).tanh().mean((2, 3))
        return self.head(y.view(n, frames * 3))


def test_the_frames_of_a_sample_are_pooled_together() -> None:
    check_against_oracle(samples.sample("frames", Frames, (2, 2, 4, 3)), batch=3)
