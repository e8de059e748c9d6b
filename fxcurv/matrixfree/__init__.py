"""Matrix-free operators: products with curvature matrices and Jacobians over a data set, and estimates from products.

A new operator is a function in `products`; an estimate for any operator goes to `estimates`. Imports go to
`fxcurv.runtime` and the rooms below it.
"""
