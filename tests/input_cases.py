"""Cases of inputs, and the check that a model on them equals the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import reference
import samples
import torch
from comparison import TOLERANCE, assert_close
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxcurv
from fxcurv.frontend.inputs import Inputs, Output

__all__ = ["Case", "Packed", "check"]


class Packed(nn.Module):
    """The model as a function of one float matrix [n, entries] that holds all its inputs: what the oracle takes."""

    def __init__(self, model: nn.Module, inputs: Inputs, choose: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner, self.choose = model, choose
        call = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
        self.leaves, self.structure = pytree.tree_flatten(call)

    def packed(self) -> Tensor:
        return torch.cat([t.reshape(len(t), -1).double() for t in self.leaves if isinstance(t, Tensor)], 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = iter(x.split([t[0].numel() for t in self.leaves if isinstance(t, Tensor)], 1))
        leaves = [
            next(parts).reshape(len(x), *t.shape[1:]).to(t.dtype) if isinstance(t, Tensor) else t for t in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return self.choose(self.inner(*args, **kwargs))


@dataclass(frozen=True)
class Case:
    """A model, its inputs, targets and loss, and which output is taken: as fxcurv is told, and by a function."""

    build: Callable[[], nn.Module]
    inputs: Inputs
    target: Tensor
    output: Output = None
    choose: Callable[[Any], Tensor] = lambda returned: returned
    loss: nn.Module = nn.CrossEntropyLoss()  # noqa: RUF009
    tolerance: float = TOLERANCE


def check(case: Case) -> fxcurv.Curvature:
    """Gradient, diagonal and dense blocks of every parameter equal the oracle's, and so do Kronecker factors."""
    model = samples.seeded(case.build, "inputs")
    result = fxcurv.compile(model, case.loss, ["grad", "diag_ggn", "kflr"], output=case.output)(
        case.inputs, case.target
    )
    packed = Packed(model, case.inputs, case.choose).eval()
    x = packed.packed()
    assert_close(result.output, reference.outputs(packed, x), "output", case.tolerance)
    columns = reference.exact_columns(case.loss, reference.outputs(packed, x), case.target)
    gradient, diagonal = (f(packed, case.loss, x, case.target) for f in (reference.grad, reference.diag_ggn))
    factors, swapped = reference.kfac(packed, x, columns), reference.in_out(packed, x)
    for name, _ in model.named_parameters():
        assert_close(result["grad"][name], gradient[f"inner.{name}"], f"gradient {name}", case.tolerance)
        assert_close(result["diag_ggn"][name], diagonal[f"inner.{name}"], f"diagonal {name}", case.tolerance)
        block = result["kflr"][name]
        if isinstance(block, fxcurv.Dense):
            matrix = reference.dense_block(packed, x, columns, f"inner.{name}")
            assert_close(block.matrix, matrix, f"block {name}", case.tolerance)
        else:
            A, G = factors[f"inner.{name}"]
            assert_close(block.A, A, f"A of {name}", case.tolerance)
            assert_close(block.G, G, f"G of {name}", case.tolerance)
            assert block.in_out == (f"inner.{name}" in swapped)
    return result
