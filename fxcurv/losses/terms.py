"""Losses: loss × factor -> the columns S with Σ_v S_v S_vᵀ = ∇²loss with respect to the model's output.

A loss is a weighted sum of terms, ω · ℓ(output entries, target). Cross entropy has one term per position, over the C
entries along axis 1; squared and binary-cross-entropy losses have one term per entry. `ω` contains everything that
scales a term: class or sample weights, ignored positions (0), and the divisor of `mean`. A column of the factor must
not have entries of two terms, unless their signs are independent; so an exact column belongs to one term.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.core.errors import LossError
from fxcurv.quantities.factors import Empirical, Exact, Factor, Identity, LossGradient, Rademacher, Sampled, Stratified

__all__ = ["EVERY", "Generator", "LossTerms", "ScalarTerms", "SoftmaxTerms", "softmax_root", "unit_columns"]


Generator = torch.Generator | None


EVERY = slice(None)
"""All samples."""


@dataclass(frozen=True)
class LossTerms(ABC):
    """A loss at given outputs and targets: its value, its gradient `[N, …]` and the weights ω of its terms.

    `divisor` divides the sum of the terms for `mean`, and is 1 for `sum`. It adds over batches, as does anything linear
    in the terms multiplied by it.
    """

    value: Tensor
    gradient: Tensor
    omega: Tensor
    divisor: Tensor | float

    @property
    @abstractmethod
    def exact_columns(self) -> int:
        """Number of columns per sample of an exact factor."""

    @abstractmethod
    def exact(self, start: int, stop: int, samples: slice = EVERY) -> Tensor:
        """Columns start … stop of the exact factor: `[v, n, …]`."""

    @abstractmethod
    def sampled(self, generator: Generator) -> Tensor:
        """Draw one column, √ω times the gradient of every term at a target drawn from the model: `[N, …]`."""

    @abstractmethod
    def signed(self, generator: Generator) -> Tensor:
        """Draw one column, the sum of a root's columns with independent random signs: `[N, …]`."""

    @abstractmethod
    def hessian(self, v: Tensor) -> Tensor:
        """The loss Hessian at the output times columns `v[k, N, …]`."""

    def empirical(self) -> Tensor:
        """One column, √ω times the gradient of every term at its own target: `[N, …]`."""
        return torch.where(self.omega > 0, self.gradient / self.omega.sqrt(), 0)

    def fitted(self, factor: Factor) -> Factor:
        """The factor itself if the loss supports it, or its equivalent; else a LossError."""
        if isinstance(factor, Stratified):
            raise LossError(
                f"{factor!r} draws classes, but this loss has none",
                remedy="use Exact, Sampled or Rademacher, or cross entropy",
                code="FXC412",
            )
        return factor

    def count(self, factor: Factor) -> int:
        """Number of columns per sample of the factor."""
        match self.fitted(factor):
            case Exact():
                return self.exact_columns
            case Sampled(k) | Rademacher(k):
                return k
            case Stratified(top, k):
                return top + k
            case Identity():
                return self.gradient[0].numel()
            case Empirical() | LossGradient():
                return 1
            case _:
                raise _unknown(factor)

    def columns(self, factor: Factor, chunk: int, generator: Generator, samples: slice = EVERY) -> Iterator[Tensor]:
        """The factor's columns `[v, n, …]` at some samples, in chunks of at most `chunk`.

        Random columns are drawn for all samples, one by one, so the result does not depend on the chunk or `samples`.
        """
        factor, count = self.fitted(factor), self.count(factor)
        each = self.each(factor, generator)
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            if isinstance(factor, Exact):
                yield self.exact(start, stop, samples)
            elif isinstance(factor, Identity):
                yield unit_columns(self.gradient[samples], start, stop)
            else:
                S = self.gradient.new_empty(stop - start, *self.gradient[samples].shape)
                for column in S:
                    column.copy_(next(each)[samples])
                yield S

    def skip(self, factor: Factor, generator: Generator) -> None:
        """Advance the generator as `columns` would, without using the columns of the factor."""
        if not isinstance(fitted := self.fitted(factor), Exact | Identity):
            for _ in self.each(fitted, generator):
                pass

    def each(self, factor: Factor, generator: Generator) -> Iterator[Tensor]:
        """The columns of an inexact factor, one by one: `[N, …]`."""
        match factor:
            case Sampled(k):
                yield from (self.sampled(generator) / k**0.5 for _ in range(k))
            case Rademacher(k):
                yield from (self.signed(generator) / k**0.5 for _ in range(k))
            case LossGradient():
                yield self.gradient
            case Empirical():
                yield self.empirical()
            case _:
                raise _unknown(factor)


def _unknown(factor: object) -> LossError:
    return LossError(f"{factor!r} is not a factor", remedy="give one such as fxcurv.Exact()", code="FXC412")


def unit_columns(output: Tensor, start: int, stop: int) -> Tensor:
    """Columns start … stop of the identity, for outputs of this shape: `[v, N, …]`."""
    S = output.new_zeros(stop - start, len(output), output[0].numel())
    v = torch.arange(stop - start, device=output.device)
    S[v, :, v + start] = 1
    return S.view(stop - start, *output.shape)


@dataclass(frozen=True)
class SoftmaxTerms(LossTerms):
    """Terms -Σ_c q_c log p_c with p = softmax along axis 1 and Σ_c q_c = 1; Hessian ω (diag(p) - p pᵀ)."""

    p: Tensor

    def hessian(self, v: Tensor) -> Tensor:
        pv = self.p * v
        return self.omega * (pv - self.p * pv.sum(2, keepdim=True))

    @property
    def exact_columns(self) -> int:
        return (self.p.shape[1] - 1) * self.p[0, 0].numel()

    def exact(self, start: int, stop: int, samples: slice = EVERY) -> Tensor:
        shape = self.p[samples].shape
        N, C = shape[:2]
        p, omega = self.p[samples].reshape(N, C, -1), self.omega[samples].reshape(N, 1, -1)
        positions = p.shape[2]
        S = p.new_zeros(stop - start, N, C, positions)
        for position in range(start // (C - 1), (stop - 1) // (C - 1) + 1):
            a, b = max(start, position * (C - 1)), min(stop, (position + 1) * (C - 1))
            root = softmax_root(p[:, :, position], a - position * (C - 1), b - position * (C - 1))
            S[a - start : b - start, :, :, position] = omega[:, :, position].sqrt() * root
        return S.reshape(stop - start, *shape)

    def sampled(self, generator: Generator) -> Tensor:
        return self.omega.sqrt() * self._gradient_at(_drawn(self.p, generator))

    def signed(self, generator: Generator) -> Tensor:
        root = self.p.sqrt() * _signs(self.p, generator)
        return self.omega.sqrt() * (root - self.p * root.sum(1, keepdim=True))

    def fitted(self, factor: Factor) -> Factor:
        C = self.p.shape[1]
        if not isinstance(factor, Stratified) or (factor.k and factor.top < C):
            return factor
        if factor.top < C:
            raise LossError(
                f"{factor!r} leaves out all but {factor.top} of {C} classes",
                remedy=f"draw among the others, k ≥ 1, or take all, top ≥ {C}",
                code="FXC412",
            )
        return Exact()

    def each(self, factor: Factor, generator: Generator) -> Iterator[Tensor]:
        return (
            self._stratified(factor, generator) if isinstance(factor, Stratified) else super().each(factor, generator)
        )

    def _stratified(self, factor: Stratified, generator: Generator) -> Iterator[Tensor]:
        """The columns of `Stratified`; signs are drawn only where a sample has several terms."""
        top = self.p.topk(factor.top, 1).indices
        rest = self.p.scatter(1, top, 0)
        mass = rest.sum(1, keepdim=True)
        for j in range(factor.top + factor.k):
            exact = j < factor.top
            c = top[:, j : j + 1] if exact else _drawn(rest, generator)
            weight = self.omega * (self.p.gather(1, c) if exact else mass / factor.k)
            signs = _signs(mass, generator) if mass[0].numel() > 1 else 1
            yield signs * weight.sqrt() * self._gradient_at(c)

    def _gradient_at(self, c: Tensor) -> Tensor:
        """p - e_c for classes `c[N, 1, …]`: the gradient of every term at target c, `[N, C, …]`."""
        return self.p.scatter_add(1, c, -torch.ones_like(self.p[:, :1]))


def _drawn(p: Tensor, generator: Generator) -> Tensor:
    """Draw a class for each term with probabilities proportional to `p[N, C, …]`, `[N, 1, …]`.

    Uses a race of exponential times with rates p, as `torch.multinomial` does after reading p back.
    """
    rates = p.movedim(1, -1).contiguous()
    times = torch.empty_like(rates).exponential_(generator=generator)
    return (rates / times).argmax(-1, keepdim=True).movedim(-1, 1)


def _signs(like: Tensor, generator: Generator) -> Tensor:
    """Random ±1, of the shape and type of `like`."""
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like).mul_(2).sub_(1)


def softmax_root(p: Tensor, start: int, stop: int) -> Tensor:
    """Columns start … stop of the Cholesky factor of diag(p) - p pᵀ, `p[n,c] -> [v,n,c]` (Tanabe & Sagae 1992).

    With the tail sums t_j = Σ_{k≥j} p_k, L_jj = √(p_j t_{j+1} / t_j) and L_ij = -p_i √(p_j / (t_j t_{j+1})) below it;
    the last of the C columns vanishes. The tails are sums of positive numbers, so nothing cancels.
    """
    tails = F.pad(p.flip(-1).cumsum(-1).flip(-1), (0, 1))
    j = torch.arange(start, stop, device=p.device)
    pj, here, below = p[:, j], tails[:, j], tails[:, j + 1]
    on = torch.where(here > 0, (pj * below / here).sqrt(), 0)
    off = torch.where(below > 0, (pj / here).sqrt() / below.sqrt(), 0)
    i = torch.arange(p.shape[1], device=p.device)
    L = torch.where(i > j[:, None], -p[:, None, :] * off[:, :, None], 0) + (i == j[:, None]) * on[:, :, None]
    return L.transpose(0, 1)


@dataclass(frozen=True)
class ScalarTerms(LossTerms):
    """One term per output entry, of second derivative ω · `curvature`, the variance of `noise(generator)` times ω."""

    curvature: Tensor
    noise: Callable[[Generator], Tensor]

    def hessian(self, v: Tensor) -> Tensor:
        return self.omega * self.curvature * v

    @property
    def exact_columns(self) -> int:
        return self.gradient[0].numel()

    @property
    def _root(self) -> Tensor:
        """The diagonal of the loss Hessian's root: `[N, …]`."""
        return (self.omega * self.curvature).sqrt().expand_as(self.gradient)

    def exact(self, start: int, stop: int, samples: slice = EVERY) -> Tensor:
        shape = self.gradient[samples].shape
        root = self._root[samples].reshape(shape[0], -1)
        S = root.new_zeros(stop - start, *root.shape)
        v = torch.arange(stop - start, device=root.device)
        S[v, :, v + start] = root[:, start:stop].T
        return S.view(stop - start, *shape)

    def sampled(self, generator: Generator) -> Tensor:
        return self.omega.sqrt() * self.noise(generator)

    def signed(self, generator: Generator) -> Tensor:
        return self._root * _signs(self.gradient, generator)
