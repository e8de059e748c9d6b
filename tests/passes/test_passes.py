"""Each pass, by the text of a graph before and after it; and the grammar that is checked between them."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, fx, nn

import fxcurv
import passes
from fxcurv.contractions.definitions import SumOfSquares
from fxcurv.contractions.diagonals import DiagonalOfSinglePositions
from fxcurv.frontend.capture import Captured, capture
from fxcurv.ir import backward_ops
from fxcurv.ir.backward_ops import PullInputs
from fxcurv.ir.declare import autograd_pull_each
from fxcurv.ir.grammar import verify
from fxcurv.ir.nodes import module_of, title_of
from fxcurv.quantities.plan import Plan
from fxcurv.quantities.selection import chosen
from passes import pipeline
from passes.augment import augment
from passes.eliminate_identities import fold
from passes.functionalize import functionalize
from passes.infer_batch_axes import locate
from passes.lower import lower
from passes.parameter_usage import bottlenecks, carrying, flow_of, parameter_uses
from passes.plan import plan
from passes.schedule import schedule
from passes.select_algorithms import Setting, contract

CPU = torch.device("cpu")


class Residual(nn.Module):
    """What the pictures below show: a residual block with a functional in-place ReLU, BatchNorm and Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.skip = nn.Conv2d(2, 3, 1)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y += self.skip(x)
        return self.fc(self.drop(torch.relu_(y).mean((2, 3))))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        return Residual().eval()


X = torch.zeros(2, 2, 4, 4)


def planned(model: nn.Module, canonical: fx.GraphModule, quantity: str, wanted: list[str]) -> Plan:
    """The plan of one quantity for the wanted parameters alone."""
    return plan(model, canonical, chosen(quantity).only(wanted))


def text(gm: fx.GraphModule, *columns: str) -> str:
    """The graph's rows as `name = module(args)` with further columns behind."""
    lines = [line.rstrip() for line in fxcurv.tabular(gm, columns, "plain", None).splitlines()[1:]]
    return "\n".join(" ".join(line.split()) for line in lines)


def golden(expected: str) -> str:
    return inspect.cleandoc(expected)


def captured(model: nn.Module, x: Tensor = X) -> Captured:
    raw = capture(model, x)
    return replace(raw, graph=functionalize(raw.graph, raw.sources))


def test_functionalize_makes_in_place_ops_functional(model: nn.Module) -> None:
    assert (
        text(verify(captured(model).graph, "captured"), "target", "args")
        .replace("0.1, 1e-05, False", "...")
        .splitlines()[-9:]
        == golden("""
        aten.conv2d.default (x, p_conv_weight, None, [1, 1], [1, 1])
        aten.batch_norm.default (conv2d, p_bn_weight, p_bn_bias, b_bn_running_mean, b_bn_running_var, False, ...)
        aten.conv2d.default (x, p_skip_weight, p_skip_bias)
        aten.add.Tensor (batch_norm, conv2d_1)
        aten.relu.default (add_,)
        aten.mean.dim (relu_, [2, 3])
        aten.dropout.default (mean, 0.5, False)
        aten.linear.default (dropout, p_fc_weight, p_fc_bias)
        output (linear,)
    """).splitlines()
    )


def test_lower_names_nodes_after_the_model(model: nn.Module) -> None:
    lowered = verify(lower(captured(model), model), "lowered")
    assert text(lowered, "name", "args", "shape", "module", "rule") == golden("""
        x () [N, 2, 4, 4]
        conv (x,) [N, 3, 4, 4] Conv2d affine
        bn (conv,) [N, 3, 4, 4] Affine affine
        skip (x,) [N, 3, 4, 4] Conv2d affine
        add (bn, skip) [N, 3, 4, 4] Add linear
        relu (add,) [N, 3, 4, 4] ReLU elementwise
        mean (relu,) [N, 3] Mean linear
        drop (mean,) [N, 3] Dropout linear
        fc (drop,) [N, 2] Linear affine
        output (fc,)
    """)


def test_fold_drops_what_computes_nothing(model: nn.Module) -> None:
    lowered = lower(captured(model), model)
    before = text(lowered, "name", "args")
    folded = verify(fold(lowered), "lowered")
    assert text(folded, "name", "args").splitlines()[-3:] == ["mean (relu,)", "fc (mean,)", "output (fc,)"]
    assert text(lowered, "name", "args") == before, "a pass changes a copy"


def test_locate_finds_the_axis_of_the_samples() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3, device="meta").to_empty(device="cpu")

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.transpose(0, 1)).mean(0)

    model = Turned()
    located = verify(locate(fold(lower(captured(model, torch.zeros(2, 5, 4)), model)), CPU), "canonical")
    axes = [(node.name, str(node.meta.get("samples"))) for node in located.graph.nodes if node.op != "output"]
    assert axes == [("x", "0"), ("transpose", "1"), ("fc", "1"), ("mean", "0")]


def test_augment_walks_the_rules_in_reverse(model: nn.Module) -> None:
    canonical = passes.canonicalize(model, X)["canonical"]
    augmented = augment(canonical, planned(model, canonical, "diag_ggn", ["conv.weight"]))
    (backward,) = augmented.backwards.values()
    assert text(verify(backward, "backward"), "name", "args", "shape", "module") == golden("""
        s () [V, N, 2]
        saved_fc ()
        saved_mean ()
        saved_relu ()
        saved_add ()
        saved_bn ()
        value_x () [N, 2, 4, 4]
        pull_fc (s, saved_fc) [V, N, 3] Pull(Linear)
        pull_mean (pull_fc, saved_mean) [V, N, 3, 4, 4] Pull(Mean)
        pull_relu (pull_mean, saved_relu) [V, N, 3, 4, 4] Pull(ReLU)
        pull_add_0 (pull_relu, saved_add) [V, N, 3, 4, 4] Pull(Add)
        pull_bn (pull_add_0, saved_bn) [V, N, 3, 4, 4] Pull(Affine)
        s_conv (pull_bn,) [V, N, 16, 1, 3] OutputPositions(Conv2d)
        x_conv (value_x,) [N, 16, 1, 18] InputPositions(Conv2d)
        diag_ggn_conv_weight_diagonal ([x_conv], [s_conv]) SumOfSquares
        output ({'diag_ggn.conv.weight.diagonal': diag_ggn_conv_weight_diagonal},)
    """)


def test_columns_are_carried_as_far_as_they_are_needed(model: nn.Module) -> None:
    canonical = fxcurv.trace(model, X)
    using = {node for ((node, _),) in parameter_uses(canonical, ["skip.weight"]).values()}
    assert {str(node.target) for node in carrying(canonical, using)} == {"skip", "add", "relu", "mean", "fc"}
    assert carrying(canonical, []) == set()


def test_a_bottleneck_is_what_separates_the_lowest_use_from_the_output(model: nn.Module) -> None:
    """The dominators of the lowest use are the nodes without which no path leads from it to the output."""
    canonical = fxcurv.trace(model, X)
    using = {node for uses in parameter_uses(canonical, ["conv.weight", "skip.bias"]).values() for node, _ in uses}
    flow, output = flow_of(canonical), canonical.graph.output_node().all_input_nodes[0]
    conv = next(node for node in canonical.graph.nodes if node.target == "conv")
    between = nx.descendants(flow, conv) - {output}
    separating = [n for n in between if not nx.has_path(nx.restricted_view(flow, [n], []), conv, output)]
    assert bottlenecks(canonical, using) == [n for n in canonical.graph.nodes if n in {conv, output, *separating}]
    assert [str(node.target) for node in bottlenecks(canonical, using)] == ["conv", "bn", "add", "relu", "mean", "fc"]
    assert bottlenecks(canonical, []) == []


def test_augment_stops_where_nothing_below_is_wanted(model: nn.Module) -> None:
    canonical = passes.canonicalize(model, X)["canonical"]
    (backward,) = augment(canonical, planned(model, canonical, "kfac", ["fc.bias"])).backwards.values()
    assert text(backward, "name", "args") == golden("""
        s ()
        s_fc (s,)
        kfac_fc_bias_matrix ([None], [s_fc])
        output ({'kfac.fc.bias.matrix': kfac_fc_bias_matrix},)
    """)


def test_one_pullback_serves_all_quantities_of_a_factor(model: nn.Module) -> None:
    compiled = fxcurv.compile(model, "mse", ["kfac", "diag_ggn_mc", "diag_ggn", "kflr"], example_inputs=X)
    backwards = [name for name in compiled.stages if name.startswith("backward") and ":" not in name]
    assert backwards == ["backward[sampled(1)]", "backward[exact]"]
    for name in backwards:
        pulls = [str(node.target) for node in compiled.stages[name].graph.nodes if str(node.target).startswith("pull.")]
        assert len(pulls) == len(set(pulls)) == 5  # that of bn is part of no pullback: nothing below conv is wanted


def test_contract_squares_single_positions(model: nn.Module) -> None:
    canonical = passes.canonicalize(model, X)["canonical"]
    (backward,) = augment(
        canonical, planned(model, canonical, "diag_ggn", ["fc.weight", "conv.weight"])
    ).backwards.values()
    contracted = verify(contract(backward, Setting(2, 3, torch.device("cpu"), torch.float64)), "backward")
    assert [n.split() for n in text(backward, "name", "module").splitlines() if "diagonal" in n] == [
        ["diag_ggn_conv_weight_diagonal", "SumOfSquares"],
        ["diag_ggn_fc_weight_diagonal", "SumOfSquares"],
    ]
    assert [n.split() for n in text(contracted, "name", "module").splitlines() if "diagonal" in n] == [
        ["diag_ggn_conv_weight_diagonal", "SumOfSquares"],
        ["diag_ggn_fc_weight_diagonal_1", "DiagonalOfSinglePositions"],
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_single_positions_equal_the_definition(bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = None if bias else torch.randn(4, 1, 2, 5, dtype=torch.float64, generator=g)
    S = torch.randn(3, 4, 1, 2, 6, dtype=torch.float64, generator=g)
    torch.testing.assert_close(DiagonalOfSinglePositions()([x], [S]), SumOfSquares()([x], [S]), rtol=1e-12, atol=0)


class Attention(nn.Module):
    """q, k and v read one input; two branches read another, by kernels of equal geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.left, self.right = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.left(x).relu() * self.right(x)).flatten(2).mT
        x = (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
        return self.head(x.mean(1))


def test_what_is_read_alike_is_summed_once() -> None:
    with torch.random.fork_rng(devices=[]):
        model = Attention().double().eval()
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    compiled = fxcurv.compile(model, quantities=["kflr"])
    result = compiled(x, torch.tensor([0, 1, 2]))
    sums = [n for n in compiled.stages["forward"].graph.nodes if str(n.target).startswith("kflr.")]
    assert len(sums) == 3  # of both branches; of q, k and v; of the head
    for group in (("q", "k", "v"), ("left", "right")):
        factors = [result["kflr"][f"{name}.weight"].A for name in group]
        for A in factors[1:]:
            assert torch.equal(A, factors[0])
            assert A.data_ptr() != factors[0].data_ptr()  # results share no memory


def test_a_pool_is_computed_once() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6, 3)).double().eval()
    x = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    compiled = fxcurv.compile(model, quantities=["diag_ggn"], example_inputs=x)
    kinds = [type(module_of(n)).__name__ for n in compiled.stages["forward"].graph.nodes if n.op == "call_module"]
    assert "MaxPool1d" not in kinds
    assert "Gather" in kinds
    assert torch.equal(compiled.stages["forward"](x)[0], model(x))


@pytest.mark.parametrize(("factor", "vectorized"), [(1, True), (2, False)])
def test_columns_are_pulled_back_at_once_where_that_is_equal(
    factor: int, vectorized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pullback of all columns at once that is wrong is found by a trial, and not taken."""

    def pull(*args: Any) -> list[Tensor]:
        return [factor * t for t in autograd_pull_each(*args)]

    monkeypatch.setattr(backward_ops, "pull_together", pull)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 4)).double().eval()
    x, y = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4), torch.tensor([0, 3, 1])
    compiled = fxcurv.compile(model, quantities="grad")
    found = compiled(x, y)["grad"]["0.weight"]
    assert [op.vectorized for n in calls(compiled) if isinstance(op := module_of(n), PullInputs)] == [vectorized]
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [model.get_parameter("0.weight")])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_schedule_takes_sums_early(model: nn.Module) -> None:
    canonical = passes.canonicalize(model, X)["canonical"]
    (backward,) = augment(
        canonical, planned(model, canonical, "diag_ggn", ["fc.weight", "conv.weight"])
    ).backwards.values()
    rows = text(verify(schedule(backward), "backward"), "name").splitlines()
    assert rows[rows.index("s_fc") - 1 : rows.index("pull_mean")] == [
        "x_fc",
        "s_fc",
        "diag_ggn_fc_weight_diagonal",
        "pull_fc",
    ]


class TestGrammar:
    def test_a_functional_call_is_not_canonical(self, model: nn.Module) -> None:
        gm = fxcurv.trace(model, X)
        with gm.graph.inserting_before(gm.graph.output_node()):
            gm.graph.call_function(torch.relu, (next(iter(gm.graph.nodes)),))
        with pytest.raises(fxcurv.SpecError, match="call_function, where only call_module may compute"):
            verify(gm, "canonical")

    def test_a_module_without_a_rule_is_not_canonical(self, model: nn.Module) -> None:
        gm = fxcurv.trace(model, X)
        gm.fc = nn.Bilinear(1, 1, 1, device="meta")
        with pytest.raises(
            fxcurv.SpecError,
            match="node 'fc' call_module fc: not legal in a canonical graph: module type Bilinear has no rule",
        ):
            verify(gm, "canonical")

    def test_an_in_place_operator_is_not_functional(self, model: nn.Module) -> None:
        graph = captured(model).graph
        next(
            n for n in graph.graph.nodes if n.target is torch.ops.aten.relu.default
        ).target = torch.ops.aten.relu_.default
        with pytest.raises(fxcurv.SpecError, match="an in-place operator"):
            verify(graph, "captured")

    def test_a_canonical_graph_is_no_backward_graph(self, model: nn.Module) -> None:
        with pytest.raises(fxcurv.SpecError, match="Conv2d does not belong here"):
            verify(fxcurv.trace(model, X), "backward")


def test_generated_code_is_readable(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = fxcurv.compile(model, example_inputs=X)
    compiled.stages["canonical"].print_readable()
    assert "relu = self.relu(add)" in capsys.readouterr().out
    compiled.print_tabular()
    printed = capsys.readouterr().out
    assert "canonical" in printed
    assert "backward[sampled(1)]" in printed
    with pytest.raises(fxcurv.QuantityError, match="no stage is called 'nope'; the stages are captured, lowered"):
        compiled.print_tabular("nope")


# Scales -----------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Convolutions before BatchNorm, one grouped and with a bias, one read by a second consumer too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.grouped, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.side, self.bn3, self.head = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.grouped(self.bn1(self.stem(x)).relu()))
        side = self.side(x.tanh())
        return self.head((self.bn3(side) + side).mean((2, 3)))


def test_scales_are_folded_into_convolutions() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Normed().double().eval()
        for bn in (model.bn1, model.bn2, model.bn3):
            for t in (bn.weight, bn.bias, bn.get_buffer("running_mean")):
                nn.init.normal_(t)
            nn.init.uniform_(bn.get_buffer("running_var"), 0.5, 2)
    x = torch.randn(3, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2])
    small = fxcurv.compile(copy.deepcopy(model), quantities=["grad"])
    small(x[:1, :, :5, :5], y[:1])
    assert not any("Scaled" in title_of(module_of(n)) for n in calls(small))  # the weight has more entries
    compiled = fxcurv.compile(model, quantities=["kflr", "diag_ggn", "grad"])
    result = compiled(x, y)
    kinds = [title_of(module_of(n)) for n in calls(compiled)]
    assert kinds.count("PullScaled(Conv2d)") == 2  # of the grouped one, in both graphs: the stem's input needs none
    assert kinds.count("Pull(Affine)") == 2  # of bn3 in both graphs: its convolution has another consumer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "EMITTED", tuple(p for p in pipeline.EMITTED if p.name != "fold_scales"))
        other = fxcurv.compile(copy.deepcopy(model), quantities=["kflr", "diag_ggn", "grad"])
        expected = other(x, y)
    assert not any("Scaled" in title_of(module_of(n)) for n in calls(other))
    for entry, unfolded in zip(result.entries, expected.entries, strict=True):
        for name, tensor in entry.tensors().items():
            torch.testing.assert_close(tensor, unfolded.tensors()[name], rtol=1e-11, atol=1e-13)


def calls(compiled: fxcurv.Compiled) -> list[fx.Node]:
    """The calls of all backward graphs."""
    return [n for gm in compiled.program.backwards.values() for n in gm.graph.nodes if n.op == "call_module"]
