"""Binary cross entropy of logits: one term per entry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.core.errors import InputError, LossError
from fxcurv.losses.base import Check, Loss, converted, on_type_of, shapes_of, value_and_gradient
from fxcurv.losses.terms import Generator, LossTerms, ScalarTerms

__all__ = ["BinaryCrossEntropy"]


class BinaryCrossEntropy(Loss):
    """`nn.BCEWithLogitsLoss`, with `weight` and `pos_weight`, of targets in [0, 1]."""

    name = "bce_with_logits"
    module_type = nn.BCEWithLogitsLoss
    function = F.binary_cross_entropy_with_logits

    module: nn.BCEWithLogitsLoss

    def compute(self, output: Tensor, target: Tensor) -> tuple[LossTerms, list[Check]]:
        loss = self.module
        if not target.is_floating_point() or target.shape != output.shape:
            raise InputError(
                shapes_of(f"a target of type {target.dtype}", target, output),
                remedy="give floating-point targets in the output's shape",
                code="FXC407",
            )
        divisor = float(output.numel()) if loss.reduction == "mean" else 1.0
        omega = torch.full_like(output, 1 / divisor)
        pos_weight, weight = converted(loss.pos_weight, output), converted(loss.weight, output)
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
        at_output = value_and_gradient(on_type_of(loss, output), output, target)
        return ScalarTerms(*at_output, omega, divisor, p * (1 - p), noise), [outside]

    def random_target(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Random zeros and ones."""
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=generator.device)
        return (noise > 0).to(output)

    def link(self, output: Tensor) -> Tensor:
        """sigmoid."""
        return output.sigmoid()


def _broadcasts(shape: torch.Size, full: torch.Size) -> bool:
    sizes = zip(reversed(shape), reversed(full), strict=False)
    return len(shape) <= len(full) and all(size in (1, whole) for size, whole in sizes)
