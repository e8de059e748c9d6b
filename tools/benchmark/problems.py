"""Problems: networks with inputs and labels, all made from a seed."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

SEED = 0


@dataclass(frozen=True)
class Problem:
    """A network on random data: `batch` inputs of `shape`, each with one of `classes` labels.

    With a `vocabulary`, inputs are tokens and each has a label. `quick_batch` is the batch of the smoke test (none: not
    part of it), `limit` the processor seconds that a row may take, `package` what the network is from.
    """

    build: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]
    classes: int = 10
    vocabulary: int = 0
    quick_batch: int | None = None
    limit: float = 8
    package: str = "torch"

    def make(self, device: str = "cpu") -> tuple[nn.Module, Tensor, Tensor]:
        """(model, inputs, labels), the same at every call and on every device."""
        torch.manual_seed(SEED)
        model = self.build().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                randomise(module)
        size = (self.batch, *self.shape)
        x = torch.randint(self.vocabulary, size) if self.vocabulary else torch.randn(size)
        y = torch.randint(self.classes, size if self.vocabulary else (self.batch,))
        return model.to(device), x.to(device), y.to(device)

    @property
    def absent(self) -> bool:
        """Whether the network's package is not installed."""
        return importlib.util.find_spec(self.package) is None

    def __str__(self) -> str:
        vocabulary = f" of {self.vocabulary} tokens" if self.vocabulary else ""
        return f"N={self.batch}, {'×'.join(map(str, self.shape))}{vocabulary}, C={self.classes}"


def randomise(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Statistics, scale and shift as training leaves them: neither 0 nor 1."""
    with torch.no_grad():
        for tensor, low, high in (
            (norm.running_mean, -0.2, 0.2),
            (norm.running_var, 0.5, 1.5),
            (norm.weight, 0.8, 1.2),
            (norm.bias, -0.1, 0.1),
        ):
            if tensor is not None:
                tensor.uniform_(low, high)


# Networks ---------------------------------------------------------------------------------------------------------


def net_3c3d() -> nn.Module:
    """DeepOBS' 3C3D network for CIFAR-10; its pooling pads below and to the right, as TensorFlow's 'SAME' does."""

    def block(inputs: int, outputs: int, kernel: int, padding: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=padding)
        return [convolution, nn.ReLU(), nn.MaxPool2d(3, stride=2, ceil_mode=True)]

    convolutions = (*block(3, 64, 5, 0), *block(64, 96, 3, 0), *block(96, 128, 3, 1))
    dense = (nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(*convolutions, nn.Flatten(), *dense)


def all_cnn_c() -> nn.Module:
    """DeepOBS' All-CNN-C for CIFAR-100 (Springenberg et al. 2015), its strided convolutions padded on both sides."""

    def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU()]

    first = (*conv(3, 96), *conv(96, 96), *conv(96, 96, stride=2))
    second = (*conv(96, 192), *conv(192, 192), *conv(192, 192, stride=2))
    last = (*conv(192, 192, padding=0), *conv(192, 192, 1, padding=0), *conv(192, 100, 1, padding=0))
    return nn.Sequential(*first, *second, *last, nn.AvgPool2d(6), nn.Flatten())


class Encoder(nn.Module):
    """A transformer encoder of two layers that classifies a sequence of vectors by the mean of what comes out."""

    def __init__(self, inputs: int = 32, width: int = 128, classes: int = 10) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, batch_first=True)
        self.embedding = nn.Linear(inputs, width)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


class LanguageModel(nn.Module):
    """A model of transformers with one output, logits as [N, C, T]: classes on axis 1, as cross entropy has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits.transpose(1, 2)


def gpt2() -> nn.Module:
    """GPT-2 of two layers, with the head tied to the embedding."""
    transformers: Any = importlib.import_module("transformers")
    sizes = {"vocab_size": TOKENS, "n_positions": 64, "n_embd": 128, "n_layer": 2, "n_head": 4}
    configuration = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, use_cache=False)
    return LanguageModel(transformers.GPT2LMHeadModel(configuration))


def from_torchvision(name: str, classes: int) -> Callable[[], nn.Module]:
    """A constructor of torchvision's model, without weights from anywhere."""

    def build() -> nn.Module:
        return importlib.import_module("torchvision").models.get_model(name, weights=None, num_classes=classes)

    return build


def from_timm(name: str, classes: int) -> Callable[[], nn.Module]:
    """A constructor of timm's model, without weights from anywhere."""

    def build() -> nn.Module:
        return importlib.import_module("timm").create_model(name, pretrained=False, num_classes=classes)

    return build


TOKENS = 256

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)

PROBLEMS: dict[str, Problem] = {
    "resnet18": Problem(from_torchvision("resnet18", 10), batch=16, shape=(3, 64, 64), limit=12, package="torchvision"),
    "3c3d": Problem(net_3c3d, batch=32, shape=CIFAR, quick_batch=4),
    "encoder": Problem(Encoder, batch=16, shape=(32, 32), quick_batch=4),
    "gpt2": Problem(gpt2, batch=8, shape=(64,), classes=TOKENS, vocabulary=TOKENS, package="transformers"),
    "3c3d_n128": Problem(net_3c3d, batch=128, shape=CIFAR),
    "allcnnc": Problem(all_cnn_c, batch=32, shape=CIFAR, classes=100),
    "resnet18_32": Problem(
        from_torchvision("resnet18", 10), batch=64, shape=CIFAR, quick_batch=2, package="torchvision"
    ),
    "vit_tiny": Problem(from_timm("vit_tiny_patch16_224", 10), batch=8, shape=IMAGENET, package="timm"),
    "convnext_atto": Problem(from_timm("convnext_atto", 10), batch=8, shape=IMAGENET, package="timm"),
    "resnet50": Problem(
        from_torchvision("resnet50", 1000), batch=8, shape=IMAGENET, classes=1000, limit=25, package="torchvision"
    ),
    "resnet18_32_n16": Problem(from_torchvision("resnet18", 10), batch=16, shape=CIFAR, package="torchvision"),
}
