"""Rows from the outcome of compilation: a status and a usage per parameter, or one error for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from fxcurv.checks.anchors import Anchors
from fxcurv.checks.codes import CODES
from fxcurv.checks.policy import base
from fxcurv.checks.report import Row
from fxcurv.core.errors import FxcurvError, frames_of, raised_at
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import Inputs, as_call
from fxcurv.ir.nodes import describe, module_of
from passes.parameter_usage import parameter_uses

__all__ = ["TOLERANCE", "Outcome", "Place", "computed", "described", "fallen_back", "refused", "whole"]


_CODES = {"approx": "FXC320", "fallback": "FXC321", "unsupported": "FXC322", "unreached": "FXC430"}
"""Codes by status."""


TOLERANCE = 1e-8
"""Largest relative error due to rounding in float64."""


_DEFECTS = "FXC9"
"""Prefix of codes for a failed check, which says nothing about the model."""


@dataclass(frozen=True)
class Place:
    """The target, its model, and the anchors of its findings."""

    target: str
    model: nn.Module
    anchors: Anchors

    def row(self, name: str, quantity: str, status: str) -> Row:
        """Return the row of a parameter, without a finding."""
        module, parameter = name.rpartition(".")[0], self.model.get_parameter(name)
        kind = type(self.model.get_submodule(module)).__name__
        return Row(self.target, name, quantity, status, module, kind, tuple(parameter.shape), parameter.numel())


@dataclass(frozen=True)
class Outcome:
    """Status of each parameter, the canonical graph with its usage, reasons of refusals, and relative errors."""

    statuses: Mapping[str, Mapping[str, str]]
    canonical: fx.GraphModule
    refusals: Mapping[str, FxcurvError] = field(default_factory=dict)
    errors: Mapping[tuple[str, str], float] = field(default_factory=dict)


def computed(place: Place, found: Outcome) -> list[Row]:
    """Return a row per parameter × quantity, with the first op that uses the parameter."""
    uses = parameter_uses(found.canonical, {name for statuses in found.statuses.values() for name in statuses})
    rows: list[Row] = []
    for quantity, statuses in found.statuses.items():
        for name, status in statuses.items():
            row = _used(place, place.row(name, quantity, status), uses[name][0][0] if name in uses else None)
            row = replace(row, **_told(whole(place, found.refusals[name]))) if status == "unsupported" else row
            rows.append(_verified(row, found.errors.get((quantity, name), 0.0)))
    return rows


def _used(place: Place, row: Row, node: fx.Node | None) -> Row:
    """Return the row with the node that uses its parameter, and with the code of its status."""
    location = place.anchors.place(frames_of(node) if node is not None else ())
    if node is not None:
        location |= {"node": describe(node), "op": type(module_of(node)).__name__}
    return _coded(replace(row, **location), _CODES.get(base(row.status), ""))


def _coded(row: Row, code: str) -> Row:
    said = {"code": code, "message": CODES[code].title, "suggestion": CODES[code].remedy} if code else {}
    return replace(row, **said)


def _verified(row: Row, error: float) -> Row:
    """Return the row; as an error if its value disagrees with autograd."""
    if math.isnan(error):
        return _coded(row, "FXC905")
    if error <= TOLERANCE:
        return row
    row = _coded(replace(row, status="error"), "FXC903")
    return replace(row, message=f"{row.message}: relative error {error:.1e} in float64, more than {TOLERANCE:g}")


def fallen_back(row: Row) -> Row:
    """Return an unsupported row with the status of its autograd fallback, and the reason."""
    if row.status != "unsupported" or row.code == "FXC213":  # autograd's value depends on the batch, too
        return row
    fallback = _coded(replace(row, status="fallback"), "FXC321")
    return replace(fallback, message=f"{fallback.message}: {row.message} [{row.code}]")


def refused(place: Place, asked: Mapping[str, Iterable[str]], error: Exception) -> list[Row]:
    """Return a row per parameter × quantity of a refused model; frozen parameters have no finding."""
    finding, rows = whole(place, error), list[Row]()
    for quantity, names in asked.items():
        for name in names:
            trainable = place.model.get_parameter(name).requires_grad
            row = place.row(name, quantity, finding.status if trainable else "frozen")
            rows.append(replace(row, **_told(finding)) if trainable else row)
    return rows


def _told(finding: Row) -> dict[str, Any]:
    """Return the fields of a finding, without its subject."""
    return {key: getattr(finding, key) for key in _SAID}


_SAID = ("node", "code", "message", "suggestion", "file", "line", "column", "stack")


def whole(place: Place, error: Exception) -> Row:
    """Convert an error to a finding about the whole target."""
    if not isinstance(error, FxcurvError):
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        cause = f"{type(error).__name__}: {first}"
        error = FxcurvError(cause, remedy=CODES["FXC904"].remedy, code="FXC904", location=raised_at(error))
    code = error.code if error.code in CODES else "FXC904"
    status = "error" if code.startswith(_DEFECTS) else "unsupported"
    row = Row(place.target, "", "", status, node=error.node or "", code=code, message=error.fact)
    return replace(row, suggestion=error.remedy or "", **place.anchors.place(error.location))


def described(inputs: Inputs) -> str:
    """Describe inputs as `2x3x224x224:float32`; several are joined by commas, keywords have names."""
    args, kwargs = as_call(inputs)
    named = [(f"{key}=", value) for key, value in kwargs.items()]
    parts = [(name, t) for name, value in (*(("", a) for a in args), *named) for t in pytree.tree_leaves(value)]
    return ",".join(
        f"{name}{'x'.join(map(str, t.shape))}:{str(t.dtype).removeprefix('torch.')}"
        for name, t in parts
        if isinstance(t, Tensor)
    )
