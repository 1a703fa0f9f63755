"""Group norm and layer norm on the CPU, forward and backward.

Of every image's group of channels, or of every row, ``y = act(gamma * (x - mean) * rstd + beta)``. As in
`norm`, statistics come from one pass over x about a number near the mean, a group's first value or the mean
of a few, and from a second pass in float64 where that turns out far from the mean. A mean that float32 cannot
hold is carried as ``high + low``: where the two meet a product, low times that product's other factor is part
of a constant. The backward computes the activation's input anew from x.

There are three orders of memory, and a pair of kernels for each:

    planes     a group's D = C/groups·L values are neighbours: row-major images. A task does some groups, each
               from its first value to its last, which are in the cache when they are read again
    columns    channels are innermost. A task does all channels of an image; where images are few, tasks do
               some of its places, in phases that wait for each other
    rows       a channel has one place, L = 1: layer norm, where the row is the group, and groups of vectors.
               What gradients of gamma and beta need is added up while a row is read for its own sums

Gradients of gamma and beta are sums over images. Each task adds up those of its own images, and in a last
phase the tasks' sums are added up in their order; how the images are split depends on the shape alone. Of
long rows a kernel of their own, `parameters`, sums some channels over all images.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from cnnops.cpu import norm_vectors, simd, vectors
from cnnops.cpu.compiler import routine
from cnnops.cpu.conv_axes import up, zeros
from cnnops.cpu.norm_base import (
    FAR,
    beyond,
    clear,
    computed,
    deliver,
    guess,
    is_laid,
    is_settled,
    kind_of,
    laid,
    rest_of,
    result_like,
    vector_of,
)
from cnnops.cpu.phases import done, wait
from cnnops.cpu.task import (
    NAME,
    At,
    Shared,
    Task,
    ahead,
    given,
    layout,
    pointer,
    unpack,
)
from cnnops.cpu.task import (
    supports as supports,
)
from cnnops.epilogue import ACTIVATIONS
from cnnops.shapes import GroupShape, LayerShape

PIECE = 32
"""Rows whose sums for gamma and beta are kept in the elements' own type before they meet float64; and least
rows, if there are as many, of a task that has such sums to leave behind."""

SPAN = 512
"""Channels of those sums that are added up at a time."""

LONG = 4096
"""Channels of one place beyond which sums are not kept by task."""

STRETCH = 2048
"""Channels of them that are then done at a time: memory is read in long runs."""

TASKS = 64
"""Tasks enough for many threads."""

FEW = 8
"""Fewer images than these are split among tasks, channels last."""

PLACES = 32_768
"""Least elements of such a part of an image."""

_ALONE = norm_vectors.NONE
"""The backward is told of the activation by x alone."""


# ---- steps ------------------------------------------------------------------------------------------------


@routine
def _deviations(V, kind, exact, x, count, about, sums):
    """The sums of ``x - about`` and of its squares over a run of memory; `sums` is scratch for them."""
    clear(sums, 2)
    longest = norm_vectors.VECTORS * V
    for start in range(0, count, longest):
        norm_vectors.moments(
            V, kind, False, exact, ahead(x, start), 1, 0, min(longest, count - start), about, sums,
            ahead(sums, 1),
        )  # fmt: skip
    return sums[0], sums[1]


@routine
def _moments(V, kind, x, count, share, table, about, sums):
    """Mean and biased variance of a run of memory; share is ``1 / count``. `table`, `about` and `sums` are
    scratch."""
    table[0] = norm_vectors.element(kind, x)
    first, second = _deviations(V, kind, False, x, count, table, sums)
    off = first * share
    mean, var = table[0] + off, second * share - off * off
    if not is_settled(off, var):
        about[0] = mean if math.isfinite(mean) else 0.0
        first, second = _deviations(V, kind, True, x, count, about, sums)
        off = first * share
        mean, var = about[0] + off, second * share - off * off
    return mean, 0.0 if var < 0 else var  # rounding; NaN stays


@routine
def _lacking(V, kind, x, count, high, rstd, about, sums):
    """What `high` lacks of the mean of a run of memory, as far as that matters."""
    if not abs(high) * rstd > FAR:
        return 0.0
    about[0] = high
    first, _ = _deviations(V, kind, True, x, count, about, sums)
    return first / count


@routine
def _products(V, kind, act, grad_y, x, grad_z, count, table, sums):
    """The sums of grad_z, which is written unless null, and of ``grad_z * (x - high)`` over a run of memory;
    `table` has high, scale and shift."""
    none = vectors.elements(0, kind)
    clear(sums, 2)
    longest = norm_vectors.VECTORS * V
    for start in range(0, count, longest):
        norm_vectors.back_sums(
            V, kind, act, _ALONE, False, ahead(grad_y, start), ahead(x, start), none, beyond(grad_z, start),
            none, 1, 0, min(longest, count - start), table, ahead(table, 1), ahead(table, 2), sums,
            ahead(sums, 1), 0,
        )  # fmt: skip
    return sums[0], sums[1]


@routine
def _gamma(weight, c):
    return np.float64(weight[c]) if given(weight) else 1.0


@routine
def _shift(bias, c, low, scale):
    return (np.float64(bias[c]) if given(bias) else 0.0) - low * scale


@routine
def _constants(average, slope, low, rstd):
    """a and b of ``grad_x = rstd * gamma * grad_z - a - (x - high) * b``: from averages of ``gamma * grad_z``
    and of its products with ``x - high``."""
    b = (slope - low * average) * rstd * rstd * rstd
    return rstd * average - low * b, b


@routine
def _add_parts(partial, parts, C, index, grad_weight, grad_bias, scratch):
    """Some values of the gradients of gamma and beta, from ``partial [part] [of gamma, of beta] [C]``."""
    c0 = index * SPAN
    n = min(SPAN, C - c0)
    total = pointer(scratch, "float64")
    for which in range(2):
        to = grad_bias if which == 1 else grad_weight
        if not given(to):
            continue
        clear(total, n)
        for part in range(parts):
            row = ahead(partial, (2 * part + which) * C + c0)
            for i in range(n):
                total[i] += row[i]
        for i in range(n):
            to[c0 + i] = total[i]


# ---- planes -----------------------------------------------------------------------------------------------


@lru_cache(None)
def _planes_forward(kind: str, act: int, V: int) -> Task:
    T = computed(kind)
    args = layout(f"{T}**2 int64*2 {T}**2 int64*7 float64")

    def group_norm_planes(address: int, index: int, scratch: int) -> None:
        """The groups ``index * each …`` of y, mean and rstd."""
        (
            weight, bias, x_, y_, means, rstds, rows, each, groups, channels, D, L, past, eps,
        ) = unpack(address, args)  # fmt: skip
        x, y = vectors.elements(x_, kind), vectors.elements(y_, kind)
        none = vectors.elements(0, kind)
        table, about = pointer(scratch, T), pointer(scratch + 32, "float64")
        sums = pointer(scratch + 64, "float64")
        # Without gamma and beta all channels of a group are done alike.
        planes, length = (channels, L) if given(weight) or given(bias) else (1, D)
        for r in range(index * each, min(index * each + each, rows)):
            mean, var = _moments(V, kind, ahead(x, r * D), D, 1 / D, table, about, sums)
            rstd = 1 / math.sqrt(var + eps)
            means[r], rstds[r] = mean, rstd
            table[0] = mean
            low = rest_of(mean, table[0])
            for c in range(planes):
                scale = _gamma(weight, r % groups * channels + c) * rstd
                table[1] = scale
                table[2] = _shift(bias, r % groups * channels + c, low, scale)
                at = r * D + c * L
                norm_vectors.normalise(
                    V, kind, act, False, ahead(x, at), none, ahead(y, at), 1, 0, length, table,
                    ahead(table, 1), ahead(table, 2), past,
                )  # fmt: skip

    return Task(group_norm_planes, args)


@lru_cache(None)
def _planes_backward(kind: str, act: int, V: int) -> Task:
    T = computed(kind)
    waits = norm_vectors.may_wait(kind, ACTIVATIONS[act], _ALONE)
    form = norm_vectors.READY if waits else _ALONE
    args = layout(f"int64*4 {T}**4 float64* {T}**2 int64*10")

    def group_norm_planes_backward(address: int, index: int, scratch: int) -> None:
        """grad_x of some images, `side` groups of each, and what they add to the sums; then these."""
        (
            _, grad_y_, x_, grad_x_, weight, bias, means, rstds, partial, grad_weight, grad_bias,
            N, each, parts, groups, blocks, side, channels, C, L, past,
        ) = unpack(address, args)  # fmt: skip
        if index >= parts * blocks:
            wait(address, parts * blocks)
            index -= parts * blocks
            _add_parts(partial, parts, C, index, grad_weight, grad_bias, scratch)
            return
        grad_y, x = vectors.elements(grad_y_, kind), vectors.elements(x_, kind)
        grad_x, none = vectors.elements(grad_x_, kind), vectors.elements(0, kind)
        grad_z, source = (grad_x, grad_x) if waits else (none, grad_y)
        table, about = pointer(scratch, T), pointer(scratch + 64, "float64")
        sums = pointer(scratch + 128, "float64")
        part, block, D = index // blocks, index % blocks, channels * L
        to_weight = ahead(partial, 2 * part * C)
        to_bias = ahead(to_weight, C)
        if given(partial):
            for c in range(block * side * channels, min((block + 1) * side, groups) * channels):
                to_weight[c], to_bias[c] = 0, 0
        for image in range(part * each, min(part * each + each, N)):
            for group in range(block * side, min(block * side + side, groups)):
                r, c0 = image * groups + group, group * channels
                rstd = np.float64(rstds[r])
                low = _lacking(V, kind, ahead(x, r * D), D, means[r], rstd, about, sums)
                table[0] = means[r]
                sum1, sum2 = 0.0, 0.0
                for c in range(c0, c0 + channels):
                    gamma = _gamma(weight, c)
                    table[1], table[2] = gamma * rstd, _shift(bias, c, low, gamma * rstd)
                    at = r * D + (c - c0) * L
                    first, second = _products(
                        V, kind, act, ahead(grad_y, at), ahead(x, at), beyond(grad_z, at), L, table,
                        sums,
                    )  # fmt: skip
                    sum1 += first * gamma
                    sum2 += second * gamma
                    if given(partial):
                        to_weight[c] += (second - low * first) * rstd
                        to_bias[c] += first
                if grad_x_ == 0:
                    continue
                a, b = _constants(sum1 / D, sum2 / D, low, rstd)
                table[3], table[4] = a, b
                for c in range(c0, c0 + channels):
                    scale = _gamma(weight, c) * rstd
                    table[1], table[2] = scale, _shift(bias, c, low, scale)
                    at = r * D + (c - c0) * L
                    norm_vectors.back_combine(
                        V, kind, act, form, False, ahead(source, at), ahead(x, at), none, none,
                        ahead(grad_x, at), 1, 0, L, table, ahead(table, 1), ahead(table, 2), ahead(table, 3),
                        ahead(table, 4), past,
                    )  # fmt: skip
        done(address)

    return Task(group_norm_planes_backward, args, in_order=True)


# ---- columns ----------------------------------------------------------------------------------------------
# What a kernel keeps of an image: high, scale, shift, a and b, `room` numbers each, of 8 bytes whatever their
# type; what high lacks of the means; and each part's two sums.


@routine
def _image_bytes(room, parts):
    return (48 + 16 * parts) * room


@routine
def _image_sums(V, kind, x, C, L, channels, first_place, places, near, sums, room):
    """A part's sums about numbers near the means of the groups, which `near` gets."""
    guess(V, kind, x, C, L, C, near)
    for c in range(0, C, channels):
        total = 0.0
        for i in range(c, c + channels):
            total += near[i]
        for i in range(c, c + channels):
            near[i] = total / channels
    clear(ahead(near, C), room - C)
    clear(sums, 2 * room)
    norm_vectors.moments(
        V, kind, True, False, ahead(x, first_place * C), places, C, C, near, sums, ahead(sums, room)
    )


@routine
def _gather_parts(sums, parts, room):
    """The sums of all parts, in their order, where the first part's are."""
    for part in range(1, parts):
        other = ahead(sums, 2 * part * room)
        for i in range(2 * room):
            sums[i] += other[i]


@routine
def _image_tables(
    V, kind, T, x, C, L, channels, weight, bias, eps, means, rstds, base, room
):  # fmt: skip
    """Statistics and tables of an image from its sums about what stands for `high`."""
    high = pointer(base, T)
    scale, shift = ahead(high, room), ahead(high, 2 * room)
    about = pointer(base + 40 * room, "float64")
    first = ahead(about, room)
    second = ahead(first, room)
    for i in range(room):
        about[i] = high[i]
    for attempt in range(2):
        settled = True
        for c in range(0, C, channels):
            sum1, sum2 = 0.0, 0.0
            for i in range(c, c + channels):
                sum1 += first[i]
                sum2 += second[i]
            off = sum1 / (channels * L)
            mean, var = about[c] + off, sum2 / (channels * L) - off * off
            settled = settled and is_settled(off, var)
            rstd = 1 / math.sqrt((0.0 if var < 0 else var) + eps)
            means[c // channels], rstds[c // channels] = mean, rstd
            for i in range(c, c + channels):
                about[i] = mean if math.isfinite(mean) else 0.0
                high[i] = mean
                factor = _gamma(weight, i) * rstd
                scale[i], shift[i] = factor, _shift(bias, i, rest_of(mean, high[i]), factor)
        if settled or attempt == 1:
            break
        clear(first, 2 * room)
        norm_vectors.moments(V, kind, True, True, x, L, C, C, about, first, second)
    for table in (high, scale, shift):
        clear(ahead(table, C), room - C)


@lru_cache(None)
def _columns_forward(kind: str, act: int, V: int) -> Task:
    T = computed(kind)
    args = layout(f"int64 {T}**2 int64*2 {T}**2 int64*9 float64")

    def group_norm_columns(address: int, index: int, scratch: int) -> None:
        """Images of y. Where they have several parts, in three phases: sums of a part, statistics and tables
        of an image, y of a part."""
        (
            _, weight, bias, x_, y_, means, rstds, memory, N, parts, C, L, groups, channels, room, past, eps,
        ) = unpack(address, args)  # fmt: skip
        x, y = vectors.elements(x_, kind), vectors.elements(y_, kind)
        phase, image, part = 0, index, 0
        if parts > 1:
            if index < N * parts:
                image, part = index // parts, index % parts
            elif index < N * parts + N:
                phase, image = 1, index - N * parts
                wait(address, N * parts)
            else:
                phase, index = 2, index - N * parts - N
                image, part = index // parts, index % parts
                wait(address, N * parts + N)
        base = memory + image * _image_bytes(room, parts) if parts > 1 else scratch
        high = pointer(base, T)
        sums = pointer(base + 48 * room, "float64")
        place = ahead(x, image * L * C)
        start, stop = L * part // parts, L * (part + 1) // parts
        if phase == 0:
            # Each part finds the same numbers near the means; the first one's are kept.
            near = high if part == 0 else pointer(scratch, T)
            mine = ahead(sums, 2 * part * room)
            _image_sums(V, kind, place, C, L, channels, start, stop - start, near, mine, room)
        if phase == 1 or parts == 1:
            _gather_parts(sums, parts, room)
            _image_tables(
                V, kind, T, place, C, L, channels, weight, bias, eps, ahead(means, image * groups),
                ahead(rstds, image * groups), base, room,
            )  # fmt: skip
        if phase == 2 or parts == 1:
            at = (image * L + start) * C
            norm_vectors.normalise(
                V, kind, act, True, ahead(x, at), vectors.elements(0, kind), ahead(y, at), stop - start, C, C,
                high, ahead(high, room), ahead(high, 2 * room), past,
            )  # fmt: skip
        if parts > 1:
            done(address)

    return Task(group_norm_columns, args, in_order=True)


@routine
def _image_back_tables(V, kind, T, x, C, L, channels, weight, bias, means, rstds, base, room):
    """Tables of an image for its backward, and what its means lack."""
    high = pointer(base, T)
    scale, shift = ahead(high, room), ahead(high, 2 * room)
    lows = pointer(base + 40 * room, "float64")
    first = ahead(lows, room)
    far = False
    for i in range(C):
        high[i], lows[i] = means[i // channels], means[i // channels]
        far = far or abs(lows[i]) * rstds[i // channels] > FAR
    clear(first, 2 * room)
    if far:
        norm_vectors.moments(V, kind, True, True, x, L, C, C, lows, first, ahead(first, room))
    for c in range(0, C, channels):
        low = 0.0
        for i in range(c, c + channels):
            low += first[i]
        rstd = np.float64(rstds[c // channels])
        for i in range(c, c + channels):
            lows[i] = low / (channels * L)
            factor = _gamma(weight, i) * rstd
            scale[i], shift[i] = factor, _shift(bias, i, lows[i], factor)
    for t in range(5):
        clear(ahead(high, t * room + C), room - C)


@routine
def _image_constants(T, C, L, channels, weight, rstds, base, room, to_weight, to_bias):
    """a and b of an image from its sums, and what these add to the gradients of gamma and beta."""
    a = pointer(base, T)
    a, b = ahead(a, 3 * room), ahead(a, 4 * room)
    lows = pointer(base + 40 * room, "float64")
    first = ahead(lows, room)
    second = ahead(first, room)
    for c in range(0, C, channels):
        rstd, low = np.float64(rstds[c // channels]), lows[c]
        sum1, sum2 = 0.0, 0.0
        for i in range(c, c + channels):
            gamma = _gamma(weight, i)
            sum1 += first[i] * gamma
            sum2 += second[i] * gamma
        if given(to_weight):
            for i in range(c, c + channels):
                to_weight[i] += (second[i] - low * first[i]) * rstd
                to_bias[i] += first[i]
        D = channels * L
        of_a, of_b = _constants(sum1 / D, sum2 / D, low, rstd)
        for i in range(c, c + channels):
            a[i], b[i] = of_a, of_b


@lru_cache(None)
def _columns_backward(kind: str, act: int, V: int) -> Task:
    T = computed(kind)
    waits = norm_vectors.may_wait(kind, ACTIVATIONS[act], _ALONE)
    form = norm_vectors.READY if waits else _ALONE
    args = layout(f"int64*4 {T}**4 float64* {T}**2 int64*11")

    def group_norm_columns_backward(address: int, index: int, scratch: int) -> None:
        """`each` images of grad_x, and what they add to the sums; then these. Where images have several
        parts, in phases: tables of an image, sums of a part, constants of an image, grad_x of a part."""
        (
            _, grad_y_, x_, grad_x_, weight, bias, means, rstds, partial, grad_weight, grad_bias,
            memory, N, each, tasks, parts, C, L, groups, channels, room, past,
        ) = unpack(address, args)  # fmt: skip
        grad_y, x = vectors.elements(grad_y_, kind), vectors.elements(x_, kind)
        grad_x, none = vectors.elements(grad_x_, kind), vectors.elements(0, kind)
        grad_z, source = (grad_x, grad_x) if waits else (none, grad_y)
        phase, first_image, end, part = 0, index * each, min(index * each + each, N), 0
        if parts > 1:
            # Phases of an image and of its parts take turns.
            before = 0
            for step in range(4):
                count = N * parts if step % 2 == 1 else N
                if step < 3 or grad_x_ != 0:
                    if index >= before + count:
                        phase, before = step + 1, before + count
                    else:
                        break
                else:
                    phase = 4
            if before > 0:
                wait(address, before if phase < 4 else 2 * N + N * parts)
            index -= before
            first_image = index // parts if phase % 2 == 1 else index
            end, part = first_image + 1, index % parts if phase % 2 == 1 else 0
        elif index >= tasks:
            phase = 4
            wait(address, tasks)
            index -= tasks
        if phase == 4:
            _add_parts(partial, tasks, C, index, grad_weight, grad_bias, scratch)
            return
        to_weight = ahead(partial, 2 * (first_image // each) * C)
        to_bias = ahead(to_weight, C)
        if given(partial) and phase == 0:
            clear(to_weight, 2 * C)
        if not given(partial):
            to_weight = partial
        for image in range(first_image, end):
            base = memory + image * _image_bytes(room, parts) if parts > 1 else scratch
            high = pointer(base, T)
            scale, shift = ahead(high, room), ahead(high, 2 * room)
            sums = pointer(base + 48 * room, "float64")
            place = ahead(x, image * L * C)
            of_image = ahead(rstds, image * groups)
            at, places = (
                (image * L + L * part // parts) * C,
                L * (part + 1) // parts - L * part // parts,
            )
            if phase == 0:
                _image_back_tables(
                    V, kind, T, place, C, L, channels, weight, bias, ahead(means, image * groups), of_image,
                    base, room,
                )  # fmt: skip
            if phase == 1 or parts == 1:
                mine = ahead(sums, 2 * part * room)
                clear(mine, 2 * room)
                norm_vectors.back_sums(
                    V, kind, act, _ALONE, True, ahead(grad_y, at), ahead(x, at), none,
                    beyond(grad_z, at), none, places, C, C, high, scale, shift, mine, ahead(mine, room), 0,
                )  # fmt: skip
            if phase == 2 or parts == 1:
                _gather_parts(sums, parts, room)
                _image_constants(
                    T, C, L, channels, weight, of_image, base, room, to_weight, to_bias
                )
            if grad_x_ != 0 and (phase == 3 or parts == 1):
                norm_vectors.back_combine(
                    V, kind, act, form, True, ahead(source, at), ahead(x, at), none, none,
                    ahead(grad_x, at), places, C, C, high, scale, shift, ahead(high, 3 * room),
                    ahead(high, 4 * room), past,
                )  # fmt: skip
        done(address)

    return Task(group_norm_columns_backward, args, in_order=True)


# ---- rows -------------------------------------------------------------------------------------------------


@lru_cache(None)
def _rows_forward(kind: str, act: int, V: int) -> Task:
    T = computed(kind)
    real = np.float64 if T == "float64" else np.float32
    args = layout(f"{T}**2 int64*2 {T}**2 int64*5 float64")

    def group_norm_rows(address: int, index: int, scratch: int) -> None:
        """The groups ``index * each …`` of y, mean and rstd."""
        (
            weight, bias, x_, y_, means, rstds, rows, each, groups, D, past, eps,
        ) = unpack(address, args)  # fmt: skip
        x, y = vectors.elements(x_, kind), vectors.elements(y_, kind)
        table, about = pointer(scratch, T), pointer(scratch + 32, "float64")
        sums, share = pointer(scratch + 64, "float64"), 1 / D
        for r in range(index * each, min(index * each + each, rows)):
            row = ahead(x, r * D)
            mean, var = _moments(V, kind, row, D, share, table, about, sums)
            rstd = 1 / math.sqrt(var + eps)
            means[r], rstds[r] = mean, rstd
            c0, high = r % groups * D, real(mean)
            norm_vectors.normalise_row(
                V, kind, act, row, ahead(y, r * D), D, ahead(weight, c0), ahead(bias, c0), high,
                real(rest_of(mean, high) * rstd), real(rstd), past,
            )  # fmt: skip

    return Task(group_norm_rows, args)


@routine
def _row_sums(
    V, kind, act, grad_y, x, count, weight, bias, high, low, rstd, sums, of_weight, of_bias
):
    """``sum(gamma * grad_z)`` and ``sum(gamma * grad_z * (x - high))`` of a row; see `row_back_sums`."""
    clear(sums, 2)
    longest = norm_vectors.VECTORS * V
    for c in range(0, count, longest):
        step = c if given(of_weight) else 0
        norm_vectors.row_back_sums(
            V, kind, act, ahead(grad_y, c), ahead(x, c), min(longest, count - c), ahead(weight, c),
            ahead(bias, c), high, low, rstd, sums, ahead(sums, 1), ahead(of_weight, step),
            ahead(of_bias, step),
        )  # fmt: skip
    return sums[0], sums[1]


@lru_cache(None)
def _rows_backward(kind: str, act: int, V: int) -> Task:
    T = computed(kind)
    real = np.float64 if T == "float64" else np.float32
    args = layout(f"int64*4 {T}**5 float64* {T}**2 int64*8")

    def group_norm_rows_backward(address: int, index: int, scratch: int) -> None:
        """grad_x of some images, and what they add to the sums; then these. `lows`, where given, gets what
        the means lack, as parts of the deviation."""
        (
            _, grad_y_, x_, grad_x_, weight, bias, means, rstds, lows, partial, grad_weight, grad_bias,
            N, each, parts, groups, D, C, room, past,
        ) = unpack(address, args)  # fmt: skip
        if index >= parts:
            wait(address, parts)
            _add_parts(partial, parts, C, index - parts, grad_weight, grad_bias, scratch)
            return
        grad_y, x = vectors.elements(grad_y_, kind), vectors.elements(x_, kind)
        grad_x = vectors.elements(grad_x_, kind)
        about = pointer(scratch, "float64")
        sums = pointer(scratch + 64, "float64")
        of_weight = pointer(scratch + 64 + 16 * V if given(partial) else 0, T)
        of_bias = ahead(of_weight, room if given(partial) else 0)
        to_weight = ahead(partial, 2 * index * C)
        start, stop = index * each, min(index * each + each, N)
        for group in range(groups):
            c0 = group * D
            for first_image in range(start, stop, PIECE):
                if given(partial):
                    clear(of_weight, 2 * room)
                for image in range(first_image, min(first_image + PIECE, stop)):
                    r = image * groups + group
                    at, high, rstd = r * D, means[r], rstds[r]
                    low = _lacking(V, kind, ahead(x, at), D, high, np.float64(rstd), about, sums)
                    part = real(low * rstd)
                    if given(lows):
                        lows[r] = part
                    sum1, sum2 = _row_sums(
                        V, kind, act, ahead(grad_y, at), ahead(x, at), D, ahead(weight, c0), ahead(bias, c0),
                        high, part, rstd, sums, of_weight, of_bias,
                    )  # fmt: skip
                    if grad_x_ != 0:
                        a, b = _constants(sum1 / D, sum2 / D, low, np.float64(rstd))
                        norm_vectors.row_back_combine(
                            V, kind, act, ahead(grad_y, at), ahead(x, at), ahead(grad_x, at), D,
                            ahead(weight, c0), ahead(bias, c0), high, part, rstd, real(a), real(b), past,
                        )  # fmt: skip
                if given(partial):
                    for which in range(2):
                        to = ahead(to_weight, which * C + c0)
                        some = ahead(of_weight, which * room)
                        if first_image == start:
                            for i in range(D):
                                to[i] = some[i]
                        else:
                            for i in range(D):
                                to[i] += some[i]
        done(address)

    return Task(group_norm_rows_backward, args, in_order=True)


@lru_cache(None)
def _parameters(kind: str, act: int, V: int) -> Task:
    T = computed(kind)
    args = layout(f"int64*2 {T}**7 int64*4")

    def group_norm_parameters(address: int, index: int, scratch: int) -> None:
        """Gradients of STRETCH values of gamma and beta, for rows so long that parts of sums would not be
        small beside x."""
        (
            grad_y_, x_, weight, bias, means, lows, rstds, grad_weight, grad_bias,
            N, groups, channels, blocks,
        ) = unpack(address, args)  # fmt: skip
        grad_y, x = vectors.elements(grad_y_, kind), vectors.elements(x_, kind)
        group, c = index // blocks, index % blocks * STRETCH
        n, c0 = min(STRETCH, channels - c), index // blocks * channels + index % blocks * STRETCH
        sums = pointer(scratch, "float64")
        total_weight = ahead(sums, 2 * V)
        total_bias = ahead(total_weight, STRETCH)
        of_weight = pointer(scratch + 16 * (V + STRETCH), T)
        of_bias = ahead(of_weight, STRETCH)
        clear(total_weight, 2 * STRETCH)
        for first_image in range(0, N, PIECE):
            clear(of_weight, 2 * STRETCH)
            for image in range(first_image, min(first_image + PIECE, N)):
                r = image * groups + group
                at = r * channels + c
                _row_sums(
                    V, kind, act, ahead(grad_y, at), ahead(x, at), n, ahead(weight, c0), ahead(bias, c0),
                    means[r], lows[r], rstds[r], sums, of_weight, of_bias,
                )  # fmt: skip
            for i in range(2 * STRETCH):
                total_weight[i] += of_weight[i]
        for i in range(n):
            if given(grad_weight):
                grad_weight[c0 + i] = total_weight[i]
            if given(grad_bias):
                grad_bias[c0 + i] = total_bias[i]

    return Task(group_norm_parameters, args)


# ---- operations -------------------------------------------------------------------------------------------


class _Numbers(NamedTuple):
    """Images, groups, channels of a group, and places of a channel. A row is an image of one group."""

    N: int
    groups: int
    channels: int
    L: int

    @classmethod
    def of(cls, shape: GroupShape | LayerShape) -> _Numbers:
        if isinstance(shape, LayerShape):
            return cls(shape.N, 1, shape.D, 1)
        return cls(shape.N, shape.groups, shape.C // shape.groups, shape.L)

    @property
    def C(self) -> int:
        return self.groups * self.channels

    @property
    def D(self) -> int:
        return self.channels * self.L

    @property
    def parts(self) -> int:
        """Parts of an image in channels-last memory."""
        if self.N >= FEW:
            return 1
        return max(1, min(-(-2 * FEW // self.N), self.C * self.L // PLACES))

    def each(self, blocks: int = 1, least: int = 1) -> int:
        """Images of a task that leaves sums for gamma and beta behind."""
        return max(-(-self.N // max(1, TASKS // blocks)), min(least, self.N))


def _together(shape: GroupShape | LayerShape, result: torch.Tensor) -> bool:
    """Whether to work on memory where channels are neighbours, as they are in `result`."""
    if isinstance(shape, LayerShape) or shape.L == 1 or result.is_contiguous():
        return False
    return is_laid(result, True)


@lru_cache(64)
def _ones(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(count, dtype=dtype)


def _affine(
    size: int, dtype: torch.dtype, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gamma and beta where kernels read them from memory: ones and zeros for those that are not there."""
    return (
        _ones(size, dtype) if weight is None else weight,
        zeros(size, dtype) if bias is None else bias,
    )


def _forward(
    shape: GroupShape | LayerShape, x: torch.Tensor, weight: torch.Tensor | None,
    bias: torch.Tensor | None, eps: float, activation: str, y: torch.Tensor, mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:  # fmt: skip
    together = _together(shape, y)
    x = laid(x, together)
    kind, dtype = kind_of(x)
    weight, bias = vector_of(weight, dtype), vector_of(bias, dtype)
    found = [vector_of(t, dtype) for t in (mean, rstd)]
    result = result_like(y, x.dtype, together)
    n = _Numbers.of(shape)
    act, V = ACTIVATIONS.index(activation), simd.lanes(NAME[dtype])
    past, work = x.nbytes >= simd.PAST, 2.0 * n.N * n.C * n.L
    rows, each = n.N * n.groups, max(1, 4096 // n.D)
    ends = x, result, *found
    if together:
        room, parts = up(n.C, V), n.parts
        size = _image_bytes.py_func(room, parts)
        memory = Shared(n.N * size) if parts > 1 else None
        _columns_forward(kind, act, V).run(
            n.N if parts == 1 else n.N * (2 * parts + 1), work, 0, weight, bias, *ends, memory,
            n.N, parts, n.C, n.L, n.groups, n.channels, room, past, eps, scratch_bytes=size,
        )  # fmt: skip
    elif n.L > 1:
        _planes_forward(kind, act, V).run(
            -(-rows // each), work, weight, bias, *ends, rows, each, n.groups, n.channels, n.D, n.L, past,
            eps, scratch_bytes=64 + 16 * V,
        )  # fmt: skip
    else:
        _rows_forward(kind, act, V).run(
            -(-rows // each), work, *_affine(n.C, dtype, weight, bias), *ends, rows, each, n.groups, n.D,
            past, eps, scratch_bytes=64 + 16 * V,
        )  # fmt: skip
    deliver((result, y), *zip(found, (mean, rstd), strict=True))


def _backward(
    shape: GroupShape | LayerShape, grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
    bias: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor, activation: str,
    grad_x: torch.Tensor | None, grad_weight: torch.Tensor | None, grad_bias: torch.Tensor | None,
) -> None:  # fmt: skip
    together = _together(shape, x if grad_x is None else grad_x)
    grad_y, x = laid(grad_y, together), laid(x, together)
    if grad_y.dtype != x.dtype:
        grad_y = grad_y.to(x.dtype)
    kind, dtype = kind_of(x)
    weight, bias = vector_of(weight, dtype), vector_of(bias, dtype)
    asked = (grad_x, grad_weight, grad_bias)
    grads = [_own_or_new(t, dtype) for t in asked[1:]]
    statistics = [vector_of(t, dtype) for t in (mean, rstd)]
    result = result_like(grad_x, x.dtype, together)
    n = _Numbers.of(shape)
    act, V = ACTIVATIONS.index(activation), simd.lanes(NAME[dtype])
    past, work = x.nbytes >= simd.PAST, 4.0 * n.N * n.C * n.L
    past = past and not norm_vectors.may_wait(kind, activation, _ALONE)
    adding = grads != [None, None]
    totals = -(-n.C // SPAN) if adding else 0

    def sums(parts: int) -> Shared | None:
        return Shared(16 * parts * n.C) if adding else None

    if together:
        room, parts = up(n.C, V), n.parts
        each = n.each() if parts == 1 else 1
        tasks = -(-n.N // each)
        size = _image_bytes.py_func(room, parts)
        added = 16 * tasks * n.C if adding else 0
        shared = Shared(added + (n.N * size if parts > 1 else 0))
        count = tasks if parts == 1 else n.N * (2 + parts * (1 if result is None else 2))
        _columns_backward(kind, act, V).run(
            count + totals, work, 0, grad_y, x, result, weight, bias, *statistics, shared if adding else None,
            *grads, At(shared, added), n.N, each, tasks, parts, n.C, n.L, n.groups, n.channels, room, past,
            scratch_bytes=max(size, 8 * SPAN),
        )  # fmt: skip
    elif n.L > 1:
        side = max(1, 4096 // n.D)
        blocks = -(-n.groups // side)
        each = n.each(blocks)
        parts = -(-n.N // each)
        _planes_backward(kind, act, V).run(
            parts * blocks + totals, work, 0, grad_y, x, result, weight, bias, *statistics, sums(parts),
            *grads, n.N, each, parts, n.groups, blocks, side, n.channels, n.C, n.L, past,
            scratch_bytes=max(128 + 16 * V, 8 * SPAN),
        )  # fmt: skip
    else:
        affine = _affine(n.C, dtype, weight, bias)
        long = n.C > LONG
        lows = Shared(mean.numel() * dtype.itemsize) if long else None
        each, room = n.each(1, 1 if long else PIECE), up(n.D, V)
        parts = -(-n.N // each)
        _rows_backward(kind, act, V).run(
            parts + (0 if long else totals), work, 0, grad_y, x, result, *affine, *statistics, lows,
            None if long else sums(parts), *grads, n.N, each, parts, n.groups, n.D, n.C, room, past,
            scratch_bytes=max(64 + 16 * V + (0 if long else 16 * room), 8 * SPAN),
        )  # fmt: skip
        if long and adding:
            blocks = -(-n.channels // STRETCH)
            _parameters(kind, act, V).run(
                n.groups * blocks, work / 2, grad_y, x, *affine, statistics[0], lows, statistics[1], *grads,
                n.N, n.groups, n.channels, blocks, scratch_bytes=16 * V + 32 * STRETCH,
            )  # fmt: skip
    deliver(*zip((result, *grads), asked, strict=True))


def _own_or_new(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Where kernels write what becomes `t`: `t` itself if its type and order allow it."""
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return torch.empty(t.shape, dtype=dtype)


def group_norm_fwd(
    shape: GroupShape, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
    activation: str, y: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
) -> None:  # fmt: skip
    """y, and the statistics it was computed by."""
    _forward(shape, x, weight, bias, eps, activation, y, mean, rstd)


def group_norm_bwd(
    shape: GroupShape, grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
    bias: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor, activation: str,
    grad_x: torch.Tensor | None, grad_weight: torch.Tensor | None, grad_bias: torch.Tensor | None,
) -> None:  # fmt: skip
    """Every gradient that is asked for."""
    _backward(
        shape, grad_y, x, weight, bias, mean, rstd, activation, grad_x, grad_weight, grad_bias
    )


def layer_norm_fwd(
    shape: LayerShape, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
    y: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
) -> None:  # fmt: skip
    """y, and the statistics it was computed by."""
    _forward(shape, x, weight, bias, eps, "none", y, mean, rstd)


def layer_norm_bwd(
    shape: LayerShape, grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
    mean: torch.Tensor, rstd: torch.Tensor, grad_x: torch.Tensor | None, grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
) -> None:  # fmt: skip
    """Every gradient that is asked for."""
    _backward(shape, grad_y, x, weight, None, mean, rstd, "none", grad_x, grad_weight, grad_bias)
