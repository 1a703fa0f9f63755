"""Convolution by PyTorch's own operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnops.shapes import Axes, ConvShape

aten = torch.ops.aten


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
