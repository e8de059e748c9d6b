"""testing: assertions for a test suite, and checkers of rules, quantities, losses and compiled models.

`assert_compatible` is for models. `check_rule`, `check_quantity` and `check_loss` check an op, a quantity and a loss as
`torch.autograd.gradcheck` checks a function: each compares with autograd and raises an AssertionError. `bisect` finds
the first difference between a compiled model and autograd. No checker draws from the global generator. A new checker is
a file here; it may import every room but `fxcurv.cli`.
"""

from fxcurv.testing.compatibility import assert_compatible
from fxcurv.testing.differences import Difference, bisect
from fxcurv.testing.losses import check_loss
from fxcurv.testing.quantities import check_quantity
from fxcurv.testing.rules import check_rule

__all__ = ["Difference", "assert_compatible", "bisect", "check_loss", "check_quantity", "check_rule"]
