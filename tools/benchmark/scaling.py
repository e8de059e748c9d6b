"""Scaling: how time grows with the batch, the columns, the depth and the width, as slopes of log-log fits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate
from torch import nn

import fxcurv
from benchmark.measure import Settings, apart, in_rounds, ready
from benchmark.problems import Problem
from benchmark.report import as_csv, write_texts
from benchmark.rows import GRADIENT, Row, fxcurv_quantity


def mlp(depth: int, width: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def conv_net(depth: int, width: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@dataclass(frozen=True)
class Size:
    """What is varied: the samples N, the columns V of a sampled factor, layers and channels."""

    N: int
    V: int
    depth: int
    width: int


@dataclass(frozen=True)
class Net:
    """A family of networks, on inputs of `width` channels and these positions, and where its axes cross."""

    name: str
    build: Callable[[int, int], nn.Module]
    positions: tuple[int, ...]
    middle: Size

    def problem(self, size: Size) -> Problem:
        return Problem(lambda: self.build(size.depth, size.width), size.N, (size.width, *self.positions))


NETS = (
    Net("MLP", mlp, (), Size(N=128, V=1, depth=4, width=512)),
    Net("conv net", conv_net, (16, 16), Size(N=16, V=1, depth=4, width=32)),
)
AXES = {"N": (0.25, 0.5, 1, 2, 4), "V": (1, 2, 4, 8, 16), "depth": (0.5, 1, 2, 4), "width": (0.25, 0.5, 1, 2)}
"""Each axis, and the multiples of the middle that are measured."""


@dataclass(frozen=True)
class Point:
    """A median time at one place of an axis."""

    net: str
    axis: str
    value: int
    row: str
    ms: float


def rows(size: Size, axis: str) -> list[Row]:
    """What is measured there; what has no columns to vary has no place on their axis."""
    kfac = Row("fxcurv", "kfac", fxcurv_quantity(fxcurv.KFAC(fxcurv.Sampled(size.V))))
    diagonal = Row("fxcurv", "diag_ggn", fxcurv_quantity(fxcurv.DiagGGN(fxcurv.Sampled(size.V))))
    others = () if axis == "V" else (GRADIENT, Row("fxcurv", "grad", fxcurv_quantity("grad")))
    return [*others, kfac, diagonal]


def points(net: Net, axis: str, values: Sequence[int], settings: Settings) -> list[Point]:
    """All rows at all places of an axis, in rounds."""
    sizes = {value: Size(**{**vars(net.middle), axis: value}) for value in values}
    places = [(value, row) for value, size in sizes.items() for row in rows(size, axis)]
    able = [ready(row, net.problem(sizes[value]), settings.device) for value, row in places]
    in_rounds(able, settings.repeats, math.inf)
    return [
        Point(net.name, axis, value, row.name, 1000 * statistics.median(warm.times))
        for (value, row), warm in zip(places, able, strict=True)
    ]


def scaling(settings: Settings, quick: bool) -> list[Point]:
    """The points of all nets and axes; quickly: the two smallest places of each axis."""
    found: list[Point] = []
    for net in NETS:
        for axis, multiples in AXES.items():
            values = [int(m * getattr(net.middle, axis)) for m in (multiples[:2] if quick else multiples)]
            found += apart(points, net, axis, values, settings)
    return found


def slope(points: Sequence[Point]) -> float:
    """By how much log t grows with log value, in the sense of least squares."""
    return statistics.linear_regression([math.log(p.value) for p in points], [math.log(p.ms) for p in points]).slope


def table(found: Sequence[Point]) -> str:
    """The slopes, a line for every net and row."""
    lines: list[list[object]] = []
    for net, row in dict.fromkeys((p.net, p.row) for p in found):
        of = {axis: [p for p in found if (p.net, p.row, p.axis) == (net, row, axis)] for axis in AXES}
        lines.append([net, row, *(slope(points) if points else None for points in of.values())])
    return tabulate(lines, ["net", "row", *AXES], tablefmt="github", floatfmt=".2f", missingval="")


def write(folder: Path, about: Sequence[str], found: Sequence[Point]) -> list[Path]:
    """scaling.csv and scaling.md."""
    facts = "\n".join(f"- {fact}" for fact in (*about[1:], *(crossing(net, found) for net in NETS)))
    head = f"<!-- {about[0]} -->\n\n# Scaling\n\n`{about[0]}`\n\nThe time grows as size to the power of:"
    records = ([p.net, p.axis, p.value, p.row, p.ms] for p in found)
    names = ("net", "axis", "value", "row", "ms")
    return write_texts(
        folder, {"scaling.csv": as_csv(about, names, records), "scaling.md": f"{head}\n\n{table(found)}\n\n{facts}\n"}
    )


def crossing(net: Net, found: Sequence[Point]) -> str:
    """Where a net's axes cross, and what was measured along them."""
    values = {axis: dict.fromkeys(p.value for p in found if (p.net, p.axis) == (net.name, axis)) for axis in AXES}
    along = (f"{axis} {', '.join(map(str, places))}" for axis, places in values.items())
    middle = ", ".join(f"{axis}={getattr(net.middle, axis)}" for axis in AXES)
    return f"{net.name}: {'; '.join(along)}; the others as in {middle}"
