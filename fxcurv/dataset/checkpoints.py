"""Checkpoints: the state of an accumulation in a file; the same call resumes from it with bitwise equal results.

A checkpoint is a file of the result so far (fxcurv/results/writing.py), plus the number of batches, a digest of them
in order, the generator's state, the sums of the stopping rule, and the request, with digests of all that the model and
`split` may read (fxcurv/signature/stable.py). A different request is refused, and the file is not changed. The loader
must give the same batches in the same order: batches of the checkpoint are read again, without computation, and
compared with the digest.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.core.errors import FxcurvError
from fxcurv.core.fingerprint import digest, values_digest
from fxcurv.dataset.compiled import CompiledModel
from fxcurv.dataset.processes import Processes
from fxcurv.dataset.standard_error import StandardError
from fxcurv.dataset.state import Settings, State, length_of, owned
from fxcurv.quantities.protocol import definition_of
from fxcurv.results.json import Json
from fxcurv.results.reading import read
from fxcurv.results.writing import save
from fxcurv.signature.stable import batch_digest, facts_of_model, value_digest

__all__ = ["Checkpoint"]


_NAMED = 10_000
"""Number of batches of which a difference is found by number; later ones by the digest of all."""


_DIGITS = 8


@dataclass(frozen=True)
class Checkpoint:
    """A file for the states of one accumulation of `model`; `asked` is its request, which must match."""

    path: Path
    model: nn.Module
    generator: torch.Generator
    asked: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        compiled: CompiledModel,
        settings: Settings,
        generator: torch.Generator,
        loader: Iterable[Any],
        processes: Processes,
    ) -> Checkpoint:
        """Return the checkpoint of an accumulation; each process has a separate file."""
        path, size = Path(settings.checkpoint or ""), processes.size
        if size > 1:
            path = path.with_name(f"{path.name}.{processes.rank}-of-{size}")
        if not path.parent.is_dir():
            raise FxcurvError(f"there is no folder {path.parent}", remedy="create it first", code="FXC007")
        options, given, model = compiled.options, settings.generator, compiled.model
        asked = {
            "loss": compiled.loss.described(),
            "quantities": {name: definition_of(quantity) for name, quantity in compiled.selection.quantities.items()},
            "parameters": digest({name: list(names) for name, names in compiled.selection.of(model).items()}),
            "values of the model": values_digest(model),
            "model": facts_of_model(model),
            "output": options.output if isinstance(options.output, str | int) else value_digest(options.output, model),
            "split": value_digest(settings.split, model),
            "options": [options.on_unsupported, options.backend, options.memory_budget],
            "dtype": str(settings.dtype),
            "until_rel_error": settings.until_rel_error,
            "number of batches": length_of(loader),
            "generator": None if given is None else digest(given.get_state()),
            "process": [processes.rank, size],
            "eigenvectors": None if compiled.bases is None else digest(dict(compiled.bases.vectors)),
        }
        return cls(path, model, generator, json.loads(json.dumps(asked)))

    def marked(self, state: State, batch: Any) -> State:
        """Return the state after a batch, with the digest of all batches so far and the current generator state."""
        found = batch_digest(batch, state.digest)
        digests = state.digests + found[:_DIGITS] * (state.batches <= _NAMED)
        return replace(state, digest=found, digests=digests, generator=self.generator.get_state())

    def write(self, state: State) -> State:
        """Replace the file's content by this state, atomically."""
        assert state.total is not None
        assert state.generator is not None
        held = {
            "asked": self.asked,
            "batches": state.batches,
            "digest": state.digest,
            "digests": state.digests,
            "generator": base64.b64encode(bytes(state.generator.tolist())).decode(),
            "standard_error": asdict(state.standard_error),
        }
        save(state.total, self.path, json.dumps(held, allow_nan=False))
        return state

    def resumed(self, batches: Iterator[Any], beat: Callable[[int], None]) -> State:
        """Return the state in the file, set the generator and skip its batches; without a file, an empty state.

        `beat` is called with the number of skipped batches, after each.
        """
        if not self.path.exists():
            return State()
        state = self._read()
        found, digests = "", ""
        for k in range(state.batches):
            batch = next(batches, batches)
            if batch is batches:
                raise self._foreign(f"it holds {state.batches} batches, and there are {k}")
            found = batch_digest(batch, found)
            digests += found[:_DIGITS]
            beat(k + 1)
        if found != state.digest:
            first = _first_difference(digests, state.digests)
            raise self._foreign(f"{first}the loader gives other batches, or in another order")
        assert state.generator is not None
        self.generator.set_state(state.generator)
        return state

    def _read(self) -> State:
        total, held = read(self.path, self.model)
        if held is None:
            raise self._foreign("it is a result, not a checkpoint")
        asked = held["asked"].of(dict)
        for name, value in self.asked.items():
            if (known := asked.get(name)) != value:
                raise self._foreign(_difference(name, known, value))
        return State(
            total=owned(total, device=next(self.model.parameters()).device),
            batches=held["batches"].of(int),
            standard_error=_standard_error(held["standard_error"]),
            digest=held["digest"].of(str),
            digests=held["digests"].of(str),
            generator=_generator_state(held["generator"], self.generator.device),
        )

    def _foreign(self, cause: str) -> FxcurvError:
        return FxcurvError(
            f"{self.path} is the checkpoint of another accumulation: {cause}",
            remedy="repeat that call, or choose another path; the file is unchanged",
            code="FXC427",
        )


def _first_difference(ours: str, theirs: str) -> str:
    """Return the name of the first batch with another digest, or an empty string if no known digest differs."""
    for k in range(0, min(len(ours), len(theirs)), _DIGITS):
        if ours[k : k + _DIGITS] != theirs[k : k + _DIGITS]:
            return f"batch {k // _DIGITS + 1} is another one: "
    return ""


def _difference(name: str, known: Any, value: Any) -> str:
    """Describe how a request differs from that of the file."""
    if name == "split":
        return "split= is another function, or reads other values"
    if name == "output" and not (isinstance(known, int) or isinstance(value, int)):
        return "output= is another function or name, or reads other values"
    if name == "model" and isinstance(known, dict) and isinstance(value, dict):
        changed = next(fact for fact in (*value, *known) if known.get(fact) != value.get(fact))
        return f"{changed} has changed"
    return f"{name}: {known} in the file, {value} in this call"


def _standard_error(held: Json) -> StandardError:
    """Read the sums of a stopping rule."""
    weights, *sums = ([x.of(float) for x in row.each()] for row in (held["weights"], *held["sums"].each()))
    try:
        (w, ww), rows = weights, tuple((a, b, c) for a, b, c in sums)
    except ValueError:
        raise held.wrong("does not have the sums of a stopping rule") from None
    return StandardError(held["batches"].of(int), (w, ww), rows)


def _generator_state(held: Json, device: torch.device) -> Tensor:
    """Read the state of a generator; it must be valid for this device."""
    try:
        state = torch.frombuffer(bytearray(base64.b64decode(held.of(str))), dtype=torch.uint8)
        torch.Generator(device).set_state(state)
    except (ValueError, RuntimeError):
        raise held.wrong("is not a generator state for this device") from None
    return state
