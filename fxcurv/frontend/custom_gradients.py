"""Interception of custom gradients: of every `torch.autograd.Function`, of hooks, and of reentrant checkpoints.

torch.export traces the forward of a Function and drops its backward, and neither it nor a TorchFunctionMode sees the
call: `apply` is C code, of which a model may hold a reference (`f = MyFunction.apply`). So for the time of a trace, and
on its thread alone, the forward of every Function calls the operator `fxcurv::custom_gradient` (see
fxcurv/ir/custom_gradients.py). Modules build their backward hooks of `BackwardHook`, which becomes `_ModuleHooks`.
Reentrant checkpoints, `torch.utils.checkpoint.checkpoint(…, use_reentrant=True)`, run their function.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.hooks import BackwardHook

from fxcurv.core.errors import Location, UnsupportedError, called_at
from fxcurv.core.shapes import Shape, resolve, shape_of
from fxcurv.core.torch_compat import (
    SINGLE_LEVEL_FUNCTION,
    FunctionMeta,
    functorch_is_active,
    outside_of_trace,
    pytree,
    version_of,
)
from fxcurv.frontend.isolation import TRACING
from fxcurv.ir.custom_gradients import CustomCall, GradientHook, Hooked, call_of, is_running
from fxcurv.ir.held_tensors import Held, held, title_of

__all__ = [
    "TensorHook",
    "arguments_of",
    "attach_calls",
    "check_module_hooks",
    "inspected",
    "intercepted",
    "is_dual",
    "mark_hook",
    "refusal",
    "traced_gradients",
    "without_nested_backward",
]


Forward = Callable[..., Any]


Handler = Callable[[Any, Forward, tuple[Any, ...], dict[str, Any]], Any]
"""Called in place of a Function's forward, with the Function, its forward, and the arguments."""


def refusal(name: str, why: str, location: Location = (), node: str | None = None) -> UnsupportedError:
    """Return the error for a custom gradient that is the transpose of no Jacobian of each sample."""
    helps = "or compute with on_unsupported='fallback'" if "mixes samples" in why else "the fallback does not help"
    return UnsupportedError(
        f"{name} has no Jacobian: {why}",
        node=node,
        remedy=f"remove it while curvature is computed; {helps}",
        code="FXC108",
        location=location,
    )


# Interception -----------------------------------------------------------------------------------------------------


class _Current(threading.local):
    handler: Handler | None = None
    hooks: Callable[..., Any] = BackwardHook
    checkpoints: bool = False


_CURRENT = _Current()


class _Patches:
    """Replacements of functions of torch, for as long as any thread is inside `intercepted`."""

    def __init__(self) -> None:
        self.lock, self.users = threading.RLock(), 0
        self.undo = ExitStack()

    def enter(self) -> None:
        with self.lock:
            self.users += 1
            if self.users == 1:
                self._apply()

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.undo.close()

    def _apply(self) -> None:
        made = FunctionMeta.__init__

        def init(cls: Any, *args: Any) -> None:
            made(cls, *args)
            if self.users:
                self._replace_forward(cls)

        self._set(FunctionMeta, "__init__", init)
        self._set(torch_module, "BackwardHook", lambda *args: _CURRENT.hooks(*args))
        self._set(torch_checkpoint, "CheckpointFunction", _Checkpoint)
        self._set(torch.autograd, "backward", _guarded(torch.autograd.backward))
        for cls in list(_subclasses(SINGLE_LEVEL_FUNCTION)):
            self._replace_forward(cls)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self.undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def _replace_forward(self, cls: Any) -> None:
        if cls.__module__.partition(".")[0] == "torch":  # its backward is the derivative of its forward
            return
        own, forward = vars(cls).get("forward"), getattr(cls.forward, "original", cls.forward)

        @functools.wraps(forward)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            handler = _CURRENT.handler
            if handler is None or is_running() or torch.is_grad_enabled():  # `apply` disables gradients
                return forward(*args, **kwargs)
            return handler(cls, forward, args, kwargs)

        def restore() -> None:
            if own is None:
                del cls.forward
            else:
                cls.forward = own

        self.undo.callback(restore)
        vars(replaced)["original"] = forward
        cls.forward = staticmethod(replaced)


def _guarded(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.autograd.backward`, refused inside of the backward of a Function, where it writes to `.grad`."""

    @functools.wraps(backward)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if is_running():
            raise refusal("a Function", "its backward calls backward() itself, which is not a function of the gradient")
        return backward(*args, **kwargs)

    return guarded


@contextmanager
def without_nested_backward() -> Generator[None]:
    """Inside, raise an error (FXC108) if the backward of a tried Function calls `backward()` itself."""
    _PATCHES.enter()
    try:
        yield
    finally:
        _PATCHES.leave()


def _subclasses(cls: Any) -> Iterator[Any]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


_PATCHES = _Patches()


@contextmanager
def intercepted(handler: Handler, hooks: Callable[..., Any]) -> Generator[None]:
    """On this thread, call `handler` for the forward of every Function, and look through reentrant checkpoints.

    `hooks` takes the place of torch's `BackwardHook`.
    """
    before = _CURRENT.handler, _CURRENT.hooks, _CURRENT.checkpoints
    _PATCHES.enter()
    _CURRENT.handler, _CURRENT.hooks, _CURRENT.checkpoints = handler, hooks, True
    try:
        yield
    finally:
        _CURRENT.handler, _CURRENT.hooks, _CURRENT.checkpoints = before
        _PATCHES.leave()


class _Checkpoint:
    """In place of `CheckpointFunction`: runs the function, or applies the original on other threads."""

    original = torch_checkpoint.CheckpointFunction

    @classmethod
    def apply(cls, run: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """Return what `run` returns; without a gradient, as there, if no tensor among `args` requires one."""
        if not _CURRENT.checkpoints:
            return cls.original.apply(run, preserve_rng_state, *args)
        returned = run(*args)
        if any(isinstance(a, Tensor) and (a.requires_grad or is_dual(a)) for a in args):
            return returned
        return pytree.tree_map_only(Tensor, torch.detach, returned)


# Tracing ----------------------------------------------------------------------------------------------------------


@contextmanager
def traced_gradients() -> Generator[None]:
    """For the time of a trace, make every call of a Function and every module's backward hook one node."""
    with TRACING, torch.enable_grad(), intercepted(_traced, _ModuleHooks):
        try:
            yield
        finally:
            _CALLS.calls.clear()


def _traced(function: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Trace a call of a Function as one operator, inside of `apply`."""
    given = arguments_of(function, args)
    ctx, args = args[0] if len(given) < len(args) else None, given
    call, tensors = CustomCall.of(function, args, kwargs, called_at())
    if functorch_is_active():
        raise _untraceable(call, "it is called inside of a transform of torch.func")
    if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in call.leaves):
        raise _untraceable(call, "an argument depends on the batch size")
    with outside_of_trace():
        leaves, structure = inspected(call, tensors)
    values = iter(torch.ops.fxcurv.custom_gradient(tensors, call.key))
    outputs = [next(values) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    _CALLS.calls.append(call)
    at = [j for j, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for j, k in call.overwrites.items():
        outputs[at[j]] = tensors[k].copy_(outputs[at[j]])
    if ctx is not None:
        fixed = [outputs[j] for j, differentiable in zip(at, call.differentiable, strict=True) if not differentiable]
        ctx.mark_non_differentiable(*fixed)
        ctx.mark_dirty(*[tensors[k] for k in call.overwrites.values()])
    return pytree.tree_unflatten(outputs, structure)


def is_dual(t: Tensor) -> bool:
    """Whether a tensor has a derivative in forward mode."""
    return forward_ad.unpack_dual(t).tangent is not None


def arguments_of(function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a forward without the context, which it takes first unless it has `setup_context`."""
    return args[1:] if function.setup_context is SINGLE_LEVEL_FUNCTION.setup_context else args


def inspected(call: CustomCall, tensors: Sequence[Tensor]) -> tuple[list[Any], Any]:
    """Call the Function on copies; set the call's attributes, and return the leaves and structure of the result."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        copies = [leaf.clone() for leaf in leaves]
        versions = [version_of(t) for t in copies]
        returned = call.returned(copies)
    direct = {id(t) for t in (returned if isinstance(returned, tuple) else (returned,))}
    found, structure = pytree.tree_flatten(returned)
    outputs = [t for t in found if isinstance(t, Tensor)]
    call.differentiable = tuple(id(t) in direct and t.requires_grad for t in outputs)
    call.overwrites = {j: k for j, y in enumerate(outputs) for k, x in enumerate(copies) if y is x}
    written = [k for k, (t, version) in enumerate(zip(copies, versions, strict=True)) if version_of(t) != version]
    if set(written) - set(call.overwrites.values()):
        raise _untraceable(call, "its forward changes an argument in place that it does not return")
    return found, structure


def _untraceable(call: CustomCall, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{call.name} cannot be traced: {why}",
        remedy="give it tensors and numbers alone, and return new tensors",
        code="FXC108",
        location=call.location,
    )


class _Calls(threading.local):
    """Calls of the trace of this thread, until its nodes hold them."""

    def __init__(self) -> None:
        self.calls: list[CustomCall] = []


_CALLS = _Calls()


def attach_calls(gm: nn.Module) -> None:
    """Set `meta["custom_call"]` on the nodes of a traced graph and its blocks, which keep the calls alive."""
    for part in gm.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if node.target in (torch.ops.fxcurv.custom_gradient.default, torch.ops.fxcurv.gradient_hook.default):
                node.meta["custom_call"] = call_of(node.args[-1])


# Hooks ------------------------------------------------------------------------------------------------------------


def mark_hook(register: Callable[..., Any], tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
    """Trace `tensor.register_hook(hook)` as a mark of the tensor; hooks on leaves are not part of the graph."""
    handle = register(tensor, hook)
    if not tensor.is_leaf:
        function, tensors = held(hook)
        call, _ = CustomCall.of(Hooked, (TensorHook(function), tensors, tensor), {}, called_at())
        call.differentiable = (True,)
        torch.ops.fxcurv.gradient_hook(tensor, tensors, call.key)
        _CALLS.calls.append(call)
    return handle


class TensorHook(GradientHook):
    """A hook on a tensor: g -> new gradient, or None."""

    def __init__(self, hook: Any) -> None:
        self.hook, self.title = hook, f"hook {title_of(hook)} on a tensor"

    def pull(self, grads: Sequence[Tensor], held: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the new gradient of the tensor."""
        hook = self.hook.rebound(held) if isinstance(self.hook, Held) else self.hook
        return [hook(grads[0])]


class _OnModule(GradientHook):
    """Backward hooks on a module: `at` are the places of the tensors among all arguments or results."""

    kind: str

    def __init__(self, owner: _ModuleHooks, hooks: Sequence[Any], at: Sequence[int], count: int) -> None:
        self.owner, self.hooks, self.at, self.count = owner, hooks, at, count
        self.title = f"{self.kind} {title_of(hooks[0])} on a {type(owner.module).__name__}"

    def pull(self, grads: Sequence[Tensor], held: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the gradients after all hooks."""
        return self._pull(grads, _Unreadable(f"the {self.title}"))

    def _pull(self, grads: Sequence[Tensor], others: Any) -> Sequence[Tensor | None]:
        packed = _packed(self.at, grads, self.count)
        for hook in self.hooks:
            new = self._call(hook, packed, others)
            packed = packed if new is None else tuple(new) if isinstance(new, tuple | list) else (new,)
        return [packed[k] for k in self.at]

    def _call(self, hook: Any, grads: tuple[Any, ...], others: Any) -> Any:
        raise NotImplementedError


class _BeforeModule(_OnModule):
    """Hooks of `register_full_backward_pre_hook`, on the gradients of the module's results."""

    kind = "full backward pre-hook"

    def _call(self, hook: Any, grads: tuple[Any, ...], others: Any) -> Any:
        return hook(self.owner.module, grads)


class _AfterModule(_OnModule):
    """Hooks of `register_full_backward_hook`, on the gradients of the module's arguments; others cannot be read."""

    kind = "full backward hook"

    def probe(self, grads: Sequence[Tensor], held: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """`pull` with random gradients of the module's results, which a hook that changes nothing may read."""
        return self._pull(grads, self.owner.random_results(grads[0]))

    def _call(self, hook: Any, grads: tuple[Any, ...], others: Any) -> Any:
        return hook(self.owner.module, grads, others)


def _packed(at: Sequence[int], values: Sequence[Any], count: int) -> tuple[Any, ...]:
    places = dict(zip(at, values, strict=True))
    return tuple(places.get(k) for k in range(count))


class _Unreadable:
    """In place of the gradients of a module's results: any use raises an error that names the hook."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _refuse(self, *args: Any) -> Any:
        raise refusal(self.name, "it computes the new grad_input from grad_output, past the module")

    __getitem__ = __len__ = __iter__ = __bool__ = __eq__ = __contains__ = _refuse  # pyright: ignore[reportAssignmentType]

    def __getattr__(self, name: str) -> Any:
        return self._refuse()


class _ModuleHooks:
    """In place of torch's `BackwardHook` in a trace: the identity of a module's arguments and results, with hooks."""

    def __init__(self, module: nn.Module, hooks: Sequence[Any], pre_hooks: Sequence[Any]) -> None:
        self.module, self.hooks, self.pre_hooks = module, hooks, pre_hooks
        self.results: list[tuple[Shape, torch.dtype] | None] = []

    def setup_input_hook(self, args: tuple[Any, ...]) -> Any:
        """Return the arguments behind the full backward hooks."""
        return self._through(_AfterModule, self.hooks, args)

    def setup_output_hook(self, result: Any) -> Any:
        """Return the result behind the full backward pre-hooks."""
        several = result if isinstance(result, tuple) else (result,)
        self.results = [(shape_of(r, "output"), r.dtype) if isinstance(r, Tensor) else None for r in several]
        new = self._through(_BeforeModule, self.pre_hooks, several)
        return new if isinstance(result, tuple) else new[0]

    def _through(self, kind: type[_OnModule], hooks: Sequence[Any], values: tuple[Any, ...]) -> Any:
        at = [k for k, value in enumerate(values) if isinstance(value, Tensor)]
        if not hooks or not torch.is_grad_enabled() or not any(values[k].requires_grad for k in at):
            return values
        new = Hooked.apply(kind(self, hooks, at, len(values)), [], *(values[k] for k in at))
        places = dict(zip(at, new, strict=True))
        changed = [places.get(k, value) for k, value in enumerate(values)]
        return tuple(changed) if type(values) is tuple else type(values)(*changed)

    def random_results(self, like: Tensor) -> tuple[Any, ...]:
        """Random gradients of the results, on the device of `like`, for its batch of three samples."""
        generator = torch.Generator(like.device).manual_seed(1)

        def random(shape: Shape, dtype: torch.dtype) -> Tensor:
            drawn = torch.randn(resolve(shape, 3), generator=generator, device=like.device)
            return drawn.to(dtype)

        return tuple(None if result is None else random(*result) for result in self.results)


def check_module_hooks(model: nn.Module) -> None:
    """Raise an error for hooks of `register_backward_hook`, whose gradients depend on the ops of the module."""
    glob = torch_module._global_backward_hooks if torch_module._global_is_full_backward_hook is False else None
    if glob:
        raise refusal(f"the global backward hook {title_of(next(iter(glob.values())))}", _OLD)
    for name, module in model.named_modules():
        if module._backward_hooks and module._is_full_backward_hook is False:
            hook = next(iter(module._backward_hooks.values()))
            raise refusal(f"the backward hook {title_of(hook)} on module {name!r}", _OLD)


_OLD = "it is registered by register_backward_hook, which passes the gradients of the last op, not of the module"
