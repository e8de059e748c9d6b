"""Linear algebra: factorizations, matrix products, allocation of large results, the cost model, linear operators.

A new factorization goes to `factorizations`, with an error that names the matrix that failed; the cost of a computation
is a `cost.Cost`. Imports go to `fxcurv.core` alone.
"""
