"""The pipeline of passes: each is a pure function from graph to graph, checked by the grammar of its stage.

capture   the model -> ATen                                     (fxcurv/capture.py)
inline    blocks without gradients -> their nodes
functionalize  in-place ops -> functional ones                  captured
lower     ATen -> modules of the vocabulary                     lowered
fold      what computes nothing vanishes
recognize activations that are written out -> modules
locate    which axis holds the samples; mixing is refused       canonical
plan      what every parameter gets, and of which sums
augment   + what is kept and summed; the pullback per factor    forward, backward
share     what is computed alike is computed once
join      parts of a tensor are laid side by side, and not added
contract  definitions -> cheaper equal contractions
scales    scales are folded into the pullback
schedule  every sum as soon as it can be taken                  forward, backward
"""

from __future__ import annotations

import fxcurv as fxcurv  # first: importing `passes` alone then initialises both packages in the one order that works

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import fx, nn

from fxcurv.capture import Inputs, Output, batch_size, capture, device_of
from fxcurv.choice import Choice
from fxcurv.program import Program
from fxcurv.quantities import most_columns
from fxcurv.shapes import resolve
from fxcurv.spec import Stage, output_of, verify
from passes.augment import augment
from passes.contract import Setting, contract
from passes.fold import fold
from passes.functionalize import functionalize
from passes.inline import inline
from passes.join import join
from passes.locate import locate
from passes.lower import lower
from passes.plan import plan
from passes.recognize import recognize
from passes.scales import fold_scales
from passes.schedule import schedule
from passes.share import share

__all__ = ["canonicalize", "compile_program", "lowered", "plan"]


def canonicalize(
    model: nn.Module, inputs: Inputs, output: Output = None, *, strict: bool = True
) -> dict[str, fx.GraphModule]:
    """The stages up to the canonical graph; unless `strict`, it may have nodes that are refused."""
    stages = lowered(model, inputs, output)
    device = device_of(inputs)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # ops that draw are tried, too
        canonical = verify(locate(stages.pop("folded"), device, strict), "canonical")
    return {**stages, "canonical": canonical}


def lowered(model: nn.Module, inputs: Inputs, output: Output = None) -> dict[str, fx.GraphModule]:
    """The stages for which nothing need be computed."""
    captured = capture(model, inputs, output)
    functional = functionalize(inline(captured.graph), captured.sources)
    captured = replace(captured, graph=verify(functional, "captured"))
    gm = verify(lower(captured, model), "lowered")
    return {"captured": captured.graph, "lowered": gm, "folded": verify(recognize(fold(gm)), "lowered")}


def compile_program(
    model: nn.Module, stages: Mapping[str, fx.GraphModule], choice: Choice, inputs: Inputs, forced: str | None = None
) -> Program:
    """The program that computes the chosen quantities of the model's parameters, from its canonical graph.

    Contractions are chosen for batches like `inputs`; `forced` names a form to take wherever it applies.
    """
    canonical = stages["canonical"]
    planned, output = plan(model, canonical, choice), output_of(canonical)
    augmented = augment(canonical, planned)
    setting = Setting(batch_size(inputs), 1, device_of(inputs), output.meta["dtype"], forced=forced)
    forward = _optimized(augmented.forward, "forward", setting)
    backwards = {
        factor: _optimized(
            gm, "backward", replace(setting, columns=most_columns(factor, math.prod(resolve(output.meta["shape"], 1))))
        )
        for factor, gm in augmented.backwards.items()
    }
    emitted = {f"backward[{factor}]": gm for factor, gm in backwards.items()}
    return Program({**stages, "forward": forward, **emitted}, forward, backwards, planned)


def _optimized(gm: fx.GraphModule, stage: Stage, setting: Setting) -> fx.GraphModule:
    for rewrite in (share, join, partial(contract, setting=setting), partial(fold_scales, setting=setting), schedule):
        gm = rewrite(verify(gm, stage))
    return verify(gm, stage)
