"""Layers of pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnops import functional


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
