"""Convolution on the CPU: forward, both gradients and the bias's, for one to three axes.

Forward and input gradient are one computation, a correlation ``y[k, o] = sum_{c,t} w[k, c, t] * x[c, o * step
+ tap[t]]``; the input gradient of stride s is s correlations an axis, one for each residue of the place it
writes, each with the taps that reach it: nothing is multiplied by inserted zeros. A task copies one block of
x into scratch, padded, and multiplies it there against packed weights:

    block   [C] [phase] [Z] [H] [W] [images]      phase: places of one residue modulo the step, so that
                                                  neighbouring outputs read neighbouring elements

A tap then is one offset into the block, and `simd.gemm` runs along consecutive elements: places of a row,
images side by side (the innermost axis, for maps too small to fill vectors) or, where that computes less in
total, whole rows with the padding between them. `_correlation` weighs these and picks. The weight gradient
copies x the same way and takes sums along rows with `simd.dot`; it splits the sum by the shape alone and adds
the parts in order, so its bits do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from cnnops.cpu import simd
from cnnops.cpu.simd import sum_of
from cnnops.cpu.task import (
    NAME, Task, ahead, collapse, layout, native, native_result, pointer, strides, unpack,
)  # fmt: skip
from cnnops.shapes import ConvShape

CACHE_BYTES = 512 * 1024
"""What a task's scratch should fit into: a core's second-level cache."""

SPLITS = 32
PARTIAL_BYTES = 32 * 1024 * 1024
"""The weight gradient's sum is split into at most SPLITS parts, of at most PARTIAL_BYTES together."""

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def supports(op: str, shape: object, dtype: torch.dtype) -> str | None:
    """None where `op` takes the problem, or the reason why it does not."""
    return None if dtype in _DTYPES else f"dtype {dtype} is not a floating-point type of 16 to 64 bits"


# ---- kernels ----------------------------------------------------------------------------------------------


@njit(error_model="numpy", boundscheck=False)
def _range(first, step, size, count):  # type: ignore[no-untyped-def]
    """The i in ``0 … count`` with ``0 <= first + i * step < size``, as start and stop."""
    start = min(max((step - 1 - first) // step, 0), count)
    return start, max(min((size - first + step - 1) // step, count), start)


@njit(error_model="numpy", boundscheck=False)
def _copy_block(L, x, block, residues, C, F, Z, H, W, I, images, d0, h0, w0, sd, sh, sw, sizes, strides):  # type: ignore[no-untyped-def]
    """Fill ``block [C] [F] [Z] [H] [W] [I]`` from the images at `x`, with zeros for what lies outside."""
    size_d, size_h, size_w = sizes
    xn, xc, xd, xh, xw = strides
    plane = F * Z * H * W * I
    for j in range(C * plane):
        block[j] = 0
    neutral = -block[0]  # -0: adding it changes nothing
    # Some channels at a time: one image is read in order, and the lines that images share stay close by.
    for c0 in range(0, C, 16):
        for i in range(images):
            for c in range(c0, min(c0 + 16, C)):
                source = ahead(x, i * xn + c * xc)
                for f in range(F):
                    d, h, w = d0 + residues[3 * f], h0 + residues[3 * f + 1], w0 + residues[3 * f + 2]
                    start_z, stop_z = _range(d, sd, size_d, Z)
                    start_r, stop_r = _range(h, sh, size_h, H)
                    start, stop = _range(w, sw, size_w, W)
                    for z in range(start_z, stop_z):
                        for r in range(start_r, stop_r):
                            place = ahead(
                                source,
                                (d + z * sd) * xd + (h + r * sh) * xh + (w + start * sw) * xw,
                            )
                            to = ahead(block, c * plane + (((f * Z + z) * H + r) * W + start) * I + i)
                            step = sw * xw
                            if I == 1 and step == 1:
                                simd.copy(L, to, place, stop - start, neutral)
                            else:
                                for j in range(stop - start):
                                    to[j * I] = place[j * step]


@lru_cache(None)
def _pack(T: str) -> Task:
    args = layout(f"{T}**2 int32* int64*7")

    def conv_pack(address: int, index: int, scratch: int) -> None:
        """Filters to ``[group] [block of M] [C, tap] [M]``, zero behind the last filter; one block an index."""
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


@lru_cache(None)
def _correlate(T: str, L: int, M: int, V: int) -> Task:
    args = layout(f"{T}**4 int32**2 int64*45")
    half = V // 2

    def conv_correlate(address: int, index: int, scratch: int) -> None:
        """One block of outputs, for one share of one group's filters."""
        (
            x, w, bias, y, offsets, residues,
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
        sums = pointer(scratch + sums_at, T)
        source = ahead(x, n0 * xn + group * C * xc)
        _copy_block(
            L, source, block, residues, C, F, Zb, Hb, Wb, Bi, images,
            z0 * sd + low_d, p0 * sh + low_h, q0 * sw + low_w, sd, sh, sw,
            (D, H, W), (xn, xc, xd, xh, xw),
        )  # fmt: skip

        row = Wb * Bi
        pitch = Bd * column_z
        blocks_k = (K + M - 1) // M
        packed = ahead(w, group * blocks_k * J * M)
        last = blocks_k * (part + 1) // parts
        for first in range(blocks_k * part // parts, last, parts_step):
            behind = min(first + parts_step, last)
            # A stretch of the filters stays in the first-level cache while the tiles pass it.
            for j in range(0, J, j_step):
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
            for k in range(first * M, min(behind * M, K)):
                shift = bias[group * K + k]
                for i in range(images):
                    for z in range(zs):
                        for p in range(ps):
                            line = ahead(sums, (k - first * M) * pitch + z * column_z + p * column_p + i)
                            to = ahead(
                                y,
                                (n0 + i) * yn + (group * K + k) * yk
                                + (z0 + z) * yd + (p0 + p) * yh + q0 * yw,
                            )  # fmt: skip
                            if Bi == 1 and yw == 1:
                                simd.copy(L, to, line, qs, shift)
                            else:
                                for q in range(qs):
                                    to[q * yw] = line[q * Bi] + shift

    return Task(conv_correlate, args)


@lru_cache(None)
def _weights(T: str, L: int, M: int, V: int) -> Task:
    args = layout(f"{T}**3 int32**2 int64*43")

    def conv_weights(address: int, index: int, scratch: int) -> None:
        """One share of the places, for one share of one group's filters and channels: ``sums [K] [C, tap]``."""
        (
            x, grad_y, sums, offsets, residues,
            N, groups, C, K, T_, F, splits, parts_k, parts_c,
            Bi, Bd, Bh, Bw, blocks_n, blocks_d, blocks_h, blocks_w, Zb, Hb, Wb, lines_at,
            Z, P, Q, sd, sh, sw, low_d, low_h, low_w, D, H, W,
            xn, xc, xd, xh, xw, yn, yk, yd, yh, yw,
        ) = unpack(address, args)  # fmt: skip
        most_k, most_c = (K + parts_k - 1) // parts_k, (C + parts_c - 1) // parts_c
        rows, columns = (most_k + M - 1) // M * M, (most_c * T_ + V - 1) // V * V
        sums = ahead(sums, index * rows * columns)
        for j in range(rows * columns):
            sums[j] = 0
        neutral = -sums[0]  # -0: adding it changes nothing
        c0 = index % parts_c * most_c
        rest = index // parts_c
        k0 = rest % parts_k * most_k
        rest //= parts_k
        group = rest % groups
        split = rest // groups
        channels, filters = min(most_c, C - c0), min(most_k, K - k0)
        if channels <= 0 or filters <= 0:
            return

        block = pointer(scratch, T)
        lines = pointer(scratch + lines_at, T)
        line, row, stack = Bw * Bi, Wb * Bi, Bd * Bh * Bw * Bi
        blocks = blocks_n * blocks_d * blocks_h * blocks_w
        for number in range(split * blocks // splits, (split + 1) * blocks // splits):
            q0 = number % blocks_w * Bw
            rest = number // blocks_w
            p0 = rest % blocks_h * Bh
            rest //= blocks_h
            z0 = rest % blocks_d * Bd
            n0 = rest // blocks_d * Bi
            images = min(Bi, N - n0)
            zs, ps, qs = min(Bd, Z - z0), min(Bh, P - p0), min(Bw, Q - q0)
            _copy_block(
                L, ahead(x, n0 * xn + (group * C + c0) * xc), block, residues, channels, F, Zb, Hb, Wb,
                Bi, images, z0 * sd + low_d, p0 * sh + low_h, q0 * sw + low_w, sd, sh, sw,
                (D, H, W), (xn, xc, xd, xh, xw),
            )  # fmt: skip
            if images < Bi:
                for j in range(filters * stack):
                    lines[j] = 0
            for k in range(filters):
                for i in range(images):
                    for z in range(zs):
                        for p in range(ps):
                            to = ahead(lines, k * stack + (z * Bh + p) * line + i)
                            source = ahead(
                                grad_y,
                                (n0 + i) * yn + (group * K + k0 + k) * yk
                                + (z0 + z) * yd + (p0 + p) * yh + q0 * yw,
                            )  # fmt: skip
                            if Bi == 1 and yw == 1:
                                simd.copy(L, to, source, qs, neutral)
                            else:
                                for q in range(qs):
                                    to[q * Bi] = source[q * yw]
            # Rows without padding between them are one long row.
            segments, length = ps, qs * Bi
            if line == row and qs == Bw:
                segments, length = 1, ps * line
            for k in range(0, filters, M):
                for j in range(0, channels * T_, V):
                    for z in range(zs):
                        simd.dot(
                            L, M, V, ahead(lines, k * stack + z * Bh * line), stack, line,
                            ahead(block, z * Hb * row), ahead(offsets, j), row, segments, length,
                            ahead(sums, k * columns + j), columns,
                        )  # fmt: skip

    return Task(conv_weights, args)


@lru_cache(None)
def _add_splits(T: str) -> Task:
    args = layout(f"{T}**2 int64*10")

    def conv_add_splits(address: int, index: int, scratch: int) -> None:
        """The weight gradient of filter `index`: the splits' sums, added in their order."""
        sums, grad_w, groups, K, C, T_, splits, parts_k, parts_c, rows, columns, size = unpack(address, args)
        most_k, most_c = (K + parts_k - 1) // parts_k, (C + parts_c - 1) // parts_c
        group, k = index // K, index % K
        for part in range(parts_c):
            to = ahead(grad_w, (index * C + part * most_c) * T_)
            count = min(most_c, C - part * most_c) * T_
            for split in range(splits):
                task = ((split * groups + group) * parts_k + k // most_k) * parts_c + part
                line = ahead(sums, task * size + k % most_k * columns)
                if split == 0:
                    for j in range(count):
                        to[j] = line[j]
                else:
                    for j in range(count):
                        to[j] += line[j]

    return Task(conv_add_splits, args)


@lru_cache(None)
def _bias(T: str) -> Task:
    args = layout(f"{T}**2 int64*9")

    def conv_bias(address: int, index: int, scratch: int) -> None:
        """The sum of channel `index`, in float64 whatever the type."""
        grad_y, grad_bias, of_k, A, a, B, b, D, d, E, e = unpack(address, args)
        plane = ahead(grad_y, index * of_k)
        total = 0.0
        for i in range(A):
            for j in range(B):
                for k in range(D):
                    total += sum_of(ahead(plane, i * a + j * b + k * d), E, e)
        grad_bias[index] = total

    return Task(conv_bias, args)


# ---- plans ------------------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """One axis of a correlation: ``out`` outputs; output o reads ``size`` inputs at ``o * step + tap`` for each
    of `taps`, multiplies by the filter's places `picks`, and lands at ``start + o * stride``."""

    out: int
    step: int
    taps: tuple[int, ...]
    picks: tuple[int, ...]
    size: int
    start: int = 0
    stride: int = 1


def _axes(shape: ConvShape) -> list[_Axis]:
    """The forward pass's three axes."""
    missing = 3 - shape.dims
    stride, dilation = (1,) * missing + shape.stride, (1,) * missing + shape.dilation
    padding = ((0, 0),) * missing + shape.padding
    return [
        _Axis(shape.ZPQ[a], stride[a], taps, tuple(range(shape.TRS[a])), shape.DHW[a])
        for a in range(3)
        for taps in [tuple(r * dilation[a] - padding[a][0] for r in range(shape.TRS[a]))]
    ]


def _transposed(axis: _Axis) -> Iterator[_Axis]:
    """The input gradient along `axis`: inputs of one residue of ``h - tap`` modulo the step, at a time."""
    for start in range(min(axis.step, axis.size)):
        reached = [(r, t) for r, t in zip(axis.picks, axis.taps, strict=True) if (start - t) % axis.step == 0]
        yield _Axis(
            out=-(-(axis.size - start) // axis.step),
            step=1,
            taps=tuple((start - t) // axis.step for _, t in reached),
            picks=tuple(r for r, _ in reached),
            size=axis.out,
            start=start,
            stride=axis.step,
        )


class _Window:
    """How the taps of an axis lie in a block: its `phases` (residues), and each tap's phase and shift."""

    def __init__(self, axis: _Axis) -> None:
        self.low = min(axis.taps)
        beyond = [t - self.low for t in axis.taps]
        self.phases = sorted({t % axis.step for t in beyond})
        self.taps = [(self.phases.index(t % axis.step), t // axis.step) for t in beyond]
        self.reach = max(t // axis.step for t in beyond)


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
        """An estimate of copying `sizes` of one channel's images in or out: each stretch of memory starts with
        a wait; neighbours move as vectors, but one by one where images or phases come between them."""
        each = 0.4 if self.images * phases == 1 else 1.6
        return self.images * sizes[0] * (250 + sizes[1] * (15 + each * sizes[2] * phases))

    def count(self, N: int, axes: Sequence[_Axis]) -> list[int]:
        """Blocks along images and along each axis."""
        return [-(-N // self.images), *(-(-a.out // o) for a, o in zip(axes, self.outputs, strict=True))]


def _blocks(N: int, axes: Sequence[_Axis], windows: Sequence[_Window]) -> Iterator[_Block]:
    """Blocks worth weighing: some images side by side, and whole axes or even cuts of them."""
    phases = math.prod(len(w.phases) for w in windows)
    images = {min(N, 2**e) for e in range(7)}
    cuts = [sorted({-(-axis.out // 2**e) for e in range(axis.out.bit_length())}) for axis in axes]
    for I, z, p, q in product(sorted(images), {1, axes[0].out}, cuts[1], cuts[2]):
        if q < min(axes[2].out, 128):
            continue
        outputs = (z, p, q)
        inputs = tuple(o + w.reach for o, w in zip(outputs, windows, strict=True))
        yield _Block(I, outputs, inputs, phases)  # type: ignore[arg-type]


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
    offsets = np.arange(C)[:, None] * block.elements + np.array(taps) * block.images
    padded = np.zeros(-(-offsets.size // multiple) * multiple, np.int32)
    padded[: offsets.size] = offsets.ravel()
    return padded, np.array(list(product(d.phases, h.phases, w.phases)), np.int32)


def _slower(room: int) -> float:
    """What is left of a kernel's speed when its scratch of so many bytes comes from the shared cache."""
    return 1.0 if room <= CACHE_BYTES else 1.3 * max(1.0, room / (8 * CACHE_BYTES))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _Correlation:
    """A correlation's plan: block, tile and tables, and the arguments of its task that do not change."""

    def __init__(
        self, T: str, N: int, groups: int, C: int, K: int, axes: Sequence[_Axis], threads: int
    ) -> None:
        lanes, itemsize = simd.lanes(T), 4 if T == "float32" else 8
        M, V = simd.tiles().gemm
        # One row of accumulators runs at some 0.6 of the speed, and wastes no rows.
        if K < 0.6 * _up(K, M):
            M, V = simd.tiles().gemm_thin
        windows = [_Window(axis) for axis in axes]
        J = C * math.prod(len(axis.taps) for axis in axes)
        blocks_k = -(-K // M)
        tile = V * lanes
        j_step = max(1, 24 * 1024 // (M * itemsize))

        best = math.inf
        for block in _blocks(N, axes, windows):
            z, p, q = block.outputs
            row = block.inputs[2] * block.images
            # Rows joined into one run, or each a run of its own.
            for joined in (True, False):
                run_rows = p if joined else 1
                run = (run_rows - 1) * row + q * block.images
                length = _up(run, tile)
                column_p = row if joined else length
                column_z = length if joined else p * length
                pitch = z * column_z
                blocks = math.prod(block.count(N, axes)) * groups
                vectors = run // tile * V
                if run % tile:
                    vectors += V if run % tile > V // 2 * lanes else V // 2
                runs = z * p // run_rows
                gemms = runs * (J * M * vectors + 40 * -(-run // tile) * -(-J // j_step))
                for parts in {min(blocks_k, e) for e in (1, 2, 3, 4, 6, 8, 16, 32)}:
                    share = -(-blocks_k // parts)
                    parts_step = min(share, max(1, CACHE_BYTES // 2 // (M * pitch * itemsize)))
                    room = (C * block.elements + tile + parts_step * M * pitch) * itemsize
                    cycles = (
                        share * gemms * _slower(room)
                        + C * block.copy_cycles(block.inputs, block.phases)
                        + share * M * block.copy_cycles(block.outputs, 1)
                        + share * M * J * itemsize / 8  # the filters come from a shared cache
                        + 500
                    )
                    total = cycles * -(-blocks * parts // threads)
                    if total < best:
                        best = total
                        chosen = block, run_rows, column_z, column_p, parts, parts_step
        block, run_rows, column_z, column_p, parts, parts_step = chosen
        blocks_n, *blocks_zpq = block.count(N, axes)
        sums_at = _up((C * block.elements + tile) * itemsize, 64)
        self._offsets, self._residues = _tables(block, C, windows, 1)
        self.task = _correlate(T, lanes, M, V)
        self.count = blocks_n * math.prod(blocks_zpq) * groups * parts
        self.work = best * min(threads, self.count)
        self.scratch = sums_at + parts_step * M * block.outputs[0] * column_z * itemsize
        self.tables = self._offsets.ctypes.data, self._residues.ctypes.data
        self.values = (
            N, groups, C, K, J, block.phases, parts, parts_step, j_step,
            block.images, *block.outputs, *blocks_zpq, *block.inputs, run_rows, column_z, column_p, sums_at,
            *(axis.out for axis in axes), *(axis.step for axis in axes), *(w.low for w in windows),
            *(axis.size for axis in axes),
        )  # fmt: skip
        self._axes = axes
        self._pack = _pack(T)
        self._packed = groups, blocks_k, M, K, C
        self.packed_size = groups * blocks_k * M * J
        taps = [axis.picks for axis in axes]
        self._dtype = torch.float32 if T == "float32" else torch.float64
        self._picks = taps

    def bind(self, kernel: tuple[int, int, int], of_group: int, of_k: int, of_c: int) -> _Correlation:
        """State how a contiguous weight of spatial size `kernel` is indexed; returns the plan."""
        _, R, S = kernel
        t, r, s = self._picks
        self._taps = np.array([(a * R + b) * S + c for a, b, c in product(t, r, s)], np.int32)
        groups, blocks_k, M, K, C = self._packed
        self._pack_values = (K, C, self._taps.size, M, of_group, of_k, of_c)
        self._pack_count = groups * blocks_k
        return self

    def run(self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, y: torch.Tensor) -> None:
        packed = torch.empty(self.packed_size, dtype=self._dtype)
        self._pack.run(
            self._pack_count, 2.0 * self.packed_size,
            w.data_ptr(), packed.data_ptr(), self._taps.ctypes.data, *self._pack_values,
        )  # fmt: skip
        n, k, *places = strides(y)
        start = sum(axis.start * stride for axis, stride in zip(self._axes, places, strict=True))
        self.task.run(
            self.count, self.work,
            x.data_ptr(), packed.data_ptr(), bias.data_ptr(), y.data_ptr() + start * y.element_size(),
            *self.tables, *self.values, *strides(x),
            n, k, *(axis.stride * stride for axis, stride in zip(self._axes, places, strict=True)),
            scratch_bytes=self.scratch,
        )  # fmt: skip


@lru_cache(512)
def _fprop(shape: ConvShape, T: str, threads: int) -> _Correlation:
    C, K, taps = shape.C // shape.groups, shape.K // shape.groups, math.prod(shape.TRS)
    plan = _Correlation(T, shape.N, shape.groups, C, K, _axes(shape), threads)
    return plan.bind(shape.TRS, of_group=K * C * taps, of_k=C * taps, of_c=taps)


@lru_cache(512)
def _dgrad(shape: ConvShape, T: str, threads: int) -> tuple[list[_Correlation], bool]:
    """The correlations that make up the input gradient, and whether they write all of it."""
    C, K, taps = shape.C // shape.groups, shape.K // shape.groups, math.prod(shape.TRS)
    parts = [axes for axes in product(*map(_transposed, _axes(shape)))]
    reached = [axes for axes in parts if all(axis.taps for axis in axes)]
    plans = [_Correlation(T, shape.N, shape.groups, K, C, axes, threads) for axes in reached]
    for plan in plans:
        plan.bind(shape.TRS, of_group=K * C * taps, of_k=taps, of_c=C * taps)
    return plans, len(reached) == len(parts)


class _Gradient:
    """The weight gradient's plan. It depends on the shape alone, never on the number of threads."""

    def __init__(self, shape: ConvShape, T: str) -> None:
        lanes, itemsize = simd.lanes(T), 4 if T == "float32" else 8
        N, groups = shape.N, shape.groups
        C, K, taps = shape.C // groups, shape.K // groups, math.prod(shape.TRS)
        axes = _axes(shape)
        windows = [_Window(axis) for axis in axes]
        M, V = simd.tiles().dot if K > 1 else simd.tiles().dot_thin

        best = math.inf
        for block in _blocks(N, axes, windows):
            z, p, q = block.outputs
            blocks = math.prod(block.count(N, axes))
            joined = block.inputs[2] == q
            segments, length = (z, p * q * block.images) if joined else (z * p, q * block.images)
            one = M * V * (segments * -(-length // lanes) + 12 * z) + 15 * segments + 30
            for parts_k, parts_c in product((1, 2, 4, 8, 16), repeat=2):
                most_k, most_c = -(-K // parts_k), -(-C // parts_c)
                parts = groups * parts_k * parts_c
                if parts > groups and (parts_k > K or parts_c > C or parts > 4 * SPLITS):
                    continue
                rows, columns = _up(most_k, M), _up(most_c * taps, V)
                size = rows * columns
                splits = max(1, min(blocks, SPLITS // parts, PARTIAL_BYTES // (size * parts * itemsize)))
                room = (most_c * block.elements + rows * block.places) * itemsize
                cycles = (
                    (rows // M) * (columns // V) * one * _slower(room)
                    + most_c * block.copy_cycles(block.inputs, block.phases)
                    + most_k * block.copy_cycles(block.outputs, 1)
                    + 500
                ) * -(-blocks // splits) + 2 * size
                # As if for eight threads; small problems for fewer, which need fewer splits.
                threads = min(8, max(1, int(cycles * parts * splits / 50_000)))
                total = cycles * -(-parts * splits // threads)
                if total < best:
                    best = total
                    chosen = block, parts_k, parts_c, splits, rows, columns
                    self._work = cycles * parts * splits
        block, parts_k, parts_c, splits, rows, columns = chosen
        self._offsets, self._residues = _tables(block, -(-C // parts_c), windows, V)
        lines_at = _up((-(-C // parts_c) * block.elements + lanes) * itemsize, 64)
        self._scratch = lines_at + (rows * block.places + lanes) * itemsize
        self._task = _weights(T, lanes, M, V)
        self._count = splits * groups * parts_k * parts_c
        self._tables = self._offsets.ctypes.data, self._residues.ctypes.data
        self._values = (
            N, groups, C, K, taps, block.phases, splits, parts_k, parts_c,
            block.images, *block.outputs, *block.count(N, axes), *block.inputs, lines_at,
            *(axis.out for axis in axes), *(axis.step for axis in axes), *(w.low for w in windows),
            *(axis.size for axis in axes),
        )  # fmt: skip
        self._sums = torch.Size([self._count * rows * columns])
        self._add = _add_splits(T)
        self._add_count = groups * K
        self._add_values = (groups, K, C, taps, splits, parts_k, parts_c, rows, columns, rows * columns)
        self._dtype = torch.float32 if T == "float32" else torch.float64

    def run(self, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor) -> None:
        sums = torch.empty(self._sums, dtype=self._dtype)
        self._task.run(
            self._count, self._work,
            x.data_ptr(), grad_y.data_ptr(), sums.data_ptr(), *self._tables, *self._values,
            *strides(x), *strides(grad_y),
            scratch_bytes=self._scratch,
        )  # fmt: skip
        self._add.run(
            self._add_count, sums.numel(), sums.data_ptr(), grad_w.data_ptr(), *self._add_values
        )


_wgrad = lru_cache(512)(_Gradient)


def _is_dense(shape: ConvShape) -> bool:
    """Whether each image has one output, which sees exactly all of it: a dense layer."""
    return (
        shape.spatial == shape.kernel
        and shape.groups == 1
        and set(shape.dilation) == {1}
        and not any(a or b for a, b in shape.padding)
    )


def _dense(shape: ConvShape) -> ConvShape:
    """A dense layer as a 1-place convolution along a row of N: one long row serves vectors better."""
    return ConvShape(
        1, shape.C * math.prod(shape.kernel), shape.K, (shape.N,), (1,), (1,), ((0, 0),), (1,)
    )


def _row(t: torch.Tensor) -> torch.Tensor:
    """``N ...`` seen as ``1 (...) N``."""
    return t.reshape(t.shape[0], -1).t().unsqueeze(0)


# ---- operations -------------------------------------------------------------------------------------------


def conv_fprop(
    shape: ConvShape, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """``y = x * w + bias``: x ``N C *spatial`` and w ``K C/groups *kernel`` with any strides."""
    x, w = native(x), native(w).contiguous()
    bias = torch.zeros(shape.K, dtype=x.dtype) if bias is None else native(bias).contiguous()
    dense = _is_dense(shape)
    result = native_result(y, x.dtype, contiguous=dense)
    view = result
    if dense:
        shape, x, view = _dense(shape), _row(x), _row(result)
    _fprop(shape, NAME[x.dtype], torch.get_num_threads()).run(x, w, bias, view)
    if result is not y:
        y.copy_(result)


def conv_dgrad(shape: ConvShape, grad_y: torch.Tensor, w: torch.Tensor, grad_x: torch.Tensor) -> None:
    """The gradient with respect to x."""
    grad_y, w = native(grad_y), native(w).contiguous()
    dense = _is_dense(shape)
    result = native_result(grad_x, grad_y.dtype, contiguous=dense)
    view = result
    if dense:
        shape, grad_y, view = _dense(shape), _row(grad_y), _row(result)
    plans, everywhere = _dgrad(shape, NAME[grad_y.dtype], torch.get_num_threads())
    if not everywhere:
        view.zero_()
    no_bias = torch.zeros(shape.C, dtype=grad_y.dtype)
    for plan in plans:
        plan.run(grad_y, w, no_bias, view)
    if result is not grad_x:
        grad_x.copy_(result)


def conv_wgrad(shape: ConvShape, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor) -> None:
    """The gradient with respect to w: the same bits for any number of threads."""
    grad_y, x = native(grad_y), native(x)
    result = native_result(grad_w, x.dtype, contiguous=True)
    if _is_dense(shape):
        shape, grad_y, x = _dense(shape), _row(grad_y), _row(x)
    _wgrad(shape, NAME[x.dtype]).run(grad_y, x, result)
    if result is not grad_w:
        grad_w.copy_(result)


def conv_bgrad(shape: ConvShape, grad_y: torch.Tensor, grad_bias: torch.Tensor) -> None:
    """The gradient with respect to the bias: grad_y's sum over everything but its channels."""
    grad_y = native(grad_y)
    result = native_result(grad_bias, grad_y.dtype, contiguous=True)
    n, k, *places = strides(grad_y)
    loops = collapse((shape.N, *shape.ZPQ), (n, *places))
    _bias(NAME[grad_y.dtype]).run(
        shape.K, grad_y.numel(), grad_y.data_ptr(), result.data_ptr(), k,
        *(v for pair in zip(*loops, strict=True) for v in pair),
    )  # fmt: skip
    if result is not grad_bias:
        grad_bias.copy_(result)
