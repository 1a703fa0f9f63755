"""Direct convolution, all three passes and the bias: `kernels/conv_direct.cu` explains the arithmetic.

What this file decides, once a problem, beyond what `implicit_gemm` says of it: the form, the tile and the
number of parts of a long sum (`_tiled`, `_thin`: both by arithmetic, never by timing). Where `cnnops.tune`
has measured the problem, its table names tile and parts (`variants`) in place of `_ranked`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cnnops import tuned
from cnnops.cuda.implicit_gemm import (
    ACCUMULATOR_BYTES,
    SMS,
    Forced,
    Key,
    Operands,
    Plan,
    Problem,
    beyond,
    key_of_call,
    leading,
    most_partials,
    named,
    operands,
    packs,
    plan_of,
    run,
    stored,
    tuned_variant,
    worth_measuring,
)
from cnnops.cuda.kernel import ACCUMULATOR, ELEMENT, FastDiv
from cnnops.epilogue import Epilogue
from cnnops.shapes import Axes, ConvShape, NormShape, PoolShape

SOURCE = "conv_direct.cu"


@dataclass(frozen=True)
class Tile:
    """A block's share of the product: block_m x block_n results, block_k terms of their sums at a time;
    thread_m x thread_n results a thread; registers are budgeted for `resident` blocks on a multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    thread_m: int
    thread_n: int
    resident: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k}"

    @property
    def threads(self) -> int:
        return self.block_m // self.thread_m * (self.block_n // self.thread_n)

    def issue_slots(self, gather_vector: int, plain_vector: int) -> float:
        """Instructions that one thread issues for one step of block_k: products, shared memory, fetching."""
        products = self.block_k * self.thread_m * self.thread_n
        shared = self.block_k * (self.thread_m + self.thread_n) / 4
        gathered = self.block_m * self.block_k / self.threads
        plain = self.block_n * self.block_k / self.threads
        return (
            products
            + shared
            + gathered * (2 + 10 / gather_vector)
            + plain * (2 + 5 / plain_vector)
            + 16
        )


TILES = {
    "float": (
        Tile(128, 128, 8, 16, 8, resident=2),
        Tile(128, 64, 8, 8, 8, resident=3),
        Tile(64, 64, 16, 8, 4, resident=4),
        Tile(128, 32, 16, 8, 4, resident=4),
        Tile(32, 32, 16, 4, 2, resident=4),
        Tile(16, 64, 16, 2, 4, resident=4),
        Tile(128, 16, 16, 4, 4, resident=4),
        Tile(256, 8, 8, 4, 4, resident=4),
        Tile(128, 4, 16, 4, 1, resident=4),
    ),
    "double": (
        Tile(64, 64, 8, 4, 4, resident=2),
        Tile(32, 32, 16, 4, 2, resident=4),
        Tile(128, 8, 16, 4, 2, resident=4),
    ),
}
"""By accumulator: a double takes two registers, so its tiles are smaller."""

THIN_CHANNELS = 4
"""Groups of at most this many channels on either side take the form without shared memory."""
THIN_THREADS = 128
THIN_SUMS = {"float": 56, "double": 30}
"""Most partial sums that a thread of conv_wgrad_thin keeps."""
THIN_TAPS = 5
"""Most taps of the last axis that stand unrolled in conv_fprop_thin and conv_dgrad_thin."""


def supports(op: str, shape: ConvShape | PoolShape | NormShape, dtype: torch.dtype) -> str | None:
    """None, or why the problem is refused: see `implicit_gemm.beyond`."""
    return beyond(op, shape, tuple(ELEMENT), dtype)


Choice = tuple[Tile, int]
"""A tile, and into how many parts to split the sum."""


def _ranked(
    tiles: Sequence[Tile], m: int, n: int, k: int, batches: int, vectors: tuple[int, int], most: int
) -> list[Choice]:
    """Tiles and numbers of parts: those first that free the busiest multiprocessor first.

    A multiprocessor issues four instructions a cycle if some twelve warps take turns (eight, where
    each has 64 independent sums); fewer hide less of each other's waiting. A second pass costs launch
    and traffic. Splits are tried that just fill the multiprocessors one to eight times.
    """

    def cycles(choice: Choice) -> float:
        tile, splits = choice
        blocks = -(-m // tile.block_m) * -(-n // tile.block_n) * batches * splits
        steps = -(-k // (tile.block_k * splits))
        here, warps = -(-blocks // SMS), tile.threads // 32
        enough = 8 if tile.thread_m * tile.thread_n >= 64 else 12
        hidden = min(1.0, min(here, tile.resident) * warps / enough)
        setup = 150 + 4 * tile.thread_m * tile.thread_n
        busy = here * warps * (steps * tile.issue_slots(*vectors) + setup) / 4 / hidden
        return busy + (4000 + 8 * splits * m * n * batches / (16 * SMS) if splits > 1 else 0)

    def splits(tile: Tile) -> list[int]:
        blocks = -(-m // tile.block_m) * -(-n // tile.block_n) * batches
        filling = {SMS * rounds // blocks for rounds in range(1, 9)}
        return [1, *sorted(s for s in filling if 1 < s <= most)]

    return sorted(((tile, s) for tile in tiles for s in splits(tile)), key=cycles)


def _is_thin(p: Problem) -> bool:
    """Whether groups have so few channels that, by arithmetic, nothing is worth sharing."""
    return max(p.channels, p.outputs) <= THIN_CHANNELS


def _choices(p: Problem, o: Operands) -> list[Choice]:
    tiles, batches = TILES[ACCUMULATOR[p.key.dtype]], p.groups * p.phases
    return _ranked(tiles, o.m, p.outputs, o.k, batches, (o.gather, o.plain), o.most)


def _tiled(p: Problem, variant: str) -> Plan:
    """The product through shared memory: rows x columns, summed over steps (see conv_direct.cu)."""
    o, accumulator = operands(p, (p.width,)), ACCUMULATOR[p.key.dtype]
    tile, splits = named(variant, TILES[accumulator], o.most) or _choices(p, o)[0]
    plain = 1 if not o.plain_along_steps and tile.block_n % o.plain else o.plain
    # A thread stores what it owns side by side.
    own = tile.thread_m if o.store_along_rows else tile.thread_n
    store = stored(p, o, (min(own, 16 // ACCUMULATOR_BYTES[accumulator]),), splits)
    constants: dict[str, str | int] = {
        "FORM": "TILED", "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "THREAD_M": tile.thread_m, "THREAD_N": tile.thread_n, "RESIDENT": tile.resident,
        "CHANNELS_FAST": int(o.channels_fast),
        "GATHER_ALONG_STEPS": int(o.gather_along_steps), "GATHER_VECTOR": o.gather,
        "PLAIN_ALONG_STEPS": int(o.plain_along_steps), "PLAIN_VECTOR": plain,
        "STORE_ALONG_ROWS": int(o.store_along_rows), "STORE_VECTOR": store,
    }  # fmt: skip
    if p.key.op == "fprop":
        constants["MOMENTS"] = int(p.key.moments and splits == 1)
    column_tiles = -(-p.outputs // tile.block_n)
    p.params.tiles = FastDiv(column_tiles)
    blocks = column_tiles * p.groups * p.phases * splits * -(-o.m // tile.block_m)
    return plan_of(p, SOURCE, "direct", constants, blocks, tile.threads, splits)


def _fit(extent: int, least: int, most: int) -> int:
    """Lanes for an index: the largest power of two that leaves at most an eighth of its lanes idle, or
    else the one that leaves the fewest.
    """
    powers = [1 << i for i in range(most.bit_length()) if least <= 1 << i <= most]
    covered = {n: -(-extent // n) * n for n in powers}
    good = [n for n in powers if 8 * covered[n] <= 9 * extent]
    return max(good) if good else min(powers, key=lambda n: (covered[n], -n))


def _lanes(places_fast: bool, places: int, groups: int, pack_bytes: int) -> tuple[int, int]:
    """How THIN_THREADS threads cover (groups, places): along memory, in runs of 32 bytes or more."""
    if places_fast:
        lanes = _fit(places, 32, THIN_THREADS)
        return THIN_THREADS // lanes, lanes
    least = min(32 // pack_bytes, 1 << (groups.bit_length() - 1))
    lanes = _fit(groups, least, 32)
    return lanes, THIN_THREADS // lanes


def _splits(blocks: int, places: int, lanes: int, most: int) -> int:
    """Parts of a sum over places: enough blocks for all multiprocessors, enough places for all lanes."""
    return max(1, min(8 * SMS // blocks, places // (16 * lanes), most))


def _stretches(taps: Sequence[int], most: int) -> list[int]:
    """Taps of each axis that conv_wgrad_thin unrolls, at most `most` in all: the last axis in equal
    parts, of the others as many as divide them.
    """
    last = -(-taps[-1] // -(-taps[-1] // most))
    stretches = [last]
    for n in reversed(taps[:-1]):
        room = most // math.prod(stretches)
        stretches.insert(0, max(i for i in range(1, room + 1) if n % i == 0))
    return stretches


def _thin(p: Problem) -> Plan:
    """Few channels a group: a thread owns places of a group (wgrad: taps of it); nothing is shared."""
    source, result, taps = p.source, p.result, p.most_taps
    wgrad, accumulator = p.key.op == "wgrad", ACCUMULATOR[p.key.dtype]
    most_sums = THIN_SUMS[accumulator] // (2 if p.wide else 1)
    vector = result_vector = 1
    if p.channels == p.outputs == 1 and not (wgrad and math.prod(taps) * p.width > most_sums):
        vector = packs((p.width,), source.group, source.places + source.axes, source.aligned)
        others = result.places + result.axes
        result_vector = min(vector, packs((p.width,), result.group, others, result.aligned))
    if wgrad:
        chunk = _stretches(taps, max(1, most_sums // (p.outputs * vector)))
        full = all(n % t == 0 for n, t in zip(taps, chunk, strict=True))
    else:
        chunk = [-(-taps[-1] // -(-taps[-1] // THIN_TAPS))]
        full = p.phases == 1 and taps[-1] % chunk[0] == 0

    places_fast = p.groups == 1 or leading(source.places) <= source.group[0][1]
    pack_bytes = vector * p.key.dtype.itemsize
    group_lanes, lanes = _lanes(places_fast, p.places, p.groups // vector, pack_bytes)
    tiles = -(-p.groups // (group_lanes * vector))
    p.params.tiles = FastDiv(tiles)
    constants: dict[str, str | int] = {
        "FORM": "THIN", "LANES_G": group_lanes, "LANES_P": lanes, "PLACES_FAST": int(places_fast),
        "VECTOR": vector, "RESULT_VECTOR": result_vector, "OUTPUTS": p.outputs,
        "FULL_CHUNKS": int(full),
    }  # fmt: skip
    if wgrad:
        chunks = math.prod(-(-n // t) for n, t in zip(taps, chunk, strict=True))
        p.params.phases = FastDiv(chunks)
        constants |= {f"TAPS_{a}": t for a, t in enumerate([*chunk, 1, 1][:3])}
        blocks = tiles * p.channels * chunks
        splits = _splits(blocks, p.places, lanes, most_partials(p.key))
        return plan_of(p, SOURCE, "thin", constants, blocks * splits, THIN_THREADS, splits)
    registers = vector * p.outputs * ACCUMULATOR_BYTES[accumulator] // 4
    each = max(1, min(4, 8 // registers))
    if tiles * p.phases * (p.places // (each * lanes)) < 8 * SMS:
        each = 1
    constants |= {"TAPS": chunk[0], "PLACES": each}
    blocks = tiles * p.phases * -(-p.places // (each * lanes))
    return plan_of(p, SOURCE, "thin", constants, blocks, THIN_THREADS, 1)


def _bgrad(key: Key) -> Plan:
    """Sums of grad_y over places, every channel a group: lanes and packs along its contiguous axis."""
    shape, y, ones = key.shape, key.strides[2], (1,) * key.shape.dims
    pads = ((0, 0),) * shape.dims
    shape = ConvShape(shape.N, shape.K, shape.K, shape.output, ones, ones, pads, ones, shape.K)
    p = Problem(replace(key, shape=shape, strides=(y, (0,) * len(y), y)))
    places_fast = shape.K == 1 or leading(p.result.places) <= p.result.group[0][1]
    indices = (p.result.places, p.result.group)
    along, others = indices if places_fast else indices[::-1]
    vector = packs((p.width,), along, others, p.result.aligned)
    places, groups = (p.places // vector, shape.K) if places_fast else (p.places, shape.K // vector)
    group_lanes, lanes = _lanes(places_fast, places, groups, vector * key.dtype.itemsize)
    tiles = -(-groups // group_lanes)
    splits = _splits(tiles, places, lanes, 1024)
    p.params.tiles = FastDiv(tiles)
    constants: dict[str, str | int] = {
        "LANES_G": group_lanes, "LANES_P": lanes, "PLACES_FAST": int(places_fast), "VECTOR": vector,
    }  # fmt: skip
    return plan_of(p, SOURCE, "direct", constants, tiles * splits, THIN_THREADS, splits)


@tuned.cached
def _plan(
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
) -> Plan:
    """The plan of a pass whose x, w and y have these strides. Flat, since hashed at every call."""
    key = Key(op, shape, dtype, (x, w, y), (x_aligned, w_aligned, y_aligned), activation, moments)
    if op == "bgrad":
        return _bgrad(key)
    p = Problem(key)
    variant = tuned_variant(key, "conv_direct") if forced is None else forced
    return _thin(p) if _is_thin(p) and not variant else _tiled(p, variant)


forced = Forced()


def variants(op: str, shape: ConvShape, *arguments: object) -> tuple[str, ...]:
    """Names of the choices that are worth measuring for this call, without the one that is made anyway."""
    if op == "conv_bgrad":
        return ()
    p = Problem(key_of_call(op, shape, arguments))
    return worth_measuring(_choices(p, operands(p, (p.width,))), 0 if _is_thin(p) else 1)


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
    run(_plan, forced, "fprop", shape, (x, w, y), (x, w), y, bias, epilogue)


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
    run(_plan, forced, "dgrad", shape, (grad_x, w, grad_y), (grad_y, w), grad_x, bias, epilogue)


def conv_wgrad(shape: ConvShape, grad_y: Tensor, x: Tensor, grad_w: Tensor) -> None:
    """Fill grad_w ``K C/groups *kernel``: the sum over all places that a weight was used at."""
    run(_plan, forced, "wgrad", shape, (x, grad_w, grad_y), (grad_y, x), grad_w)


def conv_bgrad(shape: ConvShape, grad_y: Tensor, grad_bias: Tensor) -> None:
    """Fill grad_bias ``K``: the sum of grad_y over images and places."""
    run(_plan, forced, "bgrad", shape, (None, None, grad_y), (grad_y,), grad_bias)
