"""Batch normalisation, with an optional residual and activation in the same pass:

    y = act(gamma * xhat + beta + residual),   xhat = (x - mean) * rstd

In training mean and rstd are the batch's own and the running statistics are updated; otherwise they come
from the running statistics. The gradient is a kernel. It finds what the activation was applied to again from
x and, where there is one, the residual; or it is told y, for activations whose derivative y tells. So nothing
is kept for it that the layers before and after do not keep for themselves. The gradient's own gradient, and
tangents, are composed of PyTorch's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from cnnops import registry
from cnnops.aten.norm import activate, activation_grad, told_by_result
from cnnops.epilogue import expect_activation
from cnnops.ops import (
    DTYPES,
    cached,
    call,
    define,
    direct,
    empty,
    expect_bool,
    expect_float,
    expect_same,
    is_channels_last,
    is_stack,
)
from cnnops.ops.vmap import folded, unfolded
from cnnops.shapes import NormShape

Run = Callable[..., None]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Batch norm of x ``N C *spatial``; see `cnnops.functional.batch_norm_act` for arguments and errors."""
    check(running_mean, running_var, training, momentum, eps, activation)
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES:
        if not torch.compiler.is_compiling():
            op = "batch_norm_train" if training else "batch_norm_infer"
            registry.choose(op, engine, NormShape.of(x.shape, training=training), x.dtype)
        z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return activate(z, residual, activation)
    tensors = (x, weight, bias, residual, running_mean, running_var)
    y: Tensor
    if training:
        y = call(_Train, batch_norm_train, *tensors, momentum, eps, activation, engine)[0]
    else:
        y = call(_Infer, batch_norm_infer, *tensors, eps, activation, engine)
    return y


def check(
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, momentum: float, eps: float,
    activation: str,
) -> None:  # fmt: skip
    """Raises for what is wrong whatever x is."""
    expect_bool("training", training)
    expect_float("momentum", momentum)
    expect_float("eps", eps)
    _check_statistics(running_mean, running_var, training)
    if training and eps <= 0:
        raise ValueError(f"eps: expected a positive value when training, got {eps}")
    expect_activation(activation)


def _check_statistics(mean: Tensor | None, var: Tensor | None, training: bool) -> None:
    if mean is not None and var is not None and not (mean.requires_grad or var.requires_grad):
        return
    for name, t in (("running_mean", mean), ("running_var", var)):
        if t is None and not training:
            raise RuntimeError(f"{name}: expected a Tensor in evaluation mode, got None")
        if t is not None and t.requires_grad:
            raise RuntimeError(
                f"{name}: expected a Tensor without gradient, got requires_grad=True"
            )
    if (mean is None) != (var is None):
        raise ValueError("running_mean, running_var: expected both or neither, got one")


def batch_norm_given(
    x: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, momentum: float, eps: float, residual: Tensor | None,
    activation: str, engine: str,
) -> Tensor:  # fmt: skip
    """`batch_norm` in training of an x whose `mean` and biased `var` are known already: x is read once.

    Both are results of an op that computed x, without a gradient of their own: what they owe to x is part of
    this one's gradient.
    """
    values = x.numel() // x.shape[1]
    if values == 1:
        NormShape.of(x.shape, training=True)  # raises
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if t is not None and t.shape != mean.shape:
            raise RuntimeError(f"{name}: expected size {list(mean.shape)}, got {list(t.shape)}")
    y: Tensor = call(
        _Given, _normalised_by, x, weight, bias, residual, mean, var, eps, activation, engine
    )
    if values:
        update_running(running_mean, running_var, mean, var * (values / (values - 1)), momentum)
    return y


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, unbiased: Tensor, momentum: float
) -> None:  # fmt: skip
    """Moves running statistics towards those of a batch, in place, in the batch's dtype: all of them, or
    where memory runs out none."""
    pairs = ((running_mean, mean), (running_var, unbiased))
    with torch.no_grad():
        moved = [
            (running, (1 - momentum) * running.to(value.dtype) + momentum * value)
            for running, value in pairs
            if running is not None
        ]
        for running, result in moved:
            running.copy_(result)


# ---- autograd -------------------------------------------------------------------------------------------


class _Train(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = batch_norm_train(*arguments)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, residual, _, _, _, eps, activation, engine = inputs
        y, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.arguments = (eps, activation, True, engine)
        _save(ctx, x, weight, bias, residual, y, mean, rstd, activation)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> Any:
        if grad_y is None:
            return (None,) * 10
        return *_gradients(ctx, grad_y), *(None,) * 6

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None, None]:
        *inputs, y, mean, rstd = ctx.saved_tensors
        return _tangent(ctx, inputs[:4], y, mean, rstd, *tangents[:4]), None, None


def _normalised_by(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mean: Tensor, var: Tensor,
    *arguments: Any,
) -> Tensor:  # fmt: skip
    vectors = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
    y: Tensor = batch_norm_infer(x, *vectors, residual, mean, var, *arguments)
    return y


class _Given(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _normalised_by(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, bias, residual, mean, var, eps, activation, engine = inputs
        ctx.set_materialize_grads(False)
        ctx.arguments = (eps, activation, True, engine)
        _save(ctx, x, weight, bias, residual, output, mean, torch.rsqrt(var + eps), activation)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> Any:
        if grad_y is None:
            return (None,) * 9
        return *_gradients(ctx, grad_y), *(None,) * 5


class _Infer(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        y: Tensor = batch_norm_infer(*arguments)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, bias, residual, running_mean, running_var, eps, activation, engine = inputs
        ctx.set_materialize_grads(False)
        ctx.arguments = (eps, activation, False, engine)
        mean, rstd = _frozen(running_mean, running_var, eps)
        _save(ctx, x, weight, bias, residual, output, mean, rstd, activation)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> Any:
        if grad_y is None:
            return (None,) * 9
        return *_gradients(ctx, grad_y), *(None,) * 5

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        *inputs, y = ctx.saved_tensors
        running_mean, running_var = inputs[4:6]
        statistics = _frozen(running_mean, running_var, ctx.arguments[0])
        return _tangent(ctx, inputs[:4], y, *statistics, *tangents[:4])


def _frozen(running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and rstd as copies: training may go on and change running statistics before the backward comes."""
    wide = statistics_dtype(running_mean)
    return running_mean.to(wide, copy=True), torch.rsqrt(running_var.to(wide) + eps)


def _save(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, y: Tensor,
    mean: Tensor, rstd: Tensor, activation: str,
) -> None:  # fmt: skip
    """Keep what the backward needs to know the activation's derivative, and no more."""
    told = residual is not None and told_by_result(activation, x.dtype)
    if told or activation == "none":
        residual = None
        bias = bias if weight is None else None  # which then tells the gradients' dtype
    ctx.save_for_backward(x, weight, bias, residual, y if told else None, mean, rstd)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual, None where none is asked for."""
    wanted = list(ctx.needs_input_grad[:4])
    eps, activation, training, engine = ctx.arguments
    passed_on = None
    if activation == "none" and wanted[3]:
        wanted[3], passed_on = False, grad_y  # nothing stands between the residual and y
    if not any(wanted):
        return None, None, None, passed_on
    arguments = (grad_y, *ctx.saved_tensors, eps, activation, training, wanted)
    # The usual case is that of gradients nobody asks gradients of.
    found = None if torch.is_grad_enabled() else _backward_at_once(*arguments, engine)
    if found is not None:
        pass
    elif forward_ad._current_level >= 0 or is_stack(grad_y):
        found = _composed_bwd(*arguments)
    else:
        found = call(_Backward, batch_norm_bwd, *arguments, engine)
    grads = iter(found)
    all_grads = [next(grads) if want else None for want in wanted]
    return *all_grads[:3], all_grads[3] if passed_on is None else passed_on


class _Backward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(batch_norm_bwd(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        *tensors, eps, activation, training, wanted, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.arguments = (eps, activation, training, wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tensors, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:6])
        _, activation, training, wanted = ctx.arguments
        told = activation == "none" or tensors[5] is not None
        if told and not training and not wanted[1]:
            needs[1] = False  # x is in none of the results
        asked = [i for i, need in enumerate(needs) if need]
        if not asked:
            return (None,) * 13

        def gradients(*variables: Tensor) -> tuple[Tensor, ...]:
            given = dict(enumerate(tensors)) | dict(zip(asked, variables, strict=True))
            return tuple(_composed_bwd(*given.values(), *ctx.arguments))

        # Not torch.autograd.grad: what a transform of torch.func saved may not require gradients any more.
        found: Any = torch.func.vjp(gradients, *(tensors[i] for i in asked))
        outputs, pullback = found
        chain = tuple(
            o.new_zeros(()).expand_as(o) if g is None else g
            for o, g in zip(outputs, grads, strict=True)
        )
        second = dict(zip(asked, pullback(chain), strict=True))
        return *(second.get(i) for i in range(6)), *(None,) * 7


# ---- the same by PyTorch's own operations, differentiable ------------------------------------------------


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, y: Tensor | None,
    mean: Tensor, rstd: Tensor, eps: float, activation: str, training: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """x̂, ``gamma * rstd`` per channel, and the activation's argument unless y stands for it."""
    per_channel = (-1, *(1,) * (x.dim() - 2))
    if training:
        var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
        rstd = torch.rsqrt(var + eps)
    xhat = (x - mean.view(per_channel)) * rstd.view(per_channel)
    scale = (rstd if weight is None else rstd * weight).view(per_channel)
    if activation == "none" or y is not None:
        return xhat, scale, None
    z = xhat if weight is None else xhat * weight.view(per_channel)
    z = z if bias is None else z + bias.view(per_channel)
    return xhat, scale, z if residual is None else z + residual


def _widened(dtype: torch.dtype, *tensors: Tensor | None) -> Any:
    return [None if t is None else t.to(dtype) for t in tensors]


def _centred(g: Tensor, xhat: Tensor) -> Tensor:
    """g without its parts along 1 and along x̂, which a normalised tensor cannot change by."""
    axes = (0, *range(2, g.dim()))
    return g - g.mean(axes, keepdim=True) - xhat * (g * xhat).mean(axes, keepdim=True)


def _composed_bwd(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    y: Tensor | None, mean: Tensor, rstd: Tensor, eps: float, activation: str, training: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """`batch_norm_bwd`."""
    axes = (0, *range(2, x.dim()))
    parameter = next((t.dtype for t in (weight, bias) if t is not None), x.dtype)
    dtype = x.dtype
    grad_y, x, weight, bias, residual, y = _widened(
        mean.dtype, grad_y, x, weight, bias, residual, y
    )
    rule = (eps, activation, training)
    xhat, scale, z = _normalised(x, weight, bias, residual, y, mean, rstd, *rule)
    g = activation_grad(grad_y, z, y, activation)
    found = []
    if wanted[0]:
        found.append((scale * (_centred(g, xhat) if training else g)).to(dtype))
    if wanted[1]:
        found.append((g * xhat).sum(axes).to(parameter))
    if wanted[2]:
        found.append(g.sum(axes).to(parameter))
    if wanted[3]:
        found.append(g.to(dtype))
    return found


def _tangent(
    ctx: Any, inputs: Sequence[Tensor | None], y: Tensor, mean: Tensor, rstd: Tensor,
    of_x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None,
    of_residual: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """The tangent of y."""
    *rule, _ = ctx.arguments
    _, activation, training = rule
    dtype = y.dtype
    x, weight, bias, residual = _widened(mean.dtype, *inputs)
    xhat, scale, z = _normalised(x, weight, bias, residual, None, mean, rstd, *rule)
    per_channel = (-1, *(1,) * (x.dim() - 2))
    of_x, of_weight, of_bias, of_residual = _widened(
        mean.dtype, of_x, of_weight, of_bias, of_residual
    )
    tangent = torch.zeros_like(xhat)
    if of_x is not None:
        tangent = tangent + scale * (_centred(of_x, xhat) if training else of_x)
    if of_weight is not None:
        tangent = tangent + xhat * of_weight.view(per_channel)
    if of_bias is not None:
        tangent = tangent + of_bias.view(per_channel)
    if of_residual is not None:
        tangent = tangent + of_residual
    return activation_grad(tangent, z, None, activation).to(dtype)


# ---- torch.library --------------------------------------------------------------------------------------


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the mean and rstd of `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


_shape = cached(NormShape.of)


def _checked(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, residual: Tensor | None, training: bool,
) -> NormShape:  # fmt: skip
    """The problem. RuntimeError unless per-channel tensors have x's dtype, or all float32 beside a half x."""
    tensors = (weight, bias, running_mean, running_var, residual)
    shape = _shape(x.shape, *[None if t is None else t.shape for t in tensors], training)
    dtype = x.dtype
    if dtype not in (torch.float32, torch.float64):
        first = next((t.dtype for t in tensors[:4] if t is not None), dtype)
        dtype = first if first == torch.float32 else dtype
    expect_same(
        x, dtype, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    if residual is not None:
        expect_same(x, x.dtype, residual=residual)
    return shape


def _batch_norm_stats(run: Run, x: Tensor, engine: str) -> tuple[Tensor, Tensor]:
    shape = _shape(x.shape)
    mean, var = (empty((shape.C,), x, dtype=statistics_dtype(x)) for _ in range(2))
    if x.numel():
        run("batch_norm_stats", engine, shape, x.dtype, x, mean, var)
    else:
        mean.zero_()
        var.zero_()
    return mean, var


def _batch_norm_train(
    run: Run, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float, activation: str,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = _checked(x, weight, bias, running_mean, running_var, residual, True)
    y = empty(shape.x_size, x, is_channels_last(x))
    mean, rstd = (empty((shape.C,), x, dtype=statistics_dtype(x)) for _ in range(2))
    if x.numel():
        run(
            "batch_norm_train", engine, shape, x.dtype, x, weight, bias, residual, running_mean, running_var,
            momentum, eps, activation, y, mean, rstd,
        )  # fmt: skip
    else:
        mean.zero_()
        rstd.zero_()
    return y, mean, rstd


def _batch_norm_infer(
    run: Run, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor, running_var: Tensor, eps: float, activation: str, engine: str,
) -> Tensor:  # fmt: skip
    shape = _checked(x, weight, bias, running_mean, running_var, residual, False)
    y = empty(shape.x_size, x, is_channels_last(x))
    if x.numel():
        run(
            "batch_norm_infer", engine, shape, x.dtype, x, weight, bias, residual, running_mean, running_var,
            eps, activation, y,
        )  # fmt: skip
    return y


def _batch_norm_bwd(
    run: Run, grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, y: Tensor | None, mean: Tensor, rstd: Tensor, eps: float, activation: str,
    training: bool, wanted: Sequence[bool], engine: str,
) -> list[Tensor]:  # fmt: skip
    shape = _shape(x.shape)
    per_channel = next((t.dtype for t in (weight, bias) if t is not None), x.dtype)
    last = is_channels_last(x)
    results = [
        empty(shape.x_size, x, last) if wanted[0] else None,
        empty((shape.C,), x, dtype=per_channel) if wanted[1] else None,
        empty((shape.C,), x, dtype=per_channel) if wanted[2] else None,
        empty(shape.x_size, x, last) if wanted[3] else None,
    ]
    found = [r for r in results if r is not None]
    if x.numel():
        run(
            "batch_norm_bwd", engine, shape, x.dtype, grad_y, x, weight, bias, residual, y, mean, rstd,
            activation, training, *results,
        )  # fmt: skip
    else:
        for result in found:
            result.zero_()
    return found


_backward_at_once = direct(_batch_norm_bwd)


# ---- torch.func.vmap -------------------------------------------------------------------------------------
# Channels of all maps stand side by side: each is normalised alone in any case.


def _side_by_side(
    operation: Callable[..., Any], tensors: int, info: Any, in_dims: Sequence[int | None], *arguments: Any
) -> tuple[Any, Any]:  # fmt: skip
    """The rule of an operation whose first `tensors` arguments are images, or have one value a channel."""
    maps = info.batch_size
    together = [
        t if t is None else folded(t, dim, maps, _channel_axis(t.dim() - (dim is not None)))
        for t, dim in zip(arguments[:tensors], in_dims, strict=False)
    ]
    results = operation(*together, *arguments[tensors:])
    if isinstance(results, Tensor):
        return unfolded(results, maps, 1), 1
    at = [_channel_axis(r.dim()) for r in results]
    apart = [unfolded(r, maps, axis) for r, axis in zip(results, at, strict=True)]
    return type(results)(apart), type(results)(at)


def _channel_axis(dims: int) -> int:
    return 1 if dims > 1 else 0


def _vmap_train(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
    statistics = list(zip(arguments[4:6], in_dims[4:6], strict=True))
    if any(t is not None and dim is None for t, dim in statistics):
        raise RuntimeError(
            "running_mean, running_var: expected mapped tensors, as they are updated for every map of a "
            "mapped input, got tensors that all maps share; track_running_stats=False does without them"
        )
    # Copies of which `folded` makes a view: what these are of may lie otherwise.
    form = torch.contiguous_format
    moved = [
        None if t is None else t.movedim(dim, 0).clone(memory_format=form) for t, dim in statistics
    ]
    dims = (*in_dims[:4], *(None if t is None else 0 for t in moved), *in_dims[6:])
    updated = (*arguments[:4], *moved, *arguments[6:])
    results = _side_by_side(batch_norm_train, 6, info, dims, *updated)
    for (t, dim), values in zip(statistics, moved, strict=True):
        if t is not None:
            t.movedim(dim, 0).copy_(values)
    return results


# ---- torch.library: the operations -----------------------------------------------------------------------

_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor? residual"

batch_norm_stats: Callable[..., Any] = define(
    "batch_norm_stats(Tensor x, str engine) -> (Tensor, Tensor)",
    _batch_norm_stats,
    lambda *arguments: _side_by_side(batch_norm_stats, 1, *arguments),
)
batch_norm_train: Callable[..., Any] = define(
    f"batch_norm_train(Tensor x, {_PARAMETERS}, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "float momentum, float eps, str activation, str engine) -> (Tensor, Tensor, Tensor)",
    _batch_norm_train,
    _vmap_train,
)
batch_norm_infer: Callable[..., Any] = define(
    f"batch_norm_infer(Tensor x, {_PARAMETERS}, Tensor running_mean, Tensor running_var, float eps, "
    "str activation, str engine) -> Tensor",
    _batch_norm_infer,
    lambda *arguments: _side_by_side(batch_norm_infer, 6, *arguments),
)
batch_norm_bwd: Callable[..., Any] = define(
    f"batch_norm_bwd(Tensor grad_y, Tensor x, {_PARAMETERS}, Tensor? y, Tensor mean, Tensor rstd, float eps, "
    "str activation, bool training, bool[] wanted, str engine) -> Tensor[]",
    _batch_norm_bwd,
    lambda *arguments: _side_by_side(batch_norm_bwd, 8, *arguments),
)
