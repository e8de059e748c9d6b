"""Pictures of a compiled model as text: its canonical graph, collapsed by module path, in Mermaid or DOT.

A box is a module with all operations inside it, coloured by the worst status of its parameters. Columns are pulled
back along thick arrows. Boxes with thick borders are on every path from the first parameter to the output. A module
that is left and entered again has one box per visit, so collapsing does not introduce cycles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import networkx as nx
from torch import fx

from fxcurv.core.errors import InputError
from fxcurv.core.shapes import show_shape
from fxcurv.ir.nodes import module_of
from fxcurv.runtime.program import Program
from passes.parameter_usage import bottlenecks, carrying, parameter_uses

__all__ = ["BOXES", "FILLS", "Format", "picture"]


Format = Literal["mermaid", "dot"]


BOXES = 100
"""Largest number of boxes in a readable picture."""


FILLS = {
    "exact": "#b5e2c4",
    "approx": "#fbe8a6",
    "fallback": "#f9cfa0",
    "frozen": "#d3dbe6",
    "unreached": "#eeeeee",
    "unsupported": "#f4b3b0",
}
"""Colour of each status, from best to worst; boxes without parameters are white, refused boxes red."""


Box = tuple[str, int]
"""A module path and the number of the visit, from 1; or the name of an input or output, and 0."""


@dataclass(frozen=True)
class Look:
    """Appearance of a box; `status` selects its colour."""

    lines: tuple[str, ...]
    status: str | None = None
    rounded: bool = False
    bold: bool = False


@dataclass(frozen=True)
class Arrow:
    """Data flow between two boxes, given by their positions in the picture."""

    source: int
    target: int
    label: str
    bold: bool


@dataclass(frozen=True)
class Chart:
    """A picture, independent of the output format."""

    boxes: tuple[Look, ...]
    arrows: tuple[Arrow, ...]


def picture(program: Program, format: Format = "mermaid", depth: int | None = None) -> str:
    """Return the model as a flow chart, collapsed to `depth` names of a path; by default, the most within `BOXES`."""
    if format not in _WRITERS:
        raise InputError(
            f"no picture has the format {format!r}", remedy=f"there are {', '.join(_WRITERS)}", code="FXC007"
        )
    if depth is not None and depth < 1:
        raise InputError(f"the depth is {depth}", remedy="give 1 or more", code="FXC007")
    return _WRITERS[format](chart(program, depth or finest(program.canonical.graph)))


# From nodes to boxes ----------------------------------------------------------------------------------------------


def collapse(graph: fx.Graph, depth: int) -> nx.DiGraph[Box]:
    """Return the quotient of a graph by the first `depth` names of its nodes' paths; each box has its `nodes`.

    Nodes of a path share a box unless the graph has a path that leaves the box and returns: then a new box begins.
    """
    boxes: nx.DiGraph[Box] = nx.DiGraph()
    of: dict[fx.Node, Box] = {}
    latest: dict[str, int] = {}
    for node in graph.nodes:
        before = {of[x] for x in node.all_input_nodes}
        path = ".".join(str(node.target).split(".")[:depth])
        box = (path, latest.setdefault(path, 1)) if node.op == "call_module" else (node.name, 0)
        if box in boxes and not before.isdisjoint(nx.descendants(boxes, box)):
            latest[path] += 1
            box = path, latest[path]
        of[node] = box
        if box not in boxes:
            boxes.add_node(box, nodes=[])
        boxes.nodes[box]["nodes"].append(node)
        boxes.add_edges_from((x, box) for x in before if x != box)
    return boxes


def finest(graph: fx.Graph) -> int:
    """Return the largest depth with at most `BOXES` boxes, or 1."""
    full = max(str(node.target).count(".") + 1 for node in graph.nodes)
    return next((depth - 1 for depth in range(2, full + 1) if len(collapse(graph, depth)) > BOXES), full)


# From boxes to a chart --------------------------------------------------------------------------------------------


def chart(program: Program, depth: int) -> Chart:
    """Return the chart: boxes with colours, arrows with shapes, and the path of columns that are pulled back."""
    gm, boxes = program.canonical, collapse(program.canonical.graph, depth)
    without = {"frozen", "unreached", "unsupported"}
    computed = [name for name in program.plan.shapes if _statuses(program, name) - without]
    using = {node for uses in parameter_uses(gm, computed).values() for node, _ in uses}
    pulled, passed = carrying(gm, using) | {gm.graph.output_node()}, set(bottlenecks(gm, using))
    looks = [_look(program, box, boxes.nodes[box]["nodes"], passed) for box in boxes]
    places = {box: place for place, box in enumerate(boxes)}
    arrows = [
        _arrow((places[a], places[b]), boxes.nodes[a]["nodes"], boxes.nodes[b]["nodes"], pulled) for a, b in boxes.edges
    ]
    return Chart((*looks, *_left_out(program, depth)), tuple(arrows))


def _look(program: Program, box: Box, nodes: Sequence[fx.Node], passed: set[fx.Node]) -> Look:
    path, visit = box
    if visit == 0:
        return Look((path,), rounded=True)
    title = path if visit == 1 else f"{path} ({visit})"
    names = {name for node in nodes for source in node.meta["slots"].values() for name in source.names}
    kind = type(module_of(nodes[0])).__name__ if len(nodes) == 1 else f"{len(nodes)} operations"
    bold = not passed.isdisjoint(nodes)
    parameters = [name for name in program.plan.shapes if name in names]
    refused = any("refusal" in node.meta for node in nodes)
    status = "unsupported" if refused else _worst(program, parameters)
    return Look((title, kind, *_told(program, parameters), *(["refused"] if refused else [])), status, bold=bold)


def _left_out(program: Program, depth: int) -> list[Look]:
    """Return a box for the parameters that no node of the graph uses."""
    sources = (s for node in program.canonical.graph.nodes for s in node.meta.get("slots", {}).values())
    known = {name for source in sources for name in source.names}
    names = [name for name in program.plan.shapes if name not in known]
    if not names:
        return []
    paths = list(dict.fromkeys(".".join((name.rpartition(".")[0] or name).split(".")[:depth]) for name in names))
    title = ", ".join(paths[:3]) + (", …" if len(paths) > 3 else "")
    return [Look((title, *_told(program, names)), _worst(program, names))]


def _arrow(places: tuple[int, int], sources: list[fx.Node], targets: list[fx.Node], pulled: set[fx.Node]) -> Arrow:
    inside = set(sources)
    pairs = [(x, node) for node in targets for x in node.all_input_nodes if x in inside]
    shapes = dict.fromkeys(show_shape(x.meta["shape"]) for x, _ in pairs)
    return Arrow(*places, ", ".join(shapes), any(x in pulled and node in pulled for x, node in pairs))


def _told(program: Program, parameters: Sequence[str]) -> list[str]:
    """Return the number of parameters, and their statuses other than `exact`."""
    if not parameters:
        return []
    found = {status for name in parameters for status in _statuses(program, name)} - {"exact"}
    return [f"{len(parameters)} parameter{'s' if len(parameters) > 1 else ''}", *sorted(found)]


def _worst(program: Program, parameters: Iterable[str]) -> str | None:
    found = {status.partition("(")[0] for name in parameters for status in _statuses(program, name)}
    return max(found, key=list(FILLS).index, default=None)


def _statuses(program: Program, parameter: str) -> set[str]:
    return {found[parameter] for found in program.plan.statuses.values() if parameter in found}


# From a chart to text ---------------------------------------------------------------------------------------------


def _mermaid(chart: Chart) -> str:
    lines = ["flowchart TD"]
    for place, box in enumerate(chart.boxes):
        label = "<br/>".join(map(_entities, box.lines))
        shape = f'(["{label}"])' if box.rounded else f'["{label}"]'
        lines.append(f"    n{place}{shape}:::{_style(box.status, box.bold)}")
    for arrow in chart.arrows:
        line = "==>" if arrow.bold else "-->"
        lines.append(f'    n{arrow.source} {line}|"{_entities(arrow.label)}"| n{arrow.target}')
    drawn = dict.fromkeys((box.status, box.bold) for box in chart.boxes)
    for status, bold in drawn:
        style = f"fill:{FILLS[status] if status else '#ffffff'},stroke:#333333,color:#000000"
        width = ",stroke-width:4px" if bold else ""
        lines.append(f"    classDef {_style(status, bold)} {style}{width}")
    return "\n".join(lines)


def _style(status: str | None, bold: bool) -> str:
    return f"{status or 'plain'}{'Passed' if bold else ''}"


def _entities(text: str) -> str:
    """Escape all characters of a label with a special meaning in Mermaid or HTML."""
    return "".join(c if c.isalnum() or c in " .,_()[]:…" else f"#{ord(c)};" for c in text)


def _dot(chart: Chart) -> str:
    lines = ["digraph model {", '    node [shape=box, style="filled", fontname="Helvetica"]']
    for place, box in enumerate(chart.boxes):
        options = {"label": "\n".join(box.lines), "fillcolor": FILLS[box.status] if box.status else "#ffffff"}
        options |= {"style": "filled,rounded"} if box.rounded else {}
        options |= {"penwidth": "4"} if box.bold else {}
        lines.append(f"    n{place} [{_options(options)}]")
    for arrow in chart.arrows:
        options = {"label": arrow.label} | ({"penwidth": "3"} if arrow.bold else {})
        lines.append(f"    n{arrow.source} -> n{arrow.target} [{_options(options)}]")
    return "\n".join((*lines, "}"))


def _options(options: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={_quoted(value)}" for key, value in options.items())


def _quoted(text: str) -> str:
    """Quote a string for DOT: escape quotes and backslashes, write line breaks as `\\n`."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'.replace("\n", "\\n")


_WRITERS: dict[str, Callable[[Chart], str]] = {"mermaid": _mermaid, "dot": _dot}
