"""Blocks as operators: whatever is computed of one equals dense linear algebra on its matrix, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

import fxcurv
from fxcurv.blocks.base import Damping
from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.convolution.patches import Patches
from fxcurv.linalg.factorizations import cholesky, rank

G = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=G)


def psd(*shape: int) -> Tensor:
    root = draw(*shape, shape[-1])
    return root @ root.mT


def saved(*shape: int) -> LazyGram:
    """Of vectors `[n, s, g, d]`."""
    return LazyGram((draw(*shape), draw(*shape)), scale=0.3)


PATCHES = LazyGram((draw(1, 4, 2, 2),), Patches((3, 3), (1, 1), (1, 1), (1, 1), 2), 0.5)  # 4 patches of 18 entries

BLOCKS: dict[str, fxcurv.Block] = {
    "diagonal": fxcurv.Diagonal((2, 3), torch.rand(2, 3, dtype=torch.float64, generator=G)),
    "dense": fxcurv.Dense((6,), psd(6)),
    "dense_kept": fxcurv.Dense((2, 6), saved(1, 2, 1, 12), parameters=("p",)),
    "kronecker": fxcurv.Kronecker((4, 2, 3), psd(6), psd(4), parameters=("w",)),
    "kronecker_one_kept": fxcurv.Kronecker((4, 2, 3), saved(1, 2, 1, 6), psd(4), parameters=("w",)),
    "kronecker_kept": fxcurv.Kronecker((7, 6), saved(1, 2, 1, 6), saved(1, 1, 1, 7), parameters=("w",)),
    "grouped": fxcurv.Kronecker((4, 3), psd(2, 3), psd(2, 2)),
    "grouped_kept": fxcurv.Kronecker((6, 2, 3, 3), PATCHES, saved(1, 1, 2, 3), parameters=("conv.weight",)),
}
BLOCKS["eigenbasis"] = BLOCKS["grouped"].inverse(0.1)
BLOCKS["eigenbasis_kept"] = BLOCKS["kronecker_one_kept"].inverse(0.1)
BLOCKS["swapped"] = fxcurv.Kronecker((3, 4), psd(3), psd(4), in_out=True, parameters=("w",))
BLOCKS["swapped_kept"] = fxcurv.Kronecker((6, 5), saved(1, 2, 1, 6), psd(5), in_out=True, parameters=("w",))
BLOCKS["eigenbasis_swapped"] = BLOCKS["swapped"].inverse(0.1)
BLOCKS["eigenbasis_swapped_kept"] = BLOCKS["swapped_kept"].inverse(0.1)
REGULAR = [name for name in BLOCKS if "kept" not in name or "eigenbasis" in name]

each = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
regular = pytest.mark.parametrize("block", [BLOCKS[name] for name in REGULAR], ids=REGULAR)


def identity(block: fxcurv.Block) -> Tensor:
    return torch.eye(block.numel, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@each
def test_agrees_with_its_dense_matrix(block: fxcurv.Block) -> None:
    matrix = block.dense()
    assert matrix.shape == (block.numel, block.numel)
    close(matrix, matrix.T)
    close(block.diag(), matrix.diagonal().reshape(block.shape))
    close(block.trace(), matrix.trace())
    close(block.frobenius_norm(), torch.linalg.matrix_norm(matrix))
    v, V = draw(*block.shape), draw(block.numel, 3)
    close(block.mv(v), (matrix @ v.flatten()).reshape(block.shape))
    close(block.mv(v.flatten()), matrix @ v.flatten())
    close(block @ v, block.mv(v))
    close(block.mm(V), matrix @ V)
    close(block @ V, matrix @ V)
    close((2.5 * block).dense(), 2.5 * matrix)
    close(block.as_dense().dense(), matrix)
    assert tuple(t.shape for t in block.tensors.values()) == tuple(block.sizes.values())
    with pytest.raises(fxcurv.InputError, match=f"give {block.numel} entries"):
        block.mv(v.flatten()[1:])
    with pytest.raises(fxcurv.InputError, match=rf"give \[{block.numel}, k\]"):
        block.mm(V.T)


@each
def test_vectors_have_the_structure_that_was_given(block: fxcurv.Block) -> None:
    """A tensor of the block's shape, a flat one, or a dict of the block's name."""
    (name,) = block.domain.shapes
    v = draw(*block.shape)
    for method in (block.mv, lambda v: block @ v, lambda v: block.solve(v, 0.2), block.inverse(0.2).mv):
        expected = method(v)
        assert expected.shape == block.shape
        close(method(v.flatten()), expected.flatten())
        found = method({name: v})
        assert list(found) == [name]
        close(found[name], expected)
        with pytest.raises(fxcurv.InputError, match=r"names differ: .*other"):
            method({"other": v})


def test_eigenvalues_of_small_and_zero_blocks() -> None:
    pytest.importorskip("scipy")
    for zero in (fxcurv.Diagonal((4,), torch.zeros(4).double()), fxcurv.Dense((2, 3), torch.zeros(6, 6).double())):
        values, vectors = zero.eigsh(2)
        close(values, torch.zeros(2).double())
        close(vectors.T @ vectors, torch.eye(2).double())
    for which in ("LA", "SA", "LM", "SM", "BE"):
        values, vectors = fxcurv.Diagonal((1,), torch.tensor([3.0]).double()).eigsh(1, which)
        close(values, torch.tensor([3.0]).double())
        assert vectors.shape == (1, 1)
    block = BLOCKS["dense"]
    close(block.eigsh(2, "SM")[0], block.eigvalsh()[:2])
    with pytest.raises(fxcurv.InputError, match="which='largest'; choose one of LA, SA, LM, SM, BE"):
        block.eigsh(2, "largest")
    with pytest.raises(fxcurv.FxcurvError, match="Lanczos' method failed") as raised:
        fxcurv.Diagonal((30,), torch.full((30,), math.nan).double()).eigsh(2)
    assert raised.value.code == "FXC426"


def test_a_grouped_block_is_block_diagonal() -> None:
    block = BLOCKS["grouped"]
    assert isinstance(block, fxcurv.Kronecker)
    expected = torch.block_diag(*(torch.kron(g, a) for g, a in zip(block.G, block.A, strict=True)))
    close(block.dense(), expected)


@pytest.mark.parametrize("name", ["swapped", "swapped_kept"])
def test_inputs_first_acts_on_the_transpose(name: str) -> None:
    """A ⊗ G of W[i,o] is what G ⊗ A is of Wᵀ."""
    block = BLOCKS[name]
    assert isinstance(block, fxcurv.Kronecker)
    other = replace(block, shape=block.shape[::-1], in_out=False)
    close(block.dense(), torch.kron(block.A, block.G))
    close(other.dense(), torch.kron(block.G, block.A))
    W = draw(*block.shape)
    pairs = (
        (block, other),
        (block.eigenbasis, other.eigenbasis),
        (block.sqrt(), other.sqrt()),
        *((block.inverse(0.1, method), other.inverse(0.1, method)) for method in get_args(Damping)),
        (2 * block, 2 * other),
        (block + block, other + other),
    )
    for ours, theirs in pairs:
        close(ours.mv(W), theirs.mv(W.T.contiguous()).T)
        close(ours.solve(W, 0.2), theirs.solve(W.T.contiguous(), 0.2).T)
        close(ours.diag(), theirs.diag().T)
    assert block.plus(replace(block, in_out=False)) is None


# Damped -----------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("damping", [0.03, 5])
def test_solves_inverts_and_measures_damped(block: fxcurv.Block, damping: float) -> None:
    damped = block.dense() + damping * identity(block)
    v = draw(*block.shape)
    expected = torch.linalg.solve(damped, v.flatten())
    close(block.solve(v, damping), expected.reshape(block.shape))
    close(block.inverse(damping).dense(), torch.linalg.inv(damped))
    close(block.inverse(damping) @ v.flatten(), expected)
    close(block.logdet(damping), torch.logdet(damped))
    close(block.det(damping) / damped.det(), torch.tensor(1.0, dtype=torch.float64))


@regular
def test_solves_inverts_and_measures_undamped(block: fxcurv.Block) -> None:
    matrix, v = block.dense(), draw(*block.shape)
    torch.testing.assert_close(block.solve(v).flatten(), torch.linalg.solve(matrix, v.flatten()), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(block.power(-1).dense(), torch.linalg.inv(matrix), rtol=1e-6, atol=1e-6)
    close(block.logdet(), torch.logdet(matrix))


@each
def test_eigenvalues_and_powers(block: fxcurv.Block) -> None:
    matrix = block.dense()
    close(block.eigvalsh(), torch.linalg.eigvalsh(matrix))
    values, vectors = block.eigh()
    close(values, block.eigvalsh())
    close(vectors.T @ vectors, identity(block))
    close(vectors * values @ vectors.T, matrix)
    root = block.sqrt()
    assert type(root) is type(block)
    close(root.dense() @ root.dense(), matrix)
    close(block.power(2).dense(), matrix @ matrix)
    close(block.power(0.3).dense() @ block.power(0.7).dense(), matrix)
    close(block.power(0).dense(), identity(block))


def deficient(side: int, rank: int) -> Tensor:
    root = draw(side, rank)
    return root @ root.T


def vectors(count: int, groups: int, side: int) -> LazyGram:
    return LazyGram((draw(count, 1, groups, side),))


DEFICIENT: dict[str, fxcurv.Block] = {
    "diagonal": fxcurv.Diagonal((4,), torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64)),
    "dense": fxcurv.Dense((8,), deficient(8, 3)),
    "dense_lazy": fxcurv.Dense((2, 4), vectors(3, 1, 8)),
    "dense_lazy_dependent": fxcurv.Dense((8,), LazyGram(vectors(2, 1, 8).vectors * 2)),
    "kronecker": fxcurv.Kronecker((5, 6), deficient(6, 2), deficient(5, 2)),
    "kronecker_lazy": fxcurv.Kronecker((7, 6), vectors(3, 1, 6), vectors(2, 1, 7)),
    "kronecker_one_lazy": fxcurv.Kronecker((5, 6), vectors(3, 1, 6), deficient(5, 3), in_out=False),
    "kronecker_in_out": fxcurv.Kronecker((6, 5), vectors(3, 1, 6), deficient(5, 3), in_out=True),
    "grouped_lazy": fxcurv.Kronecker((6, 5), vectors(2, 2, 5), vectors(2, 2, 3)),
}
DEFICIENT |= {f"{name}_decomposed": block.decomposed() for name, block in DEFICIENT.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("block", DEFICIENT.values(), ids=DEFICIENT)
def test_functions_of_a_rank_deficient_block(block: fxcurv.Block, dtype: torch.dtype) -> None:
    """Against the eigendecomposition of the dense matrix in float64; a small power magnifies a wrong zero."""
    values, Q = torch.linalg.eigh(block.dense())
    values = values.where(values > 1e-11 * values.max(), 0)
    rounded, tolerance = block.to(dtype=dtype), {torch.float64: 1e-11, torch.float32: 2e-4}[dtype]

    def agrees(found: fxcurv.Block, of_values: Tensor) -> None:
        expected = Q * of_values @ Q.T
        error = (found.dense().double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance

    for exponent in (0, 0.1, 0.25, 0.5, 1, 2):
        agrees(rounded.power(exponent), values**exponent)
    agrees(rounded.sqrt(), values.sqrt())
    agrees(rounded.decomposed(), values)
    agrees(rounded.inverse(0.1), 1 / (values + 0.1))
    close(rounded.logdet(0.1).double() / (values + 0.1).log().sum(), torch.ones(()).double(), tolerance)
    assert rounded.logdet() == -math.inf
    found = rounded.eigvalsh().double()
    close(found[values == 0], torch.zeros_like(found[values == 0]), 0.0)


@each
def test_samples_have_the_inverse_as_covariance(block: fxcurv.Block) -> None:
    """A draw is a linear function of the noise, whose matrix times its transpose is the covariance."""
    columns = []
    for k in range(block.numel):
        noise = identity(block)[:, k : k + 1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *_, noise=noise, **__: noise)
            columns.append(block.sample(damping=0.2).flatten())
    matrix = torch.stack(columns, 1)
    close(matrix @ matrix.T, torch.linalg.inv(block.dense() + 0.2 * identity(block)))


def test_samples_come_from_the_generator() -> None:
    block = BLOCKS["kronecker"]
    first, again = (block.sample(torch.Generator().manual_seed(3), damping=0.1) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == block.shape


@pytest.mark.parametrize("name", ["kronecker", "kronecker_kept", "grouped", "grouped_kept"])
@pytest.mark.parametrize("method", ["plain", "pi"])
def test_damped_factors_are_as_defined(name: str, method: Damping) -> None:
    block = BLOCKS[name]
    assert isinstance(block, fxcurv.Kronecker)
    found = block.inverse(0.04, method)
    assert isinstance(found, fxcurv.Kronecker)
    A, G = (f if f.ndim == 3 else f.unsqueeze(0) for f in (block.A, block.G))
    inverses = []
    for a, g in zip(A, G, strict=True):
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5 if method == "pi" else 1
        one, two = (torch.eye(len(f), dtype=torch.float64) for f in (a, g))
        inverses.append(torch.kron(torch.linalg.inv(g + 0.2 / pi * two), torch.linalg.inv(a + 0.2 * pi * one)))
    close(found.dense(), torch.block_diag(*inverses))


def test_forms_without_factors_have_one_inverse() -> None:
    for name in ("diagonal", "dense", "dense_kept"):
        for method in ("plain", "pi"):
            close(BLOCKS[name].inverse(0.1, method).dense(), BLOCKS[name].inverse(0.1).dense())


def test_pi_of_a_vanishing_factor_is_one() -> None:
    dead = fxcurv.Kronecker((2, 3), psd(3), torch.zeros(2, 2, dtype=torch.float64))
    close(dead.inverse(0.04, "pi").dense(), dead.inverse(0.04, "plain").dense())


# Sums, types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diagonal", "dense", "dense_kept"])
def test_blocks_of_one_form_add(name: str) -> None:
    block = BLOCKS[name]
    total = block + 0.5 * block
    assert type(total) is type(block)
    close(total.dense(), 1.5 * block.dense())


def test_kronecker_blocks_add_where_they_share_a_factor() -> None:
    block = BLOCKS["kronecker"]
    assert isinstance(block, fxcurv.Kronecker)
    other = replace(block, output_moment=psd(4))
    close((block + other).dense(), block.dense() + other.dense())
    third = replace(block, input_moment=psd(6))
    close((block + third).dense(), block.dense() + third.dense())
    with pytest.raises(fxcurv.InputError, match=r"of neither kind; add a.as_dense\(\) \+ b.as_dense\(\)"):
        _ = other + third
    with pytest.raises(fxcurv.InputError, match="Kronecker and a Diagonal"):
        _ = block + fxcurv.Diagonal(block.shape, torch.ones(block.shape))
    close((other.as_dense() + third.as_dense()).dense(), other.dense() + third.dense())
    with pytest.raises(fxcurv.InputError, match="add blocks of one shape"):
        _ = block + BLOCKS["grouped"]
    with pytest.raises(TypeError):
        _ = block + 1  # pyright: ignore[reportOperatorIssue]


@each
def test_moves_between_types(block: fxcurv.Block) -> None:
    single = block.to(dtype=torch.float32)
    assert {t.dtype for t in single.tensors.values()} == {torch.float32}
    torch.testing.assert_close(single.dense().double(), block.dense(), rtol=1e-4, atol=1e-4)
    assert single.to("cpu").shape == block.shape
    assert (single.parameters, type(single)) == (block.parameters, type(block))
    v = draw(*block.shape)
    torch.testing.assert_close(single.solve(v.float(), 0.5).double(), block.solve(v, 0.5), rtol=1e-3, atol=1e-3)


def test_kept_factors_stay_kept() -> None:
    block = BLOCKS["kronecker_kept"]
    assert isinstance(block, fxcurv.Kronecker)
    block = replace(block)  # nothing is cached
    for use in (block.logdet, lambda d: block.solve(draw(7, 6), d), lambda d: block.sample(G, d)):
        use(0.1)
    block.frobenius_norm()
    assert "A" not in vars(block)
    assert "G" not in vars(block)
    assert isinstance((2 * block).to(dtype=torch.float32).output_moment, LazyGram)


# Errors -----------------------------------------------------------------------------------------------------------

SINGULAR: dict[str, Callable[[fxcurv.Block], object]] = {
    "solve": lambda block: block.solve(torch.zeros(block.shape, dtype=torch.float64)),
    "inverse": lambda block: block.inverse(),
    "power": lambda block: block.power(-0.5),
    "sample": lambda block: block.sample(),
}


@pytest.mark.parametrize("use", SINGULAR.values(), ids=SINGULAR)
def test_singular_blocks_need_damping(use: Callable[[fxcurv.Block], object]) -> None:
    for name, text in {
        "dense_kept": r"the block of 'p' is singular: its rank is \d of 12; give damping > 0",
        "kronecker_one_kept": "the factor A of the block of 'w' is singular: its rank is 4 of 6",
        "grouped_kept": "the factor A of the block of 'conv.weight' is singular: its rank is 4 of 18",
    }.items():
        with pytest.raises(fxcurv.FxcurvError, match=text) as caught:
            use(BLOCKS[name])
        assert caught.value.code == "FXC420"
    formed = fxcurv.Dense((3,), torch.ones(3, 3, dtype=torch.float64), parameters=("b",))
    with pytest.raises(fxcurv.FxcurvError, match="the block of 'b' is singular: its rank is 1 of 3"):
        use(formed)
    with pytest.raises(fxcurv.FxcurvError, match="rank is 2 of 3"):
        use(fxcurv.Diagonal((3,), torch.tensor([1.0, 0, 1e-30], dtype=torch.float64)))
    assert formed.logdet() == BLOCKS["kronecker_kept"].logdet() == -math.inf
    assert formed.det() == 0


@pytest.mark.parametrize("method", ["plain", "pi"])
def test_singular_factors_need_damping(method: Damping) -> None:
    with pytest.raises(fxcurv.FxcurvError, match="the factor A of the block of 'w' is singular"):
        BLOCKS["kronecker_kept"].inverse(0, method)
    singular = fxcurv.Kronecker((2, 2), torch.eye(2), torch.ones(2, 2), parameters=("v",))
    with pytest.raises(fxcurv.FxcurvError, match="the factor G of the block of 'v' is singular: its rank is 1 of 2"):
        singular.inverse(0, method)


@pytest.mark.parametrize("damping", [-1e-9, math.nan, math.inf, "much", None])
def test_dampings_are_finite_and_not_negative(damping: float) -> None:
    for block in BLOCKS.values():
        for use in (block.inverse, block.logdet, lambda d, block=block: block.solve(torch.zeros(block.shape), d)):
            with pytest.raises(fxcurv.InputError, match="give a finite number, 0 or above") as caught:
                use(damping)
            assert caught.value.code == "FXC421"


def test_wrong_arguments() -> None:
    with pytest.raises(fxcurv.InputError, match="method='best'; choose one of"):
        BLOCKS["dense"].inverse(0.1, "best")  # pyright: ignore[reportArgumentType]
    for factor in (-1.0, math.nan):
        with pytest.raises(fxcurv.InputError, match="give 0 or more"):
            _ = factor * BLOCKS["dense"]


def test_blocks_that_are_not_finite_say_so() -> None:
    for entries in (torch.full((3, 3), math.nan), torch.full((3, 3), math.inf)):
        block = fxcurv.Kronecker((3, 3), entries, torch.eye(3), parameters=("w",))
        with pytest.raises(
            fxcurv.FxcurvError, match="the factor A of the block of 'w' has no eigenvalues: it holds NaN"
        ):
            block.eigvalsh()
        with pytest.raises(fxcurv.FxcurvError, match="the factor A of the block of 'w' is not positive definite"):
            block.inverse(0.1, "plain")
        dense = fxcurv.Dense((3,), LazyGram((entries[None, None, :2, :].mT[..., :1].mT,)), parameters=("b",))
        with pytest.raises(fxcurv.FxcurvError, match="the block of 'b' has no eigenvalues"):
            dense.eigvalsh()


def test_rounding_adds_nothing_to_a_rank() -> None:
    values = torch.tensor([[2.0, 1.0, 1e-8], [2.0, 1e-3, 1e-3]])
    assert rank(values, 3) == 2
    assert rank(values.double(), 3) == 3


def test_cholesky_tries_again_in_float64() -> None:
    """In float32 the damping is lost in the rounding of an entry; the matrix without rounding is definite."""
    matrix = torch.full((1, 2, 2), 3e4)
    with torch.no_grad():
        assert torch.linalg.cholesky_ex(matrix + 1e-4 * torch.eye(2))[1].item() != 0
    L = cholesky(matrix, 1e-4, "the matrix")
    assert L.dtype == torch.float32
    torch.testing.assert_close(L @ L.mT, matrix, rtol=1e-4, atol=0)


def test_cholesky_adds_no_more_than_rounding() -> None:
    rounded = torch.tensor([[[1.0, 1 + 5e-7], [1 + 5e-7, 1.0]]])
    assert cholesky(rounded, 1e-9, "the matrix").isfinite().all()
    for wrong in (torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), torch.full((1, 2, 2), math.nan)):
        with pytest.raises(fxcurv.FxcurvError, match="the matrix is not positive definite, even in float64"):
            cholesky(wrong, 1e-3, "the matrix")
    with pytest.raises(fxcurv.FxcurvError, match="the matrix is singular: its rank is 1 of 2"):
        cholesky(torch.ones(1, 2, 2), 0, "the matrix")


def test_a_vector_of_another_shape_is_refused() -> None:
    block = fxcurv.Diagonal((2, 3), torch.arange(6.0).view(2, 3))
    for v in (torch.ones(2, 3), torch.ones(6)):
        assert torch.equal(block.mv(v).flatten(), torch.arange(6.0))
    for v in (torch.ones(3, 2), torch.ones(5)):
        with pytest.raises(fxcurv.InputError, match="FXC411"):
            block.mv(v)
