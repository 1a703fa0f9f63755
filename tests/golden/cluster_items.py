"""The golden items of `kernels/ptx_cluster.cuh`, and the launches of tests/emulated that form clusters."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from cnnops.cuda.kernel import ELEMENT, Launch, launch_of

from .async_items import EMULATED, EXACT, SUMS_EXACT, AsyncItem
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


ITEMS = list(_items())
