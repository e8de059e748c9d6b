"""Report of the demo: tables, pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from fxcurv.inspect import plots

__all__ = ["SPARSITIES", "CheckedEntry", "DataCurvature", "DemoReport", "Pruning", "Row"]

TEST_DIGITS = 360

RANDOM_DRAWS = 5


# Report --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One parameter: the trace and status of both quantities."""

    name: str
    shape: tuple[int, ...]
    diag_ggn_trace: float
    kfac_trace: float
    diag_ggn_status: str
    kfac_status: str


@dataclass(frozen=True)
class CheckedEntry:
    """One entry of the diagonal, computed in float64 by fxcurv and by autograd."""

    name: str
    index: tuple[int, ...]
    computed: float
    expected: float

    @property
    def error(self) -> float:
        """Relative error; absolute if autograd gives 0."""
        return abs(self.computed - self.expected) / (abs(self.expected) or 1.0)


@dataclass(frozen=True)
class Pruning:
    """Test accuracy `kept[method][k]` with the share `sparsities[k]` of the weights set to zero, without retraining."""

    weights: int
    sparsities: tuple[float, ...]
    kept: Mapping[str, tuple[float, ...]]

    def mean(self, method: str) -> float:
        """Return the accuracy averaged over the sparsities above zero."""
        pruned = self.kept[method][1:]
        return sum(pruned) / len(pruned)

    def tolerated(self, method: str, loss: float = 0.01) -> float:
        """Return the largest sparsity up to which the accuracy drops by at most `loss`."""
        kept, last = self.kept[method], 0.0
        for sparsity, accuracy in zip(self.sparsities, kept, strict=True):
            if accuracy < kept[0] - loss - 1e-9:
                return last
            last = sparsity
        return last


@dataclass(frozen=True)
class DemoReport:
    """Results of the demo, and its files; `str()` is the conclusion."""

    accuracy: float
    rows: tuple[Row, ...]
    checked: tuple[CheckedEntry, ...]
    pruning: Pruning
    files: tuple[Path, ...]
    conclusion: str
    seconds: float

    @property
    def largest_error(self) -> float:
        return max(entry.error for entry in self.checked)

    def __str__(self) -> str:
        return self.conclusion


# The curvature of a data set -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataCurvature:
    """Curvature of the mean loss over a data set: `diagonal` of the GGN, Kronecker `factors` (A, G), `dense` blocks."""

    diagonal: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]
    dense: dict[str, Tensor]
    status: dict[str, tuple[str, str]]

    def kfac_trace(self, name: str) -> float:
        """tr(G ⊗ A) = tr(G)·tr(A), or the dense block's trace."""
        if name in self.dense:
            return self.dense[name].trace().item()
        A, G = self.factors[name]
        return (A.trace() * G.trace()).item()


RECOMPUTED, ONCE, MAGNITUDE, RANDOM = "saliency recomputed", "saliency once", "magnitude", "random"


SPARSITIES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


QUOTED_SPARSITY = 0.7


# Output --------------------------------------------------------------------------------------------------------------


def _tabulated(rows: Sequence[Sequence[str]], headers: Sequence[str], fmt: str) -> str:
    from tabulate import tabulate

    alignment = ("left", *_ALIGNED[len(headers)])
    return tabulate(rows, headers=headers, tablefmt=fmt, disable_numparse=True, colalign=alignment)


_ALIGNED = {4: ("right",) * 3, 5: ("right",) * 4, 6: ("left", "right", "left", "right", "left")}


def parameter_table(rows: Sequence[Row], fmt: str = "simple") -> str:
    """Return a line per parameter, and the total."""
    headers = ("parameter", "shape", "trace of diag_ggn", "status", "trace of kfac", "status")
    lines = [
        (
            row.name,
            "×".join(map(str, row.shape)),
            f"{row.diag_ggn_trace:.4g}",
            row.diag_ggn_status,
            f"{row.kfac_trace:.4g}",
            row.kfac_status,
        )
        for row in rows
    ]
    diag, kfac = sum(row.diag_ggn_trace for row in rows), sum(row.kfac_trace for row in rows)
    return _tabulated([*lines, ("all", "", f"{diag:.4g}", "", f"{kfac:.4g}", "")], headers, fmt)


def check_line(checked: Sequence[CheckedEntry]) -> str:
    worst = max(checked, key=lambda entry: entry.error)
    return (
        f"{len(checked)} entries of the diagonal drawn at random agree with autograd in float64;"
        f" largest relative error {worst.error:.1e} ({worst.name}{list(worst.index)})"
    )


def pruning_table(pruning: Pruning, fmt: str = "simple") -> str:
    lines = [
        (f"{sparsity:.0%}", *(f"{pruning.kept[method][k]:.1%}" for method in pruning.kept))
        for k, sparsity in enumerate(pruning.sparsities)
    ]
    return _tabulated(lines, ("weights set to zero", *pruning.kept), fmt)


def conclusion(accuracy: float, rows: Sequence[Row], curvature: DataCurvature, pruning: Pruning) -> str:
    """Return the conclusion, one paragraph; every number and verdict in it is computed."""
    top = max(rows, key=lambda row: row.diag_ggn_trace)
    size, trace = (sum(f(row) for row in rows) for f in (_numel, lambda row: row.diag_ggn_trace))
    convolutions = _trace_ratio([row for row in rows if len(row.shape) == 4])
    dense = _trace_ratio([row for row in rows if row.name in curvature.dense])
    at = pruning.sparsities.index(QUOTED_SPARSITY)
    tolerated = ", ".join(f"{pruning.tolerated(method):.0%} by {method}" for method in pruning.kept)
    left = ", ".join(f"{kept[at]:.1%} by {method}" for method, kept in pruning.kept.items())
    return (
        f"Found: the network classifies {accuracy:.1%} of {TEST_DIGITS} unseen digits. {top.name} has"
        f" {_numel(top) / size:.0%} of its parameters and {top.diag_ggn_trace / trace:.0%} of the GGN's trace. On the"
        f" convolutions, where KFAC neglects how pixels correlate, its trace is {convolutions:.2f} times the exact one;"
        f" on biases and BatchNorm, where it only samples labels, {dense:.2f} times. Of the {pruning.weights:,} weights"
        f" of convolutions and the linear layer these shares can be set to zero, without retraining, with at most one"
        f" point of test accuracy lost: {tolerated}. With {QUOTED_SPARSITY:.0%} of them gone, the accuracy is"
        f" {left}. {_verdict(pruning)}"
    )


def _numel(row: Row) -> int:
    return prod(row.shape)


def _trace_ratio(rows: Sequence[Row]) -> float:
    return sum(row.kfac_trace for row in rows) / sum(row.diag_ggn_trace for row in rows)


def _verdict(pruning: Pruning) -> str:
    """Return the method with the highest mean accuracy, or the two that are level (within one test digit)."""
    first, second, *_ = sorted(pruning.kept, key=pruning.mean, reverse=True)
    means = ", ".join(f"{method} {pruning.mean(method):.1%}" for method in pruning.kept)
    margin = pruning.mean(first) - pruning.mean(second)
    level = margin < 1 / TEST_DIGITS
    outcome = f"{first} and {second} are level" if level else f"{first} wins by {100 * margin:.1f} points over {second}"
    return f"Averaged over the sparsities tried ({means}), {outcome}."


def pictures(output: Path, rows: Sequence[Row], curvature: DataCurvature, pruning: Pruning) -> tuple[Path, ...]:
    traces = {
        "diag_ggn": {row.name: row.diag_ggn_trace for row in rows},
        "kfac": {row.name: row.kfac_trace for row in rows},
    }
    layers = list(curvature.factors)
    chosen = {name: curvature.factors[name] for name in (layers[0], layers[len(layers) // 2], layers[-1])}
    eigenvalues = {name: plots.kronecker_spectrum(A, G) for name, (A, G) in curvature.factors.items()}
    figures: dict[str, Any] = {
        "traces.png": plots.trace_bars(traces).figure,
        "factors.png": plots.factor_maps(chosen),
        "spectra.png": plots.spectra(eigenvalues).figure,
        "pruning.png": plots.pruning_curve(pruning.sparsities, pruning.kept).figure,
    }
    for name, figure in figures.items():
        figure.savefig(output / name)
    return tuple(output / name for name in figures)


def texts(
    output: Path, rows: Sequence[Row], checked: Sequence[CheckedEntry], pruning: Pruning, conclusion: str
) -> tuple[Path, Path]:
    """Write `table.txt` and `report.md`."""
    entries = [
        (f"{e.name}{list(e.index)}", f"{e.computed:.12g}", f"{e.expected:.12g}", f"{e.error:.1e}") for e in checked
    ]
    sections = (
        "# Curvature of a residual network on handwritten digits",
        conclusion,
        "## Curvature per parameter",
        "Of the mean cross entropy over the training digits: `diag_ggn` is exact, `kfac` samples one label per digit."
        " `exact` means that a value equals its definition.",
        parameter_table(rows, "github"),
        "![trace per parameter](traces.png)",
        "![Kronecker factors](factors.png)",
        "![eigenvalues of the Kronecker blocks](spectra.png)",
        "## Check",
        check_line(checked) + ".",
        _tabulated(entries, ("entry", "fxcurv", "autograd", "relative error"), "github"),
        "## Pruning",
        "Test accuracy without retraining. The saliency is ½·diag·w², computed once, or again after every step from the"
        f" weights that are left; {RANDOM} is the mean of {RANDOM_DRAWS} draws.",
        pruning_table(pruning, "github"),
        "![pruning](pruning.png)",
    )
    table, report = output / "table.txt", output / "report.md"
    table.write_text(parameter_table(rows) + "\n", encoding="utf-8")
    report.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return table, report
