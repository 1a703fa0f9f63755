"""Tensors of more than 2^31 elements, one problem a family: offsets take 64 bits, and nothing wraps round.

The result is compared where a 32-bit offset would have gone wrong: in the last image. Under the emulator the
same code runs on small tensors (`INDEX=long long`, `WIDE=1`) in the tests of each kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, assert_close
from torch import Tensor

import cnnops.functional as C

GIB = 2**30
IMAGES, SIZE = 2**31 // (8 * 1024 * 1024) + 2, (8, 1024, 1024)

FAMILIES: dict[str, Callable[..., Tensor]] = {
    "conv2d": lambda m, x: m.conv2d(x, _weight(x), padding=1, groups=8),
    "conv_transpose2d": lambda m, x: m.conv_transpose2d(x, _weight(x), padding=1, groups=8),
    "max_pool2d": lambda m, x: m.max_pool2d(x, 3, 1, 1),
    "avg_pool2d": lambda m, x: m.avg_pool2d(x, 3, 1, 1),
    "adaptive_avg_pool2d": lambda m, x: m.adaptive_avg_pool2d(x, 512),
    "batch_norm": lambda m, x: m.batch_norm(x, *_statistics(x)),
    "group_norm": lambda m, x: m.group_norm(x, 4),
    "layer_norm": lambda m, x: m.layer_norm(x, (1024,)),
    "instance_norm": lambda m, x: m.instance_norm(x),
}


def _weight(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 72, device=x.device).view(8, 1, 3, 3).to(x.dtype)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.linspace(-1, 1, 8, device=x.device)
    return (mean, mean + 2) if x.dtype == torch.bfloat16 else (mean.to(x), mean.to(x) + 2)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40 * GIB,
    reason="needs an NVIDIA GPU with 40 GiB",
)
@pytest.mark.parametrize("name", FAMILIES)
def test_more_than_two_to_the_31_elements(name: str) -> None:
    function = FAMILIES[name]
    x = torch.zeros((IMAGES, *SIZE), dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[-1] = torch.randn(SIZE, device="cuda")
    x.requires_grad_()
    y = function(C, x)
    grad = torch.zeros_like(y)
    grad[-1] = torch.randn(y.shape[1:], device="cuda")
    (grad_x,) = torch.autograd.grad(y, x, grad)
    last = x.detach()[-1:].cpu().double().requires_grad_()
    expected = function(F, last)
    (expected_grad,) = torch.autograd.grad(expected, last, grad[-1:].cpu().double())
    tolerance = TOLERANCE[torch.bfloat16]
    assert_close(y[-1:], expected, tolerance.output, name)
    assert_close(grad_x[-1:], expected_grad, tolerance.gradient, f"{name}, gradient")
