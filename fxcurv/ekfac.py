"""EKFAC: the eigenbases of Kronecker factors, and the diagonal of the exact block in them, found in a second pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxcurv.blocks import Block, Eigenbasis
from fxcurv.contractions import InputCovariance, RotatedDiagonal, Statistic, Sum
from fxcurv.moments import moment_of
from fxcurv.quantities import KFAC, Factor, Sums, Used

if TYPE_CHECKING:
    from fxcurv.program import Job

__all__ = ["EKFAC", "bases", "diagonalized", "rotated"]


@dataclass(frozen=True)
class EKFAC(KFAC):
    """(U_G ⊗ U_A) diag(Λ) (U_G ⊗ U_A)ᵀ with Λ = Σ_vn (U_Gᵀ J_vn U_A)², an `Eigenbasis` (George et al. 2018).

    U_A, U_G are the eigenvectors of KFAC's A and G, `approx` and `joint` are KFAC's too; J = Σ_s S xᵀ. Of all blocks
    with these eigenvectors it is the nearest to the exact one (in Frobenius norm), whose trace it has. It takes each
    column back twice. Parameters without a Kronecker form have KFAC's blocks. Where eigenvalues of A or G coincide (of
    "reduce" with few samples, at 0) the basis is not unique, and with it the block; its trace is.
    """

    family: str = field(default="ekfac", init=False, repr=False)

    def statistics(self, used: Used) -> dict[str, Statistic]:
        found = super().statistics(used)
        A = found.get("A")
        return found if not isinstance(A, InputCovariance) else {**found, "eigenvalues": RotatedDiagonal(A.ones)}

    def finish(self, used: Used, sums: Sums, samples: int) -> Block:
        if "eigenvalues" not in sums:
            return super().finish(used, sums, samples)
        U_A, U_G, values = (sums[name] for name in ("A", "G", "eigenvalues"))
        assert isinstance(U_A, Tensor)
        assert isinstance(U_G, Tensor)
        assert isinstance(values, Tensor)
        o, i = U_G.shape[-1], U_A.shape[-1]
        shape = (used.groups * o, i) if i > used.inputs else used.shape
        return Eigenbasis(shape, U_A, U_G, values.view(len(U_A), o, i))


# The second pass ----------------------------------------------------------------------------------------------------


def rotated(jobs: Iterable[Job]) -> Iterator[tuple[Job, str, RotatedDiagonal]]:
    """The jobs with a sum that is taken in the eigenbases of others, in a second pass; and that sum."""
    for job in jobs:
        for name, statistic in job.quantity.statistics(job.used).items():
            if isinstance(statistic, RotatedDiagonal):
                yield job, name, statistic


def bases(jobs: Iterable[Job], job: Job) -> tuple[str, str]:
    """The names under which the second pass of a factor with these jobs takes U_A and U_G of one of them."""
    number = next(n for n, other in enumerate(jobs) if other is job)
    return f"eigenvectors_{number}_A", f"eigenvectors_{number}_G"


def diagonalized(jobs: Iterable[Job], factor: Factor, sums: dict[str, Sum]) -> dict[str, Tensor]:
    """Put eigenvectors `[g,d,d]` in the places of the sums A and G, and return them as inputs of the second pass."""
    jobs, found = [job for job in jobs if job.quantity.factor == factor], dict[str, Tensor]()
    for job, _, _ in rotated(jobs):
        for kind, name in zip("AG", bases(jobs, job), strict=True):
            found[name] = torch.linalg.eigh(moment_of(sums[job.sums[kind]]).dense()).eigenvectors
            sums[job.sums[kind]] = found[name]
    return found
