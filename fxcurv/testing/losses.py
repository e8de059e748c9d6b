"""check_loss: the terms of a loss against autograd of its module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.losses.base import Loss, as_loss
from fxcurv.losses.terms import LossTerms
from fxcurv.quantities.factors import Exact, Factor, Rademacher, Sampled
from fxcurv.testing.comparison import Pair, assert_agree, halves_of, normal, seeded

__all__ = ["check_loss"]


COLUMNS = 4000
"""Number of columns of a random factor drawn by `check_loss`."""


def check_loss(loss: object, output: Tensor, target: Tensor) -> None:
    """Check the terms of a loss against autograd of its module, at one output and target.

    `loss` is given as to `fxcurv.compile`, or as a `fxcurv.losses.base.Loss`. `output` is `[N]` or `[N, …]` in float64,
    with moderate values and few entries, since the dense Hessian is formed; N is at least two. The checks:

    - value and gradient equal the value and gradient of the module;
    - the Hessian is block diagonal over samples, and equals `Σ_v S_v S_vᵀ` of the exact columns;
    - `hessian(v)` is its product with v;
    - divisors of two halves of the batch add, and so do their values and gradients times their divisors;
    - `Σ_v S_v S_vᵀ` of 4000 `Sampled` or `Rademacher` columns is within five standard errors of the Hessian, in the
      Frobenius norm.

    Raises an AssertionError that names the loss, the failed check and the error.

        check_loss(nn.CrossEntropyLoss(), torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1]))
    """
    __tracebackhide__ = True
    kind, output = as_loss(loss), output.detach()
    terms, name = kind.terms(output, target), kind.name
    hessian: Any = torch.func.jacrev(torch.func.grad(lambda f: kind.value(f, target)))  # reverse mode only
    H = hessian(output).reshape(len(output), output[0].numel(), len(output), -1)
    blocks = H.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    assert_agree(name, _value_pairs(kind, terms, output, target))
    assert_agree(name, [Pair("the Hessian between samples", H.sum((0, 2)), blocks.sum(0))])
    assert_agree(name, _curvature_pairs(terms, blocks))
    for factor in (Sampled(COLUMNS), Rademacher(COLUMNS)):
        _check_second_moment(name, terms, factor, blocks)


def _value_pairs(kind: Loss, terms: LossTerms, output: Tensor, target: Tensor) -> Iterator[Pair]:
    """Compare value and gradient, also with the sum over two halves unless a half has no valid target."""
    leaf = output.clone().requires_grad_()
    value = kind.value(leaf, target)
    yield Pair("the value", terms.value, value.detach())
    yield Pair("the gradient", terms.gradient, torch.autograd.grad(value, leaf)[0])
    if not all(map(kind.counts, halves_of(target))):
        return
    first, second = map(kind.terms, halves_of(output), halves_of(target))
    D, a, b = (torch.as_tensor(t.divisor).to(output) for t in (terms, first, second))
    yield Pair("the divisor of two halves", a + b if kind.reduction == "mean" else a * b, D)
    yield Pair("the value of two halves", a * first.value + b * second.value, D * terms.value)
    yield Pair("the gradient of two halves", torch.cat([a * first.gradient, b * second.gradient]), D * terms.gradient)


def _curvature_pairs(terms: LossTerms, blocks: Tensor) -> Iterator[Pair]:
    """The exact columns, at once and in chunks, and products, against the Hessian of each sample."""
    S = _flat(terms.exact(0, terms.exact_columns))
    yield Pair("Σ_v S_v S_vᵀ of the exact columns", torch.einsum("vni,vnj->nij", S, S), blocks)
    chunks = _flat(torch.cat([*terms.columns(Exact(), 1, None, slice(1, None))]))
    yield Pair("the exact columns one by one, of all samples but the first,", chunks, S[:, 1:])
    v = normal(3, terms.gradient)
    expected = torch.einsum("nij,knj->kni", blocks, _flat(v)).view_as(v)
    yield Pair("hessian(v)", terms.hessian(v), expected)


def _flat(S: Tensor) -> Tensor:
    """Columns `[v, n, …]` as `[v, n, entries]`."""
    return S.reshape(*S.shape[:2], -1)


def _check_second_moment(name: str, terms: LossTerms, factor: Factor, blocks: Tensor) -> None:
    """Check the mean of S Sᵀ over columns against its standard error, bounded by their fourth moments."""
    __tracebackhide__ = True
    S = _flat(torch.cat([*terms.columns(factor, COLUMNS, seeded(terms.gradient.device))]))
    error, norm = float((torch.einsum("vni,vnj->nij", S, S) - blocks).norm()), float(blocks.norm())
    standard_error = float(S.square().sum(2).norm())  # of a mean of K columns √K S: (E ‖√K S‖⁴ / K)^½
    if error > 5 * standard_error + 1e-9 * norm:
        raise AssertionError(
            f"{name}: Σ_v S_v S_vᵀ of {factor} is {error:.2g} from the Hessian, of norm {norm:.2g}, "
            f"where the standard error is {standard_error:.2g}"
        )
