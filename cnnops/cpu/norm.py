"""Batch normalisation on the CPU: training forward, inference, the backward of both, and statistics alone.

Each channel ``y = act(gamma * (x - mean) * rstd + beta + residual)``. Statistics come from one pass over x,
about a number near the mean: float32 tells differences and their squares, float64 their sums, so that they
survive a mean far larger than the deviation. Where the number turns out far from the mean, a second pass in
float64 goes about the first's mean. A mean that float32 cannot hold is carried as ``high + low``. The
backward computes the activation's input anew from x, or is given y in place of the residual, where y tells
the activation's derivative.

Row-major memory (`planes`): a task does some channels, each from its first element to its last, so that a
channel's second pass finds it in the cache. Channels-last memory (`columns`): tasks do some rows of all
channels, in phases that wait for each other; the rows' sums are added up in their order. Rows are short where
channels are few: the fewest that fill whole vectors lie side by side and are done as one. A later pass begins
with what the one before read last.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from cnnops.cpu import norm_vectors, simd, vectors
from cnnops.cpu.compiler import routine
from cnnops.cpu.norm_base import (
    FAR,
    beyond,
    clear,
    computed,
    deliver,
    guess,
    is_laid,
    is_settled,
    kind_of,
    laid,
    rest_of,
    result_like,
    vector_of,
)
from cnnops.cpu.phases import done, wait
from cnnops.cpu.task import (
    NAME,
    Shared,
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
from cnnops.shapes import NormShape

PIECE = 65_536
"""Elements of a channels-last task: what starting it costs is little beside."""


# ---- kernels ----------------------------------------------------------------------------------------------


@routine
def _plane_moments(V, kind, exact, x, images, pitch, length, about, sums):
    """Sums of ``x - about`` and of their squares over a channel's planes; `sums` is scratch for two."""
    clear(sums, 2)
    longest = norm_vectors.VECTORS * V
    together = max(1, longest // length)
    for image in range(0, images, together):
        for start in range(0, length, longest):
            norm_vectors.moments(
                V, kind, False, exact, ahead(x, image * pitch + start), min(together, images - image),
                pitch, min(longest, length - start), about, sums, ahead(sums, 1),
            )  # fmt: skip
    return sums[0], sums[1]


@routine
def _plane_products(
    V, kind, act, form, grad_y, x, beside, grad_z, grad_x, images, pitch, length, table, sums, past
):  # fmt: skip
    """As `_plane_moments`, of ``grad_z`` and of ``grad_z * (x - high)``: `norm_vectors.back_sums`."""
    clear(sums, 2)
    longest = norm_vectors.VECTORS * V
    together = max(1, longest // length)
    for image in range(0, images, together):
        for start in range(0, length, longest):
            at = image * pitch + start
            norm_vectors.back_sums(
                V, kind, act, form, False, ahead(grad_y, at), ahead(x, at), beyond(beside, at),
                beyond(grad_z, at), beyond(grad_x, at), min(together, images - image), pitch,
                min(longest, length - start), table, ahead(table, 1), ahead(table, 2), sums, ahead(sums, 1),
                past,
            )  # fmt: skip
    return sums[0], sums[1]


@routine
def _repeat(table, C, W):
    """A table of C channels, for rows of `W` elements: W // C rows of memory side by side."""
    for i in range(C, W):
        table[i] = table[i - C]


@routine
def _gather(partial, parts, room, C, W, c0, n, first, second):
    """The sums of n channels from c0 on: of all parts, in their order, and of the rows side by side."""
    clear(first, n)
    clear(second, n)
    for part in range(parts):
        for start in range(c0, W, C):
            some = ahead(partial, 2 * part * room + start)
            for i in range(n):
                first[i] += some[i]
            for i in range(n):
                second[i] += some[room + i]


@lru_cache(None)
def _planes_forward(kind: str, act: int, V: int) -> Task:
    T = computed(kind)
    args = layout(f"{T}**4 int64*3 {T}**2 int64*6 float64*2")

    def batch_norm_planes_forward(address: int, index: int, scratch: int) -> None:
        """Some channels of y; in training by their own statistics, which go to mean, rstd and averages.
        Without y: mean and variance alone."""
        (
            weight, bias, running_mean, running_var, x_, residual_, y_, means, rstds,
            C, each, N, L, past, training, momentum, eps,
        ) = unpack(address, args)  # fmt: skip
        x, y = vectors.elements(x_, kind), vectors.elements(y_, kind)
        residual = vectors.elements(residual_, kind)
        table, about = pointer(scratch, T), pointer(scratch + 32, "float64")
        sums = pointer(scratch + 64, "float64")
        total = N * L
        for c in range(index * each, min(index * each + each, C)):
            place = ahead(x, c * L)
            if training:
                # About a number near the mean, float32 tells differences and their squares well enough.
                table[0] = norm_vectors.near(V, kind, place, N // 2 * C * L, min(L, V))
                first, second = _plane_moments(V, kind, False, place, N, C * L, L, table, sums)
                off = first / total
                mean, var = table[0] + off, second / total - off * off
                if not is_settled(off, var):
                    about[0] = mean if math.isfinite(mean) else 0.0
                    first, second = _plane_moments(V, kind, True, place, N, C * L, L, about, sums)
                    off = first / total
                    mean, var = about[0] + off, second / total - off * off
                    var = 0.0 if var < 0 else var
                means[c] = mean
                rstds[c] = 1 / math.sqrt(var + eps) if y_ != 0 else var
                if given(running_mean):
                    running_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean
                if given(running_var):
                    unbiased = var * total / (total - 1)
                    running_var[c] = (1 - momentum) * running_var[c] + momentum * unbiased
                if y_ == 0:
                    continue
            else:
                mean, var = np.float64(running_mean[c]), np.float64(running_var[c])
            factor = 1 / math.sqrt(var + eps)
            if given(weight):
                factor *= weight[c]
            addend = np.float64(bias[c]) if given(bias) else 0.0
            table[0], table[1] = mean, factor
            table[2] = addend - rest_of(mean, table[0]) * factor
            # From the last plane on: it is the likeliest still to be in the cache.
            at = (N - 1) * C * L + c * L
            norm_vectors.normalise(
                V, kind, act, False, ahead(x, at), beyond(residual, at), ahead(y, at), N, -C * L, L, table,
                ahead(table, 1), ahead(table, 2), past,
            )  # fmt: skip

    return Task(batch_norm_planes_forward, args)


@lru_cache(None)
def _columns_forward(kind: str, act: int, V: int) -> Task:
    T = computed(kind)
    args = layout(f"int64 {T}**4 int64*3 {T}**2 int64*9 float64*2")

    def batch_norm_columns_forward(address: int, index: int, scratch: int) -> None:
        """In three phases: sums of some rows, statistics and tables of some channels, y of some rows.
        Without y: mean and variance alone."""
        (
            _, weight, bias, running_mean, running_var, x_, residual_, y_, means, rstds,
            work, C, W, total, parts, blocks, pieces, past, training, momentum, eps,
        ) = unpack(address, args)  # fmt: skip
        x, y = vectors.elements(x_, kind), vectors.elements(y_, kind)
        residual = vectors.elements(residual_, kind)
        room, side = (W + V - 1) // V * V, W // C
        rows = total // side
        rest = (total - rows * side) * C
        high = pointer(work, T)
        scale, shift = ahead(high, room), ahead(high, 2 * room)
        partial = pointer(work + 24 * room, "float64")
        if index < parts:
            first = ahead(partial, 2 * room * index)
            second = ahead(first, room)
            clear(first, 2 * room)
            near = pointer(scratch, T)
            guess(V, kind, x, C, total, C, near)
            _repeat(near, C, W)
            clear(ahead(near, W), room - W)
            start, stop = rows * index // parts, rows * (index + 1) // parts
            norm_vectors.moments(
                V, kind, True, False, ahead(x, start * W), stop - start, W, W, near, first, second
            )
            if index == parts - 1 and rest > 0:
                norm_vectors.moments(
                    V, kind, True, False, ahead(x, rows * W), 1, W, rest, near, first, second
                )
            done(address)
            return
        index -= parts
        if index < blocks:
            wait(address, parts)
            c0, c1 = C * index // blocks, C * (index + 1) // blocks
            n = c1 - c0
            first = pointer(scratch, "float64")
            second, about = ahead(first, n + V), ahead(first, 2 * (n + V))
            near = pointer(scratch + 24 * (n + V), T)
            if training:
                guess(V, kind, ahead(x, c0), C, total, n, near)
                _gather(partial, parts, room, C, W, c0, n, first, second)
                settled = True
                for i in range(n):
                    off = first[i] / total
                    about[i] = near[i] + off
                    second[i] = second[i] / total - off * off
                    settled = settled and is_settled(off, second[i])
                if not settled:
                    for i in range(n):
                        if not math.isfinite(about[i]):
                            about[i] = 0
                    clear(first, n)
                    clear(second, n)
                    norm_vectors.moments(
                        V, kind, True, True, ahead(x, c0), total, C, n, about, first, second
                    )
                    for i in range(n):
                        off = first[i] / total
                        about[i] += off
                        var = second[i] / total - off * off
                        second[i] = 0.0 if var < 0 else var
            for i in range(n):
                c = c0 + i
                if training:
                    mean, var = about[i], second[i]
                    means[c] = mean
                    rstds[c] = 1 / math.sqrt(var + eps) if y_ != 0 else var
                    if given(running_mean):
                        running_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean
                    if given(running_var):
                        unbiased = var * total / (total - 1)
                        running_var[c] = (1 - momentum) * running_var[c] + momentum * unbiased
                else:
                    mean, var = np.float64(running_mean[c]), np.float64(running_var[c])
                factor = 1 / math.sqrt(var + eps)
                if given(weight):
                    factor *= weight[c]
                addend = np.float64(bias[c]) if given(bias) else 0.0
                high[c], scale[c] = mean, factor
                shift[c] = addend - rest_of(mean, high[c]) * factor
                for j in range(c + C, W, C):
                    high[j], scale[j], shift[j] = high[c], scale[c], shift[c]
            if index == 0:
                for table in (high, scale, shift):
                    clear(ahead(table, W), room - W)
            done(address)
            return
        wait(address, parts + blocks)
        # From the last rows on: they are the likeliest still to be in the cache.
        piece = pieces - 1 - (index - blocks)
        start, stop = rows * piece // pieces, rows * (piece + 1) // pieces
        if piece == pieces - 1 and rest > 0:
            at = rows * W
            norm_vectors.normalise(
                V, kind, act, True, ahead(x, at), beyond(residual, at), ahead(y, at), 1, W, rest, high,
                scale, shift, past,
            )  # fmt: skip
        at = start * W
        norm_vectors.normalise(
            V, kind, act, True, ahead(x, at), beyond(residual, at), ahead(y, at), stop - start, W, W, high,
            scale, shift, past,
        )  # fmt: skip

    return Task(batch_norm_columns_forward, args, in_order=True)


@lru_cache(None)
def _planes_backward(kind: str, act: int, form: int, V: int) -> Task:
    T = computed(kind)
    args = layout(f"int64*5 {T}**6 int64*6")
    ready = norm_vectors.READY

    def batch_norm_planes_backward(address: int, index: int, scratch: int) -> None:
        """Some channels of every gradient that is asked for. Where grad_z is grad_x's own memory, it waits
        there until grad_x is made of it."""
        (
            grad_y_, x_, beside_, grad_x_, grad_z_, weight, bias, means, rstds, grad_weight, grad_bias,
            C, each, N, L, past, training,
        ) = unpack(address, args)  # fmt: skip
        grad_y, x = vectors.elements(grad_y_, kind), vectors.elements(x_, kind)
        beside = vectors.elements(beside_, kind)
        grad_x, grad_z = vectors.elements(grad_x_, kind), vectors.elements(grad_z_, kind)
        none = vectors.elements(0, kind)
        table, about = pointer(scratch, T), pointer(scratch + 64, "float64")
        sums = pointer(scratch + 128, "float64")
        total, waits = N * L, grad_z_ != 0 and grad_z_ == grad_x_
        for c in range(index * each, min(index * each + each, C)):
            at, rstd, low = c * L, np.float64(rstds[c]), 0.0
            if training and abs(means[c]) * rstd > FAR:
                about[0] = means[c]
                first, _ = _plane_moments(V, kind, True, ahead(x, at), N, C * L, L, about, sums)
                low = first / total
            scale = rstd * weight[c] if given(weight) else rstd
            addend = np.float64(bias[c]) if given(bias) else 0.0
            table[0], table[1], table[2] = means[c], scale, addend - low * scale
            first, second = _plane_products(
                V, kind, act, form, ahead(grad_y, at), ahead(x, at), beyond(beside, at),
                beyond(grad_z, at) if waits or not training else none,
                none if training else beyond(grad_x, at), N, C * L, L, table, sums, past,
            )  # fmt: skip
            second -= low * first
            if given(grad_bias):
                grad_bias[c] = first
            if given(grad_weight):
                grad_weight[c] = second * rstd
            if not training or (grad_x_ == 0 and grad_z_ == 0):
                continue
            b = second / total * rstd * rstd * scale
            table[3], table[4] = first / total * scale - low * b, b
            at += (N - 1) * C * L  # from the last plane on, which may still be in the cache
            if waits:
                norm_vectors.back_combine(
                    V, kind, act, ready, False, ahead(grad_z, at), ahead(x, at), none, none,
                    ahead(grad_x, at), N, -C * L, L, table, ahead(table, 1), ahead(table, 2),
                    ahead(table, 3), ahead(table, 4), past,
                )  # fmt: skip
            else:
                norm_vectors.back_combine(
                    V, kind, act, form, False, ahead(grad_y, at), ahead(x, at), beyond(beside, at),
                    beyond(grad_z, at), beyond(grad_x, at), N, -C * L, L, table, ahead(table, 1),
                    ahead(table, 2), ahead(table, 3), ahead(table, 4), past,
                )  # fmt: skip

    return Task(batch_norm_planes_backward, args)


@lru_cache(None)
def _columns_backward(kind: str, act: int, form: int, V: int) -> Task:
    T = computed(kind)
    args = layout(f"int64*6 {T}**6 int64*9")
    ready = norm_vectors.READY

    def batch_norm_columns_backward(address: int, index: int, scratch: int) -> None:
        """In four phases: tables of some channels, sums of some rows, what follows from all sums for some
        channels, grad_x of some rows. In evaluation the sums' phase writes grad_x, too. grad_z may wait in
        grad_x's memory."""
        (
            _, grad_y_, x_, beside_, grad_x_, grad_z_, weight, bias, means, rstds, grad_weight, grad_bias,
            work, C, W, total, parts, blocks, pieces, past, training,
        ) = unpack(address, args)  # fmt: skip
        grad_y, x = vectors.elements(grad_y_, kind), vectors.elements(x_, kind)
        beside = vectors.elements(beside_, kind)
        grad_x, grad_z = vectors.elements(grad_x_, kind), vectors.elements(grad_z_, kind)
        none = vectors.elements(0, kind)
        room, side = (W + V - 1) // V * V, W // C
        rows = total // side
        rest = (total - rows * side) * C
        high = pointer(work, T)
        scale, shift = ahead(high, room), ahead(high, 2 * room)
        a, b = ahead(high, 3 * room), ahead(high, 4 * room)
        lows = pointer(work + 40 * room, "float64")
        partial = ahead(lows, room)
        if index < blocks:
            c0, c1 = C * index // blocks, C * (index + 1) // blocks
            n, far = c1 - c0, False
            for i in range(n):
                lows[c0 + i] = 0
                far = far or training and abs(means[c0 + i]) * rstds[c0 + i] > FAR
            if far:
                first = pointer(scratch, "float64")
                second, about = ahead(first, n + V), ahead(first, 2 * (n + V))
                clear(first, n)
                clear(second, n)
                for i in range(n):
                    about[i] = means[c0 + i]
                norm_vectors.moments(
                    V, kind, True, True, ahead(x, c0), total, C, n, about, first, second
                )
                for i in range(n):
                    lows[c0 + i] = first[i] / total
            for c in range(c0, c1):
                factor = np.float64(rstds[c])
                if given(weight):
                    factor *= weight[c]
                addend = np.float64(bias[c]) if given(bias) else 0.0
                for j in range(c, W, C):
                    high[j], scale[j], shift[j] = means[c], factor, addend - lows[c] * factor
            if index == 0:
                for table in (high, scale, shift, a, b):
                    clear(ahead(table, W), room - W)
            done(address)
            return
        index -= blocks
        if index < parts:
            wait(address, blocks)
            first = ahead(partial, 2 * room * index)
            second = ahead(first, room)
            clear(first, 2 * room)
            start, stop = rows * index // parts, rows * (index + 1) // parts
            direct = none if training else grad_x
            at = start * W
            norm_vectors.back_sums(
                V, kind, act, form, True, ahead(grad_y, at), ahead(x, at), beyond(beside, at),
                beyond(grad_z, at), beyond(direct, at), stop - start, W, W, high, scale, shift, first, second,
                past,
            )  # fmt: skip
            if index == parts - 1 and rest > 0:
                at = rows * W
                norm_vectors.back_sums(
                    V, kind, act, form, True, ahead(grad_y, at), ahead(x, at), beyond(beside, at),
                    beyond(grad_z, at), beyond(direct, at), 1, W, rest, high, scale, shift, first, second,
                    past,
                )  # fmt: skip
            done(address)
            return
        index -= parts
        if index < blocks:
            wait(address, blocks + parts)
            c0, c1 = C * index // blocks, C * (index + 1) // blocks
            n = c1 - c0
            first = pointer(scratch, "float64")
            second = ahead(first, n)
            _gather(partial, parts, room, C, W, c0, n, first, second)
            for i in range(n):
                c = c0 + i
                rstd = np.float64(rstds[c])
                product = second[i] - lows[c] * first[i]
                if given(grad_bias):
                    grad_bias[c] = first[i]
                if given(grad_weight):
                    grad_weight[c] = product * rstd
                slope = product / total * rstd * rstd * scale[c]
                constant = first[i] / total * scale[c] - lows[c] * slope
                for j in range(c, W, C):
                    a[j], b[j] = constant, slope
            done(address)
            return
        wait(address, 2 * blocks + parts)
        piece = pieces - 1 - (index - blocks)
        start, stop = rows * piece // pieces, rows * (piece + 1) // pieces
        for last in range(2 if piece == pieces - 1 and rest > 0 else 1):
            at, lines, count = start * W, stop - start, W
            if last == 1:
                at, lines, count = rows * W, 1, rest
            if grad_z_ != 0:
                norm_vectors.back_combine(
                    V, kind, act, ready, True, ahead(grad_z, at), ahead(x, at), none, none, ahead(grad_x, at),
                    lines, W, count, high, scale, shift, a, b, past,
                )  # fmt: skip
            else:
                norm_vectors.back_combine(
                    V, kind, act, form, True, ahead(grad_y, at), ahead(x, at), beyond(beside, at),
                    none, ahead(grad_x, at), lines, W, count, high, scale, shift, a, b, past,
                )  # fmt: skip

    return Task(batch_norm_columns_backward, args, in_order=True)


# ---- operations -------------------------------------------------------------------------------------------


def _together(shape: NormShape, result: torch.Tensor | None) -> bool:
    """Whether to work on memory where channels are neighbours, as they are in `result`."""
    if shape.L == 1:
        return True
    return result is not None and result.stride(1) == 1 and is_laid(result, True)


class _Columns(NamedTuple):
    """How channels-last memory is done: sizes that the kernels take, tasks of each phase, memory for sums."""

    sizes: tuple[int, int, int]
    parts: int
    blocks: int
    pieces: int
    table: int

    def bytes(self, parts: int) -> int:
        """Tables and the sums of some parts."""
        return (48 + 16 * parts) * self.table

    @property
    def scratch(self) -> int:
        return 32 * self.table


@lru_cache(512)
def _columns(shape: NormShape, lanes: int) -> _Columns:
    C, total = shape.C, shape.count
    # So many rows side by side fill whole vectors.
    side = lanes // math.gcd(C, lanes)
    if side * C > 1024 or side * 4 > total:
        side = 1
    parts = max(1, min(C * total // PIECE, 64, total // (8 * side)))
    pieces = max(1, min(2 * C * total // PIECE, 256))
    table = -(-side * C // lanes) * lanes
    return _Columns((C, side * C, total), parts, max(1, min(C // 64, 8)), pieces, table)


@lru_cache(512)
def _planes(shape: NormShape) -> tuple[tuple[int, int, int, int], int]:
    """Sizes of row-major memory that the kernels take, and tasks."""
    C = shape.C
    each = max(1, min(C // 16, PIECE // 4 // shape.count))
    return (C, each, shape.N, shape.L), -(-C // each)


def _forward(
    shape: NormShape, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    residual: torch.Tensor | None, averages: tuple[torch.Tensor | None, ...], y: torch.Tensor | None,
    statistics: tuple[torch.Tensor | None, ...], momentum: float, eps: float, activation: str, training: bool,
) -> None:  # fmt: skip
    """y, or with no y the statistics alone: mean and variance then, not its root's inverse."""
    together = _together(shape, x if y is None else y)
    x = laid(x, together)
    residual = None if residual is None else laid(residual, together)
    kind, dtype = kind_of(x)
    tensors = [vector_of(t, dtype) for t in (weight, bias, *averages)]
    found = [vector_of(t, dtype) for t in statistics]
    result = result_like(y, x.dtype, together)
    act, V = ACTIVATIONS.index(activation), simd.lanes(NAME[dtype])
    ends = *tensors, x, residual, result, *found
    past = y is not None and x.nbytes >= simd.PAST
    work = 2.0 * shape.C * shape.count
    if together:
        plan = _columns(shape, V)
        parts, pieces = plan.parts if training else 0, 0 if y is None else plan.pieces
        memory = Shared(plan.bytes(parts))
        _columns_forward(kind, act, V).run(
            parts + plan.blocks + pieces, work, 0, *ends, memory, *plan.sizes, parts,
            plan.blocks, pieces, past, training, momentum, eps, scratch_bytes=plan.scratch + 32 * V,
        )  # fmt: skip
    else:
        sizes, count = _planes(shape)
        _planes_forward(kind, act, V).run(
            count, work, *ends, *sizes, past, training, momentum, eps, scratch_bytes=64 + 16 * V,
        )  # fmt: skip
    if training:
        deliver(*zip(tensors[2:], averages, strict=True), *zip(found, statistics, strict=True))
    deliver((result, y))


def batch_norm_stats(
    shape: NormShape, x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor
) -> None:
    """Mean and biased variance of every channel."""
    nothing = None, None
    _forward(shape, x, None, None, None, nothing, None, (mean, var), 0.0, 0.0, "none", True)


def batch_norm_train(
    shape: NormShape, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    residual: torch.Tensor | None, running_mean: torch.Tensor | None, running_var: torch.Tensor | None,
    momentum: float, eps: float, activation: str, y: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
) -> None:  # fmt: skip
    """y by the batch's own statistics, which go to `mean`, `rstd` and, weighted by `momentum`, into the
    running ones (the variance there is the unbiased one)."""
    averages, statistics = (running_mean, running_var), (mean, rstd)
    _forward(
        shape, x, weight, bias, residual, averages, y, statistics, momentum, eps, activation, True
    )


def batch_norm_infer(
    shape: NormShape, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    residual: torch.Tensor | None, running_mean: torch.Tensor, running_var: torch.Tensor, eps: float,
    activation: str, y: torch.Tensor,
) -> None:  # fmt: skip
    """y by the running statistics."""
    averages, nothing = (running_mean, running_var), (None, None)
    _forward(shape, x, weight, bias, residual, averages, y, nothing, 0.0, eps, activation, False)


def batch_norm_bwd(
    shape: NormShape, grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
    bias: torch.Tensor | None, residual: torch.Tensor | None, y: torch.Tensor | None, mean: torch.Tensor,
    rstd: torch.Tensor, activation: str, training: bool, grad_x: torch.Tensor | None,
    grad_weight: torch.Tensor | None, grad_bias: torch.Tensor | None, grad_residual: torch.Tensor | None,
) -> None:  # fmt: skip
    """Every gradient that is asked for. With `training`, mean and rstd are x's own, and x's gradient flows
    through them too."""
    together = _together(shape, next((t for t in (grad_x, grad_residual) if t is not None), x))
    grad_y, x = laid(grad_y, together), laid(x, together)
    form, beside = norm_vectors.NONE, None
    if activation != "none" and y is not None:
        form, beside = norm_vectors.RESULT, laid(y, together)
    elif activation != "none" and residual is not None:
        form, beside = norm_vectors.RESIDUAL, laid(residual, together)
    kind, dtype = kind_of(x)
    given = [vector_of(t, dtype) for t in (weight, bias, mean, rstd)]
    asked = grad_x, grad_residual, grad_weight, grad_bias
    results = [
        *(result_like(t, x.dtype, together) for t in asked[:2]),
        *(vector_of(t, dtype) for t in asked[2:]),
    ]
    act, V = ACTIVATIONS.index(activation), simd.lanes(NAME[dtype])
    to_x, to_z = results[:2]
    waits = training and to_z is None and norm_vectors.may_wait(kind, activation, form)
    ends = grad_y, x, beside, to_x, to_x if waits else to_z, *given, *results[2:]
    past = x.nbytes >= simd.PAST and not waits
    work = 3.0 * shape.C * shape.count
    if together:
        plan = _columns(shape, V)
        pieces = plan.pieces if training and grad_x is not None else 0
        memory = Shared(plan.bytes(plan.parts))
        _columns_backward(kind, act, form, V).run(
            2 * plan.blocks + plan.parts + pieces, work, 0, *ends, memory, *plan.sizes,
            plan.parts, plan.blocks, pieces, past, training, scratch_bytes=plan.scratch + 32 * V,
        )  # fmt: skip
    else:
        sizes, count = _planes(shape)
        _planes_backward(kind, act, form, V).run(
            count, work, *ends, *sizes, past, training, scratch_bytes=128 + 16 * V
        )
    deliver(*zip(results, asked, strict=True))
