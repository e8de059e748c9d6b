"""Kill -9 an accumulation at random moments, again and again, and compare what it ends with: the same bits each time.

    python tools/kill_resume.py [--trials 50] [--batches 60] [--seed 0] [--report FILE]

A trial runs an accumulation with a checkpoint after every batch in a process of its own, kills it after a random time,
one to six times over, and then lets one finish. Its result must equal that of a run that nobody
disturbed, bit by bit. Exits with 1 where one does not.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxcurv
from fxcurv.fingerprint import digest
from fxcurv.merging import values_of

QUANTITIES = ["kfac", "diag_ggn_mc", "kflr"]


@functools.cache
def compiled() -> fxcurv.Compiled:
    """A small network, compiled for its quantities."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 20), nn.Tanh(), nn.Linear(20, 5))
    return fxcurv.compile(model.eval(), quantities=QUANTITIES, example_inputs=torch.zeros(3, 1, 8, 8))


def accumulate(path: Path | None, batches: int) -> fxcurv.Curvature:
    """A shuffled data set, sampled factors, factors that are kept as vectors at first."""
    data = torch.Generator().manual_seed(0)
    x, y = torch.randn(batches * 3, 1, 8, 8, generator=data), torch.randint(5, (batches * 3,), generator=data)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    return compiled().accumulate(loader, generator=generator, checkpoint=path, every=1, until_rel_error=1e-9)


def bits(result: fxcurv.Curvature) -> str:
    """A digest of every value."""
    tensors = [v.tensors if isinstance(v, fxcurv.Block) else v for v in values_of(result)]
    return digest((result.samples, result.divisor, result.loss, tensors))


def killed_after(seconds: float, command: list[str]) -> None:
    """Start a run, and kill it so long after it began to read batches."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()  # it has compiled
    time.sleep(seconds)
    child.kill()
    child.communicate()


def trial(path: Path, batches: int, longest: float) -> tuple[list[int], str]:
    """Kill and resume, then let a run end. How many samples were saved at each kill, and the final bits."""
    held: list[int] = []
    command = [sys.executable, os.path.abspath(__file__), "--batches", str(batches), "--run", str(path)]
    for _ in range(random.randint(1, 6)):
        killed_after(random.uniform(0, longest), command)
        held.append(fxcurv.load(path).samples if path.exists() else 0)  # never a file that cannot be read
    return held, subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]


def main() -> int:
    """Run all trials, or as a process of one of them an accumulation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        compiled()
        print("compiled", flush=True)
        print(bits(accumulate(arguments.run, arguments.batches)))
        return 0
    random.seed(arguments.seed)
    expected = bits(accumulate(None, arguments.batches))
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        accumulate(Path(folder) / "checkpoint.safetensors", arguments.batches)
        longest = time.monotonic() - began
    longest *= 0.7  # most kills then hit a run that is not yet at its end
    kills = unfinished = identical = left = 0
    for k in range(arguments.trials):
        with tempfile.TemporaryDirectory() as folder:
            held, found = trial(Path(folder) / "checkpoint.safetensors", arguments.batches, longest)
            left += len(list(Path(folder).glob(".*")))
        kills, identical = kills + len(held), identical + (found == expected)
        unfinished += sum(samples < 3 * arguments.batches for samples in held)
        print(f"trial {k}: kills at samples {held}, {'the same' if found == expected else 'OTHER'} bits")
    report = {"trials": arguments.trials, "kills": kills, "before the end": unfinished, "identical": identical}
    report["temporary files left"] = left
    print(json.dumps(report))
    if arguments.report:
        arguments.report.write_text(json.dumps(report), encoding="utf-8")
    return 0 if identical == arguments.trials else 1


if __name__ == "__main__":
    sys.exit(main())
