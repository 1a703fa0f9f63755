"""Winograd's weight gradient: F(3x3, 4x4) and F(5x5, 2x2), 36 products where direct sums have 144 and 100;
for 3x3 taps with a stride of 2, 25 where these have 36.

The gradient of R by R taps is a sum over tiles. Each is a correlation of inputs d with the tile's E by E
gradients g, which stand where `conv_winograd` has the filter: ``Aᵀ [Σ (G g Gᵀ) ⊙ (Bᵀ d B)] A`` with a stride
of 1, and see `winograd_axes.WEIGHTS`. The sum over tiles is taken before Aᵀ and A, so that ⊙ becomes matrix
products ``M[m] += V[v]ᵀ · U[u]``, of [C, tiles] and [tiles, K]:

    V = Bᵀ d B    [v] [tile] [C]        of a block of tiles
    U = G g Gᵀ    [u] [stretch of K] [tile] [K]
    M             [m] [C] [K]           added up over a task's blocks

A task has a share of the channels, one of the filters and one of the tiles, makes V and U of them and turns
its M into taps: as small as a direct convolution's sums, which are added up in the same way. V is made anew
for every share of filters, U for every share of channels, which takes less time than to keep them: both are
in the second-level cache when they are used. A block's tiles are sorted as in `conv_winograd`, so that those
that reach beyond the gradients do without the products with U of such alone.

Results in float32 from normally distributed numbers are 5e-7 to 1e-6 of their norm from exact ones, where a
direct convolution's are 2e-7 to 3e-7 from them; with a stride of 2, 1e-7 to 3e-7 where those have 1e-7 to
2e-7.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from cnnops.config import settings
from cnnops.cpu import conv_rows, conv_winograd, rows, simd
from cnnops.cpu.compiler import routine
from cnnops.cpu.conv_axes import PARTIAL_BYTES, SPLITS, up
from cnnops.cpu.conv_winograd import BLOCK_BYTES, KINDS, LINE, PIXEL_BYTES, STRETCH
from cnnops.cpu.task import Shared, Table, Task, Value, ahead, layout, pointer, unpack
from cnnops.cpu.winograd_axes import WEIGHTS, Scheme, transform_sums
from cnnops.shapes import Axes, ConvShape

TILES = 128
"""Most tiles of a block: what is added up one after the other, and what stays in the first-level cache."""


@routine
def _outer_products(L, M, W, v, u, sums, common):
    """``sums[c, k] (+)= sum_t v[lines[t] + c] * u[t * step + k]`` for W columns; overwritten where `more` is
    0."""
    lines, tiles, step, channels, width, more = common
    for c in range(0, channels, M):
        rows.outer(L, M, W, ahead(v, c), lines, tiles, u, step, ahead(sums, c * width), width, more)


@lru_cache(None)
def _weights(kind: str, scheme: str, L: int, M: int, V: int) -> Task:
    args = layout("int64*2 float32**2 int64**2 int64*56")
    axis, full, M2 = WEIGHTS[scheme], V * L, 2 * M
    side, step, E, R, *_ = axis
    NV, NU, NM = axis.v, axis.u, axis.m
    of_v, of_u, of_m, again = axis.of_both_axes()
    all_products, of_axis = len(of_v), len(axis.products)
    every = (1 << of_axis) - 1
    # Widths of tiles, see `rows.padded`.
    W1, W2, W3 = L, 2 * L, 3 * L

    def winograd_weights(address: int, index: int, scratch: int) -> None:
        """A share of the tiles, for a share of the filters and channels: the gradient itself, or
        ``partial [tap] [C] [K]`` where there are others to add to it."""
        (
            x, g, partial, grad_w, picks, lines,
            dilation_h, dilation_w, H, W, TH, TW, pad_h, pad_w, P, Q, needed_h, needed_w, itemsize,
            C, K, parts_k, parts_c, share_k, share_c, splits, blocks, total, tiles,
            chunk_c, chunk_k, pitch_v, plane_v, pitch_u, stretch_u, plane_u, width, plane, room_c, pitch,
            v_at, u_at, sums_at, taps_at, places_at, zeros_at, slots_at, starts_at, offsets_at,
            pixels_at, pixels_size,
            xn, xc, xh, xw, yn, yk, yh, yw, of_k, of_c, of_tap,
        ) = unpack(address, args)  # fmt: skip
        c0 = index % parts_c * share_c
        rest = index // parts_c
        k0 = rest % parts_k * share_k
        split = rest // parts_k
        channels, filters = min(share_c, C - c0), min(share_k, K - k0)
        v, u = pointer(scratch + v_at, "float32"), pointer(scratch + u_at, "float32")
        sums = pointer(scratch + sums_at, "float32")
        slots, starts = pointer(scratch + slots_at, "int64"), pointer(scratch + starts_at, "int64")
        room = slots, scratch + places_at, scratch + zeros_at, scratch + pixels_at
        # Lanes without a channel are multiplied, too: by numbers, and no denormal ones.
        pixels = pointer(scratch + pixels_at, "float32")
        for i in range(pixels_size):
            pixels[i] = 0
        padded = rows.padded(filters, L, full, L)
        begin = split * blocks // splits
        for block in range(begin, (split + 1) * blocks // splits):
            first, more = block * tiles, block - begin
            count = min(tiles, total - first)
            conv_winograd.arrange(
                slots, starts, 0, first, count, tiles, total, TH, TW, needed_h != every,
                needed_w != every, first,
            )  # fmt: skip
            conv_winograd.inputs(
                L, step, side, NV, kind, v, plane_v, 0, pitch_v, x + c0 * xc * itemsize, first, count,
                (0, 0), channels, (dilation_h, dilation_w, H, W, TH, TW, pad_h, pad_w, 0, 0, itemsize),
                (xn, xc, xh, xw), chunk_c, room,
            )  # fmt: skip
            conv_winograd.inputs(
                L, E, E, NU, kind, u, plane_u, stretch_u, pitch_u, g + k0 * yk * itemsize, first, count,
                (0, 0), filters, (dilation_h, dilation_w, P, Q, TH, TW, 0, 0, 0, 0, itemsize),
                (yn, yk, yh, yw), chunk_k, room,
            )  # fmt: skip
            for i in range(all_products):
                left = ahead(v, of_v[i] * plane_v)
                for c in range(count * pitch_v, count * pitch_v + M2):
                    left[c] = 0  # tiles reach beyond the last channel
                t0, t1 = conv_winograd.rows_of(
                    starts, count, needed_h >> (i // of_axis) & 1, needed_w >> (i % of_axis) & 1
                )
                behind = 0
                while behind < padded:
                    k = behind
                    wide = min(full, padded - k)
                    behind += wide
                    at_k = k // STRETCH * stretch_u + k % STRETCH
                    right = ahead(u, of_u[i] * plane_u + at_k + t0 * pitch_u)
                    to = ahead(sums, of_m[i] * plane + k)
                    common = ahead(lines, t0), t1 - t0, pitch_u, channels, width, more + again[i]
                    if wide == full:
                        _outer_products(L, M, full, left, right, to, common)
                    elif wide == W1:
                        _outer_products(L, M2, W1, left, right, to, common)
                    elif V > 2 and wide == W2:
                        _outer_products(L, M2, W2, left, right, to, common)
                    elif V > 3:
                        _outer_products(L, M, W3, left, right, to, common)
        taps = pointer(scratch + taps_at, "float32")
        spare = ahead(taps, R * R * room_c * L)
        down = pointer(scratch + offsets_at, "int64")
        across = ahead(down, R)
        for k in range(0, filters, L):
            # The whole sum goes to its place, a split's to the others'.
            gap = L if splits == 1 else pitch
            to = taps if splits == 1 else ahead(partial, index * R * R * room_c * pitch + k)
            for r in range(R):
                across[r] = r * room_c * gap
                down[r] = R * across[r]
            for c in range(channels):
                there = ahead(sums, c * width + k)
                transform_sums(L, NM, R, ahead(to, c * gap), down, across, there, plane)
            if splits == 1:
                conv_rows.deliver(
                    L, "float32", taps, L, spare, ahead(grad_w, (k0 + k) * of_k + c0 * of_c),
                    min(L, filters - k), R * R, 1, room_c, channels, (of_k, of_c, of_tap), picks,
                )  # fmt: skip

    return Task(winograd_weights, args)


# ---- plans ------------------------------------------------------------------------------------------------


def _scheme(shape: ConvShape) -> str:
    scheme = conv_winograd.scheme_of(shape, "wgrad")
    assert scheme is not None
    return scheme


def _needed(axis: Scheme, output: Axes) -> tuple[int, int]:
    """The products that the last tiles of both axes need."""
    h, w = (axis.with_gradients((places - 1) % axis.taps + 1) for places in output)
    return h, w


def _products(axis: Scheme, along: tuple[int, int], output: Axes) -> float:
    """How many a tile has, on an average."""
    result = 1.0
    for tiles, needed in zip(along, _needed(axis, output), strict=True):
        result *= len(axis.products) + (needed.bit_count() - len(axis.products)) / tiles
    return result


class _Shares(NamedTuple):
    """How a weight gradient is cut: filters and channels into parts, the tiles into blocks and splits."""

    parts_k: int
    parts_c: int
    tiles: int
    splits: int


def _blocks(N: int, TH: int, TW: int) -> Iterator[int]:
    """Tiles of a block worth weighing: whole images, or whole rows of tiles, which are read in long lines, or
    parts of them."""
    if TW > TILES:
        yield TILES
    elif TH * TW > TILES:
        yield from (TW * rows for rows in range(1, TILES // TW + 1))
    else:
        yield from (TH * TW * images for images in range(1, min(N, TILES // (TH * TW)) + 1))


@lru_cache(4096)
def _weigh(shape: ConvShape) -> tuple[float, _Shares]:
    """The fastest way by estimated cycles, of which a vector's multiply-add takes one, and that estimate for
    all tasks together."""
    L, M, full = (
        simd.lanes("float32"),
        rows.OUTER_ROWS,
        rows.vectors_a_tile() * simd.lanes("float32"),
    )
    C, K, R = shape.C, shape.K, shape.kernel[0]
    axis = WEIGHTS[_scheme(shape)]
    arrays_v, arrays_u, arrays_m = axis.v**2, axis.u**2, axis.m**2
    E = axis.taps
    images, (output,) = conv_winograd.grids(shape.N, shape.dilation, shape.output)
    TH, TW = (-(-places // E) for places in output)
    total = images * TH * TW
    # See `conv_winograd`: what is no product takes longer there.
    slow = 1.8 if simd.in_two_steps() else 1.0
    best: tuple[float, float, _Shares] | None = None
    cuts = [{up(-(-size // n), L) for n in range(1, -(-size // L) + 1)} for size in (C, K)]
    for share_c, share_k in product(*cuts):
        width = rows.padded.py_func(min(share_k, K), L, full, L)
        if share_c > STRETCH or width > 2 * STRETCH:
            continue
        channels = min(share_c, C)
        rows_c = up(channels, M if width % full > 2 * L or width % full == 0 else 2 * M)
        vectors_c, vectors_k = share_c // L, share_k // L
        parts_c, parts_k = -(-C // share_c), -(-K // share_k)
        parts = parts_c * parts_k
        for tiles in _blocks(images, TH, TW):
            blocks = -(-total // tiles)
            products = rows_c * (width / L * tiles + 20 / M * -(-width // full))
            products *= _products(axis, (TH, TW), output)
            transforms = vectors_c * (8.3 * (axis.inputs**2 + arrays_v) + 10 * E * E)
            transforms += vectors_k * (11.1 * arrays_u + 10 * E * E)
            cycles = products + slow * tiles * transforms
            # V, U and M.
            room = 4 * (
                tiles * (arrays_v * share_c + arrays_u * share_k) + arrays_m * rows_c * width
            )
            if room > BLOCK_BYTES:
                cycles *= room / BLOCK_BYTES
            size = R * R * up(channels, 2 * M) * share_k
            for splits in {1, 2, 4, 8, 16, blocks}:
                if splits > min(blocks, SPLITS) or (splits > 1 and splits * parts > 64):
                    continue
                if splits > 1 and size * parts * splits * 4 > PARTIAL_BYTES:
                    continue
                each = (
                    cycles * -(-blocks // splits)
                    + slow * 14 * arrays_m * channels * vectors_k
                    + 300
                )
                work = each * parts * splits
                if splits > 1:
                    work += 20 * splits * parts * size / L
                # As if for eight threads; small problems for fewer, which need fewer splits.
                threads = min(8, max(1, int(work / 50_000)))
                time = max(work / threads, each * -(-parts * splits // threads))
                if best is None or time < best[0]:
                    best = time, work, _Shares(parts_k, parts_c, tiles, splits)
    assert best is not None
    return best[1:]


class _Plan:
    """All that does not change from call to call. It depends on the shape alone, never on the number of
    threads. `straight` says of x and of grad_y that the kernel reads them where they lie, channels last."""

    def __init__(self, shape: ConvShape, kind: str, straight: tuple[bool, bool]) -> None:
        L, M, V = simd.lanes("float32"), rows.OUTER_ROWS, rows.vectors_a_tile()
        C, K, R = shape.C, shape.K, shape.kernel[0]
        axis = WEIGHTS[_scheme(shape)]
        arrays_v, arrays_u, arrays_m = axis.v**2, axis.u**2, axis.m**2
        E = axis.taps
        images, (spatial, output) = conv_winograd.grids(
            shape.N, shape.dilation, shape.spatial, shape.output
        )
        TH, TW = (-(-places // E) for places in output)
        total = images * TH * TW
        self._dilation = shape.dilation
        self._work, (parts_k, parts_c, tiles, splits) = _weigh(shape)
        share_k, share_c = (
            min(up(-(-size // parts), L), size) for size, parts in ((K, parts_k), (C, parts_c))
        )
        room_c, pitch = up(share_c, 2 * M), up(share_k, L)
        width = rows.padded.py_func(share_k, L, V * L, L)
        pitch_v, pitch_u = up(share_c, L), min(STRETCH, pitch)
        stretch_u = tiles * pitch_u
        plane_v, plane = tiles * pitch_v + LINE, room_c * width + LINE
        plane_u = -(-share_k // STRETCH) * stretch_u + LINE
        scratch = conv_winograd.Scratch()
        v = scratch.add(arrays_v * plane_v + 2 * M)
        u, sums = scratch.add(arrays_u * plane_u), scratch.add(arrays_m * plane)
        chunks, pixels = [], 0
        for size, side, step, there in (
            (spatial, axis.inputs, axis.step, straight[0]),
            (output, E, E, straight[1]),
        ):
            # The pixels that a rectangle of tiles reads, with what a turned vector may reach beyond.
            most = side * min(size[1], step * (min(tiles, TW) - 1) + side)
            if tiles >= TW:
                most = max(most, min(size[0], step * (min(tiles // TW, TH) - 1) + side) * size[1])
            chunk = STRETCH
            while not there and chunk > L and 4 * chunk * most > PIXEL_BYTES:
                chunk //= 2
            chunks.append(chunk)
            if not there:
                pixels = max(pixels, (most + L) * chunk)
        taps = scratch.add((R * R * room_c + L) * L)
        places = scratch.add(2 * axis.inputs**2 * tiles)
        zeros = scratch.add(max(share_c, share_k, STRETCH))
        slots, starts, offsets = (scratch.add(2 * n) for n in (tiles, 8, 2 * R))
        at_pixels = scratch.add(pixels)
        self._scratch_bytes = scratch.bytes
        top, left = (
            before // step for (before, _), step in zip(shape.padding, shape.dilation, strict=True)
        )
        blocks = -(-total // tiles)
        self._values: tuple[Value, ...] = (
            Table(np.arange(tiles, dtype=np.int64) * pitch_v),
            *shape.dilation, *shape.spatial, TH, TW, top, left, *shape.output, *_needed(axis, output),
            4 if kind == "float32" else 2,
            C, K, parts_k, parts_c, share_k, share_c, splits, blocks, total, tiles,
            *chunks, pitch_v, plane_v, pitch_u, stretch_u, plane_u, width, plane, room_c, pitch,
            v, u, sums, taps, places, zeros, slots, starts, offsets, at_pixels, pixels,
        )  # fmt: skip
        self._task = _weights(kind, _scheme(shape), L, M, V)
        self._splits, self._count = splits, splits * parts_k * parts_c
        self._sums = R * R * room_c * pitch
        self._add = conv_rows.add_splits("float32", L)
        self._add_count, *some = conv_rows.pieces_of(parts_k * parts_c, share_c, pitch, L)
        self._picks = Table(np.arange(R * R, dtype=np.int64))
        self._add_values = (
            1, C, K, R * R, 1, splits, parts_k, parts_c, share_k, share_c, room_c, *some,
        )  # fmt: skip
        self._add_scratch = 4 * (R * R * math.prod(some) + L * L)

    def run(self, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor) -> None:
        partial = Shared(4 * self._count * self._sums) if self._splits > 1 else None
        ends = partial, grad_w, self._picks
        k, c, _, s = grad_w.stride()
        self._task.run(
            self._count, self._work, x, grad_y, *ends, *self._values,
            *(step for t in (x, grad_y) for step in conv_winograd.strides(t, self._dilation)), k, c, s,
            scratch_bytes=self._scratch_bytes,
        )  # fmt: skip
        if partial is not None:
            self._add.run(
                self._add_count, self._count * self._sums, *ends, *self._add_values, 0, k, c, s,
                scratch_bytes=self._add_scratch,
            )  # fmt: skip


_plan = lru_cache(512)(_Plan)


# ---- operations -------------------------------------------------------------------------------------------


@lru_cache(4096)
def _is_worth_it(shape: ConvShape) -> bool:
    """By estimated cycles, against a direct convolution at 90 % of the multiply-adds that a CPU can do, or
    80 % with a stride of 2, and lanes that have no filter as far as `conv.form` puts up with them."""
    L = simd.lanes("float32")
    filters = rows.padded.py_func(shape.K, L, rows.vectors_a_tile() * L, rows.grain(L))
    vectors_k = min(filters, 2 * shape.K) / L
    products = shape.N * math.prod(shape.output) * math.prod(shape.kernel) * shape.C * vectors_k
    return bool(_weigh(shape)[0] + 30_000 < products / (0.9 if shape.stride == (1, 1) else 0.8))


def takes(shape: ConvShape, dtype: torch.dtype) -> bool:
    """Whether `wgrad` computes the problem, as `conv_winograd.takes` has it."""
    return (
        settings.winograd
        and dtype in KINDS
        and conv_winograd.scheme_of(shape, "wgrad") is not None
        and _is_worth_it(shape)
    )


def wgrad(shape: ConvShape, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor) -> None:
    """The gradient with respect to w; see `conv.conv_wgrad`."""
    x, grad_y = (conv_winograd.readable(t, shape.dilation) for t in (x, grad_y))
    result = grad_w
    if result.dtype != torch.float32 or not conv_rows.is_ordered(result.shape, result.stride()):
        result = torch.empty(grad_w.shape)
    straight = conv_winograd.straight(x), conv_winograd.straight(grad_y)
    _plan(shape, KINDS[x.dtype], straight).run(grad_y, x, result)
    if result is not grad_w:
        grad_w.copy_(result)
