"""Networks built from `cnnops.nn`'s layers, or from `torch.nn`'s where ``layers=torch.nn`` is asked for.

All but LeNet-5 name their parameters and buffers as torchvision does: its state_dicts load as they are.
"""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

from torch import nn

from cnnops.models.alexnet import AlexNet
from cnnops.models.convnext import ConvNeXtT
from cnnops.models.efficientnet import EfficientNetB0
from cnnops.models.lenet import LeNet5, LeNet5Original
from cnnops.models.mobilenet import MobileNetV2
from cnnops.models.resnet import ResNet18, ResNet34, ResNet50, ResNet101, ResNet152
from cnnops.models.vgg import VGG16, VGG16BN, VGG19, VGG19BN

LeNet = LeNet5 | LeNet5Original


class Model(Protocol):
    """What every class below is to its caller."""

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width that the network was published with."""

    def __call__(
        self, classes: int = ..., channels: int = ..., *, layers: ModuleType = ...
    ) -> nn.Module: ...


LENETS: dict[str, type[LeNet5] | type[LeNet5Original]] = {
    "lenet5": LeNet5,
    "lenet5-original": LeNet5Original,
}
"""Those for digits."""

MODELS: dict[str, Model] = {
    **LENETS,
    "alexnet": AlexNet,
    "vgg16": VGG16,
    "vgg16-bn": VGG16BN,
    "vgg19": VGG19,
    "vgg19-bn": VGG19BN,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "resnet152": ResNet152,
    "mobilenetv2": MobileNetV2,
    "efficientnet-b0": EfficientNetB0,
    "convnext-tiny": ConvNeXtT,
}
"""Names on the command line."""

__all__ = [
    "LENETS",
    "MODELS",
    "AlexNet",
    "ConvNeXtT",
    "EfficientNetB0",
    "LeNet",
    "LeNet5",
    "LeNet5Original",
    "MobileNetV2",
    "Model",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNet101",
    "ResNet152",
    "VGG16",
    "VGG16BN",
    "VGG19",
    "VGG19BN",
]
