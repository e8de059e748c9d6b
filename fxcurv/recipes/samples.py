"""Per-sample derivatives of a compiled model for some of its parameters, and its outputs at other weights."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxcurv.api import Compiled
from fxcurv.core.errors import CaptureError, UnsupportedError
from fxcurv.core.shapes import resolve
from fxcurv.frontend.inputs import Inputs, as_call, batch_size, device_of, selector
from fxcurv.ir.nodes import output_of
from fxcurv.losses.base import as_loss
from fxcurv.quantities.selection import chosen
from fxcurv.results.entry import Entries

__all__ = ["Weights", "at_weights", "gradients", "jacobian_of", "jacobians", "outputs", "weights_of"]


Weights = Mapping[str, Tensor]


def weights_of(compiled: Compiled, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the named parameters of the model."""
    return {name: compiled.model.get_parameter(name).detach().clone() for name in names}


def outputs(compiled: Compiled, weights: Weights, inputs: Inputs) -> Tensor:
    """The model's output `[N, …]` with some parameters replaced, without a graph."""
    args, kwargs = as_call(inputs)
    with torch.enable_grad():  # models register hooks on tensors with gradients
        returned = functional_call(compiled.model, dict(weights), args, kwargs)
        return selector(compiled.options.output)(returned).detach()


@contextmanager
def at_weights(model: nn.Module, weights: Weights) -> Generator[None]:
    """Set the parameters to these values within the context; parameters that already have them are not changed."""
    parameters = {name: model.get_parameter(name) for name in weights}
    moved = {name: p.data for name, p in parameters.items() if not torch.equal(p, weights[name])}
    try:
        for name in moved:
            parameters[name].data = weights[name]
        yield
    finally:
        for name, data in moved.items():
            parameters[name].data = data


# Jacobians and gradients ------------------------------------------------------------------------------------------


def jacobian_of(compiled: Compiled, names: Iterable[str]) -> Compiled:
    """Compile the same model for the Jacobians of these parameters.

    The loss is the squared error: Jacobians do not depend on the loss, and this loss takes any output.
    """
    selection = chosen("jacobian").only(tuple(names))
    found = Compiled(compiled.model, as_loss(nn.MSELoss(reduction="sum")), selection, compiled.options)
    found.programs = compiled.programs
    return found


def jacobians(jacobian: Compiled, names: Iterable[str], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs `[N, C]` and ∂ output[n] / ∂ parameters, `[N, C, P]`, with the parameters in the order of `names`.

    C is the number of output entries per sample; `jacobian` comes from `jacobian_of`.
    """
    result = jacobian(inputs, torch.zeros_like(_output_like(jacobian, inputs)))
    f = result.output.reshape(batch_size(inputs), -1)
    return f, _flat(result["jacobian"], names, f)


def gradients(compiled: Compiled, names: Iterable[str], inputs: Inputs, target: Tensor) -> Tensor:
    """∂ loss[n] / ∂ parameters, `[N, P]`; the loss of a sample is the sum of its terms."""
    names = tuple(names)
    result = compiled.choosing(chosen("batch_grad").only(names)).summed()(inputs, target)
    return _flat(result["batch_grad"], names, result.loss.new_empty(batch_size(inputs)))


def _output_like(compiled: Compiled, inputs: Inputs) -> Tensor:
    """A tensor of the output's shape, type and device; the model runs only if it cannot be compiled."""
    try:
        facts = output_of(compiled.prepare(inputs).canonical).meta
    except (CaptureError, UnsupportedError):
        if compiled.options.on_unsupported != "fallback":
            raise
        with torch.no_grad():
            return outputs(compiled, {}, inputs)
    shape = resolve(facts["shape"], batch_size(inputs))
    return torch.empty((), dtype=facts["dtype"], device=device_of(inputs)).expand(shape)


def _flat(entries: Entries, names: Iterable[str], like: Tensor) -> Tensor:
    """Concatenate tensors `[…, *shape]` to `[…, P]`, with the leading axes of `like`; unreached parameters are zero."""

    def flat(name: str) -> Tensor:
        size = *like.shape, math.prod(entries.entries[name].shape)
        return like.new_zeros(size) if entries.status[name] == "unreached" else entries[name].reshape(size)

    return torch.cat([flat(name) for name in names], -1)
