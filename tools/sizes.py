"""The size budgets of the code, checked: `python tools/sizes.py` prints a table and exits 1 where one is broken.

A file is short enough to read in one go and long enough to be worth opening; a function does one thing. Lines are
counted as they stand, docstrings, comments and blank lines included; a function begins at its `def`, and a nested
function counts on its own and within the outer one.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fxcurv", "passes")
FILE_LINES = range(10, 501)  # one pass a file, however short
ANY_SIZE = {"__init__.py", "__main__.py", "version.py"}  # a list of names or one call; the upper bound still holds
FUNCTION_LINES = 60
MODULES = {"passes": 20}  # a package holds at most so many modules, by default 12; `__init__` not counted
MEDIAN_LINES = 8  # over all functions of a folder
PARAMETERS = 5  # besides self, cls, tensors, *args and **kwargs
MANY_PARAMETERS = {  # public verbs: each option a keyword of its own
    "fxcurv/api.py:compile",
    "fxcurv/api.py:Compiled.accumulate",
    "fxcurv/checks/levels.py:check",
    "fxcurv/tangent_kernel/kernel.py:ntk",
    "fxcurv/matrixfree/products.py:fisher_operator",
    "fxcurv/matrixfree/products.py:ggn_operator",
    "fxcurv/matrixfree/products.py:hessian_operator",
    "fxcurv/testing/compatibility.py:assert_compatible",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Measured:
    """One function: where it is, its lines, and its parameters that count against the budget."""

    where: str
    line: int
    lines: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class File:
    """One file: its lines, how many of them are docstring, and its functions."""

    path: str
    lines: int
    docstring: int
    functions: tuple[Measured, ...]


def walk(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node that can hold a docstring, with its dotted name."""
    if isinstance(node, ast.Module | ast.ClassDef | Function):
        yield prefix, node
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | Function)
        yield from walk(child, ".".join(filter(None, (prefix, child.name))) if named else prefix)


def parameters(function: Function) -> tuple[str, ...]:
    """The parameters besides self, cls and those annotated as tensors."""
    a = function.args
    named = [p for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.arg not in ("self", "cls")]
    return tuple(p.arg for p in named if p.annotation is None or "Tensor" not in ast.unparse(p.annotation))


def docstring_lines(node: ast.Module | ast.ClassDef | Function) -> int:
    if ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def measure(path: Path) -> File:
    name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    functions: list[Measured] = []
    docstring = 0
    for qualified, node in walk(ast.parse(text, filename=name)):
        assert isinstance(node, ast.Module | ast.ClassDef | Function)
        docstring += docstring_lines(node)
        if isinstance(node, Function):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            functions.append(Measured(f"{name}:{qualified}", node.lineno, lines, parameters(node)))
    return File(name, len(text.splitlines()), docstring, tuple(functions))


def violations(folder: str, files: list[File]) -> Iterator[str]:
    """What breaks a budget, and what would mend it."""
    for file in files:
        allowed = range(FILE_LINES.stop) if Path(file.path).name in ANY_SIZE else FILE_LINES
        if file.lines not in allowed:
            remedy = "split it by concept" if file.lines >= FILE_LINES.stop else "join it to the file it belongs with"
            yield f"{file.path}: {file.lines} lines, not {allowed.start}–{allowed.stop - 1}; {remedy}"
        for f in file.functions:
            at = f"{f.where} (line {f.line})"
            if f.lines > FUNCTION_LINES:
                yield f"{at}: {f.lines} lines, more than {FUNCTION_LINES}; take a step out of it"
            if len(f.parameters) > PARAMETERS and f.where not in MANY_PARAMETERS:
                yield f"{at}: {len(f.parameters)} parameters ({', '.join(f.parameters)}); put options in a dataclass"
    packages: dict[str, int] = Counter(str(Path(f.path).parent) for f in files if Path(f.path).name not in ANY_SIZE)
    for package, count in packages.items():
        if count > (most := MODULES.get(package, 12)):
            yield f"{package}: {count} modules, more than {most}; divide it by concept"
    lines = [f.lines for file in files for f in file.functions]
    if lines and statistics.median(lines) > MEDIAN_LINES:
        yield f"{folder}: median function of {statistics.median(lines):g} lines, more than {MEDIAN_LINES}"


def row(name: str, files: list[File]) -> list[object]:
    lines, functions = sum(f.lines for f in files), [f.lines for file in files for f in file.functions]
    doc = 100 * sum(f.docstring for f in files) / lines if lines else 0.0
    if not functions:
        return [name, lines, 0, None, None, doc]
    return [name, lines, len(functions), statistics.median(functions), max(functions), doc]


def main() -> int:
    rows: list[list[object]] = []
    found: list[str] = []
    for folder in FOLDERS:
        files = [measure(path) for path in sorted((ROOT / folder).rglob("*.py"))]
        rows += [row(file.path, [file]) for file in files]
        rows.append(row(f"{folder}: {len(files)} files", files))
        found += violations(folder, files)
    headers = ["file", "lines", "functions", "median", "max", "doc %"]
    print(tabulate(rows, headers=headers, floatfmt=("", "", "", "g", "", ".0f")))
    for message in found:
        print(message)
    print(f"{len(found)} of the size budgets broken" if found else "all size budgets hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
