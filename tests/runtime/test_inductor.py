"""The graphs compiled by torch.compile equal those that run as they stand, and are compiled anew only where they must.

Dynamo alone reads most of them here; inductor itself, whose C++ compiler is slow, compiles one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import Tensor, nn

import fxcurv
from fxcurv.blocks.base import Block


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.norm(self.stem(x)).relu(), 2, ceil_mode=True)
        return self.head(self.pool(x + self.conv(x)).flatten(1))


class Cumulated(nn.Module):
    """An op that torch cannot batch, and one that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.logcumsumexp(torch.cummax(self.first(x), 1)[0], 1))


def attention() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), nn.Flatten(), nn.Linear(12, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)), (5,), ("kflr",)),
    "residual": (Residual, (2, 6, 6), ("grad", "kflr", "diag_ggn")),
    "attention": (attention, (3, 4), ("diag_ggn",)),
    "opaque": (Cumulated, (5,), ("diag_ggn",)),
}


def made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name][0]().double().eval()


def batch(name: str, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, *MODELS[name][1], generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def equal(model: nn.Module, compiled: fxcurv.Compiled, x: Tensor, y: Tensor) -> None:
    """What the backend computes equals what the graphs compute as they stand."""
    expected = fxcurv.compile(model, quantities=list(compiled.selection.quantities))(x, y)
    for quantity, values in compiled(x, y).items():
        for name, value in values.items():
            other = expected[quantity][name]
            pairs = (
                zip(value.tensors.values(), other.tensors.values(), strict=True)
                if isinstance(value, Block)
                else [(value, other)]
            )
            for given, plain in pairs:
                torch.testing.assert_close(given, plain, rtol=1e-9, atol=1e-12)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> torch._dynamo.testing.CompileCounterWithBackend:
    """Counts the graphs that Dynamo hands to a backend, which runs them as they are."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr("fxcurv.runtime.inductor.COMPILER", counter)
    torch._dynamo.reset()
    return counter


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_eager_and_compiled_once_more_for_other_batch_sizes(
    name: str, counter: torch._dynamo.testing.CompileCounterWithBackend
) -> None:
    model = made(name)
    compiled = fxcurv.compile(model, quantities=MODELS[name][2], backend="inductor")
    graphs = 1 + len({quantity.factor for quantity in compiled.selection.quantities.values()})
    equal(model, compiled, *batch(name, 3))
    assert counter.frame_count == graphs, "one piece each"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = batch(name, 3)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    equal(model, compiled, x, y)
    model.get_parameter(next(name for name, _ in model.named_parameters())).data.mul_(2)
    equal(model, compiled, x, y)
    assert counter.frame_count == graphs, "later values need nothing new"
    for n in (4, 5, 7):
        equal(model, compiled, *batch(name, n))
    assert counter.frame_count == 2 * graphs


def test_a_smaller_chunk_of_columns_is_compiled_once(
    counter: torch._dynamo.testing.CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6)).double().eval()
    x, y = batch("mlp", 3)
    compiled = fxcurv.compile(model, quantities="diag_ggn", backend="inductor")
    monkeypatch.setattr("fxcurv.runtime.run.COLUMN_BYTES", 3 * (3 * 6 * 8))  # five columns, as three and two
    for _ in range(2):
        equal(model, compiled, x, y)
    assert counter.frame_count == 3


def test_inductor_itself() -> None:
    model = made("opaque")
    torch._dynamo.reset()
    equal(model, fxcurv.compile(model, quantities="kflr", backend="inductor"), *batch("opaque", 3))


def test_what_the_compiler_cannot_do_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise ValueError("no compiler")

    monkeypatch.setattr("fxcurv.runtime.inductor.COMPILER", broken)
    with pytest.raises(fxcurv.FxcurvError, match=r'no compiler.*backend="eager".*FXC413') as raised:
        fxcurv.compile(made("mlp"), quantities="grad", backend="inductor")(*batch("mlp", 3))
    assert raised.value.__cause__ is not None


def test_a_backend_that_does_not_exist() -> None:
    with pytest.raises(fxcurv.QuantityError, match="eager, inductor"):
        fxcurv.compile(made("mlp"), backend="jit")  # pyright: ignore[reportArgumentType]
