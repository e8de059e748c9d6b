"""fxcurv: a graph-rewriting compiler on torch.fx that computes curvature of neural networks.

Rooms, from the lowest; each may import those before it:

core              errors, shapes, fingerprints, private names of torch, optional packages
linalg            factorizations, matrix products, allocation, cost model, linear operators
convolution       patches and their second moments
blocks            the curvature of one parameter: Kronecker, dense, diagonal, eigenbasis, lazy Gram
contractions      statistics: definitions, algorithms, fused kernels
ir                operators, derivative rules, backward operators, grammar, rewriting
results           entries, curvature, block-diagonal operator, files, merging
quantities        factors, quantities, their registry, selection and plan
losses, frontend  loss terms and factors of their Hessians; capture, isolation, program cache
passes            (at the top level) one pass a file, and the pipeline
runtime           programs, their runs and memory, plain autograd, explanations
dataset, matrixfree, inspect, models   accumulation; products and estimators; tables and pictures; targets and data
api               compile() and the compiled object
tangent_kernel, checks, optim, recipes; testing; cli

The names below are imported when they are first read, so that `import fxcurv` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

from fxcurv.core.deprecation import warn_renamed
from fxcurv.core.version import __version__ as __version__

_HOMES: dict[str, tuple[str, ...]] = {
    "fxcurv.api": ("Compiled", "compile", "trace"),
    "fxcurv.blocks.base": ("Block",),
    "fxcurv.blocks.dense": ("Dense",),
    "fxcurv.blocks.diagonal": ("Diagonal",),
    "fxcurv.blocks.eigenbasis": ("Eigenbasis",),
    "fxcurv.blocks.kronecker": ("Kronecker",),
    "fxcurv.checks.levels": ("check",),
    "fxcurv.checks.policy": ("Policy",),
    "fxcurv.checks.report": ("Report",),
    "fxcurv.core.errors": (
        "CaptureError",
        "FxcurvError",
        "InputError",
        "LossError",
        "QuantityError",
        "SpecError",
        "UnsupportedError",
    ),
    "fxcurv.inspect.tables": ("tabular",),
    "fxcurv.linalg.operator": ("LinearOperator",),
    "fxcurv.matrixfree.estimates": ("Spectrum", "estimate_diagonal", "estimate_trace", "spectral_density"),
    "fxcurv.matrixfree.products": ("fisher_operator", "ggn_operator", "hessian_operator", "jacobian_operator"),
    "fxcurv.quantities.ekfac": ("EKFAC",),
    "fxcurv.quantities.factors": (
        "Empirical",
        "Exact",
        "Identity",
        "LossGradient",
        "Rademacher",
        "Sampled",
        "Stratified",
    ),
    "fxcurv.quantities.ggn": ("BatchDiagGGN", "DiagGGN", "GGNBlock", "GGNGram", "Jacobian", "SqrtGGN"),
    "fxcurv.quantities.gradients": ("BatchDot", "BatchGrad", "BatchL2", "Grad", "SumGradSquared", "Variance"),
    "fxcurv.quantities.hessian": ("DiagHessian",),
    "fxcurv.quantities.kfac": ("KFAC",),
    "fxcurv.quantities.kfac_variants": ("FOOF", "KFRA"),
    "fxcurv.quantities.registry": ("NAMES",),
    "fxcurv.results.block_diagonal": ("BlockDiagonal",),
    "fxcurv.results.curvature": ("Curvature",),
    "fxcurv.results.merging": ("merge",),
    "fxcurv.results.reading": ("load",),
    "fxcurv.tangent_kernel.kernel": ("NTK", "ntk"),
    "fxcurv.tangent_kernel.linearized": ("Linearized",),
}
"""The public names by the module that defines them; `__init__.pyi` says the same to type checkers."""

_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = {
    "quantities": "fxcurv.quantities",
    "distributed": "fxcurv.dataset.processes",
    "recipes": "fxcurv.recipes",
    "testing": "fxcurv.testing",
}
"""Public modules by the name under which users find them."""


_RENAMED = {"Demands": "Policy"}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first read."""
    if name in _RENAMED:
        warn_renamed(f"fxcurv.{name}", f"fxcurv.{_RENAMED[name]}")
        return __getattr__(_RENAMED[name])
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'fxcurv' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
