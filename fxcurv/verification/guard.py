"""The comparison of a program with its model, when the program is first used and at each new batch size.

- Gradients, once per program: for a random cotangent, the gradients that the model's own `backward()` leaves on its
  parameters, against the pullback of the graph, on two samples.
- Outputs, at each new batch size: the model's own output against the output of the graph.
- Samples, at three samples and at each new batch size: the model's output of a sample must not change when the other
  samples are replaced and all are permuted. Model and graph may mix samples in the same way, so this asks the model.

A difference in float32 or half precision is confirmed in a wider dtype, if the model runs in it: a badly conditioned
model differs from its graph by rounding alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from fxcurv.core.errors import FxcurvError, InputError, UnsupportedError, raised_at
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import Inputs, Output, as_call, batch_size, selector
from fxcurv.frontend.shield import shielded
from fxcurv.ir.nodes import output_of
from fxcurv.runtime.program import Program
from fxcurv.verification.batches import among_others, rows_of, varied
from fxcurv.verification.graph import Pullback, output_at
from fxcurv.verification.tolerances import different_parameters, different_samples, tolerance_for

__all__ = ["Disagreement", "Guard", "Kind"]


Kind = Literal["output", "gradients", "samples"]


WIDER = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""The dtype in which a difference is confirmed."""


REPETITIONS = 32
"""Calls of a model that has drawn random numbers: one that uses them in every fifth call is found almost surely."""


LARGEST = 64
"""Number of batch sizes tried to find one in the range of a program that is valid for some only."""


@dataclass
class Disagreement(Exception):
    """A difference between graph and model: its kind, the parameters or samples concerned, and the batch."""

    kind: Kind
    inputs: Inputs
    parameters: Sequence[str] = ()
    samples: Sequence[int] = ()


@dataclass
class Guard:
    """Compares a program with its model; a comparison that has been made (`program.verified`) is not repeated.

    `parameters` are those whose gradients are compared, `budget` bounds the bytes of the gradients held at a time.
    """

    program: Program
    model: nn.Module
    output: Output
    parameters: Sequence[str]
    budget: int | None = None

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        self.generator.seed()
        self.apart = not any("refusal" in node.meta for node in self.program.canonical.graph.nodes)

    def check(self, inputs: Inputs, part: int | None = None) -> None:
        """Make the comparisons that are new, with at most `part` samples in a call; raise a Disagreement."""
        number = batch_size(inputs)
        if not output_of(self.program.canonical).meta["dtype"].is_floating_point:
            return  # no loss takes it
        if not self.program.verified.gradients:
            self._compare_gradients(inputs, self._size(2))
            self.program.verified.gradients = True
        if number not in self.program.verified.sizes:
            self.compare_output(inputs, part, among=True)
            self.program.verified.sizes.add(number)

    def compare_output(self, inputs: Inputs, part: int | None = None, *, among: bool = False) -> None:
        """Compare the outputs at a batch, in parts; with `among`, also the samples of the first part among others."""
        number = batch_size(inputs)
        step = min(number, part or number)
        for start in range(0, number, step):
            batch = rows_of(inputs, torch.arange(start, min(start + step, number)))
            expected = self._compare_part(batch)
            if among and start == 0:
                self._compare_samples(batch, expected, len(expected))

    # The comparisons

    def _compare_part(self, batch: Inputs) -> Tensor:
        """Compare the outputs at a batch, and return the model's."""
        expected: dict[torch.dtype | None, Tensor] = {}

        def different(dtype: torch.dtype | None) -> list[int]:
            expected[dtype], tensors = self._model(batch, dtype)
            ours = output_at(self.program, _cast(batch, dtype), tensors)
            return different_samples(ours, expected[dtype], tolerance_for(expected[dtype].dtype).output)

        if wrong := self._confirmed(different):
            raise Disagreement("output", batch, samples=wrong)
        return expected[None]

    def _compare_samples(self, batch: Inputs, output: Tensor, size: int) -> None:
        """Compare the model's output of every sample, given as `output`, with that among `size` others."""
        if size < 2 or not self.apart or not self.program.admits(size):
            return
        other = among_others(batch, size, self.generator)

        def different(dtype: torch.dtype | None) -> list[int]:
            expected = output if dtype is None else self._model(batch, dtype)[0]
            found = self._model(other.inputs, dtype)[0]
            expected, found = (t[at.to(t.device)] for t, at in ((expected, other.samples), (found, other.rows)))
            wrong = different_samples(found, expected, tolerance_for(expected.dtype).output)
            return [int(other.samples[k]) for k in wrong]

        if wrong := self._confirmed(different):
            raise Disagreement("samples", batch, samples=wrong)

    def _compare_gradients(self, inputs: Inputs, size: int) -> None:
        """Compare the pullbacks of a random cotangent at `size` samples, and the samples among others."""
        batch = varied(_some(inputs, size, self.generator), self.generator)
        outputs: dict[torch.dtype | None, Tensor] = {}

        def different(dtype: torch.dtype | None) -> list[str]:
            return [name for group in self._groups() for name in self._pulled(batch, dtype, group, outputs)]

        wrong = self._confirmed(different)
        if not wrong and outputs[None].dtype in (torch.float16, torch.bfloat16):
            wrong = _if_it_runs(different, torch.float32, [])
        if wrong:
            raise Disagreement("gradients", batch, parameters=wrong)
        self._compare_samples(batch, outputs[None], self._size(size + 1))

    def _pulled(
        self, batch: Inputs, dtype: torch.dtype | None, group: Sequence[str], outputs: dict[torch.dtype | None, Tensor]
    ) -> list[str]:
        """Return the parameters of a group whose gradients differ; store the model's output in `outputs`."""
        pullback = Pullback(self.program, self.model, group)
        with shielded(self.model, dtype) as shield:
            y = self._call(_cast(batch, dtype))
            outputs[dtype] = y.detach()
            cotangent = torch.randn(y.shape, generator=self.generator).to(y)
            tensors, drawn = shield.tensors, shield.has_drawn()
            expected = _run("the model's own backward()", lambda: shield.backward(y, cotangent, group))
        if drawn and dtype is None:
            self._check_repeatable(batch, outputs[dtype])
        found = _run("the pullback of the graph", lambda: pullback(_cast(batch, dtype), tensors, cotangent))
        expected = {name: expected[name] for name in group if name not in pullback.plan.refusals}
        return different_parameters(found, expected, tolerance_for(y.dtype))

    def _check_repeatable(self, batch: Inputs, output: Tensor) -> None:
        """Raise an InputError if the output depends on random numbers: the model has drawn some."""
        for _ in range(REPETITIONS):
            if different_samples(self._model(batch, None)[0], output, tolerance_for(output.dtype).output):
                raise InputError(
                    "the model's output depends on random numbers",
                    remedy="call model.eval(), or remove them",
                    code="FXC403",
                )

    # The model

    def _model(self, batch: Inputs, dtype: torch.dtype | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the model's output at a batch, and its tensors, in a dtype or its own."""
        with shielded(self.model, dtype) as shield:
            given = _cast(batch, dtype)
            try:
                with torch.no_grad():
                    return self._call(given).detach(), shield.tensors
            except RuntimeError:  # a model that registers hooks on tensors needs gradients
                return self._call(given).detach(), shield.tensors

    def _call(self, batch: Inputs) -> Tensor:
        args, kwargs = as_call(pytree.tree_map_only(Tensor, torch.clone, batch))  # the model may write into them
        with warnings.catch_warnings():  # the user's own calls give them
            warnings.simplefilter("ignore")
            return selector(self.output)(self.model(*args, **kwargs))

    def _confirmed(self, different: Callable[[torch.dtype | None], list[T]]) -> list[T]:
        """Return what differs in the model's own dtype, and in a wider one if the model runs in it."""
        found = different(None)
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        return _if_it_runs(different, WIDER[dtype], found) if found and dtype in WIDER else found

    def _size(self, least: int) -> int:
        """Return the smallest number of samples, from `least` on, for which the program was traced."""
        return next((n for n in range(least, least + LARGEST) if self.program.admits(n)), least)

    def _groups(self) -> list[list[str]]:
        """Divide the parameters, so that two gradients of each group fit the budget."""
        if self.budget is None:
            return [list(self.parameters)]
        groups, size, tensors = [list[str]()], 0, dict(self.model.named_parameters())
        for name in self.parameters:
            bytes_of_two = 2 * tensors[name].numel() * tensors[name].element_size()
            if groups[-1] and size + bytes_of_two > self.budget // 2:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += bytes_of_two
        return groups


T = TypeVar("T")


def _run(subject: str, compute: Callable[[], T]) -> T:
    """Return the result; an error of an op becomes a refusal."""
    try:
        return compute()
    except FxcurvError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise UnsupportedError(
            f"{subject} fails: {next(iter(str(error).splitlines()), type(error).__name__)}",
            remedy="give every op that a trainable parameter reaches a derivative",
            code="FXC107",
            location=raised_at(error),
        ) from error


def _if_it_runs(different: Callable[[torch.dtype | None], list[T]], dtype: torch.dtype, otherwise: list[T]) -> list[T]:
    try:
        return different(dtype)
    except Exception:  # a model that names its dtype may raise anything
        return otherwise


def _cast(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """Return the inputs with floating-point tensors in a dtype."""
    if dtype is None:
        return inputs
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def _some(inputs: Inputs, size: int, generator: torch.Generator) -> Inputs:
    """Return a batch of random samples; more than there are are drawn by `among_others`."""
    number = batch_size(inputs)
    if number >= size:
        return rows_of(inputs, torch.randperm(number, generator=generator)[:size])
    return among_others(inputs, size, generator).inputs
