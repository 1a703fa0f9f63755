"""Launches `kernels/conv_fold.cu`: the gradient of an input that was padded by another mode than zeros.

A plan picks along which axis threads follow memory, and the width of their accesses, by arithmetic on sizes,
strides and alignments alone.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from cnnops.cuda.kernel import (
    ACCUMULATOR,
    ELEMENT,
    INT32_MAX,
    FastDiv,
    Launch,
    alignment,
    launch_of,
)
from cnnops.cuda.launch import launch
from cnnops.shapes import Axes, ConvShape, Shape

THREADS = 256
PACK_BYTES = 16
EACH = 4
"""Packs of less than PACK_BYTES that a thread takes, at most."""
MAX_PACKS = INT32_MAX - 2**16
"""Pack numbers are 32-bit, with room for a block's last threads."""


def supports(op: str, shape: Shape, dtype: torch.dtype) -> str | None:
    """None, or why `op` cannot run on this problem."""
    if not isinstance(shape, ConvShape):
        return f"expected a ConvShape, got {type(shape).__name__}"
    if dtype not in ELEMENT:
        return f"dtype {dtype}: expected one of {', '.join(str(d) for d in ELEMENT)}"
    if shape.padding_mode == "zeros":
        return "padding_mode zeros: expected reflect, replicate or circular"
    image = shape.C * math.prod(shape.spatial)
    if image > MAX_PACKS:
        return f"{image} values an image: expected at most {MAX_PACKS}"
    longest = max(shape.padded.spatial)
    return f"padded size {longest}: expected less than 2^30" if longest >= 2**30 else None


class _Strides(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("axis", ctypes.c_int64 * 3),
    ]


class _Params(ctypes.Structure):
    """``struct Params`` of conv_fold.cu."""

    _fields_ = [
        ("padded", _Strides),
        ("grad_x", _Strides),
        ("channels", FastDiv),
        ("count", FastDiv * 3),
        ("size", ctypes.c_int32 * 3),
        ("before", ctypes.c_int32 * 3),
        ("after", ctypes.c_int32 * 3),
        ("images", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("packs", ctypes.c_int32),
    ]


def _strides(strides: Axes) -> _Strides:
    return _Strides(strides[0], strides[1], (ctypes.c_int64 * 3)(*strides[2:]))


def _span(size: Axes, strides: Axes) -> int:
    """Elements from the first to the last."""
    return sum((n - 1) * s for n, s in zip(size, strides, strict=True))


def _step(size: Axes, strides: Axes, index: int) -> float:
    """How far apart in memory neighbours along an axis are."""
    return strides[index] if size[index] > 1 else math.inf


def _vector(
    most: int, along: int, before: int, size: Axes, tensors: Sequence[tuple[Axes, Axes]]
) -> int:
    """The most neighbours of axis `along`, a power of two, that one access moves in all `tensors` (size and
    strides), wherever the other axes take it; `size` is that of the result, `before` what is left out ahead.
    """
    width = most
    while width > 1 and (
        size[along] % width
        or before % width
        or any(
            (s != 1) if axis == along else s % width
            for extents, strides in tensors
            for axis, (n, s) in enumerate(zip(extents, strides, strict=True))
            if n > 1
        )
    ):
        width //= 2
    return width


@lru_cache(4096)
def _plan(shape: ConvShape, dtype: torch.dtype, padded: Axes, grad_x: Axes, aligned: int) -> Launch:
    """The launch for tensors of these strides whose addresses are multiples of `aligned` bytes."""
    size, dims = shape.x_size, shape.dims
    tensors = ((shape.padded.x_size, padded), (size, grad_x))
    befores = [before for before, _ in shape.padding]
    last = _step(size, grad_x, 1) < _step(size, grad_x, -1)
    along, before = (1, 0) if last else (dims + 1, befores[-1])
    vector = _vector(aligned // dtype.itemsize, along, before, size, tensors)
    each = min(EACH, PACK_BYTES // (vector * dtype.itemsize))

    image = math.prod(size[1:]) // vector
    images = min(shape.N, MAX_PACKS // image)
    p = _Params()
    p.padded, p.grad_x = _strides(padded), _strides(grad_x)
    p.channels = FastDiv(shape.C // (vector if last else 1))
    for a, ((before, after), h) in enumerate(zip(shape.padding, shape.spatial, strict=True)):
        fast = not last and a == dims - 1
        p.count[a] = FastDiv(h // (vector if fast else 1))
        p.size[a], p.before[a], p.after[a] = h, before, after
    p.images, p.batch, p.packs = images, shape.N, images * image
    constants: dict[str, str | int] = {
        "PADDING": shape.padding_mode.upper(), "DIMS": dims,
        "WIDE": int(any(_span(*tensor) > INT32_MAX for tensor in tensors)),
        "ELEMENT": ELEMENT[dtype], "ACCUMULATOR": ACCUMULATOR[dtype],
        "CHANNELS_FAST": int(last), "VECTOR": vector, "EACH": each,
    }  # fmt: skip
    return launch_of(
        "conv_fold.cu", "conv_fold", constants, p,
        grid=(-(-p.packs // (THREADS * each)), -(-shape.N // images)), block=(THREADS,),
        inputs=("padded",), outputs=("grad_x",),
    )  # fmt: skip


def conv_fold(shape: ConvShape, padded: Tensor, grad_x: Tensor) -> None:
    """Fill grad_x ``N C *spatial`` from `padded`, the gradient of the padded input: the sum over the places
    that ``shape.padding_mode`` has read each element for.
    """
    aligned = min(alignment(padded), alignment(grad_x))
    plan = _plan(shape, padded.dtype, padded.stride(), grad_x.stride(), aligned)
    launch(plan, (padded,), (grad_x,))
