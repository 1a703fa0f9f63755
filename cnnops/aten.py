"""Engine "aten": every operation by PyTorch's own, under the same signatures as the kernels.

It is the reference that kernels are measured against, what runs where no kernel takes a problem, and the way
to cuDNN on a GPU. Max-pooling offsets are converted to and from PyTorch's flat indices, so that a forward in
one engine and its backward in another fit together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnops.shapes import Axes, ConvShape, NormShape, PoolShape

aten = torch.ops.aten


def supports(op: str, shape: ConvShape | PoolShape | NormShape, dtype: torch.dtype) -> str | None:
    """Nothing is refused here: what PyTorch cannot do, it says itself."""
    return None


# ---- convolution ----------------------------------------------------------------------------------------


def _sides(shape: ConvShape) -> tuple[list[int], Axes]:
    """Padding for F.pad (last axis first) and for the convolution: all goes to one of the two.

    The convolution itself pads both sides of an axis alike.
    """
    none = (0,) * shape.dims
    if all(before == after for before, after in shape.padding):
        return [0, 0] * shape.dims, tuple(before for before, _ in shape.padding)
    return [p for pair in reversed(shape.padding) for p in pair], none


def _convolution_backward(
    shape: ConvShape, grad_y: Tensor, x: Tensor, w: Tensor, wanted: int
) -> Tensor:
    grads = aten.convolution_backward(
        grad_y, x, w, None, shape.stride, _sides(shape)[1], shape.dilation, False, (0,) * shape.dims,
        shape.groups, [place == wanted for place in range(3)],
    )  # fmt: skip
    grad: Tensor = grads[wanted]
    return grad


def conv_fprop(shape: ConvShape, x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor) -> None:
    pad, padding = _sides(shape)
    padded = F.pad(x, pad) if any(pad) else x
    transposed = (False, (0,) * shape.dims)
    y.copy_(
        aten.convolution(
            padded, w, bias, shape.stride, padding, shape.dilation, *transposed, shape.groups
        )
    )


def conv_dgrad(shape: ConvShape, grad_y: Tensor, w: Tensor, grad_x: Tensor) -> None:
    pad, _ = _sides(shape)
    # Only the size of x is read.
    x = F.pad(grad_x, pad) if any(pad) else grad_x
    grad = _convolution_backward(shape, grad_y, x, w, 0)
    for axis in range(shape.dims):
        before = pad[2 * (shape.dims - 1 - axis)]
        grad = grad.narrow(axis + 2, before, shape.spatial[axis])
    grad_x.copy_(grad)


def conv_wgrad(shape: ConvShape, grad_y: Tensor, x: Tensor, grad_w: Tensor) -> None:
    pad, _ = _sides(shape)
    padded = F.pad(x, pad) if any(pad) else x
    grad_w.copy_(_convolution_backward(shape, grad_y, padded, torch.empty_like(grad_w), 1))


def conv_bgrad(shape: ConvShape, grad_y: Tensor, grad_bias: Tensor) -> None:
    torch.sum(grad_y, [0, *range(2, grad_y.dim())], out=grad_bias)


# ---- pooling --------------------------------------------------------------------------------------------


def _starts(shape: PoolShape, axis: int, like: Tensor) -> Tensor:
    """First place along `axis` of every window, shaped to broadcast over the output."""
    starts = torch.arange(shape.output[axis], device=like.device) * shape.stride[axis]
    return (starts - shape.padding[axis][0]).view(-1, *(1,) * (shape.dims - 1 - axis))


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
    pool = aten.max_pool2d_with_indices if shape.dims == 2 else aten.max_pool3d_with_indices
    pooled, indices = pool(x, *_window(shape), shape.dilation, shape.ceil_mode)
    y.copy_(pooled)
    offsets.copy_(window_offsets(shape, indices))


def max_pool_bwd(shape: PoolShape, grad_y: Tensor, offsets: Tensor, grad_x: Tensor) -> None:
    shape, (grad_y, offsets, grad_x) = _planes(shape, grad_y, offsets, grad_x)
    two = shape.dims == 2
    pool = aten.max_pool2d_with_indices_backward if two else aten.max_pool3d_with_indices_backward
    indices, inside = flat_indices(shape, offsets)
    # PyTorch adds at every index, so windows of nothing but padding add a zero at place 0.
    grad_y, indices = grad_y * inside, indices * inside
    grad_x.copy_(pool(grad_y, grad_x, *_window(shape), shape.dilation, shape.ceil_mode, indices))


def max_pool_gather(shape: PoolShape, x: Tensor, offsets: Tensor, y: Tensor) -> None:
    indices, inside = flat_indices(shape, offsets)
    kept = x.flatten(2).gather(2, (indices * inside).flatten(2)).view(shape.y_size)
    y.copy_(kept.where(inside, 0))


def avg_pool_fwd(shape: PoolShape, x: Tensor, y: Tensor) -> None:
    shape, (x, y) = _planes(shape, x, y)
    if shape.adaptive_output is not None:
        adaptive = aten.adaptive_avg_pool2d if shape.dims == 2 else aten.adaptive_avg_pool3d
        y.copy_(adaptive(x, shape.adaptive_output))
    else:
        pool = aten.avg_pool2d if shape.dims == 2 else aten.avg_pool3d
        y.copy_(pool(x, *_window(shape), *_average(shape)))


def avg_pool_bwd(shape: PoolShape, grad_y: Tensor, grad_x: Tensor) -> None:
    shape, (grad_y, grad_x) = _planes(shape, grad_y, grad_x)
    two = shape.dims == 2
    if shape.adaptive_output is not None:
        adaptive = aten._adaptive_avg_pool2d_backward if two else aten._adaptive_avg_pool3d_backward
        grad_x.copy_(adaptive(grad_y, grad_x))
    else:
        pool = aten.avg_pool2d_backward if two else aten.avg_pool3d_backward
        grad_x.copy_(pool(grad_y, grad_x, *_window(shape), *_average(shape)))


def _average(shape: PoolShape) -> tuple[bool, bool, int | None]:
    return shape.ceil_mode, shape.count_include_pad, shape.divisor_override


# ---- batch norm -----------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
ACTIVATIONS = tuple(_ACTIVATIONS)

_ACTIVATION_GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, z: aten.threshold_backward(grad, z, 0),
    "relu6": lambda grad, z: aten.hardtanh_backward(grad, z, 0, 6),
    "silu": aten.silu_backward,
    "gelu": aten.gelu_backward,
    "hardswish": aten.hardswish_backward,
    "leaky_relu": lambda grad, z: aten.leaky_relu_backward(grad, z, 0.01, False),
    "sigmoid": lambda grad, z: aten.sigmoid_backward(grad, torch.sigmoid(z)),
    "tanh": lambda grad, z: aten.tanh_backward(grad, torch.tanh(z)),
}


def activate(z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """``activation(z + residual)``, differentiable."""
    return _ACTIVATIONS[activation](z if residual is None else z + residual)


def _to(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def batch_norm_train(
    shape: NormShape, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float, activation: str,
    y: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    # Per-channel tensors go in as wide as mean and rstd come out, or a half type would round both.
    gamma, beta, average, variance = _to(mean.dtype, weight, bias, running_mean, running_var)
    z, batch_mean, batch_rstd = aten.native_batch_norm(
        x, gamma, beta, average, variance, True, momentum, eps
    )
    y.copy_(activate(z, residual, activation))
    mean.copy_(batch_mean)
    rstd.copy_(batch_rstd)
    for running, updated in ((running_mean, average), (running_var, variance)):
        if running is not None and updated is not None and running is not updated:
            running.copy_(updated)


def batch_norm_infer(
    shape: NormShape, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor, running_var: Tensor, eps: float, activation: str, y: Tensor,
) -> None:  # fmt: skip
    z = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    y.copy_(activate(z, residual, activation))


def batch_norm_bwd(
    shape: NormShape, grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, mean: Tensor, rstd: Tensor, activation: str, training: bool,
    grad_x: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
    grad_residual: Tensor | None,
) -> None:  # fmt: skip
    gamma, beta = _to(mean.dtype, weight, bias)
    grad_z = grad_y
    if activation != "none":
        per_channel = (-1, *(1,) * len(shape.spatial))
        x = x.to(mean.dtype)
        z = (x - mean.view(per_channel)) * rstd.view(per_channel)
        z = z if gamma is None else z * gamma.view(per_channel)
        z = z if beta is None else z + beta.view(per_channel)
        z = z if residual is None else z + residual
        grad_z = _ACTIVATION_GRADS[activation](grad_y.to(mean.dtype), z)
    results = (grad_x, grad_weight, grad_bias)
    wanted = [g is not None for g in results]
    statistics = (mean, rstd.pow(-2), mean, rstd)
    grads = aten.native_batch_norm_backward(grad_z, x, gamma, *statistics, training, 0.0, wanted)
    for result, grad in zip((*results, grad_residual), (*grads, grad_z), strict=True):
        if result is not None:
            result.copy_(grad)
