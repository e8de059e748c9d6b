"""Loggers under the name `fxcurv`; FXCURV_DEBUG=passes,… prints the listed ones to stderr."""

from __future__ import annotations

import logging
import os
from functools import cache

__all__ = ["logger"]


@cache
def logger(name: str) -> logging.Logger:
    """Return the logger `fxcurv.<part>`, at DEBUG with a handler on stderr if FXCURV_DEBUG lists the part."""
    log = logging.getLogger(name)
    if name.rpartition(".")[2] in os.environ.get("FXCURV_DEBUG", "").split(","):
        log.setLevel(logging.DEBUG)
        log.addHandler(logging.StreamHandler())
    return log
