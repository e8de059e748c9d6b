"""The error for a difference between graph and model: parameters, place, likely cause, and a remedy.

The model is run once more, with its modules, its hooks and autograd's graph watched. Every row of `CAUSES` looks for
one construct that a trace can miss; the first that is found is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxcurv.core.errors import Frame, Location, UnsupportedError, called_at
from fxcurv.core.torch_compat import autograd_nodes, custom_function_of, has_global_hooks, hooks_of, pytree
from fxcurv.frontend.inputs import Output, as_call, batch_size, selector, tensors_of
from fxcurv.frontend.shield import shielded
from fxcurv.runtime.program import Program
from fxcurv.runtime.run import bind
from fxcurv.verification.guard import Disagreement
from fxcurv.verification.tolerances import different_samples, tolerance_for

__all__ = ["CAUSES", "Cause", "Watched", "refusal_of"]


FALLBACK = 'compile with on_unsupported="fallback", which runs the model itself'


@dataclass(frozen=True)
class Cause:
    """A construct that a trace can miss, a remedy, and the lines of the model that contain it."""

    text: str
    remedy: str
    location: Location = ()


@dataclass
class Watched:
    """What one run of the model shows: hooks on tensors, functions in autograd's graph, outputs of its modules."""

    program: Program
    model: nn.Module
    found: Disagreement
    tensor_hooks: list[Location] = field(default_factory=list)
    functions: list[type] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def refusal_of(found: Disagreement, program: Program, model: nn.Module, output: Output) -> UnsupportedError:
    """Return the error for a difference."""
    if found.kind == "samples":
        return UnsupportedError(
            f"samples of the batch mix: the model's output for sample {found.samples[0]} changes with other samples",
            remedy=f"make each sample's output depend on that sample alone, or {FALLBACK}",
            code="FXC401",
        )
    watched = _watched(found, program, model, output)
    cause = next((cause for row in CAUSES for cause in row(watched)), None)
    place = _place(watched) if found.kind == "output" else None
    if found.kind == "output":
        subject = (
            f"the output of the traced graph differs from the model's for {_counted(len(found.samples), 'sample')}"
        )
    else:
        subject = f"the graph's gradients differ from those of the model's backward() for {_names(found.parameters)}"
    return UnsupportedError(
        subject + (f"; likely cause: {cause.text}" if cause else ""),
        node=place or (found.parameters[0] if found.parameters else None),
        remedy=cause.remedy if cause else FALLBACK,
        code="FXC107",
        location=cause.location if cause else (),
    )


def _names(parameters: Any) -> str:
    shown = ", ".join(map(repr, parameters[:3]))
    return shown if len(parameters) <= 3 else f"{shown} and {len(parameters) - 3} more"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


# Causes -----------------------------------------------------------------------------------------------------------


def _branches(watched: Watched) -> Iterator[Cause]:
    for relation, file, line in watched.program.canonical.meta["sizes"].conditions:
        yield Cause(
            f"a branch on the batch size at {file}:{line} ({relation})",
            f"remove the branch, or {FALLBACK}",
            (Frame(file, line, "forward"),),
        )


def _custom_functions(watched: Watched) -> Iterator[Cause]:
    for function in watched.functions:
        name = function.__name__
        if name == "CheckpointFunction":
            yield Cause("reentrant checkpointing", "pass use_reentrant=False to checkpoint()")
        elif name != "BackwardHookFunction":
            text = f"the backward of the custom autograd.Function {name}"
            yield Cause(text, FALLBACK, _defined(function))


def _module_hooks(watched: Watched) -> Iterator[Cause]:
    for path, module in watched.model.named_modules():
        if names := hooks_of(module):
            hooks = ", ".join(names)
            yield Cause(f"the {hooks} of the module {path or 'itself'!r}", "remove the hooks by their handles")


def _global_hooks(watched: Watched) -> Iterator[Cause]:
    if has_global_hooks():
        yield Cause("hooks registered for the calls of all modules", "remove the hooks by their handles")


def _kept_tensors(watched: Watched) -> Iterator[Cause]:
    for path, module in watched.model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
                where = f"{path}.{name}" if path else name
                yield Cause(
                    f"the attribute {where!r}, a tensor computed from parameters in an earlier call",
                    "compute it in every call, or delete it before compiling",
                )


def _tensor_hooks(watched: Watched) -> Iterator[Cause]:
    for location in watched.tensor_hooks:
        where = f" at {location[0]}" if location else ""
        yield Cause(f"a gradient hook on a tensor, registered{where}", f"remove it, or {FALLBACK}", location)


def _replaced_forwards(watched: Watched) -> Iterator[Cause]:
    for path, module in watched.model.named_modules():
        if "forward" in vars(module):
            function = vars(module)["forward"]
            yield Cause(
                f"the forward of the module {path or 'itself'!r} was replaced on the instance",
                f"define it in the class, or {FALLBACK}",
                _defined(getattr(function, "__func__", function)),
            )


def _batch_of_one(watched: Watched) -> Iterator[Cause]:
    if watched.found.kind == "output":
        yield Cause(
            f"the model computes something else for a batch of {batch_size(watched.found.inputs)}, "
            "as by a branch on the batch size",
            f"make forward independent of the batch size, or {FALLBACK}",
        )


CAUSES: tuple[Callable[[Watched], Iterator[Cause]], ...] = (
    _custom_functions,
    _tensor_hooks,
    _module_hooks,
    _global_hooks,
    _kept_tensors,
    _branches,
    _replaced_forwards,
    _batch_of_one,
)
"""In order of likelihood."""


def _defined(thing: Any) -> Location:
    """Return the line at which a class or a function is defined."""
    try:
        file, line = inspect.getsourcefile(thing), inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):
        return ()
    return (Frame(file or "", line, getattr(thing, "__name__", "")),)


# The run ----------------------------------------------------------------------------------------------------------


class _Hooks(TorchFunctionMode):
    """Records the lines that register a hook on a tensor."""

    def __init__(self, found: list[Location]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.register_hook:
            self.found.append(called_at())
        return func(*args, **(kwargs or {}))


def _watched(found: Disagreement, program: Program, model: nn.Module, output: Output) -> Watched:
    """Run the model on the batch of a difference."""
    watched = Watched(program, model, found)

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, result: Any) -> None:
            if isinstance(result, Tensor):
                watched.outputs[path] = result.detach()

        return hook

    with shielded(model):
        for path, module in model.named_modules():
            module.register_forward_hook(record(path))
        args, kwargs = as_call(pytree.tree_map_only(Tensor, torch.clone, found.inputs))
        with _Hooks(watched.tensor_hooks):
            y = selector(output)(model(*args, **kwargs))
        made = (custom_function_of(node) for node in autograd_nodes(y))
        watched.functions = [function for function in made if function is not None]
    return watched


def _place(watched: Watched) -> str | None:
    """Return the first module of the model whose output differs from that of its node in the graph."""
    values: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            values[str(n.target)] = value
            return value

    bind(watched.program.canonical, watched.model)
    with torch.no_grad():
        Recorder(watched.program.canonical).run(*tensors_of(watched.found.inputs))
    for path, expected in watched.outputs.items():
        found = values.get(path)
        if found is not None and found.shape == expected.shape and expected.ndim:
            if different_samples(found, expected, tolerance_for(expected.dtype).output):
                return path
    return None
