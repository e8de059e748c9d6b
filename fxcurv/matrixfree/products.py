"""Products with curvature matrices and Jacobians of any model over a data set, without a matrix, by autograd.

With f the model's outputs, J their Jacobian and H the loss Hessian at them, a product takes per batch and column a
forward pass with J v in forward mode, and a backward pass. Where torch has no forward mode, J v is the derivative of
Jᵀu, which is linear in u. Nothing is traced. The loss over several batches is the loss of their union: for `mean`, the
sum of all terms over the sum of the batches' divisors. Data are read again for each product, in the same order, so
products are reproducible.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from fxcurv.core.errors import InputError, QuantityError, UnsupportedError
from fxcurv.core.fingerprint import digest
from fxcurv.core.generators import fresh_generator
from fxcurv.core.rounding import close
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.cache import cached, signature
from fxcurv.frontend.checked_gradients import CustomGradients
from fxcurv.frontend.copying import check_repeatable, structural_copy
from fxcurv.frontend.custom_gradients import check_module_hooks
from fxcurv.frontend.embeddings import check_embedding
from fxcurv.frontend.inputs import Inputs, Output, as_call, selector
from fxcurv.frontend.isolation import without_autocast
from fxcurv.linalg.allocation import new_empty
from fxcurv.linalg.operator import LinearOperator, Space
from fxcurv.losses.base import Loss, as_loss
from fxcurv.losses.terms import LossTerms
from fxcurv.matrixfree.forward_mode import carried
from fxcurv.quantities.factors import Empirical, Exact, Factor

__all__ = ["Data", "fisher_operator", "ggn_operator", "hessian_operator", "jacobian_operator"]


Pair = tuple[Inputs, Any]


Data = Pair | Iterable[Pair]
"""One batch `(inputs, target)`, or a re-iterable that yields such pairs, as a DataLoader."""


def ggn_operator(
    model: nn.Module,
    loss: object,
    data: Data,
    *,
    output: Output = None,
    progress: bool = False,
    check_deterministic: bool = False,
) -> LinearOperator:
    """The generalised Gauss-Newton matrix Σ_n J_nᵀ H_n J_n of the trainable parameters (Schraudolph 2002).

    Vectors are flat `[P]`, in `named_parameters()` order, or dicts by name; the unit is the loss's over the square of
    the parameters'. `loss` and `output` are as for `fxcurv.compile`. `progress` shows a bar over batches on a terminal.
    `check_deterministic` first reads the data twice and raises an error if they change (FXC431), as by random
    augmentation. Parameters are read when a product is computed. Raises a FxcurvError for a model in training mode
    whose output changes from call to call, for data that can be read only once, and for an op that torch differentiates
    only once, which FXC301 names.
    """
    return _Middle(_Source(model, data, output, progress, check_deterministic), as_loss(loss), Exact())


def fisher_operator(
    model: nn.Module,
    loss: object,
    data: Data,
    factor: Factor | None = None,
    *,
    generator: torch.Generator | None = None,
    output: Output = None,
    progress: bool = False,
    check_deterministic: bool = False,
) -> LinearOperator:
    """Σ_vn (J_nᵀ S_vn)(J_nᵀ S_vn)ᵀ with the columns S of a factor, by default `fxcurv.Empirical()`.

    The default is the empirical Fisher matrix, the sum of the outer products of each sample's gradient.
    `fxcurv.Sampled(k)` draws k targets per sample from `generator`, the same for each product, and is unbiased for the
    GGN. Otherwise as `ggn_operator`.
    """
    return _Middle(
        _Source(model, data, output, progress, check_deterministic), as_loss(loss), factor or Empirical(), generator
    )


def hessian_operator(
    model: nn.Module,
    loss: object,
    data: Data,
    *,
    output: Output = None,
    progress: bool = False,
    check_deterministic: bool = False,
) -> LinearOperator:
    """The Hessian of the loss in the trainable parameters (Pearlmutter 1994), indefinite; otherwise as the GGN."""
    return _Hessian(_Source(model, data, output, progress, check_deterministic), as_loss(loss))


def jacobian_operator(
    model: nn.Module,
    data: Data,
    *,
    output: Output = None,
    progress: bool = False,
    check_deterministic: bool = False,
) -> LinearOperator:
    """J = ∂f/∂θ, from parameters to all outputs, batch after batch; `.T` is its adjoint. Targets are not read.

    As a dict, an output vector has the name `output`, and the shape `[N, …]` of the outputs if all batches agree in it.
    """
    return _Jacobian(_Source(model, data, output, progress, check_deterministic))


# Passes over the data ---------------------------------------------------------------------------------------------


class _Source:
    """A model and its data: forward passes over all batches, on a copy that shares the parameters."""

    def __init__(self, model: nn.Module, data: Data, output: Output, progress: bool, check: bool) -> None:
        self.model, self.data, self.output, self.quiet = model, data, output, None if progress else True
        self.select = selector(output)
        if isinstance(data, Iterator):
            raise InputError("the data can be read only once", remedy="give a list or a DataLoader", code="FXC110")
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise QuantityError(
                "the model has no trainable parameters", remedy="set requires_grad_(True) on some", code="FXC408"
            )
        self.space = Space({name: tuple(p.shape) for name, p in self.parameters.items()})
        self.carries, self.gradients = True, CustomGradients()
        check_module_hooks(model)
        self._check_once()
        if check:
            self._check_same()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of vectors: the parameters' dtype, or float32 for narrower ones."""
        dtype = torch.float32
        for p in self.parameters.values():
            dtype = torch.promote_types(dtype, p.dtype) if p.dtype.itemsize >= 4 else dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(iter(self.parameters.values())).device

    def passes(self, matrix: Tensor | None = None) -> Iterator[_Pass]:
        """Yield a forward pass per batch, if possible with J times `matrix[P, k]`; free each before the next."""
        copy = cache(lambda: structural_copy(self.model, *self.model.parameters()))
        parameters = list(self.parameters.values())
        for inputs, target in tqdm(self._batches(), "batches", disable=self.quiet):
            found = None if matrix is None else self._carried(inputs, matrix)
            y, images = found or (self._output(copy(), inputs), None)
            if matrix is not None and images is None:
                self.gradients.require_second()
            yield _Pass(y, target, parameters, self.dtype, images)

    def _carried(self, inputs: Inputs, matrix: Tensor) -> tuple[Tensor, Tensor] | None:
        """The output and J times a matrix in forward mode; None from the first failure on, or for custom gradients."""

        def run(copy: nn.Module) -> Tensor:
            return self._output(copy, pytree.tree_map_only(Tensor, torch.clone, inputs))

        def agrees(images: Tensor) -> bool:
            y = run(structural_copy(self.model, *self.model.parameters()))
            expected = _Pass(y, None, parameters, self.dtype).differentiated(matrix[:, :1])
            return close(images[:1], expected, tolerance=math.sqrt(torch.finfo(y.dtype).eps))

        parameters, key = list(self.parameters.values()), ("carries", self.output, signature(self.model, inputs))
        found = (
            carried(self.model, parameters, _columns(matrix, parameters), run)
            if self.carries and not self.gradients
            else None
        )
        self.carries = found is not None and cached(self.model, key, lambda: agrees(found[1]))
        return found if self.carries else None

    def _batches(self) -> Iterator[Pair]:
        data: Any = self.data
        single = isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], tuple | list)
        empty = True
        for inputs, target in [data] if single else data:
            empty = False
            yield pytree.tree_map_only(Tensor, lambda t: t.to(self.device, copy=True), (_call(inputs), target))
        if empty:
            raise InputError("the data hold no batch", remedy="give at least one", code="FXC110")

    def _check_once(self) -> None:
        """Check at the first batch, once per model, that the model's output does not change from call to call."""
        with _session():
            inputs = next(iter(self._batches()))[0]
            key = "repeatable", self.output, signature(self.model, inputs)
            self.gradients = cached(self.model, key, lambda: self._check_repeatable(inputs))

    def _check_repeatable(self, inputs: Inputs) -> CustomGradients:
        """Check the output of two calls; return the model's custom gradients."""
        copy = structural_copy(self.model, *self.model.parameters())  # with gradients: models register hooks
        first, second = (self._output(copy, pytree.tree_map_only(Tensor, torch.clone, inputs)).detach() for _ in "12")
        check_repeatable(self.model, copy, first, second)
        return self.gradients

    def _check_same(self) -> None:
        """Raise an error if a second pass over the data gives other batches than the first."""
        seen: list[list[str]] = []
        for _ in range(2):
            with _session():
                seen.append([digest(batch) for batch in tqdm(self._batches(), "check", disable=self.quiet)])
        first, second = seen
        if first == second:
            return
        if sorted(first) == sorted(second):
            cause = "the order of the data changes when they are read again"
        elif len(first) != len(second):
            cause = f"the data are {len(first)} batches, but {len(second)} when they are read again"
        else:
            k = next(k for k, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
            cause = f"batch {k + 1} of the data changes when they are read again"
        raise InputError(
            cause,
            remedy="shuffle and augment by torch's global generator, which is seeded for each product, or not at all",
            code="FXC431",
        )

    def _output(self, copy: nn.Module, inputs: Inputs) -> Tensor:
        args, kwargs = as_call(inputs)
        with self.gradients.checked():
            return self.select(copy(*args, **kwargs))


def _call(inputs: Any) -> Inputs:
    return tuple(inputs) if isinstance(inputs, list) else inputs


@contextmanager
def _session() -> Generator[None]:
    """Enable gradients, disable autocast, replace ops that are differentiable only once, and seed random numbers.

    A DataLoader that shuffles thus gives the same batches each time; the global state does not change.
    """
    with ExitStack() as stack:
        for part in (torch.enable_grad(), torch.random.fork_rng(devices=[]), without_autocast(), _Twice()):
            stack.enter_context(part)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch.default_generator.manual_seed(0)
        try:
            yield
        except RuntimeError as error:
            op = re.search(r"derivative for (\S+) is not implemented", str(error))
            if op is None:
                raise
            raise UnsupportedError(
                f"torch cannot differentiate the model twice: it has no derivative of {op[1]}",
                remedy="replace the op, or use a quantity of fxcurv.compile",
                code="FXC301",
            ) from error


class _Twice(TorchFunctionMode):
    """Replaces ops that torch differentiates only once by equal ops; refuses embeddings with scaled gradients."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        check_embedding(func, args, kwargs or {})
        if func is not F.hardsigmoid:
            return func(*args, **(kwargs or {}))
        given: dict[str, Any] = {**dict(zip(("input", "inplace"), args, strict=False)), **(kwargs or {})}
        y = F.relu6(given["input"] + 3) / 6
        return given["input"].copy_(y) if given.get("inplace") else y


@dataclass(frozen=True)
class _Pass:
    """The output at one batch, with its graph; and J times the given matrix if forward mode computed it."""

    y: Tensor
    target: Any
    parameters: Sequence[Tensor]
    dtype: torch.dtype
    images: Tensor | None = None

    def jacobian(self, matrix: Tensor) -> Tensor:
        """J times the columns of the given `[P, k]`: `[k, N, …]`."""
        images = self.differentiated(matrix) if self.images is None else self.images
        return images.to(matrix.dtype)

    def differentiated(self, matrix: Tensor) -> Tensor:
        """J times the columns, by differentiating Jᵀu twice."""
        if not self.y.requires_grad:
            return self.y.new_zeros(matrix.shape[1], *self.y.shape)
        u = torch.zeros_like(self.y, requires_grad=True)
        found = torch.autograd.grad(self.y, self.parameters, u, create_graph=True, allow_unused=True)
        zero, columns = torch.zeros_like(self.y), _columns(matrix, self.parameters)
        return torch.stack([_along(found, (u,), v, zero)[0] for v in columns])

    def adjoint(self, columns: Tensor) -> Tensor:
        """Jᵀ times `columns[k, N, …]`: `[P, k]`."""
        if not self.y.requires_grad:
            return self.flat([None] * len(self.parameters) for _ in columns)
        return self.flat(
            torch.autograd.grad(self.y, self.parameters, v, retain_graph=True, allow_unused=True)
            for v in columns.to(self.y.dtype)
        )

    def flat(self, columns: Iterable[Sequence[Tensor | None]]) -> Tensor:
        """Columns of tensors like the parameters, zero where None, as `[P, k]`."""
        size, like = sum(p.numel() for p in self.parameters), self.y.new_empty(0, dtype=self.dtype)
        rows: list[Tensor] = []
        for column in columns:
            pairs = zip(column, self.parameters, strict=True)
            filled = (torch.zeros_like(p) if t is None else t.detach() for t, p in pairs)
            rows.append(torch.cat([t.reshape(-1).to(self.dtype) for t in filled], out=new_empty(like, size)))
        return rows[0].unsqueeze(1) if len(rows) == 1 else torch.stack(rows, 1)


def _columns(matrix: Tensor, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield each column of `[P, k]` as tensors like the parameters."""
    for column in matrix.T:
        parts = column.split([p.numel() for p in parameters])
        yield [t.view_as(p).to(p.dtype) for t, p in zip(parts, parameters, strict=True)]


def _along(ys: Sequence[Tensor | None], xs: Sequence[Tensor], v: Sequence[Tensor], *zeros: Tensor) -> list[Tensor]:
    """Σ (∂y/∂x)ᵀ v over the pairs of y and v for each x, `zeros` where no y depends on it; graphs are retained."""
    pairs = [(y, t) for y, t in zip(ys, v, strict=True) if y is not None and y.requires_grad]
    if not pairs:
        return list(zeros)
    found = torch.autograd.grad([y for y, _ in pairs], xs, [t for _, t in pairs], retain_graph=True, allow_unused=True)
    return [zero if t is None else t.detach() for t, zero in zip(cast(Any, found), zeros, strict=True)]


# Operators --------------------------------------------------------------------------------------------------------


class _OverData(LinearOperator):
    """A symmetric operator, the sum over batches, divided by the sum of the losses' divisors."""

    def __init__(self, source: _Source, loss: Loss) -> None:
        self.source, self.loss = source, loss
        self.domain = self.codomain = source.space
        self.dtype, self.device = source.dtype, source.device

    def _mm(self, matrix: Tensor) -> Tensor:
        total, divisors, given, matrix = None, 0.0, matrix.dtype, matrix.to(self.dtype)
        with _session():
            self._begin()
            for one in self._passes(matrix):
                terms = self.loss.terms(one.y.detach(), one.target)
                product = self._product(one, terms, matrix).mul_(float(terms.divisor))
                total = product if total is None else total.add_(product)
                divisors += float(terms.divisor)
        assert total is not None  # there is at least one batch
        return (total.div_(divisors) if self.loss.reduction == "mean" else total).to(given)

    def _begin(self) -> None:
        """Prepare a product, before its first batch."""

    def _passes(self, matrix: Tensor) -> Iterator[_Pass]:
        """The forward passes of a product."""
        return self.source.passes()

    def _product(self, one: _Pass, terms: LossTerms, matrix: Tensor) -> Tensor:
        """The product for one batch."""
        raise NotImplementedError


class _Middle(_OverData):
    """Jᵀ M J with the loss Hessian as M, or Σ_v S_vn S_vnᵀ for the columns of another factor."""

    def __init__(self, source: _Source, loss: Loss, factor: Factor, generator: torch.Generator | None = None) -> None:
        super().__init__(source, loss)
        self.factor, self.generator = factor, (generator or fresh_generator(self.device)).clone_state()
        self.state = self.generator.get_state()

    def _begin(self) -> None:
        self.generator.set_state(self.state)

    def _passes(self, matrix: Tensor) -> Iterator[_Pass]:
        return self.source.passes(matrix)

    def _product(self, one: _Pass, terms: LossTerms, matrix: Tensor) -> Tensor:
        v = one.jacobian(matrix).to(terms.gradient.dtype)
        return one.adjoint(terms.hessian(v) if isinstance(self.factor, Exact) else self._of_columns(terms, v))

    def _of_columns(self, terms: LossTerms, v: Tensor) -> Tensor:
        """Σ_v S_vn (S_vn · v_n) for every sample n of `v[k, N, …]`."""
        total, flat = torch.zeros_like(v).flatten(2), v.flatten(2)
        for S in terms.columns(self.factor, 1, self.generator):
            column = S[0].flatten(1)
            total += (flat * column).sum(2, keepdim=True) * column
        return total.view_as(v)


class _Hessian(_OverData):
    """The Hessian, by differentiating the gradient."""

    def _product(self, one: _Pass, terms: LossTerms, matrix: Tensor) -> Tensor:
        self.source.gradients.require_second()
        value = self.loss.value(one.y, one.target)
        gradient = torch.autograd.grad(value, one.parameters, create_graph=True, allow_unused=True)
        zeros = [torch.zeros_like(p) for p in one.parameters]
        return one.flat(_along(gradient, one.parameters, v, *zeros) for v in _columns(matrix, one.parameters))


class _Jacobian(LinearOperator):
    """The Jacobian, from parameters to the outputs of all batches."""

    def __init__(self, source: _Source) -> None:
        self.source, self.domain = source, source.space
        self.dtype, self.device = source.dtype, source.device
        with _session():
            shapes = [one.y.shape for one in source.passes()]
        alike = len({shape[1:] for shape in shapes}) == 1
        rows = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if alike else (sum(map(math.prod, shapes)),)
        self.codomain = Space({"output": tuple(rows)})

    def _mm(self, matrix: Tensor) -> Tensor:
        with _session():
            found = [one.jacobian(matrix).flatten(1).T for one in self.source.passes(matrix)]
        return torch.cat(found)

    def _rmm(self, matrix: Tensor) -> Tensor:
        total, start = matrix.new_zeros(self.domain.numel, matrix.shape[1]), 0
        with _session():
            for one in self.source.passes():
                rows = matrix[start : start + one.y.numel()].T.reshape(-1, *one.y.shape)
                total, start = total + one.adjoint(rows), start + one.y.numel()
        return total
