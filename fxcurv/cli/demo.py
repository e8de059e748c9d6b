"""`fxcurv demo`: train a small residual network on handwritten digits, and analyze its curvature.

It computes KFAC and the exact diagonal of the GGN over the training data, checks entries of the diagonal against
autograd, draws pictures, and uses the diagonal for pruning: which weights can be set to zero?
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fxcurv import api
from fxcurv.blocks.kronecker import Kronecker
from fxcurv.cli.demo_tables import (
    MAGNITUDE,
    ONCE,
    RANDOM,
    RANDOM_DRAWS,
    RECOMPUTED,
    SPARSITIES,
    TEST_DIGITS,
    CheckedEntry,
    DataCurvature,
    DemoReport,
    Pruning,
    Row,
    check_line,
    conclusion,
    parameter_table,
    pictures,
    pruning_table,
    texts,
)
from fxcurv.core.errors import FxcurvError
from fxcurv.models import data
from fxcurv.recipes.pruning import masks

__all__ = ["RANDOM", "RANDOM_DRAWS", "TEST_DIGITS", "DemoError", "DigitNet", "run"]


EPOCHS, MINIBATCH, LEARNING_RATE, SMOOTHING = 15, 64, 1e-2, 0.1


CURVATURE_BATCH = 128


ACCURACY_WANTED = 0.97


CHECKED_ENTRIES, CHECKED_SAMPLES, ERROR_ALLOWED = 20, 64, 1e-9


PRUNING_DIGITS = 512


class DemoError(FxcurvError):
    """Failure of the demo: a network that did not learn, or wrong curvature."""


def run(output: Path, *, seed: int = 0, say: Callable[[str], None] = print) -> DemoReport:
    """Run the demo: write files to `output`, pass text to `say`, show progress bars on a terminal's stderr."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(
            f"cannot write to {output}: {error.strerror}", remedy="choose another --output", code="FXC007"
        ) from error
    with _one_thread():
        return _run(output, seed, say)


@contextmanager
def _one_thread() -> Generator[None]:
    """Use one thread: faster for small tensors, and the order of summation is the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(output: Path, seed: int, say: Callable[[str], None]) -> DemoReport:
    started = time.perf_counter()
    digits = _digits(seed)
    say(f"data: {len(digits.train)} training and {len(digits.test)} test digits of scikit-learn, 1×8×8")
    model = _trained(digits, seed)
    accuracy = _accuracy(model, digits)
    size = sum(p.numel() for p in model.parameters())
    say(f"network: {size:,} parameters, {EPOCHS} epochs, {accuracy:.1%} of the test digits right\n")
    if accuracy < ACCURACY_WANTED:
        raise DemoError(
            f"the network got only {accuracy:.1%} of the test digits right", remedy="try another --seed", code="FXC010"
        )
    curvature = _curvature(model, digits, seed)
    rows = _rows(model, curvature)
    say(parameter_table(rows) + "\n")
    checked = _checked(model, digits, seed)
    say(f"check: {check_line(checked)}\n")
    pruning = _pruned(model, digits, curvature.diagonal, seed)
    say(pruning_table(pruning) + "\n")
    said = conclusion(accuracy, rows, curvature, pruning)
    files = (*pictures(output, rows, curvature, pruning), *texts(output, rows, checked, pruning, said))
    seconds = time.perf_counter() - started
    say(f"wrote {', '.join(file.name for file in files)} to {output} in {seconds:.0f} s\n\n{said}")
    return DemoReport(accuracy, rows, checked, pruning, files, said, seconds)


# The network and its training ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)); the shortcut is 1×1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """`[n, 1, 8, 8] -> [n, 10]`: a convolution, two residual blocks, the mean over pixels and a linear layer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block1 = Residual(width, width)
        self.block2 = Residual(width, 2 * width, stride=2)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.block2(self.block1(x))
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class _Digits:
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def _digits(seed: int) -> _Digits:
    """Return scikit-learn's 1,797 digits, shuffled by the seed; the last `TEST_DIGITS` are the test set."""
    every = data.load("digits", 1797, (1, 8, 8), 10, seed)
    assert every.targets is not None
    cut = len(every.inputs) - TEST_DIGITS
    return _Digits(every.inputs[:cut], every.targets[:cut], every.inputs[cut:], every.targets[cut:])


def _trained(digits: _Digits, seed: int) -> nn.Module:
    """Train a network for `EPOCHS` epochs of AdamW with one cycle of the learning rate; return it in eval mode."""
    from tqdm import tqdm

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = DigitNet()
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * -(-len(digits.train) // MINIBATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    with torch.enable_grad(), tqdm(total=steps, desc="training", file=sys.stderr, disable=None, leave=False) as bar:
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(digits.train), generator=generator).split(MINIBATCH):
                # smoothed labels keep p away from 0 and 1, where one sampled label is a poor estimate of diag(p) − ppᵀ
                scores, labels = model(digits.train[chosen]), digits.train_labels[chosen]
                loss = F.cross_entropy(scores, labels, label_smoothing=SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def _accuracy(model: nn.Module, digits: _Digits, weights: Mapping[str, Tensor] | None = None) -> float:
    """Return the share of correctly classified test digits, with some of the weights replaced."""
    scores = functional_call(model, dict(weights or {}), (digits.test,))
    return (scores.argmax(1) == digits.test_labels).double().mean().item()


def _curvature(model: nn.Module, digits: _Digits, seed: int) -> DataCurvature:
    """Return DiagGGN (exact) and KFAC (one sampled label per digit) of the mean loss over the training digits."""
    curv = api.compile(model, loss=nn.CrossEntropyLoss(), quantities=["kfac", "diag_ggn"])
    batches = zip(digits.train.split(CURVATURE_BATCH), digits.train_labels.split(CURVATURE_BATCH), strict=True)
    result = curv.accumulate(batches, generator=torch.Generator().manual_seed(seed), progress=False)
    diagonal, kfac = result["diag_ggn"], result["kfac"]
    return DataCurvature(
        diagonal=dict(diagonal),
        factors={name: (block.A, block.G) for name, block in kfac.items() if isinstance(block, Kronecker)},
        dense={name: block.dense() for name, block in kfac.items() if not isinstance(block, Kronecker)},
        status={name: (diagonal.status[name], kfac.status[name]) for name in diagonal},
    )


def _rows(model: nn.Module, curvature: DataCurvature) -> tuple[Row, ...]:
    return tuple(
        Row(
            name=name,
            shape=tuple(parameter.shape),
            diag_ggn_trace=curvature.diagonal[name].sum().item(),
            kfac_trace=curvature.kfac_trace(name),
            diag_ggn_status=curvature.status[name][0],
            kfac_status=curvature.status[name][1],
        )
        for name, parameter in model.named_parameters()
    )


# The check against autograd ------------------------------------------------------------------------------------------


def _checked(model: nn.Module, digits: _Digits, seed: int) -> tuple[CheckedEntry, ...]:
    """Compare random entries of the diagonal in float64 between fxcurv and autograd; raise if they disagree."""
    exact = copy.deepcopy(model).double()
    x, y = digits.train[:CHECKED_SAMPLES].double(), digits.train_labels[:CHECKED_SAMPLES]
    curv = api.compile(exact, loss=nn.CrossEntropyLoss(reduction="sum"), quantities=["diag_ggn"])
    diagonals = curv(x, y)["diag_ggn"]
    generator = torch.Generator().manual_seed(seed)
    parameters = list(exact.named_parameters())
    entries: list[CheckedEntry] = []
    for _ in range(CHECKED_ENTRIES):
        name, parameter = parameters[int(torch.randint(len(parameters), (), generator=generator))]
        index = tuple(int(torch.randint(n, (), generator=generator)) for n in parameter.shape)
        expected = _diagonal_entry(exact, x, name, index)
        entries.append(CheckedEntry(name, index, diagonals[name][index].item(), expected))
    worst = max(entries, key=lambda entry: entry.error)
    if worst.error > ERROR_ALLOWED:
        found = f"diag_ggn{list(worst.index)} is {worst.computed!r}, autograd gives {worst.expected!r}"
        raise DemoError(found, node=worst.name, remedy="this is a defect of fxcurv; please report it", code="FXC903")
    return tuple(entries)


def _diagonal_entry(model: nn.Module, x: Tensor, name: str, index: tuple[int, ...]) -> float:
    """Σ_n jᵀ(diag(p) − ppᵀ)j, j[n,c] = ∂f[n,c]/∂θ[index]: a column of the per-sample Jacobians, by forward mode."""
    parameter = model.get_parameter(name).detach()
    direction = torch.zeros_like(parameter)
    direction[index] = 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", FutureWarning)
        columns: Any = torch.func.jvp(lambda w: functional_call(model, {name: w}, (x,)), (parameter,), (direction,))
    f, j = columns
    p = f.softmax(1)
    # jᵀ(diag(p) − ppᵀ)j is the variance of j under p; this formula avoids cancellation
    return (p * (j - (p * j).sum(1, keepdim=True)).square()).sum().item()


# Pruning -------------------------------------------------------------------------------------------------------------


def _pruned(model: nn.Module, digits: _Digits, diagonal: Mapping[str, Tensor], seed: int) -> Pruning:
    """Return accuracies after pruning by lowest score: the saliency ½·diag·w² (LeCun et al. 1990), |w|, or noise."""
    weights = _weights(model)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        ONCE: [_saliency(weights, diagonal)],
        MAGNITUDE: [{name: w.abs() for name, w in weights.items()}],
        RANDOM: [_noise(weights, generator) for _ in range(RANDOM_DRAWS)],
    }

    def accuracy(method: str, sparsity: float) -> float:
        found = [masks(score, sparsity) for score in scores[method]]
        saved = [{name: w * mask[name] for name, w in weights.items()} for mask in found]
        return sum(_accuracy(model, digits, replaced) for replaced in saved) / len(saved)

    saved = {method: tuple(accuracy(method, s) for s in SPARSITIES) for method in scores}
    recomputed = _pruned_in_steps(model, digits, diagonal)
    return Pruning(sum(w.numel() for w in weights.values()), SPARSITIES, {RECOMPUTED: recomputed, **saved})


def _pruned_in_steps(model: nn.Module, digits: _Digits, diagonal: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Prune by the saliency of the remaining weights, recomputed at every step with one compiled model."""
    from tqdm import tqdm

    sparse = copy.deepcopy(model)
    weights, accuracies = _weights(sparse), [_accuracy(sparse, digits)]
    curv = api.compile(sparse, loss=nn.CrossEntropyLoss(reduction="sum"), quantities=["diag_ggn"])
    x, y = digits.train[:PRUNING_DIGITS], digits.train_labels[:PRUNING_DIGITS]
    for sparsity in tqdm(SPARSITIES[1:], desc="pruning", file=sys.stderr, disable=None, leave=False):
        # a pruned weight has the lowest saliency, 0, and remains pruned
        mask = masks(_saliency(weights, diagonal), sparsity)
        for name, w in weights.items():
            w.mul_(mask[name])
        accuracies.append(_accuracy(sparse, digits))
        diagonal = curv(x, y)["diag_ggn"]
    return tuple(accuracies)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of convolutions and linear layers, detached views of the parameters."""
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}


def _saliency(weights: Mapping[str, Tensor], diagonal: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """½·diag·w²: increase of the loss when w becomes 0, to second order and without cross terms."""
    return {name: diagonal[name] * w.square() / 2 for name, w in weights.items()}


def _noise(weights: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.rand(w.shape, generator=generator) for name, w in weights.items()}
