"""Pooling under the names of ``torch.nn.functional``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cnnops.ops import batched, expect_tensor
from cnnops.ops.pool import adaptive_avg_pool, avg_pool, max_pool

Ints = int | Sequence[int]


def max_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """2-D max pooling, as ``F.max_pool2d(input, kernel_size, stride, …)``.

    input ``N C H W`` or ``C H W``; `stride` None is `kernel_size`. Ties go to a window's first maximum, NaN
    wins. With `return_indices` a pair: the maxima, and PyTorch's int64 indices into each ``H W`` plane.
    Between forward and backward one byte an output is kept, four where a window has more than 255 places.

    Raises RuntimeError for sizes that do not fit or padding of more than half the kernel, TypeError for
    arguments of a wrong type.
    """
    expect_tensor("input", input)
    x, alone = batched(input, 2)
    y, indices = max_pool(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    y = y.squeeze(0) if alone else y
    if indices is None:
        return y
    return y, indices.squeeze(0) if alone else indices


def avg_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """2-D average pooling, as ``F.avg_pool2d(input, kernel_size, stride, …)``.

    input ``N C H W`` or ``C H W``; `stride` None is `kernel_size`. A window's sum is divided by
    `divisor_override`, else by its places: those in the padding count unless `count_include_pad` is False.

    Raises RuntimeError for sizes that do not fit, padding of more than half the kernel or a divisor of 0,
    TypeError for arguments of a wrong type.
    """
    expect_tensor("input", input)
    x, alone = batched(input, 2)
    y = avg_pool(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return y.squeeze(0) if alone else y


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """2-D average pooling to a given size, as ``F.adaptive_avg_pool2d(input, output_size)``.

    input ``N C H W`` or ``C H W``; result ``N C P Q`` for `output_size` ``(P, Q)`` or one int for both;
    None keeps the input's size. Output p averages rows ``floor(p·H / P)`` to ``ceil((p + 1)·H / P) - 1``.
    An `output_size` of 1 is the global average.

    Raises RuntimeError for sizes that do not fit, TypeError for arguments of a wrong type.
    """
    expect_tensor("input", input)
    x, alone = batched(input, 2)
    y = adaptive_avg_pool(x, output_size)
    return y.squeeze(0) if alone else y
