"""Winograd's convolutions: 36 products where direct ones of 3x3 taps have 144 and those of 5x5 taps 100; 25
where direct ones of 3x3 taps with a stride of 2 have 36, and as many for the input gradient of these.

A tile of outputs comes from inputs d and, for each pair of channels, a filter g, as `winograd_axes` has it
for an axis: with a stride of 1 ``Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A``. The sum over channels is taken before Aᵀ
and A, so that ⊙ becomes matrix products ``M[m] += V[v] · U[u]``, of [tiles, C] and [C, K]:

    V = Bᵀ d B    [v] [stretch of C] [tile] [C]         a stretch is `STRETCH` channels
    U = G g Gᵀ    [panel] [u] [C] [K]                   a panel is as many filters as a tile of registers
    M             [m] [tile] [K]                        of one panel

All transforms go along channels with vectors, whatever the layout: planes of x and y, and half types, pass
through small channels-last float32 buffers. Tiles are numbered through all images, so small planes fill
blocks, too; what lies outside of x is read from a vector of zeros. With a dilation an image is several, of
every so many lines and columns. Tiles that reach beyond y do without some products: in a block those come
first that lie at the lower edge alone, then those at none, at the right edge, at both, so that the tiles of a
product lie side by side: 0.84 of the products for 7 by 7 and 14 by 14 outputs of 3 by 3 taps. The input
gradient is the same computation, of grad_y with the filters turned around and their channels exchanged, by
the scheme "spread" where there is a stride.

Either U or V is made before, for all tasks. Where U is small a task makes V of a block of tiles, and takes it
through all panels. Where U is large, as at the end of a network, or there are few tiles, all V is made first:
a task takes one panel for a block of tiles, and makes U a stretch of channels at a time where it is used, in
the second-level cache.

Accuracy. Channels are added up in stretches, the sums of which are added. Errors of float32 results from
normally distributed numbers, relative to the norm, and the largest, relative to the results' standard
deviation:

    C                              64                256               512
    3x3, these points        6.3e-7  5.3e-6    6.7e-7  4.3e-6    7.2e-7  4.9e-6
    3x3, 0, ±1, ±2, ∞        1.3e-6  1.6e-5    1.4e-6  1.3e-5    1.5e-6  1.4e-5
    3x3, direct convolution  2.7e-7  2.4e-6    2.8e-7  1.6e-6    2.9e-7  1.7e-6
    5x5, these points        7.0e-7  3.6e-6    7.5e-7  4.0e-6    8.0e-7  4.5e-6
    5x5, direct convolution  1.8e-7  1.0e-6    2.3e-7  1.5e-6    2.7e-7  2.2e-6
    3x3, stride 2            2.0e-7  1.2e-6    2.4e-7  1.4e-6    2.7e-7  1.6e-6
    direct, stride 2         1.8e-7  1.2e-6    2.0e-7  1.2e-6    2.2e-7  1.3e-6

Half types are computed in float32 and rounded once, at the end.

NaN and infinity. A number that is not finite may reach all outputs of each tile that reads it, where a
direct convolution has it in those that see it. Those always get it, an infinity perhaps as NaN, for it meets
itself with both signs. The transforms reach some ten times as far as their inputs: near the largest float32
they overflow.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cnnops.config import settings
from cnnops.cpu import simd, vectors
from cnnops.cpu.compiler import routine
from cnnops.cpu.conv_axes import up
from cnnops.cpu.task import Shared, Task, ahead, given, layout, pointer, unpack
from cnnops.cpu.winograd_axes import (
    SCHEMES,
    Scheme,
    times,
    transform_filter,
    transform_input,
    transform_sums,
)
from cnnops.epilogue import ACTIVATIONS, NO_EPILOGUE, Epilogue
from cnnops.shapes import Axes, ConvShape, Direction

STRETCH = 64
"""Channels that are multiplied before the next ones: so many of a panel stay in the first-level cache. A
multiple of every number of lanes."""

PART = 16
"""Channels of U that a task makes where it is made for all."""

TERMS = 32
"""Products that are added up one after the other: a long sum of such sums rounds less."""

KINDS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""Types in memory. float64 is left to direct convolution, for those who ask for its digits."""

# ---- other work on vectors --------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def _multiply(
    typing_context, lanes, rows, width, a, a_pitch, b, count, c, c_pitch, accumulate, later, step
):  # fmt: skip
    """``C[m, v] (+)= sum_k A[m, k] * B[k, v]`` for m < rows, v < width * lanes, k < count.

    B's rows lie one behind another; C is overwritten where `accumulate` is 0, added to elsewhere. With each
    term a line of memory is asked for that is wanted `later`, the next one `step` values further.
    """
    L, M, V = lanes.literal_value, rows.literal_value, width.literal_value

    def generate(context, builder, signature, values):
        a, a_pitch, b, count, c, c_pitch, accumulate, later, step = values[3:]
        emit = simd.Emit(builder, ir.FloatType(), L)
        lines = [builder.gep(a, [times(builder, a_pitch, m)]) for m in range(M)]
        places = [
            builder.gep(c, [builder.add(times(builder, c_pitch, m), simd.int_constant(v * L))])
            for m in range(M)
            for v in range(V)
        ]
        loop = simd.Loop(builder, simd.int_constant(0), count, 1, [emit.zero()] * (M * V))
        k = loop.index
        row = builder.gep(b, [times(builder, k, V * L)])
        column = [emit.load(builder.gep(row, [simd.int_constant(v * L)])) for v in range(V)]
        emit.prefetch(builder.gep(later, [builder.mul(k, step)]), 2)
        sums = []
        for m in range(M):
            factor = simd.splat(builder, builder.load(builder.gep(lines[m], [k])), L)
            sums += [
                emit.multiply_add(factor, column[v], loop.carried[m * V + v]) for v in range(V)
            ]
        sums = loop.close(sums)
        former = builder.icmp_signed("!=", accumulate, simd.int_constant(0))
        with builder.if_else(former) as (more, fresh):
            with more:
                for value, place in zip(sums, places, strict=True):
                    emit.store(builder.fadd(emit.load(place), value), place)
            with fresh:
                for value, place in zip(sums, places, strict=True):
                    emit.store(value, place)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, rows, width, a, i64, b, i64, c, i64, i64, a, i64), generate


@intrinsic(prefer_literal=True)
def _turn(typing_context, lanes, kind, to, pitch, source, line, rows, count):
    """``to[i * pitch + n] = source[n * line + i]`` for n < rows <= lanes, i < count.

    Writes whole vectors, and as many of them as are a multiple of the lanes.
    """
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, pitch, source, line, rows, count = values[2:]
        emit = vectors.Vectors(builder, of, L)
        # Rows that are not there stand for the last one.
        last = builder.sub(rows, simd.int_constant(1))
        lines = []
        for n in map(simd.int_constant, range(L)):
            nearest = builder.select(builder.icmp_signed("<", n, last), n, last)
            lines.append(builder.gep(source, [builder.mul(nearest, line)]))

        def body(i, mask):
            block = [emit.read(builder.gep(place, [i]), mask) for place in lines]
            for n, value in enumerate(simd.turned(builder, block)):
                at = builder.mul(builder.add(i, simd.int_constant(n)), pitch)
                emit.store(value, builder.gep(to, [at]))

        emit.over(count, body)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, to, i64, source, i64, i64, i64), generate


def _over_rows(
    emit: vectors.Vectors,
    sums: ir.Value,
    strides: tuple[ir.Value, ...],
    sizes: list[ir.Value],
    update: Callable[[ir.Value, ir.Value, ir.Value | None], None],
) -> None:
    """``update(place, offset, mask)`` for every vector of `sums` and the offset of its place in y."""
    builder = emit.builder
    sums_line, sums_row, line, row = strides
    lines, rows, count = sizes
    zero = simd.int_constant(0)
    outer = simd.Loop(builder, zero, lines, 1, [])
    inner = simd.Loop(builder, zero, rows, 1, [])
    a, b = outer.index, inner.index
    here = builder.gep(sums, [builder.add(builder.mul(a, sums_line), builder.mul(b, sums_row))])
    there = builder.add(builder.mul(a, line), builder.mul(b, row))
    emit.over(count, lambda i, mask: update(builder.gep(here, [i]), builder.add(there, i), mask))
    inner.close([])
    outer.close([])


@intrinsic(prefer_literal=True)
def _add_rows(
    typing_context, lanes, kind, sums, sums_line, sums_row, y, line, row, lines, rows, count
):  # fmt: skip
    """``sums[a * sums_line + b * sums_row + i] += y[a * line + b * row + i]`` for a < lines, b < rows,
    i < count. Sums are read and written in whole vectors."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        sums, sums_line, sums_row, y, line, row, *sizes = values[2:]
        emit = vectors.Vectors(builder, of, L)

        def update(place, offset, mask):
            added = emit.read(builder.gep(y, [offset]), mask)
            emit.store(builder.fadd(emit.load(place), added), place)

        _over_rows(emit, sums, (sums_line, sums_row, line, row), sizes, update)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, sums, i64, i64, y, i64, i64, i64, i64, i64), generate


@intrinsic(prefer_literal=True)
def _store_rows(
    typing_context, lanes, kind, y, line, row, sums, sums_line, sums_row, lines, rows, count
):  # fmt: skip
    """``y[a * line + b * row + i] = sums[a * sums_line + b * sums_row + i]`` for a < lines, b < rows,
    i < count. Sums are read in whole vectors."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        y, line, row, sums, sums_line, sums_row, *sizes = values[2:]
        emit = vectors.Vectors(builder, of, L)

        def update(place, offset, mask):
            emit.write(emit.load(place), builder.gep(y, [offset]), mask)

        _over_rows(emit, sums, (sums_line, sums_row, line, row), sizes, update)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, y, i64, i64, sums, i64, i64, i64, i64, i64), generate


@intrinsic(prefer_literal=True)
def _scale(typing_context, lanes, sums, line, lines, count, scale, shift, scale_line, scale_step):
    """``sums[a * line + i] = scale * sums[a * line + i] + shift`` for a < lines, i < count, in whole vectors.

    Scale and shift are read at ``a * scale_line + i * scale_step``; with a step of 0 each is there `lanes`
    times.
    """
    L = lanes.literal_value

    def generate(context, builder, signature, values):
        sums, line, lines, count, scale, shift, scale_line, scale_step = values[1:]
        emit = simd.Emit(builder, ir.FloatType(), L)
        outer = simd.Loop(builder, simd.int_constant(0), lines, 1, [])
        start = builder.gep(sums, [builder.mul(outer.index, line)])
        inner = simd.Loop(builder, simd.int_constant(0), count, L, [])
        place = builder.gep(start, [inner.index])
        which = builder.add(
            builder.mul(outer.index, scale_line), builder.mul(inner.index, scale_step)
        )
        factor, addend = (emit.load(builder.gep(t, [which])) for t in (scale, shift))
        emit.store(emit.multiply_add(emit.load(place), factor, addend), place)
        inner.close([])
        outer.close([])
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, sums, i64, i64, i64, scale, shift, i64, i64), generate


@intrinsic(prefer_literal=True)
def _activate(typing_context, lanes, sums, line, lines, count, activation):
    """``sums[a * line + i] = act(sums[a * line + i])`` for a < lines, i < count, in whole vectors;
    `activation` is an index into `ACTIVATIONS`."""
    L = lanes.literal_value

    def generate(context, builder, signature, values):
        sums, line, lines, count, activation = values[1:]
        emit = simd.Emit(builder, ir.FloatType(), L)

        def loops(function):
            outer = simd.Loop(builder, simd.int_constant(0), lines, 1, [])
            start = builder.gep(sums, [builder.mul(outer.index, line)])
            inner = simd.Loop(builder, simd.int_constant(0), count, L, [])
            place = builder.gep(start, [inner.index])
            emit.store(function(emit.load(place)), place)
            inner.close([])
            outer.close([])

        none = simd.int_constant(ACTIVATIONS.index("none"))
        with builder.if_then(builder.icmp_signed("!=", activation, none)):
            simd.with_activation(emit, activation, loops)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, sums, i64, i64, i64, i64), generate


# ---- steps of a task --------------------------------------------------------------------------------------


@routine
def _filters(
    L, R, numbers, kind, to, plane, width, w, wk, wc, wt, turned, rows, first, count, taps
):
    """U of `rows` filters, at most a vector, for `count` channels from `first`: ``to [xi] [C] [width]``,
    `numbers` by `numbers` xi.

    The taps of a filter are `wt` apart in memory, read from the last one on where `turned`. One of wk, wc and
    wt is 1. `taps` is scratch, ``[C] [tap] [lanes]``.
    """
    one = R * R * L
    tap = -L if turned else L
    start = ahead(taps, one - L if turned else 0)
    for c0 in range(first, first + count, L):
        some = min(L, first + count - c0)
        here = ahead(w, c0 * wc)
        if wk == 1:
            for c in range(some):
                for t in range(R * R):
                    source = ahead(here, c * wc + t * wt)
                    vectors.widen(L, kind, ahead(taps, c * one + t * L), source, rows)
        else:
            # Neighbours in memory are channels; or taps, with those of the next channel behind them or not.
            turns, to_step, pitch, step, length = R * R, L, one, wt, some
            if wc == R * R and wt == 1:
                turns, to_step, pitch, step, length = 1, 0, L, 0, R * R * some
            elif wc != 1:
                turns, to_step, pitch, step, length = some, one, L, wc, R * R
            for i in range(turns):
                source = ahead(here, i * step)
                _turn(L, kind, ahead(taps, i * to_step), pitch, source, wk, rows, length)
        for c in range(some):
            at = ahead(to, (c0 - first + c) * width)
            transform_filter(L, R, numbers, at, plane, ahead(start, c * one), tap)


@routine
def _part(t, end, TH, TW):
    """The tiles from the t-th on that form a rectangle, all before `end`: image, rows, columns."""
    image = t // (TH * TW)
    row = t // TW % TH
    column = t % TW
    whole = min((end - t) // TW, TH - row)
    if column > 0 or whole == 0:
        return image, row, row + 1, column, min(TW, column + end - t)
    return image, row, row + whole, 0, TW


@routine
def _grid(image, sizes, strides):
    """One of the images that a dilation takes a batch apart into, each of every so many lines and columns:
    where it begins, its lines and columns, and how far it is from one to the next."""
    dilation_h, dilation_w, H, W = sizes
    xn, _, xh, xw = strides
    a, b = image // dilation_w % dilation_h, image % dilation_w
    return (
        image // (dilation_h * dilation_w) * xn + a * xh + b * xw,
        (H - a + dilation_h - 1) // dilation_h,
        (W - b + dilation_w - 1) // dilation_w,
        xh * dilation_h,
        xw * dilation_w,
    )


@routine
def _set_places(places, side, top, left, h0, w0, H, W, sh, sw, nothing):
    """Where the inputs of a tile lie: `side` by `side` from (top, left); (h0, w0) is at place 0."""
    for i in range(side):
        h = top + i
        row = ahead(places, side * i)
        if 0 <= h < H:
            line = (h - h0) * sh + (left - w0) * sw
            for j in range(side):
                row[j] = line + j * sw if 0 <= left + j < W else nothing
        else:
            for j in range(side):
                row[j] = nothing


@routine
def inputs(
    L, step, side, numbers, kind, to, plane, stretch, pitch, x, first, count, rows, C, sizes, strides, chunk,
    room,
):  # fmt: skip
    """V of `count` tiles from the `first` on, and zeros for `rows`, a first and the one behind the last:
    ``to [xi] [stretch of C] [row] [pitch]``, `numbers` by `numbers` xi. A tile is `side` by `side` places of
    x, the next one `step` further, but for the last ones, which begin earlier. With a dilation a tile is in
    one of the images that `_grid` tells of.

    `room` has the tiles' rows and the addresses of scratch: those places of each tile, zeros in place of a
    pixel, and the pixels that a rectangle of tiles reads, ``[h, w] [chunk]``. Channels-last float32 is read
    where it is, though, if whole vectors make up C. `chunk` channels are transformed at a time, a divisor of
    STRETCH.
    """
    dilation_h, dilation_w, H_all, W_all, TH, TW, pad_h, pad_w, early_h, early_w, itemsize = sizes
    xc = strides[1]
    slots, places_at, zeros_at, pixels_at = room
    places = pointer(places_at, "int64")
    zeros, pixels = pointer(zeros_at, "float32"), pointer(pixels_at, "float32")
    for c in range(max(C, chunk)):
        zeros[c] = 0
    straight = xc == 1 and itemsize == 4 and C % L == 0
    t = first
    while t < first + count:
        n, row, row_end, column, column_end = _part(t, first + count, TH, TW)
        origin, H, W, xh, xw = _grid(n, (dilation_h, dilation_w, H_all, W_all), strides)
        top, bottom = step * row - pad_h, step * (row_end - 1) + side - pad_h
        left, right = step * column - pad_w, step * (column_end - 1) + side - pad_w
        if row_end == TH:
            top, bottom = min(top, step * (TH - 1) - pad_h - early_h), bottom - early_h
        if column_end == TW:
            left, right = min(left, step * (TW - 1) - pad_w - early_w), right - early_w
        h0, w0 = max(top, 0), max(left, 0)
        h1, w1 = max(min(bottom, H), h0), max(min(right, W), w0)
        start = x + (origin + h0 * xh + w0 * xw) * itemsize
        line, pixel_step, source_at = (w1 - w0) * chunk, chunk, pixels_at
        if straight:
            line, pixel_step, source_at = xh, xw, start
        source = pointer(source_at, "float32")
        tiles = 0
        for i in range(row, row_end):
            h = step * i - pad_h - (early_h if i == TH - 1 else 0)
            for j in range(column, column_end):
                _set_places(
                    ahead(places, side * side * tiles), side, h,
                    step * j - pad_w - (early_w if j == TW - 1 else 0), h0, w0, H, W, line, pixel_step,
                    (zeros_at - source_at) // 4,
                )  # fmt: skip
                tiles += 1
        # Lines without gaps between them are one.
        lines, length = h1 - h0, w1 - w0
        if length * xw == xh:
            lines, length = 1, lines * length
        for c0 in range(0, C, chunk):
            some = min(chunk, C - c0)
            if not straight:
                for r in range(lines):
                    pixel = vectors.elements(start + (c0 * xc + r * xh) * itemsize, kind)
                    there = ahead(pixels, r * line)
                    if xc == 1:
                        for i in range(length):
                            vectors.widen(
                                L, kind, ahead(there, i * chunk), ahead(pixel, i * xw), some
                            )
                    else:
                        for c in range(0, some, L):
                            _turn(
                                L, kind, ahead(there, c), chunk, ahead(pixel, c * xc), xc,
                                min(L, some - c), length,
                            )  # fmt: skip
                some = (some + L - 1) // L * L
            for k in range(tiles):
                at = ahead(
                    to, c0 // STRETCH * stretch + slots[t - first + k] * pitch + c0 % STRETCH
                )
                here = ahead(source, c0 if straight else 0)
                more = straight and k + 1 < tiles
                transform_input(
                    L, side, numbers, at, plane, here, ahead(places, side * side * k), some, more
                )
        t += tiles
    for t in range(rows[0], rows[1]):
        for k in range(numbers * numbers):
            for c in range(C):
                to[k * plane + c // STRETCH * stretch + t * pitch + c % STRETCH] = 0


@routine
def _where(E, offsets, before, there, step, nowhere):
    """Where the outputs of a tile go along an axis, `step` from one to the next: those from `before` on, as
    many as are there, others `nowhere`."""
    for q in range(E):
        offsets[q] = (q - before) * step if 0 <= q - before < there else nowhere


@routine
def _kind(row, column, TH, TW, edge_h, edge_w):
    low, far = edge_h and row == TH - 1, edge_w and column == TW - 1
    if low:
        return 3 if far else 0
    return 2 if far else 1


@routine
def _next_tile(row, column, TH, TW):
    if column + 1 < TW:
        return row, column + 1
    return (row + 1 if row + 1 < TH else 0), 0


@routine
def arrange(slots, starts, first, start, count, tiles, total, TH, TW, edge_h, edge_w, origin):
    """Where tiles lie: ``origin + slots[i]`` is the row of tile ``start + i``, for i < count, of `total` ones
    from the `first` on, which are cut into blocks of so many `tiles`.

    A block's tiles are ordered, so that those that need a product lie side by side: those at the lower edge
    alone, at none, at the right edge alone, at both. Only those are at an edge that reach beyond it, which
    `edge_h` and `edge_w` say. ``starts`` gets the first row of each kind in the last block, and has room for
    as many counters.
    """
    for block in range(start // tiles, (start + count + tiles - 1) // tiles):
        begin, end = block * tiles, min((block + 1) * tiles, total)
        for k in range(8):
            starts[k] = 0
        row, column = (first + begin) // TW % TH, (first + begin) % TW
        for _ in range(begin, end):
            starts[4 + _kind(row, column, TH, TW, edge_h, edge_w)] += 1
            row, column = _next_tile(row, column, TH, TW)
        for k in range(3):
            starts[k + 1] = starts[k] + starts[4 + k]
        for k in range(4):
            starts[4 + k] = starts[k]
        row, column = (first + begin) // TW % TH, (first + begin) % TW
        for t in range(begin, end):
            k = 4 + _kind(row, column, TH, TW, edge_h, edge_w)
            if start <= t < start + count:
                slots[t - start] = begin + starts[k] - origin
            starts[k] += 1
            row, column = _next_tile(row, column, TH, TW)


@routine
def rows_of(starts, rows, needed_h, needed_w):
    """The rows, a first and the one behind the last, of the tiles that need a product, which those at the
    edges need or do not."""
    begin = 0 if needed_h else starts[1]
    end = (rows if needed_h else starts[3]) if needed_w else starts[2]
    return begin, end


@routine
def _even(begin, end, rows):
    """`begin` and `end`, or one row more of an even number."""
    if (end - begin) % 2 == 0:
        return begin, end
    return (begin, end + 1) if end < rows else (begin - 1, end)


@routine
def _outputs(
    L, numbers, E, kind, y, residual, sums, plane, pitch, first, count, k0, k1, scale, shift, activation,
    sizes, strides, room,
):  # fmt: skip
    """Channels k0 to k1 of `count` tiles from the `first` on, of E by E outputs each, from sums
    ``[xi] [tile] [pitch]``, `numbers` by `numbers` xi.

    `room` has the tiles' rows and the addresses of scratch: scales and shifts, results, results in y's order,
    places. What is not wanted of the last tiles goes to a place behind the results.
    """
    dilation_h, dilation_w, P_all, Q_all, TH, TW, before_h, before_w, nowhere, itemsize = sizes
    yk = strides[1]
    slots, factors_at, results_at, planes_at, order_at, places_at = room
    down = pointer(places_at, "int64")
    across = ahead(down, E)
    # A place's channels are neighbours, or a channel's places.
    side = 1 if yk == 1 else L
    width = (k1 - k0 + L - 1) // L * L
    factors = pointer(factors_at, "float32")
    addends = ahead(factors, width * side)
    for k in range(k1 - k0):
        factor = scale[k0 + k] if given(scale) else np.float32(1)
        for i in range(side):
            factors[k * side + i] = factor
            addends[k * side + i] = shift[k0 + k]
    # What fills vectors up is computed with, too: denormal numbers would take a hundred times as long.
    for k in range((k1 - k0) * side, width * side):
        factors[k] = addends[k] = 0
    results, planes = pointer(results_at, "float32"), pointer(planes_at, "float32")
    order = pointer(order_at, "int32")
    for i in range(L):
        order[i] = i * L
    t = first
    while t < first + count:
        n, row, row_end, column, column_end = _part(t, first + count, TH, TW)
        origin, P, Q, yh, yw = _grid(n, (dilation_h, dilation_w, P_all, Q_all), strides)
        # All channels of a tile, or all tiles of a vector of channels.
        group = L
        if yk == 1:
            row_end, column_end, group = row + 1, column + 1, width
        p0, q0 = E * row, E * column
        height = max(min(E * row_end, P) - p0, 0)
        length = max(min(E * column_end, Q) - q0, 0)
        pixels = height * length
        for k in range(0, k1 - k0, group):
            for i in range(row, row_end):
                _where(E, down, before_h if i == TH - 1 else 0, P - E * i, length * group, nowhere)
                for j in range(column, column_end):
                    _where(E, across, before_w if j == TW - 1 else 0, Q - E * j, group, nowhere)
                    tile = t - first + (i - row) * (column_end - column) + j - column
                    to = ahead(results, ((E * i - p0) * length + E * j - q0) * group)
                    for v in range(0, group, L):
                        source = ahead(sums, slots[tile] * pitch + k + v)
                        transform_sums(L, numbers, E, ahead(to, v), down, across, source, plane)
            some = min(group, k1 - k0 - k)
            if yk == 1:
                values, outer, inner, gap, factor_outer, factor_inner = (
                    results,
                    pixels,
                    some,
                    group,
                    0,
                    1,
                )
                lines, rows, along = height, length, some
                line, line_y, line_row, row_y = length * group, yh, group, yw
            else:
                values, outer, inner, factor_outer, factor_inner = planes, some, pixels, L, 0
                gap = (pixels + L - 1) // L * L + L
                for i in range(pixels * L, (gap - L) * L):
                    results[i] = 0
                for i in range(0, pixels, L):
                    simd.transpose(L, ahead(planes, i), gap, ahead(results, i * L), order, L)
                lines, rows, along = some, height, length
                line, line_y, line_row, row_y = gap, yk, length, yh
                # Rows without gaps between them are one.
                if length == yh:
                    rows, along = 1, pixels
            _scale(
                L, values, gap, outer, inner, ahead(factors, k * side), ahead(addends, k * side),
                factor_outer, factor_inner,
            )  # fmt: skip
            place = (origin + (k0 + k) * yk + p0 * yh + q0 * yw) * itemsize
            if residual != 0:
                beside = vectors.elements(residual + place, kind)
                _add_rows(
                    L, kind, values, line, line_row, beside, line_y, row_y, lines, rows, along
                )
            _activate(L, values, gap, outer, inner, activation)
            there = vectors.elements(y + place, kind)
            _store_rows(L, kind, there, line_y, row_y, values, line, line_row, lines, rows, along)
        t += (row_end - row) * (column_end - column)


@routine
def _far_lines(R, w, itemsize, wk, wc, wt, some_k, some_c):
    """How `_far_line` finds the taps of so many filters and channels: how many lines of memory they take in
    each row, those of a filter or of a channel, and where; sizes in floats."""
    rows, row, length = some_k, wk, some_c
    if wc > wk:
        rows, row, length = some_c, wc, some_k
    # Neighbours in memory are taps, with those of the next channel, or filter, behind them; or not.
    runs = R * R
    if wt == 1:
        length, runs = length * runs, 1
    lines = (length * itemsize + 4 * LINE - 1) // (4 * LINE)
    groups = (rows + TERMS - 1) // TERMS
    return (
        runs * lines,
        pointer(w, "float32"),
        groups,
        row * itemsize // 4,
        lines,
        wt * itemsize // 4,
    )


@routine
def _far_line(far, first, i):
    """Where the i-th of many requests begins, which are for one line in `TERMS` rows each."""
    _, w, groups, row, lines, run = far
    line = first + i // groups
    return ahead(w, line // lines * run + line % lines * LINE + i % groups * TERMS * row)


@routine
def _multiply_few(L, M, V, half, v, pitch_v, u, width, count, sums, pitch, more):
    """``sums (+)= V · U`` of M tiles, which are fewer than a tile of registers has."""
    for c in range(0, count, TERMS):
        lines, panel, terms = ahead(v, c), ahead(u, c * width), min(TERMS, count - c)
        if width == V * L:
            _multiply(L, M, V, lines, pitch_v, panel, terms, sums, pitch, more + c, panel, 0)
        else:
            _multiply(L, M, half, lines, pitch_v, panel, terms, sums, pitch, more + c, panel, 0)


@routine
def _multiply_panel(
    L, M, V, half, v, pitch_v, u, width, count, sums, pitch, tiles, more,
    near, near_lines, far, far_first, far_end,
):  # fmt: skip
    """``sums (+)= V · U`` of one xi for one panel, `width` wide; overwritten where `more` is 0.

    Meanwhile memory is asked for, a line with each term: so many lines from `near` on, then some of those
    that `far` tells of, see `_far_lines`.
    """
    near_steps = (near_lines + TERMS - 1) // TERMS
    far_steps = (far_end - far_first) * far[2]
    i = 0
    whole = tiles - tiles % M
    for m in range(0, whole, M):
        to = ahead(sums, m * pitch)
        for c in range(0, count, TERMS):
            lines, panel, terms = (
                ahead(v, m * pitch_v + c),
                ahead(u, c * width),
                min(TERMS, count - c),
            )
            later, step = panel, 0
            if i < near_steps:
                later, step = ahead(near, i * TERMS * LINE), LINE
            elif i - near_steps < far_steps:
                later, step = _far_line(far, far_first, i - near_steps), far[3]
            i += 1
            if width == V * L:
                _multiply(L, M, V, lines, pitch_v, panel, terms, to, pitch, more + c, later, step)
            else:
                _multiply(
                    L, M, half, lines, pitch_v, panel, terms, to, pitch, more + c, later, step
                )
    if whole == tiles:
        return
    lines, to = ahead(v, whole * pitch_v), ahead(sums, whole * pitch)
    if tiles - whole > 2:
        _multiply_few(L, 4, V, half, lines, pitch_v, u, width, count, to, pitch, more)
    else:
        _multiply_few(L, 2, V, half, lines, pitch_v, u, width, count, to, pitch, more)


# ---- the kernel -------------------------------------------------------------------------------------------


@lru_cache(None)
def _winograd(kind: str, scheme: str, L: int, M: int, V: int) -> Task:
    args = layout("int64*2 float32**4 int64*58")
    axis, half = SCHEMES[scheme], V // 2
    side, step, R, E, *_ = axis
    NV, NU, NM, of_axis = axis.v, axis.u, axis.m, len(axis.products)
    every = (1 << of_axis) - 1
    of_v, of_u, of_m, again = axis.of_both_axes()
    products = len(of_v)

    def winograd(address: int, index: int, scratch: int) -> None:
        """With `making`, a part of U or of V, whichever there is an array for. Else y of a block of tiles:
        all of its panels if U is given, one of them if V is."""
        (
            x, w, u, v, scale, shift, residual, y, activation, making,
            dilation_h, dilation_w, H, W, TH, TW, pad_h, pad_w, P, Q,
            before_h, needed_h, before_w, needed_w, itemsize,
            C, K, padded, first, count, some, tiles, rows, chunk,
            plane_v, stretch, pitch, plane, v_at, sums_at, taps_at, places_at, zeros_at, pixels_at,
            factors_at, results_at, nowhere, planes_at, order_at, slots_at, starts_at, outputs_at,
            xn, xc, xh, xw, wk, wc, wt, turned, yn, yk, yh, yw,
        ) = unpack(address, args)  # fmt: skip
        taps = pointer(scratch + taps_at, "float32")
        given_v = given(v)
        panels = (padded + V * L - 1) // (V * L)
        block, panel, panel_end = index, 0, panels
        if making or given_v:
            block, panel = index // panels, index % panels
            panel_end = panel + 1
        start, here = block * tiles, min(tiles, count - block * tiles)
        behind, origin, lines = (here, rows), start, ahead(v, start * pitch)
        if making:
            # Behind the last tile there are rows that are multiplied, too.
            start = index * some
            here, origin, lines = max(min(some, count - start), 0), 0, v
            behind = start + here, min(start + some, stretch // pitch)
        if not given_v:
            lines = pointer(scratch + v_at, "float32")
        slots, starts = pointer(scratch + slots_at, "int64"), pointer(scratch + starts_at, "int64")
        if given_v or not making:
            arrange(
                slots, starts, first, start, here, tiles, count, TH, TW, needed_h != every,
                needed_w != every, origin,
            )  # fmt: skip
        if making == given_v:
            inputs(
                L, step, side, NV, kind, lines, plane_v, stretch, pitch, x, first + start, here, behind, C,
                (dilation_h, dilation_w, H, W, TH, TW, pad_h, pad_w, before_h * step // E,
                 before_w * step // E, itemsize),
                (xn, xc, xh, xw), chunk,
                (slots, scratch + places_at, scratch + zeros_at, scratch + pixels_at),
            )  # fmt: skip
        if making and given_v:
            return
        sums = pointer(scratch + sums_at, "float32")
        for k0 in range(panel * V * L, panel_end * V * L, V * L):
            width = min(V * L, padded - k0)
            plane_u = (STRETCH if given_v else C) * width + LINE
            filters = (
                pointer(scratch, "float32")
                if given_v
                else ahead(u, NU * NU * (k0 * C + k0 // (V * L) * LINE))
            )
            channels = PART if making else STRETCH
            for c in range(
                block * channels if making else 0, (block + 1) * channels if making else C, channels
            ):
                deep = min(channels, C - c)
                of_c = 0 if given_v else c * width
                if making or given_v:
                    for k in range(k0, k0 + width, L):
                        # Vectors that only fill the panel up repeat the last one.
                        filled = min(k, (K - 1) // L * L)
                        source = ahead(vectors.elements(w, kind), filled * wk)
                        _filters(
                            L, R, NU, kind, ahead(filters, k - k0 + of_c), plane_u, width, source, wk, wc, wt,
                            turned, min(L, K - filled), c, deep, taps,
                        )  # fmt: skip
                if not making:
                    # What other tasks made is not in this core's cache, and neither is w: the next product's
                    # V or U, and w's next channels, are asked for.
                    coming = C - c - channels if given_v else 0
                    far = _far_lines(
                        R, w + (k0 * wk + (c + channels) * wc) * itemsize, itemsize, wk, wc, wt,
                        min(width, K - k0), min(max(coming, 0), channels),
                    )  # fmt: skip
                    of_stretch = ahead(lines, c // STRETCH * stretch)
                    for i in range(products):
                        by_h, by_w = needed_h >> (i // of_axis) & 1, needed_w >> (i % of_axis) & 1
                        begin, end = rows_of(starts, rows, by_h, by_w)
                        begin, end = _even(begin, end, rows)
                        to = ahead(sums, of_m[i] * plane)
                        if c == 0 and not again[i]:
                            # Other tiles' outputs that nobody wants are sums of these.
                            for k in range(begin * V * L):
                                to[k] = 0
                            for k in range(end * V * L, rows * V * L):
                                to[k] = 0
                        later = min(i + 1, products - 1)
                        near = ahead(filters, of_u[later] * plane_u + of_c)
                        near_lines = deep * width // LINE
                        if given_v:
                            near = ahead(of_stretch, of_v[later] * plane_v)
                            near_lines = rows * pitch // LINE
                        _multiply_panel(
                            L, M, V, half, ahead(of_stretch, of_v[i] * plane_v + begin * pitch), pitch,
                            ahead(filters, of_u[i] * plane_u + of_c), width, deep,
                            ahead(to, begin * V * L), V * L, end - begin, c + again[i], near, near_lines,
                            far, i * far[0] // products, (i + 1) * far[0] // products,
                        )  # fmt: skip
            if not making:
                _outputs(
                    L, NM, E, kind, y, residual, sums, plane, V * L, first + start, here, k0,
                    min(k0 + V * L, K), scale, shift, activation,
                    (dilation_h, dilation_w, P, Q, TH, TW, before_h, before_w, nowhere, itemsize),
                    (yn, yk, yh, yw),
                    (slots, scratch + factors_at, scratch + results_at, scratch + planes_at,
                     scratch + order_at, scratch + outputs_at),
                )  # fmt: skip

    return Task(winograd, args)


# ---- plans ------------------------------------------------------------------------------------------------

FILTER_BYTES = 8 * 1024 * 1024
"""U of at most so many bytes is made for all tasks; where it would have more V is."""

NEAR_BYTES = 256 * 1024
"""U of more bytes is not made for all tasks, either, where there are few tiles: to fetch it from other cores'
caches takes longer than to make it."""

BLOCK_BYTES = 1024 * 1024
"""What V and one panel's M of a block should fit into where U is made for all: a second-level cache."""

TILES = 66
"""Most tiles of a block, with 36 sums each: where V is made for all, M of them and a part of U fit there."""

WAVE_BYTES = 16 * 1024 * 1024
"""How much of V is made at a time, at least a block."""

PIXEL_BYTES = 256 * 1024
"""Most bytes of x that lie in scratch, channels last, unless a vector of channels takes more."""

LINE = simd.LINE // 4
"""Floats of a cache line: so much lies between the arrays of two xi, whose sizes are often powers of two."""


class Scratch:
    """Offsets of arrays in a task's scratch, each from a new line on; `bytes` of all together."""

    def __init__(self) -> None:
        self.bytes = 0

    def add(self, floats: int) -> int:
        start, self.bytes = self.bytes, self.bytes + up(4 * floats, 64)
        return start


def _padded(K: int) -> int:
    """Filters in panels; the last one may be half as wide."""
    L, (_, V) = simd.lanes("float32"), simd.tiles().gemm
    rest, half = K % (V * L), V // 2 * L
    return K - rest + (0 if rest == 0 else half if rest <= half else V * L)


def grids(N: int, dilation: Axes, *sizes: Axes) -> tuple[int, list[Axes]]:
    """How many images a dilation makes of N: each of every so many lines and columns, of which no taps reach
    into another one. And the largest of each of their sizes."""
    parts = [
        tuple(-(-places // step) for places, step in zip(size, dilation, strict=True))
        for size in sizes
    ]
    return N * math.prod(dilation), parts


class _Tiles(NamedTuple):
    """How `total` tiles are cut into `blocks` of `tiles` each, and whether V is made for all tasks, else U. A
    block is multiplied in so many `rows`, an even number. `last` says of both axes' last tiles what
    `Scheme.last` does."""

    total: int
    along: tuple[int, int]
    last: tuple[tuple[int, int], tuple[int, int]]
    given_v: bool
    tiles: int
    rows: int
    blocks: int

    @classmethod
    def of(cls, N: int, output: Axes, C: int, K: int, axis: Scheme, threads: int) -> _Tiles:
        lanes, (M, V) = simd.lanes("float32"), simd.tiles().gemm
        TH, TW = (-(-places // axis.outputs) for places in output)
        total = N * TH * TW
        of_u, panels = axis.u**2 * 4 * C * _padded(K), -(-_padded(K) // (V * lanes))
        given_v = of_u > FILTER_BYTES or (of_u > NEAR_BYTES and total <= 2 * TILES)
        # Small blocks for small caches, and to keep all threads busy.
        if given_v:
            least, most = M, -(-total // -(-threads // panels))
        else:
            least, most = 4 * M, -(-total // threads)
            most = min(most, BLOCK_BYTES // (4 * (axis.v**2 * C + axis.m**2 * V * lanes)))
        most = min(max(up(most, 2), least), TILES * 36 // axis.m**2, up(total, 2))

        def waste(tiles: int) -> float:
            rounds = up(-(-total // tiles), 1 if given_v else threads)
            return rounds * up(tiles, 2) / total

        # Whole rows of tiles if that wastes little: their pixels are read in long lines, and fewer twice.
        tiles = min(range(most, most // 2, -2), key=waste)
        aligned = min(range(most // TW * TW, 0, -TW), key=waste, default=tiles)
        if waste(aligned) < 1.05 * waste(tiles):
            tiles = aligned
        last_h, last_w = (axis.last((places - 1) % axis.outputs + 1) for places in output)
        return cls(
            total, (TH, TW), (last_h, last_w), given_v, tiles, up(tiles, 2), -(-total // tiles)
        )

    def products(self, axis: Scheme) -> float:
        """Products of a row of V with a panel, for all tiles, those that fill up the last block too."""
        share = 1.0
        for tiles, (_, needed) in zip(self.along, self.last, strict=True):
            share *= (tiles - 1 + needed.bit_count() / len(axis.products)) / tiles
        return len(axis.products) ** 2 * share * self.blocks * self.rows


class _Plan:
    """One correlation, of x ``N C H W`` with K filters to y ``N K P Q``, by one of `SCHEMES`: all that does
    not change from call to call. `padding` is that before H and W, in steps of the dilation; `straight` says
    that the kernel reads x channels-last."""

    def __init__(
        self, kind: str, N: int, C: int, K: int, size: Axes, padding: tuple[int, int], output: Axes,
        dilation: Axes, scheme: str, straight: bool, threads: int,
    ) -> None:  # fmt: skip
        L, (M, V) = simd.lanes("float32"), simd.tiles().gemm
        axis = SCHEMES[scheme]
        out, arrays_v, arrays_u, arrays_m = axis.outputs, axis.v**2, axis.u**2, axis.m**2
        self._dilation, all_places = dilation, (size, output)
        N, (size, output) = grids(N, dilation, size, output)
        padded, pitch = _padded(K), min(STRETCH, up(C, L))
        panels, stretches = -(-padded // (V * L)), -(-C // STRETCH)
        cut = _Tiles.of(N, output, C, K, axis, threads)
        T, (TH, TW), last, given_v, tiles, rows, blocks = cut
        if given_v:
            wave = max(1, WAVE_BYTES // (arrays_v * 4 * C * tiles)) * tiles
            waves = [(first, min(wave, T - first)) for first in range(0, T, wave)]
            all_rows = up(min(wave, T), tiles) - tiles + rows
            # Whole images, if they are small and all threads have some.
            some = up(4 * M, TH * TW) if TH * TW < TILES else 4 * M
            if all_rows < some * threads:
                some = min(some, max(up(-(-all_rows // threads), TW), 2 * M))
            making = -(-all_rows // some)
        else:
            waves = [(0, T)]
            all_rows, some = rows, tiles
            making = panels * -(-C // PART)
        stretch = all_rows * pitch
        plane_v, plane = stretches * stretch + LINE, rows * V * L + LINE
        self._given_v, self._panels, self._tiles = given_v, panels, tiles
        self._waves, self._making = waves, making
        self._shared_size = (
            arrays_v * plane_v if given_v else arrays_u * (padded * C + panels * LINE)
        )
        scratch = Scratch()
        scratch.add(arrays_u * (STRETCH * V * L + LINE) if given_v else 0)
        v = scratch.add(0 if given_v else arrays_v * plane_v)
        sums = scratch.add(arrays_m * plane)
        taps = scratch.add((axis.taps**2 * L + 16) * L)
        # The pixels that a rectangle of tiles reads, with what a turned vector may reach beyond.
        H, W = size
        across, along = (
            axis.step * (min(n, t) - 1) + axis.inputs for n, t in ((some, TW), (some // TW, TH))
        )
        pixels = axis.inputs * min(W, across)
        if some >= TW:
            pixels = max(pixels, min(H, along) * W)
        chunk = STRETCH
        while not straight and chunk > L and 4 * chunk * pixels > PIXEL_BYTES:
            chunk //= 2
        places = scratch.add(2 * axis.inputs**2 * some)
        zeros = scratch.add(max(C, chunk))
        at_pixels = scratch.add(0 if straight else (pixels + L) * chunk)
        factors = scratch.add(2 * V * L * L)
        # Behind them as much for what nobody wants of a row, of a column and of both.
        nowhere = max(out**2 * V * L, (out**2 * tiles + 2 * out + L) * L)
        results = scratch.add(3 * nowhere)
        planes = scratch.add((up(out**2 * tiles, L) + L) * L)
        order = scratch.add(L)
        slots, starts, outputs = (scratch.add(2 * n) for n in (max(some, tiles), 8, 2 * out))
        self._scratch_bytes = scratch.bytes
        itemsize = 4 if kind == "float32" else 2
        self._places = (
            *dilation, *all_places[0], TH, TW, *padding, *all_places[1], *last[0], *last[1], itemsize,
        )  # fmt: skip
        self._sizes = C, K, padded
        self._rest = (
            some, tiles, rows, chunk, plane_v, stretch, pitch, plane, v, sums, taps, places, zeros, at_pixels,
            factors, results, nowhere, planes, order, slots, starts, outputs,
        )  # fmt: skip
        self._zeros = torch.zeros(K)
        self._task = _winograd(kind, scheme, L, M, V)
        self._work = cut.products(axis) * C * padded / L
        cycles = _cycles(axis)
        self._making_work = C / L * (cycles.input * T if given_v else cycles.filter * padded)

    def run(
        self, x: torch.Tensor, w: torch.Tensor, along: tuple[int, int, int, int],
        bias: torch.Tensor | None, y: torch.Tensor, epilogue: Epilogue,
    ) -> None:  # fmt: skip
        """`along` are w's strides from filter to filter, channel to channel and tap to tap, and whether the
        taps are turned around."""
        scale, residual, activation, *_ = epilogue
        scale = None if scale is None else scale.float().contiguous()
        shift = self._zeros if bias is None else bias.float().contiguous()
        shared = Shared(4 * self._shared_size)
        u, v = (None, shared) if self._given_v else (shared, None)
        ends = x, w, u, v, scale, shift, residual, y, ACTIVATIONS.index(activation)
        all_strides = *strides(x, self._dilation), *along, *strides(y, self._dilation)
        for first, count in self._waves:
            blocks = -(-count // self._tiles)
            tasks = blocks * self._panels if self._given_v else blocks
            phases = (True, self._making, self._making_work), (False, tasks, self._work)
            for making, number, work in phases:
                self._task.run(
                    number, work, *ends, making, *self._places, *self._sizes, first, count,
                    *self._rest, *all_strides, scratch_bytes=self._scratch_bytes,
                )  # fmt: skip


@lru_cache(512)
def _fprop(shape: ConvShape, kind: str, straight: bool, threads: int) -> _Plan:
    (top, _), (left, _) = shape.padding
    scheme = scheme_of(shape, "fprop")
    assert scheme is not None
    down, along = shape.dilation
    return _Plan(
        kind, shape.N, shape.C, shape.K, shape.spatial, (top // down, left // along), shape.output,
        shape.dilation, scheme, straight, threads,
    )  # fmt: skip


@lru_cache(512)
def _dgrad(shape: ConvShape, kind: str, straight: bool, threads: int) -> _Plan:
    scheme = scheme_of(shape, "dgrad")
    assert scheme is not None
    if scheme == "spread":
        top = left = 0
    else:
        top, left = (
            SCHEMES[scheme].taps - 1 - before // step
            for (before, _), step in zip(shape.padding, shape.dilation, strict=True)
        )
    return _Plan(
        kind, shape.N, shape.K, shape.C, shape.output, (top, left), shape.spatial, shape.dilation, scheme,
        straight, threads,
    )  # fmt: skip


def _filter_strides(w: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """w with its taps at even distances and some neighbours that vectors can read, and its strides along
    filters, channels and taps."""
    k, c, r, s = w.stride()
    if r != w.shape[3] * s or 1 not in (k, c, s):
        w = w.contiguous()
        k, c, r, s = w.stride()
    return w, (k, c, s)


def readable(x: torch.Tensor, dilation: Axes) -> torch.Tensor:
    """x with something that vectors can read as neighbours: with a dilation, channels."""
    if max(dilation) > 1:
        return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)
    return x if 1 in (x.stride(1), x.stride(3)) else x.contiguous()


def strides(x: torch.Tensor, dilation: Axes) -> tuple[int, int, int, int]:
    """What the kernel is told of a `readable` x: a single channel is next to itself, whatever its stride."""
    n, c, h, w = x.stride()
    return n, 1 if x.shape[1] == 1 and (max(dilation) > 1 or w != 1) else c, h, w


def straight(x: torch.Tensor) -> bool:
    """Whether the kernel reads vectors of x's channels from where they are."""
    whole = x.shape[1] % simd.lanes("float32") == 0
    return whole and x.dtype == torch.float32 and x.stride(1) == 1


def _correlate(
    planned: Callable[[ConvShape, str, bool, int], _Plan],
    shape: ConvShape,
    x: torch.Tensor,
    w: torch.Tensor,
    along: tuple[int, int, int, int],
    bias: torch.Tensor | None,
    y: torch.Tensor,
    epilogue: Epilogue | None,
) -> None:
    epilogue = epilogue or NO_EPILOGUE
    result = y
    dilated = max(shape.dilation) > 1
    if y.stride(1) != 1 and (dilated or y.stride(3) != 1):
        order = torch.channels_last if dilated else torch.contiguous_format
        result = torch.empty_like(y, memory_format=order)
        if epilogue.residual is not None:
            residual = epilogue.residual.contiguous(memory_format=order)
            epilogue = epilogue._replace(residual=residual)
    x = readable(x, shape.dilation)
    plan = planned(shape, KINDS[x.dtype], straight(x), torch.get_num_threads())
    plan.run(x, w, along, bias, result, epilogue)
    if result is not y:
        y.copy_(result)


# ---- operations -------------------------------------------------------------------------------------------


def scheme_of(shape: ConvShape, direction: Direction) -> str | None:
    """Which of `SCHEMES` computes the problem; for the weight gradient that of fprop."""
    if not (
        shape.kernel in ((3, 3), (5, 5))
        and shape.groups == 1
        and shape.padding_mode == "zeros"
        and math.prod(shape.x_size) > 0
    ):
        return None
    for (before, after), step in zip(shape.padding, shape.dilation, strict=True):
        most = shape.kernel[0] * step
        if not (0 <= before < most and 0 <= after < most and before % step == 0):
            return None
    if shape.stride == (1, 1):
        return "three taps" if shape.kernel == (3, 3) else "five taps"
    if shape.stride != (2, 2) or shape.kernel != (3, 3) or shape.dilation != (1, 1):
        return None
    if direction == "dgrad":
        return "spread" if all(before == 1 for before, _ in shape.padding) else None
    return "strided"


class _Cycles(NamedTuple):
    """About how long transforms take, for a vector of channels of a tile, or of filters of a channel."""

    input: float
    output: float
    filter: float


def _cycles(axis: Scheme) -> _Cycles:
    return _Cycles(
        7.0 * (axis.inputs**2 + axis.v**2),
        9.6 * (axis.m**2 + axis.outputs**2),
        13.0 * (axis.taps**2 + axis.u**2),
    )


@lru_cache(4096)
def _is_worth_it(shape: ConvShape, direction: Direction) -> bool:
    """By estimated cycles of one thread, against a direct convolution at 95 % of the multiply-adds that a CPU
    with one vector of them a cycle can do, or 80 and 70 % with a stride of 2."""
    scheme = scheme_of(shape, direction)
    if scheme is None:
        return False
    axis = SCHEMES[scheme]
    C, K, output = shape.C, shape.K, shape.output
    if direction == "dgrad":
        C, K, output = K, C, shape.spatial
    lanes = simd.lanes("float32")
    vectors_c, vectors_k = -(-C // lanes), -(-K // lanes)
    direct = 1.0 * shape.N * math.prod(shape.output) * math.prod(shape.kernel) * C * vectors_k
    direct /= 0.95 if shape.stride == (1, 1) else 0.8 if direction == "fprop" else 0.7
    direct += 1.4 * math.prod(shape.kernel) * C * K  # filters are packed
    images, (output,) = grids(shape.N, shape.dilation, output)
    tiles = _Tiles.of(images, output, C, K, axis, 1)
    products = tiles.products(axis) * C * _padded(K) / lanes / 0.94
    # Transforms have little to multiply: where vectors of 512 bits go at once they are as fast as memory.
    slow = 1.8 if simd.in_two_steps() else 1.0
    cycles = _cycles(axis)
    transforms = slow * tiles.total * (cycles.input * vectors_c + cycles.output * vectors_k)
    filters = cycles.filter * C * vectors_k * (tiles.blocks if tiles.given_v else 1)
    return products + transforms + filters + 40_000 < 0.9 * direct


def takes(shape: ConvShape, dtype: torch.dtype, direction: Direction) -> bool:
    """Whether `fprop` or `dgrad` computes the problem, and in less time than a direct convolution would: 2-D,
    3 by 3 or 5 by 5 taps and a stride of 1, any dilation of which the padding is a multiple; or 3 by 3 taps
    and a stride of 2, no dilation, and for dgrad a padding of 1. Groups of 1, zeros as padding, less on each
    side than taps reach. Never where `cnnops.winograd` forbids it."""
    return settings.winograd and dtype in KINDS and _is_worth_it(shape, direction)


def fprop(
    shape: ConvShape,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """``y = x * w + bias``, and what the `Epilogue` says, but for its moments. Any strides, the residual with
    those of y."""
    w, (k, c, t) = _filter_strides(w)
    _correlate(_fprop, shape, x, w, (k, c, t, 0), bias, y, epilogue)


def dgrad(
    shape: ConvShape,
    grad_y: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    grad_x: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """The gradient with respect to x, plus `bias`, one value a channel of x; else as `fprop`."""
    w, (k, c, t) = _filter_strides(w)
    _correlate(_dgrad, shape, grad_y, w, (c, k, t, 1), bias, grad_x, epilogue)
