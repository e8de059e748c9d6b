"""What curvature costs to share out over processes, on paper: volumes and times per update, beside KAISA's schemes.

    python tools/communication.py               tools/results/communication.md and .csv

Nothing is run. The blocks are those that fxcurv plans for the models on the meta device; what travels is what
fxcurv/dataset/processes.py would pack for them, in its buckets, and who decomposes which block is its assignment. The
schemes of KAISA (Pauloski et al., SC 2021) are modelled for the same blocks, from how they are described.

An update is: factors are added up over all workers; blocks are decomposed, each by one worker; `ITERATIONS` gradients
are preconditioned. Volumes are what a worker receives.

all-reduce   2(p-1) α + 2(p-1)/p · bytes/β for each bucket: a ring
broadcast    (p-1) α + bytes/β for each message: a pipelined ring
eigh         9 d³ operations for a matrix of side d, at a fixed rate
α, β         those of the slowest link of the ring: within a node, or between nodes
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the sources beside it, not an installed copy

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import fxcurv
from fxcurv.blocks.base import Block
from fxcurv.blocks.dense import Dense
from fxcurv.blocks.diagonal import Diagonal
from fxcurv.blocks.kronecker import Kronecker
from fxcurv.checks.static import static_found
from fxcurv.contractions.definitions import Gram, InputCovariance
from fxcurv.contractions.statistic import Statistic
from fxcurv.dataset import processes as distributed
from fxcurv.quantities.plan import Job
from fxcurv.quantities.selection import chosen
from passes.plan import plan

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {"ResNet-50": "resnet50", "ViT-L/16": "vit_l_16"}
WORKERS = (1, 8, 64, 256, 1024)
NODE = 8
LATENCY, INSIDE, BETWEEN = 5e-6, 150e9, 12.5e9  # s per hop; bytes/s of NVLink, and of EDR InfiniBand (100 Gb/s)
RATE = 0.5e12  # operations/s of a symmetric eigendecomposition in float32
ITERATIONS = 10
WEIGHTS = {"*": None, nn.Linear: fxcurv.KFAC(joint=True), nn.Conv2d: fxcurv.KFAC(joint=True)}
CHOICES = {"all parameters": "kfac", "weights": WEIGHTS}


# Blocks -----------------------------------------------------------------------------------------------------------


def planned(name: str) -> dict[str, list[Block]]:
    """The blocks that a model of torchvision gets for each choice, on the meta device."""
    with torch.device("meta"):
        model, x = getattr(torchvision.models, name)().eval(), torch.empty(2, 3, 224, 224)
    choices = {of: chosen(asked) for of, asked in CHOICES.items()}
    canonical = static_found(model, x, None, choices["all parameters"]).canonical
    return {of: [_block(job) for job in plan(model, canonical, selection).jobs] for of, selection in choices.items()}


def _block(job: Job) -> Block:
    sums = {name: _sum(job, name, of) for name, of in job.quantity.statistics(job.usage).items()}
    block = job.quantity.finish(job.usage, sums, 1)
    assert isinstance(block, Block)
    return block


def _sum(job: Job, name: str, of: Statistic) -> Tensor:
    """The sum of a statistic, without its entries."""
    usage = job.usage
    side = usage.inputs + of.ones if isinstance(of, InputCovariance) else usage.outputs if name == "G" else usage.numel
    groups = usage.groups if name in "AG" else 1
    shape = (groups, side, side) if name in "AG" or isinstance(of, Gram) else (side,)
    return torch.empty(shape, device="meta")


def triangles(blocks: Sequence[Block]) -> list[Tensor]:
    """What a worker adds to the others' sums."""
    return list(distributed._packed(blocks, [1.0] * len(blocks), [1.0] * len(blocks)))


def squares(block: Block) -> int:
    """Bytes of the whole matrices."""
    return sum(size.numel() for size in block.sizes.values()) * 4


def decomposition(block: Block) -> int:
    """Bytes of the block in its eigenvectors: these, and the eigenvalues of all of it."""
    return squares(block) + (block.numel * 4 if isinstance(block, Dense | Kronecker) else 0)


# Times and volumes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One model, choice, scheme and number of workers; bytes that a worker receives or holds, seconds per update."""

    model: str
    blocks_of: str
    scheme: str
    workers: int
    factor_bytes: float
    inverse_bytes: float
    gradient_bytes: float
    held_bytes: float
    add_seconds: float
    decompose_seconds: float
    send_seconds: float

    @property
    def seconds(self) -> float:
        return self.add_seconds + self.decompose_seconds + self.send_seconds


def bandwidth(workers: int) -> float:
    return INSIDE if workers <= NODE else BETWEEN


def ring(sizes: Sequence[int], p: int) -> tuple[float, float]:
    """(bytes received, seconds) of an all-reduce of each of the sizes."""
    received = 2 * (p - 1) / p * sum(sizes)
    return received, len(sizes) * 2 * (p - 1) * LATENCY + received / bandwidth(p)


def messages(sizes: Sequence[int], owners: Sequence[int]) -> int:
    """In how many buckets every owner sends what it has."""
    bound = distributed.BUCKET_BYTES
    held = [[size for size, of in zip(sizes, owners, strict=True) if of == owner] for owner in set(owners)]
    return sum(sum(size > bound for size in own) + -(-sum(s for s in own if s <= bound) // bound) for own in held)


def lines(model: str, blocks_of: str, blocks: Sequence[Block]) -> list[Line]:
    """All schemes and numbers of workers for the blocks of a model."""
    added = {
        "fxcurv": [sum(t.nbytes for t in bucket) for bucket in distributed._buckets(triangles(blocks))],
        "KAISA": _filled([squares(block) for block in blocks]),
    }
    inverses = [decomposition(block) for block in blocks]
    gradient = sum(4 * block.numel for block in blocks)
    costs = [0 if isinstance(block, Diagonal) else block.decomposition_cost for block in blocks]
    found: list[Line] = []
    for p in WORKERS:
        owners, loads = distributed.assigned(costs, p), [0.0] * p
        for k, owner in enumerate(owners):
            loads[owner] += 9 * costs[k] / RATE
        for scheme, fraction in {"fxcurv": 1.0, "COMM-OPT": 1.0, "HYBRID-OPT": 0.5, "MEM-OPT": 0.0}.items():
            ours = scheme == "fxcurv"
            received, add = ring(added["fxcurv" if ours else "KAISA"], p)
            holders = max(1, round(p * fraction))  # of a block: they precondition its gradient, and send it to others
            inverse = sum(inverses) * (holders - 1) / p
            sent = ITERATIONS * gradient * (1 - holders / p)
            sends = messages(inverses, owners) if ours else len(blocks)
            hops = sends * (holders - 1) + ITERATIONS * len(blocks) * (p // holders - 1)
            send = (inverse + sent) / bandwidth(p) + hops * LATENCY
            held = sum(inverses) * holders / p
            found.append(Line(model, blocks_of, scheme, p, received, inverse, sent, held, add, max(loads), send))
    return found


def _filled(sizes: Sequence[int]) -> list[int]:
    """The bytes of consecutive buckets, as `distributed._buckets` fills them."""
    return [sum(t.nbytes for t in bucket) for bucket in distributed._buckets(_bytes(size) for size in sizes)]


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")


def all_lines() -> list[Line]:
    """The whole table."""
    kinds = [(model, of, blocks) for model, name in MODELS.items() for of, blocks in planned(name).items()]
    return [line for model, of, blocks in kinds for line in lines(model, of, blocks)]


# Reporting --------------------------------------------------------------------------------------------------------


def as_csv(found: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Line)])
    writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in astuple(line)] for line in found)
    return text.getvalue()


def from_csv(text: str) -> list[Line]:
    rows = list(csv.reader(io.StringIO(text)))[1:]
    return [Line(a, b, c, int(p), *map(float, numbers)) for a, b, c, p, *numbers in rows]


def shown(line: Line) -> bool:
    return line.blocks_of == "weights" or line.scheme == "fxcurv"


def label(line: Line) -> str:
    return line.scheme if line.blocks_of == "weights" else f"{line.scheme}, all parameters"


def volumes(found: Sequence[Line]) -> str:
    """MB that one of 64 workers receives and holds."""
    rows = [
        (line.model, label(line), *(x / 1e6 for x in received), sum(received) / 1e6, line.held_bytes / 1e6)
        for line in found
        if line.workers == 64 and shown(line)
        for received in [(line.factor_bytes, line.inverse_bytes, line.gradient_bytes)]
    ]
    headers = ("model", "scheme", "factors", "decompositions", f"{ITERATIONS} gradients", "all", "held")
    return tabulate(rows, headers, tablefmt="github", floatfmt=".0f")


def times(found: Sequence[Line]) -> str:
    """Seconds per update, by the number of workers."""
    rows: dict[tuple[str, str], list[str]] = {}
    for line in filter(shown, found):
        parts = (line.add_seconds, line.decompose_seconds, line.send_seconds)
        cell = (
            f"{line.seconds:.2f}"
            if line.workers == 1
            else f"{line.seconds:.2f} ({' + '.join(f'{x:.2f}' for x in parts)})"
        )
        rows.setdefault((line.model, label(line)), []).append(cell)
    return tabulate([(*key, *cells) for key, cells in rows.items()], ("model", "scheme", *map(str, WORKERS)), "github")


def page(found: Sequence[Line]) -> str:
    return f"""# Communication of a curvature update, on paper

`python tools/communication.py`; every number is in `communication.csv`. Nothing here is measured.

Links of {INSIDE / 1e9:g} GB/s within a node of {NODE} (NVLink) and {BETWEEN / 1e9:g} GB/s between nodes (EDR
InfiniBand, 100 Gb/s), {LATENCY * 1e6:g} µs per hop, rings; eigendecompositions of 9 d³ operations at
{RATE / 1e12:g} TFLOP/s; float32; {ITERATIONS} gradients are preconditioned per update. An update adds factors over
all workers, decomposes each block on one of them (costliest first, to whoever has the least to do) and sends what the
workers need. The blocks are those that fxcurv plans: for the weights of `Linear` and `Conv2d` with their biases, or for
all parameters.

- **fxcurv**: triangles in buckets of {distributed.BUCKET_BYTES >> 20} MiB; decompositions to all, bucket by bucket.
- **COMM-OPT, HYBRID-OPT, MEM-OPT** are our model of KAISA's schemes for the same blocks: whole matrices, in such
  buckets; decompositions, block by block, to all workers, to half of them, to none; the others get each preconditioned
  gradient. kfac-pytorch has an option, `symmetry_aware`, to send triangles: then its factors take what ours do.

## MB that one of 64 workers receives per update, and holds

{volumes(found)}

## Seconds per update, by the number of workers: all (adding + decomposing + sending)

{times(found)}

The time to decompose ends at that of the costliest block, however many workers there are. What a scheme saves by
sending fewer decompositions it pays in gradients: with more of them per update COMM-OPT and fxcurv gain, with fewer
MEM-OPT does, which holds least.

## Published

{PUBLISHED}"""


PUBLISHED = """What the authors of KAISA measured of whole trainings, of which the model above says nothing.

- Pauloski et al., KAISA, SC 2021 (arXiv:2107.01739), abstract: ResNet-50, Mask R-CNN, U-Net and BERT on up to 128 A100
  GPUs; convergence 18.1–36.3 % faster than with the original optimizers at the same global batch size; with a fixed
  memory budget 32.5 % faster for ResNet-50 and 41.6 % for BERT-Large.
- github.com/gpauloski/kfac-pytorch, `kfac/enums.py`: the share of workers that hold a decomposition is 1 for COMM_OPT,
  0.5 for HYBRID_OPT and 1/workers for MEM_OPT; assignment is greedy, longest processing time first. `docs/results.md`:
  ResNet-50 on ImageNet, minutes per epoch on 16, 32 and 64 GPUs, SGD 15:00, 8:10 and 4:08, K-FAC with inverses every 10
  iterations 30:00 to 31:00, 14:18, and 7:17 to 11:05.
- Pauloski et al., SC 2020 (arXiv:2007.00784), abstract: ResNet-50 to 75.9 % in 18–25 % less time than SGD.

The paper's own volumes and times by scheme were not at hand as text: none is quoted.
"""


def main() -> None:
    found = from_csv(as_csv(all_lines()))
    for name, text in (("communication.csv", as_csv(found)), ("communication.md", page(found))):
        (RESULTS / name).write_text(text, encoding="utf-8")
    print(page(found))


if __name__ == "__main__":
    main()
