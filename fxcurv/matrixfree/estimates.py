"""Estimates of a square operator from products with random vectors: trace, diagonal, density of eigenvalues.

Probes z have independent entries ±1, so that E[z zᵀ] = I. They are drawn from the caller's `generator` or a fresh one,
never from the global one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxcurv.core.errors import InputError
from fxcurv.core.generators import fresh_generator
from fxcurv.linalg.operator import LinearOperator, checked_count

__all__ = ["Spectrum", "estimate_diagonal", "estimate_trace", "spectral_density"]


def estimate_trace(
    operator: LinearOperator,
    products: int = 30,
    generator: torch.Generator | None = None,
    method: Literal["hutch++", "hutchinson"] = "hutch++",
) -> Tensor:
    """An unbiased estimate of tr B from a number of products, a scalar tensor.

    Hutchinson's estimate (1990) is the mean of zᵀ B z. Hutch++ (Meyer et al. 2021) computes the trace on the range of a
    third of the products exactly and estimates the rest: its error decreases as 1/products, and it is exact for an
    operator whose rank is at most a third of the products.
    """
    operator.require_square()
    checked_count("products", products)
    if method == "hutchinson":
        z = _probes(operator, products, generator)
        return (z * operator.mm(z)).sum() / products
    if method != "hutch++":
        raise InputError(f"method={method!r}", remedy="choose 'hutch++' or 'hutchinson'", code="FXC426")
    if products < 3:
        raise InputError(f"products={products}", remedy="Hutch++ needs at least 3", code="FXC426")
    third = min(products // 3, operator.domain.numel)
    probes = _probes(operator, third + max(1, products - 2 * third), generator)
    Q = torch.linalg.qr(operator.mm(probes[:, :third])).Q
    rest = probes[:, third:]
    rest = rest - Q @ (Q.mT @ rest)
    return (Q * operator.mm(Q)).sum() + (rest * operator.mm(rest)).sum() / rest.shape[1]


def estimate_diagonal(
    operator: LinearOperator, products: int = 30, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """An unbiased estimate of diag B from a number of products, by name: the mean of z · B z (Bekas et al. 2007).

    The variance of an entry is the sum of the squares of the other entries in its row, over the number of products.
    """
    operator.require_square()
    z = _probes(operator, checked_count("products", products), generator)
    return operator.domain.split((z * operator.mm(z)).mean(1))


@dataclass(frozen=True)
class Spectrum:
    """Nodes θ `[probes, steps]` with weights `[probes, steps]`, of sum 1 in each row, for `numel` eigenvalues."""

    nodes: Tensor
    weights: Tensor
    numel: int

    def density(self, points: Tensor, width: float) -> Tensor:
        """The density of eigenvalues at `points[k]`, of integral 1, each node widened to a normal of this width."""
        if not width > 0:
            raise InputError(f"width={width!r}", remedy="give a width above 0, in the units of B", code="FXC426")
        normal = torch.distributions.Normal(self.nodes.flatten(), width)
        return (normal.log_prob(points.unsqueeze(-1)).exp() * self.weights.flatten()).sum(-1) / len(self.nodes)

    def trace_of(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """An estimate of tr f(B), for example of tr log(B + δI), a scalar tensor."""
        return self.numel * (self.weights * f(self.nodes)).sum(1).mean()


def spectral_density(
    operator: LinearOperator, steps: int = 30, probes: int = 5, generator: torch.Generator | None = None
) -> Spectrum:
    """The distribution of a symmetric operator's eigenvalues by stochastic Lanczos quadrature (Lin, Saad, Yang 2016).

    From each probe, `steps` products build an orthogonal basis in which B is tridiagonal. Its eigenvalues are the
    nodes, the squared first entries of its eigenvectors the weights. Polynomials up to degree 2·steps - 1 are
    integrated exactly for the probe. A basis ends early, with zero weights, where it spans the whole Krylov space.
    """
    operator.require_square()
    steps = min(checked_count("steps", steps), operator.domain.numel)
    starts = _probes(operator, checked_count("probes", probes), generator)
    nodes, weights = zip(*(_quadrature(operator, z / z.norm(), steps) for z in starts.T), strict=True)
    return Spectrum(torch.stack(nodes), torch.stack(weights), operator.domain.numel)


def _quadrature(operator: LinearOperator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights `[steps]` from one start of norm 1."""
    basis, T = start.new_zeros(steps, len(start)), start.new_zeros(steps, steps)
    basis[0], done = start, 1
    scale = start.new_zeros(())
    for k in range(steps):
        w = operator.mm(basis[k].unsqueeze(1))[:, 0]
        T[k, k] = basis[k] @ w
        scale = torch.maximum(scale, w.norm())
        for _ in "12":  # two passes are enough
            w = w - basis[: k + 1].T @ (basis[: k + 1] @ w)
        norm = w.norm()
        if k + 1 == steps or bool(norm <= 100 * torch.finfo(w.dtype).eps * scale):
            break
        basis[k + 1], done = w / norm, k + 2
        T[k, k + 1] = T[k + 1, k] = norm
    values, vectors = torch.linalg.eigh(T[:done, :done])
    padded = values[-1:].expand(steps - done)
    return torch.cat([values, padded]), torch.cat([vectors[0].square(), torch.zeros_like(padded)])


def _probes(operator: LinearOperator, count: int, generator: torch.Generator | None) -> Tensor:
    """Random ±1: `[n, count]`."""
    generator = generator or fresh_generator(operator.device)
    shape = operator.domain.numel, count
    signs = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    return (signs * 2 - 1).to(device=operator.device, dtype=operator.dtype)
