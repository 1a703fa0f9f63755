"""Convolutions whose results meet something on their way to memory:

    y = act(scale * conv(x, w) + bias + residual)         conv_act, conv_transpose_act
    y, mean, var = conv(x, w) + bias, and its moments     for the batch norm that follows: conv_batch_norm_act

so that y is written once, and not read again for a pass that only adds, clamps or counts. Where backward may
ask for gradients, this needs an activation whose derivative y tells, and no scale (whose gradient would need
the sums themselves): then the convolution's own gradients do the rest, of grad_y times that derivative. What
is left, and transforms of torch.func, take convolution and PyTorch's operations one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cnnops import registry
from cnnops.aten.conv import finished
from cnnops.aten.norm import activate, activation_grad, told_by_result
from cnnops.epilogue import Epilogue, expect_activation
from cnnops.ops import (
    DTYPES,
    call,
    define,
    empty,
    empty_strided,
    expect_same,
    is_transformed,
    may_need_gradient,
    new_strides,
    norm,
)
from cnnops.ops import conv as plain
from cnnops.ops.conv import Ints, Run

# ---- what may be called -----------------------------------------------------------------------------------


def conv_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: int | Ints,
    padding: Any,
    dilation: int | Ints,
    groups: int,
    padding_mode: str,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """See `cnnops.functional.conv_act`; x and residual have a batch."""
    arguments = plain.settled(w.shape, stride, padding, dilation, groups, padding_mode)
    x, w, bias, scale, residual = plain.cast(x, w, bias, scale, residual)
    expect_activation(activation)
    engine = registry.engine_for(x.device)
    tensors = (x, w, bias, scale, residual)
    if _fusible(tensors, activation):
        y: Tensor = call(_ConvAct, conv_act_op, *tensors, activation, None, *arguments, engine)
        return y
    rest = (stride, padding, dilation, groups, padding_mode)
    sums = plain.conv(x, w, bias if scale is None else None, *rest)
    return _finished(sums, bias, scale, residual, activation)


def conv_transpose_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: int | Ints,
    padding: int | Ints,
    output_padding: int | Ints,
    groups: int,
    dilation: int | Ints,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """See `cnnops.functional.conv_transpose_act`; x and residual have a batch."""
    of_bias = None if bias is None else bias.shape
    size, *arguments = plain.transposed(
        x.shape, w.shape, of_bias, stride, padding, output_padding, groups, dilation
    )
    x, w, bias, scale, residual = plain.cast(x, w, bias, scale, residual)
    expect_activation(activation)
    engine = registry.engine_for(x.device)
    tensors = (x, w, bias, scale, residual)
    if _fusible(tensors, activation):
        y: Tensor = call(_ConvAct, conv_act_op, *tensors, activation, size, *arguments, engine)
        return y
    rest = (stride, padding, output_padding, groups, dilation)
    sums = plain.conv_transpose(x, w, bias if scale is None else None, *rest)
    return _finished(sums, bias, scale, residual, activation)


def conv_batch_norm_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    geometry: Sequence[Any],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """See `cnnops.functional.conv_batch_norm_act`; `geometry`: stride, padding, dilation, groups, mode."""
    statistics = (running_mean, running_var)
    norm.check(*statistics, training, momentum, eps, activation)
    if not training or x.dtype not in DTYPES or is_transformed():
        z = plain.conv(x, w, bias, *geometry)
        return norm.batch_norm(
            z, *statistics, norm_weight, norm_bias, training, momentum, eps, residual, activation
        )
    arguments = plain.settled(w.shape, *geometry)
    x, w, bias = plain.cast(x, w, bias)
    engine = registry.engine_for(x.device)
    y, mean, var = call(_ConvMoments, conv_moments, x, w, bias, *arguments, engine)
    return norm.batch_norm_given(
        y,
        mean,
        var,
        *statistics,
        norm_weight,
        norm_bias,
        momentum,
        eps,
        residual,
        activation,
        engine,
    )


def _check_sizes(scale: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    for name, t, size in (("scale", scale, y.shape[1:2]), ("residual", residual, y.shape)):
        if t is not None and t.shape != size:
            raise RuntimeError(f"{name}: expected size {list(size)}, got {list(t.shape)}")


def _fusible(tensors: Sequence[Tensor | None], activation: str) -> bool:
    """Whether one kernel can do it all, gradients included."""
    x, _, _, scale, _ = tensors
    if x is None or x.dtype not in DTYPES or is_transformed():
        return False
    if not may_need_gradient(tensors):
        return True
    told = activation == "none" or told_by_result(activation, x.dtype)
    return scale is None and told


def _finished(
    sums: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    """What follows the sums (which have the bias unless there is a scale), differentiable."""
    _check_sizes(scale, residual, sums)
    expect_same(sums, sums.dtype, bias=bias, scale=scale, residual=residual)
    z = sums
    if scale is not None:
        per_channel = (-1, *(1,) * (sums.dim() - 2))
        z = sums * scale.view(per_channel)
        z = z if bias is None else z + bias.view(per_channel)
    return activate(z, residual, activation)


# ---- autograd ---------------------------------------------------------------------------------------------


class _ConvAct(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        y: Tensor = conv_act_op(*arguments)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _, _, _, activation, size, *arguments = inputs
        to_x, to_w = ctx.needs_input_grad[:2]
        kept = None if activation == "none" else output
        ctx.save_for_backward(x if to_w else None, w if to_x else None, kept)
        last = plain.is_last(x, w)
        ctx.call = x.shape, w.shape, last, activation, size is not None, arguments

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, w, y = ctx.saved_tensors
        x_size, w_size, last, activation, transposed, arguments = ctx.call
        to_x, to_w, to_bias, _, to_residual = ctx.needs_input_grad[:5]
        g = activation_grad(grad_y, None, y, activation)
        if transposed:
            grad_x = plain.fprop(g, w, *arguments) if to_x else None
            grad_w = plain.wgrad(x, g, w_size, last, *arguments) if to_w else None
        else:
            grad_x = plain.dgrad(g, w, x_size, last, *arguments) if to_x else None
            grad_w = plain.wgrad(g, x, w_size, last, *arguments) if to_w else None
        grad_b = plain.bgrad(g, arguments[-1]) if to_bias else None
        return grad_x, grad_w, grad_b, None, g if to_residual else None, *(None,) * 8


class _ConvMoments(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = conv_moments(*arguments)
        return results

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        plain.save_for_gradients(ctx, inputs)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: None) -> Any:
        return plain.gradients(ctx, grad_y)


# ---- torch.library ----------------------------------------------------------------------------------------


def _conv_act(
    run: Run, x: Tensor, w: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
    activation: str, size: Ints | None, *arguments: Any,
) -> Tensor:  # fmt: skip
    """`size` is the result's, of a transposed convolution, whose gradient's arguments the others are."""
    *geometry, engine = arguments
    if size is None:
        shape, strides = plain.problem(x, w, bias, *geometry)
        y_size, op = shape.y_size, "conv_fprop"
    else:
        last = plain.is_last(x, w)
        shape = plain.shape_of(size, w.shape, None, *geometry)
        y_size, strides, op = shape.x_size, new_strides(shape.x_size, last), "conv_dgrad"
    expect_same(x, x.dtype, weight=w, bias=bias, scale=scale, residual=residual)
    y = x.new_empty_strided(y_size, strides)
    _check_sizes(scale, residual, y)
    if residual is not None and residual.stride() != y.stride():
        residual = torch.empty_like(y).copy_(residual)
    if scale is not None:
        scale = scale.contiguous()
    epilogue = Epilogue(scale, residual, activation)
    if not x.numel():
        finished(torch.zeros_like(y), bias, epilogue, y)
    elif y.numel():
        run(op, engine, shape, x.dtype, x, w, bias, y, epilogue)
    return y


def _conv_moments(
    run: Run, x: Tensor, w: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *geometry, engine = arguments
    shape, strides = plain.problem(x, w, bias, *geometry)
    expect_same(x, x.dtype, weight=w, bias=bias)
    y = empty_strided(shape.y_size, strides, x)
    mean, var = (empty((shape.K,), x, dtype=norm.statistics_dtype(x)) for _ in range(2))
    if x.numel():
        run("conv_fprop", engine, shape, x.dtype, x, w, bias, y, Epilogue(mean=mean, var=var))
    else:
        finished(torch.zeros_like(y), bias, None, y)
        var.zero_()
        if bias is None:
            mean.zero_()
        else:
            mean.copy_(bias)
    return y, mean, var


_ARGUMENTS = "int[] stride, int[] padding, int[] dilation, int groups, str padding_mode, str engine"

conv_act_op = define(
    "conv_act(Tensor x, Tensor w, Tensor? bias, Tensor? scale, Tensor? residual, str activation, "
    f"SymInt[]? size, {_ARGUMENTS}) -> Tensor",
    _conv_act,
)
conv_moments = define(
    f"conv_moments(Tensor x, Tensor w, Tensor? bias, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _conv_moments,
)
