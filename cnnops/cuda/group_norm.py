"""Launches `kernels/group_norm.cu`: group, instance and layer normalisation, forward and backward.

Every tensor is seen as lines of values, a slab of lines sharing its statistics, as the kernel's header
describes: of a group norm the channels of an image, of a layer norm the rows. A tensor whose axes cannot be
walked so with one stride each, or that lies in the other of PyTorch's two layouts than the result, is copied
first. Rows that lie side by side instead of one after the other are read as they are, where a block can hold
enough of them to read whole sectors.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

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
from cnnops.shapes import GroupShape, LayerShape, Shape

SOURCE = "group_norm.cu"
PACK_BYTES = 16
SECTOR_BYTES, LINE_BYTES = 32, 128
THREADS, MOST_THREADS = 256, 512
TEAMS = (2, 8, 32, 128, 256, 512)
"""Threads that share a line of contiguous values: few sizes, so that few kernels are to be compiled."""
LANES = (32, 16, 8, 4, 2, 1)
"""Packs that a block reads side by side in channels-last."""
VALUES = {"FORWARD": 32, "BACKWARD": 16}
"""Values of a tensor that a thread has in registers: two tensors in the backward pass."""
LAYER_VALUES = 16
"""The same of a layer, whose parameters are there too."""
DOUBLE_VALUES = 8
"""The same of float64."""
CURVED_VALUES, DOUBLE_CURVED_VALUES = 8, 2
"""The same in the backward pass of an activation that needs exp or erf: in channels-last, and of float64."""
CURVED = ("silu", "gelu", "sigmoid", "tanh")
TENSORS = {"FORWARD": 1, "BACKWARD": 2}
"""Tensors that are read."""
MOST_PACKS = {"FORWARD": 16, "BACKWARD": 8}
MOST_TURNS = 8
HELD_BYTES, HELD_BYTES_CHANNELS = 94 * 1024, 64 * 1024
"""Shared memory for slabs that are too large for the registers: two or three blocks of a multiprocessor of an
H100, and with what a block needs otherwise no more than any GPU of sm_80 and later has (99 KB)."""
FEW_PACKS = 4
"""A line is given this many packs a thread or less, as long as its team stays within a warp."""
WALKERS = 132 * MOST_THREADS
"""Threads of all blocks that walk a layer's rows to sum the gradients of its parameters: as many as the 132
multiprocessors of an H100 hold at 128 registers. Fixed, so that results do not depend on the GPU."""
MAX_LINES = INT32_MAX - 2**21
"""Lines, sites and blocks are numbered by 32 bits, with room for the last block's end."""


class View(NamedTuple):
    """Where images x lines x values lie: strides in elements (0 along an axis of size 1), and alignment."""

    image: int
    line: int
    value: int
    alignment: int

    @property
    def crossed(self) -> bool:
        """Whether lines are contiguous instead of values."""
        return self.line == 1 and self.value != 1


class Problem(NamedTuple):
    """All that decides the launches of one call, but for eps. `y` is where grad_y lies in a backward pass."""

    images: int
    lines: int
    values: int
    slab_lines: int
    layer: bool
    dtype: torch.dtype
    parameter: torch.dtype
    activation: str
    x: View
    y: View
    grad_x: View | None = None

    @property
    def views(self) -> tuple[View, ...]:
        return tuple(v for v in (self.x, self.y, self.grad_x) if v is not None)

    @property
    def channels_inner(self) -> bool:
        return not self.layer and (self.grad_x or self.y).crossed

    @property
    def crossed(self) -> int:
        """The kernel's CROSSED."""
        return int(self.layer and self.x.crossed) + 2 * int(self.layer and self.y.crossed)


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_longlong) for name in ("image", "line", "site")]


class Params(ctypes.Structure):
    """`struct GroupNormParams`."""

    _fields_ = [
        *((name, Strides) for name in ("x", "y", "grad_x")),
        *(
            (name, FastDiv)
            for name in ("image_lines", "slab_lines", "line_blocks", "splits", "walkers")
        ),
        *((name, ctypes.c_int) for name in ("lines", "block_lines", "sites", "turns", "held")),
        *((name, ctypes.c_double) for name in ("count", "eps")),
    ]


class Tile(NamedTuple):
    """What a block holds. `fused`: whole slabs; `held`: so many tensors of them in shared memory, else what
    it has is in registers. `turns`: how often a thread takes `packs` packs in a fused tile."""

    vector: int
    packs: int
    team: int
    threads: int
    block_lines: int
    fused: bool
    turns: int = 1
    held: int = 0

    def threads_with_lines(self, problem: Problem) -> int:
        return self.team * (self.block_lines // (self.vector if problem.channels_inner else 1))

    def shared_bytes(self, problem: Problem) -> int:
        """Of packs that are held, each thread's in a place of its own."""
        packs = self.threads_with_lines(problem) * self.turns * self.packs * self.held
        return packs * self.vector * problem.dtype.itemsize


class Grid(NamedTuple):
    """How a problem is cut: constants and parameters common to its launches."""

    constants: dict[str, str | int]
    params: Params
    tile: Tile
    line_blocks: int
    splits: int
    walkers: int
    columns: int
    """Places of a vector of partial sums of parameter gradients."""
    shared_bytes: int


def supports(op: str, shape: Shape, dtype: torch.dtype) -> str | None:
    """None, or why `op` cannot run on this problem."""
    expected = LayerShape if op.startswith("layer_norm") else GroupShape
    if not isinstance(shape, expected):
        return f"expected a {expected.__name__}, got {type(shape).__name__}"
    if dtype not in ELEMENT:
        return f"dtype {dtype}: expected float32, float64, float16 or bfloat16"
    lines, values, slab = _numbers(shape)
    # A block holds 256 values or more where lines are long, and a line or more where they are short.
    tiles = lines * -(-values // THREADS)
    if max(values, slab * values, lines, tiles) > MAX_LINES:
        return f"{lines} lines of {values} values: expected at most {MAX_LINES} of either, or of their tiles"
    return None


def _numbers(shape: GroupShape | LayerShape) -> tuple[int, int, int]:
    """Lines in all, values of a line, lines of a slab."""
    if isinstance(shape, LayerShape):
        return shape.N, shape.D, 1
    return shape.N * shape.C, shape.L, shape.C // shape.groups


# ---- layouts ---------------------------------------------------------------------------------------------


def _run(size: tuple[int, ...], stride: tuple[int, ...]) -> int | None:
    """The stride that walks all of these axes, or None; 0 where there is but one place."""
    inner, places = 0, 1
    for length, step in zip(reversed(size), reversed(stride), strict=True):
        if length == 1:
            continue
        if places == 1:
            inner = step
        elif step != inner * places:
            return None
        places *= length
    return inner


@lru_cache(4096)
def _strides(
    size: tuple[int, ...], stride: tuple[int, ...], first: int, split: int
) -> tuple[int, int, int] | None:
    """Strides of images (the axes before `first`), lines (up to `split`) and values (the rest), or None."""
    cuts = slice(first), slice(first, split), slice(split, None)
    image, line, value = (_run(size[cut], stride[cut]) for cut in cuts)
    return None if image is None or line is None or value is None else (image, line, value)


def _view(tensor: Tensor, first: int, split: int) -> View:
    strides = _strides(tensor.size(), tensor.stride(), first, split)
    assert strides is not None, "tensors that are no lines were copied"
    return View(*strides, alignment(tensor))


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    """N C *spatial: itself where the kernel can read it well next to `like`, else a copy in like's layout."""
    if tensor.stride() == like.stride():
        return tensor
    own = _strides(tensor.size(), tensor.stride(), 1, 2)
    other = _strides(like.size(), like.stride(), 1, 2)
    if own is not None and other is not None:
        # Reading along the wrong axis would fetch a sector for every element.
        crossed = (own[1] == 1 and other[2] == 1) or (own[2] == 1 and other[1] == 1)
        if not crossed:
            return tensor
    copy = torch.empty_strided(like.size(), like.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


@lru_cache(1024)
def _first(
    size: tuple[int, ...], strides: tuple[tuple[int, ...], ...], split: int
) -> tuple[int, tuple[bool, ...]]:
    """Where to cut a layer's outer axes into images and rows to walk most tensors, and which these are."""
    walked = [
        tuple(_strides(size, stride, first, split) is not None for stride in strides)
        for first in range(split + 1)
    ]
    first = max(range(split + 1), key=lambda first: sum(walked[first]))
    return first, walked[first]


def _dense(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A weight or bias as the kernels read it, in packs: itself, or a copy."""
    if vector is None:
        return None
    if vector.dtype == dtype and vector.is_contiguous() and alignment(vector) == PACK_BYTES:
        return vector
    return torch.empty(vector.shape, dtype=dtype, device=vector.device).copy_(vector)


def _parameter_type(dtype: torch.dtype, *parameters: Tensor | None) -> torch.dtype:
    return next((t.dtype for t in parameters if t is not None), dtype)


# ---- tiles -----------------------------------------------------------------------------------------------


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def _vector(problem: Problem) -> int:
    """V: the widest pack that is contiguous and aligned in every tensor that is read in packs."""
    inner = problem.channels_inner
    views = [v for v in problem.views if not (problem.layer and v.crossed)]
    if any((v.line if inner else v.value) != 1 for v in views):
        return 1
    extent = problem.lines if inner else problem.values
    steps = [extent, *(v.image for v in views), *(v.value if inner else v.line for v in views)]
    width = PACK_BYTES // problem.dtype.itemsize
    while any(step % width for step in steps) or any(
        v.alignment < width * problem.dtype.itemsize for v in views
    ):
        width //= 2
    return width


def _held(problem: Problem, group: str, tile: Tile, sites: int, limit: int) -> Tile | None:
    """The tile with its slabs in shared memory; None where they do not fit."""
    turns = -(-sites // (tile.team * tile.packs))
    found = tile._replace(turns=turns, held=TENSORS[group])
    return found if found.shared_bytes(problem) <= limit else None


def _line_tile(problem: Problem, vector: int, most: int, group: str) -> Tile:
    """The tile where the values of a line are contiguous."""
    sites, slab = problem.values // vector, problem.slab_lines
    fitting = [team for team in TEAMS if team * most >= sites]
    # Rows that are turned over want many lines beside each other, the others short loops.
    roomy = [t for t in fitting if sites <= t * min(most, FEW_PACKS) or t >= 32]
    for threads in (MOST_THREADS,) if problem.crossed else (THREADS, MOST_THREADS):
        for team in fitting if problem.crossed else roomy + fitting:
            if team * slab <= threads and (threads == THREADS or problem.layer):
                lines = threads // team // slab * slab
                return Tile(vector, _power(-(-sites // team)), team, threads, lines, True)
    if not (problem.layer and group == "BACKWARD"):
        for threads in (THREADS, MOST_THREADS):
            # As many threads a line as there are for whole slabs, nearly all of them with something to do.
            wide = [t for t in TEAMS if 8 <= t and t * slab <= threads and t < 2 * sites]
            if not wide or wide[-1] * slab * 4 < threads * 3 and threads < MOST_THREADS:
                continue
            tile = Tile(vector, most, wide[-1], threads, slab, True)
            if held := _held(problem, group, tile, sites, HELD_BYTES):
                return held
    team = next((t for t in roomy if t < THREADS), THREADS)
    packs = min(_power(-(-sites // team)), most)
    return Tile(vector, packs, team, THREADS, THREADS // team, False)


def _channel_tile(problem: Problem, vector: int, most: int, group: str) -> Tile:
    """The tile of channels-last."""
    sites, bytes_ = problem.values, vector * problem.dtype.itemsize
    # Several groups where one is no whole number of packs.
    unit = math.lcm(problem.slab_lines, vector) // vector
    by_width = sorted(LANES, key=lambda n: (n * bytes_ > LINE_BYTES, abs(n * bytes_ - LINE_BYTES)))
    slabs: list[tuple[int, int]] = []
    for lanes in by_width:
        packs = lanes // unit * unit
        whole = packs * bytes_ >= SECTOR_BYTES or packs * vector >= problem.lines
        if packs and whole:
            slabs.append((lanes, packs))
    for lanes, packs in slabs:
        team = THREADS // lanes
        if sites <= team * most:
            return Tile(vector, _power(-(-sites // team)), team, THREADS, packs * vector, True)
    for limit in (HELD_BYTES // 2, HELD_BYTES_CHANNELS):
        for lanes, packs in slabs:
            # So many threads have half as many registers.
            fewer = max(1, most // 2) if group == "BACKWARD" else most
            tile = Tile(vector, fewer, MOST_THREADS // lanes, MOST_THREADS, packs * vector, True)
            if held := _held(problem, group, tile, sites, limit):
                return held
    few = [n for n in LANES if sites <= THREADS // n * most and n * bytes_ >= LINE_BYTES]
    lanes = few[0] if few else by_width[0]
    team = THREADS // lanes
    packs = min(_power(-(-sites // team)), most)
    return Tile(vector, packs, team, THREADS, lanes * vector, False)


def _tile(problem: Problem, group: str) -> Tile:
    vector = _vector(problem)
    values = LAYER_VALUES if problem.layer else VALUES[group]
    curved = group == "BACKWARD" and problem.activation in CURVED
    if problem.dtype == torch.float64:
        values = DOUBLE_CURVED_VALUES if curved else DOUBLE_VALUES
    elif curved and problem.channels_inner:
        values = CURVED_VALUES
    if problem.channels_inner and problem.slab_lines < vector:
        values //= 2  # a pack's channels have statistics of their own
    most = max(1, min(values // vector, MOST_PACKS[group]))
    make = _channel_tile if problem.channels_inner else _line_tile
    return make(problem, vector, most, group)


@lru_cache(1024)
def _crossable(problem: Problem, group: str) -> bool:
    """Whether a tile of rows that lie side by side has them whole, and enough of them to fill a sector."""
    tile = _tile(problem, group)
    return (
        tile.fused and not tile.held and tile.block_lines * problem.dtype.itemsize >= SECTOR_BYTES
    )


def _grid(problem: Problem, group: str) -> Grid:
    tile, inner = _tile(problem, group), problem.channels_inner
    lines = problem.images * problem.lines
    sites = problem.values if inner else problem.values // tile.vector
    line_blocks, turns = -(-lines // tile.block_lines), tile.turns
    if not tile.fused and not (problem.layer and group == "BACKWARD"):
        # The fewer blocks, the fewer partial sums: no more than keep a GPU busy.
        tiles = line_blocks * -(-sites // (tile.team * tile.packs))
        turns = max(1, min(MOST_TURNS, -(-tiles * tile.threads // (2 * WALKERS))))
    splits = -(-sites // (tile.team * tile.packs * turns))
    walkers = line_blocks
    if problem.layer:
        threads = WALKERS if group == "BACKWARD" else 2 * WALKERS
        walkers = min(line_blocks, max(1, threads // (tile.threads * splits)))

    def strides(view: View | None) -> Strides:
        if view is None:
            return Strides()
        packed = not inner and not (problem.layer and view.crossed)
        return Strides(view.image, view.line, view.value * tile.vector if packed else view.value)

    spans = [
        (problem.images - 1) * abs(v.image) + (problem.lines - 1) * abs(v.line)
        + (problem.values - 1) * abs(v.value)
        for v in problem.views
    ]  # fmt: skip
    columns = splits * tile.team * tile.packs * tile.vector if problem.layer else problem.lines
    partials = 2 * walkers * columns if problem.layer else 0
    constants: dict[str, str | int] = {
        "ELEMENT": ELEMENT[problem.dtype],
        "ACCUMULATOR": ACCUMULATOR[problem.dtype],
        "PARAMETER": ELEMENT[problem.parameter],
        "INDEX": "long long" if max(*spans, partials, 3 * lines * splits) > INT32_MAX else "int",
        "VECTOR": tile.vector,
        "PACKS": tile.packs,
        "TEAM": tile.team,
        "THREADS": tile.threads,
        "WHOLE": int(tile.fused),
        "HELD": int(tile.held > 0),
        "LAYER": int(problem.layer),
        "CHANNELS_INNER": int(inner),
        "SLABS": tile.vector if inner and problem.slab_lines % tile.vector else 1,
        "CROSSED": problem.crossed,
        "ACTIVATION": problem.activation,
        group: 1,
    }
    params = Params(
        *(strides(view) for view in (problem.x, problem.y, problem.grad_x)),
        *(FastDiv(n) for n in (problem.lines, problem.slab_lines, line_blocks, splits, walkers)),
        lines, tile.block_lines, sites, turns, tile.threads_with_lines(problem),
        problem.slab_lines * problem.values, 0.0,
    )  # fmt: skip
    shared_bytes = tile.shared_bytes(problem)
    return Grid(constants, params, tile, line_blocks, splits, walkers, columns, shared_bytes)


# ---- launches --------------------------------------------------------------------------------------------

_HOLDING = ("group_norm_fwd", "group_norm_bwd")
_GRADIENT = ("grad_y", "x", "weight", "bias", "mean", "rstd")


def _launch(
    grid: Grid, entry: str, blocks: int, inputs: Sequence[str], outputs: Sequence[str]
) -> Launch:
    return launch_of(
        SOURCE, entry, grid.constants, grid.params, grid=(blocks,), block=(grid.tile.threads,),
        inputs=inputs, outputs=outputs, shared_bytes=grid.shared_bytes if entry in _HOLDING else 0,
    )  # fmt: skip


def _merging(problem: Problem, grid: Grid) -> int:
    """Blocks that merge slabs, a warp each."""
    slabs = problem.images * problem.lines // problem.slab_lines
    return -(-slabs // (grid.tile.threads // 32))


@lru_cache(1024)
def _fwd_plan(problem: Problem, eps: float) -> tuple[Launch, ...]:
    """One launch (a slab fits in a block), or three: stats, merge, apply."""
    grid = _grid(problem, "FORWARD")
    grid.params.eps = eps
    inputs, everywhere = ("x", "weight", "bias"), grid.line_blocks * grid.splits
    if grid.tile.fused:
        return (_launch(grid, "group_norm_fwd", grid.walkers, inputs, ("y", "mean", "rstd")),)
    return (
        _launch(grid, "group_norm_stats", everywhere, ("x",), ("partials",)),
        _launch(
            grid, "group_norm_merge", _merging(problem, grid), ("x", "partials"), ("mean", "rstd", "centre")
        ),
        _launch(grid, "group_norm_apply", everywhere, (*inputs, "rstd", "centre"), ("y",)),
    )  # fmt: skip


class _Backward(NamedTuple):
    """The launches of a backward pass: `whole`, or the three in its place; then `params`."""

    whole: Launch | None
    sums: Launch
    merge: Launch
    apply: Launch
    params: Launch
    partials: int
    """Lines' partial sums, 3 values each."""
    columns: int
    """Values of a layer's partial sums of parameter gradients."""


@lru_cache(1024)
def _bwd_plan(problem: Problem) -> _Backward:
    grid = _grid(problem, "BACKWARD")
    everywhere, walking = grid.line_blocks * grid.splits, grid.walkers * grid.splits
    results = ("grad_x", "partials")
    whole = _launch(grid, "group_norm_bwd", walking, _GRADIENT, (*results, "coefficients"))
    return _Backward(
        whole if grid.tile.fused else None,
        _launch(grid, "group_norm_bwd_sums", everywhere, _GRADIENT, ("partials",)),
        _launch(
            grid, "group_norm_bwd_merge", _merging(problem, grid), ("partials", "weight", "rstd"),
            ("coefficients",),
        ),
        _launch(grid, "group_norm_bwd_apply", walking, (*_GRADIENT, "coefficients"), results),
        _launch(
            grid, "group_norm_bwd_params", -(-grid.columns // 8), ("partials", "rstd", "coefficients"),
            ("grad_weight", "grad_bias"),
        ),
        problem.images * problem.lines * grid.splits,
        2 * grid.walkers * grid.columns if problem.layer else 0,
    )  # fmt: skip


def _forward(
    problem: Problem, eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor,
    mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    plan = _fwd_plan(problem, eps)
    if len(plan) == 1:
        launch(plan[0], (x, weight, bias), (y, mean, rstd))
        return
    stats, merge, apply = plan
    lines, splits = problem.images * problem.lines, stats.params.splits.divisor
    partials, centre = mean.new_empty(2 * lines * splits), torch.empty_like(mean)
    launch(stats, (x,), (partials,))
    launch(merge, (x, partials), (mean, rstd, centre))
    launch(apply, (x, weight, bias, rstd, centre), (y,))


def _backward(
    problem: Problem, grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    rstd: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
) -> None:  # fmt: skip
    plan = _bwd_plan(problem)
    wants_parameters = grad_weight is not None or grad_bias is not None
    inputs = (grad_y, x, weight, bias, mean, rstd)
    columns = mean.new_empty(plan.columns) if problem.layer and wants_parameters else None
    partials = coefficients = None
    if not (plan.whole and (problem.layer or not wants_parameters)):
        partials, coefficients = mean.new_empty(3 * plan.partials), mean.new_empty(3 * mean.numel())
    if plan.whole:
        launch(plan.whole, inputs, (grad_x, columns if problem.layer else partials, coefficients))
    else:
        launch(plan.sums, inputs, (partials,))
        launch(plan.merge, (partials, weight, rstd), (coefficients,))
        if grad_x is not None or columns is not None:
            launch(plan.apply, (*inputs, coefficients), (grad_x, columns))
    if wants_parameters:
        launch(
            plan.params,
            (columns if problem.layer else partials, rstd, coefficients),
            (grad_weight, grad_bias),
        )


# ---- operations ------------------------------------------------------------------------------------------


def _group_problem(
    shape: GroupShape, parameter: torch.dtype, activation: str, x: Tensor, *others: Tensor | None
) -> Problem:
    views = (None if t is None else _view(t, 1, 2) for t in (x, *others))
    return Problem(
        shape.N, shape.C, shape.L, shape.C // shape.groups, False, x.dtype, parameter, activation, *views  # type: ignore[arg-type]
    )  # fmt: skip


def group_norm_fwd(
    shape: GroupShape,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """y = act(γ·x̂ + β), γ and β of C values; fills mean and rstd (N x groups)."""
    parameter = _parameter_type(x.dtype, weight, bias)
    x, weight, bias = _placed(x, y), _dense(weight, parameter), _dense(bias, parameter)
    problem = _group_problem(shape, parameter, activation, x, y)
    _forward(problem, eps, x, weight, bias, y, mean, rstd)


def group_norm_bwd(
    shape: GroupShape,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """The gradients that are asked for; mean and rstd are those that y was computed with."""
    like = grad_x
    if like is None:
        like = x = x if _strides(x.size(), x.stride(), 1, 2) is not None else x.contiguous()
    x, grad_y = _placed(x, like), _placed(grad_y, like)
    parameter = _parameter_type(x.dtype, weight, bias, grad_weight, grad_bias)
    weight, bias = _dense(weight, parameter), _dense(bias, parameter)
    problem = _group_problem(shape, parameter, activation, x, grad_y, grad_x)
    _backward(problem, grad_y, x, weight, bias, mean, rstd, grad_x, grad_weight, grad_bias)


def _layer_problem(
    shape: LayerShape, parameter: torch.dtype, tensors: Sequence[Tensor | None], group: str
) -> tuple[Problem, list[Tensor | None]]:
    """The problem of x, y (or grad_y) and grad_x, and these where they are as it says: inputs are copied if
    they must be, and a result that must be is left for the caller to copy from the one that is in its place.
    """
    present = [t for t in tensors if t is not None]
    size, split = present[0].size(), len(shape.outer)
    first, walked = _first(size, tuple(t.stride() for t in present), split)
    walks = iter(walked)
    # Results are read in no way but along their values.
    written = (False, group == "FORWARD", True)

    def view(tensor: Tensor) -> View:
        return _view(tensor, first, split)

    placed: list[Tensor | None] = []
    for tensor, output in zip(tensors, written, strict=False):
        if tensor is not None and (not next(walks) or (output and view(tensor).crossed)):
            dense = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
            tensor = dense if output else dense.copy_(tensor)
        placed.append(tensor)
    lines = math.prod(shape.outer[first:])

    def problem() -> Problem:
        views = (None if t is None else view(t) for t in placed)
        x = placed[0]
        assert x is not None
        return Problem(
            shape.N // lines, lines, shape.D, 1, True, x.dtype, parameter, "none", *views  # type: ignore[arg-type]
        )  # fmt: skip

    found = problem()
    if found.crossed and not _crossable(found, group):
        placed = [
            t if t is None or output or not view(t).crossed else t.contiguous()
            for t, output in zip(placed, written, strict=False)
        ]
        found = problem()
    return found, placed


def layer_norm_fwd(
    shape: LayerShape,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """y = γ·x̂ + β, γ and β as large as a row; fills mean and rstd (one a row)."""
    parameter = _parameter_type(x.dtype, weight, bias)
    weight, bias = _dense(weight, parameter), _dense(bias, parameter)
    problem, placed = _layer_problem(shape, parameter, (x, y), "FORWARD")
    own, result = placed
    assert own is not None and result is not None
    _forward(problem, eps, own, weight, bias, result, mean, rstd)
    if result is not y:
        y.copy_(result)


def layer_norm_bwd(
    shape: LayerShape,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """The gradients that are asked for; mean and rstd are those that y was computed with."""
    parameter = _parameter_type(x.dtype, weight, grad_weight, grad_bias)
    weight = _dense(weight, parameter)
    problem, placed = _layer_problem(shape, parameter, (x, grad_y, grad_x), "BACKWARD")
    own, given, result = placed
    assert own is not None and given is not None
    _backward(problem, given, own, weight, None, mean, rstd, result, grad_weight, grad_bias)
    if grad_x is not None and result is not None and result is not grad_x:
        grad_x.copy_(result)
