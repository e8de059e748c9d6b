"""The passes: pure functions from graph to graph. `pipeline` runs them in order and checks every result.

inline                 inline blocks without gradients
functionalize          replace in-place operators by functional ones          captured
lower                  lower ATen operators to modules of the vocabulary      lowered
eliminate_identities   remove modules that return their input
recognize_idioms       replace activations written as formulas by modules
infer_batch_axes       infer the axis of the samples; refuse mixing           canonical
plan                   plan every parameter's result and its sums
augment                saved tensors, sums, and the pullback per factor       forward, backward
common_subexpressions  compute equal expressions once
concatenate            concatenate cotangents of the parts of a tensor
select_algorithms      replace definitions by their cheapest equal algorithm
vectorize              pull columns back in one call where results are equal
fold_scales            fold scales into the pullback of a convolution
schedule               compute every sum as early as possible                 forward, backward

A new pass is a file here and a line in a table of `pipeline`. Rows for ATen operators are in `lowerings` and `layers`.
Imports are restricted to `fxcurv.frontend`, `fxcurv.quantities` and the rooms below them.
"""

from passes.pipeline import canonicalize as canonicalize
from passes.pipeline import emit as emit
from passes.pipeline import lowered as lowered
from passes.plan import plan as plan
from passes.select_algorithms import check_algorithms as check_algorithms
