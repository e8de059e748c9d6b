"""Two processes equal one; whatever happens to one of them, both end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
from test_readme import matches

from fxcurv.cli import main

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import os, signal, sys
from datetime import timedelta

import torch
import torch.distributed as dist

sys.path[:0] = [{tests!r}]
import fxcurv
from fxcurv import distributed
from test_accumulate import emptied
from test_files import EXACT, LOSSES, assert_equal, reals, tokens

rank, case = int(sys.argv[1]), sys.argv[2]
dist.init_process_group(
    "gloo", init_method="file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
)


def batches(x, y, sizes=(2, 1, 4)):
    return list(zip(x.split(sizes), y.split(sizes)))


def own(name, shares):
    dense, loss, y = LOSSES[name]
    compiled, x = fxcurv.compile(tokens(dense), loss, EXACT), reals(7, 3, 5) - 0.5
    all = batches(x, y)
    return compiled, (x, y), [all[k] for k in shares[rank]]


if case == "equal":
    distributed.BUCKET_BYTES = 1000
    for name in ("weighted", "ignored", "summed", "mse"):
        for shares in (((0,), (1, 2)), ((), (0, 1, 2)), ((0, 1, 2), ())):
            compiled, whole, mine = own(name, shares)
            result = compiled.accumulate(mine, checkpoint={folder!r} + "/" + name + str(shares))
            assert_equal(result, emptied(compiled(*whole)))
    plain, _, mine = own("weighted", ((0,), (1, 2)))
    single = fxcurv.compile(plain.model.float(), quantities="kflr")
    result = single.accumulate([(x.float(), y) for x, y in mine])
    print("bits", fxcurv.fingerprint.digest([b.tensors for b in result["kflr"].values()]))
    for shares in (((0,), (1, 2)), ((), (0, 1, 2))):
        _, (x, y), mine = own("weighted", shares)
        quantities = ["ekfac_exact", fxcurv.EKFAC(fxcurv.Empirical(), joint=True), "grad"]
        twice = fxcurv.compile(tokens(False), LOSSES["weighted"][1], quantities)
        result, whole = twice.accumulate(mine, checkpoint={folder!r} + "/twice" + str(shares)), twice(x, y)
        print("bits", fxcurv.fingerprint.digest([e.tensors() for e in result.entries]))
        for entry in whole.entries:
            ours = result[entry.quantity][entry.parameter]
            ours, theirs = (v.dense() if isinstance(v, fxcurv.Block) else v for v in (ours, entry.value))
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    x = torch.arange(7)
    assert distributed.shard(x).indices == range(rank, 7, 2)
    try:
        compiled.accumulate([])
    except fxcurv.InputError as error:
        print("refused:", error)
    try:
        fxcurv.compile(plain.model, quantities="foof").accumulate([(x.float(), y) for x, y in mine[:1]])
    except fxcurv.FxcurvError as error:
        print("refused:", error)
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    bias = distribute_tensor(compiled.model.fc.bias.detach(), init_device_mesh("cpu", (2,)))
    compiled.model.fc.bias = torch.nn.Parameter(bias)
    try:
        compiled.accumulate([])
    except fxcurv.UnsupportedError as error:
        print("refused:", error)
else:
    class Loader:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            yield from self.batches
            if rank == int(sys.argv[3]):
                if case == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError("the disk is gone")

    compiled, whole, mine = own("weighted", ((0,), (1, 2)))
    if case == "values" and rank == 1:
        with torch.no_grad():
            next(compiled.model.parameters()).add_(1e-9)
    try:
        compiled.accumulate(mine if case == "values" else Loader(mine), timeout=8)
    except fxcurv.FxcurvError as error:
        print("ended:", error)
        os._exit(3)
"""


def run(tmp_path: Path, *arguments: str, limit: float = 150) -> list[tuple[int, str]]:
    """The exit code and the output of each of two processes."""
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(tests=str(ROOT / "tests"), store=tmp_path / "store", folder=str(tmp_path)), encoding="utf-8"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    end = time.monotonic() + limit
    try:
        outputs = [p.communicate(timeout=max(1, end - time.monotonic()))[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, out) for p, out in zip(processes, outputs, strict=True)]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """With uneven and with empty shards, in several buckets, for every quantity that adds and both reductions."""
    bits: set[str] = set()
    for code, out in run(tmp_path, "equal"):
        assert code == 0, out
        assert "refused: there was no batch" in out
        assert "refused: parameter 'fc.bias' is a DTensor, spread over processes" in out
        assert "FXC429" in out
        assert "foof of two batches is not made of foof of each" in out
        bits.add("".join(line for line in out.splitlines() if line.startswith("bits")))
    assert len(bits) == 1, "both get the same bits"
    assert len(list(tmp_path.glob("weighted*-of-2"))) == 4  # of the six shards two are empty


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_of_one_ends_both(tmp_path: Path, rank: str) -> None:
    ended = run(tmp_path, "raise", rank)
    failed, other = ended[int(rank)], ended[1 - int(rank)]
    assert "OSError: the disk is gone" in failed[1]
    assert failed[0] == 1
    assert f"ended: process {rank} raised OSError: the disk is gone" in other[1]
    assert "FXC428" in other[1]


def test_a_killed_process_is_missed(tmp_path: Path) -> None:
    killed, other = reversed(run(tmp_path, "kill", "1"))
    assert killed[0] == -9
    assert other[0] == 3
    assert "ended: process 1 gave no sign for 8 s, after 2 batches" in other[1]


def test_models_of_other_values_are_refused(tmp_path: Path) -> None:
    for code, out in run(tmp_path, "values", "0"):
        assert code == 3, out
        assert "their model differs" in out


def test_the_command_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Under torchrun, what one process prints: the same table, up to the last of its digits."""
    argv = ["compute", "torch.nn:Linear?in_features=4&out_features=3", "--input", "4", "--batch", "5"]
    argv += ["--quantities", "kflr,diag_ggn"]
    assert main(argv) == 0
    alone = capsys.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fxcurv"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    both = subprocess.run([*torchrun, *argv], capture_output=True, text=True, timeout=150, env=environment)
    assert both.returncode == 0, both.stderr
    assert matches(alone, both.stdout), both.stdout
