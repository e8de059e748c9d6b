"""Preconditioned: gradient descent in the geometry of the curvature, for any quantity that has blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict, Unpack, overload

import torch
from torch import Tensor

from fxcurv.api import Compiled
from fxcurv.blocks.base import KINDS, Block, Damping, differing
from fxcurv.blocks.lazy_gram import formed
from fxcurv.core.errors import FxcurvError, InputError, QuantityError, a_value
from fxcurv.frontend.inputs import Inputs
from fxcurv.linalg.factorizations import damping_of
from fxcurv.linalg.operator import Space
from fxcurv.results.block_diagonal import BlockDiagonal, PlacedBlock

__all__ = ["Preconditioned"]


class Options(TypedDict, total=False):
    """Options of a step besides `lr` and `damping`; see `Preconditioned`."""

    momentum: float
    weight_decay: float
    decay: float
    every: int
    clip: float
    method: Damping


DEFAULTS = Options(momentum=0.9, weight_decay=0.0, decay=0.95, every=1, clip=1e-3, method="exact")


BELOW_ONE = ("momentum", "decay")


class Preconditioned(torch.optim.Optimizer):
    """v ← μ v + ν (B̄ + δI)⁻¹ ∇L, θ ← (1 − lr·λ) θ − lr·v, for the parameters for which the curvature B is requested.

    Other parameters need another optimizer. A parameter without a gradient is not changed.
    `compiled` computes one quantity, such as "kfac" (Martens & Grosse 2015) or "diag_ggn", of the loss L with its
    reduction. The caller gives the data, before or after the gradient is computed:

        optimizer.update_curvature(x, y)
        optimizer.zero_grad(); loss(model(x), y).backward(); optimizer.step()

    - `damping` δ, in the units of B, applied by `method` as in `Kronecker.inverse`;
    - `momentum` μ; `weight_decay` λ, decoupled from the curvature as in AdamW;
    - `decay`: B̄ is a running average; the k-th update gives w B̄ + (1 − w) B with w = min(1 − 1/k, decay) (§5 there;
      0: the last B). Kronecker factors are averaged separately; older eigenbases are projected on the newest;
    - `every`: one in `every` calls of `update_curvature` computes the curvature;
    - `clip`: ν = min(1, √(clip / (lr² ∇Lᵀ(B̄ + δI)⁻¹∇L))), a bound on the change of the quadratic model of the loss
      (Ba et al. 2017).

    The defaults (0.3, 0.01, μ = 0.9, λ = 0, 0.95, every = 1, clip = 0.001, "exact") suit small networks; a Newton step
    is lr = 1, momentum = 0, clip = inf. All may be changed in `param_groups[0]`, for example by a scheduler. Raises an
    InputError (FXC440) for values out of range, for parameters instead of `compiled` and for a second group of
    parameters, and a QuantityError (FXC440) if `compiled` has several quantities.
    """

    def __init__(self, compiled: Compiled, lr: float = 0.3, damping: float = 1e-2, **options: Unpack[Options]) -> None:
        if not isinstance(compiled, Compiled):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                f"the first argument is {a_value(compiled)}, not a compiled model",
                remedy="give fxcurv.compile(model, loss, 'kfac'), which has the parameters",
                code="FXC440",
            )
        if len(compiled.selection.quantities) != 1:
            raise QuantityError(
                f"a preconditioner of {', '.join(compiled.selection.quantities)}",
                remedy="compile one quantity",
                code="FXC440",
            )
        defaults: dict[str, Any] = {"lr": lr, "damping": damping_of(damping), **DEFAULTS, **options}
        _check(defaults)
        self.compiled, (self.quantity,) = compiled, compiled.selection.quantities
        self.curvature: BlockDiagonal | None = None
        self.calls = self.updates = 0
        self._inverse: tuple[object, BlockDiagonal] | None = None
        named = compiled.selection.of(compiled.model)[self.quantity]
        super().__init__([p for n, p in compiled.model.named_parameters() if n in named and p.requires_grad], defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise an InputError (FXC440) after construction: other parameters have no curvature."""
        if self.param_groups:
            raise InputError(
                "a second group of parameters: only parameters of the compiled quantity have curvature",
                remedy="give the others to another optimizer, or compile the quantity for all parameters",
                code="FXC440",
            )
        super().add_param_group(param_group)

    def update_curvature(self, x: Inputs, y: Tensor, generator: torch.Generator | None = None) -> bool:
        """Update the running average with the curvature at a batch; return whether an update was due.

        The model is in eval mode during the call; the mode of each module is restored afterwards.
        """
        group = self.param_groups[0]
        due = self.calls % group["every"] == 0
        self.calls += 1
        if due:
            modes = {module: module.training for module in self.compiled.model.modules()}
            self.compiled.model.eval()
            try:
                new = self.compiled(x, y, generator).operator(self.quantity)
            finally:
                for module, training in modes.items():
                    module.training = training
            self.updates += 1
            weight = min(1 - 1 / self.updates, group["decay"])
            self.curvature = new if self.curvature is None or not weight else _mixed(self.curvature, new, weight)
            self._inverse = None
        return due

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the stored gradients, or with those computed by `closure`; return its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, inverse = self.param_groups[0], self._inverted()
        lr, momentum = group["lr"], group["momentum"]
        moved = {name: self.compiled.model.get_parameter(name) for name in inverse.domain.shapes}
        gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in moved.items()}
        flat = inverse.domain.flat(gradient).to(inverse.dtype)
        direction = inverse.mv(flat)
        if group["clip"] < math.inf:
            change = lr**2 * flat.dot(direction)
            direction = direction * (group["clip"] / change.clamp(min=torch.finfo(flat.dtype).tiny)).sqrt().clamp(max=1)
        for name, v in inverse.domain.split(direction).items():
            p = moved[name]
            if p.grad is None:
                continue
            v = v.to(p.dtype)
            if momentum:
                state = self.state[p]
                v = state["momentum_buffer"] = momentum * state.get("momentum_buffer", torch.zeros_like(p)) + v
            p.mul_(1 - lr * group["weight_decay"]).sub_(v, alpha=lr)
        return loss

    def _inverted(self) -> BlockDiagonal:
        """(B̄ + δI)⁻¹, cached until B̄, δ or the method changes."""
        if self.curvature is None:
            raise FxcurvError(
                "no curvature has been computed", remedy="call update_curvature(x, y) first", code="FXC440"
            )
        key = self.param_groups[0]["damping"], self.param_groups[0]["method"]
        if self._inverse is None or self._inverse[0] != key:
            self._inverse = key, self.curvature.inverse(*key)
        return self._inverse[1]

    # Saving and loading -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and the running average under `curvature`, as plain tensors and containers."""
        held = self.curvature and {
            "shapes": dict(self.curvature.domain.shapes),
            "blocks": [_saved(part) for part in self.curvature.parts],
        }
        return {**super().state_dict(), "curvature": held, "calls": self.calls, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of another optimizer of the same quantity and model."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.calls, self.updates, held = (state_dict[key] for key in ("calls", "updates", "curvature"))
        device = self.param_groups[0]["params"][0].device
        self.curvature = held and BlockDiagonal(
            Space(held["shapes"]), [_loaded(saved, device) for saved in held["blocks"]]
        )
        self._inverse = None


def _check(group: dict[str, Any]) -> None:
    """Raise an InputError for a value out of its range."""
    odd = next((name for name in group if name not in DEFAULTS and name not in ("lr", "damping")), None)
    if odd is None:
        odd = next((name for name in ("lr", "weight_decay", *BELOW_ONE) if not 0 <= group[name] < math.inf), None)
    if odd is None:
        odd = next((name for name in BELOW_ONE if group[name] >= 1), None)
    if odd is None and not (isinstance(group["every"], int) and group["every"] >= 1):
        odd = "every"
    if odd is None and not group["clip"] > 0:
        odd = "clip"
    if odd is not None:
        raise InputError(
            f"{odd}={group[odd]!r}",
            remedy="use lr ≥ 0, weight_decay ≥ 0, 0 ≤ momentum < 1, 0 ≤ decay < 1, every ≥ 1 and clip > 0",
            code="FXC440",
        )


# Running averages -------------------------------------------------------------------------------------------------


def _mixed(old: BlockDiagonal, new: BlockDiagonal, weight: float) -> BlockDiagonal:
    """weight · old + (1 − weight) · new, block by block."""
    pairs = zip(old.parts, new.parts, strict=True)
    return BlockDiagonal(new.domain, [PlacedBlock(_average(a.block, b.block, weight), b.at) for a, b in pairs])


def _average(old: Block, new: Block, weight: float) -> Block:
    if type(old) is not type(new):
        raise QuantityError(
            f"{new.name} is a {type(old).__name__}, then a {type(new).__name__}",
            remedy="use one compiled quantity, or decay=0",
            code="FXC440",
        )
    if old.layout != new.layout:
        raise QuantityError(
            f"{new.name} changes its options: {differing(old, new)}",
            remedy="use one compiled quantity, or decay=0",
            code="FXC440",
        )
    old = old.to(new.device, new.dtype).mapped(formed)
    return new.mapped(formed).averaged_with(old, weight)


def _saved(part: PlacedBlock) -> dict[str, Any]:
    block = part.block
    at = part.at if isinstance(part.at, Tensor) else (part.at.start, part.at.stop)
    options = {name: getattr(block, name) for name in block.options}
    named = {"form": type(block).__name__, "shape": block.shape, "parameters": block.parameters, "at": at}
    return {**named, "options": options, "tensors": [formed(part) for part in block.parts]}


def _loaded(saved: dict[str, Any], device: torch.device) -> PlacedBlock:
    form: Any = KINDS[saved["form"]]
    tensors = [t.to(device) for t in saved["tensors"]]
    block = form(tuple(saved["shape"]), *tensors, parameters=tuple(saved["parameters"]), **saved["options"])
    at = saved["at"]
    return PlacedBlock(block, at.to(device) if isinstance(at, Tensor) else slice(*at))
