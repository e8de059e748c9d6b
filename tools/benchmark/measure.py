"""Measuring: time in rounds, memory and limits of a row on its own; each in a process forked from one that imported
everything and computed nothing."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing as mp
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxcurv
from benchmark.devices import CPU, Device
from benchmark.problems import Problem
from benchmark.rows import GRADIENT, MODULES, Computation, Row

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How to measure: rounds, seconds that a row may take (else its problem says), memory it may hold, and where."""

    repeats: int
    limit: float | None = None
    gibibytes: float = 12
    device: Device = field(default_factory=CPU)

    def seconds(self, problem: Problem) -> float:
        return problem.limit if self.limit is None else self.limit


@dataclass(frozen=True)
class Line:
    """What was measured for one row of one problem; None where there is nothing to say. `ratio` is in gradients.

    `half_ms` is the first run at half the batch. The forecasts are the library's own, before anything has run.
    """

    problem: str
    library: str
    quantity: str
    ms: float | None = None
    spread: float | None = None
    ratio: float | None = None
    half_ms: float | None = None
    compile_s: float | None = None
    peak_mib: float | None = None
    predicted_ms: float | None = None
    predicted_mib: float | None = None
    covers: float | None = None
    note: str = ""
    state: str = "timed"  # refused, crashed, over the limit, skipped

    @property
    def row(self) -> str:
        return f"{self.library} {self.quantity}"


def noted(line: Line, *notes: str) -> Line:
    return replace(line, note="; ".join(dict.fromkeys(filter(None, (line.note, *notes)))))


# Processes --------------------------------------------------------------------------------------------------------


class Ended(Exception):
    """A process ended with this exit code, negative for a signal, before it had a result."""

    def __init__(self, code: int | None) -> None:
        by = signal.Signals(-code).name if code is not None and code < 0 else code
        super().__init__(f"the process ended with {by}")
        self.code = code


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """The function's result, computed in a process of its own; what it raises is raised."""
    context = mp.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        with ours:
            result = ours.recv()
    except EOFError:
        process.join()
        raise Ended(process.exitcode) from None
    finally:
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def send(pipe: Connection, function: Callable[..., object], arguments: Sequence[object]) -> None:
    gc.freeze()  # what was imported need not be looked at in every collection
    torch.set_num_threads(torch.get_num_threads())  # renews torch's pool, which autograd's threads would race to do
    try:
        result = function(*arguments)
    except Exception as error:
        result = RuntimeError(f"{type(error).__name__}: {error}")  # not every exception can be pickled
    pipe.send(result)


def import_all(problems: Iterable[Problem], rows: Iterable[Row]) -> None:
    """Import what the processes will need, and compile something small: neither is part of any measurement."""
    wanted = {p.package for p in problems} | {MODULES[row.library] for row in rows if row.library in MODULES}
    for module in sorted(wanted):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    fxcurv.compile(nn.Linear(2, 2)).prepare(torch.zeros(1, 2))


# One row alone ----------------------------------------------------------------------------------------------------


def trial(line: Line, row: Row, problem: Problem, settings: Settings) -> Line:
    """The row's line with all that is measured in a process of its own, or with the reason why it is not timed."""
    try:
        return apart(attempt, line, row, problem, settings)
    except Ended as ended:
        if ended.code == -settings.device.over:
            return replace(line, note=f"over the limit of {settings.seconds(problem):g} s", state="over the limit")
        return replace(line, note=str(ended), state="crashed")


def attempt(line: Line, row: Row, problem: Problem, settings: Settings) -> Line:
    """In the row's own process: compile and run within the limits, then run again for the peak."""
    device = settings.device
    device.limited(settings.gibibytes)
    model, x, y = problem.make(device.name)
    try:
        with device.within(settings.seconds(problem)):
            computation = row.prepare(model)
            begin = time.process_time()
            if computation.compile is not None:
                computation.compile(x)
                line = replace(line, compile_s=time.process_time() - begin)
            line = forecasted(line, computation, x)
            line = covered(line, model, computation.run(x, y).keys())
        peak = device.peak(lambda: computation.run(x, y))
    except Exception as error:  # a library may refuse with any class; the row reports it
        return replace(line, **refusal(error, settings.gibibytes))
    return replace(line, peak_mib=None if peak is None else peak / 2**20)


def refusal(error: Exception, gibibytes: float) -> dict[str, str]:
    """A line's note and state after an error."""
    reason = next(iter(str(error).strip().splitlines()), "")
    scarce = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in reason
    if scarce:
        return {"note": f"over the limit of {gibibytes:g} GiB", "state": "over the limit"}
    return {"note": f"refuses: {type(error).__name__}: {reason}"[:160].rstrip(": "), "state": "refused"}


def forecasted(line: Line, computation: Computation, x: Tensor) -> Line:
    """With what the library expects of a run on `x`, where it says so."""
    told = computation.forecast(x) if computation.forecast is not None else None
    if told is None:
        return line
    return replace(line, predicted_ms=1000 * told.seconds, predicted_mib=told.peak_bytes / 2**20)


def covered(line: Line, model: nn.Module, names: Iterable[str]) -> Line:
    """With the share of the trainable elements among `names`, and the kinds of the modules that hold the others."""
    names, trainable = set(names), {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    if not names:
        return line
    share = 100 * sum(numel for name, numel in trainable.items() if name in names) / sum(trainable.values())
    missing = [name for name in trainable if name not in names]
    kinds = Counter(type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in missing)
    lacks = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    return noted(replace(line, covers=share), f"without {lacks}" if lacks else "")


# Rows in rounds ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """A computation that compiled and ran, with its batch, the bytes it needs, and the times that it took so far."""

    computation: Computation
    batch: tuple[Tensor, Tensor]
    half: float
    peak: int
    times: list[float]
    device: Device


def seconds(device: Device, step: Callable[[], object]) -> float:
    """How long the step took."""
    gc.collect()
    gc.disable()
    try:
        begin = device.now()
        result = step()
        elapsed = device.now() - begin
    finally:
        gc.enable()
    del result
    return elapsed


def ready(row: Row, problem: Problem, device: Device, peak: int = 0) -> Ready:
    """The row, warm: it compiled, ran, and ran at half the batch."""
    model, x, y = problem.make(device.name)
    computation = row.prepare(model)
    if computation.compile is not None:
        computation.compile(x)
    computation.run(x, y)
    few = max(1, len(x) // 2)
    half = seconds(device, lambda: computation.run(x[:few], y[:few]))
    return Ready(computation, (x, y), half, peak, [], device)


MINIMUM = 3
SHORT = 1.0  # seconds at half the batch: whoever takes longer hardly feels what ran before


def in_rounds(able: Iterable[Ready], repeats: int, limit: float) -> None:
    """Every computation once per round, `repeats` times; after three it stops once its times add up to the limit.

    A short one runs once more before it is timed, as in a loop: the caches and the heap are otherwise those of another.
    The first, which the others are compared with, is in every round.
    """
    able = list(able)
    for done in tqdm(range(repeats), desc="rounds", disable=None, leave=False):
        for k, warm in enumerate(able):
            if k == 0 or done < MINIMUM or sum(warm.times) < limit:
                step = partial(warm.computation.run, *warm.batch)
                warm.device.fetch(warm.peak)
                if warm.half < SHORT:
                    step()
                warm.times.append(seconds(warm.device, step))


def timed(lines: Sequence[Line], rows: Sequence[Row], problem: Problem, settings: Settings) -> list[Line]:
    """The lines with times; each ratio compares with the first row's, the gradient's, time of the same round."""
    able: dict[str, Ready] = {}
    failed: dict[str, dict[str, str]] = {}
    named = {row.name: row for row in rows}
    peaks = {line.row: int(2**20 * (line.peak_mib or 0)) for line in lines if line.state == "timed"}
    for name in tqdm(sorted(peaks, key=GRADIENT.name.__ne__), desc="prepare", disable=None, leave=False):
        try:
            able[name] = ready(named[name], problem, settings.device, peaks[name])
        except Exception as error:
            failed[name] = refusal(error, settings.gibibytes)
    in_rounds(able.values(), settings.repeats, settings.seconds(problem))
    base = able[GRADIENT.name].times if GRADIENT.name in able else []
    lines = [replace(line, **failed.get(line.row, {})) for line in lines]
    return [with_times(line, able[line.row], base) if line.row in able else line for line in lines]


def with_times(line: Line, warm: Ready, base: Sequence[float]) -> Line:
    times, middle = warm.times, statistics.median(warm.times)
    ratio = statistics.median(t / g for t, g in zip(times, base, strict=False)) if base else None
    line = replace(line, ms=1000 * middle, spread=quartile_spread(times), ratio=ratio, half_ms=1000 * warm.half)
    return noted(line, f"{len(times)} runs" if base and len(times) < len(base) else "")


def quartile_spread(times: Sequence[float]) -> float | None:
    """(Q3 − Q1) / median, in percent."""
    if len(times) < 4:
        return None
    low, middle, high = statistics.quantiles(times, n=4)
    return 100 * (high - low) / middle


# A problem --------------------------------------------------------------------------------------------------------


def measured(name: str, problem: Problem, rows: Sequence[Row], settings: Settings) -> list[Line]:
    """A line for every row: each in a process of its own first, then those that can, in rounds."""
    if problem.absent:
        return [Line(name, "", "", note=f"skipped: {problem.package} is not installed", state="skipped")]
    lines: list[Line] = []
    over: set[str] = set()
    for row in tqdm(rows, desc=f"{name}: one by one", disable=None, leave=False):
        line = Line(name, row.library, row.quantity, note=row.note)
        if row.cheaper in over:
            line = replace(line, note=f"not tried: {row.cheaper} is over the limit", state="over the limit")
        else:
            line = trial(line, row, problem, settings)
        if line.state == "over the limit":
            over.add(row.name)
        lines.append(line)
    try:
        return apart(timed, lines, rows, problem, settings)
    except Ended as ended:
        return [noted(line, f"not timed: {ended}" if line.state == "timed" else "") for line in lines]
