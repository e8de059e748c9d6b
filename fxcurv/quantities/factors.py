"""Factors: the columns of a square root of the loss Hessian to backpropagate."""

from __future__ import annotations

from dataclasses import dataclass

from fxcurv.core.errors import QuantityError

__all__ = [
    "Empirical",
    "Exact",
    "Factor",
    "Identity",
    "LossGradient",
    "Rademacher",
    "Sampled",
    "SecondPass",
    "Stratified",
    "check_factor",
    "most_columns",
]


# Factors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """Columns with Σ_v S_v S_vᵀ = ∇²loss: C-1 per loss term for cross entropy, one per output entry otherwise."""

    def __str__(self) -> str:
        return "exact"


@dataclass(frozen=True)
class Sampled:
    """k columns of gradients at targets drawn from the model: unbiased for ∇²loss (the Monte-Carlo Fisher)."""

    k: int = 1

    def __post_init__(self) -> None:
        _at_least(1, self, k=self.k)

    def __str__(self) -> str:
        return f"sampled({self.k})"


@dataclass(frozen=True)
class Stratified:
    """top + k columns for cross entropy: exact for the likeliest classes, sampled for the rest; unbiased for ∇²loss.

    With ω the weight of a loss term and p = softmax: for each of the `top` likeliest classes c the column
    √(ω·p_c)·(e_c - p), and for the rest, of mass q, k columns √(ω·q/k)·(e_c - p) with c drawn from p among the rest.
    Σ_c p_c (e_c - p)(e_c - p)ᵀ = diag(p) - ppᵀ, so only classes with small weight are random. Where a sample has
    several terms (positions), each column has an independent random sign per term: products of two terms vanish in
    expectation, but their noise in the `top` columns does not decrease with k. With `top` ≥ the number of classes the
    columns are the same as for `Exact`.
    """

    top: int = 1
    k: int = 1

    def __post_init__(self) -> None:
        _at_least(0, self, top=self.top, k=self.k)
        _at_least(1, self, **{"top + k": self.top + self.k})

    def __str__(self) -> str:
        return f"stratified({self.top}+{self.k})"


@dataclass(frozen=True)
class Rademacher:
    """k columns 1/√k Σ_j ε_j R_j, ε_j = ±1 at random for each sample and column R_j of a root R Rᵀ of ∇²loss: unbiased.

    For cross entropy R_c = √(ω·p_c)·(e_c - p), summed in closed form; for losses of single entries R is diagonal, so
    the diagonal of each sample's loss Hessian is exact, and only products of two entries are random.
    """

    k: int = 1

    def __post_init__(self) -> None:
        _at_least(1, self, k=self.k)

    def __str__(self) -> str:
        return f"rademacher({self.k})"


@dataclass(frozen=True)
class Empirical:
    """One column, each term's gradient at its own target times √ω, ω the term's weight: the empirical Fisher."""

    def __str__(self) -> str:
        return "empirical"


@dataclass(frozen=True)
class LossGradient:
    """One column, ∂loss/∂output, as in backpropagation."""

    def __str__(self) -> str:
        return "gradient"


@dataclass(frozen=True)
class Identity:
    """One column per output entry, 1 there and 0 elsewhere: the backpropagated columns are Jacobians, for any loss."""

    def __str__(self) -> str:
        return "identity"


@dataclass(frozen=True)
class SecondPass:
    """The columns of a factor in a second pass, for sums in the eigenbases of sums of the first."""

    factor: Factor

    def __str__(self) -> str:
        return f"{self.factor} again"


def _at_least(least: int, factor: object, **counts: object) -> None:
    """Raise an error unless a factor's numbers of columns are whole numbers, at least `least`."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise QuantityError(
                f"{factor!r}", remedy=f"{name} is a whole number of columns, at least {least}", code="FXC409"
            )


Factor = Exact | Sampled | Stratified | Rademacher | Empirical | LossGradient | Identity | SecondPass


def most_columns(factor: Factor, outputs: int) -> int:
    """Maximum number of columns of a factor, for a number of output entries per sample."""
    match factor:
        case Exact() | Identity():
            return outputs
        case SecondPass(again):
            return most_columns(again, outputs)
        case Sampled(k) | Rademacher(k):
            return k
        case Stratified(top, k):
            return max(top + k, outputs)
        case Empirical() | LossGradient():
            return 1


def check_factor(factor: object, of: str) -> None:
    """Raise a QuantityError (FXC409) for the factor of a quantity that is not one; `of` names the quantity."""
    if not isinstance(factor, Factor) or isinstance(factor, SecondPass):
        given = f"the class {factor.__name__}" if isinstance(factor, type) else repr(factor)
        raise QuantityError(
            f"{given} is not a factor, in {of}",
            remedy="give one such as fxcurv.Exact() or fxcurv.Sampled(1)",
            code="FXC409",
        )
