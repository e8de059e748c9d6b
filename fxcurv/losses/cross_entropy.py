"""Cross entropy: one term per position, over the C entries along axis 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcurv.core.errors import InputError, LossError
from fxcurv.losses.base import Check, Loss, converted, on_type_of, shapes_of, value_and_gradient
from fxcurv.losses.terms import LossTerms, SoftmaxTerms

__all__ = ["CrossEntropy"]


class CrossEntropy(Loss):
    """`nn.CrossEntropyLoss` for class indices or probabilities, with class weights, ignored targets and smoothing."""

    name = "cross_entropy"
    module_type = nn.CrossEntropyLoss
    function = F.cross_entropy
    has_classes = True

    module: nn.CrossEntropyLoss

    def check_module(self) -> None:
        smoothing = self.module.label_smoothing
        if not 0 <= smoothing <= 1:
            raise LossError(f"label_smoothing={smoothing}", remedy="smooth by 0 to 1", code="FXC406")

    def compute(self, output: Tensor, target: Tensor) -> tuple[LossTerms, list[Check]]:
        loss = self.module
        if output.ndim < 2 or output.shape[1] < 2:
            raise LossError(
                f"cross entropy of an output of shape {list(output.shape)}",
                remedy="give [N, C] or [N, C, d…] with C ≥ 2 classes",
                code="FXC406",
            )
        C, per_class = output.shape[1], converted(loss.weight, output)
        if per_class is not None and per_class.shape != (C,):
            raise LossError(
                f"class weights of shape {list(per_class.shape)} for {C} classes",
                remedy=f"give {C} weights",
                code="FXC406",
            )
        _check_classes(output, target)
        if target.is_floating_point():
            q, counts, checks = _smoothed(loss, target)
        else:
            q, counts, checks = _onehot(loss, output, target)
            target = target.where(q.sum(1) > 0, loss.ignore_index)  # on a GPU, a wrong index would abort the process
        weighted = q if per_class is None else q * _along_classes(per_class, output)
        omega = weighted.sum(1, keepdim=True)  # the mass of a term: Σ_c w_c q_c
        divisor = counts if loss.reduction == "mean" else 1.0
        at_output = value_and_gradient(on_type_of(loss, output), output, target)
        return SoftmaxTerms(*at_output, omega / divisor, divisor, output.softmax(1)), checks

    def random_target(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Random class indices."""
        shape = len(output), *output.shape[2:]
        return torch.randint(output.shape[1], shape, generator=generator, device=generator.device).to(output.device)

    def target_from(self, labels: Tensor | None, output: Tensor, generator: torch.Generator) -> Tensor:
        """Labels if the model has their classes, else the classes that it predicts."""
        if output.ndim < 2:
            raise InputError(
                f"the model returns {list(output.shape)}: no classes", remedy="choose another --loss", code="FXC406"
            )
        usable = labels is not None and output.ndim == 2 and int(labels.max()) < output.shape[1]
        return labels.to(output.device) if usable and labels is not None else output.argmax(1)

    def link(self, output: Tensor) -> Tensor:
        """softmax."""
        return output.softmax(-1)

    def counts(self, target: Tensor) -> bool:
        """Whether some class index is neither ignored nor of weight zero."""
        loss = self.module
        if loss.reduction != "mean" or target.is_floating_point():
            return True
        counted = target[target != loss.ignore_index]
        if loss.weight is None or not bool(((counted >= 0) & (counted < len(loss.weight))).all()):
            return counted.numel() > 0
        return bool(loss.weight.to(counted.device)[counted].any())


def _check_classes(output: Tensor, target: Tensor) -> None:
    """Check the shape of class probabilities (the output's) or class indices (one per position)."""
    if target.is_floating_point():
        if target.shape != output.shape:
            raise InputError(
                shapes_of("class probabilities", target, output),
                remedy="give them in the output's shape",
                code="FXC407",
            )
        return
    if target.dtype != torch.int64:
        raise InputError(
            f"class indices of type {target.dtype}", remedy="give torch.int64 indices, or probabilities", code="FXC407"
        )
    if target.shape != (expected := (output.shape[0], *output.shape[2:])):
        raise InputError(
            shapes_of("class indices", target, output), remedy=f"give indices of shape {list(expected)}", code="FXC407"
        )


Classes = tuple[Tensor, Tensor | float, list[Check]]
"""The targets as q[n,c,…], smoothed and zero where ignored; the divisor of `mean`; the checks."""


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
    weight = converted(loss.weight, output)
    divisor = (onehot if weight is None else onehot * _along_classes(weight, output)).sum()
    return onehot * (1 - smoothing) + smoothing / C * counts, divisor, checks


def _along_classes(weight: Tensor, output: Tensor) -> Tensor:
    return weight.view(-1, *(1,) * (output.ndim - 2))
