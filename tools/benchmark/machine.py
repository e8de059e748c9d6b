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


def where(about: str) -> str:
    """The date, what is said about the device, and the versions on one line."""
    return (
        f"{time.strftime('%Y-%m-%d')}, {about}, float32, "
        f"Python {platform.python_version()}, {revision()}, {', '.join(map(version, PACKAGES))}"
    )


# Roofline ---------------------------------------------------------------------------------------------------------

SIDES = {"cpu": 1536, "cuda": 8192}  # of the square matrices that are multiplied
FLOATS = 32 * 2**20  # in each array of a copy: 128 MiB, more than the caches hold
REPEATS = 9


def rate(amount: float, step: Callable[[], object], now: Callable[[], float]) -> float:
    """What is done per second, in units of 10⁹: the median of some repetitions after a first."""
    took: list[float] = []
    for _ in range(REPEATS + 1):
        begin = now()
        result = step()
        took.append(now() - begin)
        del result
    return amount / statistics.median(took[1:]) / 1e9


def roofline(device: str, now: Callable[[], float]) -> str:
    """The peaks of a device by its clock: multiplication, copies, and, on a processor, memory that is touched first."""
    side, like = SIDES[device], torch.empty(0, device=device)
    a, b, product = (like.new_ones(side, side) for _ in range(3))
    flops = rate(2 * side**3, lambda: torch.mm(a, b, out=product), now)
    source, target = like.new_ones(FLOATS), like.new_ones(FLOATS)
    copied = rate(2 * 4 * FLOATS, lambda: target.copy_(source), now)
    peaks = [
        f"{flops:.0f} GFLOP/s (product of matrices of side {side})",
        f"{copied:.1f} GB/s (copy of {4 * FLOATS / 2**20:.0f} MiB, read and written)",
    ]
    if device == "cpu":
        touched = rate(4 * FLOATS, lambda: like.new_empty(FLOATS).fill_(1.0), now)
        peaks.append(f"{touched:.1f} GB/s (memory that is written to first)")
    return f"roofline: {', '.join(peaks)}"
