"""LeNet-5 in the two forms that lectures show: today's with ReLU and max pooling, and that of 1998."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

import cnnops.nn


class LeNet5(nn.Module):
    """ReLU and max pooling on ``N x channels x 28 x 28``; returns logits ``N x classes``.

        conv 20@5x5 p2, ReLU, max pool 2    20 x 28 x 28 -> 20 x 14 x 14
        conv 50@5x5 p2, ReLU, max pool 2    50 x 14 x 14 -> 50 x 7 x 7
        dense 2450 -> 500, ReLU             dense 500 -> classes

    `layers` is the module that convolution and pooling layers are taken from: `cnnops.nn`, or `torch.nn` for
    the same network in stock layers. Either way parameters have the same names and sizes, so a state_dict of
    one loads into the other.
    """

    input_size = (28, 28)

    def __init__(
        self, classes: int = 10, channels: int = 1, *, layers: ModuleType = cnnops.nn
    ) -> None:
        super().__init__()
        self.conv1 = layers.Conv2d(channels, 20, 5, padding=2)
        self.pool1 = layers.MaxPool2d(2)
        self.conv2 = layers.Conv2d(20, 50, 5, padding=2)
        self.pool2 = layers.MaxPool2d(2)
        self.fc1 = nn.Linear(50 * 7 * 7, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(torch.relu(self.conv1(x)))
        x = self.pool2(torch.relu(self.conv2(x)))
        x = torch.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits


class LeNet5Original(nn.Module):
    """tanh and average pooling on ``N x channels x 32 x 32``; returns logits ``N x classes``.

        conv 6@5x5, tanh, average pool 2      6 x 28 x 28 -> 6 x 14 x 14
        conv 16@5x5, tanh, average pool 2    16 x 10 x 10 -> 16 x 5 x 5
        conv 120@5x5, tanh                  120 x 1 x 1
        dense 120 -> 84, tanh               dense 84 -> classes

    Every filter of the second convolution sees all six maps below it, and the pooling has no weights: the
    form in which the network is usually drawn, not that of the paper's connection table.
    `layers` as in `LeNet5`.
    """

    input_size = (32, 32)

    def __init__(
        self, classes: int = 10, channels: int = 1, *, layers: ModuleType = cnnops.nn
    ) -> None:
        super().__init__()
        self.conv1 = layers.Conv2d(channels, 6, 5)
        self.pool1 = layers.AvgPool2d(2)
        self.conv2 = layers.Conv2d(6, 16, 5)
        self.pool2 = layers.AvgPool2d(2)
        self.conv3 = layers.Conv2d(16, 120, 5)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(torch.tanh(self.conv1(x)))
        x = self.pool2(torch.tanh(self.conv2(x)))
        x = torch.tanh(self.conv3(x))
        x = torch.tanh(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits
