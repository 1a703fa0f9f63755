"""The tables of bench/suites.py: torch takes every problem, and the networks are the published ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bench import suites
from bench.suites import OPS, SUITES, Case, Ceilings, Row, reduced, rows
from cnnops.shapes import ConvShape

CASES = [case for cases in SUITES.values() for case in cases]
CEILINGS = Ceilings(3e12, {"float32": 5e13, "tf32": 4e14, "float16": 8e14, "bfloat16": 8e14})


def meta(*size: int) -> torch.Tensor:
    return torch.empty(size, device="meta")


def output(case: Case) -> torch.Tensor:
    """What torch makes of the case; on the meta device it checks sizes and computes nothing."""
    options = dict(case.options)
    x = meta(*case.x)
    if case.kind == "norm":
        residual, _ = options.pop("residual", False), options.pop("activation", None)
        C = case.x[1]
        y = F.batch_norm(x, meta(C), meta(C), meta(C), meta(C), **options)
        return y + meta(*case.x) if residual else y
    function = getattr(F, case.op)
    if case.kind == "group_norm":
        size = options.get("normalized_shape", case.x[1:2])
        return function(x, *options.values(), meta(*size), meta(*size))
    if case.w is None:
        return function(x, **options)
    groups = options.get("groups", 1)
    K = case.w[1] * groups if case.kind == "conv_transpose" else case.w[0]
    return function(x, meta(*case.w), meta(K) if case.bias else None, **options)


def case_of(suite: str, name: str) -> Case:
    return next(case for case in SUITES[suite] if case.name == name)


def row_of(case: Case, direction: str, dtype: str = "float32") -> Row:
    return next(r for r in case.rows() if (r.direction, r.dtype) == (direction, dtype))


def convolutions(suite: str) -> list[tuple[Case, ConvShape]]:
    pairs = [(case, case.shape) for case in SUITES[suite]]
    return [(case, shape) for case, shape in pairs if isinstance(shape, ConvShape)]


def macs(suite: str) -> int:
    """Multiply-adds of all convolutions for one image."""
    total = sum(case.count * shape.macs for case, shape in convolutions(suite))
    batch = SUITES[suite][0].x[0]
    assert total % batch == 0
    return total // batch


def parameters(suite: str) -> int:
    """Weights, biases, and a scale and a shift a channel of batch norm."""
    norms = sum(2 * case.x[1] * case.count for case in SUITES[suite] if case.kind == "norm")
    biases = sum(shape.K * case.count for case, shape in convolutions(suite) if case.bias)
    weights = sum(math.prod(shape.w_size) * case.count for case, shape in convolutions(suite))
    return weights + biases + norms


def layers(suite: str, kind: str) -> int:
    return sum(case.count for case in SUITES[suite] if case.kind == kind)


# Every case


@pytest.mark.parametrize("suite", SUITES)
def test_sizes_are_those_that_torch_gives(suite: str) -> None:
    for case in SUITES[suite]:
        y = tuple(output(case).shape)
        assert case.y == y, case
        shape = case.shape
        if case.kind == "conv_transpose":
            assert (shape.x_size, shape.y_size, shape.w_size) == (y, case.x, case.w), case
        else:
            assert shape.x_size == case.x, case


def test_flops_of_convolutions_are_those_that_torch_counts() -> None:
    for case in CASES:
        if case.w is None:
            continue
        with FlopCounterMode(display=False) as counter:
            output(case)
        assert {row.flops for row in case.rows()} == {counter.get_total_flops()}, case


def test_names_and_ids_are_unique() -> None:
    every = rows()
    assert len({row.id for row in every}) == len(every)
    for suite, cases in SUITES.items():
        assert {case.suite for case in cases} == {suite}
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert not any("/" in name for name in names)


def test_a_case_occurs_once_in_its_suite() -> None:
    for cases in SUITES.values():
        problems = [(c.op, c.problem, c.forms, c.directions) for c in cases]
        assert len(set(problems)) == len(problems)


def test_cases_state_what_they_should() -> None:
    for case in CASES:
        hash(case)
        kind = OPS[case.op]
        assert (case.w is not None) == kind.startswith("conv"), case
        assert case.forms and len(set(case.forms)) == len(case.forms), case
        for dtype, layout in case.forms:
            assert isinstance(getattr(torch, dtype), torch.dtype)
            assert layout == "contiguous" or (layout == "channels_last" and len(case.x) > 3), case
        assert set(case.directions) <= set(suites.DIRECTIONS[kind]), case
        defaults = {**suites._DEFAULTS[kind], "ceil_mode": False, "count_include_pad": True}
        options = dict(case.options)
        assert all(name not in defaults or value != defaults[name] for name, value in case.options)
        assert "stride" not in options or options["stride"] != options.get("kernel_size"), case
        assert bool(case.source) == (case.suite in ("kernelbench", "reports")), case


def test_floors() -> None:
    for row in rows():
        assert row.bytes_moved > 0 and row.floor_seconds(CEILINGS) > 0, row.id
        least = row.floor_seconds(CEILINGS, tensor_cores=True)
        assert 0 < least <= row.floor_seconds(CEILINGS), row.id
        assert row.floor_seconds(CEILINGS) >= row.bytes_moved / CEILINGS.bytes_per_s, row.id


def test_rows_of_some_suites() -> None:
    some = rows(["vgg16", "lenet5"])
    assert [*dict.fromkeys(row.case.suite for row in some)] == ["vgg16", "lenet5"]
    assert len(rows()) == sum(len(rows([suite])) for suite in SUITES)
    with pytest.raises(ValueError, match="expected one of lenet5, .*, got 'vgg17'"):
        rows(["lenet5", "vgg17"])


def test_row_in_words() -> None:
    row = row_of(case_of("resnet50", "layer1.0.conv2"), "dgrad", "bfloat16")
    assert row.id == "resnet50/layer1.0.conv2/dgrad/bfloat16/channels_last"
    assert row.problem == "x 32x64x56x56 w 64x64x3x3 padding=1"
    transposed = case_of("kernelbench", "75_conv_transpose2d")
    assert transposed.problem == (
        "x 16x32x128x256 w 32x16x3x5 stride=2x3 padding=1x2 dilation=2x1 groups=4"
    )
    fused = case_of("resnet50", "layer1.0.bn3")
    assert fused.problem == "x 32x256x56x56 training residual"
    assert case_of("lenet5", "conv1").problem == "x 64x1x28x28 w 20x1x5x5 bias padding=2"


# Arithmetic and traffic


def test_convolution_counts() -> None:
    case = case_of("resnet50", "layer1.0.conv2")
    x = 32 * 64 * 56 * 56
    for direction in ("fprop", "dgrad", "wgrad"):
        row = row_of(case, direction)
        assert row.flops == 2 * x * 64 * 9
        assert row.bytes_moved == 4 * (2 * x + 64 * 64 * 9)
        assert row_of(case, direction, "bfloat16").bytes_moved == row.bytes_moved // 2


def test_a_strided_1x1_reads_a_quarter_but_writes_all() -> None:
    case = case_of("resnet50", "layer2.0.downsample.conv")
    x, w, y = 32 * 256 * 56 * 56, 512 * 256, 32 * 512 * 28 * 28
    assert row_of(case, "fprop").bytes_moved == 4 * (x // 4 + w + y)
    assert row_of(case, "wgrad").bytes_moved == 4 * (x // 4 + w + y)
    assert row_of(case, "dgrad").bytes_moved == 4 * (x + w + y)


@given(st.data())
def test_covered_places(data: st.DataObject) -> None:
    size, kernel, stride, dilation = (data.draw(st.integers(1, n)) for n in (40, 6, 9, 5))
    before, after = (data.draw(st.integers(0, kernel)) for _ in range(2))
    span = dilation * (kernel - 1) + 1
    if size + before + after < span:
        return
    outputs = (size + before + after - span) // stride + 1
    places = {p * stride + k * dilation - before for p in range(outputs) for k in range(kernel)}
    covered = suites._covered(size, kernel, stride, (before, after), dilation, outputs)
    assert covered == len(places & set(range(size)))


def test_transposed_convolution_is_a_dgrad() -> None:
    # x 32x12x24x48 becomes 32x24x48x96: output padding 1 makes up for what stride 2 drops.
    case = case_of("kernelbench", "72_conv_transpose3d")
    assert case.y == (8, 32, 24, 48, 96)
    every = replace(case, directions=())
    x, w, y = math.prod(case.x), math.prod(case.w or ()), math.prod(case.y)
    for direction in ("fprop", "dgrad", "wgrad"):
        row = row_of(every, direction)
        assert row.flops == 2 * x * 8 * 3 * 5 * 7
        assert row.bytes_moved == 4 * (x + w + y)
    # Stride 5 with 3 places a window: the gradient of what lies between is never read.
    sparse = replace(case_of("kernelbench", "81_conv_transpose2d"), directions=())
    assert row_of(sparse, "dgrad").bytes_moved < row_of(sparse, "fprop").bytes_moved


def test_output_padding_beyond_the_stride_is_refused() -> None:
    case = Case(
        "s", "n", "conv_transpose1d", (1, 2, 5), (2, 2, 3), options=(("output_padding", 1),)
    )
    with pytest.raises(RuntimeError, match="output_padding: expected less than stride, got 1"):
        case.shape  # noqa: B018


def test_pooling_counts() -> None:
    case = case_of("resnet50", "maxpool")
    x, y = 32 * 64 * 112 * 112, 32 * 64 * 56 * 56
    assert row_of(case, "fwd").bytes_moved == 4 * (x + y)
    assert row_of(case, "bwd").bytes_moved == 4 * (x + y) + y
    assert row_of(case, "fwd").flops == 9 * y
    average = case_of("lenet5_original", "pool1")
    assert row_of(average, "bwd").bytes_moved == row_of(average, "fwd").bytes_moved
    # 186 windows of 11 leave the last 2 of 2048 rows and columns unread.
    kernelbench = row_of(case_of("kernelbench", "45_avg_pool2d"), "fwd")
    assert kernelbench.bytes_moved == 4 * 16 * 64 * (2046 * 2046 + 186 * 186)


@pytest.mark.parametrize(
    ("name", "fwd", "bwd"),
    [("C256", 3, 5), ("eval", 2, 3), ("relu", 3, 5), ("add_relu", 4, 7), ("eval_add_relu", 3, 5)],
)
def test_batch_norm_passes(name: str, fwd: int, bwd: int) -> None:
    case, one = case_of("sweep_norm", name), 4 * 32 * 256 * 56 * 56
    assert row_of(case, "fwd").bytes_moved == fwd * one
    assert row_of(case, "bwd").bytes_moved == bwd * one


def test_a_residual_without_activation_has_grad_y_as_its_gradient() -> None:
    case = case_of("mobilenetv2", "stage2.1.project.bn")
    assert dict(case.options) == {"training": True, "residual": True, "activation": "none"}
    assert row_of(case, "bwd").bytes_moved == 5 * 4 * math.prod(case.x)


def test_ceilings() -> None:
    assert CEILINGS.flops("float32") == 5e13
    assert CEILINGS.flops("float32", tensor_cores=True) == 4e14
    assert CEILINGS.flops("float16") == CEILINGS.flops("float16", tensor_cores=True) == 8e14
    cpu = Ceilings(2e10, {"float32": 2e11})
    assert cpu.flops("bfloat16") == cpu.flops("float32", tensor_cores=True) == 2e11
    compute = row_of(case_of("vgg16", "conv3_2"), "fprop")
    assert compute.floor_seconds(CEILINGS) == compute.flops / 5e13
    assert compute.floor_seconds(CEILINGS, tensor_cores=True) == compute.flops / 4e14
    # Additions and comparisons never decide: this machine would need an hour for them.
    slow = Ceilings(1e9, {"float32": 1e3})
    pool = row_of(case_of("vgg16", "pool1"), "fwd")
    assert pool.floor_seconds(slow) == pool.bytes_moved / 1e9


# Networks, against what is published of them


@pytest.mark.parametrize(
    ("suite", "convolutions", "pools", "norms"),
    [
        ("lenet5", 2, 2, 0),
        ("lenet5_original", 3, 2, 0),
        ("alexnet", 5, 3, 0),
        ("vgg16", 13, 5, 0),
        ("resnet50", 1 + 16 * 3 + 4, 2, 1 + 16 * 3 + 4),
        ("mobilenetv2", 1 + 2 + 16 * 3 + 1, 1, 1 + 2 + 16 * 3 + 1),
        ("efficientnet_b0", 1 + 4 + 15 * 5 + 1, 1 + 16, 1 + 2 + 15 * 3 + 1),
        ("convnext_t", 4 + 18, 1, 0),
    ],
)
def test_layers_of_networks(suite: str, convolutions: int, pools: int, norms: int) -> None:
    counts = [layers(suite, kind) for kind in ("conv", "pool", "norm")]
    assert counts == [convolutions, pools, norms]


# Multiply-adds (10^9) and parameters as torchvision states them (torchvision/models/*.py, `_ops` and
# `num_params` of the weights' metadata, for 224x224); the dense layers are added here.
@pytest.mark.parametrize(
    ("suite", "dense", "published_gmacs", "published_parameters"),
    [
        ("vgg16", [(512 * 7 * 7, 4096), (4096, 4096), (4096, 1000)], 15.47, 138_357_544),
        ("resnet50", [(2048, 1000)], 4.089, 25_557_032),
        ("mobilenetv2", [(1280, 1000)], 0.301, 3_504_872),
        ("efficientnet_b0", [(1280, 1000)], 0.386, 5_288_548),
    ],
)
def test_published_totals(
    suite: str,
    dense: Iterable[tuple[int, int]],
    published_gmacs: float,
    published_parameters: int,
) -> None:
    assert parameters(suite) + sum(out * (inp + 1) for inp, out in dense) == published_parameters
    gmacs = (macs(suite) + sum(out * inp for inp, out in dense)) / 1e9
    digits = len(str(published_gmacs).split(".")[1])
    assert round(gmacs, digits) == published_gmacs


def test_published_totals_of_convnext() -> None:
    # As above: 4.456 and 28,589,128. The rest of a block: layer norm, two dense layers to 4C and back, and a
    # scale a channel. Layer norms also stand after the stem, before each downsampling and the classifier.
    stages = [(3, 96, 56), (3, 192, 28), (9, 384, 14), (3, 768, 7)]
    pointwise = sum(blocks * 8 * C * C * H * H for blocks, C, H in stages)
    assert round((macs("convnext_t") + pointwise + 768 * 1000) / 1e9, 3) == 4.456
    assert round(pointwise / (macs("convnext_t") + pointwise), 2) == 0.93
    block = sum(blocks * (2 * C + 4 * C * (C + 1) + C * (4 * C + 1) + C) for blocks, C, _ in stages)
    norms = 2 * (96 + 96 + 192 + 384 + 768)
    assert parameters("convnext_t") + block + norms + 1000 * 769 == 28_589_128


def test_alexnet() -> None:
    # Krizhevsky's network of 2014: 61,100,840 parameters in torchvision. At 227x227 its convolutions have the
    # multiply-adds (millions) that lectures show.
    dense = [(256 * 6 * 6, 4096), (4096, 4096), (4096, 1000)]
    assert parameters("alexnet") + sum(out * (inp + 1) for inp, out in dense) == 61_100_840
    millions = [shape.macs / 128 / 1e6 for _, shape in convolutions("alexnet")]
    assert [round(m) for m in millions] == [73, 224, 112, 150, 100]
    assert case_of("alexnet", "pool5").y == (128, 256, 6, 6)


def test_lenet5() -> None:
    assert SUITES["lenet5"][-1].y == (64, 50, 7, 7)
    assert SUITES["lenet5_original"][-1].y == (64, 120, 1, 1)
    # 156 and 48,120 are LeCun's own counts (1998) for C1 and C5; C3 is drawn fully connected here.
    first, _, last = [shape.parameters for _, shape in convolutions("lenet5_original")]
    assert (first, last) == (156, 48_120)


def test_images_need_no_gradient() -> None:
    for suite in list(SUITES)[:8]:
        first = SUITES[suite][0]
        assert first.x[1] in (1, 3) and first.directions == ("fprop", "wgrad")
        assert not any(case.directions for case in SUITES[suite][1:])


# Scaling


def test_scaling_goes_by_tens() -> None:
    found = [row_of(case, "fprop").flops for case in SUITES["scaling"]]
    for flops, nominal in zip(found, (1e6, 1e7, 1e8, 1e9, 1e10), strict=True):
        assert 0.9 * nominal < flops < 1.2 * nominal
    assert {case.w[2:] for case in SUITES["scaling"] if case.w} == {(3, 3)}


# KernelBench and reports


def test_kernelbench_has_42_problems() -> None:
    cases = SUITES["kernelbench"]
    numbers = {33, *range(41, 47), 50, *range(54, 88)}
    assert len(numbers) == 42
    assert {int(case.name.split("_")[0]) for case in cases} == numbers
    timed = [name for key in suites.KERNELBENCH_H100_MS for name in key.split(" + ")]
    assert timed == [case.name for case in cases]
    assert len(suites.KERNELBENCH_H100_MS) == 42
    assert {(r.direction, r.dtype, r.layout) for r in rows(["kernelbench"])} == {
        ("fprop", "float32", "contiguous"),
        ("fwd", "float32", "contiguous"),
    }


def test_kernelbench_times_are_possible() -> None:
    # No H100 SXM moves more than 3.35e12 bytes a second or does more than 495e12 flops in tf32.
    h100 = Ceilings(3.35e12, {"float32": 67e12, "tf32": 495e12})
    for key, times in suites.KERNELBENCH_H100_MS.items():
        cases = [case_of("kernelbench", name) for name in key.split(" + ")]
        floor = sum(case.rows()[0].floor_seconds(h100, tensor_cores=True) for case in cases)
        assert min(times) > 1e3 * floor, key


def test_reports_name_their_source() -> None:
    for case in SUITES["reports"]:
        repository, number = case.source.split("#")
        assert repository and int(number) > 0
        assert case.directions == ()


# reduced


@pytest.mark.parametrize("limits", [(1e12, 1e9), (1e9, 1e8), (1e7, 1e6), (1e5, 1e4), (0, 0)])
def test_reduced_problems_are_valid(limits: tuple[float, float]) -> None:
    for case in CASES:
        less = reduced(case, *limits)
        assert tuple(output(less).shape) == less.y, less
        within = all(r.flops <= limits[0] and r.bytes_moved <= limits[1] for r in less.rows())
        assert within or less == reduced(case, 0, 0), less


@given(st.sampled_from(CASES), st.floats(1, 1e13), st.floats(1, 1e11))
def test_reduced_keeps_what_a_case_is(case: Case, most_flops: float, most_bytes: float) -> None:
    less = reduced(case, most_flops, most_bytes)
    sizes = {"x": case.x, "w": case.w, "options": case.options}
    assert replace(less, **sizes) == case
    options, kept = dict(case.options), dict(less.options)
    assert kept.keys() == options.keys()
    assert all(kept[name] == options[name] for name in options if name != "groups")
    assert all(0 < new <= old for new, old in zip(less.x, case.x, strict=True))
    if case.w is not None and less.w is not None:
        assert less.w[2:] == case.w[2:]
        groups, left = options.get("groups", 1), kept.get("groups", 1)
        depthwise = groups > 1 and case.x[1] == groups
        assert (left > 1 and less.x[1] == left) == depthwise
        assert depthwise or left == groups
    # In this order: batch, planes, channels.
    smallest = reduced(case, 0, 0)
    if less.x[1:] != case.x[1:]:
        assert less.x[0] == smallest.x[0]
    if less.x[1] != case.x[1]:
        assert less.x[2:] == smallest.x[2:]
    assert reduced(less, most_flops, most_bytes) == less


def test_reduced_examples() -> None:
    case = case_of("resnet50", "layer1.0.conv2")
    assert reduced(case, math.inf, math.inf) == case
    most = row_of(case, "fprop").flops
    assert reduced(case, most, math.inf) == case
    assert reduced(case, most - 1, math.inf).x == (16, 64, 56, 56)
    assert reduced(case, most / 64, math.inf).x == (1, 64, 28, 28)
    assert reduced(case, most / 64, math.inf).problem == "x 1x64x28x28 w 64x64x3x3 padding=1"
    grouped = reduced(case_of("reports", "grouped_14"), 1e5, math.inf)
    assert dict(grouped.options)["groups"] == 32
    # Windows need their size: the smallest plane of a dilated kernel is its span.
    strided = reduced(case_of("kernelbench", "76_conv1d"), 0, 0)
    assert strided.x == (1, 1, 9) and strided.w == (1, 1, 3)
    # Statistics need two values a channel.
    assert reduced(case_of("resnet50", "bn1"), 0, 0).x == (1, 1, 1, 2)
    large = reduced(case_of("reports", "depthwise_31x31"), 0, 0)
    assert large.x == (1, 2, 31, 31) and large.w == (2, 1, 31, 31)
    transposed = reduced(case_of("kernelbench", "57_conv_transpose2d"), 0, 0)
    assert transposed.x == (1, 1, 1, 1) and transposed.y == (1, 1, 3, 3)
