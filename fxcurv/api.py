"""compile() and the compiled object: what a user calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import passes
from fxcurv.capture import Inputs, Output, as_call, batch_size
from fxcurv.errors import FxcurvError, InputError, QuantityError
from fxcurv.losses import as_loss
from fxcurv.program import Program
from fxcurv.quantities import Quantity, named
from fxcurv.result import Curvature
from fxcurv.run import Batch, run
from fxcurv.show import tabular

__all__ = ["Compiled", "compile", "trace"]


def compile(
    model: nn.Module,
    loss: object = "cross_entropy",
    quantities: str | Quantity | Iterable[str | Quantity] = ("kfac",),
    *,
    example_inputs: Inputs | None = None,
    output: Output = None,
) -> Compiled:
    """Compile a model for `quantities` of every trainable parameter: `result = compiled(inputs, target)`.

    The model is traced at the first call (or now, on `example_inputs`) and never changed; its parameters stay its own,
    so that later calls see later values. One compile serves every batch size.

    - `loss`: nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss with reduction "mean" or "sum", or their names.
    - `quantities`: names from `fxcurv.NAMES` or objects such as `fxcurv.KFAC(fxcurv.Exact(), approx="reduce")`.
    - `output`: which of the tensors that the model returns to take, where there are several: an index, a name, or a
      function of what it returns.

    Raises a `FxcurvError` that says node, cause and remedy for whatever it cannot do exactly or under a name.
    """
    compiled = Compiled(model, as_loss(loss), named(quantities), output)
    if example_inputs is not None:
        compiled.prepare(example_inputs)
    return compiled


def trace(model: nn.Module, example_inputs: Inputs, output: Output = None) -> fx.GraphModule:
    """The tracer alone: the canonical graph, an all-module GraphModule that computes what the model computes."""
    _check_inputs(model, example_inputs)
    return passes.canonicalize(model, example_inputs, output, _place(example_inputs))["canonical"]


class Compiled:
    """A model compiled for curvature; call it with a batch."""

    def __init__(self, model: nn.Module, loss: nn.Module, quantities: Mapping[str, Quantity], output: Output) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise QuantityError("the model has no trainable parameters", remedy="set requires_grad_(True) on some")
        self.model, self.loss, self.quantities, self.output = model, loss, dict(quantities), output
        self._programs: dict[object, Program] = {}
        self._latest: Program | None = None

    def __call__(
        self, inputs: Inputs, target: Tensor, generator: torch.Generator | None = None, progress: bool = False
    ) -> Curvature:
        """The curvature at a batch.

        Sampled factors are reproducible with a `generator`, on the output's device; `progress` shows a bar over the
        columns on a terminal, where they are many.
        """
        return run(self.prepare(inputs), self.model, self.loss, Batch(inputs, target, generator, progress))

    def prepare(self, inputs: Inputs) -> Program:
        """The program for inputs of this kind, compiled if their shape, type or place, or the model, is new."""
        _check_inputs(self.model, inputs)
        key = _signature(self.model, inputs)
        if key not in self._programs:
            stages = passes.canonicalize(self.model, inputs, self.output, _place(inputs))
            self._programs[key] = passes.compile_program(self.model, stages, self.quantities)
        self._latest = self._programs[key]
        return self._latest

    @property
    def stages(self) -> Mapping[str, fx.GraphModule]:
        """The latest program's graph after each stage: captured, lowered, canonical, forward, backward[factor]."""
        if self._latest is None:
            raise FxcurvError(
                "nothing is compiled yet", remedy="call it on a batch first, or pass example_inputs= to compile()"
            )
        return self._latest.stages

    def print_tabular(self, stage: str | None = None) -> None:
        """Print the graph of a stage (`"backward"`: of all factors), by default the canonical and backward graphs."""
        asked = ("canonical", "backward") if stage is None else (stage,)
        found = [name for name in self.stages if name in asked or name.partition("[")[0] in asked]
        if not found:
            raise QuantityError(f"no stage is called {stage!r}", remedy=f"there are {', '.join(self.stages)}")
        for name in found:
            print(f"{name}\n{tabular(self.stages[name])}\n")


# What a call needs ------------------------------------------------------------------------------------------------


def _place(inputs: Inputs) -> torch.device:
    return next((t.device for t in pytree.tree_leaves(as_call(inputs)) if isinstance(t, Tensor)), torch.device("cpu"))


def _signature(model: nn.Module, inputs: Inputs) -> object:
    """What a program depends on: the kind of the inputs and the structure of the model; no values, no batch size."""
    leaves, structure = pytree.tree_flatten(as_call(inputs))
    kinds = tuple((tuple(t.shape[1:]), t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(t): name for name, t in reversed(tensors)}
    held = tuple((name, first[id(t)], t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors)
    modes = tuple((type(m), m.training) for m in model.modules())
    return str(structure), kinds, held, modes


def _check_inputs(model: nn.Module, inputs: Inputs) -> None:
    if not isinstance(inputs, Tensor | tuple | dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"the input is a {type(inputs).__name__}", remedy="give a tensor, a tuple (positional) or a dict (keywords)"
        )
    if batch_size(inputs) == 0:
        raise InputError("the batch holds no samples", remedy="give at least one")
    parameter = next(model.parameters(), None)
    for t in pytree.tree_leaves(as_call(inputs)):
        if not isinstance(t, Tensor) or parameter is None:
            continue
        if t.device != parameter.device:
            raise InputError(
                f"the input is on {t.device}, the model on {parameter.device}",
                remedy=f"move it: x.to({str(parameter.device)!r})",
            )
        if not t.is_floating_point():
            continue
        if t.dtype != parameter.dtype:
            raise InputError(
                f"the input is of type {t.dtype}, the model of {parameter.dtype}",
                remedy=f"convert it: x.to({parameter.dtype})",
            )
        if not bool(t.isfinite().all()):
            raise InputError("the input holds NaN or infinity", remedy="clean the data")
