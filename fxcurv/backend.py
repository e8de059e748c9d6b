"""backend: a program's graphs run as they stand, or are compiled into fused kernels by torch's inductor.

Dynamo reads both graphs in one piece and guards the shapes, types and layouts it compiled for; the model's tensors are
inputs of what it makes, so that later values need nothing new. What loops over samples or columns, because a temporary
of all of them would not fit or torch cannot batch the operator, is one operator to it: `fxcurv::statistic` and
`fxcurv::pull_each` call the very module that the eager graph calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from fxcurv.contractions import Statistic
from fxcurv.errors import FxcurvError, QuantityError
from fxcurv.program import Program
from fxcurv.pullback import Pull, PullToParameter
from fxcurv.spec import module_of

__all__ = ["Backend", "built", "checked"]

Backend = Literal["eager", "inductor"]

COMPILER = "inductor"
"""The backend of torch.compile."""


def checked(backend: str) -> str:
    """A backend that exists."""
    if backend not in get_args(Backend):
        raise QuantityError(
            f"backend={backend!r}", remedy=f"choose one of {', '.join(get_args(Backend))}", code="FXC409"
        )
    return backend


def built(program: Program, backend: str) -> Program:
    """The program whose graphs a backend runs; nothing is compiled before they are called."""
    if backend == "eager":
        return program
    backwards = {factor: _Kernels(gm) for factor, gm in program.backwards.items()}
    return replace(program, forward=_Kernels(program.forward), backwards=backwards)


class _Kernels:
    """A graph as torch.compile runs it: compiled when called, again where a shape, type or layout is new."""

    def __init__(self, graph: Callable[..., Any]) -> None:
        assert isinstance(graph, fx.GraphModule)
        self.run = torch.compile(_outlined(graph), fullgraph=True, backend=COMPILER)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.run(*args, **kwargs)
        except (TorchDynamoException, InductorError) as error:
            raise FxcurvError(
                f"torch.compile fails: {type(error).__name__}: {str(error).splitlines()[0]}",
                remedy='use backend="eager"; the error that this one was raised from has the whole trace',
                code="FXC412",
            ) from error


# What stays one operator ------------------------------------------------------------------------------------------


def _outlined(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with an operator's call in the place of every module that loops over samples or columns."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    modules = {str(n.target): _as_operator(module_of(n)) for n in gm.graph.nodes if n.op == "call_module"}
    return fx.GraphModule(modules, graph, class_name=type(gm).__name__)


def _as_operator(module: nn.Module) -> nn.Module:
    if isinstance(module, Statistic):
        return _Sum(module)
    if isinstance(module, Pull | PullToParameter) and not module.together:
        return _PullEach(module) if isinstance(module, PullToParameter) or module.rule.kind == "opaque" else module
    return module


_MODULES: dict[str, Any] = {}
"""What the operators call, by all that says what it computes: neither these modules nor their ops hold a tensor."""


def _known(module: nn.Module, *parts: object) -> str:
    key = " ".join((type(module).__qualname__, module.extra_repr(), *map(str, parts)))
    return _MODULES.setdefault(key, module) and key


class _Sum(nn.Module):
    """A statistic as an operator."""

    def __init__(self, statistic: Statistic) -> None:
        super().__init__()
        self.reads, self.key = statistic.reads, _known(statistic)

    def forward(self, *uses: Sequence[Tensor | None]) -> Tensor:
        xs, Ss = {"x": (*uses, []), "S": ([], *uses), "xS": uses}[self.reads]
        return torch.ops.fxcurv.statistic(self.key, list(xs), list(Ss))


class _PullEach(nn.Module):
    """A pullback by autograd, one column or sample after the other, as an operator."""

    def __init__(self, pull: Pull | PullToParameter) -> None:
        super().__init__()
        self.key = _known(pull, type(pull.op).__qualname__, pull.op.extra_repr())

    def forward(self, S: Tensor, kept: Sequence[Tensor]) -> Tensor:
        return torch.ops.fxcurv.pull_each(self.key, S, list(kept))


@torch.library.custom_op("fxcurv::statistic", mutates_args=())
def _statistic(key: str, xs: Sequence[Tensor | None], Ss: Sequence[Tensor]) -> Tensor:
    return _sum(key, xs, Ss).contiguous()


@_statistic.register_fake
def _(key: str, xs: Sequence[Tensor | None], Ss: Sequence[Tensor]) -> Tensor:
    """A sum over samples and columns is of the shape that one of each would give."""
    return _sum(key, [None if x is None else x[:1] for x in xs], [S[:1, :1] for S in Ss]).contiguous()


def _sum(key: str, xs: Sequence[Tensor | None], Ss: Sequence[Tensor]) -> Tensor:
    statistic = _MODULES[key]
    return statistic(*{"x": (xs,), "S": (Ss,), "xS": (xs, Ss)}[statistic.reads])


_EAGER = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()  # pyright: ignore[reportPrivateUsage]
"""What operators go through outside of compiled graphs, where autograd works."""


@torch.library.custom_op("fxcurv::pull_each", mutates_args=())
def _pull_each(key: str, S: Tensor, kept: Sequence[Tensor]) -> Tensor:
    with torch._C._ForceDispatchKeyGuard(*_EAGER):  # pyright: ignore[reportPrivateUsage]
        return _MODULES[key](S, kept).contiguous()


@_pull_each.register_fake
def _(key: str, S: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """Columns at an input, of each sample where it is the same for all."""
    pull = _MODULES[key]
    if isinstance(pull, PullToParameter):
        S = pull.places[-1].apart(S, lead=1)
    lead = S.shape[: 2 if isinstance(pull, PullToParameter) or pull.per_sample else 1]
    return kept[pull.k].new_empty(*lead, *kept[pull.k].shape)
