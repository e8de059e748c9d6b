"""The rooms: no import circle, late ones included; private names of torch in one file; quick imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import fxcurv

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ("fxcurv", "passes")
    for path in (ROOT / room).rglob("*.py")
}


def imported(name: str) -> Iterator[tuple[str, ast.stmt]]:
    """Every module of ours that a module imports, wherever the import stands."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in found:
            module = target if target in FILES else target.rpartition(".")[0]
            if module in FILES:
                yield module, node


def test_there_is_no_import_circle() -> None:
    graph: nx.DiGraph[str] = nx.DiGraph((a, b) for a in FILES if a != "fxcurv" for b, _ in imported(a))
    assert not [circle for circle in nx.strongly_connected_components(graph) if len(circle) > 1]
    assert not [a for a in graph if graph.has_edge(a, a)]


@pytest.mark.parametrize("name", FILES)
def test_no_import_is_late_or_hidden(name: str) -> None:
    """Imports of our own modules stand at the top level; none is for type checkers alone."""
    top = ast.parse(FILES[name].read_text(encoding="utf-8")).body
    lines = {node.lineno for node in top if isinstance(node, ast.Import | ast.ImportFrom)}
    assert not [module for module, node in imported(name) if node.lineno not in lines]


PRIVATE = re.compile(
    r"torch\._(?!_)\w+|torch\.\w+\._(?!_)\w+|\b_pytree|\._(schema|overloadname|cdata|version|parameters|buffers|base)\b|\b_get_name"
)


@pytest.mark.parametrize("name", [name for name in FILES if name != "fxcurv.core.torch_compat"])
def test_private_names_of_torch_are_in_one_file(name: str) -> None:
    source = FILES[name].read_text(encoding="utf-8")
    assert not [match[0] for match in PRIVATE.finditer(source) if "torch.__version__" not in match[0]]


def test_the_package_holds_rooms() -> None:
    modules = {path.name for path in (ROOT / "fxcurv").glob("*.py")}
    assert modules == {"__init__.py", "__main__.py", "api.py"}
    assert all(
        (path / "__init__.py").is_file()
        for path in (ROOT / "fxcurv").iterdir()
        if path.name[0] != "_" and path.is_dir()
    )


def test_type_checkers_see_the_public_names() -> None:
    stub = (ROOT / "fxcurv" / "__init__.pyi").read_text(encoding="utf-8")
    seen = {name: module for module, name in re.findall(r"^from (\S+) import (\w+) as \2$", stub, re.MULTILINE)}
    modules = {"recipes", "testing", "quantities"}
    assert {name: home for name, home in seen.items() if name not in {*modules, "__version__"}} == vars(fxcurv)["_HOME"]
    assert set(dir(fxcurv)) >= set(seen)
    assert all(getattr(fxcurv, name) is not None for name in seen)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fxcurv.nothing  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("statement", ["import fxcurv", "import passes", "import fxcurv.api", "import fxcurv.cli.main"])
def test_imports_are_quick(statement: str) -> None:
    """What is slow to import is imported when it is needed: dynamo and sympy at the first trace."""
    slow = ("torch._dynamo", "torch._inductor", "sympy", "torchvision", "timm", "triton", "scipy", "matplotlib")
    code = f"{statement}; import sys; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
