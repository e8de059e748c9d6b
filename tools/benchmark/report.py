"""The report: a table for the terminal, bench.csv, bench.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmark.measure import Line
from benchmark.problems import Problem
from benchmark.rows import side_by_side


@dataclass(frozen=True)
class Column:
    header: str
    format: str = ""


COLUMNS: dict[str, Column] = {
    "problem": Column("problem"),
    "library": Column("library"),
    "quantity": Column("quantity"),
    "ms": Column("median ms", ".1f"),
    "spread": Column("spread %", ".0f"),
    "ratio": Column("× gradient", ".2f"),
    "half_ms": Column("first at N/2, ms", ".1f"),
    "compile_s": Column("compile s", ".2f"),
    "peak_mib": Column("peak MiB", ".1f"),
    "predicted_ms": Column("predicted ms", ".1f"),
    "predicted_mib": Column("predicted MiB", ".1f"),
    "covers": Column("covers %", ".1f"),
    "note": Column("note"),
}
"""The tables' columns; in the Markdown those are left out that no line fills."""


def table(lines: Sequence[Line], style: str, without: Iterable[str] = ()) -> str:
    names = [name for name in COLUMNS if name not in without]
    columns = [COLUMNS[name] for name in names]
    return tabulate(
        [[getattr(line, name) for name in names] for line in lines],
        headers=[column.header for column in columns],
        tablefmt=style,
        floatfmt=tuple(column.format for column in columns),
        missingval="",
    )


def empty(lines: Sequence[Line]) -> set[str]:
    """The columns that no line fills."""
    return {name for name in COLUMNS if all(getattr(line, name) in (None, "") for line in lines)}


def by_problem(lines: Iterable[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.problem, []).append(line)
    return found


# Markdown ---------------------------------------------------------------------------------------------------------

LEGEND = (
    "median time in gradients (in parentheses the share of the elements that got a result, where it is not all of "
    "them); –: the library refuses; > limit: not done within the limit"
)


def overview(lines: Sequence[Line], style: str = "github") -> str:
    """The times in gradients, a column for every problem."""
    problems = by_problem(line for line in lines if line.state != "skipped")
    found = {(line.problem, line.library, line.quantity): line for line in lines if line.state != "skipped"}
    rows = side_by_side((library, quantity) for _, library, quantity in found)
    cells = [
        [lib, quantity, *(short(found.get((name, lib, quantity))) for name in problems)] for _, lib, quantity in rows
    ]
    align = ("left", "left", *("right" for _ in problems))
    return tabulate(
        cells, headers=["library", "quantity", *problems], tablefmt=style, colalign=align, disable_numparse=True
    )


def short(line: Line | None) -> str:
    """A ratio, with the share that it covers where that is not all; or why there is none."""
    if line is None or (line.state == "timed" and line.ratio is None):
        return ""
    if line.ratio is None:
        return {"over the limit": "> limit", "refused": "–"}.get(line.state, line.state)
    return f"{digits(line.ratio)} ({line.covers:.0f} %)" if partial(line) else digits(line.ratio)


def partial(line: Line) -> bool:
    """Whether a part of the parameters that is worth mentioning got nothing."""
    return line.covers is not None and line.covers < 99


def digits(ratio: float) -> str:
    """Three digits or so."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def page(about: Sequence[str], lines: Sequence[Line], problems: Mapping[str, Problem]) -> str:
    """The command, the facts and the overview, then a table for every problem."""
    facts = "\n".join(f"- {fact}" for fact in (*about[1:], f"cells: {LEGEND}"))
    left_out = empty(lines) | {"problem"}
    parts = [f"<!-- {about[0]} -->", "# Benchmark", f"`{about[0]}`", facts, overview(lines)]
    for name, found in by_problem(lines).items():
        skipped = found[0].note if found[0].state == "skipped" else None
        parts += [f"## {name}", f"{problems[name]}", skipped or table(found, "github", left_out)]
    return "\n\n".join(parts) + "\n"


# Files ------------------------------------------------------------------------------------------------------------


def as_csv(about: Sequence[str], names: Sequence[str], records: Iterable[Sequence[object]]) -> str:
    """The facts as comments, then the records."""
    text = io.StringIO()
    text.writelines(f"# {fact}\n" for fact in about)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(["" if c is None else f"{c:.3f}" if isinstance(c, float) else c for c in r] for r in records)
    return text.getvalue()


def read(folder: Path) -> tuple[list[str], list[Line]]:
    """The facts and the lines of a bench.csv; nothing where there is none."""
    path = folder / "bench.csv"
    text = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    facts = [line.removeprefix("# ") for line in text if line.startswith("# ")]
    kinds = {field.name: str if "str" in str(field.type).split(" | ") else float for field in fields(Line)}
    records = csv.DictReader(line for line in text if not line.startswith("# "))
    return facts, [Line(**{name: parsed(kinds[name], value) for name, value in r.items()}) for r in records]


def parsed(kind: type[str] | type[float], value: str) -> Any:
    """A value of a table; an empty number is None."""
    return value if kind is str else float(value) if value else None


def write(folder: Path, about: Sequence[str], lines: Sequence[Line], problems: Mapping[str, Problem]) -> list[Path]:
    """bench.csv and bench.md, each beginning with the command that made it."""
    names = [field.name for field in fields(Line)]
    records = ([getattr(line, name) for name in names] for line in lines)
    contents = {"bench.csv": as_csv(about, names, records), "bench.md": page(about, lines, problems)}
    return write_texts(folder, contents)


def write_texts(folder: Path, contents: Mapping[str, str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in contents]
