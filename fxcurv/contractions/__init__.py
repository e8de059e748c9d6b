"""Contractions: the statistics that are summed over samples and columns, by definition and by cheaper equal algorithms.

`statistic.Statistic` is the interface, `definitions` the formulas, `entries` the per-sample entries that most of them
are made of. Cheaper algorithms are in `covariances`, `convolutions` and `diagonals`; `passes.select_algorithms` says
where they apply. `kernels` and `triton_kernels` are fused kernels. Imports go to `fxcurv.blocks` and the rooms below
it.
"""
