"""join: what parts of a tensor receive is laid side by side, where they are all of it, and added where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.ir.backward_ops import Accumulate, Joined


def gated(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] * parts[1].sigmoid()


PARTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "halves": (lambda y: gated(y.chunk(2, -1)), "dim=2, new=False"),
    "halves, the second first": (lambda y: y[:, 4:].tanh() * y[:, :4], "dim=2, new=False"),
    "unbound": (lambda y: gated(y.view(-1, 2, 4).unbind(1)), "dim=2, new=True"),
    "one is left out": (lambda y: y[:, :4] * y[:, 4:7].sum(1, keepdim=True), ""),
    "they overlap": (lambda y: y[:, :5].tanh() * y[:, 3:], ""),
    "every other": (lambda y: y[:, ::2] * y[:, 1::2].tanh(), ""),
    "every other of a half": (lambda y: y[:, :4:2].tanh().sum(1, keepdim=True) * y[:, 4:], ""),
    "along two axes": (lambda y: y.view(-1, 2, 4)[:, 0].tanh() * y.view(-1, 2, 4)[:, :, :2].sum((1, 2))[:, None], ""),
}


class Split(nn.Module):
    """A layer whose outputs are taken apart."""

    def __init__(self, parts: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.head, self.parts = nn.Linear(3, 8), nn.LazyLinear(2), parts

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.parts(self.fc(x)))


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_tile_a_tensor_are_joined(name: str) -> None:
    parts, joined = PARTS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = Split(parts), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        model(x)
    model, x = model.double().eval(), x.double()
    compiled = fxcurv.compile(model, quantities=["grad", "diag_ggn"])
    result = compiled(x, y)
    loss = nn.functional.cross_entropy(model(x), y)
    for name_, g in zip(result["grad"], torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(result["grad"][name_], g, rtol=1e-11, atol=1e-12)
    for gm in compiled.program.backwards.values():
        modules = list(gm.modules())
        assert [m.extra_repr() for m in modules if isinstance(m, Joined)] == ([joined] if joined else [])
        assert any(isinstance(m, Accumulate) for m in modules) == (not joined)
