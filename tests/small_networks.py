"""Networks that tests of training name on the command line, as ``small_networks:tiny``, and images."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def write_digits(folder: Path, images: int) -> Path:
    """MNIST's four files with so many images of noise, and a tenth as many to test on. Returns the folder."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for part, n in (("train", images), ("t10k", images // 10)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for kind, array in (
            ("images-idx3", pixels),
            ("labels-idx1", np.arange(n, dtype=np.uint8) % 10),
        ):
            head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return folder


def tiny(classes: int = 10, channels: int = 1) -> nn.Module:
    """Batch norm, pooling and dropout in four thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8 * 7 * 7, classes),
    )  # fmt: skip


def fixed() -> nn.Module:
    """Five classes, whatever the data has."""
    return tiny(5)


def vgg(classes: int = 10, channels: int = 1) -> nn.Module:
    """Two blocks of two 3x3 convolutions, and two dense layers."""
    blocks, C = [], channels
    for K in (16, 32):
        for inputs in (C, K):
            blocks += [nn.Conv2d(inputs, K, 3, padding=1), nn.ReLU()]
        blocks.append(nn.MaxPool2d(2))
        C = K
    dense = nn.Linear(C * 7 * 7, 64), nn.ReLU(), nn.Linear(64, classes)
    return nn.Sequential(*blocks, nn.Flatten(), *dense)


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, C: int, K: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, K, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(K)
        self.conv2 = nn.Conv2d(K, K, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(K)
        self.shortcut = nn.Conv2d(C, K, 1, stride, bias=False) if C != K else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def resnet(classes: int = 10, channels: int = 1) -> nn.Module:
    """A stem and three blocks of 16 to 32 channels."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes),
    )  # fmt: skip
