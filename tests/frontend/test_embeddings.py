"""Embeddings: gradients scaled by the frequency of an index are refused by name; sparse gradients are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.core.errors import UnsupportedError


class Net(nn.Module):
    """A table, a head, and a function of both and of the indices."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor], scaled: bool = True) -> None:
        super().__init__()
        self.table, self.head, self.function = nn.Embedding(5, 3), nn.Linear(3, 2), function
        self.bag = nn.EmbeddingBag(5, 3, mode="sum", scale_grad_by_freq=scaled)
        self.table.scale_grad_by_freq = scaled

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, x))


def module(net: Net, x: Tensor) -> Tensor:
    return net.table(x).mean(1)


def bag(net: Net, x: Tensor) -> Tensor:
    return net.bag(x)


def function(net: Net, x: Tensor) -> Tensor:
    return F.embedding(x, net.table.weight, scale_grad_by_freq=net.table.scale_grad_by_freq).mean(1)


def computed(net: Net, x: Tensor) -> Tensor:
    return F.embedding(x, 2 * net.table.weight, None, None, 2.0, net.table.scale_grad_by_freq).tanh().mean(1)


def operator(net: Net, x: Tensor) -> Tensor:
    return torch.embedding(net.table.weight, x, -1, net.table.scale_grad_by_freq).mean(1)


FORWARDS = (module, bag, function, computed, operator)


def a_net(forward: Callable[[Net, Tensor], Tensor], scaled: bool) -> tuple[Net, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(forward, scaled).double().eval(), torch.randint(5, (17, 4)), torch.randint(2, (17,))


@pytest.mark.parametrize("forward", FORWARDS, ids=[f.__name__ for f in FORWARDS])
def test_scaled_gradients_are_refused_and_the_remedy_works(forward: Callable[[Net, Tensor], Tensor]) -> None:
    model, x, y = a_net(forward, scaled=True)
    whole: Any = F.cross_entropy(model(x), y, reduction="sum")
    weight = model.bag.weight if forward is bag else model.table.weight
    (together,) = torch.autograd.grad(whole, weight)
    apart = sum(torch.autograd.grad(F.cross_entropy(model(x[[n]]), y[[n]]), weight)[0] for n in range(17))
    assert not torch.allclose(together, torch.as_tensor(apart))  # so there is no value that adds over samples
    for attempt in (
        lambda: fxcurv.compile(model)(x, y),
        lambda: fxcurv.compile(model, on_unsupported="skip")(x, y),
        lambda: fxcurv.compile(model, on_unsupported="fallback")(x, y),
        lambda: fxcurv.ggn_operator(model, "cross_entropy", (x, y)) @ torch.ones(38).double(),
        lambda: fxcurv.jacobian_operator(model, (x, y)),
        lambda: fxcurv.ntk(model, x, strategy="ntvp"),
    ):
        with pytest.raises(UnsupportedError, match="scale_grad_by_freq=False") as caught:
            attempt()
        assert caught.value.code == "FXC213"
    report = fxcurv.check(model, x, "grad", on_unsupported="fallback")
    assert {row.code for row in report.failures} == {"FXC213"}

    model.table.scale_grad_by_freq = model.bag.scale_grad_by_freq = False
    compiled = fxcurv.compile(model, quantities=("grad", "batch_grad"))
    for size in (1, 3, 5, 8, 17):
        result = compiled(x[:size], y[:size])
        model.zero_grad()
        F.cross_entropy(model(x[:size]), y[:size]).backward()
        for name, gradient in result["grad"].items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad)
            torch.testing.assert_close(result["batch_grad"][name].sum(0), gradient)


def test_a_frozen_table_may_scale_its_gradients() -> None:
    model, x, y = a_net(module, scaled=True)
    model.table.requires_grad_(False)
    F.cross_entropy(model(x), y).backward()
    for on_unsupported in ("error", "fallback"):
        result = fxcurv.compile(model, quantities="grad", on_unsupported=on_unsupported)(x, y)
        torch.testing.assert_close(result["grad"]["head.weight"], model.head.weight.grad)
