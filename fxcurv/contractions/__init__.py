"""Contractions: statistics summed over samples and columns, by definition and by cheaper equal algorithms.

`statistic.Statistic` is the interface, `definitions` the formulas, `entries` the per-sample entries that most of them
use. Cheaper algorithms are in `covariances`, `convolutions` and `diagonals`; `passes.select_algorithms` selects them
where they apply. `kernels` and `triton_kernels` are fused kernels. Imports go to `fxcurv.blocks` and the rooms below
it.
"""
