"""What the memory-bound kernels move, counted by the emulator on problems scaled down.

A `Problem` is a layer of some size, and the calls that compute it in each direction. `smaller` finds a size
that the emulator can run in a second and for which the launchers choose the same variants of the kernels as
for the full one; `count` runs it there and scales the counts up again. tests/test_traffic.py holds the counts
to the least traffic, `bench/predict.py` makes times of them.

Problems are the pooling and batch norm rows of `bench/suites.py`, its depthwise convolutions, and
`OTHERS`, which no suite has.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.suites import SUITES, Case, Size
from cnnops.cuda import batch_norm, conv_depthwise, conv_fold, emulate, group_norm, pool, unpool
from cnnops.cuda.emulate import Profile
from cnnops.cuda.emulator_profile import SECTOR
from cnnops.cuda.launch import trace
from cnnops.shapes import ConvShape, GroupShape, LayerShape, NormShape, PoolShape, UnpoolShape


class Form(NamedTuple):
    """How tensors lie in memory ("contiguous" or "channels_last"), and their dtype."""

    layout: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.layout}-{str(self.dtype).removeprefix('torch.')}"


FORMS = tuple(
    Form(layout, dtype)
    for layout in ("contiguous", "channels_last")
    for dtype in (torch.float32, torch.bfloat16)
)

# ---- tensors, and what is computed with them -------------------------------------------------------------


class Step(NamedTuple):
    """One direction: what computes it, and the tensors that it reads and writes.

    Parameters and statistics, a few values a channel, are left out.
    """

    run: Callable[[], None]
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    multiplies: int = 0
    """Multiply-adds, where they might take longer than memory."""
    filters: tuple[Tensor, ...] = ()
    """Those of `reads` that every image needs: blocks ask for them as often as there are blocks."""

    @property
    def least(self) -> int:
        """Bytes of the least traffic: every tensor once."""
        return sum(t.nbytes for t in (*self.reads, *self.writes))


Steps = dict[str, Step]
"""By direction."""


@dataclass(frozen=True)
class Make:
    """Tensors of one form and device. On "meta" they have no memory: launches can but be planned."""

    form: Form
    device: str = "cpu"

    def __call__(self, size: Size, dtype: torch.dtype | None = None, fill: bool = False) -> Tensor:
        dtype = dtype or self.form.dtype
        if self.form.layout == "channels_last":
            N, C, *spatial = size
            t = torch.empty((N, *spatial, C), dtype=dtype, device=self.device).movedim(-1, 1)
        else:
            t = torch.empty(size, dtype=dtype, device=self.device)
        return t.normal_(generator=torch.Generator().manual_seed(1)) if fill and self.runs else t

    @property
    def runs(self) -> bool:
        return self.device != "meta"

    def vectors(self, length: int, count: int) -> list[Tensor]:
        """Parameters: as in mixed precision of the tensors' own dtype."""
        return [torch.ones(length, dtype=self.form.dtype, device=self.device) for _ in range(count)]

    def statistics(self, *size: int) -> list[Tensor]:
        return [torch.ones(size, device=self.device) for _ in range(2)]

    def dense(self) -> Make:
        return replace(self, form=Form("contiguous", self.form.dtype))


def pooled(op: str, shape: PoolShape, make: Make) -> Steps:
    """`op` is "max" or "avg". What overlapping windows read again is not counted: it is at hand in L1."""
    x, y = make(shape.x_size, fill=True), make(shape.y_size)
    grad_y, grad_x = make(shape.y_size, fill=True), make(shape.x_size)
    if op == "avg":
        return {
            "fwd": Step(lambda: pool.avg_pool_fwd(shape, x, y), (x,), (y,)),
            "bwd": Step(lambda: pool.avg_pool_bwd(shape, grad_y, grad_x), (grad_y,), (grad_x,)),
        }
    places = make(shape.y_size, torch.uint8)
    if make.runs:
        pool.max_pool_fwd(shape, x, y, places)
    return {
        "fwd": Step(lambda: pool.max_pool_fwd(shape, x, y, places), (x,), (y, places)),
        "bwd": Step(
            lambda: pool.max_pool_bwd(shape, grad_y, places, grad_x),
            (grad_y, places), (grad_x,),
        ),
    }  # fmt: skip


def batch_normed(size: Size, training: bool, residual: bool, activation: str, make: Make) -> Steps:
    """Backward, y stands in for the residual that was added before an activation."""
    shape, acts = NormShape.of(size), activation != "none"
    x, y, grad_y, grad_x = make(size, fill=True), make(size), make(size, fill=True), make(size)
    beside = make(size, fill=True) if residual else None
    grad_residual = make(size) if residual and acts else None
    weight, bias, mean, var, grad_weight, grad_bias = make.vectors(size[1], 6)
    save_mean, save_rstd = make.statistics(size[1])
    of_parameters = (grad_weight, grad_bias) if training else (None, None)

    def fwd() -> None:
        tensors = (shape, x, weight, bias, beside, mean, var)
        if training:
            batch_norm.batch_norm_train(*tensors, 0.1, 1e-5, activation, y, save_mean, save_rstd)
        else:
            batch_norm.batch_norm_infer(*tensors, 1e-5, activation, y)

    def bwd() -> None:
        batch_norm.batch_norm_bwd(
            shape, grad_y, x, weight, bias, None, beside if acts else None, save_mean, save_rstd, activation,
            training, grad_x, of_parameters[0], of_parameters[1], grad_residual,
        )  # fmt: skip

    of_forward, of_backward = [x], [grad_y]
    # With running statistics grad_x asks for x where it tells the activation's derivative only.
    if training or (acts and not residual):
        of_backward.append(x)
    if beside is not None:
        of_forward.append(beside)
        of_backward += [beside] if acts else []
    written = (grad_x,) if grad_residual is None else (grad_x, grad_residual)
    return {
        "fwd": Step(fwd, tuple(of_forward), (y,)),
        "bwd": Step(bwd, tuple(of_backward), written),
    }


def group_normed(size: Size, groups: int, make: Make) -> Steps:
    shape = GroupShape.of(size, groups)
    x, y, grad_y, grad_x = make(size, fill=True), make(size), make(size, fill=True), make(size)
    weight, bias, grad_weight, grad_bias = make.vectors(size[1], 4)
    mean, rstd = make.statistics(size[0], groups)
    grads = grad_x, grad_weight, grad_bias

    def fwd() -> None:
        group_norm.group_norm_fwd(shape, x, weight, bias, 1e-5, "none", y, mean, rstd)

    def bwd() -> None:
        group_norm.group_norm_bwd(shape, grad_y, x, weight, bias, mean, rstd, "none", *grads)

    return {
        "fwd": Step(fwd, (x,), (y,)),
        "bwd": Step(bwd, (grad_y, x), (grad_x,)),
    }


def layer_normed(size: Size, make: Make) -> Steps:
    """Over C of ``N C H W``. What lies in channels-last are rows; else x has its rows beside each other, as a
    convolution's contiguous result has them, and everything else contiguous ones."""
    rows = (size[0], *size[2:], size[1])
    shape, dense = LayerShape.of(rows, size[1:2]), make.dense()
    x = make(size, fill=True).movedim(1, -1)
    y, grad_y, grad_x = dense(rows), dense(rows, fill=True), dense(rows)
    weight, bias, grad_weight, grad_bias = make.vectors(size[1], 4)
    mean, rstd = make.statistics(*shape.outer)
    grads = grad_x, grad_weight, grad_bias
    return {
        "fwd": Step(
            lambda: group_norm.layer_norm_fwd(shape, x, weight, bias, 1e-5, y, mean, rstd), (x,), (y,)
        ),
        "bwd": Step(
            lambda: group_norm.layer_norm_bwd(shape, grad_y, x, weight, mean, rstd, *grads),
            (grad_y, x), (grad_x,),
        ),
    }  # fmt: skip


def unpooled(size: Size, make: Make) -> Steps:
    """At the indices of 2 x 2 pooling: backward needs something of nearly all sectors of grad_y."""
    output = tuple(2 * n for n in size[2:])
    shape = UnpoolShape.of(size, size, output)
    x, y, indices = make(size, fill=True), make(shape.y_size), make(size, torch.int64)
    grad_y, grad_x = make(shape.y_size, fill=True), make(size)
    if make.runs:
        drawn = torch.randn(shape.y_size, generator=torch.Generator().manual_seed(2))
        indices.copy_(F.max_pool2d(drawn, 2, return_indices=True)[1])
    return {
        "fwd": Step(
            lambda: unpool.max_unpool_fwd(shape, x, indices, y), (x, indices), (y,)
        ),
        "bwd": Step(
            lambda: unpool.max_unpool_bwd(shape, grad_y, indices, grad_x),
            (grad_y, indices), (grad_x,),
        ),
    }  # fmt: skip


def folded(size: Size, mode: str, make: Make) -> Steps:
    shape = ConvShape.of(size, (1, size[1], 3, 3), padding=1, padding_mode=mode)
    padded, grad_x = make(shape.padded.x_size, fill=True), make(size)
    run = lambda: conv_fold.conv_fold(shape, padded, grad_x)  # noqa: E731
    return {"bwd": Step(run, (padded,), (grad_x,))}


def convolved(shape: ConvShape, transposed: bool, bias: bool, make: Make) -> Steps:
    """Depthwise. Of a transposed convolution, `shape` is the one whose dgrad it is, and the result is x."""
    x, y = make(shape.x_size, fill=True), make(shape.y_size, fill=True)
    grad_x, grad_y = make(shape.x_size), make(shape.y_size)
    w, grad_w = make.dense()(shape.w_size, fill=True), make.dense()(shape.w_size)
    added = make.vectors(shape.C if transposed else shape.K, 1)[0] if bias else None
    of_fprop, of_dgrad = (None, added) if transposed else (added, None)
    fprop = Step(
        lambda: conv_depthwise.conv_fprop(shape, x, w, of_fprop, grad_y),
        (x, w), (grad_y,), shape.macs, (w,),
    )  # fmt: skip
    dgrad = Step(
        lambda: conv_depthwise.conv_dgrad(shape, y, w, of_dgrad, grad_x),
        (y, w), (grad_x,), shape.macs, (w,),
    )  # fmt: skip
    wgrad = Step(
        lambda: conv_depthwise.conv_wgrad(shape, y, x, grad_w), (y, x), (grad_w,), shape.macs
    )
    forward, back = (dgrad, fprop) if transposed else (fprop, dgrad)
    return {"fprop": forward, "dgrad": back, "wgrad": wgrad}


# ---- problems --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A layer of size `full`: ``N C *spatial`` of its input."""

    id: str
    kernel: str
    """The file in kernels/."""
    text: str
    full: Size
    steps: Callable[[Size, Make], Steps]
    span: int = 1
    """Of a window: scaled down, spatial axes keep four times as much."""
    by_channel: bool = False
    """Whether channels are computed each for itself, and images are not: parameters' gradients."""
    line: int = 128
    """Bytes of channels that a channels-last tensor keeps, so that neighbouring places share no sector."""
    channels: int = 1
    """Their number stays a multiple of it: as many as a block may have."""


def is_depthwise(case: Case) -> bool:
    """Whether `case` is a convolution whose filters have one channel each."""
    shape = case.shape
    return isinstance(shape, ConvShape) and shape.groups == shape.C > 1


def has_problem(case: Case) -> bool:
    """Whether `problem_of` takes `case`."""
    return case.kind in ("pool", "norm") or is_depthwise(case)


def problem_of(case: Case) -> Problem:
    """The problem of a case that `has_problem`. Raises ValueError for another one."""
    name, options, shape = f"{case.suite}/{case.name}", dict(case.options), case.shape
    if isinstance(shape, NormShape):
        act = "none" if case.op == "batch_norm" else options.get("activation", "relu")
        training, residual = options.get("training", False), options.get("residual", False)
        return Problem(
            name, "batch_norm.cu", case.problem, case.x,
            lambda size, make: batch_normed(size, training, residual, act, make), by_channel=True,
        )  # fmt: skip
    if not isinstance(shape, PoolShape):
        return _depthwise_problem(name, case)
    op = "max" if case.op.startswith("max") else "avg"

    def steps(size: Size, make: Make) -> Steps:
        smaller = replace(case, x=size).shape
        assert isinstance(smaller, PoolShape)
        return pooled(op, smaller, make)

    # An adaptive window is all of the plane: such planes keep their size.
    span = max(shape.dilation[i] * (shape.kernel[i] - 1) + 1 for i in range(len(shape.kernel)))
    return Problem(name, "pool.cu", case.problem, case.x, steps, span)


def _depthwise_problem(name: str, case: Case) -> Problem:
    if not is_depthwise(case):
        raise ValueError(
            f"{name}: expected pooling, batch norm or depthwise convolution, got {case.problem}"
        )
    whole, filters = case.shape, case.w
    assert isinstance(whole, ConvShape) and filters is not None

    def steps(size: Size, make: Make) -> Steps:
        options = {**dict(case.options), "groups": whole.groups * size[1] // case.x[1]}
        w = (filters[0] * size[1] // case.x[1], *filters[1:])
        shape = replace(case, x=size, w=w, options=tuple(options.items())).shape
        assert isinstance(shape, ConvShape)
        every = convolved(shape, case.kind == "conv_transpose", case.bias, make)
        return {direction: every[direction] for direction in case.directions or every}

    span = max(d * (k - 1) + 1 for d, k in zip(whole.dilation, whole.kernel, strict=True))
    large = math.prod(whole.kernel[-2:]) > conv_depthwise.MOST_TAPS
    return Problem(
        name, "conv_depthwise.cu", case.problem, case.x, steps, span, not large,
        conv_depthwise.RUN_BYTES, 16 if large else 1,
    )  # fmt: skip


def problem_named(name: str) -> Problem:
    """By "suite/case", or the id of one of `OTHERS`. Raises KeyError where there is none."""
    for problem in OTHERS:
        if problem.id == name:
            return problem
    suite, _, of_case = name.partition("/")
    for case in SUITES.get(suite, ()):
        if case.name == of_case:
            return problem_of(case)
    raise KeyError(name)


OTHERS = (
    Problem("batch_norm/2048@7", "batch_norm.cu", "x 32x2048x7x7", (32, 2048, 7, 7),
            lambda size, make: batch_normed(size, False, False, "none", make), by_channel=True),
    Problem("group_norm/256@28", "group_norm.cu", "x 8x256x28x28, groups of 8 channels", (8, 256, 28, 28),
            lambda size, make: group_normed(size, size[1] // 8, make)),
    Problem("group_norm/64@112", "group_norm.cu", "x 8x64x112x112, groups of 8 channels", (8, 64, 112, 112),
            lambda size, make: group_normed(size, size[1] // 8, make)),
    Problem("instance_norm/64@56", "group_norm.cu", "x 8x64x56x56, groups of 1 channel", (8, 64, 56, 56),
            lambda size, make: group_normed(size, size[1], make)),
    Problem("layer_norm/96@56", "group_norm.cu", "x 8x96x56x56 over C", (8, 96, 56, 56), layer_normed),
    Problem("unpool/64@56", "unpool.cu", "x 32x64x56x56 to 112x112", (32, 64, 56, 56), unpooled),
    Problem("unpool/64@28", "unpool.cu", "x 32x64x28x28 to 56x56", (32, 64, 28, 28), unpooled),
    Problem("fold/64@56", "conv_fold.cu", "x 32x64x56x56, reflect, padding=1", (32, 64, 56, 56),
            lambda size, make: folded(size, "reflect", make)),
)  # fmt: skip

# ---- scaling down ----------------------------------------------------------------------------------------

LEAST, INNER, MOST = 3 * 2**14, 2**18, 3 * 2**23
"""Elements of x in a problem that is counted: no fewer, if the full one has as many, and no more than `MOST`.
The axis whose places are neighbours in memory and, but for batch norm, channels of channels-last tensors are
shortened only as long as more than `INNER` are left: they decide which lanes and blocks share a sector."""

MODULES: tuple[ModuleType, ...] = (batch_norm, conv_depthwise, conv_fold, group_norm, pool, unpool)
FULL_GPU = (
    (batch_norm, "SMS"), (batch_norm, "MAX_BLOCKS"), (conv_depthwise, "SMS"), (group_norm, "WALKERS"),
    (pool, "FULL_GPU"), (unpool, "BLOCKS"),
)  # fmt: skip
"""What launchers keep busy of a GPU: as much smaller as the problem, in whole numbers but for floats."""


def _forget_plans() -> None:
    for module in MODULES:
        for member in vars(module).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


@contextmanager
def smaller_gpu(ratio: float) -> Iterator[None]:
    """Within the context launchers plan for a GPU that is `ratio` times as large."""
    former = [(module, name, getattr(module, name)) for module, name in FULL_GPU]
    _forget_plans()
    try:
        for module, name, value in former:
            less = value * ratio
            setattr(module, name, less if isinstance(value, float) else max(1, int(less)))
        yield
    finally:
        for module, name, value in former:
            setattr(module, name, value)
        _forget_plans()


Variants = tuple[tuple[object, ...], ...]


def variants(step: Step) -> Variants:
    """Entries and constants of its launches, but for the width of addresses, and how far a thread walks."""
    with trace(run=False) as launches:
        step.run()
    return tuple(
        (
            plan.kernel.entry,
            tuple(pair for pair in plan.kernel.constants if pair[0] != "INDEX"),
            getattr(plan.params, "strip", None),
        )
        for plan in launches
    )


def variants_of(problem: Problem, form: Form, size: Size) -> dict[str, Variants]:
    """By direction: what `problem` launches at `size`, on a GPU that is as much smaller."""
    with smaller_gpu(math.prod(size) / math.prod(problem.full)):
        steps = problem.steps(size, Make(form, "meta"))
        return {direction: variants(step) for direction, step in steps.items()}


def _shorter(problem: Problem, form: Form, size: Size) -> Iterator[Size]:
    """`size` with one axis halved: first those axes that leave the shape of the work as it is."""
    last = len(size) - 1
    outer = range(2, last)
    if form.layout == "channels_last":
        first = (1, 0) if problem.by_channel else (0,)
        axes = [*first, *outer, 1, last] if last > 2 else [*first, 2, 1]
        inner = {1, last} if last > 2 else {1}
    else:
        axes = [1, 0, *outer, last] if problem.by_channel else [0, 1, *outer, last]
        inner = {last}
    if problem.by_channel:
        inner -= {1}
    for axis in axes:
        less = (size[axis] + 1) // 2
        # Depth has no neighbours in memory: it may be odd, and borders are a small part of it.
        deep = len(size) == 5 and axis == 2 and size[axis] % 2
        if axis >= 2 and not deep and (less < 4 * problem.span or size[axis] % 2):
            continue
        if deep and less < 2 * problem.span:
            continue
        if axis in inner and math.prod(size) <= INNER:
            continue
        if axis == 1 and less % problem.channels:
            continue
        if axis == 1 and form.layout == "channels_last":
            # Places keep their alignment, too.
            before, after = (n * form.dtype.itemsize for n in (size[1], less))
            if after < problem.line or after % SECTOR != before % SECTOR:
                continue
        if less < size[axis]:
            yield (*size[:axis], less, *size[axis + 1 :])


def _takes(problem: Problem, form: Form, size: Size, wanted: dict[str, Variants]) -> bool:
    try:
        return variants_of(problem, form, size) == wanted
    except (RuntimeError, ValueError):  # no problem at all, as 4 channels in groups of 8
        return False


def smaller(problem: Problem, form: Form) -> Size:
    """A small size for which the same variants are taken as for the full one.

    Raises ValueError where none has at most `MOST`.
    """
    full = variants_of(problem, form, problem.full)
    size = problem.full
    while True:
        for less in _shorter(problem, form, size):
            if math.prod(less) >= LEAST and _takes(problem, form, less, full):
                size = less
                break
        else:
            break
    if math.prod(size) > MOST:
        raise ValueError(f"{problem.id}, {form}: no smaller problem than {size} takes its variants")
    return size


# ---- counting --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """Bytes of one tensor that a launch reads, or writes."""

    tensor: int
    """The same number in every launch that is given this tensor."""
    writes: bool
    l2: float
    """That pass between L1 and L2: of reads each sector once a block, of writes with every request."""
    memory: float
    """Of the launch's different sectors."""
    span: float
    """All of the tensor's."""


@dataclass(frozen=True)
class Counted:
    """One launch, scaled up to the full problem."""

    entry: str
    l1: float
    """Bytes of the sectors that requests touch."""
    wavefronts: float
    """Of shared memory."""
    sides: tuple[Side, ...]
    multiplies: float = 0
    """Multiply-adds of all threads."""


def profiles(step: Step) -> list[Profile]:
    """Run `step` under the emulator."""
    with emulate.schedule("forward"), emulate.profile() as launches:
        step.run()
    return launches


def scaled(problem: Problem, form: Form, size: Size | None = None) -> Steps:
    """The steps of `problem` at `size`, by default `smaller`'s, planned as for the full one when they run."""
    size = size or smaller(problem, form)
    ratio = math.prod(size) / math.prod(problem.full)

    def planned(run: Callable[[], None]) -> Callable[[], None]:
        return smaller_gpu(ratio)(run)

    with smaller_gpu(ratio):
        steps = problem.steps(size, Make(form))
    return {direction: step._replace(run=planned(step.run)) for direction, step in steps.items()}


def count(problem: Problem, form: Form, size: Size | None = None) -> dict[str, tuple[Counted, ...]]:
    """By direction: every launch of the problem in full size, counted at `size`, by default `smaller`'s.

    Counts of a tensor grow as its bytes do; those of scratch, of requests and of shared memory as x does, and
    so do requests for filters.
    """
    size = size or smaller(problem, form)
    ratio = math.prod(problem.full) / math.prod(size)
    full = problem.steps(problem.full, Make(form, "meta"))
    found = {}
    for direction, step in scaled(problem, form, size).items():
        whole = full[direction]
        pairs = zip((*step.reads, *step.writes), (*whole.reads, *whole.writes), strict=True)
        grown = {t.data_ptr(): large.nbytes / t.nbytes for t, large in pairs}
        often = {t.data_ptr() for t in step.filters}
        first, *others = (_scaled(launch, grown, often, ratio) for launch in profiles(step))
        # A second launch adds up what the first has multiplied.
        found[direction] = (replace(first, multiplies=whole.multiplies), *others)
    return found


def _scaled(launch: Profile, grown: dict[int, float], often: set[int], ratio: float) -> Counted:
    sides = []
    for t in launch.tensors:
        by = grown.get(t.address, ratio)
        through = t.requested if t.writes else t.block_sectors
        l2 = SECTOR * through * (ratio if t.address in often else by)
        sides.append(Side(t.address, t.writes, l2, SECTOR * t.sectors * by, t.bytes * by))
    return Counted(
        launch.launch.kernel.entry,
        SECTOR * launch.global_sectors * ratio,
        launch.shared_wavefronts * ratio,
        tuple(sides),
    )


# ---- beside the least traffic ----------------------------------------------------------------------------


class Ratios(NamedTuple):
    """What one direction moves. The first three are multiples of its least traffic."""

    memory: float
    """Different sectors of each launch, over all launches: two passes over a tensor count it twice."""
    l2: float
    """Sectors that pass between L1 and L2."""
    l1: float
    """Sectors that requests touch."""
    coalesced: float
    """Those again, as a multiple of the fewest that hold as many bytes."""
    conflicts: float
    """Cycles that shared memory loses to bank conflicts, by those that memory takes for the least traffic."""
    shared: float
    """All cycles of shared memory, by the same."""


CYCLES_A_SECTOR = 2.5
"""Of a multiprocessor's clock: 132 of them at 1.755 GHz share 3 TB/s."""


def ratios(step: Step, launches: list[Profile]) -> Ratios:
    """Of the profiles of `step`."""
    of_global = [t for launch in launches for t in launch.traffic if not t.shared]
    touched, least = sum(t.units for t in of_global), step.least / SECTOR
    return Ratios(
        memory=sum(launch.memory_sectors for launch in launches) / least,
        l2=sum(launch.l2_sectors for launch in launches) / least,
        l1=touched / least,
        coalesced=touched / sum(t.least for t in of_global),
        conflicts=sum(launch.bank_conflicts for launch in launches) / (CYCLES_A_SECTOR * least),
        shared=sum(launch.shared_wavefronts for launch in launches) / (CYCLES_A_SECTOR * least),
    )


def main(words: Sequence[str]) -> int:
    """Print the ratios of all problems whose id holds one of `words`, or of all."""
    known = [problem_of(c) for cases in SUITES.values() for c in cases if has_problem(c)]
    for problem in (*known, *OTHERS):
        if words and not any(word in problem.id for word in words):
            continue
        for form in FORMS:
            size = smaller(problem, form)
            for direction, step in scaled(problem, form, size).items():
                launches = profiles(step)
                values = " ".join(
                    f"{k} {v:.2f}" for k, v in ratios(step, launches)._asdict().items()
                )
                where = (
                    f"{problem.id:<34} {form!s:<24} {'x'.join(map(str, size)):<16} {direction:<3}"
                )
                print(f"{where} {values} in {len(launches)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
