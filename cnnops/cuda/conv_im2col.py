"""Convolution as a matrix product: `kernels/conv_im2col.cu` lays the columns out, torch.matmul multiplies.

The product runs in the tensors' dtype (half types accumulate in float32 inside it, float32 uses TF32 only
where ``torch.backends.cuda.matmul.allow_tf32`` says so). Batches are cut into runs of images so that the
columns take at most `COLUMN_BYTES`; the weight gradient adds those runs up in float32, in their order.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from cnnops.cuda.kernel import ACCUMULATOR, ELEMENT, INT32_MAX, FastDiv, Launch, launch_of
from cnnops.cuda.launch import launch
from cnnops.shapes import Axes, ConvShape, NormShape, PoolShape

COLUMN_BYTES = 256 << 20
"""Most memory for columns, unless a single image needs more."""
THREADS = 256


def supports(op: str, shape: ConvShape | PoolShape | NormShape, dtype: torch.dtype) -> str | None:
    """None, or why the problem is refused: a type without kernels, or a number that leaves 31 bits."""
    if not isinstance(shape, ConvShape):
        return "not a convolution"
    if dtype not in ELEMENT:
        return f"dtype {dtype}: expected one of {', '.join(str(d) for d in ELEMENT)}"
    elements = max(_column_elements(shape), math.prod(shape.x_size[1:]))
    if elements > INT32_MAX - THREADS:
        return f"{elements} column elements an image: expected fewer than 2^31"
    span = max(
        h + a + b + r * k
        for h, (a, b), r, k in zip(
            shape.spatial, shape.padding, shape.dilation, shape.kernel, strict=True
        )
    )
    return f"padded size {span}: expected less than 2^30" if span >= 2**30 else None


def _column_elements(shape: ConvShape) -> int:
    """Of one image."""
    return shape.C * math.prod(shape.kernel) * math.prod(shape.output)


class _Params(ctypes.Structure):
    """``struct ColumnParams`` of conv_im2col.cu."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("axis", ctypes.c_int64 * 3),
        ("out", FastDiv * 3),
        ("taps", FastDiv * 3),
        ("size", FastDiv * 3),
        ("packs", FastDiv),
        ("channels", FastDiv),
        ("groups", FastDiv),
        ("all_taps", FastDiv),
        ("strides", FastDiv * 3),
        ("stride", ctypes.c_int32 * 3),
        ("dilation", ctypes.c_int32 * 3),
        ("pad", ctypes.c_int32 * 3),
        ("places", ctypes.c_int32),
        ("group_channels", ctypes.c_int32),
        ("items", ctypes.c_int32),
    ]


@lru_cache(4096)
def _plan(
    entry: str,
    shape: ConvShape,
    images: int,
    dtype: torch.dtype,
    strides: Axes,
    aligned: bool,
    channels_inner: bool,
) -> Launch:
    """im2col or col2im for `images` images of x, or grad_x, with these strides; columns are dense."""
    width = 16 // dtype.itemsize
    group_channels, places = shape.C // shape.groups, math.prod(shape.output)
    vector = 1
    if channels_inner:
        outer = (strides[0] if images > 1 else 0, *strides[2:])
        unit = strides[1] == 1 and all(s % width == 0 for s in outer)
        if aligned and unit and group_channels % width == 0:
            vector = width
    elif entry == "im2col" and places % width == 0:
        vector = width

    p = _Params()
    p.batch, p.channel = strides[0], strides[1]
    missing = 3 - shape.dims
    spatial_strides = (0,) * missing + tuple(strides[2:])
    for a in range(3):
        given = a - missing
        p.out[a], p.taps[a] = FastDiv(shape.ZPQ[a]), FastDiv(shape.TRS[a])
        p.size[a], p.axis[a] = FastDiv(shape.DHW[a]), spatial_strides[a]
        p.stride[a] = shape.stride[given] if given >= 0 else 1
        p.strides[a] = FastDiv(p.stride[a])
        p.dilation[a] = shape.dilation[given] if given >= 0 else 1
        p.pad[a] = shape.padding[given][0] if given >= 0 else 0
    p.all_taps, p.groups = FastDiv(math.prod(shape.kernel)), FastDiv(shape.groups)
    p.places, p.group_channels = places, group_channels
    if channels_inner:
        p.packs, p.channels = FastDiv(group_channels // vector), FastDiv(shape.C // vector)
    else:
        p.packs, p.channels = FastDiv(places // vector), FastDiv(shape.C)
    if entry == "col2im":
        p.items = images * math.prod(shape.x_size[1:]) // vector
    elif channels_inner:
        p.items = images * _column_elements(shape) // vector
    else:
        p.items = images * shape.C * places // vector
    constants: dict[str, str | int] = {
        "ELEMENT": ELEMENT[dtype], "ACCUMULATOR": ACCUMULATOR[dtype],
        "CHANNELS_INNER": int(channels_inner), "VECTOR": vector, "THREADS": THREADS,
    }  # fmt: skip
    names = ("x", "columns") if entry == "im2col" else ("columns", "grad_x")
    return launch_of(
        "conv_im2col.cu", entry, constants, p, grid=(-(-p.items // THREADS),), block=(THREADS,),
        inputs=names[:1], outputs=names[1:],
    )  # fmt: skip


# ---- layouts ---------------------------------------------------------------------------------------------


def _in_layout(t: Tensor) -> tuple[Tensor, bool]:
    """`t` as ``N C *spatial`` or channels-last, dense, and whether it is channels-last; copied if neither."""
    if t.is_contiguous():
        return t, False
    if t.movedim(1, -1).is_contiguous():
        return t, True
    return t.contiguous(), False


def _as_matrix(t: Tensor, shape: ConvShape, channels_inner: bool) -> Tensor:
    """Images of y or x as the product's operand: ``N G C/g M``, or ``G N·M C/g`` when channels-last."""
    n, c = t.shape[:2]
    if channels_inner:
        return t.movedim(1, -1).view(-1, shape.groups, c // shape.groups).transpose(0, 1)
    return t.view(n, shape.groups, c // shape.groups, -1)


def _filters(w: Tensor, shape: ConvShape, channels_inner: bool) -> Tensor:
    """The filters as ``G K/g (C/g·T·R·S)``, with channels fastest when channels-last."""
    rows = w.movedim(1, -1) if channels_inner else w
    return rows.reshape(shape.groups, shape.K // shape.groups, -1)


def _runs(shape: ConvShape, dtype: torch.dtype) -> Iterator[slice]:
    """Runs of images whose columns fit `COLUMN_BYTES` and 31 bits."""
    elements = max(_column_elements(shape), math.prod(shape.x_size[1:]))
    most = max(1, min(COLUMN_BYTES // dtype.itemsize, INT32_MAX - THREADS) // elements)
    return (slice(i, min(i + most, shape.N)) for i in range(0, shape.N, most))


def _new_columns(shape: ConvShape, images: int, like: Tensor, channels_inner: bool) -> Tensor:
    """Uninitialised columns as the product's operand: ``N G (C/g·taps) M``, or ``G N·M (taps·C/g)``."""
    rows, places = shape.gemm_mnk("fprop").K, math.prod(shape.output)
    if channels_inner:
        return like.new_empty(images * places, shape.groups, rows).transpose(0, 1)
    return like.new_empty(images, shape.groups, rows, places)


def _pointwise(shape: ConvShape) -> bool:
    """Whether the columns are x itself."""
    ones = (1,) * shape.dims
    return shape.kernel == shape.stride == ones and not any(map(any, shape.padding))


def _columns_of(shape: ConvShape, x: Tensor, channels_inner: bool) -> Tensor:
    if _pointwise(shape) and (x.movedim(1, -1) if channels_inner else x).is_contiguous():
        return _as_matrix(x, shape, channels_inner)
    columns = _new_columns(shape, x.shape[0], x, channels_inner)
    aligned = x.data_ptr() % 16 == 0
    plan = _plan("im2col", shape, x.shape[0], x.dtype, x.stride(), aligned, channels_inner)
    launch(plan, (x,), (columns,))
    return columns


# ---- what the registry calls -----------------------------------------------------------------------------


def conv_fprop(shape: ConvShape, x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill y ``N K *output`` with the convolution of x ``N C *spatial`` and w ``K C/groups *kernel``."""
    _, channels_inner = _in_layout(y)
    filters = _filters(w, shape, channels_inner)
    for run in _runs(shape, x.dtype):
        columns = _columns_of(shape, x[run], channels_inner)
        result = _as_matrix(y[run], shape, channels_inner)
        if not channels_inner:
            torch.matmul(filters, columns, out=result)
        elif shape.groups == 1:
            torch.mm(columns[0], filters[0].t(), out=result[0])
        else:
            result.copy_(torch.bmm(columns, filters.mT))
    if bias is not None:
        y.add_(bias.view(-1, *(1,) * shape.dims))


def conv_dgrad(shape: ConvShape, grad_y: Tensor, w: Tensor, grad_x: Tensor) -> None:
    """Fill grad_x ``N C *spatial``: every filter's weight on every input that it touched."""
    grad_y, channels_inner = _in_layout(grad_y)
    filters = _filters(w, shape, channels_inner)
    for run in _runs(shape, w.dtype):
        rows, result = _as_matrix(grad_y[run], shape, channels_inner), grad_x[run]
        if not channels_inner:
            columns = torch.matmul(filters.mT, rows)
        else:
            columns = _new_columns(shape, result.shape[0], w, channels_inner)
            if shape.groups == 1:
                torch.mm(rows[0], filters[0], out=columns[0])
            else:
                columns.copy_(torch.bmm(rows, filters))
        aligned = grad_x.data_ptr() % 16 == 0
        plan = _plan(
            "col2im", shape, result.shape[0], w.dtype, result.stride(), aligned, channels_inner
        )
        launch(plan, (columns,), (result,))


def conv_wgrad(shape: ConvShape, grad_y: Tensor, x: Tensor, grad_w: Tensor) -> None:
    """Fill grad_w ``K C/groups *kernel``: the sum over all places that a weight was used at."""
    grad_y, channels_inner = _in_layout(grad_y)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total: Tensor | None = None
    for run in _runs(shape, x.dtype):
        columns = _columns_of(shape, x[run], channels_inner)
        rows = _as_matrix(grad_y[run], shape, channels_inner)
        if channels_inner:
            part = torch.bmm(rows.mT, columns).to(wide)
        else:
            part = torch.matmul(rows, columns.mT).sum(0, dtype=wide)
        total = part if total is None else total.add_(part)
    assert total is not None
    if channels_inner:
        sums = total.view(shape.K, *shape.kernel, -1).movedim(-1, 1)
    else:
        sums = total.view(shape.w_size)
    grad_w.copy_(sums)
