"""`cnnops summary`: the lectures' and published numbers, receptive fields by hand and by gradient, modules of
all kinds, every format, one clear line on bad input."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cnnops
from cnnops import registry
from cnnops.__main__ import main
from cnnops.models import MODELS
from cnnops.shapes import ConvShape, PoolShape
from cnnops.summary import GPUS, Row, Summary, command, figure, report
from tests.networks import UNet


def built(name: str) -> nn.Module:
    return command._model(name)


def by_name(found: Summary) -> dict[str, Row]:
    return {row.name: row for row in found.rows}


# ---- the lectures' table ---------------------------------------------------------------------------------

# layer, output, memory in KB, thousands of parameters, millions of operations
ALEXNET = (
    ("features.0", (64, 56, 56), 784, 23, 73),
    ("features.2", (64, 27, 27), 182, 0, 0.4),
    ("features.3", (192, 27, 27), 547, 307, 224),
    ("features.5", (192, 13, 13), 127, 0, 0),
    ("features.6", (384, 13, 13), 254, 664, 112),
    (
        "features.8",
        (256, 13, 13),
        169,
        885,
        150,
    ),  # lectures print 145: 256·13·13·384·9 is 149,520,384
    ("features.10", (256, 13, 13), 169, 590, 100),
    ("features.12", (256, 6, 6), 36, 0, 0),
    ("classifier.1", (4096,), 16, 37_753, 38),
    ("classifier.4", (4096,), 16, 16_781, 17),
    ("classifier.6", (1000,), 4, 4_097, 4),
)


@pytest.fixture(scope="module")
def alexnet() -> Summary:
    return cnnops.summary(built("alexnet"), (3, 227, 227))


def test_alexnet_is_the_lectures(alexnet: Summary) -> None:
    rows = by_name(alexnet)
    for name, output, KB, thousands, millions in ALEXNET:
        row = rows[name]
        assert row.output == ((1, *output),)
        assert row.memory_bytes == 4 * math.prod(output) and round(row.memory_bytes / 1024) == KB
        assert round(row.parameters / 1e3) == thousands
        assert round(row.operations / 1e6, 1 if isinstance(millions, float) else None) == millions
    assert rows["features.8"].operations == 149_520_384
    assert rows["classifier.1"].parameters == 4096 * (9216 + 1)
    assert alexnet.parameters == sum(row.parameters for row in alexnet.rows) == 61_100_840


def test_alexnet_as_a_table(alexnet: Summary) -> None:
    """The text shows the same digits, but for two poolings whose 0.3 and 0.08 the lecture rounds to 0."""
    lines = {words[0]: words for line in str(alexnet).splitlines() if (words := line.split())}
    for name, output, KB, thousands, millions in ALEXNET:
        size = "x".join(map(str, (1, *output)))
        shown = {"features.5": "0.3", "features.12": "0.08"}.get(name, str(millions))
        assert lines[name][2:6] == [size, f"{KB}", f"{thousands:,}", shown]


def test_alexnet_is_heavy_where_the_lectures_say(alexnet: Summary) -> None:
    early = [row for row in alexnet.rows if row.name in ("features.0", "features.3")]
    convolutions = alexnet.total("memory_bytes", "conv") + alexnet.total("memory_bytes", "pool")
    assert sum(row.memory_bytes for row in early) > 0.5 * convolutions
    assert alexnet.share("parameters", "dense") > 0.95
    assert alexnet.share("operations", "conv") > 0.9
    for column in ("memory_bytes", "parameters", "operations", "floor_seconds"):
        assert math.isclose(sum(alexnet.share(column, kind) for kind in report.KINDS), 1)


# Parameters, and thousands of millions of multiply-adds of a 224 x 224 image, as torchvision publishes them.
PUBLISHED = {
    "vgg16": (138_357_544, 15.47),
    "vgg19": (143_667_240, 19.63),
    "resnet18": (11_689_512, 1.81),
    "resnet50": (25_557_032, 4.09),
    "mobilenetv2": (3_504_872, 0.30),
    "efficientnet-b0": (5_288_548, 0.39),
    "convnext-tiny": (28_589_128, 4.46),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    found = cnnops.summary(built(name), (3, 224, 224))
    parameters, billions = PUBLISHED[name]
    assert found.parameters == sum(row.parameters for row in found.rows) == parameters
    multiplied = found.total("operations", "conv") + found.total("operations", "dense")
    assert abs(multiplied / 1e9 - billions) < 0.0051
    assert not found.uncounted and all(row.receptive_field for row in found.rows)


@pytest.mark.parametrize("name, parameters", [("lenet5", 1_256_080), ("lenet5-original", 61_706)])
def test_lenet_and_default_sizes(name: str, parameters: int) -> None:
    found = cnnops.summary(built(name))
    assert found.input == (1, 1, *MODELS[name].input_size) and found.parameters == parameters


# ---- receptive fields -------------------------------------------------------------------------------------


def fields(model: nn.Module, size: tuple[int, ...] = (2, 32, 32)) -> list[Any]:
    return [row.receptive_field for row in cnnops.summary(model, size).rows]


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("K", [3, 5])
def test_field_of_a_stack(layers: int, K: int) -> None:
    stack = [nn.Conv2d(2, 2, K, padding=K // 2) for _ in range(layers)]
    assert fields(nn.Sequential(*stack))[-1] == 1 + layers * (K - 1)


def test_field_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 2, (3, 1), stride=(2, 1)),  # 3, 1; steps 2, 1
        nn.MaxPool2d((2, 3), stride=(1, 2)),  # 5, 3; 2, 2
        nn.Conv2d(2, 2, 3, dilation=(2, 3)),  # 13, 15; 2, 2
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    )
    # Then a mean over what is left: 10 x 10 places.
    last = (13 + 9 * 2, 15 + 9 * 2)
    assert fields(model, (2, 32, 34)) == [(3, 1), (5, 3), (13, 15), (13, 15), last, last, last]
    flat = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(675, 2))
    assert fields(flat) == [3, 3, 3 + 14 * 2], "a dense layer sees all 15 x 15 places"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.first = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 4, 1, stride=2)
        self.gate = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # 3, step 1
        y = self.second(F.relu(self.norm(self.first(x))))  # 5, step 2; 9
        x = self.shortcut(x)  # 3, step 2
        z = F.relu(y + x)  # 9
        return self.last(torch.cat([z, x], 1))  # 13


def test_field_through_a_residual_block() -> None:
    rows = by_name(cnnops.summary(Residual(), (2, 16, 16)))
    names = ("stem", "first", "norm", "second", "shortcut", "last")
    assert [rows[name].receptive_field for name in names] == [3, 5, 5, 9, 3, 13]


def seen(model: nn.Module, size: tuple[int, ...]) -> tuple[int, ...]:
    """How many places of the input the middle of the output sees, by its gradient: weights are positive."""
    model = model.double().eval()
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    x = torch.ones(1, *size, dtype=torch.float64, requires_grad=True)
    y = model(x)
    middle = tuple(n // 2 for n in y.shape[2:])
    (grad,) = torch.autograd.grad(y[(0, slice(None), *middle)].sum(), x)
    places = grad.abs().sum((0, 1)).nonzero()
    return tuple((places.max(0).values - places.min(0).values + 1).tolist())


class Shuffled(nn.Module):
    """Tokens and back: views, permutations and a matrix product on channels, in between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2)
        self.mix = nn.Linear(4, 6)
        self.last = nn.Conv2d(6, 2, (3, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        N, _, H, W = x.shape
        tokens = self.mix(x.flatten(2).transpose(1, 2))
        return self.last(tokens.permute(0, 2, 1).reshape(N, 6, H, W)[:, :, 1:, :-1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 33, 33)),
    "tokens": (Shuffled, (2, 31, 33)),
    "dilated": (lambda: nn.Sequential(nn.Conv1d(2, 2, 3, dilation=4), nn.AvgPool1d(3, 2)), (2, 64)),
    "average, 3-D": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 1, (1, 2, 3)), nn.AvgPool3d((3, 2, 1)), nn.Conv3d(1, 1, 2)
        ),
        (1, 16, 16, 16),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 3, 2), nn.ConvTranspose2d(1, 1, 3, 1)),
        (1, 33, 33),
    ),
    "even dense": (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 1, 1)),
        (1, 12, 9),
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("converted", [False, True])
def test_field_is_what_gradients_see(case: str, converted: bool) -> None:
    make, size = NETWORKS[case]
    model = make()
    if converted:
        cnnops.convert(model)
    found = cnnops.summary(model, size).rows[-1].receptive_field
    expected = seen(make(), size)
    assert (found,) * len(expected) == expected if isinstance(found, int) else found == expected


class Circular(nn.Module):
    """Writes into part of a tensor; what that sees is not followed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        around = x.new_zeros(*x.shape[:2], x.shape[2] + 2, x.shape[3] + 2)
        around[:, :, 1:-1, 1:-1] = x
        return self.conv(around)


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(2).values


@pytest.mark.parametrize("layer", [Circular(), Sorted(), nn.ReflectionPad2d(1)])
def test_field_that_is_not_known_is_none(layer: nn.Module) -> None:
    known = isinstance(layer, nn.ReflectionPad2d)
    after = fields(nn.Sequential(layer, nn.Conv2d(2, 2, 3)))[-1]
    assert after == (3 if known else None)


def test_upsampling_halves_steps() -> None:
    down, up = nn.Conv2d(2, 2, 2, stride=2), nn.Upsample(scale_factor=2)
    assert fields(nn.Sequential(down, up, nn.Conv2d(2, 2, 3, padding=1))) == [2, 2, 4]
    shuffle = nn.Sequential(nn.Conv2d(2, 8, 2, stride=2), nn.PixelShuffle(2), nn.Conv2d(2, 2, 3))
    assert fields(shuffle) == [2, 2, 4]


# ---- operations and traffic -------------------------------------------------------------------------------


def counted(
    x: int, K: int, taps: int, stride: int, padding: int, dilation: int, groups: int
) -> int:
    """Multiply-adds of a square convolution of 4 channels, one by one."""
    span = dilation * (taps - 1) + 1
    starts = range(0, x + 2 * padding - span + 1, stride)
    return sum(
        1
        for k, _, _ in product(range(K), starts, starts)
        for c, _, _ in product(range(4), range(taps), range(taps))
        if c // (4 // groups) == k // (K // groups)
    )


@pytest.mark.parametrize("K, taps, stride, padding, dilation, groups", [
    (6, 3, 1, 1, 1, 1), (4, 3, 2, 0, 2, 4), (8, 2, 3, 1, 1, 2),
])  # fmt: skip
def test_multiply_adds_one_by_one(
    K: int, taps: int, stride: int, padding: int, dilation: int, groups: int
) -> None:
    geometry = (stride, padding, dilation, groups)
    for layers in (nn, cnnops.nn):
        conv = layers.Conv2d(4, K, taps, *geometry)
        (row,) = cnnops.summary(conv, (4, 9, 9)).rows
        shape = ConvShape.of((1, 4, 9, 9), conv.weight.shape, None, *geometry)
        assert row.operations == shape.macs == counted(9, K, taps, *geometry)
        assert row.parameters == shape.parameters
        assert row.bytes_moved == shape.bytes_moved("fprop", 4)


def test_costs_of_other_layers() -> None:
    """By the formulas of `cnnops.shapes`, or counted by hand."""
    cases: dict[str, tuple[nn.Module, tuple[int, ...], int, int]] = {
        "pool": (nn.MaxPool2d(3, 2), (4, 9, 9), 4 * 16 * 9, 4 * (4 * 81 + 4 * 16)),
        "norm": (nn.BatchNorm2d(4), (4, 9, 9), 324, 4 * 2 * 324),
        "group norm": (nn.GroupNorm(2, 4), (4, 9, 9), 3 * 324, 4 * 2 * 324),
        "dense": (nn.Linear(8, 5), (3, 8), 3 * 40, 4 * (24 + 40 + 15)),
        "relu": (nn.ReLU(), (4, 9), 36, 4 * 72),
        "softsign": (nn.Softsign(), (4, 9), 3 * 36, 4 * 72),
        "dropout": (nn.Dropout(), (4, 9), 0, 0),
        "flatten": (nn.Flatten(), (4, 9), 0, 0),
        "transposed": (nn.ConvTranspose1d(4, 6, 3, 2), (4, 5), 5 * 4 * 6 * 3, 4 * (20 + 72 + 66)),
        "unbatched axes": (nn.AdaptiveAvgPool3d((1, 2, None)), (2, 4, 4, 4), 2 * 8 * 8, 4 * (128 + 16)),
    }  # fmt: skip
    for name, (layer, size, operations, moved) in cases.items():
        (row,) = cnnops.summary(layer, size).rows
        assert (row.operations, row.bytes_moved) == (operations, moved), name
    (row,) = cnnops.summary(nn.MaxPool2d(3, 2), (4, 9, 9), batch=5, dtype=torch.float64).rows
    shape = PoolShape.of((5, 4, 9, 9), 3, 2)
    assert (row.operations, row.bytes_moved) == (shape.flops, shape.bytes_moved(8))


def test_floor_is_the_roofline() -> None:
    assert (GPUS["h100"].bytes_per_s, GPUS["h100"].flops_per_s["float32"]) == (3.35e12, 67e12)
    assert GPUS["h100"].flops_per_s["bfloat16"] == 989e12
    for dtype, gpu in ((torch.float64, "h100"), (torch.bfloat16, "a100")):
        model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 1, 1))
        wide, norm, narrow = cnnops.summary(model, (64, 60, 60), batch=8, dtype=dtype, gpu=gpu).rows
        ceilings, name = GPUS[gpu], str(dtype).removeprefix("torch.")
        assert (wide.precision, norm.precision) == (name, None)
        assert wide.floor_seconds == 2 * wide.operations / ceilings.flops_per_s[name]
        for row in (norm, narrow):
            assert row.floor_seconds == row.bytes_moved / ceilings.bytes_per_s


def test_tf32_counts_where_torch_allows_it_and_a_kernel_uses_it() -> None:
    conv = nn.Conv2d(64, 64, 3)
    former = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        (row,) = cnnops.summary(conv, (64, 60, 60), batch=8).rows
        assert row.precision == "float32"
        assert row.floor_seconds == 2 * row.operations / 67e12
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        (row,) = cnnops.summary(conv, (64, 60, 60), batch=8).rows
        kernel = next(
            r for r in registry.ROWS if r.op == "conv_fprop" and r.algorithm == row.kernel
        )
        assert row.precision == ("tf32" if kernel.tf32 else "float32")
    finally:
        torch.backends.cudnn.conv.fp32_precision = former


def test_kernel_is_the_registrys() -> None:
    """The first row of the engine cuda that supports the problem, or the one that is wished for."""
    conv, pool, norm, dense = (
        nn.Conv2d(4, 6, 3),
        nn.AvgPool2d(2),
        nn.BatchNorm2d(6),
        nn.Linear(3, 2),
    )
    model = nn.Sequential(conv, pool, norm, dense)

    def kernels(dtype: torch.dtype = torch.float64) -> list[str | None]:
        return [row.kernel for row in cnnops.summary(model, (4, 8, 8), dtype=dtype).rows]

    shape = ConvShape.of((1, 4, 8, 8), conv.weight.shape)
    rows = [r for r in registry.ROWS if r.op == "conv_fprop" and "cuda" in r.engines]
    first = next(r.algorithm for r in rows if r.supports(shape, torch.float64) is None)
    assert kernels() == [first, "pool", "batch_norm", "aten"]
    with cnnops.algorithm("conv_im2col"):
        assert kernels()[0] == "conv_im2col"
    cnnops.convert(model)
    assert kernels() == [first, "pool", "batch_norm", "aten"]


def test_no_kernel_takes_it_is_said_quietly(recwarn: pytest.WarningsRecorder) -> None:
    with cnnops.fallback("warn"):
        (row,) = cnnops.summary(nn.MaxPool2d(2), (1, 70_000, 70_000)).rows
    assert row.kernel == "aten" and not recwarn.list


# ---- any module -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_own_and_stock_layers_agree(dims: int) -> None:
    """Convolution both ways, pooling and unpooling, four norms, indices and skips."""
    stock, own = UNet(dims), UNet(dims)
    cnnops.convert(own)
    one, two = (cnnops.summary(model, (3,) + (16,) * dims) for model in (stock, own))
    assert one.rows == two.rows and len(one.rows) == 15
    down = by_name(one)["down"]
    assert down.output == ((1, 4) + (8,) * dims,) * 2
    assert down.memory_bytes == 4 * 8**dims * (4 + 8), "maxima and their int64 places"
    assert all(row.operations is not None for row in one.rows)
    assert by_name(one)["last"].receptive_field == 8


class Odd(nn.Module):
    """A layer twice, a tuple out of a module, functions, a module that is not called, tied weights, an
    operation that no formula is known for, a parameter of its own, a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.rank = Sorted()
        self.halves = Halves()
        self.idle = nn.Linear(7, 7)
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))
        self.constant = torch.ones(3, 1, 1)
        self.quiet = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv(F.relu(self.conv(x))) * self.constant + self.shift
        left, right = self.halves(self.quiet(x))
        y = F.conv2d(left, left.new_ones(2, 3, 1, 1))
        return {"ranks": self.rank(self.two(self.one(right))), "y": y.mean((2, 3))}


class Halves(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        return a, b


def test_odd_module() -> None:
    model = Odd()
    found = cnnops.summary(model, (3, 8, 8))
    first, second, quiet, halves, one, two, ranks, whole = found.rows
    assert [row.name for row in found.rows] == [
        "conv", "conv", "quiet", "halves", "one", "two", "rank", "(model)"
    ]  # fmt: skip
    assert (first.call, second.call) == (1, 2)
    assert (first.parameters, second.parameters) == (84, 0), "parameters are counted once"
    assert (one.parameters, two.parameters, two.operations) == (16, 0, 3 * 8 * 16)
    assert first.operations == second.operations == 9 * 9 * 64
    assert (first.receptive_field, second.receptive_field) == (3, 5)
    assert quiet.operations == 192
    assert halves.output == ((1, 3, 8, 4),) * 2 and halves.memory_bytes == 0, "views"
    assert (ranks.kind, ranks.operations, ranks.floor_seconds, ranks.kernel) == ("other",) + (
        None,
    ) * 3
    assert ranks.output == ((1, 3, 8, 4),) and ranks.memory_bytes == 384
    assert (whole.type, whole.parameters, whole.operations) == ("Odd", 3, None)
    assert found.parameters == 84 + 16 + 3 + 56
    assert found.uncounted == {"convolution": 1, "mean": 1}
    text = str(found)
    assert "operations of 2 rows are not known" in text and "conv (call 2)" in text
    assert "convolution 1x, mean 1x" in text and "56 parameters are in modules" in text
    shares = json.loads(found.json())["totals"]
    assert shares["rows_without_operations"] == 2 and shares["parameters_without_row"] == 56


def test_attention_is_a_layer_without_a_formula() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    (row,) = cnnops.summary(Net(), (5, 8)).rows
    assert (row.operations, row.floor_seconds, row.parameters) == (None, None, 288)
    assert row.output == ((1, 5, 8), (1, 5, 5))


class Functions(nn.Module):
    """No formula as a whole, but one for every function in it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.g = nn.Parameter(torch.ones(4, 3, 3, 3)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = cnnops.functional.conv_act(x, self.w, activation="relu")
        return cnnops.functional.group_norm(y, 2, self.g)


class PowerMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x.pow(3), 3, 2).pow(1 / 3)


def test_layers_made_of_functions() -> None:
    model = nn.Sequential(Functions(), PowerMean())
    first, second = cnnops.summary(model, (3, 9, 9), dtype=torch.float64).rows
    assert (first.kind, second.kind) == ("conv", "pool")
    assert first.operations == 4 * 49 * 27 + 3 * 4 * 49, (
        "multiply-adds, and three a value for the norm"
    )
    assert second.operations == 4 * 49 + 4 * 9 * 9 + 4 * 9, "a power a value before and after"
    assert first.bytes_moved == 8 * (3 * 81 + 4 * 27 + 4 + 4 * 49)
    plain = cnnops.summary(nn.Conv2d(3, 4, 3), (3, 9, 9), dtype=torch.float64).rows[0]
    assert (first.kernel, second.kernel) == (plain.kernel, "pool")
    assert (first.receptive_field, second.receptive_field) == (3, 5)


def test_inference_mode_changes_nothing() -> None:
    model = Residual()
    outside = cnnops.summary(model, (2, 16, 16))
    with torch.inference_mode():
        assert cnnops.summary(model, (2, 16, 16)) == outside


class Scaled(nn.Conv2d):
    """Computes something else than its base class does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


def test_subclasses_and_parametrized_layers() -> None:
    (own,) = cnnops.summary(Scaled(3, 4, 3), (3, 8, 8)).rows
    assert own.output == ((1, 4, 8, 8),) and own.operations == 4 * 64 * 27
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    (row,) = cnnops.summary(conv, (3, 8, 8)).rows
    assert (row.operations, row.parameters) == (4 * 36 * 27, 4 * 27 + 4 + 4)
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5))
    assert cnnops.summary(lazy, (3, 8, 8)).parameters == 112 + 8 + 5 * 145
    assert isinstance(lazy[0], nn.LazyConv2d), "the model itself has seen no input"


def test_model_is_left_as_it_was() -> None:
    model = Residual().train()
    calls: list[Any] = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    cnnops.summary(model, (2, 16, 16), dtype=torch.float16)
    for name, t in model.state_dict(keep_vars=True).items():
        assert id(t) == before[name][0] and torch.equal(t, before[name][1])
    assert model.training and len(model.stem._forward_hooks) == 1
    assert len(model.second._forward_hooks) == 0 and t.dtype != torch.float16


class _NoMemory(TorchDispatchMode):
    """Fails where a tensor of some size is made that is not on the meta device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_meta:
            assert out.nbytes < 4096, f"{function} makes {out.nbytes} bytes"
        return out


def test_no_weight_is_allocated() -> None:
    with _NoMemory():
        found = cnnops.summary(command._model("vgg19"))
    assert found.parameters == 143_667_240
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))
    model.plain = torch.zeros(10_000)
    with _NoMemory():
        assert cnnops.summary(model, (64, 32, 32)).parameters == 64 * 577 + 128
    with pytest.raises(AssertionError, match="makes 4096 bytes"), _NoMemory():
        torch.ones(1024)


# ---- formats ----------------------------------------------------------------------------------------------


def test_csv_has_every_digit(alexnet: Summary) -> None:
    lines = list(csv.DictReader(io.StringIO(alexnet.csv())))
    assert list(lines[0]) == [
        "name", "call", "type", "kind", "output", "memory_bytes", "parameters", "operations",
        "receptive_field", "bytes_moved", "floor_seconds", "kernel", "precision",
    ]  # fmt: skip
    for line, row in zip(lines, alexnet.rows, strict=True):
        assert (line["name"], line["output"]) == (row.name, "x".join(map(str, row.output[0])))
        for column in (
            "memory_bytes",
            "parameters",
            "operations",
            "receptive_field",
            "bytes_moved",
        ):
            assert int(line[column]) == getattr(row, column)
        assert float(line["floor_seconds"]) == row.floor_seconds
        assert line["kernel"] == (row.kernel or "")
    assert sum(int(line["parameters"]) for line in lines) == 61_100_840


def test_json_has_everything(alexnet: Summary) -> None:
    found = json.loads(alexnet.json())
    assert list(found) == [
        "model", "input", "dtype", "gpu", "layers", "totals", "shares", "uncounted"
    ]  # fmt: skip
    assert (found["model"], found["input"]) == ("AlexNet", [1, 3, 227, 227])
    assert found["gpu"]["bytes_per_s"] == 3.35e12 and "data sheet" in found["gpu"]["source"]
    conv = found["layers"][0]
    assert conv["output"] == [[1, 64, 56, 56]] and conv["operations"] == 72_855_552
    for column in ("memory_bytes", "parameters", "operations", "bytes_moved", "floor_seconds"):
        assert found["totals"][column] == sum(layer[column] for layer in found["layers"])
    uneven = cnnops.summary(nn.Conv2d(3, 4, (3, 1)), (3, 8, 8))
    assert json.loads(uneven.json())["layers"][0]["receptive_field"] == [3, 1]
    assert next(csv.DictReader(io.StringIO(uneven.csv())))["receptive_field"] == "3x1"


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta",):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        assert not any(name in ("src", "href", "onclick") for name, _ in attrs), "self-contained"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_html_is_one_whole_page(alexnet: Summary) -> None:
    parser = _Cells()
    parser.feed(alexnet.html())
    assert parser.open == []
    assert parser.rows[0] == list(report.HEADS)
    names = [row[0] for row in parser.rows[1 : 1 + len(alexnet.rows)]]
    assert names == [row.name for row in alexnet.rows]
    assert parser.rows[1][3:6] == ["784", "23", "73"]


def test_names_are_escaped(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("<b>[red]$x_1$", nn.Conv2d(3, 4, 3))
    model.__class__ = type("<Net>", (nn.Sequential,), {})
    found = cnnops.summary(model, (3, 8, 8))
    assert "<b>" not in found.html() and "&lt;b&gt;[red]$x_1$" in found.html()
    assert "&lt;Net&gt;" in found.html() and "<Net>" not in found.html()
    assert "<b>[red]$x_1$" in str(found)
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'cnnops[demo]'")
    found.plot(tmp_path / "plot.svg")
    assert "<b>" not in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize("value, text", [
    (None, "-"), (0, "0"), (0.0002, "<0.001"), (0.0042, "0.004"), (0.42, "0.4"), (0.949, "0.9"),
    (0.97, "1"), (4.096, "4"), (37_752.832, "37,753"),
])  # fmt: skip
def test_short_numbers(value: float | None, text: str) -> None:
    assert report.short(value) == text


MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}


@pytest.mark.parametrize("suffix", MAGIC)
def test_plot(suffix: str, tmp_path: Path, alexnet: Summary) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'cnnops[demo]'")
    path = tmp_path / f"layers{suffix.upper()}"
    path.write_bytes(b"former")
    alexnet.plot(path)
    assert path.read_bytes().startswith(MAGIC[suffix]) and list(tmp_path.iterdir()) == [path]


def test_plot_shows_the_rows(alexnet: Summary) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'cnnops[demo]'")
    panels = figure.draw(alexnet).axes
    labels = [axes.get_xlabel() for axes in panels]
    assert [re.search("KB|thousands|millions", label)[0] for label in labels] == [
        "KB", "thousands", "millions"
    ]  # fmt: skip
    shown = [text.get_text() for text in panels[0].get_yticklabels()]
    assert shown == [row.name for row in alexnet.rows if row.type not in ("Dropout", "Flatten")]
    first = {axes.get_xlabel(): axes.patches[0].get_width() for axes in panels}
    assert [*first.values()] == [784, 23.296, 72.855552]


def test_failed_plot_leaves_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alexnet: Summary
) -> None:
    figures = pytest.importorskip("matplotlib.figure")

    def full(self: Any, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    path = tmp_path / "a.png"
    path.write_bytes(b"former")
    monkeypatch.setattr(figures.Figure, "savefig", full)
    with pytest.raises(
        ValueError, match="plot: expected a place that can be written, got no space"
    ):
        alexnet.plot(path)
    assert path.read_bytes() == b"former" and list(tmp_path.iterdir()) == [path]


# ---- the command ------------------------------------------------------------------------------------------

USER = """
import torch
from torch import nn

print("a word of the user's own")

def net():
    rates = [r.item() for r in torch.linspace(0, 1, 3)]  # on the meta device there is nothing to read
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(rates[1]), nn.Conv2d(4, 5, 3))

def mismatch():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(5, 4, 3)))

def two():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y
    return Two()

def broken():
    raise KeyError("weights.pt")

def number():
    return 3

ready = net()
value = 7
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package of the user's."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "my_networks").mkdir()
    (folder / "my_networks" / "__init__.py").write_text("")
    (folder / "my_networks" / "small.py").write_text(USER)
    (folder / "my_networks" / "wrong.py").write_text("def net(:\n")
    return folder


def shell(line: str, folder: Path) -> SimpleNamespace:
    """Run ``cnnops summary`` by a real shell."""
    command = f"'{sys.executable}' -m cnnops summary {line}"
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def test_table_and_plot_by_shell(tmp_path: Path) -> None:
    done = shell("lenet5 --plot 'a plot.png' | cat", tmp_path)
    assert done.err == "" and "\x1b" not in done.out
    lines = [line.split() for line in done.out.splitlines()]
    assert ["fc1", "Linear", "1x500", "2", "1,226", "1", "40"] in [line[:7] for line in lines]
    assert (tmp_path / "a plot.png").read_bytes().startswith(MAGIC[".png"])


def test_csv_by_shell(tmp_path: Path) -> None:
    done = shell("alexnet --input 3,227,227 --format csv > layers.csv", tmp_path)
    assert (done.code, done.err, done.out) == (0, "", "")
    lines = {r["name"]: r for r in csv.DictReader((tmp_path / "layers.csv").open())}
    assert lines["features.0"]["output"] == "1x64x56x56"
    assert lines["classifier.1"]["parameters"] == "37752832"


def test_json_by_shell_of_a_users_network(home: Path) -> None:
    done = shell(
        "my_networks.small:net --input 3,9,9 --batch 2 --dtype float16 --gpu a100 --format json",
        home,
    )
    assert done.code == 0 and done.err == "a word of the user's own\n"
    found = json.loads(done.out)
    assert [layer["output"] for layer in found["layers"]][-1] == [[2, 5, 5, 5]]
    assert found["layers"][0]["memory_bytes"] == 2 * 4 * 49 * 2
    assert (found["dtype"], found["gpu"]["name"]) == ("float16", "A100 SXM 80 GB")


def test_html_by_shell(tmp_path: Path) -> None:
    done = shell("lenet5-original --format html", tmp_path)
    assert (done.code, done.err) == (0, "")
    parser = _Cells()
    parser.feed(done.out)
    assert parser.open == [] and ["fc2", "Linear", "1x10"] in [row[:3] for row in parser.rows]


BAD = {
    "model": (["alexnt"], "MODEL: expected package.module:callable or one of lenet5, "),
    "no module": (["nowhere:net"], "MODEL 'nowhere:net': ModuleNotFoundError: No module named"),
    "no attribute": (["my_networks.small:nat"], "MODEL 'my_networks.small:nat': AttributeError"),
    "no callable": (["my_networks.small:value"], "expected a callable, got int"),
    "no network": (["my_networks.small:number"], "expected a torch.nn.Module, got int"),
    "does not parse": (["my_networks.wrong:net"], "MODEL 'my_networks.wrong:net': SyntaxError"),
    "does not build": (["my_networks.small:broken"], "MODEL 'my_networks.small:broken': KeyError: "),
    "input": (["alexnet", "--input", "3,x,5"], "--input: expected sizes as in 3,224,224, got '3,x,5'"),
    "empty input": (["alexnet", "--input", "3,0,5"], "--input: expected sizes as in 3,224,224, got"),
    "input unsaid": (["my_networks.small:net"], "--input: expected C, *spatial for a model that"),
    "too large": (
        ["alexnet", "--input", f"3,{10**12},{10**12}"],
        "--input: expected a size that tensors can have, got [3, 1000000000000, 1000000000000]",
    ),
    "too small": (
        ["alexnet", "--input", "3,20,20"],
        "layer features.5 (MaxPool2d): input: expected planes that hold a window of [3, 3], got",
    ),
    "channels": (
        ["alexnet", "--input", "1,227,227"],
        "layer features.0 (Conv2d): input: expected 3 channels for weight [64, 3, 11, 11]",
    ),
    "mismatch": (
        ["my_networks.small:mismatch", "--input", "3,9,9"],
        "layer 1.1 (Conv2d): input: expected 5 channels for weight [4, 5, 3, 3] and groups=1, got 4",
    ),
    "two inputs": (
        ["my_networks.small:two", "--input", "3,9,9"],
        "layer (model) (Two): ",
    ),
    "dense": (
        ["lenet5", "--input", "1,32,32"],
        "layer fc1 (Linear): input: expected 2450 features in the last dimension, got [1, 3200]",
    ),
    "batch": (["lenet5", "--batch", "0"], "--batch: expected one size, as in 32, got '0'"),
    "dtype": (["lenet5", "--dtype", "int8"], "--dtype: expected one of float32, float64, float16,"),
    "gpu": (["lenet5", "--gpu", "k80"], "--gpu: expected one of h100, "),
    "format": (["lenet5", "--format", "xml"], "--format: expected one of table, csv, json, html"),
    "suffix": (["lenet5", "--plot", "a.gif"], "--plot: expected a name that ends in .png, .svg, .pdf"),
    "nowhere": (["lenet5", "--plot", "no/a.png"], "--plot: expected a file in a folder that exists"),
    "no option": (["lenet5", "--deep"], "unrecognized arguments: --deep"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[case]
    monkeypatch.chdir(home)
    files, path = sorted(home.iterdir()), list(sys.path)
    try:
        code = main(["summary", *arguments])
    except SystemExit as stopped:  # what the parser finds
        code = stopped.code
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line != "a word of the user's own"]
    assert code == 2 and printed.out == ""
    assert len(lines) == 1 and lines[0].startswith("cnnops") and message in lines[0]
    assert sorted(home.iterdir()) == files and sys.path == path


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["summary", "lenet5"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "standard output cannot be written: " in message


def test_a_module_may_stand_for_its_callable(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    before = list(sys.path)
    assert main(["summary", "my_networks.small:ready", "--input", "3,9,9"]) == 0
    assert "Sequential on 1x3x9x9, float32" in capsys.readouterr().out
    assert sys.path == before


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_bad_arguments_in_python() -> None:
    conv = nn.Conv2d(3, 4, 3)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        cnnops.summary("alexnet")
    with pytest.raises(ValueError, match="input_size: expected C, .* does not say its own"):
        cnnops.summary(conv)
    for size in ((3, -1, 8), (), (3, 8.0, 8), (True, 8, 8), 3):
        with pytest.raises(ValueError, match="input_size: expected positive ints"):
            cnnops.summary(conv, size)
    with pytest.raises(ValueError, match="batch: expected an int of at least 1, got 0"):
        cnnops.summary(conv, (3, 8, 8), batch=0)
    with pytest.raises(
        ValueError, match="dtype: expected one of torch.float32, .*, got torch.int8"
    ):
        cnnops.summary(conv, (3, 8, 8), dtype=torch.int8)
    with pytest.raises(ValueError, match="gpu: expected one of h100, .*, got 'k80'"):
        cnnops.summary(conv, (3, 8, 8), gpu="k80")
    with pytest.raises(
        RuntimeError, match=r"layer \(model\) \(Conv2d\): input: expected padded sizes"
    ):
        cnnops.summary(conv, (3, 2, 2))
    with pytest.raises(TypeError, match="model: expected none that is scripted"):
        cnnops.summary(torch.jit.script(nn.ReLU()), (3, 8, 8))
    with pytest.raises(TypeError, match="model: expected one that copy.deepcopy takes"):
        conv.generator = (i for i in range(3))
        cnnops.summary(conv, (3, 8, 8))


def test_every_gpu_states_its_source() -> None:
    for gpu in GPUS.values():
        assert set(gpu.flops_per_s) == {"float32", "tf32", "float16", "bfloat16", "float64"}
        assert gpu.name.split()[0].lower() in gpu.source.lower()
