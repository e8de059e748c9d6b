"""Optimizers that precondition gradients with curvature.

Imports go to `fxcurv.api` and the rooms below it.
"""
