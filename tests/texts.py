"""Printed text against what a page shows."""

from __future__ import annotations

import itertools
import math
import re

__all__ = ["matches", "same_line"]


# Printed text -----------------------------------------------------------------------------------------------------


DECIMAL = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


def matches(expected: str, printed: str) -> bool:
    """Whether the lines of `expected`, in which `...` stands for any lines, are those of `printed`."""
    wanted, there = expected.rstrip().splitlines(), [line.rstrip() for line in printed.rstrip().splitlines()]
    parts = [list(part) for gap, part in itertools.groupby(wanted, "...".__eq__) if not gap]
    at = 0
    for part in parts:
        places = range(at, len(there) - len(part) + 1)
        if part is parts[0] and wanted[0] != "...":
            places = places[:1]
        if part is parts[-1] and wanted[-1] != "...":
            places = places[-1:]
        found = (i for i in places if all(map(same_line, part, there[i:])))
        if (place := next(found, None)) is None:
            return False
        at = place + len(part)
    return wanted[-1] == "..." or at == len(there)


def same_line(expected: str, printed: str) -> bool:
    if expected.endswith("..."):
        expected = expected.removesuffix("...").rstrip()
        printed = printed[: len(expected)]
    if expected == printed:
        return True
    ours, theirs = DECIMAL.findall(expected), DECIMAL.findall(printed)
    close = len(ours) == len(theirs) and all(map(_close, map(float, ours), map(float, theirs)))
    return close and bool(ours) and DECIMAL.sub("", expected).split() == DECIMAL.sub("", printed).split()


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=2e-3)
