"""Whole models, narrow."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from samples.rows import Model, mlp, sample


def classify(m: Any, x: Tensor) -> Tensor:
    """features, pooling, flatten, classifier: the forward pass of AlexNet and VGG."""
    return m.classifier(torch.flatten(m.avgpool(m.features(x)), 1))


def lenet() -> nn.Module:
    """Convolutions, average pools and tanh on 1x14x14."""
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)),
    )


def alexnet() -> nn.Module:
    """AlexNet's layers in their order, few channels, on 3x23x23."""
    features = nn.Sequential(
        *(nn.Conv2d(3, 4, 5, stride=2, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(4, 6, 3, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 1)),
    )
    classifier = nn.Sequential(
        *(nn.Dropout(), nn.Linear(16, 8), nn.ReLU(inplace=True)),
        *(nn.Dropout(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)),
    )
    return Model(classify, features=features, avgpool=nn.AdaptiveAvgPool2d((2, 2)), classifier=classifier)


def vgg_bn() -> nn.Module:
    """torchvision's VGG features with BatchNorm, few channels, on 3x12x12."""
    from torchvision.models.vgg import make_layers

    classifier = nn.Sequential(
        *(nn.Linear(20, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 4))
    )
    features = make_layers([3, "M", 4, "M", 5, 5, "M"], batch_norm=True)
    return Model(classify, features=features, avgpool=nn.AdaptiveAvgPool2d((2, 2)), classifier=classifier)


def resnet(block: str, width: int = 6, groups: int = 1) -> nn.Module:
    """torchvision's ResNet, one block a stage, `width` channels where it has 64."""
    from torchvision.models import resnet as tv

    class Narrow(tv.ResNet):
        def __init__(self, block: type[tv.BasicBlock | tv.Bottleneck]) -> None:
            nn.Module.__init__(self)
            self._norm_layer = nn.BatchNorm2d
            self.inplanes, self.dilation, self.groups, self.base_width = width, 1, groups, 64
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
            self.layer1 = self._make_layer(block, width, 1)
            self.layer2 = self._make_layer(block, width + 1, 2, stride=2)
            self.layer3 = self._make_layer(block, width + 2, 1, stride=2)
            self.layer4 = self._make_layer(block, width, 1, stride=2)
            self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(width * block.expansion, 4)

    return Narrow(getattr(tv, block))


def mobilenet_v2() -> nn.Module:
    """torchvision's MobileNetV2 with few channels and blocks, its wide last layers replaced."""
    from torchvision.models.mobilenetv2 import MobileNetV2
    from torchvision.ops.misc import Conv2dNormActivation

    setting = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]  # expansion, channels, blocks, stride
    model = MobileNetV2(num_classes=4, width_mult=0.1, inverted_residual_setting=setting, round_nearest=2)
    last: Any = model.features[-1]
    model.features[-1] = Conv2dNormActivation(last[0].in_channels, 8, kernel_size=1, activation_layer=nn.ReLU6)
    model.classifier[1] = nn.Linear(8, 4)
    return model


def efficientnet_lite() -> nn.Module:
    """timm's tf_efficientnet_lite0 with few channels and blocks: TensorFlow 'same' padding and ReLU6."""
    from timm.models._efficientnet_builder import decode_arch_def, resolve_bn_args, round_channels
    from timm.models.efficientnet import EfficientNet

    blocks = [["ds_r1_k3_s1_e1_c16"], ["ir_r2_k3_s2_e6_c24"], ["ir_r1_k5_s2_e6_c40"]]
    return EfficientNet(
        block_args=decode_arch_def(blocks, fix_first_last=True),
        num_classes=4,
        num_features=8,
        stem_size=3,
        fix_stem=True,
        round_chs_fn=partial(round_channels, multiplier=0.1, divisor=2),
        pad_type="same",
        act_layer=nn.ReLU6,
        norm_layer=partial(nn.BatchNorm2d, **resolve_bn_args({"bn_eps": 1e-3})),
    )


MODELS = (
    sample("model.mlp", lambda: mlp(6, 8, 7, 4), (6,), out=(4,)),
    sample("model.lenet", lenet, (1, 14, 14), out=(4,)),
    sample("model.alexnet", alexnet, (3, 23, 23), out=(4,)),
    sample("model.vgg_bn", vgg_bn, (3, 12, 12), out=(4,)),
    sample("model.resnet_basic", lambda: resnet("BasicBlock"), (3, 24, 24), out=(4,)),
    sample("model.resnet_bottleneck", lambda: resnet("Bottleneck", 3), (3, 24, 24), out=(4,)),
    sample("model.resnext", lambda: resnet("Bottleneck", 3, groups=2), (3, 24, 24), out=(4,)),
    sample("model.mobilenet_v2", mobilenet_v2, (3, 24, 24), out=(4,)),
    sample("model.efficientnet_lite", efficientnet_lite, (3, 24, 24), out=(4,)),
)
