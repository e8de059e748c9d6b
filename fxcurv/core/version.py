"""The version of fxcurv, read by pyproject.toml."""

__version__ = "0.1.0"
