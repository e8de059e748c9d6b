"""The empirical neural tangent kernel.

K[n,m,c,d] = Σ_θ ⟨∂f(x_n)_c/∂θ, ∂f(x'_m)_d/∂θ⟩ over the trainable parameters (Jacot et al. 2018). Strategies:
"jacobian" forms Jacobians and multiplies them; "structured" multiplies their factors, Σ_st (x_ns x'_mt)
(S_ncs S'_mdt) per layer, and forms no Jacobian (Novak et al. 2022); None uses the cheaper one for each parameter.
"ntvp" takes products with unit vectors: nothing is compiled, so it supports any model that autograd can differentiate
twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxcurv.api import Compiled
from fxcurv.contractions.statistic import Statistic
from fxcurv.core.errors import InputError, QuantityError
from fxcurv.core.torch_compat import pytree
from fxcurv.frontend.cache import programs_of
from fxcurv.frontend.checked_gradients import CustomGradients
from fxcurv.frontend.embeddings import UnscaledGradients
from fxcurv.frontend.inputs import Inputs, Output, as_call, selector, tensors_of
from fxcurv.frontend.isolation import without_autocast
from fxcurv.losses.base import as_loss
from fxcurv.losses.terms import unit_columns
from fxcurv.quantities.factors import Factor, Identity
from fxcurv.quantities.inner_products import StoredColumns, Strategy, products, stored_columns, stored_of
from fxcurv.quantities.protocol import OfEach, ParameterUsage, Sums
from fxcurv.quantities.selection import chosen
from fxcurv.runtime.memory import bytes_of
from fxcurv.runtime.options import Options
from fxcurv.runtime.program import Program
from fxcurv.runtime.run import Gathered, bind, default_columns, pull_back
from fxcurv.tangent_kernel.tiling import KernelInput, Request, Tile, Tiles, tiles_for

__all__ = ["NTK", "ntk"]


KernelKind = Literal["full", "trace", "diagonal"]


How = Literal["jacobian", "structured", "ntvp"]


def ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    kind: KernelKind = "full",
    strategy: How | None = None,
    *,
    memory_budget: int | str | None = None,
) -> Tensor:
    """Return the kernel of two batches (or of one with itself); c and d index the flattened output of one sample.

    `kind` is "full", `[N, M, C, C]`; "diagonal", K[n,m,c,c], `[N, M, C]`; or "trace", Σ_c K[n,m,c,c], `[N, M]`.
    `memory_budget` is as for `fxcurv.compile`. `NTK(model)` is compiled once for many batches, and also gives the
    summand of each parameter. Raises the errors of `compile`.
    """
    kernel = NTK(model, strategy, memory_budget=memory_budget)
    kernel.compiled.programs = programs_of(model)  # several calls share a program
    return kernel(x1, x2, kind)


class NTK:
    """The kernel of a model; its parameters are read at each call.

    A `memory_budget`, as "2GiB" or in bytes, bounds the memory of a call, its result included: the kernel is computed
    in tiles that fit by a forecast (fxcurv/tangent_kernel/tiling.py). A call raises FXC503 before anything runs if the
    budget does not fit the kernel and one column of one sample of each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: How | None = None,
        output: Output = None,
        *,
        memory_budget: int | str | None = None,
    ) -> None:
        if strategy is not None and strategy not in get_args(How):
            _refuse("strategy", strategy, get_args(How))
        if strategy == "ntvp" and memory_budget is not None:
            raise QuantityError(
                "strategy='ntvp' is plain autograd, which does not support a memory budget",
                remedy="choose another strategy, or leave out memory_budget",
                code="FXC409",
            )
        self.model, self.strategy, self.select = model, strategy, selector(output)
        self.budget, self.gradients = bytes_of(memory_budget), CustomGradients()
        self.forced: Strategy | None = None if strategy == "ntvp" else strategy
        self.compiled = Compiled(model, as_loss("mse"), chosen(_OutputColumns(self.forced)), Options(output))
        self._known: WeakKeyDictionary[Program, WeakKeyDictionary[Program, dict[object, Tiles]]] = WeakKeyDictionary()

    def __call__(self, x1: Inputs, x2: Inputs | None = None, kind: KernelKind = "full") -> Tensor:
        """Return the kernel, as `ntk` does."""
        found = self._sums(x1, x2, kind, apart=False)
        if not found:
            raise InputError(
                "the output depends on no trainable parameter", node="output", remedy="see requires_grad", code="FXC207"
            )
        return found[""]

    def of_each(self, x1: Inputs, x2: Inputs | None = None, kind: KernelKind = "full") -> dict[str, Tensor]:
        """Return the summand of the kernel for each parameter."""
        return self._sums(x1, x2, kind, apart=True)

    def _sums(self, x1: Inputs, x2: Inputs | None, kind: KernelKind, apart: bool) -> dict[str, Tensor]:
        """The summand of each parameter by name if `apart`, else their sum under the name ""."""
        if kind not in get_args(KernelKind):
            _refuse("kind", kind, get_args(KernelKind))
        found: dict[str, Tensor] = {}
        if self.strategy == "ntvp":
            for name, K in self._by_products(x1, x2).items():
                block = _reduced(K, kind)
                _add(found, name if apart else "", block, block.shape, (...,))
            return found
        left = KernelInput(self.compiled.verified(x1), x1)
        right = None if x2 is None else KernelInput(self.compiled.verified(x2), x2)
        request = Request(kind != "full", kind == "trace", len(left.program.plan.jobs) if apart else 1, self.forced)
        other, tiles = right or left, self._tiles(left, right, request)
        shape = torch.Size((left.samples, other.samples, left.outputs, other.outputs))
        for name, a, b, K in self._products(left, right, request, tiles):
            block = K.sum(0) if request.traced else K.permute(1, 2, 0) if request.alike else K.permute(1, 3, 0, 2)
            places, key = (a.samples, b.samples, a.columns, b.columns), name if apart else ""
            _add(found, key, block, shape[: block.ndim], places[: block.ndim])
            if right is None and a is not b:
                mirrored, places = block.transpose(0, 1), (b.samples, a.samples, b.columns, a.columns)
                mirrored = mirrored if request.alike else mirrored.transpose(2, 3)
                _add(found, key, mirrored, shape[: block.ndim], places[: block.ndim])
        return found

    def _tiles(self, left: KernelInput, right: KernelInput | None, request: Request) -> Tiles:
        """Tile sizes, cached by batch size."""
        other = right or left
        key = (left.samples, right and right.samples, request)
        known = self._known.setdefault(left.program, WeakKeyDictionary()).setdefault(other.program, {})
        if key not in known:
            known[key] = tiles_for(left, right, request, self.budget)
        return known[key]

    def _products(
        self, left: KernelInput, right: KernelInput | None, request: Request, tiles: Tiles
    ) -> Iterator[tuple[str, Tile, Tile, Tensor]]:
        """The products of every two tiles for each parameter; of every unordered pair for one batch with itself."""
        ours = tiles.of(left)
        for i, a in enumerate(ours):
            L = self._columns(left, a)
            for b in ours[i:] if right is None else tiles.of(right):
                if request.alike and a.columns != b.columns:
                    continue
                R = L if b is a else self._columns(right or left, b)
                for name, columns in L.items():
                    yield name, a, b, products(columns, R[name], request.alike, request.strategy, tiles.room)
                del R
            del L

    def _columns(self, batch: KernelInput, tile: Tile) -> dict[str, StoredColumns]:
        """The stored Jacobian columns of each parameter at a tile."""
        program, (start, stop) = batch.program, (tile.columns.start, tile.columns.stop)
        with torch.no_grad(), without_autocast():
            bind(program.canonical, self.model)
            output, saved, found = program.forward(*tensors_of(batch.part(tile.samples)))
            chunk = default_columns(program, len(output))
            gathered = Gathered(program)
            gathered.add(found)
            for factor in program.backwards:
                columns = (unit_columns(output, at, min(at + chunk, stop)) for at in range(start, stop, chunk))
                pull_back(program, factor, saved, columns, gathered)
            gathered.close()
        sums = gathered.whole
        return {
            job.usage.name: stored_of({name: sums[key] for name, key in job.sums.items()}) for job in program.plan.jobs
        }

    # Products with vectors --------------------------------------------------------------------------------------------

    def product(self, v: Tensor, x1: Inputs, x2: Inputs | None = None) -> Tensor:
        """Return Σ_md K[n,m,c,d] v[m,d], by one vjp and one jvp; `v` and the result have the shapes of the outputs."""
        return self._product(v, x1, x2, self._trainable())

    def _product(self, v: Tensor, x1: Inputs, x2: Inputs | None, wanted: dict[str, Tensor]) -> Tensor:
        parameters = list(wanted.values())
        with torch.enable_grad(), without_autocast(), sdpa_kernel(SDPBackend.MATH):
            y2 = self._output(x1 if x2 is None else x2)
            if v.shape != y2.shape:
                raise InputError(
                    f"a vector of shape {list(v.shape)} for outputs of shape {list(y2.shape)}",
                    remedy="give one number for each output entry",
                    code="FXC411",
                )
            u = torch.autograd.grad(y2, parameters, v, allow_unused=True, materialize_grads=True)
            y1 = self._output(x1)
            self.gradients.require_second()
            w = torch.zeros_like(y1, requires_grad=True)
            pulled: Any = torch.autograd.grad(y1, parameters, w, create_graph=True, allow_unused=True)
            reached = [(g, u_p) for g, u_p in zip(pulled, u, strict=True) if g is not None]
            if not reached:
                return torch.zeros_like(y1)
            gradients, directions = zip(*reached, strict=True)
            return torch.autograd.grad(gradients, w, directions)[0].detach()  # w ↦ Jᵀw is linear: this is J u

    def _by_products(self, x1: Inputs, x2: Inputs | None) -> dict[str, Tensor]:
        """The summand of each parameter, `[N, M, C, C]`, column by column."""
        y2 = self.outputs(x1 if x2 is None else x2)
        units = torch.eye(y2.numel(), dtype=y2.dtype, device=y2.device).view(-1, *y2.shape)
        found: dict[str, Tensor] = {}
        for name, parameter in self._trainable().items():
            K = torch.stack([self._product(e, x1, x2, {name: parameter}).flatten(1) for e in units], -1)
            found[name] = K.unflatten(-1, (len(y2), -1)).transpose(1, 2)
        return found

    def outputs(self, inputs: Inputs) -> Tensor:
        """Return the output of the model, without a graph."""
        with torch.enable_grad(), without_autocast():  # models register hooks on tensors with gradients
            return self._output(inputs).detach()

    def _output(self, inputs: Inputs) -> Tensor:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, as_call(inputs))
        with UnscaledGradients(), self.gradients.checked():
            return self.select(self.model(*args, **kwargs))

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class _OutputColumns(OfEach):
    """The kernel of a batch with itself, `[C·N, C·N]`; only its stored columns are used here."""

    strategy: Strategy | None = None
    factor: Factor = field(default=Identity(), init=False)
    family: str = field(default="ntk", init=False, repr=False)

    def statistics(self, usage: ParameterUsage) -> dict[str, Statistic]:
        return stored_columns(usage, self.strategy)

    def finish(self, usage: ParameterUsage, sums: Sums, samples: int) -> Tensor:
        columns = stored_of(sums)
        return products(columns, columns).flatten(2).flatten(0, 1)


def _reduced(K: Tensor, kind: KernelKind) -> Tensor:
    """The kernel of the given kind, from the full one."""
    if kind == "full":
        return K
    diagonal = K.diagonal(dim1=2, dim2=3)
    return diagonal.sum(2) if kind == "trace" else diagonal


def _add(found: dict[str, Tensor], key: str, block: Tensor, shape: Sequence[int], place: tuple[Any, ...]) -> None:
    """Add `block` at `place` of `found[key]`, a tensor of that shape that is created if missing."""
    if key not in found and block.shape == shape:
        found[key] = block
        return
    if key not in found:
        found[key] = block.new_zeros(shape)
    found[key] = found[key].to(torch.promote_types(found[key].dtype, block.dtype))
    found[key][place] += block


def _refuse(what: str, given: object, choices: tuple[str, ...]) -> None:
    raise QuantityError(f"{what}={given!r}", remedy=f"choose one of {', '.join(choices)}", code="FXC409")
