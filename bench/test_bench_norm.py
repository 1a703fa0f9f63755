"""Batch norm in training and evaluation, alone and with residual and ReLU, which torch adds in place."""

from __future__ import annotations

import pytest

from bench.conftest import NAMES, Bench

ROWS = [
    "sweep_norm/C64/fwd/float32/contiguous",
    "sweep_norm/C64/bwd/float32/contiguous",
    "sweep_norm/C64/fwd/bfloat16/channels_last",
    "sweep_norm/eval/fwd/float32/contiguous",
    "sweep_norm/relu/fwd/float32/contiguous",
    "sweep_norm/add_relu/fwd/float32/contiguous",
    "sweep_norm/add_relu/bwd/float32/contiguous",
    "sweep_norm/eval_add_relu/fwd/float32/contiguous",
]


@pytest.mark.parametrize("rival", NAMES)
@pytest.mark.parametrize("row", ROWS)
def test_norm(bench: Bench, row: str, rival: str) -> None:
    bench(row, rival)
