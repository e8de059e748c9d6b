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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxcurv.capture import Inputs, Output, capture
from fxcurv.quantities import Factor, Quantity
from fxcurv.spec import verify
from passes.augment import Job, augment
from passes.contract import contract
from passes.fold import fold
from passes.locate import locate
from passes.lower import lower
from passes.schedule import schedule

__all__ = ["Program", "canonicalize", "compile_program"]


@dataclass(frozen=True)
class Program:
    """Everything that was compiled: the graph of every stage, and what is made of the backward graphs' sums."""

    stages: Mapping[str, fx.GraphModule]
    forward: fx.GraphModule
    backwards: Mapping[Factor, fx.GraphModule]
    jobs: tuple[Job, ...]


def canonicalize(model: nn.Module, inputs: Inputs, output: Output, device: torch.device) -> dict[str, fx.GraphModule]:
    """The stages up to the canonical graph."""
    captured = capture(model, inputs, output)
    verify(captured.graph, "captured")
    lowered = verify(lower(captured, model), "lowered")
    canonical = verify(locate(verify(fold(lowered), "lowered"), device), "canonical")
    return {"captured": captured.graph, "lowered": lowered, "canonical": canonical}


def compile_program(
    stages: Mapping[str, fx.GraphModule], quantities: Mapping[str, Quantity], wanted: Iterable[str]
) -> Program:
    """The program that computes `quantities` of the `wanted` parameters of a canonical graph."""
    augmented = augment(stages["canonical"], quantities, wanted)
    forward = verify(schedule(verify(augmented.forward, "forward")), "forward")
    backwards = {factor: _optimized(gm) for factor, gm in augmented.backwards.items()}
    emitted = {f"backward[{factor}]": gm for factor, gm in backwards.items()}
    return Program({**stages, "forward": forward, **emitted}, forward, backwards, augmented.jobs)


def _optimized(backward: fx.GraphModule) -> fx.GraphModule:
    contracted = verify(contract(verify(backward, "backward")), "backward")
    return verify(schedule(contracted), "backward")
