"""Stress: generated models against the oracle, for as long as one likes, from a seed that is printed.

    python tools/stress.py --minutes 10             as many models as that allows
    python tools/stress.py --minutes 1 --seed 7     the same models in the same order
    python tools/stress.py --jobs 2                 in two processes
    python tools/stress.py --kind hostile           models with constructs that a trace does not see

Every model of the kind `generated` is compiled with the gradient, the exact diagonal and both kinds of KFAC; half of
them with a form that is forced, some with samples and columns in chunks. What comes out must equal tests/reference.py,
which is brute force in float64, or be refused with a cause. A model that does not is made smaller for as long as it is
still wrong, and printed as a script that shows it: run it in a clone with `PYTHONPATH=.:tests`. Exits with 1 if there
was one.

Types narrower than float64 are held to a tolerance that a few models in a thousand exceed where they are badly
conditioned; these are counted as `imprecise` if the same model is right in float64.

Models of the kind `hostile` (tests/hostile) have custom backward passes, hooks, checkpoints, wrapped forwards, branches
on the batch size, samples that mix, or state that changes between calls. The oracle is the model's own `backward()` in
another process. A table of the outcomes by construct is printed and written to tools/results/hostile.md; exits with 1
if a value was wrong, a parameter dropped, or an exception raised that is not an FxcurvError.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the sources beside it, not an installed copy

import hostile.run
from generated import Case, check, draw, script, smaller

__all__ = ["main"]


@dataclass(frozen=True)
class Outcome:
    """What became of a seed: `right`, `refused FXC…`, `imprecise …` or `wrong`."""

    seed: int
    kind: str


def outcome(seed: int) -> Outcome:
    """Draw a case and check it."""
    case = draw(seed)
    kind = checked(case)
    if kind == "wrong" and case.dtype != "float64" and checked(replace(case, dtype="float64")) != "wrong":
        return Outcome(seed, f"imprecise {case.dtype}")
    return Outcome(seed, kind)


def checked(case: Case) -> str:
    """What becomes of a case."""
    try:
        return check(case)
    except Exception:
        return "wrong"


def outcomes(seed: int, minutes: float, jobs: int) -> Iterator[Outcome]:
    """Cases from a seed on, until the time is over."""
    end, seeds = time.monotonic() + 60 * minutes, iter(range(seed, seed + 10**9))
    if jobs == 1:
        while time.monotonic() < end:
            yield outcome(next(seeds))
        return
    with multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
        for found in pool.imap(outcome, seeds_until(seed, end), chunksize=4):
            yield found
            if time.monotonic() > end:
                return


def seeds_until(seed: int, end: float) -> Iterator[int]:
    """Seeds, no faster than they are used."""
    started = time.monotonic()
    for k in range(10**9):
        if time.monotonic() > end:
            return
        if k > 64 + 20 * (time.monotonic() - started):
            time.sleep(0.05)
        yield seed + k


def main(arguments: Sequence[str] | None = None) -> int:
    """Run for some minutes, print counts and scripts; 1 if a model was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("generated", "hostile"), default="generated")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="where to begin; by default the time")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seed = int(time.time()) * 1000 if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    if options.kind == "hostile":
        return hostile.run.report(seed, options.minutes, options.jobs)
    began = sum(os.times()[:4])
    counts: Counter[str] = Counter()
    for found in outcomes(seed, options.minutes, options.jobs):
        counts[found.kind] += 1
        if found.kind == "wrong":
            case = smaller(draw(found.seed), lambda case: checked(case) == "wrong")
            print(f"\n# seed {found.seed}\n{script(case)}", flush=True)
    print("\n".join(f"{count:6d} {kind}" for kind, count in sorted(counts.items())))
    each = (sum(os.times()[:4]) - began) / max(counts.total(), 1)
    print(f"{counts.total():6d} models from seed {seed}, {counts['wrong']} wrong; {each:.2f} s of processor time each")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
