"""The core: errors, the shape language, fingerprints, loggers, optional packages, and the private names of torch.

Contains whatever every other room may need and needs no other room. Private names of torch go to `torch_compat`,
optional packages are imported through `optional`. Imports are restricted to torch and the standard library.
"""
