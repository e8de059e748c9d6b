"""Settings of a check, by precedence: command line, FXCURV_… variables, [tool.fxcurv] of pyproject.toml.

Every field of `Settings` is an option `--like-this`, a key `like_this` and a variable FXCURV_LIKE_THIS.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from fxcurv.checks.anchors import repository
from fxcurv.checks.codes import CODES
from fxcurv.checks.formats import FORMATS
from fxcurv.checks.policy import Allowance, FailOn, Level, Policy, Require
from fxcurv.core.errors import Frame, InputError
from fxcurv.losses.base import KINDS as LOSSES
from fxcurv.quantities.registry import NAMES
from fxcurv.runtime.options import OnUnsupported

__all__ = ["Config", "Option", "Settings", "TargetSettings", "load", "options"]


PREFIX = "FXCURV_"


# Readers: each takes a string or a TOML value ---------------------------------------------------------------------


def _words(value: object) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError("give names, separated by commas or as a list")
    return tuple(part.strip() for part in parts if part.strip())


def _codes(value: object) -> tuple[str, ...]:
    prefixes = tuple(word.upper() for word in _words(value))
    for prefix in prefixes:
        if not any(code.startswith(prefix) for code in CODES):
            raise ValueError(f"no code begins with {prefix}; `fxcurv codes` lists them")
    return prefixes


def _reports(value: object) -> tuple[tuple[str, Path], ...]:
    pairs = [word.partition("=") for word in _words(value)]
    if not all(format in FORMATS and file for format, _, file in pairs):
        raise ValueError(f"give FORMAT=FILE, the format one of {', '.join(FORMATS)}")
    return tuple((format, Path(file)) for format, _, file in pairs)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("give a string")
    return value


def _path(value: object) -> Path:
    return Path(_text(value))


def _flag(value: object) -> bool:
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
    found = known.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError("give true or false")
    return found


def _number(low: float, high: float = float("inf"), whole: bool = False) -> Callable[[object], float]:
    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError("give a number")
        found = int(value) if whole else float(value)
        if not low <= found <= high:
            raise ValueError(f"give a number from {low:g} to {high:g}" if high < 1e9 else f"give at least {low:g}")
        return found

    return read


def _one_of(*choices: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in choices:
            close = difflib.get_close_matches(str(value), choices, n=1)
            raise ValueError(f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(choices)}")
        return str(value)

    return read


# The options ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option: its reader and its help text."""

    name: str
    read: Callable[[object], Any]
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None


def _as(read: Callable[[object], Any], help: str, metavar: str | None = None) -> dict[str, Any]:
    return {"read": read, "help": help, "metavar": metavar}


def _among(choices: Iterable[str], help: str) -> dict[str, Any]:
    known = tuple(choices)
    return {"read": _one_of(*known), "help": help, "choices": known}


_INPUT = "one sample: 3x32x32, ids=16:int64,mask=16:bool, or @module:function (default: shape given by the model)"


_LEVEL = "static: on the meta device; shape: compiled (default); numeric: compared with autograd"


@dataclass(frozen=True)
class Settings:
    """All settings of a check, or of one of its targets."""

    quantities: tuple[str, ...] = field(
        default=("kfac", "diag_ggn"), metadata=_as(_words, f"of {', '.join(NAMES)} (default kfac,diag_ggn)", "Q,…")
    )
    loss: str = field(default="cross_entropy", metadata=_among(LOSSES, "default cross_entropy"))
    input: str | None = field(default=None, metadata=_as(_text, _INPUT, "SPEC"))
    level: Level = field(default="shape", metadata=_among(get_args(Level), _LEVEL))
    on_unsupported: OnUnsupported = field(
        default="skip", metadata=_among(get_args(OnUnsupported), "of compile(); error refuses models, not parameters")
    )
    require: Require = field(default="approx", metadata=_among(get_args(Require), "the worst status that passes"))
    min_coverage: float = field(
        default=1.0, metadata=_as(_number(0, 1), "share of trainable entries that must pass (default 1)", "SHARE")
    )
    fail_on: FailOn = field(default="error", metadata=_among(get_args(FailOn), "severity that fails (default error)"))
    exit_zero: bool = field(default=False, metadata=_as(_flag, "exit with 0 even with findings"))
    mode: str = field(default="eval", metadata=_among(("eval", "train"), "mode of the model (default eval)"))
    select: tuple[str, ...] = field(default=(), metadata=_as(_codes, "only findings of these codes", "PREFIX,…"))
    ignore: tuple[str, ...] = field(default=(), metadata=_as(_codes, "no findings of these codes", "PREFIX,…"))
    baseline: Path | None = field(default=None, metadata=_as(_path, "known findings, which do not fail", "FILE"))
    strict_baseline: bool = field(default=False, metadata=_as(_flag, "fail if known findings are fixed"))
    jobs: int = field(
        default=1, metadata=_as(_number(1, whole=True), "number of processes, one target each (default 1)", "N")
    )
    timeout: float | None = field(default=None, metadata=_as(_number(0.001), "time limit per target, in seconds", "S"))
    format: str = field(default="text", metadata=_among(FORMATS, "default text"))
    output: Path | None = field(default=None, metadata=_as(_path, "write the report to a file", "FILE"))
    also: tuple[tuple[str, Path], ...] = field(
        default=(),
        metadata=_as(_reports, "more reports, to files: sarif=check.sarif,junit=check.xml", "FORMAT=FILE,…"),
    )
    statistics: bool = field(default=False, metadata=_as(_flag, "count findings by code, on stderr"))
    seed: int = field(default=0, metadata=_as(_number(0, whole=True), "seed of weights and inputs (default 0)", "N"))
    allow: tuple[Allowance, ...] = ()

    @property
    def policy(self) -> Policy:
        """Policy of these settings, without a baseline."""
        return Policy(self.require, self.min_coverage, self.fail_on, self.select, self.ignore, self.allow)


def options() -> tuple[Option, ...]:
    """Return every option of the command line, the environment and the project."""
    declared = (f for f in dataclasses.fields(Settings) if f.metadata)
    return tuple(Option(f.name, **f.metadata) for f in declared)


_OF_TARGETS = ("quantities", "loss", "input", "level", "on_unsupported", "require", "min_coverage", "mode")


# Layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetSettings:
    """A [[tool.fxcurv.target]]: its name, its line, and its own values of settings."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    listed: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Config:
    """The layers of settings, and the targets of the project."""

    project: Mapping[str, Any]
    over: Mapping[str, Any]
    targets: tuple[TargetSettings, ...]
    root: Path

    @property
    def common(self) -> Settings:
        """Settings of all targets."""
        return Settings(**{**self.project, **self.over})

    def of(self, target: TargetSettings) -> Settings:
        """Return the settings of one target."""
        allow = (*self.project.get("allow", ()), *target.values.get("allow", ()))
        values: dict[str, Any] = {**self.project, **target.values, **self.over, "allow": allow}
        return Settings(**values)


def load(given: Mapping[str, object], environment: Mapping[str, str], folder: Path | None) -> Config:
    """Load the settings of a command line, an environment, and the project around `folder` (None: no project)."""
    known = {option.name: option for option in options()}
    variables = {k.removeprefix(PREFIX).lower(): v for k, v in environment.items() if k.startswith(PREFIX)}
    over = _values(variables, known, PREFIX) | _values(given, known, "--")
    here = folder or Path.cwd()
    file = _project_file(here) if folder is not None else None
    if file is None:
        return Config({}, over, (), repository(here))
    table, text = _table(file)
    targets = _targets(table.pop("target", []), known, file, text)
    allow = tuple(_allowance(entry, file) for entry in table.pop("allow", []))
    project = {**_values(table, known, f"{file.name}: tool.fxcurv."), "allow": allow}
    return Config(project, over, targets, repository(here))


def _values(table: Mapping[str, object], known: Mapping[str, Option], source: str) -> dict[str, Any]:
    """Read the values of a table by their options; `source` is the prefix of names in errors."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        _expect(key, known, source)
        try:
            values[key] = known[key].read(value)
        except ValueError as error:
            code = "FXC007" if source == "--" else "FXC008"
            shown = f"{source}{key.replace('_', '-') if source == '--' else key}"
            raise InputError(f"{shown} cannot be {value!r}", remedy=str(error), code=code) from error
    return values


def _expect(key: str, known: Iterable[str], source: str) -> None:
    if key in known:
        return
    close = difflib.get_close_matches(key, list(known), n=1)
    remedy = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
    raise InputError(f"{source}{key}: there is no such key", remedy=remedy, code="FXC008")


def _project_file(folder: Path) -> Path | None:
    here = folder.resolve()
    return next((f for p in (here, *here.parents) if (f := p / "pyproject.toml").is_file()), None)


def _table(file: Path) -> tuple[dict[str, Any], str]:
    """Return the table [tool.fxcurv], and the text of the file."""
    text = file.read_text(encoding="utf-8")
    try:
        return dict(tomllib.loads(text).get("tool", {}).get("fxcurv", {})), text
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file} is not valid TOML: {error}", remedy="correct it", code="FXC008") from error


def _targets(tables: Any, known: Mapping[str, Option], file: Path, text: str) -> tuple[TargetSettings, ...]:
    lines = [
        n for n, line in enumerate(text.splitlines(), 1) if re.match(r"\s*\[\[\s*tool\.fxcurv\.target\s*\]\]", line)
    ]
    return tuple(_target(table, known, Frame(str(file), line, "")) for table, line in zip(tables, lines, strict=False))


def _target(table: Mapping[str, Any], known: Mapping[str, Option], listed: Frame) -> TargetSettings:
    file, source = Path(listed.file), f"{Path(listed.file).name}:{listed.line}: "
    for key in table:
        _expect(key, ("name", "allow", *_OF_TARGETS), source)
    if not isinstance(table.get("name"), str):
        raise InputError(f"{source}a target has no name", remedy='add name = "package.module:factory"', code="FXC008")
    values = _values({k: v for k, v in table.items() if k in _OF_TARGETS}, known, source)
    values["allow"] = tuple(_allowance(entry, file) for entry in table.get("allow", []))
    return TargetSettings(table["name"], values, (listed,))


def _allowance(entry: Any, file: Path) -> Allowance:
    source = f"{file.name}: allow."
    for key in entry:
        _expect(key, ("code", "parameter", "reason"), source)
    if not entry.get("reason"):
        remedy = 'add reason = "…": why the finding is accepted'
        raise InputError(f"{file.name}: allow {entry} has no reason", remedy=remedy, code="FXC008")
    _expect(str(entry.get("code")), CODES, source)
    return Allowance(entry["code"], entry["reason"], entry.get("parameter", "*"))
