"""What compile() promises: live parameters, any batch, layout and type, a row per parameter, reproducible samples."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.frontend.inputs import Output
from fxcurv.losses.base import as_loss, loss_terms


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
        return nn.Sequential(*layers).to(dtype).eval()


def batch(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 2, 4, 4, generator=g, dtype=torch.float64).to(dtype), torch.randint(3, (n,), generator=g)


def diagonals(model: nn.Module, x: Tensor, y: Tensor, loss: object = "cross_entropy") -> dict[str, Tensor]:
    return dict(fxcurv.compile(model, loss, "diag_ggn")(x, y)["diag_ggn"])


def test_one_compile_serves_every_batch_size() -> None:
    model = net()
    compiled = fxcurv.compile(model, quantities=["diag_ggn"], example_inputs=batch(4)[0])
    program = compiled.prepare(batch(4)[0])
    for n in (1, 2, 3, 5, 8):
        x, y = batch(n)
        assert compiled.prepare(x) is program
        expected = reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)
        for name, value in compiled(x, y)["diag_ggn"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_parameters_are_read_when_called() -> None:
    model, (x, y) = net(), batch(3)
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    compiled(x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    norm.running_mean += 1
    expected = reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)
    for name, value in compiled(x, y)["diag_ggn"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_buffers_in_expressions_with_constants_are_read_when_called() -> None:
    class Shifted(nn.Module):
        shift: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.register_buffer("shift", torch.zeros(2, 1, 1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + self.shift * torch.tensor([[[1.0]], [[-2.0]]], dtype=torch.float64))

    model, (x, y) = Shifted().eval(), batch(3)
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    compiled(x, y)
    model.shift += 1
    expected = reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)
    for name, value in compiled(x, y)["diag_ggn"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_replaced_parameters_and_types_are_followed() -> None:
    model, (x, y) = net(), batch(3)
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    compiled(x, y)
    model[5].weight = nn.Parameter(torch.ones(3, 16, dtype=torch.float64))  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    expected = reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)
    torch.testing.assert_close(compiled(x, y)["diag_ggn"]["0.weight"], expected["0.weight"], rtol=1e-9, atol=1e-12)
    model.float()
    assert compiled(x.float(), y)["diag_ggn"]["0.weight"].dtype == torch.float32
    model.double()
    model.requires_grad_(False)[5].requires_grad_(True)
    assert compiled(x, y)["diag_ggn"].status == {
        name: "exact" if name.startswith("5") else "frozen" for name, _ in model.named_parameters()
    }


def test_input_size_may_change() -> None:
    with torch.random.fork_rng():
        model = (
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
            .double()
            .eval()
        )
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    for size in (5, 7, 5):
        x, y = (
            torch.randn(2, 2, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
            torch.tensor([0, 1]),
        )
        expected = reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)
        torch.testing.assert_close(compiled(x, y)["diag_ggn"]["0.weight"], expected["0.weight"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "sliced"])
def test_memory_layouts_make_no_difference(layout: str) -> None:
    model, (x, y) = net(), batch(3)
    variants = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": x[:1].expand(3, -1, -1, -1),
        "sliced": torch.cat([x, x], 1)[:, ::2],
    }
    compiled = fxcurv.compile(model, quantities=["diag_ggn", "kflr"])
    given, plain = compiled(variants[layout], y), compiled(variants[layout].contiguous(), y)
    for name in plain["diag_ggn"]:
        torch.testing.assert_close(given["diag_ggn"][name], plain["diag_ggn"][name], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(given["kflr"][name].dense(), plain["kflr"][name].dense(), rtol=1e-12, atol=1e-15)


def test_single_precision_is_accurate_and_half_precision_is_widened() -> None:
    x, y = batch(4)
    exact = fxcurv.compile(net(), quantities=["diag_ggn", "kflr"])(x, y)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        result = fxcurv.compile(net(dtype), quantities=["diag_ggn", "kflr"])(x.to(dtype), y)
        assert result.output.dtype == dtype
        for name, expected in exact["diag_ggn"].items():
            value = result["diag_ggn"][name]
            assert value.dtype == torch.float32
            assert (value - expected).norm() <= tolerance * expected.norm()
            block = result["kflr"][name].dense()
            assert block.dtype == torch.float32
            assert (block - exact["kflr"][name].dense()).norm() <= tolerance * block.norm()


def test_a_cast_inside_the_model() -> None:
    class Widened(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.net = net(dtype)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).double().tanh()

    model, (x, y) = Widened(torch.float32).eval(), batch(3, torch.float32)
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    value = compiled(x, y)["diag_ggn"]["net.0.weight"]
    assert "Cast" in fxcurv.tabular(compiled.stages["canonical"])
    expected = reference.diag_ggn(Widened(torch.float64).eval(), nn.CrossEntropyLoss(), x.double(), y)["net.0.weight"]
    assert (value - expected).norm() <= 1e-5 * expected.norm()


def test_batches_add_up() -> None:
    """With reduction "sum" the curvature of a batch is the sum over its parts."""
    model, (x, y) = net(), batch(6)
    loss = nn.CrossEntropyLoss(reduction="sum")
    compiled = fxcurv.compile(model, loss, ["diag_ggn", "kflr"])
    whole, parts = compiled(x, y), [compiled(x[:4], y[:4]), compiled(x[4:], y[4:])]
    for name in whole["diag_ggn"]:
        torch.testing.assert_close(
            whole["diag_ggn"][name], sum(p["diag_ggn"][name] for p in parts), rtol=1e-10, atol=1e-14
        )
    for factor, weights in (("G", (1, 1)), ("A", (4 / 6, 2 / 6))):
        total = sum(w * getattr(p["kflr"]["0.weight"], factor) for w, p in zip(weights, parts, strict=True))
        torch.testing.assert_close(getattr(whole["kflr"]["0.weight"], factor), total, rtol=1e-10, atol=1e-14)


def test_sampling_is_reproducible_and_leaves_the_callers_state() -> None:
    model, (x, y) = net(), batch(64)  # so many that two draws are never equal by chance
    compiled = fxcurv.compile(model, quantities=["kfac", "diag_ggn_mc"])
    a, b = (compiled(x, y, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    other = compiled(x, y, generator=torch.Generator().manual_seed(8))
    assert torch.equal(a["kfac"]["0.weight"].G, b["kfac"]["0.weight"].G)
    assert torch.equal(a["diag_ggn_mc"]["0.weight"], b["diag_ggn_mc"]["0.weight"])
    assert not torch.equal(a["kfac"]["0.weight"].G, other["kfac"]["0.weight"].G)
    assert not torch.equal(compiled(x, y)["kfac"]["0.weight"].G, compiled(x, y)["kfac"]["0.weight"].G)


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double()), torch.tensor([0, 2, 1])),
        (nn.MSELoss(), torch.zeros(3, 3).double()),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]).double()), torch.tensor([[1.0, 0.0, 1.0]] * 3).double()),
    ],
    ids=["cross_entropy", "mse", "bce"],
)
def test_sampled_columns_have_the_hessian_as_their_expectation(loss: nn.Module, target: Tensor) -> None:
    output = torch.tensor([[1.0, 0.0, -1.0], [0.2, 0.1, 0.0], [2.0, -3.0, 0.5]]).double()
    terms = loss_terms(loss, output, target)
    k = 40_000
    columns = torch.cat(list(terms.columns(fxcurv.Sampled(k), 5_000, torch.Generator().manual_seed(0))))
    mean = torch.einsum("vnc,vnd->ncd", columns, columns)
    exact = reference.loss_hessians(loss, output, target)
    assert (mean - exact).norm() <= 0.03 * exact.norm()
    across = torch.einsum("vc,vd->cd", columns[:, 0], columns[:, 1])
    assert across.norm() <= 0.03 * exact.norm(), "samples are drawn independently"


def test_sampled_quantities_use_their_columns() -> None:
    """KFAC and the diagonal of a sampled factor equal the oracle's, given the very columns that were drawn."""
    model, (x, y) = net(), batch(3)
    loss = nn.CrossEntropyLoss()
    result = fxcurv.compile(model, loss, [fxcurv.KFAC(fxcurv.Sampled(4)), fxcurv.DiagGGN(fxcurv.Sampled(4))])(
        x, y, generator=torch.Generator().manual_seed(3)
    )
    terms = loss_terms(loss, reference.outputs(model, x), y)
    (columns,) = terms.columns(fxcurv.Sampled(4), 4, torch.Generator().manual_seed(3))
    factors, diagonal = reference.kfac(model, x, columns), reference.diagonal(model, x, columns)
    for name, (A, G) in factors.items():
        torch.testing.assert_close(result["kfac"][name].A, A, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(result["kfac"][name].G, G, rtol=1e-9, atol=1e-13)
    for name, value in diagonal.items():
        torch.testing.assert_close(result["diag_ggn"][name], value, rtol=1e-9, atol=1e-13)


def test_columns_are_chunked_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = net(), batch(3)
    whole = fxcurv.compile(model, quantities=["diag_ggn", "kflr"])(x, y)
    monkeypatch.setattr("fxcurv.runtime.run.COLUMN_BYTES", 1)
    monkeypatch.setattr("fxcurv.contractions.entries.CHUNK", 1)
    single = fxcurv.compile(model, quantities=["diag_ggn", "kflr"])(x, y)
    for name in whole["diag_ggn"]:
        torch.testing.assert_close(single["diag_ggn"][name], whole["diag_ggn"][name], rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(single["kflr"][name].dense(), whole["kflr"][name].dense(), rtol=1e-11, atol=1e-15)


class Returns(nn.Module):
    """The network, whose output comes in a container."""

    def __init__(self, container: type) -> None:
        super().__init__()
        self.net, self.container = net(), container

    def forward(self, x: Tensor) -> object:
        y = self.net(x)
        return (x, y) if self.container is tuple else {"hidden": x, "logits": y}


@pytest.mark.parametrize(
    ("container", "output"), [(tuple, 1), (tuple, -1), (tuple, lambda returned: 1 * returned[1]), (dict, "logits")]
)
def test_output_selects_a_tensor(container: type, output: Output) -> None:
    model, (x, y) = Returns(container), batch(3)
    result = fxcurv.compile(model, quantities="diag_ggn", output=output)(x, y)
    expected = fxcurv.compile(model.net, quantities="diag_ggn")(x, y)
    assert torch.equal(result["diag_ggn"]["net.0.weight"], expected["diag_ggn"]["0.weight"])


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.net(a + 2 * b)

    model, (x, y) = Two(), batch(3)
    expected = fxcurv.compile(model.net, quantities="diag_ggn")(x + 2 * x.flip(0), y)["diag_ggn"]["0.weight"]
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    assert torch.equal(compiled((x, x.flip(0)), y)["diag_ggn"]["net.0.weight"], expected)
    assert torch.equal(compiled({"b": x.flip(0), "a": x}, y)["diag_ggn"]["net.0.weight"], expected)


def test_losses_by_name_module_and_function() -> None:
    model, (x, y) = net(), batch(3)
    results = [
        diagonals(model, x, y, loss)["0.weight"]
        for loss in ("cross_entropy", nn.CrossEntropyLoss(), nn.functional.cross_entropy)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert isinstance(as_loss("mse").module, nn.MSELoss)


def test_result_in_named_parameters_order_with_everything_at_hand(tmp_path: Path) -> None:
    model, (x, y) = net(), batch(3)
    loss = nn.CrossEntropyLoss(reduction="sum")
    result = fxcurv.compile(model, loss, ["kfac", "diag_ggn"])(x, y)
    assert list(result) == ["kfac", "diag_ggn"]
    assert list(result["kfac"]) == list(result["diag_ggn"]) == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(result.loss, loss(model(x), y).detach())
    torch.testing.assert_close(result.output, model(x).detach())
    block = result["kfac"]["0.weight"]
    assert (block.shape, block.status, block.reduction, block.parameters) == (
        (4, 2, 3, 3),
        "exact",
        "sum",
        ("0.weight",),
    )
    assert (block.A.shape, block.G.shape) == ((18, 18), (4, 4))
    assert "0.weight" in result.table()
    assert "<table>" in result._repr_html_()
    plain = result.to_dict()
    assert plain["quantities"]["kfac"]["0.weight"]["tensors"]["A"] is block.A
    assert plain["loss"] == result.loss.item()
    restored = pickle.loads(pickle.dumps(result))
    assert torch.equal(restored["kfac"]["0.weight"].A, block.A)
    pytest.importorskip("safetensors")
    from safetensors import safe_open

    result.save(tmp_path / "curvature.safetensors")
    with safe_open(tmp_path / "curvature.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("kfac/0.weight/A"), block.A)
        assert file.metadata()["kfac/0.weight"] == "exact"


def test_joint_blocks_cover_weight_and_bias() -> None:
    model, (x, y) = net(), batch(3)
    result = fxcurv.compile(model, quantities=fxcurv.KFAC(fxcurv.Exact(), joint=True))(x, y)["kfac"]
    assert result["5.weight"] is result["5.bias"]
    assert (result["5.weight"].shape, result["5.weight"].parameters) == ((3, 17), ("5.weight", "5.bias"))
    model[5].bias.requires_grad_(False)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue, reportAttributeAccessIssue]
    assert fxcurv.compile(model, quantities=fxcurv.KFAC(fxcurv.Exact(), joint=True))(x, y)["kfac"][
        "5.weight"
    ].shape == (3, 16)


def test_two_quantities_of_one_family_both_have_a_name() -> None:
    model, (x, y) = net(), batch(3)
    result = fxcurv.compile(model, quantities=["kfac", fxcurv.KFAC(fxcurv.Exact(), approx="reduce"), "kfac"])(x, y)
    assert list(result) == ["kfac", "kfac_1"]


def test_large_vectors_get_a_named_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcurv.quantities.DENSE_LIMIT", 3)
    model, (x, y) = net(), batch(3)
    result = fxcurv.compile(model, quantities=["kflr", "diag_ggn"])(x, y)
    assert result["kflr"].status["1.weight"] == "approx(diagonal)"
    assert result["kflr"].status["5.bias"] == "exact"
    assert torch.equal(result["kflr"]["1.weight"].diag(), result["diag_ggn"]["1.weight"])


def test_a_compiled_object_survives_deepcopy() -> None:
    model, (x, y) = net(), batch(3)
    compiled = fxcurv.compile(model, quantities="diag_ggn")
    before = compiled(x, y)["diag_ggn"]["0.weight"]
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        model[0].weight.zero_()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert torch.equal(twin(x, y)["diag_ggn"]["0.weight"], before)


def test_the_tracer_alone() -> None:
    model, (x, _) = net(), batch(3)
    gm = fxcurv.trace(model, x)
    assert {node.op for node in gm.graph.nodes} == {"placeholder", "call_module", "output"}
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
    assert gm.get_submodule("0").weight is model[0].weight
    assert isinstance(gm.get_submodule("0"), nn.Conv2d)
    assert {name for name, _ in gm.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_statuses_are_known_without_running() -> None:
    model, (x, _) = net(), batch(2)
    assert fxcurv.compile(model).prepare(x).plan.statuses == {
        "kfac": {name: "exact" for name, _ in model.named_parameters()}
    }
