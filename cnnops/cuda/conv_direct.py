"""Direct convolution, all three passes and the bias: `kernels/conv_direct.cu` explains the arithmetic.

What this file decides, once a problem: the spatial axes as the kernel sees them (`_canonical`), in which
direction each operand is read and whether by 16 bytes (`_packs`), the tile and the number of parts of a
long sum (`_tiled`, `_thin`: both by arithmetic, never by timing), and from these the launches. Where
`cnnops.tune` has measured the problem, its table names tile and parts (`variants`) in place of `_ranked`.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cnnops import tuned
from cnnops.cuda import batch_norm
from cnnops.cuda.kernel import ACCUMULATOR, ELEMENT, INT32_MAX, FastDiv, Launch, launch_of
from cnnops.cuda.launch import launch
from cnnops.epilogue import NO_EPILOGUE, Epilogue
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

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k}"

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

ACCUMULATOR_BYTES = {"float": 4, "double": 8}

SMS = 132
"""Multiprocessors a choice is made for (an H100's). Fixed, so that results do not depend on the GPU."""

THIN_CHANNELS = 4
"""Groups of at most this many channels on either side take the form without shared memory."""
THIN_THREADS = 128
THIN_SUMS = {"float": 56, "double": 30}
"""Most partial sums that a thread of conv_wgrad_thin keeps."""
THIN_TAPS = 5
"""Most taps of the last axis that stand unrolled in conv_fprop_thin and conv_dgrad_thin."""

VARIANTS = 12
"""Most variants of a problem that `cnnops.tune` measures beside the one that arithmetic prefers."""

REDUCE_LANES = ((8, 256), (64, 32), (INT32_MAX, 8))
"""Of the second pass's 256 threads, how many stand side by side, by the most parts they add up."""

MERGE_THREADS, MERGE_CHANNELS = 256, 32
"""Of the pass that merges moments: threads of a block, and the channels that they share."""

PARTIAL_BYTES = 64 * 2**20
"""Most memory for the partial results of a sum in parts."""

FAR = 2**30
"""Coordinates stay below this (the kernel marks places that do not exist with it), and below half of it where
the mark is told from a coordinate in the padding."""


def supports(op: str, shape: ConvShape | PoolShape | NormShape, dtype: torch.dtype) -> str | None:
    """None, or why the problem is refused: a type without kernels, a number that leaves 31 bits, or the input
    gradient of a padding mode, which takes two steps.
    """
    if not isinstance(shape, ConvShape):
        return "not a convolution"
    if dtype not in ELEMENT:
        return f"dtype {dtype}: expected one of {', '.join(str(d) for d in ELEMENT)}"
    continued = shape.padding_mode != "zeros"
    if continued and op == "conv_dgrad":
        return f"padding_mode {shape.padding_mode}: expected shape.padded, then conv_fold"
    strided = [-(-h // s) for h, s in zip(shape.spatial, shape.stride, strict=True)]
    largest = max(
        shape.N * math.prod(shape.output),
        shape.N * math.prod(strided),
        max(shape.C, shape.K) // shape.groups * math.prod(shape.kernel),
    )
    if largest >= 2**31 - 2**16:
        return f"{largest} places or filter entries: expected fewer than 2^31 - 2^16"
    span = max(
        h + abs(a) + abs(b) + r * k + s
        for h, (a, b), r, k, s in zip(
            shape.spatial, shape.padding, shape.dilation, shape.kernel, shape.stride, strict=True
        )
    )
    most = FAR // 2 if continued else FAR
    return f"padded size {span}: expected less than {most}" if span >= most else None


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


@dataclass(frozen=True)
class _Key:
    """All that decides a plan: sizes, type, strides, and whether each tensor begins on 16 bytes."""

    op: str
    shape: ConvShape
    dtype: torch.dtype
    strides: tuple[Axes, Axes, Axes]  # of x, w, y or their gradients
    aligned: tuple[bool, bool, bool]
    activation: str = "none"
    moments: bool = False  # whether fprop gathers those of its result


@dataclass(frozen=True)
class _Plan:
    """One launch, or two with `partial` accumulators in between, of the results or of their moments."""

    first: Launch
    second: Launch | None = None
    partial: int = 0
    moments: bool = False


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


def _canonical(shape: ConvShape, x: Axes, w: Axes, y: Axes) -> tuple[_Axis, ...]:
    """The spatial axes, slowest first, without those that can be left out (one stays).

    An axis of size one goes; neighbours that a filter of one tap visits place by place become one
    axis where they are one in memory, so that a 1x1 convolution of a dense tensor has a single axis.
    """
    axes: list[_Axis] = []
    for row in zip(
        shape.spatial, shape.output, shape.kernel, shape.stride, shape.padding, shape.dilation,
        x[2:], y[2:], w[2:], strict=True,
    ):  # fmt: skip
        axis = _Axis(*row)
        if axis.size == axis.out == axis.taps == 1 and axis.pad == (0, 0):
            continue
        if axes and axes[-1].pointwise and axis.pointwise:
            slower = axes[-1]
            if (slower.x, slower.y) == (axis.size * axis.x, axis.out * axis.y):
                size, out = slower.size * axis.size, slower.out * axis.out
                axes[-1] = axis._replace(size=size, out=out)
                continue
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
    fits = aligned and run % width == 0 and all(stride % width == 0 for _, stride in offsets)
    return width if fits else 1


def _leading(digits: Digits) -> float:
    """How far apart in memory neighbours of an index are."""
    return next((stride for extent, stride in digits if extent > 1), math.inf)


class _Tensor(NamedTuple):
    """A tensor in the kernel's eyes: where it begins on 16 bytes, and digits of the kernel's indices."""

    aligned: bool
    places: Digits  # of the filter: taps
    channel: Digits  # the one that is summed over, or the result's
    group: Digits
    axes: Digits  # single coordinates, which padding and phases shift by less than a place


class _Problem:
    """A key in the kernel's roles: `source` is gathered (x; dgrad: grad_y), `result` has the places
    (y; dgrad: grad_x), the filter's entries are its taps and summed channels, its rows the others.
    """

    def __init__(self, key: _Key) -> None:
        shape, dgrad, g = key.shape, key.op == "dgrad", key.shape.groups
        x, w, y = key.strides
        c, k = shape.C // g, shape.K // g
        self.key, self.groups, self.width = key, g, 16 // key.dtype.itemsize
        self.axes = _canonical(shape, x, w, y)
        self.channels, self.outputs = (k, c) if dgrad else (c, k)

        p = self.params = _Params()
        source_places: Digits = []
        result_places: Digits = []
        source_axes: Digits = []
        corners: Digits = []
        taps: Digits = []
        self.phases, self.most_taps = 1, [1] * len(self.axes)
        for i, a in reversed(list(enumerate(self.axes))):
            common = math.gcd(a.stride, a.dilation)
            if dgrad:
                count, size, limit, source, result = -(-a.size // a.stride), a.out, a.size, a.y, a.x
                step, moves, reach, tap_step = (
                    1,
                    a.stride,
                    -(a.dilation // common),
                    a.stride // common,
                )
            else:
                count, size, limit, source, result = a.out, a.size, a.out, a.x, a.y
                step, moves, reach, tap_step = a.stride, 1, a.dilation, 1
            p.count[i], p.size[i], p.limit[i], p.taps[i] = FastDiv(count), size, limit, a.taps
            p.stride[i], p.dilation[i], p.pad[i] = a.stride, a.dilation, a.pad[0]
            p.reach[i], p.tap_step[i] = reach, tap_step
            p.source.axis[i], p.result.axis[i], p.filter.tap[i] = source, result, a.w
            source_places.append((count, step * source))
            result_places.append((count, moves * result))
            source_axes.append((size, source))
            corners.append((moves, result))
            taps.append((a.taps, a.w))
            self.phases *= moves
            self.most_taps[i] = -(-a.taps // tap_step)
        self.places = shape.N * math.prod(count for count, _ in source_places)
        self.entries = self.channels * math.prod(a.taps for a in self.axes)

        (from_, at), (to, to_at) = ((y, 2), (x, 0)) if dgrad else ((x, 0), (y, 2))
        row, channel = (w[1], w[0]) if dgrad else (w[0], w[1])
        p.source.batch, p.source.channel, p.source.group = (
            from_[0],
            from_[1],
            self.channels * from_[1],
        )
        p.result.batch, p.result.channel, p.result.group = to[0], to[1], self.outputs * to[1]
        p.filter.group, p.filter.row, p.filter.channel = k * w[0], row, channel
        p.places, p.outputs = self.places, self.outputs
        p.channels, p.groups, p.phases = FastDiv(self.channels), FastDiv(g), FastDiv(self.phases)
        p.tiles = p.splits = FastDiv(1)
        self.source = _Tensor(
            key.aligned[at],
            [*source_places, (shape.N, from_[0])],
            [(self.channels, from_[1])],
            [(g, self.channels * from_[1])],
            source_axes,
        )
        self.result = _Tensor(
            key.aligned[to_at],
            [*result_places, (shape.N, to[0])],
            [(self.outputs, to[1])],
            [(g, self.outputs * to[1])],
            corners,
        )
        self.filter = _Tensor(key.aligned[1], taps, [(self.channels, channel)], [(g, k * w[0])], [])
        self.rows: Digits = [(self.outputs, row)]

    @property
    def thin(self) -> bool:
        """Whether groups have so few channels that, by arithmetic, nothing is worth sharing."""
        return max(self.channels, self.outputs) <= THIN_CHANNELS

    @property
    def wide(self) -> bool:
        """Whether an offset may leave 31 bits, with taps in the padding, padded phases and the way back from
        the padding counted in.
        """
        outside = [
            (abs(a.pad[0]) + abs(a.pad[1]) + a.dilation * a.taps + 2 * a.stride, max(a.x, a.y))
            for a in self.axes
        ]
        return any(
            sum((extent - 1) * stride for extent, stride in digits) >= 2**31
            for digits in (
                [d for part in self.source[1:] for d in part] + outside,
                [d for part in self.result[1:] for d in part] + outside,
                [d for part in self.filter[1:] for d in part] + self.rows,
            )
        )

    def constants(self, pass_: str, result: str) -> dict[str, str | int]:
        """Those that every form has; `result` is the element type of what the entry writes."""
        dtype, shape = self.key.dtype, self.key.shape
        padded = any(any(pad) for pad in shape.padding)
        return {
            "PASS": pass_, "DIMS": len(self.axes), "WIDE": int(self.wide),
            "PADDING": shape.padding_mode.upper() if padded and shape.padding_mode != "zeros" else 0,
            "ELEMENT": ELEMENT[dtype], "ACCUMULATOR": ACCUMULATOR[dtype], "RESULT": result,
        }  # fmt: skip


# ---- plans -----------------------------------------------------------------------------------------------

_FINISH = ("scale", "bias", "residual")
_TENSORS = {
    "fprop": (("x", "w", *_FINISH), "y"),
    "dgrad": (("grad_y", "w", *_FINISH), "grad_x"),
    "wgrad": (("grad_y", "x"), "grad_w"),
    "bgrad": (("grad_y",), "grad_bias"),
}


def _plan_of(
    p: _Problem, form: str, constants: dict[str, str | int], blocks: int, threads: int, splits: int
) -> _Plan:
    """The launch of ``conv_<op>_<form>``, and the second pass where the sum comes in `splits` parts."""
    op, dtype, shape = p.key.op, p.key.dtype, p.key.shape
    numel = shape.K if op == "bgrad" else math.prod(_result(p.key)[0])
    inputs, output = _TENSORS[op]
    p.params.splits, p.params.numel = FastDiv(splits), numel
    result = ACCUMULATOR[dtype] if splits > 1 else ELEMENT[dtype]
    if op in ("fprop", "dgrad"):
        constants |= {"ACTIVATION": p.key.activation if splits == 1 else "none"}
    moments = constants.get("MOMENTS") == 1
    outputs = ["partial" if splits > 1 else output]
    if (op, form) == ("fprop", "direct"):
        outputs.append("parts")
    first = launch_of(
        "conv_direct.cu", f"conv_{op}_{form}", {**p.constants(op.upper(), result), **constants},
        p.params, grid=(blocks,), block=(threads,), inputs=inputs, outputs=outputs,
    )  # fmt: skip
    if moments:
        rows = blocks // (p.params.tiles.divisor * p.groups)
        params = _Params.from_buffer_copy(p.params)
        params.tiles, params.outputs = FastDiv(rows), shape.K
        second = launch_of(
            "conv_direct.cu", "conv_moments_direct", _second(p, "MERGE"), params,
            grid=(-(-shape.K // MERGE_CHANNELS),), block=(MERGE_THREADS,), inputs=("parts",),
            outputs=("mean", "var"),
        )  # fmt: skip
        return _Plan(first, second, rows * 3 * shape.K, moments=True)
    if splits == 1:
        return _Plan(first)
    params = _Params.from_buffer_copy(p.params)
    # Element e of a dense result belongs to channel (e / stride of the channels) mod their number.
    size, strides = _result(p.key)
    params.count[0], params.channels = FastDiv(max(1, strides[1])), FastDiv(size[1])
    lanes = next(lanes for most, lanes in REDUCE_LANES if splits <= most)
    constants = {**_second(p, "REDUCE"), "REDUCE_LANES": lanes, "ACTIVATION": p.key.activation}
    second = launch_of(
        "conv_direct.cu", "conv_reduce_direct", constants, params, grid=(-(-numel // lanes),),
        block=(256,), inputs=("partial", *_FINISH), outputs=(output,),
    )  # fmt: skip
    return _Plan(first, second, splits * numel)


def _second(p: _Problem, pass_: str) -> dict[str, str | int]:
    """Constants of a second pass, to which axes, offsets and padding are nothing."""
    return {**p.constants(pass_, ELEMENT[p.key.dtype]), "DIMS": 1, "WIDE": 0, "PADDING": 0}


def _result(key: _Key) -> tuple[Axes, Axes]:
    """Size and strides of what the pass fills."""
    at = {"dgrad": 0, "wgrad": 1, "fprop": 2}[key.op]
    return (key.shape.x_size, key.shape.w_size, key.shape.y_size)[at], key.strides[at]


def _most_partials(key: _Key) -> int:
    """How many partial results there may be: one where the result has gaps, which they would not."""
    size, strides = _result(key)
    numel = math.prod(size)
    dense = sum((n - 1) * s for n, s in zip(size, strides, strict=True)) == numel - 1
    return PARTIAL_BYTES // (numel * ACCUMULATOR_BYTES[ACCUMULATOR[key.dtype]]) if dense else 1


Choice = tuple[Tile, int]
"""A tile, and into how many parts to split the sum."""


def _ranked(
    tiles: Sequence[Tile], m: int, n: int, k: int, batches: int, vectors: tuple[int, int], most: int
) -> list[Choice]:
    """Tiles and numbers of parts: those first that free the busiest multiprocessor first.

    A multiprocessor issues four instructions a cycle if some twelve warps take turns (eight, where
    each has 64 independent sums); fewer hide less of each other's waiting. A second pass costs launch
    and traffic. Splits are tried that just fill the multiprocessors one to eight times.
    """

    def cycles(choice: Choice) -> float:
        tile, splits = choice
        blocks = -(-m // tile.block_m) * -(-n // tile.block_n) * batches * splits
        steps = -(-k // (tile.block_k * splits))
        here, warps = -(-blocks // SMS), tile.threads // 32
        enough = 8 if tile.thread_m * tile.thread_n >= 64 else 12
        hidden = min(1.0, min(here, tile.resident) * warps / enough)
        setup = 150 + 4 * tile.thread_m * tile.thread_n
        busy = here * warps * (steps * tile.issue_slots(*vectors) + setup) / 4 / hidden
        return busy + (4000 + 8 * splits * m * n * batches / (16 * SMS) if splits > 1 else 0)

    def splits(tile: Tile) -> list[int]:
        blocks = -(-m // tile.block_m) * -(-n // tile.block_n) * batches
        filling = {SMS * rounds // blocks for rounds in range(1, 9)}
        return [1, *sorted(s for s in filling if 1 < s <= most)]

    return sorted(((tile, s) for tile in tiles for s in splits(tile)), key=cycles)


def _variant(choice: Choice) -> str:
    """The name of a choice in tables of `cnnops.tuned`: 128x64x8, in four parts 128x64x8/4."""
    tile, splits = choice
    return f"{tile}/{splits}" if splits > 1 else str(tile)


def _named(variant: str, tiles: Sequence[Tile], most: int) -> Choice | None:
    """The choice that a table names, in at most `most` parts; None for a name that is of none of these."""
    found = re.fullmatch(r"(\d+x\d+x\d+)(?:/([1-9]\d*))?", variant)
    tile = found and next((tile for tile in tiles if str(tile) == found[1]), None)
    return (tile, max(1, min(int(found[2] or 1), most))) if found and tile else None


class _Operands(NamedTuple):
    """How a tiled product reads its operands, its m and k (see `_ranked`), and the most parts of its sum."""

    channels_fast: bool
    entries: Digits  # of the filter, in the order of the sum
    along_steps: bool
    gather: int  # elements that one load of the source takes
    plain: int  # and one of the other operand
    m: int
    k: int
    most: int


def _operands(p: _Problem) -> _Operands:
    source, result, filter_, width = p.source, p.result, p.filter, p.width
    wgrad = p.key.op == "wgrad"

    # What follows memory in the source: its channels, or its places. Neighbouring places read
    # neighbours at every tap only where there is one tap, and no padding between rows.
    channels_fast = p.channels > 1 and source.channel[0][1] < _leading(source.places)
    gather = 1
    if channels_fast:
        others = source.places + source.axes + source.group
        gather = _packs(width, source.channel, others, source.aligned)
    elif all(a.pointwise for a in p.axes):
        gather = _packs(width, source.places, source.channel + source.group, source.aligned)
    taps, channel = filter_.places, filter_.channel
    entries = channel + taps if channels_fast else taps + channel

    # In the plain operand: the steps of the sum, or the columns. A phase has only some of the taps.
    if wgrad:
        plain_of, steps, columns = result, result.places, result.channel
        by_step = _packs(width, steps, columns + result.group, result.aligned)
    else:
        plain_of, steps, columns = filter_, entries, p.rows
        runs = channel if channels_fast else entries if p.phases == 1 else []
        others = (taps if channels_fast else []) + columns + filter_.group
        by_step = _packs(width, runs, others, filter_.aligned)
    by_column = _packs(width, columns, steps + plain_of.group, plain_of.aligned)
    along_steps = by_step > 1 or (by_column == 1 and _leading(steps) <= _leading(columns))
    plain = by_step if along_steps else by_column

    m, k = (p.entries, p.places) if wgrad else (p.places, -(-p.entries // p.phases))
    most = min(k // 64, _most_partials(p.key))
    return _Operands(channels_fast, entries, along_steps, gather, plain, m, k, most)


def _choices(p: _Problem, o: _Operands) -> list[Choice]:
    tiles, batches = TILES[ACCUMULATOR[p.key.dtype]], p.groups * p.phases
    return _ranked(tiles, o.m, p.outputs, o.k, batches, (o.gather, o.plain), o.most)


def _tiled(p: _Problem, variant: str) -> _Plan:
    """The product through shared memory: rows x columns, summed over steps (see conv_direct.cu)."""
    o, result, filter_ = _operands(p), p.result, p.filter
    wgrad, accumulator = p.key.op == "wgrad", ACCUMULATOR[p.key.dtype]
    tile, splits = _named(variant, TILES[accumulator], o.most) or _choices(p, o)[0]
    batches = p.groups * p.phases
    plain = 1 if not o.along_steps and tile.block_n % o.plain else o.plain

    # In what is written: the rows, or the columns. A thread stores what it owns side by side.
    written = filter_ if wgrad else result
    rows, columns = (o.entries, p.rows) if wgrad else (result.places, result.channel)
    along_rows = _leading(rows) <= _leading(columns)
    side = min(tile.thread_m if along_rows else tile.thread_n, 16 // ACCUMULATOR_BYTES[accumulator])
    along, others = (rows, columns) if along_rows else (columns, rows)
    others = others + written.group + written.axes + [(splits, math.prod(_result(p.key)[0]))]
    store = _packs(side, along, others, written.aligned or splits > 1)

    constants: dict[str, str | int] = {
        "FORM": "TILED", "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "THREAD_M": tile.thread_m, "THREAD_N": tile.thread_n, "RESIDENT": tile.resident,
        "CHANNELS_FAST": int(o.channels_fast),
        "GATHER_ALONG_STEPS": int(o.channels_fast != wgrad), "GATHER_VECTOR": o.gather,
        "PLAIN_ALONG_STEPS": int(o.along_steps), "PLAIN_VECTOR": plain,
        "STORE_ALONG_ROWS": int(along_rows), "STORE_VECTOR": store,
    }  # fmt: skip
    if p.key.op == "fprop":
        constants["MOMENTS"] = int(p.key.moments and splits == 1)
    column_tiles = -(-p.outputs // tile.block_n)
    p.params.tiles = FastDiv(column_tiles)
    blocks = column_tiles * batches * splits * -(-o.m // tile.block_m)
    return _plan_of(p, "direct", constants, blocks, tile.threads, splits)


def _fit(extent: int, least: int, most: int) -> int:
    """Lanes for an index: the largest power of two that leaves at most an eighth of its lanes idle, or
    else the one that leaves the fewest.
    """
    powers = [1 << i for i in range(most.bit_length()) if least <= 1 << i <= most]
    covered = {n: -(-extent // n) * n for n in powers}
    good = [n for n in powers if 8 * covered[n] <= 9 * extent]
    return max(good) if good else min(powers, key=lambda n: (covered[n], -n))


def _lanes(places_fast: bool, places: int, groups: int, pack_bytes: int) -> tuple[int, int]:
    """How THIN_THREADS threads cover (groups, places): along memory, in runs of 32 bytes or more."""
    if places_fast:
        lanes = _fit(places, 32, THIN_THREADS)
        return THIN_THREADS // lanes, lanes
    least = min(32 // pack_bytes, 1 << (groups.bit_length() - 1))
    lanes = _fit(groups, least, 32)
    return lanes, THIN_THREADS // lanes


def _splits(blocks: int, places: int, lanes: int, most: int) -> int:
    """Parts of a sum over places: enough blocks for all multiprocessors, enough places for all lanes."""
    return max(1, min(8 * SMS // blocks, places // (16 * lanes), most))


def _stretches(taps: Sequence[int], most: int) -> list[int]:
    """Taps of each axis that conv_wgrad_thin unrolls, at most `most` in all: the last axis in equal
    parts, of the others as many as divide them.
    """
    last = -(-taps[-1] // -(-taps[-1] // most))
    stretches = [last]
    for n in reversed(taps[:-1]):
        room = most // math.prod(stretches)
        stretches.insert(0, max(i for i in range(1, room + 1) if n % i == 0))
    return stretches


def _thin(p: _Problem) -> _Plan:
    """Few channels a group: a thread owns places of a group (wgrad: taps of it); nothing is shared."""
    source, result, taps = p.source, p.result, p.most_taps
    wgrad, accumulator = p.key.op == "wgrad", ACCUMULATOR[p.key.dtype]
    most_sums = THIN_SUMS[accumulator] // (2 if p.wide else 1)
    vector = result_vector = 1
    if p.channels == p.outputs == 1 and not (wgrad and math.prod(taps) * p.width > most_sums):
        vector = _packs(p.width, source.group, source.places + source.axes, source.aligned)
        others = result.places + result.axes
        result_vector = min(vector, _packs(p.width, result.group, others, result.aligned))
    if wgrad:
        chunk = _stretches(taps, max(1, most_sums // (p.outputs * vector)))
        full = all(n % t == 0 for n, t in zip(taps, chunk, strict=True))
    else:
        chunk = [-(-taps[-1] // -(-taps[-1] // THIN_TAPS))]
        full = p.phases == 1 and taps[-1] % chunk[0] == 0

    places_fast = p.groups == 1 or _leading(source.places) <= source.group[0][1]
    pack_bytes = vector * p.key.dtype.itemsize
    group_lanes, lanes = _lanes(places_fast, p.places, p.groups // vector, pack_bytes)
    tiles = -(-p.groups // (group_lanes * vector))
    p.params.tiles = FastDiv(tiles)
    constants: dict[str, str | int] = {
        "FORM": "THIN", "LANES_G": group_lanes, "LANES_P": lanes, "PLACES_FAST": int(places_fast),
        "VECTOR": vector, "RESULT_VECTOR": result_vector, "OUTPUTS": p.outputs,
        "FULL_CHUNKS": int(full),
    }  # fmt: skip
    if wgrad:
        chunks = math.prod(-(-n // t) for n, t in zip(taps, chunk, strict=True))
        p.params.phases = FastDiv(chunks)
        constants |= {f"TAPS_{a}": t for a, t in enumerate([*chunk, 1, 1][:3])}
        blocks = tiles * p.channels * chunks
        splits = _splits(blocks, p.places, lanes, _most_partials(p.key))
        return _plan_of(p, "thin", constants, blocks * splits, THIN_THREADS, splits)
    registers = vector * p.outputs * ACCUMULATOR_BYTES[accumulator] // 4
    each = max(1, min(4, 8 // registers))
    if tiles * p.phases * (p.places // (each * lanes)) < 8 * SMS:
        each = 1
    constants |= {"TAPS": chunk[0], "PLACES": each}
    blocks = tiles * p.phases * -(-p.places // (each * lanes))
    return _plan_of(p, "thin", constants, blocks, THIN_THREADS, 1)


def _bgrad(key: _Key) -> _Plan:
    """Sums of grad_y over places, every channel a group: lanes and packs along its contiguous axis."""
    shape, y, ones = key.shape, key.strides[2], (1,) * key.shape.dims
    pads = ((0, 0),) * shape.dims
    shape = ConvShape(shape.N, shape.K, shape.K, shape.output, ones, ones, pads, ones, shape.K)
    p = _Problem(replace(key, shape=shape, strides=(y, (0,) * len(y), y)))
    places_fast = shape.K == 1 or _leading(p.result.places) <= p.result.group[0][1]
    indices = (p.result.places, p.result.group)
    along, others = indices if places_fast else indices[::-1]
    vector = _packs(p.width, along, others, p.result.aligned)
    places, groups = (p.places // vector, shape.K) if places_fast else (p.places, shape.K // vector)
    group_lanes, lanes = _lanes(places_fast, places, groups, vector * key.dtype.itemsize)
    tiles = -(-groups // group_lanes)
    splits = _splits(tiles, places, lanes, 1024)
    p.params.tiles = FastDiv(tiles)
    constants: dict[str, str | int] = {
        "LANES_G": group_lanes, "LANES_P": lanes, "PLACES_FAST": int(places_fast), "VECTOR": vector,
    }  # fmt: skip
    return _plan_of(p, "direct", constants, tiles * splits, THIN_THREADS, splits)


@tuned.cached
def _plan(
    op: str,
    shape: ConvShape,
    dtype: torch.dtype,
    x: Axes,
    w: Axes,
    y: Axes,
    x_aligned: bool,
    w_aligned: bool,
    y_aligned: bool,
    activation: str,
    moments: bool,
    forced: str | None,
) -> _Plan:
    """The plan of a pass whose x, w and y have these strides. Flat, since hashed at every call."""
    key = _Key(op, shape, dtype, (x, w, y), (x_aligned, w_aligned, y_aligned), activation, moments)
    if op == "bgrad":
        return _bgrad(key)
    p = _Problem(key)
    variant = _tuned(key) if forced is None else forced
    return _thin(p) if p.thin and not variant else _tiled(p, variant)


_ORDER = {"fprop": (0, 1, 2), "dgrad": (2, 1, 0), "wgrad": (2, 0, 1)}
"""Where of x, w and y the arguments of a pass are, in their order."""


def _tuned(key: _Key) -> str:
    """What the tables of `cnnops.tuned` name for a pass, "" where they do not know it."""
    shape, order = key.shape, _ORDER[key.op]
    sizes = (shape.x_size, shape.w_size, shape.y_size)
    layout = tuned.layout([sizes[i] for i in order], [key.strides[i] for i in order])
    return tuned.variant(f"conv_{key.op}", "conv_direct", shape, key.dtype, layout)


_forced: str | None = None


@contextmanager
def forced(variant: str) -> Iterator[None]:
    """Within the block every pass takes this variant, or for "" what `_ranked` prefers, whatever tables say.

    A sum comes in fewer parts than the variant's where the parts would take more than PARTIAL_BYTES.
    """
    global _forced
    former, _forced = _forced, variant
    try:
        yield
    finally:
        _forced = former


def variants(op: str, shape: ConvShape, *arguments: Tensor | None) -> tuple[str, ...]:
    """Names of the choices that are worth measuring for this call, without the one that is made anyway.

    Of every tile the two numbers of parts that `_ranked` likes best, of all these at most `VARIANTS`.
    """
    if op == "conv_bgrad":
        return ()
    images = [a for a in arguments if a is not None and a.dim() > 1]
    x, w, y = (images[_ORDER[op[5:]].index(i)] for i in range(3))
    key = _Key(
        op[5:], shape, y.dtype, (x.stride(), w.stride(), y.stride()),
        (x.data_ptr() % 16 == 0, w.data_ptr() % 16 == 0, y.data_ptr() % 16 == 0),
    )  # fmt: skip
    p = _Problem(key)
    ranked = _choices(p, _operands(p))
    taken: dict[Tile, list[Choice]] = {}
    for choice in ranked if p.thin else ranked[1:]:
        taken.setdefault(choice[0], []).append(choice)
    worth = [choice for choices in taken.values() for choice in choices[:2]]
    return tuple(_variant(choice) for choice in ranked if choice in worth)[:VARIANTS]


# ---- what the registry calls -----------------------------------------------------------------------------


def _aligned(tensor: Tensor | None) -> bool:
    return tensor is None or not tensor.data_ptr() & 15


def _run(
    op: str,
    shape: ConvShape,
    tensors: tuple[Tensor | None, Tensor | None, Tensor],
    inputs: tuple[Tensor, ...],
    output: Tensor,
    bias: Tensor | None = None,
    epilogue: Epilogue | None = None,
) -> None:
    """Run a pass whose x, w and y (or their gradients) are `tensors`."""
    x, w, y = tensors
    scale, residual, activation, mean, var = epilogue or NO_EPILOGUE
    none: Axes = (0,) * y.dim()
    follows = _aligned(residual)  # beside the result
    plan = _plan(
        op,
        shape,
        y.dtype,
        none if x is None else x.stride(),
        none if w is None else w.stride(),
        y.stride(),
        _aligned(x) and (follows or x is not output),
        _aligned(w),
        _aligned(y) and (follows or y is not output),
        activation,
        mean is not None,
        _forced,
    )
    finish: tuple[Tensor | None, ...] = ()
    if op in ("fprop", "dgrad"):
        finish = (scale, None if bias is None else bias.contiguous(), residual)
    pointers = len(plan.first.outputs)  # the tiled form has one more for moments
    partial = None
    if plan.second is not None:
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        partial = torch.empty(plan.partial, dtype=wide, device=y.device)
    if plan.second is None or plan.moments:
        launch(plan.first, inputs + finish, (output, partial)[:pointers])
    else:  # what follows a sum is done once, to the whole
        launch(plan.first, inputs + (None,) * len(finish), (partial, None)[:pointers])
    if plan.second is not None and plan.moments:
        launch(plan.second, (partial,), (mean, var))
        return
    if plan.second is not None:
        launch(plan.second, (partial, *(finish or (None,) * len(_FINISH))), (output,))
    if mean is not None and var is not None:  # a form that does not gather them
        batch_norm.batch_norm_stats(NormShape.of(shape.y_size), output, mean, var)


def conv_fprop(
    shape: ConvShape,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """Fill y ``N K *output`` with the convolution of x ``N C *spatial`` and w ``K C/groups *kernel``."""
    _run("fprop", shape, (x, w, y), (x, w), y, bias, epilogue)


def conv_dgrad(
    shape: ConvShape,
    grad_y: Tensor,
    w: Tensor,
    bias: Tensor | None,
    grad_x: Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """Fill grad_x ``N C *spatial``: every filter's weight on every input that it touched, and the bias ``C``.

    With a bias or an epilogue this is transposed convolution. Under another padding mode than zeros the
    caller takes ``shape.padded`` here, and `conv_fold` thereafter.
    """
    _run("dgrad", shape, (grad_x, w, grad_y), (grad_y, w), grad_x, bias, epilogue)


def conv_wgrad(shape: ConvShape, grad_y: Tensor, x: Tensor, grad_w: Tensor) -> None:
    """Fill grad_w ``K C/groups *kernel``: the sum over all places that a weight was used at."""
    _run("wgrad", shape, (x, grad_w, grad_y), (grad_y, x), grad_w)


def conv_bgrad(shape: ConvShape, grad_y: Tensor, grad_bias: Tensor) -> None:
    """Fill grad_bias ``K``: the sum of grad_y over images and places."""
    _run("bgrad", shape, (None, None, grad_y), (grad_y,), grad_bias)
