"""The networks: the published layers, sizes, names and parameter counts; own and stock layers agree."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, needs_emulator
from torch import Tensor, nn

import cnnops
from bench.suites import SUITES
from cnnops.models import LENETS, MODELS
from cnnops.models.parts import StochasticDepth
from cnnops.shapes import ConvShape, NormShape, PoolShape

SPATIAL = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm2d)
"""What comes from `layers`."""
LARGE = ("vgg19", "vgg19-bn", "resnet34", "resnet101", "resnet152")
"""The same code as a smaller network."""


def slow(*names: str) -> list[Any]:
    """All networks, of which those named are slow."""
    return [pytest.param(name, marks=pytest.mark.slow if name in names else ()) for name in MODELS]


def on_meta(name: str, layers: ModuleType = nn, **sizes: int) -> nn.Module:
    """Sizes without data: nothing is allocated or computed."""
    with torch.device("meta"):
        return MODELS[name](layers=layers, **sizes)


def channels(model: nn.Module) -> int:
    return next(model.parameters()).shape[1]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@contextmanager
def watched(
    model: nn.Module, see: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """Calls ``see(name, layer, input, output)`` for each layer without layers of its own."""
    handles = [
        module.register_forward_hook(lambda m, inputs, y, name=name: see(name, m, inputs[0], y))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    yield
    for handle in handles:
        handle.remove()


# ---- LeNet-5 as lectures show it ------------------------------------------------------------------------

# (name of the layer, size of its output without the batch, parameters: weights and biases)
TABLES = {
    "lenet5": (
        ("conv1", (20, 28, 28), 20 * (5 * 5 + 1)),
        ("pool1", (20, 14, 14), 0),
        ("conv2", (50, 14, 14), 50 * (20 * 5 * 5 + 1)),
        ("pool2", (50, 7, 7), 0),
        ("fc1", (500,), 500 * (2450 + 1)),
        ("fc2", (10,), 10 * (500 + 1)),
    ),
    "lenet5-original": (
        ("conv1", (6, 28, 28), 6 * (5 * 5 + 1)),
        ("pool1", (6, 14, 14), 0),
        ("conv2", (16, 10, 10), 16 * (6 * 5 * 5 + 1)),
        ("pool2", (16, 5, 5), 0),
        ("conv3", (120, 1, 1), 120 * (16 * 5 * 5 + 1)),
        ("fc1", (84,), 84 * (120 + 1)),
        ("fc2", (10,), 10 * (84 + 1)),
    ),
}


@pytest.mark.parametrize("name", LENETS)
def test_layers_are_the_lectures(name: str) -> None:
    model, table = on_meta(name), []

    def see(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        table.append((name, tuple(y.shape[1:]), parameters(layer)))

    with watched(model, see):
        assert model(torch.empty(3, 1, *model.input_size, device="meta")).shape == (3, 10)
    assert table == list(TABLES[name])


@pytest.mark.parametrize("name", LENETS)
def test_other_image_sizes_are_refused(name: str) -> None:
    height, width = MODELS[name].input_size
    with pytest.raises(RuntimeError):
        on_meta(name)(torch.empty(2, 1, height + 8, width, device="meta"))


# ---- AlexNet as lectures show it ------------------------------------------------------------------------

# layer, output channels, output height and width, memory in KB (float32), thousands of parameters, millions
# of multiply-adds (of pooling: places compared)
ALEXNET = (
    ("features.0", 64, 56, 784, 23, 73),
    ("features.2", 64, 27, 182, 0, 0.4),
    ("features.3", 192, 27, 547, 307, 224),
    ("features.5", 192, 13, 127, 0, 0),
    ("features.6", 384, 13, 254, 664, 112),
    ("features.8", 256, 13, 169, 885, 150),  # lectures print 145: 256·13·13·384·9 is 149,520,384
    ("features.10", 256, 13, 169, 590, 100),
    ("features.12", 256, 6, 36, 0, 0),
    ("classifier.1", 4096, None, 16, 37_753, 38),
    ("classifier.4", 4096, None, 16, 16_781, 17),
    ("classifier.6", 1000, None, 4, 4_097, 4),
)


def test_alexnet_is_the_lectures() -> None:
    model, costs = on_meta("alexnet"), {}

    def see(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            operations = layer.weight.numel()
        elif isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            operations = problem(layer, x)[1].flops // (2 if isinstance(layer, nn.Conv2d) else 1)
        else:
            return
        costs[name] = (tuple(y.shape[1:]), parameters(layer), operations)

    with watched(model, see):
        model(torch.empty(1, 3, 227, 227, device="meta"))
    table = []
    for (name, (size, weights, operations)), row in zip(costs.items(), ALEXNET, strict=True):
        digits = 1 if isinstance(row[-1], float) else None
        C, H = size[0], size[1] if len(size) == 3 else None
        KB = round(math.prod(size) * 4 / 1024)
        table.append((name, C, H, KB, round(weights / 1e3), round(operations / 1e6, digits)))
    assert table == list(ALEXNET)

    # Most memory in the early convolutions, nearly all parameters in the dense layers, most operations in
    # the convolutions.
    def share(column: int, *prefixes: str) -> float:
        some = sum(row[column] for row in table if row[0].startswith(prefixes))
        return some / sum(row[column] for row in table)

    assert share(3, "features.0", "features.3") > 0.5
    assert share(4, "classifier") > 0.95
    assert share(5, "features") > 0.9


# ---- sizes and names as published -----------------------------------------------------------------------

# Parameters, entries of the state_dict, some of them. From alexnet on as torchvision has them.
PUBLISHED: dict[str, tuple[int, int, dict[str, tuple[int, ...]]]] = {
    "lenet5": (1_256_080, 8, {"conv1.weight": (20, 1, 5, 5), "fc2.bias": (10,)}),
    "lenet5-original": (61_706, 10, {"conv3.weight": (120, 16, 5, 5), "fc2.bias": (10,)}),
    "alexnet": (
        61_100_840,
        16,
        {
            "features.0.weight": (64, 3, 11, 11),
            "features.3.bias": (192,),
            "features.10.weight": (256, 256, 3, 3),
            "classifier.1.weight": (4096, 9216),
            "classifier.6.bias": (1000,),
        },
    ),
    "vgg16": (
        138_357_544,
        32,
        {
            "features.0.weight": (64, 3, 3, 3),
            "features.28.weight": (512, 512, 3, 3),
            "classifier.0.weight": (4096, 25088),
            "classifier.6.weight": (1000, 4096),
        },
    ),
    "vgg16-bn": (
        138_365_992,
        97,
        {
            "features.0.bias": (64,),
            "features.1.running_mean": (64,),
            "features.40.weight": (512, 512, 3, 3),
            "features.41.num_batches_tracked": (),
            "classifier.3.weight": (4096, 4096),
        },
    ),
    "vgg19": (143_667_240, 38, {"features.34.weight": (512, 512, 3, 3)}),
    "vgg19-bn": (143_678_248, 118, {"features.50.weight": (512,)}),
    "resnet18": (
        11_689_512,
        122,
        {
            "layer1.1.conv2.weight": (64, 64, 3, 3),
            "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer4.1.bn2.running_var": (512,),
            "fc.weight": (1000, 512),
        },
    ),
    "resnet34": (21_797_672, 218, {"layer3.5.conv1.weight": (256, 256, 3, 3)}),
    "resnet50": (
        25_557_032,
        320,
        {
            "conv1.weight": (64, 3, 7, 7),
            "bn1.weight": (64,),
            "layer1.0.conv1.weight": (64, 64, 1, 1),
            "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer1.0.downsample.1.num_batches_tracked": (),
            "layer3.5.conv2.weight": (256, 256, 3, 3),
            "layer4.2.bn3.running_mean": (2048,),
            "fc.weight": (1000, 2048),
        },
    ),
    "resnet101": (44_549_160, 626, {"layer3.22.conv3.weight": (1024, 256, 1, 1)}),
    "resnet152": (60_192_808, 932, {"layer3.35.bn3.bias": (1024,)}),
    "mobilenetv2": (
        3_504_872,
        314,
        {
            "features.0.0.weight": (32, 3, 3, 3),
            "features.1.conv.0.0.weight": (32, 1, 3, 3),
            "features.1.conv.1.weight": (16, 32, 1, 1),
            "features.2.conv.0.0.weight": (96, 16, 1, 1),
            "features.2.conv.1.1.running_mean": (96,),
            "features.17.conv.2.weight": (320, 960, 1, 1),
            "features.17.conv.3.bias": (320,),
            "features.18.0.weight": (1280, 320, 1, 1),
            "classifier.1.weight": (1000, 1280),
        },
    ),
    "efficientnet-b0": (
        5_288_548,
        360,
        {
            "features.0.0.weight": (32, 3, 3, 3),
            "features.1.0.block.0.0.weight": (32, 1, 3, 3),
            "features.1.0.block.1.fc1.weight": (8, 32, 1, 1),
            "features.1.0.block.2.0.weight": (16, 32, 1, 1),
            "features.3.1.block.1.0.weight": (240, 1, 5, 5),
            "features.7.0.block.2.fc2.bias": (1152,),
            "features.7.0.block.3.1.weight": (320,),
            "features.8.0.weight": (1280, 320, 1, 1),
            "classifier.1.bias": (1000,),
        },
    ),
    "convnext-tiny": (
        28_589_128,
        182,
        {
            "features.0.0.weight": (96, 3, 4, 4),
            "features.0.1.weight": (96,),
            "features.1.0.layer_scale": (96, 1, 1),
            "features.1.0.block.0.weight": (96, 1, 7, 7),
            "features.1.0.block.2.bias": (96,),
            "features.1.0.block.3.weight": (384, 96),
            "features.4.0.weight": (192,),
            "features.4.1.weight": (384, 192, 2, 2),
            "features.5.8.block.5.weight": (384, 1536),
            "classifier.0.weight": (768,),
            "classifier.2.weight": (1000, 768),
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layers", [cnnops.nn, nn], ids=["own", "stock"])
def test_names_and_counts_are_the_published(name: str, layers: ModuleType) -> None:
    count, entries, some = PUBLISHED[name]
    model = on_meta(name, layers)
    state = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    assert parameters(model) == count
    assert len(state) == entries
    assert some.items() <= state.items()


@pytest.mark.parametrize("name", MODELS)
def test_layers_come_from_the_module_asked_for(name: str) -> None:
    for layers, package in ((cnnops.nn, "cnnops"), (nn, "torch")):
        spatial = [m for m in on_meta(name, layers).modules() if isinstance(m, SPATIAL)]
        assert {type(m).__module__.partition(".")[0] for m in spatial} == {package}


def problem(layer: nn.Module, x: Tensor) -> tuple[str, ConvShape | PoolShape | NormShape, bool]:
    """Operation, sizes, and whether there is a bias."""
    if isinstance(layer, nn.Conv2d):
        options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        shape = ConvShape.of(x.shape, layer.weight.shape, None, *options)
        return "conv2d", shape, layer.bias is not None
    if isinstance(layer, nn.BatchNorm2d):
        return "batch_norm", NormShape.of(x.shape, training=layer.training), False
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return "adaptive_avg_pool2d", PoolShape.adaptive(x.shape, layer.output_size), False
    assert isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d))
    op = "max_pool2d" if isinstance(layer, nn.MaxPool2d) else "avg_pool2d"
    return op, PoolShape.of(x.shape, layer.kernel_size, layer.stride, layer.padding), False


@pytest.mark.parametrize(
    "name, suite",
    [
        ("lenet5", "lenet5"),
        ("lenet5-original", "lenet5_original"),
        ("alexnet", "alexnet"),
        ("vgg16", "vgg16"),
        ("resnet50", "resnet50"),
        ("mobilenetv2", "mobilenetv2"),
        ("efficientnet-b0", "efficientnet_b0"),
        ("convnext-tiny", "convnext_t"),
    ],
)
def test_what_is_benchmarked_is_what_runs(name: str, suite: str) -> None:
    """The suite, written down on its own, has all problems of a training step and no other, each as often."""
    model, seen = on_meta(name), Counter()

    def see(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        # Before the dense layers of AlexNet and VGG pooling serves other image sizes, and keeps this one.
        if isinstance(layer, SPATIAL) and not (
            isinstance(layer, nn.AdaptiveAvgPool2d) and x.shape == y.shape
        ):
            seen[problem(layer, x)] += 1

    with watched(model, see):
        model(torch.empty(SUITES[suite][0].x, device="meta"))
    timed = Counter()
    for case in SUITES[suite]:
        timed[case.op.removesuffix("_act"), case.shape, case.bias] += case.count
    assert seen == timed
    assert SUITES[suite][0].x[2:] == model.input_size


# ---- sizes of images and outputs ------------------------------------------------------------------------

SMALLEST = {
    **dict.fromkeys(MODELS, 1),
    **{"alexnet": 63, "vgg16": 32, "vgg16-bn": 32, "vgg19": 32, "vgg19-bn": 32},
    **{"convnext-tiny": 32, "lenet5": 28, "lenet5-original": 32},
}


@pytest.mark.parametrize("name", MODELS)
def test_classes_and_channels(name: str) -> None:
    model = on_meta(name, classes=7, channels=5)
    assert model(torch.empty(2, 5, *model.input_size, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in LENETS])
def test_sizes_of_images(name: str) -> None:
    model, least = on_meta(name).eval(), SMALLEST[name]
    assert model.input_size == ((227, 227) if name == "alexnet" else (224, 224))
    for height, width in ((least, least), (97, 160), (256, 255)):
        assert model(torch.empty(2, 3, height, width, device="meta")).shape == (2, 1000)
    if least > 1:
        with pytest.raises(RuntimeError):
            model(torch.empty(2, 3, least - 1, least, device="meta"))


# ---- own and stock layers -------------------------------------------------------------------------------


def pair(
    name: str, part: Callable[[Any], nn.Module] = lambda model: model
) -> tuple[nn.Module, nn.Module]:
    """A part of the network in own and in stock layers, float64, with the same random weights and statistics.

    AlexNet's and VGG's dense layers, torch's either way, are left out: they have most of the weights.
    """
    models = []
    for layers in (cnnops.nn, nn):
        model = on_meta(name, layers, classes=10)
        if name == "alexnet" or name.startswith("vgg"):
            model.classifier = nn.Identity()
        models.append(part(model).double().to_empty(device="cpu"))
    own, stock = models
    generator = torch.Generator().manual_seed(3)
    for key, t in own.state_dict().items():
        if not t.is_floating_point():
            t.zero_()
        elif key.endswith("running_var"):
            t.uniform_(0.5, 2, generator=generator)
        elif t.dim() > 1 and not key.endswith("layer_scale"):
            t.normal_(0, (2 / t[0].numel()) ** 0.5, generator=generator)
        else:
            t.normal_(0, 0.1, generator=generator)
            if key.endswith("weight"):  # of a norm
                t.add_(1)
    assert stock.load_state_dict(own.state_dict()) == nn.modules.module._IncompatibleKeys([], [])
    return own, stock


def images(name: str, model: nn.Module, n: int = 2) -> Tensor:
    """Small ones, whose last planes still have more than one place for batch norm."""
    side = max(64, SMALLEST[name]) if name not in LENETS else SMALLEST[name]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels(model), side, side, dtype=torch.float64, generator=generator)


def step(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and running statistics; the gradient of the input and of every parameter."""
    x = x.detach().requires_grad_()
    torch.manual_seed(2)  # dropout
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])
    return [y.detach(), *(b.double() for b in model.buffers())], list(gradients)


def norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t))


def assert_near(ours: list[Tensor], theirs: list[Tensor], limit: float, part: float = 0) -> None:
    """Norm-relative; what has less than `part` of the largest norm is measured by that."""
    least = part * max(map(norm, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert norm(a - b) <= limit * max(norm(b), least)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in LARGE])
def test_stock_and_own_layers_agree(name: str) -> None:
    """One state_dict, float64, in training and in evaluation: logits, running statistics, all gradients.

    Training multiplies rounding errors: a batch norm over eight values is steep, and there are up to 155.
    """
    own, stock = pair(name)
    x = images(name, own)
    for training, tolerance in ((True, 1e-9), (False, 1e-11)):
        with cnnops.engine("cpu"):
            values, gradients = step(own.train(training), x)
        expected_values, expected_gradients = step(stock.train(training), x)
        assert_near(values, expected_values, tolerance)
        # What batch norm undoes, a shift before it, has no gradient but rounding errors.
        assert_near(gradients, expected_gradients, tolerance, 1e-4)


@pytest.mark.parametrize(
    "name, fuse_training",
    [("resnet18", False), ("vgg16-bn", False), ("mobilenetv2", False), ("mobilenetv2", True)],
)
def test_two_steps_of_training(name: str, fuse_training: bool) -> None:
    """Weights, running statistics and their counts after two steps of an optimizer, float64."""
    own, stock = pair(name)
    if fuse_training:
        done = cnnops.convert(stock, copy=True, fuse_training=True)
        assert len(done.fused) == 35, "all but the last batch norm of each of 17 blocks"
        own = done.model
    before = copy.deepcopy(stock.state_dict())
    x = images(name, own)
    for model, engine in ((own.train(), "cpu"), (stock.train(), "aten")):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        for i in range(2):
            optimizer.zero_grad()
            torch.manual_seed(2)  # dropout
            with cnnops.engine(engine):
                F.cross_entropy(model(x + i), torch.arange(len(x))).backward()
            optimizer.step()
    ours, theirs = own.state_dict(), stock.state_dict()
    assert list(ours) == list(theirs)
    for key, expected in theirs.items():
        error = norm((ours[key] - expected).double())
        assert error <= 1e-9 * max(norm(expected.double()), 1e-3), key
        # But for shifts, which the next batch norm undoes.
        assert key.endswith("bias") or not torch.equal(expected, before[key]), key


BLOCKS: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = {
    "lenet5": (lambda m: m, (1, 1, 28, 28)),
    "lenet5-original": (lambda m: nn.Sequential(m.conv1, m.pool1), (2, 1, 12, 12)),
    "alexnet": (lambda m: m.features[:3], (2, 3, 16, 16)),
    "vgg16": (lambda m: m.features[:5], (2, 3, 4, 4)),
    "resnet18": (lambda m: m.layer1[0], (2, 64, 4, 4)),
    "resnet50": (lambda m: m.layer1[0], (2, 64, 4, 4)),
    "mobilenetv2": (lambda m: m.features[1], (2, 32, 4, 4)),
    "convnext-tiny": (lambda m: m.features[1][0], (2, 96, 4, 4)),
}
"""A network -> its first layers or block, and the size of an input for them."""


@needs_emulator
@pytest.mark.parametrize("name", BLOCKS)
def test_first_blocks_in_cuda_kernels(name: str) -> None:
    """Float32 in training: results, running statistics and all gradients, against stock float64."""
    part, size = BLOCKS[name]
    own, stock = pair(name, part)
    own.float()
    stock.load_state_dict(own.state_dict())  # the rounded weights
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    with cnnops.engine("emulate"), cnnops.fallback("error"):
        values, gradients = step(own.train(), x)
    expected_values, expected_gradients = step(stock.train(), x.double())
    tolerance = TOLERANCE[torch.float32]
    assert_near(values, expected_values, tolerance.output)
    assert_near(gradients, expected_gradients, tolerance.gradient, 1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in LARGE])
def test_channels_last_agrees_and_stays(name: str) -> None:
    """The same logits, and no layer turns a tensor back to NCHW."""
    own, _ = pair(name)
    x = images(name, own)
    own.eval()

    def see(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, SPATIAL):
            assert y.is_contiguous(memory_format=torch.channels_last), name

    with torch.no_grad(), cnnops.engine("cpu"):
        expected = own(x)
        own.to(memory_format=torch.channels_last)
        with watched(own, see):
            logits = own(x.contiguous(memory_format=torch.channels_last))
    assert norm(logits - expected) <= 1e-11 * norm(expected)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "alexnet", "efficientnet-b0", "convnext-tiny",
            )
        ),
    ],
)  # fmt: skip
def test_compiles_to_one_graph(name: str) -> None:
    own, _ = pair(name)
    x = images(name, own)
    compiled = torch.compile(copy.deepcopy(own).train(), fullgraph=True, backend="eager")
    values, gradients = step(compiled, x)
    expected_values, expected_gradients = step(own.train(), x)
    assert_near(values, expected_values, 1e-12)
    assert_near(gradients, expected_gradients, 1e-9, 1e-4)


# ---- training and evaluation ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenetv2", "efficientnet-b0", "convnext-tiny"])
def test_only_training_is_random(name: str) -> None:
    _, stock = pair(name)
    x = images(name, stock)
    with torch.no_grad():
        stock.eval()
        assert torch.equal(stock(x), stock(x))
        stock.train()
        assert not torch.equal(stock(x), stock(x))


def test_stochastic_depth() -> None:
    drop, x = StochasticDepth(0.25), torch.randn(4000, 2, 1, 3).add_(9)
    y = drop(x)
    kept = y[:, 0, 0, 0] != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert not y[~kept].any()
    assert abs(kept.double().mean() - 0.75) < 0.03  # more than four deviations
    assert torch.equal(drop.eval()(x), x)
    assert torch.equal(StochasticDepth(0.0)(x), x)


@pytest.mark.parametrize(
    "name, blocks, last", [("efficientnet-b0", 16, 0.2 * 15 / 16), ("convnext-tiny", 18, 0.1)]
)
def test_stochastic_depth_grows(name: str, blocks: int, last: float) -> None:
    p = [m.p for m in on_meta(name).modules() if isinstance(m, StochasticDepth)]
    assert len(p) == blocks and p[0] == 0 and p[-1] == pytest.approx(last)
    assert all(b - a == pytest.approx(p[1]) for a, b in pairwise(p))


@pytest.mark.parametrize(
    "name, deviations",
    [
        (
            "vgg16",
            {"features.28.weight": (2 / (512 * 9)) ** 0.5, "classifier.0.weight": 0.01},
        ),
        (
            "resnet18",
            {"layer4.1.conv1.weight": (2 / (512 * 9)) ** 0.5, "fc.weight": (1 / 512 / 3) ** 0.5},
        ),
        (
            "mobilenetv2",
            {"features.18.0.weight": (2 / 1280) ** 0.5, "classifier.1.weight": 0.01},
        ),
        (
            "efficientnet-b0",
            {"features.8.0.weight": (2 / 1280) ** 0.5, "classifier.1.weight": (1e-3 / 3) ** 0.5},
        ),
        (
            "convnext-tiny",
            {"features.6.1.weight": 0.02, "features.7.0.block.3.weight": 0.02},
        ),
    ],
)
def test_initial_weights(name: str, deviations: dict[str, float]) -> None:
    model = MODELS[name]()
    state = model.state_dict()
    for key, deviation in deviations.items():
        assert float(state[key].std()) == pytest.approx(deviation, rel=0.01)
        assert abs(float(state[key].mean())) < 0.01 * deviation
    dense = ("classifier.", "fc.")
    for key, t in state.items():
        if key.endswith("bias") and not (name == "resnet18" and key.startswith(dense)):
            assert not t.any(), key
        if t.dim() == 1 and key.endswith("weight"):  # of a norm
            assert bool((t == 1).all()), key
        if key.endswith("layer_scale"):
            assert torch.equal(t, torch.full_like(t, 1e-6))
