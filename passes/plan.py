"""plan: the results of every parameter and their sums, read from the canonical graph."""

from __future__ import annotations

from torch import fx, nn

from fxcurv.quantities.plan import Plan, jobs_for
from fxcurv.quantities.selection import Selection
from passes.parameter_usage import bending, parameter_uses, refusals, usage_of

__all__ = ["plan"]


def plan(model: nn.Module, canonical: fx.GraphModule, selection: Selection) -> Plan:
    """Return the plan of the selected quantities of the model's parameters."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    refused = refusals(canonical, trainable)
    uses = {
        q: parameter_uses(canonical, trainable.intersection(names) - set(refused))
        for q, names in selection.of(model).items()
    }
    bent = bending(canonical)
    described = {quantity: {name: usage_of(name, own, bent) for name in own} for quantity, own in uses.items()}
    return Plan.of(model, selection.quantities, selection.of(model), jobs_for(selection.quantities, described), refused)
