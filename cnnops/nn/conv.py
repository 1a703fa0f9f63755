"""Layers of convolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cnnops import functional


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
