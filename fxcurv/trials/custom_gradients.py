"""Trials of a custom gradient: whether a pullback is the transpose of a Jacobian of each sample.

A backward may be any function. It is used as a pullback only if it is linear in the cotangent, tried on random
cotangents of several scales, and if a batch gives for every sample what the sample gives alone, tried at several batch
sizes. Otherwise per-sample curvature is undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcurv.core.rounding import close
from fxcurv.core.shapes import Samples
from fxcurv.ir.custom_gradients import CustomCall

__all__ = ["Trial", "nonlinearity", "undifferentiable"]


SIZES = (3, 2, 5)
"""Batch sizes of the trials."""


@dataclass(frozen=True)
class Trial:
    """A call with the position of the samples in its inputs, and in those of its outputs that are used.

    `draw` returns random inputs for a batch size; `ks` are the inputs that need a gradient.
    """

    call: CustomCall
    draw: Callable[[int], list[Tensor]]
    ks: Sequence[int]
    inputs: Sequence[Samples | None]
    outputs: Mapping[int, Samples | None]
    generator: torch.Generator

    def fault(self) -> str | None:
        """Return why the pullback has no Jacobian of each sample, or None."""
        for size in SIZES if any(self.outputs.values()) else SIZES[:1]:
            xs = self.draw(size)
            ys = self.call.run(xs)
            like = {j: ys[j] for j in self.outputs if self.call.differentiable[j]}
            if not like:
                return None
            if why := nonlinearity(lambda Ss, xs=xs: self.call.pull(xs, self.ks, Ss), like, self.generator):
                return why
            if any(self.outputs.values()) and (why := self._mixing(xs, ys, size)):
                return why
        return None

    def _mixing(self, xs: list[Tensor], ys: list[Tensor], size: int) -> str | None:
        """Return how a batch differs from its samples alone, or None."""
        Ss = _random({j: ys[j] for j in self.outputs if self.call.differentiable[j]}, self.generator)
        whole, alone = self.call.pull(xs, self.ks, Ss), list[list[Tensor]]()
        for n in range(size):
            own = [_of_sample(x, place, n) for x, place in zip(xs, self.inputs, strict=True)]
            outputs = self.call.run(own)
            for j, place in self.outputs.items():
                if not _alike(outputs[j], _of_sample(ys[j], place, n)):
                    return f"of {size} samples, one has another output than alone, so samples mix"
            alone.append(self.call.pull(own, self.ks, {j: _of_sample(S, self.outputs[j], n) for j, S in Ss.items()}))
        for index, k in enumerate(self.ks):
            each, place = [pulled[index] for pulled in alone], self.inputs[k]
            same = (
                _alike(torch.stack(each).sum(0), whole[index])
                if place is None
                else all(_alike(one, _of_sample(whole[index], place, n)) for n, one in enumerate(each))
            )
            if not same:
                return f"of {size} samples, one has another gradient than alone, so its backward mixes samples"
        return None


def nonlinearity(
    pull: Callable[[dict[int, Tensor]], Sequence[Tensor]], like: Mapping[int, Tensor], generator: torch.Generator
) -> str | None:
    """Return how a function of cotangents, each shaped like a tensor of `like`, is not linear, or None."""
    S, T = _random(like, generator), _random(like, generator)
    at_S, at_T = pull(S), pull(T)
    if any(bool(p.abs().max() > 0) for p in pull({j: torch.zeros_like(t) for j, t in S.items()}) if p.numel()):
        return "its backward of zero is not zero"
    if not all(_alike(a, b) for a, b in zip(pull(S), at_S, strict=True)):
        return "its backward gives different results for equal gradients"
    both = pull({j: S[j] + T[j] for j in S})
    if not all(_alike(p, a + b) for p, a, b in zip(both, at_S, at_T, strict=True)):
        return "its backward is not linear in the gradient"
    half = any(t.dtype == torch.float16 for t in like.values())
    for scale in (-1.0, 1e-2, 1e2) if half else (-1.0, 1e-9, 1e-3, 1e3, 1e12):
        scaled = pull({j: scale * t for j, t in S.items()})
        if not all(_alike(p / scale, a) for p, a in zip(scaled, at_S, strict=True)):
            return "its backward is not linear in the gradient"
    return None


def undifferentiable(
    pull: Callable[[dict[int, Tensor]], Sequence[Tensor]], like: Mapping[int, Tensor], generator: torch.Generator
) -> str | None:
    """Return why autograd cannot differentiate a linear function of cotangents, or None.

    The derivative of ⟨w, Bg⟩ in g is Bᵀw, so its product with g is ⟨w, Bg⟩ again.
    """
    with torch.enable_grad():
        S = {j: t.requires_grad_() for j, t in _random(like, generator).items()}
        try:
            pulled = pull(S)
            w = _random(dict(enumerate(pulled)), generator)
            value = sum(((p * w[k]).sum() for k, p in enumerate(pulled)), torch.zeros(()))
            size = sum(float((p.detach() * w[k]).norm()) for k, p in enumerate(pulled))
            if not value.requires_grad:
                return NO_GRAPH if bool(value != 0) else None
            back: Any = torch.autograd.grad(value, list(S.values()), allow_unused=True)
        except RuntimeError as error:
            return f"differentiating its backward fails: {str(error).splitlines()[0]}"
    reached = [(b * t.detach()).sum() for b, t in zip(back, S.values(), strict=True) if b is not None]
    again, value = sum(reached, torch.zeros(())), value.detach()
    if _alike(again.to(value), value, size):
        return None
    return "the derivative of its backward is another function" if reached else NO_GRAPH


NO_GRAPH = "its backward is computed without a graph, as under @once_differentiable"


def _random(like: Mapping[int, Tensor], generator: torch.Generator) -> dict[int, Tensor]:
    return {j: torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=generator) for j, t in like.items()}


def _alike(value: Tensor, expected: Tensor, floor: float = 0.0) -> bool:
    """Whether two results of a backward are equal up to rounding."""
    if not expected.is_floating_point():
        return torch.equal(value, expected)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(expected.dtype, 8 * torch.finfo(expected.dtype).eps)
    return close(value, expected, tolerance, floor)


def _of_sample(x: Tensor, place: Samples | None, n: int) -> Tensor:
    """A batch of one: sample n of x, at its position along the axis; x itself if it is shared by all samples."""
    if place is None:
        return x
    size = x.shape[place.axis] // place.parts
    at = torch.arange(x.shape[place.axis], device=x.device).view(place.outer, size, place.inner)[:, n]
    return x.index_select(place.axis, at.flatten())
