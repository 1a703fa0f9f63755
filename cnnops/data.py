"""Handwritten digits: scikit-learn's, which come with it, or MNIST's files from a folder.

Either way images are float32 ``N x 1 x 28 x 28`` with values 0 to 1, labels int64 ``N``.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 28


class DataError(ValueError):
    """A folder or file is not the data set that it should be; the message is fit for a user's eyes."""


@dataclass(frozen=True)
class Digits:
    """Images and labels, split once and for all into what is learned from and what is tested on."""

    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def scikit_digits() -> Digits:
    """The 1,797 digits of ``sklearn.datasets.load_digits``, 8 x 8, scaled bilinearly to 28 x 28.

    Of the images sorted by digit every fifth is a test image, 359 in all. Every hand drew each digit
    several times, so most hands are on both sides: scores are about digits of known writers.

    Raises ModuleNotFoundError where scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    small = torch.from_numpy(raw.images.astype(np.float32) / 16).unsqueeze(1)
    images = torch.nn.functional.interpolate(
        small, size=(SIDE, SIDE), mode="bilinear", align_corners=False
    )
    labels = torch.from_numpy(raw.target.astype(np.int64))
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[labels.sort(stable=True).indices[4::5]] = True
    return Digits(
        "scikit-learn's 8x8 digits", images[~test], labels[~test], images[test], labels[test]
    )


def mnist(folder: Path) -> Digits:
    """MNIST's four idx files, as they are or gzipped, from `folder` or from its MNIST/raw or raw.

    Raises DataError when one is missing, is not an idx file of bytes, or does not fit the others.
    """
    if not folder.is_dir():
        raise DataError(f"data: expected a folder with MNIST's files, got {folder}")
    parts = {
        part: (_idx(folder, f"{part}-images", "idx3"), _idx(folder, f"{part}-labels", "idx1"))
        for part in ("train", "t10k")
    }
    for part, (images, labels) in parts.items():
        if images.shape[1:] != (SIDE, SIDE):
            raise DataError(
                f"{part} images: expected {SIDE}x{SIDE}, got {'x'.join(map(str, images.shape[1:]))}"
            )
        if len(images) != len(labels) or len(labels) == 0:
            raise DataError(
                f"{part}: expected a label for every image and at least one, "
                f"got {len(images)} images and {len(labels)} labels"
            )
        if labels.max() > 9:
            raise DataError(f"{part} labels: expected 0 to 9, got {labels.max()}")
    tensors = [
        tensor
        for images, labels in parts.values()
        for tensor in (
            torch.from_numpy(images.astype(np.float32) / 255).unsqueeze(1),
            torch.from_numpy(labels.astype(np.int64)),
        )
    ]
    return Digits(f"MNIST from {folder}", *tensors)


def _idx(folder: Path, stem: str, kind: str) -> NDArray[np.uint8]:
    """The array in ``<stem>-<kind>-ubyte``: two zero bytes, type 8, the rank, big-endian sizes, bytes."""
    names = [f"{stem}{mark}{kind}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    places = (folder, folder / "MNIST" / "raw", folder / "raw")
    found = [place / name for place in places for name in names if (place / name).is_file()]
    if not found:
        raise DataError(f"data: expected {names[0]} or {names[1]} in {folder}, got neither")
    path = found[0]
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable file, got {error}") from error
    rank = int(kind[-1])
    start = 4 + 4 * rank
    if len(content) < start or content[:4] != bytes((0, 0, 8, rank)):
        raise DataError(
            f"{path}: expected an idx file of bytes with rank {rank}, got {content[:4].hex()} at its start"
        )
    size = struct.unpack(f">{rank}I", content[4:start])
    if len(content) - start != math.prod(size):
        raise DataError(
            f"{path}: expected {math.prod(size)} bytes for {size}, got {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(size)
