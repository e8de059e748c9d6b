"""Targets in separate processes: several at once, each with a time limit; a crash is a finding."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fxcurv.checks.anchors import Anchors, defined_at
from fxcurv.checks.codes import CODES
from fxcurv.checks.levels import CheckTarget, Request, examine
from fxcurv.checks.report import Report, Row, judged
from fxcurv.core.errors import Frame, FxcurvError
from fxcurv.models import targets
from fxcurv.models.examples import example

__all__ = ["Outcome", "Task", "perform", "perform_all"]


Outcome = Report | FxcurvError
"""Outcome of a target: its report, or the error that prevented it."""


@dataclass(frozen=True)
class Task:
    """One target, its request, and the anchors of its findings."""

    name: str
    request: Request
    root: Path
    input: str | None = None
    mode: str = "eval"
    seed: int = 0
    listed: tuple[Frame, ...] = ()

    @property
    def anchors(self) -> Anchors:
        """Anchors known without building the model."""
        return Anchors(self.root, self.listed)


def perform(task: Task) -> Outcome:
    """Build the model and check it; discard the output of the model and of torch."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), _rare_collections():
            target = targets.resolve(task.name, seed=task.seed)
            model = target.model.train(task.mode == "train")
            anchors = replace(task.anchors, fallbacks=(*defined_at(target.factory), *task.listed))
            inputs = example(target, task.input, task.seed)
            return examine(CheckTarget(task.name, model, inputs, None, anchors), task.request)
    except FxcurvError as error:
        return error


@contextmanager
def _rare_collections() -> Generator[None]:
    """Reduce the frequency of garbage collection: graphs are many small, long-lived objects."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


# Processes --------------------------------------------------------------------------------------------------------


def perform_all(tasks: Sequence[Task], jobs: int = 1, timeout: float | None = None) -> list[Outcome]:
    """Return the outcome of every target, in order; show a progress bar on a terminal."""
    results: dict[int, Outcome] = {}
    alone = timeout is None and (jobs == 1 or len(tasks) == 1)
    done = ((k, perform(task)) for k, task in enumerate(tasks)) if alone else _in_processes(tasks, jobs, timeout)
    for k, outcome in tqdm(done, "check", len(tasks), unit="target", disable=None if len(tasks) > 1 else True):
        results[k] = outcome
    return [results[k] for k in range(len(tasks))]


@dataclass(frozen=True)
class _Running:
    """A process that runs a task; its time limit starts at its first message, after its imports."""

    index: int
    process: Any
    results: Connection
    began: float | None = None

    def late(self, timeout: float | None) -> bool:
        return timeout is not None and self.began is not None and time.monotonic() - self.began > timeout


def _in_processes(tasks: Sequence[Task], jobs: int, timeout: float | None) -> Iterator[tuple[int, Outcome]]:
    """Yield outcomes as they arrive, from at most `jobs` processes at a time; all end with the loop."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", __name__])
    waiting, running = list(enumerate(tasks)), list[_Running]()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_started(context, *waiting.pop(0), threads))
            wait([r.results for r in running], None if timeout is None else 0.05)
            for r in [r for r in running if r.results.poll() or r.late(timeout)]:
                running.remove(r)
                outcome = _received(r, tasks[r.index], timeout)
                if outcome is None:
                    running.append(replace(r, began=time.monotonic()))
                else:
                    _end(r)
                    yield r.index, outcome
    finally:
        for r in running:
            _end(r)


def _started(context: Any, index: int, task: Task, threads: int) -> _Running:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(task, sender, threads), daemon=True)
    process.start()
    sender.close()  # then the pipe closes when the process ends
    return _Running(index, process, receiver)


def _work(task: Task, sender: Connection, threads: int) -> None:
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    sender.send(None)
    try:
        sender.send(perform(task))
    except Exception as error:  # not picklable, or raised by `perform` on purpose
        sender.send(FxcurvError(f"{task.name}: {type(error).__name__}: {error}", code="FXC904"))


def _received(r: _Running, task: Task, timeout: float | None) -> Outcome | None:
    """Receive a message: first None (started), then the outcome; a finding if the process is silent."""
    try:
        return r.results.recv() if r.results.poll() else _failed(task, "FXC501", f"not checked within {timeout:g} s")
    except EOFError:
        r.process.join()
        return _failed(task, "FXC902", f"the process of the check ended with exit code {r.process.exitcode}")


def _end(r: _Running) -> None:
    r.process.kill()
    r.process.join()
    r.results.close()


def _failed(task: Task, code: str, message: str) -> Report:
    """Return the report on a target that failed without a result."""
    place, remedy = task.anchors.place(()), CODES[code].remedy
    row = Row(task.name, "", "", "error", code=code, message=message, suggestion=remedy, **place)
    request = task.request
    return judged(Report(task.name, (row,), tuple(request.selection.quantities), request.level, policy=request.policy))
