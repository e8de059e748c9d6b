"""Every private name of torch that fxcurv uses, in one place.

Tested with torch 2.11, 2.12, 2.13 and 2.14 (CPU and CUDA builds). A release that renames one of them is handled here.
Modules that are slow to import (`torch._dynamo`, sympy) are imported inside functions, at the first trace.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake_temporarily
from torch.autograd.function import FunctionMeta as FunctionMeta
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

__all__ = [
    "CALLED",
    "HIGHER_ORDER",
    "SINGLE_LEVEL_FUNCTION",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionMeta",
    "TorchDispatchMode",
    "address_of",
    "autograd_nodes",
    "base_of",
    "compile_errors",
    "custom_function_of",
    "default_store",
    "depends_on_values",
    "dispatch_keys",
    "flops_of",
    "functorch_is_active",
    "gradient_hooks",
    "has_backward_hooks",
    "has_global_hooks",
    "hold",
    "holds",
    "hooks_of",
    "linear_onednn",
    "outside_of_trace",
    "overload_name",
    "pytree",
    "safe_softmax",
    "schema_of",
    "size_conditions",
    "storage_id",
    "unset_fake_temporarily",
    "version_of",
    "with_dispatch_keys",
]


# Operators --------------------------------------------------------------------------------------------------------

HIGHER_ORDER: type = torch._ops.HigherOrderOperator  # pyright: ignore[reportPrivateUsage]
"""The type of operators that call a subgraph."""


def schema_of(function: Any) -> Any:
    """Return the schema of an ATen operator; None for any other function."""
    return getattr(function, "_schema", None)


def overload_name(operator: Any) -> str:
    """Return the overload name of an operator: `Tensor` of aten.add.Tensor."""
    return operator._overloadname


def safe_softmax(x: Tensor, dim: int) -> Tensor:
    """Softmax that is 0 where all entries are -inf."""
    return torch.ops.aten._safe_softmax(x, dim)


def linear_onednn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return a, b -> a bᵀ by oneDNN; None in a build without it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    return lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


# Tensors and modules ----------------------------------------------------------------------------------------------


def storage_id(t: Tensor) -> int:
    """Return an identifier of the tensor's storage, equal for tensors that share it; fake tensors have one too."""
    return t.untyped_storage()._cdata


def version_of(t: Tensor) -> int | None:
    """Return the number of in-place writes to a tensor; None for an inference tensor, which does not count them."""
    return None if t.is_inference() else t._version


def address_of(t: Tensor) -> int | None:
    """Return the address of a tensor's first entry; None for a tensor without memory, as a sparse or fake one."""
    try:
        return t.data_ptr()
    except RuntimeError:
        return None


def base_of(t: Any) -> Tensor | None:
    """Return the base tensor of a view."""
    return getattr(t, "_base", None)


def has_backward_hooks(t: Tensor) -> bool:
    """Whether hooks, which may change the gradient, are registered on a tensor."""
    return bool(getattr(t, "_backward_hooks", None))


def gradient_hooks(t: Tensor) -> list[dict[int, Any]]:
    """Return the hooks on the gradient of a tensor, and on the finished gradient of a leaf, as torch stores them."""
    found = (getattr(t, "_backward_hooks", None), getattr(t, "_post_accumulate_grad_hooks", None))
    return [hooks for hooks in found if hooks]


def autograd_nodes(output: Tensor) -> Iterator[Any]:
    """Yield the nodes of autograd's graph of a tensor, each once, from the output on."""
    seen, queue = set[Any](), deque([output.grad_fn])
    while queue:
        node: Any = queue.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            queue.extend(before for before, _ in node.next_functions)


def custom_function_of(node: Any) -> type | None:
    """Return the `torch.autograd.Function` that made a node of autograd's graph."""
    return getattr(type(node), "_forward_cls", None)


def hold(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer of that name; recurrent layers, which also list their weights, follow."""
    if isinstance(module, nn.RNNBase) and name in module._parameters:
        setattr(module, name, tensor)
    else:
        (module._parameters if name in module._parameters else module._buffers)[name] = tensor  # pyright: ignore


CALLED = ("forward", "_call_impl", "_wrapped_call_impl", "_slow_forward")
"""Methods through which a module is called, and which an attribute of an instance replaces."""


_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def hooks_of(module: nn.Module) -> list[str]:
    """Return the kinds of hooks that are registered on a module."""
    return [kind for name, kind in _HOOKS.items() if getattr(module, name, None)]


def has_global_hooks() -> bool:
    """Whether hooks are registered for the calls of all modules."""
    return any(getattr(torch.nn.modules.module, f"_global{name}", None) for name in _HOOKS)


def holds(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether a module itself holds this tensor as its parameter or buffer of that name."""
    return module._parameters.get(name) is tensor or module._buffers.get(name) is tensor


def flops_of(packet: Any) -> Callable[..., float] | None:
    """Return the function that counts an operator's floating-point operations, if torch has one."""
    from torch.utils.flop_counter import flop_registry

    return flop_registry.get(packet)


# Tracing and compiling --------------------------------------------------------------------------------------------


def depends_on_values(size: torch.SymInt) -> bool:
    """Whether a traced size depends on the values of a tensor."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(size))


def size_conditions(size: Any) -> list[tuple[Any, str, int]]:
    """Return the conditions on traced sizes, each with file and line: SymPy relations of the sizes' symbols."""
    environment = size.node.shape_env if isinstance(size, torch.SymInt) else None
    found: list[tuple[Any, str, int]] = []
    for guard in environment.guards if environment is not None else ():
        frame = getattr(guard.sloc, "user_loc", None) or guard.sloc.framework_loc
        found.append((guard.expr, getattr(frame, "filename", ""), getattr(frame, "lineno", 0)))
    return found


SINGLE_LEVEL_FUNCTION: Any = torch.autograd.function._SingleLevelFunction  # pyright: ignore[reportPrivateUsage]
"""The base class of every autograd.Function."""


def functorch_is_active() -> bool:
    """Whether this is inside of a transform of torch.func, such as vmap."""
    return torch._C._are_functorch_transforms_active()


@contextmanager
def outside_of_trace() -> Generator[None]:
    """Compute with the tensors of a trace without recording it."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
        yield


def compile_errors() -> tuple[type[Exception], ...]:
    """Return the errors of torch.compile."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


def dispatch_keys() -> tuple[Any, Any]:
    """Return the included and excluded dispatch keys of the current thread."""
    return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()  # pyright: ignore[reportPrivateUsage]


def with_dispatch_keys(keys: tuple[Any, Any]) -> AbstractContextManager[Any]:
    """Use these dispatch keys inside the context."""
    return torch._C._ForceDispatchKeyGuard(*keys)  # pyright: ignore[reportPrivateUsage]


# Processes --------------------------------------------------------------------------------------------------------


def default_store() -> Any:
    """Return the key-value store of the default process group."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
