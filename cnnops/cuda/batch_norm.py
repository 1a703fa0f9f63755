"""Launches `kernels/batch_norm.cu`: batch norm in training and inference, its backward, statistics alone.

A tensor N C *spatial is seen as N x C x L, wherever its elements lie, and cut into sites and slots as the
kernel's header describes. A tensor whose spatial axes cannot be walked with one stride, or that lies in the
other of PyTorch's two layouts than the result, is copied into the result's layout first.

Training and its backward take one of two forms, by arithmetic on bytes (`_form`): "held/n", one launch in
which n blocks hold a channel, or a few of them, in shared memory; or "split", two or three launches. `forced`
names one of them instead, as does a table of `cnnops.tune`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnnops import tuned
from cnnops.cuda.kernel import (
    ACCUMULATOR,
    CLUSTERS,
    ELEMENT,
    INT32_MAX,
    FastDiv,
    Launch,
    alignment,
    launch_of,
)
from cnnops.cuda.launch import launch
from cnnops.cuda.target import Target, target_of
from cnnops.shapes import NormShape, Shape

SOURCE = "batch_norm.cu"
THREADS, MOST_THREADS = 256, 512
"""Of a block; of one that has a multiprocessor's shared memory to itself."""
PACK_BYTES = 16
SECTOR_BYTES, LINE_BYTES = 32, 128
LANES = (32, 16, 8, 4, 2, 1)
"""Slots that a block reads side by side in channels-last, widest first."""
LANE_WASTE = 1.25
"""Several blocks together may have this many times the lanes that have a slot, else they are narrower."""
UNROLL = {True: 4, False: 8}
"""Packs that a thread has in flight: of 16 bytes, of fewer."""
SPLIT_SITES = 8
"""A split gives each thread at least this many sites."""
MAX_BLOCKS = 4096
"""Enough for the last wave of blocks to be a small part of all, on any GPU; more would only merge longer."""
MERGED_PART = 8
"""Every block of the second pass merges the partial results itself where this many times their bytes are no
more than it reads of x; else a launch between the two leaves it half of that."""
MOST_MERGED = 16
"""So many partial results that launch leaves at most."""
MAX_SITES = INT32_MAX - 2**21
"""Site numbers are 32-bit, with room for the last split's end."""
SMS = 132
"""Multiprocessors of an H100. Fixed, so that results do not depend on the GPU."""
SMALL_SLAB = 64 << 10
"""One block may hold this much alone, however few blocks there are: that is as fast as two launches."""
PORTABLE_CLUSTER = 8
"""Larger clusters are for `forced` and tables only: a GPU may refuse them."""
PIECE_BYTES = 16 << 10
"""A larger cluster that uses more multiprocessors leaves each block this much at least."""
ARCHITECTURES = {
    "batch_norm_train_cluster": ("90a", "100a"),
    "batch_norm_bwd_cluster": ("90a", "100a"),
}
"""What clusters are for; all other entries run everywhere."""


class Device(NamedTuple):
    """What decides the form: shared memory of a block in bytes, and whether there are clusters."""

    shared: int
    clusters: bool


SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
"""Most shared memory of a block, by compute capability; others have 99."""


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
    device: Device
    x: Layout | None
    residual: Layout | None
    y: Layout | None
    grad_x: Layout | None = None
    grad_residual: Layout | None = None
    from_result: bool = False
    """Whether `residual` is, in the backward pass, the layout of y."""

    @property
    def layouts(self) -> tuple[Layout | None, ...]:
        return self[5:10]

    @property
    def held_tensors(self) -> int:
        """How many tensors the backward pass holds: see HOLDS_G in the kernel."""
        g_is_exact = self.dtype.itemsize >= 4 or self.activation in ("none", "relu", "relu6")
        return 2 if g_is_exact or self.residual is None else 3

    @property
    def table_layout(self) -> str:
        """How tables of `cnnops.tune` name it."""
        strides = [layout[0] for layout in self.layouts if layout is not None]
        words = [self.activation] if self.activation != "none" else []
        return tuned.layout([self.shape.x_size] * len(strides), strides, words)


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_longlong) for name in ("image", "site", "slot")]


class Params(ctypes.Structure):
    """`struct BatchNormParams`."""

    _fields_ = [
        *((name, Strides) for name in ("x", "residual", "y", "grad_x", "grad_residual")),
        ("sites_per_image", FastDiv),
        *(
            (name, ctypes.c_int)
            for name in (
                "sites", "split_sites", "parts", "part_sites", "merged", "held", "channels", "training",
            )
        ),
        *((name, ctypes.c_double) for name in ("count", "unbiased", "momentum", "eps")),
    ]  # fmt: skip


class Form(NamedTuple):
    """How blocks share the work: `blocks` hold a slot's sites together, 0 where nothing is held."""

    lanes: int
    threads: int = THREADS
    blocks: int = 0
    held: int = 0
    """Elements that a block holds of a tensor."""

    @property
    def name(self) -> str:
        return f"held/{self.blocks}" if self.blocks else "split"


def supports(op: str, shape: Shape, dtype: torch.dtype) -> str | None:
    """None, or why `op` cannot run on this problem."""
    if not isinstance(shape, NormShape):
        return f"expected a NormShape, got {type(shape).__name__}"
    if dtype not in ELEMENT:
        return f"dtype {dtype}: expected float32, float64, float16 or bfloat16"
    if shape.count > MAX_SITES:
        return f"{shape.count} values a channel: expected at most {MAX_SITES}"
    return None


@lru_cache(None)
def _device_of(target: Target) -> Device:
    capability = target.capability
    return Device(SHARED_KIB.get(capability, 99) << 10, capability >= (9, 0))


def _device(tensor: Tensor) -> Device:
    return _device_of(target_of(tensor.device))


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


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
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


def _layout(tensor: Tensor | None) -> Layout | None:
    return None if tensor is None else (tensor.stride(), alignment(tensor))


def _view(size: tuple[int, ...], layout: Layout) -> View:
    strides = _strides(size, layout[0])
    assert strides is not None, "results are dense and inputs went through _placed"
    return View(*strides, layout[1])


def _parameter_type(dtype: torch.dtype, parameters: Sequence[Tensor | None]) -> torch.dtype:
    return next((t.dtype for t in parameters if t is not None), dtype)


def _dense(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A per-channel vector as the kernels read it, in packs: itself, or a copy."""
    if vector is None:
        return None
    if vector.dtype == dtype and vector.is_contiguous() and alignment(vector) == PACK_BYTES:
        return vector
    return torch.empty(vector.shape, dtype=dtype, device=vector.device).copy_(vector)


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


class Matrix:
    """The problem's tensors as sites by slots: see the kernel's header."""

    def __init__(self, problem: Problem) -> None:
        shape = problem.shape
        all_views = [layout and _view(shape.x_size, layout) for layout in problem.layouts]
        views = [view for view in all_views if view is not None]
        like = all_views[3] or all_views[4] or views[-1]  # a gradient that is written, or y
        self.problem = problem
        self.channels_inner = like.c == 1 and like.l != 1
        self.vector = _pack(shape, problem.dtype.itemsize, views, self.channels_inner)
        self.slot_bytes = self.vector * problem.dtype.itemsize
        images, places = shape.N, shape.L
        by_view = {view: view for view in views}
        if places == 1 or all(view.n == view.l * places or images == 1 for view in views):
            # One run of places: no image to tell apart.
            by_view = {v: v._replace(n=0, l=v.n if places == 1 else v.l) for v in views}
            images, places = 1, images * places
        self.sites_per_image = places if self.channels_inner else places // self.vector
        self.sites = images * self.sites_per_image
        self.slots = shape.C // self.vector if self.channels_inner else shape.C
        self.channels_of_slot = self.vector if self.channels_inner else 1
        self.strides = [
            self._strides(None if view is None else by_view[view]) for view in all_views
        ]
        self.span = max(
            (shape.N - 1) * abs(v.n) + (shape.C - 1) * abs(v.c) + (shape.L - 1) * abs(v.l) for v in views
        )  # fmt: skip

    def _strides(self, view: View | None) -> Strides:
        if view is None:
            return Strides()
        n, c, l, _ = view  # noqa: E741
        if self.channels_inner:
            return Strides(n, l, c * self.vector)
        return Strides(n, l * self.vector, c)

    def lanes(self, most_bytes: int, least_bytes: int = 0) -> list[int]:
        """What a block may read side by side, widest first."""
        if not self.channels_inner:
            return [1]
        slots, each = self.slots, self.slot_bytes
        few = [
            n for n in LANES if n * each <= most_bytes and (n * each >= least_bytes or n >= slots)
        ]
        return [
            n for n in few if n >= slots > n // 2 or -(-slots // n) * n <= LANE_WASTE * slots
        ] or few[:1]

    def blocks(self, lanes: int) -> int:
        return -(-self.slots // lanes)

    def constants(self, form: Form, parts: int = 1) -> dict[str, str | int]:
        problem = self.problem
        return {
            "ELEMENT": ELEMENT[problem.dtype],
            "ACCUMULATOR": ACCUMULATOR[problem.dtype],
            "PARAMETER": ELEMENT[problem.parameter],
            "INDEX": "long long" if max(self.span, 3 * problem.shape.C * parts) > INT32_MAX else "int",
            "VECTOR": self.vector,
            "UNROLL": UNROLL[self.slot_bytes == PACK_BYTES],
            "CHANNELS_INNER": int(self.channels_inner),
            "LANES": form.lanes,
            "THREADS": form.threads,
            "HELD": int(form.blocks > 0),
            "ACTIVATION": problem.activation,
            "FROM_RESULT": int(problem.from_result),
        }  # fmt: skip

    def params(self, split_sites: int, others: Mapping[str, float]) -> Params:
        count = self.problem.shape.count
        params = Params(*self.strides, FastDiv(self.sites_per_image), self.sites, split_sites)
        params.channels, params.count = self.problem.shape.C, count
        params.unbiased = count / max(count - 1, 1)
        for name, value in others.items():
            setattr(params, name, value)
        return params


# ---- forms -----------------------------------------------------------------------------------------------

_forced: str | None = None


@contextmanager
def forced(variant: str) -> Iterator[None]:
    """Within the block training and backward take this form, "split" or "held/4", wherever they can; or for
    "" what arithmetic prefers, whatever tables say."""
    global _forced
    former, _forced = _forced, variant
    try:
        yield
    finally:
        _forced = former


def _held(matrix: Matrix, tensors: int, blocks: int, lanes: int, beside: int) -> Form | None:
    """`blocks` that hold so many tensors, `beside` of them to a multiprocessor, or None where they cannot."""
    problem = matrix.problem
    split_sites = -(-matrix.sites // blocks)
    held = -(-split_sites * lanes * matrix.vector // PACK_BYTES) * PACK_BYTES
    threads = THREADS if beside > 1 else MOST_THREADS
    values = 8 if problem.dtype == torch.float64 else 4
    # Sums and what follows from them, a block's reserve of 1 KiB.
    scratch = (3 * threads // 32 + 2) * lanes * matrix.channels_of_slot * values + 1024
    room = (problem.device.shared + 1024) // beside - scratch
    if tensors * held * problem.dtype.itemsize > room or split_sites * (blocks - 1) >= matrix.sites:
        return None
    return Form(lanes, threads, blocks, held)


def _sizes(device: Device, most: int) -> list[int]:
    return [n for n in CLUSTERS if n <= (most if device.clusters else 1)]


def _held_form(matrix: Matrix, tensors: int, sizes: Sequence[int]) -> Form | None:
    """The smallest cluster that holds slots whole, if any does: two blocks to a multiprocessor
    where that can be."""
    wide = matrix.lanes(2 * SECTOR_BYTES, 2 * SECTOR_BYTES)
    narrow = matrix.lanes(SECTOR_BYTES, SECTOR_BYTES)
    for lanes in dict.fromkeys((*wide, *narrow)):
        for beside in (2, 1):
            for blocks in sizes:
                form = _held(matrix, tensors, blocks, lanes, beside)
                if form is not None:
                    return form
    return None


def _form(matrix: Matrix, tensors: int, variant: str) -> Form:
    """The form for holding so many tensors; `variant` may name another than arithmetic would choose."""
    split, device = Form(matrix.lanes(LINE_BYTES)[0]), matrix.problem.device
    if variant == "split":
        return split
    for blocks in _sizes(device, CLUSTERS[-1]):
        if variant == f"held/{blocks}":
            form = _held_form(matrix, tensors, [blocks])
            if form is not None:
                return form
    sizes = _sizes(device, PORTABLE_CLUSTER)
    form = _held_form(matrix, tensors, sizes)
    if form is None:
        return split
    slots, size = matrix.blocks(form.lanes), tensors * matrix.problem.dtype.itemsize
    while (
        slots * form.blocks < SMS
        and 2 * form.blocks in sizes
        and form.held * size >= 2 * PIECE_BYTES
    ):
        more = _held(matrix, tensors, 2 * form.blocks, form.lanes, 2)
        if more is None:
            break
        form = more
    if 2 * slots * form.blocks < SMS and form.held * size > SMALL_SLAB:
        return split
    return form


def _variant(op: str, problem: Problem, named: str | None) -> str:
    """What `forced` or a table names; "" where they leave the choice to arithmetic."""
    if named is not None:
        return named
    return tuned.variant(op, "batch_norm", problem.shape, problem.dtype, problem.table_layout)


# ---- launches --------------------------------------------------------------------------------------------

_FORWARD = ("x", "weight", "bias", "residual")
_RUNNING = ("running_mean", "running_var")
_BACKWARD = ("grad_y", "x", "weight", "bias", "beside", "mean", "rstd")
_PARAMETERS = ("grad_weight", "grad_bias")


_NONE: Mapping[str, float] = {}


class Plan(NamedTuple):
    """The one launch of a held form; or a pass that leaves partial results, one that makes them fewer where
    they are many, and one that uses them. `sizes` are those of the partial results."""

    whole: Launch | None
    first: Launch | None = None
    merge: Launch | None = None
    last: Launch | None = None
    sizes: tuple[int, int] = (0, 0)

    def partials(self, inputs: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Launch what makes them."""
        assert self.first is not None
        partials = like.new_empty(self.sizes[0])
        launch(self.first, inputs, (partials,))
        if self.merge is not None:
            many, partials = partials, like.new_empty(self.sizes[1])
            launch(self.merge, (many,), (partials,))
        return partials


class _Split:
    """The launches of a problem in several passes, with `values` to a channel's partial result."""

    def __init__(self, matrix: Matrix, group: str, values: int, lanes: int) -> None:
        problem = matrix.problem
        self.matrix, self.group, self.form = matrix, group, Form(lanes)
        rows, self.slot_blocks = THREADS // lanes, matrix.blocks(lanes)
        splits = max(1, min(matrix.sites // (SPLIT_SITES * rows), MAX_BLOCKS // self.slot_blocks))
        step = rows * UNROLL[matrix.slot_bytes == PACK_BYTES]
        self.split_sites = -(-matrix.sites // (splits * step)) * step
        self.splits = -(-matrix.sites // self.split_sites)
        width = lanes * matrix.channels_of_slot
        part_bytes = width * values * (8 if problem.dtype == torch.float64 else 4)
        read = self.split_sites * lanes * matrix.slot_bytes
        self.merged = 1
        if self.splits * part_bytes * MERGED_PART > read:
            left = max(1, min(MOST_MERGED, read // (2 * MERGED_PART * part_bytes)))
            self.merged = -(-self.splits // left)
        self.left = -(-self.splits // self.merged)
        self.sizes = values * problem.shape.C * self.splits, values * problem.shape.C * self.left

    def launch(
        self, entry: str, rows: int, inputs: Sequence[str], outputs: Sequence[str],
        updates: Sequence[str] = (), params: Mapping[str, float] = _NONE,
    ) -> Launch:  # fmt: skip
        constants = {**self.matrix.constants(self.form, self.splits), self.group: 1}
        return launch_of(
            SOURCE, entry, constants, self.matrix.params(self.split_sites, params),
            grid=(self.slot_blocks, rows), block=(THREADS,), inputs=inputs, outputs=outputs, updates=updates,
        )  # fmt: skip

    def plan(self, first: Launch, merge: str, last: Launch) -> Plan:
        fewer = None
        if self.merged > 1:
            of_first = {"parts": self.splits, "part_sites": self.split_sites, "merged": self.merged}
            fewer = self.launch(merge, self.left, ("partials",), ("fewer",), params=of_first)
        return Plan(None, first, fewer, last, self.sizes)

    @property
    def of_last(self) -> dict[str, float]:
        """What the last pass finds."""
        return {"parts": self.left, "part_sites": self.merged * self.split_sites}


def _whole(
    matrix: Matrix, form: Form, group: str, tensors: int, entry: str, inputs: Sequence[str],
    outputs: Sequence[str], updates: Sequence[str], params: Mapping[str, float],
) -> Launch:  # fmt: skip
    return launch_of(
        SOURCE, entry + "_cluster" * (form.blocks > 1), {**matrix.constants(form), group: 1},
        matrix.params(-(-matrix.sites // form.blocks), {"held": form.held, **params}),
        grid=(matrix.blocks(form.lanes) * form.blocks,), block=(form.threads,), inputs=inputs,
        outputs=outputs, updates=updates, cluster=form.blocks,
        shared_bytes=tensors * form.held * matrix.problem.dtype.itemsize,
    )  # fmt: skip


@tuned.cached
def _train_plan(problem: Problem, momentum: float, eps: float, named: str | None) -> Plan:
    matrix = Matrix(problem)
    form = _form(matrix, 1, _variant("batch_norm_train", problem, named))
    outputs, rule = ("y", "mean", "rstd"), {"momentum": momentum, "eps": eps}
    if form.blocks:
        entry = "batch_norm_train"
        return Plan(_whole(matrix, form, "TRAIN", 1, entry, _FORWARD, outputs, _RUNNING, rule))
    split = _Split(matrix, "TRAIN", 2, form.lanes)
    first = split.launch("batch_norm_train_stats", split.splits, ("x",), ("partials",))
    last = split.launch(
        "batch_norm_train_apply", split.splits, (*_FORWARD, "partials"), outputs, _RUNNING,
        {**split.of_last, **rule},
    )  # fmt: skip
    return split.plan(first, "batch_norm_train_merge", last)


@lru_cache(1024)
def _stats_plan(problem: Problem) -> Plan:
    matrix = Matrix(problem)
    split = _Split(matrix, "TRAIN", 2, matrix.lanes(LINE_BYTES)[0])
    first = split.launch("batch_norm_train_stats", split.splits, ("x",), ("partials",))
    inputs, outputs = ("x", "partials"), ("mean", "var")
    last = split.launch("batch_norm_stats_finish", 1, inputs, outputs, params=split.of_last)
    return split.plan(first, "batch_norm_train_merge", last)


@lru_cache(1024)
def _infer_plan(problem: Problem, eps: float) -> Launch:
    matrix = Matrix(problem)
    split = _Split(matrix, "INFER", 0, matrix.lanes(LINE_BYTES)[0])
    inputs = (*_FORWARD, *_RUNNING)
    return split.launch("batch_norm_infer", split.splits, inputs, ("y",), params={"eps": eps})


@tuned.cached
def _bwd_plan(problem: Problem, training: bool, wants_sums: bool, named: str | None) -> Plan:
    matrix, tensors = Matrix(problem), problem.held_tensors
    results = ("grad_x", *_PARAMETERS, "grad_residual")
    wants_apply = problem.grad_x is not None or problem.grad_residual is not None
    variant = _variant("batch_norm_bwd", problem, named) if wants_sums else "split"
    form = _form(matrix, tensors, variant)
    if form.blocks:
        entry, rule = "batch_norm_bwd", {"training": training}
        return Plan(_whole(matrix, form, "BACKWARD", tensors, entry, _BACKWARD, results, (), rule))
    split = _Split(matrix, "BACKWARD", 3, form.lanes)
    first = split.launch("batch_norm_bwd_sums", split.splits, _BACKWARD, ("partials",))
    last = split.launch(
        "batch_norm_bwd_apply", split.splits if wants_apply else 1, (*_BACKWARD, "partials"), results,
        params={"training": training, **split.of_last},
    )  # fmt: skip
    return split.plan(first, "batch_norm_bwd_merge", last)


def variants(op: str, shape: NormShape, *arguments: Any) -> tuple[str, ...]:
    """Names of the forms that are worth measuring for this call, without the one that is taken anyway."""
    if op == "batch_norm_train":
        problem, *_ = _train_problem(shape, *arguments[:6], *arguments[8:10])
        tensors = 1
    elif op == "batch_norm_bwd":
        problem, *_, wants_sums = _bwd_problem(shape, *arguments)
        tensors = problem.held_tensors
        if not wants_sums:
            return ()
    else:
        return ()
    matrix = Matrix(problem)
    sizes = _sizes(problem.device, CLUSTERS[-1])
    names = ["split", *(f"held/{n}" for n in sizes if _held_form(matrix, tensors, [n]))]
    return tuple(name for name in names if name != _form(matrix, tensors, "").name)


# ---- operations ------------------------------------------------------------------------------------------


def batch_norm_stats(shape: NormShape, x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance of every channel."""
    if _strides(x.size(), x.stride()) is None:
        x = x.contiguous()
    plan = _stats_plan(Problem(shape, x.dtype, x.dtype, "none", _device(x), _layout(x), None, None))
    assert plan.last is not None
    launch(plan.last, (x, plan.partials((x,), mean)), (mean, var))


def _train_problem(
    shape: NormShape, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, activation: str, y: Tensor,
) -> tuple[Problem, Tensor, Tensor | None]:  # fmt: skip
    """The problem, x and residual."""
    x = _placed(x, y)
    residual = None if residual is None else _placed(residual, y)
    parameter = _parameter_type(x.dtype, (weight, bias, running_mean, running_var))
    layouts = _layout(x), _layout(residual), _layout(y)
    return Problem(shape, x.dtype, parameter, activation, _device(x), *layouts), x, residual


def batch_norm_train(
    shape: NormShape,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """y = act(γ·x̂ + β + residual) with the batch's statistics; fills mean and rstd, moves running ones."""
    problem, x, residual = _train_problem(
        shape, x, weight, bias, residual, running_mean, running_var, activation, y
    )
    parameter = problem.parameter
    inputs = (x, _dense(weight, parameter), _dense(bias, parameter), residual)
    running = _dense(running_mean, parameter), _dense(running_var, parameter)
    plan, results = _train_plan(problem, momentum, eps, _forced), (y, mean, rstd)
    if plan.whole is not None:
        launch(plan.whole, inputs, results, running)
    else:
        assert plan.last is not None
        launch(plan.last, (*inputs, plan.partials((x,), mean)), results, running)
    for given, moved in zip((running_mean, running_var), running, strict=True):
        if given is not None and moved is not None and given is not moved:
            given.copy_(moved)


def batch_norm_infer(
    shape: NormShape,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
    y: Tensor,
) -> None:
    """y = act(γ·(x - running_mean) / sqrt(running_var + eps) + β + residual)."""
    x = _placed(x, y)
    residual = None if residual is None else _placed(residual, y)
    parameters = [_dense(t, running_mean.dtype) for t in (weight, bias, running_mean, running_var)]
    layouts = _layout(x), _layout(residual), _layout(y)
    problem = Problem(shape, x.dtype, running_mean.dtype, activation, _device(x), *layouts)
    launch(_infer_plan(problem, eps), (x, *parameters[:2], residual, *parameters[2:]), (y,))


def _bwd_problem(
    shape: NormShape, grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, y: Tensor | None, mean: Tensor, rstd: Tensor, activation: str, training: bool,
    grad_x: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
    grad_residual: Tensor | None,
) -> tuple[Problem, Tensor, Tensor, Tensor | None, bool]:  # fmt: skip
    """The problem, grad_y, x, what is read beside them, and whether sums are wanted."""
    from_result = y is not None and activation != "none"
    beside = y if from_result else None if activation == "none" else residual
    like = grad_x if grad_x is not None else grad_residual
    if like is None:
        like = x = x if _strides(x.size(), x.stride()) is not None else x.contiguous()
    x, grad_y = _placed(x, like), _placed(grad_y, like)
    beside = None if beside is None else _placed(beside, like)
    problem = Problem(
        shape, x.dtype, _parameter_type(x.dtype, (weight, bias, grad_weight, grad_bias)), activation,
        _device(x), _layout(x), _layout(beside), _layout(grad_y), _layout(grad_x), _layout(grad_residual),
        from_result,
    )  # fmt: skip
    wants_sums = (
        grad_weight is not None or grad_bias is not None or (training and grad_x is not None)
    )
    return problem, grad_y, x, beside, wants_sums


def batch_norm_bwd(
    shape: NormShape,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    training: bool,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_residual: Tensor | None,
) -> None:
    """The gradients that are asked for; mean and rstd are those that y was computed with.

    `training` says that they came from x itself, and so depend on it.
    """
    results = (grad_x, grad_weight, grad_bias, grad_residual)
    problem, grad_y, x, beside, wants_sums = _bwd_problem(
        shape, grad_y, x, weight, bias, residual, y, mean, rstd, activation, training, *results
    )
    vectors = (_dense(t, problem.parameter) for t in (weight, bias))
    inputs = (grad_y, x, *vectors, beside, *(_dense(t, mean.dtype) for t in (mean, rstd)))
    plan = _bwd_plan(problem, training, wants_sums, _forced)
    if plan.whole is not None:
        launch(plan.whole, inputs, results)
    elif wants_sums or grad_x is not None or grad_residual is not None:
        assert plan.last is not None
        partials = plan.partials(inputs, mean) if wants_sums else None
        launch(plan.last, (*inputs, partials), results)
