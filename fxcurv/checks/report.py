"""Results of a check: a row per parameter × quantity, a report per target, one document for all targets."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tabulate import tabulate

from fxcurv.checks.codes import Severity
from fxcurv.checks.policy import Level, Policy, base
from fxcurv.core.errors import FxcurvError
from fxcurv.core.version import __version__

__all__ = ["STATUSES", "Report", "Row", "document", "finding_of", "grouped", "judged", "names_of", "text"]


STATUSES = ("exact", "approx", "fallback", "frozen", "unreached", "unsupported", "error")
"""All statuses, without the names of approximations."""


@dataclass(frozen=True)
class Row:
    """One parameter × quantity: its status and the reason for it; without a parameter, the target as a whole.

    `file`, `line`, `column` are a location inside the repository; `stack` has the innermost lines of the model,
    in any file. `suppressed` says why a finding does not count: ignored, allowed with a reason, or known.
    """

    target: str
    parameter: str
    quantity: str
    status: str
    module: str = ""
    module_type: str = ""
    shape: tuple[int, ...] = ()
    numel: int = 0
    node: str = ""
    op: str = ""
    code: str = ""
    severity: Severity | None = None
    message: str = ""
    suggestion: str = ""
    file: str | None = None
    line: int | None = None
    column: int | None = None
    stack: tuple[str, ...] = ()
    suppressed: str = ""

    @property
    def approximation(self) -> str:
        """Name of the approximation: `diagonal` for the status `approx(diagonal)`."""
        return self.status.partition("(")[2].removesuffix(")")

    @property
    def fingerprint(self) -> str:
        """Identity of a finding across edits; independent of line numbers."""
        identity = "\0".join((self.target, self.parameter, self.op, self.quantity, self.code))
        return hashlib.sha256(identity.encode()).hexdigest()

    @property
    def where(self) -> str:
        """Location as `file:line`."""
        if self.file is not None:
            return f"{self.file}:{self.line}"
        return self.stack[0].partition(" in ")[0] if self.stack else ""

    @property
    def text(self) -> str:
        """Cause and remedy in one line."""
        return f"{self.message}; {self.suggestion}" if self.suggestion else self.message

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        extra = {"approximation": self.approximation, "fingerprint": self.fingerprint}
        return {**asdict(self), "shape": list(self.shape), "stack": list(self.stack), **extra}


@dataclass(frozen=True)
class Report:
    """Result of `check` for one target."""

    target: str
    rows: tuple[Row, ...]
    quantities: tuple[str, ...]
    level: Level = "shape"
    input: str = ""
    nodes: int = 0
    seconds: float = 0.0
    policy: Policy = field(default_factory=Policy)

    @property
    def findings(self) -> tuple[Row, ...]:
        """Rows with a severity that are not suppressed."""
        return tuple(row for row in self.rows if row.severity is not None and not row.suppressed)

    @property
    def failures(self) -> tuple[Row, ...]:
        """Findings that make the check fail."""
        return tuple(row for row in self.findings if row.severity in self.policy.fatal)

    @property
    def ok(self) -> bool:
        """Whether the report has rows and no failures."""
        return bool(self.rows) and not self.failures

    @property
    def numel(self) -> int:
        """Number of entries of all parameters."""
        return sum({row.parameter: row.numel for row in self.rows}.values())

    def coverage(self, quantity: str) -> float:
        """Return the share of trainable entries that get the quantity as required."""
        return self.policy.coverage([row for row in self.rows if row.quantity in (quantity, "")])

    def statuses(self, quantity: str) -> dict[str, int]:
        """Return the number of parameters with each status, including zeros."""
        counts = Counter(base(row.status) for row in self.rows if row.quantity == quantity)
        return {status: counts[status] for status in STATUSES}

    def raise_if_failed(self) -> None:
        """Raise the first failure."""
        for row in self.failures:
            raise FxcurvError(row.message, remedy=row.suggestion or None, code=row.code)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of this report alone."""
        return document([self])

    def summary(self) -> dict[str, Any]:
        """Return the target's entry in the document."""
        return {
            "name": self.target,
            "ok": self.ok,
            "level": self.level,
            "input": self.input,
            "quantities": list(self.quantities),
            "parameters": len({row.parameter for row in self.rows if row.parameter}),
            "numel": self.numel,
            "nodes": self.nodes,
            "seconds": round(self.seconds, 3),
            "coverage": {quantity: round(self.coverage(quantity), 6) for quantity in self.quantities},
            "statuses": {quantity: self.statuses(quantity) for quantity in self.quantities},
        }

    def __str__(self) -> str:
        return text([self])


def document(reports: Sequence[Report]) -> dict[str, Any]:
    """Return the JSON document as plain containers; `schema.json` in this folder is its schema."""
    rows = [row for report in reports for row in report.rows]
    return {
        "schema_version": 1,
        "tool": {"name": "fxcurv", "version": __version__},
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": str(torch.__version__),
        },
        "targets": [report.summary() for report in reports],
        "rows": [row.to_dict() for row in rows],
        "summary": {
            "ok": all(report.ok for report in reports),
            "targets": len(reports),
            "failed": sum(not report.ok for report in reports),
            "statuses": dict(Counter(base(row.status) for row in rows)),
            "codes": dict(Counter(row.code for report in reports for row in report.findings)),
            "suppressed": sum(bool(row.suppressed) for row in rows),
            "seconds": round(sum(report.seconds for report in reports), 3),
        },
    }


def judged(report: Report) -> Report:
    """Return the report with the severity and suppression of every row, by its policy."""
    rows: list[Row] = []
    for quantity in dict.fromkeys(row.quantity for row in report.rows):
        own = [row for row in report.rows if row.quantity == quantity]
        rows += _judged(own, report.policy)
    return replace(report, rows=tuple(rows))


def _judged(rows: Sequence[Row], policy: Policy) -> Iterable[Row]:
    enough = policy.min_coverage < 1 and policy.coverage(rows) >= policy.min_coverage
    for row in rows:
        severity = policy.severity(row.status, row.code, enough)
        yield replace(row, severity=severity, suppressed=policy.suppressed(row) if severity else "")


# Text --------------------------------------------------------------------------------------------------------------


def text(reports: Sequence[Report]) -> str:
    """Return a table per target, each reason once, and a verdict."""
    return "\n\n".join(map(_text, reports))


def _text(report: Report) -> str:
    headers, rows = parameter_table(report)
    table = tabulate(rows, headers, disable_numparse=True) if rows else ""
    reasons = ["  " + "  ".join(filter(None, finding_of(rows))) for rows in grouped(report.findings)]
    return "\n".join(filter(None, (table, *reasons, *_suppressed(report), verdict(report))))


def parameter_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return headers and a line per parameter; codes and locations only if there are findings."""
    status = {(row.parameter, row.quantity): row.status for row in report.rows}
    rows = {row.parameter: row for row in report.rows if row.parameter}
    found = {row.parameter: row for row in reversed(report.findings)}
    lines = [
        [name, row.op or row.module_type, str(list(row.shape)), *(status[name, q] for q in report.quantities)]
        + ([found[name].code if name in found else "", found[name].where if name in found else ""] if found else [])
        for name, row in rows.items()
    ]
    return ["parameter", "op", "shape", *report.quantities, *(("code", "where") if found else ())], lines


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows with the same finding about several parameters and quantities."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.target, row.code, row.severity, row.where, row.text), []).append(row)
    return list(groups.values())


def finding_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return code, severity, location and text of a group of rows."""
    return rows[0].code, str(rows[0].severity), rows[0].where, f"{names_of(rows)}{rows[0].text}"


def names_of(rows: Sequence[Row]) -> str:
    """Return the first parameter and the number of others, as a prefix of the message."""
    names = list(dict.fromkeys(row.parameter for row in rows if row.parameter))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: " if names else ""


def _suppressed(report: Report) -> list[str]:
    counts = Counter(row.suppressed for row in report.rows if row.suppressed)
    return [f"  {count} suppressed: {reason}" for reason, count in counts.items()]


def verdict(report: Report) -> str:
    counts = Counter(row.status for row in report.rows)
    found = ", ".join(f"{count} {status}" for status, count in counts.items())
    share = ", ".join(f"{quantity} {report.coverage(quantity):.1%}" for quantity in report.quantities)
    number = len({row.parameter for row in report.rows if row.parameter})
    verdict = "PASS" if report.ok else "FAIL"
    return f"{report.target}: {number} parameters: {found}; {share} -> {verdict}   {report.seconds:.1f} s"
