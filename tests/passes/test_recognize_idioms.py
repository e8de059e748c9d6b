"""recognize: formulas of activations become the modules that they equal, and what only looks like them does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcurv

SLOPE = math.sqrt(2 / math.pi)

FORMULAS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "silu": (lambda x: x * torch.sigmoid(x), "SiLU"),
    "silu, the gate first": (lambda x: x.sigmoid() * x, "SiLU"),
    "gelu": (lambda x: 0.5 * x * (1.0 + torch.tanh(SLOPE * (x + 0.044715 * torch.pow(x, 3.0)))), "GELU"),
    "gelu, turned": (lambda x: (1.0 + torch.tanh((0.044715 * x**3 + x) * SLOPE)) * (x * 0.5), "GELU"),
    "another gate": (lambda x: x * torch.sigmoid(1.702 * x), ""),
    "a gate of something else": (lambda x: x * torch.sigmoid(x.flip(1)), ""),
    "another slope": (lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0)))), ""),
    "another power": (lambda x: 0.5 * x * (1.0 + torch.tanh(SLOPE * (x + 0.044715 * torch.pow(x, 5.0)))), ""),
    "the cube of something else": (lambda x: 0.5 * x * (1 + torch.tanh(SLOPE * (x + 0.044715 * x.flip(1) ** 3))), ""),
}


class Written(nn.Module):
    """Two layers with an activation that is written out."""

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.head, self.formula = nn.Linear(3, 4), nn.Linear(4, 2), formula

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.formula(self.fc(x)))


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_recognized(name: str) -> None:
    formula, expected = FORMULAS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = Written(formula).double().eval(), torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])
    compiled = fxcurv.compile(model, quantities="grad")
    result = compiled(x, y)
    canonical = compiled.stages["canonical"]
    kinds = [
        type(canonical.get_submodule(str(n.target))).__name__ for n in canonical.graph.find_nodes(op="call_module")
    ]
    assert kinds == ["Linear", expected, "Linear"] if expected else not {"SiLU", "GELU"} & set(kinds)
    torch.testing.assert_close(canonical(x), model(x), rtol=1e-14, atol=1e-14)
    loss = nn.functional.cross_entropy(model(x), y)
    for got, g in zip(result["grad"].values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(got, g, rtol=1e-12, atol=1e-13)
