"""The pipeline of passes: each is a pure function from graph to graph, checked by the grammar of its stage.

capture   the model -> functional ATen                          (fxcurv/capture.py)
lower     ATen -> modules of the vocabulary                     lowered
fold      what computes nothing vanishes
locate    which axis holds the samples; mixing is refused       canonical
augment   + what is kept and summed; the pullback per factor    forward, backward
contract  definitions -> cheaper equal contractions
schedule  every sum as soon as it can be taken                  forward, backward
"""

from __future__ import annotations

import fxcurv as fxcurv  # first: importing `passes` alone then initialises both packages in the one order that works

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx, nn

from fxcurv.capture import Inputs, Output, capture
from fxcurv.program import Program
from fxcurv.quantities import Quantity
from fxcurv.spec import verify
from passes.augment import augment
from passes.contract import contract
from passes.fold import fold
from passes.functionalize import functionalize
from passes.locate import locate
from passes.lower import lower
from passes.schedule import schedule

__all__ = ["canonicalize", "compile_program"]


def canonicalize(model: nn.Module, inputs: Inputs, output: Output, device: torch.device) -> dict[str, fx.GraphModule]:
    """The stages up to the canonical graph."""
    captured = capture(model, inputs, output)
    captured = replace(captured, graph=verify(functionalize(captured.graph, captured.sources), "captured"))
    lowered = verify(lower(captured, model), "lowered")
    canonical = verify(locate(verify(fold(lowered), "lowered"), device), "canonical")
    return {"captured": captured.graph, "lowered": lowered, "canonical": canonical}


def compile_program(
    model: nn.Module, stages: Mapping[str, fx.GraphModule], quantities: Mapping[str, Quantity]
) -> Program:
    """The program that computes `quantities` of every trainable parameter of a model, from its canonical graph."""
    parameters = dict(model.named_parameters())
    augmented = augment(stages["canonical"], quantities, [name for name, p in parameters.items() if p.requires_grad])
    forward = verify(schedule(verify(augmented.forward, "forward")), "forward")
    backwards = {factor: _optimized(gm) for factor, gm in augmented.backwards.items()}
    emitted = {f"backward[{factor}]": gm for factor, gm in backwards.items()}
    without = {name: "unreached" if p.requires_grad else "frozen" for name, p in parameters.items()}
    found = {q: {p: job.status for job in augmented.jobs if job.name == q for p in job.parameters} for q in quantities}
    return Program(
        stages={**stages, "forward": forward, **emitted},
        forward=forward,
        backwards=backwards,
        jobs=augmented.jobs,
        quantities=quantities,
        statuses={q: {name: found[q].get(name, status) for name, status in without.items()} for q in quantities},
        shapes={name: tuple(p.shape) for name, p in parameters.items()},
    )


def _optimized(backward: fx.GraphModule) -> fx.GraphModule:
    contracted = verify(contract(verify(backward, "backward")), "backward")
    return verify(schedule(contracted), "backward")
