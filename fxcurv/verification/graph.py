"""The canonical graph at given tensors: its output, and its pullback to the parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fxcurv.frontend.inputs import Inputs, tensors_of
from fxcurv.frontend.isolation import without_autocast
from fxcurv.ir.nodes import output_of
from fxcurv.quantities.selection import chosen
from fxcurv.runtime.program import Program
from fxcurv.runtime.run import Gathered, bind_tensors
from passes.augment import augment
from passes.pipeline import Emitted
from passes.plan import plan
from passes.schedule import schedule
from passes.select_algorithms import contract
from passes.setting import Setting

__all__ = ["Pullback", "output_at"]


def output_at(program: Program, inputs: Inputs, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the output of the canonical graph, where `tensors` are the model's parameters and buffers."""
    with torch.no_grad(), without_autocast():
        bind_tensors(program.canonical, tensors)
        return program.canonical.forward(*tensors_of(inputs))


class Pullback:
    """The graphs of the gradient after `augment`, `select_algorithms` and `schedule`; other passes keep the values."""

    def __init__(self, program: Program, model: nn.Module, parameters: Collection[str], samples: int = 2) -> None:
        canonical = program.canonical
        self.plan = plan(model, canonical, chosen("grad").only(parameters))
        augmented, place = augment(canonical, self.plan), next(model.parameters()).device
        setting = Setting(samples, 1, place, output_of(canonical).meta["dtype"])
        stages = {**program.stages, "forward": augmented.forward}
        stages |= {f"backward[{factor}]": schedule(contract(gm, setting)) for factor, gm in augmented.backwards.items()}
        self.program = Program.of(Emitted(stages, tuple(augmented.backwards), self.plan))

    def __call__(self, inputs: Inputs, tensors: Mapping[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
        """Return the pullback of a cotangent to every parameter that the graph reaches."""
        with torch.no_grad(), without_autocast():
            bind_tensors(self.program.canonical, tensors)
            _, saved, found = self.program.stages["forward"].forward(*tensors_of(inputs))
            sums = Gathered(self.program)
            sums.add(found)
            for factor in self.program.backwards:
                needed = {name: saved[name] for name in self.program.given(factor)}
                backward = self.program.stages[f"backward[{factor}]"]
                sums.add(backward.forward(cotangent.unsqueeze(0), **needed))
            sums.close()
            gradients: dict[str, Tensor] = {}
            for job in self.plan.jobs:
                own = {statistic: sums.whole[key] for statistic, key in job.sums.items()}
                value = job.quantity.finish(job.usage, own, len(cotangent))
                assert isinstance(value, Tensor)
                gradients[job.usage.name] = value
        return gradients
