"""Classes of Hugging Face's transformers, built from small configurations: with own layers and fused they
compute, learn and count what they do with torch's.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: nothing here is downloaded

import pytest
import torch
from cases import needs_emulator
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import cnnops
import cnnops.nn

ENDS = {"num_labels": 5}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
BLOCKS = {"hidden_sizes": [16, 24], "depths": [1, 2]}
EFFICIENT = {
    "in_channels": [32, 24, 32], "out_channels": [24, 32, 40], "kernel_sizes": [3, 5, 3],
    "strides": [1, 2, 2], "num_block_repeats": [1, 2, 1], "expand_ratios": [1, 6, 6],
    "depthwise_padding": [], "width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320,
}  # fmt: skip

MODELS: dict[str, tuple[Callable[[Any], nn.Module], Any, int, int]] = {
    "resnet": (
        ResNetForImageClassification,
        ResNetConfig(embedding_size=8, layer_type="bottleneck", **BLOCKS, **ENDS),
        12,
        0,
    ),
    "resnet-basic": (
        ResNetForImageClassification,
        ResNetConfig(
            embedding_size=8, layer_type="basic", downsample_in_first_stage=True, **BLOCKS, **ENDS
        ),
        9,
        0,
    ),
    "convnext": (ConvNextForImageClassification, ConvNextConfig(**STAGES, **ENDS), 0, 0),
    "convnextv2": (ConvNextV2ForImageClassification, ConvNextV2Config(**STAGES, **ENDS), 0, 0),
    "mobilenet-v1": (
        MobileNetV1ForImageClassification,
        MobileNetV1Config(depth_multiplier=0.125, classifier_dropout_prob=0.2, **ENDS),
        27,
        0,
    ),
    "mobilenet-v2": (
        MobileNetV2ForImageClassification,
        MobileNetV2Config(
            depth_multiplier=0.2,
            finegrained_output=False,
            classifier_dropout_prob=0.2,
            **ENDS,
        ),
        52,
        0,
    ),
    "regnet-x": (
        RegNetForImageClassification,
        RegNetConfig(embedding_size=8, groups_width=8, layer_type="x", **BLOCKS, **ENDS),
        12,
        0,
    ),
    "regnet-y": (
        RegNetForImageClassification,
        RegNetConfig(embedding_size=16, groups_width=8, layer_type="y", **BLOCKS, **ENDS),
        18,
        0,
    ),
    "efficientnet": (
        EfficientNetForImageClassification,
        EfficientNetConfig(**EFFICIENT, **ENDS),
        20,
        1,
    ),
}
"""How to build it, its configuration, the number of fused steps, and of batch norms that stay."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Layers too small to share out, on whose threads several test processes would wait in turn."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


def network(name: str) -> nn.Module:
    """Float64, with random weights of the size that keeps activations as they are, and random statistics."""
    build, config, *_ = MODELS[name]
    model = build(config).double()
    generator = torch.Generator().manual_seed(3)
    for key, t in model.state_dict().items():
        if not t.is_floating_point():
            continue
        if key.endswith("running_var"):
            t.uniform_(0.5, 2, generator=generator)
        elif t.dim() > 1:
            t.normal_(0, (2 / t[0].numel()) ** 0.5, generator=generator)
        else:
            t.normal_(0, 0.1, generator=generator)
            if key.endswith("weight"):  # of a norm
                t.add_(1)
    return model


def images(n: int = 3, side: int = 64, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, side, side, dtype=dtype, generator=generator)


def result(model: nn.Module, x: Tensor) -> Tensor:
    """Logits; of a part of a network, its output."""
    torch.manual_seed(2)  # dropout
    y = model(x)
    found: Tensor = y if isinstance(y, Tensor) else y.logits
    return found


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits; the gradient of the input and of every parameter."""
    x = x.detach().requires_grad_()
    y = result(model, x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), list(torch.autograd.grad((y * weights).sum(), [x, *model.parameters()]))


def norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t.double()))


def assert_near(ours: Tensor, theirs: Tensor, limit: float, least: float = 0.0) -> None:
    assert norm(ours - theirs) <= limit * max(norm(theirs), least)


def assert_gradients_near(
    ours: list[Tensor], theirs: list[Tensor], limit: float, part: float = 1e-4
) -> None:
    # What batch norm undoes, a shift before it, has no gradient but rounding errors.
    least = part * max(map(norm, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, limit, least)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_and_gradients(name: str) -> None:
    stock = network(name)
    done = cnnops.convert(stock, copy=True)
    # ConvNeXt's has a forward of its own, for channels in front.
    assert all("LayerNorm is a subclass of torch.LayerNorm" in why for why in done.left.values())
    assert bool(done.left) == name.startswith("convnext")
    x = images()
    for training, limit in ((True, 1e-9), (False, 1e-11)):
        with cnnops.engine("cpu"), cnnops.fallback("error"), cnnops.patched():
            y, found = gradients(done.model.train(training), x)
        expected, theirs = gradients(stock.train(training), x)
        assert norm(expected) > 0.1
        assert_near(y, expected, limit)
        assert_gradients_near(found, theirs, limit)


@pytest.mark.parametrize("fuse_training", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_two_steps_of_training(name: str, fuse_training: bool) -> None:
    """Weights, running statistics and their counts after two steps; the layers come back as they were."""
    stock = network(name).train()
    done = cnnops.convert(stock, copy=True, fuse_training=fuse_training)
    states = []
    for model, engine in ((done.model, "cpu"), (stock, "aten")):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        for i in range(2):
            optimizer.zero_grad()
            with cnnops.engine(engine), cnnops.fallback("error"):
                torch.nn.functional.cross_entropy(
                    result(model, images() + i), torch.arange(3)
                ).backward()
            optimizer.step()
        states.append(model.state_dict())
    assert list(states[0]) == list(states[1])
    before = network(name).state_dict()
    for key, value in states[1].items():
        assert_near(states[0][key], value, 1e-8, 1e-3)
        # But for shifts, which the next batch norm may undo.
        assert key.endswith("bias") or not torch.equal(value, before[key]), key
    assert bool(done.fused) == (fuse_training and not name.startswith("convnext"))
    kinds = [type(m) for m in stock.modules()]
    assert [type(m) for m in cnnops.revert(done.model).model.modules()] == kinds


@pytest.mark.parametrize("name", MODELS)
def test_fused(name: str) -> None:
    *_, fused, norms = MODELS[name]
    stock, x = network(name).eval(), images(side=32)
    done = cnnops.fuse(stock, x)
    parts = list(done.model.modules())
    assert len(done.fused) == fused
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in parts) == norms
    assert sum(isinstance(m, cnnops.nn.ConvAct2d) for m in parts) == fused
    assert not any(isinstance(m, (nn.ReLU, nn.ReLU6)) for m in parts)
    model = cnnops.convert(done.model).model
    # Sizes that the sample did not have: padding that a function computes is computed anew.
    for size in (images(side=32), images(2, 47)):
        with torch.no_grad(), cnnops.engine("cpu"), cnnops.fallback("error"):
            found = result(model, size)
        assert_near(found, result(stock, size).detach(), 1e-12)


def test_layer_norms_of_convnext_in_a_block() -> None:
    """Their class has a forward of its own, which calls torch.nn.functional."""
    model = cnnops.convert(network("convnext")).model.eval()
    with torch.no_grad(), cnnops.engine("cpu"), cnnops.patched():
        ops = Counter(choice.op for choice in cnnops.explain(model, images()))
    assert ops == {"conv_fprop": 9, "layer_norm_fwd": 10}


def test_what_stays_says_why() -> None:
    """The last batch norm of EfficientNet is called by a forward with options, which others may set."""
    done = cnnops.fuse(network("efficientnet").eval(), images())
    assert "optional argument, output_hidden_states" in done.left["efficientnet.encoder"]


EMULATED: dict[str, Callable[[Any], nn.Module]] = {
    "resnet": lambda m: nn.Sequential(m.resnet.embedder, m.resnet.encoder.stages[0]),
    "convnext": lambda m: nn.Sequential(m.convnext.embeddings, m.convnext.encoder.stages[0]),
    "mobilenet-v1": lambda m: nn.Sequential(m.mobilenet_v1.conv_stem, *m.mobilenet_v1.layer[:2]),
    "mobilenet-v2": lambda m: nn.Sequential(m.mobilenet_v2.conv_stem, m.mobilenet_v2.layer[0]),
    "regnet-y": lambda m: nn.Sequential(m.regnet.embedder, m.regnet.encoder.stages[0]),
    "efficientnet": lambda m: nn.Sequential(
        m.efficientnet.embeddings, m.efficientnet.encoder.blocks[0]
    ),
}
"""A network -> its first layers."""


@needs_emulator
@pytest.mark.parametrize("name", EMULATED)
def test_first_blocks_in_cuda_kernels(name: str) -> None:
    stock = EMULATED[name](network(name)).float()
    own = cnnops.convert(stock, copy=True).model
    x = images(2, 16, torch.float32)
    fused = cnnops.fuse(stock.eval(), x).model
    with cnnops.engine("emulate"), cnnops.fallback("error"):
        with torch.no_grad():
            y = result(fused, x)
        found = gradients(own.train(), x)
    assert_near(y, result(stock, x).detach(), 1e-5)
    expected = gradients(stock.train(), x)
    assert_near(found[0], expected[0], 1e-5)
    assert_gradients_near(found[1], expected[1], 1e-4, 1e-2)
    for a, b in zip(own.buffers(), stock.buffers(), strict=True):
        assert_near(a, b, 1e-5)
