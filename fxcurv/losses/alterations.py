"""Losses that do not compute what their type defines: hooks, replaced or overridden methods.

Formulas of the Hessian belong to a type of module as torch defines it, so an altered module is refused.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.core.torch_compat import CALLED, has_global_hooks, hooks_of

__all__ = ["alteration", "changed_by_global_hooks"]


HARMLESS = {"__init__", "__module__", "__doc__", "__annotations__", "__repr__", "extra_repr", "__constants__"}


DEFINE = "define it as a kind of loss of its own, a subclass of fxcurv.losses.base.Loss"


def alteration(
    module: nn.Module, module_type: type[nn.Module], forward: object, function: Any
) -> tuple[str, str] | None:
    """Return how a module differs from its type, as cause and remedy; None if it does not.

    `forward` is the method of the type when its kind was registered, `function` the function that it calls, or None.
    """
    name = type(module).__name__
    for hook in hooks_of(module):
        return f"the loss {name} has a {hook}", f"remove it with handle.remove(), or {DEFINE}"
    for attribute in CALLED:
        if attribute in vars(module):
            return f"the loss {name} has an attribute {attribute!r} of its own", f"delete it, or {DEFINE}"
    for cls in type(module).__mro__[: type(module).__mro__.index(module_type)]:
        for attribute in vars(cls):
            if attribute not in HARMLESS and hasattr(module_type, attribute):
                return f"the loss {name} overrides {attribute!r}", f"use {_title(module_type)} itself, or {DEFINE}"
    if module_type.forward is not forward or not _as_shipped(module_type.forward, module_type):
        return f"the method {_title(module_type)}.forward has been replaced", "restore it, or put it in a subclass"
    if function is not None and not _as_shipped(function, sys.modules[function.__module__], function.__name__):
        return f"the function {function.__module__}.{function.__name__} has been replaced", "restore it"
    return None


def _title(module_type: type[nn.Module]) -> str:
    return f"{'nn.' * module_type.__module__.startswith('torch.nn.')}{module_type.__name__}"


def _as_shipped(function: Any, owner: Any, name: str = "") -> bool:
    """Whether `function` is still found in its module under `name`, and whether a function of torch is torch's."""
    if name and getattr(owner, name, None) is not function:
        return False
    home = owner.__module__ if isinstance(owner, type) else owner.__name__
    code = getattr(function, "__code__", None)
    return not home.startswith("torch.") or (code is not None and code.co_filename == sys.modules[home].__file__)


def changed_by_global_hooks(module: nn.Module, output: Tensor, target: Tensor) -> bool:
    """Whether hooks for all modules change the value or the gradient of a loss at an output."""
    if not has_global_hooks():
        return False
    results = list[tuple[Tensor, Tensor]]()
    for call in (module, module.forward):
        f = output.detach().requires_grad_()
        with torch.enable_grad():
            value = call(f, target)
            (gradient,) = torch.autograd.grad(value, f)
        results.append((value.detach(), gradient))
    (value, gradient), (plain, slope) = results
    return not (torch.equal(value, plain) and torch.equal(gradient, slope))
