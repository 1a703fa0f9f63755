"""Convolution and its gradients: conv_fprop, conv_dgrad, conv_wgrad, conv_bgrad.

Each of the first three is linear in both of its tensors, and its two derivatives are the other two:

    y  = fprop(x, w)         grad_x = dgrad(grad_y, w)     grad_w = wgrad(grad_y, x)
    gx = dgrad(grad_y, w)    d gx/d grad_y: fprop(·, w)    d gx/d w: wgrad(grad_y, ·)
    gw = wgrad(grad_y, x)    d gw/d grad_y: fprop(x, ·)    d gw/d x: dgrad(grad_y, ·)

so the three Functions call one another, and derivatives of every order come from the kernels. All take the
same last arguments: stride, padding (before and after of every axis in turn), dilation, groups, engine.
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
from cnnops.ops import (
    DTYPES,
    autocast_dtype,
    cached,
    call,
    channels_last_strides,
    define,
    empty,
    expect_same,
    new_strides,
)
from cnnops.shapes import ConvShape, axes, padding_pairs, whole

Run = Callable[..., None]
Ints = Sequence[int]


def conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: int | Ints = 1,
    padding: int | str | Ints | Sequence[tuple[int, int]] = 0,
    dilation: int | Ints = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution over one to three spatial axes: x ``N C *spatial``, w ``K C/groups *kernel``, bias ``K``.

    `padding` may be unequal: one (before, after) pair an axis. Where C is 0 the sum is empty and the result
    is the bias. Raises RuntimeError and TypeError as ``torch.nn.functional.conv2d`` does.
    """
    arguments = _arguments(w.shape, stride, padding, dilation, groups)
    low = autocast_dtype(x)
    if low is not None:
        x, w = _autocast(x, low), _autocast(w, low)
        bias = None if bias is None else _autocast(bias, low)
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES and x.dtype == w.dtype:
        return _by_torch(x, w, bias, engine, *arguments)
    y: Tensor = call(_Fprop, conv_fprop, x, w, bias, *arguments, engine)
    return y


@partial(cached, traced=True)
def _arguments(
    w: Ints, stride: int | Ints, padding: Any, dilation: int | Ints, groups: int
) -> tuple[Ints, Ints, Ints, int]:
    """stride, padding (before and after of every axis in turn), dilation and groups, as all ops take them."""
    dims, kernel = len(w) - 2, tuple(w[2:])
    stride, dilation = axes(stride, dims, "stride"), axes(dilation, dims, "dilation")
    pairs = padding_pairs(padding, kernel, stride, dilation)
    return stride, tuple(p for pair in pairs for p in pair), dilation, whole(groups, "groups")


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` in autocast's dtype; like torch's convolution, this leaves float64 as it is."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _by_torch(
    x: Tensor, w: Tensor, bias: Tensor | None, engine: str, stride: Ints, padding: Ints, dilation: Ints,
    groups: int,
) -> Tensor:  # fmt: skip
    """Dtypes that no kernel takes: PyTorch's result or error, after what `cnnops.fallback` has to say."""
    shape = _shape(x.shape, w.shape, None, stride, padding, dilation, groups)
    if not torch.compiler.is_compiling():
        registry.choose("conv_fprop", engine, shape, x.dtype)
    function = (F.conv1d, F.conv2d, F.conv3d)[shape.dims - 1]
    last_axis_first = [p for pair in reversed(shape.padding) for p in pair]
    return function(F.pad(x, last_axis_first), w, bias, stride, 0, dilation, groups)


# ---- autograd -------------------------------------------------------------------------------------------


class _Fprop(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        to_x, to_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if to_w else None, w if to_x else None)
        ctx.call = x.shape, x.stride(), w.shape, w.stride(), arguments
        y: Tensor = conv_fprop(x, w, bias, *arguments)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, w = ctx.saved_tensors
        x_size, x_strides, w_size, w_strides, arguments = ctx.call
        last = channels_last_strides(x_size, x_strides) or channels_last_strides(w_size, w_strides)
        to_x, to_w, to_bias = ctx.needs_input_grad[:3]
        grad_x = call(_Dgrad, conv_dgrad, grad_y, w, x_size, last, *arguments) if to_x else None
        grad_w = call(_Wgrad, conv_wgrad, grad_y, x, w_size, last, *arguments) if to_w else None
        grad_b = call(_Bgrad, conv_bgrad, grad_y, x_size, w_size, *arguments) if to_bias else None
        return grad_x, grad_w, grad_b, *(None,) * 5


class _Dgrad(Function):
    @staticmethod
    def forward(
        ctx: Any, grad_y: Tensor, w: Tensor, x_size: Ints, last: bool, *arguments: Any
    ) -> Tensor:
        to_grad_y, to_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad_y if to_w else None, w if to_grad_y else None)
        ctx.w_size, ctx.last, ctx.arguments = w.shape, last, arguments
        grad_x: Tensor = conv_dgrad(grad_y, w, x_size, last, *arguments)
        return grad_x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_y, w = ctx.saved_tensors
        w_size, last, arguments = ctx.w_size, ctx.last, ctx.arguments
        to_grad_y, to_w = ctx.needs_input_grad[:2]
        second_y = call(_Fprop, conv_fprop, grad, w, None, *arguments) if to_grad_y else None
        second_w = (
            call(_Wgrad, conv_wgrad, grad_y, grad, w_size, last, *arguments) if to_w else None
        )
        return second_y, second_w, *(None,) * 7


class _Wgrad(Function):
    @staticmethod
    def forward(
        ctx: Any, grad_y: Tensor, x: Tensor, w_size: Ints, last: bool, *arguments: Any
    ) -> Tensor:
        to_grad_y, to_x = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad_y if to_x else None, x if to_grad_y else None)
        ctx.x_size, ctx.last, ctx.arguments = x.shape, last, arguments
        grad_w: Tensor = conv_wgrad(grad_y, x, w_size, last, *arguments)
        return grad_w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_y, x = ctx.saved_tensors
        x_size, last, arguments = ctx.x_size, ctx.last, ctx.arguments
        to_grad_y, to_x = ctx.needs_input_grad[:2]
        second_y = call(_Fprop, conv_fprop, x, grad, None, *arguments) if to_grad_y else None
        second_x = (
            call(_Dgrad, conv_dgrad, grad_y, grad, x_size, last, *arguments) if to_x else None
        )
        return second_y, second_x, *(None,) * 7


class _Bgrad(Function):
    @staticmethod
    def forward(ctx: Any, grad_y: Tensor, x_size: Ints, w_size: Ints, *arguments: Any) -> Tensor:
        ctx.y_size = grad_y.shape
        grad_bias: Tensor = conv_bgrad(grad_y, x_size, w_size, *arguments)
        return grad_bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        spatial = (1,) * (len(ctx.y_size) - 2)
        return grad.view(1, -1, *spatial).expand(ctx.y_size), *(None,) * 7


# ---- torch.library --------------------------------------------------------------------------------------


@cached
def _shape(
    x: Ints, w: Ints, bias: Ints | None, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> ConvShape:
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return ConvShape.of(x, w, bias, stride, pairs, dilation, groups)


@cached
def _forward(
    x: Ints, x_strides: Ints, w: Ints, w_strides: Ints, bias: Ints | None, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> tuple[ConvShape, Ints]:  # fmt: skip
    """The problem, and the strides of y."""
    last = channels_last_strides(x, x_strides) or channels_last_strides(w, w_strides)
    shape = _shape(x, w, bias, stride, padding, dilation, groups)
    return shape, new_strides(shape.y_size, last)


def _conv_fprop(
    run: Run, x: Tensor, w: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, engine: str,
) -> Tensor:  # fmt: skip
    size = None if bias is None else bias.shape
    shape, strides = _forward(
        x.shape, x.stride(), w.shape, w.stride(), size, stride, padding, dilation, groups
    )
    expect_same(x, x.dtype, weight=w, bias=bias)
    y = x.new_empty_strided(shape.y_size, strides)
    if x.numel():
        run("conv_fprop", engine, shape, x.dtype, x, w, bias, y)
    elif bias is not None:
        y.copy_(bias.view(-1, *(1,) * shape.dims))
    else:
        y.zero_()
    return y


def _conv_dgrad(
    run: Run, grad_y: Tensor, w: Tensor, x_size: Ints, channels_last: bool, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, engine: str,
) -> Tensor:  # fmt: skip
    shape = _shape(x_size, w.shape, None, stride, padding, dilation, groups)
    grad_x = empty(shape.x_size, grad_y, channels_last)
    if grad_x.numel():
        run("conv_dgrad", engine, shape, grad_y.dtype, grad_y, w, grad_x)
    return grad_x


def _conv_wgrad(
    run: Run, grad_y: Tensor, x: Tensor, w_size: Ints, channels_last: bool, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, engine: str,
) -> Tensor:  # fmt: skip
    shape = _shape(x.shape, w_size, None, stride, padding, dilation, groups)
    grad_w = empty(shape.w_size, grad_y, channels_last)
    if x.numel():
        run("conv_wgrad", engine, shape, grad_y.dtype, grad_y, x, grad_w)
    else:
        grad_w.zero_()
    return grad_w


def _conv_bgrad(
    run: Run, grad_y: Tensor, x_size: Ints, w_size: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, engine: str,
) -> Tensor:  # fmt: skip
    shape = _shape(x_size, w_size, None, stride, padding, dilation, groups)
    grad_bias = empty((shape.K,), grad_y)
    if grad_y.numel():
        run("conv_bgrad", engine, shape, grad_y.dtype, grad_y, grad_bias)
    else:
        grad_bias.zero_()
    return grad_bias


_ARGUMENTS = "int[] stride, int[] padding, int[] dilation, int groups, str engine"

conv_fprop = define(
    f"conv_fprop(Tensor x, Tensor w, Tensor? bias, {_ARGUMENTS}) -> Tensor", _conv_fprop
)
conv_dgrad = define(
    f"conv_dgrad(Tensor grad_y, Tensor w, SymInt[] x_size, bool channels_last, {_ARGUMENTS}) -> Tensor",
    _conv_dgrad,
)
conv_wgrad = define(
    f"conv_wgrad(Tensor grad_y, Tensor x, SymInt[] w_size, bool channels_last, {_ARGUMENTS}) -> Tensor",
    _conv_wgrad,
)
conv_bgrad = define(
    f"conv_bgrad(Tensor grad_y, SymInt[] x_size, SymInt[] w_size, {_ARGUMENTS}) -> Tensor",
    _conv_bgrad,
)
