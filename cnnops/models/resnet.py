"""ResNet-18 to ResNet-152 (He et al., 2015, arXiv:1512.03385)."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

from torch import Tensor, nn

import cnnops.nn
from cnnops.models.parts import conv_norm, he_normal

# width of a stage's 3x3 convolutions, stride of its first block
STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))


class BasicBlock(nn.Module):
    """``ReLU(x + bn(conv 3x3(ReLU(bn(conv 3x3(x))))))``: ``N C H W -> N width H/stride W/stride``.

    Where that changes the size, x passes through a 1x1 convolution and batch norm.
    """

    expansion = 1

    def __init__(self, C: int, width: int, stride: int, layers: ModuleType) -> None:
        super().__init__()
        self.conv1 = layers.Conv2d(C, width, 3, stride, padding=1, bias=False)
        self.bn1 = layers.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = layers.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = layers.BatchNorm2d(width)
        self.downsample = _downsample(C, width, stride, layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(y + shortcut)
        return result


class Bottleneck(nn.Module):
    """``conv 1x1, conv 3x3, conv 1x1`` around x, each with batch norm: ``N C H W -> N 4·width H/stride
    W/stride``.

    ReLU follows the first two and the sum. The stride is on the 3x3 convolution: version 1.5. In the paper
    the 1x1 before it has the stride, and never sees three quarters of its input.
    """

    expansion = 4

    def __init__(self, C: int, width: int, stride: int, layers: ModuleType) -> None:
        super().__init__()
        K = self.expansion * width
        self.conv1 = layers.Conv2d(C, width, 1, bias=False)
        self.bn1 = layers.BatchNorm2d(width)
        self.conv2 = layers.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = layers.BatchNorm2d(width)
        self.conv3 = layers.Conv2d(width, K, 1, bias=False)
        self.bn3 = layers.BatchNorm2d(K)
        self.relu = nn.ReLU()
        self.downsample = _downsample(C, K, stride, layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(y + shortcut)
        return result


def _downsample(C: int, K: int, stride: int, layers: ModuleType) -> nn.Sequential | None:
    return None if stride == 1 and C == K else conv_norm(layers, C, K, stride=stride)


class ResNet(nn.Module):
    """Logits ``N x classes`` of ``N x channels x 224 x 224``; subclasses name the block and how many.

                                                   18   34   50   101   152
        conv 64@7x7 s2 p3, bn, ReLU      64 x 112 x 112
        max pool 3 s2 p1                 64 x 56 x 56
        layer1: 64·e x 56 x 56           blocks     2    3    3     3     3
        layer2: 128·e x 28 x 28          blocks     2    4    4     4     8
        layer3: 256·e x 14 x 14          blocks     2    6    6    23    36
        layer4: 512·e x 7 x 7            blocks     2    3    3     3     3
        global average, dense 512·e -> classes

    18 and 34 have basic blocks, e = 1; the others have bottlenecks, e = 4. Any image size will do. Parameters
    are named as in torchvision's ``resnet50`` and so on. `layers` as in `LeNet5`.
    """

    input_size = (224, 224)
    block: ClassVar[type[BasicBlock] | type[Bottleneck]]
    blocks: ClassVar[tuple[int, ...]]
    """How many in each stage."""

    def __init__(
        self, classes: int = 1000, channels: int = 3, *, layers: ModuleType = cnnops.nn
    ) -> None:
        super().__init__()
        self.conv1 = layers.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = layers.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = layers.MaxPool2d(3, stride=2, padding=1)
        C, stages = 64, []
        for (width, stride), blocks in zip(STAGES, self.blocks, strict=True):
            stage = nn.Sequential()
            for i in range(blocks):
                stage.append(self.block(C, width, stride if i == 0 else 1, layers))
                C = self.block.expansion * width
            stages.append(stage)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(C, classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class ResNet18(ResNet):
    block, blocks = BasicBlock, (2, 2, 2, 2)


class ResNet34(ResNet):
    block, blocks = BasicBlock, (3, 4, 6, 3)


class ResNet50(ResNet):
    block, blocks = Bottleneck, (3, 4, 6, 3)


class ResNet101(ResNet):
    block, blocks = Bottleneck, (3, 4, 23, 3)


class ResNet152(ResNet):
    block, blocks = Bottleneck, (3, 8, 36, 3)
