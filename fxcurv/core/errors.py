"""Errors: each says node, cause and remedy, has a stable code, and knows the lines of the model that it is about.

`fxcurv explain CODE` says more about a code; the table of codes is in `fxcurv/checks/codes.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import fx

__all__ = [
    "CaptureError",
    "Frame",
    "FxcurvError",
    "InputError",
    "Location",
    "LossError",
    "QuantityError",
    "SpecError",
    "UnsupportedError",
    "a_value",
    "frames_of",
    "raised_at",
]


# Lines of the model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """One line of code on the way to a node or an error."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


Location = tuple[Frame, ...]
"""The frames of the model, the innermost first; none of torch or of this package."""


def frames_of(node: fx.Node) -> Location:
    """The lines of the model that made a node, captured or lowered."""
    text = str(node.meta.get("stack_trace") or node.meta.get("stack") or "")
    found = re.findall(r'^ *File "(.*)", line (\d+), in (.*)$', text, re.MULTILINE)
    return _users(Frame(file, int(line), function) for file, line, function in reversed(found))


def raised_at(error: BaseException) -> Location:
    """The lines of the model from which an exception came."""
    frames: list[Frame] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.insert(0, Frame(code.co_filename, trace.tb_lineno, code.co_name))
        trace = trace.tb_next
    return _users(frames)


_PACKAGE, _TORCH = Path(__file__).parent.parent, Path(torch.__file__).parent


_NOT_THE_MODEL = ("<", *(f"{folder}{os.sep}" for folder in (_PACKAGE, _PACKAGE.parent / "passes", _TORCH)))


_PYTHON = f"{Path(os.__file__).parent}{os.sep}"


_INSTALLED = ("site-packages", "dist-packages")


def _users(frames: Iterable[Frame]) -> Location:
    return tuple(frame for frame in frames if not frame.file.startswith(_NOT_THE_MODEL) and not _of_python(frame.file))


def _of_python(file: str) -> bool:
    """Whether a file is of Python's own library."""
    return file.startswith(_PYTHON) and not file.removeprefix(_PYTHON).startswith(_INSTALLED)


# Errors -----------------------------------------------------------------------------------------------------------


def a_value(value: object) -> str:
    """None, the class Linear, an int: how errors name a value of a type that is not expected."""
    if value is None or isinstance(value, type):
        return "None" if value is None else f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name.lower().startswith(('a', 'e', 'i', 'o', 'nd')) else 'a'} {name}"


class FxcurvError(Exception):
    """`node: cause; remedy [code]`: where it happened, what is wrong, what to do about it, and what to look up."""

    def __init__(
        self,
        cause: str,
        *,
        node: str | None = None,
        remedy: str | None = None,
        code: str | None = None,
        location: Location = (),
    ) -> None:
        self.cause, self.node, self.remedy, self.code, self.location = cause, node, remedy, code, location
        super().__init__(cause, node, remedy, code, location)

    @property
    def fact(self) -> str:
        """Where it happened and what is wrong."""
        return f"node {self.node}: {self.cause}" if self.node else self.cause

    def __str__(self) -> str:
        advice = f"; {self.remedy}" if self.remedy else ""
        return f"{self.fact}{advice}{f' [{self.code}]' if self.code else ''}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.cause), {key: value for key, value in vars(self).items() if key != "cause"}


def _rebuild(kind: type[FxcurvError], cause: str) -> FxcurvError:
    return kind(cause)


class CaptureError(FxcurvError):
    """The model cannot be captured as one graph that is valid for every batch size."""


class UnsupportedError(FxcurvError):
    """The graph holds something for which no exact or named treatment exists."""


class QuantityError(FxcurvError):
    """A quantity, a parameter or an option was asked for that does not exist."""


class InputError(FxcurvError):
    """Inputs, targets or the model's mode are not what the call needs."""


class LossError(FxcurvError):
    """The loss, or what it is applied to, is not supported."""


class SpecError(FxcurvError):
    """A graph breaks the grammar of its stage: a defect of fxcurv, please report it."""
