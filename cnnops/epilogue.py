"""What a convolution does to its sums on their way to memory."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Epilogue(NamedTuple):
    """``y = act(scale · sum + bias + residual)``, the bias being an argument of every convolution anyway.

    `scale` has one value a channel of y, contiguous, in y's dtype, as bias has; `residual` has y's size,
    dtype and strides; `activation` is one of `cnnops.functional.batch_norm_act`'s. `mean` and `var` are
    results, K long, in the accumulators' dtype: the moments of each channel of y as stored, var biased.
    Forward convolution alone gives them, both or neither.
    """

    scale: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"
    mean: Tensor | None = None
    var: Tensor | None = None


NO_EPILOGUE = Epilogue()
