"""check: is a model curvature-compatible? One row per parameter × quantity, found by compiling, without running it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
from tabulate import tabulate
from torch import nn

import fxcurv
from fxcurv.api import Compiled
from fxcurv.capture import Inputs, Output
from fxcurv.choice import Asked, chosen
from fxcurv.errors import FxcurvError
from fxcurv.losses import as_loss

__all__ = ["Report", "Row", "check"]

ACCEPTED = ("exact", "approx", "frozen", "unreached")
"""Statuses with which a row passes: computed, under its name, or rightly without a value."""


@dataclass(frozen=True)
class Row:
    """One parameter × quantity: `exact`, `approx(<name>)`, `frozen`, `unreached` or `unsupported`, and why."""

    parameter: str
    module: str
    module_type: str
    shape: tuple[int, ...]
    numel: int
    quantity: str
    status: str
    message: str = ""
    suggestion: str = ""

    @property
    def ok(self) -> bool:
        return self.status.partition("(")[0] in ACCEPTED


@dataclass(frozen=True)
class Report:
    """What `check` found for one model."""

    target: str
    rows: tuple[Row, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every trainable parameter gets every quantity, exactly or under a name."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def raise_if_failed(self) -> None:
        """Raise the first refusal."""
        for row in self.rows:
            if not row.ok:
                raise FxcurvError(row.message, remedy=row.suggestion or None)

    def to_dict(self) -> dict[str, object]:
        """Plain containers, as the JSON format prints them."""
        summary = {
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "statuses": dict(Counter(row.status for row in self.rows)),
        }
        tool = {"fxcurv": fxcurv.__version__, "torch": torch.__version__}
        return {
            "schema_version": 1,
            "tool": tool,
            "target": self.target,
            "rows": [asdict(row) for row in self.rows],
            "summary": summary,
        }

    def __str__(self) -> str:
        quantities = list(dict.fromkeys(row.quantity for row in self.rows))
        status = {(row.parameter, row.quantity): row.status for row in self.rows}
        first = {row.parameter: row for row in self.rows}
        rows = [
            (name, row.module_type, list(row.shape), *(status[name, q] for q in quantities))
            for name, row in first.items()
        ]
        refusals = dict.fromkeys(
            f"  {row.message}{f'; {row.suggestion}' if row.suggestion else ''}" for row in self.rows if not row.ok
        )
        counts = ", ".join(f"{count} {status}" for status, count in Counter(row.status for row in self.rows).items())
        verdict = "PASS" if self.ok else "FAIL"
        last = f"{self.target}: {len(first)} parameters: {counts} -> {verdict}   {self.seconds:.1f} s"
        return "\n".join((tabulate(rows, ("parameter", "module", "shape", *quantities)), *refusals, last))


def check(
    model: nn.Module,
    inputs: Inputs,
    quantities: Asked = ("kfac", "diag_ggn"),
    *,
    loss: object = "cross_entropy",
    output: Output = None,
    target: str | None = None,
) -> Report:
    """Compile `model` for inputs of this shape and report what every parameter would get; nothing is run."""
    started, asked, loss = time.perf_counter(), chosen(quantities), as_loss(loss)
    try:
        statuses = Compiled(model, loss, asked, output).prepare(inputs).plan.statuses
        rows = [_row(model, name, q, status) for q, found in statuses.items() for name, status in found.items()]
    except FxcurvError as error:
        rows = [_refused(model, name, q, error) for q in asked.quantities for name, _ in model.named_parameters()]
        if not rows:
            raise
    return Report(target or type(model).__name__, tuple(rows), time.perf_counter() - started)


def _row(model: nn.Module, name: str, quantity: str, status: str) -> Row:
    module, parameter = name.rpartition(".")[0], model.get_parameter(name)
    kind = type(model.get_submodule(module)).__name__
    return Row(name, module, kind, tuple(parameter.shape), parameter.numel(), quantity, status)


def _refused(model: nn.Module, name: str, quantity: str, error: FxcurvError) -> Row:
    if not model.get_parameter(name).requires_grad:
        return _row(model, name, quantity, "frozen")
    cause = f"node {error.node}: {error.cause}" if error.node else error.cause
    row = _row(model, name, quantity, "unsupported")
    return replace(row, message=cause, suggestion=error.remedy or "")


def as_json(reports: Iterable[Report]) -> str:
    """The reports as one JSON document."""
    return json.dumps([report.to_dict() for report in reports], indent=2)
