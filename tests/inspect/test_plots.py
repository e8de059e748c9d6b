"""Pictures: what they show equals the numbers they are given, and nothing of matplotlib's global state is touched."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from fxcurv.inspect import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

matplotlib: Any = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _pyplot_is_left_alone() -> Iterator[None]:
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    yield
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def covariance(*shape: int, seed: int = 0) -> Tensor:
    """Matrices `X Xᵀ` of the last axis's size, of full rank."""
    x = torch.randn(*shape, shape[-1] + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x @ x.mT


def drawn(figure: Figure) -> bytes:
    """The figure as PNG: drawing it raises no warning."""
    file = BytesIO()
    figure.savefig(file)
    return file.getvalue()


def own_axes() -> Any:
    return pytest.importorskip("matplotlib.figure").Figure().subplots()


# Traces --------------------------------------------------------------------------------------------------------------

TRACES = {"kfac": {"fc.weight": 2.0, "fc.bias": 0.5}, "diag_ggn": {"fc.weight": 3.0, "out.weight": 0.0}}


def test_trace_bars_have_the_lengths_of_the_traces() -> None:
    ax: Any = plots.trace_bars(TRACES)
    kfac, diagonal = ax.containers
    assert [bar.get_width() for bar in kfac] == [2.0, 0.5]
    assert [bar.get_width() for bar in diagonal] == [3.0], "a zero has no place on a log axis"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["fc.weight", "fc.bias", "out.weight"]
    assert [label.get_text() for label in ax.get_legend().get_texts()] == ["kfac", "diag_ggn"]
    centres = [bar.get_y() + bar.get_height() / 2 for bar in (*kfac, *diagonal)]
    assert [round(centre) for centre in centres] == [0, 1, 0], "each bar lies at its parameter's tick"
    bottom, top = ax.get_ylim()
    assert bottom > top, "the first parameter is on top"
    assert ax.get_xscale() == "log"
    assert drawn(ax.figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("plot", ["trace_bars", "spectra", "pruning_curve"])
def test_axes_of_your_own_are_drawn_on(plot: str) -> None:
    ax = own_axes()
    made = {
        "trace_bars": lambda: plots.trace_bars(TRACES, ax=ax),
        "spectra": lambda: plots.spectra({"fc": torch.ones(3)}, ax=ax),
        "error_curves": lambda: plots.error_curves({"Sampled(k)": {1: 0.5, 4: 0.25}}, ax=ax),
        "pruning_curve": lambda: plots.pruning_curve((0.0, 0.5), {"random": (1.0, 0.1)}, ax=ax),
    }
    assert made[plot]() is ax
    assert ax.has_data()


# Factors -------------------------------------------------------------------------------------------------------------


def test_factor_maps_show_both_factors_of_every_layer() -> None:
    factors = {"fc": (covariance(4), covariance(3)), "grouped": (covariance(2, 3), covariance(2, 2))}
    figure: Any = plots.factor_maps(factors)
    shown = {ax.get_title(): ax.images[0].get_array().data for ax in figure.axes if ax.get_title()}
    assert list(shown) == ["A of fc", "G of fc", "A of grouped", "G of grouped"]
    A, G = factors["fc"]
    torch.testing.assert_close(torch.from_numpy(shown["A of fc"]), A, rtol=0, atol=0)
    torch.testing.assert_close(torch.from_numpy(shown["G of fc"]), G, rtol=0, atol=0)
    for name, factor in zip(("A of grouped", "G of grouped"), factors["grouped"], strict=True):
        expected = torch.block_diag(*factor)
        torch.testing.assert_close(torch.from_numpy(shown[name]), expected, rtol=0, atol=0)
    for ax in (axis for axis in figure.axes if axis.get_title()):
        low, high = ax.images[0].get_clim()
        assert low == -high, "zero is the middle of the colours"
    assert drawn(figure).startswith(b"\x89PNG")


def test_factor_maps_draw_zeros_and_tensors_with_gradients() -> None:
    figure: Any = plots.factor_maps({"fc": (torch.zeros(2, 2, dtype=torch.float64), covariance(2).requires_grad_())})
    assert figure.axes[0].images[0].get_clim() == (-1.0, 1.0)
    assert drawn(figure)


# Spectra -------------------------------------------------------------------------------------------------------------


def test_kronecker_spectrum_is_that_of_the_block() -> None:
    A, G = covariance(4), covariance(3, seed=1)
    expected = torch.linalg.eigvalsh(torch.kron(G, A)).flip(0)
    torch.testing.assert_close(plots.kronecker_spectrum(A, G), expected, rtol=1e-9, atol=0)


def test_kronecker_spectrum_of_groups_is_that_of_the_block_diagonal() -> None:
    A, G = covariance(2, 3), covariance(2, 2, seed=1)
    block = torch.block_diag(*(torch.kron(g, a) for g, a in zip(G, A, strict=True)))
    expected = torch.linalg.eigvalsh(block).flip(0)
    torch.testing.assert_close(plots.kronecker_spectrum(A, G), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_eigenvalue(dtype: torch.dtype) -> None:
    """A factor of rank 2 and one of rank 1 have two eigenvalues together; the others are 0, not 1e-17."""
    x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    A, G = x.T @ x, torch.ones(3, 3, dtype=dtype)
    values = plots.kronecker_spectrum(A, G)
    assert values.dtype is torch.float64
    assert torch.count_nonzero(values) == 2
    torch.testing.assert_close(values[:2], 3 * torch.linalg.eigvalsh((x @ x.T).double()).flip(0), rtol=1e-5, atol=0)


def test_spectra_are_the_positive_eigenvalues_by_rank() -> None:
    values = torch.tensor([[0.1, 3.0], [0.0, -1.0]], dtype=torch.float64)
    ax: Any = plots.spectra({"first": values, "last": torch.tensor([2.0], dtype=torch.float64)})
    first, last = ax.lines
    assert first.get_xdata().tolist() == [1, 2]
    assert first.get_ydata().tolist() == [3.0, 0.1]
    assert last.get_ydata().tolist() == [2.0]
    assert first.get_color() != last.get_color()
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert drawn(ax.figure).startswith(b"\x89PNG")


# Pruning -------------------------------------------------------------------------------------------------------------


def test_pruning_curve_is_in_per_cent() -> None:
    ax: Any = plots.pruning_curve((0.0, 0.25, 0.5), {"magnitude": (1.0, 0.75, 0.5), "random": (1.0, 0.25, 0.125)})
    magnitude, random = ax.lines
    assert magnitude.get_xdata().tolist() == random.get_xdata().tolist() == [0.0, 25.0, 50.0]
    assert magnitude.get_ydata().tolist() == [100.0, 75.0, 50.0]
    assert random.get_ydata().tolist() == [100.0, 25.0, 12.5]
    assert [label.get_text() for label in ax.get_legend().get_texts()] == ["magnitude", "random"]
    assert magnitude.get_marker() != random.get_marker()
    assert drawn(ax.figure).startswith(b"\x89PNG")
