"""AlexNet, in its author's one-column form of 2014 (Krizhevsky, arXiv:1404.5997)."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, nn

import cnnops.nn


class AlexNet(nn.Module):
    """Logits ``N x classes`` of ``N x channels x 227 x 227``.

        conv 64@11x11 s4 p2, ReLU, max pool 3 s2    64 x 56 x 56 -> 64 x 27 x 27
        conv 192@5x5 p2, ReLU, max pool 3 s2       192 x 27 x 27 -> 192 x 13 x 13
        conv 384@3x3 p1, ReLU                      384 x 13 x 13
        conv 256@3x3 p1, ReLU                      256 x 13 x 13
        conv 256@3x3 p1, ReLU, max pool 3 s2       256 x 13 x 13 -> 256 x 6 x 6
        dense 9216 -> 4096, ReLU                   dense 4096 -> 4096, ReLU
        dense 4096 -> classes

    Dropout of a half stands before the first two dense layers. Other images, of 63 x 63 or more, are pooled
    to 6 x 6. Parameters are named as in torchvision's ``alexnet``. `layers` as in `LeNet5`.
    """

    input_size = (227, 227)

    def __init__(
        self, classes: int = 1000, channels: int = 3, *, layers: ModuleType = cnnops.nn
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            layers.Conv2d(channels, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            layers.MaxPool2d(3, stride=2),
            layers.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            layers.MaxPool2d(3, stride=2),
            layers.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            layers.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            layers.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            layers.MaxPool2d(3, stride=2),
        )
        self.avgpool = layers.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits
