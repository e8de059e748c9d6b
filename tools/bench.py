"""The benchmark: what a curvature costs, in gradients.

    python tools/bench.py                                          every problem, every row
    python tools/bench.py --quick                                  a smoke test: small batches, few repetitions
    python tools/bench.py --problems 3c3d --rows 'fxcurv*' --repeats 25

A problem is a network, its inputs and labels; a row is a library and a quantity, and both are tables in this file.
Models and data are made from a seed, the network is in eval mode with random BatchNorm statistics, the loss is the mean
cross entropy. The unit is the gradient: forward and backward by torch.autograd, with nothing to set to zero.

Time. Each row prepares itself (compiles, hooks, converts) and runs twice before anything is timed. Repetitions go
round-robin over the rows, so that a slow minute of the machine meets all of them; garbage is collected between, never
during, a measurement. With one thread the clock is the processor time of the process, which neighbours on a shared
machine lengthen least; with more it is the wall clock. Reported are the median, the quartile spread, and the median
over the rounds of the row's time divided by the gradient's in the same round. A row times what yields new numbers for
a new batch: for curvlinops that includes making the operator, which belongs to one batch and one parameter state.

Memory. Each row runs once more in a process of its own: prepare, run once, drop the results, return freed memory to
the system, reset the kernel's high-water mark of resident memory (Linux: 5 > /proc/self/clear_refs), run. Peak is the
mark minus the residency before, so it counts results and every temporary, torch's or not, but neither the model and
data nor what a compiled object keeps. The allocator is told to give each block of 64 KiB or more back when it is freed;
else a warm heap would hide what the run needs. Where the mark cannot be reset the column stays empty.

"covers" is the share of the trainable elements that got a result. A library that cannot do a row is a row that says so.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import fnmatch
import gc
import importlib.metadata
import io
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmark measures the sources beside it, not an installed copy

VERSIONS = ("torch", "torchvision", "curvlinops-for-pytorch", "backpack-for-pytorch")
GRADIENT = "torch gradient"
SEED = 0


# Problems ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A network on random data: `batch` inputs of `shape`, each with one of `classes` labels."""

    build: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]
    classes: int = 10
    quick_batch: int = 4

    def make(self) -> tuple[nn.Module, Tensor, Tensor]:
        """(model, inputs, labels), the same at every call."""
        torch.manual_seed(SEED)
        model = self.build().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                randomise(module)
        x = torch.randn(self.batch, *self.shape)
        return model, x, torch.randint(self.classes, (self.batch,))


def randomise(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Statistics, scale and shift as training leaves them: neither 0 nor 1."""
    with torch.no_grad():
        for tensor, low, high in (
            (norm.running_mean, -0.2, 0.2),
            (norm.running_var, 0.5, 1.5),
            (norm.weight, 0.8, 1.2),
            (norm.bias, -0.1, 0.1),
        ):
            if tensor is not None:
                tensor.uniform_(low, high)


def net_3c3d() -> nn.Module:
    """DeepOBS' 3C3D network for CIFAR-10; its pooling pads below and to the right, as TensorFlow's 'SAME' does."""

    def block(inputs: int, outputs: int, kernel: int, padding: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=padding)
        return [convolution, nn.ReLU(), nn.MaxPool2d(3, stride=2, ceil_mode=True)]

    convolutions = (*block(3, 64, 5, 0), *block(64, 96, 3, 0), *block(96, 128, 3, 1))
    dense = (nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(*convolutions, nn.Flatten(), *dense)


def torchvision_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A constructor of torchvision's model, without weights from anywhere."""

    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)

    return build


PROBLEMS: dict[str, Problem] = {
    "3c3d": Problem(net_3c3d, batch=32, shape=(3, 32, 32)),
    "resnet18": Problem(torchvision_model("resnet18", num_classes=10), batch=16, shape=(3, 64, 64)),
}


# Rows -------------------------------------------------------------------------------------------------------------

Result = dict[str, Any]  # parameter name -> what the library computed for it
Step = Callable[[], Result]
Prepare = Callable[[nn.Module, Tensor, Tensor], Step]


@dataclass(frozen=True)
class Row:
    """One line of the table. `prepare` does what is done once per model and returns what is done for every batch."""

    library: str
    quantity: str
    prepare: Prepare
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.library} {self.quantity}"


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    loss, parameters = nn.CrossEntropyLoss(), dict(model.named_parameters())

    def step() -> Result:
        gradients = torch.autograd.grad(loss(model(x), y), list(parameters.values()))
        return dict(zip(parameters, gradients, strict=True))

    return step


def fxcurv_quantity(quantity: str) -> Prepare:
    def prepare(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        import fxcurv

        compiled = fxcurv.compile(model, loss=nn.CrossEntropyLoss(), quantities=[quantity])
        return lambda: dict(compiled(x, y)[quantity])

    return prepare


def backpack_extension(extension: str, field: str) -> Prepare:
    """BackPACK's extension; where a model is not made of its modules alone, through its converter."""

    def prepare(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        import backpack
        import backpack.extensions

        names = {id(p): name for name, p in model.named_parameters()}
        extended = backpack.extend(model, use_converter=not isinstance(model, nn.Sequential))
        parameters = {names[id(p)]: p for p in extended.parameters()}
        loss = backpack.extend(nn.CrossEntropyLoss())

        def step() -> Result:
            with backpack.backpack(getattr(backpack.extensions, extension)()):
                loss(extended(x), y).backward()
            result = {name: getattr(p, field) for name, p in parameters.items() if hasattr(p, field)}
            for p in parameters.values():
                p.grad = None
                if hasattr(p, field):
                    delattr(p, field)
            return result

        return step

    return prepare


def curvlinops_kfac(fisher: str) -> Prepare:
    """The Kronecker factors of curvlinops, for the parameters of Linear and Conv2d: it refuses all others."""

    def prepare(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        from curvlinops import FisherType, KFACLinearOperator

        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        supported = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        parameters = {name: p for name, p in model.named_parameters() if id(p) in supported}

        def step() -> Result:
            operator = KFACLinearOperator(
                model,
                nn.CrossEntropyLoss(),
                list(parameters.values()),
                [(x, y)],
                fisher_type=FisherType(fisher),
                check_deterministic=False,
                num_data=len(x),
                num_per_example_loss_terms=1,
            )
            operator.compute_kronecker_factors()
            return dict.fromkeys(parameters, operator)

        return step

    return prepare


ROWS: tuple[Row, ...] = (
    Row("torch", "gradient", gradient),
    *(
        Row("fxcurv", quantity, fxcurv_quantity(quantity))
        for quantity in ("grad", "kfac", "kflr", "kfac_empirical", "diag_ggn", "diag_ggn_mc")
    ),
    Row("backpack", "KFAC", backpack_extension("KFAC", "kfac"), "and the gradient; conv neither expand nor reduce"),
    Row("backpack", "KFLR", backpack_extension("KFLR", "kflr"), "and the gradient; conv neither expand nor reduce"),
    Row("backpack", "DiagGGNExact", backpack_extension("DiagGGNExact", "diag_ggn_exact"), "and the gradient"),
    Row("backpack", "DiagGGNMC", backpack_extension("DiagGGNMC", "diag_ggn_mc"), "and the gradient"),
    Row("curvlinops", "KFAC mc", curvlinops_kfac("mc"), "Linear and Conv2d only"),
    Row("curvlinops", "KFAC type-2", curvlinops_kfac("type-2"), "Linear and Conv2d only"),
    Row("curvlinops", "KFAC empirical", curvlinops_kfac("empirical"), "Linear and Conv2d only"),
)


# Measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """What was measured for one row of one problem; `ratio` is in gradients, None where there is nothing to say."""

    problem: str
    library: str
    quantity: str
    ms: float | None = None
    spread: float | None = None
    ratio: float | None = None
    peak_mib: float | None = None
    covers: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Ready:
    """A row that prepared itself and ran, with the share of the trainable elements it covers."""

    step: Step
    covers: float


def ready(row: Row, problem: Problem, warm_ups: int) -> Ready | str:
    """The row, warm; or why it refuses."""
    try:
        model, x, y = problem.make()
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        step = row.prepare(model, x, y)
        for _ in range(warm_ups):
            result = step()
    except Exception as error:  # a library may refuse with any class; the row reports it
        reason = next(iter(str(error).strip().splitlines()), "")
        return f"refuses: {type(error).__name__}: {reason}"[:160].rstrip(": ")
    covered = sum(numel for name, numel in trainable.items() if name in result)
    return Ready(step, 100 * covered / sum(trainable.values()))


def seconds(step: Step) -> float:
    """How long the step took, by the processor's clock where one thread runs, else by the wall's."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    gc.collect()
    gc.disable()
    try:
        begin = clock()
        result = step()
        elapsed = clock() - begin
    finally:
        gc.enable()
    del result
    return elapsed


def quartile_spread(times: Sequence[float]) -> float | None:
    """(Q3 − Q1) / median, in percent."""
    if len(times) < 4:
        return None
    low, middle, high = statistics.quantiles(times, n=4)
    return 100 * (high - low) / middle


def time_rows(name: str, problem: Problem, rows: Sequence[Row], repeats: int) -> list[Line]:
    """Round-robin: every row once per round, its time compared with the gradient's in that round."""
    bar = tqdm(rows, desc=f"{name}: prepare", disable=None, leave=False)
    prepared = {row: ready(row, problem, warm_ups=2) for row in bar}
    able = {row: r for row, r in prepared.items() if isinstance(r, Ready)}
    times: dict[Row, list[float]] = {row: [] for row in able}
    for _ in tqdm(range(repeats), desc=f"{name}: rounds", disable=None, leave=False):
        for row, warm in able.items():
            times[row].append(seconds(warm.step))
    base = next(times[row] for row in able if row.name == GRADIENT)
    lines: list[Line] = []
    for row, outcome in prepared.items():
        line = Line(name, row.library, row.quantity, note=outcome if isinstance(outcome, str) else row.note)
        if isinstance(outcome, Ready):
            took = times[row]
            ratio = statistics.median(t / g for t, g in zip(took, base, strict=True))
            ms = 1000 * statistics.median(took)
            line = replace(line, ms=ms, spread=quartile_spread(took), ratio=ratio, covers=outcome.covers)
        lines.append(line)
    return lines


def memory_status(field: str) -> int:
    """A figure of this process in bytes: VmRSS, what is resident, or VmHWM, the highest it was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak_bytes(step: Step) -> int | None:
    """How far resident memory rises while the step runs; None where the system cannot tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_status("VmRSS")
    except (OSError, AttributeError):
        return None
    result = step()
    peak = memory_status("VmHWM") - before
    del result
    return max(peak, 0)


def peak_in_own_process(line: Line, arguments: argparse.Namespace) -> float | None:
    """The line's peak in MiB, measured by this script in a fresh process."""
    command = [sys.executable, __file__, "--threads", str(arguments.threads)]
    command += ["--peak-of", line.problem, f"{line.library} {line.quantity}", *(["--quick"] if arguments.quick else [])]
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
    done = subprocess.run(command, env=os.environ | allocator, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        print(f"no peak for {line.library} {line.quantity} on {line.problem}: {reason[0]}", file=sys.stderr)
        return None
    peak = json.loads(done.stdout.splitlines()[-1])
    return None if peak is None else peak / 2**20


def with_peaks(lines: Sequence[Line], arguments: argparse.Namespace) -> list[Line]:
    """The lines, those that were timed with their peaks."""
    bar = tqdm(lines, desc="memory", disable=None, leave=False)
    return [line if line.ms is None else replace(line, peak_mib=peak_in_own_process(line, arguments)) for line in bar]


# Reporting --------------------------------------------------------------------------------------------------------

HEADERS = ("problem", "library", "quantity", "median ms", "spread %", "× gradient", "peak MiB", "covers %", "note")
FORMATS = ("", "", "", ".1f", ".0f", ".2f", ".1f", ".1f", "")


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def processor() -> str:
    """The processor's name, in the kernel's words where there are any."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def revision() -> str:
    """The commit of the sources, with a + where they differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "fxcurv"
    return f"fxcurv {done.stdout.strip()}".strip()


def facts(arguments: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    """The command, then where it ran and how."""
    problems = [f"{name}: N={p.batch}, {'×'.join(map(str, p.shape))}, C={p.classes}" for name, p in arguments.problems]
    clock = "processor" if arguments.threads == 1 else "wall-clock"
    return [
        shlex.join(["python", "tools/bench.py", *argv]),
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {arguments.threads} thread(s), float32, "
        f"Python {platform.python_version()}, {revision()}, {', '.join(map(version, VERSIONS))}",
        f"{'; '.join(problems)}; medians of {arguments.repeats} interleaved repetitions, {clock} time",
    ]


def cells(line: Line) -> list[object]:
    return [getattr(line, field.name) for field in fields(line)]


def table(lines: Sequence[Line], style: str) -> str:
    return tabulate(map(cells, lines), headers=HEADERS, tablefmt=style, floatfmt=FORMATS, missingval="")


def write(folder: Path, about: Sequence[str], lines: Sequence[Line]) -> list[Path]:
    """bench.csv and bench.md, each beginning with the command that made it."""
    text = io.StringIO()
    text.writelines(f"# {fact}\n" for fact in about)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Line))
    writer.writerows(
        ["" if c is None else f"{c:.3f}" if isinstance(c, float) else c for c in cells(line)] for line in lines
    )
    details = "".join(f"\n- {fact}" for fact in about[1:])
    markdown = f"<!-- {about[0]} -->\n\n# Benchmark\n\n`{about[0]}`\n{details}\n\n{table(lines, 'github')}\n"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "bench.csv", folder / "bench.md"]
    for path, content in zip(paths, (text.getvalue(), markdown), strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


# Command line -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small batches, three repetitions: does it run at all?")
    parser.add_argument("--repeats", type=int, help="repetitions of every row (default 7, with --quick 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="names separated by commas (default: all)")
    parser.add_argument("--rows", default="*", help="patterns separated by commas, as 'fxcurv*,*KFAC*' (default: all)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks: no process per row")
    parser.add_argument("--output", type=Path, default=ROOT / "tools" / "results", help="folder of bench.csv and .md")
    parser.add_argument("--peak-of", nargs=2, metavar=("PROBLEM", "ROW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.problems.split(",") if name not in PROBLEMS]
    if unknown:
        parser.error(f"no problem {', '.join(unknown)}; there are {', '.join(PROBLEMS)}")
    arguments.problems = [(name, sized(name, arguments.quick)) for name in arguments.problems.split(",")]
    arguments.rows = [row for row in ROWS if row.name == GRADIENT or matches(row, arguments.rows)]
    arguments.repeats = arguments.repeats or (3 if arguments.quick else 7)
    return arguments


def matches(row: Row, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(row.name, pattern) for pattern in patterns.split(","))


def sized(name: str, quick: bool) -> Problem:
    return replace(PROBLEMS[name], batch=PROBLEMS[name].quick_batch) if quick else PROBLEMS[name]


def without(option: str, argv: Iterable[str]) -> list[str]:
    """The arguments without an option and its value: where the files went did not make the numbers."""
    kept: list[str] = []
    previous = ""
    for argument in argv:
        if option not in (argument, previous) and not argument.startswith(option + "="):
            kept.append(argument)
        previous = argument
    return kept


def print_peak(name: str, row_name: str, quick: bool) -> int:
    """The child process: the peak of one row as JSON on the last line."""
    outcome = ready(next(row for row in ROWS if row.name == row_name), sized(name, quick), warm_ups=1)
    print(json.dumps(None if isinstance(outcome, str) else peak_bytes(outcome.step)))
    return 0


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # the peers' deprecations are no finding of a benchmark
    if arguments.peak_of:
        return print_peak(*arguments.peak_of, quick=arguments.quick)
    lines: list[Line] = []
    for name, problem in arguments.problems:
        lines += time_rows(name, problem, arguments.rows, arguments.repeats)
    if not arguments.no_memory:
        lines = with_peaks(lines, arguments)
    about = facts(arguments, without("--output", argv))
    print("\n".join(about), table(lines, "simple"), sep="\n\n")
    for path in write(arguments.output, about, lines):
        print(f"wrote {os.path.relpath(path)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
