"""Forward passes of the original model that record the calls of linear layers and convolutions.

A zero added to the output of a layer receives its cotangent S."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxcurv.core.errors import FxcurvError, InputError
from fxcurv.core.rounding import close
from fxcurv.core.torch_compat import base_of, pytree
from fxcurv.frontend.checked_gradients import CustomGradients
from fxcurv.frontend.copying import check_repeatable, structural_copy
from fxcurv.frontend.custom_gradients import check_module_hooks
from fxcurv.frontend.embeddings import check_embedding
from fxcurv.frontend.inputs import Inputs, Output, as_call, batch_size, selector
from fxcurv.ir import ops
from fxcurv.ir.declare import WeightUsage
from fxcurv.ir.rules import positions, rule_of

__all__: list[str] = []


def same_tensors(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# Forward passes -------------------------------------------------------------------------------------------------------

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


CONVOLUTIONS: Mapping[Any, type[Convolution]] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}


PRODUCTS: Mapping[Any, Sequence[str]] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), ("input", "weight")),
    **dict.fromkeys((torch.addmm, Tensor.addmm), ("bias", "input", "weight")),
}


NORMS = (F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm)


ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class RecordedCall:
    """One call of a linear layer or convolution: its input, its parameters, and the zero `z` added to its output."""

    op: nn.Linear | ops.MatMul | Convolution
    x: Tensor
    weight: str
    bias: str | None
    z: Tensor
    reads: bool
    """Whether the layer's input depends differentiably on the model's inputs."""

    @property
    def _use(self) -> WeightUsage:
        usage = rule_of(self.op).usage
        assert usage is not None
        return usage

    @property
    def in_out(self) -> bool:
        """Whether the weight has in–out layout, `W[i,o]`."""
        return self._use.weight == "in_out"

    def input_positions(self) -> Tensor:
        """x[1,s,g,i]: the layer's input, with all rows as positions of one sample."""
        if isinstance(self.op, nn.Linear | ops.MatMul):
            return positions(self.x.reshape(1, -1, self.x.shape[-1]), lead=1)
        return self._use.x(self.op, self.x).flatten(0, 1).unsqueeze(0)

    def output_positions(self, S: Tensor) -> Tensor:
        """S[1,1,s,g,o]: the cotangent of the layer's output."""
        if isinstance(self.op, nn.Linear | ops.MatMul):
            return positions(S.reshape(1, 1, -1, S.shape[-1]), lead=2)
        batched = S.reshape(1, -1, *S.shape[-len(self.op.kernel_size) - 1 :])
        return self._use.S(self.op, batched).flatten(1, 2).unsqueeze(1)


@dataclass(frozen=True)
class Pulled:
    """One column of the factor, pulled back to every parameter and to the output of every call."""

    gradients: Mapping[str, Tensor]
    reached: Mapping[str, bool]
    calls: Sequence[tuple[RecordedCall, Tensor]]

    def positions(self, weight: str) -> list[Tensor]:
        """S[1,1,s,g,o] at each call of a weight."""
        return [call.output_positions(S) for call, S in self.calls if call.weight == weight]


@dataclass(frozen=True)
class RecordedPass:
    """One forward pass over some samples, with its graph."""

    samples: slice
    output: Tensor
    calls: Sequence[RecordedCall]
    gradients: CustomGradients
    """The custom gradients of the model."""

    @property
    def single(self) -> bool:
        return len(self.output) == 1

    def calls_of(self, weight: str) -> list[RecordedCall]:
        return [call for call in self.calls if call.weight == weight]

    def inputs(self, weight: str) -> list[Tensor]:
        """x[1,s,g,i] at each call of a weight."""
        return [call.input_positions() for call in self.calls_of(weight)]

    def columns(self, S: Tensor) -> Iterator[Tensor]:
        """Split a column `[N, …]` of all samples into one per sample of this pass, zero at the other samples."""
        for n, rows in enumerate(S[self.samples]):
            alone = torch.zeros_like(S[self.samples])
            alone[n] = rows
            yield alone

    def pulled(self, S: Tensor, wanted: Mapping[str, Tensor]) -> Pulled:
        """Pull back the column `S`, which has the output's shape."""
        at = [*wanted.values(), *(call.z for call in self.calls)]
        found = _gradients(self.output, at, S)
        zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(at, found, strict=True)]
        return Pulled(
            dict(zip(wanted, zeros, strict=False)),
            {name: g is not None for name, g in zip(wanted, found, strict=False)},
            list(zip(self.calls, zeros[len(wanted) :], strict=True)),
        )


def _gradients(y: Tensor, at: Sequence[Tensor], S: Tensor) -> Sequence[Tensor | None]:
    """(∂y/∂t)ᵀ S for each tensor t, None if y does not depend on it."""
    return torch.autograd.grad(y, at, S, retain_graph=True, allow_unused=True) if at else ()


def recorded(model: nn.Module, inputs: Inputs, output: Output) -> list[RecordedPass]:
    """Record one pass per sample if samples do not interact, else one pass over the whole batch."""
    check_module_hooks(model)
    copy, select, gradients = structural_copy(model, *model.parameters()), selector(output), CustomGradients()
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    number = batch_size(inputs)

    def forward(samples: slice) -> RecordedPass:
        given = pytree.tree_map_only(Tensor, lambda t: _leaf(t[samples]), as_call(inputs))
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, given)  # the model may write into them
        with _Recorder(names, [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]) as recorder:
            with gradients.checked():
                y = select(copy(*args, **kwargs))
        if not y.requires_grad:
            raise InputError(
                "the output depends on no trainable parameter", node="output", remedy="see requires_grad", code="FXC207"
            )
        found = _gradients(y, [call.z for call in recorder.calls], torch.ones_like(y))
        calls = [call for call, g in zip(recorder.calls, found, strict=True) if g is not None]
        return RecordedPass(samples, y, calls, gradients)

    whole = forward(slice(0, number))
    check_repeatable(model, copy, whole.output, forward(slice(0, number)).output)
    if number == 1:
        return [whole]
    try:
        single = [forward(slice(n, n + 1)) for n in range(number)]
    except FxcurvError:
        raise
    except Exception:  # a model that only takes whole batches may raise anything
        return [whole]
    apart = all(close(one.output.detach(), whole.output[one.samples].detach()) for one in single)
    if apart and gradients:
        apart = _same_gradients(whole, single, [p for p in model.parameters() if p.requires_grad])
    return single if apart else [whole]


def _same_gradients(whole: RecordedPass, single: Sequence[RecordedPass], parameters: Sequence[Tensor]) -> bool:
    """Whether a random cotangent of the batch has the gradient that its samples have alone, in sum."""
    generator = torch.Generator(whole.output.device).manual_seed(0)
    S = torch.randn(whole.output.shape, dtype=whole.output.dtype, device=generator.device, generator=generator)
    each = [_gradients(one.output, parameters, S[one.samples]) for one in single]
    pairs = zip(_gradients(whole.output, parameters, S), zip(*each, strict=True), strict=True)
    return all(
        close(
            torch.stack([torch.zeros_like(p) if g is None else g for g in parts]).sum(0),
            torch.zeros_like(p) if total is None else total,
        )
        for p, (total, parts) in zip(parameters, pairs, strict=True)
    )


def _leaf(t: Tensor) -> Tensor:
    """Return a leaf of autograd's graph with these values."""
    return t.detach().requires_grad_(t.is_floating_point())


class _Recorder(TorchFunctionMode):
    """Records the calls of linear layers and convolutions on the parameters of the given names, by identity."""

    def __init__(self, names: Mapping[int, str], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.names, self.inputs = names, inputs
        self.reading: dict[Any, bool] = {}
        self.calls: list[RecordedCall] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # a Python function that calls linear layers
            with self:
                return _body(func)(*args, **kwargs)
        check_embedding(func, args, kwargs)
        y = func(*args, **kwargs)
        if func in NORMS and y.requires_grad:  # see `autograd_pull_each`
            y.register_hook(torch.Tensor.contiguous)
        if func is not F.linear and func not in CONVOLUTIONS and func not in PRODUCTS:
            return y
        given: dict[str, Any] = {**dict(zip(PRODUCTS.get(func, ARGUMENTS), args, strict=False)), **kwargs}
        weight, swapped = self._weight(given.get("weight"))
        if weight is None or not given.keys().isdisjoint(("alpha", "beta")):
            return y
        z = torch.zeros_like(y, requires_grad=True)
        op, x = _convolution(func, **given) if func in CONVOLUTIONS else (_product(func, swapped), given["input"])
        bias = self.names.get(id(given.get("bias")))
        self.calls.append(RecordedCall(op, x.detach(), weight, bias, z, self._reads(x.grad_fn)))
        return y + z

    def _weight(self, given: Any) -> tuple[str | None, bool]:
        """The name of a given parameter, and whether it is given as its transpose."""
        base = base_of(given)
        if base is None or id(base) not in self.names or base.ndim != 2:
            return self.names.get(id(given)), False
        swapped = given.shape == base.mT.shape and given.stride() == base.mT.stride()
        return (self.names[id(base)], True) if swapped else (None, False)

    def _reads(self, end: Any) -> bool:
        """Whether the autograd graph leads from a node to an input of the model; cached in `reading`."""
        stack = [end]
        while stack:
            node = stack[-1]
            before = [] if node is None else [n for n, _ in node.next_functions]
            new = [n for n in before if n not in self.reading and n is not None]
            if node is not None and node not in self.reading and new:
                stack += new
                continue
            leaf = getattr(node, "variable", None)
            self.reading[node] = any(t is leaf for t in self.inputs) or any(self.reading.get(n, False) for n in before)
            stack.pop()
        return self.reading[end]


def _product(func: Any, swapped: bool) -> nn.Linear | ops.MatMul:
    """The module equivalent to a call with a matrix, or its transpose."""
    return ops.MatMul(1, 1) if (func in PRODUCTS) != swapped else nn.Linear(1, 1, device="meta")


def _body(func: FunctionType) -> FunctionType:
    """Return a Python function of torch without its check for overrides by arguments or modes."""
    plain = {**func.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(func.__code__, plain, func.__name__, func.__defaults__, func.__closure__)


def _convolution(
    func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, **geometry: Any
) -> tuple[Convolution, Tensor]:
    """The module equivalent to a call of a convolution, and its input, batched and padded."""
    kernel = tuple(weight.shape[2:])
    x = input if input.ndim == weight.ndim else input.unsqueeze(0)
    groups, padding = geometry.pop("groups", 1), geometry.pop("padding", 0)
    kind: Any = CONVOLUTIONS[func]
    op = kind(weight.shape[1] * groups, len(weight), kernel, groups=groups, device="meta", **geometry)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, op.dilation, strict=True)]
        return op, F.pad(x, [p for t in reversed(totals) for p in (t // 2, t - t // 2)])
    if padding != "valid":
        each = (padding,) * len(kernel) if isinstance(padding, int) else tuple(padding)
        op.padding = each * len(kernel) if len(each) == 1 else each
    return op, x
