"""Models that nobody wrote: random layers, residual adds, gates and concatenations, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import samples
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_samples import check_against_oracle
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu_inplace": lambda x: F.relu(x * 1, inplace=True),
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "softmax": lambda x: x.softmax(1),
}


class Generated(nn.Module):
    """A feature map that each step transforms, adds to, multiplies or joins with an earlier one, then a classifier."""

    def __init__(self, steps: list[tuple[str, int]], channels: int) -> None:
        super().__init__()
        self.steps, self.layers = steps, nn.ModuleList()
        width, widths = channels, [channels]
        for kind, choice in steps:
            layer: nn.Module = nn.Identity()
            if kind == "conv":
                kernel, groups, dilation = (1, 3)[choice % 2], (1, 2)[choice // 2 % 2], (1, 2)[choice // 4 % 2]
                layer = nn.Conv2d(
                    width,
                    4,
                    kernel,
                    padding=dilation * (kernel // 2),
                    groups=groups,
                    dilation=dilation,
                    bias=choice % 3 > 0,
                )
                width = 4
            elif kind == "norm":
                layer = nn.BatchNorm2d(width)
            elif kind == "project":
                layer = nn.Conv2d(widths[choice % len(widths)], width, 1)
            elif kind == "cat":
                width += widths[choice % len(widths)]
            self.layers.append(layer)
            widths.append(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for (kind, choice), layer in zip(self.steps, self.layers, strict=True):
            earlier = maps[choice % len(maps)]
            if kind == "act":
                x = ACTIVATIONS[sorted(ACTIVATIONS)[choice % len(ACTIVATIONS)]](x)
            elif kind == "project":
                x = x + layer(earlier)
            elif kind == "gate":
                x = x * earlier.mean((1, 2, 3), keepdim=True)
            elif kind == "cat":
                x = torch.cat([earlier, x], 1)
            else:
                x = layer(x)
            maps.append(x)
        return self.head(x.mean((2, 3)))


STEP = st.tuples(st.sampled_from(["conv", "norm", "act", "project", "gate", "cat"]), st.integers(0, 11))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=1, max_size=7), batch=st.integers(1, 3))
def test_generated_models(steps: list[tuple[str, int]], batch: int) -> None:
    build = lambda: samples.seeded(lambda: Generated(steps, 2), str(steps))  # noqa: E731
    check_against_oracle(samples.Sample(f"generated {steps}", build, (2, 4, 3)), batch)
