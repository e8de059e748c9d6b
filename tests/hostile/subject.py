"""The subject: fxcurv's answers to the calls of a case, from one compiled object, and the state that it leaves."""

from __future__ import annotations

import random
import traceback
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxcurv
from hostile.cases import Case, data, load, phases, quantities, source

__all__ = ["ANEW", "Reply", "replies"]

ANEW = 2
"""The phase of a call of an object that is compiled after the change of state."""


@dataclass(frozen=True)
class Reply:
    """The values of a call, a refusal, or an exception of any other kind; `changed` is state that is not the same."""

    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    status: dict[str, dict[str, str]] = field(default_factory=dict)
    kronecker: tuple[str, ...] = ()
    code: str = ""
    error: str = ""
    changed: str = ""


def replies(case: Case, text: str | None = None) -> dict[tuple[int, int], Reply]:
    """The replies to all calls of a case, by phase and size of batch; the last phase is `ANEW`."""
    module = load(text or source(case))
    model, loss = module.build(), module.loss().double()
    compiled, found, now = _compiled(case, model, loss), {}, 0
    for phase, batch in phases(case):
        if phase != now:
            module.change(model, data(case, 3, loss)[0])
            now = phase
        found[phase, batch] = _reply(module, model, compiled, data(case, batch, loss))
    if now:
        batch = case.order[-1]
        found[ANEW, batch] = _reply(module, model, _compiled(case, model, loss), data(case, batch, loss))
    return found


def _compiled(case: Case, model: nn.Module, loss: nn.Module) -> fxcurv.Compiled | Reply:
    """The compiled object, or the reply to every call if there is none."""
    options: dict[str, Any] = {} if case.row.verify == "first" else {"verify": case.row.verify}
    try:
        return fxcurv.compile(model, loss, quantities(case), **options)
    except Exception as error:
        return _raised(error)


def _reply(
    module: types.ModuleType, model: nn.Module, compiled: fxcurv.Compiled | Reply, batch: tuple[Tensor, Tensor]
) -> Reply:
    if isinstance(compiled, Reply):
        return compiled
    x, y = batch
    before = _state(module, model)
    reply = _called(compiled, x.clone(), y.clone())
    after = _state(module, model)
    changed = [name for name in before | after if not _same(before.get(name), after.get(name))]
    return Reply(**{**vars(reply), "changed": ", ".join(changed)})


def _called(compiled: fxcurv.Compiled, x: Tensor, y: Tensor) -> Reply:
    try:
        result = compiled(x, y)
    except Exception as error:
        return _raised(error)
    kronecker = {p for q in result.values() for p, v in q.items() if isinstance(v, fxcurv.Kronecker)}
    return Reply(
        {q: {name: _dense(value) for name, value in entries.items()} for q, entries in result.items()},
        {q: dict(entries.status) for q, entries in result.items()},
        tuple(kronecker),
    )


def _raised(error: Exception) -> Reply:
    if not isinstance(error, fxcurv.FxcurvError):
        return Reply(error="".join(traceback.format_exception(error)))
    whole = error.code if error.code and error.cause and error.remedy else ""
    return Reply(code=whole or "without code, cause or remedy", error=str(error))


def _dense(value: Any) -> Tensor:
    value = value if isinstance(value, Tensor) else value.dense()
    return value.detach().to_dense().clone().as_subclass(Tensor)


# State ------------------------------------------------------------------------------------------------------------


def _state(module: types.ModuleType, model: nn.Module) -> dict[str, Any]:
    """What a call must not change: tensors, gradients, modes, plain attributes, globals and random numbers."""
    found: dict[str, Any] = {"torch's random numbers": torch.get_rng_state(), "random": random.getstate()}
    found["numpy's random numbers"] = tuple(np.random.get_state(legacy=False)["state"].values())
    for name, value in vars(module).items():
        if isinstance(value, int | float | str | list | dict) and not name.startswith("__"):
            found[f"global {name}"] = repr(value)
    for path, m in model.named_modules():
        for name, value in vars(m).items():
            if not name.startswith("_"):
                found[f"{path}.{name}"] = _plain(value)
    for name, p in model.named_parameters():
        found[name], found[f"{name}.grad"] = p.detach().clone(), None if p.grad is None else p.grad.clone()
    for name, b in model.named_buffers():
        found[name] = b.detach().clone()
    return found


def _plain(value: object) -> object:
    """A copy of a tensor, the state of a generator, the text of any other plain value, or the type."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    plain = isinstance(value, int | float | str | list | dict | tuple | None)
    return repr(value) if plain else type(value)


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.shape == after.shape and bool((before == after).all())
    if isinstance(before, tuple) and isinstance(after, tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, np.ndarray):
        return bool(np.array_equal(before, after))
    return type(before) is type(after) and before == after
