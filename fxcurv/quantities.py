"""Quantities: which columns of the loss Hessian's factor are pulled back, and what is summed from them per parameter.

quantity = factor × statistic. A quantity names the statistics it needs for a parameter, given how the parameter is
used, and turns their sums into a result; it knows nothing about layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Protocol, get_args, get_origin, get_type_hints

from torch import Tensor

from fxcurv.blocks import Block, Dense, Diagonal, Kronecker
from fxcurv.contractions import Diagonal as DiagonalOf
from fxcurv.contractions import Gradient, Gram, InputCovariance, OutputCovariance, Statistic, Sum
from fxcurv.errors import QuantityError
from fxcurv.moments import SecondMoment, formed

__all__ = [
    "KFAC",
    "Again",
    "DiagGGN",
    "Empirical",
    "Exact",
    "Factor",
    "Grad",
    "Identity",
    "LossGradient",
    "Quantity",
    "Rademacher",
    "Sampled",
    "Stratified",
    "Sums",
    "Used",
    "WithOptions",
    "most_columns",
    "owners",
]


# Factors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """Columns with Σ_v S_v S_vᵀ = ∇²loss: C-1 per loss term for cross entropy, one per output entry otherwise."""

    def __str__(self) -> str:
        return "exact"


@dataclass(frozen=True)
class Sampled:
    """k columns of gradients at targets that the model draws: unbiased for ∇²loss (the Monte-Carlo Fisher)."""

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
    Σ_c p_c (e_c - p)(e_c - p)ᵀ = diag(p) - ppᵀ, so what is left to chance are classes that matter little. Where a
    sample has several terms (positions), each column has an independent random sign per term: products of two terms
    vanish in expectation, and what the `top` columns hold of them by chance shrinks with no k. With `top` ≥ the number
    of classes these are the columns of `Exact`.
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
    that each sample's loss Hessian has its diagonal exactly, and only products of two entries are left to chance.
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
    """One column, ∂loss/∂output: what backpropagation carries."""

    def __str__(self) -> str:
        return "gradient"


@dataclass(frozen=True)
class Identity:
    """One column per output entry, 1 there and 0 elsewhere: what is pulled back are Jacobians, whatever the loss."""

    def __str__(self) -> str:
        return "identity"


@dataclass(frozen=True)
class Again:
    """The columns of a factor once more, in a second pass: for sums in the eigenbases of sums of the first."""

    factor: Factor

    def __str__(self) -> str:
        return f"{self.factor} again"


def _at_least(least: int, factor: object, **counts: object) -> None:
    """Refuse a factor whose numbers of columns are not whole numbers from `least` on."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise QuantityError(
                f"{factor!r}", remedy=f"{name} is a whole number of columns, at least {least}", code="FXC409"
            )


Factor = Exact | Sampled | Stratified | Rademacher | Empirical | LossGradient | Identity | Again


def most_columns(factor: Factor, outputs: int) -> int:
    """How many columns a factor has at most, for so many output entries per sample."""
    match factor:
        case Exact() | Identity():
            return outputs
        case Again(again):
            return most_columns(again, outputs)
        case Sampled(k) | Rademacher(k):
            return k
        case Stratified(top, k):
            return max(top + k, outputs)
        case _:
            return 1


# What a quantity is told about a parameter ------------------------------------------------------------------------


@dataclass(frozen=True)
class Used:
    """A parameter as its uses see it, over `positions` in all: `W[g,o,i]`, or a vector (a bias, a scale).

    `partner` is the wanted bias that exactly the uses of this matrix add, and for that bias the matrix. With
    `inputs_first` the parameter itself lies as `W[i,o]`; only the methods here say what that means. Unless it `bends`,
    the output is piecewise linear in it.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    outputs: int
    inputs: int
    positions: int
    matrix: bool
    partner: str | None = None
    inputs_first: bool = False
    bends: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def joint_shape(self) -> tuple[int, int]:
        """The shape of this matrix with a bias beside it: `[W | b]`, or W with b below."""
        o, i = self.groups * self.outputs, self.inputs + 1
        return (i, o) if self.inputs_first else (o, i)

    def laid(self, entries: Tensor, *lead: int) -> Tensor:
        """Entries `[*lead, g, o, i]` as the parameter lies: `[*lead, *shape]`."""
        if self.inputs_first:
            entries = entries.reshape(*lead, self.outputs, self.inputs).mT.contiguous()
        return entries.reshape((*lead, *self.shape))

    def flat(self, laid: Tensor) -> Tensor:
        """The entries `[g·o·i]` of what lies as the parameter."""
        return (laid.mT if self.inputs_first else laid).reshape(-1)

    def laid_matrix(self, matrix: Sum) -> Sum:
        """A matrix over the entries `[g·o·i]` as one over those of the parameter, flattened."""
        if not self.inputs_first:
            return matrix
        if isinstance(matrix, SecondMoment):
            return replace(matrix, kept=tuple(self.laid(t, *t.shape[:-1]).flatten(-2) for t in matrix.kept))
        sides = (self.outputs, self.inputs)
        return matrix.view(*sides, *sides).permute(1, 0, 3, 2).reshape(self.numel, self.numel)


Sums = Mapping[str, Sum]


class Quantity(Protocol):
    """A frozen dataclass with a factor, the statistics it sums, and what it makes of them."""

    @property
    def factor(self) -> Factor: ...

    @property
    def family(self) -> str:
        """The name under which a result is found."""
        ...

    def owner(self, used: Used) -> str:
        """The parameter whose entry holds this one's result: itself, or the weight that it is joined to."""
        ...

    def statistics(self, used: Used) -> dict[str, Statistic]:
        """The sums needed for a parameter."""
        ...

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor | Block:
        """The result, from the sums over all samples and columns, whose memory it may take over."""
        ...

    def approximation(self, used: Used) -> str | None:
        """The name of what is reported instead of the quantity's definition, if anything."""
        ...


def owners(quantity: Quantity, used: Mapping[str, Used]) -> dict[str, tuple[str, ...]]:
    """The parameters whose entry holds a result of the quantity -> those whose result it is."""
    owned: dict[str, tuple[str, ...]] = {}
    for parameter in used.values():
        owner = quantity.owner(parameter)
        owned[owner] = (*owned.get(owner, ()), parameter.name)
    return owned


DENSE_LIMIT = 8192
"""Side of the largest dense block that stands in where a parameter has no Kronecker form."""


@dataclass(frozen=True)
class WithOptions:
    """A quantity's options, each of the type that its field declares; a QuantityError for any other value."""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for option in fields(self):
            value, kind = getattr(self, option.name), kinds[option.name]
            if option.name == "factor" and not isinstance(value, Factor):
                raise QuantityError(
                    f"{value!r} is no factor",
                    remedy="give one such as fxcurv.Exact() or fxcurv.Sampled(1)",
                    code="FXC409",
                )
            choices = (False, True) if kind is bool else get_args(kind) if get_origin(kind) is Literal else None
            if choices and not any(type(value) is type(choice) and value == choice for choice in choices):
                raise QuantityError(
                    f"{type(self).__name__}({option.name}={value!r})",
                    remedy=f"choose {' or '.join(map(repr, choices))}",
                    code="FXC409",
                )


@dataclass(frozen=True)
class Grad(WithOptions):
    """∇loss[o,i] = Σ_ns S[n,s,o] x[n,s,i] with S = ∂loss/∂output pulled back; a tensor of the parameter's shape."""

    factor: Factor = field(default=LossGradient(), init=False)
    family: str = field(default="grad", init=False, repr=False)

    def owner(self, used: Used) -> str:
        return used.name

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return {"gradient": Gradient()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        return used.laid(formed(sums["gradient"]))

    def approximation(self, used: Used) -> str | None:
        return None


@dataclass(frozen=True)
class DiagGGN(WithOptions):
    """diag(G)[o,i] = Σ_vn (Σ_s S[v,n,s,o] x[n,s,i])², a tensor like the parameter (Schraudolph 2002; Dangel 2020)."""

    factor: Factor = Exact()
    family: str = field(default="diag_ggn", init=False, repr=False)

    def owner(self, used: Used) -> str:
        return used.name

    def statistics(self, used: Used) -> dict[str, Statistic]:
        return {"diagonal": DiagonalOf()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Tensor:
        return used.laid(formed(sums["diagonal"]))

    def approximation(self, used: Used) -> str | None:
        return None


@dataclass(frozen=True)
class KFAC(WithOptions):
    """G ⊗ A per weight (Martens & Grosse 2015; Grosse & Martens 2016; expand and reduce: Eschenhagen et al. 2023).

    expand: A = 1/(N·S_l) Σ_ns x xᵀ, G = Σ_vns S Sᵀ; reduce: A = 1/N Σ_n x̄ x̄ᵀ with x̄ = mean_s x, G = Σ_vn ŝ ŝᵀ with
    ŝ = Σ_s S. One pair per group of a grouped convolution; A ⊗ G for a weight that lies as `W[i,o]`. A bias has its
    exact dense block, or with `joint` the constant 1 is appended to x and weight and bias share one block over the rows
    `[W | b]`, or W with b below it. A scale has its exact dense block.
    """

    factor: Factor = Sampled(1)
    approx: Literal["expand", "reduce"] = "expand"
    joint: bool = False
    family: str = field(default="kfac", init=False, repr=False)

    def owner(self, used: Used) -> str:
        joined = self.joint and used.partner is not None and not used.matrix
        return str(used.partner) if joined else used.name

    def _joined(self, used: Used) -> bool:
        return self.joint and used.matrix and used.partner is not None

    def _form(self, used: Used) -> Literal["kronecker", "dense", "diagonal"]:
        return "kronecker" if used.matrix else "dense" if used.numel <= DENSE_LIMIT else "diagonal"

    def statistics(self, used: Used) -> dict[str, Statistic]:
        pooled = self.approx == "reduce"
        if self._form(used) == "kronecker":
            return {"A": InputCovariance(pooled, ones=self._joined(used)), "G": OutputCovariance(pooled)}
        return {"matrix": Gram()} if self._form(used) == "dense" else {"diagonal": DiagonalOf()}

    def finish(self, used: Used, sums: Sums, samples: int) -> Block:
        if self._form(used) == "dense":
            return Dense(used.shape, used.laid_matrix(sums["matrix"]))
        if self._form(used) == "diagonal":
            return Diagonal(used.shape, used.laid(formed(sums["diagonal"])))
        positions = used.positions**2 if self.approx == "reduce" else used.positions
        A = sums["A"].div_(samples * positions) if isinstance(sums["A"], Tensor) else sums["A"] / (samples * positions)
        averaged = samples * (1 if self.approx == "reduce" else used.positions)
        return Kronecker(self._shape(used), A, sums["G"], averaged=averaged, inputs_first=used.inputs_first)

    def _shape(self, used: Used) -> tuple[int, ...]:
        """The block's: that of the parameter, or of a weight with its bias."""
        return used.joint_shape if self._joined(used) else used.shape

    def approximation(self, used: Used) -> str | None:
        return "diagonal" if self._form(used) == "diagonal" else None
