"""Images in folders: one a class, either directly or in ``train/`` and in ``val/`` or ``test/``."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cnnops.data.sets import DataError, DataSet

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Files:
    """A split whose images are read from `paths` whenever they are asked for."""

    paths: tuple[str, ...]
    labels: Tensor
    channels: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        return read(self.paths[index], self.channels, self.size)

    def images(self, indices: Tensor) -> Tensor:
        return torch.stack([self.image(index) for index in indices.tolist()])


def image_folder(folder: Path, channels: int, size: tuple[int, int], seed: int) -> DataSet:
    """See `cnnops.data.load`. Only names are looked at: to open a million files would take too long.

    Classes are folders' names in order; images are files of `SUFFIXES` anywhere below them. What has a
    name that begins with a dot, or another suffix, is passed over.

    Raises DataError where folders are not as they should be, or hold too few images.
    """
    below = _folders(folder)
    tested = next((name for name in ("val", "test") if name in below), None)
    if "train" in below and tested:
        train, test = (_classes(folder / name, least=1) for name in ("train", tested))
        if train.keys() != test.keys():
            alone = sorted(train.keys() ^ test.keys())
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            place = "train" if alone[0] in train else tested
            raise DataError(
                f"{folder}: expected the same classes in train/ and {tested}/, "
                f"got {alone[0]}{more} only in {place}/"
            )
    elif set(below) <= {"train", "val", "test"}:
        got = ", ".join(f"{name}/" for name in below) or "no folder"
        raise DataError(
            f"{folder}: expected MNIST's files, or train/ and val/ with a folder a class in each, "
            f"or a folder a class, got {got}"
        )
    else:
        train, test = {}, {}
        for name, paths in _classes(folder, least=2).items():
            mixed = sorted(paths, key=lambda path: _lot(seed, os.path.relpath(path, folder)))
            fifth = max(1, round(len(paths) / 5))
            train[name], test[name] = sorted(mixed[fifth:]), sorted(mixed[:fifth])
    if importlib.util.find_spec("PIL") is None:
        raise DataError("images need Pillow: pip install 'cnnops[demo]'")
    parts = []
    for classes in (train, test):
        labels = torch.arange(len(classes)).repeat_interleave(
            torch.tensor([len(paths) for paths in classes.values()])
        )
        joined = tuple(path for paths in classes.values() for path in paths)
        parts.append(Files(joined, labels, channels, size))
    return DataSet(f"images from {folder}", tuple(train), *parts)


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: expected a folder that can be read, got {error}") from error


def _classes(folder: Path, least: int) -> dict[str, list[str]]:
    """The images of every class, at least two classes and `least` images in each."""
    names = _folders(folder)
    if len(names) < 2:
        got = names[0] if names else "none"
        raise DataError(f"{folder}: expected a folder for each of two or more classes, got {got}")
    found = {}
    for name in names:
        found[name] = sorted(_images(str(folder / name)))
        if len(found[name]) < least:
            wanted = f"at least {least} image{'s' * (least > 1)} ({', '.join(SUFFIXES)})"
            raise DataError(f"{folder / name}: expected {wanted}, got {len(found[name])}")
    return found


def _images(folder: str) -> Iterator[str]:
    """Links to files and to a class's folder are followed; links to folders below it may be circles."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from _images(entry.path)
                elif entry.name.lower().endswith(SUFFIXES):
                    if not entry.is_file():
                        raise DataError(f"{entry.path}: expected a file, got something else")
                    yield entry.path
    except OSError as error:
        raise DataError(f"{folder}: expected a folder that can be read, got {error}") from error


def _lot(seed: int, path: str) -> bytes:
    """Decides which images are tested on: the same on every machine, also after others have been added."""
    return hashlib.blake2b(f"{seed} ".encode() + os.fsencode(path), digest_size=16).digest()


def read(path: str, channels: int, size: tuple[int, int]) -> Tensor:
    """The image as float32 ``channels x H x W``, 0 to 1: upright, and the middle of it where it is longer.

    Raises DataError, which names the file, where it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            # A JPEG can be decoded at a half, a quarter or an eighth of its size, in a fraction of the time.
            file.draft("L" if channels == 1 else "RGB", (2 * max(size), 2 * max(size)))
            pixels = _pixels(file, channels, size)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # whatever decoders make of damaged files: there is no list of it
        got = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: expected an image that can be decoded, got {got}") from error
    tensor = torch.from_numpy(pixels).view(*size, -1).permute(2, 0, 1)
    return (tensor.float() / 255).expand(channels, -1, -1).contiguous()


def _pixels(image: Image, channels: int, size: tuple[int, int]) -> np.ndarray:
    """``H x W`` or ``H x W x 3``, 0 to 255: uint8, or float32 where the file has more than eight bits."""
    from PIL import Image, ImageOps

    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in ("I", "F") and not deep:
        raise DataError(f"expected 8 or 16 bits a channel, got Pillow's mode {image.mode!r}")
    image = ImageOps.exif_transpose(image)
    if deep:
        image = Image.fromarray(np.asarray(image).astype(np.float32) * (255 / 65535))
    else:
        if image.has_transparency_data:
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image.convert("RGBA"))
        image = image.convert("L" if channels == 1 else "RGB")
    fitted = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(fitted)
