"""Names: the registered quantities, and the parsing of names and objects."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fxcurv.core.errors import QuantityError
from fxcurv.quantities.ekfac import EKFAC
from fxcurv.quantities.factors import Empirical, Exact, Sampled
from fxcurv.quantities.ggn import BatchDiagGGN, DiagGGN, GGNBlock, GGNGram, Jacobian, SqrtGGN
from fxcurv.quantities.gradients import BatchDot, BatchGrad, BatchL2, Grad, SumGradSquared, Variance
from fxcurv.quantities.hessian import DiagHessian
from fxcurv.quantities.kfac import KFAC
from fxcurv.quantities.kfac_variants import FOOF, KFRA
from fxcurv.quantities.protocol import Quantity

__all__ = ["NAMES", "named"]


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
    """Quantities by the name of their results: as given, or an object's family, numbered if that name is taken."""
    asked = list(quantities) if isinstance(quantities, Iterable) and not isinstance(quantities, str) else [quantities]
    result: dict[str, Quantity] = {}
    for item in asked:
        name, quantity = (item, _by_name(item)) if isinstance(item, str) else (_family_of(item), item)
        taken = [key for key in result if key == name or key.startswith(f"{name}_")]
        if quantity not in (result[key] for key in taken):
            result[f"{name}_{len(taken)}" if name in result else name] = quantity
    if not result:
        raise QuantityError("no quantity was requested", remedy=f"choose some of {', '.join(NAMES)}", code="FXC409")
    return result


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
    return quantity.family
