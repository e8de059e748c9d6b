"""Laplace: a Gaussian posterior over the weights, from the curvature of the loss at its minimum."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from fxcurv.api import Compiled
from fxcurv.core.errors import InputError
from fxcurv.frontend.inputs import Inputs
from fxcurv.linalg.operator import checked_count
from fxcurv.recipes.samples import at_weights, jacobian_of, jacobians, outputs, weights_of
from fxcurv.results.block_diagonal import BlockDiagonal
from fxcurv.results.curvature import Curvature

__all__ = ["Laplace"]


Predictive = Literal["probit", "outputs", "weights"]


class Laplace:
    """N(θ̂, (H + τI)⁻¹): θ̂ the current parameters, H the curvature of the negative log likelihood of the data.

    `result` is the result of `compiled` on the training data; for several batches, the `fxcurv.merge` of their results.
    H is its one quantity times the divisor of "mean". Only parameters with a requested quantity are random:
    `{"*": None, "head.*": "kfac"}` gives a last-layer approximation, "diag_ggn" a diagonal one. The prior is
    N(0, I/τ), τ = `prior_precision`. The mean squared error corresponds to a Gaussian of variance `noise`: its sum is
    multiplied by 1/(2·noise). (MacKay 1992, A practical Bayesian framework; Ritter et al. 2018; Daxberger et al. 2021.)
    Raises an InputError (FXC440) for a result of several quantities, for outputs `[N, C, d…]` of cross entropy, and for
    a precision or noise that is not positive.
    """

    def __init__(self, compiled: Compiled, result: Curvature, prior_precision: float = 1.0, noise: float = 1.0) -> None:
        if len(result) != 1 or result.divisor is None:
            raise InputError(
                f"a posterior of {', '.join(result)}", remedy="give a result of one quantity", code="FXC440"
            )
        for name, value in (("prior_precision", prior_precision), ("noise", noise)):
            if not 0 < value < math.inf:
                raise InputError(f"{name}={value!r}", remedy="give a finite number above 0", code="FXC440")
        if compiled.loss.has_classes and result.output.ndim != 2:
            raise InputError(
                f"classes at several positions, {list(result.output.shape)}",
                remedy="give a classifier of samples, [N, C]",
                code="FXC440",
            )
        self.compiled, self.result = compiled, result
        self.prior_precision, self.noise = float(prior_precision), float(noise)
        self.gaussian = compiled.loss.gaussian
        self.terms = float(result.divisor)
        (quantity,) = result
        self.curvature: BlockDiagonal = result.operator(quantity) * self._scale
        self.mean = weights_of(compiled, self.curvature.domain.shapes)

    @property
    def _scale(self) -> float:
        """Factor from the reduced loss to the negative log likelihood of the data."""
        return self.terms / (2 * self.noise) if self.gaussian else self.terms

    @cached_property
    def covariance(self) -> BlockDiagonal:
        """(H + τI)⁻¹."""
        return self.curvature.inverse(self.prior_precision)

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw the random parameters, for `torch.func.functional_call`."""
        drawn = self.curvature.sample(generator, self.prior_precision)
        return {name: mean + drawn[name].to(mean) for name, mean in self.mean.items()}

    # Predictions ------------------------------------------------------------------------------------------------------

    @cached_property
    def _jacobian(self) -> Compiled:
        """The model compiled for the Jacobians of the random parameters."""
        return jacobian_of(self.compiled, self.mean)

    def marginals(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Mean `[N, C]` and covariance `[N, C, C]` of the outputs, linearised in the weights: f(θ̂), J (H + τI)⁻¹ Jᵀ.

        J is `[N, C, P]`: choose a batch size for which it fits in memory. The noise of a regression is not included.
        """
        with at_weights(self.compiled.model, self.mean):
            f, J = (t.to(self.curvature.dtype) for t in jacobians(self._jacobian, self.mean, inputs))
        scaled = self.covariance.mm(J.flatten(0, 1).T).T.view_as(J)
        return f, torch.einsum("ncp,ndp->ncd", scaled, J)

    def predict(
        self,
        inputs: Inputs,
        method: Predictive = "probit",
        samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predictive probabilities `[N, C]`, E softmax(f) (sigmoid for BCE), or the mean for a regression.

        - `probit`: f linearised, softmax(f_c / √(1 + π σ_c²/8)) (MacKay 1992, The evidence framework applied to
          classification networks, eq. 10, by class);
        - `outputs`: f linearised, the mean over `samples` of N(f, J Σ Jᵀ);
        - `weights`: the mean over `samples` of the network with drawn weights.
        """
        if method not in get_args(Predictive):
            raise InputError(f"method={method!r}", remedy=f"choose one of {get_args(Predictive)}", code="FXC440")
        checked_count("samples", samples)
        if method == "weights":
            with torch.no_grad():
                drawn = (outputs(self.compiled, self.sample(generator), inputs).flatten(1) for _ in range(samples))
                return torch.stack([self.compiled.loss.link(f) for f in drawn]).mean(0)
        mean, covariance = self.marginals(inputs)
        if self.gaussian:
            return mean
        if method == "probit":
            return self.compiled.loss.link(mean / (1 + math.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt())
        values, vectors = torch.linalg.eigh(covariance)
        noise = torch.randn(samples, *mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        draws = mean + torch.einsum("ncd,snd->snc", vectors * values.clamp(min=0).sqrt().unsqueeze(1), noise)
        return self.compiled.loss.link(draws).mean(0)

    # Evidence ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _eigenvalues(self) -> Tensor:
        """Eigenvalues of H, `[P]`."""
        return self.curvature.eigvalsh().clamp(min=0)

    @property
    def _squares(self) -> float:
        """‖θ̂‖² of the random parameters."""
        return sum(float(w.square().sum()) for w in self.mean.values())

    def effective_parameters(self) -> float:
        """γ = Σ λ/(λ + τ), the number of parameters determined by the data."""
        return float((self._eigenvalues / (self._eigenvalues + self.prior_precision)).sum())

    def log_marginal_likelihood(self) -> float:
        """log p(D) ≈ log p(D|θ̂) − ½ τ‖θ̂‖² + ½ P log τ − ½ log det(H + τI) (MacKay 1992).

        Exact for a linear model with Gaussian noise whose θ̂ is the maximum of the posterior.
        """
        fit = -self._scale * float(self.result.loss)
        if self.gaussian:
            entries = self.terms if self.result.reduction == "mean" else self.result.output.numel()
            fit -= entries / 2 * math.log(2 * math.pi * self.noise)
        tau, count = self.prior_precision, len(self._eigenvalues)
        volume = count * math.log(tau) - float((self._eigenvalues + tau).log().sum())
        return fit - tau * self._squares / 2 + volume / 2

    def tuned(self, steps: int = 1000) -> Laplace:
        """Return a copy with the prior precision that maximizes the marginal likelihood at fixed θ̂.

        There τ = γ(τ)/‖θ̂‖². The fixed point is found by iteration (MacKay 1992) from the current τ.
        """
        tau, squares, values = self.prior_precision, max(self._squares, 1e-30), self._eigenvalues
        for _ in range(steps):
            last, tau = tau, max(float((values / (values + tau)).sum()) / squares, 1e-30)
            if abs(tau - last) <= 1e-12 * tau:
                break
        return Laplace(self.compiled, self.result, tau, self.noise)
