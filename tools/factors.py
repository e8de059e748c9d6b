"""Factors compared: how far estimates are from the exact curvature, against the columns that they cost.

    python tools/factors.py                     the table and the figure in tools/results
    python tools/factors.py --quick             few seeds: does it run at all?

The network is that of `fxcurv demo`, trained on scikit-learn's handwritten digits; the curvature is that of the mean
cross entropy over a batch of training digits, after one epoch of training and after all. For each factor and number of
columns, over several seeds:

error     √(mean over seeds of ‖estimate - exact‖²) / ‖exact‖, all parameters (or factors G) together, Frobenius norm
bias      ‖mean over seeds - exact‖ / ‖exact‖; for an unbiased estimate about error / √seeds, given beside it

for the diagonal of the GGN, and for the factors G of KFAC.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the sources beside it, not an installed copy

import fxcurv
from fxcurv.blocks.kronecker import Kronecker
from fxcurv.cli import demo
from fxcurv.inspect import plots
from fxcurv.quantities.factors import Factor, Rademacher, Sampled, Stratified

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (1, 2, 3, 5, 8)
BATCH, SEEDS = 64, 16
QUANTITIES = ("diag_ggn", "kfac")


def factors(columns: int) -> dict[str, Factor]:
    """The factors of so many columns, by the names of their series."""
    tops = {f"Stratified({top}, k)": Stratified(top, columns - top) for top in (1, 2, 4) if columns > top}
    return {"Sampled(k)": Sampled(columns), **tops, "Rademacher(k)": Rademacher(columns)}


@dataclass(frozen=True)
class Line:
    """What was found for one factor of so many columns, on one network."""

    network: str
    quantity: str
    series: str
    factor: str
    columns: int
    error: float
    bias: float
    expected_bias: float


# Measuring --------------------------------------------------------------------------------------------------------


def networks(seed: int) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """The demo's network after one epoch and trained, and a batch of digits with their labels."""
    digits = demo._digits(seed)
    trained = demo._trained(digits, seed)
    epochs, demo.EPOCHS = demo.EPOCHS, 1
    try:
        early = demo._trained(digits, seed)
    finally:
        demo.EPOCHS = epochs
    return {"1 epoch": early, f"{epochs} epochs": trained}, digits.train[:BATCH], digits.train_labels[:BATCH]


def flat(result: Any, quantity: str) -> Tensor:
    """All entries of the diagonal, or of the factors G, in double precision."""
    values = result[quantity].values()
    parts = values if quantity == "diag_ggn" else [block.G for block in values if isinstance(block, Kronecker)]
    return torch.cat([part.double().flatten() for part in parts])


def compare(name: str, model: nn.Module, x: Tensor, y: Tensor, seeds: int) -> list[Line]:
    """A line for every factor, number of columns and quantity."""
    exact = fxcurv.compile(model, quantities=["diag_ggn", "kflr"])(x, y)
    truth = {"diag_ggn": flat(exact, "diag_ggn"), "kfac": flat(exact, "kflr")}
    lines: list[Line] = []
    for columns in tqdm(COLUMNS, name, disable=None):
        for series, factor in factors(columns).items():
            curv = fxcurv.compile(model, quantities=[fxcurv.DiagGGN(factor), fxcurv.KFAC(factor)])
            results = [curv(x, y, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
            for quantity in QUANTITIES:
                off = torch.stack([flat(r, quantity) for r in results]) - truth[quantity]
                scale = truth[quantity].norm()
                error = float(off.square().sum(1).mean().sqrt() / scale)
                bias = float(off.mean(0).norm() / scale)
                lines.append(Line(name, quantity, series, str(factor), columns, error, bias, error / seeds**0.5))
    return lines


# Reporting --------------------------------------------------------------------------------------------------------

HEADERS = ("network", "quantity", "factor", "columns", "error", "bias", "error / √seeds")


def table(lines: Sequence[Line]) -> str:
    rows = [(l.network, l.quantity, l.factor, l.columns, l.error, l.bias, l.expected_bias) for l in lines]
    return tabulate(rows, headers=HEADERS, tablefmt="github", floatfmt=("", "", "", "", ".3f", ".3f", ".3f"))


def figure(lines: Sequence[Line]) -> Any:
    """One panel for each network and quantity: the error against the columns, log-log."""
    names = list(dict.fromkeys(line.network for line in lines))
    canvas = plots._figure((9.0, 7.0))
    grid = canvas.subplots(len(names), len(QUANTITIES), squeeze=False, sharex=True)
    for row, name in zip(grid, names, strict=True):
        for ax, quantity in zip(row, QUANTITIES, strict=True):
            mine = [line for line in lines if (line.network, line.quantity) == (name, quantity)]
            errors: dict[str, dict[int, float]] = {}
            for line in mine:
                errors.setdefault(line.series, {})[line.columns] = line.error
            plots.error_curves(errors, ax=ax)
            ax.set_title(f"{'diagonal of the GGN' if quantity == 'diag_ggn' else 'G of KFAC'}, {name}", fontsize=10)
    return canvas


def finding(lines: Sequence[Line]) -> str:
    """One paragraph; every number in it is computed."""
    return " ".join(_ranked(lines, name) for name in dict.fromkeys(line.network for line in lines))


def _ranked(lines: Sequence[Line], name: str) -> str:
    parts: list[str] = []
    for quantity, words in zip(QUANTITIES, ("of the diagonal", "of G"), strict=True):
        at: Mapping[str, float] = {
            line.factor: line.error
            for line in lines
            if (line.network, line.quantity, line.columns) == (name, quantity, COLUMNS[-2])
        }
        ordered = sorted(at, key=lambda factor: at[factor])
        parts.append(f"{words} " + ", ".join(f"{at[factor]:.2f} {factor}" for factor in ordered))
    return f"After {name}, with {COLUMNS[-2]} of 9 columns, the error {'; '.join(parts)}."


def write(folder: Path, lines: Sequence[Line], command: str, about: str) -> None:
    """factors.csv, factors.md and factors.png, the first two beginning with the command that made them."""
    text = io.StringIO()
    text.write(f"# {command}\n# {about}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Line))
    writer.writerows([f"{v:.5f}" if isinstance(v, float) else v for v in astuple(line)] for line in lines)
    page = f"<!-- {command} -->\n\n# Factors\n\n`{command}`\n\n- {about}\n\n{finding(lines)}\n\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "factors.csv").write_text(text.getvalue(), encoding="utf-8")
    (folder / "factors.md").write_text(
        f"{page}![error against columns](factors.png)\n\n{table(lines)}\n", encoding="utf-8"
    )
    figure(lines).savefig(folder / "factors.png")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three seeds: does it run at all?")
    parser.add_argument("--output", type=Path, default=ROOT / "tools" / "results", help="folder of the files")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    seeds = 3 if arguments.quick else SEEDS
    models, x, y = networks(seed=0)
    lines = [line for name, model in models.items() for line in compare(name, model, x, y, seeds)]
    command = shlex.join(["python", "tools/factors.py", *(["--quick"] if arguments.quick else [])])
    about = f"{len(x)} digits, 10 classes, {seeds} seeds, float32, torch {torch.__version__}"
    write(arguments.output, lines, command, about)
    print(f"{table(lines)}\n\n{finding(lines)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
