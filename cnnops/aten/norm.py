"""Batch norm by PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnops.shapes import NormShape

aten = torch.ops.aten

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _silu_grad(grad: Tensor, z: Tensor) -> Tensor:
    """As ``aten.silu_backward``, which has no derivative of its own."""
    s = torch.sigmoid(z)
    return grad * s * (1 + z * (1 - s))


_ACTIVATION_GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, z: aten.threshold_backward(grad, z, 0),
    "relu6": lambda grad, z: aten.hardtanh_backward(grad, z, 0, 6),
    "silu": _silu_grad,
    "gelu": aten.gelu_backward,
    "hardswish": aten.hardswish_backward,
    "leaky_relu": lambda grad, z: aten.leaky_relu_backward(grad, z, 0.01, False),
    "sigmoid": lambda grad, z: aten.sigmoid_backward(grad, torch.sigmoid(z)),
    "tanh": lambda grad, z: aten.tanh_backward(grad, torch.tanh(z)),
}

_GRADS_OF_RESULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Piecewise linear: the result lies in the piece that the argument does.
    **{name: _ACTIVATION_GRADS[name] for name in ("relu", "relu6", "leaky_relu")},
    "sigmoid": aten.sigmoid_backward,
    "tanh": aten.tanh_backward,
}


def told_by_result(activation: str, dtype: torch.dtype) -> bool:
    """Whether the result of this type tells the activation's derivative: ``y·(1 - y)`` and ``1 - y²`` not
    where y was rounded to a half type, since near 1 little of them is left.
    """
    exact = activation not in ("sigmoid", "tanh") or dtype.itemsize > 2
    return activation in _GRADS_OF_RESULTS and exact


def activate(z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """``activation(z + residual)``, differentiable."""
    return _ACTIVATIONS[activation](z if residual is None else z + residual)


def activation_grad(grad: Tensor, z: Tensor | None, y: Tensor | None, activation: str) -> Tensor:
    """The gradient of the activation's argument, from the argument z or else the result y; differentiable."""
    if activation == "none":
        return grad
    if y is not None:
        return _GRADS_OF_RESULTS[activation](grad, y)
    return _ACTIVATION_GRADS[activation](grad, z)  # type: ignore[arg-type]


def _to(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def _addend(x: Tensor, residual: Tensor | None) -> Tensor:
    """x, wide where something is added to what becomes of it: rounded before, a sum near zero may change its
    sign, and with it what the backward takes for the activation's derivative."""
    return x if residual is None else x.to(torch.promote_types(x.dtype, torch.float32))


def batch_norm_stats(shape: NormShape, x: Tensor, mean: Tensor, var: Tensor) -> None:
    wide = x.to(mean.dtype)
    for result, value in zip(
        (var, mean), torch.var_mean(wide, (0, *range(2, x.dim())), correction=0), strict=True
    ):
        result.copy_(value)


def batch_norm_train(
    shape: NormShape, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float, activation: str,
    y: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    # Per-channel tensors go in as wide as mean and rstd come out, or a half type would round both.
    gamma, beta = _to(mean.dtype, weight, bias)
    # Where memory may yet run out, copies are moved, and become the running statistics in the end.
    asks_more = activation != "none" or residual is not None
    average, variance = (
        None if t is None else t.to(mean.dtype, copy=asks_more) for t in (running_mean, running_var)
    )
    z, batch_mean, batch_rstd = aten.native_batch_norm(
        _addend(x, residual), gamma, beta, average, variance, True, momentum, eps
    )
    y.copy_(activate(z, residual, activation))
    mean.copy_(batch_mean)
    rstd.copy_(batch_rstd)
    for running, updated in ((running_mean, average), (running_var, variance)):
        if running is not None and updated is not None and running is not updated:
            running.copy_(updated)


def batch_norm_infer(
    shape: NormShape, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor, running_var: Tensor, eps: float, activation: str, y: Tensor,
) -> None:  # fmt: skip
    if residual is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = _to(wide, weight, bias)
        running_mean, running_var = running_mean.to(wide), running_var.to(wide)
    x = _addend(x, residual)
    z = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    y.copy_(activate(z, residual, activation))


def batch_norm_bwd(
    shape: NormShape, grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, y: Tensor | None, mean: Tensor, rstd: Tensor, activation: str, training: bool,
    grad_x: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
    grad_residual: Tensor | None,
) -> None:  # fmt: skip
    gamma, beta = _to(mean.dtype, weight, bias)
    z = None
    if activation != "none":
        per_channel = (-1, *(1,) * len(shape.spatial))
        x, grad_y = x.to(mean.dtype), grad_y.to(mean.dtype)
        y = None if y is None else y.to(mean.dtype)
        if y is None:
            z = (x - mean.view(per_channel)) * rstd.view(per_channel)
            z = z if gamma is None else z * gamma.view(per_channel)
            z = z if beta is None else z + beta.view(per_channel)
            z = z if residual is None else z + residual
    grad_z = activation_grad(grad_y, z, y, activation)
    results = (grad_x, grad_weight, grad_bias)
    wanted = [g is not None for g in results]
    statistics = (mean, rstd.pow(-2), mean, rstd)
    grads = aten.native_batch_norm_backward(grad_z, x, gamma, *statistics, training, 0.0, wanted)
    for result, grad in zip((*results, grad_residual), (*grads, grad_z), strict=True):
        if result is not None:
            result.copy_(grad)
