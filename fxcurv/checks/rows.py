"""Rows out of what compiling says: a status and a use per parameter, or the one error that refuses them all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcurv.capture import Inputs, as_call
from fxcurv.checks.anchors import Anchors
from fxcurv.checks.codes import CODES
from fxcurv.checks.policy import base
from fxcurv.checks.report import Row
from fxcurv.errors import FxcurvError, frames_of, raised_at
from fxcurv.spec import describe, module_of
from passes.uses import parameter_uses

__all__ = ["Place", "computed", "described", "refused", "whole"]

_CODES = {"approx": "FXC320", "fallback": "FXC321", "unsupported": "FXC322", "unreached": "FXC430"}
"""What a status says by itself."""

_DEFECTS = "FXC9"
"""Codes with which a check went wrong, so that it says nothing about the model."""


@dataclass(frozen=True)
class Place:
    """The target, its model, and where findings about it are shown."""

    target: str
    model: nn.Module
    anchors: Anchors

    def row(self, name: str, quantity: str, status: str) -> Row:
        """The row of a parameter, without a finding."""
        module, parameter = name.rpartition(".")[0], self.model.get_parameter(name)
        kind = type(self.model.get_submodule(module)).__name__
        return Row(self.target, name, quantity, status, module, kind, tuple(parameter.shape), parameter.numel())


def computed(place: Place, statuses: Mapping[str, Mapping[str, str]], canonical: fx.GraphModule) -> list[Row]:
    """A row per parameter × quantity, with the op that uses the parameter first."""
    uses = parameter_uses(canonical, {name for found in statuses.values() for name in found})
    nodes = {name: found[0][0] for name, found in uses.items()}
    return [
        _used(place, place.row(name, quantity, status), nodes.get(name))
        for quantity, found in statuses.items()
        for name, status in found.items()
    ]


def _used(place: Place, row: Row, node: fx.Node | None) -> Row:
    """The row with the node that uses its parameter, and with what its status says by itself."""
    told: dict[str, Any] = {}
    if node is not None:
        told = {"node": describe(node), "op": type(module_of(node)).__name__, **place.anchors.place(frames_of(node))}
    if code := _CODES.get(base(row.status)):
        told |= {} if node is not None else place.anchors.place(())
        told |= {"code": code, "message": CODES[code].title, "suggestion": CODES[code].remedy}
    return replace(row, **told)


def refused(place: Place, quantities: Iterable[str], error: Exception) -> list[Row]:
    """A row per parameter × quantity of a model that is refused as a whole; frozen ones ask for nothing."""
    finding, rows = whole(place, error), list[Row]()
    for quantity in quantities:
        for name, parameter in place.model.named_parameters():
            row = place.row(name, quantity, finding.status if parameter.requires_grad else "frozen")
            rows.append(replace(row, **_told(finding)) if parameter.requires_grad else row)
    return rows


def _told(finding: Row) -> dict[str, Any]:
    """What a finding says, apart from what it is about."""
    return {key: getattr(finding, key) for key in _SAID}


_SAID = ("node", "code", "message", "suggestion", "file", "line", "column", "stack")


def whole(place: Place, error: Exception) -> Row:
    """The finding that an error is, about no parameter in particular."""
    if not isinstance(error, FxcurvError):
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        cause = f"{type(error).__name__}: {first}"
        error = FxcurvError(cause, remedy=CODES["FXC904"].remedy, code="FXC904", location=raised_at(error))
    code = error.code or "FXC904"
    status = "error" if code.startswith(_DEFECTS) else "unsupported"
    row = Row(place.target, "", "", status, node=error.node or "", code=code, message=error.fact)
    return replace(row, suggestion=error.remedy or "", **place.anchors.place(error.location))


def described(inputs: Inputs) -> str:
    """`2x3x224x224:float32`, several joined by commas, keywords by name."""
    args, kwargs = as_call(inputs)
    named = [(f"{key}=", value) for key, value in kwargs.items()]
    parts = [(name, t) for name, value in (*(("", a) for a in args), *named) for t in pytree.tree_leaves(value)]
    return ",".join(
        f"{name}{'x'.join(map(str, t.shape))}:{str(t.dtype).removeprefix('torch.')}"
        for name, t in parts
        if isinstance(t, Tensor)
    )
