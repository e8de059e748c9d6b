"""check_rule: a derivative rule against autograd of its op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxcurv.contractions.definitions import Gradient
from fxcurv.core.shapes import Samples
from fxcurv.ir.backward_ops import InputPositions, OutputPositions, Unbroadcast
from fxcurv.ir.calls import Opaque
from fxcurv.ir.closed_form_vjps import closed_form
from fxcurv.ir.rules import rule_of
from fxcurv.testing.comparison import Pair, assert_agree, largest_of, normal

__all__ = ["check_rule", "pullbacks"]


def check_rule(op: nn.Module, *inputs: Tensor, columns: int = 3, tolerance: float | None = None) -> None:
    """Check the derivative rule of an op of the vocabulary against `torch.autograd` of the op itself.

    `op` is a module whose type has a row in `fxcurv.ir.rules.RULES`. `inputs` are example inputs, in float64 like its
    parameters, with the samples along axis 0. Random columns `S[v, *y.shape]`, the first separately and the others at
    once, are pulled back to every floating-point input; the closed form of an opaque op is checked too. For an affine
    op, the gradients of `weight` and `bias` are computed from the positions of `x` and `S`. Non-differentiable ops are
    not checked. Errors are relative to the largest entry; `tolerance` depends on the dtype, 4e-11 for float64.

    Raises an AssertionError that names op, input and error, and a SpecError (FXC301) for an op without a rule.

        check_rule(nn.Conv2d(2, 4, 3).double(), torch.randn(5, 2, 8, 8, dtype=torch.float64))
    """
    __tracebackhide__ = True
    values = inputs[:-1] if getattr(op, "sized", False) else inputs  # the last input of a sized op only gives a size
    wrt = [k for k, x in enumerate(values) if x.is_floating_point()]
    assert_agree(str(op), pullbacks(op, inputs, wrt, columns, Samples(0)), tolerance)


@torch.no_grad()
def pullbacks(op: nn.Module, xs: Sequence[Tensor], wrt: list[int], columns: int, place: Samples | None) -> list[Pair]:
    """Pull back random columns to the inputs `wrt`, and to parameters if the samples are at `place`."""
    rule = rule_of(op)
    if rule.kind == "non_differentiable" or not (y := op(*(x.clone() for x in xs))).is_floating_point():
        return []
    held = ("weight", "bias") if rule.usage is not None and place is not None else ()
    slots = [slot for slot in held if isinstance(getattr(op, slot, None), Tensor)]
    S, saved = normal(columns, y), rule.save(op, tuple(xs), y)
    pulled = [torch.cat([rule.pull(op, part, saved, k) for part in (S[:1], S[1:]) if len(part)]) for k in wrt]
    found = [(f"input {k}", f"input {k}", _unbroadcast(op, xs[k], y)(S_k)) for k, S_k in zip(wrt, pulled, strict=True)]
    if isinstance(op, Opaque) and (closed := closed_form(op, S, xs, wrt)) is not None:
        found += [(f"input {k}, in closed form,", f"input {k}", S_k) for k, S_k in zip(wrt, closed, strict=True)]
    if place is not None:
        found += [(slot, slot, _parameter_gradient(op, slot, xs[0], S, place)) for slot in slots]
    expected, floor = _by_autograd(op, xs, S, wrt, slots), 1e-3 * largest_of([S])
    return [Pair(f"the pullback to {name}", value, expected[key], floor) for name, key, value in found]


def _unbroadcast(op: nn.Module, x: Tensor, y: Tensor) -> Unbroadcast:
    """The sum over the axes along which the op broadcast x, as emitted by the compiler."""
    lead = y.ndim - x.ndim
    if not getattr(op, "broadcasts", False):
        return Unbroadcast(0, ())
    return Unbroadcast(lead, [a for a, size in enumerate(x.shape) if size == 1 and y.shape[a + lead] != 1])


def _parameter_gradient(op: nn.Module, slot: str, x: Tensor, S: Tensor, place: Samples) -> Tensor:
    """The gradient of `weight` or `bias` for every column, `[v, *θ]`, from the positions of x and S."""
    usage, shape = rule_of(op).usage, getattr(op, slot).shape
    assert usage is not None
    at_x, at_S = InputPositions(op, place)(x) if slot == "weight" else None, OutputPositions(op, place)(S)
    each = [Gradient()([at_x], [column.unsqueeze(0)]) for column in at_S]  # [g,o,i]
    turned = slot == "weight" and usage.weight == "in_out"
    return torch.stack([(g[0].mT if turned else g).reshape(shape) for g in each])


def _by_autograd(op: nn.Module, xs: Sequence[Tensor], S: Tensor, wrt: list[int], slots: list[str]) -> dict[str, Tensor]:
    """The pullback of every column to the inputs `wrt` and to the parameters in `slots`, by autograd."""
    leaves = [x.detach().clone().requires_grad_(k in wrt) for k, x in enumerate(xs)]
    held = {slot: getattr(op, slot).detach().clone().requires_grad_() for slot in slots}
    wanted = {f"input {k}": leaves[k] for k in wrt} | held
    with torch.enable_grad():
        y = torch.func.functional_call(op, held, tuple(x.clone() for x in leaves))
    if not wanted or not y.requires_grad:
        return {name: t.new_zeros(len(S), *t.shape) for name, t in wanted.items()}
    given = {"retain_graph": True, "materialize_grads": True}
    columns = [torch.autograd.grad(y, list(wanted.values()), column, **given) for column in S]
    return {name: torch.stack(each) for name, each in zip(wanted, zip(*columns, strict=True), strict=True)}
