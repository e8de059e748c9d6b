"""The picture: what every row costs in gradients, a panel for every problem."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.measure import Line
from benchmark.report import by_problem, partial, short
from benchmark.rows import side_by_side
from fxcurv.core.optional import imported
from fxcurv.inspect.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIBRARIES = ("fxcurv", "backpack", "curvlinops", "functorch", "torch")
COLOUR: dict[str, str] = dict(zip(LIBRARIES, (*COLOURS[:4], "#8c8c8c"), strict=True))
MUTED = "#8a8a8a"
ACROSS = 3
GAP = 0.55  # between quantities


def draw(lines: Sequence[Line], folder: Path) -> list[Path]:
    """bench.png and bench.svg."""
    problems = {name: found for name, found in by_problem(lines).items() if found[0].state != "skipped"}
    if not problems:
        return []
    places = heights(line for found in problems.values() for line in found)
    across = min(ACROSS, len(problems))
    down = math.ceil(len(problems) / across)
    size = (1.9 + 3.1 * across, 0.5 + down * (0.75 + 0.155 * max(places.values())))
    figure: Any = imported("matplotlib.figure").Figure(figsize=size, layout="constrained", dpi=140)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for ax in list(grid.flat)[len(problems) :]:
        ax.set_visible(False)
    for ax, (name, found) in zip(grid.flat, problems.items(), strict=False):
        ax.set_title(name, fontsize=10, fontweight="bold", loc="left")
        panel(ax, found, places)
    legend(figure, {line.library for line in lines})
    paths = [folder / "bench.png", folder / "bench.svg"]
    for path in paths:
        figure.savefig(path)
    return paths


def heights(lines: Iterable[Line]) -> dict[str, float]:
    """Where each row is drawn: those that compute the same together, a gap between them and the next."""
    places: dict[str, float] = {}
    at, last = 0.0, ""
    for subject, library, quantity in side_by_side((line.library, line.quantity) for line in lines):
        at += GAP if last not in ("", subject) else 0
        places[f"{library} {quantity}"] = at
        at, last = at + 1, subject
    return places


def legend(figure: Any, libraries: set[str]) -> None:
    patch = imported("matplotlib.patches").Patch
    handles = [patch(color=COLOUR[name], label=name) for name in LIBRARIES if name in libraries]
    handles.append(patch(facecolor="white", edgecolor=MUTED, hatch="/////", label="not all parameters"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False)


def panel(ax: Axes, found: Sequence[Line], places: Mapping[str, float]) -> None:
    """One problem's bars, hatched where parameters are left out; in the place of one that is missing, why."""
    ratios = [line.ratio for line in found if line.ratio is not None]
    low, high = 0.7 * min((1.0, *ratios)), 3 * max((10.0, *ratios))
    for line in found:
        at, colour = places[line.row], COLOUR.get(line.library, MUTED)
        if line.ratio is None:
            ax.text(low * 1.1, at, line.state, va="center", fontsize=6.5, color=MUTED, style="italic")
        else:
            look: dict[str, Any] = {"facecolor": "white", "hatch": "/////"} if partial(line) else {"facecolor": colour}
            ax.barh(at, line.ratio - low, left=low, height=0.8, edgecolor=colour, linewidth=0.6, **look)
            ax.text(line.ratio * 1.07, at, short(line), va="center", fontsize=6.5)
    style(ax, low, high)
    ax.set_yticks(list(places.values()), labels=list(places), fontsize=7)
    ax.set_ylim(max(places.values()) + 0.7, -0.7)


def style(ax: Axes, low: float, high: float) -> None:
    """A log axis in gradients, a line at one, little else."""
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.xaxis.set_major_formatter(imported("matplotlib.ticker").FuncFormatter(lambda value, _: f"{value:g}"))
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xlabel("time, in gradients", fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
