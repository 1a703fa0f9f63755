"""Micro-kernels for channels-last memory, where a place is a row of channels: LLVM IR as in `simd`.

`multiply` and `outer` keep a tile of `rows` times `width` accumulators in registers. One operand's elements
are broadcast, from wherever offsets say; the other's are whole vectors, packed one behind the other. `turn`
transposes on the way between the two orders of channels and places, `finish` is an epilogue along channels.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import platform
from functools import partial
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cnnops.cpu import simd
from cnnops.cpu.compiler import routine
from cnnops.cpu.vectors import Vectors

ROWS, OUTER_ROWS = 6, 4
"""Rows of a tile of `multiply`, and of `outer`, where channels come in fours. Tiles of one vector a row, of
`outer` those of two, have twice as many: additions would wait for one another."""


def vectors_a_tile() -> int:
    """For 32 vector registers, or for the 16 that x86 has below AVX-512."""
    return 4 if simd.simd_bits() == 512 or platform.machine() in ("aarch64", "arm64") else 2


def outer_rows(length: int) -> tuple[int, int]:
    """Rows of the tiles of `outer` for so many rows in all, and of those of at most two vectors a row: where
    there are few, of a height of which little is left over, as far as registers go."""
    wide, narrow = OUTER_ROWS, 2 * OUTER_ROWS
    if length >= 4 * narrow:
        return wide, narrow

    def left(rows: int) -> tuple[int, int]:
        return -length % rows, -rows

    most = 6 if vectors_a_tile() > 2 else 5
    return min(range(3, most + 1), key=left), min(range(5, 2 * most + 1), key=left)


def grain(lanes: int) -> int:
    """A tile is a multiple of so many columns wide: whole vectors, or halves of AVX-512's on CPUs that do
    these in two steps. Vectors of float64 are as short already."""
    return 8 if lanes == 16 and simd.in_two_steps() else lanes


@routine
def padded(K, lanes, full, grain):
    """So many columns as tiles have for K of them. Behind tiles of `full` columns comes at most one more: of
    three vectors, or of up to two in `grain`."""
    rest = K % full
    if rest > 3 * lanes:
        rest = full
    elif rest > 2 * lanes:
        rest = 3 * lanes
    else:
        rest = (rest + grain - 1) // grain * grain
    return K - K % full + rest


def _segments(builder: ir.IRBuilder, element: ir.Type, lanes: int, width: int) -> list[_Segment]:
    """`width` columns as vectors of so many lanes, and a last one of half as many."""
    whole = [
        _Segment(simd.Emit(builder, element, lanes), v) for v in range(0, width - lanes + 1, lanes)
    ]
    rest = width % lanes
    return [*whole, _Segment(simd.Emit(builder, element, rest), width - rest)] if rest else whole


class _Segment(NamedTuple):
    """One vector of a tile's columns, which column it begins with, and a mask where not all are there."""

    emit: simd.Emit
    column: int
    mask: ir.Value | None = None

    def first(self, count: ir.Value) -> _Segment:
        """Those of a tile's first `count` columns."""
        left = self.emit.builder.sub(count, simd.int_constant(self.column))
        return self._replace(mask=self.emit.first(left))

    def load(self, row: ir.Value) -> ir.Value:
        place = self.emit.builder.gep(row, [simd.int_constant(self.column)])
        return self.emit.load(place) if self.mask is None else self.emit.load_some(place, self.mask)

    def store(self, value: ir.Value, row: ir.Value) -> None:
        place = self.emit.builder.gep(row, [simd.int_constant(self.column)])
        if self.mask is None:
            self.emit.store(value, place)
        else:
            self.emit.store_some(value, place, self.mask)

    def first_of(self, vector: ir.Value) -> ir.Value:
        """As many lanes of a vector as this one has."""
        if self.emit.lanes == vector.type.count:
            return vector
        order = ir.Constant(
            ir.VectorType(ir.IntType(32), self.emit.lanes), [*range(self.emit.lanes)]
        )
        return self.emit.builder.shuffle_vector(vector, vector, order)


def _add_products(
    segments: list[_Segment], factor: ir.Value, right: list[ir.Value], sums: list[ir.Value]
) -> list[ir.Value]:
    """One row's sums with ``factor * right`` added; factor is a scalar."""
    builder = segments[0].emit.builder
    broadcast = simd.splat(builder, factor, max(segment.emit.lanes for segment in segments))
    return [
        segment.emit.multiply_add(segment.first_of(broadcast), value, former)
        for segment, value, former in zip(segments, right, sums, strict=True)
    ]


def _far(builder: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    return builder.load(builder.gep(table, [index]))


@intrinsic(prefer_literal=True)
def multiply(
    typing_context, lanes, rows, width, x, places, taps, tap_count, count, w, start, y, outs, some, more,
    later, later_step,
):  # fmt: skip
    """``y[outs[m] + v] = start[v] + sum_{t,c} x[places[m] + taps[t] + c] * w[t, c, v]``.

    For m < rows, v < some <= width, t < tap_count, c < count; `w` packed in this order, `width` columns of
    it, the tables int64, in elements. Where `more` is not 0, the sum is added to what y holds instead of
    `start`. As many places again must follow: the next tile's. With each term of a
    tile of several vectors a line of memory is asked for that is wanted `later`, the next one `later_step`
    elements further.
    """
    L, M, W = lanes.literal_value, rows.literal_value, width.literal_value

    def generate(context, builder, signature, values):
        x, places, taps, tap_count, count, w, start, y, outs, some, more, *ask = values[3:]
        later, later_step = ask
        element, at = x.type.pointee, simd.int_constant
        segments = _segments(builder, element, L, W)
        n = len(segments)
        near = [builder.gep(x, [_far(builder, places, at(m))]) for m in range(M)]
        following = [builder.gep(x, [_far(builder, places, at(M + m))]) for m in range(M)]
        nothing = [segment.emit.zero() for segment in segments] * M
        outer = simd.Loop(builder, at(0), tap_count, 1, nothing)
        shift = _far(builder, taps, outer.index)
        left = [builder.gep(place, [shift]) for place in near]
        block = builder.gep(w, [builder.mul(outer.index, builder.mul(count, at(W)))])
        # A line of each row at a time, and as much of the tile that follows is asked for.
        step = 64 // segments[0].emit.align
        pieces = simd.Loop(builder, at(0), count, step, outer.carried)
        for row in following:
            segments[0].emit.prefetch(builder.gep(row, [builder.add(shift, pieces.index)]))
        end = builder.add(pieces.index, at(step))
        end = builder.select(builder.icmp_signed("<", end, count), end, count)
        inner = simd.Loop(builder, pieces.index, end, 1, pieces.carried)
        line = builder.gep(block, [builder.mul(inner.index, at(W))])
        right = [segment.load(line) for segment in segments]
        if n > 1:  # loads are all that a tile of one vector waits for
            asked = builder.add(builder.mul(outer.index, count), inner.index)
            segments[0].emit.prefetch(builder.gep(later, [builder.mul(asked, later_step)]), 2)
        sums = []
        for m in range(M):
            factor = builder.load(builder.gep(left[m], [inner.index]))
            sums += _add_products(segments, factor, right, inner.carried[m * n : m * n + n])
        sums = outer.close(pieces.close(inner.close(sums)))
        # A long sum in stretches rounds less: what there was is added to this stretch's sum.
        again = builder.icmp_signed("!=", more, at(0))
        whole = builder.icmp_signed("==", some, at(W))
        with builder.if_else(whole) as branches:
            for masked, branch in zip((False, True), branches, strict=True):
                with branch:
                    parts = [part.first(some) if masked else part for part in segments]
                    for m in range(M):
                        to = builder.gep(y, [_far(builder, outs, at(m))])
                        former = builder.select(again, to, start)
                        for part, value in zip(parts, sums[m * n : m * n + n], strict=True):
                            part.store(builder.fadd(part.load(former), value), to)
        return context.get_dummy_value()

    i64 = types.int64
    table = types.CPointer(i64)
    signature = types.void(
        lanes, rows, width, x, table, table, i64, i64, x, x, x, table, i64, i64, x, i64
    )
    return signature, generate


def _generate_outer(builder, signature, values):
    """`outer`, or with three more values `outer_asking`."""
    L, M, W = (literal.literal_value for literal in signature.args[:3])
    x, places, count, g, step, sums, pitch, more, *asking = values[3:]
    at = simd.int_constant
    segments = _segments(builder, x.type.pointee, L, W)
    n = len(segments)
    nothing = [segment.emit.zero() for segment in segments] * M
    if asking:
        later, far, slowly = asking
        wanted = builder.icmp_signed("!=", later, at(0))
        start = builder.select(wanted, later, builder.ptrtoint(g, later.type))
    loop = simd.Loop(builder, at(0), count, 1, nothing)
    row = builder.gep(x, [_far(builder, places, loop.index)])
    line = builder.gep(g, [builder.mul(loop.index, step)])
    right = [segment.load(line) for segment in segments]
    if asking and n > 1:  # loads are all that a tile of one vector waits for
        further = _far(builder, far, builder.lshr(loop.index, slowly))
        address = builder.add(start, builder.select(wanted, further, at(0)))
        segments[0].emit.prefetch(builder.inttoptr(address, x.type), 2)
    found = []
    for m in range(M):
        factor = builder.load(builder.gep(row, [at(m)]))
        found += _add_products(segments, factor, right, loop.carried[m * n : m * n + n])
    found = loop.close(found)
    lines = [builder.gep(sums, [builder.mul(pitch, at(m))]) for m in range(M)]
    places_of = [(segment, line) for line in lines for segment in segments]
    before = builder.block
    with builder.if_then(builder.icmp_signed("!=", more, at(0))):
        added = [
            builder.fadd(segment.load(line), value)
            for (segment, line), value in zip(places_of, found, strict=True)
        ]
        there = builder.block
    results = [builder.phi(value.type) for value in found]
    for phi, value, both in zip(results, found, added, strict=True):
        phi.add_incoming(value, before)
        phi.add_incoming(both, there)
    for (segment, line), value in zip(places_of, results, strict=True):
        segment.store(value, line)


@intrinsic(prefer_literal=True)
def outer(typing_context, lanes, rows, width, x, places, count, g, step, sums, pitch, more):
    """``sums[m * pitch + v] (+)= sum_i x[places[i] + m] * g[i * step + v]``.

    For m < rows, v < width, i < count; `places` int64. Sums are overwritten where `more` is 0.
    """

    def generate(context, builder, signature, values):
        _generate_outer(builder, signature, values)
        return context.get_dummy_value()

    i64 = types.int64
    table = types.CPointer(i64)
    return types.void(lanes, rows, width, x, table, i64, x, i64, x, i64, i64), generate


@intrinsic(prefer_literal=True)
def outer_asking(
    typing_context, lanes, rows, width, x, places, count, g, step, sums, pitch, more, later, far, slowly
):  # fmt: skip
    """`outer`, and with each i of a tile of several vectors a line of memory is asked for that is wanted
    `later`, an address, ``far[i >> slowly]`` bytes further; none if that is 0."""

    def generate(context, builder, signature, values):
        _generate_outer(builder, signature, values)
        return context.get_dummy_value()

    i64 = types.int64
    table = types.CPointer(i64)
    return types.void(
        lanes, rows, width, x, table, i64, x, i64, x, i64, i64, i64, table, i64
    ), generate


@intrinsic(prefer_literal=True)
def turn(typing_context, lanes, kind, whole, to, pitch, source, stride, rows, length):
    """``to[i * pitch + n] = source[n * stride + i]`` for n < rows, i < length.

    `rows` at most `lanes`; source of the type called `kind`. If `whole`, lanes behind `rows` are written,
    too: with the last row once more.
    """
    L, of, W = lanes.literal_value, kind.literal_value, whole.literal_value

    def generate(context, builder, signature, values):
        to, pitch, source, stride, rows, length = values[3:]
        emit = Vectors(builder, of, L)
        at = simd.int_constant
        last = builder.sub(rows, at(1))
        lines = []
        for n in range(L):
            below = builder.icmp_signed("<", at(n), rows)
            row = builder.select(below, at(n), last)
            lines.append(builder.gep(source, [builder.mul(row, stride)]))
        mask = None if W else emit.first(rows)

        def transposed(i, part):
            values = [emit.read(builder.gep(line, [i]), part) for line in lines]
            return simd.turned(builder, values)

        def store(value, i):
            place = builder.gep(to, [builder.mul(i, pitch)])
            if mask is None:
                emit.store(value, place)
            else:
                emit.store_some(value, place, mask)

        rest = builder.and_(length, at(L - 1))
        full = builder.sub(length, rest)
        loop = simd.Loop(builder, at(0), full, L, [])
        for n, value in enumerate(transposed(loop.index, None)):
            store(value, builder.add(loop.index, at(n)))
        loop.close([])
        with builder.if_then(builder.icmp_signed("!=", rest, at(0))):
            for n, value in enumerate(transposed(full, emit.first(rest))[:-1]):
                with builder.if_then(builder.icmp_signed("<", at(n), rest)):
                    store(value, builder.add(full, at(n)))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, whole, to, i64, source, i64, i64, i64), generate


@intrinsic(prefer_literal=True)
def finish(
    typing_context, lanes, kind, to, source, residual, count, scale, shift, activation
):  # fmt: skip
    """``to[i] = act(scale[i] * source[i] + shift[i] + residual[i])`` for i < count: along channels.

    `to` and `residual` of the type called `kind`; a null residual is none, a null scale is 1. `activation`,
    an index into `ACTIVATIONS`, is looked at once a call.
    """
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, source, residual, count, scale, shift, activation = values[2:]
        emit = Vectors(builder, of, L)
        plain = simd.Emit(builder, emit.element, L)

        def given(pointer):
            return builder.icmp_unsigned("!=", pointer, ir.Constant(pointer.type, None))

        def update(function, beside, i, mask):
            def load(pointer):
                place = builder.gep(pointer, [i])
                return plain.load(place) if mask is None else plain.load_some(place, mask)

            factor = load(builder.select(scaled, scale, shift))
            factor = builder.select(scaled, factor, emit.constant(1.0))
            z = emit.multiply_add(load(source), factor, load(shift))
            if beside:
                z = builder.fadd(z, emit.read(builder.gep(residual, [i]), mask))
            emit.write(function(z), builder.gep(to, [i]), mask)

        scaled = given(scale)

        def loops(function):
            with builder.if_else(given(residual)) as branches:
                for beside, branch in zip((True, False), branches, strict=True):
                    with branch:
                        emit.over(count, partial(update, function, beside))

        simd.with_activation(plain, activation, loops)
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.void(lanes, kind, to, source, residual, i64, scale, shift, i64)
    return signature, generate
