"""Convolution on the CPU: forward, both gradients and the bias's, for one to three axes.

Each has several forms, one module each; what a call takes depends on shape, type and memory alone:

    conv_depthwise  one filter a channel, of that channel alone
    conv_winograd   3x3 and 5x5 taps, dilated or not, a quarter and a third of the multiplications; 3x3 taps
                    with a stride of 2, two thirds of them; the weight gradient by conv_winograd_weights
    conv_rows       channels last: what most convolutions are fastest as, whatever their memory
    conv_planes     one tap, and channels in planes
    conv_blocks     channels in planes: results of few channels, padding modes other than zeros, dense layers
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
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
    conv_winograd_weights,
    rows,
    simd,
    vectors,
)
from cnnops.cpu.conv_axes import SPLITS, is_framed, up
from cnnops.cpu.conv_fold import conv_fold as conv_fold
from cnnops.cpu.norm import batch_norm_stats
from cnnops.cpu.task import (
    NAME,
    Shared,
    Task,
    ahead,
    collapse,
    layout,
    native_result,
    pointer,
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
    if winograd and direction == "wgrad" and conv_winograd_weights.takes(shape, dtype):
        return conv_winograd_weights
    if winograd and direction != "wgrad" and conv_winograd.takes(shape, dtype, direction):
        return conv_winograd
    channels_last = all(strides[1] == 1 for strides in activations)
    if direction != "wgrad" and not channels_last and conv_planes.takes(shape, *activations):
        return conv_planes
    return form(direction, shape, dtype, channels_last)


def _form(direction: Direction, shape: ConvShape, a: torch.Tensor, b: torch.Tensor) -> ModuleType:
    return _chosen(direction, shape, a.dtype, settings.winograd, a.stride(), b.stride())


STRETCH = 64
"""Rows of channels that are added up in their own type before float64 takes over."""

SIDE = 512
"""Elements of rows that are done as one: with fewer, an addition waits for the one before in its place."""

PIECE = 65_536
"""Elements of a task that adds up rows: what starting it costs is little beside."""


@lru_cache(None)
def _bias(kind: str, L: int) -> Task:
    T = "float64" if kind == "float64" else "float32"
    args = layout(f"int64 float64* {T}* int64*13")

    def conv_bias(address: int, index: int, scratch: int) -> None:
        """The sum of channel `index`, whose places are neighbours. Or, where channels are: of all of them a
        share of the places, and with `adding` the sum of the shares, in their order."""
        (
            grad_y_, shares, grad_bias, K, of_k, parts, side, adding, A, a, B, b, D, d, E, e,
        ) = unpack(address, args)  # fmt: skip
        grad_y = vectors.elements(grad_y_, kind)
        if parts == 0:
            plane = ahead(grad_y, index * of_k)
            total = 0.0
            for i in range(A):
                for j in range(B):
                    for m in range(D):
                        total += vectors.total(L, kind, ahead(plane, i * a + j * b + m * d), E)
            grad_bias[index] = total
            return
        if adding:
            for k in range(K):
                total = 0.0
                for part in range(parts):
                    total += shares[part * K + k]
                grad_bias[k] = total
            return
        wide = ahead(shares, index * K)
        for k in range(K):
            wide[k] = 0
        # Rows are short where channels are few: `side` of them lie side by side and are done as one.
        near, W = pointer(scratch, T), side * K
        first, behind = E * index // parts, E * (index + 1) // parts
        for i in range(A):
            for j in range(B):
                for m in range(D):
                    row = ahead(grad_y, i * a + j * b + m * d)
                    for start in range(first, behind, STRETCH * side):
                        stop = min(start + STRETCH * side, behind)
                        for k in range(W):
                            near[k] = 0
                        for q in range(start, stop, side):
                            there = min(W, (stop - q) * K)
                            vectors.sum_up(L, kind, near, ahead(row, q * e), there)
                        for s in range(side):
                            for k in range(K):
                                wide[k] += near[s * K + k]

    return Task(conv_bias, args)


@lru_cache(1024)
def _bias_loops(
    shape: ConvShape, strides: tuple[int, ...]
) -> tuple[tuple[int, int, int, int], tuple[int, ...]] | None:
    """What `conv_bias` is told of channels and shares, and of loops, for grad_y of these strides; None where
    neither channels are neighbours nor places."""
    n, k, *places = strides
    sizes, steps = collapse((shape.N, *shape.ZPQ), (n, *places))
    loops = tuple(v for pair in zip(sizes, steps, strict=True) for v in pair)
    if steps[-1] == 1 or sizes[-1] == 1:
        return (shape.K, k, 0, 0), loops
    if k != 1:
        return None
    # As many rows as fill whole vectors, and enough of these, if nothing lies between them.
    side = 1
    if steps[-1] == shape.K:
        side = 16 // math.gcd(shape.K, 16)
        side *= -(-SIDE // (side * shape.K))
    parts = max(1, min(SPLITS, shape.K * math.prod(sizes) // PIECE))
    return (shape.K, k, parts, side), loops


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
    """The gradient with respect to the bias: grad_y's sum over everything but its channels, the same bits for
    any number of threads."""
    grad_y = vectors.readable(grad_y)
    plan = _bias_loops(shape, strides(grad_y))
    if plan is None:
        grad_y = grad_y.contiguous()
        plan = _bias_loops(shape, strides(grad_y))
        assert plan is not None
    sizes, loops = plan
    K, _, parts, side = sizes
    kind = vectors.KIND[grad_y.dtype]
    real = torch.float64 if kind == "float64" else torch.float32
    result = native_result(grad_bias, real, contiguous=True)
    values = grad_y, Shared(8 * parts * K), result, *sizes
    task = _bias(kind, simd.lanes(NAME[real]))
    room = 8 * (side * K + 16)  # sums are written in whole vectors
    task.run(parts or K, grad_y.numel(), *values, False, *loops, scratch_bytes=room)
    if parts:
        task.run(1, parts * K, *values, True, *loops)
    if result is not grad_bias:
        grad_bias.copy_(result)
