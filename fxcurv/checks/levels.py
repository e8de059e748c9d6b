"""check(): is a model curvature-compatible? One row per parameter × quantity, at one of three levels.

static    capture, lowering, rules and uses on the meta device: no memory, no arithmetic
shape     all that compiling does before graphs are emitted: it probes where samples are
numeric   compiled in float64 and run on a tiny batch, each value compared with autograd on the model itself
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn

from fxcurv.api import Compiled
from fxcurv.checks.anchors import Anchors, defined_at
from fxcurv.checks.numeric import disagreements, doubled
from fxcurv.checks.policy import Demands, Level
from fxcurv.checks.report import Report, judged
from fxcurv.checks.rows import Found, Place, computed, described, fallen_back, refused
from fxcurv.checks.static import static_found
from fxcurv.core.errors import FxcurvError
from fxcurv.frontend.inputs import Inputs, Output
from fxcurv.losses.base import Loss, as_loss
from fxcurv.quantities.selection import Asked, Choice, chosen
from fxcurv.runtime.options import OnUnsupported, Options

__all__ = ["Question", "Subject", "check", "examine"]


@dataclass(frozen=True)
class Question:
    """What is asked of every target."""

    choice: Choice
    loss: Loss
    level: Level = "shape"
    on_unsupported: OnUnsupported = "skip"
    demands: Demands = field(default_factory=Demands)
    raising: bool = False
    """Whether an exception that no check foresaw is raised instead of reported."""


@dataclass(frozen=True)
class Subject:
    """A model, inputs like those that it takes, and where its findings are shown."""

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
    demands: Demands | None = None,
) -> Report:
    """Report what every parameter of `model` would get, for inputs of this shape; the model is left as it is.

    `level` is "static", "shape" or "numeric"; only the last computes anything. `on_unsupported` is that of `compile`;
    "error" refuses the model where "skip" refuses parameters. `demands` say what passes.
    """
    question = Question(chosen(quantities), as_loss(loss), level, on_unsupported, demands or Demands())
    anchors = Anchors(fallbacks=defined_at(type(model)))
    return examine(Subject(target or type(model).__name__, model, inputs, output, anchors), question)


def examine(subject: Subject, question: Question) -> Report:
    """The report on one target; what goes wrong while it is checked is a finding."""
    started = time.perf_counter()
    compiled = _compiled(subject, question)  # refuses what is no question about the model
    place, nodes = Place(subject.name, subject.model, subject.anchors), 0
    try:
        found = _LEVELS[question.level](subject, question, compiled)
        rows, nodes = computed(place, found), len(found.canonical.graph.nodes)
    except Exception as error:
        if question.raising and not isinstance(error, FxcurvError):
            raise
        rows = refused(place, question.choice.of(subject.model), error)
    if question.on_unsupported == "fallback":
        rows = list(map(fallen_back, rows))
    seconds, quantities = time.perf_counter() - started, tuple(question.choice.quantities)
    told = question.level, described(subject.inputs), nodes, seconds, question.demands
    return judged(Report(subject.name, tuple(rows), quantities, *told))


def _compiled(subject: Subject, question: Question) -> Compiled:
    return Compiled(subject.model, question.loss, question.choice, Options(subject.output, question.on_unsupported))


# The levels -------------------------------------------------------------------------------------------------------


def _static(subject: Subject, question: Question, compiled: Compiled) -> Found:
    return static_found(subject.model, subject.inputs, subject.output, question.choice)


def _shape(subject: Subject, question: Question, compiled: Compiled) -> Found:
    plan, canonical = compiled.plan(subject.inputs)
    return Found(plan.statuses, canonical, plan.refusals)


def _numeric(subject: Subject, question: Question, compiled: Compiled) -> Found:
    found = _shape(subject, question, compiled)
    in_double, inputs = doubled(subject.model, subject.inputs)
    twin = _compiled(replace(subject, model=in_double), replace(question, on_unsupported="skip"))
    return replace(found, errors=disagreements(twin, inputs))


_LEVELS: dict[Level, Callable[[Subject, Question, Compiled], Found]] = {
    "static": _static,
    "shape": _shape,
    "numeric": _numeric,
}
