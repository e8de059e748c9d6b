"""signature: what a program depends on, and the programs that are at hand.

A program belongs to a model object, never to one that merely looks alike: what forward computes may depend on Python
that no key can see. The key holds the kind of the inputs, every tensor's name, shape and type, and every module's type,
mode, hooks and attributes: plain values by value, tensors by identity and version, other objects by identity. What such
an object holds, and global variables, are read when the model is traced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from fxcurv import quantities
from fxcurv.core.identity import Hashed, Same, attributes_of, frozen
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import Inputs, Output, as_call
from fxcurv.frontend.isolation import TRACING
from fxcurv.quantities.selection import Selection

__all__ = ["CACHE_SIZE", "cached", "request_key", "signature"]


CACHE_SIZE = 16
"""How many programs of one model are kept: a model that counts its calls in an attribute is new at every call."""


_CACHES: weakref.WeakKeyDictionary[nn.Module, dict[Hashed, Any]] = weakref.WeakKeyDictionary()


T = TypeVar("T")


def cached(model: nn.Module, key: object, make: Callable[[], T]) -> T:
    """What is known of this very model under a key, made if it is new; forgotten with the model.

    It is made by one thread at a time: torch cannot trace in several.
    """
    with TRACING:
        known, key = _CACHES.setdefault(model, {}), Hashed((Same(model), key))
        value = known[key] = known.pop(key) if key in known else make()  # the latest used is the last
        while len(known) > CACHE_SIZE:
            del known[next(iter(known))]
        return value


def request_key(selection: Selection, output: Output, *options: object) -> object:
    """What is asked of a model."""
    asked = (tuple(selection.quantities.items()), tuple(selection.patterns.items()), quantities.DENSE_LIMIT)
    return asked, frozen(selection.among), frozen(output), options


def signature(model: nn.Module, inputs: Inputs) -> object:
    """What a program depends on: the kind of the inputs and the structure of the model; no values, no batch size."""
    leaves, structure = pytree.tree_flatten(as_call(inputs))
    kinds = tuple((tuple(t.shape[1:]), t.dtype, t.device) if isinstance(t, Tensor) else frozen(t) for t in leaves)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(t): name for name, t in reversed(tensors)}
    held = tuple((name, first[id(t)], t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors)
    modules = tuple((name, type(m), attributes_of(m, bookkeeping=True)) for name, m in model.named_modules())
    return str(structure), kinds, held, modules
