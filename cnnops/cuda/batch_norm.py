"""Launches `kernels/batch_norm.cu`: batch norm in training and inference, its backward, statistics alone.

A tensor N C *spatial is seen as N x C x L, wherever its elements lie, and cut into sites and slots as the
kernel's header describes. A tensor whose spatial axes cannot be walked with one stride, or that lies in the
other of PyTorch's two layouts than the result, is copied into the result's layout first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
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
from cnnops.shapes import NormShape, Shape

SOURCE = "batch_norm.cu"
THREADS = 256
WARPS = THREADS // 32
PACK_BYTES = 16
SECTOR_BYTES = 32
LANES = (32, 16, 8, 4, 2, 1)
"""Slots that a block reads side by side in channels-last, widest first."""
LANE_WASTE = 1.25
"""Several blocks together may have this many times the lanes that have a slot, else they are narrower."""
UNROLL = {True: 4, False: 8}
"""Packs that a thread has in flight: of 16 bytes, of fewer."""
FUSED_SITES = 16
"""With at most this many sites a thread, one launch does everything."""
SPLIT_SITES = 8
"""A split gives each thread at least this many sites."""
MAX_BLOCKS = 4096
"""Enough for the last wave of blocks to be a small part of all, on any GPU; more would only merge longer."""
MAX_SITES = INT32_MAX - 2**21
"""Site numbers are 32-bit, with room for the last split's end."""


Layout = tuple[tuple[int, ...], int]
"""Strides in elements, and the alignment of the address."""


class View(NamedTuple):
    """Where N x C x L lie: strides in elements (0 along an axis of size 1), and the address's alignment."""

    n: int
    c: int
    l: int  # noqa: E741
    alignment: int


class Problem(NamedTuple):
    """All that decides the launches of one call, but for eps and momentum."""

    shape: NormShape
    dtype: torch.dtype
    parameter: torch.dtype
    activation: str
    x: Layout | None
    residual: Layout | None
    y: Layout | None
    grad_x: Layout | None = None
    grad_residual: Layout | None = None
    from_result: bool = False
    """Whether `residual` is, in the backward pass, the layout of y."""

    @property
    def layouts(self) -> tuple[Layout | None, ...]:
        return self[4:9]


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_longlong) for name in ("image", "site", "slot")]


class Params(ctypes.Structure):
    """`struct BatchNormParams`."""

    _fields_ = [
        *((name, Strides) for name in ("x", "residual", "y", "grad_x", "grad_residual")),
        ("sites_per_image", FastDiv),
        *(
            (name, ctypes.c_int)
            for name in ("sites", "split_sites", "splits", "channels", "training")
        ),
        *((name, ctypes.c_double) for name in ("count", "unbiased", "momentum", "eps")),
    ]


class Grid(NamedTuple):
    """How a problem is cut: constants and parameters common to its launches."""

    constants: dict[str, str | int]
    params: Params
    slot_blocks: int
    fused: bool


def supports(op: str, shape: Shape, dtype: torch.dtype) -> str | None:
    """None, or why `op` cannot run on this problem."""
    if not isinstance(shape, NormShape):
        return f"expected a NormShape, got {type(shape).__name__}"
    if dtype not in ELEMENT:
        return f"dtype {dtype}: expected float32, float64, float16 or bfloat16"
    if shape.count > MAX_SITES:
        return f"{shape.count} values a channel: expected at most {MAX_SITES}"
    return None


# ---- layouts ---------------------------------------------------------------------------------------------


@lru_cache(4096)
def _strides(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Strides of N, C and L, or None where the spatial axes are not one run. Axes of size 1 get 0."""
    inner, places = 0, 1
    for length, step in zip(reversed(size[2:]), reversed(stride[2:]), strict=True):
        if length == 1:
            continue
        if places == 1:
            inner = step
        elif step != inner * places:
            return None
        places *= length
    return stride[0] if size[0] > 1 else 0, stride[1] if size[1] > 1 else 0, inner


def _placed(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the kernel can read it well next to `like`, else a copy in like's layout."""
    if tensor.stride() == like.stride():
        return tensor
    own, other = _strides(tensor.size(), tensor.stride()), _strides(like.size(), like.stride())
    if own is not None and other is not None:
        # Reading along the wrong axis would fetch a sector for every element.
        crossed = (own[1] == 1 and other[2] == 1) or (own[2] == 1 and other[1] == 1)
        if not crossed:
            return tensor
    copy = torch.empty_strided(like.size(), like.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _layout(tensor: torch.Tensor | None) -> Layout | None:
    return None if tensor is None else (tensor.stride(), alignment(tensor))


def _view(size: tuple[int, ...], layout: Layout) -> View:
    strides = _strides(size, layout[0])
    assert strides is not None, "results are dense and inputs went through _placed"
    return View(*strides, layout[1])


def _parameter_type(dtype: torch.dtype, parameters: Sequence[torch.Tensor | None]) -> torch.dtype:
    return next((t.dtype for t in parameters if t is not None), dtype)


def _pack(shape: NormShape, itemsize: int, views: Sequence[View], channels_inner: bool) -> int:
    """V: the widest pack that is contiguous and aligned in every tensor."""
    extent = shape.C if channels_inner else shape.L
    steps = [(v.c, v.l) if channels_inner else (v.l, v.c) for v in views]
    if any(inner != 1 for inner, _ in steps):
        return 1
    width = PACK_BYTES // itemsize
    outer = [extent, *(step for _, step in steps), *(v.n for v in views)]
    while any(step % width for step in outer) or any(v.alignment < width * itemsize for v in views):
        width //= 2
    return width


def _lanes(slots: int, slot_bytes: int, sites: int) -> tuple[int, bool]:
    """Lanes of a channels-last block, and whether one block can hold its slots whole."""
    fitting = [n for n in LANES if n >= slots > n // 2 or -(-slots // n) * n <= LANE_WASTE * slots]
    for lanes in fitting:
        if lanes * slot_bytes < SECTOR_BYTES and lanes < slots:
            break  # every sector would be fetched for several blocks
        if sites <= FUSED_SITES * (THREADS // lanes):
            return lanes, True
    return fitting[0], False


def _grid(problem: Problem) -> Grid:
    shape, dtype = problem.shape, problem.dtype
    all_views = [layout and _view(shape.x_size, layout) for layout in problem.layouts]
    views = [view for view in all_views if view is not None]
    like = all_views[3] or all_views[4] or views[-1]  # a gradient that is written, or y
    channels_inner = like.c == 1 and like.l != 1
    images, places = shape.N, shape.L
    if places == 1 or all(view.n == view.l * places or images == 1 for view in views):
        # One run of places: no image to tell apart.
        joined = [view._replace(n=0, l=view.n if places == 1 else view.l) for view in views]
        images, places = 1, images * places
    else:
        joined = views
    vector = _pack(shape, dtype.itemsize, views, channels_inner)
    per_image = places if channels_inner else places // vector
    sites = images * per_image
    slots = shape.C // vector if channels_inner else shape.C
    lanes, fused = 1, sites <= FUSED_SITES * THREADS
    if channels_inner:
        lanes, fused = _lanes(slots, vector * dtype.itemsize, sites)
    rows = THREADS // lanes
    slot_blocks = -(-slots // lanes)
    splits = max(1, min(sites // (SPLIT_SITES * rows), MAX_BLOCKS // slot_blocks))
    unroll = UNROLL[vector * dtype.itemsize == PACK_BYTES]
    split_sites = -(-sites // (splits * rows * unroll)) * rows * unroll
    splits = -(-sites // split_sites)

    by_view = dict(zip(views, joined, strict=True))

    def strides(view: View | None) -> Strides:
        if view is None:
            return Strides()
        n, c, l, _ = by_view[view]  # noqa: E741
        return Strides(n, l, c * vector) if channels_inner else Strides(n, l * vector, c)

    spans = [
        (shape.N - 1) * abs(v.n) + (shape.C - 1) * abs(v.c) + (shape.L - 1) * abs(v.l) for v in views
    ]  # fmt: skip
    wide = max(*spans, 3 * shape.C * splits) > INT32_MAX
    constants: dict[str, str | int] = {
        "ELEMENT": ELEMENT[dtype],
        "ACCUMULATOR": ACCUMULATOR[dtype],
        "PARAMETER": ELEMENT[problem.parameter],
        "INDEX": "long long" if wide else "int",
        "VECTOR": vector,
        "UNROLL": unroll,
        "CHANNELS_INNER": int(channels_inner),
        "LANES": lanes,
        "THREADS": THREADS,
        "ACTIVATION": problem.activation,
        "FROM_RESULT": int(problem.from_result),
    }
    params = Params(
        *(strides(view) for view in all_views),
        FastDiv(per_image), sites, split_sites, splits, shape.C, 0,
        shape.count, shape.count / max(shape.count - 1, 1), 0.0, 0.0,
    )  # fmt: skip
    return Grid(constants, params, slot_blocks, fused)


# ---- launches --------------------------------------------------------------------------------------------

_FORWARD = ("x", "weight", "bias", "residual")
_BACKWARD = ("grad_y", "x", "weight", "bias", "beside", "mean", "rstd")


def _launch(
    grid: Grid,
    entry: str,
    group: str,
    blocks: tuple[int, int],
    inputs: Sequence[str],
    outputs: Sequence[str],
    updates: Sequence[str] = (),
) -> Launch:
    constants = {**grid.constants, group: 1}
    return launch_of(
        SOURCE, entry, constants, grid.params, grid=blocks, block=(THREADS,), inputs=inputs, outputs=outputs,
        updates=updates,
    )  # fmt: skip


@lru_cache(1024)
def _train_plan(problem: Problem, momentum: float, eps: float) -> tuple[Launch, ...]:
    """One launch (fused), or three: stats, merge, apply."""
    grid = _grid(problem)
    grid.params.momentum, grid.params.eps = momentum, eps
    everywhere, running = (grid.slot_blocks, grid.params.splits), ("running_mean", "running_var")
    if grid.fused:
        results = ("y", "mean", "rstd")
        blocks = (grid.slot_blocks, 1)
        return (_launch(grid, "batch_norm_train", "TRAIN", blocks, _FORWARD, results, running),)
    channels = (-(-problem.shape.C // WARPS), 1)
    return (
        _launch(grid, "batch_norm_train_stats", "TRAIN", everywhere, ("x",), ("partials",)),
        _launch(
            grid, "batch_norm_train_merge", "TRAIN", channels, ("x", "partials"), ("mean", "rstd", "centre"),
            running,
        ),
        _launch(grid, "batch_norm_train_apply", "TRAIN", everywhere, (*_FORWARD, "rstd", "centre"), ("y",)),
    )  # fmt: skip


@lru_cache(1024)
def _stats_plan(problem: Problem) -> tuple[Launch, Launch]:
    """Stats as in training, and their merge."""
    grid = _grid(problem)
    everywhere, channels = (grid.slot_blocks, grid.params.splits), (-(-problem.shape.C // WARPS), 1)
    merged = ("x", "partials"), ("mean", "var")
    return (
        _launch(grid, "batch_norm_train_stats", "TRAIN", everywhere, ("x",), ("partials",)),
        _launch(grid, "batch_norm_stats_merge", "TRAIN", channels, *merged),
    )


@lru_cache(1024)
def _infer_plan(problem: Problem, eps: float) -> Launch:
    grid = _grid(problem)
    grid.params.eps = eps
    inputs = (*_FORWARD, "running_mean", "running_var")
    return _launch(
        grid, "batch_norm_infer", "INFER", (grid.slot_blocks, grid.params.splits), inputs, ("y",)
    )


@lru_cache(1024)
def _bwd_plan(problem: Problem, training: bool) -> tuple[Launch, ...]:
    """One launch (fused), or three: sums, merge, apply."""
    grid = _grid(problem)
    grid.params.training = training
    everywhere, parameters = (grid.slot_blocks, grid.params.splits), ("grad_weight", "grad_bias")
    results = ("grad_x", *parameters, "grad_residual")
    channels = (-(-problem.shape.C // WARPS), 1)
    sums = _launch(grid, "batch_norm_bwd_sums", "BACKWARD", everywhere, _BACKWARD, ("partials",))
    merge = _launch(
        grid, "batch_norm_bwd_merge", "BACKWARD", channels, ("partials", "weight", "rstd"),
        (*parameters, "coefficients"),
    )  # fmt: skip
    apply = _launch(
        grid, "batch_norm_bwd_apply", "BACKWARD", everywhere, (*_BACKWARD, "coefficients"),
        ("grad_x", "grad_residual"),
    )  # fmt: skip
    fused = _launch(grid, "batch_norm_bwd", "BACKWARD", (grid.slot_blocks, 1), _BACKWARD, results)
    return (fused,) if grid.fused else (sums, merge, apply)


# ---- operations ------------------------------------------------------------------------------------------


def batch_norm_stats(
    shape: NormShape, x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor
) -> None:
    """Mean and biased variance of every channel."""
    if _strides(x.size(), x.stride()) is None:
        x = x.contiguous()
    stats, merge = _stats_plan(Problem(shape, x.dtype, x.dtype, "none", _layout(x), None, None))
    partials = mean.new_empty(3 * shape.C * stats.grid[1])
    launch(stats, (x,), (partials,))
    launch(merge, (x, partials), (mean, var))


def batch_norm_train(
    shape: NormShape,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    activation: str,
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """y = act(γ·x̂ + β + residual) with the batch's statistics; fills mean and rstd, moves running ones."""
    x = _placed(x, y)
    residual = None if residual is None else _placed(residual, y)
    parameter = _parameter_type(x.dtype, (weight, bias, running_mean, running_var))
    weight, bias = _dense(weight, parameter), _dense(bias, parameter)
    running = _dense(running_mean, parameter), _dense(running_var, parameter)
    layouts = _layout(x), _layout(residual), _layout(y)
    plan = _train_plan(Problem(shape, x.dtype, parameter, activation, *layouts), momentum, eps)
    if len(plan) == 1:
        launch(plan[0], (x, weight, bias, residual), (y, mean, rstd), running)
    else:
        stats, merge, apply = plan
        partials = mean.new_empty(3 * shape.C * stats.grid[1])
        centre = torch.empty_like(mean)
        launch(stats, (x,), (partials,))
        launch(merge, (x, partials), (mean, rstd, centre), running)
        launch(apply, (x, weight, bias, residual, rstd, centre), (y,))
    for given, moved in zip((running_mean, running_var), running, strict=True):
        if given is not None and moved is not None and given is not moved:
            given.copy_(moved)


def batch_norm_infer(
    shape: NormShape,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
    activation: str,
    y: torch.Tensor,
) -> None:
    """y = act(γ·(x - running_mean) / sqrt(running_var + eps) + β + residual)."""
    x = _placed(x, y)
    residual = None if residual is None else _placed(residual, y)
    parameters = [_dense(t, running_mean.dtype) for t in (weight, bias, running_mean, running_var)]
    layouts = _layout(x), _layout(residual), _layout(y)
    problem = Problem(shape, x.dtype, running_mean.dtype, activation, *layouts)
    launch(_infer_plan(problem, eps), (x, *parameters[:2], residual, *parameters[2:]), (y,))


def batch_norm_bwd(
    shape: NormShape,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    activation: str,
    training: bool,
    grad_x: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    grad_residual: torch.Tensor | None,
) -> None:
    """The gradients that are asked for; mean and rstd are those that y was computed with.

    `training` says that they came from x itself, and so depend on it.
    """
    from_result = y is not None and activation != "none"
    beside = y if from_result else None if activation == "none" else residual
    like = grad_x if grad_x is not None else grad_residual
    if like is None:
        like = x = x if _strides(x.size(), x.stride()) is not None else x.contiguous()
    x, grad_y = _placed(x, like), _placed(grad_y, like)
    beside = None if beside is None else _placed(beside, like)
    parameter = _parameter_type(x.dtype, (weight, bias, grad_weight, grad_bias))
    weight, bias = _dense(weight, parameter), _dense(bias, parameter)
    problem = Problem(
        shape, x.dtype, parameter, activation, _layout(x), _layout(beside), _layout(grad_y), _layout(grad_x),
        _layout(grad_residual), from_result,
    )  # fmt: skip
    plan = _bwd_plan(problem, training)
    inputs = (grad_y, x, weight, bias, beside, mean, rstd)
    wants_sums = (
        grad_weight is not None or grad_bias is not None or (training and grad_x is not None)
    )
    wants_apply = grad_x is not None or grad_residual is not None
    if len(plan) == 1:
        launch(plan[0], inputs, (grad_x, grad_weight, grad_bias, grad_residual))
        return
    sums, merge, apply = plan
    coefficients = None
    if wants_sums:
        partials = mean.new_empty(3 * shape.C * sums.grid[1])
        coefficients = mean.new_empty(2 * shape.C)
        launch(sums, inputs, (partials,))
        launch(merge, (partials, weight, rstd), (grad_weight, grad_bias, coefficients))
    if wants_apply:
        launch(apply, (*inputs, coefficients), (grad_x, grad_residual))


def _dense(vector: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A per-channel vector as the kernels read it: itself, or a copy."""
    if vector is None or (vector.dtype == dtype and vector.is_contiguous()):
        return vector
    return vector.to(dtype).contiguous()
