"""Max and average pooling and max unpooling.

The forward of max pooling keeps the place in its window that every maximum came from, one byte an output;
the backward needs nothing else. Both poolings are linear once those places are known, and their operations
come in pairs of a map and its transpose,

    max_pool_gather and max_pool_bwd        avg_pool_fwd and avg_pool_bwd

so that each Function's backward is its partner, to any order. max_unpool_fwd is linear, too, but where
several values have one place PyTorch's backward, max_unpool_bwd, is not its transpose: it hands the gradient
to all of them, and not only to the one that stayed.

Layouts are PyTorch's: channels-last in, channels-last out; but averages, adaptive maxima and unpooling in
three dimensions are contiguous always, and so are all gradients of unpooling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from cnnops import registry
from cnnops.aten.pool import flat_indices
from cnnops.ops import (
    DTYPES,
    cached,
    call,
    compute,
    define,
    empty,
    expect_bool,
    is_channels_last,
)
from cnnops.ops.vmap import in_batch
from cnnops.shapes import PoolShape, UnpoolShape, adaptive_output, axes, whole

Run = Callable[..., None]
Op = Callable[..., Any]
Ints = Sequence[int]


def max_pool(
    x: Tensor,
    kernel: int | Ints,
    stride: int | Ints | None = None,
    padding: int | Ints = 0,
    dilation: int | Ints = 1,
    ceil_mode: bool = False,
    indices: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Maxima of x ``N C *spatial`` over one to three axes, and on demand torch's flat int64 indices.

    Raises RuntimeError and TypeError as ``torch.nn.functional.max_pool2d`` does.
    """
    window, steps, pads, spans = _window(x.dim(), kernel, stride, padding, dilation)
    expect_bool("ceil_mode", ceil_mode)
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES:
        _announce("max_pool_fwd", engine, x, window, steps, pads, spans, ceil_mode)
        pool = getattr(F, f"max_pool{len(window)}d")
        y = pool(x, window, steps, pads, spans, ceil_mode=ceil_mode, return_indices=indices)
        return y if indices else (y, None)
    return _maxima(x, indices, window, steps, pads, spans, ceil_mode, None, engine)


def adaptive_max_pool(
    x: Tensor, output_size: int | Sequence[int | None], indices: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Maxima over the windows that PyTorch lays for an output of the size given (None keeps an axis), and on
    demand torch's flat int64 indices.

    Raises RuntimeError and TypeError as ``torch.nn.functional.adaptive_max_pool2d`` does.
    """
    output = _adaptive_output(x, output_size)
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES:
        _announce_adaptive("max_pool_fwd", engine, x, output)
        y = getattr(F, f"adaptive_max_pool{len(output)}d")(x, output, indices)
        return y if indices else (y, None)
    return _maxima(x, indices, (), (), (), (), False, output, engine)


def _maxima(x: Tensor, indices: bool, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    y, offsets = call(_MaxPool, max_pool_fwd, x, *arguments)
    return y, max_pool_indices(offsets, x.shape[2:], *arguments[:-1]) if indices else None


def max_unpool(
    x: Tensor,
    indices: Tensor,
    kernel: int | Ints,
    stride: int | Ints | None = None,
    padding: int | Ints = 0,
    output_size: Ints | None = None,
) -> Tensor:
    """x ``N C *spatial`` at its indices, int64 places in the planes of a result that is zero elsewhere.

    An index that is outside of its plane raises RuntimeError on the CPU; on a GPU, where looking would mean
    waiting, its value is left out. Raises RuntimeError, ValueError and TypeError as
    ``torch.nn.functional.max_unpool2d`` does.
    """
    output = _unpooled(x.shape[2:], kernel, stride, padding, output_size)
    if indices.dtype != torch.int64:
        raise RuntimeError(f"indices: expected torch.int64, got {indices.dtype}")
    if indices.device != x.device:
        raise RuntimeError(
            f"indices: expected a tensor on {x.device}, as the input, got {indices.device}"
        )
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES:
        if not torch.compiler.is_compiling():
            shape = _unpool_shape(x.shape, indices.shape, output)
            registry.choose("max_unpool_fwd", engine, shape, x.dtype)
        unpool = getattr(F, f"max_unpool{len(output)}d")
        result: Tensor = unpool(x, indices, kernel, stride, padding, output_size)
        return result
    y: Tensor = call(_MaxUnpool, max_unpool_fwd, x, indices, output, engine)
    return y


def avg_pool(
    x: Tensor,
    kernel: int | Ints,
    stride: int | Ints | None = None,
    padding: int | Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Averages of x ``N C *spatial`` over one to three axes.

    Raises RuntimeError and TypeError as ``torch.nn.functional.avg_pool2d`` does.
    """
    window, steps, pads, _ = _window(x.dim(), kernel, stride, padding)
    expect_bool("ceil_mode", ceil_mode)
    expect_bool("count_include_pad", count_include_pad)
    divisor = None if divisor_override is None else whole(divisor_override, "divisor_override")
    # PyTorch's averages in three dimensions, and only they, refuse this, whatever the padding.
    if len(window) == 3 and any(h < k for h, k in zip(x.shape[2:], window, strict=True)):
        raise RuntimeError(
            f"input: expected planes of at least the kernel_size {list(window)}, got {list(x.shape)}"
        )
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES:
        _announce("avg_pool_fwd", engine, x, window, steps, pads, 1, ceil_mode)
        pool = getattr(F, f"avg_pool{len(window)}d")
        rest = () if len(window) == 1 else (divisor,)
        result: Tensor = pool(x, window, steps, pads, ceil_mode, count_include_pad, *rest)
        return result
    average = (ceil_mode, count_include_pad, divisor)
    y: Tensor = call(_AvgPool, avg_pool_fwd, x, window, steps, pads, *average, None, engine)
    return y


def adaptive_avg_pool(x: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """Averages over the windows that PyTorch lays for an output of the size given; None keeps an axis.

    Raises RuntimeError and TypeError as ``torch.nn.functional.adaptive_avg_pool2d`` does.
    """
    output = _adaptive_output(x, output_size)
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES:
        _announce_adaptive("avg_pool_fwd", engine, x, output)
        result: Tensor = getattr(F, f"adaptive_avg_pool{len(output)}d")(x, output)
        return result
    y: Tensor = call(_AvgPool, avg_pool_fwd, x, (), (), (), False, True, None, output, engine)
    return y


def _adaptive_output(x: Tensor, output_size: int | Sequence[int | None]) -> Ints:
    """The output's size. With a single axis PyTorch does not take None for it."""
    if x.dim() == 3:
        return axes(output_size, 1, "output_size")  # type: ignore[arg-type]
    return adaptive_output(output_size, tuple(x.shape[2:]))


@partial(cached, traced=True)
def _window(
    dims: int, kernel: int | Ints, stride: int | Ints | None, padding: int | Ints, dilation: int | Ints = 1
) -> tuple[Ints, Ints, Ints, Ints]:  # fmt: skip
    """Kernel, stride, padding and dilation, one int a spatial axis of a tensor of `dims` axes."""
    dims -= 2
    window = axes(kernel, dims, "kernel_size")
    absent = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    steps = window if absent else axes(stride, dims, "stride")  # type: ignore[arg-type]
    return window, steps, axes(padding, dims, "padding"), axes(dilation, dims, "dilation")


@partial(cached, traced=True)
def _unpooled(
    spatial: Ints, kernel: int | Ints, stride: int | Ints | None, padding: int | Ints,
    output_size: Ints | None,
) -> Ints:  # fmt: skip
    """The size of the planes that pooling made `spatial` of: ``(P - 1)·stride + kernel - 2·padding``, or what
    `output_size` says (it may begin with batch and channels), less than one stride away from that.
    """
    dims = len(spatial)
    window, pads = _exactly(kernel, dims, "kernel_size"), _exactly(padding, dims, "padding")
    steps = window if stride is None else _exactly(stride, dims, "stride")
    output = tuple(
        (p - 1) * s + k - 2 * pad for p, s, k, pad in zip(spatial, steps, window, pads, strict=True)
    )
    if output_size is not None:
        if not isinstance(output_size, (tuple, list)):
            raise TypeError(f"output_size: expected {dims} ints, got {output_size!r}")
        behind = output_size[2:] if len(output_size) == dims + 2 else output_size
        wanted = tuple(whole(o, "output_size") for o in behind)
        if len(wanted) != dims:
            raise ValueError(
                f"output_size: expected {dims} or {dims + 2} ints, got {list(output_size)}"
            )
        if any(not -s < o - h < s for o, h, s in zip(wanted, output, steps, strict=True)):
            raise ValueError(
                f"output_size: expected less than a stride {list(steps)} from {list(output)}, "
                f"got {list(wanted)}"
            )
        output = wanted
    if any(o < 0 for o in output):
        raise ValueError(f"output_size: expected no negative value, got {list(output)}")
    if dims == 3 and any(s <= 0 for s in steps):
        raise RuntimeError(f"stride: expected every value to be at least 1, got {list(steps)}")
    return output


def _exactly(value: int | Ints, dims: int, name: str) -> Ints:
    """As `axes`; but a single element does not stand for all axes."""
    if isinstance(value, (tuple, list)) and len(value) != dims:
        raise RuntimeError(f"{name}: expected one int or {dims} ints, got {list(value)}")
    return axes(value, dims, name)


def _announce(op: str, engine: str, x: Tensor, *arguments: Any) -> None:
    """For dtypes that no kernel takes: what `cnnops.fallback` has to say before PyTorch's own op runs."""
    if not torch.compiler.is_compiling():
        registry.choose(op, engine, _shape(x.shape, *arguments), x.dtype)


def _announce_adaptive(op: str, engine: str, x: Tensor, output: Ints) -> None:
    """`_announce` for adaptive windows."""
    if not torch.compiler.is_compiling():
        registry.choose(op, engine, _adaptive(x.shape, output), x.dtype)


# ---- autograd -------------------------------------------------------------------------------------------


class _MaxPool(Function):
    vmap = staticmethod(in_batch(lambda *a: call(_MaxPool, max_pool_fwd, *a), 1))

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        y, offsets = max_pool_fwd(x, *arguments)
        return y, offsets

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *arguments = inputs
        offsets = output[1]
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(offsets)
        ctx.spatial, ctx.last, ctx.arguments = x.shape[2:], _last(x, arguments[-2]), arguments

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> Any:
        (offsets,) = ctx.saved_tensors
        grad_x = None
        if grad_y is not None:
            rest = (ctx.spatial, ctx.last, *ctx.arguments)
            grad_x = call(_MaxPoolBwd, max_pool_bwd, grad_y, offsets, *rest)
        return grad_x, *(None,) * 7

    @staticmethod
    def tangent(ctx: Any, x_t: Tensor, *_: None) -> Any:
        offsets = ctx.saved_tensors[-1]
        return call(_MaxPoolGather, max_pool_gather, x_t, offsets, *ctx.arguments), None


class _MaxPoolBwd(Function):
    vmap = staticmethod(in_batch(lambda *a: call(_MaxPoolBwd, max_pool_bwd, *a), 2))

    @staticmethod
    def forward(
        grad_y: Tensor, offsets: Tensor, spatial: Ints, last: bool, *arguments: Any
    ) -> Tensor:
        grad_x: Tensor = max_pool_bwd(grad_y, offsets, spatial, last, *arguments)
        return grad_x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, offsets, *rest = inputs
        ctx.save_for_backward(offsets)
        ctx.rest = rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (offsets,) = ctx.saved_tensors
        second = call(_MaxPoolGather, max_pool_gather, grad, offsets, *ctx.rest[2:])
        return second, *(None,) * 10

    @staticmethod
    def tangent(ctx: Any, y_t: Tensor, *_: None) -> Any:
        offsets = ctx.saved_tensors[1]
        return call(_MaxPoolBwd, max_pool_bwd, y_t, offsets, *ctx.rest)


class _MaxPoolGather(Function):
    vmap = staticmethod(in_batch(lambda *a: call(_MaxPoolGather, max_pool_gather, *a), 2))

    @staticmethod
    def forward(x: Tensor, offsets: Tensor, *arguments: Any) -> Tensor:
        y: Tensor = max_pool_gather(x, offsets, *arguments)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, offsets, *arguments = inputs
        ctx.save_for_backward(offsets)
        ctx.spatial, ctx.last, ctx.arguments = x.shape[2:], _last(x, arguments[-2]), arguments

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        (offsets,) = ctx.saved_tensors
        rest = (ctx.spatial, ctx.last, *ctx.arguments)
        return call(_MaxPoolBwd, max_pool_bwd, grad_y, offsets, *rest), *(None,) * 8

    @staticmethod
    def tangent(ctx: Any, x_t: Tensor, *_: None) -> Any:
        offsets = ctx.saved_tensors[1]
        return call(_MaxPoolGather, max_pool_gather, x_t, offsets, *ctx.arguments)


class _MaxUnpool(Function):
    vmap = staticmethod(in_batch(lambda *a: call(_MaxUnpool, max_unpool_fwd, *a), 2))

    @staticmethod
    def forward(x: Tensor, indices: Tensor, output: Ints, engine: str) -> Tensor:
        y: Tensor = max_unpool_fwd(x, indices, output, engine)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, indices, ctx.output, ctx.engine = inputs
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return call(_MaxUnpoolBwd, max_unpool_bwd, grad_y, indices, ctx.engine), *(None,) * 3

    @staticmethod
    def tangent(ctx: Any, x_t: Tensor, *_: None) -> Any:
        indices = ctx.saved_tensors[1]
        return call(_MaxUnpool, max_unpool_fwd, x_t, indices, ctx.output, ctx.engine)


class _MaxUnpoolBwd(Function):
    vmap = staticmethod(in_batch(lambda *a: call(_MaxUnpoolBwd, max_unpool_bwd, *a), 2))

    @staticmethod
    def forward(grad_y: Tensor, indices: Tensor, engine: str) -> Tensor:
        grad_x: Tensor = max_unpool_bwd(grad_y, indices, engine)
        return grad_x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_y, indices, ctx.engine = inputs
        ctx.save_for_backward(indices)
        ctx.y_size = grad_y.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return _added(grad, indices, ctx.y_size), None, None

    @staticmethod
    def tangent(ctx: Any, y_t: Tensor, *_: None) -> Any:
        indices = ctx.saved_tensors[1]
        return call(_MaxUnpoolBwd, max_unpool_bwd, y_t, indices, ctx.engine)


def _added(values: Tensor, indices: Tensor, size: Ints) -> Tensor:
    """The transpose of max_unpool_bwd: as max_unpool_fwd, but the sum of all values that have one place."""
    plane, planes = math.prod(size[2:]), math.prod(size[:2])
    first = torch.arange(planes, device=values.device).view(-1, 1) * plane
    places = (indices.flatten(2).flatten(0, 1) + first).flatten()
    # index_put adds in one order on a GPU, too; scatter_add does not.
    flat = values.new_zeros(planes * plane)
    return flat.index_put((places,), values.flatten(), accumulate=True).view(size)


class _AvgPool(Function):
    vmap = staticmethod(in_batch(lambda *a: call(_AvgPool, avg_pool_fwd, *a), 1))

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> Tensor:
        y: Tensor = avg_pool_fwd(x, *arguments)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *arguments = inputs
        ctx.spatial, ctx.last, ctx.arguments = x.shape[2:], _last_in_2d(x), arguments

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        rest = (ctx.spatial, ctx.last, *ctx.arguments)
        return call(_AvgPoolBwd, avg_pool_bwd, grad_y, *rest), *(None,) * 8

    @staticmethod
    def tangent(ctx: Any, x_t: Tensor, *_: None) -> Any:
        return call(_AvgPool, avg_pool_fwd, x_t, *ctx.arguments)


class _AvgPoolBwd(Function):
    vmap = staticmethod(in_batch(lambda *a: call(_AvgPoolBwd, avg_pool_bwd, *a), 1))

    @staticmethod
    def forward(grad_y: Tensor, spatial: Ints, last: bool, *arguments: Any) -> Tensor:
        grad_x: Tensor = avg_pool_bwd(grad_y, spatial, last, *arguments)
        return grad_x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.rest = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return call(_AvgPool, avg_pool_fwd, grad, *ctx.rest[2:]), *(None,) * 10

    @staticmethod
    def tangent(ctx: Any, y_t: Tensor, *_: None) -> Any:
        return call(_AvgPoolBwd, avg_pool_bwd, y_t, *ctx.rest)


# ---- torch.library --------------------------------------------------------------------------------------


_shape = cached(PoolShape.of)
_adaptive = cached(PoolShape.adaptive)
_unpool_shape = cached(UnpoolShape.of)


def _last_in_2d(x: Tensor) -> bool:
    """Whether PyTorch's averages, adaptive maxima and unpooling of `x` are channels-last."""
    return x.dim() == 4 and is_channels_last(x)


def _last(x: Tensor, adaptive_output: Ints | None) -> bool:
    """Whether PyTorch's maxima of `x` are channels-last."""
    return is_channels_last(x) if adaptive_output is None else _last_in_2d(x)


def _windows(
    x_size: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool,
    output: Ints | None,
) -> PoolShape:  # fmt: skip
    if output is not None:
        return _adaptive(x_size, output)
    return _shape(x_size, kernel, stride, padding, dilation, ceil_mode)


def _max_pool_fwd(
    run: Run, x: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool,
    output: Ints | None, engine: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = _windows(x.shape, kernel, stride, padding, dilation, ceil_mode, output)
    last = _last(x, output)
    y = empty(shape.y_size, x, last)
    offsets = empty(shape.y_size, x, last, torch.uint8 if shape.places <= 255 else torch.int32)
    if y.numel():
        run("max_pool_fwd", engine, shape, x.dtype, x, y, offsets)
    return y, offsets


def _max_pool_bwd(
    run: Run, grad_y: Tensor, offsets: Tensor, spatial: Ints, channels_last: bool, kernel: Ints, stride: Ints,
    padding: Ints, dilation: Ints, ceil_mode: bool, output: Ints | None, engine: str,
) -> Tensor:  # fmt: skip
    x_size = (*grad_y.shape[:2], *spatial)
    shape = _windows(x_size, kernel, stride, padding, dilation, ceil_mode, output)
    grad_x = empty(shape.x_size, grad_y, channels_last)
    if grad_y.numel():
        run("max_pool_bwd", engine, shape, grad_y.dtype, grad_y, offsets, grad_x)
    else:
        grad_x.zero_()
    return grad_x


def _max_pool_gather(
    run: Run, x: Tensor, offsets: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints,
    ceil_mode: bool, output: Ints | None, engine: str,
) -> Tensor:  # fmt: skip
    shape = _windows(x.shape, kernel, stride, padding, dilation, ceil_mode, output)
    y = empty(shape.y_size, x, _last(x, output))
    if y.numel():
        run("max_pool_gather", engine, shape, x.dtype, x, offsets, y)
    return y


def _max_pool_indices(
    run: Run, offsets: Tensor, spatial: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints,
    ceil_mode: bool, output: Ints | None,
) -> Tensor:  # fmt: skip
    x_size = (*offsets.shape[:2], *spatial)
    shape = _windows(x_size, kernel, stride, padding, dilation, ceil_mode, output)
    return flat_indices(shape, offsets)[0]


def _max_unpool_fwd(run: Run, x: Tensor, indices: Tensor, output: Ints, engine: str) -> Tensor:
    shape = _unpool_shape(x.shape, indices.shape, output)
    y = empty(shape.y_size, x, _last_in_2d(x))
    if y.numel():
        if run is compute and indices.is_cpu:
            _expect_inside(indices, shape)
        run("max_unpool_fwd", engine, shape, x.dtype, x, indices, y)
    return y


def _expect_inside(indices: Tensor, shape: UnpoolShape) -> None:
    least, most = (int(i) for i in indices.aminmax())
    if least < 0 or most >= math.prod(shape.output):
        raise RuntimeError(
            f"indices: expected places in planes of {list(shape.output)}, got {least} to {most}"
        )


def _max_unpool_bwd(run: Run, grad_y: Tensor, indices: Tensor, engine: str) -> Tensor:
    shape = _unpool_shape(indices.shape, indices.shape, grad_y.shape[2:])
    grad_x = empty(shape.x_size, grad_y)
    if grad_y.numel():
        run("max_unpool_bwd", engine, shape, grad_y.dtype, grad_y, indices, grad_x)
    else:
        grad_x.zero_()
    return grad_x


def _averages(
    x_size: Ints, kernel: Ints, stride: Ints, padding: Ints, ceil_mode: bool, include: bool,
    divisor: int | None, output: Ints | None,
) -> PoolShape:  # fmt: skip
    if output is not None:
        return _adaptive(x_size, output)
    return _shape(x_size, kernel, stride, padding, 1, ceil_mode, include, divisor)


def _avg_pool_fwd(
    run: Run, x: Tensor, kernel: Ints, stride: Ints, padding: Ints, ceil_mode: bool, count_include_pad: bool,
    divisor: int | None, output: Ints | None, engine: str,
) -> Tensor:  # fmt: skip
    shape = _averages(
        x.shape, kernel, stride, padding, ceil_mode, count_include_pad, divisor, output
    )
    y = empty(shape.y_size, x, _last_in_2d(x))
    if y.numel():
        run("avg_pool_fwd", engine, shape, x.dtype, x, y)
    return y


def _avg_pool_bwd(
    run: Run, grad_y: Tensor, spatial: Ints, channels_last: bool, kernel: Ints, stride: Ints, padding: Ints,
    ceil_mode: bool, count_include_pad: bool, divisor: int | None, output: Ints | None, engine: str,
) -> Tensor:  # fmt: skip
    x_size = (*grad_y.shape[:2], *spatial)
    shape = _averages(
        x_size, kernel, stride, padding, ceil_mode, count_include_pad, divisor, output
    )
    grad_x = empty(shape.x_size, grad_y, channels_last)
    if grad_y.numel():
        run("avg_pool_bwd", engine, shape, grad_y.dtype, grad_y, grad_x)
    else:
        grad_x.zero_()
    return grad_x


_WINDOW = "int[] kernel, int[] stride, int[] padding"
_MAX = f"{_WINDOW}, int[] dilation, bool ceil_mode, SymInt[]? output"
_AVG = (
    f"{_WINDOW}, bool ceil_mode, bool count_include_pad, int? divisor, SymInt[]? output, str engine"
)


max_pool_fwd: Op = define(
    f"max_pool_fwd(Tensor x, {_MAX}, str engine) -> (Tensor, Tensor)", _max_pool_fwd, _MaxPool.vmap
)
max_pool_bwd: Op = define(
    "max_pool_bwd(Tensor grad_y, Tensor offsets, SymInt[] spatial, bool channels_last, "
    f"{_MAX}, str engine) -> Tensor",
    _max_pool_bwd,
    _MaxPoolBwd.vmap,
)
max_pool_gather: Op = define(
    f"max_pool_gather(Tensor x, Tensor offsets, {_MAX}, str engine) -> Tensor",
    _max_pool_gather,
    _MaxPoolGather.vmap,
)
max_pool_indices: Op = define(
    f"max_pool_indices(Tensor offsets, SymInt[] spatial, {_MAX}) -> Tensor",
    _max_pool_indices,
    in_batch(lambda *a: max_pool_indices(*a), 1),
)
max_unpool_fwd: Op = define(
    "max_unpool_fwd(Tensor x, Tensor indices, SymInt[] output, str engine) -> Tensor",
    _max_unpool_fwd,
    _MaxUnpool.vmap,
)
max_unpool_bwd: Op = define(
    "max_unpool_bwd(Tensor grad_y, Tensor indices, str engine) -> Tensor",
    _max_unpool_bwd,
    _MaxUnpoolBwd.vmap,
)
avg_pool_fwd: Op = define(f"avg_pool_fwd(Tensor x, {_AVG}) -> Tensor", _avg_pool_fwd, _AvgPool.vmap)
avg_pool_bwd: Op = define(
    f"avg_pool_bwd(Tensor grad_y, SymInt[] spatial, bool channels_last, {_AVG}) -> Tensor",
    _avg_pool_bwd,
    _AvgPoolBwd.vmap,
)
