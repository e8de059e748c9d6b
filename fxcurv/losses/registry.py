"""The losses that are supported, and their terms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.core.errors import FxcurvError, InputError, LossError, a_value
from fxcurv.losses.terms import Generator, LossTerms, ScalarTerms, SoftmaxTerms
from fxcurv.quantities.factors import Again, Exact, Factor, Stratified, most_columns

__all__ = ["BY_NAME", "as_loss", "columns_of", "loss_terms", "loss_value"]


def columns_of(loss: nn.Module, factor: Factor, shape: Sequence[int]) -> int:
    """How many columns per sample a factor has for outputs of `shape`, as far as can be said without targets."""
    outputs = math.prod(shape[1:])
    match factor:
        case Exact():
            return outputs - outputs // shape[1] if isinstance(loss, nn.CrossEntropyLoss) else outputs
        case Stratified(top, k):
            return top + k if top < shape[1] else columns_of(loss, Exact(), shape)
        case Again(again):
            return columns_of(loss, again, shape)
        case _:
            return most_columns(factor, outputs)


# Which loss -------------------------------------------------------------------------------------------------------

BY_NAME: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
}


_FUNCTIONS: dict[object, str] = {
    F.cross_entropy: "cross_entropy",
    F.mse_loss: "mse",
    F.binary_cross_entropy_with_logits: "bce_with_logits",
}


_REMEDY = (
    "use nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss (or 'cross_entropy', 'mse', 'bce_with_logits')"
    " with reduction 'mean' or 'sum'"
)


def as_loss(loss: object) -> nn.Module:
    """A supported loss given as a module, by name, or as the function of torch.nn.functional."""
    name = loss if isinstance(loss, str) else _FUNCTIONS.get(loss) if callable(loss) else None
    if name is not None:
        if name not in BY_NAME:
            raise LossError(f"no loss is called {name!r}", remedy=_REMEDY, code="FXC406")
        return BY_NAME[name]()
    known = next((kind for kind in _TERMS if isinstance(loss, kind)), None)
    if not isinstance(loss, nn.Module):
        raise LossError(f"the loss is {a_value(loss)}, not a module", remedy=_REMEDY, code="FXC406")
    if known is None or type(loss).forward is not known.forward:
        raise LossError(f"the loss {type(loss).__name__} is not supported", remedy=_REMEDY, code="FXC406")
    if loss.reduction not in ("mean", "sum"):
        raise LossError(f"the loss has reduction {loss.reduction!r}", remedy=_REMEDY, code="FXC406")
    smoothing = getattr(loss, "label_smoothing", 0.0)
    if not 0 <= smoothing <= 1:
        raise LossError(f"label_smoothing={smoothing}", remedy="smooth by 0 to 1", code="FXC406")
    return loss


def loss_terms(loss: nn.Module, output: Tensor, target: Tensor) -> LossTerms:
    """The loss at an output `[N, …]`, widened to float32 if it is narrower, and a target that fits it.

    Of values, only whether they are what they must be is read back from the device, once.
    """
    if not isinstance(target, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"the target is {a_value(target)}, not a tensor",
            remedy="call it as curv(inputs, target)",
            code="FXC407",
        )
    if target.device != output.device:
        raise InputError(
            f"the target is on {target.device}, the output on {output.device}",
            remedy="move them to one device",
            code="FXC407",
        )
    if target.layout != torch.strided:
        raise InputError("the target is sparse", remedy="convert it: y.to_dense()", code="FXC407")
    if not output.is_floating_point():
        raise LossError(f"the output is of type {output.dtype}", remedy="give a real one", code="FXC406")
    output = output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    kind = next(kind for kind in _TERMS if isinstance(loss, kind))
    if target.is_floating_point():
        target = target.to(output.dtype)
    terms, checks = _TERMS[kind](loss, output, target)
    _hold(*_finite(output, target), *checks, *_rootable(terms))
    return terms


def loss_value(loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """The loss itself, as `loss_terms` computes it, to be differentiated."""
    output = output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    return _on(loss, output)(output, target.to(output.dtype) if target.is_floating_point() else target)


# What must hold, read from the device once -------------------------------------------------------------------------

Check = tuple[Tensor, Callable[[], FxcurvError]]
"""What holds, as booleans on the device, and the error if not."""


def _hold(*checks: Check) -> None:
    """Raise the error of the first check that does not hold; the host waits for the device once, for all of them."""
    holds = torch.stack([condition.all() for condition, _ in checks]).tolist()
    for held, (_, error) in zip(holds, checks, strict=True):
        if not held:
            raise error()


def _finite(output: Tensor, target: Tensor) -> Iterator[Check]:
    yield (
        output.isfinite(),
        lambda: InputError(
            "the model's output holds NaN or infinity",
            node="output",
            remedy="check its parameters and the scale of the input",
            code="FXC405",
        ),
    )
    yield (
        target.isfinite(),
        lambda: InputError("the target holds NaN or infinity", remedy="clean the targets", code="FXC407"),
    )


def _rootable(terms: LossTerms) -> Iterator[Check]:
    """The loss is a number, and its Hessian has a square root."""
    yield (
        terms.value.isfinite(),
        lambda: LossError(
            "the loss is not finite",
            remedy="check that some target counts and that the outputs are moderate",
            code="FXC406",
        ),
    )
    yield (
        ~(terms.omega < 0),
        lambda: LossError(
            "a term of the loss has a negative weight",
            remedy="its Hessian has no real square root: use weights ≥ 0",
            code="FXC406",
        ),
    )


# The losses -------------------------------------------------------------------------------------------------------


def _value_and_gradient(loss: nn.Module, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    gradient, value = torch.func.grad_and_value(lambda f: loss(f, target))(output)
    return value, gradient


def _as(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like)


def _cross_entropy(loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> tuple[LossTerms, list[Check]]:
    if output.ndim < 2 or output.shape[1] < 2:
        raise LossError(
            f"cross entropy of an output of shape {list(output.shape)}",
            remedy="give [N, C] or [N, C, d…] with C ≥ 2 classes",
            code="FXC406",
        )
    C, per_class = output.shape[1], _as(loss.weight, output)
    if per_class is not None and per_class.shape != (C,):
        raise LossError(
            f"class weights of shape {list(per_class.shape)} for {C} classes", remedy=f"give {C} weights", code="FXC406"
        )
    _check_classes(output, target)
    if target.is_floating_point():
        q, counts, checks = _smoothed(loss, target)
    else:
        q, counts, checks = _onehot(loss, output, target)
        target = target.where(q.sum(1) > 0, loss.ignore_index)  # on a GPU, a wrong index would end the process
    weighted = q if per_class is None else q * _along_classes(per_class, output)
    omega = weighted.sum(1, keepdim=True)  # the mass of a term: Σ_c w_c q_c
    divisor = counts if loss.reduction == "mean" else 1.0
    value_and_gradient = _value_and_gradient(_on(loss, output), output, target)
    return SoftmaxTerms(*value_and_gradient, omega / divisor, divisor, output.softmax(1)), checks


def _on(loss: nn.Module, like: Tensor) -> nn.Module:
    """The loss with its weights in the output's type and place; the given one is left alone."""
    return copy.deepcopy(loss).to(like) if any(True for _ in loss.buffers()) else loss


def _check_classes(output: Tensor, target: Tensor) -> None:
    """Class probabilities have the output's shape, class indices one number for each of its positions."""
    if target.is_floating_point():
        if target.shape != output.shape:
            raise InputError(
                _shapes("class probabilities", target, output), remedy="give them in the output's shape", code="FXC407"
            )
        return
    if target.dtype != torch.int64:
        raise InputError(
            f"class indices of type {target.dtype}", remedy="give torch.int64 indices, or probabilities", code="FXC407"
        )
    if target.shape != (expected := (output.shape[0], *output.shape[2:])):
        raise InputError(
            _shapes("class indices", target, output), remedy=f"give indices of shape {list(expected)}", code="FXC407"
        )


Classes = tuple[Tensor, Tensor | float, list[Check]]
"""The targets as q[n,c,…], smoothed and zero where ignored; what `mean` divides by; what must hold."""


def _smoothed(loss: nn.CrossEntropyLoss, target: Tensor) -> Classes:
    C, smoothing = target.shape[1], loss.label_smoothing
    negative = (
        target >= 0,
        lambda: InputError("a class probability is negative", remedy="give probabilities", code="FXC407"),
    )
    return target * (1 - smoothing) + smoothing / C, target.numel() / C, [negative]


def _onehot(loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> Classes:
    C, smoothing = output.shape[1], loss.label_smoothing
    wrong = (target != loss.ignore_index) & ((target < 0) | (target >= C))
    counted = (target != loss.ignore_index) & ~wrong
    checks: list[Check] = [
        (
            ~wrong,
            lambda: InputError(
                f"class index {int(target[wrong][0])} for {C} classes",
                remedy=f"give indices from 0 to {C - 1}, or ignore_index",
                code="FXC407",
            ),
        )
    ]
    if loss.reduction == "mean":
        checks.append(
            (
                counted.any(),
                lambda: InputError("every target is ignored", remedy="give at least one that counts", code="FXC407"),
            )
        )
    counts = counted.unsqueeze(1).to(output.dtype)
    onehot = torch.zeros_like(output).scatter_(1, target.where(counted, 0).unsqueeze(1), counts)
    weight = _as(loss.weight, output)
    divisor = (onehot if weight is None else onehot * _along_classes(weight, output)).sum()
    return onehot * (1 - smoothing) + smoothing / C * counts, divisor, checks


def _along_classes(weight: Tensor, output: Tensor) -> Tensor:
    return weight.view(-1, *(1,) * (output.ndim - 2))


def _mse(loss: nn.MSELoss, output: Tensor, target: Tensor) -> tuple[LossTerms, list[Check]]:
    if not target.is_floating_point() or target.shape != output.shape:
        raise InputError(
            _shapes(f"a target of type {target.dtype}", target, output),
            remedy="give floating-point targets in the output's shape",
            code="FXC407",
        )
    divisor = float(output.numel()) if loss.reduction == "mean" else 1.0
    omega = output.new_full((), 1 / divisor)

    def noise(generator: Generator) -> Tensor:
        return 2**0.5 * torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)

    return ScalarTerms(*_value_and_gradient(loss, output, target), omega, divisor, output.new_full((), 2), noise), []


def _broadcasts(shape: torch.Size, full: torch.Size) -> bool:
    sizes = zip(reversed(shape), reversed(full), strict=False)
    return len(shape) <= len(full) and all(size in (1, whole) for size, whole in sizes)


def _bce_with_logits(loss: nn.BCEWithLogitsLoss, output: Tensor, target: Tensor) -> tuple[LossTerms, list[Check]]:
    if not target.is_floating_point() or target.shape != output.shape:
        raise InputError(
            _shapes(f"a target of type {target.dtype}", target, output),
            remedy="give floating-point targets in the output's shape",
            code="FXC407",
        )
    divisor = float(output.numel()) if loss.reduction == "mean" else 1.0
    omega = torch.full_like(output, 1 / divisor)
    pos_weight, weight = _as(loss.pos_weight, output), _as(loss.weight, output)
    for name, factor in (("pos_weight", pos_weight), ("weight", weight)):
        if factor is not None and not _broadcasts(factor.shape, output.shape):
            raise LossError(
                f"a {name} of shape {list(factor.shape)} for an output of shape {list(output.shape)}",
                remedy="give one that broadcasts to the output",
                code="FXC406",
            )
    omega = omega if pos_weight is None else omega * (1 + (pos_weight - 1) * target)
    omega = omega if weight is None else omega * weight
    p = output.sigmoid()

    def noise(generator: Generator) -> Tensor:
        return p - torch.bernoulli(p, generator=generator)

    outside = (
        (target >= 0) & (target <= 1),
        lambda: InputError("a target is outside of [0, 1]", remedy="give probabilities", code="FXC407"),
    )
    value_and_gradient = _value_and_gradient(_on(loss, output), output, target)
    return ScalarTerms(*value_and_gradient, omega, divisor, p * (1 - p), noise), [outside]


def _shapes(what: str, target: Tensor, output: Tensor) -> str:
    return f"{what} of shape {list(target.shape)} for an output of shape {list(output.shape)}"


_TERMS: dict[type[nn.Module], Callable[..., tuple[LossTerms, list[Check]]]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.MSELoss: _mse,
    nn.BCEWithLogitsLoss: _bce_with_logits,
}
