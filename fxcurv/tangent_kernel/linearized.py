"""The model linearized in its parameters, trained by gradient flow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcurv.core.errors import InputError
from fxcurv.frontend.inputs import Inputs
from fxcurv.tangent_kernel.kernel import NTK

__all__ = ["Linearized"]


# Linearized models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Linearized:
    """The model linearized at its parameters, trained on ½ Σ_n ‖f(x_n) - y_n‖² by gradient flow (Lee et al. 2019).

    At time t with learning rate η, with K the kernel of the training inputs, the prediction is
    f_t(x) = f_0(x) + K(x, X) (K + jitter)⁻¹ (I - exp(-ηKt)) (y - f_0(X)); at t = ∞ it is kernel (ridge) regression.
    Null-space eigenvalues of K, within rounding, do not contribute.
    """

    kernel: NTK
    inputs: Inputs
    targets: Tensor
    jitter: float = 0.0

    def __call__(self, x: Inputs, time: float = math.inf, rate: float = 1.0) -> Tensor:
        """Return the predictions at x, in the shape of the model's output."""
        start, fitted = self.kernel.outputs(x), self.kernel.outputs(self.inputs)
        if self.targets.shape != fitted.shape:
            raise InputError(
                f"targets of shape {list(self.targets.shape)} for outputs of shape {list(fitted.shape)}",
                remedy="give them in the output's shape",
                code="FXC407",
            )
        values, Q = torch.linalg.eigh(_matrix(self.kernel(self.inputs)))
        values = values.clamp(min=0)
        learned = 1.0 if math.isinf(time) else -torch.expm1(-rate * time * values)
        seen = values > values.max() * len(values) * torch.finfo(values.dtype).eps
        gain = torch.where(seen, learned / torch.where(seen, values + self.jitter, 1), 0)
        residual = (self.targets - fitted).flatten()
        weights = Q @ (gain * (Q.T @ residual.to(Q.dtype)))
        return start + (_matrix(self.kernel(x, self.inputs)) @ weights).view_as(start).to(start.dtype)


def _matrix(K: Tensor) -> Tensor:
    """`[N, M, C, C]` -> `[N·C, M·C]`."""
    return K.transpose(1, 2).flatten(2).flatten(0, 1)
