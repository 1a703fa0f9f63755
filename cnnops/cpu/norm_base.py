"""What all norms on the CPU share: when statistics in one pass are near enough, and tensors as kernels take
them."""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import math

import torch

from cnnops.cpu import vectors
from cnnops.cpu.compiler import routine
from cnnops.cpu.task import ahead, given

FAR = 64
"""Deviations from zero beyond which a mean as it was kept is off by a good part of the deviation."""


@routine
def clear(values, count):
    """Zeros, for sums, and in what fills vectors up: denormal numbers would take a hundred times as long."""
    for i in range(count):
        values[i] = 0


@routine
def beyond(base, count):
    """As `ahead`, of a pointer that may be null and stays so."""
    return ahead(base, count if given(base) else 0)


@routine
def rest_of(mean, high):
    """What of a mean `high` does not hold."""
    return mean - high if math.isfinite(mean) else 0.0


@routine
def is_settled(off, var):
    """Whether sums about a number that is `off` the mean tell the variance: most digits of neither are lost,
    and squares stayed within float32's range."""
    return 1e-30 < var < 1e30 and off * off <= 16 * var


@routine
def guess(V, kind, x, C, total, n, about):
    """For n channels from x on a number near the mean: the mean of four rows of `total`."""
    clear(about, (n + V - 1) // V * V)
    for r in range(4):
        vectors.sum_up(V, kind, about, ahead(x, r * total // 4 * C), n)
    for i in range(n):
        about[i] /= 4


# ---- tensors ----------------------------------------------------------------------------------------------


def computed(kind: str) -> str:
    """The type that elements are computed in."""
    return "float64" if kind == "float64" else "float32"


def kind_of(x: torch.Tensor) -> tuple[str, torch.dtype]:
    """The name of the type of x, and the type in which it is computed with."""
    kind = vectors.kind(x.dtype)
    assert kind is not None  # x is readable
    return kind, torch.float64 if x.dtype == torch.float64 else torch.float32


def is_laid(t: torch.Tensor, together: bool) -> bool:
    """Whether `t` is row-major, or channels-last if `together`."""
    if together and t.dim() == 4:
        return t.is_contiguous(memory_format=torch.channels_last)
    return (t.movedim(1, -1) if together else t).is_contiguous()


def laid(t: torch.Tensor, together: bool) -> torch.Tensor:
    """`t` in a type that kernels read and in the order asked for, copied if need be."""
    t = vectors.readable(t)
    if is_laid(t, together):
        return t
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if together else t.contiguous()


def result_like(t: torch.Tensor | None, dtype: torch.dtype, together: bool) -> torch.Tensor | None:
    """Where kernels write what becomes `t`: `t` itself if its type and order allow it."""
    if t is None or (t.dtype == dtype and is_laid(t, together)):
        return t
    view = t.movedim(1, -1) if together else t
    apart = torch.empty(view.shape, dtype=dtype)
    return apart.movedim(-1, 1) if together else apart


def vector_of(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`t`, which is as long as there are channels, as kernels read it."""
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()


def deliver(*pairs: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
    """Copy each (computed, asked for) that is not one tensor."""
    for found, t in pairs:
        if t is not None and found is not None and found is not t:
            t.copy_(found)
