"""assert_compatible: an assertion for models."""

from __future__ import annotations

from torch import nn

from fxcurv.checks import Policy, Report, check
from fxcurv.checks.policy import Level, Require
from fxcurv.frontend.inputs import Inputs, Output
from fxcurv.quantities.selection import Asked

__all__ = ["assert_compatible"]


def assert_compatible(
    model: nn.Module,
    inputs: Inputs,
    quantities: Asked = ("kfac", "diag_ggn"),
    *,
    require: Require = "approx",
    level: Level = "shape",
    loss: object = "cross_entropy",
    output: Output = None,
) -> Report:
    """Return the report of `fxcurv.check`; raise an AssertionError with its table if a parameter misses `require`."""
    __tracebackhide__ = True  # pytest then shows the line of the test
    policy = Policy(require=require)
    report = check(model, inputs, quantities, loss=loss, output=output, level=level, policy=policy)
    if not report.ok:
        raise AssertionError(f"not compatible with curvature\n{report}")
    return report
