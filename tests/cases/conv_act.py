"""Convolution with what follows it: the rows, and what torch makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops.functional as C
from cases.base import ALL, Case, Size, laid_out, moved, normal
from cases.norm import ACTIVATIONS

_CONV = {
    False: {3: F.conv1d, 4: F.conv2d, 5: F.conv3d},
    True: {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d},
}


@dataclass(frozen=True)
class ConvActCase(Case):
    """`conv_act`, `conv_transpose_act`, or with a `norm` "train" or "eval" `conv_batch_norm_act`, in which
    the scale is batch norm's weight, and its bias that of the convolution, too.
    """

    w: Size = ()
    options: tuple[tuple[str, Any], ...] = ()
    _: KW_ONLY
    activation: str = "none"
    bias: bool = True
    scale: bool = False
    residual: bool = False
    transposed: bool = False
    norm: str = ""

    @property
    def channels(self) -> int:
        return self.w[1] * dict(self.options).get("groups", 1) if self.transposed else self.w[0]

    def plain(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """torch's convolution."""
        y: Tensor = _CONV[self.transposed][w.dim()](x, w, bias, **dict(self.options))
        return y

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """x, w, and those of bias, scale and residual that there are."""
        values = normal(7, dtype)
        meta = [torch.empty(size, device="meta") for size in (self.x, self.w)]
        vector, y = (self.channels,), tuple(self.plain(*meta, None).shape)
        found = [laid_out(self.x, self.layout, values), laid_out(self.w, self._of_w, values) / 4]
        found += [values(vector) for wanted in (self.bias, self.scale) if wanted]
        found += [laid_out(y, self.layout, values)] if self.residual else []
        return [moved(t, device) for t in found]

    @property
    def _of_w(self) -> str:
        return "channels_last" if self.layout == "channels_last" else "contiguous"

    def running(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Running statistics, new at every call."""
        return like.new_zeros(self.channels), like.new_ones(self.channels)

    def _split(self, rest: tuple[Tensor, ...]) -> Iterator[Tensor | None]:
        parts = iter(rest)
        return (next(parts) if given else None for given in (self.bias, self.scale, self.residual))

    def ours(
        self, x: Tensor, w: Tensor, *rest: Tensor, statistics: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        bias, scale, residual = self._split(rest)
        extra: dict[str, Any] = {"residual": residual, "activation": self.activation}
        options: dict[str, Any] = dict(self.options)
        if self.norm:
            mean, var = statistics or self.running(x)
            training = self.norm == "train"
            return C.conv_batch_norm_act(
                x, w, bias, mean, var, scale, bias, training, **options, **extra
            )
        function = C.conv_transpose_act if self.transposed else C.conv_act
        return function(x, w, bias, **options, scale=scale, **extra)

    def theirs(
        self, x: Tensor, w: Tensor, *rest: Tensor, statistics: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        bias, scale, residual = self._split(rest)
        if self.norm:
            mean, var = statistics or self.running(x)
            z = self.plain(x, w, bias)
            z = F.batch_norm(z, mean, var, scale, bias, self.norm == "train")
        else:
            z = self.plain(x, w, None)
            for factor, combine in ((scale, torch.mul), (bias, torch.add)):
                if factor is not None:
                    z = combine(z, factor.view(-1, *(1,) * (x.dim() - 2)))
        return ACTIVATIONS[self.activation](z if residual is None else z + residual)


def _row(
    id: str, x: Size, w: Size, why: str, options: dict[str, Any] | None = None, **others: Any
) -> ConvActCase:
    """With everything, and tanh, whose derivative is smooth, and told by the result in the wide types."""
    given = {"scale": True, "residual": True, "activation": "tanh"} | others
    return ConvActCase(id, x, why, w, tuple((options or {}).items()), **given)


LAST = {"layout": "channels_last"}
# In half types gradients go through sums that were rounded before the rest followed.
CONV_ACT_CASES: tuple[ConvActCase, ...] = (
    _row("act_3x3", (2, 5, 9, 10), (20, 5, 3, 3), "stores along places", {"padding": 1}, dtypes=ALL,
        schedules=True),
    _row("act_3x3_last", (2, 16, 9, 10), (24, 16, 3, 3), "stores along channels", {"padding": 1, "stride": 2},
        dtypes=ALL, schedules=True, **LAST),
    _row("act_no_scale", (2, 16, 9, 10), (24, 16, 3, 3), "fused when gradients are recorded", {"padding": 1},
        scale=False, dtypes=ALL, **LAST),
    _row("act_relu", (2, 6, 7, 7), (8, 6, 3, 3), "derivative told by the result", scale=False,
        activation="relu"),
    _row("act_alone", (2, 6, 7, 7), (8, 6, 3, 3), "nothing but an activation", scale=False, residual=False,
        bias=False, activation="leaky_relu"),
    _row("act_1x1", (2, 16, 8, 8), (32, 16, 1, 1), "a plain product", activation="silu"),
    _row("act_1x1_last", (3, 16, 5, 7), (40, 16, 1, 1), "a plain product", activation="gelu", dtypes=ALL,
        **LAST),
    _row("act_split", (1, 300, 4, 4), (24, 300, 3, 3), "sums in parts, finished by the second pass",
        dtypes=ALL, schedules=True),
    _row("act_split_last", (1, 300, 4, 4), (24, 300, 3, 3), "the same", activation="hardswish", **LAST),
    _row("act_grouped", (2, 12, 7, 8), (18, 4, 3, 3), "channels of a group", {"groups": 3, "dilation": 2}),
    _row("act_depthwise", (2, 6, 11, 12), (6, 1, 3, 3), "one channel a group", {"groups": 6, "padding": 1},
        activation="sigmoid", dtypes=ALL, schedules=True),
    _row("act_multiplier_last", (2, 16, 9, 8), (32, 1, 5, 5), "two results a group", {"groups": 16}, **LAST),
    _row("act_1d", (3, 8, 33), (16, 8, 4), "one axis", {"stride": 2}),
    _row("act_3d", (1, 4, 5, 6, 7), (8, 4, 3, 3, 3), "three axes", {"padding": (1, 0, 2)}),
    _row("act_sliced", (2, 6, 9, 9), (12, 6, 3, 3), "a residual with gaps", layout="sliced"),
    _row("act_offset", (2, 8, 8, 8), (16, 8, 3, 3), "a residual off alignment", layout="offset"),
    _row("act_transposed", (2, 12, 5, 6), (12, 7, 4, 4), "four phases", {"stride": 2, "padding": 1},
        transposed=True, scale=False, dtypes=ALL, schedules=True),
    _row("act_transposed_last", (2, 16, 5, 6), (16, 8, 1, 1), "a plain product", transposed=True, **LAST),
    _row("act_transposed_groups", (2, 8, 7), (8, 3, 5), "three phases of a group", {"groups": 2, "stride": 3},
        transposed=True),
    *(
        _row(f"norm_{id}", x, w, "moments gathered by the convolution", options, norm="train", **others)
        for id, x, w, options, others in (
            ("3x3", (2, 5, 9, 10), (20, 5, 3, 3), {"padding": 1}, {"schedules": True}),
            ("3x3_last", (2, 16, 9, 10), (24, 16, 3, 3), {"stride": 2}, {"schedules": True, **LAST}),
            ("grouped", (2, 12, 7, 8), (18, 4, 3, 3), {"groups": 3}, {"activation": "silu"}),
            ("split", (1, 300, 4, 4), (24, 300, 3, 3), {}, {"activation": "none"}),
            ("depthwise", (2, 6, 11, 12), (6, 1, 3, 3), {"groups": 6}, {}),
        )
    ),
    _row("norm_eval", (2, 5, 9, 10), (20, 5, 3, 3), "two ops", norm="eval"),
)  # fmt: skip
