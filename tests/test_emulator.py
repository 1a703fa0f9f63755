"""The emulator: what it computes, which bugs it finds and where, and how it keeps what it compiled.

The kernels are in tests/emulated. Those with a planted bug are compiled with BUG = 1 and, as their own clean
twin, with BUG = 0.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cnnops import cache
from cnnops.cuda import emulate, emulator_build
from cnnops.cuda.emulate import KernelError
from cnnops.cuda.kernel import Launch, kernels_dir, launch_of

if emulate.available() is not None:
    pytest.skip(f"kernels cannot be emulated: {emulate.available()}", allow_module_level=True)

EMULATED = Path(__file__).parent / "emulated"
SCHEDULES = ("forward", "reverse", "random")
HUGE = 2**31 - 1


class Planted(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int), ("huge", ctypes.c_int), ("zero", ctypes.c_int)]


class Numbers(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int), ("x_stride", ctypes.c_int), ("y_stride", ctypes.c_int)]


# ---- planted bugs ----------------------------------------------------------------------------------------


class Bug(NamedTuple):
    file: str
    report: str
    launch: dict[str, Any] = {}  # what differs from one block of 128 threads on 128 floats


PLANTED = {
    "read_behind": Bug("memory", r"out of bounds: read of 4 bytes at byte 512 of 'x', which has 512 bytes"),
    "read_before": Bug("memory", r"out of bounds: read of 4 bytes at byte -4 of 'x'"),
    "write_behind": Bug("memory", r"out of bounds: write of 4 bytes at byte 512 of 'y'"),
    "write_input": Bug("memory", r"write of input 'x' at byte \d+"),
    "misaligned_load": Bug("memory", r"misaligned: .* 'x' byte \d+ .* alignment of 16 bytes"),
    "misaligned_pack": Bug("memory", r"misaligned: write at 'y' byte \d+ .* alignment of 8 bytes"),
    "misaligned_shared": Bug("memory", r"misaligned: .* shared 's' byte 12 .* alignment of 8 bytes"),
    "null_tensor": Bug(
        "memory",
        r"null pointer: read of 4 bytes at null \+ \d+; null in this launch: 'x'",
        {"x": None},
    ),
    "shared_index": Bug("memory", r"out of bounds: index 32 is outside the array's type"),
    "shared_behind": Bug("memory", r"out of bounds: write of 4 bytes at byte 512 of shared 's', which has"),
    "shared_edge": Bug("memory", r"out of bounds: read of 4 bytes at byte (-4|512) of shared 's', which has"),
    "dynamic_behind": Bug(
        "memory",
        r"out of bounds: write of 4 bytes at byte 512 of shared 'dynamic'",
        {"shared_bytes": 512},
    ),
    "uninitialised_shared": Bug("memory", r"read of shared 's' byte 508 before anything has written it"),
    "local_index": Bug("memory", r"out of bounds: index 4 is outside the array's type"),
    "foreign_stack": Bug("memory", r"out of bounds: read of 4 bytes in the local memory of thread \(0,0,0\)"),
    "unwritten": Bug("memory", r"never written: y\[5\] and 0 more of 128 elements"),
    "read_output": Bug("memory", r"read of 'y' byte \d+ before anything has written it"),
    "no_barrier_after_write": Bug("races", r"race: .* shared 's' .* not ordered after the (read|write)"),
    "no_barrier_after_read": Bug("races", r"race: .* shared 'tile' .* not ordered after the (read|write)"),
    "third_reader": Bug("races", r"race: write of shared 's' byte 0 is not ordered after the read"),
    "no_syncwarp": Bug("races", r"race: .* shared 's' .* not ordered after the (read|write)"),
    "shuffle_is_no_fence": Bug("races", r"race: .* shared 's' .* not ordered after the (read|write)"),
    "half_syncwarp": Bug("races", r"race: .* shared 's' .* not ordered after the (read|write)"),
    "syncwarp_for_block": Bug("races", r"race: .* shared 's' .* not ordered after the (read|write)"),
    "bytes": Bug("races", r"race: write of shared 's' byte 71 is not ordered after the write"),
    "odd_sizes": Bug("races", r"race: write of shared 's' byte 426 is not ordered after the write"),
    "add_in_block": Bug("races", r"race: read of 'sum' byte 0 is not ordered after the write"),
    "add_across_blocks": Bug(
        "races",
        r"race: read of 'sum' byte 0 .* of block .* cannot wait for each other",
        {"grid": 2},
    ),
    "write_twice": Bug(
        "races",
        r"race: write of 'y' byte \d+ .* after the write .* of block",
        {"grid": 2, "block": 64},
    ),
    "read_other_block": Bug("races", r"race: .* of 'sum' byte \d+ .* of block", {"grid": 2, "block": 64}),
    "global_in_block": Bug("races", r"race: .* of 'y'|read of 'y' byte \d+ before anything has written it"),
    "read_during_atomics": Bug("races", r"race: (atomic update .* the read|read .* the atomic update)"),
    "last_one_wins": Bug("races", r"sum\[0\] differs between the schedules forward and (reverse|random)"),
    "divergent_barrier": Bug(
        "collectives",
        r"divergent barrier: .* collectives.cu:\d+ while \d+ others wait at",
    ),
    "return_before_barrier": Bug(
        "collectives",
        r"deadlock: 127 threads wait at the block barrier .*; 1 threads have returned, first thread "
        r"\(77,0,0\)",
    ),
    "uneven_loop": Bug(
        "collectives",
        r"deadlock: .* threads wait at the block barrier .* threads have returned|deadlock: .* "
        r"threads have returned.* threads wait at the block barrier",
    ),
    "crossed_waits": Bug("collectives", r"divergent barrier|deadlock: .* wait for their warp"),
    "divergent_shuffle": Bug(
        "collectives",
        r"divergent warp: lane \d+ is at this shuffle .* wait at the shuffle",
    ),
    "partial_shuffle": Bug("collectives", r"shuffle: .* returned from the kernel"),
    "exited_lane": Bug("collectives", r"shuffle: .* returned from the kernel"),
    "not_in_mask": Bug("collectives", r"vote: the calling lane \d+ is not in mask 0000ffff"),
    "different_masks": Bug("collectives", r"divergent warp: lane \d+ is at this vote with mask"),
    "odd_width": Bug("collectives", r"shuffle: expected a width that is a power of two up to 32, got 12"),
    "warp_left_out": Bug("collectives", r"deadlock: .*96 threads wait at the block barrier"),
    "signed_overflow": Bug("limits", r"undefined: signed overflow in an addition"),
    "product_overflow": Bug("limits", r"undefined: signed overflow in a multiplication"),
    "wide_shift": Bug("limits", r"undefined: shift by"),
    "division_by_zero": Bug("limits", r"undefined: division by zero"),
    "failed_assertion": Bug("limits", r"assertion failed: threadIdx.x < 100"),
    "trap": Bug("limits", r"__trap\(\)"),
    "endless_loop": Bug("limits", r"endless loop: one block has run for more than 0.05 s"),
    "endless_barriers": Bug("limits", r"endless loop: one block has run for more than 0.05 s"),
    "spin_lock": Bug("limits", r"endless loop: one block has run for more than 0.05 s"),
    "deep_recursion": Bug("limits", r"stack overflow: the thread needs more than 64 KiB"),
    "large_local_array": Bug("limits", r"stack overflow: the thread needs more than 64 KiB"),
    "launch_bounds": Bug("limits", r"block of 128 threads: the entry's __launch_bounds__ allows 64"),
    "static_shared": Bug("limits", r"49156 bytes of static shared memory: the limit is 49152"),
    "dynamic_shared": Bug(
        "limits",
        r"out of bounds: write of 4 bytes at byte \d+ of shared 'dynamic', which has 64",
        {"shared_bytes": 64},
    ),
    "mma_lane_missing": Bug(
        "tensor_cores",
        r"mma.m16n8k16.f16: lanes \w+ wait with mask ffffffff, but lane 31 has returned|"
        r"mma.m16n8k16.f16: mask ffffffff names lanes that have returned from the kernel: 80000000",
    ),
    "mma_in_branches": Bug("tensor_cores", r"divergent warp: lane \d+ is at this mma.m16n8k16.f16 .* wait"),
    "mma_part_of_warp": Bug(
        "tensor_cores",
        r"mma.m16n8k16.f16: expected a warp of 32 threads, got the last one of a block of 112",
        {"block": 112},
    ),
    "ldmatrix_lanes_missing": Bug("tensor_cores", r"ldmatrix: .* returned from the kernel"),
    "ldmatrix_two_ways": Bug("tensor_cores", r"divergent warp: lane \d+ is at this ldmatrix .* wait"),
    "ldmatrix_behind": Bug(
        "tensor_cores",
        r"out of bounds: read of 16 bytes at byte 2048 of shared 's', which has 2048",
    ),
    "ldmatrix_misaligned": Bug("tensor_cores", r"misaligned: read of 16 bytes at shared 's' byte \d+"),
    "ldmatrix_uninitialised": Bug("tensor_cores", r"read of shared 's' byte \d+ before anything has written"),
    "ldmatrix_before_barrier": Bug("tensor_cores", r"race: .* shared 's' .* ordered after the (read|write)"),
    "ldmatrix_is_no_fence": Bug("tensor_cores", r"race: .* shared 's' .* not ordered after the (read|write)"),
    "tile_overwritten": Bug("tensor_cores", r"race: .* shared 's' .* not ordered after the (read|write)"),
    "stmatrix_behind": Bug("tensor_cores", r"out of bounds: write of 16 bytes at byte 2048 of shared 's'"),
    "stmatrix_over_operands": Bug("tensor_cores", r"race: .* shared 's' .* ordered after the (read|write)"),
    "stmatrix_twice": Bug("tensor_cores", r"race: write of shared 's' .* not ordered after the write"),
    "stmatrix_then_read": Bug("tensor_cores", r"race: .* shared 's' .* not ordered after the (read|write)"),
    "global_as_shared": Bug("tensor_cores", r"shared_address: expected a pointer to shared .*, got 'x' byte"),
    "prefetch_behind": Bug("tensor_cores", r"out of bounds: read of 1 bytes at byte 512 of 'x'"),
    "load_once_misaligned": Bug("tensor_cores", r"misaligned: .* 'x' byte \d+ .* alignment of 16 bytes"),
}  # fmt: skip

# Faults of the launch as a whole, which no line of the kernel is to blame for.
WITHOUT_PLACE = ("unwritten", "last_one_wins", "launch_bounds", "static_shared")


def planted(entry: str, bug: int, **change: Any) -> tuple[Launch, list[torch.Tensor | None]]:
    """The launch of a planted bug or of its clean twin, and fresh tensors for it."""
    file, settings = PLANTED[entry].file, {**PLANTED[entry].launch, **change}
    text = (EMULATED / f"{file}.cu").read_text()
    signature = re.search(
        rf"\b{entry}\(const (\w+)\* __restrict__ x, \w+\* __restrict__ (\w+)", text
    )
    assert signature is not None
    dtype = {"float": torch.float32, "int": torch.int32}[signature[1]]
    x = torch.arange(1, 129, dtype=dtype) if "x" not in settings else None
    y = torch.zeros(128, dtype=dtype)
    update = signature[2] == "sum"
    plan = launch_of(
        str(EMULATED / f"{file}.cu"), entry, {"BUG": bug}, Planted(128, HUGE, 0),
        grid=[settings.get("grid", 1)], block=[settings.get("block", 128)], inputs=["x"],
        outputs=[] if update else ["y"], updates=["sum"] if update else [],
        shared_bytes=512 if bug == 0 else settings.get("shared_bytes", 0),
    )  # fmt: skip
    return plan, [x, y]


def marked_lines(entry: str) -> set[tuple[str, int]]:
    file = f"{PLANTED[entry].file}.cu"
    rows = (EMULATED / file).read_text().splitlines()
    found = {
        (file, i) for i, row in enumerate(rows, 1) if entry in row.partition("// <-")[2].split()
    }
    if entry == "warp_left_out":  # waits inside of block_sum
        rows = (kernels_dir() / "common.cuh").read_text().splitlines()
        found = {("common.cuh", i) for i, row in enumerate(rows, 1) if "__syncthreads();" in row}
    return found


def test_every_planted_kernel_has_a_row() -> None:
    text = "".join(
        (EMULATED / f"{f}.cu").read_text() for f in {bug.file for bug in PLANTED.values()}
    )
    entries = set(re.findall(r"(\w+)\(const \w+\* __restrict__ x", text)) - {"absent_source"}
    assert entries == set(PLANTED)


@pytest.mark.parametrize("entry", PLANTED)
def test_planted_bug_is_reported(entry: str) -> None:
    for schedule in ("all",) if entry == "last_one_wins" else SCHEDULES:
        plan, tensors = planted(entry, bug=1)
        before = [None if t is None else t.clone() for t in tensors]
        with emulate.schedule(schedule), emulate.time_limit(0.05):
            with pytest.raises(KernelError, match=PLANTED[entry].report) as caught:
                emulate.execute(plan, tensors)
        assert entry in str(caught.value)
        if entry in WITHOUT_PLACE:
            assert caught.value.places == ()
        else:
            assert set(caught.value.places) & marked_lines(entry), caught.value.places
            assert len(caught.value.thread) == len(caught.value.block) == 3
        if entry != "unwritten":
            for old, new in zip(before, tensors, strict=True):
                assert old is None or new is None or torch.equal(old, new), "a failed launch wrote"


@pytest.mark.parametrize("entry", PLANTED)
def test_clean_twin_is_silent(entry: str) -> None:
    results = []
    for schedule in (*SCHEDULES, "all"):
        plan, tensors = planted(entry, bug=0)
        with emulate.schedule(schedule):
            emulate.execute(plan, tensors)
        assert tensors[1] is not None
        results.append(tensors[1])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_unwritten_elements_are_nan() -> None:
    plan, (x, y) = planted("unwritten", bug=1)
    with pytest.raises(KernelError, match="never written"):
        emulate.execute(plan, [x, y])
    assert x is not None and y is not None
    assert math.isnan(y[5].item())
    y[5] = x[5]
    assert torch.equal(x, y)


@pytest.mark.parametrize("bug", [0, 1])
def test_a_lane_that_takes_no_part_has_no_value(bug: int) -> None:
    x, y = torch.arange(128.0), torch.empty(128)
    file = str(EMULATED / "collectives.cu")
    params = Planted(128, HUGE, 0)
    plan = launch_of(
        file,
        "absent_source",
        {"BUG": bug},
        params,
        grid=[1],
        block=[128],
        inputs=["x"],
        outputs=["y"],
    )
    emulate.execute(plan, [x, y])
    upper = torch.arange(128) % 32 >= 16
    assert torch.equal(y.isnan(), upper & bool(bug))


def test_report_names_who_and_where() -> None:
    plan, tensors = planted("no_barrier_after_write", bug=1)
    with pytest.raises(KernelError) as caught:
        emulate.execute(plan, tensors)
    assert re.fullmatch(
        r"races\.cu:9: race: write of shared 's' byte 0 is not ordered after the read by thread "
        r"\(127,0,0\), at races\.cu:11 \[block \(0,0,0\), thread \(0,0,0\) of "
        r".*races\.cu:no_barrier_after_write \[BUG=1 .*\]\]",
        str(caught.value),
    )
    assert caught.value.block == (0, 0, 0) and caught.value.thread == (0, 0, 0)


def test_report_tells_the_calls_that_led_there() -> None:
    plan, tensors = planted("shared_behind", bug=1)
    with pytest.raises(KernelError) as caught:
        emulate.execute(plan, tensors)
    rows = (EMULATED / "memory.cu").read_text().splitlines()
    call = next(i for i, row in enumerate(rows, 1) if "store_at(s, threadIdx.x + (BUG" in row)
    assert ("memory.cu", call) in caught.value.places[1:]
    assert f"called from memory.cu:{call}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": (2048, 1, 1)}, r"block of 2048 x 1 x 1 threads: expected 1 to 1024"),
        ({"block": (1, 1, 65)}, r"at most 64 of them along z"),
        ({"grid": (1, 65536, 1)}, r"grid of 1 x 65536 x 1 blocks"),
        (
            {"shared_bytes": 228 << 10},
            r"233472 bytes of dynamic shared memory: at most 232448 bytes",
        ),
    ],
)
def test_limits_of_a_launch(change: dict[str, Any], message: str) -> None:
    plan, tensors = planted("shared_index", bug=0)
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    with pytest.raises(KernelError, match=message):
        emulate.execute(Launch(**{**fields, **change}), tensors)


def test_static_and_dynamic_shared_memory_add_up() -> None:
    plan, tensors = planted("static_shared", bug=0)  # 48 KiB of static shared memory
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    emulate.execute(Launch(**{**fields, "shared_bytes": 179 << 10}), tensors)
    with pytest.raises(
        KernelError, match="49152 \\+ 184320 bytes of static and dynamic shared memory"
    ):
        emulate.execute(Launch(**{**fields, "shared_bytes": 180 << 10}), tensors)


# ---- what kernels compute --------------------------------------------------------------------------------


def numbers(
    entry: str,
    inputs: dict[str, torch.Tensor],
    outputs: dict[str, torch.Tensor],
    updates: dict[str, torch.Tensor] | None = None,
    grid: tuple[int, ...] = (1,),
    block: tuple[int, ...] = (128,),
    n: int = 0,
    x_stride: int = 1,
    y_stride: int = 1,
) -> None:
    """Launch an entry of numbers.cu."""
    params, rest = Numbers(n, x_stride, y_stride), updates or {}
    plan = launch_of(
        str(EMULATED / "numbers.cu"), entry, {}, params, grid=grid, block=block, inputs=tuple(inputs),
        outputs=tuple(outputs), updates=tuple(rest),
    )  # fmt: skip
    emulate.execute(plan, [*inputs.values(), *outputs.values(), *rest.values()])


def as_ints(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns as non-negative int64."""
    return x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def edge_floats() -> torch.Tensor:
    """65536 floats: specials, midpoints between neighbouring halves, subnormals, random bit patterns."""
    halves = (
        torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    )
    finite = halves[halves.isfinite()].sort().values.unique()
    middles = (finite[1:] + finite[:-1]) / 2
    special = [
        0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.99, 65520.0, 65535.0, 65536.0, 1e38, -1e38,
        3.4e38, 2.0**-24, 2.0**-25, 2.0**-25 * (1 + 2**-23), 2.0**-26, 2.0**-14, 2.0**-14 - 2.0**-25,
        2.0**-126, 2.0**-149,
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    bits = (
        torch.randint(-(2**31), 2**31, (65536,), generator=generator)
        .to(torch.int32)
        .view(torch.float32)
    )
    near = torch.nextafter(middles, torch.tensor(math.inf))
    all_of_them = torch.cat(
        [torch.tensor(special), middles[::5], near[::5], torch.randn(10000), bits]
    )
    return all_of_them[:65536].contiguous()


def same_but_for_nan(got: torch.Tensor, want: torch.Tensor) -> bool:
    nan = want.isnan()
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    return torch.equal(got.isnan(), nan) and torch.equal(
        got.view(bits)[~nan], want.view(bits)[~nan]
    )


def test_half_conversions_are_exhaustively_those_of_torch() -> None:
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    n, floats = 65536, edge_floats()
    from_half, from_bfloat = torch.empty(n), torch.empty(n)
    to_half, to_bfloat = torch.empty(n, dtype=torch.int16), torch.empty(n, dtype=torch.int16)
    outputs = {
        "from_half": from_half,
        "from_bfloat": from_bfloat,
        "to_half": to_half,
        "to_bfloat": to_bfloat,
    }
    numbers("conversions", {"halves": halves, "floats": floats}, outputs, grid=(512,), n=n)
    assert same_but_for_nan(from_half, halves.view(torch.float16).float())
    assert same_but_for_nan(from_bfloat, halves.view(torch.bfloat16).float())
    assert same_but_for_nan(to_half.view(torch.float16), floats.to(torch.float16))
    assert same_but_for_nan(to_bfloat.view(torch.bfloat16), floats.to(torch.bfloat16))
    # And back again: what came from a half is that half.
    outputs["to_half"] = back = torch.empty(n, dtype=torch.int16)
    numbers(
        "conversions", {"halves": halves, "floats": from_half.clone()}, outputs, grid=(512,), n=n
    )
    assert same_but_for_nan(back.view(torch.float16), halves.view(torch.float16))


def signed(v: int) -> int:
    return v - (1 << 32) if v >> 31 else v


def test_integer_intrinsics() -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(-(2**31), 2**31, (256,), generator=generator).to(torch.int32)
    b = torch.randint(-(2**31), 2**31, (256,), generator=generator).to(torch.int32)
    a[:6] = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 8])
    out = torch.empty(256, 16, dtype=torch.int32)
    numbers("integers", {"a": a, "b": b}, {"out": out}, grid=(2,), n=256)
    for x, y, row in zip(
        as_ints(a).tolist(), as_ints(b).tolist(), as_ints(out).tolist(), strict=True
    ):
        both, swapped, mask = x << 32 | y, y << 32 | x, 0xFFFFFFFF
        want = [
            x * y >> 32, (signed(x) * signed(y) >> 32) & mask, x.bit_count(), 32 - x.bit_length(),
            (x & -x).bit_length(), int(f"{x:032b}"[::-1], 2), min(x, y), max(x, y),
            min(signed(x), signed(y)) & mask, max(signed(x), signed(y)) & mask, both.bit_count(),
            64 - both.bit_length(), (both & -both).bit_length(), both * swapped >> 96, x,
            ((x << 20 | y) >> 20) & mask,
        ]  # fmt: skip
        assert row == want


def test_real_functions() -> None:
    x = torch.cat(
        [
            torch.randn(120),
            torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 2.5, -2.5]),
        ]
    )
    y = torch.randn(128)
    out = torch.empty(128, 20)
    numbers("reals", {"a": x, "b": y}, {"out": out}, n=128)
    d, e = x.double(), y.double()
    fused = (d * e + 1).float()  # exact product, one rounding more than an fma has
    root, low, high = d.abs().sqrt(), torch.fmin(x, y), torch.fmax(x, y)
    kind = torch.where(d.isnan(), 1.0, torch.where(d.isinf(), 2.0, 3.0))
    want = [
        1 / root, d.exp(), d / e, d.erf(), d.tanh(), d.exp(), fused, low, high, low,
        high, root, d.abs().log(), d.floor(), fused, d.erf(), kind, d.nan_to_num(0, 1, 0).clamp(0, 1),
        x * y + 1, d.copysign(e),
    ]  # fmt: skip
    for column, expected in enumerate(want):
        # The functions of libm, and the two roundings of an fma's reference, are good to an ulp or so.
        rtol = 3e-7 if column in (0, 1, 3, 4, 5, 6, 12, 14, 15) else 0
        torch.testing.assert_close(
            out[:, column],
            expected.float(),
            rtol=rtol,
            atol=1e-44,
            equal_nan=True,
            msg=f"column {column}",
        )


def test_shuffles() -> None:
    x, d = torch.randn(64), torch.randn(64, dtype=torch.float64)
    f, g = torch.empty(64, 10), torch.empty(64, 2, dtype=torch.float64)
    numbers("shuffles", {"x": x, "d": d}, {"f": f, "g": g}, block=(64,))
    for i in range(64):
        lane, warp, segment = i % 32, i - i % 32, i - i % 8
        places = [
            warp + 5, i - 3 if lane >= 3 else i, i + 3 if lane + 3 < 32 else i, i ^ 6,
            segment + 5, i - 3 if i % 8 >= 3 else i, i + 3 if i % 8 + 3 < 8 else i, i ^ 6,
            warp + (lane + 1) % 32,
        ]  # fmt: skip
        assert f[i, :9].tolist() == x[places].tolist()
        assert f[i, 9].item() == warp + 7
        assert g[i, 0] == d[i ^ 1]
    for warp in (slice(0, 32), slice(32, 64)):
        sums = d[warp]
        for offset in (16, 8, 4, 2, 1):  # the butterfly's order of adding
            sums = sums + sums[torch.arange(32) ^ offset]
        assert torch.equal(g[warp, 1], sums)


def test_votes() -> None:
    x = torch.randint(-3, 4, (96,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    x[64:] = 2
    y = torch.empty(96, 8, dtype=torch.int32)
    numbers("votes", {"x": x}, {"y": y}, block=(96,))
    rows = as_ints(y)
    for warp in range(3):
        mine = x[32 * warp : 32 * warp + 32].tolist()
        ballot = sum(1 << lane for lane, v in enumerate(mine) if v > 0)
        odd = sum(1 << lane for lane, v in enumerate(mine) if v & 1)
        for lane, v in enumerate(mine):
            side = ballot if v > 0 else ballot ^ 0xFFFFFFFF
            want = [
                ballot,
                ballot != 0,
                ballot == 0xFFFFFFFF,
                0xFFFFFFFF,
                int((x > 0).sum()),
                1,
                0,
                odd & side,
            ]
            assert rows[32 * warp + lane].tolist() == want


def test_atomics() -> None:
    x = torch.randint(
        0, 1000, (256,), generator=torch.Generator().manual_seed(4), dtype=torch.int32
    )
    i = torch.zeros(4 + 256, dtype=torch.int32)
    i[1], i[2] = -5, 5000
    u = torch.tensor([0, 0, -1, 0, 0], dtype=torch.int32)
    f, d, wide = (
        torch.tensor([0.0, -math.inf]),
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.int64),
    )
    with emulate.schedule("all"):
        numbers("atomics", {"x": x}, {}, {"i": i, "u": u, "f": f, "d": d, "l": wide}, grid=(2,))
    total, bits, xor = int(x.sum()), 0, 0
    for v in x.tolist():
        bits |= 1 << (v & 31)
        xor ^= v
    assert i[:4].tolist() == [total, int(x.max()), int(x.min()), -total]
    assert as_ints(u).tolist() == [total, bits, bits ^ 0xFFFFFFFF, xor, 256 % 6]
    assert f.tolist() == [total, int(x.max())] and d.item() == total and wide.item() == total
    assert torch.equal(i[4:], torch.ones(256, dtype=torch.int32))  # 0 -> v -> 0 + 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_indices(schedule: str) -> None:
    grid, block = (3, 4, 5), (6, 7, 2)
    y = torch.empty(math.prod(grid) * math.prod(block), dtype=torch.int32)
    with emulate.schedule(schedule):
        numbers("indices", {}, {"y": y}, grid=grid, block=block)
    want = [
        (bx << 20) + (by << 16) + (bz << 12) + (tx << 8) + (ty << 4) + tz
        for bz in range(5) for by in range(4) for bx in range(3)
        for tz in range(2) for ty in range(7) for tx in range(6)
    ]  # fmt: skip
    assert y.tolist() == want


def test_vectors() -> None:
    x = torch.randint(0, 100, (128, 4)).float()
    y = torch.empty(128, 4)
    numbers("vectors", {"x": x}, {"y": y})
    assert torch.equal(y, torch.stack([x[:, 3], x[:, 2], x[:, 1], x[:, 0] + 4], 1))


# ---- tensors ---------------------------------------------------------------------------------------------


def test_only_the_elements_of_a_view_may_be_touched() -> None:
    base = torch.randn(100)
    view, y = base[10:50], torch.empty(41)
    numbers("copy_strided", {"x": view}, {"y": y[:40]}, n=40)
    assert torch.equal(y[:40], view)
    with pytest.raises(KernelError, match="out of bounds: read of 4 bytes at byte 160 of 'x'"):
        numbers("copy_strided", {"x": view}, {"y": y}, n=41)
    with pytest.raises(KernelError, match="out of bounds: write of 4 bytes at byte 160 of 'y'"):
        numbers("copy_strided", {"x": base}, {"y": y[:40]}, n=41)


def test_strided_and_expanded_views() -> None:
    base, out = torch.randn(50, 3), torch.full((40, 2), 7.0)
    numbers("copy_strided", {"x": base[5:45, 1]}, {"y": out[:, 1]}, n=40, x_stride=3, y_stride=2)
    assert torch.equal(out[:, 1], base[5:45, 1])
    assert torch.equal(out[:, 0], torch.full((40,), 7.0)), "the gaps of a view belong to others"
    numbers(
        "copy_strided",
        {"x": torch.tensor(3.0).expand(40)},
        {"y": out[:, 0]},
        n=40,
        x_stride=0,
        y_stride=2,
    )
    assert torch.equal(out[:, 0], torch.full((40,), 3.0))
    with pytest.raises(KernelError, match="never written: y\\[20\\] and 19 more of 40"):
        numbers(
            "copy_strided", {"x": base[5:45, 1]}, {"y": out[:, 1]}, n=20, x_stride=3, y_stride=2
        )


def test_alignment_is_the_tensors_own() -> None:
    base = torch.zeros(4 * 128 + 1)
    y = torch.empty(128, 4)
    numbers("vectors", {"x": base[:512]}, {"y": y})
    with pytest.raises(KernelError, match="misaligned"):
        numbers("vectors", {"x": base[1:]}, {"y": y})


def test_updates_keep_what_they_held() -> None:
    x, y, total = torch.randn(250), torch.empty(250), torch.tensor([10.0, 20.0])
    expected = total + torch.stack([x[:128].sum(), x[128:].sum()])
    with emulate.schedule("all"):
        numbers("accumulate", {"x": x}, {"y": y}, {"sum": total}, grid=(2,), n=250)
    torch.testing.assert_close(total, expected)
    assert torch.equal(x, y)


def test_tensors_that_share_memory_are_refused() -> None:
    base = torch.randn(100)
    with pytest.raises(ValueError, match="y shares memory with x"):
        numbers("copy_strided", {"x": base[:60]}, {"y": base[40:]}, n=60)
    with pytest.raises(ValueError, match="y: expected no expanded dimension"):
        numbers("copy_strided", {"x": base}, {"y": torch.empty(1).expand(100)}, n=100)


def test_arguments_must_fit_the_entry() -> None:
    x, y = torch.randn(8), torch.empty(8)
    with pytest.raises(ValueError, match="x: expected elements of 4 bytes, got torch.float16"):
        numbers("copy_strided", {"x": x.half()}, {"y": y}, n=8)
    with pytest.raises(
        ValueError, match="expected the entry's 3 parameters, got 3 tensors and a params struct"
    ):
        numbers("copy_strided", {"x": x, "w": x}, {"y": y}, n=8)
    with pytest.raises(ValueError, match=r"y: expected a parameter of type const T\*"):
        numbers("copy_strided", {"x": x, "y": y}, {}, n=8)
    with pytest.raises(ValueError, match=r"x: expected a parameter of type T\*"):
        numbers("copy_strided", {}, {"x": x, "y": y}, n=8)
    plan, _ = planted("read_behind", bug=0)
    with pytest.raises(ValueError, match=r"expected 2 tensors \(x, y\), got 1"):
        emulate.execute(plan, [x])


def test_counters() -> None:
    x, y, total = torch.randn(250), torch.empty(250), torch.zeros(2)
    numbers("accumulate", {"x": x}, {"y": y}, {"sum": total}, grid=(2,), n=250)
    counters = emulate.last_counters()
    assert counters.global_bytes_read == 4 * 250 + 4 * 2  # x, and the two sums
    assert counters.global_bytes_written == 4 * 250 + 4 * 2
    assert counters.block_barriers == 2 * 2
    assert counters.warp_operations == 2 * 128 * 5
    assert counters.shared_accesses == 2 * (
        4 + 128 * 4
    )  # each warp's sum in, all four out by every thread


# What the marked lines of profile.cu cost, over both warps: requests, lanes, sectors or wavefronts, and how
# many of these at best.
TRAFFIC = {
    "neighbours": (2, 64, 8, 8),
    "shifted": (2, 64, 10, 8),
    "every_second": (2, 64, 16, 8),
    "a_sector_each": (2, 64, 64, 8),
    "the_same": (2, 64, 2, 2),
    "packs": (2, 64, 32, 32),
    "pairs": (2, 64, 16, 16),
    "bytes": (2, 64, 2, 2),
    "eight_lanes": (2, 16, 2, 2),
    "uneven_loop": (6, 160, 24, 20),  # two rounds of 32 lanes, one of every second lane
    "row": (32, 1024, 32, 32),
    "half_column": (32, 1024, 512, 32),
    "column": (2, 64, 64, 2),
    "padded_column": (2, 64, 2, 2),
    "two_in_turn": (2, 64, 2, 2),
    "two_way": (2, 64, 4, 2),
    "broadcast": (2, 64, 2, 2),
    "shared_packs": (2, 64, 8, 8),
    "shared_pairs": (2, 64, 4, 4),
    "shared_pack_column": (2, 64, 64, 8),  # 8 lanes of each phase in 4 banks
    "ldmatrix_40": (2, 64, 8, 8),
    "ldmatrix_32": (2, 64, 32, 8),  # 4-way
    "ldmatrix_x2": (2, 32, 4, 4),
    "between_barriers": (6, 160, 36, 6),  # a column by every second lane, then two rows
    "result": (2, 64, 8, 8),
}


def profiled(schedule: str = "forward") -> list[emulate.Profile]:
    x, y = torch.arange(1024.0), torch.empty(64)
    plan = launch_of(
        str(EMULATED / "profile.cu"), "traffic", {}, Numbers(0, 0, 0), grid=[1], block=[64], inputs=["x"],
        outputs=["y"],
    )  # fmt: skip
    with emulate.schedule(schedule), emulate.profile() as launches:
        emulate.execute(plan, [x, y])
    return launches


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_profile_of_known_traffic(schedule: str) -> None:
    (profile,) = profiled(schedule)
    rows = (EMULATED / "profile.cu").read_text().splitlines()
    marks = {f"profile.cu:{i}": row.partition("// = ")[2] for i, row in enumerate(rows, 1)}
    found: dict[str, tuple[int, ...]] = {}
    for t in profile.traffic:
        if marks[t.place] == "row" and not t.shared:
            continue  # x[k] on the same line
        if marks[t.place]:
            assert marks[t.place] not in found, f"{marks[t.place]} is more than one instruction"
            found[marks[t.place]] = (t.requests, t.lanes, t.units, t.least)
    assert found == TRAFFIC


def test_profile_sums_up_and_prints() -> None:
    (profile,) = profiled()
    rows = [t for t in profile.traffic if not t.shared]
    assert profile.global_sectors == sum(t.units for t in rows) > 150
    assert profile.sectors_per_request == profile.global_sectors / sum(t.requests for t in rows)
    conflicts = sum(t.units - t.least for t in profile.traffic if t.shared)
    assert profile.bank_conflicts == conflicts >= (512 - 32) + (64 - 2) + (32 - 8)
    assert profile.counters.mma_instructions == 2 and profile.counters.block_barriers == 4
    assert profile.counters == emulate.last_counters()
    text = str(profile)
    assert f"{profile.shared_wavefronts} wavefronts, {conflicts} of them by bank conflicts" in text
    assert re.search(r"profile\.cu:\d+ +shared read +2 +32\.0 +64 +2$", text, re.MULTILINE)


def test_launches_are_profiled_within_the_context_only() -> None:
    assert len(profiled("all")) == 3
    with emulate.profile() as launches:
        with emulate.profile() as inner:
            winner("forward")
        assert len(inner) == 1 and not launches
        winner("forward")
    winner("forward")
    assert len(launches) == 1


# ---- schedules and threads -------------------------------------------------------------------------------


def winner(schedule: str, seed: int = 0) -> int:
    plan, tensors = planted("last_one_wins", bug=1)
    with emulate.schedule(schedule, seed):
        emulate.execute(plan, tensors)
    assert tensors[1] is not None
    return int(tensors[1][0])


def test_schedules_differ_and_repeat() -> None:
    assert winner("forward") == 128 and winner("reverse") == 1
    drawn = [winner("random", seed) for seed in range(8)]
    assert drawn == [winner("random", seed) for seed in range(8)]
    assert len(set(drawn)) > 3


def test_schedule_refuses_other_names_and_ends_with_its_context() -> None:
    with pytest.raises(
        ValueError,
        match="schedule: expected one of forward, reverse, random or all, got 'sideways'",
    ):
        with emulate.schedule("sideways"):
            pass
    with emulate.schedule("reverse"):
        with emulate.schedule("random"):
            pass
        assert winner("forward") == 128
        plan, tensors = planted("last_one_wins", bug=1)
        emulate.execute(plan, tensors)
        assert tensors[1] is not None and tensors[1][0] == 1


def test_a_failure_leaves_the_next_launch_alone() -> None:
    for entry in ("deep_recursion", "return_before_barrier", "endless_loop", "exited_lane"):
        plan, tensors = planted(entry, bug=1)
        with emulate.time_limit(0.05), pytest.raises(KernelError):
            emulate.execute(plan, tensors)
        plan, tensors = planted("no_barrier_after_write", bug=0)
        emulate.execute(plan, tensors)
        assert tensors[0] is not None and tensors[1] is not None
        assert torch.equal(tensors[1], tensors[0].flip(0))


def test_many_python_threads() -> None:
    xs = [torch.randn(250) for _ in range(4)]
    sums = [torch.zeros(2) for _ in xs]

    def work(i: int) -> None:
        for _ in range(10):
            numbers(
                "accumulate",
                {"x": xs[i]},
                {"y": torch.empty(250)},
                {"sum": sums[i]},
                grid=(2,),
                n=250,
            )

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for x, total in zip(xs, sums, strict=True):
        torch.testing.assert_close(total, 10 * torch.stack([x[:128].sum(), x[128:].sum()]))


# ---- compiling and the cache -----------------------------------------------------------------------------

SCALE = """
#include "common.cuh"
struct Params { int n, x_stride, y_stride; };
extern "C" __global__ void scale(const float* __restrict__ x, float* __restrict__ y, Params p) {
  y[threadIdx.x] = x[threadIdx.x] * FACTOR;
}
"""


def forget_loaded_kernels() -> None:
    emulate._module.cache_clear()
    emulate._entry.cache_clear()


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of kernels with scale.cu, and a cache that holds nothing but the runtime library."""
    runtime = emulate._runtime()[1]
    kernels = tmp_path / "kernels"
    shutil.copytree(kernels_dir() / "emulator", kernels / "emulator")
    for header in kernels_dir().glob("*.cuh"):
        shutil.copy(header, kernels)
    (kernels / "scale.cu").write_text(SCALE)
    (tmp_path / "cache" / "emulator").mkdir(parents=True)
    shutil.copy(runtime, tmp_path / "cache" / "emulator")
    monkeypatch.setenv("CNNOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(emulator_build, "kernels_dir", lambda: kernels)
    forget_loaded_kernels()
    yield kernels
    forget_loaded_kernels()


def scale(factor: str = "2.f", entry: str = "scale") -> torch.Tensor:
    """x = 1 … 8, scaled."""
    x, y = torch.arange(1.0, 9.0), torch.empty(8)
    params = Numbers(8, 1, 1)
    plan = launch_of(
        "scale.cu",
        entry,
        {"FACTOR": factor},
        params,
        grid=[1],
        block=[8],
        inputs=["x"],
        outputs=["y"],
    )
    emulate.execute(plan, [x, y])
    return y / x


def counts() -> tuple[float, float]:
    now = emulate.stats()
    return now["compiled"], now["loaded_from_cache"]


def test_a_kernel_is_compiled_once(sandbox: Path) -> None:
    compiled, loaded = counts()
    assert (scale() == 2).all() and (scale() == 2).all()
    assert counts() == (compiled + 1, loaded)
    forget_loaded_kernels()
    assert (scale() == 2).all()
    assert counts() == (compiled + 1, loaded + 1)
    assert (scale("3.f") == 3).all(), "constants are part of the key"
    assert counts() == (compiled + 2, loaded + 1)


def test_a_changed_header_is_compiled_anew(sandbox: Path) -> None:
    (sandbox / "scale.cu").write_text(
        SCALE.replace('"common.cuh"', '"common.cuh"\n#include "factor.cuh"')
    )
    (sandbox / "factor.cuh").write_text("#define TWICE(f) (2.f * f)\n")
    assert (scale("TWICE(2.f)") == 4).all()
    (sandbox / "factor.cuh").write_text("#define TWICE(f) (f + f + 1.f)\n")
    forget_loaded_kernels()
    compiled, _ = counts()
    assert (scale("TWICE(2.f)") == 5).all()
    assert counts()[0] == compiled + 1


@pytest.mark.parametrize("damage", ["empty", "short", "flipped"])
def test_a_damaged_entry_is_compiled_anew(sandbox: Path, tmp_path: Path, damage: str) -> None:
    scale()
    (path,) = (tmp_path / "cache" / "emulator").glob("scale-*.so")
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "empty": b"",
        "short": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
    }[damage]
    path.unlink()  # the loaded library lives in the old file
    path.write_bytes(damaged)
    forget_loaded_kernels()
    compiled, _ = counts()
    assert (scale() == 2).all()
    assert counts()[0] == compiled + 1
    assert path.read_bytes() == content


def test_compile_errors_tell_file_constants_and_reason(sandbox: Path) -> None:
    with pytest.raises(
        emulate.CompileError,
        match=r"(?s)scale.cu \[FACTOR=wrong PARAMS_BYTES=12\].*scale.cu:5:.*wrong",
    ):
        scale("wrong")
    with pytest.raises(
        emulate.CompileError, match='scale.cu:shrink .*: expected an extern "C" __global__ function'
    ):
        scale(entry="shrink")
    (sandbox / "scale.cu").unlink()
    forget_loaded_kernels()
    with pytest.raises(
        emulate.CompileError, match="scale.cu: expected a file in .*kernels, got none"
    ):
        scale()


def test_reason_when_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "c++"
    other.write_text("#!/bin/sh\necho 4 2 1 1\n")
    other.chmod(0o755)
    try:
        monkeypatch.setenv("CXX", "no-such-compiler")
        emulator_build.compiler.cache_clear()
        assert emulate.available() == "no-such-compiler not found: apt install g++"
        monkeypatch.setenv("CXX", str(other))
        emulator_build.compiler.cache_clear()
        assert "expected GCC 11 or newer" in str(emulate.available())
    finally:
        monkeypatch.undo()
        emulator_build.compiler.cache_clear()
    assert emulate.available() is None


def test_a_cache_that_cannot_be_written_costs_time_only(
    sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Path:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(cache, "cache_dir", refuse)
    assert (scale() == 2).all()


RUN = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_emulator
from cnnops.cuda import emulate
plan, (x, y) = test_emulator.planted("no_barrier_after_write", bug=0)
emulate.execute(plan, [x, y])
print(json.dumps([emulate.stats(), bool((y == x.flip(0)).all())]))
"""


def test_processes_share_the_cache(tmp_path: Path) -> None:
    """Two at once in an empty cache, a third one after them."""
    (tmp_path / "emulator").mkdir()
    shutil.copy(emulate._runtime()[1], tmp_path / "emulator")
    environment = {**os.environ, "CNNOPS_CACHE_DIR": str(tmp_path)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", RUN], env=environment, stdout=subprocess.PIPE, text=True
        )

    both = [start(), start()]
    for process in both:
        stats, right = json.loads(process.communicate()[0])
        assert right and stats["compiled"] + stats["loaded_from_cache"] == 2
    stats, right = json.loads(start().communicate()[0])
    assert right and stats["compiled"] == 0 and stats["loaded_from_cache"] == 2
    assert not list((tmp_path / "emulator").glob(".*")), "something was left behind"
