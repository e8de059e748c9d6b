"""Policy of a check: passing statuses, required coverage, and findings that do not count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol

from fxcurv.checks.codes import CODES, Severity

__all__ = ["Allowance", "FailOn", "Finding", "Level", "Policy", "Require", "base"]


Level = Literal["static", "shape", "numeric"]


Require = Literal["exact", "approx", "any"]


FailOn = Literal["error", "warning"]


_PASSING: dict[Require, tuple[str, ...]] = {
    "exact": ("exact",),
    "approx": ("exact", "approx"),
    "any": ("exact", "approx", "fallback"),
}


_WITHOUT_VALUE = ("frozen", "unreached")  # correctly: not requested, or zero


def base(status: str) -> str:
    """Return `approx` for `approx(diagonal)`."""
    return status.partition("(")[0]


class Finding(Protocol):
    """Fields of a row that a policy reads."""

    @property
    def target(self) -> str: ...
    @property
    def parameter(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def code(self) -> str: ...
    @property
    def numel(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Allowance:
    """An accepted finding, with the reason; `parameter` is a pattern."""

    code: str
    reason: str
    parameter: str = "*"
    target: str | None = None

    def covers(self, row: Finding) -> bool:
        """Whether this allowance covers the finding."""
        here = self.target is None or self.target == row.target
        return here and row.code == self.code and fnmatchcase(row.parameter, self.parameter)


@dataclass(frozen=True)
class Policy:
    """Policy of a check: `require`, the worst passing status, for at least `min_coverage` of the trainable entries.

    A finding fails at severity `fail_on` or above, unless its code is not selected, is ignored or allowed, or its
    fingerprint is `known` from a baseline.
    """

    require: Require = "approx"
    min_coverage: float = 1.0
    fail_on: FailOn = "error"
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    allow: tuple[Allowance, ...] = ()
    known: frozenset[str] = frozenset()

    @property
    def fatal(self) -> tuple[Severity, ...]:
        """Severities that make a check fail."""
        return ("error",) if self.fail_on == "error" else ("error", "warning")

    def met(self, status: str) -> bool:
        """Whether a status meets the requirement."""
        return base(status) in _PASSING[self.require]

    def coverage(self, rows: Sequence[Finding]) -> float:
        """Return the share of trainable entries whose status meets the requirement; 0 if the whole target failed."""
        trainable = [row for row in rows if row.parameter and base(row.status) not in _WITHOUT_VALUE]
        if any(not row.parameter for row in rows):
            return 0.0
        covered = sum(row.numel for row in trainable if self.met(row.status))
        return covered / sum(row.numel for row in trainable) if trainable else 1.0

    def severity(self, status: str, code: str, enough: bool) -> Severity | None:
        """Return the severity of a row, or None without a finding; `enough`: the coverage meets the policy."""
        if base(status) == "error":
            return "error"
        if not self.met(status) and base(status) not in _WITHOUT_VALUE:
            return "warning" if enough else "error"
        return CODES[code].severity if code else None

    def suppressed(self, row: Finding) -> str:
        """Return the reason why a finding does not count, or an empty string."""
        if self.ignore and row.code.startswith(self.ignore):
            return "ignored"
        if self.select and not row.code.startswith(self.select):
            return "not selected"
        for allowance in self.allow:
            if allowance.covers(row):
                return f"allowed: {allowance.reason}"
        return "baseline" if row.fingerprint in self.known else ""
