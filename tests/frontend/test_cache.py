"""Which programs are reused: of one model object, for as long as nothing that its forward may read has changed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from types import MethodType

import pytest
import reference
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.frontend.cache import CACHE_SIZE

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 0])


class Switched(nn.Module):
    """What it computes depends on attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()
        self.act: nn.Module = nn.LeakyReLU(0.1)
        self.square, self.scales, self.shift = False, [1.0, 2.0], torch.zeros(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x)) * self.scales[0] * self.scales[1] + self.shift
        return self.second(h * h if self.square else h)


def equals_the_oracle(model: nn.Module, compiled: fxcurv.Compiled) -> None:
    expected = reference.diag_ggn(model, nn.CrossEntropyLoss(), X, Y)
    for name, value in compiled(X, Y)["diag_ggn"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def doubled(module: nn.Module, args: object, y: Tensor) -> Tensor:
    return 2 * y


CHANGES: dict[str, Callable[[Switched], object]] = {
    "flag": lambda m: setattr(m, "square", True),
    "entry of a list": lambda m: m.scales.__setitem__(0, 3.0),
    "attribute of a submodule": lambda m: setattr(m.act, "negative_slope", 0.7),
    "submodule of another kind": lambda m: setattr(m, "act", nn.Tanh().eval()),
    "submodule of the same kind": lambda m: setattr(m, "act", nn.LeakyReLU(0.7).eval()),
    "tensor that is no buffer": lambda m: setattr(m, "shift", torch.ones(4, dtype=torch.float64)),
    "entries of such a tensor": lambda m: m.shift.add_(1),
    "hook": lambda m: m.first.register_forward_hook(doubled),
    "forward": lambda m: setattr(m, "forward", MethodType(lambda self, x: self.second(self.first(x)), m)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_followed(change: str) -> None:
    model = Switched().eval()
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    equals_the_oracle(model, compiled)
    CHANGES[change](model)
    equals_the_oracle(model, compiled)
    equals_the_oracle(model, fxcurv.compile(model, quantities="diag_ggn"))


def test_derived_compiled_objects_share_programs() -> None:
    model = Switched().eval()
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    program = compiled.prepare(X)
    assert compiled.summed().prepare(X[:2]) is program, "of any loss and batch size"
    other = compiled.choosing(fxcurv.compile(model, quantities="grad").selection)
    assert other.prepare(X) is not program
    assert other.choosing(compiled.selection).prepare(X) is program
    assert copy.deepcopy(compiled).prepare(X) is not program
    assert compiled.prepare(X) is program


def test_a_new_compile_looks_at_the_model_anew() -> None:
    model = Switched().eval()
    programs = [fxcurv.compile(model, quantities="diag_ggn").prepare(X) for _ in range(2)]
    assert programs[0] is not programs[1]


def test_the_limit_of_dense_blocks_is_part_of_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Switched().eval()
    statuses = [fxcurv.compile(model, quantities="kflr")(X, Y)["kflr"].status["second.bias"]]
    monkeypatch.setattr("fxcurv.quantities.DENSE_LIMIT", 1)
    statuses.append(fxcurv.compile(model, quantities="kflr")(X, Y)["kflr"].status["second.bias"])
    assert statuses == ["exact", "approx(diagonal)"]


@pytest.mark.parametrize("change", ["none", "hook", "forward"])
def test_a_model_is_forgotten_with_its_programs(change: str) -> None:
    model = Switched().eval()
    CHANGES.get(change, lambda m: None)(model)
    compiled = fxcurv.compile(model, quantities="diag_ggn", output=lambda y, m=model: y)
    compiled(X, Y)
    gone = weakref.ref(model), weakref.ref(compiled.program.canonical)
    del model, compiled
    gc.collect()  # the model, and with it the last reference to the program,
    gc.collect()  # whose graphs are cycles of their own
    assert [ref() for ref in gone] == [None, None]


def test_few_programs_are_kept_of_a_model_that_counts() -> None:
    model = Switched().eval()
    compiled = fxcurv.compile(model, quantities="grad")
    programs = [weakref.ref(compiled.prepare(X).canonical)]
    for count in range(CACHE_SIZE):
        model.count = count  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        programs.append(weakref.ref(compiled.prepare(X).canonical))
    gc.collect()
    assert sum(ref() is not None for ref in programs) == CACHE_SIZE
