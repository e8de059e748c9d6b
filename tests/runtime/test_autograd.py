"""The same numbers by plain autograd: equal to the compiled graphs, and what on_unsupported falls back on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import samples
import torch
from samples import Sample
from torch import Tensor, nn

import fxcurv
from fxcurv.losses.base import as_loss
from fxcurv.quantities.selection import chosen
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.run import Minibatch

QUANTITIES = ("grad", "kfac", "diag_ggn", fxcurv.KFAC(fxcurv.Empirical(), approx="reduce", joint=True))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def assert_equal(ours: fxcurv.Curvature, theirs: fxcurv.Curvature) -> None:
    """The same parameters, forms and numbers; where only the forms differ, the same diagonal."""
    assert [(e.quantity, e.parameter, e.value is None) for e in ours.entries] == [
        (e.quantity, e.parameter, e.value is None) for e in theirs.entries
    ]
    for a, b in zip(ours.entries, theirs.entries, strict=True):
        assert a.form() == b.form(), f"{a.quantity} of {a.parameter}: {a.form()}, {b.form()}"
        for name, expected in b.tensors().items():
            torch.testing.assert_close(a.tensors()[name], expected, rtol=1e-9, atol=1e-12)


ROWS = (*samples.SAMPLES[::12], *samples.LOSSES[::8], *samples.MODELS[:3])


@pytest.mark.parametrize("sample", ROWS, ids=[row.name for row in ROWS])
def test_equals_the_compiled_graphs(sample: Sample) -> None:
    model, loss = sample.build(), sample.loss()
    x, y = samples.inputs(sample), samples.targets(sample)
    compiled = fxcurv.compile(model, loss, QUANTITIES)(x, y, generator())
    assert_equal(by_autograd(model, as_loss(loss), chosen(QUANTITIES), Minibatch(x, y, generator())), compiled)


class Attends(nn.Module):
    """Attention by torch's own Python function, and a convolution: of the batch, or of each sample without an axis."""

    def __init__(self, loop: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv = nn.Conv1d(3, 2, 2, padding="same")
        self.head = nn.Linear(8, 3)
        self.loop = loop

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x, need_weights=False)[0]
        y = torch.stack([self.conv(row) for row in x]) if self.loop else self.conv(x)
        return self.head(y.flatten(1))


def test_sees_layers_inside_of_attention_and_without_a_batch_axis() -> None:
    looped, whole = (samples.seeded(lambda loop=loop: Attends(loop), "attends") for loop in (True, False))
    x, y = torch.randn(2, 3, 4, generator=generator()).double(), torch.tensor([0, 2])
    ours = by_autograd(looped, as_loss(nn.CrossEntropyLoss()), chosen(QUANTITIES), Minibatch(x, y, generator()))
    assert isinstance(ours["kfac"]["attention.in_proj_weight"], fxcurv.Kronecker)
    assert_equal(ours, fxcurv.compile(whole, quantities=QUANTITIES)(x, y, generator()))


# Models that the compiler refuses ---------------------------------------------------------------------------------


class Branches(nn.Module):
    """Control flow on values: cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.rare = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.second(h) if bool(x.sum() > -1e9) else self.rare(h)


class Centres(nn.Module):
    """The first layer's outputs are centred over the batch, which mixes samples; the head comes behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.beside = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.head(h - h.mean(0)) + self.beside(x)


X, Y = torch.randn(4, 3, generator=generator()).double(), torch.tensor([0, 1, 2, 1])


def setup(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    return samples.seeded(make, make.__name__), X, Y


def ggn_diagonal(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """The diagonal of the GGN of the loss of a whole batch, whose samples may mix."""
    parameter = model.get_parameter(name)

    def f(p: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: p}, (x,)).flatten()

    J = torch.func.jacrev(f)(parameter.detach()).flatten(1)
    logits = model(x).detach()
    H = torch.func.hessian(lambda z: nn.functional.cross_entropy(z.view_as(logits), y))(logits.flatten())
    return (J.T @ H @ J).diagonal().view_as(parameter)


def test_default_raises() -> None:
    for make, error in ((Branches, fxcurv.CaptureError), (Centres, fxcurv.UnsupportedError)):
        model, x, y = setup(make)
        with pytest.raises(error):
            fxcurv.compile(model)(x, y)


def test_fallback_of_a_whole_model() -> None:
    model, x, y = setup(Branches)
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = fxcurv.compile(model, quantities=["kfac", "diag_ggn"], on_unsupported="fallback")(x, y, generator())
    straight = nn.Sequential(model.get_submodule("first"), nn.Tanh(), model.get_submodule("second"))
    expected = fxcurv.compile(straight, quantities=["kfac", "diag_ggn"])(x, y, generator())
    for ours, theirs in (("first", "0"), ("second", "2")):
        for parameter in ("weight", "bias"):
            a, b = (r["diag_ggn"][f"{n}.{parameter}"] for r, n in ((result, ours), (expected, theirs)))
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result["kfac"][f"{ours}.weight"].G, expected["kfac"][f"{theirs}.weight"].G)
    assert result["kfac"].status["first.weight"] == "fallback"
    assert result["kfac"].status["rare.weight"] == "unreached"
    assert "data-dependent" in str(result)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_fallback_of_what_lies_before_a_node_that_mixes() -> None:
    model, x, y = setup(Centres)
    result = fxcurv.compile(model, quantities=["kfac", "diag_ggn"], on_unsupported="fallback")(x, y)
    statuses = result["diag_ggn"].status
    assert statuses == {
        "first.weight": "fallback",
        "first.bias": "fallback",
        "head.weight": "exact",
        "head.bias": "exact",
        "beside.weight": "exact",
        "beside.bias": "exact",
    }
    for name in statuses:
        torch.testing.assert_close(result["diag_ggn"][name], ggn_diagonal(model, x, y, name))
    assert result["kfac"]["first.weight"].tensors.keys() == {"matrix"}  # no Kronecker pair where samples mix
    assert "samples of the batch mix here" in str(result)


def test_skip_leaves_out_and_says_so() -> None:
    model, x, y = setup(Centres)
    result = fxcurv.compile(model, quantities="diag_ggn", on_unsupported="skip")(x, y)["diag_ggn"]
    assert result.status["first.weight"] == "unsupported"
    assert "first.weight" not in result
    torch.testing.assert_close(result["head.weight"], ggn_diagonal(model, x, y, "head.weight"))
    with pytest.raises(fxcurv.QuantityError, match=r"mix here.*on_unsupported='fallback'"):
        result["first.weight"]


def test_skip_raises_where_nothing_is_left() -> None:
    model, x, y = setup(Branches)
    with pytest.raises(fxcurv.CaptureError):
        fxcurv.compile(model, on_unsupported="skip")(x, y)


def test_sampled_columns_are_those_of_the_compiled_model() -> None:
    model, x, y = setup(Centres)
    mixed = fxcurv.compile(model, quantities="diag_ggn_mc", on_unsupported="fallback")(x, y, generator())
    whole = by_autograd(model, as_loss(nn.CrossEntropyLoss()), chosen("diag_ggn_mc"), Minibatch(x, y, generator()))
    assert_equal(mixed, whole)


def test_a_model_that_changes_is_refused() -> None:
    model = samples.seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), "norm").train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(fxcurv.InputError, match="updates its buffer"):
        by_autograd(model, as_loss(nn.CrossEntropyLoss()), chosen("grad"), Minibatch(X, Y))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    noisy = samples.seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 3)), "noisy").train()
    with pytest.raises(fxcurv.InputError, match="from call to call"):
        by_autograd(noisy, as_loss(nn.CrossEntropyLoss()), chosen("grad"), Minibatch(X, Y))


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(fxcurv.QuantityError, match="choose one of error, skip, fallback"):
        fxcurv.compile(samples.seeded(lambda: nn.Linear(2, 2), "ignore"), on_unsupported="ignore")  # pyright: ignore[reportArgumentType]
