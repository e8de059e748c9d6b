"""The forecast: every node has its row, operations are counted exactly, the forms not chosen are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.core.errors import FxcurvError
from fxcurv.losses.base import as_loss, loss_terms
from fxcurv.quantities.factors import Factor
from fxcurv.runtime.explain import Explanation

N = 5


def compiled(quantities: list[str]) -> fxcurv.Compiled:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    return fxcurv.compile(model, quantities=quantities)


def explained(quantities: list[str]) -> Explanation:
    return compiled(quantities).explain(torch.zeros(N, 3, 6, 6))


def test_every_call_of_the_graphs_has_its_row() -> None:
    curv = compiled(["kfac", "diag_ggn"])
    estimate = curv.explain(torch.zeros(N, 3, 6, 6))
    calls = [str(n.target) for gm in curv.program.graphs for n in gm.graph.nodes if n.op == "call_module"]
    assert [step.node for step in estimate.steps] == calls
    assert estimate.samples == N


def test_operations_are_counted() -> None:
    steps = {(s.graph, s.node): s.cost for s in explained(["diag_ggn"]).steps}
    assert steps["forward", "0"].flops == 2 * N * 36 * 8 * 27
    assert steps["backward[exact]", "pull.3"].flops == 2 * 3 * N * 4 * 288  # three columns for four classes


def test_other_forms_are_named_and_the_cheapest_is_chosen() -> None:
    estimate = explained(["kfac", "diag_ggn"])
    chosen = {step.node: step for step in estimate.steps if step.instead}
    assert {"CovarianceOfPatches", "DiagonalBySample", "SumOfSquares"} <= {
        f for s in chosen.values() for f in s.instead
    }
    text = str(estimate)
    for step in chosen.values():
        assert step.node in text


def test_shares_are_of_the_whole() -> None:
    estimate = explained(["kfac", "diag_ggn", "kflr"])
    assert estimate.shares.keys() == {"kfac", "diag_ggn", "kflr"}
    assert 0.9 < sum(estimate.shares.values()) <= 1 + 1e-9  # some steps serve the output alone
    assert estimate.seconds == pytest.approx(sum(s.seconds for s in estimate.steps))


def test_the_peak_grows_with_the_batch() -> None:
    curv = compiled(["diag_ggn"])
    small, large = (curv.explain(torch.zeros(n, 3, 6, 6)) for n in (2, 64))
    assert 8 * small.peak_bytes < large.peak_bytes < 40 * small.peak_bytes


def test_by_default_of_what_was_compiled_last() -> None:
    curv = compiled(["kfac"])
    with pytest.raises(FxcurvError, match="nothing is compiled yet"):
        curv.explain()
    curv(torch.zeros(N, 3, 6, 6), torch.zeros(N, dtype=torch.int64))
    assert curv.explain().samples == N


@pytest.mark.parametrize(
    ("factor", "loss"),
    [
        (fxcurv.Exact(), "cross_entropy"),
        (fxcurv.Exact(), "mse"),
        (fxcurv.Sampled(3), "cross_entropy"),
        (fxcurv.Stratified(2, 3), "cross_entropy"),
        (fxcurv.Stratified(9, 3), "cross_entropy"),
        (fxcurv.Rademacher(2), "bce_with_logits"),
        (fxcurv.Empirical(), "mse"),
    ],
)
def test_columns_are_those_of_the_loss(factor: Factor, loss: str) -> None:
    output = torch.zeros(N, 4, 2)
    target = torch.zeros(N, 2, dtype=torch.int64) if loss == "cross_entropy" else torch.zeros(N, 4, 2)
    estimate = as_loss(loss).columns(factor, output.shape)
    assert estimate == loss_terms(as_loss(loss), output, target).count(factor)
