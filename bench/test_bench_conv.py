"""Convolutions of networks: dense, pointwise, depthwise, the first layer, in all directions."""

from __future__ import annotations

import pytest

from bench.conftest import NAMES, Bench

ROWS = [
    "lenet5/conv2/fprop/float32/contiguous",
    "lenet5/conv2/dgrad/float32/contiguous",
    "lenet5/conv2/wgrad/float32/contiguous",
    "resnet50/conv1/fprop/float32/contiguous",
    "resnet50/layer1.0.conv2/fprop/float32/contiguous",
    "resnet50/layer1.0.conv2/dgrad/float32/contiguous",
    "resnet50/layer1.0.conv2/wgrad/float32/contiguous",
    "resnet50/layer1.0.conv3/fprop/float32/contiguous",
    "mobilenetv2/stage2.1.depthwise/fprop/float32/contiguous",
    "mobilenetv2/stage2.1.depthwise/dgrad/float32/contiguous",
    "mobilenetv2/stage2.1.depthwise/wgrad/float32/contiguous",
    "mobilenetv2/stage2.1.depthwise/fprop/bfloat16/channels_last",
]


@pytest.mark.parametrize("rival", NAMES)
@pytest.mark.parametrize("row", ROWS)
def test_conv(bench: Bench, row: str, rival: str) -> None:
    bench(row, rival)
