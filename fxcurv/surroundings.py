"""What tracing leaves as it was around it: what the process prints and logs, and the generators beside torch's."""

from __future__ import annotations

import io
import logging
import random
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr
from typing import Any

__all__ = ["generators_beside_torch", "no_report_of_failure"]


@contextmanager
def no_report_of_failure() -> Generator[None]:
    """What torch prints and logs of a graph that it cannot finish is dropped: the error says it, and where.

    Everything else comes once tracing has ended, other threads' records at once.
    """
    held, printed = _HeldBack(threading.get_ident()), io.StringIO()
    handlers = {handler for log in _torch_loggers() for handler in log.handlers}
    for handler in handlers:
        handler.addFilter(held)
    graph = None
    try:
        with redirect_stderr(printed):
            yield
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", None)
        held.records.clear()
        raise
    finally:
        for handler in handlers:
            handler.removeFilter(held)
        for record in held.records:
            logging.getLogger(record.name).handle(record)
        sys.stderr.write(printed.getvalue().replace(f"{graph}\n", ""))


def _torch_loggers() -> list[logging.Logger]:
    """All that torch has made: most have handlers of their own."""
    known = [(name, log) for name, log in logging.root.manager.loggerDict.items() if isinstance(log, logging.Logger)]
    return [log for name, log in known if name.partition(".")[0] == "torch"]


class _HeldBack(logging.Filter):
    """Keeps one thread's records."""

    def __init__(self, thread: int) -> None:
        super().__init__()
        self.thread, self.records = thread, list[logging.LogRecord]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is another thread's."""
        if record.thread == self.thread and record not in self.records:
            self.records.append(record)
        return record.thread != self.thread


@contextmanager
def generators_beside_torch() -> Generator[Callable[[], bool]]:
    """Those of Python and NumPy that all share are put back; what is yielded says whether they have moved."""
    numpy: Any = sys.modules.get("numpy")  # without which nothing draws from it

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
