"""A checkpoint is continued only where model, split and batches compute the same; the refusal names what changed."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import types
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import Interrupting
from torch import Tensor, nn

import fxcurv
from fxcurv.signature.stable import batch_digest, facts_of_model, value_digest

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
ROOT = Path(__file__).resolve().parents[2]
SCALE = 1.0
LEAVES = frozenset(("a", "b", "c", "d", "e"))


class Net(nn.Module):
    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 2).double()
        self.cfg, self.array = types.SimpleNamespace(scale=1.0), np.ones(2)
        self.act: Any = nn.Tanh()
        self.constant, self.names = torch.ones(2, dtype=torch.float64), {"a", "b", "c", "d", "e"}

    def helper(self, x: Tensor) -> Tensor:
        return self.gain * x

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.helper(self.fc(x))) * self.cfg.scale * SCALE * self.constant
        return h * self.array[0] if LEAVES & {"x"} <= self.names else h


def doubled(*args: Any) -> Tensor:
    return 2 * args[-1]


def pairs(batch: Any, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    x, y = batch
    return scale * x, y


def rescaled(scale: float) -> Callable[[Any], tuple[Tensor, Tensor]]:
    return lambda batch: (scale * batch[0], batch[1])


class Splitter:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.scale * batch[0], batch[1]


BATCHES = [(X[k : k + 2], Y[k : k + 2]) for k in range(0, 8, 2)]


def run(model: nn.Module, path: Path, batches: Any = BATCHES, split: Any = None) -> fxcurv.Curvature:
    return fxcurv.compile(model, quantities="grad").accumulate(batches, checkpoint=path, split=split)


def interrupted(path: Path, batches: Any = BATCHES, split: Any = None) -> Net:
    model = Net().eval()
    with pytest.raises(KeyboardInterrupt):
        run(model, path, Interrupting(batches, 3), split)
    return model


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoints") / "c"
    interrupted(path)
    return path.read_bytes()


MODELS: dict[str, tuple[Callable[[Any, pytest.MonkeyPatch], object], str]] = {
    "object": (lambda m, p: setattr(m.cfg, "scale", 3), "the attribute cfg has changed"),
    "array": (lambda m, p: m.array.__setitem__(0, 3), "the attribute array has changed"),
    "tensor": (lambda m, p: m.constant.mul_(3), "the attribute constant has changed"),
    "set": (lambda m, p: m.names.add("f"), "the attribute names has changed"),
    "attribute of a submodule": (lambda m, p: setattr(m.act, "scale", 3), "the attribute act.scale has changed"),
    "submodule": (lambda m, p: setattr(m, "act", nn.Sigmoid().eval()), r"the code of torch.*Sigmoid.* has changed"),
    "mode": (lambda m, p: m.act.train(), "the tensors, submodules or mode of act has changed"),
    "hook": (lambda m, p: m.fc.register_forward_hook(doubled), "a hook of fc has changed"),
    "forward": (lambda m, p: p.setattr(Net, "forward", doubled), r"the code of .*\.Net or a value that it reads"),
    "method": (lambda m, p: p.setattr(Net, "helper", doubled), r"the code of .*\.Net or "),
    "attribute of the class": (lambda m, p: p.setattr(Net, "gain", 3.0), r"the code of .*\.Net or "),
    "global": (lambda m, p: p.setattr(f"{__name__}.SCALE", 3.0), r"the code of .*\.Net or "),
    "forward of the object": (lambda m, p: setattr(m, "forward", lambda x: m.fc(x)), "the attribute forward has"),
    "hook of every module": (
        lambda m, p: p.setitem(nn.modules.module._global_forward_hooks, -1, doubled),
        "a hook of every module has changed",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_another_model_is_refused(name: str, held: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "c", Net().eval()
    path.write_bytes(held)
    change, text = MODELS[name]
    change(model, monkeypatch)
    with pytest.raises(fxcurv.FxcurvError, match=text) as caught:
        run(model, path)
    assert caught.value.code == "FXC427"
    assert path.read_bytes() == held


def test_an_equal_model_continues(held: bytes, tmp_path: Path) -> None:
    path, model = tmp_path / "c", Net().eval()
    path.write_bytes(held)
    found = run(model, path)["grad"]
    nn.functional.cross_entropy(model(X), Y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-12, atol=1e-14)


SPLITS: dict[str, tuple[Any, Any]] = {
    "function": (pairs, rescaled(1.0)),
    "none": (None, pairs),
    "closure": (rescaled(1.0), rescaled(3.0)),
    "argument of a partial": (functools.partial(pairs, scale=1.0), functools.partial(pairs, scale=3.0)),
    "object": (Splitter(1.0), Splitter(3.0)),
    "method": (Splitter(1.0).__call__, Splitter(3.0).__call__),
}


@pytest.mark.parametrize("name", SPLITS)
def test_another_split_is_refused(name: str) -> None:
    model, (first, second) = Net(), SPLITS[name]
    assert value_digest(first, model) == value_digest(first, model) != value_digest(second, model)


def test_the_refusal_of_a_split_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    model = interrupted(path, split=pairs)
    monkeypatch.setattr(pairs, "__defaults__", (3.0,))
    with pytest.raises(fxcurv.FxcurvError, match="split= is another function, or reads other values") as caught:
        run(model, path, split=pairs)
    assert caught.value.code == "FXC427"


class Plain:
    """Its repr shows shapes, as those of many data sets do."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.x.shape)})"


class Slotted(Plain):
    __slots__ = ("x", "y")


class Opaque:
    """It is seen by its pickle alone."""

    __slots__ = ()


@dataclasses.dataclass(repr=False)
class Data:
    x: Tensor
    y: Tensor

    __repr__ = Plain.__repr__


Named = dataclasses.make_dataclass("Named", ["x", "y"])
Node = type("Node", (list,), {"__repr__": lambda self: "Node"})

CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "object": Plain,
    "slots": Slotted,
    "dataclass": Data,
    "UserDict": lambda x, y: UserDict(x=x, y=y),
    "namespace": lambda x, y: types.SimpleNamespace(x=x, y=y),
    "subclass of list": lambda x, y: Node([x, y]),
    "nested": lambda x, y: {"in": [Plain(x, y)]},
    "arrays": lambda x, y: Plain(x.numpy(), y),  # pyright: ignore[reportArgumentType]
    "large list": lambda x, y: [*range(2000), x, y],
    "large array": lambda x, y: np.concatenate([np.zeros(20000), x.numpy().ravel()]),
    "conjugate": lambda x, y: torch.complex(x, x).conj(),
    "sparse": lambda x, y: x.to_sparse(),
    "views": lambda x, y: (x.T, y),
    "bfloat16": lambda x, y: x.bfloat16(),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_value_of_a_batch_counts(kind: str) -> None:
    make = CONTAINERS[kind]
    other = X.clone()
    other[-1, -1] += 1
    assert batch_digest(make(X, Y)) == batch_digest(make(X.clone(), Y.clone())) != batch_digest(make(other, Y))
    assert batch_digest(make(X, Y), "before") != batch_digest(make(X, Y))


def of_object(batch: Any) -> tuple[Tensor, Tensor]:
    return batch.x, batch.y


def test_other_objects_are_refused_by_the_number_of_the_batch(tmp_path: Path) -> None:
    path, batches = tmp_path / "c", [Plain(x, y) for x, y in BATCHES]
    model, content = interrupted(path, batches, of_object), path.read_bytes()
    others = [Plain(x.clone(), y) for x, y in BATCHES]
    others[1].x[0, 0] += 1
    with pytest.raises(fxcurv.FxcurvError, match="batch 2 is another one: the loader gives other batches") as caught:
        run(model, path, others, of_object)
    assert caught.value.code == "FXC427"
    assert path.read_bytes() == content
    others[1].x[0, 0] = BATCHES[1][0][0, 0]
    found = run(model, path, others, of_object)["grad"]
    nn.functional.cross_entropy(model(X), Y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-12, atol=1e-14)


def test_digests_are_equal_in_another_process() -> None:
    """Where sets have another order, and objects other addresses."""
    script = f"import {__name__} as module; print(module.told(), end='')"
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True, text=True)
    assert found.stdout == told()


def told() -> str:
    model = Net().eval()
    model.fc.register_forward_hook(doubled)
    return f"{facts_of_model(model)} {value_digest(Splitter(1.0), model)} {batch_digest(Plain(X, Y))}"


def values() -> Iterator[Any]:
    yield from (1, True, 1.0, "1", b"1", None, (1,), [1], {1}, {1: 1}, {"1": 1}, ((), ()), ((),), Opaque(), Opaque)


def test_values_of_different_kinds_have_different_digests() -> None:
    found = [batch_digest(value) for value in values()]
    assert len(set(found)) == len(found)
