"""The form of `conv_igemm` for dense planes (NCHW): `kernels/conv_igemm_planes.cu` explains the arithmetic.

Which problems it takes (`tiles`), how long each tile should take (`cycles`), and the two launches (`plan`):
the filters are packed, then multiplied.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from dataclasses import dataclass

from cnnops.cuda.implicit_gemm import FINISH, TENSORS, Operands, Plan, Problem, Strides, packs
from cnnops.cuda.kernel import ELEMENT, INT32_MAX, FastDiv, launch_of

SOURCE = "conv_igemm_planes.cu"

MOST_TAPS = 49
"""Of the last two axes: they stand unrolled."""
MOST_SHARED = 96 * 1024
REGISTERS, MOST_REGISTERS = 65536, 255
"""Of a multiprocessor, and of a thread."""
OTHER_REGISTERS = 76
"""Of a thread, beside sums, fragments and what it has fetched."""
PACK_THREADS = 256


@dataclass(frozen=True)
class Tile:
    """A block's share: tile_h x tile_w places of an image, and block_n channels."""

    tile_h: int
    tile_w: int
    block_n: int
    warps_m: int
    warps_n: int

    groups = 1

    def __str__(self) -> str:
        return f"planes{self.tile_h}x{self.tile_w}x{self.block_n}"

    @property
    def places(self) -> int:
        return self.tile_h * self.tile_w

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n


TILES = tuple(
    Tile(*shape, block_n, *warps)
    for shape in ((8, 16), (4, 32), (16, 8), (2, 64), (1, 128))
    for block_n, *warps in ((128, 2, 4), (64, 2, 2), (32, 4, 1), (16, 4, 1))
)


class _Params(ctypes.Structure):
    """``struct Params`` of conv_igemm_planes.cu."""

    _fields_ = [
        ("source", Strides),
        ("result", Strides),
        *((f"filter_{name}", ctypes.c_int64) for name in ("group", "row", "channel")),
        ("filter_tap", ctypes.c_int64 * 3),
        *((name, FastDiv) for name in ("columns", "groups", "tiles_w", "tiles_h", "depths")),
        *((f"words_{name}", FastDiv) for name in ("tap", "depth", "chunk", "group")),
        *((name, ctypes.c_int32 * 3) for name in ("size", "limit", "origin")),
        *((name, ctypes.c_int32) for name in ("taps_d", "step_d", "reach_d")),
        *((name, ctypes.c_int32) for name in ("channels", "outputs", "chunks", "padded", "words")),
    ]


class _Geometry:
    """A problem's axes as depth, height and width, and what a tile makes of them."""

    def __init__(self, p: Problem) -> None:
        self.p, missing = p, 3 - len(p.axes)
        self.back = p.key.op == "dgrad"

        def axes(values: list[int], fill: int) -> list[int]:
            return [fill] * missing + values

        self.size = axes([a.out if self.back else a.size for a in p.axes], 1)
        self.limit = axes([a.size if self.back else a.out for a in p.axes], 1)
        self.taps = axes([a.taps for a in p.axes], 1)
        self.step = axes([1 if self.back else a.stride for a in p.axes], 1)
        self.reach = axes([-a.dilation if self.back else a.dilation for a in p.axes], 1)
        self.origin = axes([a.pad[0] if self.back else -a.pad[0] for a in p.axes], 0)
        source = [a.y if self.back else a.x for a in p.axes]
        result = [a.x if self.back else a.y for a in p.axes]
        self.source, self.result = axes(source, 0), axes(result, 0)
        self.filter_tap = axes([a.w for a in p.axes], 0)
        self.word = 4 // p.key.dtype.itemsize
        self.chunks = -(-p.channels // (8 * self.word))

    @property
    def tap_count(self) -> int:
        return self.taps[1] * self.taps[2]

    def spots(self, tile: Tile) -> int:
        """Of a plane of the patch."""
        tiles = (tile.tile_h, tile.tile_w)
        spans = [
            (n - 1) * step + (taps - 1) * abs(reach) + 1
            for n, step, taps, reach in zip(
                tiles, self.step[1:], self.taps[1:], self.reach[1:], strict=True
            )
        ]
        return math.prod(spans)

    def shared_bytes(self, tile: Tile) -> int:
        plane = -(-(self.spots(tile) - 8) // 32) * 32 + 8
        return 4 * 2 * (8 * plane + self.tap_count * tile.block_n * 8)

    def share(self, tile: Tile) -> int:
        return -(-self.spots(tile) // tile.threads)

    def registers(self, tile: Tile) -> int:
        rows, columns = tile.places // tile.warps_m // 16, tile.block_n // tile.warps_n // 8
        fetched = self.share(tile) * 8 * self.word
        return 4 * rows * columns + 6 * rows + 2 * columns + fetched + OTHER_REGISTERS

    def together(self, tile: Tile) -> int:
        """Blocks that a multiprocessor has room for."""
        by_registers = REGISTERS // (tile.threads * -(-self.registers(tile) // 8) * 8)
        return min(by_registers, 4, 2 * MOST_SHARED // self.shared_bytes(tile))

    def tiles_of(self, tile: Tile) -> tuple[int, int]:
        """Along height and width."""
        return -(-self.limit[1] // tile.tile_h), -(-self.limit[2] // tile.tile_w)


def tiles(p: Problem, o: Operands) -> list[Tile]:
    """Those that can compute `p`: none where channels are neighbours, or nothing is read more than once."""
    if p.key.op == "wgrad" or p.phases > 1 or o.channels_fast or o.gather > 1 or p.key.moments:
        return []
    g = _Geometry(p)
    words = p.groups * g.chunks * math.prod(g.taps) * 8 * -(-p.outputs // 128) * 128
    if not 1 < g.tap_count <= MOST_TAPS or g.source[2] != 1 or words > INT32_MAX:
        return []
    return [
        tile
        for tile in TILES
        if g.shared_bytes(tile) <= MOST_SHARED
        and g.registers(tile) <= MOST_REGISTERS
        and 2 * max(p.outputs, 16) >= tile.block_n
    ]


def cycles(
    tile: Tile,
    p: Problem,
    macs: float,
    l2: tuple[float, float],
    sms: int,
    latency: float,
    wake: float,
) -> float:
    """As `conv_igemm` reckons: `macs` a multiprocessor and cycle, L2's bytes (while all ask, and at most)."""
    g, itemsize = _Geometry(p), p.key.dtype.itemsize
    high, wide = g.tiles_of(tile)
    blocks = high * wide * g.limit[0] * p.key.shape.N * p.groups * -(-p.outputs // tile.block_n)
    here, side, warps = (
        -(-blocks // sms),
        min(-(-blocks // sms), g.together(tile)),
        tile.threads // 32,
    )
    rows, columns = tile.places // tile.warps_m // 16, tile.block_n // tile.warps_n // 8
    filters = g.tap_count * tile.block_n * 8
    # As the compiled loops have it.
    fetched = g.share(tile) * 8 * g.word * (14 if itemsize == 4 else 9.5)
    issued = warps * (250 + fetched + g.tap_count * (4 * rows + columns + rows * columns))
    rate = min(l2[1], l2[0] * sms / min(blocks, sms))
    copied = 1.3 * g.spots(tile) * 8 * g.word * itemsize + filters * 4
    products = g.tap_count * tile.places * tile.block_n * 8 * g.word / macs
    busy = min(1.0, 0.6 + 0.05 * side * warps)
    stage = max(max(products, copied / rate, issued / 4) / busy, latency / side)
    written = tile.places * tile.block_n * itemsize / rate
    # Taps along depth that lie outside are not multiplied.
    depths, taps = min(g.limit[0], 64), g.taps[0]
    inside: float = taps
    if taps > 1:
        places = itertools.product(range(depths), range(taps))
        starts = (g.origin[0] + z * g.step[0] + t * g.reach[0] for z, t in places)
        inside = sum(0 <= at < g.size[0] for at in starts) / depths
    packed = 4000 + 8 * p.groups * g.chunks * math.prod(g.taps) * p.outputs / sms
    return here * (g.chunks * inside * stage + written) + -(-here // side) * wake + packed


def plan(tile: Tile, p: Problem) -> Plan:
    """The launches: filters are packed, then multiplied."""
    g, shape, dtype = _Geometry(p), p.key.shape, p.key.dtype
    params = _Params()
    for name in ("batch", "group", "channel"):
        setattr(params.source, name, getattr(p.params.source, name))
        setattr(params.result, name, getattr(p.params.result, name))
    for a in range(3):
        params.source.axis[a], params.result.axis[a] = g.source[a], g.result[a]
        params.filter_tap[a], params.size[a] = g.filter_tap[a], g.size[a]
        params.limit[a], params.origin[a] = g.limit[a], g.origin[a]
    filters = p.params.filter
    params.filter_group, params.filter_row = filters.group, filters.row
    params.filter_channel = filters.channel
    column_tiles, (high, wide) = -(-p.outputs // tile.block_n), g.tiles_of(tile)
    params.columns, params.groups = FastDiv(column_tiles), FastDiv(p.groups)
    params.tiles_w, params.tiles_h = FastDiv(wide), FastDiv(high)
    params.depths = FastDiv(g.limit[0])
    params.taps_d, params.step_d, params.reach_d = g.taps[0], g.step[0], g.reach[0]
    params.channels, params.outputs, params.chunks = p.channels, p.outputs, g.chunks
    params.padded = column_tiles * tile.block_n
    of_tap = params.padded * 8
    of_depth = of_tap * g.tap_count
    of_chunk = of_depth * g.taps[0]
    of_group = of_chunk * g.chunks
    params.words = of_group * p.groups
    params.words_tap, params.words_depth = FastDiv(of_tap), FastDiv(of_depth)
    params.words_chunk, params.words_group = FastDiv(of_chunk), FastDiv(of_group)

    first, *others = p.result.places
    others = others + p.result.channel + p.result.group + p.result.axes
    widths = [size // dtype.itemsize for size in (16, 8, 4)]
    store = packs(widths, [first], others, p.result.aligned)
    common: dict[str, str | int] = {
        "ELEMENT": ELEMENT[dtype], "RESULT": ELEMENT[dtype],
        "TAPS_H": g.taps[1], "TAPS_W": g.taps[2],
    }  # fmt: skip
    pack = launch_of(
        SOURCE, "conv_pack_planes", {**common, "PASS": "PACK", "WIDE": 0, "PADDING": 0}, params,
        grid=(-(-params.words // PACK_THREADS),), block=(PACK_THREADS,), inputs=("w",),
        outputs=("packed",),
    )  # fmt: skip
    own = p.constants(p.key.op.upper(), ELEMENT[dtype])
    constants = {
        **common, **{name: own[name] for name in ("PASS", "WIDE", "PADDING")},
        "ACTIVATION": p.key.activation, "TILE_H": tile.tile_h, "TILE_W": tile.tile_w,
        "BLOCK_N": tile.block_n, "WARPS_M": tile.warps_m, "WARPS_N": tile.warps_n,
        "RESIDENT": g.together(tile), "STEP_H": g.step[1], "STEP_W": g.step[2],
        "REACH_H": g.reach[1], "REACH_W": g.reach[2], "STORE_VECTOR": store,
    }  # fmt: skip
    (source, _, *_), output = TENSORS[p.key.op]
    blocks = column_tiles * p.groups * wide * high * g.limit[0] * shape.N
    first_launch = launch_of(
        SOURCE, f"conv_{p.key.op}_planes", constants, params, grid=(blocks,), block=(tile.threads,),
        inputs=(source, "packed", *FINISH), outputs=(output,), shared_bytes=g.shared_bytes(tile),
    )  # fmt: skip
    return Plan(first_launch, pack=pack, words=params.words)
