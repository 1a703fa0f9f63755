"""What a data set is to those who use it, wherever its images come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cnnops.data.resize import bilinear


class DataError(ValueError):
    """A folder or file is not the data set that it should be; the message is fit for a user's eyes."""

    @property
    def line(self) -> str:
        """The message. A DataLoader puts its worker's traceback before it: str() would show that, too."""
        return str(self).rstrip().rpartition(f"{type(self).__name__}: ")[2]


class Split(Protocol):
    """The part to learn from, or the part to test on. It can be pickled, and used after a fork."""

    @property
    def labels(self) -> Tensor:
        """int64 ``N``, each an index into the data set's classes."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """float32 ``C x H x W``, values 0 to 1, on the CPU. Raises DataError where it cannot be read."""

    def images(self, indices: Tensor) -> Tensor:
        """``B x C x H x W`` for int64 `indices` ``B``: as `image` of each, but quicker from memory."""


@dataclass(frozen=True)
class DataSet:
    """Images of named classes, split into what is learned from and what is tested on."""

    source: str
    classes: tuple[str, ...]
    train: Split
    test: Split


@dataclass(frozen=True)
class InMemory:
    """A split whose images ``N x 1 x H0 x W0`` are kept as they came: uint8 0 to 255, or float32 0 to 1.

    They are brought to `channels` and `size` (H, W) when they are asked for, as `fit` says.
    """

    pixels: Tensor
    labels: Tensor
    channels: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        return self.images(torch.tensor([index]))[0]

    def images(self, indices: Tensor) -> Tensor:
        chosen = self.pixels[indices]
        if chosen.dtype == torch.uint8:
            chosen = chosen.float() / 255
        return fit(chosen, self.size).expand(-1, self.channels, -1, -1).contiguous()


def fit(images: Tensor, size: tuple[int, int]) -> Tensor:
    """``N x C x H x W`` at `size`: inside a border of zeros where they fill more than half of each axis.

    The border is what the 32 x 32 network of 1998 was fed digits in. Images for which `size` is too small,
    or so large that they would be lost in it, are scaled bilinearly.
    """
    H, W = images.shape[2:]
    rows, columns = size[0] - H, size[1] - W
    if (rows, columns) == (0, 0):
        return images
    if 0 <= rows < H and 0 <= columns < W:
        top, left = rows // 2, columns // 2
        return F.pad(images, (left, columns - left, top, rows - top))
    return torch.from_numpy(bilinear(images.numpy(), size))
