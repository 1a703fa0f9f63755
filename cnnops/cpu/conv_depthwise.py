"""Depthwise convolution on the CPU: one filter a channel, forward and both gradients, for one to three axes.

There is nothing to multiply as a matrix here, so lanes are channels, whatever the layout. A run of `B`
neighbouring outputs of a row is kept in registers (of grad_y in the weight gradient) while it goes through
the taps in segments, up to `SEGMENT` neighbouring ones in a row: a vector of x is loaded once for them all.

Channels-last float32 and float64 are read and written in place, rows and columns outside of x left out. Two
vectors go together as one of twice the lanes; where channels fill no whole number of them the last one begins
early, of which only the lanes that are left count. All channels of a few places are done together, so that
memory is gone through in its order; where that is more than the caches hold, what the places behind them need
is asked for meanwhile, line after line, and the results go past the caches.

Anything else comes to scratch first, row by row as it is needed, into a ring of as many rows as are read
together; half types are widened there, planes are turned into vectors of channels, and zeros stand beside:

    lines   [vector of channels] [depth] [ring] [phase] [place] [L]

Phase: places of one residue modulo the stride, so that neighbouring outputs read neighbouring vectors. Planes
whose rows would waste much of a vector come as a whole. What leaves as planes goes through scratch as well,
and so does what an `Epilogue` with a residual, or with more than a clamp, is for.

The input gradient of stride s is the same with grad_y for x: its outputs fall into s classes an axis, by the
place modulo s, each with the taps that reach it; nothing is multiplied by inserted zeros.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cnnops.cpu import simd, vectors
from cnnops.cpu.compiler import routine
from cnnops.cpu.conv_axes import up
from cnnops.cpu.simd import LINE, Loop, int_constant, splat
from cnnops.cpu.task import Shared, Table, Task, Value, ahead, layout, pointer, strides, unpack
from cnnops.cpu.vectors import KIND, Vectors, elements
from cnnops.epilogue import ACTIVATIONS, NO_EPILOGUE, Epilogue
from cnnops.shapes import ConvShape

SEGMENT = 4
"""Most neighbouring taps that share the vectors they load."""

LINES_BYTES = 256 * 1024
"""Most of a core's second-level cache that lines of x take which lie there for all channels."""

ROOM_BYTES = 2 * 1024 * 1024
"""Most scratch for one vector of channels: longer rows are left to who cuts them."""

GROUP = 64
"""Most vectors of channels together where x is read in place."""

ROWS, PLACED_ROWS = 4, 8
"""Most rows of outputs done together where channels are innermost, and where x is read in place: the
first-level cache then holds what they share."""

SPAN_BYTES = 128 * 1024
"""Outputs written in place together lie in at most so many bytes, 32 pages: of more, a core looks up the
addresses again and again."""

FLUSH = 256
"""Most terms of a weight's gradient that are added up one after the other."""

SPLITS = 64
"""The weight gradient's sum is split into at most so many parts."""

FLAT = 32 * 1024
"""Most elements of a plane of `L` channels that is held in scratch as a whole."""


def _computed(kind: str) -> str:
    return "float64" if kind == "float64" else "float32"


# ---- vectors ----------------------------------------------------------------------------------------------


def _far(builder: ir.IRBuilder, base: ir.Value, *factors: ir.Value | int) -> ir.Value:
    """The place ``product of factors`` elements behind `base`."""
    offset = int_constant(1)
    for factor in factors:
        factor = int_constant(factor) if isinstance(factor, int) else factor
        offset = factor if offset == int_constant(1) else builder.mul(offset, factor)
    return builder.gep(base, [offset])


def _square_masks(emit: Vectors, count: ir.Value, channels: ir.Value) -> list[ir.Value]:
    """For each channel of a square the mask of its first `count` elements, of none from `channels` on."""
    builder = emit.builder
    numbers = ir.Constant(emit.words, list(range(emit.lanes)))
    masks = []
    for c in range(emit.lanes):
        there = builder.icmp_signed(">", channels, int_constant(c))
        some = builder.trunc(builder.select(there, count, int_constant(0)), ir.IntType(32))
        masks.append(builder.icmp_signed("<", numbers, splat(builder, some, emit.lanes)))
    return masks


def _squares(
    emit: Vectors, count: ir.Value, channels: ir.Value,
    square: Callable[[ir.Value, ir.Value | None], None],
) -> None:  # fmt: skip
    """`square` of each vector's first number out of `count`, and of how many are left, None for a whole one.
    Whole ones need no masks, which cost a third as much again."""
    builder, L = emit.builder, emit.lanes
    every = builder.icmp_signed("==", channels, int_constant(L))
    whole = builder.and_(count, int_constant(-L))
    whole = builder.select(every, whole, int_constant(0))
    loop = Loop(builder, int_constant(0), whole, L, [])
    square(loop.index, None)
    loop.close([])
    loop = Loop(builder, whole, count, L, [])
    square(loop.index, builder.sub(count, loop.index))
    loop.close([])


@intrinsic(prefer_literal=True)
def _read_channels(
    typing_context, lanes, kind, to, pitch, places, source, step, count, channels
):  # fmt: skip
    """``to[c // L * pitch + places[i] * L + c % L] = source[i * step + c]`` for i < count, c < channels, zero
    for the last vector's other lanes."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, pitch, places, source, step, count, channels = values[2:]
        emit = Vectors(builder, of, L)
        rest = builder.and_(channels, int_constant(L - 1))
        whole = builder.sub(channels, rest)
        mask = emit.first(rest)
        outer = Loop(builder, int_constant(0), count, 1, [])
        row = _far(builder, source, outer.index, step)
        place = builder.sext(builder.load(_far(builder, places, outer.index)), simd._I64)
        start = _far(builder, to, place, L)
        inner = Loop(builder, int_constant(0), whole, L, [start])
        emit.store(emit.read(builder.gep(row, [inner.index])), inner.carried[0])
        (start,) = inner.close([builder.gep(inner.carried[0], [pitch])])
        with builder.if_then(builder.icmp_signed("!=", rest, int_constant(0))):
            emit.store(emit.read(builder.gep(row, [whole]), mask), start)
        outer.close([])
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.void(lanes, kind, to, i64, types.CPointer(types.int32), source, i64, i64, i64)
    return signature, generate


@intrinsic(prefer_literal=True)
def _read_planes(typing_context, lanes, kind, to, places, source, plane, count, channels, spare):
    """``to[places[i], c] = source[c * plane + i]`` for i < count, c < channels, zero for other lanes.

    `places` has a vector's length more entries than are asked for; `to[spare]` takes what nobody needs.
    """
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, places, source, plane, count, channels, spare = values[2:]
        emit = Vectors(builder, of, L)
        at = [_far(builder, source, plane, c) for c in range(L)]

        def square(i, some):
            masks = [None] * L if some is None else _square_masks(emit, some, channels)
            rows = [
                emit.read(builder.gep(start, [i]), mask)
                for start, mask in zip(at, masks, strict=True)
            ]
            for n, row in enumerate(simd.turned(builder, rows)):
                number = builder.add(i, int_constant(n))
                place = builder.sext(builder.load(_far(builder, places, number)), simd._I64)
                if some is not None:
                    within = builder.icmp_signed(">", some, int_constant(n))
                    place = builder.select(within, place, spare)
                emit.store(row, _far(builder, to, place, L))

        _squares(emit, count, channels, square)
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.void(lanes, kind, to, types.CPointer(types.int32), source, i64, i64, i64, i64)
    return signature, generate


@intrinsic(prefer_literal=True)
def _add_up(typing_context, lanes, kind, to, source, count, step, terms, apart):
    """``to[i, c] = sum_t source[t * apart + i * step + c]`` for i < count, t < terms, c < lanes, in this
    order, in float64 and rounded once."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, source, count, step, terms, apart = values[2:]
        emit = Vectors(builder, of, L)
        wide = simd.Emit(builder, ir.DoubleType(), L)
        rows = Loop(builder, int_constant(0), count, 1, [])
        row = _far(builder, source, rows.index, step)
        loop = Loop(builder, int_constant(0), terms, 1, [wide.zero()])
        value = emit.load(_far(builder, row, loop.index, apart))
        if of != "float64":
            value = builder.fpext(value, wide.vector)
        (total,) = loop.close([builder.fadd(loop.carried[0], value)])
        if of != "float64":
            total = builder.fptrunc(total, emit.vector)
        emit.store(total, _far(builder, to, rows.index, L))
        rows.close([])
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, to, source, i64, i64, i64, i64), generate


def _lanes(emit: Vectors, skip: ir.Value, channels: ir.Value) -> ir.Value:
    """A mask of so many lanes behind the first `skip`."""
    behind = emit.first(emit.builder.add(skip, channels))
    return emit.builder.and_(behind, emit.builder.not_(emit.first(skip)))


@intrinsic(prefer_literal=True)
def _write_channels(typing_context, lanes, kind, to, source, step, count, skip, channels):
    """``to[i * step + c] = source[i, c]`` for i < count, skip <= c < skip + channels."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, source, step, count, skip, channels = values[2:]
        emit = Vectors(builder, of, L)
        mask = _lanes(emit, skip, channels)
        loop = Loop(builder, int_constant(0), count, 1, [])
        value = emit.load(_far(builder, source, loop.index, L))
        emit.write(value, _far(builder, to, loop.index, step), mask)
        loop.close([])
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, to, source, i64, i64, i64, i64), generate


@intrinsic(prefer_literal=True)
def _write_planes(typing_context, lanes, kind, to, source, plane, count, channels):
    """``to[c * plane + i] = source[i, c]`` for i < count, c < channels; source is read in whole squares."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, source, plane, count, channels = values[2:]
        emit = Vectors(builder, of, L)
        at = [_far(builder, to, plane, c) for c in range(L)]

        def square(i, some):
            masks = [None] * L if some is None else _square_masks(emit, some, channels)
            start = _far(builder, source, i, L)
            rows = [emit.load(_far(builder, start, n * L)) for n in range(L)]
            for place, mask, row in zip(at, masks, simd.turned(builder, rows), strict=True):
                emit.write(row, builder.gep(place, [i]), mask)

        _squares(emit, count, channels, square)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, to, source, i64, i64, i64), generate


def _by_size(builder, size, cases):
    """Run the one of `cases` (functions that return equally many values) that is number `size` from 1 on;
    its values."""
    after = builder.append_basic_block("after")
    blocks = [builder.append_basic_block("case") for _ in cases]
    switch = builder.switch(size, blocks[0])
    results = []
    for number, (block, case) in enumerate(zip(blocks, cases, strict=True), 1):
        if number > 1:
            switch.add_case(int_constant(number), block)
        builder.position_at_end(block)
        results.append((case(), builder.block))
        builder.branch(after)
    builder.position_at_end(after)
    joined = []
    for index in range(len(results[0][0])):
        phi = builder.phi(results[0][0][index].type)
        for values, block in results:
            phi.add_incoming(values[index], block)
        joined.append(phi)
    return joined


def _where(builder, condition, values, others):
    """What `others` returns where the condition holds, `values` elsewhere."""
    before = builder.block
    with builder.if_then(condition):
        found = others()
        there = builder.block
    joined = []
    for value, other in zip(values, found, strict=True):
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        phi.add_incoming(other, there)
        joined.append(phi)
    return joined


def _add_columns(emit, placed, near, count, row, sums, products):
    """Add to `sums` what `count` neighbouring vectors of x from `near` on are factors of: `products` names
    for a column pairs (number of a sum, other factor). Where x is read in place they are `step` apart, and
    those that are not among the row's columns are left out: `row` is (step, column of the first one, columns
    from one to the next, width).

    A branch a column is foreseen, and costs less than to choose what is read: whatever is not there is not
    multiplied either.
    """
    builder = emit.builder
    step, at, by, width = row
    sums = list(sums)
    for column in range(count):
        pairs = products(column)
        before = [sums[number] for number, _ in pairs]

        def added(place, pairs=pairs, before=before):
            value = emit.load(place)
            return [
                emit.multiply_add(factor, value, former)
                for (_, factor), former in zip(pairs, before, strict=True)
            ]

        if placed:
            there = builder.icmp_unsigned("<", at, width)
            after = _where(
                builder, there, before, lambda c=column: added(_far(builder, near, step, c))
            )
            at = builder.add(at, by)
        else:
            after = added(_far(builder, near, column * emit.lanes))
        for (number, _), value in zip(pairs, after, strict=True):
            sums[number] = value
    return sums


@intrinsic(prefer_literal=True)
def _correlate_run(
    typing_context, lanes, run, kind, placed, to, step, count, skip, channels, x, row, w, w_step, segments,
    length, finish, clamped, past,
):  # fmt: skip
    """``to[b * step] = clamp(shift + sum_t w[t] * x[b + t])`` for b < count <= run, in vectors, of which
    `channels` lanes behind the first `skip` are written.

    The taps come as `length` segments of four int64: elements to go in x and in w, how many neighbours, and
    the first one's column; in w those are `w_step` elements apart. `row` is `_columns`'s account of a row,
    with the column of what a segment at column 0 would read. `finish` holds three vectors: shift, and the
    clamp's limits, if there is one. With `past` y is written past the caches; of the vectors then either all
    lanes count or the latter half, which is a line of memory.
    """
    L, B, of = lanes.literal_value, run.literal_value, kind.literal_value
    in_place = placed.literal_value

    def generate(context, builder, signature, values):
        (
            to, step, count, skip, channels, x, row, w, w_step, segments, length, finish, clamped, past,
        ) = values[4:]  # fmt: skip
        emit = Vectors(builder, of, L)
        x_step, first, by, width = (builder.extract_value(row, n) for n in range(4))
        shift, low, high = (emit.load(_far(builder, finish, n * L)) for n in range(3))
        loop = Loop(builder, int_constant(0), length, 1, [shift] * B)
        four = _far(builder, segments, loop.index, 4)
        from_x, from_w, size, place = (builder.load(_far(builder, four, n)) for n in range(4))
        near, taps = builder.gep(x, [from_x]), builder.gep(w, [from_w])
        wide = x_step, builder.add(first, place), by, width

        def segment(number):
            def added():
                factors = [emit.load(_far(builder, taps, w_step, j)) for j in range(number)]

                def products(c):
                    return [(c - j, factors[j]) for j in range(number) if 0 <= c - j < B]

                columns = B + number - 1
                return _add_columns(emit, in_place, near, columns, wide, loop.carried, products)

            return added

        sums = _by_size(builder, size, [segment(n) for n in range(1, SEGMENT + 1)])
        sums = loop.close(sums)

        def limited():
            # Comparisons that a NaN fails leave it as it is.
            above = [builder.select(builder.fcmp_ordered("<", z, low), low, z) for z in sums]
            return [builder.select(builder.fcmp_ordered(">", z, high), high, z) for z in above]

        limits = builder.icmp_signed("!=", clamped, int_constant(0))
        results = _where(builder, limits, sums, limited)

        def written(write):
            for b, z in enumerate(results):
                with builder.if_then(builder.icmp_signed(">", count, int_constant(b))):
                    write(z, _far(builder, to, step, b))

        def latter_half(z, place):
            half = Vectors(builder, of, L // 2)
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), L // 2), list(range(L // 2, L)))
            z = builder.shuffle_vector(z, z, lanes)
            half.write(z, _far(builder, place, L // 2), past=True)

        def written_near():
            full = builder.and_(every, builder.icmp_signed("==", count, int_constant(B)))
            with builder.if_else(full) as (whole, part):
                with whole:
                    for b, z in enumerate(results):
                        emit.write(z, _far(builder, to, step, b))
                with part:
                    mask = _lanes(emit, skip, channels)
                    written(lambda z, place: emit.write(z, place, mask))

        def written_past():
            with builder.if_else(every) as (whole, part):
                with whole:
                    written(lambda z, place: emit.write(z, place, past=True))
                with part:
                    written(latter_half)

        every = builder.icmp_signed("==", channels, int_constant(L))
        if in_place:
            with builder.if_else(builder.icmp_signed("!=", past, int_constant(0))) as (far, near):
                with far:
                    written_past()
                with near:
                    written_near()
        else:
            written_near()
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.void(
        lanes, run, kind, placed, to, i64, i64, i64, i64, x, row, w, i64, types.CPointer(i64), i64, finish,
        i64, i64,
    )  # fmt: skip
    return signature, generate


@intrinsic(prefer_literal=True)
def _weigh_run(
    typing_context, lanes, run, placed, sums, step, segments, length, x, row, grads, grads_step, count
):  # fmt: skip
    """``sums[t] += sum_b grads[b * grads_step] * x[b + t]`` for b < count <= run and all taps, in vectors.
    Segments of taps and `row` are as `_correlate_run`'s."""
    L, B, in_place = lanes.literal_value, run.literal_value, placed.literal_value

    def generate(context, builder, signature, values):
        sums, step, segments, length, x, row, grads, grads_step, count = values[3:]
        emit = simd.Emit(builder, x.type.pointee, L)
        x_step, first, by, width = (builder.extract_value(row, n) for n in range(4))
        grads_step = grads_step if in_place else int_constant(L)

        def each(fresh_sums):
            loop = Loop(builder, int_constant(0), length, 1, [])
            four = _far(builder, segments, loop.index, 4)
            from_x, to_sums, size, place = (builder.load(_far(builder, four, n)) for n in range(4))
            near, taps = builder.gep(x, [from_x]), builder.gep(sums, [to_sums])
            column = builder.add(first, place)

            def segment(number):
                def products():
                    places = [_far(builder, taps, step, j) for j in range(number)]
                    fresh = fresh_sums(near, column, number)
                    for place, value in zip(places, fresh, strict=True):
                        emit.store(builder.fadd(emit.load(place), value), place)
                    return []

                return products

            _by_size(builder, size, [segment(n) for n in range(1, SEGMENT + 1)])
            loop.close([])

        def unrolled(near, column, number):
            wide = x_step, column, by, width

            def products(c):
                return [(j, held[c - j]) for j in range(number) if 0 <= c - j < B]

            zeros = [emit.zero()] * number
            return _add_columns(emit, in_place, near, B + number - 1, wide, zeros, products)

        def one_by_one(near, column, number):
            loop = Loop(builder, int_constant(0), count, 1, [emit.zero()] * number)
            value = emit.load(_far(builder, grads, loop.index, grads_step))
            place = _far(builder, near, loop.index, x_step if in_place else int_constant(L))
            column = builder.add(column, builder.mul(loop.index, by))
            wide = x_step, column, by, width
            sums = _add_columns(
                emit, in_place, place, number, wide, loop.carried, lambda c: [(c, value)]
            )
            return loop.close(sums)

        with builder.if_else(builder.icmp_signed("==", count, int_constant(B))) as (whole, part):
            with whole:
                held = [emit.load(_far(builder, grads, grads_step, b)) for b in range(B)]
                each(unrolled)
            with part:
                each(one_by_one)
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.void(
        lanes, run, placed, sums, i64, types.CPointer(i64), i64, x, row, grads, i64, i64
    )
    return signature, generate


# ---- kernels ----------------------------------------------------------------------------------------------


@lru_cache(None)
def _pack(kind: str, V: int, L: int) -> Task:
    T = _computed(kind)
    args = layout(f"int64*2 {T}* int32* int64*3")

    def depthwise_pack(address: int, index: int, scratch: int) -> None:
        """Filters ``[C] [tap]``, times the epilogue's scale, to ``[tap] [L]``, for the channels of one
        vector; zero for other lanes. With `overlap` there are none: the last vector has channels twice.
        V of the L lanes are done at a time; a row behind the taps takes what nobody needs."""
        w, scale, packed, places, C, taps, overlap = unpack(address, args)
        first = min(index * L, C - L) if overlap else index * L
        factors = pointer(scratch, T)
        for v in range(0, L, V):
            some = min(V, C - first - v)
            to = ahead(packed, index * (taps + 1) * L + v)
            source = ahead(elements(w, kind), (first + v) * taps)
            _read_planes(V, kind, to, places, source, taps, taps, some, taps * L // V)
            if scale != 0:
                for j in range(V):
                    factors[j] = 0
                vectors.widen(V, kind, factors, ahead(elements(scale, kind), first + v), some)
                for t in range(taps):
                    for j in range(V):
                        to[t * L + j] *= factors[j]

    return Task(depthwise_pack, args)


@routine
def _bring_rows(
    L, kind, last, lines, pitch, places, source, size, strides, channels, ring, row, spare, former, top,
    flat,
):  # fmt: skip
    """Rows ``former + 1 … top`` of a plane of `size` to their slots in `lines`, the whole plane if that is
    `flat`; the number of the last row that is there. From vector to vector of channels it is `pitch`."""
    H, W = size
    xc, xh, xw = strides
    if last:
        for i in range(former + 1, top + 1):
            to = ahead(lines, i % ring * row * L)
            _read_channels(L, kind, to, pitch, places, ahead(source, i * xh), xw, W, channels)
        return top
    for c in range(0, channels, L):
        some = min(L, channels - c)
        near, to = ahead(source, c * xc), ahead(lines, c // L * pitch)
        if flat:
            _read_planes(L, kind, to, places, near, xc, H * W, some, spare)
        else:
            for i in range(former + 1, top + 1):
                slot = ahead(to, i % ring * row * L)
                _read_planes(L, kind, slot, places, ahead(near, i * xh), xc, W, some, spare)
    return H - 1 if flat else top


@routine(forceinline=True)
def _list_segments(L, placed, segments, depth, line, across, sizes, kernel, ring, row, strides):
    """The segments that one class of a row of outputs goes through, and their number. Along each axis they
    come as (start, stop, taps, places)."""
    (d0, d1, taps_d, places_d), (h0, h1, taps_h, slots_h) = depth, line
    w0, w1, taps_w, places_w = across
    R, S = kernel
    xd, xh, xw = strides
    length = 0
    for a in range(d0, d1):
        for b in range(h0, h1):
            tap = (taps_d[a] * R + taps_h[b]) * S
            from_x = ((a - d0) * ring + slots_h[b]) * row * L
            if placed:
                from_x = places_d[a] * xd + slots_h[b] * xh
            for s in range(w0, w1):
                segment = ahead(segments, 4 * length)
                segment[0] = from_x + places_w[s] * (xw if placed else L)
                segment[1] = (tap + taps_w[s]) * L
                segment[2] = sizes[s]
                segment[3] = places_w[s]
                length += 1
    return length


@routine(forceinline=True)
def _ask_some(x, count, at, rows, columns, pitch):
    """Ask for `count` elements from `at`, a row and a place in it, on: of the rows before `rows` those from
    the first to before the second of `columns`. Where to go on."""
    (i, j), (j0, j1) = at, columns
    while count > 0 and i < rows:
        some = min(count, j1 - j)
        simd.ask(ahead(x, i * pitch + j), some)
        count -= some
        j += some
        if j == j1:
            i, j = i + 1, j0
    return i, j


@lru_cache(None)
def _correlate(
    kind: str, L: int, B: int, placed: int, x_last: bool, y_last: bool, finishing: bool
) -> Task:  # fmt: skip
    T = _computed(kind)
    real = np.float64 if T == "float64" else np.float32
    straight = y_last and not finishing
    args = layout(f"int64*2 {T}* int64*3 float64*2 int32**15 int64*42")

    def depthwise_correlate(address: int, index: int, scratch: int) -> None:
        """Some rows of one image, for the channels of some vectors."""
        (
            x, y, w, bias, residual, activation, low, high,
            starts_d, taps_d, places_d, starts_h, taps_h, slots_h, first_h, top_h,
            places, numbers, starts_w, taps_w, places_w, sizes_w, widths,
            C, Z, P, Q, H, W, R, S, taps, classes, w_step, by, ring, row, pitch, group, share, shares,
            rows, band, bands, most, room, segments_at, finish_at, out_at, beside_at, reach,
            asks, in_lines, flat_x, flat_y, xn, xc, xd, xh, xw, yn, yk, yd, yh, yw,
        ) = unpack(address, args)  # fmt: skip
        past = in_lines if y % LINE == 0 else 0
        part = index % shares
        rest = index // shares
        p0 = rest % bands * band
        rest //= bands
        z, n = rest % Z, rest // Z
        p1 = min(p0 + band, P)
        lines = pointer(scratch, T)
        lengths = pointer(scratch + segments_at, "int64")
        segments = ahead(lengths, rows * classes)
        finish = pointer(scratch + finish_at, T)
        out = pointer(scratch + out_at, T)
        beside = pointer(scratch + beside_at, T)
        none = pointer(0, T)
        clamped = low > -math.inf
        for j in range(room):
            lines[j] = 0
        for j in range(L):
            finish[j], finish[L + j], finish[2 * L + j] = 0, low, high
        d0, d1 = starts_d[z], starts_d[z + 1]
        deepest = ahead(elements(x, T), n * xn + (places_d[d1 - 1] * xd if d1 > d0 else 0))
        behind = min((part + 1) * share, (C + L - 1) // L)
        for first in range(part * share, behind, group):
            c = first * L
            channels = min(min(group, behind - first) * L, C - c)
            source = ahead(elements(x, kind), n * xn + c * xc)
            goal = n * yn + c * yk + z * yd
            last = first_h[p0] - 1
            for block in range(p0, p1, rows):
                end = min(block + rows, p1)
                top = top_h[end - 1]
                if top > last and not placed:
                    for a in range(d0, d1):
                        loaded = _bring_rows(
                            L, kind, x_last, ahead(lines, (a - d0) * ring * row * L), pitch, places,
                            ahead(source, places_d[a] * xd), (H, W), (xc, xh, xw), channels,
                            ring, row, row - 1, last, top, flat_x,
                        )  # fmt: skip
                        top = max(top, loaded)
                    last = top
                for p in range(block, end):
                    for k in range(classes):
                        number = (p - block) * classes + k
                        lengths[number] = _list_segments(
                            L, placed, ahead(segments, number * most * 4), (d0, d1, taps_d, places_d),
                            (starts_h[p], starts_h[p + 1], taps_h, slots_h),
                            (starts_w[k], starts_w[k + 1], taps_w, places_w), sizes_w,
                            (R, S), ring, row, (xd, xh, xw),
                        )  # fmt: skip
                # All channels of a few places, so that y is written in its order where they are innermost.
                for q in range(0, widths[0], B):
                    if placed:
                        # Meanwhile what the next places are the first to read is asked for.
                        i = top_h[block - 1] + 1 if block > p0 else first_h[p0]
                        i1 = top_h[end - 1] + 1
                        j0, j1 = q * by + reach, (q + B) * by + reach
                        if q + B >= widths[0]:
                            i, i1 = i1, top_h[min(end + rows, p1) - 1] + 1
                            j0, j1 = 0, reach
                        j0, j1 = min(max(j0, 0), W) * C, min(max(j1, 0), W) * C
                        if not asks or channels < C or j0 == j1:
                            i1 = i
                        steps = (channels + L - 1) // L * (end - block)
                        each = ((i1 - i) * (j1 - j0) + steps - 1) // steps
                        j = j0
                    for v in range(0, channels, L):
                        some = min(L, channels - v)
                        skip = L - some if placed else 0
                        filters = ahead(w, (c + v) * (taps + 1))
                        if bias != 0:
                            shift = ahead(elements(bias, kind), c + v - skip)
                            vectors.widen(L, kind, finish, shift, min(L, C - c - v + skip))
                        for p in range(block, end):
                            if placed:
                                i, j = _ask_some(deepest, each, (i, j), i1, (j0, j1), xh)
                            for k in range(classes):
                                number = (p - block) * classes + k
                                count = min(B, widths[k] - q)
                                picks = ahead(segments, number * most * 4)
                                place = goal + v * yk + p * yh + (k + q * classes) * yw - skip
                                if placed:
                                    near = ahead(
                                        elements(x, T), n * xn + c + v - skip + q * by * xw
                                    )
                                    line = (by * xw, q * by, by, W)
                                else:
                                    near = ahead(lines, v // L * pitch + q * L)
                                    line = (by, by, by, W)
                                if straight:
                                    _correlate_run(
                                        L, B, kind, placed, ahead(elements(y, kind), place), classes * yw,
                                        count, skip, some, near, line, filters, w_step * L, picks,
                                        lengths[number], finish, clamped, past,
                                    )  # fmt: skip
                                    continue
                                at = 0
                                if not y_last:
                                    at = ((p - p0) * Q if flat_y else 0) + k + q * classes
                                _correlate_run(
                                    L, B, T, placed, ahead(out, at * L), L if y_last else classes * L,
                                    count, 0, L, near, line, filters, w_step * L, picks,
                                    lengths[number], finish, clamped, 0,
                                )  # fmt: skip
                                if not y_last:
                                    continue
                                step = classes * yw
                                to = ahead(elements(y, kind), place)
                                if residual != 0:
                                    from_y = ahead(elements(residual, kind), place)
                                    _read_channels(
                                        L,
                                        kind,
                                        beside,
                                        0,
                                        numbers,
                                        from_y,
                                        step,
                                        count,
                                        skip + some,
                                    )
                                simd.finish(
                                    L, out, out, beside if residual != 0 else none, count * L,
                                    real(1), real(-0.0), activation, 0,
                                )  # fmt: skip
                                _write_channels(L, kind, to, out, step, count, skip, some)
                if y_last or (flat_y and end < p1):
                    continue
                count = (p1 - p0) * Q if flat_y else Q
                place = goal + (p0 if flat_y else block) * yh
                if finishing:
                    if residual != 0:
                        from_y = ahead(elements(residual, kind), place)
                        _read_planes(L, kind, beside, numbers, from_y, yk, count, channels, count)
                    simd.finish(
                        L, out, out, beside if residual != 0 else none, count * L, real(1), real(-0.0),
                        activation, 0,
                    )  # fmt: skip
                _write_planes(L, kind, ahead(elements(y, kind), place), out, yk, count, channels)

    return Task(depthwise_correlate, args)


@lru_cache(None)
def _weights(kind: str, L: int, B: int, placed: int, x_last: bool, y_last: bool) -> Task:
    T = _computed(kind)
    args = layout(f"int64*2 {T}* int32**13 int64*41")

    def depthwise_weights(address: int, index: int, scratch: int) -> None:
        """A share of the places, for the channels of some vectors: ``sums [vector] [tap] [L]``."""
        (
            x, grad_y, sums,
            starts_d, taps_d, places_d, starts_h, taps_h, slots_h, first_h, top_h,
            places, numbers, taps_w, places_w, sizes_w,
            N, C, Z, P, Q, H, W, R, S, taps, count_w, w_step, by, ring, row, pitch, share, shares,
            rows, band, bands, groups, flush, most, room, segments_at, sums_at, grads_at, grads_pitch,
            flat_x, flat_y, xn, xc, xd, xh, xw, yn, yk, yd, yh, yw,
        ) = unpack(address, args)  # fmt: skip
        blocks = (C + L - 1) // L
        c = index % shares * share * L
        channels = min(share * L, C - c)
        split = index // shares
        p0 = split % bands * band
        p1 = min(p0 + band, P)
        part = split // bands
        lines = pointer(scratch, T)
        lengths = pointer(scratch + segments_at, "int64")
        segments = ahead(lengths, rows)
        short = pointer(scratch + sums_at, T)
        grads = pointer(scratch + grads_at, T)
        sums = ahead(sums, (split * blocks * L + c) * taps)
        count = (channels + L - 1) // L * L * taps
        for j in range(room):
            lines[j] = 0
        for j in range(count):
            sums[j] = 0
            short[j] = 0
        terms = 0
        for n in range(part * N // groups, (part + 1) * N // groups):
            source = ahead(elements(x, kind), n * xn + c * xc)
            for z in range(Z):
                from_y = ahead(elements(grad_y, kind), n * yn + c * yk + z * yd)
                d0, d1 = starts_d[z], starts_d[z + 1]
                last = first_h[p0] - 1
                for block in range(p0, p1, rows):
                    end = min(block + rows, p1)
                    top = top_h[end - 1]
                    if top > last and not placed:
                        for a in range(d0, d1):
                            loaded = _bring_rows(
                                L, kind, x_last, ahead(lines, (a - d0) * ring * row * L), pitch, places,
                                ahead(source, places_d[a] * xd), (H, W), (xc, xh, xw), channels,
                                ring, row, row - 1, last, top, flat_x,
                            )  # fmt: skip
                            top = max(top, loaded)
                        last = top
                    if placed:
                        pass
                    elif flat_y:
                        if block == p0:
                            _bring_rows(
                                L, kind, y_last, grads, grads_pitch, numbers, ahead(from_y, p0 * yh),
                                (p1 - p0, Q), (yk, yh, yw), channels, 1, Q, (p1 - p0) * Q, -1, 0, True,
                            )  # fmt: skip
                    else:
                        _bring_rows(
                            L, kind, y_last, grads, grads_pitch, numbers, ahead(from_y, block * yh),
                            (rows, Q), (yk, yh, yw), channels, rows, Q, Q, -1, end - block - 1, False,
                        )  # fmt: skip
                    for p in range(block, end):
                        lengths[p - block] = _list_segments(
                            L, placed, ahead(segments, (p - block) * most * 4),
                            (d0, d1, taps_d, places_d), (starts_h[p], starts_h[p + 1], taps_h, slots_h),
                            (0, count_w, taps_w, places_w), sizes_w, (R, S), ring, row, (xd, xh, xw),
                        )  # fmt: skip
                    for q in range(0, Q, B):
                        for v in range(0, channels, L):
                            back = max(v + L - channels, 0)
                            for p in range(block, end):
                                if placed:
                                    near = ahead(
                                        elements(x, T), n * xn + c + v - back + q * by * xw
                                    )
                                    line = (by * xw, q * by, by, W)
                                    held = ahead(
                                        elements(grad_y, T),
                                        n * yn + c + v - back + z * yd + p * yh + q * yw,
                                    )
                                else:
                                    near = ahead(lines, v // L * pitch + q * L)
                                    line = (by, by, by, W)
                                    row_y = p - (p0 if flat_y else block)
                                    held = ahead(grads, v // L * grads_pitch + (row_y * Q + q) * L)
                                _weigh_run(
                                    L, B, placed, ahead(short, v * taps), w_step * L,
                                    ahead(segments, (p - block) * most * 4), lengths[p - block],
                                    near, line, held, yw, min(B, Q - q),
                                )  # fmt: skip
                    terms += (end - block) * ((Q + B - 1) // B)
                    if terms >= flush:
                        terms = 0
                        for j in range(count):
                            sums[j] += short[j]
                            short[j] = 0
        for j in range(count):
            sums[j] += short[j]

    return Task(depthwise_weights, args)


@lru_cache(None)
def _add_splits(kind: str, V: int, L: int) -> Task:
    T = _computed(kind)
    args = layout(f"{T}* int64*5")

    def depthwise_add_splits(address: int, index: int, scratch: int) -> None:
        """The gradient of V filters: the splits' sums, added in their order, in float64."""
        sums, grad_w, C, taps, splits, overlap = unpack(address, args)
        blocks = (C + L - 1) // L
        block, v = index * V // L, index * V % L
        # Of the block's lanes those behind the first `skip` count.
        some = min(L, C - block * L)
        skip = L - some if overlap else 0
        first, behind = max(skip, v), min(skip + some, v + V)
        totals = pointer(scratch, T)
        source = ahead(sums, block * taps * L + v)
        _add_up(V, T, totals, source, taps, L, splits, blocks * taps * L)
        if first < behind:
            to = ahead(elements(grad_w, kind), (block * L + first - skip) * taps)
            _write_planes(V, kind, to, ahead(totals, first - v), taps, taps, behind - first)

    return Task(depthwise_add_splits, args)


# ---- plans ------------------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """One axis of a correlation: ``y[o] = sum_t w[t] x[...]``, `out` outputs o of `size` places.

    Outputs fall into as many classes as there are in `classes`: of class k, number j is output ``k + j *
    len(classes)``, and reads x at ``place + j * step`` for each of the class's (tap, place).
    """

    size: int
    out: int
    step: int
    classes: tuple[tuple[tuple[int, int], ...], ...]

    def reads(self, o: int) -> list[tuple[int, int]]:
        """(place, tap) of one output, in the order of places, inside of x."""
        j, k = divmod(o, len(self.classes))
        found = ((place + j * self.step, tap) for tap, place in self.classes[k])
        return sorted((place, tap) for place, tap in found if 0 <= place < self.size)


def _axes(shape: ConvShape, transposed: bool) -> list[_Axis]:
    """Of the forward pass, or of the input gradient, whose x is grad_y."""
    missing = 3 - shape.dims
    ones = (1,) * missing
    steps, dilations = ones + shape.stride, ones + shape.dilation
    pads = (0,) * missing + tuple(before for before, _ in shape.padding)
    axes = []
    for a in range(3):
        s, d, pad, taps = steps[a], dilations[a], pads[a], range(shape.TRS[a])
        if transposed:
            classes = tuple(
                tuple((r, (k + pad - r * d) // s) for r in taps if (k + pad - r * d) % s == 0)
                for k in range(s)
            )
            axes.append(_Axis(shape.ZPQ[a], shape.DHW[a], 1, classes))
        else:
            classes = (tuple((r, r * d - pad) for r in taps),)
            axes.append(_Axis(shape.DHW[a], shape.ZPQ[a], s, classes))
    return axes


def _int32(values: object) -> np.ndarray:
    return np.array(values, np.int32).reshape(-1)


def _lists(axis: _Axis) -> tuple[list[int], list[int], list[int]]:
    """What the outputs of an axis read, one behind another: where each one's begins, taps and places."""
    reads = [axis.reads(o) for o in range(axis.out)]
    starts = [0, *accumulate(map(len, reads))]
    return starts, [tap for r in reads for _, tap in r], [place for r in reads for place, _ in r]


class _Rows:
    """How the second axis goes through a ring of rows: `first` row that an output or a later one reads, `top`
    that it or a former one reads."""

    def __init__(self, axis: _Axis) -> None:
        reads = [[place for place, _ in axis.reads(o)] for o in range(axis.out)]
        self.most = max(map(len, reads))
        self.top = list(accumulate((max(r, default=-1) for r in reads), max))
        first = list(accumulate((min(r, default=axis.size) for r in reversed(reads)), min))
        self.first = first[::-1]

    def ring(self, rows: int) -> int:
        """Slots for what so many outputs in a row read."""
        tops = [*self.top[rows - 1 :], *self.top[-1:] * (rows - 1)]
        return max(1, *(t - f + 1 for t, f in zip(tops, self.first, strict=True)))


class _Row:
    """How a row of x lies in scratch, and the segments of taps that the classes of outputs go through.

    `places` of each of the row's elements; `pitch` places a row, the last one for what nobody reads.
    """

    def __init__(self, axis: _Axis) -> None:
        low = min((place for taps in axis.classes for _, place in taps), default=0)
        self.widths = [-(-(axis.out - k) // len(axis.classes)) for k in range(len(axis.classes))]
        beyond = [[(place - low, tap) for tap, place in taps] for taps in axis.classes]
        phases = sorted({place % axis.step for taps in beyond for place, _ in taps})
        length = 1 + max(
            (place // axis.step + width - 1
             for taps, width in zip(beyond, self.widths, strict=True) for place, _ in taps),
            default=0,
        )  # fmt: skip
        self.pitch = len(phases) * length + 1
        self.places = []
        for place in range(axis.size):
            number, phase = divmod(place - low, axis.step)
            there = phase in phases and 0 <= number < length
            self.places.append(phases.index(phase) * length + number if there else self.pitch - 1)
        self.w_step = 0
        self.starts, self.segments = [0], []
        for taps in beyond:
            for number, phase in enumerate(phases):
                slots = sorted(
                    (number * length + place // axis.step, tap)
                    for place, tap in taps
                    if place % axis.step == phase
                )
                for run in self._runs(slots):
                    if len(run) > 1:
                        self.w_step = run[1][1] - run[0][1]
                    for piece in np.array_split(run, -(-len(run) // SEGMENT)):
                        slot, tap = piece[0].tolist()
                        place = low + phase + (slot - number * length) * axis.step
                        self.segments.append((slot, tap, len(piece), place))
            self.starts.append(len(self.segments))

    @staticmethod
    def _runs(slots: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Neighbouring places. Their taps are equally far apart in all of an axis's runs."""
        run: list[tuple[int, int]] = []
        for slot in slots:
            if run and slot[0] != run[-1][0] + 1:
                yield run
                run = []
            run.append(slot)
        if run:
            yield run


def _run_length(widths: Sequence[int], vectors: int) -> int:
    """How many outputs of so many vectors to keep in registers: the most of those that compute the fewest in
    vain."""
    lengths: tuple[int, ...] = (8,) if vectors == 1 else (4,)
    if simd.tiles().gemm_thin[1] >= 8:
        lengths = (14, 8) if vectors == 1 else (8, 7)
    return min(lengths, key=lambda B: (sum(-(-width // B) * B for width in widths), -B))


def _in_place(shape: ConvShape, kind: str, last: bool) -> tuple[bool, int]:
    """Whether x is read where it is, channels `last` on both sides, and how many vectors of channels are
    together: two if there are as many, so that whole pairs of memory's lines are asked for."""
    T = _computed(kind)
    placed = last and kind == T and shape.C >= simd.lanes(T)
    return placed, 2 if placed and shape.C >= 2 * simd.lanes(T) else 1


class _Lines:
    """How rows of x come into scratch: what both kernels know of it."""

    def __init__(
        self, axes: Sequence[_Axis], L: int, itemsize: int, placed: bool, x_last: bool, group: bool,
        rows: int,
    ) -> None:  # fmt: skip
        depth, (H, W) = axes[0], (axes[1].size, axes[2].size)
        self.row, spans = _Row(axes[2]), _Rows(axes[1])
        depths = max(len(depth.reads(z)) for z in range(depth.out))
        # Rows that waste much of their vectors come as a whole plane, where that is contiguous.
        self.flat = not x_last and W < 2 * L and depths * H * self.row.pitch * L <= FLAT
        self.rows = min(rows, axes[1].out) if group else 1
        self.least = 4 * min(ROWS, self.rows)  # rows that are worth a task of their own
        self.ring = max(H, 1) if self.flat else spans.ring(self.rows)
        self.pitch = depths * self.ring * self.row.pitch * L
        # Channels that are innermost come together, as many as the second-level cache holds.
        self.group = max(1, LINES_BYTES // (self.pitch * itemsize)) if group else 1
        if placed:
            self.group = GROUP
        most = max(np.diff(self.row.starts))
        self.most = int(depths * spans.most * most)
        starts, taps, lines = _lists(axes[1])
        whole = range(H if self.flat else 1)
        places = np.add.outer(np.arange(len(whole)) * self.row.pitch, self.row.places)
        self.tables = [
            *map(_int32, _lists(depth)),
            _int32(starts), _int32(taps), _int32(lines if placed else np.array(lines, int) % self.ring),
            _int32(spans.first), _int32(spans.top),
            np.concatenate([_int32(places), np.zeros(L, np.int32)]),
        ]  # fmt: skip
        picks = _int32(self.row.segments).reshape(-1, 4).T
        self.picks = [*map(_int32, (picks[1], picks[3] if placed else picks[0], picks[2]))]

    def room(self, vectors: int, B: int, L: int) -> int:
        """Elements, with what the last run may read beyond them."""
        return vectors * self.pitch + (B + SEGMENT) * L


def _in_lines(y: torch.Tensor) -> bool:
    """Whether the channels of every place are whole lines of memory, if y begins with one."""
    steps = (y.shape[1], y.stride(0), *y.stride()[2:])
    return all(y.element_size() * step % LINE == 0 for step in steps)


class _Correlation:
    """The forward pass or the input gradient: all that does not change from call to call."""

    def __init__(
        self,
        shape: ConvShape,
        kind: str,
        transposed: bool,
        x_last: bool,
        y_last: bool,
        threads: int,
    ) -> None:
        T = _computed(kind)
        itemsize = np.dtype(T).itemsize
        axes = _axes(shape, transposed)
        placed, wide = _in_place(shape, kind, x_last and y_last)
        L, B = wide * simd.lanes(T), _run_length(_Row(axes[2]).widths, wide)
        span = B * len(axes[2].classes) * shape.C * itemsize
        rows = max(1, min(PLACED_ROWS, SPAN_BYTES // span)) if placed else ROWS
        lines = _Lines(axes, L, itemsize, placed, x_last, y_last, rows)
        row = lines.row
        N, C, taps = shape.N, shape.C, math.prod(shape.TRS)
        blocks = -(-C // L)
        (Z, P, Q), (H, W) = (axis.out for axis in axes), (axes[1].size, axes[2].size)
        shares = -(-blocks // lines.group)
        if not y_last:
            # So much work that a task's own set-up is small beside it.
            shares = -(-blocks // max(1, 10_000 // (P * Q * (taps + 8))))
        bands = 1
        while N * Z * bands * shares < 3 * threads and bands * lines.least < P:
            bands *= 2
        while N * Z * bands * shares < 3 * threads and shares < blocks:
            shares = min(2 * shares, blocks)
        share, band = -(-blocks // shares), -(-P // bands)
        shares, bands = -(-blocks // share), -(-P // band)
        group = min(share, lines.group)
        flat_y = not y_last and Q < 2 * L and band * Q * L <= FLAT
        count_out = B if y_last else band * Q if flat_y else Q
        room = 0 if placed else lines.room(group, B, L)
        segments_at = up(room * itemsize, 64)
        finish_at = up(segments_at + (8 + 32 * lines.most) * lines.rows * len(row.widths), 64)
        out_at = finish_at + 3 * L * itemsize
        beside_at = out_at + (count_out + L) * L * itemsize
        self._scratch_bytes = beside_at + (count_out + L) * L * itemsize
        self._task = partial(_correlate, kind, L, B, int(placed), x_last, y_last)
        self._count = N * Z * bands * shares
        self._work = float(N * Z * blocks * P * Q * (taps + 8))
        tables = [
            *lines.tables, np.arange(count_out + L, dtype=np.int32),
            _int32(row.starts), *lines.picks, _int32(row.widths),
        ]  # fmt: skip
        self._flat = lines.flat, flat_y
        self._sizes = W, Q
        self._values: tuple[Value, ...] = (
            *map(Table, tables),
            C, Z, P, Q, H, W, *shape.TRS[1:], taps, len(row.widths), row.w_step, axes[2].step,
            lines.ring, row.pitch, lines.pitch, group, share, shares, lines.rows, band, bands,
            lines.most, room, segments_at, finish_at, out_at, beside_at,
            # Behind the last place that the first run of outputs reads.
            max((place for taps in axes[2].classes for _, place in taps), default=0)
            + (B - 1) * axes[2].step + 1,
        )  # fmt: skip
        self._placed, self._blocks = placed, blocks
        self._pack, self._pack_count = _pack(kind, L // wide, L), blocks
        table = Table(_int32(range(0, taps * wide + L, wide)))
        self._pack_values: tuple[Value, ...] = table, C, taps, placed
        self._pack_bytes = L * itemsize
        self._packed_size = blocks * (taps + 1) * L
        self._packed_type = torch.float64 if T == "float64" else torch.float32

    def run(
        self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor,
        epilogue: Epilogue | None,
    ) -> None:  # fmt: skip
        scale, residual, activation = (epilogue or NO_EPILOGUE)[:3]
        packed = Shared(self._packed_size * self._packed_type.itemsize)
        self._pack.run(
            self._pack_count, 2.0 * self._packed_size,
            w, scale, packed, *self._pack_values,
            scratch_bytes=self._pack_bytes,
        )  # fmt: skip
        limits = simd.LIMITS.get(activation) if residual is None else None
        from_x, from_y = strides(x), strides(y)
        (flat_x, flat_y), (W, Q) = self._flat, self._sizes
        far = self._placed and x.nbytes + y.nbytes >= 2 * simd.PAST
        # The vectors of one block follow each other: the core itself sees what comes next.
        asks = far and self._blocks > 1 and x.stride(-1) == x.shape[1]
        self._task(limits is None).run(
            self._count, self._work,
            x, y, packed, bias, residual, ACTIVATIONS.index(activation),
            *(limits or simd.LIMITS["none"]), *self._values, asks, far and _in_lines(y),
            flat_x and from_x[3] == W, flat_y and from_y[3] == Q, *from_x, *from_y,
            scratch_bytes=self._scratch_bytes,
        )  # fmt: skip


class _WeightGradient:
    """The weight gradient's plan. It depends on the shape and the layouts, never on the number of threads."""

    def __init__(self, shape: ConvShape, kind: str, x_last: bool, y_last: bool) -> None:
        T = _computed(kind)
        itemsize = np.dtype(T).itemsize
        axes = _axes(shape, False)
        (Z, P, Q), (H, W) = (axis.out for axis in axes), (axes[1].size, axes[2].size)
        together = x_last and y_last
        placed, wide = _in_place(shape, kind, together)
        L, B = wide * simd.lanes(T), _run_length([Q], wide)
        rows = PLACED_ROWS if placed else ROWS
        lines = _Lines(axes, L, itemsize, placed, x_last, together, rows)
        row = lines.row
        N, C, taps = shape.N, shape.C, math.prod(shape.TRS)
        blocks = -(-C // L)
        share = min(blocks, lines.group)
        shares = -(-blocks // share)
        # As for eight threads: many parts, but no more than leave each some rows.
        wanted = max(1, min(SPLITS, 128 // shares))
        groups = max(1, min(N, wanted))
        bands = 1 if lines.flat else max(1, min(wanted // groups, P // lines.least))
        band = -(-P // bands)
        bands = -(-P // band)
        flat_y = not y_last and Q < 2 * L and band * Q * L <= FLAT
        count_in = (band if flat_y else lines.rows) * Q
        room = 0 if placed else lines.room(share, B, L)
        segments_at = up(room * itemsize, 64)
        sums_at = up(segments_at + (8 + 32 * lines.most) * lines.rows, 64)
        grads_at = up(sums_at + (share * taps + 1) * L * itemsize, 64)
        grads_pitch = (count_in + 1) * L
        self._scratch_bytes = grads_at + (share * grads_pitch + L) * itemsize
        self._task = _weights(kind, L, B, int(placed), x_last, y_last)
        self._splits = groups * bands
        self._count = self._splits * shares
        self._work = float(N * Z * blocks * P * Q * (taps + 8))
        tables = [
            *lines.tables, np.arange(count_in + L, dtype=np.int32),
            *lines.picks,
        ]  # fmt: skip
        self._flat = lines.flat, flat_y
        self._sizes = W, Q
        self._values: tuple[Value, ...] = (
            *map(Table, tables),
            N, C, Z, P, Q, H, W, *shape.TRS[1:], taps, len(row.segments), row.w_step, axes[2].step,
            lines.ring, row.pitch, lines.pitch, share, shares, lines.rows, band, bands, groups, FLUSH,
            lines.most, room, segments_at, sums_at, grads_at, grads_pitch,
        )  # fmt: skip
        self._sums_type = torch.float64 if T == "float64" else torch.float32
        self._sums_size = self._splits * blocks * taps * L
        self._add = _add_splits(kind, L // wide, L)
        self._add_values = C, taps, self._splits, placed
        self._add_count = blocks * wide
        self._add_scratch_bytes = (up(taps, L) + 1) * L * 8

    def run(self, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor) -> None:
        sums = Shared(self._sums_size * self._sums_type.itemsize)
        from_x, from_y = strides(x), strides(grad_y)
        (flat_x, flat_y), (W, Q) = self._flat, self._sizes
        self._task.run(
            self._count, self._work, x, grad_y, sums, *self._values,
            flat_x and from_x[3] == W, flat_y and from_y[3] == Q, *from_x, *from_y,
            scratch_bytes=self._scratch_bytes,
        )  # fmt: skip
        self._add.run(
            self._add_count, float(self._sums_size), sums, grad_w, *self._add_values,
            scratch_bytes=self._add_scratch_bytes,
        )  # fmt: skip


_correlation = lru_cache(512)(_Correlation)
_weight_gradient = lru_cache(512)(_WeightGradient)


# ---- operations -------------------------------------------------------------------------------------------


def takes(shape: ConvShape, direction: str) -> bool:
    """Whether this is the way to compute `shape` in a direction, "fprop", "dgrad" or "wgrad"."""
    padded = any(p for pair in shape.padding for p in pair)
    if shape.padding_mode != "zeros" and padded:
        return False
    # What one vector of channels may take in scratch: the rows that a filter spans, and one of sums.
    T, R, _ = shape.TRS
    dilation = (1, 1, *shape.dilation)[-2]
    width = shape.DHW[2] + shape.ZPQ[2] + sum(map(abs, shape.padding[-1]))
    room = (T * ((R - 1) * dilation + 2) + 1) * width * simd.simd_bits() // 8
    return shape.groups == shape.C == shape.K and shape.C >= 8 and room <= ROOM_BYTES


def _is_last(t: torch.Tensor) -> bool:
    return t.stride(1) == 1


def _readable(t: torch.Tensor) -> torch.Tensor:
    """`t`, or a copy if neither its channels nor its rows are without gaps."""
    return t if t.stride(1) == 1 or t.stride(-1) == 1 else t.contiguous()


def _correlated(
    shape: ConvShape, transposed: bool, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None,
    y: torch.Tensor, epilogue: Epilogue | None,
) -> None:  # fmt: skip
    x, w, result = _readable(x), w.contiguous(), _readable(y)
    if result is not y and epilogue is not None and epilogue.residual is not None:
        epilogue = epilogue._replace(residual=epilogue.residual.contiguous())
    plan = _correlation(
        shape, KIND[x.dtype], transposed, _is_last(x), _is_last(result), torch.get_num_threads()
    )
    plan.run(x, w, None if bias is None else bias.contiguous(), result, epilogue)
    if result is not y:
        y.copy_(result)


def fprop(
    shape: ConvShape, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> None:  # fmt: skip
    """``y[n, c, o] = sum_t w[c, t] * x[n, c, o * stride + t * dilation - pad] + bias[c]``, or what else the
    `Epilogue` says, whose moments are left to the caller. All of one type, any strides."""
    _correlated(shape, False, x, w, bias, y, epilogue)


def dgrad(
    shape: ConvShape, grad_y: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None,
    grad_x: torch.Tensor, epilogue: Epilogue | None = None,
) -> None:  # fmt: skip
    """The gradient with respect to x, plus `bias`, and what else the `Epilogue` says."""
    _correlated(shape, True, grad_y, w, bias, grad_x, epilogue)


def wgrad(shape: ConvShape, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor) -> None:
    """The gradient with respect to w: the same bits for any number of threads."""
    grad_y, x = _readable(grad_y), _readable(x)
    result = grad_w.contiguous()
    plan = _weight_gradient(shape, KIND[x.dtype], _is_last(x), _is_last(grad_y))
    plan.run(grad_y, x, result)
    if result is not grad_w:
        grad_w.copy_(result)
