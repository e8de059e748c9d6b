"""Results: entries by quantity and parameter, the curvature of a call, its block-diagonal operator, files and merging.

`writing`, `reading` and `json` implement the safetensors format; a block declares its fields in a file. May import
from `fxcurv.ir` and packages below it.
"""
