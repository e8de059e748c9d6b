"""Losses: the terms of a loss at outputs and targets, and the columns S with Σ_v S_v S_vᵀ = ∇²loss for every factor.

Imports go to `fxcurv.quantities` and the rooms below it; the room does not see `fxcurv.frontend`.
"""
