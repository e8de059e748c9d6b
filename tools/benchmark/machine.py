"""The machine: what it is called, what is installed on it, and its roofline."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
)


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def processor() -> str:
    """The processor's name, in the kernel's words where there are any."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def revision() -> str:
    """The commit of the sources, with a + where they differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "fxcurv"
    return f"fxcurv {done.stdout.strip()}".strip()


def where(threads: int) -> str:
    """The date, the machine and the versions on one line."""
    return (
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {threads} thread(s), float32, "
        f"Python {platform.python_version()}, {revision()}, {', '.join(map(version, PACKAGES))}"
    )


# Roofline ---------------------------------------------------------------------------------------------------------

SIDE = 1536  # of the square matrices that are multiplied
FLOATS = 32 * 2**20  # in each array of a copy: 128 MiB, more than the caches hold
REPEATS = 9


def rate(amount: float, step: Callable[[], object], clock: Callable[[], float]) -> float:
    """What is done per second, in units of 10⁹: the median of some repetitions after a first."""
    took: list[float] = []
    for _ in range(REPEATS + 1):
        begin = clock()
        result = step()
        took.append(clock() - begin)
        del result
    return amount / statistics.median(took[1:]) / 1e9


def roofline() -> str:
    """The peaks of this machine with torch's threads: multiplication, copies, and memory that is touched first."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    a, b, product = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE), torch.empty(SIDE, SIDE)
    flops = rate(2 * SIDE**3, lambda: torch.mm(a, b, out=product), clock)
    source, target = torch.ones(FLOATS), torch.ones(FLOATS)
    copied = rate(2 * 4 * FLOATS, lambda: target.copy_(source), clock)
    touched = rate(4 * FLOATS, lambda: torch.empty(FLOATS).fill_(1.0), clock)
    return (
        f"roofline: {flops:.0f} GFLOP/s (product of matrices of side {SIDE}), {copied:.1f} GB/s (copy of "
        f"{4 * FLOATS / 2**20:.0f} MiB, read and written), {touched:.1f} GB/s (memory that is written to first)"
    )
