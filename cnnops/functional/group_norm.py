"""Normalisation by statistics of each image alone, under the names of ``torch.nn.functional``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cnnops.ops import expect_tensor
from cnnops.ops.entrance import entrance
from cnnops.ops.group_norm import group_norm as _group_norm
from cnnops.ops.group_norm import instance_norm as _instance_norm
from cnnops.ops.group_norm import layer_norm as _layer_norm


def _expect_tensors(input: Tensor, **others: Tensor | None) -> None:
    expect_tensor("input", input)
    for name, tensor in others.items():
        if tensor is not None:
            expect_tensor(name, tensor)


@entrance
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group normalisation, as ``F.group_norm(input, num_groups, weight, bias, eps)``.

    input ``N C *``, weight and bias ``C``: `group_norm_act` without activation, with its dtypes, statistics
    and errors.
    """
    return group_norm_act(input, num_groups, weight, bias, eps, "none")


@entrance
def group_norm_act(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "relu",
) -> Tensor:
    """Group normalisation (Wu and He, arXiv:1803.08494) and activation in one pass over memory:
    ``act(F.group_norm(input, num_groups, weight, bias, eps))``.

    input ``N C *``, weight and bias ``C``, both of the input's dtype or both float32 beside a half-type
    input. Mean and biased variance are those of every image's ``C / num_groups`` neighbouring channels. A
    channels-last input gives a channels-last result, on GPUs too, where PyTorch's becomes contiguous.
    `activation` is one of none, relu, relu6, silu, gelu (exact), hardswish, leaky_relu (slope 0.01),
    sigmoid, tanh. Under autocast on a GPU the computation and the result are float32, as PyTorch has it.

    The backward is a kernel; the backward's own backward is composed of PyTorch's operations.

    Raises RuntimeError for sizes, dtypes or devices that do not fit; ValueError for a single value in all,
    and for an unknown activation; ZeroDivisionError for 0 groups; TypeError for arguments of a wrong type.
    """
    _expect_tensors(input, weight=weight, bias=bias)
    return _group_norm(input, num_groups, weight, bias, eps, activation)


@entrance
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation (Ba, Kiros and Hinton, arXiv:1607.06450), as ``F.layer_norm(input,
    normalized_shape, weight, bias, eps)``.

    input ``* normalized_shape``; weight and bias of size `normalized_shape`, both of the input's dtype or
    both float32 beside a half-type input. Mean and biased variance are those of the last
    ``len(normalized_shape)`` axes. The result is contiguous, and float32 under autocast on a GPU, as
    PyTorch's.

    Raises RuntimeError for sizes, dtypes or devices that do not fit; TypeError for arguments of a wrong type.
    """
    _expect_tensors(input, weight=weight, bias=bias)
    return _layer_norm(input, normalized_shape, weight, bias, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Instance normalisation (Ulyanov, Vedaldi and Lempitsky, arXiv:1607.08022), as ``F.instance_norm(input,
    running_mean, running_var, weight, bias, …)``.

    input ``N C *``, the other tensors ``C``. With `use_input_stats`, mean and biased variance are those of
    every image's channel, and running statistics, where given, become
    ``(1 - momentum)·running + momentum·batch`` with the batch's average of means and of unbiased variances,
    in place; an empty batch leaves them as they are. Otherwise they are what the input is normalised by. The
    result is contiguous, as PyTorch's.

    Raises ValueError with `use_input_stats` for one place a channel, and for only one running statistic;
    RuntimeError for sizes, dtypes or devices that do not fit and for missing statistics; IndexError for an
    input without channels; TypeError for arguments of a wrong type.
    """
    _expect_tensors(
        input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    statistics = (running_mean, running_var)
    return _instance_norm(input, *statistics, weight, bias, use_input_stats, momentum, eps)
