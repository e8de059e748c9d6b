"""Several processes: each accumulates its share of the data; then sums and counts are reduced once over all of them.

Before the reduction, every process reports completion and a summary through the group's key-value store. Until then it
sets a key after every batch, and another key on failure. So no process enters a collective that another one will not
reach: an error ends all processes at their next batch, or while they wait; a process that dies silently is detected by
a timeout. Values are weighted by divisors and counts before the sum, and sent in buckets, symmetric matrices as
triangles.

Likewise, `mapped` distributes the decompositions of shared blocks over the processes, and sends the results to all.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import pickle
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.utils.data import Subset

from fxcurv.blocks.base import Block
from fxcurv.blocks.lazy_gram import LazyGram, formed
from fxcurv.core.deprecation import warn_renamed
from fxcurv.core.errors import FxcurvError
from fxcurv.core.fingerprint import digest, values_digest
from fxcurv.core.torch_compat import default_store
from fxcurv.results.block_diagonal import BlockDiagonal, PlacedBlock
from fxcurv.results.curvature import Curvature
from fxcurv.results.merging import Value, check_sums, degrees_of, values_changed, values_of

__all__ = ["BUCKET_BYTES", "Processes", "assigned", "mapped", "process_group", "shard"]


BUCKET_BYTES = 1 << 26
"""Size limit of one collective, in bytes."""


_POLL = 0.05  # seconds between two reads of the store


_LAST_WORDS = 5.0  # seconds that the process with the store waits for others to read its error


_calls = itertools.count()


@contextmanager
def process_group() -> Generator[tuple[int, int]]:
    """Create the process group of torchrun (gloo, NCCL for GPUs) in a context; yield rank and size, (0, 1) if alone.

    An existing group is used, and not destroyed.
    """
    if _several():
        yield dist.get_rank(), dist.get_world_size()
    elif int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield dist.get_rank(), dist.get_world_size()
        finally:
            dist.destroy_process_group()


def __getattr__(name: str) -> Any:
    """Support `joined`, the former name of `process_group`."""
    if name != "joined":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_renamed(name, "process_group")
    return process_group


def shard(dataset: Any) -> Any:
    """Return this process's share of a data set; every sample is in exactly one share. A single process gets all of it.

    `torch.utils.data.DistributedSampler` repeats samples to make shares equal, which would count them twice.
    """
    if not _several():
        return dataset
    return Subset(dataset, range(dist.get_rank(), len(dataset), dist.get_world_size()))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@dataclass(frozen=True)
class Processes:
    """The processes of one computation, seen from one of them; `steps` is the unit of progress in messages."""

    rank: int
    size: int
    timeout: float
    store: Any = None
    steps: str = "batches"

    @classmethod
    def alone(cls) -> Processes:
        """Return a single process."""
        return cls(0, 1, 0.0)

    @classmethod
    def of_group(cls, timeout: float, steps: str = "batches") -> Processes:
        """Return the processes of the default group of torch.distributed, or a single process."""
        if not _several():
            return cls.alone()
        store = PrefixStore(f"fxcurv/{next(_calls)}", default_store())
        return cls(dist.get_rank(), dist.get_world_size(), timeout, store, steps)

    # Heartbeats ---------------------------------------------------------------------------------------------------

    def beat(self, done: int) -> None:
        """Report the number of finished steps, and raise if another process failed."""
        if self.size > 1:
            with self._reading():
                self.store.set(f"beat/{self.rank}", str(done))
                self._look()

    @contextmanager
    def telling_errors(self) -> Generator[None]:
        """Report exceptions of this process to the others."""
        try:
            yield
        except BaseException as error:
            if self.size > 1 and not (isinstance(error, FxcurvError) and error.code == "FXC428"):
                self._tell(f"process {self.rank} raised {type(error).__name__}: {error}")
            raise

    def _tell(self, what: str) -> None:
        try:
            self.store.set("error", what)
            self._linger()
        except RuntimeError:  # the process with the store has ended
            return

    def _linger(self) -> None:
        """Confirm that the error was read; the process with the store waits for all confirmations, or a time limit."""
        self.store.set(f"read/{self.rank}", "")
        end = time.monotonic() + (min(_LAST_WORDS, self.timeout) if self.rank == 0 else 0)
        others = [f"read/{rank}" for rank in range(1, self.size)]
        while time.monotonic() < end and not self.store.check(others):
            time.sleep(_POLL)

    def _look(self) -> None:
        """Raise the error that another process reported."""
        if self.store.check(["error"]):
            answers = self.store.get("error").decode()
            self._linger()
            raise _failed(answers)

    @contextmanager
    def _reading(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:  # DistStoreError, DistNetworkError
            raise _failed(f"the process with the group's store does not respond ({error})") from error

    def _all(self, mine: str) -> list[str]:
        """Gather the message of every process when all are done; the only function that waits for others."""
        with self._reading():
            self.store.set(f"done/{self.rank}", mine)
            for rank in range(self.size):
                self._await(rank)
            found = [self.store.get(f"done/{rank}").decode() for rank in range(self.size)]
            self.store.set(f"read/{self.rank}", "")
            return found

    def _await(self, rank: int) -> None:
        """Wait until a process is done; raise if it has no heartbeat within the timeout."""
        last, since = b"", time.monotonic()
        while not self.store.check([f"done/{rank}"]):
            self._look()
            beat = self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else b""
            if beat != last:
                last, since = beat, time.monotonic()
            if time.monotonic() - since > self.timeout:
                done = beat.decode() or "0"
                missed = f"process {rank} did not respond for {self.timeout:g} s, after {done} {self.steps}"
                self._tell(missed)
                raise _failed(missed)
            time.sleep(_POLL)

    # Sums ---------------------------------------------------------------------------------------------------------

    def total(self, mine: Curvature | None, model: nn.Module) -> Curvature | None:
        """Return the result over the batches of all processes, equal on each; None without batches."""
        if self.size == 1:
            return mine
        answers = [json.loads(text) for text in self._all(json.dumps(self._summary(mine, model)))]
        filled = [k for k, t in enumerate(answers) if t["samples"]]
        if not filled:
            return None
        for name, k in itertools.product(("model", "kind"), filled):
            if answers[k][name] != answers[filled[0]][name]:
                raise FxcurvError(
                    f"processes {filled[0]} and {k} have results of different things: their {name} differs",
                    remedy="give every process the same model, at the same values, loss and quantities",
                    code="FXC425",
                )
        template = self._template(mine, filled[0], model)
        divisor, samples = (sum(answers[k][name] for k in filled) for name in ("divisor", "samples"))
        counts = [sum(found) for found in zip(*(answers[k]["counts"] for k in filled), strict=True)]
        share, shares = 0.0, [0.0] * len(counts)
        if mine is not None:
            own = answers[self.rank]
            share = own["divisor"] / (divisor or 1.0) if mine.reduction == "mean" else 1.0
            shares = [c / n if n else 0.0 for c, n in zip(own["counts"], counts, strict=True)]
        terms = [share**degree if mine is not None else 0.0 for degree in degrees_of(template)]
        values = _added(values_of(template), (terms, shares), counts, self._sum)
        (loss,) = self._sum([template.loss.reshape(1) * share])
        return replace(
            values_changed(template, values),
            loss=loss.reshape(()),
            samples=samples,
            output=template.output.new_empty(samples, 0),
            divisor=divisor if template.reduction == "mean" else 1.0,
        )

    def of_first(self, compute: Callable[[], list[Tensor]], like: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Broadcast the result of process 0, bitwise equal on each; `like` gives tensors of its dtypes and shapes."""
        if self.size == 1:
            return compute()
        with self.telling_errors():
            found = [t.contiguous() for t in (compute() if self.rank == 0 else like())]
            self._all("")
            for t in found:
                self._finish(lambda t=t: dist.broadcast(t, 0, async_op=True))
        return found

    def _summary(self, mine: Curvature | None, model: nn.Module) -> dict[str, Any]:
        """Return the summary for the other processes: counts, and digests that must be equal."""
        if mine is None:
            return {"samples": 0, "divisor": 0.0, "counts": []}
        check_sums(mine)
        values = values_of(mine)
        rows = [(e.parameter, e.status, e.form(), e.definition, e.reduction) for e in mine.entries]
        if any(isinstance(v, Block) and v.count == 0 for v in values):
            raise FxcurvError(
                "a block lacks the number of inputs that its A averages", remedy="compute it again", code="FXC425"
            )
        return {
            "samples": mine.samples,
            "divisor": float(mine.divisor or 0),
            "reduction": mine.reduction,
            "counts": [v.count or 0 if isinstance(v, Block) else 0 for v in values],
            "model": values_digest(model),
            "kind": digest((rows, [_kind(v) for v in values])),
        }

    def _template(self, mine: Curvature | None, first: int, model: nn.Module) -> Curvature:
        """Return the own result; without one, zeros in the shapes of process `first`, read from the store."""
        place = next(model.parameters()).device
        key = "template"
        with self._reading():
            if self.rank == first and mine is not None:
                self.store.set(key, _as_text(_on(mine, _without_values)))
            if mine is not None:
                return mine
            self.store.wait([key], timedelta(seconds=self.timeout))
            shapes = _from_text(self.store.get(key))
        return _on(shapes, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=place))

    def _sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of flat tensors of one dtype over all processes."""
        flat = torch.cat(list(tensors))
        self._finish(lambda: dist.all_reduce(flat, async_op=True))
        return list(flat.split([len(t) for t in tensors]))

    def _finish(self, start: Callable[[], Any]) -> None:
        """Start a collective and wait for it."""
        try:
            start().wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise _failed(f"a process ended while values were exchanged ({error})") from error

    # Blocks -------------------------------------------------------------------------------------------------------

    def mapped(self, blocks: Sequence[Block], f: Callable[[Block], Block]) -> list[Block]:
        """Return f of every block, each computed by one process and sent to all."""
        if self.size == 1:
            return [f(block) for block in blocks]
        owners = assigned([block.decomposition_cost for block in blocks], self.size)
        found: dict[int, Block] = {}
        for k in (k for k, owner in enumerate(owners) if owner == self.rank):
            found[k] = f(blocks[k]).mapped(formed)
            self.beat(len(found))
        shapes = {k: _as_text(block.mapped(_without_values)) for k, block in found.items()}
        answers = [json.loads(text) for text in self._all(json.dumps({"of": _recognised(blocks), "shapes": shapes}))]
        for k in range(self.size):
            if answers[k]["of"] != answers[0]["of"]:
                raise FxcurvError(
                    f"processes 0 and {k} have different blocks",
                    remedy="give every process the same operator, as accumulate does",
                    code="FXC425",
                )
        place = blocks[0].device

        def empty(t: Tensor) -> Tensor:
            return torch.empty(t.shape, dtype=t.dtype, device=place)

        for owner, its in enumerate(answers):
            theirs = {int(k): text for k, text in its["shapes"].items()}
            held = [found.get(k) or _from_text(text).mapped(empty) for k, text in theirs.items()]
            found |= zip(theirs, self._sent(held, owner), strict=True)
        self._sum([torch.zeros(1, device=place)])  # barrier: all processes have all blocks
        return [found[k] for k in range(len(blocks))]

    def _sent(self, held: Sequence[Block], owner: int) -> list[Block]:
        """Broadcast the blocks of one process; the others pass empty blocks of the same form."""
        tensors = [formed(part) for block in held for part in block.parts]
        parts: list[Tensor] = []
        for bucket in _buckets(t.flatten() for t in tensors):
            flat = torch.cat(bucket)
            self._finish(lambda flat=flat: dist.broadcast(flat, owner, async_op=True))
            parts += flat.split([len(t) for t in bucket])
        received = iter(parts)
        return [block.mapped(lambda t: next(received).view(t.shape)) for block in held]


def _failed(cause: str) -> FxcurvError:
    return FxcurvError(cause, remedy="look at the errors of that process", code="FXC428")


def _without_values(held: Tensor | LazyGram) -> Tensor:
    return torch.empty_like(formed(held), device="meta")


def _as_text(shapes: Curvature | Block) -> str:
    return base64.b64encode(pickle.dumps(shapes)).decode()


def _from_text(text: str | bytes) -> Any:
    return pickle.loads(base64.b64decode(text))


def _on(result: Curvature, change: Callable[[Tensor], Tensor]) -> Curvature:
    """Return the result with changed tensors; lazy Grams are formed."""
    values = [v.mapped(lambda t: change(formed(t))) if isinstance(v, Block) else change(v) for v in values_of(result)]
    return replace(values_changed(result, values), loss=change(result.loss), output=change(result.output))


# Distribution of blocks -------------------------------------------------------------------------------------------


def mapped(operator: BlockDiagonal, f: Callable[[Block], Block], timeout: float = 600.0) -> BlockDiagonal:
    """Return f of every block, e.g. `lambda block: block.inverse(1e-3)`, each computed by one process and sent to all.

    Every process of the group must call it with the same operator and f, and gets bitwise equal results; a single
    process computes f of every block. An error in one process, or no response for `timeout` seconds, ends all (FXC428).
    """
    processes = Processes.of_group(timeout, "blocks")
    with processes.telling_errors():
        blocks = processes.mapped([part.block for part in operator.parts], f)
    return BlockDiagonal(
        operator.domain, [PlacedBlock(block, part.at) for block, part in zip(blocks, operator.parts, strict=True)]
    )


def assigned(costs: Sequence[float], size: int) -> list[int]:
    """Assign tasks to `size` processes: in order of decreasing cost, each to the process with the smallest load.

    The makespan is at most 4/3 of the optimum (Graham 1969, longest processing time first).
    """
    loads, owners = [0.0] * size, [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owners[k] = loads.index(min(loads))
        loads[owners[k]] += costs[k]
    return owners


def _recognised(blocks: Sequence[Block]) -> str:
    """Return a digest of the blocks' types, shapes, parameters and diagonals (bitwise), to compare results."""

    def diagonal(t: Tensor) -> Tensor:
        return t.diagonal(dim1=-2, dim2=-1) if t.ndim > 1 else t

    return digest([(type(b).__name__, b.shape, b.parameters, [*map(diagonal, b.tensors.values())]) for b in blocks])


# Packing ----------------------------------------------------------------------------------------------------------


def _kind(value: Value) -> tuple[object, ...]:
    """Return the dtype, shape and options of a value, which are equal on all processes."""
    return str(value.dtype), tuple(value.shape), repr(value.layout) if isinstance(value, Block) else ""


def _added(
    values: Sequence[Value],
    shares: tuple[Sequence[float], Sequence[float]],
    counts: Sequence[int],
    add: Callable[[Sequence[Tensor]], list[Tensor]],
) -> list[Value]:
    """Sum the values over all processes, bucket by bucket, with weights of each value for its terms and its inputs."""
    sums = itertools.chain.from_iterable(add(bucket) for bucket in _buckets(_packed(values, *shares)))

    def whole(value: Value, count: int) -> Value:
        if isinstance(value, Tensor):
            return next(sums).view(value.shape)
        return value.mapped(lambda part: _unpacked(next(sums), formed(part), value.symmetric)).counted(count)

    return [whole(value, count) for value, count in zip(values, counts, strict=True)]


def _packed(values: Sequence[Value], terms: Sequence[float], inputs: Sequence[float]) -> Iterator[Tensor]:
    """Yield every tensor of the values, weighted and flat, in the order of `Block.mapped`."""
    for value, share, own in zip(values, terms, inputs, strict=True):
        if isinstance(value, Tensor):
            yield value.flatten() * share
            continue
        for part, weight in zip(value.parts, value.weights(share, own), strict=True):
            tensor = formed(part)
            yield (_triangle(tensor) if value.symmetric else tensor.flatten()) * weight


def _lower(like: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(like.shape[-1], like.shape[-1], device=like.device)
    return rows, columns


def _triangle(matrices: Tensor) -> Tensor:
    rows, columns = _lower(matrices)
    return matrices[..., rows, columns].flatten()


def _unpacked(flat: Tensor, like: Tensor, symmetric: bool) -> Tensor:
    if not symmetric:
        return flat.view(like.shape)
    rows, columns = _lower(like)
    triangles = flat.view(*like.shape[:-2], len(rows))
    whole = torch.empty_like(like)
    whole[..., rows, columns] = triangles
    whole[..., columns, rows] = triangles
    return whole


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of consecutive tensors of one dtype, at most `BUCKET_BYTES` each, or a single larger tensor."""
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        if bucket and (bucket[0].dtype != t.dtype or size + t.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += t.nbytes
    if bucket:
        yield bucket
