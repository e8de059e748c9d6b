"""Small networks, losses and data for results, and what it means that two results are equal."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.blocks.lazy_gram import LazyGram

__all__ = ["EXACT", "LOSSES", "assert_equal", "batch", "close", "labels", "net", "reals", "same", "tokens"]


class Net(nn.Module):
    """Wide and narrow layers, a grouped convolution, tied, frozen and unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.wide = nn.Linear(36, 30)
        self.tied = nn.Linear(30, 30, bias=False)
        self.tied.weight = nn.Parameter(self.wide.weight.detach()[:, :30].clone())
        self.again = nn.Linear(30, 30)
        self.again.weight = self.tied.weight
        self.frozen = nn.Linear(30, 30).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.wide(self.conv(x).tanh().flatten(1)).tanh()
        return self.head(self.frozen(self.again(self.tied(h).tanh())))


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().double().eval()


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 2, 3, 3, generator=g, dtype=torch.float64), torch.randint(3, (size,), generator=g)


# Merging ----------------------------------------------------------------------------------------------------------

EXACT = [
    "grad",
    "diag_ggn",
    "kflr",
    "kfac_empirical",
    fxcurv.DiagGGN(fxcurv.Empirical()),
    fxcurv.KFAC(fxcurv.Exact(), approx="reduce"),
    fxcurv.KFAC(fxcurv.Exact(), joint=True),
    fxcurv.KFAC(fxcurv.Empirical(), approx="reduce", joint=True),
]


class Tokens(nn.Module):
    """Weights that see several positions, and terms of the loss at each."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv1d(3, 6, 2, groups=3), nn.Linear(6, 40), nn.Linear(40, 3)
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.fc(self.conv(x).tanh().mT).tanh())
        return y.mT if self.dense else y.mean(1)


def tokens(dense: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tokens(dense).double().eval()


WEIGHT = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


def labels(*shape: int, ignored: bool = False) -> Tensor:
    y = torch.randint(3, shape, generator=torch.Generator().manual_seed(5))
    if ignored:
        y[..., 0] = -100
    return y


def reals(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def same(a: Any, b: Any) -> None:
    """Equal to the last bit, through the fields of dataclasses."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        a, b = (t[0] if t.ndim == 3 and len(t) == 1 else t for t in (a, b))  # a single group needs no axis
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, fxcurv.Block | LazyGram):
        for f in dataclasses.fields(a):
            same(getattr(a, f.name), getattr(b, f.name))
    elif isinstance(a, tuple):
        for one, other in zip(a, b, strict=True):
            same(one, other)
    else:
        assert a == b


def assert_equal(merged: fxcurv.Curvature, whole: fxcurv.Curvature) -> None:
    """To twelve digits, value by value."""
    assert whole.divisor is not None
    assert merged.divisor is not None
    assert (merged.samples, list(merged)) == (whole.samples, list(whole))
    assert float(merged.divisor) == pytest.approx(float(whole.divisor), rel=1e-14)
    close(merged.loss, whole.loss)
    close(merged.output, whole.output)
    for name, entries in whole.items():
        assert merged[name].status == entries.status
        for parameter, value in entries.items():
            found = merged[name][parameter]
            if isinstance(value, Tensor):
                close(found, value)
                continue
            for key, tensor in value.tensors.items():
                close(found.tensors[key], tensor)
            assert getattr(found, "averaged", 0) == getattr(value, "averaged", 0)
            assert found is merged[name][found.parameters[0]]


def close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max()) + 1e-300 if expected.numel() else 1.0
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-12)


LOSSES: dict[str, tuple[bool, nn.Module, Tensor]] = {
    "weighted": (False, nn.CrossEntropyLoss(WEIGHT), labels(7)),
    "ignored": (True, nn.CrossEntropyLoss(WEIGHT, ignore_index=-100, label_smoothing=0.1), labels(7, 4, ignored=True)),
    "summed": (True, nn.CrossEntropyLoss(WEIGHT, reduction="sum"), labels(7, 4, ignored=True)),
    "probabilities": (False, nn.CrossEntropyLoss(WEIGHT), reals(7, 3).softmax(1)),
    "mse": (True, nn.MSELoss(), reals(7, 3, 4)),
    "mse_sum": (False, nn.MSELoss(reduction="sum"), reals(7, 3)),
    "bce": (False, nn.BCEWithLogitsLoss(pos_weight=WEIGHT), reals(7, 3)),
}
