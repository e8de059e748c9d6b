"""compile() and the compiled object: what a user calls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import passes
from fxcurv.blocks import Block
from fxcurv.capture import Inputs, Output, as_call, batch_size
from fxcurv.errors import FxcurvError, InputError, QuantityError
from fxcurv.losses import LossTerms, as_loss, loss_terms
from fxcurv.quantities import Factor, Quantity, named
from fxcurv.result import Curvature, Entries, Entry
from fxcurv.show import tabular
from fxcurv.spec import module_of, resolve

__all__ = ["Compiled", "compile", "trace"]

COLUMN_BYTES = 1 << 29
"""How much memory one chunk of columns may take at the widest place of the backward graph."""


def compile(
    model: nn.Module,
    loss: object = "cross_entropy",
    quantities: str | Quantity | Iterable[str | Quantity] = ("kfac",),
    *,
    example_inputs: Inputs | None = None,
    output: Output = None,
) -> Compiled:
    """An object that computes `quantities` of every trainable parameter of `model`: `result = compiled(inputs, target)`.

    The model is traced at the first call (or now, on `example_inputs`) and never changed; its parameters stay its own, so
    that later calls see later values. One compile serves every batch size.

    - `loss`: nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss with reduction "mean" or "sum", or their names.
    - `quantities`: names from `fxcurv.NAMES` or objects such as `fxcurv.KFAC(fxcurv.Exact(), approx="reduce")`.
    - `output`: which tensor of what the model returns to take, where it is not one tensor: an index, a name, a function.

    Raises a `FxcurvError` that says node, cause and remedy for whatever it cannot do exactly or under a name.
    """
    compiled = Compiled(model, as_loss(loss), named(quantities), output)
    if example_inputs is not None:
        compiled.prepare(example_inputs)
    return compiled


def trace(model: nn.Module, example_inputs: Inputs, output: Output = None) -> fx.GraphModule:
    """The tracer alone: the canonical graph, an all-module GraphModule that computes what the model computes."""
    _check_inputs(model, example_inputs)
    gm = passes.canonicalize(model, example_inputs, output, _place(model, example_inputs))["canonical"]
    gm.train(model.training)
    return gm


class Compiled:
    """A model compiled for curvature; call it with a batch."""

    def __init__(self, model: nn.Module, loss: nn.Module, quantities: Mapping[str, Quantity], output: Output) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise QuantityError("the model has no trainable parameters", remedy="set requires_grad_(True) on some")
        self.model, self.loss, self.quantities, self.output = model, loss, dict(quantities), output
        self._programs: dict[object, passes.Program] = {}
        self._latest: passes.Program | None = None

    # Running

    def __call__(self, inputs: Inputs, target: Tensor, generator: torch.Generator | None = None) -> Curvature:
        """The curvature at a batch; `generator` makes sampled factors reproducible (else they are seeded from entropy)."""
        program = self.prepare(inputs)
        with torch.no_grad(), _without_autocast():
            bind(program.stages["canonical"], self.model)
            args, kwargs = as_call(inputs)
            output, kept, sums = program.forward(*pytree.tree_leaves((args, kwargs)))
            _check_output(output)
            terms = loss_terms(self.loss, output, target)
            generator = generator or _fresh_generator(output.device)
            for factor, backward in program.backwards.items():
                sums |= self._pull_back(program, backward, kept, terms, factor, generator)
            return self._assembled(program, sums, terms.value, output)

    def _pull_back(
        self,
        program: passes.Program,
        backward: fx.GraphModule,
        kept: Mapping[str, Any],
        terms: LossTerms,
        factor: Factor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The sums of one factor, over chunks of its columns."""
        names = [node.target for node in backward.graph.find_nodes(op="placeholder")][1:]
        needed = {name: kept[name] for name in map(str, names)}
        dtype = kept_dtype(program)
        sums: dict[str, Tensor] = {}
        for S in terms.columns(factor, _chunk(program, len(terms.gradient), terms.gradient.element_size()), generator):
            for key, part in backward(S.to(dtype), **needed).items():
                sums[key] = sums[key] + part if key in sums else part
        return sums

    def _assembled(
        self, program: passes.Program, sums: Mapping[str, Tensor], loss: Tensor, output: Tensor
    ) -> Curvature:
        """Sums -> values, by quantity and parameter."""
        reduction, samples = str(self.loss.reduction), len(output)
        values: dict[tuple[str, str], Tensor | Block] = {}
        for job in program.jobs:
            value = job.quantity.finish(
                job.used, {statistic: sums[key] for statistic, key in job.sums.items()}, samples
            )
            if isinstance(value, Block):
                value = dataclasses.replace(value, parameters=job.parameters, status=job.status, reduction=reduction)
            values |= {(job.name, parameter): value for parameter in job.parameters}
        quantities = {
            name: Entries(
                [
                    Entry(
                        name,
                        p,
                        tuple(self.model.get_parameter(p).shape),
                        status,
                        str(quantity.factor),
                        reduction,
                        values.get((name, p)),
                    )
                    for p, status in self._statuses(program, name).items()
                ]
            )
            for name, quantity in self.quantities.items()
        }
        return Curvature(quantities, loss, output, samples, reduction)

    def _statuses(self, program: passes.Program, quantity: str) -> dict[str, str]:
        found = {parameter: job.status for job in program.jobs if job.name == quantity for parameter in job.parameters}
        parameters = self.model.named_parameters()
        return {name: found.get(name, "unreached" if p.requires_grad else "frozen") for name, p in parameters}

    def statuses(self, inputs: Inputs) -> dict[str, dict[str, str]]:
        """What each quantity will say of each parameter for inputs like these: quantity -> parameter -> status; nothing is run."""
        program = self.prepare(inputs)
        return {quantity: self._statuses(program, quantity) for quantity in self.quantities}

    # Compiling

    def prepare(self, inputs: Inputs) -> passes.Program:
        """The program for inputs of this kind: compiled when they are of a new shape, type or place, or the model's structure is new."""
        _check_inputs(self.model, inputs)
        key = _signature(self.model, inputs)
        if key not in self._programs:
            stages = passes.canonicalize(self.model, inputs, self.output, _place(self.model, inputs))
            wanted = [name for name, p in self.model.named_parameters() if p.requires_grad]
            self._programs[key] = passes.compile_program(stages, self.quantities, wanted)
        self._latest = self._programs[key]
        return self._latest

    @property
    def stages(self) -> Mapping[str, fx.GraphModule]:
        """The graph after each stage of the latest compilation: captured, lowered, canonical, forward, backward[factor]."""
        if self._latest is None:
            raise FxcurvError(
                "nothing is compiled yet", remedy="call it on a batch first, or pass example_inputs= to compile()"
            )
        return self._latest.stages

    def print_tabular(self, stage: str | None = None) -> None:
        """Print the graph of a stage (`"backward"` for those of all factors), by default the canonical and the backward graphs."""
        asked = ("canonical", "backward") if stage is None else (stage,)
        found = [name for name in self.stages if name in asked or name.partition("[")[0] in asked]
        if not found:
            raise QuantityError(f"no stage is called {stage!r}", remedy=f"there are {', '.join(self.stages)}")
        for name in found:
            print(f"{name}\n{tabular(self.stages[name])}\n")


# What a call needs ------------------------------------------------------------------------------------------------


def bind(canonical: fx.GraphModule, model: nn.Module) -> None:
    """Point every slot at the model's tensors as they are now."""
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for node in canonical.graph.nodes:
        for slot, source in node.meta.get("slots", {}).items():
            if all(name in tensors for name in source.names):
                value = source(tensors.__getitem__)
                op = module_of(node)
                held = slot in op._parameters and not isinstance(value, nn.Parameter)  # pyright: ignore[reportPrivateUsage]
                setattr(op, slot, nn.Parameter(value, requires_grad=False) if held else value)


def kept_dtype(program: passes.Program) -> torch.dtype:
    """The type in which S starts: that of the model's output."""
    (output,) = program.stages["canonical"].graph.output_node().all_input_nodes
    return output.meta["dtype"]


def _chunk(program: passes.Program, samples: int, itemsize: int) -> int:
    """How many columns to pull back at once, so that the widest node's columns stay within `COLUMN_BYTES`."""
    widest = max(
        math.prod(resolve(n.meta["shape"], samples))
        for n in program.stages["canonical"].graph.nodes
        if "shape" in n.meta
    )
    return max(1, COLUMN_BYTES // (widest * itemsize))


def _fresh_generator(device: torch.device) -> torch.Generator:
    """A generator of its own, so that the caller's global one is left alone."""
    generator = torch.Generator(device)
    generator.seed()
    return generator


def _without_autocast() -> torch.autocast:
    return torch.autocast("cuda" if torch.is_autocast_enabled("cuda") else "cpu", enabled=False)


def _place(model: nn.Module, inputs: Inputs) -> torch.device:
    return next((t.device for t in pytree.tree_leaves(as_call(inputs)) if isinstance(t, Tensor)), torch.device("cpu"))


def _signature(model: nn.Module, inputs: Inputs) -> object:
    """What a program depends on: the kind of the inputs and the structure of the model, but no values and no batch size."""
    leaves, structure = pytree.tree_flatten(as_call(inputs))
    kinds = tuple((tuple(t.shape[1:]), t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(t): name for name, t in reversed(tensors)}
    held = tuple((name, first[id(t)], t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors)
    modes = tuple((type(m), m.training) for m in model.modules())
    return str(structure), kinds, held, modes


def _check_inputs(model: nn.Module, inputs: Inputs) -> None:
    if not isinstance(inputs, Tensor | tuple | dict):
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
            raise InputError(f"the input is of type {t.dtype}", remedy="convert it: x.float()")
        if t.dtype != parameter.dtype:
            raise InputError(
                f"the input is of type {t.dtype}, the model of {parameter.dtype}",
                remedy=f"convert it: x.to({parameter.dtype})",
            )
        if not bool(t.isfinite().all()):
            raise InputError("the input holds NaN or infinity", remedy="clean the data")


def _check_output(output: Tensor) -> None:
    if not bool(output.isfinite().all()):
        raise InputError(
            "the model's output holds NaN or infinity",
            node="output",
            remedy="check its parameters and the scale of the input",
        )
