"""Digests that are equal in every process: of a batch, of a function, and of all that a model may read.

They hold the same facts as the signature of a model (fxcurv/signature/reachable.py): classes and functions by their
names and code, tensors and arrays by every value. An object without known contents is digested by the name of its type,
and in a batch by its pickle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.core.fingerprint import digest
from fxcurv.signature.code import CodeFacts
from fxcurv.signature.contents import Bounds, Parts, parts_of
from fxcurv.signature.reachable import BOOKKEEPING, DEPTH, OBJECTS, Walk, modules_of

__all__ = ["batch_digest", "facts_of_model", "value_digest"]


_UNBOUNDED = 1 << 62


class _Stable(Walk):
    """A walk whose key holds no identities; without bounds if `whole`, and then with the pickles of other objects."""

    entered = Bounds(_UNBOUNDED, _UNBOUNDED)
    closed = Bounds(_UNBOUNDED, _UNBOUNDED, entered=False)

    def __init__(self, modules: Sequence[nn.Module] = (), whole: bool = False) -> None:
        super().__init__(modules)
        self.whole = whole
        self.depth, self.objects = (_UNBOUNDED, _UNBOUNDED) if whole else (DEPTH, OBJECTS)

    def parts(self, value: object, bounds: Bounds) -> Parts | None:
        found = parts_of(value, bounds)
        if found is None or not isinstance(value, set | frozenset):
            return found
        label, parts = found  # the order of a set of strings is another in every process
        digests = sorted(_digest(_walked(_Stable(self.modules, self.whole), part)) for part in parts)
        return (*label, *digests), ()

    def identity(self, value: object) -> None:
        name = getattr(value, "__qualname__", getattr(value, "__name__", None))
        self.out += ("object", type(value), name if isinstance(name, str) else "")
        if self.whole:
            try:
                self.out.append(digest(value))
            except Exception:  # it has no pickle: the name of its type counts alone
                self.out.append("")

    def tensor(self, t: Tensor) -> None:
        self.out += ("tensor", t.shape, t.dtype, t.requires_grad and not self.whole, _bytes_of(t))
        self._hooks_of(t)


def _bytes_of(t: Tensor) -> bytes:
    if t.is_nested:
        return b"".join(_bytes_of(each) for each in t.unbind())
    if t.device.type == "meta":
        return b""
    with torch.no_grad():
        plain = (t if t.layout == torch.strided else t.to_dense()).detach().cpu().resolve_conj().resolve_neg()
        if plain.is_quantized:
            plain = plain.int_repr()
        content = plain.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=16).digest()


def _walked(walk: Walk, *values: object) -> Sequence[Hashable]:
    for value in values:
        walk.note(value)
    walk.drain()
    return walk.out


# Digests ----------------------------------------------------------------------------------------------------------


def batch_digest(batch: Any, before: str = "") -> str:
    """Return a digest of a batch: every value in any container or object. `before` is a digest to continue."""
    return _digest((before, *_walked(_Stable(whole=True), batch)), 16)


def value_digest(value: object, model: nn.Module) -> str:
    """Return a digest of a value beside a model, such as a function: code, defaults, closure and globals it names."""
    return _digest(_walked(_Stable(modules_of(model)), value))


def facts_of_model(model: nn.Module) -> dict[str, str]:
    """Return a digest for each fact of a model, by its description: classes, structure, hooks and attributes.

    The values of parameters and buffers are no facts.
    """
    modules = modules_of(model)
    names = {id(m): name for name, m in model.named_modules()}

    def facts() -> Iterator[tuple[str, Walk]]:
        for cls in {type(m): None for m in modules}:
            walk = _Stable(modules)
            walk.note(cls)
            yield f"the code of {cls.__module__}.{cls.__qualname__} or a value that it reads", walk
        for m in modules:
            at = names[id(m)]
            walk = _Stable(modules)
            walk.out.append(type(m))
            walk.structure(m)
            yield f"the tensors, submodules or mode of {at or 'the model'}", walk
            walk = _Stable(modules)
            walk.hooks(m)
            if walk.out:
                yield f"a hook of {at or 'the model'}", walk
            for name, value in vars(m).items():
                if name not in BOOKKEEPING:
                    walk = _Stable(modules)
                    walk.note(value)
                    yield f"the attribute {at and f'{at}.'}{name}", walk
        walk = _Stable(modules)
        walk.global_hooks()
        yield "a hook of every module", walk

    found: dict[str, str] = {}
    for name, walk in facts():  # classes may have equal names
        found[name] = found.get(name, "") + _digest(_walked(walk))
    return found


def _digest(key: Sequence[Hashable], size: int = 8) -> str:
    found = hashlib.blake2b(digest_size=size)
    for atom in key:
        found.update(_text(atom))
    return found.hexdigest()


def _text(atom: Any) -> bytes:
    """Return the text of an atom of a key; its length comes first, so that no two keys have the same text."""
    if isinstance(atom, tuple):
        text = b"(" + b"".join(map(_text, atom)) + b")"
    elif isinstance(atom, frozenset):
        text = b"{" + b"".join(sorted(map(_text, atom))) + b"}"
    elif isinstance(atom, type):
        text = f"{atom.__module__}.{atom.__qualname__}".encode()
    elif isinstance(atom, CodeFacts):
        text = _text(atom.code)
    elif isinstance(atom, CodeType):
        counts = atom.co_argcount, atom.co_posonlyargcount, atom.co_kwonlyargcount, atom.co_flags
        names = atom.co_names, atom.co_freevars, atom.co_cellvars
        text = _text((atom.co_code, atom.co_exceptiontable, counts, names, atom.co_consts))
    else:  # numbers, strings, bytes, dtypes, devices
        text = f"{type(atom).__name__} {atom!r}".encode()
    return b"%d:%b" % (len(text), text)
