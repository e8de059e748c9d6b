"""Anchors: the source line at which a finding is shown.

Forges annotate only lines inside the repository, not in site-packages. A finding is anchored at the innermost line of
the model inside the repository; else at the factory of the model; else at the target's line in pyproject.toml.
"""

from __future__ import annotations

import inspect
import linecache
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxcurv.core.errors import Frame, Location

__all__ = ["Anchors", "defined_at", "repository"]


@dataclass(frozen=True)
class Anchors:
    """The repository root and the fallback lines, in order of preference."""

    root: Path = field(default_factory=lambda: repository(Path.cwd()))
    fallbacks: tuple[Frame, ...] = ()

    def place(self, location: Location) -> dict[str, Any]:
        """Return `file`, `line`, `column` and `stack` of a row."""
        stack = tuple(f"{self.shown(frame.file)}:{frame.line} in {frame.function}" for frame in location[:2])
        found = next((f for f in (*location, *self.fallbacks) if self._holds(f.file)), None)
        if found is None:
            return {"stack": stack}
        return {"file": self.shown(found.file), "line": found.line, "column": _column(found), "stack": stack}

    def shown(self, file: str) -> str:
        """Return the path relative to the root, with slashes; for a file elsewhere, the absolute path."""
        path = Path(file).resolve()
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.as_posix()

    def _holds(self, file: str) -> bool:
        path = Path(file).resolve()
        return path.is_relative_to(self.root) and not {"site-packages", "dist-packages"} & set(path.parts)


def repository(folder: Path) -> Path:
    """Return the root of the repository that contains the folder; else of the project; else the folder itself."""
    here = folder.resolve()
    for mark in (".git", "pyproject.toml"):
        for place in (here, *here.parents):
            if (place / mark).exists():
                return place
    return here


def defined_at(thing: object) -> tuple[Frame, ...]:
    """Return the line that defines a class or function, if it has a source file."""
    made = inspect.unwrap(thing) if callable(thing) else type(thing)
    try:
        file, (_, line) = inspect.getsourcefile(made), inspect.getsourcelines(made)
    except (OSError, TypeError):
        return ()
    return (Frame(file, line, getattr(made, "__qualname__", "")),) if file else ()


def _column(frame: Frame) -> int:
    """Return the column at which the code of the line begins, counted from 1."""
    text = linecache.getline(frame.file, frame.line)
    return len(text) - len(text.lstrip()) + 1
