"""The micro-kernels for channels-last memory against plain numpy, at every vector width."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch
from test_cpu_simd import address, assert_close, element, lanes, width

from cnnops.cpu import rows
from cnnops.cpu.task import Task, ahead, layout, unpack
from cnnops.cpu.vectors import elements
from cnnops.epilogue import ACTIVATIONS


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def tile_width(L: int, vectors: int) -> int:
    """So many vectors, and half a one where tiles may end with it on some CPUs."""
    return vectors * L + (8 if L == 16 else 0)


@lru_cache(None)
def multiply(T: str, L: int, M: int, W: int) -> Task:
    args = layout(f"{T}**4 int64**3 int64*4")

    def test_multiply(address: int, index: int, scratch: int) -> None:
        x, w, start, y, places, taps, outs, tap_count, count, some, more = unpack(address, args)
        rows.multiply(
            L, M, W, x, places, taps, tap_count, count, w, start, y, outs, some, more, w, 0
        )

    return Task(test_multiply, args)


@width
@element
@pytest.mark.parametrize(("M", "vectors"), [(rows.ROWS, 2), (1, 1)])
def test_multiply(T: str, bits: int, M: int, vectors: int, rng: np.random.Generator) -> None:
    L = lanes(T, bits)
    W = tile_width(L, vectors)
    x, start = rng.standard_normal(3000).astype(T), rng.standard_normal(W).astype(T)
    for taps, count in ((0, 5), (1, 1), (1, 40), (9, 3), (2, 17)):
        places = rng.integers(0, 1500, 2 * M)
        shifts = rng.integers(0, 1400, taps)
        w = rng.standard_normal((taps, count, W)).astype(T)
        outs = rng.permutation(M) * (W + 3)
        before = rng.standard_normal(M * (W + 3)).astype(T)
        patches = x[places[:M, None, None] + shifts[:, None] + np.arange(count)].astype(np.float64)
        sums = np.einsum("mtc,tcv->mv", patches, w.astype(np.float64))
        for more, some in product((0, 1), (W, W - 1, max(1, W - L - 1), 1)):
            y, expected = before.copy(), before.astype(np.float64)
            for m in range(M):
                line = slice(outs[m], outs[m] + some)
                expected[line] = sums[m, :some] + (before[line] if more else start[:some])
            data = (x, w, start, y, places, shifts, outs)
            multiply(T, L, M, W).run(1, 0, *map(address, data), taps, count, some, more)
            assert_close(y, expected)
            between = np.ones(len(y), bool)
            for m in range(M):
                between[outs[m] : outs[m] + some] = False
            assert np.array_equal(y[between], before[between])


@lru_cache(None)
def outer(T: str, L: int, M: int, W: int, asking: bool) -> Task:
    args = layout(f"{T}**3 int64* int64*5")

    def test_outer(address: int, index: int, scratch: int) -> None:
        x, g, sums, places, count, step, pitch, more, later = unpack(address, args)
        if asking:
            rows.outer_asking(
                L, M, W, x, places, count, g, step, sums, pitch, more, later, places, 1
            )
        else:
            rows.outer(L, M, W, x, places, count, g, step, sums, pitch, more)

    return Task(test_outer, args)


@width
@element
@pytest.mark.parametrize(("M", "vectors"), [(rows.OUTER_ROWS, 2), (1, 1)])
def test_outer(T: str, bits: int, M: int, vectors: int, rng: np.random.Generator) -> None:
    L = lanes(T, bits)
    W = tile_width(L, vectors)
    step, pitch = W + 5, W + 1
    x = rng.standard_normal(1000).astype(T)
    for count in (0, 1, 37):
        places = rng.integers(0, 1000 - M, count)
        g = rng.standard_normal((count, step)).astype(T)
        before = rng.standard_normal((M, pitch)).astype(T)
        found = x[places[:, None] + np.arange(M)].astype(np.float64).T @ g[:, :W]
        for more in (0, 1):
            sums = before.copy()
            data = (x, g, sums, places)
            outer(T, L, M, W, False).run(1, 0, *map(address, data), count, step, pitch, more, 0)
            assert_close(sums[:, :W], found + more * before[:, :W])
            assert np.array_equal(sums[:, W:], before[:, W:])
            for later in (0, address(x)):
                again = before.copy()
                data = (x, g, again, places)
                outer(T, L, M, W, True).run(
                    1, 0, *map(address, data), count, step, pitch, more, later
                )
                assert np.array_equal(again, sums)


TURNED = {"float32": "float32", "float64": "float64", "bfloat16": "float32"}
"""Types in memory, and what they are turned into."""


@lru_cache(None)
def turn(kind: str, L: int, whole: bool) -> Task:
    T = TURNED[kind]
    args = layout(f"{T}* int64*5")

    def test_turn(address: int, index: int, scratch: int) -> None:
        to, source, pitch, stride, count, length = unpack(address, args)
        rows.turn(L, kind, whole, to, pitch, elements(source, kind), stride, count, length)

    return Task(test_turn, args)


@width
@pytest.mark.parametrize("kind", TURNED)
@pytest.mark.parametrize("whole", [False, True])
def test_turn(kind: str, bits: int, whole: bool, rng: np.random.Generator) -> None:
    """What lies behind the rows is left alone, or is the last row once more."""
    T = TURNED[kind]
    L = lanes(T, bits)
    for count in (1, L - 1, L):
        for length in (1, L, 2 * L + 3):
            source = torch.from_numpy(rng.standard_normal((L, length + 2)))
            source = source.to(getattr(torch, kind))
            to = np.full((length + 1, L + 3), 7, T)
            sizes = (L + 3, length + 2, count, length)
            turn(kind, L, whole).run(1, 0, address(to), source.data_ptr(), *sizes)
            expected = np.full_like(to, 7)
            expected[:length, :count] = source[:count, :length].T.to(getattr(torch, T)).numpy()
            if whole:
                expected[:length, count:L] = expected[:length, count - 1 : count]
            assert np.array_equal(to, expected)


@lru_cache(None)
def finish(L: int, kind: str) -> Task:
    args = layout("float32**3 int64*4")

    def test_finish(address: int, index: int, scratch: int) -> None:
        source, scale, shift, to, residual, count, activation = unpack(address, args)
        rows.finish(
            L,
            kind,
            elements(to, kind),
            ahead(source, 0),
            elements(residual, kind),
            count,
            ahead(scale, 0),
            ahead(shift, 0),
            activation,
        )

    return Task(test_finish, args)


@width
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_finish(kind: str, bits: int, rng: np.random.Generator) -> None:
    """Every activation, each operand given and left out, and nothing behind the count."""
    L, dtype = lanes("float32", bits), getattr(torch, kind)
    functions = {
        "none": lambda z: z,
        "relu": torch.relu,
        "relu6": torch.nn.functional.relu6,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "hardswish": torch.nn.functional.hardswish,
        "leaky_relu": torch.nn.functional.leaky_relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    for number, activation in enumerate(ACTIVATIONS):
        for count, scaled, added in ((1, True, True), (L, False, True), (2 * L + 3, True, False)):
            source, scale, shift = (
                rng.standard_normal(count).astype(np.float32) * 3 for _ in range(3)
            )
            residual = torch.from_numpy(rng.standard_normal(count)).to(dtype)
            to = torch.full((count + L,), 7.0, dtype=dtype)
            finish(L, kind).run(
                1,
                0,
                address(source),
                address(scale) if scaled else 0,
                address(shift),
                to.data_ptr(),
                residual.data_ptr() if added else 0,
                count,
                number,
            )
            z = source.astype(np.float64) * (scale if scaled else 1) + shift
            z = torch.from_numpy(z) + (residual.double() if added else 0)
            expected = functions[activation](z)
            bound = 2**-8 if kind == "bfloat16" else 2e-6
            assert (to[:count].double() - expected).norm() <= bound * expected.norm() + 1e-6
            assert (to[count:] == 7).all()
