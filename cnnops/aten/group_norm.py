"""Group and layer norm by PyTorch's own operations.

They compute in the type of mean and rstd: beside a half type PyTorch keeps both as short as the input, and
whether it takes float32 parameters there depends on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnops.aten.norm import _ACTIVATION_GRADS, _to, activate
from cnnops.shapes import GroupShape, LayerShape

aten = torch.ops.aten


def _deliver(results: Sequence[Tensor | None], computed: Sequence[Tensor]) -> None:
    """Copy what was computed to each result that is asked for."""
    for result, found in zip(results, computed, strict=True):
        if result is not None:
            result.copy_(found.view_as(result))


def _form(x: Tensor) -> torch.memory_format:
    """Channels-last if that is how x lies, or contiguous: the kernels take all tensors in one of the two."""
    if x.dim() not in (4, 5) or x.is_contiguous():
        return torch.contiguous_format
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


def group_norm_fwd(
    shape: GroupShape, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str,
    y: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    x, gamma, beta = x.to(mean.dtype), *_to(mean.dtype, weight, bias)
    x = x.contiguous(memory_format=_form(x))
    sizes = (shape.N, shape.C, shape.L, shape.groups)
    z, *statistics = aten.native_group_norm(x, gamma, beta, *sizes, eps)
    y.copy_(activate(z, None, activation))
    _deliver((mean, rstd), statistics)


def group_norm_bwd(
    shape: GroupShape, grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    rstd: Tensor, activation: str, grad_x: Tensor | None, grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:  # fmt: skip
    wide = mean.dtype
    grad_z, x, gamma, beta = grad_y.to(wide), x.to(wide), *_to(wide, weight, bias)
    if activation != "none":
        per_group = (shape.N, shape.groups, *(1,) * (x.dim() - 1))
        per_channel = (-1, *(1,) * len(shape.spatial))
        z = x.unflatten(1, (shape.groups, -1)) - mean.view(per_group)
        z = (z * rstd.view(per_group)).flatten(1, 2)
        z = z if gamma is None else z * gamma.view(per_channel)
        z = z if beta is None else z + beta.view(per_channel)
        grad_z = _ACTIVATION_GRADS[activation](grad_z, z)
    results = (grad_x, grad_weight, grad_bias)
    sizes = (shape.N, shape.C, shape.L, shape.groups)
    wanted = [g is not None for g in results]
    x, grad_z = (t.contiguous(memory_format=_form(x)) for t in (x, grad_z))
    if gamma is None:
        gamma = x.new_ones(shape.C)  # without one there would be no gradient of the bias
    grads = aten.native_group_norm_backward(grad_z, x, mean, rstd, gamma, *sizes, wanted)
    _deliver(results, grads)


def layer_norm_fwd(
    shape: LayerShape, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, y: Tensor,
    mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    x, gamma, beta = x.to(mean.dtype), *_to(mean.dtype, weight, bias)
    found = aten.native_layer_norm(x, shape.normalized, gamma, beta, eps)
    _deliver((y, mean, rstd), found)


def layer_norm_bwd(
    shape: LayerShape, grad_y: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    grad_x: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
) -> None:  # fmt: skip
    wide = mean.dtype
    results = (grad_x, grad_weight, grad_bias)
    wanted = [g is not None for g in results]
    statistics = [t.view(*shape.outer, *(1,) * len(shape.normalized)) for t in (mean, rstd)]
    (gamma,) = _to(wide, weight)
    # Its bias tells the operation only what the bias's gradient looks like.
    beta = None if grad_bias is None else torch.zeros_like(grad_bias, dtype=wide)
    grads = aten.native_layer_norm_backward(
        grad_y.to(wide), x.to(wide), shape.normalized, *statistics, gamma, beta, wanted
    )
    _deliver(results, grads)
