"""A loss module is what its type defines, or it is refused: hooks and replaced methods would be ignored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook

import fxcurv
from fxcurv.core.errors import FxcurvError, LossError
from fxcurv.losses.base import as_loss


def doubled(*args: Any) -> Any:
    """A hook of a forward pass."""
    return 2 * args[-1]


def a_batch() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0])


class Called(nn.CrossEntropyLoss):
    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)


class Inner(nn.CrossEntropyLoss):
    def _call_impl(self, *args: Any) -> Any:
        return 2 * self.forward(*args)


class Grandchild(Called):
    pass


class Attributes(nn.MSELoss):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class Described(nn.CrossEntropyLoss):
    """Nothing of it is computed otherwise."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def extra_repr(self) -> str:
        return self.name


ALTERED: dict[str, Callable[[Any], object]] = {
    "has a forward hook": lambda loss: loss.register_forward_hook(doubled),
    "has a forward pre-hook": lambda loss: loss.register_forward_pre_hook(lambda m, args: (2 * args[0], args[1])),
    "has a backward hook": lambda loss: loss.register_full_backward_hook(lambda m, g, s: (2 * g[0], g[1])),
    "has a backward pre-hook": lambda loss: loss.register_full_backward_pre_hook(lambda m, g: (2 * g[0],)),
    "an attribute 'forward' of its own": lambda loss: setattr(loss, "forward", lambda f, y: 2 * F.cross_entropy(f, y)),
    "an attribute '_call_impl' of its own": lambda loss: setattr(loss, "_call_impl", lambda f, y: f.sum()),
}


@pytest.mark.parametrize("cause", ALTERED)
def test_an_altered_module_is_refused_before_and_between_calls(cause: str) -> None:
    model, x, y = a_batch()
    loss = nn.CrossEntropyLoss()
    compiled = fxcurv.compile(model, loss, "grad")
    before, later = compiled(x, y), compiled.summed()
    made = ALTERED[cause](loss)
    for attempt in (
        lambda: fxcurv.compile(model, loss),
        lambda: compiled(x, y),
        lambda: later(x, y),
        lambda: compiled.accumulate([(x, y)], progress=False),
        lambda: fxcurv.ggn_operator(model, loss, (x, y)) @ torch.ones(8).double(),
    ):
        with pytest.raises(LossError, match=cause) as caught:
            attempt()
        assert caught.value.code == "FXC406"
    if isinstance(made, torch.utils.hooks.RemovableHandle):
        made.remove()
    else:
        vars(loss).pop(cause.split("'")[1])
    assert torch.equal(compiled(x, y)["grad"]["weight"], before["grad"]["weight"])


@pytest.mark.parametrize("loss", [Called(), Inner(), Grandchild(), Attributes()], ids=lambda loss: type(loss).__name__)
def test_a_subclass_with_other_methods_is_refused(loss: nn.Module) -> None:
    with pytest.raises(LossError, match=rf"the loss {type(loss).__name__} overrides '_*[gc].*use nn\.\w+Loss itself"):
        as_loss(loss)


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "bce_with_logits"])
def test_a_type_with_another_forward_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known: Any = as_loss(name)
    module, function = type(known.module), type(known).function

    def replaced(self: nn.Module, f: Tensor, y: Tensor) -> Tensor:
        return 2 * function(f, y)

    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", replaced)
        for given in (name, module(), known):
            with pytest.raises(LossError, match=rf"nn.{module.__name__}.forward has been replaced"):
                as_loss(given).value(torch.ones(2, 2), torch.ones(2, 2))
    with monkeypatch.context() as patch:
        patch.setattr(F, function.__name__, lambda f, y, **options: 2 * function(f, y, **options))
        with pytest.raises(LossError, match=rf"torch.nn.functional.{function.__name__} has been replaced"):
            as_loss(name)
    assert as_loss(name).name == name


def test_what_changes_no_number_is_accepted() -> None:
    model, x, y = a_batch()
    expected = fxcurv.compile(model, nn.CrossEntropyLoss(), "grad")(x, y)["grad"]["weight"]
    for loss in (Described("mine"), copy.deepcopy(nn.CrossEntropyLoss()), nn.CrossEntropyLoss(torch.ones(2).double())):
        assert torch.equal(fxcurv.compile(model, loss, "grad")(x, y)["grad"]["weight"], expected)


def test_hooks_for_all_modules_may_watch_the_loss_but_not_change_it() -> None:
    model, x, y = a_batch()
    loss, seen = nn.CrossEntropyLoss(), list[nn.Module]()
    compiled = fxcurv.compile(model, loss, "grad")
    expected = compiled(x, y)["grad"]["weight"]
    changes: list[Any] = [
        (register_module_forward_hook, lambda m, x, y: 2 * y if m is loss else None),
        (register_module_full_backward_hook, lambda m, g, s: (2 * g[0], *g[1:]) if m is loss else None),
    ]
    for register, change in changes:
        handle = register(change)
        try:
            with pytest.raises(FxcurvError, match="a hook for all modules changes the loss"):
                compiled(x, y)
        finally:
            handle.remove()
    watch: Any = lambda m, x, y: seen.append(m)  # noqa: E731
    handle = register_module_forward_hook(watch)
    try:
        assert torch.equal(compiled(x, y)["grad"]["weight"], expected)
    finally:
        handle.remove()
    assert loss in seen
