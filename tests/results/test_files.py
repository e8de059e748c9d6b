"""Files: what is saved is read back to the last bit; what is none, or another model's, is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from curvatures import EXACT, LOSSES, assert_equal, batch, close, labels, net, reals, same, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import fxcurv
from fxcurv.blocks.base import KINDS
from fxcurv.blocks.lazy_gram import LazyGram
from fxcurv.core.fingerprint import Fingerprint

pytest.importorskip("safetensors")


QUANTITIES = ["kfac", "kflr", "diag_ggn", "grad", fxcurv.KFAC(fxcurv.Exact(), approx="reduce", joint=True)]


def compute() -> fxcurv.Curvature:
    return fxcurv.compile(net(), quantities=QUANTITIES)(*batch(3), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def result() -> fxcurv.Curvature:
    return compute()


@pytest.fixture
def file(result: fxcurv.Curvature, tmp_path: Path) -> Path:
    result.save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


# Round trip -------------------------------------------------------------------------------------------------------


def test_a_result_is_read_back_to_the_last_bit(result: fxcurv.Curvature, file: Path) -> None:
    loaded = fxcurv.load(file, net())
    assert list(loaded) == list(result)
    for name, entries in result.items():
        assert list(loaded[name].entries) == list(entries.entries)
        for mine, its in zip(entries.entries.values(), loaded[name].entries.values(), strict=True):
            for field in type(mine).__dataclass_fields__:
                same(getattr(mine, field), getattr(its, field))
    for field in ("loss", "output", "samples", "reduction", "model"):
        same(getattr(result, field), getattr(loaded, field))
    assert result.divisor is not None
    assert loaded.divisor == float(result.divisor) == 3.0
    assert (loaded["kfac"].status["frozen.bias"], loaded["kfac"].status["unused.bias"]) == ("frozen", "unreached")
    assert str(loaded) == str(result)


def test_a_block_that_is_shared_is_stored_once(result: fxcurv.Curvature, file: Path) -> None:
    tensors = load_file(file)
    assert "kfac_1/head.weight/G" in tensors
    assert "kfac_1/head.bias/G" not in tensors
    assert "kfac/tied.weight/G" in tensors
    assert not any(key.startswith("kfac/again.weight") for key in tensors)
    loaded = fxcurv.load(file)["kfac_1"]
    assert loaded["head.weight"] is loaded["head.bias"]
    assert loaded["head.weight"].parameters == ("head.weight", "head.bias")


def test_kept_factors_are_stored_as_their_vectors(result: fxcurv.Curvature, file: Path) -> None:
    block = result["kfac"]["wide.weight"]
    assert isinstance(block.input_moment, LazyGram)
    tensors = load_file(file)
    assert "kfac/wide.weight/A" not in tensors
    assert tensors["kfac/wide.weight/A.0"].numel() == block.input_moment.vectors[0].numel() == 3 * 36
    with torch.random.fork_rng(devices=[]):
        convolution = nn.Sequential(nn.Conv2d(8, 2, 3, groups=2), nn.Flatten(), nn.Linear(2, 3)).double().eval()
    patched = fxcurv.compile(convolution)
    x = torch.linspace(-1, 1, 2 * 8 * 9, dtype=torch.float64).view(2, 8, 3, 3)
    kept = patched(x, torch.tensor([0, 2]))
    assert kept["kfac"]["0.weight"].input_moment.patches is not None
    kept.save(file)
    same(kept["kfac"]["0.weight"], fxcurv.load(file)["kfac"]["0.weight"])


def test_every_form_of_a_block_has_a_place(result: fxcurv.Curvature, tmp_path: Path) -> None:
    dense = result["kflr"]["head.bias"]
    forms = {
        "eigenbasis": result["kflr"]["head.weight"].inverse(0.1),
        "thin": dense.eigenbasis.inverse(0.1),
        "dense": dense.inverse(0.1),
        "diagonal": fxcurv.Diagonal((3,), torch.arange(3.0), parameters=("b",), status="approx(diagonal)"),
    }
    for name, block in forms.items():
        single(name, block).save(tmp_path / "f.safetensors")
        same(fxcurv.load(tmp_path / "f.safetensors")[name][block.parameters[0]], block)


def single(name: str, block: fxcurv.Block) -> fxcurv.Curvature:
    """A result of one block."""
    from fxcurv.results.entry import Entries, Entry

    entry = Entry(name, block.parameters[0], block.shape, block.status, "exact", "sum", block)
    return fxcurv.Curvature({name: Entries([entry])}, torch.tensor(1.0), torch.zeros(2, 3), 2, "sum")


def test_a_block_of_a_kind_of_ones_own_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(fxcurv.Diagonal):
        pass

    single("q", Own((2,), torch.tensor([1.0, 2.0]), parameters=("b",))).save(tmp_path / "own.safetensors")
    block = fxcurv.load(tmp_path / "own.safetensors")["q"]["b"]
    assert type(block) is Own
    assert torch.equal(block.values, torch.tensor([1.0, 2.0]))
    monkeypatch.delitem(KINDS, "Own")  # where the kind is not defined
    with pytest.raises(fxcurv.FxcurvError, match="has the unknown form 'Own'"):
        fxcurv.load(tmp_path / "own.safetensors")
    with pytest.raises(
        fxcurv.FxcurvError, match="q/b cannot be saved: it is a block of the form Own, which is not registered"
    ):
        single("q", block).save(tmp_path / "own.safetensors")


def test_two_kinds_of_block_have_two_names() -> None:
    with pytest.raises(fxcurv.SpecError, match="a second kind of block is named Dense"):
        type("Dense", (fxcurv.Block,), {})


def test_saving_replaces_a_file_whole_or_not_at_all(
    result: fxcurv.Curvature, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()
    monkeypatch.setattr("fxcurv.results.writing.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        result.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name], "a temporary file is left"


def test_saving_needs_a_folder(result: fxcurv.Curvature, tmp_path: Path) -> None:
    with pytest.raises(fxcurv.FxcurvError, match="there is no folder"):
        result.save(tmp_path / "none" / "c.safetensors")


# Other models -----------------------------------------------------------------------------------------------------


def test_another_model_is_refused(file: Path) -> None:
    other = net()
    with torch.random.fork_rng(devices=[]):
        other.extra = nn.Linear(2, 2).double()
    single_type = net().float()
    cases = (
        (other, r"'extra.weight' is missing here and \[2, 2\] of torch.float64 there"),
        (single_type, r"'conv.weight' is .* of torch.float64 here and .* of torch.float32 there"),
    )
    for model, text in cases:
        with pytest.raises(fxcurv.FxcurvError, match=text) as caught:
            fxcurv.load(file, model)
        assert caught.value.code == "FXC424"


def test_fingerprints_depend_on_order_and_not_on_values() -> None:
    a = Fingerprint.of(net())
    b = Fingerprint(dict(reversed(list(a.parameters.items()))))
    assert a.difference(b) == "the parameters are in a different order"
    assert a.digest != b.digest
    assert a.digest == Fingerprint.of(net()).digest


# Broken files -----------------------------------------------------------------------------------------------------


def rewritten(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same tensors with a changed manifest."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    manifest = json.loads(metadata["manifest"])
    change(manifest)
    save_file(load_file(file), file, metadata | {"manifest": json.dumps(manifest)})


def values(manifest: dict[str, Any], form: str) -> dict[str, Any]:
    return next(value for value in manifest["values"] if value["form"] == form)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no values": (lambda m: m.pop("values"), "manifest lacks 'values'"),
    "samples": (lambda m: m.update(samples="3"), "manifest.samples is not of type int"),
    "more samples": (lambda m: m.update(samples=4), "an invalid loss, output, number of samples"),
    "true": (lambda m: m.update(samples=True), "manifest.samples is not of type int"),
    "divisor": (lambda m: m.update(divisor=-1.0), "number of samples or divisor"),
    "nan": (lambda m: m.update(divisor=math.nan), "JSON is malformed"),
    "index": (lambda m: m["quantities"]["grad"][0].update(value=10**9), "value is out of range"),
    "another value": (
        lambda m: m["quantities"]["grad"][0].update(value=m["quantities"]["grad"][1]["value"]),
        "the value or shape of another parameter",
    ),
    "shape": (lambda m: m["quantities"]["grad"][0].update(shape=[10**12]), "the value or shape of another parameter"),
    "form": (lambda m: values(m, "Dense").update(form="Sparse"), "the unknown form 'Sparse'"),
    "block shape": (lambda m: values(m, "Dense").update(shape=[10**9]), r"do not fit a Dense block on \[1000000000\]"),
    "negative": (lambda m: values(m, "Dense").update(shape=[-3]), "holds a negative number"),
    "no tensor": (lambda m: values(m, "Dense")["tensors"].update(matrix="x"), "names 'x', which does not exist"),
    "kronecker": (
        lambda m: values(m, "Kronecker")["tensors"].update(G=values(m, "Kronecker")["tensors"]["A"]),
        "do not fit a Kronecker block",
    ),
    "dtype": (lambda m: m["tensors"]["loss"].__setitem__(0, "torch.float16"), r"differs from the file, \[\] of"),
    "sizes": (lambda m: m["tensors"]["output"].__setitem__(1, [10**9]), "differs from the file"),
    "one less": (lambda m: m["tensors"].pop("output"), "and the file differ: output"),
    "scale": (lambda m: moments(m)[0].update(scale=-1.0), "has no valid vectors"),
    "kept": (lambda m: moments(m)[0].update(vectors=[]), "has no valid vectors"),
    "patches": (lambda m: moments(m)[0].update(patches={"kernel": [0]}), "lacks 'stride'"),
    "model": (lambda m: m["model"]["parameters"].popitem(), "a digest of other parameters"),
    "deep": (lambda m: m.update(values=[[]]), r"values\[0\] is not of type dict"),
}


def moments(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    blocks = [v["tensors"] for v in manifest["values"] if v["form"] == "Kronecker"]
    return [held for tensors in blocks for held in tensors.values() if isinstance(held, dict)]


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_contradicts_itself_is_refused(file: Path, name: str) -> None:
    change, text = CHANGES[name]
    rewritten(file, change)
    with pytest.raises(fxcurv.FxcurvError, match=text) as caught:
        fxcurv.load(file)
    assert caught.value.code == "FXC423"


def test_files_that_are_none_are_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    bad = tmp_path / "bad.safetensors"
    cases: dict[bytes, str] = {
        b"": "truncated, or not a safetensors file",
        content[:5]: "truncated, or not a safetensors file",
        content[: length // 2]: "truncated, or not a safetensors file",
        content[: len(content) - 8]: "truncated or inconsistent",
        (2**62).to_bytes(8, "little") + content[8:]: "truncated, or not a safetensors file",
        content[:8] + b"[" * length + content[8 + length :]: "JSON is malformed",
        b"\x80\x04pickle, not safetensors": "truncated, or not a safetensors file",
        framed('{"__metadata__": {"format": "fxcurv 1"}}'): "has the older schema 1, not 4; compute and save it again",
        framed('{"__metadata__": {"format": "fxcurv 5"}}'): "has the newer schema 5, not 4; update fxcurv",
        framed('{"__metadata__": {"format": "pt"}}'): "does not contain a result of fxcurv",
        framed('{"__metadata__": {"format": "fxcurv 4"}}'): "JSON is malformed",
        framed("{}"): "does not contain a result of fxcurv",
        framed("[]"): "does not contain a result of fxcurv",
        framed('{"a": 1, "a": 2}'): "the key 'a' is duplicated",
        framed('{"__metadata__": {"format": "fxcurv 4", "manifest": "{\\"a\\": 1, \\"a\\": 2}"}}'): "'a' is duplicated",
    }
    for written, text in cases.items():
        bad.write_bytes(written)
        with pytest.raises(fxcurv.FxcurvError, match=text) as caught:
            fxcurv.load(bad)
        assert caught.value.code == "FXC423"
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(fxcurv.FxcurvError, match="it cannot be read"):
            fxcurv.load(missing)


def framed(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


@pytest.mark.parametrize("name", LOSSES)
def test_merging_equals_one_batch(name: str, tmp_path: Path) -> None:
    dense, loss, y = LOSSES[name]
    compiled = fxcurv.compile(tokens(dense), loss, EXACT)
    x = reals(7, 3, 5) - 0.5
    whole, first, second = compiled(x, y), compiled(x[:2], y[:2]), compiled(x[2:], y[2:])
    first.save(tmp_path / "first.safetensors")
    for merged in (fxcurv.merge(first, second), fxcurv.merge(tmp_path / "first.safetensors", second)):
        assert_equal(merged, whole)
    one = compiled(x[2:3], y[2:3])
    assert_equal(fxcurv.merge(fxcurv.merge(first, one), compiled(x[3:], y[3:])), whole)


def test_merging_keeps_factors_as_vectors() -> None:
    compiled = fxcurv.compile(net(), quantities="kflr")
    merged = fxcurv.merge(compiled(*batch(2)), compiled(*batch(3, seed=1)))
    block = merged["kflr"]["wide.weight"]
    assert isinstance(block.input_moment, LazyGram)
    assert (block.input_moment.count, block.averaged) == (5, 5)


def test_sequences_of_other_lengths_are_weighted_by_positions() -> None:
    """A averages over all positions of both; the gradient and G are sums over terms."""
    compiled = fxcurv.compile(tokens(False), nn.CrossEntropyLoss(reduction="sum"), ["kflr", "grad"])
    short, long = (compiled(reals(2, 3, n) - 0.5, labels(2)) for n in (5, 9))
    merged = fxcurv.merge(short, long)
    A = (short["kflr"]["fc.weight"].A * 8 + long["kflr"]["fc.weight"].A * 16) / 24
    close(merged["kflr"]["fc.weight"].A, A)
    close(merged["grad"]["fc.bias"], short["grad"]["fc.bias"] + long["grad"]["fc.bias"])
    dense = fxcurv.compile(tokens(True), quantities="grad")
    empty = fxcurv.merge(dense(reals(2, 3, 5), labels(2, 4)), dense(reals(1, 3, 9), labels(1, 8)))
    assert empty.output.shape == (3, 0)


def test_results_that_do_not_fit_are_refused() -> None:
    x, y = reals(4, 3, 5), labels(4)
    mine = fxcurv.compile(tokens(False), quantities="kflr")(x, y)
    frozen = tokens(False)
    frozen.fc.bias.requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue, reportArgumentType]
    others: dict[str, fxcurv.Curvature] = {
        "of different models: 'conv.weight'": fxcurv.compile(tokens(False).float(), quantities="kflr")(x.float(), y),
        "have the reductions 'mean' and 'sum'": fxcurv.compile(
            tokens(False), nn.CrossEntropyLoss(reduction="sum"), "kflr"
        )(x, y),
        "the quantities are kflr and grad": fxcurv.compile(tokens(False), quantities="grad")(x, y),
        "kflr has other parameters": fxcurv.compile(tokens(False), quantities={"*": None, "fc.*": "kflr"})(x, y),
        "is exact and frozen": fxcurv.compile(frozen, quantities="kflr")(x, y),
    }
    for text, other in others.items():
        with pytest.raises(fxcurv.FxcurvError, match=text) as caught:
            fxcurv.merge(mine, other)
        assert caught.value.code == "FXC425"
    expand = fxcurv.compile(tokens(False), quantities=fxcurv.KFAC())(x, y)
    reduce = fxcurv.compile(tokens(False), quantities=fxcurv.KFAC(approx="reduce"))(x, y)
    with pytest.raises(fxcurv.FxcurvError, match=r"approx='expand'.* and .*approx='reduce'"):
        fxcurv.merge(expand, reduce)
    bare = single("q", fxcurv.Kronecker((2, 2), torch.eye(2), torch.eye(2), parameters=("w",)))
    with pytest.raises(fxcurv.FxcurvError, match="the model of one of them is unknown"):
        fxcurv.merge(bare, bare)
