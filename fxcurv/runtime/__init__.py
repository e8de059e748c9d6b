"""The runtime: programs, their runs on a batch, their memory and cost, and the quantities that no emitted graph
computes.

`run` is what happens when `curv(x, y)` is called. `second_derivatives` and `kfra` are quantities with drivers of
their own, `autograd` the fallback by plain autograd, `inductor` the backend of torch.compile. Imports go to `passes`
and the rooms below it.
"""
