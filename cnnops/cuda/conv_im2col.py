"""Convolution through stored columns and `torch.matmul`: `kernels/conv_im2col.cu` explains the columns.

Images go a few at a time, so that their columns take at most `CHUNK_BYTES` and stay in a GPU's L2 cache
between the kernel that writes and the product that reads them; an image whose own columns are larger goes
alone, up to `COLUMN_BYTES`, which no column buffer ever exceeds.

The product runs in the tensors' type, accumulating in float32 for the half types; float32 products use TF32
only where ``torch.backends.cuda.matmul`` allows it. grad_w adds up the products of images (NCHW) or chunks
(channels-last) in float32, in order; each of them was rounded once to the half type.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cnnops.cuda.batch_norm import batch_norm_stats
from cnnops.cuda.kernel import ACCUMULATOR, ELEMENT, FastDiv, Launch, launch_of
from cnnops.cuda.launch import launch
from cnnops.epilogue import NO_EPILOGUE, Epilogue
from cnnops.shapes import Axes, ConvShape, NormShape, PoolShape

COLUMN_BYTES = 256 * 2**20
CHUNK_BYTES = 32 * 2**20
THREADS = 256
_FINISH = ("scale", "bias", "residual")


def _image_columns(shape: ConvShape) -> int:
    """Elements of one image's columns: C · T·R·S · Z·P·Q."""
    return shape.C * math.prod(shape.kernel) * math.prod(shape.output)


def supports(op: str, shape: ConvShape | PoolShape | NormShape, dtype: torch.dtype) -> str | None:
    """None, or why the problem is refused: its type, an image too large for the column buffer, or the input
    gradient of a padding mode, which takes two steps.
    """
    if not isinstance(shape, ConvShape):
        return "not a convolution"
    if dtype not in ELEMENT:
        return f"dtype {dtype}: expected one of {', '.join(str(d) for d in ELEMENT)}"
    if op == "conv_dgrad" and shape.padding_mode != "zeros":
        return f"padding_mode {shape.padding_mode}: expected shape.padded, then conv_fold"
    needed = _image_columns(shape) * dtype.itemsize
    if needed > COLUMN_BYTES:
        return f"columns of one image: expected at most {COLUMN_BYTES >> 20} MiB, got {-(-needed >> 20)} MiB"
    if shape.C * math.prod(shape.spatial) >= 2**31:
        return f"one image: expected fewer than 2^31 elements, got {shape.C * math.prod(shape.spatial)}"
    span = max(
        h + abs(a) + abs(b) + r * k
        for h, (a, b), r, k in zip(
            shape.spatial, shape.padding, shape.dilation, shape.kernel, strict=True
        )
    )
    return f"padded size {span}: expected less than 2^31" if span >= 2**31 else None


# ---- the kernels -----------------------------------------------------------------------------------------


class _Params(ctypes.Structure):
    """``struct Params`` of conv_im2col.cu."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("axis", ctypes.c_int64 * 3),
        ("fast", FastDiv),
        ("slow", FastDiv),
        ("extent", FastDiv * 3),
        ("group", FastDiv),
        ("stride", FastDiv * 3),
        ("size", ctypes.c_int32 * 3),
        ("out", ctypes.c_int32 * 3),
        ("taps", ctypes.c_int32 * 3),
        ("pad", ctypes.c_int32 * 3),
        ("dilation", ctypes.c_int32 * 3),
        ("threads", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("places", ctypes.c_int32),
        ("tap_count", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class _Key:
    """All that decides a launch, for `images` images of `shape`; strides and alignment are x's (y's)."""

    entry: str
    shape: ConvShape
    images: int
    dtype: torch.dtype
    last: bool
    strides: Axes
    aligned: bool
    activation: str = "none"


@lru_cache(4096)
def _launch(key: _Key) -> Launch:
    shape, strides, last, gather = key.shape, key.strides, key.last, key.entry == "conv_im2col"
    points = shape.output if gather else shape.spatial
    places, group = math.prod(shape.output), shape.C // shape.groups
    width = 16 // key.dtype.itemsize
    vector = x_vector = 1
    if last and group % width == 0:
        vector = width
        moving = [s for n, s in zip((key.images, 1, *shape.spatial), strides, strict=True) if n > 1]
        if strides[1] == 1 and key.aligned and all(s % width == 0 for s in moving):
            x_vector = width
    elif not last and gather and places % width == 0:
        vector = width

    fast, slow = (shape.C, math.prod(points)) if last else (math.prod(points), shape.C)
    p = _Params()
    p.batch, p.channel = strides[:2]
    p.fast, p.slow, p.group = FastDiv(fast // vector), FastDiv(slow), FastDiv(group)
    for a in range(shape.dims):
        p.axis[a], p.extent[a], p.stride[a] = (
            strides[2 + a],
            FastDiv(points[a]),
            FastDiv(shape.stride[a]),
        )
        p.size[a], p.out[a], p.taps[a] = shape.spatial[a], shape.output[a], shape.kernel[a]
        p.pad[a], p.dilation[a] = shape.padding[a][0], shape.dilation[a]
    p.threads, p.channels = key.images * fast // vector * slow, shape.C
    p.places, p.tap_count = places, math.prod(shape.kernel)
    padded = [
        (h + abs(a) + abs(b) + r * k) * abs(s)
        for h, (a, b), r, k, s in zip(
            shape.spatial, shape.padding, shape.dilation, shape.kernel, strides[2:], strict=True
        )
    ]
    wide = group * abs(strides[1]) + sum(padded) >= 2**31
    continued = gather and shape.padding_mode != "zeros" and any(any(p) for p in shape.padding)
    constants: dict[str, str | int] = {
        "PASS": "IM2COL" if gather else "COL2IM", "DIMS": shape.dims, "WIDE": int(wide),
        "PADDING": shape.padding_mode.upper() if continued else 0,
        "ELEMENT": ELEMENT[key.dtype], "ACCUMULATOR": ACCUMULATOR[key.dtype],
        "CHANNELS_FAST": int(last), "VECTOR": vector, "X_VECTOR": x_vector,
    }  # fmt: skip
    if not gather:
        constants["ACTIVATION"] = key.activation
    inputs, output = (("x",), "col") if gather else (("col", *_FINISH), "grad_x")
    return launch_of(
        "conv_im2col.cu", key.entry, constants, p, grid=(-(-p.threads // THREADS),), block=(THREADS,),
        inputs=inputs, outputs=(output,),
    )  # fmt: skip


@lru_cache(4096)
def _finish_launch(
    size: Axes, dtype: torch.dtype, last: bool, aligned: bool, activation: str
) -> Launch:
    """y as it lies in memory, ``N K places`` or, channels last, ``N places K``."""
    K, places = size[1], math.prod(size[2:])
    fast, slow = (K, places) if last else (places, K)
    vector = 16 // dtype.itemsize
    if not aligned or fast % vector:
        vector = 1
    p = _Params()
    p.fast, p.slow, p.threads = FastDiv(fast // vector), FastDiv(slow), math.prod(size) // vector
    constants: dict[str, str | int] = {
        "PASS": "FINISH", "DIMS": 1, "WIDE": 0, "PADDING": 0, "ELEMENT": ELEMENT[dtype],
        "ACCUMULATOR": ACCUMULATOR[dtype], "CHANNELS_FAST": int(last), "VECTOR": vector, "X_VECTOR": 1,
        "ACTIVATION": activation,
    }  # fmt: skip
    return launch_of(
        "conv_im2col.cu", "conv_finish_im2col", constants, p, grid=(-(-p.threads // THREADS),),
        block=(THREADS,), inputs=_FINISH, outputs=(), updates=("y",),
    )  # fmt: skip


class _Finish(NamedTuple):
    """What follows the sums of some images."""

    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    activation: str

    @classmethod
    def of(cls, bias: Tensor | None, epilogue: Epilogue | None) -> _Finish:
        scale, residual, activation, *_ = epilogue or NO_EPILOGUE
        return cls(scale, None if bias is None else bias.contiguous(), residual, activation)

    @property
    def bias_alone(self) -> bool:
        """Whether the product itself can do it."""
        return self.scale is None and self.residual is None and self.activation == "none"

    def tensors(self, chunk: slice) -> tuple[Tensor | None, ...]:
        return self.scale, self.bias, None if self.residual is None else self.residual[chunk]

    def run(self, y: Tensor, chunk: slice, last: bool) -> None:
        """On y's images of this chunk, which the product has filled."""
        scale, bias, residual = self.tensors(chunk)
        aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (y, residual))
        plan = _finish_launch(tuple(y.shape), y.dtype, last, aligned, self.activation)
        launch(plan, (scale, bias, residual), (), (y,))


def _im2col(shape: ConvShape, last: bool, x: Tensor, col: Tensor) -> None:
    """Run conv_im2col on all images of x."""
    plan = _launch(
        _Key("conv_im2col", shape, x.shape[0], x.dtype, last, x.stride(), x.data_ptr() % 16 == 0)
    )
    launch(plan, (x,), (col,))


def _col2im(
    shape: ConvShape, last: bool, col: Tensor, grad_x: Tensor, finish: _Finish, chunk: slice
) -> None:
    """Run conv_col2im for all images of grad_x, which are this chunk of the batch."""
    scale, bias, residual = finish.tensors(chunk)
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (grad_x, residual))
    plan = _launch(
        _Key(
            "conv_col2im", shape, grad_x.shape[0], grad_x.dtype, last, grad_x.stride(), aligned,
            finish.activation,
        )
    )  # fmt: skip
    launch(plan, (col, scale, bias, residual), (grad_x,))


# ---- views in which the product is a matmul --------------------------------------------------------------


def _last(t: Tensor) -> bool:
    """Whether channels are the fastest axis of `t`."""
    return t.shape[1] > 1 and t.stride(1) == 1 and not t.is_contiguous()


def _matrix(t: Tensor, groups: int, last: bool) -> Tensor:
    """An activation as ``N g C/g L``, or, channels last, ``g N·L C/g``: a view where its strides allow it."""
    if last:
        return t.movedim(1, -1).reshape(-1, groups, t.shape[1] // groups).transpose(0, 1)
    return t.reshape(t.shape[0], groups, t.shape[1] // groups, -1)


def _filters(w: Tensor, groups: int, last: bool) -> Tensor:
    """The filters as ``g K/g J``; J runs over (c, taps), or, channels last, (taps, c)."""
    w = w.movedim(1, -1) if last else w
    return w.reshape(groups, w.shape[0] // groups, -1)


def _is_column(shape: ConvShape, x: Tensor, last: bool) -> bool:
    """Whether x, a 1x1 convolution's input, already lies as its columns would."""
    moves = any(n != 1 for n in (*shape.kernel, *shape.stride)) or any(
        any(p) for p in shape.padding
    )
    return not moves and (x.movedim(1, -1) if last else x).is_contiguous()


def _chunks(shape: ConvShape, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the batch whose columns take at most CHUNK_BYTES, or hold one image."""
    per_image = max(_image_columns(shape), shape.C * math.prod(shape.spatial)) * dtype.itemsize
    step = max(1, CHUNK_BYTES // per_image)
    for first in range(0, shape.N, step):
        yield slice(first, min(first + step, shape.N))


def _room(shape: ConvShape, x: Tensor, last: bool) -> Tensor:
    """Memory for the columns of x's images: ``N g J L``, or, channels last, ``g N·L J``."""
    images, places, g = x.shape[0], math.prod(shape.output), shape.groups
    entries = shape.C // g * math.prod(shape.kernel)
    if last:
        return x.new_empty(images * places, g, entries).transpose(0, 1)
    return x.new_empty(images, g, entries, places)


def _columns(shape: ConvShape, x: Tensor, last: bool) -> Tensor:
    """The columns of x's images; x itself where those are the same."""
    if _is_column(shape, x, last):
        return _matrix(x, shape.groups, last)
    col = _room(shape, x, last)
    _im2col(shape, last, x, col)
    return col


def _product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """``out = a @ b (+ bias)`` of three-dimensional tensors."""
    if bias is None:
        torch.bmm(a, b, out=out)
    else:
        torch.baddbmm(bias.expand(out.shape), a, b, out=out)


def _added(bias: Tensor | None, groups: int, last: bool) -> Tensor | None:
    """A bias as `_matrix` lays out what it is added to."""
    if bias is None:
        return None
    return bias.view(groups, 1, -1) if last else bias.view(1, groups, -1, 1)


def _by_image(groups: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches for `_product` from ``N g …`` tensors (N = 1 repeats): all images at once where a single group
    leaves the batch axis free, else image by image.
    """
    images = max(t.shape[0] for t in tensors)
    if groups == 1:
        yield tuple(t[:, 0].expand(images, -1, -1) for t in tensors)
    else:
        for n in range(images):
            yield tuple(t[n if t.shape[0] > 1 else 0] for t in tensors)


# ---- what the registry calls -----------------------------------------------------------------------------


def conv_fprop(
    shape: ConvShape,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """Fill y ``N K *output`` with the convolution of x ``N C *spatial`` and w ``K C/groups *kernel``.

    Where more than a bias follows the product, it works on sums that were rounded to y's dtype.
    """
    g, last = shape.groups, _last(y)
    filters, finish = _filters(w, g, last), _Finish.of(bias, epilogue)
    added = _added(bias, g, last) if finish.bias_alone else None
    for chunk in _chunks(shape, x.dtype):
        col = _columns(shape, x[chunk], last)
        out = _matrix(y[chunk], g, last)
        if last:
            _product(col, filters.transpose(1, 2), out, added)
        else:
            operands = (filters[None], col, out, *([] if added is None else [added]))
            for parts in _by_image(g, *operands):
                _product(*parts)
        if not finish.bias_alone:
            finish.run(y[chunk], chunk, last)
    if epilogue is not None and epilogue.mean is not None and epilogue.var is not None:
        batch_norm_stats(NormShape.of(shape.y_size), y, epilogue.mean, epilogue.var)


def conv_dgrad(
    shape: ConvShape,
    grad_y: Tensor,
    w: Tensor,
    bias: Tensor | None,
    grad_x: Tensor,
    epilogue: Epilogue | None = None,
) -> None:
    """Fill grad_x ``N C *spatial``: every filter's weight on every input that it touched, and the bias ``C``.

    Under another padding mode than zeros the caller takes ``shape.padded``, and `conv_fold` thereafter.
    """
    g, last = shape.groups, _last(grad_x)
    filters, finish = _filters(w, g, last), _Finish.of(bias, epilogue)
    for chunk in _chunks(shape, grad_x.dtype):
        images = grad_x[chunk]
        direct = _is_column(shape, images, last)
        col = _matrix(images, g, last) if direct else _room(shape, images, last)
        added = _added(bias, g, last) if direct and finish.bias_alone else None
        grad = _matrix(grad_y[chunk], g, last)
        if last:
            _product(grad, filters, col, added)
        else:
            operands = (filters.transpose(1, 2)[None], grad, col)
            for parts in _by_image(g, *operands, *([] if added is None else [added])):
                _product(*parts)
        if not direct:
            _col2im(shape, last, col, images, finish, chunk)
        elif not finish.bias_alone:
            finish.run(images, chunk, last)


def conv_wgrad(shape: ConvShape, grad_y: Tensor, x: Tensor, grad_w: Tensor) -> None:
    """Fill grad_w ``K C/groups *kernel``: the sum over all places that a weight was used at."""
    g, last = shape.groups, _last(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = torch.zeros(_filters(grad_w, g, last).shape, dtype=wide, device=x.device)
    for chunk in _chunks(shape, x.dtype):
        col = _columns(shape, x[chunk], last)
        grad = _matrix(grad_y[chunk], g, last)
        if last:
            total += torch.bmm(grad.transpose(1, 2), col)
        else:
            for one_grad, one_col in zip(grad, col, strict=True):
                total += torch.bmm(one_grad, one_col.transpose(1, 2))
    size = [total.shape[0] * total.shape[1], *shape.kernel]
    if last:
        grad_w.copy_(total.view(*size, -1).movedim(-1, 1))
    else:
        grad_w.copy_(total.view(grad_w.shape))
