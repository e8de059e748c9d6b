"""capture: any eval-mode model -> one flat ATen graph, valid for every batch size, through torch.export.

The graph's placeholders are the model's tensors (parameters, buffers, constants) and its inputs. `Captured.sources`
maps the former to the model's tensors. The model is traced through a structural copy that shares its tensors, or itself
(see `Tracing`). In both cases, side effects of tracing (caches, counters, flags) do not reach it.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.overrides import TorchFunctionMode

from fxcurv.core.errors import CaptureError, FxcurvError, InputError, raised_at
from fxcurv.core.shapes import BatchSizes
from fxcurv.core.torch_compat import pytree, size_conditions
from fxcurv.frontend.copying import structural_copy
from fxcurv.frontend.custom_gradients import attach_calls, check_module_hooks, mark_hook, traced_gradients
from fxcurv.frontend.inputs import Inputs, Output, as_call, selector
from fxcurv.frontend.isolation import generators_beside_torch, no_report_of_failure, without_autocast
from fxcurv.frontend.lengths import traced_lengths
from fxcurv.frontend.shield import restored

__all__ = ["TRACED_BATCH", "Captured", "Tracing", "capture"]


TRACED_BATCH = 3
"""Tracing uses three samples: export treats 0 and 1 as constants, and two would hide a broadcast against a pair."""


@dataclass(frozen=True)
class Captured:
    """The ATen graph, and the name of the model's tensor for each placeholder that is not an input."""

    graph: fx.GraphModule
    sources: dict[str, str]
    constants: dict[str, Tensor]
    sizes: BatchSizes = field(default_factory=BatchSizes)


@dataclass(frozen=True)
class Tracing:
    """How a model is traced: with a number of samples, and through a structural copy or itself.

    The copy leaves the model untouched, also for other threads. A closure, a global variable or a hook leads from the
    copy back to modules of the model, so that a model with one is traced itself, and restored.
    """

    samples: int = TRACED_BATCH
    through_copy: bool = True


def capture(model: nn.Module, inputs: Inputs, output: Output = None, tracing: Tracing | None = None) -> Captured:
    """Trace `model` on inputs shaped like `inputs`, whose values are not read, for any length of the batch axis.

    If the model branches on the batch size, the graph is valid for `Captured.sizes` only.
    """
    tracing = tracing or Tracing()
    args, kwargs = pytree.tree_map_only(Tensor, partial(_example, samples=tracing.samples), as_call(inputs))
    try:
        with generators_beside_torch() as have_moved:
            program = _exported(model, args, kwargs, output, tracing)
            fixed = not have_moved() or _equal(program, _exported(model, args, kwargs, output, tracing))
    except FxcurvError:
        raise
    except Exception as error:
        integers = [str(t.dtype) for t in pytree.tree_leaves((args, kwargs)) if _is_integer(t)]
        if integers and not _mentions_data(error):
            remedy = "convert it: x.float(), unless the model expects indices"
            raise InputError(
                f"the input has dtype {integers[0]}, and the model cannot be traced on it: {_first_line(error)}",
                remedy=remedy,
                code="FXC111",
            ) from error
        raise _translated(error) from error
    if not fixed:
        raise CaptureError(
            "the model uses random numbers of Python or NumPy",
            remedy="call model.eval(), or remove them",
            code="FXC403",
        )
    graph = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    _keep_only_selected_output(graph, program)
    return Captured(graph, *_sources(program, model), _sizes(graph))


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output, tracing: Tracing
) -> ExportedProgram:
    """Export the model or a copy, where axis 0 of every input may have any length."""
    dynamic = ShapesCollection()
    for t in pytree.tree_leaves((args, kwargs)):
        if isinstance(t, Tensor):
            dynamic[t] = {0: Dim.AUTO}
    check_module_hooks(model)
    shared = _copy(model) if tracing.through_copy else model
    forward, select = shared.forward, selector(output)

    @functools.wraps(forward)
    def selected(*args: Any, **kwargs: Any) -> Tensor:
        with _Traceable():
            return select(forward(*args, **kwargs))

    isolated = restored(model) if shared is model else nullcontext()
    lengths = traced_lengths(model)
    with isolated, lengths, torch.random.fork_rng(devices=[]), without_autocast(), warnings.catch_warnings():
        shared.forward = selected
        warnings.filterwarnings("ignore", ".*assigned during export")  # the copy is discarded, the model is restored
        # the order of opt_einsum would depend on the batch size
        with torch.backends.opt_einsum.flags(enabled=False), no_report_of_failure(), traced_gradients():
            program = export(shared, args, kwargs, dynamic_shapes=dynamic, strict=False)
            attach_calls(program.graph_module)
            return program


def _copy(model: nn.Module) -> nn.Module:
    """Return a structural copy, or the model itself if it cannot be copied."""
    try:
        return structural_copy(model, *model.parameters(), *model.buffers())
    except CaptureError:
        return model


def _equal(a: ExportedProgram, b: ExportedProgram) -> bool:
    """Whether two programs of one model compute the same function."""
    pairs = zip(a.constants.values(), b.constants.values(), strict=False)
    constants = (torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor))
    return _without_keys(a) == _without_keys(b) and len(a.constants) == len(b.constants) and all(constants)


def _without_keys(program: ExportedProgram) -> str:
    """Return the code of a program, without the keys of custom gradients, which are new in each trace."""
    return re.sub(r"((?:custom_gradient|gradient_hook)\.default\(.*), \d+\)", r"\1)", program.graph_module.code)


class _Traceable(TorchFunctionMode):
    """Replace calls that tracing would miss, or fix to one batch size, by equivalent calls."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = torch.is_inference_mode_enabled()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.register_hook:
            return mark_hook(func, *args, **(kwargs or {}))
        same = _TRACEABLE[func] if func in _TRACEABLE else func
        y = same(*args, **(kwargs or {}))
        if torch.is_inference_mode_enabled() and not self.outside:  # the trace has blocks of `no_grad` alone
            y = pytree.tree_map_only(Tensor, torch.Tensor.detach, y)
        return y


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


def _example(t: Tensor, samples: int) -> Tensor:
    return torch.empty(samples, *t.shape[1:], dtype=t.dtype, device=t.device)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def _mentions_data(error: Exception) -> bool:
    """Whether a tracing error is due to a branch on values."""
    text = f"{type(error).__name__}: {error}"
    return any(hint in text for hint in ("data-dependent", "DataDependent", "bool on", "item()"))


def _translated(error: Exception) -> CaptureError:
    """Translate a tracing error to cause and remedy, with the line of the model that raised it."""
    location = raised_at(error)
    where = f" at {location[0]}" if location else ""
    if _mentions_data(error):
        return CaptureError(
            f"data-dependent control flow{where}: a branch depends on the values of a tensor",
            remedy="decide on shapes or constants instead of values, or use torch.where",
            code="FXC101",
            location=location,
        )
    return CaptureError(
        f"the model cannot be traced{where}: {type(error).__name__}: {_first_line(error)}",
        remedy="pass the inputs that its forward takes, and compute with torch alone; "
        "the chained error has the full trace",
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


def _sizes(graph: fx.GraphModule) -> BatchSizes:
    """Return the batch sizes for which the model takes the traced branches."""
    values = [node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder")]
    sizes = [value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim]
    return BatchSizes(next((tuple(found) for size in sizes if (found := size_conditions(size))), ()))


def _sources(program: ExportedProgram, model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return placeholder -> name of the model's tensor, by identity (tied ones share the first); and constants."""
    held = [*model.named_parameters(), *model.named_buffers()]
    names = {id(t): name for name, t in reversed(held)}
    views = {_memory(t): name for name, t in reversed(held) if t.numel()}
    sources: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT or spec.target is None:
            continue
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if id(tensor) in names:
            sources[spec.arg.name] = names[id(tensor)]
        elif isinstance(tensor, Tensor) and _memory(tensor) in views:  # a parameter that a closure holds
            sources[spec.arg.name] = views[_memory(tensor)]
        elif isinstance(tensor, Tensor):
            sources[spec.arg.name], constants[spec.target] = spec.target, tensor.detach().clone()
    return sources, constants


def _memory(t: Tensor) -> tuple[object, ...]:
    """Return the memory that a tensor reads, equal for two views of it with the same entries."""
    return t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device
