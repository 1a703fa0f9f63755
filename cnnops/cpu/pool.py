"""Max and average pooling and max unpooling on the CPU, for one to three axes, by PyTorch's rules.

Max: a later place of the window wins only if it is larger, or NaN; so the first maximum wins ties, and a
window of -inf keeps its first place inside the input. A kept place is its number in the window, row by row;
in an adaptive one as if it had the largest window's rows.
Average: the sum in the window's order, then one division.
Unpooling: zeros, then the values row by row, so that the last one of a place stays.

A task does some channels of one image, each from its first element to its last, so that whatever windows
share is added in one order. A row of outputs is done at once, window place by window place, in loops that
LLVM turns into vectors: along the row, or, in channels-last memory, along its channels, which then are the
innermost axis of everything (`inner` is their number, 1 otherwise). Average and adaptive windows come from
tables of (start, stop, extent) along each axis.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numba import njit

from cnnops.cpu import simd
from cnnops.cpu.simd import sum_of
from cnnops.cpu.task import (
    NAME,
    Task,
    ahead,
    inside,
    layout,
    native,
    native_result,
    pointer,
    strides,
    unpack,
)
from cnnops.cpu.task import (
    supports as supports,
)
from cnnops.shapes import PoolShape, UnpoolShape

# ---- kernels ----------------------------------------------------------------------------------------------


@njit(error_model="numpy", boundscheck=False)
def _first(start, step):
    """The first place of a window at `start`, with places `step` apart, that is not before the input."""
    return 0 if start >= 0 else (step - 1 - start) // step


@njit(error_model="numpy", boundscheck=False)
def _keep_larger(L, best, kept, row, step, start, stop, place, inner):
    """Let `place` of the windows ``start … stop`` win where its value, `step` apart in `row`, is larger."""
    if inner > 1:
        for q in range(start, stop):
            simd.keep_larger(
                L,
                1,
                ahead(best, q * inner),
                ahead(kept, q * inner),
                ahead(row, q * step),
                inner,
                place,
            )
    elif step == 1:
        simd.keep_larger(
            L, 1, ahead(best, start), ahead(kept, start), ahead(row, start), stop - start, place
        )
    elif step == 2:
        simd.keep_larger(
            L, 2, ahead(best, start), ahead(kept, start), ahead(row, 2 * start), stop - start, place
        )
    else:
        for q in range(start, stop):
            v = row[q * step]
            if v > best[q] or v != v:
                best[q] = v
                kept[q] = place


@njit(error_model="numpy", boundscheck=False)
def _add(to, to_step, row, step, start, stop, inner):
    """``to[q * to_step] += row[q * step]`` for q in ``start … stop``, and the same for `inner` neighbours."""
    if inner > 1:
        for q in range(start, stop):
            t, r = ahead(to, q * to_step), ahead(row, q * step)
            for i in range(inner):
                t[i] += r[i]
    elif to_step == 1 and step == 1:
        for q in range(start, stop):
            to[q] += row[q]
    elif to_step == 1 and step == 2:
        for q in range(start, stop):
            to[q] += row[2 * q]
    elif to_step == 2 and step == 1:
        for q in range(start, stop):
            to[2 * q] += row[q]
    else:
        for q in range(start, stop):
            to[q * to_step] += row[q * step]


@njit(error_model="numpy", boundscheck=False)
def _put(to, to_step, row, step, count, inner):
    """``to[q * to_step] = row[q * step]`` for q < count, and the same for `inner` neighbours."""
    if to_step == inner and step == inner:
        for q in range(count * inner):
            to[q] = row[q]
    else:
        for q in range(count):
            for i in range(inner):
                to[q * to_step + i] = row[q * step + i]


@njit(error_model="numpy", boundscheck=False)
def _clear(image, D, H, W, d, h, w, inner):
    """Zero for `inner` channels of an image with strides d, h and w."""
    if w == inner and (h == W * w or H == 1) and (d == H * W * w or D == 1):
        for i in range(D * H * W * w):
            image[i] = 0
        return
    for z in range(D):
        for r in range(H):
            for q in range(W):
                for i in range(inner):
                    image[z * d + r * h + q * w + i] = 0


@lru_cache(None)
def _max_fwd(T: str, kept_type: str, L: int) -> Task:
    args = layout(f"{T}**2 {kept_type}* int64*36")

    def max_pool_fwd(address: int, index: int, scratch: int) -> None:
        (
            x, y, offsets, C, each, together, D, H, W, Z, P, Q, T_, R, S, sd, sh, sw, pd, ph, pw, rd, rh, rw,
            xn, xc, xd, xh, xw, yn, yc, yd, yh, yw, on, oc, od, oh, ow,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, first = index // shares, index % shares * each
        behind = min(first + each, C)
        inner = behind - first if together else 1
        best = pointer(scratch, T)
        kept = pointer(scratch + 8 * (Q * inner + L), "int32")
        for c in range(first, behind, inner):
            for z in range(Z):
                for p in range(P):
                    d, h = z * sd - pd, p * sh - ph
                    first_t, first_r = _first(d, rd), _first(h, rh)
                    corner = (first_t * R + first_r) * S
                    for q in range(Q * inner):
                        best[q] = -np.inf
                        kept[q] = corner
                    for q in range(min((pw + sw - 1) // sw, Q)):
                        for i in range(inner):
                            kept[q * inner + i] = corner + _first(q * sw - pw, rw)
                    for t in range(first_t, T_):
                        for r in range(first_r, R):
                            if d + t * rd >= D or h + r * rh >= H:
                                break
                            row = ahead(x, n * xn + c * xc + (d + t * rd) * xd + (h + r * rh) * xh)
                            for s in range(S):
                                w = s * rw - pw
                                start, stop = inside(w, sw, W, Q)
                                _keep_larger(
                                    L, best, kept, ahead(row, w * xw), sw * xw, start, stop,
                                    (t * R + r) * S + s, inner,
                                )  # fmt: skip
                    _put(ahead(y, n * yn + c * yc + z * yd + p * yh), yw, best, inner, Q, inner)
                    _put(
                        ahead(offsets, n * on + c * oc + z * od + p * oh), ow, kept, inner, Q, inner
                    )

    return Task(max_pool_fwd, args)


@lru_cache(None)
def _adaptive_max_fwd(T: str, kept_type: str, L: int) -> Task:
    args = layout(f"{T}**2 {kept_type}* int32**3 int64*26")

    def adaptive_max_pool_fwd(address: int, index: int, scratch: int) -> None:
        (
            x, y, offsets, along_d, along_h, along_w, C, each, together, D, H, W, Z, P, Q, R, S,
            xn, xc, xd, xh, xw, yn, yc, yd, yh, yw, on, oc, od, oh, ow,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, first = index // shares, index % shares * each
        behind = min(first + each, C)
        inner = behind - first if together else 1
        best = pointer(scratch, T)
        kept = pointer(scratch + 8 * (Q * inner + L), "int32")
        for c in range(first, behind, inner):
            for z in range(Z):
                for p in range(P):
                    d0, h0 = along_d[3 * z], along_h[3 * p]
                    for q in range(Q * inner):
                        best[q] = -np.inf
                        kept[q] = 0
                    for d in range(d0, along_d[3 * z + 1]):
                        for h in range(h0, along_h[3 * p + 1]):
                            row = ahead(x, n * xn + c * xc + d * xd + h * xh)
                            corner = ((d - d0) * R + h - h0) * S
                            for q in range(Q):
                                w0, w1 = along_w[3 * q], along_w[3 * q + 1]
                                if inner > 1:
                                    for w in range(w0, w1):
                                        simd.keep_larger(
                                            L, 1, ahead(best, q * inner), ahead(kept, q * inner),
                                            ahead(row, w * xw), inner, corner + w - w0,
                                        )  # fmt: skip
                                    continue
                                largest, place = best[q], kept[q]
                                for w in range(w0, w1):
                                    v = row[w * xw]
                                    if v > largest or v != v:
                                        largest = v
                                        place = corner + w - w0
                                best[q] = largest
                                kept[q] = place
                    _put(ahead(y, n * yn + c * yc + z * yd + p * yh), yw, best, inner, Q, inner)
                    _put(
                        ahead(offsets, n * on + c * oc + z * od + p * oh), ow, kept, inner, Q, inner
                    )

    return Task(adaptive_max_pool_fwd, args)


@njit(error_model="numpy", boundscheck=False)
def _inside(place, d, h, w, D, H, W, R, S, rd, rh, rw):
    """Whether the window at (d, h, w) has its `place` in the input. A window whose dilation passes over the
    whole input has none there; it kept a place all the same."""
    d += place // (R * S) * rd
    h += place // S % R * rh
    w += place % S * rw
    return 0 <= d < D and 0 <= h < H and 0 <= w < W


@lru_cache(None)
def _max_kept(T: str, kept_type: str, backward: bool) -> Task:
    args = layout(f"{T}**2 {kept_type}* int64**3 int64*31")

    def max_pool_kept(address: int, index: int, scratch: int) -> None:
        """``b = a[kept places]``, or (backward) ``a[kept places] += b`` from zero."""
        (
            a, b, offsets, from_d, from_h, from_w, C, each, together, D, H, W, Z, P, Q, T_, R, S, rd, rh, rw,
            an, ac, ad, ah, aw, bn, bc, bd, bh, bw, on, oc, od, oh, ow, wide,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, first = index // shares, index % shares * each
        behind = min(first + each, C)
        inner = behind - first if together else 1
        # Where each place of a window lies, from the window's first, and where windows of a row begin.
        apart = pointer(scratch, "int64")
        for t in range(T_):
            for r in range(R):
                for s in range(S):
                    apart[(t * R + r) * S + s] = t * rd * ad + r * rh * ah + s * rw * aw
        along = ahead(apart, T_ * R * S)
        for q in range(Q):
            along[q] = from_w[q] * aw
        for c in range(first, behind, inner):
            image = ahead(a, n * an + c * ac)
            if backward:
                _clear(image, D, H, W, ad, ah, aw, inner)
            for z in range(Z):
                for p in range(P):
                    d, h = from_d[z], from_h[p]
                    window = ahead(image, d * ad + h * ah)
                    values = ahead(b, n * bn + c * bc + z * bd + p * bh)
                    kept = ahead(offsets, n * on + c * oc + z * od + p * oh)
                    if inner == 1 and not wide:
                        if backward:
                            for q in range(Q):
                                window[along[q] + apart[kept[q * ow]]] += values[q * bw]
                        else:
                            for q in range(Q):
                                values[q * bw] = window[along[q] + apart[kept[q * ow]]]
                        continue
                    for q in range(Q):
                        for i in range(inner):
                            place = np.int64(kept[q * ow + i])
                            at = along[q] + i + apart[place]
                            if wide and not _inside(
                                place, d, h, from_w[q], D, H, W, R, S, rd, rh, rw
                            ):
                                if not backward:
                                    values[q * bw + i] = 0
                            elif backward:
                                window[at] += values[q * bw + i]
                            else:
                                values[q * bw + i] = window[at]

    return Task(max_pool_kept, args)


@njit(error_model="numpy", boundscheck=False)
def _at(place, P, Q, d, h, w):
    """Where the `place` of a plane Z P Q, counted row by row, lies in memory."""
    if (h == Q * w or P == 1) and d == P * h:
        return place * w
    return place // (P * Q) * d + place // Q % P * h + place % Q * w


@lru_cache(None)
def _unpool(T: str, backward: bool) -> Task:
    args = layout(f"{T}**2 int64* int64*24")

    def max_unpool(address: int, index: int, scratch: int) -> None:
        """``y[indices] = x`` from zero, or (backward) ``x = y[indices]``. Indices outside of y count for
        nothing: what calls has refused them, or had no time to look."""
        (
            x, y, indices, C, each, together, D, H, W, Z, P, Q, xn, xc, xd, xh, xw, yn, yc, yd, yh, yw,
            in_, ic, id_, ih, iw,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, first = index // shares, index % shares * each
        behind = min(first + each, C)
        inner = behind - first if together else 1
        for c in range(first, behind, inner):
            plane = ahead(y, n * yn + c * yc)
            if not backward:
                _clear(plane, Z, P, Q, yd, yh, yw, inner)
            for d in range(D):
                for h in range(H):
                    row = ahead(x, n * xn + c * xc + d * xd + h * xh)
                    places = ahead(indices, n * in_ + c * ic + d * id_ + h * ih)
                    for w in range(W):
                        for i in range(inner):
                            place = places[w * iw + i]
                            inside = 0 <= place < Z * P * Q
                            if backward:
                                v = plane[_at(place, P, Q, yd, yh, yw) + i] if inside else 0
                                row[w * xw + i] = v
                            elif inside:
                                plane[_at(place, P, Q, yd, yh, yw) + i] = row[w * xw + i]

    return Task(max_unpool, args)


@lru_cache(None)
def _avg(T: str, backward: bool) -> Task:
    args = layout(f"{T}**2 int32**3 int64*26")

    def avg_pool(address: int, index: int, scratch: int) -> None:
        """y from x, or (backward) the gradient x from the gradient y."""
        (
            x, y, along_d, along_h, along_w, C, each, together, D, H, W, Z, P, Q, uniform, S, sw, pw,
            divisor, clipped, adaptive, xn, xc, xd, xh, xw, yn, yc, yd, yh, yw,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, first = index // shares, index % shares * each
        behind = min(first + each, C)
        inner = behind - first if together else 1
        by = pointer(scratch, T)
        widths = ahead(by, 3)
        line = ahead(widths, Q)
        for q in range(Q):
            w0, w1, size_w = along_w[3 * q], along_w[3 * q + 1], along_w[3 * q + 2]
            # A window wholly in the padding sums to zero; it is divided by one, not by zero.
            widths[q] = 1 if divisor != 0 else max(w1 - w0, 1) if clipped else size_w
        for c in range(first, behind, inner):
            image = ahead(x, n * xn + c * xc)
            if backward:
                _clear(image, D, H, W, xd, xh, xw, inner)
            for z in range(Z):
                for p in range(P):
                    d0, d1, size_d = along_d[3 * z], along_d[3 * z + 1], along_d[3 * z + 2]
                    h0, h1, size_h = along_h[3 * p], along_h[3 * p + 1], along_h[3 * p + 2]
                    out = ahead(y, n * yn + c * yc + z * yd + p * yh)
                    if backward:
                        _put(line, inner, out, yw, Q, inner)
                    else:
                        for q in range(Q * inner):
                            line[q] = 0
                        for d in range(d0, d1):
                            for h in range(h0, h1):
                                row = ahead(image, d * xd + h * xh)
                                if uniform:
                                    for s in range(S):
                                        start, stop = inside(s - pw, sw, W, Q)
                                        _add(
                                            line,
                                            inner,
                                            ahead(row, (s - pw) * xw),
                                            sw * xw,
                                            start,
                                            stop,
                                            inner,
                                        )
                                elif inner > 1:
                                    for q in range(Q):
                                        for w in range(along_w[3 * q], along_w[3 * q + 1]):
                                            _add(
                                                ahead(line, q * inner),
                                                0,
                                                ahead(row, w * xw),
                                                0,
                                                0,
                                                1,
                                                inner,
                                            )
                                else:
                                    for q in range(Q):
                                        w0, w1 = along_w[3 * q], along_w[3 * q + 1]
                                        # Whole rows without gaps between them are one long row.
                                        if w1 - w0 == W and xh == W * xw:
                                            if h == h0:
                                                line[q] += sum_of(row, (h1 - h0) * W, xw)
                                        else:
                                            line[q] += sum_of(ahead(row, w0 * xw), w1 - w0, xw)
                    # PyTorch divides adaptive sums one axis at a time, others once.
                    by[0] = size_d if adaptive else 1
                    by[1] = size_h if adaptive else 1
                    by[2] = 1
                    if divisor != 0:
                        by[2] = divisor
                    elif clipped:
                        by[2] = max(d1 - d0, 1) * max(h1 - h0, 1)
                    elif not adaptive:
                        by[2] = size_d * size_h
                    by_d, by_h, area = by[0], by[1], by[2]
                    if inner == 1:
                        for q in range(Q):
                            line[q] = line[q] / by_d / by_h / (area * widths[q])
                    else:
                        for q in range(Q):
                            mean, size = ahead(line, q * inner), area * widths[q]
                            for i in range(inner):
                                mean[i] = mean[i] / by_d / by_h / size
                    if not backward:
                        _put(out, yw, line, inner, Q, inner)
                        continue
                    for d in range(d0, d1):
                        for h in range(h0, h1):
                            row = ahead(image, d * xd + h * xh)
                            if uniform:
                                # Places from the last: each x then meets its windows in their order.
                                for s in range(S - 1, -1, -1):
                                    start, stop = inside(s - pw, sw, W, Q)
                                    _add(
                                        ahead(row, (s - pw) * xw),
                                        sw * xw,
                                        line,
                                        inner,
                                        start,
                                        stop,
                                        inner,
                                    )
                            else:
                                for q in range(Q):
                                    w0, w1 = along_w[3 * q], along_w[3 * q + 1]
                                    if inner > 1:
                                        _add(
                                            ahead(row, w0 * xw),
                                            xw,
                                            ahead(line, q * inner),
                                            0,
                                            0,
                                            w1 - w0,
                                            inner,
                                        )
                                    else:
                                        for w in range(w0, w1):
                                            row[w * xw] += line[q]

    return Task(avg_pool, args)


# ---- plans ------------------------------------------------------------------------------------------------


def _three(values: tuple[int, ...], one: int = 1) -> tuple[int, ...]:
    return (one,) * (3 - len(values)) + values


@lru_cache(512)
def _sizes(shape: PoolShape, together: bool) -> tuple[tuple[int, ...], int, float]:
    """Arguments that every kernel has, tasks to run, and an estimate of all their cycles."""
    cycles = 2.0 * (math.prod(shape.ZPQ) * shape.places + math.prod(shape.DHW)) + 200
    return _shares(shape, together, cycles)


@lru_cache(512)
def _shares(
    shape: PoolShape | UnpoolShape, together: bool, cycles: float
) -> tuple[tuple[int, ...], int, float]:
    """`_sizes` of a problem of so many `cycles` a channel."""
    if together:
        # Whole cache lines of channels, some vectors of them where there are many.
        each = min(shape.C, 64 if shape.N * shape.C >= 512 else 16)
    else:
        each = max(1, min(shape.C, shape.N * shape.C // 16, int(20_000 / cycles)))
    count = shape.N * -(-shape.C // each)
    planes = (*_three(shape.spatial), *_three(shape.output))
    return (shape.C, each, together, *planes), count, cycles * shape.N * shape.C


@lru_cache(512)
def _windows(shape: PoolShape) -> tuple[int, ...]:
    """Window, stride, padding and dilation, three each."""
    pads = _three(tuple(before for before, _ in shape.padding), 0)
    return (*shape.TRS, *_three(shape.stride), *pads, *_three(shape.dilation))


@lru_cache(512)
def _tiled(shape: PoolShape) -> PoolShape | None:
    """Adaptive windows that tile the plane as the windows of plain pooling; None where they do not."""
    if shape.adaptive_output is None or any(
        h % o for h, o in zip(shape.spatial, shape.output, strict=True)
    ):
        return None
    return replace(shape, stride=shape.kernel, adaptive_output=None)


class Tables:
    """One array an axis, as kernels take them: by address."""

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        self.arrays = tuple(arrays)
        self.addresses: tuple[int, ...] = tuple(array.ctypes.data for array in self.arrays)


@lru_cache(512)
def _starts(shape: PoolShape) -> Tables:
    """For each axis, the first place of every window, int64: negative in the padding."""
    if shape.adaptive_output is not None:
        axes = zip(shape.DHW, shape.ZPQ, strict=True)
        return Tables(np.arange(out, dtype=np.int64) * size // out for size, out in axes)
    pads = _three(tuple(before for before, _ in shape.padding), 0)
    moves = zip(shape.ZPQ, _three(shape.stride), pads, strict=True)
    return Tables(np.arange(out, dtype=np.int64) * stride - pad for out, stride, pad in moves)


@lru_cache(512)
def _tables(shape: PoolShape) -> Tables:
    """For each axis, (start, stop, extent) of every average window, int32: clipped to the input, and the
    extent that counts padding."""
    tables = []
    for size, out, kernel, stride, pad in zip(
        shape.DHW, shape.ZPQ, shape.TRS, _three(shape.stride),
        _three(tuple(before for before, _ in shape.padding), 0), strict=True,
    ):  # fmt: skip
        rows = []
        for o in range(out):
            if shape.adaptive_output is not None:
                start, stop = o * size // out, -(-(o + 1) * size // out)
                rows.append((start, stop, stop - start))
            else:
                start = o * stride - pad
                stop = min(start + kernel, size + pad)
                rows.append((max(start, 0), min(stop, size), stop - start))
        tables.append(np.array(rows, np.int32))
    return Tables(tables)


def _together(t: torch.Tensor) -> bool:
    """Whether neighbours in memory are channels."""
    return t.stride(1) == 1 and t.shape[1] > 1 and t.stride(-1) >= t.shape[1]


def _like(t: torch.Tensor, together: bool) -> torch.Tensor:
    """`t` with channels as neighbours, copied if need be; any other `t` as it is."""
    if not together or t.stride(1) == 1:
        return t
    n, c, *places = t.shape
    return torch.empty_permuted((n, c, *places), (0, *range(2, t.dim()), 1), dtype=t.dtype).copy_(t)


def _scatter_or_gather(
    shape: PoolShape, backward: bool, a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor
) -> None:
    together = _together(a if backward else b)
    if backward:
        b = _like(b, together)
    else:
        a = _like(a, together)
    offsets = _like(offsets, together)
    sizes, count, work = _sizes(shape, together)
    starts = _starts(shape)
    wide = any(r > h for r, h in zip(shape.dilation, shape.spatial, strict=True))
    _max_kept(NAME[a.dtype], NAME[offsets.dtype], backward).run(
        count, work, a.data_ptr(), b.data_ptr(), offsets.data_ptr(),
        *starts.addresses, *sizes, *shape.TRS, *_three(shape.dilation),
        *strides(a), *strides(b), *strides(offsets), wide,
        scratch_bytes=8 * (shape.places + shape.ZPQ[2]),
    )  # fmt: skip


def _average(shape: PoolShape, backward: bool, x: torch.Tensor, y: torch.Tensor) -> None:
    together = _together(x if backward else y)
    if backward:
        y = _like(y, together)
    else:
        x = _like(x, together)
    sizes, count, work = _sizes(shape, together)
    tables = _tables(shape)
    adaptive = shape.adaptive_output is not None
    # Few outputs of wide windows are better summed one at a time.
    uniform = not adaptive and (together or shape.ZPQ[2] >= 4)
    _avg(NAME[x.dtype], backward).run(
        count, work, x.data_ptr(), y.data_ptr(), *tables.addresses, *sizes, uniform,
        shape.kernel[-1], shape.stride[-1], shape.padding[-1][0], shape.divisor_override or 0,
        not shape.count_include_pad, adaptive, *strides(x), *strides(y),
        scratch_bytes=8 * (3 + shape.ZPQ[2] * (1 + sizes[1])),
    )  # fmt: skip


def _put_or_take(
    shape: UnpoolShape, backward: bool, x: torch.Tensor, y: torch.Tensor, indices: torch.Tensor
) -> None:
    together = _together(x if backward else y)
    if backward:
        y = _like(y, together)
    else:
        x = _like(x, together)
    indices = _like(indices, together)
    cycles = 4.0 * math.prod(shape.spatial) + math.prod(shape.output) + 200
    sizes, count, work = _shares(shape, together, cycles)
    _unpool(NAME[x.dtype], backward).run(
        count, work, x.data_ptr(), y.data_ptr(), indices.data_ptr(), *sizes, *strides(x), *strides(y),
        *strides(indices),
    )  # fmt: skip


# ---- operations -------------------------------------------------------------------------------------------


def max_pool_fwd(shape: PoolShape, x: torch.Tensor, y: torch.Tensor, offsets: torch.Tensor) -> None:
    """Each window's maximum, and its place there: `offsets` uint8 or int32, as large as y."""
    x = native(x)
    result = native_result(y, x.dtype)
    together = _together(result)
    x, kept = _like(x, together), _like(offsets, together)
    sizes, count, work = _sizes(shape, together)
    tables = Tables(())
    factory, windows = _max_fwd, _windows(shape)
    # Few outputs of wide windows are better searched one at a time.
    if (tiles := _tiled(shape)) and (together or shape.ZPQ[2] >= 4):
        windows = _windows(tiles)
    elif shape.adaptive_output is not None:
        tables = _tables(shape)
        factory, windows = _adaptive_max_fwd, shape.TRS[1:]
    factory(NAME[x.dtype], NAME[kept.dtype], simd.lanes(NAME[x.dtype])).run(
        count, work, x.data_ptr(), result.data_ptr(), kept.data_ptr(), *tables.addresses, *sizes, *windows,
        *strides(x), *strides(result), *strides(kept), scratch_bytes=12 * (shape.ZPQ[2] * sizes[1] + 16),
    )  # fmt: skip
    if result is not y:
        y.copy_(result)
    if kept is not offsets:
        offsets.copy_(kept)


def max_pool_bwd(
    shape: PoolShape, grad_y: torch.Tensor, offsets: torch.Tensor, grad_x: torch.Tensor
) -> None:
    """Each window's gradient goes to the place it kept."""
    grad_y = native(grad_y)
    result = native_result(grad_x, grad_y.dtype)
    _scatter_or_gather(shape, True, result, grad_y, offsets)
    if result is not grad_x:
        grad_x.copy_(result)


def max_pool_gather(
    shape: PoolShape, x: torch.Tensor, offsets: torch.Tensor, y: torch.Tensor
) -> None:
    """x at the kept places."""
    x = native(x)
    result = native_result(y, x.dtype)
    _scatter_or_gather(shape, False, x, result, offsets)
    if result is not y:
        y.copy_(result)


def max_unpool_fwd(
    shape: UnpoolShape, x: torch.Tensor, indices: torch.Tensor, y: torch.Tensor
) -> None:
    """The values at their places, the last of several in one; zeros elsewhere."""
    x = native(x)
    result = native_result(y, x.dtype)
    _put_or_take(shape, False, x, result, indices)
    if result is not y:
        y.copy_(result)


def max_unpool_bwd(
    shape: UnpoolShape, grad_y: torch.Tensor, indices: torch.Tensor, grad_x: torch.Tensor
) -> None:
    """The gradients from the places that values were put at."""
    grad_y = native(grad_y)
    result = native_result(grad_x, grad_y.dtype)
    _put_or_take(shape, True, result, grad_y, indices)
    if result is not grad_x:
        grad_x.copy_(result)


def avg_pool_fwd(shape: PoolShape, x: torch.Tensor, y: torch.Tensor) -> None:
    """Each window's average."""
    x = native(x)
    result = native_result(y, x.dtype)
    _average(shape, False, x, result)
    if result is not y:
        y.copy_(result)


def avg_pool_bwd(shape: PoolShape, grad_y: torch.Tensor, grad_x: torch.Tensor) -> None:
    """Each window's gradient, divided as its average was, goes to all of its places."""
    grad_y = native(grad_y)
    result = native_result(grad_x, grad_y.dtype)
    _average(shape, True, result, grad_y)
    if result is not grad_x:
        grad_x.copy_(result)
