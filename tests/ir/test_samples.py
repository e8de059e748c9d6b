"""Every rule, every loss and every model against the brute-force oracle, in float64."""

from __future__ import annotations

import devices
import pytest
import samples
import torch
from comparison import assert_close, check_against_oracle
from conftest import ONE_PER_RULE
from samples import Sample
from torch import nn

import fxcurv
from fxcurv.ir import ops, rules
from fxcurv.ir.nodes import module_of


def names(group: tuple[Sample, ...]) -> list[str]:
    return [sample.name for sample in group]


@pytest.mark.parametrize("sample", samples.SAMPLES, ids=names(samples.SAMPLES))
def test_rule(sample: Sample) -> None:
    compiled = check_against_oracle(sample)
    if sample.name not in devices.WAITING:
        devices.run_elsewhere(compiled.program, samples.inputs(sample))


@pytest.mark.parametrize("sample", samples.LOSSES, ids=names(samples.LOSSES))
def test_loss(sample: Sample) -> None:
    check_against_oracle(sample, batch=3)


@pytest.mark.slow
@pytest.mark.parametrize("sample", samples.MODELS, ids=names(samples.MODELS))
def test_model(sample: Sample) -> None:
    check_against_oracle(sample)


@pytest.mark.parametrize("sample", samples.TRICKY, ids=names(samples.TRICKY))
def test_right_or_refused(sample: Sample) -> None:
    """Where there is no rule there is an error with a cause, never a number that is wrong."""
    refusals: list[fxcurv.FxcurvError] = []
    try:
        check_against_oracle(sample)
    except fxcurv.FxcurvError as error:
        refusals.append(error)
    assert all(error.cause and error.remedy for error in refusals)


@pytest.mark.parametrize("sample", samples.MIXING, ids=names(samples.MIXING))
def test_mixing_is_refused(sample: Sample) -> None:
    with pytest.raises(fxcurv.UnsupportedError, match=r"samples|batch axis"):
        fxcurv.compile(sample.build(), sample.loss(), example_inputs=samples.inputs(sample))


def test_the_checker_can_fail() -> None:
    with pytest.raises(AssertionError, match="off by"):
        assert_close(torch.ones(2), torch.ones(2) * (1 + 1e-7), "a deliberate error")
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(2), torch.ones(1, 2), "a deliberate error")


def test_every_rule_has_a_sample() -> None:
    """The samples of the fast tests reach every module type that the table of rules has (two are eliminated)."""
    fast = [samples.find(name) for name in ONE_PER_RULE]
    graphs = (fxcurv.trace(row.build(), samples.inputs(row)).graph for row in fast)
    reached = {type(module_of(node)) for graph in graphs for node in graph.nodes if node.op == "call_module"}
    missing = set(rules.RULES) - reached - {nn.Identity, nn.Dropout, ops.Cast}
    assert not missing, f"no sample for {sorted(op.__name__ for op in missing)}"
