"""Convolution with what follows it in a network: a residual and an activation, in the same pass.

`cnnops.fuse` makes these layers of convolution, batch norm, addition and activation; they may be built by
hand, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cnnops import functional
from cnnops.aten.norm import activate
from cnnops.epilogue import expect_activation
from cnnops.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from cnnops.ops import autocast_dtype
from cnnops.ops import conv as ops


class _Act:
    """What all of them share, in front of a layer of convolution."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    """``K``, a factor of the sums, where folded weights alone would leave the range of their dtype."""

    def __init__(self, *args: Any, activation: str = "relu", **kwargs: Any) -> None:
        expect_activation(activation)
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.fused: tuple[str, ...] = ()
        """What `cnnops.fuse` put in: names of modules and functions."""
        self.norm_folded = False
        self.adds_in_place = False
        """Whether a sum has the convolution's dtype and size, whatever the residual's."""
        self.register_buffer("scale", None)  # type: ignore[attr-defined]

    def forward(self, input: Tensor, residual: Any = None) -> Tensor:
        dims = self.weight.dim() - 2
        if self.norm_folded and input.dim() != dims + 2:
            raise ValueError(
                f"input: expected {dims + 2} dimensions, as batch norm is folded in, got {input.dim()} "
                f"({list(input.shape)})"
            )
        if residual is None or self._fits(input, residual):
            return self._compute(input, residual, self.activation)
        # What would broadcast, or change the sum's dtype, is PyTorch's to add.
        z = self._compute(input, None, "none")
        z = z.add_(residual) if self.adds_in_place else z + residual
        return activate(z, None, self.activation)

    def _fits(self, input: Tensor, residual: Any) -> bool:
        """Whether the epilogue can add it: a tensor as large as the result, of its dtype and device."""
        if not isinstance(residual, Tensor) or residual.device != input.device:
            return False
        low = autocast_dtype(input)
        dtype = input.dtype if low is None or input.dtype == torch.float64 else low
        if residual.dtype != dtype:
            return False
        alone = input.dim() < self.weight.dim()
        size = self._result_size(input.unsqueeze(0) if alone else input)
        return tuple(residual.shape) == tuple(size[1:] if alone else size)

    def _result_size(self, input: Tensor) -> Any:
        raise NotImplementedError

    def _compute(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"activation={self.activation}"]  # type: ignore[misc]
        parts += [f"fused={' + '.join(self.fused)}"] if self.fused else []
        return ", ".join(parts)


class _ConvAct(_Act):
    def _geometry(self) -> tuple[Any, ...]:
        layer: Any = self
        return layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode

    def _result_size(self, input: Tensor) -> Any:
        geometry = ops.settled(self.weight.shape, *self._geometry())
        return ops.problem(input, self.weight, None, *geometry)[0].y_size

    def _compute(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        rest = (*self._geometry(), self.scale, residual, activation)
        return functional.conv_act(input, self.weight, self.bias, *rest)


class _ConvTransposeAct(_Act):
    def _geometry(self) -> tuple[Any, ...]:
        layer: Any = self
        return layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation

    def _result_size(self, input: Tensor) -> Any:
        return ops.transposed(input.shape, self.weight.shape, None, *self._geometry())[0]

    def _compute(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        rest = (*self._geometry(), self.scale, residual, activation)
        return functional.conv_transpose_act(input, self.weight, self.bias, *rest)


class ConvAct1d(_ConvAct, Conv1d):
    """``act(Conv1d(input) + residual)`` in one pass: see `ConvAct2d`."""


class ConvAct2d(_ConvAct, Conv2d):
    """``act(Conv2d(input) + residual)`` in one pass over memory; `residual` may be left out.

    Arguments and state_dict are `Conv2d`'s; `activation`: see `cnnops.functional.conv_act`. A residual of
    another size or dtype than the convolution's result is added as ``+`` does it, in a pass of its own.
    Raises ValueError for an unknown activation.
    """


class ConvAct3d(_ConvAct, Conv3d):
    """``act(Conv3d(input) + residual)`` in one pass: see `ConvAct2d`."""


class ConvTransposeAct1d(_ConvTransposeAct, ConvTranspose1d):
    """``act(ConvTranspose1d(input) + residual)`` in one pass: see `ConvTransposeAct2d`."""


class ConvTransposeAct2d(_ConvTransposeAct, ConvTranspose2d):
    """``act(ConvTranspose2d(input) + residual)`` in one pass over memory; see `ConvAct2d`. The result's size
    is that of `output_padding`: there is no `output_size`.
    """


class ConvTransposeAct3d(_ConvTransposeAct, ConvTranspose3d):
    """``act(ConvTranspose3d(input) + residual)`` in one pass: see `ConvTransposeAct2d`."""


class FoldedLinear(nn.Linear):
    """``torch.nn.Linear`` with a `BatchNorm1d` folded into it; input ``N C`` alone, since of ``N L C`` batch
    norm would take L for the channels. Raises ValueError for another.
    """

    fused: tuple[str, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            raise ValueError(
                f"input: expected 2 dimensions, as batch norm is folded in, got {input.dim()} "
                f"({list(input.shape)})"
            )
        return super().forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fused={' + '.join(self.fused)}"
