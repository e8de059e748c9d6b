"""What compiling produces: the graph of every stage, and the plan of the results to make of their sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import Tensor, fx, nn

from fxcurv.choice import Choice
from fxcurv.contractions import Statistic
from fxcurv.errors import FxcurvError
from fxcurv.fingerprint import Fingerprint
from fxcurv.quantities import Factor, Quantity, Used, owners
from fxcurv.spec import module_of

__all__ = ["Job", "Plan", "Program", "jobs_for", "sums_of"]


@dataclass(frozen=True)
class Job:
    """One result to assemble: a quantity of a parameter (and of what is joined to it), from sums by their names.

    `fallback` says that the sums come from plain autograd.
    """

    name: str
    quantity: Quantity
    used: Used
    parameters: tuple[str, ...]
    sums: Mapping[str, str]
    fallback: bool = False

    @property
    def status(self) -> str:
        """`exact` or `fallback`, or where something else than the definition is reported `approx(<name>)`, …"""
        approximation = self.quantity.approximation(self.used)
        if approximation:
            return f"{'fallback' if self.fallback else 'approx'}({approximation})"
        return "fallback" if self.fallback else "exact"


def jobs_for(
    quantities: Mapping[str, Quantity], used: Mapping[str, Mapping[str, Used]], fallback: bool = False
) -> tuple[Job, ...]:
    """One job for each result; `used[quantity]` describes the parameters of which the quantity is asked."""
    return tuple(
        Job(
            name,
            quantities[name],
            described[owner],
            parameters,
            _sums(name, quantities[name], described[owner]),
            fallback,
        )
        for name, described in used.items()
        for owner, parameters in owners(quantities[name], described).items()
    )


def _sums(name: str, quantity: Quantity, used: Used) -> dict[str, str]:
    """The statistics that a quantity needs of a parameter, and the names of their sums."""
    return {statistic: f"{name}.{used.name}.{statistic}" for statistic in quantity.statistics(used)}


@dataclass(frozen=True)
class Plan:
    """What is made of sums: the jobs, and `statuses[quantity][parameter]` with or without a job.

    `refusals` says of each parameter that is `unsupported` or `fallback` why.
    """

    jobs: tuple[Job, ...]
    quantities: Mapping[str, Quantity]
    statuses: Mapping[str, Mapping[str, str]]
    shapes: Mapping[str, tuple[int, ...]]
    refusals: Mapping[str, FxcurvError]
    fingerprint: Fingerprint

    @classmethod
    def of(cls, model: nn.Module, choice: Choice, jobs: tuple[Job, ...], refusals: Mapping[str, FxcurvError]) -> Plan:
        """The plan of the jobs for a model, in which every parameter that a quantity is asked of has a status."""
        parameters = dict(model.named_parameters())
        statuses = {
            quantity: {name: _without_job(parameters[name], name in refusals) for name in names}
            for quantity, names in choice.of(model).items()
        }
        for job in jobs:
            statuses[job.name] |= dict.fromkeys(job.parameters, job.status)
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        return cls(jobs, choice.quantities, statuses, shapes, refusals, Fingerprint.of(model))


def _without_job(parameter: nn.Parameter, refused: bool) -> str:
    return "frozen" if not parameter.requires_grad else "unsupported" if refused else "unreached"


@dataclass(frozen=True, eq=False)
class Program:
    """A model compiled for quantities.

    `forward(*inputs)` returns the output, what the pullback keeps, and sums over inputs; `backwards[factor](S, **kept)`
    returns sums over a chunk of columns; `plan` says what is made of them. Both are those of the `stages`, as a backend
    runs them. A factor that is taken `Again` has a backward graph of its own, which is given eigenvectors besides.
    """

    stages: Mapping[str, fx.GraphModule]
    forward: Callable[..., Any]
    backwards: Mapping[Factor, Callable[..., dict[str, Tensor]]]
    plan: Plan

    @cached_property
    def statistics(self) -> dict[str, Statistic]:
        """What computes each sum."""
        sums = (item for gm in self.graphs for item in sums_of(gm).items())
        return {key: cast(Statistic, module_of(node)) for key, node in sums}

    @property
    def graphs(self) -> tuple[fx.GraphModule, ...]:
        """The graphs that run: forward, and one backward graph per factor, two where a factor is taken again."""
        return self.stages["forward"], *(self.stages[f"backward[{factor}]"] for factor in self.backwards)

    @property
    def canonical(self) -> fx.GraphModule:
        """The model's computation, as modules of the vocabulary."""
        return self.stages["canonical"]

    def given(self, factor: Factor) -> dict[str, tuple[int, ...] | None]:
        """What the backward graph of a factor reads besides S, in order: eigenvectors with their shapes, and `kept`."""
        _, *rest = self.stages[f"backward[{factor}]"].graph.find_nodes(op="placeholder")
        return {str(node.target): node.meta.get("eigenvectors") for node in rest}

    def kept(self, factor: Factor) -> list[str]:
        """What the backward graph of a factor reads of what the forward graph keeps."""
        return [name for name, eigenvectors in self.given(factor).items() if eigenvectors is None]


def sums_of(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The sums that a forward or backward graph returns, by name."""
    returned: Any = gm.graph.output_node().args[0]
    return dict(returned if isinstance(returned, dict) else returned[2])
