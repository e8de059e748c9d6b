"""plan: the results of every parameter and their sums, read from the canonical graph."""

from __future__ import annotations

from torch import fx, nn

from fxcurv.core.errors import FxcurvError, UnsupportedError
from fxcurv.core.torch_compat import has_backward_hooks
from fxcurv.quantities.plan import Plan, jobs_for
from fxcurv.quantities.selection import Selection
from passes.parameter_usage import bending, parameter_uses, refusals, usage_of

__all__ = ["plan"]


def plan(model: nn.Module, canonical: fx.GraphModule, selection: Selection) -> Plan:
    """Return the plan of the selected quantities of the model's parameters."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    refused = refusals(canonical, trainable) | _hooked(model)
    uses = {
        q: parameter_uses(canonical, trainable.intersection(names) - set(refused))
        for q, names in selection.of(model).items()
    }
    bent = bending(canonical)
    described = {quantity: {name: usage_of(name, own, bent) for name in own} for quantity, own in uses.items()}
    return Plan.of(model, selection.quantities, selection.of(model), jobs_for(selection.quantities, described), refused)


def _hooked(model: nn.Module) -> dict[str, FxcurvError]:
    """Return the refusals of the parameters whose gradients pass through hooks, which are never called here."""
    return {
        name: UnsupportedError(
            f"the parameter {name!r} has a gradient hook, which may change its gradient",
            remedy="remove the hook by its handle while curvature is computed, and register it again",
            code="FXC109",
        )
        for name, p in model.named_parameters()
        if p.requires_grad and has_backward_hooks(p)
    }
