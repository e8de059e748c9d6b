"""Penalty: a quadratic penalty against forgetting a task; elastic weight consolidation with any block."""

from __future__ import annotations

from torch import Tensor, nn

from fxcurv.core.errors import InputError, a_value
from fxcurv.linalg.operator import LinearOperator
from fxcurv.results.block_diagonal import BlockDiagonal

__all__ = ["Penalty"]


class Penalty:
    """½ strength · (θ − θ*)ᵀ B (θ − θ*), to be added to the loss of the next task.

    θ* are the model's parameters at construction, B the curvature of the last task, `result.operator(…)`: with
    "diag_ggn" this is elastic weight consolidation (Kirkpatrick et al. 2017, eq. 3), with "kfac" the Kronecker-factored
    one (Ritter et al. 2018). Penalties of several tasks add. A pattern leaves the head of each task out of B.
    Raises an InputError (FXC440) for a curvature that is not an operator, such as the result itself.
    """

    def __init__(self, model: nn.Module, curvature: BlockDiagonal, strength: float = 1.0) -> None:
        if not isinstance(curvature, LinearOperator):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                f"the curvature is {a_value(curvature)}, not an operator",
                remedy="give the operator of one quantity: result.operator('kfac')",
                code="FXC440",
            )
        self.curvature, self.strength = curvature, strength
        self.anchor = {name: model.get_parameter(name).detach().clone() for name in curvature.domain.shapes}

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty at the current parameters of the model, a differentiable scalar."""
        moved = {name: model.get_parameter(name) - start for name, start in self.anchor.items()}
        flat = self.curvature.domain.flat(moved).to(self.curvature.dtype)
        return self.strength / 2 * flat.dot(self.curvature.mv(flat))
