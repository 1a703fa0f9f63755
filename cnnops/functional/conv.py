"""Convolution under the names of ``torch.nn.functional``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cnnops.ops import batched, expect_tensor
from cnnops.ops.conv import conv

Ints = int | Sequence[int]


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
    stride 1, "same"; for unequal sides see `cnnops.ops.conv.conv`. All tensors have one dtype, which under
    autocast is the autocast dtype. The result is channels-last where input or weight is. An input of no
    channels gives the bias.

    Raises RuntimeError for sizes, dtypes or devices that do not fit, TypeError for arguments of a wrong type.
    """
    expect_tensor("input", input)
    expect_tensor("weight", weight)
    if bias is not None:
        expect_tensor("bias", bias)
    if weight.dim() != 4:
        raise RuntimeError(
            f"weight: expected 4 dimensions, got {weight.dim()} ({list(weight.shape)})"
        )
    x, alone = batched(input, 2)
    y = conv(x, weight, bias, stride, padding, dilation, groups)
    return y.squeeze(0) if alone else y
