"""The table of samples: tiny float64 networks, at least one per op and hyper-parameter, and narrow real models.

A sample is a network with parameters before and after the op under test, so that the pullback through it and the uses
on both sides are tried. `SAMPLES` and `LOSSES` are what the compiler must get right, `MODELS` are whole networks.
`TRICKY` (aliases, detached parts, a batch axis that moves) must come out right or be refused with a cause; `MIXING`
mixes the samples of a batch and must be refused.
`build()` is seeded, gives a fresh model in eval mode each time, and leaves the global random state alone.
"""

from __future__ import annotations

from samples.attention import SEQUENCES
from samples.computed import COMPUTED
from samples.elementwise import ACTIVATIONS, ARITHMETIC
from samples.generic import FALLBACKS
from samples.indexing import INDEXING
from samples.layers import CONVS, LINEAR, NORMS
from samples.losses import LOSSES
from samples.networks import MODELS
from samples.parameters import FREE, PARAMETERS, Right, freeze, two_layers
from samples.pools import POOLS, REDUCTIONS
from samples.products import PRODUCTS
from samples.resampling import RESAMPLING
from samples.rows import (
    IMAGE,
    SIGNAL,
    TOKENS,
    VECTOR,
    VOLUME,
    Model,
    Sample,
    constant,
    functions,
    inputs,
    mlp,
    modules,
    normal,
    sample,
    seeded,
    targets,
)
from samples.shapes import CUTS, IDENTITIES, PADS, SHAPES
from samples.tricky import MIXING, TRICKY

__all__ = [
    "IMAGE",
    "LOSSES",
    "MIXING",
    "MODELS",
    "NORMS",
    "PARAMETERS",
    "SAMPLES",
    "SIGNAL",
    "TOKENS",
    "TRICKY",
    "VECTOR",
    "VOLUME",
    "Model",
    "Right",
    "Sample",
    "constant",
    "find",
    "freeze",
    "functions",
    "inputs",
    "mlp",
    "modules",
    "normal",
    "sample",
    "seeded",
    "targets",
    "two_layers",
]

SAMPLES = (
    *(*LINEAR, *CONVS, *NORMS, *ACTIVATIONS, *ARITHMETIC, *POOLS, *REDUCTIONS),
    *(*SHAPES, *CUTS, *PADS, *IDENTITIES, *PARAMETERS, *FREE, *FALLBACKS),
    *(*SEQUENCES, *RESAMPLING, *INDEXING, *PRODUCTS, *COMPUTED),
)


def find(name: str) -> Sample:
    """The sample of that name, from any group."""
    groups = (*SAMPLES, *LOSSES, *MODELS, *TRICKY, *MIXING)
    return next(row for row in groups if row.name == name)
