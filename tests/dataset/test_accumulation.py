"""A data set equals one big batch; what interrupts it leaves a checkpoint, from which the bits are the same."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import BATCHES, Interrupting, alike, cut, emptied, seeded
from curvatures import EXACT, LOSSES, assert_equal, labels, net, reals, tokens
from curvatures import batch as images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxcurv
from fxcurv.dataset.batches import split_batch
from fxcurv.dataset.standard_error import StandardError

ROOT = Path(__file__).resolve().parents[2]


# One big batch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_data_set_equals_one_batch(name: str) -> None:
    dense, loss, y = LOSSES[name]
    compiled, x = fxcurv.compile(tokens(dense), loss, EXACT), reals(7, 3, 5) - 0.5
    assert_equal(compiled.accumulate(cut(x, y)), emptied(compiled(x, y)))


@pytest.mark.parametrize("weight", [None, torch.tensor([0.0, 1.0, 2.0])])
def test_batches_in_which_no_target_counts_still_average_inputs(weight: Tensor | None) -> None:
    x, y = reals(5, 3, 5), torch.tensor([-1, -1, 2, 1, -1]) if weight is None else torch.tensor([0, 0, 2, 1, 0])
    compiled = fxcurv.compile(tokens(False), nn.CrossEntropyLoss(weight, ignore_index=-1), EXACT)
    assert_equal(compiled.accumulate(cut(x, y, (1, 1, 2, 1))), emptied(compiled(x, y)))
    with pytest.raises(fxcurv.InputError, match="every target is ignored"):
        compiled.accumulate(cut(x[:2], y[:2], (1, 1)))


def test_sums_in_float64_of_float32_results() -> None:
    compiled = fxcurv.compile(tokens(False).float(), quantities="diag_ggn")
    batches = cut(reals(7, 3, 5).float(), labels(7))
    exact = compiled.accumulate(batches, dtype=torch.float64)
    value = exact["diag_ggn"]["fc.weight"]
    assert value.dtype == torch.float64
    expected = sum(compiled(x, y)["diag_ggn"]["fc.weight"].double() * len(x) for x, y in batches) / 7
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    assert compiled.accumulate(batches)["diag_ggn"]["fc.weight"].dtype == torch.float32


def test_max_batches_and_streams() -> None:
    x, y = reals(7, 3, 5), labels(7)
    compiled = fxcurv.compile(tokens(False), quantities="grad")
    taken: list[int] = []

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for k, batch in enumerate(cut(x, y)):
            taken.append(k)
            yield batch

    assert compiled.accumulate(stream(), max_batches=2).samples == 3
    assert taken == [0, 1]
    with pytest.raises(fxcurv.InputError, match="there was no batch"):
        compiled.accumulate([])


def test_a_generator_gives_the_same_bits() -> None:
    compiled = fxcurv.compile(net(), quantities=["kfac", "diag_ggn_mc"])
    runs = [
        compiled.accumulate([images(2), images(3, 1)], generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    alike(runs[0], runs[1])
    assert not torch.equal(runs[0]["kfac"]["head.weight"].G, runs[2]["kfac"]["head.weight"].G)


# Batches of other kinds -------------------------------------------------------------------------------------------


def test_batches_of_every_kind() -> None:
    x, z, y = torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0, 1])
    assert split_batch((x, y)) == (x, y)
    assert split_batch([x, y]) == (x, y)
    assert split_batch((x, z, y)) == ((x, z), y)
    assert split_batch(([x, z], y)) == ((x, z), y)
    assert split_batch(({"a": x}, y)) == ({"a": x}, y)
    assert split_batch({"a": x, "labels": y}) == ({"a": x}, y)
    for wrong in (x, (x,), {"a": x}, {"label": y, "labels": y}, (x, 1)):
        with pytest.raises(fxcurv.InputError, match="without inputs and a target"):
            split_batch(wrong)


def test_split_is_a_function_of_the_batch() -> None:
    x, y = images(4)
    compiled = fxcurv.compile(net(), quantities="grad")
    batches = [{"image": x[:1], "meta": {"class": y[:1]}}, {"image": x[1:], "meta": {"class": y[1:]}}]
    result = compiled.accumulate(batches, split=lambda batch: (batch["image"], batch["meta"]["class"]))
    assert_equal(result, emptied(compiled(x, y)))


# Stopping ---------------------------------------------------------------------------------------------------------


def test_it_stops_when_it_is_sure() -> None:
    compiled = fxcurv.compile(tokens(False), quantities=["diag_ggn", "grad"])
    x, y = reals(120, 3, 5) - 0.5, labels(120)
    batches = cut(x, y, (4,) * 30)
    spreads = [StandardError()]
    for batch in batches[:12]:
        spreads.append(spreads[-1].with_batch(compiled(*batch)))
    bound = spreads[12].rel_error()
    stop = next(k for k, standard_error in enumerate(spreads) if k >= 3 and standard_error.rel_error() <= bound)
    assert compiled.accumulate(batches, until_rel_error=bound, min_batches=3).samples == 4 * stop
    assert compiled.accumulate(batches, until_rel_error=1e9, min_batches=5).samples == 20
    with pytest.raises(fxcurv.QuantityError, match="gradients have no trace"):
        fxcurv.compile(tokens(False), quantities="grad").accumulate(batches, until_rel_error=0.1)


def test_the_standard_error_is_that_of_a_weighted_mean() -> None:
    t, w = reals(40).split(20)
    sums = ((float((w * t).sum()), float((w * w * t).sum()), float((w * w * t * t).sum())),)
    m = float((w * t).sum() / w.sum())
    error = math.sqrt(float((w**2 * (t - m) ** 2).sum()) * 20 / 19) / float(w.sum())
    assert StandardError(20, (float(w.sum()), float((w * w).sum())), sums).rel_error() == pytest.approx(
        error / m, rel=1e-9
    )
    assert StandardError().rel_error() == math.inf


def test_batches_are_weighted_by_their_sizes() -> None:
    compiled = fxcurv.compile(tokens(False), quantities="diag_ggn")
    results = [compiled(*batch) for batch in cut(reals(7, 3, 5), labels(7), (1, 2, 4))]
    standard_error = StandardError()
    for result in results:
        standard_error = standard_error.with_batch(result)
    assert (standard_error.batches, standard_error.weights) == (3, (7.0, 1.0 + 4.0 + 16.0))
    w = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    for found, traces in zip(
        standard_error.sums, zip(*(r["diag_ggn"].values() for r in results), strict=True), strict=True
    ):
        t = torch.stack([trace.sum() for trace in traces])
        assert found == pytest.approx([float(v.sum()) for v in (w * t, w * w * t, w * w * t * t)], rel=1e-12)


@pytest.mark.parametrize(
    "options", [{"max_batches": 0}, {"every": 0}, {"min_batches": 1}, {"until_rel_error": -1.0}, {"dtype": torch.half}]
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(fxcurv.QuantityError, match=next(iter(options))):
        fxcurv.compile(net()).accumulate([images(2)], **options)


# One by one -------------------------------------------------------------------------------------------------------


def test_an_accumulator_adds_and_forgets() -> None:
    compiled, (x, y) = fxcurv.compile(net(), quantities=["kflr", "grad"]), images(7)
    accumulator = compiled.accumulator()
    for batch in cut(x, y):
        accumulator.update(batch)
    assert_equal(accumulator.result, emptied(compiled(x, y)))
    accumulator.reset()
    with pytest.raises(fxcurv.InputError, match="there was no batch"):
        _ = accumulator.result


def test_a_moving_average_weighs_batches_by_age() -> None:
    compiled, batches = fxcurv.compile(net(), quantities=["kflr", "grad"]), cut(*images(7))
    accumulator, decay = compiled.accumulator(decay=0.5), 0.5
    for batch in batches:
        accumulator.update(batch)
    results = [compiled(*batch) for batch in batches]
    weights = [decay**2, decay, 1]
    for value in (lambda r: r["grad"]["head.weight"], lambda r: r["kflr"]["head.weight"].A, lambda r: r.loss):
        expected = sum(w * value(r) for w, r in zip(weights, results, strict=True)) / sum(weights)
        torch.testing.assert_close(value(accumulator.result), expected, rtol=1e-12, atol=1e-15)
    with pytest.raises(fxcurv.FxcurvError, match="FXC425"):
        fxcurv.merge(accumulator.result, results[0])
    with pytest.raises(fxcurv.QuantityError, match="decay"):
        compiled.accumulator(decay=1.0)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_state_of_an_accumulator_is_saved_and_put_back(tmp_path: Path, decay: float | None) -> None:
    """What goes on from it, in another object, ends with the same bits."""
    compiled = fxcurv.compile(net(), quantities=["kfac", "diag_ggn", "grad"])
    whole, first, second = (compiled.accumulator(decay=decay, generator=torch.Generator()) for _ in range(3))
    for seed in range(4):
        whole.update(images(2, seed))
    for seed in range(2):
        first.update(images(2, seed))
    torch.save({"state": first.state, "generator": first.generator.get_state()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=False)
    second.state = saved["state"]
    second.generator.set_state(saved["generator"])
    for seed in range(2, 4):
        second.update(images(2, seed))
    alike(second.result, whole.result)
    assert second.state.weight == whole.state.weight


def test_memory_does_not_grow_with_the_batches(tmp_path: Path) -> None:
    """Kept vectors become matrices; what a file of 40 batches holds is no more than that of 20."""
    accumulator = fxcurv.compile(net(), quantities=["kflr", "diag_ggn"]).accumulator()
    held: list[int] = []
    for first in (0, 20):
        for seed in range(first, first + 20):
            accumulator.update(images(3, seed))
        accumulator.result.save(tmp_path / "c.safetensors")
        held.append((tmp_path / "c.safetensors").stat().st_size)
    assert abs(held[1] - held[0]) < 200


def sampled(model: nn.Module | None = None, **changes: Any) -> fxcurv.Compiled:
    return fxcurv.compile(model or net(), **{"quantities": ["kfac", "diag_ggn_mc", "kflr"], **changes})


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_a_checkpoint_and_says_where(tmp_path: Path, error: type[BaseException]) -> None:
    path, compiled = tmp_path / "c.safetensors", sampled()
    whole = compiled.accumulate(BATCHES, generator=seeded(), until_rel_error=1e-9)
    options: dict[str, Any] = {"checkpoint": path, "until_rel_error": 1e-9}
    with pytest.raises(error) as caught:
        compiled.accumulate(Interrupting(BATCHES, 4, error), generator=seeded(), **options)
    assert caught.value.__notes__ == [f"4 batches are saved in {path}: repeat the call to continue from there"]
    assert fxcurv.load(path).samples == 8, "a checkpoint is the result so far"
    for _ in range(2):  # the second finds it complete
        generator = seeded()
        alike(compiled.accumulate(BATCHES, generator=generator, **options), whole)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_without_a_generator_draws_continue_where_they_were(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(KeyboardInterrupt):
        sampled().accumulate(Interrupting(BATCHES, 3), checkpoint=path, every=1)
    copy = path.read_bytes()
    first = sampled().accumulate(BATCHES, checkpoint=path)
    path.write_bytes(copy)
    alike(first, sampled().accumulate(BATCHES, checkpoint=path))


def shifted() -> nn.Module:
    model = net()
    with torch.no_grad():
        next(model.parameters()).add_(1e-9)
    return model


OTHERS: dict[str, tuple[Any, str]] = {
    "values": (lambda p: sampled(shifted()).accumulate(BATCHES, generator=seeded(), checkpoint=p), "values of the mod"),
    "type": (lambda p: sampled(net().float()).accumulate(BATCHES, generator=seeded(), checkpoint=p), "another model"),
    "loss": (
        lambda p: sampled(loss=nn.CrossEntropyLoss(reduction="sum")).accumulate(
            BATCHES, generator=seeded(), checkpoint=p
        ),
        "loss: .*CrossEntropyLoss.* in the file",
    ),
    "weight": (
        lambda p: sampled(loss=nn.CrossEntropyLoss(torch.ones(3))).accumulate(
            BATCHES, generator=seeded(), checkpoint=p
        ),
        "loss: .*CrossEntropyLoss.* in the file",
    ),
    "quantities": (
        lambda p: sampled(quantities="kfac").accumulate(BATCHES, generator=seeded(), checkpoint=p),
        "quantities: ",
    ),
    "dtype": (
        lambda p: sampled().accumulate(BATCHES, generator=seeded(), checkpoint=p, dtype=torch.float32),
        "dtype: None in the file, torch.float32 in this call",
    ),
    "seed": (lambda p: sampled().accumulate(BATCHES, generator=seeded(1), checkpoint=p), "generator: "),
    "length": (
        lambda p: sampled().accumulate(BATCHES[:5], generator=seeded(), checkpoint=p),
        "number of batches: 6 in the file, 5 in this call",
    ),
    "order": (
        lambda p: sampled().accumulate([BATCHES[1], BATCHES[0], *BATCHES[2:]], generator=seeded(), checkpoint=p),
        "the loader gives other batches, or in another order",
    ),
    "fewer": (
        lambda p: sampled().accumulate(BATCHES, generator=seeded(), checkpoint=p, max_batches=2),
        "it holds 4 batches, and there are 2",
    ),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "c.safetensors"
    with pytest.raises(KeyboardInterrupt):
        sampled().accumulate(Interrupting(BATCHES, 4), generator=seeded(), checkpoint=path)
    return path.read_bytes()


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_call_is_refused(interrupted: bytes, tmp_path: Path, name: str) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(interrupted)
    call, text = OTHERS[name]
    with pytest.raises(fxcurv.FxcurvError, match=text) as caught:
        call(path)
    assert caught.value.code == ("FXC424" if name == "type" else "FXC427")
    assert path.read_bytes() == interrupted


def test_damaged_checkpoints_and_other_files_are_refused(interrupted: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    flipped = bytearray(interrupted)
    flipped[-20] ^= 1
    manifest = interrupted.replace(b'\\"batches\\": 4', b'\\"batches\\": 3', 1)
    assert manifest != interrupted
    sampled()(*images(2)).save(path)
    for content, text in (
        (bytes(flipped), "damaged"),
        (manifest, "damaged"),
        (interrupted[:-9], "truncated or inconsistent"),
        (b"hello", "not a safetensors file"),
        (path.read_bytes(), "a result, not a checkpoint"),
    ):
        path.write_bytes(content)
        with pytest.raises(fxcurv.FxcurvError, match=text):
            sampled().accumulate(BATCHES, generator=seeded(), checkpoint=path)
        assert path.read_bytes() == content
    with pytest.raises(fxcurv.FxcurvError, match="there is no folder"):
        sampled().accumulate(BATCHES, checkpoint=tmp_path / "none" / "c")


def test_a_seeded_data_loader_continues(tmp_path: Path) -> None:
    x, y = images(12)
    path = tmp_path / "c.safetensors"

    def loader() -> DataLoader[Any]:
        return DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, generator=seeded(3))

    whole = sampled().accumulate(loader(), generator=seeded())
    sampled().accumulate(loader(), generator=seeded(), checkpoint=path, max_batches=1)
    alike(sampled().accumulate(loader(), generator=seeded(), checkpoint=path), whole)
    assert_equal(
        fxcurv.compile(net(), quantities="kflr").accumulate(loader()),
        emptied(fxcurv.compile(net(), quantities="kflr")(x, y)),
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the tool forks")
def test_killed_at_random_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The tool's small form: kill -9 some times, then a run to the end, five times over."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "tools/kill_resume.py"), "--trials", "5", "--report", str(report)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "--batches", "20", "--seed", "1"], check=True, timeout=300, env=environment, capture_output=True
    )
    told = json.loads(report.read_text())
    assert told["identical"] == told["trials"] == 5
    assert told["kills"] - told.get("at the end", 0) >= 5
