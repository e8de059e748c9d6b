"""The cache of compiled programs, and the signature of a model and its inputs, the key of a program.

A program belongs to one model object, never to a similar one: forward may depend on Python state that no key can see.
The key contains the kind of the inputs, every tensor's name, shape and dtype, and every module's type, mode, hooks and
attributes: plain values by value, tensors by identity and version, other objects by identity. The contents of such
objects, and global variables, are read when the model is traced.
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
"""Number of cached programs per model: a model that counts its calls in an attribute is new at every call."""


_CACHES: weakref.WeakKeyDictionary[nn.Module, dict[Hashed, Any]] = weakref.WeakKeyDictionary()


T = TypeVar("T")


def cached(model: nn.Module, key: object, make: Callable[[], T]) -> T:
    """Return the model's cached value for a key, made if it is missing and dropped with the model.

    One thread at a time makes values: torch cannot trace in several.
    """
    with TRACING:
        known, key = _CACHES.setdefault(model, {}), Hashed((Same(model), key))
        value = known[key] = known.pop(key) if key in known else make()  # the most recently used is last
        while len(known) > CACHE_SIZE:
            del known[next(iter(known))]
        return value


def request_key(selection: Selection, output: Output, *options: object) -> object:
    """Return the key of a request: selection, output and options."""
    asked = (tuple(selection.quantities.items()), tuple(selection.patterns.items()), quantities.DENSE_LIMIT)
    return asked, frozen(selection.among), frozen(output), options


def signature(model: nn.Module, inputs: Inputs) -> object:
    """Return the signature: the kind of the inputs and the structure of the model, without values and batch size."""
    leaves, structure = pytree.tree_flatten(as_call(inputs))
    kinds = tuple((tuple(t.shape[1:]), t.dtype, t.device) if isinstance(t, Tensor) else frozen(t) for t in leaves)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(t): name for name, t in reversed(tensors)}
    held = tuple((name, first[id(t)], t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors)
    modules = tuple((name, type(m), attributes_of(m, bookkeeping=True)) for name, m in model.named_modules())
    return str(structure), kinds, held, modules
