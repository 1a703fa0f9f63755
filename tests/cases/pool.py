"""Pooling: the rows, and what torch makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops.functional as C
from cases.base import ALL, Case, Ints, Size, laid_out, moved, normal
from cnnops.ops import pool as pool_ops


@dataclass(frozen=True, kw_only=True)
class PoolCase(Case):
    """`kind` is max, average or adaptive (`kernel` is then the output size); `values` is the input's kind."""

    kind: str = "max"
    kernel: Any = 2
    stride: Ints | None = None
    padding: Ints = 0
    dilation: Ints = 1
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    values: str = "normal"

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        return [moved(laid_out(self.x, self.layout, self._values(dtype)), device)]

    def _values(self, dtype: torch.dtype) -> Callable[[Size], Tensor]:
        def values(size: Size) -> Tensor:
            x = normal(1, dtype)(size)
            if self.values == "ties":
                return x.round().clamp(-1, 1)
            chance = torch.rand(size, generator=torch.Generator().manual_seed(2))
            if self.values == "nan":
                return x.masked_fill(chance < 0.2, math.nan)
            if self.values == "-inf":
                return x.masked_fill(chance < 0.8, -math.inf)
            return x

        return values

    def ours(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return self._any_dims(x)
        if self.kind == "max":
            y: Tensor = C.max_pool2d(
                x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode
            )
            return y
        if self.kind == "adaptive":
            return C.adaptive_avg_pool2d(x, self.kernel)
        return C.avg_pool2d(x, self.kernel, self.stride, self.padding, *self._average)

    def _any_dims(self, x: Tensor) -> Tensor:
        if self.kind == "max":
            return pool_ops.max_pool(
                x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode
            )[0]
        if self.kind == "adaptive":
            return pool_ops.adaptive_avg_pool(x, self.kernel)
        return pool_ops.avg_pool(x, self.kernel, self.stride, self.padding, *self._average)

    @property
    def _average(self) -> tuple[bool, bool, int | None]:
        return self.ceil_mode, self.count_include_pad, self.divisor_override

    def theirs(self, x: Tensor) -> Tensor:
        dims = x.dim() - 2
        if self.kind == "max":
            pool = getattr(F, f"max_pool{dims}d")
            return pool(
                x, self.kernel, self.stride, self.padding, self.dilation, ceil_mode=self.ceil_mode
            )
        if self.kind == "adaptive":
            return getattr(F, f"adaptive_avg_pool{dims}d")(x, self.kernel)
        average = self._average[: 2 if dims == 1 else 3]
        return getattr(F, f"avg_pool{dims}d")(x, self.kernel, self.stride, self.padding, *average)


POOL_CASES = (
    PoolCase("max_2x2", (2, 3, 8, 6), "the usual one: windows tile the plane",
        dtypes=ALL, schedules=True),
    PoolCase("max_overlapping", (2, 3, 9, 8), "AlexNet's 3x3 with stride 2: one place in up to four windows",
        kernel=3, stride=2, dtypes=ALL, schedules=True),
    PoolCase("max_every_place", (1, 3, 7, 6), "stride 1: nine windows on every place",
        kernel=3, stride=1, padding=1),
    PoolCase("max_padded", (2, 3, 7, 9), "ResNet's stem", kernel=3, stride=2, padding=1),
    PoolCase("max_ties", (2, 3, 8, 8), "equal maxima: the first one gets the gradient",
        kernel=3, stride=2, padding=1, values="ties", dtypes=ALL),
    PoolCase("max_nan", (2, 3, 9, 8), "NaN wins its window, the last of several",
        kernel=3, stride=2, padding=1, values="nan", dtypes=ALL),
    PoolCase("max_nan_channels_last", (2, 5, 8, 8), "the same, channels innermost",
        kernel=2, values="nan", layout="channels_last"),
    PoolCase("max_minus_inf", (2, 3, 8, 8), "windows of nothing but -inf",
        values="-inf", dtypes=ALL),
    PoolCase("max_minus_inf_padded", (1, 3, 7, 7), "-inf beside the padding's own -inf",
        kernel=3, stride=2, padding=1, values="-inf"),
    PoolCase("max_dilated", (2, 3, 11, 9), "dilated windows, axes differ",
        kernel=(3, 2), stride=(2, 1), padding=1, dilation=(2, 3)),
    PoolCase("max_ceil", (2, 3, 8, 7), "ceil_mode: last windows reach past the input",
        kernel=3, stride=2, ceil_mode=True),
    PoolCase("max_ceil_dropped", (1, 2, 5, 6), "ceil_mode: no window starts in the padding behind",
        kernel=2, stride=3, padding=1, ceil_mode=True),
    PoolCase("max_stride_beyond_kernel", (1, 3, 9, 10), "places in no window", kernel=2, stride=4),
    PoolCase("max_one_by_one", (2, 3, 5, 4), "1x1 windows: strided copying", kernel=1, stride=2),
    PoolCase("max_255_places", (1, 2, 16, 19), "the most places that one byte counts",
        kernel=(15, 17), stride=1),
    PoolCase("max_256_places", (1, 2, 18, 17), "one place more: offsets of four bytes",
        kernel=16, stride=1, dtypes=ALL),
    PoolCase("max_whole_plane", (2, 3, 17, 19), "global maximum: int32 offsets", kernel=(17, 19)),
    PoolCase("max_channels_last", (2, 8, 8, 6), "channels innermost",
        kernel=3, stride=2, padding=1, layout="channels_last", dtypes=ALL, schedules=True),
    PoolCase("max_channels_last_33", (1, 33, 6, 5), "an odd number of channels innermost",
        layout="channels_last"),
    PoolCase("max_mixed_gradient", (2, 8, 8, 6), "channels-last, its gradient contiguous",
        layout="channels_last", grad="contiguous"),
    PoolCase("max_sliced", (2, 3, 8, 6), "every second channel of a wider image", layout="sliced"),
    PoolCase("max_transposed", (2, 3, 8, 6), "columns and rows swapped in memory",
        layout="transposed"),
    PoolCase("max_expanded", (3, 2, 6, 6), "one image as a whole batch", layout="expanded"),
    PoolCase("max_expanded_gradient", (2, 3, 8, 8), "the gradient of a sum",
        kernel=3, stride=2, grad="expanded"),
    PoolCase("max_offset", (2, 4, 8, 8), "starts off alignment", layout="offset", dtypes=ALL),
    PoolCase("max_offset_channels_last", (2, 8, 8, 8), "channels-last off alignment",
        layout="channels_last_offset"),
    PoolCase("max_empty_batch", (0, 3, 6, 6), "no image"),
    PoolCase("max_1d", (2, 3, 11), "one spatial axis", kernel=3, stride=2, padding=1),
    PoolCase("max_3d", (1, 2, 5, 6, 4), "three spatial axes",
        kernel=(2, 3, 2), stride=(1, 2, 2), padding=(1, 1, 0)),
    PoolCase("avg_2x2", (2, 3, 8, 6), "the usual one", kind="average", dtypes=ALL, schedules=True),
    PoolCase("avg_overlapping", (2, 3, 9, 8), "padded windows, padding counted",
        kind="average", kernel=3, stride=2, padding=1, dtypes=ALL),
    PoolCase("avg_exclude_pad", (2, 3, 9, 8), "padding not counted: smaller divisors at the border",
        kind="average", kernel=3, stride=2, padding=1, count_include_pad=False, dtypes=ALL),
    PoolCase("avg_divisor", (2, 3, 7, 8), "divisor of one's own",
        kind="average", kernel=(2, 3), stride=1, padding=1, divisor_override=5),
    PoolCase("avg_negative_divisor", (1, 2, 6, 6), "torch takes any divisor but 0",
        kind="average", divisor_override=-3),
    PoolCase("avg_ceil", (2, 3, 8, 7), "ceil_mode: places past the padding never count",
        kind="average", kernel=3, stride=2, padding=1, ceil_mode=True),
    PoolCase("avg_ceil_exclude_pad", (1, 3, 8, 7), "ceil_mode, padding not counted",
        kind="average", kernel=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    PoolCase("avg_ceil_divisor", (1, 2, 5, 8), "ceil_mode and a divisor",
        kind="average", kernel=4, stride=3, padding=2, ceil_mode=True, divisor_override=2),
    PoolCase("avg_stride_beyond_kernel", (1, 3, 9, 10), "places in no window",
        kind="average", kernel=2, stride=4),
    PoolCase("avg_whole_plane", (2, 33, 7, 7), "as large as the plane: ResNet's end",
        kind="average", kernel=7, schedules=True),
    PoolCase("avg_channels_last", (2, 8, 8, 6), "channels innermost",
        kind="average", kernel=3, stride=2, padding=1, layout="channels_last", dtypes=ALL),
    PoolCase("avg_sliced", (2, 3, 8, 6), "every second channel of a wider image",
        kind="average", layout="sliced"),
    PoolCase("avg_expanded", (3, 2, 6, 6), "one image as a whole batch",
        kind="average", layout="expanded", grad="expanded"),
    PoolCase("avg_offset", (2, 4, 8, 8), "starts off alignment", kind="average", layout="offset"),
    PoolCase("avg_empty_batch", (0, 3, 6, 6), "no image", kind="average"),
    PoolCase("avg_1d", (2, 3, 11), "one spatial axis",
        kind="average", kernel=3, stride=2, padding=1, count_include_pad=False),
    PoolCase("avg_3d", (1, 2, 5, 6, 4), "three spatial axes",
        kind="average", kernel=(2, 3, 2), stride=(1, 2, 2), padding=(1, 1, 0)),
    PoolCase("global", (2, 7, 6, 5), "global average: output 1",
        kind="adaptive", kernel=1, dtypes=ALL, schedules=True),
    PoolCase("global_channels_last", (2, 33, 6, 5), "global average, channels innermost",
        kind="adaptive", kernel=1, layout="channels_last"),
    PoolCase("adaptive_even", (2, 3, 8, 6), "windows of one size", kind="adaptive", kernel=(4, 3)),
    PoolCase("adaptive_uneven", (2, 3, 7, 11), "windows of several sizes that overlap",
        kind="adaptive", kernel=(3, 4), dtypes=ALL),
    PoolCase("adaptive_larger", (1, 3, 4, 5), "an output larger than the input",
        kind="adaptive", kernel=(7, 6)),
    PoolCase("adaptive_keep", (2, 3, 7, 5), "None keeps an axis",
        kind="adaptive", kernel=(None, 2)),
    PoolCase("adaptive_offset", (2, 4, 8, 8), "starts off alignment, gradient of a sum",
        kind="adaptive", kernel=3, layout="offset", grad="expanded"),
    PoolCase("adaptive_empty_batch", (0, 3, 6, 6), "no image", kind="adaptive", kernel=2),
)  # fmt: skip
