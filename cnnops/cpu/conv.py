"""Convolution on the CPU: forward, both gradients and the bias's, for one to three axes.

Each has several forms, one module each; what a call takes depends on shape, type and memory alone:

    conv_depthwise  one filter a channel, of that channel alone
    conv_winograd   3x3 and 5x5 taps a step apart: a quarter, and a third, of the multiplications
    conv_rows       channels last: what most convolutions are fastest as, whatever their memory
    conv_planes     one tap, and channels in planes
    conv_blocks     channels in planes: results of few channels, padding modes other than zeros, dense layers
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from cnnops.config import settings
from cnnops.cpu import (
    conv_blocks,
    conv_depthwise,
    conv_planes,
    conv_rows,
    conv_winograd,
    rows,
    simd,
    vectors,
)
from cnnops.cpu.conv_axes import is_framed, up
from cnnops.cpu.conv_fold import conv_fold as conv_fold
from cnnops.cpu.norm import batch_norm_stats
from cnnops.cpu.simd import sum_of
from cnnops.cpu.task import (
    NAME,
    Task,
    ahead,
    collapse,
    layout,
    native,
    native_result,
    strides,
    unpack,
)
from cnnops.cpu.task import supports as supports
from cnnops.epilogue import Epilogue
from cnnops.shapes import ConvShape, Direction, NormShape


def form(
    direction: Direction, shape: ConvShape, dtype: torch.dtype, channels_last: bool
) -> ModuleType:
    """The module whose kernels answer; `channels_last`: whether channels are neighbours in activations."""
    if is_framed(shape) or conv_blocks.is_dense(shape):
        return conv_blocks
    C, K = shape.C // shape.groups, shape.K // shape.groups
    if direction == "dgrad":
        C, K = K, C
        if not channels_last and max(shape.stride) > 1:
            return conv_blocks
    # Vectors of conv_rows run along K: with too many lanes without a filter it takes longer. Planes must be
    # turned for it first, channels for conv_blocks; there one tap would not make up for that.
    vectors_k = up(K, rows.grain(simd.lanes("float64" if dtype == torch.float64 else "float32")))
    if channels_last:
        return conv_rows if vectors_k <= 2 * K or max(shape.kernel) == 1 else conv_blocks
    return conv_rows if 10 * vectors_k <= 13 * K else conv_blocks


@lru_cache(1024)
def _chosen(
    direction: Direction, shape: ConvShape, dtype: torch.dtype, winograd: bool,
    *activations: tuple[int, ...],
) -> ModuleType:  # fmt: skip
    """The module whose kernels answer, for activations of these strides."""
    if vectors.kind(dtype) is None:
        return (
            conv_blocks  # the others convert float16 by an instruction that this CPU does not have
        )
    if conv_depthwise.takes(shape, direction):
        return conv_depthwise
    if winograd and conv_winograd.takes(shape, dtype, direction):
        return conv_winograd
    channels_last = all(strides[1] == 1 for strides in activations)
    if direction != "wgrad" and not channels_last and conv_planes.takes(shape, *activations):
        return conv_planes
    return form(direction, shape, dtype, channels_last)


def _form(direction: Direction, shape: ConvShape, a: torch.Tensor, b: torch.Tensor) -> ModuleType:
    return _chosen(direction, shape, a.dtype, settings.winograd, a.stride(), b.stride())


@lru_cache(None)
def _bias(T: str) -> Task:
    args = layout(f"{T}**2 int64*9")

    def conv_bias(address: int, index: int, scratch: int) -> None:
        """The sum of channel `index`, in float64 whatever the type."""
        grad_y, grad_bias, of_k, A, a, B, b, D, d, E, e = unpack(address, args)
        plane = ahead(grad_y, index * of_k)
        total = 0.0
        for i in range(A):
            for j in range(B):
                for k in range(D):
                    total += sum_of(ahead(plane, i * a + j * b + k * d), E, e)
        grad_bias[index] = total

    return Task(conv_bias, args)


@lru_cache(1024)
def _bias_loops(shape: ConvShape, strides: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of channels, and sizes and strides of what is added up."""
    n, k, *places = strides
    loops = collapse((shape.N, *shape.ZPQ), (n, *places))
    return k, *(v for pair in zip(*loops, strict=True) for v in pair)


def conv_fprop(
    shape: ConvShape,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """``y = x * w + bias``, x padded as `shape.padding_mode` says; any strides. See `Epilogue` for more."""
    _form("fprop", shape, x, y).fprop(shape, x, w, bias, y, epilogue)
    if epilogue is not None and epilogue.mean is not None and epilogue.var is not None:
        # Of y as it is stored, and independent of how many threads there were, which tiles are not.
        batch_norm_stats(
            NormShape(shape.N, shape.K, shape.y_size[2:]), y, epilogue.mean, epilogue.var
        )


def conv_dgrad(
    shape: ConvShape,
    grad_y: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    grad_x: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """The gradient with respect to x, for zeros as padding, plus `bias`, one value a channel of x; and what
    else the `Epilogue` says."""
    _form("dgrad", shape, grad_y, grad_x).dgrad(shape, grad_y, w, bias, grad_x, epilogue)


def conv_wgrad(
    shape: ConvShape, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor
) -> None:
    """The gradient with respect to w: the same bits for any number of threads."""
    _form("wgrad", shape, grad_y, x).wgrad(shape, grad_y, x, grad_w)


def conv_bgrad(shape: ConvShape, grad_y: torch.Tensor, grad_bias: torch.Tensor) -> None:
    """The gradient with respect to the bias: grad_y's sum over everything but its channels."""
    grad_y = native(grad_y)
    result = native_result(grad_bias, grad_y.dtype, contiguous=True)
    _bias(NAME[grad_y.dtype]).run(
        shape.K, grad_y.numel(), grad_y, result,
        *_bias_loops(shape, strides(grad_y)),
    )  # fmt: skip
    if result is not grad_bias:
        grad_bias.copy_(result)
