"""Results against the oracle: gradient, diagonal, Kronecker factors of both kinds, and dense blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import reference
import samples
import torch
from samples import Sample
from torch import Tensor, nn

import fxcurv
from fxcurv.results.entry import Entries

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
    J, slope = reference.jacobians(model, x), torch.func.grad(lambda f: loss(f, y))(output).unsqueeze(0)
    pulled = {"expand": reference.pulled(J, exact), "reduce": reference.pulled(J, empirical)}
    expected = {
        "grad": {name: u.sum((0, 1)) for name, u in reference.pulled(J, slope).items()},
        "diag_ggn": {name: u.square().sum((0, 1)) for name, u in pulled["expand"].items()},
    }
    for quantity, values in expected.items():
        for name, value in values.items():
            if name in by_name[quantity]:
                assert_close(by_name[quantity][name], value, f"{quantity} {name}", tolerance)
            else:
                assert by_name[quantity].status[name] == "unreached"
                assert not value.any(), f"{quantity} {name} is not unreached"
    expand, reduce = reference.kfac(model, x, exact), reference.kfac(model, x, empirical, approx="reduce", joint=True)
    for quantity, factors in (("expand", expand), ("reduce", reduce)):
        factors = {name: pair for name, pair in factors.items() if name not in elsewhere}
        _check_blocks(by_name[quantity], factors, pulled[quantity], tolerance)
        found = {block.parameters[0] for block in by_name[quantity].values() if getattr(block, "in_out", False)}
        assert found == reference.in_out(model, x) & set(factors), f"{quantity}: the order of factors"


def _check_blocks(result: Entries, factors: reference.Factors, pulled: Mapping[str, Tensor], tolerance: float) -> None:
    """Blocks of a quantity are the factors of the oracle, or the dense blocks of the columns as they were pulled."""
    for name, block in result.items():
        if isinstance(block, fxcurv.Kronecker):
            owner = block.parameters[0]
            A, G = factors[owner]
            assert_close(block.A, A, f"A of {owner}", tolerance)
            assert_close(block.G, G, f"G of {owner}", tolerance)
        else:
            assert isinstance(block, fxcurv.Dense)
            assert_close(block.matrix, reference.outer(pulled[name]), f"block of {name}", tolerance)
    matrices = {
        name for name, block in result.items() if isinstance(block, fxcurv.Kronecker) and block.parameters[0] == name
    }
    assert matrices == set(factors), f"Kronecker blocks of {sorted(matrices)}, factors of {sorted(factors)}"
