"""Memory for large results.

The first write to each new page of memory costs a page fault. On Linux, where the system grants huge pages on request
("madvise", the default of most distributions), requesting them makes first writes several times faster.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGE", "multiplied", "new_empty"]


LARGE = 4 << 20
"""Number of bytes from which huge pages, usually of 2 MiB, are requested."""


def new_empty(like: Tensor, *shape: int) -> Tensor:
    """Return `like.new_empty(shape)`, in huge pages if it is large and the system grants them."""
    result = like.new_empty(shape)
    size = result.numel() * result.element_size()
    # Fake tensors, and tensors of a compiler's trace, have no address.
    if size >= LARGE and type(result) is Tensor and result.device.type == "cpu" and not torch.compiler.is_compiling():
        _ask(result.data_ptr(), size)
    return result


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b, of a's shape and type, in huge pages as by `new_empty`."""
    large = a.numel() * a.element_size() >= LARGE and a.is_contiguous()
    if not large or a.requires_grad or b.requires_grad or torch.compiler.is_compiling():
        return a * b
    return torch.mul(a, b, out=new_empty(a, *a.shape))


def _ask(address: int, size: int) -> None:
    """Advise the system to use huge pages; the memory can be used whatever it answers."""
    advise = _advise()
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    if advise is not None:
        advise(start, address + size - start, mmap.MADV_HUGEPAGE)


@lru_cache
def _advise() -> Any:
    """The system's `madvise`, where it supports huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
