"""VGG-16 and VGG-19, plain and with batch norm (Simonyan and Zisserman, 2014, arXiv:1409.1556: D and E)."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

from torch import Tensor, nn

import cnnops.nn
from cnnops.models.parts import he_normal, small_normal

# A block is some convolutions of one width, and a pooling.
CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Logits ``N x classes`` of ``N x channels x 224 x 224``; subclasses say how many convolutions.

                                            VGG-16     VGG-19
        conv 64@3x3 p1, ReLU                  x 2        x 2
        max pool 2                            64 x 112 x 112
        conv 128@3x3 p1, ReLU                 x 2        x 2
        max pool 2                            128 x 56 x 56
        conv 256@3x3 p1, ReLU                 x 3        x 4
        max pool 2                            256 x 28 x 28
        conv 512@3x3 p1, ReLU                 x 3        x 4
        max pool 2                            512 x 14 x 14
        conv 512@3x3 p1, ReLU                 x 3        x 4
        max pool 2                            512 x 7 x 7
        dense 25088 -> 4096, ReLU             dense 4096 -> 4096, ReLU
        dense 4096 -> classes

    With `batch_norm` one stands between each convolution and its ReLU; the convolutions keep their biases.
    Dropout of a half follows the first two dense layers. Other images, of 32 x 32 or more, are pooled to
    7 x 7. Parameters are named as in torchvision's ``vgg16``, ``vgg16_bn`` and so on. `layers` as in
    `LeNet5`.
    """

    input_size = (224, 224)
    convolutions: ClassVar[tuple[int, ...]]
    """How many in each block."""
    batch_norm: ClassVar[bool] = False

    def __init__(
        self, classes: int = 1000, channels: int = 3, *, layers: ModuleType = cnnops.nn
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        C = channels
        for K, convolutions in zip(CHANNELS, self.convolutions, strict=True):
            for _ in range(convolutions):
                self.features.append(layers.Conv2d(C, K, 3, padding=1))
                if self.batch_norm:
                    self.features.append(layers.BatchNorm2d(K))
                self.features.append(nn.ReLU())
                C = K
            self.features.append(layers.MaxPool2d(2))
        self.avgpool = layers.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, classes),
        )
        he_normal(self)
        small_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


class VGG16(VGG):
    convolutions = (2, 2, 3, 3, 3)


class VGG19(VGG):
    convolutions = (2, 2, 4, 4, 4)


class VGG16BN(VGG16):
    batch_norm = True


class VGG19BN(VGG19):
    batch_norm = True
