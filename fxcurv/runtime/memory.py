"""memory: the forecast of a call's peak memory, before it runs, and the chunks of a batch that fit a budget.

The emitted graphs run on fake tensors, which have shapes and no values. Every storage is counted from allocation to
release, in the generated code and inside modules. Diagonals are charged the cost that they report, convolutions the
workspace of their kernels. All figures are bytes beyond the model and the inputs.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.contractions.statistic import Statistic
from fxcurv.core.errors import FxcurvError, QuantityError
from fxcurv.core.shapes import resolve
from fxcurv.core.torch_compat import FakeTensorMode, TorchDispatchMode, pytree, schema_of, storage_id
from fxcurv.frontend.inputs import Inputs, as_call, batch_size
from fxcurv.ir.backward_ops import Scaled
from fxcurv.ir.nodes import output_of
from fxcurv.quantities.factors import Factor, most_columns
from fxcurv.runtime.program import Program

__all__ = ["MARGIN", "Chunks", "Forecast", "bytes_of", "cut", "forecast", "largest", "show_bytes"]


# Budgets ----------------------------------------------------------------------------------------------------------

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(budget: int | str | None) -> int | None:
    """Convert a budget to bytes: a whole number of bytes, or a number and a unit, as "512MiB" or "1.5 GB"."""
    if budget is None:
        return None
    text = str(budget).strip() if isinstance(budget, str) or type(budget) is int else ""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    number = int(float(found[1]) * unit) if found and unit else 0
    if number < 1:
        raise QuantityError(
            f"memory_budget={budget!r}",
            remedy='give bytes as a positive whole number, or text such as "512MiB" or "2GB"',
            code="FXC502",
        )
    return number


def show_bytes(number: float) -> str:
    """Format a number of bytes, as in "1.5 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f} B"


# Forecasts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """Peak bytes of each part of a call, including tensors held from earlier parts.

    `forward`: the forward graph and the loss; `kept`: tensors held after it, as saved for backward; `backward`: the
    backward graph of each factor, on a chunk of its columns; `results`: the sums of the whole program.
    """

    forward: int
    kept: int
    backward: Mapping[Factor, int]
    results: int

    @property
    def peak(self) -> int:
        """Peak bytes of the call."""
        return max(self.forward, *self.backward.values(), self.kept + self.results)

    def __str__(self) -> str:
        backward = max(self.backward.values(), default=0)
        return (
            f"{show_bytes(self.peak)} (forward {show_bytes(self.forward)}, backward {show_bytes(backward)}, "
            f"of which saved {show_bytes(self.kept)}, results {show_bytes(self.results)})"
        )


def forecast(
    program: Program, inputs: Inputs, samples: int, columns: int | Mapping[Factor, int], of: int | None = None
) -> Forecast:
    """Forecast the memory of a call on a batch like `inputs`; only their shapes and types are read.

    `samples` of the batch are processed at once, and `columns` of every factor (at most its number of columns). `of`
    replaces the number of columns of each factor.
    """
    asked = columns if isinstance(columns, Mapping) else dict.fromkeys(program.backwards, columns)
    live, given, place = _Live(), _tensors(as_call(inputs)), next(program.canonical.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), live:
        arguments = [torch.empty(samples, *t.shape[1:], dtype=t.dtype, device=place.device) for t in given]
        live.begin()
        graph, *backwards = program.graphs
        output, kept, sums = _Run(graph, live).run(*arguments)
        held = output.new_empty(HELD * batch_size(inputs), *output.shape[1:])
        live.charge(WORKING * _bytes(held) / HELD)
        times, outputs = -(-batch_size(inputs) // samples), output[0].numel()
        first, adding = _grown(program, sums, (times, 1))
        live.charge(adding)
        forward, highest, results = live.highest, dict[Factor, int](), [first]
        base = live.held - _bytes(sums)
        for factor, gm in zip(program.backwards, backwards, strict=True):
            V = max(1, min(asked[factor], most := of or most_columns(factor, outputs)))
            live.again()
            live.charge(ROOT * V * _bytes(output))
            S = output.new_empty(V, *output.shape)
            given = program.given(factor).items()
            found = _Run(gm, live).run(S, *(output.new_empty(b) if b else kept[name] for name, b in given))
            size, adding = _grown(program, found, (times, -(-most // V)))
            live.charge(adding)
            highest[factor] = live.highest + (size if times == 1 and most > V else 0)
            results.append(size)
            sums = {**sums, **found}
    del held
    whole = sum(results)  # held while later parts of the batch run
    backward = {f: h + (whole - sum(results[: i + 1]) if times > 1 else 0) for i, (f, h) in enumerate(highest.items())}
    return Forecast(forward + (whole if times > 1 else 0), base, backward, whole)


def _grown(program: Program, parts: Mapping[str, Tensor], chunks: tuple[int, int]) -> tuple[int, int]:
    """Bytes of sums over chunks of samples and columns like `parts`, and the most temporary bytes when one is added."""
    found = [program.statistics[key].memory(part, *chunks) for key, part in parts.items()]
    return sum(held for held, _ in found), max((temporary for _, temporary in found), default=0)


HELD, WORKING, ROOT = 3, 4, 4
"""Copies of the output: held by the loss (gradient, probabilities, weights), its temporaries, and those per column."""


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _bytes(value: Any) -> int:
    """Bytes of the storages of all tensors in `value`, each counted once."""
    storages = {storage_id(t): t.untyped_storage().nbytes() for t in _tensors(value)}
    return sum(storages.values())


class _Live(TorchDispatchMode):
    """Counts the bytes of live storages allocated by operators; views and aliases count once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.start = 0, 0, 0
        self.seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = any(r.alias_info is not None for r in schema_of(func).returns)
        for t in _tensors(out):
            self.see(t, foreign=aliases)
        workspace = _WORKSPACES.get(func)
        self.charge(workspace(out, *args) if workspace else 0)
        return out

    def begin(self) -> None:
        """Start counting here."""
        self.start = self.peak = self.now

    def again(self) -> None:
        """Reset the peak to the current bytes."""
        self.peak = self.now

    @property
    def held(self) -> int:
        return self.now - self.start

    @property
    def highest(self) -> int:
        return self.peak - self.start

    def see(self, t: Tensor, foreign: bool = False) -> None:
        """Count a tensor's storage until it is freed; a `foreign` one, of the model or the caller, counts as zero."""
        storage = t.untyped_storage()
        key, size = storage_id(t), 0 if foreign else storage.nbytes()
        if key in self.seen:
            return

        def dropped(_: object) -> None:
            self.now -= size
            self.seen.pop(key, None)

        self.seen[key] = weakref.ref(storage, dropped)
        self.now += size
        self.charge(0)

    def charge(self, temporary: float) -> None:
        """Charge temporary bytes at this point."""
        self.peak = max(self.peak, self.now + int(temporary))


class _Run(fx.Interpreter):
    """Runs a graph as its generated code does, freeing every value after its last use."""

    def __init__(self, gm: fx.GraphModule, live: _Live) -> None:
        super().__init__(gm)
        self.live = live

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a module's result; statistics that loop over samples and columns are charged their reported cost."""
        module: Any = self.fetch_attr(target)
        statistic = module.statistic if isinstance(module, Scaled) else module
        if not isinstance(statistic, Statistic) or not statistic.loops:
            return super().call_module(target, args, kwargs)
        added, temporary = statistic.samples is None, module.cost(*args).temporary
        if added:
            self.live.charge(temporary)
        result = statistic.empty(*args)
        self.live.charge(_bytes(result) if added else temporary)  # one part, and the sum of the earlier parts
        return result


# Workspace of convolution kernels ---------------------------------------------------------------------------------


def _convolution(y: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> float:
    """oneDNN's blocked copies of the larger side and the weight; the patches for a type that it does not support."""
    if x.dtype == torch.float64 and x.device.type == "cpu":
        return _patches(y, weight) + (y.nbytes if rest[-1] > 1 else 0)
    return max(x.nbytes, y.nbytes) + weight.nbytes


def _convolution_backward(dxs: Any, S: Tensor, x: Tensor, weight: Tensor, _: Any, stride: Any, *rest: Any) -> float:
    """Workspace of the transposed convolution, which also copies its input although it reads only the shape."""
    given = math.prod(x.shape) * x.element_size()
    if x.dtype == torch.float64 and x.device.type == "cpu":
        return 2 * given + _patches(S, weight) / len(S)
    return given + max(S.nbytes, (2 if max(stride) > 1 else 1) * given) + weight.nbytes


def _patches(y: Tensor, weight: Tensor) -> float:
    return y.nbytes / y.shape[1] * weight[0].numel()


_WORKSPACES: dict[Any, Callable[..., float]] = {
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
}


# Chunks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunks:
    """Chunk sizes of a batch: samples at once, and columns at once for each factor."""

    samples: int
    columns: Mapping[Factor, int]


MARGIN = 0.9
"""Share of a budget that a forecast may use: allocators round up, and kernels hold some memory."""


def cut(program: Program, inputs: Inputs, budget: int, columns: int) -> Chunks:
    """The largest chunks, of at most `columns` columns, for which a call fits in `budget` bytes.

    All samples at once if a single column then fits, else as many as fit.
    """
    N, allowed, one = batch_size(inputs), MARGIN * budget, dict.fromkeys(program.backwards, 1)
    samples = largest(N, allowed, lambda n: forecast(program, inputs, n, 1).peak)
    if not samples:
        least = min((forecast(program, inputs, n, 1) for n in (1, N)), key=lambda found: found.peak)
        raise FxcurvError(
            f"one column needs at least {least}, more than memory_budget={show_bytes(budget)}",
            remedy=f"allow {show_bytes(math.ceil(1.001 * least.peak / MARGIN))}, or request fewer quantities",
            code="FXC503",
        )
    samples = math.ceil(N / math.ceil(N / samples))  # of nearly equal size
    found, outputs = dict[Factor, int](), math.prod(resolve(output_of(program.canonical).meta["shape"], 1))
    for factor in program.backwards:

        def highest(v: int, factor: Factor = factor) -> int:
            return forecast(program, inputs, samples, {**one, factor: v}).backward[factor]

        found[factor] = max(1, largest(min(columns, most_columns(factor, outputs)), allowed, highest))
    return Chunks(samples, found)


def largest(most: int, allowed: float, needs: Callable[[int], int]) -> int:
    """The largest count up to `most` whose need is at most `allowed`, or 0.

    The need grows nearly in proportion to the count. If it is convex, the chord from a count that fits to one that
    does not is above it, so the count at which the chord reaches `allowed` fits.
    """
    if (high := needs(most)) <= allowed:
        return most
    low = needs(1) if most > 1 else high
    if low > allowed:
        return 0
    count = most
    while count > 1:
        count = max(1, min(count - 1, 1 + int((count - 1) * (allowed - low) / (high - low))))
        if (high := needs(count)) <= allowed:
            break
    return count
