"""Cost of a computation, and its time on a kind of device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcurv.linalg import matmul as gemm

__all__ = ["CACHE", "Cost", "Rates", "at_once", "copying", "moment", "of_groups", "product", "rates_of"]


CACHE = 1 << 18
"""Number of entries that stay in a core's cache while they are computed and read again."""


def at_once(like: Tensor, entries: int, count: int, cached: int) -> int:
    """Number of `count` intermediate results, `entries` each, that fit in `cached` entries on a CPU; elsewhere all."""
    return max(1, cached // max(1, entries)) if like.device.type == "cpu" else count


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes read and written, kernel calls, and bytes of temporaries."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0
    temporary: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Cost of running both in sequence: temporaries of the first are freed before the second begins."""
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.calls + other.calls,
            max(self.temporary, other.temporary),
        )

    def __mul__(self, times: float) -> Cost:
        """Cost of repeating the computation."""
        return Cost(self.flops * times, self.bytes * times, self.calls * times, self.temporary)

    def seconds(self, rates: Rates) -> float:
        """Estimated time: the sum of the times of operations, traffic and calls."""
        return self.flops / rates.flops + self.bytes / rates.bytes + self.calls * rates.call


def product(m: float, n: float, k: float, size: int) -> Cost:
    """Cost of `[m,k] @ [k,n]` for entries of `size` bytes."""
    return Cost(2 * m * n * k, size * (m * k + k * n + m * n), 1)


def moment(d: float, m: float, size: int) -> Cost:
    """Cost of Σ_m X Xᵀ, `[d,d]`: half of the entries where matmul.py computes only these."""
    whole = product(d, d, m, size)
    if not gemm.halves(d, m):
        return whole if size * d * d < gemm.FRESH else whole + copying(d * d, size)
    return Cost(0.5 * whole.flops * (1 + gemm.BLOCK / d), whole.bytes + 2 * size * d * d, 3 * d / gemm.BLOCK)


FURTHER = 0.03
"""Cost of one more group in a batch of products, in calls."""


def of_groups(cost: Cost, groups: int) -> Cost:
    """Cost of all groups in one batch."""
    return Cost(cost.flops * groups, cost.bytes * groups, cost.calls * (1 + FURTHER * (groups - 1)), cost.temporary)


def copying(entries: float, size: int) -> Cost:
    """Cost of reading and writing each entry once."""
    return Cost(0, 2 * size * entries, 1)


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second, and seconds per call: values that sound code reaches, not from a data sheet."""

    flops: float
    bytes: float
    call: float


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a kind of device; only their proportions decide between algorithms."""
    wide = dtype in (torch.float64, torch.complex128)
    if device.type == "cuda":
        return Rates(1e13 if wide else 3e13, 1.5e12, 6e-6)
    threads = torch.get_num_threads()
    single = 180e9 if gemm.uses_onednn(dtype, device) else 90e9
    return Rates(threads * (single / 2 if wide else single), min(threads, 4) * 12e9, 6e-6)
