"""Max and average pooling.

The forward of max pooling keeps the place in its window that every maximum came from, one byte an output;
the backward needs nothing else. Both poolings are linear once those places are known, and their operations
come in pairs of a map and its transpose,

    max_pool_gather and max_pool_bwd        avg_pool_fwd and avg_pool_bwd

so that each Function's backward is its partner, to any order.
"""

from __future__ import annotations

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
    define,
    empty,
    expect_bool,
    is_channels_last,
)
from cnnops.shapes import PoolShape, adaptive_output, axes, whole

Run = Callable[..., None]
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
    arguments = (window, steps, pads, spans, ceil_mode, engine)
    y, offsets = call(_MaxPool, max_pool_fwd, x, *arguments)
    return y, max_pool_indices(offsets, x.shape, *arguments[:-1]) if indices else None


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
    output = adaptive_output(output_size, tuple(x.shape[2:]))
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES:
        if not torch.compiler.is_compiling():
            registry.choose("avg_pool_fwd", engine, _adaptive(x.shape, output), x.dtype)
        result: Tensor = getattr(F, f"adaptive_avg_pool{len(output)}d")(x, output)
        return result
    y: Tensor = call(_AvgPool, avg_pool_fwd, x, (), (), (), False, True, None, output, engine)
    return y


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


def _announce(op: str, engine: str, x: Tensor, *arguments: Any) -> None:
    """For dtypes that no kernel takes: what `cnnops.fallback` has to say before PyTorch's own op runs."""
    if not torch.compiler.is_compiling():
        registry.choose(op, engine, _shape(x.shape, *arguments), x.dtype)


# ---- autograd -------------------------------------------------------------------------------------------


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        y, offsets = max_pool_fwd(x, *arguments)
        ctx.save_for_backward(offsets)
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(False)
        ctx.x_size, ctx.last, ctx.arguments = x.shape, is_channels_last(x), arguments
        return y, offsets

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> Any:
        (offsets,) = ctx.saved_tensors
        grad_x = None
        if grad_y is not None:
            rest = (ctx.x_size, ctx.last, *ctx.arguments)
            grad_x = call(_MaxPoolBwd, max_pool_bwd, grad_y, offsets, *rest)
        return grad_x, *(None,) * 6


class _MaxPoolBwd(Function):
    @staticmethod
    def forward(
        ctx: Any, grad_y: Tensor, offsets: Tensor, x_size: Ints, last: bool, *arguments: Any
    ) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.arguments = arguments
        grad_x: Tensor = max_pool_bwd(grad_y, offsets, x_size, last, *arguments)
        return grad_x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (offsets,) = ctx.saved_tensors
        second = call(_MaxPoolGather, max_pool_gather, grad, offsets, *ctx.arguments)
        return second, *(None,) * 9


class _MaxPoolGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, *arguments: Any) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.x_size, ctx.last, ctx.arguments = x.shape, is_channels_last(x), arguments
        y: Tensor = max_pool_gather(x, offsets, *arguments)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        (offsets,) = ctx.saved_tensors
        rest = (ctx.x_size, ctx.last, *ctx.arguments)
        return call(_MaxPoolBwd, max_pool_bwd, grad_y, offsets, *rest), *(None,) * 7


class _AvgPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        ctx.x_size, ctx.last, ctx.arguments = x.shape, is_channels_last(x), arguments
        y: Tensor = avg_pool_fwd(x, *arguments)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        rest = (ctx.x_size, ctx.last, *ctx.arguments)
        return call(_AvgPoolBwd, avg_pool_bwd, grad_y, *rest), *(None,) * 8


class _AvgPoolBwd(Function):
    @staticmethod
    def forward(ctx: Any, grad_y: Tensor, x_size: Ints, last: bool, *arguments: Any) -> Tensor:
        ctx.arguments = arguments
        grad_x: Tensor = avg_pool_bwd(grad_y, x_size, last, *arguments)
        return grad_x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return call(_AvgPool, avg_pool_fwd, grad, *ctx.arguments), *(None,) * 10


# ---- torch.library --------------------------------------------------------------------------------------


_shape = cached(PoolShape.of)
_adaptive = cached(PoolShape.adaptive)


def _max_pool_fwd(
    run: Run, x: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool,
    engine: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = _shape(x.shape, kernel, stride, padding, dilation, ceil_mode)
    last = is_channels_last(x)
    y = empty(shape.y_size, x, last)
    offsets = empty(shape.y_size, x, last, torch.uint8 if shape.places <= 255 else torch.int32)
    if x.numel():
        run("max_pool_fwd", engine, shape, x.dtype, x, y, offsets)
    return y, offsets


def _max_pool_bwd(
    run: Run, grad_y: Tensor, offsets: Tensor, x_size: Ints, channels_last: bool, kernel: Ints, stride: Ints,
    padding: Ints, dilation: Ints, ceil_mode: bool, engine: str,
) -> Tensor:  # fmt: skip
    shape = _shape(x_size, kernel, stride, padding, dilation, ceil_mode)
    grad_x = empty(shape.x_size, grad_y, channels_last)
    if grad_x.numel():
        run("max_pool_bwd", engine, shape, grad_y.dtype, grad_y, offsets, grad_x)
    return grad_x


def _max_pool_gather(
    run: Run, x: Tensor, offsets: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints,
    ceil_mode: bool, engine: str,
) -> Tensor:  # fmt: skip
    shape = _shape(x.shape, kernel, stride, padding, dilation, ceil_mode)
    y = empty(shape.y_size, x, is_channels_last(x))
    if x.numel():
        run("max_pool_gather", engine, shape, x.dtype, x, offsets, y)
    return y


def _max_pool_indices(
    run: Run, offsets: Tensor, x_size: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints,
    ceil_mode: bool,
) -> Tensor:  # fmt: skip
    return flat_indices(_shape(x_size, kernel, stride, padding, dilation, ceil_mode), offsets)[0]


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
    y = empty(shape.y_size, x, is_channels_last(x))
    if y.numel():
        run("avg_pool_fwd", engine, shape, x.dtype, x, y)
    return y


def _avg_pool_bwd(
    run: Run, grad_y: Tensor, x_size: Ints, channels_last: bool, kernel: Ints, stride: Ints, padding: Ints,
    ceil_mode: bool, count_include_pad: bool, divisor: int | None, output: Ints | None, engine: str,
) -> Tensor:  # fmt: skip
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
_MAX = f"{_WINDOW}, int[] dilation, bool ceil_mode"
_AVG = (
    f"{_WINDOW}, bool ceil_mode, bool count_include_pad, int? divisor, SymInt[]? output, str engine"
)

max_pool_fwd = define(
    f"max_pool_fwd(Tensor x, {_MAX}, str engine) -> (Tensor, Tensor)", _max_pool_fwd
)
max_pool_bwd = define(
    "max_pool_bwd(Tensor grad_y, Tensor offsets, SymInt[] x_size, bool channels_last, "
    f"{_MAX}, str engine) -> Tensor",
    _max_pool_bwd,
)
max_pool_gather = define(
    f"max_pool_gather(Tensor x, Tensor offsets, {_MAX}, str engine) -> Tensor", _max_pool_gather
)
max_pool_indices = define(
    f"max_pool_indices(Tensor offsets, SymInt[] x_size, {_MAX}) -> Tensor", _max_pool_indices
)
avg_pool_fwd = define(f"avg_pool_fwd(Tensor x, {_AVG}) -> Tensor", _avg_pool_fwd)
avg_pool_bwd = define(
    f"avg_pool_bwd(Tensor grad_y, SymInt[] x_size, bool channels_last, {_AVG}) -> Tensor",
    _avg_pool_bwd,
)
