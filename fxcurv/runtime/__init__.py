"""The runtime: programs, their runs on a batch, their memory and cost, and quantities without emitted graphs.

`run` implements the call `curv(x, y)`. `second_derivatives` and `kfra` are quantities with their own drivers,
`autograd` the fallback by plain autograd, `inductor` the backend of torch.compile. Imports go to `passes` and the
rooms below it.
"""
