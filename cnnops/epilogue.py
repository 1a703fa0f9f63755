"""What an operation does to its results on their way to memory."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ACTIVATIONS = (
    "none", "relu", "relu6", "silu", "gelu", "hardswish", "leaky_relu", "sigmoid", "tanh",
)  # fmt: skip
"""As in kernels/epilogue.cuh. gelu is by erf, leaky_relu has a slope of 0.01."""


def expect_activation(name: str) -> None:
    """Raises ValueError unless `name` is one of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")


class Epilogue(NamedTuple):
    """``y = act(scale · sum + bias + residual)``, the bias being an argument of every convolution anyway.

    `scale` has one value a channel of y, contiguous, in y's dtype, as bias has; `residual` has y's size,
    dtype and strides; `activation` is one of `ACTIVATIONS`. `mean` and `var` are
    results, K long, in the accumulators' dtype: the moments of each channel of y as stored, var biased.
    Forward convolution alone gives them, both or neither.
    """

    scale: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"
    mean: Tensor | None = None
    var: Tensor | None = None


NO_EPILOGUE = Epilogue()
