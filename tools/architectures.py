"""The distinct architectures of timm: `python tools/architectures.py` writes tools/results/architectures.csv.

timm's names differ mostly in widths, depths, resolutions and weights, which a compiler does not see. Two models are of
one architecture if their modules show the same set of facts: a module's class, the names of its own tensors, and its
settings, of which flags, words and functions count as they are, and whole numbers only as 0, 1 or more (a stride, a
shift or a number of groups matters, how large it is does not). Models are built on the meta device: nothing is
computed. The representative of an architecture is its model with the fewest modules, then elements, then pixels.
"""

from __future__ import annotations

import csv
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import timm
import torch
from torch import nn
from tqdm import tqdm

FILE = Path(__file__).resolve().parent / "results" / "architectures.csv"
COMMAND = "python tools/architectures.py"


@dataclass(frozen=True, order=True)
class Size:
    """What makes a model cheap or dear to compile."""

    modules: int
    elements: int
    pixels: int


@dataclass(frozen=True)
class Architecture:
    """A model that stands for all models of one architecture, and how many those are."""

    model: str
    family: str
    models: int
    modules: int
    elements: int
    pixels: int


def facts(model: nn.Module) -> frozenset[object]:
    """What the modules of a model are, up to sizes."""
    return frozenset((_qualified(type(m)), frozenset(_settings(m)), frozenset(_tensors(m))) for m in model.modules())


def _settings(module: nn.Module) -> Iterator[tuple[str, object]]:
    if isinstance(module, nn.modules.conv._ConvNd):
        yield "depthwise", 1 < module.groups == module.in_channels
    for name, value in vars(module).items():
        fact = _fact(value)
        if fact is not None and not name.startswith("_") and name != "training":
            yield name, fact


def _fact(value: Any) -> object:
    """A setting up to its size; None where it says nothing else."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return min(value, 2)
    if isinstance(value, tuple) and all(isinstance(n, int) for n in value):
        return tuple(sorted({min(n, 2) for n in value}))
    return _qualified(value) if callable(value) and hasattr(value, "__qualname__") else None


def _qualified(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _tensors(module: nn.Module) -> list[str]:
    held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [name for name, _ in held]


def size(model: nn.Module, shape: tuple[int, ...]) -> Size:
    modules, elements = sum(1 for _ in model.modules()), sum(p.numel() for p in model.parameters())
    return Size(modules, elements, shape[-1] * shape[-2])


def survey(names: list[str]) -> list[Architecture]:
    """One row per distinct architecture among the models, by the name of its representative."""
    found: defaultdict[object, list[tuple[Size, str]]] = defaultdict(list)
    for name in tqdm(names, disable=None):
        try:
            with torch.device("meta"):
                model: Any = timm.create_model(name, pretrained=False)
            found[facts(model)].append((size(model, model.pretrained_cfg["input_size"]), name))
        except Exception as error:
            print(f"{name} cannot be built on the meta device: {type(error).__name__}: {error}", file=sys.stderr)
            found[name].append((Size(0, 0, 0), name))
    chosen = ((*min(alike), len(alike)) for alike in found.values())
    rows = (Architecture(name, _family(name), n, *astuple(size)) for size, name, n in chosen)
    return sorted(rows, key=lambda row: row.model)


def _family(name: str) -> str:
    """The file of timm that defines the model."""
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def write(rows: list[Architecture]) -> None:
    with FILE.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {COMMAND}; timm {timm.__version__}, {sum(row.models for row in rows)} models\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Architecture))
        writer.writerows(astuple(row) for row in rows)


def read() -> list[str]:
    """The names of the representatives: the smallest of every family, then the second of every family, …"""
    return [name for rank in zip_longest(*by_family()) for name in rank if name is not None]


def by_family() -> list[list[str]]:
    """The names of the representatives of every family, the smallest first."""
    with FILE.open(encoding="utf-8") as file:
        records = list(csv.DictReader(line for line in file if not line.startswith("#")))
    families: defaultdict[str, list[str]] = defaultdict(list)
    for record in sorted(records, key=lambda record: int(record["elements"])):
        families[record["family"]].append(record["model"])
    return list(families.values())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write(survey(timm.list_models()))
