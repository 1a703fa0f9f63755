"""Max and average pooling: disjoint and overlapping windows, global averages, both directions and layouts."""

from __future__ import annotations

import pytest

from bench.conftest import NAMES, Bench

ROWS = [
    "resnet50/maxpool/fwd/float32/contiguous",
    "resnet50/maxpool/bwd/float32/contiguous",
    "resnet50/maxpool/fwd/bfloat16/channels_last",
    "lenet5/pool1/fwd/float32/contiguous",
    "lenet5/pool1/bwd/float32/contiguous",
    "lenet5_original/pool1/fwd/float32/contiguous",
    "lenet5_original/pool1/bwd/float32/contiguous",
    "resnet50/avgpool/fwd/float32/contiguous",
    "resnet50/avgpool/bwd/float32/contiguous",
]


@pytest.mark.parametrize("rival", NAMES)
@pytest.mark.parametrize("row", ROWS)
def test_pool(bench: Bench, row: str, rival: str) -> None:
    bench(row, rival)
