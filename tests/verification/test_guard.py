"""The comparison of the graph with the model: hostile models come out right, or are refused with the true cause."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.verification.batches import among_others, varied
from fxcurv.verification.tolerances import different_parameters, different_samples, tolerance_for

SIZES = (3, 1, 5, 8, 17)
REGISTRY: dict[str, Any] = {}


class Network(nn.Module):
    """Two layers; subclasses change how they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def between(self, h: Tensor) -> Tensor:
        return torch.tanh(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double().eval()


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    return draw(size, 3), draw(size, 2)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """The gradients that `backward()` leaves for each sample's term of the loss `F.mse_loss(…, reduction="sum")`."""
    found: list[dict[str, Tensor]] = []
    for n in range(len(x)):
        model.zero_grad(set_to_none=True)
        (model(x) - y)[n].square().sum().backward()
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        found.append(zeros | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    return found


def assert_right(model: nn.Module, sizes: tuple[int, ...] = SIZES) -> None:
    compiled = fxcurv.compile(model, nn.MSELoss(reduction="sum"), ["grad", "batch_grad"])
    for size in sizes:
        x, y = batch(size)
        result, expected = compiled(x, y), gradients(model, x, y)
        for name in dict(model.named_parameters()):
            each = torch.stack([one[name] for one in expected])
            if result["grad"].status[name] == "unreached":
                assert not bool(each.any())
                continue
            torch.testing.assert_close(result["batch_grad"][name], each)
            torch.testing.assert_close(result["grad"][name], each.sum(0))


# Forwards that a structural copy does not see ------------------------------------------------------------------------


class Wrapped(Network):
    def __init__(self) -> None:
        super().__init__()
        forward = self.a.forward
        setattr(self.a, "forward", lambda x: 2 * forward(x))  # noqa: B010


class WrappedByDecorator(Network):
    def __init__(self) -> None:
        super().__init__()

        def decorated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            @functools.wraps(function)
            def wrapper(x: Tensor) -> Tensor:
                return function(x) + function(-x).square()

            return wrapper

        setattr(self.b, "forward", decorated(self.b.forward))  # noqa: B010


class Closure(Network):
    def __init__(self) -> None:
        super().__init__()
        self.first = lambda x: self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.first(x)))


class Partial(Network):
    def __init__(self) -> None:
        super().__init__()
        self.first = functools.partial(Partial.apply, self)

    def apply(self, x: Tensor) -> Tensor:  # pyright: ignore
        return self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.first(x)))


class WeakReference(Network):
    def __init__(self) -> None:
        super().__init__()
        self.first = weakref.ref(self.a)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first()
        assert first is not None
        return self.b(torch.tanh(first(x)))


class GlobalVariable(Network):
    def __init__(self) -> None:
        super().__init__()
        REGISTRY["first"] = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(REGISTRY["first"](x)))


class HookOnOutput(Network):
    """A forward hook that calls another module of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(4, 4)
        self.a.register_forward_hook(lambda module, inputs, output: self.c(output))


class HookOnInput(Network):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(4, 4)
        self.b.register_forward_pre_hook(lambda module, inputs: (self.c(inputs[0]),))


class HeldParameter(Network):
    """A closure that holds the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.a.weight
        self.first = lambda x: x @ weight.T

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.first(x)))

    def double(self) -> Network:
        return super().double()  # the closure holds the parameter, whose data are converted


class PlainList(Network):
    """Functions in a list that lead back to submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [lambda x: self.a(x), torch.tanh, lambda x: self.b(x)]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


FOLLOWED = (
    *(Wrapped, WrappedByDecorator, Closure, Partial, WeakReference, GlobalVariable),
    *(HookOnOutput, HookOnInput, HeldParameter, PlainList),
)


@pytest.mark.parametrize("kind", FOLLOWED)
def test_forwards_outside_of_the_modules_are_followed(kind: type[Network]) -> None:
    model = made(kind)
    assert_right(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert_right(model, (4,))


# Branches on the batch size ------------------------------------------------------------------------------------------


class Larger(Network):
    def between(self, h: Tensor) -> Tensor:
        return torch.tanh(2 * h if h.shape[0] > 4 else h)


class Even(Network):
    def between(self, h: Tensor) -> Tensor:
        return torch.tanh(h if h.shape[0] % 2 else h.square())


class Three(Network):
    """Three branches, the last of which has a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(4, 4)

    def between(self, h: Tensor) -> Tensor:
        if h.shape[0] <= 3:
            return h.sin()
        return h.cos() if h.size(0) < 9 else self.c(h)


@pytest.mark.parametrize("kind", [Larger, Even, Three])
def test_every_branch_on_the_batch_size_has_a_program(kind: type[Network]) -> None:
    model = made(kind)
    assert_right(model)
    compiled = fxcurv.compile(model, "mse", "kfac")
    programs = [compiled.prepare(batch(size)[0]) for size in SIZES]
    assert [compiled.prepare(batch(size)[0]) for size in SIZES] == programs
    assert len(set(map(id, programs))) == (3 if kind is Three else 2)


class Alone(Network):
    def between(self, h: Tensor) -> Tensor:
        return h.sin() if h.shape[0] == 1 else h.cos()


def test_a_branch_for_one_sample_is_refused_there() -> None:
    """Tracing treats every size but one as equal, and the graph of one sample has no batch axis."""
    model = made(Alone)
    assert_right(model, (3, 5))
    x, y = batch(1)
    with pytest.raises(fxcurv.UnsupportedError, match=r"batch of 1.*FXC107") as caught:
        fxcurv.compile(model, "mse", "grad")(x, y)
    assert "on_unsupported" in str(caught.value)
    fallback = fxcurv.compile(model, nn.MSELoss(reduction="sum"), "batch_grad", on_unsupported="fallback")(x, y)
    for name, value in fallback["batch_grad"].items():
        torch.testing.assert_close(value[0], gradients(model, x, y)[0][name])


# Samples that mix ----------------------------------------------------------------------------------------------------


class FromTwenty(Network):
    """Mixes its samples in larger batches alone."""

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(0) if h.shape[0] >= 20 else h


class MixedByNumpy(Network):
    """Mixes its samples where a trace does not look: a hook of the process."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            x = x + self.share(x)
        return super().forward(x)

    @staticmethod
    def share(x: Tensor) -> Tensor:
        return 0.1 * x.mean(0)


def test_samples_that_mix_in_large_batches_are_refused_there() -> None:
    compiled = fxcurv.compile(made(FromTwenty), "mse", "grad")
    compiled(*batch(19))
    with pytest.raises(fxcurv.UnsupportedError, match="FXC401"):
        compiled(*batch(20))


def test_a_graph_that_is_not_the_model_is_refused() -> None:
    compiled = fxcurv.compile(made(MixedByNumpy), "mse", "grad")
    with pytest.raises(fxcurv.UnsupportedError, match="FXC107"):
        compiled(*batch(5))


# Nothing of the user's changes ---------------------------------------------------------------------------------------


class Busy(Network):
    """Counts, logs, caches and draws in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.log, self.cache = 0, list[int](), dict[int, Tensor]()
        self.state: Any = SimpleNamespace(last=None)
        self.register_buffer("seen", torch.zeros(()))

    def between(self, h: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(len(self.log))
        self.cache[self.calls] = h
        self.state.last = h
        if not torch.compiler.is_exporting():
            torch.rand(())
        return torch.tanh(h)


def test_the_model_and_the_process_are_as_before() -> None:
    model, (x, y) = made(Busy), batch(4)
    assert isinstance(model, Busy)
    stepped: list[str] = []
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p)
        p.register_post_accumulate_grad_hook(lambda _, name=name: stepped.append(name))
    tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
    held, state = {name: p.grad for name, p in model.named_parameters()}, torch.get_rng_state()
    fxcurv.compile(model, "mse", "grad")(x, y)
    assert not stepped
    assert torch.equal(torch.get_rng_state(), state)
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == tensors
    for name, p in model.named_parameters():
        assert p.grad is held[name]
        assert bool((p.grad == 1).all())
    assert (model.calls, model.log, model.cache, model.state.last) == (0, [], {}, None)
    with torch.random.fork_rng(devices=[]):
        model(x).sum().backward()
    assert set(stepped) == {name for name, _ in model.named_parameters()}


def test_a_gradient_hook_on_a_parameter_is_refused_and_never_called() -> None:
    model, (x, y), called = made(Network), batch(4), list[int]()
    handle = model.get_parameter("a.weight").register_hook(lambda g: called.append(1))
    with pytest.raises(fxcurv.UnsupportedError, match=r"'a\.weight' has a gradient hook.*FXC109"):
        fxcurv.compile(model, "mse", "grad")(x, y)
    result = fxcurv.compile(model, "mse", "grad", on_unsupported="skip")(x, y)
    assert result["grad"].status["a.weight"] == "unsupported"
    handle.remove()
    fxcurv.compile(model, "mse", "grad")(x, y)
    assert not called


# When the model is called --------------------------------------------------------------------------------------------

CALLS: SimpleQueue[int] = SimpleQueue()  # of C, so that a signature does not see the contents


def calls() -> list[int]:
    """The sizes of the batches that the model was called with since this function was last called."""
    return [CALLS.get() for _ in range(CALLS.qsize())]


class Counted(Network):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            CALLS.put(len(x))
        return super().forward(x)


def test_the_model_is_called_at_first_use_and_at_new_batch_sizes() -> None:
    calls()
    compiled = fxcurv.compile(made(Counted), "mse", "grad")
    compiled(*batch(6))
    assert sorted(calls()) == [2, 3, 6, 6]
    compiled(*batch(6, seed=1))
    assert not calls(), "nothing later"
    compiled(*batch(9))
    assert calls() == [9, 9]
    compiled.accumulate([batch(6), batch(9), batch(6)], progress=False)
    assert not calls()


def test_always_calls_it_every_time_and_never_does_not() -> None:
    calls()
    model = made(Counted)
    fxcurv.compile(model, "mse", "grad", verify="never")(*batch(6))
    assert not calls()
    always = fxcurv.compile(model, "mse", "grad", verify="always")
    always(*batch(6))
    calls()
    always(*batch(6))
    assert calls() == [6]


class Switched(Network):
    """Reads what no signature sees."""

    def between(self, h: Tensor) -> Tensor:
        return torch.tanh(h) * HIDDEN()


class _Hidden:
    __slots__ = ("scale",)

    def __call__(self) -> float:
        return float(HIDDEN_FILE.read())


class _File:
    text = "1.0"

    def read(self) -> str:
        return type(self).text


HIDDEN_FILE = _File()
HIDDEN = _Hidden()


def test_always_notices_a_change_that_nothing_else_sees() -> None:
    model, (x, y) = made(Switched), batch(5)
    compiled = fxcurv.compile(model, nn.MSELoss(reduction="sum"), "grad", verify="always")
    compiled(x, y)
    _File.text = "3.0"
    try:
        result, expected = compiled(x, y), gradients(model, x, y)
    finally:
        _File.text = "1.0"
    for name, value in result["grad"].items():
        torch.testing.assert_close(value, torch.stack([one[name] for one in expected]).sum(0))


def test_explain_has_the_cost_of_the_comparison() -> None:
    model, (x, _) = made(Network), batch(8)
    once, each = fxcurv.compile(model, "mse", "grad").explain(x).comparison
    assert once > 0 < each
    assert "comparison with the model" in str(fxcurv.compile(model, "mse", "grad").explain(x))
    never = fxcurv.compile(model, "mse", "grad", verify="never").explain(x)
    assert never.comparison == (0.0, 0.0)
    assert "comparison" not in str(never)


# Types and tolerances ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_models_of_every_dtype_pass(dtype: torch.dtype) -> None:
    model = made(lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))).to(dtype)
    x, y = batch(5)
    assert fxcurv.compile(model, "mse", "grad")(x.to(dtype), y.to(dtype))["grad"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    class Doubled(Network):
        """Its own backward doubles a gradient that the graph does not."""

        def between(self, h: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                h = 2 * h - h.detach()
            return torch.tanh(h)

    model, (x, y) = made(Doubled).to(dtype), batch(5)
    with pytest.raises(fxcurv.UnsupportedError, match=r"'a\.weight'.*FXC107|'a\.bias'.*FXC107"):
        fxcurv.compile(model, "mse", "grad")(x.to(dtype), y.to(dtype))


def test_ill_conditioned_models_are_judged_in_a_wider_dtype() -> None:
    class Cancelling(Network):
        def between(self, h: Tensor) -> Tensor:
            return (h + 1e6) - 1e6 + h * 1e-3

    model, (x, y) = made(Cancelling).float(), batch(5)
    assert fxcurv.compile(model, "mse", "grad")(x.float(), y.float())["grad"]


def test_gradients_are_compared_in_groups_under_a_budget() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, dtype=torch.float64, generator=generator)
    y = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    tight = fxcurv.compile(model, "mse", "batch_l2", memory_budget=200_000)
    free = fxcurv.compile(model, "mse", "batch_l2")
    for name, value in free(x, y)["batch_l2"].items():
        torch.testing.assert_close(tight(x, y)["batch_l2"][name], value)


def test_tolerances_tell_rounding_from_a_difference() -> None:
    y = torch.tensor([[1.0, float("nan")], [2.0, float("inf")], [3.0, 4.0]])
    close = y * (1 + 1e-6)
    assert different_samples(close, y, 1e-4) == []
    close[2, 1] = 4.1
    assert different_samples(close, y, 1e-4) == [2]
    assert different_samples(y[:, :1], y, 1e-4) == [0, 1, 2]
    gradient, tolerance = {"w": torch.ones(4), "b": torch.full((4,), 1e-3)}, tolerance_for(torch.float32)
    assert different_parameters(gradient, gradient, tolerance) == []
    assert different_parameters({**gradient, "b": 2 * gradient["b"]}, gradient, tolerance) == ["b"]
    assert different_parameters({"w": gradient["w"]}, gradient, tolerance) == ["b"], "a missing gradient is zero"
    assert different_parameters(gradient, {**gradient, "b": None}, tolerance) == ["b"]


def test_samples_are_moved_and_others_replaced() -> None:
    generator = torch.Generator().manual_seed(0)
    x, ids = torch.randn(8, 3, generator=generator), torch.arange(16).view(8, 2)
    for size in (2, 3, 8, 12):
        other = among_others((x, ids), size, generator)
        found, found_ids = cast("tuple[Tensor, Tensor]", other.inputs)
        assert len(found) == size
        assert len(other.samples) < size
        assert torch.equal(found[other.rows], x[other.samples])
        assert torch.equal(found_ids[other.rows], ids[other.samples])
        assert not bool((other.rows == other.samples).any())
        assert all(any(torch.equal(row, one) for one in ids) for row in found_ids), "integers stay within the data"
    same = among_others(torch.zeros(4, 3), 4, generator).inputs
    assert isinstance(same, Tensor)
    assert bool((same != 0).any()), "equal samples are replaced by others"
    assert not torch.equal(cast("Tensor", varied(torch.zeros(4, 3), generator)), torch.zeros(4, 3))


class Logged(Network):
    """A module hook that only logs; trials of custom gradients call it."""

    def __init__(self) -> None:
        super().__init__()
        self.log = list[float]()
        self.b.register_full_backward_hook(lambda module, inputs, outputs: self.log.append(float(outputs[0].sum())))


def test_tracing_and_checking_call_no_hook_for_effect() -> None:
    model, (x, _) = made(Logged), batch(3)
    assert isinstance(model, Logged)
    fxcurv.trace(model, x)
    assert fxcurv.check(model, x, "grad", loss="mse").ok
    assert not model.log
    with torch.random.fork_rng(devices=[]):
        model(x).sum().backward()
    assert model.log
