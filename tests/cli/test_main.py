"""The command line: what each command prints, writes and returns: 0 done or passed, 1 findings, 2 usage or refusal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.checks.levels import CheckTarget, Request, examine
from fxcurv.cli.main import main
from fxcurv.models import data
from fxcurv.models.targets import Target, resolve

NETS = """
import torch
from torch import nn

def small(classes: int = 10):
    layers = nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, classes)
    model = nn.Sequential(*layers).double()
    model.input_shape = (1, 8, 8)
    return model

def shapeless():
    return nn.Linear(4, 3).double()

def scalar():
    return nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))

class Partly(nn.Module):
    input_shape = (3,)
    def __init__(self):
        super().__init__()
        self.body, self.fc, self.spare = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2), nn.Linear(2, 2)
    def forward(self, x):
        return self.fc(self.body(x).relu())

class Mixing(nn.Module):
    input_shape = (3,)
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
    def forward(self, x):
        y = self.fc(x)
        return y - y.mean(0)

class Pair(nn.Module):
    input_shape = (3,)
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
    def forward(self, x):
        return self.fc(x), x
"""


@pytest.fixture
def nets(tmp_path: Path) -> str:
    file = tmp_path / "nets.py"
    file.write_text(NETS)
    return str(file)


Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *argv: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command."""
    try:
        code = main(argv)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def saved(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()


def digits(target: Target, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    pytest.importorskip("sklearn")
    loaded = data.load("digits", batch, target.input_shape or (), seed=seed)
    assert loaded.targets is not None
    return loaded.inputs.double(), loaded.targets


# compute -------------------------------------------------------------------------------------------------------------


def test_compute_prints_a_table_and_saves_every_tensor(nets: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "curvature.safetensors"
    argv = ("compute", f"{nets}:small", "--data", "digits", "--batch", "4", "--seed", "3", "--save", str(file))
    code, out, err = run(capsys, *argv, "--quantities", "kfac, diag_ggn,kflr")
    assert (code, err) == (0, "")
    target = resolve(f"{nets}:small", seed=3)
    x, y = digits(target, 4, seed=3)
    first, second = out.splitlines()[:2]
    assert first == f"{nets}:small: 4 of scikit-learn's 8×8 digits, as (1, 8, 8)"
    loss = nn.functional.cross_entropy(target.model(x), y).item()
    assert second == f"loss {loss:.6g} (mean) over 4 samples"
    assert out.splitlines()[-1] == f"wrote {file}"
    tensors, metadata = saved(file)
    names = [name for name, _ in target.model.named_parameters()]
    assert {key: metadata[key] for key in metadata if "/" in key} == {
        f"{quantity}/{name}": "exact" for quantity in ("kfac", "diag_ggn", "kflr") for name in names
    }
    assert (metadata["reduction"], metadata["samples"]) == ("mean", "4")
    assert float(metadata["loss"]) == pytest.approx(loss, rel=1e-12)
    expected = reference.diag_ggn(target.model, nn.CrossEntropyLoss(), x, y)
    for name in names:
        assert re.search(rf"^{re.escape(name)} .* diag_ggn .* exact ", out, re.MULTILINE)
        torch.testing.assert_close(tensors[f"diag_ggn/{name}/value"], expected[name], rtol=1e-9, atol=1e-12)
    result = fxcurv.load(file, target.model)
    A = result["kfac"]["4.weight"].A
    assert A.shape == (27, 27)
    torch.testing.assert_close(result["kflr"]["4.weight"].A, A, rtol=1e-12, atol=0)
    torch.testing.assert_close(result["kflr"]["4.bias"].diag(), expected["4.bias"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits"])
def test_compute_for_other_losses(nets: str, tmp_path: Path, capsys: Capture, loss: str) -> None:
    """The GGN of either depends on the inputs alone; the targets are drawn at random, from the seed."""
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for seed, file in zip("001", files, strict=True):
        code, out, _ = run(
            capsys, "compute", f"{nets}:small", "--loss", loss, "--quantities", "diag_ggn,grad", "--data", "digits",
            "--batch", "3", "--seed", seed, "--save", str(file),
        )  # fmt: skip
        assert code == 0
        assert "diag_ggn" in out
    target = resolve(f"{nets}:small")
    x, _ = digits(target, 3)
    module = {"mse": nn.MSELoss(), "bce_with_logits": nn.BCEWithLogitsLoss()}[loss]
    expected = reference.diag_ggn(target.model, module, x, torch.zeros(3, 10, dtype=torch.float64))
    (tensors, _), (again, _), (other, _) = map(saved, files)
    for name, value in expected.items():
        torch.testing.assert_close(tensors[f"diag_ggn/{name}/value"], value, rtol=1e-9, atol=1e-12)
    assert torch.equal(tensors["grad/4.bias/value"], again["grad/4.bias/value"])
    assert not torch.equal(tensors["grad/4.bias/value"], other["grad/4.bias/value"])


def test_compute_takes_predictions_where_the_labels_are_not_the_models(
    nets: str, tmp_path: Path, capsys: Capture
) -> None:
    file, name = tmp_path / "curvature.safetensors", f"{nets}:small?classes=3"
    argv = ("--data", "digits", "--quantities", "grad", "--save", str(file))
    assert run(capsys, "compute", name, *argv)[0] == 0
    target = resolve(name)
    x, y = digits(target, 8)
    assert y.max() >= 3
    output = target.model(x)
    loss = nn.functional.cross_entropy(output, output.argmax(1)).item()
    assert float(saved(file)[1]["loss"]) == pytest.approx(loss, rel=1e-12)


def test_compute_on_random_data_of_a_given_shape(nets: str, capsys: Capture) -> None:
    code, out, _ = run(capsys, "compute", f"{nets}:shapeless", "--input", "4", "--quantities", "grad")
    assert code == 0
    assert "8 standard normal inputs of shape (4,)" in out
    code, out, _ = run(capsys, "compute", f"{nets}:shapeless", "--input", "5x4", "--loss", "mse", "--batch", "1")
    assert code == 0
    assert "1 standard normal inputs of shape (5, 4)" in out
    assert "over 1 sample\n" in out


def test_compute_shows_what_has_no_value(nets: str, capsys: Capture) -> None:
    code, out, _ = run(capsys, "compute", f"{nets}:Partly", "--quantities", "diag_ggn")
    assert code == 0
    assert re.search(r"^body.weight .* frozen +-", out, re.MULTILINE)
    assert re.search(r"^spare.bias .* unreached +-", out, re.MULTILINE)
    assert re.search(r"^fc.bias .* exact +tensor", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["small", "--quantities", "kfca"], "no quantity is named 'kfca'; did you mean 'kfac'?"),
        (["small", "--quantities", ","], "no quantity was requested; choose some of grad, kfac"),
        (["smal"], "has no 'smal'; did you mean small"),
        (["shapeless"], "shapeless does not define the shape of its input; give --input"),
        (["small", "--input", "8xx8"], "--input 8xx8 is not a shape; give the sizes"),
        (["small", "--input", "1x-1x8"], "--input 1x-1x8 is not a shape; give the sizes"),
        (["small", "--input", "1x0x8"], "--input 1x0x8 is not a shape; give the sizes"),
        (["small", "--input", "3x8x8"], "the model fails on an input of shape [8, 3, 8, 8]: RuntimeError: Given"),
        (["small", "--batch", "0"], "a batch of 0 inputs of shape (1, 8, 8) is empty"),
        (["small", "--save", "no/such/folder/x.safetensors"], "there is no folder no/such/folder; create it"),
        (["scalar", "--input", "4"], "the model returns [8]: no classes; choose another --loss"),
        (["Pair"], "the model returns a tuple, not a tensor; use fxcurv.compile(..., output=...)"),
        (["Mixing"], "node 'mean' "),
        (["small", "--data", "digits", "--input", "5"], "5 inputs are not a square image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_compute_refuses_in_one_line(nets: str, capsys: Capture, argv: list[str], message: str) -> None:
    code, out, err = run(capsys, "compute", f"{nets}:{argv[0]}", *argv[1:])
    assert (code, out) == (2, "")
    assert err.startswith("fxcurv: ")
    assert err.count("\n") == 1
    assert message in err


# show ----------------------------------------------------------------------------------------------------------------


def test_show_prints_the_graphs_forward_and_backward(nets: str, capsys: Capture) -> None:
    code, out, err = run(capsys, "show", f"{nets}:small")
    assert (code, err) == (0, "")
    titles = [line for line in out.splitlines() if line in ("canonical", "forward") or line.startswith("backward")]
    assert titles == ["canonical", "backward[sampled(1)]", "backward[exact]"]
    assert out.count("opcode") == 3
    assert re.search(r"^call_module +\S+ +\S+ +\(.*\[N, 3, 3, 3\] +Conv2d +affine", out, re.MULTILINE)
    target = resolve(f"{nets}:small")
    compiled = fxcurv.compile(
        target.model, quantities=["kfac", "diag_ggn"], example_inputs=torch.zeros(2, 1, 8, 8).double()
    )
    assert fxcurv.tabular(compiled.stages["backward[exact]"]) in out


@pytest.mark.parametrize(
    ("stage", "titles"),
    [
        ("captured", ["captured"]),
        ("forward,lowered", ["lowered", "forward"]),
        ("backward", ["backward[exact]", "backward[gradient]"]),
        ("backward[exact]", ["backward[exact]"]),
    ],
)
def test_show_chooses_stages_and_code(nets: str, capsys: Capture, stage: str, titles: list[str]) -> None:
    argv = ("show", f"{nets}:shapeless", "--input", "4", "--quantities", "diag_ggn,grad", "--stage", stage)
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert sorted(re.findall(r"^(\S+)\nopcode", out, re.MULTILINE)) == sorted(titles)
    code, out, _ = run(capsys, *argv, "--code")
    assert code == 0
    assert out.count("def forward(self, ") == len(titles)
    assert "opcode" not in out


def test_show_tells_what_a_call_will_cost(nets: str, capsys: Capture) -> None:
    code, out, err = run(capsys, "show", f"{nets}:small", "--quantities", "kfac,diag_ggn", "--cost")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split()[:5] == ["graph", "node", "module", "GFLOP", "MiB"]
    assert re.search(
        r"^2 samples: .* GFLOP, about .* ms, peak .* MiB\nshares: kfac \d+%, diag_ggn \d+%$", out, re.MULTILINE
    )


def test_show_refuses_an_unknown_stage(nets: str, capsys: Capture) -> None:
    code, out, err = run(capsys, "show", f"{nets}:shapeless", "--input", "4", "--stage", "canonical,bakward")
    assert (code, out) == (2, "")
    assert "no stage is called 'bakward'; there are captured, lowered, canonical, forward, backward[" in err


# check ---------------------------------------------------------------------------------------------------------------


def test_check_passes(nets: str, capsys: Capture) -> None:
    code, out, err = run(capsys, "check", f"{nets}:Partly")
    assert (code, err) == (0, "")
    assert re.search(r"^fc.weight +Linear +\[2, 4\] +exact +exact$", out, re.MULTILINE)
    assert re.search(r"^body.bias +Linear +\[4\] +frozen +frozen$", out, re.MULTILINE)
    assert re.search(r"^spare.bias +Linear +\[2\] +unreached +unreached +FXC430$", out, re.MULTILINE)
    assert re.search(r"Partly: 6 parameters: 4 frozen, 4 exact, 4 unreached; .* -> PASS +\d+\.\d s$", out)


def test_check_finds(nets: str, capsys: Capture) -> None:
    code, out, err = run(capsys, "check", f"{nets}:Mixing", "--quantities", "kfac")
    assert (code, err) == (1, "")
    line = NETS[: NETS.index("y.mean(0)")].count("\n") + 1
    assert re.search(rf"^fc.weight +Linear +\[2, 3\] +unsupported +FXC401 .*nets.py:{line}$", out, re.MULTILINE)
    assert re.search(
        r"^  FXC401  error .*: node 'mean' .*samples of the batch mix here.*; make each", out, re.MULTILINE
    )
    assert "-> FAIL" in out


def test_check_of_several_targets_as_json(nets: str, capsys: Capture) -> None:
    names = [f"{nets}:{net}" for net in ("Partly", "Mixing", "small")]
    code, out, err = run(capsys, "check", *names, "--format", "json", "--quantities", "kfac,grad")
    assert (code, err) == (1, ""), "one of them fails"
    document = json.loads(out)
    assert [target["name"] for target in document["targets"]] == names
    assert [target["ok"] for target in document["targets"]] == [True, False, True]
    rows = [[row for row in document["rows"] if row["target"] == name] for name in names]
    for name, of_target in zip(names, rows, strict=True):
        parameters = [parameter for parameter, _ in resolve(name).model.named_parameters()]
        found = [(row["quantity"], row["parameter"]) for row in of_target]
        assert found == [(quantity, parameter) for quantity in ("kfac", "grad") for parameter in parameters]
    partly, mixing, small = ({row["parameter"]: row["status"] for row in of_target} for of_target in rows)
    assert partly == {
        "body.weight": "frozen",
        "body.bias": "frozen",
        "fc.weight": "exact",
        "fc.bias": "exact",
        "spare.weight": "unreached",
        "spare.bias": "unreached",
    }
    assert set(mixing.values()) == {"unsupported"}
    assert set(small.values()) == {"exact"}
    assert all(row["message"].startswith("node 'mean'") and row["suggestion"] for row in rows[1])


def test_check_takes_the_loss_and_the_shape(nets: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[nn.Module] = []

    def examined(target: CheckTarget, request: Request) -> fxcurv.Report:
        losses.append(request.loss.module)
        assert isinstance(target.inputs, Tensor)
        assert target.inputs.shape == (2, 7, 4)
        return examine(target, request)

    monkeypatch.setattr("fxcurv.checks.pool.examine", examined)
    code, out, _ = run(capsys, "check", f"{nets}:shapeless", "--input", "7x4", "--loss", "mse")
    assert code == 0
    assert [type(loss) for loss in losses] == [nn.MSELoss]
    assert "2 parameters: 4 exact; kfac 100.0%, diag_ggn 100.0% -> PASS" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.py:net"], "there is no file nowhere.py"),
        (["torchvision:resnet81"], "torchvision has no model 'resnet81'; did you mean resnet18"),
        (["torch.nn:ReLU", "--input", "3"], "the model has no trainable parameters"),
        (["torch.nn:Linear?in_features=2&out_features=1", "--input", "2", "--quantities", "dia_ggn"], "'diag_ggn'?"),
    ],
    ids=["file", "name", "no parameters", "quantity"],
)
def test_check_of_nothing_that_can_be_checked(capsys: Capture, argv: list[str], message: str) -> None:
    code, out, err = run(capsys, "check", *argv)
    assert (code, out) == (2, "")
    assert err.startswith("fxcurv: ")
    assert message in err


# demo, env and usage -------------------------------------------------------------------------------------------------


def test_demo_is_given_folder_and_seed(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, int]] = []
    monkeypatch.setattr("fxcurv.cli.demo.run", lambda output, *, seed: calls.append((output, seed)))
    assert run(capsys, "demo", "--output", str(tmp_path), "--seed", "4")[0] == 0
    assert run(capsys, "demo")[0] == 0
    assert calls == [(tmp_path, 4), (Path("fxcurv-demo"), 0)]


def test_demo_refuses_a_file_as_folder(nets: str, capsys: Capture) -> None:
    code, _, err = run(capsys, "demo", "--output", nets)
    assert code == 2
    assert f"cannot write to {nets}" in err


def test_env_names_every_dependency(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(package: str) -> str:
        if package == "timm":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr("fxcurv.cli.main.version", installed)
    code, out, _ = run(capsys, "env")
    assert code == 0
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        package = re.split(r"[<>=~! ]", requirement)[0]
        assert f"{package} {version(package)}\n" in out
    assert "timm not installed\n" in out
    assert f"fxcurv {fxcurv.__version__}, 1 threads, " in out


def test_version(capsys: Capture) -> None:
    assert run(capsys, "--version") == (0, f"fxcurv {fxcurv.__version__}\n", "")


@pytest.mark.parametrize(
    "argv", [[], ["bogus"], ["compute"], ["compute", "a.py:b", "--loss", "l1"], ["check", "--format", "pdf"]]
)
def test_wrong_usage(capsys: Capture, argv: list[str]) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("usage: fxcurv")


def python(*argv: str) -> str:
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_module_is_the_command() -> None:
    out = python("-m", "fxcurv", "--help")
    assert out.startswith("usage: fxcurv ")
    assert {"compute", "show", "check", "demo", "env"} <= set(out.split())


def test_optional_packages_are_imported_when_needed() -> None:
    optional = ("torchvision", "timm", "sklearn", "skimage", "matplotlib", "mlxtend", "safetensors")
    modules = "sys, fxcurv.cli.main, fxcurv.inspect.plots"
    code = f"import {modules}; print([name for name in {optional} if name in sys.modules])"
    assert python("-c", code) == "[]\n"


# A whole model -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compute_on_mobilenet_v2(tmp_path: Path, capsys: Capture) -> None:
    """The query is the builder's, --input overrides the shape that the model says; no parameter goes without."""
    pytest.importorskip("skimage")
    name, file = "torchvision:mobilenet_v2?num_classes=10", tmp_path / "curvature.safetensors"
    argv = ("--input", "3x32x32", "--data", "photos", "--quantities", "kfac,diag_ggn", "--save", str(file))
    code, out, err = run(capsys, "compute", name, *argv)
    assert (code, err) == (0, "")
    assert out.startswith(f"{name}: photos chelsea, coffee, as (3, 32, 32)\n")
    tensors, metadata = saved(file)
    parameters = dict(resolve(name).model.named_parameters())
    assert parameters["classifier.1.weight"].shape == (10, 1280)
    statuses = {key: value for key, value in metadata.items() if "/" in key}
    assert set(statuses) == {f"{quantity}/{p}" for quantity in ("kfac", "diag_ggn") for p in parameters}
    assert all(re.fullmatch(r"exact|approx\(\w+\)", status) for status in statuses.values())
    for p, value in parameters.items():
        assert tensors[f"diag_ggn/{p}/value"].shape == value.shape
        assert tensors[f"diag_ggn/{p}/value"].isfinite().all()
    depthwise = fxcurv.load(file)["kfac"]["features.1.conv.0.0.weight"].A
    assert depthwise.shape == (32, 9, 9), "a factor per group of a depthwise convolution"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "fxcurv", "codes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141  # 128 + SIGPIPE, as shells say it of any command
