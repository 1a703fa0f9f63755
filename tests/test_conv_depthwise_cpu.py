"""The CPU engine's depthwise convolution, below all operators, beside PyTorch's in float64.

Results are filled with NaN before, so that a place that nobody writes is found.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ALL, TOLERANCE, assert_close, laid_out, normal
from cases.base import Size
from torch import Tensor

from cnnops.cpu import conv_depthwise as depthwise
from cnnops.cpu import simd
from cnnops.epilogue import ACTIVATIONS, Epilogue
from cnnops.shapes import ConvShape

CONV = (F.conv1d, F.conv2d, F.conv3d)
LAST, ROWS = "channels_last", "contiguous"
LAYOUTS = [(LAST, LAST), (ROWS, ROWS), ("sliced", "transposed"), (LAST, ROWS), (ROWS, LAST)]
FUNCTIONS: dict[str, Any] = {
    "none": lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu,
    "hardswish": F.hardswish, "leaky_relu": F.leaky_relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
}  # fmt: skip

LENGTH = 8
"""Of a run of outputs in all tests but one, so that fewer kernels are compiled."""

every_dtype = pytest.mark.parametrize("dtype", ALL, ids=str)
every_layout = pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)


@pytest.fixture(autouse=True)
def one_length(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(depthwise, "_run_length", lambda *_: LENGTH)
    yield
    clear()


def clear() -> None:
    depthwise._correlation.cache_clear()
    depthwise._weight_gradient.cache_clear()


def nothing(size: Size, layout: str, dtype: torch.dtype) -> Tensor:
    return laid_out(size, layout, lambda s: torch.full(s, torch.nan, dtype=dtype))


def of(x: Size, kernel: Size, **arguments: Any) -> ConvShape:
    return ConvShape.of(x, (x[1], 1, *kernel), groups=x[1], **arguments)


def convolved(shape: ConvShape, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    sides = [p for pair in reversed(shape.padding) for p in pair]
    return CONV[shape.dims - 1](
        F.pad(x, sides), w, bias, shape.stride, 0, shape.dilation, shape.groups
    )


def check(shape: ConvShape, dtype: torch.dtype, layouts: tuple[str, str]) -> None:
    """All directions; the layouts are those of x and y."""
    of_x, of_y = layouts
    x, grad_y = (
        laid_out(size, layout, normal(seed, dtype))
        for seed, (size, layout) in enumerate(
            zip((shape.x_size, shape.y_size), layouts, strict=True)
        )
    )
    w, bias = normal(2, dtype)(shape.w_size), normal(3, dtype)((shape.K,))
    leaves = [t.to(torch.float64, copy=True).requires_grad_() for t in (x, w)]
    reference = convolved(shape, *leaves, bias.double())
    to_x, to_w = torch.autograd.grad(reference, leaves, grad_y.double())
    output, gradient = TOLERANCE[dtype]

    y = nothing(shape.y_size, of_y, dtype)
    depthwise.fprop(shape, x, w, bias, y)
    assert_close(y, reference, output, f"y of {shape}")

    grad_x = nothing(shape.x_size, of_x, dtype)
    depthwise.dgrad(shape, grad_y, w, bias, grad_x)
    with_bias = to_x + bias.double().view(-1, *(1,) * shape.dims)
    assert_close(grad_x, with_bias, gradient, f"grad_x of {shape}")

    grad_w = nothing(shape.w_size, "contiguous", dtype)
    depthwise.wgrad(shape, grad_y, x, grad_w)
    assert_close(grad_w, to_w, gradient, f"grad_w of {shape}")


SHAPES = {
    "3x3": of((2, 37, 9, 11), (3, 3), padding=1),
    "3x3_stride_2": of((2, 37, 10, 29), (3, 3), padding=1, stride=2),
    "5x5_stride_3": of((2, 16, 13, 20), (5, 5), padding=2, stride=3),
    "7x7": of((1, 32, 9, 35), (7, 7), padding=3),
    "long_filter": of((1, 16, 5, 40), (1, 21), padding=((0, 0), (10, 10))),
    "dilation": of((2, 20, 17, 19), (3, 3), padding=6, dilation=6),
    "dilation_and_stride": of((2, 20, 17, 19), (5, 3), padding=3, dilation=(2, 3), stride=(4, 2)),
    "uneven": of((2, 24, 11, 9), (4, 2), padding=((3, 0), (0, 2)), stride=(1, 2)),
    "cropped": of((2, 24, 12, 14), (3, 3), padding=((-2, 1), (3, -4)), stride=(2, 1)),
    "unreached": of((2, 24, 8, 9), (2, 1), stride=3),
    "pointwise": of((2, 40, 5, 6), (1, 1)),
    "one_place": of((3, 24, 1, 1), (3, 3), padding=1),
    "one_column": of((3, 24, 6, 1), (3, 1), padding=((1, 1), (0, 0))),
    "half_a_vector": of((3, 9, 7, 7), (3, 3), padding=1),
    "1d": of((2, 24, 61), (5,), padding=2, stride=2),
    "3d": of((2, 20, 5, 6, 9), (3, 2, 3), padding=((1, 1), (0, 2), (1, 1)), stride=(2, 1, 1)),
    "3d_dilated": of((1, 20, 7, 9, 8), (2, 3, 3), padding=2, dilation=(3, 1, 2), stride=(1, 2, 1)),
    "no_images": of((0, 24, 6, 7), (3, 3), padding=1),
}  # fmt: skip
every_shape = pytest.mark.parametrize("name", SHAPES)


@every_layout
@every_shape
def test_float32(name: str, layouts: tuple[str, str]) -> None:
    check(SHAPES[name], torch.float32, layouts)


@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.parametrize("name", ["7x7", "3x3_stride_2"])
def test_the_other_length(
    name: str, layouts: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the rows ask for: 14 places, or 7 of two vectors, where registers are many."""
    monkeypatch.undo()
    clear()
    many = simd.tiles().gemm_thin[1] == 8
    assert depthwise._run_length([7], 1) == LENGTH
    assert depthwise._run_length([28], 1) == (14 if many else LENGTH)
    assert depthwise._run_length([28], 2) == (7 if many else 4)
    assert depthwise._run_length([16], 2) == (LENGTH if many else 4)
    check(SHAPES[name], torch.float32, layouts)


@pytest.mark.parametrize("name", ["3x3", "3x3_stride_2"])
def test_rows_done_together_change_no_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many channels fewer rows: as few as one."""
    shape, results = SHAPES[name], []
    x, grad_y = (
        laid_out(size, LAST, normal(0, torch.float32)) for size in (shape.x_size, shape.y_size)
    )
    w = normal(1, torch.float32)(shape.w_size)
    row = 4 * LENGTH * shape.C
    for span in (128 * 1024, 3 * row, 1):
        monkeypatch.setattr(depthwise, "SPAN_BYTES", span)
        clear()
        y, grad_x = (nothing(size, LAST, torch.float32) for size in (shape.y_size, shape.x_size))
        depthwise.fprop(shape, x, w, None, y)
        depthwise.dgrad(shape, grad_y, w, None, grad_x)
        results.append((y, grad_x))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


LARGE = {
    "half_a_pair": of((2, 48, 9, 11), (3, 3), padding=1),
    "half_a_pair_stride_2": of((3, 112, 18, 29), (3, 3), padding=1, stride=2),
    "one_block": of((2, 16, 9, 11), (3, 3), padding=1),
    "not_in_lines": of((2, 36, 20, 19), (5, 5), padding=2),
    "many_channels": of((1, 4128, 3, 9), (3, 3), padding=1),
    "cropped": of((2, 64, 12, 14), (3, 3), padding=((-2, 1), (3, -4)), stride=(2, 1)),
    "1d": of((2, 48, 61), (5,), padding=2, stride=2),
    "3d": of((2, 32, 5, 9, 9), (3, 2, 3), padding=((2, 2), (0, 2), (1, 1)), stride=(1, 2, 1)),
    "3d_unreached": of((2, 32, 5, 6, 9), (1, 2, 3), padding=((2, 0), (0, 0), (1, 1))),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_larger_than_the_caches(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are written past the caches then, and what is read next is asked for."""
    monkeypatch.setattr(simd, "PAST", 0)
    check(LARGE[name], dtype, (LAST, LAST))


@pytest.mark.parametrize("start", [0, 4, 16, 20])
def test_some_channels_of_a_larger_tensor(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the caches or not, as lines of memory have it; its other channels stay as they were."""
    monkeypatch.setattr(simd, "PAST", 0)
    shape = LARGE["half_a_pair"]
    N, C, *places = shape.y_size
    x, w = (normal(n, torch.float32)(s) for n, s in enumerate((shape.x_size, shape.w_size)))
    x = x.to(memory_format=torch.channels_last)
    whole = nothing((N, C + 32, *places), LAST, torch.float32)
    y = whole[:, start : start + C]
    assert depthwise._in_lines(y)
    assert (y.data_ptr() % simd.LINE == 0) == (start % 16 == 0)
    depthwise.fprop(shape, x, w, None, y)
    expected = convolved(shape, x.double(), w.double())
    assert_close(y, expected, TOLERANCE[torch.float32].output, f"from {start} on")
    assert whole[:, :start].isnan().all()
    assert whole[:, start + C :].isnan().all()


@every_dtype
@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.parametrize("name", ["3x3", "3x3_stride_2", "uneven", "half_a_vector", "3d"])
def test_types(name: str, layouts: tuple[str, str], dtype: torch.dtype) -> None:
    check(SHAPES[name], dtype, layouts)


@pytest.mark.parametrize(
    "dtype, layouts",
    [*itertools.product([torch.float32], LAYOUTS[:3]), (torch.bfloat16, LAYOUTS[0])],
    ids=str,
)
def test_epilogues(layouts: tuple[str, str], dtype: torch.dtype) -> None:
    """Each activation with and without a residual, which may lie where the result will."""
    shape = of((2, 21, 8, 17), (3, 3), padding=1, stride=2)
    x = laid_out(shape.x_size, layouts[0], normal(0, dtype))
    w, scale, bias = (
        normal(seed, dtype)(size) for seed, size in ((1, shape.w_size), (2, (21,)), (3, (21,)))
    )
    residual = laid_out(shape.y_size, layouts[1], normal(4, dtype))
    z = convolved(shape, x.double(), w.double()) * scale.double().view(-1, 1, 1)
    for activation, beside, shift in itertools.product(ACTIVATIONS, (None, residual), (None, bias)):
        expected = z if shift is None else z + shift.double().view(-1, 1, 1)
        expected = FUNCTIONS[activation](
            expected if beside is None else expected + residual.double()
        )
        what = f"{activation}, {beside is not None}, {shift is not None}"
        y = nothing(shape.y_size, layouts[1], dtype)
        depthwise.fprop(shape, x, w, shift, y, Epilogue(scale, beside, activation))
        assert_close(y, expected, 2 * TOLERANCE[dtype].output, what)
        if beside is not None and layouts[1] != "transposed":
            y.copy_(residual)
            depthwise.fprop(shape, x, w, shift, y, Epilogue(scale, y, activation))
            assert_close(y, expected, 2 * TOLERANCE[dtype].output, f"{what}, in place")


@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
def test_epilogue_of_the_input_gradient(layouts: tuple[str, str]) -> None:
    """Every class of places gets it, also the one that no tap reaches."""
    shape = of((2, 21, 8, 17), (2, 2), stride=3)
    grad_y = laid_out(shape.y_size, layouts[1], normal(0, torch.float32))
    w, scale, bias = (
        normal(n, torch.float32)(s) for n, s in ((1, shape.w_size), (2, (21,)), (3, (21,)))
    )
    residual = laid_out(shape.x_size, layouts[0], normal(4, torch.float32))
    leaf = torch.zeros(shape.x_size, dtype=torch.float64, requires_grad=True)
    (z,) = torch.autograd.grad(convolved(shape, leaf, w.double()), leaf, grad_y.double())
    z = z * scale.view(-1, 1, 1) + bias.view(-1, 1, 1) + residual
    for activation in ("none", "relu", "silu"):
        grad_x = nothing(shape.x_size, layouts[0], torch.float32)
        epilogue = Epilogue(scale, residual, activation)
        depthwise.dgrad(shape, grad_y, w, bias, grad_x, epilogue)
        assert_close(grad_x, FUNCTIONS[activation](z), 2e-6, activation)


@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.parametrize("wild", [torch.nan, torch.inf])
def test_nan_and_infinity_reach_what_they_reach_in_torch(
    wild: float, layouts: tuple[str, str]
) -> None:
    """One place of x, at the border and within, or of grad_y, and nothing else's sums; through relu, too."""
    for shape in (SHAPES["3x3"], SHAPES["3x3_stride_2"]):
        x, grad_y = (
            laid_out(size, layout, normal(0, torch.float32))
            for size, layout in zip((shape.x_size, shape.y_size), layouts, strict=True)
        )
        w = normal(1, torch.float32)(shape.w_size)
        x[0, 3, 4, 5] = x[1, 36, 0, -1] = wild
        grad_y[0, 7, 2, 3] = wild
        leaves = [t.to(torch.float64, copy=True).requires_grad_() for t in (x, w)]
        reference = convolved(shape, *leaves)
        to_x, to_w = torch.autograd.grad(reference, leaves, grad_y.double())
        for activation in ("none", "relu", "silu"):
            y = nothing(shape.y_size, layouts[1], torch.float32)
            depthwise.fprop(shape, x, w, None, y, Epilogue(activation=activation))
            assert_close(y, FUNCTIONS[activation](reference), 2e-6, activation)
        grad_x = nothing(shape.x_size, layouts[0], torch.float32)
        depthwise.dgrad(shape, grad_y, w, None, grad_x)
        assert_close(grad_x, to_x, 2e-6, "grad_x")
        grad_w = nothing(shape.w_size, "contiguous", torch.float32)
        depthwise.wgrad(shape, grad_y, x, grad_w)
        assert_close(grad_w, to_w, 2e-6, "grad_w")


@pytest.fixture
def threads() -> Iterator[None]:
    former = torch.get_num_threads()
    yield
    torch.set_num_threads(former)


@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.usefixtures("threads")
def test_same_bits_for_any_number_of_threads(layouts: tuple[str, str]) -> None:
    shape = of((3, 40, 40, 29), (3, 3), padding=1)
    x, grad_y = (
        laid_out(size, layout, normal(0, torch.float32))
        for size, layout in zip((shape.x_size, shape.y_size), layouts, strict=True)
    )
    w, results = normal(1, torch.float32)(shape.w_size), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y, grad_x, grad_w = (
            nothing(size, layout, torch.float32)
            for size, layout in (
                (shape.y_size, layouts[1]), (shape.x_size, layouts[0]), (shape.w_size, ROWS),
            )
        )  # fmt: skip
        depthwise.fprop(shape, x, w, None, y)
        depthwise.dgrad(shape, grad_y, w, None, grad_x)
        depthwise.wgrad(shape, grad_y, x, grad_w)
        results.append((y, grad_x, grad_w))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
def test_long_sums_round_little(layouts: tuple[str, str]) -> None:
    """100 000 terms of one sign: added one by one in float32 they would be off by 1e-5 and more."""
    shape = of((8, 16, 112, 112), (1, 1))
    x, grad_y = (
        laid_out(size, layout, lambda s: torch.rand(s) + 0.5)
        for size, layout in zip((shape.x_size, shape.y_size), layouts, strict=True)
    )
    grad_w = nothing(shape.w_size, ROWS, torch.float32)
    depthwise.wgrad(shape, grad_y, x, grad_w)
    expected = (x.double() * grad_y.double()).sum((0, 2, 3)).view(-1, 1, 1, 1)
    assert_close(grad_w, expected, 3e-7, "grad_w")


@pytest.mark.parametrize("bits", [bits for bits in simd.WIDTHS if bits != simd.simd_bits()])
def test_other_widths(bits: int) -> None:
    """Every vector width, in a process that is told to use it."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import torch, test_conv_depthwise_cpu as tests
tests.depthwise._run_length = lambda *_: tests.LENGTH
for layouts in tests.LAYOUTS[:2]:
    for name in ("3x3_stride_2", "3d"):
        tests.check(tests.SHAPES[name], torch.float32, layouts)
tests.simd.PAST = 0
for name in ("half_a_pair", "half_a_pair_stride_2"):
    tests.check(tests.LARGE[name], torch.float32, tests.LAYOUTS[0])
assert tests.simd.simd_bits() == {bits}
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "CNNOPS_SIMD_BITS": str(bits)},
    )
    assert done.returncode == 0, done.stderr


def test_what_is_taken() -> None:
    taken = {
        "depthwise": (of((2, 32, 8, 8), (3, 3), padding=1), True),
        "padded_by_nothing": (of((2, 32, 8, 8), (3, 3), padding_mode="reflect"), True),
        "reflected": (of((2, 32, 8, 8), (3, 3), padding=1, padding_mode="reflect"), False),
        "multiplied": (ConvShape.of((2, 32, 8, 8), (64, 1, 3, 3), groups=32), False),
        "grouped": (ConvShape.of((2, 32, 8, 8), (32, 2, 3, 3), groups=16), False),
        "few_channels": (of((2, 3, 8, 8), (3, 3)), False),
        "row_beyond_the_cache": (of((1, 32, 1_000_000), (3,)), False),
    }
    for name, (shape, expected) in taken.items():
        for direction in ("fprop", "dgrad", "wgrad"):
            assert depthwise.takes(shape, direction) is expected, (name, direction)
