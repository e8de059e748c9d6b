"""Factors: columns whose second moment is the loss Hessian, in expectation or at once, for every option of the losses.

An expectation over random signs is that over the rows of a Hadamard matrix, which are uncorrelated and few; one over a
drawn class is the sum over all classes. So unbiasedness is tested without statistics.
"""

from __future__ import annotations

import pytest
import reference
import torch
from samples import LOSSES, Sample, find, inputs, targets
from torch import Tensor, nn

import fxcurv
from fxcurv import DiagGGN, LossError, QuantityError, Rademacher, Sampled, Stratified
from fxcurv.losses.base import loss_terms
from fxcurv.losses.terms import LossTerms
from fxcurv.quantities.factors import Exact, Factor

CROSS_ENTROPY = [row for row in LOSSES if row.name.startswith("cross_entropy.")]
OTHERS = [row for row in LOSSES if row not in CROSS_ENTROPY]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def terms_of(row: Sample) -> tuple[LossTerms, Tensor]:
    """The loss of a row at its model's output, and its Hessians `[n, c, c]` by brute force."""
    loss, output, y = row.loss(), reference.outputs(row.build(), inputs(row)), targets(row)
    return loss_terms(loss, output, y), reference.loss_hessians(loss, output, y)


def columns(terms: LossTerms, factor: Factor, seed: int = 0) -> Tensor:
    """All columns `[v, n, c]`."""
    return flat(torch.cat(list(terms.columns(factor, 3, generator(seed)))))


def flat(S: Tensor) -> Tensor:
    return S.reshape(*S.shape[:2], -1)


def second_moment(S: Tensor) -> Tensor:
    return torch.einsum("vnc,vnd->ncd", S, S)


def hadamard(size: int) -> Tensor:
    """A matrix of signs with orthogonal columns, at least so many."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


class Signs:
    """Stands in for the draws of signs: row after row of a Hadamard matrix."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.rows, self.row = hadamard(size), 0
        monkeypatch.setattr("fxcurv.losses.terms._signs", self)

    def __call__(self, like: Tensor, generator: object) -> Tensor:
        return self.rows[self.row, : like.numel()].view_as(like)

    def mean(self, terms: LossTerms, factor: Factor) -> Tensor:
        """The second moment, on average over all rows."""
        total: Tensor | float = 0.0
        for row in range(len(self.rows)):
            self.row = row
            total = total + second_moment(columns(terms, factor)) / len(self.rows)
        assert isinstance(total, Tensor)
        return total


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_random_signs_have_the_hessian_as_their_expectation(row: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    terms, hessian = terms_of(row)
    signs = Signs(monkeypatch, terms.gradient.numel())
    torch.testing.assert_close(signs.mean(terms, Rademacher(1)), hessian, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("top", [0, 1, 2])
@pytest.mark.parametrize("row", CROSS_ENTROPY, ids=lambda row: row.name)
def test_strata_have_the_hessian_as_their_expectation(row: Sample, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terms, hessian = terms_of(row)
    N, C, *axes = terms.gradient.shape
    positions = torch.Size(axes).numel()
    signs = Signs(monkeypatch, N * positions)
    same = torch.eye(positions, dtype=torch.float64)
    total = torch.zeros(N, C, positions, C, positions, dtype=torch.float64)
    for drawn in range(C):
        probabilities = torch.zeros(())

        def draw(p: Tensor, generator: object, drawn: int = drawn) -> Tensor:
            nonlocal probabilities
            probabilities = p / p.sum(1, keepdim=True)
            return torch.full_like(p[:, :1], drawn, dtype=torch.int64)

        monkeypatch.setattr("fxcurv.losses.terms._drawn", draw)
        moment = signs.mean(terms, Stratified(top, 1)).view(N, C, positions, C, positions)
        assert not (moment * (1 - same[:, None])).abs().max() > 1e-15, "two terms are correlated"
        total += moment * probabilities.reshape(N, C, -1)[:, drawn].view(N, 1, positions, 1, 1)
    torch.testing.assert_close(total.view_as(hessian), hessian, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("row", CROSS_ENTROPY, ids=lambda row: row.name)
def test_all_classes_are_exact(row: Sample) -> None:
    terms, hessian = terms_of(row)
    for factor in (Stratified(3, 0), Stratified(5, 2)):
        assert terms.count(factor) == terms.count(Exact())
        torch.testing.assert_close(second_moment(columns(terms, factor)), hessian, rtol=1e-12, atol=1e-14)
    one_term_each = terms.gradient.ndim == 2
    if one_term_each:  # the rest is one class
        torch.testing.assert_close(second_moment(columns(terms, Stratified(2, 1))), hessian, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("factor", "name"),
    [
        *((f, "cross_entropy.plain.mean") for f in (Sampled(7), Stratified(1, 6), Stratified(0, 7), Rademacher(7))),
        *((f, "cross_entropy.pixels_image.sum") for f in (Sampled(7), Stratified(1, 6), Rademacher(7))),
        *((f, "bce.all_on_tokens.sum") for f in (Sampled(7), Rademacher(7))),
    ],
    ids=str,
)
def test_draws_are_those_of_the_generator_however_they_are_cut(factor: Factor, name: str) -> None:
    terms, _ = terms_of(find(name))
    assert terms.count(factor) == 7
    whole = columns(terms, factor)
    assert torch.equal(whole, columns(terms, factor))
    assert not torch.equal(whole, columns(terms, factor, seed=1))
    for n in range(2):
        (one,) = terms.columns(factor, 7, generator(), slice(n, n + 1))
        assert torch.equal(flat(one), whole[:, n : n + 1])


def test_exact_columns_of_some_samples() -> None:
    for row in LOSSES:
        terms, _ = terms_of(row)
        part = flat(torch.cat(list(terms.columns(Exact(), 2, None, slice(1, 2)))))
        assert torch.equal(part, columns(terms, Exact())[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_predictions_leave_no_rest(dtype: torch.dtype) -> None:
    """A softmax of which all but one class underflow: nothing is divided by zero."""
    output = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1.0, 2.0]], dtype=dtype)
    terms = loss_terms(nn.CrossEntropyLoss(), output, torch.tensor([0, 1]))
    for factor in (Stratified(1, 2), Stratified(2, 1), Rademacher(2), Sampled(2)):
        S = columns(terms, factor)
        assert S.dtype == dtype
        assert S.isfinite().all()
        assert not S[:, 0].any()


@pytest.mark.parametrize("factor", [Sampled(4000), Stratified(1, 2000), Rademacher(4000)], ids=str)
def test_many_columns_estimate_the_diagonal_of_a_model(factor: Factor) -> None:
    row = find("cross_entropy.all.mean")
    model, x, y = row.build(), inputs(row), targets(row)
    result = fxcurv.compile(model, row.loss(), [DiagGGN(), DiagGGN(factor)])(x, y, generator())
    exact, estimate = (torch.cat([v.flatten() for v in result[q].values()]) for q in ("diag_ggn", "diag_ggn_1"))
    assert 0 < (estimate - exact).norm() < 0.05 * exact.norm()
    assert str(factor) in result.table()


@pytest.mark.parametrize("factor", [Stratified(1, 1), Rademacher(1)], ids=str)
def test_the_mean_over_calls_estimates_the_diagonal_where_positions_mix(factor: Factor) -> None:
    row = find("cross_entropy.positions_all_signal.mean")
    model, x, y = row.build(), inputs(row), targets(row)
    exact = fxcurv.compile(model, row.loss(), "diag_ggn")(x, y)["diag_ggn"]["2.weight"]
    compiled, draws = fxcurv.compile(model, row.loss(), DiagGGN(factor)), generator()
    mean = torch.stack([compiled(x, y, draws)["diag_ggn"]["2.weight"] for _ in range(600)]).mean(0)
    assert (mean - exact).norm() < 0.1 * exact.norm()


def test_the_fallback_draws_the_same_columns() -> None:
    row = find("cross_entropy.positions_signal.mean")
    model, x, y = row.build(), inputs(row), targets(row)
    for factor in (Stratified(1, 2), Rademacher(2)):
        compiled = fxcurv.compile(model, row.loss(), DiagGGN(factor))(x, y, generator())["diag_ggn"]
        mixing = nn.Sequential(model, Centred()).eval()
        slow = fxcurv.compile(mixing, row.loss(), DiagGGN(factor), on_unsupported="fallback")(x, y, generator())
        for name, value in slow["diag_ggn"].items():
            assert slow["diag_ggn"].status[name] == "fallback"
            torch.testing.assert_close(value, compiled[name.removeprefix("0.")], rtol=1e-9, atol=1e-13)


class Centred(nn.Module):
    """The batch's mean is added and taken away: samples mix in the graph, and in nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(0) - x.mean(0)


@pytest.mark.parametrize("row", OTHERS[::5], ids=lambda row: row.name)
def test_strata_need_classes(row: Sample) -> None:
    terms, _ = terms_of(row)
    with pytest.raises(LossError, match=r"this loss has none; use .* \[FXC412\]"):
        terms.count(Stratified())


def test_leaving_out_classes_is_refused() -> None:
    row = find("cross_entropy.plain.mean")
    compiled = fxcurv.compile(row.build(), row.loss(), DiagGGN(Stratified(2, 0)))
    with pytest.raises(LossError, match=r"all but 2 of 3 classes; .* top ≥ 3 \[FXC412\]"):
        compiled(inputs(row), targets(row))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stratified(-1, 1),
        lambda: Stratified(1, -1),
        lambda: Stratified(0, 0),
        lambda: Stratified(1.5, 1),  # pyright: ignore[reportArgumentType]
        lambda: Rademacher(0),
        lambda: Rademacher(True),
        lambda: Sampled("2"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_numbers_of_columns_are_checked(make: object) -> None:
    assert callable(make)
    with pytest.raises(QuantityError, match=r"a whole number of columns, at least [01] \[FXC409\]"):
        make()


def test_factors_have_names_without_a_comma() -> None:
    assert [str(f) for f in (Stratified(4, 2), Rademacher(3))] == ["stratified(4+2)", "rademacher(3)"]
