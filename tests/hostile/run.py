"""Many cases in turn, and the table of their outcomes by construct."""

from __future__ import annotations

import functools
import itertools
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from hostile.cases import Case, draw, script, smaller
from hostile.judge import BAD, Outcome
from hostile.processes import Pair
from hostile.rows import CONSTRUCTS

__all__ = ["RESULTS", "outcomes", "report", "table"]

RESULTS = Path(__file__).resolve().parents[2] / "tools" / "results" / "hostile.md"

Found = tuple[Case, Outcome]


def outcomes(seed: int, minutes: float, jobs: int) -> Iterator[Found]:
    """Cases from a seed on, until the time is over. The first bad case of a construct is made smaller."""
    end, seeds, reported = time.monotonic() + 60 * minutes, itertools.count(seed), set[str]()
    found: queue.Queue[Found | Exception | None] = queue.Queue()

    def work() -> None:
        try:
            with Pair() as pair:
                while time.monotonic() < end:
                    case = draw(next(seeds))
                    one = pair.outcome(case)
                    if one.kind in BAD and case.construct not in reported:
                        reported.add(case.construct)
                        case = smaller(case, functools.partial(_still, pair, one.kind, end))
                    found.put((case, one))
        except Exception as error:
            found.put(error)
        found.put(None)

    for thread in [threading.Thread(target=work, daemon=True) for _ in range(jobs)]:
        thread.start()
    running = jobs
    while running:
        match found.get():
            case None:
                running -= 1
            case Exception() as error:
                raise error
            case one:
                yield one


def _still(pair: Pair, kind: str, end: float, case: Case) -> bool:
    """Whether a case has this outcome; not tried when the time is over."""
    return time.monotonic() < end and pair.outcome(case).kind == kind


def report(seed: int, minutes: float, jobs: int, results: Path = RESULTS) -> int:
    """Print the first bad case of each construct as a script, and the table, which is also written; 1 if any is bad."""
    began, seen, found = sum(os.times()[:4]), set[str](), []
    for case, one in outcomes(seed, minutes, jobs):
        found.append((case, one))
        if one.kind in BAD and case.construct not in seen:
            seen.add(case.construct)
            print(f"\n# {case.construct}, seed {case.seed}: {one}\n{script(case)}", flush=True)
    each = (sum(os.times()[:4]) - began) / max(len(found), 1)
    bad = sum(one.kind in BAD for _, one in found)
    command = f"python tools/stress.py --kind hostile --minutes {minutes:g} --jobs {jobs} --seed {seed}"
    last = f"{len(found)} models, {bad} wrong, dropped or crashed; {each:.1f} s of processor time each."
    text = f"# Hostile models\n\n    {command}\n\n{table(found)}\n\n{last}\n"
    results.write_text(text, encoding="utf-8")
    print(text)
    return 1 if bad else 0


def table(found: Iterable[Found]) -> str:
    """A row per kind and a row per construct: how many models were right, refused, wrong, dropped or crashed.

    `refusal due` are the models that the oracle refuses too.
    """
    by_construct: dict[str, list[Outcome]] = {}
    for case, one in found:
        by_construct.setdefault(case.construct, []).append(one)
    kinds: dict[str, list[Outcome]] = {}
    for name, row in CONSTRUCTS.items():
        kinds.setdefault(row.kind, []).extend(by_construct.get(name, ()))
    headers = ("models", "right", "refusal due", "refused", *reversed(BAD), "codes of refusals")
    rows = [(name, row.kind, *_counts(by_construct[name])) for name, row in CONSTRUCTS.items() if name in by_construct]
    by_kind = [(kind, *_counts(outcomes)) for kind, outcomes in kinds.items() if outcomes]
    first = tabulate(by_kind, ("kind", *headers), tablefmt="github")
    return first + "\n\n" + tabulate(rows, ("construct", "kind", *headers), tablefmt="github")


def _counts(found: Sequence[Outcome]) -> tuple[object, ...]:
    counts = Counter("refusal due" if one.due else one.kind for one in found)
    codes = ", ".join(sorted({code for one in found for code in one.codes}))
    names = ("right", "refusal due", "refused", *reversed(BAD))
    return len(found), *(counts[name] or "" for name in names), codes
