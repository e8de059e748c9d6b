"""The baseline: known findings that do not fail, in a committed file; one finding per line, sorted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxcurv.checks.report import Report, Row
from fxcurv.core.errors import InputError

__all__ = ["FILE", "Baseline", "read", "write"]


FILE = Path(".fxcurv-baseline.json")
"""Default file of `--write-baseline`."""


_FACTS = ("target", "parameter", "quantity", "op", "code")


@dataclass(frozen=True)
class Baseline:
    """Known findings: their facts for people, their fingerprints for the check."""

    entries: tuple[dict[str, str], ...] = ()

    @property
    def fingerprints(self) -> frozenset[str]:
        """Fingerprints for `Policy.known`."""
        return frozenset(entry["fingerprint"] for entry in self.entries)

    def fixed(self, reports: Sequence[Report]) -> list[dict[str, str]]:
        """Return the entries of checked targets that are no longer found."""
        checked = {report.target for report in reports}
        found = {row.fingerprint for report in reports for row in report.rows if row.severity is not None}
        return [e for e in self.entries if e["target"] in checked and e["fingerprint"] not in found]

    def renewed(self, reports: Sequence[Report]) -> Baseline:
        """Return a baseline of current failures, known findings still found, and entries of targets not checked."""
        checked = {report.target for report in reports}
        kept = [entry for entry in self.entries if entry["target"] not in checked]
        failing = [_entry(row) for report in reports for row in (*report.failures, *_known(report.rows))]
        return Baseline(tuple(sorted((*kept, *failing), key=lambda entry: [entry[fact] for fact in _FACTS])))


def _known(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.suppressed == "baseline"]


def _entry(row: Row) -> dict[str, str]:
    return {**{fact: getattr(row, fact) for fact in _FACTS}, "fingerprint": row.fingerprint}


def read(file: Path) -> Baseline:
    """Read a baseline from a file."""
    try:
        document: Any = json.loads(file.read_text(encoding="utf-8"))
        entries = tuple({key: str(entry[key]) for key in (*_FACTS, "fingerprint")} for entry in document["findings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "write it with --write-baseline"
        raise InputError(f"{file} is not a baseline: {error!r}", remedy=remedy, code="FXC008") from error
    return Baseline(entries)


def write(baseline: Baseline, file: Path) -> None:
    """Write the file, one finding per line."""
    lines = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in baseline.entries)
    body = f"[\n{lines}\n ]" if lines else "[]"
    file.write_text(f'{{\n "version": 1,\n "findings": {body}\n}}\n', encoding="utf-8")
