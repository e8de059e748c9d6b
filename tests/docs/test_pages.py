"""The README and the pages are right: their code runs and prints what they show, their tables agree with the code.

Each page is run on its own; see `pages`. The demo is replaced: it takes longer than a test may.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import check_against_oracle
from pages import DOCS, EXTRAS, PAGES, README, ROOT, Block, Page, named_tests, run, run_page
from texts import matches
from torch import nn

import fxcurv
import passes.lowering_table
from fxcurv.cli import demo
from fxcurv.contractions.definitions import Gram
from fxcurv.contractions.statistic import Statistic
from fxcurv.ir import rules
from fxcurv.ir.nodes import module_of
from fxcurv.quantities.factors import Factor
from fxcurv.quantities.protocol import ParameterUsage, Sums
from passes import pipeline

MOST_LINES = 300
CONTRIBUTING = Page(".github/CONTRIBUTING.md")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
every_text = pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.name)


# Blocks -----------------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(*tables: MutableMapping[Any, Any]) -> Iterator[None]:
    """Undo changes of the tables: a page adds an op to them."""
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


@every_page
def test_blocks_run_and_print_what_the_page_shows(
    page: Page, capsys: pytest.CaptureFixture[str], demos: list[Path], tmp_path: Path
) -> None:
    with unchanged(rules.RULES, passes.lowering_table.LOWERINGS), torch.random.fork_rng(devices=[]):
        namespace = run_page(page, lambda: capsys.readouterr().out)
        if page is DOCS["architecture"]:
            check_the_new_op(namespace)
    assert "Asinh" not in {op.__name__ for op in rules.RULES}
    assert demos == [Path("fxcurv-demo")] * ("fxcurv demo" in page.text and page in (README, DOCS["command-line"]))
    assert (tmp_path / "curvature.safetensors").is_file() == (page in (DOCS["data-sets"], DOCS["command-line"]))


def check_the_new_op(namespace: dict[str, Any]) -> None:
    """The op that the page adds is used, and right."""
    (sample,) = namespace["ROW"]
    canonical = check_against_oracle(sample).stages["canonical"]
    assert namespace["Asinh"] in {type(module_of(n)) for n in canonical.graph.find_nodes(op="call_module")}


def test_installing_and_testing_come_first() -> None:
    """On a fresh machine the first block runs the demo and the second the tests, each as one command."""
    first, second = (block.content.splitlines() for block in README.blocks[:2])
    assert first == ['pip install ".[demo]" && fxcurv demo']
    assert second == ['pip install ".[test]" && python -m pytest -q']


# Length and links -------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.text.splitlines()) <= MOST_LINES


@every_text
def test_links_resolve(page: Page) -> None:
    for link in page.links:
        target = (page.path.parent / link.path).resolve() if link.path else page.path
        assert target.exists(), f"{page.name}: {link.path}"
        if link.heading:
            assert link.heading in Page(target.relative_to(ROOT).as_posix()).headings, f"{page.name}: #{link.heading}"


def test_the_index_and_the_readme_list_every_page() -> None:
    pages = {page.path for page in DOCS.values()}
    for listing in (README, DOCS["index"]):
        listed = {(listing.path.parent / link.path).resolve() for link in listing.links if link.path}
        assert not pages - {DOCS["index"].path} - listed, listing.name


# Tables and names -------------------------------------------------------------------------------------------------


def test_the_quantities_are_those_of_the_tables() -> None:
    rows = DOCS["quantities"].table("| name | object |")
    named = {
        name.strip("`"): eval(object.strip("`"), {name: getattr(fxcurv, name) for name in dir(fxcurv)})
        for name, object, *_ in rows
    }
    assert named == dict(fxcurv.NAMES)
    assert {name.strip("`") for name, _ in README.table("| quantity | meaning |")} == set(fxcurv.NAMES)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_every_extension_of_the_peers_has_a_row() -> None:
    rows = DOCS["guarantees"].table("| there | here | test |")
    listed = {name for there, *_ in rows for name in re.findall(r"`([\w.]+)", there)}
    extensions = pytest.importorskip("backpack.extensions").__all__
    operators = [name for name in vars(pytest.importorskip("curvlinops")) if name.endswith(("Operator", "Cached"))]
    assert not {*extensions, *operators} - listed


def test_the_vocabulary_is_that_of_the_rules() -> None:
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for op, rule in rules.RULES.items():
        kinds[rule.kind].add(op.__name__)
    rows = DOCS["models"].table("| kind | modules |")
    assert {kind: set(re.findall(r"`(\w+)`", modules)) for kind, modules in rows} == kinds


def test_the_passes_are_those_of_the_pipeline() -> None:
    rows = DOCS["architecture"].table("| pass | effect |")
    passed = [one.name for one in (*pipeline.TRACED, *pipeline.CANONICAL, *pipeline.EMITTED)]
    assert [name.strip("`") for name, *_ in rows] == passed


def test_moved_modules_are_there() -> None:
    for old, new in DOCS["changelog"].table("| before | now |"):
        for name in re.findall(r"`((?:fxcurv|passes)\.[\w.]+)`", new):
            assert importlib.util.find_spec(name), f"{old} is now {name}"


def test_every_room_has_a_place_in_the_layout() -> None:
    listed = [name for cell, _ in README.table("| room | contents") for name in re.findall(r"`([^`]+)`", cell)]
    rooms = [f"fxcurv/{path.parent.name}" for path in (ROOT / "fxcurv").glob("*/__init__.py")]
    assert sorted(listed) == sorted([*rooms, "passes", "fxcurv/api.py"])


@every_text
def test_files_tests_and_extras_that_are_named_exist(page: Page) -> None:
    for name in re.findall(r"`((?:fxcurv|passes|tests|tools)/[\w/]+\.\w+)", page.text):
        assert (ROOT / name).is_file(), name
    for file, test in named_tests(page.text):
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {test}"
    assert set(re.findall(r"extra `(\w+)`", page.text)) <= set(EXTRAS)


def test_every_guarantee_names_a_test_that_is_collected() -> None:
    rows = DOCS["guarantees"].table("| guarantee | test |")
    groups = [row[0] for row in rows if not row[1]]
    assert all(re.fullmatch(r"\*\*.+\*\*", group) for group in groups)
    for guarantee, test in (row for row in rows if row[1]):
        named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test)
        assert named, guarantee
        tree = ast.parse((ROOT / named[1]).read_text(encoding="utf-8"))
        assert named[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
    assert len(rows) - len(groups) >= 50


def test_the_benchmark_is_the_generated_one() -> None:
    generated = (ROOT / "tools/results/bench.md").read_text(encoding="utf-8")
    whole = generated.partition("\n\n- ")[2].join(("- ", "")).partition("\n## ")[0].strip()
    assert DOCS["benchmarks"].between("bench") == whole


def test_times_in_the_readme_are_those_of_the_benchmark() -> None:
    header = next(line for line in DOCS["benchmarks"].text.splitlines() if line.startswith("| library "))
    at = [cell.strip() for cell in header.strip("|").split("|")].index("resnet18")
    measured = {f"{row[0]} {row[1]}": row[at] for row in DOCS["benchmarks"].table("| library ")}
    rows = {
        "fxcurv": ("fxcurv kfac", "fxcurv kfac dense", "fxcurv diag_ggn"),
        "BackPACK": ("", "backpack KFAC", "backpack DiagGGNExact"),
        "curvlinops": ("", "curvlinops KFAC mc", ""),
    }
    expected = [[name, *(measured.get(row, "no row") for row in of_library)] for name, of_library in rows.items()]
    assert README.table("| ResNet-18 |") == expected


def test_the_coverage_is_the_generated_one() -> None:
    generated = (ROOT / "tools/results/coverage.md").read_text(encoding="utf-8")
    assert DOCS["coverage"].between("coverage") == generated.partition("# Coverage\n")[2].partition("\n## ")[0].strip()
    models = {group: (total, compiled) for group, total, compiled, *_ in DOCS["coverage"].table("| group ")}
    (vision, vision_compiled), (timm, timm_compiled) = models["torchvision"], models["timm"]
    counts = f"Of {vision} torchvision and {timm} timm models, {vision_compiled} and {timm_compiled} compile"
    assert counts in README.text.replace("\n", " ")


# What the pages say without showing it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class GGNBlock:
    """The dense block Σ_vn J Jᵀ of every parameter, J = Σ_s S xᵀ."""

    factor: Factor = field(default=fxcurv.Exact(), init=False)
    family: str = field(default="ggn_block", init=False)

    def owner(self, usage: ParameterUsage) -> str:
        return usage.name

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {"matrix": Gram()}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> fxcurv.Block:
        return fxcurv.Dense(usage.shape, sums["matrix"])

    def approximation(self, usage: ParameterUsage) -> str | None:
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
