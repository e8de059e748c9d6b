"""Results: entries by quantity and parameter, the curvature of a call, its block-diagonal operator, files and merging.

`writing`, `reading` and `json` are the safetensors format; a block says itself which fields a file holds. Imports go
to `fxcurv.ir` and the rooms below it.
"""
