"""Batch norm in training over the batches of several processes, by torch.distributed.

    forward     local mean and variance → all_gather → merged → normalise, as in evaluation
    backward    local Σg and Σg·x̂ → all_reduce → grad_x = γ·rstd·(g - Σg/M - x̂·Σ(g·x̂)/M)

with M values a channel in all processes together. Statistics travel in float64, and every process merges all
of them in the order of ranks: all have the same bits. A process without images takes part with a count of 0.
The kernels are those of batch norm, and keep for the backward what those of `cnnops.ops.norm` do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cnnops import registry
from cnnops.aten.norm import told_by_result
from cnnops.ops import DTYPES, call
from cnnops.ops.norm import batch_norm_bwd, batch_norm_infer, batch_norm_stats, update_running


def group_of(group: Any) -> Any:
    """The process group to synchronise over, by default all processes; None where there is nobody else."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
    group: Any,
) -> Tensor:
    """Batch norm of x ``N C *spatial`` in training, with the statistics of every process in `group`.

    All of them must call this, with as many channels and in the same dtype; batches may differ, and be empty.
    Raises ValueError where there is only one value a channel in all, RuntimeError for dtypes that no kernel
    takes and for tensors that do not fit.
    """
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"input: expected a floating-point dtype of 16 to 64 bits, got {x.dtype}"
        )
    engine = registry.engine_for(x.device)
    y: Tensor = call(
        _Sync, _forward, x, weight, bias, residual, running_mean, running_var, momentum, eps, activation,
        group, engine,
    )[0]  # fmt: skip
    return y


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float, activation: str,
    group: Any, engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and what the backward needs: mean, rstd, and how many values a channel they are of."""
    mean, var = batch_norm_stats(x, engine)
    values = x.numel() // x.shape[1]
    total, mean64, var64 = _merged(values, mean, var, group)
    if values < 2 and float(total) < 2:  # then every process finds this
        if float(total) == 1:
            raise ValueError(
                "input: expected more than 1 value per channel when training, got 1 in all processes"
            )
        running_mean = running_var = None  # nothing was seen
    wide = mean.dtype
    mean, var = mean64.to(wide), var64.to(wide)
    vectors = (None if t is None else t.to(wide) for t in (weight, bias))
    y = batch_norm_infer(x, *vectors, residual, mean, var, eps, activation, engine)
    rstd = torch.rsqrt(var64 + eps).to(wide)
    update_running(running_mean, running_var, mean64, var64 * (total / (total - 1)), momentum)
    return y, mean, rstd, total


def _merged(values: int, mean: Tensor, var: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased variance of all processes' values, in float64."""
    C = mean.numel()
    local = torch.cat(
        (mean.new_full((1,), values, dtype=torch.float64), mean.double(), var.double())
    )
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group)
    counts, means, variances = torch.stack(gathered).split((1, C, C), 1)
    total = counts.sum()
    parts = counts / total.clamp(min=1)
    merged = (parts * means).sum(0)
    return total, merged, (parts * (variances + (means - merged).square())).sum(0)


class _Sync(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, _, _, _, _, activation, group, engine = inputs
        y, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        told = residual is not None and told_by_result(activation, x.dtype)
        plain = told or activation == "none"
        kept = None if plain else residual
        ctx.save_for_backward(
            x, weight, bias if weight is None or not plain else None, kept, y if told else None, *statistics
        )  # fmt: skip
        ctx.arguments = (activation, group, engine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> Any:
        x, weight, bias, residual, y, mean, rstd, total = ctx.saved_tensors
        activation, group, engine = ctx.arguments
        to_x, to_weight, to_bias, to_residual = ctx.needs_input_grad[:4]
        if grad_y is None:
            grad_y = torch.zeros_like(x)  # the other processes wait for this one's sums
        g, sum_g, sum_gx = grad_y, None, None
        if to_x or to_weight or to_bias or activation != "none":
            wide = mean.dtype
            gamma, beta = (None if t is None else t.to(wide) for t in (weight, bias))
            if gamma is None and beta is None and x.dtype != wide:
                gamma = torch.ones_like(mean)  # its dtype is that of the sums
            wanted = [False, to_x or to_weight, to_x or to_bias, activation != "none"]
            found = iter(
                batch_norm_bwd(
                    grad_y,
                    x,
                    gamma,
                    beta,
                    residual,
                    y,
                    mean,
                    rstd,
                    0.0,
                    activation,
                    False,
                    wanted,
                    engine,
                )  # fmt: skip
            )
            sum_gx, sum_g, g_z = (next(found) if want else None for want in wanted[1:])
            g = g if g_z is None else g_z
        grad_x = None
        if to_x and sum_g is not None and sum_gx is not None:
            sums = torch.cat((sum_g, sum_gx)).double()
            dist.all_reduce(sums, group=group)
            of_g, of_gx = (-sums / total).split(mean.numel())
            scale = rstd.double() if weight is None else rstd.double() * weight
            # γ·rstd comes last: the cancellation is over before anything is rounded to a half type.
            vectors = (v.to(mean.dtype) for v in (of_gx * rstd, of_g))
            grad_x = batch_norm_infer(
                x, *vectors, g, mean, torch.ones_like(mean), 0.0, "none", engine
            )
            grad_x.mul_(scale.to(mean.dtype).view(-1, *(1,) * (x.dim() - 2)))
        parameter = next((t.dtype for t in (weight, bias) if t is not None), None)
        return (
            grad_x,
            sum_gx.to(parameter) if to_weight and sum_gx is not None else None,
            sum_g.to(parameter) if to_bias and sum_g is not None else None,
            g if to_residual else None,
            *(None,) * 7,
        )
