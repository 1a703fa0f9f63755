"""Normalisation under the names of ``torch.nn.functional``."""

from __future__ import annotations

from torch import Tensor

from cnnops.ops import expect_tensor
from cnnops.ops.entrance import entrance
from cnnops.ops.norm import batch_norm as _batch_norm


@entrance
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation, as ``F.batch_norm(input, running_mean, running_var, weight, bias, …)``.

    input ``N C *``, all others ``C``: `batch_norm_act` without residual and activation, with its dtypes,
    statistics and errors.
    """
    return batch_norm_act(
        input, running_mean, running_var, weight, bias, training, momentum, eps, None, "none"
    )


@entrance
def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Batch normalisation (Ioffe and Szegedy, arXiv:1502.03167), residual addition and activation in one pass
    over memory: ``act(F.batch_norm(input, …) + residual)``.

    input ``N C *``, residual of the same size and dtype; the other tensors ``C``, all of the input's dtype,
    or all float32 beside a half-type input. When `training`, mean and biased variance of each channel come
    from the batch, and ``running = (1 - momentum)·running + momentum·batch`` with the unbiased variance, in
    place; otherwise from `running_mean` and `running_var`. `activation` is one of none, relu, relu6, silu,
    gelu (exact), hardswish, leaky_relu (slope 0.01), sigmoid, tanh. An empty input leaves the running
    statistics as they are.

    The backward is a kernel; the backward's own backward, and tangents, are composed of PyTorch's operations.
    For the backward the input is kept, and with a residual one more: the result, for relu, relu6, leaky_relu,
    sigmoid and tanh (which must not be changed in place then), or the residual, for silu, gelu and hardswish.

    Raises ValueError when training on one value a channel, with eps <= 0, or with only one running
    statistic, and for an unknown activation; RuntimeError for sizes, dtypes or devices that do not fit or
    missing statistics in evaluation; TypeError for arguments of a wrong type.
    """
    expect_tensor("input", input)
    for tensor in (running_mean, running_var, weight, bias, residual):
        if tensor is not None and not isinstance(tensor, Tensor):
            optional = {
                "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias,
                "residual": residual,
            }  # fmt: skip
            expect_tensor(next(name for name, t in optional.items() if t is tensor), tensor)
    statistics = (running_mean, running_var)
    return _batch_norm(
        input, *statistics, weight, bias, training, momentum, eps, residual, activation
    )
