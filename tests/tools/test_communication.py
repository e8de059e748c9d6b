"""Communication on paper: what is committed is what the tool yields; volumes are those of the blocks' shapes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")

from fxcurv.blocks.kronecker import Kronecker

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("communication", ROOT / "tools/communication.py")
assert SPEC is not None
assert SPEC.loader is not None
tool = sys.modules["communication"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)


def test_the_committed_table_is_what_the_tool_yields() -> None:
    """All of the page from the numbers, and these of the smaller model from its blocks."""
    committed = (tool.RESULTS / "communication.csv").read_text(encoding="utf-8")
    lines = tool.from_csv(committed)
    assert tool.as_csv(lines) == committed
    assert tool.page(lines) == (tool.RESULTS / "communication.md").read_text(encoding="utf-8")
    assert {line.model for line in lines} == set(tool.MODELS)
    blocks = tool.planned("resnet50")
    again = [line for of in tool.CHOICES for line in tool.lines("ResNet-50", of, blocks[of])]
    assert tool.as_csv(again) == tool.as_csv([line for line in lines if line.model == "ResNet-50"])

    weights = blocks["weights"]
    assert all(isinstance(block, Kronecker) for block in weights)
    assert tuple(weights[0].sizes.values()) == ((147, 147), (64, 64))  # the stem: 7 x 7 of 3 channels
    assert tuple(weights[-1].sizes.values()) == ((2049, 2049), (1000, 1000))  # the head, joint with its bias
    sides = [side for block in weights for side, _ in block.sizes.values()]
    assert sum(t.numel() for t in tool.triangles(weights)) == sum(d * (d + 1) // 2 for d in sides)
    assert sum(tool.squares(block) for block in weights) == 4 * sum(d * d for d in sides)


def test_rings_and_messages() -> None:
    received, seconds = tool.ring([100, 50], 4)
    assert received == 2 * 3 / 4 * 150
    assert seconds == pytest.approx(2 * 6 * tool.LATENCY + received / tool.INSIDE)
    assert tool.ring([100], 1) == (0, 0)
    bucket = tool.distributed.BUCKET_BYTES
    assert tool.messages([bucket // 2, bucket // 2, bucket * 2, 1], [0, 0, 0, 1]) == 3
