"""Blocks: the curvature of one parameter as a symmetric positive semi-definite operator on it, flattened row-major.

`base.Block` is the common interface. `kronecker`, `dense`, `diagonal` and `eigenbasis` are the kinds; `lazy_gram` holds
a lazy Gram, as its vectors. A new kind is a subclass of `Block` in a file of its own: it registers itself, and results,
files, processes and merging read its facts. Imports go to `fxcurv.convolution` and the rooms below it.
"""
