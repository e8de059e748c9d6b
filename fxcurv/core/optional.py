"""Optional packages: imported when they are needed, or an error that says what to install."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

from fxcurv.core.errors import FxcurvError

__all__ = ["DEMO", "MissingPackageError", "imported"]


DEMO = '"fxcurv[demo]"'
"""What to install for the data and the pictures."""


class MissingPackageError(FxcurvError):
    """An optional package is not installed, or does not fit the installed torch."""


def imported(module: str, install: str = DEMO) -> Any:
    """The optional module, or an error that says what to install (also for a torchvision built for another torch)."""
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
        f"torchvision {version('torchvision')} is built for another torch than {version('torch')}",
        remedy="reinstall both together: pip install --force-reinstall torch torchvision",
        code="FXC006",
    )
