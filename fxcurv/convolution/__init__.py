"""Convolutions: their patches, and the second moment Σ x xᵀ of the patches by three equal algorithms.

`patches` is the geometry. `second_moment` selects among `unfold` (patches as a matrix), `lag_correlation` (correlations
of the input at every offset) and `row_products` (products of rows); a new algorithm is a file with the interface of
`second_moment.Algorithm`, and an entry of its table. Imports go to `fxcurv.linalg` and `fxcurv.core`.
"""
