"""Labelled images to train on: scikit-learn's digits, MNIST's files, or a folder of images."""

from __future__ import annotations

import os
from pathlib import Path

from cnnops.data.digits import SIDE, has_idx_files, idx_files, scikit
from cnnops.data.folder import image_folder
from cnnops.data.sets import DataError, DataSet, Split

__all__ = ["SIDE", "DataError", "DataSet", "Split", "load"]


def load(folder: Path | None, channels: int, size: tuple[int, int], seed: int) -> DataSet:
    """The data set in `folder`, or scikit-learn's digits for None; images of `channels` and `size` (H, W).

    `folder` holds MNIST's four idx files (see `idx_files`), or images (see `image_folder`): ``train/`` and
    ``val/`` or else ``test/`` with a folder a class in each, or folders a class directly, of which a fifth,
    chosen by `seed`, is tested on.

    Grey images have the same values in all three channels, colour ones in one channel their luminance.
    Digits are put into a border of zeros, or scaled where `size` is twice theirs or more. Images of a
    folder are scaled, bilinearly, until they fill `size`, and what is longer loses both its ends.

    Raises DataError, with a line fit for the user, where the data cannot be used.
    """
    if channels not in (1, 3):
        raise DataError(f"data: expected a network for 1 or 3 channels, got {channels}")
    if folder is None:
        try:
            return scikit(channels, size)
        except ModuleNotFoundError as error:
            raise DataError("the digits need sklearn: pip install 'cnnops[demo]'") from error
    if not os.path.isdir(folder):  # not Path's, which raises where it may not look
        raise DataError(f"data: expected a folder with MNIST's files or images, got {folder}")
    if has_idx_files(folder):
        return idx_files(folder, channels, size)
    return image_folder(folder, channels, size, seed)
