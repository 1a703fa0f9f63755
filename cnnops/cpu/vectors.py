"""Loops over vectors of any of the four types in memory: half types are widened on the way in, rounded on the
way out. As `simd`, but that a pointer is an address with the name of a type (`elements`), and a row's last
vector is masked, so that nothing beyond it is read or written.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cnnops.cpu import simd

_POINTED = {
    "float32": types.float32,
    "float64": types.float64,
    "float16": types.uint16,
    "bfloat16": types.uint16,
}
"""What memory holds of each type, as numba knows it: half types as their bits."""


@intrinsic(prefer_literal=True)
def elements(typing_context, address, kind):
    """`address` as a pointer to elements of the type called `kind`."""
    result = types.CPointer(_POINTED[kind.literal_value])

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(result))

    return result(types.int64, kind), generate


class _Vectors(simd.Emit):
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

    def write(self, value: ir.Value, place: ir.Value, mask: ir.Value | None = None) -> None:
        """A vector, or its lanes of `mask`, to memory: rounded to nearest, ties to even."""
        if not self.half:
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

    def over(self, count: ir.Value, body: Callable[[ir.Value, ir.Value | None], None]) -> None:
        """`body` of each vector's first number and its mask, None but for a last one that is not whole."""
        builder = self.builder
        rest = builder.and_(count, simd.int_constant(self.lanes - 1))
        whole = builder.sub(count, rest)
        loop = simd.Loop(builder, simd.int_constant(0), whole, self.lanes, [])
        body(loop.index, None)
        loop.close([])
        with builder.if_then(builder.icmp_signed("!=", rest, simd.int_constant(0))):
            body(whole, self.first(rest))


@intrinsic(prefer_literal=True)
def larger(typing_context, lanes, kind, best, kept, row, count, place):
    """As `simd.keep_larger`, for a row without gaps of the type called `kind`."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        best, kept, row, count, place = values[2:]
        emit = _Vectors(builder, of, L)
        places = simd.splat(builder, builder.trunc(place, ir.IntType(32)), L)

        def update(i, mask):
            value = emit.read(builder.gep(row, [i]), mask)
            at = builder.gep(best, [i])
            where = builder.bitcast(builder.gep(kept, [i]), emit.words.as_pointer())
            former = emit.load(at)
            nan = builder.fcmp_unordered("uno", value, value)
            wins = builder.or_(builder.fcmp_ordered(">", value, former), nan)
            emit.store(builder.select(wins, value, former), at)
            before = builder.load(where, align=4)
            builder.store(builder.select(wins, places, before), where, align=4)

        emit.over(count, update)
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.void(lanes, kind, best, types.CPointer(types.int32), row, i64, i64)
    return signature, generate


@intrinsic(prefer_literal=True)
def sum_up(typing_context, lanes, kind, step, sums, row, count):
    """``sums[i] += row[i * step]`` for i < count; `step` 1 or 2, row of the type called `kind`. Sums are read
    and written in whole vectors, row is not."""
    L, of, S = lanes.literal_value, kind.literal_value, step.literal_value

    def generate(context, builder, signature, values):
        sums, row, count = values[3:]
        emit = _Vectors(builder, of, L)

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
        emit = _Vectors(builder, of, L)

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
        emit = _Vectors(builder, of, L)
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
        emit = _Vectors(builder, of, L)
        numbers = kept.type.pointee
        vector = ir.VectorType(numbers, L)
        i64 = simd.int_constant
        tests = [
            simd.splat(builder, builder.trunc(builder.add(place, i64(s)), numbers), L)
            for s in range(S)
        ]
        orders = [
            ir.Constant(emit.words, [start + i // 2 + i % 2 * L for i in range(L)])
            for start in (0, L // 2)
        ]
        numbers_align = numbers.width // 8

        def update(i, mask):
            from_kept = builder.bitcast(builder.gep(kept, [i]), vector.as_pointer())
            if mask is None:
                k = builder.load(from_kept, align=numbers_align)
            else:
                align = ir.IntType(32)(numbers_align)
                blank = ir.Constant(vector, [0] * L)
                form = ir.FunctionType(vector, [from_kept.type, align.type, mask.type, vector])
                name = f"llvm.masked.load.v{L}i{numbers.width}.p0"
                masked = simd.declared(builder.module, name, form)
                k = builder.call(masked, [from_kept, align, mask, blank])
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
def narrow(typing_context, lanes, kind, to, source, count):
    """``to[i] = source[i]`` for i < count; `to` of the type called `kind`, source whole vectors."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        to, source, count = values[2:]
        emit = _Vectors(builder, of, L)
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
        emit = _Vectors(builder, of, L)
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
    """The sum of `count` values of the type called `kind` in a row, in `lanes` sums of float64.

    LLVM's own loop over float32 costs several times as much, above all for rows as short as 49.
    """
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, operands):
        row, count = operands[2:]
        emit = _Vectors(builder, of, L)
        sums = simd.Emit(builder, ir.DoubleType(), L)

        def added(former, value):
            return builder.fadd(
                former, value if emit.align == 8 else builder.fpext(value, sums.vector)
            )

        at = simd.int_constant
        rest = builder.and_(count, at(4 * L - 1))
        few = builder.and_(count, at(L - 1))
        many, whole = builder.sub(count, rest), builder.sub(count, few)
        loop = simd.Loop(builder, at(0), many, 4 * L, [sums.zero()] * 4)
        four = loop.close(
            [
                added(former, emit.read(builder.gep(row, [builder.add(loop.index, at(k * L))])))
                for k, former in enumerate(loop.carried)
            ]
        )
        loop = simd.Loop(builder, many, whole, L, four[:1])
        first = loop.close([added(loop.carried[0], emit.read(builder.gep(row, [loop.index])))])[0]
        tail = emit.read(builder.gep(row, [whole]), emit.first(few))
        pairs = builder.fadd(first, four[1]), builder.fadd(four[2], four[3])
        return sums.total(added(builder.fadd(*pairs), tail))

    return types.float64(lanes, kind, values, types.int64), generate
