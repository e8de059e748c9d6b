"""The kernels against their definitions, in every layout that the graphs feed them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxcurv.contractions.definitions import Gradient, Gram, InputCovariance, OutputCovariance, SumOfSquares
from fxcurv.contractions.entries import per_sample

V, N, G = 3, 2, 2


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def positions_last(X: Tensor) -> Tensor:
    """The same numbers, laid out as a convolution leaves them: [*, g, d, s] in memory."""
    return X.movedim(-3, -1).contiguous().movedim(-1, -3)


@pytest.mark.parametrize("positions", [1, 3, 9])
@pytest.mark.parametrize("layout", [lambda X: X, positions_last], ids=["features_last", "positions_last"])
def test_kernels_equal_their_definitions(positions: int, layout: Callable[[Tensor], Tensor]) -> None:
    x, S = layout(draw(N, positions, G, 4)), layout(draw(V, N, positions, G, 5))
    J = torch.einsum("vnsgo,nsgi->vngoi", S, x)
    flat = J.flatten(2).flatten(0, 1)
    expected = {
        "per_sample": (per_sample([x], [S]), J),
        "per_sample of one column": (per_sample([x], [S[:1]]), J[:1]),
        "gradient": (Gradient()([x], [S]), J.sum((0, 1))),
        "diagonal": (SumOfSquares()([x], [S]), J.square().sum((0, 1))),
        "gram": (Gram()([x], [S]), flat.T @ flat),
        "A": (InputCovariance()([x]), torch.einsum("nsgi,nsgj->gij", x, x)),
        "G": (OutputCovariance()([S]), torch.einsum("vnsgo,vnsgp->gop", S, S)),
        "A pooled": (InputCovariance(pooled=True)([x]), torch.einsum("ngi,ngj->gij", x.sum(1), x.sum(1))),
        "G pooled": (OutputCovariance(pooled=True)([S]), torch.einsum("vngo,vngp->gop", S.sum(2), S.sum(2))),
    }
    for name, (value, definition) in expected.items():
        torch.testing.assert_close(
            value, definition, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_ones_are_appended_for_the_bias() -> None:
    x = draw(N, 3, G, 4)
    ones = torch.cat([x, x.new_ones(N, 3, G, 1)], -1)
    torch.testing.assert_close(InputCovariance(ones=True)([x]), torch.einsum("nsgi,nsgj->gij", ones, ones))


def test_uses_of_one_parameter_keep_their_cross_terms() -> None:
    xs, Ss = [draw(N, 3, G, 4), 2 * draw(N, 1, G, 4)], [draw(V, N, 3, G, 5), draw(V, N, 1, G, 5)]
    together = SumOfSquares()([torch.cat(xs, 1)], [torch.cat(Ss, 2)])
    torch.testing.assert_close(SumOfSquares()(xs, Ss), together)
    apart = SumOfSquares()(xs[:1], Ss[:1]) + SumOfSquares()(xs[1:], Ss[1:])
    assert (apart - together).abs().max() > 0.1


def test_a_bias_reads_ones() -> None:
    S = draw(V, N, 3, G, 5)
    ones = torch.ones(N, 3, G, 1, dtype=torch.float64)
    for kernel in (SumOfSquares(), Gram(), Gradient()):
        torch.testing.assert_close(kernel([None], [S]), kernel([ones], [S]))
