"""Launches `kernels/pool.cu`: max and average pooling, adaptive and global too, forward and backward.

Tensors are read in place by their strides. A plan picks one of the kernel's three forms (tile, loop, reduce)
and the widths of its accesses, by arithmetic on sizes, strides and alignments alone.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from cnnops.cuda.kernel import (
    ACCUMULATOR,
    ELEMENT,
    INT32_MAX,
    FastDiv,
    Launch,
    alignment,
    launch_of,
)
from cnnops.cuda.launch import launch
from cnnops.shapes import PoolShape, Shape

SOURCE = "pool.cu"
THREADS = 256
PACK_BYTES = 16
LANES = (32, 16, 8, 4, 2, 1)
"""Channel packs side by side in the reduce form, widest first."""
WASTE = 1.25
"""Tiles may reach over a row, and lanes over the channels, to this many times their number."""
TILE_VALUES = 16
"""Values of a tile of several rows: with as many offsets they take a quarter of a thread's registers."""
HIGH_COLUMNS = {False: 18, True: 32}
"""The most values in one row of x for such a tile, along w and in packs of channels; of long tiles too."""
SHIFTED_HALVES = 32
"""The most columns of 2 bytes that are shifted into place, in tiles of one row: it takes registers."""
SHIFTED_BYTES = 48
"""Of shifted columns, beyond which a tile is half as high."""
SAVES = 0.75
"""A tile is made twice as high where this lowers the rows that are read for each written one so far."""
STAGE_BYTES = 40 * 1024
"""Of shared memory, for a block's results; 48 K need no request."""
COLUMN_BYTES = 256
"""Columns of one row that a thread can hold in registers, forward."""
COLUMNS = 64
"""The most that the kernel has a set of."""
COLUMN_BYTES_BACKWARD = 128
"""The same backward, with their offsets, beside the tile's sums."""
UNROLLED = 4096
"""The most pairs of a value and a window in a tile's code, backward."""
REDUCE_PLACES = {False: 32, True: 16}
"""Places from which on a window is shared by several threads: of several windows a row, of the only one."""
REDUCE_PACKS = 8
"""Packs of a window that a thread of the reduce form takes."""
FULL_GPU = 2**17
"""Threads that keep any GPU busy; large windows are shared where there are fewer outputs."""
FAR_APART = 4
"""A warp whose lanes are more places apart than this touches a sector a lane: no form for scalar accesses."""
MAX_TILES = INT32_MAX - 2**16
"""Tile numbers are 32-bit, with room for a block's last threads."""

OFFSET = {torch.uint8: "unsigned char", torch.int32: "int"}


Layout = tuple[tuple[int, ...], int]
"""Strides in elements, and the alignment of the address."""


class View(NamedTuple):
    """Where a tensor N C D H W lies: strides in elements (0 along an axis of size 1), the address's alignment
    and the element's size in bytes."""

    n: int
    c: int
    d: int
    h: int
    w: int
    alignment: int
    itemsize: int

    def span(self, size: Sequence[int]) -> int:
        """Elements from the first to the last."""
        return sum((length - 1) * step for length, step in zip(size, self[:5], strict=True))

    def dense(self, size: Sequence[int]) -> View | None:
        """With the steps of axes of size 1 too, if columns are innermost and there are no gaps, else None."""
        steps = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
        if any(length > 1 and a != b for length, a, b in zip(size, self, steps, strict=False)):
            return None
        n, c, d, h, w = steps
        return View(n, c, d, h, w, self.alignment, self.itemsize)


class Axis(NamedTuple):
    """One spatial axis of the problem. In adaptive pooling `window` is the largest and the rest unused."""

    size: int
    out: int
    window: int
    stride: int
    dilation: int
    pad: int

    @property
    def reach(self) -> int:
        """Places from a window's first to its last."""
        return (self.window - 1) * self.dilation + 1

    @property
    def whole(self) -> bool:
        """Whether the one window is the axis itself."""
        return self.out == 1 and self.pad == 0 and self.window == self.size and self.dilation == 1


class Problem(NamedTuple):
    """One call's tensors: those of the input's and of the output's size, and the offsets if there are any."""

    N: int
    C: int
    axes: tuple[Axis, ...]
    adaptive: bool
    dtype: torch.dtype
    x: View
    y: View
    offsets: View | None

    @property
    def x_size(self) -> tuple[int, ...]:
        return (self.N, self.C, *(a.size for a in self.axes))

    @property
    def y_size(self) -> tuple[int, ...]:
        return (self.N, self.C, *(a.out for a in self.axes))

    @property
    def x_dense(self) -> View | None:
        return self.x.dense(self.x_size)

    @property
    def y_dense(self) -> View | None:
        if self.offsets is not None and self.offsets.dense(self.y_size) is None:
            return None
        return self.y.dense(self.y_size)

    @property
    def pack(self) -> int:
        return PACK_BYTES // self.dtype.itemsize


class Form(NamedTuple):
    """The constants by which forms differ, but for the fixed geometry. The reduce form has per_output > 1."""

    fixed: bool
    inner: bool
    c_vec: int = 1
    x_vec: int = 1
    y_vec: int = 1
    tile: int = 1
    tile_h: int = 1
    shifted: bool = False
    staged: bool = False
    per_output: int = 1
    lanes: int = 1


class CStrides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_longlong) for name in "ncdhw"]


class CAxis(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("size", "out", "window", "stride", "dilation", "pad")),
        *((name, FastDiv) for name in ("by_stride", "by_in", "by_out")),
    ]


class Params(ctypes.Structure):
    """`struct PoolParams`."""

    _fields_ = [
        *((name, CStrides) for name in ("x", "y", "offsets")),
        ("reciprocal", ctypes.c_double),
        *((name, CAxis) for name in "dhw"),
        *((name, FastDiv) for name in ("c_tiles", "w_tiles", "rows", "planes")),
        *((name, FastDiv) for name in ("row_packs", "window_rows")),
        *((name, ctypes.c_int) for name in ("N", "C", "images", "tiles", "block_tiles")),
        *((name, ctypes.c_int) for name in ("adaptive", "count_include_pad", "divisor")),
    ]


def supports(op: str, shape: Shape, dtype: torch.dtype) -> str | None:
    """None, or why `op` cannot run on this problem."""
    if not isinstance(shape, PoolShape):
        return f"expected a PoolShape, got {type(shape).__name__}"
    if dtype not in ELEMENT:
        return f"dtype {dtype}: expected float32, float64, float16 or bfloat16"
    image = shape.C * max(math.prod(shape.spatial), math.prod(shape.output))
    if image > MAX_TILES:
        return f"{image} values an image: expected at most {MAX_TILES}"
    return None


# ---- the problem in the kernel's terms -------------------------------------------------------------------


def layout_of(tensor: torch.Tensor) -> Layout:
    """What a plan depends on of a tensor."""
    return tensor.stride(), alignment(tensor)


def view_of(size: tuple[int, ...], layout: Layout, itemsize: int) -> View:
    """Where a tensor N C (D) (H) W of this layout lies."""
    n, c, *spatial = (
        step if length > 1 else 0 for length, step in zip(size, layout[0], strict=True)
    )
    d, h, w = (0,) * (3 - len(spatial)) + tuple(spatial)
    return View(n, c, d, h, w, layout[1], itemsize)


def _axes(shape: PoolShape) -> tuple[tuple[Axis, ...], bool]:
    """The three axes, and whether windows are adaptive: those that divide the input evenly are ordinary."""
    missing = 3 - shape.dims
    columns = [
        shape.DHW, shape.ZPQ, shape.TRS, (1,) * missing + shape.stride, (1,) * missing + shape.dilation,
        (0,) * missing + tuple(before for before, _ in shape.padding),
    ]  # fmt: skip
    axes = tuple(Axis(*values) for values in zip(*columns, strict=True))
    if shape.adaptive_output is None:
        return axes, False
    if all(a.size % a.out == 0 for a in axes):
        even = ((a, a.size // a.out) for a in axes)
        return tuple(a._replace(window=window, stride=window) for a, window in even), False
    return axes, True


def _turned(problem: Problem) -> Problem | None:
    """The average whose result is this one's gradient: windows one place apart, over the same windows of
    grad_y, padded by as many places as x was not. None where it would be mostly padding."""
    for a in problem.axes:
        if a.stride > 1 or (1 < a.window and a.out < a.window):
            return None
    axes = tuple(a._replace(size=a.out, out=a.size, pad=a.window - 1 - a.pad) for a in problem.axes)
    return problem._replace(axes=axes, x=problem.y, y=problem.x)


def _joined(problem: Problem) -> Problem:
    """Axes that one window spans whole, and along which x is one run, taken as a single axis w."""
    (d, h, w), x = problem.axes, problem.x
    one = Axis(1, 1, 1, 1, 1, 0)
    if h.whole and w.whole and (h.size == 1 or x.h == x.w * w.size or w.size == 1):
        step = x.w if w.size > 1 else x.h
        size = h.size * w.size
        w, h, x = Axis(size, 1, size, 1, 1, 0), one, x._replace(h=0, w=step)
        if d.whole and (d.size == 1 or x.d == x.w * size or size == 1):
            step = x.w if size > 1 else x.d
            size *= d.size
            w, d, x = Axis(size, 1, size, 1, 1, 0), one, x._replace(d=0, w=step)
    return problem._replace(axes=(d, h, w), x=x)


def _divisor(shape: PoolShape, axes: Sequence[Axis]) -> int:
    """The divisor that all windows of an average share, or 0 where they differ."""
    if shape.divisor_override:
        return shape.divisor_override
    for a in axes:
        padded = a.pad if shape.count_include_pad else 0
        if padded != a.pad or (a.out - 1) * a.stride - a.pad + a.window > a.size + padded:
            return 0
    return math.prod(a.window for a in axes)


# ---- how wide, how large, which form ---------------------------------------------------------------------


def _widths(most: int) -> Iterator[int]:
    """Powers of two from `most` down to 1."""
    while most >= 1:
        yield most
        most //= 2


def widest_pack(views: Sequence[View | None], axis: str, extent: int, most: int) -> int:
    """The widest pack, up to `most` elements, that is contiguous along `axis` and aligned in every view."""
    given = [view for view in views if view is not None]
    if any(getattr(view, axis) != 1 for view in given):
        return 1
    others = [
        step for view in given for name, step in zip("ncdhw", view, strict=False) if name != axis
    ]
    for width in _widths(most):
        aligned = all(view.alignment >= min(PACK_BYTES, width * view.itemsize) for view in given)
        if aligned and extent % width == 0 and all(step % width == 0 for step in others):
            return width
    return 1


def _lanes(slots: int) -> int:
    return next(n for n in LANES if n >= slots > n // 2 or -(-slots // n) * n <= WASTE * slots)


def _rows(h: Axis, extent: int, most: int) -> int:
    """How high a tile is made for windows one place apart to share the rows that they overlap in."""

    def read(rows: int) -> float:
        return (rows - 1 + h.window) / rows

    rows = 1
    while (
        2 * rows <= most
        and h.stride == h.dilation == 1
        and -(-extent // (2 * rows)) * 2 * rows <= WASTE * extent
        and read(2 * rows) <= SAVES * read(rows)
    ):
        rows *= 2
    return rows


def _most_rows(problem: Problem, size: Sequence[int], form: Form) -> int:
    """The most rows of a tile: by registers, shared memory, and what keeps a GPU busy."""
    row = form.tile * form.c_vec
    most = min(
        TILE_VALUES * 4 // max(problem.dtype.itemsize, 4) // row, math.prod(size) // row // FULL_GPU
    )
    if form.staged:
        bytes_ = problem.dtype.itemsize + (problem.offsets.itemsize if problem.offsets else 0)
        whole = -(-size[-1] // form.tile) <= THREADS
        most = min(most, STAGE_BYTES // (THREADS * form.tile * bytes_) if whole else 1)
    return most


def _forward_tile(problem: Problem, inner: bool, c_vec: int) -> Form | None:
    """The tile form of a forward pass, or None where it would not fit in registers."""
    _, h, w = problem.axes
    itemsize = problem.dtype.itemsize
    x_most = y_most = 1
    if inner:
        tile = 2 if w.stride < w.reach and w.out > 1 and 2 * c_vec <= 8 else 1
    else:
        x_most = widest_pack((problem.x,), "w", w.size, problem.pack)
        y_most = widest_pack((problem.y, problem.offsets), "w", w.out, problem.pack)
        packs = (problem.x_dense or x_most == problem.pack) and (
            problem.y_dense or y_most == problem.pack
        )
        # Without packs it is neighbouring lanes that make whole sectors.
        tile = problem.pack if packs else 1
    for size in _widths(tile):
        x_vec = math.gcd(size * w.stride, x_most)
        held = (size - 1) * w.stride + w.reach
        shifted = size > 1 and x_vec < min(size * w.stride, problem.pack) and not inner
        shifted = (
            shifted and problem.x_dense is not None and (itemsize > 2 or held <= SHIFTED_HALVES)
        )
        staged = math.gcd(size, y_most) < size and not inner
        x_vec = 1 if shifted else x_vec
        head = -w.pad % x_vec
        columns = -(-(head + (size - 1) * w.stride + w.reach) // x_vec) * x_vec
        used = min(columns, size * w.window) if x_vec == 1 else columns
        few = held * c_vec <= HIGH_COLUMNS[inner]
        fits = used * c_vec * max(itemsize, 4) <= COLUMN_BYTES and columns <= COLUMNS
        # Windows that share columns hold parts of them all.
        fits = fits and (few or size <= 4 or w.stride >= w.reach or w.dilation > 1)
        if fits and (size == 1 or -(-w.out // size) * size <= WASTE * w.out):
            y_vec = 1 if staged or inner else size
            form = Form(True, inner, c_vec, x_vec, y_vec, size, 1, shifted, staged)
            if few and not (shifted and itemsize == 2):
                most = _most_rows(problem, problem.y_size, form)
                if shifted and held * itemsize > SHIFTED_BYTES:
                    most //= 2
                form = form._replace(tile_h=_rows(h, h.out, most))
            return form
    return None


def _backward_tile(problem: Problem, inner: bool, c_vec: int) -> Form | None:
    """The tile form of a backward pass: a tile starts at a multiple of the stride."""
    _, h, w = problem.axes
    itemsize = problem.dtype.itemsize
    x_most = y_most = 1
    staged = False
    if inner:
        tile = 2 if w.stride == 1 and 2 * c_vec <= 8 else w.stride
    else:
        x_most = widest_pack((problem.x,), "w", w.size, problem.pack)
        y_most = widest_pack((problem.y, problem.offsets), "w", w.out, problem.pack)
        tile = problem.pack if problem.pack % w.stride == 0 else w.stride
        staged = x_most % tile > 0 and problem.x_dense is not None
        staged = staged and (h.stride == 1 or -(-w.size // tile) <= THREADS)
        if not staged:
            tile = x_most if x_most % w.stride == 0 else w.stride
    x_vec = 1 if staged else math.gcd(tile, x_most)
    y_vec = math.gcd(tile // w.stride, y_most)
    shifted = y_vec < tile // w.stride and not inner and problem.y_dense is not None
    y_vec = 1 if shifted else y_vec
    form = Form(True, inner, c_vec, x_vec, y_vec, tile, h.stride, shifted, staged)
    if h.stride == 1:
        rows = _rows(h, h.size, _most_rows(problem, problem.x_size, form))
        form = form._replace(tile_h=rows)

    first = -((w.reach - 1 - w.pad) // w.stride)
    last = (tile - 1 + w.pad) // w.stride
    columns = -(-(first % y_vec + last - first + 1) // y_vec) * y_vec
    rows = (form.tile_h - 1 + h.pad) // h.stride + (h.reach - 1 - h.pad) // h.stride + 1
    fits = form.tile_h <= FAR_APART
    fits = (
        fits
        and tile <= max(FAR_APART, problem.pack)
        and tile * form.tile_h * c_vec <= 2 * TILE_VALUES
    )
    fits = fits and columns * c_vec * (itemsize + 1) <= COLUMN_BYTES_BACKWARD
    fits = fits and rows * columns * form.tile_h * tile * c_vec <= UNROLLED
    return form if fits else None


def _reduced(problem: Problem, inner: bool, c_vec: int) -> Form:
    w = problem.axes[2]
    places = math.prod(a.window for a in problem.axes)
    x_vec, lanes = 1, 1
    if inner:
        lanes = _lanes(problem.C // c_vec)
    elif w.whole:
        x_vec = widest_pack((problem.x,), "w", w.size, problem.pack)
    shares = max(lanes * places // (x_vec * REDUCE_PACKS), 1)
    per_output = max(8, lanes, min(THREADS, 1 << (shares.bit_length() - 1)))
    return Form(False, inner, c_vec, x_vec, per_output=per_output, lanes=lanes)


def _wants_reduce(problem: Problem, inner: bool, c_vec: int, tile: Form | None) -> bool:
    w = problem.axes[2]
    single = w.out == 1 and not inner
    if math.prod(a.window for a in problem.axes) < REDUCE_PLACES[single]:
        return False
    packs = tile is not None and (tile.shifted or tile.x_vec > 1)
    scattered = not inner and w.size // w.out > FAR_APART and not packs
    return single or scattered or math.prod(problem.y_size) // c_vec < FULL_GPU


# ---- launches --------------------------------------------------------------------------------------------

_TENSORS = {
    "max_pool_fwd": (("x",), ("y", "offsets")),
    "max_pool_bwd": (("grad_y", "offsets"), ("grad_x",)),
    "max_pool_gather": (("x", "offsets"), ("y",)),
    "avg_pool_fwd": (("x",), ("y",)),
    "avg_pool_bwd": (("grad_y",), ("grad_x",)),
}
_REDUCED = {"max_pool_fwd": "max_pool_reduce", "avg_pool_fwd": "avg_pool_reduce"}


def _chosen(op: str, problem: Problem) -> tuple[Form, Problem]:
    """The form, and the problem as that form sees it."""
    views = (problem.x, problem.y, problem.offsets)
    inner = problem.C > 1 and all(view is None or view.c == 1 for view in views)
    c_vec = widest_pack(views, "c", problem.C, problem.pack) if inner else 1
    tile = None
    if op.endswith("_bwd"):
        tile = None if problem.adaptive else _backward_tile(problem, inner, c_vec)
        if tile is None:
            problem = _joined(problem)
            most = 1 if inner else problem.pack
            pack = widest_pack((problem.x,), "w", problem.axes[2].size, most)
            return Form(False, inner, c_vec, pack, tile=pack), problem
    elif op in _REDUCED:
        tile = None if problem.adaptive else _forward_tile(problem, inner, c_vec)
        joined = _joined(problem)
        if _wants_reduce(joined, inner, c_vec, tile):
            return _reduced(joined, inner, c_vec), joined
    return tile or Form(False, inner, c_vec), problem


@lru_cache(4096)
def _plan(
    op: str,
    shape: PoolShape,
    dtype: torch.dtype,
    offset: torch.dtype,
    x: Layout,
    y: Layout,
    offsets: Layout | None,
) -> Launch:
    """The launch of `op`; x is of the input's size (x, grad_x), y of the output's (y, grad_y)."""
    inputs, outputs = _TENSORS[op]
    problem = Problem(
        shape.N,
        shape.C,
        *_axes(shape),
        dtype,
        view_of(shape.x_size, x, dtype.itemsize),
        view_of(shape.y_size, y, dtype.itemsize),
        None if offsets is None else view_of(shape.y_size, offsets, offset.itemsize),
    )
    divisor = 0 if problem.adaptive or op.startswith("max") else _divisor(shape, problem.axes)
    if op == "avg_pool_bwd" and divisor and (turned := _turned(problem)):
        op, problem = "avg_pool_fwd", turned
    spans = [problem.x.span(problem.x_size), problem.y.span(problem.y_size)]
    if problem.offsets is not None:
        spans.append(problem.offsets.span(problem.y_size))
    form, problem = _chosen(op, problem)
    axes, adaptive = problem.axes, problem.adaptive
    entry = _REDUCED[op] if form.per_output > 1 else op

    # The tensor that is written, in tiles.
    extents = [a.size if op.endswith("_bwd") else a.out for a in axes]
    slots = -(-shape.C // (form.c_vec * form.lanes))
    grid_axes = (slots, -(-extents[2] // form.tile), -(-extents[1] // form.tile_h), extents[0])
    per_image = math.prod(grid_axes)
    images = min(shape.N, MAX_TILES // per_image)
    tiles = images * per_image
    block_tiles = THREADS // form.per_output
    if form.staged and form.tile_h > 1:  # whole rows: a block's tiles are one run
        block_tiles -= block_tiles % grid_axes[1]
    blocks = -(-tiles // block_tiles)

    products = [(a.size + 1) * (a.out + 1) for a in axes] if adaptive else [0]
    constants: dict[str, str | int] = {
        "ELEMENT": ELEMENT[dtype],
        "ACCUMULATOR": ACCUMULATOR[dtype],
        "OFFSET": OFFSET[offset],
        "INDEX": "long long" if max(*spans, *products) > INT32_MAX - 2 * PACK_BYTES else "int",
        "CHANNELS_INNER": int(form.inner),
        "C_VEC": form.c_vec,
        "X_VEC": form.x_vec,
        "Y_VEC": form.y_vec,
        "FIXED": int(form.fixed),
        "TILE": form.tile,
        "TILE_H": form.tile_h,
        "SHIFTED": int(form.shifted),
        "STAGED": int(form.staged),
        "PAD_H": axes[1].pad if form.fixed else 0,
        "PAD_W": axes[2].pad if form.fixed else 0,
        "PER_OUTPUT": form.per_output,
        "LANES": form.lanes,
        "UNIFORM": int(divisor != 0),
        "THREADS": THREADS,
        entry.upper(): 1,
    }
    for name, axis in zip("DHW", axes, strict=True):
        constants[f"WINDOW_{name}"] = axis.window if form.fixed else 1
        constants[f"STRIDE_{name}"] = axis.stride if form.fixed else 1
        constants[f"DILATION_{name}"] = axis.dilation if form.fixed else 1
    views = [problem.x, problem.y, problem.offsets]
    if form.shifted or form.staged:
        sizes = (problem.x_size, problem.y_size, problem.y_size)
        views = [
            view and (view.dense(size) or view) for view, size in zip(views, sizes, strict=True)
        ]
    params = Params(
        *(CStrides(*(view or ())[:5]) for view in views),
        1 / divisor if divisor else 0.0,
        *(CAxis(*axis, FastDiv(axis.stride), FastDiv(axis.size), FastDiv(axis.out)) for axis in axes),
        *(FastDiv(extent) for extent in grid_axes),
        FastDiv(max(axes[2].window // form.x_vec, 1)), FastDiv(axes[1].window),
        shape.N, shape.C, images, tiles, block_tiles,
        adaptive, shape.count_include_pad and not adaptive, divisor,
    )  # fmt: skip
    return launch_of(
        SOURCE, entry, constants, params, grid=(blocks, -(-shape.N // images)), block=(THREADS,),
        inputs=inputs, outputs=outputs,
    )  # fmt: skip


# ---- operations ------------------------------------------------------------------------------------------


def max_pool_fwd(
    shape: PoolShape, x: torch.Tensor, y: torch.Tensor, offsets: torch.Tensor | None
) -> None:
    """y = the maximum of each window, offsets = its place there; None where nobody asks for offsets."""
    kept = (torch.uint8, None) if offsets is None else (offsets.dtype, layout_of(offsets))
    plan = _plan("max_pool_fwd", shape, x.dtype, kept[0], layout_of(x), layout_of(y), kept[1])
    launch(plan, (x,), (y, offsets))


def max_pool_bwd(
    shape: PoolShape, grad_y: torch.Tensor, offsets: torch.Tensor, grad_x: torch.Tensor
) -> None:
    """grad_x = the sum of grad_y over the windows whose maximum a place was."""
    layouts = layout_of(grad_x), layout_of(grad_y), layout_of(offsets)
    plan = _plan("max_pool_bwd", shape, grad_y.dtype, offsets.dtype, *layouts)
    launch(plan, (grad_y, offsets), (grad_x,))


def max_pool_gather(
    shape: PoolShape, x: torch.Tensor, offsets: torch.Tensor, y: torch.Tensor
) -> None:
    """y = x at the places that offsets name; 0 where a window holds nothing but padding."""
    layouts = layout_of(x), layout_of(y), layout_of(offsets)
    plan = _plan("max_pool_gather", shape, x.dtype, offsets.dtype, *layouts)
    launch(plan, (x, offsets), (y,))


def avg_pool_fwd(shape: PoolShape, x: torch.Tensor, y: torch.Tensor) -> None:
    """y = the sum of each window over its divisor."""
    plan = _plan("avg_pool_fwd", shape, x.dtype, torch.uint8, layout_of(x), layout_of(y), None)
    launch(plan, (x,), (y,))


def avg_pool_bwd(shape: PoolShape, grad_y: torch.Tensor, grad_x: torch.Tensor) -> None:
    """grad_x = the sum of grad_y over its divisor, over the windows that cover a place."""
    layouts = layout_of(grad_x), layout_of(grad_y)
    plan = _plan("avg_pool_bwd", shape, grad_y.dtype, torch.uint8, *layouts, None)
    launch(plan, (grad_y,), (grad_x,))
