"""The passes: each file is a pure function from graph to graph; `pipeline` runs them in order and checks every result.

inline                 blocks without gradients become their nodes
functionalize          in-place operators become functional ones              captured
lower                  ATen operators become modules of the vocabulary        lowered
eliminate_identities   modules that compute nothing are dropped
recognize_idioms       activations written out become their modules
infer_batch_axes       the axis of the samples; mixing is refused             canonical
plan                   the result of every parameter, and its sums
augment                saved tensors, sums, and the pullback per factor       forward, backward
common_subexpressions  equal computations are done once
concatenate            cotangents of the parts of a tensor are concatenated
select_algorithms      definitions become their cheapest equal algorithm
vectorize              columns are pulled back at once where that is equal
fold_scales            scales move into the pullback of a convolution
schedule               every sum is computed as soon as it can be             forward, backward

A new pass is a file here and a line in a table of `pipeline`. Rows for ATen operators are in `lowerings` and `layers`.
Imports go to `fxcurv.frontend`, `fxcurv.quantities` and the rooms below them.
"""

from passes.pipeline import canonicalize as canonicalize
from passes.pipeline import emit as emit
from passes.pipeline import lowered as lowered
from passes.plan import plan as plan
from passes.select_algorithms import check_algorithms as check_algorithms
