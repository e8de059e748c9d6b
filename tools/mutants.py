"""Mutation testing: small bugs, one at a time, each of which a named test must catch.

    python tools/mutants.py [PATTERN] [--list] [--jobs N] [--write]

Each mutant is a row of `mutants.toml`: a file, a text that occurs there once, the text with the bug, and a test. The
sources are copied to a temporary folder, where first all tests must pass; then each test must fail with its bug, by a
failure and not by an error. PATTERN selects mutants by name, as in a shell; `--list` prints the table; `--write` writes
tools/results/mutants.md. Exits with 1 where a test misses its bug, and with the name of a row that no longer fits.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from queue import Queue

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tools/mutants.toml"
PAGE = ROOT / "tools/results/mutants.md"
SOURCES = ("fxcurv", "passes", "tests", "tools", "pyproject.toml", "README.md")
TIMEOUT = 300.0  # seconds for one test; a bug may make a loop endless


@dataclass(frozen=True)
class Mutant:
    """A row of the table."""

    name: str
    file: str
    find: str
    replace: str
    test: str

    def mutated(self, root: Path = ROOT) -> str:
        """The text of the file with the bug; a SystemExit where the row does not fit the file."""
        text = (root / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.find)) != 1:
            raise SystemExit(f"{self.name}: the text to replace occurs {count} times in {self.file}; mend the row")
        return text.replace(self.find, self.replace)


def read(table: Path = TABLE) -> list[Mutant]:
    """The rows of the table, each named `room.name`."""
    rooms = tomllib.loads(table.read_text(encoding="utf-8"))
    return [Mutant(f"{room}.{name}", **row) for room, rows in rooms.items() for name, row in rows.items()]


# Running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Whether the test caught the mutant, and how pytest sums up what it ran."""

    mutant: Mutant
    caught: bool
    summary: str
    seconds: float


def copied(folder: Path) -> Path:
    """The sources in a folder of their own, with their modification times, by which Python knows its bytecode."""
    for name in SOURCES:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    return folder


def run_pytest(folder: Path, tests: Sequence[str], timeout: float | None = None, **variables: str) -> tuple[int, str]:
    """The exit status of pytest on some tests, and the output."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    ended = subprocess.run(
        command, cwd=folder, env=environment, timeout=timeout, capture_output=True, encoding="utf-8", errors="replace"
    )
    return ended.returncode, ended.stderr + ended.stdout


def summary_of(printed: str) -> str:
    """The last line of pytest's output, `1 failed in 0.12s`."""
    return (printed.splitlines() or [""])[-1]


def tried(mutant: Mutant, folder: Path) -> Verdict:
    """Run the test of a mutant in a copy of the sources, which is as it was afterwards."""
    began, path = time.monotonic(), folder / mutant.file
    path.write_text(mutant.mutated(folder), encoding="utf-8")
    try:
        status, printed = run_pytest(folder, [mutant.test], TIMEOUT, PYTHONDONTWRITEBYTECODE="1")
        summary = summary_of(printed)
        caught = status == 1 and re.search(r"\b[1-9]\d* failed\b", summary) is not None and "error" not in summary
    except subprocess.TimeoutExpired:
        caught, summary = False, f"no result within {TIMEOUT:g} s"
    finally:
        shutil.copy2(ROOT / mutant.file, path)
    return Verdict(mutant, caught, summary, time.monotonic() - began)


def verdicts(mutants: Sequence[Mutant], jobs: int) -> list[Verdict]:
    """Try all mutants, `jobs` at a time, each job in a copy of its own; a SystemExit if a test fails without a bug."""
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(jobs) as pool:
        first = copied(Path(temporary) / "0")
        status, printed = run_pytest(first, list(dict.fromkeys(m.test for m in mutants)))  # leaves bytecode for all
        if status:
            raise SystemExit(f"{printed}\nthe tests do not pass without any mutant")
        print(f"without any mutant: {summary_of(printed)}", flush=True)
        free: Queue[Path] = Queue()
        for k in range(jobs):
            free.put(first if k == 0 else Path(shutil.copytree(first, Path(temporary) / str(k))))

        def one(mutant: Mutant) -> Verdict:
            folder = free.get()
            try:
                verdict = tried(mutant, folder)
            finally:
                free.put(folder)
            outcome = "caught" if verdict.caught else f"SURVIVED: {verdict.summary}"
            print(f"{mutant.name}: {outcome} ({verdict.seconds:.1f} s)", flush=True)
            return verdict

        return list(pool.map(one, mutants))


# Tables -----------------------------------------------------------------------------------------------------------


def code(text: str) -> str:
    """A text as code in a cell of a Markdown table."""
    return "`" + " ".join(text.split()).replace("|", "\\|") + "`"


def row(verdict: Verdict) -> tuple[str, ...]:
    """A row of the generated page."""
    m = verdict.mutant
    change = f"{code(m.find)} → {code(m.replace)}" if m.replace else f"{code(m.find)} removed"
    return m.name, code(m.file), change, code(m.test), "yes" if verdict.caught else "no"


def page(found: Sequence[Verdict]) -> str:
    """The generated page."""
    headers = ("name", "file", "change", "test that catches it", "caught")
    lines = [f"| {' | '.join(cells)} |" for cells in (headers, ("---",) * len(headers), *map(row, found))]
    head = ["<!-- python tools/mutants.py --write -->", "", "# Mutants", "", "`python tools/mutants.py --write`", ""]
    return "\n".join((*head, f"{sum(v.caught for v in found)} of {len(found)} are caught.", "", *lines, ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*", help="names of mutants, as in a shell")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are tried at once")
    parser.add_argument("--write", action="store_true", help="write tools/results/mutants.md")
    arguments = parser.parse_args()
    mutants = read()
    for mutant in mutants:
        mutant.mutated()
    chosen = [m for m in mutants if fnmatchcase(m.name, arguments.pattern)]
    if not chosen:
        parser.error(f"no mutant is called {arguments.pattern}")
    if arguments.write and len(chosen) < len(mutants):
        parser.error("--write takes all mutants, and no pattern")
    if arguments.list:
        print(tabulate([(m.name, m.file, m.find, m.replace, m.test) for m in chosen], tablefmt="plain"))
        return 0
    found = verdicts(chosen, max(1, arguments.jobs))
    if arguments.write:
        PAGE.write_text(page(found), encoding="utf-8")
    survivors = [v.mutant.name for v in found if not v.caught]
    print(f"{len(found) - len(survivors)} of {len(found)} mutants caught", *survivors, sep="\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
