"""Convolution: the rows, and what torch makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops.functional as C
from cases.base import ALL, HALVES, Case, Ints, Size, laid_out, moved, normal
from cnnops.ops import conv as conv_ops
from cnnops.shapes import padding_pairs


@dataclass(frozen=True, kw_only=True)
class ConvCase(Case):
    """A convolution; with `transposed` a transposed one, whose weight is ``C K/groups *kernel``."""

    w: Size
    stride: Ints = 1
    padding: Any = 0
    dilation: Ints = 1
    groups: int = 1
    bias: bool = True
    w_layout: str = "contiguous"
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: Ints = 0

    @property
    def unequal(self) -> bool:
        """Whether the padding differs between the two sides of an axis: beyond torch's conv2d."""
        return isinstance(self.padding, tuple) and isinstance(self.padding[0], tuple)

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        x = laid_out(self.x, self.layout, normal(1, dtype))
        w = laid_out(self.w, self.w_layout, normal(2, dtype))
        filters = (self.w[1] * self.groups,) if self.transposed else self.w[:1]
        bias = [normal(3, dtype)(filters)] if self.bias else []
        return [moved(t, device) for t in (x, w, *bias)]

    def ours(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._computed(C, x, w, bias)

    def theirs(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._computed(F, x, w, bias)

    def _computed(self, module: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        dims = w.dim() - 2
        step = (self.stride, self.padding)
        if self.transposed:
            conv = getattr(module, f"conv_transpose{dims}d")
            return conv(x, w, bias, *step, self.output_padding, self.groups, self.dilation)
        conv, rest = getattr(module, f"conv{dims}d"), (self.dilation, self.groups)
        if self.padding_mode == "zeros" and (module is C or not self.unequal):
            return conv(x, w, bias, *step, *rest)
        if module is C:
            return conv_ops.conv(x, w, bias, *step, *rest, self.padding_mode)
        kernel, one = tuple(w.shape[2:]), (1,) * dims
        spans = (self.dilation,) * dims if isinstance(self.dilation, int) else self.dilation
        pairs = padding_pairs(self.padding, kernel, one, spans)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(x, [p for pair in reversed(pairs) for p in pair], mode)
        return conv(x, w, bias, self.stride, 0, *rest)


def _padding_modes() -> Iterable[ConvCase]:
    for mode in ("reflect", "replicate", "circular"):
        yield ConvCase(
            f"{mode}", (2, 3, 6, 5), "padding read in place", w=(4, 3, 3, 3), padding=1,
            padding_mode=mode, dtypes=ALL, schedules=True,
        )  # fmt: skip
        yield ConvCase(
            f"{mode}_strided", (2, 4, 7, 6), "stride, dilation and groups, the most padding of its axis",
            w=(6, 2, 3, 2), stride=(2, 1), dilation=(2, 3), padding=(4, 5), groups=2, padding_mode=mode,
        )  # fmt: skip
        yield ConvCase(
            f"{mode}_same_even", (1, 3, 5, 6), "unequal sides", w=(4, 3, 2, 4), padding="same",
            padding_mode=mode,
        )  # fmt: skip
        yield ConvCase(
            f"{mode}_depthwise", (2, 9, 6, 5), "one filter a channel", w=(9, 1, 3, 3), padding=1,
            groups=9, padding_mode=mode,
        )  # fmt: skip
        yield ConvCase(
            f"{mode}_channels_last", (2, 8, 6, 5), "channels innermost, read by 16 bytes",
            w=(8, 8, 3, 3), padding=(2, 1), padding_mode=mode, layout="channels_last",
            w_layout="channels_last", dtypes=ALL,
        )  # fmt: skip
        yield ConvCase(
            f"{mode}_pointwise", (1, 4, 4, 5), "one tap, but a frame around the image",
            w=(3, 4, 1, 1), padding=2, padding_mode=mode,
        )  # fmt: skip
        yield ConvCase(
            f"{mode}_1d", (2, 3, 11), "one spatial axis", w=(4, 3, 5), padding=4, padding_mode=mode,
        )  # fmt: skip
        yield ConvCase(
            f"{mode}_3d", (1, 2, 4, 3, 5), "three spatial axes, one without padding",
            w=(3, 2, 3, 2, 3), padding=(1, 0, 2), padding_mode=mode,
        )  # fmt: skip


CONV_CASES = (
    ConvCase("ten_filters", (1, 3, 32, 32), "ten 5x5 filters on a 32x32 colour image",
        w=(10, 3, 5, 5), padding=2),
    ConvCase("plain", (2, 3, 9, 8), "the usual 3x3 with padding 1",
        w=(4, 3, 3, 3), padding=1, dtypes=ALL, schedules=True),
    ConvCase("one_by_one", (2, 7, 5, 6), "a dense layer at each place", w=(5, 7, 1, 1), dtypes=ALL),
    ConvCase("one_by_one_strided", (2, 16, 7, 6), "strided 1x1: three of four places unused",
        w=(8, 16, 1, 1), stride=2),
    ConvCase("one_value", (1, 1, 1, 1), "every size is 1", w=(1, 1, 1, 1)),
    ConvCase("odd_sizes", (3, 3, 7, 11), "nothing is a multiple of anything, axes differ",
        w=(5, 3, 3, 5), stride=(2, 1), padding=(1, 2), dtypes=ALL),
    ConvCase("lenet", (2, 6, 14, 14), "second convolution of LeNet-5", w=(16, 6, 5, 5)),
    ConvCase("stem", (1, 3, 23, 23), "first layer of AlexNet: large kernel and stride",
        w=(8, 3, 11, 11), stride=4, padding=2),
    ConvCase("full_size_kernel", (3, 6, 5, 5), "one output place: the dense layer in disguise",
        w=(7, 6, 5, 5)),
    ConvCase("kernel_beyond_input", (2, 3, 2, 3), "5x5 kernel on a 2x3 input: most taps in the padding",
        w=(4, 3, 5, 5), padding=2),
    ConvCase("only_padding", (1, 2, 2, 2), "outputs that see nothing but padding",
        w=(3, 2, 2, 2), padding=3),
    ConvCase("stride_beyond_kernel", (2, 3, 11, 10), "places that no output reads",
        w=(4, 3, 2, 2), stride=3, schedules=True),
    ConvCase("left_over", (1, 2, 8, 9), "stride leaves columns over at the far end",
        w=(3, 2, 3, 3), stride=3),
    ConvCase("even_kernel", (2, 3, 7, 6), "4x2 kernel", w=(4, 3, 4, 2), padding=(2, 1)),
    ConvCase("same", (2, 3, 6, 7), "same padding", w=(4, 3, 3, 5), padding="same"),
    ConvCase("same_even", (2, 3, 6, 7), "same padding of an even kernel: more after than before",
        w=(4, 3, 2, 4), padding="same", dtypes=ALL),
    ConvCase("same_dilated", (1, 3, 8, 9), "same padding of a dilated even kernel",
        w=(4, 3, 2, 3), padding="same", dilation=(3, 2)),
    ConvCase("valid", (2, 3, 6, 7), "valid padding", w=(4, 3, 3, 2), padding="valid"),
    ConvCase("unequal", (2, 3, 7, 6), "other padding on every side",
        w=(4, 3, 3, 3), padding=((2, 0), (1, 3)), stride=(1, 2)),
    ConvCase("wide_padding", (1, 2, 5, 4), "padding of more than the kernel",
        w=(3, 2, 3, 3), padding=(4, 5)),
    ConvCase("dilated", (2, 3, 9, 11), "dilation differs between axes",
        w=(4, 3, 3, 3), dilation=(2, 3), padding=2, dtypes=ALL),
    ConvCase("dilated_strided", (1, 4, 12, 11), "dilation and stride share no divisor",
        w=(3, 4, 3, 2), dilation=3, stride=2, padding=3, schedules=True),
    ConvCase("groups", (2, 6, 7, 6), "three groups",
        w=(9, 2, 3, 3), groups=3, padding=1, dtypes=ALL),
    ConvCase("wide_groups", (1, 34, 6, 5), "groups of an odd number of channels",
        w=(22, 17, 3, 3), groups=2, padding=1),
    ConvCase("depthwise", (2, 7, 8, 7), "one filter a channel",
        w=(7, 1, 3, 3), groups=7, padding=1, dtypes=ALL),
    ConvCase("multiplier", (2, 5, 7, 6), "three filters a channel, strided",
        w=(15, 1, 3, 3), groups=5, stride=2, padding=1),
    ConvCase("depthwise_channels_last", (1, 33, 7, 6), "depthwise, channels innermost",
        w=(33, 1, 3, 3), groups=33, padding=1, layout="channels_last"),
    ConvCase("channels_1", (3, 1, 8, 9), "grey images", w=(7, 1, 3, 3), padding=1),
    ConvCase("channels_33", (1, 33, 6, 5), "one channel past a tile, in and out",
        w=(33, 33, 3, 3), padding=1, dtypes=ALL, schedules=True),
    ConvCase("tiles", (2, 24, 9, 9), "several tiles of outputs and of channels",
        w=(72, 24, 3, 3), padding=1),
    ConvCase("many_places", (4, 3, 20, 20), "long sums for the weight gradient",
        w=(6, 3, 3, 3), padding=1, schedules=True),
    ConvCase("no_bias", (2, 3, 6, 5), "without bias", w=(4, 3, 3, 3), bias=False),
    ConvCase("empty_batch", (0, 3, 6, 5), "no image: gradients are zeros",
        w=(4, 3, 3, 3), padding=1, dtypes=ALL),
    ConvCase("channels_last", (2, 8, 7, 6), "both channels-last",
        w=(12, 8, 3, 3), padding=1,
        layout="channels_last", w_layout="channels_last", dtypes=ALL, schedules=True),
    ConvCase("channels_last_odd", (2, 7, 6, 5), "channels-last, no 16-byte rows",
        w=(5, 7, 3, 3), stride=2, padding=1, layout="channels_last", w_layout="channels_last"),
    ConvCase("mixed_input", (2, 8, 7, 6), "input channels-last, weight not",
        w=(6, 8, 3, 3), padding=1, layout="channels_last"),
    ConvCase("mixed_weight", (2, 8, 7, 6), "weight channels-last, input not",
        w=(6, 8, 3, 3), padding=1, w_layout="channels_last"),
    ConvCase("mixed_gradient", (2, 8, 7, 6), "channels-last, its gradient contiguous",
        w=(6, 8, 3, 3), padding=1, layout="channels_last", grad="contiguous"),
    ConvCase("sliced", (2, 3, 7, 6), "every second channel of a wider image",
        w=(4, 3, 3, 3), padding=1, layout="sliced", w_layout="sliced", dtypes=ALL),
    ConvCase("transposed", (2, 4, 7, 6), "columns innermost swapped with rows",
        w=(4, 4, 3, 2), padding=1, layout="transposed", w_layout="transposed"),
    ConvCase("expanded", (3, 4, 6, 5), "one image as a whole batch: stride 0",
        w=(5, 4, 3, 3), padding=1, layout="expanded"),
    ConvCase("expanded_gradient", (2, 4, 6, 8), "the gradient of a sum: stride 0 everywhere",
        w=(5, 4, 3, 3), padding=1, grad="expanded", dtypes=ALL),
    ConvCase("offset", (2, 4, 8, 8), "would be read by 16 bytes, but starts off alignment",
        w=(8, 4, 3, 3), padding=1, layout="offset", w_layout="offset", dtypes=ALL),
    ConvCase("offset_channels_last", (2, 8, 6, 8), "channels-last off alignment",
        w=(8, 8, 3, 3), padding=1, layout="channels_last_offset", w_layout="channels_last_offset"),
    ConvCase("conv1d", (2, 4, 13), "one spatial axis",
        w=(6, 2, 3), groups=2, stride=2, padding=1, dtypes=ALL, schedules=True),
    ConvCase("conv1d_pointwise", (3, 8, 16), "one axis, one tap: packs along the row",
        w=(4, 8, 1), dtypes=ALL),
    ConvCase("conv1d_depthwise", (2, 9, 17), "one axis, one filter a channel, dilated",
        w=(9, 1, 5), groups=9, padding="same", dilation=2),
    ConvCase("conv1d_transposed_in_memory", (2, 5, 12), "N L C, as sequences lie",
        w=(7, 5, 3), padding=1, layout="transposed"),
    ConvCase("conv1d_long", (1, 2, 700), "a long row: the sum of the weight gradient in parts",
        w=(3, 2, 9), stride=2),
    ConvCase("conv3d", (1, 3, 5, 4, 6), "three spatial axes",
        w=(4, 3, 3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1), dtypes=ALL, schedules=True),
    ConvCase("conv3d_channels_last", (2, 8, 3, 4, 5), "three axes, channels innermost",
        w=(8, 8, 3, 3, 3), padding=1, layout="channels_last", w_layout="channels_last", dtypes=ALL),
    ConvCase("conv3d_depthwise", (1, 5, 4, 5, 6), "three axes, one filter a channel, strided",
        w=(5, 1, 3, 3, 3), groups=5, stride=2, padding=1),
    ConvCase("conv3d_dilated_groups", (1, 4, 6, 5, 7), "three axes, everything at once",
        w=(6, 2, 2, 1, 3), groups=2, dilation=(2, 1, 3), padding=(1, 0, 2), stride=(2, 1, 2)),
    ConvCase("conv3d_same", (1, 2, 4, 5, 3), "same padding of even kernels",
        w=(3, 2, 2, 3, 4), padding="same"),
    ConvCase("cropped", (2, 3, 8, 7), "negative padding: the border is not read, its gradient is zero",
        w=(4, 3, 3, 3), padding=((-1, 1), (1, -2)), stride=(1, 2), schedules=True),
    # Channels by eights, at least 16, innermost: what TMA and wgmma take (kernels/conv_igemm_sm90.cu).
    ConvCase("wide_channels", (2, 64, 9, 9), "lines of 128 bytes, taps in the padding",
        w=(64, 64, 3, 3), padding=1, layout="channels_last", w_layout="channels_last",
        dtypes=HALVES),
    ConvCase("wide_channels_strided", (2, 64, 11, 10), "dgrad in phases, uneven padding, filters K C R S",
        w=(48, 64, 3, 3), stride=2, padding=((1, 0), (2, 1)), layout="channels_last", dtypes=HALVES),
    ConvCase("wide_channels_pointwise", (2, 64, 7, 9), "one tap: places lie evenly",
        w=(72, 64, 1, 1), layout="channels_last", w_layout="channels_last", dtypes=HALVES),
    ConvCase("wide_channels_groups", (2, 128, 8, 8), "lines end with their group",
        w=(128, 64, 3, 3), groups=2, dilation=2, layout="channels_last", w_layout="channels_last",
        dtypes=HALVES),
    ConvCase("wide_channels_3d", (2, 48, 3, 4, 5), "three axes, lines of 32 bytes",
        w=(64, 48, 2, 3, 3), padding=1, layout="channels_last", w_layout="channels_last",
        dtypes=HALVES),
    ConvCase("wide_channels_transposed", (2, 64, 5, 6), "the forward pass is dgrad, in phases",
        transposed=True, w=(64, 64, 3, 3), stride=2, padding=1, layout="channels_last",
        w_layout="channels_last", dtypes=HALVES),
    *_padding_modes(),
    ConvCase("transposed_twice", (2, 3, 5, 4), "the usual one: twice the size",
        transposed=True, w=(3, 4, 3, 3), stride=2, padding=1, output_padding=1,
        dtypes=ALL, schedules=True),
    ConvCase("transposed_2x2", (2, 5, 4, 3), "U-Net's: windows that do not overlap",
        transposed=True, w=(5, 3, 2, 2), stride=2, dtypes=ALL),
    ConvCase("transposed_4x4", (1, 4, 3, 5), "DCGAN's: every place by four taps",
        transposed=True, w=(4, 6, 4, 4), stride=2, padding=1),
    ConvCase("transposed_gaps", (1, 3, 4, 3), "stride beyond the kernel: places of the bias alone",
        transposed=True, w=(3, 4, 2, 2), stride=3, output_padding=2, schedules=True),
    ConvCase("transposed_dilated", (2, 4, 5, 4), "output padding beyond the stride, which dilation allows",
        transposed=True, w=(4, 3, 3, 2), stride=(1, 2), dilation=3, output_padding=(2, 2), padding=1,
        groups=2, dtypes=ALL),
    ConvCase("transposed_depthwise", (2, 7, 5, 4), "one filter a channel",
        transposed=True, w=(7, 1, 3, 3), groups=7, stride=2, padding=1),
    ConvCase("transposed_cropping", (1, 3, 5, 6), "padding takes more than the border",
        transposed=True, w=(3, 2, 3, 3), padding=2),
    ConvCase("transposed_no_bias", (2, 3, 4, 4), "without bias",
        transposed=True, w=(3, 5, 3, 3), stride=2, bias=False),
    ConvCase("transposed_wide", (1, 33, 4, 5), "one channel past a tile, in and out",
        transposed=True, w=(33, 33, 3, 3), stride=2, padding=1),
    ConvCase("transposed_deep", (1, 300, 2, 2), "a long sum for few outputs: in parts, the bias once",
        transposed=True, w=(300, 3, 3, 3), schedules=True),
    ConvCase("transposed_channels_last", (2, 8, 4, 5), "both channels-last",
        transposed=True, w=(8, 8, 3, 3), stride=2, padding=1,
        layout="channels_last", w_layout="channels_last", dtypes=ALL),
    ConvCase("transposed_mixed", (2, 8, 4, 5), "input channels-last, weight not, gradient contiguous",
        transposed=True, w=(8, 6, 3, 3), layout="channels_last", grad="contiguous"),
    ConvCase("transposed_sliced", (2, 3, 5, 4), "every second channel of a wider image",
        transposed=True, w=(3, 4, 3, 3), stride=2, layout="sliced", w_layout="sliced"),
    ConvCase("transposed_empty_batch", (0, 3, 4, 4), "no image: gradients are zeros",
        transposed=True, w=(3, 4, 3, 3), stride=2),
    ConvCase("transposed_1d", (2, 4, 7), "one spatial axis",
        transposed=True, w=(4, 3, 5), stride=3, padding=2, output_padding=1, dtypes=ALL),
    ConvCase("transposed_3d", (1, 3, 2, 4, 3), "three spatial axes",
        transposed=True, w=(3, 2, 3, 2, 3), stride=(1, 2, 2), padding=(1, 0, 1), output_padding=(0, 1, 1),
        dtypes=ALL),
    ConvCase("transposed_3d_channels_last", (2, 4, 3, 2, 3), "three axes, channels innermost",
        transposed=True, w=(4, 6, 2, 2, 2), stride=2, layout="channels_last", w_layout="channels_last"),
)  # fmt: skip
