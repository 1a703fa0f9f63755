"""What fused models have beside layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
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


def expect_given(value: Any, name: str) -> None:
    """Raises AssertionError for None: forward may have asked for this argument, and was told it is given."""
    if value is None:
        raise AssertionError(f"{name}: expected a value, as when the model was fused, got None")


def expect_default(value: Any, default: Any, name: str) -> None:
    """Raises AssertionError unless `value` is `default`: None or a number, for which forward was fused."""
    if value is not default and not (
        default is not None and isinstance(value, (int, float)) and value == default
    ):
        got = value if isinstance(value, (int, float, str)) else type(value).__name__
        raise AssertionError(
            f"{name}: expected its default, {default}, as when the model was fused, got {got}"
        )


for _check in (expect_given, expect_default):
    fx.node.has_side_effect(_check)  # so that nobody takes it for a step without use


class Absorbed(nn.Identity):
    """Stands for an activation of a Sequential, which the batch norm before it has taken over."""

    def __init__(self, activation: Module, norm: Module) -> None:
        super().__init__()
        self.was = (activation, norm)  # in a tuple: no submodules
        self.training = activation.training

    def extra_repr(self) -> str:
        return f"was {self.was[0]}"
