"""Pooling by PyTorch's own operations."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cnnops.shapes import Axes, PoolShape, UnpoolShape

aten = torch.ops.aten


def _starts(shape: PoolShape, axis: int, like: Tensor) -> Tensor:
    """First place along `axis` of every window, shaped to broadcast over the output."""
    out = shape.output[axis]
    starts = torch.arange(out, device=like.device)
    if shape.adaptive_output is None:
        starts = starts * shape.stride[axis] - shape.padding[axis][0]
    else:
        starts = starts * shape.spatial[axis] // out
    return starts.view(-1, *(1,) * (shape.dims - 1 - axis))


def flat_indices(shape: PoolShape, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's max-pooling indices (int64, place in the input's plane, row by row) of window offsets, and
    where they are inside of the plane: a dilated window may hold nothing but padding.
    """
    rest, scale = offsets.long(), 1
    indices, inside = torch.zeros_like(rest), torch.ones_like(rest, dtype=torch.bool)
    for axis in reversed(range(shape.dims)):
        tap, rest = rest % shape.kernel[axis], rest // shape.kernel[axis]
        place = _starts(shape, axis, offsets) + tap * shape.dilation[axis]
        inside &= (place >= 0) & (place < shape.spatial[axis])
        indices += place * scale
        scale *= shape.spatial[axis]
    return indices, inside


def window_offsets(shape: PoolShape, indices: Tensor) -> Tensor:
    """The inverse of `flat_indices`. A window of nothing but padding keeps some offset: all are outside."""
    rest, scale = indices, 1
    offsets = torch.zeros_like(indices)
    for axis in reversed(range(shape.dims)):
        place, rest = rest % shape.spatial[axis], rest // shape.spatial[axis]
        tap = (place - _starts(shape, axis, indices)) // shape.dilation[axis]
        offsets += tap.clamp(0, shape.kernel[axis] - 1) * scale
        scale *= shape.kernel[axis]
    return offsets


def _planes(shape: PoolShape, *tensors: Tensor) -> tuple[PoolShape, tuple[Tensor, ...]]:
    """A 1-D problem as a 2-D one of height 1; others as they are."""
    if shape.dims > 1:
        return shape, tensors
    one, output = (1,), shape.adaptive_output
    lifted = replace(
        shape,
        spatial=one + shape.spatial,
        kernel=one + shape.kernel,
        stride=one + shape.stride,
        padding=((0, 0), *shape.padding),
        dilation=one + shape.dilation,
        adaptive_output=None if output is None else one + output,
    )
    return lifted, tuple(t.unsqueeze(2) for t in tensors)


def _window(shape: PoolShape) -> tuple[Axes, Axes, Axes]:
    return shape.kernel, shape.stride, tuple(before for before, _ in shape.padding)


def max_pool_fwd(shape: PoolShape, x: Tensor, y: Tensor, offsets: Tensor) -> None:
    shape, (x, y, offsets) = _planes(shape, x, y, offsets)
    two = shape.dims == 2
    if shape.adaptive_output is not None:
        adaptive = aten.adaptive_max_pool2d if two else aten.adaptive_max_pool3d
        pooled, indices = adaptive(x, shape.adaptive_output)
    else:
        pool = aten.max_pool2d_with_indices if two else aten.max_pool3d_with_indices
        pooled, indices = pool(x, *_window(shape), shape.dilation, shape.ceil_mode)
    y.copy_(pooled)
    offsets.copy_(window_offsets(shape, indices))


def max_pool_bwd(shape: PoolShape, grad_y: Tensor, offsets: Tensor, grad_x: Tensor) -> None:
    shape, (grad_y, offsets, grad_x) = _planes(shape, grad_y, offsets, grad_x)
    two = shape.dims == 2
    indices, inside = flat_indices(shape, offsets)
    if shape.adaptive_output is not None:
        adaptive = aten.adaptive_max_pool2d_backward if two else aten.adaptive_max_pool3d_backward
        grad_x.copy_(adaptive(grad_y, grad_x, indices))
        return
    pool = aten.max_pool2d_with_indices_backward if two else aten.max_pool3d_with_indices_backward
    # PyTorch adds at every index, so windows of nothing but padding add a zero at place 0.
    grad_y, indices = grad_y * inside, indices * inside
    grad_x.copy_(pool(grad_y, grad_x, *_window(shape), shape.dilation, shape.ceil_mode, indices))


def max_pool_gather(shape: PoolShape, x: Tensor, offsets: Tensor, y: Tensor) -> None:
    indices, inside = flat_indices(shape, offsets)
    kept = x.flatten(2).gather(2, (indices * inside).flatten(2)).view(shape.y_size)
    y.copy_(kept.where(inside, 0))


def max_unpool_fwd(shape: UnpoolShape, x: Tensor, indices: Tensor, y: Tensor) -> None:
    """On a GPU an index outside of its plane fails as a device-side assertion, as it does in PyTorch."""
    x = _last_of_place(shape, x, indices)
    if len(shape.output) == 3:
        # stride and padding are checked, and not used.
        y.copy_(aten.max_unpool3d(x, indices, shape.output, (1, 1, 1), (0, 0, 0)))
    elif len(shape.output) == 2:
        y.copy_(aten.max_unpool2d(x, indices, shape.output))
    else:
        one_high = (1, *shape.output)
        y.unsqueeze(2).copy_(aten.max_unpool2d(x.unsqueeze(2), indices.unsqueeze(2), one_high))


def _last_of_place(shape: UnpoolShape, x: Tensor, indices: Tensor) -> Tensor:
    """x with each value replaced by the last, row by row, of those that have its index. PyTorch's threads
    race for a place; all of them now bring the same.
    """
    places = indices.flatten(2)
    order = torch.arange(places.shape[2], device=x.device).expand(places.shape)
    last = order.new_zeros(*places.shape[:2], math.prod(shape.output))
    last.scatter_reduce_(2, places, order, "amax")
    return x.flatten(2).gather(2, last.gather(2, places)).view(shape.x_size)


def max_unpool_bwd(shape: UnpoolShape, grad_y: Tensor, indices: Tensor, grad_x: Tensor) -> None:
    grad_x.copy_(grad_y.flatten(2).gather(2, indices.flatten(2)).view(shape.x_size))


def avg_pool_fwd(shape: PoolShape, x: Tensor, y: Tensor) -> None:
    shape, (x, y) = _planes(shape, x, y)
    if shape.adaptive_output is not None:
        adaptive = aten.adaptive_avg_pool2d if shape.dims == 2 else aten.adaptive_avg_pool3d
        y.copy_(adaptive(_wide(shape, x), shape.adaptive_output))
    else:
        pool = aten.avg_pool2d if shape.dims == 2 else aten.avg_pool3d
        y.copy_(pool(_wide(shape, x), *_window(shape), *_average(shape)))


def avg_pool_bwd(shape: PoolShape, grad_y: Tensor, grad_x: Tensor) -> None:
    shape, (grad_y, grad_x) = _planes(shape, grad_y, grad_x)
    two = shape.dims == 2
    if shape.adaptive_output is not None:
        adaptive = aten._adaptive_avg_pool2d_backward if two else aten._adaptive_avg_pool3d_backward
        grad_x.copy_(adaptive(_wide(shape, grad_y), _wide(shape, grad_x)))
    else:
        pool = aten.avg_pool2d_backward if two else aten.avg_pool3d_backward
        like = _wide(shape, grad_x)
        grad_x.copy_(pool(_wide(shape, grad_y), like, *_window(shape), *_average(shape)))


def _wide(shape: PoolShape, t: Tensor) -> Tensor:
    """`t`, in float32 where PyTorch's averages do not take half types, or would sum in them: in three
    dimensions on the CPU.
    """
    half = t.dtype in (torch.float16, torch.bfloat16)
    return t.float() if half and shape.dims == 3 and t.is_cpu else t


def _average(shape: PoolShape) -> tuple[bool, bool, int | None]:
    return shape.ceil_mode, shape.count_include_pad, shape.divisor_override
