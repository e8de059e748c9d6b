"""Images taken apart, rearranged and resampled; transposed convolutions; further pools and normalisations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samples.rows import IMAGE, SIGNAL, VOLUME, Op, functions, modules

INTERPOLATIONS: dict[str, Op] = {
    "nearest_up": lambda x: F.interpolate(x, size=(7, 8)),
    "nearest_down": lambda x: F.interpolate(x, size=(4, 3)),
    "nearest_exact": lambda x: F.interpolate(x, size=(4, 7), mode="nearest-exact"),
    "bilinear_corners": lambda x: F.interpolate(x, size=(4, 7), mode="bilinear", align_corners=True),
    "bilinear_scale": lambda x: F.interpolate(x, scale_factor=(1.5, 0.5), mode="bilinear"),
    "bilinear_antialias": lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True),
    "bilinear_same": lambda x: F.interpolate(x, size=x.shape[2:], mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, size=(4, 7), mode="bicubic"),
    "bicubic_corners": lambda x: F.interpolate(x, size=(7, 4), mode="bicubic", align_corners=True),
    "bicubic_antialias": lambda x: F.interpolate(x, size=(3, 4), mode="bicubic", antialias=True),
    "area": lambda x: F.interpolate(x, size=(4, 3), mode="area"),
    "upsample": nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "upsample_nearest": nn.UpsamplingNearest2d(scale_factor=2),
    "upsample_bilinear": nn.UpsamplingBilinear2d(size=(7, 6)),
}


def warped(mode: str, padding: str = "zeros", corners: bool = False) -> Op:
    """The image at places that depend on the image."""

    def op(x: Tensor) -> Tensor:
        grid = torch.stack([x[:, 0, :4, :4].sin(), x[:, 1, :4, :4].cos()], -1)
        return F.grid_sample(x[:, 2:], 1.3 * grid, mode=mode, padding_mode=padding, align_corners=corners)

    return op


def rotated(x: Tensor) -> Tensor:
    """A transformation of the plane per sample, computed from it."""
    theta = x.mean((2, 3))[:, None, :3].repeat(1, 2, 1).sin()
    grid = F.affine_grid(theta, [x.shape[0], 2, 3, 4], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def windows(x: Tensor) -> Tensor:
    """Windows of 3 × 5 pixels folded into the batch, a softmax over each, and back."""
    n, c, h, w = x.shape
    y = x.view(n, c, h // 3, 3, w // 5, 5).permute(0, 2, 4, 3, 5, 1).reshape(-1, 15, c).softmax(1)
    return y.view(-1, h // 3, w // 5, 3, 5, c).permute(0, 5, 1, 3, 2, 4).reshape(-1, c, h, w)


def shifted_windows(x: Tensor) -> Tensor:
    """As in a Swin transformer: rolled, taken apart, rolled back."""
    return windows(x.roll((-1, -2), (2, 3))).roll((1, 2), (2, 3))


def folded(x: Tensor) -> Tensor:
    """Overlapping patches, changed, summed into an image again."""
    return F.fold(F.unfold(x, (2, 3), padding=1).tanh(), (6, 5), (2, 3), padding=1)


def unpooled(x: Tensor) -> Tensor:
    """Maxima put back where they came from."""
    y, indices = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y.tanh(), indices, [2, 2], output_size=(6, 5))


REARRANGED: dict[str, Op] = {
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[..., :4], 2),
    "channel_shuffle_op": lambda x: F.channel_shuffle(x, 2),
    "grid_sample": warped("bilinear"),
    "grid_sample_border": warped("bilinear", "border", corners=True),
    "grid_sample_reflection": warped("bicubic", "reflection"),
    "grid_sample_nearest": warped("nearest"),
    "affine_grid": rotated,
    "windows": windows,
    "shifted_windows": shifted_windows,
    "fold": folded,
    "fold_module": nn.Sequential(
        nn.Unfold(2, stride=2, dilation=2), nn.Tanh(), nn.Fold((6, 5), 2, stride=2, dilation=2)
    ),
    "tensor_unfold": lambda x: x.unfold(2, 3, 2).unfold(3, 2, 1),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "max_unpool": unpooled,
    "lp_pool": lambda x: F.lp_pool2d(x.sigmoid(), 2, 2),
    "lp_pool_norm": lambda x: F.lp_pool2d(x.sigmoid(), 3, (2, 3), stride=2),
    "max_pool_indices": lambda x: F.max_pool2d(x, 3, 2, return_indices=True)[0],
    "adaptive_max_indices": lambda x: F.adaptive_max_pool2d(x, (2, 3), return_indices=True)[0],
    "unbalanced_adaptive": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
}


def fractional(x: Tensor) -> Tensor:
    """Fractional max pooling at places that are fixed, as its drawing of them is random."""
    places = torch.full((x.shape[0], x.shape[1], 2), 0.4, dtype=x.dtype)
    return F.fractional_max_pool2d(x, 2, output_size=(3, 2), _random_samples=places)


TRANSPOSED: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "signal": {
        "plain": lambda: nn.ConvTranspose1d(4, 3, 2),
        "everything": lambda: nn.ConvTranspose1d(4, 2, 3, 2, padding=1, output_padding=1, groups=2, dilation=2),
    },
    "image": {
        "plain": lambda: nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False),
        "depthwise": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=4),
        "everything": lambda: nn.ConvTranspose2d(
            4, 2, (1, 2), (1, 2), (0, 1), output_padding=(0, 1), groups=2, dilation=(1, 2)
        ),
    },
    "volume": {
        "plain": lambda: nn.ConvTranspose3d(2, 1, 2),
        "everything": lambda: nn.ConvTranspose3d(2, 2, (2, 1, 1), (2, 1, 1), output_padding=(1, 0, 0), groups=2),
    },
}
NORMALISATIONS: dict[str, Callable[[], nn.Module]] = {
    "layer_norm_image": lambda: nn.LayerNorm([6, 5]),
    "layer_norm_no_bias": lambda: nn.LayerNorm(5, bias=False),
    "layer_norm_plain": lambda: nn.LayerNorm(5, elementwise_affine=False, eps=0.1),
    "group_norm": lambda: nn.GroupNorm(2, 4),
    "group_norm_one": lambda: nn.GroupNorm(1, 4, eps=0.3),
    "group_norm_plain": lambda: nn.GroupNorm(2, 4, affine=False),
    "instance_norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance_norm_plain": lambda: nn.InstanceNorm2d(4),
    "instance_norm_running": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "rms_norm_eps": lambda: nn.RMSNorm([6, 5], eps=0.2),
    "local_response": lambda: nn.LocalResponseNorm(3, alpha=0.5, beta=0.6, k=2.0),
    "layer_norm_channels": lambda: nn.Sequential(Permuted(0, 2, 3, 1), nn.LayerNorm(4), Permuted(0, 3, 1, 2)),
}


class Permuted(nn.Module):
    """y = x.permute(axes)."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


def resized(mode: str, size: tuple[int, ...], corners: bool | None = None) -> Op:
    return partial(F.interpolate, size=size, mode=mode, align_corners=corners)


RESAMPLING = (
    *functions("interpolate", IMAGE, INTERPOLATIONS),
    *functions(
        "interpolate1d",
        SIGNAL,
        {
            "linear": resized("linear", (10,)),
            "linear_corners": resized("linear", (4,), True),
            "nearest": resized("nearest", (5,)),
            "area": resized("area", (3,)),
        },
    ),
    *functions(
        "interpolate3d",
        VOLUME,
        {
            "trilinear": resized("trilinear", (3, 4, 4)),
            "trilinear_corners": resized("trilinear", (2, 7, 3), True),
            "nearest_exact": resized("nearest-exact", (3, 4, 2)),
            "area": resized("area", (2, 2, 2)),
        },
    ),
    *functions("image", IMAGE, {**REARRANGED, "fractional": fractional}),
    *modules("conv_transpose1d", SIGNAL, TRANSPOSED["signal"]),
    *modules("conv_transpose2d", IMAGE, TRANSPOSED["image"]),
    *modules("conv_transpose3d", VOLUME, TRANSPOSED["volume"]),
    *modules("norm", IMAGE, NORMALISATIONS),
    *modules(
        "norm",
        VOLUME,
        {"group_norm_3d": lambda: nn.GroupNorm(2, 2), "instance_norm_3d": lambda: nn.InstanceNorm3d(2, affine=True)},
    ),
)
