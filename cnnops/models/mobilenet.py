"""MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381)."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, nn

import cnnops.nn
from cnnops.models.parts import conv_norm, he_normal, small_normal

# expansion, output channels, blocks, stride of the first block
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand to ``expansion·C`` channels, depthwise 3x3, project: ``N C H W -> N K H/stride W/stride``.

    Batch norm follows all three convolutions, ReLU6 the first two. x is added where sizes allow. Without an
    expansion the first convolution is left out.
    """

    def __init__(self, C: int, K: int, expansion: int, stride: int, layers: ModuleType) -> None:
        super().__init__()
        hidden = expansion * C
        self.conv = nn.Sequential()
        if expansion != 1:
            self.conv.append(conv_norm(layers, C, hidden, activation=nn.ReLU6))
        self.conv.append(conv_norm(layers, hidden, hidden, 3, stride, hidden, nn.ReLU6))
        self.conv.extend(conv_norm(layers, hidden, K))
        self.residual = stride == 1 and C == K

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Logits ``N x classes`` of ``N x channels x 224 x 224``.

        conv 32@3x3 s2 p1, bn, ReLU6      32 x 112 x 112
        1 inverted residual, e = 1        16 x 112 x 112
        2 inverted residuals, e = 6       24 x 56 x 56
        3 inverted residuals, e = 6       32 x 28 x 28
        4 inverted residuals, e = 6       64 x 14 x 14
        3 inverted residuals, e = 6       96 x 14 x 14
        3 inverted residuals, e = 6      160 x 7 x 7
        1 inverted residual, e = 6       320 x 7 x 7
        conv 1280@1x1, bn, ReLU6        1280 x 7 x 7
        global average, dropout 0.2, dense 1280 -> classes

    Any image size will do. Parameters are named as in torchvision's ``mobilenet_v2``. `layers` as in
    `LeNet5`.
    """

    input_size = (224, 224)

    def __init__(
        self, classes: int = 1000, channels: int = 3, *, layers: ModuleType = cnnops.nn
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_norm(layers, channels, 32, 3, 2, activation=nn.ReLU6))
        C = 32
        for expansion, K, blocks, stride in STAGES:
            for i in range(blocks):
                step = stride if i == 0 else 1
                self.features.append(InvertedResidual(C, K, expansion, step, layers))
                C = K
        self.features.append(conv_norm(layers, C, 1280, activation=nn.ReLU6))
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
        he_normal(self)
        small_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits
