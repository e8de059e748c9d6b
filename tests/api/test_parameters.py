"""Parameters used otherwise than as the weight of a layer: tokens, attention, reparametrisations, recurrence, ties."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import reference
import samples
import torch
from comparison import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

import fxcurv


class LanguageModel(nn.Module):
    """Tokens -> logits [N, C, T], with the embedding tied to the output layer or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(7, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens))).transpose(1, 2)


class Attention(nn.Module):
    """`nn.MultiheadAttention` with the batch at axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        return self.head(self.attention(y, y, y, need_weights=False)[0].mean(0))


class Reparametrized(nn.Module):
    """A convolution and a linear layer whose weights are functions of the parameters."""

    def __init__(self, conv: Callable[[nn.Conv2d], nn.Module], head: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.conv, self.head = conv(nn.Conv2d(2, 3, 3)), head(nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().flatten(1))


class Positive(nn.Module):
    """A weight that is the exponential of its parameter."""

    def forward(self, free: Tensor) -> Tensor:
        return free.exp()


class LowRank(nn.Module):
    """A weight that is an outer product, plus a constant."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(1, inputs))
        self.register_buffer("base", torch.randn(outputs, inputs))

    def forward(self, up: Tensor) -> Tensor:
        return up[:, :1] @ self.down + self.get_buffer("base")


def positive(layer: nn.Module) -> nn.Module:
    register_parametrization(layer, "weight", Positive())
    return layer


def adapted(layer: nn.Linear) -> nn.Module:
    register_parametrization(layer, "weight", LowRank(layer.out_features, layer.in_features))
    return layer


class Vision(nn.Module):
    """A vision transformer with a class token, position embeddings resized to the image, and layer scales."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Parameter(torch.randn(1, 4, 3, 3))
        self.norm, self.mixer = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale, self.head = nn.Parameter(torch.rand(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x)
        y = y + F.interpolate(self.places, y.shape[2:], mode="bicubic", antialias=True)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y.flatten(2).mT], 1)
        z = self.norm(y)
        return self.head((y + self.scale * self.mixer(z, z, z, need_weights=False)[0])[:, 0])


class Windows(nn.Module):
    """Attention in windows of 2 × 2 with a table of relative positions and a learned temperature, as in Swin."""

    def __init__(self, continuous: bool) -> None:
        super().__init__()
        places = torch.cartesian_prod(torch.arange(2), torch.arange(2))
        offsets = places[:, None] - places + 1
        self.register_buffer("index", (offsets * torch.tensor([3, 1])).sum(-1))
        self.register_buffer("offsets", offsets.double())
        self.qkv, self.head = nn.Linear(2, 6), nn.Linear(8, 3)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.table = (
            nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)) if continuous else nn.Parameter(torch.randn(9))
        )

    def bias(self) -> Tensor:
        if isinstance(self.table, Tensor):
            return self.table[self.get_buffer("index").view(-1)].view(4, 4)
        return 4 * self.table(self.get_buffer("offsets")).squeeze(-1).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 2)
        q, k, v = self.qkv(windows).chunk(3, -1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.logit_scale.clamp(max=4.6).exp()
        y = ((scores + self.bias()).softmax(-1) @ v).view(x.shape[0], 2, 2, 2, 2, 2).permute(0, 5, 1, 3, 2, 4)
        return self.head(y.flatten(2).mean(-1, keepdim=True).mul(y.flatten(2)[..., ::4]).flatten(1))


class TiedTransposed(nn.Module):
    """An autoencoder that decodes with the transpose of its encoder, and reads the same weight as a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.offset = nn.Linear(3, 2), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return (
            F.linear(self.encoder(x[:, 0, :3]).tanh(), self.encoder.weight.T, self.offset) * self.encoder.weight.norm()
        )


class TiedAcrossKinds(nn.Module):
    """One parameter as the kernel of a convolution, as a matrix, and entry by entry."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).tanh().mean((2, 3))
        return self.head(y + F.linear(x[:, :, :2, :2].flatten(1), self.conv.weight.flatten(1)) * self.conv.weight.sum())


class Unreached(nn.Module):
    """Parameters that nothing reads, that are read and dropped, and that only a detached branch reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 3)
        self.unused, self.dropped, self.detached = nn.Parameter(torch.ones(2)), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.head((self.body(x) + self.detached(x).detach()).mean(1))


class Recurrent(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def old_weight_norm(layer: nn.Module) -> nn.Module:
    """The form of weight_norm that sets the weight in a hook before every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


G = torch.Generator().manual_seed(0)
TOKENS, NEXT = torch.randint(7, (2, 3), generator=G), torch.randint(7, (2, 3), generator=G)
SEQUENCE, IMAGES = (torch.randn(shape, generator=G, dtype=torch.float64) for shape in ((2, 5, 4), (2, 2, 4, 4)))
LABELS = torch.tensor([0, 2])
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "language_model": (lambda: LanguageModel(False), TOKENS, NEXT),
    "language_model_tied": (lambda: LanguageModel(True), TOKENS, NEXT),
    "attention": (Attention, SEQUENCE, LABELS),
    "weight_and_spectral_norm": (lambda: Reparametrized(weight_norm, spectral_norm), IMAGES, LABELS),
    "orthogonal_and_positive": (lambda: Reparametrized(positive, orthogonal), IMAGES, LABELS),
    "low_rank_adapter": (lambda: Reparametrized(lambda conv: conv, adapted), IMAGES, LABELS),
    "vision_transformer": (Vision, IMAGES, LABELS),
    "windows": (lambda: Windows(continuous=False), IMAGES, LABELS),
    "windows_continuous": (lambda: Windows(continuous=True), IMAGES, LABELS),
    "tied_transposed": (TiedTransposed, SEQUENCE, LABELS),
    "tied_across_kinds": (TiedAcrossKinds, IMAGES, LABELS),
    "rnn": (lambda: Recurrent(nn.RNN), SEQUENCE[..., :3], LABELS),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE[..., :3], LABELS),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE[..., :3], LABELS),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:.*non-contiguous.*:UserWarning")
@pytest.mark.parametrize(("build", "x", "y"), CASES.values(), ids=CASES)
def test_every_parameter_equals_the_oracle(build: Callable[[], nn.Module], x: Tensor, y: Tensor) -> None:
    model, loss = samples.seeded(build, "parameters"), nn.CrossEntropyLoss()
    result = fxcurv.compile(model, loss, ["grad", "diag_ggn", "kflr"])(x, y)
    gradient, diagonal = reference.grad(model, loss, x, y), reference.diag_ggn(model, loss, x, y)
    assert set(result["diag_ggn"]) == set(diagonal)
    for name, value in diagonal.items():
        assert_close(result["diag_ggn"][name], value, f"diagonal {name}")
        assert_close(result["grad"][name], gradient[name], f"gradient {name}")
    columns = reference.exact_columns(loss, reference.outputs(model, x), y)
    factors = reference.kfac(model, x, columns)  # of the layers that the oracle can look into
    for name, block in result["kflr"].items():
        if isinstance(block, fxcurv.Dense):
            assert_close(block.matrix, reference.dense_block(model, x, columns, name), f"block of {name}")
        elif name in factors:
            assert_close(block.A, factors[name][0], f"A of {name}")
            assert_close(block.G, factors[name][1], f"G of {name}")


def test_what_the_output_does_not_depend_on_is_unreached() -> None:
    model = samples.seeded(Unreached, "parameters")
    result = fxcurv.compile(model, quantities=["diag_ggn", "kflr"])(SEQUENCE, LABELS)
    reached = {"body.weight", "body.bias", "head.weight", "head.bias"}
    diagonal = reference.diag_ggn(model, nn.CrossEntropyLoss(), SEQUENCE, LABELS)
    for quantity in ("diag_ggn", "kflr"):
        assert set(result[quantity]) == reached
        for name in dict(model.named_parameters()).keys() - reached:
            assert result[quantity].status[name] == "unreached"
            assert not diagonal[name].any()
    for name in reached:
        assert_close(result["diag_ggn"][name], diagonal[name], f"diagonal {name}")


def test_cross_terms_between_uses_of_a_parameter() -> None:
    """The diagonal of a tied parameter is not the sum of the diagonals of its uses."""
    model, untied = samples.find("param.tied_weight").build(), samples.seeded(samples.two_layers, "untied")
    untied.load_state_dict(model.state_dict())
    x, y = SEQUENCE[:, 0, :3], LABELS
    both, each = (fxcurv.compile(m, quantities="diag_ggn")(x, y)["diag_ggn"] for m in (model, untied))
    apart = each["fc1.weight"] + each["fc2.weight"]
    assert_close(both["fc1.weight"], reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)["fc1.weight"], "diagonal")
    assert (both["fc1.weight"] - apart).abs().max() > 0.01 * apart.max()


def test_weight_norm_by_hooks() -> None:
    """The deprecated form keeps a tensor with a history beside the parameters; it is what the newer form is."""
    old = samples.seeded(lambda: Reparametrized(old_weight_norm, old_weight_norm), "parameters")
    new = samples.seeded(lambda: Reparametrized(weight_norm, weight_norm), "parameters")
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    renamed = {name: name for name in new.state_dict()} | {
        f"{layer}.{now}": f"{layer}.{before}" for before, now in names.items() for layer in ("conv", "head")
    }
    new.load_state_dict({now: old.state_dict()[before] for now, before in renamed.items()})
    ours, theirs = (fxcurv.compile(model, quantities="diag_ggn")(IMAGES, LABELS)["diag_ggn"] for model in (old, new))
    for now, before in renamed.items():
        assert_close(ours[before], theirs[now], f"diagonal {before}")
