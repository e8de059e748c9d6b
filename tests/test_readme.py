"""The README is right: its code runs and prints what it says, its commands and tables agree with the code.

Python blocks run in one namespace, in the order of the page. Lines of `sh` blocks that call fxcurv run in process, in a
folder of their own (the demo is replaced: it takes longer than a test may); those that install or test are compared
with pyproject.toml and with what CI runs. A `text` or `mermaid` block is what the block before it prints: a line `...`
stands for any lines, at the end of a line for its rest, and numbers with a decimal point need only agree to three
digits.
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import tomllib
from collections import defaultdict
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from comparison import check_against_oracle
from texts import matches
from torch import nn

import fxcurv
import passes.lowering_table
from fxcurv.cli import demo
from fxcurv.cli import main as cli
from fxcurv.cli.config import load
from fxcurv.contractions.definitions import Gram
from fxcurv.contractions.statistic import Statistic
from fxcurv.ir import rules
from fxcurv.ir.nodes import module_of
from fxcurv.quantities.factors import Factor
from fxcurv.quantities.protocol import Sums, Used

ROOT = Path(__file__).resolve().parent.parent


README = (ROOT / "README.md").read_text(encoding="utf-8")


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


# Blocks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block and the line of the page on which its content begins."""

    language: str
    content: str
    line: int


def blocks(page: str) -> list[Block]:
    found = re.finditer(r"^```(.*)\n((?s:.*?))^```$", page, re.MULTILINE)
    return [Block(m[1], m[2], page.count("\n", 0, m.start(2)) + 1) for m in found]


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Execute a block of code."""
    if block.language == "python":
        source = "\n" * (block.line - 1) + block.content  # a traceback then names the line of the page
        exec(compile(source, "README.md", "exec"), namespace)
    elif block.language == "sh":
        for line in block.content.splitlines():
            command, _, comment = line.partition("#")
            expected = re.match(r" exits with (\d)", comment)
            for part in command.split("&&"):
                call(shlex.split(part), int(expected[1]) if expected else 0)
    elif block.language == "toml":
        Path("pyproject.toml").write_text(block.content, encoding="utf-8")
        assert load({}, {}, Path.cwd()).targets
        Path("pyproject.toml").unlink()
    elif block.language == "yaml":
        check_example(yaml.safe_load(block.content))
    else:
        pytest.fail(f"README.md, line {block.line}: a block in {block.language or 'no language'}: how is it tested?")


def check_example(example: dict[str, Any]) -> None:
    """The hook and the action that an example names exist, and the action has the inputs that it is given."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    for repository in example.get("repos", []):
        assert [hook["id"] for hook in repository["hooks"]] == [hook["id"] for hook in hooks]
    for step in example.get("steps", []):
        folder = step["uses"].partition("@")[0].partition("/fxcurv/")[2]
        action = yaml.safe_load((ROOT / folder / "action.yml").read_text(encoding="utf-8"))
        assert set(step["with"]) <= set(action["inputs"])


def call(words: Sequence[str], expected: int) -> None:
    """Run a command of fxcurv, or check one that is not for a test to run."""
    match words:
        case ["fxcurv", *arguments]:
            assert cli.main(arguments) == expected, shlex.join(words)
        case ["pip", "install", what]:
            extras = re.fullmatch(r"\.\[([\w,]+)\]", what)
            assert extras, f"{what}: give the extras of this clone"
            assert set(extras[1].split(",")) <= set(EXTRAS)
        case ["python", "-m", "pytest", *_]:
            assert shlex.join(words) == command_of_ci()
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case _:
            pytest.fail(f"{shlex.join(words)}: how is it tested?")


def command_of_ci() -> str:
    """What .ci/run takes out of the page: the first match of its pattern."""
    pattern = re.search(r"grep -m1 -oE '([^']+)' README.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert pattern
    first = re.search(pattern[1].replace("[^", r"[^\n"), README)
    assert first
    return first[0].strip()


@contextmanager
def unchanged(*tables: MutableMapping[Any, Any]) -> Iterator[None]:
    """Undo what happens to the tables: the page adds an op to them."""
    copies = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, copy in zip(tables, copies, strict=True):
            table.clear()
            table.update(copy)


@pytest.fixture
def demos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The folders into which demos would have gone; commands write to a folder of the test."""
    asked: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run", lambda output, **_: asked.append(output))
    return asked


def test_readme(capsys: pytest.CaptureFixture[str], demos: list[Path], tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    with unchanged(rules.RULES, passes.lowering_table.LOWERINGS), torch.random.fork_rng(devices=[]):
        for block in blocks(README):
            if block.language in ("text", "mermaid"):
                assert matches(block.content, printed), f"README.md, line {block.line}: the code prints\n{printed}"
            else:
                run(block, namespace)
                printed = capsys.readouterr().out
        (sample,) = namespace["ROW"]
        canonical = check_against_oracle(sample).stages["canonical"]
        assert namespace["Asinh"] in {type(module_of(n)) for n in canonical.graph.find_nodes(op="call_module")}
    assert namespace["Asinh"] not in rules.RULES
    assert demos == [Path("fxcurv-demo")] * 2
    assert (tmp_path / "curvature.safetensors").is_file()


def test_installing_and_testing_come_first() -> None:
    """On a fresh machine the first block runs the demo and the second the tests, each as one command."""
    first, second = (block.content.splitlines() for block in blocks(README)[:2])
    assert first == ['pip install ".[demo]" && fxcurv demo']
    assert second == ['pip install ".[test]" && python -m pytest -q']


# Tables and names -------------------------------------------------------------------------------------------------


def table(header: str) -> list[list[str]]:
    """The rows under a header, cell by cell."""
    lines = README[README.index(f"\n{header}") + 1 :].splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[2:])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_quantities_are_those_of_the_table() -> None:
    rows = table("| name | object |")
    named = {
        name.strip("`"): eval(object.strip("`"), {name: getattr(fxcurv, name) for name in dir(fxcurv)})
        for name, object, *_ in rows
    }
    assert named == dict(fxcurv.NAMES)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_every_extension_of_the_peers_has_a_row() -> None:
    listed = {name for there, *_ in table("| there | here | test |") for name in re.findall(r"`([\w.]+)", there)}
    extensions = pytest.importorskip("backpack.extensions").__all__
    operators = [name for name in vars(pytest.importorskip("curvlinops")) if name.endswith(("Operator", "Cached"))]
    assert not {*extensions, *operators} - listed


def test_the_vocabulary_is_that_of_the_rules() -> None:
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for op, rule in rules.RULES.items():
        kinds[rule.kind].add(op.__name__)
    assert {kind: set(re.findall(r"`(\w+)`", modules)) for kind, modules in table("| kind | modules |")} == kinds


def test_every_room_has_a_place_in_the_layout() -> None:
    listed = [name for cell, _ in table("| room | what") for name in re.findall(r"`([^`]+)`", cell)]
    rooms = [f"fxcurv/{path.parent.name}" for path in (ROOT / "fxcurv").glob("*/__init__.py")]
    assert sorted(listed) == sorted([*rooms, "passes", "fxcurv/api.py", "fxcurv/testing.py"])


def test_files_tests_and_extras_that_are_named_exist() -> None:
    for name in re.findall(r"`((?:fxcurv|passes|tests|tools)/[\w/]+\.\w+)", README):
        assert (ROOT / name).is_file(), name
    for file, test in re.findall(r"`([\w/]+\.py)::(\w+)`", README):
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {test}"
    assert set(re.findall(r"extra `(\w+)`", README)) <= set(EXTRAS)


def test_every_guarantee_names_a_test_that_is_collected() -> None:
    rows = table("| guarantee | test |")
    groups = [row[0] for row in rows if not row[1]]
    assert all(re.fullmatch(r"\*\*.+\*\*", group) for group in groups)
    for guarantee, test in (row for row in rows if row[1]):
        named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test)
        assert named, guarantee
        tree = ast.parse((ROOT / named[1]).read_text(encoding="utf-8"))
        assert named[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
    assert len(rows) - len(groups) >= 50


def test_the_benchmark_is_the_generated_one() -> None:
    shown = README.partition("<!-- bench:begin -->")[2].partition("<!-- bench:end -->")[0]
    generated = (ROOT / "tools/results/bench.md").read_text(encoding="utf-8")
    assert shown.strip() == generated.partition("\n\n- ")[2].join(("- ", "")).partition("\n## ")[0].strip()


def test_the_coverage_is_the_generated_one() -> None:
    shown = README.partition("<!-- coverage:begin -->")[2].partition("<!-- coverage:end -->")[0]
    generated = (ROOT / "tools/results/coverage.md").read_text(encoding="utf-8")
    assert shown.strip() == generated.partition("# Coverage\n")[2].partition("\n## ")[0].strip()


# What the page says without showing it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class GGNBlock:
    """The dense block Σ_vn J Jᵀ of every parameter, J = Σ_s S xᵀ."""

    factor: Factor = field(default=fxcurv.Exact(), init=False)
    family: str = field(default="ggn_block", init=False)

    def owner(self, used: Used) -> str:
        return used.name

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return {"matrix": Gram()}

    def finish(self, used: Used, sums: Sums, samples: int) -> fxcurv.Block:
        return fxcurv.Dense(used.shape, sums["matrix"])

    def approximation(self, used: Used) -> str | None:
        return None


def small(*middle: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Linear(3, 4), *middle, nn.Linear(4, 3)).double().eval()


X, Y = torch.linspace(-1, 1, 12).double().view(4, 3), torch.tensor([0, 2, 1, 1])


def test_a_quantity_is_one_dataclass() -> None:
    result = fxcurv.compile(small(nn.Tanh()), quantities=[GGNBlock(), "diag_ggn"])(X, Y)
    for name, diagonal in result["diag_ggn"].items():
        torch.testing.assert_close(result["ggn_block"][name].diag(), diagonal, rtol=1e-10, atol=1e-14)


def test_every_parameter_has_a_block() -> None:
    result = fxcurv.compile(small(nn.LayerNorm(4)), quantities="kflr")(X, Y)["kflr"]
    forms = {name: entry.form() for name, entry in result.entries.items()}
    weights = {"0.weight", "2.weight"}
    assert forms == {name: "Kronecker" if name in weights else "Dense" for name in forms}
    assert set(result.status.values()) == {"exact"}


# The checker itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "same"),
    [
        ("a  1.5\nb\nc", True),
        ("a  1.4999\nb\nc", True),
        ("a 1.5\n...", True),
        ("...\nb\n...", True),
        ("...\nc", True),
        ("a  1...\nb\nc", True),
        ("a  1.6\nb\nc", False),
        ("a  1.5\nb", False),
        ("b\nc", False),
        ("a  1.5\n...\nb", False),
        ("a  1.5\nc", False),
        ("...\nc\nb\n...", False),
    ],
)
def test_printed_text_is_compared(expected: str, same: bool) -> None:
    assert matches(expected + "\n", "a  1.5\nb\nc\n") is same


@pytest.mark.parametrize("block", [Block("", "x", 1), Block("bash", "x", 1), Block("sh", "make\n", 1)])
def test_a_block_that_cannot_be_tested_fails(block: Block) -> None:
    with pytest.raises(pytest.fail.Exception, match="how is it tested"):
        run(block, {})
