"""Depthwise convolution: rows for every form that the kernel has for sizes, alignments and windows."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cases.base import ALL, Size
from cases.conv import ConvCase


def _row(
    id: str, x: Size, kernel: Size, why: str, multiplier: int = 1, **options: object
) -> ConvCase:
    filters = (x[1] * multiplier, 1, *kernel)
    return ConvCase(id, x, why, w=filters, groups=x[1], **options)  # type: ignore[arg-type]


def _both(id: str, x: Size, kernel: Size, why: str, **options: object) -> Iterable[ConvCase]:
    """In both layouts: NCHW reads packs of columns, channels-last packs of channels."""
    yield _row(id, x, kernel, why, **options)
    yield _row(f"{id}_last", x, kernel, f"{why}, channels-last", layout="channels_last", **options)


DEPTHWISE_CASES = (
    _row("depthwise_3x3", (2, 8, 9, 16), (3, 3), "rows of whole packs", padding=1, dtypes=ALL,
         schedules=True),
    _row("depthwise_3x3_last", (2, 16, 9, 7), (3, 3), "packs of channels", padding=1, layout="channels_last",
         dtypes=(torch.float32, torch.bfloat16), schedules=True),
    *_both("depthwise_3x3_s2", (2, 8, 9, 16), (3, 3), "every other column of a pack", stride=2, padding=1),
    _row("depthwise_5x5", (1, 12, 7, 14), (5, 5), "rows of packs of two", padding=2),
    *_both("depthwise_5x5_s2", (1, 12, 14, 14), (5, 5), "two rows in, one row out", stride=2, padding=2),
    *_both("depthwise_7x7", (1, 8, 9, 12), (7, 7), "as many weights as registers hold", padding=3),
    _row("depthwise_7x7_double", (1, 64, 7, 7), (7, 7), "sums that fill shared memory", padding=3,
         layout="channels_last", dtypes=(torch.float64,)),
    *_both("depthwise_odd", (2, 5, 7, 7), (3, 3), "no packs in either layout", padding=1),
    *_both("depthwise_multiplier", (2, 4, 6, 8), (3, 3), "three filters a channel", multiplier=3, padding=1),
    *_both("depthwise_dilated", (1, 4, 13, 12), (3, 3), "rows walked a dilation apart", padding=(3, 2),
           dilation=(3, 2)),
    *_both("depthwise_unequal", (1, 4, 8, 8), (4, 2), "even kernel, other padding on every side",
           padding=((2, 0), (1, 3)), stride=(2, 1)),
    _row("depthwise_3x7", (1, 4, 9, 20), (3, 7), "taps differ between axes"),
    *_both("depthwise_stride_beyond_kernel", (1, 4, 8, 9), (2, 1), "rows and columns that nobody reads",
           stride=3),
    *_both("causal_1d", (2, 8, 37), (4,), "padding before alone", padding=((3, 0),)),
    *_both("depthwise_3d", (1, 4, 4, 5, 8), (3, 3, 3), "planes take turns", padding=1, stride=(2, 1, 1)),
    *_both("depthwise_transposed", (2, 8, 5, 6), (4, 4), "dgrad with bias, by phase", stride=2, padding=1,
           transposed=True),
    _row("depthwise_1d_dilated_strided", (2, 4, 33), (2,), "an axis that rows cannot follow", stride=3,
         dilation=2, padding=1, layout="channels_last"),
    _row("depthwise_folded", (2, 3, 301), (5,), "a long axis in rows of a warp", padding=2),
    _row("depthwise_folded_s2", (1, 3, 401), (4,), "the same with a stride", padding=1, stride=2),
    *_both("depthwise_9x9", (2, 6, 12, 14), (9, 9), "more taps than registers hold", padding=4),
    *_both("depthwise_large", (1, 4, 13, 20), (13, 11), "odd sizes, other padding on every side",
           padding=((6, 5), (3, 9))),
    *_both("depthwise_large_1d", (1, 4, 70), (60,), "a long causal filter", padding=((59, 0),)),
)  # fmt: skip
