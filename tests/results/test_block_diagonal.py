"""A quantity as one operator: equal to the block-diagonal matrix of its blocks, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from curvatures import batch, net
from torch import Tensor, nn

import fxcurv
from fxcurv.linalg.operator import Space

QUANTITIES = ["kflr", "grad", "diag_ggn", fxcurv.KFAC(fxcurv.Exact(), joint=True)]


@pytest.fixture(scope="module")
def result() -> fxcurv.Curvature:
    return fxcurv.compile(net(), quantities=QUANTITIES)(*batch(3))


def names(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def expected(result: fxcurv.Curvature, quantity: str) -> Tensor:
    """The matrix, from the dense matrices of the blocks and, for a joint one, permuted."""
    sizes = {name: math.prod(e.shape) for name, e in result[quantity].entries.items() if e.status != "frozen"}
    starts = dict(zip(sizes, [0, *torch.tensor(list(sizes.values())).cumsum(0).tolist()], strict=False))
    matrix = torch.zeros(sum(sizes.values()), sum(sizes.values()), dtype=torch.float64)
    for value in dict.fromkeys(result[quantity].values()):
        owned = value.parameters
        if len(owned) == 2:
            rows, columns = value.shape
            W = torch.arange(rows * (columns - 1)).view(rows, -1) + starts[owned[0]]
            index = torch.cat([W, torch.arange(rows).view(-1, 1) + starts[owned[1]]], 1).flatten()
        else:
            index = torch.arange(sizes[owned[0]]) + starts[owned[0]]
        matrix[index[:, None], index] = value.dense()
    return matrix


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-9)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.extra = (
            nn.Linear(18, 5),
            nn.LayerNorm(5),
            nn.Linear(5, 3),
            nn.Linear(1, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x.flatten(1)).tanh()))


@pytest.fixture(scope="module")
def small() -> fxcurv.Curvature:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small().double().eval()
    model.first.bias.requires_grad_(False)
    return fxcurv.compile(model, quantities=QUANTITIES)(*batch(3))


@pytest.mark.parametrize("quantity", ["kflr", "kfac"])
def test_equals_the_block_diagonal_matrix(small: fxcurv.Curvature, quantity: str) -> None:
    operator, matrix = small.operator(quantity), expected(small, quantity)
    n, damping = len(matrix), 0.05
    assert operator.shape == (n, n)
    assert "first.bias" not in operator.domain.shapes
    assert "extra.bias" in operator.domain.shapes
    damped = matrix + damping * torch.eye(n, dtype=torch.float64)
    v = torch.linspace(-1, 1, n, dtype=torch.float64)
    V = torch.stack([v, v.square()], 1)
    close(operator.dense(), matrix)
    close(operator @ v, matrix @ v)
    close(operator @ V, matrix @ V)
    close(operator.T @ v, matrix @ v)
    close(operator.solve(v, damping), torch.linalg.solve(damped, v))
    close(operator.inverse(damping).dense(), torch.linalg.inv(damped))
    close(operator.inverse(damping, "pi").solve(operator.inverse(damping, "pi") @ v), v)
    close(operator.logdet(damping), torch.logdet(damped))
    close(operator.det(damping).log(), torch.logdet(damped))
    close(operator.trace(), matrix.trace())
    close(operator.frobenius_norm(), torch.linalg.matrix_norm(matrix))
    close(operator.eigvalsh(), torch.linalg.eigvalsh(matrix))
    close(operator.decomposed().dense(), matrix)
    close(operator.decomposed().inverse(0.1).dense(), operator.inverse(0.1).dense())
    close(operator.sqrt().dense() @ operator.sqrt().dense(), matrix)
    close((3 * operator).dense(), 3 * matrix)
    assert isinstance(3 * operator, fxcurv.BlockDiagonal)
    close((operator + 2 * operator).dense(), 3 * matrix)
    torch.testing.assert_close(operator.to(dtype=torch.float32).dense().double(), matrix, rtol=1e-5, atol=1e-6)


def test_vectors_are_dicts_or_flat(small: fxcurv.Curvature) -> None:
    operator, matrix = small.operator("kfac"), expected(small, "kfac")
    v = {name: torch.full(shape, 0.5, dtype=torch.float64) for name, shape in operator.domain.shapes.items()}
    flat = torch.cat([t.flatten() for t in v.values()])
    product, solved = operator @ v, operator.solve(v, 0.1)
    assert list(product) == list(solved) == list(v)
    assert {name: t.shape for name, t in product.items()} == {name: t.shape for name, t in v.items()}
    close(torch.cat([t.flatten() for t in product.values()]), matrix @ flat)
    close(torch.cat([t.flatten() for t in solved.values()]), operator.solve(flat, 0.1))
    diagonal = operator.diag()
    close(torch.cat([t.flatten() for t in diagonal.values()]), matrix.diag())
    assert not product["extra.bias"].any(), "its curvature is zero"


def test_samples_are_those_of_the_blocks(small: fxcurv.Curvature) -> None:
    operator = small.operator("kflr")
    drawn = operator.sample(torch.Generator().manual_seed(2), 0.1)
    generator = torch.Generator().manual_seed(2)
    for part in operator.parts:
        close(drawn[part.block.parameters[0]], part.block.sample(generator, 0.1))


def test_diagonals_are_operators_and_add(small: fxcurv.Curvature) -> None:
    operator = small.operator("diag_ggn")
    total = operator + operator
    assert isinstance(total, fxcurv.BlockDiagonal)
    close(total.dense(), 2 * operator.dense())
    close(operator.diag()["first.weight"], small["diag_ggn"]["first.weight"])


def test_kept_tied_frozen_and_unreached(result: fxcurv.Curvature) -> None:
    operator = result.operator("kflr")
    assert list(operator.domain.shapes) == names(net())
    v = {name: torch.ones(shape, dtype=torch.float64) for name, shape in operator.domain.shapes.items()}
    assert not operator.mv(v)["unused.weight"].any()
    close(operator.mv(v)["tied.weight"], result["kflr"]["tied.weight"].mv(v["tied.weight"]))
    close(operator.solve(v, 2.0)["unused.weight"], v["unused.weight"] / 2)


def test_scipy_sees_the_same(small: fxcurv.Curvature) -> None:
    pytest.importorskip("scipy")
    operator, matrix = small.operator("kflr"), expected(small, "kflr")
    theirs = operator.to_scipy()
    v = torch.linspace(-1, 1, len(matrix), dtype=torch.float64)
    close(torch.as_tensor(theirs @ v.numpy()), matrix @ v)
    close(torch.as_tensor(theirs.T @ torch.stack([v, v], 1).numpy()), matrix @ torch.stack([v, v], 1))
    values, vectors = operator.eigsh(3)
    close(values, torch.linalg.eigvalsh(matrix)[-3:])
    close(matrix @ vectors, vectors * values)
    assert torch.equal(operator.eigsh(3)[1], vectors)


def test_what_is_no_operator_is_refused(small: fxcurv.Curvature) -> None:
    operator = small.operator("kflr")
    with pytest.raises(fxcurv.QuantityError, match="grad is a vector, not a matrix"):
        small.operator("grad")
    with pytest.raises(fxcurv.FxcurvError, match=r"the block of .* is singular"):
        operator.solve(torch.ones(operator.domain.numel, dtype=torch.float64))
    with pytest.raises(fxcurv.InputError, match="act on different spaces"):
        _ = operator + operator.inverse(1.0).T + Other()
    n = operator.domain.numel
    with pytest.raises(fxcurv.InputError, match=rf"give \[{n}\], or a dict"):
        operator.mv(torch.ones(n - 1))
    with pytest.raises(fxcurv.InputError, match=rf"give \[{n}, k\]"):
        operator.mm(torch.ones(2, n))
    v = {name: torch.zeros(shape) for name, shape in operator.domain.shapes.items()}
    with pytest.raises(fxcurv.InputError, match=r"names differ: first.weight"):
        operator.mv({name: t for name, t in v.items() if name != "first.weight"})
    with pytest.raises(fxcurv.InputError, match=r"'first.weight' of shape \[3\]; give \[5, 18\]"):
        operator.mv({**v, "first.weight": torch.zeros(3)})
    for k in (0, n, True, 1.5):
        with pytest.raises(fxcurv.InputError, match=f"k={k!r}; give a whole number from 1 to {n - 1}"):
            operator.eigsh(k)  # pyright: ignore[reportArgumentType]


class Other(fxcurv.LinearOperator):
    """Of another space."""

    domain = codomain = Space({"w": (2,)})
    dtype, device = torch.float64, torch.device("cpu")

    def _mm(self, matrix: Tensor) -> Tensor:
        return matrix


def test_unsupported_parameters_have_no_zero_block() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(18, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x.flatten(1))
            return self.head(h - h.mean(0))

    with torch.random.fork_rng(devices=[]):
        model = Mixing().double().eval()
    skipped = fxcurv.compile(model, quantities="kflr", on_unsupported="skip")(*batch(3))
    with pytest.raises(fxcurv.QuantityError, match=r"'body.weight' has no value: unsupported"):
        skipped.operator("kflr")
