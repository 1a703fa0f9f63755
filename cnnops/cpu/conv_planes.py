"""Convolution of one tap with channels in planes: ``y[k, place] = sum_c w[k, c] * x[c, place]``.

A task copies some places of all channels, one panel, and multiplies it by filters that are read where they
lie: `rows.multiply` with filters broadcast and places as vectors. Sums go straight to y, an epilogue passes
over them while they are in the cache. Nothing is turned: this order of memory costs no more than the other.

    panel   [C] [vectors of places]     of x, in the type that is computed in
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from cnnops.cpu import rows, simd, vectors
from cnnops.cpu.compiler import routine
from cnnops.cpu.conv_axes import bytes_of, up, zeros
from cnnops.cpu.conv_rows import native_epilogue, vector
from cnnops.cpu.task import (
    Shared,
    Table,
    Task,
    ahead,
    given,
    layout,
    native,
    pointer,
    unpack,
)
from cnnops.epilogue import ACTIVATIONS, Epilogue
from cnnops.shapes import ConvShape

STRETCH = 128
"""Terms that are added up at a time: that much of a panel stays in the first-level cache."""

LEAST = 150
"""Places of a plane from which on vectors along it are worth it: its end may leave lanes without work."""


@routine
def _products(
    L, M, W, w, filters, panel, C, start, y, outs, rest, rest_outs, K, whole, tail, later, xc, line, places
):  # fmt: skip
    """The sums of K filters for a panel of W places: to y, or to `rest` where y has no whole tile of them.

    `tail` are the places of the last M filters' rows, of which the last one may stand several times. From
    `later` on lies the panel that comes next, its channels `xc` apart: a line of each is asked for with every
    tile, until there are no more. A line has `line` elements, in memory `places`.
    """
    taps = filters  # the first one: no steps
    for c in range(0, C, STRETCH):
        for k in range(0, K, M):
            lines, to, there = ahead(filters, k), y, ahead(outs, k)
            if not whole or k + M > K:
                to, there = rest, ahead(rest_outs, k)
            if k + M > K:
                lines = tail
            asked, step = panel, 0
            if k // M * places < W:
                asked, step = ahead(later, c * xc + k // M * line), xc
            rows.multiply(
                L, M, W, ahead(w, c), lines, taps, 1, min(STRETCH, C - c), ahead(panel, c * W),
                start, to, there, W, c, asked, step,
            )  # fmt: skip


@lru_cache(None)
def _correlate(kind: str, L: int, M: int, V: int) -> Task:
    T = "float64" if kind == "float64" else "float32"
    args = layout(f"int64 {T}**4 int64**3 int64*20")
    real, itemsize = np.float64 if T == "float64" else np.float32, bytes_of(T)
    W, W1, W2, W3 = V * L, L, 2 * L, 3 * L
    stored = itemsize if kind == T else 2
    line_of, places_of = simd.LINE // itemsize, simd.LINE // stored

    def conv_planes(address: int, index: int, scratch: int) -> None:
        """One panel of one image, for one share of one group's filters."""
        (
            x_, w, scale, shift, zeros, filters, outs, rest_outs, residual_, y_, activation,
            groups, C, K, places, panels, share, parts, direct, rest_at, line_at, tail_at,
            xn, xc, yn, yk, of_group, of_k,
        ) = unpack(address, args)  # fmt: skip
        part = index % parts
        panel_number = index // parts % panels
        group = index // parts // panels % groups
        n = index // parts // panels // groups
        first = panel_number * V * L
        count = min(V * L, places - first)
        used = (count + L - 1) // L
        width = used * L
        panel = pointer(scratch, T)
        source = ahead(vectors.elements(x_, kind), n * xn + group * C * xc + first)
        for c in range(C):
            vectors.widen(L, kind, ahead(panel, c * width), ahead(source, c * xc), count)

        # The panel that is likely to come next; behind the last one of a plane, any address will do.
        behind = n * xn + group * C * xc + first + V * L
        later = pointer(x_ + behind * stored, T)
        later_step = xc * stored // itemsize
        k0 = part * share
        filters_here = min(share, K - k0)
        origin = n * yn + (group * K + k0) * yk + first
        result = pointer(y_ + origin * itemsize, T)
        rest, line = pointer(scratch + rest_at, T), pointer(scratch + line_at, T)
        weights = ahead(w, group * of_group + k0 * of_k)
        whole = direct != 0 and width == count
        tail = pointer(scratch + tail_at, "int64")
        for m in range(2 * M):
            tail[m] = min((filters_here - 1) // M * M + m, filters_here - 1) * of_k
        if used == V:
            _products(
                L, M, W, weights, filters, panel, C, zeros, result, outs, rest, rest_outs,
                filters_here, whole, tail, later, later_step, line_of, places_of,
            )  # fmt: skip
        elif V == 4 and used == 3:
            _products(
                L, M, W3, weights, filters, panel, C, zeros, result, outs, rest, rest_outs,
                filters_here, whole, tail, later, later_step, line_of, places_of,
            )  # fmt: skip
        elif V == 4 and used == 2:
            _products(
                L, M, W2, weights, filters, panel, C, zeros, result, outs, rest, rest_outs,
                filters_here, whole, tail, later, later_step, line_of, places_of,
            )  # fmt: skip
        else:
            _products(
                L, M, W1, weights, filters, panel, C, zeros, result, outs, rest, rest_outs,
                filters_here, whole, tail, later, later_step, line_of, places_of,
            )  # fmt: skip
        y = ahead(vectors.elements(y_, kind), origin)
        residual = ahead(vectors.elements(residual_, kind), origin)
        for k in range(filters_here):
            straight = whole and k // M * M + M <= filters_here
            if straight and activation < 0:
                continue
            row = ahead(result, k * yk) if straight else ahead(rest, k * V * L)
            channel = group * K + k0 + k
            beside = pointer(0, T)
            if residual_ != 0:
                vectors.widen(L, kind, line, ahead(residual, k * yk), count)
                beside = line
            factor = scale[channel] if given(scale) else real(1)
            simd.finish(L, row, row, beside, count, factor, shift[channel], max(activation, 0), 0)
            if not straight:
                vectors.narrow(L, kind, ahead(y, k * yk), row, count)

    return Task(conv_planes, args)


@lru_cache(None)
def _turn(T: str, L: int) -> Task:
    args = layout(f"{T}**2 int64*3")

    def conv_planes_turn(address: int, index: int, scratch: int) -> None:
        """``to [group] [C] [K] = w [group] [K] [C]``, `L` filters an index."""
        w, to, K, C, blocks = unpack(address, args)
        group, k = index // blocks, index % blocks * L
        rows.turn(
            L, T, False, ahead(to, group * C * K + k), K, ahead(w, (group * K + k) * C), C, min(L, K - k), C
        )  # fmt: skip

    return Task(conv_planes_turn, args)


class _Plan:
    """All that does not change from call to call, for one group's C channels and K results."""

    def __init__(
        self, kind: str, shape: ConvShape, C: int, K: int, direct: bool, threads: int
    ) -> None:
        T = "float64" if kind == "float64" else "float32"
        lanes, itemsize = simd.lanes(T), bytes_of(T)
        M, V = rows.ROWS, rows.vectors_a_tile()
        places, full = math.prod(shape.spatial), V * lanes
        panels = -(-places // full)
        tasks = shape.N * shape.groups * panels
        parts = min(max(1, -(-4 * threads // tasks)), -(-K // (4 * M)))
        share = up(-(-K // parts), M)
        parts = -(-K // share)
        rest_at = up((C * full + lanes) * itemsize, 64)
        line_at = up(rest_at + (up(share, M) * full + lanes) * itemsize, 64)
        tail_at = up(line_at + (full + lanes) * itemsize, 64)
        self._scratch_bytes = tail_at + 2 * M * 8
        self._count = tasks * parts
        self._work = tasks * (C * 4 * V + up(K, M) * (C + 10) * V)
        self._kind, self._M, self._V, self._share = kind, M, V, share
        self._filters = np.arange(up(share, M) + M, dtype=np.int64)
        self._rest_outs = Table(np.arange(up(share, M), dtype=np.int64) * full)
        self._zeros = torch.zeros(full, dtype=torch.float64 if T == "float64" else torch.float32)
        self._channels = shape.groups * K
        self._task = _correlate(kind, lanes, M, V)
        self._values = (
            shape.groups, C, K, places, panels, share, parts, direct, rest_at, line_at, tail_at,
        )  # fmt: skip
        self._tables: dict[tuple[int, int], tuple[Table, Table]] = {}

    def _strided(self, of_k: int, yk: int) -> tuple[Table, Table]:
        """Where each filter of a share begins, and each one's results."""
        found = self._tables.get((of_k, yk))
        if found is None:
            found = Table(self._filters * of_k), Table(self._filters * yk)
            self._tables[of_k, yk] = found
        return found

    def run(
        self, x: torch.Tensor, w: torch.Tensor | Shared, bias: torch.Tensor | None, y: torch.Tensor,
        of_group: int, of_k: int, epilogue: Epilogue | None,
    ) -> None:  # fmt: skip
        scale = residual = None
        activation = -1
        if epilogue is not None:
            scale, residual = epilogue.scale, epilogue.residual
            activation = ACTIVATIONS.index(epilogue.activation)
        elif bias is not None:
            activation = 0
        shift = zeros(self._channels, self._zeros.dtype) if bias is None else bias
        filters, outs = self._strided(of_k, y.stride(1))
        self._task.run(
            self._count, self._work,
            x, w, scale, shift, self._zeros, filters, outs, self._rest_outs, residual, y, activation,
            *self._values,
            x.stride(0), x.stride(1), y.stride(0), y.stride(1), of_group, of_k,
            scratch_bytes=self._scratch_bytes,
        )  # fmt: skip


_plan = lru_cache(512)(_Plan)


# ---- operations -------------------------------------------------------------------------------------------


def takes(shape: ConvShape, *activations: tuple[int, ...]) -> bool:
    """Whether the problem has one tap, and these strides planes, for this form to be worth it."""

    def flat(strides: tuple[int, ...]) -> bool:
        expected = 1
        for size, stride in zip(reversed(shape.spatial), reversed(strides[2:]), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True

    return (
        math.prod(shape.kernel) == 1
        and max(shape.stride) == 1
        and not any(p for pair in shape.padding for p in pair)
        and math.prod(shape.spatial) >= LEAST
        and min(shape.C, shape.K) // shape.groups >= 4
        and all(map(flat, activations))
    )


def fprop(
    shape: ConvShape,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """``y = x * w + bias``; see `conv.conv_fprop`."""
    w = native(w).contiguous()
    C, K = shape.C // shape.groups, shape.K // shape.groups
    direct = y.dtype == w.dtype
    plan = _plan(vectors.KIND[x.dtype], shape, C, K, direct, torch.get_num_threads())
    plan.run(x, w, vector(bias), y, K * C, C, native_epilogue(epilogue, y))


def dgrad(
    shape: ConvShape,
    grad_y: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    grad_x: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """The gradient with respect to x; see `conv.conv_dgrad`."""
    w = native(w).contiguous()
    C, K = shape.C // shape.groups, shape.K // shape.groups
    T = "float64" if w.dtype == torch.float64 else "float32"
    lanes = simd.lanes(T)
    turned = Shared(w.nbytes)
    blocks = -(-K // lanes)
    _turn(T, lanes).run(shape.groups * blocks, 1.0 * w.numel(), w, turned, K, C, blocks)
    direct = grad_x.dtype == w.dtype
    plan = _plan(vectors.KIND[grad_y.dtype], shape, K, C, direct, torch.get_num_threads())
    plan.run(grad_y, turned, vector(bias), grad_x, K * C, K, native_epilogue(epilogue, grad_x))
