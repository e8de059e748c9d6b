"""Losses: their terms at outputs and targets, and the columns S with Σ_v S_v S_vᵀ = ∇²loss for every factor.

`base.Loss` is the interface, `terms` the two kinds of terms. A new loss is a subclass of `Loss` in a file here: it
registers itself, and importing the room imports all of its files. Imports go to `fxcurv.quantities` and the rooms below
it; the room does not see `fxcurv.frontend`.
"""

import importlib
import pkgutil

for _file in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_file}")
