"""contract: definitions become the cheapest equal contraction, where the graph shows, or a trial proves, that they may.

A statistic has forms (fxcurv/forms.py); which of them apply is read off the graph, and the one that costs least for the
batch at hand is taken. Any form is right for every batch.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv import contractions, forms, kernels
from fxcurv.contractions import Statistic
from fxcurv.costs import Cost, Rates, copying, rates_of
from fxcurv.patches import Patches
from fxcurv.pullback import InputPositions, OutputPositions, PullInputs, PullToParameter
from fxcurv.shapes import resolve
from fxcurv.spec import module_of
from passes.rewrite import instead, rewrites

__all__ = ["Contraction", "Setting", "contract", "together"]


@dataclass(frozen=True)
class Setting:
    """For what the forms are chosen: samples, columns, device and type; a form's name where it is forced.

    Without `loops` no form runs a loop over samples or columns. `trials` remembers what trials showed.
    """

    samples: int
    columns: int
    device: torch.device
    dtype: torch.dtype
    loops: bool = True
    forced: str | None = None
    trials: dict[object, bool] = field(default_factory=dict)

    @property
    def rates(self) -> Rates:
        """How fast the device is."""
        return rates_of(self.device, self.dtype)

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of what a node will hold."""
        sizes: dict[Any, int] = {"V": self.columns, "N": self.samples}
        return resolve(tuple(sizes.get(s, s) if isinstance(s, str) else s for s in node.meta["shape"]), self.samples)


@dataclass(frozen=True)
class Contraction:
    """What was chosen for a statistic; the costs of all forms that apply, and the seconds that they should take."""

    form: str
    costs: Mapping[str, Cost]
    seconds: Mapping[str, float]

    @property
    def others(self) -> dict[str, float]:
        """The seconds of the forms that were not chosen."""
        return {form: seconds for form, seconds in self.seconds.items() if form != self.form}


def contract(gm: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """A forward or backward graph with the cheapest forms."""
    return rewrites(gm, partial(_cheapest, setting=setting), partial(together, setting=setting))


# Forms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """A statistic and what it is called on."""

    statistic: Statistic
    args: tuple[Any, ...]

    @property
    def name(self) -> str:
        return type(self.statistic).__name__


def _cheapest(node: fx.Node, op: nn.Module, setting: Setting) -> fx.Node | None:
    """The cheapest form of a statistic, if that is not the definition that is there."""
    if not isinstance(op, Statistic) or type(op) not in _FORMS:
        return None
    definition = _Form(op, node.args)
    applicable = {form.name: form for form in (definition, *_FORMS[type(op)](op, node, setting))}
    costs = {name: _cost(form, setting) for name, form in applicable.items()}
    seconds = {name: cost.seconds(setting.rates) for name, cost in costs.items()}
    chosen = setting.forced if setting.forced in applicable else min(seconds, key=seconds.__getitem__)
    node.meta["contraction"] = Contraction(chosen, costs, seconds)
    if chosen == definition.name:
        return None
    return instead(node, applicable[chosen].statistic, applicable[chosen].args)


def _cost(form: _Form, setting: Setting) -> Cost:
    """What a form takes, with the patches that are formed for it."""
    cost = form.statistic.cost(*fx.map_arg(form.args, partial(_described, setting=setting)))
    nodes: list[fx.Node] = []
    fx.map_arg(form.args, nodes.append)
    for x in nodes:
        if x.op == "call_module" and isinstance(module_of(x), InputPositions) and _patches_of(x) is not None:
            cost += copying(math.prod(setting.sizes(x)), 4) * 2
    return cost


def _described(node: fx.Node, setting: Setting) -> Tensor:
    """The tensor that a node will hold, without its numbers."""
    return torch.empty(setting.sizes(node), dtype=node.meta.get("dtype", torch.float32), device="meta")


def _of_inputs(op: contractions.InputCovariance, node: fx.Node, setting: Setting) -> Iterator[_Form]:
    xs: Any = node.args[0]
    if len(xs) > 1:
        return
    (x,), (raw,) = xs, xs[0].all_input_nodes
    patches = _patches_of(x)
    if patches is not None and op.pooled and _positions(x).place.parts == 1:
        yield _Form(forms.PooledPatches(patches, op.ones), ([raw],))
    if op.pooled:
        return
    if patches is not None:
        yield _Form(forms.CovarianceOfPatches(patches, op.ones), ([raw],))
    n, s, _, i = setting.sizes(x)
    if n * s < i:
        unfolded = patches is None or op.ones
        yield _Form(forms.KeptInputs(None if unfolded else patches, op.ones), ([x if unfolded else raw],))


def _of_outputs(op: contractions.OutputCovariance, node: fx.Node, setting: Setting) -> Iterator[_Form]:
    Ss: Any = node.args[0]
    v, n, s, _, o = setting.sizes(Ss[0])
    if len(Ss) == 1 and v * n * (1 if op.pooled else s) < o:
        yield _Form(forms.KeptOutputs(op.pooled), (Ss,))


def _of_gram(op: contractions.Gram, node: fx.Node, setting: Setting) -> Iterator[_Form]:
    args: Any = fx.map_arg(node.args, partial(_described, setting=setting))
    rows, side = contractions.entries_of(*args)
    if rows < side:
        yield _Form(forms.KeptEntries(), node.args)


def _of_gradient(op: contractions.Gradient, node: fx.Node, setting: Setting) -> Iterator[_Form]:
    xs, Ss = _uses(node)
    (x, *more), (S, *_) = xs, Ss
    if not more and x is not None and _patches_of(x) is not None:
        conv: Any = _positions(S).op  # that of x may be another with the same patches
        yield _Form(forms.GradientOfConvolution(conv), ([*x.all_input_nodes], [*S.all_input_nodes]))


def _by_convolution(form: Callable[[Any], Statistic], node: fx.Node, setting: Setting) -> Iterator[_Form]:
    """A form that reads the input of a convolution and what arrives at its output, if each sample is one input.

    What it costs is known for the CPU's kernels.
    """
    (x, *more), (S, *_) = _uses(node)
    if more or x is None or setting.device.type != "cpu":
        return
    inputs, outputs = module_of(x), module_of(S)
    if isinstance(inputs, InputPositions) and isinstance(outputs, OutputPositions):  # and not rotated
        if _patches_of(x) is not None and inputs.place.parts == 1:
            yield _Form(form(outputs.op), ([*x.all_input_nodes], [*S.all_input_nodes]))


def _of_diagonal(op: contractions.Diagonal, node: fx.Node, setting: Setting) -> Iterator[_Form]:
    yield from _by_convolution(forms.DiagonalByConvolution, node, setting)
    xs, Ss = _uses(node)
    (x, *more), (S, *_) = xs, Ss
    _, _, s, _, o = setting.sizes(S)
    if not more and s == 1:
        yield _Form(forms.DiagonalOfSinglePositions(), node.args)
    if x is None or None in more or setting.sizes(x)[-1] == o == 1 or not setting.loops:
        return
    if not more:
        yield _Form(forms.DiagonalByPairs(), node.args)
    if setting.forced == forms.DiagonalFused.__name__ or kernels.available(setting.device):
        yield _Form(forms.DiagonalFused(), node.args)
    if setting.device.type == "cpu":
        yield _Form(forms.DiagonalBySample(), node.args)


def _of_columns(op: contractions.Columns, node: fx.Node, setting: Setting) -> Iterator[_Form]:
    yield from _by_convolution(forms.ColumnsByConvolution, node, setting)
    xs, Ss = _uses(node)
    (x, *more), (S, *_) = xs, Ss
    _, _, s, _, o = setting.sizes(S)
    if x is None or more or s == 1 or setting.sizes(x)[-1] == o == 1 or not setting.loops:
        return
    patches = _patches_of(x)
    if patches is not None and _positions(x).place.parts == 1 and setting.device.type == "cpu":
        yield _Form(forms.ColumnsBySample(patches), ([*x.all_input_nodes], Ss))


def _of_norms(op: contractions.SquaredNorms, node: fx.Node, setting: Setting) -> Iterator[_Form]:
    yield from _by_convolution(forms.SquaredNormsByConvolution, node, setting)
    xs: Any = node.args[0]
    if None not in xs:
        yield _Form(forms.SquaredNormsByPairs(), node.args)


def _of_diagonal_per_sample(op: contractions.DiagonalPerSample, node: fx.Node, setting: Setting) -> Iterator[_Form]:
    yield from _by_convolution(forms.DiagonalPerSampleByConvolution, node, setting)
    (x, *more), (S, *_) = _uses(node)
    if not more and setting.sizes(S)[2] == 1:
        yield _Form(forms.DiagonalPerSampleOfSinglePositions(), node.args)
    if not more and x is not None and setting.loops:
        yield _Form(forms.DiagonalPerSampleByPairs(), node.args)


_FORMS: dict[type[Statistic], Callable[[Any, fx.Node, Setting], Iterator[_Form]]] = {
    contractions.InputCovariance: _of_inputs,
    contractions.OutputCovariance: _of_outputs,
    contractions.Gram: _of_gram,
    contractions.Gradient: _of_gradient,
    contractions.Columns: _of_columns,
    contractions.Diagonal: _of_diagonal,
    contractions.DiagonalPerSample: _of_diagonal_per_sample,
    contractions.SquaredNorms: _of_norms,
}


def _uses(node: fx.Node) -> tuple[list[fx.Node | None], list[fx.Node]]:
    """The positions x, S of all uses that a statistic reads."""
    xs: Any = node.args[0]
    Ss: Any = node.args[1]
    return list(xs), list(Ss)


def _positions(x: fx.Node) -> InputPositions | OutputPositions:
    positions = module_of(x)
    assert isinstance(positions, InputPositions | OutputPositions)
    return positions


def _patches_of(x: fx.Node) -> Patches | None:
    """The patches that positions are, if an op unfolds its input."""
    op = _positions(x).op
    return Patches.of(op) if isinstance(op, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


# Columns together -------------------------------------------------------------------------------------------------


def together(node: fx.Node, op: nn.Module, setting: Setting) -> fx.Node | None:
    """Columns (and samples) that autograd pulls back one by one are pulled back at once, if that gives the same.

    torch's batching rules are not right for every operator, so each use of them is tried on random numbers in float64;
    the setting remembers the outcome for equal ops on equal shapes.
    """
    if isinstance(op, PullToParameter) and not op.together:
        candidate: nn.Module = PullToParameter(op.op, op.k, op.places, together=True)
    elif isinstance(op, PullInputs) and not op.together:
        candidate = PullInputs(op.op, op.ks, op.per_sample, together=True)
    else:
        return None
    inputs = tuple((n.meta["shape"], n.meta.get("dtype")) for n in node.all_input_nodes)
    key = (candidate._get_name(), candidate.extra_repr(), op.op.extra_repr(), inputs)
    if key not in setting.trials:
        setting.trials[key] = _equal(op, candidate, node, setting.device)
    return instead(node, candidate, node.args) if setting.trials[key] else None


def _equal(op: nn.Module, candidate: nn.Module, node: fx.Node, device: torch.device) -> bool:
    """Whether two pullbacks agree on random columns and inputs for two samples."""
    generator = torch.Generator().manual_seed(0)
    arguments = fx.map_arg(node.args, lambda n: _random(n, generator).to(device))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # that an operator has no batching rule is only said by a warning
            expected, value = op(*arguments), candidate(*arguments)
    except Exception:  # an operator without a batching rule, or not for float64
        return False
    return all(itertools.starmap(_close, zip(_listed(expected), _listed(value), strict=True)))


def _listed(pulled: Tensor | list[Tensor]) -> list[Tensor]:
    return [pulled] if isinstance(pulled, Tensor) else pulled


def _close(expected: Tensor, value: Tensor) -> bool:
    if value.shape != expected.shape or not expected.numel():
        return value.shape == expected.shape
    scale, error = float(expected.abs().max()), float((value - expected).abs().max())
    if not math.isnan(scale + error):
        return error <= 1e-9 * max(scale, 1.0)
    scale = float(expected.nan_to_num().abs().max())
    return torch.allclose(value, expected, rtol=0, atol=1e-9 * max(scale, 1.0), equal_nan=True)


def _random(node: fx.Node, generator: torch.Generator) -> Tensor:
    shape, dtype = node.meta["shape"], node.meta.get("dtype", torch.float64)
    sizes = resolve(tuple({"V": 2, "N": 2}.get(s, s) if isinstance(s, str) else s for s in shape), 2)
    if dtype.is_complex:
        return torch.randn(sizes, dtype=torch.complex128, generator=generator)
    if not dtype.is_floating_point:
        return torch.zeros(sizes, dtype=dtype)
    return torch.rand(sizes, dtype=torch.float64, generator=generator) + 0.1
