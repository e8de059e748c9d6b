"""Sums of squared products, without the products: one fused kernel on GPUs, chunks of matrix products elsewhere."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fxcurv.contractions.definitions import SumOfSquares
from fxcurv.core.optional import imported
from fxcurv.core.rounding import close
from fxcurv.core.torch_compat import unset_fake_temporarily

__all__ = ["available", "sum_of_squared_products", "sum_of_squared_products_reference"]


SMALLEST = 64
"""Number of entries of a result `[o,i]` below which the kernel's tiles are mostly empty."""


def sum_of_squared_products(S: Tensor, x: Tensor) -> Tensor:
    """D[g,o,i] = Σ_vn (Σ_s S[v,n,s,g,o] x[n,s,g,i])², of any strides; float32 for narrower types.

    Where the kernel is `available`, it does not write any entry J[v,n,g,o,i] to memory. It is bitwise reproducible. The
    reference handles float64 and small products.
    """
    if _fits(S, x) and available(S.device):
        return _fused()(S, x)
    return sum_of_squared_products_reference(S, x)


def _fits(S: Tensor, x: Tensor) -> bool:
    """Whether the kernel supports these arguments; Triton's interpreter does not multiply bfloat16."""
    types = (torch.float32, torch.float16, *((torch.bfloat16,) if S.device.type == "cuda" else ()))
    large = S.shape[-1] * x.shape[-1] >= SMALLEST and 0 not in (*S.shape, *x.shape)
    return large and S.dtype == x.dtype and S.dtype in types


def sum_of_squared_products_reference(S: Tensor, x: Tensor) -> Tensor:
    """Reference implementation by the definition, in chunks."""
    dtype = torch.promote_types(torch.promote_types(S.dtype, x.dtype), torch.float32)
    if 0 in (*S.shape, *x.shape):
        return S.new_zeros(*S.shape[3:], x.shape[-1], dtype=dtype)
    return SumOfSquares()([x.to(dtype)], [S.to(dtype)])


def available(device: torch.device) -> bool:
    """Whether the kernel runs on a device: Triton is installed, and a trial gives the right result.

    The trial runs once per device and synchronizes. On a CPU the kernel needs Triton's interpreter, TRITON_INTERPRET=1.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return (on_gpu or interpreted) and importlib.util.find_spec("triton") is not None and _tried(device)


@lru_cache
def _tried(device: torch.device) -> bool:
    """Whether the kernel compiles for a device (for which Triton needs a C compiler) and is correct there."""
    with unset_fake_temporarily(), torch.no_grad():
        x = torch.linspace(-1, 1, 2 * 17 * 9, device=device).view(2, 17, 1, 9)
        S = torch.linspace(1, 2, 3 * 2 * 17 * 9, device=device).view(3, 2, 17, 1, 9)
        try:
            value, expected = _fused()(S, x), sum_of_squared_products_reference(S, x)
        except Exception:  # any error of Triton, its compiler or the driver
            return False
        return close(value, expected, tolerance=1e-2)


@lru_cache
def _fused() -> Callable[[Tensor, Tensor], Tensor]:
    """The kernel, imported on first use: Triton is an optional dependency."""
    return imported("fxcurv.contractions.triton_kernels", "triton").sum_of_squared_products
