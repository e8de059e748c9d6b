"""Results against the oracle: gradient, diagonal, Kronecker factors of both kinds, and dense blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import reference
import samples
from samples import Sample
from torch import Tensor, nn

import fxcurv
from fxcurv.result import Entries

__all__ = ["QUANTITIES", "TOLERANCE", "assert_close", "check_against_oracle", "check_result"]

QUANTITIES = {
    "grad": fxcurv.Grad(),
    "diag_ggn": fxcurv.DiagGGN(),
    "expand": fxcurv.KFAC(fxcurv.Exact()),
    "reduce": fxcurv.KFAC(fxcurv.Empirical(), approx="reduce", joint=True),
}
TOLERANCE = 1e-9


def assert_close(ours: Tensor, theirs: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Equal to `tolerance` relative to the largest entry."""
    assert ours.shape == theirs.shape, f"{what}: shape {list(ours.shape)}, not {list(theirs.shape)}"
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    error = float((ours - theirs).abs().max()) if theirs.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-3), f"{what}: off by {error:.3g}, entries up to {scale:.3g}"


def check_against_oracle(sample: Sample, batch: int = 2) -> fxcurv.Compiled:
    """Gradient, diagonal, Kronecker factors of both kinds and dense blocks of every parameter equal the oracle's."""
    model, loss = sample.build(), sample.loss()
    x, y = samples.inputs(sample, batch), samples.targets(sample, batch)
    compiled = fxcurv.compile(model, loss, list(QUANTITIES.values()))
    check_result(compiled(x, y), model, loss, (x, y))
    return compiled


def check_result(
    result: Mapping[str, Entries],
    model: nn.Module,
    loss: nn.Module,
    batch: tuple[Tensor, Tensor],
    tolerance: float = TOLERANCE,
    elsewhere: Collection[str] = (),
) -> None:
    """The first results, which are of `QUANTITIES`, equal the oracle's.

    Weights that are used `elsewhere` than in layers have dense blocks; where that use has no gradient by chance, the
    oracle, which decides by numbers, sees none.
    """
    by_name, (x, y) = dict(zip(QUANTITIES, result.values(), strict=False)), batch
    output = reference.outputs(model, x)
    exact, empirical = reference.exact_columns(loss, output, y), reference.empirical_columns(loss, output, y)
    expected = {"grad": reference.grad(model, loss, x, y), "diag_ggn": reference.diag_ggn(model, loss, x, y)}
    for quantity, values in expected.items():
        for name, value in values.items():
            if name in by_name[quantity]:
                assert_close(by_name[quantity][name], value, f"{quantity} {name}", tolerance)
            else:
                assert by_name[quantity].status[name] == "unreached"
                assert not value.any(), f"{quantity} {name} is not unreached"
    expand, reduce = reference.kfac(model, x, exact), reference.kfac(model, x, empirical, approx="reduce", joint=True)
    for quantity, factors, columns in (("expand", expand, exact), ("reduce", reduce, empirical)):
        factors = {name: pair for name, pair in factors.items() if name not in elsewhere}
        _check_blocks(by_name[quantity], factors, model, (x, columns), tolerance)


def _check_blocks(
    result: Entries,
    factors: reference.Factors,
    model: nn.Module,
    columns: tuple[Tensor, Tensor],
    tolerance: float,
) -> None:
    """Blocks of a quantity are the factors of the oracle, or the dense blocks of the columns `(x, S)`."""
    for name, block in result.items():
        if isinstance(block, fxcurv.Kronecker):
            owner = block.parameters[0]
            A, G = factors[owner]
            assert_close(block.A, A, f"A of {owner}", tolerance)
            assert_close(block.G, G, f"G of {owner}", tolerance)
        else:
            assert isinstance(block, fxcurv.Dense)
            assert_close(block.matrix, reference.dense_block(model, *columns, name), f"block of {name}", tolerance)
    matrices = {
        name for name, block in result.items() if isinstance(block, fxcurv.Kronecker) and block.parameters[0] == name
    }
    assert matrices == set(factors), f"Kronecker blocks of {sorted(matrices)}, factors of {sorted(factors)}"
