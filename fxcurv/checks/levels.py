"""check(): is a model curvature-compatible? One row per parameter × quantity, at one of three levels.

static    capture, lowering, rules and uses on the meta device: no memory, no arithmetic
shape     everything that compiling does, which probes where samples are
numeric   compiled in float64 and run on a tiny batch, each value compared with autograd on the model itself
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from fxcurv.api import Compiled
from fxcurv.capture import Inputs, Output
from fxcurv.checks.anchors import Anchors, defined_at
from fxcurv.checks.policy import Demands, Level
from fxcurv.checks.report import Report, judged
from fxcurv.checks.rows import Place, computed, described, refused
from fxcurv.checks.static import static_statuses
from fxcurv.errors import FxcurvError
from fxcurv.losses import as_loss
from fxcurv.quantities import Quantity, named

__all__ = ["Question", "Subject", "check", "examine"]

Asked = str | Quantity | Iterable[str | Quantity]


@dataclass(frozen=True)
class Question:
    """What is asked of every target."""

    quantities: Mapping[str, Quantity]
    loss: nn.Module
    level: Level = "shape"
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
    demands: Demands | None = None,
) -> Report:
    """Report what every parameter of `model` would get, for inputs of this shape; the model is left as it is.

    `level` is "static", "shape" or "numeric"; only the last computes anything. `demands` say what passes.
    """
    question = Question(named(quantities), as_loss(loss), level, demands or Demands())
    anchors = Anchors(fallbacks=defined_at(type(model)))
    return examine(Subject(target or type(model).__name__, model, inputs, output, anchors), question)


def examine(subject: Subject, question: Question) -> Report:
    """The report on one target; what goes wrong while it is checked is a finding."""
    started = time.perf_counter()
    if not any(p.requires_grad for p in subject.model.parameters()):
        Compiled(subject.model, question.loss, question.quantities, subject.output)  # says so
    place, nodes = Place(subject.name, subject.model, subject.anchors), 0
    try:
        found = _LEVELS[question.level](subject, question)
        rows, nodes = computed(place, found.statuses, found.canonical), len(found.canonical.graph.nodes)
    except Exception as error:
        if question.raising and not isinstance(error, FxcurvError):
            raise
        rows = refused(place, question.quantities, error)
    seconds, quantities = time.perf_counter() - started, tuple(question.quantities)
    told = question.level, described(subject.inputs), nodes, seconds, question.demands
    return judged(Report(subject.name, tuple(rows), quantities, *told))


# The levels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What each parameter gets, and the canonical graph that says where it is used."""

    statuses: Mapping[str, Mapping[str, str]]
    canonical: fx.GraphModule


def _static(subject: Subject, question: Question) -> Found:
    return Found(*static_statuses(subject.model, subject.inputs, subject.output, question.quantities))


def _shape(subject: Subject, question: Question) -> Found:
    compiled = Compiled(subject.model, question.loss, question.quantities, subject.output)
    program = compiled.prepare(subject.inputs)
    return Found(program.statuses, program.canonical)


_LEVELS: dict[Level, Callable[[Subject, Question], Found]] = {"static": _static, "shape": _shape}
