"""Convolution and its gradients: conv_fprop, conv_dgrad, conv_wgrad, conv_bgrad.

Each of the first three is linear in both of its tensors, and its two derivatives are the other two:

    y  = fprop(x, w)         grad_x = dgrad(grad_y, w)     grad_w = wgrad(grad_y, x)
    gx = dgrad(grad_y, w)    d gx/d grad_y: fprop(·, w)    d gx/d w: wgrad(grad_y, ·)
    gw = wgrad(grad_y, x)    d gw/d grad_y: fprop(x, ·)    d gw/d x: dgrad(grad_y, ·)

so the three Functions call one another, and derivatives of every order come from the kernels. Transposed
convolution is dgrad, with a bias. All take the same last arguments: stride, padding (before and after of
every axis in turn), dilation, groups, padding mode, engine.

fprop and wgrad read the padding of every mode in place. dgrad with a mode other than zeros is the dgrad of
the padded input, folded: conv_fold adds the padding's gradients to those of the elements it was made of.
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
    direct,
    empty,
    empty_strided,
    expect_same,
    new_strides,
)
from cnnops.ops.vmap import folded, unfolded
from cnnops.shapes import PADDING_MODES, ConvShape, axes, padding_pairs, whole

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
    padding_mode: str = "zeros",
) -> Tensor:
    """Convolution over one to three spatial axes: x ``N C *spatial``, w ``K C/groups *kernel``, bias ``K``.

    `padding` may be unequal: one (before, after) pair an axis, negative to crop. `padding_mode` is zeros,
    reflect, replicate or circular, as in ``torch.nn.Conv2d``. Where C is 0 the sum is empty and the result is
    the bias. Raises RuntimeError and TypeError as ``torch.nn.functional.conv2d`` does, ValueError for an
    unknown mode.
    """
    arguments = settled(w.shape, stride, padding, dilation, groups, padding_mode)
    x, w, bias = cast(x, w, bias)
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES and x.dtype == w.dtype:
        return _conv_by_torch(x, w, bias, engine, *arguments)
    y: Tensor = call(_Fprop, conv_fprop, x, w, bias, *arguments, engine)
    return y


def conv_transpose(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: int | Ints = 1,
    padding: int | Ints = 0,
    output_padding: int | Ints = 0,
    groups: int = 1,
    dilation: int | Ints = 1,
) -> Tensor:
    """Transposed convolution over one to three axes, the gradient of a convolution with respect to its input:
    x ``N C *spatial``, w ``C K/groups *kernel``, bias ``K``. See `ConvShape.transposed` for sizes.

    Raises RuntimeError and TypeError as ``torch.nn.functional.conv_transpose2d`` does.
    """
    rest = transposed(
        x.shape, w.shape, None if bias is None else bias.shape, stride, padding, output_padding, groups,
        dilation,
    )  # fmt: skip
    x, w, bias = cast(x, w, bias)
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES and x.dtype == w.dtype:
        size, *arguments = rest
        if not torch.compiler.is_compiling():
            registry.choose(
                "conv_dgrad", engine, shape_of(size, w.shape, None, *arguments), x.dtype
            )
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[w.dim() - 3]
        return function(x, w, bias, stride, padding, output_padding, groups, dilation)
    size, *arguments = rest
    last = is_last(x, w)
    y: Tensor = call(_Dgrad, conv_dgrad, x, w, bias, size, last, *arguments, engine)
    return y


@partial(cached, traced=True)
def settled(
    w: Ints, stride: int | Ints, padding: Any, dilation: int | Ints, groups: int, padding_mode: str
) -> tuple[Ints, Ints, Ints, int, str]:
    """Stride, padding (before and after of every axis in turn), dilation, groups, mode: as ops take them."""
    dims, kernel = len(w) - 2, tuple(w[2:])
    stride, dilation = axes(stride, dims, "stride"), axes(dilation, dims, "dilation")
    pairs = tuple(p for pair in padding_pairs(padding, kernel, stride, dilation) for p in pair)
    if not any(pairs) and padding_mode in PADDING_MODES:
        padding_mode = "zeros"  # there is nothing to tell them apart
    return stride, pairs, dilation, whole(groups, "groups"), padding_mode


@partial(cached, traced=True)
def transposed(
    x: Ints, w: Ints, bias: Ints | None, stride: int | Ints, padding: int | Ints,
    output_padding: int | Ints, groups: int, dilation: int | Ints,
) -> tuple[Any, ...]:  # fmt: skip
    """The result's size, and the arguments of the convolution whose dgrad it is."""
    shape = ConvShape.transposed(
        x, w, bias, stride, padding, output_padding, whole(groups, "groups"), dilation
    )
    pairs = tuple(p for pair in shape.padding for p in pair)
    size = (shape.N, shape.C, *shape.spatial)
    return size, shape.stride, pairs, shape.dilation, shape.groups, shape.padding_mode


def is_last(x: Tensor, w: Tensor) -> bool:
    """Whether results are channels-last: where x or w is."""
    return channels_last_strides(x.shape, x.stride()) or channels_last_strides(w.shape, w.stride())


def cast(x: Tensor, w: Tensor, *others: Tensor | None) -> Any:
    """The tensors in autocast's dtype; like torch's convolution, this leaves float64 as it is."""
    low = autocast_dtype(x)
    if low is None:
        return x, w, *others
    return tuple(None if t is None else _lowered(t, low) for t in (x, w, *others))


def _lowered(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _conv_by_torch(
    x: Tensor, w: Tensor, bias: Tensor | None, engine: str, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, padding_mode: str,
) -> Tensor:  # fmt: skip
    """Dtypes that no kernel takes: PyTorch's result or error, after what `cnnops.fallback` has to say."""
    shape = shape_of(x.shape, w.shape, None, stride, padding, dilation, groups, padding_mode)
    if not torch.compiler.is_compiling():
        registry.choose("conv_fprop", engine, shape, x.dtype)
    function = (F.conv1d, F.conv2d, F.conv3d)[shape.dims - 1]
    last_axis_first = [p for pair in reversed(shape.padding) for p in pair]
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return function(F.pad(x, last_axis_first, mode), w, bias, stride, 0, dilation, groups)


# ---- torch.func.vmap --------------------------------------------------------------------------------------
# A mapped image joins the batch. Where the filters are mapped, too, channels of all maps stand side by side,
# and the maps are groups of one convolution.


def _groups_times(arguments: Sequence[Any], maps: int) -> tuple[Any, ...]:
    *before, groups, padding_mode, engine = arguments
    return *before, groups * maps, padding_mode, engine


def _vmap_fprop(
    info: Any, in_dims: Sequence[int | None], x: Tensor, w: Tensor, bias: Any, *rest: Any
) -> Any:
    maps = info.batch_size
    at_x, at_w, at_b = in_dims[:3]
    if at_w is None and at_b is None:
        y = call(_Fprop, conv_fprop, folded(x, at_x, maps, 0), w, bias, *rest)
        return unfolded(y, maps, 0), 0
    x, w = folded(x, at_x, maps, 1), folded(w, at_w, maps, 0)
    bias = None if bias is None else folded(bias, at_b, maps, 0)
    y = call(_Fprop, conv_fprop, x, w, bias, *_groups_times(rest, maps))
    return unfolded(y, maps, 1), 1


def _vmap_dgrad(
    info: Any, in_dims: Sequence[int | None], grad_y: Tensor, w: Tensor, bias: Any, x_size: Ints, last: bool,
    *rest: Any,
) -> Any:  # fmt: skip
    maps = info.batch_size
    at_y, at_w, at_b = in_dims[:3]
    N, C, *spatial = x_size
    if at_w is None and at_b is None:
        size = (N * maps, C, *spatial)
        grad_x = call(_Dgrad, conv_dgrad, folded(grad_y, at_y, maps, 0), w, bias, size, last, *rest)
        return unfolded(grad_x, maps, 0), 0
    grad_y, w = folded(grad_y, at_y, maps, 1), folded(w, at_w, maps, 0)
    bias = None if bias is None else folded(bias, at_b, maps, 0)
    size = (N, C * maps, *spatial)
    grad_x = call(_Dgrad, conv_dgrad, grad_y, w, bias, size, last, *_groups_times(rest, maps))
    return unfolded(grad_x, maps, 1), 1


def _vmap_wgrad(
    info: Any,
    in_dims: Sequence[int | None],
    grad_y: Tensor,
    x: Tensor,
    w_size: Ints,
    last: bool,
    *rest: Any,
) -> Any:
    maps = info.batch_size
    at_y, at_x = in_dims[:2]
    grad_y, x = folded(grad_y, at_y, maps, 1), folded(x, at_x, maps, 1)
    K, *filter_size = w_size
    size = (K * maps, *filter_size)
    grad_w = call(_Wgrad, conv_wgrad, grad_y, x, size, last, *_groups_times(rest, maps))
    return unfolded(grad_w, maps, 0), 0


def _vmap_bgrad(info: Any, in_dims: Sequence[int | None], grad_y: Tensor, engine: str) -> Any:
    maps = info.batch_size
    grad_bias = call(_Bgrad, conv_bgrad, folded(grad_y, in_dims[0], maps, 1), engine)
    return unfolded(grad_bias, maps, 0), 0


# ---- autograd -------------------------------------------------------------------------------------------


def _sum(*terms: Tensor | None) -> Tensor | None:
    """The sum of the tensors among `terms`, None where there is none."""
    found = [t for t in terms if t is not None]
    return sum(found[1:], found[0]) if found else None


def save_for_gradients(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Keeps what `gradients` needs of a Function's x, w, bias and arguments."""
    x, w, _, *arguments = inputs
    to_x, to_w = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if to_w else None, w if to_x else None)
    ctx.call = x.shape, x.stride(), w.shape, w.stride(), arguments


def gradients(ctx: Any, grad_y: Tensor) -> Any:
    """Those of x, w and bias, and None for each of the other arguments."""
    x, w = ctx.saved_tensors
    x_size, x_strides, w_size, w_strides, arguments = ctx.call
    last = channels_last_strides(x_size, x_strides) or channels_last_strides(w_size, w_strides)
    to_x, to_w, to_bias = ctx.needs_input_grad[:3]
    grad_x = grad_w = grad_b = found = None
    wanted = to_x, to_w, to_bias
    if not torch.is_grad_enabled():
        # The usual case: `dgrad` and its like would each find out the same again.
        found = _conv_gradients(grad_y, x, w, wanted, x_size, w_size, last, *arguments)
    if found is not None:
        grads = iter(found)
        grad_x, grad_w, grad_b = [next(grads) if want else None for want in wanted]
    else:
        if to_x:
            grad_x = dgrad(grad_y, w, x_size, last, *arguments)
        if to_w:
            grad_w = wgrad(grad_y, x, w_size, last, *arguments)
        if to_bias:
            grad_b = bgrad(grad_y, arguments[-1])
    return grad_x, grad_w, grad_b, *(None,) * len(arguments)


class _Fprop(Function):
    vmap = staticmethod(_vmap_fprop)

    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        y: Tensor = conv_fprop(x, w, bias, *arguments)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save_for_gradients(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        return gradients(ctx, grad_y)

    @staticmethod
    def tangent(
        ctx: Any, x_t: Tensor | None, w_t: Tensor | None, bias_t: Tensor | None, *_: Any
    ) -> Any:
        x, w, *_ = ctx.saved_tensors
        arguments = ctx.call[-1]
        of_x = None if x_t is None else fprop(x_t, w, *arguments)
        of_w = None if w_t is None else fprop(x, w_t, *arguments)
        if bias_t is None:
            return _sum(of_x, of_w)
        if of_x is None and of_w is None:
            return call(_Fprop, conv_fprop, torch.zeros_like(x), w, bias_t, *arguments)
        return _sum(of_x, of_w, bias_t.view(-1, *(1,) * (x.dim() - 2)))


class _Dgrad(Function):
    vmap = staticmethod(_vmap_dgrad)

    @staticmethod
    def forward(
        grad_y: Tensor, w: Tensor, bias: Tensor | None, x_size: Ints, last: bool, *arguments: Any
    ) -> Tensor:
        grad_x: Tensor = conv_dgrad(grad_y, w, bias, x_size, last, *arguments)
        return grad_x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_y, w, _, x_size, last, *arguments = inputs
        to_grad_y, to_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad_y if to_w else None, w if to_grad_y else None)
        ctx.w_size, ctx.x_size, ctx.last, ctx.arguments = w.shape, x_size, last, arguments

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_y, w = ctx.saved_tensors
        w_size, last, arguments = ctx.w_size, ctx.last, ctx.arguments
        to_grad_y, to_w, to_bias = ctx.needs_input_grad[:3]
        second_y = fprop(grad, w, *arguments) if to_grad_y else None
        second_w = wgrad(grad_y, grad, w_size, last, *arguments) if to_w else None
        grad_b = bgrad(grad, arguments[-1]) if to_bias else None
        return second_y, second_w, grad_b, *(None,) * 8

    @staticmethod
    def tangent(
        ctx: Any, y_t: Tensor | None, w_t: Tensor | None, bias_t: Tensor | None, *_: Any
    ) -> Any:
        grad_y, w, *_ = ctx.saved_tensors
        rest = (ctx.x_size, ctx.last, *ctx.arguments)
        of_y = None if y_t is None else dgrad(y_t, w, *rest)
        of_w = None if w_t is None else dgrad(grad_y, w_t, *rest)
        if bias_t is None:
            return _sum(of_y, of_w)
        if of_y is None and of_w is None:
            return call(_Dgrad, conv_dgrad, torch.zeros_like(grad_y), w, bias_t, *rest)
        return _sum(of_y, of_w, bias_t.view(-1, *(1,) * (grad_y.dim() - 2)))


class _Wgrad(Function):
    vmap = staticmethod(_vmap_wgrad)

    @staticmethod
    def forward(grad_y: Tensor, x: Tensor, w_size: Ints, last: bool, *arguments: Any) -> Tensor:
        grad_w: Tensor = conv_wgrad(grad_y, x, w_size, last, *arguments)
        return grad_w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_y, x, w_size, last, *arguments = inputs
        to_grad_y, to_x = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad_y if to_x else None, x if to_grad_y else None)
        ctx.x_size, ctx.w_size, ctx.last, ctx.arguments = x.shape, w_size, last, arguments

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_y, x = ctx.saved_tensors
        x_size, last, arguments = ctx.x_size, ctx.last, ctx.arguments
        to_grad_y, to_x = ctx.needs_input_grad[:2]
        second_y = fprop(x, grad, *arguments) if to_grad_y else None
        second_x = dgrad(grad_y, grad, x_size, last, *arguments) if to_x else None
        return second_y, second_x, *(None,) * 8

    @staticmethod
    def tangent(ctx: Any, y_t: Tensor | None, x_t: Tensor | None, *_: Any) -> Any:
        grad_y, x, *_ = ctx.saved_tensors
        rest = (ctx.w_size, ctx.last, *ctx.arguments)
        of_y = None if y_t is None else wgrad(y_t, x, *rest)
        of_x = None if x_t is None else wgrad(grad_y, x_t, *rest)
        return _sum(of_y, of_x)


class _Bgrad(Function):
    vmap = staticmethod(_vmap_bgrad)

    @staticmethod
    def forward(grad_y: Tensor, engine: str) -> Tensor:
        grad_bias: Tensor = conv_bgrad(grad_y, engine)
        return grad_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_y, ctx.engine = inputs
        ctx.y_size = grad_y.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        spatial = (1,) * (len(ctx.y_size) - 2)
        return grad.view(1, -1, *spatial).expand(ctx.y_size), None

    @staticmethod
    def tangent(ctx: Any, y_t: Tensor, _: None) -> Any:
        return bgrad(y_t, ctx.engine)


# ---- the linear maps, differentiable: what gradients of other operations are made of ----------------------


def fprop(x: Tensor, w: Tensor, *arguments: Any) -> Tensor:
    """The convolution of x and w, with arguments as ops take them."""
    y: Tensor = call(_Fprop, conv_fprop, x, w, None, *arguments)
    return y


def dgrad(grad_y: Tensor, w: Tensor, x_size: Ints, last: bool, *arguments: Any) -> Tensor:
    """The gradient of x, channels-last if `last`."""
    grad_x: Tensor = call(_Dgrad, conv_dgrad, grad_y, w, None, x_size, last, *arguments)
    return grad_x


def wgrad(grad_y: Tensor, x: Tensor, w_size: Ints, last: bool, *arguments: Any) -> Tensor:
    """The gradient of w, channels-last if `last`."""
    grad_w: Tensor = call(_Wgrad, conv_wgrad, grad_y, x, w_size, last, *arguments)
    return grad_w


def bgrad(grad_y: Tensor, engine: str) -> Tensor:
    """The gradient of the bias."""
    grad_bias: Tensor = call(_Bgrad, conv_bgrad, grad_y, engine)
    return grad_bias


# ---- torch.library --------------------------------------------------------------------------------------


@cached
def shape_of(
    x: Ints, w: Ints, bias: Ints | None, stride: Ints, padding: Ints, dilation: Ints, groups: int,
    padding_mode: str,
) -> ConvShape:  # fmt: skip
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return ConvShape.of(x, w, bias, stride, pairs, dilation, groups, padding_mode)


@cached
def _forward(
    x: Ints, x_strides: Ints, w: Ints, w_strides: Ints, bias: Ints | None, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, padding_mode: str,
) -> tuple[ConvShape, Ints]:  # fmt: skip
    """The problem, and the strides of y."""
    last = channels_last_strides(x, x_strides) or channels_last_strides(w, w_strides)
    shape = shape_of(x, w, bias, stride, padding, dilation, groups, padding_mode)
    return shape, new_strides(shape.y_size, last)


def problem(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> tuple[ConvShape, Ints]:
    """The problem, and the strides of y."""
    size = None if bias is None else bias.shape
    return _forward(x.shape, x.stride(), w.shape, w.stride(), size, *geometry)


@cached
def _summed(y: Ints) -> ConvShape:
    """A problem whose y has this size: what it is besides does not matter to the bias's gradient."""
    ones = (1,) * (len(y) - 2)
    return ConvShape(y[0], y[1], y[1], tuple(y[2:]), ones, ones, ((0, 0),) * len(ones), ones, y[1])


def _per_channel(bias: Tensor, like: Tensor) -> Tensor:
    return bias.view(-1, *(1,) * (like.dim() - 2))


def _conv_fprop(
    run: Run, x: Tensor, w: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, padding_mode: str, engine: str,
) -> Tensor:  # fmt: skip
    shape, strides = problem(x, w, bias, stride, padding, dilation, groups, padding_mode)
    expect_same(x, x.dtype, weight=w, bias=bias)
    y = empty_strided(shape.y_size, strides, x)
    if x.numel():
        run("conv_fprop", engine, shape, x.dtype, x, w, bias, y)
    elif bias is not None:
        y.copy_(_per_channel(bias, y))
    else:
        y.zero_()
    return y


def _conv_dgrad(
    run: Run, grad_y: Tensor, w: Tensor, bias: Tensor | None, x_size: Ints, channels_last: bool,
    stride: Ints, padding: Ints, dilation: Ints, groups: int, padding_mode: str, engine: str,
) -> Tensor:  # fmt: skip
    shape = shape_of(x_size, w.shape, None, stride, padding, dilation, groups, padding_mode)
    expect_same(grad_y, grad_y.dtype, weight=w, bias=bias)
    grad_x = empty(shape.x_size, grad_y, channels_last)
    if not grad_x.numel():
        return grad_x
    if shape.padding_mode == "zeros":
        run("conv_dgrad", engine, shape, grad_y.dtype, grad_y, w, bias, grad_x)
    else:
        padded = empty(shape.padded.x_size, grad_y, channels_last)
        # No bias: a transposed convolution, which may have one, knows zeros alone.
        run("conv_dgrad", engine, shape.padded, grad_y.dtype, grad_y, w, None, padded)
        run("conv_fold", engine, shape, grad_y.dtype, padded, grad_x)
    return grad_x


def _conv_wgrad(
    run: Run, grad_y: Tensor, x: Tensor, w_size: Ints, channels_last: bool, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, padding_mode: str, engine: str,
) -> Tensor:  # fmt: skip
    shape = shape_of(x.shape, w_size, None, stride, padding, dilation, groups, padding_mode)
    grad_w = empty(shape.w_size, grad_y, channels_last)
    if x.numel():
        run("conv_wgrad", engine, shape, grad_y.dtype, grad_y, x, grad_w)
    else:
        grad_w.zero_()
    return grad_w


def _conv_bgrad(run: Run, grad_y: Tensor, engine: str) -> Tensor:
    grad_bias = empty((grad_y.shape[1],), grad_y)
    if grad_y.numel():
        run("conv_bgrad", engine, _summed(grad_y.shape), grad_y.dtype, grad_y, grad_bias)
    else:
        grad_bias.zero_()
    return grad_bias


@direct
def _conv_gradients(
    run: Run, grad_y: Tensor, x: Tensor, w: Tensor, wanted: tuple[bool, bool, bool], x_size: Ints,
    w_size: Ints, last: bool, *arguments: Any,
) -> list[Tensor]:  # fmt: skip
    """Those of the three gradients that are wanted; of x and w the one that another's gradient needs may be
    None."""
    to_x, to_w, to_bias = wanted
    found = []
    if to_x:
        found.append(_conv_dgrad(run, grad_y, w, None, x_size, last, *arguments))
    if to_w:
        found.append(_conv_wgrad(run, grad_y, x, w_size, last, *arguments))
    if to_bias:
        found.append(_conv_bgrad(run, grad_y, arguments[-1]))
    return found


_ARGUMENTS = "int[] stride, int[] padding, int[] dilation, int groups, str padding_mode, str engine"

conv_fprop = define(
    f"conv_fprop(Tensor x, Tensor w, Tensor? bias, {_ARGUMENTS}) -> Tensor",
    _conv_fprop,
)
conv_dgrad = define(
    "conv_dgrad(Tensor grad_y, Tensor w, Tensor? bias, SymInt[] x_size, bool channels_last, "
    f"{_ARGUMENTS}) -> Tensor",
    _conv_dgrad,
)
conv_wgrad = define(
    f"conv_wgrad(Tensor grad_y, Tensor x, SymInt[] w_size, bool channels_last, {_ARGUMENTS}) -> Tensor",
    _conv_wgrad,
)
conv_bgrad = define("conv_bgrad(Tensor grad_y, str engine) -> Tensor", _conv_bgrad)
