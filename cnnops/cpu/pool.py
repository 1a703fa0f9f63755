"""Max and average pooling and max unpooling on the CPU, for one to three axes, by PyTorch's rules.

Max: a later place of the window wins only if it is larger, or NaN; so the first maximum wins ties, and a
window of -inf keeps its first place inside the input. A kept place is its number in the window, row by row;
in an adaptive one as if it had the largest window's rows.
Average: the sum in the window's order, then one division; but columns first where windows of row-major memory
lie more than two apart, or are adaptive: a row of windows has those sums in common.
Unpooling: zeros, then the values row by row, so that the last one of a place stays.

Row-major memory: a task does some channels of one image, each from its first element to its last, so that
whatever windows share is added in one order. A row of outputs is done at once, window place by window place.
Channels-last memory: vectors lie along the channels. What writes each element once (forward, and backward of
windows side by side) is split by rows among tasks, reads half types as they are and rounds once, at the end;
other backwards have channels as the innermost axis of everything (`inner` is their number, 1 otherwise).
Windows come from tables along each axis: of (start, stop, extent) for averages and adaptive maxima, of
(start, stop, first place) for maxima in channels-last memory, and for their gradients of (first window, how
many, place in the first) along depths and rows, and of runs of places along a row (`_runs`).
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from cnnops.cpu import simd, vectors
from cnnops.cpu.compiler import routine
from cnnops.cpu.simd import sum_of
from cnnops.cpu.task import (
    NAME,
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
from cnnops.cpu.task import (
    supports as supports,
)
from cnnops.shapes import PoolShape, UnpoolShape

# ---- kernels ----------------------------------------------------------------------------------------------


@routine
def _first(start, step):
    """The first place of a window at `start`, with places `step` apart, that is not before the input."""
    return 0 if start >= 0 else (step - 1 - start) // step


@routine
def _steps(start, stop, step):
    """How many places `step` apart ``start … stop`` has. A division would cost as much as a short row."""
    return stop - start if step == 1 else (stop - start + step - 1) // step


@routine
def _keep_larger(best, kept, row, step, start, stop, place):
    """Let `place` of the windows ``start … stop`` win where its value, `step` apart in `row`, is larger."""
    for q in range(start, stop):
        v = row[q * step]
        if v > best[q] or v != v:
            best[q] = v
            kept[q] = place


@routine
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


@routine
def _put(to, to_step, row, step, count, inner):
    """``to[q * to_step] = row[q * step]`` for q < count, and the same for `inner` neighbours."""
    if to_step == inner and step == inner:
        for q in range(count * inner):
            to[q] = row[q]
    else:
        for q in range(count):
            for i in range(inner):
                to[q * to_step + i] = row[q * step + i]


@routine
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
def _max_fwd(T: str, kept_type: str) -> Task:
    args = layout(f"{T}**2 {kept_type}* int64*35")

    def max_pool_fwd(address: int, index: int, scratch: int) -> None:
        (
            x, y, offsets, C, each, D, H, W, Z, P, Q, T_, R, S, sd, sh, sw, pd, ph, pw, rd, rh, rw,
            xn, xc, xd, xh, xw, yn, yc, yd, yh, yw, on, oc, od, oh, ow,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, first = index // shares, index % shares * each
        best = pointer(scratch, T)
        kept = pointer(scratch + 8 * Q, "int32")
        for c in range(first, min(first + each, C)):
            for z in range(Z):
                for p in range(P):
                    d, h = z * sd - pd, p * sh - ph
                    first_t, first_r = _first(d, rd), _first(h, rh)
                    corner = (first_t * R + first_r) * S
                    for q in range(Q):
                        best[q] = -np.inf
                        kept[q] = corner
                    for q in range(min((pw + sw - 1) // sw, Q)):
                        kept[q] = corner + _first(q * sw - pw, rw)
                    for t in range(first_t, T_):
                        for r in range(first_r, R):
                            if d + t * rd >= D or h + r * rh >= H:
                                break
                            row = ahead(x, n * xn + c * xc + (d + t * rd) * xd + (h + r * rh) * xh)
                            for s in range(S):
                                w = s * rw - pw
                                start, stop = inside(w, sw, W, Q)
                                _keep_larger(
                                    best, kept, ahead(row, w * xw), sw * xw, start, stop,
                                    (t * R + r) * S + s,
                                )  # fmt: skip
                    _put(ahead(y, n * yn + c * yc + z * yd + p * yh), yw, best, 1, Q, 1)
                    _put(ahead(offsets, n * on + c * oc + z * od + p * oh), ow, kept, 1, Q, 1)

    return Task(max_pool_fwd, args)


@lru_cache(None)
def _max_rows_fwd(kind: str, kept_type: str, step: int, L: int) -> Task:
    args = layout(f"int64*2 {kept_type}* int64*28")

    def max_pool_rows_fwd(address: int, index: int, scratch: int) -> None:
        """Neighbours along a row are neighbours in memory, and windows `step` apart."""
        (
            x_, y_, offsets, C, each, D, H, W, Z, P, Q, T_, R, S, sd, sh, sw, pd, ph, pw, rd, rh, rw,
            xn, xc, xd, xh, yn, yc, on, oc,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, first = index // shares, index % shares * each
        x, y = vectors.elements(x_, kind), vectors.elements(y_, kind)
        firsts = pointer(scratch, "int32")
        for q in range(Q + L):
            firsts[q] = _first(q * step - pw, rw)
        for c in range(first, min(first + each, C)):
            image = ahead(x, n * xn + c * xc)
            best, kept = ahead(y, n * yn + c * yc), ahead(offsets, n * on + c * oc)
            # What is written beyond a row is written again by whatever comes next.
            span = Z * P * Q * (min(first + each, C) - c if yc == Z * P * Q and oc == yc else 1)
            extent = (D - 1) * xd + (H - 1) * xh + W
            for line in range(Z * P):
                z, p = (0, line) if Z == 1 else (line // P, line % P)
                d, h = z * sd - pd, p * sh - ph
                t0, r0 = _first(d, rd), _first(h, rh)
                planes = min(T_, _steps(d, D, rd)) - t0
                lines = min(R, _steps(h, H, rh)) - r0
                at = (d + t0 * rd) * xd + (h + r0 * rh) * xh
                vectors.max_row(
                    L, kind, step, ahead(best, line * Q), ahead(kept, line * Q), ahead(image, at), planes,
                    rd * xd, lines, rh * xh, S, rw, pw, W, (t0 * R + r0) * S, firsts, R, S, Q, extent - at,
                    span - line * Q,
                )  # fmt: skip

    return Task(max_pool_rows_fwd, args)


@lru_cache(None)
def _adaptive_max_fwd(T: str, kept_type: str) -> Task:
    args = layout(f"{T}**2 {kept_type}* int32**3 int64*22")

    def adaptive_max_pool_fwd(address: int, index: int, scratch: int) -> None:
        (
            x, y, offsets, along_d, along_h, along_w, C, each, Z, P, Q, R, S,
            xn, xc, xd, xh, xw, yn, yc, yd, yh, yw, on, oc, od, oh, ow,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, first = index // shares, index % shares * each
        best = pointer(scratch, T)
        kept = pointer(scratch + 8 * Q, "int32")
        for c in range(first, min(first + each, C)):
            for z in range(Z):
                for p in range(P):
                    d0, h0 = along_d[3 * z], along_h[3 * p]
                    for q in range(Q):
                        best[q] = -np.inf
                        kept[q] = 0
                    for d in range(d0, along_d[3 * z + 1]):
                        for h in range(h0, along_h[3 * p + 1]):
                            row = ahead(x, n * xn + c * xc + d * xd + h * xh)
                            corner = ((d - d0) * R + h - h0) * S
                            for q in range(Q):
                                w0, w1 = along_w[3 * q], along_w[3 * q + 1]
                                largest, place = best[q], kept[q]
                                for w in range(w0, w1):
                                    v = row[w * xw]
                                    if v > largest or v != v:
                                        largest = v
                                        place = corner + w - w0
                                best[q] = largest
                                kept[q] = place
                    _put(ahead(y, n * yn + c * yc + z * yd + p * yh), yw, best, 1, Q, 1)
                    _put(ahead(offsets, n * on + c * oc + z * od + p * oh), ow, kept, 1, Q, 1)

    return Task(adaptive_max_pool_fwd, args)


@lru_cache(None)
def _max_last_fwd(kind: str, kept_type: str, L: int) -> Task:
    args = layout(f"int64*2 {kept_type}* int32**3 int64*26")

    def max_pool_last_fwd(address: int, index: int, scratch: int) -> None:
        """Channels are neighbours; a task does some rows of y, of some channels. Tables have each window's
        first place in the input, where it stops, and that place's number in the window."""
        (
            x_, y_, offsets, along_d, along_h, along_w, C, each, lines, Z, P, Q, R, S, rd, rh, rw,
            xn, xc, xd, xh, xw, yn, yc, yd, yh, yw, on, oc, od, oh, ow,
        ) = unpack(address, args)  # fmt: skip
        shares, parts = (C + each - 1) // each, (Z * P + lines - 1) // lines
        n, c = index // parts // shares, index // parts % shares * each
        first = index % parts * lines
        inner = min(each, C - c)
        x = ahead(vectors.elements(x_, kind), n * xn + c)
        y = ahead(vectors.elements(y_, kind), n * yn + c)
        offsets = ahead(offsets, n * on + c)
        for line in range(first, min(first + lines, Z * P)):
            z, p = line // P, line % P
            d0, d1, t0 = along_d[3 * z], along_d[3 * z + 1], along_d[3 * z + 2]
            h0, h1, r0 = along_h[3 * p], along_h[3 * p + 1], along_h[3 * p + 2]
            for q in range(Q):
                w0, w1, s0 = along_w[3 * q], along_w[3 * q + 1], along_w[3 * q + 2]
                vectors.max_window(
                    L, kind, ahead(y, z * yd + p * yh + q * yw), ahead(offsets, z * od + p * oh + q * ow),
                    ahead(x, d0 * xd + h0 * xh + w0 * xw), _steps(d0, d1, rd), rd * xd,
                    _steps(h0, h1, rh), rh * xh, _steps(w0, w1, rw), rw * xw,
                    (t0 * R + r0) * S + s0, R, S, inner,
                )  # fmt: skip

    return Task(max_pool_last_fwd, args)


@lru_cache(None)
def _max_last_bwd(kind: str, kept_type: str, L: int) -> Task:
    args = layout(f"int64*2 {kept_type}* int32**3 int64*26")

    def max_pool_last_bwd(address: int, index: int, scratch: int) -> None:
        """Channels are neighbours; a task does some rows of x, of some channels. Each x adds up the windows
        that kept it. Tables have each depth's and row's first window, how many there are, and its number
        there; and of a row what `_runs` tells."""
        (
            x_, y_, offsets, along_d, along_h, along_w, C, each, lines, runs, D, H, R, S, sd, sh, sw,
            xn, xc, xd, xh, xw, yn, yc, yd, yh, yw, on, oc, od, oh, ow,
        ) = unpack(address, args)  # fmt: skip
        shares, parts = (C + each - 1) // each, (D * H + lines - 1) // lines
        n, c = index // parts // shares, index // parts % shares * each
        first = index % parts * lines
        inner = min(each, C - c)
        x = ahead(vectors.elements(x_, kind), n * xn + c)
        y = ahead(vectors.elements(y_, kind), n * yn + c)
        offsets = ahead(offsets, n * on + c)
        terms = pointer(scratch, "int64")
        for line in range(first, min(first + lines, D * H)):
            d, h = line // H, line % H
            row = ahead(x, d * xd + h * xh)
            z0, p0 = along_d[3 * d], along_h[3 * h]
            for run in range(runs):
                w, places, q, s = (
                    along_w[6 * run], along_w[6 * run + 1], along_w[6 * run + 2], along_w[6 * run + 3],
                )  # fmt: skip
                size = 0
                for z in range(z0, z0 + along_d[3 * d + 1]):
                    t = along_d[3 * d + 2] - (z - z0) * sd
                    for p in range(p0, p0 + along_h[3 * h + 1]):
                        r = along_h[3 * h + 2] - (p - p0) * sh
                        for j in range(along_w[6 * run + 4], along_w[6 * run + 5]):
                            terms[3 * size] = z * yd + p * yh + (q + j) * yw
                            terms[3 * size + 1] = z * od + p * oh + (q + j) * ow
                            terms[3 * size + 2] = (t * R + r) * S + s - j * sw
                            size += 1
                vectors.sum_kept(
                    L, kind, ahead(row, w * xw), sw * xw, y, yw, offsets, ow, terms, size, places, inner
                )  # fmt: skip

    return Task(max_pool_last_bwd, args)


@lru_cache(None)
def _max_tiles_bwd(kind: str, kept_type: str, L: int) -> Task:
    args = layout(f"int64*2 {kept_type}* int64*26")

    def max_pool_tiles_bwd(address: int, index: int, scratch: int) -> None:
        """Windows without gaps or overlap: each row of x is written, not added to."""
        (
            x_, y_, offsets, C, each, D, H, W, Z, P, Q, T_, R, S,
            xn, xc, xd, xh, xw, yn, yc, yd, yh, yw, on, oc, od, oh, ow,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, start = index // shares, index % shares * each
        x, y, zeros = (
            vectors.elements(x_, kind),
            vectors.elements(y_, kind),
            vectors.elements(scratch, kind),
        )
        zeros[0] = 0
        zero = zeros[0]
        pairs = S == 2 and xw == 1 and yw == 1 and ow == 1
        for c in range(start, min(start + each, C)):
            z, t, p, r = 0, 0, 0, 0
            for d in range(D):
                p, r = 0, 0
                for h in range(H):
                    row = ahead(x, n * xn + c * xc + d * xd + h * xh)
                    covered = 0
                    if z < Z and p < P:
                        covered = min(Q * S, W)
                        place = (t * R + r) * S
                        values = ahead(y, n * yn + c * yc + z * yd + p * yh)
                        kept = ahead(offsets, n * on + c * oc + z * od + p * oh)
                        if pairs:
                            vectors.spread(L, kind, row, covered, values, kept, place)
                        else:
                            for q in range(Q):
                                k, v = kept[q * ow], values[q * yw]
                                for s in range(min(S, W - q * S)):
                                    row[(q * S + s) * xw] = v if k == place + s else zero
                    for w in range(covered, W):
                        row[w * xw] = zero
                    # The window's next row; divisions would cost more than a short row does.
                    r += 1
                    if r == R:
                        p, r = p + 1, 0
                t += 1
                if t == T_:
                    z, t = z + 1, 0

    return Task(max_pool_tiles_bwd, args)


@routine
def _inside(place, d, h, w, D, H, W, R, S, rd, rh, rw):
    """Whether the window at (d, h, w) has its `place` in the input. A window whose dilation passes over the
    whole input has none there; it kept a place all the same."""
    d += place // (R * S) * rd
    h += place // S % R * rh
    w += place % S * rw
    return 0 <= d < D and 0 <= h < H and 0 <= w < W


@lru_cache(None)
def _max_kept(T: str, kept_type: str, backward: bool) -> Task:
    args = layout(f"{T}**2 {kept_type}* int64**3 int32* int64*31")

    def max_pool_kept(address: int, index: int, scratch: int) -> None:
        """``b = a[kept places]``, or (backward) ``a[kept places] += b`` from zero."""
        (
            a, b, offsets, from_d, from_h, from_w, origins, C, each, together, D, H, W, Z, P, Q, T_, R, S,
            rd, rh, rw, an, ac, ad, ah, aw, bn, bc, bd, bh, bw, on, oc, od, oh, ow, wide,
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
            if given(origins):
                values, kept = ahead(b, n * bn + c * bc), ahead(offsets, n * on + c * oc)
                if backward:
                    for o in range(Z * P * Q):
                        image[origins[o] + apart[kept[o]]] += values[o]
                else:
                    for o in range(Z * P * Q):
                        values[o] = image[origins[o] + apart[kept[o]]]
                continue
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


@routine
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


@routine
def _set_widths(widths, along_w, Q, divisor, clipped):
    """What each window of a row counts along it."""
    for q in range(Q):
        w0, w1, size_w = along_w[3 * q], along_w[3 * q + 1], along_w[3 * q + 2]
        # A window wholly in the padding sums to zero; it is divided by one, not by zero.
        widths[q] = 1 if divisor != 0 else max(w1 - w0, 1) if clipped else size_w


@routine
def _set_divisors(by, along_d, along_h, divisor, clipped, adaptive):
    """What sums are divided by, but for their widths: by[2], and adaptive ones by by[0] and by[1] before.
    PyTorch divides those one axis at a time, others once."""
    by[0], by[1], by[2] = along_d[2], along_h[2], 1
    if divisor != 0:
        by[2] = divisor
    elif clipped:
        by[2] = max(along_d[1] - along_d[0], 1) * max(along_h[1] - along_h[0], 1)
    elif not adaptive:
        by[2] = along_d[2] * along_h[2]


@routine
def _divide(line, inner, Q, by, widths, along_d, along_h, divisor, clipped, adaptive):
    """The sums of a row of windows, `inner` channels of each, become averages; `by` has room for three."""
    _set_divisors(by, along_d, along_h, divisor, clipped, adaptive)
    by_d, by_h, area = by[0], by[1], by[2]
    if adaptive:
        for i in range(Q * inner):
            line[i] = line[i] / by_d / by_h
    if inner == 1:
        for q in range(Q):
            line[q] /= area * widths[q]
    else:
        for q in range(Q):
            mean, size = ahead(line, q * inner), area * widths[q]
            for i in range(inner):
                mean[i] /= size


@lru_cache(None)
def _avg_rows_fwd(kind: str, step: int, L: int) -> Task:
    T = "float64" if kind == "float64" else "float32"
    args = layout("int64*2 int32**3 int64*19")

    def avg_pool_rows_fwd(address: int, index: int, scratch: int) -> None:
        """Neighbours along a row are neighbours in memory, and windows `step` apart."""
        (
            x_, y_, along_d, along_h, along_w, C, each, D, H, W, Z, P, Q, S, pw, divisor, clipped, adaptive,
            xn, xc, xd, xh, yn, yc,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, first = index // shares, index % shares * each
        x, y = vectors.elements(x_, kind), vectors.elements(y_, kind)
        by = pointer(scratch, T)
        widths = ahead(by, 3)
        _set_widths(widths, along_w, Q, divisor, clipped)
        for q in range(Q, Q + L):
            widths[q] = 1
        behind = min(first + each, C)
        extent = (D - 1) * xd + (H - 1) * xh + W
        for c in range(first, behind):
            image, means = ahead(x, n * xn + c * xc), ahead(y, n * yn + c * yc)
            # What is written beyond a row is written again by whatever comes next.
            span = Z * P * Q * (behind - c if yc == Z * P * Q else 1)
            z, p = 0, 0
            for line in range(Z * P):
                d, h = along_d[3 * z], along_h[3 * p]
                _set_divisors(
                    by, ahead(along_d, 3 * z), ahead(along_h, 3 * p), divisor, clipped, adaptive
                )
                at = d * xd + h * xh
                vectors.mean_row(
                    L, kind, step, ahead(means, line * Q), ahead(image, at), along_d[3 * z + 1] - d, xd,
                    along_h[3 * p + 1] - h, xh, S, 1, pw, W, by[2], widths, Q, extent - at, span - line * Q,
                )  # fmt: skip
                p += 1
                if p == P:
                    z, p = z + 1, 0

    return Task(avg_pool_rows_fwd, args)


@lru_cache(None)
def _avg(T: str, backward: bool, L: int) -> Task:
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
        columns = ahead(line, Q * inner)
        _set_widths(widths, along_w, Q, divisor, clipped)
        for c in range(first, behind, inner):
            image = ahead(x, n * xn + c * xc)
            if backward:
                _clear(image, D, H, W, xd, xh, xw, inner)
            for z in range(Z):
                for p in range(P):
                    d0, d1 = along_d[3 * z], along_d[3 * z + 1]
                    h0, h1 = along_h[3 * p], along_h[3 * p + 1]
                    out = ahead(y, n * yn + c * yc + z * yd + p * yh)
                    if backward:
                        _put(line, inner, out, yw, Q, inner)
                    else:
                        for q in range(Q * inner):
                            line[q] = 0
                        # Windows of one row add up the same rows of x: columns first.
                        shared = xw == 1 and Q > 1 and (d1 - d0) * (h1 - h0) > 1
                        if shared:
                            for w in range((W + L - 1) // L * L):
                                columns[w] = 0
                        for d in range(d0, d1):
                            for h in range(h0, h1):
                                row = ahead(image, d * xd + h * xh)
                                if shared:
                                    vectors.sum_up(L, T, columns, row, W)
                                elif uniform and xw != 1:
                                    for s in range(S):
                                        start, stop = inside(s - pw, sw, W, Q)
                                        _add(
                                            line, 1, ahead(row, (s - pw) * xw), sw * xw, start, stop, 1
                                        )  # fmt: skip
                                else:
                                    for q in range(Q):
                                        w0, w1 = along_w[3 * q], along_w[3 * q + 1]
                                        start, count = ahead(row, w0 * xw), w1 - w0
                                        # Whole rows without gaps between them are one long row.
                                        if count == W and xh == W * xw:
                                            count = (h1 - h0) * W if h == h0 else 0
                                        if xw == 1:
                                            line[q] += vectors.total(L, T, start, count)
                                        else:
                                            line[q] += sum_of(start, count, xw)
                        if shared:
                            for q in range(Q):
                                w0, w1 = along_w[3 * q], along_w[3 * q + 1]
                                line[q] = vectors.total(L, T, ahead(columns, w0), w1 - w0)
                    _divide(
                        line, inner, Q, by, widths, ahead(along_d, 3 * z), ahead(along_h, 3 * p), divisor,
                        clipped, adaptive,
                    )  # fmt: skip
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


@lru_cache(None)
def _avg_last_fwd(kind: str, L: int) -> Task:
    T = "float64" if kind == "float64" else "float32"
    args = layout("int64*2 int32**3 int64*19")

    def avg_pool_last_fwd(address: int, index: int, scratch: int) -> None:
        """Channels are neighbours; a task does some rows of y, of some channels."""
        (
            x_, y_, along_d, along_h, along_w, C, each, lines, Z, P, Q, divisor, clipped, adaptive,
            xn, xc, xd, xh, xw, yn, yc, yd, yh, yw,
        ) = unpack(address, args)  # fmt: skip
        shares, parts = (C + each - 1) // each, (Z * P + lines - 1) // lines
        n, c = index // parts // shares, index // parts % shares * each
        first = index % parts * lines
        inner = min(each, C - c)
        x = ahead(vectors.elements(x_, kind), n * xn + c)
        y = ahead(vectors.elements(y_, kind), n * yn + c)
        by = pointer(scratch, T)
        widths = ahead(by, 3)
        sums = ahead(widths, Q)
        _set_widths(widths, along_w, Q, divisor, clipped)
        for line in range(first, min(first + lines, Z * P)):
            z, p = line // P, line % P
            d0, d1 = along_d[3 * z], along_d[3 * z + 1]
            h0, h1 = along_h[3 * p], along_h[3 * p + 1]
            _set_divisors(
                by, ahead(along_d, 3 * z), ahead(along_h, 3 * p), divisor, clipped, adaptive
            )
            by_d, by_h, area = by[0], by[1], by[2]
            for q in range(Q):
                w0, w1 = along_w[3 * q], along_w[3 * q + 1]
                mean = ahead(y, z * yd + p * yh + q * yw)
                if (d1 - d0) * (h1 - h0) * (w1 - w0) <= 32:
                    window = ahead(x, d0 * xd + h0 * xh + w0 * xw)
                    vectors.mean_window(
                        L, kind, mean, window, d1 - d0, xd, h1 - h0, xh, w1 - w0, xw, inner, adaptive,
                        by_d, by_h, area * widths[q],
                    )  # fmt: skip
                    continue
                for i in range((inner + L - 1) // L * L):
                    sums[i] = 0
                for d in range(d0, d1):
                    for h in range(h0, h1):
                        for w in range(w0, w1, 8):
                            places = ahead(x, d * xd + h * xh + w * xw)
                            vectors.sum_window(L, kind, sums, places, min(8, w1 - w), xw, inner)
                _divide(
                    sums, inner, 1, by, ahead(widths, q), ahead(along_d, 3 * z), ahead(along_h, 3 * p),
                    divisor, clipped, adaptive,
                )  # fmt: skip
                vectors.narrow(L, kind, mean, sums, inner)

    return Task(avg_pool_last_fwd, args)


@lru_cache(None)
def _avg_rows_bwd(kind: str, step: int, L: int) -> Task:
    T = "float64" if kind == "float64" else "float32"
    args = layout("int64*2 int32**5 int64*21")

    def avg_pool_rows_bwd(address: int, index: int, scratch: int) -> None:
        """Neighbours along a row are neighbours in memory, and windows `step` apart: a row of x is the sum of
        its windows' rows, spread out."""
        (
            x_, y_, along_d, along_h, along_w, over_d, over_h, C, each, D, H, W, Z, P, Q, S, pw,
            divisor, clipped, adaptive, xn, xc, xd, xh, yn, yc, yd, yh,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, first = index // shares, index % shares * each
        x, y = vectors.elements(x_, kind), vectors.elements(y_, kind)
        by = pointer(scratch, T)
        widths = ahead(by, 3)
        margin = ahead(widths, Q)
        line = ahead(margin, S)
        means = ahead(line, Q + S + 2 * L)
        for q in range(2 * S + Q + 2 * L):
            margin[q] = 0
        _set_widths(widths, along_w, Q, divisor, clipped)
        for c in range(first, min(first + each, C)):
            for z in range(Z):
                for p in range(P):
                    mean = ahead(means, (z * P + p) * Q)
                    vectors.widen(L, kind, mean, ahead(y, n * yn + c * yc + z * yd + p * yh), Q)
                    _divide(
                        mean, 1, Q, by, widths, ahead(along_d, 3 * z), ahead(along_h, 3 * p), divisor,
                        clipped, adaptive,
                    )  # fmt: skip
            for d in range(D):
                z0, depth, p0, height = over_d[3 * d], over_d[3 * d + 1], -1, -1
                for h in range(H):
                    # Rows of x that lie in the same windows have one sum.
                    if p0 != over_h[3 * h] or height != over_h[3 * h + 1]:
                        p0, height = over_h[3 * h], over_h[3 * h + 1]
                        for q in range(Q):
                            line[q] = 0
                        for z in range(z0, z0 + depth):
                            for p in range(p0, p0 + height):
                                mean = ahead(means, (z * P + p) * Q)
                                for q in range(Q):
                                    line[q] += mean[q]
                    row = ahead(x, n * xn + c * xc + d * xd + h * xh)
                    vectors.overlap(L, kind, step, row, W, line, S, pw)

    return Task(avg_pool_rows_bwd, args)


@lru_cache(None)
def _avg_tiles_last_bwd(kind: str, L: int) -> Task:
    T = "float64" if kind == "float64" else "float32"
    args = layout("int64*2 int32**3 int64*25")

    def avg_pool_tiles_last_bwd(address: int, index: int, scratch: int) -> None:
        """Windows without gaps or overlap, and channels are neighbours: each x is written, not added to. A
        task does some rows of x, of some channels."""
        (
            x_, y_, along_d, along_h, along_w, C, each, lines, D, H, W, Z, P, Q, T_, R, S, divisor, clipped,
            adaptive, xn, xc, xd, xh, xw, yn, yc, yd, yh, yw,
        ) = unpack(address, args)  # fmt: skip
        shares, parts = (C + each - 1) // each, (D * H + lines - 1) // lines
        n, c = index // parts // shares, index // parts % shares * each
        line = index % parts * lines
        behind = min(line + lines, D * H)
        inner = min(each, C - c)
        x = ahead(vectors.elements(x_, kind), n * xn + c)
        y = ahead(vectors.elements(y_, kind), n * yn + c)
        by = pointer(scratch, T)
        widths = ahead(by, 3)
        _set_widths(widths, along_w, Q, divisor, clipped)
        while line < behind:
            d, h = line // H, line % H
            row = ahead(x, d * xd + h * xh)
            z, p = d // T_, h // R
            # Rows of one row of windows, or those behind the last.
            rows = min(behind - line, (R - h % R if p < P else H) if z < Z else H, H - h)
            covered = 0
            if z < Z and p < P:
                covered = min(Q * S, W)
                _set_divisors(
                    by, ahead(along_d, 3 * z), ahead(along_h, 3 * p), divisor, clipped, adaptive
                )
                by_d, by_h, area = by[0], by[1], by[2]
                for q in range(Q):
                    vectors.share_window(
                        L, kind, ahead(row, q * S * xw), rows, xh, min(S, W - q * S), xw,
                        ahead(y, z * yd + p * yh + q * yw), inner, adaptive, by_d, by_h, area * widths[q],
                    )  # fmt: skip
            for r in range(rows):
                for w in range(covered, W):
                    vectors.fill(L, kind, ahead(row, r * xh + w * xw), 0.0, inner)
            line += rows

    return Task(avg_pool_tiles_last_bwd, args)


@lru_cache(None)
def _avg_tiles_bwd(kind: str, L: int) -> Task:
    T = "float64" if kind == "float64" else "float32"
    args = layout("int64*2 int32**3 int64*24")

    def avg_pool_tiles_bwd(address: int, index: int, scratch: int) -> None:
        """Windows without gaps or overlap: each row of x is written, not added to."""
        (
            x_, y_, along_d, along_h, along_w, C, each, D, H, W, Z, P, Q, T_, R, S,
            divisor, clipped, adaptive, xn, xc, xd, xh, xw, yn, yc, yd, yh, yw,
        ) = unpack(address, args)  # fmt: skip
        shares = (C + each - 1) // each
        n, start = index // shares, index % shares * each
        behind = min(start + each, C)
        x, y = vectors.elements(x_, kind), vectors.elements(y_, kind)
        by = pointer(scratch, T)
        widths = ahead(by, 3)
        line = ahead(widths, Q)
        means = vectors.elements(scratch + 8 * (3 + 2 * Q + L), kind)
        _set_widths(widths, along_w, Q, divisor, clipped)
        for c in range(start, behind):
            ready = -1
            z, t, p, r = 0, 0, 0, 0
            for d in range(D):
                p, r = 0, 0
                for h in range(H):
                    row = ahead(x, n * xn + c * xc + d * xd + h * xh)
                    covered = 0
                    if z < Z and p < P:
                        covered = min(Q * S, W)
                        if ready != z * P + p:
                            ready = z * P + p
                            values = ahead(y, n * yn + c * yc + z * yd + p * yh)
                            if yw == 1:
                                vectors.widen(L, kind, line, values, Q)
                            else:
                                _put(means, 1, values, yw, Q, 1)
                                vectors.widen(L, kind, line, means, Q)
                            _divide(
                                line, 1, Q, by, widths, ahead(along_d, 3 * z), ahead(along_h, 3 * p),
                                divisor, clipped, adaptive,
                            )  # fmt: skip
                            vectors.narrow(L, kind, means, line, Q)
                        if S == 2 and xw == 1:
                            vectors.spread(L, kind, row, covered, means, None, 0)
                        else:
                            for q in range(Q):
                                mean = means[q]
                                to = ahead(row, q * S * xw)
                                for s in range(min(S, W - q * S)):
                                    to[s * xw] = mean
                    for w in range(covered, W):
                        row[w * xw] = 0
                    # The window's next row; divisions would cost more than a short row does.
                    r += 1
                    if r == R:
                        p, r = p + 1, 0
                t += 1
                if t == T_:
                    z, t = z + 1, 0

    return Task(avg_pool_tiles_bwd, args)


@lru_cache(None)
def _mean(kind: str, backward: bool, L: int) -> Task:
    T = "float64" if kind == "float64" else "float32"
    args = layout(f"int64 {T}* int64*7 float64")

    def mean(address: int, index: int, scratch: int) -> None:
        """Averages y of whole planes x without gaps, in float64; or (backward) planes full of y's share."""
        x_, y, C, each, size, xn, xc, yn, yc, divisor = unpack(address, args)
        x = vectors.elements(x_, kind)
        shares = (C + each - 1) // each
        n, first = index // shares, index % shares * each
        count = min(each, C - first)
        planes, means = ahead(x, n * xn + first * xc), ahead(y, n * yn + first * yc)
        sums = pointer(scratch, "float64")
        share = pointer(scratch + 8 * each, T)
        if backward:
            for c in range(count):
                sums[c] = means[c * yc]
                share[c] = sums[c] / divisor
            for c in range(count):
                vectors.fill(L, kind, ahead(planes, c * xc), share[c], size)
        else:
            for c in range(count):
                sums[c] = vectors.total(L, kind, ahead(planes, c * xc), size)
            for c in range(count):
                means[c * yc] = sums[c] / divisor

    return Task(mean, args)


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
def _rows(shape: PoolShape, together: bool, of_input: bool) -> tuple[tuple[int, int], int, float]:
    """Channels and rows of a task that does some rows of x or y for some channels; tasks to run, and an
    estimate of all their cycles."""
    (_, each, *_), count, work = _sizes(shape, together)
    rows = math.prod((shape.DHW if of_input else shape.ZPQ)[:2])
    if not together:
        return (each, rows), count, work
    work /= 8
    shares = max(1, min(16 // (shape.N * rows), shape.C // 64))
    each = -(-shape.C // shares // 16) * 16 if shares > 1 else shape.C
    shares = -(-shape.C // each)
    lines = max(
        1, min(rows, shape.N * rows * shares // 16, int(30_000 * shape.N * rows * shares / work))
    )
    return (each, lines), shape.N * shares * -(-rows // lines), work


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


@lru_cache(512)
def _starts(shape: PoolShape) -> tuple[Table, ...]:
    """For each axis, the first place of every window, int64: negative in the padding."""
    if shape.adaptive_output is not None:
        axes = zip(shape.DHW, shape.ZPQ, strict=True)
        return tuple(
            map(Table, (np.arange(out, dtype=np.int64) * size // out for size, out in axes))
        )
    pads = _three(tuple(before for before, _ in shape.padding), 0)
    moves = zip(shape.ZPQ, _three(shape.stride), pads, strict=True)
    return tuple(
        map(Table, (np.arange(out, dtype=np.int64) * stride - pad for out, stride, pad in moves))
    )


@lru_cache(512)
def _origins(shape: PoolShape) -> tuple[Table, ...]:
    """Where each window of a plane begins in the input, counted from the plane's first element, int32: all
    rows of windows are one then, and short ones cost no more than their values do."""
    d, h, w = (table.array.tolist() for table in _starts(shape))
    _, H, W = shape.DHW
    rows = [(z * H + p) * W for z in d for p in h]
    return tuple(map(Table, [np.add.outer(np.array(rows), np.array(w)).ravel().astype(np.int32)]))


@lru_cache(512)
def _tables(shape: PoolShape) -> tuple[Table, ...]:
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
    return tuple(map(Table, tables))


@lru_cache(512)
def _places(shape: PoolShape) -> tuple[Table, ...]:
    """For each axis, of every window the first place in the input, where it stops, and which of the window's
    places the first one is, int32."""
    tables = []
    for size, out, kernel, stride, pad, dilation in zip(
        shape.DHW, shape.ZPQ, shape.TRS, _three(shape.stride),
        _three(tuple(before for before, _ in shape.padding), 0), _three(shape.dilation), strict=True,
    ):  # fmt: skip
        if shape.adaptive_output is not None:
            rows = [(o * size // out, -(-(o + 1) * size // out), 0) for o in range(out)]
        else:
            rows = []
            for start in range(-pad, out * stride - pad, stride):
                skipped = max(0, -(start // dilation))
                stop = min(start + (kernel - 1) * dilation + 1, size)
                rows.append((start + skipped * dilation, stop, skipped))
        tables.append(np.array(rows, np.int32))
    return tuple(map(Table, tables))


@lru_cache(512)
def _covering(shape: PoolShape) -> tuple[Table, ...]:
    """For depths and for rows, of every one of the input the first window that it lies in, how many there
    are, and which place of the first one it is, int32. Windows without dilation."""
    tables = []
    for size, out, kernel, stride, pad in zip(
        shape.DHW[:2], shape.ZPQ[:2], shape.TRS[:2], _three(shape.stride)[:2],
        _three(tuple(before for before, _ in shape.padding), 0)[:2], strict=True,
    ):  # fmt: skip
        rows = []
        for place in range(pad, pad + size):
            first = max(0, (place - kernel) // stride + 1)
            last = min(out - 1, place // stride)
            rows.append((first, max(0, last - first + 1), place - first * stride))
        tables.append(np.array(rows, np.int32))
    return tuple(map(Table, tables))


@lru_cache(512)
def _runs(shape: PoolShape) -> tuple[Table, ...]:
    """The places of a row in runs of a stride from one to the next, whose windows lie alike, int32: the first
    place, how many there are, a window q that would have the first one as its number s, and the windows q + j
    that the row has, the first j and behind the last. Windows without dilation."""
    W, Q, S = shape.DHW[2], shape.ZPQ[2], shape.kernel[-1]
    stride, pad = shape.stride[-1], shape.padding[-1][0]
    rows: list[list[int]] = []
    for phase in range(min(stride, W)):
        former = None
        for w in range(phase, W, stride):
            q, s = divmod(w + pad, stride)
            least = -((S - 1 - s) // stride)
            windows = max(least, -q), min(1, Q - q)
            if windows == former:
                rows[-1][1] += 1
            else:
                rows.append([w, 1, q, s, *windows])
            former = windows
    return tuple(map(Table, [np.array(rows, np.int32)]))


@lru_cache(512)
def _disjoint(shape: PoolShape) -> bool:
    """Whether windows lie side by side: none shares a place with another, or leaves one out between them."""
    return _tiled(shape) is not None or (
        shape.adaptive_output is None
        and shape.stride == shape.kernel
        and all(before == 0 for before, _ in shape.padding)
        and all(r == 1 for r in shape.dilation)
    )


@lru_cache(512)
def _global(shape: PoolShape) -> bool:
    """Whether the only window is the whole plane."""
    return (
        math.prod(shape.output) == 1
        and shape.kernel == shape.spatial
        and all(before == 0 for before, _ in shape.padding)
    )


def _dense(t: torch.Tensor) -> bool:
    """Whether each plane is one row without gaps."""
    expected = 1
    for size, stride in zip(t.shape[:1:-1], t.stride()[:1:-1], strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


HALVES = (torch.float16, torch.bfloat16)


def _lanes(kind: str) -> int:
    return simd.lanes("float64" if kind == "float64" else "float32")


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
    rows = not (together or wide) and math.prod(shape.spatial) < 2**31
    dense = rows and all(map(_dense, (a, b, offsets)))
    origins = _origins(shape)[0] if dense else None
    _max_kept(NAME[a.dtype], NAME[offsets.dtype], backward).run(
        count, work, a, b, offsets,
        *starts, origins, *sizes, *shape.TRS, *_three(shape.dilation),
        *strides(a), *strides(b), *strides(offsets), wide,
        scratch_bytes=8 * (shape.places + shape.ZPQ[2]),
    )  # fmt: skip


def _average(shape: PoolShape, backward: bool, x: torch.Tensor, y: torch.Tensor) -> None:
    together = backward and _together(x)
    y = _like(y, together)
    sizes, count, work = _sizes(shape, together)
    adaptive = shape.adaptive_output is not None
    # Few outputs of wide windows are better summed one at a time.
    uniform = not adaptive and (together or shape.ZPQ[2] >= 4)
    T, W = NAME[x.dtype], shape.DHW[2]
    L = simd.lanes(T)
    _avg(T, backward, L).run(
        count, work, x, y, *_tables(shape), *sizes, uniform,
        shape.kernel[-1], shape.stride[-1], shape.padding[-1][0], *_divisors(shape), *strides(x),
        *strides(y), scratch_bytes=8 * (3 + W + L + shape.ZPQ[2] * (1 + (sizes[1] if together else 1))),
    )  # fmt: skip


def _whole(shape: PoolShape, kind: str, backward: bool, x: torch.Tensor, y: torch.Tensor) -> None:
    """`_mean` of planes of the type called `kind`; y of a type that is computed in."""
    size = math.prod(shape.spatial)
    cycles = 30 + size / 4
    each = max(1, min(shape.C, shape.N * shape.C // 16, int(20_000 / cycles)))
    _mean(kind, backward, _lanes(kind)).run(
        shape.N * -(-shape.C // each), cycles * shape.N * shape.C, x, y, shape.C, each,
        size, *x.stride()[:2], *y.stride()[:2], shape.divisor_override or size, scratch_bytes=16 * each,
    )  # fmt: skip


def _divisors(shape: PoolShape) -> tuple[int, bool, bool]:
    """What averages are divided by, as the kernels take it."""
    adaptive = shape.adaptive_output is not None
    return shape.divisor_override or 0, not shape.count_include_pad, adaptive


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
        count, work, x, y, indices, *sizes, *strides(x), *strides(y),
        *strides(indices),
    )  # fmt: skip


# ---- operations -------------------------------------------------------------------------------------------


def max_pool_fwd(shape: PoolShape, x: torch.Tensor, y: torch.Tensor, offsets: torch.Tensor) -> None:
    """Each window's maximum, and its place there: `offsets` uint8 or int32, as large as y."""
    together = _together(y)
    x = vectors.readable(x)
    if together:
        x = _like(x, True)
    result = native_result(y, x.dtype)
    kept = _like(offsets, together)
    kind = vectors.kind(x.dtype)
    assert kind is not None  # x is readable
    # Few outputs of wide windows are better searched one at a time.
    tiles = _tiled(shape) if shape.ZPQ[2] >= 4 else None
    plain = shape if shape.adaptive_output is None else tiles
    if together:
        (each, lines), count, work = _rows(shape, True, False)
        _max_last_fwd(kind, NAME[kept.dtype], _lanes(kind)).run(
            count, work, x, result, kept, *_places(shape), shape.C,
            each, lines, *shape.ZPQ, *shape.TRS[1:], *_three(shape.dilation), *strides(x), *strides(result),
            *strides(kept),
        )  # fmt: skip
    elif plain and plain.stride[-1] <= 2 and x.stride(-1) == 1 and _dense(result) and _dense(kept):
        (_, each, *_), count, work = _sizes(shape, False)
        L, Q = _lanes(kind), shape.ZPQ[2]
        _max_rows_fwd(kind, NAME[kept.dtype], plain.stride[-1], L).run(
            count, work, x, result, kept, shape.C, each, *shape.DHW,
            *shape.ZPQ, *_windows(plain), *strides(x)[:4], *result.stride()[:2], *kept.stride()[:2],
            scratch_bytes=4 * (Q + L),
        )  # fmt: skip
    else:
        (_, each, *_), count, work = _sizes(shape, False)
        x = native(x)
        values = native_result(result, x.dtype)
        T, kept_type = NAME[x.dtype], NAME[kept.dtype]
        if plain:
            task = _max_fwd(T, kept_type)
            tables: tuple[Table, ...] = ()
            windows = _windows(plain)
            planes: tuple[int, ...] = (*shape.DHW, *shape.ZPQ)
        else:
            task = _adaptive_max_fwd(T, kept_type)
            tables, planes, windows = _tables(shape), shape.ZPQ, shape.TRS[1:]
        task.run(
            count, work, x, values, kept, *tables, shape.C, each,
            *planes, *windows, *strides(x), *strides(values), *strides(kept),
            scratch_bytes=12 * (shape.ZPQ[2] + 16),
        )  # fmt: skip
        if values is not result:
            result.copy_(values)
    if result is not y:
        y.copy_(result)
    if kept is not offsets:
        offsets.copy_(kept)


def max_pool_bwd(
    shape: PoolShape, grad_y: torch.Tensor, offsets: torch.Tensor, grad_x: torch.Tensor
) -> None:
    """Each window's gradient goes to the place it kept."""
    kind = vectors.kind(grad_x.dtype)
    together = _together(grad_x)
    plain = shape if shape.adaptive_output is None else _tiled(shape)
    many = 2 * shape.C >= (_lanes(kind) if kind else 0)
    if kind and together and many and plain and all(r == 1 for r in plain.dilation):
        grad_y, offsets = _like(grad_y, True), _like(offsets, True)
        (each, lines), count, work = _rows(shape, True, True)
        runs = _runs(plain)
        covering = math.prod(-(-k // s) for k, s in zip(plain.kernel, plain.stride, strict=True))
        _max_last_bwd(kind, NAME[offsets.dtype], _lanes(kind)).run(
            count, work, grad_x, grad_y, offsets,
            *_covering(plain), *runs, shape.C, each, lines, len(runs[0].array),
            *shape.DHW[:2], *shape.TRS[1:], *_three(plain.stride), *strides(grad_x), *strides(grad_y),
            *strides(offsets), scratch_bytes=24 * covering,
        )  # fmt: skip
        return
    # Pairs along a row are written in whole vectors where it has some; else one place a window is faster.
    pairs = shape.kernel[-1] == 2 and shape.spatial[-1] >= 24
    if kind and pairs and not together and _disjoint(shape):
        (_, each, *_), count, work = _sizes(shape, False)
        _max_tiles_bwd(kind, NAME[offsets.dtype], _lanes(kind)).run(
            count, work, grad_x, grad_y, offsets, shape.C, each, *shape.DHW,
            *shape.ZPQ, *shape.TRS, *strides(grad_x), *strides(grad_y), *strides(offsets), scratch_bytes=8,
        )  # fmt: skip
        return
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
    whole = _global(shape) and _dense(x)
    together = _together(y) and not whole
    x = vectors.readable(x)
    result = native_result(y, torch.float32 if whole and x.dtype in HALVES else x.dtype)
    # Few outputs of wide windows are better summed one at a time.
    plain = shape.adaptive_output is None and shape.ZPQ[2] >= 4
    kind = vectors.kind(x.dtype)
    if whole and kind:
        _whole(shape, kind, False, x, result)
    elif together and kind:
        x = _like(x, True)
        L = _lanes(kind)
        (each, lines), count, work = _rows(shape, True, False)
        _avg_last_fwd(kind, L).run(
            count, work, x, result, *_tables(shape), shape.C, each, lines,
            *shape.ZPQ, *_divisors(shape), *strides(x), *strides(result),
            scratch_bytes=8 * (3 + shape.ZPQ[2] + each + L),
        )  # fmt: skip
    elif kind and plain and shape.stride[-1] <= 2 and x.stride(-1) == 1 and _dense(result):
        (_, each, *_), count, work = _sizes(shape, False)
        L, Q = _lanes(kind), shape.ZPQ[2]
        _avg_rows_fwd(kind, shape.stride[-1], L).run(
            count, work, x, result, *_tables(shape), shape.C, each,
            *shape.DHW, *shape.ZPQ, shape.kernel[-1], shape.padding[-1][0], *_divisors(shape),
            *strides(x)[:4], *result.stride()[:2], scratch_bytes=8 * (3 + Q + L),
        )  # fmt: skip
    else:
        x = native(x)
        values = native_result(result, x.dtype)
        _average(shape, False, x, values)
        if values is not result:
            result.copy_(values)
    if result is not y:
        y.copy_(result)


def avg_pool_bwd(shape: PoolShape, grad_y: torch.Tensor, grad_x: torch.Tensor) -> None:
    """Each window's gradient, divided as its average was, goes to all of its places."""
    kind = vectors.kind(grad_x.dtype)
    if kind and _global(shape) and _dense(grad_x):
        _whole(shape, kind, True, grad_x, native(grad_y))
        return
    if kind and _disjoint(shape):
        together = _together(grad_x)
        grad_y = _like(grad_y, together)
        L, Q = _lanes(kind), shape.ZPQ[2]
        (each, lines), count, work = _rows(shape, together, True)
        task = _avg_tiles_last_bwd(kind, L) if together else _avg_tiles_bwd(kind, L)
        task.run(
            count, work, grad_x, grad_y, *_tables(shape), shape.C, each,
            *((lines,) if together else ()), *shape.DHW, *shape.ZPQ, *shape.TRS, *_divisors(shape),
            *strides(grad_x), *strides(grad_y), scratch_bytes=8 * (3 + 3 * Q + 2 * L),
        )  # fmt: skip
        return
    rows = grad_x.stride(-1) == 1 and grad_y.stride(-1) == 1 and not _together(grad_x)
    if kind and rows and shape.adaptive_output is None and shape.stride[-1] <= 2:
        (_, each, *_), count, work = _sizes(shape, False)
        L, Q, S = _lanes(kind), shape.ZPQ[2], shape.kernel[-1]
        _avg_rows_bwd(kind, shape.stride[-1], L).run(
            count, work, grad_x, grad_y, *_tables(shape),
            *_covering(shape), shape.C, each, *shape.DHW, *shape.ZPQ, S, shape.padding[-1][0],
            *_divisors(shape), *strides(grad_x)[:4], *strides(grad_y)[:4],
            scratch_bytes=8 * (3 + 2 * Q + 2 * S + 3 * L + math.prod(shape.ZPQ)),
        )  # fmt: skip
        return
    grad_y = native(grad_y)
    result = native_result(grad_x, grad_y.dtype)
    _average(shape, True, result, grad_y)
    if result is not grad_x:
        grad_x.copy_(result)
