"""Handwritten digits, 28 x 28 and grey: scikit-learn's, which come with it, or MNIST's files in a folder."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cnnops.data.sets import DataError, DataSet, InMemory

SIDE = 28
CLASSES = tuple("0123456789")


def scikit(channels: int = 1, size: tuple[int, int] = (SIDE, SIDE)) -> DataSet:
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
    parts = (InMemory(images[part], labels[part], channels, size) for part in (~test, test))
    return DataSet("scikit-learn's 8x8 digits", CLASSES, *parts)


def has_idx_files(folder: Path) -> bool:
    """Whether `folder` holds any of MNIST's files, so that the others should be there, too."""
    return any(
        _find(folder, f"{part}-{kind}")
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )


def idx_files(folder: Path, channels: int = 1, size: tuple[int, int] = (SIDE, SIDE)) -> DataSet:
    """MNIST's four idx files, as they are or gzipped, from `folder` or from its MNIST/raw or raw.

    Fashion-MNIST's and others' of the same form are read as well.

    Raises DataError when one is missing, is not an idx file of bytes, or does not fit the others.
    """
    parts = []
    for part in ("train", "t10k"):
        images, labels = _idx(folder, f"{part}-images-idx3"), _idx(folder, f"{part}-labels-idx1")
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
        pixels = torch.from_numpy(images).unsqueeze(1)
        parts.append(InMemory(pixels, torch.from_numpy(labels).long(), channels, size))
    return DataSet(f"MNIST from {folder}", CLASSES, *parts)


def _find(folder: Path, name: str) -> Path | None:
    """``train-images-idx3-ubyte`` for ``train-images-idx3``, in all the ways that it is packed and spelt."""
    names = [
        f"{spelt}-ubyte{end}"
        for spelt in (name, name.replace("-idx", ".idx"))
        for end in ("", ".gz")
    ]
    places = (folder, folder / "MNIST" / "raw", folder / "raw")
    files = (place / file for place in places for file in names)
    return next((file for file in files if os.path.isfile(file)), None)


def _idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """A file's array: it holds two zero bytes, type 8, the rank, big-endian sizes, and then bytes."""
    path = _find(folder, name)
    if path is None:
        raise DataError(f"data: expected {name}-ubyte or {name}-ubyte.gz in {folder}, got neither")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable file, got {error}") from error
    rank = int(name[-1])
    start = 4 + 4 * rank
    if content[:4] != bytes((0, 0, 8, rank)):
        raise DataError(
            f"{path}: expected an idx file of bytes with rank {rank}, got {content[:4].hex()} at its start"
        )
    if len(content) < start:
        raise DataError(
            f"{path}: expected a header of {start} bytes, got {len(content)} bytes in all"
        )
    size = struct.unpack(f">{rank}I", content[4:start])
    if len(content) - start != math.prod(size):
        raise DataError(
            f"{path}: expected {math.prod(size)} bytes for {size}, got {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(size).copy()
