"""Layers of pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnops import functional


def _max_arguments(layer: Any) -> tuple[Any, ...]:
    return (
        layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, layer.return_indices
    )  # fmt: skip


class MaxPool1d(nn.MaxPool1d):
    """``torch.nn.MaxPool1d``: input ``N C W`` or ``C W``; see `cnnops.functional.max_pool1d`."""

    def forward(self, input: Tensor) -> Any:
        return functional.max_pool1d(input, *_max_arguments(self))


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d``: input ``N C H W`` or ``C H W``; see `cnnops.functional.max_pool2d`."""

    def forward(self, input: Tensor) -> Any:
        return functional.max_pool2d(input, *_max_arguments(self))


class MaxPool3d(nn.MaxPool3d):
    """``torch.nn.MaxPool3d``: input ``N C D H W`` or ``C D H W``; see `cnnops.functional.max_pool3d`."""

    def forward(self, input: Tensor) -> Any:
        return functional.max_pool3d(input, *_max_arguments(self))


class MaxUnpool1d(nn.MaxUnpool1d):
    """``torch.nn.MaxUnpool1d``: input ``N C Q`` or ``C Q``; see `cnnops.functional.max_unpool1d`."""

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        window = (self.kernel_size, self.stride, self.padding)
        return functional.max_unpool1d(input, indices, *window, output_size)


class MaxUnpool2d(nn.MaxUnpool2d):
    """``torch.nn.MaxUnpool2d``: input ``N C P Q`` or ``C P Q``; see `cnnops.functional.max_unpool2d`."""

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        window = (self.kernel_size, self.stride, self.padding)
        return functional.max_unpool2d(input, indices, *window, output_size)


class MaxUnpool3d(nn.MaxUnpool3d):
    """``torch.nn.MaxUnpool3d``: input ``N C Z P Q`` or ``C Z P Q``; see `cnnops.functional.max_unpool3d`."""

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        window = (self.kernel_size, self.stride, self.padding)
        return functional.max_unpool3d(input, indices, *window, output_size)


class AvgPool1d(nn.AvgPool1d):
    """``torch.nn.AvgPool1d``: input ``N C W`` or ``C W``; see `cnnops.functional.avg_pool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )  # fmt: skip


class AvgPool2d(nn.AvgPool2d):
    """``torch.nn.AvgPool2d``: input ``N C H W`` or ``C H W``; see `cnnops.functional.avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


class AvgPool3d(nn.AvgPool3d):
    """``torch.nn.AvgPool3d``: input ``N C D H W`` or ``C D H W``; see `cnnops.functional.avg_pool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool3d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


class LPPool1d(nn.LPPool1d):
    """``torch.nn.LPPool1d``: input ``N C W`` or ``C W``; see `cnnops.functional.lp_pool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        kernel_size: Any = self.kernel_size
        return functional.lp_pool1d(
            input, float(self.norm_type), kernel_size, self.stride, self.ceil_mode
        )


class LPPool2d(nn.LPPool2d):
    """``torch.nn.LPPool2d``: input ``N C H W`` or ``C H W``; see `cnnops.functional.lp_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.lp_pool2d(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )


class LPPool3d(nn.LPPool3d):
    """``torch.nn.LPPool3d``: input ``N C D H W`` or ``C D H W``; see `cnnops.functional.lp_pool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.lp_pool3d(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )


class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d``: input ``N C W`` or ``C W``; see
    `cnnops.functional.adaptive_avg_pool1d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d``: input ``N C H W`` or ``C H W``; see
    `cnnops.functional.adaptive_avg_pool2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(input, self.output_size)  # type: ignore[arg-type]


class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """``torch.nn.AdaptiveAvgPool3d``: input ``N C D H W`` or ``C D H W``; see
    `cnnops.functional.adaptive_avg_pool3d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool3d(input, self.output_size)  # type: ignore[arg-type]


class AdaptiveMaxPool1d(nn.AdaptiveMaxPool1d):
    """``torch.nn.AdaptiveMaxPool1d``: input ``N C W`` or ``C W``; see
    `cnnops.functional.adaptive_max_pool1d`.
    """

    def forward(self, input: Tensor) -> Any:
        return functional.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """``torch.nn.AdaptiveMaxPool2d``: input ``N C H W`` or ``C H W``; see
    `cnnops.functional.adaptive_max_pool2d`.
    """

    def forward(self, input: Tensor) -> Any:
        return functional.adaptive_max_pool2d(input, self.output_size, self.return_indices)  # type: ignore[arg-type]


class AdaptiveMaxPool3d(nn.AdaptiveMaxPool3d):
    """``torch.nn.AdaptiveMaxPool3d``: input ``N C D H W`` or ``C D H W``; see
    `cnnops.functional.adaptive_max_pool3d`.
    """

    def forward(self, input: Tensor) -> Any:
        return functional.adaptive_max_pool3d(input, self.output_size, self.return_indices)  # type: ignore[arg-type]
