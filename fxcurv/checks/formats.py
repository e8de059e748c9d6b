"""Report formats: one function from reports to text per format."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from xml.etree import ElementTree as ET

from tabulate import tabulate

from fxcurv.checks.policy import base
from fxcurv.checks.report import STATUSES, Report, Row, document, finding_of, grouped, names_of, text
from fxcurv.checks.sarif import as_sarif

__all__ = ["FORMATS", "markdown", "text"]


Reports = Sequence[Report]


# Human-readable -----------------------------------------------------------------------------------------------------


def markdown(reports: Reports) -> str:
    """Return a job summary in Markdown: a row per target, then a table of findings."""
    quantities = list(dict.fromkeys(quantity for report in reports for quantity in report.quantities))
    shares = [[f"{r.coverage(q):.1%}" if q in r.quantities else "" for q in quantities] for r in reports]
    lines = [
        [f"`{r.target}`", "✅" if r.ok else "❌", str(len(grouped(r.failures))), *share, f"{r.seconds:.1f}"]
        for r, share in zip(reports, shares, strict=True)
    ]
    headers = ["target", "", "failures", *quantities, "seconds"]
    parts = ["## fxcurv check", tabulate(lines, headers, tablefmt="github", disable_numparse=True)]
    found = [_cells(rows) for r in reports for rows in grouped(r.findings)]
    if found:
        parts.append(tabulate(found, ["target", "code", "severity", "where", "finding"], tablefmt="github"))
    return "\n\n".join(parts)


def _cells(rows: Sequence[Row]) -> list[str]:
    code, severity, where, said = finding_of(rows)
    escaped = said.replace("|", "\\|").replace("\n", " ")
    return [f"`{rows[0].target}`", code, severity, f"`{where}`" if where else "", escaped]


# Machine-readable -------------------------------------------------------------------------------------------------


def as_json(reports: Reports) -> str:
    """Return the JSON document described by `schema.json`."""
    return json.dumps(document(reports), indent=2, ensure_ascii=False)


def as_jsonl(reports: Reports) -> str:
    """Return one row per line."""
    return "\n".join(json.dumps(row.to_dict(), ensure_ascii=False) for report in reports for row in report.rows)


def as_csv(reports: Reports) -> str:
    """Return one line per target, in the format of timm's results."""
    quantities = list(dict.fromkeys(quantity for report in reports for quantity in report.quantities))
    statuses = [f"{quantity}_{status}" for quantity in quantities for status in STATUSES]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "input", "param_count", "nodes", *statuses, "coverage", "ok", "seconds"])
    for report in reports:
        counts = [report.statuses(quantity)[status] for quantity in quantities for status in STATUSES]
        coverage = min((report.coverage(quantity) for quantity in report.quantities), default=0.0)
        facts = [report.target, report.input, report.numel, report.nodes]
        writer.writerow([*facts, *counts, f"{coverage:.6f}", report.ok, f"{report.seconds:.3f}"])
    return out.getvalue().rstrip("\n")


def as_github(reports: Reports) -> str:
    """Return GitHub workflow commands, one per reason; GitHub annotates ten errors and ten warnings per step."""
    return "\n".join(_annotation(rows) for report in reports for rows in grouped(report.findings))


def _annotation(rows: Sequence[Row]) -> str:
    row = rows[0]
    level = "notice" if row.severity == "note" else str(row.severity)
    place = {"file": row.file, "line": row.line, "col": row.column} if row.file else {}
    properties = {"title": f"fxcurv ({row.code})", **place}
    help = f"\n  help: {row.suggestion}" if row.suggestion else ""
    listed = ",".join(f"{key}={_escaped(str(value), ':,')}" for key, value in properties.items())
    return f"::{level} {listed}::{_escaped(f'{row.target}: {names_of(rows)}{row.message}{help}')}"


def _escaped(text: str, more: str = "") -> str:
    """Escape the special characters of workflow commands; the runner unescapes them."""
    for character in f"%\r\n{more}":
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def as_junit(reports: Reports) -> str:
    """Return a suite per target, a case per parameter × quantity; frozen and suppressed rows are skipped."""
    suites = ET.Element("testsuites", name="fxcurv check")
    for report in reports:
        suites.append(_suite(report))
    totals = {key: sum(int(suite.get(key, "0")) for suite in suites) for key in ("tests", "failures", "errors")}
    suites.attrib |= {key: str(value) for key, value in totals.items()}
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode")


def _suite(report: Report) -> ET.Element:
    suite = ET.Element("testsuite", name=report.target, time=f"{report.seconds:.3f}")
    failing = {id(row) for row in report.failures}
    kinds: Counter[str] = Counter()
    for row in report.rows:
        case = ET.SubElement(suite, "testcase", name=f"{row.quantity}[{row.parameter}]", classname=report.target)
        kind = _outcome(row, id(row) in failing)
        if kind:
            kinds[kind] += 1
            said = {"message": row.suppressed or row.message or row.status, "type": row.code or row.status}
            ET.SubElement(case, kind, said).text = "\n".join(filter(None, (row.where, row.suggestion, *row.stack)))
    suite.attrib |= {
        "tests": str(len(report.rows)),
        "failures": str(kinds["failure"]),
        "errors": str(kinds["error"]),
        "skipped": str(kinds["skipped"]),
    }
    return suite


def _outcome(row: Row, fails: bool) -> str:
    if row.suppressed or base(row.status) == "frozen":
        return "skipped"
    return ("error" if base(row.status) == "error" else "failure") if fails else ""


FORMATS: dict[str, Callable[[Reports], str]] = {
    "text": text,
    "json": as_json,
    "jsonl": as_jsonl,
    "csv": as_csv,
    "github": as_github,
    "sarif": as_sarif,
    "junit": as_junit,
    "markdown": markdown,
}
"""Formats by name, for `--format`."""
