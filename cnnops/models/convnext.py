"""ConvNeXt-T (Liu et al., 2022, arXiv:2201.03545)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

import cnnops.nn
from cnnops.models.parts import StochasticDepth

# blocks, channels
STAGES = ((3, 96), (3, 192), (9, 384), (3, 768))
EPS = 1e-6
"""Added to the variance in layer norms."""
DROPPED = 0.1
"""Probability that training drops a residual branch: grows from 0 in the first block to this in the last."""


class ToChannelsLast(nn.Module):
    """``N C H W -> N H W C``: a view, whose memory is in order where x is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    """``N H W C -> N C H W``, a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of ``N C H W``, for each place alone. The result is channels-last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, layer norm, dense C -> 4C, GELU, dense 4C -> C, a scale a channel, plus x: ``N C H W``.

    The dense layers see each place alone: they are 1x1 convolutions on ``N H W C``. `dropped` is the
    probability of `StochasticDepth`.
    """

    def __init__(self, C: int, dropped: float, layers: ModuleType) -> None:
        super().__init__()
        self.block = nn.Sequential(
            layers.Conv2d(C, C, 7, padding=3, groups=C),
            ToChannelsLast(),
            nn.LayerNorm(C, eps=EPS),
            nn.Linear(C, 4 * C),
            nn.GELU(),
            nn.Linear(4 * C, C),
            ToChannelsFirst(),
        )
        self.layer_scale = nn.Parameter(torch.full((C, 1, 1), 1e-6))
        self.stochastic_depth = StochasticDepth(dropped)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stochastic_depth(self.layer_scale * self.block(x))
        return x + y


class ConvNeXtT(nn.Module):
    """Logits ``N x classes`` of ``N x channels x 224 x 224``.

        conv 96@4x4 s4, layer norm       96 x 56 x 56
        3 blocks                         96 x 56 x 56
        layer norm, conv 192@2x2 s2     192 x 28 x 28
        3 blocks                        192 x 28 x 28
        layer norm, conv 384@2x2 s2     384 x 14 x 14
        9 blocks                        384 x 14 x 14
        layer norm, conv 768@2x2 s2     768 x 7 x 7
        3 blocks                        768 x 7 x 7
        global average, layer norm, dense 768 -> classes

    Images of 32 x 32 or more will do. Whatever layout x has, all after the first layer norm is channels-last.
    Parameters are named as in torchvision's ``convnext_tiny``. `layers` as in `LeNet5`.
    """

    input_size = (224, 224)

    def __init__(
        self, classes: int = 1000, channels: int = 3, *, layers: ModuleType = cnnops.nn
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        C, done, total = channels, 0, sum(blocks for blocks, _ in STAGES)
        for blocks, K in STAGES:
            if done == 0:
                first = layers.Conv2d(C, K, 4, stride=4), LayerNorm2d(K, eps=EPS)
            else:
                first = LayerNorm2d(C, eps=EPS), layers.Conv2d(C, K, 2, stride=2)
            stage = nn.Sequential()
            for _ in range(blocks):
                stage.append(ConvNeXtBlock(K, DROPPED * done / (total - 1), layers))
                done += 1
            self.features.extend((nn.Sequential(*first), stage))
            C = K
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            LayerNorm2d(C, eps=EPS), nn.Flatten(1), nn.Linear(C, classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(x)))
        return logits
