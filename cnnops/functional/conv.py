"""Convolution under the names of ``torch.nn.functional``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cnnops.ops import batched, expect_tensor
from cnnops.ops import conv as ops

Ints = int | Sequence[int]


def _conv(dims: int, input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    _expect(dims, input, weight, bias)
    x, alone = batched(input, dims)
    y = ops.conv(x, weight, bias, *arguments)
    return y.squeeze(0) if alone else y


def _conv_transpose(
    dims: int, input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> Tensor:
    _expect(dims, input, weight, bias)
    x, alone = batched(input, dims)
    y = ops.conv_transpose(x, weight, bias, *arguments)
    return y.squeeze(0) if alone else y


def _expect(dims: int, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expect_tensor("input", input)
    expect_tensor("weight", weight)
    if bias is not None:
        expect_tensor("bias", bias)
    if weight.dim() != dims + 2:
        raise RuntimeError(
            f"weight: expected {dims + 2} dimensions, got {weight.dim()} ({list(weight.shape)})"
        )


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """1-D convolution, as `conv2d`: input ``N C W`` or ``C W``, weight ``K C/groups S``, result ``N K Q``."""
    return _conv(1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution (cross-correlation), as ``F.conv2d(input, weight, bias, stride, …)``.

    input ``N C H W`` or ``C H W``, weight ``K C/groups R S``, bias ``K``; result ``N K P Q`` with
    ``P = floor((H + 2·padding - dilation·(R - 1) - 1) / stride) + 1``. `padding` also takes "valid" and, for
    stride 1, "same"; and, beyond torch, one (before, after) pair an axis, where a negative value crops. All
    tensors have one dtype, which under autocast is the autocast dtype. The result is channels-last where
    input or weight is. An input of no channels gives the bias.

    Raises RuntimeError for sizes, dtypes or devices that do not fit, TypeError for arguments of a wrong type.
    """
    return _conv(2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """3-D convolution, as `conv2d`: input ``N C D H W`` or ``C D H W``, weight ``K C/groups T R S``, result
    ``N K Z P Q``.
    """
    return _conv(3, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """1-D transposed convolution, as `conv_transpose2d`: input ``N C Q`` or ``C Q``, weight ``C K/groups S``,
    result ``N K W``.
    """
    return _conv_transpose(
        1, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """2-D transposed convolution, as ``F.conv_transpose2d(input, weight, bias, stride, …)``: the gradient of
    a convolution with respect to its input, with a bias.

    input ``N C P Q`` or ``C P Q``, weight ``C K/groups R S``, bias ``K``; result ``N K H W`` with
    ``H = (P - 1)·stride - 2·padding + dilation·(R - 1) + output_padding + 1``, where `output_padding` is less
    than stride or dilation. dtypes, autocast and layouts as in `conv2d`.

    Raises RuntimeError for sizes, dtypes or devices that do not fit, TypeError for arguments of a wrong type.
    """
    return _conv_transpose(
        2, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """3-D transposed convolution, as `conv_transpose2d`: input ``N C Z P Q`` or ``C Z P Q``, weight
    ``C K/groups T R S``, result ``N K D H W``.
    """
    return _conv_transpose(
        3, input, weight, bias, stride, padding, output_padding, groups, dilation
    )
