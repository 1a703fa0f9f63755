"""Batch normalisation, with an optional residual and activation in the same pass:

    y = act(gamma * xhat + beta + residual),   xhat = (x - mean) * rstd

In training mean and rstd are the batch's own and the running statistics are updated; otherwise they come
from the running statistics. The gradient is a kernel. The gradient's gradient is composed of PyTorch's own
operations: they compute the same y once more and differentiate it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from cnnops import registry
from cnnops.aten.norm import ACTIVATIONS, activate
from cnnops.ops import (
    DTYPES,
    cached,
    call,
    define,
    empty,
    expect_bool,
    expect_float,
    expect_same,
    is_channels_last,
)
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
    expect_bool("training", training)
    expect_float("momentum", momentum)
    expect_float("eps", eps)
    _check_statistics(running_mean, running_var, training)
    if training and eps <= 0:
        raise ValueError(f"eps: expected a positive value when training, got {eps}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
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


# ---- autograd -------------------------------------------------------------------------------------------


class _Train(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float,
        activation: str, engine: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        statistics = (running_mean, running_var)
        y, mean, rstd = batch_norm_train(
            x, weight, bias, residual, *statistics, momentum, eps, activation, engine
        )
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        _save(ctx, x, weight, bias, residual, mean, rstd, activation)
        ctx.arguments = (eps, activation, True, engine)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> Any:
        if grad_y is None:
            return (None,) * 10
        return *_gradients(ctx, grad_y), *(None,) * 6


class _Infer(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        running_mean: Tensor, running_var: Tensor, eps: float, activation: str, engine: str,
    ) -> Tensor:  # fmt: skip
        statistics = (running_mean, running_var)
        y: Tensor = batch_norm_infer(
            x, weight, bias, residual, *statistics, eps, activation, engine
        )
        # Copies: training may go on and change the running statistics before the backward comes.
        wide = _statistics_dtype(x)
        mean = running_mean.to(wide, copy=True)
        rstd = torch.rsqrt(running_var.to(wide) + eps)
        _save(ctx, x, weight, bias, residual, mean, rstd, activation)
        ctx.arguments = (eps, activation, False, engine)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        return *_gradients(ctx, grad_y), *(None,) * 5


def _save(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mean: Tensor,
    rstd: Tensor, activation: str,
) -> None:  # fmt: skip
    """Keep what the backward needs; the residual only to know what the activation was applied to."""
    kept = None if activation == "none" else residual
    ctx.save_for_backward(x, weight, bias, kept, mean, rstd)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual, None where none is asked for."""
    wanted = list(ctx.needs_input_grad[:4])
    eps, activation, training, engine = ctx.arguments
    passed_on = None
    if activation == "none" and wanted[3]:
        wanted[3], passed_on = False, grad_y  # nothing stands between the residual and y
    if not any(wanted):
        return None, None, None, passed_on
    rest = (eps, activation, training, wanted, engine)
    grads = iter(call(_Backward, batch_norm_bwd, grad_y, *ctx.saved_tensors, *rest))
    found = [next(grads) if want else None for want in wanted]
    return *found[:3], found[3] if passed_on is None else passed_on


class _Backward(Function):
    @staticmethod
    def forward(
        ctx: Any, grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        residual: Tensor | None, mean: Tensor, rstd: Tensor, eps: float, activation: str, training: bool,
        wanted: list[bool], engine: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tensors = (grad_y, x, weight, bias, residual, mean, rstd)
        ctx.save_for_backward(*tensors)
        ctx.wanted, ctx.arguments = wanted, (eps, activation, training)
        return tuple(batch_norm_bwd(*tensors, eps, activation, training, wanted, engine))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, because grad_y may itself have been computed from x: partial derivatives are wanted.
            views: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            grad_y, x, weight, bias, residual, mean, rstd = views
            y = _composed(x, weight, bias, residual, mean, rstd, *ctx.arguments)
            inputs = (x, weight, bias, residual)
            into = [t for t, want in zip(inputs, ctx.wanted, strict=True) if want]
            outputs = torch.autograd.grad(y, into, grad_y.to(y.dtype), create_graph=True)
        needs = ctx.needs_input_grad[:5]
        asked = [t for t, need in zip((grad_y, *inputs), needs, strict=True) if need]
        # Without a graph a gradient depends on nothing that is asked for: grad_x in evaluation, on x alone.
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        if not pairs:
            return (None,) * 12
        first, chain = zip(*pairs, strict=True)
        second = torch.autograd.grad(first, asked, chain, create_graph=again, allow_unused=True)
        found = iter(second)
        return *(next(found) if need else None for need in needs), *(None,) * 7


def _composed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mean: Tensor,
    rstd: Tensor, eps: float, activation: str, training: bool,
) -> Tensor:  # fmt: skip
    """y by PyTorch's own operations, as wide as mean and rstd, differentiable in the first four."""
    wide = mean.dtype
    per_channel = (-1, *(1,) * (x.dim() - 2))
    z = x.to(wide)
    if training:
        var, mean = torch.var_mean(z, (0, *range(2, x.dim())), correction=0)
        rstd = torch.rsqrt(var + eps)
    z = (z - mean.view(per_channel)) * rstd.view(per_channel)
    z = z if weight is None else z * weight.to(wide).view(per_channel)
    z = z if bias is None else z + bias.to(wide).view(per_channel)
    return activate(z, None if residual is None else residual.to(wide), activation)


# ---- torch.library --------------------------------------------------------------------------------------


def _statistics_dtype(x: Tensor) -> torch.dtype:
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


def _batch_norm_train(
    run: Run, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float, activation: str,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = _checked(x, weight, bias, running_mean, running_var, residual, True)
    y = empty(shape.x_size, x, is_channels_last(x))
    mean, rstd = (empty((shape.C,), x, dtype=_statistics_dtype(x)) for _ in range(2))
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
    residual: Tensor | None, mean: Tensor, rstd: Tensor, eps: float, activation: str, training: bool,
    wanted: Sequence[bool], engine: str,
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
            "batch_norm_bwd", engine, shape, x.dtype, grad_y, x, weight, bias, residual, mean, rstd,
            activation, training, *results,
        )  # fmt: skip
    else:
        for result in found:
            result.zero_()
    return found


_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor? residual"

batch_norm_train = define(
    f"batch_norm_train(Tensor x, {_PARAMETERS}, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "float momentum, float eps, str activation, str engine) -> (Tensor, Tensor, Tensor)",
    _batch_norm_train,
)
batch_norm_infer = define(
    f"batch_norm_infer(Tensor x, {_PARAMETERS}, Tensor running_mean, Tensor running_var, float eps, "
    "str activation, str engine) -> Tensor",
    _batch_norm_infer,
)
batch_norm_bwd = define(
    f"batch_norm_bwd(Tensor grad_y, Tensor x, {_PARAMETERS}, Tensor mean, Tensor rstd, float eps, "
    "str activation, bool training, bool[] wanted, str engine) -> Tensor[]",
    _batch_norm_bwd,
)
