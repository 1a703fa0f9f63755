"""Convolution under the names of ``torch.nn.functional``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cnnops.ops import batched, expect_tensor
from cnnops.ops import conv as ops
from cnnops.ops import conv_act as fused
from cnnops.ops.entrance import entrance

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


@entrance
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


@entrance
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


@entrance
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


@entrance
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


@entrance
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


@entrance
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


@entrance
def conv_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Any = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Convolution over one to three axes, a factor and a bias by channel, residual addition and activation in
    one pass over memory: ``act(scale · conv(input, weight) + bias + residual)``.

    input ``N C *spatial`` or ``C *spatial``; weight ``K C/groups *kernel``, which tells the axes; scale and
    bias ``K``; residual as large as the result. All have one dtype. `padding` is `conv2d`'s, `padding_mode`
    that of ``torch.nn.Conv2d``, `activation` that of `batch_norm_act`. With a batch norm folded into scale
    and bias this is a block of a network at inference.

    Differentiable; backward costs what convolution's does and a pass over the result where the activation is
    relu, relu6, leaky_relu, or in float32 and float64 sigmoid or tanh, and there is no scale. With silu, gelu
    and hardswish, or a scale, a call that records gradients takes several passes instead.

    Raises ValueError for an unknown activation or padding mode, RuntimeError for sizes, dtypes or devices
    that do not fit, TypeError for arguments of a wrong type.
    """
    dims = _expect_fused(input, weight, bias=bias, scale=scale, residual=residual)
    x, alone = batched(input, dims)
    y = fused.conv_act(
        x, weight, bias, stride, padding, dilation, groups, padding_mode, scale,
        residual.unsqueeze(0) if alone and residual is not None else residual, activation,
    )  # fmt: skip
    return y.squeeze(0) if alone else y


@entrance
def conv_transpose_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Transposed convolution with what `conv_act` has: ``act(scale · conv_transpose(input, weight) + bias +
    residual)``; weight ``C K/groups *kernel``. Gradients and errors as there.
    """
    dims = _expect_fused(input, weight, bias=bias, scale=scale, residual=residual)
    x, alone = batched(input, dims)
    y = fused.conv_transpose_act(
        x, weight, bias, stride, padding, output_padding, groups, dilation, scale,
        residual.unsqueeze(0) if alone and residual is not None else residual, activation,
    )  # fmt: skip
    return y.squeeze(0) if alone else y


def conv_batch_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: Ints = 1,
    padding: Any = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """``batch_norm_act(conv(input, weight, bias), …)`` over one to three axes. When `training`, convolution
    gathers its result's mean and variance as it writes it, and batch norm reads it once instead of twice.

    input ``N C *spatial``; the convolution's arguments as in `conv_act`, those of batch norm, all ``K`` long,
    as in `batch_norm_act`, with all errors of both.
    """
    dims = _expect_fused(
        input, weight, bias=bias, running_mean=running_mean, running_var=running_var,
        norm_weight=norm_weight, norm_bias=norm_bias, residual=residual,
    )  # fmt: skip
    if input.dim() != dims + 2:
        raise RuntimeError(
            f"input: expected {dims + 2} dimensions, got {input.dim()} ({list(input.shape)})"
        )
    geometry = (stride, padding, dilation, groups, padding_mode)
    return fused.conv_batch_norm_act(
        input, weight, bias, geometry, running_mean, running_var, norm_weight, norm_bias, training, momentum,
        eps, residual, activation,
    )  # fmt: skip


def _expect_fused(input: Tensor, weight: Tensor, **others: Tensor | None) -> int:
    """The number of spatial axes, which the weight tells."""
    expect_tensor("input", input)
    expect_tensor("weight", weight)
    for name, t in others.items():
        if t is not None:
            expect_tensor(name, t)
    if weight.dim() not in (3, 4, 5):
        raise RuntimeError(
            f"weight: expected 3 to 5 dimensions, got {weight.dim()} ({list(weight.shape)})"
        )
    return weight.dim() - 2
