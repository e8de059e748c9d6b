"""Plots of curvature, from plain numbers and tensors. Each draws on `ax`, or on a new figure outside pyplot.

Nothing is shown, and global settings of matplotlib are unchanged: `axes.figure.savefig("traces.png")` saves a plot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcurv.core.optional import imported

if TYPE_CHECKING:  # an optional package
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["error_curves", "factor_maps", "kronecker_spectrum", "pruning_curve", "spectra", "trace_bars"]


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, safe for colour blindness."""


def trace_bars(traces: Mapping[str, Mapping[str, float]], *, ax: Axes | None = None) -> Axes:
    """Plot horizontal bars `traces[quantity][parameter]` on a log axis, with the first parameter on top."""
    names = list(dict.fromkeys(name for series in traces.values() for name in series))
    ax = _axes((8.0, 1.2 + 0.12 * len(names) * (1 + len(traces)))) if ax is None else ax
    height = 0.8 / max(1, len(traces))
    for k, (label, series) in enumerate(traces.items()):
        shown = {name: value for name, value in series.items() if value > 0}
        rows = [names.index(name) + (k + 0.5) * height - 0.4 for name in shown]
        ax.barh(rows, list(shown.values()), height=height, color=COLOURS[k % len(COLOURS)], label=label)
    ax.set_yticks(range(len(names)), labels=names, fontsize=7)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xscale("log")
    ax.set_xlabel("trace of the parameter's block")
    ax.legend(fontsize=8)
    ax.grid(axis="x", alpha=0.3)
    return ax


def factor_maps(factors: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """Plot one row per layer: its Kronecker factors A and G as images, `[d, d]` or grouped `[g, d, d]`."""
    figure = _figure((7.6, 3.2 * len(factors)))
    grid = figure.subplots(len(factors), 2, squeeze=False)
    for row, (name, pair) in zip(grid, factors.items(), strict=True):
        for ax, symbol, factor in zip(row, "AG", pair, strict=True):
            _heat_map(ax, _square(factor))
            ax.set_title(f"{symbol} of {name}", fontsize=9)
    return figure


def _heat_map(ax: Axes, matrix: Tensor) -> None:
    """Plot signed entries on a symmetric log scale, linear below a thousandth of the largest."""
    top = float(matrix.abs().max()) or 1.0
    norm = imported("matplotlib.colors").SymLogNorm(linthresh=top / 1000, vmin=-top, vmax=top)
    image = ax.imshow(matrix.numpy(), norm=norm, cmap="RdBu_r", interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, ticks=[-top, -top / 30, 0, top / 30, top])
    bar.ax.set_yticklabels([f"{value:.1g}" for value in (-top, -top / 30, 0, top / 30, top)], fontsize=7)
    ax.tick_params(labelsize=7)


def spectra(eigenvalues: Mapping[str, Tensor], *, ax: Axes | None = None) -> Axes:
    """Plot the positive eigenvalues of each layer's block by rank, log-log, coloured from input to output."""
    ax = _axes((7.2, 4.8)) if ax is None else ax
    colours = imported("matplotlib").colormaps["viridis"]
    for k, (name, values) in enumerate(eigenvalues.items()):
        ordered = values.detach().double().cpu().flatten().sort(descending=True).values
        kept = ordered[ordered > 0]
        colour = colours(0.95 * k / max(1, len(eigenvalues) - 1))
        ax.plot(range(1, len(kept) + 1), kept.tolist(), color=colour, label=name, linewidth=1.3)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("rank")
    ax.set_ylabel("eigenvalue")
    ax.legend(fontsize=7)
    ax.grid(alpha=0.3)
    return ax


def kronecker_spectrum(A: Tensor, G: Tensor) -> Tensor:
    """Return the eigenvalues of `G ⊗ A` (groups: block diagonal of `G_g ⊗ A_g`), descending; rounding is 0."""
    a, g = _eigenvalues(A), _eigenvalues(G)
    return (g.unsqueeze(-1) * a.unsqueeze(-2)).flatten().sort(descending=True).values


def _eigenvalues(factor: Tensor) -> Tensor:
    """Return `[…, d]`, with 0 for eigenvalues below the rounding error of the factor's dtype."""
    values = torch.linalg.eigvalsh(factor.detach().double())
    floor = values[..., -1:] * values.shape[-1] * torch.finfo(factor.dtype).eps
    return torch.where(values > floor, values, 0.0)


def pruning_curve(sparsities: Sequence[float], kept: Mapping[str, Sequence[float]], *, ax: Axes | None = None) -> Axes:
    """Plot the accuracies `kept[method]` (0 … 1) at each share of weights set to zero."""
    ax = _axes((6.4, 4.2)) if ax is None else ax
    for k, (method, accuracies) in enumerate(kept.items()):
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "marker": "osD^v"[k % 5], "markersize": 4}
        ax.plot([100 * s for s in sparsities], [100 * a for a in accuracies], label=method, **style)
    ax.set_xlabel("weights set to zero, %")
    ax.set_ylabel("accuracy, %")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return ax


def error_curves(errors: Mapping[str, Mapping[int, float]], *, ax: Axes | None = None) -> Axes:
    """Plot `errors[series][columns]`, relative errors of estimates against their number of columns, log-log."""
    ax = _axes((6.4, 4.2)) if ax is None else ax
    for k, (series, found) in enumerate(errors.items()):
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "marker": "osD^v"[k % 5], "markersize": 4}
        ax.plot(list(found), list(found.values()), label=series, **style)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ticks = sorted({columns for found in errors.values() for columns in found})
    ax.set_xticks(ticks, labels=map(str, ticks))
    ax.set_xticks([], minor=True)
    ax.set_xlabel("columns")
    ax.set_ylabel("relative error")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return ax


# Canvases ------------------------------------------------------------------------------------------------------------


def _figure(size: tuple[float, float]) -> Figure:
    """Return a figure outside pyplot; it needs no display and need not be closed."""
    return imported("matplotlib.figure").Figure(figsize=size, layout="constrained", dpi=120)


def _axes(size: tuple[float, float]) -> Axes:
    return _figure(size).subplots()


def _square(factor: Tensor) -> Tensor:
    """Return a matrix unchanged, grouped factors as one block-diagonal matrix, on the CPU."""
    matrix = factor.detach().double().cpu()
    return matrix if matrix.ndim == 2 else torch.block_diag(*matrix.flatten(0, -3))
