"""Thread-block clusters under the emulator: what they compute, and which bugs are found and where.

The kernels are in tests/emulated: exchange.cu, cluster_tiles.cu and multicast_ring.cu compute; clusters.cu
and multicast.cu hold planted bugs, compiled with BUG = 1 and, as their own clean twins, with BUG = 0.
"""

from __future__ import annotations

import ctypes
import re
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from golden.cluster_items import (
    EMULATED,
    SHARES,
    Exchange,
    Multicast,
    Tiles,
    exchange_plan,
    pieces,
    tiles_plan,
)
from test_emulator import HUGE, SCHEDULES, Planted

from cnnops.cuda import emulate, jit
from cnnops.cuda.emulate import KernelError
from cnnops.cuda.kernel import ELEMENT, Launch, launch_of
from cnnops.cuda.tensor_map import tiled

if emulate.available() is not None:
    pytest.skip(f"kernels cannot be emulated: {emulate.available()}", allow_module_level=True)

SIZES = (1, 2, 4, 8, 16)


# ---- planted bugs ----------------------------------------------------------------------------------------

BETWEEN_BLOCKS = (
    r"race: (read|write) of {} byte \d+( of rank \d)? is not ordered after the (read|write) by "
    r"thread \(\d+,0,0\) of rank \d \(between blocks of a cluster only"
)
OF_S, OF_TILE, OF_Y = (
    BETWEEN_BLOCKS.format(what) for what in ("shared 's'", "shared 'tile'", "'y'")
)
UNWRITTEN = r"read of shared '{}' byte \d+ of rank \d before anything has written it"
MAY_HAVE_ENDED = (
    r"the block of rank \d (may have ended before this access: no cluster barrier stands between"
    r"|has ended, and with it its shared memory)"
)

MULTICAST_RACE = (
    r"race: write of shared 'tile' byte \d+( of rank \d)? (is not ordered after the (read|write) by {}|"
    r"while a bulk copy on mbarrier shared '\w+' byte \d+ of rank \d writes it)"
)
THREAD = r"thread \(\d+,0,0\) of rank \d"
STORE = r"a bulk (store of thread \(0,0,0\)|copy on mbarrier shared 'full' byte \d+) of rank \d"

# What the report must say, apart from its place.
REPORTS = {
    "clusters": {
        "no_first_barrier":
            r"cluster_load: the block of rank \d need not run yet: no cluster barrier stands before",
        "no_second_barrier": OF_S,
        "block_barrier": OF_S,
        "read_before_wait": OF_S,
        "written_after_cluster_arrive": OF_S,
        "one_buffer": OF_S,
        "two_writers": OF_S,
        "overwritten": OF_S,
        "many_readers": OF_S,
        "through_global_memory": rf"{OF_Y}|read of 'y' byte \d+ before anything",
        "ends_early": MAY_HAVE_ENDED,
        "ends_before_its_reader": MAY_HAVE_ENDED,
        "distributed_behind": r"out of bounds: read of 4 bytes at byte 256 of shared 's', which has 256",
        "distributed_misaligned": r"misaligned: read of 8 bytes at shared 's' byte \d+ of rank \d",
        "distributed_uninitialised": UNWRITTEN.format("s"),
        "no_such_rank": r"cluster_load: expected a rank below 2, got 2",
        "not_in_shared_memory":
            r"cluster_load: expected a pointer to this block's shared memory, got 'x' byte 0",
        "pointer_of_another":
            r"out of bounds: read of 4 bytes at shared 's' byte \d+ of rank \d, through a pointer of that",
        "block_leaves":
            r"deadlock: 64 threads of rank 0 wait at the cluster barrier \(64 of 128 threads have arrived\) "
            r"clusters.cu:\d+, first thread \(0,0,0\); 64 threads of rank 1 have returned",
        "warp_leaves_cluster":
            r"deadlock: 64 threads of rank 0 wait at the cluster barrier \(96 of 128 .*; 32 threads of rank "
            r"1 wait at the cluster barrier .* 32 threads of rank 1 have returned, first thread \(32,0,0\)",
        "one_barrier_more":
            r"deadlock: 64 threads of rank 0 wait at the cluster barrier .*; 64 threads of rank 1 have "
            r"returned",
        "crossed_barriers":
            r"deadlock: 64 threads of rank 0 wait at the cluster barrier .*; 32 threads of rank 1 wait at "
            r"the block barrier clusters.cu:\d+",
        "half_a_warp_arrives":
            r"divergent warp: lane \d+ is at this cluster_arrive .* wait at the cluster_arrive of "
            r"clusters.cu",
        "wait_missing": r"cluster_arrive: the thread has returned from the kernel without a cluster_wait",
        "arrives_twice":
            r"cluster_arrive: the thread arrives again: no cluster_wait has followed its arrival at "
            r"clusters.cu",
        "arrival_missing": r"cluster_wait: the thread has not arrived: cluster_arrive must come first",
        "foreign_tile_not_waited_for":
            r"race: read of shared 'tile' byte \d+ of rank \d while a bulk copy on mbarrier shared 'm' byte "
            r"0 .*writes it",
        "tile_refilled":
            rf"{OF_TILE}|race: read of shared 'tile' byte \d+ of rank \d (while a bulk copy .* writes it|"
            r"is not ordered after the write by a bulk copy)",
        "mbarrier_of_another": r"write of shared 'm' byte 0 of rank \d, which is an mbarrier",
        "not_declared":
            r"clusters of 2 blocks: the entry is declared for clusters of 1, by __cluster_dims__",
    },
    "multicast": {
        "multicast_without_first_barrier":
            r"TMA multicast: the block of rank \d need not run yet: no cluster barrier stands before",
        "multicast_before_wait": MULTICAST_RACE.format(THREAD),
        "multicast_over_distributed_reads": MULTICAST_RACE.format(THREAD),
        "block_ends_under_a_multicast":
            r"bulk load: the block ends while this load is under way on the mbarrier shared 'm' byte 0 of "
            r"rank 1 \(phase 0: 1 of 1 arrivals, 0 of 2048 bytes\)",
        "rank_beyond_the_cluster": r"TMA multicast: expected ranks below 2 as bits of a mask, got 7",
        "multicast_to_nobody": r"TMA multicast: expected ranks below 2 as bits of a mask, got 0",
        "foreign_init_without_fence":
            r"missing fence_mbarrier_init: TMA multicast completes on the mbarrier shared 'm' byte 0 of rank",
        "arrival_without_first_barrier":
            r"mbarrier.arrive: the block of rank \d need not run yet: no cluster barrier stands before",
        "block_ends_before_an_arrival": MAY_HAVE_ENDED,
        "foreign_arrival_too_many":
            r"mbarrier.arrive: one arrival too many at the mbarrier shared 'm' byte 0 of rank \d \(phase 0: "
            r"1 of 1 arrivals, 0 of 2048 bytes\)",
        "arrival_beyond_the_cluster": r"mbarrier.arrive: expected a rank below 2, got [23]",
        "foreign_barrier_not_initialised":
            r"mbarrier.arrive: expected an mbarrier, got shared 'm' byte 0 of rank 1, which nobody has init",
        "foreign_init_after_the_barrier":
            r"race: mbarrier.arrive of shared 'm' byte 0 of rank \d is not ordered after its mbarrier_init "
            r"by thread \(0,0,0\) of rank \d|of rank \d, which nobody has initialised as one",
        "slot_not_waited_for": MULTICAST_RACE.format(STORE),
        "own_block_waited_for": MULTICAST_RACE.format(STORE),
        "given_back_before_the_store": MULTICAST_RACE.format(STORE),
        "given_back_before_the_product": MULTICAST_RACE.format(r"wgmma of warps 0 to 3 of rank \d"),
        "given_back_by_another": MULTICAST_RACE.format(STORE),
        "given_back_after_ordinary_reads": OF_TILE,
        "arrival_missing_in_the_ring":
            r"deadlock: .*1 threads of rank \d wait at the mbarrier shared 'empty' byte 0 \(phase 0: 2 of 3 "
            r"arrivals\)",
        "own_share_expected":
            r"race: read of shared 'tile' byte \d+ while a bulk copy on mbarrier shared 'full' byte 0 of "
            r"rank \d writes it: no wait has covered that yet",
        "block_ends_before_its_ring": MAY_HAVE_ENDED,
    },
}  # fmt: skip
FILE = {entry: file for file, entries in REPORTS.items() for entry in entries}
WITHOUT_PLACE = ("not_declared",)

TILES, SHARE = 4, 256  # of multicast.cu: tiles of two shares, floats of a share


def planted(entry: str, bug: int) -> tuple[Launch, list[torch.Tensor]]:
    """The launch of a planted bug or of its clean twin, and fresh tensors for it."""
    multicast = FILE[entry] == "multicast"
    n = TILES * 2 * SHARE if multicast else 128
    sizes = (SHARE, 2, TILES), (4 * SHARE, 8 * SHARE), (SHARE, 1, 1)
    plan = launch_of(
        str(EMULATED / f"{FILE[entry]}.cu"), entry, {"BUG": bug}, Planted(n, HUGE, 0), grid=[2],
        block=[160 if multicast else 64], inputs=["x"], outputs=["y"], cluster=2,
        tensor_maps=[tiled("x", torch.float32, *sizes)] if multicast else (),
    )  # fmt: skip
    return plan, [torch.arange(1.0, n + 1), torch.zeros(2 * n if multicast else n)]


def marked_lines(entry: str) -> set[tuple[str, int]]:
    file = f"{FILE[entry]}.cu"
    rows = (EMULATED / file).read_text().splitlines()
    return {
        (file, i) for i, row in enumerate(rows, 1) if entry in row.partition("// <-")[2].split()
    }


@pytest.mark.parametrize("file", REPORTS)
def test_every_planted_kernel_has_a_row(file: str) -> None:
    text = (EMULATED / f"{file}.cu").read_text()
    found = re.findall(r"^ENTRY(?:_OF)?\((\w+)", text, re.MULTILINE)
    assert found == list(REPORTS[file])


@pytest.mark.parametrize("entry", FILE)
def test_planted_bug_is_reported(entry: str) -> None:
    for schedule, seed in [("forward", 0), ("reverse", 0), *(("random", i) for i in range(5))]:
        plan, (x, y) = planted(entry, bug=1)
        with emulate.schedule(schedule, seed), emulate.time_limit(1.0):
            with pytest.raises(KernelError, match=REPORTS[FILE[entry]][entry]) as caught:
                emulate.execute(plan, [x, y])
        if entry not in WITHOUT_PLACE:
            assert set(caught.value.places) & marked_lines(entry), (schedule, str(caught.value))
        assert (y == 0).all(), "a failed launch wrote"


@pytest.mark.parametrize("entry", FILE)
def test_clean_twin_is_silent(entry: str) -> None:
    for seed in range(5):
        plan, tensors = planted(entry, bug=0)
        with emulate.schedule("all", seed):
            emulate.execute(plan, tensors)


@pytest.mark.parametrize(
    "entry", [e for e in REPORTS["multicast"] if e.startswith(("slot", "own_", "given"))]
)
def test_the_ring_brings_every_tile_to_both_blocks(entry: str) -> None:
    plan, (x, y) = planted(entry, bug=0)
    emulate.execute(plan, [x, y])
    if entry == "given_back_before_the_product":  # overwrites a part of y by its sums
        x, y = x[2 * SHARE :], y.view(2, -1)[:, 2 * SHARE :]
    assert torch.equal(y.view(2, -1), x.expand(2, -1))


# ---- what kernels compute --------------------------------------------------------------------------------


def exchange(
    entry: str,
    cluster: int,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    grid: Sequence[int],
    block: Sequence[int],
    n: int = 0,
    rounds: int = 0,
    updates: bool = False,
) -> None:
    dtype = inputs[0].dtype if inputs else torch.float32
    plan = exchange_plan(entry, cluster, dtype, grid, block, n, rounds, updates)
    with emulate.schedule("all"):
        emulate.execute(plan, [*inputs, *outputs])


@pytest.mark.parametrize("cluster", SIZES)
def test_ranks(cluster: int) -> None:
    rank, blocks = (torch.empty(32 * 3 * 2, dtype=torch.int32) for _ in range(2))
    exchange("who", cluster, [], [rank, blocks], (32, 3, 2), (5, 3))
    assert rank.view(-1, 32).equal((torch.arange(32, dtype=torch.int32) % cluster).expand(6, 32))
    assert (blocks == cluster).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("cluster", SIZES)
def test_sum_over_a_cluster(cluster: int, dtype: torch.dtype) -> None:
    x = torch.randint(-99, 100, (32, 300)).to(dtype)
    y = torch.empty(32, dtype=dtype)
    exchange("sum", cluster, [x], [y], (32,), (64,), n=300)
    assert torch.equal(
        y.view(-1, cluster),
        x.view(-1, cluster * 300).sum(1, dtype=dtype)[:, None].expand(-1, cluster),
    )


@pytest.mark.parametrize("block", [(1,), (31,), (48,), (100, 1), (13, 7)])
def test_blocks_of_odd_sizes(block: tuple[int, ...]) -> None:
    x, y = torch.randint(-99, 100, (2, 4, 3, 50)).float(), torch.empty(2, 3, 4)
    exchange("sum", 4, [x], [y], (4, 3, 2), block, n=50)
    assert torch.equal(y, x.view(2, 3, 200).sum(2)[..., None].expand(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cluster", SIZES)
def test_ring(cluster: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, cluster, 70, dtype=dtype)
    for rounds in (1, 2, 5):
        y = torch.empty_like(x)
        exchange("pass_on", cluster, [x], [y], (2 * cluster,), (64,), 70, rounds)
        assert torch.equal(y, x.roll(rounds, 1))


@pytest.mark.parametrize("cluster", SIZES)
def test_histogram(cluster: int) -> None:
    x = torch.randint(0, 64, (3, cluster, 200), dtype=torch.int32)
    y = torch.empty(3, 64, dtype=torch.int32)
    exchange("histogram", cluster, [x], [y], (3 * cluster,), (64,), n=200)
    for got, values in zip(y, x.flatten(1), strict=True):
        assert torch.equal(got, torch.bincount(values, minlength=64).int())


@pytest.mark.parametrize("threads", [64, 1024])
@pytest.mark.parametrize("cluster", SIZES)
def test_order_within_a_block(cluster: int, threads: int) -> None:
    x, y = torch.randn(cluster, threads), torch.empty(cluster, threads)
    exchange("reverse", cluster, [x], [y], (cluster,), (threads,))
    assert torch.equal(y, x.flip(1).roll(-33, 1))


@pytest.mark.parametrize("cluster", SIZES)
def test_order_through_global_memory(cluster: int) -> None:
    x, y = torch.randn(2, cluster, 64), torch.zeros(2, cluster, 64)
    exchange("hand_over", cluster, [x], [y], (2 * cluster,), (64,), updates=True)
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("cluster", SIZES)
def test_what_blocks_do_by_themselves(cluster: int) -> None:
    """mbarriers, copies, named barriers, shuffles and wgmma of the blocks do not mix."""
    a, b = (torch.randint(-3, 4, (16, n, 16)).half() for n in (64, 8))
    y, totals = torch.empty(16, 64, 8), torch.empty(16, 4)
    inputs = [pieces(a), pieces(b)]
    with emulate.schedule("all"):
        emulate.execute(tiles_plan(cluster, 16, 3), [*inputs, y, totals])
    product = a.float() @ b.float().mT
    following = product.view(-1, cluster, 64, 8).roll(-1, 1).view(16, 64, 8)
    assert emulate.last_counters().wgmma_instructions == 16 * 3
    assert torch.equal(y, 3 * (product + following))
    assert torch.equal(totals, 3 * following.view(16, 4, -1).sum(2))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("cluster", SIZES[:-1])
def test_blocks_load_tiles_for_each_other(cluster: int, share: str) -> None:
    """By multicast, through a ring whose slots are given back to all blocks that load them."""
    for rounds in (1, 7):
        case = Multicast(SHARES[share], cluster, rounds=rounds)
        inputs = case.inputs(torch.Generator().manual_seed(rounds))
        want = case.expected(inputs)["y"]
        y = torch.empty_like(want)
        with emulate.schedule("all"):
            emulate.execute(case.plan(inputs, {"y": y}), [*inputs.values(), y])
        assert torch.equal(y, want)


def test_a_multicast_reads_global_memory_once() -> None:
    case = Multicast(SHARES["im2col_2d"], cluster=4, clusters=1)
    inputs = case.inputs(torch.Generator().manual_seed(0))
    want = case.expected(inputs)["y"]
    y = torch.empty_like(want)
    with emulate.profile() as launches:
        emulate.execute(case.plan(inputs, {"y": y}), [*inputs.values(), y])
    (profile,) = launches
    inside = int((want[0] != 0).sum())  # of x; what is outside of it is zero, and not read
    assert inside < want[0].numel()
    assert profile.counters.global_bytes_read == 4 * (inside + inputs["at"].numel())
    assert profile.counters.global_bytes_written == 4 * want.numel()


def test_the_schedules_order_the_ranks_differently() -> None:
    """Which block comes first at an atomic counter."""
    orders = []
    for schedule in SCHEDULES:
        turn, count = torch.empty(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        plan = launch_of(
            str(EMULATED / "exchange.cu"), "queue", {"ELEMENT": "float"}, Exchange(0, 0), grid=[8], block=[1],
            inputs=[], outputs=["turn"], updates=["count"], cluster=8,
        )  # fmt: skip
        with emulate.schedule(schedule, seed=1):
            emulate.execute(plan, [turn, count])
        assert sorted(turn.tolist()) == list(range(8))
        orders.append(turn.tolist())
    assert orders[0] == list(range(8)) and orders[1] == list(range(7, -1, -1))
    assert orders[2] not in orders[:2]


def test_counters_and_profile_of_a_cluster() -> None:
    """Barriers and traffic of every block count; distributed accesses are accesses to shared memory."""
    x, found = torch.ones(16, 256), {}
    for cluster in (1, 8):
        y = torch.empty(16)
        plan = exchange_plan("sum", cluster, x.dtype, (16,), (64,), n=256)
        with emulate.profile() as launches:
            emulate.execute(plan, [x, y])
        (profile,) = launches
        found[cluster] = profile
        assert profile.counters.block_barriers == 16
        assert profile.counters.global_bytes_read == 16 * 256 * 4
        assert profile.counters.global_bytes_written == 16 * 4
        assert profile.global_sectors == 16 * 256 * 4 // 32 + 16
    # One load of `total` from each block of the cluster.
    more = found[8].counters.shared_accesses - found[1].counters.shared_accesses
    assert more == 16 * (8 - 1)


# ---- launches --------------------------------------------------------------------------------------------


def plan_of(cluster: int | None, grid: Sequence[int] = (16,)) -> Launch:
    return launch_of(
        str(EMULATED / "exchange.cu"), "sum", {"ELEMENT": "float"}, Exchange(8, 0), grid=grid, block=[64],
        inputs=["x"], outputs=["y"], cluster=cluster,
    )  # fmt: skip


@pytest.mark.parametrize("cluster", [0, 3, 6, 32, -2])
def test_sizes_are_powers_of_two(cluster: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a power of two from 1 to 16, got {cluster}$"):
        plan_of(cluster)


def test_clusters_divide_the_grid() -> None:
    with pytest.raises(ValueError, match=r"grid: expected x to be a multiple .* 8 blocks, got 12$"):
        plan_of(8, (12, 8))
    assert plan_of(4, (12, 7)).cluster == 4


def test_a_cluster_is_a_constant() -> None:
    assert ("CLUSTER", 8) in plan_of(8).kernel.constants and plan_of(8).cluster == 8
    assert ("CLUSTER", 1) in plan_of(1).kernel.constants and plan_of(1).cluster == 1
    assert "CLUSTER" not in dict(plan_of(None).kernel.constants) and plan_of(None).cluster == 1


# ---- on a GPU --------------------------------------------------------------------------------------------


class _Function:
    ptr = 1234

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> tuple[_Function, list[tuple[int, int, int]]]:
    """Stand-ins for CuPy's function and driver, and for a GPU's architecture."""
    function, attributes = _Function(), []
    driver = types.SimpleNamespace(funcSetAttribute=lambda *a: attributes.append(a))
    cuda = types.ModuleType("cupy.cuda")
    cuda.driver = driver  # type: ignore[attr-defined]
    cuda.runtime = types.SimpleNamespace(setDevice=lambda index: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(jit, "_function", lambda kernel, shared, index: function)
    monkeypatch.setattr(jit, "_stream", lambda pointer, index: None)
    monkeypatch.setattr(jit, "arch_of", lambda index: "90a")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 0, raising=False)
    return function, attributes


def run(cluster: int) -> None:
    jit.execute(plan_of(cluster), (torch.zeros(16 * 8), torch.zeros(16)), 0)


@pytest.mark.parametrize("cluster", SIZES)
def test_an_ordinary_launch(
    cluster: int, cupy: tuple[_Function, list[tuple[int, int, int]]]
) -> None:
    run(cluster)
    function, attributes = cupy
    assert [call[:2] for call in function.calls] == [((16, 1, 1), (64, 1, 1))]
    # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    assert attributes == ([(1234, 14, 1)] if cluster == 16 else [])


def test_number_of_the_attribute() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    assert int(attribute) == jit.NON_PORTABLE_CLUSTER_SIZE_ALLOWED


@pytest.mark.parametrize("arch", ["75", "80", "89"])
def test_gpus_without_clusters(
    arch: str,
    cupy: tuple[_Function, list[tuple[int, int, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jit, "arch_of", lambda index: arch)
    with pytest.raises(
        RuntimeError, match=rf"clusters of 4 blocks: .* 9.0 or newer, got {arch[0]}"
    ):
        run(4)
    run(1)
    assert len(cupy[0].calls) == 1


@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
@pytest.mark.parametrize("cluster", [1, 2, 16])
def test_compiles(arch: str, cluster: int) -> None:
    pytest.importorskip(
        "cuda.bindings.nvrtc", reason="NVRTC is missing: pip install 'cnnops[test]'"
    )
    for dtype in (torch.float32, torch.float64):
        constants = (
            ("CLUSTER", cluster), ("ELEMENT", ELEMENT[dtype]), ("PARAMS_BYTES", ctypes.sizeof(Exchange)),
        )  # fmt: skip
        source = str(EMULATED / "exchange.cu")
        if arch == "80" and cluster > 1:
            with pytest.raises(jit.CompileError, match="clusters of several blocks need sm_90"):
                jit.compile_cubin(source, constants, arch)
            continue
        _, log = jit.compile_cubin(source, constants, arch)
        assert "error" not in log and "warning" not in log
        assert {entry.entry for entry in jit.resources(log)} >= {"sum", "pass_on", "histogram"}
        assert all(entry.stack_bytes == 0 for entry in jit.resources(log))
    if arch == "90a":
        sized = (("CLUSTER", cluster), ("PARAMS_BYTES", ctypes.sizeof(Tiles)))
        _, log = jit.compile_cubin(str(EMULATED / "cluster_tiles.cu"), sized, arch)
        assert all(entry.stack_bytes == 0 for entry in jit.resources(log))
    if arch == "90a" and cluster == 2:
        plan, _ = planted("slot_not_waited_for", bug=0)
        _, log = jit.compile_cubin(plan.kernel.source, plan.kernel.constants, arch)
        assert "warning" not in log and "serialized" not in log, log
        assert all(entry.stack_bytes == 0 for entry in jit.resources(log))
