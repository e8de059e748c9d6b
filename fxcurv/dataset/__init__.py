"""Data sets: batches accumulated into one result, checkpoints, two passes for EKFAC, several processes.

Compiled models are seen through `compiled.CompiledModel`. Imports go to `fxcurv.runtime` and the rooms below it.
"""
