"""Second derivatives where forward cuts the graph: the values of autograd on the model itself, not of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.losses.base import as_loss
from fxcurv.quantities.selection import chosen
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.run import Minibatch


class Net(nn.Module):
    """Three layers, and a forward as a function of them."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.function = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def hidden(net: Net, x: Tensor) -> Tensor:
    return torch.tanh(net.a(x))


def last(net: Net, h: Tensor, gate: Tensor) -> Tensor:
    return net.c(torch.tanh(net.b(h)) * gate)


def detached(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    return last(net, h, h.detach())


def data(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    return last(net, h, h.data)


def in_place(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    return last(net, h, (h * 1).detach_())


def no_grad(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    with torch.no_grad():
        gate = torch.sigmoid(net.b(h)) * h.max(1, keepdim=True)[0]
    return last(net, h, gate)


def nested(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    with torch.no_grad():
        twice = 2 * h
        with torch.enable_grad():
            gate = torch.sigmoid(net.b(h)) * twice
        added = gate * h
    return last(net, h, gate) + added[:, :2]


def switched(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    torch.set_grad_enabled(False)
    gate = torch.sigmoid(net.b(h))
    torch.set_grad_enabled(True)
    return last(net, h, gate)


def inference(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    with torch.inference_mode():
        gate = torch.sigmoid(net.b(h))
    return last(net, h, gate.clone())


def straight_through(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    return net.c(torch.tanh(net.b(h + ((4 * h).round() / 4 - h).detach())))


def surrogate(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    return net.c(torch.tanh(net.b(torch.sigmoid(h) + (h.sin() - torch.sigmoid(h)).detach())))


def parameters(net: Net, x: Tensor) -> Tensor:
    w = net.b.weight.data * net.b.weight.detach()
    return net.c(torch.tanh(F.linear(hidden(net, x), w)) * torch.sigmoid(net.b(hidden(net, x))))


def weights_without_gradient(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    with torch.no_grad():
        w = net.b.weight.softmax(0)
    return last(net, h, F.linear(h, w))


def normalized(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    return net.c(torch.tanh(net.b(h / h.detach().norm(dim=1, keepdim=True))))


def unreached(net: Net, x: Tensor) -> Tensor:
    return net.c(torch.tanh(net.b(hidden(net, x).detach())))


FORWARDS = (
    *(detached, data, in_place, no_grad, nested, switched, inference, straight_through, surrogate, parameters),
    *(weights_without_gradient, normalized, unreached),
)


SEVERAL_USES = (nested, parameters)
SIZES = (1, 3, 5, 8, 17)


def a_batch(function: Callable[[Net, Tensor], Tensor], size: int) -> tuple[Net, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(function).double().eval(), torch.randn(size, 3).double(), torch.randint(2, (size,))


def twice_differentiated(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The diagonal of the Hessian, by differentiating the model's own gradient."""
    found: dict[str, Tensor] = {}
    options: Any = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
    for name, p in model.named_parameters():
        (slope,) = torch.autograd.grad(loss, p, create_graph=True, allow_unused=True, materialize_grads=True)
        found[name] = torch.zeros_like(p)
        if slope.requires_grad:
            unit = torch.eye(p.numel(), dtype=p.dtype)
            (rows,) = torch.autograd.grad(slope.flatten(), p, unit, **options)
            found[name] = found[name] if rows is None else rows.flatten(1).diagonal().view_as(p)
    return found


def generalized(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """Jᵀ H J of one sample for one parameter."""
    output = model(x)
    unit = torch.eye(output.numel(), dtype=p.dtype).view(-1, *output.shape)
    (J,) = torch.autograd.grad(output, p, unit, is_grads_batched=True)
    H: Any = torch.autograd.functional.hessian(lambda f: loss(f, y), output.detach())
    return J.flatten(1).mT @ H.view(len(unit), -1) @ J.flatten(1)


@pytest.mark.parametrize("function", FORWARDS, ids=[function.__name__ for function in FORWARDS])
def test_the_second_derivative_stops_where_the_model_does(function: Callable[[Net, Tensor], Tensor]) -> None:
    model, x, y = a_batch(function, max(SIZES))
    compiled = fxcurv.compile(model, quantities=("grad", "diag_hessian", "batch_diag_hessian", "kfra"))
    each = [twice_differentiated(model, F.cross_entropy(model(x[[n]]), y[[n]])) for n in range(len(x))]
    for size in SIZES:
        result = compiled(x[:size], y[:size])
        model.zero_grad()
        F.cross_entropy(model(x[:size]), y[:size]).backward()
        for name, p in model.named_parameters():
            if p.grad is None:
                assert name.startswith("a.")
                assert name not in result["grad"]
                continue
            torch.testing.assert_close(result["grad"][name], p.grad)
            expected = torch.stack([one[name] for one in each[:size]]) / size
            torch.testing.assert_close(result["batch_diag_hessian"][name], expected)
            torch.testing.assert_close(result["diag_hessian"][name], expected.sum(0))
            if size == 1 and p.ndim == 2 and function not in SEVERAL_USES:  # then KFRA has no approximation
                ggn = generalized(model, F.cross_entropy, x[:1], y[:1], p)
                torch.testing.assert_close(result["kfra"][name].dense(), ggn)


@pytest.mark.parametrize("function", [detached, nested, inference, surrogate])
def test_other_second_derivatives(function: Callable[[Net, Tensor], Tensor]) -> None:
    model, x, y = a_batch(function, 3)
    expected = twice_differentiated(model, F.cross_entropy(model(x), y))
    slow = by_autograd(model, as_loss("cross_entropy"), chosen("diag_hessian"), Minibatch(x, y))["diag_hessian"]
    H = fxcurv.hessian_operator(model, "cross_entropy", (x, y))
    diagonal = H.domain.split((H @ torch.eye(H.shape[0]).double()).diagonal())
    for name, values in expected.items():
        torch.testing.assert_close(slow[name], values)
        torch.testing.assert_close(diagonal[name], values)
