"""The cache of compiled programs, and the signature of a model and its inputs, the key of a program.

A program belongs to one model object, never to a similar one, and to the compiled objects of one `compile()`: forward
may depend on Python state that no key can see. The key contains the kind of the inputs, and all that forward may read
as far as it can be found (fxcurv/signature/reachable.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxcurv import quantities
from fxcurv.core.identity import Hashed, Same, frozen, live_options_of
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import Inputs, Output, as_call
from fxcurv.frontend.isolation import TRACING
from fxcurv.quantities.selection import Selection
from fxcurv.signature.reachable import Walk, modules_of

__all__ = ["CACHE_SIZE", "Programs", "cached", "programs_of", "request_key", "signature"]


CACHE_SIZE = 16
"""Number of cached programs per `compile()`: a model that counts its calls in an attribute is new at every call."""


T = TypeVar("T")


class Programs:
    """The programs, at most `CACHE_SIZE`, of compiled objects that are derived from each other; a copy is empty."""

    def __init__(self) -> None:
        self._known: dict[Hashed, Any] = {}

    def of(self, model: nn.Module, key: object, make: Callable[[], T]) -> T:
        """Return a model's value for a key, made if it is missing.

        One thread at a time makes values: torch cannot trace in several.
        """
        with TRACING:
            known, key = self._known, Hashed((Same(model), key))
            value = known[key] = known.pop(key) if key in known else make()  # the most recently used is last
            while len(known) > CACHE_SIZE:
                del known[next(iter(known))]
            return value

    def __deepcopy__(self, memo: object) -> Programs:
        return Programs()


_OF_MODELS: weakref.WeakKeyDictionary[nn.Module, Programs] = weakref.WeakKeyDictionary()


def programs_of(model: nn.Module) -> Programs:
    """Return the programs that calls without a compiled object share; they are dropped with the model."""
    return _OF_MODELS.setdefault(model, Programs())


def cached(model: nn.Module, key: object, make: Callable[[], T]) -> T:
    """Return the model's cached value for a key, made if it is missing and dropped with the model."""
    return programs_of(model).of(model, key, make)


def request_key(selection: Selection, output: Output, *options: object) -> object:
    """Return the key of a request: selection, output and options."""
    named = tuple((name, live_options_of(quantity)) for name, quantity in selection.quantities.items())
    asked = (named, tuple(selection.patterns.items()), quantities.DENSE_LIMIT)
    return asked, frozen(selection.among), frozen(output), options


def signature(model: nn.Module, inputs: Inputs, output: Output = None) -> object:
    """Return the signature: the kind of the inputs, without batch size, and all that the model may read when called.

    It omits the values of parameters and buffers. Other tensors count by identity and version.
    """
    leaves, structure = pytree.tree_flatten(as_call(inputs))
    kinds = tuple((tuple(t.shape[1:]), t.dtype, t.device) if isinstance(t, Tensor) else frozen(t) for t in leaves)
    return str(structure), kinds, torch.get_default_dtype(), Walk(modules_of(model)).key(output)
