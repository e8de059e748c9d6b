"""Linear layers and convolutions, with every hyper-parameter, and BatchNorm in eval mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samples.rows import IMAGE, SIGNAL, TOKENS, VECTOR, VOLUME, after, modules, sample


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
