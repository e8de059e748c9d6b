"""J v carried along by a forward pass: what backward passes say of the same model, or left to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.matrixfree import products
from fxcurv.matrixfree.forward_mode import carried

X = torch.linspace(-1, 2, 15, dtype=torch.float64).view(5, 3)


class Written(nn.Module):
    """x ↦ `function(self, x)`, with a weight and what is kept of it."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        self.frozen = nn.Parameter(self.weight.detach() / 2, requires_grad=False)
        self.kept = self.weight * 2
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Doubled(torch.autograd.Function):
    """A function that tells backward passes alone what its derivative is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return 2 * grad_outputs[0]


def padded(m: Any, x: Tensor) -> Tensor:
    return nn.functional.embedding(torch.tensor([[0, 1], [2, 0]]), m.weight, padding_idx=-3).sum(1) @ m.weight


def hooked(m: Any, x: Tensor) -> Tensor:
    h = x @ m.weight
    if h.requires_grad:
        h.register_hook(lambda t: 2 * t)
    return h


def within_no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (x @ m.weight).abs().amax()
    return x @ m.weight / scale


def written_within_no_grad(m: Any, x: Tensor) -> Tensor:
    h = x @ m.weight
    with torch.no_grad():
        h.mul_(2)
    return h.sum(1, keepdim=True)


@torch.no_grad()
def shifted(x: Tensor) -> Tensor:
    return x + 1


def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.lstm(x.unsqueeze(1))[0].squeeze(1) @ m.weight


CASES: dict[str, tuple[bool, Callable[[Any, Tensor], Tensor]]] = {
    "plain": (True, lambda m, x: (x @ m.weight).tanh() @ m.frozen @ m.weight),
    "in place": (True, lambda m, x: (x @ m.weight).mul_(3).relu_() @ m.weight),
    "detached": (True, lambda m, x: x @ m.weight * (x @ m.weight).detach()),
    "data": (True, lambda m, x: x @ m.weight * m.weight.data.sum()),
    "constants without gradients": (True, lambda m, x: shifted(x) @ m.weight),
    "no parameters reach it": (True, lambda m, x: x @ m.frozen),
    "padding": (True, padded),
    "hooks": (False, hooked),
    "within no_grad": (False, within_no_grad),
    "written within no_grad": (False, written_within_no_grad),
    "all without gradients": (False, lambda m, x: shifted(x @ m.weight) @ m.weight),
    "kept": (False, lambda m, x: x @ m.kept @ m.weight),
    "kept alone": (False, lambda m, x: m.kept),
    "of one direction": (False, lambda m, x: Doubled.apply(x @ m.weight)),
}


def of_rows(model: nn.Module, V: Tensor) -> Tensor:
    """J V by one backward pass for every output."""
    parameters, rows = [p for p in model.parameters() if p.requires_grad], []
    y = model(X)
    for k in range(y.numel()):
        found: Any = [None] * len(parameters)
        if y.requires_grad:
            found = torch.autograd.grad(y.flatten()[k], parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if t is None else t).flatten() for t, p in zip(found, parameters, strict=True)]
            )
        )
    return torch.stack(rows) @ V


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_derivatives_are_those_of_backward_passes(
    case: tuple[bool, Callable[[Any, Tensor], Tensor]], columns: int
) -> None:
    carries, function = case
    model = Written(function).eval()
    V = torch.randn(9, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = carried(model, [model.weight], [[v.view(3, 3)] for v in V.T], lambda copy: copy(X))
    assert (found is not None) == carries
    if function is written_within_no_grad:  # torch itself takes the value before for the one after
        return
    J = fxcurv.jacobian_operator(model, (X, torch.zeros(5)))
    for _ in range(2):  # once it was tried, and once it was not
        torch.testing.assert_close(J @ V, of_rows(model, V))
        torch.testing.assert_close(
            J.T @ torch.eye(J.shape[0], dtype=V.dtype), of_rows(model, torch.eye(9, dtype=V.dtype)).T
        )


@pytest.mark.parametrize("of", ["parameter", "module"])
def test_hooks_are_left_to_backward_passes(of: str) -> None:
    model = Written(lambda m, x: x @ m.weight).eval()
    if of == "parameter":
        model.weight.register_hook(lambda t: 2 * t)
    else:
        model.register_full_backward_hook(lambda *_: None)
    V = torch.eye(9, dtype=torch.float64)
    assert carried(model, [model.weight], [[V[0].view(3, 3)]], lambda copy: copy(X)) is None
    torch.testing.assert_close(fxcurv.jacobian_operator(model, (X, torch.zeros(5))) @ V, of_rows(model, V))


def test_what_is_carried_must_agree_with_backward_passes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it does not, products are those of backward passes."""
    asked: list[float] = []

    def wrong(*args: Any) -> Any:
        y, images = carried(*args) or (None, None)
        assert images is not None
        asked.append(factor)
        return y, images * factor

    monkeypatch.setattr(products, "carried", wrong)
    V = torch.eye(9, dtype=torch.float64)
    for factor, times in ((1 + 1e-6, 1), (1 + 1e-10, 2)):
        model = Written(CASES["plain"][1]).eval()
        J = fxcurv.jacobian_operator(model, (X, torch.zeros(5)))
        for _ in range(2):
            torch.testing.assert_close(J @ V, of_rows(model, V))
        assert asked == [factor] * times
        asked.clear()


def test_weights_that_a_module_holds_in_several_places() -> None:
    """An LSTM reads its list of weights, not its parameters."""
    model = Written(recurrent)
    with torch.random.fork_rng(devices=[]):
        model.lstm = nn.LSTM(3, 3).double()
    model.eval()
    J = fxcurv.jacobian_operator(model, (X, torch.zeros(5)))
    V = torch.randn(J.shape[1], 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(J @ V, of_rows(model, V))


def test_what_goes_wrong_is_raised_by_the_plain_pass() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(4, 2).double().eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fxcurv.jacobian_operator(model, (X, torch.zeros(5)))
