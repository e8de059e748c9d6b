"""Functions of one tensor entry by entry, and arithmetic of two."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samples.rows import IMAGE, TOKENS, VECTOR, Constant, Fork, Join, functions, modules


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
            "f_relu6": lambda x: F.relu6(20 * x + 3),
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
