"""The signature sees every change that forward may read, and no other; values after a change are those of backward."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import sys
import time
import types
import weakref
from collections import ChainMap, OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules import module as every_module

import fxcurv
from fxcurv.frontend.cache import signature
from fxcurv.signature.contents import BYTES, ENTRIES
from fxcurv.signature.reachable import DEPTH

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 0])

SCALE = 1.0
OPTIONS = {"scale": 1.0, "unread": 0}
SETTINGS = types.SimpleNamespace(scale=1.0)
WEIGHTS = torch.ones((), dtype=torch.float64)
UNREAD = [0]


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Plain:
    factor = 1.0

    def __init__(self) -> None:
        self.scale, self.inner = 1.0, Slotted(1.0)

    def of(self) -> float:
        return self.scale * self.factor * self.inner.scale

    def __call__(self, x: Tensor) -> Tensor:
        return self.of() * x


@dataclasses.dataclass
class Data:
    scale: float = 1.0


Pair = namedtuple("Pair", "scale options")


class Mode(enum.Enum):
    HALF, FULL = 0.5, 1.0


class Number(float):
    pass


def deeper(x: Tensor) -> Tensor:
    return SETTINGS.scale * x


def scaled(x: Tensor, factor: float = 1.0, *, offset: float = 0.0) -> Tensor:
    return deeper(x) * SCALE * OPTIONS["scale"] * WEIGHTS * factor + offset


def called(self: Any, x: Tensor) -> Tensor:
    return 2 * nn.Module.__call__(self, x)


def closed(options: dict[str, float]) -> Callable[[Tensor], Tensor]:
    def act(x: Tensor) -> Tensor:
        return options["scale"] * x

    return act


class Reader(nn.Module):
    """It multiplies by the scales that objects of many kinds hold."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()
        self.cfg, self.data, self.pair = Plain(), Data(), Pair(1.0, {"scale": 1.0})
        self.ordered, self.user = OrderedDict(scale=1.0), UserDict(scale=1.0)
        self.namespace, self.arguments = types.SimpleNamespace(scale=1.0), argparse.Namespace(scale=1.0)
        self.queue, self.names, self.nested = deque([1.0]), {"full"}, [[{"scale": 1.0}]]
        self.array, self.scalar = np.ones(4), np.float64(1.0)
        self.tensor, self.mode, self.number = torch.ones(4, dtype=torch.float64), Mode.FULL, Number(1.0)
        self.table = torch.arange(16.0).double().view(4, 4)
        self.closed_over = {"scale": 1.0}
        self.act, self.bound = closed(self.closed_over), functools.partial(torch.mul, torch.ones(4).double())
        self.chained, self.reference = ChainMap({"scale": 1.0}), weakref.ref(self.cfg)

    def helper(self, x: Tensor) -> Tensor:
        return self.gain * x

    @property
    def shift(self) -> float:
        return 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(scaled(self.helper(self.first(x)))) + self.shift
        h = self.cfg(h) * self.data.scale * self.pair.scale * self.pair.options["scale"] * self.ordered["scale"]
        h = h * self.user["scale"] * self.namespace.scale * self.arguments.scale * self.queue[0]
        h = h * (1.0 if "full" in self.names else 0.5) * self.nested[0][0]["scale"] * self.chained["scale"]
        h = h * torch.from_numpy(self.array.copy()) * float(self.scalar) * self.tensor * self.mode.value + self.table[0]
        return self.second(self.bound(h) * float(self.number))


def doubled(*args: Any) -> Tensor:
    return 2 * args[-1]


def replaced(self: Any, x: Tensor) -> Tensor:
    return self.second(self.first(x).tanh())


CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], object]] = {
    "attribute of an object": lambda m, p: setattr(m.cfg, "scale", 3.0),
    "slot of an object in it": lambda m, p: setattr(m.cfg.inner, "scale", 3.0),
    "attribute of its class": lambda m, p: p.setattr(Plain, "factor", 3.0),
    "method of its class": lambda m, p: p.setattr(Plain, "of", lambda self: 3.0),
    "field of a dataclass": lambda m, p: setattr(m.data, "scale", 3.0),
    "field of a namedtuple": lambda m, p: setattr(m, "pair", m.pair._replace(scale=3.0)),
    "dict in a namedtuple": lambda m, p: m.pair.options.update(scale=3.0),
    "OrderedDict": lambda m, p: m.ordered.update(scale=3.0),
    "UserDict": lambda m, p: m.user.update(scale=3.0),
    "SimpleNamespace": lambda m, p: setattr(m.namespace, "scale", 3.0),
    "arguments": lambda m, p: setattr(m.arguments, "scale", 3.0),
    "deque": lambda m, p: m.queue.appendleft(3.0),
    "set": lambda m, p: m.names.clear(),
    "dict in lists": lambda m, p: m.nested[0][0].update(scale=3.0),
    "ChainMap": lambda m, p: m.chained.update(scale=3.0),
    "array": lambda m, p: m.array.__setitem__(1, 3.0),
    "scalar of NumPy": lambda m, p: setattr(m, "scalar", np.float64(3.0)),
    "enum": lambda m, p: setattr(m, "mode", Mode.HALF),
    "subclass of float": lambda m, p: setattr(m, "number", Number(3.0)),
    "data of a tensor": lambda m, p: setattr(m.tensor, "data", torch.full((4,), 3.0).double()),
    "entries of a tensor": lambda m, p: m.tensor.mul_(3),
    "other strides of its data": lambda m, p: setattr(m.table, "data", m.table.data.T),
    "argument of a partial": lambda m, p: m.bound.args[0].mul_(3),
    "closure": lambda m, p: m.closed_over.update(scale=3.0),
    "cell": lambda m, p: setattr(m.act.__closure__[0], "cell_contents", {"scale": 3.0}),
    "global number": lambda m, p: p.setattr(f"{__name__}.SCALE", 3.0),
    "global dict": lambda m, p: p.setitem(OPTIONS, "scale", 3.0),
    "global object, two functions deep": lambda m, p: p.setattr(SETTINGS, "scale", 3.0),
    "global tensor": lambda m, p: p.setattr(f"{__name__}.WEIGHTS", 3 * WEIGHTS),
    "global function": lambda m, p: p.setattr(f"{__name__}.deeper", doubled),
    "code of a function": lambda m, p: p.setattr(deeper, "__code__", (lambda x: 3.0 * x).__code__),
    "defaults": lambda m, p: p.setattr(scaled, "__defaults__", (3.0,)),
    "keyword defaults": lambda m, p: p.setattr(scaled, "__kwdefaults__", {"offset": 1.0}),
    "forward of the class": lambda m, p: p.setattr(Reader, "forward", replaced),
    "code of forward": lambda m, p: p.setattr(Reader.forward, "__code__", replaced.__code__),
    "__call__ of the class": lambda m, p: p.setattr(Reader, "__call__", called, raising=False),
    "method": lambda m, p: p.setattr(Reader, "helper", doubled),
    "property": lambda m, p: p.setattr(Reader, "shift", property(lambda self: 3.0)),
    "attribute of the class": lambda m, p: p.setattr(Reader, "gain", 3.0),
    "forward of a class of torch": lambda m, p: p.setattr(nn.Linear, "forward", lambda self, x: 2 * x @ self.weight.T),
    "forward of the object": lambda m, p: setattr(m, "forward", types.MethodType(replaced, m)),
    "forward of a submodule": lambda m, p: setattr(m.first, "forward", lambda x: x),
    "hook": lambda m, p: m.first.register_forward_hook(doubled),
    "hook of every module": lambda m, p: p.setitem(every_module._global_forward_hooks, -1, doubled),
    "hook before every module": lambda m, p: p.setitem(
        every_module._global_forward_pre_hooks, -1, lambda m, args: (2 * args[0],)
    ),
    "hook before": lambda m, p: m.first.register_forward_pre_hook(lambda m, args: (3 * args[0],)),
}  # fmt: skip


def equals_backward(model: nn.Module, compiled: fxcurv.Compiled) -> None:
    found = compiled(X, Y)["grad"]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = nn.functional.cross_entropy(model(X), Y)
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, value in zip(parameters, expected, strict=True):
        if value is not None:
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Reader().eval()
    before, y = signature(model, X), model(X)
    assert signature(model, X) == before
    CHANGES[change](model, monkeypatch)
    assert not torch.equal(model(X), y), "the change counts"
    assert signature(model, X) != before


def decorated(forward: Callable[..., Tensor]) -> Any:
    state = {"scale": 1.0}

    @functools.wraps(forward)
    def wrapped(self: Any, x: Tensor) -> Tensor:
        return forward(self, x) * state["scale"]

    return wrapped


@functools.lru_cache
def remembered() -> float:
    return Namespace.scale


class Namespace:
    scale, table = 1.0, [1.0]


class Base(nn.Module):
    namespace = Namespace

    @staticmethod
    def scale() -> float:
        return Namespace.table[0]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale()


class Derived(Base):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        import settings_of_a_test as settings  # pyright: ignore[reportMissingImports]

        return super().forward(x) * settings.SCALE * settings.act(1.0) * Namespace.scale * remembered()


INDIRECT: dict[str, Callable[[Any, pytest.MonkeyPatch], object]] = {
    "module": lambda s, p: p.setattr(s, "SCALE", 3.0),
    "global of a function of it": lambda s, p: p.setattr(s, "INNER", 3.0),
    "attribute of a class": lambda s, p: p.setattr(Namespace, "scale", 3.0),
    "list of a class": lambda s, p: p.setattr(Namespace, "table", [3.0]),
    "closure of a decorator": lambda s, p: p.setitem(Derived.forward.__closure__[1].cell_contents, "scale", 3.0),
    "forward of a base": lambda s, p: p.setattr(Base, "forward", lambda self, x: 3 * x),
    "static method of a base": lambda s, p: p.setattr(Base, "scale", staticmethod(lambda: 3.0)),
    "function with a cache": lambda s, p: p.setattr(f"{__name__}.remembered", lambda: 3.0),
}


@pytest.mark.parametrize("change", INDIRECT)
def test_indirect_changes_are_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = types.ModuleType("settings_of_a_test")
    settings.SCALE = settings.INNER = 1.0
    settings.act = types.FunctionType((lambda x: INNER * x).__code__, vars(settings))  # noqa: F821 # pyright: ignore
    monkeypatch.setitem(sys.modules, settings.__name__, settings)
    model = Derived().eval()
    before, y = signature(model, X), model(X)
    INDIRECT[change](settings, monkeypatch)
    assert not torch.equal(model(X), y), "the change counts"
    assert signature(model, X) != before


GRADIENTS: dict[str, Callable[[Any], object]] = {
    "hook of a parameter": lambda m: m.first.weight.register_hook(lambda g: 2 * g),
    "backward hook": lambda m: m.first.register_full_backward_hook(lambda m, before, after: None),
    "backward hook before": lambda m: m.first.register_full_backward_pre_hook(lambda m, after: None),
    "requires_grad": lambda m: m.first.requires_grad_(False),
    "requires_grad of a tensor": lambda m: m.tensor.requires_grad_(),
}


@pytest.mark.parametrize("change", GRADIENTS)
def test_changes_of_gradients_are_seen(change: str) -> None:
    model = Reader().eval()
    before = signature(model, X)
    GRADIENTS[change](model)
    assert signature(model, X) != before


def step(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    model(X)[0].sum().backward()
    optimizer.step()


INVISIBLE: dict[str, Callable[[Any], object]] = {
    "step of an optimizer": step,
    "call": lambda m: m(X),
    "gradients": lambda m: m(X).sum().backward(),
    "values": lambda m: m.load_state_dict({name: 2 * t for name, t in m.state_dict().items()}),
    "data of a parameter": lambda m: setattr(m.first.weight, "data", torch.ones(4, 4).double()),
    "global that nothing reads": lambda m: UNREAD.append(1),
    "hook of state_dict": lambda m: m.register_state_dict_post_hook(lambda *args: None),
    "hook for an optimizer": lambda m: m.first.weight.register_post_accumulate_grad_hook(lambda p: None),
    "equal dict": lambda m: setattr(m, "nested", [[{"scale": 1.0}]]),
    "equal object": lambda m: setattr(m, "data", Data()),
    "equal function": lambda m: setattr(m, "act", closed(m.closed_over)),
    "equal array": lambda m: setattr(m, "array", np.ones(4)),
    "state of an optimizer that it holds": lambda m: m.optimizer.step(),
    "attribute of a parameter": lambda m: setattr(m.first.weight, "steps", 1),
}


@pytest.mark.parametrize("change", INVISIBLE)
def test_what_forward_cannot_see_changes_nothing(change: str) -> None:
    model: Any = Reader().eval()
    model.optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    before = signature(model, X)
    INVISIBLE[change](model)
    assert signature(model, X) == before


def test_a_step_of_an_lstm_changes_nothing() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.LSTM(4, 4, batch_first=True).double()
    before = signature(model, X[:, None])
    step(nn.Sequential(model))
    assert signature(model, X[:, None]) == before


def test_the_default_dtype_counts() -> None:
    model = Reader().eval()
    before = signature(model, X)
    torch.set_default_dtype(torch.float64)
    try:
        assert signature(model, X) != before
    finally:
        torch.set_default_dtype(torch.float32)


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"scale": 1.0}
    for _ in range(depth):
        value = {"in": value}
    return value


def innermost(value: dict[str, Any]) -> dict[str, Any]:
    return innermost(value["in"]) if "in" in value else value


@pytest.mark.parametrize(
    ("make", "change", "seen"),
    [
        (lambda: dict.fromkeys(range(ENTRIES), 1.0), lambda v: v.update({0: 3.0}), True),
        (lambda: dict.fromkeys(range(ENTRIES + 1), 1.0), lambda v: v.update({0: 3.0}), False),
        (lambda: np.zeros(BYTES // 8), lambda v: v.__setitem__(-1, 3.0), True),
        (lambda: np.zeros(BYTES // 8 + 1), lambda v: v.__setitem__(-1, 3.0), False),
        (lambda: nested(DEPTH), lambda v: innermost(v).update(scale=3.0), True),
        (lambda: nested(DEPTH + 1), lambda v: innermost(v).update(scale=3.0), False),
    ],
)
def test_beyond_the_bounds_objects_are_compared_by_identity(
    make: Callable[[], Any], change: Callable[[Any], None], seen: bool
) -> None:
    model: Any = nn.Tanh()
    model.value = make()
    before = signature(model, X)
    change(model.value)
    assert (signature(model, X) != before) == seen
    model.value = make()
    change(model.value)
    assert signature(model, X) != before, "another object"


def test_cycles_end() -> None:
    model: Any = Reader().eval()
    model.cfg.own, model.cfg.model, model.all = model.cfg, model, [model, model.first]
    model.all.append(model.all)
    before = signature(model, X)
    assert signature(model, X) == before
    model.cfg.inner.scale = 3.0
    assert signature(model, X) != before


def test_a_module_beside_the_model_counts_with_its_values() -> None:
    with torch.random.fork_rng(devices=[]):
        model: Any = nn.Linear(4, 2).double()
        other = nn.Linear(2, 2).double()
    model.others = [other]
    before = signature(model, X)
    with torch.no_grad():
        other.weight.mul_(2)
    assert signature(model, X) != before


@pytest.mark.parametrize("name", ["test_vit", "resnet18"])
def test_a_signature_is_cheap(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(name) if name == "test_vit" else torchvision.models.resnet18()
    x, times = torch.zeros(1, 3, 160, 160), list[float]()
    for _ in range(30):
        start = time.perf_counter()
        signature(model, x)
        times.append(time.perf_counter() - start)
    assert min(times) < 3.7e-3


EACH = (
    "attribute of an object",
    "global dict",
    "global number",
    "array",
    "data of a tensor",
    "forward of the class",
    "closure",
    "attribute of its class",
    "other strides of its data",
    "forward of the object",
)


def test_values_follow_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Reader().eval()
    compiled = fxcurv.compile(model, quantities="grad")
    equals_backward(model, compiled)
    for change in EACH:
        with monkeypatch.context() as patch:
            CHANGES[change](model, patch)
            equals_backward(model, compiled)
    compiled = fxcurv.compile(model, quantities="grad")
    equals_backward(model, compiled)


class Hidden(nn.Module):
    """It reads what no walk finds: a number that a C function returns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (sys.getrecursionlimit() / 1000)


def test_a_new_compile_sees_what_no_signature_sees() -> None:
    with torch.random.fork_rng(devices=[]):
        model = Hidden().eval()
    equals_backward(model, fxcurv.compile(model, quantities="grad"))
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(3 * limit)
        equals_backward(model, fxcurv.compile(model, quantities="grad"))
    finally:
        sys.setrecursionlimit(limit)
