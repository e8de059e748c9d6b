"""Verification: the graph of a program is compared with the model before its numbers are used.

`guard` decides when and compares outputs, gradients and samples; `graph` evaluates the canonical graph, `batches` makes
the batches, `tolerances` says when two results are equal, and `diagnosis` turns a difference into an error with the
likely cause. A new cause is a row of `diagnosis.CAUSES`. Imports go to `fxcurv.runtime` and the rooms below it.
"""
