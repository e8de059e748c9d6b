"""select_algorithms: definitions become the cheapest equal algorithm that applies.

A statistic has several algorithms (`fxcurv.contractions`). The graph determines which of them apply; the one with the
least cost for the given batch is selected. Every algorithm is correct for every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.contractions import convolutions, covariances, definitions, diagonals, entries, kernels
from fxcurv.contractions.statistic import Statistic
from fxcurv.convolution.patches import Patches
from fxcurv.convolution.second_moment import ALGORITHMS
from fxcurv.core.errors import QuantityError
from fxcurv.ir.backward_ops import InputPositions, OutputPositions
from fxcurv.ir.nodes import module_of
from fxcurv.ir.rewriting import instead, rewrites
from fxcurv.linalg.cost import Cost, copying
from passes.setting import Setting, matches

__all__ = ["Contraction", "check_algorithms", "contract"]


@dataclass(frozen=True)
class Contraction:
    """The algorithm selected for a statistic; cost and estimated seconds of every algorithm that applies."""

    variant: str
    costs: Mapping[str, Cost]
    seconds: Mapping[str, float]

    @property
    def others(self) -> dict[str, float]:
        """The estimated seconds of the other algorithms."""
        return {variant: seconds for variant, seconds in self.seconds.items() if variant != self.variant}


def contract(gm: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """Return a forward or backward graph with the cheapest algorithms."""
    return rewrites(gm, partial(_cheapest, setting=setting))


def check_algorithms(graphs: Iterable[fx.GraphModule], algorithms: Mapping[str, str]) -> None:
    """Raise a QuantityError (FXC409) for an algorithm that applies to no statistic that its pattern matches."""
    nodes = [node for gm in graphs for node in gm.graph.nodes if "contraction" in node.meta]
    for pattern, name in algorithms.items():
        matched = [node for node in nodes if matches(pattern, str(node.target))]
        applicable = {other for node in matched for other in node.meta["contraction"].costs}
        if name in applicable:
            continue
        if covariances.CovarianceOfPatches.__name__ in applicable:
            applicable |= ALGORITHMS.keys()
        known = ", ".join(sorted({str(node.target) for node in nodes})[:3]) or "none"
        raise QuantityError(
            f"algorithms: {name!r} applies to no statistic that {pattern!r} matches",
            remedy=f"choose one of {', '.join(sorted(applicable))}"
            if applicable
            else f"give a module path, a parameter or a statistic, of which there are {known}",
            code="FXC409",
        )


# Algorithms -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Variant:
    """A statistic and its arguments."""

    statistic: Statistic
    args: tuple[Any, ...]

    @property
    def name(self) -> str:
        return getattr(self.statistic, "algorithm", None) or type(self.statistic).__name__


def _cheapest(node: fx.Node, op: nn.Module, setting: Setting) -> fx.Node | None:
    """Return the cheapest algorithm of a statistic, if it is not the present definition."""
    if not isinstance(op, Statistic) or type(op) not in _VARIANTS:
        return None
    definition = _Variant(op, node.args)
    applicable = {variant.name: variant for variant in (definition, *_VARIANTS[type(op)](op, node, setting))}
    costs = {name: _cost(variant, setting) for name, variant in applicable.items()}
    seconds = {name: cost.seconds(setting.rates) for name, cost in costs.items()}
    asked = (name for name in setting.asked(str(node.target)) if name in applicable)
    chosen = next(asked, None) or min(seconds, key=seconds.__getitem__)
    node.meta["contraction"] = Contraction(chosen, costs, seconds)
    if chosen == definition.name:
        return None
    return instead(node, applicable[chosen].statistic, applicable[chosen].args)


def _cost(variant: _Variant, setting: Setting) -> Cost:
    """Return the cost of an algorithm, with the patches that it reads."""
    cost = variant.statistic.cost(*fx.map_arg(variant.args, partial(_described, setting=setting)))
    nodes: list[fx.Node] = []
    fx.map_arg(variant.args, nodes.append)
    for x in nodes:
        if x.op == "call_module" and isinstance(module_of(x), InputPositions) and _patches_of(x) is not None:
            cost += copying(math.prod(setting.sizes(x)), 4) * 2
    return cost


def _described(node: fx.Node, setting: Setting) -> Tensor:
    """Return the tensor of a node on the meta device, without values."""
    return torch.empty(setting.sizes(node), dtype=node.meta.get("dtype", torch.float32), device="meta")


def _of_inputs(op: definitions.InputCovariance, node: fx.Node, setting: Setting) -> Iterator[_Variant]:
    xs: Any = node.args[0]
    if len(xs) > 1:
        return
    (x,), (raw,) = xs, xs[0].all_input_nodes
    patches = _patches_of(x)
    if patches is not None and op.pooled and _positions(x).place.parts == 1:
        yield _Variant(covariances.PooledPatches(patches, op.ones), ([raw],))
    if op.pooled:
        return
    if patches is not None:
        for name in (None, *ALGORITHMS.keys() & setting.asked(str(node.target))):
            yield _Variant(covariances.CovarianceOfPatches(patches, op.ones, name), ([raw],))
    n, s, _, i = setting.sizes(x)
    if n * s < i:
        unfolded = patches is None or op.ones
        yield _Variant(covariances.KeptInputs(None if unfolded else patches, op.ones), ([x if unfolded else raw],))


def _of_outputs(op: definitions.OutputCovariance, node: fx.Node, setting: Setting) -> Iterator[_Variant]:
    Ss: Any = node.args[0]
    v, n, s, _, o = setting.sizes(Ss[0])
    if len(Ss) == 1 and v * n * (1 if op.pooled else s) < o:
        yield _Variant(covariances.KeptOutputs(op.pooled), (Ss,))


def _of_gram(op: definitions.Gram, node: fx.Node, setting: Setting) -> Iterator[_Variant]:
    args: Any = fx.map_arg(node.args, partial(_described, setting=setting))
    rows, side = entries.entries_of(*args)
    if rows < side:
        yield _Variant(covariances.KeptEntries(), node.args)


def _of_gradient(op: definitions.Gradient, node: fx.Node, setting: Setting) -> Iterator[_Variant]:
    xs, Ss = _uses(node)
    (x, *more), (S, *_) = xs, Ss
    if not more and x is not None and _patches_of(x) is not None:
        conv: Any = _positions(S).op  # the op of x may be another with the same patches
        yield _Variant(convolutions.GradientOfConvolution(conv), ([*x.all_input_nodes], [*S.all_input_nodes]))


def _by_convolution(variant: Callable[[Any], Statistic], node: fx.Node, setting: Setting) -> Iterator[_Variant]:
    """Yield the algorithm on a convolution's input and backpropagated vectors, if each sample is one input.

    Its cost is known for the CPU's kernels.
    """
    (x, *more), (S, *_) = _uses(node)
    if more or x is None or setting.device.type != "cpu":
        return
    inputs, outputs = module_of(x), module_of(S)
    if isinstance(inputs, InputPositions) and isinstance(outputs, OutputPositions):  # not rotated
        if _patches_of(x) is not None and inputs.place.parts == 1:
            yield _Variant(variant(outputs.op), ([*x.all_input_nodes], [*S.all_input_nodes]))


def _of_diagonal(op: definitions.SumOfSquares, node: fx.Node, setting: Setting) -> Iterator[_Variant]:
    yield from _by_convolution(convolutions.DiagonalByConvolution, node, setting)
    xs, Ss = _uses(node)
    (x, *more), (S, *_) = xs, Ss
    _, _, s, _, o = setting.sizes(S)
    if not more and s == 1:
        yield _Variant(diagonals.DiagonalOfSinglePositions(), node.args)
    if x is None or None in more or setting.sizes(x)[-1] == o == 1 or not setting.loops:
        return
    if not more:
        yield _Variant(diagonals.DiagonalByPairs(), node.args)
    if diagonals.DiagonalFused.__name__ in setting.asked(str(node.target)) or kernels.available(setting.device):
        yield _Variant(diagonals.DiagonalFused(), node.args)
    if setting.device.type == "cpu":
        yield _Variant(diagonals.DiagonalBySample(), node.args)


def _of_columns(op: definitions.Columns, node: fx.Node, setting: Setting) -> Iterator[_Variant]:
    yield from _by_convolution(convolutions.ColumnsByConvolution, node, setting)
    xs, Ss = _uses(node)
    (x, *more), (S, *_) = xs, Ss
    _, _, s, _, o = setting.sizes(S)
    if x is None or more or s == 1 or setting.sizes(x)[-1] == o == 1 or not setting.loops:
        return
    patches = _patches_of(x)
    if patches is not None and _positions(x).place.parts == 1 and setting.device.type == "cpu":
        yield _Variant(convolutions.ColumnsBySample(patches), ([*x.all_input_nodes], Ss))


def _of_norms(op: definitions.SquaredNorms, node: fx.Node, setting: Setting) -> Iterator[_Variant]:
    yield from _by_convolution(convolutions.SquaredNormsByConvolution, node, setting)
    xs: Any = node.args[0]
    if None not in xs:
        yield _Variant(diagonals.SquaredNormsByPairs(), node.args)


def _of_diagonal_per_sample(op: definitions.DiagonalPerSample, node: fx.Node, setting: Setting) -> Iterator[_Variant]:
    yield from _by_convolution(convolutions.DiagonalPerSampleByConvolution, node, setting)
    (x, *more), (S, *_) = _uses(node)
    if not more and setting.sizes(S)[2] == 1:
        yield _Variant(diagonals.DiagonalPerSampleOfSinglePositions(), node.args)
    if not more and x is not None and setting.loops:
        yield _Variant(diagonals.DiagonalPerSampleByPairs(), node.args)


_VARIANTS: dict[type[Statistic], Callable[[Any, fx.Node, Setting], Iterator[_Variant]]] = {
    definitions.InputCovariance: _of_inputs,
    definitions.OutputCovariance: _of_outputs,
    definitions.Gram: _of_gram,
    definitions.Gradient: _of_gradient,
    definitions.Columns: _of_columns,
    definitions.SumOfSquares: _of_diagonal,
    definitions.DiagonalPerSample: _of_diagonal_per_sample,
    definitions.SquaredNorms: _of_norms,
}


def _uses(node: fx.Node) -> tuple[list[fx.Node | None], list[fx.Node]]:
    """Return the positions x, S of all uses that a statistic reads."""
    xs: Any = node.args[0]
    Ss: Any = node.args[1]
    return list(xs), list(Ss)


def _positions(x: fx.Node) -> InputPositions | OutputPositions:
    positions = module_of(x)
    assert isinstance(positions, InputPositions | OutputPositions)
    return positions


def _patches_of(x: fx.Node) -> Patches | None:
    """Return the patches that form the positions, if an op unfolds its input."""
    op = _positions(x).op
    return Patches.of(op) if isinstance(op, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None
