"""Conjugate gradients, for sums and submatrices of operators, which have products but no factorisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_gradients"]


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, start: Tensor, steps: int = 1000) -> Tensor:
    """Solve `product(x)` = b, for a symmetric positive semi-definite product, `b[n]` and `start[n]`.

    Stops where ‖b − product(x)‖ is 100 roundings of ‖b‖, or after `steps` products (Hestenes & Stiefel 1952). The error
    decreases monotonically from `start` in the norm of the product.
    """
    x, r = start.clone(), b - product(start)
    p, square = r, r.dot(r)
    least = (100 * torch.finfo(b.dtype).eps) ** 2 * b.dot(b)
    for _ in range(steps):
        if square <= least:
            break
        image = product(p)
        curvature = p.dot(image)
        if curvature <= 0:
            break
        length = square / curvature
        x, r = x + length * p, r - length * image
        square, last = r.dot(r), square
        p = r + square / last * p
    return x
