"""A convolution on tensor cores, for tests: its tensors, its result in float64, a pass under the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import TOLERANCE, assert_close, laid_out, normal
from torch import Tensor

from cnnops.cuda import conv_igemm, emulate
from cnnops.cuda.kernel import Launch
from cnnops.cuda.launch import trace
from cnnops.shapes import ConvShape

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
PASSES = ("conv_fprop", "conv_dgrad", "conv_wgrad")
Size = tuple[int, ...]


@contextmanager
def tf32() -> Iterator[None]:
    """Torch gives leave to multiply float32 as TF32 under the emulator."""
    conv = torch.backends.mkldnn.conv
    former, conv.fp32_precision = conv.fp32_precision, "tf32"
    try:
        yield
    finally:
        conv.fp32_precision = former


def rounded(t: Tensor) -> Tensor:
    """float32 to the nearest TF32, ties away from zero, as float64; other types as they are."""
    if t.dtype != FLOAT:
        return t.double()
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(FLOAT).double()


@dataclass(frozen=True)
class Problem:
    """A convolution's sizes, and how its tensors lie: `last` is channels-last, of the filters `w_last`."""

    x: Size
    w: Size
    dtype: torch.dtype
    last: bool
    stride: int | Size = 1
    padding: Any = 0
    dilation: int | Size = 1
    groups: int = 1
    w_last: bool | None = None
    mode: str = "zeros"

    @property
    def shape(self) -> ConvShape:
        return ConvShape.of(
            self.x, self.w, None, self.stride, self.padding, self.dilation, self.groups, self.mode
        )

    def made(self, size: Size, seed: int, last: bool) -> Tensor:
        # Rounded to bfloat16 a float's TF32 would be itself.
        values = normal(seed, self.dtype)
        return laid_out(size, "channels_last" if last else "contiguous", values)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, w and grad_y."""
        shape, w_last = self.shape, self.last if self.w_last is None else self.w_last
        return (
            self.made(shape.x_size, 1, self.last),
            self.made(shape.w_size, 2, w_last),
            self.made(shape.y_size, 3, self.last),
        )

    def expected(self, op: str) -> Tensor:
        shape = self.shape
        x, w, grad_y = (rounded(t) for t in self.tensors())
        leaves = x.requires_grad_(), w.requires_grad_()
        pads = [p for pair in reversed(shape.padding) for p in pair]
        padded = F.pad(x, pads, "constant" if self.mode == "zeros" else self.mode)
        conv = (F.conv1d, F.conv2d, F.conv3d)[shape.dims - 1]
        y = conv(padded, w, None, shape.stride, 0, shape.dilation, shape.groups)
        if op == "conv_fprop":
            return y.detach()
        return torch.autograd.grad(y, leaves, grad_y)[op == "conv_wgrad"]

    def run(self, op: str) -> list[Launch]:
        """Compute and compare a pass under three thread orders; its launches."""
        x, w, grad_y = self.tensors()
        like = {"conv_fprop": grad_y, "conv_dgrad": x, "conv_wgrad": w}[op]
        arguments = {
            "conv_fprop": (x, w, None), "conv_dgrad": (grad_y, w, None), "conv_wgrad": (grad_y, x)
        }[op]  # fmt: skip
        result = torch.full_like(like, float("nan"))
        assert conv_igemm.supports(op, self.shape, self.dtype) is None
        with emulate.schedule("all"), trace() as launches:
            getattr(conv_igemm, op)(self.shape, *arguments, result)
        limit = TOLERANCE[self.dtype]
        limit = limit.output if op == "conv_fprop" else limit.gradient
        assert_close(result, self.expected(op), limit, f"{op} of {self}")
        return launches
