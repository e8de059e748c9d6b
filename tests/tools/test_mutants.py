"""The table of mutants: every row fits its file, and names a test that exists."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("mutants", ROOT / "tools/mutants.py")
assert SPEC is not None
assert SPEC.loader is not None
tool = sys.modules["mutants"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)
MUTANTS = tool.read()


@cache
def functions(path: Path) -> set[str]:
    """The functions of a file, those of classes as `Class::function`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + f.name for f in inner if isinstance(f, ast.FunctionDef)}
    return found


def test_there_are_many_with_different_names() -> None:
    assert len(MUTANTS) >= 60
    assert [name for name, count in Counter(m.name for m in MUTANTS).items() if count > 1] == []
    assert len({(m.file, m.find, m.replace) for m in MUTANTS}) == len(MUTANTS)


def test_every_row_fits_its_file() -> None:
    """The text occurs there once, another takes its place, and the file with the bug is Python."""
    for mutant in MUTANTS:
        assert mutant.find != mutant.replace, f"{mutant.name} changes nothing"
        ast.parse(mutant.mutated())


def test_every_row_names_a_test_that_exists() -> None:
    for mutant in MUTANTS:
        file, _, function = mutant.test.partition("[")[0].partition("::")
        assert function in functions(ROOT / file), f"{mutant.name}: there is no {function} in {file}"


@pytest.mark.parametrize(("text", "count"), [("y = 1", 0), ("x = 1\nx = 1", 2)])
def test_a_row_that_does_not_fit_is_named(text: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(SystemExit, match=f"ir.stale: the text to replace occurs {count} times in a.py"):
        tool.Mutant("ir.stale", "a.py", "x = 1", "x = 2", "b.py::test_x").mutated(tmp_path)


def test_the_page_has_a_row_for_each() -> None:
    mutant = tool.Mutant("ir.example", "a.py", "a | b", "", "b.py::test_x[c]")
    page = tool.page([tool.Verdict(mutant, True, "1 failed in 1.00s", 1.0)])
    assert "1 of 1 are caught." in page
    assert page.endswith("| ir.example | `a.py` | `a \\| b` removed | `b.py::test_x[c]` | yes |\n")


def test_the_committed_page_has_every_mutant_and_all_are_caught() -> None:
    rows = [line.split(" | ") for line in tool.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [(row[0].removeprefix("| "), row[-1]) for row in rows[2:]] == [(m.name, "yes |") for m in MUTANTS]
