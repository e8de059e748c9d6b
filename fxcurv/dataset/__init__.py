"""Data sets: accumulation of batches, checkpoints, two passes for EKFAC, several processes.

Compiled models have the interface `compiled.CompiledModel`. May import from `fxcurv.runtime` and packages below it.
"""
