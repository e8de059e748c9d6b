"""Per-sample derivatives of a compiled model by torch.func: Jacobians of its output, gradients of its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from fxcurv.api import Compiled
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.inputs import Inputs, as_call, selector

__all__ = ["Weights", "gradients", "jacobians", "outputs", "weights_of"]


Weights = Mapping[str, Tensor]


def weights_of(compiled: Compiled, names: Iterable[str]) -> dict[str, Tensor]:
    """Those parameters of the model as they are now."""
    return {name: compiled.model.get_parameter(name).detach().clone() for name in names}


def outputs(compiled: Compiled, weights: Weights, inputs: Inputs) -> Tensor:
    """What the model returns with some parameters replaced, `[N, …]`."""
    args, kwargs = as_call(inputs)
    returned = functional_call(compiled.model, dict(weights), args, kwargs)
    return selector(compiled.options.output)(returned)


def jacobians(compiled: Compiled, weights: Weights, inputs: Inputs) -> Tensor:
    """∂ output[n] / ∂ weights, `[N, C, P]` with C entries of a sample's output and P of all weights, in their order."""

    def one(values: Weights, sample: Inputs) -> Tensor:
        return outputs(compiled, values, _batch_of_one(sample)).flatten()

    return _flat(vmap(jacrev(one), (None, 0))(dict(weights), inputs), weights)


def gradients(compiled: Compiled, weights: Weights, inputs: Inputs, target: Tensor) -> Tensor:
    """∂ loss[n] / ∂ weights, `[N, P]`, of each sample's loss terms added up, as `reduction="sum"` does."""
    loss = compiled.loss.summed().module

    def one(values: Weights, sample: Inputs, label: Tensor) -> Tensor:
        return loss(outputs(compiled, values, _batch_of_one(sample)), label.unsqueeze(0))

    each: Callable[..., Weights] = vmap(grad(one), (None, 0, 0))
    return _flat(each(dict(weights), inputs, target), weights)


def _batch_of_one(sample: Inputs) -> Inputs:
    return pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), sample)


def _flat(found: Any, weights: Weights) -> Tensor:
    """Tensors `[…, *shape]` by name as one, `[…, P]`."""
    parts = [
        found[name].flatten(found[name].ndim - w.ndim) if w.ndim else found[name][..., None]
        for name, w in weights.items()
    ]
    return torch.cat(parts, -1).detach()
