"""The core: errors, the shape language, fingerprints, loggers, optional packages, and every private name of torch.

Lives here: what every other room may need and what needs none of them. A private name of torch goes to
`torch_compat`, an optional package is imported through `optional`. Imports go to torch and the standard library
alone.
"""
