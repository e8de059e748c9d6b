"""The public entry points: compile() and the compiled object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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
from fxcurv.frontend.cache import Programs, request_key, signature
from fxcurv.frontend.capture import TRACED_BATCH, Tracing
from fxcurv.frontend.inputs import Inputs, Output, as_call, batch_size, device_of
from fxcurv.frontend.isolation import TRACING
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
from fxcurv.runtime.options import OnUnsupported, Options, Verify
from fxcurv.runtime.program import Program
from fxcurv.runtime.run import Minibatch, default_columns, run
from fxcurv.verification.diagnosis import refusal_of
from fxcurv.verification.guard import Disagreement, Guard
from passes.pipeline import Emitted

__all__ = ["Compiled", "OnUnsupported", "Options", "Verify", "compile", "trace"]


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
    verify: Verify = "first",
) -> Compiled:
    """Compile a model for `quantities` of its trainable parameters: `result = compiled(inputs, target)`.

    The model is traced at the first call, or immediately on `example_inputs`, and never modified. Its parameters are
    shared, so that later calls use their current values. One compilation serves every batch size.

    - `loss`: nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss with reduction "mean" or "sum", or their names.
    - `quantities`: names from `fxcurv.NAMES` or objects such as `fxcurv.KFAC(fxcurv.Exact(), approx="reduce")`, for all
      parameters; or by pattern, `{"*": "kfac", "*.bias": ["kfac", "diag_ggn"], nn.LayerNorm: None}`. A pattern is a
      shell-style pattern of parameter names or a module type. The last match applies; None selects no quantity.
    - `output`: the tensor to differentiate, if the model returns several: an index, a name, or a function of the
      return value.
    - `on_unsupported`: treatment of parameters whose curvature the compiler refuses. "error" raises the refusal; "skip"
      omits those parameters, with the status `unsupported` and the reason; "fallback" computes them by plain autograd,
      one column of one sample at a time, with the status `fallback`, for the whole model if necessary.
    - `backend`: "eager" runs the graphs unchanged; "inductor" compiles them by `torch.compile` at their first call,
      which takes a minute or more, and equals "eager" to rounding.
    - `memory_budget`: limit on the increase of memory by a call, including its results, as "2GiB" or in bytes. Columns,
      and samples if necessary, are processed in chunks estimated to fit, with the same results. Plain autograd ignores
      the limit.
    - `algorithms`: the algorithm of a sum, instead of the one with the lowest estimated time, by module path, parameter
      or statistic, each a shell-style pattern: `{"conv1": "unfold", "kfac.*.weight.A": "lag_correlation"}`. The last
      match that applies is used. `explain()` lists the alternatives.
    - `verify`: when the graph is compared with the model itself. "first": output, gradients and independence of the
      samples when a program is first used, output and samples at each new batch size. "always": the output at every
      call, too. "never": not at all. A difference is refused (FXC107), with parameters and likely cause.

    Raises a `FxcurvError` with node, cause and remedy for any operation without an exact or named treatment.
    """
    options = Options(
        output, on_unsupported, backend, bytes_of(memory_budget), {} if algorithms is None else algorithms, verify
    )
    compiled = Compiled(model, as_loss(loss), chosen(quantities), options)
    if example_inputs is not None:
        compiled.prepare(example_inputs)
    return compiled


def trace(model: nn.Module, example_inputs: Inputs, output: Output = None) -> fx.GraphModule:
    """Return the canonical graph: an all-module GraphModule that computes the same function as the model."""
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
        self.bases, self.programs = bases, Programs()
        selection.of(model)
        self._chunks: WeakKeyDictionary[Program, dict[int, Chunks]] = WeakKeyDictionary()
        self._latest: Program | None = None
        self._like: Inputs = ()

    def __call__(
        self, inputs: Inputs, target: Tensor, generator: torch.Generator | None = None, progress: bool = False
    ) -> Curvature:
        """Return the curvature at a batch.

        Sampled factors are reproducible with a `generator`, on the output's device; `progress` shows a bar over the
        columns on a terminal, if there are many.
        """
        _check_generator(generator)
        batch = Minibatch(inputs, target, generator, progress, self.bases)
        try:
            program = self.verified(inputs)
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

    def verified(self, inputs: Inputs) -> Program:
        """Return the program for such inputs, compared with the model as `verify` says.

        A program that differs is traced anew, through the model itself. Raises an UnsupportedError (FXC107, FXC401) if
        it still differs.
        """
        return self._agreeing(inputs, lambda: self.prepare(inputs), lambda: self._traced_anew(inputs))

    def _agreeing(self, inputs: Inputs, *candidates: Callable[[], Program]) -> Program:
        """Return the first program that agrees with the model; raise the difference of the last."""
        *earlier, last = candidates
        for candidate in earlier:
            with suppress(Disagreement):
                return self._compared(candidate(), inputs)
        program = last()
        try:
            return self._compared(program, inputs)
        except Disagreement as found:
            raise refusal_of(found, program, self.model, self.options.output) from None

    def _compared(self, program: Program, inputs: Inputs) -> Program:
        """Compare a program with the model, where this is due."""
        known = program.verified.gradients and batch_size(inputs) in program.verified.sizes
        if self.options.verify == "never" or (known and self.options.verify == "first"):
            return program
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        guard = Guard(program, self.model, self.options.output, names, self.options.memory_budget)
        part = self._cut(program, inputs).samples
        try:
            guard.check(inputs, part)
            if known:
                guard.compare_output(inputs, part)
        except (Disagreement, FxcurvError):
            program.verified.forget()
            raise
        return program

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
        """Return the curvature over all batches of a loader, as if they were one batch; `mean` has their total divisor.

        - `loader`: batches `(input, …, target)`, or dicts with the target under a key of
          `fxcurv.dataset.batches.TARGETS`; `split` is a function from any other batch to (inputs, target). Batches are
          moved to the model's device. Memory does not grow with their number; the result has no outputs, `[N, 0]`.
        - `generator`: for sampled columns, on the model's device; the same state gives the same bits.
        - `dtype`: float32 or float64, in which results are summed; by default the dtype of the results.
        - `max_batches`: maximum number of batches. `until_rel_error`: stop when the relative standard error over
          batches of every trace is at most this (`StandardError.rel_error`), after at least `min_batches`.
        - `checkpoint`: a file, written after `every` batches and when interrupted; the same call resumes from it to the
          same bits (fxcurv/dataset/checkpoints.py). A checkpoint of another call is refused (FXC427) and not modified.
        - `progress`: a bar on stderr, if that is a terminal.
        - With torch.distributed initialised, every process passes its share of the data, which may be empty for the
          last, and gets the result over all (fxcurv/dataset/processes.py). A process that ends or does not respond for
          `timeout` seconds ends all (FXC428).
        - EKFAC takes two passes, and reads the loader twice (fxcurv/dataset/two_passes.py); `check_deterministic`
          refuses data that change between them (FXC431).
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
        """Return an accumulator of single batches, as for an optimizer: `update(batch)`, `result`, `reset()`.

        With `decay` its result is the exponential moving average over batches, otherwise the curvature over all.
        """
        return Accumulator(self, Settings(split, generator, dtype), decay)

    def summed(self) -> Compiled:
        """Return the same compiled model for the sum of the loss terms."""
        return self._derived(self.loss.summed(), self.selection, self.bases)

    def choosing(self, selection: Selection, bases: Bases | None = None) -> Compiled:
        """Return the same model, loss and options for other quantities."""
        return self._derived(self.loss, selection, bases)

    def _derived(self, loss: Loss, selection: Selection, bases: Bases | None) -> Compiled:
        """Return a compiled object of the same model and options, which shares the programs."""
        derived = Compiled(self.model, loss, selection, self.options, bases)
        derived.programs = self.programs
        return derived

    def chunks(self, inputs: Inputs) -> Chunks:
        """Return the samples and columns of a batch to process at once, within the budget; cached by batch size."""
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
        """Return the program for such inputs, compiled if their shape, dtype or device, or the model, is new.

        Compiled objects that are derived from each other share it; `compile` always traces the model anew. See
        fxcurv/frontend/cache.py.
        """
        _check_inputs(self.model, inputs)
        samples, branches = batch_size(inputs), self._branches(inputs)
        with TRACING:
            found = next((program for program in branches if program.admits(samples)), None)
            if found is None:
                found = self._compiled(inputs, Tracing())
                if not found.admits(samples):
                    found = self._compiled(inputs, Tracing(samples))
                branches.append(found)
        self._latest = found
        self._like = pytree.tree_map_only(Tensor, lambda t: t.new_zeros(()).expand(t.shape), inputs)
        return self._latest

    def _branches(self, inputs: Inputs) -> list[Program]:
        """Return the programs for such inputs, one per branch that the model takes for some batch sizes."""
        options = self.options
        strict, algorithms = options.on_unsupported == "error", tuple(options.algorithms.items())
        asked = request_key(self.selection, options.output, strict, options.backend, algorithms)
        return self.programs.of(self.model, (signature(self.model, inputs, options.output), asked), list)

    def _traced_anew(self, inputs: Inputs) -> Program:
        """Replace the program for such inputs by one traced through the model itself."""
        samples, branches = batch_size(inputs), self._branches(inputs)
        with TRACING:
            branches[:] = [program for program in branches if not program.admits(samples)]
            found = self._compiled(inputs, Tracing(max(samples, TRACED_BATCH), through_copy=False))
            branches.append(found)
        self._latest = found
        return found

    def _compiled(self, inputs: Inputs, tracing: Tracing) -> Program:
        algorithms, stages = self.options.algorithms, self._canonicalized(inputs, tracing)
        program = Program.of(passes.emit(self.model, stages, self.selection, inputs, algorithms))
        if self.options.on_unsupported == "error" and (refusals := program.plan.refusals):
            raise next(iter(refusals.values()))
        if self.bases is None:  # the second pass of EKFAC has other statistics than the first, which is checked
            passes.check_algorithms(program.graphs, algorithms)
        return built(program, self.options.backend)

    def plan(self, inputs: Inputs) -> tuple[Plan, fx.GraphModule]:
        """Return the plan for every parameter, and the canonical graph it is read from, without further compilation.

        The graph is compared with the model as `verify` says.
        """
        _check_inputs(self.model, inputs)

        def traced(tracing: Tracing) -> Program:
            stages = self._canonicalized(inputs, tracing)
            planned = passes.plan(self.model, stages["canonical"], self.selection)
            return Program.of(Emitted({**stages, "forward": stages["canonical"]}, (), planned))

        anew = Tracing(max(batch_size(inputs), TRACED_BATCH), through_copy=False)
        program = self._agreeing(inputs, lambda: traced(Tracing()), lambda: traced(anew))
        return program.plan, program.canonical

    def _canonicalized(self, inputs: Inputs, tracing: Tracing | None = None) -> dict[str, fx.GraphModule]:
        strict = self.options.on_unsupported == "error"
        return passes.canonicalize(self.model, inputs, self.options.output, strict=strict, tracing=tracing)

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
        """Estimate the cost of a call before it runs: `print(compiled.explain(x))`.

        A row per node of the graphs, with the algorithm selected for every sum and the costs of the others, operations,
        bytes and milliseconds, peak memory, and each quantity's share. Only the shape, dtype and device of the inputs
        are read; by default, of the latest inputs.
        """
        program = self.program if inputs is None else self.prepare(inputs)
        inputs = self._like if inputs is None else inputs
        compared = self.options.verify != "never"
        return explained(program, inputs, self.loss, self._cut(program, inputs), compared)

    def picture(self, format: Format = "mermaid", depth: int | None = None) -> str:
        """Return the model as a flow chart in Mermaid or DOT: modules down to `depth`, coloured by treatment."""
        return picture(self.program, format, depth)

    def print_tabular(self, stage: str | None = None) -> None:
        """Print the graph of a stage (`"backward"`: of all factors), by default the canonical and backward graphs."""
        asked = ("canonical", "backward") if stage is None else (stage,)
        found = [name for name in self.stages if name in asked or family_of(name) in asked]
        if not found:
            raise QuantityError(
                f"no stage is called {stage!r}",
                remedy=f"the stages are {', '.join(name for name in self.stages if ':' not in name)}",
                code="FXC410",
            )
        for name in found:
            print(f"{name}\n{tabular(self.stages[name])}\n")


# Checks of arguments ----------------------------------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"the model is {a_value(model)}, not a torch.nn.Module", remedy="pass an instance of one", code="FXC110"
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            remedy = "call the model on a batch first"
            raise InputError(f"the parameter {name!r} has no shape yet", remedy=remedy, code="FXC110")


def _check_generator(generator: object) -> None:
    if not isinstance(generator, torch.Generator | None):
        remedy = "pass a torch.Generator, such as torch.Generator().manual_seed(0)"
        raise InputError(f"the generator is {a_value(generator)}", remedy=remedy, code="FXC110")


def _check_inputs(model: nn.Module, inputs: Inputs) -> None:
    if not isinstance(inputs, Tensor | tuple | dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"the input is {a_value(inputs)}",
            remedy="pass a tensor, a tuple (positional) or a dict (keywords)",
            code="FXC110",
        )
    if batch_size(inputs) == 0:
        raise InputError("the batch is empty", remedy="pass at least one sample", code="FXC110")
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
                f"the input has dtype {t.dtype}, the model {parameter.dtype}",
                remedy=f"convert it: x.to({parameter.dtype})",
                code="FXC111",
            )
        if not bool(t.isfinite().all()):
            raise InputError("the input contains NaN or infinity", remedy="remove them from the data", code="FXC112")
