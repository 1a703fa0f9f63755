"""Convolution as a matrix product whose operands are read in place: what `conv_direct`, `conv_igemm` and its
forms share.

A problem's spatial axes as `kernels/implicit_gemm.cuh` sees them (`canonical`), its tensors in the kernels'
roles (`Problem`), in which direction each of them is read and by how many bytes (`operands`), and the
launches, of which a sum in parts or a channel's moments take two (`plan_of`).
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cnnops import tuned
from cnnops.cuda import batch_norm
from cnnops.cuda.kernel import ACCUMULATOR, ELEMENT, INT32_MAX, FastDiv, Launch, launch_of
from cnnops.cuda.launch import launch
from cnnops.cuda.tensor_map import TensorMap
from cnnops.epilogue import NO_EPILOGUE, Epilogue
from cnnops.shapes import Axes, ConvShape, NormShape, PoolShape

ACCUMULATOR_BYTES = {"float": 4, "double": 8}

SMS = 132
"""Multiprocessors a choice is made for (an H100's). Fixed, so that results do not depend on the GPU."""

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


def beyond(
    op: str,
    shape: ConvShape | PoolShape | NormShape,
    dtypes: Sequence[torch.dtype],
    dtype: torch.dtype,
) -> str | None:
    """None, or why the problem is refused: a type without kernels, a number that leaves 31 bits, or the input
    gradient of a padding mode, which takes two steps.
    """
    if not isinstance(shape, ConvShape):
        return "not a convolution"
    if dtype not in dtypes:
        return f"dtype {dtype}: expected one of {', '.join(str(d) for d in dtypes)}"
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


class Strides(ctypes.Structure):
    """``struct Strides`` of implicit_gemm.cuh."""

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


class Params(ctypes.Structure):
    """``struct Params`` of implicit_gemm.cuh."""

    _fields_ = [
        ("source", Strides),
        ("result", Strides),
        ("filter", _FilterStrides),
        ("numel", ctypes.c_int64),
        ("count", FastDiv * 3),
        ("channels", FastDiv),
        ("most_taps", FastDiv * 3),
        ("fewer_taps", FastDiv * 3),
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
class Key:
    """All that decides a plan: sizes, type, strides, and whether each tensor begins on 16 bytes."""

    op: str
    shape: ConvShape
    dtype: torch.dtype
    strides: tuple[Axes, Axes, Axes]  # of x, w, y or their gradients
    aligned: tuple[bool, bool, bool]
    activation: str = "none"
    moments: bool = False  # whether fprop gathers those of its result


@dataclass(frozen=True)
class Plan:
    """One launch, or two with `partial` accumulators in between, of the results or of their moments; or
    `pack`, which makes so many `words` of the filters, of type `packed`, for those that follow.
    """

    first: Launch
    second: Launch | None = None
    partial: int = 0
    moments: bool = False
    pack: Launch | None = None
    words: int = 0
    packed: torch.dtype = torch.int32


class Axis(NamedTuple):
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


def canonical(shape: ConvShape, x: Axes, w: Axes, y: Axes) -> tuple[Axis, ...]:
    """The spatial axes, slowest first, without those that can be left out (one stays).

    An axis of size one goes; neighbours that a filter of one tap visits place by place become one
    axis where they are one in memory, so that a 1x1 convolution of a dense tensor has a single axis.
    """
    axes: list[Axis] = []
    for row in zip(
        shape.spatial, shape.output, shape.kernel, shape.stride, shape.padding, shape.dilation,
        x[2:], y[2:], w[2:], strict=True,
    ):  # fmt: skip
        axis = Axis(*row)
        if axis.size == axis.out == axis.taps == 1 and axis.pad == (0, 0):
            continue
        if axes and axes[-1].pointwise and axis.pointwise:
            slower = axes[-1]
            if (slower.x, slower.y) == (axis.size * axis.x, axis.out * axis.y):
                size, out = slower.size * axis.size, slower.out * axis.out
                axes[-1] = axis._replace(size=size, out=out)
                continue
        axes.append(axis)
    return tuple(axes) or (Axis(1, 1, 1, 1, (0, 0), 1, 1, 1, 1),)


def packs(widths: Sequence[int], along: Digits, others: Digits, aligned: bool) -> int:
    """The first of `widths`, which fall, for which every so many neighbours of the index `along`, counted
    from a multiple of it, are neighbours in memory on a boundary of their size, wherever the `others` move
    them; else 1.
    """
    moving = [(extent, stride) for extent, stride in along if extent > 1]
    run = 1
    while moving and moving[0][1] == run:
        run *= moving.pop(0)[0]
    offsets = moving + [(extent, stride) for extent, stride in others if extent > 1]
    step = math.gcd(run, *(stride for _, stride in offsets)) if aligned else 1
    return next((width for width in widths if step % width == 0), 1)


def leading(digits: Digits) -> float:
    """How far apart in memory neighbours of an index are."""
    return next((stride for extent, stride in digits if extent > 1), math.inf)


class View(NamedTuple):
    """A tensor in the kernel's eyes: where it begins on 16 bytes, and digits of the kernel's indices."""

    aligned: bool
    places: Digits  # of the filter: taps
    channel: Digits  # the one that is summed over, or the result's
    group: Digits
    axes: Digits  # single coordinates, which padding and phases shift by less than a place


class Problem:
    """A key in the kernel's roles: `source` is gathered (x; dgrad: grad_y), `result` has the places
    (y; dgrad: grad_x), the filter's entries are its taps and summed channels, its rows the others.
    """

    def __init__(self, key: Key) -> None:
        shape, dgrad, g = key.shape, key.op == "dgrad", key.shape.groups
        x, w, y = key.strides
        c, k = shape.C // g, shape.K // g
        self.key, self.groups, self.width = key, g, 16 // key.dtype.itemsize
        self.axes = canonical(shape, x, w, y)
        self.channels, self.outputs = (k, c) if dgrad else (c, k)

        p = self.params = Params()
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
            most = self.most_taps[i] = -(-a.taps // tap_step)
            p.most_taps[i], p.fewer_taps[i] = FastDiv(most), FastDiv(max(1, most - 1))
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
        self.source = View(
            key.aligned[at],
            [*source_places, (shape.N, from_[0])],
            [(self.channels, from_[1])],
            [(g, self.channels * from_[1])],
            source_axes,
        )
        self.result = View(
            key.aligned[to_at],
            [*result_places, (shape.N, to[0])],
            [(self.outputs, to[1])],
            [(g, self.outputs * to[1])],
            corners,
        )
        self.filter = View(key.aligned[1], taps, [(self.channels, channel)], [(g, k * w[0])], [])
        self.rows: Digits = [(self.outputs, row)]

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

FINISH = ("scale", "bias", "residual")
TENSORS = {
    "fprop": (("x", "w", *FINISH), "y"),
    "dgrad": (("grad_y", "w", *FINISH), "grad_x"),
    "wgrad": (("grad_y", "x"), "grad_w"),
    "bgrad": (("grad_y",), "grad_bias"),
}


def plan_of(
    p: Problem,
    source: str,
    form: str,
    constants: dict[str, str | int],
    blocks: int,
    threads: int,
    splits: int,
    shared_bytes: int = 0,
    grid: int | None = None,
    filters: str = "w",
    tensor_maps: Sequence[TensorMap] = (),
    cluster: int | None = None,
) -> Plan:
    """The launch of ``conv_<op>_<form>`` in `source`, and the second pass where the sum comes in `splits`
    parts or moments are gathered. `blocks` is the number of tiles, and of the launch's blocks unless `grid`
    says another; `filters` is what w is called that the entry reads.
    """
    op, dtype, shape = p.key.op, p.key.dtype, p.key.shape
    numel = math.prod(result_of(p.key)[0])
    inputs, output = TENSORS[op]
    p.params.splits, p.params.numel = FastDiv(splits), numel
    result = ACCUMULATOR[dtype] if splits > 1 else ELEMENT[dtype]
    if op in ("fprop", "dgrad"):
        constants |= {"ACTIVATION": p.key.activation if splits == 1 else "none"}
    moments = constants.get("MOMENTS") == 1
    outputs = ["partial" if splits > 1 else output]
    if "MOMENTS" in constants:
        outputs.append("parts")
    first = launch_of(
        source, f"conv_{op}_{form}", {**p.constants(op.upper(), result), **constants}, p.params,
        grid=(blocks if grid is None else grid,), block=(threads,),
        inputs=[filters if name == "w" else name for name in inputs], outputs=outputs,
        shared_bytes=shared_bytes, tensor_maps=tensor_maps, cluster=cluster,
    )  # fmt: skip
    if moments:
        rows = blocks // (p.params.tiles.divisor * p.groups)
        params = Params.from_buffer_copy(p.params)
        params.tiles, params.outputs = FastDiv(rows), shape.K
        second = launch_of(
            "conv_direct.cu", "conv_moments_direct", _second(p, "MERGE"), params,
            grid=(-(-shape.K // MERGE_CHANNELS),), block=(MERGE_THREADS,), inputs=("parts",),
            outputs=("mean", "var"),
        )  # fmt: skip
        return Plan(first, second, rows * 3 * shape.K, moments=True)
    if splits == 1:
        return Plan(first)
    params = Params.from_buffer_copy(p.params)
    # Element e of a dense result belongs to channel (e / stride of the channels) mod their number.
    size, strides = result_of(p.key)
    params.count[0], params.channels = FastDiv(max(1, strides[1])), FastDiv(size[1])
    lanes = next(lanes for most, lanes in REDUCE_LANES if splits <= most)
    constants = {**_second(p, "REDUCE"), "REDUCE_LANES": lanes, "ACTIVATION": p.key.activation}
    second = launch_of(
        "conv_direct.cu", "conv_reduce_direct", constants, params, grid=(-(-numel // lanes),),
        block=(256,), inputs=("partial", *FINISH), outputs=(output,),
    )  # fmt: skip
    return Plan(first, second, splits * numel)


def _second(p: Problem, pass_: str) -> dict[str, str | int]:
    """Constants of a second pass, to which axes, offsets and padding are nothing."""
    return {**p.constants(pass_, ELEMENT[p.key.dtype]), "DIMS": 1, "WIDE": 0, "PADDING": 0}


def result_of(key: Key) -> tuple[Axes, Axes]:
    """Size and strides of what the pass fills; the bias gradient counts as one image of K channels."""
    if key.op == "bgrad":
        return (1, key.shape.K), (key.shape.K, 1)
    at = {"dgrad": 0, "wgrad": 1, "fprop": 2}[key.op]
    return (key.shape.x_size, key.shape.w_size, key.shape.y_size)[at], key.strides[at]


def most_partials(key: Key) -> int:
    """How many partial results there may be: one where the result has gaps, which they would not."""
    size, strides = result_of(key)
    numel = math.prod(size)
    dense = sum((n - 1) * s for n, s in zip(size, strides, strict=True)) == numel - 1
    return PARTIAL_BYTES // (numel * ACCUMULATOR_BYTES[ACCUMULATOR[key.dtype]]) if dense else 1


class Operands(NamedTuple):
    """How a tiled product reads its operands and writes its result, its m and k (see `ConvShape.gemm_mnk`;
    rows are wgrad's entries), and the most parts of its sum.
    """

    channels_fast: bool
    entries: Digits  # of the filter, in the order of the sum
    gather_along_steps: bool
    gather: int  # elements that one access to the source takes
    plain_along_steps: bool
    plain: int  # and one to the other operand
    store_along_rows: bool
    m: int
    k: int
    most: int


def operands(p: Problem, widths: Sequence[int]) -> Operands:
    """How `p` is read, by the first of `widths` elements that fits."""
    source, result, filter_ = p.source, p.result, p.filter
    wgrad = p.key.op == "wgrad"

    # What follows memory in the source: its channels, or its places. Packs of entries are read at one place.
    # They may run on from one tap to the next only where no place has taps in the padding; in dgrad a tap's
    # neighbour is the one before it, and phases have only some of the taps.
    channels_fast = p.channels > 1 and source.channel[0][1] < leading(source.places)
    taps, channel = filter_.places, filter_.channel
    entries = channel + taps if channels_fast else taps + channel
    by_entry = by_place = 1
    if p.key.op != "dgrad" and not any(any(a.pad) for a in p.axes):
        visits = [(a.taps, a.dilation * a.x) for a in reversed(p.axes)]
        run = source.channel + visits if channels_fast else visits + source.channel
        by_entry = packs(widths, run, source.places + source.group, source.aligned)
    if channels_fast:
        others = source.places + source.axes + source.group
        by_entry = max(by_entry, packs(widths, source.channel, others, source.aligned))
    # Neighbouring places read neighbours at every tap only where there is one tap, and no padding between
    # rows.
    if all(a.pointwise for a in p.axes):
        by_place = packs(widths, source.places, source.channel + source.group, source.aligned)
    along_entries = channels_fast if by_entry == by_place else by_entry > by_place

    # In the plain operand: the steps of the sum, or the columns.
    if wgrad:
        plain_of, steps, columns = result, result.places, result.channel
        by_step = packs(widths, steps, columns + result.group, result.aligned)
    else:
        plain_of, steps, columns = filter_, entries, p.rows
        runs = entries if p.phases == 1 else channel if channels_fast else []
        others = [digit for digit in entries if digit not in runs] + columns + filter_.group
        by_step = packs(widths, runs, others, filter_.aligned)
    by_column = packs(widths, columns, steps + plain_of.group, plain_of.aligned)
    along_steps = by_step > by_column or (
        by_step == by_column and leading(steps) <= leading(columns)
    )

    # In what is written: the rows, or the columns.
    rows, columns = (entries, p.rows) if wgrad else (result.places, result.channel)
    m, k = (p.entries, p.places) if wgrad else (p.places, -(-p.entries // p.phases))
    return Operands(
        channels_fast, entries, along_entries != wgrad, max(by_entry, by_place), along_steps,
        max(by_step, by_column), leading(rows) <= leading(columns), m, k,
        min(k // 64, most_partials(p.key)),
    )  # fmt: skip


def stored(p: Problem, o: Operands, widths: Sequence[int], splits: int) -> int:
    """How many neighbours of the result one access may write, along rows or columns as `o` has it."""
    wgrad = p.key.op == "wgrad"
    written = p.filter if wgrad else p.result
    rows, columns = (o.entries, p.rows) if wgrad else (p.result.places, p.result.channel)
    along, others = (rows, columns) if o.store_along_rows else (columns, rows)
    others = others + written.group + written.axes + [(splits, math.prod(result_of(p.key)[0]))]
    return packs(widths, along, others, written.aligned or splits > 1)


# ---- variants --------------------------------------------------------------------------------------------

T = TypeVar("T")


def variant_name(choice: tuple[Any, int]) -> str:
    """The name of a tile and a number of parts in tables of `cnnops.tuned`: 128x64x8, in four parts
    128x64x8/4.
    """
    tile, splits = choice
    return f"{tile}/{splits}" if splits > 1 else str(tile)


def named(variant: str, tiles: Sequence[T], most: int) -> tuple[T, int] | None:
    """The choice that a table names, in at most `most` parts; None for a name that is of no such tile."""
    found = re.fullmatch(r"([^/]+)(?:/([1-9]\d*))?", variant)
    tile = next((tile for tile in tiles if found and str(tile) == found[1]), None)
    return (tile, max(1, min(int(found[2] or 1), most))) if found and tile else None


def worth_measuring(ranked: Sequence[tuple[T, int]], first: int = 1) -> tuple[str, ...]:
    """Names of the choices from `first` on: of every tile the two numbers of parts that stand first, and of
    all these at most `VARIANTS`.
    """
    taken: dict[T, list[tuple[T, int]]] = {}
    for choice in ranked[first:]:
        taken.setdefault(choice[0], []).append(choice)
    worth = [choice for choices in taken.values() for choice in choices[:2]]
    return tuple(variant_name(choice) for choice in ranked if choice in worth)[:VARIANTS]


ORDER = {"fprop": (0, 1, 2), "dgrad": (2, 1, 0), "wgrad": (2, 0, 1)}
"""Where of x, w and y the arguments of a pass are, in their order."""


def tuned_variant(key: Key, algorithm: str) -> str:
    """What the tables of `cnnops.tuned` name for a pass, "" where they do not know it."""
    shape, order = key.shape, ORDER[key.op]
    sizes = (shape.x_size, shape.w_size, shape.y_size)
    layout = tuned.layout([sizes[i] for i in order], [key.strides[i] for i in order])
    return tuned.variant(f"conv_{key.op}", algorithm, shape, key.dtype, layout)


def key_of_call(op: str, shape: ConvShape, arguments: Sequence[object]) -> Key:
    """The key of a pass that the registry calls with these arguments, without an epilogue."""
    images = [a for a in arguments if isinstance(a, Tensor) and a.dim() > 1]
    x, w, y = (images[ORDER[op[5:]].index(i)] for i in range(3))
    return Key(
        op[5:], shape, y.dtype, (x.stride(), w.stride(), y.stride()),
        (x.data_ptr() % 16 == 0, w.data_ptr() % 16 == 0, y.data_ptr() % 16 == 0),
    )  # fmt: skip


class Forced:
    """``with forced(variant):`` within the block every pass of a module takes this variant, or for "" what
    its arithmetic prefers, whatever tables say. A sum comes in fewer parts than the variant's where the parts
    would take more than PARTIAL_BYTES.
    """

    variant: str | None = None

    @contextmanager
    def __call__(self, variant: str) -> Iterator[None]:
        former, self.variant = self.variant, variant
        try:
            yield
        finally:
            self.variant = former


# ---- a call ----------------------------------------------------------------------------------------------


def _aligned(tensor: Tensor | None) -> bool:
    return tensor is None or not tensor.data_ptr() & 15


def run(
    plan_for: Callable[..., Plan],
    forced: Forced,
    op: str,
    shape: ConvShape,
    tensors: tuple[Tensor | None, Tensor | None, Tensor],
    inputs: tuple[Tensor, ...],
    output: Tensor,
    bias: Tensor | None = None,
    epilogue: Epilogue | None = None,
) -> None:
    """Run a pass whose x, w and y (or their gradients) are `tensors`, by the plan that `plan_for` makes."""
    x, w, y = tensors
    scale, residual, activation, mean, var = epilogue or NO_EPILOGUE
    none: Axes = (0,) * y.dim()
    follows = _aligned(residual)  # beside the result
    plan = plan_for(
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
        forced.variant,
    )
    finish: tuple[Tensor | None, ...] = ()
    if op in ("fprop", "dgrad"):
        finish = (scale, None if bias is None else bias.contiguous(), residual)
    pointers = len(plan.first.outputs)  # the tiled form has one more for moments
    if plan.pack is not None:
        packed = torch.empty(plan.words, dtype=plan.packed, device=y.device)
        launch(plan.pack, (inputs[1],), (packed,))
        inputs = inputs[0], packed
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
        launch(plan.second, (partial, *(finish or (None,) * len(FINISH))), (output,))
    if mean is not None and var is not None:  # a form that does not gather them
        batch_norm.batch_norm_stats(NormShape.of(shape.y_size), output, mean, var)
