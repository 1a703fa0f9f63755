"""Convolution with channels last: places are rows, and vectors run along the channels of the result.

Forward and input gradient are one computation, a correlation (see `conv`). A task takes a block of places:

    block   [images] [Z] [H] [W] [C]     of x, padded, in the type that is computed in
    filters [block of K] [taps, C] [vectors of K]

and multiplies, six places at a time (twelve by one vector), by `rows.multiply`: each element of x is
broadcast to vectors of filters, so that no place is wasted on rows' ends and padding costs nothing but its
zeros. Where x has its channels last, one tap and no padding, it is read where it lies. Neighbouring taps of a
row are neighbours in the block: they count as channels. Results go straight to memory that has its channels
last in that type, otherwise through scratch, where they are turned or rounded.

Filters are packed once for all tasks where there are many places. Where there are few, as at the end of a
network, that takes as long as the products: each task then packs its own, some slices at a time, and asks for
the next ones meanwhile. Slices and their order are the same either way, and so are the bits.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from cnnops.cpu import conv_axes, rows, simd, vectors
from cnnops.cpu.compiler import routine
from cnnops.cpu.conv_axes import (
    CACHE_BYTES,
    PARTIAL_BYTES,
    SPLITS,
    axes_of,
    bytes_of,
    transposed,
    up,
    zeros,
)
from cnnops.cpu.task import (
    NAME,
    At,
    Shared,
    Table,
    Task,
    Value,
    ahead,
    given,
    inside,
    layout,
    native,
    pointer,
    unpack,
)
from cnnops.epilogue import ACTIVATIONS, Epilogue
from cnnops.shapes import ConvShape

STRETCH = 96
"""Most terms of an output that are added up one after the other: a long sum of such sums rounds less."""

PACKED_SLICES = 16
"""Stretches that are packed at a time where a task packs filters for itself, whose terms are neighbours: each
tile asks for a filter's next ones, a line of memory with every term."""

ASKED_BYTES = 2048
"""Places further apart are not asked for by weight gradients: few such lines find room in a cache."""

PACK, PACKED, PACK_HERE = 2.8, 0.4, 1.4
"""Cycles, as `_Correlation` estimates them, that an element of a filter takes: to be packed for all tasks, to
be read by one of them; and where a task packs it for itself."""


# ---- kernels ----------------------------------------------------------------------------------------------


@routine
def _copy_line(L, kind, x, to, pitch, C, count, xc, step, spare):
    """``to[j * pitch + c] = x[j * step + c * xc]`` for j < count, c < C.

    What follows in `to`, as far as a vector reaches, may become zero.
    """
    if xc == 1 or C == 1:
        if step == C and pitch == C:
            vectors.widen(L, kind, to, x, count * C)
        else:
            for j in range(count):
                vectors.widen(L, kind, ahead(to, j * pitch), ahead(x, j * step), C)
        return
    for c in range(0, C, L):
        some = min(L, C - c)
        if step == 1:
            rows.turn(L, kind, False, ahead(to, c), pitch, ahead(x, c * xc), xc, some, count)
        else:
            for n in range(some):
                line = ahead(x, (c + n) * xc)
                for j in range(count):
                    spare[n * count + j] = line[j * step]
            rows.turn(L, kind, False, ahead(to, c), pitch, spare, count, some, count)


@routine
def _copy_block(
    L, kind, x, block, spare, C, pitch, Z, H, W, images, d0, h0, w0, sd, sh, sw, sizes, along
):  # fmt: skip
    """Fill ``block [images] [Z] [H] [W] [pitch]`` from the C channels of x; zero where x has nothing."""
    xn, xc, xd, xh, xw = along
    start_z, stop_z = inside(d0, sd, sizes[0], Z)
    start_r, stop_r = inside(h0, sh, sizes[1], H)
    start, stop = inside(w0, sw, sizes[2], W)
    if stop_z - start_z < Z or stop_r - start_r < H or stop - start < W:
        for j in range(images * Z * H * W * pitch):
            block[j] = 0
    for i in range(images):
        for z in range(start_z, stop_z):
            for r in range(start_r, stop_r):
                source = i * xn + (d0 + z * sd) * xd + (h0 + r * sh) * xh + (w0 + start * sw) * xw
                to = (((i * Z + z) * H + r) * W + start) * pitch
                _copy_line(
                    L,
                    kind,
                    ahead(x, source),
                    ahead(block, to),
                    pitch,
                    C,
                    stop - start,
                    xc,
                    sw * xw,
                    spare,
                )


@routine
def _products(
    L, M, W, x, places, count, taps, slices, first_slice, end_slice, w, asking, start, y, outs, columns
):  # fmt: skip
    """The sums of W columns of filters, of which so many are wanted, for so many places, over some slices of
    the terms, those of `w`.

    Meanwhile the first tiles ask for what is wanted after that, a line of memory with each term. `asking`
    says where that begins; whether it moves on with every slice, or else is all of the next ones'; how many
    tiles ask; and where they do: so many of them, `of_line` apart, ask for the lines of the same rows, the
    next ones `of_row`, and `of_term` for each term, further. From term to term it is `step`.
    """
    later, moves, tiles, lines, of_line, of_row, of_term, step = asking
    before = slices[1 + 5 * first_slice + 4]
    q = 0
    for s in range(first_slice, end_slice):
        slice = ahead(slices, 1 + 5 * s)
        first, some, c, length, j = slice[0], slice[1], slice[2], slice[3], slice[4]
        terms = some * length
        filters, following = ahead(w, (j - before) * W), later
        if moves:
            following = ahead(later, (j + terms) * W)
            q = 0
        for m in range(0, count, M):
            wanted, further = filters, 0
            if q < tiles:
                offset = q // lines * (of_row + terms * of_term) + q % lines * of_line
                wanted, further = ahead(following, offset), step
            q += 1
            rows.multiply(
                L, M, W, ahead(x, c), ahead(places, m), ahead(taps, first), some, length, filters,
                start, y, ahead(outs, m), columns, s, wanted, further,
            )  # fmt: skip


@lru_cache(None)
def _correlate(kind: str, L: int, M: int, V: int, U: int) -> Task:
    T = "float64" if kind == "float64" else "float32"
    args = layout(f"int64 {T}**4 int64**3 int64*62")
    real, itemsize = np.float64 if T == "float64" else np.float32, bytes_of(T)
    full, half, M2, line_of = V * L, U < L, 2 * M, simd.LINE // itemsize
    # Widths of tiles, see `rows.padded`; in halves of a vector.
    W1, W2, W3, W4, W6, W8 = L // 2, L, L + L // 2, 2 * L, 3 * L, full

    def conv_rows(address: int, index: int, scratch: int) -> None:
        """One block of outputs, for one share of one group's filters. These are packed, unless `packing` says
        how many slices of them are packed here at a time."""
        (
            x_, w, scale, shift, start, taps, slices, picks,
            residual_, y_, activation,
            N, groups, C, K, J, share, parts, direct_x, direct_y,
            Bi, Bd, Bh, Bw, blocks_d, blocks_h, blocks_w, Zb, Hb, Wb,
            tables_at, spare_at, sums_at, line_at, beside_at, halves_at, unused_at,
            Z, P, Q, step_d, step_h, step_w, sd, sh, sw, low_d, low_h, low_w, D, H, W,
            xn, xc, xd, xh, xw, yn, yk, yd, yh, yw,
            packing, filters_at, turned_at, S_, of_group, of_k, of_c, of_tap,
        ) = unpack(address, args)  # fmt: skip
        part = index % parts
        rest = index // parts
        q0 = rest % blocks_w * Bw
        rest //= blocks_w
        p0 = rest % blocks_h * Bh
        rest //= blocks_h
        z0 = rest % blocks_d * Bd
        rest //= blocks_d
        group = rest % groups
        n0 = rest // groups * Bi
        images = min(Bi, N - n0)
        zs, ps, qs = min(Bd, Z - z0), min(Bh, P - p0), min(Bw, Q - q0)
        count = images * zs * ps * qs

        places = pointer(scratch + tables_at, "int64")
        twice = 2 * M
        room = (Bi * Bd * Bh * Bw + twice - 1) // twice * twice
        to_y, to_sums = ahead(places, room + twice), ahead(places, 2 * (room + twice))
        sums = pointer(scratch + sums_at, T)
        d0, h0, w0 = z0 * step_d * sd + low_d, p0 * step_h * sh + low_h, q0 * step_w * sw + low_w
        x = vectors.elements(x_, kind)
        source = ahead(x, n0 * xn + group * C * xc)
        if direct_x:
            block = pointer(
                x_ + ((n0 * xn + group * C) + d0 * xd + h0 * xh + w0 * xw) * itemsize, T
            )
            an, ad, ah, aw = xn, step_d * sd * xd, step_h * sh * xh, step_w * sw * xw
        else:
            block = pointer(scratch, T)
            _copy_block(
                L, kind, source, block, vectors.elements(scratch + spare_at, kind), C, C, Zb, Hb, Wb,
                images, d0, h0, w0, sd, sh, sw, (D, H, W), (xn, xc, xd, xh, xw),
            )  # fmt: skip
            an, ad, ah, aw = Zb * Hb * Wb * C, step_d * Hb * Wb * C, step_h * Wb * C, step_w * C
        number = 0
        for i in range(images):
            for z in range(zs):
                for p in range(ps):
                    near, far = i * an + z * ad + p * ah, i * yn + z * yd + p * yh
                    for q in range(qs):
                        places[number] = near + q * aw
                        to_y[number] = far + q * yw
                        to_sums[number] = number * full
                        number += 1
        origin = n0 * yn + z0 * yd + p0 * yh + q0 * yw + group * K * yk
        y = ahead(vectors.elements(y_, kind), origin)
        result = pointer(y_ + origin * itemsize, T)
        # A last tile that is not whole has its last place several times, the others' sums go nowhere.
        beyond = (scratch + unused_at - y_ - origin * itemsize) // itemsize
        behind = (count + twice - 1) // twice * twice
        for number in range(count, behind):
            to_y[number] = beyond
            to_sums[number] = number * full
        for number in range(count, behind + twice):
            places[number] = places[count - 1]

        residual = ahead(vectors.elements(residual_, kind), origin)
        real_residual = pointer(residual_ + origin * itemsize, T)
        null = vectors.elements(0, kind)
        padded = rows.padded(K, L, full, U)
        weights = ahead(w, group * (of_group if packing else padded * J))
        line, beside = pointer(scratch + line_at, T), pointer(scratch + beside_at, T)
        halves = vectors.elements(scratch + halves_at, kind)
        last = min((part + 1) * share, K)
        behind = part * share
        while behind < last:
            k = behind
            width = min(full, padded - k)
            behind += width
            begin = ahead(start, group * K + k)
            some = min(width, K - k)
            if direct_y:
                to, outs, columns = ahead(result, k), to_y, some
            else:
                to, outs, columns = sums, to_sums, width
            filters, lines = ahead(weights, k * J), (width + line_of - 1) // line_of
            # Packed for all, filters lie as they are read: a slice ahead is asked for.
            asking = filters, True, lines, 1, 0, 0, line_of, line_of
            for s in range(0, slices[0], packing if packing else slices[0]):
                s_end = min(s + packing, slices[0]) if packing else slices[0]
                if packing:
                    j, j_end = slices[1 + 5 * s + 4], J
                    if s_end < slices[0]:
                        j_end = slices[1 + 5 * s_end + 4]
                    filters = pointer(scratch + filters_at, T)
                    _pack_terms(
                        L, T, filters, pointer(scratch + turned_at, T), ahead(weights, k * of_k), picks,
                        K - k, C, S_, of_k, of_c, of_tap, width, j, j_end,
                    )  # fmt: skip
                    # What is packed next is asked for: its filters one after the other, or its channels.
                    later = ahead(weights, behind * of_k)
                    if j_end < J:
                        later = ahead(
                            weights, k * of_k + picks[j_end // C] * of_tap + j_end % C * of_c
                        )
                    asking = later, False, 0, 1, 0, 0, 0, 0
                    if of_c == 1:
                        asking = later, False, some, 1, 0, of_k, 0, line_of
                    elif of_k == 1 and J == C:
                        asking = later, False, lines * (s_end - s), lines, line_of, 0, of_c, of_c
                if width == full:
                    _products(
                        L, M, W8, block, places, count, taps, slices, s, s_end, filters, asking, begin, to,
                        outs, columns,
                    )  # fmt: skip
                elif width == W2:
                    _products(
                        L, M2, W2, block, places, count, taps, slices, s, s_end, filters, asking, begin, to,
                        outs, columns,
                    )  # fmt: skip
                elif V > 2 and width == W4:
                    _products(
                        L, M, W4, block, places, count, taps, slices, s, s_end, filters, asking, begin, to,
                        outs, columns,
                    )  # fmt: skip
                elif V > 3 and width == W6:
                    _products(
                        L, M, W6, block, places, count, taps, slices, s, s_end, filters, asking, begin, to,
                        outs, columns,
                    )  # fmt: skip
                elif half and width == W3:
                    _products(
                        L, M, W3, block, places, count, taps, slices, s, s_end, filters, asking, begin, to,
                        outs, columns,
                    )  # fmt: skip
                elif half:
                    _products(
                        L, M2, W1, block, places, count, taps, slices, s, s_end, filters, asking, begin, to,
                        outs, columns,
                    )  # fmt: skip
            if direct_y and activation < 0:
                continue
            act = max(activation, 0)
            channel = group * K + k
            if yk == 1:
                factor = ahead(scale, channel) if given(scale) else scale
                for i in range(count):
                    beside_it = ahead(residual, to_y[i] + k) if residual_ != 0 else null
                    rows.finish(
                        L, kind, ahead(y, to_y[i] + k), ahead(to, outs[i]), beside_it, some, factor,
                        ahead(shift, channel), act,
                    )  # fmt: skip
                continue
            # Sixteen channels' places in rows, and each row to its plane.
            for k16 in range(0, some, L):
                few = min(L, some - k16)
                for i in range(0, count, L):
                    rows.turn(
                        L, T, True, ahead(line, i), room + L, ahead(sums, i * full + k16), full,
                        min(L, count - i), few,
                    )  # fmt: skip
                for n in range(few):
                    factor = scale[channel + k16 + n] if given(scale) else real(1)
                    _put(
                        L, T, kind, kind == T, ahead(y, (k + k16 + n) * yk),
                        ahead(residual, (k + k16 + n) * yk), ahead(result, (k + k16 + n) * yk),
                        ahead(real_residual, (k + k16 + n) * yk), residual_ != 0,
                        ahead(line, n * (room + L)), beside, halves,
                        factor, shift[channel + k16 + n], act, images, zs, ps, qs, yn, yd, yh, yw,
                    )  # fmt: skip

    return Task(conv_rows, args)


@routine
def _finish_line(L, to, line, residual, count, scale, shift, act, following):
    """`simd.finish`, compiled once for all of its callers."""
    simd.finish(L, to, line, residual, count, scale, shift, act, following)


@routine
def _put(
    L, T, kind, same, y, residual, real_y, real_residual, residual_given, line, beside, halves,
    scale, shift, act, images, zs, ps, qs, yn, yd, yh, yw,
):  # fmt: skip
    """Finish one channel's places, which stand in `line`, and write them to their plane.

    Where memory is of the `same` type as sums are, real_y and real_residual point to what y and residual do.
    """
    none = pointer(0, T)
    straight = yw == 1
    # Rows and planes with nothing between them are one long row.
    lines, length = ps, qs
    if straight and yh == qs:
        lines, length = 1, ps * qs
        if yd == length:
            zs, length = 1, zs * length
    for i in range(images):
        for z in range(zs):
            for p in range(lines):
                at = i * yn + z * yd + p * yh
                row = ahead(line, ((i * zs + z) * lines + p) * length)
                if same and straight:
                    other = ahead(real_residual, at) if residual_given else none
                    _finish_line(
                        L, ahead(real_y, at), row, other, length, scale, shift, act, length
                    )
                    continue
                to, other_bits = ahead(y, at), ahead(residual, at)
                if residual_given:
                    if straight:
                        vectors.widen(L, kind, beside, other_bits, length)
                    else:
                        for q in range(length):
                            halves[q] = other_bits[q * yw]
                        vectors.widen(L, kind, beside, halves, length)
                    _finish_line(L, row, row, beside, length, scale, shift, act, 0)
                else:
                    _finish_line(L, row, row, none, length, scale, shift, act, 0)
                if straight:
                    vectors.narrow(L, kind, to, row, length)
                else:
                    vectors.narrow(L, kind, halves, row, length)
                    for q in range(length):
                        to[q * yw] = halves[q]


@routine
def _pack_terms(L, T, to, spare, w, taps, K, C, S_, of_k, of_c, of_tap, width, first, end):
    """The terms from the `first` to the `end` of a panel of filters, which are the first ones of K:
    ``to [tap, C] [width]``. All terms if taps are neighbours in memory."""
    for j in range((end - first) * width if width > K else min(end - first, 1)):
        to[j] = 0  # what is no filter must be a number all the same, and no denormal one
    if first == end:
        return
    neutral = -to[0]  # -0: adding it changes nothing
    if of_k == 1:
        for j in range(first, end):
            source = ahead(w, j % C * of_c + taps[j // C] * of_tap)
            simd.copy(L, ahead(to, (j - first) * width), source, min(width, K), neutral)
        return
    if of_c == 1:
        for v in range(0, min(width, K), L):
            j = first
            while j < end:
                t, c = j // C, j % C
                some = min(C - c, end - j)
                rows.turn(
                    L, T, False, ahead(to, (j - first) * width + v), width,
                    ahead(w, v * of_k + taps[t] * of_tap + c), of_k, min(L, K - v), some,
                )  # fmt: skip
                j += some
        return
    # Taps are neighbours: those of some channels at once, of which then those asked for are taken.
    together = max(1, 256 // S_) if of_c == S_ else 1
    for c0 in range(0, C, together):
        channels = min(together, C - c0)
        for v in range(0, min(width, K), L):
            rows.turn(
                L, T, True, spare, L, ahead(w, v * of_k + c0 * of_c), of_k, min(L, K - v), channels * S_
            )  # fmt: skip
            for t in range(end // C):
                for c in range(channels):
                    vectors.narrow(
                        L, T, ahead(to, (t * C + c0 + c) * width + v),
                        ahead(spare, (c * S_ + taps[t]) * L), min(L, width - v),
                    )  # fmt: skip


@lru_cache(None)
def _pack(T: str, L: int, V: int, U: int) -> Task:
    args = layout(f"{T}**2 int64* int64*8")
    full = V * L

    def conv_rows_pack(address: int, index: int, scratch: int) -> None:
        """Filters to ``[group] [block of K] [tap, C] [vectors of K]``; one block an index."""
        w, packed, taps, K, C, T_, S_, of_group, of_k, of_c, of_tap = unpack(address, args)
        padded = rows.padded(K, L, full, U)
        blocks = (padded + full - 1) // full
        group, k0 = index // blocks, index % blocks * full
        _pack_terms(
            L, T, ahead(packed, (group * padded + k0) * T_ * C), pointer(scratch, T),
            ahead(w, group * of_group + k0 * of_k), taps, K - k0, C, S_, of_k, of_c, of_tap,
            min(full, padded - k0), 0, T_ * C,
        )  # fmt: skip

    return Task(conv_rows_pack, args)


@routine
def _copy_panel(L, kind, g, panel, K, width, images, zs, ps, qs, along, spare):
    """``panel [place] [width]`` from the K channels of g's places, zeros behind them."""
    yn, yk, yd, yh, yw = along
    lines, length = ps, qs
    if yh == qs * yw:
        lines, length = 1, ps * qs
    if K < width:
        for j in range(images * zs * ps * qs * width):
            panel[j] = 0
    for i in range(images):
        for z in range(zs):
            for p in range(lines):
                line = ahead(g, i * yn + z * yd + p * yh)
                to = ahead(panel, ((i * zs + z) * lines + p) * length * width)
                _copy_line(L, kind, line, to, width, K, length, yk, yw, spare)


@routine
def deliver(L, T, sums, pitch, spare, grad_w, K, lines, side, stretch, C, along, picks):
    """Write at most `L` filters' gradients from ``sums [line] [side, C] [pitch]``, a line being `stretch`."""
    of_k, of_c, of_tap = along
    for t in range(lines * side):
        source = ahead(sums, (t // side * stretch + t % side * C) * pitch)
        to = ahead(grad_w, picks[t] * of_tap)
        for c in range(0, C, L):
            some = min(L, C - c)
            if of_c == 1:
                rows.turn(L, T, False, ahead(to, c), of_k, ahead(source, c * pitch), pitch, some, K)
            else:
                rows.turn(L, T, True, spare, L, ahead(source, c * pitch), pitch, some, K)
                for k in range(K):
                    for n in range(some):
                        to[k * of_k + (c + n) * of_c] = spare[k * L + n]


@routine
def _outer_products(L, M, W, block, places, panel, sums, taps, common, coming):
    """``sums [line] [channel] [W]`` of a block's places, some places at a time.

    Meanwhile what is `coming` is asked for, a line of memory of a place at a time: so many lines from the
    address of the next panel on, with a place's distance in bytes, then so many of the next block.
    """
    count, chunk, started, lines, channels, wide, stretch, pitch = common
    panel_at, panel_lines, panel_far, block_at, block_lines, block_far = coming
    # Not faster than memory is: for every line as much time as there is.
    calls, slowly = lines * ((channels + M - 1) // M), 0
    while slowly < 5 and (panel_lines + block_lines) * 2 << slowly <= calls:
        slowly += 1
    for a in range(0, count, chunk):
        q = 0
        for t in range(lines):
            for j in range(0, channels, M):
                later, far, asked = 0, places, q >> slowly
                from_place = a + (q - (asked << slowly)) * (chunk >> slowly)
                if asked < panel_lines:
                    later, far = panel_at + asked * simd.LINE, ahead(panel_far, from_place)
                elif asked - panel_lines < block_lines:
                    later = block_at + (asked - panel_lines) * simd.LINE
                    far = ahead(block_far, from_place)
                q += 1
                rows.outer_asking(
                    L, M, W, ahead(block, taps[t] * wide + j), ahead(places, a), min(chunk, count - a),
                    ahead(panel, a * W), W, ahead(sums, (t * stretch + j) * pitch), pitch, started + a,
                    later, far, slowly,
                )  # fmt: skip


@routine
def _begin(number, blocks, sizes):
    """Where a block begins: image and outputs."""
    blocks_d, blocks_h, blocks_w = blocks
    Bi, Bd, Bh, Bw = sizes
    rest = number // blocks_w
    further = rest // blocks_h
    n, z = further // blocks_d * Bi, further % blocks_d * Bd
    return n, z, rest % blocks_h * Bh, number % blocks_w * Bw


@lru_cache(None)
def _weights(kind: str, L: int, M: int, M2: int, V: int, U: int) -> Task:
    T = "float64" if kind == "float64" else "float32"
    args = layout(f"int64*2 {T}**2 int64**2 int64*58")
    full, half = V * L, U < L
    stored = bytes_of(T) if kind == T else 2
    # Widths of tiles, see `rows.padded`; in halves of a vector.
    W1, W2, W3, W4, W6, W8 = L // 2, L, L + L // 2, 2 * L, 3 * L, full

    def conv_rows_weights(address: int, index: int, scratch: int) -> None:
        """A share of the places, for a share of one group's filters and channels: ``sums [tap, C] [K]``."""
        (
            x_, g_, partial, grad_w, taps, picks,
            N, groups, C, K, lines, side, splits, parts_k, parts_c, share_k, share_c, stretch, chunk, pad,
            Bi, Bd, Bh, Bw, blocks_n, blocks_d, blocks_h, blocks_w, Zb, Hb, Wb,
            places_at, panel_at, sums_at, spare_at,
            Z, P, Q, step_d, step_h, step_w, sd, sh, sw, low_d, low_h, low_w, D, H, W,
            xn, xc, xd, xh, xw, yn, yk, yd, yh, yw, of_group, of_k, of_c, of_tap,
        ) = unpack(address, args)  # fmt: skip
        c0 = index % parts_c * share_c
        rest = index // parts_c
        k0 = rest % parts_k * share_k
        rest //= parts_k
        group = rest % groups
        split = rest // groups
        channels, filters = min(share_c, C - c0), min(share_k, K - k0)
        pitch = (share_k + L - 1) // L * L
        wide = channels + pad
        if splits > 1:
            sums = ahead(partial, index * lines * stretch * pitch)
        else:
            sums = pointer(scratch + sums_at, T)
        places = pointer(scratch + places_at, "int64")
        panel = pointer(scratch + panel_at, T)
        x = ahead(vectors.elements(x_, kind), (group * C + c0) * xc)
        g = ahead(vectors.elements(g_, kind), (group * K + k0) * yk)
        spare = vectors.elements(scratch + spare_at, kind)
        # Columns that no tile writes are added up with the others of their vector.
        for j in range(lines * stretch if splits > 1 else 0):
            for k in range(rows.padded(filters, L, full, U), pitch):
                sums[j * pitch + k] = 0
        # How far apart the places of a whole block are in memory, in bytes, of x and of grad_y.
        far_x, far_g = ahead(places, Bi * Bd * Bh * Bw), ahead(places, 2 * Bi * Bd * Bh * Bw)
        at = 0
        for i in range(Bi):
            for z in range(Bd):
                for p in range(Bh):
                    for q in range(Bw):
                        across = z * step_d * sd * xd + p * step_h * sh * xh + q * step_w * sw * xw
                        far_x[at] = (i * xn + across) * stored
                        far_g[at] = (i * yn + z * yd + p * yh + q * yw) * stored
                        at += 1
        blocks = blocks_n * blocks_d * blocks_h * blocks_w
        started = 0
        for number in range(split * blocks // splits, (split + 1) * blocks // splits):
            n0, z0, p0, q0 = _begin(number, (blocks_d, blocks_h, blocks_w), (Bi, Bd, Bh, Bw))
            images = min(Bi, N - n0)
            zs, ps, qs = min(Bd, Z - z0), min(Bh, P - p0), min(Bw, Q - q0)
            count = images * zs * ps * qs
            d0, h0 = z0 * step_d * sd + low_d, p0 * step_h * sh + low_h
            w0 = q0 * step_w * sw + low_w
            block = pointer(scratch, T)
            _copy_block(
                L, kind, ahead(x, n0 * xn), block, spare, channels, wide, Zb, Hb, Wb, images,
                d0, h0, w0, sd, sh, sw, (D, H, W), (xn, xc, xd, xh, xw),
            )  # fmt: skip
            # Tiles reach beyond the last place: numbers are to be there, and no denormal ones, which take a
            # hundred times as long.
            beyond = ahead(block, images * Zb * Hb * Wb * wide)
            for j in range(L + max(M, M2)):
                beyond[j] = 0
            an, ad, ah, aw = Zb * Hb * Wb, step_d * Hb * Wb, step_h * Wb, step_w
            an, ad, ah, aw = an * wide, ad * wide, ah * wide, aw * wide
            at = 0
            for i in range(images):
                for z in range(zs):
                    for p in range(ps):
                        for q in range(qs):
                            places[at] = i * an + z * ad + p * ah + q * aw
                            at += 1
            start = n0 * yn + z0 * yd + p0 * yh + q0 * yw
            n1, z1, p1, q1 = _begin(number + 1, (blocks_d, blocks_h, blocks_w), (Bi, Bd, Bh, Bw))
            next_g = g_ + (n1 * yn + z1 * yd + p1 * yh + q1 * yw + (group * K + k0) * yk) * stored
            next_d, next_h = z1 * step_d * sd + low_d, p1 * step_h * sh + low_h
            next_x = n1 * xn + next_d * xd + next_h * xh + (q1 * step_w * sw + low_w) * xw
            next_x = x_ + (next_x + (group * C + c0) * xc) * stored
            near_x = xc == 1 and step_w * sw * xw * stored <= ASKED_BYTES
            lines_x = channels * stored // simd.LINE if near_x else 0
            behind, whole = 0, rows.padded(filters, L, full, U)
            while behind < whole:
                k = behind
                width = min(full, whole - k)
                behind += width
                sums_here = ahead(sums, k)
                common = (count, chunk, started, lines, side * channels, wide, stretch, pitch)
                near_g = yk == 1 and yw * stored <= ASKED_BYTES
                lines_g = width * stored // simd.LINE if near_g else 0
                panel_at, lines_block = g_ + (start + (group * K + k0 + behind) * yk) * stored, 0
                if behind >= whole:
                    panel_at, lines_block = next_g, lines_x
                coming = panel_at, lines_g, far_g, next_x, lines_block, far_x
                _copy_panel(
                    L, kind, ahead(g, start + k * yk), panel, min(width, filters - k), width, images,
                    zs, ps, qs, (yn, yk, yd, yh, yw), spare,
                )  # fmt: skip
                if width == full:
                    _outer_products(L, M, W8, block, places, panel, sums_here, taps, common, coming)
                elif width == W2:
                    _outer_products(
                        L, M2, W2, block, places, panel, sums_here, taps, common, coming
                    )
                elif V > 2 and width == W4:
                    _outer_products(
                        L, M2, W4, block, places, panel, sums_here, taps, common, coming
                    )
                elif V > 3 and width == W6:
                    _outer_products(L, M, W6, block, places, panel, sums_here, taps, common, coming)
                elif half:
                    if width == W3:
                        _outer_products(
                            L, M2, W3, block, places, panel, sums_here, taps, common, coming
                        )
                    else:
                        _outer_products(
                            L, M2, W1, block, places, panel, sums_here, taps, common, coming
                        )
            started += 1
        if started == 0:
            for j in range(lines * stretch * pitch):
                sums[j] = 0
        if splits == 1:
            to = ahead(grad_w, group * of_group + k0 * of_k + c0 * of_c)
            for k in range(0, filters, L):
                deliver(
                    L, T, ahead(sums, k), pitch, pointer(scratch + spare_at, T), ahead(to, k * of_k),
                    min(L, filters - k), lines, side, stretch, channels, (of_k, of_c, of_tap), picks,
                )  # fmt: skip

    return Task(conv_rows_weights, args)


@lru_cache(None)
def add_splits(T: str, L: int) -> Task:
    args = layout(f"{T}**2 int64* int64*17")

    def conv_rows_add(address: int, index: int, scratch: int) -> None:
        """The splits' sums of some channels and filters of one share, added in their order, to their
        places."""
        (
            partial, grad_w, picks, groups, C, K, lines, side, splits, parts_k, parts_c, share_k, share_c,
            stretch, some_c, some_k, of_group, of_k, of_c, of_tap,
        ) = unpack(address, args)  # fmt: skip
        pitch = (share_k + L - 1) // L * L
        pieces_k, pieces_c = (pitch + some_k - 1) // some_k, (share_c + some_c - 1) // some_c
        k, c = index % pieces_k * some_k, index // pieces_k % pieces_c * some_c
        rest = index // (pieces_k * pieces_c)
        c0 = rest % parts_c * share_c
        k0 = rest // parts_c % parts_k * share_k
        group = rest // parts_c // parts_k
        all_channels = min(share_c, C - c0)
        filters, channels = min(some_k, min(share_k, K - k0) - k), min(some_c, all_channels - c)
        if filters <= 0 or channels <= 0:
            return
        width = (filters + L - 1) // L * L
        total = pointer(scratch, T)
        step = groups * parts_k * parts_c * lines * stretch * pitch
        size = lines * side * channels * width
        for i in range(size):
            total[i] = 0
        # Channels of which all filters are added up lie one behind another.
        runs, length = (1, channels * width) if width == pitch else (channels, width)
        row = total
        for t in range(lines):
            for s in range(side):
                at = (rest * lines + t) * stretch + s * all_channels + c
                for j in range(at, at + runs):
                    source = ahead(partial, j * pitch + k)
                    vectors.sum_window(L, T, row, source, splits, step, length)
                    row = ahead(row, length)
        to = ahead(grad_w, group * of_group + (k0 + k) * of_k + (c0 + c) * of_c)
        for v in range(0, width, L):
            deliver(
                L, T, ahead(total, v), width, ahead(total, size), ahead(to, v * of_k), min(L, filters - v),
                lines, side, side * channels, channels, (of_k, of_c, of_tap), picks,
            )  # fmt: skip

    return Task(conv_rows_add, args)


# ---- plans ------------------------------------------------------------------------------------------------


def pieces_of(shares: int, share_c: int, pitch: int, L: int) -> tuple[int, int, int]:
    """How many pieces `add_splits` takes the shares apart into, and of how many channels and filters: a
    vector of channels of all filters, which lie one behind another; where such pieces are few, vectors of
    both."""
    pieces = shares * -(-share_c // L)
    some_k = pitch if pieces >= 4 else L
    return pieces * -(-pitch // some_k), min(share_c, L), some_k


Strides = tuple[int, ...]


class _Axis(NamedTuple):
    """One axis of a correlation as blocks have it.

    Output o reads the block at ``o * step + tap`` for each of `taps`, in ascending order, with the filter's
    places `picks`, and lands at ``start + o * along``. The block's place i is the input's
    ``i * stride + low``.
    """

    out: int
    step: int
    stride: int
    low: int
    taps: tuple[int, ...]
    picks: tuple[int, ...]
    size: int
    start: int
    along: int

    @classmethod
    def of(cls, axis: conv_axes.Axis) -> _Axis:
        low = min(axis.taps, default=0)
        pairs = sorted(zip(axis.taps, axis.picks, strict=True))
        # Where taps and step have a common divisor, places between are not copied.
        stride = math.gcd(axis.step, *(tap - low for tap in axis.taps))
        return cls(
            axis.out, axis.step // stride, stride, low,
            tuple((tap - low) // stride for tap, _ in pairs), tuple(pick for _, pick in pairs),
            axis.size, axis.start, axis.stride,
        )  # fmt: skip

    @property
    def inside(self) -> bool:
        """Whether no output reads padding, if there is one tap."""
        return 0 <= self.low and self.low + (self.out - 1) * self.step * self.stride < self.size

    def inputs(self, outputs: int) -> int:
        return (outputs - 1) * self.step + (self.taps[-1] if self.taps else 0) + 1


class _Block(NamedTuple):
    images: int
    outputs: tuple[int, int, int]

    @property
    def places(self) -> int:
        return self.images * math.prod(self.outputs)

    def inputs(self, axes: Sequence[_Axis]) -> list[int]:
        return [axis.inputs(o) for axis, o in zip(axes, self.outputs, strict=True)]

    def counts(self, N: int, axes: Sequence[_Axis]) -> list[int]:
        return [
            -(-N // self.images),
            *(-(-a.out // o) for a, o in zip(axes, self.outputs, strict=True)),
        ]


def _blocks(N: int, axes: Sequence[_Axis], most: int) -> Iterator[_Block]:
    """Blocks of at most so many places: some images, whole axes or even cuts of them, inner axes first."""
    # Into up to 64 equal parts, and, for axes so long that these are too many, into powers of two.
    parts = [{*range(1, 65), *(2**e for e in range(axis.out.bit_length() + 1))} for axis in axes]
    cuts = [
        sorted({-(-axis.out // n) for n in numbers if n <= max(axis.out, 1)})
        for axis, numbers in zip(axes, parts, strict=True)
    ]
    images = sorted({-(-N // n) for n in range(1, N + 1)})
    z, p, q = (axis.out for axis in axes)
    for q_cut in cuts[2]:
        if q_cut <= most and (q_cut == q or q_cut >= 16):
            yield _Block(1, (1, 1, q_cut))
    for p_cut in cuts[1]:
        if p_cut * q <= most:
            yield _Block(1, (1, p_cut, q))
    for z_cut in cuts[0]:
        if z_cut * p * q <= most:
            yield _Block(1, (z_cut, p, q))
    for side in images:
        if side * z * p * q <= most:
            yield _Block(side, (z, p, q))


class _Memory(NamedTuple):
    """How a tensor lies in memory: its type's name, and its strides as of ``N C D H W``."""

    kind: str
    strides: Strides

    @property
    def channels(self) -> bool:
        """Whether channels are neighbours."""
        return self.strides[1] == 1


def _memory(dtype: torch.dtype, strides: Strides) -> _Memory:
    """A tensor's memory; strides of axes that are not there are 0."""
    n, c, *places = strides
    return _Memory(vectors.KIND[dtype], (n, c, *(0,) * (3 - len(places)), *places))


class _Correlation:
    """A correlation's plan: all that does not change from call to call.

    The weight has `kernel` places a filter; `along`: its strides from group to group, and from one to the
    next of what this correlation has as filters, channels and taps.
    """

    def __init__(
        self, x: _Memory, y: _Memory, N: int, groups: int, C: int, K: int, axes: Sequence[_Axis],
        kernel: Sequence[int], along: Strides, threads: int,
    ) -> None:  # fmt: skip
        T = "float64" if x.kind == "float64" else "float32"
        lanes, itemsize = simd.lanes(T), bytes_of(T)
        M, V, grain = rows.ROWS, rows.vectors_a_tile(), rows.grain(lanes)
        full = V * lanes
        padded = rows.padded.py_func(K, lanes, full, grain)
        taps = math.prod(len(axis.taps) for axis in axes)
        self._channels, self._padded = groups * K, groups * padded
        self._real = torch.float64 if T == "float64" else torch.float32
        self._direct_x = (
            x.kind == T and x.channels and taps == 1 and all(axis.inside for axis in axes)
        )
        # Neighbouring taps of a block's row are neighbours in memory.
        w_taps = axes[2].taps
        merged = not self._direct_x and w_taps == tuple(range(len(w_taps)))
        side = len(w_taps) if merged else 1
        length = C * side
        self._axes, J = axes, taps * C
        slices = self._slices(taps // side if side else 0, length)
        # A vector of which y has a part is written in place once, not again and again.
        whole = K == padded or len(slices) == 1
        self._direct_y = y.kind == T and y.channels and whole
        cycles, block, parts, packing = self._weigh(
            x, y, N, groups, C, K, J, math.prod(kernel), along, len(slices), lanes, threads
        )
        _, R, S = kernel
        picks = product(*(axis.picks for axis in axes))
        table = Table(np.array([(t * R + r) * S + s for t, r, s in picks] or [0], np.int64))
        at_once = max(1, 256 // math.prod(kernel)) * math.prod(kernel)
        self._pack = None if packing else _pack(T, lanes, V, grain)
        self._pack_count = groups * -(-padded // full)
        self._pack_scratch = (at_once + lanes) * lanes * itemsize
        filters = taps, math.prod(kernel), *along
        self._pack_values: tuple[Value, ...] = (table, K, C, *filters)
        self._packed_size = groups * padded * J
        # Slices that a task packs at a time. Where terms are rows of filters these are far apart, and a cache
        # has room for few such lines; where taps are neighbours all of them are turned together.
        stretch = 0
        if packing:
            _, of_k, of_c, _ = along
            stretch = 1 if of_k == 1 else len(slices)
            if of_k > 1 and of_c == 1:
                stretch = min(len(slices), PACKED_SLICES)
        Z, H, W = block.inputs(axes)
        tap_offsets = [
            ((d * H + h) * W + w) * C
            for d, h, w in product(
                axes[0].taps, axes[1].taps, (0,) if merged and w_taps else w_taps
            )
        ]
        if self._direct_x:
            tap_offsets = [0]
        blocks_n, *blocks_zpq = block.counts(N, axes)
        share = up(up(K, full) // full, parts) // parts * full
        parts = -(-K // share)
        room = up(block.places, 2 * M)
        sizes = [
            0 if self._direct_x else (block.images * Z * H * W * C + lanes) * itemsize,
            3 * (room + 2 * M) * 8,
            lanes * (W + lanes) * itemsize,
            0 if self._direct_y else room * full * itemsize,
            lanes * (room + lanes) * itemsize,
            (room + lanes) * itemsize,
            (room + lanes) * itemsize,
            (K + full) * itemsize,
            min(J, stretch * STRETCH) * full * itemsize,
            self._pack_scratch if packing else 0,
        ]
        starts = [0]
        for size in sizes:
            starts.append(up(starts[-1] + size, 64))
        (
            _, tables_at, spare_at, sums_at, line_at, beside_at, halves_at, unused_at, *packs_at, end,
        ) = starts  # fmt: skip
        self._scratch_bytes = end
        tables = (
            np.array(tap_offsets or [0], np.int64),
            np.array([len(slices), *(v for s in slices for v in s)], np.int64),
        )
        self._count = blocks_n * math.prod(blocks_zpq) * groups * parts
        self._work = cycles * min(threads, self._count)
        self._stretches = len(slices)
        self._task = _correlate(x.kind, lanes, M, V, grain)
        self._values: tuple[Value, ...] = (
            N, groups, C, K, J, share, parts, self._direct_x, self._direct_y,
            block.images, *block.outputs, *blocks_zpq, Z, H, W,
            tables_at, spare_at, sums_at, line_at, beside_at, halves_at, unused_at,
            *(axis.out for axis in axes), *(axis.step for axis in axes),
            *(axis.stride for axis in axes), *(axis.low for axis in axes),
            *(axis.size for axis in axes), *x.strides, *y.strides[:2],
            *(axis.along * step for axis, step in zip(axes, y.strides[2:], strict=True)),
            stretch, *packs_at, *filters[1:],
        )  # fmt: skip
        start = sum(axis.start * step for axis, step in zip(axes, y.strides[2:], strict=True))
        self._start = start * (2 if y.kind in ("float16", "bfloat16") else itemsize)
        self._table_values = (*map(Table, tables), table)

    @staticmethod
    def _slices(taps: int, length: int) -> list[tuple[int, int, int, int, int]]:
        """Stretches of the terms: first tap and how many, first channel and how many, terms before."""
        if taps == 0 or length == 0:
            return [(0, 0, 0, 0, 0)]
        if length > STRETCH:
            pieces = -(-length // STRETCH)
            cuts = [length * i // pieces for i in range(pieces + 1)]
            return [
                (t, 1, a, b - a, t * length + a)
                for t in range(taps)
                for a, b in zip(cuts, cuts[1:], strict=False)
            ]
        each = STRETCH // length
        return [(t, min(each, taps - t), 0, length, t * length) for t in range(0, taps, each)]

    def _weigh(
        self, x: _Memory, y: _Memory, N: int, groups: int, C: int, K: int, J: int,
        kernel: int, along: Strides, slices: int, lanes: int, threads: int,
    ) -> tuple[float, _Block, int, bool]:  # fmt: skip
        """The fastest block and number of parts by estimated cycles, that estimate, a thread, and whether a
        task packs its own filters."""
        M, V, grain = rows.ROWS, rows.vectors_a_tile(), rows.grain(lanes)
        full, blocks_k = V * lanes, -(-K // (V * lanes))
        padded = rows.padded.py_func(K, lanes, full, grain)
        # Taps that are neighbours are turned together, whichever of them are wanted.
        turned = J if 1 in along[1:3] else kernel * C
        best: tuple[float, _Block, int, bool] | None = None
        for block in _blocks(N, self._axes, 1024):
            places = block.places
            inputs = block.images * math.prod(block.inputs(self._axes))
            tiles = -(-places // M)
            blocks = math.prod(block.counts(N, self._axes)) * groups
            copied = 0.0
            if not self._direct_x:
                vectors_in = inputs * C / lanes
                copied = vectors_in * (3 if x.channels else 10) + 30 * inputs / self._axes[
                    2
                ].inputs(block.outputs[2]) * (1 if x.channels else -(-C // lanes))
            room = ((places if self._direct_x else inputs) * C + places * full) * 4
            for parts in {min(blocks_k, e) for e in (1, 2, 3, 4, 6, 8, 16, 32)}:
                share = -(-blocks_k // parts)
                width = min(share * full, padded)
                products = tiles * M * J * width / lanes + tiles * share * slices * 70
                if room > CACHE_BYTES:
                    products *= 1.0 + 0.03 * room / CACHE_BYTES
                out = 0.0
                if not self._direct_y:
                    out = places * width / lanes * (8 if y.channels else 16)
                cycles = products + copied + out + places * 6 + 1500
                # Tasks come one after the other: the last ones leave threads without work.
                rounds = max(-(-blocks * parts // threads), blocks * parts / threads)
                for packing in (False, True):
                    # Filters that are packed for all go to memory and back.
                    read = turned * width * PACK_HERE if packing else J * width * PACKED
                    once = 0.0 if packing else groups * padded * turned * PACK / threads + 1500
                    total = (cycles + read) * rounds + once
                    if best is None or total < best[0]:
                        best = (total, block, parts, packing)
        assert best is not None
        return best

    def run(
        self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor,
        epilogue: Epilogue | None = None,
    ) -> None:  # fmt: skip
        """w, bias and scale in the type that is computed in."""
        scale = residual = None
        activation = -1
        shift = zeros(self._channels, self._real) if bias is None else bias
        begin = shift
        if epilogue is None and bias is not None and self._stretches > 1:
            activation = 0  # as an epilogue adds it: behind all of a sum
        if epilogue is not None:
            scale, residual = epilogue.scale, epilogue.residual
            activation = ACTIVATIONS.index(epilogue.activation)
        if activation >= 0 or not self._direct_y:
            begin = zeros(self._padded, self._real)
        filters: Value = w
        if self._pack is not None:
            filters = Shared(self._packed_size * self._real.itemsize)
            self._pack.run(
                self._pack_count, self._packed_size, w, filters, *self._pack_values,
                scratch_bytes=self._pack_scratch,
            )  # fmt: skip
        self._task.run(
            self._count, self._work,
            x, filters, scale, shift, begin, *self._table_values, At(residual, self._start),
            At(y, self._start), activation, *self._values,
            scratch_bytes=self._scratch_bytes,
        )  # fmt: skip


class _Shares(NamedTuple):
    """How a weight gradient is cut: filters and channels into parts, the places into splits."""

    block: _Block
    parts_k: int
    parts_c: int
    splits: int


class _WeightGradient:
    """The weight gradient's plan. It depends on the shape alone, never on the number of threads."""

    CHUNK = 96
    """Places that are added up at a time: their panel of grad_y stays in the first-level cache."""

    def __init__(
        self, x: _Memory, y: _Memory, N: int, groups: int, C: int, K: int, axes: Sequence[_Axis],
        kernel: Sequence[int], along: Strides,
    ) -> None:  # fmt: skip
        T = "float64" if x.kind == "float64" else "float32"
        lanes, itemsize = simd.lanes(T), bytes_of(T)
        V = rows.vectors_a_tile()
        full = V * lanes
        taps = math.prod(len(axis.taps) for axis in axes)
        w_taps = axes[2].taps
        side = len(w_taps) if w_taps == tuple(range(len(w_taps))) else 1
        lines = taps // side
        M, M2 = rows.outer_rows(side * C)
        self._work, shares = self._weigh(x, N, groups, C, K, axes, lines, side, lanes, full)
        block, parts_k, parts_c, splits = shares
        share_k = up(-(-K // parts_k), lanes)
        share_c = up(-(-C // parts_c), rows.OUTER_ROWS)
        parts_k, parts_c = -(-K // share_k), -(-C // share_c)
        share_k, share_c = min(share_k, K), min(share_c, C)
        # Places a multiple of a power of two apart would share few lines of the first-level cache.
        pad = 64 // itemsize if side == 1 and share_c * itemsize % 512 == 0 else 0
        Z, H, W = block.inputs(axes)
        length, pitch = side * share_c, up(share_k, lanes)
        stretch = max(up(length, M), up(length, M2))
        sums = lines * stretch * pitch
        sizes = [
            (block.images * Z * H * W * (share_c + pad) + lanes + max(M, M2)) * itemsize,
            (3 * block.places + self.CHUNK) * 8,
            (block.places + 1) * full * itemsize,
            sums * itemsize if splits == 1 else 0,
            lanes * (max(W, block.places) + lanes) * itemsize,
        ]
        starts = [0]
        for size in sizes:
            starts.append(up(starts[-1] + size, 64))
        _, places_at, panel_at, sums_at, spare_at, self._scratch_bytes = starts
        offsets = [
            (d * H + h) * W + w
            for d, h, w in product(axes[0].taps, axes[1].taps, (0,) if side > 1 else w_taps)
        ]
        _, R, S = kernel
        picks = product(*(axis.picks for axis in axes))
        tables = (
            np.array(offsets, np.int64),
            np.array([(t * R + r) * S + s for t, r, s in picks], np.int64),
        )
        counts = block.counts(N, axes)
        self._count = splits * groups * parts_k * parts_c
        self._splits, self._sums = splits, sums
        self._task = _weights(x.kind, lanes, M, M2, V, rows.grain(lanes))
        self._values: tuple[Value, ...] = (
            N, groups, C, K, lines, side, splits, parts_k, parts_c, share_k, share_c, stretch, self.CHUNK,
            pad, block.images, *block.outputs, *counts, Z, H, W,
            places_at, panel_at, sums_at, spare_at,
            *(axis.out for axis in axes), *(axis.step for axis in axes),
            *(axis.stride for axis in axes), *(axis.low for axis in axes),
            *(axis.size for axis in axes), *x.strides, *y.strides, *along,
        )  # fmt: skip
        self._table_values = tuple(map(Table, tables))
        self._add = add_splits(T, lanes)
        self._add_count, some_c, some_k = pieces_of(
            groups * parts_k * parts_c, share_c, pitch, lanes
        )
        self._add_values = (
            groups, C, K, lines, side, splits, parts_k, parts_c, share_k, share_c, stretch, some_c, some_k,
            *along,
        )  # fmt: skip
        self._add_scratch = (lines * side * some_c * some_k + lanes * lanes) * itemsize

    def _weigh(
        self, x: _Memory, N: int, groups: int, C: int, K: int, axes: Sequence[_Axis], lines: int,
        side: int, lanes: int, full: int,
    ) -> tuple[float, _Shares]:  # fmt: skip
        M, taps = rows.OUTER_ROWS, lines * side
        best: tuple[float, float, _Shares] | None = None
        for block in _blocks(N, axes, 1024):
            places = block.places
            inputs = block.images * math.prod(block.inputs(axes))
            blocks = math.prod(block.counts(N, axes))
            chunks = -(-places // self.CHUNK)
            for parts_k, parts_c in product((1, 2, 4, 8, 16, 32), repeat=2):
                share_k, share_c = up(-(-K // parts_k), lanes), up(-(-C // parts_c), M)
                if (parts_k - 1) * share_k >= K or (parts_c - 1) * share_c >= C:
                    continue
                parts = groups * parts_k * parts_c
                if parts > max(groups, 64):
                    continue
                height = up(side * min(share_c, C), min(rows.outer_rows(side * C)))
                size = taps * share_c * share_k
                products = lines * height * share_k / lanes * (places + chunks * 3.5)
                copies = places * share_k / lanes * (3 if x.channels else 8)
                room = places * min(share_k, full) * 4
                copies += inputs * share_c / lanes * (3 if x.channels else 9)
                room += inputs * share_c * 4
                if room > CACHE_BYTES:
                    products *= 1.0 + 0.1 * room / CACHE_BYTES
                if size * 4 > CACHE_BYTES // 2:
                    products += size / lanes * 6
                for splits in {1, 2, 4, 8, 16, blocks}:
                    if splits > min(blocks, SPLITS) or splits * parts > max(groups, 64):
                        continue
                    if splits > 1 and size * parts * splits * 4 > PARTIAL_BYTES:
                        continue
                    cycles = (products + copies + 300) * -(-blocks // splits)
                    cycles += size / lanes * (8 if splits == 1 else 4 + 2)
                    work = cycles * parts * splits
                    if splits > 1:
                        work += size * parts / lanes * (2.0 * splits + 8)
                    threads = min(8, max(1, int(work / 50_000)))
                    total = max(work / threads, cycles * -(-parts * splits // threads))
                    if best is None or total < best[0]:
                        best = (total, work, _Shares(block, parts_k, parts_c, splits))
        assert best is not None
        return best[1], best[2]

    def run(self, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor) -> None:
        partial = None
        if self._splits > 1:
            partial = Shared(self._count * self._sums * grad_w.itemsize)
        self._task.run(
            self._count, self._work, x, grad_y, partial, grad_w, *self._table_values, *self._values,
            scratch_bytes=self._scratch_bytes,
        )  # fmt: skip
        if partial is not None:
            self._add.run(
                self._add_count, self._count * self._sums, partial, grad_w, self._table_values[1],
                *self._add_values,
                scratch_bytes=self._add_scratch,
            )  # fmt: skip


# ---- operations -------------------------------------------------------------------------------------------


def _along(shape: ConvShape, w: Strides) -> tuple[int, int, int, int]:
    """A weight's strides from group to group, filter to filter, channel to channel and tap to tap."""
    return shape.K // shape.groups * w[0], w[0], w[1], w[-1]


@lru_cache(1024)
def _fprop(
    shape: ConvShape, dtype: torch.dtype, x: Strides, w: Strides, y: Strides, threads: int
) -> _Correlation:
    return _Correlation(
        _memory(dtype, x), _memory(dtype, y), shape.N, shape.groups, shape.C // shape.groups,
        shape.K // shape.groups, [_Axis.of(axis) for axis in axes_of(shape)], shape.TRS,
        _along(shape, w), threads,
    )  # fmt: skip


@lru_cache(1024)
def _dgrad(
    shape: ConvShape, dtype: torch.dtype, y: Strides, w: Strides, x: Strides, threads: int,
    empty_sums: bool,
) -> tuple[list[_Correlation], bool]:  # fmt: skip
    """The correlations that make up the input gradient, those without taps if asked for, and whether they
    write all of it."""
    group, k, c, tap = _along(shape, w)
    parts = list(product(*map(transposed, axes_of(shape))))
    reached = [axes for axes in parts if empty_sums or all(axis.taps for axis in axes)]
    plans = [
        _Correlation(
            _memory(dtype, y),
            _memory(dtype, x),
            shape.N,
            shape.groups,
            shape.K // shape.groups,
            shape.C // shape.groups,
            [_Axis.of(axis) for axis in axes],
            shape.TRS,
            (group, c, k, tap),
            threads,
        )  # fmt: skip
        for axes in reached
    ]
    return plans, len(reached) == len(parts)


@lru_cache(1024)
def _wgrad(
    shape: ConvShape, dtype: torch.dtype, y: Strides, x: Strides, w: Strides
) -> _WeightGradient:
    return _WeightGradient(
        _memory(dtype, x), _memory(dtype, y), shape.N, shape.groups, shape.C // shape.groups,
        shape.K // shape.groups, [_Axis.of(axis) for axis in axes_of(shape)], shape.TRS,
        _along(shape, w),
    )  # fmt: skip


@lru_cache(1024)
def is_ordered(sizes: Strides, strides: Strides) -> bool:
    """Whether a weight's taps follow each other, and something in it is neighbours."""
    expected = strides[-1]
    for size, stride in zip(reversed(sizes[2:]), reversed(strides[2:]), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return 1 in (strides[0], strides[1], strides[-1])


def _ordered(w: torch.Tensor) -> torch.Tensor:
    return w if is_ordered(w.shape, w.stride()) else w.contiguous()


def vector(t: torch.Tensor | None) -> torch.Tensor | None:
    """One value a channel, in the type that is computed in, one behind the other."""
    return None if t is None else native(t).contiguous()


def native_epilogue(epilogue: Epilogue | None, y: torch.Tensor) -> Epilogue | None:
    """The same with the scale in the computing type and the residual in y's type and strides; None where no
    more than a bias is left to add."""
    if epilogue is None:
        return None
    scale, residual, activation, *_ = epilogue
    if scale is None and residual is None and activation == "none":
        return None
    if residual is not None and (residual.dtype != y.dtype or residual.stride() != y.stride()):
        # Each place is read before it is written, so the residual may lie where the result will.
        residual = y.copy_(residual)
    return Epilogue(vector(scale), residual, activation)


def fprop(
    shape: ConvShape,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """``y = x * w + bias`` for zeros as padding; see `conv.conv_fprop`."""
    w = _ordered(native(w))
    threads = torch.get_num_threads()
    plan = _fprop(shape, x.dtype, x.stride(), w.stride(), y.stride(), threads)
    plan.run(x, w, vector(bias), y, native_epilogue(epilogue, y))


def dgrad(
    shape: ConvShape,
    grad_y: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    grad_x: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """The gradient with respect to x; see `conv.conv_dgrad`."""
    w, bias, finish = _ordered(native(w)), vector(bias), native_epilogue(epilogue, grad_x)
    plans, everywhere = _dgrad(
        shape, grad_y.dtype, grad_y.stride(), w.stride(), grad_x.stride(), torch.get_num_threads(),
        finish is not None,
    )  # fmt: skip
    if not everywhere:
        if bias is None:
            grad_x.zero_()
        else:
            grad_x.copy_(bias.view(-1, *(1,) * shape.dims))
    for plan in plans:
        plan.run(grad_y, w, bias, grad_x, finish)


def wgrad(shape: ConvShape, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor) -> None:
    """The gradient with respect to w; see `conv.conv_wgrad`."""
    result = grad_w
    if result.dtype not in NAME or not is_ordered(result.shape, result.stride()):
        result = torch.empty(grad_w.shape, dtype=native(x[:0]).dtype)
    plan = _wgrad(shape, x.dtype, grad_y.stride(), x.stride(), result.stride())
    plan.run(grad_y, x, result)
    if result is not grad_w:
        grad_w.copy_(result)
