"""Convolution by blocks with their channels in planes: of any shape, any padding mode, any strides.

A task copies one block of x into scratch, padded, and multiplies it there against packed weights:

    block   [C] [phase] [Z] [H] [W] [images]      phase: places of one residue modulo the step, so that
                                                  neighbouring outputs read neighbouring elements

A tap then is one offset into the block, and `simd.gemm` runs along consecutive elements: places of a row,
images side by side (the innermost axis, for maps too small to fill vectors) or, where that computes less in
total, whole rows with the padding between them. `_weigh_correlation` picks by an estimate.

What an `Epilogue` asks for is done to a row of sums on its way out of scratch. Which activation is a number
that `simd.finish` looks at once a row, so that no kernel is compiled anew for one.

The weight gradient copies x the same way. Where rows are long it takes sums along them with `simd.dot`; else
it turns the block, one tile of (channel, tap) at a time, into ``[place] [channel, tap]`` and adds up outer
products with `simd.gemm`. `_weigh_weights` picks; it splits the sum by the shape alone and the parts are
added in order, so the bits do not depend on the number of threads.

A padding mode other than zeros changes the copy and nothing else: places are counted in the padded input, and
tables say which place of x each of them shows (`Frame`). Their input gradient is that of the padded input,
folded by `conv_fold`.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from cnnops.cpu import simd
from cnnops.cpu.compiler import routine
from cnnops.cpu.conv_axes import (
    CACHE_BYTES,
    NO_FRAME,
    PARTIAL_BYTES,
    SPLITS,
    Axis,
    Frame,
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
    ahead,
    given,
    inside,
    layout,
    native,
    native_result,
    pointer,
    strides,
    unpack,
)
from cnnops.epilogue import ACTIVATIONS, NO_EPILOGUE, Epilogue
from cnnops.shapes import ConvShape

STRETCH = 256
"""Most terms of an output that are added up one after the other: a long sum of such sums rounds less."""


# ---- kernels ----------------------------------------------------------------------------------------------


@routine
def _copy_block(
    L, x, block, behind, residues, C, F, Z, H, W, side, images, d0, h0, w0, sd, sh, sw, sizes, strides, frame
):  # fmt: skip
    """Fill ``block [C] [F] [Z] [H] [W] [side]`` from `images` images at x; zero where x has nothing, and in
    so many elements `behind` the block, which whole vectors reach.

    `frame` is None, or a `Frame`'s tables with the first place and the width of what they leave as it is in
    the last axis; `sizes` are those of the padded input then.
    """
    size_d, size_h, size_w = sizes
    xn, xc, xd, xh, xw = strides
    plane = F * Z * H * W * side
    step = sw * xw
    for j in range(C * plane + behind):
        block[j] = 0
    neutral = -block[0]  # -0: adding it changes nothing
    # Some channels at a time: an image is read in order, and the lines that images share stay close by.
    for c0 in range(0, C, 16):
        for i in range(images):
            for c in range(c0, min(c0 + 16, C)):
                source = ahead(x, i * xn + c * xc)
                for f in range(F):
                    d, h = d0 + residues[3 * f], h0 + residues[3 * f + 1]
                    w = w0 + residues[3 * f + 2]
                    start_z, stop_z = inside(d, sd, size_d, Z)
                    start_r, stop_r = inside(h, sh, size_h, H)
                    start, stop = inside(w, sw, size_w, W)
                    left, right = start, stop
                    if frame is not None:
                        places_d, places_h, places_w, before, width = frame
                        w -= before
                        left, right = inside(w, sw, width, W)
                    for z in range(start_z, stop_z):
                        for r in range(start_r, stop_r):
                            to = c * plane + ((f * Z + z) * H + r) * W * side + i
                            if frame is None:
                                at = (d + z * sd) * xd + (h + r * sh) * xh
                            else:
                                at = places_d[d + z * sd] * xd + places_h[h + r * sh] * xh
                                for j in range(start, left):
                                    place = places_w[before + w + j * sw]
                                    block[to + j * side] = source[at + place * xw]
                                for j in range(right, stop):
                                    place = places_w[before + w + j * sw]
                                    block[to + j * side] = source[at + place * xw]
                            row = ahead(source, at + (w + left * sw) * xw)
                            line = ahead(block, to + left * side)
                            if side == 1 and step == 1:
                                simd.copy(L, line, row, right - left, neutral)
                            else:
                                for j in range(right - left):
                                    line[j * side] = row[j * step]


@lru_cache(None)
def _pack(T: str) -> Task:
    args = layout(f"{T}**2 int32* int64*7")

    def conv_pack(address: int, index: int, scratch: int) -> None:
        """Filters to ``[group] [block of M] [C, tap] [M]``, zero behind the last one; one block an index."""
        w, packed, taps, K, C, T, M, of_group, of_k, of_c = unpack(address, args)
        blocks = (K + M - 1) // M
        to = ahead(packed, index * C * T * M)
        source = ahead(w, index // blocks * of_group)
        k = index % blocks * M
        for c in range(C):
            for t in range(T):
                place = k * of_k + c * of_c + taps[t]
                for m in range(min(M, K - k)):
                    to[m] = source[place + m * of_k]
                for m in range(K - k, M):
                    to[m] = 0
                to = ahead(to, M)

    return Task(conv_pack, args)


@routine(fastmath={"contract"})
def _finish(
    real, L, sums, none, residual, y, scale, shift, activation, images, count, side, yn, yw, following
):  # fmt: skip
    """A row of y, of so many images, from its sums, by an `Epilogue`; `none` is the null pointer. Neighbours
    in y are written straight; others are finished in place, while they are in the cache, and then copied.
    """
    straight = side == 1 and yw == 1
    if not straight and given(residual):
        for i in range(images):
            for q in range(count):
                value = sums[q * side + i] * scale + shift
                sums[q * side + i] = value + residual[i * yn + q * yw]
        scale, shift = real(1), real(-0.0)  # these change nothing
    simd.finish(
        L, y if straight else sums, sums, residual if straight else none, count * side, scale, shift,
        activation, following,
    )  # fmt: skip
    if not straight:
        for i in range(images):
            for q in range(count):
                y[i * yn + q * yw] = sums[q * side + i]


@lru_cache(None)
def _correlate(T: str, L: int, M: int, V: int, framed: bool) -> Task:
    args = layout(f"{T}**6 int64 int32**5 int64*47")
    half = V // 2
    real = np.float32 if T == "float32" else np.float64

    def conv_correlate(address: int, index: int, scratch: int) -> None:
        """One block of outputs, for one share of one group's filters."""
        (
            x, w, scale, bias, residual, y, activation,
            offsets, residues, places_d, places_h, places_w, before, width,
            N, groups, C, K, J, F, parts, parts_step, j_step,
            Bi, Bd, Bh, Bw, blocks_d, blocks_h, blocks_w, Zb, Hb, Wb,
            run_rows, column_z, column_p, sums_at,
            Z, P, Q, sd, sh, sw, low_d, low_h, low_w, D, H, W,
            xn, xc, xd, xh, xw, yn, yk, yd, yh, yw,
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

        block = pointer(scratch, T)
        none = pointer(0, T)
        sums = pointer(scratch + sums_at, T)
        source = ahead(x, n0 * xn + group * C * xc)
        _copy_block(
            L, source, block, V * L, residues, C, F, Zb, Hb, Wb, Bi, images,
            z0 * sd + low_d, p0 * sh + low_h, q0 * sw + low_w, sd, sh, sw,
            (D, H, W), (xn, xc, xd, xh, xw),
            (places_d, places_h, places_w, before, width) if framed else None,
        )  # fmt: skip

        row = Wb * Bi
        pitch = Bd * column_z
        straight = Bi == 1 and yw == 1
        # Rows with nothing between them, neither in the sums nor in y, are one long row.
        lines, places = ps, qs
        if yw == 1 and yh == qs and column_p == qs * Bi:
            lines, places = 1, ps * qs
        # Results leave channel by channel, or, where channels share memory's lines, row by row of some.
        step = 16 if yk == 1 and not straight else 1
        blocks_k = (K + M - 1) // M
        packed = ahead(w, group * blocks_k * J * M)
        last = blocks_k * (part + 1) // parts
        for first in range(blocks_k * part // parts, last, parts_step):
            behind = min(first + parts_step, last)
            # A stretch of the filters stays in the first-level cache while the tiles pass it. There is one of
            # no terms, too, where there are none: it makes every sum zero.
            for j in range(0, max(J, 1), j_step):
                count = min(j_step, J - j)
                for b in range(first, behind):
                    filters = ahead(packed, (b * J + j) * M)
                    for z in range(zs):
                        for p in range(0, ps, run_rows):
                            length = (min(run_rows, ps - p) - 1) * row + qs * Bi
                            run = ahead(block, (z * Hb + p) * row)
                            to = ahead(sums, (b - first) * M * pitch + z * column_z + p * column_p)
                            for start in range(0, length, V * L):
                                if length - start > half * L:
                                    simd.gemm(
                                        L, M, V, filters, ahead(run, start), ahead(offsets, j), count,
                                        ahead(to, start), pitch, j,
                                    )  # fmt: skip
                                else:
                                    simd.gemm(
                                        L, M, half, filters, ahead(run, start), ahead(offsets, j), count,
                                        ahead(to, start), pitch, j,
                                    )  # fmt: skip
            end = min(behind * M, K)
            for k0 in range(first * M, end, step):
                for z in range(zs):
                    for p in range(lines):
                        for k in range(k0, min(k0 + step, end)):
                            line = ahead(
                                sums, (k - first * M) * pitch + z * column_z + p * column_p
                            )
                            channel = group * K + k
                            place = n0 * yn + channel * yk + (z0 + z) * yd + (p0 + p) * yh + q0 * yw
                            to, shift = ahead(y, place), bias[channel]
                            if activation >= 0:
                                beside = ahead(residual, place) if given(residual) else none
                                factor = scale[channel] if given(scale) else real(1)
                                _finish(
                                    real, L, line, none, beside, to, factor, shift, activation, images,
                                    places, Bi, yn, yw, yk,
                                )  # fmt: skip
                            elif straight:
                                simd.copy(L, to, line, places, shift)
                            else:
                                for i in range(images):
                                    for q in range(places):
                                        to[i * yn + q * yw] = line[q * Bi + i] + shift

    return Task(conv_correlate, args)


@routine
def _add_products(
    L, M, V, lines, stack, block, places, tile, count, filters, columns, sums, pitch, former, edge, exact
):  # fmt: skip
    """``sums[k, j] (+)= sum_i lines[k // M, i, k % M] * block[i, j]`` for so many filters and columns.

    `lines` have `stack` places each; of the first `count` of them `places` leads to the block's rows, which
    are `tile` long. Sums are added to where there are `former` ones, overwritten elsewhere; whole tiles of
    them, unless that must be `exact`: what reaches beyond them then stays in `edge`.
    """
    for k in range(0, filters, M):
        line = ahead(sums, k * pitch)
        whole = not exact or (k + M <= filters and columns == tile)
        to = line if whole else edge
        step = pitch if whole else tile
        add = former and whole
        for place in range(0, count, STRETCH):
            simd.gemm(
                L, M, V, ahead(lines, k * stack + place * M), ahead(block, place * tile), places,
                min(STRETCH, count - place), to, step, 1 if add else place,
            )  # fmt: skip
        if not whole:
            for m in range(min(M, filters - k)):
                for j in range(columns):
                    value = edge[m * tile + j]
                    line[m * pitch + j] = value + line[m * pitch + j] if former else value


@lru_cache(None)
def _weights(T: str, L: int, M: int, V: int, framed: bool, turned: bool) -> Task:
    args = layout(f"{T}**3 int32**6 int64*47")
    tile = V * L if turned else V
    half = V // 2

    def conv_weights(address: int, index: int, scratch: int) -> None:
        """A share of the places, for a share of one group's filters and channels: ``sums [K] [C, tap]``.

        `direct`: sums is the result itself, else a place of its own for each task.
        """
        (
            x, grad_y, sums, offsets, residues, places,
            places_d, places_h, places_w, before, width,
            N, groups, C, K, T_, F, splits, parts_k, parts_c,
            Bi, Bd, Bh, Bw, blocks_n, blocks_d, blocks_h, blocks_w, Zb, Hb, Wb, lines_at, edge_at, direct,
            Z, P, Q, sd, sh, sw, low_d, low_h, low_w, D, H, W,
            xn, xc, xd, xh, xw, yn, yk, yd, yh, yw,
        ) = unpack(address, args)  # fmt: skip
        most_k, most_c = (K + parts_k - 1) // parts_k, (C + parts_c - 1) // parts_c
        c0 = index % parts_c * most_c
        rest = index // parts_c
        k0 = rest % parts_k * most_k
        rest //= parts_k
        group = rest % groups
        split = rest // groups
        channels, filters = min(most_c, C - c0), min(most_k, K - k0)
        rows, columns = (most_k + M - 1) // M * M, (most_c * T_ + tile - 1) // tile * tile
        if direct:
            pitch = C * T_
            sums = ahead(sums, (group * K + k0) * pitch + c0 * T_)
        else:
            pitch = columns
            sums = ahead(sums, index * rows * columns)
        if channels <= 0 or filters <= 0:
            return

        block = pointer(scratch, T)
        lines = pointer(scratch + lines_at, T)
        edge = pointer(scratch + edge_at, T)
        turned_block = ahead(edge, M * tile)
        row, stack = Wb * Bi, Bd * Bh * Bw * Bi
        blocks = blocks_n * blocks_d * blocks_h * blocks_w
        start = split * blocks // splits
        if not turned or blocks == 0:
            for j in range(rows * columns):
                sums[j] = 0
        # Rows and columns of the last tile that nobody wants are computed, too: with numbers, not with what
        # memory holds, which may be denormal and take a hundred times as long.
        for j in range(rows * stack):
            lines[j] = 0
        if turned:
            for j in range(stack * tile):
                turned_block[j] = 0
        neutral = -lines[0]  # -0: adding it changes nothing
        for number in range(start, (split + 1) * blocks // splits):
            q0 = number % blocks_w * Bw
            rest = number // blocks_w
            p0 = rest % blocks_h * Bh
            rest //= blocks_h
            z0 = rest % blocks_d * Bd
            n0 = rest // blocks_d * Bi
            images = min(Bi, N - n0)
            zs, ps, qs = min(Bd, Z - z0), min(Bh, P - p0), min(Bw, Q - q0)
            _copy_block(
                L, ahead(x, n0 * xn + (group * C + c0) * xc), block, L, residues, channels, F, Zb, Hb, Wb,
                Bi, images, z0 * sd + low_d, p0 * sh + low_h, q0 * sw + low_w, sd, sh, sw,
                (D, H, W), (xn, xc, xd, xh, xw),
                (places_d, places_h, places_w, before, width) if framed else None,
            )  # fmt: skip
            line = qs * Bi
            if images < Bi:
                for j in range(rows * stack):
                    lines[j] = 0
            for k in range(filters):
                for i in range(images):
                    for z in range(zs):
                        for p in range(ps):
                            place = (z * ps + p) * line + i
                            source = ahead(
                                grad_y,
                                (n0 + i) * yn + (group * K + k0 + k) * yk
                                + (z0 + z) * yd + (p0 + p) * yh + q0 * yw,
                            )  # fmt: skip
                            if turned:
                                to = ahead(lines, (k // M * stack + place) * M + k % M)
                                for q in range(qs):
                                    to[q * Bi * M] = source[q * yw]
                            elif Bi == 1 and yw == 1:
                                simd.copy(L, ahead(lines, k * stack + place), source, qs, neutral)
                            else:
                                to = ahead(lines, k * stack + place)
                                for q in range(qs):
                                    to[q * Bi] = source[q * yw]
            # Rows without padding between them are one long row.
            segments, length = ps, line
            if line == row:
                segments, length = 1, ps * line
            if not turned:
                for k in range(0, filters, M):
                    for j in range(0, channels * T_, V):
                        for z in range(zs):
                            simd.dot(
                                L, M, V, ahead(lines, k * stack + z * ps * line), stack, line,
                                ahead(block, z * Hb * row), ahead(offsets, j), row, segments, length,
                                ahead(sums, k * pitch + j), pitch,
                            )  # fmt: skip
                continue
            count = zs * ps * line
            for j in range(0, channels * T_, tile):
                vectors = min(V, (channels * T_ - j + L - 1) // L)
                for z in range(zs):
                    for p in range(segments):
                        for v in range(vectors):
                            simd.transpose(
                                L, ahead(turned_block, (z * ps + p) * line * tile + v * L), tile,
                                ahead(block, (z * Hb + p) * row), ahead(offsets, j + v * L), length,
                            )  # fmt: skip
                some = min(tile, channels * T_ - j)
                to, former = ahead(sums, j), number > start
                if vectors > half:
                    _add_products(
                        L, M, V, lines, stack, turned_block, places, tile, count, filters, some,
                        to, pitch, former, edge, direct,
                    )  # fmt: skip
                else:
                    _add_products(
                        L, M, half, lines, stack, turned_block, places, tile, count, filters, some,
                        to, pitch, former, edge, direct,
                    )  # fmt: skip

    return Task(conv_weights, args)


@lru_cache(None)
def _add_splits(T: str) -> Task:
    args = layout(f"{T}**2 int64*9")

    def conv_add_splits(address: int, index: int, scratch: int) -> None:
        """The weight gradient of filter `index`: the splits' sums, added in their order."""
        (
            sums, grad_w, groups, K, C, T_, splits, parts_k, parts_c, rows, columns,
        ) = unpack(address, args)  # fmt: skip
        most_k, most_c = (K + parts_k - 1) // parts_k, (C + parts_c - 1) // parts_c
        group, k = index // K, index % K
        for part in range(parts_c):
            to = ahead(grad_w, (index * C + part * most_c) * T_)
            count = min(most_c, C - part * most_c) * T_
            for split in range(splits):
                task = ((split * groups + group) * parts_k + k // most_k) * parts_c + part
                line = ahead(sums, (task * rows + k % most_k) * columns)
                if split == 0:
                    for j in range(count):
                        to[j] = line[j]
                else:
                    for j in range(count):
                        to[j] += line[j]

    return Task(conv_add_splits, args)


# ---- plans ------------------------------------------------------------------------------------------------


class _Window:
    """How the taps of an axis lie in a block: its `phases` (residues), and each tap's phase and shift."""

    def __init__(self, axis: Axis) -> None:
        self.low = min(axis.taps, default=0)
        beyond = [tap - self.low for tap in axis.taps]
        self.phases = sorted({tap % axis.step for tap in beyond})
        self.taps = [(self.phases.index(tap % axis.step), tap // axis.step) for tap in beyond]
        self.reach = max((tap // axis.step for tap in beyond), default=0)


@dataclass(frozen=True)
class _Block:
    """Sizes of one task's share of the places: images, outputs, and elements of x that those need."""

    images: int
    outputs: tuple[int, int, int]
    inputs: tuple[int, int, int]
    phases: int

    @property
    def places(self) -> int:
        return self.images * math.prod(self.outputs)

    @property
    def elements(self) -> int:
        """Elements of x a channel."""
        return self.images * math.prod(self.inputs) * self.phases

    def copy_cycles(self, sizes: tuple[int, int, int], phases: int) -> float:
        """An estimate of copying `sizes` of one channel's images in or out.

        Each stretch of memory starts with a wait; neighbours move as vectors, but one by one where images or
        phases come between them.
        """
        each = 0.4 if self.images * phases == 1 else 1.6
        return self.images * sizes[0] * (250 + sizes[1] * (15 + each * sizes[2] * phases))

    def count(self, N: int, axes: Sequence[Axis]) -> list[int]:
        """Blocks along images and along each axis."""
        return [
            -(-N // self.images),
            *(-(-a.out // o) for a, o in zip(axes, self.outputs, strict=True)),
        ]


def _blocks(N: int, axes: Sequence[Axis], windows: Sequence[_Window]) -> Iterator[_Block]:
    """Blocks worth weighing: some images side by side, and whole axes or even cuts of them."""
    phases = math.prod(len(w.phases) for w in windows)
    images = sorted({min(N, 2**e) for e in range(7)})
    cuts = [sorted({-(-a.out // 2**e) for e in range(a.out.bit_length())}) for a in axes]
    for side, z, p, q in product(images, {1, axes[0].out}, cuts[1], cuts[2]):
        # Rows are cut only where they are long, as in 1-D problems.
        if q >= min(axes[2].out, 128):
            reach = [w.reach for w in windows]
            yield _Block(side, (z, p, q), (z + reach[0], p + reach[1], q + reach[2]), phases)


def _tables(
    block: _Block, C: int, windows: Sequence[_Window], multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 tables: the offset of each (channel, tap) in a block, with zeros up to a multiple of so many, and
    the residues of each phase."""
    Z, H, W = block.inputs
    d, h, w = windows
    taps = [
        ((((fd * len(h.phases) + fh) * len(w.phases) + fw) * Z + z) * H + p) * W + q
        for (fd, z), (fh, p), (fw, q) in product(d.taps, h.taps, w.taps)
    ]
    offsets = np.arange(C)[:, None] * block.elements + np.array(taps, int) * block.images
    padded = np.zeros(up(offsets.size, multiple), np.int32)
    padded[: offsets.size] = offsets.ravel()
    return padded, np.array(list(product(d.phases, h.phases, w.phases)), np.int32)


def _slower(room: int) -> float:
    """How much longer a kernel takes whose scratch of so many bytes comes from the shared cache."""
    return 1.0 if room <= CACHE_BYTES else 1.3 * max(1.0, room / (8 * CACHE_BYTES))


class _CorrelationChoice(NamedTuple):
    """How a correlation is cut into tasks.

    Runs have `run_rows` rows each. In the sums a row begins `column_p` behind the row before, an output's
    plane `column_z` behind. The filters come in `parts`, each done `parts_step` blocks at a time.
    """

    block: _Block
    run_rows: int
    column_z: int
    column_p: int
    parts: int
    parts_step: int


def _weigh_correlation(
    T: str, N: int, groups: int, C: int, K: int, axes: Sequence[Axis], windows: Sequence[_Window],
    tile: tuple[int, int], j_step: int, threads: int,
) -> tuple[float, _CorrelationChoice]:  # fmt: skip
    """The fastest choice by estimated cycles, and that estimate, a thread."""
    (M, V), lanes, itemsize = tile, simd.lanes(T), bytes_of(T)
    width = V * lanes
    J = C * math.prod(len(axis.taps) for axis in axes)
    blocks_k = -(-K // M)
    weighed: list[tuple[float, _CorrelationChoice]] = []
    for block, joined in product(_blocks(N, axes, windows), (True, False)):
        z, p, q = block.outputs
        row = block.inputs[2] * block.images
        # Rows joined into one run, or each a run of its own.
        run_rows = p if joined else 1
        run = (run_rows - 1) * row + q * block.images
        length = up(run, width)
        column_p, column_z = (row, length) if joined else (length, p * length)
        whole, rest = run // width, run % width
        vectors = whole * V + (0 if rest == 0 else V if rest > V // 2 * lanes else V // 2)
        gemms = z * p // run_rows * (J * M * vectors + 40 * -(-run // width) * -(-J // j_step))
        blocks = math.prod(block.count(N, axes)) * groups
        for parts in {min(blocks_k, e) for e in (1, 2, 3, 4, 6, 8, 16, 32)}:
            share = -(-blocks_k // parts)
            parts_step = min(share, max(1, CACHE_BYTES // 2 // (M * z * column_z * itemsize)))
            room = (C * block.elements + width + parts_step * M * z * column_z) * itemsize
            cycles = (
                share * gemms * _slower(room)
                + C * block.copy_cycles(block.inputs, block.phases)
                + share * M * block.copy_cycles(block.outputs, 1)
                + share * M * J * itemsize / 8  # the filters come from a shared cache
                + 500
            )
            choice = _CorrelationChoice(block, run_rows, column_z, column_p, parts, parts_step)
            weighed.append((cycles * -(-blocks * parts // threads), choice))
    return min(weighed, key=lambda pair: pair[0])


class _Correlation:
    """A correlation's plan: all that does not change from call to call.

    The weight is contiguous, of spatial size `kernel`; `weight_strides` lead from group to group, from filter
    to filter and from channel to channel of it, as this correlation has them.
    """

    def __init__(
        self, T: str, N: int, groups: int, C: int, K: int, axes: Sequence[Axis],
        kernel: tuple[int, int, int], weight_strides: tuple[int, int, int], threads: int,
        frame: Frame | None = None,
    ) -> None:  # fmt: skip
        lanes, itemsize = simd.lanes(T), bytes_of(T)
        tile = simd.tiles().gemm
        # One row of accumulators runs at some 0.6 of the speed, and wastes no rows.
        if K < 0.6 * up(K, tile[0]):
            tile = simd.tiles().gemm_thin
        M, V = tile
        J = C * math.prod(len(axis.taps) for axis in axes)
        j_step = max(1, min(STRETCH, 24 * 1024 // (M * itemsize)))
        windows = [_Window(axis) for axis in axes]
        cycles, choice = _weigh_correlation(
            T, N, groups, C, K, axes, windows, tile, j_step, threads
        )
        block = choice.block
        blocks_n, *blocks_zpq = block.count(N, axes)
        sums_at = up((C * block.elements + V * lanes) * itemsize, 64)
        sums = choice.parts_step * M * block.outputs[0] * choice.column_z
        self._axes = axes
        self._task = _correlate(T, lanes, M, V, frame is not None)
        self._count = blocks_n * math.prod(blocks_zpq) * groups * choice.parts
        self._work = cycles * min(threads, self._count)
        self._scratch_bytes = sums_at + sums * itemsize
        self._values = (
            *map(Table, _tables(block, C, windows, 1)),
            *(frame.values if frame else NO_FRAME),
            N, groups, C, K, J, block.phases, choice.parts, choice.parts_step, j_step,
            block.images, *block.outputs, *blocks_zpq, *block.inputs,
            choice.run_rows, choice.column_z, choice.column_p, sums_at,
            *(axis.out for axis in axes), *(axis.step for axis in axes), *(w.low for w in windows),
            *(axis.size for axis in axes),
        )  # fmt: skip

        _, R, S = kernel
        picks = product(*(axis.picks for axis in axes))
        taps = Table(np.array([(t * R + r) * S + s for t, r, s in picks], np.int32))
        self._pack = _pack(T)
        self._pack_count = groups * -(-K // M)
        self._pack_values = (taps, K, C, taps.array.size, M, *weight_strides)
        self._packed_size = self._pack_count * M * J

    def run(
        self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, y: torch.Tensor,
        epilogue: Epilogue | None = None,
    ) -> None:  # fmt: skip
        """All tensors in the plan's element type; the residual with y's strides."""
        scale = residual = None
        activation = -1
        n, k, *places = strides(y)
        start = sum(axis.start * stride for axis, stride in zip(self._axes, places, strict=True))
        start *= y.element_size()
        if epilogue is not None:
            scale, residual = epilogue.scale, epilogue.residual
            activation = ACTIVATIONS.index(epilogue.activation)
        packed = Shared(self._packed_size * x.itemsize)
        self._pack.run(
            self._pack_count,
            2.0 * self._packed_size,
            w,
            packed,
            *self._pack_values,
        )
        self._task.run(
            self._count, self._work,
            x, packed, scale, bias, At(residual, start), At(y, start),
            activation, *self._values, *strides(x), n, k,
            *(axis.stride * stride for axis, stride in zip(self._axes, places, strict=True)),
            scratch_bytes=self._scratch_bytes,
        )  # fmt: skip


@lru_cache(512)
def _fprop(shape: ConvShape, T: str, threads: int) -> _Correlation:
    C, K, taps = shape.C // shape.groups, shape.K // shape.groups, math.prod(shape.TRS)
    along = (K * C * taps, C * taps, taps)
    return _Correlation(
        T, shape.N, shape.groups, C, K, axes_of(shape), shape.TRS, along, threads, Frame.of(shape)
    )


@lru_cache(512)
def _dgrad(
    shape: ConvShape, T: str, threads: int, empty_sums: bool
) -> tuple[list[_Correlation], bool]:
    """The correlations that make up the input gradient, those without taps if asked for, and whether they
    write all of it."""
    C, K, taps = shape.C // shape.groups, shape.K // shape.groups, math.prod(shape.TRS)
    along = (K * C * taps, taps, C * taps)
    parts = list(product(*map(transposed, axes_of(shape))))
    reached = [axes for axes in parts if empty_sums or all(axis.taps for axis in axes)]
    plans = [
        _Correlation(T, shape.N, shape.groups, K, C, axes, shape.TRS, along, threads)
        for axes in reached
    ]
    return plans, len(reached) == len(parts)


class _WeightChoice(NamedTuple):
    """How the weight gradient is cut: filters and channels into parts, the places into `splits`. A task's
    sums have `rows` times `columns`: outer products of a `turned` block, else inner ones."""

    turned: bool
    block: _Block
    parts_k: int
    parts_c: int
    splits: int
    rows: int
    columns: int


def _weight_tile(turned: bool, K: int) -> tuple[int, int]:
    """Rows and vectors of a tile of outer products, or rows and columns of inner ones."""
    tiles = simd.tiles()
    if turned:
        return tiles.gemm if K > 1 else tiles.gemm_thin
    return tiles.dot if K > 1 else tiles.dot_thin


def _weigh_weights(
    T: str, N: int, groups: int, C: int, K: int, axes: Sequence[Axis], windows: Sequence[_Window],
    forms: Sequence[bool] = (False, True),
) -> tuple[float, _WeightChoice]:  # fmt: skip
    """The fastest choice by estimated cycles, and that estimate for all tasks together; `forms` are the
    values of `turned` to choose from."""
    lanes, itemsize = simd.lanes(T), bytes_of(T)
    taps = math.prod(len(axis.taps) for axis in axes)
    weighed: list[tuple[float, float, _WeightChoice]] = []
    for block, turned in product(_blocks(N, axes, windows), forms):
        M, V = _weight_tile(turned, K)
        tile = V * lanes if turned else V
        stretches = -(-block.places // STRETCH)
        z, p, q = block.outputs
        blocks = math.prod(block.count(N, axes))
        lines, length = z * p, q * block.images
        if block.inputs[2] == q:
            lines, length = z, p * length
        vectors = lines * -(-length // lanes)
        one = M * V * (vectors + 12 * z) + 15 * lines + 30
        for parts_k, parts_c in product((1, 2, 4, 8, 16), repeat=2):
            parts = groups * parts_k * parts_c
            if parts_k > K or parts_c > C or parts > max(groups, 4 * SPLITS):
                continue
            most_k, most_c = -(-K // parts_k), -(-C // parts_c)
            rows, columns = up(most_k, M), up(most_c * taps, tile)
            size = rows * columns
            fitting = PARTIAL_BYTES // (size * parts * itemsize)
            splits = max(1, min(blocks, SPLITS // parts, fitting))
            room = (most_c * block.elements + rows * block.places) * itemsize
            tiles = rows // M * (columns // tile)
            copies = most_c * block.copy_cycles(block.inputs, block.phases)
            if turned:
                room += tile * block.places * itemsize
                used = up(most_c * taps, tile // 2) // lanes
                products = used * rows * block.places + tiles * stretches * (3 * M * V + 60)
                copies += used * (8 * lanes * vectors + 20 * lines)
                # grad_y is copied to every M-th element.
                copies += most_k * block.images * z * (250 + p * (15 + 1.6 * q))
            else:
                products = tiles * one
                copies += most_k * block.copy_cycles(block.outputs, 1)
            cycles = (products * _slower(room) + copies + 500) * -(-blocks // splits)
            # A turned block's sums are the result itself if they are not split.
            if not turned or splits > 1:
                cycles += 2 * size
            # As if for eight threads; small problems for fewer, which need fewer splits.
            work = cycles * parts * splits
            threads = min(8, max(1, int(work / 50_000)))
            choice = _WeightChoice(turned, block, parts_k, parts_c, splits, rows, columns)
            weighed.append((cycles * -(-parts * splits // threads), work, choice))
    _, work, choice = min(weighed, key=lambda triple: triple[0])
    return work, choice


class _WeightGradient:
    """The weight gradient's plan. It depends on the shape alone, never on the number of threads."""

    def __init__(self, shape: ConvShape, T: str) -> None:
        lanes, itemsize = simd.lanes(T), bytes_of(T)
        N, groups = shape.N, shape.groups
        C, K, taps = shape.C // groups, shape.K // groups, math.prod(shape.TRS)
        axes = axes_of(shape)
        windows = [_Window(axis) for axis in axes]
        self._work, choice = _weigh_weights(T, N, groups, C, K, axes, windows)
        turned, block, parts_k, parts_c, splits, rows, columns = choice
        M, V = _weight_tile(turned, K)
        tile = V * lanes if turned else V
        most_c = -(-C // parts_c)
        lines_at = up((most_c * block.elements + lanes) * itemsize, 64)
        edge_at = up(lines_at + (rows * block.places + lanes) * itemsize, 64)
        self._scratch_bytes = edge_at
        if turned:
            self._scratch_bytes += (M + block.places + lanes) * tile * itemsize
        counts = block.count(N, axes)
        self._direct = turned and splits == 1 and math.prod(counts) > 0
        frame = Frame.of(shape)
        self._task = _weights(T, lanes, M, V, frame is not None, turned)
        self._count = splits * groups * parts_k * parts_c
        self._sums_size = self._count * rows * columns
        tables = (
            *_tables(block, most_c, windows, tile),
            np.arange(STRETCH, dtype=np.int32) * np.int32(tile),
        )
        self._values = (
            *map(Table, tables),
            *(frame.values if frame else NO_FRAME),
            N, groups, C, K, taps, block.phases, splits, parts_k, parts_c,
            block.images, *block.outputs, *counts, *block.inputs,
            lines_at, edge_at, self._direct,
            *(axis.out for axis in axes), *(axis.step for axis in axes), *(w.low for w in windows),
            *(axis.size for axis in axes),
        )  # fmt: skip
        self._add = _add_splits(T)
        self._add_count = groups * K
        self._add_values = (groups, K, C, taps, splits, parts_k, parts_c, rows, columns)

    def run(self, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor) -> None:
        sums = grad_w if self._direct else Shared(self._sums_size * x.itemsize)
        self._task.run(
            self._count, self._work,
            x, grad_y, sums, *self._values,
            *strides(x), *strides(grad_y),
            scratch_bytes=self._scratch_bytes,
        )  # fmt: skip
        if not self._direct:
            self._add.run(
                self._add_count,
                self._sums_size,
                sums,
                grad_w,
                *self._add_values,
            )


_wgrad = lru_cache(512)(_WeightGradient)


@lru_cache(1024)
def is_dense(shape: ConvShape) -> bool:
    """Whether each image has one output, which sees exactly all of it: a dense layer."""
    return (
        shape.spatial == shape.kernel
        and shape.groups == 1
        and set(shape.dilation) == {1}
        and not any(a or b for a, b in shape.padding)
    )


def _dense(shape: ConvShape) -> ConvShape:
    """A dense layer as a convolution of one place along a row of N: a long row serves vectors better."""
    C = shape.C * math.prod(shape.kernel)
    return ConvShape(1, C, shape.K, (shape.N,), (1,), (1,), ((0, 0),), (1,))


def _row(t: torch.Tensor) -> torch.Tensor:
    """``N ...`` seen as ``1 (...) N``."""
    return t.reshape(t.shape[0], -1).t().unsqueeze(0)


def _row_of(epilogue: Epilogue | None, places: int = 1) -> Epilogue | None:
    """An epilogue for `_row` of its tensors, of so many `places` a channel."""
    if epilogue is None:
        return None
    scale, residual, activation, *_ = epilogue
    return Epilogue(
        None if scale is None else scale.repeat_interleave(places),
        None if residual is None else _row(residual),
        activation,
    )


# ---- operations -------------------------------------------------------------------------------------------


def _native(epilogue: Epilogue | None, result: torch.Tensor) -> Epilogue | None:
    """The same in `result`'s type and strides; None where no more than a bias is left to add."""
    scale, residual, activation, *_ = epilogue or NO_EPILOGUE
    if scale is None and residual is None and activation == "none":
        return None
    if scale is not None:
        scale = native(scale).contiguous()
    if residual is not None and (
        residual.dtype != result.dtype or residual.stride() != result.stride()
    ):
        # Each place is read before it is written, so the residual may lie where the result will.
        residual = result.copy_(residual)
    return Epilogue(scale, residual, activation)


def fprop(
    shape: ConvShape,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """``y = x * w + bias``, x padded as `shape.padding_mode` says; any strides. See `Epilogue` for more."""
    x, w = native(x), native(w).contiguous()
    bias = zeros(shape.K, x.dtype) if bias is None else native(bias).contiguous()
    dense = is_dense(shape)
    result = native_result(y, x.dtype, contiguous=dense)
    finish = _native(epilogue, result)
    seen, view = shape, result
    if dense:
        seen, x, view = _dense(shape), _row(x), _row(result)
        finish = _row_of(finish)
    _fprop(seen, NAME[x.dtype], torch.get_num_threads()).run(x, w, bias, view, finish)
    if result is not y:
        y.copy_(result)


def dgrad(
    shape: ConvShape,
    grad_y: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    grad_x: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """The gradient with respect to x, for zeros as padding, plus `bias`, one value a channel of x; and what
    else the `Epilogue` says."""
    grad_y, w = native(grad_y), native(w).contiguous()
    bias = zeros(shape.C, grad_y.dtype) if bias is None else native(bias).contiguous()
    dense = is_dense(shape)
    result = native_result(grad_x, grad_y.dtype, contiguous=dense)
    finish = _native(epilogue, result)
    view = result
    if dense:
        places = math.prod(shape.kernel)
        bias = bias.repeat_interleave(places)
        finish = _row_of(finish, places)
        shape, grad_y, view = _dense(shape), _row(grad_y), _row(result)
    T, threads = NAME[grad_y.dtype], torch.get_num_threads()
    plans, everywhere = _dgrad(shape, T, threads, finish is not None)
    if not everywhere:
        view.copy_(bias.view(-1, *(1,) * shape.dims))
    for plan in plans:
        plan.run(grad_y, w, bias, view, finish)
    if result is not grad_x:
        grad_x.copy_(result)


def wgrad(shape: ConvShape, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor) -> None:
    """The gradient with respect to w: the same bits for any number of threads."""
    grad_y, x = native(grad_y), native(x)
    result = native_result(grad_w, x.dtype, contiguous=True)
    if is_dense(shape):
        shape, grad_y, x = _dense(shape), _row(grad_y), _row(x)
    _wgrad(shape, NAME[x.dtype]).run(grad_y, x, result)
    if result is not grad_w:
        grad_w.copy_(result)
