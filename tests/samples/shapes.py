"""Shapes, cutting and joining, padding, and ops that compute nothing."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samples.rows import IMAGE, SIGNAL, VOLUME, functions, modules

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
