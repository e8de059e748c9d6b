"""The benchmark: what a curvature costs, in gradients.

    python tools/bench.py                                          every problem, every row
    python tools/bench.py --quick                                  a smoke test of three minutes
    python tools/bench.py --problems 3c3d --rows 'fxcurv*' --repeats 25
    python tools/bench.py --problems gpt2 --add                    this one anew, the others as the files have them
    python tools/bench.py --scaling                                slopes in batch, columns, depth and width
    python tools/bench.py --device cuda                            on a GPU: files in results/cuda

A problem is a network, its inputs and labels; a row is a library and a quantity; benchmark/problems.py and
benchmark/rows.py have the tables. Models and data are made from a seed, the network is in eval mode with random
BatchNorm statistics, the loss is the mean cross entropy. The unit is the gradient: forward and backward by
torch.autograd, with nothing to set to zero.

One by one. Each row first runs in a process of its own, forked from one that has imported everything and compiled
something small. There it compiles ("compile s": processor time, for what compiles) and runs, within the problem's limit
of processor time; one that does not end within it is a row that says so, and so is one that takes too much memory, one
whose cheaper relative is over the limit, and one that a library refuses.

Memory. There it runs once more: drop the results, return freed memory to the system, reset the kernel's high-water mark
of resident memory (Linux: 5 > /proc/self/clear_refs), run. Peak is the mark minus the residency before, so it counts
results and every temporary, torch's or not, but neither the model and data nor what a compiled object keeps. The
allocator gives each block of 64 KiB or more back when it is freed; else a warm heap would hide what the run needs.
Where the mark cannot be reset the column stays empty.

Time. What was able to run is prepared again in one process per problem and runs once, and once at half the batch
("first at N/2": a new batch size needs no new compilation), before anything else is timed. Repetitions go round-robin
over the rows, so that a slow minute of the machine meets all of them. Between, never during, a measurement garbage is
collected, and as much memory as the row needs is written to: a virtual machine gives free memory back to its host, and
pays when it is used next. A row of less than two seconds or so runs once more before it is timed, as it would in a
loop. A row has at least three repetitions, and no more once they add up to the limit. With one thread the clock is the
processor time of the process, which neighbours on a shared machine lengthen least; with more, and on a GPU, once it has
nothing left to do, it is the wall clock; and there limits of time are of that clock, and memory is what tensors occupy.
Reported are the median, the quartile spread, and the median over the rounds of the row's time divided by the gradient's
in the same round. A row times what yields new numbers for a new batch: for curvlinops that includes making the
operator, which belongs to one batch and one parameter state.

"covers" is the share of the trainable elements that got a result, "predicted" what a compiled object expects of a run.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the sources beside it, not an installed copy

import torch

from benchmark import machine, picture, report, scaling
from benchmark.devices import DEVICES
from benchmark.measure import Settings, apart, import_all, measured
from benchmark.problems import PROBLEMS, Problem
from benchmark.rows import GRADIENT, ROWS, Row, subject
from fxcurv.core.optional import MissingPackageError

RESULTS = machine.ROOT / "tools" / "results"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: few problems, rows and repetitions")
    parser.add_argument("--repeats", type=int, help="repetitions of every row (default 7, with --quick 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to measure (default cpu)")
    parser.add_argument("--problems", help="names separated by commas (default: all)")
    parser.add_argument("--rows", help="patterns separated by commas, as 'fxcurv*,*KFAC*' (default: all)")
    parser.add_argument("--limit", type=float, help="processor seconds a row may take (default: its problem's limit)")
    parser.add_argument("--memory", type=float, default=12, help="GiB a row may take (default 12)")
    parser.add_argument("--roofline", action="store_true", help="also measure the machine's peaks")
    parser.add_argument("--scaling", action="store_true", help="instead of the problems: scaling.csv and scaling.md")
    parser.add_argument("--add", action="store_true", help="keep what the files have of other problems")
    parser.add_argument("--output", type=Path, help="folder of the files")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not apart(torch.cuda.is_available):  # apart: CUDA and forks do not go together
        parser.error("torch finds no GPU here")
    arguments.output = arguments.output or (RESULTS if arguments.device == "cpu" else RESULTS / arguments.device)
    quick = [name for name, problem in PROBLEMS.items() if problem.quick_batch is not None]
    names = arguments.problems.split(",") if arguments.problems else quick if arguments.quick else list(PROBLEMS)
    if unknown := [name for name in names if name not in PROBLEMS]:
        parser.error(f"no problem {', '.join(unknown)}; there are {', '.join(PROBLEMS)}")
    arguments.problems = {name: sized(PROBLEMS[name], arguments.quick) for name in names}
    arguments.rows = [row for row in ROWS if row is GRADIENT or asked(row, arguments)]
    arguments.repeats = arguments.repeats or (3 if arguments.quick else 7)
    return arguments


QUICK_BATCH, QUICK_LIMIT = 2, 3.0
QUICK = {"grad", "kfac", "kflr", "diag_ggn", "diag_ggn_mc", "batch_grad", "sum_grad_squared", "GGN product"}
"""What a smoke test computes, by each library that has it."""


def asked(row: Row, arguments: argparse.Namespace) -> bool:
    if arguments.rows:
        return any(fnmatch.fnmatchcase(row.name, pattern) for pattern in arguments.rows.split(","))
    return not arguments.quick or subject(row.quantity) in QUICK


def sized(problem: Problem, quick: bool) -> Problem:
    """The problem, or a quick one."""
    return replace(problem, batch=problem.quick_batch or QUICK_BATCH, limit=QUICK_LIMIT) if quick else problem


def without(option: str, argv: Iterable[str]) -> list[str]:
    """The arguments without an option and its value: where the files went did not make the numbers."""
    kept: list[str] = []
    previous = ""
    for argument in argv:
        if option not in (argument, previous) and not argument.startswith(option + "="):
            kept.append(argument)
        previous = argument
    return kept


def facts(arguments: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    """The command, then where it ran and how."""
    device = DEVICES[arguments.device]
    command = shlex.join(["python", "tools/bench.py", *without("--output", argv)])
    about = [command, machine.where(apart(lambda: device.about))]
    about.append(f"medians of {arguments.repeats} interleaved repetitions, {device.clock} time")
    if not arguments.scaling:
        about.append("; ".join(f"{name}: {problem}" for name, problem in arguments.problems.items()))
    return [*about, apart(machine.roofline, device.name, device.now)] if arguments.roofline else about


def settings(arguments: argparse.Namespace) -> Settings:
    return Settings(arguments.repeats, arguments.limit, arguments.memory, DEVICES[arguments.device])


EARLIER = "from an earlier run: "


def problems(arguments: argparse.Namespace, about: Sequence[str]) -> None:
    """Every problem, its lines written as soon as it is measured."""
    earlier, kept = report.read(arguments.output) if arguments.add else ([], [])
    lines = [line for line in kept if line.problem not in arguments.problems]
    about = [*about, *(EARLIER + fact.removeprefix(EARLIER) for fact in earlier)]
    paths: list[Path] = []
    for name, problem in arguments.problems.items():
        found = measured(name, problem, arguments.rows, settings(arguments))
        lines = sorted([*lines, *found], key=lambda line: [*PROBLEMS].index(line.problem))
        print(report.table(found, "simple", report.empty(found)), end="\n\n", flush=True)
        paths = report.write(arguments.output, about, lines, PROBLEMS | arguments.problems)
    try:
        paths += picture.draw(lines, arguments.output)
    except MissingPackageError as error:
        print(f"no picture: {error}", file=sys.stderr)
    wrote(paths)


def wrote(paths: Iterable[Path]) -> None:
    for path in paths:
        print(f"wrote {os.path.relpath(path)}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # the peers' deprecations are no finding of a benchmark
    import_all(arguments.problems.values(), arguments.rows)
    about = facts(arguments, argv)
    print("\n".join(about), end="\n\n", flush=True)
    if arguments.scaling:
        points = scaling.scaling(settings(arguments), arguments.quick)
        print(scaling.table(points))
        wrote(scaling.write(arguments.output, about, points))
    else:
        problems(arguments, about)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
