"""The plan: the results to make, and their sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.blocks.base import Block
from fxcurv.contractions.statistic import Statistic, StatisticValue
from fxcurv.core.errors import FxcurvError, QuantityError, a_value
from fxcurv.core.fingerprint import Fingerprint
from fxcurv.quantities.protocol import ParameterUsage, Quantity, facts_of, owners

__all__ = ["Job", "Plan", "jobs_for"]


@dataclass(frozen=True)
class Job:
    """One result to assemble: a quantity of a parameter (and of those joined to it), from sums by their names.

    `fallback` says that the sums come from plain autograd.
    """

    name: str
    quantity: Quantity
    usage: ParameterUsage
    parameters: tuple[str, ...]
    sums: Mapping[str, str]
    fallback: bool = False

    @property
    def status(self) -> str:
        """`exact` or `fallback`, or `approx(<name>)`, … where the result differs from the definition."""
        approximation = self.quantity.approximation(self.usage)
        if approximation:
            return f"{'fallback' if self.fallback else 'approx'}({approximation})"
        return "fallback" if self.fallback else "exact"

    def finished(
        self, sums: Mapping[str, StatisticValue], samples: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> Tensor | Block:
        """The result of the quantity; a QuantityError (FXC409) if it is not a value of the quantity's structure."""
        value: Any = self.quantity.finish(self.usage, dict(sums), samples)
        cause, remedy = self._mistake(value, shapes)
        if cause:
            raise QuantityError(
                f"{type(self.quantity).__name__}.finish returned {cause}",
                node=f"{self.name} of {self.usage.name!r}",
                remedy=remedy,
                code="FXC409",
            )
        return value

    def _mistake(self, value: object, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
        """Describe a wrong result, and the remedy; empty if it is right."""
        structure = facts_of(self.quantity)["structure"]
        shape, numel = shapes[self.usage.name], sum(math.prod(shapes[name]) for name in self.parameters)
        if isinstance(value, Block):
            if structure in ("vector", "diagonal"):
                return (
                    f"a {type(value).__name__} block",
                    f"return a tensor, or set structure='block', not {structure!r}",
                )
            remedy = f"give the block the shape of the parameter, {list(shape)}"
            return (f"a block on {list(value.shape)}", remedy) if value.numel != numel else ("", "")
        if not isinstance(value, Tensor):
            return a_value(value), "return a tensor or a block"
        if structure == "block":
            return "a tensor", "return a block, or set another structure"
        if value.layout != torch.strided or value.is_complex():
            return f"a tensor of type {value.dtype}, {value.layout}", "return a dense real tensor"
        if structure == "array":
            return "", ""
        if value.shape != shape or len(self.parameters) > 1:
            return f"a tensor of shape {list(value.shape)}", f"return one of {list(shape)}, or set structure='array'"
        return ("", "") if value.is_floating_point() else (f"a tensor of type {value.dtype}", "return floating point")


def jobs_for(
    quantities: Mapping[str, Quantity], usage: Mapping[str, Mapping[str, ParameterUsage]], fallback: bool = False
) -> tuple[Job, ...]:
    """One job for each result; `used[quantity]` has the usage of the parameters that the quantity is requested for."""
    return tuple(
        Job(
            name,
            quantities[name],
            described[owner],
            parameters,
            _sums(name, quantities[name], described[owner]),
            fallback,
        )
        for name, described in usage.items()
        for owner, parameters in owners(quantities[name], described).items()
    )


def _sums(name: str, quantity: Quantity, usage: ParameterUsage) -> dict[str, str]:
    """Maps the statistics that a quantity needs for a parameter to the names of their sums."""
    statistics: Any = quantity.statistics(usage)
    if not isinstance(statistics, Mapping) or not all(isinstance(s, Statistic) for s in statistics.values()):
        raise QuantityError(
            f"{type(quantity).__name__}.statistics returned {a_value(statistics)}",
            node=f"{name} of {usage.name!r}",
            remedy="return a dict of Statistic modules by name",
            code="FXC409",
        )
    return {statistic: f"{name}.{usage.name}.{statistic}" for statistic in quantity.statistics(usage)}


@dataclass(frozen=True)
class Plan:
    """The results to make from sums: the jobs, and `statuses[quantity][parameter]` with or without a job.

    `refusals` has the reason for each parameter that is `unsupported` or `fallback`.
    """

    jobs: tuple[Job, ...]
    quantities: Mapping[str, Quantity]
    statuses: Mapping[str, Mapping[str, str]]
    shapes: Mapping[str, tuple[int, ...]]
    refusals: Mapping[str, FxcurvError]
    fingerprint: Fingerprint

    @classmethod
    def of(
        cls,
        model: nn.Module,
        quantities: Mapping[str, Quantity],
        asked: Mapping[str, Sequence[str]],
        jobs: tuple[Job, ...],
        refusals: Mapping[str, FxcurvError],
    ) -> Plan:
        """The plan of the jobs for a model; `asked[quantity]` are the parameters that the quantity is requested for."""
        parameters = dict(model.named_parameters())
        statuses = {
            quantity: {name: _without_job(parameters[name], name in refusals) for name in names}
            for quantity, names in asked.items()
        }
        for job in jobs:
            statuses[job.name] |= dict.fromkeys(job.parameters, job.status)
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        return cls(jobs, quantities, statuses, shapes, refusals, Fingerprint.of(model))


def _without_job(parameter: nn.Parameter, refused: bool) -> str:
    return "frozen" if not parameter.requires_grad else "unsupported" if refused else "unreached"
