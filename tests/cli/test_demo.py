"""The demo: what it computes is right, what it writes is what it found, and the same seed finds the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.cli import demo, demo_tables
from fxcurv.cli.demo import DemoError, DemoReport, DigitNet, Pruning

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

FILES = {"traces.png", "factors.png", "spectra.png", "pruning.png", "table.txt", "report.md"}


def digits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (count,), generator=g)


def narrow() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return DigitNet(3).double().eval()


def parameters() -> dict[str, tuple[int, ...]]:
    with torch.random.fork_rng(devices=[]):
        return {name: tuple(p.shape) for name, p in DigitNet().named_parameters()}


# The whole demo ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoReport, Path, str]:
    """The report of the demo as users run it, the folder it wrote, and what it said."""
    folder, said, before = tmp_path_factory.mktemp("demo") / "new" / "folder", [], torch.get_rng_state()
    report = demo.run(folder, say=said.append)
    assert torch.equal(before, torch.get_rng_state())
    return report, folder, "\n".join(said)


@pytest.mark.slow
def test_the_network_learns_and_the_curvature_agrees_with_autograd(whole: tuple[DemoReport, Path, str]) -> None:
    report, _, _ = whole
    assert 0.97 <= report.accuracy <= 1
    assert round(report.accuracy * 360) == pytest.approx(report.accuracy * 360, abs=1e-9)
    assert len(report.checked) == 20
    assert report.largest_error == max(entry.error for entry in report.checked) <= 1e-9
    assert all(abs(e.computed - e.expected) <= 1e-9 * abs(e.expected) for e in report.checked)
    assert len({entry.name for entry in report.checked}) > 5
    assert report.seconds < 120


@pytest.mark.slow
def test_every_parameter_has_its_row(whole: tuple[DemoReport, Path, str]) -> None:
    report, _, _ = whole
    assert {row.name: row.shape for row in report.rows} == parameters()
    for row in report.rows:
        assert (row.diag_ggn_status, row.kfac_status) == ("exact", "exact")
        assert row.diag_ggn_trace > 0
        if len(row.shape) == 1:  # the exact dense block but for the sampled labels
            assert row.kfac_trace == pytest.approx(row.diag_ggn_trace, rel=0.25)


@pytest.mark.slow
def test_pruning_by_saliency_keeps_the_accuracy(whole: tuple[DemoReport, Path, str]) -> None:
    pruning = whole[0].pruning
    assert pruning.weights == sum(torch.Size(shape).numel() for shape in parameters().values() if len(shape) > 1)
    for kept in pruning.kept.values():
        assert len(kept) == len(pruning.sparsities)
        assert kept[0] == pytest.approx(whole[0].accuracy)
    half = pruning.sparsities.index(0.5)
    for method in ("saliency recomputed", "saliency once", "magnitude"):
        assert pruning.kept[method][half] > pruning.kept["random"][half] + 0.5
    assert pruning.mean("saliency recomputed") > pruning.mean("saliency once")


@pytest.mark.slow
def test_the_files_hold_what_was_found(whole: tuple[DemoReport, Path, str]) -> None:
    report, folder, said = whole
    assert {file.name for file in folder.iterdir()} == FILES
    assert {file.name for file in report.files} == FILES
    for file in folder.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 10_000
    table, text = (folder / "table.txt").read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")
    assert table.strip() in said
    total = sum(row.diag_ggn_trace for row in report.rows)
    assert re.search(rf"^all +{total:.4g} ", table, re.MULTILINE)
    for row in report.rows:
        shape = "×".join(map(str, row.shape))
        line = rf"^{re.escape(row.name)} +{shape} +{row.diag_ggn_trace:.4g} +exact +{row.kfac_trace:.4g} +exact$"
        assert re.search(line, table, re.MULTILINE)
    assert str(report) == report.conclusion
    assert report.conclusion in text
    assert said.endswith(report.conclusion)
    assert f"classifies {report.accuracy:.1%} of 360 unseen digits" in report.conclusion
    assert f"largest relative error {report.largest_error:.1e} " in said
    assert f"largest relative error {report.largest_error:.1e} " in text
    for picture in FILES:
        assert not picture.endswith(".png") or f"({picture})" in text


# A short one ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """157 digits to train on, two epochs, whatever accuracy that gives."""
    values = {"TEST_DIGITS": 1640, "EPOCHS": 2, "ACCURACY_WANTED": 0.0, "SPARSITIES": (0.0, 0.7), "RANDOM_DRAWS": 1}
    for name, value in values.items():
        monkeypatch.setattr(demo, name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_the_same_seed_finds_the_same(tmp_path: Path) -> None:
    first, again = (demo.run(tmp_path / name, seed=1, say=lambda _: None) for name in ("first", "again"))
    assert first.rows == again.rows
    assert first.checked == again.checked
    assert first.conclusion == again.conclusion
    table, report = (tmp_path / "first" / name for name in ("table.txt", "report.md"))
    assert table.read_text() == (tmp_path / "again" / "table.txt").read_text()
    assert report.read_text() == (tmp_path / "again" / "report.md").read_text()


@pytest.mark.usefixtures("short")
def test_a_network_that_did_not_learn_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ACCURACY_WANTED", 1.01)
    torch.set_num_threads(2)
    try:
        message = r"the network got only \d+\.\d% of the test digits right; try another --seed"
        with pytest.raises(DemoError, match=message):
            demo.run(tmp_path, say=lambda _: None)
        assert torch.get_num_threads() == 2, "the demo's own single thread is its own"
    finally:
        torch.set_num_threads(1)


def test_wrong_curvature_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is a check: a diagonal that is off by one part in a million is refused, with the entry's name."""
    data = demo._Digits(*digits(20), *digits(1))
    assert max(entry.error for entry in demo._checked(narrow(), data, 0)) < 1e-12
    entry = demo._diagonal_entry
    monkeypatch.setattr(demo, "_diagonal_entry", lambda *arguments: entry(*arguments) * (1 + 1e-6))
    with pytest.raises(DemoError, match=r"diag_ggn\[.*\] is .*, autograd gives .*; this is a defect") as caught:
        demo._checked(narrow(), data, 0)
    assert caught.value.node in dict(narrow().named_parameters())


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoError, match=r"cannot write to .*file: File exists; choose another --output"):
        demo.run(tmp_path / "file")


# Its parts -----------------------------------------------------------------------------------------------------------


def test_batches_combine_to_the_curvature_of_the_mean_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4, 4 and 3: the diagonal, A and the dense blocks are those of the mean loss over all 11."""
    monkeypatch.setattr(demo, "CURVATURE_BATCH", 4)
    monkeypatch.setitem(fxcurv.NAMES, "kfac", fxcurv.KFAC(fxcurv.Exact()))  # no sampling: the law, not its noise
    model, (x, y) = narrow(), digits(11)
    found = demo._curvature(model, demo._Digits(x, y, x, y), 0)
    diagonal = reference.diag_ggn(model, nn.CrossEntropyLoss(), x, y)
    at_once = fxcurv.compile(model, quantities=["kflr"])(x, y)["kflr"]
    assert list(found.diagonal) == list(diagonal)
    for name, value in diagonal.items():
        torch.testing.assert_close(found.diagonal[name], value, rtol=1e-9, atol=1e-13)
    assert set(found.factors) | set(found.dense) == set(diagonal)
    for name, (A, G) in found.factors.items():
        torch.testing.assert_close(A, at_once[name].A, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(G, at_once[name].G, rtol=1e-9, atol=1e-13)
        assert found.kfac_trace(name) == pytest.approx(at_once[name].trace().item(), rel=1e-9)
    for name, block in found.dense.items():
        torch.testing.assert_close(block, at_once[name].dense(), rtol=1e-9, atol=1e-13)
        assert found.kfac_trace(name) == pytest.approx(diagonal[name].sum().item(), rel=1e-9)


def test_autograds_entry_is_the_brute_force_diagonal() -> None:
    model, (x, y) = narrow(), digits(3)
    expected = reference.diag_ggn(model, nn.CrossEntropyLoss(reduction="sum"), x, y)
    for name, index in (("block2.conv1.weight", (1, 2, 0, 1)), ("bn.weight", (2,)), ("fc.bias", (9,))):
        found = demo._diagonal_entry(model, x, name, index)
        assert found == pytest.approx(expected[name][index].item(), rel=1e-9)


def test_the_digits_are_split_without_overlap() -> None:
    split = demo._digits(3)
    assert (len(split.train), len(split.test)) == (1437, 360)
    assert (len(split.train_labels), len(split.test_labels)) == (1437, 360)
    images = [tuple(image.flatten().tolist()) for image in (*split.train, *split.test)]
    assert len(set(images)) == 1797
    assert not torch.equal(split.test_labels, demo._digits(4).test_labels)


def test_saliency_predicts_the_loss_of_a_quadratic() -> None:
    """½·h·w² is exactly what removing w costs at the minimum of ½·h·(w' − w)²."""
    weights = {"a": torch.tensor([2.0, -1.0])}
    assert demo._saliency(weights, {"a": torch.tensor([3.0, 4.0])})["a"].tolist() == [6.0, 2.0]


def test_pruning_says_how_much_is_tolerated() -> None:
    kept = {"gentle": (0.98, 0.98, 0.97, 0.5), "harsh": (0.98, 0.5, 0.98, 0.98)}
    pruning = Pruning(100, (0.0, 0.2, 0.4, 0.6), kept)
    assert pruning.tolerated("gentle") == 0.4
    assert pruning.tolerated("gentle", loss=0.005) == 0.2
    assert pruning.tolerated("gentle", loss=0.6) == 0.6
    assert pruning.tolerated("harsh") == 0.0, "accuracy that comes back does not count"
    assert pruning.mean("gentle") == pytest.approx((0.98 + 0.97 + 0.5) / 3)


@pytest.mark.parametrize(
    ("other", "outcome"),
    [((1.0, 0.6), "a wins by 20.0 points over b"), ((1.0, 0.799), "a and b are level"), ((1.0, 0.9), "b wins by 10.0")],
)
def test_the_verdict_follows_the_means(other: tuple[float, ...], outcome: str) -> None:
    verdict = demo_tables._verdict(Pruning(100, (0.0, 0.5), {"a": (1.0, 0.8), "b": other, "c": (1.0, 0.1)}))
    assert outcome in verdict
    assert f"b {other[1]:.1%}" in verdict
