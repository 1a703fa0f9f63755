"""Group norm and layer norm on the CPU, forward and backward.

Of every image's group of channels, or of every row, ``y = act(gamma * (x - mean) * rstd + beta)``. Sums are
kept in float64 about the group's first value, which is as far from its mean as the deviation allows: so
statistics survive a mean far larger than the deviation in one pass over x. (A float64 x takes a second pass
about the first's mean.) A mean that float32 cannot hold is carried as ``high + low``; where the two meet a
product, low times that product's other factor is part of a constant. The backward computes the activation's
input anew from x.

There are two orders of memory, and a pair of kernels for each:

    rows       a group's D = C/groups·L values are neighbours: row-major images, and layer norm, where the
               row is the group and has one place a channel (L = 1)
    columns    channels are innermost: L steps of `side` neighbouring channels, whole groups of one image

Gradients of gamma and beta are sums over images. Each task sums those of its own images, and `total` adds up
the tasks' sums in their order; how the images are split depends on the shape alone. Of long rows a kernel of
their own, `parameters`, sums some channels over all images.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from cnnops.cpu.compiler import routine
from cnnops.cpu.norm import (
    _activate,
    _deliver,
    _dense,
    _real,
    _result,
    _slope,
    _vector,
)
from cnnops.cpu.task import (
    NAME,
    Task,
    ahead,
    given,
    layout,
    pointer,
    unpack,
)
from cnnops.cpu.task import (
    supports as supports,
)
from cnnops.epilogue import ACTIVATIONS
from cnnops.shapes import GroupShape, LayerShape

SIDE = 64
"""Channels done side by side in channels-last memory, at least: four cache lines of float32."""

PIECE = 32
"""Rows whose sums for gamma and beta are added up together, so that what they are added to stays in cache."""

SPAN = 512
"""Channels of those sums done at a time."""

SHORT = 256
"""Terms of a gradient's sum that are added up in the elements' own type."""

LONG = 4096
"""Channels of one place beyond which sums are not kept by task."""

STRETCH = 2048
"""Channels of them that are then done at a time: memory is read in long runs."""

FAR = 64
"""Deviations from zero beyond which a mean as it was kept is off by a good part of the deviation."""


# ---- kernels ----------------------------------------------------------------------------------------------


@routine(fastmath={"reassoc", "contract"})
def _deviations(x, count, about):
    """The sums of ``x - about`` and of its squares."""
    first, second = 0.0, 0.0
    for i in range(count):
        d = np.float64(x[i]) - about
        first += d
        second += d * d
    return first, second


@routine
def _moments(exact, x, count):
    """Mean and biased variance of a row. `exact`: x is as wide as the sums, and two passes are worth it."""
    about = np.float64(x[0])
    first, second = _deviations(x, count, about)
    mean = about + first / count
    if exact:
        about = mean
        first, second = _deviations(x, count, about)
        mean = about + first / count
    var = second / count - (first / count) * (first / count)
    return mean, 0.0 if var < 0 else var  # rounding; NaN stays


@routine(fastmath={"contract"})
def _normalise_plane(real, kind, x, y, count, high, scale, shift):
    for i in range(count):
        y[i] = _activate(real, kind, (x[i] - high) * scale + shift)


@routine(fastmath={"contract"})
def _normalise_row(real, kind, x, y, count, weight, bias, high, low, rstd):
    for i in range(count):
        y[i] = _activate(real, kind, ((x[i] - high) * rstd - low) * weight[i] + bias[i])


@routine(fastmath={"reassoc", "contract"})
def _plane_sums(real, kind, grad_y, x, count, high, scale, shift):
    """The sums of the gradient of the activation's input, and of its products with ``x - high``."""
    first, second = 0.0, 0.0
    for start in range(0, count, SHORT):
        sum1, sum2 = real(0), real(0)
        for i in range(start, min(start + SHORT, count)):
            d = x[i] - high
            g = grad_y[i] * _slope(real, kind, d * scale + shift)
            sum1 += g
            sum2 += g * d
        first += sum1
        second += sum2
    return first, second


@routine(fastmath={"reassoc", "contract"})
def _row_sums(real, kind, grad_y, x, count, weight, bias, high, low, rstd):
    """As `_plane_sums`, of gradients times gamma."""
    first, second = 0.0, 0.0
    for start in range(0, count, SHORT):
        sum1, sum2 = real(0), real(0)
        for i in range(start, min(start + SHORT, count)):
            d = x[i] - high
            g = grad_y[i] * weight[i]
            g *= _slope(real, kind, (d * rstd - low) * weight[i] + bias[i])
            sum1 += g
            sum2 += g * d
        first += sum1
        second += sum2
    return first, second


@routine(fastmath={"contract"})
def _plane_back(real, kind, grad_y, x, to, count, high, scale, shift, a, b):
    """``grad_x = scale * grad_z - a - (x - high) * b``."""
    for i in range(count):
        d = x[i] - high
        to[i] = grad_y[i] * _slope(real, kind, d * scale + shift) * scale - a - d * b


@routine(fastmath={"contract"})
def _row_back(real, kind, grad_y, x, to, count, weight, bias, high, low, rstd, a, b):
    for i in range(count):
        d = x[i] - high
        g = grad_y[i] * weight[i]
        g *= _slope(real, kind, (d * rstd - low) * weight[i] + bias[i])
        to[i] = g * rstd - a - d * b


@routine(fastmath={"contract"})
def _add_row(real, kind, grad_y, x, count, weight, bias, high, low, rstd, to_weight, to_bias):
    """Add a row's ``grad_z * xhat`` and ``grad_z`` to sums of a few rows."""
    for i in range(count):
        xhat = (x[i] - high) * rstd - low
        g = grad_y[i] * _slope(real, kind, xhat * weight[i] + bias[i])
        to_bias[i] += g
        to_weight[i] += g * xhat


@routine(fastmath={"contract"})
def _add_deviations(x, count, step, n, about, first, second):
    for r in range(count):
        row = ahead(x, r * step)
        for i in range(n):
            d = np.float64(row[i]) - about[i]
            first[i] += d
            second[i] += d * d


@routine(fastmath={"contract"})
def _normalise_columns(real, kind, x, y, count, step, n, high, scale, shift):
    for r in range(count):
        row, to = ahead(x, r * step), ahead(y, r * step)
        for i in range(n):
            to[i] = _activate(real, kind, (row[i] - high[i]) * scale[i] + shift[i])


@routine(fastmath={"contract"})
def _sloped(real, kind, grad_y, x, n, high, scale, shift, grad_z):
    """The gradient of the activation's input in one step of n channels: `grad_z`, or grad_y itself."""
    if kind == 0:
        return grad_y
    for i in range(n):
        grad_z[i] = grad_y[i] * _slope(real, kind, (x[i] - high[i]) * scale[i] + shift[i])
    return grad_z


@routine(fastmath={"contract"})
def _add_products(real, kind, grad_y, x, count, step, n, high, scale, shift, grad_z, first, second):
    for r in range(count):
        row = ahead(x, r * step)
        g = _sloped(real, kind, ahead(grad_y, r * step), row, n, high, scale, shift, grad_z)
        for i in range(n):
            first[i] += g[i]
            second[i] += g[i] * (row[i] - high[i])


@routine(fastmath={"contract"})
def _columns_back(real, kind, grad_y, x, to, count, step, n, high, scale, shift, grad_z, a, b):
    for r in range(count):
        row, into = ahead(x, r * step), ahead(to, r * step)
        g = _sloped(real, kind, ahead(grad_y, r * step), row, n, high, scale, shift, grad_z)
        for i in range(n):
            into[i] = g[i] * scale[i] - a[i] - (row[i] - high[i]) * b[i]


@routine
def _rest(mean, high):
    """What of a mean `high` does not hold."""
    return mean - high if math.isfinite(mean) else 0.0


@routine
def _constants(average, slope, low, rstd):
    """a and b of ``grad_x = rstd * gamma * grad_z - a - (x - high) * b``: from averages of ``gamma * grad_z``
    and of its products with ``x - high``."""
    b = (slope - low * average) * rstd * rstd * rstd
    return rstd * average - low * b, b


@lru_cache(None)
def _rows_forward(T: str, kind: int) -> Task:
    args = layout(f"{T}**6 int64*6 float64")
    real, exact = _real(T), T == "float64"

    def group_norm_rows(address: int, index: int, scratch: int) -> None:
        """The groups ``index * each …`` of y, mean and rstd."""
        (
            x, weight, bias, y, means, rstds, rows, each, groups, channels, D, L, eps,
        ) = unpack(address, args)  # fmt: skip
        for r in range(index * each, min(index * each + each, rows)):
            row, to = ahead(x, r * D), ahead(y, r * D)
            mean, var = _moments(exact, row, D)
            rstd = 1 / math.sqrt(var + eps)
            means[r], rstds[r] = mean, rstd
            high = real(mean)
            low = _rest(mean, high)
            c0 = r % groups * channels
            if L == 1:
                _normalise_row(
                    real, kind, row, to, D, ahead(weight, c0), ahead(bias, c0), high, real(low * rstd),
                    real(rstd),
                )  # fmt: skip
                continue
            for c in range(channels):
                scale = weight[c0 + c] * rstd
                _normalise_plane(
                    real, kind, ahead(row, c * L), ahead(to, c * L), L, high, real(scale),
                    real(bias[c0 + c] - low * scale),
                )  # fmt: skip

    return Task(group_norm_rows, args)


@lru_cache(None)
def _columns_forward(T: str, kind: int) -> Task:
    args = layout(f"{T}**6 int64*6 float64")
    real, exact = _real(T), T == "float64"

    def group_norm_columns(address: int, index: int, scratch: int) -> None:
        """Some groups of one image: `side` channels."""
        (
            x, weight, bias, y, means, rstds, blocks, side, channels, C, L, groups, eps,
        ) = unpack(address, args)  # fmt: skip
        image, c0 = index // blocks, index % blocks * side
        n = min(side, C - c0)
        about = pointer(scratch, "float64")
        first, second = ahead(about, side), ahead(about, 2 * side)
        high = pointer(scratch + 24 * side, T)
        scale, shift = ahead(high, side), ahead(high, 2 * side)
        place = image * L * C + c0
        for i in range(n):
            about[i] = x[place + i // channels * channels]
        for attempt in range(2 if exact else 1):
            for i in range(n):
                first[i], second[i] = 0, 0
            _add_deviations(ahead(x, place), L, C, n, about, first, second)
            for g in range(0, n, channels):
                sum1, sum2 = 0.0, 0.0
                for i in range(g, g + channels):
                    sum1 += first[i]
                    sum2 += second[i]
                off = sum1 / (channels * L)
                mean, var = about[g] + off, sum2 / (channels * L) - off * off
                if exact and attempt == 0:
                    for i in range(g, g + channels):
                        about[i] = mean
                    continue
                rstd = 1 / math.sqrt((0.0 if var < 0 else var) + eps)
                r = image * groups + (c0 + g) // channels
                means[r], rstds[r] = mean, rstd
                for i in range(g, g + channels):
                    high[i] = mean
                    factor = weight[c0 + i] * rstd
                    scale[i] = factor
                    shift[i] = bias[c0 + i] - _rest(mean, high[i]) * factor
        _normalise_columns(
            real, kind, ahead(x, place), ahead(y, place), L, C, n, high, scale, shift
        )

    return Task(group_norm_columns, args)


@lru_cache(None)
def _planes_backward(T: str, kind: int) -> Task:
    args = layout(f"{T}**7 float64**2 int64*8")
    real = _real(T)

    def group_norm_planes_backward(address: int, index: int, scratch: int) -> None:
        """grad_x of some images, `side` groups of each, and what they add to the sums. L > 1."""
        (
            grad_y, x, weight, bias, means, rstds, grad_x, to_weight, to_bias,
            N, each, groups, blocks, side, channels, C, L,
        ) = unpack(address, args)  # fmt: skip
        part, block, D = index // blocks, index % blocks, channels * L
        for image in range(part * each, min(part * each + each, N)):
            for group in range(block * side, min(block * side + side, groups)):
                r, c0 = image * groups + group, group * channels
                grad, row, to = ahead(grad_y, r * D), ahead(x, r * D), ahead(grad_x, r * D)
                high, rstd, low = means[r], np.float64(rstds[r]), 0.0
                if abs(high) * rstd > FAR:
                    first, second = _deviations(row, D, np.float64(high))
                    low = first / D
                sum1, sum2 = 0.0, 0.0
                for c in range(channels):
                    factor = rstd * weight[c0 + c]
                    first, second = _plane_sums(
                        real, kind, ahead(grad, c * L), ahead(row, c * L), L, high, real(factor),
                        real(bias[c0 + c] - low * factor),
                    )  # fmt: skip
                    sum1 += first * weight[c0 + c]
                    sum2 += second * weight[c0 + c]
                    if given(to_weight):
                        to_weight[part * C + c0 + c] += (second - low * first) * rstd
                        to_bias[part * C + c0 + c] += first
                if not given(grad_x):
                    continue
                a, b = _constants(sum1 / D, sum2 / D, low, rstd)
                for c in range(channels):
                    factor = rstd * weight[c0 + c]
                    _plane_back(
                        real, kind, ahead(grad, c * L), ahead(row, c * L), ahead(to, c * L), L, high,
                        real(factor), real(bias[c0 + c] - low * factor), real(a), real(b),
                    )  # fmt: skip

    return Task(group_norm_planes_backward, args)


@lru_cache(None)
def _rows_backward(T: str, kind: int) -> Task:
    args = layout(f"{T}**8 float64**2 int64*8")
    real = _real(T)

    def group_norm_rows_backward(address: int, index: int, scratch: int) -> None:
        """grad_x of some images, and what they add to the sums. L = 1. `lows` gets what the means lack, as
        parts of the deviation."""
        (
            grad_y, x, weight, bias, means, rstds, grad_x, lows, to_weight, to_bias,
            N, each, groups, blocks, side, D, C, L,
        ) = unpack(address, args)  # fmt: skip
        start, stop = index * each, min(index * each + each, N)
        high = pointer(scratch, T)
        low, rstd = ahead(high, PIECE), ahead(high, 2 * PIECE)
        of_weight = ahead(high, 3 * PIECE)
        of_bias = ahead(of_weight, SPAN)
        share = 1.0 / D
        for group in range(groups):
            c0 = group * D
            gamma, beta = ahead(weight, c0), ahead(bias, c0)
            for first_image in range(start, stop, PIECE):
                images = min(PIECE, stop - first_image)
                for j in range(images):
                    r = (first_image + j) * groups + group
                    grad, row = ahead(grad_y, r * D), ahead(x, r * D)
                    high[j], rstd[j], off = means[r], rstds[r], 0.0
                    if abs(high[j]) * rstd[j] > FAR:
                        first, second = _deviations(row, D, np.float64(high[j]))
                        off = first * share
                    low[j] = off * rstd[j]
                    if given(lows):
                        lows[r] = low[j]
                    if given(grad_x):
                        sum1, sum2 = _row_sums(
                            real, kind, grad, row, D, gamma, beta, high[j], low[j], rstd[j]
                        )
                        a, b = _constants(sum1 * share, sum2 * share, off, np.float64(rstd[j]))
                        _row_back(
                            real, kind, grad, row, ahead(grad_x, r * D), D, gamma, beta, high[j], low[j],
                            rstd[j], real(a), real(b),
                        )  # fmt: skip
                if not given(to_weight):
                    continue
                for c in range(0, D, SPAN):
                    n = min(SPAN, D - c)
                    for i in range(n):
                        of_weight[i], of_bias[i] = 0, 0
                    for j in range(images):
                        place = ((first_image + j) * groups + group) * D + c
                        _add_row(
                            real, kind, ahead(grad_y, place), ahead(x, place), n, ahead(gamma, c),
                            ahead(beta, c), high[j], low[j], rstd[j], of_weight, of_bias,
                        )  # fmt: skip
                    place = index * C + c0 + c
                    for i in range(n):
                        to_weight[place + i] += of_weight[i]
                        to_bias[place + i] += of_bias[i]

    return Task(group_norm_rows_backward, args)


@lru_cache(None)
def _parameters(T: str, kind: int) -> Task:
    args = layout(f"{T}**9 int64*4")
    real = _real(T)

    def group_norm_parameters(address: int, index: int, scratch: int) -> None:
        """Gradients of STRETCH values of gamma and beta, for rows so long that parts of sums would not be
        small beside x."""
        (
            grad_y, x, weight, bias, means, lows, rstds, grad_weight, grad_bias, N, groups, channels, blocks,
        ) = unpack(address, args)  # fmt: skip
        group, c = index // blocks, index % blocks * STRETCH
        n, c0 = min(STRETCH, channels - c), index // blocks * channels + index % blocks * STRETCH
        total_weight = pointer(scratch, "float64")
        total_bias = ahead(total_weight, STRETCH)
        of_weight = pointer(scratch + 16 * STRETCH, T)
        of_bias = ahead(of_weight, STRETCH)
        for i in range(n):
            total_weight[i], total_bias[i] = 0, 0
        for first_image in range(0, N, PIECE):
            for i in range(n):
                of_weight[i], of_bias[i] = 0, 0
            for image in range(first_image, min(first_image + PIECE, N)):
                r = image * groups + group
                place = r * channels + c
                _add_row(
                    real, kind, ahead(grad_y, place), ahead(x, place), n, ahead(weight, c0),
                    ahead(bias, c0), means[r], lows[r], rstds[r], of_weight, of_bias,
                )  # fmt: skip
            for i in range(n):
                total_weight[i] += of_weight[i]
                total_bias[i] += of_bias[i]
        for i in range(n):
            if given(grad_weight):
                grad_weight[c0 + i] = total_weight[i]
            if given(grad_bias):
                grad_bias[c0 + i] = total_bias[i]

    return Task(group_norm_parameters, args)


@lru_cache(None)
def _columns_backward(T: str, kind: int) -> Task:
    args = layout(f"{T}**7 float64**2 int64*8")
    real = _real(T)

    def group_norm_columns_backward(address: int, index: int, scratch: int) -> None:
        """grad_x of some images, `side` channels of each, and what they add to the sums."""
        (
            grad_y, x, weight, bias, means, rstds, grad_x, to_weight, to_bias,
            N, each, groups, blocks, side, channels, C, L,
        ) = unpack(address, args)  # fmt: skip
        part, c0 = index // blocks, index % blocks * side
        n = min(side, C - c0)
        about = pointer(scratch, "float64")
        first, second = ahead(about, side), ahead(about, 2 * side)
        high = pointer(scratch + 24 * side, T)
        scale, shift = ahead(high, side), ahead(high, 2 * side)
        a, b, grad_z = ahead(high, 3 * side), ahead(high, 4 * side), ahead(high, 5 * side)
        for image in range(part * each, min(part * each + each, N)):
            place = image * L * C + c0
            row0 = image * groups + c0 // channels
            far = False
            for i in range(n):
                high[i], first[i], second[i] = means[row0 + i // channels], 0, 0
                about[i] = high[i]
                far = far or abs(about[i]) * rstds[row0 + i // channels] > FAR
            if far:
                _add_deviations(ahead(x, place), L, C, n, about, first, second)
            for g in range(0, n, channels):
                low = 0.0
                for i in range(g, g + channels):
                    low += first[i]
                for i in range(g, g + channels):
                    about[i] = low / (channels * L)  # from here on what `high` lacks of the mean
                    factor = np.float64(weight[c0 + i]) * rstds[row0 + i // channels]
                    scale[i] = factor
                    shift[i] = bias[c0 + i] - about[i] * factor
                    first[i], second[i] = 0, 0
            _add_products(
                real, kind, ahead(grad_y, place), ahead(x, place), L, C, n, high, scale, shift, grad_z,
                first, second,
            )  # fmt: skip
            for g in range(0, n, channels):
                rstd, low = np.float64(rstds[row0 + g // channels]), about[g]
                sum1, sum2 = 0.0, 0.0
                for i in range(g, g + channels):
                    sum1 += first[i] * weight[c0 + i]
                    sum2 += second[i] * weight[c0 + i]
                    if given(to_weight):
                        to_weight[part * C + c0 + i] += (second[i] - low * first[i]) * rstd
                        to_bias[part * C + c0 + i] += first[i]
                D = channels * L
                ours_a, ours_b = _constants(sum1 / D, sum2 / D, low, rstd)
                for i in range(g, g + channels):
                    a[i], b[i] = ours_a, ours_b
            if given(grad_x):
                _columns_back(
                    real, kind, ahead(grad_y, place), ahead(x, place), ahead(grad_x, place), L, C, n, high,
                    scale, shift, grad_z, a, b,
                )  # fmt: skip

    return Task(group_norm_columns_backward, args)


@lru_cache(None)
def _total(T: str) -> Task:
    args = layout(f"float64* {T}* int64*2")

    def group_norm_total(address: int, index: int, scratch: int) -> None:
        """``to[c]``, the sum of ``sums[part][c]`` over parts, for some of the c."""
        sums, to, parts, C = unpack(address, args)
        total = pointer(scratch, "float64")
        c0 = index * SPAN
        n = min(SPAN, C - c0)
        for i in range(n):
            total[i] = 0
        for part in range(parts):
            row = ahead(sums, part * C + c0)
            for i in range(n):
                total[i] += row[i]
        for i in range(n):
            to[c0 + i] = total[i]

    return Task(group_norm_total, args)


# ---- operations -------------------------------------------------------------------------------------------


class _Work(NamedTuple):
    """How a problem is cut into tasks, in `parts` along the images."""

    sizes: tuple[int, ...]
    tasks: int
    parts: int
    cycles: float
    scratch: int


def _numbers(shape: GroupShape | LayerShape) -> tuple[int, int, int, int]:
    """Images, groups, channels of a group, and places of a channel. A row is an image of one group."""
    if isinstance(shape, LayerShape):
        return shape.N, 1, shape.D, 1
    return shape.N, shape.groups, shape.C // shape.groups, shape.L


@lru_cache(512)
def _forward_work(shape: GroupShape | LayerShape, together: bool) -> _Work:
    N, groups, channels, L = _numbers(shape)
    C, D = groups * channels, channels * L
    cycles = 2.0 * N * C * L
    if together:
        side = channels * max(1, SIDE // channels)
        blocks = -(-C // side)
        sizes = (blocks, side, channels, C, L, groups)
        return _Work(sizes, N * blocks, 1, cycles, (24 + 8 * 3) * side)
    each = max(1, 4096 // D)
    return _Work((N * groups, each, groups, channels, D, L), -(-N * groups // each), 1, cycles, 0)


@lru_cache(512)
def _backward_work(shape: GroupShape | LayerShape, together: bool) -> _Work:
    N, groups, channels, L = _numbers(shape)
    C, D = groups * channels, channels * L
    if together:
        side = channels * max(1, SIDE // channels)
        blocks, scratch = -(-C // side), (24 + 8 * 6) * side
    elif L > 1:
        side = max(1, 4096 // D)
        blocks, scratch = -(-groups // side), 0
    else:
        side, blocks, scratch = groups, 1, 8 * (3 * PIECE + 2 * SPAN)
    each = -(-N // min(N, max(1, 64 // blocks)))  # tasks enough for many threads
    parts = -(-N // each)
    sizes = (N, each, groups, blocks, side, channels, C, L)
    return _Work(sizes, parts * blocks, parts, 4.0 * N * C * L, scratch)


def _together(shape: GroupShape | LayerShape, result: torch.Tensor) -> bool:
    """Whether to work on memory where channels are neighbours, as they are in `result`."""
    if isinstance(shape, LayerShape) or shape.L == 1 or result.is_contiguous():
        return False
    return result.movedim(1, -1).is_contiguous()


def _affine(
    like: torch.Tensor, size: int, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias as kernels read them: ones and zeros for those that are not there."""
    gamma, beta = _vector(weight, like.dtype), _vector(bias, like.dtype)
    return (
        like.new_ones(size) if gamma is None else gamma,
        like.new_zeros(size) if beta is None else beta,
    )


def _forward(
    shape: GroupShape | LayerShape, x: torch.Tensor, weight: torch.Tensor | None,
    bias: torch.Tensor | None, eps: float, activation: str, y: torch.Tensor, mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:  # fmt: skip
    together = _together(shape, y)
    x = _dense(x, together)
    _, groups, channels, _ = _numbers(shape)
    affine = _affine(x, groups * channels, weight, bias)
    result = _result(y, x.dtype, together)
    work = _forward_work(shape, together)
    kernel = _columns_forward if together else _rows_forward
    kernel(NAME[x.dtype], ACTIVATIONS.index(activation)).run(
        work.tasks, work.cycles, x, *affine, result, mean, rstd, *work.sizes, eps,
        scratch_bytes=work.scratch,
    )  # fmt: skip
    _deliver((result, y))


def _backward(
    shape: GroupShape | LayerShape, grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
    bias: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor, activation: str,
    grad_x: torch.Tensor | None, grad_weight: torch.Tensor | None, grad_bias: torch.Tensor | None,
) -> None:  # fmt: skip
    together = _together(shape, x if grad_x is None else grad_x)
    grad_y, x = _dense(grad_y, together), _dense(x, together)
    _, groups, channels, L = _numbers(shape)
    C = groups * channels
    affine = _affine(x, C, weight, bias)
    statistics = [_vector(t, x.dtype) for t in (mean, rstd)]
    name, kind = NAME[x.dtype], ACTIVATIONS.index(activation)
    asked = (grad_x, grad_weight, grad_bias)
    result = _result(grad_x, x.dtype, together)
    grads = [None if t is None else _vector_result(t, x.dtype) for t in (grad_weight, grad_bias)]
    work = _backward_work(shape, together)
    inputs = (grad_y, x, *affine, *statistics)
    long = not together and L == 1 and C > LONG
    lows = x.new_empty(mean.numel()) if long else None
    sums: tuple[torch.Tensor | None, ...] = (None, None)
    if not long and grads != [None, None]:
        sums = torch.zeros(2, work.parts, C, dtype=torch.float64).unbind()
    kernel = _columns_backward if together else _planes_backward if L > 1 else _rows_backward
    outputs = (result, lows, *sums) if kernel is _rows_backward else (result, *sums)
    kernel(name, kind).run(
        work.tasks, work.cycles, *inputs, *outputs, *work.sizes, scratch_bytes=work.scratch
    )  # fmt: skip
    if long and grads != [None, None]:
        gamma, beta, means, rstds = inputs[2:]
        blocks = -(-channels // STRETCH)
        _parameters(name, kind).run(
            groups * blocks, work.cycles / 2,
            grad_y, x, gamma, beta, means, lows, rstds, *grads, shape.N, groups, channels,
            blocks, scratch_bytes=32 * STRETCH,
        )  # fmt: skip
    else:
        for partial, grad in zip(sums, grads, strict=True):
            if partial is not None and grad is not None:
                _total(name).run(
                    -(-C // SPAN), 1.0 * work.parts * C, partial, grad, work.parts, C,
                    scratch_bytes=8 * SPAN,
                )  # fmt: skip
    _deliver(*zip((result, *grads), asked, strict=True))


def _vector_result(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where kernels write what becomes `t`: `t` itself if its type and order allow it."""
    return t if t.dtype == dtype and t.is_contiguous() else torch.empty(t.shape, dtype=dtype)


def group_norm_fwd(
    shape: GroupShape, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
    activation: str, y: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
) -> None:  # fmt: skip
    """y, and the statistics it was computed by."""
    _forward(shape, x, weight, bias, eps, activation, y, mean, rstd)


def group_norm_bwd(
    shape: GroupShape, grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
    bias: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor, activation: str,
    grad_x: torch.Tensor | None, grad_weight: torch.Tensor | None, grad_bias: torch.Tensor | None,
) -> None:  # fmt: skip
    """Every gradient that is asked for."""
    _backward(
        shape, grad_y, x, weight, bias, mean, rstd, activation, grad_x, grad_weight, grad_bias
    )


def layer_norm_fwd(
    shape: LayerShape, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
    y: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
) -> None:  # fmt: skip
    """y, and the statistics it was computed by."""
    _forward(shape, x, weight, bias, eps, "none", y, mean, rstd)


def layer_norm_bwd(
    shape: LayerShape, grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
    mean: torch.Tensor, rstd: torch.Tensor, grad_x: torch.Tensor | None, grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
) -> None:  # fmt: skip
    """Every gradient that is asked for."""
    _backward(shape, grad_y, x, weight, None, mean, rstd, "none", grad_x, grad_weight, grad_bias)
