"""Asynchronous instructions under the emulator: which bugs it finds and where, and what they compute.

The kernels are in tests/emulated: async.cu (cp.async, named barriers) and hopper.cu (mbarriers, TMA, wgmma)
hold planted bugs, compiled with BUG = 1 and, as their own clean twins, with BUG = 0; the others compute.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden.async_items import (
    CONVOLUTIONS,
    EMULATED,
    IM2COL,
    TILES,
    box_of,
    box_plan,
    bytes_plan,
    columns,
    map_of,
    planted_plan,
)
from test_emulator import SCHEDULES

from cnnops.cuda import emulate, jit, tensor_map
from cnnops.cuda.emulate import KernelError
from cnnops.cuda.kernel import Launch
from cnnops.cuda.tensor_map import Swizzle, im2col, tiled

if emulate.available() is not None:
    pytest.skip(f"kernels cannot be emulated: {emulate.available()}", allow_module_level=True)


# ---- planted bugs ----------------------------------------------------------------------------------------


# What the report must say, apart from its place.
UNDER_WAY = (
    r"race: (read|write) of shared '\w+' byte \d+ while {} writes it: no wait has covered that yet"
)
UNORDERED = r"race: .* of shared '{}' .* not ordered after the (read|write) by"
UNWRITTEN = r"read of shared '{}' byte \d+ before anything has written it"
UNFENCED = r"missing fence_proxy_async: (read|write) of shared '{}' byte \d+ by TMA or wgmma after the write"

COPY = UNDER_WAY.format(r"a cp.async of thread \(\d+,0,0\)")
LOAD = UNDER_WAY.format(r"a bulk copy on mbarrier shared 'm' byte 0")

REPORTS = {
    "async": {
        "copy_not_waited_for": COPY,
        "copy_not_committed": COPY,
        "wait_for_too_few": COPY,
        "copy_without_barrier": f"{COPY}|{UNORDERED.format('s')}|{UNWRITTEN.format('s')}",
        "target_written": COPY,
        "stage_filled_early": f"{COPY}|{UNORDERED.format('s')}",
        "source_written": r"race: the source of this cp.async, 'y' byte \d+, has been written",
        "copy_to_odd_address":
            r"misaligned: cp.async: expected a target at a multiple of 16 bytes, got shared 's' byte \d+",
        "copy_from_odd_address":
            r"misaligned: cp.async: expected a source at a multiple of 16 bytes, got 'x' byte \d+",
        "copy_from_behind": r"out of bounds: read of 16 bytes at byte 512 of 'x'",
        "copy_to_behind": r"out of bounds: write of 4 bytes at byte 512 of shared 's'",
        "copy_too_much": r"cp.async: expected at most 4 bytes of source, got 8",
        "copy_forgotten": r"cp.async: the thread has returned .* no wait covers it",
        "barrier_missing": f"{UNORDERED.format('s')}|{UNWRITTEN.format('s')}",
        "barrier_of_two": f"{UNORDERED.format('s')}|{UNWRITTEN.format('s')}",
        "counts_differ":
            r"named barrier 3: this thread counts on (96|128) threads, \d+ others .* on (96|128)",
        "barrier_of_the_block": r"named barrier: expected a number from 1 to 15, got 0",
        "odd_count": r"named barrier 1: expected a multiple of 32 threads .* got 100",
        "half_a_warp": r"named barrier 1: of warp \d only the lanes 0000ffff have arrived",
        "warp_never_comes":
            r"deadlock: .*96 threads wait at named barrier 5 \(96 of 128 threads have arrived\)",
        "arrives_again": r"named barrier 1: the thread arrives again before the others have",
        "ping_pong": rf"named barrier \d: the thread arrives again|{UNORDERED.format('s')}",
    },
    "hopper": {
        "barrier_not_initialised":
            r"mbarrier.arrive: expected an mbarrier, got shared 'm' byte 8, which nobody",
        "init_without_barrier":
            r"race: mbarrier.arrive of shared 'm' byte 0 is not ordered after its mbarrier_init|which "
            r"nobody has initialised",
        "init_without_fence":
            r"missing fence_mbarrier_init: TMA load completes on the mbarrier shared 'm' byte 0",
        "barrier_overwritten": r"write of shared 'm' byte 0, which is an mbarrier",
        "initialised_twice": r"mbarrier.init: shared 'm' byte 0 is an mbarrier already",
        "barrier_at_odd_address":
            r"mbarrier.init: expected an address that is a multiple of 8, got shared 'm' byte 4",
        "one_arrival_too_many":
            r"mbarrier.arrive: one arrival too many at the mbarrier .* 1 of 1 arrivals, 0 of 512 bytes",
        "too_few_arrivals":
            r"deadlock: 128 threads wait at the mbarrier shared 'm' byte 0 \(phase 0: 96 of 128 "
            r"arrivals\) hopper.cu:\d+",
        "try_wait_taken_for_wait": rf"{UNORDERED.format('tile')} a bulk copy on mbarrier shared 'm' byte 0",
        "wrong_parity": f"{LOAD}|{UNWRITTEN.format('tile')}",
        "written_after_arrival": UNORDERED.format("s"),
        "tile_not_waited_for": LOAD,
        "one_thread_waits": f"{LOAD}|{UNORDERED.format('tile')}|{UNWRITTEN.format('tile')}",
        "too_many_bytes_expected":
            r"deadlock: 128 threads wait at the mbarrier .* \(phase 0: 1 of 1 arrivals, 512 of 576 bytes\)",
        "too_few_bytes_expected":
            r"deadlock: 128 threads wait at the mbarrier .* \(phase 0: 1 of 1 arrivals, 512 of 448 bytes\)",
        "no_bytes_expected": f"{LOAD}|{UNWRITTEN.format('tile')}",
        "tile_at_odd_address":
            r"misaligned: TMA load: expected a tile at a multiple of 128 bytes, got shared 'tiles' byte 64",
        "tile_too_small":
            r"out of bounds: write of 512 bytes at byte 0 of shared 'tile', which has 384 bytes",
        "wrong_rank": r"TMA load: expected a tensor map of 3 dimensions, got one of 2",
        "map_is_not_for_im2col": r"TMA load: expected a tensor map for im2col, got one for tiles",
        "not_a_map": r"TMA load: expected a tensor map that the launch has passed, got something else",
        "released_early": f"{LOAD}|{UNORDERED.format('tile')}",
        "not_released": f"{LOAD}|{UNORDERED.format('tile')}",
        "given_back_by_one_lane": f"{LOAD}|{UNORDERED.format('tile')}",
        "cleared_without_fence": UNFENCED.format("tile"),
        "load_forgotten":
            r"bulk load: the block ends while this load is under way on the mbarrier shared 'm' byte 0",
        "odd_bulk_size":
            r"misaligned: bulk load: expected addresses and a size that are multiples of 16, got .* and 504",
        "bulk_from_behind": r"out of bounds: read of 512 bytes at byte 16 of 'x', which has 512",
        "store_without_fence": UNFENCED.format("tile"),
        "fence_behind_the_barrier": UNFENCED.format("tile"),
        "store_without_barrier": f"{UNORDERED.format('tile')}|{UNWRITTEN.format('tile')}",
        "tile_rewritten":
            r"race: write of shared 'tile' .* not ordered after the read by a bulk store of thread \(0,0,0\)",
        "store_not_committed": r"bulk store: the thread has returned .* no bulk_wait_read covers it",
        "result_read_early": r"race: read of 'y' byte 20 while a bulk store of thread \(0,0,0\) writes it",
        "store_to_input": r"write of input 'x' at byte 0",
        "first_fence_missing": r"missing wgmma_fence: none stands before the warpgroup's first wgmma",
        "second_fence_missing":
            r"missing wgmma_fence: registers of this wgmma have been accessed since the last one",
        "product_not_waited_for":
            r"race: read of a register of the wgmma at hopper.cu:\d+: no wgmma_wait has covered it",
        "product_not_committed":
            r"race: read of a register of the wgmma at hopper.cu:\d+: no wgmma_wait has covered it",
        "operands_without_fence": UNFENCED.format("s"),
        "operands_without_barrier": f"{UNORDERED.format('s')}|{UNWRITTEN.format('s')}",
        "operands_rewritten":
            r"race: write of shared 's' .* not ordered after the read by wgmma of warps 0 to 3",
        "warps_part":
            r"divergent warpgroup: this thread is at this wgmma while \d+ others wait at the wgmma of "
            r"hopper.cu",
        "warp_leaves": r"wgmma.fence: \d+ threads of the warpgroup (wait, but thread .* has|have) returned",
        "warp_stays_away": r"deadlock: .*96 threads wait for their warpgroup at hopper.cu:\d+",
        "descriptors_differ": r"wgmma: descriptors or `accumulate` of this thread differ",
        "operand_behind": r"out of bounds: read of 16 bytes at byte 2304 of shared 's', which has 2304",
        "tile_off_the_pattern":
            r"misaligned: wgmma: expected a tile of B at a multiple of 1024 bytes .* got shared 'b' byte 128",
        "a_rewritten": r"race: write of a register of the wgmma at hopper.cu:\d+",
        "descriptor_at_odd_address": r"misaligned: wgmma_descriptor: expected multiples of 16",
        "copied_without_fence": UNFENCED.format("s"),
        "stage_given_back_early":
            r"race: write of shared 'tile' byte 0 is not ordered after the read by wgmma of warps 0 to 3",
        "odd_number_of_registers": r"setmaxnreg: expected a multiple of 8 from 24 to 256, got 44",
        "registers_of_one_warp": r"deadlock: .*32 threads wait for their warpgroup at",
    },
}  # fmt: skip
FILE = {entry: file for file, entries in REPORTS.items() for entry in entries}


def planted(entry: str, bug: int) -> tuple[Launch, list[torch.Tensor]]:
    """The launch of a planted bug or of its clean twin, and fresh tensors for it."""
    tensors = [torch.arange(1.0, 129.0), torch.zeros(128)]
    return planted_plan(FILE[entry], entry, bug), tensors


def marked_lines(entry: str) -> set[tuple[str, int]]:
    file = f"{FILE[entry]}.cu"
    rows = (EMULATED / file).read_text().splitlines()
    return {
        (file, i) for i, row in enumerate(rows, 1) if entry in row.partition("// <-")[2].split()
    }


def test_every_planted_kernel_has_a_row() -> None:
    found = set(re.findall(r"^ENTRY\((\w+)\)", (EMULATED / "hopper.cu").read_text(), re.MULTILINE))
    found |= set(re.findall(r"__global__ void (\w+)\(", (EMULATED / "async.cu").read_text()))
    assert found == {*FILE, "copy_by_2_stages", "copy_by_4_stages"}


@pytest.mark.parametrize("entry", FILE)
def test_planted_bug_is_reported(entry: str) -> None:
    for schedule in SCHEDULES:
        plan, (x, y) = planted(entry, bug=1)
        with emulate.schedule(schedule), emulate.time_limit(1.0):
            with pytest.raises(KernelError, match=REPORTS[FILE[entry]][entry]) as caught:
                emulate.execute(plan, [x, y])
        assert set(caught.value.places) & marked_lines(entry), (schedule, str(caught.value))
        assert (y == 0).all(), "a failed launch wrote"


@pytest.mark.parametrize("entry", FILE)
def test_clean_twin_is_silent(entry: str) -> None:
    plan, tensors = planted(entry, bug=0)
    with emulate.schedule("all"):
        emulate.execute(plan, tensors)


# ---- what kernels compute --------------------------------------------------------------------------------
# The golden items of these kernels (test_golden.py) are one problem a kind; here are more of each.


@pytest.mark.parametrize("n", [1, 511, 512, 3000])
@pytest.mark.parametrize("stages", [2, 4])
def test_cp_async_pipeline(stages: int, n: int) -> None:
    x, y = torch.randn(n), torch.empty(n)
    with emulate.schedule("all"):
        emulate.execute(planted_plan("async", f"copy_by_{stages}_stages", 0, n), [x, y])
    assert torch.equal(x, y)


def test_zero_fill_of_cp_async() -> None:
    plan, (x, y) = planted("copy_from_behind", bug=0)
    emulate.execute(plan, [x, y])
    assert torch.equal(y, torch.cat([x[4:], torch.zeros(4)]))


@pytest.mark.parametrize("name", TILES)
def test_tma_stores_a_box(name: str) -> None:
    """What lies outside of the tensor is left out; what lies outside of the box is left as it was."""
    tile = TILES[name]._replace(steps=(1,) * 5)
    x, y = (torch.randn(tile.size, dtype=torch.float64).to(tile.dtype) for _ in range(2))
    to = [n - b + 2 for n, b in zip(reversed(tile.size), tile.box, strict=True)]
    maps = [map_of(n, t, box=tile.box, swizzle=tile.swizzle) for n, t in (("x", x), ("y", y))]
    source, want = box_of(x, tile), y.clone()
    inside = [slice(max(t, 0), t + b) for t, b in zip(to, tile.box, strict=True)]
    within = [slice(max(-t, 0), n - t) for t, n in zip(to, reversed(tile.size), strict=True)]
    want[tuple(inside[::-1])] = source[tuple(within[::-1])]
    with emulate.schedule("all"):
        emulate.execute(box_plan("copy_box", maps, tile.at, to, updates=["y"]), [x, y])
    assert torch.equal(y, want)


@pytest.mark.parametrize("n", [4, 256, 2000])
def test_plain_bulk_copies(n: int) -> None:
    x, y = torch.randn(n), torch.empty(n)
    with emulate.schedule("all"):
        emulate.execute(bytes_plan(n), [x, y])
    assert torch.equal(x, y)


@pytest.mark.parametrize("name", [name for name, case in IM2COL.items() if len(case.size) < 5])
def test_columns_are_those_of_unfold(name: str) -> None:
    """The reference for im2col itself."""
    case = IM2COL[name]
    x = torch.randn(case.size)
    if x.dim() == 3:  # unfold knows of two dimensions
        x = x.unsqueeze(1)
        case = case._replace(
            size=tuple(x.shape), taps=(1, *case.taps), stride=(1, *case.stride), padding=(0, *case.padding),
            dilation=(1, *case.dilation),
        )  # fmt: skip
    taps = list(itertools.product(*map(range, case.taps)))
    unfolded = torch.nn.functional.unfold(
        x.permute(0, 3, 1, 2), case.taps, case.dilation, case.padding, case.stride
    ).view(case.size[0], case.size[-1], len(taps), -1)
    for i, tap in enumerate(taps):
        assert torch.equal(columns(x, case, tap), unfolded[:, :, i].transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("name", IM2COL)
def test_tma_loads_columns(name: str) -> None:
    case = IM2COL[name]
    x, y = torch.randn(case.size), torch.empty(case.pixels, case.channels)
    taps = list(itertools.product(*map(range, case.taps)))
    total = case.size[0] * math.prod(case.outputs)
    for first, channel in ((0, 0), (total // 3, 0), (total - 2, case.size[-1] // 2)):
        for tap in (taps[0], taps[len(taps) // 2], taps[-1]):
            emulate.execute(case.plan(x, first, channel, tap), [x, y])
            assert torch.equal(y, case.expected(x, first, channel, tap)), (first, channel, tap)


@pytest.mark.parametrize(
    ("at", "offsets", "report"),
    [
        ((0, -2, 0, 0), (0, 0), "expected coordinate 1 within the bounding box, -1 to 5, got -2"),
        ((0, 0, 8, 0), (0, 0), "expected coordinate 2 within the bounding box, -1 to 7, got 8"),
        ((0, 0, 0, 0), (0, 256), "expected im2col offsets of at most 255, got 256"),
    ],
)
def test_im2col_coordinates_are_checked(
    at: tuple[int, ...], offsets: tuple[int, ...], report: str
) -> None:
    case = IM2COL["2d"]
    x, y = torch.randn(case.size), torch.empty(case.pixels, case.channels)
    with pytest.raises(KernelError, match=f"TMA load: {report}"):
        emulate.execute(box_plan("load_box", [case.map_of(x)], at, offsets=offsets), [x, y])


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_implicit_gemm(name: str, stages: int) -> None:
    conv = CONVOLUTIONS[name]
    inputs = {"x": torch.randn(conv.x).half(), "w": torch.randn(conv.w).half()}
    want = conv.expected(inputs)["y"]
    y = torch.empty_like(want)
    with emulate.schedule("all"):
        emulate.execute(conv.plan(inputs, {"y": y}, stages), [*inputs.values(), y])
    assert (y - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_implicit_gemm_that_gives_stages_back_early(schedule: str) -> None:
    conv = CONVOLUTIONS["3x3"]
    inputs = conv.inputs(torch.Generator())
    y = torch.empty_like(conv.expected(inputs)["y"])
    report = r"race: write of shared 'tiles' .* not ordered after the read by wgmma of warps 4 to 7"
    with emulate.schedule(schedule), pytest.raises(KernelError, match=report):
        emulate.execute(conv.plan(inputs, {"y": y}, 2, bug=1), [*inputs.values(), y])


# ---- tensor maps -----------------------------------------------------------------------------------------

TILED = {"dtype": torch.float32, "sizes": (32, 8), "strides": (128,), "box": (8, 4)}
COLUMNS = {
    "dtype": torch.float16, "sizes": (64, 9, 9, 2), "strides": (128, 1152, 10368), "lower": (-1, -1),
    "upper": (-1, -1), "channels": 64, "pixels": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.complex64}, "tensorDataType: expected one of torch.float32, .*, got torch.complex"),
        ({"sizes": ()}, "tensorRank: expected 1 to 5, got 0"),
        ({"sizes": (32, 8, 4)}, "globalStrides, elementStrides: expected 2 and 3 of them, got 1 and 3"),
        ({"sizes": (0, 8)}, r"globalDim: expected 1 to 2\^32, got \(0, 8\)"),
        ({"strides": (132,)}, r"globalStrides: expected multiples of 16 below 2\^40, got \(132,\)"),
        ({"strides": (2**40,)}, r"globalStrides: expected multiples of 16 below 2\^40"),
        ({"box": (8,)}, r"boxDim: expected 2 numbers from 1 to 256, got \(8,\)"),
        ({"box": (8, 257)}, r"boxDim: expected 2 numbers from 1 to 256, got \(8, 257\)"),
        ({"box": (6, 4)}, "inner dimension of the box: expected a multiple of 16 bytes, got 24"),
        ({"element_strides": (1, 9)}, r"elementStrides: expected 1 to 8, got \(1, 9\)"),
        ({"element_strides": (2, 1)}, r"elementStrides\[0\]: expected 1, got 2"),
        ({"swizzle": Swizzle.B64}, "inner dimension of a box with .*B64.*: expected 64 bytes, got 32"),
    ],
)  # fmt: skip
def test_tiled_maps_are_checked(change: dict[str, Any], message: str) -> None:
    tiled("x", **TILED)
    with pytest.raises(RuntimeError, match=f"^tensor map of x: {message}"):
        tiled("x", **{**TILED, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (64, 9), "strides": (128,)}, "tensorRank: expected 3 to 5, got 2"),
        ({"lower": (-129, 0)}, r"pixelBoxLowerCorner: expected 2 numbers from -128 to 127, got \(-129, 0\)"),
        ({"upper": (0,)}, r"pixelBoxUpperCorner: expected 2 numbers from -128 to 127, got \(0,\)"),
        ({"upper": (-10, 0)}, "pixelBoxUpperCorner: expected a bounding box that is not empty"),
        ({"channels": 264}, "channelsPerPixel: expected 1 to 256, got 264"),
        ({"pixels": 1025}, "pixelsPerColumn: expected 1 to 1024, got 1025"),
        ({"channels": 4}, "inner dimension of the box: expected a multiple of 16 bytes, got 8"),
    ],
)  # fmt: skip
def test_im2col_maps_are_checked(change: dict[str, Any], message: str) -> None:
    im2col("x", **COLUMNS)
    with pytest.raises(RuntimeError, match=f"^tensor map of x: {message}"):
        im2col("x", **{**COLUMNS, **change})


@pytest.mark.parametrize("encode", [tensor_map.encoded, lambda m, t: tensor_map.packed(m, t, 0)])
def test_tensors_are_checked_against_their_maps(encode: Callable[..., bytes]) -> None:
    x = torch.zeros(8, 32)
    map_ = tiled("x", **TILED)
    for wrong, message in (
        (None, "dtype: expected torch.float32, got no tensor"),
        (x.double(), "dtype: expected torch.float32, got torch.float64"),
        (x[:7], "globalDim, globalStrides: expected at most 896 bytes, got 1024"),
        (x[:0], "globalDim, globalStrides: expected at most 0 bytes, got 1024"),
        (
            torch.zeros(8 * 32 + 4)[1:257].view(8, 32),
            "globalAddress: expected a multiple of 16, got 0x",
        ),
    ):
        with pytest.raises(RuntimeError, match=f"tensor map of x: {message}"):
            encode(map_, wrong)


def test_what_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="CUDA bindings are missing")
    asked: list[tuple[Any, ...]] = []

    class Encoded:
        opaque = [driver.cuuint64_t(i) for i in range(16)]

    def encode(*arguments: Any) -> tuple[int, Encoded]:
        asked.append(arguments)
        return 0, Encoded()

    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", encode)
    monkeypatch.setattr(driver, "cuTensorMapEncodeIm2col", encode)
    x, image = torch.zeros(8, 32), torch.zeros(2, 9, 9, 64, dtype=torch.float16)
    tiles = tiled("x", **{**TILED, "element_strides": (1, 2)}, offset=16, swizzle=Swizzle.B32)
    with pytest.raises(RuntimeError, match="at most 1024 bytes, got 1040"):
        tensor_map.encoded(tiles, x)
    tiles = replace(tiles, sizes=(28, 8))
    for map_, tensor in ((tiles, x), (im2col("x", **COLUMNS), image)):
        first = tensor_map.encoded(map_, tensor)
        assert first == struct.pack("<16Q", *range(16)) == tensor_map.encoded(map_, tensor)

    def plain(argument: Any) -> Any:
        return [int(v) for v in argument] if isinstance(argument, list) else int(argument)

    types = driver.CUtensorMapDataType
    assert [[plain(a) for a in arguments] for arguments in asked] == [
        [int(types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32), 2, x.data_ptr() + 16, [28, 8], [128],
         [8, 4], [1, 2], 0, 1, 2, 0],
        [int(types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16), 4, image.data_ptr(), [64, 9, 9, 2],
         [128, 1152, 10368], [-1, -1], [-1, -1], 64, 64, [1, 1, 1, 1], 0, 0, 2, 0],
    ]  # fmt: skip


def test_a_launch_is_checked_against_its_entry() -> None:
    plan, tensors = planted("store_to_input", bug=0)
    for maps, message in (
        (
            plan.tensor_maps[:1],
            "expected the entry's 5 parameters, got 2 tensors, 1 tensor maps and a params",
        ),
        ((), "expected the entry's 5 parameters, got 2 tensors and a params struct"),
    ):
        with pytest.raises(ValueError, match=message):
            emulate.execute(replace(plan, tensor_maps=maps), tensors)
    without = planted_plan("async", "copy_too_much", 0)
    with pytest.raises(
        ValueError, match="expected the entry's 3 parameters, got 2 tensors, 1 tensor maps"
    ):
        emulate.execute(replace(without, tensor_maps=plan.tensor_maps[:1]), tensors)


# ---- on a GPU --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "arch"),
    [("async", "80"), ("async", "90a"), ("hopper", "90a"), ("implicit_gemm", "90a")],
)
def test_compiles_without_spills(file: str, arch: str) -> None:
    pytest.importorskip(
        "cuda.bindings.nvrtc", reason="NVRTC is missing: pip install 'cnnops[test]'"
    )
    plan = (
        CONVOLUTIONS["3x3"].plan(*EMPTY) if file == "implicit_gemm" else planted_plan(file, "", 0)
    )
    _, log = jit.compile_cubin(plan.kernel.source, plan.kernel.constants, arch)
    entries = jit.resources(log)
    assert entries and not [e for e in entries if e.stack_bytes or e.spill_store_bytes], log
    assert "warning" not in log and "serialized" not in log, log


EMPTY = (
    {"x": torch.empty(2, 9, 8, 64, dtype=torch.float16), "w": torch.empty(64, 3, 3, 64, dtype=torch.float16)},
    {"y": torch.empty(2, 9, 8, 64)},
)  # fmt: skip
