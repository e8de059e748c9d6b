"""Matrix products by the faster of torch's libraries.

On the CPU torch multiplies matrices with MKL and convolves with oneDNN. On AMD processors with AVX-512, which MKL does
not use, oneDNN multiplies single-precision matrices twice as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcurv.core.torch_compat import linear_onednn
from fxcurv.linalg.allocation import new_empty

__all__ = ["batched_times_transpose", "halves", "times", "times_transpose", "transpose_times", "uses_onednn"]


SMALL = 1e6
"""Number of multiplications below which a call of oneDNN costs more than it saves."""


BLOCK = 128
"""Number of rows per block of a symmetric product that computes only its lower half."""


FRESH = 32 << 20
"""Number of bytes from which an allocator returns freed memory to the system, so that it is new at every call."""


HALVED = 3 << 16
"""Number of entries of a from which copying half of a aᵀ is faster than computing it."""


SHORT = 256
"""Inner size below which computing that half is faster, for any number of rows."""


def times_transpose(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ: `[m,k], [n,k] -> [m,n]`; where a is b, from half of its entries if that is cheaper."""
    if a is b and halves(*a.shape):
        return _symmetric(a)
    return _product(a, b)


def halves(rows: float, inner: float) -> bool:
    """Whether half of a aᵀ is copied from the other half."""
    return rows >= 2 * BLOCK and inner >= SHORT and rows * inner >= HALVED


def transpose_times(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b: `[k,m], [k,n] -> [m,n]`."""
    left = a.mT
    return times_transpose(left, left if a is b else b.mT)


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x W over all leading axes: `[…, o], [o, i] -> […, i]`."""
    if torch.compiler.is_compiling():
        return x @ weight
    return _product(x.reshape(-1, x.shape[-1]), weight.mT).view(*x.shape[:-1], -1)


def batched_times_transpose(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ for every group: `[g,m,k], [g,n,k] -> [g,m,n]`."""
    if a.shape[0] == 1:
        left = a[0]
        return times_transpose(left, left if a is b else b[0]).unsqueeze(0)
    return a @ b.mT


def _product(a: Tensor, b: Tensor) -> Tensor:
    if not uses_onednn(a.dtype, a.device) or a.shape[0] * a.shape[1] * b.shape[0] <= SMALL:
        return a @ b.mT
    if a.shape[0] * b.shape[0] * a.element_size() < FRESH:
        return _multiplied(a, b)
    a, b = _packed(a), _packed(b)
    result = new_empty(a, a.shape[0], b.shape[0])
    for rows, block in zip(result.split(BLOCK), a.split(BLOCK), strict=True):
        rows.copy_(_multiplied(block, b))
    return result


def _multiplied(a: Tensor, b: Tensor) -> Tensor:
    """oneDNN's product, in memory that it allocates."""
    assert _ONEDNN is not None
    return _ONEDNN(_packed(a), _packed(b))


def uses_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether large products of this type use oneDNN on this machine."""
    return dtype == torch.float32 and device.type == "cpu" and _AVAILABLE and bool(torch.backends.mkldnn.enabled)


_ONEDNN = linear_onednn()
_AVAILABLE = _ONEDNN is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _packed(a: Tensor) -> Tensor:
    """The matrix, copied unless its rows or columns are contiguous: oneDNN is slow on other layouts."""
    return a if a.is_contiguous() or a.mT.is_contiguous() else a.contiguous()


def _symmetric(a: Tensor) -> Tensor:
    """a aᵀ, with the blocks above the diagonal copied from the blocks below it."""
    a, rows = a.contiguous(), a.shape[0]
    result = new_empty(a, rows, rows)
    for start in range(0, rows, BLOCK):
        stop = min(rows, start + BLOCK)
        result[start:stop, :stop] = _product(a[start:stop], a[:stop])
        result[:start, start:stop] = result[start:stop, :start].mT
    return result
