"""What fused models have beside layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import Module

from cnnops.aten.norm import activate


def norm_add_act(norm: Any, x: Tensor, residual: Any, in_place: bool) -> Tensor:
    """``norm(x, residual)`` for a `cnnops.nn.BatchNormAct2d` or its like; what would broadcast, or change the
    sum's dtype, is added as ``+`` does it.
    """
    if (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    ):
        y: Tensor = norm(x, residual)
        return y
    z = norm._forward(x, None, "none")
    return activate(z.add_(residual) if in_place else z + residual, None, norm.activation)


class Absorbed(nn.Identity):
    """Stands for an activation of a Sequential, which the batch norm before it has taken over."""

    def __init__(self, activation: Module, norm: Module) -> None:
        super().__init__()
        self.was = (activation, norm)  # in a tuple: no submodules
        self.training = activation.training

    def extra_repr(self) -> str:
        return f"was {self.was[0]}"
