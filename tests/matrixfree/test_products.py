"""Products and estimates: equal to the matrices of the oracle, and to curvlinops' operators, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from curvatures import WEIGHT, labels, reals, tokens
from peers import peer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxcurv
from fxcurv.linalg.operator import Space

CASES: dict[str, tuple[bool, nn.Module, Tensor]] = {
    "cross_entropy": (False, nn.CrossEntropyLoss(), labels(5)),
    "weighted": (True, nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), labels(5, 4, ignored=True)),
    "summed": (True, nn.CrossEntropyLoss(WEIGHT, reduction="sum"), labels(5, 4)),
    "mse": (False, nn.MSELoss(), reals(5, 3)),
    "bce": (False, nn.BCEWithLogitsLoss(pos_weight=WEIGHT), reals(5, 3)),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
Make = Callable[..., fxcurv.LinearOperator]


class Narrow(nn.Module):
    """Few parameters, in every kind of place: tied, frozen, unused, in attention, written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mid, self.head = nn.Conv1d(3, 4, 2, groups=1), nn.Linear(4, 4), nn.Linear(4, 3)
        self.frozen, self.unused = nn.Linear(4, 4).requires_grad_(False), nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(4)
        self.dense = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x).tanh()).mT
        h = self.frozen(self.mid(self.mid(h).add_(0.5).sigmoid_()))
        h = nn.functional.scaled_dot_product_attention(h, h, self.mid(h))
        y = self.head(h)
        return y.mT if self.dense else y.mean(1)


def model_of(dense: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Narrow().double().eval()
    model.dense = dense
    return model


X = reals(5, 3, 5) - 0.5


def matrices(model: nn.Module, loss: nn.Module, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GGN, empirical Fisher, Hessian and Jacobian over the trainable parameters."""
    J = torch.cat([t.flatten(2) for t in reference.jacobians(model, X).values()], 2)  # [n, c, P]
    S = reference.empirical_columns(loss, reference.outputs(model, X), y)[0].flatten(1)
    per_sample = torch.einsum("nc,ncp->np", S, J)
    names = reference.trainable(model)
    shared = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [shared[name].numel() for name in names]

    def value(flat: Tensor) -> Tensor:
        parts = {n: t.view_as(shared[n]) for n, t in zip(names, flat.split(sizes), strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return loss(torch.func.functional_call(copy.deepcopy(model), {**shared, **parts}, (X,)), y)

    flat = torch.cat([shared[name].flatten() for name in names])
    H = torch.autograd.functional.hessian(value, flat)
    assert isinstance(H, Tensor)
    return reference.ggn_matrix(model, loss, X, y), per_sample.T @ per_sample, H, J.flatten(0, 1)


def close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11 * scale)


def batches(y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(X[:2], y[:2]), (X[2:], y[2:])]


@each
@pytest.mark.parametrize("cut", [False, True])
def test_products_equal_the_oracle(case: tuple[bool, nn.Module, Tensor], cut: bool) -> None:
    dense, loss, y = case
    model = model_of(dense)
    ggn, fisher, H, J = matrices(model, loss, y)
    data = batches(y) if cut else (X, y)
    close(fxcurv.ggn_operator(model, loss, data).dense(), ggn)
    close(fxcurv.hessian_operator(model, loss, data).dense(), H)
    close(fxcurv.jacobian_operator(model, data).dense(), J)
    close(fxcurv.jacobian_operator(model, data).T.dense(), J.T)
    close(fxcurv.fisher_operator(model, loss, data).dense(), fisher)
    close(fxcurv.fisher_operator(model, loss, data, fxcurv.Exact()).dense(), ggn)


def test_a_sampled_fisher_is_that_of_its_columns_each_time() -> None:
    model, (_, loss, y) = model_of(True), CASES["weighted"]
    make: Callable[[int], Tensor] = lambda seed: fxcurv.fisher_operator(  # noqa: E731
        model, loss, (X, y), fxcurv.Sampled(3), generator=torch.Generator().manual_seed(seed)
    ).dense()
    kfac = fxcurv.compile(model, loss, fxcurv.DiagGGN(fxcurv.Sampled(3)))
    diagonal = kfac(X, y, generator=torch.Generator().manual_seed(4))["diag_ggn"]
    first = make(4)
    assert torch.equal(first, make(4))
    assert not torch.equal(first, make(5))
    names = reference.trainable(model)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    close(first.diag(), torch.cat([(diagonal[n] if n in diagonal else zeros[n]).flatten() for n in names]))
    operator = fxcurv.fisher_operator(model, loss, (X, y), fxcurv.Sampled(2))
    assert torch.equal(operator.dense(), operator.dense())


def test_vectors_sums_and_adjoints() -> None:
    model, (_, loss, y) = model_of(False), CASES["mse"]
    ggn, _, H, J = matrices(model, loss, y)
    operator = fxcurv.ggn_operator(model, loss, (X, y))
    jacobian = fxcurv.jacobian_operator(model, [(X[:2], None), (X[2:], None)])
    v = {name: torch.full_like(p, 0.3) for name, p in model.named_parameters() if p.requires_grad}
    flat = torch.cat([t.flatten() for t in v.values()])
    product = operator @ v
    assert {name: t.shape for name, t in product.items()} == {name: t.shape for name, t in v.items()}
    close(torch.cat([t.flatten() for t in product.values()]), ggn @ flat)
    assert not product["unused.weight"].any()
    combined = 2 * operator + -0.5 * fxcurv.hessian_operator(model, loss, (X, y))
    close(combined @ flat, (2 * ggn - 0.5 * H) @ flat)
    close((combined.T @ flat.unsqueeze(1))[:, 0], combined @ flat)
    pushed = jacobian @ v
    assert pushed["output"].shape == (5, 3)
    close(pushed["output"].flatten(), J @ flat)
    close(jacobian.T @ (jacobian @ flat), J.T @ (J @ flat))
    close((3 * jacobian + jacobian).T.dense(), 4 * J.T)
    assert jacobian.T.T is jacobian
    lengths = fxcurv.jacobian_operator(tokens(True), [(X, None), (X[..., :4], None)])
    assert lengths.codomain.shapes == {"output": (5 * 3 * 4 + 5 * 3 * 3,)}


def test_a_loader_that_shuffles_gives_the_same_each_time() -> None:
    model, (_, loss, y) = model_of(False), CASES["cross_entropy"]
    loader = DataLoader(TensorDataset(X, y), batch_size=2, shuffle=True)
    state = torch.get_rng_state()
    operator = fxcurv.ggn_operator(model, loss, loader)
    first = operator.dense()
    assert torch.equal(operator.dense(), first)
    close(first, matrices(model, loss, y)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_data_that_change_are_named() -> None:
    class Changing:
        """What it yields changes from pass to pass, though not by torch's global generator."""

        def __init__(self, *passes: list[tuple[Tensor, Tensor]]) -> None:
            self.passes = [passes[0], *passes]  # the first is for the model's own check

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(self.passes.pop(0) if len(self.passes) > 1 else self.passes[0])

    model, y = model_of(False), labels(5)
    batches = list(zip(X.split(2), y.split(2), strict=True))
    other = [batches[0], (batches[1][0] + 1e-6, batches[1][1]), batches[2]]
    for second, cause in (
        (batches[::-1], "the order of the data changes when they are read again"),
        (batches[:2], "the data are 3 batches, but 2 when they are read again"),
        (other, "batch 2 of the data changes when they are read again"),
    ):
        for make in (fxcurv.ggn_operator, fxcurv.fisher_operator, fxcurv.hessian_operator):
            with pytest.raises(fxcurv.InputError, match=cause) as caught:
                make(model, "cross_entropy", Changing(batches, second), check_deterministic=True)
            assert caught.value.code == "FXC431"
        with pytest.raises(fxcurv.InputError, match=cause):
            fxcurv.jacobian_operator(model, Changing(batches, second), check_deterministic=True)
    shuffled = DataLoader(TensorDataset(X, y), batch_size=2, shuffle=True)
    found = fxcurv.ggn_operator(model, "cross_entropy", shuffled, check_deterministic=True)
    close(found.dense(), fxcurv.ggn_operator(model, "cross_entropy", (X, y)).dense())


def test_the_model_is_left_alone() -> None:
    model, (_, loss, y) = model_of(False), CASES["cross_entropy"]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, x = copy.deepcopy(model.state_dict()), X.clone()
    for make in (fxcurv.ggn_operator, fxcurv.hessian_operator, fxcurv.fisher_operator):
        with torch.no_grad():
            make(model, loss, (x, y)).dense()
    fxcurv.jacobian_operator(model, (x, y)).T.dense()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(x, X)
    assert not any(m.training for m in model.modules())


def test_parameters_are_read_when_a_product_is_taken() -> None:
    model, (_, loss, y) = model_of(False), CASES["cross_entropy"]
    operator = fxcurv.ggn_operator(model, loss, (X, y))
    before = operator.dense()
    with torch.no_grad():
        model.head.weight.mul_(2)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert not torch.allclose(operator.dense(), before)


def test_narrow_types_are_summed_in_float32() -> None:
    model, (_, loss, y) = tokens(False).bfloat16(), CASES["cross_entropy"]
    operator = fxcurv.ggn_operator(model, loss, (X.bfloat16(), y))
    exact = fxcurv.ggn_operator(tokens(False), loss, (X, y))
    assert operator.dtype == torch.float32
    v = torch.ones(operator.shape[0])
    assert float((operator @ v - (exact @ v.double()).float()).norm()) < 0.05 * float((exact @ v.double()).norm())


class Once(torch.autograd.Function):
    """The sine, of which only the first derivative is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardsigmoid_backward(grads[0], x)


class Gate(nn.Module):
    """A linear layer, and a function of what it returns."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.fc, self.function = nn.Linear(3, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc(x.mean(2)) * 1)


def test_ops_that_torch_differentiates_once() -> None:
    y = labels(5)
    for function in (nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True), nn.functional.hardsigmoid):
        model = Gate(function).double().eval()
        ggn = fxcurv.ggn_operator(model, "cross_entropy", (X, y))
        expected = reference.ggn_matrix(model, nn.CrossEntropyLoss(), X, y)
        torch.testing.assert_close(ggn.dense(), expected, rtol=1e-6, atol=1e-9)  # torch's own slope, 1/6, is a float32
    with pytest.raises(
        fxcurv.UnsupportedError, match=r"autograd.Function Once at .* aten::hardsigmoid_backward is not implemented"
    ):
        _ = fxcurv.ggn_operator(Gate(Once.apply).double().eval(), "cross_entropy", (X, y)).dense()


def test_what_has_no_product_is_refused() -> None:
    model, (_, loss, y) = model_of(False), CASES["cross_entropy"]
    with pytest.raises(fxcurv.InputError, match="updates its buffer norm"):
        fxcurv.ggn_operator(copy.deepcopy(model).train(), loss, (X, y))
    with pytest.raises(fxcurv.InputError, match="read only once; give a list or a DataLoader"):
        fxcurv.ggn_operator(model, loss, iter(batches(y)))
    with pytest.raises(fxcurv.InputError, match="the data hold no batch"):
        fxcurv.jacobian_operator(model, [])
    with pytest.raises(fxcurv.QuantityError, match="no trainable parameters"):
        fxcurv.ggn_operator(copy.deepcopy(model).requires_grad_(False), loss, (X, y))
    with pytest.raises(fxcurv.FxcurvError, match="has no eigenvalues, trace or diagonal"):
        fxcurv.jacobian_operator(model, (X, y)).eigsh(1)
    with pytest.raises(fxcurv.InputError, match="act on different spaces"):
        _ = fxcurv.ggn_operator(model, loss, (X, y)) + fxcurv.jacobian_operator(model, (X, y))


@pytest.mark.peers
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.MSELoss(reduction="sum")], ids=str)
def test_equal_to_curvlinops(loss: nn.Module, cut: bool) -> None:
    curvlinops: Any = peer("curvlinops")
    model = tokens(False)
    y = labels(5) if isinstance(loss, nn.CrossEntropyLoss) else reals(5, 3)
    data = batches(y) if cut else [(X, y)]
    parameters = dict(model.named_parameters())
    v = torch.linspace(-1, 1, sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    pairs = (
        (fxcurv.ggn_operator, curvlinops.GGNLinearOperator),
        (fxcurv.hessian_operator, curvlinops.HessianLinearOperator),
    )
    for ours, theirs in pairs:
        expected = theirs(model, loss, list(parameters.values()), data, check_deterministic=False) @ v
        close(ours(model, loss, data) @ v, expected.detach())
    expected = curvlinops.JacobianLinearOperator(model, list(parameters.values()), data, check_deterministic=False) @ v
    close(fxcurv.jacobian_operator(model, data) @ v, expected.detach())


# Estimates --------------------------------------------------------------------------------------------------------


class Given(fxcurv.LinearOperator):
    """A matrix as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.domain = matrix, Space({"w": (len(matrix),)})
        self.codomain, self.dtype, self.device = self.domain, matrix.dtype, matrix.device
        self.products = 0

    def _mm(self, matrix: Tensor) -> Tensor:
        self.products += matrix.shape[1]
        return self.matrix @ matrix


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(n: int, rank: int) -> Tensor:
    root = torch.randn(n, rank, generator=seeded(), dtype=torch.float64)
    return root @ root.T


def test_traces_and_diagonals_are_unbiased() -> None:
    """Over all sign vectors in place of draws, the mean of Hutchinson's estimates is the trace, or the diagonal."""
    B = symmetric(4, 4)
    every = torch.cartesian_prod(*[torch.tensor([0, 1])] * 4).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: every)
        close(fxcurv.estimate_trace(Given(B), 16, method="hutchinson"), B.trace())
        close(fxcurv.estimate_diagonal(Given(B), 16)["w"], B.diag())


def test_hutchpp_is_exact_for_low_rank_and_takes_the_products_it_was_given() -> None:
    B = symmetric(50, 6)
    for products in (18, 19, 20, 30):
        operator = Given(B)
        close(fxcurv.estimate_trace(operator, products, seeded()), B.trace())
        assert operator.products == products
    full = symmetric(50, 50) + 3 * torch.eye(50, dtype=torch.float64)
    estimates = [float(fxcurv.estimate_trace(Given(full), 12, seeded(k))) for k in range(60)]
    assert sum(estimates) / 60 == pytest.approx(float(full.trace()), rel=0.02)
    tiny = symmetric(2, 2)
    close(fxcurv.estimate_trace(Given(tiny), 12, seeded()), tiny.trace())


def test_quadrature_of_all_steps_is_exact_for_the_probe() -> None:
    B = symmetric(12, 12)
    spectrum = fxcurv.spectral_density(Given(B), steps=12, probes=3, generator=seeded())
    values, vectors = torch.linalg.eigh(B)
    z = torch.randint(0, 2, (12, 3), generator=seeded()).double() * 2 - 1
    weights = (vectors.T @ z).square() / 12
    for k in range(3):
        close(spectrum.nodes[k], values)
        close(spectrum.weights[k], weights[:, k])
    exact = torch.stack([z_k @ (vectors * (values + 1).log()) @ vectors.T @ z_k for z_k in z.T]).mean()
    close(spectrum.trace_of(lambda x: (x + 1).log()), exact)
    points = torch.linspace(-20, 80, 4001, dtype=torch.float64)
    assert float(torch.trapezoid(spectrum.density(points, 1.0), points)) == pytest.approx(1, rel=1e-6)


def test_quadrature_of_few_steps_integrates_polynomials() -> None:
    B = symmetric(30, 30) / 30
    spectrum = fxcurv.spectral_density(Given(B), steps=4, probes=2, generator=seeded())
    z = torch.randint(0, 2, (30, 2), generator=seeded()).double() * 2 - 1
    power = torch.linalg.matrix_power(B, 7)
    close(spectrum.trace_of(lambda x: x**7), (z * (power @ z)).sum() / 2)


def test_a_basis_that_ends_early_has_zero_weights() -> None:
    spectrum = fxcurv.spectral_density(Given(2 * torch.eye(5, dtype=torch.float64)), 4, 1, seeded())
    assert spectrum.weights.tolist() == [[1, 0, 0, 0]]
    assert spectrum.nodes.tolist() == [[2, 2, 2, 2]]
    nothing = fxcurv.spectral_density(Given(torch.zeros(5, 5, dtype=torch.float64)), 4, 1, seeded())
    assert float(nothing.trace_of(lambda x: x)) == 0


def test_estimates_of_a_network() -> None:
    model, (_, loss, y) = model_of(False), CASES["cross_entropy"]
    ggn, _, H, _ = matrices(model, loss, y)
    operator = fxcurv.ggn_operator(model, loss, (X, y))  # of rank 10 at most
    close(fxcurv.estimate_trace(operator, 36, seeded()), ggn.trace())
    diagonal = fxcurv.estimate_diagonal(operator, 2000, seeded())
    assert list(diagonal) == reference.trainable(model)
    found = torch.cat([t.flatten() for t in diagonal.values()])
    standard_error = (ggn.square().sum(1) - ggn.diag().square()).div(2000).sqrt()
    assert bool(((found - ggn.diag()).abs() <= 5 * standard_error + 1e-12).all())
    pytest.importorskip("scipy")
    values, vectors = fxcurv.hessian_operator(model, loss, (X, y)).eigsh(2, "BE")
    close(values, torch.linalg.eigvalsh(H)[[0, -1]])
    torch.testing.assert_close(H @ vectors, vectors * values, rtol=1e-7, atol=1e-9)


def test_wrong_numbers_are_refused() -> None:
    operator = Given(symmetric(3, 3))
    for use in (
        lambda: fxcurv.estimate_trace(operator, 0),
        lambda: fxcurv.estimate_trace(operator, 2),
        lambda: fxcurv.estimate_trace(operator, method="hutch"),  # pyright: ignore[reportArgumentType]
        lambda: fxcurv.estimate_diagonal(operator, -1),
        lambda: fxcurv.spectral_density(operator, probes=0),
        lambda: fxcurv.spectral_density(operator, 2, 1, seeded()).density(torch.zeros(1), 0.0),
    ):
        with pytest.raises(fxcurv.InputError) as caught:
            use()
        assert caught.value.code == "FXC426"
