"""Direct convolution, all three passes and the bias: `kernels/conv_direct.cu` explains the arithmetic.

What this file decides, once a problem: the spatial axes as the kernel sees them (`_canonical`), in which
direction each operand is read and whether by 16 bytes (`_packs`), the tile and the number of parts of a
long sum (`_tiled`, `_thin`: both by arithmetic, never by timing), and from these the launches.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from cnnops.cuda.kernel import ACCUMULATOR, ELEMENT, INT32_MAX, FastDiv, Launch, launch_of
from cnnops.cuda.launch import launch
from cnnops.shapes import Axes, ConvShape, NormShape, PoolShape


@dataclass(frozen=True)
class Tile:
    """A block's share of the product: block_m x block_n results, block_k terms of their sums at a time;
    thread_m x thread_n results a thread; registers are budgeted for `resident` blocks on a multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    thread_m: int
    thread_n: int
    resident: int

    @property
    def threads(self) -> int:
        return self.block_m // self.thread_m * (self.block_n // self.thread_n)

    def issue_slots(self, gather_vector: int, plain_vector: int) -> float:
        """Instructions that one thread issues for one step of block_k: products, shared memory, fetching."""
        products = self.block_k * self.thread_m * self.thread_n
        shared = self.block_k * (self.thread_m + self.thread_n) / 4
        gathered = self.block_m * self.block_k / self.threads
        plain = self.block_n * self.block_k / self.threads
        return (
            products
            + shared
            + gathered * (2 + 10 / gather_vector)
            + plain * (2 + 5 / plain_vector)
            + 16
        )


TILES = {
    "float": (
        Tile(128, 128, 8, 16, 8, resident=2),
        Tile(128, 64, 8, 8, 8, resident=3),
        Tile(64, 64, 16, 8, 4, resident=4),
        Tile(128, 32, 16, 8, 4, resident=4),
        Tile(32, 32, 16, 4, 2, resident=4),
        Tile(16, 64, 16, 2, 4, resident=4),
        Tile(128, 16, 16, 4, 4, resident=4),
        Tile(256, 8, 8, 4, 4, resident=4),
        Tile(128, 4, 16, 4, 1, resident=4),
    ),
    "double": (
        Tile(64, 64, 8, 4, 4, resident=2),
        Tile(32, 32, 16, 4, 2, resident=4),
        Tile(128, 8, 16, 4, 2, resident=4),
    ),
}
"""By accumulator: a double takes two registers, so its tiles are smaller."""

SMS = 132
"""Multiprocessors a choice is made for (an H100's). Fixed, so that results do not depend on the GPU."""

THIN_CHANNELS = 4
"""Groups of at most this many channels on either side take the form without shared memory."""
THIN_THREADS = 128
THIN_SUMS = {"float": 56, "double": 30}
"""Most partial sums that a thread of conv_wgrad_thin keeps."""
THIN_TAPS = 5
"""Most taps of the last axis that stand unrolled in conv_fprop_thin and conv_dgrad_thin."""

REDUCE_LANES = ((8, 256), (64, 32), (INT32_MAX, 8))
"""Of the second pass's 256 threads, how many stand side by side, by the most parts they add up."""

PARTIAL_BYTES = 64 * 2**20
"""Most memory for the partial results of a split sum."""

FAR = 2**30
"""Coordinates stay below this (the kernel marks places that do not exist with it)."""


def supports(op: str, shape: ConvShape | PoolShape | NormShape, dtype: torch.dtype) -> str | None:
    """None, or why the problem is refused: a type without kernels, or a number that leaves 31 bits."""
    if not isinstance(shape, ConvShape):
        return "not a convolution"
    if dtype not in ELEMENT:
        return f"dtype {dtype}: expected one of {', '.join(str(d) for d in ELEMENT)}"
    strided = [-(-h // s) for h, s in zip(shape.spatial, shape.stride, strict=True)]
    largest = max(
        shape.N * math.prod(shape.output),
        shape.N * math.prod(strided),
        max(shape.C, shape.K) // shape.groups * math.prod(shape.kernel),
    )
    if largest >= 2**31 - 2**16:
        return f"{largest} places or filter entries: expected fewer than 2^31 - 2^16"
    span = max(
        h + a + b + r * k + s
        for h, (a, b), r, k, s in zip(
            shape.spatial, shape.padding, shape.dilation, shape.kernel, shape.stride, strict=True
        )
    )
    if span >= FAR:
        return f"padded size {span}: expected less than 2^30"
    return None


# ---- the kernel's structures ---------------------------------------------------------------------------


class _Strides(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("axis", ctypes.c_int64 * 3),
    ]


class _FilterStrides(ctypes.Structure):
    _fields_ = [
        ("group", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("tap", ctypes.c_int64 * 3),
    ]


class _Params(ctypes.Structure):
    """``struct Params`` of conv_direct.cu."""

    _fields_ = [
        ("source", _Strides),
        ("result", _Strides),
        ("filter", _FilterStrides),
        ("bias", ctypes.c_int64),
        ("numel", ctypes.c_int64),
        ("count", FastDiv * 3),
        ("channels", FastDiv),
        ("tiles", FastDiv),
        ("groups", FastDiv),
        ("phases", FastDiv),
        ("splits", FastDiv),
        ("size", ctypes.c_int32 * 3),
        ("limit", ctypes.c_int32 * 3),
        ("taps", ctypes.c_int32 * 3),
        ("stride", ctypes.c_int32 * 3),
        ("dilation", ctypes.c_int32 * 3),
        ("pad", ctypes.c_int32 * 3),
        ("reach", ctypes.c_int32 * 3),
        ("tap_step", ctypes.c_int32 * 3),
        ("places", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
    ]


# ---- the problem as the kernel sees it -------------------------------------------------------------------

Digits = list[tuple[int, int]]
"""An index as (extent, stride) digits, fastest first: how far each of them moves in a tensor."""


class _Axis(NamedTuple):
    """One spatial axis: sizes, the filter's movement along it, and its strides in x, y and w."""

    size: int
    out: int
    taps: int
    stride: int
    pad: tuple[int, int]
    dilation: int
    x: int
    y: int
    w: int

    @property
    def pointwise(self) -> bool:
        return self.taps == 1 and self.stride == 1 and self.pad == (0, 0)


@dataclass(frozen=True)
class _Key:
    """All that decides a plan: sizes, type, strides, and whether each tensor begins on 16 bytes."""

    op: str
    shape: ConvShape
    dtype: torch.dtype
    strides: tuple[Axes, Axes, Axes]  # of x, w, y or their gradients
    aligned: tuple[bool, bool, bool]
    bias: int  # its stride


@dataclass(frozen=True)
class _Plan:
    """One launch, or two with `partial` accumulators in between."""

    first: Launch
    second: Launch | None = None
    partial: int = 0


def _canonical(shape: ConvShape, x: Axes, w: Axes, y: Axes) -> tuple[_Axis, ...]:
    """The spatial axes, slowest first, without those that can be left out (one stays).

    An axis of size one goes; neighbours that a filter of one tap visits place by place become one axis
    where they are one in memory, so that a 1x1 convolution of a dense tensor has a single axis.
    """
    axes: list[_Axis] = []
    for row in zip(
        shape.spatial, shape.output, shape.kernel, shape.stride, shape.padding, shape.dilation,
        x[2:], y[2:], w[2:], strict=True,
    ):  # fmt: skip
        axis = _Axis(*row)
        if axis.size == axis.out == axis.taps == 1 and axis.pad == (0, 0):
            continue
        slower = axes[-1] if axes else axis
        if (
            axes
            and slower.pointwise
            and axis.pointwise
            and (slower.x, slower.y) == (axis.size * axis.x, axis.out * axis.y)
        ):
            axes[-1] = axis._replace(size=slower.size * axis.size, out=slower.out * axis.out)
        else:
            axes.append(axis)
    return tuple(axes) or (_Axis(1, 1, 1, 1, (0, 0), 1, 1, 1, 1),)


def _packs(width: int, along: Digits, others: Digits, aligned: bool) -> int:
    """`width` if every `width` neighbours of the index `along`, counted from a multiple of it, are
    neighbours in memory on a boundary of their size, wherever the `others` move them; else 1.
    """
    moving = [(extent, stride) for extent, stride in along if extent > 1]
    run = 1
    while moving and moving[0][1] == run:
        run *= moving.pop(0)[0]
    offsets = moving + [(extent, stride) for extent, stride in others if extent > 1]
    return width if aligned and run % width == 0 and all(s % width == 0 for _, s in offsets) else 1


def _leading(digits: Digits) -> float:
    """How far apart in memory neighbours of an index are."""
    return next((stride for extent, stride in digits if extent > 1), math.inf)


class _Problem:
    """A key's tensors in the kernel's roles, as digits of the kernel's indices.

    Roles: `source` is gathered (x; dgrad: grad_y), `result` holds the places (y; dgrad: grad_x), `filter`.
    Indices: a place of the result; an entry (channel, taps) of the filter; a row, which is a channel of
    the result.
    """

    def __init__(self, key: _Key) -> None:
        shape, dgrad = key.shape, key.op == "dgrad"
        x, w, y = key.strides
        source, result = (y, x) if dgrad else (x, y)
        c, k = shape.C // shape.groups, shape.K // shape.groups
        self.key, self.dgrad, self.groups = key, dgrad, shape.groups
        self.width = 16 // key.dtype.itemsize
        self.source_aligned, self.filter_aligned, self.result_aligned = (
            key.aligned[2 if dgrad else 0], key.aligned[1], key.aligned[0 if dgrad else 2],
        )  # fmt: skip
        self.axes = axes = _canonical(shape, x, w, y)
        self.channels, self.outputs = (k, c) if dgrad else (c, k)
        row, channel = (w[1], w[0]) if dgrad else (w[0], w[1])

        p = self.params = _Params()
        p.channels, p.groups = FastDiv(self.channels), FastDiv(shape.groups)
        p.source.batch, p.source.channel, p.source.group = (
            source[0],
            source[1],
            self.channels * source[1],
        )
        p.result.batch, p.result.channel, p.result.group = (
            result[0],
            result[1],
            self.outputs * result[1],
        )
        p.filter.group, p.filter.row, p.filter.channel = k * w[0], row, channel
        p.bias, p.outputs = key.bias, self.outputs
        self.source_places: Digits = []
        self.result_places: Digits = []
        self.source_taps: Digits = []
        self.filter_taps: Digits = []
        self.source_axes: Digits = []
        self.corners: Digits = []  # of phases
        self.phases = 1
        self.most_taps: list[int] = []
        for i, a in reversed(list(enumerate(axes))):
            common = math.gcd(a.stride, a.dilation)
            tap_step, reach = (
                (a.stride // common, -(a.dilation // common)) if dgrad else (1, a.dilation)
            )
            count = -(-a.size // a.stride) if dgrad else a.out
            from_, to = (a.y, a.x) if dgrad else (a.x, a.y)
            size, limit = (a.out, a.size) if dgrad else (a.size, a.out)
            p.count[i], p.size[i], p.limit[i] = FastDiv(count), size, limit
            p.taps[i], p.stride[i], p.dilation[i], p.pad[i] = a.taps, a.stride, a.dilation, a.pad[0]
            p.reach[i], p.tap_step[i] = reach, tap_step
            p.source.axis[i], p.result.axis[i], p.filter.tap[i] = from_, to, a.w
            self.source_places.append((count, from_ * (1 if dgrad else a.stride)))
            self.result_places.append((count, to * (a.stride if dgrad else 1)))
            self.source_taps.append((a.taps, reach * from_))
            self.filter_taps.append((a.taps, a.w))
            self.source_axes.append((size, from_))
            self.corners.append((a.stride if dgrad else 1, to))
            self.phases *= self.corners[-1][0]
            self.most_taps.insert(0, -(-a.taps // tap_step))
        self.places = shape.N * math.prod(extent for extent, _ in self.source_places)
        self.entries = self.channels * math.prod(a.taps for a in axes)
        self.source_places.append((shape.N, source[0]))
        self.result_places.append((shape.N, result[0]))
        p.places, p.phases = self.places, FastDiv(self.phases)
        p.tiles, p.splits = FastDiv(1), FastDiv(1)

        self.source_channel: Digits = [(self.channels, source[1])]
        self.result_row: Digits = [(self.outputs, result[1])]
        self.filter_channel: Digits = [(self.channels, channel)]
        self.filter_row: Digits = [(self.outputs, row)]
        self.source_group: Digits = [(shape.groups, self.channels * source[1])]
        self.result_group: Digits = [(shape.groups, self.outputs * result[1])]
        self.filter_group: Digits = [(shape.groups, k * w[0])]

    def constants(self, pass_: str, result: str) -> dict[str, str | int]:
        """Those that every form has; `result` is the element type of what the entry writes."""
        dtype = self.key.dtype
        return {
            "PASS": pass_, "DIMS": len(self.axes), "WIDE": int(self.wide()),
            "ELEMENT": ELEMENT[dtype], "ACCUMULATOR": ACCUMULATOR[dtype], "RESULT": result,
        }  # fmt: skip

    def wide(self) -> bool:
        """Whether an offset may leave 31 bits: taps in the padding and padded phases counted in."""
        pads = [
            (a.pad[0] + a.pad[1] + a.dilation * a.taps + 2 * a.stride, max(abs(a.x), abs(a.y)))
            for a in self.axes
        ]
        return any(
            sum((extent - 1) * abs(stride) for extent, stride in digits) >= 2**31
            for digits in (
                self.source_places
                + self.source_channel
                + self.source_group
                + self.source_axes
                + pads,
                self.result_places + self.result_row + self.result_group + self.corners + pads,
                self.filter_taps + self.filter_row + self.filter_channel + self.filter_group,
            )
        )


# ---- plans -----------------------------------------------------------------------------------------------

_TENSORS = {
    "fprop": (("x", "w", "bias"), "y"),
    "dgrad": (("grad_y", "w"), "grad_x"),
    "wgrad": (("grad_y", "x"), "grad_w"),
    "bgrad": (("grad_y",), "grad_bias"),
}


def _plan_of(
    p: _Problem,
    form: str,
    constants: dict[str, str | int],
    blocks: int,
    threads: int,
    splits: int,
    numel: int,
) -> _Plan:
    """The launch of ``conv_<op>_<form>``, and the second pass where the sum comes in `splits` parts."""
    op, dtype = p.key.op, p.key.dtype
    inputs, output = _TENSORS[op]
    p.params.splits, p.params.numel = FastDiv(splits), numel
    result = ACCUMULATOR[dtype] if splits > 1 else ELEMENT[dtype]
    first = launch_of(
        "conv_direct.cu", f"conv_{op}_{form}", {**p.constants(op.upper(), result), **constants}, p.params,
        grid=(blocks,), block=(threads,), inputs=inputs, outputs=("partial" if splits > 1 else output,),
    )  # fmt: skip
    if splits == 1:
        return _Plan(first)
    params = _Params.from_buffer_copy(p.params)
    shape, y = p.key.shape, p.key.strides[2]
    params.channels = FastDiv(
        shape.K
    )  # the bias belongs to channel (element / inner) mod K of a dense y
    params.count[0] = FastDiv(1 if y[1] == 1 else math.prod(shape.output))
    lanes = next(lanes for most, lanes in REDUCE_LANES if splits <= most)
    constants = {
        **p.constants("REDUCE", ELEMENT[dtype]),
        "DIMS": 1,
        "WIDE": 0,
        "REDUCE_LANES": lanes,
    }
    second = launch_of(
        "conv_direct.cu", "conv_reduce_direct", constants, params,
        grid=(-(-numel // lanes),), block=(256,), inputs=("partial", "bias"), outputs=(output,),
    )  # fmt: skip
    return _Plan(first, second, splits * numel)


def _choose(
    tiles: Sequence[Tile],
    m: int,
    n: int,
    k: int,
    batches: int,
    vectors: tuple[int, int],
    most_splits: int,
) -> tuple[Tile, int]:
    """The tile, and into how many parts to split the sum, that free the busiest multiprocessor first.

    A multiprocessor issues four instructions a cycle if some twelve warps take turns (eight, where each has
    64 independent sums); fewer hide less of each other's waiting. A second pass costs launch and traffic.
    """

    def cycles(choice: tuple[Tile, int]) -> float:
        tile, splits = choice
        blocks = -(-m // tile.block_m) * -(-n // tile.block_n) * batches * splits
        steps = -(-k // (tile.block_k * splits))
        here, warps = -(-blocks // SMS), tile.threads // 32
        enough = 8 if tile.thread_m * tile.thread_n >= 64 else 12
        hidden = min(1.0, min(here, tile.resident) * warps / enough)
        setup = 150 + 4 * tile.thread_m * tile.thread_n
        busy = here * warps * (steps * tile.issue_slots(*vectors) + setup) / 4 / hidden
        return busy + (4000 + 8 * splits * m * n * batches / (16 * SMS) if splits > 1 else 0)

    def counts(tile: Tile) -> set[int]:
        blocks = -(-m // tile.block_m) * -(-n // tile.block_n) * batches
        filling = {SMS * rounds // blocks for rounds in range(1, 9)}
        return {1} | {s for s in filling if 1 < s <= most_splits}

    return min(((t, s) for t in tiles for s in sorted(counts(t))), key=cycles)


def _tiled(p: _Problem) -> _Plan:
    """The product through shared memory: rows x columns, summed over steps (see conv_direct.cu)."""
    wgrad, shape, width = p.key.op == "wgrad", p.key.shape, p.width
    accumulator = ACCUMULATOR[p.key.dtype]

    # Which index of the source follows memory: the channel, or the place.
    channels_fast = p.channels > 1 and p.source_channel[0][1] < _leading(p.source_places)
    gather = 1
    if channels_fast:
        elsewhere = p.source_places + p.source_axes + p.source_group
        gather = _packs(width, p.source_channel, elsewhere, p.source_aligned)
    elif all(
        a.pointwise for a in p.axes
    ):  # only then do neighbouring places read neighbours at every tap
        gather = _packs(width, p.source_places, p.source_channel + p.source_group, p.source_aligned)
    entries = (
        p.filter_channel + p.filter_taps if channels_fast else p.filter_taps + p.filter_channel
    )

    # Which index of the other operand does: the step of the sum, or the column.
    runs: Digits = []
    others: Digits = []
    if wgrad:
        steps, columns, group, aligned = (
            p.result_places,
            p.result_row,
            p.result_group,
            p.result_aligned,
        )
        runs = steps
    else:
        steps, columns, group, aligned = entries, p.filter_row, p.filter_group, p.filter_aligned
        if channels_fast:
            runs, others = p.filter_channel, p.filter_taps
        elif p.phases == 1:  # else each phase has only some of the taps
            runs = entries
    by_step = _packs(width, runs, others + columns + group, aligned)
    by_column = _packs(width, columns, steps + group, aligned)
    along_steps = by_step > 1 or (by_column == 1 and _leading(steps) <= _leading(columns))
    plain = by_step if along_steps else by_column

    m, k = (p.entries, p.places) if wgrad else (p.places, -(-p.entries // p.phases))
    batches = p.groups * p.phases
    written = {"fprop": shape.y_size, "dgrad": shape.x_size, "wgrad": shape.w_size}[p.key.op]
    numel = math.prod(written)
    size = 8 if accumulator == "double" else 4
    most_splits = max(1, min(k // 64, PARTIAL_BYTES // (numel * size)))
    tiles = [t for t in TILES[accumulator] if along_steps or t.block_n % plain == 0]
    tile, splits = _choose(tiles, m, p.outputs, k, batches, (gather, plain), most_splits)

    # Threads follow memory in the result too, and store what they own side by side in one go.
    if wgrad:
        rows, columns, group, aligned = entries, p.filter_row, p.filter_group, p.filter_aligned
    else:
        rows, columns, group, aligned = (
            p.result_places,
            p.result_row,
            p.result_group,
            p.result_aligned,
        )
        group = group + p.corners
    along_rows = _leading(rows) <= _leading(columns)
    side = min(tile.thread_m if along_rows else tile.thread_n, 16 // size)
    here, there = (rows, columns) if along_rows else (columns, rows)
    store = _packs(side, here, there + group + [(splits, numel)], aligned or splits > 1)

    constants: dict[str, str | int] = {
        "FORM": "TILED", "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "THREAD_M": tile.thread_m, "THREAD_N": tile.thread_n, "RESIDENT": tile.resident,
        "CHANNELS_FAST": int(channels_fast), "GATHER_VECTOR": gather,
        "GATHER_ALONG_STEPS": int(channels_fast != wgrad),
        "PLAIN_VECTOR": plain, "PLAIN_ALONG_STEPS": int(along_steps),
        "STORE_VECTOR": store, "STORE_ALONG_ROWS": int(along_rows),
    }  # fmt: skip
    columns_of_tiles = -(-p.outputs // tile.block_n)
    p.params.tiles = FastDiv(columns_of_tiles)
    blocks = columns_of_tiles * batches * splits * -(-m // tile.block_m)
    return _plan_of(p, "direct", constants, blocks, tile.threads, splits, numel)


def _fit(extent: int, least: int, most: int) -> int:
    """Lanes for an index: the largest power of two that leaves at most an eighth of its lanes idle, or the
    one that leaves the fewest.
    """
    powers = [1 << i for i in range(most.bit_length()) if least <= 1 << i <= most]
    covered = {n: -(-extent // n) * n for n in powers}
    good = [n for n in powers if 8 * covered[n] <= 9 * extent]
    return max(good) if good else min(powers, key=lambda n: (covered[n], -n))


def _lanes(places_fast: bool, places: int, groups: int, pack_bytes: int) -> tuple[int, int]:
    """How THIN_THREADS threads cover (groups, places): neighbours along memory, 32 bytes or more of it."""
    if places_fast:
        lanes = _fit(places, 32, THIN_THREADS)
        return THIN_THREADS // lanes, lanes
    lanes = _fit(groups, max(1, min(32 // pack_bytes, groups)), 32)
    return lanes, THIN_THREADS // lanes


def _splits(blocks: int, places: int, lanes: int, most: int) -> int:
    """Parts of a sum over places: enough blocks for every multiprocessor, enough places for every lane."""
    wanted = max(1, 8 * SMS // blocks)
    return max(1, min(wanted, places // (16 * lanes), most))


def _thin(p: _Problem) -> _Plan:
    """Few channels a group: a thread owns places of a group (wgrad: taps of a group), nothing is shared."""
    wgrad, shape = p.key.op == "wgrad", p.key.shape
    accumulator = ACCUMULATOR[p.key.dtype]
    most_taps = THIN_SUMS[accumulator] // (p.outputs * (1 + p.wide())) if wgrad else THIN_TAPS
    taps = math.prod(p.most_taps)
    vector = result_vector = 1
    if p.channels == p.outputs == 1 and not (wgrad and taps * p.width > most_taps):
        elsewhere = p.source_places + p.source_axes
        vector = _packs(p.width, p.source_group, elsewhere, p.source_aligned)
        elsewhere = p.result_places + p.corners
        result_vector = min(vector, _packs(p.width, p.result_group, elsewhere, p.result_aligned))
    # Taps that stand unrolled: a stretch of the last axis; in wgrad rows of it too, each tap having a sum.
    chunk: list[int] = []
    for n in reversed(p.most_taps):
        room = (
            max(1, most_taps // (vector if wgrad else 1) // math.prod(chunk))
            if wgrad or not chunk
            else 1
        )
        chunk.insert(
            0, max(i for i in range(1, room + 1) if n % i == 0) if chunk else -(-n // -(-n // room))
        )
    each_axis = list(zip(p.most_taps, chunk, strict=True))
    chunks = math.prod(-(-n // t) for n, t in each_axis)
    full = p.phases == 1 and all(n % t == 0 for n, t in each_axis)

    places_fast = p.groups == 1 or _leading(p.source_places) <= p.source_group[0][1]
    itemsize = p.key.dtype.itemsize
    group_lanes, lanes = _lanes(places_fast, p.places, p.groups // vector, vector * itemsize)
    tiles = -(-p.groups // (group_lanes * vector))
    p.params.tiles = FastDiv(tiles)
    constants: dict[str, str | int] = {
        "FORM": "THIN", "LANES_G": group_lanes, "LANES_P": lanes, "PLACES_FAST": int(places_fast),
        "VECTOR": vector, "RESULT_VECTOR": result_vector, "OUTPUTS": p.outputs,
        "FULL_CHUNKS": int(full),
    }  # fmt: skip
    if wgrad:
        constants |= {f"TAPS_{a}": t for a, t in enumerate([*chunk, 1, 1][:3])}
        numel, size = math.prod(shape.w_size), 8 if accumulator == "double" else 4
        blocks = tiles * p.channels * chunks
        splits = _splits(blocks, p.places, lanes, PARTIAL_BYTES // (numel * size))
        p.params.phases = FastDiv(chunks)
        return _plan_of(p, "thin", constants, blocks * splits, THIN_THREADS, splits, numel)
    registers = vector * p.outputs * (2 if accumulator == "double" else 1)
    each = max(1, min(4, 8 // registers))
    if tiles * p.phases * (p.places // (each * lanes)) < 8 * SMS:
        each = 1
    constants |= {"TAPS": chunk[-1], "PLACES": each}
    blocks = tiles * p.phases * -(-p.places // (each * lanes))
    return _plan_of(p, "thin", constants, blocks, THIN_THREADS, 1, 0)


def _bgrad(key: _Key) -> _Plan:
    """Sums of grad_y over places: lanes and packs along its contiguous axis."""
    shape, dims = key.shape, key.shape.dims
    ones, none = (1,) * dims, ((0, 0),) * dims
    shape = ConvShape(shape.N, shape.K, shape.K, shape.output, ones, ones, none, ones, shape.K)
    y = key.strides[2]
    p = _Problem(replace(key, shape=shape, strides=(y, (0,) * len(y), y)))
    channels = p.result_group
    places_fast = shape.K == 1 or _leading(p.result_places) <= channels[0][1]
    along, across = (p.result_places, channels) if places_fast else (channels, p.result_places)
    vector = _packs(p.width, along, across, p.result_aligned)
    places, groups = (p.places // vector, shape.K) if places_fast else (p.places, shape.K // vector)
    group_lanes, lanes = _lanes(places_fast, places, groups, vector * key.dtype.itemsize)
    tiles = -(-groups // group_lanes)
    splits = _splits(tiles, places, lanes, 1024)
    p.params.tiles = FastDiv(tiles)
    constants: dict[str, str | int] = {
        "LANES_G": group_lanes, "LANES_P": lanes, "PLACES_FAST": int(places_fast), "VECTOR": vector,
    }  # fmt: skip
    return _plan_of(p, "direct", constants, tiles * splits, THIN_THREADS, splits, shape.K)


@lru_cache(4096)
def _plan(key: _Key) -> _Plan:
    if key.op == "bgrad":
        return _bgrad(key)
    p = _Problem(key)
    if max(p.channels, p.outputs) <= THIN_CHANNELS:
        return _thin(p)
    return _tiled(p)


# ---- what the registry calls -----------------------------------------------------------------------------


def _run(
    op: str,
    shape: ConvShape,
    x: torch.Tensor | None,
    w: torch.Tensor | None,
    y: torch.Tensor | None,
    inputs: tuple[torch.Tensor | None, ...],
    output: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    tensors = (x, w, y)
    nothing = (0,) * (len(shape.spatial) + 2)
    key = _Key(
        op,
        shape,
        output.dtype,
        tuple(nothing if t is None else t.stride() for t in tensors),  # type: ignore[arg-type]
        tuple(t is not None and t.data_ptr() % 16 == 0 for t in tensors),  # type: ignore[arg-type]
        0 if bias is None else bias.stride(0),
    )
    plan = _plan(key)
    if plan.second is None:
        launch(plan.first, inputs, (output,))
        return
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    partial = torch.empty(plan.partial, dtype=dtype, device=output.device)
    first = (*inputs[:2], None) if op == "fprop" else inputs  # the bias is added once, to the sum
    launch(plan.first, first, (partial,))
    launch(plan.second, (partial, bias), (output,))


def conv_fprop(
    shape: ConvShape, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """Fill y ``N K *output`` with the convolution of x ``N C *spatial`` and w ``K C/groups *kernel``."""
    _run("fprop", shape, x, w, y, (x, w, bias), y, bias)


def conv_dgrad(
    shape: ConvShape, grad_y: torch.Tensor, w: torch.Tensor, grad_x: torch.Tensor
) -> None:
    """Fill grad_x ``N C *spatial``: every filter's weight on every input that it touched."""
    _run("dgrad", shape, grad_x, w, grad_y, (grad_y, w), grad_x)


def conv_wgrad(
    shape: ConvShape, grad_y: torch.Tensor, x: torch.Tensor, grad_w: torch.Tensor
) -> None:
    """Fill grad_w ``K C/groups *kernel``: the sum over all places that a weight was used at."""
    _run("wgrad", shape, x, grad_w, grad_y, (grad_y, x), grad_w)


def conv_bgrad(shape: ConvShape, grad_y: torch.Tensor, grad_bias: torch.Tensor) -> None:
    """Fill grad_bias ``K``: the sum of grad_y over images and places."""
    _run("bgrad", shape, None, None, grad_y, (grad_y,), grad_bias)
