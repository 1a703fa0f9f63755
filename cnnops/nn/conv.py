"""Layers of convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnops import functional
from cnnops.ops import batched
from cnnops.ops.conv import conv


def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What all convolutions of ``torch.nn`` compute by; here the mode of padding is part of the kernel."""
    arguments = (self.stride, self.padding, self.dilation, self.groups)
    dims = len(self.kernel_size)
    if self.padding_mode == "zeros":
        function = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
        return function(input, weight, bias, *arguments)
    x, alone = batched(input, dims)
    y = conv(x, weight, bias, *arguments, self.padding_mode)
    return y.squeeze(0) if alone else y


class Conv1d(nn.Conv1d):
    """``torch.nn.Conv1d``: input ``N C W`` or ``C W``; see `cnnops.functional.conv1d`.

    Padding of the modes reflect, replicate and circular is read in place: no padded copy is made.
    """

    _conv_forward = _conv_forward


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d``: input ``N C H W`` or ``C H W``; see `cnnops.functional.conv2d`.

    Padding of the modes reflect, replicate and circular is read in place: no padded copy is made.
    """

    _conv_forward = _conv_forward


class Conv3d(nn.Conv3d):
    """``torch.nn.Conv3d``: input ``N C D H W`` or ``C D H W``; see `cnnops.functional.conv3d`.

    Padding of the modes reflect, replicate and circular is read in place: no padded copy is made.
    """

    _conv_forward = _conv_forward


class ConvTranspose1d(nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d``: input ``N C Q`` or ``C Q``; see `cnnops.functional.conv_transpose1d`."""

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        return functional.conv_transpose1d(input, *_transposed(self, 1, input, output_size))


class ConvTranspose2d(nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d``: input ``N C P Q`` or ``C P Q``; see
    `cnnops.functional.conv_transpose2d`.
    """

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        return functional.conv_transpose2d(input, *_transposed(self, 2, input, output_size))


class ConvTranspose3d(nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d``: input ``N C Z P Q`` or ``C Z P Q``; see
    `cnnops.functional.conv_transpose3d`.
    """

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        return functional.conv_transpose3d(input, *_transposed(self, 3, input, output_size))


def _transposed(layer: Any, dims: int, input: Tensor, output_size: Any) -> tuple[Any, ...]:
    """The functional form's arguments behind the input; `output_size` decides on output_padding."""
    output_padding = layer._output_padding(
        input, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
    )
    return (
        layer.weight, layer.bias, layer.stride, layer.padding, output_padding, layer.groups, layer.dilation,
    )  # fmt: skip


# A lazy layer becomes one of those above when it sees its first input. `forward` is looked up before that, so
# it is theirs from the beginning.


class LazyConv1d(nn.LazyConv1d):
    """``torch.nn.LazyConv1d``, which becomes a `Conv1d`."""

    cls_to_become = Conv1d
    _conv_forward = _conv_forward


class LazyConv2d(nn.LazyConv2d):
    """``torch.nn.LazyConv2d``, which becomes a `Conv2d`."""

    cls_to_become = Conv2d
    _conv_forward = _conv_forward


class LazyConv3d(nn.LazyConv3d):
    """``torch.nn.LazyConv3d``, which becomes a `Conv3d`."""

    cls_to_become = Conv3d
    _conv_forward = _conv_forward


class LazyConvTranspose1d(nn.LazyConvTranspose1d):
    """``torch.nn.LazyConvTranspose1d``, which becomes a `ConvTranspose1d`."""

    cls_to_become = ConvTranspose1d
    forward = ConvTranspose1d.forward


class LazyConvTranspose2d(nn.LazyConvTranspose2d):
    """``torch.nn.LazyConvTranspose2d``, which becomes a `ConvTranspose2d`."""

    cls_to_become = ConvTranspose2d
    forward = ConvTranspose2d.forward


class LazyConvTranspose3d(nn.LazyConvTranspose3d):
    """``torch.nn.LazyConvTranspose3d``, which becomes a `ConvTranspose3d`."""

    cls_to_become = ConvTranspose3d
    forward = ConvTranspose3d.forward
