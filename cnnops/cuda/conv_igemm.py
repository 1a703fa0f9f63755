"""Convolution on tensor cores by mma.sync, all three passes: `kernels/conv_igemm.cu` explains the arithmetic.

What this file decides, once a problem, beyond what `implicit_gemm` says of it: tile and number of parts of a
long sum, by arithmetic (`_cycles`), or as the tables of `cnnops.tune` say (`variants`). Dense planes have
a form of their own, `conv_igemm_planes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cnnops import tuned
from cnnops.cuda import conv_igemm_planes as planes
from cnnops.cuda import conv_igemm_sm90 as sm90
from cnnops.cuda.batch_norm import batch_norm_stats
from cnnops.cuda.implicit_gemm import (
    SMS,
    Forced,
    Key,
    Operands,
    Plan,
    Problem,
    beyond,
    key_of_call,
    named,
    operands,
    plan_of,
    run,
    stored,
    tuned_variant,
    variant_name,
    worth_measuring,
)
from cnnops.cuda.kernel import FastDiv
from cnnops.epilogue import NO_EPILOGUE, Epilogue
from cnnops.shapes import Axes, ConvShape, NormShape, PoolShape

SOURCE = "conv_igemm.cu"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""float32 is multiplied as TF32: the registry asks whether torch lets it be."""

FEWEST_CHANNELS = 4
"""Of a group, on its larger side: below, a tile's eight columns and a sum's sixteen steps are mostly empty,
and conv_direct.cu's thin form, which reads each channel once, is bound by memory already.
"""

STEP_BYTES = 64
"""What a tile holds of a row's steps: two to four times what one mma multiplies."""


@dataclass(frozen=True)
class Tile:
    """A block's share of the product: block_m x block_n results of warps_m x warps_n warps, with `groups`
    groups side by side in block_n; `stages` of the operands on their way; registers are budgeted for
    `resident` blocks.
    """

    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    stages: int
    resident: int
    groups: int = 1

    def __str__(self) -> str:
        sides = f"{self.block_m}x{self.block_n}"
        return (
            f"{sides}x{self.stages}" if self.groups == 1 else f"{sides}x{self.stages}g{self.groups}"
        )

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def columns(self) -> int:
        """Those of one group."""
        return self.block_n // self.groups

    @property
    def sums(self) -> int:
        """Results of a thread."""
        return self.block_m * self.block_n // self.threads

    @property
    def stage_bytes(self) -> int:
        apart = 64 * self.groups if self.groups > 1 else 0  # between tiles of groups, at most
        return (self.groups * self.block_m + self.block_n) * STEP_BYTES + apart

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes

    def staged(self, gather: int, plain: int, itemsize: int) -> int:
        """Registers of a thread for elements that stand alone, which pass through them (see the kernel)."""
        rows, columns = (gather == 1) * self.groups * self.block_m, (plain == 1) * self.block_n
        return (rows + columns) * STEP_BYTES // itemsize // self.threads

    def together(self, registers: int) -> int:
        """Blocks that a multiprocessor has registers for, if a thread needs so many beside its results; 0
        where those are too many.
        """
        needed = -(-(self.sums + registers) // 8) * 8
        return min(self.resident, REGISTERS // (self.threads * needed)) if needed <= 256 else 0


TILES = (
    Tile(256, 128, 4, 2, stages=3, resident=1),
    Tile(128, 256, 2, 4, stages=3, resident=1),
    Tile(128, 128, 2, 2, stages=4, resident=2),
    Tile(128, 128, 4, 2, stages=3, resident=1),
    Tile(128, 64, 2, 2, stages=4, resident=3),
    Tile(64, 128, 2, 2, stages=4, resident=3),
    Tile(64, 64, 2, 2, stages=4, resident=4),
    Tile(32, 128, 1, 4, stages=4, resident=4),
    Tile(128, 32, 4, 1, stages=4, resident=4),
    Tile(32, 32, 2, 2, stages=4, resident=4),
    Tile(128, 16, 4, 1, stages=4, resident=4),
    Tile(128, 8, 4, 1, stages=4, resident=4),
    Tile(64, 128, 1, 4, stages=3, resident=2, groups=4),
    Tile(64, 64, 1, 4, stages=3, resident=3, groups=4),
    Tile(64, 32, 1, 4, stages=3, resident=4, groups=4),
)
"""Warps of 64 x 64 ask least of shared memory, tiles of 256 x 128 least of L2; the others are for results
that are too few, or too narrow, to fill those.
"""

REGISTERS = 65536
"""Of a multiprocessor."""
OTHER_REGISTERS, WGRAD_REGISTERS = 88, 116
"""Of a thread: fragments, addresses, what the loop counts, as NVRTC has it. wgrad decodes places."""

MACS = {2: 1300, 4: 650}
"""Multiply-adds of a multiprocessor in a cycle, by the size of an element: what mma.sync may reach on an
H100, some 1.27 times an A100's rate and two thirds of wgmma's. An estimate, as all that is said of time here.
"""
L2_BYTES = 28
"""What a multiprocessor gets from L2 in a cycle while all of them ask (an H100's 5.5 to 6.5 TB/s)."""
L1_BYTES = 64 * 1024
"""What L1 may keep of a block's gathered operand, beside shared memory."""
MOST_L2_BYTES = 64
"""The same, while few ask."""
LATENCY = 700
"""Cycles of a copy from L2, or from memory when it is not busy."""
WAKE = 1500
"""Cycles of a block before its first product and behind its last one: three trips to memory."""
CLOCK = 1.755e9
LAUNCH = 3e-6
BYTES_PER_S = 0.9 * 3.35e12
"""An H100's: what copies reach."""
FLOPS_PER_S = {2: 989e12, 4: 495e12}
"""Of its tensor cores, by wgmma."""


def supports(op: str, shape: ConvShape | PoolShape | NormShape, dtype: torch.dtype) -> str | None:
    """None, or why the problem is refused: see `implicit_gemm.beyond`; and groups of few channels."""
    reason = beyond(op, shape, DTYPES, dtype)
    if reason or not isinstance(shape, ConvShape):
        return reason
    if op == "conv_bgrad":
        return "not a product"
    most = max(shape.C, shape.K) // shape.groups
    if most < FEWEST_CHANNELS:
        return f"groups of {most} channels: expected at least {FEWEST_CHANNELS} on one side"
    return None


AnyTile = Tile | planes.Tile | sm90.Tile
Choice = tuple[AnyTile, int]
"""A tile, and into how many parts to split the sum."""


def _channel_run(p: Problem, o: Operands) -> int:
    """Channels that come before taps in the order of the sum, the others behind them; 0: all or none."""
    run = STEP_BYTES // p.key.dtype.itemsize
    several = p.channels > run and p.channels % run == 0 and max(p.most_taps) > 1
    return run if o.channels_fast and p.key.op != "wgrad" and several else 0


def _reuse(tile: Tile, p: Problem, o: Operands) -> float:
    """How often a block reads an element of the gathered operand, on average, so that L1 has all but one."""
    if p.key.op == "wgrad":
        return max(1.0, min(math.prod(p.most_taps), tile.block_m / p.channels))
    different, left = 1, tile.block_m
    for i in reversed(range(len(p.axes))):
        count, step = p.params.count[i].divisor, 1 if p.key.op == "dgrad" else p.axes[i].stride
        here, left = min(left, count), -(-left // count)
        different *= (here - 1) * step + (p.most_taps[i] - 1) * abs(p.params.reach[i]) + 1
    at_hand = (
        p.channels
        if o.channels_fast and not _channel_run(p, o)
        else STEP_BYTES // p.key.dtype.itemsize
    )
    if different * at_hand * p.key.dtype.itemsize * tile.groups > L1_BYTES:
        return 1.0
    return max(1.0, tile.block_m * math.prod(p.most_taps) / different)


def _cycles(choice: Choice, p: Problem, o: Operands) -> float:
    """When the busiest multiprocessor is free again.

    A stage costs what the slowest of three asks for, tensor cores, L2 and the four instructions that are
    issued in a cycle, and no less than its copies' way, which the stages of the blocks there share. Eight
    warps keep tensor cores busy. A second pass costs a launch, and the traffic of partial results.
    """
    (tile, splits), itemsize = choice, p.key.dtype.itemsize
    l2 = L2_BYTES, MOST_L2_BYTES
    if isinstance(tile, planes.Tile):
        return planes.cycles(tile, p, MACS[itemsize], l2, SMS, LATENCY, WAKE)
    if isinstance(tile, sm90.Tile):
        return sm90.cycles(tile, splits, p, l2, SMS, LATENCY, WAKE)
    batches, steps = p.groups // tile.groups * p.phases, STEP_BYTES // itemsize
    blocks = -(-o.m // tile.block_m) * -(-p.outputs // tile.columns) * batches * splits
    stages = -(-o.k // (steps * splits))
    here, warps = -(-blocks // SMS), tile.threads // 32
    together = _together(tile, p, o)
    side = min(here, together)

    results = tile.block_m * tile.block_n
    gathered, plain = tile.groups * tile.block_m * steps / o.gather, tile.block_n * steps / o.plain
    # As the compiled loops have it: addresses, borders, the copy or load and store; rounding to TF32.
    copies = gathered * (13 if o.gather == 1 else 17) + plain * (8 if o.plain == 1 else 10)
    products = results / (16 * 8) * STEP_BYTES / 32
    fragments = (tile.block_m * tile.warps_n + tile.block_n * tile.warps_m) / 16 * STEP_BYTES / 32
    issued = copies / 32 + products + fragments * (13 if itemsize == 4 else 1) + 60 * warps

    rate = min(MOST_L2_BYTES, L2_BYTES * SMS / min(blocks, SMS))
    copied = (tile.groups * tile.block_m / _reuse(tile, p, o) + tile.block_n) * STEP_BYTES
    work = max(results * steps / MACS[itemsize], copied / rate, issued / 4)
    busy = min(1.0, 0.6 + 0.05 * side * warps)
    stage = max(work / busy, LATENCY / ((tile.stages - 1) * side))
    written = results * (itemsize if splits == 1 else 4) / rate
    first = here * (stages * stage + written) + -(-here // together) * WAKE
    second = 4000 + 8 * splits * o.m * p.outputs * p.groups * p.phases / (16 * SMS)
    return first + (second if splits > 1 else 0)


def _together(tile: Tile, p: Problem, o: Operands) -> int:
    """Blocks of a multiprocessor."""
    staged = tile.staged(o.gather, o.plain, p.key.dtype.itemsize)
    return tile.together(staged + (WGRAD_REGISTERS if p.key.op == "wgrad" else OTHER_REGISTERS))


def _fits(tile: Tile, p: Problem, o: Operands) -> bool:
    """Whether packs fill the tile, groups come in its number, and registers hold what is on its way."""
    if p.groups % tile.groups or (tile.groups > 1 and (p.outputs > tile.columns or p.key.moments)):
        return False
    if not o.gather_along_steps and tile.block_m % o.gather:
        return False
    if not o.plain_along_steps and tile.columns % o.plain:
        return False
    return _together(tile, p, o) > 0


def _tiles(p: Problem, o: Operands, hopper: bool) -> list[AnyTile]:
    """Of all forms those that can compute `p`; `hopper`: whether wgmma is at hand."""
    portable = [tile for tile in TILES if _fits(tile, p, o)]
    return [*(sm90.tiles(p) if hopper else []), *planes.tiles(p, o), *portable]


def _choices(p: Problem, o: Operands, hopper: bool) -> list[Choice]:
    """Tiles and numbers of parts: those first that free the busiest multiprocessor first. Splits are tried
    that just fill the multiprocessors one to four times.
    """

    def parts(tile: AnyTile) -> list[int]:
        if isinstance(tile, planes.Tile):
            return [1]
        if isinstance(tile, sm90.Tile):
            blocks, resident = sm90.blocks(tile, p), 1
        else:
            blocks = -(-o.m // tile.block_m) * -(-p.outputs // tile.columns)
            blocks, resident = blocks * (p.groups // tile.groups) * p.phases, tile.resident
        filling = {SMS * resident * rounds // blocks for rounds in range(1, 5)}
        return [1, *sorted(s for s in filling if 1 < s <= o.most)]

    choices = [(tile, s) for tile in _tiles(p, o, hopper) for s in parts(tile)]
    return sorted(choices, key=lambda choice: _cycles(choice, p, o))


def _chosen(p: Problem, o: Operands, variant: str, hopper: bool) -> Choice:
    """The choice that `variant` names, or else the one that arithmetic prefers."""
    found: Choice | None = named(variant, _tiles(p, o, hopper), o.most) if variant else None
    return found or _choices(p, o, hopper)[0]


class Estimate(NamedTuple):
    """Seconds of a pass on an H100: by `_cycles` and the least traffic; the floor by peak rates alone."""

    variant: str
    seconds: float
    floor: float


def estimate(op: str, shape: ConvShape, *arguments: object) -> Estimate:
    """What the choice that would be made for this call should take. The tensors may be on the meta device."""
    key = key_of_call(op, shape, arguments)
    p, o = _problem(key)
    choice = _chosen(p, o, tuned_variant(key, "conv_igemm"), _hopper(arguments))
    itemsize = key.dtype.itemsize
    moved = shape.bytes_moved(key.op, itemsize) / BYTES_PER_S  # type: ignore[arg-type]
    seconds = LAUNCH + max(_cycles(choice, p, o) / CLOCK, moved)
    return Estimate(variant_name(choice), seconds, max(shape.flops / FLOPS_PER_S[itemsize], moved))


def describe(op: str, shape: ConvShape, *arguments: object) -> str:
    """The tile and the number of parts of a call, and the time that it should take."""
    found = estimate(op, shape, *arguments)
    times = " and ".join(f"{t * 1e3:.3g} ms" for t in (found.seconds, found.floor))
    return f"tile {found.variant}; predicted time and floor on an H100: {times}"


def _widths(itemsize: int) -> Sequence[int]:
    """Elements of 16, 8 and 4 bytes: what one copy into shared memory may have."""
    return tuple(size // itemsize for size in (16, 8, 4))


def _hopper(arguments: Sequence[object]) -> bool:
    """Whether a call with these arguments has wgmma at hand."""
    return sm90.multiprocessors(next(a.device for a in arguments if isinstance(a, Tensor))) > 0


def _problem(key: Key) -> tuple[Problem, Operands]:
    p = Problem(key)
    return p, operands(p, _widths(key.dtype.itemsize))


@lru_cache(None)
def _planned(sms: int) -> Callable[..., Plan]:
    """What finds the plan of a pass whose x, w and y have these strides, on a GPU with wgmma and so many
    multiprocessors, or for 0 on others.
    """

    @tuned.cached
    def plan(
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
    ) -> Plan:  # Flat, since hashed at every call.
        aligned = (x_aligned, w_aligned, y_aligned)
        key = Key(op, shape, dtype, (x, w, y), aligned, activation, moments)
        p, o = _problem(key)
        variant = tuned_variant(key, "conv_igemm") if forced is None else forced
        tile, splits = _chosen(p, o, variant, sms > 0)
        if isinstance(tile, planes.Tile):
            return planes.plan(tile, p)
        if isinstance(tile, sm90.Tile):
            return sm90.plan(tile, splits, p, sms)
        return _portable(tile, splits, p, o)

    return plan


def _portable(tile: Tile, splits: int, p: Problem, o: Operands) -> Plan:
    """The launches of conv_igemm.cu."""
    op, itemsize = p.key.op, p.key.dtype.itemsize
    result = itemsize if splits == 1 else 4
    store = stored(p, o, [size // result for size in (16, 8, 4)], splits)
    constants: dict[str, str | int] = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": STEP_BYTES // itemsize,
        "WARPS_M": tile.warps_m, "WARPS_N": tile.warps_n, "STAGES": tile.stages, "GROUPS": tile.groups,
        "RESIDENT": _together(tile, p, o),
        "CHANNELS_FAST": int(o.channels_fast), "CHANNEL_RUN": _channel_run(p, o),
        "GATHER_ALONG_STEPS": int(o.gather_along_steps), "GATHER_VECTOR": o.gather,
        "PLAIN_ALONG_STEPS": int(o.plain_along_steps), "PLAIN_VECTOR": o.plain,
        "STORE_ALONG_ROWS": int(o.store_along_rows), "STORE_VECTOR": store,
    }  # fmt: skip
    if op == "fprop":
        constants["MOMENTS"] = int(p.key.moments and splits == 1)
    column_tiles = -(-p.outputs // tile.columns)
    p.params.tiles, p.params.groups = FastDiv(column_tiles), FastDiv(p.groups // tile.groups)
    blocks = column_tiles * (p.groups // tile.groups) * p.phases * splits * -(-o.m // tile.block_m)
    return plan_of(p, SOURCE, "igemm", constants, blocks, tile.threads, splits, tile.shared_bytes)


forced = Forced()


def variants(op: str, shape: ConvShape, *arguments: object) -> tuple[str, ...]:
    """Names of the choices that are worth measuring for this call, without the one that is made anyway."""
    p, o = _problem(key_of_call(op, shape, arguments))
    return worth_measuring(_choices(p, o, _hopper(arguments)))


def _run(
    op: str,
    shape: ConvShape,
    tensors: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor],
    output: Tensor,
    bias: Tensor | None = None,
    epilogue: Epilogue | None = None,
) -> None:
    plan = _planned(sm90.multiprocessors(output.device))
    run(plan, forced, op, shape, tensors, inputs, output, bias, epilogue)


# ---- what the registry calls -----------------------------------------------------------------------------


def conv_fprop(
    shape: ConvShape,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """Fill y ``N K *output`` with the convolution of x ``N C *spatial`` and w ``K C/groups *kernel``."""
    scale, residual, activation, mean, var = epilogue or NO_EPILOGUE
    if mean is not None and var is not None and (residual is not None or activation != "none"):
        # The kernel gathers moments before these.
        sums = Epilogue(scale, residual, activation)
        _run("fprop", shape, (x, w, y), (x, w), y, bias, sums)
        batch_norm_stats(NormShape.of(shape.y_size), y, mean, var)
    else:
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
