"""Launches `kernels/unpool.cu`: max unpooling, forward and backward.

Tensors are read in place by their strides. A plan settles how many planes, or which parts of one, a block has
slots for, by arithmetic on sizes, strides and alignments alone.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from cnnops.cuda.kernel import ELEMENT, INT32_MAX, FastDiv, Launch, launch_of
from cnnops.cuda.launch import launch
from cnnops.cuda.pool import (
    MAX_TILES,
    PACK_BYTES,
    CStrides,
    Layout,
    View,
    layout_of,
    view_of,
    widest_pack,
)
from cnnops.shapes import Shape, UnpoolShape

SOURCE = "unpool.cu"
THREADS = 256
SLOTS = 8192
"""Places of y that a block owns at most: 32 KiB of shared memory, so that an SM holds several blocks."""
SEGMENT = 256
"""Indices that a warp reads at once, and whose least and largest are kept of larger planes."""
PER_THREAD = 4
"""Values of a thread, backward."""
SECTOR_BYTES = 32
"""What memory moves at least: so many neighbouring channels a block has, channels-last."""
BLOCKS = 1024
"""Blocks that keep any GPU busy; blocks have fewer planes where there would be fewer."""
MAX_PLANE = 2**26
"""Values, and places, of a plane: those of a block's planes are counted in 32 bits."""


class Params(ctypes.Structure):
    """`struct UnpoolParams`."""

    _fields_ = [
        *((name, CStrides) for name in ("x", "indices", "y")),
        *((name, FastDiv) for name in ("x_columns", "x_rows", "y_columns", "y_rows")),
        *((name, FastDiv) for name in ("channels", "sources", "slot_run", "source_run")),
        *((name, FastDiv) for name in ("groups", "parts")),
        *((name, ctypes.c_int) for name in ("N", "C", "planes", "places")),
        *((name, ctypes.c_int) for name in ("plane_places", "segments", "images", "count")),
    ]


def supports(op: str, shape: Shape, dtype: torch.dtype) -> str | None:
    """None, or why `op` cannot run on this problem."""
    if not isinstance(shape, UnpoolShape):
        return f"expected an UnpoolShape, got {type(shape).__name__}"
    if dtype not in ELEMENT:
        return f"dtype {dtype}: expected float32, float64, float16 or bfloat16"
    plane = max(math.prod(shape.spatial), math.prod(shape.output))
    if plane > MAX_PLANE:
        return f"{plane} places a plane: expected at most {MAX_PLANE}"
    if shape.C * math.prod(shape.spatial) > MAX_TILES or shape.N * shape.C > MAX_TILES:
        return (
            f"{list(shape.x_size)}: expected at most {MAX_TILES} values an image and as many planes"
        )
    return None


# ---- the problem in the kernel's terms -------------------------------------------------------------------


class Planes(NamedTuple):
    """Where a tensor's values lie, its spatial axes as few as its strides allow."""

    view: View
    size: tuple[int, int, int]

    @property
    def run(self) -> bool:
        return self.size[:2] == (1, 1)


def _joined(views: Sequence[View], spatial: Sequence[int]) -> list[Planes]:
    """The spatial axes of all views as one axis, if each plane has one stride from place to place."""
    size = (1,) * (3 - len(spatial)) + tuple(spatial)
    d, h, w = size
    joined = []
    for view in views:
        steps = [(n, s) for n, s in zip(size, (view.d, view.h, view.w), strict=True) if n > 1]
        if any(s != below * n for (_, s), (n, below) in zip(steps, steps[1:], strict=False)):
            return [Planes(view, (d, h, w)) for view in views]
        joined.append(view._replace(d=0, h=0, w=steps[-1][1] if steps else 0))
    return [Planes(view, (1, 1, math.prod(size))) for view in joined]


class Problem(NamedTuple):
    """One call's tensors: x and the indices, of one size, and y."""

    shape: UnpoolShape
    dtype: torch.dtype
    x: Planes
    indices: Planes
    y: Planes

    @property
    def inner(self) -> bool:
        """Whether neighbouring lanes go along channels."""
        return self.shape.C > 1 and self.indices.view.c == 1 and self.y.view.c == 1

    @property
    def sources(self) -> int:
        return math.prod(self.shape.spatial)

    @property
    def places(self) -> int:
        return math.prod(self.shape.output)


class Share(NamedTuple):
    """What a block of the forward pass owns: `places` places of each of `planes` planes."""

    planes: int
    places: int
    y_vec: int


def _share(problem: Problem) -> Share:
    shape, itemsize = problem.shape, problem.dtype.itemsize
    most = PACK_BYTES // itemsize
    if problem.inner:
        # Powers of two, so that packs of channels fit in.
        least = min(SECTOR_BYTES // itemsize, 1 << (shape.C - 1).bit_length())
        y_vec = widest_pack([problem.y.view], "c", shape.C, most)
        planes, taken = least, max(problem.places, problem.sources)
        while (
            planes < min(shape.C, shape.N * shape.C // (2 * BLOCKS)) and 2 * planes * taken <= SLOTS
        ):
            planes *= 2
    else:
        y_vec = widest_pack([problem.y.view], "w", problem.y.size[2], most)
        taken = max(problem.places, problem.sources)
        planes = max(min(SLOTS // taken, shape.N * shape.C // BLOCKS), 1)
    places = min(problem.places, SLOTS // planes)
    return Share(planes, places, y_vec)


# ---- launches --------------------------------------------------------------------------------------------


@lru_cache(4096)
def _problem(
    shape: UnpoolShape, dtype: torch.dtype, x: Layout, indices: Layout, y: Layout
) -> Problem:
    inputs = view_of(shape.x_size, x, dtype.itemsize), view_of(shape.x_size, indices, 8)
    return Problem(
        shape,
        dtype,
        *_joined(inputs, shape.spatial),
        *_joined([view_of(shape.y_size, y, dtype.itemsize)], shape.output),
    )


def _constants(problem: Problem, entry: str) -> dict[str, str | int]:
    N, C = problem.shape.N, problem.shape.C
    spans = [t.view.span((N, C, *t.size)) for t in (problem.x, problem.indices, problem.y)]
    return {
        "ELEMENT": ELEMENT[problem.dtype],
        "INDEX": "long long" if max(spans) > INT32_MAX else "int",
        "CHANNELS_INNER": int(problem.inner),
        "X_RUN": int(problem.x.run),
        "Y_RUN": int(problem.y.run),
        "Y_VEC": 1,
        "CHUNKED": 0,
        "SLOTS": SLOTS,
        "SEGMENT": SEGMENT,
        "THREADS": THREADS,
        "PER_THREAD": PER_THREAD,
        entry.upper(): 1,
    }


def _params(problem: Problem, share: Share, images: int, count: int) -> Params:
    shape, inner = problem.shape, problem.inner
    x, y = problem.x.size, problem.y.size
    return Params(
        *(CStrides(*t.view[:5]) for t in (problem.x, problem.indices, problem.y)),
        FastDiv(x[2]), FastDiv(x[1]), FastDiv(y[2]), FastDiv(y[1]),
        FastDiv(shape.C), FastDiv(problem.sources),
        FastDiv(share.planes if inner else share.places),
        FastDiv(share.planes if inner else problem.sources),
        FastDiv(-(-shape.C // share.planes)), FastDiv(-(-problem.places // share.places)),
        shape.N, shape.C, share.planes, share.places,
        problem.places, -(-share.planes * problem.sources // SEGMENT), images, count,
    )  # fmt: skip


class Forward(NamedTuple):
    """The launches of a forward pass, and the integers that the first one, if there is one, writes."""

    ranges: Launch | None
    fwd: Launch
    integers: int


@lru_cache(4096)
def _forward(problem: Problem) -> Forward:
    shape = problem.shape
    share = _share(problem)
    per_image, images = (shape.C, shape.N) if problem.inner else (shape.N * shape.C, 1)
    groups = images * -(-per_image // share.planes)
    params = _params(problem, share, shape.N, groups)
    chunked = share.places < problem.places
    varying = {"CHUNKED": int(chunked), "Y_VEC": share.y_vec}
    fwd = launch_of(
        SOURCE, "max_unpool_fwd", {**_constants(problem, "max_unpool_fwd"), **varying}, params,
        grid=(groups * params.parts.divisor,), block=(THREADS,),
        inputs=("x", "indices", "ranges"), outputs=("y",),
    )  # fmt: skip
    if not chunked:
        return Forward(None, fwd, 0)
    segments = groups * params.segments
    ranges = launch_of(
        SOURCE, "max_unpool_ranges", {**_constants(problem, "max_unpool_ranges"), "CHUNKED": 1}, params,
        grid=(-(-segments // (THREADS // 32)),), block=(THREADS,),
        inputs=("indices",), outputs=("ranges",),
    )  # fmt: skip
    return Forward(ranges, fwd, 2 * segments)


@lru_cache(4096)
def _backward(problem: Problem) -> Launch:
    shape = problem.shape
    per_image = shape.C * problem.sources
    images = min(shape.N, MAX_TILES // per_image)
    params = _params(problem, Share(1, problem.places, 1), images, images * per_image)
    return launch_of(
        SOURCE, "max_unpool_bwd", _constants(problem, "max_unpool_bwd"), params,
        grid=(-(-images * per_image // (THREADS * PER_THREAD)), -(-shape.N // images)),
        block=(THREADS,), inputs=("grad_y", "indices"), outputs=("grad_x",),
    )  # fmt: skip


# ---- operations ------------------------------------------------------------------------------------------


def max_unpool_fwd(
    shape: UnpoolShape, x: torch.Tensor, indices: torch.Tensor, y: torch.Tensor
) -> None:
    """y = x at the places that indices name, the last of several; 0 elsewhere."""
    plan = _forward(_problem(shape, x.dtype, layout_of(x), layout_of(indices), layout_of(y)))
    ranges = None
    if plan.ranges:
        ranges = torch.empty(plan.integers, dtype=torch.int32, device=x.device)
        launch(plan.ranges, (indices,), (ranges,))
    launch(plan.fwd, (x, indices, ranges), (y,))


def max_unpool_bwd(
    shape: UnpoolShape, grad_y: torch.Tensor, indices: torch.Tensor, grad_x: torch.Tensor
) -> None:
    """grad_x = grad_y at the places that indices name; 0 for an index outside of the plane."""
    layouts = layout_of(grad_x), layout_of(indices), layout_of(grad_y)
    launch(_backward(_problem(shape, grad_y.dtype, *layouts)), (grad_y, indices), (grad_x,))
