"""Names: the registered quantities, and the parsing of names and objects."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from itertools import count

from fxcurv.core.errors import QuantityError
from fxcurv.core.identity import options_of
from fxcurv.quantities.ekfac import EKFAC
from fxcurv.quantities.factors import Empirical, Exact, Sampled, check_factor
from fxcurv.quantities.ggn import BatchDiagGGN, DiagGGN, GGNBlock, GGNGram, Jacobian, SqrtGGN
from fxcurv.quantities.gradients import BatchDot, BatchGrad, BatchL2, Grad, SumGradSquared, Variance
from fxcurv.quantities.hessian import DiagHessian
from fxcurv.quantities.kfac import KFAC
from fxcurv.quantities.kfac_variants import FOOF, KFRA
from fxcurv.quantities.protocol import Quantity

__all__ = ["NAMES", "named", "names_of"]


NAMES: dict[str, Quantity] = {
    "grad": Grad(),
    "kfac": KFAC(),
    "kflr": KFAC(Exact()),
    "kfac_empirical": KFAC(Empirical()),
    "diag_ggn": DiagGGN(),
    "diag_ggn_mc": DiagGGN(Sampled(1)),
    "ekfac": EKFAC(),
    "ekfac_exact": EKFAC(Exact()),
    "ekfac_empirical": EKFAC(Empirical()),
    "foof": FOOF(),
    "kfra": KFRA(),
    "batch_grad": BatchGrad(),
    "batch_l2": BatchL2(),
    "batch_dot": BatchDot(),
    "sum_grad_squared": SumGradSquared(),
    "variance": Variance(),
    "batch_diag_ggn": BatchDiagGGN(),
    "batch_diag_ggn_mc": BatchDiagGGN(Sampled(1)),
    "sqrt_ggn": SqrtGGN(),
    "sqrt_ggn_mc": SqrtGGN(Sampled(1)),
    "ggn_block": GGNBlock(),
    "ggn_gram": GGNGram(),
    "jacobian": Jacobian(),
    "diag_hessian": DiagHessian(),
    "batch_diag_hessian": DiagHessian(per_sample=True),
    "fisher_diag": DiagGGN(Exact()),
    "fisher_diag_mc": DiagGGN(Sampled(1)),
    "empirical_fisher_diag": DiagGGN(Empirical()),
    "fisher_block": GGNBlock(Exact()),
    "empirical_fisher_block": GGNBlock(Empirical()),
}
"""All quantities available by name; for the supported losses the Fisher information is the GGN."""


def named(quantities: str | Quantity | Iterable[str | Quantity]) -> dict[str, Quantity]:
    """Quantities by the names of their results, in the order of `names_of`."""
    asked = list(quantities) if isinstance(quantities, Iterable) and not isinstance(quantities, str) else [quantities]
    if not asked:
        raise QuantityError("no quantity was requested", remedy=f"choose some of {', '.join(NAMES)}", code="FXC409")
    return {name: _quantity(item) for name, item in zip(names_of(asked), asked, strict=True)}


def names_of(asked: Sequence[str | Quantity]) -> list[str]:
    """The name of the results of each item.

    A string is its own name. An object has the name of its family; where another quantity has that name, it is
    `family_1`, or the next number that is free. Equal objects share a name, and an object equal to the registered
    quantity of its family shares the name of that string.
    """
    items = [(item, _family_of(_quantity(item)), options_of(_quantity(item))) for item in asked]
    taken = {item: key for item, _, key in items if isinstance(item, str)}
    for item, family, key in items:
        if not isinstance(item, str):
            taken.setdefault(family, key)  # before any is numbered: a family may be called `foo_1`
    known = {(name, key): name for name, key in taken.items()}
    for item, family, key in items:
        if not isinstance(item, str) and (family, key) not in known:
            name = next(name for n in count(1) if (name := f"{family}_{n}") not in taken)
            known[family, key], taken[name] = name, key
    return [item if isinstance(item, str) else known[family, key] for item, family, key in items]


def _quantity(item: str | Quantity) -> Quantity:
    return _by_name(item) if isinstance(item, str) else item


def _by_name(name: str) -> Quantity:
    if name in NAMES:
        return NAMES[name]
    close = difflib.get_close_matches(name, NAMES)
    close.sort(key=lambda known: sorted(known) != sorted(name))  # anagrams first
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise QuantityError(f"no quantity is named {name!r}", remedy=f"{hint}there are {', '.join(NAMES)}", code="FXC409")


def _family_of(quantity: Quantity) -> str:
    if isinstance(quantity, type) or not hasattr(quantity, "statistics"):
        raise QuantityError(
            f"{quantity!r} is not a quantity",
            remedy=f"give a name ({', '.join(NAMES)}) or an object such as fxcurv.KFAC()",
            code="FXC409",
        )
    check_factor(getattr(quantity, "factor", None), type(quantity).__name__)
    if not isinstance(family := getattr(quantity, "family", None), str) or not family:
        raise QuantityError(
            f"{type(quantity).__name__} has family={family!r}", remedy="give a name of its results", code="FXC409"
        )
    return family
