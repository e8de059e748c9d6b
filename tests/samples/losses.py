"""Every option of every loss, on outputs of every shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from samples.rows import (
    Model,
    Sample,
    Target,
    binary,
    class_indices,
    constant,
    ignoring,
    mlp,
    normal,
    probabilities,
    sample,
    unit,
    unnormalized,
)


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
