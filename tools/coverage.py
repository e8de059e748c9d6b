"""The coverage sweep: which models compile, and what every parameter of them gets.

    python tools/coverage.py                                       all groups, what is not in the table yet
    python tools/coverage.py --groups timm --filter 'vit*' --again
    python tools/coverage.py --retry-failed                        what did not compile, once more
    python tools/coverage.py --summary                             the summary alone, from the table as it is

The groups: every classification model of torchvision, one model of every distinct architecture of timm (see
architectures.py), small random models of Hugging Face (see huggingface.py), each at its own resolution; and small
models of every family of timm at the numeric level, at which every value must equal that of autograd in float64. Each
model is examined as `fxcurv check` does it, in a process of its own with a limit of time and of memory, forked from one
that has imported everything and built nothing. A model is a row of results/coverage.csv, written as soon as it is
known; results/coverage.md sums them up. An element of a parameter counts once per quantity:

- exact, approx, fallback: computed; the status says how (fallback: by a slower, generic path);
- refused: the model does not compile, or nothing is known for this parameter;
- idle: frozen, or not reached by the output.

Coverage is the share of trainable elements that are not refused, for the quantity that has the least.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fnmatch
import importlib
import itertools
import multiprocessing as mp
import os
import re
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the sweep checks the sources beside it, not an installed copy

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxcurv
from fxcurv.checks import Report, levels
from fxcurv.checks.policy import Level
from fxcurv.core.errors import FxcurvError
from fxcurv.frontend.inputs import Inputs
from fxcurv.losses.base import as_loss
from fxcurv.models import targets
from fxcurv.quantities.selection import chosen as selection

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results"
QUANTITIES = ("kfac", "diag_ggn")
QUESTION = levels.Request(selection(QUANTITIES), as_loss("cross_entropy"), on_unsupported="error", raising=True)
KINDS = ("exact", "approx", "fallback", "refused", "idle")
UNKNOWN = "unknown"
BATCH = 2


# Models -----------------------------------------------------------------------------------------------------------

Build = Callable[[str], tuple[nn.Module, Inputs]]


@dataclass(frozen=True)
class Group:
    """What to import for some models, their names, and how one is built, with inputs."""

    package: str
    names: Callable[[], Iterable[str]]
    build: Build
    level: Level = "shape"


def from_library(library: str) -> Build:
    def build(name: str) -> tuple[nn.Module, Inputs]:
        target = targets.resolve(f"{library}:{name}")
        assert target.input_shape is not None, f"{name} does not say its resolution"
        return target.model, torch.zeros(BATCH, *target.input_shape)

    return build


def torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def timm_names() -> list[str]:
    import architectures

    return architectures.read()


def huggingface_names() -> list[str]:
    import huggingface

    return list(huggingface.MODELS)


def huggingface_model(name: str) -> tuple[nn.Module, Inputs]:
    import huggingface

    return huggingface.build(name, BATCH)


def small_names() -> list[str]:
    """timm's models for tests, and the smallest of every family."""
    import architectures
    import timm

    return list(dict.fromkeys([*timm.list_models("test_*"), *(family[0] for family in architectures.by_family())]))


SHALLOW: tuple[dict[str, Any], ...] = (
    {"depth": 2},
    {"depths": (1, 1, 1, 1)},
    {"depths": (1, 1, 1)},
    {"layers": (1, 1, 1, 1)},
    {"layers": (1, 1, 1)},
    {},
)
"""Arguments that make a model of timm shallower, where its constructor has them."""


def narrow_vgg() -> nn.Module:
    """vgg11 with few channels, which its entry point does not let one choose."""
    from timm.models.vgg import VGG

    return VGG([8, "M", 12, "M", 16, 16, "M", 16, 16, "M", 16, 16, "M"], num_classes=3, mlp_ratio=0.02)


def narrow_nasnet() -> nn.Module:
    """nasnetalarge with a fortieth of its channels."""
    from timm.models.nasnet import NASNetALarge

    return NASNetALarge(num_classes=3, stem_size=6, num_features=96)


NARROW: dict[str, Callable[[], nn.Module]] = {"vgg11": narrow_vgg, "nasnetalarge": narrow_nasnet}
"""Models that are too large for brute force however few layers they have."""


def small_model(name: str) -> tuple[nn.Module, Inputs]:
    """With three classes and few layers, and random inputs of the lowest resolution that the model takes."""
    if name in NARROW:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = NARROW[name]().eval()
        return model, torch.randn(BATCH, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    for side, shallow in itertools.product((64, 96, 128, 160, 224, 256, 384), SHALLOW):
        for size in ({"img_size": side}, {}):
            with contextlib.suppress(Exception):
                arguments = urlencode({**shallow, **size, "num_classes": 3})
                model = targets.resolve(f"timm:{name}?{arguments}").model
                x = torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(0))
                with torch.no_grad():
                    model(x)
                return model, x
    raise LookupError("no resolution will do")


GROUPS: dict[str, Group] = {
    "torchvision": Group("torchvision", torchvision_names, from_library("torchvision")),
    "timm": Group("timm", timm_names, from_library("timm")),
    "huggingface": Group("huggingface", huggingface_names, huggingface_model),
    "numeric": Group("timm", small_names, small_model, level="numeric"),
}


# One model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What became of one model; `counts` is elements and tensors by quantity and status, as in `kfac_exact`."""

    group: str
    model: str
    outcome: str  # compiled, refused, crashed, out of time, out of memory; UNKNOWN until it ends
    tensors: int = 0
    elements: int = 0
    coverage: float = 0.0
    seconds: float = 0.0
    peak_mib: float = 0.0
    revision: str = ""
    error: str = ""
    cause: str = ""
    remedy: str = ""
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.model


COUNTS = tuple(f"{q}_{kind}{of}" for of in ("", "_tensors") for q in QUANTITIES for kind in KINDS)
COLUMNS = (*(name for name in Row.__dataclass_fields__ if name != "counts"), *COUNTS)


def examine(row: Row, tell: Callable[[Row], None]) -> Row:
    """Build and check the model; every failure is an outcome. Tells how large the model is as soon as it is known."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, inputs = GROUPS[row.group].build(row.model)
            row = replace(row, **sizes(model))
            tell(row)
            question = replace(QUESTION, level=GROUPS[row.group].level)
            report = levels.examine(levels.CheckTarget(row.model, model, inputs), question)
        row = reported(row, report)
    except Exception as error:
        row = replace(row, **explained(error))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return replace(row, cause=relative(row.cause), seconds=time.perf_counter() - started, peak_mib=peak / 1024)


def sizes(model: nn.Module) -> dict[str, Any]:
    """How many tensors and elements a model has; all of them refused until something better is known."""
    tensors = {id(p): p.numel() for p in model.parameters()}
    refused = {f"{q}_refused": sum(tensors.values()) for q in QUANTITIES}
    refused |= {f"{q}_refused_tensors": len(tensors) for q in QUANTITIES}
    return {"tensors": len(tensors), "elements": sum(tensors.values()), "counts": refused}


def reported(row: Row, report: Report) -> Row:
    counts: Counter[str] = Counter()
    for found in report.rows:
        kind = KIND_OF[found.status.partition("(")[0]]
        counts[f"{found.quantity}_{kind}"] += found.numel
        counts[f"{found.quantity}_{kind}_tensors"] += 1
    row = replace(row, outcome="compiled", counts=dict(counts), coverage=covered(counts))
    failed = next(iter(report.failures), None)
    if failed is None:
        return row
    return replace(row, outcome="refused", cause=failed.message, remedy=failed.suggestion)


KIND_OF = {kind: kind for kind in KINDS} | {
    "unsupported": "refused",
    "error": "refused",
    "frozen": "idle",
    "unreached": "idle",
}


def covered(counts: Counter[str]) -> float:
    """The share of trainable elements that are not refused, for the quantity that has the least."""
    shares = [1.0]
    for q in QUANTITIES:
        good = sum(counts[f"{q}_{kind}"] for kind in KINDS if kind not in ("refused", "idle"))
        asked = good + counts[f"{q}_refused"]
        shares.append(good / asked if asked else 1.0)
    return min(shares)


def explained(error: Exception) -> dict[str, Any]:
    """An error as outcome, cause and remedy."""
    kind, first = type(error).__name__, next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return {"outcome": "out of memory", "error": kind, "cause": first}
    if isinstance(error, FxcurvError):
        where = f"node {error.node}: " if error.node else ""
        return {"outcome": "refused", "error": kind, "cause": where + error.cause, "remedy": error.remedy or ""}
    return {"outcome": "crashed", "error": kind, "cause": first}


def relative(cause: str) -> str:
    """A cause with paths as they are on every machine."""
    return re.sub(r"/[^\s\"]*/site-packages/", "", cause)


# Processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What one model may take."""

    seconds: float
    gibibytes: float


@dataclass(frozen=True)
class Worker:
    """A process that examines one model, and the end of a pipe on which it tells what it knows of the row."""

    process: ForkProcess
    pipe: Connection
    row: Row
    deadline: float


def start(row: Row, limits: Limits) -> Worker:
    context = mp.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(row, theirs, limits), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours, row, time.monotonic() + limits.seconds)


def work(row: Row, pipe: Connection, limits: Limits) -> None:
    """In the child: examine, with little to say on the terminal and no more memory than is allowed."""
    allowed = int(limits.gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    pipe.send(examine(row, pipe.send))


def finish(worker: Worker, limits: Limits) -> Row:
    """The row of a worker that has ended or is out of time."""
    late = worker.deadline <= time.monotonic()
    if late:
        worker.process.kill()
    worker.process.join()
    row = latest(worker)
    if row.outcome != UNKNOWN:
        return row
    if late:
        return replace(row, outcome="out of time", seconds=limits.seconds, cause=f"not done in {limits.seconds:g} s")
    return replace(row, outcome="crashed", cause=f"the process ended with {worker.process.exitcode}")


def latest(worker: Worker) -> Row:
    """The last that the worker told."""
    row = worker.row
    with worker.pipe as pipe, contextlib.suppress(EOFError):
        while pipe.poll():
            row = pipe.recv()
    return row


def sweep(rows: Sequence[Row], jobs: int, limits: Limits, done: Callable[[Row], None]) -> None:
    """Examine every model, `jobs` at a time, and hand each row to `done` as it comes."""
    waiting, running = list(reversed(rows)), list[Worker]()
    with tqdm(total=len(rows), disable=None) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(start(waiting.pop(), limits))
            soonest = min(worker.deadline for worker in running)
            ended = wait([worker.process.sentinel for worker in running], max(0.0, soonest - time.monotonic()))
            for worker in list(running):
                if worker.process.sentinel in ended or worker.deadline <= time.monotonic():
                    running.remove(worker)
                    done(finish(worker, limits))
                    bar.set_postfix_str(worker.row.model)
                    bar.update()


# The table --------------------------------------------------------------------------------------------------------


def read(file: Path) -> dict[tuple[str, str], Row]:
    """The rows of a table, by group and model."""
    if not file.exists():
        return {}
    with file.open(encoding="utf-8", newline="") as lines:
        records = list(csv.DictReader(lines))
    return {row.key: row for row in map(parsed, records)}


def parsed(record: dict[str, str]) -> Row:
    numbers: dict[str, Any] = {name: int(record[name]) for name in ("tensors", "elements")}
    numbers |= {name: float(record[name]) for name in ("coverage", "seconds", "peak_mib")}
    texts = {name: record[name] for name in COLUMNS if name not in COUNTS and name not in numbers}
    return Row(**texts, **numbers, counts={name: int(record[name] or 0) for name in COUNTS})


def write(file: Path, rows: Iterable[Row]) -> None:
    temporary = file.with_suffix(".part")
    with temporary.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, restval=0, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(record, sorted(rows, key=lambda row: (list(GROUPS).index(row.group), row.model))))
    temporary.replace(file)


def record(row: Row) -> dict[str, Any]:
    cells: dict[str, Any] = asdict(row) | row.counts
    del cells["counts"]
    return {name: f"{cell:.4g}" if isinstance(cell, float) else cell for name, cell in cells.items()}


# The summary ------------------------------------------------------------------------------------------------------

HEADERS = ("group", "models", "compile", "s, median", "s, most", "quantity", *KINDS)


def summary(rows: Iterable[Row], expected: Mapping[str, int]) -> str:
    """The page results/coverage.md: a table of the groups, and a line for every model that does not compile.

    `expected` says how many models each group has: a table that lacks some says so.
    """
    rows = list(rows)
    groups = [of for group in GROUPS if (of := [row for row in rows if row.group == group])]
    table = tabulate(
        [line for of in groups for line in totals(of, expected)], HEADERS, tablefmt="github", floatfmt=".1f"
    )
    versions = f"fxcurv {fxcurv.__version__} (revisions: see the rows), torch {torch.__version__.partition('+')[0]}"
    about = f"- {versions}, 1 thread"
    cells = "- cells: the share of the elements in percent, and the number of parameter tensors"
    failed = [row for row in rows if row.outcome != "compiled"]
    refusals = "\n".join(f"- {row.group}:{row.model}, {row.outcome}: {told(row)}" for row in failed)
    parts = ("<!-- python tools/coverage.py -->", "# Coverage", f"{about}\n{cells}", table, "## Not compiled", refusals)
    return "\n\n".join(parts if failed else parts[:4]) + "\n"


def totals(rows: list[Row], expected: Mapping[str, int]) -> list[list[object]]:
    """A group's lines of the table, one per quantity."""
    compiled, seconds = sum(row.outcome == "compiled" for row in rows), [row.seconds for row in rows]
    group, models = rows[0].group, len(rows)
    tried = models if models == expected[group] else f"{models} of {expected[group]}"
    about = [group, tried, compiled, statistics.median(seconds), max(seconds)]
    return [[*about, q, *shares(rows, q)] for q in QUANTITIES]


def shares(rows: list[Row], quantity: str) -> list[str]:
    """For every kind of status its elements in percent, and its tensors."""
    elements = [sum(row.counts.get(f"{quantity}_{kind}", 0) for row in rows) for kind in KINDS]
    tensors = [sum(row.counts.get(f"{quantity}_{kind}_tensors", 0) for row in rows) for kind in KINDS]
    percent = [100 * n / max(1, sum(elements)) for n in elements]
    return [f"{share:.2f} ({count})" if count else "" for share, count in zip(percent, tensors, strict=True)]


def told(row: Row) -> str:
    text = " ".join(filter(None, (row.error + ":" if row.outcome == "crashed" else "", row.cause)))
    return text.replace("\n", " ")[:300]


# Command line -----------------------------------------------------------------------------------------------------


def revision() -> str:
    """The commit of the sources, with a + where they differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or fxcurv.__version__


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", default=",".join(GROUPS), help="names separated by commas (default: all)")
    parser.add_argument("--filter", default="*", help="patterns of model names, separated by commas (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default 1)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a model may take (default 300)")
    parser.add_argument("--memory", type=float, default=12, help="GiB a model may take (default 12)")
    parser.add_argument("--again", action="store_true", help="also what is in the table already")
    parser.add_argument("--retry-failed", action="store_true", help="also what is in the table but did not compile")
    parser.add_argument("--summary", action="store_true", help="only write the summary")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of coverage.csv and coverage.md")
    arguments = parser.parse_args(argv)
    arguments.groups = arguments.groups.split(",")
    if unknown := [name for name in arguments.groups if name not in GROUPS]:
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    return arguments


def chosen(arguments: argparse.Namespace, known: dict[tuple[str, str], Row]) -> list[Row]:
    """The models to examine."""
    names = [(group, name) for group in arguments.groups for name in GROUPS[group].names()]
    matching = [key for key in names if any(fnmatch.fnmatchcase(key[1], p) for p in arguments.filter.split(","))]

    def wanted(key: tuple[str, str]) -> bool:
        failed = key in known and known[key].outcome != "compiled"
        return key not in known or arguments.again or (arguments.retry_failed and failed)

    sources = revision()
    return [Row(*key, outcome=UNKNOWN, revision=sources) for key in matching if wanted(key)]


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    table, page = arguments.output / "coverage.csv", arguments.output / "coverage.md"
    for group in GROUPS.values():
        importlib.import_module(group.package)  # once, for all the processes to come
    known, expected = read(table), {name: len(list(group.names())) for name, group in GROUPS.items()}

    def done(row: Row) -> None:
        known[row.key] = row
        write(table, known.values())
        page.write_text(summary(known.values(), expected), encoding="utf-8")

    if not arguments.summary:
        limits = Limits(arguments.timeout, arguments.memory)
        sweep(chosen(arguments, known), arguments.jobs, limits, done)
    page.write_text(summary(known.values(), expected), encoding="utf-8")
    print(page.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
