"""What training keeps of ResNet-50's stem between its first convolution and its first block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_memory import saved_bytes
from torch import Tensor

import cnnops.functional as C

CONVOLVED = (1, 64, 112, 112)
"""What the 7x7 convolution makes of one image."""


def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    return F.max_pool2d(F.relu(y, inplace=True), 3, 2, 1)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = C.batch_norm_act(x, None, None, weight, bias, training=True, activation="relu")
    return C.max_pool2d(y, 3, 2, 1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_of_what_pytorch_keeps(dtype: torch.dtype, layout: str) -> None:
    x = torch.randn(CONVOLVED, dtype=dtype)
    x = x.contiguous(memory_format=getattr(torch, f"{layout}_format", torch.channels_last))
    x.requires_grad_()
    weight, bias = (torch.ones(64, dtype=dtype, requires_grad=True) for _ in range(2))
    outputs, statistics = x.numel() // 4, 2 * 64 * 4
    kept, plain = (saved_bytes(function, x, weight, bias) for function in (ours, theirs))
    # The norm's input and a byte for each maximum; what the pooling reads is made anew from that input.
    assert kept == x.nbytes + outputs + statistics
    # The norm's input, the activation's result, and an index of 8 bytes for each maximum.
    assert plain >= 2 * x.nbytes + 8 * outputs
    assert kept <= 0.5 * plain
    limit = 1e-5 if dtype == torch.float32 else 0.03
    found, expected = (function(x, weight, bias) for function in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
