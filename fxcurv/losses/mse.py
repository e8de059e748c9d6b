"""Mean squared error: one term per entry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.core.errors import InputError
from fxcurv.losses.base import Check, Loss, shapes_of, value_and_gradient
from fxcurv.losses.terms import Generator, LossTerms, ScalarTerms

__all__ = ["MeanSquaredError"]


class MeanSquaredError(Loss):
    """`nn.MSELoss`."""

    name = "mse"
    module_type = nn.MSELoss
    function = F.mse_loss
    gaussian = True

    def compute(self, output: Tensor, target: Tensor) -> tuple[LossTerms, list[Check]]:
        if not target.is_floating_point() or target.shape != output.shape:
            raise InputError(
                shapes_of(f"a target of type {target.dtype}", target, output),
                remedy="give floating-point targets in the output's shape",
                code="FXC407",
            )
        divisor = float(output.numel()) if self.reduction == "mean" else 1.0
        omega = output.new_full((), 1 / divisor)

        def noise(generator: Generator) -> Tensor:
            return 2**0.5 * torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)

        return ScalarTerms(
            *value_and_gradient(self.module, output, target), omega, divisor, output.new_full((), 2), noise
        ), []

    def random_target(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Normal random numbers."""
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=generator.device)
        return noise.to(output.device)
