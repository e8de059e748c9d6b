"""fxcurv check | explain | codes: from settings to reports and an exit code.

0 passed, 1 findings, 2 wrong usage, a broken configuration, or a target that cannot be built.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fxcurv.checks import baseline, codes, formats
from fxcurv.checks.levels import Request
from fxcurv.checks.pool import Task, perform_all
from fxcurv.checks.report import Report, judged
from fxcurv.cli import config
from fxcurv.core.errors import FxcurvError, InputError
from fxcurv.losses.base import as_loss
from fxcurv.models import targets
from fxcurv.quantities.selection import chosen

__all__ = ["add_check", "add_codes", "add_explain"]


# check ------------------------------------------------------------------------------------------------------------


def add_check(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fxcurv check`."""
    parser.set_defaults(command=_check)
    parser.add_argument("target", nargs="*", metavar="TARGET", help="default: every [[tool.fxcurv.target]]")
    for option in config.options():
        name, unset = f"--{option.name.replace('_', '-')}", argparse.SUPPRESS
        if option.metavar is None and option.choices is None:
            parser.add_argument(name, action="store_true", default=unset, help=option.help)
        else:
            shown = option.metavar if option.choices is None else None
            parser.add_argument(name, default=unset, help=option.help, metavar=shown, choices=option.choices)
    parser.add_argument(
        "--write-baseline", action="store_true", help="record current failures as known, remove fixed findings"
    )
    parser.add_argument("--isolated", action="store_true", help="read neither pyproject.toml nor FXCURV_… variables")


def _check(arguments: argparse.Namespace) -> int:
    given = {o.name: getattr(arguments, o.name) for o in config.options() if hasattr(arguments, o.name)}
    read = config.load(given, {}, None) if arguments.isolated else config.load(given, os.environ, Path.cwd())
    settings = read.common
    known, file = _baseline(settings, write=arguments.write_baseline)
    tasks = _tasks(arguments, read, known)
    outcomes = perform_all(tasks, settings.jobs, settings.timeout)
    reports = [outcome for outcome in outcomes if isinstance(outcome, Report)]
    if arguments.write_baseline:
        renewed = known.renewed(reports)
        baseline.write(renewed, file)
        reports = [_forgiving(report, renewed) for report in reports]
        print(f"fxcurv: {len(renewed.entries)} known findings in {file}", file=sys.stderr)
    _publish(reports, settings)
    stale = [] if arguments.write_baseline else _stale(known, reports, file)
    broken = [outcome for outcome in outcomes if isinstance(outcome, FxcurvError)]
    for error in broken:
        print(f"fxcurv: {error}", file=sys.stderr)
    failed = not all(report.ok for report in reports) or (settings.strict_baseline and stale)
    return 2 if broken else 1 if failed and not settings.exit_zero else 0


def _tasks(arguments: argparse.Namespace, read: config.Config, known: baseline.Baseline) -> list[Task]:
    """Return a task per target: the named targets with their project settings, or all targets of the project."""
    listed = {target.name: target for target in read.targets}
    asked = [listed.get(name, config.TargetSettings(name)) for name in arguments.target] or list(read.targets)
    if not asked:
        remedy = "name a TARGET, or list some as [[tool.fxcurv.target]] in pyproject.toml"
        raise InputError("there is nothing to check", remedy=remedy, code="FXC007")
    tasks: list[Task] = []
    for target in asked:
        own = read.of(target)
        policy = replace(own.policy, known=known.fingerprints)
        request = Request(
            chosen(own.quantities), as_loss(own.loss), own.level, own.on_unsupported, policy, arguments.traceback
        )
        for name in targets.matching(target.name):
            tasks.append(Task(name, request, read.root, own.input, own.mode, own.seed, target.listed))
    return tasks


# The baseline -----------------------------------------------------------------------------------------------------


def _baseline(settings: config.Settings, write: bool) -> tuple[baseline.Baseline, Path]:
    """Return the baseline and its file, which may not exist yet."""
    file = settings.baseline or baseline.FILE
    if file.is_file() or not write:
        named_or_there = settings.baseline is not None or file.is_file()
        return baseline.read(file) if named_or_there else baseline.Baseline(), file
    return baseline.Baseline(), file


def _stale(known: baseline.Baseline, reports: Sequence[Report], file: Path) -> list[Mapping[str, str]]:
    """Return the known findings that are fixed, and print them to stderr."""
    fixed: list[Mapping[str, str]] = list(known.fixed(reports))
    for entry in fixed:
        said = f"{entry['code']} {entry['target']} {entry['parameter']} {entry['quantity']}"
        print(f"fxcurv: {file}: fixed, remove it with --write-baseline: {said}", file=sys.stderr)
    return fixed


def _forgiving(report: Report, known: baseline.Baseline) -> Report:
    """Return the report under the new baseline."""
    return judged(replace(report, policy=replace(report.policy, known=known.fingerprints)))


# Output -----------------------------------------------------------------------------------------------------------


def _publish(reports: Sequence[Report], settings: config.Settings) -> None:
    """Write the report to stdout or a file, and the job summary for GitHub."""
    if not reports:
        return
    text = formats.FORMATS[settings.format](reports)
    if settings.output is None:
        print(text)
    else:
        _write(settings.output, f"{text}\n")
    for format, file in settings.also:
        _write(file, f"{formats.FORMATS[format](reports)}\n")
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if settings.format == "github" and summary:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(f"{formats.markdown(reports)}\n")
    if settings.statistics:
        counts = Counter(row.code for report in reports for row in report.findings)
        for code, count in counts.most_common():
            print(f"{count:6d}  {code}  {codes.CODES[code].title}", file=sys.stderr)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write {file}: {error.strerror}", remedy="choose another --output", code="FXC007"
        ) from error


# explain and codes ------------------------------------------------------------------------------------------------


def add_explain(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fxcurv explain`."""
    parser.set_defaults(command=_explain)
    parser.add_argument("code", nargs="+", metavar="CODE", help="such as FXC401")


def _explain(arguments: argparse.Namespace) -> int:
    print("\n\n".join(str(codes.explain(code)) for code in arguments.code))
    return 0


def add_codes(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fxcurv codes`."""
    parser.set_defaults(command=_codes)
    parser.add_argument("--format", default="text", choices=("text", "json"), help="default text")


def _codes(arguments: argparse.Namespace) -> int:
    known = codes.CODES.values()
    lines = (f"{code.code}  {code.severity:8} {code.kind:14} {code.title}" for code in known)
    print(codes.as_json(known) if arguments.format == "json" else "\n".join(lines))
    return 0
