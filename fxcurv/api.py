"""compile() and the compiled object: what a user calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

import passes
from fxcurv.core.errors import CaptureError, FxcurvError, InputError, QuantityError, UnsupportedError, a_value
from fxcurv.core.generators import fresh_generator
from fxcurv.core.torch_compat import pytree
from fxcurv.dataset.accumulation import Accumulator
from fxcurv.dataset.batches import Split
from fxcurv.dataset.state import Settings
from fxcurv.dataset.two_passes import accumulate
from fxcurv.frontend.cache import cached, request_key, signature
from fxcurv.frontend.inputs import Inputs, Output, as_call, batch_size, device_of
from fxcurv.inspect.picture import Format, picture
from fxcurv.inspect.tables import family_of, tabular
from fxcurv.losses.base import Loss, as_loss
from fxcurv.quantities.ekfac import Bases
from fxcurv.quantities.plan import Plan
from fxcurv.quantities.selection import Asked, Selection, chosen
from fxcurv.results.curvature import Curvature
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.explain import Explanation, explained
from fxcurv.runtime.inductor import Backend, built
from fxcurv.runtime.memory import Chunks, bytes_of, cut
from fxcurv.runtime.options import OnUnsupported, Options
from fxcurv.runtime.program import Program
from fxcurv.runtime.run import Minibatch, default_columns, run

__all__ = ["Compiled", "OnUnsupported", "Options", "compile", "trace"]


def compile(
    model: nn.Module,
    loss: object = "cross_entropy",
    quantities: Asked = ("kfac",),
    *,
    example_inputs: Inputs | None = None,
    output: Output = None,
    on_unsupported: OnUnsupported = "error",
    backend: Backend = "eager",
    memory_budget: int | str | None = None,
    algorithms: Mapping[str, str] | None = None,
) -> Compiled:
    """Compile a model for `quantities` of its trainable parameters: `result = compiled(inputs, target)`.

    The model is traced at the first call (or now, on `example_inputs`) and never changed; its parameters stay its own,
    so that later calls see later values. One compile serves every batch size.

    - `loss`: nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss with reduction "mean" or "sum", or their names.
    - `quantities`: names from `fxcurv.NAMES` or objects such as `fxcurv.KFAC(fxcurv.Exact(), approx="reduce")`, of all
      parameters; or by pattern, `{"*": "kfac", "*.bias": ["kfac", "diag_ggn"], nn.LayerNorm: None}`: a pattern is for
      parameter names as in a shell or a module type, the last one that matches counts, and None asks for nothing.
    - `output`: which of the tensors that the model returns to take, where there are several: an index, a name, or a
      function of what it returns.
    - `on_unsupported`: what becomes of parameters whose curvature the compiler refuses. "error" raises the refusal;
      "skip" leaves those parameters out, with the status `unsupported` and the reason; "fallback" computes them by
      plain autograd, one column of one sample at a time, with the status `fallback`, be it the whole model.
    - `backend`: "eager" runs the graphs as they stand; "inductor" compiles them by `torch.compile` when they are first
      called, which takes a minute or more, and equals "eager" to rounding.
    - `memory_budget`: how far a call may raise memory, its results included, as "2GiB" or in bytes; columns, and if
      need be samples, are then processed in chunks that a forecast says will fit, with the same results. What plain
      autograd computes is not bound by it.
    - `algorithms`: the algorithm of a sum where it shall not be the one with the lowest estimated time, by module
      path, parameter or statistic, each a pattern as in a shell: `{"conv1": "unfold", "kfac.*.weight.A":
      "lag_correlation", "*": "DiagonalByPairs"}`, the last that matches and applies. `explain()` lists them.

    Raises a `FxcurvError` that says node, cause and remedy for whatever it cannot do exactly or under a name.
    """
    options = Options(output, on_unsupported, backend, bytes_of(memory_budget), algorithms or {})
    compiled = Compiled(model, as_loss(loss), chosen(quantities), options)
    if example_inputs is not None:
        compiled.prepare(example_inputs)
    return compiled


def trace(model: nn.Module, example_inputs: Inputs, output: Output = None) -> fx.GraphModule:
    """The tracer alone: the canonical graph, an all-module GraphModule that computes what the model computes."""
    _check_inputs(model, example_inputs)
    return passes.canonicalize(model, example_inputs, output)["canonical"]


class Compiled:
    """A model compiled for curvature; call it with a batch."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        selection: Selection,
        options: Options | None = None,
        bases: Bases | None = None,
    ) -> None:
        _check_model(model)
        if not any(p.requires_grad for p in model.parameters()):
            raise QuantityError(
                "the model has no trainable parameters", remedy="set requires_grad_(True) on some", code="FXC408"
            )
        self.model, self.loss, self.selection, self.options = model, loss, selection, options or Options()
        self.bases = bases
        selection.of(model)
        self._chunks: WeakKeyDictionary[Program, dict[int, Chunks]] = WeakKeyDictionary()
        self._latest: Program | None = None
        self._like: Inputs = ()

    def __call__(
        self, inputs: Inputs, target: Tensor, generator: torch.Generator | None = None, progress: bool = False
    ) -> Curvature:
        """The curvature at a batch.

        Sampled factors are reproducible with a `generator`, on the output's device; `progress` shows a bar over the
        columns on a terminal, where they are many.
        """
        _check_generator(generator)
        batch = Minibatch(inputs, target, generator, progress, self.bases)
        try:
            program = self.prepare(inputs)
        except (CaptureError, UnsupportedError) as refusal:
            if self.options.on_unsupported != "fallback":
                raise
            names = [name for name, p in self.model.named_parameters() if p.requires_grad]
            return self._by_autograd(batch, self.selection).explained(dict.fromkeys(names, refusal))
        refusals, chunks = program.plan.refusals, self._cut(program, inputs)
        if not refusals or self.options.on_unsupported == "skip":
            return run(program, self.model, self.loss, batch, chunks)
        generator = generator or fresh_generator(device_of(inputs))
        twin = replace(batch, generator=generator.clone_state())
        result = run(program, self.model, self.loss, replace(batch, generator=generator), chunks)
        return result.updated(self._by_autograd(twin, self.selection.only(refusals))).explained(refusals)

    def accumulate(
        self,
        loader: Iterable[Any],
        *,
        split: Split | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        max_batches: int | None = None,
        until_rel_error: float | None = None,
        min_batches: int = 8,
        checkpoint: str | Path | None = None,
        every: int = 10,
        progress: bool = True,
        timeout: float = 600.0,
        check_deterministic: bool = True,
    ) -> Curvature:
        """The curvature over all batches of a loader, as if they were one: the divisor of `mean` is that of them all.

        - `loader`: batches `(input, …, target)`, or dicts with the target under one of `fxcurv.accumulation.TARGETS`;
          `split` is a function that makes (inputs, target) of any other. They are moved to the model's device. Memory
          does not grow with their number; the result has no outputs, `[N, 0]`.
        - `generator`: of sampled columns, on the model's device; the same state gives the same bits.
        - `dtype`: float32 or float64, in which results are added; by default that of the results.
        - `max_batches`: stop there. `until_rel_error`: stop when every trace is that sure, by its relative standard
          error over batches (`fxcurv.spread.Spread.rel_error`), after at least `min_batches`.
        - `checkpoint`: a file, written `every` so many batches and when interrupted, from which the same call continues
          to the same bits (fxcurv/checkpoints.py); one of another call is refused (FXC427) and left as it is.
        - `progress`: a bar on stderr, where that is a terminal.
        - With torch.distributed initialised, every process gives its share of the data, the last may be empty, and gets
          the result over all (fxcurv/distributed.py). One that ends or gives no sign for `timeout` seconds ends all
          (FXC428).
        - EKFAC takes two passes over the loader, which is then to be read twice (fxcurv/second_pass.py);
          `check_deterministic` refuses data that change between them (FXC431).
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "loader")}
        return accumulate(self, loader, Settings(**given))

    def accumulator(
        self,
        *,
        split: Split | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        decay: float | None = None,
    ) -> Accumulator:
        """An object to which batches are added one by one, as in an optimizer: `update(batch)`, `result`, `reset()`.

        With `decay` its result is the exponential moving average over batches, else the curvature over all of them.
        """
        return Accumulator(self, Settings(split, generator, dtype), decay)

    def summed(self) -> Compiled:
        """The same for the sum of the loss terms."""
        return Compiled(self.model, self.loss.summed(), self.selection, self.options, self.bases)

    def choosing(self, selection: Selection, bases: Bases | None = None) -> Compiled:
        """The same model, loss and options for other quantities."""
        return Compiled(self.model, self.loss, selection, self.options, bases)

    def chunks(self, inputs: Inputs) -> Chunks:
        """How many samples and columns of a batch are processed at once: within the budget, remembered for its size."""
        return self._cut(self.prepare(inputs), inputs)

    def _cut(self, program: Program, inputs: Inputs) -> Chunks:
        samples = batch_size(inputs)
        columns = default_columns(program, samples)
        if self.options.memory_budget is None:
            return Chunks(samples, dict.fromkeys(program.backwards, columns))
        known = self._chunks.setdefault(program, {})
        if samples not in known:
            known[samples] = cut(program, inputs, self.options.memory_budget, columns)
        return known[samples]

    def _by_autograd(self, batch: Minibatch, selection: Selection) -> Curvature:
        return by_autograd(self.model, self.loss, selection, batch, self.options.output)

    def prepare(self, inputs: Inputs) -> Program:
        """The program for inputs of this kind, compiled if their shape, type or place, or the model, is new.

        Compiled objects of one model that ask for the same share it; see fxcurv/signature.py.
        """
        _check_inputs(self.model, inputs)
        options = self.options
        strict, algorithms = options.on_unsupported == "error", tuple(options.algorithms.items())
        asked = request_key(self.selection, options.output, strict, options.backend, algorithms)
        key = (signature(self.model, inputs), asked)
        self._latest = cached(self.model, key, lambda: self._compiled(inputs))
        self._like = pytree.tree_map_only(Tensor, lambda t: t.new_zeros(()).expand(t.shape), inputs)
        return self._latest

    def _compiled(self, inputs: Inputs) -> Program:
        algorithms, stages = self.options.algorithms, self._canonicalized(inputs)
        program = Program.of(passes.emit(self.model, stages, self.selection, inputs, algorithms))
        passes.check_algorithms(program.graphs, algorithms)
        return built(program, self.options.backend)

    def plan(self, inputs: Inputs) -> tuple[Plan, fx.GraphModule]:
        """What every parameter would get, and the canonical graph that it is read off, without compiling further."""
        _check_inputs(self.model, inputs)
        canonical = self._canonicalized(inputs)["canonical"]
        return passes.plan(self.model, canonical, self.selection), canonical

    def _canonicalized(self, inputs: Inputs) -> dict[str, fx.GraphModule]:
        return passes.canonicalize(
            self.model, inputs, self.options.output, strict=self.options.on_unsupported == "error"
        )

    @property
    def program(self) -> Program:
        """The latest program."""
        if self._latest is None:
            raise FxcurvError(
                "nothing is compiled yet",
                remedy="call it on a batch first, or pass example_inputs= to compile()",
                code="FXC410",
            )
        return self._latest

    @property
    def stages(self) -> Mapping[str, fx.GraphModule]:
        """The latest program's graph of each stage: captured, lowered, canonical, forward, backward[factor].

        `stage:pass`, as `forward:schedule`, is the graph after a pass.
        """
        return self.program.stages

    def explain(self, inputs: Inputs | None = None) -> Explanation:
        """What a call will take, before it runs: `print(compiled.explain(x))`.

        A row per node of the graphs with the form that was chosen for every sum and what the others would take, the
        operations, bytes and milliseconds, the peak of memory, and each quantity's share. Of the inputs, by default
        those last compiled for, only shape, type and device are read.
        """
        program = self.program if inputs is None else self.prepare(inputs)
        inputs = self._like if inputs is None else inputs
        return explained(program, inputs, self.loss, self._cut(program, inputs))

    def picture(self, format: Format = "mermaid", depth: int | None = None) -> str:
        """The model as a flow chart in Mermaid or DOT: modules down to `depth`, coloured by what they get."""
        return picture(self.program, format, depth)

    def print_tabular(self, stage: str | None = None) -> None:
        """Print the graph of a stage (`"backward"`: of all factors), by default the canonical and backward graphs."""
        asked = ("canonical", "backward") if stage is None else (stage,)
        found = [name for name in self.stages if name in asked or family_of(name) in asked]
        if not found:
            raise QuantityError(
                f"no stage is called {stage!r}",
                remedy=f"there are {', '.join(name for name in self.stages if ':' not in name)}",
                code="FXC410",
            )
        for name in found:
            print(f"{name}\n{tabular(self.stages[name])}\n")


# What a call needs ------------------------------------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"the model is {a_value(model)}, not a torch.nn.Module", remedy="give an instance of one", code="FXC110"
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            remedy = "call the model on a batch first"
            raise InputError(f"the parameter {name!r} has no shape yet", remedy=remedy, code="FXC110")


def _check_generator(generator: object) -> None:
    if not isinstance(generator, torch.Generator | None):
        remedy = "give a torch.Generator, such as torch.Generator().manual_seed(0)"
        raise InputError(f"the generator is {a_value(generator)}", remedy=remedy, code="FXC110")


def _check_inputs(model: nn.Module, inputs: Inputs) -> None:
    if not isinstance(inputs, Tensor | tuple | dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"the input is {a_value(inputs)}",
            remedy="give a tensor, a tuple (positional) or a dict (keywords)",
            code="FXC110",
        )
    if batch_size(inputs) == 0:
        raise InputError("the batch holds no samples", remedy="give at least one", code="FXC110")
    parameter = next(model.parameters(), None)
    for t in pytree.tree_leaves(as_call(inputs)):
        if not isinstance(t, Tensor) or parameter is None:
            continue
        if t.layout != torch.strided:
            raise InputError("the input is sparse", remedy="convert it: x.to_dense()", code="FXC110")
        if t.device != parameter.device:
            raise InputError(
                f"the input is on {t.device}, the model on {parameter.device}",
                remedy=f"move it: x.to({str(parameter.device)!r})",
                code="FXC111",
            )
        if not t.is_floating_point():
            continue
        if t.dtype != parameter.dtype:
            raise InputError(
                f"the input is of type {t.dtype}, the model of {parameter.dtype}",
                remedy=f"convert it: x.to({parameter.dtype})",
                code="FXC111",
            )
        if not bool(t.isfinite().all()):
            raise InputError("the input holds NaN or infinity", remedy="clean the data", code="FXC112")
