"""The norms' loops over vectors, as LLVM IR: moments, forward, and both halves of the backward.

Each goes over `rows` rows of `count` elements, `pitch` apart, in one of two ways:

    along   lanes lie along a row; whatever a channel has (mean, scale, …) is one number: row-major planes
    across  lanes are channels; each has its number in a table, as long as a row: channels-last memory

Tables are read in whole vectors, rows are not: their last vector is masked. Elements x enter as ``x - high``,
high the mean as their type holds it. Sums of a few elements are kept in their own type, then added to
float64.

Layer norm has loops of its own, over one row: there the row has the mean and the scale, and each of its
elements a gamma and a beta, arrays as long as the row.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cnnops.cpu import simd
from cnnops.cpu.vectors import Vectors
from cnnops.epilogue import ACTIVATIONS

VECTORS = 256
"""Vectors of a row that are added up in the elements' own type, in four sums."""

ROWS = 64
"""Rows whose sums across are added up before they meet float64, a quarter of them where a row takes several
strips: so few are fetched as one piece, whichever strip they are read by."""

NONE, RESIDUAL, RESULT, READY = range(4)
"""What tells the backward the activation's derivative: x alone, x and the residual, the result y; or the
gradient that is read has that factor already."""

_int = simd.int_constant


# ---- activations -------------------------------------------------------------------------------------------


def _activate(emit: Vectors, name: str, z: ir.Value) -> ir.Value:
    if name == "relu":
        below = emit.builder.fcmp_ordered("<=", z, emit.zero())
        return emit.builder.select(below, emit.zero(), z)
    return simd._ACTIVATIONS[name](emit, z)


def _sigmoid(emit: Vectors, z: ir.Value) -> ir.Value:
    builder, one = emit.builder, emit.constant(1.0)
    return builder.fdiv(one, builder.fadd(one, emit.exp(builder.fneg(z))))


def _gelu_slope(emit: Vectors, z: ir.Value) -> ir.Value:
    """``Φ(z) + z φ(z)``."""
    builder, one = emit.builder, emit.constant(1.0)
    bell = emit.exp(builder.fmul(builder.fmul(z, emit.constant(-0.5)), z))
    if emit.align == 8:
        erf = emit.erf(builder.fmul(z, emit.constant(math.sqrt(0.5))))
        below = builder.fmul(emit.constant(0.5), builder.fadd(one, erf))
    else:
        # As `simd`'s own gelu finds Φ(-|z|).
        positive = emit.above(z, emit.zero())
        size = builder.select(positive, z, builder.fneg(z))
        t = builder.fdiv(one, emit.multiply_add(size, emit.constant(math.sqrt(0.125)), one))
        *rest, tail = map(emit.constant, simd._below_coefficients())
        for coefficient in reversed(rest):
            tail = emit.multiply_add(tail, t, coefficient)
        tail = builder.fmul(tail, bell)
        below = builder.select(positive, builder.fsub(one, tail), tail)
    density = builder.fmul(bell, emit.constant(1 / math.sqrt(2 * math.pi)))
    return emit.multiply_add(z, density, below)


def _gated(emit: Vectors, name: str, g: ir.Value, z: ir.Value, of_result: bool) -> ir.Value:
    """``g * act'(z)``, or, `of_result`, where z is what act came to. Where there is no derivative, PyTorch's
    choice."""
    builder, zero, one = emit.builder, emit.zero(), emit.constant(1.0)
    if name == "none":
        return g
    if name == "relu":
        return builder.select(builder.fcmp_ordered("<=", z, zero), zero, g)
    if name == "relu6":
        low = builder.fcmp_ordered("<=", z, zero)
        high = builder.fcmp_ordered(">=", z, emit.constant(6.0))
        return builder.select(builder.or_(low, high), zero, g)
    if name == "leaky_relu":
        return builder.select(emit.above(z, zero), g, builder.fmul(g, emit.constant(0.01)))
    if name == "hardswish":
        slope = emit.multiply_add(z, emit.constant(1 / 3), emit.constant(0.5))
        slope = builder.select(builder.fcmp_ordered("<=", z, emit.constant(-3.0)), zero, slope)
        slope = builder.select(builder.fcmp_ordered(">=", z, emit.constant(3.0)), one, slope)
    elif name == "silu":
        s = _sigmoid(emit, z)
        slope = builder.fmul(s, emit.multiply_add(z, builder.fsub(one, s), one))
    elif name == "gelu":
        slope = _gelu_slope(emit, z)
    elif name == "sigmoid":
        s = z if of_result else _sigmoid(emit, z)
        slope = builder.fmul(s, builder.fsub(one, s))
    else:
        t = z if of_result else emit.tanh(z)
        slope = builder.fsub(one, builder.fmul(t, t))
    return builder.fmul(g, slope)


def _cheap(name: str) -> bool:
    """Whether an activation is so short that several vectors at once pay."""
    return name in ("none", "relu", "relu6", "leaky_relu")


def may_wait(kind: str, name: str, form: int) -> bool:
    """Whether grad_z may wait in grad_x's memory until grad_x is made of it: where an activation's derivative
    takes longer than to write it and to read it again. Half types would round it."""
    dear = form in (NONE, RESIDUAL) and name in ("silu", "gelu", "sigmoid", "tanh")
    return dear and kind in ("float32", "float64")


# ---- loops -------------------------------------------------------------------------------------------------

Body = Callable[[int, list[ir.Value], list[ir.Value], "ir.Value | None"], None]
"""Gets the place of its first vector among those that are done together, the offsets of some vectors, the
columns that they begin in, and the mask of a last vector."""


def _parts(
    emit: Vectors, unroll: int, count: ir.Value,
    part: Callable[[int, ir.Value, int, ir.Value | None], None],
) -> None:  # fmt: skip
    """`part` of all vectors of a row: of the place of its first one among those done together, of the column
    that it begins in, of their number, and of a last one's mask. They are `unroll`, a power of two, and at
    the row's end ever fewer by halves: a short row costs few steps, and whole vectors have no masks."""
    builder, L = emit.builder, emit.lanes
    start = builder.and_(count, _int(-unroll * L))
    loop = simd.Loop(builder, _int(0), start, unroll * L, [])
    part(0, loop.index, unroll, None)
    loop.close([])
    done, vectors = 0, unroll // 2
    while vectors > 0:
        here = builder.and_(count, _int(vectors * L))
        with builder.if_then(builder.icmp_signed("!=", here, _int(0))):
            part(done, start, vectors, None)
        start, done, vectors = builder.add(start, here), done + vectors, vectors // 2
    rest = builder.and_(count, _int(L - 1))
    with builder.if_then(builder.icmp_signed("!=", rest, _int(0))):
        part(done, start, 1, emit.first(rest))


def _sweep(
    emit: Vectors, unroll: int, rows: ir.Value, pitch: ir.Value, count: ir.Value, body: Body
) -> None:
    """`body` of all vectors of all rows, in the order of memory."""
    builder = emit.builder
    outer = simd.Loop(builder, _int(0), rows, 1, [])
    line = builder.mul(outer.index, pitch)

    def part(first: int, start: ir.Value, vectors: int, mask: ir.Value | None) -> None:
        columns = [builder.add(start, _int(v * emit.lanes)) for v in range(vectors)]
        body(first, [builder.add(line, column) for column in columns], columns, mask)

    _parts(emit, unroll, count, part)
    outer.close([])


class _Values:
    """What channels have: `value` of each table, as vectors."""

    def __init__(self, emit: Vectors, across: bool, tables: list[ir.Value]) -> None:
        self._emit, self._across, self._tables = emit, across, tables
        if not across:
            builder = emit.builder
            self._splat = [simd.splat(builder, builder.load(t), emit.lanes) for t in tables]

    def at(self, column: ir.Value) -> list[ir.Value]:
        if not self._across:
            return self._splat
        return [self._emit.load(self._emit.builder.gep(t, [column])) for t in self._tables]


class _Sums:
    """Sums of vectors, one a slot and table: locals that LLVM keeps in registers, added to float64 tables."""

    def __init__(self, emit: Vectors, slots: int, tables: list[ir.Value]) -> None:
        self._emit, self._tables = emit, tables
        self._wide = simd.Emit(emit.builder, ir.DoubleType(), emit.lanes)
        self._kept = [
            [cgutils.alloca_once(emit.builder, emit.vector) for _ in range(slots)] for _ in tables
        ]

    def clear(self) -> None:
        for kept in self._kept:
            for place in kept:
                self._emit.builder.store(self._emit.zero(), place)

    def add(self, slot: int, terms: list[Term]) -> None:
        """A term for each table."""
        emit = self._emit
        for kept, term in zip(self._kept, terms, strict=True):
            place = kept[slot]
            emit.builder.store(_added(emit, emit.builder.load(place), term), place)

    def add_columns(self, columns: list[ir.Value]) -> None:
        """Slots belong to the vectors that begin in these columns."""
        builder = self._emit.builder
        for kept, table in zip(self._kept, self._tables, strict=True):
            for place, column in zip(kept, columns, strict=False):
                self.widen(builder.load(place), builder.gep(table, [column]))

    def add_lanes(self) -> None:
        """All slots belong to one channel."""
        builder = self._emit.builder
        for kept, table in zip(self._kept, self._tables, strict=True):
            values = [builder.load(place) for place in kept]
            while len(values) > 1:
                values = [
                    builder.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=True)
                ]
            total = self._wide.total(self._widened(values[0]))
            builder.store(builder.fadd(builder.load(table), total), table)

    def widen(self, value: ir.Value, place: ir.Value) -> None:
        """Add a vector to float64 sums."""
        wide = self._wide
        wide.store(self._emit.builder.fadd(wide.load(place), self._widened(value)), place)

    def _widened(self, value: ir.Value) -> ir.Value:
        return (
            value if self._emit.align == 8 else self._emit.builder.fpext(value, self._wide.vector)
        )


Term = tuple[ir.Value, "ir.Value | None"]
"""A vector, or two to be multiplied."""


def _added(emit: Vectors, former: ir.Value, term: Term) -> ir.Value:
    value, factor = term
    return (
        emit.builder.fadd(former, value)
        if factor is None
        else emit.multiply_add(value, factor, former)
    )


Terms = Callable[[ir.Value, "ir.Value | None", list[ir.Value]], list[Term]]
"""What the vector at an offset, with a mask or whole, adds to each table; with the channels' values."""


def _rows_together(emit: Vectors, slots: int, count: ir.Value) -> ir.Value:
    one_strip = emit.builder.icmp_signed("<=", count, _int(slots * emit.lanes))
    return emit.builder.select(one_strip, _int(ROWS), _int(ROWS // 4))


def _add_up(
    emit: Vectors, across: bool, rows: ir.Value, pitch: ir.Value, count: ir.Value, tables: list[ir.Value],
    sums: list[ir.Value], terms: Terms, slots: int,
) -> None:  # fmt: skip
    """Sums of all vectors of all rows."""
    builder, L = emit.builder, emit.lanes
    kept, channel = _Sums(emit, slots, sums), _Values(emit, across, tables)

    def add(first, offsets, columns, mask):
        found = [
            terms(offset, mask, channel.at(column))
            for offset, column in zip(offsets, columns, strict=True)
        ]
        for slot, each in enumerate(found, first):
            kept.add(slot, each)

    if not across:
        kept.clear()
        _sweep(emit, slots, rows, pitch, count, add)
        kept.add_lanes()
        return

    # Strips of some rows, whose sums stay in registers.
    together = _rows_together(emit, slots, count)
    stretches = builder.udiv(builder.add(rows, builder.sub(together, _int(1))), together)
    stretch = simd.Loop(builder, _int(0), stretches, 1, [])
    first_row = builder.mul(stretch.index, together)
    end = builder.add(first_row, together)
    end = builder.select(builder.icmp_signed("<", end, rows), end, rows)

    def strip(_: int, start: ir.Value, vectors: int, mask: ir.Value | None) -> None:
        columns = [builder.add(start, _int(v * L)) for v in range(vectors)]
        kept.clear()
        loop = simd.Loop(builder, first_row, end, 1, [])
        line = builder.mul(loop.index, pitch)
        add(0, [builder.add(line, column) for column in columns], columns, mask)
        loop.close([])
        kept.add_columns(columns)

    _parts(emit, slots, count, strip)
    stretch.close([])


def _where(emit: Vectors, mask: ir.Value | None, value: ir.Value) -> ir.Value:
    return value if mask is None else emit.builder.select(mask, value, emit.zero())


@intrinsic(prefer_literal=True)
def moments(
    typing_context, lanes, kind, across, exact, x, rows, pitch, count, about, first, second
):
    """``first += x - about`` and ``second += (x - about)²``: of every column (across), or of the one channel
    (along), at most `VECTORS` vectors at a time. `exact`: every term is float64, and so is `about`."""
    L, of, wide = lanes.literal_value, kind.literal_value, across.literal_value
    in_double = bool(exact.literal_value)

    def generate(context, builder, signature, values):
        x, rows, pitch, count, about, first, second = values[4:]
        source = Vectors(builder, of, L)
        emit = Vectors(builder, "float64", L) if in_double else source

        def terms(offset, mask, values):
            value = source.read(builder.gep(x, [offset]), mask)
            if emit.vector != source.vector:
                value = builder.fpext(value, emit.vector)
            d = _where(emit, mask, builder.fsub(value, values[0]))
            return [(d, None), (d, d)]

        slots = 1 if in_double else 4
        _add_up(emit, wide, rows, pitch, count, [about], [first, second], terms, slots)
        return context.get_dummy_value()

    i64, T = types.int64, types.CPointer(types.float64)
    return types.void(lanes, kind, across, exact, x, i64, i64, i64, about, T, T), generate


@intrinsic(prefer_literal=True)
def near(typing_context, lanes, kind, x, apart, count):
    """A number near the mean: that of `count` elements from x on and as many `apart` from these, `lanes` at
    most."""
    L, of = lanes.literal_value, kind.literal_value

    def generate(context, builder, signature, values):
        x, apart, count = values[2:]
        emit = Vectors(builder, of, L)
        mask = emit.first(count)
        pair = [emit.read(place, mask) for place in (x, builder.gep(x, [apart]))]
        total = emit.total(builder.fadd(*pair))
        return builder.fdiv(total, builder.sitofp(builder.add(count, count), emit.element))

    T = types.float64 if of == "float64" else types.float32
    return T(lanes, kind, x, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def element(typing_context, kind, x):
    """The element of the type called `kind` at x."""
    of = kind.literal_value

    def generate(context, builder, signature, values):
        return builder.extract_element(Vectors(builder, of, 1).read(values[1]), _int(0))

    return (types.float64 if of == "float64" else types.float32)(kind, x), generate


def _past(
    builder: ir.IRBuilder, emit: Vectors, asked: ir.Value, pitch: ir.Value, *places: ir.Value
) -> ir.Value:
    """Whether to write past the caches: if asked to, and every row begins where a whole vector may."""
    size = emit.lanes * (2 if emit.half else emit.align)
    bits = builder.mul(pitch, _int(2 if emit.half else emit.align))
    for place in places:
        bits = builder.or_(bits, builder.ptrtoint(place, ir.IntType(64)))
    aligned = builder.icmp_signed("==", builder.and_(bits, _int(size - 1)), _int(0))
    return builder.and_(aligned, builder.icmp_signed("!=", asked, _int(0)))


def _given(builder: ir.IRBuilder, place: ir.Value) -> ir.Value:
    return builder.icmp_unsigned("!=", place, ir.Constant(place.type, None))


def _either(builder: ir.IRBuilder, condition: ir.Value, code: Callable[[bool], None]) -> None:
    """`code` for either value of a condition: one of the two runs."""
    with builder.if_else(condition) as (yes, no):
        with yes:
            code(True)
        with no:
            code(False)


@intrinsic(prefer_literal=True)
def normalise(
    typing_context, lanes, kind, act, across, x, residual, y, rows, pitch, count, high, scale, shift, past
):  # fmt: skip
    """``y = act((x - high) * scale + shift + residual)``; a null residual is none. With `past`, y goes past
    the caches where its rows lie for that."""
    L, of, wide = lanes.literal_value, kind.literal_value, across.literal_value
    name = ACTIVATIONS[act.literal_value]

    def generate(context, builder, signature, values):
        x, residual, y, rows, pitch, count, high, scale, shift, past = values[4:]
        emit = Vectors(builder, of, L)
        tables = _Values(emit, wide, [high, scale, shift])

        def loops(residual_given: bool, past: bool) -> None:
            def body(_, offsets, columns, mask):
                results = []
                for offset, column in zip(offsets, columns, strict=True):
                    h, factor, addend = tables.at(column)
                    d = builder.fsub(emit.read(builder.gep(x, [offset]), mask), h)
                    z = emit.multiply_add(d, factor, addend)
                    if residual_given:
                        z = builder.fadd(z, emit.read(builder.gep(residual, [offset]), mask))
                    results.append(_activate(emit, name, z))
                for offset, result in zip(offsets, results, strict=True):
                    emit.write(result, builder.gep(y, [offset]), mask, past)

            _sweep(emit, 4 if _cheap(name) else 1, rows, pitch, count, body)

        past = _past(builder, emit, past, pitch, y)
        given = _given(builder, residual)
        _either(builder, given, lambda given: _either(builder, past, partial(loops, given)))
        return context.get_dummy_value()

    i64 = types.int64
    return (
        types.void(
            lanes, kind, act, across, x, residual, y, i64, i64, i64, high, scale, shift, i64
        ),
        generate,
    )


class _Back:
    """What both halves of the backward compute of each vector."""

    def __init__(self, emit: Vectors, name: str, form: int, places: tuple[ir.Value, ...]) -> None:
        self.emit, self.name, self.form = emit, name, form
        self.grad, self.x, self.beside = places

    def at(
        self, offset: ir.Value, mask: ir.Value | None, high: ir.Value, scale: ir.Value, shift: ir.Value
    ) -> tuple[ir.Value, ir.Value]:  # fmt: skip
        """The gradient of the activation's argument, and ``x - high``."""
        emit, builder = self.emit, self.emit.builder
        g = emit.read(builder.gep(self.grad, [offset]), mask)
        d = builder.fsub(emit.read(builder.gep(self.x, [offset]), mask), high)
        if self.form == READY or self.name == "none":
            return g, d
        if self.form == RESULT:
            y = emit.read(builder.gep(self.beside, [offset]), mask)
            return _gated(emit, self.name, g, y, True), d
        z = emit.multiply_add(d, scale, shift)
        if self.form == RESIDUAL:
            z = builder.fadd(z, emit.read(builder.gep(self.beside, [offset]), mask))
        return _gated(emit, self.name, g, z, False), d


@intrinsic(prefer_literal=True)
def back_sums(
    typing_context, lanes, kind, act, form, across, grad_y, x, beside, grad_z, grad_x, rows, pitch, count,
    high, scale, shift, first, second, past,
):  # fmt: skip
    """``grad_z = grad_y * act'``, ``first += grad_z`` and ``second += grad_z * (x - high)``: as `moments`.

    grad_z is written unless null, and so is ``grad_x = grad_z * scale``: all of it, where mean and scale are
    constants.
    """
    L, of, wide = lanes.literal_value, kind.literal_value, across.literal_value
    name, told = ACTIVATIONS[act.literal_value], form.literal_value

    def generate(context, builder, signature, values):
        grad_y, x, beside, grad_z, grad_x, rows, pitch, count = values[5:13]
        high, scale, shift, first, second, past = values[13:]
        emit = Vectors(builder, of, L)
        back = _Back(emit, name, told, (grad_y, x, beside))
        z_given, x_given = _given(builder, grad_z), _given(builder, grad_x)
        past = _past(builder, emit, past, pitch, grad_z, grad_x)

        def write(value, place, mask):
            if mask is not None:
                emit.write(value, place, mask)
                return
            _either(builder, past, partial(emit.write, value, place, None))

        # Where much is computed of each vector, the CPU runs too few rows ahead to have memory busy.
        slow = wide and not _cheap(name)
        slots = 4 if _cheap(name) else 2 if wide else 1
        ahead = builder.mul(pitch, _rows_together(emit, slots, count))

        def terms(writing):
            def of(offset, mask, values):
                for place in (grad_y, x) if slow else ():
                    emit.prefetch(builder.gep(place, [builder.add(offset, ahead)]))
                g, d = back.at(offset, mask, *values)
                if writing:
                    with builder.if_then(z_given):
                        write(g, builder.gep(grad_z, [offset]), mask)
                    with builder.if_then(x_given):
                        write(builder.fmul(g, values[1]), builder.gep(grad_x, [offset]), mask)
                g = _where(emit, mask, g)
                return [(g, None), (g, _where(emit, mask, d))]

            return of

        arguments = wide, rows, pitch, count, [high, scale, shift], [first, second]
        # In training nothing is written yet.
        _either(
            builder,
            builder.or_(z_given, x_given),
            lambda writing: _add_up(emit, *arguments, terms(writing), slots),
        )
        return context.get_dummy_value()

    i64, T = types.int64, types.CPointer(types.float64)
    return (
        types.void(
            lanes, kind, act, form, across, grad_y, x, beside, grad_z, grad_x, i64, i64, i64,
            high, scale, shift, T, T, i64,
        ),
        generate,
    )  # fmt: skip


@intrinsic(prefer_literal=True)
def back_combine(
    typing_context, lanes, kind, act, form, across, grad_y, x, beside, grad_z, grad_x, rows, pitch, count,
    high, scale, shift, a, b, past,
):  # fmt: skip
    """``grad_z = grad_y * act'`` unless null, and so ``grad_x = grad_z * scale - a - (x - high) * b``; `past`
    as in `normalise`."""
    L, of, wide = lanes.literal_value, kind.literal_value, across.literal_value
    name, told = ACTIVATIONS[act.literal_value], form.literal_value

    def generate(context, builder, signature, values):
        grad_y, x, beside, grad_z, grad_x, rows, pitch, count = values[5:13]
        high, scale, shift, a, b, past = values[13:]
        emit = Vectors(builder, of, L)
        back = _Back(emit, name, told, (grad_y, x, beside))
        tables = _Values(emit, wide, [high, scale, shift, a, b])
        z_given, x_given = _given(builder, grad_z), _given(builder, grad_x)

        def loops(past: bool) -> None:
            def body(_, offsets, columns, mask):
                values = list(map(tables.at, columns))
                pairs = [
                    back.at(offset, mask, *here[:3])
                    for offset, here in zip(offsets, values, strict=True)
                ]
                with builder.if_then(z_given):
                    for (g, _), offset in zip(pairs, offsets, strict=True):
                        emit.write(g, builder.gep(grad_z, [offset]), mask, past)
                with builder.if_then(x_given):
                    for (g, d), offset, here in zip(pairs, offsets, values, strict=True):
                        _, scale, _, first, slope = here
                        g = emit.multiply_add(g, scale, builder.fneg(first))
                        result = emit.multiply_add(builder.fneg(d), slope, g)
                        emit.write(result, builder.gep(grad_x, [offset]), mask, past)

            simple = _cheap(name) or told == READY
            _sweep(emit, 4 if simple else 1, rows, pitch, count, body)

        _either(builder, _past(builder, emit, past, pitch, grad_z, grad_x), loops)
        return context.get_dummy_value()

    i64 = types.int64
    return (
        types.void(
            lanes, kind, act, form, across, grad_y, x, beside, grad_z, grad_x, i64, i64, i64,
            high, scale, shift, a, b, i64,
        ),
        generate,
    )  # fmt: skip


# ---- one row, whose elements have a gamma and a beta each --------------------------------------------------


class _Row:
    """A row's elements: ``xhat = (x - high) * rstd - low`` and ``z = xhat * gamma + beta``."""

    def __init__(self, emit: Vectors, arrays: list[ir.Value], numbers: list[ir.Value]) -> None:
        self._emit = emit
        self._x, self._gamma, self._beta = arrays
        self.high, self.low, self.rstd = (
            simd.splat(emit.builder, number, emit.lanes) for number in numbers
        )

    def gamma(self, column: ir.Value, mask: ir.Value | None) -> ir.Value:
        return self._of(self._gamma, column, mask)

    def _of(self, array: ir.Value, column: ir.Value, mask: ir.Value | None) -> ir.Value:
        place = self._emit.builder.gep(array, [column])
        return self._emit.load(place) if mask is None else self._emit.load_some(place, mask)

    def off(self, column: ir.Value, mask: ir.Value | None) -> ir.Value:
        """``x - high``, zero behind the last element."""
        value = self._emit.read(self._emit.builder.gep(self._x, [column]), mask)
        return _where(self._emit, mask, self._emit.builder.fsub(value, self.high))

    def xhat(self, off: ir.Value) -> ir.Value:
        return self._emit.multiply_add(off, self.rstd, self._emit.builder.fneg(self.low))

    def z(
        self, xhat: ir.Value, gamma: ir.Value, column: ir.Value, mask: ir.Value | None
    ) -> ir.Value:
        return self._emit.multiply_add(xhat, gamma, self._of(self._beta, column, mask))


@intrinsic(prefer_literal=True)
def normalise_row(
    typing_context, lanes, kind, act, x, y, count, gamma, beta, high, low, rstd, past
):  # fmt: skip
    """``y = act(((x - high) * rstd - low) * gamma + beta)``, `past` as in `normalise`."""
    L, of, name = lanes.literal_value, kind.literal_value, ACTIVATIONS[act.literal_value]

    def generate(context, builder, signature, values):
        x, y, count, gamma, beta, *numbers, past = values[3:]
        emit = Vectors(builder, of, L)
        row = _Row(emit, [x, gamma, beta], numbers)

        def loop(past: bool) -> None:
            def body(_, offsets, columns, mask):
                results = []
                for column in columns:
                    factor = row.gamma(column, mask)
                    z = row.z(row.xhat(row.off(column, mask)), factor, column, mask)
                    results.append(_activate(emit, name, z))
                for column, result in zip(columns, results, strict=True):
                    emit.write(result, builder.gep(y, [column]), mask, past)

            _sweep(emit, 4 if _cheap(name) else 1, _int(1), _int(0), count, body)

        _either(builder, _past(builder, emit, past, _int(0), y), loop)
        return context.get_dummy_value()

    i64, T = types.int64, gamma.dtype
    return types.void(lanes, kind, act, x, y, i64, gamma, gamma, T, T, T, i64), generate


@intrinsic(prefer_literal=True)
def row_back_sums(
    typing_context, lanes, kind, act, grad_y, x, count, gamma, beta, high, low, rstd, first, second,
    to_gamma, to_beta,
):  # fmt: skip
    """``first += grad_z * gamma`` and ``second += grad_z * gamma * (x - high)`` of all elements, at most
    `VECTORS` vectors; and of each, unless null, ``to_gamma += grad_z * xhat`` and ``to_beta += grad_z``,
    which are read and written in whole vectors."""
    L, of, name = lanes.literal_value, kind.literal_value, ACTIVATIONS[act.literal_value]

    def generate(context, builder, signature, values):
        grad_y, x, count, gamma, beta, *numbers, first, second, to_gamma, to_beta = values[3:]
        emit = Vectors(builder, of, L)
        row = _Row(emit, [x, gamma, beta], numbers)
        slots = 4 if _cheap(name) else 1
        sums = _Sums(emit, slots, [first, second])

        def loop(adding: bool) -> None:
            def body(slot, offsets, columns, mask):
                for number, column in enumerate(columns, slot):
                    g = emit.read(builder.gep(grad_y, [column]), mask)
                    d = row.off(column, mask)
                    factor = row.gamma(column, mask)
                    if adding or name != "none":
                        xhat = row.xhat(d)
                    if name != "none":
                        z = row.z(xhat, factor, column, mask)
                        g = _where(emit, mask, _gated(emit, name, g, z, False))
                    if adding:
                        places = [builder.gep(t, [column]) for t in (to_gamma, to_beta)]
                        more = emit.multiply_add(g, xhat, emit.load(places[0]))
                        emit.store(more, places[0])
                        emit.store(builder.fadd(emit.load(places[1]), g), places[1])
                    g = builder.fmul(g, factor)
                    sums.add(number, [(g, None), (g, d)])

            sums.clear()
            _sweep(emit, slots, _int(1), _int(0), count, body)
            sums.add_lanes()

        _either(builder, _given(builder, to_gamma), loop)
        return context.get_dummy_value()

    i64, T, F64 = types.int64, gamma.dtype, types.CPointer(types.float64)
    return types.void(
        lanes, kind, act, grad_y, x, i64, gamma, gamma, T, T, T, F64, F64, gamma, gamma
    ), generate


@intrinsic(prefer_literal=True)
def row_back_combine(
    typing_context, lanes, kind, act, grad_y, x, grad_x, count, gamma, beta, high, low, rstd, a, b, past
):  # fmt: skip
    """``grad_x = grad_z * gamma * rstd - a - (x - high) * b``, `past` as in `normalise`."""
    L, of, name = lanes.literal_value, kind.literal_value, ACTIVATIONS[act.literal_value]

    def generate(context, builder, signature, values):
        grad_y, x, grad_x, count, gamma, beta, high, low, rstd, a, b, past = values[3:]
        emit = Vectors(builder, of, L)
        row = _Row(emit, [x, gamma, beta], [high, low, rstd])
        a, b = (simd.splat(builder, builder.fneg(number), L) for number in (a, b))

        def loop(past: bool) -> None:
            def body(_, offsets, columns, mask):
                results = []
                for column in columns:
                    g = emit.read(builder.gep(grad_y, [column]), mask)
                    d = row.off(column, mask)
                    factor = row.gamma(column, mask)
                    if name != "none":
                        g = _gated(emit, name, g, row.z(row.xhat(d), factor, column, mask), False)
                    g = emit.multiply_add(builder.fmul(g, factor), row.rstd, a)
                    results.append(emit.multiply_add(d, b, g))
                for column, result in zip(columns, results, strict=True):
                    emit.write(result, builder.gep(grad_x, [column]), mask, past)

            _sweep(emit, 4 if _cheap(name) else 1, _int(1), _int(0), count, body)

        _either(builder, _past(builder, emit, past, _int(0), grad_x), loop)
        return context.get_dummy_value()

    i64, T = types.int64, gamma.dtype
    return types.void(
        lanes, kind, act, grad_y, x, grad_x, i64, gamma, gamma, T, T, T, T, T, i64
    ), generate
