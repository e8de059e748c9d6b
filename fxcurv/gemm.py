"""Matrix products by the faster of torch's libraries.

On the CPU torch multiplies matrices by MKL and convolves by oneDNN. Where they differ, as on AMD's processors with
AVX-512, which MKL does not use, oneDNN multiplies single-precision matrices twice as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["times_transpose", "transpose_times", "uses_onednn"]

SMALL = 1e6
"""Multiplications below which a call of oneDNN costs more than it saves."""

BLOCK = 768
"""Rows of the blocks by which a large symmetric product is made of its lower half."""

SHORT = 128
"""Inner size below which writing a symmetric product costs more than computing all of it."""


def times_transpose(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ: `[m,k], [n,k] -> [m,n]`; where a is b, of half of its entries if that is cheaper."""
    if a is b and a.shape[0] >= 2 * BLOCK and a.shape[1] >= SHORT:
        return _symmetric(a)
    return _product(a, b)


def transpose_times(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b: `[k,m], [k,n] -> [m,n]`."""
    left = a.mT
    return times_transpose(left, left if a is b else b.mT)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if uses_onednn(a.dtype, a.device) and a.shape[0] * a.shape[1] * b.shape[0] > SMALL:
        return torch.ops.mkldnn._linear_pointwise(_packed(a), _packed(b), None, "none", [], "")
    return a @ b.mT


def uses_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether large products of this type are oneDNN's here."""
    return dtype == torch.float32 and device.type == "cpu" and _AVAILABLE and bool(torch.backends.mkldnn.enabled)


_AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def _packed(a: Tensor) -> Tensor:
    """The matrix, copied unless its rows or its columns lie side by side: oneDNN is slow on anything else."""
    return a if a.is_contiguous() or a.mT.is_contiguous() else a.contiguous()


def _symmetric(a: Tensor) -> Tensor:
    """a aᵀ, the blocks above the diagonal copied from those below it."""
    rows = a.shape[0]
    result = a.new_empty(rows, rows)
    for start in range(0, rows, BLOCK):
        stop = min(rows, start + BLOCK)
        result[start:stop, :stop] = _product(a[start:stop], a[:stop])
        result[:start, start:stop] = result[start:stop, :start].mT
    return result
