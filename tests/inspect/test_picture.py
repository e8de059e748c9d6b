"""Pictures: what becomes a box, what it looks like, and that Mermaid and DOT can read the text."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcurv
from fxcurv.cli.main import main
from fxcurv.inspect import picture as pictures
from fxcurv.inspect.picture import BOXES, FILLS, Format, collapse, finest


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x).tanh() * self.right(x)


class Net(nn.Module):
    """Frozen below, gated in the middle, a head that is too large to be dense, and a head that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4).requires_grad_(False)
        self.gate, self.shift = Gate(), nn.Parameter(torch.zeros(4))
        self.head, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(self.stem(x)) + self.shift)


class Mixing(nn.Module):
    """What lies below the mean over samples is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.below(x)
        return self.head(x - x.mean(0, keepdim=True))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> fxcurv.Compiled:
    monkeypatch.setattr("fxcurv.quantities.DENSE_LIMIT", 3)
    with torch.random.fork_rng(devices=[]):
        return fxcurv.compile(Net().eval(), quantities=["kfac", "diag_ggn"], example_inputs=torch.zeros(2, 3))


EXPECTED = """
flowchart TD
    n0(["x"]):::plain
    n1["stem<br/>Linear<br/>2 parameters<br/>frozen"]:::frozen
    n2["gate<br/>4 operations<br/>4 parameters<br/>approx(diagonal)"]:::approxPassed
    n3["shift<br/>Parameter<br/>1 parameter<br/>approx(diagonal)"]:::approx
    n4["add<br/>Add"]:::plainPassed
    n5["head<br/>Linear<br/>2 parameters"]:::exactPassed
    n6(["output"]):::plain
    n7["spare<br/>2 parameters<br/>unreached"]:::unreached
    n0 -->|"[N, 3]"| n1
    n1 -->|"[N, 4]"| n2
    n2 ==>|"[N, 4]"| n4
    n3 ==>|"[4]"| n4
    n4 ==>|"[N, 4]"| n5
    n5 ==>|"[N, 3]"| n6
"""


def test_boxes_are_modules_coloured_by_status(compiled: fxcurv.Compiled) -> None:
    chart, _, styles = compiled.picture(depth=1).partition("    classDef")
    assert chart == EXPECTED.lstrip()
    assert f"approxPassed fill:{FILLS['approx']},stroke:#333333,color:#000000,stroke-width:4px" in styles


def test_a_second_visit_is_numbered() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.between = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.between(self.block(x)))

    with torch.random.fork_rng(devices=[]):
        model = Twice().eval()
    text = fxcurv.compile(model, example_inputs=torch.zeros(2, 3)).picture(depth=1)
    titles = re.findall(r'\["(.*?)<br/>(.*?)"\]', text)
    assert titles == [
        ("block", "2 operations<br/>2 parameters"),
        ("between", "Linear<br/>2 parameters"),
        ("block (2)", "2 operations<br/>2 parameters"),
    ]


def test_what_is_refused_is_red() -> None:
    with torch.random.fork_rng(devices=[]):
        model = Mixing().eval()
    text = fxcurv.compile(model, example_inputs=torch.zeros(2, 3), on_unsupported="skip").picture()
    assert '["mean<br/>Mean<br/>refused"]:::unsupported' in text
    assert '["below<br/>Linear<br/>2 parameters<br/>unsupported"]:::unsupported' in text
    assert '["head<br/>Linear<br/>2 parameters"]:::exactPassed' in text
    assert text.count("==>") == 1  # columns are carried from the output to the head, and no further


# Text that other programs read ------------------------------------------------------------------------------------

MERMAID = (
    r"flowchart TD",
    r'    (?P<box>n\d+)(\["[^"<]*(<br/>[^"<]*)*"\]|\(\["[^"<]*"\]\)):::(?P<style>\w+)',
    r'    (?P<a>n\d+) (-->|==>)\|"[^"<]*"\| (?P<b>n\d+)',
    r"    classDef (?P<defined>\w+) fill:#\w{6},stroke:#\w{6},color:#\w{6}(,stroke-width:4px)?",
)
OPTIONS = r'\[\w+="([^"\\]|\\.)*"(, \w+="([^"\\]|\\.)*")*\]'
DOT = (
    r"digraph model \{",
    r'    node \[shape=box, style="filled", fontname="\w+"\]',
    rf"    (?P<box>n\d+) {OPTIONS}",
    rf"    (?P<a>n\d+) -> (?P<b>n\d+) {OPTIONS}",
    r"\}",
)


def read(text: str, grammar: tuple[str, ...]) -> dict[str, list[str]]:
    """Every line is of the grammar; what its named groups found."""
    found: dict[str, list[str]] = {name: [] for name in ("box", "a", "b", "style", "defined")}
    for line in text.splitlines():
        matches = [m for pattern in grammar if (m := re.fullmatch(pattern, line))]
        assert len(matches) == 1, line
        for name, value in matches[0].groupdict().items():
            if name in found:
                found[name].append(value)
    return found


@pytest.mark.parametrize("format", get_args(Format))
def test_the_text_is_of_its_language(compiled: fxcurv.Compiled, format: Format) -> None:
    found = read(compiled.picture(format), MERMAID if format == "mermaid" else DOT)
    assert len(found["box"]) == len(set(found["box"]))
    assert {*found["a"], *found["b"]} <= set(found["box"])
    assert sorted(set(found["style"])) == sorted(found["defined"])


HOSTILE = 'a"b<i>#1;`x`{}|\\n\\'


def test_labels_are_escaped() -> None:
    chart = pictures.Chart((pictures.Look((HOSTILE, "Linear")),), (pictures.Arrow(0, 0, HOSTILE, True),))
    mermaid, dot = pictures._mermaid(chart), pictures._dot(chart)
    read(mermaid, MERMAID)
    read(dot, DOT)
    label = re.search(r'n0\["(.*?)<br/>', mermaid)
    assert label
    assert re.sub(r"#(\d+);", lambda m: chr(int(m[1])), label[1]) == HOSTILE
    assert '"a\\"b<i>#1;`x`{}|\\\\n\\\\\\nLinear"' in dot


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_graphviz_reads_the_dot(compiled: fxcurv.Compiled) -> None:
    subprocess.run(["dot", "-Tsvg"], input=compiled.picture("dot"), text=True, capture_output=True, check=True)


# Collapsing -------------------------------------------------------------------------------------------------------


def graph(*calls: tuple[str, tuple[int, ...]]) -> fx.Graph:
    """A graph whose nodes call these paths on earlier nodes, by place; place 0 is the input."""
    made = fx.Graph()
    nodes = [made.placeholder("x")]
    for path, inputs in calls:
        nodes.append(made.call_module(path, tuple(nodes[place] for place in inputs)))
    made.output(nodes[-1])
    return made


def test_a_module_that_is_left_and_entered_again_has_two_boxes() -> None:
    boxes = collapse(graph(("a.1", (0,)), ("b", (1,)), ("a.2", (1,)), ("a.3", (2, 3))), depth=1)
    assert set(boxes.edges) == {
        (("x", 0), ("a", 1)),
        (("a", 1), ("b", 1)),
        (("a", 1), ("a", 2)),
        (("b", 1), ("a", 2)),
        (("a", 2), ("output", 0)),
    }
    assert [node.target for node in boxes.nodes["a", 1]["nodes"]] == ["a.1", "a.2"]


@st.composite
def graphs(draw: st.DrawFn) -> fx.Graph:
    size = draw(st.integers(1, 12))
    paths = st.sampled_from(("a", "a.b", "a.b.c", "a.d", "b", "b.a", "c"))
    return graph(
        *((draw(paths), tuple(draw(st.sets(st.integers(0, place), min_size=1, max_size=3)))) for place in range(size))
    )


@given(graphs(), st.integers(1, 4))
def test_collapsing_invents_no_cycle_and_loses_no_edge(made: fx.Graph, depth: int) -> None:
    boxes = collapse(made, depth)
    assert nx.is_directed_acyclic_graph(boxes)
    box_of = {node: box for box in boxes for node in boxes.nodes[box]["nodes"]}
    assert set(box_of) == set(made.nodes)
    edges = {(box_of[x], box_of[node]) for node in made.nodes for x in node.all_input_nodes}
    assert {(a, b) for a, b in edges if a != b} == set(boxes.edges)
    for node, (path, visit) in box_of.items():
        assert path == (".".join(str(node.target).split(".")[:depth]) if visit else node.name)
        assert bool(visit) is (node.op == "call_module")


def test_the_finest_picture_that_fits_is_drawn() -> None:
    calls = [(f"block{k % 40}.{k // 40}.op", (k,)) for k in range(80)]
    many = graph(*sorted(calls, key=lambda call: call[1]))
    assert finest(graph(("a.b.c", (0,)), ("a.b.d", (1,)))) == 3
    assert len(collapse(many, finest(many))) <= BOXES
    long = graph(*((f"block{k}.{side}", (2 * k + side,)) for k in range(60) for side in (0, 1)))
    assert (finest(long), len(collapse(long, 1)), len(collapse(long, 2))) == (1, 62, 122)


# Asking for it ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_drawn_is_refused(compiled: fxcurv.Compiled) -> None:
    with pytest.raises(fxcurv.InputError, match="depth is 0; give 1"):
        compiled.picture(depth=0)
    with pytest.raises(fxcurv.InputError, match="'svg'; there are mermaid, dot"):
        compiled.picture("svg")  # pyright: ignore[reportArgumentType]
    with pytest.raises(fxcurv.FxcurvError, match="nothing is compiled yet"):
        fxcurv.compile(compiled.model).picture()


def test_show_draws_to_the_terminal_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ["show", "torch.nn:Linear?in_features=3&out_features=2", "--input", "3", "--format", "dot"]
    assert main(target) == 0
    printed = capsys.readouterr().out
    read(printed, DOT)
    assert main([*target, "--output", str(tmp_path / "model.dot")]) == 0
    assert (tmp_path / "model.dot").read_text(encoding="utf-8") == printed
    assert main(["show", f"{__file__}:Mixing", "--input", "3", "--format", "mermaid"]) == 0
    assert ":::unsupported" in capsys.readouterr().out
    assert main([*target, "--output", str(tmp_path / "absent" / "model.dot")]) == 2
    assert "there is no folder" in capsys.readouterr().err
