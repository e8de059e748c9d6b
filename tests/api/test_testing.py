"""The public checkers: each passes on what is right, and fails on a deliberate defect, which it names."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import fxcurv
from fxcurv.ir import ops
from fxcurv.ir.backward_ops import Pull
from fxcurv.ir.declare import RULES, Rule
from fxcurv.ir.nodes import module_of
from fxcurv.losses.base import KINDS, Check
from fxcurv.losses.mse import MeanSquaredError
from fxcurv.losses.terms import LossTerms
from fxcurv.testing import Difference, bisect, check_loss, check_quantity, check_rule
from passes import pipeline


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module) -> Any:
    """The module in float64, with parameters of a seed."""
    module = module.to_empty(device="cpu").double()
    for seed, p in enumerate(module.parameters()):
        p.data.copy_(normal(*p.shape, seed=seed + 1) / 2)
    return module.eval()


def meta(build: Any, *args: Any, **options: Any) -> Any:
    """A layer that draws nothing."""
    with torch.device("meta"):
        return build(*args, **options)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = meta(nn.Linear, 4, 5), nn.Sigmoid(), meta(nn.Linear, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.act(h) + h)


@pytest.fixture
def net() -> nn.Module:
    return filled(Net())


X, Y = normal(4, 4), torch.tensor([0, 2, 1, 1])


# Rules ------------------------------------------------------------------------------------------------------------


def matmul() -> nn.Module:
    op = ops.MatMul(3, 2)
    op.weight, op.bias = nn.Parameter(normal(3, 2)), nn.Parameter(normal(2))
    return op


def batch_norm() -> nn.Module:
    op = ops.Affine(normal(2), normal(2).square(), 1e-5)
    op.weight, op.bias = nn.Parameter(normal(2)), nn.Parameter(normal(2))
    return op


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        (nn.Sigmoid(), (normal(4, 3),)),
        (nn.GELU(), (normal(4, 3),)),
        (nn.MaxPool2d(2), (normal(2, 3, 4, 4),)),
        (ops.Mul(), (normal(4, 3), normal(3))),
        (ops.Sub(2), (normal(4, 1), normal(4, 3))),
        (ops.Cat(1), (normal(4, 1), normal(4, 3))),
        (filled(meta(nn.Linear, 3, 2)), (normal(4, 5, 3),)),
        (filled(meta(nn.Conv2d, 4, 6, 3, groups=2)), (normal(3, 4, 5, 5),)),
        (matmul(), (normal(4, 5, 3),)),
        (batch_norm(), (normal(4, 2, 3),)),
        (ops.Detach(), (normal(4, 3),)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_rules_are_right(op: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    check_rule(op, *inputs)


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


def test_a_wrong_derivative_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Rule("elementwise", lambda op, xs, y: 3 * xs[0] ** 2, lambda op, S, slope, k: S * slope, nonlinear=True)
    monkeypatch.setitem(RULES, Cube, right)
    check_rule(Cube(), normal(4, 3))
    monkeypatch.setitem(RULES, Cube, replace(right, save=lambda op, xs, y: 2 * xs[0] ** 2))
    with pytest.raises(AssertionError, match=r"Cube\(\): the pullback to input 0 is off by 0.33, relative"):
        check_rule(Cube(), normal(4, 3))
    check_rule(Cube(), normal(4, 3), tolerance=0.5)
    monkeypatch.setitem(RULES, Cube, replace(right, pull=lambda op, S, slope, k: (S * slope).sum(-1)))
    with pytest.raises(AssertionError, match=r"input 0 has shape \[3, 4\], not \[3, 4, 3\]"):
        check_rule(Cube(), normal(4, 3))


def test_wrong_positions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES[nn.Linear]
    assert rule.usage is not None
    positions = rule.usage.S
    wrong = replace(rule.usage, S=lambda op, S: 2 * positions(op, S))
    monkeypatch.setitem(RULES, nn.Linear, replace(rule, usage=wrong))
    with pytest.raises(AssertionError, match=r"Linear\(.*\): the pullback to weight is off by 1,"):
        check_rule(filled(meta(nn.Linear, 3, 2)), normal(4, 3))


def test_an_op_without_a_rule_is_refused() -> None:
    with pytest.raises(fxcurv.SpecError, match="no rule for module type Cube"):
        check_rule(Cube(), normal(4, 3))


def test_a_rule_of_another_dtype_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one column alone is pulled back in another dtype."""
    right = RULES[nn.Sigmoid]
    for of_one in (False, True):

        def pull(op: Any, S: Tensor, saved: Any, k: int, of_one: bool = of_one) -> Tensor:
            found = right.pull(op, S, saved, k)
            return found.float() if len(S) == 1 or not of_one else found

        monkeypatch.setitem(RULES, nn.Sigmoid, replace(right, pull=pull))
        with pytest.raises(AssertionError, match=r"to input 0 has dtype torch.float32, not torch.float64"):
            check_rule(nn.Sigmoid(), normal(4, 3))


def fail(*_: Any) -> Any:
    raise ValueError("no such case")


BROKEN = [
    ({"pull": lambda *_: None}, "the pullback to input 0", "is None, not a tensor"),
    ({"pull": fail}, "the pullback to input 0", "raised ValueError: no such case"),
    ({"save": fail}, "what the rule saves", "raised ValueError: no such case"),
    (
        {"pull": lambda op, S, slope, k: (S * slope).float()},
        "the pullback to input 0",
        "has dtype torch.float32, not torch.float64",
    ),
]


@pytest.mark.parametrize(("change", "name", "problem"), BROKEN)
def test_a_broken_rule_is_named(net: nn.Module, monkeypatch: Any, change: Any, name: str, problem: str) -> None:
    monkeypatch.setitem(RULES, nn.Sigmoid, replace(RULES[nn.Sigmoid], **change))
    with pytest.raises(AssertionError, match=rf"Sigmoid\(\): {name} {problem}"):
        check_rule(nn.Sigmoid(), normal(4, 3))
    found = bisect(net, X, Y)
    assert found is not None
    assert (found.stage, found.node, found.error, found.problem) == ("rules", "act", math.inf, problem)
    assert str(found).startswith(f"rules: {name} of 'act' Sigmoid [N, 5] {problem}; ")


PADDED = [
    (meta(nn.Conv1d, 2, 3, 3, padding="same"), (3, 2, 6)),
    (meta(nn.Conv2d, 2, 3, 4, padding="same", dilation=(1, 2)), (3, 2, 8, 8)),
    (meta(nn.Conv2d, 2, 4, 3, padding="valid", groups=2), (3, 2, 5, 5)),
    (meta(nn.Conv2d, 2, 3, 3, padding=1, padding_mode="circular", stride=2), (3, 2, 5, 5)),
    (meta(nn.Conv2d, 2, 3, (3, 1), padding=(1, 0), padding_mode="reflect"), (3, 2, 5, 5)),
    (meta(nn.Conv1d, 2, 3, 3, padding="same", padding_mode="circular"), (3, 2, 5)),
    (meta(nn.Conv3d, 1, 2, 2, padding=1, padding_mode="replicate"), (2, 1, 3, 3, 3)),
]


@pytest.mark.parametrize(("op", "shape"), PADDED, ids=str)
def test_convolutions_of_every_padding(op: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    op = filled(op)
    before = dict(vars(op))
    check_rule(op, normal(*shape))
    assert vars(op) == before
    rule = RULES[type(op)]
    assert rule.usage is not None
    usage = replace(rule.usage, x=lambda op, x, positions=rule.usage.x: 2 * positions(op, x))
    monkeypatch.setitem(RULES, type(op), replace(rule, usage=usage))
    with pytest.raises(AssertionError, match="the pullback to weight is off by 1,"):
        check_rule(op, normal(*shape))


@pytest.mark.parametrize(
    ("inputs", "options", "says"),
    [
        ((normal(4, 3),), {"columns": 0}, r"columns=0; give a whole number from 1"),
        ((normal(4, 3),), {"columns": 2.5}, r"columns=2.5; give a whole number"),
        ((normal(4, 3),), {"tolerance": -1.0}, r"tolerance=-1.0; give a finite number"),
        ((normal(4, 3),), {"tolerance": math.nan}, r"tolerance=nan; give a finite number"),
        ((normal(4, 3) / 0,), {}, r"input 0 contains NaN or infinity"),
        ((torch.full((2,), math.nan),), {}, r"input 0 contains NaN or infinity"),
        (
            (torch.ones(4, 3, dtype=torch.int64),),
            {},
            r"Sigmoid\(\) has no floating-point input.*nothing can be checked",
        ),
        ((normal(0, 3),), {}, r"input 0 has no entries"),
        ((3.0,), {}, r"input 0 is a float; give tensors"),
    ],
)
def test_nothing_passes_unchecked(inputs: Any, options: Any, says: str) -> None:
    with pytest.raises(fxcurv.InputError, match=says):
        check_rule(nn.Sigmoid(), *inputs, **options)


# Quantities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantity",
    [fxcurv.KFAC(), fxcurv.KFAC(fxcurv.Exact(), joint=True), fxcurv.EKFAC(), "diag_ggn", "batch_grad", "diag_hessian"],
    ids=str,
)
def test_quantities_are_right(quantity: Any, net: nn.Module) -> None:
    assert check_quantity(quantity, net, "cross_entropy", X, Y) is None


def test_a_refusal_of_autograd_is_passed_on(net: nn.Module) -> None:
    refusal = check_quantity("kfra", net.get_submodule("last"), "cross_entropy", normal(4, 5), Y)
    assert isinstance(refusal, fxcurv.UnsupportedError)
    assert refusal.code == "FXC322"


class PerSample(fxcurv.DiagGGN):
    """A mean over samples, that says that it adds."""

    def finish(self, usage: Any, sums: Any, samples: int) -> Tensor:
        return super().finish(usage, sums, samples) / samples


def test_a_quantity_with_a_wrong_scale_does_not_merge(net: nn.Module) -> None:
    with pytest.raises(AssertionError, match=r"diag_ggn, merged and whole: value of 'first.weight' is off by 1,"):
        check_quantity(PerSample(), net, nn.CrossEntropyLoss(reduction="sum"), X, Y)


def test_a_quantity_that_differs_from_autograd_is_found(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, nn.Sigmoid, replace(RULES[nn.Sigmoid], save=lambda op, xs, y: y))
    with pytest.raises(AssertionError, match=r"diag_ggn, compiled and by autograd: value of 'first.weight' is off by"):
        check_quantity("diag_ggn", net, "cross_entropy", X, Y)


def test_two_quantities_are_refused(net: nn.Module) -> None:
    with pytest.raises(fxcurv.QuantityError, match="there are 2 quantities; give one"):
        check_quantity(["grad", "diag_ggn"], net, "cross_entropy", X, Y)  # pyright: ignore[reportArgumentType]


def test_one_sample_has_no_halves(net: nn.Module) -> None:
    with pytest.raises(fxcurv.InputError, match="one sample"):
        check_quantity("grad", net, "cross_entropy", X[:1], Y[:1])


# Losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "output", "target"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), normal(4, 3), Y),
        (nn.CrossEntropyLoss(ignore_index=2, reduction="sum"), normal(4, 3, 2), torch.stack([Y, 2 - Y], 1)),
        ("mse", normal(4, 3), normal(4, 3, seed=1)),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 2.0, 1.0])), normal(4, 3), normal(4, 3).sigmoid()),
        ("mse", normal(4), normal(4, seed=1)),
        ("bce_with_logits", normal(4), normal(4, seed=1).sigmoid()),
    ],
    ids=["cross_entropy", "positions", "mse", "bce_with_logits", "mse of numbers", "bce of numbers"],
)
def test_losses_are_right(loss: object, output: Tensor, target: Tensor) -> None:
    check_loss(loss, output, target)


@pytest.fixture
def wrong() -> type[MeanSquaredError]:
    """A squared error whose terms are changed by a test."""

    class Wrong(MeanSquaredError):
        name = "wrong"
        changes: ClassVar[dict[str, Any]] = {}

        def compute(self, output: Tensor, target: Tensor) -> tuple[LossTerms, list[Check]]:
            terms, checks = super().compute(output, target)
            change: dict[str, Any] = {key: f(getattr(terms, key)) for key, f in self.changes.items()}
            return replace(terms, **change), checks

    del KINDS["wrong"]  # where it registered itself
    return Wrong


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("value", lambda t: 2 * t, "the value is off by 1"),
        ("gradient", lambda t: -t, "the gradient is off by 2"),
        ("curvature", lambda t: 3 * t, "Σ_v S_v S_vᵀ of the exact columns is off by 2"),
        ("divisor", lambda t: 1.0, "the divisor of two halves is off by 1"),
        ("noise", lambda noise: lambda generator: 2 * noise(generator), r"Σ_v S_v S_vᵀ of sampled\(4000\) is \S+ from"),
    ],
)
def test_a_wrong_loss_is_found(wrong: Any, field: str, change: Any, message: str) -> None:
    wrong.changes[field] = change
    with pytest.raises(AssertionError, match=f"wrong: {message}"):
        check_loss(wrong(nn.MSELoss()), normal(4, 3), normal(4, 3, seed=1))


# Compiled models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_right_model_has_no_difference(net: nn.Module, dtype: torch.dtype) -> None:
    assert bisect(net.to(dtype), X.to(dtype), Y) is None


def test_bisect_names_the_node_with_a_broken_rule(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, nn.Sigmoid, replace(RULES[nn.Sigmoid], save=lambda op, xs, y: y))
    found = bisect(net, X, Y)
    assert isinstance(found, Difference)
    assert (found.stage, found.node) == ("rules", "act")
    assert found.error > 0.1
    said = r"rules: the pullback to input 0 of 'act' Sigmoid \[N, 5\] differs from autograd, relative error \S+; "
    assert re.match(said + r".*test_testing\.py:\d+ in forward$", str(found))


def test_bisect_refuses_the_target_of_another_batch(net: nn.Module) -> None:
    with pytest.raises(fxcurv.InputError, match=r"class indices of shape \[3\] for an output of shape \[4, 3\]"):
        bisect(net, X, Y[:3])


def doubled(gm: fx.GraphModule) -> fx.GraphModule:
    """A pass that pulls back twice as much through the sigmoid."""

    class Doubled(Pull):
        def forward(self, S: Tensor, saved: Any) -> Tensor:
            return 2 * super().forward(S, saved)

    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    for node in graph.find_nodes(op="call_module"):
        pull = module_of(node)
        if isinstance(pull, Pull) and isinstance(pull.op, nn.Sigmoid):
            copy.set_submodule(str(node.target), Doubled(pull.op, pull.k, pull.per_sample))
    return copy


def test_bisect_names_the_broken_pass(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = pipeline.Pass("double_sigmoids", lambda gm, context: doubled(gm))
    monkeypatch.setattr(pipeline, "EMITTED", (*pipeline.EMITTED[:2], broken, *pipeline.EMITTED[2:]))
    found = bisect(net, X, Y)
    assert found is not None
    assert (found.stage, found.node) == ("backward[gradient]:double_sigmoids", "first")
    assert "the gradient of 'first.weight', at 'first' Linear [N, 5], differs from autograd" in str(found)


def test_bisect_names_an_output_that_is_not_the_models(net: nn.Module) -> None:
    def shifted(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if torch.compiler.is_exporting() else (args[0] + 1,)

    net.get_submodule("last").register_forward_pre_hook(shifted)
    found = bisect(net, X, Y)
    assert found is not None
    assert (found.stage, found.node) == ("canonical", "last")
