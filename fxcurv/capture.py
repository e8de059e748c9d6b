"""capture: any eval-mode model -> one flat ATen graph, valid for every batch size, through torch.export.

The graph's placeholders are the model's tensors (parameters, buffers, constants) and its inputs; `Captured.sources`
says which tensor of the model each of the former is. The model itself is traced through a structural copy that shares
its tensors, so nothing that tracing leaves behind (caches, counters, flags) reaches it.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxcurv.errors import CaptureError, FxcurvError, InputError, UnsupportedError, a_value, raised_at
from fxcurv.surroundings import generators_beside_torch, no_report_of_failure

__all__ = [
    "TRACING",
    "Captured",
    "Inputs",
    "Output",
    "as_call",
    "batch_size",
    "capture",
    "check_parameters",
    "device_of",
    "selector",
    "structural_copy",
    "without_autocast",
]

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
Output = str | int | Callable[[Any], Tensor] | None

TRACED_BATCH = 3
"""Tracing sees three samples: export takes 0 and 1 for constants, and two would hide a broadcast against a pair."""


TRACING = threading.RLock()
"""Held by the thread that traces: torch.export and fx exchange functions of the whole process."""


@dataclass(frozen=True)
class Captured:
    """The ATen graph, and for each placeholder that is not an input the name of the model's tensor it stands for."""

    graph: fx.GraphModule
    sources: dict[str, str]
    constants: dict[str, Tensor]


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor or a tuple is positional, a dict is keyword arguments."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def batch_size(inputs: Inputs) -> int:
    """The length of axis 0, which all input tensors share."""
    tensors = [t for t in pytree.tree_leaves(as_call(inputs)) if isinstance(t, Tensor)]
    if not tensors:
        raise InputError("no input tensor was given", remedy="call it as curv(inputs, target)", code="FXC110")
    for t in tensors:
        if t.ndim == 0:
            raise InputError("an input is a scalar", remedy="give every input a leading batch axis", code="FXC110")
    sizes = {t.shape[0] for t in tensors}
    if len(sizes) != 1:
        raise InputError(
            f"inputs have different batch sizes {sorted(sizes)}",
            remedy="let axis 0 of every input be the batch",
            code="FXC110",
        )
    return sizes.pop()


def device_of(inputs: Inputs) -> torch.device:
    """Where the inputs lie."""
    return next((t.device for t in pytree.tree_leaves(as_call(inputs)) if isinstance(t, Tensor)), torch.device("cpu"))


def selector(output: Output) -> Callable[[Any], Tensor]:
    """The function that takes the tensor to differentiate out of what the model returns."""

    def select(returned: Any) -> Tensor:
        if callable(output):
            chosen = output(returned)
        elif output is None:
            chosen = returned
        else:
            chosen = _item(returned, output)
        if isinstance(chosen, Tensor):
            return chosen
        raise _choose(f"the model returns {_described(chosen)}, not a tensor")

    return select


def _item(returned: Any, output: str | int) -> Any:
    """What the model returns under a name or at an index."""
    try:
        if isinstance(output, str) and not isinstance(returned, dict):
            return getattr(returned, output)
        return returned[output]
    except (LookupError, AttributeError, TypeError) as error:
        raise _choose(f"the model returns {_described(returned)}, nothing that output={output!r} names") from error


def _choose(cause: str) -> CaptureError:
    remedy = "choose one with output= (an index, a name, or a function of what the model returns)"
    return CaptureError(cause, node="output", remedy=remedy, code="FXC105")


def _described(returned: Any) -> str:
    parts = _parts(returned)
    return "a tensor" if isinstance(returned, Tensor) else a_value(returned) + (f" of {parts}" if parts else "")


def _parts(returned: Any) -> str:
    if isinstance(returned, dict):
        return ", ".join(map(repr, returned))
    return f"{len(returned)} items" if isinstance(returned, list | tuple) else ""


def capture(model: nn.Module, inputs: Inputs, output: Output = None) -> Captured:
    """Trace `model` on inputs shaped like `inputs`, whose values are not read, for any length of the batch axis."""
    args, kwargs = pytree.tree_map_only(Tensor, _example, as_call(inputs))
    try:
        with generators_beside_torch() as have_moved:
            program = _exported(model, args, kwargs, output)
            fixed = not have_moved() or _equal(program, _exported(model, args, kwargs, output))
    except FxcurvError:
        raise
    except Exception as error:
        integers = [str(t.dtype) for t in pytree.tree_leaves((args, kwargs)) if _is_integer(t)]
        if integers and not _mentions_data(error):
            remedy = "convert it: x.float(), unless the model expects indices"
            raise InputError(
                f"the input is of type {integers[0]}, and the model cannot be traced on it: {_first_line(error)}",
                remedy=remedy,
                code="FXC111",
            ) from error
        raise _translated(error) from error
    if not fixed:
        raise CaptureError(
            "the model computes with random numbers of Python or NumPy",
            remedy="call model.eval(), or compute without them",
            code="FXC403",
        )
    graph = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    _keep_only_selected_output(graph, program)
    return Captured(graph, *_sources(program, model))


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output) -> ExportedProgram:
    """The program of a copy of the model, whose axis 0 of every input may have any length."""
    dynamic = ShapesCollection()
    for t in pytree.tree_leaves((args, kwargs)):
        if isinstance(t, Tensor):
            dynamic[t] = {0: Dim.AUTO}
    shared = structural_copy(model, *model.parameters(), *model.buffers())
    forward, select = shared.forward, selector(output)

    @functools.wraps(forward)
    def selected(*args: Any, **kwargs: Any) -> Tensor:
        with _Traceable():
            return select(forward(*args, **kwargs))

    shared.forward = selected
    with torch.random.fork_rng(devices=[]), without_autocast(), warnings.catch_warnings(), no_report_of_failure():
        warnings.filterwarnings("ignore", ".*assigned during export")  # to the copy, which is dropped
        with torch.backends.opt_einsum.flags(enabled=False):  # the order it picks would depend on the batch size
            return export(shared, args, kwargs, dynamic_shapes=dynamic, strict=False)


def _equal(a: ExportedProgram, b: ExportedProgram) -> bool:
    """Whether two programs of one model compute the same."""
    pairs = zip(a.constants.values(), b.constants.values(), strict=False)
    constants = (torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor))
    return a.graph_module.code == b.graph_module.code and len(a.constants) == len(b.constants) and all(constants)


class _Traceable(TorchFunctionMode):
    """Traces what tracing would lose sight of, or fix to one batch size, as calls that mean the same."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        same = _TRACEABLE[func] if func in _TRACEABLE else func
        return same(*args, **(kwargs or {}))


def _take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """`torch.take_along_dim`, whose own code reads the batch size as a number."""
    if dim is None:
        return input.flatten().gather(0, indices.flatten())
    sizes = torch.broadcast_shapes(input.select(dim, 0).shape, indices.select(dim, 0).shape)
    axis = dim % input.ndim
    whole, at = (t.expand(*sizes[:axis], t.shape[axis], *sizes[axis:]) for t in (input, indices))
    return whole.gather(axis, at)


_TRACEABLE: dict[Any, Callable[..., Any]] = {
    Tensor.data.__get__: Tensor.detach,  # pyright: ignore[reportAttributeAccessIssue]
    torch.take_along_dim: _take_along_dim,
    Tensor.take_along_dim: _take_along_dim,
}


def _example(t: Tensor) -> Tensor:
    return torch.empty(TRACED_BATCH, *t.shape[1:], dtype=t.dtype, device=t.device)


def check_parameters(model: nn.Module) -> None:
    """An error where parameters are spread over processes, by FSDP or tensor parallelism."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # without which there are none
    for name, p in model.named_parameters():
        if module is not None and isinstance(p, module.DTensor):
            raise UnsupportedError(
                f"parameter {name!r} is a DTensor, spread over processes",
                remedy="load the full state dict into a model with whole parameters, one copy per process",
                code="FXC429",
            )


def structural_copy(model: nn.Module, *shared: Tensor, instead: Mapping[Tensor, Tensor] | None = None) -> nn.Module:
    """A copy of the modules that shares the given tensors with `model`, and those that it computed and kept.

    Wherever the model holds a key of `instead`, the copy holds its value.
    """
    check_parameters(model)
    kept = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf)
    try:
        return copy.deepcopy(model, {id(t): (instead or {}).get(t, t) for t in (*shared, *kept)})
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied ({error})", remedy="make its attributes deep-copyable", code="FXC103"
        ) from error


@contextmanager
def without_autocast() -> Generator[None]:
    """Nothing of it on any device; the types of the model's own tensors are those that it computes with."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def _mentions_data(error: Exception) -> bool:
    """Whether the error of tracing is a branch on values."""
    text = f"{type(error).__name__}: {error}"
    return any(hint in text for hint in ("data-dependent", "DataDependent", "bool on", "item()"))


def _translated(error: Exception) -> CaptureError:
    """An error of tracing as cause and remedy, with the line of the model that it came from."""
    location = raised_at(error)
    where = f" at {location[0]}" if location else ""
    if _mentions_data(error):
        return CaptureError(
            f"data-dependent control flow{where}: the values of a tensor decide what is computed",
            remedy="decide on shapes or constants instead of values, or use torch.where",
            code="FXC101",
            location=location,
        )
    return CaptureError(
        f"the model cannot be traced{where}: {type(error).__name__}: {_first_line(error)}",
        remedy="give the inputs that its forward takes, and let it compute by torch alone; "
        "the error that this was raised from has the whole trace",
        code="FXC102",
        location=location,
    )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no reason given")


def _keep_only_selected_output(graph: fx.GraphModule, program: ExportedProgram) -> None:
    node = graph.graph.output_node()
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    outputs: list[Any] = list(pytree.tree_leaves(node.args))
    node.args = (outputs[kinds.index(OutputKind.USER_OUTPUT)],)


def _sources(program: ExportedProgram, model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Placeholder -> name of the model's tensor, by identity (tied ones share the first); and lifted constants."""
    names = {id(t): name for name, t in reversed([*model.named_parameters(), *model.named_buffers()])}
    sources: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT or spec.target is None:
            continue
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if id(tensor) in names:
            sources[spec.arg.name] = names[id(tensor)]
        elif isinstance(tensor, Tensor):
            sources[spec.arg.name], constants[spec.target] = spec.target, tensor.detach().clone()
    return sources, constants
