"""A padded input's gradient, added up over all padded places that show the same place of the input."""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from cnnops.cpu.conv_axes import Frame, bytes_of
from cnnops.cpu.task import (
    NAME,
    Table,
    Task,
    Value,
    ahead,
    layout,
    native,
    native_result,
    pointer,
    strides,
    unpack,
)
from cnnops.shapes import ConvShape


@lru_cache(None)
def _fold(T: str) -> Task:
    args = layout(f"{T}**2 int32**5 int64*17")

    def conv_fold(address: int, index: int, scratch: int) -> None:
        """Some rows of up to 16 channels: each is the sum of the padded rows that show it."""
        (
            padded, grad_x, starts_d, sources_d, starts_h, sources_h, places_w, before, width,
            C, D, H, W, rows,
            pn, pc, pd, ph, pw, xn, xc, xd, xh, xw,
        ) = unpack(address, args)  # fmt: skip
        shares = (H + rows - 1) // rows
        h0 = index % shares * rows
        rest = index // shares
        d = rest % D
        rest //= D
        blocks = (C + 15) // 16
        c0 = rest % blocks * 16
        n = rest // blocks
        behind = min(c0 + 16, C)
        line = pointer(scratch, T)
        # Channel by channel, or, where channels share memory's lines, row by row of all of them.
        step = 1 if pw == 1 else 16
        for first in range(c0, behind, step):
            for h in range(h0, min(h0 + rows, H)):
                for c in range(first, min(first + step, behind)):
                    for j in range(W):
                        line[j] = 0
                    for a in range(starts_d[d], starts_d[d + 1]):
                        for b in range(starts_h[h], starts_h[h + 1]):
                            row = ahead(
                                padded, n * pn + c * pc + sources_d[a] * pd + sources_h[b] * ph
                            )
                            inner = ahead(row, before * pw)
                            if pw == 1:
                                for j in range(W):
                                    line[j] += inner[j]
                            else:
                                for j in range(W):
                                    line[j] += inner[j * pw]
                            for j in range(before):
                                line[places_w[j]] += row[j * pw]
                            for j in range(before + W, width):
                                line[places_w[j]] += row[j * pw]
                    to = ahead(grad_x, n * xn + c * xc + d * xd + h * xh)
                    for j in range(W):
                        to[j * xw] = line[j]

    return Task(conv_fold, args)


class _Fold:
    """The plan of adding up a padded input's gradient."""

    def __init__(self, shape: ConvShape, T: str) -> None:
        frame = Frame(shape)
        C, (D, H, W) = shape.C, shape.DHW
        # The other way round: the padded places that show each place of x, one behind another.
        tables = []
        for table, size in zip(frame.tables[:2], (D, H), strict=True):
            sources = np.argsort(table, kind="stable").astype(np.int32)
            starts = np.searchsorted(table[sources], np.arange(size + 1)).astype(np.int32)
            tables += [starts, sources]
        rows = min(H, -(-4096 // (W * min(C, 16))))
        self._task = _fold(T)
        self._count = shape.N * -(-C // 16) * D * -(-H // rows)
        self._work = float(math.prod(shape.padded.x_size))
        self._scratch_bytes = W * bytes_of(T)
        places_w = frame.tables[2]
        self._values: tuple[Value, ...] = (
            *map(Table, (*tables, places_w)), frame.before, places_w.size, C, D, H, W, rows,
        )  # fmt: skip

    def run(self, padded: torch.Tensor, grad_x: torch.Tensor) -> None:
        self._task.run(
            self._count, self._work,
            padded, grad_x, *self._values,
            *strides(padded), *strides(grad_x),
            scratch_bytes=self._scratch_bytes,
        )  # fmt: skip


_folded = lru_cache(512)(_Fold)


def conv_fold(shape: ConvShape, padded: torch.Tensor, grad_x: torch.Tensor) -> None:
    """``grad_x`` = the sum of `padded`, a tensor of the padded input's size, over all places that show the
    one of x, for a `shape.padding_mode` other than zeros."""
    padded = native(padded)
    result = native_result(grad_x, padded.dtype)
    _folded(shape, NAME[padded.dtype]).run(padded, result)
    if result is not grad_x:
        grad_x.copy_(result)
