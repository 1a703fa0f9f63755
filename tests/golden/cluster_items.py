"""The golden items of `kernels/ptx_cluster.cuh` and of what `kernels/ptx_sm90.cuh` has for clusters, and the
launches of tests/emulated that form clusters.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from cnnops.cuda.kernel import ELEMENT, Launch, launch_of
from cnnops.cuda.tensor_map import Swizzle

from .async_items import (
    EMULATED,
    EXACT,
    FLOAT,
    HALF,
    IM2COL,
    SUMS_EXACT,
    AsyncItem,
    Im2col,
    Tile,
    box_of,
    map_of,
    map_of_tile,
)  # fmt: skip
from .item import Item, Tensors

NAMES = {"who": ((), ("rank", "blocks"))}
"""Inputs and outputs of the entries of exchange.cu, where they are not x and y."""


class Exchange(ctypes.Structure):
    """`struct Params` of exchange.cu."""

    _fields_ = [("n", ctypes.c_int), ("rounds", ctypes.c_int)]


class Tiles(ctypes.Structure):
    """`struct Params` of cluster_tiles.cu."""

    _fields_ = [("rounds", ctypes.c_int)]


def exchange_plan(
    entry: str,
    cluster: int,
    dtype: torch.dtype,
    grid: Sequence[int],
    block: Sequence[int],
    n: int = 0,
    rounds: int = 0,
    updates: bool = False,
) -> Launch:
    """An entry of exchange.cu. With `updates`, what it writes is read, too."""
    inputs, results = NAMES.get(entry, (("x",), ("y",)))
    return launch_of(
        str(EMULATED / "exchange.cu"), entry, {"ELEMENT": ELEMENT.get(dtype, "int")}, Exchange(n, rounds),
        grid=grid, block=block, inputs=inputs, outputs=() if updates else results,
        updates=results if updates else (), cluster=cluster,
        shared_bytes=2 * n * dtype.itemsize if entry == "pass_on" else 0,
    )  # fmt: skip


def tiles_plan(cluster: int, blocks: int, rounds: int) -> Launch:
    """The entry of cluster_tiles.cu, for 64 x 16 halves of a and 8 x 16 of b a block, as `pieces` of them."""
    return launch_of(
        str(EMULATED / "cluster_tiles.cu"), "tiles", {}, Tiles(rounds), grid=[blocks], block=[128],
        inputs=["a", "b"], outputs=["y", "totals"], cluster=cluster,
    )  # fmt: skip


def pieces(x: torch.Tensor) -> torch.Tensor:
    """Blocks x lines x K elements of 16 bits in the order in which wgmma takes them without a swizzle."""
    blocks, lines, k = x.shape
    return x.view(blocks, lines // 8, 8, k // 8, 8).transpose(2, 3).contiguous()


# ---- tiles that blocks load for each other: multicast_ring.cu --------------------------------------------


class Ring(ctypes.Structure):
    """`struct Params` of multicast_ring.cu."""

    _fields_ = [(name, ctypes.c_int) for name in ("rounds", "dims", "rows", "bytes")]


class Multicast(NamedTuple):
    """Shares of tiles, each from somewhere in x, that the blocks of a cluster load for each other."""

    share: Tile | Im2col
    cluster: int
    clusters: int = 2
    rounds: int = 5

    @property
    def dtype(self) -> torch.dtype:
        return self.share.dtype if isinstance(self.share, Tile) else FLOAT

    @property
    def shape(self) -> tuple[int, int]:
        """Lines of a share, and elements of a line."""
        if isinstance(self.share, Tile):
            return math.prod(self.share.box[1:]), self.share.box[0]
        return self.share.pixels, self.share.channels

    def places(self) -> list[tuple[list[int], list[int]]]:
        """Of each share its coordinates, some around an edge; for im2col its first output and its tap."""
        count, share = self.clusters * self.rounds * self.cluster, self.share
        if isinstance(share, Tile):
            sizes = share.size[::-1]
            return [([3 * i % n - 2 for n in sizes], []) for i in range(count)]
        taps = list(itertools.product(*map(range, share.taps)))
        outputs = share.size[0] * math.prod(share.outputs)
        return [([7 * i % outputs], list(taps[i % len(taps)])) for i in range(count)]

    def inputs(self, generator: torch.Generator) -> Tensors:
        share, rows = self.share, []
        for at, tap in self.places():
            corner = at if isinstance(share, Tile) else [0, *share.corner_of(at[0])]
            offsets = [] if isinstance(share, Tile) else share.offsets_of(tap)
            rows.append([*corner, *[0] * (5 - len(corner)), *offsets, *[0] * (3 - len(offsets))])
        x = torch.randn(share.size, generator=generator).to(self.dtype)
        return {"x": x, "at": torch.tensor(rows, dtype=torch.int32)}

    def expected(self, inputs: Tensors) -> Tensors:
        """Every block of a cluster gets all shares of its tiles."""
        share, x, found = self.share, inputs["x"], []
        for at, tap in self.places():
            if isinstance(share, Tile):
                found.append(box_of(x, share._replace(at=tuple(at))).reshape(self.shape))
            else:
                found.append(share.expected(x, at[0], 0, tap))
        tiles = torch.stack(found).view(self.clusters, 1, self.rounds, self.cluster, *self.shape)
        return {"y": tiles.repeat(1, self.cluster, 1, 1, 1, 1).flatten(0, 1)}

    def plan(self, inputs: Tensors, outputs: Tensors) -> Launch:
        share, x, y = self.share, inputs["x"], outputs["y"]
        rows, width = self.shape
        dims = 0 if isinstance(share, Tile) else x.dim()
        x_map = map_of_tile(share, x) if isinstance(share, Tile) else share.map_of(x)
        y_map = map_of("y", y.view(-1, width), box=(width, rows), swizzle=share.swizzle)
        size = rows * width * x.element_size()
        return launch_of(
            str(EMULATED / "multicast_ring.cu"), "share_tiles", {"ELEMENT": ELEMENT[self.dtype]},
            Ring(self.rounds, dims, rows, size), grid=[self.clusters * self.cluster], block=[64],
            inputs=["x", "at"], outputs=["y"], cluster=self.cluster, shared_bytes=2 * self.cluster * size,
            tensor_maps=[x_map, y_map],
        )  # fmt: skip


SHARES: dict[str, Tile | Im2col] = {
    "tile": Tile((9, 7, 40), FLOAT, (), (32, 4, 2), Swizzle.B128),
    "im2col_1d": IM2COL["1d"],
    "im2col_2d": IM2COL["2d"],
    "im2col_3d": IM2COL["3d_dilated"],
}


def _multicast_items() -> Iterator[Item]:
    ring = "mbarrier_arrive_at", "mbarrier_wait_cluster"
    half = Tile((9, 7, 24), HALF, (), (16, 4, 4), Swizzle.B32)
    for name, case in (
        *((f"{name}_2", Multicast(share, 2)) for name, share in SHARES.items()),
        ("im2col_2d_4", Multicast(SHARES["im2col_2d"], 4)),
        ("tile_half_8", Multicast(half, 8)),
    ):
        load = "tma_load_im2col_multicast" if "im2col" in name else "tma_load_multicast"
        yield AsyncItem(
            f"multicast_{name}", (load, *ring), "multicast_ring.cu", "share_tiles", case.inputs,
            case.expected, EXACT, arch="90a", make_plan=case.plan,
        )  # fmt: skip


# ---- the items -------------------------------------------------------------------------------------------

BLOCKS = 16


def _ranks(cluster: int, inputs: Tensors) -> Tensors:
    ranks = torch.arange(BLOCKS, dtype=torch.int32) % cluster
    return {"rank": ranks, "blocks": torch.full_like(ranks, cluster)}


def _whole_numbers(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensors:
    return {"x": torch.randint(0, 64, shape, generator=generator).to(dtype)}


def _sums(cluster: int, inputs: Tensors) -> Tensors:
    sums = inputs["x"].view(-1, cluster, inputs["x"].shape[1]).sum((1, 2))
    return {"y": sums.repeat_interleave(cluster)}


def _passed_on(cluster: int, rounds: int, inputs: Tensors) -> Tensors:
    x = inputs["x"]
    return {"y": x.view(-1, cluster, x.shape[1]).roll(rounds, 1).view(x.shape)}


def _counts(cluster: int, inputs: Tensors) -> Tensors:
    values = inputs["x"].view(BLOCKS // cluster, -1)
    return {"y": torch.stack([torch.bincount(row, minlength=64) for row in values]).int()}


def _items() -> Iterator[Item]:
    for cluster in (1, 2, 8):
        yield AsyncItem(
            f"cluster_ranks_{cluster}", ("cluster_rank", "cluster_blocks"), "exchange.cu", "who",
            lambda _: {}, partial(_ranks, cluster), EXACT, arch="90",
            make_plan=lambda inputs, outputs, cluster=cluster: exchange_plan(
                "who", cluster, torch.float32, [BLOCKS], [64]
            ),
        )  # fmt: skip
        for dtype in (torch.float32, torch.float64):
            suffix = f"{cluster}_{ELEMENT[dtype]}"
            yield AsyncItem(
                f"cluster_sum_{suffix}", ("cluster_sync", "cluster_load"), "exchange.cu", "sum",
                partial(_whole_numbers, (BLOCKS, 500), dtype), partial(_sums, cluster), SUMS_EXACT, arch="90",
                make_plan=lambda inputs, outputs, cluster=cluster, dtype=dtype: exchange_plan(
                    "sum", cluster, dtype, [BLOCKS], [128], 500
                ),
            )  # fmt: skip
            yield AsyncItem(
                f"cluster_ring_{suffix}", ("cluster_sync", "cluster_store"), "exchange.cu", "pass_on",
                partial(_whole_numbers, (BLOCKS, 500), dtype), partial(_passed_on, cluster, 5), EXACT,
                arch="90",
                make_plan=lambda inputs, outputs, cluster=cluster, dtype=dtype: exchange_plan(
                    "pass_on", cluster, dtype, [BLOCKS], [128], 500, 5
                ),
            )  # fmt: skip
        yield AsyncItem(
            f"cluster_histogram_{cluster}", ("cluster_arrive", "cluster_wait", "cluster_load"), "exchange.cu",
            "histogram", partial(_whole_numbers, (BLOCKS, 500), torch.int32), partial(_counts, cluster),
            EXACT, arch="90",
            make_plan=lambda inputs, outputs, cluster=cluster: exchange_plan(
                "histogram", cluster, torch.int32, [BLOCKS], [128], 500
            ),
        )  # fmt: skip


ITEMS = [*_items(), *_multicast_items()]
