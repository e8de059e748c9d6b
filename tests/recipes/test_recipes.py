"""Recipes: each equals its closed form where there is one, and does on digits what it is for."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

import fxcurv
from fxcurv import recipes
from fxcurv.linalg.conjugate_gradients import conjugate_gradients
from fxcurv.linalg.operator import Space
from fxcurv.models import data
from fxcurv.optim.preconditioned import _average
from fxcurv.quantities.protocol import ParameterUsage, Sums
from fxcurv.recipes.samples import gradients, jacobian_of, jacobians

EXACT = fxcurv.KFAC(fxcurv.Exact(), joint=True)
"""Of a linear layer under the squared error, this is the whole Hessian."""


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make().double().eval()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def joined(weights: Mapping[str, Tensor]) -> Tensor:
    """[W | b] of a linear layer, flat."""
    return torch.cat([weights["weight"], weights["bias"].unsqueeze(1)], 1).flatten()


def ones_added(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


@dataclass(frozen=True)
class Regression:
    """A linear model with Gaussian noise, of which everything has a closed form."""

    x: Tensor
    y: Tensor
    model: nn.Module

    @property
    def compiled(self) -> fxcurv.Compiled:
        return fxcurv.compile(self.model, nn.MSELoss(), EXACT)


def regression(samples: int = 20, outputs: int = 2) -> Regression:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, generator=g, dtype=torch.float64)
    y = x @ torch.randn(3, outputs, generator=g, dtype=torch.float64) + 1
    y = y + 0.3 * torch.randn(samples, outputs, generator=g, dtype=torch.float64)
    return Regression(x, y, seeded(lambda: nn.Linear(3, outputs)))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    pytest.importorskip("sklearn")
    batch = data.load("digits", 1797, (64,), 10, 0)
    assert batch.targets is not None
    return batch.inputs.double(), batch.targets


def perceptron(hidden: int = 24) -> nn.Module:
    return nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))


Penalised = Callable[[nn.Module], Any]


def train(
    model: nn.Module, x: Tensor, y: Tensor, steps: int = 300, penalty: Penalised = lambda model: 0.0, lr: float = 3e-3
) -> nn.Module:
    """So many steps of Adam on batches of 64."""
    optimizer, g = torch.optim.Adam(model.parameters(), lr), torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=g)
        optimizer.zero_grad()
        (F.cross_entropy(model(x[chosen]), y[chosen]) + penalty(model)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, weights: Mapping[str, Tensor] | None = None) -> float:
    return (functional_call(model, dict(weights or {}), (x,)).argmax(1) == y).double().mean().item()


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    x, y = digits
    return train(seeded(perceptron), x[:1400], y[:1400], 500)


# Preconditioned ---------------------------------------------------------------------------------------------------


def gradient_step(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


def newton(compiled: fxcurv.Compiled) -> recipes.Preconditioned:
    return recipes.Preconditioned(compiled, 1.0, 0.0, momentum=0.0, clip=math.inf)


def test_linear_regression_is_solved_in_one_step() -> None:
    problem = regression()
    optimizer = newton(problem.compiled)
    assert optimizer.update_curvature(problem.x, problem.y)
    gradient_step(problem.model, nn.MSELoss(), problem.x, problem.y, optimizer)
    best = torch.linalg.lstsq(ones_added(problem.x), problem.y).solution
    close(joined(values(problem.model)), best.T.flatten())


@pytest.mark.parametrize("method", ["exact", "pi"])
@pytest.mark.parametrize("quantity", ["kflr", "diag_ggn"])
def test_steps_are_as_defined(quantity: str, method: Any) -> None:
    """Three steps with momentum, decay of weights, averages and clipping, against the formulas on dense blocks."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x, y = regression().x, torch.arange(20) % 2
    options: Any = {"momentum": 0.9, "weight_decay": 0.1, "decay": 0.6, "clip": 0.01, "method": method}
    optimizer = recipes.Preconditioned(fxcurv.compile(model, quantities=quantity), 0.5, 0.05, **options)
    theta, other = values(model), copy.deepcopy(model)
    v, average = dict.fromkeys(theta, torch.tensor(0.0)), dict[str, fxcurv.Block]()
    reference = fxcurv.compile(other, quantities=quantity)
    for k in range(1, 4):
        blocks = {p.block.parameters[0]: p.block for p in reference(x, y).operator(quantity).parts}
        w = min(1 - 1 / k, 0.6)
        average = {n: _average(average[n], B, w) if average else B for n, B in blocks.items()}
        F.cross_entropy(other(x), y).backward()
        g = {n: p.grad.clone() for n, p in other.named_parameters() if p.grad is not None}
        d = {n: average[n].inverse(0.05, method).dense() @ g[n].flatten() for n in g}
        nu = min(1.0, math.sqrt(0.01 / (0.25 * sum(float(g[n].flatten() @ d[n]) for n in g))))
        v = {n: 0.9 * v[n] + nu * d[n].view_as(g[n]) for n in g}
        theta = {n: theta[n] * (1 - 0.5 * 0.1) - 0.5 * v[n] for n in g}
        other.load_state_dict(theta)
        other.zero_grad()
        optimizer.update_curvature(x, y)
        gradient_step(model, nn.CrossEntropyLoss(), x, y, optimizer)
        close(
            Space({n: t.shape for n, t in theta.items()}).flat(values(model)),
            torch.cat([t.flatten() for t in theta.values()]),
        )


def test_the_state_goes_through_a_file_and_curvature_is_computed_when_due() -> None:
    problem = regression()

    def fresh() -> tuple[nn.Module, recipes.Preconditioned]:
        model = copy.deepcopy(problem.model)
        compiled = fxcurv.compile(model, nn.MSELoss(), EXACT)
        return model, recipes.Preconditioned(compiled, 0.1, 0.1, momentum=0.5, clip=math.inf, every=2)

    def advance(model: nn.Module, optimizer: recipes.Preconditioned, steps: range) -> list[bool]:
        due = []
        for k in steps:
            due.append(optimizer.update_curvature(problem.x[k:], problem.y[k:]))
            gradient_step(model, nn.MSELoss(), problem.x, problem.y, optimizer)
        return due

    one, straight = fresh()
    assert advance(one, straight, range(5)) == [True, False, True, False, True]
    two, before = fresh()
    advance(two, before, range(3))
    file = io.BytesIO()
    torch.save([two.state_dict(), before.state_dict()], file)
    file.seek(0)
    saved, state = torch.load(file, weights_only=True)
    three, after = fresh()
    three.load_state_dict(saved)
    after.load_state_dict(state)
    assert advance(three, after, range(3, 5)) == [False, True]
    assert torch.equal(joined(values(three)), joined(values(one)))


def test_modes_are_restored_and_schedulers_and_closures_work() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))).train()
    model[2].eval()  # pyright: ignore[reportIndexIssue]
    x, y = regression().x, torch.arange(20) % 2
    optimizer = recipes.Preconditioned(fxcurv.compile(model), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.update_curvature(x, y, torch.Generator().manual_seed(0))
    assert [m.training for m in model.modules()] == [True, True, True, False, True]

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure))
        schedule.step()
    assert losses[2] < losses[1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == 0.1 / 8


def test_averages_of_eigenbases_are_projections() -> None:
    g = torch.Generator().manual_seed(0)

    def block() -> fxcurv.Eigenbasis:
        a, b = (torch.randn(n, n, generator=g, dtype=torch.float64) for n in (3, 2))
        return fxcurv.Kronecker((2, 3), a @ a.T, b @ b.T).eigenbasis

    old, new = block(), block()
    mean = _average(old, new, 0.3)
    assert isinstance(mean, fxcurv.Eigenbasis)
    basis = torch.kron(new.output_vectors[0], new.input_vectors[0])
    expected = (basis.T @ (0.3 * old.dense() + 0.7 * new.dense()) @ basis).diagonal()
    close(mean.values.flatten(), expected)
    with pytest.raises(fxcurv.QuantityError, match="is a Eigenbasis, then a Dense; use one compiled quantity"):
        _average(old, old.as_dense(), 0.5)


def steps_to(
    target: float, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, most: int = 120
) -> int:
    """Steps on batches of 256 until the loss on all digits is below the target, looked at every 5."""
    g = torch.Generator().manual_seed(0)
    for step in range(most):
        if step % 5 == 0:
            with torch.no_grad():
                if F.cross_entropy(model(x), y) < target:
                    return step
        chosen = torch.randint(len(x), (256,), generator=g)
        if isinstance(optimizer, recipes.Preconditioned):
            optimizer.update_curvature(x[chosen], y[chosen], g)
        gradient_step(model, nn.CrossEntropyLoss(), x[chosen], y[chosen], optimizer)
    return most


def test_on_digits_it_takes_fewer_steps_than_gradient_descent(digits: tuple[Tensor, Tensor]) -> None:
    """Of gradient descent with momentum at its best rate; on digits as they are, and with pixels in different units."""
    x, y = (t[:1400] for t in digits)
    units = 10 ** (2 * torch.rand(64, generator=torch.Generator().manual_seed(7), dtype=torch.float64) - 1)
    taken = {}
    for data_name, inputs in (("digits", x), ("units", x * units)):
        for lr in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
            model = seeded(perceptron)
            steps = steps_to(0.05, model, torch.optim.SGD(model.parameters(), lr, momentum=0.9), inputs, y)
            taken[data_name, "sgd"] = min(steps, taken.get((data_name, "sgd"), steps))
        for quantity in ("kfac", "diag_ggn"):
            model = seeded(perceptron)
            compiled = fxcurv.compile(model, quantities=quantity)
            optimizer = recipes.Preconditioned(compiled, every=5)
            taken[data_name, quantity] = steps_to(0.05, model, optimizer, inputs, y)
    print(taken)
    assert taken["digits", "kfac"] <= 0.75 * taken["digits", "sgd"]
    assert taken["digits", "diag_ggn"] <= 1.25 * taken["digits", "sgd"]
    assert max(taken["units", "kfac"], taken["units", "diag_ggn"]) <= 0.75 * taken["units", "sgd"]


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"momentum": 1.0}, {"every": 0}, {"clip": 0}, {"decay": -0.1}, {"nesterov": True}]
)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(fxcurv.InputError, match=f"{next(iter(wrong))}=") as caught:
        recipes.Preconditioned(regression().compiled, **wrong)
    assert caught.value.code == "FXC440"


def test_a_preconditioner_moves_what_its_quantity_was_asked_of() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)))
    model[1].requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    before, x, y = values(model), regression().x, torch.arange(20) % 2
    optimizer = recipes.Preconditioned(fxcurv.compile(model, quantities={"*": None, "[01].weight": "kflr"}))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    optimizer.update_curvature(x, y)
    gradient_step(model, nn.CrossEntropyLoss(), x, y, optimizer)
    assert [name for name, w in values(model).items() if not torch.equal(w, before[name])] == ["0.weight"]


def test_a_preconditioner_needs_one_quantity_and_a_batch() -> None:
    model = regression().model
    with pytest.raises(fxcurv.InputError, match=r"is a generator, not a compiled model; give fxcurv.compile") as caught:
        recipes.Preconditioned(model.parameters())  # pyright: ignore[reportArgumentType]
    assert caught.value.code == "FXC440"
    with pytest.raises(fxcurv.QuantityError, match="compile one quantity"):
        recipes.Preconditioned(fxcurv.compile(model, "mse", ["kfac", "diag_ggn"]))
    with pytest.raises(fxcurv.FxcurvError, match=r"call update_curvature\(x, y\) first"):
        recipes.Preconditioned(fxcurv.compile(model, "mse", "kfac")).step()


def test_a_preconditioner_takes_no_second_group() -> None:
    problem = regression()
    optimizer = recipes.Preconditioned(problem.compiled)
    other = nn.Parameter(torch.zeros(2))
    with pytest.raises(
        fxcurv.InputError, match=r"only parameters of the compiled quantity have curvature; give the others to another"
    ) as caught:
        optimizer.add_param_group({"params": [other], "lr": 1.0})
    assert caught.value.code == "FXC440"
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    optimizer.update_curvature(problem.x, problem.y)
    gradient_step(problem.model, nn.MSELoss(), problem.x, problem.y, optimizer)


# Any block ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InEigenbasis(fxcurv.KFAC):
    """The same blocks as KFAC, as `Eigenbasis`."""

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> fxcurv.Block:
        block = super().finish(usage, sums, samples)
        return block.eigenbasis if isinstance(block, fxcurv.Kronecker | fxcurv.Dense) else block


@pytest.mark.parametrize("joint", [False, True])
def test_blocks_of_any_form_serve(joint: bool) -> None:
    x, y = regression().x, torch.arange(20) % 2
    ended, spreads, influences = [], [], []
    for quantity in (fxcurv.KFAC(fxcurv.Exact(), joint=joint), InEigenbasis(fxcurv.Exact(), joint=joint)):
        model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        compiled = fxcurv.compile(model, quantities=quantity)
        optimizer = recipes.Preconditioned(compiled, every=2, decay=0.0)
        for k in range(4):
            if k == 2:  # goes on from a file
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = recipes.Preconditioned(compiled)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            optimizer.update_curvature(x, y)
            gradient_step(model, nn.CrossEntropyLoss(), x, y, optimizer)
        result = compiled(x, y)
        ended.append(Space({n: p.shape for n, p in model.named_parameters()}).flat(values(model)))
        spreads.append(recipes.Laplace(compiled, result).marginals(x)[1])
        influences.append(recipes.influence(compiled, result, (x, y), (x, y), 0.1))
    for first, second in (ended, spreads, influences):
        close(second, first)


# Laplace ----------------------------------------------------------------------------------------------------------


def ridge(problem: Regression, tau: float, noise: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the posterior of [W | b], flat."""
    X, outputs = ones_added(problem.x), problem.y.shape[1]
    precision = X.T @ X / noise + tau * torch.eye(4, dtype=torch.float64)
    mean = torch.linalg.solve(precision, X.T @ problem.y / noise)
    return mean.T.flatten(), torch.kron(
        torch.eye(outputs, dtype=torch.float64), torch.linalg.inv(precision).contiguous()
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_posterior_of_a_linear_model_is_exact(reduction: str) -> None:
    problem, tau, noise = regression(), 0.7, 0.2
    mean, covariance = ridge(problem, tau, noise)
    weight, bias = mean.view(2, 4).split([3, 1], 1)
    problem.model.load_state_dict({"weight": weight, "bias": bias.flatten()})
    compiled = fxcurv.compile(problem.model, nn.MSELoss(reduction=reduction), EXACT)
    result = compiled(problem.x, problem.y)
    laplace = recipes.Laplace(compiled, result, tau, noise)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    f, standard_error = laplace.marginals(x)
    J = torch.stack([torch.kron(torch.eye(2, dtype=torch.float64), row) for row in ones_added(x)])
    close(f, (J @ mean))
    close(standard_error, J @ covariance @ J.mT)
    close(laplace.predict(x), f)
    X = torch.kron(torch.eye(2, dtype=torch.float64), ones_added(problem.x))
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(40, dtype=torch.float64), X @ X.T / tau + noise * torch.eye(40, dtype=torch.float64)
    )
    expected = evidence.log_prob(problem.y.T.flatten()).item()
    assert laplace.log_marginal_likelihood() == pytest.approx(expected, rel=1e-9)
    merged = fxcurv.merge(*(compiled(problem.x[at], problem.y[at]) for at in (slice(0, 7), slice(7, 20))))
    close(recipes.Laplace(compiled, merged, tau, noise).marginals(x)[1], standard_error)


def test_draws_of_weights_have_the_covariance_of_the_posterior() -> None:
    problem = regression()
    laplace = recipes.Laplace(problem.compiled, problem.compiled(problem.x, problem.y), 0.7, 0.2)
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([joined(laplace.sample(g)) for _ in range(4000)])
    close(draws.mean(0), joined(laplace.mean), 0.02)
    close(draws.T.cov(), ridge(problem, 0.7, 0.2)[1], 0.01)


def test_tuning_finds_the_maximum_of_the_evidence(digits: tuple[Tensor, Tensor], trained: nn.Module) -> None:
    x, y = (t[:1400] for t in digits)
    compiled = fxcurv.compile(trained, quantities="kfac")
    result = compiled(x, y, torch.Generator().manual_seed(0))
    tuned = recipes.Laplace(compiled, result, 3.0).tuned()
    best = tuned.log_marginal_likelihood()
    for factor in (0.01, 0.3, 0.99, 1.01, 3.0, 100.0):
        other = recipes.Laplace(compiled, result, tuned.prior_precision * factor)
        assert other.log_marginal_likelihood() < best
    assert 0 < tuned.effective_parameters() < sum(p.numel() for p in trained.parameters())


def calibration(p: Tensor, y: Tensor) -> tuple[float, float]:
    """Negative log likelihood, and the expected calibration error of 10 equal bins."""
    confidence, found = p.max(1)
    right = (found == y).double()
    bins = (confidence * 10).long().clamp(max=9)
    gaps = [(right - confidence)[bins == k].sum().abs() for k in range(10)]
    return F.nll_loss(p.log(), y).item(), (torch.stack(gaps).sum() / len(y)).item()


CHOICES: dict[str, Any] = {
    "kfac": "kfac",
    "diagonal": "diag_ggn",
    "last layer": {"*": None, "2.*": fxcurv.KFAC(fxcurv.Exact(), joint=True)},
}


@pytest.fixture(scope="module")
def too_sure(digits: tuple[Tensor, Tensor]) -> tuple[nn.Module, Tensor]:
    """A network that has learnt 1000 digits by heart, of which a fifth have random labels; the labels of all."""
    x, y = digits
    g = torch.Generator().manual_seed(5)
    noisy = torch.where(torch.rand(len(y), generator=g) < 0.2, torch.randint(10, (len(y),), generator=g), y)
    return train(seeded(perceptron), x[:1000], noisy[:1000], 1500, lr=1e-2), noisy


@pytest.mark.parametrize("name", CHOICES)
def test_on_digits_it_is_better_calibrated_than_the_network(
    name: str, digits: tuple[Tensor, Tensor], too_sure: tuple[nn.Module, Tensor]
) -> None:
    """597 other digits, as noisy; the prior precision is that of the highest marginal likelihood."""
    (x, _), (model, y) = digits, too_sure
    compiled = fxcurv.compile(model, quantities=CHOICES[name])
    laplace = recipes.Laplace(compiled, compiled(x[:1000], y[:1000], torch.Generator().manual_seed(0))).tuned()
    test, labels = x[1200:], y[1200:]
    with torch.no_grad():
        plain = calibration(model(test).softmax(1), labels)
    probit = laplace.predict(test)
    drawn = laplace.predict(test, "outputs", 100, torch.Generator().manual_seed(0))
    print(name, laplace.prior_precision, plain, calibration(probit, labels), calibration(drawn, labels))
    close(probit.sum(1), torch.ones(len(test), dtype=torch.float64))
    for p, gained in ((probit, 0.3), (drawn, 0.1)):
        nll, ece = calibration(p, labels)
        assert nll < plain[0] - gained
        assert ece < 0.8 * plain[1]


def test_drawn_weights_and_outputs_agree_where_the_model_is_linear() -> None:
    x, y = regression().x, torch.arange(20) % 3
    compiled = fxcurv.compile(seeded(lambda: nn.Linear(3, 3)), quantities=EXACT)
    laplace = recipes.Laplace(compiled, compiled(x, y), 1.0)
    drawn = [laplace.predict(x, m, 4000, torch.Generator().manual_seed(0)) for m in ("outputs", "weights")]
    close(drawn[0], drawn[1], 0.01)
    binary = fxcurv.compile(seeded(lambda: nn.Linear(3, 1)), nn.BCEWithLogitsLoss(), EXACT)
    p = recipes.Laplace(binary, binary(x, (y == 0).double().unsqueeze(1)), 1.0).predict(x)
    assert p.shape == (20, 1)
    assert ((p > 0) & (p < 1)).all()


def test_wrong_posteriors() -> None:
    problem = regression()
    compiled, both = problem.compiled, fxcurv.compile(problem.model, "mse", ["kfac", "diag_ggn"])
    pixels = fxcurv.compile(seeded(lambda: nn.Conv1d(1, 2, 1)).float())
    result = compiled(problem.x, problem.y)
    for make in (
        lambda: recipes.Laplace(compiled, result, 0.0),
        lambda: recipes.Laplace(compiled, result, 1.0, math.nan),
        lambda: recipes.Laplace(both, both(problem.x, problem.y)),
        lambda: recipes.Laplace(pixels, pixels(torch.ones(2, 1, 3), torch.zeros(2, 3, dtype=torch.long))),
        lambda: recipes.Laplace(compiled, result).predict(problem.x, "best"),  # pyright: ignore[reportArgumentType]
        lambda: recipes.influence(both, both(problem.x, problem.y), (problem.x, problem.y), (problem.x, problem.y), 1),
    ):
        with pytest.raises(fxcurv.InputError) as caught:
            make()
        assert caught.value.code == "FXC440"


# Penalty ----------------------------------------------------------------------------------------------------------


def test_the_penalty_is_the_quadratic_and_has_its_gradient() -> None:
    problem = regression()
    operator = problem.compiled(problem.x, problem.y).operator("kfac")
    penalty = recipes.Penalty(problem.model, operator, 3.0)
    assert penalty(problem.model) == 0
    before = joined(values(problem.model))
    with torch.no_grad():
        problem.model.weight.mul_(2)  # pyright: ignore[reportCallIssue]
        problem.model.bias.add_(1)  # pyright: ignore[reportCallIssue]
    moved, B = joined(values(problem.model)) - before, operator.parts[0].block.dense()
    value = penalty(problem.model)
    value.backward()
    close(value.detach(), 1.5 * moved @ B @ moved)
    found = {name: p.grad for name, p in problem.model.named_parameters() if p.grad is not None}
    close(joined(found), 3 * B @ moved)


@pytest.mark.parametrize("quantity", ["diag_ggn", "kfac"])
def test_on_digits_less_is_forgotten(quantity: str, digits: tuple[Tensor, Tensor]) -> None:
    """The digits, then the same with their pixels permuted."""
    x, y = (t[:1400] for t in digits)
    test, labels = (t[1400:] for t in digits)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    first = train(seeded(lambda: perceptron(64)), x, y, 500)
    operator = fxcurv.compile(first, quantities=quantity)(x, y, torch.Generator().manual_seed(0)).operator(quantity)
    saved = {}
    for strength in (0.0, 300.0):
        model = copy.deepcopy(first)
        train(model, x[:, order], y, 500, recipes.Penalty(first, operator, strength))
        saved[strength] = accuracy(model, test, labels), accuracy(model, test[:, order], labels)
    print(quantity, accuracy(first, test, labels), saved)
    assert saved[300.0][0] > saved[0.0][0] + 0.1
    assert sum(saved[300.0]) > sum(saved[0.0])


def test_a_penalty_is_of_one_operator() -> None:
    problem = regression()
    result = problem.compiled(problem.x, problem.y)
    with pytest.raises(
        fxcurv.InputError, match=r"is a Curvature, not an operator; .* result.operator\('kfac'\)"
    ) as caught:
        recipes.Penalty(problem.model, result)  # pyright: ignore[reportArgumentType]
    assert caught.value.code == "FXC440"


# Pruning ----------------------------------------------------------------------------------------------------------


def test_masks_remove_the_lowest_scores_of_all_tensors_together() -> None:
    scores = {"a": torch.tensor([[0.1, 5.0], [3.0, 0.2]]), "b": torch.tensor([0.3, 4.0])}
    half = recipes.masks(scores, 0.5)
    assert half["a"].tolist() == [[False, True], [True, False]]
    assert half["b"].tolist() == [False, True]
    assert all(mask.all() for mask in recipes.masks(scores, 0.0).values())
    assert not any(mask.any() for mask in recipes.masks(scores, 1.0).values())


def test_saliency_is_the_rise_of_a_quadratic_and_the_others_make_up_for_it() -> None:
    problem = regression()
    optimizer = newton(problem.compiled)
    optimizer.update_curvature(problem.x, problem.y)
    gradient_step(problem.model, nn.MSELoss(), problem.x, problem.y, optimizer)  # at the optimum
    operator = problem.compiled(problem.x, problem.y).operator("kfac")
    weights = values(problem.model)

    def loss(w: Mapping[str, Tensor]) -> Tensor:
        return F.mse_loss(functional_call(problem.model, dict(w), (problem.x,)), problem.y)

    scores = recipes.saliencies(operator, weights)
    without = {**weights, "weight": weights["weight"].clone()}
    without["weight"][1, 2] = 0
    close(loss(without) - loss(weights), scores["weight"][1, 2])
    saved = recipes.masks({"weight": scores["weight"]}, 1 / 3)
    assert (~saved["weight"]).sum() == 2
    found = recipes.compensated(operator, weights, saved, 0.0)
    assert (found["weight"][~saved["weight"]] == 0).all()
    for o in range(2):  # least squares over what is left, output by output
        left = torch.cat([saved["weight"][o], torch.tensor([True])])
        best = torch.linalg.lstsq(ones_added(problem.x)[:, left], problem.y[:, o]).solution
        close(torch.cat([found["weight"][o], found["bias"][o : o + 1]])[left], best)
    with pytest.raises(fxcurv.InputError, match="give a share from 0 to 1"):
        recipes.masks(scores, 1.5)


def test_on_digits_pruning_by_saliency_keeps_more_accuracy(digits: tuple[Tensor, Tensor]) -> None:
    """Pixels are 0 … 1, some of them 0 in every digit: their weights are large as they were drawn, and useless."""
    pixels, y = digits[0] * 0.3760 + 0.3053, digits[1]
    model = train(seeded(perceptron), pixels[:1400], y[:1400], 1000)
    every = values(model)
    weights, g = {name: w for name, w in every.items() if w.ndim > 1}, torch.Generator().manual_seed(0)
    result = fxcurv.compile(model, quantities=["diag_ggn", "kflr"])(pixels[:1400], y[:1400])
    scores = {
        "saliency": recipes.saliencies(result.operator("diag_ggn"), weights),
        "magnitude": {name: w.abs() for name, w in weights.items()},
        "random": {name: torch.rand(w.shape, generator=g) for name, w in weights.items()},
    }
    right: dict[str, list[float]] = {}
    for sparsity in (0.5, 0.6, 0.7):
        masks = {method: recipes.masks(score, sparsity) for method, score in scores.items()}
        pruned = {m: {name: w * masks[m][name] for name, w in weights.items()} for m in masks}
        pruned["surgeon"] = recipes.compensated(result.operator("kflr"), every, masks["saliency"], 1e-3)
        for method, replaced in pruned.items():
            right.setdefault(method, []).append(accuracy(model, pixels[1400:], y[1400:], replaced))
    print(accuracy(model, pixels[1400:], y[1400:]), right)
    for k in (0, 1):
        assert right["saliency"][k] > right["magnitude"][k] + 0.02
    assert right["surgeon"][2] > max(right["saliency"][2], right["magnitude"][2]) + 0.03
    assert min(right["magnitude"]) > max(right["random"])


# Averaging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["diag_ggn", "kflr", EXACT], ids=["diagonal", "kronecker", "joint"])
def test_the_average_is_the_minimum_of_the_sum_of_quadratics(quantity: Any) -> None:
    problems = [regression(), regression(11)]
    compiled = [fxcurv.compile(p.model, nn.MSELoss(), quantity) for p in problems]
    operators = [
        next(iter([r.operator(q) for q in r])) for r in (c(p.x, p.y) for c, p in zip(compiled, problems, strict=True))
    ]
    flat = [torch.randn(8, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (3, 4)]
    weights = [operators[0].domain.split(w) for w in flat]
    matrices = [B.dense() + 0.01 * torch.eye(8, dtype=torch.float64) for B in operators]
    expected = torch.linalg.solve(matrices[0] + matrices[1], sum(M @ w for M, w in zip(matrices, flat, strict=True)))
    found = recipes.weighted_average(weights, operators, 0.01)
    close(operators[0].domain.flat(found), expected, 1e-8)
    whole = [fxcurv.ggn_operator(p.model, "mse", [(p.x, p.y)]) for p in problems]
    matrices = [B.dense() + 0.01 * torch.eye(8, dtype=torch.float64) for B in whole]
    expected = torch.linalg.solve(matrices[0] + matrices[1], sum(M @ w for M, w in zip(matrices, flat, strict=True)))
    close(operators[0].domain.flat(recipes.weighted_average(weights, whole, 0.01)), expected, 1e-8)
    same = recipes.weighted_average([weights[0]] * 2, operators)
    close(operators[0].domain.flat(same), flat[0], 1e-8)
    with pytest.raises(fxcurv.InputError, match="give one for each"):
        recipes.weighted_average(weights, operators[:1])


def test_two_regressions_become_that_of_all_the_data() -> None:
    """Where the losses are quadratic and the curvature is their Hessian, nothing is lost by averaging."""
    whole = regression()
    fitted, operators = [], []
    for at in (slice(0, 8), slice(8, 20)):
        model = copy.deepcopy(whole.model)
        compiled = fxcurv.compile(model, nn.MSELoss(reduction="sum"), EXACT)
        optimizer = newton(compiled)
        optimizer.update_curvature(whole.x[at], whole.y[at])
        gradient_step(model, nn.MSELoss(reduction="sum"), whole.x[at], whole.y[at], optimizer)
        fitted.append(values(model))
        operators.append(compiled(whole.x[at], whole.y[at]).operator("kfac"))
    found = recipes.weighted_average(fitted, operators, 0.0)
    best = torch.linalg.lstsq(ones_added(whole.x), whole.y).solution
    close(joined(found), best.T.flatten(), 1e-7)


def turned(x: Tensor) -> Tensor:
    """Digits by a quarter turn."""
    return x.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)


def test_on_digits_it_is_better_than_the_plain_average(digits: tuple[Tensor, Tensor]) -> None:
    """One network goes on with digits, another with digits turned; their average is tested on both."""
    x, y = (t[:1400] for t in digits)
    test, labels = (t[1400:] for t in digits)
    start = train(seeded(lambda: perceptron(64)), x, y, 200)
    weights, operators = [], {"diag_ggn": [], "kflr": []}
    for inputs in (x, turned(x)):
        model = train(copy.deepcopy(start), inputs, y, 100)
        result = fxcurv.compile(model, quantities=list(operators))(inputs, y)
        for quantity, found in operators.items():
            found.append(result.operator(quantity))
        weights.append(values(model))
    averages = {quantity: recipes.weighted_average(weights, found, 1e-4) for quantity, found in operators.items()}
    averages["plain"] = {name: (w + weights[1][name]) / 2 for name, w in weights[0].items()}
    right = {
        name: (accuracy(start, test, labels, w) + accuracy(start, turned(test), labels, w)) / 2
        for name, w in averages.items()
    }
    print(right)
    assert right["diag_ggn"] > right["plain"] + 0.05
    assert right["kflr"] > right["diag_ggn"] + 0.05


# Influence --------------------------------------------------------------------------------------------------------


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def ranks(t: Tensor) -> Tensor:
    return t.flatten().argsort().argsort().double()


def test_influence_on_a_quadratic_is_exact_and_near_to_leaving_out() -> None:
    problem, damping = regression(60), 0.05
    mean = ridge(problem, damping * 60, 1.0)[0]  # the mean over 120 entries plus ½ δ‖θ‖², times 60
    weight, bias = mean.view(2, 4).split([3, 1], 1)
    problem.model.load_state_dict({"weight": weight, "bias": bias.flatten()})
    result = problem.compiled(problem.x, problem.y)
    both = problem.x, problem.y
    found = recipes.influence(problem.compiled, result, both, both, damping)
    loss = hessian(lambda w: F.mse_loss(ones_added(problem.x) @ w.view(2, 4).T, problem.y))
    H = loss(mean)
    J = torch.stack([torch.kron(torch.eye(2, dtype=torch.float64), row) for row in ones_added(problem.x)])
    g = torch.einsum("ncp,nc->np", J, 2 * (torch.einsum("ncp,p->nc", J, mean) - problem.y))
    H = H + damping * torch.eye(8, dtype=torch.float64)
    close(found, g @ torch.linalg.solve(H, g.T) / 120)
    actual = []
    for k in range(60):
        left = torch.arange(60) != k
        X = ones_added(problem.x[left])
        solved = torch.linalg.solve(X.T @ X + 60 * damping * torch.eye(4, dtype=torch.float64), X.T @ problem.y[left])
        change = (ones_added(problem.x) @ solved - problem.y).square().sum(1)
        actual.append(change - (ones_added(problem.x) @ mean.view(2, 4).T - problem.y).square().sum(1))
    assert correlation(found, torch.stack(actual, 1)) > 0.95


def fit(model: nn.Module, x: Tensor, y: Tensor, decay: float, total: int) -> nn.Module:
    """The minimum of the summed cross entropy / total + ½ decay ‖θ‖², which is convex for a linear model."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        norm = sum(p.square().sum() for p in model.parameters())
        value = F.cross_entropy(model(x), y, reduction="sum") / total + decay / 2 * norm
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    optimizer.zero_grad()
    return model


def test_influence_on_digits_tells_what_leaving_out_does(digits: tuple[Tensor, Tensor]) -> None:
    """Softmax regression on 200 digits; 25 of them are left out one by one, and the loss of 50 others is looked at."""
    x, y, decay = digits[0][:200], digits[1][:200], 5e-2
    test, labels = (t[1000:1050] for t in digits)
    model = fit(seeded(lambda: nn.Linear(64, 10)), x, y, decay, 200)
    compiled = fxcurv.compile(model, quantities=EXACT)
    found = recipes.influence(compiled, compiled(x, y), (x[:25], y[:25]), (test, labels), decay)
    removed, asked = (gradients(compiled, values(model), *data) for data in ((x[:25], y[:25]), (test, labels)))
    dense = asked @ torch.linalg.solve(ggn(compiled, model, x, decay), removed.T) / 200
    with torch.no_grad():
        before = F.cross_entropy(model(test), labels, reduction="none")
    rises = []
    for k in range(25):
        left = torch.arange(200) != k
        other = fit(copy.deepcopy(model), x[left], y[left], decay, 200)
        with torch.no_grad():
            rises.append(F.cross_entropy(other(test), labels, reduction="none") - before)
    actual = torch.stack(rises, 1)
    told = {
        name: (correlation(f, actual), correlation(ranks(f.sum(0)), ranks(actual.sum(0))))
        for name, f in (("kfac", found), ("dense", dense))
    }
    print(told)
    assert min(told["dense"]) > 0.95
    assert min(told["kfac"]) > 0.8


def ggn(compiled: fxcurv.Compiled, model: nn.Module, x: Tensor, damping: float) -> Tensor:
    """The whole damped GGN of the mean cross entropy, `[P, P]`."""
    f, J = jacobians(jacobian_of(compiled, values(model)), values(model), x)
    p = f.softmax(1)
    H = torch.einsum("ncp,ncd,ndq->pq", J, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], J) / len(x)
    return H + damping * torch.eye(len(H), dtype=torch.float64)


def test_influence_through_blocks_is_near_that_of_the_dense_ggn(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits[0][:100, 20:28], digits[1][:100] % 3
    model = train(seeded(lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))), x, y, 300)
    compiled = fxcurv.compile(model, quantities=EXACT)
    f, J = jacobians(jacobian_of(compiled, values(model)), values(model), x)
    p = f.softmax(1)
    g = gradients(compiled, values(model), x, y)
    close(g, torch.einsum("ncp,nc->np", J, p - F.one_hot(y, 3)))
    near = g[50:] @ torch.linalg.solve(ggn(compiled, model, x, 0.1), g[:50].T) / 100
    found = {}
    for name, quantity in {"kfac": EXACT, "diag_ggn": fxcurv.DiagGGN()}.items():
        compiled = fxcurv.compile(model, quantities=quantity)
        found[name] = recipes.influence(compiled, compiled(x, y), (x[:50], y[:50]), (x[50:], y[50:]), 0.1)
    correlations = {name: correlation(value, near) for name, value in found.items()}
    print(correlations)
    assert correlations["kfac"] > 0.9
    assert correlations["kfac"] > correlations["diag_ggn"]


# Any model that compiles --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention over the tokens that a mask keeps, their mean, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(3, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, :])
        saved = mask.unsqueeze(-1).to(seen)
        return self.head((seen * saved).sum(1) / saved.sum(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Filled(nn.Module):
    """The forward fills a copy of a buffer; nothing reads `spare`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.spare = nn.Linear(3, 4), nn.Linear(6, 3), nn.Linear(2, 2)
        self.register_buffer("canvas", torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        canvas = self.get_buffer("canvas").clone().repeat(x.shape[0], 1)
        canvas[:, 1:5] = self.first(x[:, 0]).tanh()
        return self.head(canvas)


def batch_for(model: nn.Module, samples: int, seed: int) -> tuple[Any, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, 3, generator=g, dtype=torch.float64)
    y = torch.randint(3, (samples,), generator=g)
    mask = torch.arange(5) <= torch.randint(5, (samples, 1), generator=g)
    return ({"x": x, "mask": mask} if isinstance(model, Attention) else x), y


def by_autograd(model: nn.Module, inputs: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, their Jacobians and the gradients of the loss, by plain autograd of one sample after the other."""
    every, found = list(model.parameters()), []

    def flat(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, every, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    for n in range(len(y)):
        at = slice(n, n + 1)
        f = model(**{k: t[at] for k, t in inputs.items()}) if isinstance(inputs, dict) else model(inputs[at])
        J = torch.stack([flat(entry) for entry in f[0]])
        found.append((f[0].detach(), J, flat(F.cross_entropy(f, y[at]))))
    f, J, g = (torch.stack(column) for column in zip(*found, strict=True))
    return f, J, g


@pytest.mark.parametrize("make", [Attention, Recurrent, Filled])
def test_influence_and_predictions_of_any_model_that_compiles(make: Callable[[], nn.Module]) -> None:
    model = seeded(make)
    train, test = batch_for(model, 6, 1), batch_for(model, 4, 2)
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    result, before = compiled(*train), torch.get_rng_state()
    B = torch.diag(result.operator("diag_ggn").dense().diagonal())
    damped = torch.eye(len(B), dtype=torch.float64) * 0.1
    f, J, g = by_autograd(model, *test)
    expected = g @ torch.linalg.solve(B + damped, by_autograd(model, *train)[2].T) / 6
    close(recipes.influence(compiled, result, train, test, 0.1), expected)
    laplace = recipes.Laplace(compiled, result, 0.6)
    standard_error = J @ torch.linalg.solve(6 * B + 6 * damped, J.mT)
    mean, covariance = laplace.marginals(test[0])
    close(mean, f)
    close(covariance, standard_error)
    probit = (f / (1 + math.pi / 8 * standard_error.diagonal(dim1=1, dim2=2)).sqrt()).softmax(1)
    close(laplace.predict(test[0]), probit)
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():  # the posterior stays where it was when the model trains on
        for p in model.parameters():
            p.mul_(1.1)
    moved = values(model)
    close(laplace.predict(test[0]), probit)
    assert all(torch.equal(p, moved[name]) for name, p in model.named_parameters())


def test_recipes_serve_what_plain_autograd_takes_over() -> None:
    """The compiler refuses control flow on values."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 1e9 else self.layer(2 * x)

    model, (x, y) = seeded(Branching), batch_for(nn.Identity(), 5, 1)
    compiled = fxcurv.compile(model, quantities="diag_ggn", on_unsupported="fallback")
    result = compiled(x[:, 0], y)
    _, J, g = by_autograd(model, x[:, 0], y)
    covariance = recipes.Laplace(compiled, result).marginals(x[:, 0])[1]
    B = torch.diag(result.operator("diag_ggn").dense().diagonal())
    close(covariance, J @ torch.linalg.solve(5 * B + torch.eye(12, dtype=torch.float64), J.mT))
    both = x[:, 0], y
    found = recipes.influence(compiled, result, both, both, 0.1)
    close(found, g @ torch.linalg.solve(B + 0.1 * torch.eye(12, dtype=torch.float64), g.T) / 5)


def test_gradients_are_of_outputs_without_an_axis_of_their_own_and_of_targets_that_do_not_count() -> None:
    """`[N]` under BCE; cross entropy where a batch holds an ignored target."""
    flat = seeded(lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)))
    x, y = regression().x, torch.arange(20) % 3
    compiled = fxcurv.compile(flat, nn.BCEWithLogitsLoss())
    g = gradients(compiled, values(flat), x, (y == 0).double())
    close(g, (flat(x).sigmoid() - (y == 0).double()).detach().unsqueeze(1) * ones_added(x))
    model = seeded(lambda: nn.Linear(3, 3))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(ignore_index=0))
    g = gradients(compiled, values(model), x[:2], y[:2])
    assert not g[0].any()
    close(g[1], by_autograd(model, x[1:2], y[1:2])[2][0])


# The solver -------------------------------------------------------------------------------------------------------


def test_conjugate_gradients_solve_and_stop() -> None:
    root = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, b = root @ root.T, root[:, 0]
    x = conjugate_gradients(matrix.mv, b, torch.zeros(6, dtype=torch.float64))
    close(matrix @ x, b)
    close(matrix @ conjugate_gradients(matrix.mv, b, torch.zeros_like(b), steps=4), b)  # as many as the rank
    assert torch.equal(conjugate_gradients(matrix.mv, matrix @ x, x), x)
    assert not conjugate_gradients(matrix.mv, torch.zeros_like(b), torch.zeros_like(b)).any()
    assert torch.equal(conjugate_gradients(torch.zeros_like, b, b), b)
