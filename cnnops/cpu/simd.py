"""Vector micro-kernels as LLVM IR, for use inside numba functions.

numba's own loops lose 4 to 10 times against a good library here: LLVM keeps no tile of accumulators in
registers by itself. These intrinsics write that tile down: `gemm` for outer products, `dot` for sums of
products along rows. `finish` is what may follow them, activations included: of an exponential LLVM would ask
libm, one lane at a time. Lanes and tile sizes are literal arguments, so one source serves every CPU; `lanes`
and `Tiles` say what fits the one at hand. Vectors wider than the CPU's still compute rightly (LLVM splits
them), which is how the tests try every width everywhere.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.polynomial import Chebyshev, Polynomial

from cnnops.cpu.compiler import routine
from cnnops.epilogue import ACTIVATIONS

WIDTHS = (128, 256, 512)
_I64 = ir.IntType(64)


@lru_cache(None)
def simd_bits() -> int:
    """Width of this CPU's vectors: 512 (AVX-512), 256 (AVX2) or 128; ``CNNOPS_SIMD_BITS`` overrides it.

    Raises ValueError for a width that is none of these.
    """
    named = os.environ.get("CNNOPS_SIMD_BITS")
    if named:
        if named not in map(str, WIDTHS):
            raise ValueError(f"CNNOPS_SIMD_BITS: expected one of {WIDTHS}, got {named!r}")
        return int(named)
    if "avx512f" in _features():
        return 512
    return 256 if {"avx2", "fma"} <= _features() else 128


@lru_cache(None)
def _features() -> set[str]:
    """What numba compiles for: the host's, unless its own settings name another CPU."""
    listed = numba.config.CPU_FEATURES
    if listed is not None:
        return {word[1:] for word in listed.split(",") if word.startswith("+")}
    if numba.config.CPU_NAME == "generic":
        return set()
    return {name for name, present in llvm.get_host_cpu_features().items() if present}


@lru_cache(None)
def _cpu_name() -> str:
    return str(llvm.get_host_cpu_name())


def in_two_steps() -> bool:
    """Whether this CPU does vectors of 512 bits in two steps, as Zen 4 does: half of one then costs half."""
    return _cpu_name() == "znver4"


def third_level_is_near() -> bool:
    """Whether the third-level cache belongs to a few cores, as AMD's does. Behind a mesh of many it is hardly
    faster than memory."""
    return _cpu_name().startswith("znver")


LINE = 64
"""Bytes of memory that caches hold and ask for together."""

PAST = (16 if third_level_is_near() else 2) << 20
"""Bytes of a result, made from as many, beyond which it is written past the caches: nobody will find it
there."""


def lanes(name: str) -> int:
    """Elements of the type called `name` in one vector."""
    return simd_bits() // {"float32": 32, "float64": 64}[name]


@dataclass(frozen=True)
class Tiles:
    """Accumulator tiles that leave registers for the operands.

    `gemm` and `dot` are (rows, vectors) and (rows, columns); the thin ones serve a single row, as in
    depthwise convolution.
    """

    gemm: tuple[int, int]
    gemm_thin: tuple[int, int]
    dot: tuple[int, int]
    dot_thin: tuple[int, int]


@lru_cache(None)
def tiles() -> Tiles:
    """For 32 vector registers, or for the 16 that x86 has below AVX-512."""
    if simd_bits() == 512 or platform.machine() in ("aarch64", "arm64"):
        return Tiles((6, 4), (1, 8), (5, 5), (1, 5))
    return Tiles((4, 3), (1, 6), (3, 3), (1, 5))


class Emit:
    """Writes vector instructions on elements of one type."""

    def __init__(self, builder: ir.IRBuilder, element: ir.Type, lanes: int) -> None:
        self.builder = builder
        self.element = element
        self.vector = ir.VectorType(element, lanes)
        self.lanes = lanes
        self.align = 4 if isinstance(element, ir.FloatType) else 8
        self._suffix = f"v{lanes}f{8 * self.align}"

    def zero(self) -> ir.Constant:
        return ir.Constant(self.vector, [0.0] * self.lanes)

    def load(self, place: ir.Value) -> ir.Value:
        return self.builder.load(
            self.builder.bitcast(place, self.vector.as_pointer()), align=self.align
        )

    def store(self, value: ir.Value, place: ir.Value) -> None:
        self.builder.store(
            value, self.builder.bitcast(place, self.vector.as_pointer()), align=self.align
        )

    def load_some(self, place: ir.Value, mask: ir.Value) -> ir.Value:
        """Lanes of `mask` from memory, zero in the others; nothing behind them is touched."""
        address = self.builder.bitcast(place, self.vector.as_pointer())
        kind = ir.FunctionType(self.vector, [address.type, ir.IntType(32), mask.type, self.vector])
        function = declared(self.builder.module, f"llvm.masked.load.{self._suffix}.p0", kind)
        align = ir.Constant(ir.IntType(32), self.align)
        return self.builder.call(function, [address, align, mask, self.zero()])

    def store_some(self, value: ir.Value, place: ir.Value, mask: ir.Value) -> None:
        address = self.builder.bitcast(place, self.vector.as_pointer())
        kind = ir.FunctionType(
            ir.VoidType(), [self.vector, address.type, ir.IntType(32), mask.type]
        )
        function = declared(self.builder.module, f"llvm.masked.store.{self._suffix}.p0", kind)
        self.builder.call(function, [value, address, ir.Constant(ir.IntType(32), self.align), mask])

    def first(self, count: ir.Value) -> ir.Value:
        """A mask of the first `count` lanes."""
        numbers = ir.Constant(ir.VectorType(_I64, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", numbers, splat(self.builder, count, self.lanes))

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        # fmuladd is one instruction where the CPU has it; llvm.fma would call libm where it does not.
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        function = declared(self.builder.module, f"llvm.fmuladd.{self._suffix}", kind)
        return self.builder.call(function, [a, b, c])

    def prefetch(self, place: ir.Value, level: int = 1) -> None:
        """Ask for a line of memory, into the cache of a level; any address will do."""
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, i32, i32, i32])
        function = declared(self.builder.module, "llvm.prefetch.p0", kind)
        self.builder.call(function, [place, i32(0), i32(4 - level), i32(1)])

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.vector, [value] * self.lanes)

    def above(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The mask of lanes in which ``a > b``: not those with a NaN."""
        return self.builder.fcmp_ordered(">", a, b)

    def clamp(self, z: ir.Value, low: float, high: float) -> ir.Value:
        """z, or the nearer one of two numbers where z is not between them; NaN stays."""
        return self.between(z, self.constant(low), self.constant(high))

    def between(self, z: ir.Value, least: ir.Value, most: ir.Value) -> ir.Value:
        """As `clamp`, by two vectors."""
        # In this form one instruction each: x86's max and min give their second operand where one is NaN.
        z = self.builder.select(self.above(least, z), least, z)
        return self.builder.select(self.above(z, most), most, z)

    def exp(self, z: ir.Value) -> ir.Value:
        """e^z, within a unit in the last place or two: 0, infinity and NaN as they should be."""
        low, high = (-104.0, 89.0) if self.align == 4 else (-746.0, 710.0)
        power, n, exponent = self._power(self.clamp(z, low, high))
        power = self.builder.fadd(power, self.constant(1.0))
        if self.lanes * self.align == 64 and "avx512f" in _features():
            return self._scaled(power, exponent)
        # 2^n in two factors: n reaches beyond what an exponent holds on either side.
        half = self.builder.ashr(n, self._integers(1))
        other = self.builder.sub(n, half)
        return self.builder.fmul(self.builder.fmul(power, self._two_to(half)), self._two_to(other))

    def _scaled(self, value: ir.Value, exponent: ir.Value) -> ir.Value:
        """``value * 2^exponent``, rounded once, by AVX-512's own instruction."""
        mask, mode = ir.IntType(self.lanes), ir.IntType(32)
        kind = ir.FunctionType(self.vector, [self.vector] * 3 + [mask, mode])
        name = f"llvm.x86.avx512.mask.scalef.{'ps' if self.align == 4 else 'pd'}.512"
        function = declared(self.builder.module, name, kind)
        by_register = mode(4)
        return self.builder.call(function, [value, exponent, value, mask(-1), by_register])

    def tanh(self, z: ir.Value) -> ir.Value:
        builder, one = self.builder, self.constant(1.0)
        negative = self.above(self.zero(), z)
        z = builder.select(negative, z, builder.fneg(z))
        # By e^(-2|z|) - 1, which keeps all digits of a small z; from 20 on, 1 is the nearest number.
        power, n, _ = self._power(self.clamp(builder.fmul(z, self.constant(2.0)), -40.0, 0.0))
        scale = self._two_to(n)
        less_one = self.multiply_add(scale, power, builder.fsub(scale, one))
        size = builder.fdiv(
            builder.fsub(self.zero(), less_one), builder.fadd(less_one, self.constant(2.0))
        )
        return builder.select(negative, builder.fneg(size), size)

    def erf(self, z: ir.Value) -> ir.Value:
        """One lane at a time, by the C library."""
        kind = ir.FunctionType(self.element, [self.element])
        name = "erff" if self.align == 4 else "erf"
        function = declared(self.builder.module, name, kind)
        result = z
        for lane in map(ir.IntType(32), range(self.lanes)):
            value = self.builder.call(function, [self.builder.extract_element(z, lane)])
            result = self.builder.insert_element(result, value, lane)
        return result

    def _integers(self, value: int) -> ir.Constant:
        width = ir.IntType(8 * self.align)
        return ir.Constant(ir.VectorType(width, self.lanes), [value] * self.lanes)

    def _power(self, z: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The p and the integer n, also as a float, of ``e^z = (1 + p) 2^n``, for a z that is not far beyond
        e^z's range."""
        builder = self.builder
        mantissa, head, terms = (23, 15, 7) if self.align == 4 else (52, 40, 13)
        # A number so large that the nearest integer is in its last bits.
        large = self.constant(1.5 * 2**mantissa)
        shifted = self.multiply_add(z, self.constant(math.log2(math.e)), large)
        rounded = builder.fsub(shifted, large)
        integers = self._integers(0).type
        n = builder.sub(builder.bitcast(shifted, integers), builder.bitcast(large, integers))
        # ln 2 in two parts: a product with the first is exact.
        first = round(math.log(2) * 2**head) / 2**head
        second = float(Decimal(first) - Decimal(2).ln())
        r = self.multiply_add(rounded, self.constant(-first), z)
        r = self.multiply_add(rounded, self.constant(second), r)
        # The series of e^r - 1, |r| <= ln 2 / 2, as far as it matters.
        p = self.constant(1 / math.factorial(terms))
        for k in range(terms - 1, 0, -1):
            p = self.multiply_add(p, r, self.constant(1 / math.factorial(k)))
        return builder.fmul(p, r), n, rounded

    def _two_to(self, n: ir.Value) -> ir.Value:
        mantissa, bias = (23, 127) if self.align == 4 else (52, 1023)
        exponent = self.builder.add(n, self._integers(bias))
        return self.builder.bitcast(
            self.builder.shl(exponent, self._integers(mantissa)), self.vector
        )

    def total(self, vector: ir.Value) -> ir.Value:
        """The sum of the lanes, in a fixed tree's order."""
        kind = ir.FunctionType(self.element, [self.element, self.vector])
        function = declared(self.builder.module, f"llvm.vector.reduce.fadd.{self._suffix}", kind)
        start = ir.Constant(self.element, -0.0)
        return self.builder.call(function, [start, vector], fastmath=("reassoc",))


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """A vector with `scalar` in every lane."""
    blank = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(blank, scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, blank, zeros)


def declared(module: ir.Module, name: str, kind: ir.FunctionType) -> ir.Function:
    found = module.globals.get(name)
    return found if found is not None else ir.Function(module, kind, name)


class Loop:
    """``for index in range(start, stop, step)`` with `carried` values: fill its body, then call `close`."""

    def __init__(
        self,
        builder: ir.IRBuilder,
        start: ir.Value,
        stop: ir.Value,
        step: int,
        carried: list[ir.Value],
    ) -> None:
        self._builder, self._step = builder, step
        before = builder.block
        self._head = builder.append_basic_block("head")
        body = builder.append_basic_block("body")
        self._after = builder.append_basic_block("after")
        builder.branch(self._head)
        builder.position_at_end(self._head)
        self.index = builder.phi(_I64)
        self.index.add_incoming(start, before)
        self.carried = [builder.phi(value.type) for value in carried]
        for phi, value in zip(self.carried, carried, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", self.index, stop), body, self._after)
        builder.position_at_end(body)

    def close(self, carried: list[ir.Value]) -> list[ir.Value]:
        """End the body, which leaves `carried`; returns the values behind the loop."""
        builder = self._builder
        following = builder.add(self.index, ir.Constant(_I64, self._step))
        for phi, value in zip([self.index, *self.carried], [following, *carried], strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(self._head)
        builder.position_at_end(self._after)
        return self.carried


def int_constant(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


@intrinsic
def ask(typing_context, values, count):
    """Ask for the lines of memory of `count` values, into the second-level cache; any address will do."""

    def generate(context, builder, signature, operands):
        start, count = operands
        emit = Emit(builder, start.type.pointee, 1)
        loop = Loop(builder, int_constant(0), count, LINE // emit.align, [])
        emit.prefetch(builder.gep(start, [loop.index]), 2)
        loop.close([])
        return context.get_dummy_value()

    return types.void(values, types.int64), generate


@intrinsic(prefer_literal=True)
def gemm(typing_context, lanes, rows, vectors, a, b, offsets, count, c, pitch, accumulate):
    """``C[m, v] (+)= sum_k A[k, m] * B[offsets[k] + v]`` for m < rows, v < vectors * lanes, k < count.

    `a` packed count x rows; `offsets` int32, in elements; `pitch` from row to row of C. C is overwritten
    where `accumulate` is 0, added to elsewhere. Reads of B and writes of C are whole vectors.
    """
    L, M, V = lanes.literal_value, rows.literal_value, vectors.literal_value

    def generate(context, builder, signature, values):
        a, b, offsets, count, c, pitch, accumulate = values[3:]
        emit = Emit(builder, a.type.pointee, L)
        places = [
            builder.gep(c, [builder.add(builder.mul(pitch, int_constant(m)), int_constant(v * L))])
            for m in range(M)
            for v in range(V)
        ]
        loop = Loop(builder, int_constant(0), count, 1, [emit.zero()] * (M * V))
        k = loop.index
        row = builder.gep(b, [builder.sext(builder.load(builder.gep(offsets, [k])), _I64)])
        column = [emit.load(builder.gep(row, [int_constant(v * L)])) for v in range(V)]
        packed = builder.gep(a, [builder.mul(k, int_constant(M))])
        sums = []
        for m in range(M):
            weight = splat(builder, builder.load(builder.gep(packed, [int_constant(m)])), L)
            sums += [
                emit.multiply_add(weight, column[v], loop.carried[m * V + v]) for v in range(V)
            ]
        # What C holds is added to the sum of these terms, not they to it one by one: a long sum in stretches
        # rounds less.
        fresh = loop.close(sums)
        before = builder.block
        with builder.if_then(builder.icmp_signed("!=", accumulate, int_constant(0))):
            added = [
                builder.fadd(emit.load(place), value)
                for place, value in zip(places, fresh, strict=True)
            ]
            there = builder.block
        results = [builder.phi(emit.vector) for _ in places]
        for phi, value, more in zip(results, fresh, added, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(more, there)
        for phi, place in zip(results, places, strict=True):
            emit.store(phi, place)
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.void(
        lanes, rows, vectors, a, b, types.CPointer(types.int32), i64, c, i64, i64
    )  # fmt: skip
    return signature, generate


@intrinsic(prefer_literal=True)
def dot(
    typing_context, lanes, rows, columns, a, row, line, b, offsets, step, lines, length, c, pitch
):
    """``C[m, n] += sum_{s,i} A[m * row + s * line + i] * B[s * step + offsets[n] + i]``.

    For m < rows, n < columns, s < lines, i < length; `offsets` int32, in elements; `pitch` from row to row of
    C. Whole vectors are read; what lies behind `length` takes no part, be it NaN.
    """
    L, M, N = lanes.literal_value, rows.literal_value, columns.literal_value

    def generate(context, builder, signature, values):
        a, row, line, b, offsets, step, lines, length, c, pitch = values[3:]
        emit = Emit(builder, a.type.pointee, L)
        rest = builder.and_(length, int_constant(L - 1))
        whole = builder.sub(length, rest)
        inside = emit.first(rest)
        far = [
            builder.sext(builder.load(builder.gep(offsets, [int_constant(n)])), _I64)
            for n in range(N)
        ]

        def products(i, left, right, sums, part):
            xs = [part(emit.load(builder.gep(place, [i]))) for place in left]
            result = [None] * (M * N)
            for n in range(N):
                y = part(emit.load(builder.gep(right[n], [i])))
                for m in range(M):
                    result[m * N + n] = emit.multiply_add(xs[m], y, sums[m * N + n])
            return result

        outer = Loop(builder, int_constant(0), lines, 1, [emit.zero()] * (M * N))
        near = builder.gep(a, [builder.mul(outer.index, line)])
        left = [builder.gep(near, [builder.mul(row, int_constant(m))]) for m in range(M)]
        base = builder.gep(b, [builder.mul(outer.index, step)])
        right = [builder.gep(base, [offset]) for offset in far]
        inner = Loop(builder, int_constant(0), whole, L, outer.carried)
        sums = inner.close(products(inner.index, left, right, inner.carried, lambda v: v))
        before = builder.block
        with builder.if_then(builder.icmp_signed("!=", rest, int_constant(0))):
            tail = products(
                whole, left, right, sums, lambda v: builder.select(inside, v, emit.zero())
            )
            there = builder.block
        joined = []
        for full, more in zip(sums, tail, strict=True):
            phi = builder.phi(emit.vector)
            phi.add_incoming(full, before)
            phi.add_incoming(more, there)
            joined.append(phi)
        sums = outer.close(joined)
        for m in range(M):
            for n in range(N):
                place = builder.gep(
                    c, [builder.add(builder.mul(pitch, int_constant(m)), int_constant(n))]
                )
                builder.store(builder.fadd(builder.load(place), emit.total(sums[m * N + n])), place)
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.void(
        lanes, rows, columns, a, i64, i64, b, types.CPointer(types.int32), i64, i64, i64, c, i64
    )  # fmt: skip
    return signature, generate


def turned(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Columns of a square of vectors: its quarters change places across the diagonal, then each quarter's
    quarters, down to elements."""
    L = len(rows)
    rows, index, half = list(rows), ir.VectorType(ir.IntType(32), L), L // 2
    while half:
        upper = ir.Constant(index, [n + L - half if n & half else n for n in range(L)])
        lower = ir.Constant(index, [n + L if n & half else n + half for n in range(L)])
        for n in range(L):
            if not n & half:
                pair = rows[n], rows[n + half]
                rows[n] = builder.shuffle_vector(*pair, upper)
                rows[n + half] = builder.shuffle_vector(*pair, lower)
        half //= 2
    return rows


@intrinsic(prefer_literal=True)
def transpose(typing_context, lanes, to, pitch, source, offsets, length):
    """``to[i * pitch + n] = source[offsets[n] + i]`` for n < lanes, i < length rounded up to whole vectors.

    `offsets` int32, in elements. Reads are whole vectors, too.
    """
    L = lanes.literal_value

    def generate(context, builder, signature, values):
        to, pitch, source, offsets, length = values[1:]
        emit = Emit(builder, source.type.pointee, L)
        columns = [
            builder.gep(
                source, [builder.sext(builder.load(builder.gep(offsets, [int_constant(n)])), _I64)]
            )
            for n in range(L)
        ]
        loop = Loop(builder, int_constant(0), length, L, [])
        rows = [emit.load(builder.gep(column, [loop.index])) for column in columns]
        for n, row in enumerate(turned(builder, rows)):
            place = builder.mul(builder.add(loop.index, int_constant(n)), pitch)
            emit.store(row, builder.gep(to, [place]))
        loop.close([])
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(lanes, to, i64, source, types.CPointer(types.int32), i64), generate


@intrinsic(prefer_literal=True)
def copy(typing_context, lanes, to, source, count, shift):
    """``to[i] = source[i] + shift`` for i < count: for short rows, where a loop's set-up would dominate."""
    L = lanes.literal_value

    def generate(context, builder, signature, values):
        to, source, count, shift = values[1:]
        emit = Emit(builder, source.type.pointee, L)
        addend = splat(builder, shift, L)
        rest = builder.and_(count, int_constant(L - 1))
        whole = builder.sub(count, rest)
        loop = Loop(builder, int_constant(0), whole, L, [])
        value = emit.load(builder.gep(source, [loop.index]))
        emit.store(builder.fadd(value, addend), builder.gep(to, [loop.index]))
        loop.close([])
        with builder.if_then(builder.icmp_signed("!=", rest, int_constant(0))):
            mask = emit.first(rest)
            value = emit.load_some(builder.gep(source, [whole]), mask)
            emit.store_some(builder.fadd(value, addend), builder.gep(to, [whole]), mask)
        return context.get_dummy_value()

    return types.void(lanes, to, source, types.int64, source.dtype), generate


def _sigmoid(emit: Emit, z: ir.Value, numerator: ir.Value) -> ir.Value:
    """``numerator / (1 + e^-z)``."""
    below = emit.builder.fadd(emit.constant(1.0), emit.exp(emit.builder.fneg(z)))
    return emit.builder.fdiv(numerator, below)


@lru_cache(None)
def _below_coefficients() -> tuple[float, ...]:
    """Of the polynomial in ``t = 1 / (1 + x / 2)``, t >= 1/6, that is ``e^(x²) erfc(x) / 2`` to 1e-8."""

    def scaled(t):
        x = 2 / t - 2
        return np.exp(x * x) * np.vectorize(math.erfc)(x) / 2

    fitted = Chebyshev.interpolate(scaled, 11, domain=[1 / 6, 1])
    return tuple(fitted.convert(kind=Polynomial).coef.tolist())


def _gelu(emit: Emit, z: ir.Value) -> ir.Value:
    builder, one = emit.builder, emit.constant(1.0)
    if emit.align == 8:
        erf = emit.erf(builder.fmul(z, emit.constant(math.sqrt(0.5))))
        twice = builder.fadd(one, erf)
        return builder.fmul(builder.fmul(emit.constant(0.5), z), twice)
    # Φ(-|z|), which is erfc(|z| / √2) / 2; beyond the polynomial's range its other factor is zero.
    positive = emit.above(z, emit.zero())
    size = builder.select(positive, z, builder.fneg(z))
    t = builder.fdiv(one, emit.multiply_add(size, emit.constant(math.sqrt(0.125)), one))
    *rest, below = map(emit.constant, _below_coefficients())
    for coefficient in reversed(rest):
        below = emit.multiply_add(below, t, coefficient)
    density = emit.exp(builder.fmul(builder.fmul(z, emit.constant(-0.5)), z))
    below = builder.fmul(below, density)
    return builder.fmul(z, builder.select(positive, builder.fsub(one, below), below))


def _hardswish(emit: Emit, z: ir.Value) -> ir.Value:
    builder = emit.builder
    gate = emit.clamp(builder.fadd(z, emit.constant(3.0)), 0.0, 6.0)
    return builder.fdiv(builder.fmul(z, gate), emit.constant(6.0))


def _leaky_relu(emit: Emit, z: ir.Value) -> ir.Value:
    below = emit.builder.fmul(z, emit.constant(0.01))
    return emit.builder.select(emit.above(z, emit.zero()), z, below)


_ACTIVATIONS: dict[str, Callable[[Emit, ir.Value], ir.Value]] = {
    "none": lambda emit, z: z,
    "relu": lambda emit, z: emit.clamp(z, 0.0, math.inf),
    "relu6": lambda emit, z: emit.clamp(z, 0.0, 6.0),
    "silu": lambda emit, z: _sigmoid(emit, z, z),
    "gelu": _gelu,
    "hardswish": _hardswish,
    "leaky_relu": _leaky_relu,
    "sigmoid": lambda emit, z: _sigmoid(emit, z, emit.constant(1.0)),
    "tanh": lambda emit, z: emit.tanh(z),
}
LIMITS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
"""Activations that are limits of what passes."""


def _function(emit: Emit, name: str) -> ir.Function:
    """An activation of one vector as a function, one for all who call it."""
    kind = ir.FunctionType(emit.vector, [emit.vector])
    function = declared(emit.builder.module, f"cnnops.{name}.{emit._suffix}", kind)
    if function.is_declaration:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        builder = ir.IRBuilder(function.append_basic_block())
        within = Emit(builder, emit.element, emit.lanes)
        builder.ret(_ACTIVATIONS[name](within, function.args[0]))
    return function


def with_activation(
    emit: Emit, activation: ir.Value, body: Callable[[Callable[[ir.Value], ir.Value]], None]
) -> None:
    """Write ``body(act)`` twice, for an index into `ACTIVATIONS` that is known at run time: for limits, which
    are compared with, and for others, which are called. A body for each would be compiled for seconds."""
    builder = emit.builder

    def chosen(values):
        """The value that `activation` names."""
        *others, (_, result) = values.items()
        for name, value in others:
            this = builder.icmp_signed("==", activation, int_constant(ACTIVATIONS.index(name)))
            result = builder.select(this, value, result)
        return result

    limits = [{name: emit.constant(LIMITS[name][side]) for name in LIMITS} for side in range(2)]
    called = {name: _function(emit, name) for name in ACTIVATIONS if name not in LIMITS}
    limited = ir.Constant(ir.IntType(1), 0)
    for name in LIMITS:
        this = builder.icmp_signed("==", activation, int_constant(ACTIVATIONS.index(name)))
        limited = builder.or_(limited, this)
    with builder.if_else(limited) as (then, otherwise):
        with then:
            low, high = map(chosen, limits)
            body(lambda z: emit.between(z, low, high))
        with otherwise:
            function = chosen(called)
            body(lambda z: builder.call(function, [z]))


@intrinsic(prefer_literal=True)
def finish(
    typing_context, lanes, to, source, residual, count, scale, shift, activation, following
):  # fmt: skip
    """``to[i] = act(scale * source[i] + shift + residual[i])`` for i < count; a null residual is none.

    `activation`, an index into `ACTIVATIONS`, is looked at once a call: no kernel is compiled anew for it.
    The row of the residual that is needed next begins `following` elements behind this one: it is fetched.
    """
    L = lanes.literal_value

    def generate(context, builder, signature, values):
        to, source, residual, count, scale, shift, activation, following = values[1:]
        emit = Emit(builder, source.type.pointee, L)
        factor, addend = splat(builder, scale, L), splat(builder, shift, L)
        rest = builder.and_(count, int_constant(L - 1))
        whole = builder.sub(count, rest)

        def update(function, given, i, mask):
            def load(place):
                return emit.load(place) if mask is None else emit.load_some(place, mask)

            z = emit.multiply_add(load(builder.gep(source, [i])), factor, addend)
            if given:
                place = builder.gep(residual, [i])
                z = builder.fadd(z, load(place))
                emit.prefetch(builder.gep(place, [following]))
            y, place = function(z), builder.gep(to, [i])
            if mask is None:
                emit.store(y, place)
            else:
                emit.store_some(y, place, mask)

        null = ir.Constant(residual.type, None)
        there = builder.icmp_unsigned("!=", residual, null)

        def loops(function):
            with builder.if_else(there) as branches:
                for given, branch in zip((True, False), branches, strict=True):
                    with branch:
                        loop = Loop(builder, int_constant(0), whole, L, [])
                        update(function, given, loop.index, None)
                        loop.close([])
                        with builder.if_then(builder.icmp_signed("!=", rest, int_constant(0))):
                            update(function, given, whole, emit.first(rest))

        with_activation(emit, activation, loops)
        return context.get_dummy_value()

    i64, element = types.int64, source.dtype
    signature = types.void(lanes, to, source, residual, i64, element, element, i64, i64)
    return signature, generate


@routine(fastmath={"reassoc", "contract"})
def sum_of(values, count, stride):
    """The sum of `count` values, `stride` apart, in float64 whatever their type."""
    total = 0.0
    if stride == 1:
        for i in range(count):
            total += values[i]
    else:
        for i in range(count):
            total += values[i * stride]
    return total
