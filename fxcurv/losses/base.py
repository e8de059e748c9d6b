"""Loss: the facts of a loss for the other rooms, and the computation of its terms at outputs and targets.

A loss is a weighted sum of terms, ω · ℓ(output entries, target), over a divisor for `mean`. A subclass of `Loss`
defines the terms of one type of module, in a file of its own in this room; no other room tests which loss it is.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fxcurv.core.errors import FxcurvError, InputError, LossError, a_value
from fxcurv.core.fingerprint import described
from fxcurv.core.registry import register
from fxcurv.losses.alterations import alteration, changed_by_global_hooks
from fxcurv.losses.terms import LossTerms, ScalarTerms
from fxcurv.quantities.factors import Exact, Factor, SecondPass, Stratified, most_columns

__all__ = [
    "KINDS",
    "Check",
    "Loss",
    "as_loss",
    "converted",
    "loss_terms",
    "on_type_of",
    "shapes_of",
    "value_and_gradient",
]

Check = tuple[Tensor, Callable[[], FxcurvError]]
"""Conditions, as booleans on the device, and the error for a false one."""

KINDS: dict[str, type[Loss]] = {}
"""All kinds of loss by name; a subclass of `Loss` registers itself."""


class Loss(ABC):
    """A loss module of one kind.

    Users select it by the class attributes `name`, `module_type` and `function`; `has_classes` says whether axis 1 of
    the output holds class logits, `gaussian` whether the loss is half a Gaussian's negative log likelihood, up to its
    variance. A class that is abstract, or has neither `name` nor `module_type`, is a base of kinds and is not selected.
    A module belongs to the first kind that was defined for its type.
    """

    name: ClassVar[str]
    module_type: ClassVar[type[nn.Module]]
    function: ClassVar[Callable[..., Any] | None] = None
    has_classes: ClassVar[bool] = False
    gaussian: ClassVar[bool] = False

    _forward: ClassVar[object] = None
    _given: nn.Module | None = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __init_subclass__(cls) -> None:
        name, module_type = (getattr(cls, fact, None) for fact in ("name", "module_type"))
        if _is_abstract(cls) or name is module_type is None:
            return
        if not isinstance(name, str) or not name:
            raise _incomplete(cls, f"name={name!r}", "give the name by which it is requested")
        if not isinstance(module_type, type) or not issubclass(module_type, nn.Module):
            raise _incomplete(cls, f"module_type={module_type!r}", "give the type of its module, such as nn.MSELoss")
        register(KINDS, name, cls, "loss")
        cls._forward = module_type.forward

    # Defined by each kind ---------------------------------------------------------------------------------------------

    @abstractmethod
    def compute(self, output: Tensor, target: Tensor) -> tuple[LossTerms, Sequence[Check]]:
        """The terms at an output `[N, …]`, in float32 or wider, and a target; and the checks of their values."""

    @abstractmethod
    def random_target(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a random target that fits the output."""

    def target_from(self, labels: Tensor | None, output: Tensor, generator: torch.Generator) -> Tensor:
        """A target for data with these class labels, or none; by default a random one."""
        return self.random_target(output, generator)

    def link(self, output: Tensor) -> Tensor:
        """The parameters of a target's distribution, from outputs `[…, C]`: probabilities, or the mean."""
        return output

    def check_module(self) -> None:  # noqa: B027
        """Raise a LossError for options that are not supported."""

    def counts(self, target: Tensor) -> bool:
        """Whether any term counts: `mean` divides by zero if none does."""
        return True

    # The user's module -----------------------------------------------------------------------------------------------

    @property
    def given(self) -> nn.Module:
        """The module given by the user, of which `module` may be a copy."""
        return self._given or self.module

    def require_unchanged(self) -> None:
        """Raise a LossError unless the module computes exactly what its type defines."""
        found = alteration(self.given, self.module_type, type(self)._forward, type(self).function)
        if found is not None:
            raise LossError(found[0], remedy=found[1], code="FXC406")

    # Derived ----------------------------------------------------------------------------------------------------------

    @property
    def reduction(self) -> str:
        """`mean` or `sum`."""
        return str(self.module.reduction)

    def summed(self) -> Self:
        """The same loss with the reduction `sum`."""
        module: Any = copy.copy(self.module)
        module.reduction = "sum"
        found = type(self)(module)
        found._given = self.given
        return found

    def terms(self, output: Tensor, target: Tensor) -> LossTerms:
        """The loss at an output `[N, …]`, widened to float32 if it is narrower, and a target that fits it.

        Only the checks of the values are read back from the device, once.
        """
        self.require_unchanged()
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
        output = _widened(output)
        if target.is_floating_point():
            target = target.to(output.dtype)
        computed: Any = self.compute(output, target)
        if not (isinstance(computed, tuple) and len(computed) == 2 and isinstance(computed[0], LossTerms)):
            raise _incomplete(
                type(self), f"compute returning {a_value(computed)}", "return LossTerms and a list of checks"
            )
        terms, checks = computed
        _hold(*_finite(output, target), *checks, *_rootable(terms))
        if changed_by_global_hooks(on_type_of(self.module, output), output, target):
            raise LossError(
                "a hook for all modules changes the loss",
                remedy="remove it with handle.remove(), or let it return None for the loss",
                code="FXC406",
            )
        return terms

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, as `terms` computes it, differentiable."""
        self.require_unchanged()
        output = _widened(output)
        return on_type_of(self.module, output).forward(
            output, target.to(output.dtype) if target.is_floating_point() else target
        )

    def columns(self, factor: Factor, shape: Sequence[int]) -> int:
        """Number of columns per sample of a factor for outputs of `shape`; its maximum where it depends on targets."""
        outputs = math.prod(shape[1:])
        match factor:
            case Exact():
                return outputs - outputs // shape[1] if self.has_classes else outputs
            case Stratified(top, k):
                return top + k if top < shape[1] else self.columns(Exact(), shape)
            case SecondPass(again):
                return self.columns(again, shape)
            case _:
                return most_columns(factor, outputs)

    def described(self) -> str:
        """The loss with every attribute, by value: settings, weights, and those of a kind of one's own."""
        return described(self)


def as_loss(loss: object) -> Loss:
    """Return a supported loss, given as a module, by name, or as a function of torch.nn.functional."""
    if isinstance(loss, Loss):
        return _checked(loss)
    if isinstance(loss, str):
        if loss not in KINDS:
            raise LossError(f"no loss is called {loss!r}", remedy=_remedy(), code="FXC406")
        return _by_default(KINDS[loss])
    kind = next((kind for kind in KINDS.values() if loss is kind.function), None) if callable(loss) else None
    if kind is not None:
        return _by_default(kind)
    if not isinstance(loss, nn.Module):
        raise LossError(f"the loss is {a_value(loss)}, not a module", remedy=_remedy(), code="FXC406")
    kinds = {kind.module_type: kind for kind in reversed(KINDS.values())}  # the first of a type
    kind = next((kinds[base] for base in type(loss).__mro__ if base in kinds), None)
    if kind is None or "forward" in _defined_after(kind.module_type, type(loss)):
        raise LossError(f"the loss {type(loss).__name__} is not supported", remedy=_remedy(), code="FXC406")
    return _checked(kind(loss))


def _by_default(kind: type[Loss]) -> Loss:
    """A loss of a kind with the default options of its module."""
    try:
        module = kind.module_type()
    except TypeError as error:
        name = kind.module_type.__name__
        raise LossError(
            f"{kind.name!r} has options without a default: {error}", remedy=f"give a module, {name}(…)", code="FXC406"
        ) from error
    return _checked(kind(module))


def _checked(loss: Loss) -> Loss:
    """The loss, if its module has a supported reduction and supported options."""
    module: Any = getattr(loss, "module", None)
    if not isinstance(getattr(loss, "name", None), str) or not isinstance(module, nn.Module):
        raise _incomplete(type(loss), f"the module {a_value(module)}", "give it a name, and a module when it is made")
    if not isinstance(module, loss.module_type):
        remedy = f"make it of a {loss.module_type.__name__}"
        raise _incomplete(type(loss), f"the module {a_value(module)}, of another type", remedy)
    if not hasattr(module, "reduction"):
        cause = f"the loss {type(module).__name__} has no attribute 'reduction'"
        raise LossError(cause, remedy="give its module one, 'mean' or 'sum'", code="FXC406")
    if module.reduction not in ("mean", "sum"):
        raise LossError(f"the loss has reduction {module.reduction!r}", remedy=_remedy(), code="FXC406")
    loss.require_unchanged()
    loss.check_module()
    return loss


def _defined_after(base: type, derived: type) -> set[str]:
    """Return the attributes defined by the classes between a base class and a class derived from it."""
    return {name for cls in derived.__mro__[: derived.__mro__.index(base)] for name in vars(cls)}


def _is_abstract(cls: type) -> bool:
    """Whether a class that is being defined has abstract methods; `inspect` knows only later."""
    names = {name for base in cls.__mro__ for name in vars(base)}
    return any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in names)


def _incomplete(kind: type, fact: str, remedy: str) -> LossError:
    return LossError(f"the kind of loss {kind.__name__} has {fact}", remedy=remedy, code="FXC406")


def loss_terms(loss: object, output: Tensor, target: Tensor) -> LossTerms:
    """Return the terms of a loss, given as for `as_loss`."""
    return as_loss(loss).terms(output, target)


def _remedy() -> str:
    types = [kind.module_type for kind in KINDS.values()]
    modules = [f"{'nn.' * t.__module__.startswith('torch.nn.')}{t.__name__}" for t in types]
    names = [repr(name) for name in KINDS]
    return f"use {', '.join(modules[:-1])} or {modules[-1]} (or {', '.join(names)}) with reduction 'mean' or 'sum'"


# For kinds of losses ----------------------------------------------------------------------------------------------


def _widened(output: Tensor) -> Tensor:
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


def value_and_gradient(loss: nn.Module, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient at the output; hooks are not run, since hooks that change it are refused."""
    gradient, value = torch.func.grad_and_value(lambda f: loss.forward(f, target))(output)
    return value, gradient


def on_type_of(loss: nn.Module, like: Tensor) -> nn.Module:
    """The loss with its weights in the output's dtype and on its device; the given module is not changed."""
    return copy.deepcopy(loss).to(like) if any(True for _ in loss.buffers()) else loss


def converted(weight: Tensor | None, output: Tensor) -> Tensor | None:
    """A weight of the loss in the output's dtype and on its device."""
    return None if weight is None else weight.to(output)


def shapes_of(what: str, target: Tensor, output: Tensor) -> str:
    """Describe a target and an output that do not fit, for errors."""
    return f"{what} of shape {list(target.shape)} for an output of shape {list(output.shape)}"


# Checks, read from the device once ---------------------------------------------------------------------------------


def _hold(*checks: Check) -> None:
    """Raise the error of the first check that fails, with one synchronization for all of them."""
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
    """Check that the loss is finite and that its Hessian has a square root."""
    remedy = "check that some target counts and that the outputs are moderate"
    yield _or_refused(terms.value.isfinite(), "the loss is not finite", remedy)
    remedy = "its Hessian has no real square root: use weights ≥ 0"
    yield _or_refused(~(terms.omega < 0), "a term of the loss has a negative weight", remedy)
    if isinstance(terms, ScalarTerms):
        remedy = "its Hessian has no real square root: use a loss that is convex in the output"
        yield _or_refused(~(terms.curvature < 0), "a term of the loss has a negative second derivative", remedy)


def _or_refused(holds: Tensor, cause: str, remedy: str) -> Check:
    return holds, lambda: LossError(cause, remedy=remedy, code="FXC406")
