"""Closed forms of pullbacks equal autograd's, for every input of an operator, and several columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.ir import closed_form_vjps as closed_forms
from fxcurv.ir.backward_ops import PullInputs, PullToParameter
from fxcurv.ir.calls import INPUT, Opaque
from fxcurv.ir.closed_form_vjps import CLOSED_FORMS, closed_form
from fxcurv.ir.declare import autograd_pull_each

aten: Any = torch.ops.aten


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def masked() -> Tensor:
    """What may be looked at, nothing by one of the queries."""
    mask = draw(2, 1, 5, 7) > 0
    mask[0, 0, 2] = False
    return mask


QUERY, KEY, VALUE = draw(2, 3, 5, 4), draw(2, 3, 7, 4), draw(2, 3, 7, 6)

CASES: dict[str, tuple[Any, Sequence[Any], dict[str, Any]]] = {
    "layer_norm": (aten.layer_norm.default, (draw(2, 5, 4), [4], draw(4), draw(1, 4)[0]), {}),
    "layer_norm over two axes": (aten.layer_norm.default, (draw(2, 5, 4), [5, 4], draw(5, 4), draw(5, 4), 0.1), {}),
    "layer_norm alone": (aten.layer_norm.default, (draw(2, 5, 4), [4]), {}),
    "rms_norm": (aten.rms_norm.default, (draw(2, 5, 4), [4], draw(4)), {}),
    "rms_norm alone": (aten.rms_norm.default, (draw(2, 5, 4), [5, 4], None, 0.1), {}),
    "softmax": (aten.softmax.int, (draw(2, 5, 4), -1), {}),
    "softmax over axis 1": (aten._softmax.default, (draw(2, 5, 4), 1, False), {}),
    "matmul": (aten.matmul.default, (draw(2, 3, 5, 4), draw(3, 4, 6)), {}),
    "matmul, left repeated": (aten.matmul.default, (draw(1, 5, 4), draw(2, 3, 4, 6)), {}),
    "matmul by a matrix": (aten.matmul.default, (draw(2, 3, 5, 4), draw(4, 6)), {}),
    "mm": (aten.mm.default, (draw(5, 4), draw(4, 6)), {}),
    "bmm": (aten.bmm.default, (draw(3, 5, 4), draw(3, 4, 6)), {}),
    "addmm": (aten.addmm.default, (draw(6), draw(5, 4), draw(4, 6)), {}),
    "addmm with factors": (aten.addmm.default, (draw(5, 1), draw(5, 4), draw(4, 6)), {"alpha": 2, "beta": 3}),
    "attention": (aten.scaled_dot_product_attention.default, (QUERY, KEY, VALUE), {}),
    "attention, scaled": (aten.scaled_dot_product_attention.default, (QUERY, KEY, VALUE), {"scale": 0.3}),
    "attention, causal": (aten.scaled_dot_product_attention.default, (QUERY, KEY, VALUE, None, 0.0, True), {}),
    "attention, masked": (aten.scaled_dot_product_attention.default, (QUERY, KEY, VALUE, masked()), {}),
    "attention, biased": (aten.scaled_dot_product_attention.default, (QUERY, KEY, VALUE, draw(5, 7)), {}),
    "attention of vectors": (
        aten.scaled_dot_product_attention.default,
        (draw(5, 4), draw(5, 4) * 2, draw(5, 4) * 3),
        {},
    ),
    "attention of heads": (
        aten.scaled_dot_product_attention.default,
        (draw(5, 5, 4), draw(5, 5, 4) * 2, draw(5, 5, 3)),
        {},
    ),
    "attention, keys repeated": (
        aten.scaled_dot_product_attention.default,
        (draw(3, 3, 5, 4), draw(3, 7, 4), VALUE[0]),
        {},
    ),
    "attention, one mask": (aten.scaled_dot_product_attention.default, (QUERY, KEY, VALUE, draw(1, 3, 5, 7)), {}),
    "embedding": (aten.embedding.default, (draw(9, 4), torch.tensor([[1, 2, 8], [1, 1, 0]]), 8), {}),
}
UNKNOWN: dict[str, tuple[Any, Sequence[Any], dict[str, Any]]] = {
    "matmul of vectors": (aten.matmul.default, (draw(3, 4), draw(4)), {}),
    "attention with dropout": (aten.scaled_dot_product_attention.default, (QUERY, KEY, VALUE, None, 0.5), {}),
    "another operator": (aten.cumsum.default, (draw(3, 4), 1), {}),
}


def called(function: Any, arguments: Sequence[Any], options: dict[str, Any]) -> tuple[Opaque, list[Tensor]]:
    """The op, and its input tensors."""
    places = [INPUT if isinstance(a, Tensor) else a for a in arguments]
    return Opaque(function, places, options), [a for a in arguments if isinstance(a, Tensor)]


@pytest.mark.parametrize("name", CASES)
def test_closed_forms_equal_autograd(name: str) -> None:
    op, xs = called(*CASES[name])
    S = draw(3, *op(*xs).shape)
    mask = 3 if "attention" in name else math.inf
    ks = [k for k, x in enumerate(xs) if x.is_floating_point() and k != mask]
    for wanted in (ks, *([k] for k in ks)):
        value = closed_form(op, S, xs, wanted)
        assert value is not None
        torch.testing.assert_close(value, autograd_pull_each(op, S, xs, wanted), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("entries", [1, 40, 100])
@pytest.mark.parametrize("name", CASES)
def test_parts_of_columns_and_samples_make_no_difference(name: str, entries: int, monkeypatch: Any) -> None:
    op, xs = called(*CASES[name])
    S = draw(3, *op(*xs).shape)
    ks = [k for k, x in enumerate(xs) if x.is_floating_point() and not ("attention" in name and k == 3)]
    whole = closed_form(op, S, xs, ks)
    monkeypatch.setattr(closed_forms, "CACHE", entries)
    torch.testing.assert_close(closed_form(op, S, xs, ks), whole, rtol=1e-12, atol=1e-12)


def test_every_form_has_a_case() -> None:
    assert {str(function.overloadpacket).removeprefix("aten.") for function, _, _ in CASES.values()} == set(
        CLOSED_FORMS
    )


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "softmax", "attention, causal"])
def test_sums_of_bfloat16_are_near_those_of_float64(name: str) -> None:
    op, xs = called(*CASES[name])
    narrow = [(x / 64).bfloat16() for x in xs]  # so small that another ε would be seen
    S = draw(3, *op(*xs).shape).bfloat16()
    for k in range(len(xs)):
        found = closed_form(op, S, narrow, [k])
        wide = torch.float32 if name == "rms_norm" else torch.float64  # float64 has another ε
        (expected,) = autograd_pull_each(op, S.to(wide), [x.to(wide) for x in narrow], [k])
        assert found is not None
        value, expected = found[0], expected.double()
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), expected, rtol=0.1, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_calls_are_left_to_autograd(name: str) -> None:
    op, xs = called(*UNKNOWN[name])
    with torch.random.fork_rng(devices=[]):
        S = op(*xs).unsqueeze(0)
    assert closed_form(op, S, xs, [0]) is None


def test_a_transformer_is_pulled_back_without_loops() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.Sequential(nn.Embedding(5, 8), layer, nn.Flatten(), nn.Linear(24, 3)).double().eval()
    x, y = torch.tensor([[0, 1, 4], [2, 2, 3]]), torch.tensor([0, 2])
    compiled = fxcurv.compile(model, quantities="grad")
    result = compiled(x, y)["grad"]
    loss = nn.functional.cross_entropy(model(x), y)
    parameters = dict(model.named_parameters())
    for name, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        torch.testing.assert_close(result[name], g, rtol=1e-10, atol=1e-12, msg=name)
    pulls = [m for gm in compiled.program.backwards.values() for m in gm.modules()]
    opaque = [m for m in pulls if isinstance(m, PullInputs | PullToParameter) and isinstance(m.op, Opaque)]
    assert len(opaque) == 4  # of two normalizations, attention, and the table
    assert all(m.vectorized for m in opaque)
