"""Pooling: the rows, and what torch makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops.functional as C
from cases.base import ALL, Case, Ints, Size, laid_out, moved, normal
from cnnops.shapes import axes

FUNCTIONS = {
    "max": "max_pool",
    "average": "avg_pool",
    "adaptive": "adaptive_avg_pool",
    "adaptive_max": "adaptive_max_pool",
    "unpool": "max_unpool",
    "lp": "lp_pool",
}


@dataclass(frozen=True, kw_only=True)
class PoolCase(Case):
    """`kind` is one of `FUNCTIONS`; adaptive ones have the output size for `kernel`. `values`: of the input.

    Unpooling has different places for all values of a plane, or, if they are `shared`, half as many.
    """

    kind: str = "max"
    kernel: Any = 2
    stride: Ints | None = None
    padding: Ints = 0
    dilation: Ints = 1
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    output_size: Size | None = None
    shared: bool = False
    norm_type: float = 2
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
        return self._by(C, x)

    def theirs(self, x: Tensor) -> Tensor:
        if not self.shared:
            return self._by(F, x)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # several would race for a place that values share
        try:
            return self._by(F, x)
        finally:
            torch.set_num_threads(threads)

    def _by(self, module: ModuleType, x: Tensor) -> Any:
        pool = getattr(module, f"{FUNCTIONS[self.kind]}{x.dim() - 2}d")
        window = (self.kernel, self.stride, self.padding)
        if self.kind == "max":
            return pool(x, *window, self.dilation, ceil_mode=self.ceil_mode)
        if self.kind == "average":
            average = (self.ceil_mode, self.count_include_pad, self.divisor_override)
            return pool(x, *window, *average[: 2 if x.dim() == 3 else 3])
        if self.kind == "unpool":
            return pool(x, self.places(x), *window, self.output_size)
        if self.kind == "lp":
            return pool(x, self.norm_type, self.kernel, self.stride, self.ceil_mode)
        return pool(x, self.kernel)

    def with_indices(self, module: ModuleType, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maxima and indices of max pooling."""
        pool = getattr(module, f"{FUNCTIONS[self.kind]}{x.dim() - 2}d")
        if self.kind == "adaptive_max":
            return pool(x, self.kernel, return_indices=True)
        window = (self.kernel, self.stride, self.padding, self.dilation)
        return pool(x, *window, ceil_mode=self.ceil_mode, return_indices=True)

    def places(self, x: Tensor) -> Tensor:
        """Unpooling's indices: a walk through the plane in steps of a prime, another one in each channel."""
        dims, values = x.dim() - 2, math.prod(x.shape[2:])
        window, pads = axes(self.kernel, dims, "kernel"), axes(self.padding, dims, "padding")
        steps = window if self.stride is None else axes(self.stride, dims, "stride")
        sizes = zip(x.shape[2:], window, steps, pads, strict=True)
        output = self.output_size or [(p - 1) * s + k - 2 * pad for p, k, s, pad in sizes]
        plane = values // 2 if self.shared else math.prod(output[-dims:])
        step = next(prime for prime in (7, 11, 13, 17) if plane % prime)
        channel = torch.arange(x.shape[1], device=x.device).view(-1, 1)
        walk = (torch.arange(values, device=x.device) * step + channel) % plane
        return walk.view(x.shape[1:]).expand(x.shape).contiguous()


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
    PoolCase("max_odd_rows", (2, 3, 9, 11), "rows of x and of y that are no whole packs",
        kernel=3, stride=1, padding=1, dtypes=ALL, schedules=True),
    PoolCase("max_odd_rows_strided", (2, 3, 15, 19), "the same, two places apart",
        kernel=3, stride=2, dtypes=ALL),
    PoolCase("max_odd_rows_1d", (2, 3, 45), "the same along one axis",
        kernel=8, stride=1, padding=4, dtypes=ALL),
    PoolCase("max_odd_rows_3d", (1, 2, 4, 5, 13), "the same in three axes", kernel=3, stride=1, padding=1),
    PoolCase("max_13x13", (1, 2, 20, 18), "large windows one place apart", kernel=13, stride=1, padding=6),
    PoolCase("avg_odd_rows", (2, 3, 9, 11), "rows of x and of y that are no whole packs",
        kind="average", kernel=4, stride=1, padding=2, dtypes=ALL, schedules=True),
    PoolCase("avg_odd_rows_exclude_pad", (2, 3, 9, 11), "the same with divisors that differ",
        kind="average", kernel=4, stride=1, padding=2, count_include_pad=False, dtypes=ALL),
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
    PoolCase("max_1d_dilated", (2, 3, 14), "dilated, rounded up, along one axis",
        kernel=3, stride=2, padding=1, dilation=2, ceil_mode=True, dtypes=ALL),
    PoolCase("max_1d_transposed", (2, 5, 12), "one axis, channels innermost in memory",
        kernel=3, stride=2, layout="transposed", values="nan"),
    PoolCase("max_1d_256_places", (1, 2, 262), "offsets of four bytes along one axis",
        kernel=256, stride=3),
    PoolCase("max_3d_channels_last", (2, 5, 5, 6, 7), "channels innermost of three axes",
        kernel=3, stride=2, padding=1, layout="channels_last", dtypes=ALL, schedules=True),
    PoolCase("max_3d_nan", (1, 3, 6, 5, 7), "NaN, dilated and rounded up, three axes that differ",
        kernel=(2, 3, 2), stride=(2, 1, 3), padding=(1, 1, 0), dilation=(1, 1, 2), ceil_mode=True,
        values="nan", dtypes=ALL),
    PoolCase("max_3d_294_places", (1, 2, 7, 8, 7), "offsets of four bytes, three axes",
        kernel=(6, 7, 7), stride=1, values="ties"),
    PoolCase("max_3d_empty_batch", (0, 2, 4, 4, 4), "no image"),
    PoolCase("avg_1d_ceil", (2, 3, 12), "one axis, rounded up",
        kind="average", kernel=5, stride=3, padding=2, ceil_mode=True, dtypes=ALL),
    PoolCase("avg_1d_transposed", (2, 5, 12), "one axis, channels innermost in memory",
        kind="average", kernel=3, stride=1, layout="transposed"),
    PoolCase("avg_3d_half", (2, 3, 5, 6, 7), "padding not counted; torch's CPU has no half types for this",
        kind="average", kernel=3, stride=2, padding=1, count_include_pad=False, dtypes=ALL, schedules=True),
    PoolCase("avg_3d_divisor_ceil", (1, 2, 5, 6, 7), "divisor of one's own, rounded up, three axes",
        kind="average", kernel=(2, 3, 2), stride=(2, 2, 3), padding=(1, 0, 1), ceil_mode=True,
        divisor_override=7),
    PoolCase("avg_3d_channels_last", (2, 5, 4, 6, 5), "channels innermost: torch's result is not",
        kind="average", kernel=2, stride=1, layout="channels_last", dtypes=ALL),
    PoolCase("avg_3d_empty_batch", (0, 2, 4, 4, 4), "no image", kind="average"),
    PoolCase("adaptive_1d", (2, 3, 11), "one axis, uneven windows",
        kind="adaptive", kernel=4, dtypes=ALL),
    PoolCase("adaptive_3d", (2, 3, 5, 7, 6), "three axes, uneven windows, one kept",
        kind="adaptive", kernel=(3, None, 4), dtypes=ALL),
    PoolCase("adaptive_3d_channels_last", (2, 5, 5, 4, 6), "channels innermost of three axes",
        kind="adaptive", kernel=(2, 3, 6), layout="channels_last"),
    PoolCase("adaptive_3d_larger", (1, 2, 3, 4, 2), "more outputs than inputs along every axis",
        kind="adaptive", kernel=(4, 5, 3)),
    PoolCase("global_1d", (2, 7, 19), "global average along one axis", kind="adaptive", kernel=1),
    PoolCase("global_3d", (2, 7, 5, 6, 7), "global average of three axes",
        kind="adaptive", kernel=1, dtypes=ALL),
    PoolCase("adaptive_max_even", (2, 3, 8, 12), "windows of one size: plain pooling",
        kind="adaptive_max", kernel=(4, 6), dtypes=ALL),
    PoolCase("adaptive_max_even_narrow", (2, 3, 8, 9), "windows of one size, few outputs in a row",
        kind="adaptive_max", kernel=(4, 3)),
    PoolCase("adaptive_max_uneven", (2, 3, 7, 11), "windows of several sizes that overlap",
        kind="adaptive_max", kernel=(3, 4), dtypes=ALL, schedules=True),
    PoolCase("adaptive_max_larger", (1, 3, 4, 5), "an output larger than the input",
        kind="adaptive_max", kernel=(7, 6)),
    PoolCase("adaptive_max_keep", (2, 3, 7, 5), "None keeps an axis",
        kind="adaptive_max", kernel=(None, 2)),
    PoolCase("adaptive_max_global", (2, 7, 6, 5), "the whole plane's maximum",
        kind="adaptive_max", kernel=1, dtypes=ALL, schedules=True),
    PoolCase("adaptive_max_global_large", (2, 3, 17, 19), "the whole plane, offsets of four bytes",
        kind="adaptive_max", kernel=1, dtypes=ALL),
    PoolCase("adaptive_max_289_places", (1, 2, 33, 50), "uneven windows, the largest of 289 places",
        kind="adaptive_max", kernel=(2, 3), values="ties"),
    PoolCase("adaptive_max_ties", (2, 3, 7, 9), "equal maxima: the first one gets the gradient",
        kind="adaptive_max", kernel=(3, 4), values="ties", dtypes=ALL),
    PoolCase("adaptive_max_nan", (2, 3, 7, 9), "NaN wins its window, the last of several",
        kind="adaptive_max", kernel=(3, 4), values="nan", dtypes=ALL),
    PoolCase("adaptive_max_minus_inf", (2, 3, 7, 9), "windows of nothing but -inf keep their first place",
        kind="adaptive_max", kernel=(4, 5), values="-inf", dtypes=ALL),
    PoolCase("adaptive_max_channels_last", (2, 8, 7, 6), "channels innermost",
        kind="adaptive_max", kernel=(3, 4), layout="channels_last", dtypes=ALL, schedules=True),
    PoolCase("adaptive_max_nan_channels_last", (2, 5, 8, 9), "NaN, channels innermost",
        kind="adaptive_max", kernel=(4, 2), values="nan", layout="channels_last"),
    PoolCase("adaptive_max_mixed_gradient", (2, 8, 7, 6), "channels-last, its gradient contiguous",
        kind="adaptive_max", kernel=3, layout="channels_last", grad="contiguous"),
    PoolCase("adaptive_max_sliced", (2, 3, 7, 6), "every second channel of a wider image",
        kind="adaptive_max", kernel=4, layout="sliced"),
    PoolCase("adaptive_max_transposed", (2, 3, 7, 6), "columns and rows swapped in memory",
        kind="adaptive_max", kernel=4, layout="transposed"),
    PoolCase("adaptive_max_offset", (2, 4, 9, 8), "starts off alignment, gradient of a sum",
        kind="adaptive_max", kernel=3, layout="offset", grad="expanded"),
    PoolCase("adaptive_max_empty_batch", (0, 3, 6, 6), "no image", kind="adaptive_max", kernel=2),
    PoolCase("adaptive_max_1d", (2, 3, 11), "one axis, uneven windows",
        kind="adaptive_max", kernel=4, values="nan", dtypes=ALL),
    PoolCase("adaptive_max_3d", (2, 3, 5, 7, 6), "three axes, uneven windows, one kept",
        kind="adaptive_max", kernel=(3, None, 4), dtypes=ALL, schedules=True),
    PoolCase("adaptive_max_3d_channels_last", (2, 5, 5, 4, 6), "channels innermost: torch's result is not",
        kind="adaptive_max", kernel=(2, 3, 6), layout="channels_last", dtypes=ALL),
    PoolCase("adaptive_max_3d_294_places", (1, 2, 7, 7, 6), "three axes, offsets of four bytes",
        kind="adaptive_max", kernel=1, values="ties"),
    PoolCase("unpool", (2, 3, 4, 5), "the usual one: windows tile the plane",
        kind="unpool", dtypes=ALL, schedules=True),
    PoolCase("unpool_shared", (2, 3, 6, 7), "two values a place: the last stays, both get its gradient",
        kind="unpool", shared=True, dtypes=ALL, schedules=True),
    PoolCase("unpool_overlapping", (2, 3, 4, 5), "padded windows that overlap, a size of one's own",
        kind="unpool", kernel=3, stride=2, padding=1, output_size=(8, 9)),
    PoolCase("unpool_full_size", (2, 3, 4, 5), "a size with batch and channels in front",
        kind="unpool", kernel=(2, 3), output_size=(2, 3, 9, 13)),
    PoolCase("unpool_channels_last", (2, 8, 4, 5), "channels innermost; gradients are contiguous",
        kind="unpool", layout="channels_last", dtypes=ALL, schedules=True),
    PoolCase("unpool_shared_channels_last", (2, 33, 4, 5), "two values a place, channels innermost",
        kind="unpool", shared=True, layout="channels_last"),
    PoolCase("unpool_mixed_gradient", (2, 8, 4, 5), "channels-last, its gradient contiguous",
        kind="unpool", layout="channels_last", grad="contiguous"),
    PoolCase("unpool_sliced", (2, 3, 4, 5), "every second channel of a wider image",
        kind="unpool", shared=True, layout="sliced"),
    PoolCase("unpool_transposed", (2, 3, 4, 5), "columns and rows swapped in memory",
        kind="unpool", layout="transposed"),
    PoolCase("unpool_expanded", (3, 2, 4, 4), "one image as a whole batch, gradient of a sum",
        kind="unpool", layout="expanded", grad="expanded"),
    PoolCase("unpool_offset", (2, 4, 4, 4), "starts off alignment", kind="unpool", layout="offset"),
    PoolCase("unpool_empty_batch", (0, 3, 4, 4), "no image", kind="unpool"),
    PoolCase("unpool_1d", (2, 3, 9), "one axis", kind="unpool", kernel=3, stride=2, dtypes=ALL),
    PoolCase("unpool_1d_shared", (2, 3, 9), "one axis, two values a place",
        kind="unpool", shared=True),
    PoolCase("unpool_3d", (2, 3, 3, 4, 2), "three axes, windows that overlap",
        kind="unpool", kernel=3, stride=(2, 1, 2), output_size=(7, 6, 6), dtypes=ALL, schedules=True),
    PoolCase("unpool_3d_channels_last", (2, 5, 3, 2, 4), "channels innermost: torch's result is not",
        kind="unpool", shared=True, layout="channels_last", dtypes=ALL),
    PoolCase("lp_1", (2, 3, 8, 7), "sums", kind="lp", norm_type=1, dtypes=(torch.float32, torch.float64)),
    PoolCase("lp_2", (2, 3, 9, 8), "Euclidean norms of windows that overlap",
        kind="lp", kernel=3, stride=2, dtypes=(torch.float32, torch.float64)),
    PoolCase("lp_3.5", (2, 3, 8, 8), "a power that negative numbers do not have: NaN where torch has it",
        kind="lp", norm_type=3.5),
    PoolCase("lp_ceil", (2, 3, 8, 7), "last windows reach past the input, which torch evens out",
        kind="lp", kernel=(3, 2), stride=2, ceil_mode=True),
    PoolCase("lp_channels_last", (2, 8, 8, 6), "channels innermost", kind="lp", layout="channels_last"),
    PoolCase("lp_1d", (2, 3, 11), "one axis, odd power: a negative sum has no root",
        kind="lp", norm_type=3, kernel=3, stride=2),
    PoolCase("lp_3d", (1, 2, 5, 6, 4), "three axes", kind="lp", kernel=(2, 3, 2), stride=(1, 2, 2)),
)  # fmt: skip
