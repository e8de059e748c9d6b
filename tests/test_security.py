"""What is read may come from anyone: no pickle, no code, no allocation by its word; what is written stays in place."""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.models.targets import TargetError, resolve
from fxcurv.results.writing import checksum

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "fxcurv").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "urllib.request", "requests"}

PICKLING = {"processes.py": {"pickle"}, "fingerprint.py": {"pickle"}}
"""Messages between the processes of one job, as in torch.distributed, and digests, which are written and never read."""


class Intruder:
    """Unpickling it creates the file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.mark), "w"))


# No code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=[str(s.relative_to(ROOT)) for s in SOURCES])
def test_no_module_reads_pickles_runs_text_or_downloads(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = getattr(node, "module", None)
            names = {base, *(a.name for a in node.names), *(f"{base}.{a.name}" for a in node.names)}
            assert not names & FORBIDDEN - PICKLING.get(source.name, set()), f"{source.name}:{node.lineno}"
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert called != "pickle.loads" or source.name == "processes.py", f"{source.name}:{node.lineno}"
        assert called not in ("eval", "exec", "os.system", "torch.hub.load"), f"{source.name}:{node.lineno}"
        assert called != "torch.load" or keywords.get("weights_only") == "True", f"{source.name}:{node.lineno}"
        assert keywords.get("allow_pickle", "False") == "False", f"{source.name}:{node.lineno}"


def test_a_pickle_in_the_place_of_a_result_is_refused(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "c.safetensors"
    torch.save({"loss": Intruder(mark)}, file)
    for content in (file.read_bytes(), pickle.dumps(Intruder(mark))):
        file.write_bytes(content)
        with pytest.raises(fxcurv.FxcurvError, match="truncated, or not a safetensors file"):
            fxcurv.load(file)
        with pytest.raises(fxcurv.FxcurvError, match="truncated, or not a safetensors file"):
            fxcurv.merge(file, file)
    assert not mark.exists()


# Targets ----------------------------------------------------------------------------------------------------------


def test_a_target_reads_no_checkpoint_by_the_library(tmp_path: Path) -> None:
    """timm would unpickle it, in some of its versions without restriction."""
    pytest.importorskip("timm")
    mark, file = tmp_path / "mark", tmp_path / "trained.pth"
    file.write_bytes(pickle.dumps({"head.bias": Intruder(mark)}))
    with pytest.raises(TargetError, match="would be read by the library; nothing is downloaded: give weights=FILE"):
        resolve(f"timm:test_vit?checkpoint_path={file}")
    assert not mark.exists()


@pytest.mark.parametrize(
    "value", ["{[]:1}", "-" * 100_000 + "1", "(" * 5000, "__import__('os').getcwd()", "9" * 5000, "a\0b", "%00"]
)
def test_values_of_targets_are_literals_or_text(value: str) -> None:
    with pytest.raises(TargetError, match=r"collections:Counter returns a Counter, not a torch\.nn\.Module"):
        resolve(f"collections:Counter?x={value}")


def test_targets_open_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    resolve("torchvision:squeezenet1_1?num_classes=2")
    for target in ("torchvision:squeezenet1_1?weights=DEFAULT", "torchvision:resnet18?pretrained=True"):
        with pytest.raises(TargetError, match="nothing is downloaded"):
            resolve(target)


def test_a_target_imports_only_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder from elsewhere with a torchvision.py in it takes no part, unless a target of the user's own names it."""
    (tmp_path / "torchvision.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "json.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    resolve("torchvision:squeezenet1_1?num_classes=2")


# Files ------------------------------------------------------------------------------------------------------------


def result() -> fxcurv.Curvature:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    return fxcurv.compile(model, quantities=["grad", "kfac"])(x, torch.tensor([0, 1]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    result().save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def edited(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """The file with another header: its tensors and the manifest, which is text in it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["manifest"])
    change(header, manifest)
    if header["__metadata__"]["manifest"] is not None:
        header["__metadata__"]["manifest"] = json.dumps(manifest).replace("Infinity", "1e999")
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def block(manifest: dict[str, Any]) -> dict[str, Any]:
    return next(value for value in manifest["values"] if value["form"] == "Kronecker")


CRAFTED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "huge shape in the header": (lambda h, m: h["loss"].update(shape=[2**40]), "truncated or inconsistent"),
    "overflowing shape": (lambda h, m: h["loss"].update(shape=[2**62, 2**62]), "truncated or inconsistent"),
    "negative shape": (lambda h, m: h["output"].update(shape=[-1, 2]), "truncated or inconsistent"),
    "offsets behind the end": (lambda h, m: h["output"].update(data_offsets=[0, 2**50]), "truncated or inconsistent"),
    "offsets that overlap": (
        lambda h, m: h["loss"].update(data_offsets=h["output"]["data_offsets"]),
        "truncated or inconsistent",
    ),
    "another type": (lambda h, m: h["loss"].update(dtype="I64"), "differs from the file"),
    "integers": (
        lambda h, m: (h["loss"].update(dtype="I64"), m["tensors"]["loss"].__setitem__(0, "torch.int64")),
        "has an invalid loss, output",
    ),
    "unknown type": (lambda h, m: h["loss"].update(dtype="X99"), "truncated or inconsistent"),
    "infinite divisor": (lambda h, m: m.update(divisor=math.inf), "its JSON is malformed"),
    "superscript version": (
        lambda h, m: h["__metadata__"].update(format="fxcurv \N{SUPERSCRIPT TWO}"),
        "does not contain a result of fxcurv",
    ),
    "long version": (
        lambda h, m: h["__metadata__"].update(format="fxcurv " + "9" * 5000),
        "not contain a result of fxcurv",
    ),
    "negative count": (lambda h, m: block(m).update(averaged=-2), "averaged, that is negative"),
    "reduction": (lambda h, m: m.update(reduction="none"), "reduction that is neither mean nor sum"),
    "parameter twice": (
        lambda h, m: m["quantities"]["grad"].append(m["quantities"]["grad"][0]),
        "grad has a parameter twice",
    ),
    "a tensor of another file": (
        lambda h, m: m["values"][0]["tensors"].update(value="../other.safetensors"),
        "names '../other.safetensors', which does not exist",
    ),
    "no manifest": (lambda h, m: h["__metadata__"].update(manifest=None), "its JSON is malformed"),
}


@contextmanager
def little_memory(room: int = 64 << 20) -> Iterator[None]:
    """Refuse this process more address space than it has and `room` bytes."""
    resource = pytest.importorskip("resource")
    before, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded by what Linux tells")


@linux
def test_memory_is_bounded() -> None:
    """What the next test relies on."""
    with little_memory(), pytest.raises(RuntimeError, match="allocate memory"):
        torch.empty(1 << 27)


@linux
@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_refused(file: Path, name: str) -> None:
    change, message = CRAFTED[name]
    edited(file, change)
    with little_memory(), pytest.raises(fxcurv.FxcurvError, match=message) as caught:
        fxcurv.load(file)
    assert (caught.value.code, caught.value.remedy) == ("FXC423", "give a file that Curvature.save wrote")


PROGRESS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nothing": (dict.clear, "progress lacks 'asked'"),
    "asked": (lambda p: p.update(asked=[]), "progress.asked is not of type dict"),
    "batches": (lambda p: p.update(batches="3"), "progress.batches is not of type int"),
    "digest": (lambda p: p.update(digest=None), "progress.digest is not of type str"),
    "generator": (lambda p: p.update(generator="AAAA"), "progress.generator is not a generator state"),
    "generator that is no text": (lambda p: p.update(generator="x"), "progress.generator is not a generator state"),
    "weights": (
        lambda p: p["standard_error"].update(weights=[0.0] * 9),
        "progress.standard_error does not have the sums of a stopping rule",
    ),
    "sums": (
        lambda p: p["standard_error"].update(sums=[[0.0]]),
        "progress.standard_error does not have the sums of a stopping rule",
    ),
    "deep": (
        lambda p: p["standard_error"].update(sums=[[[[]], 0.0, 0.0]]),
        r"progress.standard_error.sums\[0\]\[0\] is not of type float",
    ),
}


@pytest.mark.parametrize("name", PROGRESS)
def test_a_crafted_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    """With a checksum that is right."""
    file, (change, message) = tmp_path / "c.safetensors", PROGRESS[name]
    with torch.random.fork_rng(devices=[]):
        compiled = fxcurv.compile(nn.Linear(3, 2).eval(), quantities="grad")
    batches = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    compiled.accumulate(batches, checkpoint=file)
    with safe_open(file, "pt") as held:
        metadata, tensors = held.metadata(), {key: held.get_tensor(key) for key in held.keys()}
    progress = json.loads(metadata["progress"])
    change(progress)
    metadata["progress"] = json.dumps(progress)
    save_file(tensors, file, metadata | {"checksum": checksum(metadata, tensors)})
    content = file.read_bytes()
    with pytest.raises(fxcurv.FxcurvError, match=message) as caught:
        compiled.accumulate(batches, checkpoint=file)
    assert caught.value.code == "FXC423"
    assert file.read_bytes() == content


def test_many_keys_are_compared_in_one_pass(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    text = ("{" + ",".join(f'"{k}":0' for k in range(200_000)) + ',"199999":1}').encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(fxcurv.FxcurvError, match="the key '199999' is duplicated"):
        fxcurv.load(file)


def test_what_is_saved_stays_where_it_is_told(tmp_path: Path) -> None:
    """Names of parameters are no paths, and a link is replaced, not followed."""
    model = nn.Sequential()
    with torch.random.fork_rng(devices=[]):
        model.add_module("/escape", nn.Linear(3, 2))
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("untouched")
    file = inside / "c.safetensors"
    os.symlink(outside, file)
    saved = fxcurv.compile(model.eval())(torch.ones(2, 3), torch.tensor([0, 1]))
    saved.save(file)
    assert outside.read_text() == "untouched"
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        *("inside", "inside/c.safetensors", "outside")
    ]
    assert list(fxcurv.load(file)["kfac"]) == ["/escape.weight", "/escape.bias"]
