"""check_quantity: a quantity against autograd, over half batches, and through a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.api import Compiled
from fxcurv.blocks.base import Block
from fxcurv.core.errors import QuantityError, UnsupportedError
from fxcurv.frontend.inputs import Inputs
from fxcurv.losses.base import as_loss
from fxcurv.quantities.factors import Exact, Rademacher, Sampled, Stratified
from fxcurv.quantities.protocol import Quantity, facts_of
from fxcurv.quantities.selection import chosen
from fxcurv.results.curvature import Curvature
from fxcurv.results.entry import Entry
from fxcurv.results.merging import merge
from fxcurv.results.reading import load
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.options import Options
from fxcurv.runtime.run import Minibatch
from fxcurv.testing.comparison import Pair, assert_agree, halves_of, largest_of, seeded

__all__ = ["check_quantity"]

MATRIX = 4096
"""Number of entries up to which the matrices of two blocks are compared."""


def check_quantity(
    quantity: str | Quantity, model: nn.Module, loss: object, inputs: Inputs, target: Tensor
) -> UnsupportedError | None:
    """Check a quantity on a model: against autograd, over half batches, and through a file.

    `quantity` is an object or a name, `loss` is given as to `fxcurv.compile`, `inputs` and `target` hold at least two
    samples along axis 0. There are three checks:

    - The compiled value of every parameter equals the value by plain autograd on the model. Sampled factors draw
      from equal generators. Blocks are compared by their options, their `invariants`, and unless their tensors are not
      unique (as in an eigenbasis) by `dense()`. Errors are relative to the largest entry, with the tolerance of the
      model's dtype; float64 is best. Integers and booleans must be equal.
    - If the quantity has `combine == "add"` or `"concatenate"`, the merged results of two half batches equal the
      result of the whole. `Exact` replaces a random factor there.
    - A result has the same bits after saving and loading; this check needs safetensors.

    Returns None, or the UnsupportedError of a quantity without an autograd reference, such as KFRA: its first check is
    skipped. Raises an AssertionError that names the quantity, the parameter and the error.

        check_quantity(fxcurv.KFAC(fxcurv.Exact()), model.double().eval(), "cross_entropy", x, y)
    """
    __tracebackhide__ = True
    halves = list(zip(halves_of(inputs), halves_of(target), strict=True))
    compiled, refusal = Compiled(model, as_loss(loss), chosen(quantity), Options(verify="never")), None
    (name, asked), *others = compiled.selection.quantities.items()
    if others:
        raise QuantityError(
            f"there are {1 + len(others)} quantities", remedy="give one name or object; check each alone", code="FXC409"
        )
    found = compiled(inputs, target, seeded(target.device))
    try:
        batch = Minibatch(inputs, target, seeded(target.device))
        expected = by_autograd(model, compiled.loss, compiled.selection, batch)
        assert_agree(f"{name}, compiled and by autograd", _entry_pairs(found, expected))
    except UnsupportedError as error:
        refusal = error
    if facts_of(asked)["combine"] != "refuse" and (exact := _exact(asked)) is not None:
        of_exact = compiled.choosing(chosen(exact))
        merged = merge(*(of_exact(*half) for half in halves))
        assert_agree(f"{name}, merged and whole", _entry_pairs(merged, of_exact(inputs, target)))
    _check_file(name, found)
    return refusal


def _exact(quantity: Quantity) -> Quantity | None:
    """The quantity with `Exact` for a random factor, whose columns differ for halves; None if its factor is fixed."""
    if not isinstance(quantity.factor, Sampled | Rademacher | Stratified):
        return quantity
    given: Any = quantity
    return replace(given, factor=Exact()) if any(f.name == "factor" and f.init for f in fields(given)) else None


def _check_file(name: str, found: Curvature) -> None:
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.safetensors"
        found.save(path)
        loaded = load(path)
    for ours, its in zip(found.entries, loaded.entries, strict=True):
        saved, read = ours.tensors(), its.tensors()
        same = list(saved) == list(read) and all(_identical(saved[key].cpu(), read[key]) for key in saved)
        if not same or ours.status != its.status or ours.form() != its.form() or _options(ours) != _options(its):
            raise AssertionError(f"{name} of {ours.parameter!r} differs after saving and loading")


def _entry_pairs(found: Curvature, expected: Curvature) -> Iterator[Pair]:
    """Yield the values of each parameter; errors of tiny values are relative to the largest of the quantity."""
    theirs = {entry.parameter: entry for entry in expected.entries}
    largest = largest_of(t for entry in theirs.values() for t in _compared(entry).values())
    for entry in found.entries:
        ours, its = _compared(entry), _compared(theirs[entry.parameter])
        if entry.form() != theirs[entry.parameter].form() or list(ours) != list(its):
            forms = f"a {entry.form()} and a {theirs[entry.parameter].form()}"
            raise AssertionError(f"{entry.quantity} of {entry.parameter!r} has two formats, {forms}")
        if (options := _options(entry)) != (others := _options(theirs[entry.parameter])):
            differ = ", ".join(name for name in options if options[name] != others[name])
            raise AssertionError(f"{entry.quantity} of {entry.parameter!r} differs in the options {differ}")
        for part, value in ours.items():
            yield Pair(f"{part} of {entry.parameter!r}", value, its[part], 1e-6 * largest)


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def _compared(entry: Entry) -> dict[str, Tensor]:
    """The tensors that determine a value; the matrix of a large block is not formed."""
    block = entry.value
    if not isinstance(block, Block):
        return entry.tensors()
    unique = type(block).invariants is Block.invariants and block.numel <= MATRIX
    numbers = {name: torch.tensor(x, dtype=torch.float64) for name, x in _options(entry, float).items()}
    return {**block.invariants, **numbers, **({"the matrix": block.dense()} if unique else {})}


def _options(entry: Entry, *kinds: type) -> dict[str, object]:
    """The options of a block of these types; by default of all types but float, which are equal to rounding."""
    if not isinstance(block := entry.value, Block):
        return {}
    found = {name: getattr(block, name) for name in block.options}
    return {name: x for name, x in found.items() if (isinstance(x, kinds) if kinds else not isinstance(x, float))}
