"""Quantities: the columns of the loss Hessian's factor, and the statistics that are summed from them per parameter.

quantity = factor × statistic. A quantity names its statistics for a parameter, given the parameter's usage, and
converts their sums to a result; it does not depend on layers. A new quantity is a frozen dataclass with the interface
of `protocol.Quantity` in a file of its own, and a line in `registry`. `selection` maps quantities to the parameters
that they are requested for, `plan` lists the results made from the sums. Imports go to `fxcurv.results` and the rooms
below it.
"""

DENSE_LIMIT = 8192
"""Maximum side of the dense block that replaces a Kronecker form for parameters without one."""
