"""Batch normalisation on the CPU: training forward, inference, the backward of both, and statistics alone.

Each channel ``y = act(gamma * (x - mean) * rstd + beta + residual)``. Statistics come from two passes in
float64, the second about the first's mean, so they survive a mean far larger than the deviation; a mean that
float32 cannot hold is carried as ``high + low``. The backward computes the activation's input anew from x,
or is given y in place of the residual, where y tells the activation's derivative.

The elements of a channel, or of SIDE neighbouring ones in channels-last memory, are `runs` of at most
`length` steps: planes of the images in row-major memory, stretches of rows otherwise. Each helper does one
run of `n` channels, n = 1 being the row-major case, with vectors along the run, or along the channels. What a
channel needs lies in scratch, one array of SIDE behind the other.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numba import njit

from cnnops.cpu.simd import sum_of
from cnnops.cpu.task import (
    NAME,
    Task,
    ahead,
    given,
    layout,
    native,
    pointer,
    unpack,
)
from cnnops.cpu.task import (
    supports as supports,
)
from cnnops.epilogue import ACTIVATIONS
from cnnops.shapes import NormShape

SIDE = 16
"""Channels done side by side in channels-last memory: one cache line of float32."""

PIECE = 1024
"""Elements that the backward holds in scratch at a time."""


# ---- kernels ----------------------------------------------------------------------------------------------
# `kind` is an index into ACTIVATIONS and `real` the type of the elements: both are known when a kernel is
# compiled, so that one branch remains, and constants do not widen float32 arithmetic.


@njit(error_model="numpy", boundscheck=False)
def _activate(real, kind, z):
    if kind == 1:
        return real(0) if z <= real(0) else z
    if kind == 2:
        return real(0) if z <= real(0) else real(6) if z >= real(6) else z
    if kind == 3:
        return z / (real(1) + math.exp(-z))
    if kind == 4:
        return real(0.5) * z * (real(1) + math.erf(z * real(math.sqrt(0.5))))
    if kind == 5:
        return z * min(max(z + real(3), real(0)), real(6)) / real(6)
    if kind == 6:
        return z if z > real(0) else z * real(0.01)
    if kind == 7:
        return real(1) / (real(1) + math.exp(-z))
    if kind == 8:
        return math.tanh(z)
    return z


@njit(error_model="numpy", boundscheck=False)
def _slope(real, kind, z):
    """The activation's derivative at z; where there is none, PyTorch's choice."""
    if kind == 1:
        return real(0) if z <= real(0) else real(1)
    if kind == 2:
        return real(0) if z <= real(0) or z >= real(6) else real(1)
    if kind == 3:
        s = real(1) / (real(1) + math.exp(-z))
        return s * (real(1) + z * (real(1) - s))
    if kind == 4:
        below = real(0.5) * (real(1) + math.erf(z * real(math.sqrt(0.5))))
        return below + z * real(1 / math.sqrt(2 * math.pi)) * math.exp(real(-0.5) * z * z)
    if kind == 5:
        if z <= real(-3):
            return real(0)
        return z / real(3) + real(0.5) if z < real(3) else real(1)
    if kind == 6:
        return real(1) if z > real(0) else real(0.01)
    if kind == 7:
        s = real(1) / (real(1) + math.exp(-z))
        return s * (real(1) - s)
    if kind == 8:
        t = math.tanh(z)
        return real(1) - t * t
    return real(1)


@njit(error_model="numpy", boundscheck=False)
def _slope_of_result(real, kind, y):
    """The activation's derivative where its result is y."""
    if kind == 7:
        return y * (real(1) - y)
    if kind == 8:
        return real(1) - y * y
    return _slope(real, kind, y)  # piecewise linear: y lies in the piece that the argument does


@njit(error_model="numpy", boundscheck=False)
def _sum(x, count, step, n, total):
    if n == 1:
        total[0] += sum_of(x, count, step)
        return
    for r in range(count):
        row = ahead(x, r * step)
        for i in range(n):
            total[i] += row[i]


@njit(error_model="numpy", boundscheck=False, fastmath={"reassoc", "contract"})
def _deviations(x, count, step, n, mean, first, second):
    """Add up ``x - mean`` and its squares."""
    if n == 1:
        about, sum1, sum2 = mean[0], 0.0, 0.0
        for i in range(count):
            d = np.float64(x[i * step]) - about
            sum1 += d
            sum2 += d * d
        first[0] += sum1
        second[0] += sum2
        return
    for r in range(count):
        row = ahead(x, r * step)
        for i in range(n):
            d = np.float64(row[i]) - mean[i]
            first[i] += d
            second[i] += d * d


@njit(error_model="numpy", boundscheck=False)
def _moments(x, total, length, runs, run_step, step, n, mean, var, rest):
    """Mean and biased variance of the `n` channels from x on; `rest` is scratch."""
    for i in range(n):
        mean[i] = var[i] = rest[i] = 0
    for run in range(runs):
        _sum(ahead(x, run * run_step), min(length, total - run * length), step, n, mean)
    for i in range(n):
        mean[i] /= total
    for run in range(runs):
        place = ahead(x, run * run_step)
        _deviations(place, min(length, total - run * length), step, n, mean, rest, var)
    for i in range(n):
        # The first pass's rounding: what is left of the mean about itself.
        error = rest[i] / total
        mean[i] += error
        var[i] = max(var[i] / total - error * error, 0.0)


@njit(error_model="numpy", boundscheck=False, fastmath={"reassoc", "contract"})
def _products(a, b, count, n, first, second):
    """Add up a, and ``a * b``, both ``[count] [n]``."""
    if n == 1:
        sum1, sum2 = 0.0, 0.0
        for i in range(count):
            sum1 += a[i]
            sum2 += np.float64(a[i]) * np.float64(b[i])
        first[0] += sum1
        second[0] += sum2
        return
    for r in range(count):
        p, q = ahead(a, r * n), ahead(b, r * n)
        for i in range(n):
            first[i] += p[i]
            second[i] += np.float64(p[i]) * np.float64(q[i])


@njit(error_model="numpy", boundscheck=False, fastmath={"contract"})
def _normalise(real, kind, x, residual, y, count, step, n, high, low, scale, shift):
    if n > 1:
        for r in range(count):
            row, to = ahead(x, r * step), ahead(y, r * step)
            if given(residual):
                beside = ahead(residual, r * step)
                for i in range(n):
                    z = (row[i] - high[i] - low[i]) * scale[i] + shift[i] + beside[i]
                    to[i] = _activate(real, kind, z)
            else:
                for i in range(n):
                    to[i] = _activate(real, kind, (row[i] - high[i] - low[i]) * scale[i] + shift[i])
        return
    m, rest, g, b = high[0], low[0], scale[0], shift[0]
    if given(residual):
        for i in range(count):
            z = (x[i * step] - m - rest) * g + b + residual[i * step]
            y[i * step] = _activate(real, kind, z)
    else:
        for i in range(count):
            y[i * step] = _activate(real, kind, (x[i * step] - m - rest) * g + b)


@njit(error_model="numpy", boundscheck=False, fastmath={"contract"})
def _back(
    real, kind, from_result, grad_y, x, beside, count, step, n, high, low, scale, shift, grad_z, apart
):  # fmt: skip
    """Into scratch, ``[count] [n]``: the gradient of the activation's input z, and ``x - mean``.

    `beside` is the residual, or none; with `from_result` it is y.
    """
    if n > 1:
        for r in range(count):
            row, grad = ahead(x, r * step), ahead(grad_y, r * step)
            d, to = ahead(apart, r * n), ahead(grad_z, r * n)
            for i in range(n):
                d[i] = row[i] - high[i] - low[i]
            if from_result:
                y = ahead(beside, r * step)
                for i in range(n):
                    to[i] = grad[i] * _slope_of_result(real, kind, y[i])
            elif given(beside):
                added = ahead(beside, r * step)
                for i in range(n):
                    to[i] = grad[i] * _slope(real, kind, d[i] * scale[i] + shift[i] + added[i])
            else:
                for i in range(n):
                    to[i] = grad[i] * _slope(real, kind, d[i] * scale[i] + shift[i])
        return
    m, rest, g, b = high[0], low[0], scale[0], shift[0]
    if from_result:
        for i in range(count):
            apart[i] = x[i * step] - m - rest
            grad_z[i] = grad_y[i * step] * _slope_of_result(real, kind, beside[i * step])
    elif given(beside):
        for i in range(count):
            e = x[i * step] - m - rest
            apart[i] = e
            grad_z[i] = grad_y[i * step] * _slope(real, kind, e * g + b + beside[i * step])
    else:
        for i in range(count):
            e = x[i * step] - m - rest
            apart[i] = e
            grad_z[i] = grad_y[i * step] * _slope(real, kind, e * g + b)


@njit(error_model="numpy", boundscheck=False, fastmath={"contract"})
def _combine(grad_z, apart, to, count, step, n, factor, a, b):
    """``to = factor * (grad_z - a - apart * b)``."""
    if n > 1:
        for r in range(count):
            g, d, row = ahead(grad_z, r * n), ahead(apart, r * n), ahead(to, r * step)
            for i in range(n):
                row[i] = factor[i] * (g[i] - a[i] - d[i] * b[i])
        return
    f, first, second = factor[0], a[0], b[0]
    for i in range(count):
        to[i * step] = f * (grad_z[i] - first - apart[i] * second)


def _real(T: str) -> type:
    return np.float32 if T == "float32" else np.float64


@lru_cache(None)
def _statistics(T: str) -> Task:
    args = layout(f"{T}**3 int64*9")

    def batch_norm_statistics(address: int, index: int, scratch: int) -> None:
        """Mean and variance of some channels."""
        (
            x, means, variances, C, each, side, total, length, runs, run_step, step, channel_step,
        ) = unpack(address, args)  # fmt: skip
        mean = pointer(scratch, "float64")
        var, rest = ahead(mean, SIDE), ahead(mean, 2 * SIDE)
        for c0 in range(index * each, min(index * each + each, C), side):
            n = min(side, C - c0)
            place = ahead(x, c0 * channel_step)
            _moments(place, total, length, runs, run_step, step, n, mean, var, rest)
            for i in range(n):
                means[c0 + i], variances[c0 + i] = mean[i], var[i]

    return Task(batch_norm_statistics, args)


@lru_cache(None)
def _forward(T: str, kind: int, training: bool) -> Task:
    args = layout(f"{T}**9 int64*9 float64*2")
    real = _real(T)

    def batch_norm_forward(address: int, index: int, scratch: int) -> None:
        """Some channels of y; in training by their own statistics, which go to mean, rstd and averages."""
        (
            x, weight, bias, residual, running_mean, running_var, y, means, rstds,
            C, each, side, total, length, runs, run_step, step, channel_step, momentum, eps,
        ) = unpack(address, args)  # fmt: skip
        mean = pointer(scratch, "float64")
        var, rest = ahead(mean, SIDE), ahead(mean, 2 * SIDE)
        high = pointer(scratch + 24 * SIDE, T)
        low, scale, shift = ahead(high, SIDE), ahead(high, 2 * SIDE), ahead(high, 3 * SIDE)
        for c0 in range(index * each, min(index * each + each, C), side):
            n = min(side, C - c0)
            if training:
                place = ahead(x, c0 * channel_step)
                _moments(place, total, length, runs, run_step, step, n, mean, var, rest)
                for i in range(n):
                    c = c0 + i
                    means[c] = mean[i]
                    rstds[c] = 1 / math.sqrt(var[i] + eps)
                    if given(running_mean):
                        running_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean[i]
                    if given(running_var):
                        unbiased = var[i] * total / (total - 1)
                        running_var[c] = (1 - momentum) * running_var[c] + momentum * unbiased
            else:
                for i in range(n):
                    mean[i], var[i] = running_mean[c0 + i], running_var[c0 + i]
            for i in range(n):
                factor = 1 / math.sqrt(var[i] + eps)
                if given(weight):
                    factor *= weight[c0 + i]
                scale[i] = factor
                shift[i] = bias[c0 + i] if given(bias) else real(0)
                high[i] = mean[i]
                low[i] = mean[i] - high[i] if math.isfinite(mean[i]) else 0.0
            for run in range(runs):
                place = run * run_step + c0 * channel_step
                _normalise(
                    real, kind, ahead(x, place), ahead(residual, place) if given(residual) else residual,
                    ahead(y, place), min(length, total - run * length), step, n, high, low, scale, shift,
                )  # fmt: skip

    return Task(batch_norm_forward, args)


@lru_cache(None)
def _backward(T: str, kind: int, training: bool, from_result: bool) -> Task:
    args = layout(f"{T}**11 int64*9")
    real = _real(T)

    def batch_norm_backward(address: int, index: int, scratch: int) -> None:
        """Some channels of every gradient that is asked for."""
        (
            grad_y, x, weight, bias, beside, means, rstds, grad_x, grad_weight, grad_bias, grad_residual,
            C, each, side, total, length, runs, run_step, step, channel_step,
        ) = unpack(address, args)  # fmt: skip
        mean = pointer(scratch, "float64")
        sums, products = ahead(mean, SIDE), ahead(mean, 2 * SIDE)
        high = pointer(scratch + 24 * SIDE, T)
        low, scale, shift = ahead(high, SIDE), ahead(high, 2 * SIDE), ahead(high, 3 * SIDE)
        a, b = ahead(high, 4 * SIDE), ahead(high, 5 * SIDE)
        grad_z = ahead(high, 6 * SIDE)
        apart = ahead(grad_z, PIECE)
        for c0 in range(index * each, min(index * each + each, C), side):
            n = min(side, C - c0)
            far = False
            for i in range(n):
                mean[i], sums[i], products[i] = means[c0 + i], 0, 0
                # Far from zero the mean as it was kept is off by a good part of the deviation.
                far = far or training and abs(means[c0 + i]) * rstds[c0 + i] > 64
            if far:
                for run in range(runs):
                    place = ahead(x, run * run_step + c0 * channel_step)
                    _deviations(
                        place, min(length, total - run * length), step, n, mean, sums, products
                    )
            for i in range(n):
                high[i], low[i] = means[c0 + i], sums[i] / total
                sums[i], products[i] = 0, 0
                scale[i] = rstds[c0 + i] * weight[c0 + i] if given(weight) else rstds[c0 + i]
                shift[i] = bias[c0 + i] if given(bias) else real(0)
            # The first round sums, the second writes.
            for last in range(2):
                if last == 1:
                    for i in range(n):
                        if given(grad_bias):
                            grad_bias[c0 + i] = sums[i]
                        if given(grad_weight):
                            grad_weight[c0 + i] = products[i] * rstds[c0 + i]
                        a[i], b[i] = 0, 0
                        if training:
                            a[i] = sums[i] / total
                            b[i] = products[i] / total * rstds[c0 + i] * rstds[c0 + i]
                for run in range(runs):
                    steps = min(length, total - run * length)
                    for start in range(0, steps, PIECE // side):
                        count = min(PIECE // side, steps - start)
                        place = run * run_step + c0 * channel_step + start * step
                        _back(
                            real, kind, from_result, ahead(grad_y, place), ahead(x, place),
                            ahead(beside, place) if given(beside) else beside, count, step, n, high, low,
                            scale, shift, grad_z, apart,
                        )  # fmt: skip
                        if last == 0:
                            _products(grad_z, apart, count, n, sums, products)
                            continue
                        if given(grad_residual):
                            to = ahead(grad_residual, place)
                            for r in range(count):
                                for i in range(n):
                                    to[r * step + i] = grad_z[r * n + i]
                        if given(grad_x):
                            to = ahead(grad_x, place)
                            _combine(grad_z, apart, to, count, step, n, scale, a, b)

    return Task(batch_norm_backward, args)


# ---- operations -------------------------------------------------------------------------------------------


def _together(shape: NormShape, result: torch.Tensor | None) -> bool:
    """Whether to work on memory where channels are neighbours, as they are in `result`."""
    if shape.L == 1:
        return True
    return result is not None and result.movedim(1, -1).is_contiguous()


def _dense(t: torch.Tensor, together: bool) -> torch.Tensor:
    """`t` in a type that kernels read and in the order asked for, copied if need be."""
    t = native(t)
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if together else t.contiguous()


def _result(t: torch.Tensor | None, dtype: torch.dtype, together: bool) -> torch.Tensor | None:
    """Where kernels write what becomes `t`: `t` itself if its type and order allow it."""
    if t is None:
        return None
    view = t.movedim(1, -1) if together else t
    if t.dtype == dtype and view.is_contiguous():
        return t
    apart = torch.empty(view.shape, dtype=dtype)
    return apart.movedim(-1, 1) if together else apart


def _vector(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


def _deliver(*pairs: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
    """Copy each (computed, asked for) that is not one tensor."""
    for computed, t in pairs:
        if t is not None and computed is not None and computed is not t:
            t.copy_(computed)


def _addresses(*tensors: torch.Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


@lru_cache(512)
def _sizes(shape: NormShape, together: bool) -> tuple[tuple[int, ...], int, float]:
    """Arguments that both kernels have, tasks to run, and an estimate of all their cycles."""
    C, total = shape.C, shape.count
    if together:
        length = PIECE // SIDE
        runs = -(-total // length)
        return (
            (C, SIDE, SIDE, total, length, runs, length * C, C, 1),
            -(-C // SIDE),
            4.0 * C * total,
        )
    each = max(1, min(C // 16, 20_000 // (2 * total)))
    L = shape.L
    return (C, each, 1, total, L, shape.N, C * L, 1, L), -(-C // each), 2.0 * C * total


def batch_norm_stats(
    shape: NormShape, x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor
) -> None:
    """Mean and biased variance of every channel."""
    together = _together(shape, x)
    x = _dense(x, together)
    sizes, count, work = _sizes(shape, together)
    _statistics(NAME[x.dtype]).run(
        count, work, *_addresses(x, mean, var), *sizes, scratch_bytes=24 * SIDE
    )


def batch_norm_train(
    shape: NormShape, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    residual: torch.Tensor | None, running_mean: torch.Tensor | None, running_var: torch.Tensor | None,
    momentum: float, eps: float, activation: str, y: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
) -> None:  # fmt: skip
    """y by the batch's own statistics, which go to `mean`, `rstd` and, weighted by `momentum`, into the
    running ones (the variance there is the unbiased one)."""
    together = _together(shape, y)
    x = _dense(x, together)
    residual = None if residual is None else _dense(residual, together)
    dtype = x.dtype
    weight, bias = _vector(weight, dtype), _vector(bias, dtype)
    averages = _vector(running_mean, dtype), _vector(running_var, dtype)
    results = _result(y, dtype, together), _vector(mean, dtype), _vector(rstd, dtype)
    sizes, count, work = _sizes(shape, together)
    _forward(NAME[dtype], ACTIVATIONS.index(activation), True).run(
        count, work, *_addresses(x, weight, bias, residual, *averages, *results), *sizes, momentum, eps,
        scratch_bytes=(24 + 4 * 8) * SIDE,
    )  # fmt: skip
    _deliver(*zip((*averages, *results), (running_mean, running_var, y, mean, rstd), strict=True))


def batch_norm_infer(
    shape: NormShape, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    residual: torch.Tensor | None, running_mean: torch.Tensor, running_var: torch.Tensor, eps: float,
    activation: str, y: torch.Tensor,
) -> None:  # fmt: skip
    """y by the running statistics."""
    together = _together(shape, y)
    x = _dense(x, together)
    residual = None if residual is None else _dense(residual, together)
    dtype = x.dtype
    vectors = [_vector(t, dtype) for t in (weight, bias, running_mean, running_var)]
    result = _result(y, dtype, together)
    sizes, count, work = _sizes(shape, together)
    _forward(NAME[dtype], ACTIVATIONS.index(activation), False).run(
        count, work, *_addresses(x, *vectors[:2], residual, *vectors[2:], result, None, None), *sizes, 0.0,
        eps, scratch_bytes=(24 + 4 * 8) * SIDE,
    )  # fmt: skip
    _deliver((result, y))


def batch_norm_bwd(
    shape: NormShape, grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
    bias: torch.Tensor | None, residual: torch.Tensor | None, y: torch.Tensor | None, mean: torch.Tensor,
    rstd: torch.Tensor, activation: str, training: bool, grad_x: torch.Tensor | None,
    grad_weight: torch.Tensor | None, grad_bias: torch.Tensor | None, grad_residual: torch.Tensor | None,
) -> None:  # fmt: skip
    """Every gradient that is asked for. With `training`, mean and rstd are x's own, and x's gradient flows
    through them too."""
    together = _together(shape, next((t for t in (grad_x, grad_residual) if t is not None), x))
    grad_y, x = _dense(grad_y, together), _dense(x, together)
    from_result = y is not None and activation != "none"
    beside = y if from_result else residual
    beside = None if beside is None else _dense(beside, together)
    dtype = x.dtype
    vectors = [_vector(t, dtype) for t in (weight, bias)]
    statistics = [_vector(t, dtype) for t in (mean, rstd)]
    asked = grad_x, grad_weight, grad_bias, grad_residual
    results = (
        _result(grad_x, dtype, together), _vector(grad_weight, dtype), _vector(grad_bias, dtype),
        _result(grad_residual, dtype, together),
    )  # fmt: skip
    sizes, count, work = _sizes(shape, together)
    _backward(NAME[dtype], ACTIVATIONS.index(activation), training, from_result).run(
        count, 2 * work, *_addresses(grad_y, x, *vectors, beside, *statistics, *results), *sizes,
        scratch_bytes=(24 + 6 * 8) * SIDE + 16 * PIECE,
    )  # fmt: skip
    _deliver(*zip(results, asked, strict=True))
