"""The probe of samples: ops that mix samples or read positions are refused in every compilation, others never."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.core.errors import UnsupportedError
from fxcurv.core.generators import fresh_generator
from fxcurv.core.shapes import BatchSize, Samples, Shape
from fxcurv.trials.samples import Inconclusive, Operand, Probe, Sizes
from passes.infer_batch_axes import SHARED, _only_of

N = BatchSize()
CPU = torch.device("cpu")


def probed(op: Callable[..., Any], *operands: Operand, shape: Shape = (N,)) -> list[Samples] | None:
    return Probe(op, operands, shape, fresh_generator(CPU)).run(Sizes.drawn())


def scores(shape: Shape = (N,), dtype: torch.dtype = torch.float64) -> Operand:
    return Operand(shape, dtype, Samples(0))


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda k: k.sort(descending=True).values,
    "argsort": lambda k: k.argsort(),
    "cummin": lambda k: k.cummin(0).values,
    "cummax": lambda k: k.cummax(0).values,
    "cumsum": lambda k: k.cumsum(0),
    "flip": lambda k: k.flip(0),
    "roll": lambda k: k.roll(1),
    "topk": lambda k: k.topk(2).values.sum().expand_as(k),
    "median": lambda k: k - k.median(),
    "kthvalue": lambda k: k - k.kthvalue(2).values,
    "mode": lambda k: k - k.mode().values,
    "equal entries": lambda k: (k[:, None] == k).sum(1) > 1,
    "clamped": lambda k: k[torch.arange(len(k)).clamp(max=2)],
    "take": lambda k: torch.take(k, torch.arange(len(k)).clamp(max=2)),
    "beyond three": lambda k: torch.where(torch.arange(len(k)) > 3, -k, k),
    "every fourth": lambda k: torch.where(torch.arange(len(k)) % 4 == 0, -k, k),
    "permutation": lambda k: k[torch.randperm(len(k))],
    "batch size": lambda k: k / len(k),
    "small batch": lambda k: k if len(k) < 5 else 2 * k,
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_found_in_every_probe(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        assert not any(probed(MIXING[name], scores()) for _ in range(30))


def test_a_statistic_of_the_batch_is_no_constant() -> None:
    assert probed(lambda k: k.median(), scores(), shape=()) == []
    assert probed(lambda k: torch.zeros((), dtype=k.dtype), scores(), shape=()) is None


SEPARATE: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda h: h.sort(1).values,
    "argsort": lambda h: h.argsort(1),
    "cummax": lambda h: h.cummax(1).values,
    "log": lambda h: h.log(),
    "ratio": lambda h: h / h.round(),
    "cholesky": lambda h: torch.linalg.cholesky(h.unsqueeze(-1) @ h.unsqueeze(-2) + 3 * torch.eye(4).to(h)),
    "never": lambda h: h > 20,
    "identity": lambda h: h[torch.arange(len(h))],
    "softmax": lambda h: h.softmax(1),
    "matmul": lambda h: h @ torch.ones(4, 4).to(h),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ops_within_samples_pass(dtype: torch.dtype) -> None:
    for name, op in SEPARATE.items():
        if name == "cholesky" and dtype == torch.bfloat16:
            continue
        shape = (N, 4, 4) if name == "cholesky" else (N, 4)
        for _ in range(10):
            assert probed(op, scores((N, 4), dtype), shape=shape) == [Samples(0)], name


def test_folded_samples_are_told_apart() -> None:
    folded = Operand((BatchSize(2), 3), torch.float64, Samples(0, 1, 2))
    for _ in range(10):
        assert probed(torch.tanh, folded, shape=(BatchSize(2), 3)) == [Samples(0, 1, 2)]
        assert probed(lambda x: x.view(-1, 2, 3).sum(1), folded, shape=(N, 3)) == [Samples(0)]
        assert not probed(lambda x: x.view(2, -1, 3).sum(0), folded, shape=(N, 3))


def test_an_op_that_always_fails_is_inconclusive() -> None:
    def fails(k: Tensor) -> Tensor:
        raise RuntimeError("out of order")

    with pytest.raises(Inconclusive, match="out of order"):
        probed(fails, scores())


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.c, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.function(torch.tanh(self.a(x)), x))


def distance(h: Tensor) -> Tensor:
    at = torch.arange(h.shape[0])
    return (at[:, None] - at[None, :]).abs()


REFUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sorted scores": lambda h, x: h * x.sum(1).sort(descending=True).values[:, None],
    "first of the batch so far": lambda h, x: h * x.sum(1).cummin(0).values[:, None],
    "clamped positions": lambda h, x: h[torch.arange(h.shape[0]).clamp(max=2)],
    "scaled by clamped positions": lambda h, x: h * torch.arange(h.shape[0]).clamp(max=2)[:, None],
    "gathered": lambda h, x: h.gather(0, torch.arange(h.shape[0]).clamp(max=2)[:, None].expand(-1, 4)),
    "distant samples": lambda h, x: h * torch.where(distance(h) > 3, 2.0, 1.0).double().mean(1, keepdim=True),
    "twentieth sample": lambda h, x: h * (1 + (torch.arange(h.shape[0]) > 20))[:, None],
    "permuted": lambda h, x: h[torch.randperm(h.shape[0])],
    "the sum of positions": lambda h, x: h * torch.arange(h.shape[0]).sum(),
    "over the batch size": lambda h, x: h * (h.new_ones(h.shape[0], 1) / h.new_ones(h.shape[0], 1).sum(0)),
}


def a_batch(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(function).double().eval(), torch.randn(17, 3).double(), torch.randint(2, (17,))


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_mixes_samples_is_refused(name: str) -> None:
    model, x, _ = a_batch(REFUSED[name])
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedError, match="samples of the batch mix") as caught:
        fxcurv.trace(model, x)
    assert caught.value.code == "FXC401"
    assert torch.equal(torch.get_rng_state(), state)


ACCEPTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "picked": lambda h, x: h * x[torch.arange(x.shape[0]), x.argmax(1)][:, None],
    "positions in place": lambda h, x: h[torch.arange(h.shape[0])] * (torch.arange(h.shape[0]) >= 0)[:, None],
    "rarely": lambda h, x: h.masked_fill(x.sum(1, keepdim=True) > 1.5, 0.0),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_model_that_keeps_samples_apart_is_right_at_every_size(name: str) -> None:
    model, x, y = a_batch(ACCEPTED[name])
    compiled = fxcurv.compile(model, quantities="batch_grad")
    for size in (1, 3, 5, 8, 17):
        result = compiled(x[:size], y[:size])["batch_grad"]
        for n in range(size):
            model.zero_grad()
            (F.cross_entropy(model(x[[n]]), y[[n]]) / size).backward()
            for parameter, p in model.named_parameters():
                torch.testing.assert_close(result[parameter][n], p.grad)


def test_entries_of_another_sample_are_not_of_a_sample() -> None:
    """A trial at random sizes misses some wrong positions, so that this decides by all entries, not by one."""
    assert _only_of(1, torch.tensor([1, 1, SHARED]))
    assert not _only_of(1, torch.tensor([1, 2, SHARED]))
    assert not _only_of(1, torch.tensor([SHARED, SHARED]))
