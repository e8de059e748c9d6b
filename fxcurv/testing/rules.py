"""check_rule: a derivative rule against autograd of its op."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.contractions.definitions import Gradient
from fxcurv.core.errors import InputError, a_value
from fxcurv.core.shapes import Samples
from fxcurv.ir.backward_ops import InputPositions, OutputPositions, Unbroadcast
from fxcurv.ir.calls import Opaque
from fxcurv.ir.closed_form_vjps import closed_form
from fxcurv.ir.rules import rule_of
from fxcurv.linalg.operator import checked_count
from fxcurv.testing.comparison import Pair, assert_agree, largest_of, normal

__all__ = ["BrokenRule", "check_rule", "pullbacks"]


def check_rule(op: nn.Module, *inputs: Tensor, columns: int = 3, tolerance: float | None = None) -> None:
    """Check the derivative rule of an op of the vocabulary against `torch.autograd` of the op itself.

    `op` is a module whose type has a row in `fxcurv.ir.rules.RULES`. `inputs` are example inputs, in float64 like its
    parameters, with the samples along axis 0. Random columns `S[v, *y.shape]`, the first separately and the others at
    once, are pulled back to every floating-point input; the closed form of an opaque op is checked too. For an affine
    op, the gradients of `weight` and `bias` are computed from the positions of `x` and `S`. Non-differentiable ops are
    not checked. Errors are relative to the largest entry; `tolerance` depends on the dtype, 4e-11 for float64. A
    pullback must have the dtype of its input. A convolution with padding "same" or a padding mode is checked as the
    compiler lowers it: as a convolution of the padded input.

    Raises an AssertionError that names op, input and error, also where the rule itself fails or returns no tensor; an
    InputError for inputs or options without anything to check; a SpecError (FXC301) for an op without a rule.

        check_rule(nn.Conv2d(2, 4, 3).double(), torch.randn(5, 2, 8, 8, dtype=torch.float64))
    """
    __tracebackhide__ = True
    _check_arguments(inputs, columns, tolerance)
    name = str(op)
    op, *inputs = _lowered(op, *inputs)  # pyright: ignore[reportAssignmentType]
    values = inputs[:-1] if getattr(op, "sized", False) else inputs  # the last input of a sized op only gives a size
    wrt = [k for k, x in enumerate(values) if x.is_floating_point()]
    try:
        pairs = pullbacks(op, inputs, wrt, columns, Samples(0))
    except BrokenRule as broken:
        raise AssertionError(f"{name}: {broken.name} {broken.problem}") from broken
    if not pairs and rule_of(op).kind != "non_differentiable":
        raise InputError(
            f"{name} has no floating-point input, output or parameter, so nothing can be checked",
            remedy="give inputs in float64",
            code="FXC110",
        )
    assert_agree(name, pairs, tolerance)


def _check_arguments(inputs: Sequence[object], columns: int, tolerance: float | None) -> None:
    checked_count("columns", columns)
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance={tolerance!r}", remedy="give a finite number, 0 or above", code="FXC426")
    for k, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(f"input {k} is {a_value(x)}", remedy="give tensors", code="FXC110")
        if not x.numel() or (x.is_floating_point() and not bool(x.isfinite().all())):
            what = "contains NaN or infinity" if x.numel() else "has no entries"
            raise InputError(f"input {k} {what}", remedy="give finite values", code="FXC112")


def _lowered(op: nn.Module, *inputs: Tensor) -> tuple[Any, ...]:
    """A convolution as the compiler lowers it, of an input that is padded before, and the inputs of any other op."""
    if not isinstance(op, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return op, *inputs
    plain = isinstance(op.padding, tuple) and op.padding_mode == "zeros"  # pyright: ignore[reportUnnecessaryIsInstance]
    if plain or len(inputs) != 1:
        return op, *inputs
    if isinstance(op.padding, str):
        totals = [d * (k - 1) if op.padding == "same" else 0 for k, d in zip(op.kernel_size, op.dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in op.padding]
    mode = "constant" if op.padding_mode == "zeros" else op.padding_mode
    padded = F.pad(inputs[0], [p for pair in reversed(sides) for p in pair], mode)
    conv: Any = copy.copy(op)
    conv.padding, conv.padding_mode = (0,) * len(sides), "zeros"
    return conv, padded


class BrokenRule(Exception):
    """A rule that fails: the name of a value, and the problem with it."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem


def _computed(name: str, compute: Callable[[], Any]) -> Any:
    """The value of a part of a rule; a BrokenRule if it fails."""
    try:
        return compute()
    except Exception as error:
        raise BrokenRule(name, f"raised {type(error).__name__}: {error}") from error


def _tensor(name: str, compute: Callable[[], Any]) -> Tensor:
    if not isinstance(value := _computed(name, compute), Tensor):
        raise BrokenRule(name, f"is {a_value(value)}, not a tensor")
    return value


@torch.no_grad()
def pullbacks(op: nn.Module, xs: Sequence[Tensor], wrt: list[int], columns: int, place: Samples | None) -> list[Pair]:
    """Pull back random columns to the inputs `wrt`, and to parameters if the samples are at `place`.

    Raises a BrokenRule if a part of the rule fails.
    """
    rule = rule_of(op)
    if rule.kind == "non_differentiable" or not (y := op(*(x.clone() for x in xs))).is_floating_point():
        return []
    held = ("weight", "bias") if rule.usage is not None and place is not None else ()
    slots = [slot for slot in held if isinstance(getattr(op, slot, None), Tensor)]
    S = normal(columns, y)
    saved = _computed("what the rule saves", lambda: rule.save(op, tuple(xs), y))
    found = [(f"input {k}", f"input {k}", _pulled(op, (S, saved, k), xs[k], y)) for k in wrt]
    if isinstance(op, Opaque) and (closed := closed_form(op, S, xs, wrt)) is not None:
        found += [(f"input {k}, in closed form,", f"input {k}", S_k) for k, S_k in zip(wrt, closed, strict=True)]
    for slot in slots:
        assert place is not None
        compute = partial(_parameter_gradient, op, slot, xs[0], S, place)
        found.append((slot, slot, _tensor(f"the pullback to {slot}", compute)))
    expected, floor = _by_autograd(op, xs, S, wrt, slots), 1e-3 * largest_of([S])
    return [Pair(f"the pullback to {name}", value, expected[key], floor) for name, key, value in found]


def _pulled(op: nn.Module, given: tuple[Tensor, Any, int], x: Tensor, y: Tensor) -> Tensor:
    """The columns pulled back to an input, the first separately; one part with another dtype decides that of all."""
    S, saved, k = given
    name, rule = f"the pullback to input {k}", rule_of(op)
    parts = [_tensor(name, partial(rule.pull, op, part, saved, k)) for part in (S[:1], S[1:]) if len(part)]
    whole = _tensor(name, lambda: _unbroadcast(op, x, y)(torch.cat(parts)))
    odd = next((part.dtype for part in parts if part.dtype != x.dtype), whole.dtype)
    return whole.to(odd)


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
