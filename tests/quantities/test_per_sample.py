"""Per-sample quantities and those of the GGN against brute force on a part of the samples, compiled and by autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import samples
import torch
from by_hand import QUANTITIES, by_hand
from comparison import assert_close
from samples import Sample
from torch import Tensor, nn

import fxcurv
from fxcurv.losses.base import as_loss
from fxcurv.quantities.protocol import facts_of
from fxcurv.quantities.selection import chosen
from fxcurv.runtime.autograd import by_autograd
from fxcurv.runtime.memory import Chunks
from fxcurv.runtime.run import Minibatch, run

NAMES = (
    *("linear.vector", "linear.tokens", "linear.rank4", "linear.transposed", "conv2d.everything", "conv2d.plain"),
    *("conv2d.groups", "conv2d.depthwise", "conv2d.same", "conv3d.plain", "norm.2d", "norm.layer_norm_image"),
    *("act.gelu", "join.add", "join.mul", "pool2d.max", "cut.cat_same", "param.applied_twice_tokens"),
    *("param.tied_weight", "param.conv_reused", "param.grouped_reused", "param.siamese", "param.frozen_weight"),
    *("param.dense_residual", "free.additive", "free.scale", "free.matmul", "free.computed_weight", "free.layer_norm"),
    *("right.conv1d", "right.samples_behind", "right.twice", "right.autoencoder", "right.tied_embedding"),
    *("generic.attention", "attention.causal", "transformer.encoder_pre_norm", "recurrent.gru", "image.windows"),
)


ROWS = (*map(samples.find, NAMES), *samples.LOSSES)


MODELS = tuple(row for row in samples.MODELS if row.name in ("model.lenet", "model.resnet_basic"))


def ids(rows: tuple[Sample, ...]) -> list[str]:
    return [row.name for row in rows]


def check(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, result: Any) -> None:
    """Each quantity equals brute force; roots and Gram matrices, which are not unique, by what they are roots of."""
    expected = by_hand(model, loss, x, y)
    for quantity, parameters in expected.items():
        for name, value in parameters.items():
            if name not in result[quantity]:
                assert result[quantity].status[name] == "unreached"
                assert not value.any()
                continue
            found = result[quantity][name]
            dense = found.dense() if isinstance(found, fxcurv.Block) else found
            assert_close(dense, value, f"{quantity} {name}")
    for name, root in result["sqrt_ggn"].items():
        V = root.flatten(2).flatten(0, 1)
        assert_close(V.T @ V, expected["ggn_block"][name], f"sqrt_ggn {name}")
        assert_close(result["ggn_gram"][name], V @ V.T, f"ggn_gram {name}")


@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_rule(row: Sample) -> None:
    model, loss = row.build(), row.loss()
    x, y = samples.inputs(row, 3), samples.targets(row, 3)
    check(model, loss, x, y, fxcurv.compile(model, loss, QUANTITIES)(x, y))


@pytest.mark.slow
@pytest.mark.parametrize("row", MODELS, ids=ids(MODELS))
def test_model(row: Sample) -> None:
    test_rule(row)


FALLBACK = tuple(row for row in ROWS if row.name in ("conv2d.groups", "param.applied_twice_tokens", "free.additive"))


@pytest.mark.parametrize("row", FALLBACK, ids=ids(FALLBACK))
def test_by_autograd(row: Sample) -> None:
    """The fallback keeps samples and columns apart in the same order."""
    model, loss = row.build(), row.loss()
    x, y = samples.inputs(row, 3), samples.targets(row, 3)
    result = by_autograd(model, as_loss(loss), chosen(QUANTITIES), Minibatch(x, y))
    check(model, loss, x, y, result)
    compiled = fxcurv.compile(model, loss, QUANTITIES)(x, y)
    for quantity in ("sqrt_ggn", "ggn_gram"):
        for name, value in compiled[quantity].items():
            assert_close(result[quantity][name], value, f"{quantity} {name}")


@pytest.mark.parametrize(("parts", "columns"), [(1, 1), (2, 1), (3, 2), (2, 5)])
def test_chunks_make_no_difference(parts: int, columns: int) -> None:
    """Samples and columns are laid side by side, however a batch is cut; a second pass sees the same draws."""
    row = samples.find("linear.tokens")
    model, loss, x, y = row.build(), row.loss(), samples.inputs(row, 3), samples.targets(row, 3)
    quantities = (*QUANTITIES, "sqrt_ggn_mc", "ekfac", fxcurv.EKFAC(fxcurv.Sampled(3)), "diag_hessian", "foof")
    compiled = fxcurv.compile(model, loss, quantities)
    whole = compiled(x, y, torch.Generator().manual_seed(0))
    program, generator = compiled.program, torch.Generator().manual_seed(0)
    chunks = Chunks(parts, dict.fromkeys(program.backwards, columns))
    cut = run(program, model, as_loss(loss), Minibatch(x, y, generator), chunks)
    for entry in whole.entries:
        ours, theirs = cut[entry.quantity][entry.parameter], entry.value
        if isinstance(theirs, fxcurv.Block):
            ours, theirs = ours.dense(), theirs.dense()
        assert theirs is not None
        assert_close(ours, theirs, f"{entry.quantity} {entry.parameter}")
    again = torch.Generator().manual_seed(0)
    compiled(x, y, again)
    assert torch.equal(generator.get_state(), again.get_state())


def test_eigenvalues_of_the_ggn_from_the_gram_matrix() -> None:
    """Summed over parameters, the Gram matrix has the eigenvalues of the whole GGN."""
    row = samples.find("join.add")
    model, loss, x, y = row.build(), row.loss(), samples.inputs(row, 3), samples.targets(row, 3)
    grams = fxcurv.compile(model, loss, "ggn_gram")(x, y)["ggn_gram"]
    found = torch.linalg.eigvalsh(sum(grams.values()))
    expected = torch.linalg.eigvalsh(reference.ggn_matrix(model, loss, x, y))
    size = min(len(found), len(expected))
    assert_close(found[-size:], expected[-size:], "eigenvalues")


def test_sampled_columns_are_those_of_the_diagonal() -> None:
    row = samples.find("conv2d.plain")
    model, x, y = row.build(), samples.inputs(row, 3), samples.targets(row, 3)
    quantities = ["diag_ggn_mc", "batch_diag_ggn_mc", "sqrt_ggn_mc"]
    result = fxcurv.compile(model, row.loss(), quantities)(x, y, torch.Generator().manual_seed(0))
    for name, diagonal in result["diag_ggn_mc"].items():
        assert_close(result["batch_diag_ggn_mc"][name].sum(0), diagonal, name)
        assert_close(result["sqrt_ggn_mc"][name].square().sum((0, 1)), diagonal, name)


def test_a_large_block_is_kept_as_its_columns() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(200, 50).double().eval()
    x, y = samples.normal((3, 200), torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    block = fxcurv.compile(model, quantities="ggn_block")(x, y)["ggn_block"]["weight"]
    diagonal = fxcurv.compile(model, quantities="diag_ggn")(x, y)["diag_ggn"]["weight"]
    assert block.sizes == {"matrix": (10_000, 10_000)}
    assert_close(block.diag(), diagonal, "diagonal")
    v = samples.normal((50, 200), torch.Generator().manual_seed(1))
    root = fxcurv.compile(model, quantities="sqrt_ggn")(x, y)["sqrt_ggn"]["weight"]
    weights = torch.einsum("vnoi,oi->vn", root, v)
    assert_close(block.mv(v), torch.einsum("vnoi,vn->oi", root, weights), "product")


def test_what_keeps_samples_apart_is_not_merged() -> None:
    """Two batches' results do not add where they are not sums over the samples; no number is made up."""
    row = samples.find("linear.vector")
    model, x, y = row.build(), samples.inputs(row, 4), samples.targets(row, 4)
    apart = {name for name, quantity in fxcurv.NAMES.items() if facts_of(quantity)["combine"] == "refuse"}
    for name in fxcurv.NAMES:
        compiled = fxcurv.compile(model, row.loss(), name)
        first, second = compiled(x[:2], y[:2]), compiled(x[2:], y[2:])
        if name in apart:
            with pytest.raises(fxcurv.FxcurvError, match=f"{name} of two batches is not determined by {name} of each"):
                fxcurv.merge(first, second)
        elif "mc" not in name and not repr(fxcurv.NAMES[name]).startswith("KFAC(factor=Sampled"):
            whole, merged = compiled(x, y), fxcurv.merge(first, second)
            for entry in whole.entries:
                ours, theirs = merged[name][entry.parameter], entry.value
                if isinstance(theirs, fxcurv.Block):
                    ours, theirs = ours.dense(), theirs.dense()
                assert theirs is not None
                assert_close(ours, theirs, f"{name} {entry.parameter}")


@pytest.mark.parametrize("name", fxcurv.NAMES)
def test_results_are_saved_and_read_back(name: str, tmp_path: Path) -> None:
    row = samples.find("linear.vector")
    model, x, y = row.build(), samples.inputs(row, 3), samples.targets(row, 3)
    result = fxcurv.compile(model, row.loss(), name)(x, y)
    result.save(tmp_path / "result.safetensors")
    loaded = fxcurv.load(tmp_path / "result.safetensors", model)
    for entry in result.entries:
        theirs = loaded[name].entries[entry.parameter].tensors()
        for kind, t in entry.tensors().items():
            assert torch.equal(t, theirs[kind])


def test_operators_are_of_blocks_and_diagonals() -> None:
    row = samples.find("linear.vector")
    model, x, y = row.build(), samples.inputs(row, 3), samples.targets(row, 3)
    result = fxcurv.compile(model, row.loss(), ["foof", "ekfac_exact", "ggn_block", "batch_diag_ggn", "ggn_gram"])(x, y)
    for name in ("foof", "ekfac_exact", "ggn_block"):
        traces = torch.stack([block.trace() for block in result[name].values()])
        assert_close(result.operator(name).trace(), traces.sum(), name)
    for name in ("batch_diag_ggn", "ggn_gram"):
        with pytest.raises(fxcurv.QuantityError, match=f"{name} is a vector, not a matrix"):
            result.operator(name)
