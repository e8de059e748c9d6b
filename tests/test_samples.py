"""Every rule, every loss and every model against the brute-force oracle, in float64."""

from __future__ import annotations

import devices
import pytest
import reference
import samples
import torch
from samples import Sample
from torch import Tensor, nn

import fxcurv
from fxcurv import ops, rules
from fxcurv.result import Entries
from fxcurv.spec import module_of

QUANTITIES = {
    "grad": fxcurv.Grad(),
    "diag_ggn": fxcurv.DiagGGN(),
    "expand": fxcurv.KFAC(fxcurv.Exact()),
    "reduce": fxcurv.KFAC(fxcurv.Empirical(), approx="reduce", joint=True),
}
TOLERANCE = 1e-9


def assert_close(ours: Tensor, theirs: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Equal to `tolerance` relative to the largest entry."""
    assert ours.shape == theirs.shape, f"{what}: shape {list(ours.shape)}, not {list(theirs.shape)}"
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    error = float((ours - theirs).abs().max()) if theirs.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-3), f"{what}: off by {error:.3g}, entries up to {scale:.3g}"


def names(group: tuple[Sample, ...]) -> list[str]:
    return [sample.name for sample in group]


def check_against_oracle(sample: Sample, batch: int = 2) -> fxcurv.Compiled:
    """Gradient, diagonal, Kronecker factors of both kinds and dense blocks of every parameter equal the oracle's."""
    model, loss = sample.build(), sample.loss()
    x, y = samples.inputs(sample, batch), samples.targets(sample, batch)
    compiled = fxcurv.compile(model, loss, list(QUANTITIES.values()))
    result = dict(zip(QUANTITIES, compiled(x, y).values(), strict=True))
    output = reference.outputs(model, x)
    exact, empirical = reference.exact_columns(loss, output, y), reference.empirical_columns(loss, output, y)
    expected = {"grad": reference.grad(model, loss, x, y), "diag_ggn": reference.diag_ggn(model, loss, x, y)}
    for quantity, values in expected.items():
        for name, value in values.items():
            if name in result[quantity]:
                assert_close(result[quantity][name], value, f"{quantity} {name}")
            else:
                assert result[quantity].status[name] == "unreached"
                assert not value.any(), f"{quantity} {name} is not unreached"
    check_blocks(result["expand"], model, x, exact, "expand", joint=False)
    check_blocks(result["reduce"], model, x, empirical, "reduce", joint=True)
    return compiled


def check_blocks(result: Entries, model: nn.Module, x: Tensor, columns: Tensor, approx: str, joint: bool) -> None:
    factors = reference.kfac(model, x, columns, approx=approx, joint=joint)  # pyright: ignore[reportArgumentType]
    for name, block in result.items():
        if isinstance(block, fxcurv.Kronecker):
            owner = block.parameters[0]
            A, G = factors[owner]
            assert_close(block.A, A, f"A of {owner}")
            assert_close(block.G, G, f"G of {owner}")
        else:
            assert isinstance(block, fxcurv.Dense)
            assert_close(block.matrix, reference.dense_block(model, x, columns, name), f"block of {name}")
    matrices = {
        name for name, block in result.items() if isinstance(block, fxcurv.Kronecker) and block.parameters[0] == name
    }
    assert matrices == set(factors)


REACHED: set[type[nn.Module]] = set()
"""The module types of the canonical graphs that have been checked."""


def note_reached(compiled: fxcurv.Compiled) -> None:
    nodes = compiled.stages["canonical"].graph.nodes
    REACHED.update(type(module_of(node)) for node in nodes if node.op == "call_module")


@pytest.mark.parametrize("sample", samples.SAMPLES, ids=names(samples.SAMPLES))
def test_rule(sample: Sample) -> None:
    compiled = check_against_oracle(sample)
    note_reached(compiled)
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
        note_reached(check_against_oracle(sample))
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


def test_every_rule_has_a_sample(request: pytest.FixtureRequest) -> None:
    """A row of the table that no sample reaches fails the suite (two are folded; a cast is tried in test_api)."""
    ran = {item.name for item in request.session.items if item.name.startswith("test_rule[")}
    if len(ran) < len(samples.SAMPLES):
        pytest.skip("needs the whole of test_rule in one run")
    missing = set(rules.RULES) - REACHED - {nn.Identity, nn.Dropout, ops.Cast}
    assert not missing, f"no sample for {sorted(op.__name__ for op in missing)}"
