"""Oracle and subject in processes of their own.

A server for each imports what it needs and then forks for every call, so that a call begins in a process that has seen
no other model, and nothing of it is left behind. The servers are new Python processes; the oracle's never imports
fxcurv. Run as `python -m hostile.processes ROLE FD`, where FD is one end of a pipe.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from hostile.cases import Case
from hostile.judge import Outcome, verdict

__all__ = ["LIMIT", "Pair", "Server"]

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120.0
"""Seconds for one call, after which it counts as crashed."""

ROLES = {"oracle": ("hostile.oracle", "answers"), "subject": ("hostile.subject", "replies")}


class Server:
    """A process that answers cases; `ask` raises a RuntimeError with the traceback if there is no answer."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.pipe, theirs = multiprocessing.Pipe()
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        fixed = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-W", "ignore", "-m", "hostile.processes", role, str(theirs.fileno())]
        self.process = subprocess.Popen(command, env=os.environ | fixed, pass_fds=[theirs.fileno()])
        theirs.close()

    def ask(self, case: Case, text: str | None = None) -> Any:
        """The answers to a case."""
        self.pipe.send((case, text))
        answer, error = pickle.loads(self.pipe.recv_bytes())
        if error:
            raise RuntimeError(error)
        return answer

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.wait()


class Pair:
    """The two servers that judge cases."""

    def __enter__(self) -> Self:
        self.oracle, self.subject = Server("oracle"), Server("subject")
        return self

    def __exit__(self, *_: object) -> None:
        self.oracle.close()
        self.subject.close()

    def outcome(self, case: Case, text: str | None = None) -> Outcome:
        """The outcome of a case. An error of the oracle is raised: it is a defect of the construct."""
        answers = self.oracle.ask(case, text)
        try:
            replies = self.subject.ask(case, text)
        except RuntimeError as error:
            return Outcome("crashed", reason=str(error).strip())
        return verdict(answers, replies)


# In the servers -----------------------------------------------------------------------------------------------------


def serve(role: str, pipe: Connection) -> None:
    """Answer cases until the pipe is closed."""
    warnings.simplefilter("ignore")
    module, name = ROLES[role]
    compute: Callable[..., Any] = getattr(importlib.import_module(module), name)
    imported, _ = pickle.loads(_apart(_imports, compute))
    for more in imported:
        with contextlib.suppress(Exception):
            importlib.import_module(more)
    gc.collect()
    gc.freeze()
    while True:
        try:
            case, text = pipe.recv()
        except EOFError:
            return
        pipe.send_bytes(_apart(compute, case, text))


def _imports(compute: Callable[..., Any]) -> list[str]:
    """The modules that a call imports. Only they are kept: a process that has run autograd cannot fork."""
    compute(Case("reentrant", order=(1,), kflr=True), None)
    return list(sys.modules)


def _apart(compute: Callable[..., Any], *arguments: Any) -> bytes:
    """The pickled result of a call in a fork, or its error."""
    ours, theirs = multiprocessing.Pipe()
    child = os.fork()
    if not child:
        ours.close()
        _answer(theirs, compute, arguments)
        os._exit(0)
    theirs.close()
    try:
        if ours.poll(LIMIT):
            return ours.recv_bytes()
        os.kill(child, signal.SIGKILL)
        return pickle.dumps((None, f"no answer after {LIMIT:g} seconds"))
    except EOFError:
        return pickle.dumps((None, "the process ended without an answer"))
    finally:
        ours.close()
        os.waitpid(child, 0)


def _answer(pipe: Connection, compute: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Compute and send, with nothing on stdout and stderr."""
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    try:
        answer = pickle.dumps((compute(*arguments), ""))
    except BaseException:
        answer = pickle.dumps((None, traceback.format_exc()))
    pipe.send_bytes(answer)


if __name__ == "__main__":
    serve(sys.argv[1], Connection(int(sys.argv[2])))
    os._exit(0)  # without the reports of libraries that count their leaks
