"""Every form of a statistic equals its definition, over a grid of geometries; and whatever is chosen, results agree."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxcurv
import passes
from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.contractions import convolutions, covariances, diagonals, entries
from fxcurv.contractions.definitions import (
    Columns,
    DiagonalPerSample,
    Gradient,
    Gram,
    InputCovariance,
    OutputCovariance,
    SquaredNorms,
    SumOfSquares,
)
from fxcurv.contractions.statistic import Statistic, StatisticValue
from fxcurv.convolution import lag_correlation as meetings
from fxcurv.convolution.lag_correlation import LagCorrelations, axis_overlaps
from fxcurv.convolution.patches import Patches
from fxcurv.convolution.row_products import RowProducts
from fxcurv.convolution.second_moment import ALGORITHMS, second_moment
from fxcurv.convolution.unfold import Unfolding
from fxcurv.core.shapes import Samples
from fxcurv.ir.backward_ops import InputPositions, OutputPositions
from fxcurv.linalg import allocation as pages
from fxcurv.linalg.cost import Cost, Rates, copying
from fxcurv.linalg.matmul import BLOCK, HALVED, halves, times_transpose, transpose_times
from fxcurv.losses.base import as_loss
from fxcurv.quantities.selection import chosen
from fxcurv.runtime.memory import Chunks
from fxcurv.runtime.program import Program
from fxcurv.runtime.run import Minibatch, run

CONVS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
N, V = 3, 2


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def close(value: StatisticValue, expected: Tensor, tolerance: float = 1e-11) -> None:
    dense = value.dense() if isinstance(value, LazyGram) else value
    torch.testing.assert_close(dense, expected, rtol=tolerance, atol=tolerance)


def geometries() -> list[Any]:
    """Kernel, stride, padding, dilation, groups and sizes: every axis of its own, in one, two and three dimensions."""
    grid = itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2), (1, 2), (1, 2, 3), (4, 7))
    cases: list[Any] = []
    for number, (kernel, stride, padding, dilation, groups, axes, size) in enumerate(grid):
        if number % (1, 1, 3, 23)[axes]:  # all of one axis, some of two and three
            continue
        shape = (4, *range(size, size + axes))
        kernels = tuple(max(1, kernel - k) if k else kernel for k in range(axes))
        if all(n + 2 * padding > dilation * (k - 1) for n, k in zip(shape[1:], kernels, strict=True)):
            name = f"{axes}d-k{kernel}-s{stride}-p{padding}-d{dilation}-g{groups}-{size}"
            cases.append(pytest.param((kernels, stride, padding, dilation, groups), shape, id=name))
    return cases


def convolution(geometry: tuple[Any, ...], shape: tuple[int, ...]) -> nn.Module:
    kernel, stride, padding, dilation, groups = geometry
    with torch.random.fork_rng(devices=[]):
        return CONVS[len(shape) - 1](shape[0], 6, kernel, stride, padding, dilation, groups).double()


@pytest.mark.parametrize(("geometry", "shape"), geometries())
def test_forms_of_convolutions(geometry: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    op: Any = convolution(geometry, shape)
    z, patches = draw(N, *shape), Patches.of(op)
    x = InputPositions(op, Samples(0))(z)
    A = InputCovariance()([x])
    for way in ALGORITHMS.values():
        close(way(patches, z).covariance(), A)
        single, scale = way(patches, z.float()).covariance(), float(A.abs().max())
        torch.testing.assert_close(single, A.float(), rtol=1e-5, atol=1e-6 * scale)
    close(patches.sums(z), x.sum(1))
    for ones in (False, True):
        close(covariances.CovarianceOfPatches(patches, ones)([z]), InputCovariance(ones=ones)([x]))
        close(covariances.PooledPatches(patches, ones)([z]), InputCovariance(pooled=True, ones=ones)([x]))
    saved = covariances.KeptInputs(patches)
    close(saved.sum_of(saved([z])), A)
    raw = draw(V, *op(z).shape)
    S = OutputPositions(op, Samples(0))(raw)
    close(convolutions.GradientOfConvolution(op)([z], [raw]), Gradient()([x], [S]))
    diagonal = SumOfSquares()([x], [S])
    close(diagonals.DiagonalBySample()([x], [S]), diagonal)
    if x.shape[1] <= 50:
        close(diagonals.DiagonalByPairs()([x], [S]), diagonal)
        close(diagonals.DiagonalPerSampleByPairs()([x], [S]), DiagonalPerSample()([x], [S]))
    close(DiagonalPerSample()([x], [S]).sum(0), diagonal)
    close(convolutions.DiagonalByConvolution(op)([z], [raw]), diagonal)
    close(convolutions.DiagonalPerSampleByConvolution(op)([z], [raw]), DiagonalPerSample()([x], [S]))
    close(convolutions.SquaredNormsByConvolution(op)([z], [raw]), SquaredNorms()([x], [S]))
    close(convolutions.ColumnsByConvolution(op)([z], [raw]), Columns()([x], [S]))
    close(convolutions.ColumnsBySample(patches)([z], [S]), Columns()([x], [S]))
    close(diagonals.SquaredNormsByPairs()([x], [S]), SquaredNorms()([x], [S]))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("positions", [1, 5])
def test_forms_of_positions(groups: int, positions: int) -> None:
    x, S = draw(N, positions, groups, 40), draw(V, N, positions, groups, 50)
    pairs: dict[str, tuple[StatisticValue, Tensor]] = {
        "inputs": (_sum(covariances.KeptInputs(None), [x]), InputCovariance()([x])),
        "inputs and ones": (_sum(covariances.KeptInputs(None, ones=True), [x]), InputCovariance(ones=True)([x])),
        "outputs": (_sum(covariances.KeptOutputs(), [S]), OutputCovariance()([S])),
        "pooled outputs": (_sum(covariances.KeptOutputs(pooled=True), [S]), OutputCovariance(pooled=True)([S])),
        "entries": (_sum(covariances.KeptEntries(), [x], [S]), Gram()([x], [S]).unsqueeze(0)),
        "outer products": (Columns()([x], [S]), torch.einsum("vnsgo,nsgi->vngoi", S, x)),
        "by sample": (diagonals.DiagonalBySample()([x], [S]), SumOfSquares()([x], [S])),
        "norms by pairs": (diagonals.SquaredNormsByPairs()([x], [S]), SquaredNorms()([x], [S])),
        "by pairs": (diagonals.DiagonalByPairs()([x], [S]), SumOfSquares()([x], [S])),
        "by pairs per sample": (diagonals.DiagonalPerSampleByPairs()([x], [S]), DiagonalPerSample()([x], [S])),
    }
    if positions == 1:
        pairs["single"] = diagonals.DiagonalOfSinglePositions()([x], [S]), SumOfSquares()([x], [S])
        pairs["single bias"] = diagonals.DiagonalOfSinglePositions()([None], [S]), SumOfSquares()([None], [S])
        per_sample = diagonals.DiagonalPerSampleOfSinglePositions()
        pairs["single per sample"] = per_sample([x], [S]), DiagonalPerSample()([x], [S])
        pairs["single bias per sample"] = per_sample([None], [S]), DiagonalPerSample()([None], [S])
    for value, expected in pairs.values():
        close(value, expected)


@pytest.mark.parametrize("chunk", [1, 9000, 17000, 1 << 22])
def test_squares_are_summed_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample and column at a time, all columns of one sample, two samples, all."""
    for module in (entries, convolutions, diagonals):
        monkeypatch.setattr(module, "CHUNK", chunk)
    x, S = draw(N, 5, 2, 40), draw(V, N, 5, 2, 50)
    squares = torch.einsum("vnsgo,nsgi->vngoi", S, x).square()
    close(SumOfSquares()([x], [S]), squares.sum((0, 1)))
    close(SquaredNorms()([x], [S]), squares.sum((0, 2, 3, 4)))
    for statistic in (DiagonalPerSample(), diagonals.DiagonalPerSampleByPairs()):
        close(statistic([x], [S]), squares.sum(0))


def _sum(statistic: Statistic, *args: list[Tensor]) -> StatisticValue:
    return statistic.sum_of(statistic(*args))


def test_samples_one_by_one_keep_cross_terms_of_several_uses() -> None:
    xs, Ss = [draw(N, 3, 2, 4), draw(N, 2, 2, 4)], [draw(V, N, 3, 2, 5), draw(V, N, 2, 2, 5)]
    close(diagonals.DiagonalBySample()(xs, Ss), SumOfSquares()(xs, Ss))
    close(diagonals.SquaredNormsByPairs()(xs, Ss), SquaredNorms()(xs, Ss))


# Kept moments -----------------------------------------------------------------------------------------------------


def moment(*shape: int) -> LazyGram:
    return LazyGram((draw(*shape),), scale=0.5)


def test_a_moment_does_what_its_matrix_does() -> None:
    saved = moment(4, 1, 2, 9)
    A, B = saved.dense(), draw(2, 9, 3)
    assert (saved.count, saved.side, tuple(saved.shape)) == (4, 9, (2, 9, 9))
    close(saved.diagonal(), A.diagonal(dim1=1, dim2=2))
    close(saved.mm(B), A @ B)
    close(saved.solve(B, 0.1), torch.linalg.solve(A + 0.1 * torch.eye(9, dtype=A.dtype), B))
    close((saved / 4).dense(), A / 4)


def test_moments_add_and_are_formed_when_that_is_smaller() -> None:
    a, b = moment(3, 1, 1, 9), moment(4, 1, 1, 9)
    both = a + b
    assert isinstance(both, LazyGram)
    close(both, a.dense() + b.dense())
    formed = both + b
    assert isinstance(formed, Tensor)
    close(formed, a.dense() + 2 * b.dense())
    close(formed + a, formed + a.dense())
    close(a + formed, formed + a.dense())
    close(a + b / 2, a.dense() + b.dense() / 2)


def test_a_result_owns_what_it_keeps() -> None:
    with torch.random.fork_rng(devices=[]):
        model, x = nn.Sequential(nn.Linear(30, 20)).eval(), draw(3, 30, dtype=torch.float32)
    block: Any = fxcurv.compile(model)(x, torch.tensor([0, 1, 2]))["kfac"]["0.weight"]
    assert isinstance(block.input_moment, LazyGram)
    A = block.input_moment.dense()[0].clone()
    x.zero_()
    close(block.A, A)


def test_a_larger_batch_than_was_compiled_for_is_summed() -> None:
    """The form is chosen for 3 samples; for 60 the vectors would take more than the matrix."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(30, 20)).double().eval()
    compiled, x = fxcurv.compile(model, quantities=["kflr"], example_inputs=draw(3, 30)), draw(60, 30)
    small, large = (compiled(z, torch.zeros(len(z), dtype=torch.int64))["kflr"]["0.weight"] for z in (x[:3], x))
    assert isinstance(small.input_moment, LazyGram)
    assert isinstance(large.input_moment, Tensor)
    close(large.A, x.mT @ x / 60)
    close(small.A, x[:3].mT @ x[:3] / 3)


# Products ---------------------------------------------------------------------------------------------------------


LONG = HALVED // (2 * BLOCK) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 4, 5), (130, 140, 150), (2 * BLOCK + 5, 7, LONG), (2903, 2905, 3)])
def test_products(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, b = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype)
    assert halves(m, k) == (k == LONG)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    for left, right in (
        (a, b),
        (a.mT.contiguous().mT, b),
        (a, b.mT.contiguous().mT),
        (draw(m, 2 * k)[:, :k].to(dtype), b),
    ):
        close(times_transpose(left, right).double(), left.double() @ right.double().mT, tolerance)
        close(transpose_times(left.mT, right.mT).double(), left.double() @ right.double().mT, tolerance)
    for rows in (a, a.mT.contiguous().mT):
        close(times_transpose(rows, rows).double(), a.double() @ a.double().mT, tolerance)


def test_large_memory_is_asked_for_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_ask", lambda *where: asked.append(where))
    like = torch.zeros(1, dtype=torch.float64)
    large, small = pages.new_empty(like, 2, pages.LARGE // 16), pages.new_empty(like, 3)
    assert asked == [(large.data_ptr(), pages.LARGE)]
    assert (large.shape, small.shape, small.dtype) == ((2, pages.LARGE // 16), (3,), torch.float64)
    with FakeTensorMode():
        assert pages.new_empty(torch.zeros(1), pages.LARGE).shape == (pages.LARGE,)
    assert len(asked) == 1


def test_advice_leaves_memory_as_it_is() -> None:
    filled = torch.ones(pages.LARGE)
    pages._ask(filled.data_ptr(), 4 * pages.LARGE)
    assert bool((filled == 1).all())


def test_a_moment_of_a_difference_is_scaled() -> None:
    saved = draw(4, 3, 2, 5)
    close(LazyGram((saved,), scale=-0.3), LazyGram((saved,)).dense() * -0.3)
    close(LazyGram((saved,), scale=0.3), LazyGram((saved,)).dense() * 0.3)


# Whole models -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Every kind of use: plain, strided, grouped, depthwise convolution; a scale; Linear over positions, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.mix, self.wide, self.head = nn.Linear(8, 8), nn.Linear(8, 40), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.depthwise(self.grouped(x).relu()).flatten(2).transpose(1, 2)
        return self.head(self.wide(self.mix(self.mix(x).tanh()).mean(1)).tanh())


QUANTITIES = [
    fxcurv.Grad(),
    fxcurv.DiagGGN(),
    fxcurv.KFAC(fxcurv.Exact()),
    fxcurv.KFAC(fxcurv.Exact(), approx="reduce", joint=True),
    fxcurv.KFAC(fxcurv.Exact(), joint=True),
    fxcurv.BatchL2(),
    fxcurv.BatchGrad(),
    fxcurv.BatchDiagGGN(),
]


def results(forced: str | None) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().double().eval()
    x, y = draw(3, 3, 6, 7), torch.tensor([0, 3, 1])
    selection = chosen(QUANTITIES)
    program = Program.of(
        passes.emit(model, passes.canonicalize(model, x), selection, x, {"*": forced} if forced else None)
    )
    names = {
        node.meta["contraction"].variant
        for gm in program.graphs
        for node in gm.graph.nodes
        if "contraction" in node.meta
    }
    assert forced is None or forced in names
    curvature = run(
        program, model, as_loss("cross_entropy"), Minibatch(x, y), Chunks(3, dict.fromkeys(program.backwards, 2))
    )
    return {
        f"{entry.quantity} {entry.parameter} {kind}": t
        for entry in curvature.entries
        for kind, t in entry.tensors().items()
    }


DEFINITIONS: list[Callable[[], Statistic]] = [
    *(Columns, SumOfSquares, DiagonalPerSample, Gradient, Gram, InputCovariance, OutputCovariance, SquaredNorms)
]
VARIANTS = [*(d.__name__ for d in DEFINITIONS), *diagonals.__all__]


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_agree_by_every_algorithm(variant: str) -> None:
    expected, found = results(None), results(variant)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


RATES = {torch.float32: Rates(180e9, 12e9, 6e-6), torch.float64: Rates(45e9, 12e9, 6e-6)}
"""One core with AVX-512 and oneDNN, whatever this host has: choices are tested for these rates."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_channels_are_multiplied_by_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depthwise 7×7 kernels are; a convolution over many channels never is."""
    monkeypatch.setattr("fxcurv.convolution.second_moment.rates_of", lambda device, dtype: RATES[dtype])
    for channels, side in ((40, 56), (80, 28), (160, 14), (320, 7)):
        z = torch.empty(8, channels, side, side, dtype=dtype, device="meta")
        depthwise, dense = (Patches((7, 7), (1, 1), (3, 3), (1, 1), groups) for groups in (channels, 1))
        assert isinstance(second_moment(depthwise, z), RowProducts)
        assert not isinstance(second_moment(dense, z), RowProducts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "groups", "side", "cheaper"), [(40, 40, 56, True), (512, 1, 7, False)])
def test_few_channels_are_convolved(channels: int, groups: int, side: int, cheaper: bool, dtype: torch.dtype) -> None:
    """The entries of a depthwise kernel, and not those of a large one on a small map."""
    op = nn.Conv2d(channels, channels, 7, padding=3, groups=groups, dtype=dtype, device="meta")
    z, S = (torch.empty(*lead, 8, channels, side, side, dtype=dtype, device="meta") for lead in ((), (1,)))
    x = InputPositions(op, Samples(0))(z)
    defined = SumOfSquares().cost([x], [OutputPositions(op, Samples(0))(S)]) + copying(x.numel(), x.element_size())
    by_convolution = convolutions.DiagonalByConvolution(op).cost([z], [S])
    assert (by_convolution.seconds(RATES[dtype]) < defined.seconds(RATES[dtype])) == cheaper


def test_pairs_of_taps_share_what_they_meet() -> None:
    """Along an axis with a padded kernel of 3 at most 7 meetings of 9 differ, on the smallest maps fewer."""
    (axis, _), expected = Patches((3, 3), (1, 1), (1, 1), (1, 1), 1).axes, {1: 1, 2: 5, 3: 7, 9: 7}
    assert {length: len(axis_overlaps(axis, length).different) for length in expected} == expected


def test_meetings_follow_from_the_widest_at_their_displacement() -> None:
    """On wide maps a row of the border is multiplied where all rows but that were; on narrow ones nothing is gained."""
    (axis, _) = Patches((3, 3), (1, 1), (1, 1), (1, 1), 1).axes
    wide, narrow = axis_overlaps(axis, 9), axis_overlaps(axis, 2)
    assert sorted(one.length for one in wide.multiplied) == [1, 1, 7, 7, 8, 8, 9]
    assert len(wide.follows) == 2
    assert set(narrow.multiplied) == narrow.different
    for one, (widest, *outside) in wide.follows.items():
        met = {*range(widest.first, widest.last + 1)} - {
            *itertools.chain(*(range(o.first, o.last + 1) for o in outside))
        }
        assert met == {*range(one.first, one.last + 1)}


def test_meetings_of_samples_in_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    z, patches = draw(5, 4, 6, 5), Patches((3, 3), (1, 2), (1, 0), (1, 2), 2)
    expected = Unfolding(patches, z).covariance()
    for part in (1, 2 * z[0].numel(), z.numel()):
        monkeypatch.setattr(meetings, "PART", part)
        close(LagCorrelations(patches, z).covariance(), expected)


def test_products_per_channel_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, S = draw(5, 3, 2, 1), draw(4, 5, 3, 2, 1)
    for part in (1, 13, 50, 1000):  # of a sample, of two, of all samples of two columns, of everything
        monkeypatch.setattr(entries, "CACHE", part)
        close(entries.per_sample([x], [S]), (S * x).sum(2).unsqueeze(-1))


def test_temporaries_are_gone_when_the_next_begin() -> None:
    first, second = Cost(1, 2, 3, temporary=10), Cost(4, 5, 6, temporary=7)
    assert first + second == Cost(5, 7, 9, temporary=10)
    assert second * 2 == Cost(8, 10, 12, temporary=7)


def test_an_odd_form_is_cheaper_where_it_should_be() -> None:
    """The model of costs prefers meetings for most maps, patches of few channels with long strides, pairs if few."""
    patches, rates = Patches((3, 3), (1, 1), (1, 1), (1, 1), 1), Rates(1e11, 1e10, 5e-6)
    for shape, flops in (((8, 64, 56, 56), 0.4), ((16, 512, 2, 2), 0.06)):
        met, unfolded = (way(patches, torch.empty(shape, device="meta")).cost() for way in (LagCorrelations, Unfolding))
        assert met.flops < flops * unfolded.flops
        assert met.seconds(rates) < 0.6 * unfolded.seconds(rates)
    stem, image = Patches((7, 7), (2, 2), (3, 3), (1, 1), 1), torch.empty(16, 3, 64, 64, device="meta")
    assert LagCorrelations(stem, image).cost().seconds(rates) > 2 * Unfolding(stem, image).cost().seconds(rates)
    x, S = torch.empty(8, 4, 1, 4608, device="meta"), torch.empty(9, 8, 4, 1, 512, device="meta")
    assert diagonals.DiagonalByPairs().cost([x], [S]).flops < diagonals.DiagonalBySample().cost([x], [S]).flops


# Algorithms that a user names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm_is_named_by_module_path(algorithm: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().double().eval()
    x, y = draw(3, 3, 6, 7), torch.tensor([0, 3, 1])
    quantities = {"*": None, "stem.*": "kfac"}
    expected = fxcurv.compile(model, "cross_entropy", quantities)(x, y)["kfac"]["stem.weight"]
    compiled = fxcurv.compile(model, "cross_entropy", quantities, algorithms={"stem": algorithm})
    found = compiled(x, y)["kfac"]["stem.weight"]
    selected = {
        node.meta["contraction"].variant for node in compiled.program.forward.graph.nodes if "contraction" in node.meta
    }
    assert selected == {algorithm}
    torch.testing.assert_close(found.A, expected.A, rtol=1e-12, atol=1e-12)


def test_an_algorithm_that_applies_nowhere_is_refused() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().double().eval()
    x = draw(3, 3, 6, 7)
    compiled = partial(fxcurv.compile, model, "cross_entropy", "kfac", example_inputs=x)
    with pytest.raises(fxcurv.QuantityError, match=r"'unfolding' applies to no statistic that 'stem' .* unfold"):
        compiled(algorithms={"stem": "unfolding"})
    with pytest.raises(
        fxcurv.QuantityError, match=r"'nowhere' matches; give a module path.*kfac\.depthwise\.weight\.A"
    ):
        compiled(algorithms={"nowhere": "unfold"})
    compiled(algorithms={"kfac.stem.weight.A": "unfold"})
