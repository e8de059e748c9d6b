"""Pooling and reductions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from samples.rows import IMAGE, SIGNAL, VOLUME, functions, modules

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
