"""Several processes for tests: forked from one that has imported everything, they join a group and call a function."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from curvatures import EXACT, LOSSES, labels, reals, tokens
from torch import Tensor, nn

import fxcurv
from fxcurv.core.fingerprint import digest
from fxcurv.dataset import processes as distributed
from fxcurv.quantities.protocol import facts_of

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, and what its function returned, or what it raised, as text."""

    code: int | None
    value: Any
    error: str


def run(size: int, function: Callable[..., Any], *arguments: object, limit: float = 120) -> list[Ended]:
    """function(rank, *arguments) in each of so many processes, of one group; those that take too long are killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"tcp://localhost:{free.getsockname()[1]}"
    started = []
    with mock.patch.dict(os.environ, ENVIRONMENT):
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_one, args=(there, address, (rank, size), function, arguments))
            process.start()
            there.close()
            started.append((process, here))
    end = time.monotonic() + limit
    ended = list[Ended]()
    try:
        for process, pipe in started:
            value, error = None, "no word"
            try:
                if pipe.poll(max(0, end - time.monotonic())):
                    value, error = pipe.recv()
            except EOFError:
                pass
            process.join(max(0, end - time.monotonic()))
            ended.append(Ended(process.exitcode, value, error))
    finally:
        for process, _ in started:
            process.kill()
    return ended


def _one(pipe: Connection, address: str, place: tuple[int, int], function: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    rank, size = place
    dist.init_process_group("gloo", address, rank=rank, world_size=size, timeout=timedelta(seconds=100))
    try:
        pipe.send((function(rank, *arguments), ""))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        os._exit(1)
    os._exit(0)


# What each of them does -------------------------------------------------------------------------------------------

SHARES = ((0,), (), (1, 2), (3,))
"""Which batches each process has."""

ADDED = [name for name in fxcurv.NAMES if facts_of(fxcurv.NAMES[name])["combine"] == "add"]


@dataclass(frozen=True)
class OfDegree(fxcurv.SumGradSquared):
    """Σ_n g_n², which adds and is of degree 2 in the loss, or the number of samples, of degree 0."""

    combine = "add"
    degree: int = 2  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]
    family: str = "of_degree"

    def finish(self, usage: Any, sums: Any, samples: int) -> Any:
        return super().finish(usage, sums, samples) if self.degree else torch.tensor(float(samples)).double()


OF_DEGREES = [OfDegree(), OfDegree(degree=0)]


def losses() -> Iterator[tuple[str, fxcurv.Compiled, tuple[Tensor, Tensor]]]:
    """A compiled object of everything that adds, and all of its data, for losses of both reductions."""
    for name in ("ignored", "summed"):
        dense, loss, y = LOSSES[name]
        yield name, fxcurv.compile(tokens(dense), loss, [*ADDED, *EXACT, *OF_DEGREES]), (reals(7, 3, 5) - 0.5, y)


def share(data: tuple[Tensor, Tensor], rank: int) -> list[tuple[Tensor, Tensor]]:
    batches = list(zip(*(t.split((2, 1, 3, 1)) for t in data), strict=True))
    return [batches[k] for k in SHARES[rank]]


MAPS: dict[str, Callable[[fxcurv.Block], fxcurv.Block]] = {
    "decomposed": lambda block: block.decomposed(),
    "inverse": lambda block: block.inverse(1e-3),
    "inverse by pi": lambda block: block.inverse(1e-3, "pi"),
    "root": lambda block: block.sqrt(),
    "scaled": lambda block: block * 2,
}


def equal(rank: int, folder: str) -> dict[str, Any]:
    """Results over all processes, as bytes, and for each map of blocks how many this one computed, and their bits."""
    distributed.BUCKET_BYTES = 1000
    told = dict[str, Any]()
    for name, compiled, data in losses():
        generator = torch.Generator().manual_seed(rank)
        result = compiled.accumulate(share(data, rank), generator=generator, checkpoint=f"{folder}/{name}")
        told[name] = pickle.dumps(result)
    operator = pickle.loads(told["ignored"]).operator("kflr")
    for name, f in MAPS.items():
        mine = list[fxcurv.Block]()
        found = distributed.mapped(operator, lambda block, f=f, mine=mine: mine.append(block) or f(block))
        expected = [f(part.block) for part in operator.parts]
        for part, block in zip(found.parts, expected, strict=True):
            assert type(part.block) is type(block)
            torch.testing.assert_close(part.block.dense(), block.dense(), rtol=1e-12, atol=1e-14)
        told[f"blocks {name}"] = len(mine)
        told[f"bits {name}"] = digest([part.block.tensors for part in found.parts])
    told["share"] = list(distributed.shard(torch.arange(7)).indices)
    return told


def halves() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    x, y = reals(4, 5), labels(4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(5, 3).double().eval(), [(x[:2], y[:2]), (x[2:], y[2:])]


def by_name(rank: int) -> dict[str, str | bytes]:
    """Every quantity by its name over two processes with half of the data each: its result, or the code of an error."""
    model, data = halves()
    told = dict[str, str | bytes]()
    for name in fxcurv.NAMES:
        told[name] = outcome(lambda name=name: fxcurv.compile(model, quantities=name).accumulate([data[rank]]))
    told["no batch"] = outcome(lambda: fxcurv.compile(model).accumulate([]))
    return told | spread_over_processes(data[rank])


SPREAD = ("parallel", "parallel, accumulated", "FSDP", "FSDP, accumulated")


def spread_over_processes(data: tuple[Tensor, Tensor]) -> dict[str, str | bytes]:
    """Of models with DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    parallel, sharded = nn.Linear(5, 3).double().eval(), nn.Linear(5, 3).double().eval()
    parallel.bias = nn.Parameter(distribute_tensor(parallel.bias.detach(), mesh))
    fully_shard(sharded, mesh=mesh)
    told = dict[str, str | bytes]()
    for name, model in (("parallel", parallel), ("FSDP", sharded)):
        compiled = fxcurv.compile(model)
        told[name] = outcome(lambda compiled=compiled: compiled(*data))
        told[f"{name}, accumulated"] = outcome(lambda compiled=compiled: compiled.accumulate([data]))
    assert tuple(told) == SPREAD
    return told


def outcome(call: Callable[[], object]) -> str | bytes:
    try:
        return pickle.dumps(call())
    except fxcurv.FxcurvError as error:
        return error.code or ""


def failing(rank: int, how: str, which: int) -> None:
    """One of them raises, dies after its batches or while values are exchanged, or has another model or blocks."""
    dense, loss, y = LOSSES["weighted"]
    compiled, data = fxcurv.compile(tokens(dense), loss, "kflr"), (reals(7, 3, 5) - 0.5, y)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from share(data, 2)
        if rank == which and how == "raise":
            raise OSError("the disk is gone")
        if rank == which and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)

    def inverse(block: fxcurv.Block) -> fxcurv.Block:
        if rank == which and how == "inverse":
            raise OSError("no inverse")
        return block.inverse(1e-3)

    if rank == which and how == "exchange":
        dist.all_reduce = lambda *_, **__: os._exit(9)
    if rank == which and how == "values":
        with torch.no_grad():
            next(compiled.model.parameters()).add_(1e-9)
    if how in ("inverse", "blocks"):
        operator = compiled(data[0], data[1]).operator("kflr") * (2 if rank == which and how == "blocks" else 1)
        distributed.mapped(operator, inverse, timeout=3)
    compiled.accumulate(batches(), timeout=3)
