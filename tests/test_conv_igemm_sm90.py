"""Convolution by TMA and wgmma: every tile, every way operands and results lie, what it refuses, machine
code, counts.

The rows of tests/cases run it where they lie channels-last in half types (test_conv.py), since the emulator
stands for an H100.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import sass
import torch
import torch.nn.functional as F
from cases import CONV_CASES, TOLERANCE, ConvCase, assert_close, check, normal
from cases.base import needs_emulator
from igemm import BFLOAT, FLOAT, HALF, PASSES, Problem, tf32

import cnnops
from cnnops.cuda import conv_igemm, emulate, jit, target, tensor_map
from cnnops.cuda import conv_igemm_sm90 as sm90
from cnnops.cuda.conv_igemm_sm90 import TILES, Tile
from cnnops.cuda.kernel import Launch
from cnnops.cuda.launch import trace
from cnnops.epilogue import Epilogue


@pytest.fixture(autouse=True)
def _tf32() -> Iterator[None]:
    with tf32():
        yield


def product(launches: Sequence[Launch]) -> Launch:
    """The launch that multiplies."""
    (found,) = [launch for launch in launches if launch.kernel.entry.endswith("_sm90") and
                launch.kernel.entry != "conv_pack_sm90"]  # fmt: skip
    assert found.kernel.source == sm90.SOURCE
    return found


def constants(launches: Sequence[Launch]) -> dict[str, str | int]:
    return dict(product(launches).kernel.constants)


def entries(launches: Sequence[Launch]) -> list[str]:
    return [launch.kernel.entry for launch in launches]


# ---- rows of tests/cases ---------------------------------------------------------------------------------

ROWS = [case for case in CONV_CASES if case.id.startswith("wide_channels")]


@needs_emulator
@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_thread_order_does_not_matter(case: ConvCase) -> None:
    dtype = (BFLOAT, HALF)[ROWS.index(case) % 2]
    with emulate.schedule("all"), trace() as launches:
        check(case, "emulate", dtype)
    assert any(launch.kernel.source == sm90.SOURCE for launch in launches)


# ---- tiles -----------------------------------------------------------------------------------------------


def problem_for(tile: Tile, op: str, dtype: torch.dtype) -> Problem:
    """One that fills more than a tile, and none wholly: neither its rows nor its columns."""
    columns = tile.block_n + 8 if tile.block_n < 128 else tile.block_n - 24
    c, k = (columns, 40) if op == "conv_dgrad" else (40, columns)
    n = -(-(tile.block_m * tile.cluster + 1) // 110)
    return Problem((n, c, 10, 11), (k, c, 3, 2), dtype, True, padding=1)


@needs_emulator
@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles(tile: Tile, op: str) -> None:
    turn = TILES.index(tile) + PASSES.index(op)
    dtype = (BFLOAT, HALF, FLOAT)[turn % (2 if op == "conv_wgrad" or tile.cluster > 1 else 3)]
    with conv_igemm.forced(str(tile)):
        found = constants(problem_for(tile, op, dtype).run(op))
    sides = found["BLOCK_M"], found["BLOCK_N"], found["CLUSTER"]
    assert sides == (tile.block_m, tile.block_n, tile.cluster)


@needs_emulator
@pytest.mark.parametrize("op", PASSES)
def test_sums_in_parts(op: str) -> None:
    for parts in (2, 3):
        with conv_igemm.forced(f"wgmma128x64/{parts}"):
            launches = Problem((2, 64, 9, 9), (64, 64, 3, 3), BFLOAT, True, padding=1).run(op)
        assert entries(launches) == [f"{op}_sm90", "conv_reduce_direct"]


@needs_emulator
def test_blocks_take_tiles_in_turns() -> None:
    """More tiles than multiprocessors: ring, results and moments go on from one to the next."""
    problem = Problem((3, 16, 48, 48), (40, 16, 1, 1), BFLOAT, True)
    shape, (x, w, y) = problem.shape, problem.tensors()
    mean, var = torch.full((40,), float("nan")), torch.full((40,), float("nan"))
    with conv_igemm.forced("wgmma128x16"), trace() as launches, emulate.schedule("all"):
        conv_igemm.conv_fprop(shape, x, w, None, y, Epilogue(None, None, "none", mean, var))
    assert product(launches).grid[0] == conv_igemm.SMS < -(-3 * 48 * 48 // 128) * 3
    assert_close(y, problem.expected("conv_fprop"), TOLERANCE[BFLOAT].output, "tiles")
    stored = y.double().movedim(1, 0).flatten(1)
    assert_close(mean, stored.mean(1), 1e-6, "mean")
    assert_close(var, stored.var(1, unbiased=False), 1e-5, "var")


# ---- how tensors lie -------------------------------------------------------------------------------------

S = partial(Problem, dtype=BFLOAT, last=True)
# Problem, tile -> what of the constants it is there for, by pass.
WAYS: dict[str, tuple[Problem, str, dict[str, int]]] = {
    "one_tap": (S((2, 64, 9, 9), (64, 64, 1, 1)), "wgmma128x64", {"POINTWISE": 1, "DIMS": 1, "CHUNK": 64}),
    "one_tap_strided": (S((2, 64, 9, 9), (64, 64, 1, 1), stride=2), "wgmma128x64", {"POINTWISE": 0}),
    "strided": (S((2, 64, 11, 10), (64, 64, 3, 3), stride=2, padding=1), "wgmma128x64", {"DIMS": 2}),
    "strides_dilations": (
        S((2, 32, 13, 12), (48, 32, 5, 3), stride=(3, 2), padding=(4, 1), dilation=(2, 1)), "wgmma128x32",
        {"CHUNK": 32},
    ),
    "uneven_padding": (S((2, 24, 9, 8), (24, 24, 3, 4), padding=((0, 2), (3, 1))), "wgmma128x16", {"CHUNK":
    32}), "cropped": (S((2, 16, 12, 12), (16, 16, 3, 3), padding=((-2, 1), (1, -3))), "wgmma128x16", {"CHUNK":
    16}), "filters_by_planes": (S((2, 64, 9, 9), (64, 64, 3, 3), padding=1, w_last=False), "wgmma128x64", {}),
    "groups": (S((2, 128, 9, 9), (128, 64, 3, 3), padding=1, groups=2), "wgmma128x64", {"CHUNK": 64}),
    "groups_of_48": (S((2, 96, 7, 9), (96, 48, 3, 1), groups=2), "wgmma128x32", {}), "line": (S((3, 40, 37),
    (40, 40, 5), padding=2), "wgmma128x32", {"DIMS": 1}), "volume": (S((1, 32, 5, 6, 7), (32, 32, 3, 3, 3),
    padding=1), "wgmma128x32", {"DIMS": 3}), "volume_strided": (
        S((1, 32, 5, 6, 7), (32, 32, 2, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), "wgmma256x32", {"DIMS":
        3},
    ),
    "same": (S((2, 32, 8, 8), (32, 32, 2, 2), padding=((0, 1), (0, 1))), "wgmma128x32", {"STORE_TILES": 1}),
}  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("name", WAYS)
def test_ways(name: str, op: str) -> None:
    problem, variant, wanted = WAYS[name]
    with conv_igemm.forced(variant):
        launches = problem.run(op)
    found = constants(launches)
    if op == "conv_fprop":
        assert {key: found[key] for key in wanted} == wanted
    packs = name == "filters_by_planes" and op != "conv_wgrad"
    assert ("conv_pack_sm90" in entries(launches)) == packs
    strided = op == "conv_dgrad" and max(problem.shape.stride) > 1
    assert found["STORE_TILES"] == int(op != "conv_wgrad" and not strided)


@needs_emulator
@pytest.mark.parametrize("name", ["one_tap", "strided", "groups", "volume", "uneven_padding"])
@pytest.mark.parametrize("op", PASSES[:2])
def test_tf32(op: str, name: str) -> None:
    """Rounded to nearest, not truncated: test_tiles' tolerance of float32 tells them apart."""
    problem, variant, _ = WAYS[name]
    with conv_igemm.forced(variant):
        launches = replace(problem, dtype=FLOAT).run(op)
    assert entries(launches) == ["conv_pack_sm90", f"{op}_sm90"]


@needs_emulator
@pytest.mark.parametrize("op", PASSES[:2])
def test_groups_do_not_meet(op: str) -> None:
    """Beyond a group's last channel a stage asks for zeros, not for the next group, which may be infinite."""
    problem = Problem((2, 96, 7, 9), (96, 48, 3, 1), BFLOAT, True, groups=2)
    x, w, grad_y = problem.tensors()
    gathered, result = (x, grad_y) if op == "conv_fprop" else (grad_y, x)
    gathered[:, 48:] = float("inf")
    y = torch.full_like(result, float("nan"))
    with conv_igemm.forced("wgmma128x32"), trace() as launches:
        getattr(conv_igemm, op)(problem.shape, gathered, w, None, y)
    assert constants(launches)["CHUNK"] == 16  # three chunks and taps: nine units, four a stage
    limit = TOLERANCE[BFLOAT].gradient
    assert_close(y[:, :48], problem.expected(op)[:, :48], limit, "the finite group")


@needs_emulator
def test_parts_of_larger_tensors() -> None:
    """A slice of channels, and images with gaps between: TMA reads them in place, and writes the slice."""
    x = normal(1, BFLOAT)((2, 9, 10, 96)).permute(0, 3, 1, 2)[:, 32:]
    w = normal(2, BFLOAT)((48, 3, 3, 64)).permute(0, 3, 1, 2)
    wide = torch.full((3, 9, 10, 64), float("nan"), dtype=BFLOAT)
    problem = Problem((2, 64, 9, 10), (48, 64, 3, 3), BFLOAT, True, padding=1)
    for y in (wide[:2, ..., :48].permute(0, 3, 1, 2), wide[::2, ..., 8:56].permute(0, 3, 1, 2)):
        y.fill_(float("nan"))
        with conv_igemm.forced("wgmma128x64"), trace() as launches, emulate.schedule("all"):
            conv_igemm.conv_fprop(problem.shape, x, w, None, y)
        assert constants(launches)["STORE_TILES"] == int(y.stride(0) == 90 * 64)
        expected = F.conv2d(x.double(), w.double(), padding=1)
        assert_close(y, expected, TOLERANCE[BFLOAT].output, "slice")
    assert wide[..., 56:].isnan().all() and wide[1, ..., 48:].isnan().all()


# ---- on the way out --------------------------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize("variant", ["wgmma128x32", "wgmma256x96", "wgmma128x32/2"])
@pytest.mark.parametrize("dtype", [BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_epilogue(stride: int, dtype: torch.dtype, variant: str) -> None:
    """Of a transposed convolution: dgrad stores by TMA, in phases from registers."""
    problem = Problem((2, 56, 7, 6), (32, 56, 3, 3), dtype, True, stride=stride, padding=1)
    shape, (x, w, grad_y) = problem.shape, problem.tensors()
    scale, bias = (normal(seed, dtype)((shape.C,)) for seed in (5, 6))
    y = torch.full_like(x, float("nan"))
    with conv_igemm.forced(variant), emulate.schedule("all"):
        conv_igemm.conv_dgrad(shape, grad_y, w, bias, y, Epilogue(scale, x, "silu"))
    ones = (-1, 1, 1)
    z = problem.expected("conv_dgrad") * scale.double().view(ones) + bias.double().view(ones)
    assert_close(y, F.silu(z + x.double()), TOLERANCE[dtype].output, variant)


@needs_emulator
@pytest.mark.parametrize("follows", ["none", "relu"])
@pytest.mark.parametrize("variant", ["wgmma256x64", "wgmma128x32", "wgmma128x32/2"])
def test_moments(variant: str, follows: str) -> None:
    """Of what is stored, also far from zero; an activation's are taken in a pass of their own."""
    problem = Problem((3, 16, 7, 6), (40, 16, 3, 3), HALF, True, padding=1)
    shape, (x, w, y) = problem.shape, problem.tensors()
    bias = normal(7, HALF)((shape.K,)) * 30
    mean, var = torch.full((shape.K,), float("nan")), torch.full((shape.K,), float("nan"))
    with conv_igemm.forced(variant), emulate.schedule("all"), trace() as launches:
        conv_igemm.conv_fprop(shape, x, w, bias, y, Epilogue(None, None, follows, mean, var))
    stored = y.double().movedim(1, 0).flatten(1)
    assert_close(mean, stored.mean(1), 1e-6, "mean")
    assert_close(var, stored.var(1, unbiased=False), 1e-5, "var")
    gathered = follows == "none" and "/" not in variant
    assert (entries(launches)[-1] == "conv_moments_direct") == gathered


# ---- which problems it takes -----------------------------------------------------------------------------

REFUSED = {
    "planes": S((2, 64, 9, 9), (64, 64, 3, 3), last=False),
    "channels_by_fours": S((2, 20, 9, 9), (64, 20, 3, 3)),
    "few_channels": S((2, 8, 9, 9), (64, 8, 3, 3)),
    "groups_of_24": S((2, 48, 9, 9), (48, 24, 3, 3), groups=2),
    "a_stride_of_nine": S((2, 64, 19, 19), (64, 64, 3, 3), stride=9),
    "far_taps": S((2, 16, 300, 3), (16, 16, 3, 3), dilation=(128, 1)),
    "reflected": S((2, 64, 9, 9), (64, 64, 3, 3), padding=1, mode="reflect"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_with_mma_sync(name: str) -> None:
    problem = REFUSED[name]
    x, w, grad_y = problem.tensors()
    with trace(run=False) as launches:
        conv_igemm.conv_fprop(problem.shape, x, w, None, grad_y)
    assert launches[-1].kernel.source in ("conv_igemm.cu", "conv_igemm_planes.cu")
    assert not [
        v for v in conv_igemm.variants("conv_fprop", problem.shape, x, w, grad_y) if "wgmma" in v
    ]


def test_misaligned_tensors_stay_with_mma_sync() -> None:
    problem = S((1, 64, 9, 9), (64, 64, 3, 3))
    x, w, y = problem.tensors()
    shifted = torch.empty(x.numel() + 1, dtype=BFLOAT)[1:].view(1, 9, 9, 64).permute(0, 3, 1, 2)
    for tensor in (x, shifted):
        with trace(run=False) as launches:
            conv_igemm.conv_fprop(problem.shape, tensor, w, None, y)
        assert launches[0].kernel.entry == f"conv_fprop_{'igemm' if tensor is shifted else 'sm90'}"


def test_other_gpus_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only capability 9.0 has wgmma: neither what came before nor what came after."""
    properties = SimpleNamespace(multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        target.of_gpu.cache_clear()
        assert sm90.multiprocessors(torch.device("cuda:0")) == (114 if capability == (9, 0) else 0)
    target.of_gpu.cache_clear()
    problem = S((1, 64, 9, 9), (64, 64, 3, 3))
    x, w, y = problem.tensors()
    monkeypatch.setattr(sm90, "multiprocessors", lambda device: 0)
    with trace(run=False) as launches:
        conv_igemm.conv_fprop(problem.shape, x, w, None, y)
    assert entries(launches) == ["conv_fprop_igemm"]


@needs_emulator
def test_results_do_not_depend_on_the_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = S((2, 64, 17, 17), (72, 64, 3, 3), padding=1)
    x, w, y = problem.tensors()
    results = []
    for sms in (132, 3, 2):
        monkeypatch.setattr(sm90, "multiprocessors", lambda device, sms=sms: sms)
        with conv_igemm.forced("wgmma128x64"), trace() as launches:
            conv_igemm.conv_fprop(problem.shape, x, w, None, y.fill_(float("nan")))
        assert product(launches).grid[0] == min(sms, 10)
        results.append(y.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ---- counts ----------------------------------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("dtype", [HALF, FLOAT], ids=str)
def test_counts(dtype: torch.dtype, op: str) -> None:
    """Products are those of the tiles, and shared memory is met without bank conflicts."""
    if dtype == FLOAT and op == "conv_wgrad":
        pytest.skip("served by conv_igemm.cu")
    problem, tile = Problem((1, 64, 16, 16), (128, 64, 3, 3), dtype, True, padding=1), Tile(128, 64)
    with conv_igemm.forced(str(tile)), emulate.profile() as profiles:
        launches = problem.run(op)
    launch = product(launches)
    profile = next(p for p in profiles if p.launch is launch)
    rows, columns, k = {
        "conv_fprop": (256, 128, 576), "conv_dgrad": (256, 64, 1152), "conv_wgrad": (576, 128, 256)
    }[op]  # fmt: skip
    blocks = -(-rows // tile.block_m) * -(-columns // tile.block_n)
    per_step = tile.block_m // 64
    assert profile.counters.wgmma_instructions == blocks * per_step * k * dtype.itemsize // 32
    # fp32 results take a wavefront more for each 128 bytes on their way to TMA.
    stored = 0 if dtype == HALF else rows * columns * 4 // 128
    assert profile.bank_conflicts == stored


# ---- machine code ----------------------------------------------------------------------------------------

needs_nvrtc = pytest.mark.skipif(
    sass.disassembler() is None, reason="nvdisasm is missing: pip install 'cnnops[test]'"
)


@needs_nvrtc
@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize(
    "variant", ["wgmma128x256", "wgmma256x128", "wgmma128x64", "wgmma128x256c2"]
)
@pytest.mark.parametrize("dtype", [BFLOAT, FLOAT], ids=str)
def test_machine_code(dtype: torch.dtype, variant: str, op: str) -> None:
    """wgmma in flight while the next is issued, operands by TMA, registers as declared, nothing in local
    memory.
    """
    tile = next(t for t in TILES if str(t) == variant)
    if dtype == FLOAT and (op == "conv_wgrad" or tile.cluster > 1):
        pytest.skip("fp32 has neither")
    pytest.importorskip("cuda.bindings.nvrtc")
    problem = Problem((2, 256, 12, 12), (256, 256, 3, 3), dtype, True, padding=1)
    x, w, grad_y = problem.tensors()
    arguments = {
        "conv_fprop": (x, w, None, grad_y), "conv_dgrad": (grad_y, w, None, x), "conv_wgrad": (grad_y, x, w),
    }[op]  # fmt: skip
    with conv_igemm.forced(variant), trace(run=False) as launches:
        getattr(conv_igemm, op)(problem.shape, *arguments)
    kernel = product(launches).kernel
    cubin, log = jit.compile_cubin(kernel.source, kernel.constants, "90a")
    assert "C75" not in log, "ptxas says why it serialises wgmma, or ignores setmaxnreg"
    (found,) = [r for r in jit.resources(log) if r.entry == kernel.entry]
    assert found.spill_store_bytes == found.spill_load_bytes == 0
    code = sass.code(cubin)
    counts = sass.count(code.instructions)
    assert not counts["LDL"] and not counts["STL"] and not counts["HMMA"]
    assert counts["UTMALDG"] >= 2 and counts["USETMAXREG"] == 2
    assert any(".IM2COL" in text for text in code.instructions if text.startswith("UTMALDG"))
    assert (counts["UTMASTG"] > 0) == (op != "conv_wgrad")
    multicast = any(
        ".MULTICAST" in text for text in code.instructions if text.startswith("UTMALDG")
    )
    assert multicast == (tile.cluster > 1)
    loop = code.main_loop("HGMMA")
    assert sass.count(loop)["HGMMA"] == 4 * tile.block_m // 128
    shape = f"64x{tile.block_n}x{32 // dtype.itemsize}"
    assert all(shape in text for text in loop if text.startswith("HGMMA"))
    # Half types: one wait a stage, which leaves its own products under way.
    waits = [text for text in loop if text.startswith("WARPGROUP.DEPBAR")]
    assert len(waits) == 1 and waits[0].endswith("0x1" if dtype == BFLOAT else "0x0")
    assert len(loop) <= 50 * 4 * tile.block_m // 128 + 60


# ---- tensor maps -----------------------------------------------------------------------------------------


def test_maps_are_kept_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map is encoded once an address, and no tensor is held for it."""
    problem = S((1, 64, 9, 9), (64, 64, 3, 3))
    x, w, y = problem.tensors()
    encoded: list[tuple[str, int]] = []

    def encode(map_: tensor_map.TensorMap, tensor: torch.Tensor) -> bytes:
        encoded.append((map_.tensor, map_.address(tensor)))
        return bytes(tensor_map.BYTES)

    monkeypatch.setattr(tensor_map, "encoded", encode)
    monkeypatch.setattr(jit, "_by_value", lambda content: content)
    monkeypatch.setattr(jit, "_make_current", lambda index: None)
    with trace(run=False) as launches:
        conv_igemm.conv_fprop(problem.shape, x, w, None, y)
    plan = product(launches)
    tensors = (x, w, None, None, None, y, None)
    for _ in range(3):
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        assert len(jit._tensor_maps(plan, tensors, pointers, 0)) == 3
    assert [name for name, _ in encoded] == ["x", "w", "y"]
    for i in range(jit.MOST_ADDRESSES + 5):
        jit._tensor_maps(plan, tensors, [i], 0)
    assert len(plan.encoded) <= jit.MOST_ADDRESSES
    assert not [v for maps in plan.encoded.values() for v in maps if isinstance(v, torch.Tensor)]


# ---- what is said of it ----------------------------------------------------------------------------------


def test_explain_names_the_tile() -> None:
    problem = Problem((8, 256, 28, 28), (256, 256, 3, 3), BFLOAT, True, padding=1)
    x, w, _ = problem.tensors()
    with cnnops.engine("emulate"), trace(run=False):
        (choice,) = cnnops.explain(partial(cnnops.functional.conv2d, padding=1), x, w)
    assert choice.row.algorithm == "conv_igemm" and "tile wgmma" in choice.detail
