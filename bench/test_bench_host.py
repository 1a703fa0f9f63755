"""Host overhead: what the Python path of a call takes when its kernels take nothing.

cnnops: everything from the public function down to the executor, which is stubbed: checks, shapes, the choice
of the kernel, allocation, the launch plan. torch: the whole call on a tensor of 64 elements, by one thread.
Recorded calls build a graph, which is dropped again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops
from bench.conftest import NAMES
from cnnops.cuda import emulate

X, W, C = torch.randn(1, 4, 4, 4), torch.randn(4, 4, 3, 3), torch.randn(4)
MEAN, VAR = torch.zeros(4), torch.ones(4)

CALLS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Any]] = {
    "conv2d": lambda f, x, w, c: f.conv2d(x, w, c, padding=1),
    "max_pool2d": lambda f, x, w, c: f.max_pool2d(x, 2),
    "avg_pool2d": lambda f, x, w, c: f.avg_pool2d(x, 2),
    "batch_norm, training": lambda f, x, w, c: f.batch_norm(x, MEAN, VAR, c, c, True),
    "batch_norm, evaluation": lambda f, x, w, c: f.batch_norm(x, MEAN, VAR, c, c),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.mark.parametrize("rival", NAMES)
@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("name", CALLS)
def test_host(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, name: str, recorded: bool, rival: str
) -> None:
    monkeypatch.setattr(emulate, "execute", lambda *_: None)
    functions = cnnops.functional if rival == "cnnops" else F
    tensors = [t.clone().requires_grad_(recorded) for t in (X, W, C)]
    call = CALLS[name]
    benchmark.group = f"host time: {name}{', recorded' if recorded else ''}"
    with cnnops.engine("emulate"), cnnops.fallback("error"), torch.set_grad_enabled(recorded):
        benchmark(call, functions, *tensors)
