"""Bilinear scaling whose result depends on the image alone, to the last bit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def bilinear(images: Array, size: tuple[int, int]) -> Array:
    """``… x H x W`` scaled to `size`, as ``interpolate(mode="bilinear", align_corners=False)`` does.

    In numpy, where no element's place in an array decides which instructions compute it. PyTorch's kernels
    give the ends of rows to others, so an image's last bits could depend on its batch.
    """
    return _along(_along(images, images.ndim - 2, size[0]), images.ndim - 1, size[1])


def _along(images: Array, axis: int, length: int) -> Array:
    former = images.shape[axis]
    if former == length:
        return images
    at = np.clip((np.arange(length) + 0.5) * (former / length) - 0.5, 0, former - 1)
    low = at.astype(np.intp)
    share = (at - low).astype(np.float32)
    if axis == images.ndim - 2:
        share = share[:, None]
    first = images.take(low, axis)
    second: Array = images.take(np.minimum(low + 1, former - 1), axis)
    second -= first
    second *= share
    second += first
    return second
