"""Convolution by PyTorch's own operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnops.aten.norm import activate, batch_norm_stats
from cnnops.epilogue import NO_EPILOGUE, Epilogue
from cnnops.shapes import Axes, ConvShape, NormShape

aten = torch.ops.aten


def _sides(shape: ConvShape) -> tuple[list[int], Axes]:
    """Padding for F.pad (last axis first) and for the convolution: all goes to one of the two.

    The convolution itself pads with zeros, both sides of an axis alike.
    """
    none = (0,) * shape.dims
    if shape.padding_mode == "zeros" and all(a == b >= 0 for a, b in shape.padding):
        return [0, 0] * shape.dims, tuple(before for before, _ in shape.padding)
    return [p for pair in reversed(shape.padding) for p in pair], none


def _padded(shape: ConvShape, x: Tensor) -> Tensor:
    """x with what the convolution itself cannot pad it with; negative padding crops."""
    pad, _ = _sides(shape)
    mode = "constant" if shape.padding_mode == "zeros" else shape.padding_mode
    return F.pad(x, pad, mode) if any(pad) else x


def _convolution_backward(
    shape: ConvShape, grad_y: Tensor, x: Tensor, w: Tensor, wanted: int
) -> Tensor:
    grads = aten.convolution_backward(
        grad_y, x, w, None, shape.stride, _sides(shape)[1], shape.dilation, False, (0,) * shape.dims,
        shape.groups, [place == wanted for place in range(3)],
    )  # fmt: skip
    grad: Tensor = grads[wanted]
    return grad


def finished(sums: Tensor, bias: Tensor | None, epilogue: Epilogue | None, result: Tensor) -> None:
    """Writes ``act(scale · sums + bias + residual)``, half types by way of their accumulators' dtype."""
    scale, residual, activation, *_ = epilogue or NO_EPILOGUE
    if scale is None and residual is None and activation == "none":
        if bias is None:
            result.copy_(sums)
        else:
            torch.add(sums, bias.view(-1, *(1,) * (sums.dim() - 2)), out=result)
        return
    half = sums.dtype in (torch.float16, torch.bfloat16)
    z = sums.float() if half else sums
    for factor, combine in ((scale, torch.mul), (bias, torch.add)):
        if factor is not None:
            z = combine(z, factor.view(-1, *(1,) * (sums.dim() - 2)))
    result.copy_(activate(z, residual, activation))


def conv_fprop(
    shape: ConvShape,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    sums = aten.convolution(
        _padded(shape, x), w, bias if epilogue is None else None, shape.stride, _sides(shape)[1],
        shape.dilation, False, (0,) * shape.dims, shape.groups,
    )  # fmt: skip
    finished(sums, None if epilogue is None else bias, epilogue, y)
    if epilogue is not None and epilogue.mean is not None and epilogue.var is not None:
        batch_norm_stats(NormShape.of(shape.y_size), y, epilogue.mean, epilogue.var)


def conv_dgrad(
    shape: ConvShape,
    grad_y: Tensor,
    w: Tensor,
    bias: Tensor | None,
    grad_x: Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    # Of x only the size is read.
    grad = _convolution_backward(shape, grad_y, _padded(shape, grad_x), w, 0)
    pad, _ = _sides(shape)
    if any(pad):  # what was padded is cropped, and where it was cropped are zeros
        grad = F.pad(grad, [-p for p in pad])
    finished(grad, bias, epilogue, grad_x)


def conv_wgrad(shape: ConvShape, grad_y: Tensor, x: Tensor, grad_w: Tensor) -> None:
    w = torch.empty_like(grad_w)
    grad_w.copy_(_convolution_backward(shape, grad_y, _padded(shape, x), w, 1))


def conv_bgrad(shape: ConvShape, grad_y: Tensor, grad_bias: Tensor) -> None:
    torch.sum(grad_y, [0, *range(2, grad_y.dim())], out=grad_bias)


def conv_fold(shape: ConvShape, padded: Tensor, grad_x: Tensor) -> None:
    half = padded.dtype in (torch.float16, torch.bfloat16)
    total = padded.float() if half else padded
    for axis, (size, (before, after)) in enumerate(
        zip(shape.spatial, shape.padding, strict=True), 2
    ):
        left, middle, right = total.split([before, size, after], axis)
        total = middle.clone()
        if shape.padding_mode == "reflect":
            total.narrow(axis, 1, before).add_(left.flip(axis))
            total.narrow(axis, size - 1 - after, after).add_(right.flip(axis))
        elif shape.padding_mode == "replicate":
            total.narrow(axis, 0, 1).add_(left.sum(axis, keepdim=True))
            total.narrow(axis, size - 1, 1).add_(right.sum(axis, keepdim=True))
        else:
            total.narrow(axis, size - before, before).add_(left)
            total.narrow(axis, 0, after).add_(right)
    grad_x.copy_(total)
