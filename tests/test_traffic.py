"""What the memory-bound kernels move, counted by the emulator, against what the heads of their files promise.

Rows are layers of `bench/suites.py`, and their like, with fewer images and channels, and smaller planes where
these are large; the test checks that the layer's full size takes the same variant of the kernel. Of each
direction are compared

    bytes      What a warp's requests ask for, each in sectors of 32 bytes, with the tensors that the kernel
               says it reads and writes: at most 1.15 times these. A tensor that is read in two passes counts
               twice, though the second time may come from the L2 cache. What overlapping windows of pooling
               read again comes from L1: the row says how many times x and grad_y are asked for, by
               arithmetic on the windows, and tested is that they are asked for no more often.
    sectors    Those that requests touch with the fewest that hold as many bytes: at most 1.15 times.
    conflicts  Cycles of shared memory lost to bank conflicts with those that the sectors take to come from
               memory: at most 5 %.

A row with another bound gives the reason. bench/notes.md has the times on a GPU that these counts predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import needs_emulator
from cases.base import Size, laid_out, normal
from torch import Tensor

from bench.suites import SUITES
from cnnops.cuda import batch_norm, conv_fold, emulate, group_norm, pool, unpool
from cnnops.cuda.emulate import Traffic
from cnnops.cuda.launch import trace
from cnnops.shapes import ConvShape, GroupShape, LayerShape, NormShape, PoolShape, UnpoolShape

pytestmark = needs_emulator

SECTOR = 32
MOST = 1.15
"""Times the promise: the rest are partial sums, parameters, first values, and sectors not filled."""

CYCLES_A_SECTOR = 2.5
"""Of a multiprocessor's clock: 132 of them at 1.7 GHz share 3 TB/s. So long shared memory has for each."""

Form = tuple[str, torch.dtype]
FORMS: tuple[Form, ...] = tuple(
    (layout, dtype)
    for layout in ("contiguous", "channels_last")
    for dtype in (torch.float32, torch.bfloat16)
)


class Step(NamedTuple):
    """One direction: what computes it, and the bytes that the kernel says it reads and writes."""

    run: Callable[[], None]
    reads: float
    writes: float


Steps = dict[str, Step]


@dataclass(frozen=True)
class Make:
    """Tensors of one layout, dtype and device. On "meta" they have no memory: launches can but be planned."""

    layout: str
    dtype: torch.dtype
    device: str = "cpu"

    def __call__(self, size: Size, dtype: torch.dtype | None = None, fill: bool = False) -> Tensor:
        dtype = dtype or self.dtype
        if self.device == "meta" or not fill:
            return laid_out(
                size, self.layout, lambda s: torch.empty(s, dtype=dtype, device=self.device)
            )
        return laid_out(size, self.layout, normal(1, dtype))

    def vectors(self, length: int, count: int) -> list[Tensor]:
        """Parameters: as in mixed precision of the tensors' own dtype."""
        return [torch.ones(length, dtype=self.dtype, device=self.device) for _ in range(count)]

    def statistics(self, *size: int) -> list[Tensor]:
        return [torch.ones(size, device=self.device) for _ in range(2)]


def moved(*tensors: Tensor) -> int:
    """Bytes of all of these."""
    return sum(t.numel() * t.element_size() for t in tensors)


def pooling(op: str, shape: PoolShape, again: tuple[float, float], make: Make) -> Steps:
    x, y = make(shape.x_size, fill=True), make(shape.y_size)
    grad_y, grad_x = make(shape.y_size, fill=True), make(shape.x_size)
    forward, backward = again[0] * moved(x), again[1] * moved(grad_y)
    if op == "avg":
        return {
            "fwd": Step(lambda: pool.avg_pool_fwd(shape, x, y), forward, moved(y)),
            "bwd": Step(lambda: pool.avg_pool_bwd(shape, grad_y, grad_x), backward, moved(grad_x)),
        }
    offsets = make(shape.y_size, torch.uint8)
    return {
        "fwd": Step(lambda: pool.max_pool_fwd(shape, x, y, offsets), forward, moved(y, offsets)),
        "bwd": Step(
            lambda: pool.max_pool_bwd(shape, grad_y, offsets, grad_x),
            again[1] * moved(grad_y, offsets), moved(grad_x),
        ),
    }  # fmt: skip


def batch_normed(size: Size, training: bool, residual: bool, activation: str, make: Make) -> Steps:
    """Backward, y stands in for the residual that was added before an activation."""
    shape, acts = NormShape.of(size), activation != "none"
    x, y, grad_y, grad_x = make(size, fill=True), make(size), make(size, fill=True), make(size)
    beside = make(size, fill=True) if residual else None
    grad_residual = make(size) if residual and acts else None
    weight, bias, mean, var, grad_weight, grad_bias = make.vectors(size[1], 6)
    saved = make.statistics(size[1])
    X, passes = moved(x), 2 if training else 1
    # With running statistics grad_x asks for x where it tells the activation's derivative only.
    backward = passes * X * (1 + (training or (acts and not residual)) + (residual and acts))

    def fwd() -> None:
        tensors = (shape, x, weight, bias, beside, mean, var)
        if training:
            batch_norm.batch_norm_train(*tensors, 0.1, 1e-5, activation, y, *saved)
        else:
            batch_norm.batch_norm_infer(*tensors, 1e-5, activation, y)

    def bwd() -> None:
        batch_norm.batch_norm_bwd(
            shape, grad_y, x, weight, bias, None, beside if acts else None, *saved, activation, training,
            grad_x, grad_weight if training else None, grad_bias if training else None, grad_residual,
        )  # fmt: skip

    return {
        "fwd": Step(fwd, X * (passes + residual), X),
        "bwd": Step(bwd, backward, X * (1 + (residual and acts))),
    }


def group_normed(size: Size, groups: int, passes: tuple[int, int], make: Make) -> Steps:
    """`passes` over the tensors that are read, forward and backward."""
    shape = GroupShape.of(size, groups)
    x, y, grad_y, grad_x = make(size, fill=True), make(size), make(size, fill=True), make(size)
    weight, bias, grad_weight, grad_bias = make.vectors(size[1], 4)
    saved, grads = make.statistics(size[0], groups), (grad_x, grad_weight, grad_bias)

    def fwd() -> None:
        group_norm.group_norm_fwd(shape, x, weight, bias, 1e-5, "none", y, *saved)

    def bwd() -> None:
        group_norm.group_norm_bwd(shape, grad_y, x, weight, bias, *saved, "none", *grads)

    return {
        "fwd": Step(fwd, passes[0] * moved(x), moved(y)),
        "bwd": Step(bwd, passes[1] * moved(grad_y, x), moved(grad_x)),
    }


def layer_normed(size: Size, make: Make) -> Steps:
    """Over C of ``N C H W``. What lies in channels-last are rows; else x has its rows beside each other, as a
    convolution's contiguous result has them, and everything else contiguous ones."""
    rows = (size[0], *size[2:], size[1])
    shape, dense = LayerShape.of(rows, size[1:2]), replace(make, layout="contiguous")
    x = make(size, fill=True).movedim(1, -1)
    y, grad_y, grad_x = dense(rows), dense(rows, fill=True), dense(rows)
    weight, bias, grad_weight, grad_bias = make.vectors(size[1], 4)
    saved, grads = make.statistics(*shape.outer), (grad_x, grad_weight, grad_bias)
    return {
        "fwd": Step(
            lambda: group_norm.layer_norm_fwd(shape, x, weight, bias, 1e-5, y, *saved), moved(x), moved(y)
        ),
        "bwd": Step(
            lambda: group_norm.layer_norm_bwd(shape, grad_y, x, weight, *saved, *grads),
            moved(grad_y, x), moved(grad_x),
        ),
    }  # fmt: skip


def unpooled(size: Size, scans: float, make: Make) -> Steps:
    """At the indices of 2 x 2 pooling, which forward reads so many times."""
    output = tuple(2 * n for n in size[2:])
    shape = UnpoolShape.of(size, size, output)
    x, y, indices = make(size, fill=True), make(shape.y_size), make(size, torch.int64)
    grad_y, grad_x = make(shape.y_size, fill=True), make(size)
    if make.device != "meta":
        indices.copy_(
            F.max_pool2d(normal(2, torch.float32)(shape.y_size), 2, return_indices=True)[1]
        )
    return {
        "fwd": Step(
            lambda: unpool.max_unpool_fwd(shape, x, indices, y), moved(x) + scans * moved(indices), moved(y)
        ),
        # Of grad_y what the indices name: a quarter.
        "bwd": Step(
            lambda: unpool.max_unpool_bwd(shape, grad_y, indices, grad_x),
            moved(grad_y) / 4 + moved(indices), moved(grad_x),
        ),
    }  # fmt: skip


def folded(size: Size, mode: str, make: Make) -> Steps:
    shape = ConvShape.of(size, (1, size[1], 3, 3), padding=1, padding_mode=mode)
    padded, grad_x = make(shape.padded.x_size, fill=True), make(size)
    return {
        "bwd": Step(
            lambda: conv_fold.conv_fold(shape, padded, grad_x), moved(padded), moved(grad_x)
        )
    }


@dataclass(frozen=True)
class Bound:
    """How far a row may be from its promise, and why, if not by the usual bounds."""

    why: str = ""
    bytes: float = MOST
    sectors: float = MOST
    conflicts: float = 0.05
    minor: bool = False
    """The reason concerns lines that ask for less than a tenth of all bytes: others keep the usual bound."""


USUAL = Bound()
# What is asked for again is at hand in L1: these cost requests, not memory's time.
STRIDED = Bound(
    "packs of 16 bytes lie 32 apart: two requests ask for the halves of a sector", sectors=2
)
FAR_PACKS = Bound("neighbouring lanes' packs are a stride of 11 columns or more apart", sectors=4)
ODD_PLANES = Bound("planes of 49 values: most runs of a warp begin within a sector", sectors=1.8)
NARROW = Bound("8 lanes share a window: 16 bytes of bf16 a request and plane", sectors=2.9)
VECTORS = Bound(
    "each value of a slot's parameters and statistics is a load of its own", 1.27, 2.5, minor=True
)
TILE_LINES = Bound("few packs a thread beside a load of its own for each line's statistics", 1.21)
GATHERED = Bound("maxima lie on two rows of y, at random", sectors=1.75, conflicts=0.1)
PADDED_ROWS = Bound("rows begin off alignment, and each is a run of its own", 1.2, 2.1)
MERGED = Bound(
    "rows of lanes are merged through scratch whose lanes are 16 or 32 bytes apart", conflicts=0.17
)
# These cost more than that.
ODD_ROWS = Bound("a thread writes, or backward reads, its 4 to 8 values of an odd row of y one by one: each "
    "sector of y is touched as many times", sectors=7.6)  # fmt: skip
UNEVEN_ROWS = Bound("as of odd rows, in packs of two", sectors=3.5)
UNASKED = Bound(
    "one kernel does all of backward: it sums grad_y and x though nobody asks for sums", 2.2, 1.8
)
SMALL_TILES = Bound(
    "packs of 8 channels leave 2 to 4 a thread: partial sums are 9 % of x, statistics are loaded line by "
    "line, and scratch is in strides of 24 values",
    1.53, 1.4, 0.28, minor=True,
)  # fmt: skip
COLUMNS = Bound(
    "each warp asks for weight and bias of its few rows' values; backward the sums over rows go through "
    "scratch in strides of a pack",
    1.33, conflicts=0.5,
)  # fmt: skip
TURNED = Bound(
    "as COLUMNS, and turning over writes lines 36 words apart, 4 to a bank", 1.33, conflicts=1.05
)


@dataclass(frozen=True)
class Row:
    """A layer of size `full`, counted with the sizes `x`, contiguous, and `last`, channels-last (None: not at
    all), within the bounds `of_x` and `of_last`."""

    id: str
    full: Size
    x: Size | None
    last: Size | None
    steps: Callable[[Size, Make], Steps]
    of_x: Bound = USUAL
    of_last: Bound = USUAL
    forms: tuple[Form, ...] = FORMS


def layer(
    suite: str, name: str, x: Size | None, last: Size | None = None, again: tuple[float, float] = (1, 1),
    of_x: Bound = USUAL, of_last: Bound = USUAL,
) -> Row:  # fmt: skip
    """A row of `bench/suites.py`. `again`: how often pooling asks for x forward, and for grad_y backward."""
    (case,) = (case for case in SUITES[suite] if case.name == name)
    options = dict(case.options)
    activation = "none" if case.op == "batch_norm" else options.get("activation", "relu")

    def steps(size: Size, make: Make) -> Steps:
        if case.kind == "norm":
            training, residual = options.get("training", False), options.get("residual", False)
            return batch_normed(size, training, residual, activation, make)
        shape = replace(case, x=size).shape
        assert isinstance(shape, PoolShape)
        return pooling("max" if case.op.startswith("max") else "avg", shape, again, make)

    return Row(f"{suite}/{name}", case.x, x, last, steps, of_x, of_last)


# Of overlapping windows: the windows over each row of x, times the columns that a tile loads for each that it
# owns; the most of all forms.
ROWS = (
    layer("resnet50", "maxpool", (1, 4, 112, 112), (1, 64, 28, 28), (2.25, 4), STRIDED),
    layer("resnet50", "avgpool", (2, 64, 7, 7), (2, 256, 7, 7), (1, 49), NARROW, MERGED),
    layer("mobilenetv2", "avgpool", (2, 40, 7, 7), (1, 256, 7, 7), (1, 49), NARROW, MERGED),
    layer("kernelbench", "41_max_pool1d", (1, 8, 4096), None, (7, 6.25), ODD_ROWS),
    layer("kernelbench", "42_max_pool2d", (1, 1, 128, 128), None, (12, 5.5), ODD_ROWS),
    layer("kernelbench", "43_max_pool3d", (1, 1, 32, 32, 32), None, (4.5, 36), UNEVEN_ROWS),
    layer("kernelbench", "44_avg_pool1d", (1, 8, 4096), None, (3, 2.75), ODD_ROWS),
    layer("kernelbench", "45_avg_pool2d", (1, 1, 288, 288), None, (1, 36), FAR_PACKS),
    layer("kernelbench", "46_avg_pool3d", (1, 1, 32, 32, 64), None, (3.375, 12), STRIDED),
    layer("sweep_pool", "avg_overlapping_K3", (1, 4, 112, 112), None, (6, 4), UNEVEN_ROWS),
    layer("sweep_pool", "avg_overlapping_K3", None, (1, 64, 28, 28), (9, 9)),
    layer("resnet50", "bn1", (3, 4, 112, 112), (6, 64, 28, 28), of_last=VECTORS),
    layer("resnet50", "layer1.0.bn1", (12, 4, 56, 56), (6, 64, 28, 28), of_last=VECTORS),
    layer("resnet50", "layer1.0.bn3", (12, 4, 56, 56), (11, 256, 14, 14), of_last=VECTORS),
    layer("resnet50", "layer4.0.bn3", (32, 16, 7, 7), (32, 64, 7, 7), of_x=ODD_PLANES),
    layer("mobilenetv2", "stage2.0.project.bn", (12, 4, 56, 56), (6, 24, 28, 28), of_last=VECTORS),
    layer("mobilenetv2", "stage6.1.expand.bn", (32, 16, 7, 7), (32, 64, 7, 7), of_x=ODD_PLANES),
    layer("kernelbench", "33_batch_norm", (3, 2, 128, 128), None),
    layer("sweep_norm", "eval", (12, 4, 56, 56), (11, 256, 14, 14), of_last=VECTORS),
    layer("sweep_norm", "eval_add_relu", (12, 4, 56, 56), (11, 256, 14, 14), of_last=VECTORS),
    Row("batch_norm/2048@7", (32, 2048, 7, 7), (32, 16, 7, 7), (32, 64, 7, 7),
        lambda size, make: batch_normed(size, False, False, "none", make), UNASKED, UNASKED),
    Row("group_norm/256@28", (8, 256, 28, 28), (1, 64, 28, 28), (1, 64, 28, 28),
        lambda size, make: group_normed(size, size[1] // 8, (1, 2), make), TILE_LINES, TILE_LINES, FORMS[:3]),
    Row("group_norm/256@28", (8, 256, 28, 28), None, (1, 64, 28, 28),
        lambda size, make: group_normed(size, size[1] // 8, (2, 2), make), USUAL, SMALL_TILES, FORMS[3:]),
    Row("group_norm/64@112", (8, 64, 112, 112), (1, 16, 112, 112), (1, 64, 56, 56),
        lambda size, make: group_normed(size, size[1] // 8, (2, 2), make), USUAL, SMALL_TILES),
    Row("instance_norm/64@56", (8, 64, 56, 56), (1, 16, 56, 56), None,
        lambda size, make: group_normed(size, size[1], (1, 1), make)),
    Row("layer_norm/96@56", (8, 96, 56, 56), (1, 96, 28, 28), (1, 96, 28, 28), layer_normed, TURNED, COLUMNS),
    Row("unpool/64@56", (32, 64, 56, 56), (1, 4, 56, 56), (1, 32, 56, 56),
        lambda size, make: unpooled(size, 2.5, make), GATHERED, GATHERED),
    Row("unpool/64@28", (32, 64, 28, 28), (1, 8, 28, 28), None,
        lambda size, make: unpooled(size, 1, make), GATHERED),
    Row("unpool/64@28", (32, 64, 28, 28), None, (1, 32, 28, 28),
        lambda size, make: unpooled(size, 2.5, make), USUAL, GATHERED),
    Row("fold/64@56", (32, 64, 56, 56), (1, 8, 56, 56), (1, 64, 28, 28),
        lambda size, make: folded(size, "reflect", make), PADDED_ROWS),
)  # fmt: skip

CASES = [
    pytest.param(
        row, layout, dtype, size, id=f"{row.id}-{layout}-{str(dtype).removeprefix('torch.')}"
    )
    for row in ROWS
    for layout, dtype in row.forms
    if (size := row.x if layout == "contiguous" else row.last) is not None
]


PLANS = (pool._plan, unpool._forward, group_norm._bwd_plan)
THREADS = ((pool, "FULL_GPU"), (unpool, "BLOCKS"), (group_norm, "WALKERS"))
"""What launchers keep busy of a GPU."""


@pytest.fixture
def scaled(row: Row, size: Size, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes the GPU as much smaller as the row."""

    def forget() -> None:
        for plan in PLANS:
            plan.cache_clear()

    def scale() -> None:
        for module, name in THREADS:
            threads = getattr(module, name) * math.prod(size) // math.prod(row.full)
            monkeypatch.setattr(module, name, max(threads, 1))
        forget()

    yield scale
    forget()


def variants(step: Step) -> list[tuple[str, dict[str, str | int]]]:
    """Entries and constants of its launches, but for the width of addresses."""
    with trace(run=False) as launches:
        step.run()
    return [
        (plan.kernel.entry, {k: v for k, v in plan.kernel.constants if k != "INDEX"})
        for plan in launches
    ]


def worst(lines: Iterable[Traffic]) -> str:
    """The line of a kernel that moves most beyond what its bytes would fill."""
    t = max(lines, key=lambda t: (t.units - t.least, t.units))
    return f"{t.place} ({t.kind}): {t.units} in {t.requests} requests, {t.least} at best"


@pytest.mark.parametrize(("row", "layout", "dtype", "size"), CASES)
def test_traffic(
    row: Row, layout: str, dtype: torch.dtype, size: Size, scaled: Callable[[], None]
) -> None:
    bound = row.of_x if layout == "contiguous" else row.of_last
    full = {
        name: variants(step)
        for name, step in row.steps(row.full, Make(layout, dtype, "meta")).items()
    }
    scaled()
    for name, step in row.steps(size, Make(layout, dtype)).items():
        assert variants(step) == full[name], f"{name}: {size} takes another variant than {row.full}"
        with emulate.schedule("forward"), emulate.profile() as launches:
            step.run()
        lines = [t for launch in launches for t in launch.traffic]
        of_global = [t for t in lines if not t.shared]
        least, sectors = sum(t.least for t in of_global), sum(t.units for t in of_global)

        promise = step.reads + step.writes
        ratio = SECTOR * least / promise
        largest = max(of_global, key=lambda t: t.least)
        assert ratio <= bound.bytes, (
            f"{name}: {SECTOR * least} bytes are asked for, {ratio:.2f} times the {promise:.0f} promised; "
            f"the most by {largest.place} ({largest.kind}): {SECTOR * largest.least}. {bound.why}"
        )
        assert sectors <= bound.sectors * least, (
            f"{name}: {sectors / least:.2f} of the sectors that the same bytes would fill; worst is "
            f"{worst(of_global)}"
        )
        major = [t for t in of_global if t.least >= least / 10]
        assert not bound.minor or major and all(t.units <= MOST * t.least for t in major), (
            f"{name}: {worst(major)}"
        )
        conflicts = sum(launch.bank_conflicts for launch in launches)
        assert conflicts <= bound.conflicts * CYCLES_A_SECTOR * sectors, (
            f"{name}: {conflicts} cycles of bank conflicts beside {sectors} sectors; worst is "
            f"{worst(t for t in lines if t.shared)}"
        )
