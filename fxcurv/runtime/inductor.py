"""inductor: the backends of a program: run its graphs eagerly, or compile them into fused kernels by torch's inductor.

Dynamo captures each graph as a whole and guards its shapes, types and layouts. The model's tensors are inputs of the
compiled code, so new values need no recompilation. Statistics may loop over samples and columns where a temporary of
all of them would not fit, and the batching rules of pullbacks by autograd may fix the batch size. Each of these is one
operator: `fxcurv::statistic` and `fxcurv::pull` call the same module as the eager graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from fxcurv.contractions.statistic import Statistic
from fxcurv.core.errors import FxcurvError
from fxcurv.core.torch_compat import compile_errors, dispatch_keys, with_dispatch_keys
from fxcurv.ir.backward_ops import PullInputs, PullToParameter, Scaled
from fxcurv.ir.custom_gradients import CustomGradient
from fxcurv.ir.nodes import module_of
from fxcurv.runtime.program import Program

__all__ = ["Backend", "built"]


Backend = Literal["eager", "inductor"]


COMPILER = "inductor"
"""The backend of torch.compile."""


def built(program: Program, backend: str) -> Program:
    """Return the program with the graphs of a backend; compilation happens at the first call."""
    if backend == "eager":
        return program
    backwards = {factor: _Kernels(gm) for factor, gm in program.backwards.items()}
    return replace(program, forward=_Kernels(program.forward), backwards=backwards)


class _Kernels:
    """A graph under torch.compile: compiled at the first call, and again for a new shape, type or layout."""

    def __init__(self, graph: Callable[..., Any]) -> None:
        assert isinstance(graph, fx.GraphModule)
        self.run = torch.compile(_outlined(graph).forward, fullgraph=True, backend=COMPILER)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.run(*args, **kwargs)
        except compile_errors() as error:
            raise FxcurvError(
                f"torch.compile fails: {' '.join(str(error).split())[:200]}",
                remedy='use backend="eager"; the cause of this error has the full trace',
                code="FXC413",
            ) from error


# Custom operators -------------------------------------------------------------------------------------------------


def _outlined(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace every statistic and every pullback by autograd with a call of a custom operator."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    modules = {str(n.target): _as_operator(module_of(n)) for n in gm.graph.nodes if n.op == "call_module"}
    return fx.GraphModule(modules, graph, class_name=type(gm).__name__)


def _as_operator(module: nn.Module) -> nn.Module:
    if isinstance(module, Scaled):
        return Scaled(_Sum(module.statistic), module.scale)
    if isinstance(module, Statistic):
        return _Sum(module)
    if isinstance(module, CustomGradient):
        return _Custom(module)
    return _ByAutograd(module) if isinstance(module, PullInputs | PullToParameter) else module


_MODULES: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()
"""Modules of the operators by name. A name determines the computation: kernels cached by inductor contain it."""


_NUMBERS = itertools.count()


def _named(module: nn.Module) -> str:
    """Register a module for the operators, for its lifetime; return its name."""
    op = getattr(module, "op", None)
    parts = [f"{type(m).__qualname__}({m.extra_repr()})" for m in (module, op) if m is not None]
    name = " ".join((*parts, str(next(_NUMBERS))))
    _MODULES[name] = module
    return name


class _Sum(Statistic):
    """A statistic as an operator."""

    def __init__(self, statistic: Statistic) -> None:
        super().__init__()
        self.calls = (statistic,)  # a tuple, since parameters of a submodule would be inputs
        self.reads, self.key, self.scaled = statistic.reads, _named(statistic), statistic.scaled

    def forward(self, *uses: Sequence[Tensor | None]) -> Tensor:
        xs, Ss = {"x": (*uses, []), "S": ([], *uses), "xS": uses}[self.reads]
        return torch.ops.fxcurv.statistic(self.key, list(xs), list(Ss))


class _Custom(nn.Module):
    """An output of a custom gradient as an operator."""

    def __init__(self, op: CustomGradient) -> None:
        super().__init__()
        self.calls = (op,)
        self.key, self.part = op.call.key, op.part

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.ops.fxcurv.custom_gradient(list(xs), self.key)[self.part]


class _ByAutograd(nn.Module):
    """A pullback by autograd, through an opaque op or to a value shared by all samples, as an operator."""

    def __init__(self, pull: nn.Module) -> None:
        super().__init__()
        self.calls = (pull,)
        self.key, self.several = _named(pull), isinstance(pull, PullInputs)

    def forward(self, S: Tensor, saved: Sequence[Tensor]) -> Tensor | list[Tensor]:
        pulled = torch.ops.fxcurv.pull(self.key, S, list(saved))
        return pulled if self.several else pulled[0]


@torch.library.custom_op("fxcurv::statistic", mutates_args=())
def _statistic(key: str, xs: Sequence[Tensor | None], Ss: Sequence[Tensor]) -> Tensor:
    return _sum(key, xs, Ss).contiguous()


@_statistic.register_fake
def _(key: str, xs: Sequence[Tensor | None], Ss: Sequence[Tensor]) -> Tensor:
    """A sum over samples and columns has the shape of one sample and one column."""
    if not cast(Statistic, _MODULES[key]).grows:
        xs, Ss = [None if x is None else x[:1] for x in xs], [S[:1, :1] for S in Ss]
    return _sum(key, xs, Ss).contiguous()


def _sum(key: str, xs: Sequence[Tensor | None], Ss: Sequence[Tensor]) -> Tensor:
    statistic: Any = _MODULES[key]
    return statistic(*{"x": (xs,), "S": (Ss,), "xS": (xs, Ss)}[statistic.reads])


_EAGER = dispatch_keys()
"""Dispatch keys outside of compiled graphs, where autograd works."""


@torch.library.custom_op("fxcurv::pull", mutates_args=())
def _pull(key: str, S: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
    with with_dispatch_keys(_EAGER):
        pulled = _MODULES[key](S, saved)
        several = [pulled] if isinstance(pulled, Tensor) else pulled
        return [t.clone(memory_format=torch.contiguous_format) for t in several]  # never S itself


@_pull.register_fake
def _(key: str, S: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
    """Columns at the inputs, per sample for inputs shared by all samples."""
    pull: Any = _MODULES[key]
    if isinstance(pull, PullInputs):
        lead = S.shape[: 2 if pull.per_sample else 1]
        return [saved[k].new_empty(*lead, *saved[k].shape) for k in pull.ks]
    place = pull.places[-1]
    assert place is not None
    return [saved[pull.k].new_empty(*place.apart(S, lead=1).shape[:2], *saved[pull.k].shape)]
