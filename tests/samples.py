"""The table of samples: tiny float64 networks, at least one per op and hyper-parameter, and narrow real models.

A sample is a network with parameters before and after the op under test, so that the pullback through it and the uses
on both sides are tried. `SAMPLES` and `LOSSES` are what the compiler must get right, `MODELS` are whole networks.
`TRICKY` (aliases, detached parts, a batch axis that moves) must come out right or be refused with a cause; `MIXING`
mixes the samples of a batch and must be refused.
`build()` is seeded, gives a fresh model in eval mode each time, and leaves the global random state alone.
"""

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
from torch.nn import functional as F

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


def find(name: str) -> Sample:
    """The sample of that name, from any group."""
    groups = (*SAMPLES, *LOSSES, *MODELS, *TRICKY, *MIXING)
    return next(row for row in groups if row.name == name)


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


# Linear and convolution


class FunctionalLayers(nn.Module):
    """F.conv2d and F.linear on raw parameters, outside nn.Conv2d and nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3) / 4)
        self.matrix = nn.Parameter(torch.randn(5, 4) / 2)
        self.offset = nn.Parameter(torch.randn(5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, stride=2, padding=1, groups=2)
        return F.linear(y.mean((2, 3)), self.matrix, self.offset)


def after(op: Op, layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """layer(op(x)): a layer whose input is a view, an expansion, …"""

    class After(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(op(x))

    return After


LINEAR = (
    sample("linear.only", lambda: nn.Linear(4, 3), (4,)),
    *modules(
        "linear",
        VECTOR,
        {
            "vector": lambda: nn.Linear(4, 5),
            "no_bias": lambda: nn.Linear(4, 5, bias=False),
            "one": lambda: nn.Linear(4, 1),
        },
    ),
    *modules(
        "linear",
        TOKENS,
        {
            "tokens": lambda: nn.Linear(4, 3),
            "tokens_no_bias": lambda: nn.Linear(4, 3, bias=False),
            "transposed": after(lambda x: x.transpose(1, 2), lambda: nn.Linear(3, 2)),
            "one_token": after(lambda x: x[:, :1], lambda: nn.Linear(4, 3)),
            "expanded": after(lambda x: x[:, :1].expand(-1, 3, -1), lambda: nn.Linear(4, 3)),
            "strided": after(lambda x: x[:, ::2, 1:], lambda: nn.Linear(3, 2)),
        },
    ),
    *modules(
        "linear",
        IMAGE,
        {
            "rank4": lambda: nn.Linear(5, 2),
            "channels_last": after(lambda x: x.permute(0, 2, 3, 1), lambda: nn.Linear(4, 2)),
            "functional": lambda: FunctionalLayers(),
        },
    ),
)

CONVS = (
    *modules(
        "conv1d",
        SIGNAL,
        {
            "plain": lambda: nn.Conv1d(4, 3, 3),
            "no_bias": lambda: nn.Conv1d(4, 3, 3, bias=False),
            "pointwise": lambda: nn.Conv1d(4, 3, 1),
            "stride": lambda: nn.Conv1d(4, 3, 3, stride=2),
            "padding": lambda: nn.Conv1d(4, 3, 3, padding=2),
            "valid": lambda: nn.Conv1d(4, 3, 2, padding="valid"),
            "same": lambda: nn.Conv1d(4, 3, 3, padding="same"),
            "same_even": lambda: nn.Conv1d(4, 3, 4, padding="same"),
            "same_dilated": lambda: nn.Conv1d(4, 3, 2, padding="same", dilation=3),
            "same_circular": lambda: nn.Conv1d(4, 3, 4, padding="same", padding_mode="circular"),
            "dilation": lambda: nn.Conv1d(4, 3, 3, dilation=2),
            "groups": lambda: nn.Conv1d(4, 6, 3, groups=2),
            "depthwise": lambda: nn.Conv1d(4, 4, 3, groups=4),
            "circular": lambda: nn.Conv1d(4, 3, 3, padding=2, padding_mode="circular"),
            "reflect": lambda: nn.Conv1d(4, 3, 3, padding=2, padding_mode="reflect"),
            "replicate": lambda: nn.Conv1d(4, 3, 3, padding=2, padding_mode="replicate"),
        },
    ),
    *modules(
        "conv2d",
        IMAGE,
        {
            "plain": lambda: nn.Conv2d(4, 3, 3),
            "no_bias": lambda: nn.Conv2d(4, 3, 3, bias=False),
            "pointwise": lambda: nn.Conv2d(4, 3, 1),
            "pointwise_stride": lambda: nn.Conv2d(4, 3, 1, stride=2, bias=False),
            "rectangular": lambda: nn.Conv2d(4, 3, (1, 3)),
            "whole_image": lambda: nn.Conv2d(4, 3, (6, 5)),
            "stride": lambda: nn.Conv2d(4, 3, 3, stride=2),
            "stride_pair": lambda: nn.Conv2d(4, 3, 2, stride=(3, 1)),
            "padding": lambda: nn.Conv2d(4, 3, 3, padding=1),
            "padding_pair": lambda: nn.Conv2d(4, 3, 2, padding=(0, 1)),
            "valid": lambda: nn.Conv2d(4, 3, 2, padding="valid"),
            "same": lambda: nn.Conv2d(4, 3, (3, 1), padding="same"),
            "same_even": lambda: nn.Conv2d(4, 3, (2, 4), padding="same"),
            "same_dilated": lambda: nn.Conv2d(4, 3, (2, 3), padding="same", dilation=(1, 2)),
            "dilation": lambda: nn.Conv2d(4, 3, 2, dilation=2),
            "dilation_pair": lambda: nn.Conv2d(4, 3, 3, dilation=(2, 1), padding=1),
            "groups": lambda: nn.Conv2d(4, 6, 2, groups=2),
            "groups_no_bias": lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False),
            "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
            "depthwise_multiplier": lambda: nn.Conv2d(4, 8, 2, groups=4),
            "everything": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
            "circular": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
            "circular_stride": lambda: nn.Conv2d(4, 3, 3, padding=(2, 0), stride=2, padding_mode="circular"),
            "reflect": lambda: nn.Conv2d(4, 3, 3, padding=(1, 2), padding_mode="reflect"),
            "reflect_groups": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=2, dilation=2),
            "replicate": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="replicate"),
            "same_reflect": lambda: nn.Conv2d(4, 3, (2, 3), padding="same", padding_mode="reflect"),
        },
    ),
    *modules(
        "conv3d",
        VOLUME,
        {
            "plain": lambda: nn.Conv3d(2, 3, 2),
            "no_bias": lambda: nn.Conv3d(2, 3, 2, bias=False),
            "stride": lambda: nn.Conv3d(2, 3, 2, stride=(2, 3, 1)),
            "padding": lambda: nn.Conv3d(2, 2, (2, 3, 1), padding=(0, 1, 1)),
            "same_even": lambda: nn.Conv3d(2, 2, (2, 3, 2), padding="same"),
            "dilation": lambda: nn.Conv3d(2, 3, 2, dilation=(1, 2, 2)),
            "groups": lambda: nn.Conv3d(2, 4, 2, groups=2),
            "circular": lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode="circular"),
            "reflect": lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode="reflect"),
            "replicate": lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode="replicate"),
        },
    ),
)


# BatchNorm in eval mode


def without(name: str, norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """The norm with its parameter `name` set to None."""
    setattr(norm, name, None)
    return norm


class FunctionalNorm(nn.Module):
    """F.batch_norm on raw parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.get_buffer("mean"), self.get_buffer("var"), self.gain, None, False, 0.1, 1e-3)


class NormTwice(nn.Module):
    """One BatchNorm used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(x).relu()))


NORMS = (
    sample("norm.first", lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)), (3,)),
    sample("norm.last", lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), (4,)),
    *modules("norm", VECTOR, {"1d": lambda: nn.BatchNorm1d(4), "1d_plain": lambda: nn.BatchNorm1d(4, affine=False)}),
    *modules("norm", SIGNAL, {"1d_signal": lambda: nn.BatchNorm1d(4)}),
    *modules(
        "norm",
        IMAGE,
        {
            "2d": lambda: nn.BatchNorm2d(4),
            "2d_eps": lambda: nn.BatchNorm2d(4, eps=0.5),
            "2d_plain": lambda: nn.BatchNorm2d(4, affine=False),
            "2d_no_bias": lambda: without("bias", nn.BatchNorm2d(4)),
            "2d_no_weight": lambda: without("weight", nn.BatchNorm2d(4)),
            "2d_relu": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            "2d_conv": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 2, bias=False), nn.BatchNorm2d(3)),
            "2d_depthwise": lambda: nn.Sequential(nn.Conv2d(4, 4, 2, groups=4, bias=False), nn.BatchNorm2d(4)),
            "functional": FunctionalNorm,
            "twice": NormTwice,
        },
    ),
    *modules("norm", VOLUME, {"3d": lambda: nn.BatchNorm3d(2)}),
)


# Elementwise


def add_then_relu(x: Tensor) -> Tensor:
    x += 0.5
    return x.relu_()


ACTIVATIONS = (
    *modules(
        "act",
        VECTOR,
        {
            "relu": nn.ReLU,
            "relu_inplace": lambda: nn.ReLU(inplace=True),
            "relu6": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU6()),
            "relu6_inplace": lambda: nn.ReLU6(inplace=True),
            "leaky_relu": nn.LeakyReLU,
            "leaky_relu_slope": lambda: nn.LeakyReLU(0.3, inplace=True),
            "rrelu": lambda: nn.RReLU(0.1, 0.5),
            "elu": nn.ELU,
            "elu_alpha": lambda: nn.ELU(0.7, inplace=True),
            "selu": nn.SELU,
            "celu": nn.CELU,
            "celu_alpha": lambda: nn.CELU(0.6),
            "gelu": nn.GELU,
            "gelu_tanh": lambda: nn.GELU("tanh"),
            "silu": nn.SiLU,
            "silu_inplace": lambda: nn.SiLU(inplace=True),
            "mish": nn.Mish,
            "sigmoid": nn.Sigmoid,
            "tanh": nn.Tanh,
            "softplus": nn.Softplus,
            "softplus_beta": lambda: nn.Softplus(beta=3, threshold=0.5),
            "softsign": nn.Softsign,
            "hardtanh": lambda: nn.Hardtanh(-0.2, 0.5),
            "hardtanh_inplace": lambda: nn.Hardtanh(-0.1, 0.3, inplace=True),
            "hardsigmoid": nn.Hardsigmoid,
            "hardswish": nn.Hardswish,
            "hardswish_inplace": lambda: nn.Hardswish(inplace=True),
            "logsigmoid": nn.LogSigmoid,
            "threshold": lambda: nn.Threshold(0.1, -0.3),
            "softshrink": lambda: nn.Softshrink(0.2),
            "hardshrink": lambda: nn.Hardshrink(0.2),
            "tanhshrink": nn.Tanhshrink,
        },
    ),
    *functions(
        "act",
        VECTOR,
        {
            "f_relu": F.relu,
            "f_relu_inplace": lambda x: F.relu(x, inplace=True),
            "relu_": torch.relu_,
            "relu_method": lambda x: x.relu(),
            "relu_after_add": add_then_relu,
            "f_relu6": lambda x: F.relu6(6 * x + 3),
            "f_hardswish": lambda x: F.hardswish(5 * x),
            "f_hardsigmoid": lambda x: F.hardsigmoid(5 * x),
            "f_gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
            "f_silu": F.silu,
            "swish": lambda x: x * torch.sigmoid(x),
            "f_softplus": lambda x: F.softplus(x, 2.0, 1.0),
            "f_elu": lambda x: F.elu(x, 0.5),
            "f_leaky_relu": lambda x: F.leaky_relu(x, 0.2),
            "tanh_": lambda x: x.tanh_(),
            "sigmoid_method": lambda x: x.sigmoid(),
            "abs": torch.abs,
            "exp": torch.exp,
            "expm1": torch.expm1,
            "square": torch.square,
            "pow2": lambda x: x**2,
            "pow3": lambda x: x**3,
            "pow_fraction": lambda x: (x.abs() + 1) ** 1.5,
            "pow_negative": lambda x: (x.abs() + 1).pow(-2),
            "scalar_power": lambda x: 2.0**x,
            "sqrt": lambda x: torch.sqrt(x.square() + 1),
            "rsqrt": lambda x: torch.rsqrt(x.square() + 1),
            "log": lambda x: torch.log(x.square() + 1),
            "log1p": lambda x: torch.log1p(x.abs()),
            "reciprocal": lambda x: torch.reciprocal(x.square() + 1),
            "sin": torch.sin,
            "cos": torch.cos,
            "atan": torch.atan,
            "erf": torch.erf,
            "sign": lambda x: x * x.sign(),
            "clamp": lambda x: x.clamp(-0.3, 0.4),
            "clamp_min": lambda x: x.clamp(min=-0.1),
            "clamp_max": lambda x: torch.clamp_max(x, 0.2),
        },
    ),
    *functions(
        "act4d",
        IMAGE,
        {
            "relu_inplace": lambda x: F.relu(x, inplace=True),
            "gelu": F.gelu,
            "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
        },
    ),
)


# Arithmetic


def add_in_place(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


def multiply_in_place(a: Tensor, b: Tensor) -> Tensor:
    a *= b
    return a


JOINS: dict[str, Join] = {
    "add": lambda a, b: a + b,
    "add_alpha": lambda a, b: torch.add(a, b, alpha=0.3),
    "add_in_place": add_in_place,
    "sub": lambda a, b: a - b,
    "sub_alpha": lambda a, b: torch.sub(a, b, alpha=2),
    "rsub": lambda a, b: torch.rsub(a, b, alpha=0.5),
    "mul": lambda a, b: a * b,
    "mul_in_place": multiply_in_place,
    "gated": lambda a, b: a * torch.sigmoid(b),
}

CONSTANTS: dict[str, tuple[tuple[int, ...], Join]] = {
    "mul_buffer": ((4, 1, 1), lambda x, c: x * c),
    "buffer_mul": ((1, 1, 6, 5), lambda x, c: c * x),
    "add_buffer": ((1, 4, 1, 1), lambda x, c: x + c),
    "sub_buffer": ((5,), lambda x, c: x - c),
    "buffer_sub": ((6, 1), lambda x, c: c - x),
    "div_buffer": ((4, 1, 1), lambda x, c: x / c),
    "scalar_buffer": ((), lambda x, c: x * c + c),
    "widening_buffer": ((1, 2, 1, 1, 1), lambda x, c: x.unsqueeze(1) * c),  # [N,1,C,H,W] * [1,2,1,1,1]
}


def two_linears(join: Join) -> nn.Module:
    """join of two Linear layers with the same input."""
    return Fork(nn.Linear(4, 4), nn.Linear(4, 4), join)


def squeeze_excite() -> nn.Module:
    """[N, C, 1, 1]: the gate of a squeeze-and-excitation block."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid())


ARITHMETIC = (
    *modules(
        "join",
        VECTOR,
        {name: partial(two_linears, join) for name, join in JOINS.items()},
    ),
    *modules("join", IMAGE, {name: partial(Constant, shape, join) for name, (shape, join) in CONSTANTS.items()}),
    *modules(
        "join",
        IMAGE,
        {
            "channel_gate": lambda: Fork(nn.Identity(), squeeze_excite(), lambda x, gate: x * gate),
            "gate_first": lambda: Fork(squeeze_excite(), nn.Conv2d(4, 4, 1), lambda gate, x: gate * x),
            "pixel_gate": lambda: Fork(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1), lambda x, gate: x * gate),
            "channel_add": lambda: Fork(nn.Identity(), nn.AdaptiveAvgPool2d(1), lambda x, m: x + m),
            "channel_sub": lambda: Fork(nn.AdaptiveAvgPool2d((1, None)), nn.Conv2d(4, 4, 1), lambda m, x: m - x),
            "outer": lambda: Fork(nn.AdaptiveAvgPool2d((1, None)), nn.AdaptiveAvgPool2d((None, 1)), lambda a, b: a * b),
        },
    ),
    *modules("join", TOKENS, {"token_mean": lambda: Fork(nn.Linear(4, 4), nn.Linear(4, 1), lambda a, b: a * b)}),
    *functions(
        "scalar",
        VECTOR,
        {
            "add": lambda x: x + 2,
            "radd": lambda x: 0.5 + x,
            "sub": lambda x: x - 1,
            "rsub": lambda x: 1 - x,
            "neg": lambda x: -x,
            "mul": lambda x: x * 0.5,
            "rmul": lambda x: 3 * x,
            "div": lambda x: x / 4,
            "rdiv": lambda x: 1 / (x.square() + 1),
            "div_in_place": lambda x: x.div_(4),
            "mul_in_place": lambda x: x.mul_(0.7),
            "add_self": lambda x: x + x,
            "mul_self": lambda x: x * x,
            "sub_self": lambda x: x - 0.3 * x,
            "constant_tensor": lambda x: x * torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64),
            "constant_ones": lambda x: x + torch.ones_like(x) + torch.arange(4, dtype=x.dtype),
        },
    ),
)


# Pooling and reductions

POOLS = (
    *modules(
        "pool1d",
        SIGNAL,
        {
            "max": lambda: nn.MaxPool1d(2),
            "max_stride": lambda: nn.MaxPool1d(3, stride=2),
            "max_padding": lambda: nn.MaxPool1d(3, stride=1, padding=1),
            "max_dilation": lambda: nn.MaxPool1d(2, stride=1, dilation=3),
            "max_ceil": lambda: nn.MaxPool1d(2, ceil_mode=True),
            "avg": lambda: nn.AvgPool1d(2),
            "avg_padding": lambda: nn.AvgPool1d(3, stride=2, padding=1),
            "avg_exclude": lambda: nn.AvgPool1d(3, stride=2, padding=1, count_include_pad=False),
            "avg_ceil": lambda: nn.AvgPool1d(3, stride=2, padding=1, ceil_mode=True),
            "adaptive_avg": lambda: nn.AdaptiveAvgPool1d(3),
            "adaptive_avg_one": lambda: nn.AdaptiveAvgPool1d(1),
            "adaptive_max": lambda: nn.AdaptiveMaxPool1d(3),
        },
    ),
    *modules(
        "pool2d",
        IMAGE,
        {
            "max": lambda: nn.MaxPool2d(2),
            "max_pair": lambda: nn.MaxPool2d((3, 1), stride=(1, 2)),
            "max_padding": lambda: nn.MaxPool2d(3, stride=2, padding=1),
            "max_dilation": lambda: nn.MaxPool2d(2, stride=1, dilation=(2, 3)),
            "max_ceil": lambda: nn.MaxPool2d(3, stride=2, ceil_mode=True),
            "max_relu": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            "avg": lambda: nn.AvgPool2d(2),
            "avg_pair": lambda: nn.AvgPool2d((2, 3), stride=(1, 2)),
            "avg_padding": lambda: nn.AvgPool2d(3, stride=2, padding=1),
            "avg_exclude": lambda: nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
            "avg_ceil": lambda: nn.AvgPool2d(2, stride=2, ceil_mode=True),
            "avg_ceil_padding": lambda: nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True),
            "avg_divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
            "adaptive_avg": lambda: nn.AdaptiveAvgPool2d((4, 2)),
            "adaptive_avg_one": lambda: nn.AdaptiveAvgPool2d(1),
            "adaptive_avg_none": lambda: nn.AdaptiveAvgPool2d((None, 3)),
            "adaptive_avg_bigger": lambda: nn.AdaptiveAvgPool2d((7, 7)),
            "adaptive_max": lambda: nn.AdaptiveMaxPool2d((3, 2)),
        },
    ),
    *functions(
        "pool2d",
        IMAGE,
        {
            "f_max": lambda x: F.max_pool2d(x, 2, stride=1),
            "f_max_relu": lambda x: F.relu(F.max_pool2d(x, 2)),
            "f_avg": lambda x: F.avg_pool2d(x, 3, 2, 1, False, False),
            "f_adaptive_avg": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
        },
    ),
    *modules(
        "pool3d",
        VOLUME,
        {
            "max": lambda: nn.MaxPool3d(2),
            "max_padding": lambda: nn.MaxPool3d(3, stride=2, padding=1),
            "max_dilation": lambda: nn.MaxPool3d(2, stride=1, dilation=(1, 2, 2)),
            "max_ceil": lambda: nn.MaxPool3d((2, 3, 2), ceil_mode=True),
            "avg": lambda: nn.AvgPool3d((2, 1, 3)),
            "avg_padding": lambda: nn.AvgPool3d(3, stride=2, padding=1),
            "avg_exclude": lambda: nn.AvgPool3d(3, stride=2, padding=1, count_include_pad=False, ceil_mode=True),
            "avg_divisor": lambda: nn.AvgPool3d(2, stride=1, divisor_override=5),
            "adaptive_avg": lambda: nn.AdaptiveAvgPool3d((3, 2, None)),
            "adaptive_max": lambda: nn.AdaptiveMaxPool3d((2, 3, 1)),
        },
    ),
)

REDUCTIONS = functions(
    "reduce",
    IMAGE,
    {
        "mean_pixels": lambda x: x.mean((2, 3)),
        "mean_keepdim": lambda x: x.mean((2, 3), keepdim=True),
        "mean_negative": lambda x: x.mean((-1, -2)),
        "mean_channels": lambda x: x.mean(1),
        "mean_channels_keepdim": lambda x: x.mean(dim=1, keepdim=True),
        "mean_last": lambda x: torch.mean(x, -1),
        "mean_all_features": lambda x: x.mean((1, 2, 3)).unsqueeze(-1),
        "sum_pixels": lambda x: x.sum((2, 3)),
        "sum_keepdim": lambda x: x.sum(-2, keepdim=True),
        "sum_unordered": lambda x: x.sum((3, 1)),
        "sum_last": lambda x: torch.sum(x, dim=-1),
        "centered": lambda x: (t := x.tanh()) - t.mean((2, 3), keepdim=True),
    },
)


# Shapes


SHAPES = (
    *modules(
        "shape",
        IMAGE,
        {
            "flatten_module": nn.Flatten,
            "flatten_pixels_module": lambda: nn.Flatten(2),
            "unflatten_module": lambda: nn.Unflatten(1, (2, 2)),
            "linear_after_flatten": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(30, 2)),
        },
    ),
    *functions(
        "shape",
        IMAGE,
        {
            "flatten": lambda x: x.flatten(1),
            "flatten_pixels": lambda x: torch.flatten(x, 2),
            "flatten_channels": lambda x: x.flatten(1, 2),
            "flatten_negative": lambda x: x.flatten(-3, -2),
            "view": lambda x: x.view(x.size(0), -1),
            "view_split": lambda x: x.view(x.shape[0], 2, 2, 6, 5).sum(2),
            "view_infer_batch": lambda x: x.view(-1, 120),
            "reshape": lambda x: x.reshape(x.shape[0], 4, 30),
            "reshape_permuted": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], 30, 4),
            "unflatten": lambda x: x.unflatten(-2, (2, 3)),
            "permute": lambda x: x.permute(0, 2, 3, 1),
            "permute_negative": lambda x: torch.permute(x, (0, -1, 1, -2)),
            "transpose": lambda x: x.transpose(1, 2),
            "transpose_negative": lambda x: x.transpose(-1, -2),
            "matrix_transpose": lambda x: x.mT,
            "swapaxes": lambda x: x.swapaxes(1, 3),
            "movedim": lambda x: x.movedim(1, -1),
            "contiguous": lambda x: x.transpose(1, 2).contiguous(),
            "squeeze": lambda x: x.mean(-1, keepdim=True).squeeze(-1),
            "squeeze_two": lambda x: x.mean((2, 3), keepdim=True).squeeze((2, 3)),
            "squeeze_twice": lambda x: x.mean((2, 3), keepdim=True).squeeze(3).squeeze(2),
            "squeeze_nothing": lambda x: x.squeeze(1),
            "unsqueeze": lambda x: x.unsqueeze(1),
            "unsqueeze_last": lambda x: x.unsqueeze(-1),
            "none_index": lambda x: x[:, None, ..., None],
            "expand": lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1),
            "expand_new_axis": lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1, -1),
            "expand_as": lambda x: x.mean((2, 3), keepdim=True).expand_as(x) * x,
            "channel_shuffle": lambda x: x.view(x.shape[0], 2, 2, 6, 5).transpose(1, 2).reshape(x.shape[0], 4, 6, 5),
            "channels_last": lambda x: x.to(memory_format=torch.channels_last),
        },
    ),
)


# Cutting and joining


def product_of_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return first * second


def unequal_split(x: Tensor) -> Tensor:
    first, second = x.split([1, 3], dim=1)
    return first * second


def swap_halves(x: Tensor) -> Tensor:
    first, second = torch.split(x, 2, dim=1)
    return torch.cat([second.relu(), first], dim=1)


def multiply_channels(x: Tensor) -> Tensor:
    a, b, c, d = x.unbind(1)
    return a * b + c - 2 * d


CUTS = functions(
    "cut",
    IMAGE,
    {
        "cat": lambda x: torch.cat([x, x.relu()], 1),
        "cat_last": lambda x: torch.cat((x.tanh(), x), dim=-1),
        "cat_same": lambda x: torch.cat([x, x], 1),
        "cat_unequal": lambda x: torch.cat([x[:, :1], x, x[:, 2:]], dim=1),
        "cat_constant": lambda x: torch.cat([x, torch.ones_like(x[:, :1])], dim=1),
        "cat_blank": lambda x: torch.cat([x, torch.ones(x.shape[0], 1, *x.shape[2:], dtype=x.dtype)], dim=1),
        "stack": lambda x: torch.stack([x, x.sin()], dim=2),
        "slice": lambda x: x[:, 1:3],
        "slice_step": lambda x: x[:, ::2, 1::2],
        "slice_open": lambda x: x[..., 2:],
        "slice_negative": lambda x: x[:, -3:-1],
        "slice_overlap": lambda x: x[:, :, 1:] - 0.5 * x[:, :, :-1],
        "select": lambda x: x[:, 1],
        "select_negative": lambda x: x.select(-1, -2),
        "select_two": lambda x: x[:, 1, :, 3],
        "narrow": lambda x: x.narrow(2, 1, 3),
        "chunk": product_of_halves,
        "chunk_unequal": lambda x: x.chunk(4, dim=2)[2] + x.chunk(3, dim=2)[1],
        "chunk_unused": lambda x: x.chunk(2, dim=1)[0],
        "split": swap_halves,
        "split_sizes": unequal_split,
        "tensor_split": lambda x: torch.tensor_split(x, 3, dim=3)[0],
        "unbind": multiply_channels,
        "index_list": lambda x: x[:, [0, 2, 2]],
        "index_select": lambda x: x.index_select(1, torch.tensor([3, 0])),
    },
)

PADS = (
    *functions(
        "pad",
        IMAGE,
        {
            "zeros": lambda x: F.pad(x, (1, 2)),
            "zeros_2d": lambda x: F.pad(x, (1, 0, 2, 1)),
            "channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
            "value": lambda x: F.pad(x, (1, 1, 1, 1), value=2.5),
            "crop": lambda x: F.pad(x, (-1, -1, -2, 0)),
            "crop_and_pad": lambda x: F.pad(x, (-1, 2, 1, -2), value=1.0),
            "reflect": lambda x: F.pad(x, (2, 1, 0, 3), mode="reflect"),
            "circular": lambda x: F.pad(x, (2, 1, 0, 3), mode="circular"),
            "replicate": lambda x: F.pad(x, (2, 1, 0, 3), mode="replicate"),
        },
    ),
    *modules(
        "pad",
        IMAGE,
        {
            "zero_module": lambda: nn.ZeroPad2d((1, 0, 2, 1)),
            "constant_module": lambda: nn.ConstantPad2d(1, 0.5),
            "reflection_module": lambda: nn.ReflectionPad2d(1),
            "replication_module": lambda: nn.ReplicationPad2d((1, 2, 0, 1)),
        },
    ),
    *functions(
        "pad1d",
        SIGNAL,
        {f"{mode}": partial(F.pad, pad=(2, 1), mode=mode) for mode in ("constant", "reflect", "circular", "replicate")},
    ),
    *functions(
        "pad3d",
        VOLUME,
        {
            f"{mode}": partial(F.pad, pad=(1, 2, 0, 1, 1, 0), mode=mode)
            for mode in ("constant", "reflect", "circular", "replicate")
        },
    ),
)

IDENTITIES = (
    *modules(
        "identity",
        IMAGE,
        {
            "identity": nn.Identity,
            "dropout": lambda: nn.Dropout(0.5),
            "dropout_inplace": lambda: nn.Dropout(0.5, inplace=True),
            "dropout2d": lambda: nn.Dropout2d(0.3),
            "alpha_dropout": lambda: nn.AlphaDropout(0.3),
            "empty_sequential": nn.Sequential,
        },
    ),
    *functions(
        "identity",
        IMAGE,
        {
            "function": lambda x: x,
            "f_dropout": lambda x: F.dropout(x, 0.5, training=False),
            "clone": lambda x: x.clone(),
            "contiguous": lambda x: x.contiguous(),
            "to_same": lambda x: x.to(torch.float64),
            "add_zero": lambda x: x + 0,
        },
    ),
)


# Parameters: tied, reused, frozen, unreached, and branches around them


class Model(nn.Module):
    """`forward(model, x)` over named parts: a network in one row of the table."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def tie(model: nn.Module, first: str, second: str) -> nn.Module:
    """The parameter `second` becomes the parameter `first`."""
    owner, _, leaf = second.rpartition(".")
    setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
    return model


def freeze(model: nn.Module, *names: str) -> nn.Module:
    """The model with the named parameters frozen."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def mlp(*widths: int) -> nn.Sequential:
    """Linear, Tanh, Linear, …, Linear."""
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def small_cnn() -> nn.Sequential:
    """Conv, BatchNorm, ReLU, Conv, global mean, Linear."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def applied_twice() -> nn.Module:
    """head(fc(tanh(fc(x))))."""
    return Model(lambda m, x: m.head(m.fc(m.fc(x).tanh())), fc=nn.Linear(3, 3), head=nn.Linear(3, 3))


def two_layers(o: int = 3) -> nn.Module:
    """fc2(tanh(fc1(x)))."""
    return Model(lambda m, x: m.fc2(m.fc1(x).tanh()), fc1=nn.Linear(3, o), fc2=nn.Linear(o, 3))


def one_module_two_names() -> nn.Module:
    """The same Linear registered as `a` and as `b`."""
    fc = nn.Linear(3, 3)
    return Model(lambda m, x: m.head(m.b(m.a(x).tanh())), a=fc, b=fc, head=nn.Linear(3, 3))


def conv_reused() -> nn.Module:
    """One convolution on two resolutions."""
    return Model(
        lambda m, x: m.head(m.conv(m.conv(x).relu()).mean((2, 3)) + m.conv(x).mean((2, 3))),
        conv=nn.Conv2d(2, 2, 3, stride=2, padding=1),
        head=nn.Linear(2, 3),
    )


def grouped_reused() -> nn.Module:
    """One grouped convolution applied twice."""
    return Model(
        lambda m, x: m.head(m.conv(m.conv(x).tanh()).mean(-1)),
        conv=nn.Conv1d(4, 4, 3, padding=1, groups=2),
        head=nn.Linear(4, 3),
    )


def siamese() -> nn.Module:
    """One encoder on two halves of the input; the head sees both and their product."""
    return Model(
        lambda m, x: m.head(torch.cat([a := m.encoder(x[:, 0]), b := m.encoder(x[:, 1]), a * b], dim=-1)),
        encoder=mlp(3, 4, 2),
        head=nn.Linear(6, 3),
    )


def parallel() -> nn.Module:
    """Three layers with one input, joined in different ways."""
    return Model(
        lambda m, x: m.head(torch.cat([m.q(x) * m.k(x), m.v(x).relu()], 1)),
        q=nn.Linear(3, 2),
        k=nn.Linear(3, 2),
        v=nn.Linear(3, 4),
        head=nn.Linear(6, 3),
    )


def dense_residual() -> nn.Module:
    """x -> x + f(x) twice, and everything before joins at the end."""
    return Model(
        lambda m, x: m.head((h := x + m.a(x).relu()) + (g := h + m.b(h).tanh()) + x * g),
        a=nn.Linear(3, 3),
        b=nn.Linear(3, 3),
        head=nn.Linear(3, 3),
    )


def never_called() -> nn.Module:
    """A layer that is not called, and one whose result is not used."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.wasted(x)
        return m.head(m.fc(x).tanh())

    return Model(forward, fc=nn.Linear(3, 4), unused=nn.Linear(3, 4), wasted=nn.Linear(3, 2), head=nn.Linear(4, 3))


def loop_over_time() -> nn.Module:
    """A recurrent cell, unrolled over three steps."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.start(x[:, 0])
        for t in range(1, x.shape[1]):
            h = torch.tanh(m.input(x[:, t]) + m.hidden(h))
        return m.head(h)

    parts = {"start": nn.Linear(2, 3), "input": nn.Linear(2, 3), "hidden": nn.Linear(3, 3), "head": nn.Linear(3, 3)}
    return Model(forward, **parts)


PARAMETERS = (
    sample("param.applied_twice", applied_twice, (3,)),
    sample("param.applied_twice_tokens", applied_twice, (4, 3), out=(4, 3), loss=nn.MSELoss, target=normal),
    sample("param.one_module_two_names", one_module_two_names, (3,)),
    sample("param.tied_weight", lambda: tie(two_layers(), "fc1.weight", "fc2.weight"), (3,)),
    sample("param.tied_bias", lambda: tie(two_layers(), "fc1.bias", "fc2.bias"), (3,)),
    sample("param.tied_both", lambda: tie(tie(two_layers(), "fc1.weight", "fc2.weight"), "fc1.bias", "fc2.bias"), (3,)),
    sample("param.conv_reused", conv_reused, (2, 5, 6)),
    sample("param.grouped_reused", grouped_reused, (4, 5)),
    sample("param.siamese", siamese, (2, 3)),
    sample("param.parallel", parallel, (3,)),
    sample("param.dense_residual", dense_residual, (3,)),
    sample("param.loop_over_time", loop_over_time, (3, 2)),
    sample("param.never_called", never_called, (3,)),
    sample("param.frozen_body", lambda: freeze(two_layers(4), "fc1.weight", "fc1.bias"), (3,)),
    sample("param.frozen_head", lambda: freeze(two_layers(4), "fc2.weight", "fc2.bias"), (3,)),
    sample("param.frozen_weight", lambda: freeze(two_layers(4), "fc1.weight"), (3,)),
    sample("param.frozen_bias", lambda: freeze(two_layers(4), "fc2.bias"), (3,)),
    sample("param.frozen_all_but_bias", lambda: freeze(two_layers(4), "fc1.weight", "fc2.weight", "fc2.bias"), (3,)),
    sample("param.frozen_norm", lambda: freeze(small_cnn(), "1.weight", "1.bias"), (2, 5, 5)),
    sample("param.frozen_but_norm", lambda: freeze(small_cnn(), "0.weight", "3.weight", "3.bias", "1.bias"), (2, 5, 5)),
    sample("param.frozen_tied", lambda: freeze(tie(two_layers(), "fc1.weight", "fc2.weight"), "fc1.weight"), (3,)),
)


# Ops without a rule: the generic pullback

FALLBACKS = (
    *functions(
        "generic",
        IMAGE,
        {
            "softmax": lambda x: x.softmax(1),
            "log_softmax": lambda x: F.log_softmax(x, dim=1),
            "logsumexp": lambda x: x.logsumexp((2, 3)),
            "cumsum": lambda x: x.cumsum(1),
            "std": lambda x: x.std(1),
            "var": lambda x: x.var(1, unbiased=False),
            "norm": lambda x: x.norm(dim=1),
            "amax": lambda x: x.amax((2, 3)),
            "max_values": lambda x: x.max(dim=2).values,
            "prod": lambda x: x.prod(1),
            "normalize": lambda x: F.normalize(x, dim=1),
            "layer_norm": lambda x: F.layer_norm(x, (4, 6, 5)),
            "group_norm": lambda x: F.group_norm(x, 2),
            "instance_norm": lambda x: F.instance_norm(x.tanh()),
            "einsum": lambda x: torch.einsum("nchw,ndhw->ncd", x, x.tanh()),
            "matmul": lambda x: x @ x.transpose(-1, -2).sin(),
            "divide": lambda x: x / (x.square().sum(1, keepdim=True) + 1),
            "flip": lambda x: x.flip(2, 3),
            "roll": lambda x: x.roll((1, -2), dims=(2, 3)),
            "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
            "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
            "bilinear": lambda x: F.interpolate(x, size=(4, 7), mode="bilinear", align_corners=False),
            "unfold": lambda x: F.unfold(x, 2, stride=2),
            "repeat": lambda x: x.repeat(1, 2, 1, 1),
            "repeat_interleave": lambda x: x.repeat_interleave(2, dim=3),
            "glu": lambda x: F.glu(x, dim=1),
            "where": lambda x: torch.where(x > 0, x, 0.1 * x.square()),
            "maximum": lambda x: torch.maximum(x, x.roll(1, dims=1)),
            "argmax": lambda x: x + x.gather(1, x.argmax(1, keepdim=True)) * (x.sum(1, keepdim=True) > 0),
            "masked_fill": lambda x: x.masked_fill(torch.eye(6, 5, dtype=torch.bool), 0.0),
            "diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
            "local_response": lambda x: F.local_response_norm(x, 3),
            "attention": lambda x: F.scaled_dot_product_attention(x, x.tanh(), x.sin()),
        },
    ),
)


# Right or refused: aliases, detached parts, a batch axis that moves


def write_slice(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2] = y[:, :2] * 3
    return y


def scale_slice(x: Tensor) -> Tensor:
    x[:, 1:3].mul_(2.0)
    return x


def read_alias(x: Tensor) -> Tensor:
    view = x.flatten(1)
    x.tanh_()
    return view


def write_view(x: Tensor) -> Tensor:
    x.view(x.shape[0], -1).tanh_()
    return x


def gate_without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = x.sigmoid()
    return x * gate


class FoldedConv(nn.Module):
    """A convolution over [N K, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.flatten(0, 1))
        return y.view(x.shape[0], x.shape[1], *y.shape[1:])


class BatchSecond(nn.Module):
    """A Linear that sees [H, N, C W]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)


TRICKY = (
    *functions(
        "tricky",
        IMAGE,
        {
            "write_slice": write_slice,
            "scale_slice": scale_slice,
            "read_alias": read_alias,
            "write_view": write_view,
            "detach": lambda x: x * x.detach(),
            "detach_data": lambda x: x + x.data.square(),
            "no_grad": gate_without_grad,
            "branch_on_shape": lambda x: x.relu() if x.shape[2] > 3 else x,
        },
    ),
    *modules(
        "tricky",
        IMAGE,
        {
            "folded_batch": after(
                lambda x: x.permute(0, 2, 3, 1).reshape(-1, 4).view(-1, 30, 4), lambda: nn.Linear(4, 2)
            ),
            "folded_linear": lambda: nn.Sequential(
                nn.Flatten(2), nn.Flatten(0, 1), nn.Linear(30, 2), nn.Unflatten(0, (-1, 4))
            ),
            "folded_conv": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), FoldedConv()),
            "batch_second": BatchSecond,
        },
    ),
)


class Free(nn.Module):
    """join(x, parameter): a parameter in a form of its own."""

    def __init__(self, shape: tuple[int, ...], join: Join) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.randn(shape) / 2)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.free)


FREE = (
    *modules(
        "free",
        TOKENS,
        {
            "additive": lambda: Free((1, 3, 4), lambda x, p: x + p),
            "scale": lambda: Free((4,), lambda x, p: x * p),
            "token": lambda: Free((1, 1, 4), lambda x, p: torch.cat([p.expand(x.shape[0], -1, -1), x], dim=1)),
            "matmul": lambda: Free((4, 2), lambda x, p: x @ p),
            "computed_weight": lambda: Free((2, 4), lambda x, p: F.linear(x, p - p.mean(1, keepdim=True))),
            "weight_and_penalty": lambda: Free((2, 4), lambda x, p: F.linear(x, p) * p.square().sum()),
            "temperature": lambda: Free((), lambda x, p: x * p.exp()),
            "prelu": lambda: nn.PReLU(3),
            "prelu_shared": lambda: nn.PReLU(),
            "rms_norm": lambda: nn.RMSNorm(4),
            "sliced": lambda: Free((3, 5, 4), lambda x, p: x + p[:, 1]),
            "interpolated": lambda: Free((1, 2, 4), lambda x, p: x + F.interpolate(p.mT, 3, mode="linear").mT),
            "gathered": lambda: Free((7, 4), lambda x, p: x + p[torch.tensor([0, 5, 5])]),
            "used_twice": lambda: Free((4,), lambda x, p: (x * p).relu() + p),
            "through_mlp": lambda: Free((4, 4), lambda x, p: x + (torch.eye(4, dtype=x.dtype) @ p).tanh()[:3]),
            "layer_norm": lambda: nn.LayerNorm(4),
            "conv_transpose": lambda: nn.ConvTranspose1d(3, 2, 2),
        },
    ),
    *modules("free", VECTOR, {"prelu_of_vector": lambda: nn.PReLU(4)}),
)

MIXING = functions(
    "mixing",
    VECTOR,
    {
        "batch_mean": lambda x: x - x.mean(0),
        "batch_softmax": lambda x: x.softmax(0),
        "batch_flip": lambda x: x.flip(0),
        "batch_gram": lambda x: x @ x.T @ x,
    },
)


# Losses


def mixed_tokens() -> nn.Module:
    """[N, 4, 3]: a Linear per token, and tokens that see each other's mean."""
    return Model(
        lambda m, x: m.out((h := m.fc(x).tanh()) + h.mean(1, keepdim=True)), fc=nn.Linear(2, 3), out=nn.Linear(3, 3)
    )


def conv_signal() -> nn.Module:
    """[N, 3, 5]: one loss term per position, and positions that mix."""
    return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 3, 3, padding=1))


def conv_image() -> nn.Module:
    """[N, 3, 2, 3]."""
    return nn.Sequential(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Conv2d(2, 3, 3, padding=1))


def scalar_output() -> nn.Module:
    """[N]: the output has no feature axis."""
    return Model(lambda m, x: m.body(x).squeeze(-1), body=mlp(3, 4, 1))


OUTPUTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "": (lambda: mlp(3, 4, 3), (3,), (3,)),
    "_signal": (conv_signal, (2, 5), (3, 5)),
    "_image": (conv_image, (2, 3, 4), (3, 2, 3)),
    "_tokens": (mixed_tokens, (4, 2), (4, 3)),
    "_scalar": (scalar_output, (3,), ()),
    "_one": (lambda: mlp(3, 4, 1), (3,), (1,)),
}


def constant(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def losses(
    prefix: str, make: Callable[..., nn.Module], table: Mapping[str, tuple[str, dict[str, Any], Target]]
) -> tuple[Sample, ...]:
    """One row for each variant and each reduction."""
    rows: list[Sample] = []
    for name, (output, options, target) in table.items():
        model, shape, out = OUTPUTS[output]
        for reduction in ("mean", "sum"):
            loss = partial(make, reduction=reduction, **options)
            rows.append(sample(f"{prefix}.{name}{output}.{reduction}", model, shape, loss=loss, target=target, out=out))
    return tuple(rows)


CLASS_WEIGHT = {"weight": constant(0.5, 2.0, 1.3)}
LOSSES = (
    *losses(
        "cross_entropy",
        nn.CrossEntropyLoss,
        {
            "plain": ("", {}, class_indices),
            "weight": ("", CLASS_WEIGHT, class_indices),
            "zero_weight": ("", {"weight": constant(0.0, 2.0, 1.0)}, ignoring(0)),
            "ignore_default": ("", {}, ignoring(-100)),
            "ignore_class": ("", {"ignore_index": 1}, ignoring(1)),
            "smoothing": ("", {"label_smoothing": 0.2}, class_indices),
            "all": ("", {**CLASS_WEIGHT, "ignore_index": 2, "label_smoothing": 0.1}, ignoring(2)),
            "soft": ("", {}, probabilities),
            "soft_unnormalized": ("", {}, unnormalized),
            "soft_all": ("", {**CLASS_WEIGHT, "label_smoothing": 0.3}, probabilities),
            "positions": ("_signal", {}, class_indices),
            "positions_all": ("_signal", {**CLASS_WEIGHT, "label_smoothing": 0.1}, ignoring(-100)),
            "positions_soft": ("_signal", CLASS_WEIGHT, probabilities),
            "pixels": ("_image", CLASS_WEIGHT, ignoring(-100)),
        },
    ),
    *losses(
        "mse",
        nn.MSELoss,
        {
            "plain": ("", {}, normal),
            "on": ("_tokens", {}, normal),
            "of": ("_scalar", {}, normal),
            "over": ("_image", {}, normal),
        },
    ),
    *losses(
        "bce",
        nn.BCEWithLogitsLoss,
        {
            "plain": ("", {}, binary),
            "soft": ("", {}, unit),
            "weight": ("", {"weight": constant(0.5, 2.0, 0.0)}, binary),
            "pos_weight": ("", {"pos_weight": constant(0.5, 3.0, 1.0)}, binary),
            "all": ("", {"weight": constant(0.5, 2.0, 1.5), "pos_weight": constant(0.5, 3.0, 0.0)}, unit),
            "single": ("_one", {"pos_weight": constant(4.0)}, binary),
            "soft_of": ("_scalar", {}, unit),
            "all_on": ("_tokens", {"weight": constant(0.5, 2.0, 1.5), "pos_weight": constant(2.0, 3.0, 1.0)}, unit),
        },
    ),
)


# Whole models, narrow


def classify(m: Any, x: Tensor) -> Tensor:
    """features, pooling, flatten, classifier: the forward pass of AlexNet and VGG."""
    return m.classifier(torch.flatten(m.avgpool(m.features(x)), 1))


def lenet() -> nn.Module:
    """Convolutions, average pools and tanh on 1x14x14."""
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)),
    )


def alexnet() -> nn.Module:
    """AlexNet's layers in their order, few channels, on 3x23x23."""
    features = nn.Sequential(
        *(nn.Conv2d(3, 4, 5, stride=2, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(4, 6, 3, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 1)),
    )
    classifier = nn.Sequential(
        *(nn.Dropout(), nn.Linear(16, 8), nn.ReLU(inplace=True)),
        *(nn.Dropout(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)),
    )
    return Model(classify, features=features, avgpool=nn.AdaptiveAvgPool2d((2, 2)), classifier=classifier)


def vgg_bn() -> nn.Module:
    """torchvision's VGG features with BatchNorm, few channels, on 3x12x12."""
    from torchvision.models.vgg import make_layers

    classifier = nn.Sequential(
        *(nn.Linear(20, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 4))
    )
    features = make_layers([3, "M", 4, "M", 5, 5, "M"], batch_norm=True)
    return Model(classify, features=features, avgpool=nn.AdaptiveAvgPool2d((2, 2)), classifier=classifier)


def resnet(block: str, width: int = 6, groups: int = 1) -> nn.Module:
    """torchvision's ResNet, one block a stage, `width` channels where it has 64."""
    from torchvision.models import resnet as tv

    class Narrow(tv.ResNet):
        def __init__(self, block: type[tv.BasicBlock | tv.Bottleneck]) -> None:
            nn.Module.__init__(self)
            self._norm_layer = nn.BatchNorm2d
            self.inplanes, self.dilation, self.groups, self.base_width = width, 1, groups, 64
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
            self.layer1 = self._make_layer(block, width, 1)
            self.layer2 = self._make_layer(block, width + 1, 2, stride=2)
            self.layer3 = self._make_layer(block, width + 2, 1, stride=2)
            self.layer4 = self._make_layer(block, width, 1, stride=2)
            self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(width * block.expansion, 4)

    return Narrow(getattr(tv, block))


def mobilenet_v2() -> nn.Module:
    """torchvision's MobileNetV2 with few channels and blocks, its wide last layers replaced."""
    from torchvision.models.mobilenetv2 import MobileNetV2
    from torchvision.ops.misc import Conv2dNormActivation

    setting = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]  # expansion, channels, blocks, stride
    model = MobileNetV2(num_classes=4, width_mult=0.1, inverted_residual_setting=setting, round_nearest=2)
    last: Any = model.features[-1]
    model.features[-1] = Conv2dNormActivation(last[0].in_channels, 8, kernel_size=1, activation_layer=nn.ReLU6)
    model.classifier[1] = nn.Linear(8, 4)
    return model


def efficientnet_lite() -> nn.Module:
    """timm's tf_efficientnet_lite0 with few channels and blocks: TensorFlow 'same' padding and ReLU6."""
    from timm.models._efficientnet_builder import decode_arch_def, resolve_bn_args, round_channels
    from timm.models.efficientnet import EfficientNet

    blocks = [["ds_r1_k3_s1_e1_c16"], ["ir_r2_k3_s2_e6_c24"], ["ir_r1_k5_s2_e6_c40"]]
    return EfficientNet(
        block_args=decode_arch_def(blocks, fix_first_last=True),
        num_classes=4,
        num_features=8,
        stem_size=3,
        fix_stem=True,
        round_chs_fn=partial(round_channels, multiplier=0.1, divisor=2),
        pad_type="same",
        act_layer=nn.ReLU6,
        norm_layer=partial(nn.BatchNorm2d, **resolve_bn_args({"bn_eps": 1e-3})),
    )


MODELS = (
    sample("model.mlp", lambda: mlp(6, 8, 7, 4), (6,), out=(4,)),
    sample("model.lenet", lenet, (1, 14, 14), out=(4,)),
    sample("model.alexnet", alexnet, (3, 23, 23), out=(4,)),
    sample("model.vgg_bn", vgg_bn, (3, 12, 12), out=(4,)),
    sample("model.resnet_basic", lambda: resnet("BasicBlock"), (3, 24, 24), out=(4,)),
    sample("model.resnet_bottleneck", lambda: resnet("Bottleneck", 3), (3, 24, 24), out=(4,)),
    sample("model.resnext", lambda: resnet("Bottleneck", 3, groups=2), (3, 24, 24), out=(4,)),
    sample("model.mobilenet_v2", mobilenet_v2, (3, 24, 24), out=(4,)),
    sample("model.efficientnet_lite", efficientnet_lite, (3, 24, 24), out=(4,)),
)

SAMPLES = (
    *(*LINEAR, *CONVS, *NORMS, *ACTIVATIONS, *ARITHMETIC, *POOLS, *REDUCTIONS),
    *(*SHAPES, *CUTS, *PADS, *IDENTITIES, *PARAMETERS, *FREE, *FALLBACKS),
)
