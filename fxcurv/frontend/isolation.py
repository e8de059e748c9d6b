"""Isolation of tracing from the process: autocast off, torch's report of a failed graph dropped, generators restored.

torch.export prints, logs and changes state of the whole process. `capture` holds `TRACING` and enters these contexts,
so that a failed trace is reported by its error alone.
"""

from __future__ import annotations

import io
import logging
import random
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import partial
from typing import Any

import torch

__all__ = ["TRACING", "generators_beside_torch", "no_report_of_failure", "reseeded", "without_autocast"]


TRACING = threading.RLock()
"""Held by the thread that traces: torch.export and fx replace functions of the whole process."""


@contextmanager
def without_autocast() -> Generator[None]:
    """Disable autocast on every device, so that the model computes in its own dtype."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def no_report_of_failure() -> Generator[None]:
    """Drop torch's printed and logged report of a graph that it cannot finish: the error gives cause and line.

    All other output is emitted once tracing has ended, log records of other threads immediately.
    """
    thread, printed, held = threading.get_ident(), io.StringIO(), list[tuple[logging.Handler, logging.LogRecord]]()

    def of_others(handler: logging.Handler, record: logging.LogRecord) -> bool:
        if record.thread == thread:
            held.append((handler, record))
        return record.thread != thread

    filters = {handler: partial(of_others, handler) for log in _torch_loggers() for handler in log.handlers}
    for handler, only in filters.items():
        handler.addFilter(only)
    report = ""
    try:
        with redirect_stderr(printed):
            yield
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", None)
        report = "" if graph is None else f"{graph}\n"
        held.clear()
        raise
    finally:
        for handler, only in filters.items():
            handler.removeFilter(only)
        for handler, record in held:
            handler.handle(record)
        said = printed.getvalue()
        if rest := said.replace(report, "") if report else said:
            print(rest, end="", file=sys.stderr)


def _torch_loggers() -> list[logging.Logger]:
    """Return all of torch's loggers: most have handlers of their own."""
    known = [(name, log) for name, log in logging.root.manager.loggerDict.items() if isinstance(log, logging.Logger)]
    return [log for name, log in known if name.partition(".")[0] == "torch"]


@contextmanager
def reseeded() -> Generator[Callable[[], bool]]:
    """Seed all global generators of the CPU afresh, and restore them; yield a function: whether they have advanced."""
    numpy: Any = sys.modules.get("numpy")
    with torch.random.fork_rng(devices=[]), generators_beside_torch():
        random.seed()
        torch.default_generator.seed()
        if numpy is not None:
            numpy.random.seed()
        before = torch.get_rng_state()
        with generators_beside_torch() as have_moved:
            yield lambda: have_moved() or not torch.equal(torch.get_rng_state(), before)


@contextmanager
def generators_beside_torch() -> Generator[Callable[[], bool]]:
    """Restore the global generators of Python and NumPy; yield a function that returns whether they have advanced."""
    numpy: Any = sys.modules.get("numpy")  # not imported: nothing draws from it

    def state() -> tuple[Any, Any]:
        theirs = numpy.random.get_state(legacy=False) if numpy is not None else {}
        return random.getstate(), theirs

    def have_moved() -> bool:
        return repr(state()) != before

    python, theirs = state()
    before = repr((python, theirs))
    try:
        yield have_moved
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(theirs)
