"""SARIF 2.1.0: findings in the format of code scanning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from fxcurv.checks.codes import CODES, Code
from fxcurv.checks.report import Report, Row
from fxcurv.core.version import __version__

__all__ = ["as_sarif"]


SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def as_sarif(reports: Sequence[Report]) -> str:
    """Return one run with a result per finding; suppressed findings are included and marked."""
    rows = [row for report in reports for row in report.rows if row.severity is not None]
    usage = sorted({row.code for row in rows})
    driver = {"name": "fxcurv", "version": __version__, "rules": [_rule(CODES[code]) for code in usage]}
    results = [_result(row, usage.index(row.code)) for row in rows]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False)


def _rule(code: Code) -> dict[str, Any]:
    return {
        "id": code.code,
        "shortDescription": {"text": code.title},
        "fullDescription": {"text": code.explanation},
        "help": {"text": code.remedy},
        "defaultConfiguration": {"level": code.severity},
        "properties": {"kind": code.kind},
    }


def _result(row: Row, index: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": row.code,
        "ruleIndex": index,
        "level": row.severity,
        "message": {"text": row.text or row.status},
        "locations": [_location(row)],
        "partialFingerprints": {"fxcurv/v1": row.fingerprint},
        "properties": {"target": row.target, "quantity": row.quantity, "status": row.status},
    }
    if row.stack:
        result["properties"]["stack"] = list(row.stack)
    if row.suppressed:
        result["suppressions"] = [{"kind": "external", "justification": row.suppressed}]
    return result


def _location(row: Row) -> dict[str, Any]:
    name = f"{row.target}/{row.parameter}" if row.parameter else row.target
    location: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": name, "kind": "member"}]}
    if row.file:
        region = {"startLine": row.line, "startColumn": row.column}
        location["physicalLocation"] = {"artifactLocation": {"uri": quote(row.file)}, "region": region}
    return location
