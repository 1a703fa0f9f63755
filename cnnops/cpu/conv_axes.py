"""A convolution seen as correlations, axis by axis.

Forward and input gradient are one computation, a correlation ``y[k, o] = sum_{c,t} w[k, c, t] * x[c, o * step
+ tap[t]]``; the input gradient of stride s is s correlations an axis, one for each residue of the place it
writes, each with the taps that reach it: nothing is multiplied by inserted zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from cnnops.cpu.task import Table, Value
from cnnops.shapes import ConvShape

CACHE_BYTES = 512 * 1024
"""What a task's scratch should fit into: a core's second-level cache."""

SPLITS, PARTIAL_BYTES = 32, 32 * 1024 * 1024
"""A weight gradient's sum is split into at most SPLITS parts, of at most PARTIAL_BYTES together."""


class Axis(NamedTuple):
    """One axis of a correlation.

    Of `out` outputs, o reads the `size` inputs at ``o * step + tap`` for each of `taps`, multiplies by the
    filter's places `picks`, and lands at ``start + o * stride``.
    """

    out: int
    step: int
    taps: tuple[int, ...]
    picks: tuple[int, ...]
    size: int
    start: int = 0
    stride: int = 1


class Frame:
    """A padding that is not zeros: for each place of each padded axis, the place of x that it shows.

    `before` places of the last axis lie in front of its `width` places that show x as it is.
    """

    def __init__(self, shape: ConvShape) -> None:
        missing = 3 - shape.dims
        pads = ((0, 0),) * missing + shape.padding
        self.before, self.width = pads[-1][0], shape.DHW[-1]
        self.tables = tuple(
            self._places(shape.padding_mode, size, *pair)
            for size, pair in zip(shape.DHW, pads, strict=True)
        )

    @staticmethod
    def _places(mode: str, size: int, before: int, after: int) -> np.ndarray:
        h = np.arange(-before, size + after, dtype=np.int32)
        last = np.int32(size - 1)
        if mode == "reflect":
            return last - np.abs(last - np.abs(h))
        if mode == "replicate":
            return h.clip(0, last)
        return h % np.int32(size)

    @classmethod
    def of(cls, shape: ConvShape) -> Frame | None:
        return cls(shape) if is_framed(shape) else None

    @property
    def values(self) -> tuple[Value, ...]:
        """What kernels get to know of it."""
        return (*map(Table, self.tables), self.before, self.width)


NO_FRAME = (0,) * 5


def is_framed(shape: ConvShape) -> bool:
    return shape.padding_mode != "zeros" and any(p for pair in shape.padding for p in pair)


def axes_of(shape: ConvShape) -> list[Axis]:
    """The forward pass's three axes, of the padded input where a `Frame` describes the padding."""
    if is_framed(shape):
        shape = shape.padded
    missing = 3 - shape.dims
    steps, dilations = (1,) * missing + shape.stride, (1,) * missing + shape.dilation
    pads = (0,) * missing + tuple(before for before, _ in shape.padding)
    return [
        Axis(
            out=shape.ZPQ[a],
            step=steps[a],
            taps=tuple(r * dilations[a] - pads[a] for r in range(shape.TRS[a])),
            picks=tuple(range(shape.TRS[a])),
            size=shape.DHW[a],
        )
        for a in range(3)
    ]


def transposed(axis: Axis) -> Iterator[Axis]:
    """The input gradient along `axis`: the inputs of one residue modulo the step at a time."""
    for start in range(min(axis.step, axis.size)):
        reached = [
            (r, (start - tap) // axis.step)
            for r, tap in zip(axis.picks, axis.taps, strict=True)
            if (start - tap) % axis.step == 0
        ]
        yield Axis(
            out=-(-(axis.size - start) // axis.step),
            step=1,
            taps=tuple(tap for _, tap in reached),
            picks=tuple(r for r, _ in reached),
            size=axis.out,
            start=start,
            stride=axis.step,
        )


def up(value: int, multiple: int) -> int:
    """`value` rounded up."""
    return -(-value // multiple) * multiple


def bytes_of(T: str) -> int:
    """Bytes of an element of the type called T."""
    return {"float32": 4, "float64": 8}[T]


@lru_cache(64)
def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
    """So many zeros that are only read."""
    return torch.zeros(count, dtype=dtype)
