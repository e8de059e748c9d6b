"""Cases: a construct in a small random network, from a seed, as the source of a module.

A case is plain data, so that it prints, and shrinks by leaving steps out. Its source is executed as a new module for
every model, so that globals are part of the state too.
"""

from __future__ import annotations

import functools
import linecache
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hostile.constructs import Construct, lines
from hostile.rows import CONSTRUCTS

__all__ = ["SIZES", "Case", "data", "draw", "load", "phases", "quantities", "script", "smaller", "source"]

SIZES = (1, 3, 5, 8, 17)
"""Batch sizes."""

LOSSES = (
    "nn.CrossEntropyLoss()",
    'nn.CrossEntropyLoss(reduction="sum")',
    "nn.MSELoss()",
    'nn.MSELoss(reduction="sum")',
)
SCALES = (0.5, 2.0, 3.0, -1.5)
SHAPES = ((3,), (4,), (2, 3), (3, 4))
USUAL = ("grad", "batch_grad", "diag_ggn")
SMOOTH = ("h.tanh()", "F.gelu(h)", "F.silu(h)", "h.sigmoid()", "F.softplus(h)", "h.sin()")


@dataclass(frozen=True)
class Case:
    """A construct, the steps before and after it, and the data.

    A step is a kind and a choice. `order` is the order of the batch sizes, and `kflr` asks for Kronecker factors too.
    """

    construct: str
    before: tuple[tuple[str, int], ...] = ()
    after: tuple[tuple[str, int], ...] = ()
    shape: tuple[int, ...] = (3,)
    loss: str = LOSSES[0]
    scale: float = 2.0
    order: tuple[int, ...] = (3, 1, 8, 5, 17)
    kflr: bool = False
    seed: int = 0

    @property
    def row(self) -> Construct:
        """The construct's row."""
        return CONSTRUCTS[self.construct]


def draw(seed: int) -> Case:
    """A case from a seed; seeds that follow one another run through all constructs."""
    turn, place = divmod(seed, len(CONSTRUCTS))
    construct = random.Random(turn).sample(list(CONSTRUCTS), len(CONSTRUCTS))[place]
    r = random.Random(seed)
    steps = [
        (r.choice(("linear", "smooth", "norm", "residual", "convolution")), r.randrange(1 << 20)) for _ in range(3)
    ]
    cut, length = r.randint(0, 3), r.randint(0, 3)
    shape = r.choice(SHAPES)
    return Case(
        construct,
        tuple(steps[:length][:cut]),
        tuple(steps[:length][cut:]),
        shape,
        r.choice(LOSSES),
        r.choice(SCALES),
        tuple(r.sample(SIZES, len(SIZES))),
        len(shape) == 1 and r.random() < 0.5,
        seed,
    )


def quantities(case: Case) -> tuple[str, ...]:
    """The quantities to compute."""
    return (case.row.quantities or USUAL) + (("kflr",) if case.kflr else ())


def smaller(case: Case, fails: Callable[[Case], bool]) -> Case:
    """A case with fewer steps that still fails."""
    found = replace(case, before=(), after=())
    if found != case and fails(found):
        return found
    for name in ("before", "after"):
        for k in range(len(getattr(case, name))):
            shorter = replace(case, **{name: getattr(case, name)[:k] + getattr(case, name)[k + 1 :]})
            if fails(shorter):
                return smaller(shorter, fails)
    return case


# Source -----------------------------------------------------------------------------------------------------------


@dataclass
class Network:
    """Lines of `__init__` and `forward`, and the shape of `h` without the batch."""

    shape: tuple[int, ...]
    inits: list[str]
    lines: list[str]

    def layer(self, make: str, shape: tuple[int, ...], name: str = "") -> None:
        """Add a layer that gives this shape."""
        name = name or f"m{len(self.inits)}"
        self.inits.append(f"self.{name} = {make}")
        self.lines.append(f"h = self.{name}(h)")
        self.shape = shape

    def step(self, kind: str, choice: int) -> None:
        """Add a step; what it is depends on the shape, so that every list of steps is a model."""
        r, (*outer, width) = random.Random(choice), self.shape
        match kind:
            case "linear":
                more = r.choice((2, 3, 4))
                self.layer(f"nn.Linear({width}, {more}, bias={r.random() < 0.7})", (*outer, more))
            case "norm" if width > 2:
                self.layer(f"nn.LayerNorm({width})", self.shape)
            case "convolution" if outer:
                more = r.choice((2, 3))
                self.layer(f"nn.Conv1d({outer[0]}, {more}, 3, padding=1)", (more, width))
            case "residual":
                self.layer(f"nn.Linear({width}, {width})", self.shape)
                self.lines[-1] = self.lines[-1].replace("h = ", "h = h + ")
            case _:
                self.lines.append(f"h = {r.choice(SMOOTH)}")


def source(case: Case) -> str:
    """The module: `build()` makes the model, `change(model, x)` changes its state, `loss()` makes the loss."""
    row, net = case.row, Network(case.shape, [], ["h = x"])
    net.layer(f"nn.Linear({case.shape[-1]}, {case.shape[-1]})", case.shape)
    for step in case.before:
        net.step(*step)
    width = net.shape[-1]
    net.inits += [f"self.site = nn.Linear({width}, {width})", *row.init.splitlines()]
    net.lines += row.forward.splitlines()
    for step in case.after:
        net.step(*step)
    if net.shape[1:]:
        net.lines.append("h = h.mean(1)")
        net.shape = net.shape[1:]
    net.layer(f"nn.Linear({net.shape[0]}, 3)", (3,), "head")
    return (
        FRAME.format(
            top=row.top.strip("\n"),
            inits=lines("\n".join(net.inits), 8),
            forward=lines("\n".join(net.lines), 8),
            seed=case.seed,
            after=lines(row.after, 4) and lines(row.after, 4) + "\n",
            change=lines(row.change or "pass", 4),
            loss=lines(row.loss or f"return {case.loss}", 4),
        )
        .replace("WIDTH", str(width))
        .replace("SCALE", str(case.scale))
    )


FRAME = """\
import functools
import random
import time
import weakref

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

{top}


class Hostile(nn.Module):
    def __init__(self):
        super().__init__()
{inits}

    def forward(self, x):
{forward}
        return h


def build():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed({seed})
        model = Hostile().double().eval()
{after}    return model


def change(model, x):
{change}


def loss():
{loss}
"""


def script(case: Case) -> str:
    """A script that shows what is wrong; PYTHONPATH must have the clone and its tests."""
    more = ["", "", 'if __name__ == "__main__":', "    from pathlib import Path", ""]
    more += ["    from hostile.cases import Case", "    from hostile.judge import outcome", ""]
    more += [f"    case = {case!r}", "    print(outcome(case, Path(__file__).read_text()))", ""]
    return source(case) + "\n".join(more)


# Execution --------------------------------------------------------------------------------------------------------


def load(text: str) -> types.ModuleType:
    """The module of a source, new at every call."""
    name = "hostile_model"
    module = types.ModuleType(name)
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module
    exec(_code(text, module.__file__), module.__dict__)
    return module


@functools.lru_cache(maxsize=16)
def _code(text: str, file: str) -> types.CodeType:
    return compile(text, file, "exec")


def data(case: Case, batch: int, loss: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """x and y of a batch, the same for a size at every call."""
    g = torch.Generator().manual_seed(1000 * case.seed + batch)
    x = torch.randn(batch, *case.shape, generator=g, dtype=torch.float64)
    if isinstance(loss, torch.nn.MSELoss):
        return x, torch.randn(batch, 3, generator=g, dtype=torch.float64)
    return x, torch.randint(3, (batch,), generator=g)


def phases(case: Case) -> Iterator[tuple[int, int]]:
    """The calls: each batch size before the change of state and, if there is one, after it."""
    for phase in (0, 1) if case.row.change else (0,):
        for batch in case.order:
            yield phase, batch
