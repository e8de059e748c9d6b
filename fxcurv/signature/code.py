"""The code of functions and classes: the names that it reads, and the functions that a class runs.

These facts are cached for as long as functions and classes keep their code. Functions and classes of torch, NumPy and
the standard library are identified by their code alone.
"""

from __future__ import annotations

import dis
import functools
import sys
import weakref
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType

from torch import nn

__all__ = ["ClassFacts", "CodeFacts", "class_facts", "code_facts", "function_of", "is_library"]


_LIBRARIES = frozenset(("torch", "numpy", "builtins", *sys.stdlib_module_names))


_CACHED = 4096


def is_library(name: str | None) -> bool:
    """Whether a module is of torch, NumPy or the standard library."""
    return name is None or name.partition(".")[0] in _LIBRARIES


# Code of a function -----------------------------------------------------------------------------------------------


class CodeFacts:
    """A code object and the names that it reads, nested code included; equal only to itself."""

    __slots__ = ("attributes", "code", "globals", "imports")

    def __init__(self, code: CodeType) -> None:
        self.code = code
        globals_, attributes, imports = set[str](), set[str](), set[str]()
        for nested in _nested(code):
            for step in dis.get_instructions(nested):
                if step.opcode in dis.hasname:
                    name, kind = str(step.argval), step.opname
                    if kind.startswith(("STORE", "DELETE")):
                        continue
                    names = imports if kind == "IMPORT_NAME" else globals_ if _is_global(kind) else attributes
                    names.add(name)
            attributes.update(text for text in nested.co_consts if isinstance(text, str) and text.isidentifier())
        self.globals, self.attributes = tuple(sorted(globals_)), frozenset(attributes)
        self.imports = tuple(sorted(name for name in imports if not is_library(name)))


def _is_global(kind: str) -> bool:
    return "GLOBAL" in kind or kind == "LOAD_NAME"


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


_CODES: dict[int, CodeFacts] = {}


def code_facts(code: CodeType) -> CodeFacts:
    """Return the facts of a code object, the same object at every call."""
    facts = _CODES.get(id(code))
    if facts is None:
        if len(_CODES) >= _CACHED:
            _CODES.clear()
        facts = _CODES[id(code)] = CodeFacts(code)
    return facts


def function_of(value: object) -> FunctionType | None:
    """Return the Python function that a definition in a class, or a wrapper of functools, runs."""
    for _ in range(8):
        if isinstance(value, FunctionType):
            return value
        if isinstance(value, staticmethod | classmethod | MethodType):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools.cached_property):
            value = value.func
        else:
            value = getattr(value, "__wrapped__", None) if callable(value) and not isinstance(value, type) else None
    return None


# Code of a class --------------------------------------------------------------------------------------------------


class ClassFacts:
    """The functions and attributes that a class and its bases define, without those of nn.Module and object.

    It holds neither the class nor its functions, so that both can be freed. `key` identifies the code of all functions.
    """

    def __init__(self, cls: type) -> None:
        self._bases = _bases(cls)
        self._ids = tuple(map(id, self._bases_of(cls)))
        self._sizes = tuple(len(vars(c)) for c in self._bases_of(cls))
        self._found: list[tuple[int, str, int, CodeType]] = []
        self._attributes: list[tuple[int, str]] = []
        key: list[object] = []
        own: dict[str, list[tuple[int, FunctionType]]] = {}
        for k, c in enumerate(self._bases_of(cls)):
            library, module = is_library(c.__module__), issubclass(c, nn.Module)
            for name, value in vars(c).items():
                if (function := function_of(value)) is not None:
                    if library and not module and name not in _ENTRIES:
                        continue
                    self._found.append((k, name, id(value), function.__code__))
                    key += (name, type(value), code_facts(function.__code__))
                    if not is_library(function.__module__):
                        own.setdefault(name, []).append((k, function))
                elif not library and not (name.startswith("__") or name.startswith("_abc_") or _is_slot(value)):
                    self._attributes.append((k, name))
        self._reached = _reached(own)
        self.key = tuple(key)

    def are_current(self, cls: type) -> bool:
        """Whether the class still defines the same functions with the same code."""
        if len(cls.__mro__) != self._bases[-1]:
            return False
        bases = self._bases_of(cls)
        for c, known, size in zip(bases, self._ids, self._sizes, strict=True):
            if id(c) != known or len(c.__dict__) != size:
                return False
        for k, name, known, code in self._found:
            value = bases[k].__dict__.get(name)
            if id(value) != known:
                return False
            function = value if type(value) is FunctionType else function_of(value)
            if function is None or function.__code__ is not code:
                return False
        return True

    def functions(self, cls: type) -> list[FunctionType]:
        """Return the functions, outside of libraries, that forward, calls and attribute access reach by name."""
        bases = self._bases_of(cls)
        found = (function_of(vars(bases[k]).get(name)) for k, name in self._reached)
        return [function for function in found if function is not None]

    def attributes(self, cls: type) -> list[tuple[str, object]]:
        """Return the names and values of all other definitions, from first to last base; not those of libraries."""
        bases = self._bases_of(cls)
        return [(name, vars(bases[k]).get(name)) for k, name in self._attributes]

    def _bases_of(self, cls: type) -> list[type]:
        mro = cls.__mro__
        return [mro[k] for k in self._bases[:-1]]


def _bases(cls: type) -> tuple[int, ...]:
    """Return the positions of a class's bases in its order of resolution, and the length of that order."""
    mro = cls.__mro__
    return (*(k for k, c in enumerate(mro) if c not in (nn.Module, object)), len(mro))


_ENTRIES = ("forward", "__call__", "__getattr__", "__getattribute__")


def _is_slot(value: object) -> bool:
    return type(value).__name__ in ("member_descriptor", "getset_descriptor")


def _reached(own: dict[str, list[tuple[int, FunctionType]]]) -> list[tuple[int, str]]:
    """Return the base and name of each function that the entries of a class reach by name."""
    names, seen, found = list(_ENTRIES), set(_ENTRIES), list[tuple[int, str]]()
    for name in names:
        for base, function in own.get(name, ()):
            found.append((base, name))
            for code in _codes_within(function):
                new = code_facts(code).attributes - seen
                seen |= new
                names += sorted(new & own.keys())
    return found


def _codes_within(function: FunctionType) -> list[CodeType]:
    """Return the code of a function and of the functions that it wraps."""
    found, codes = [function], dict[int, CodeType]()
    for f in found:
        codes[id(f.__code__)] = f.__code__
        for cell in f.__closure__ or ():
            try:
                inner = function_of(cell.cell_contents)
            except ValueError:  # an empty cell
                continue
            if inner is not None and id(inner.__code__) not in codes:
                found.append(inner)
    return list(codes.values())


_CLASSES: weakref.WeakKeyDictionary[type, ClassFacts] = weakref.WeakKeyDictionary()


def class_facts(cls: type) -> ClassFacts:
    """Return the current facts of a class, the same object for as long as its functions keep their code."""
    facts = _CLASSES.get(cls)
    if facts is None or not facts.are_current(cls):
        facts = _CLASSES[cls] = ClassFacts(cls)
    return facts
