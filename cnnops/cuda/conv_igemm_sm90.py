"""The form of `conv_igemm` for Hopper, channels-last: `kernels/conv_igemm_sm90.cu` explains the arithmetic.

Which problems it takes (`tiles`), the tensor maps that its copies go by (`_Operands`), how long each tile
should take (`cycles`), and the launches (`plan`): filters whose channels are not contiguous are packed first,
and a sum in parts is added up behind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from cnnops.cuda.implicit_gemm import (
    Axis,
    Params,
    Plan,
    Problem,
    plan_of,
)
from cnnops.cuda.kernel import ELEMENT, INT32_MAX, FastDiv, launch_of
from cnnops.cuda.target import target_of
from cnnops.cuda.tensor_map import Swizzle, TensorMap, im2col, tiled

SOURCE = "conv_igemm_sm90.cu"
ARCHITECTURES = {
    "conv_fprop_sm90": ("90a",), "conv_dgrad_sm90": ("90a",), "conv_wgrad_sm90": ("90a",),
    "conv_pack_sm90": ("90a",),
}  # fmt: skip

LINE_BYTES = 128
"""Steps of a stage, as bytes: what a swizzle's line holds at most."""
PLACES = 64
"""Steps of a stage of wgrad."""
PANEL = 64
"""Columns that lie side by side where the plain operand, or the result, is copied by lines of columns."""
MOST_SHARED = 224 * 1024
"""Of a block's 227 KB; the rest is for mbarriers and the table of rows, and begins where a swizzle does."""
MOST_STAGES = 8
THREADS, CONSUMERS = 384, 256
PACK_THREADS = 256
FEWEST_CHANNELS = 16
"""Of a group, on either side: fewer leave lines and columns empty."""

MACS = {2: 2048, 4: 1024}
"""Multiply-adds of a multiprocessor in a cycle by wgmma, by the size of an element: an H100's 989 and 495
TFLOP/s at its boost clock, over 132 multiprocessors.
"""


ISSUED = {2: 200, 4: 320}
"""Cycles that the eight warps' instructions of a stage take to issue: some 100 each, 160 with TF32's
fragments.
"""


@dataclass(frozen=True)
class Tile:
    """A block's share of the product, block_m x block_n results, of which two warpgroups have half the rows.
    The blocks of a `cluster` share the plain operand.
    """

    block_m: int
    block_n: int
    cluster: int = 1

    groups = 1

    def __str__(self) -> str:
        sides = f"wgmma{self.block_m}x{self.block_n}"
        return sides if self.cluster == 1 else f"{sides}c{self.cluster}"

    @property
    def stage_bytes(self) -> int:
        """What a stage holds: of every row and column `LINE_BYTES` of the sum, PLACES halves or as many."""
        return (self.block_m + self.block_n) * LINE_BYTES

    @property
    def copied_bytes(self) -> float:
        """What L2 is asked for it, by each block of a cluster."""
        return (self.block_m + self.block_n / self.cluster) * LINE_BYTES


TILES = tuple(
    Tile(*sides)
    for sides in (
        (128, 256), (256, 128), (128, 192), (256, 96), (128, 128), (256, 64), (128, 64), (256, 32), (128, 32),
        (256, 16), (128, 16), (128, 256, 2), (256, 128, 2), (128, 192, 2), (128, 128, 2),
    )
)  # fmt: skip
"""Sums are at most 128 registers of a thread. 128 x 256 and 256 x 128 ask least of L2, less still in pairs;
the others are for results that are narrow, or too few.
"""


def multiprocessors(device: torch.device) -> int:
    """Those of an H100 or H200, or of what stands for one; 0 of any other GPU, where the kernel may not be
    chosen.
    """
    target = target_of(device)
    return target.multiprocessors if target.capability == (9, 0) else 0


class Stage(NamedTuple):
    """A stage of a tile in a half type: cycles of wgmma, bytes from L2 (what a cluster shares counts once),
    and how many stages there are beside results.
    """

    products: float
    bytes: float
    stages: int


def stage_of(tile: Tile) -> Stage:
    """Of `tile` in a half type whose results TMA stores."""
    products = tile.block_m * tile.block_n * (LINE_BYTES // 2) / MACS[2]
    return Stage(products, tile.copied_bytes, _ring(tile, 2 * tile.block_m * tile.block_n))


def _ring(tile: Tile, results: int) -> int:
    """Stages that shared memory has room for beside so many bytes of results."""
    return min(MOST_STAGES, (MOST_SHARED - results) // tile.stage_bytes)


# ---- operands --------------------------------------------------------------------------------------------


def _swizzle(line: int) -> Swizzle:
    return {128: Swizzle.B128, 64: Swizzle.B64, 32: Swizzle.B32}[line]


def _strides(sizes: list[int], strides: list[int], itemsize: int) -> list[int]:
    """In bytes; of an axis of one element, whose stride is anything, what it would be if dense."""
    found, dense = [], sizes[0] * itemsize
    for size, stride in zip(sizes[1:], strides, strict=True):
        found.append(stride * itemsize if size > 1 else -(-dense // 16) * 16)
        dense = found[-1] * size
    return found


class _Operands:
    """How a problem's tensors are copied. Raises RuntimeError where TMA cannot do it."""

    def __init__(self, p: Problem) -> None:
        self.p, self.op, key = p, p.key.op, p.key
        self.itemsize = key.dtype.itemsize
        self.fp32 = self.itemsize == 4
        source, result, filter_ = p.params.source, p.params.result, p.params.filter
        axes = range(len(p.axes))

        def expected(what: str, holds: bool) -> None:
            if not holds:
                raise RuntimeError(f"expected {what}")

        expected("two of fprop, dgrad, wgrad for fp32", not (self.fp32 and self.op == "wgrad"))
        expected("padding by zeros", key.shape.padding_mode == "zeros" or not _padded(p.axes))
        least = FEWEST_CHANNELS
        expected(f"{least} channels", min(p.channels, p.outputs) >= least)
        expected("channels by eights", p.channels % 8 == p.outputs % 8 == 0)
        expected("channels side by side", source.channel == result.channel == 1)
        expected("tensors that begin on 16 bytes", p.source.aligned and p.result.aligned)

        # Channels of a copied line: of those that waste least the widest. Of groups none may reach into the
        # next.
        widths = [width // self.itemsize for width in (128, 64, 32)]
        if p.groups > 1 and self.op != "wgrad":
            widths = [width for width in widths if p.channels % width == 0]
            expected("groups of whole lines", bool(widths))
        self.chunk = min(widths, key=lambda width: -(-p.channels // width) * width)
        self.taps = math.prod(a.taps for a in p.axes)

        # The filters as rows x taps x channels.
        taps_run = [
            filter_.tap[a] == p.params.taps[a + 1] * filter_.tap[a + 1] for a in axes[:-1] if self.taps > 1
        ]  # fmt: skip
        rows_of = {"fprop": filter_.row, "dgrad": filter_.channel}.get(self.op, 0)
        lies = {"fprop": filter_.channel, "dgrad": filter_.row}.get(self.op, 1)
        self.filter_row, self.filter_tap = rows_of, filter_.tap[axes[-1]]
        evenly = all(
            stride % 8 == 0 for stride in (rows_of, self.filter_tap if self.taps > 1 else 0)
        )
        whole = (
            p.groups == 1
            or filter_.group == (p.outputs if self.op == "fprop" else p.channels) * rows_of
        )
        as_is = p.filter.aligned and lies == 1 and all(taps_run) and evenly and whole
        self.packed = self.op != "wgrad" and (self.fp32 or not as_is)
        self.words = p.groups * p.outputs * self.taps * p.channels
        expected("filters of fewer than 2^31 elements", self.words <= INT32_MAX)

        # Whether places lie evenly: those of the source, so that a plain map does; those of the result, for
        # TMA.
        def even(strides: list[int], batch: int) -> bool:
            counts = [p.params.count[a].divisor for a in axes]
            dense = [math.prod(counts[a + 1 :]) * strides[-1] for a in axes]
            batch_even = key.shape.N == 1 or batch == counts[0] * dense[0]
            return batch_even and all(
                s == d or n == 1 for s, d, n in zip(strides, dense, counts, strict=True)
            )

        self.pointwise = all(a.pointwise for a in p.axes) and even(
            [source.axis[a] for a in axes], source.batch
        )
        self.even_result = (
            self.op != "wgrad" and p.phases == 1 and even([result.axis[a] for a in axes], result.batch)
        )  # fmt: skip
        self.lowest = [
            (a.pad[0] - (a.taps - 1) * a.dilation) // a.stride if self.op == "dgrad" else -a.pad[0]
            for a in p.axes
        ]
        self.maps(TILES[0], parts=1)  # what they refuse does not depend on the tile

    def _places(self, gathered: bool, channels: int, swizzle: Swizzle, pixels: int) -> TensorMap:
        """A map of the gathered tensor, or of the tensor of places (wgrad), for columns of places."""
        p = self.p
        view = p.params.source if gathered else p.params.result
        name = {"fprop": "x", "dgrad": "grad_y"}.get(self.op, "x" if gathered else "grad_y")
        total = (p.channels if gathered else p.outputs) * p.groups
        counts = [p.params.count[i].divisor for i in range(len(p.axes))]
        if gathered and self.pointwise:
            places = [total, p.places]
            strides = _strides(places, [view.axis[len(p.axes) - 1]], self.itemsize)
            return tiled(name, p.key.dtype, places, strides, (channels, pixels), swizzle=swizzle)
        if gathered:
            sizes, lowest = list(p.params.size[: len(p.axes)]), self.lowest
            steps = [1 if self.op == "dgrad" else a.stride for a in p.axes]
        else:
            sizes, lowest, steps = counts, [0] * len(counts), [1] * len(counts)
        upper = [
            low + (count - 1) * step - (size - 1)
            for low, count, step, size in zip(lowest, counts, steps, sizes, strict=True)
        ]
        dims = [total, *reversed(sizes), p.key.shape.N]
        strides = _strides(dims, [*reversed(view.axis[: len(p.axes)]), view.batch], self.itemsize)
        if gathered:
            for a, low, step in zip(p.axes, lowest, steps, strict=True):
                furthest = max(abs(a.dilation) * a.taps + a.stride, step)
                limit = {1: 65535, 2: 255, 3: 31}[len(p.axes)]
                if furthest > limit or low < -(2**15):
                    raise RuntimeError(f"expected taps within {limit}, got {furthest}")
        return im2col(
            name, p.key.dtype, dims, strides, lowest[::-1], upper[::-1], channels, pixels,
            (1, *reversed(steps), 1), swizzle,
        )  # fmt: skip

    def maps(self, tile: Tile, parts: int) -> tuple[TensorMap, ...]:
        """In the order of the entry's parameters."""
        p, dtype, item = self.p, self.p.key.dtype, self.itemsize
        line = self.chunk * item
        panel = math.gcd(tile.block_n, PANEL)
        if self.op == "wgrad":
            plain = self._places(False, panel, _swizzle(panel * item), PLACES)
            return plain, self._places(True, self.chunk, _swizzle(line), PLACES)
        gathered = self._places(True, self.chunk, _swizzle(line), tile.block_m)
        if self.packed:
            sizes = [p.channels, self.taps, p.outputs * p.groups]
            strides = _strides(sizes, [p.channels, self.taps * p.channels], item)
            plain = tiled(
                "packed",
                dtype,
                sizes,
                strides,
                (self.chunk, 1, tile.block_n // tile.cluster),
                swizzle=_swizzle(line),
            )
        else:
            rows, channels = p.outputs, p.channels
            if self.op == "dgrad":
                rows, channels = channels, rows
            sizes = [channels, self.taps, rows * p.groups]
            strides = _strides(sizes, [self.filter_tap, self.filter_row], item)
            box, across = (self.chunk, 1, tile.block_n // tile.cluster), line
            if self.op == "dgrad":
                box, across = (panel, 1, self.chunk), panel * item
            plain = tiled("w", dtype, sizes, strides, box, swizzle=_swizzle(across))
        if not self.stores_tiles(parts):
            return gathered, plain
        sizes = [p.outputs, p.groups, p.places]
        place = p.params.result.axis[len(p.axes) - 1]
        strides = _strides(sizes, [p.outputs, place], item)
        output = {"fprop": "y", "dgrad": "grad_x"}[self.op]
        panel = math.gcd(tile.block_n, LINE_BYTES // item)
        out = tiled(
            output,
            dtype,
            sizes,
            strides,
            (panel, 1, tile.block_m // 2),
            swizzle=_swizzle(panel * item),
        )
        return gathered, plain, out

    def stores_tiles(self, parts: int) -> bool:
        return self.even_result and parts == 1

    def _results(self, tile: Tile, parts: int) -> int:
        """Bytes of a block's results in shared memory."""
        return tile.block_m * tile.block_n * self.itemsize if self.stores_tiles(parts) else 0

    def stages(self, tile: Tile, parts: int) -> int:
        """Of the ring."""
        return _ring(tile, self._results(tile, parts))

    def shared_bytes(self, tile: Tile, parts: int) -> int:
        return self.stages(tile, parts) * tile.stage_bytes + self._results(tile, parts)

    def fits(self, tile: Tile) -> bool:
        """Whether at least half of its columns have something to do, and it leaves room for a ring."""
        useful = tile.block_n == 16 or tile.block_n < 2 * -(-self.p.outputs // 16) * 16
        if tile.cluster > 1:
            useful = useful and not self.fp32 and self.rows > tile.block_m
        return useful and self.stages(tile, 1) >= 2

    @property
    def rows(self) -> int:
        if self.op != "wgrad":
            return self.p.places
        return -(-self.p.channels // self.chunk) * self.chunk * self.taps

    @property
    def stages_of_sum(self) -> int:
        """Of a tile (dgrad: on average over phases, which have different taps)."""
        if self.op == "wgrad":
            return -(-self.p.places // PLACES)
        units = -(-(-(-self.p.channels // self.chunk) * self.taps) // self.p.phases)
        return -(-units * self.chunk // (LINE_BYTES // self.itemsize))

    def blocks(self, tile: Tile) -> int:
        columns = -(-self.p.outputs // tile.block_n)
        rows = -(-self.rows // (tile.block_m * tile.cluster)) * tile.cluster
        return rows * columns * self.p.groups * self.p.phases


@lru_cache(8)
def _operands(p: Problem) -> _Operands:
    return _Operands(p)


def _padded(axes: tuple[Axis, ...]) -> bool:
    return any(any(a.pad) for a in axes)


# ---- what conv_igemm asks --------------------------------------------------------------------------------


def tiles(p: Problem) -> list[Tile]:
    """Those that can compute `p`: none where TMA cannot copy it."""
    try:
        operands = _operands(p)
    except RuntimeError:  # the rules of tensor maps, said where maps are made
        return []
    return [tile for tile in TILES if operands.fits(tile)]


def blocks(tile: Tile, p: Problem) -> int:
    """Tiles of the whole product."""
    return _operands(p).blocks(tile)


def cycles(
    tile: Tile,
    parts: int,
    p: Problem,
    l2: tuple[float, float],
    sms: int,
    latency: float,
    wake: float,
) -> float:
    """As `conv_igemm` reckons: L2's bytes a cycle and multiprocessor (while all ask, and at most).

    A stage takes what wgmma or its copies take. Results cost four instructions each, which products of the
    same block do not hide, and where TMA does not store them their writing. The last round may be part full.
    """
    o = _operands(p)
    itemsize = o.itemsize
    count = o.blocks(tile) * parts
    rounds = -(-count // (sms // tile.cluster * tile.cluster))
    steps = LINE_BYTES // itemsize
    rate = min(l2[1], l2[0] * sms / min(count, sms))
    copied = tile.copied_bytes / rate
    stage = max(tile.block_m * tile.block_n * steps / MACS[itemsize], copied, ISSUED[itemsize])
    results = tile.block_m * tile.block_n
    way_out = results * 4 / 128
    if not o.stores_tiles(parts):
        way_out += results * (itemsize if parts == 1 else 4) / rate
    ring = max(stage, latency / (o.stages(tile, parts) - 1))
    sums = rounds * (-(-o.stages_of_sum // parts) * ring + way_out) + wake
    second = 4000 + 8 * parts * o.rows * p.outputs * p.groups * p.phases / (16 * sms)
    packed = 4000 + 2 * o.words * itemsize / (16 * sms) if o.packed else 0
    return sums + packed + (second if parts > 1 else 0)


def plan(tile: Tile, parts: int, p: Problem, sms: int) -> Plan:
    """The launches: filters are packed if they must be, all is multiplied, parts of the sum are added up.

    So many blocks run at a time as the GPU has multiprocessors, `sms`; results do not depend on that.
    """
    o = _operands(p)
    dtype = p.key.dtype
    stores_tiles = o.stores_tiles(parts)
    constants: dict[str, str | int] = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "CHUNK": o.chunk, "STAGES": o.stages(tile, parts),
        "POINTWISE": int(o.pointwise), "STORE_TILES": int(stores_tiles),
        "PLAIN_ALONG_STEPS": int(o.packed or o.op == "fprop"),
    }  # fmt: skip
    if o.op == "fprop":
        constants["MOMENTS"] = int(p.key.moments and stores_tiles)
    p.params.tiles = FastDiv(-(-p.outputs // tile.block_n))
    count = o.blocks(tile) * parts
    pack = None
    if o.packed:
        params = Params.from_buffer_copy(p.params)
        params.numel = o.words
        own = {**p.constants("PACK", ELEMENT[dtype]), "PADDING": 0}
        pack = launch_of(
            SOURCE, "conv_pack_sm90", own, params, grid=(-(-o.words // PACK_THREADS),),
            block=(PACK_THREADS,), inputs=("w",), outputs=("packed",),
        )  # fmt: skip
    whole = plan_of(
        p, SOURCE, "sm90", constants, count, THREADS, parts, o.shared_bytes(tile, parts),
        grid=min(count, sms // tile.cluster * tile.cluster), cluster=tile.cluster,
        filters="packed" if o.packed else "w", tensor_maps=o.maps(tile, parts),
    )  # fmt: skip
    return replace(whole, pack=pack, words=o.words, packed=dtype) if pack else whole
