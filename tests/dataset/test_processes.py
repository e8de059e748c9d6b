"""Several processes equal one; whatever happens to one of them, all end."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from batches import emptied
from curvatures import assert_equal
from torch import Tensor

pytest.importorskip("safetensors")
from texts import matches

import fxcurv
from fxcurv.cli.main import main
from fxcurv.core.fingerprint import digest
from fxcurv.dataset.processes import assigned

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def only(result: fxcurv.Curvature, sampled: bool) -> fxcurv.Curvature:
    """The quantities of sampled columns, or the others."""
    kept = {name: e for name, e in result.items() if ("sampled" in next(iter(e.entries.values())).factor) == sampled}
    assert kept
    return dataclasses.replace(result, quantities=kept)


def merged(results: Iterable[fxcurv.Curvature]) -> fxcurv.Curvature:
    first, *others = results
    for other in others:
        first = fxcurv.merge(first, other)
    return first


def test_four_processes_equal_one(tmp_path: Path) -> None:
    """With uneven shards, an empty one, and several buckets: everything that adds, and every map of blocks."""
    ended = ranks.run(4, ranks.equal, str(tmp_path))
    for one in ended:
        assert (one.code, one.error) == (0, "")
    told: list[dict[str, Any]] = [one.value for one in ended]
    for name, compiled, data in ranks.losses():
        found = [pickle.loads(one[name]) for one in told]
        assert_equal(only(found[0], sampled=False), only(emptied(compiled(data[0], data[1])), sampled=False))
        shares = ((k, ranks.share(data, k)) for k in range(4))
        each = (compiled.accumulate(s, generator=torch.Generator().manual_seed(k)) for k, s in shares if s)
        assert_equal(only(found[0], sampled=True), only(merged(each), sampled=True))
        assert len({digest([e.tensors() for e in one.entries]) for one in found}) == 1, "the bits"
    blocks = len(compiled(data[0], data[1]).operator("kflr").parts)
    for name in ranks.MAPS:
        assert len({one[f"bits {name}"] for one in told}) == 1
        counts = [one[f"blocks {name}"] for one in told]
        assert sum(counts) == blocks, "each by one process"
        assert min(counts) > 0
    assert sorted(k for one in told for k in one["share"]) == list(range(7))
    assert len(list(tmp_path.glob("ignored*-of-4"))) == 3  # of the four shards one is empty


def test_two_processes_equal_one_for_every_name() -> None:
    """In its results, or in refusing a quantity that does not add over batches."""
    first, second = ranks.run(2, ranks.by_name)
    for one in (first, second):
        assert (one.code, one.error) == (0, "")
    model, data = ranks.halves()
    for name, quantity in fxcurv.NAMES.items():
        alone = ranks.outcome(lambda name=name: fxcurv.compile(model, quantities=name).accumulate(data))
        told = first.value[name]
        if isinstance(alone, str):
            assert alone in {told, second.value[name]} <= {"FXC425", "FXC428"}, name
            continue
        ours, theirs = pickle.loads(told), pickle.loads(alone)
        assert (ours.samples, ours.divisor) == (theirs.samples, theirs.divisor) == (4, 4.0)
        assert dense(pickle.loads(second.value[name])).equal(dense(ours))
        if "Sampled" not in repr(quantity):
            torch.testing.assert_close(dense(ours), dense(theirs), rtol=1e-12, atol=1e-14)
    assert {name for name in fxcurv.NAMES if first.value[name] != "FXC425"} >= {*ranks.ADDED}
    assert first.value["no batch"] == second.value["no batch"] == "FXC110"
    assert {one.value[name] for one in (first, second) for name in ranks.SPREAD} == {"FXC429"}


def dense(result: fxcurv.Curvature) -> Tensor:
    """All of a result's numbers, blocks as the matrices that they are."""
    values = (e.value.dense() if isinstance(e.value, fxcurv.Block) else e.value for e in result.entries)
    return torch.cat([v.flatten() for v in (result.loss, *values) if v is not None])


def test_the_costliest_first_to_whoever_has_the_least_to_do() -> None:
    assert assigned([1, 5, 3, 3, 2], 2) == [1, 0, 1, 1, 0]  # 7 and 7
    assert assigned([1, 5, 3], 1) == [0, 0, 0]
    assert assigned([2, 1], 4) == [0, 1]


@pytest.mark.parametrize(
    ("how", "which", "code", "own", "others"),
    [
        ("raise", 0, 1, "OSError: the disk is gone", "process 0 raised OSError: the disk is gone"),
        ("raise", 1, 1, "OSError: the disk is gone", "process 1 raised OSError: the disk is gone"),
        ("inverse", 1, 1, "OSError: no inverse", "process 1 raised OSError: no inverse"),
        ("kill", 1, -9, "", "process 1 did not respond for 3 s, after 2 batches"),
        ("kill", 0, -9, "", "the process with the group's store does not respond"),
        ("exchange", 1, 9, "", "a process ended while values were exchanged"),
        ("values", 1, 1, "their model differs", "their model differs"),
        ("blocks", 1, 1, "processes 0 and 1 have different blocks", "processes 0 and 1 have different blocks"),
    ],
)
def test_what_ends_one_ends_all(how: str, which: int, code: int, own: str, others: str) -> None:
    ended = ranks.run(3, ranks.failing, how, which, limit=60)
    for rank, one in enumerate(ended):
        assert one.code == (code if rank == which else 1)
        assert (own if rank == which else others) in one.error
        if rank != which:
            assert ("FXC425" if how in ("values", "blocks") else "FXC428") in one.error


def test_the_command_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Under torchrun, what one process prints: the same table, up to the last of its digits."""
    argv = ["compute", "torch.nn:Linear?in_features=4&out_features=3", "--input", "4", "--batch", "5"]
    argv += ["--quantities", "kflr,diag_ggn"]
    assert main(argv) == 0
    alone = capsys.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fxcurv"]
    environment = os.environ | ranks.ENVIRONMENT
    both = subprocess.run([*torchrun, *argv], capture_output=True, text=True, timeout=150, env=environment)
    assert both.returncode == 0, both.stderr
    assert matches(alone, both.stdout), both.stdout
