"""CPU kernels compute with numbers only, and with none that memory happened to hold.

Whole vectors and whole tiles reach beyond what is wanted. What they meet there never shows in a result; but
left-overs of counters and tables are denormal numbers to a floating-point unit, and a product with one of
these takes a hundred times as long on many CPUs: a weight gradient took thirty times its time by that. So
scratch is filled with denormal numbers here, and the CPU tells whether it was given one.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as reference
from torch import Tensor

import cnnops.functional as F
from cnnops.cpu import conv_rows, simd, task
from cnnops.ops import conv as ops

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="asks the C library of Linux for the flags of an x86 CPU",
)

MXCSR, DENORMAL, FLAGS = 28, 2, 0x3F
"""Where glibc's fenv_t has the register of SSE and AVX; in it the flag, and all flags."""

FORMS = [torch.contiguous_format, torch.channels_last]

CONVOLUTIONS = {
    "one channel": ((3, 1, 28, 28), (6, 1, 5, 5), 1, 2, 1),
    "one channel, 20 filters": ((3, 1, 17, 17), (20, 1, 5, 5), 1, 2, 1),
    "three channels": ((2, 3, 23, 23), (33, 3, 3, 3), 1, 1, 1),
    "stem": ((2, 3, 31, 31), (24, 3, 7, 7), 2, 3, 1),
    "few filters": ((2, 20, 9, 11), (3, 20, 3, 3), 1, 1, 1),
    "one filter": ((5, 24, 14, 14), (1, 24, 3, 3), 3, 1, 1),
    "one tap": ((8, 33, 7, 7), (64, 33, 1, 1), 1, 0, 1),
    "one tap, stride 2": ((3, 19, 9, 9), (21, 19, 1, 1), 2, 0, 1),
    "seven taps": ((2, 16, 7, 7), (20, 16, 7, 7), 1, 3, 1),
    "groups": ((2, 16, 9, 9), (10, 8, 3, 3), 1, 0, 2),
    "depthwise": ((2, 21, 13, 13), (21, 1, 3, 3), 1, 1, 21),
    "depthwise, stride 2": ((2, 24, 14, 14), (24, 1, 5, 5), 2, 2, 24),
    "winograd": ((2, 36, 30, 30), (36, 36, 3, 3), 1, 1, 1),
    "winograd, five taps": ((3, 40, 19, 19), (33, 40, 5, 5), 1, 2, 1),
    "winograd, stride 2": ((8, 68, 29, 29), (68, 68, 3, 3), 2, 1, 1),
    "winograd, dilation 2": ((2, 68, 29, 31), (68, 68, 3, 3), 1, 2, 1, 2),
}
"""Sizes of x and w, stride, padding, groups, and the dilation if it is not 1."""


class Flags:
    """The CPU's floating-point flags, by way of the C library."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libm.so.6")
        self._get, self._set = library.fegetenv, library.fesetenv
        self._memory = ctypes.create_string_buffer(32)

    def _register(self) -> ctypes.c_uint32:
        self._get(self._memory)
        return ctypes.c_uint32.from_buffer(self._memory, MXCSR)

    def clear(self) -> None:
        register = self._register()
        register.value &= ~FLAGS
        self._set(self._memory)

    def denormal(self) -> bool:
        """Whether a denormal number was computed with since they were cleared."""
        return bool(self._register().value & DENORMAL)


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], bool]]:
    """Whether a call meets a denormal number in scratch full of them. Its tasks run in this thread."""
    flags, threads = Flags(), torch.get_num_threads()
    size = 8 << 20
    memory = [task._pages(size) for _ in range(2)]
    monkeypatch.setattr(task._scratch, "pages", memory[0])
    monkeypatch.setattr(task._scratch, "shared", memory[1])

    def check(call: Callable[[], object]) -> bool:
        call()  # what is compiled, and looked up, is so now
        assert task._scratch.pages is memory[0] and task._scratch.shared is memory[1]
        for _, _, owner in memory:
            assert isinstance(owner, np.ndarray)
            owner.view(np.int32)[:] = 1
        flags.clear()
        call()
        return flags.denormal()

    torch.set_num_threads(1)
    yield check
    torch.set_num_threads(threads)


def test_that_one_is_noticed(met: Callable[[Callable[[], object]], bool]) -> None:
    """The least thing that these tests stand on."""
    x, tiny = np.ones(16, np.float32), np.full(16, 1e-42, np.float32)
    assert met(lambda: x * tiny)
    assert not met(lambda: x * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("form", FORMS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(
    name: str,
    form: torch.memory_format,
    dtype: torch.dtype,
    met: Callable[[Callable[[], object]], bool],
) -> None:
    x_size, w_size, stride, padding, groups, *dilations = CONVOLUTIONS[name]
    (dilation,) = dilations or (1,)
    x, w = (torch.randn(size).to(dtype, memory_format=form) for size in (x_size, w_size))
    y = reference.conv2d(x, w, None, stride, padding, dilation, groups)
    grad_y = torch.randn(y.shape).to(dtype, memory_format=form)
    last = form == torch.channels_last
    rest = ((stride,) * 2, (padding,) * 4, (dilation,) * 2, groups, "zeros", "cpu")
    calls: dict[str, Callable[[], Tensor]] = {
        "fprop": lambda: ops.conv_fprop(x, w, None, *rest),
        "dgrad": lambda: ops.conv_dgrad(grad_y, w, None, x.shape, last, *rest),
        "wgrad": lambda: ops.conv_wgrad(grad_y, x, w.shape, last, *rest),
        "bgrad": lambda: ops.conv_bgrad(grad_y, "cpu"),
    }
    assert not [direction for direction, call in calls.items() if met(call)]


def test_halves_of_vectors(
    met: Callable[[Callable[[], object]], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles as on CPUs that do vectors of 512 bits in two steps: sums of splits lie in whole vectors."""
    monkeypatch.setattr(simd, "in_two_steps", lambda: True)
    conv_rows._wgrad.cache_clear()
    try:
        form = torch.channels_last
        x = torch.randn(16, 8, 20, 20).contiguous(memory_format=form)
        grad_y = torch.randn(16, 20, 20, 20).contiguous(memory_format=form)
        rest = ((20, 8, 3, 3), True, (1, 1), (1,) * 4, (1, 1), 1, "zeros", "cpu")
        assert not met(lambda: ops.conv_wgrad(grad_y, x, *rest))
    finally:
        conv_rows._wgrad.cache_clear()


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "max_pool": lambda x, w, b: F.max_pool2d(x, 3, 2, 1),
    "avg_pool": lambda x, w, b: F.avg_pool2d(x, 5, 3, 2),
    "avg_pool_rows": lambda x, w, b: F.avg_pool2d(x, 2),
    "adaptive_avg_pool": lambda x, w, b: F.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool": lambda x, w, b: F.adaptive_max_pool2d(x, 3),
    "global_avg_pool": lambda x, w, b: F.adaptive_avg_pool2d(x, 1),
    "batch_norm": lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
    "batch_norm_act": lambda x, w, b: F.batch_norm_act(
        x, None, None, w, b, True, residual=x.detach() + 1, activation="relu"
    ),
    "group_norm": lambda x, w, b: F.group_norm(x, 1, w, b),
}


@pytest.mark.parametrize("form", FORMS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [3, 20, 33])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_pooling_and_norms(
    name: str,
    channels: int,
    form: torch.memory_format,
    met: Callable[[Callable[[], object]], bool],
) -> None:
    function = FUNCTIONS[name]
    x = torch.randn(5, channels, 14, 9).to(memory_format=form).requires_grad_()
    w, b = (torch.randn(channels, requires_grad=True) for _ in range(2))
    assert not met(lambda: function(x.detach(), w.detach(), b.detach()))
    y = function(x, w, b)
    wanted = (x, w, b) if "norm" in name else (x,)
    grad_y = torch.randn_like(y)
    assert not met(lambda: torch.autograd.grad(y, wanted, grad_y, retain_graph=True))
