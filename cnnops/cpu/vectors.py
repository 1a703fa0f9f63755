"""Loops over vectors of any of the four types in memory: half types are widened on the way in, rounded on the
way out. As `simd`, but that a pointer is an address with the name of a type (`elements`), and a row's last
vector is masked, so that nothing beyond it is read or written.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cnnops.cpu import simd
from cnnops.cpu.task import NAME

_POINTED = {
    "float32": types.float32,
    "float64": types.float64,
    "float16": types.uint16,
    "bfloat16": types.uint16,
}
"""What memory holds of each type, as numba knows it: half types as their bits."""


KIND = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
"""Names of the types of activations in memory."""


@lru_cache(None)
def kind(dtype: torch.dtype) -> str | None:
    """The type's name where kernels read it as it is. float16 takes the CPU's own conversion."""
    if dtype == torch.float16 and not llvm.get_host_cpu_features().get("f16c", False):
        return None
    return KIND.get(dtype) or NAME[dtype]


def readable(t: torch.Tensor) -> torch.Tensor:
    """`t` in a type that kernels with a `kind` read."""
    return t if kind(t.dtype) else t.float()


@intrinsic(prefer_literal=True)
def elements(typing_context, address, kind):
    """`address` as a pointer to elements of the type called `kind`."""
    result = types.CPointer(_POINTED[kind.literal_value])

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(result))

    return result(types.int64, kind), generate


class Vectors(simd.Emit):
    """Vectors of float32 or float64, of which memory holds the type called `kind`."""

    def __init__(self, builder: ir.IRBuilder, kind: str, lanes: int) -> None:
        super().__init__(builder, ir.DoubleType() if kind == "float64" else ir.FloatType(), lanes)
        self.half = kind in ("float16", "bfloat16")
        self.kind = kind
        self.bits = ir.VectorType(ir.IntType(16), lanes)
        self.words = ir.VectorType(ir.IntType(32), lanes)

    def word(self, value: int) -> ir.Constant:
        return ir.Constant(self.words, [value] * self.lanes)

    def read(self, place: ir.Value, mask: ir.Value | None = None) -> ir.Value:
        """A vector from memory, or its lanes of `mask`, and zeros."""
        if not self.half:
            return self.load(place) if mask is None else self.load_some(place, mask)
        place = self.builder.bitcast(place, self.bits.as_pointer())
        if mask is None:
            bits = self.builder.load(place, align=2)
        else:
            zero = ir.Constant(self.bits, [0] * self.lanes)
            align = ir.IntType(32)(2)
            kind = ir.FunctionType(self.bits, [place.type, align.type, mask.type, self.bits])
            name = f"llvm.masked.load.v{self.lanes}i16.p0"
            masked = simd.declared(self.builder.module, name, kind)
            bits = self.builder.call(masked, [place, align, mask, zero])
        if self.kind == "float16":
            halves = self.builder.bitcast(bits, ir.VectorType(ir.HalfType(), self.lanes))
            return self.builder.fpext(halves, self.vector)
        words = self.builder.shl(self.builder.zext(bits, self.words), self.word(16))
        return self.builder.bitcast(words, self.vector)

    def write(
        self, value: ir.Value, place: ir.Value, mask: ir.Value | None = None, past: bool = False
    ) -> None:
        """A vector, or its lanes of `mask`, to memory: rounded to nearest, ties to even.

        `past`: whole vectors go past the caches; `place` is aligned to them then, or to a line of memory.
        """
        if not self.half:
            if past and mask is None:
                return self._store_past(value, place)
            return self.store(value, place) if mask is None else self.store_some(value, place, mask)
        builder = self.builder
        if self.kind == "float16":
            halves = builder.fptrunc(value, ir.VectorType(ir.HalfType(), self.lanes))
            bits = builder.bitcast(halves, self.bits)
        else:
            words = builder.bitcast(value, self.words)
            odd = builder.and_(builder.lshr(words, self.word(16)), self.word(1))
            rounded = builder.add(words, builder.add(odd, self.word(0x7FFF)))
            # Rounding could carry a NaN's bits away.
            nan = builder.fcmp_unordered("uno", value, value)
            rounded = builder.select(nan, self.word(0x7FC00000), rounded)
            bits = builder.trunc(builder.lshr(rounded, self.word(16)), self.bits)
        if past and mask is None:
            return self._store_past(bits, place)
        place = builder.bitcast(place, self.bits.as_pointer())
        if mask is None:
            builder.store(bits, place, align=2)
            return None
        align = ir.IntType(32)(2)
        kind = ir.FunctionType(ir.VoidType(), [self.bits, place.type, align.type, mask.type])
        name = f"llvm.masked.store.v{self.lanes}i16.p0"
        masked = simd.declared(builder.module, name, kind)
        builder.call(masked, [bits, place, align, mask])
        return None

    def _store_past(self, value: ir.Value, place: ir.Value) -> None:
        size = self.lanes * (2 if self.half else self.align)
        pointer = self.builder.bitcast(place, value.type.as_pointer())
        store = self.builder.store(value, pointer, align=min(size, simd.LINE))
        once = self.builder.module.add_metadata([ir.IntType(32)(1)])
        store.set_metadata("nontemporal", once)

    def over(self, count: ir.Value, body: Callable[[ir.Value, ir.Value | None], None]) -> None:
        """`body` of each vector's first number and its mask: None but for a last one that is not whole."""
        builder = self.builder
        rest = builder.and_(count, simd.int_constant(self.lanes - 1))
        whole = builder.sub(count, rest)
        loop = simd.Loop(builder, simd.int_constant(0), whole, self.lanes, [])
        body(loop.index, None)
        loop.close([])
        with builder.if_then(builder.icmp_signed("!=", rest, simd.int_constant(0))):
            body(whole, self.first(rest))

    def blocks(
        self, count: ir.Value, body: Callable[[ir.Value, int, ir.Value | None], None]
    ) -> None:
        """`body` of the first number of every block of up to four vectors, of how many these are, and the
        last one's mask: None where all four are whole. Each size has code of its own."""
        builder, L = self.builder, self.lanes
        at = simd.int_constant
        rest = builder.and_(count, at(4 * L - 1))
        whole = builder.sub(count, rest)
        loop = simd.Loop(builder, at(0), whole, 4 * L, [])
        body(loop.index, 4, None)
        loop.close([])
        with builder.if_then(builder.icmp_signed("!=", rest, at(0))):
            size = builder.lshr(builder.add(rest, at(L - 1)), at(L.bit_length() - 1))
            last = self.first(builder.sub(rest, builder.mul(builder.sub(size, at(1)), at(L))))
            for vectors in range(1, 5):
                with builder.if_then(builder.icmp_signed("==", size, at(vectors))):
                    body(whole, vectors, last)


def _load_numbers(
    builder: ir.IRBuilder, place: ir.Value, lanes: int, mask: ir.Value | None
) -> ir.Value:
    """A vector of integers, or its lanes of `mask`, and zeros."""
    number = place.type.pointee
    vector, align = ir.VectorType(number, lanes), number.width // 8
    place = builder.bitcast(place, vector.as_pointer())
    if mask is None:
        return builder.load(place, align=align)
    i32 = ir.IntType(32)
    kind = ir.FunctionType(vector, [place.type, i32, mask.type, vector])
    name = f"llvm.masked.load.v{lanes}i{number.width}.p0"
    masked = simd.declared(builder.module, name, kind)
    return builder.call(masked, [place, i32(align), mask, ir.Constant(vector, [0] * lanes)])


class _Largest:
    """A vector of maxima and their places, by PyTorch's rule: a later value wins if it is larger, or NaN.

    Places are kept as int32 and written as what `kept` points to.
    """

    def __init__(self, emit: Vectors) -> None:
        self._emit = emit
        self.least = emit.constant(-math.inf)

    def update(
        self, value: ir.Value, place: ir.Value, best: ir.Value, kept: ir.Value
    ) -> list[ir.Value]:
        """best and kept, after a vector that lies at `place` in its windows."""
        builder = self._emit.builder
        nan = builder.fcmp_unordered("uno", value, value)
        wins = builder.or_(builder.fcmp_ordered(">", value, best), nan)
        places = simd.splat(builder, builder.trunc(place, ir.IntType(32)), self._emit.lanes)
        return [builder.select(wins, value, best), builder.select(wins, places, kept)]

    def write_places(self, kept: ir.Value, place: ir.Value, mask: ir.Value | None) -> None:
        builder, L = self._emit.builder, self._emit.lanes
        number = place.type.pointee
        if number.width < 32:
            kept = builder.trunc(kept, ir.VectorType(number, L))
        place = builder.bitcast(place, kept.type.as_pointer())
        align = number.width // 8
        if mask is None:
            builder.store(kept, place, align=align)
            return
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [kept.type, place.type, i32, mask.type])
        name = f"llvm.masked.store.v{L}i{number.width}.p0"
        masked = simd.declared(builder.module, name, kind)
        builder.call(masked, [kept, place, i32(align), mask])


@intrinsic(prefer_literal=True)
def max_window(
    typing_context, lanes, kind, y, kept, row, planes, plane, lines, line, places, place, corner, R, S, count
):  # fmt: skip
    """The maxima of a window for `count` neighbouring channels, and their places in it.

    The window's values lie at ``row[t * plane + r * line + s * place + i]``, t < planes, r < lines,
    s < places; their numbers are ``corner + (t * R + r) * S + s``. All stays in registers. `y` and row are of
    the type called `kind`.
    """
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        y, kept, row, planes, plane, lines, line, places, place, corner, R, S, count = values[2:]
        emit = Vectors(builder, of, L)
        largest = _Largest(emit)
        first = simd.splat(builder, builder.trunc(corner, ir.IntType(32)), L)
        zero = simd.int_constant(0)

        def update(i, vectors, mask):
            masks = [None] * (vectors - 1) + [mask]
            start = builder.gep(row, [i])
            best, where = [largest.least] * vectors, [first] * vectors
            along_d = simd.Loop(builder, zero, planes, 1, best + where)
            along_h = simd.Loop(builder, zero, lines, 1, along_d.carried)
            offset = builder.add(
                builder.mul(along_d.index, plane), builder.mul(along_h.index, line)
            )
            near = builder.gep(start, [offset])
            number = builder.add(builder.mul(along_d.index, R), along_h.index)
            number = builder.add(corner, builder.mul(number, S))
            along_w = simd.Loop(builder, zero, places, 1, along_h.carried)
            near = builder.gep(near, [builder.mul(along_w.index, place)])
            at = builder.add(number, along_w.index)
            pairs = [
                largest.update(
                    emit.read(builder.gep(near, [simd.int_constant(v * L)]), masks[v]),
                    at,
                    along_w.carried[v],
                    along_w.carried[vectors + v],
                )
                for v in range(vectors)
            ]
            found = along_w.close([best for best, _ in pairs] + [where for _, where in pairs])
            found = along_d.close(along_h.close(found))
            for v in range(vectors):
                column = builder.add(i, simd.int_constant(v * L))
                emit.write(found[v], builder.gep(y, [column]), masks[v])
                largest.write_places(found[vectors + v], builder.gep(kept, [column]), masks[v])

        emit.blocks(count, update)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, y, kept, row, *[i64] * 10), generate


def _row_of_windows(
    emit: Vectors, step: int, row: ir.Value, window: list[ir.Value], pad: ir.Value, width: ir.Value,
    count: ir.Value, readable: ir.Value, writable: ir.Value, outside: ir.Constant, body: Callable[..., None],
) -> None:  # fmt: skip
    """`body` of each vector of a row of `count` windows, `step` 1 or 2 apart: of its first window's number,
    of the mask for what is written, and of what walks through the windows' places.

    Window q's values lie at ``row[t * plane + r * line + w]``, ``w = q * step - pad + s * place``,
    t < planes, r < lines, s < places, 0 <= w < width, and are `outside` beyond the row; `window` is planes,
    plane, lines, line, places and place. So many elements from row on may be read (`readable`) and of results
    written (`writable`) whatever they hold: masks cost more.
    """
    builder, L, at = emit.builder, emit.lanes, simd.int_constant
    planes, plane, lines, line, places, place = window
    i32 = ir.IntType(32)
    lane = ir.Constant(emit.words, list(range(L)))
    order = ir.Constant(emit.words, [*range(0, L, 2), *range(L + 1, 2 * L, 2)])

    def load(near, first, whole):
        """Elements from `first` on."""
        spot = builder.gep(near, [first])
        if whole:
            return emit.read(spot)
        numbers = builder.add(simd.splat(builder, builder.trunc(first, i32), L), lane)
        limit = simd.splat(builder, builder.trunc(width, i32), L)
        inside = builder.icmp_unsigned("<", numbers, limit)
        return builder.select(inside, emit.read(spot, inside), outside)

    def walk(q, whole, carried, meet):
        """``meet(value, t, r, s, carried)`` of each place's vector; returns what the last one leaves."""
        along_d = simd.Loop(builder, at(0), planes, 1, carried)
        along_h = simd.Loop(builder, at(0), lines, 1, along_d.carried)
        offset = builder.add(builder.mul(along_d.index, plane), builder.mul(along_h.index, line))
        near = builder.gep(row, [offset])
        along_w = simd.Loop(builder, at(0), places, 1, along_h.carried)
        begin = builder.sub(builder.mul(q, at(step)), pad)
        w = builder.add(begin, builder.mul(along_w.index, place))
        value = load(near, w, whole)
        if step == 2:
            # The second load starts one early, to end with the last element that is asked for.
            early = load(near, builder.add(w, at(L - 1)), whole)
            value = builder.shuffle_vector(value, early, order)
        found = meet(value, along_d.index, along_h.index, along_w.index, along_w.carried)
        return along_d.close(along_h.close(along_w.close(found)))

    # The last element that a vector of windows from q on reads, and that the row's last window does.
    reach = builder.mul(builder.sub(places, at(1)), place)
    behind = builder.add(
        builder.mul(builder.sub(planes, at(1)), plane),
        builder.mul(builder.sub(lines, at(1)), line),
    )
    last = builder.sub(builder.mul(builder.sub(count, at(1)), at(step)), pad)
    last = builder.add(last, reach)
    rest = builder.and_(count, at(L - 1))
    whole = builder.sub(count, rest)

    def one(q, mask):
        begin = builder.sub(builder.mul(q, at(step)), pad)
        end = builder.add(builder.add(begin, reach), at(step * (L - 1)))
        free = builder.icmp_signed("<", builder.add(behind, end), readable)
        if mask is not None:
            end = last
            after = builder.add(q, at(L))
            free = builder.and_(free, builder.icmp_signed("<=", after, writable))
        for condition in (
            builder.icmp_signed(">=", begin, at(0)), builder.icmp_signed("<", end, width)
        ):  # fmt: skip
            free = builder.and_(free, condition)
        with builder.if_else(free) as (middle, edge):
            with middle:
                body(q, None, partial(walk, q, True))
            with edge:
                body(q, mask, partial(walk, q, False))

    loop = simd.Loop(builder, at(0), whole, L, [])
    one(loop.index, None)
    loop.close([])
    with builder.if_then(builder.icmp_signed("!=", rest, at(0))):
        one(whole, emit.first(rest))


@intrinsic(prefer_literal=True)
def max_row(
    typing_context, lanes, kind, step, y, kept, row, planes, plane, lines, line, places, place, pad, width,
    corner, firsts, R, S, count, readable, writable,
):  # fmt: skip
    """The maxima of a row of windows as `_row_of_windows` takes them, and their places.

    A place's number is ``corner + (t * R + r) * S + s``, and ``corner + firsts[q]`` where none is larger than
    -inf. `firsts` int32, whole vectors.
    """
    L, of, apart = lanes.literal_value, kind.literal_value, step.literal_value

    def generate(context, builder, signature, values):
        y, kept, row, *window, pad, width, corner, firsts, R, S, count, readable, writable = values[
            3:
        ]
        emit = Vectors(builder, of, L)
        largest = _Largest(emit)
        base = simd.splat(builder, builder.trunc(corner, ir.IntType(32)), L)

        def meet(value, t, r, s, carried):
            number = builder.add(builder.mul(t, R), r)
            number = builder.add(builder.add(corner, builder.mul(number, S)), s)
            return largest.update(value, number, *carried)

        def update(q, mask, walk):
            place_of = builder.bitcast(builder.gep(firsts, [q]), emit.words.as_pointer())
            first = builder.add(base, builder.load(place_of, align=4))
            best, where = walk([largest.least, first], meet)
            emit.write(best, builder.gep(y, [q]), mask)
            largest.write_places(where, builder.gep(kept, [q]), mask)

        _row_of_windows(
            emit, apart, row, window, pad, width, count, readable, writable, largest.least, update
        )
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.void(
        lanes, kind, step, y, kept, row, *[i64] * 9, types.CPointer(types.int32), *[i64] * 5
    )
    return signature, generate


@intrinsic(prefer_literal=True)
def mean_row(
    typing_context, lanes, kind, step, y, row, planes, plane, lines, line, places, place, pad, width, area,
    widths, count, readable, writable,
):  # fmt: skip
    """The sums of a row of windows as `_row_of_windows` takes them, each over ``area * widths[q]``: whole
    vectors of widths."""
    L, of, apart = lanes.literal_value, kind.literal_value, step.literal_value

    def generate(context, builder, signature, values):
        y, row, *window, pad, width, area, widths, count, readable, writable = values[3:]
        emit = Vectors(builder, of, L)
        areas = simd.splat(builder, area, L)

        def update(q, mask, walk):
            (total,) = walk(
                [emit.zero()], lambda value, t, r, s, sums: [builder.fadd(sums[0], value)]
            )
            by = builder.fmul(areas, emit.load(builder.gep(widths, [q])))
            emit.write(builder.fdiv(total, by), builder.gep(y, [q]), mask)

        _row_of_windows(
            emit, apart, row, window, pad, width, count, readable, writable, emit.zero(), update
        )
        return context.get_dummy_value()

    i64 = types.int64
    T = types.float64 if of == "float64" else types.float32
    return types.void(
        lanes, kind, step, y, row, *[i64] * 8, T, types.CPointer(T), i64, i64, i64
    ), generate


@intrinsic(prefer_literal=True)
def sum_kept(
    typing_context, lanes, kind, to, to_step, values, step, kept, kept_step, terms, size, count, inner
):  # fmt: skip
    """``to[q * to_step + i]``, q < count, i < inner, = the sum of those ``values[q * step + a + i]`` for
    which ``kept[q * kept_step + b + i] == number``.

    (a, b, number) are the `size` triples of `terms`. `to` and values are of the type called `kind`.
    """
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, operands):
        to, to_step, values, step, kept, kept_step, terms, size, count, inner = operands[2:]
        emit = Vectors(builder, of, L)
        at = simd.int_constant
        places = simd.Loop(builder, at(0), count, 1, [])
        to, values, kept = (
            builder.gep(base, [builder.mul(places.index, apart)])
            for base, apart in ((to, to_step), (values, step), (kept, kept_step))
        )

        def update(i, vectors, mask):
            masks = [None] * (vectors - 1) + [mask]
            value, where = builder.gep(values, [i]), builder.gep(kept, [i])
            loop = simd.Loop(builder, at(0), size, 1, [emit.zero()] * vectors)
            term = builder.gep(terms, [builder.mul(loop.index, at(3))])
            a, b, number = (builder.load(builder.gep(term, [at(k)])) for k in range(3))
            same = simd.splat(builder, builder.trunc(number, kept.type.pointee), L)
            sums = []
            for v, (former, some) in enumerate(zip(loop.carried, masks, strict=True)):
                near = at(v * L)
                numbers = _load_numbers(
                    builder, builder.gep(where, [builder.add(b, near)]), L, some
                )
                here = emit.read(builder.gep(value, [builder.add(a, near)]), some)
                # A sum that began with zero never is -0.0, so that what is left out is as good as zero.
                counts = builder.icmp_signed("==", numbers, same)
                sums.append(builder.select(counts, builder.fadd(former, here), former))
            sums = loop.close(sums)
            for v, (result, some) in enumerate(zip(sums, masks, strict=True)):
                emit.write(result, builder.gep(to, [builder.add(i, at(v * L))]), some)

        emit.blocks(inner, update)
        places.close([])
        return context.get_dummy_value()

    i64 = types.int64
    terms = types.CPointer(i64)
    return types.void(lanes, kind, to, i64, values, i64, kept, i64, terms, i64, i64, i64), generate


@intrinsic(prefer_literal=True)
def sum_up(typing_context, lanes, kind, sums, row, count):
    """``sums[i] += row[i]`` for i < count, row of the type called `kind`. Sums are read and written in whole
    vectors, row is not."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        sums, row, count = values[2:]
        emit = Vectors(builder, of, L)

        def update(i, mask):
            at = builder.gep(sums, [i])
            value = emit.read(builder.gep(row, [i]), mask)
            emit.store(builder.fadd(emit.load(at), value), at)

        emit.over(count, update)
        return context.get_dummy_value()

    return types.void(lanes, kind, sums, row, types.int64), generate


def _added_window(
    emit: Vectors, sums: list[ir.Value], mask: ir.Value | None, row: ir.Value, *axes: ir.Value
) -> list[ir.Value]:
    """Vectors of sums, and what lies at the places of a window from `row` on, added in their order: `axes`
    are the number of places and their distance along each. The mask is the last vector's."""
    builder, at = emit.builder, simd.int_constant
    loops = []
    for count, apart in zip(axes[::2], axes[1::2], strict=True):
        loops.append(simd.Loop(builder, at(0), count, 1, sums))
        row, sums = builder.gep(row, [builder.mul(loops[-1].index, apart)]), loops[-1].carried
    masks = [None] * (len(sums) - 1) + [mask]
    sums = [
        builder.fadd(value, emit.read(builder.gep(row, [at(v * emit.lanes)]), some))
        for v, (value, some) in enumerate(zip(sums, masks, strict=True))
    ]
    for loop in reversed(loops):
        sums = loop.close(sums)
    return sums


@intrinsic(prefer_literal=True)
def sum_window(typing_context, lanes, kind, sums, row, places, place, count):
    """``sums[i] += row[p * place + i]`` for p < places, i < count, in this order.

    Vectors of sums are kept in registers: for so few places that their rows stay in the cache. Row of the
    type called `kind`; sums are whole vectors.
    """
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        sums, row, *window, count = values[2:]
        emit = Vectors(builder, of, L)

        def update(i, vectors, mask):
            spots = [
                builder.gep(sums, [builder.add(i, simd.int_constant(v * L))])
                for v in range(vectors)
            ]
            former = list(map(emit.load, spots))
            for spot, value in zip(
                spots,
                _added_window(emit, former, mask, builder.gep(row, [i]), *window),
                strict=True,
            ):
                emit.store(value, spot)

        emit.blocks(count, update)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, sums, row, i64, i64, i64), generate


def _division(
    emit: Vectors, adaptive: ir.Value, by_d: ir.Value, by_h: ir.Value, by: ir.Value
) -> Callable[[list[ir.Value]], list[ir.Value]]:
    """What divides vectors by `by`, and before, if `adaptive`, by by_d and by_h."""
    builder = emit.builder
    by_d, by_h, by = (simd.splat(builder, divisor, emit.lanes) for divisor in (by_d, by_h, by))
    axis_by_axis = builder.icmp_signed("!=", adaptive, simd.int_constant(0))

    def divide(values: list[ir.Value]) -> list[ir.Value]:
        before = builder.block
        with builder.if_then(axis_by_axis):
            parts = [builder.fdiv(builder.fdiv(value, by_d), by_h) for value in values]
            there = builder.block
        phis = [builder.phi(emit.vector) for _ in values]
        for phi, value, part in zip(phis, values, parts, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(part, there)
        return [builder.fdiv(phi, by) for phi in phis]

    return divide


@intrinsic(prefer_literal=True)
def mean_window(
    typing_context, lanes, kind, to, row, planes, plane, lines, line, places, place, count, adaptive, by_d,
    by_h, by,
):  # fmt: skip
    """``to[i]``, i < count, = the sum of ``row[t * plane + r * line + s * place + i]`` for t < planes,
    r < lines, s < places, in this order, over `by`; if `adaptive`, over by_d and by_h before. `to` and row
    are of the type called `kind`."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, row, *window, count, adaptive, by_d, by_h, by = values[2:]
        emit = Vectors(builder, of, L)
        divide = _division(emit, adaptive, by_d, by_h, by)

        def update(i, vectors, mask):
            zeros = [emit.zero()] * vectors
            sums = _added_window(emit, zeros, mask, builder.gep(row, [i]), *window)
            for v, value in enumerate(divide(sums)):
                spot = builder.gep(to, [builder.add(i, simd.int_constant(v * L))])
                emit.write(value, spot, mask if v == vectors - 1 else None)

        emit.blocks(count, update)
        return context.get_dummy_value()

    i64 = types.int64
    T = types.float64 if of == "float64" else types.float32
    return types.void(lanes, kind, to, row, *[i64] * 8, T, T, T), generate


@intrinsic(prefer_literal=True)
def fill(typing_context, lanes, kind, to, value, count):
    """``to[i] = value`` for i < count; `to` of the type called `kind`."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, value, count = values[2:]
        emit = Vectors(builder, of, L)
        vector = simd.splat(builder, value, L)
        emit.over(count, lambda i, mask: emit.write(vector, builder.gep(to, [i]), mask))
        return context.get_dummy_value()

    T = types.float64 if of == "float64" else types.float32
    return types.void(lanes, kind, to, T, types.int64), generate


@intrinsic(prefer_literal=True)
def share_window(
    typing_context, lanes, kind, to, lines, line, places, place, values, count, adaptive, by_d, by_h, by
):  # fmt: skip
    """``to[r * line + s * place + i] = values[i] / by`` for r < lines, s < places, i < count; if `adaptive`,
    over by_d and by_h before. `to` and values are of the type called `kind`."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, operands):
        to, lines, line, places, place, values, count, adaptive, *divisors = operands[2:]
        emit = Vectors(builder, of, L)
        at = simd.int_constant
        divide = _division(emit, adaptive, *divisors)

        def update(i, vectors, mask):
            masks = [None] * (vectors - 1) + [mask]
            spots = [builder.add(i, at(v * L)) for v in range(vectors)]
            shares = divide(
                [
                    emit.read(builder.gep(values, [i]), some)
                    for i, some in zip(spots, masks, strict=True)
                ]
            )
            outer = simd.Loop(builder, at(0), lines, 1, [])
            near = builder.gep(to, [builder.mul(outer.index, line)])
            inner = simd.Loop(builder, at(0), places, 1, [])
            near = builder.gep(near, [builder.mul(inner.index, place)])
            for share, spot, some in zip(shares, spots, masks, strict=True):
                emit.write(share, builder.gep(near, [spot]), some)
            inner.close([])
            outer.close([])

        emit.blocks(count, update)
        return context.get_dummy_value()

    i64 = types.int64
    T = types.float64 if of == "float64" else types.float32
    return types.void(lanes, kind, to, i64, i64, i64, i64, values, i64, i64, T, T, T), generate


@intrinsic(prefer_literal=True)
def spread(typing_context, lanes, kind, row, width, values, kept, place):
    """``row[i] = values[i // 2]`` for i < width, but zero where ``kept[i // 2] != place + i % 2``; kept may
    be None.

    Row and values are of the type called `kind`, kept is uint8 or int32.
    """
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, operands):
        row, width, values, kept, place = operands[2:]
        emit = Vectors(builder, of, L)
        at = simd.int_constant
        orders = [
            ir.Constant(emit.words, [start + i // 2 + i % 2 * L for i in range(L)])
            for start in (0, L // 2)
        ]

        def sides(i, mask):
            value = emit.read(builder.gep(values, [i]), mask)
            if isinstance(signature.args[5], types.NoneType):
                return [value] * 2
            numbers = _load_numbers(builder, builder.gep(kept, [i]), L, mask)
            wanted = [
                simd.splat(builder, builder.trunc(builder.add(place, at(s)), kept.type.pointee), L)
                for s in range(2)
            ]
            return [
                builder.select(builder.icmp_signed("==", numbers, same), value, emit.zero())
                for same in wanted
            ]

        def write(pair, part, start, mask):
            shuffled = builder.shuffle_vector(*pair, orders[part])
            emit.write(shuffled, builder.gep(row, [builder.add(start, at(part * L))]), mask)

        rest = builder.and_(width, at(2 * L - 1))
        whole = builder.sub(width, rest)
        loop = simd.Loop(builder, at(0), whole, 2 * L, [])
        pair = sides(builder.lshr(loop.index, at(1)), None)
        for part in range(2):
            write(pair, part, loop.index, None)
        loop.close([])
        with builder.if_then(builder.icmp_signed("!=", rest, at(0))):
            # A width that ends within a pair has its last value in these.
            values_left = builder.lshr(builder.add(rest, at(1)), at(1))
            pair = sides(builder.lshr(whole, at(1)), emit.first(values_left))
            for part in range(2):
                write(pair, part, whole, emit.first(builder.sub(rest, at(part * L))))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, row, i64, values, kept, i64), generate


@intrinsic(prefer_literal=True)
def overlap(typing_context, lanes, kind, step, row, width, line, S, pad):
    """``row[w]``, w < width, = the sum of ``line[q]`` of the windows q, `step` 1 or 2 apart and S wide, that
    w lies in: those with ``0 <= w + pad - q * step < S``.

    Row of the type called `kind`; line has zeros for S windows before the first, and for S and two vectors
    behind the last.
    """
    L, of, apart = lanes.literal_value, kind.literal_value, step.literal_value

    def generate(context, builder, signature, values):
        row, width, line, S, pad = values[3:]
        emit = Vectors(builder, of, L)
        at = simd.int_constant

        def side(j, ahead):
            """Sums for the places ``j * step + ahead`` and on, each `step` behind the former."""
            reach = builder.add(pad, at(ahead))
            first = builder.and_(reach, at(apart - 1))
            loop = simd.Loop(builder, first, S, apart, [emit.zero()])
            q = builder.sub(reach, loop.index)
            q = builder.add(j, q if apart == 1 else builder.ashr(q, at(1)))
            value = emit.load(builder.gep(line, [q]))
            return loop.close([builder.fadd(loop.carried[0], value)])[0]

        def update(j, some):
            sides = [side(j, ahead) for ahead in range(apart)]
            start = builder.mul(j, at(apart))
            for part in range(apart):
                value = sides[0]
                if apart == 2:
                    order = [part * L // 2 + i // 2 + i % 2 * L for i in range(L)]
                    value = builder.shuffle_vector(*sides, ir.Constant(emit.words, order))
                place = builder.add(start, at(part * L))
                mask = emit.first(builder.sub(width, place)) if some else None
                emit.write(value, builder.gep(row, [place]), mask)

        rest = builder.and_(width, at(apart * L - 1))
        whole = builder.udiv(builder.sub(width, rest), at(apart))
        loop = simd.Loop(builder, at(0), whole, L, [])
        update(loop.index, False)
        loop.close([])
        with builder.if_then(builder.icmp_signed("!=", rest, at(0))):
            update(whole, True)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, step, row, i64, line, i64, i64), generate


@intrinsic(prefer_literal=True)
def narrow(typing_context, lanes, kind, to, source, count):
    """``to[i] = source[i]`` for i < count; `to` of the type called `kind`, source whole vectors."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, source, count = values[2:]
        emit = Vectors(builder, of, L)
        emit.over(
            count,
            lambda i, mask: emit.write(
                emit.load(builder.gep(source, [i])), builder.gep(to, [i]), mask
            ),
        )
        return context.get_dummy_value()

    return types.void(lanes, kind, to, source, types.int64), generate


@intrinsic(prefer_literal=True)
def widen(typing_context, lanes, kind, to, source, count):
    """``to[i] = source[i]`` for i < count; source of the type called `kind`, `to` whole vectors."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, source, count = values[2:]
        emit = Vectors(builder, of, L)
        emit.over(
            count,
            lambda i, mask: emit.store(
                emit.read(builder.gep(source, [i]), mask), builder.gep(to, [i])
            ),
        )
        return context.get_dummy_value()

    return types.void(lanes, kind, to, source, types.int64), generate


@intrinsic(prefer_literal=True)
def total(typing_context, lanes, kind, values, count):
    """The sum of `count` values of the type called `kind` in a row, as float64: sums of at most 68 values in
    the type that they are computed in, then of these.

    LLVM's own loop over float32 costs several times as much, above all for rows as short as 49.
    """
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, operands):
        row, count = operands[2:]
        emit = Vectors(builder, of, L)
        wide = simd.Emit(builder, ir.DoubleType(), L)
        at = simd.int_constant

        def added(former, place):
            return builder.fadd(former, emit.read(builder.gep(row, [place])))

        def fours(start, stop):
            """Vectors in four sums; returns the sum of these."""
            loop = simd.Loop(builder, start, stop, 4 * L, [emit.zero()] * 4)
            places = [builder.add(loop.index, at(k * L)) for k in range(4)]
            # Left to itself, the CPU runs not far enough ahead: planes beyond the caches take twice as long.
            for place in places:
                emit.prefetch(builder.gep(row, [builder.add(place, at(32 * L))]))
            a, b, c, d = loop.close(list(map(added, loop.carried, places)))
            return builder.fadd(builder.fadd(a, b), builder.fadd(c, d))

        def widened(value):
            return value if emit.align == 8 else builder.fpext(value, wide.vector)

        long = at(16 * 4 * L)
        rest = builder.and_(count, at(16 * 4 * L - 1))
        whole = builder.sub(count, rest)
        loop = simd.Loop(builder, at(0), whole, 16 * 4 * L, [wide.zero()])
        sums = fours(loop.index, builder.add(loop.index, long))
        (head,) = loop.close([builder.fadd(loop.carried[0], widened(sums))])
        many = builder.sub(count, builder.and_(count, at(4 * L - 1)))
        few = builder.and_(count, at(L - 1))
        sums = fours(whole, many)
        loop = simd.Loop(builder, many, builder.sub(count, few), L, [sums])
        (sums,) = loop.close([added(loop.carried[0], loop.index)])
        last = emit.read(builder.gep(row, [builder.sub(count, few)]), emit.first(few))
        sums = builder.fadd(sums, last)
        return wide.total(builder.fadd(head, widened(sums)))

    return types.float64(lanes, kind, values, types.int64), generate
