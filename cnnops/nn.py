"""``torch.nn``'s layers on the kernels of this package: subclasses with the same constructor, the same
attributes and the same state_dict. Only the computation is replaced.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cnnops import functional

__all__ = ["AdaptiveAvgPool2d", "AvgPool2d", "BatchNorm2d", "Conv2d", "MaxPool2d"]


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d``: input ``N C H W`` or ``C H W``; see `cnnops.functional.conv2d`.

    Padding modes other than zeros pad the input first.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups
        )


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d``: input ``N C H W`` or ``C H W``; see `cnnops.functional.max_pool2d`."""

    def forward(self, input: Tensor) -> Any:
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode,
            self.return_indices,
        )  # fmt: skip


class AvgPool2d(nn.AvgPool2d):
    """``torch.nn.AvgPool2d``: input ``N C H W`` or ``C H W``; see `cnnops.functional.avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d``; see `cnnops.functional.adaptive_avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(input, self.output_size)  # type: ignore[arg-type]


class BatchNorm2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``: input ``N C H W``; see `cnnops.functional.batch_norm`.

    The batch is counted only once its forward has succeeded, so that a failed one changes nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        tracked = self.training and self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if tracked and self.momentum is None and self.num_batches_tracked is not None:
            momentum = 1.0 / (float(self.num_batches_tracked) + 1.0)  # mean of all batches
        # Outside of training, statistics that were never tracked are the batch's own.
        own = self.training or (self.running_mean is None and self.running_var is None)
        used = tracked or not self.training
        y = functional.batch_norm(
            input, self.running_mean if used else None, self.running_var if used else None, self.weight,
            self.bias, own, momentum, self.eps,
        )  # fmt: skip
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return y
