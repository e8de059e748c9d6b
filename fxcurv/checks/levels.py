"""check(): curvature compatibility of a model. One row per parameter × quantity, at one of three levels.

static    capture, lowering, rules and usage on the meta device: no memory, no arithmetic
shape     all of compilation before graphs are emitted; infers batch axes by probing, and compares the graph with the
          model on a few samples
numeric   compiled in float64 and run on a tiny batch; each value is compared with autograd on the model itself
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fxcurv.api import Compiled
from fxcurv.checks.anchors import Anchors, defined_at
from fxcurv.checks.numeric import disagreements, doubled
from fxcurv.checks.policy import Level, Policy
from fxcurv.checks.report import Report, judged
from fxcurv.checks.rows import Outcome, Place, computed, described, fallen_back, refused
from fxcurv.checks.static import static_found
from fxcurv.core.deprecation import warn_renamed
from fxcurv.core.errors import FxcurvError
from fxcurv.frontend.inputs import Inputs, Output
from fxcurv.losses.base import Loss, as_loss
from fxcurv.quantities.selection import Asked, Selection, chosen
from fxcurv.runtime.options import OnUnsupported, Options

__all__ = ["CheckTarget", "Request", "check", "examine"]


@dataclass(frozen=True)
class Request:
    """Settings that apply to every target."""

    selection: Selection
    loss: Loss
    level: Level = "shape"
    on_unsupported: OnUnsupported = "skip"
    policy: Policy = field(default_factory=Policy)
    raising: bool = False
    """Whether an unexpected exception is raised instead of reported."""


@dataclass(frozen=True)
class CheckTarget:
    """A model, example inputs, and the anchors of its findings."""

    name: str
    model: nn.Module
    inputs: Inputs
    output: Output = None
    anchors: Anchors = field(default_factory=Anchors)


def check(
    model: nn.Module,
    inputs: Inputs,
    quantities: Asked = ("kfac", "diag_ggn"),
    *,
    loss: object = "cross_entropy",
    output: Output = None,
    target: str | None = None,
    level: Level = "shape",
    on_unsupported: OnUnsupported = "skip",
    policy: Policy | None = None,
    **renamed: Any,
) -> Report:
    """Report the status of every parameter of `model` for inputs of this shape; the model is not changed.

    `level` is "static", "shape" or "numeric"; all but "static" run the model. `on_unsupported` is as in `compile`;
    "error" refuses the model where "skip" refuses parameters. `policy` decides which findings fail.
    """
    if set(renamed) - {"demands"}:
        raise TypeError(f"check() got an unexpected keyword argument {next(iter(renamed))!r}")
    if renamed:
        warn_renamed("demands", "policy")
        policy = renamed["demands"]
    request = Request(chosen(quantities), as_loss(loss), level, on_unsupported, policy or Policy())
    anchors = Anchors(fallbacks=defined_at(type(model)))
    return examine(CheckTarget(target or type(model).__name__, model, inputs, output, anchors), request)


def examine(target: CheckTarget, request: Request) -> Report:
    """Return the report on one target; an error during the check becomes a finding."""
    started = time.perf_counter()
    compiled = _compiled(target, request)  # raises for an invalid request
    place, nodes = Place(target.name, target.model, target.anchors), 0
    try:
        found = _LEVELS[request.level](target, request, compiled)
        rows, nodes = computed(place, found), len(found.canonical.graph.nodes)
    except Exception as error:
        if request.raising and not isinstance(error, FxcurvError):
            raise
        rows = refused(place, request.selection.of(target.model), error)
    if request.on_unsupported == "fallback":
        rows = list(map(fallen_back, rows))
    seconds, quantities = time.perf_counter() - started, tuple(request.selection.quantities)
    facts = request.level, described(target.inputs), nodes, seconds, request.policy
    return judged(Report(target.name, tuple(rows), quantities, *facts))


def _compiled(target: CheckTarget, request: Request) -> Compiled:
    return Compiled(target.model, request.loss, request.selection, Options(target.output, request.on_unsupported))


# The levels -------------------------------------------------------------------------------------------------------


def _static(target: CheckTarget, request: Request, compiled: Compiled) -> Outcome:
    return static_found(target.model, target.inputs, target.output, request.selection)


def _shape(target: CheckTarget, request: Request, compiled: Compiled) -> Outcome:
    plan, canonical = compiled.plan(target.inputs)
    return Outcome(plan.statuses, canonical, plan.refusals)


def _numeric(target: CheckTarget, request: Request, compiled: Compiled) -> Outcome:
    found = _shape(target, request, compiled)
    in_double, inputs = doubled(target.model, target.inputs)
    twin = _compiled(replace(target, model=in_double), replace(request, on_unsupported="skip"))
    return replace(found, errors=disagreements(twin, inputs))


_LEVELS: dict[Level, Callable[[CheckTarget, Request, Compiled], Outcome]] = {
    "static": _static,
    "shape": _shape,
    "numeric": _numeric,
}
