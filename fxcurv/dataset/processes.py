"""Several processes: each accumulates its share of the data; then sums and counts are added up once, for all of them.

Before anything is added, every process says through the group's key-value store that it is done, and what it holds;
meanwhile it sets a key after every batch, and one if it fails. So nobody enters a collective that another one will not
reach: an error ends all processes at their next batch, or where they wait, and a process that ended without a word is
missed after a timeout. Values are weighted by divisors and counts before they are added: they travel in buckets,
symmetric matrices as triangles.

In the same way `mapped` lets each process decompose some of the blocks that all of them have, and gives them to all.
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
from fxcurv.results.merging import Value, check_adds, values_changed, values_of

__all__ = ["BUCKET_BYTES", "Processes", "assigned", "mapped", "process_group", "shard"]


BUCKET_BYTES = 1 << 26
"""How much is added up, or sent, in one collective."""


_POLL = 0.05  # seconds between two looks into the store


_LAST_WORDS = 5.0  # seconds for which the process that holds the store waits until others have read its error


_calls = itertools.count()


@contextmanager
def process_group() -> Generator[tuple[int, int]]:
    """Within, the processes that torchrun started are a group (gloo, NCCL for GPUs); gives rank and size: (0, 1) alone.

    A group that is already there is used and stays.
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
    """`joined`, the former name of `process_group`."""
    if name != "joined":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_renamed(name, "process_group")
    return process_group


def shard(dataset: Any) -> Any:
    """This process's share of a data set: every sample belongs to one process, whatever their numbers; all of it alone.

    `torch.utils.data.DistributedSampler` repeats samples to make shares equal, which would count them twice.
    """
    if not _several():
        return dataset
    return Subset(dataset, range(dist.get_rank(), len(dataset), dist.get_world_size()))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@dataclass(frozen=True)
class Processes:
    """The processes that work on one thing, as one of them sees it; `steps` is what each says that it has done."""

    rank: int
    size: int
    timeout: float
    store: Any = None
    steps: str = "batches"

    @classmethod
    def alone(cls) -> Processes:
        """A single process."""
        return cls(0, 1, 0.0)

    @classmethod
    def of_group(cls, timeout: float, steps: str = "batches") -> Processes:
        """Those of the default group of torch.distributed, or a single one."""
        if not _several():
            return cls.alone()
        store = PrefixStore(f"fxcurv/{next(_calls)}", default_store())
        return cls(dist.get_rank(), dist.get_world_size(), timeout, store, steps)

    # Signs of life ------------------------------------------------------------------------------------------------

    def beat(self, done: int) -> None:
        """Say that so many steps are done, and look whether another process failed."""
        if self.size > 1:
            with self._reading():
                self.store.set(f"beat/{self.rank}", str(done))
                self._look()

    @contextmanager
    def telling_errors(self) -> Generator[None]:
        """Tell the other processes what is raised here."""
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
        except RuntimeError:  # the store is gone, and with it the process that held it
            return

    def _linger(self) -> None:
        """Say that the error is known here; who holds the store stays until it is known to all, or for a while."""
        self.store.set(f"read/{self.rank}", "")
        end = time.monotonic() + (min(_LAST_WORDS, self.timeout) if self.rank == 0 else 0)
        others = [f"read/{rank}" for rank in range(1, self.size)]
        while time.monotonic() < end and not self.store.check(others):
            time.sleep(_POLL)

    def _look(self) -> None:
        """Raise what another process told."""
        if self.store.check(["error"]):
            told = self.store.get("error").decode()
            self._linger()
            raise _failed(told)

    @contextmanager
    def _reading(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:  # DistStoreError, DistNetworkError
            raise _failed(f"the process that holds the group's store does not answer ({error})") from error

    def _all(self, mine: str) -> list[str]:
        """What every process says when it is done, as soon as all are; the only place to wait for others."""
        with self._reading():
            self.store.set(f"done/{self.rank}", mine)
            for rank in range(self.size):
                self._await(rank)
            found = [self.store.get(f"done/{rank}").decode() for rank in range(self.size)]
            self.store.set(f"read/{self.rank}", "")
            return found

    def _await(self, rank: int) -> None:
        """Until a process is done; an error where it gives no sign for too long."""
        last, since = b"", time.monotonic()
        while not self.store.check([f"done/{rank}"]):
            self._look()
            beat = self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else b""
            if beat != last:
                last, since = beat, time.monotonic()
            if time.monotonic() - since > self.timeout:
                done = beat.decode() or "0"
                missed = f"process {rank} gave no sign for {self.timeout:g} s, after {done} {self.steps}"
                self._tell(missed)
                raise _failed(missed)
            time.sleep(_POLL)

    # Sums ---------------------------------------------------------------------------------------------------------

    def total(self, mine: Curvature | None, model: nn.Module) -> Curvature | None:
        """The result over the batches of all processes, the same for each; None if there are no batches."""
        if self.size == 1:
            return mine
        told = [json.loads(text) for text in self._all(json.dumps(self._summary(mine, model)))]
        filled = [k for k, t in enumerate(told) if t["samples"]]
        if not filled:
            return None
        for name, k in itertools.product(("model", "kind"), filled):
            if told[k][name] != told[filled[0]][name]:
                raise FxcurvError(
                    f"processes {filled[0]} and {k} have results of different things: their {name} differs",
                    remedy="give every process the same model, at the same values, loss and quantities",
                    code="FXC425",
                )
        template = self._template(mine, filled[0], model)
        divisor, samples = (sum(told[k][name] for k in filled) for name in ("divisor", "samples"))
        counts = [sum(found) for found in zip(*(told[k]["counts"] for k in filled), strict=True)]
        share, shares = 0.0, [0.0] * len(counts)
        if mine is not None:
            own = told[self.rank]
            share = own["divisor"] / (divisor or 1.0) if mine.reduction == "mean" else 1.0
            shares = [c / n if n else 0.0 for c, n in zip(own["counts"], counts, strict=True)]
        values = _added(values_of(template), (share, shares), counts, self._sum)
        (loss,) = self._sum([template.loss.reshape(1) * share])
        return replace(
            values_changed(template, values),
            loss=loss.reshape(()),
            samples=samples,
            output=template.output.new_empty(samples, 0),
            divisor=divisor if template.reduction == "mean" else 1.0,
        )

    def of_first(self, compute: Callable[[], list[Tensor]], like: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What the first process computes, the same bits for each; `like` gives tensors of its types and shapes."""
        if self.size == 1:
            return compute()
        with self.telling_errors():
            found = [t.contiguous() for t in (compute() if self.rank == 0 else like())]
            self._all("")
            for t in found:
                self._finish(lambda t=t: dist.broadcast(t, 0, async_op=True))
        return found

    def _summary(self, mine: Curvature | None, model: nn.Module) -> dict[str, Any]:
        """What the others need to know: numbers, and digests of what must be the same."""
        if mine is None:
            return {"samples": 0, "divisor": 0.0, "counts": []}
        check_adds(mine)
        values = values_of(mine)
        rows = [(e.parameter, e.status, e.form(), e.definition, e.reduction) for e in mine.entries]
        if any(isinstance(v, Block) and v.count == 0 for v in values):
            raise FxcurvError(
                "a block does not know how many inputs its A averages", remedy="compute it anew", code="FXC425"
            )
        return {
            "samples": mine.samples,
            "divisor": float(mine.divisor or 0),
            "reduction": mine.reduction,
            "counts": [v.count or 0 if isinstance(v, Block) else 0 for v in values],
            "model": values_digest(model),
            "kind": digest((rows, [str(v.dtype) for v in values])),
        }

    def _template(self, mine: Curvature | None, first: int, model: nn.Module) -> Curvature:
        """The own result; without one, zeros like that of the first process that has one, which tells their shapes."""
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
        """The sums of flat tensors of one type over all processes."""
        flat = torch.cat(list(tensors))
        self._finish(lambda: dist.all_reduce(flat, async_op=True))
        return list(flat.split([len(t) for t in tensors]))

    def _finish(self, start: Callable[[], Any]) -> None:
        """A collective, until it is done."""
        try:
            start().wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise _failed(f"a process ended while values were exchanged ({error})") from error

    # Blocks -------------------------------------------------------------------------------------------------------

    def mapped(self, blocks: Sequence[Block], f: Callable[[Block], Block]) -> list[Block]:
        """f of every block, computed by one process and sent to all."""
        if self.size == 1:
            return [f(block) for block in blocks]
        owners = assigned([block.decomposition_cost for block in blocks], self.size)
        found: dict[int, Block] = {}
        for k in (k for k, owner in enumerate(owners) if owner == self.rank):
            found[k] = f(blocks[k]).mapped(formed)
            self.beat(len(found))
        shapes = {k: _as_text(block.mapped(_without_values)) for k, block in found.items()}
        told = [json.loads(text) for text in self._all(json.dumps({"of": _recognised(blocks), "shapes": shapes}))]
        for k in range(self.size):
            if told[k]["of"] != told[0]["of"]:
                raise FxcurvError(
                    f"processes 0 and {k} have different blocks",
                    remedy="give every process the same operator, as accumulate does",
                    code="FXC425",
                )
        place = blocks[0].device

        def empty(t: Tensor) -> Tensor:
            return torch.empty(t.shape, dtype=t.dtype, device=place)

        for owner, its in enumerate(told):
            theirs = {int(k): text for k, text in its["shapes"].items()}
            held = [found.get(k) or _from_text(text).mapped(empty) for k, text in theirs.items()]
            found |= zip(theirs, self._sent(held, owner), strict=True)
        self._sum([torch.zeros(1, device=place)])  # nobody leaves before all have everything
        return [found[k] for k in range(len(blocks))]

    def _sent(self, held: Sequence[Block], owner: int) -> list[Block]:
        """The blocks of a process, for which the others hold empty ones of the same form."""
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
    """The result with changed tensors, moments being formed."""
    values = [v.mapped(lambda t: change(formed(t))) if isinstance(v, Block) else change(v) for v in values_of(result)]
    return replace(values_changed(result, values), loss=change(result.loss), output=change(result.output))


# Each block by one process ----------------------------------------------------------------------------------------


def mapped(operator: BlockDiagonal, f: Callable[[Block], Block], timeout: float = 600.0) -> BlockDiagonal:
    """f of every block, such as `lambda block: block.inverse(1e-3)`, each computed by one process and sent to all.

    Every process of the group must call it, with the same operator and f, and gets the same bits; alone it is f of
    every block. What raises in one process, or gives no sign for `timeout` seconds, ends all (FXC428).
    """
    processes = Processes.of_group(timeout, "blocks")
    with processes.telling_errors():
        blocks = processes.mapped([part.block for part in operator.parts], f)
    return BlockDiagonal(
        operator.domain, [PlacedBlock(block, part.at) for block, part in zip(blocks, operator.parts, strict=True)]
    )


def assigned(costs: Sequence[float], size: int) -> list[int]:
    """Which of so many processes does what: the costliest first, each by the one that has the least to do by then.

    The last is done at most 4/3 as late as under the best assignment (Graham 1969, longest processing time first).
    """
    loads, owners = [0.0] * size, [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owners[k] = loads.index(min(loads))
        loads[owners[k]] += costs[k]
    return owners


def _recognised(blocks: Sequence[Block]) -> str:
    """A digest of what blocks are and of their diagonals, bit by bit: it tells one result from another."""

    def diagonal(t: Tensor) -> Tensor:
        return t.diagonal(dim1=-2, dim2=-1) if t.ndim > 1 else t

    return digest([(type(b).__name__, b.shape, b.parameters, [*map(diagonal, b.tensors.values())]) for b in blocks])


# What travels -----------------------------------------------------------------------------------------------------


def _added(
    values: Sequence[Value],
    shares: tuple[float, Sequence[float]],
    counts: Sequence[int],
    add: Callable[[Sequence[Tensor]], list[Tensor]],
) -> list[Value]:
    """The values over all processes: each A by a share of its own, all else by the first, added bucket by bucket."""
    sums = itertools.chain.from_iterable(add(bucket) for bucket in _buckets(_packed(values, *shares)))

    def whole(value: Value, count: int) -> Value:
        if isinstance(value, Tensor):
            return next(sums).view(value.shape)
        return value.mapped(lambda part: _unpacked(next(sums), formed(part), value.symmetric)).counted(count)

    return [whole(value, count) for value, count in zip(values, counts, strict=True)]


def _packed(values: Sequence[Value], share: float, shares: Sequence[float]) -> Iterator[Tensor]:
    """Every tensor of the values, weighted and flat, in the order in which blocks change them."""
    for value, own in zip(values, shares, strict=True):
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
    """Consecutive tensors of one type, of at most `BUCKET_BYTES` together unless one alone is larger."""
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
