"""The CPU engine's micro-kernels against plain numpy, at every vector width."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pytest
import torch
from numba import types
from numba.extending import intrinsic

import cnnops
from cnnops.cpu import conv, conv_blocks, conv_rows, pool, simd
from cnnops.cpu.task import Task, ahead, layout, unpack
from cnnops.functional import conv2d, max_pool2d
from cnnops.shapes import ConvShape, PoolShape

TYPES = ["float32", "float64"]
CLOSE = {"float32": 1e-6, "float64": 1e-14}
width = pytest.mark.parametrize("bits", simd.WIDTHS)
element = pytest.mark.parametrize("T", TYPES)


def lanes(T: str, bits: int) -> int:
    return bits // (8 * np.dtype(T).itemsize)


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def assert_close(result: np.ndarray, expected: np.ndarray) -> None:
    """Norm-relative, by the result's own type."""
    error = np.linalg.norm(result.astype(np.float64) - expected)
    assert error <= CLOSE[result.dtype.name] * np.linalg.norm(expected)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- micro-kernels ---------------------------------------------------------------------------------------


@lru_cache(None)
def transpose(T: str, L: int) -> Task:
    args = layout(f"{T}**2 int32* int64*2")

    def test_transpose(address: int, index: int, scratch: int) -> None:
        to, source, offsets, pitch, length = unpack(address, args)
        simd.transpose(L, to, pitch, source, offsets, length)

    return Task(test_transpose, args)


@width
@element
def test_transpose(T: str, bits: int, rng: np.random.Generator) -> None:
    """Rows up to a whole number of vectors, and nothing between or behind them."""
    L = lanes(T, bits)
    source = rng.standard_normal(1000).astype(T)
    offsets = rng.integers(0, 900, L).astype(np.int32)
    for length in (0, 1, L, L + 1):
        rows = -(-length // L) * L
        to = np.full((3 * L, L + 5), 7, T)
        transpose(T, L).run(1, 0, *map(address, (to, source, offsets)), L + 5, length)
        assert np.array_equal(to[:rows, :L], source[offsets + np.arange(rows)[:, None]])
        assert (to[rows:] == 7).all() and (to[:, L:] == 7).all()


@lru_cache(None)
def gemm(T: str, L: int, M: int, V: int) -> Task:
    args = layout(f"{T}**3 int32* int64*3")

    def test_gemm(address: int, index: int, scratch: int) -> None:
        a, b, c, offsets, count, pitch, accumulate = unpack(address, args)
        simd.gemm(L, M, V, a, b, offsets, count, c, pitch, accumulate)

    return Task(test_gemm, args)


@width
@element
@pytest.mark.parametrize("tile", [(6, 4), (6, 2), (4, 3), (1, 8)])
def test_gemm(T: str, bits: int, tile: tuple[int, int], rng: np.random.Generator) -> None:
    (M, V), L = tile, lanes(T, bits)
    for count in (0, 1, 7, 40):
        a = rng.standard_normal((count, M)).astype(T)
        b = rng.standard_normal(1000).astype(T)
        offsets = rng.integers(0, 1000 - V * L, count).astype(np.int32)
        products = sum(
            (np.outer(a[k], b[offsets[k] : offsets[k] + V * L]) for k in range(count)),
            np.zeros((M, V * L)),
        )
        before = rng.standard_normal((M, V * L + 3)).astype(T)
        for accumulate in (0, 1):
            c = before.copy()
            gemm(T, L, M, V).run(
                1, 0, *map(address, (a, b, c, offsets)), count, c.shape[1], accumulate
            )
            assert_close(c[:, : V * L], products + accumulate * before[:, : V * L])
            assert np.array_equal(c[:, V * L :], before[:, V * L :])


@lru_cache(None)
def dot(T: str, L: int, M: int, N: int) -> Task:
    args = layout(f"{T}**3 int32* int64*6")

    def test_dot(address: int, index: int, scratch: int) -> None:
        a, b, c, offsets, row, line, step, lines, length, pitch = unpack(address, args)
        simd.dot(L, M, N, a, row, line, b, offsets, step, lines, length, c, pitch)

    return Task(test_dot, args)


@width
@element
@pytest.mark.parametrize("tile", [(5, 5), (3, 3), (1, 5)])
def test_dot(T: str, bits: int, tile: tuple[int, int], rng: np.random.Generator) -> None:
    (M, N), L = tile, lanes(T, bits)
    for length in (1, L - 1, L, 2 * L + 3):
        lines, line, step = 3, length + L, length + 7
        a = rng.standard_normal((M, lines * line)).astype(T)
        # What lies between the lines takes no part, be it NaN.
        for s in range(lines):
            a[:, s * line + length : (s + 1) * line] = np.nan
        b = rng.standard_normal(1000).astype(T)
        offsets = rng.integers(0, 500, N).astype(np.int32)
        c = rng.standard_normal((M, N + 2)).astype(T)
        expected = c.astype(np.float64)
        for m in range(M):
            for n in range(N):
                for s in range(lines):
                    there = offsets[n] + s * step
                    left = a[m, s * line : s * line + length].astype(np.float64)
                    expected[m, n] += left @ b[there : there + length]
        sizes = (a.shape[1], line, step, lines, length, c.shape[1])
        dot(T, L, M, N).run(1, 0, *map(address, (a, b, c, offsets)), *sizes)
        assert_close(c, expected)


@width
@element
def test_dot_ignores_nan_behind_the_length(T: str, bits: int) -> None:
    """On both sides: zero times NaN would be NaN."""
    L = lanes(T, bits)
    a, b = np.ones((1, 2 * L), T), np.ones(2 * L, T)
    a[:, 3:], b[3:] = np.nan, np.nan
    c, offsets = np.zeros((1, 5), T), np.zeros(5, np.int32)
    dot(T, L, 1, 5).run(1, 0, *map(address, (a, b, c, offsets)), 0, 0, 0, 1, 3, 5)
    assert (c == 3).all()


@lru_cache(None)
def copy(T: str, L: int) -> Task:
    args = layout(f"{T}**3 int64")

    def test_copy(address: int, index: int, scratch: int) -> None:
        to, source, shift, count = unpack(address, args)
        simd.copy(L, to, source, count, shift[0])

    return Task(test_copy, args)


@pytest.fixture
def edge() -> Iterator[np.ndarray]:
    """A page of memory, and behind it one that must not be touched."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's mprotect")
    memory = np.frombuffer(mmap.mmap(-1, 2 * mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    behind = ctypes.c_void_p(memory.ctypes.data + mmap.PAGESIZE)
    assert libc.mprotect(behind, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    yield memory[: mmap.PAGESIZE]
    readable_and_writable = mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mprotect(behind, ctypes.c_size_t(mmap.PAGESIZE), readable_and_writable) == 0


@width
@element
def test_copy(T: str, bits: int, edge: np.ndarray, rng: np.random.Generator) -> None:
    """Exactly the elements asked for are read (the page behind them is forbidden) and written."""
    L = lanes(T, bits)
    for count in range(2 * L + 2):
        source = edge.view(T)[edge.view(T).size - count :]
        source[:] = rng.standard_normal(count)
        to = np.full(count + L, 7, T)
        shift = np.array([0.5], T)
        copy(T, L).run(1, 0, *map(address, (to, source, shift)), count)
        assert np.array_equal(to[:count], source + shift[0])
        assert (to[count:] == 7).all()


@element
def test_copy_by_minus_zero_changes_nothing(T: str) -> None:
    source = np.array([0.0, -0.0, np.inf, -np.inf, 1.0], T)
    to, shift = np.ones_like(source), np.array([-0.0], T)
    copy(T, lanes(T, 128)).run(1, 0, *map(address, (to, source, shift)), 5)
    assert np.array_equal(np.signbit(to), np.signbit(source)) and np.array_equal(to, source)


@lru_cache(None)
def sum_of(T: str) -> Task:
    args = layout(f"{T}* float64* int64*2")

    def test_sum_of(address: int, index: int, scratch: int) -> None:
        values, total, count, stride = unpack(address, args)
        total[0] = simd.sum_of(ahead(values, 1), count, stride)

    return Task(test_sum_of, args)


@element
def test_sum_of(T: str, rng: np.random.Generator) -> None:
    """In float64: the mean of numbers far from zero keeps its digits."""
    values, total = (1e6 + rng.standard_normal(3001)).astype(T), np.empty(1)
    for count, stride in ((0, 1), (1, 1), (3000, 1), (1000, 3)):
        sum_of(T).run(1, 0, address(values), address(total), count, stride)
        expected = values[1 : 1 + count * stride : stride].astype(np.float64).sum()
        assert abs(total[0] - expected) <= 1e-12 * abs(expected)


@intrinsic(prefer_literal=True)
def exponentials(typing_context, lanes, to, source):  # type: ignore[no-untyped-def]
    L = lanes.literal_value

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        _, to, source = values
        emit = simd.Emit(builder, to.type.pointee, L)
        emit.store(emit.exp(emit.load(source)), to)
        return context.get_dummy_value()

    return types.void(lanes, to, source), generate


@lru_cache(None)
def exp(T: str, L: int) -> Task:
    args = layout(f"{T}**2 int64")

    def test_exp(address: int, index: int, scratch: int) -> None:
        to, source, count = unpack(address, args)
        for i in range(0, count, L):
            exponentials(L, ahead(to, i), ahead(source, i))

    return Task(test_exp, args)


@element
def test_exp(T: str) -> None:
    """To two units in the last place, denormal results to one of theirs; and the same bits at every width,
    whether 2^n is one instruction or two factors."""
    reach = 110 if T == "float32" else 760
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, 1e-30, -1e-30, reach, -reach, 1e-8]
    z = np.concatenate([np.linspace(-reach, reach, 30_004), special]).astype(T)
    found = []
    for bits in simd.WIDTHS:
        found.append(np.full_like(z, 7))
        exp(T, lanes(T, bits)).run(1, 0, address(found[-1]), address(z), z.size)
        assert np.array_equal(found[-1], found[0], equal_nan=True)
    with np.errstate(over="ignore"):
        wanted = np.exp(z.astype(np.longdouble))
        rounded = wanted.astype(T)
    number = np.isfinite(rounded)
    assert np.array_equal(found[0][~number], rounded[~number], equal_nan=True)
    step = np.spacing(rounded[number]).astype(np.longdouble)
    assert (abs(found[0][number] - wanted[number]) <= 2 * step).all()


# ---- the width in force ----------------------------------------------------------------------------------


def test_width_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = simd.simd_bits.__wrapped__
    monkeypatch.delenv("CNNOPS_SIMD_BITS", raising=False)
    assert chosen() in simd.WIDTHS
    for bits in simd.WIDTHS:
        monkeypatch.setenv("CNNOPS_SIMD_BITS", str(bits))
        assert chosen() == bits
    monkeypatch.setenv("CNNOPS_SIMD_BITS", "100")
    with pytest.raises(ValueError, match=r"CNNOPS_SIMD_BITS: expected one of .*, got '100'"):
        chosen()


@pytest.fixture
def forced(bits: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine as it is on a CPU with vectors of so many bits."""
    forms = (conv_blocks, conv_rows)
    plans = (simd.tiles, *(plan for f in forms for plan in (f._fprop, f._dgrad, f._wgrad)))
    monkeypatch.setattr(simd, "simd_bits", lambda: bits)
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


@width
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.usefixtures("forced")
def test_convolution_at_every_width(groups: int) -> None:
    x = torch.randn(3, 6, 9, 11, dtype=torch.float64, requires_grad=True)
    w = torch.randn(12, 6 // groups, 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(12, dtype=torch.float64, requires_grad=True)
    results = []
    for engine in ("cpu", "aten"):
        with cnnops.engine(engine):
            y = conv2d(x, w, b, stride=(2, 1), padding=(1, 2), groups=groups)
            grads = torch.autograd.grad(y, (x, w, b), torch.cos(y.detach()))
        results.append([y.detach(), *grads])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-13 * theirs.norm()


@width
@pytest.mark.usefixtures("forced")
def test_pooling_at_every_width() -> None:
    x = torch.randn(2, 3, 13, 17)
    x[torch.rand_like(x) < 0.05] = float("nan")
    for kernel, stride, padding in ((2, 2, 0), (3, 1, 1), (3, 2, 1), (4, 3, 2)):
        with cnnops.engine("cpu"):
            ours = max_pool2d(x, kernel, stride, padding)
        theirs = torch.nn.functional.max_pool2d(x, kernel, stride, padding)
        assert torch.equal(ours.nan_to_num(nan=99.0), theirs.nan_to_num(nan=99.0))


# ---- numbers that are not finite, and bits that must not change ------------------------------------------


def test_infinity_stays_where_it_belongs() -> None:
    """Rows are computed with what lies between them: an infinity there must not reach other results."""
    x = torch.randn(1, 2, 6, 7)
    x[0, 0, 2, 0] = float("inf")
    shape = ConvShape.of(x.shape, (3, 2, 3, 3), padding=1)
    w, grad_y = torch.rand(3, 2, 3, 3) + 1, torch.rand(shape.y_size) + 1
    y, grad_w = torch.empty(shape.y_size), torch.empty(shape.w_size)
    conv.conv_fprop(shape, x, w, None, y)
    conv.conv_wgrad(shape, grad_y, x, grad_w)
    touched = torch.zeros(1, 3, 6, 7, dtype=torch.bool)
    touched[:, :, 1:4, :2] = True
    assert torch.equal(torch.isinf(y), touched) and not torch.isnan(y).any()
    # The last column of filters never sees column 0 of the image.
    assert torch.isinf(grad_w[:, 0, :, :2]).all() and torch.isfinite(grad_w[:, 0, :, 2]).all()
    assert torch.isfinite(grad_w[:, 1]).all()


@pytest.fixture
def threads() -> Iterator[None]:
    former = torch.get_num_threads()
    yield
    torch.set_num_threads(former)


@pytest.mark.usefixtures("threads")
def test_same_bits_for_any_number_of_threads() -> None:
    x, w = torch.randn(8, 20, 14, 14), torch.randn(50, 20, 5, 5)
    shape = ConvShape.of(x.shape, w.shape, padding=2)
    grad_y = torch.randn(shape.y_size)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y, grad_x = torch.empty(shape.y_size), torch.empty(shape.x_size)
        grad_w, grad_b = torch.empty(shape.w_size), torch.empty(50)
        conv.conv_fprop(shape, x, w, None, y)
        conv.conv_dgrad(shape, grad_y, w, None, grad_x)
        conv.conv_wgrad(shape, grad_y, x, grad_w)
        conv.conv_bgrad(shape, grad_y, grad_b)
        results.append((y, grad_x, grad_w, grad_b))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_a_window_that_dilation_takes_past_the_input() -> None:
    """PyTorch's value for it is -inf, too; no gradient comes back from there, and none is read."""
    x = torch.tensor([[[5.0]]])
    shape = PoolShape.of(x.shape, 2, stride=1, padding=1, dilation=2)
    y, offsets = torch.empty(shape.y_size), torch.empty(shape.y_size, dtype=torch.uint8)
    pool.max_pool_fwd(shape, x, y, offsets)
    assert torch.equal(y, torch.nn.functional.max_pool1d(x, 2, 1, 1, 2))
    grad_x, again = torch.empty_like(x), torch.empty_like(y)
    pool.max_pool_bwd(shape, torch.ones_like(y), offsets, grad_x)
    pool.max_pool_gather(shape, x, offsets, again)
    assert grad_x.item() == 0 and again.item() == 0
