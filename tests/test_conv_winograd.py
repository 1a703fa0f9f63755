"""Winograd's convolution of the cpu engine, against PyTorch's in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, assert_close
from cases.base import laid_out, normal
from torch import Tensor

import cnnops
from cnnops.cpu import conv, conv_winograd, conv_winograd_weights, winograd_axes
from cnnops.epilogue import ACTIVATIONS, Epilogue
from cnnops.shapes import ConvShape

FLOAT, HALF = torch.float32, torch.float16
TYPES = [FLOAT, HALF, torch.bfloat16]

SIZES = {
    "even": ((2, 32, 16, 16), 64, 1),
    "uneven": ((3, 19, 13, 9), 23, ((0, 1), (2, 0))),
    "one tile": ((1, 17, 3, 3), 16, 0),
    "wide": ((1, 20, 6, 141), 80, ((2, 2), (0, 1))),
    "two stretches": ((1, 100, 9, 10), 130, 1),
    # The filters' transforms are too large to be kept; tiles of several images, in several blocks.
    "deep": ((11, 240, 7, 7), 250, 1),
    # The weight gradient's sum is split, into blocks of several images of which the last has fewer.
    "batch": ((41, 5, 8, 7), 50, 1),
}
"""Sizes of x, filters and padding."""

SIDES = (3, 5)
"""Taps along each axis."""

SCHEMES = {"three": (3, 1, 1), "five": (5, 1, 1), "strided": (3, 2, 1), "dilated": (3, 1, 2)}
"""Taps along each axis, stride and dilation."""

LAYOUTS = {
    "three": ("contiguous", "channels_last", "sliced", "transposed"),
    "strided": ("contiguous", "channels_last", "sliced", "transposed"),
    "five": ("contiguous", "channels_last"),
    "dilated": ("contiguous", "channels_last"),
}
"""How tensors lie."""

COMBINED = [
    pytest.param(scheme, layout, dtype, id=f"{scheme}-{layout}-{str(dtype).removeprefix('torch.')}")
    for scheme, layouts in LAYOUTS.items()
    for layout in layouts
    for dtype in TYPES
    # Half types differ in how they are read and written, which all schemes do alike.
    if not (scheme == "strided" and dtype == HALF)
]

ACTS = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def correlated(shape: ConvShape, x: Tensor, w: Tensor) -> Tensor:
    """The convolution in float64, its padding as uneven as it may be."""
    padding = [p for pair in reversed(shape.padding) for p in pair]
    return F.conv2d(
        F.pad(x.double(), padding), w.double(), stride=shape.stride, dilation=shape.dilation
    )


def shape_for(
    scheme: str,
    x_size: tuple[int, ...],
    K: int,
    padding: int | tuple[tuple[int, int], ...] | None = None,
) -> ConvShape:
    """The problem of a scheme; padding is so many steps of the dilation, by default what keeps the size."""
    side, stride, dilation = SCHEMES[scheme]
    if padding is None:
        padding = side // 2
    pairs = ((padding,) * 2,) * 2 if isinstance(padding, int) else padding
    scaled = tuple((before * dilation, after * dilation) for before, after in pairs)
    w_size = (K, x_size[1], side, side)
    return ConvShape.of(x_size, w_size, stride=stride, padding=scaled, dilation=dilation)


def weights_gradient(shape: ConvShape, x: Tensor, grad_y: Tensor) -> Tensor:
    (padding, _), _ = shape.padding
    return torch.nn.grad.conv2d_weight(
        x.double(), shape.w_size, grad_y.double(), shape.stride, padding, shape.dilation
    )


def computed(
    shape: ConvShape,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    epilogue: Epilogue | None = None,
    layout: str = "contiguous",
) -> Tensor:
    def blank(size: tuple[int, ...]) -> Tensor:
        return torch.full(size, 7.0, dtype=x.dtype)

    y = laid_out(shape.y_size, layout, blank)
    conv_winograd.fprop(shape, x, w, bias, y, epilogue)
    return y


# ---- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "layout", "dtype"), COMBINED)
@pytest.mark.parametrize("size", SIZES)
def test_values(size: str, scheme: str, layout: str, dtype: torch.dtype) -> None:
    """Forward and both gradients, where there are tiles for them, with a bias for the first two."""
    x_size, K, padding = SIZES[size]
    if size == "one tile":
        padding = {"five": ((4, 1), (0, 3)), "dilated": ((2, 1), (1, 2))}.get(scheme, padding)
    shape = shape_for(scheme, x_size, K, padding)
    x = laid_out(x_size, layout, normal(1, dtype))
    w = laid_out(shape.w_size, layout, normal(2, dtype))
    bias, bias_x = normal(3, dtype)((K,)), normal(4, dtype)((x_size[1],))
    leaf, weight = x.double().requires_grad_(), w.double().requires_grad_()
    expected = correlated(shape, leaf, weight)
    y = computed(shape, x, w, bias, layout=layout)
    assert_close(y, expected + bias.double().view(-1, 1, 1), TOLERANCE[dtype].output, "output")

    grad_y = laid_out(shape.y_size, layout, normal(5, dtype))
    grad_x = torch.full_like(x, 7.0)
    to_x, to_w = torch.autograd.grad(expected, (leaf, weight), grad_y.double())
    to_x += bias_x.double().view(-1, 1, 1)
    if conv_winograd.scheme_of(shape, "dgrad") is not None:
        conv_winograd.dgrad(shape, grad_y, w, bias_x, grad_x)
        assert_close(grad_x, to_x, TOLERANCE[dtype].output, "input gradient")
    else:
        assert scheme == "strided" and any(before != 1 for before, _ in shape.padding)

    grad_w = laid_out(shape.w_size, layout, lambda size: torch.full(size, 7.0, dtype=dtype))
    conv_winograd_weights.wgrad(shape, grad_y, x, grad_w)
    assert_close(grad_w, to_w, TOLERANCE[dtype].gradient, "weight gradient")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transformed", ["inputs", "filters"])
def test_tiles_that_reach_beyond_the_results(
    scheme: str, transformed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of outputs that are left over, along both axes; several blocks, of several images; which
    of the two is transformed for all tasks."""
    monkeypatch.setattr(conv_winograd, "TILES", 10)
    monkeypatch.setattr(conv_winograd, "BLOCK_BYTES", 200_000)
    monkeypatch.setattr(conv_winograd, "FILTER_BYTES", 0 if transformed == "inputs" else 1 << 30)
    monkeypatch.setattr(conv_winograd, "NEAR_BYTES", 1 << 30)
    threads = torch.get_num_threads()
    # A dilation's images are read with their channels last.
    order = torch.channels_last if scheme == "dilated" else torch.contiguous_format
    for h, w_ in product(range(3, 11), repeat=2):
        shape = shape_for(scheme, (3, 20, h, w_), 17)
        w = normal(1, FLOAT)(shape.w_size)
        x = normal(2, FLOAT)(shape.x_size).contiguous(memory_format=order)
        straight = (shape, "float32", False, threads)
        leaf = x.double().requires_grad_()
        expected = correlated(shape, leaf, w)
        y = torch.full(shape.y_size, 7.0).contiguous(memory_format=order)
        grad_x = torch.full_like(x, 7.0)
        plan = conv_winograd._fprop.__wrapped__(*straight)
        assert plan._given_v is (transformed == "inputs")
        plan.run(x, w, (w.stride(0), w.stride(1), 1, 0), None, y, Epilogue())
        assert_close(y, expected, TOLERANCE[FLOAT].output, f"output of {h} by {w_}")
        (to_x,) = torch.autograd.grad(expected, leaf, y.double())
        plan = conv_winograd._dgrad.__wrapped__(*straight)
        plan.run(y, w, (w.stride(1), w.stride(0), 1, 1), None, grad_x, Epilogue())
        assert_close(grad_x, to_x, TOLERANCE[FLOAT].output, f"gradient of {h} by {w_}")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("images", [1, 5])
def test_tiles_that_reach_beyond_the_gradients(
    scheme: str, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of them that are left over, along both axes, for the weight gradient, in several
    blocks."""
    monkeypatch.setattr(conv_winograd_weights, "TILES", 7)
    monkeypatch.setattr(conv_winograd_weights, "_weigh", conv_winograd_weights._weigh.__wrapped__)
    order = torch.channels_last if scheme == "dilated" else torch.contiguous_format
    for h, w_ in product(range(3, 11), repeat=2):
        shape = shape_for(scheme, (images, 20, h, w_), 17)
        x, grad_y = (
            normal(seed, FLOAT)(size).contiguous(memory_format=order)
            for seed, size in enumerate((shape.x_size, shape.y_size))
        )
        grad_w = torch.full(shape.w_size, 7.0)
        plan = conv_winograd_weights._Plan(shape, "float32", (False, False))
        plan.run(grad_y, x, grad_w)
        expected = weights_gradient(shape, x, grad_y)
        assert_close(grad_w, expected, TOLERANCE[FLOAT].gradient, f"gradient of {h} by {w_}")


def test_products_of_last_tiles() -> None:
    """How many of its outputs come before those that are wanted, and a bit for each product they need."""
    every = {
        "three taps": [(1, 0b011110), (1, 0b011110), (0, 0b011111), (0, 0b111111)],
        "five taps": [(0, 0b011111), (0, 0b111111)],
        "strided": [(0, 0b00111), (0, 0b11111)],
        "spread": [(0, 0b00010), (0, 0b00111), (0, 0b01111), (0, 0b11111)],
    }
    assert every.keys() == winograd_axes.SCHEMES.keys()
    for name, scheme in winograd_axes.SCHEMES.items():
        assert [scheme.last(n + 1) for n in range(scheme.outputs)] == every[name]
    for name, last in (("three taps", 4), ("five taps", 2), ("strided", 2)):
        scheme = winograd_axes.WEIGHTS[name]
        masks = [scheme.with_gradients(n + 1) for n in range(scheme.taps)]
        some, all_ = (0b00111, 0b11111) if name == "strided" else (0b011111, 0b111111)
        assert masks == [some] * (last - 1) + [all_]


def test_what_lies_between_results_stays() -> None:
    x, w = normal(1, FLOAT)((2, 19, 7, 6)), normal(2, FLOAT)((21, 19, 3, 3))
    shape = ConvShape.of(x.shape, w.shape, padding=1)
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        wide = torch.full([s + 2 for s in (2, 21, 7, 6)], 7.0)
        if order[1] != 1:
            wide = wide.to(memory_format=torch.channels_last)
        y = wide[1:-1, 1:-1, 1:-1, 1:-1]
        conv_winograd.fprop(shape, x, w, None, y)
        assert_close(y, correlated(shape, x, w), TOLERANCE[FLOAT].output, "output")
        y.fill_(7.0)
        assert (wide == 7.0).all()
    wide = torch.full((23, 21, 5, 5), 7.0)
    grad_w = wide[1:-1, 1:-1, 1:-1, 1:-1]
    conv_winograd_weights.wgrad(shape, normal(3, FLOAT)(shape.y_size), x, grad_w)
    assert not (grad_w == 7.0).any()
    grad_w.fill_(7.0)
    assert (wide == 7.0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_batch_that_is_expanded(layout: str) -> None:
    x, w = normal(1, FLOAT)((1, 16, 6, 5)), normal(2, FLOAT)((16, 16, 3, 3))
    x = laid_out((1, 16, 6, 5), layout, lambda size: x).expand(3, -1, -1, -1)
    shape = ConvShape.of(x.shape, w.shape, padding=1)
    y = computed(shape, x, w, layout=layout)
    assert_close(y, correlated(shape, x, w), TOLERANCE[FLOAT].output, "output")


@pytest.mark.parametrize("some", [1, 2])
def test_many_tiles_and_channels(some: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs' transforms are made in several goes, of `some` blocks each, the last one not whole."""
    x_size, K, padding = SIZES["deep"]
    x, w = normal(1, FLOAT)((17, *x_size[1:])), normal(2, FLOAT)((K, x_size[1], 3, 3))
    shape = ConvShape.of(x.shape, w.shape, padding=padding)
    monkeypatch.setattr(conv_winograd, "TILES", 24)
    monkeypatch.setattr(conv_winograd, "WAVE_BYTES", some * 24 * 36 * 4 * x_size[1])
    plan = conv_winograd._fprop.__wrapped__(shape, "float32", False, 1)
    assert len(plan._waves) == -(-3 // some)
    y = torch.full(shape.y_size, 7.0)
    plan.run(x, w, (w.stride(0), 9, 1, 0), None, y, Epilogue())
    assert_close(y, correlated(shape, x, w), TOLERANCE[FLOAT].output, "output")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float32_errors_are_small_for_many_channels(scheme: str) -> None:
    """As the module says."""
    shape = shape_for(scheme, (1, 512, 8, 8), 512)
    x, w = normal(1, FLOAT)(shape.x_size), normal(2, FLOAT)(shape.w_size)
    stride = shape.stride[0]
    expected = correlated(shape, x, w)
    error = (computed(shape, x, w).double() - expected).abs()
    assert error.norm() <= (0.9e-6 if stride == 1 else 3.3e-7) * expected.norm()
    assert error.max() <= (1e-5 if stride == 1 else 2.5e-6) * expected.std()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_of_the_weight_gradient_are_small(scheme: str) -> None:
    """As its module says, with some room."""
    shape = shape_for(scheme, (16, 32, 28, 28), 48)
    x, grad_y = normal(1, FLOAT)(shape.x_size), normal(2, FLOAT)(shape.y_size)
    stride = shape.stride[0]
    grad_w = torch.empty(shape.w_size)
    conv_winograd_weights.wgrad(shape, grad_y, x, grad_w)
    expected = weights_gradient(shape, x, grad_y)
    error = (grad_w.double() - expected).abs()
    assert error.norm() <= (1.2e-6 if stride == 1 else 4e-7) * expected.norm()
    assert error.max() <= (1e-5 if stride == 1 else 2.5e-6) * expected.std()


# ---- epilogues --------------------------------------------------------------------------------------------


def test_every_activation_is_tried() -> None:
    assert tuple(ACTS) == ACTIVATIONS


@pytest.mark.parametrize(("scheme", "layout", "dtype"), COMBINED)
def test_epilogues(scheme: str, layout: str, dtype: torch.dtype) -> None:
    """Each activation, with and without scale, bias and residual; the last may be where y will be."""
    shape = shape_for(scheme, (2, 24, 7, 9), 37)
    x, w = normal(1, dtype)(shape.x_size), normal(2, dtype)(shape.w_size)
    x, w = x / 4, w / shape.kernel[0]
    sums = correlated(shape, x, w)
    scale, bias = normal(3, dtype)((37,)), normal(4, dtype)((37,))
    residual = laid_out(shape.y_size, layout, normal(5, dtype))
    for name, act in ACTS.items():
        scaled = sums * scale.double().view(-1, 1, 1)
        z = scaled + bias.double().view(-1, 1, 1) + residual.double()
        y = residual.clone(memory_format=torch.preserve_format)
        if y.stride() != residual.stride():
            y = laid_out(shape.y_size, layout, lambda size: residual)
        conv_winograd.fprop(shape, x, w, bias, y, Epilogue(scale, y, name))
        assert_close(y, act(z), 2 * TOLERANCE[dtype].output, f"{name}, all")
        y = computed(shape, x, w, None, Epilogue(scale, None, name), layout)
        assert_close(y, act(scaled), 2 * TOLERANCE[dtype].output, f"{name}, scale")


# ---- numbers that are not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("place", [(0, 0), (5, 6), (8, 9)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_finite_does_not_vanish(
    scheme: str, place: tuple[int, int], layout: str, value: float
) -> None:
    """It is in every output that sees it, and in no tile that does not read it."""
    side, stride, dilation = SCHEMES[scheme]
    h, w_ = place
    shape = shape_for(scheme, (2, 16, 9, 10), 16)
    x = laid_out(shape.x_size, layout, normal(1, FLOAT))
    w = normal(2, FLOAT)(shape.w_size)
    x[1, 3, h, w_] = value
    y = computed(shape, x, w, epilogue=Epilogue(activation="none"), layout=layout)
    seen = ~correlated(shape, x, w).isfinite()
    assert seen.any() and not y[seen].isfinite().any()
    # A tile of `out` by `out`, from `step` by `step` inputs, reads so much more on each side; with a dilation
    # all of it is so many places apart.
    step, more = 7 - side if stride == 1 else 4, side // 2
    out = step // stride
    inside = torch.zeros_like(seen)
    lines, columns = (
        [
            q * dilation + i % dilation
            for q in range(
                max((i // dilation - more) // step * out, 0),
                (i // dilation + more) // step * out + out,
            )
            if q * dilation + i % dilation < size
        ]
        for i, size in zip(place, shape.output, strict=True)
    )
    inside[1, :, torch.tensor(lines)[:, None], torch.tensor(columns)] = True
    assert y[~inside].isfinite().all()


def test_nan_in_a_filter_is_in_its_outputs_alone() -> None:
    x, w = normal(1, FLOAT)((1, 16, 6, 6)), normal(2, FLOAT)((20, 16, 3, 3))
    w[18, 5, 1, 1] = float("nan")
    shape = ConvShape.of(x.shape, w.shape, padding=1)
    wild = computed(shape, x, w, epilogue=Epilogue(activation="relu")).isnan()
    assert wild[:, 18].all() and wild.sum() == 36


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_finite_stays_in_its_channel_of_the_weight_gradient(
    scheme: str, layout: str, value: float
) -> None:
    shape = shape_for(scheme, (2, 16, 9, 10), 20)
    x, grad_y = (
        laid_out(size, layout, normal(seed, FLOAT))
        for seed, size in enumerate((shape.x_size, shape.y_size))
    )
    grad_w = torch.empty(shape.w_size)

    def seen(a: Tensor, b: Tensor) -> Tensor:
        """Taps at which a number that is not finite is multiplied by a place of the other tensor."""
        a, b = ((~t.isfinite() if t.isfinite().logical_not().any() else t == t) for t in (a, b))
        return weights_gradient(shape, a, b) != 0

    wild = x.clone(memory_format=torch.preserve_format)
    wild[1, 3, -1, -1] = value
    conv_winograd_weights.wgrad(shape, grad_y, wild, grad_w)
    finite = grad_w.isfinite()
    assert finite[:, :3].all() and finite[:, 4:].all()
    assert seen(wild, grad_y).any() and not finite[seen(wild, grad_y)].any()
    wild = grad_y.clone(memory_format=torch.preserve_format)
    wild[1, 18, -1, -1] = value
    conv_winograd_weights.wgrad(shape, wild, x, grad_w)
    finite = grad_w.isfinite()
    assert finite[:18].all() and finite[19:].all()
    assert seen(x, wild).any() and not finite[seen(x, wild)].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_another_call_left_in_scratch_does_not_matter(scheme: str) -> None:
    """Lanes without a channel, and tiles that reach beyond x."""
    shape = shape_for(scheme, (3, 19, 13, 9), 23)
    x, grad_y = normal(1, FLOAT)(shape.x_size), normal(2, FLOAT)(shape.y_size)
    results = []
    for _ in range(2):
        grad_w = torch.empty(shape.w_size)
        conv_winograd_weights.wgrad(shape, grad_y, x, grad_w)
        results.append(grad_w)
        nan = torch.full_like(x, torch.nan), torch.full_like(grad_y, torch.nan)
        conv_winograd_weights.wgrad(shape, nan[1], nan[0], torch.empty(shape.w_size))
    assert torch.equal(*results)


# ---- threads and widths -----------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    former = torch.get_num_threads()
    yield
    torch.set_num_threads(former)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", ["two stretches", "deep", "batch"])
def test_same_bits_for_any_number_of_threads(size: str, scheme: str) -> None:
    x_size, K, padding = SIZES[size]
    shape = shape_for(scheme, (4, *x_size[1:]), K, padding)
    x, w = normal(1, FLOAT)(shape.x_size), normal(2, FLOAT)(shape.w_size)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        grad_x = torch.empty_like(x)
        y = computed(shape, x, w)
        conv_winograd.dgrad(shape, y, w, None, grad_x)
        grad_w = torch.empty_like(w)
        conv_winograd_weights.wgrad(shape, y, x, grad_w)
        results.append((y, grad_x, grad_w))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize(
    "bits, dtype, scheme",
    [
        (128, FLOAT, "five"),
        (256, torch.bfloat16, "three"),
        (128, torch.bfloat16, "strided"),
    ],
)
def test_values_at_other_widths(bits: int, dtype: torch.dtype, scheme: str) -> None:
    """The tests above of a scheme, in a process whose vectors are so wide."""
    name = str(dtype).removeprefix("torch.")
    chosen = f"(test_values or test_epilogues) and not widths and {scheme} and {name}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "CNNOPS_SIMD_BITS": str(bits)},
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


# ---- which problems are taken -----------------------------------------------------------------------------


def shape_of(**changes: object) -> ConvShape:
    sizes: dict[str, object] = dict(x=(8, 64, 28, 28), w=(64, 64, 3, 3), padding=1)
    return ConvShape.of(**{**sizes, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
def test_taken(direction: str) -> None:
    for size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        shape = shape_of(x=(8, size[0], size[1], size[1]), w=(size[0], size[0], 3, 3))
        large = shape_of(x=shape.x_size, w=(size[0], size[0], 5, 5), padding=2)
        for dtype in TYPES:
            assert conv_winograd.takes(shape, dtype, direction)  # type: ignore[arg-type]
            assert conv_winograd.takes(large, dtype, direction)  # type: ignore[arg-type]
        assert not conv_winograd.takes(shape, torch.float64, direction)  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_taken_with_a_dilation(direction: str) -> None:
    for step in (2, (1, 4), (3, 2)):
        shape = shape_of(x=(8, 128, 30, 29), w=(128, 128, 3, 3), padding=step, dilation=step)
        for dtype in TYPES:
            if direction == "wgrad":
                assert conv_winograd_weights.takes(shape, dtype)
            else:
                assert conv_winograd.takes(shape, dtype, direction)  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
def test_taken_with_a_stride(direction: str) -> None:
    for size in ((64, 56), (128, 56), (256, 28)):
        shape = shape_of(x=(8, size[0], size[1], size[1]), w=(128, size[0], 3, 3), stride=2)
        for dtype in TYPES:
            assert conv_winograd.takes(shape, dtype, direction)  # type: ignore[arg-type]
        assert not conv_winograd.takes(shape, torch.float64, direction)  # type: ignore[arg-type]
    # The input gradient's tiles begin where a padding of 1 has them.
    before = shape_of(stride=2, padding=((0, 1), (0, 1)))
    assert conv_winograd.takes(before, FLOAT, direction) is (direction == "fprop")  # type: ignore[arg-type]


def test_weight_gradients_that_are_taken() -> None:
    for size in ((16, 56), (64, 56), (128, 28), (256, 14), (512, 7)):
        shape = shape_of(x=(8, size[0], size[1], size[1]), w=(size[0], size[0], 3, 3))
        large = shape_of(x=shape.x_size, w=(size[0], size[0], 5, 5), padding=2)
        for dtype in TYPES:
            assert conv_winograd_weights.takes(shape, dtype)
            assert conv_winograd_weights.takes(large, dtype)
        assert not conv_winograd_weights.takes(shape, torch.float64)
    for size in ((128, 56), (256, 28), (512, 14)):
        shape = shape_of(x=(8, size[0], size[1], size[1]), w=(size[0], size[0], 3, 3), stride=2)
        assert all(conv_winograd_weights.takes(shape, dtype) for dtype in TYPES)
    assert not conv_winograd_weights.takes(shape_of(stride=3), FLOAT)
    assert not conv_winograd_weights.takes(shape_of(w=(64, 64, 5, 5), padding=2, stride=2), FLOAT)
    # Transforms would take longer than the products.
    assert not conv_winograd_weights.takes(shape_of(x=(8, 3, 28, 28), w=(64, 3, 3, 3)), FLOAT)
    assert not conv_winograd_weights.takes(shape_of(w=(2, 64, 3, 3)), FLOAT)


@pytest.mark.parametrize(
    "changes",
    [
        dict(w=(64, 64, 3, 2)),
        dict(w=(64, 64, 3, 5)),
        dict(w=(64, 64, 4, 4)),
        dict(w=(64, 64, 5, 5), padding=5),
        dict(stride=3),
        dict(stride=(1, 2)),
        dict(w=(64, 64, 5, 5), stride=2),
        dict(dilation=2, padding=1),
        dict(dilation=2, padding=((1, 3), (2, 2))),
        dict(dilation=2, padding=2, stride=2),
        dict(w=(64, 32, 3, 3), groups=2),
        dict(padding=3),
        dict(padding=((1, -1), (1, 1))),
        dict(padding_mode="reflect"),
        dict(x=(0, 64, 28, 28)),
        dict(x=(8, 64, 28), w=(64, 64, 3)),
        # Direct convolution is faster: few channels, or filters that are transformed for one tile.
        dict(x=(8, 3, 28, 28), w=(64, 3, 3, 3)),
        dict(x=(1, 64, 4, 4)),
    ],
    ids=str,
)
def test_not_taken(changes: dict[str, object]) -> None:
    assert conv_winograd.takes(shape_of(), FLOAT, "fprop")
    assert not conv_winograd.takes(shape_of(**changes), FLOAT, "fprop")


def test_the_setting() -> None:
    with cnnops.winograd(False):
        assert not conv_winograd.takes(shape_of(), FLOAT, "fprop")
    assert conv_winograd.takes(shape_of(), FLOAT, "fprop")
    x = torch.empty(shape_of().x_size)
    for allowed in (False, True):
        with cnnops.winograd(allowed):
            form = conv._form("wgrad", shape_of(), x, x)
        assert (form is conv_winograd_weights) is allowed
