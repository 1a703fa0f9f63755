"""EfficientNet-B0 (Tan and Le, 2019, arXiv:1905.11946)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

import cnnops.nn
from cnnops.models.parts import StochasticDepth, conv_norm, he_normal

# expansion, output channels, blocks, stride of the first block, kernel of the depthwise convolution
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
DROPPED = 0.2
"""Probability that training drops a residual branch: grows from 0 in the first block to nearly this."""


class SqueezeExcitation(nn.Module):
    """Scales each channel of ``N C H W`` by a gate from all channels' averages (Hu et al., 2017,
    arXiv:1709.01507): 1x1 convolution to `squeezed` channels, SiLU, 1x1 convolution to C, sigmoid.
    """

    def __init__(self, C: int, squeezed: int, layers: ModuleType) -> None:
        super().__init__()
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        self.fc1 = layers.Conv2d(C, squeezed, 1)
        self.activation = nn.SiLU()
        self.fc2 = layers.Conv2d(squeezed, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return x * torch.sigmoid(gate)


class MBConv(nn.Module):
    """Expand to ``expansion·C`` channels, depthwise, squeeze and excitation, project:
    ``N C H W -> N K H/stride W/stride``.

    MobileNetV2's block with SiLU and gates; `dropped` is the probability of `StochasticDepth`.
    """

    def __init__(
        self, C: int, K: int, expansion: int, stride: int, kernel: int, dropped: float, layers: ModuleType
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = expansion * C
        self.block = nn.Sequential()
        if expansion != 1:
            self.block.append(conv_norm(layers, C, hidden, activation=nn.SiLU))
        self.block.append(conv_norm(layers, hidden, hidden, kernel, stride, hidden, nn.SiLU))
        self.block.append(SqueezeExcitation(hidden, C // 4, layers))
        self.block.append(conv_norm(layers, hidden, K))
        self.stochastic_depth = StochasticDepth(dropped)
        self.residual = stride == 1 and C == K

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + self.stochastic_depth(y) if self.residual else y


class EfficientNetB0(nn.Module):
    """Logits ``N x classes`` of ``N x channels x 224 x 224``.

        conv 32@3x3 s2 p1, bn, SiLU      32 x 112 x 112
        1 MBConv 3x3, e = 1              16 x 112 x 112
        2 MBConv 3x3, e = 6              24 x 56 x 56
        2 MBConv 5x5, e = 6              40 x 28 x 28
        3 MBConv 3x3, e = 6              80 x 14 x 14
        3 MBConv 5x5, e = 6             112 x 14 x 14
        4 MBConv 5x5, e = 6             192 x 7 x 7
        1 MBConv 3x3, e = 6             320 x 7 x 7
        conv 1280@1x1, bn, SiLU        1280 x 7 x 7
        global average, dropout 0.2, dense 1280 -> classes

    Any image size will do. Parameters are named as in torchvision's ``efficientnet_b0``. `layers` as in
    `LeNet5`.
    """

    input_size = (224, 224)

    def __init__(
        self, classes: int = 1000, channels: int = 3, *, layers: ModuleType = cnnops.nn
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_norm(layers, channels, 32, 3, 2, activation=nn.SiLU))
        C, done, total = 32, 0, sum(blocks for _, _, blocks, _, _ in STAGES)
        for expansion, K, blocks, stride, kernel in STAGES:
            stage = nn.Sequential()
            for i in range(blocks):
                step, dropped = stride if i == 0 else 1, DROPPED * done / total
                stage.append(MBConv(C, K, expansion, step, kernel, dropped, layers))
                C, done = K, done + 1
            self.features.append(stage)
        self.features.append(conv_norm(layers, C, 1280, activation=nn.SiLU))
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        dense, bound = nn.Linear(1280, classes), classes**-0.5
        self.classifier = nn.Sequential(nn.Dropout(0.2), dense)
        he_normal(self)
        nn.init.uniform_(dense.weight, -bound, bound)
        nn.init.zeros_(dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits
