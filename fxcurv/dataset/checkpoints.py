"""Checkpoints: the state of an accumulation as a file, from which the same call continues to the same bits.

A checkpoint is a file of the result so far (fxcurv/files.py), with what else a further batch depends on: the number of
batches, a digest of these in their order, the generator's state and the sums of the stopping rule. Beside these stands
what the accumulation was asked for. Whatever differs is refused, and the file stays as it is. The loader must give the
same batches in the same order again: those that are in the checkpoint are read once more, without computing anything,
and compared with the digest.
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

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A file for the states of one accumulation of `model`; `asked` is what it must have been asked for."""

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
        """The checkpoint that an accumulation asks for; each process has a file of its own."""
        path, size = Path(settings.checkpoint or ""), processes.size
        if size > 1:
            path = path.with_name(f"{path.name}.{processes.rank}-of-{size}")
        if not path.parent.is_dir():
            raise FxcurvError(f"there is no folder {path.parent}", remedy="create it first", code="FXC007")
        options, given = compiled.options, settings.generator
        asked = {
            "loss": compiled.loss.described(),
            "quantities": {name: definition_of(quantity) for name, quantity in compiled.selection.quantities.items()},
            "parameters": digest({name: list(names) for name, names in compiled.selection.of(compiled.model).items()}),
            "values of the model": values_digest(compiled.model),
            "output": str(options.output) if isinstance(options.output, str | int) else "",
            "options": [options.on_unsupported, options.backend, options.memory_budget],
            "dtype": str(settings.dtype),
            "until_rel_error": settings.until_rel_error,
            "number of batches": length_of(loader),
            "generator": None if given is None else digest(given.get_state()),
            "process": [processes.rank, size],
            "eigenvectors": None if compiled.bases is None else digest(dict(compiled.bases.vectors)),
        }
        return cls(path, compiled.model, generator, json.loads(json.dumps(asked)))

    def marked(self, state: State, batch: Any) -> State:
        """The state after a batch, with the digest of all batches so far and the generator as it is now."""
        return replace(state, digest=digest(batch, state.digest), generator=self.generator.get_state())

    def write(self, state: State) -> State:
        """Let the file hold this state instead, whole or not at all."""
        assert state.total is not None
        assert state.generator is not None
        held = {
            "asked": self.asked,
            "batches": state.batches,
            "digest": state.digest,
            "generator": base64.b64encode(bytes(state.generator.tolist())).decode(),
            "standard_error": asdict(state.standard_error),
        }
        save(state.total, self.path, json.dumps(held, allow_nan=False))
        return state

    def resumed(self, batches: Iterator[Any], beat: Callable[[int], None]) -> State:
        """The state in the file, with the generator set to it and the batches that it holds taken off; else none.

        `beat` is called with the number of batches that were taken off, at each.
        """
        if not self.path.exists():
            return State()
        state = self._read()
        found = ""
        for k in range(state.batches):
            batch = next(batches, batches)
            if batch is batches:
                raise self._foreign(f"it holds {state.batches} batches, and there are {k}")
            found = digest(batch, found)
            beat(k + 1)
        if found != state.digest:
            raise self._foreign("the loader gives other batches, or in another order")
        assert state.generator is not None
        self.generator.set_state(state.generator)
        return state

    def _read(self) -> State:
        total, held = read(self.path, self.model)
        if held is None:
            raise self._foreign("it is a result, and no checkpoint")
        asked = held["asked"].of(dict)
        for name, value in self.asked.items():
            if asked.get(name) != value:
                raise self._foreign(f"{name}: {asked.get(name)} there, {value} here")
        return State(
            total=owned(total, device=next(self.model.parameters()).device),
            batches=held["batches"].of(int),
            standard_error=_standard_error(held["standard_error"]),
            digest=held["digest"].of(str),
            generator=_generator_state(held["generator"], self.generator.device),
        )

    def _foreign(self, cause: str) -> FxcurvError:
        return FxcurvError(
            f"{self.path} is the checkpoint of another accumulation: {cause}",
            remedy="repeat that call, or choose another path; the file is as it was",
            code="FXC427",
        )


def _standard_error(held: Json) -> StandardError:
    """The sums of a stopping rule, as they were written."""
    weights, *sums = ([x.of(float) for x in row.each()] for row in (held["weights"], *held["sums"].each()))
    try:
        (w, ww), rows = weights, tuple((a, b, c) for a, b, c in sums)
    except ValueError:
        raise held.wrong("has other sums than a stopping rule") from None
    return StandardError(held["batches"].of(int), (w, ww), rows)


def _generator_state(held: Json, device: torch.device) -> Tensor:
    """The state of a generator, which one of this device takes."""
    try:
        state = torch.frombuffer(bytearray(base64.b64decode(held.of(str))), dtype=torch.uint8)
        torch.Generator(device).set_state(state)
    except (ValueError, RuntimeError):
        raise held.wrong("is no state of a generator of this device") from None
    return state
