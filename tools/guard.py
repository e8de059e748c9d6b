"""The comparison of graph and model on real models: its errors, for the tolerances, and its cost.

    python tools/guard.py                       all models, in float32 and bfloat16
    python tools/guard.py --models 'resnet*'    some of them, and nothing is written

For each model, two samples and a random cotangent: the largest difference of the outputs, relative to the largest
entry; the difference of all gradients together, relative to their norm; and the largest difference of the gradient of
one parameter, relative to its norm, among those with at least 1e-3 of the norm of all. The cost of the first comparison
and of a new batch size is given in gradients of two samples and in forward passes of that batch. The table is written
to results/guard.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxcurv
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import Inputs, as_call, selector
from fxcurv.frontend.shield import shielded
from fxcurv.models import targets
from fxcurv.verification.graph import Pullback, output_at
from fxcurv.verification.guard import Guard

ROOT = Path(__file__).resolve().parent.parent
TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v3_small"),
    *(
        "regnet_y_400mf",
        "resnet18",
        "resnet50",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "swin_t",
        "vgg11_bn",
        "vit_b_16",
    ),
)
TIMM = ("test_vit", "test_byobnet", "test_efficientnet", "test_mambaout", "test_nfnet", "test_convnext")
HUGGINGFACE = (
    *(
        "albert",
        "bart",
        "bert",
        "convnext",
        "deberta",
        "distilbert",
        "gpt2",
        "llama",
        "mamba",
        "modernbert",
        "t5",
        "vit",
    ),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """The measurements of one model."""

    model: str
    dtype: str
    output: float
    gradients: float
    parameter: float
    first: float
    later: float

    def cells(self) -> list[str]:
        errors = [f"{value:.1e}" for value in (self.output, self.gradients, self.parameter)]
        return [self.model, self.dtype, *errors, f"{self.first:.2f}", f"{self.later:.2f}"]


def models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Inputs]]]]:
    """Every model by name, and how it is built."""
    for library, names in (("torchvision", TORCHVISION), ("timm", TIMM)):
        for name in names:
            yield f"{library}:{name}", lambda library=library, name=name: of_library(library, name)
    import huggingface

    for name in HUGGINGFACE:
        yield f"transformers:{name}", lambda name=name: huggingface.build(name, 8)


def of_library(library: str, name: str) -> tuple[nn.Module, Inputs]:
    target = targets.resolve(f"{library}:{name}")
    assert target.input_shape is not None
    return target.model, torch.randn(8, *target.input_shape, generator=torch.Generator().manual_seed(0))


def measured(name: str, dtype: str, model: nn.Module, inputs: Inputs) -> Row:
    """Compare graph and model on two samples, and time the comparison."""
    kind = DTYPES[dtype]
    model = model.to(kind).eval()
    inputs = pytree.tree_map_only(Tensor, lambda t: t.to(kind) if t.is_floating_point() else t, inputs)
    two = pytree.tree_map_only(Tensor, lambda t: t[:2], inputs)
    compiled = fxcurv.compile(model, "mse", "grad", verify="never")
    program = compiled.prepare(two)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    pullback = Pullback(program, model, names)
    with shielded(model) as shield:
        y = called(model, two)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        expected = {n: g for n, g in shield.backward(y, cotangent, names).items() if g is not None}
        found = pullback(two, shield.tensors, cotangent)
        output = output_at(program, two, shield.tensors)
    errors = {n: norm(found[n] - g) if n in found else norm(g) for n, g in expected.items()}
    whole = math.hypot(*map(norm, expected.values()))
    large = [n for n, g in expected.items() if norm(g) > 1e-3 * whole]
    gradient = seconds(lambda: called(model, two).backward(cotangent))
    model.zero_grad(set_to_none=True)
    guard = Guard(program, model, None, names)
    start = time.perf_counter()
    guard._compare_gradients(two, 2)
    first = (time.perf_counter() - start) / gradient
    with torch.no_grad():
        forward = seconds(lambda: called(model, inputs))
    later = seconds(lambda: guard.compare_output(inputs, among=True)) / forward
    return Row(
        name,
        dtype,
        float((output - y).abs().max() / y.abs().max()),
        math.hypot(*errors.values()) / whole,
        max(errors[n] / norm(expected[n]) for n in large),
        first,
        later,
    )


def called(model: nn.Module, inputs: Inputs) -> Tensor:
    args, kwargs = as_call(inputs)
    return selector(None)(model(*args, **kwargs))


def norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t.double()))


def seconds(run: Callable[[], Any], times: int = 3) -> float:
    """The median time of a call, after one that is not counted."""
    run()
    taken: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", help="a shell-style pattern of names")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for name, build in models():
        for dtype in given.dtypes.split(","):
            if fnmatch.fnmatch(name.partition(":")[2], given.models):
                model, inputs = build()
                rows.append(measured(name, dtype, model, inputs))
                print(*rows[-1].cells(), flush=True)
    headers = ["model", "dtype", "output", "all gradients", "one parameter", "first, gradients", "new size, forwards"]
    table = tabulate([row.cells() for row in rows], headers, tablefmt="github", disable_numparse=True)
    if given.models == "*":
        about = str(__doc__).partition("For each")[2]
        title = "# Graph and model compared on real models"
        text = "\n\n".join((title, "`python tools/guard.py`", f"For each{about}"))
        (ROOT / "tools" / "results" / "guard.md").write_text(f"{text.strip()}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
