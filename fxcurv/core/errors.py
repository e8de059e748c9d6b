"""Errors with node, cause and remedy, a stable code, and the lines of the model concerned.

`fxcurv explain CODE` describes a code; the table of codes is in `fxcurv/checks/codes.toml`.
"""

from __future__ import annotations

import os
import re
import sys
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
    "called_at",
    "frames_of",
    "raised_at",
]


# Lines of the model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """One line of code on the path to a node or an error."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


Location = tuple[Frame, ...]
"""The frames of the model, innermost first, without those in torch or in this package."""


def frames_of(node: fx.Node) -> Location:
    """Return the lines of the model that created a node, captured or lowered."""
    text = str(node.meta.get("stack_trace") or node.meta.get("stack") or "")
    found = re.findall(r'^ *File "(.*)", line (\d+), in (.*)$', text, re.MULTILINE)
    return _users(Frame(file, int(line), function) for file, line, function in reversed(found))


def raised_at(error: BaseException) -> Location:
    """Return the lines of the model that raised an exception."""
    frames: list[Frame] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.insert(0, Frame(code.co_filename, trace.tb_lineno, code.co_name))
        trace = trace.tb_next
    return _users(frames)


def called_at() -> Location:
    """Return the lines of the model that are being executed."""
    frames: list[Frame] = []
    frame = sys._getframe()
    while frame is not None:
        frames.append(Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return _users(frames)


_PACKAGE, _TORCH = Path(__file__).parent.parent, Path(torch.__file__).parent


_NOT_THE_MODEL = ("<", *(f"{folder}{os.sep}" for folder in (_PACKAGE, _PACKAGE.parent / "passes", _TORCH)))


_PYTHON = f"{Path(os.__file__).parent}{os.sep}"


_INSTALLED = ("site-packages", "dist-packages")


def _users(frames: Iterable[Frame]) -> Location:
    """Return the frames outside torch, Python's library and this package, in their order."""
    return tuple(frame for frame in frames if not frame.file.startswith(_NOT_THE_MODEL) and not _of_python(frame.file))


def _of_python(file: str) -> bool:
    """Whether a file belongs to Python's own library."""
    return file.startswith(_PYTHON) and not file.removeprefix(_PYTHON).startswith(_INSTALLED)


# Errors -----------------------------------------------------------------------------------------------------------


def a_value(value: object) -> str:
    """Describe a value of an unexpected type: None, the class Linear, an int."""
    if value is None or isinstance(value, type):
        return "None" if value is None else f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name.lower().startswith(('a', 'e', 'i', 'o', 'nd')) else 'a'} {name}"


class FxcurvError(Exception):
    """`node: cause; remedy [code]`: where it happened, the cause, the remedy, and a code to look up."""

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
        """Node and cause."""
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
    """The graph contains an operation without an exact or named treatment."""


class QuantityError(FxcurvError):
    """An unknown quantity, parameter or option was requested."""


class InputError(FxcurvError):
    """Inputs, targets or the model's mode do not fit the call."""


class LossError(FxcurvError):
    """The loss, or its argument, is not supported."""


class SpecError(FxcurvError):
    """A graph breaks the grammar of its stage: a defect of fxcurv, please report it."""
