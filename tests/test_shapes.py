"""Rules about sizes: worked examples, formulas, layer tables of known networks, and PyTorch's own sizes."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cnnops.shapes import (
    ConvShape,
    GroupShape,
    LayerShape,
    NormShape,
    PoolShape,
    UnpoolShape,
    axes,
    conv_output,
    floor_seconds,
    padding_pairs,
    receptive_field,
)

# ---- worked examples ------------------------------------------------------------------------------------


def test_ten_filters() -> None:
    shape = ConvShape.of((1, 3, 32, 32), (10, 3, 5, 5), padding=2)
    assert shape.y_size == (1, 10, 32, 32)
    assert shape.parameters == 760
    assert shape.macs == 768_000
    assert shape.flops == 2 * 768_000


@pytest.mark.parametrize(
    "size, kernel, arguments, expected",
    [
        ((7, 7), (3, 3), {"stride": 2}, (3, 3)),
        ((3, 3), (2, 2), {}, (2, 2)),
        ((3, 3), (2, 2), {"padding": 1}, (4, 4)),
        ((3, 3), (2, 2), {"padding": 1, "stride": (3, 2)}, (2, 2)),
        ((5, 6), (1, 1), {}, (5, 6)),
        ((8, 9), (3, 2), {"dilation": 3, "padding": "same"}, (8, 9)),
        ((7, 6), (3, 3), {"padding": ((2, 0), (1, 3))}, (7, 8)),
        ((11,), (3,), {"stride": 2}, (5,)),
        ((5, 6, 7), (3, 3, 3), {"padding": 1, "stride": (1, 2, 3)}, (5, 3, 3)),
    ],
)
def test_convolution_outputs(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    arguments: dict[str, object],
    expected: tuple[int, ...],
) -> None:
    shape = ConvShape.of((1, 1, *size), (1, 1, *kernel), **arguments)
    assert shape.output == expected


@pytest.mark.parametrize("kernel", range(1, 12, 2))
def test_half_the_kernel_as_padding_keeps_the_size(kernel: int) -> None:
    pad = (kernel - 1) // 2
    assert conv_output(9, kernel, 1, (pad, pad), 1) == 9
    assert padding_pairs("same", (kernel,), (1,), (1,)) == ((pad, pad),)


@given(
    size=st.integers(0, 10**6), kernel=st.integers(1, 999), stride=st.integers(1, 99),
    pad=st.integers(0, 99),
)  # fmt: skip
def test_floor_and_ceil_formulas_agree(size: int, kernel: int, stride: int, pad: int) -> None:
    """``floor((H - K + 2P)/S) + 1`` and ``ceil((H - K + 1 + 2P)/S)`` are one number for integers.

    With n = H - K + 2P: floor(n/S) + 1 = ceil((n + 1)/S), since n = qS + r with 0 <= r < S gives q + 1 twice.
    """
    other = -(-(size - kernel + 1 + 2 * pad) // stride)
    assert conv_output(size, kernel, stride, (pad, pad), 1) == other


@given(layers=st.integers(0, 30), kernel=st.integers(1, 11))
def test_receptive_field_of_stacked_layers(layers: int, kernel: int) -> None:
    assert receptive_field([(kernel, 1)] * layers) == 1 + layers * (kernel - 1)


def test_receptive_field_with_strides() -> None:
    """AlexNet's up to its last pooling layer, by ``r += (K - 1)·j; j *= S``."""
    assert receptive_field([(11, 4), (3, 2), (5, 1), (3, 2), (3, 1), (3, 1), (3, 1), (3, 2)]) == 195
    assert receptive_field([(2, 2), (2, 2)]) == 4


@given(
    layers=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=3),
)
@settings(max_examples=25)
def test_receptive_field_is_what_a_gradient_reaches(layers: list[tuple[int, int]]) -> None:
    field = receptive_field(layers)
    x = torch.zeros(1, 1, field, requires_grad=True)
    y: torch.Tensor = x
    for kernel, stride in layers:
        y = F.conv1d(y, torch.ones(1, 1, kernel), stride=stride)
    assert y.shape[-1] == 1
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0, 0] != 0 and x.grad[0, 0, -1] != 0


ALEXNET = [
    # kind, out channels, kernel, stride, padding: out size, memory KB, parameters in thousands, MFLOP
    ("conv", 64, 11, 4, 2, 56, 784, 23, 73),
    ("pool", 64, 3, 2, 0, 27, 182, 0, 0.4),
    ("conv", 192, 5, 1, 2, 27, 547, 307, 224),
    ("pool", 192, 3, 2, 0, 13, 127, 0, 0.3),
    ("conv", 384, 3, 1, 1, 13, 254, 664, 112),
    ("conv", 256, 3, 1, 1, 13, 169, 885, 150),
    ("conv", 256, 3, 1, 1, 13, 169, 590, 100),
    ("pool", 256, 3, 2, 0, 6, 36, 0, 0.1),
]


def test_alexnet_layer_by_layer() -> None:
    size: tuple[int, ...] = (1, 3, 227, 227)
    for kind, channels, kernel, stride, padding, out, kilobytes, thousands, millions in ALEXNET:
        shape: ConvShape | PoolShape
        if kind == "conv":
            shape = ConvShape.of(size, (channels, size[1], kernel, kernel), None, stride, padding)
            work, parameters = shape.macs, shape.parameters
        else:
            shape = PoolShape.of(size, kernel, stride, padding)
            work, parameters = shape.flops, 0
        size = shape.y_size
        assert size == (1, channels, out, out)
        assert round(math.prod(size) * 4 / 1024) == kilobytes
        assert round(parameters / 1e3) == thousands
        assert round(work / 1e6, 1 if millions < 1 else None) == millions
    assert math.prod(size) == 9216


def test_lenet_layer_by_layer() -> None:
    """Today's form on 28x28 (ReLU, max pooling) and the one of 1998 on 32x32."""
    new = ConvShape.of((1, 1, 28, 28), (20, 1, 5, 5), padding=2)
    pooled = PoolShape.of(new.y_size, 2)
    second = ConvShape.of(pooled.y_size, (50, 20, 5, 5), padding=2)
    last = PoolShape.of(second.y_size, 2)
    assert [s.output for s in (new, pooled, second, last)] == [(28, 28), (14, 14), (14, 14), (7, 7)]
    assert math.prod(last.y_size) == 2450

    old = ConvShape.of((1, 1, 32, 32), (6, 1, 5, 5))
    pooled = PoolShape.of(old.y_size, 2)
    second = ConvShape.of(pooled.y_size, (16, 6, 5, 5))
    last = PoolShape.of(second.y_size, 2)
    third = ConvShape.of(last.y_size, (120, 16, 5, 5))
    outputs = [s.output for s in (old, pooled, second, last, third)]
    assert outputs == [(28, 28), (14, 14), (10, 10), (5, 5), (1, 1)]
    assert [s.parameters for s in (old, second, third)] == [156, 2416, 48120]


# ---- sizes are PyTorch's --------------------------------------------------------------------------------

small = st.integers(1, 5)


def _meta(*size: int) -> torch.Tensor:
    return torch.empty(size, device="meta")


@given(
    spatial=st.lists(st.integers(1, 14), min_size=1, max_size=3), batch=st.integers(0, 3), groups=small,
    per_group=small, filters=small, data=st.data(),
)  # fmt: skip
@settings(max_examples=150)
def test_convolution_sizes_are_torchs(
    spatial: list[int], batch: int, groups: int, per_group: int, filters: int, data: st.DataObject
) -> None:
    dims = len(spatial)
    draw = [
        data.draw(st.tuples(small, st.integers(1, 4), st.integers(0, 4), st.integers(1, 3)))
        for _ in spatial
    ]
    kernel, stride, padding, dilation = zip(*draw, strict=True)
    x, w = (batch, groups * per_group, *spatial), (groups * filters, per_group, *kernel)
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    try:
        expected = conv(_meta(*x), _meta(*w), None, stride, padding, dilation, groups).shape
    except RuntimeError:
        with pytest.raises(RuntimeError, match="expected"):
            ConvShape.of(x, w, None, stride, padding, dilation, groups)
        return
    shape = ConvShape.of(x, w, None, stride, padding, dilation, groups)
    assert shape.y_size == expected
    for direction, (rows, columns) in {
        "fprop": (math.prod(expected) // (groups * filters), filters),
        "dgrad": (math.prod(x) // (groups * per_group), per_group),
        "wgrad": (filters, per_group * math.prod(kernel)),
    }.items():
        gemm = shape.gemm_mnk(direction)
        assert (gemm.M, gemm.N) == (rows, columns)
        if direction != "dgrad":
            assert groups * math.prod(gemm) == shape.macs


@given(
    spatial=st.lists(st.integers(1, 14), min_size=2, max_size=3), ceil_mode=st.booleans(),
    whole_stride=st.booleans(), data=st.data(),
)  # fmt: skip
@settings(max_examples=200)
def test_max_pooling_sizes_are_torchs(
    spatial: list[int], ceil_mode: bool, whole_stride: bool, data: st.DataObject
) -> None:
    draw = [
        data.draw(st.tuples(small, st.integers(1, 4), st.integers(0, 3), st.integers(1, 3)))
        for _ in spatial
    ]
    kernel, steps, padding, dilation = zip(*draw, strict=True)
    stride = None if whole_stride else steps
    pool = F.max_pool2d if len(spatial) == 2 else F.max_pool3d
    x = (2, 3, *spatial)
    try:
        expected = pool(_meta(*x), kernel, stride, padding, dilation, ceil_mode).shape
    except RuntimeError:
        with pytest.raises(RuntimeError, match="expected"):
            PoolShape.of(x, kernel, stride, padding, dilation, ceil_mode)
        return
    assert PoolShape.of(x, kernel, stride, padding, dilation, ceil_mode).y_size == expected


@given(
    spatial=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    ceil_mode=st.booleans(),
    data=st.data(),
)
@settings(max_examples=100)
def test_average_pooling_sizes_are_torchs(
    spatial: tuple[int, int], ceil_mode: bool, data: st.DataObject
) -> None:
    draw = [data.draw(st.tuples(small, st.integers(1, 4), st.integers(0, 3))) for _ in spatial]
    kernel, stride, padding = zip(*draw, strict=True)
    x = (2, 3, *spatial)
    try:
        expected = F.avg_pool2d(_meta(*x), kernel, stride, padding, ceil_mode).shape
    except RuntimeError:
        with pytest.raises(RuntimeError, match="expected"):
            PoolShape.of(x, kernel, stride, padding, 1, ceil_mode)
        return
    assert PoolShape.of(x, kernel, stride, padding, 1, ceil_mode).y_size == expected


@given(
    spatial=st.lists(st.integers(1, 14), min_size=1, max_size=3), channels=st.integers(0, 3),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=100)
def test_adaptive_pooling_sizes_are_torchs(
    spatial: list[int], channels: int, data: st.DataObject
) -> None:
    wanted = data.draw(st.tuples(*(st.none() | st.integers(1, 9) for _ in spatial)))
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(spatial) - 1]
    x = (2, channels, *spatial)
    assume(len(spatial) > 1 or wanted[0] is not None)  # torch's 1-D form takes no None
    shape = PoolShape.adaptive(x, wanted)
    assert shape.y_size == pool(_meta(*x), wanted).shape
    for h, out, window in zip(spatial, shape.output, shape.kernel, strict=True):
        windows = [-(-(p + 1) * h // out) - p * h // out for p in range(out)]
        assert window == max(windows)


# ---- padding --------------------------------------------------------------------------------------------


@given(kernel=small, dilation=st.integers(1, 4), size=st.integers(1, 20))
def test_same_padding_keeps_the_size(kernel: int, dilation: int, size: int) -> None:
    ((before, after),) = padding_pairs("same", (kernel,), (1,), (dilation,))
    assert conv_output(size, kernel, 1, (before, after), dilation) == size
    assert after - before in (0, 1)


def test_forms_of_padding() -> None:
    def pairs(padding: object) -> object:
        return padding_pairs(padding, (3, 2), (1, 1), (1, 1))

    assert pairs(1) == pairs([1]) == pairs((1, 1)) == ((1, 1), (1, 1))
    assert pairs((2, 0)) == ((2, 2), (0, 0))
    assert pairs(((2, 0), (1, 3))) == ((2, 0), (1, 3))
    assert pairs("valid") == ((0, 0), (0, 0))
    assert pairs("same") == ((1, 1), (0, 1))


@pytest.mark.parametrize(
    "padding", [-1, (0, -1), (1, 1, 1), ((1, 1),), "sane", ((1, 2, 3), (1, 2))]
)
def test_bad_padding(padding: object) -> None:
    with pytest.raises(RuntimeError, match="padding: expected .* got"):
        padding_pairs(padding, (3, 3), (1, 1), (1, 1))


def test_same_padding_needs_stride_1() -> None:
    with pytest.raises(RuntimeError, match=r"padding='same': expected stride 1, got \[1, 2\]"):
        padding_pairs("same", (3, 3), (1, 2), (1, 1))


# ---- the rest -------------------------------------------------------------------------------------------


def test_axes() -> None:
    assert axes(3, 2, "stride") == axes((3,), 2, "stride") == axes([3, 3], 2, "stride") == (3, 3)
    assert axes(torch.tensor(2), 2, "stride") == (2, 2)
    with pytest.raises(RuntimeError, match=r"stride: expected one int or 2 ints, got \[1, 2, 3\]"):
        axes((1, 2, 3), 2, "stride")
    for wrong in (1.5, True, "2", None, (1.0, 1.0)):
        with pytest.raises(TypeError, match="stride: expected an int, got"):
            axes(wrong, 2, "stride")


def test_missing_axes_have_size_1() -> None:
    line = ConvShape.of((2, 3, 7), (4, 3, 3), padding=1)
    assert (line.dims, line.DHW, line.TRS, line.ZPQ) == (1, (1, 1, 7), (1, 1, 3), (1, 1, 7))
    plane = PoolShape.of((2, 3, 8, 6), (2, 3))
    assert (plane.dims, plane.DHW, plane.TRS, plane.ZPQ) == (2, (1, 8, 6), (1, 2, 3), (1, 4, 2))
    assert plane.places == 6


def test_shapes_are_values() -> None:
    """Equal problems are equal keys, and nothing changes them."""
    first, second = (ConvShape.of((1, 3, 8, 8), (4, 3, 3, 3), padding=p) for p in (1, [1, 1]))
    assert first == second and hash(first) == hash(second)
    assert first.y_size == second.y_size and hash(first) == hash(
        second
    )  # cached sizes do not count
    with pytest.raises(FrozenInstanceError):
        first.N = 2


def test_norm_shapes() -> None:
    shape = NormShape.of((4, 3, 5, 6), weight=(3,), residual=(4, 3, 5, 6), training=True)
    assert (shape.N, shape.C, shape.L, shape.count, shape.x_size) == (4, 3, 30, 120, (4, 3, 5, 6))
    assert NormShape.of((7, 5)).count == 7
    assert NormShape.of((1, 3, 1, 1)).count == 1
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        NormShape.of((1, 3, 1, 1), training=True)


def test_traffic_and_floor_time() -> None:
    conv = ConvShape.of((1, 3, 32, 32), (10, 3, 5, 5), padding=2)
    assert conv.bytes_moved("fprop", 4) == 4 * (3 * 32 * 32 + 10 * 3 * 25 + 10 * 32 * 32)
    pool = PoolShape.of((2, 3, 8, 8), 2)
    assert pool.bytes_moved(4) == 4 * (384 + 96)
    assert pool.bytes_moved(4, offset_bytes=1) == 4 * (384 + 96) + 96
    assert NormShape.of((2, 3, 4)).bytes_moved(2, reads=2, writes=1) == 3 * 2 * 24
    # Arithmetic decides at 100 operations a second, traffic at 10 bytes a second.
    assert floor_seconds(1000, 50, 100, 1000) == 10
    assert floor_seconds(1000, 500, 1e9, 10) == 50


# ---- padding modes and transposed convolution -------------------------------------------------------------


@pytest.mark.parametrize("mode, most", [("reflect", 4), ("circular", 5), ("replicate", 40)])
def test_padding_modes_reach_as_far_as_torchs(mode: str, most: int) -> None:
    x, w = (1, 2, 5, 60), (3, 2, 2, 2)
    assert ConvShape.of(x, w, padding=((most, 0), (0, 0)), padding_mode=mode).output[0] == 4 + most
    if mode != "replicate":
        with pytest.raises(RuntimeError, match=f"at most {most} on each side of an axis of 5"):
            ConvShape.of(x, w, padding=((0, most + 1), (0, 0)), padding_mode=mode)
    with pytest.raises(RuntimeError, match="expected no negative value for padding_mode"):
        ConvShape.of(x, w, padding=((0, -1), (0, 0)), padding_mode=mode)


def test_unknown_padding_mode() -> None:
    with pytest.raises(ValueError, match="expected one of zeros, .* got 'mirror'"):
        ConvShape.of((1, 1, 3), (1, 1, 1), padding_mode="mirror")


def test_padded_is_the_same_problem_of_a_larger_input() -> None:
    shape = ConvShape.of((1, 2, 5, 6), (3, 2, 3, 3), padding=((1, 0), (2, -1)), stride=2)
    assert shape.padded.spatial == (6, 7) and shape.padded.output == shape.output
    assert shape.padded.padding == ((0, 0), (0, 0)) and shape.padded.padding_mode == "zeros"


@settings(max_examples=300)
@given(
    st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 4), st.integers(1, 4),
    st.integers(0, 3),
)  # fmt: skip
def test_transposed_is_the_inverse_size_of_a_convolution(
    size: int, kernel: int, stride: int, padding: int, dilation: int, extra: int
) -> None:
    """Its result has torch's size, and the convolution of that size has an output as large as its input."""
    arguments = (stride, padding, extra, 1, dilation)
    # float64: in float32 oneDNN lets outputs of size 0 pass.
    x, w = torch.ones(2, 3, size).double(), torch.ones(3, 4, kernel).double()
    try:
        expected = F.conv_transpose1d(x, w, None, *arguments).shape
    except RuntimeError:
        with pytest.raises(RuntimeError, match="expected"):
            ConvShape.transposed(x.shape, w.shape, None, *arguments)
        return
    shape = ConvShape.transposed(x.shape, w.shape, None, *arguments)
    assert shape.x_size == tuple(expected)
    assert shape.y_size == tuple(x.shape) and shape.w_size == tuple(w.shape)


@pytest.mark.parametrize(
    "x, w, arguments, message",
    [
        ((1, 3, 4, 4), (2, 3, 2, 2), {}, "expected 2 channels for weight"),
        ((1, 2, 4, 4), (2, 3, 2, 2), {"bias": (2,)}, r"bias: expected size \[3\], got \[2\]"),
        ((1, 2, 4, 4), (2, 3, 2, 2), {"groups": 0}, "groups: expected a positive int, got 0"),
        ((1, 3, 4, 4), (3, 3, 2, 2), {"groups": 2}, "a positive multiple of groups=2, got 3"),
        ((1, 2, 4, 4), (2, 3, 2, 2), {"output_padding": 1}, "expected less than stride"),
        ((1, 2, 4, 4), (2, 3, 2, 2), {"output_padding": -1}, "expected no negative value"),
        ((1, 2, 4, 4), (2, 3, 2, 2), {"padding": -1}, "expected no negative value"),
        ((1, 2, 4, 4), (2, 3, 2, 2), {"padding": 3}, "expected sizes that leave an output"),
        ((1, 2, 4, 4), (2, 3, 2, 2), {"stride": 0}, "stride: expected every value to be at least 1"),
        ((1, 2, 4), (2, 3, 2, 2), {}, "input: expected 4 dimensions, got 3"),
        ((1, 2, 0, 4), (2, 3, 2, 2), {}, "expected no empty axis but batch or channels"),
    ],
)  # fmt: skip
def test_transposed_refuses(
    x: tuple[int, ...], w: tuple[int, ...], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        ConvShape.transposed(x, w, **arguments)


# ---- unpooling, group and layer norm ----------------------------------------------------------------------


def test_unpool_shape() -> None:
    shape = UnpoolShape.of((2, 3, 4, 5), (2, 3, 4, 5), (8, 10))
    assert (shape.x_size, shape.y_size) == ((2, 3, 4, 5), (2, 3, 8, 10))
    assert shape.bytes_moved(4) == 120 * 12 + 480 * 4
    for indices, output in (((2, 3, 4, 4), (8, 10)), ((2, 3, 4, 5), (8,)), ((2, 3, 4, 5), (8, -1))):
        with pytest.raises(RuntimeError, match="expected .* got"):
            UnpoolShape.of((2, 3, 4, 5), indices, output)


def test_group_shape() -> None:
    shape = GroupShape.of((2, 6, 4, 5), 3, (6,), (6,))
    assert (shape.L, shape.count, shape.statistics_size) == (20, 40, (2, 3))
    assert shape.x_size == (2, 6, 4, 5) and shape.bytes_moved(2, 2, 1) == 3 * 2 * 240
    for arguments in (
        ((2, 6), 4),
        ((2, 6), 0),
        ((2,), 1),
        ((2, 6), 2, (3,)),
        ((2, 6), 2, None, (1,)),
    ):
        with pytest.raises(RuntimeError, match="expected .* got"):
            GroupShape.of(*arguments)


def test_layer_shape() -> None:
    shape = LayerShape.of((2, 6, 4, 5), (4, 5), (4, 5))
    assert (shape.N, shape.D, shape.statistics_size) == (12, 20, (2, 6))
    assert shape.x_size == (2, 6, 4, 5) and shape.bytes_moved(4, 1, 1) == 2 * 4 * 240
    for arguments in (((2, 6), ()), ((2, 6), (2,)), ((2,), (2, 2)), ((2, 6), (6,), (2,))):
        with pytest.raises(RuntimeError, match="expected .* got"):
            LayerShape.of(*arguments)
