"""The tensor-core convolution: every tile, every way to copy an operand, what follows the sum, machine code,
counts.

The rows of tests/cases run it in half types (test_conv.py) where they do not lie as wgmma takes them
(test_conv_igemm_sm90.py), and here, as TF32 and in half types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import sass
import torch
import torch.nn.functional as F
from cases import CONV_CASES, TOLERANCE, ConvCase, assert_close, check, normal
from cases.base import needs_emulator
from igemm import BFLOAT, FLOAT, HALF, PASSES, Problem, tf32

import cnnops
from cnnops.cuda import conv_igemm, conv_igemm_sm90, emulate, jit
from cnnops.cuda.conv_igemm import STEP_BYTES, TILES, Tile
from cnnops.cuda.kernel import Launch
from cnnops.cuda.launch import trace
from cnnops.epilogue import Epilogue
from cnnops.shapes import ConvShape


@pytest.fixture(autouse=True)
def _without_wgmma(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on GPUs other than Hopper's; and torch gives leave to multiply float32 as TF32."""
    monkeypatch.setattr(conv_igemm_sm90, "multiprocessors", lambda device: 0)
    with tf32():
        yield


def constants(launches: Sequence[Launch]) -> dict[str, str | int]:
    assert launches[0].kernel.source == conv_igemm.SOURCE
    return dict(launches[0].kernel.constants)


# ---- rows of tests/cases ---------------------------------------------------------------------------------


def taken(case: ConvCase) -> bool:
    """Whether tensor cores serve it: no groups of few channels, and an image to look at."""
    most = case.w[0] if case.transposed else max(case.w[0] // case.groups, case.w[1])
    return most >= conv_igemm.FEWEST_CHANNELS and case.x[0] > 0


@needs_emulator
@pytest.mark.parametrize(
    "case", [c for c in CONV_CASES if c.schedules and taken(c)], ids=lambda c: c.id
)
def test_rows_in_tf32(case: ConvCase) -> None:
    with emulate.schedule("all"), cnnops.engine("emulate"):
        choices = cnnops.explain(case.ours, *case.tensors(FLOAT))
    assert {choice.row.algorithm for choice in choices} == {"conv_igemm"}
    check(case, "emulate", FLOAT, slack=500)


@needs_emulator
@pytest.mark.parametrize(
    "case", [c for c in CONV_CASES if len(c.dtypes) > 1 and taken(c)], ids=lambda c: c.id
)
def test_thread_order_does_not_matter(case: ConvCase) -> None:
    dtype = (BFLOAT, HALF)[CONV_CASES.index(case) % 2]
    with emulate.schedule("all"):
        check(case, "emulate", dtype)


# ---- tiles -----------------------------------------------------------------------------------------------

FORMS = ((HALF, True), (FLOAT, False), (BFLOAT, False), (FLOAT, True))


def problem_for(tile: Tile, dtype: torch.dtype, last: bool) -> Problem:
    """One that fills more than a tile, and no tile wholly."""
    if tile.groups > 1:
        c = tile.columns
        return Problem((1, c * 8, 7, 6), (c * 8, c, 3, 3), dtype, last, padding=1, groups=8)
    return Problem((2, 40, 12, 12), (72, 40, 3, 2), dtype, last, padding=1)


@needs_emulator
@pytest.mark.parametrize("turn", (0, 1))
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles(tile: Tile, turn: int) -> None:
    i = TILES.index(tile) + 2 * turn
    dtype, last = FORMS[(i + i // 4) % len(FORMS)]
    op = PASSES[(i + turn) % 3]
    last = last or (
        op == "conv_wgrad" and tile.sums > 96
    )  # without registers for what stands alone
    problem = problem_for(tile, dtype, last)
    with conv_igemm.forced(str(tile)):
        found = constants(problem.run(op))
    wanted = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "GROUPS": tile.groups}
    assert {name: found[name] for name in wanted} == wanted


@needs_emulator
@pytest.mark.parametrize("op", PASSES)
def test_sums_in_parts(op: str) -> None:
    for parts in (2, 3):
        with conv_igemm.forced(f"32x32x4/{parts}"):
            launches = problem_for(TILES[0], BFLOAT, True).run(op)
        assert [launch.kernel.entry for launch in launches] == [f"{op}_igemm", "conv_reduce_direct"]


def test_every_choice_fits() -> None:
    """Of all tiles, for every form: what the launcher offers has registers, and shared memory of any GPU."""
    for tile in TILES:
        assert (
            tile.shared_bytes <= 99 * 1024 - 10 * 1024
        )  # of sm_86, and what the kernel needs for itself
        assert tile.together(conv_igemm.OTHER_REGISTERS) == tile.resident
    for dtype in conv_igemm.DTYPES:
        for last in (True, False):
            x, w, grad_y = problem_for(TILES[0], dtype, last).tensors()
            shape = problem_for(TILES[0], dtype, last).shape
            for op, arguments in zip(
                PASSES, ((x, w, grad_y), (grad_y, w, x), (grad_y, x, w)), strict=True
            ):
                assert len(conv_igemm.variants(op, shape, *arguments)) >= 4


# ---- how operands are copied -----------------------------------------------------------------------------

# Problem, pass -> gathered (along steps, width), plain (along steps, width), stored (along rows, width).
COPIES = {
    "packs_of_channels": (Problem((1, 16, 6, 5), (8, 16, 3, 3), HALF, True, padding=1), "conv_fprop",
        (1, 8), (1, 8), (0, 8)),
    "four_channels": (Problem((1, 4, 6, 5), (12, 4, 3, 3), HALF, True, padding=1), "conv_fprop",
        (1, 4), (1, 4), (0, 4)),
    "two_channels": (Problem((1, 6, 6, 5), (10, 6, 3, 3), BFLOAT, True, padding=1), "conv_fprop",
        (1, 2), (1, 2), (0, 2)),
    "odd_channels": (Problem((1, 5, 6, 5), (7, 5, 3, 3), HALF, True, padding=1), "conv_fprop",
        (1, 1), (1, 1), (0, 1)),
    "odd_channels_wgrad": (Problem((1, 5, 6, 5), (7, 5, 3, 3), HALF, True, padding=1), "conv_wgrad",
        (0, 1), (0, 1), (1, 1)),
    "planes": (Problem((1, 5, 6, 8), (8, 5, 3, 3), BFLOAT, False, padding=1), "conv_fprop",
        (0, 1), (1, 1), (1, 8)),
    "planes_in_floats": (Problem((1, 5, 6, 8), (8, 5, 3, 3), FLOAT, False, padding=1), "conv_wgrad",
        (1, 1), (1, 4), (1, 1)),
    "pointwise_planes": (Problem((2, 9, 4, 4), (8, 9, 1, 1), HALF, False), "conv_fprop",
        (0, 8), (1, 1), (1, 8)),
    "pointwise_planes_of_six": (Problem((2, 9, 2, 3), (8, 9, 1, 1), HALF, False), "conv_wgrad",
        (1, 2), (1, 2), (1, 1)),
    "patches": (Problem((2, 3, 16, 24), (8, 3, 8, 8), HALF, False, 8), "conv_fprop",
        (1, 8), (1, 8), (1, 2)),
    "patches_channels_last": (Problem((2, 3, 16, 24), (8, 3, 8, 8), HALF, True, 8), "conv_fprop",
        (1, 8), (1, 8), (0, 8)),
    "patches_wgrad": (Problem((2, 3, 16, 24), (8, 3, 8, 8), FLOAT, True, 8), "conv_wgrad",
        (0, 4), (0, 4), (1, 4)),
    "filters_of_planes": (Problem((1, 16, 5, 6), (24, 16, 3, 3), HALF, True, 2, 1, w_last=False),
    "conv_dgrad",
        (1, 8), (0, 1), (0, 8)),
}  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("name", COPIES)
def test_copies(name: str) -> None:
    problem, op, *wanted = COPIES[name]
    found = constants(problem.run(op))
    names = (
        ("GATHER_ALONG_STEPS", "GATHER_VECTOR"), ("PLAIN_ALONG_STEPS", "PLAIN_VECTOR"),
        ("STORE_ALONG_ROWS", "STORE_VECTOR"),
    )  # fmt: skip
    assert [tuple(found[n] for n in pair) for pair in names] == wanted


@needs_emulator
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    problem = Problem((2, 8, 5, 6), (8, 8, 3, 3), BFLOAT, True, 1, ((2, 1), (0, 3)), mode=mode)
    for op in ("conv_fprop", "conv_wgrad"):
        assert constants(problem.run(op))["PADDING"] == mode.upper()


@needs_emulator
def test_offsets_beyond_31_bits() -> None:
    """An axis of one place may lie anywhere; offsets are then of 64 bits."""
    x, w = normal(1, HALF)((2, 8, 1)), normal(2, HALF)((8, 8, 3))
    shape = ConvShape.of(x.shape, w.shape, padding=1)
    far = x.as_strided(x.shape, (8, 1, 2**33))
    y = torch.full(shape.y_size, float("nan"), dtype=HALF)
    with trace() as launches:
        conv_igemm.conv_fprop(shape, far, w, None, y)
    assert constants(launches)["WIDE"] == 1
    expected = F.conv1d(
        far.clone(memory_format=torch.contiguous_format).double(), w.double(), padding=1
    )
    assert_close(y, expected, TOLERANCE[HALF].output, "far")


# ---- on the way out --------------------------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize("variant", ["64x64x4", "128x8x4", "32x32x4/2"])
@pytest.mark.parametrize("dtype, last", [(BFLOAT, True), (HALF, False), (FLOAT, True)], ids=str)
def test_epilogue(dtype: torch.dtype, last: bool, variant: str) -> None:
    problem = Problem((2, 16, 7, 6), (40, 16, 3, 3), dtype, last, padding=1)
    shape, (x, w, residual) = problem.shape, problem.tensors()
    scale, bias = (normal(seed, dtype)((shape.K,)) for seed in (5, 6))
    y = torch.full_like(residual, float("nan"))
    with conv_igemm.forced(variant), emulate.schedule("all"):
        conv_igemm.conv_fprop(shape, x, w, bias, y, Epilogue(scale, residual, "silu"))
    ones = (-1, *(1,) * shape.dims)
    z = problem.expected("conv_fprop") * scale.double().view(ones) + bias.double().view(ones)
    assert_close(y, F.silu(z + residual.double()), TOLERANCE[dtype].output, variant)


@needs_emulator
@pytest.mark.parametrize("follows", ["none", "relu"])
@pytest.mark.parametrize("variant", ["128x64x4", "32x32x4", "32x32x4/2"])
def test_moments(variant: str, follows: str) -> None:
    """Of what is stored, also far from zero; an activation's are taken in a pass of their own."""
    problem = Problem((3, 16, 7, 6), (40, 16, 3, 3), BFLOAT, True, padding=1)
    shape, (x, w, y) = problem.shape, problem.tensors()
    bias = normal(7, BFLOAT)((shape.K,)) * 30
    mean, var = torch.full((shape.K,), float("nan")), torch.full((shape.K,), float("nan"))
    with conv_igemm.forced(variant), emulate.schedule("all"), trace() as launches:
        conv_igemm.conv_fprop(shape, x, w, bias, y, Epilogue(None, None, follows, mean, var))
    stored = y.double().movedim(1, 0).flatten(1)
    assert_close(mean, stored.mean(1), 1e-6, "mean")
    assert_close(var, stored.var(1, unbiased=False), 1e-5, "var")
    gathered = follows == "none" and "/" not in variant
    assert (launches[-1].kernel.entry == "conv_moments_direct") == gathered


# ---- which problems it takes -----------------------------------------------------------------------------


@needs_emulator
def test_tf32_is_a_matter_of_leave() -> None:
    x, w = torch.randn(1, 8, 6, 6), torch.randn(8, 8, 3, 3)
    for precision, algorithm in (("tf32", "conv_igemm"), ("ieee", "conv_direct")):
        torch.backends.mkldnn.conv.fp32_precision = precision
        with cnnops.engine("emulate"):
            (choice,) = cnnops.explain(cnnops.functional.conv2d, x, w)
        assert choice.row.algorithm == algorithm
    assert "conv_igemm: float32: expected torch.backends.cudnn.conv.fp32_precision 'tf32'" in str(
        choice
    )


def test_leave_on_a_gpu_is_cudnns() -> None:
    from cnnops import config

    cudnn = torch.backends.cudnn
    former = cudnn.allow_tf32
    try:
        for allowed in (True, False):
            cudnn.allow_tf32 = allowed
            assert config.tf32("cuda", FLOAT) is allowed
            assert not config.tf32("cuda", torch.float64) and not config.tf32("cpu", FLOAT)
    finally:
        cudnn.allow_tf32 = former


def test_what_it_refuses() -> None:
    few, dense = (
        ConvShape.of((1, 6, 5, 5), (6, 2, 3, 3), groups=3),
        ConvShape.of((1, 8, 5, 5), (8, 8, 3, 3)),
    )
    assert "expected at least 4" in str(conv_igemm.supports("conv_fprop", few, HALF))
    assert "dtype torch.float64" in str(conv_igemm.supports("conv_fprop", dense, torch.float64))
    assert conv_igemm.supports("conv_bgrad", dense, HALF)
    modes = ConvShape.of((1, 8, 5, 5), (8, 8, 3, 3), padding=1, padding_mode="reflect")
    assert "conv_fold" in str(conv_igemm.supports("conv_dgrad", modes, HALF))


# ---- counts ----------------------------------------------------------------------------------------------

COUNTED = {
    "last": (Problem((1, 64, 16, 16), (128, 64, 3, 3), HALF, True, padding=1), "128x128x4"),
    "planes": (Problem((1, 64, 16, 16), (128, 64, 3, 3), BFLOAT, False, padding=1), "128x128x3"),
    "floats": (Problem((1, 32, 16, 16), (128, 32, 3, 3), FLOAT, True, padding=1), "128x128x4"),
    "groups": (Problem((1, 64, 16, 16), (64, 8, 3, 3), HALF, True, padding=1, groups=8), "64x32x3g4"),
}  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("name", COUNTED)
def test_counts(name: str, op: str) -> None:
    """Products, traffic and bank conflicts are what the tile's model says, and no more."""
    problem, variant = COUNTED[name]
    tile = next(t for t in TILES if str(t) == variant)
    with conv_igemm.forced(variant), emulate.profile() as profiles:
        problem.run(op)
    profile, found = profiles[0], constants([profiles[0].launch])
    gemm = problem.shape.gemm_mnk(op.removeprefix("conv_"))  # type: ignore[arg-type]
    # wgrad's rows are the entries of the filter here.
    m, n = (gemm.N, gemm.M) if op == "conv_wgrad" else (gemm.M, gemm.N)
    steps = STEP_BYTES // problem.dtype.itemsize
    stages = -(-gemm.K // steps)
    blocks = -(-m // tile.block_m) * -(-n // tile.columns) * (problem.groups // tile.groups)
    per_stage = tile.block_m // 16 * (tile.block_n // 8) * STEP_BYTES // 32
    assert profile.counters.mma_instructions == blocks * stages * per_stage

    read = sum(t.requested for t in profile.tensors if not t.writes) * 32
    # What stands alone is asked for by sectors, of rows that begin anywhere.
    alone = 1 in (found["GATHER_VECTOR"], found["PLAIN_VECTOR"])
    model = blocks * stages * tile.stage_bytes
    assert read <= model * (3 if alone else 1.5 if tile.groups > 1 else 1)
    # What a block looks up about itself once; wgrad of planes reads its rows' addresses at every stage.
    assert profile.bank_conflicts <= profile.shared_wavefronts * 0.035


# ---- machine code ----------------------------------------------------------------------------------------

needs_nvrtc = pytest.mark.skipif(
    sass.disassembler() is None, reason="nvdisasm is missing: pip install 'cnnops[test]'"
)
# The least share of mma among the instructions of the main loop, in percent, and the tile.
SHARE = {
    (HALF, True): (21, "128x128x4"), (FLOAT, True): (9, "128x128x4"),
    (HALF, False): (6, "128x128x3"), (FLOAT, False): (6, "128x128x3"),
}  # fmt: skip


@needs_nvrtc
@pytest.mark.parametrize(
    "dtype, last, arch",
    [(*form, arch) for form in SHARE for arch in ("80", "90a") if form[1] or arch == "80"],
    ids=str,
)
def test_machine_code(dtype: torch.dtype, last: bool, arch: str) -> None:
    """The main loop multiplies on tensor cores, copies by 16 bytes, reads matrices and spills nothing."""
    share, variant = SHARE[dtype, last]
    tile = next(t for t in TILES if str(t) == variant)
    pytest.importorskip("cuda.bindings.nvrtc")
    for op in PASSES:
        problem = Problem((2, 64, 12, 12), (128, 64, 3, 3), dtype, last, padding=1)
        x, w, grad_y = problem.tensors()
        arguments = {
            "conv_fprop": (x, w, None, grad_y), "conv_dgrad": (grad_y, w, None, x), "conv_wgrad": (grad_y, x,
            w)
        }[op]  # fmt: skip
        with conv_igemm.forced(variant), trace(run=False) as launches:
            getattr(conv_igemm, op)(problem.shape, *arguments)
        kernel = launches[0].kernel
        cubin, _ = jit.compile_cubin(kernel.source, kernel.constants, arch)
        code = sass.code(cubin)
        everything, loop = sass.count(code.instructions), sass.count(code.main_loop("HMMA"))
        shape = ".16816.F32" if dtype == HALF else ".1688.F32.TF32"
        assert any(text.startswith(f"HMMA{shape}") for text in code.instructions)
        assert not everything["LDL"] and not everything["STL"]
        assert loop["HMMA"] == tile.sums // 4 * STEP_BYTES // 32 and loop["BAR"] == 1
        assert 100 * loop["HMMA"] >= share * loop.total()
        found = dict(kernel.constants)
        if found["GATHER_VECTOR"] * dtype.itemsize == 16:  # type: ignore[operator]
            assert any(
                text.startswith("LDGSTS") and ".128" in text for text in code.main_loop("HMMA")
            )
        by_steps = not (found["GATHER_ALONG_STEPS"] or found["GATHER_VECTOR"] == 1)
        assert loop["LDSM"] >= 8 or (dtype == FLOAT and by_steps)


@needs_nvrtc
def test_every_tile_multiplies_as_recorded() -> None:
    """No main loop has grown beyond tests/igemm_tiles.csv, of which every fourth row is compiled."""
    pytest.importorskip("cuda.bindings.nvrtc")
    recorded, found = sass.read_tiles()[::4], sass.compiled_tiles(4)
    assert [row[:2] for row in found] == [row[:2] for row in recorded], sass.COMMAND
    for before, now in zip(recorded, found, strict=True):
        assert now.local == 0 and now.mma == before.mma, f"{now}: expected {before}"
        assert now.instructions <= 1.05 * before.instructions, (
            f"{now}: expected {before}; {sass.COMMAND}"
        )


# ---- dense planes ----------------------------------------------------------------------------------------

PLANES = {
    "plain": (Problem((2, 17, 12, 20), (20, 17, 3, 3), HALF, False, padding=1), "planes8x16x32"),
    "floats": (Problem((1, 36, 9, 33), (70, 36, 3, 3), FLOAT, False, padding=1), "planes4x32x64"),
    "wide": (Problem((1, 70, 17, 18), (100, 70, 2, 3), BFLOAT, False, padding=1), "planes8x16x128"),
    "strided": (Problem((1, 5, 30, 19), (17, 5, 5, 3), FLOAT, False, (2, 1), 2), "planes16x8x32"),
    "dilated_1d": (Problem((2, 20, 140), (7, 20, 3), BFLOAT, False, 1, 1, 2), "planes1x128x16"),
    "groups_3d": (Problem((1, 6, 5, 9, 18), (8, 3, 3, 3, 2), HALF, False, 1, 1, groups=2), "planes8x16x16"),
    "cropped": (Problem((1, 4, 9, 70), (6, 4, 3, 3), FLOAT, False, 1, ((-1, 0), (1, -2))), "planes2x64x16"),
    "depth_padded": (Problem((1, 4, 3, 6, 7), (5, 4, 3, 3, 3), FLOAT, False, 1, 2), "planes8x16x16"),
    "reflect": (Problem((1, 4, 20, 20), (9, 4, 3, 3), BFLOAT, False, 1, ((2, 1), (0, 3)), mode="reflect"),
        "planes8x16x16"),
    "circular_3d": (Problem((1, 4, 4, 6, 9), (9, 4, 3, 3, 3), FLOAT, False, 1, 1, mode="circular"),
        "planes8x16x16"),
}  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("name", PLANES)
def test_planes(name: str) -> None:
    problem, variant = PLANES[name]
    back = problem.mode == "zeros" and problem.stride == 1
    for op in PASSES[: 2 if back else 1]:
        with conv_igemm.forced(variant), emulate.profile() as profiles:
            launches = problem.run(op)
        assert [launch.kernel.entry for launch in launches] == [
            "conv_pack_planes",
            f"{op}_planes",
        ], op
        # With a stride of two along w eight places meet their banks twice.
        assert (
            profiles[1].bank_conflicts
            <= (0.02 if problem.stride == 1 else 0.5) * profiles[1].shared_wavefronts
        )


@needs_emulator
@pytest.mark.parametrize("dtype", [BFLOAT, FLOAT], ids=str)
def test_epilogue_of_planes(dtype: torch.dtype) -> None:
    problem = Problem((2, 16, 7, 16), (40, 16, 3, 3), dtype, False, padding=1)
    shape, (x, w, residual) = problem.shape, problem.tensors()
    scale, bias = (normal(seed, dtype)((shape.K,)) for seed in (5, 6))
    y = torch.full_like(residual, float("nan"))
    with conv_igemm.forced("planes8x16x32"), emulate.schedule("all"), trace() as launches:
        conv_igemm.conv_fprop(shape, x, w, bias, y, Epilogue(scale, residual, "gelu"))
    assert launches[-1].kernel.entry == "conv_fprop_planes"
    z = problem.expected("conv_fprop") * scale.double().view(-1, 1, 1) + bias.double().view(
        -1, 1, 1
    )
    assert_close(y, F.gelu(z + residual.double()), TOLERANCE[dtype].output, "epilogue")


def test_planes_are_for_planes() -> None:
    """Channels that are neighbours, windows that do not overlap, strided gradients: the other form."""
    for problem, op in (
        (replace(PLANES["plain"][0], last=True), "conv_fprop"),
        (Problem((1, 8, 16, 16), (8, 8, 1, 1), HALF, False), "conv_fprop"),
        (PLANES["strided"][0], "conv_dgrad"),
        (PLANES["plain"][0], "conv_wgrad"),
    ):
        shape, (x, w, grad_y) = problem.shape, problem.tensors()
        arguments = {
            "conv_fprop": (x, w, grad_y),
            "conv_dgrad": (grad_y, w, x),
            "conv_wgrad": (grad_y, x, w),
        }[op]
        assert not any("planes" in name for name in conv_igemm.variants(op, shape, *arguments))
    problem = Problem((8, 64, 56, 56), (64, 64, 3, 3), FLOAT, False, padding=1)
    sizes = problem.shape.x_size, problem.shape.w_size, problem.shape.y_size
    x, w, y = (torch.empty(size, device="meta") for size in sizes)
    assert conv_igemm.estimate("conv_fprop", problem.shape, x, w, y).variant.startswith("planes")
