"""Settings of every test: one thread, the global random state left alone, and the marker `fast`.

`python -m pytest -m fast` is the loop of a developer, and of the pre-commit hook: one sample for every rule, the texts
of the passes, a whole model, the front doors. It takes less than a minute on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest
import torch

torch.set_num_threads(1)

ONE_PER_RULE = (
    *("transformer.decoder", "norm.local_response", "index.take_along_dim", "weight.conditional_conv", "cut.cat_blank"),
    *("interpolate3d.area", "pool1d.avg_exclude", "join.channel_sub", "computed.pooled", "lane.one_hot", "norm.last"),
    *("pool3d.max_ceil", "pool2d.max_pair", "act.silu_inplace", "act.gelu_tanh", "act.elu", "act.celu_alpha"),
    *("pool1d.adaptive_avg", "act.f_hardsigmoid", "right.transposed", "act.threshold", "act.softplus", "act.f_relu6"),
    *("act.hardshrink", "act4d.hardtanh", "act.logsigmoid", "act.leaky_relu_slope", "act.softshrink", "act.selu"),
    *("act.hardswish_inplace", "computed.detached_scale", "scalar.neg", "act.mish", "conv2d.groups", "linear.tokens"),
    "generic.custom_gradient",
)
"""Samples whose graphs hold every rule between them; `tests/ir/test_samples.py` checks that."""

FAST = (
    *(f"tests/ir/test_samples.py::test_rule[[]{name}]" for name in ONE_PER_RULE),
    *("tests/ir/test_samples.py::test_model[[]model.lenet]", "tests/ir/test_samples.py::test_the_*"),
    *("tests/ir/test_samples.py::test_every_rule_has_a_sample", "tests/passes/test_[!i]*", "tests/blocks/*"),
    *("tests/core/test_rooms.py::test_[!i]*", "tests/api/test_api.py::*", "tests/quantities/test_selection.py::*"),
    *("tests/checks/test_codes.py::test_the_*", "tests/contractions/test_definitions.py::*"),
    *("tests/results/test_block_diagonal.py::*", "tests/dataset/test_accumulation.py::test_a_data_set*"),
    *("tests/verification/*model_is_refused", "tests/verification/*as_before", "tests/verification/*always*"),
    *("tests/verification/*followed[[]Closure]", "tests/verification/*a_program[[]Larger]"),
)
"""Patterns of the tests that are fast."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast tests."""
    for item in items:
        if any(fnmatchcase(item.nodeid, pattern) for pattern in FAST):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(autouse=True)
def _global_random_state_is_left_alone() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the test or the code under test drew from the global generator"
