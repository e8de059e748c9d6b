"""Costs: what a computation takes, and how long a device of some kind needs for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcurv.linalg import matmul as gemm

__all__ = ["CACHE", "Cost", "Rates", "at_once", "copying", "moment", "of_groups", "product", "rates_of"]


CACHE = 1 << 18
"""Entries that stay in a core's cache while they are computed and read again."""


def at_once(like: Tensor, entries: int, count: int, cached: int) -> int:
    """How many of `count` intermediate results, `entries` each, fit in `cached` entries on a CPU; elsewhere all."""
    return max(1, cached // max(1, entries)) if like.device.type == "cpu" else count


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes read and written, calls of kernels, and bytes held beside inputs and output."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0
    temporary: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """One after the other: temporaries of the first are gone when the second begins."""
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.calls + other.calls,
            max(self.temporary, other.temporary),
        )

    def __mul__(self, times: float) -> Cost:
        """The same computation several times."""
        return Cost(self.flops * times, self.bytes * times, self.calls * times, self.temporary)

    def seconds(self, rates: Rates) -> float:
        """How long it takes: operations, traffic and calls one after the other."""
        return self.flops / rates.flops + self.bytes / rates.bytes + self.calls * rates.call


def product(m: float, n: float, k: float, size: int) -> Cost:
    """`[m,k] @ [k,n]` of entries of `size` bytes."""
    return Cost(2 * m * n * k, size * (m * k + k * n + m * n), 1)


def moment(d: float, m: float, size: int) -> Cost:
    """Σ_m X Xᵀ, `[d,d]`: of half of the entries where gemm.py takes it apart."""
    whole = product(d, d, m, size)
    if not gemm.halves(d, m):
        return whole if size * d * d < gemm.FRESH else whole + copying(d * d, size)
    return Cost(0.5 * whole.flops * (1 + gemm.BLOCK / d), whole.bytes + 2 * size * d * d, 3 * d / gemm.BLOCK)


FURTHER = 0.03
"""What one more group costs a batch of products, in calls."""


def of_groups(cost: Cost, groups: int) -> Cost:
    """The same for all groups in one batch."""
    return Cost(cost.flops * groups, cost.bytes * groups, cost.calls * (1 + FURTHER * (groups - 1)), cost.temporary)


def copying(entries: float, size: int) -> Cost:
    """Reading and writing each entry once."""
    return Cost(0, 2 * size * entries, 1)


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second, and seconds per call: what sound code reaches, not what a data sheet says."""

    flops: float
    bytes: float
    call: float


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a kind of device; only their proportions decide between forms."""
    wide = dtype in (torch.float64, torch.complex128)
    if device.type == "cuda":
        return Rates(1e13 if wide else 3e13, 1.5e12, 6e-6)
    threads = torch.get_num_threads()
    single = 180e9 if gemm.uses_onednn(dtype, device) else 90e9
    return Rates(threads * (single / 2 if wide else single), min(threads, 4) * 12e9, 6e-6)
