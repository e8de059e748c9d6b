"""Quantities: the columns of the loss Hessian's factor, and the statistics that are summed from them per parameter.

quantity = factor × statistic. A quantity names the statistics that it needs of a parameter, given how the parameter
is used, and turns their sums into a result; it knows nothing about layers. A new quantity is a frozen dataclass with
the interface of `protocol.Quantity` in a file of its own, and a line in `registry`. `selection` says which quantities
are asked of which parameter, `plan` what is made of the sums. Imports go to `fxcurv.results` and the rooms below it.
"""

DENSE_LIMIT = 8192
"""Side of the largest dense block that stands in where a parameter has no Kronecker form."""
