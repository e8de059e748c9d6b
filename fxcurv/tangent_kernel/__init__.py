"""The empirical neural tangent kernel, its tiles under a memory budget, and the linearized model.

Imports go to `fxcurv.api` and the rooms below it.
"""
