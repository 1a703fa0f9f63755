"""Pooling under the names of ``torch.nn.functional``.

What a function of two dimensions says about itself holds for those of one and three, with ``W`` and ``D H W``
in place of ``H W``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnops.ops import batched, expect_tensor
from cnnops.ops import pool as ops
from cnnops.ops.entrance import entrance
from cnnops.shapes import axes

Ints = int | Sequence[int]
Sizes = int | Sequence[int | None]


@entrance
def max_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """1-D max pooling of ``N C W`` or ``C W`` to ``N C Q``: see `max_pool2d`."""
    x, alone = _batch(input, 1)
    maxima = ops.max_pool(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    return _pair(alone, *maxima)


@entrance
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

    input ``N C H W`` or ``C H W``; `stride` None is `kernel_size`. The result is ``N C P Q`` with
    ``P = floor((H + 2·padding - dilation·(R - 1) - 1) / stride) + 1``; with `ceil_mode` rounded up, but no
    window starts behind the input. Ties go to a window's first maximum, NaN wins. With `return_indices` a
    pair: the maxima, and PyTorch's int64 indices into each plane. The result is channels-last where the
    input is. Between forward and backward one byte an output is kept, four where a window has more than 255
    places.

    Raises RuntimeError for sizes that do not fit or padding of more than half the kernel, TypeError for
    arguments of a wrong type.
    """
    x, alone = _batch(input, 2)
    maxima = ops.max_pool(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    return _pair(alone, *maxima)


@entrance
def max_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """3-D max pooling of ``N C D H W`` or ``C D H W``: see `max_pool2d`."""
    x, alone = _batch(input, 3)
    maxima = ops.max_pool(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    return _pair(alone, *maxima)


@entrance
def adaptive_max_pool1d(input: Tensor, output_size: Ints, return_indices: bool = False) -> Any:
    """1-D max pooling of ``N C W`` or ``C W`` to a given size: see `adaptive_max_pool2d`. An `output_size`
    of None is for two and three dimensions.
    """
    return _adaptive_max_pool(1, input, output_size, return_indices)


@entrance
def adaptive_max_pool2d(input: Tensor, output_size: Sizes, return_indices: bool = False) -> Any:
    """2-D max pooling to a given size, as ``F.adaptive_max_pool2d(input, output_size)``.

    input ``N C H W`` or ``C H W``; result ``N C P Q`` for `output_size` ``(P, Q)`` or one int for both; None
    keeps the input's size. Output p is the maximum of rows ``floor(p·H / P)`` to ``ceil((p + 1)·H / P) - 1``.
    Ties, NaN, `return_indices` and what is kept as in `max_pool2d`, counting the places of the largest
    window. Channels-last for a channels-last input in two dimensions, contiguous in one and three.

    Raises RuntimeError for sizes that do not fit and for a batch without channels, TypeError for arguments of
    a wrong type.
    """
    return _adaptive_max_pool(2, input, output_size, return_indices)


@entrance
def adaptive_max_pool3d(input: Tensor, output_size: Sizes, return_indices: bool = False) -> Any:
    """3-D max pooling of ``N C D H W`` or ``C D H W`` to a given size: see `adaptive_max_pool2d`."""
    return _adaptive_max_pool(3, input, output_size, return_indices)


def max_unpool1d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """1-D max unpooling of ``N C Q`` or ``C Q``: see `max_unpool2d`."""
    return _max_unpool(1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """2-D max unpooling, as ``F.max_unpool2d(input, indices, kernel_size, …)``: zeros, and every value at its
    index.

    input ``N C P Q`` or ``C P Q``; `indices` int64 of the same size, places in each plane of the result as
    max pooling returns them. Result ``N C H W`` with ``H = (P - 1)·stride + R - 2·padding``, or of
    `output_size`, which is less than a stride away from that and may have the batch and channels in front. Of
    several values with one index the last stays, row by row; the gradient of that place goes to all of them.
    Channels-last for a channels-last input in two dimensions, contiguous in one and three. The indices are
    kept for the backward.

    Raises RuntimeError for sizes that do not fit and for indices of another dtype, size or device, or, on the
    CPU, outside of their planes; on a GPU these would have to be waited for, and their values are left out.
    Raises ValueError for a wrong `output_size`, TypeError for arguments of a wrong type.
    """
    return _max_unpool(2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """3-D max unpooling of ``N C Z P Q`` or ``C Z P Q``: see `max_unpool2d`."""
    return _max_unpool(3, input, indices, kernel_size, stride, padding, output_size)


@entrance
def avg_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """1-D average pooling of ``N C W`` or ``C W``: see `avg_pool2d`. There is no divisor of one's own."""
    x, alone = _batch(input, 1)
    y = ops.avg_pool(x, kernel_size, stride, padding, ceil_mode, count_include_pad)
    return y.squeeze(0) if alone else y


@entrance
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

    input ``N C H W`` or ``C H W``; `stride` None is `kernel_size`; result ``N C P Q``, sizes as in
    `max_pool2d`. A window's sum is divided by `divisor_override`, else by its places: those in the padding
    count unless `count_include_pad` is False. Channels-last for a channels-last input in two dimensions,
    contiguous in one and three. Nothing is kept for the backward.

    Raises RuntimeError for sizes that do not fit, padding of more than half the kernel or a divisor of 0,
    TypeError for arguments of a wrong type.
    """
    x, alone = _batch(input, 2)
    y = ops.avg_pool(
        x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    return y.squeeze(0) if alone else y


@entrance
def avg_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """3-D average pooling of ``N C D H W`` or ``C D H W``: see `avg_pool2d`. As in PyTorch, an input smaller
    than `kernel_size` is refused here, even where padding would make up for it.
    """
    x, alone = _batch(input, 3)
    y = ops.avg_pool(
        x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    return y.squeeze(0) if alone else y


@entrance
def adaptive_avg_pool1d(input: Tensor, output_size: Ints) -> Tensor:
    """1-D average pooling of ``N C W`` or ``C W`` to a given size: see `adaptive_avg_pool2d`. An
    `output_size` of None is for two and three dimensions.
    """
    x, alone = _batch(input, 1)
    y = ops.adaptive_avg_pool(x, output_size)
    return y.squeeze(0) if alone else y


@entrance
def adaptive_avg_pool2d(input: Tensor, output_size: Sizes) -> Tensor:
    """2-D average pooling to a given size, as ``F.adaptive_avg_pool2d(input, output_size)``.

    input ``N C H W`` or ``C H W``; result ``N C P Q`` for `output_size` ``(P, Q)`` or one int for both;
    None keeps the input's size. Output p averages rows ``floor(p·H / P)`` to ``ceil((p + 1)·H / P) - 1``.
    An `output_size` of 1 is the global average. Layouts as in `avg_pool2d`.

    Raises RuntimeError for sizes that do not fit, TypeError for arguments of a wrong type.
    """
    x, alone = _batch(input, 2)
    y = ops.adaptive_avg_pool(x, output_size)
    return y.squeeze(0) if alone else y


@entrance
def adaptive_avg_pool3d(input: Tensor, output_size: Sizes) -> Tensor:
    """3-D average pooling of ``N C D H W`` or ``C D H W`` to a given size: see `adaptive_avg_pool2d`. As in
    PyTorch, a batch without channels is refused here.
    """
    x, alone = _batch(input, 3)
    _expect_channels(x, alone)
    y = ops.adaptive_avg_pool(x, output_size)
    return y.squeeze(0) if alone else y


def lp_pool1d(
    input: Tensor,
    norm_type: int | float,
    kernel_size: int,
    stride: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """1-D power-average pooling of ``N C W`` or ``C W``: see `lp_pool2d`. `kernel_size` is an int here."""
    if isinstance(kernel_size, (tuple, list)):
        axes(kernel_size, 1, "kernel_size")
        if not _infinite(norm_type):
            raise TypeError(f"kernel_size: expected an int, got {kernel_size}")
    return _lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(
    input: Tensor,
    norm_type: int | float,
    kernel_size: Ints,
    stride: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """2-D power-average pooling, as ``F.lp_pool2d(input, norm_type, kernel_size, stride, …)``.

    input ``N C H W`` or ``C H W``; sizes, dtypes and layouts as in `avg_pool2d`. With a `norm_type` p each
    output is ``(Σ x^p)^(1/p)`` over its window, where a negative sum counts as 0 and, as x^p does, gives NaN
    where PyTorch does; with `ceil_mode` the sum of a window that reaches out is as if it were full of its
    average. For p infinite it is the largest absolute value, for minus infinity the smallest.

    Raises RuntimeError for sizes that do not fit, ValueError for a `kernel_size` of a wrong length,
    ZeroDivisionError for a `norm_type` of 0, TypeError for arguments of a wrong type.
    """
    return _lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(
    input: Tensor,
    norm_type: int | float,
    kernel_size: Ints,
    stride: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """3-D power-average pooling of ``N C D H W`` or ``C D H W``: see `lp_pool2d`."""
    return _lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode)


# ---- what the dimensions share --------------------------------------------------------------------------


def _batch(input: Tensor, dims: int) -> tuple[Tensor, bool]:
    expect_tensor("input", input)
    return batched(input, dims)


def _expect_channels(x: Tensor, alone: bool) -> None:
    """Raises RuntimeError for a batch of no channels; an image of none alone is no mistake to PyTorch."""
    if not alone and x.shape[1] == 0:
        raise RuntimeError(f"input: expected at least 1 channel, got {list(x.shape)}")


def _pair(alone: bool, y: Tensor, indices: Tensor | None) -> Any:
    """The maxima, and the indices where there are some."""
    if alone:
        y, indices = y.squeeze(0), None if indices is None else indices.squeeze(0)
    return y if indices is None else (y, indices)


def _adaptive_max_pool(dims: int, input: Tensor, output_size: Sizes, return_indices: bool) -> Any:
    x, alone = _batch(input, dims)
    _expect_channels(x, alone)
    return _pair(alone, *ops.adaptive_max_pool(x, output_size, return_indices))


def _max_unpool(dims: int, input: Tensor, indices: Tensor, *arguments: Any) -> Tensor:
    expect_tensor("indices", indices)
    x, alone = _batch(input, dims)
    _expect_channels(x, alone)
    y = ops.max_unpool(x, indices.unsqueeze(0) if alone else indices, *arguments)
    return y.squeeze(0) if alone else y


def _infinite(norm_type: object) -> bool:
    return isinstance(norm_type, (int, float)) and math.isinf(norm_type)


def _lp_pool(
    dims: int, input: Tensor, norm_type: Any, kernel: Ints, stride: Ints | None, ceil_mode: bool
) -> Tensor:
    """PyTorch's formula, step by step: its NaNs and its gradients come from there."""
    if isinstance(kernel, (tuple, list)) and len(kernel) != dims:
        raise ValueError(f"kernel_size: expected one int or {dims} ints, got {list(kernel)}")
    window = axes(kernel, dims, "kernel_size")
    x, alone = _batch(input, dims)
    if _infinite(norm_type):
        largest = norm_type > 0
        y, _ = ops.max_pool(x.abs() if largest else -x.abs(), window, stride, 0, 1, ceil_mode)
        y = y if largest else -y
    else:
        if not isinstance(norm_type, (int, float, complex, Tensor)):
            raise TypeError(f"norm_type: expected a number, got {norm_type!r}")
        if not isinstance(norm_type, Tensor) and norm_type == 0:
            raise ZeroDivisionError("norm_type: expected a number other than 0, got 0")
        mean = ops.avg_pool(x.pow(norm_type), window, stride, 0, ceil_mode)
        total = (torch.sign(mean) * torch.relu(torch.abs(mean))).mul(math.prod(window))
        y = total.pow(1.0 / norm_type)
    return y.squeeze(0) if alone else y
