"""The pipeline: named passes in order, and the graph after each of them.

Every pass is a line of one of the tables below. The pipeline checks the graph that a pass returns against the grammar
of its stage, stores it, and logs it under `fxcurv.passes` (`FXCURV_DEBUG=passes` prints it to stderr). An error of a
pass, or a graph that breaks the grammar, names the pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

import torch
from torch import fx, nn

from fxcurv.core.errors import FxcurvError, SpecError, a_value
from fxcurv.core.logs import logger
from fxcurv.core.shapes import resolve
from fxcurv.frontend.capture import Captured, Tracing, capture
from fxcurv.frontend.inputs import Inputs, Output, batch_size, device_of
from fxcurv.frontend.shield import restored
from fxcurv.ir.grammar import Stage, verify
from fxcurv.ir.nodes import output_of
from fxcurv.quantities.factors import Factor, most_columns
from fxcurv.quantities.plan import Plan
from fxcurv.quantities.selection import Selection
from passes.augment import augment
from passes.common_subexpressions import share
from passes.concatenate import join
from passes.eliminate_identities import fold
from passes.fold_scales import fold_scales
from passes.functionalize import functionalize
from passes.infer_batch_axes import locate
from passes.inline import inline
from passes.lower import lower
from passes.plan import plan
from passes.recognize_idioms import recognize
from passes.schedule import schedule
from passes.select_algorithms import contract
from passes.setting import Setting
from passes.vectorize import vectorize

__all__ = ["CANONICAL", "EMITTED", "TRACED", "Emitted", "Pass", "Pipeline", "canonicalize", "emit", "lowered"]


@dataclass(frozen=True)
class Context:
    """Arguments of the passes besides the graph: a captured model before emission, a `setting` after it."""

    captured: Captured | None = None
    model: nn.Module | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strict: bool = True
    setting: Setting | None = None


@dataclass(frozen=True)
class Pass:
    """A pure function from graph to graph; `stage` is the grammar of its result, by default that of its argument."""

    name: str
    run: Callable[[fx.GraphModule, Context], fx.GraphModule]
    stage: Stage | None = None


def _lower(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    assert context.captured is not None
    assert context.model is not None
    return lower(replace(context.captured, graph=gm), context.model)


def _functionalize(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    assert context.captured is not None
    return functionalize(gm, context.captured.sources)


def _tuned(run: Callable[[fx.GraphModule, Setting], fx.GraphModule]) -> Callable[..., fx.GraphModule]:
    """Return a pass that reads the setting alone."""

    def tuned(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
        assert context.setting is not None
        return run(gm, context.setting)

    return tuned


TRACED = (
    Pass("inline", lambda gm, context: inline(gm)),
    Pass("functionalize", _functionalize, "captured"),
    Pass("lower", _lower, "lowered"),
    Pass("eliminate_identities", lambda gm, context: fold(gm), "lowered"),
    Pass("recognize_idioms", lambda gm, context: recognize(gm), "lowered"),
)
"""Passes from the captured graph to modules of the vocabulary."""

CANONICAL = (Pass("infer_batch_axes", lambda gm, context: locate(gm, context.device, context.strict), "canonical"),)
"""Passes from the lowered to the canonical graph."""

EMITTED = (
    Pass("common_subexpressions", lambda gm, context: share(gm)),
    Pass("concatenate", lambda gm, context: join(gm)),
    Pass("select_algorithms", _tuned(contract)),
    Pass("vectorize", _tuned(vectorize)),
    Pass("fold_scales", _tuned(fold_scales)),
    Pass("schedule", lambda gm, context: schedule(gm)),
)
"""Passes of the forward graph and every backward graph after `augment`."""


class Pipeline:
    """Applies passes in order; `stages` holds the graph after each, the latest of a stage under the stage's name.

    The graph after a pass is called `stage:pass`, as `lowered:eliminate_identities` or `forward:schedule`.
    """

    def __init__(self, stages: Mapping[str, fx.GraphModule] | None = None) -> None:
        self.stages: dict[str, fx.GraphModule] = dict(stages or {})

    def run(self, passes: Sequence[Pass], gm: fx.GraphModule, context: Context, stage: str | None = None) -> None:
        """Apply the passes to a graph of a stage; without `stage`, the graph has only been traced."""
        for one in passes:
            stage = one.stage or stage
            gm = self._checked(one, self._applied(one, gm, context), stage)
            name = stage or "captured"
            self.stages[f"{name}:{one.name}"] = self.stages[name] = gm
            log = logger("fxcurv.passes")
            if log.isEnabledFor(10):
                log.debug("%s after %s, %d nodes\n%s", name, one.name, len(gm.graph.nodes), gm.graph)

    def _applied(self, one: Pass, gm: fx.GraphModule, context: Context) -> fx.GraphModule:
        if one.stage not in (None, *get_args(Stage)):
            raise SpecError(
                f"the pass {one.name!r} has the stage {one.stage!r}",
                remedy=f"choose one of {', '.join(get_args(Stage))}, or None for that of its argument",
                code="FXC901",
            )
        try:
            found: Any = one.run(gm, context)
        except FxcurvError:
            raise
        except Exception as error:
            error.add_note(f"in the pass {one.name!r} of fxcurv, on the graph\n{gm.graph}")
            raise
        if not isinstance(found, fx.GraphModule):
            cause = f"the pass {one.name!r} returned {a_value(found)}, not a GraphModule"
            raise SpecError(cause, remedy="return an fx.GraphModule, also where nothing changes", code="FXC901")
        return found

    def _checked(self, one: Pass, gm: fx.GraphModule, stage: str | None) -> fx.GraphModule:
        """Return the graph, if it is valid after this pass."""
        if stage is None:
            return gm
        grammar = "backward" if stage.startswith("backward[") else cast(Stage, stage)
        try:
            return verify(gm, grammar)
        except SpecError as error:
            cause = f"after the pass {one.name!r} the graph is {error.cause}"
            broken = SpecError(cause, node=error.node, code=error.code, location=error.location)
            for note in getattr(error, "__notes__", ()):
                broken.add_note(note)
            raise broken from error


def lowered(
    model: nn.Module, inputs: Inputs, output: Output = None, tracing: Tracing | None = None
) -> dict[str, fx.GraphModule]:
    """Return the captured and lowered stages, without evaluating any op; `meta["sizes"]` has the valid batch sizes."""
    captured, pipeline = capture(model, inputs, output, tracing), Pipeline()
    pipeline.run(TRACED, captured.graph, Context(captured, model))
    pipeline.stages["lowered"].meta["sizes"] = captured.sizes
    return pipeline.stages


def canonicalize(
    model: nn.Module,
    inputs: Inputs,
    output: Output = None,
    *,
    strict: bool = True,
    tracing: Tracing | None = None,
) -> dict[str, fx.GraphModule]:
    """Return the stages up to the canonical graph; unless `strict`, it may contain refused nodes."""
    device = device_of(inputs)
    with restored(model):  # trials call functions and hooks of the user, and random ops
        pipeline = Pipeline(lowered(model, inputs, output, tracing))
        pipeline.run(CANONICAL, pipeline.stages["lowered"], Context(device=device, strict=strict), "lowered")
    pipeline.stages["canonical"].meta["sizes"] = pipeline.stages["lowered"].meta["sizes"]
    return pipeline.stages


@dataclass(frozen=True)
class Emitted:
    """The graphs after every pass, the factors that have a backward graph, `backward[factor]`, and the plan."""

    stages: Mapping[str, fx.GraphModule]
    factors: tuple[Factor, ...]
    plan: Plan


def emit(
    model: nn.Module,
    stages: Mapping[str, fx.GraphModule],
    selection: Selection,
    inputs: Inputs,
    algorithms: Mapping[str, str] | None = None,
) -> Emitted:
    """Return the graphs of the selected quantities of the model's parameters, from its canonical graph.

    Algorithms are selected for batches like `inputs`; `algorithms` overrides the selection (see `Setting`).
    """
    canonical = stages["canonical"]
    planned, output = plan(model, canonical, selection), output_of(canonical)
    augmented, pipeline = augment(canonical, planned), Pipeline(stages)
    setting = Setting(batch_size(inputs), 1, device_of(inputs), output.meta["dtype"], algorithms=algorithms or {})
    emitted = {"forward": (augmented.forward, 1)}
    outputs = math.prod(resolve(output.meta["shape"], 1))
    for factor, gm in augmented.backwards.items():
        emitted[f"backward[{factor}]"] = gm, most_columns(factor, outputs)
    with restored(model):  # trials call functions and hooks of the user
        for name, (gm, columns) in emitted.items():
            pipeline.stages[f"{name}:augment"] = verify(gm, "forward" if name == "forward" else "backward")
            pipeline.run(EMITTED, gm, Context(setting=replace(setting, columns=columns)), name)
    return Emitted(pipeline.stages, tuple(augmented.backwards), planned)
