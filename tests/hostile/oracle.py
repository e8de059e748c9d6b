"""The oracle: the gradients that the model's own `backward()` leaves on its parameters, by sample and output.

Each backward pass has a model of its own, built from the source, so that no call sees what another one left behind. A
model has no values, and must be refused, if its output is random, if the output or the gradient of a sample depends on
other samples, or if the gradient is not linear in the cotangent. Hooks that run after a gradient is accumulated, for
example an optimizer's, are removed first. Imports nothing of fxcurv.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import reference
import torch
from torch import Tensor, nn

from hostile.cases import Case, data, load, phases, quantities, source

__all__ = ["Answer", "answers"]

Rows = dict[str, Tensor]

FAR = 1e-7
"""Relative difference above which two values that should be equal are different."""


@dataclass(frozen=True)
class Answer:
    """The values of a call by quantity and parameter, or the reason why it must be refused.

    `reached` are the parameters with a gradient that is not zero, `trainable` those that require one. `single` are the
    weights whose Kronecker factors are exact.
    """

    refusal: str = ""
    values: dict[str, Rows] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    reached: tuple[str, ...] = ()
    single: tuple[str, ...] = ()


class Refusal(Exception):
    """There is no value."""


def answers(case: Case, text: str | None = None) -> dict[tuple[int, int], Answer]:
    """The answer to every call of a case, by phase and size of batch."""
    assert "fxcurv" not in sys.modules, "the oracle runs without fxcurv"
    text = text or source(case)
    return {(phase, batch): _answer(Call(case, text, phase, batch)) for phase, batch in phases(case)}


def _answer(call: Call) -> Answer:
    try:
        call.check_chance()
        call.check_samples()
        J = call.jacobian()
        call.check_gradients(J)
        return call.answer(J)
    except Refusal as refusal:
        return Answer(str(refusal))


@dataclass(frozen=True)
class Call:
    """One call of the model of a case, after the change of state if `phase` is 1."""

    case: Case
    text: str
    phase: int
    batch: int

    @cached_property
    def batch_data(self) -> tuple[Tensor, Tensor]:
        """x and y."""
        return data(self.case, self.batch, self.loss)

    @cached_property
    def loss(self) -> nn.Module:
        """The loss."""
        return load(self.text).loss().double()

    @cached_property
    def generator(self) -> torch.Generator:
        """Random numbers that do not depend on global state."""
        return torch.Generator().manual_seed(self.batch)

    def model(self, seed: int = 0) -> nn.Module:
        """The model in this state; global random numbers begin at `seed`."""
        known = self.__dict__.get("built")
        if known is None:
            module = load(self.text)
            _seed(0)
            known = module.build()
            if self.phase:
                module.change(known, data(self.case, 3, self.loss)[0])
            if self.case.row.reuse:
                self.__dict__["built"] = known
        for p in known.parameters():
            p.grad = None
            (getattr(p, "_post_accumulate_grad_hooks", None) or {}).clear()
        _seed(seed)
        return known

    def output(self, x: Tensor, seed: int = 0) -> Tensor:
        """The output, with gradients enabled."""
        try:
            f = self.model(seed)(x.clone())
        except Exception as error:
            raise Refusal(f"the model raises {type(error).__name__}: {error}") from error
        if len(f) != len(x):
            raise Refusal("the output has other samples than the input")
        return f

    def pulled(self, x: Tensor, cotangent: Tensor, seed: int = 0) -> Rows:
        """The gradients that `backward` leaves for a cotangent; zero where there is none."""
        model = self.model(seed)
        try:
            model(x.clone()).backward(cotangent)
        except Exception as error:
            raise Refusal(f"backward raises {type(error).__name__}: {error}") from error
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().detach().clone().as_subclass(Tensor)
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    def jacobian(self) -> Rows:
        """J[n, c, *θ], one backward pass of the whole batch for each sample and output."""
        x, _ = self.batch_data
        f = self.output(x)
        units = torch.eye(f.numel(), dtype=f.dtype).view(f.numel(), *f.shape)
        rows = [self.pulled(x, unit) for unit in units]
        return {name: torch.stack([row[name] for row in rows]).unflatten(0, (len(x), -1)) for name in rows[0]}

    # Trials ---------------------------------------------------------------------------------------------------------

    def check_chance(self) -> None:
        """The output is the same whatever global random numbers are."""
        x, _ = self.batch_data
        first = self.output(x)
        if not all(torch.equal(self.output(x, seed), first) for seed in range(1, 5)):
            raise Refusal("the output is random")

    def check_samples(self) -> None:
        """The output of a sample is the same whatever the other samples are."""
        x, _ = self.batch_data
        f = self.output(x)
        for other in self.others() if len(x) > 1 else ():
            kept = torch.rand(len(x), generator=self.generator) < 0.5
            kept[int(torch.randint(len(x), (), generator=self.generator))] = True
            mixed = torch.where(kept.view(-1, *(1,) * (x.ndim - 1)), x, other)
            if _far(self.output(mixed)[kept], f[kept]):
                raise Refusal("the samples mix")

    def others(self) -> list[Tensor]:
        """Batches to take other samples from: random ones of several sizes, sorted, reversed, equal and zero."""
        x, _ = self.batch_data
        draws = [s * torch.randn(x.shape, generator=self.generator, dtype=x.dtype) for s in (0.3, 1, 1, 1, 3, 10)]
        ordered = draws[1][draws[1].flatten(1).sum(1).argsort()]
        return [*draws, draws[2] + 5, draws[2] - 5, ordered, ordered.flip(0), x.flip(0), x[:1].expand_as(x), 0 * x]

    def check_gradients(self, J: Rows) -> None:
        """The gradient is linear in the cotangent, not random, and of a sample the same whatever the others are."""
        x, _ = self.batch_data
        v = torch.randn(len(x), 3, generator=self.generator, dtype=x.dtype)
        whole = {name: torch.einsum("nc...,nc->...", rows, v) for name, rows in J.items()}
        for seed, scale in enumerate((1.0, -1.0, 1e3, 1e-3)):
            found = self.pulled(x, scale * v, seed)
            if any(_far(found[name] / scale, u) for name, u in whole.items()):
                raise Refusal("the backward pass is not linear, or random")
        for k, other in enumerate(self.others()[::2] if len(x) > 1 else ()):
            n = k % len(x)
            mixed, unit = other.clone(), torch.zeros_like(v)
            mixed[n], unit[n] = x[n], v[n]
            found = self.pulled(mixed, unit)
            if any(_far(found[name], torch.einsum("c...,c->...", rows[n], v[n])) for name, rows in J.items()):
                raise Refusal("the gradients of the samples mix")

    # Values -----------------------------------------------------------------------------------------------------------

    def answer(self, J: Rows) -> Answer:
        """The quantities, from the gradients of all samples and outputs."""
        (x, y), loss = self.batch_data, self.loss
        f = self.output(x).detach()
        leaf = f.clone().requires_grad_()
        slope = torch.autograd.grad(loss(leaf, y), leaf)[0]
        pulled = reference.pulled(J, reference.exact_columns(lambda g, t: loss(g, t), f, y))
        by_name: dict[str, Callable[[], Rows]] = {
            "grad": lambda: {name: torch.einsum("nc...,nc->...", rows, slope) for name, rows in J.items()},
            "batch_grad": lambda: {name: torch.einsum("nc...,nc->n...", rows, slope) for name, rows in J.items()},
            "diag_ggn": lambda: {name: u.square().sum((0, 1)) for name, u in pulled.items()},
            "kflr": lambda: {name: reference.outer(u) for name, u in pulled.items()},
            "diag_hessian": lambda: self.diag_hessian(),
        }
        return Answer(
            values={name: by_name[name]() for name in quantities(self.case)},
            trainable=tuple(J),
            reached=tuple(name for name, rows in J.items() if rows.any()),
            single=tuple(name for name, rows in J.items() if len(x) == 1 and _one_position(rows[0])),
        )

    def diag_hessian(self) -> Rows:
        """∂²L/∂θ², by a second backward pass through the first."""
        (x, y), model = self.batch_data, self.model()
        self.loss(model(x.clone()), y).backward(create_graph=True)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        first = {name: p.grad for name, p in parameters.items()}
        try:
            return {name: _second(p, first[name]) for name, p in parameters.items()}
        except RuntimeError as error:
            raise Refusal(f"there is no second derivative: {error}") from error


def _second(p: nn.Parameter, first: Tensor | None) -> Tensor:
    """The diagonal, by a `backward` of each entry: `autograd.grad` leaves out what refuses to be differentiated."""
    entries: list[Tensor] = []
    for k in range(p.numel()):
        p.grad = None
        if first is not None and first.requires_grad:
            first.flatten()[k].backward(retain_graph=True)
        entries.append(p.new_zeros(()) if p.grad is None else p.grad.flatten()[k].detach())
    return torch.stack(entries).view_as(p)


def _one_position(rows: Tensor) -> bool:
    """Whether a weight's gradients `[c, o, i]` are those of a single linear use: all have one row space."""
    return rows.ndim == 3 and int(torch.linalg.matrix_rank(rows.flatten(0, 1), rtol=1e-10)) <= 1


def _far(found: Tensor, expected: Tensor) -> bool:
    scale = max(float(expected.abs().max()), 1e-3) if expected.numel() else 0.0
    return not bool(((found - expected).abs() <= FAR * scale).all())


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also asks for every other device, and takes long
    random.seed(seed)
    np.random.seed(seed)
