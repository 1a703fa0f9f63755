"""Depthwise convolution, all three passes: `kernels/conv_depthwise.cu` explains the arithmetic.

A plan decides along what accesses are wide (`_form`), how many rows a thread walks (`_strips`) and into
how many parts wgrad's sums are split, from sizes, strides and alignments alone. Kernels of more taps than
registers hold have a file of their own, `kernels/conv_depthwise_large.cu`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cnnops.cuda import batch_norm
from cnnops.cuda.kernel import ACCUMULATOR, ELEMENT, INT32_MAX, FastDiv, Launch, launch_of
from cnnops.cuda.launch import launch
from cnnops.cuda.pool import PACK_BYTES, CStrides, Layout, View, layout_of, view_of, widest_pack
from cnnops.epilogue import NO_EPILOGUE, Epilogue
from cnnops.shapes import ConvShape, NormShape, Shape

SOURCE = "conv_depthwise.cu"
THREADS = 128
MOST_TAPS = 49
"""Weights of a plane that a thread keeps in registers; packs of channels share this number."""
MOST_SIDE = 64
"""Taps of a large kernel along an axis: those along w stand unrolled."""
MOST_STRIDE = 8
MOST_SPAN = 64
"""Columns from a window's first to its last."""
LIVE_SUMS = {False: 64, True: 50}
"""Sums that a thread has under way where it can choose how many: in NCHW, and beside packs of channels."""
COLUMN_SUMS = {False: 28, True: 24}
"""Source columns of a row that a thread keeps, in accumulators; in both cases likewise."""
WEIGHTS_AND_SUMS = 126
"""Of 255 registers: float64 has two for each."""
WASTE = 1.15
"""Tiles may reach over a row to this many times its length."""
RUN_BYTES, LINE_BYTES = 64, 128
"""Channels that lie side by side in a block: whole runs of memory, and at most a line of L1."""
SMS = 132.0
"""Multiprocessors a choice is made for (an H100's). Fixed: results do not depend on the GPU. No whole number
where a part of a problem stands for all of it (bench/traffic.py).
"""
REGISTERS = 65536
"""Of a multiprocessor."""
START = 4
"""Steps that a thread could take while it finds its tile and its filter."""
SHARED_BYTES = 48 * 1024
REDUCED = 32
"""Results of a block of the second pass of wgrad."""


class Axis(NamedTuple):
    """One spatial axis of the problem."""

    size: int
    out: int
    taps: int
    stride: int
    dilation: int
    before: int

    @property
    def span(self) -> int:
        return (self.taps - 1) * self.dilation + 1


class _Params(ctypes.Structure):
    """`struct Params`."""

    _fields_ = [
        ("source", CStrides),
        ("result", CStrides),
        *((name, ctypes.c_longlong) for name in ("w_k", "w_t", "w_r", "w_s", "numel")),
        *((name, FastDiv) for name in ("w_tiles", "strips", "planes", "channels")),
        *((name, FastDiv) for name in ("channel_tiles", "splits", "multiplier")),
        *((name, ctypes.c_int) for name in "NKDHW"),
        *((name, ctypes.c_int) for name in ("result_h", "result_w", "strip", "items")),
        *((name, ctypes.c_int) for name in ("pad_d", "row_offset", "row_shift")),
        *((name, ctypes.c_int) for name in ("source_fold", "result_fold")),
    ]


def _axes(shape: ConvShape) -> list[Axis]:
    """Depth, height and width; an axis of one tap has no dilation."""
    missing = 3 - shape.dims
    ones, pads = (1,) * missing, (0,) * missing + tuple(before for before, _ in shape.padding)
    columns = [shape.DHW, shape.ZPQ, shape.TRS, ones + shape.stride, ones + shape.dilation, pads]
    axes = [Axis(*values) for values in zip(*columns, strict=True)]
    return [a._replace(dilation=1) if a.taps == 1 else a for a in axes]


def supports(op: str, shape: Shape, dtype: torch.dtype) -> str | None:
    """None, or why `op` cannot run on this problem."""
    if not isinstance(shape, ConvShape) or op == "conv_bgrad":
        return "expected a convolution"
    if dtype not in ELEMENT:
        return f"dtype {dtype}: expected one of {', '.join(str(d) for d in ELEMENT)}"
    if shape.groups != shape.C or shape.C == 1 < shape.K:
        return f"{shape.C} channels in {shape.groups} groups: expected a group for each of several"
    if op == "conv_dgrad" and shape.padding_mode != "zeros":
        return f"padding_mode {shape.padding_mode}: expected shape.padded, then conv_fold"
    most = max(
        shape.N * max(shape.C, shape.K) * math.prod(n) for n in (shape.spatial, shape.output)
    )
    if most >= 2**31 - 2**16:
        return f"{most} values: expected fewer than 2^31 - 2^16"
    return None if _large(op, shape) else _beyond_registers(shape)


def _beyond_registers(shape: ConvShape) -> str | None:
    """None, or why threads cannot keep the windows of a plane in registers."""
    _, h, w = _axes(shape)
    if h.taps * w.taps > MOST_TAPS:
        return f"{h.taps}x{w.taps} taps: expected at most {MOST_TAPS} in a plane, or one plane and stride 1"
    if max(h.stride, w.stride) > MOST_STRIDE or max(h.span, w.span) > MOST_SPAN:
        return (
            f"stride {shape.stride}, dilation {shape.dilation}: expected at most a stride of {MOST_STRIDE} "
            f"and a span of {MOST_SPAN}"
        )
    if h.stride > 1 and h.dilation > 1:
        return f"stride {h.stride} and dilation {h.dilation} along h: expected one of them to be 1"
    return None


def _large(op: str, shape: ConvShape) -> bool:
    """Whether conv_depthwise_large.cu takes the problem: more taps than registers hold, in one plane, of a
    window that moves place by place.
    """
    d, h, w = _axes(shape)
    simple = d.size == d.out == d.taps == h.stride == w.stride == h.dilation == w.dilation == 1
    single = op != "conv_dgrad" or shape.K == shape.C
    return simple and single and h.taps * w.taps > MOST_TAPS and max(h.taps, w.taps) <= MOST_SIDE


# ---- how wide, how large ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """A pass in the kernel's roles: `source` is what windows are laid over (x; dgrad: grad_y), `result` has
    the places (y; dgrad: grad_x; wgrad: grad_y, which is read), and `channels` are the result's.
    """

    op: str
    shape: ConvShape
    dtype: torch.dtype
    axes: tuple[Axis, Axis, Axis]
    source: View
    result: View
    source_size: tuple[int, int, int]
    result_size: tuple[int, int, int]

    @property
    def back(self) -> bool:
        return self.op == "dgrad"

    @property
    def channels(self) -> int:
        return self.shape.C if self.back else self.shape.K

    @property
    def multiplier(self) -> int:
        return self.shape.K // self.shape.C

    @property
    def planes(self) -> int:
        """Planes of filters that one value of the result sums over."""
        return self.axes[0].taps * (self.multiplier if self.back else 1)

    @property
    def taps(self) -> int:
        return self.axes[1].taps * self.axes[2].taps

    @property
    def accumulator(self) -> int:
        """Registers that one takes."""
        return 2 if self.dtype == torch.float64 else 1

    @property
    def rows_in(self) -> int:
        return 1 if self.back else self.axes[1].stride

    @property
    def live(self) -> int:
        """As in the kernel, and `warm`."""
        h = self.axes[1]
        return max(h.taps, h.stride) if self.back else -(-h.taps // h.stride)

    @property
    def warm(self) -> int:
        h = self.axes[1]
        return -(-h.taps // h.stride) - 1

    def packs(self, tile: int, x_vec: int) -> int:
        """Packs of source columns that a tile loads of a row."""
        w = self.axes[2]
        if self.back:
            first = -((w.span - 1 - w.before) // w.stride)
            last = (tile - 1 + w.before) // w.stride
        else:
            first, last = -w.before, (tile - 1) * w.stride + w.span - 1 - w.before
        packs = -(-(first % x_vec + last - first + 1) // x_vec)
        return min(packs, tile * w.taps)

    def fits(self, tile: int, x_vec: int, channels: int) -> bool:
        """Whether sums, and the columns on their way, find registers."""
        sums = self.live * tile * channels * self.accumulator
        inner = self.source.c == self.result.c == 1
        columns = self.packs(tile, x_vec) * x_vec * channels * self.accumulator
        weights = self.taps * channels * self.accumulator
        fits = sums <= LIVE_SUMS[inner] and columns <= COLUMN_SUMS[inner]
        return fits and (tile == 1 or weights + sums <= WEIGHTS_AND_SUMS)

    def resident(self, form: Form) -> int:
        """Blocks that find registers on a multiprocessor."""
        v, a = form.v, self.accumulator
        columns = self.packs(form.tile, form.x_vec) * form.x_vec * v
        if self.op == "wgrad":
            values = (self.taps + (self.live + 1) * form.tile) * v
            ahead = 2 * (self.rows_in * columns + form.tile * v)
        else:
            values = (self.live * form.tile + self.taps + min(self.taps // 2, 8) + 2) * v
            ahead = self.rows_in * columns
        registers = (
            (36 if self.rows_in == 1 else 44) + a * values + ahead * self.dtype.itemsize // 4
        )
        warps = -(-form.threads // 32)
        return max(1, REGISTERS // (32 * warps * max(-(-registers // 8) * 8, 64)))


class Form(NamedTuple):
    """The constants by which accesses and blocks differ."""

    inner: bool
    v: int = 1
    x_vec: int = 1
    y_vec: int = 1
    tile: int = 1
    lanes: int = 1
    threads: int = THREADS


def _lanes(packs: int, pack_bytes: int) -> int:
    """Packs of channels side by side in a block: whole runs, few idle threads, then as few as may be, so that
    many tiles share a filter, the borders of their windows, and wgrad's sum.
    """
    most = min(packs, LINE_BYTES // pack_bytes)

    def rank(lanes: int) -> tuple[bool, float, int]:
        used = packs / (-(-packs // lanes) * lanes) * (THREADS // lanes * lanes) / THREADS
        whole = lanes == packs or lanes * pack_bytes % RUN_BYTES == 0
        return whole, used, -lanes

    return max(range(1, most + 1), key=rank)


def _channels_last(problem: _Problem, most: int) -> Form | None:
    """Packs of channels, or None where a block's filters do not fit into shared memory."""
    v = 1
    if problem.multiplier == 1:
        views = (problem.source, problem.result)
        v = widest_pack(views, "c", problem.channels, most)
    while v > 1 and problem.taps * v * problem.accumulator > MOST_TAPS + 1:
        v //= 2
    step = problem.axes[2].stride if problem.back else 1
    width = problem.result_size[2]
    tiles = [t for t in range(step, max(8, step) + 1, step) if t == step or problem.fits(t, 1, v)]
    tile = min(tiles, key=lambda t: (-(-width // t) * t > WASTE * width, -t))
    lanes = _lanes(problem.channels // v, v * problem.dtype.itemsize)
    taps_bytes = 4 * problem.accumulator * problem.taps * v
    rows = THREADS // lanes
    if (
        problem.op == "wgrad"
    ):  # a block's sums meet in shared memory, elsewhere its filters stand there
        rows = min(rows, max(1, SHARED_BYTES // (taps_bytes * lanes)))
    else:
        while lanes > 1 and problem.planes * taps_bytes * (lanes + 4) > SHARED_BYTES:
            lanes //= 2
        if problem.planes * taps_bytes * (lanes + 4) > SHARED_BYTES:
            return None
        rows = THREADS // lanes
    return Form(True, v, tile=tile, lanes=lanes, threads=rows * lanes)


def _by_columns(problem: _Problem, most: int) -> Form:
    """Packs of columns, as wide as the result's rows allow."""
    w = problem.axes[2]
    x_most = widest_pack((problem.source,), "w", problem.source_size[2], most)
    y_most = widest_pack((problem.result,), "w", problem.result_size[2], most)
    step = w.stride if problem.back else 1
    tile = math.lcm(y_most, step)
    if tile == 1 < x_most and problem.fits(2, 1, 1):
        # Pairs, though stores are of single columns: the halves of a sector are written one by one.
        tile = 2
    while True:
        y_vec = math.gcd(tile, y_most)
        x_vec = math.gcd(tile // step if problem.back else tile * w.stride, x_most)
        while x_vec > 1 and not problem.fits(tile, x_vec, 1):
            x_vec //= 2
        if problem.fits(tile, x_vec, 1) or y_most == 1:
            return Form(False, 1, x_vec, y_vec, tile)
        y_most //= 2
        tile = math.lcm(y_most, step)


def _folded(problem: _Problem, form: Form) -> tuple[_Problem, tuple[int, int]]:
    """A long axis w without rows, folded into rows of a warp's tiles so that threads have some to walk. And
    the columns of the source and of the result from one such row to the next, 0 for other problems.
    """
    d, h, w = problem.axes
    fold = 32 * form.tile
    width = problem.result_size[2]
    if form.inner or not h.size == h.out == h.taps == 1 or h.before or width < 2 * fold:
        return problem, (0, 0)
    rows = -(-width // fold)
    h = Axis(rows, rows, 1, 1, 1, 0)
    sizes = [(size[0], rows, size[2]) for size in (problem.source_size, problem.result_size)]
    folded = replace(
        problem, axes=(d, h, w), source=problem.source._replace(h=0), result=problem.result._replace(h=0),
        source_size=sizes[0], result_size=sizes[1],
    )  # fmt: skip
    return folded, (fold // w.stride if problem.back else fold * w.stride, fold)


def _form(problem: _Problem) -> Form:
    most = PACK_BYTES // problem.dtype.itemsize
    form = None
    if problem.source.c == problem.result.c == 1:
        form = _channels_last(problem, most)
    return form or _by_columns(problem, most)


def _strips(steps: int, warm: int, threads: int, room: float) -> int:
    """Strips of a plane, each of so many `threads`: a GPU with `room` for some is done with these first.
    In the same way parts of a sum, each of so many blocks.
    """

    def rounds(strips: int) -> float:
        return -(-threads * strips // room) * (-(-steps // strips) + warm + START)

    return min(range(1, min(steps, 1024) + 1), key=rounds)


# ---- launches --------------------------------------------------------------------------------------------

_FINISH = ("scale", "bias", "residual")
_TENSORS = {
    "fprop": (("x", "w", *_FINISH), "y"),
    "dgrad": (("grad_y", "w", *_FINISH), "grad_x"),
    "wgrad": (("grad_y", "x"), "grad_w"),
}


class _Plan(NamedTuple):
    """One launch, or two with `partial` accumulators in between."""

    first: Launch
    second: Launch | None = None
    partial: int = 0


def _rotated(view: View) -> View:
    """Of an axis w that rows are walked along instead."""
    return view._replace(h=view.w, w=0)


@lru_cache(4096)
def _plan(
    op: str,
    shape: ConvShape,
    dtype: torch.dtype,
    x: Layout,
    w: tuple[int, ...],
    y: Layout,
    activation: str,
    residual: bool = False,
) -> _Plan:
    """The launches of a pass whose x, w and y have these layouts."""
    axes = _axes(shape)
    views = [view_of(s, v, dtype.itemsize) for s, v in ((shape.x_size, x), (shape.y_size, y))]
    w_k, *w_taps = w[0], *(0,) * (3 - shape.dims), *w[2:]
    large = _large(f"conv_{op}", shape)
    walkable = shape.dims == 1 and not large and 1 in (axes[2].stride, axes[2].dilation)
    if walkable and shape.C > 1 and all(view.c == 1 for view in views):
        # Along the only axis of channels-last rows, a thread walks.
        axes[1], axes[2], w_taps[1] = axes[2], axes[1], w_taps[2]
        views = [_rotated(view) for view in views]
    d, h, w_axis = axes
    (x_view, y_view), (x_size, y_size) = (
        views,
        ((d.size, h.size, w_axis.size), (d.out, h.out, w_axis.out)),
    )
    back = op == "dgrad"
    given = (y_view, x_view, y_size, x_size) if back else (x_view, y_view, x_size, y_size)
    problem = _Problem(op, shape, dtype, (d, h, w_axis), *given)
    if large:
        return _large_plan(problem, w, activation, residual)
    form = _form(problem)
    problem, folds = _folded(problem, form)
    d, h, w_axis = problem.axes

    # Rows in steps, and the tiles of a channel's planes.
    shift = h.before % h.stride if back else 0
    offset = h.before // h.stride if back else -h.before
    if op == "fprop":
        offset += h.dilation * problem.warm * h.stride
    result_d, result_h, result_w = problem.result_size
    steps = -(-(result_h + shift) // (h.stride if back else h.dilation))
    row = -(-(folds[1] or result_w) // form.tile)
    per_step = shape.N * result_d * h.dilation * row
    resident = problem.resident(form)
    room = SMS * resident * form.threads
    strips = _strips(steps, problem.warm, per_step * problem.channels // form.v, room)
    strip = -(-steps // strips)
    strips = -(-steps // strip)
    tiles = per_step * strips

    reach = h.dilation * ((strips * strip + problem.warm + 1) * problem.rows_in + h.taps) + abs(
        h.before
    )
    span = sum(
        (n - 1) * step for n, step in zip((shape.N, shape.K), problem.source[:2], strict=True)
    ) + reach * problem.source.h + sum(
        (n + abs(a.before) + a.span) * step
        for n, a, step in zip(problem.source_size, axes, (problem.source.d, 0, problem.source.w), strict=True)
    )  # fmt: skip
    span = max(span, problem.result.span((shape.N, problem.channels, *problem.result_size)))
    filters = sum((n - 1) * step for n, step in zip(shape.w_size, w, strict=True))
    constants: dict[str, str | int] = {
        "PASS": op.upper(), "ELEMENT": ELEMENT[dtype], "ACCUMULATOR": ACCUMULATOR[dtype],
        "INDEX": "long long" if max(span, filters) > INT32_MAX else "int",
        "PADDING": _padding(shape), "FILTER_T": d.taps, "FILTER_R": h.taps, "FILTER_S": w_axis.taps,
        "STRIDE_D": d.stride, "STRIDE_H": h.stride, "STRIDE_W": w_axis.stride,
        "DILATION_D": d.dilation, "DILATION_H": h.dilation, "DILATION_W": w_axis.dilation,
        "PAD_W": w_axis.before, "CHANNELS_INNER": int(form.inner), "VECTOR": form.v, "X_VEC": form.x_vec,
        "Y_VEC": form.y_vec, "TILE": form.tile, "LANES": form.lanes, "THREADS": form.threads,
        "RESIDENT": resident, "FOLDED": int(any(folds)),
        "X_DENSE": int(problem.source.w == 1), "Y_DENSE": int(problem.result.w == 1),
    }  # fmt: skip
    params = _Params(
        CStrides(*problem.source[:5]), CStrides(*problem.result[:5]), w_k, *w_taps, math.prod(shape.w_size),
        FastDiv(row), FastDiv(strips), FastDiv(result_d), FastDiv(problem.channels),
        FastDiv(), FastDiv(), FastDiv(problem.multiplier), shape.N, problem.channels, *problem.source_size,
        result_h, result_w, strip, tiles, d.before, offset, shift, *folds,
    )  # fmt: skip
    rows = form.threads // form.lanes
    channel_tiles = -(-problem.channels // (form.lanes * form.v))
    inputs, output = _TENSORS[op]
    if op == "wgrad":
        return _split(problem, form, constants, params, channel_tiles, tiles, rows)
    if form.inner:
        params.channel_tiles = FastDiv(channel_tiles)
        blocks = channel_tiles * -(-tiles // rows)
    else:
        params.items = tiles * problem.channels
        blocks = -(-params.items // form.threads)
    constants |= {
        "ACTIVATION": activation,
        "RESIDUAL": int(residual),
        "FILTERS": problem.multiplier if back else 1,
    }
    first = launch_of(
        SOURCE, f"conv_{op}_depthwise", constants, params, grid=(blocks,), block=(form.threads,),
        inputs=inputs, outputs=(output,),
    )  # fmt: skip
    return _Plan(first)


def _padding(shape: ConvShape) -> str:
    padded = any(any(pad) for pad in shape.padding)
    return shape.padding_mode.upper() if padded else "ZEROS"


def _split(
    problem: _Problem, form: Form, constants: dict[str, str | int], params: _Params, channel_tiles: int,
    tiles: int, rows: int,
) -> _Plan:  # fmt: skip
    """The launches of wgrad: a block adds up a part of the tiles of its channels."""
    shape, dtype = problem.shape, problem.dtype
    each = channel_tiles * problem.axes[0].taps
    room = SMS * int(constants["RESIDENT"])
    splits = max(1, min(int(room / each), -(-tiles // rows)))
    numel = math.prod(shape.w_size)
    params.channel_tiles, params.splits = FastDiv(channel_tiles), FastDiv(splits)
    second = None
    if splits > 1:
        d, h, w = (a.taps for a in problem.axes)
        strides = params.w_k, params.w_t, params.w_r, params.w_s
        K = shape.K
        if form.inner:  # lanes write neighbours
            second = _second(problem, splits, (d, h, w, K), (*strides[1:], strides[0]))
            params.w_k, params.w_t, params.w_r, params.w_s = 1, h * w * K, w * K, K
        else:
            second = _second(problem, splits, (K, d, h, w), strides)
            params.w_k, params.w_t, params.w_r, params.w_s = d * h * w, h * w, w, 1
    constants["RESULT"] = ELEMENT[dtype] if second is None else ACCUMULATOR[dtype]
    first = launch_of(
        SOURCE, "conv_wgrad_depthwise", constants, params, grid=(each * splits,), block=(form.threads,),
        inputs=("grad_y", "x"), outputs=("grad_w" if second is None else "partial",),
    )  # fmt: skip
    return _Plan(first, second, splits * numel if second else 0)


def _second(
    problem: _Problem, splits: int, size: tuple[int, int, int, int], strides: tuple[int, int, int, int]
) -> Launch:  # fmt: skip
    """The launch that adds up partial gradients, dense and of this size, into a gradient of these strides.

    Axes are named as if they were K T R S.
    """
    numel, dtype = math.prod(size), problem.dtype
    _, planes, strips, w_tiles = (FastDiv(n) for n in size)
    w_k, w_t, w_r, w_s = strides
    params = _Params(
        w_k=w_k, w_t=w_t, w_r=w_r, w_s=w_s, numel=numel, w_tiles=w_tiles, strips=strips, planes=planes,
        splits=FastDiv(splits), items=numel,
    )  # fmt: skip
    constants: dict[str, str | int] = {
        "PASS": "REDUCE", "ELEMENT": ELEMENT[dtype], "ACCUMULATOR": ACCUMULATOR[dtype], "INDEX": "int",
        "PADDING": "ZEROS",
    }  # fmt: skip
    return launch_of(
        SOURCE, "conv_reduce_depthwise", constants, params, grid=(-(-numel // REDUCED),),
        block=(8 * REDUCED,), inputs=("partial",), outputs=("grad_w",),
    )  # fmt: skip


# ---- large kernels ---------------------------------------------------------------------------------------

LARGE_SOURCE = "conv_depthwise_large.cu"
LARGE_THREADS = 256
LARGE_SHARED = 99 * 1024
"""Bytes of a block: what every GPU grants (8.6 and 8.9 no more), and room for two in an H100's."""
LARGE_SUMS = 48
"""Sums of several rows that a thread of wgrad may keep."""
STAGING, SUMMING = 14, 1.15
"""Instructions that staging an element takes, and a multiply-add."""


class _LargeParams(ctypes.Structure):
    """`struct Params` of conv_depthwise_large.cu."""

    _fields_ = [
        ("image", CStrides),
        ("result", CStrides),
        *((name, ctypes.c_longlong) for name in ("w_k", "w_r", "w_s", "numel")),
        *((name, FastDiv) for name in ("row_tiles", "column_tiles", "groups", "multiplier")),
        *((name, ctypes.c_int) for name in ("N", "K", "H", "W", "result_h", "result_w")),
        *((name, ctypes.c_int) for name in ("pad_h", "pad_w", "splits")),
    ]


def _odd_packs(n: int) -> int:
    """As in the kernel: at least n, an odd number of four."""
    return (-(-n // 4) | 1) * 4


class Block(NamedTuple):
    """What a block of the large form computes, and one thread of it: the constants of these names."""

    channels: int
    own_rows: int
    own_columns: int
    sum_rows: int
    sum_columns: int
    tile: int

    @property
    def items(self) -> int:
        return self.channels * self.own_rows * (self.own_columns // self.tile)

    @property
    def threads(self) -> int:
        return min(LARGE_THREADS, -(-self.items // 32) * 32)

    @property
    def shared(self) -> int:
        """Accumulators: image and filter of each channel."""
        columns = self.own_columns + -(-self.sum_columns // 4) * 4
        image = (self.own_rows + self.sum_rows - 1) * _odd_packs(columns)
        filters = self.sum_rows * _odd_packs(self.sum_columns)
        return self.channels * (_odd_packs(image) + _odd_packs(filters))

    def cost(self, own: tuple[int, int], sums: tuple[int, int], pack_bytes: int) -> float:
        """Instructions for a channel's plane of `own` results, each of so many terms. Where lanes move less
        than a sector at a time, `pack_bytes`, what is staged costs as many times as much.
        """
        sizes = zip((*own, *sums), self[1:5], strict=True)
        blocks = math.prod(-(-size // part) for size, part in sizes) / self.channels
        rounds = -(-self.items // self.threads) * self.threads
        terms = self.sum_rows * self.sum_columns * self.tile
        idle = max(1.0, LARGE_THREADS / 2 / self.threads)
        staging = STAGING * max(1.0, 32 / pack_bytes)
        return blocks * (staging * self.shared + SUMMING * rounds * terms) * idle


def _parts(extent: int, most: int) -> list[int]:
    """Sizes of equal parts of an axis, of at most `most` each."""
    fewest = -(-extent // most)
    return sorted({-(-extent // n) for n in range(fewest, min(extent, 8 * fewest) + 1)})


def _blocks(problem: _Problem, inner: bool) -> Iterator[Block]:
    """All that are worth a thought."""
    _, h, w = problem.axes
    size, a, wgrad = problem.dtype.itemsize, problem.accumulator, problem.op == "wgrad"
    rows, columns = problem.result_size[1:]
    for tile in (16, 12, 8) if a == 1 else (8,):
        tiles = -(-(w.taps if wgrad else columns) // tile)
        if wgrad:
            owns = [(h.taps, tiles * tile)]
            sums = [(r, s) for r in (4, 8, 16, 32) for s in (8, 16, 32)]
        else:
            owns = [(r, n * tile) for r in _parts(rows, 64) for n in _parts(tiles, 64 // tile)]
            sums = [(h.taps, w.taps)]
        counts = [2**i for i in range(5) if not inner or 2**i <= 32 // size]
        for own in owns:
            for terms in sums:
                for channels in counts:
                    block = Block(channels, *own, *terms, tile)
                    kept = -(-block.items // block.threads) * tile * a
                    fits = 4 * a * block.shared <= LARGE_SHARED and (
                        not wgrad or kept <= LARGE_SUMS
                    )
                    if fits:
                        yield block


def _large_plan(problem: _Problem, w: tuple[int, ...], activation: str, residual: bool) -> _Plan:
    shape, dtype, op = problem.shape, problem.dtype, problem.op
    _, h, w_axis = problem.axes
    inner = problem.source.c == problem.result.c == 1
    taps, places = (h.taps, w_axis.taps), (problem.result_size[1], problem.result_size[2])
    own, sums = (taps, places) if op == "wgrad" else (places, taps)

    def cost(block: Block) -> float:
        return block.cost(own, sums, block.channels * dtype.itemsize if inner else 32)

    block = min(_blocks(problem, inner), key=cost)
    part = block[3:5] if op == "wgrad" else block[1:3]
    tiles = [-(-n // m) for n, m in zip(places, part, strict=True)]
    groups = -(-problem.channels // block.channels)
    y_vec = 1
    if not inner and op != "wgrad":
        most = math.gcd(block.tile, PACK_BYTES // dtype.itemsize)
        y_vec = widest_pack((problem.result,), "w", places[1], most)
    # A coordinate in the padding is turned into an address, too, though nobody reads there.
    beyond = [abs(a.before) + 2 * a.taps + 128 for a in problem.axes]
    sizes = [n + more for n, more in zip(problem.source_size, beyond, strict=True)]
    span = max(
        problem.source.span((shape.N, shape.K, *sizes)),
        problem.result.span((shape.N, shape.K, *(n + 128 for n in problem.result_size))),
        sum((n - 1) * step for n, step in zip(shape.w_size, w, strict=True)),
    )
    pads = [a.taps - 1 - a.before if problem.back else a.before for a in (h, w_axis)]
    w_r, w_s = (0, *w[2:])[-2:]
    numel = math.prod(shape.w_size)
    params = _LargeParams(
        CStrides(*problem.source[:5]), CStrides(*problem.result[:5]), w[0], w_r, w_s, numel,
        FastDiv(tiles[0]), FastDiv(tiles[1]), FastDiv(groups), FastDiv(problem.multiplier), shape.N,
        problem.channels, *problem.source_size[1:], *places, *pads, 1,
    )  # fmt: skip
    constants: dict[str, str | int] = {
        "PASS": op.upper(), "ELEMENT": ELEMENT[dtype], "ACCUMULATOR": ACCUMULATOR[dtype],
        "INDEX": "long long" if span > INT32_MAX else "int", "PADDING": _padding(shape),
        "CHANNELS_INNER": int(inner), "CHANNELS": block.channels, "OWN_ROWS": block.own_rows,
        "OWN_COLUMNS": block.own_columns, "SUM_ROWS": block.sum_rows, "SUM_COLUMNS": block.sum_columns,
        "TILE": block.tile, "Y_VEC": y_vec, "THREADS": block.threads,
    }  # fmt: skip
    inputs, output = _TENSORS[op]
    blocks, partial, second = groups * shape.N * math.prod(tiles), 0, None
    if op == "wgrad":
        params.splits = _strips(shape.N * math.prod(tiles), 0, groups, 2 * SMS)
        blocks = groups * params.splits
        if params.splits > 1:
            second = _second(problem, params.splits, (shape.K, 1, *taps), (w[0], 0, w_r, w_s))
            partial, output = params.splits * numel, "partial"
            params.w_k, params.w_r, params.w_s = math.prod(taps), taps[1], 1
        constants |= {"RESULT": (ACCUMULATOR if second else ELEMENT)[dtype], "TAPS_W": taps[1]}
    else:
        constants |= {"ACTIVATION": activation, "RESIDUAL": int(residual)}
    first = launch_of(
        LARGE_SOURCE, f"conv_{op}_depthwise_large", constants, params, grid=(blocks,), block=(block.threads,),
        inputs=inputs, outputs=(output,), shared_bytes=4 * problem.accumulator * block.shared,
    )  # fmt: skip
    return _Plan(first, second, partial)


# ---- what the registry calls -----------------------------------------------------------------------------


def _run(
    op: str,
    shape: ConvShape,
    x: Tensor,
    w: tuple[int, ...],
    y: Tensor,
    inputs: tuple[Tensor, Tensor],
    output: Tensor,
    bias: Tensor | None,
    epilogue: Epilogue,
) -> None:
    layouts = [layout_of(x), layout_of(y)]
    if epilogue.residual is not None:  # is read as the result is written
        i = 0 if output is x else 1
        layouts[i] = layouts[i][0], min(layouts[i][1], layout_of(epilogue.residual)[1])
    plan = _plan(
        op,
        shape,
        y.dtype,
        layouts[0],
        w,
        layouts[1],
        epilogue.activation,
        epilogue.residual is not None,
    )
    finish = epilogue.scale, None if bias is None else bias.contiguous(), epilogue.residual
    launch(plan.first, inputs + finish, (output,))


def conv_fprop(
    shape: ConvShape,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """Fill y ``N K *output`` with the convolution of x ``N C *spatial`` and w ``K 1 *kernel``."""
    epilogue = epilogue or NO_EPILOGUE
    _run("fprop", shape, x, w.stride(), y, (x, w), y, bias, epilogue)
    if epilogue.mean is not None and epilogue.var is not None:
        batch_norm.batch_norm_stats(NormShape.of(shape.y_size), y, epilogue.mean, epilogue.var)


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
    _run(
        "dgrad",
        shape,
        grad_x,
        w.stride(),
        grad_y,
        (grad_y, w),
        grad_x,
        bias,
        epilogue or NO_EPILOGUE,
    )


def conv_wgrad(shape: ConvShape, grad_y: Tensor, x: Tensor, grad_w: Tensor) -> None:
    """Fill grad_w ``K 1 *kernel``: the sum over all places that a weight was used at."""
    plan = _plan("wgrad", shape, x.dtype, layout_of(x), grad_w.stride(), layout_of(grad_y), "none")
    if plan.second is None:
        launch(plan.first, (grad_y, x), (grad_w,))
        return
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(plan.partial, dtype=wide, device=x.device)
    launch(plan.first, (grad_y, x), (partial,))
    launch(plan.second, (partial,), (grad_w,))
