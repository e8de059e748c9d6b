"""Every quantity that has a name equals brute force on a residual net with BatchNorm, attention and tied weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import pytest
import reference
import samples
import torch
from by_hand import FIRST_ORDER, by_hand, check_foof
from by_hand import check as check_ekfac
from comparison import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import fxcurv
from fxcurv.losses.base import as_loss, loss_terms
from fxcurv.quantities.factors import Factor
from fxcurv.quantities.protocol import facts_of
from fxcurv.quantities.selection import chosen
from fxcurv.results.entry import Entry
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.run import Minibatch


class Residual(nn.Module):
    """Convolutions, BatchNorm, and a sum of two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)
        self.inner, self.inner_norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.stem(x)))
        h = torch.relu(h + self.inner_norm(self.inner(h)))
        return self.head(h.mean((2, 3)))


class Attention(nn.Module):
    """A block of a transformer: a table of positions, LayerNorm, attention, and a sum of two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.norm = nn.Parameter(torch.randn(1, 3, 4)), nn.LayerNorm(4)
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.out, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.position
        z = self.norm(h)
        h = h + self.out(F.scaled_dot_product_attention(self.query(z), self.key(z), self.value(z)))
        return self.head(torch.tanh(h).mean(1))


class Tied(nn.Module):
    """A weight that two layers share, which have biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Swapped(nn.Module):
    """Weights on the right: of a layer as GPT-2's, which folds positions into the batch, and used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2))
        self.twice, self.given = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(2, 3))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.bias, x.reshape(-1, 4), self.first).reshape(-1, 3, 2)
        h = torch.tanh(torch.tanh(h @ self.twice) @ self.twice)
        return self.head(torch.tanh(h @ self.given).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 4, 4)),
    "attention": (Attention, (3, 4)),
    "tied": (Tied, (4,)),
    "swapped": (Swapped, (3, 4)),
}
LOSS = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
TARGET = torch.tensor([0, 2, 1])


class Oracle:
    """A model, a batch, and what brute force says of them."""

    def __init__(self, name: str) -> None:
        make, shape = MODELS[name]
        self.model = samples.seeded(make, name)
        self.x = samples.normal((3, *shape), torch.Generator().manual_seed(0))
        self.output = reference.outputs(self.model, self.x)

    @cache  # noqa: B019
    def columns(self, factor: Factor) -> Tensor:
        """S[v, n, …]; those that are drawn are what fxcurv draws."""
        if isinstance(factor, fxcurv.Sampled):
            terms = loss_terms(LOSS, self.output, TARGET)
            return torch.cat(list(terms.columns(factor, 1, torch.Generator().manual_seed(0))))
        make = reference.exact_columns if isinstance(factor, fxcurv.Exact) else reference.empirical_columns
        return make(LOSS, self.output, TARGET)

    @cache  # noqa: B019
    def pulled(self, factor: Factor) -> dict[str, Tensor]:
        """u[v, n, *θ]."""
        return reference.column_gradients(self.model, self.x, self.columns(factor))

    @cache  # noqa: B019
    def factors(self, factor: Factor) -> dict[str, tuple[Tensor, Tensor]]:
        return reference.kfac(self.model, self.x, self.columns(factor))

    def dense(self, factor: Factor) -> dict[str, Tensor]:
        """Σ_vn u uᵀ."""
        rows = {name: u.flatten(2).flatten(0, 1) for name, u in self.pulled(factor).items()}
        return {name: u.T @ u for name, u in rows.items()}

    @cached_property
    def family(self) -> dict[str, dict[str, Tensor]]:
        return by_hand(self.model, LOSS, self.x, TARGET)

    def values(self, name: str, quantity: Any) -> dict[str, Tensor] | None:
        """What the quantity is of each parameter, blocks as matrices; None where it is not unique."""
        match quantity:
            case fxcurv.Grad():
                return reference.grad(self.model, LOSS, self.x, TARGET)
            case fxcurv.DiagGGN():
                return {p: u.square().sum((0, 1)) for p, u in self.pulled(quantity.factor).items()}
            case fxcurv.KFRA():
                return reference.kfra(self.model, self.x, self.columns(quantity.factor))
            case fxcurv.EKFAC() | fxcurv.FOOF():
                return None
            case fxcurv.KFAC():
                kronecker = self.factors(quantity.factor).items()
                swapped = reference.in_out(self.model, self.x)
                blocks = {p: reference.kronecker_block(*f, p in swapped) for p, f in kronecker}
                return {**self.dense(quantity.factor), **blocks}
            case fxcurv.DiagHessian():
                parts = range(len(self.x)) if quantity.per_sample else (None,)
                each = [reference.diag_hessian(self.model, LOSS, self.x, TARGET, n) for n in parts]
                stacked = {p: torch.stack([part[p] for part in each]) for p in each[0]}
                return stacked if quantity.per_sample else each[0]
            case fxcurv.BatchDiagGGN():
                return {p: u.square().sum(0) for p, u in self.pulled(quantity.factor).items()}
            case fxcurv.GGNBlock():
                return self.dense(quantity.factor)
            case fxcurv.SqrtGGN() if isinstance(quantity.factor, fxcurv.Sampled):
                return self.pulled(quantity.factor)
            case _:
                return self.family[name] if name in (*FIRST_ORDER, "jacobian") else None


def check(name: str, result: fxcurv.Curvature, oracle: Oracle, status: str = "exact") -> None:
    """A quantity of all parameters; where it is not unique, by what makes it what it is."""
    quantity, found = fxcurv.NAMES[name], result[name]
    assert set(found) == {p for p, _ in oracle.model.named_parameters()}
    assert set(found.status.values()) == {status}
    expected = oracle.values(name, quantity)
    if expected is not None:
        for parameter, value in found.items():
            value = value.dense() if isinstance(value, fxcurv.Block) else value
            assert_close(value, expected[parameter], f"{name} {parameter}")
    elif isinstance(quantity, fxcurv.EKFAC):
        columns = oracle.columns(quantity.factor)
        check_ekfac(oracle.model, oracle.x, found, columns, approx="expand", joint=False)
    elif isinstance(quantity, fxcurv.FOOF):
        check_foof(found, oracle.factors(fxcurv.Exact()))
    elif name == "sqrt_ggn":
        for parameter, root in found.items():
            V = root.flatten(2).flatten(0, 1)
            assert_close(V.T @ V, oracle.dense(fxcurv.Exact())[parameter], f"{name} {parameter}")
    else:
        assert name == "ggn_gram", f"{name} is compared with nothing"
        for parameter, gram in found.items():
            eigenvalues = torch.linalg.eigvalsh(oracle.dense(fxcurv.Exact())[parameter])
            size = min(len(eigenvalues), len(gram))
            assert_close(torch.linalg.eigvalsh(gram)[-size:], eigenvalues[-size:], f"{name} {parameter}")
            assert_close(gram.trace(), eigenvalues.sum(), f"{name} {parameter}")


oracle_of = cache(Oracle)


@cache
def computed(model: str, backend: Any) -> fxcurv.Curvature:
    """All quantities at once."""
    compiled = fxcurv.compile(oracle_of(model).model, LOSS, list(fxcurv.NAMES), backend=backend)
    return compiled(oracle_of(model).x, TARGET, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", fxcurv.NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_brute_force(model: str, name: str) -> None:
    check(name, computed(model, "eager"), oracle_of(model))


def test_inductor() -> None:
    torch._dynamo.reset()
    for name in fxcurv.NAMES:
        check(name, computed("tied", "inductor"), oracle_of("tied"))


@pytest.mark.parametrize("model", MODELS)
def test_by_autograd(model: str) -> None:
    """The same by the fallback, which has no recursion over nodes."""
    oracle = oracle_of(model)
    batch = Minibatch(oracle.x, TARGET, torch.Generator().manual_seed(0))
    names = [name for name in fxcurv.NAMES if name != "kfra"]
    result = by_autograd(oracle.model, as_loss(LOSS), chosen(names), batch)
    for name in names:
        check(name, result, oracle, "fallback")
    with pytest.raises(fxcurv.UnsupportedError) as caught:
        by_autograd(oracle.model, as_loss(LOSS), chosen("kfra"), batch)
    assert caught.value.code == "FXC322"


@pytest.mark.parametrize("name", fxcurv.NAMES)
def test_a_small_error_is_found(name: str) -> None:
    def spoil(entry: Entry) -> Entry:
        assert entry.value is not None
        return replace(entry, value=entry.value * (1 + 1e-6))

    spoiled = computed("tied", "eager")._mapped(spoil)
    with pytest.raises(AssertionError):
        check(name, spoiled, oracle_of("tied"))


@pytest.mark.parametrize("name", fxcurv.NAMES)
def test_a_data_set(name: str) -> None:
    """Over batches, a quantity equals brute force or is refused."""
    oracle, quantity = oracle_of("attention"), fxcurv.NAMES[name]
    compiled = fxcurv.compile(oracle.model, LOSS, name)
    batches, generator = [(oracle.x[:2], TARGET[:2]), (oracle.x[2:], TARGET[2:])], torch.Generator().manual_seed(0)
    if facts_of(quantity)["combine"] == "refuse" and not isinstance(quantity, fxcurv.EKFAC):
        with pytest.raises(
            fxcurv.FxcurvError, match=f"{name} of two batches is not determined by {name} of each"
        ) as caught:
            compiled.accumulate(batches, generator=generator)
        assert caught.value.code == "FXC425"
        return
    found = compiled.accumulate(batches, generator=generator)
    if "Sampled" not in repr(quantity):
        check(name, found, oracle)
