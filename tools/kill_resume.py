"""Kill -9 an accumulation at random moments, again and again, and compare what it ends with: the same bits each time.

    python tools/kill_resume.py [--trials 200] [--batches 40] [--seed 0] [--report FILE]

A trial runs an accumulation with a checkpoint after every batch in a process of its own, kills it after a random time,
up to six times over, and then lets one finish. Its result must equal that of a run that nobody disturbed, bit by bit.
A kill in the middle of a write is told by the temporary file that it leaves. Exits with 1 where a trial ends otherwise.

Processes are forked from this one, which has imported and compiled everything, and computed nothing (POSIX).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxcurv
from fxcurv.core.fingerprint import digest
from fxcurv.results.merging import values_of

QUANTITIES = ["kfac", "diag_ggn_mc", "kflr"]


def compiled() -> fxcurv.Compiled:
    """A small network, compiled for its quantities."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 20), nn.Tanh(), nn.Linear(20, 5))
    return fxcurv.compile(model.eval(), quantities=QUANTITIES, example_inputs=torch.zeros(3, 1, 8, 8))


def accumulate(compiled: fxcurv.Compiled, path: Path | None, batches: int) -> fxcurv.Curvature:
    """A shuffled data set, sampled factors, factors that are kept as vectors at first."""
    data = torch.Generator().manual_seed(0)
    x, y = torch.randn(batches * 3, 1, 8, 8, generator=data), torch.randint(5, (batches * 3,), generator=data)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    return compiled.accumulate(loader, generator=generator, checkpoint=path, every=1, until_rel_error=1e-9)


def bits(result: fxcurv.Curvature) -> str:
    """A digest of every value."""
    tensors = [v.tensors if isinstance(v, fxcurv.Block) else v for v in values_of(result)]
    return digest((result.samples, result.divisor, result.loss, tensors))


# Processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trials:
    """What all trials share; `longest` is the time after which no run is killed any more."""

    compiled: fxcurv.Compiled
    batches: int
    longest: float = 0.0

    def started(self, path: Path | None) -> tuple[int, int]:
        """A process that continues the accumulation: its number, and a pipe with the bits that it ends with."""
        reader, writer = os.pipe()
        process = os.fork()
        if process:
            os.close(writer)
            return process, reader
        try:
            torch.set_num_threads(1)  # of the child: torch makes its pool anew, before several threads ask for it
            os.write(writer, bits(accumulate(self.compiled, path, self.batches)).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)

    def killed(self, path: Path, left: float) -> str:
        """Start a run and kill it: `between` writes, `in a write`, or `at the end` if it was too late.

        `left` is the share of the batches that it still has to take.
        """
        before = set(path.parent.iterdir())
        process, reader = self.started(path)
        time.sleep(random.uniform(0, self.longest * left))
        os.kill(process, signal.SIGKILL)
        os.close(reader)
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert ended in (0, -signal.SIGKILL), f"a run ended with {ended}"
        if ended == 0:
            return "at the end"
        return "in a write" if set(path.parent.iterdir()) - before - {path} else "between"

    def finished(self, path: Path | None = None) -> str:
        """The bits with which a run ends that is left alone."""
        process, reader = self.started(path)
        with os.fdopen(reader) as pipe:
            found = pipe.read()
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert ended == 0, f"a run ended with {ended}"
        return found

    def trial(self, path: Path) -> tuple[list[tuple[str, int]], str]:
        """Kill and resume, then let a run end: when each kill hit, with how many samples saved, and the final bits."""
        hits: list[tuple[str, int]] = []
        samples = 0
        for _ in range(random.randint(1, 6)):
            if samples == 3 * self.batches:
                break
            when = self.killed(path, 1 - samples / (3 * self.batches))
            samples = fxcurv.load(path).samples if path.exists() else 0  # never a file that cannot be read
            hits.append((when, samples))
        return hits, self.finished(path)


def main() -> int:
    """Run all trials, print what became of each, and a report; 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    trials = Trials(compiled(), arguments.batches)
    expected = trials.finished()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        trials.finished(Path(folder) / "checkpoint.safetensors")
        trials = replace(trials, longest=0.7 * (time.monotonic() - began))  # most kills then hit before the end
    kills, identical = Counter[str](), 0
    for k in range(arguments.trials):
        with tempfile.TemporaryDirectory() as folder:
            hits, found = trials.trial(Path(folder) / "checkpoint.safetensors")
        kills.update(when for when, _ in hits)
        identical += found == expected
        told = ", ".join(f"{samples} samples ({when})" for when, samples in hits)
        print(f"trial {k}: killed at {told}: {'the same' if found == expected else 'OTHER'} bits", flush=True)
    report = {"trials": arguments.trials, "identical": identical, "kills": kills.total(), **kills}
    print(json.dumps(report))
    if arguments.report:
        arguments.report.write_text(json.dumps(report), encoding="utf-8")
    return 0 if identical == arguments.trials else 1


if __name__ == "__main__":
    sys.exit(main())
