"""Text views of graphs."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate
from torch import fx

from fxcurv.pullback import Keep, Pull, PullInputs
from fxcurv.rules import RULES
from fxcurv.shapes import show_shape
from fxcurv.spec import module_of

__all__ = ["COLUMNS", "tabular"]

COLUMNS = ("opcode", "name", "target", "args", "kwargs", "shape", "module", "rule")


def tabular(
    gm: fx.GraphModule, columns: Sequence[str] = COLUMNS, fmt: str = "simple", max_width: int | None = 48
) -> str:
    """The graph as a table: fx's five columns, each node's shape, module and kind of rule; cells cut at `max_width`."""
    rows = [[_cut(_cell(node, column), max_width) for column in columns] for node in gm.graph.nodes]
    return tabulate(rows, list(columns), tablefmt=fmt, disable_numparse=True)


def _cut(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else f"{text[: width - 1]}…"


def _cell(node: fx.Node, column: str) -> str:
    if column in ("args", "kwargs"):
        return str(getattr(node, column))
    if column == "shape":
        return show_shape(node.meta["shape"]) if "shape" in node.meta else ""
    if column in ("module", "rule"):
        return _of_module(node, column) if node.op == "call_module" else ""
    return str({"opcode": node.op, "name": node.name, "target": node.target}[column])


def _of_module(node: fx.Node, column: str) -> str:
    op = module_of(node)
    if column == "module":
        return op._get_name()  # pyright: ignore[reportPrivateUsage]
    rule = op.rule if isinstance(op, Keep | Pull | PullInputs) else RULES.get(type(op))
    return rule.kind if rule is not None else ""
