"""The plan: the results to make, and their sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fxcurv.core.errors import FxcurvError
from fxcurv.core.fingerprint import Fingerprint
from fxcurv.quantities.protocol import ParameterUsage, Quantity, owners

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
