"""``torch.nn.functional``'s names, arguments, defaults and results, computed by the kernels of this package.

Every function takes float32, float64, float16 and bfloat16 tensors of any strides, contiguous or
channels-last, and returns the layout that PyTorch would. Other dtypes go to PyTorch's own function, as does
whatever no kernel of the engine in force takes; `cnnops.fallback` says how loudly. Mistakes raise
PyTorch's exception types with "expected …, got …", before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cnnops.ops import batched, expect_tensor
from cnnops.ops.conv import conv
from cnnops.ops.norm import batch_norm as _batch_norm
from cnnops.ops.pool import adaptive_avg_pool, avg_pool, max_pool

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_act",
    "conv2d",
    "max_pool2d",
]

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
    x, alone = batched(input)
    y = conv(x, weight, bias, stride, padding, dilation, groups)
    return y.squeeze(0) if alone else y


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
    x, alone = batched(input)
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
    x, alone = batched(input)
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
    x, alone = batched(input)
    y = adaptive_avg_pool(x, output_size)
    return y.squeeze(0) if alone else y


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation, as ``F.batch_norm(input, running_mean, running_var, weight, bias, …)``.

    `batch_norm_act` without residual and activation.
    """
    return batch_norm_act(
        input, running_mean, running_var, weight, bias, training, momentum, eps, None, "none"
    )


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Batch normalisation, residual addition and activation in one pass over memory:
    ``act(F.batch_norm(input, …) + residual)``.

    input ``N C *``, residual of the same size and dtype; the other tensors ``C``, all of the input's dtype,
    or all float32 beside a half-type input. When `training`, mean and biased variance of each channel come
    from the batch, and ``running = (1 - momentum)·running + momentum·batch`` with the unbiased variance, in
    place; otherwise from `running_mean` and `running_var`. `activation` is one of none, relu, relu6, silu,
    gelu (exact), hardswish, leaky_relu (slope 0.01), sigmoid, tanh. An empty input leaves the running
    statistics as they are.

    The backward is a kernel; the backward's own backward is composed of PyTorch's operations.

    Raises ValueError when training on one value a channel, with eps <= 0, or with only one running
    statistic, and for an unknown activation; RuntimeError for sizes, dtypes or devices that do not fit or
    missing statistics in evaluation; TypeError for arguments of a wrong type.
    """
    expect_tensor("input", input)
    for tensor in (running_mean, running_var, weight, bias, residual):
        if tensor is not None and not isinstance(tensor, Tensor):
            optional = {
                "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias,
                "residual": residual,
            }  # fmt: skip
            expect_tensor(next(name for name, t in optional.items() if t is tensor), tensor)
    statistics = (running_mean, running_var)
    return _batch_norm(
        input, *statistics, weight, bias, training, momentum, eps, residual, activation
    )
