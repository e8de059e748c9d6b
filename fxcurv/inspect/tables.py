"""Text views of graphs."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate
from torch import fx

from fxcurv.core.shapes import show_shape
from fxcurv.ir.backward_ops import Pull, PullInputs, SaveForBackward
from fxcurv.ir.nodes import module_of, title_of
from fxcurv.ir.rules import RULES

__all__ = ["COLUMNS", "family_of", "tabular"]


COLUMNS = ("opcode", "name", "target", "args", "kwargs", "shape", "module", "rule")


def family_of(stage: str) -> str:
    """Return `backward` for `backward[exact]`; the graph after a pass, `forward:schedule`, is a separate family."""
    return stage if ":" in stage else stage.partition("[")[0]


def tabular(
    gm: fx.GraphModule, columns: Sequence[str] = COLUMNS, fmt: str = "simple", max_width: int | None = 48
) -> str:
    """Return a graph as a table: fx's five columns, shape, module and kind of rule; cells are cut at `max_width`."""
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
        return title_of(op)
    rule = op.rule if isinstance(op, SaveForBackward | Pull | PullInputs) else RULES.get(type(op))
    return rule.kind if rule is not None else ""
