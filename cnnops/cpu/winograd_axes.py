"""How Winograd's convolutions go along one axis of an image, and the transforms of both, on vectors.

A tile's inputs d and taps g are turned into more numbers each, products of these are added up over channels,
and sums of the products are its outputs. `SCHEMES` has, for the outputs of a tile,

    three taps      4 of 6 products where direct ones have 12
    five taps       2 of 6 where direct ones have 10
    strided         2 of 5 where direct ones have 6: three taps, a stride of 2
    spread          4 of 5 where direct ones have 6: the input gradient of that

and both axes take the square of it. The first two are interpolation at the points 0, ±1/√2, ±√2 and ∞:
``v = Bᵀ d``, ``u = G g``, one product of each pair, and Aᵀ of the products.

With a stride of 2 inputs with an even number meet the outer taps alone, two taps a step apart, of which two
outputs take three products, and those with an odd number the middle one::

    y0 = [(x0 - x2) g0 + x1 g1] + x2 (g0 + g2)
    y1 = x2 (g0 + g2) + [(x4 - x2) g2 + x3 g1]

What is in brackets is one sum over both products and all channels: of both axes' 25 products, 9 are left to
be added. Taps make 16 matrices, for x1 and x3 meet the same one. The gradient is this turned around: products
become sums and sums products. For a padding of 1, and four inputs of which y0 reads the first by its middle
tap,

    x0 = y0 g1                         x2 = y1 g1
    x1 = (y0 - y1) g2 + y1 (g0 + g2)   x3 = y1 (g0 + g2) + (y2 - y1) g0

and of weights, summed over tiles,

    g0 = (x0 - x2) y0 + x2 (y0 + y1)   g1 = [x1 y0 + x3 y1]   g2 = x2 (y0 + y1) + (x4 - x2) y1

The last tile of an axis needs fewer products if not all of its outputs are wanted: none of a sum that only
others are made of. By interpolation that at 0 belongs to the first output alone, that at ∞ to the last one: a
tile of which two outputs are wanted begins one earlier, and needs 4 of 6.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cnnops.cpu import simd

# ---- schemes ----------------------------------------------------------------------------------------------


class Scheme(NamedTuple):
    """One axis: a tile of so many `outputs` from so many `inputs`, the next one's `step` further, and taps.

    Inputs are transformed to v, taps to u; ``m[k] += v[i] u[j]`` for each (i, j, k) of `products`, and each
    output is made of those m that `sums` has.
    """

    inputs: int
    step: int
    taps: int
    outputs: int
    products: tuple[tuple[int, int, int], ...]
    sums: tuple[tuple[int, ...], ...]

    @property
    def v(self) -> int:
        return 1 + max(i for i, _, _ in self.products)

    @property
    def u(self) -> int:
        return 1 + max(j for _, j, _ in self.products)

    @property
    def m(self) -> int:
        return 1 + max(k for _, _, k in self.products)

    def last(self, wanted: int) -> tuple[int, int]:
        """How a tile is made of which so many outputs are wanted: how many of its outputs are before them,
        and a bit for each product that they need. The tile may begin before what is wanted, so that what it
        does without are sums at both ends."""
        ways = []
        for before in range(self.outputs - wanted + 1):
            if before * self.step % self.outputs == 0:
                sums = {m for q in range(before, before + wanted) for m in self.sums[q]}
                needed = [i for i, (_, _, m) in enumerate(self.products) if m in sums]
                ways.append((len(needed), before, sum(1 << i for i in needed)))
        return min(ways)[1:]

    def with_gradients(self, there: int) -> int:
        """Of `WEIGHTS`: a bit for each product that a tile needs in which so many gradients are. The last u
        is the last gradient alone."""
        needed = [there == self.taps or u != self.u - 1 for _, u, _ in self.products]
        return sum(1 << i for i, is_needed in enumerate(needed) if is_needed)

    def of_both_axes(self) -> tuple[tuple[int, ...], ...]:
        """Of each product of an image its v, its u, its m, and whether that has one already."""
        pairs = [(a, b) for a in self.products for b in self.products]
        v, u, m = (
            tuple(size * a[which] + b[which] for a, b in pairs)
            for which, size in enumerate((self.v, self.u, self.m))
        )
        return v, u, m, tuple(int(k in m[:i]) for i, k in enumerate(m))


_ONE_EACH = tuple((i, i, i) for i in range(6))
_POINTS = (1, 2, 3, 4)

_FIRST, _LAST = (0, *_POINTS), (*_POINTS, 5)

# fmt: off
SCHEMES = {
    "three taps": Scheme(6, 4, 3, 4, _ONE_EACH, (_FIRST, _POINTS, _POINTS, _LAST)),
    "five taps": Scheme(6, 2, 5, 2, _ONE_EACH, (_FIRST, _LAST)),
    "strided": Scheme(
        5, 4, 3, 2, ((0, 0, 0), (1, 1, 0), (2, 2, 1), (3, 1, 2), (4, 3, 2)), ((0, 1), (1, 2)),
    ),
    # Of the taps turned around.
    "spread": Scheme(
        3, 2, 3, 4, ((0, 0, 0), (1, 1, 1), (2, 2, 2), (2, 1, 3), (3, 3, 4)), ((1,), (0, 2), (3,), (2, 4)),
    ),
}

WEIGHTS = {
    "three taps": Scheme(6, 4, 4, 3, _ONE_EACH, (_FIRST, _POINTS, _LAST)),
    "five taps": Scheme(6, 2, 2, 5, _ONE_EACH, (_FIRST, *(_POINTS,) * 3, _LAST)),
    "strided": Scheme(
        5, 4, 2, 3, ((0, 0, 0), (1, 0, 1), (2, 1, 2), (3, 2, 1), (4, 2, 3)), ((0, 2), (1,), (2, 3)),
    ),
}
"""For the weight gradients of the first three: a tile's gradients are where the taps were, and taps are the
outputs. The next tile's gradients begin behind those of the one before."""
# fmt: on

# ---- the transforms of one axis, on vectors ---------------------------------------------------------------

_NEAR, _FAR = math.sqrt(0.5), math.sqrt(2.0)
"""The points: a² b² = 1 and a² + b² = 5/2 leave few constants that are not exact."""


def _input_axis(emit: simd.Emit, d: list[ir.Value]) -> list[ir.Value]:
    """``Bᵀ d``: 6 to 6."""

    def plus(factor, a, c):
        return emit.multiply_add(emit.constant(factor), a, c)

    even_near, odd_near = plus(-2.0, d[2], d[4]), plus(-2.0, d[1], d[3])
    even_far, odd_far = plus(-0.5, d[2], d[4]), plus(-0.5, d[1], d[3])
    return [
        emit.builder.fadd(plus(-2.5, d[2], d[0]), d[4]),
        plus(_NEAR, odd_near, even_near),
        plus(-_NEAR, odd_near, even_near),
        plus(_FAR, odd_far, even_far),
        plus(-_FAR, odd_far, even_far),
        emit.builder.fadd(plus(-2.5, d[3], d[1]), d[5]),
    ]


def _filter_axis(emit: simd.Emit, g: list[ir.Value]) -> list[ir.Value]:
    """``G g``: R to 6, but for factors that `_sums_axis` has instead."""

    def powers(square: float, terms: list[ir.Value]) -> ir.Value:
        total = terms[-1]
        for term in terms[-2::-1]:
            total = emit.multiply_add(emit.constant(square), total, term)
        return total

    pairs = []
    for point in (_NEAR, _FAR):
        even, odd = (powers(point**2, g[first::2]) for first in (0, 1))
        pairs += [emit.multiply_add(emit.constant(p), odd, even) for p in (point, -point)]
    return [g[0], *pairs, g[-1]]


def _sums_axis(emit: simd.Emit, m: list[ir.Value], outputs: int) -> list[ir.Value]:
    """``Aᵀ m``: 6 to so many."""
    builder = emit.builder
    near, far = builder.fadd(m[1], m[2]), builder.fadd(m[3], m[4])
    odd_near, odd_far = builder.fsub(m[1], m[2]), builder.fsub(m[3], m[4])
    # G's rows for ±1/√2 have a factor of -2/3, those for ±√2 one of 1/6.
    a, b = -2 / 3, 1 / 6
    sums = []
    for q in range(outputs):
        x, y = (odd_near, odd_far) if q % 2 else (near, far)
        by_x, by_y = emit.constant(a * _NEAR**q), emit.constant(b * _FAR**q)
        point = {0: m[0], outputs - 1: m[5]}.get(q)
        first = builder.fmul(by_x, x) if point is None else emit.multiply_add(by_x, x, point)
        sums.append(emit.multiply_add(by_y, y, first))
    return sums


def _strided_input(emit: simd.Emit, d: list[ir.Value]) -> list[ir.Value]:
    sub = emit.builder.fsub
    return [sub(d[0], d[2]), d[1], d[2], d[3], sub(d[4], d[2])]


def _strided_filter(emit: simd.Emit, g: list[ir.Value]) -> list[ir.Value]:
    return [g[0], g[1], emit.builder.fadd(g[0], g[2]), g[2]]


def _strided_gradients(emit: simd.Emit, g: list[ir.Value]) -> list[ir.Value]:
    return [g[0], emit.builder.fadd(g[0], g[1]), g[1]]


def _strided_weights(emit: simd.Emit, m: list[ir.Value]) -> list[ir.Value]:
    add = emit.builder.fadd
    return [add(m[0], m[2]), m[1], add(m[2], m[3])]


def _strided_sums(emit: simd.Emit, m: list[ir.Value]) -> list[ir.Value]:
    return [emit.builder.fadd(m[0], m[1]), emit.builder.fadd(m[1], m[2])]


def _spread_input(emit: simd.Emit, d: list[ir.Value]) -> list[ir.Value]:
    sub = emit.builder.fsub
    return [sub(d[0], d[1]), d[0], d[1], sub(d[2], d[1])]


def _spread_sums(emit: simd.Emit, m: list[ir.Value]) -> list[ir.Value]:
    add = emit.builder.fadd
    return [m[1], add(m[0], m[2]), m[3], add(m[2], m[4])]


_Axis = Callable[[simd.Emit, list[ir.Value]], list[ir.Value]]

_INPUTS: dict[tuple[int, int], _Axis] = {
    (6, 6): _input_axis,
    (5, 5): _strided_input,
    (3, 4): _spread_input,
    # A tile's gradients, in place of taps.
    (4, 6): _filter_axis,
    (2, 6): _filter_axis,
    (2, 3): _strided_gradients,
}
"""By how many numbers there are and how many they become."""

_FILTERS: dict[tuple[int, int], _Axis] = {
    (3, 6): _filter_axis,
    (5, 6): _filter_axis,
    (3, 4): _strided_filter,
}

_SUMS: dict[tuple[int, int], _Axis] = {
    **{(6, outputs): partial(_sums_axis, outputs=outputs) for outputs in (2, 3, 4, 5)},
    (3, 2): _strided_sums,
    (5, 4): _spread_sums,
    (4, 3): _strided_weights,
}


def _both_axes(
    emit: simd.Emit,
    axis: _Axis,
    read: Callable[[int, int], ir.Value],
    sizes: int,
    write: Callable[[int, int, ir.Value], None],
) -> None:
    """`axis` down every column of what ``read(i, j)`` gives, then along every row: each result to
    ``write(i, j, value)``."""
    down = [axis(emit, [read(i, j) for i in range(sizes)]) for j in range(sizes)]
    for i in range(len(down[0])):
        for j, value in enumerate(axis(emit, [column[i] for column in down])):
            write(i, j, value)


def times(builder, value, factor):
    return builder.mul(value, simd.int_constant(factor))


@intrinsic(prefer_literal=True)
def transform_input(typing_context, lanes, side, numbers, to, plane, source, places, count, more):
    """``to[xi * plane + c] = v[xi]``, `numbers` by `numbers` of them, of ``d[k] = source[places[k] + c]``,
    `side` by `side`, for c < count, which is a multiple of the lanes.

    Where there are `more`, the next tile's places follow; what is there is asked for: tiles lie in so many
    rows of pixels that the CPU would not foresee it."""
    L, sizes, n = lanes.literal_value, side.literal_value, numbers.literal_value

    def generate(context, builder, signature, values):
        to, plane, source, places, count, more = values[3:]
        emit = simd.Emit(builder, ir.FloatType(), L)
        loop = simd.Loop(builder, simd.int_constant(0), count, L, [])
        c = loop.index
        start = builder.gep(source, [c])

        def pixel(number):
            place = builder.load(builder.gep(places, [simd.int_constant(number)]))
            return builder.gep(start, [place])

        def read(i, j):
            return emit.load(pixel(sizes * i + j))

        with builder.if_then(builder.icmp_signed("!=", more, simd.int_constant(0))):
            for number in range(sizes**2):
                emit.prefetch(pixel(sizes**2 + number))

        def write(i, j, value):
            at = builder.add(times(builder, plane, n * i + j), c)
            emit.store(value, builder.gep(to, [at]))

        _both_axes(emit, _INPUTS[sizes, n], read, sizes, write)
        loop.close([])
        return context.get_dummy_value()

    i64 = types.int64
    args = lanes, side, numbers, to, i64, source, types.CPointer(i64), i64, i64
    return types.void(*args), generate


@intrinsic(prefer_literal=True)
def transform_filter(typing_context, lanes, side, numbers, to, plane, source, step):
    """``to[xi * plane + l] = u[xi]``, `numbers` by `numbers` of them, of ``g[t] = source[t * step + l]``,
    `side` by `side`, for every lane l."""
    L, R, n = lanes.literal_value, side.literal_value, numbers.literal_value

    def generate(context, builder, signature, values):
        to, plane, source, step = values[3:]
        emit = simd.Emit(builder, ir.FloatType(), L)

        def read(i, j):
            return emit.load(builder.gep(source, [times(builder, step, R * i + j)]))

        def write(i, j, value):
            emit.store(value, builder.gep(to, [times(builder, plane, n * i + j)]))

        _both_axes(emit, _FILTERS[R, n], read, R, write)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, side, numbers, to, i64, source, i64), generate


@intrinsic(prefer_literal=True)
def transform_sums(typing_context, lanes, numbers, outputs, to, rows, places, source, plane):
    """``to[rows[p] + places[q] + l] = y[p, q]``, `outputs` by `outputs` of them, of ``m[xi] = source[xi *
    plane + l]``, `numbers` by `numbers`, for every lane l."""
    L, n, E = lanes.literal_value, numbers.literal_value, outputs.literal_value

    def generate(context, builder, signature, values):
        to, rows, places, source, plane = values[3:]
        emit = simd.Emit(builder, ir.FloatType(), L)
        down, along = (
            [builder.load(builder.gep(each, [simd.int_constant(i)])) for i in range(E)]
            for each in (rows, places)
        )

        def read(i, j):
            return emit.load(builder.gep(source, [times(builder, plane, n * i + j)]))

        def write(p, q, value):
            emit.store(value, builder.gep(to, [builder.add(down[p], along[q])]))

        _both_axes(emit, _SUMS[n, E], read, n, write)
        return context.get_dummy_value()

    i64 = types.int64
    offsets = types.CPointer(i64)
    return types.void(lanes, numbers, outputs, to, offsets, offsets, source, i64), generate
