"""Devices: how time, memory and limits are taken on each."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else to ask for a GPU forbids to use it after a fork

import torch

from benchmark.machine import processor
from fxcurv.linalg.allocation import new_empty

__all__ = ["CPU", "CUDA", "DEVICES", "Device"]


class Device(Protocol):
    """What is measured on one, all in the process that asks."""

    name: str
    """As torch has it."""
    over: signal.Signals
    """What ends a process that takes too long."""

    @property
    def about(self) -> str:
        """What it is called, and how it is set."""
        ...

    @property
    def clock(self) -> str:
        """Which time is taken."""
        ...

    def now(self) -> float:
        """Seconds by that clock, once all is done that was asked for."""
        ...

    def limited(self, gibibytes: float) -> None:
        """From here on, this process has no more memory, and returns what it frees."""
        ...

    def within(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """What takes longer ends the process, in the midst of an operator too."""
        ...

    def peak(self, step: Callable[[], object]) -> int | None:
        """By how many bytes the step raises memory; None where the system cannot tell."""
        ...

    def fetch(self, size: int) -> None:
        """Have so much memory at hand."""
        ...


class CPU:
    """The processor, with torch's threads, and the resident memory of the process."""

    name, over = "cpu", signal.SIGPROF

    @property
    def about(self) -> str:
        """The processor's name and the number of threads."""
        return f"{processor()}, {torch.get_num_threads()} thread(s)"

    @property
    def clock(self) -> str:
        """The processor's for one thread."""
        return "processor" if torch.get_num_threads() == 1 else "wall-clock"

    def now(self) -> float:
        """Seconds by that clock."""
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()

    def limited(self, gibibytes: float) -> None:
        """Each block of 64 KiB or more goes back to the system when it is freed: a warm heap hides what a run needs."""
        allowed = int(gibibytes * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
        os.environ["MKL_DISABLE_FAST_MM"] = "1"
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc
            libc.mallopt(trim_threshold, 65536)
            libc.mallopt(mmap_threshold, 65536)

    @contextmanager
    def within(self, seconds: float) -> Generator[None]:
        """Processor time."""
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def peak(self, step: Callable[[], object]) -> int | None:
        """How far resident memory rises."""
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = memory_status("VmRSS")
        except (OSError, AttributeError):
            return None
        result = step()
        peak = memory_status("VmHWM") - before
        del result
        return max(peak, 0)

    def fetch(self, size: int) -> None:
        """In pages of both sizes: a virtual machine gives back what is free for a while, and whoever writes to it next
        pays for fetching it."""
        torch.empty(size, dtype=torch.uint8).fill_(1)
        new_empty(torch.empty(0, dtype=torch.uint8), size).fill_(1)


class CUDA:
    """A GPU, and the memory that torch's allocator has of it."""

    name, over = "cuda", signal.SIGALRM
    clock = "wall-clock"

    @property
    def about(self) -> str:
        """The GPU's name, and where TF32 is allowed."""
        matrices, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return f"{torch.cuda.get_device_name()}, TF32 in matrix products: {matrices}, in convolutions: {convolutions}"

    def now(self) -> float:
        """Seconds, once the GPU has nothing to do."""
        torch.cuda.synchronize()
        return time.perf_counter()

    def limited(self, gibibytes: float) -> None:
        """A share of the GPU's memory."""
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gibibytes * 2**30 / whole))

    @contextmanager
    def within(self, seconds: float) -> Generator[None]:
        """Wall-clock time: the GPU's is no process's."""
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
            torch.cuda.synchronize()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def peak(self, step: Callable[[], object]) -> int | None:
        """How far what tensors occupy rises."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak

    def fetch(self, size: int) -> None:
        """The allocator keeps what it once had."""


def memory_status(field: str) -> int:
    """A figure of this process in bytes: VmRSS, what is resident, or VmHWM, the highest it was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


DEVICES: dict[str, Device] = {"cpu": CPU(), "cuda": CUDA()}
