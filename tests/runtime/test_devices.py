"""Precision and devices: what is summed in which type, and that the graphs stay on the device that they run on.

`test_samples.py::test_rule` runs the graphs of every sample on a device without numbers, `devices.run_elsewhere`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import devices
import pytest
import samples
import torch
from comparison import QUANTITIES, assert_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

import fxcurv
from fxcurv.frontend.cache import signature
from fxcurv.frontend.isolation import without_autocast
from fxcurv.losses.terms import SoftmaxTerms
from fxcurv.quantities.protocol import Quantity

EXACT: list[Quantity] = [*QUANTITIES.values()]
"""Every sum that there is, without randomness."""
ALL = [*EXACT, fxcurv.KFAC(), fxcurv.DiagGGN(fxcurv.Sampled(2))]


def network() -> nn.Module:
    """Convolutions, one grouped, BatchNorm, a residual connection, pooling, a token-wise Linear and LayerNorm."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv, self.pool = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.MaxPool2d(2)
            self.mix, self.scale, self.head = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x)).relu()
            x = self.pool(x + torch.tanh(self.conv(x)))
            return self.head(self.scale(self.mix(x.flatten(2).mT)).mean(1))

    return samples.seeded(Net, "devices").eval()


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 6, 6, generator=generator).to(dtype), torch.randint(4, (5,), generator=generator)


def numbers(result: fxcurv.Curvature) -> dict[str, Tensor]:
    """Every tensor of a result, by quantity, parameter and name."""
    return {
        f"{quantity} {parameter} {name}": tensor
        for quantity, entries in result.items()
        for parameter, value in entries.items()
        for name, tensor in (value.tensors if isinstance(value, fxcurv.Block) else {"": value}).items()
    }


def curvature(model: nn.Module, x: Tensor, y: Tensor, quantities: list[Quantity] = EXACT) -> dict[str, Tensor]:
    return numbers(fxcurv.compile(model, quantities=quantities)(x, y))


# Types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float32, 1e-4)])
def test_sums_are_float32_and_near_those_of_float64(dtype: torch.dtype, tolerance: float) -> None:
    """The parameters are numbers of `dtype` in both, so that the difference is that of computing alone."""
    model = network().to(dtype)
    x, y = batch(dtype)
    values, expected = curvature(model, x, y), curvature(model.double(), x.double(), y)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.dtype == torch.float32, name
        assert_close(value.double(), expected[name], name, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_small_terms_are_not_lost(dtype: torch.dtype) -> None:
    """4096 equal terms: a sum in half precision would stop growing at 256 or 2048 of them."""
    model = samples.seeded(lambda: nn.Linear(1, 2, bias=False), "terms").to(dtype)
    nn.init.zeros_(model.get_parameter("weight"))
    x, y = torch.ones(4096, 1, dtype=dtype), torch.zeros(4096, 2, dtype=dtype)
    result = fxcurv.compile(model, nn.MSELoss(reduction="sum"), ["diag_ggn", "kflr"])(x, y)
    block, ones = result["kflr"]["weight"], torch.ones(2)
    for value, expected in (
        (result["diag_ggn"]["weight"], 2 * 4096 * ones.unsqueeze(1)),
        (block.G, (2 * 4096 * ones).diag()),
        (block.A, torch.ones(1, 1)),
    ):
        torch.testing.assert_close(value, expected, rtol=0.01, atol=0)  # a column is √2 in half precision


# Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_last", "input_last"), [(True, True), (True, False), (False, True)])
def test_channels_last_gives_the_same(model_last: bool, input_last: bool) -> None:
    x, y = batch()
    model = network().double()
    expected = curvature(model, x, y)
    if model_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    values = curvature(model, x.contiguous(memory_format=torch.channels_last) if input_last else x, y)
    for name, value in values.items():
        assert_close(value, expected[name], name, 1e-10)


# Devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_quantity_stays_on_its_device(dtype: torch.dtype) -> None:
    x, _ = batch(dtype)
    program = fxcurv.compile(network().to(dtype), quantities=ALL).prepare(x)
    for name, value in devices.run_elsewhere(program, x).items():
        assert value.device == devices.DEVICE, name
        assert value.dtype == torch.float32, name


def test_a_model_that_moves_is_compiled_anew() -> None:
    x, _ = batch()
    model = network()
    assert signature(model, x) == signature(model, x[:1])
    assert signature(model, x) != signature(model.to("meta"), x.to("meta"))


class Straying(nn.Module):
    """A forward that reads from the device, asks for a table made on the host, or leaves the device."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "reads":
            return x * x.sum().item()
        return x + torch.tensor([1.0, 2.0]) if self.how == "mixes" else x + torch.tensor([1.0, 2.0]).to(x.device)


@pytest.mark.parametrize("how", ["reads", "mixes", "copies"])
def test_straying_is_noticed(how: str) -> None:
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    program = fxcurv.compile(samples.seeded(lambda: nn.Linear(2, 2), "straying").float()).prepare(x)
    program.forward.insert_straying = Straying(how)  # pyright: ignore[reportArgumentType]
    graph = program.forward.graph
    (first, *_) = graph.find_nodes(op="placeholder")
    with graph.inserting_after(first):
        strayed = graph.call_module("insert_straying", (first,))
    first.replace_all_uses_with(strayed, lambda user: user is not strayed)
    program.forward.recompile()
    with pytest.raises((devices.Strayed, DataDependentOutputException, RuntimeError), match=r"device|host|scalar"):
        devices.run_elsewhere(program, x)


LOSSES = {
    "indices": (nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([0, 3, -100, 1, 2])),
    "probabilities": (nn.CrossEntropyLoss(), torch.full((5, 4), 0.25)),
    "squares": (nn.MSELoss(), torch.zeros(5, 4)),
    "logits": (nn.BCEWithLogitsLoss(), torch.full((5, 4), 0.5)),
}


class Reads(TorchDispatchMode):
    """Counts what the host reads from tensors, entry by entry."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in devices.READS
        return func(*args, **(kwargs or {}))


@contextmanager
def lists_made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tensors become lists meanwhile: these reads are not dispatched."""
    made, tolist = list[int](), Tensor.tolist
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", lambda t: made.append(t.numel()) or tolist(t))
        yield made


@pytest.mark.parametrize(("loss", "y"), LOSSES.values(), ids=LOSSES)
def test_a_call_reads_twice(loss: nn.Module, y: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the input is finite; whether output, target and loss are what they must be. The first call reads more."""
    x, _ = batch(torch.float32)
    compiled = fxcurv.compile(network().float(), loss, ALL)
    generator = torch.Generator().manual_seed(0)
    compiled(x, y, generator=generator)
    with lists_made(monkeypatch) as lists, Reads() as reads:
        compiled(x, y, generator=generator)
    assert (reads.count, len(lists)) == (1, 1)


def test_sampling_draws_what_multinomial_draws() -> None:
    p = torch.rand(7, 5, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    one, zero = torch.ones(7, 1, 3), torch.zeros(())
    S = SoftmaxTerms(zero, zero, one, 1.0, p).sampled(torch.Generator().manual_seed(1))
    drawn = torch.multinomial(p.movedim(1, -1).reshape(-1, 5), 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal((p - S).round().argmax(1), drawn.view(7, 3))


@pytest.mark.parametrize("enabled", [(), ("cpu",), ("cuda",), ("cpu", "cuda")])
def test_no_autocast_is_left(enabled: tuple[str, ...]) -> None:
    for kind in enabled:
        torch.set_autocast_enabled(kind, True)
    try:
        with without_autocast():
            assert not any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        assert all(torch.is_autocast_enabled(kind) == (kind in enabled) for kind in ("cpu", "cuda"))
    finally:
        for kind in enabled:
            torch.set_autocast_enabled(kind, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_inside_of_the_graphs() -> None:
    """CUDA itself raises where the host would wait; values are those of the CPU."""
    x, y = batch()
    model = network().double()
    expected = curvature(model, x, y)
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    compiled = fxcurv.compile(model, quantities=ALL)
    values = numbers(compiled(x, y, generator=torch.Generator("cuda").manual_seed(2)))  # kernels are compiled here
    for name, value in values.items():
        assert value.device.type == "cuda", name
        if name in expected:
            assert_close(value.cpu(), expected[name], name, 1e-8)
    program = compiled.program
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            output, kept, _ = program.forward(x)
            for backward in program.backwards.values():
                names = [str(node.target) for node in backward.graph.find_nodes(op="placeholder")[1:]]
                backward(output.new_ones(3, *output.shape), **{name: kept[name] for name in names})
        finally:
            torch.cuda.set_sync_debug_mode("default")
