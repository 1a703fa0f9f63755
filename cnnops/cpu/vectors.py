"""Loops over vectors of any of the four types in memory: half types are widened on the way in, rounded on the
way out. As `simd`, but that a pointer is an address with the name of a type (`elements`), and a row's last
vector is masked, so that nothing beyond it is read or written.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

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

        `past`: whole vectors go past the caches; `place` is aligned to them then.
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
        store = self.builder.store(value, pointer, align=size)
        once = self.builder.module.add_metadata([ir.IntType(32)(1)])
        store.set_metadata("nontemporal", once)

    def over(
        self,
        count: ir.Value,
        body: Callable[[ir.Value, ir.Value | None], None],
        start: ir.Value | None = None,
    ) -> None:
        """`body` of each vector's first number, from `start` on, and its mask: None but for a last one that
        is not whole."""
        builder = self.builder
        rest = builder.and_(count, simd.int_constant(self.lanes - 1))
        whole = builder.sub(count, rest)
        loop = simd.Loop(builder, start or simd.int_constant(0), whole, self.lanes, [])
        body(loop.index, None)
        loop.close([])
        with builder.if_then(builder.icmp_signed("!=", rest, simd.int_constant(0))):
            body(whole, self.first(rest))


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

        def update(i, mask, vectors=1):
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
                    emit.read(builder.gep(near, [simd.int_constant(v * L)]), mask),
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
                emit.write(found[v], builder.gep(y, [column]), mask)
                largest.write_places(found[vectors + v], builder.gep(kept, [column]), mask)

        many = builder.sub(count, builder.and_(count, simd.int_constant(4 * L - 1)))
        loop = simd.Loop(builder, zero, many, 4 * L, [])
        update(loop.index, None, 4)
        loop.close([])
        emit.over(count, update, many)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, y, kept, row, *[i64] * 10), generate


@intrinsic(prefer_literal=True)
def max_row(
    typing_context, lanes, kind, step, y, kept, row, planes, plane, lines, line, places, place, pad, width,
    corner, firsts, R, S, count, readable, writable,
):  # fmt: skip
    """The maxima of a row of `count` windows, `step` 1 or 2 apart, and their places.

    Window q's values lie at ``row[t * plane + r * line + w]``, ``w = q * step - pad + s * place``,
    t < planes, r < lines, s < places, 0 <= w < width; their numbers are ``corner + (t * R + r) * S + s``,
    and ``corner + firsts[q]`` where none is larger than -inf. `firsts` int32, whole vectors. So many elements
    from row on may be read (`readable`) and from y and kept on written (`writable`) whatever they hold: masks
    cost more.
    """
    L, of, apart = lanes.literal_value, kind.literal_value, step.literal_value

    def generate(context, builder, signature, values):
        (
            y, kept, row, planes, plane, lines, line, places, place, pad, width, corner, firsts, R, S, count,
            readable, writable,
        ) = values[3:]  # fmt: skip
        emit = Vectors(builder, of, L)
        largest = _Largest(emit)
        at = simd.int_constant
        i32 = ir.IntType(32)
        lane = ir.Constant(emit.words, list(range(L)))
        order = ir.Constant(emit.words, [*range(0, L, 2), *range(L + 1, 2 * L, 2)])
        base = simd.splat(builder, builder.trunc(corner, i32), L)

        def load(near, first, whole):
            """Elements from `first` on, those outside of the row -inf."""
            spot = builder.gep(near, [first])
            if whole:
                return emit.read(spot)
            numbers = builder.add(simd.splat(builder, builder.trunc(first, i32), L), lane)
            limit = simd.splat(builder, builder.trunc(width, i32), L)
            inside = builder.icmp_unsigned("<", numbers, limit)
            return builder.select(inside, emit.read(spot, inside), largest.least)

        def update(q, mask, whole):
            begin = builder.sub(builder.mul(q, at(apart)), pad)
            place_of = builder.bitcast(builder.gep(firsts, [q]), emit.words.as_pointer())
            first = builder.add(base, builder.load(place_of, align=4))
            along_d = simd.Loop(builder, at(0), planes, 1, [largest.least, first])
            along_h = simd.Loop(builder, at(0), lines, 1, along_d.carried)
            offset = builder.add(
                builder.mul(along_d.index, plane), builder.mul(along_h.index, line)
            )
            near = builder.gep(row, [offset])
            number = builder.add(builder.mul(along_d.index, R), along_h.index)
            number = builder.add(corner, builder.mul(number, S))
            along_w = simd.Loop(builder, at(0), places, 1, along_h.carried)
            w = builder.add(begin, builder.mul(along_w.index, place))
            value = load(near, w, whole)
            if apart == 2:
                # The second load starts one early, to end with the last element that is asked for.
                early = load(near, builder.add(w, at(L - 1)), whole)
                value = builder.shuffle_vector(value, early, order)
            number = builder.add(number, along_w.index)
            found = along_w.close(largest.update(value, number, *along_w.carried))
            best, where = along_d.close(along_h.close(found))
            emit.write(best, builder.gep(y, [q]), mask)
            largest.write_places(where, builder.gep(kept, [q]), mask)

        # The last element that a vector of windows from q on reads, and that the row's last window does.
        reach = builder.mul(builder.sub(places, at(1)), place)
        behind = builder.add(
            builder.mul(builder.sub(planes, at(1)), plane),
            builder.mul(builder.sub(lines, at(1)), line),
        )
        last = builder.sub(builder.mul(builder.sub(count, at(1)), at(apart)), pad)
        last = builder.add(last, reach)
        rest = builder.and_(count, at(L - 1))
        whole = builder.sub(count, rest)

        def one(q, mask):
            begin = builder.sub(builder.mul(q, at(apart)), pad)
            end = builder.add(builder.add(begin, reach), at(apart * (L - 1)))
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
                    update(q, None, True)
                with edge:
                    update(q, mask, False)

        loop = simd.Loop(builder, at(0), whole, L, [])
        one(loop.index, None)
        loop.close([])
        with builder.if_then(builder.icmp_signed("!=", rest, at(0))):
            one(whole, emit.first(rest))
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.void(
        lanes, kind, step, y, kept, row, *[i64] * 9, types.CPointer(types.int32), *[i64] * 5
    )
    return signature, generate


@intrinsic(prefer_literal=True)
def add_kept(
    typing_context, lanes, kind, to, values, kept, number, planes, plane, kept_plane, less_t, lines, line,
    kept_line, less_r, places, place, kept_place, less_s, count,
):  # fmt: skip
    """``to[i]`` = the sum of those `values` of some windows that were kept from one place, i < count.

    Window (t, r, s), t < planes, r < lines, s < places, has its value at
    ``values[t * plane + r * line + s * place + i]``; it counts where what lies at
    ``kept[t * kept_plane + …]`` is ``number - t * less_t - r * less_r - s * less_s``. `to` and values are of
    the type called `kind`.
    """
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, operands):
        to, values, kept, number = operands[2:6]
        axes = [operands[6 + 4 * axis : 10 + 4 * axis] for axis in range(3)]
        count = operands[-1]
        emit = Vectors(builder, of, L)
        at = simd.int_constant

        def update(i, mask, vectors=1):
            sums = [emit.zero()] * vectors
            value, where, wanted = builder.gep(values, [i]), builder.gep(kept, [i]), number
            loops = []
            for steps, apart, kept_apart, less in axes:
                loop = simd.Loop(builder, at(0), steps, 1, sums)
                value = builder.gep(value, [builder.mul(loop.index, apart)])
                where = builder.gep(where, [builder.mul(loop.index, kept_apart)])
                wanted = builder.sub(wanted, builder.mul(loop.index, less))
                sums = loop.carried
                loops.append(loop)
            found = []
            for v, former in enumerate(sums):
                near = at(v * L)
                numbers = _load_numbers(builder, builder.gep(where, [near]), L, mask)
                same = simd.splat(builder, builder.trunc(wanted, kept.type.pointee), L)
                term = emit.read(builder.gep(value, [near]), mask)
                term = builder.select(builder.icmp_signed("==", numbers, same), term, emit.zero())
                found.append(builder.fadd(former, term))
            for loop in reversed(loops):
                found = loop.close(found)
            for v, result in enumerate(found):
                emit.write(result, builder.gep(to, [builder.add(i, at(v * L))]), mask)

        many = builder.sub(count, builder.and_(count, at(4 * L - 1)))
        loop = simd.Loop(builder, at(0), many, 4 * L, [])
        update(loop.index, None, 4)
        loop.close([])
        emit.over(count, update, many)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, to, values, kept, *[i64] * 14), generate


@intrinsic(prefer_literal=True)
def sum_up(typing_context, lanes, kind, step, sums, row, count):
    """``sums[i] += row[i * step]`` for i < count; `step` 1 or 2, row of the type called `kind`. Sums are read
    and written in whole vectors, row is not."""
    L, of, S = lanes.literal_value, kind.literal_value, step.literal_value

    def generate(context, builder, signature, values):
        sums, row, count = values[3:]
        emit = Vectors(builder, of, L)

        def update(i, mask):
            start = builder.gep(row, [builder.mul(i, simd.int_constant(S))])
            if S == 1:
                value = emit.read(start, mask)
            else:
                # The second load starts one early, to end with the last element that is asked for.
                early = builder.gep(start, [simd.int_constant(L - 1)])
                if mask is None:
                    pair = emit.read(start), emit.read(early)
                else:
                    reach = builder.sub(
                        builder.mul(builder.sub(count, i), simd.int_constant(2)),
                        simd.int_constant(1),
                    )
                    over = builder.sub(reach, simd.int_constant(L - 1))
                    pair = emit.read(start, emit.first(reach)), emit.read(early, emit.first(over))
                order = [*range(0, L, 2), *range(L + 1, 2 * L, 2)]
                value = builder.shuffle_vector(*pair, ir.Constant(emit.words, order))
            at = builder.gep(sums, [i])
            emit.store(builder.fadd(emit.load(at), value), at)

        emit.over(count, update)
        return context.get_dummy_value()

    return types.void(lanes, kind, step, sums, row, types.int64), generate


@intrinsic(prefer_literal=True)
def sum_window(typing_context, lanes, kind, sums, row, lines, line, places, place, count):
    """``sums[i] += row[l * line + p * place + i]`` for l < lines, p < places, i < count, in this order.

    Each vector of sums is kept in a register: for windows so small that their rows stay in the cache. Row of
    the type called `kind`; sums are whole vectors.
    """
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        sums, row, lines, line, places, place, count = values[2:]
        emit = Vectors(builder, of, L)

        def update(i, mask):
            at = builder.gep(sums, [i])
            start = builder.gep(row, [i])
            outer = simd.Loop(builder, simd.int_constant(0), lines, 1, [emit.load(at)])
            near = builder.gep(start, [builder.mul(outer.index, line)])
            inner = simd.Loop(builder, simd.int_constant(0), places, 1, outer.carried)
            value = emit.read(builder.gep(near, [builder.mul(inner.index, place)]), mask)
            added = inner.close([builder.fadd(inner.carried[0], value)])
            emit.store(outer.close(added)[0], at)

        emit.over(count, update)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, kind, sums, row, i64, i64, i64, i64, i64), generate


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
def spread(typing_context, lanes, kind, step, row, width, values, kept, place):
    """``row[i] = values[i // step]`` where ``kept[i // step] == place + i % step``, else 0, for i < width.

    `step` 1 or 2; all of the type called `kind`, but kept, uint8 or int32.
    """
    L, of, S = lanes.literal_value, kind.literal_value, step.literal_value

    def generate(context, builder, signature, operands):
        row, width, values, kept, place = operands[3:]
        emit = Vectors(builder, of, L)
        numbers = kept.type.pointee
        i64 = simd.int_constant
        tests = [
            simd.splat(builder, builder.trunc(builder.add(place, i64(s)), numbers), L)
            for s in range(S)
        ]
        orders = [
            ir.Constant(emit.words, [start + i // 2 + i % 2 * L for i in range(L)])
            for start in (0, L // 2)
        ]

        def update(i, mask):
            k = _load_numbers(builder, builder.gep(kept, [i]), L, mask)
            v = emit.read(builder.gep(values, [i]), mask)
            sides = [
                builder.select(builder.icmp_signed("==", k, side), v, emit.zero()) for side in tests
            ]
            start = builder.mul(i, i64(S))
            for part, order in enumerate(orders[:S]):
                at = builder.add(start, i64(part * L))
                shuffled = sides[0] if S == 1 else builder.shuffle_vector(*sides, order)
                some = None if mask is None else emit.first(builder.sub(width, at))
                emit.write(shuffled, builder.gep(row, [at]), some)

        # A width that ends within a pair has its last value in a vector of masks.
        count = builder.udiv(builder.add(width, i64(S - 1)), i64(S))
        rest = builder.and_(width, i64(S * L - 1))
        whole = builder.udiv(builder.sub(width, rest), i64(S))
        loop = simd.Loop(builder, i64(0), whole, L, [])
        update(loop.index, None)
        loop.close([])
        with builder.if_then(builder.icmp_signed("!=", rest, i64(0))):
            update(whole, emit.first(builder.sub(count, whole)))
        return context.get_dummy_value()

    return types.void(lanes, kind, step, row, types.int64, values, kept, types.int64), generate


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
