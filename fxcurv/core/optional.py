"""Optional packages: imported on first use, or an error with the package to install."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

from fxcurv.core.errors import FxcurvError

__all__ = ["DEMO", "MissingPackageError", "imported"]


DEMO = '"fxcurv[demo]"'
"""The extra to install for the data and the pictures."""


class MissingPackageError(FxcurvError):
    """An optional package is not installed, or does not match the installed torch."""


def imported(module: str, install: str = DEMO) -> Any:
    """Import an optional module, or raise an error with the package to install (also for a mismatched torchvision)."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingPackageError(
            f"{package} is not installed", remedy=f"pip install {install}", code="FXC006"
        ) from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        raise _mismatch() from error


def _mismatch() -> MissingPackageError:
    return MissingPackageError(
        f"torchvision {version('torchvision')} is not built for torch {version('torch')}",
        remedy="reinstall both together: pip install --force-reinstall torch torchvision",
        code="FXC006",
    )
