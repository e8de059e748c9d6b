"""The words of the table: a row, its seeded model and data, and where an op sits in a network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

Op = Callable[[Tensor], Tensor]
Join = Callable[[Tensor, Tensor], Tensor]
Target = Callable[[tuple[int, ...], torch.Generator], Tensor]


def class_indices(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """y[n, *positions] in 0..C-1 for outputs [n, C, *positions]."""
    return torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)


def ignoring(index: int) -> Target:
    """Class indices: `index` at every third place (from the second on), other classes elsewhere."""

    def target(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        y = class_indices(shape, generator)
        y = y.where(y != index, (index + 1) % shape[1])
        y.view(-1)[1::3] = index
        return y

    return target


def probabilities(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Soft targets that sum to one over the classes."""
    return normal(shape, generator).softmax(1)


def unnormalized(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Soft targets that do not sum to one."""
    return 2 * unit(shape, generator)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """y ~ N(0, 1), for regression."""
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def unit(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """y uniform in [0, 1], soft labels."""
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def binary(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """y in {0, 1}, as floats."""
    return unit(shape, generator).round()


@dataclass(frozen=True)
class Sample:
    """A model, the shapes of one input and one output (no batch axis), a loss, and targets for it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    target: Target = class_indices
    out: tuple[int, ...] = (3,)


def inputs(sample: Sample, batch: int = 2, seed: int = 0) -> Tensor:
    """x[batch, *shape] ~ N(0, 1), float64."""
    return torch.randn(batch, *sample.shape, dtype=torch.float64, generator=_generator(sample, seed))


def targets(sample: Sample, batch: int = 2, seed: int = 0) -> Tensor:
    """y for `batch` samples, as the sample's loss wants it."""
    return sample.target((batch, *sample.out), _generator(sample, seed + 1))


def _generator(sample: Sample, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(f"{sample.name} {seed}".encode()))


def seeded(make: Callable[[], nn.Module], name: str) -> nn.Module:
    """`make()` in float64 and eval mode, parameters from a seed made of `name`, BatchNorms with non-trivial state."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Using padding='same' with even kernel"
        )  # torch says it once a process
        torch.default_generator.manual_seed(crc32(name.encode()))
        model = make().double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                _randomize(module)
    return model


def _randomize(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> None:
    with torch.no_grad():
        for centered in (norm.bias, norm.running_mean):
            if centered is not None:
                centered.normal_(std=0.3)
        for positive in (norm.weight, norm.running_var):
            if positive is not None:
                positive.uniform_(0.5, 1.5)


# Where an op sits: head(flatten(op(before(x))))


@dataclass(frozen=True)
class Place:
    """The input's shape and the layer between the input and the op."""

    shape: tuple[int, ...]
    before: Callable[[], nn.Module]


VECTOR = Place((3,), lambda: nn.Linear(3, 4))  # the op sees [N, 4]
TOKENS = Place((3, 2), lambda: nn.Linear(2, 4))  # [N, 3, 4]
SIGNAL = Place((2, 7), lambda: nn.Conv1d(2, 4, 3, padding=1))  # [N, 4, 7]
IMAGE = Place((2, 6, 5), lambda: nn.Conv2d(2, 4, 3, padding=1))  # [N, 4, 6, 5]
VOLUME = Place((1, 4, 5, 3), lambda: nn.Conv3d(1, 2, 3, padding=1))  # [N, 2, 4, 5, 3]


class Net(nn.Module):
    """head(flatten(op(before(x)))), with `op` a module or a plain function."""

    def __init__(self, before: nn.Module, op: Op, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.before = before
        self.op = op
        self.double().eval()
        with torch.no_grad():
            features = op(before(torch.zeros(1, *shape, dtype=torch.float64))).numel()
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(self.before(x))
        return self.head(y if y.ndim == 2 else y.flatten(1))


class Fork(nn.Module):
    """join(left(x), right(x))."""

    def __init__(self, left: nn.Module, right: nn.Module, join: Join) -> None:
        super().__init__()
        self.left, self.right, self.join = left, right, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x), self.right(x))


class Constant(nn.Module):
    """join(x, buffer)."""

    def __init__(self, shape: tuple[int, ...], join: Join) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.rand(shape) + 0.5)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.get_buffer("buffer"))


def sample(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], **options: Any) -> Sample:
    """One row: the model is `make()`."""
    return Sample(name, partial(seeded, make, name), shape, **options)


def modules(prefix: str, place: Place, table: Mapping[str, Callable[[], Op]]) -> tuple[Sample, ...]:
    """One row for each op; `table[name]()` makes it."""

    def net(make: Callable[[], Op]) -> nn.Module:
        return Net(place.before(), make(), place.shape)

    return tuple(sample(f"{prefix}.{name}", partial(net, make), place.shape) for name, make in table.items())


def functions(prefix: str, place: Place, table: Mapping[str, Op]) -> tuple[Sample, ...]:
    """One row for each plain function of a tensor."""

    def constant(op: Op) -> Op:
        return op

    return modules(prefix, place, {name: partial(constant, op) for name, op in table.items()})


def after(op: Op, layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """layer(op(x)): a layer whose input is a view, an expansion, …"""

    class After(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(op(x))

    return After


class Free(nn.Module):
    """join(x, parameter): a parameter in a form of its own."""

    def __init__(self, shape: tuple[int, ...], join: Join) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.randn(shape) / 2)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.free)


# Networks of named parts


class Model(nn.Module):
    """`forward(model, x)` over named parts: a network in one row of the table."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def mlp(*widths: int) -> nn.Sequential:
    """Linear, Tanh, Linear, …, Linear."""
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def constant(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)
