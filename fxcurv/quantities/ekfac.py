"""EKFAC: the eigenbases of Kronecker factors, and the diagonal of the exact block in them, from a second pass.

The bases are computed from the factors of a batch, or given, from a whole data set (fxcurv/dataset/two_passes.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxcurv.blocks.base import Block
from fxcurv.blocks.diagonal import Diagonal
from fxcurv.blocks.eigenbasis import Eigenbasis
from fxcurv.blocks.lazy_gram import formed, moment_of
from fxcurv.contractions.definitions import InputCovariance, RotatedDiagonal
from fxcurv.contractions.statistic import Statistic, StatisticValue
from fxcurv.linalg.factorizations import decomposed
from fxcurv.quantities.factors import Factor
from fxcurv.quantities.kfac import KFAC
from fxcurv.quantities.plan import Job
from fxcurv.quantities.protocol import ParameterUsage, Sums
from fxcurv.results.entry import Combine, Structure

__all__ = ["EKFAC", "Bases", "Eigenvalues", "bases", "diagonalized", "eigenvectors", "rotated"]


@dataclass(frozen=True)
class EKFAC(KFAC):
    """(U_G ⊗ U_A) diag(Λ) (U_G ⊗ U_A)ᵀ with Λ = Σ_vn (U_Gᵀ J_vn U_A)², an `Eigenbasis` (George et al. 2018).

    U_A, U_G are the eigenvectors of KFAC's A and G, with KFAC's `approx` and `joint`; J = Σ_s S xᵀ. Of all blocks with
    these eigenvectors it is the nearest to the exact one (in Frobenius norm), and has the same trace. It backpropagates
    each column twice, and takes two passes over a data set (`Compiled.accumulate`). Parameters without a Kronecker form
    have KFAC's blocks. Where eigenvalues of A or G coincide (with "reduce" and few samples, at 0) the basis and the
    block are not unique; the trace is.
    """

    structure: ClassVar[Structure] = "block"
    combine: ClassVar[Combine] = "refuse"
    family: str = field(default="ekfac", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return {**super().statistics(usage), **self._second(usage)}

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Block:
        if "eigenvalues" not in sums:
            return super().finish(usage, sums, samples)
        U_A, U_G, values = (formed(sums[name]) for name in ("A", "G", "eigenvalues"))
        values = values.view(len(U_A), U_G.shape[-1], U_A.shape[-1])
        return Eigenbasis(self._shape(usage), U_A, U_G, values, in_out=usage.in_out)

    def _second(self, usage: ParameterUsage) -> dict[str, Statistic]:
        """The statistics of the second pass."""
        A = KFAC.statistics(self, usage).get("A")
        return {"eigenvalues": RotatedDiagonal(A.ones)} if isinstance(A, InputCovariance) else {}


@dataclass(frozen=True)
class Eigenvalues(EKFAC):
    """Λ alone, in given bases (`Bases`), `[g,o,i]`: a `Diagonal` in them, which adds over batches."""

    structure: ClassVar[Structure] = "block"
    combine: ClassVar[Combine] = "add"

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return self._second(usage)

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Block:
        values = formed(sums["eigenvalues"])
        return Diagonal(self._shape(usage), values.reshape(self._shape(usage)))


# The second pass ----------------------------------------------------------------------------------------------------


def rotated(jobs: Iterable[Job]) -> Iterator[tuple[Job, str, RotatedDiagonal]]:
    """Yield the jobs with a sum in the eigenbases of other sums (second pass), its name and statistic."""
    for job in jobs:
        for name, statistic in job.quantity.statistics(job.usage).items():
            if isinstance(statistic, RotatedDiagonal):
                yield job, name, statistic


def bases(jobs: Iterable[Job], job: Job) -> tuple[str, str]:
    """The names of U_A and U_G of one of these jobs, as inputs of the second pass of their factor."""
    number = next(n for n, other in enumerate(jobs) if other is job)
    return f"eigenvectors_{number}_A", f"eigenvectors_{number}_G"


def eigenvectors(value: StatisticValue, what: str = "the factor") -> Tensor:
    """The eigenvectors of a factor `[g,d,d]`, in columns; `what` names it in errors."""
    return decomposed(torch.linalg.eigh, moment_of(value).dense(), what)[1]


@dataclass(frozen=True)
class Bases:
    """U_A `[g,i,i]` and U_G `[g,o,o]` of every block, by its quantity and parameters, for a separate second pass.

    `factors` are the factors of the first pass in order, whose columns are drawn again from the same state.
    """

    vectors: Mapping[tuple[str, tuple[str, ...]], tuple[Tensor, Tensor]]
    factors: tuple[Factor, ...]


def diagonalized(
    jobs: Iterable[Job], factor: Factor, sums: dict[str, StatisticValue], given: Bases | None
) -> dict[str, Tensor]:
    """Eigenvectors `[g,d,d]` as inputs of the second pass: given ones, else of the sums A and G, replacing these."""
    jobs, found = [job for job in jobs if job.quantity.factor == factor], dict[str, Tensor]()
    for job, _, _ in rotated(jobs):
        for k, (kind, name) in enumerate(zip("AG", bases(jobs, job), strict=True)):
            if given is not None:
                found[name] = given.vectors[job.name, job.parameters][k]
                continue
            found[name] = sums[job.sums[kind]] = eigenvectors(
                sums[job.sums[kind]], f"the factor {kind} of {job.usage.name!r}"
            )
    return found
