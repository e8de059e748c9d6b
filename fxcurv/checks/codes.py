"""The fixed table of codes, read from codes.toml: meaning, kind, severity and remedy. Codes are never reused.

FXC0xx usage and environment, 1xx capture, 2xx lowering, 3xx rules, 4xx semantics, 5xx cost, 9xx defects.
"""

from __future__ import annotations

import difflib
import json
import textwrap
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fxcurv.core.errors import QuantityError

__all__ = ["CODES", "Category", "Code", "Severity", "as_json", "explain", "read"]


Severity = Literal["error", "warning", "note"]


Category = Literal["unsupportable", "not-yet", "replace", "misconfigured", "defect", "information"]
"""Place of the fix: none (undefined), fxcurv later, the model, the call, fxcurv now; or nothing is broken."""


@dataclass(frozen=True)
class Code:
    """A code of an error or a finding."""

    code: str
    title: str
    kind: Category
    severity: Severity
    explanation: str
    remedy: str

    def __str__(self) -> str:
        body = textwrap.fill(self.explanation, 100)
        return f"{self.code}  {self.title}  ({self.kind}, {self.severity})\n\n{body}\n\nRemedy: {self.remedy}"


def explain(code: str) -> Code:
    """Return the row of a code; upper or lower case."""
    if code.upper() in CODES:
        return CODES[code.upper()]
    close = difflib.get_close_matches(code.upper(), CODES, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`fxcurv codes` lists all codes"
    raise QuantityError(f"there is no code {code!r}", remedy=hint, code="FXC007")


def as_json(codes: Iterable[Code]) -> str:
    """Return the table as JSON."""
    return json.dumps([asdict(code) for code in codes], indent=2)


def read(text: str) -> dict[str, Code]:
    """Parse a TOML table into rows by code."""
    rows = tomllib.loads(text).items()
    return {code: Code(code, severity=row.pop("severity", "error"), **row) for code, row in rows}


CODES: dict[str, Code] = read(Path(__file__).with_name("codes.toml").read_text(encoding="utf-8"))
