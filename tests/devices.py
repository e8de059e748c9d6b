"""Emitted graphs on a device that is not the CPU, without one: fake tensors have a device, a shape and no numbers.

The device is called "lazy", as fake tensors on "cuda" need a GPU for autograd. Fake tensors raise where two devices
meet and where a number would be read back to the host, which on a GPU waits for it; `_Watch` raises for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxcurv.frontend.inputs import Inputs, as_call
from fxcurv.ir.nodes import output_of
from fxcurv.runtime.program import Program

__all__ = ["DEVICE", "WAITING", "Strayed", "run_elsewhere"]

DEVICE = torch.device("lazy")
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.unique_dim, aten._unique2}
"""Operators whose result, or its shape, the host has to wait for."""


WAITING = {"index.index_bool", "spectrum.complex_pick"}
"""Samples whose own forward waits: for how much a mask selects, for indices that it makes on the CPU."""


class Strayed(AssertionError):
    """A graph left the device that it runs on."""


class _Watch(TorchDispatchMode):
    """Raises where the host reads from the device, or the device from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if func.overloadpacket in READS:
            raise Strayed(f"{func} waits for the device")
        if any(t.device != DEVICE for t in made):
            raise Strayed(f"{func} makes a tensor on the host")
        if any(t.device != DEVICE and t.ndim for t in given):
            raise Strayed(f"{func} reads a tensor of the host")
        return result


def run_elsewhere(program: Program, inputs: Inputs) -> dict[str, Tensor]:
    """The sums of a program as fake tensors, for fake inputs; the program's own tensors are replaced by fakes.

    Raises `Strayed`, or what fake tensors raise, where a graph would read back from the device or leave it.
    """
    mode = FakeTensorMode()
    fake = _faker(mode)
    for graph in (program.canonical, *program.graphs):
        _move(graph, fake)
    leaves = [fake(t) for t in pytree.tree_leaves(as_call(inputs)) if isinstance(t, Tensor)]
    with mode, torch.no_grad(), _Watch():
        output, saved, sums = program.forward(*leaves)
        for factor, backward in program.backwards.items():
            S = output.new_empty(3, *output.shape, dtype=output_of(program.canonical).meta["dtype"])
            sums |= backward(S, **{name: saved[name] for name in program.saved(factor)})
    return sums


def _faker(mode: FakeTensorMode) -> Callable[[Tensor], Tensor]:
    """Tensors -> tensors of the same sizes and strides on the device, always the same for the same."""
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            with mode:
                sizes, strides, dtype = tensor.shape, tensor.stride(), tensor.dtype
                known[id(tensor)] = tensor, torch.empty_strided(sizes, strides, dtype=dtype, device=DEVICE)
        return known[id(tensor)][1]

    return fake


def _move(graph: fx.GraphModule, fake: Callable[[Tensor], Tensor]) -> None:
    """What `graph.to(DEVICE)` does: parameters and buffers, and no other tensor that a module holds."""
    for module in graph.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is not None and tensor.device != DEVICE:
                    del held[name]
                    module.__dict__[name] = fake(tensor)
