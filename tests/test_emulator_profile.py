"""What a profile says of global memory beyond its requests: sectors once a block, sectors once a launch.

The kernels are written here, and their counts worked out by hand beside them. tests/test_emulator.py has the
requests themselves, sectors a request, and shared memory.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cnnops.cuda import emulate
from cnnops.cuda.kernel import Launch, launch_of

if emulate.available() is not None:
    pytest.skip(f"kernels cannot be emulated: {emulate.available()}", allow_module_level=True)


class Nothing(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int)]


HEAD = """
#include "common.cuh"
#include "ptx_async.cuh"
#include "ptx_sm90.cuh"
struct Params {
  int n;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from test_emulator_profile.py");
"""

# Blocks b = 0, 1, 2 of two warps; a warp's 32 floats are 4 sectors. What the marked lines cost over all three
# blocks: sectors of requests, those once a block, and the percentage of accesses that are of 16 bytes.
REACH = (
    HEAD
    + """
extern "C" __global__ void reach(const float* __restrict__ x, float* __restrict__ y,
                                 float* __restrict__ total, Params p) {
  const int t = threadIdx.x, i = 64 * blockIdx.x + t;
  float sum = x[i];               // = 24 24 0
  sum += x[i + 8];                // = 24 24 0
  sum += x[t];                    // = 24 24 0
  for (int k = 0; k < 3; k++) {
    __syncthreads();
    sum += x[t / 2 + k * p.n];    // = 36 12 0
  }
  sum += load_pack<4>(x + 4 * i).v[0];  // = 96 96 100
  atomicAdd(&total[0], 1.f);      // = 6 3 0
  y[2 * i] = sum;                 // = 48 48 0
  y[2 * i + 1] = sum;             // = 48 48 0
}
"""
)
# x: a block touches the floats from 0 to 63, from 64 b to 64 b + 71, and from 256 b to 256 b + 255: sectors
# 32 + 49 + 49. All blocks together touch those from 0 to 767. y: 128 floats a block, by two requests each.
OF_TENSORS = {
    ("x", False): (24 + 24 + 24 + 36 + 96, 130, 96),
    ("y", True): (96, 48, 48),
    ("total", True): (6, 3, 1),
}


def plan_of(
    path: Path,
    text: str,
    entry: str,
    blocks: int,
    threads: int = 64,
    updates: tuple[str, ...] = (),
    cluster: int | None = None,
) -> Launch:
    source = path / f"{entry}.cu"
    source.write_text(text)
    return launch_of(
        str(source), entry, {}, Nothing(0), grid=[blocks], block=[threads], inputs=["x"], outputs=["y"],
        updates=updates, cluster=cluster,
    )  # fmt: skip


def profiled(plan: Launch, tensors: list[Tensor], schedule: str = "forward") -> emulate.Profile:
    with emulate.schedule(schedule), emulate.profile() as launches:
        emulate.execute(plan, tensors)
    (profile,) = launches
    return profile


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_sectors_of_a_block_and_of_a_launch(tmp_path: Path, schedule: str) -> None:
    tensors = [torch.ones(768), torch.empty(384), torch.zeros(1)]
    profile = profiled(plan_of(tmp_path, REACH, "reach", 3, updates=("total",)), tensors, schedule)
    found = {
        t.place: f"{t.units} {t.block_sectors} {t.pack_share:.0%}".removesuffix("%")
        for t in profile.traffic
    }
    marked = {
        f"reach.cu:{number}": line.partition("// = ")[2]
        for number, line in enumerate(REACH.splitlines(), 1)
        if "// = " in line
    }
    assert found == marked
    by_tensor = {
        (t.name, t.writes): (t.requested, t.block_sectors, t.sectors) for t in profile.tensors
    }
    assert by_tensor == OF_TENSORS
    for tensor, side in zip(tensors, profile.tensors, strict=True):
        assert (side.address, side.bytes) == (tensor.data_ptr(), tensor.nbytes)
    # Reads once a block, writes with every request; the launch's own.
    assert profile.l2_sectors == 130 + 96 + 6 and profile.memory_sectors == 96 + 48 + 1


def test_counts_are_printed(tmp_path: Path) -> None:
    tensors = [torch.ones(768), torch.empty(384), torch.zeros(1)]
    text = str(profiled(plan_of(tmp_path, REACH, "reach", 3, updates=("total",)), tensors))
    assert "least    232 sectors through L2, 145 of memory" in text
    assert re.search(r"reach\.cu:\d+ +global read +6 +32\.0 +96 +96 +96 +100%$", text, re.MULTILINE)
    assert re.search(r"^  x +read +204 +130 +96$", text, re.MULTILINE)


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_many_blocks(tmp_path: Path, schedule: str) -> None:
    """What is kept to tell a block's sectors apart is dropped once the block has ended, and no earlier."""
    text = HEAD + (
        'extern "C" __global__ void far(const float* __restrict__ x, float* __restrict__ y, Params p) {\n'
        "  float sum = 0.f;\n"
        "  for (int k = 0; k < 2; k++) { __syncthreads(); sum += x[threadIdx.x % 8 + k * p.n]; }\n"
        "  y[blockIdx.x * 32 + threadIdx.x] = sum;\n"
        "}\n"
    )
    x, y = torch.ones(8), torch.empty(32 * 100)
    read, written = profiled(plan_of(tmp_path, text, "far", 100, 32), [x, y], schedule).tensors
    assert (read.requested, read.block_sectors, read.sectors) == (200, 100, 1)
    assert (written.requested, written.block_sectors, written.sectors) == (400, 400, 400)


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_blocks_of_a_cluster_take_turns(tmp_path: Path, schedule: str) -> None:
    """And are told apart all the same: each has a sector once, however often the others were between."""
    text = HEAD + (
        '#include "ptx_cluster.cuh"\n'
        'extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1)\n'
        "turns(const float* __restrict__ x, float* __restrict__ y, Params p) {\n"
        "  float sum = 0.f;\n"
        "  for (int k = 0; k < 3; k++) { cluster_sync(); sum += x[threadIdx.x % 8 + k * p.n]; }\n"
        "  y[blockIdx.x * 32 + threadIdx.x] = sum;\n"
        "}\n"
    )
    x, y = torch.ones(8), torch.empty(32 * 8)
    plan = plan_of(tmp_path, text, "turns", 8, 32, cluster=4)
    read, written = profiled(plan, [x, y], schedule).tensors
    assert (read.requested, read.block_sectors, read.sectors) == (24, 8, 1)
    assert (written.requested, written.block_sectors, written.sectors) == (32, 32, 32)


def test_copies_count(tmp_path: Path) -> None:
    """cp.async by every thread, as loads are; a bulk copy is one request."""
    text = HEAD + (
        'extern "C" __global__ void copies(const float* __restrict__ x, float* __restrict__ y, Params p) {\n'
        "  __shared__ __align__(128) float tile[256], other[256];\n"
        "  __shared__ Mbarrier m;\n"
        "  const unsigned barrier = shared_address(&m);\n"
        "  if (threadIdx.x == 0) {\n"
        "    mbarrier_init(barrier, 1);\n"
        "    fence_mbarrier_init();\n"
        "    mbarrier_arrive_expect_tx(barrier, 1024);\n"
        "    bulk_load(shared_address(tile), x + 256 * blockIdx.x, 1024, barrier);\n"
        "  }\n"
        "  cp_async<16>(shared_address(other + 4 * threadIdx.x), x + 4 * threadIdx.x);\n"
        "  cp_async_commit();\n"
        "  cp_async_wait<0>();\n"
        "  __syncthreads();\n"
        "  mbarrier_wait(barrier, 0);\n"
        "  for (int k = 0; k < 4; k++) tile[4 * threadIdx.x + k] += other[4 * threadIdx.x + k];\n"
        "  fence_proxy_async();\n"
        "  __syncthreads();\n"
        "  if (threadIdx.x == 0) {\n"
        "    bulk_store(y + 256 * blockIdx.x, shared_address(tile), 1024);\n"
        "    bulk_commit();\n"
        "    bulk_wait<0>();\n"
        "  }\n"
        "}\n"
    )
    x, y = torch.arange(512.0), torch.empty(512)
    profile = profiled(plan_of(tmp_path, text, "copies", 2), [x, y])
    assert torch.equal(y, x + x[:256].repeat(2))
    found = [
        (t.kind, t.requests, t.lanes, t.units, t.least, t.block_sectors, t.pack_share)
        for t in profile.traffic
        if not t.shared
    ]
    # 1024 bytes are 32 sectors; two warps of two blocks copy 512 bytes a request.
    assert sorted(found) == [
        ("global read", 2, 2, 64, 64, 64, 1.0),
        ("global read", 4, 128, 64, 64, 64, 1.0),
        ("global write", 2, 2, 64, 64, 64, 1.0),
    ]
    read, written = profile.tensors
    # Block 0 copies its own 256 values twice, block 1 those of block 0 beside its own.
    assert (read.requested, read.block_sectors, read.sectors) == (128, 32 + 64, 64)
    assert (written.requested, written.block_sectors, written.sectors) == (64, 64, 64)
