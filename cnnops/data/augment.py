"""Training images changed at random, so that no epoch shows the same ones.

What is drawn for an image is decided by the seed, the epoch and the image's index alone: not by its batch,
its place in it, the process, or what was drawn before. Resumed and distributed runs see the same images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnops.data.resize import Array, bilinear


@dataclass(frozen=True)
class Augmentation:
    """What is done to every image, in this order; zeros and False do nothing.

    shift: it is moved by up to so many pixels along either axis, with zeros where it came from
           (torchvision's ``RandomCrop(size, padding=shift)``).
    crop:  a window with up to so many rows and columns less, anywhere in it, is scaled to its full size.
    flip:  it is mirrored left to right, or not, with equal chances.
    noise: normal noise of this standard deviation is added; images have values 0 to 1, then no longer.
    """

    shift: int = 0
    crop: int = 0
    flip: bool = False
    noise: float = 0.0

    def __str__(self) -> str:
        """As `parse` reads it."""
        numbers = {"shift": self.shift, "crop": self.crop, "noise": self.noise}
        parts = [f"{name}={value}" for name, value in numbers.items() if value]
        return ",".join([*parts, *["flip"] * self.flip]) or "none"

    def check(self, size: tuple[int, int]) -> None:
        """Raises ValueError, in one line, where images of `size` (H, W) are too small for this."""
        for name, pixels in (("shift", self.shift), ("crop", self.crop)):
            if pixels >= min(size):
                raise ValueError(
                    f"augmentation: expected {name} less than the {size[0]} x {size[1]} of the images, "
                    f"got {pixels}"
                )

    def __call__(self, images: Tensor, seed: int, epoch: int, indices: Tensor) -> Tensor:
        """The images as `epoch` shows them: new ones, or `images` itself where there is nothing to do.

        `images` is float32 ``B x C x H x W`` on the CPU; `indices` int64 ``B``, their places in the whole
        set. All three numbers are from 0 to 2**63 - 1.
        """
        if self == Augmentation():
            return images
        self.check((images.shape[2], images.shape[3]))
        changed = np.empty(images.shape, np.float32)
        streams = _streams(seed, epoch, indices)
        for image, into, stream in zip(images.numpy(), changed, streams, strict=True):
            into[...] = self._change(image, stream)
        return torch.from_numpy(changed)

    def _change(self, image: Array, stream: np.random.Generator) -> Array:
        down, right, less, top, left, mirrored = stream.random(6)  # also for what is not asked for
        if self.shift:
            values = 2 * self.shift + 1
            image = _shift(image, int(down * values) - self.shift, int(right * values) - self.shift)
        if self.crop:
            less = int(less * (self.crop + 1))
            top, left = int(top * (less + 1)), int(left * (less + 1))
            _, H, W = image.shape
            image = bilinear(image[:, top : top + H - less, left : left + W - less], (H, W))
        if self.flip and mirrored < 0.5:
            image = image[:, :, ::-1]
        if self.noise:
            deviations = stream.standard_normal(image.shape, np.float32)
            deviations *= np.float32(self.noise)
            image = np.add(image, deviations, out=deviations)
        return image


def _streams(seed: int, epoch: int, indices: Tensor) -> Iterator[np.random.Generator]:
    """Random numbers of each index's own. The former stream ends where the next one begins.

    Philox numbers are functions of a key and a counter of 4 x 64 bits; the counter's lowest 64 count what is
    drawn. To set one generator's counter anew takes a sixth of the time that a new generator takes.
    """
    philox = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    stream, start = np.random.Generator(philox), philox.state
    for index in indices.tolist():
        start["state"]["counter"][1] = index
        philox.state = start
        yield stream


def _shift(image: Array, down: int, right: int) -> Array:
    _, H, W = image.shape
    moved = np.zeros_like(image)
    rows = slice(max(down, 0), H + min(down, 0)), slice(max(-down, 0), H + min(-down, 0))
    columns = slice(max(right, 0), W + min(right, 0)), slice(max(-right, 0), W + min(-right, 0))
    moved[:, rows[0], columns[0]] = image[:, rows[1], columns[1]]
    return moved


def parse(text: str) -> Augmentation:
    """What ``"shift=2,crop=4,flip,noise=0.05"`` says, in any order; ``"none"`` leaves images as they are.

    Raises ValueError, in one line, where it says anything else.
    """
    found: dict[str, Any] = {}
    try:
        for part in [] if text == "none" else text.split(","):
            part = part.strip()
            name, _, value = part.partition("=")
            if name in found:
                raise ValueError(f"{name} twice")
            if part == "flip":
                found[name] = True
            elif name in ("shift", "crop"):
                found[name] = int(value)
            elif name == "noise":
                found[name] = float(value)
            else:
                raise ValueError(repr(part))
            if not 0 <= found[name] < math.inf:
                raise ValueError(repr(part))
    except ValueError as error:
        expected = "shift=PIXELS, crop=PIXELS, flip, noise=DEVIATION, with commas between, or none"
        raise ValueError(f"augmentation: expected {expected}, got {error}") from None
    return Augmentation(**found)
