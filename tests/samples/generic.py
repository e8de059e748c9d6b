"""Ops without a rule: the generic pullback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from samples.rows import IMAGE, functions


class Tanh(torch.autograd.Function):
    """tanh with its backward written by hand, which torch.func differentiates too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


FALLBACKS = (
    *functions(
        "generic",
        IMAGE,
        {
            "custom_gradient": Tanh.apply,
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
