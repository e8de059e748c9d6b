"""Parameters used otherwise than as the weight of a layer: tokens, attention, reparametrisations, recurrence, ties."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import samples
import torch
from test_samples import assert_close
from torch import Tensor, nn

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
    """weight_norm and spectral_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().flatten(1))


class Recurrent(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


G = torch.Generator().manual_seed(0)
TOKENS, NEXT = torch.randint(7, (2, 3), generator=G), torch.randint(7, (2, 3), generator=G)
SEQUENCE, IMAGES = (torch.randn(shape, generator=G, dtype=torch.float64) for shape in ((2, 5, 4), (2, 2, 4, 4)))
LABELS = torch.tensor([0, 2])
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "language_model": (lambda: LanguageModel(False), TOKENS, NEXT),
    "language_model_tied": (lambda: LanguageModel(True), TOKENS, NEXT),
    "attention": (Attention, SEQUENCE, LABELS),
    "reparametrized": (Reparametrized, IMAGES, LABELS),
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
