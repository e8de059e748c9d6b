"""Right or refused: aliases, detached parts, a batch axis that moves; and samples that mix, always refused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samples.computed import ConditionalConv, StandardizedConv
from samples.rows import IMAGE, VECTOR, after, functions, modules


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


def write_detached(x: Tensor) -> Tensor:
    y = x.clone()
    y.detach()[:, 0] = 0.5
    return y * x


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
            "detach_write": write_detached,
            "cholesky": lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(6, dtype=x.dtype)),
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
            "weight_through_batch_norm": lambda: StandardizedConv("batch_norm"),
            "kernel_per_sample": lambda: ConditionalConv(folded=True),
        },
    ),
)


def write_first(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = x.sum(0)
    return y


MIXING = functions(
    "mixing",
    VECTOR,
    {
        "batch_mean": lambda x: x - x.mean(0),
        "batch_softmax": lambda x: x.softmax(0),
        "batch_flip": lambda x: x.flip(0),
        "batch_roll": lambda x: x + x.roll(1, 0),
        "batch_cumsum": lambda x: x.cumsum(0),
        "batch_sort": lambda x: x.sort(0).values,
        "batch_spectrum": lambda x: torch.fft.fft(x, dim=0).real,
        "batch_rank": lambda x: x * (x > x.mean(0)),
        "batch_write": write_first,
        "first_sample": lambda x: x - x[:1],
        "batch_gram": lambda x: x @ x.T @ x,
        "place_in_batch": lambda x: x * torch.arange(x.shape[0]).view(-1, 1),
        "over_batch_size": lambda x: x / x.shape[0],
    },
)
