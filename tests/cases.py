"""The problems that every engine is held to: frozen rows, each with the reason it is here.

A row knows its tensors (`tensors`), how this package computes it (`ours`) and how PyTorch does (`theirs`).
`run` gives the output and every gradient; `assert_close` compares them with the one table of tolerances.
All rows run in float32; those with ``dtypes=ALL`` in the other types too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops
import cnnops.functional as C
from cnnops.cuda import emulate
from cnnops.ops import conv as conv_ops
from cnnops.ops import pool as pool_ops

ALL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
Size = tuple[int, ...]
Ints = int | tuple[int, ...]


class Tolerance(NamedTuple):
    """Largest ``||ours - reference|| / ||reference||``, both from the same rounded inputs."""

    output: float
    gradient: float


TOLERANCE = {
    torch.float64: Tolerance(1e-14, 1e-14),
    torch.float32: Tolerance(1e-6, 2e-6),
    # Rounding the result alone costs up to 2^-11 and 2^-8 of it; gradients may be sums of rounded terms.
    torch.float16: Tolerance(5e-4, 1e-3),
    torch.bfloat16: Tolerance(4e-3, 6e-3),
}


def assert_close(ours: Tensor, reference: Tensor, limit: float, what: str) -> None:
    """Sizes, places of NaN and infinity are the same, and the rest is within `limit`, norm-relative."""
    assert ours.shape == reference.shape, what
    a, b = ours.detach().double().cpu(), reference.detach().double().cpu()
    wild = ~b.isfinite()
    assert torch.equal(a[wild].nan_to_num(), b[wild].nan_to_num()), f"{what}: NaN or infinity"
    a, b = a.masked_fill(wild, 0), b.masked_fill(wild, 0)
    error, scale = float((a - b).norm()), float(b.norm())
    assert error <= limit * scale, (
        f"{what}: off by {error / scale if scale else error:.2e}, limit {limit:.0e}"
    )


def run(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], grad: str = "like"
) -> list[Tensor]:
    """The output of `function` and its gradients for every tensor, from one fixed random output gradient.

    `grad` lays that gradient out: "like" the output, "contiguous", or "expanded" from a single value.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    size = (1,) * y.dim() if grad == "expanded" else y.shape
    values = torch.randn(size, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    # Rounded to the coarsest type, so that all types and the reference get the same numbers.
    grad_y = values.to(torch.bfloat16).to(y.dtype).to(y.device)
    if grad == "like":
        grad_y = torch.empty_like(y).copy_(grad_y)
    return [y, *torch.autograd.grad(y, leaves, grad_y.expand(y.shape))]


def check(case: Case, engine: str, dtype: torch.dtype) -> None:
    """Output and gradients of the row in `engine`, against PyTorch in float64."""
    tensors = case.tensors(dtype, device_of(engine))
    with cnnops.engine(engine):
        ours = run(case.ours, tensors, case.grad)
    theirs = run(case.theirs, [t.cpu().double() for t in tensors], case.grad)
    tolerance = TOLERANCE[dtype]
    names = ("output", *(f"gradient of input {i}" for i in range(len(tensors))))
    for name, a, b, t in zip(names, ours, theirs, (None, *tensors), strict=True):
        assert t is None or a.dtype == t.dtype, name
        limit = tolerance.output if t is None else tolerance.gradient
        assert_close(a, b, case.limit(engine, limit), f"{case.id}, {name}")


def laid_out(size: Size, layout: str, values: Callable[[Size], Tensor]) -> Tensor:
    """A tensor of this size with `values`, in one of the layouts that a caller may hand over.

    contiguous; channels_last; sliced: every second channel, without the last column of a wider one;
    transposed: last two axes swapped in memory; expanded: one image that stands for the whole batch;
    offset: contiguous, starting one element past an aligned address; channels_last_offset: both.
    """
    if layout == "expanded":
        return values((1, *size[1:])).expand(size)
    x = values(size)
    if layout == "contiguous":
        return x
    if layout == "sliced":
        wide = x.new_zeros(size[0], 2 * size[1], *size[2:-1], size[-1] + 1)
        view = wide[:, ::2, ..., :-1]
    elif layout == "transposed":
        view = x.new_zeros(*size[:-2], size[-1], size[-2]).transpose(-1, -2)
    elif layout in ("channels_last", "channels_last_offset", "offset"):
        shift = layout.endswith("offset")
        flat = x.new_zeros(math.prod(size) + shift)[int(shift) :]
        if layout == "offset":
            view = flat.view(size)
        else:
            view = flat.view(size[0], *size[2:], size[1]).movedim(-1, 1)
    else:
        raise ValueError(layout)
    return view.copy_(x)


def normal(seed: int, dtype: torch.dtype) -> Callable[[Size], Tensor]:
    """Standard normal numbers, rounded to `dtype`, the same for every type but for the rounding."""
    generator = torch.Generator().manual_seed(seed)
    return lambda size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Case:
    """What all rows have: the input's size and layout (`laid_out`), and the output gradient's (`run`).

    `schedules`: the row also runs under every thread order of the emulator. `aten_limit`: what to grant
    PyTorch's own operation where it is less exact than the table of tolerances asks.
    """

    id: str
    x: Size
    why: str
    _: KW_ONLY
    layout: str = "contiguous"
    grad: str = "like"
    dtypes: tuple[torch.dtype, ...] = FLOAT32
    schedules: bool = False
    aten_limit: float = 0.0

    def limit(self, engine: str, limit: float) -> float:
        return max(limit, self.aten_limit) if engine == "aten" else limit

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        raise NotImplementedError

    def ours(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def theirs(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ConvCase(Case):
    w: Size
    stride: Ints = 1
    padding: Any = 0
    dilation: Ints = 1
    groups: int = 1
    bias: bool = True
    w_layout: str = "contiguous"

    @property
    def unequal(self) -> bool:
        """Whether the padding differs between the two sides of an axis: beyond torch's conv2d."""
        return isinstance(self.padding, tuple) and isinstance(self.padding[0], tuple)

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        x = laid_out(self.x, self.layout, normal(1, dtype))
        w = laid_out(self.w, self.w_layout, normal(2, dtype))
        bias = [normal(3, dtype)(self.w[:1])] if self.bias else []
        return [_moved(t, device) for t in (x, w, *bias)]

    def ours(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        plain = x.dim() == 4 and not self.unequal
        conv = C.conv2d if plain else conv_ops.conv
        return conv(x, w, bias, self.stride, self.padding, self.dilation, self.groups)

    def theirs(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        if self.unequal:
            x = F.pad(x, [p for pair in reversed(self.padding) for p in pair])
        padding = 0 if self.unequal else self.padding
        return conv(x, w, bias, self.stride, padding, self.dilation, self.groups)


def _moved(t: Tensor, device: str) -> Tensor:
    """`t` on another device, with its strides and, for one that starts off alignment, its offset."""
    if device == "cpu":
        return t
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    storage = torch.empty(t.storage_offset() + last + 1, dtype=t.dtype, device=device)
    view = storage.as_strided(t.shape, t.stride(), t.storage_offset())
    if 0 in t.stride():
        storage.fill_(0)
        view[:1].copy_(t[:1])
        return view
    return view.copy_(t)


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
    ConvCase("conv1d", (2, 4, 13), "one spatial axis", w=(6, 2, 3), groups=2, stride=2, padding=1),
    ConvCase("conv3d", (1, 3, 5, 4, 6), "three spatial axes",
        w=(4, 3, 3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1)),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PoolCase(Case):
    """`kind` is max, average or adaptive (`kernel` is then the output size); `values` is the input's kind."""

    kind: str = "max"
    kernel: Any = 2
    stride: Ints | None = None
    padding: Ints = 0
    dilation: Ints = 1
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    values: str = "normal"

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        return [_moved(laid_out(self.x, self.layout, self._values(dtype)), device)]

    def _values(self, dtype: torch.dtype) -> Callable[[Size], Tensor]:
        def values(size: Size) -> Tensor:
            x = normal(1, dtype)(size)
            if self.values == "ties":
                return x.round().clamp(-1, 1)
            chance = torch.rand(size, generator=torch.Generator().manual_seed(2))
            if self.values == "nan":
                return x.masked_fill(chance < 0.2, math.nan)
            if self.values == "-inf":
                return x.masked_fill(chance < 0.8, -math.inf)
            return x

        return values

    def ours(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return self._any_dims(x)
        if self.kind == "max":
            y: Tensor = C.max_pool2d(
                x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode
            )
            return y
        if self.kind == "adaptive":
            return C.adaptive_avg_pool2d(x, self.kernel)
        return C.avg_pool2d(x, self.kernel, self.stride, self.padding, *self._average)

    def _any_dims(self, x: Tensor) -> Tensor:
        if self.kind == "max":
            return pool_ops.max_pool(
                x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode
            )[0]
        if self.kind == "adaptive":
            return pool_ops.adaptive_avg_pool(x, self.kernel)
        return pool_ops.avg_pool(x, self.kernel, self.stride, self.padding, *self._average)

    @property
    def _average(self) -> tuple[bool, bool, int | None]:
        return self.ceil_mode, self.count_include_pad, self.divisor_override

    def theirs(self, x: Tensor) -> Tensor:
        dims = x.dim() - 2
        if self.kind == "max":
            pool = getattr(F, f"max_pool{dims}d")
            return pool(
                x, self.kernel, self.stride, self.padding, self.dilation, ceil_mode=self.ceil_mode
            )
        if self.kind == "adaptive":
            return getattr(F, f"adaptive_avg_pool{dims}d")(x, self.kernel)
        average = self._average[: 2 if dims == 1 else 3]
        return getattr(F, f"avg_pool{dims}d")(x, self.kernel, self.stride, self.padding, *average)


POOL_CASES = (
    PoolCase("max_2x2", (2, 3, 8, 6), "the usual one: windows tile the plane",
        dtypes=ALL, schedules=True),
    PoolCase("max_overlapping", (2, 3, 9, 8), "AlexNet's 3x3 with stride 2: one place in up to four windows",
        kernel=3, stride=2, dtypes=ALL, schedules=True),
    PoolCase("max_every_place", (1, 3, 7, 6), "stride 1: nine windows on every place",
        kernel=3, stride=1, padding=1),
    PoolCase("max_padded", (2, 3, 7, 9), "ResNet's stem", kernel=3, stride=2, padding=1),
    PoolCase("max_ties", (2, 3, 8, 8), "equal maxima: the first one gets the gradient",
        kernel=3, stride=2, padding=1, values="ties", dtypes=ALL),
    PoolCase("max_nan", (2, 3, 9, 8), "NaN wins its window, the last of several",
        kernel=3, stride=2, padding=1, values="nan", dtypes=ALL),
    PoolCase("max_nan_channels_last", (2, 5, 8, 8), "the same, channels innermost",
        kernel=2, values="nan", layout="channels_last"),
    PoolCase("max_minus_inf", (2, 3, 8, 8), "windows of nothing but -inf",
        values="-inf", dtypes=ALL),
    PoolCase("max_minus_inf_padded", (1, 3, 7, 7), "-inf beside the padding's own -inf",
        kernel=3, stride=2, padding=1, values="-inf"),
    PoolCase("max_dilated", (2, 3, 11, 9), "dilated windows, axes differ",
        kernel=(3, 2), stride=(2, 1), padding=1, dilation=(2, 3)),
    PoolCase("max_ceil", (2, 3, 8, 7), "ceil_mode: last windows reach past the input",
        kernel=3, stride=2, ceil_mode=True),
    PoolCase("max_ceil_dropped", (1, 2, 5, 6), "ceil_mode: no window starts in the padding behind",
        kernel=2, stride=3, padding=1, ceil_mode=True),
    PoolCase("max_stride_beyond_kernel", (1, 3, 9, 10), "places in no window", kernel=2, stride=4),
    PoolCase("max_one_by_one", (2, 3, 5, 4), "1x1 windows: strided copying", kernel=1, stride=2),
    PoolCase("max_255_places", (1, 2, 16, 19), "the most places that one byte counts",
        kernel=(15, 17), stride=1),
    PoolCase("max_256_places", (1, 2, 18, 17), "one place more: offsets of four bytes",
        kernel=16, stride=1, dtypes=ALL),
    PoolCase("max_whole_plane", (2, 3, 17, 19), "global maximum: int32 offsets", kernel=(17, 19)),
    PoolCase("max_channels_last", (2, 8, 8, 6), "channels innermost",
        kernel=3, stride=2, padding=1, layout="channels_last", dtypes=ALL, schedules=True),
    PoolCase("max_channels_last_33", (1, 33, 6, 5), "an odd number of channels innermost",
        layout="channels_last"),
    PoolCase("max_mixed_gradient", (2, 8, 8, 6), "channels-last, its gradient contiguous",
        layout="channels_last", grad="contiguous"),
    PoolCase("max_sliced", (2, 3, 8, 6), "every second channel of a wider image", layout="sliced"),
    PoolCase("max_transposed", (2, 3, 8, 6), "columns and rows swapped in memory",
        layout="transposed"),
    PoolCase("max_expanded", (3, 2, 6, 6), "one image as a whole batch", layout="expanded"),
    PoolCase("max_expanded_gradient", (2, 3, 8, 8), "the gradient of a sum",
        kernel=3, stride=2, grad="expanded"),
    PoolCase("max_offset", (2, 4, 8, 8), "starts off alignment", layout="offset", dtypes=ALL),
    PoolCase("max_offset_channels_last", (2, 8, 8, 8), "channels-last off alignment",
        layout="channels_last_offset"),
    PoolCase("max_empty_batch", (0, 3, 6, 6), "no image"),
    PoolCase("max_1d", (2, 3, 11), "one spatial axis", kernel=3, stride=2, padding=1),
    PoolCase("max_3d", (1, 2, 5, 6, 4), "three spatial axes",
        kernel=(2, 3, 2), stride=(1, 2, 2), padding=(1, 1, 0)),
    PoolCase("avg_2x2", (2, 3, 8, 6), "the usual one", kind="average", dtypes=ALL, schedules=True),
    PoolCase("avg_overlapping", (2, 3, 9, 8), "padded windows, padding counted",
        kind="average", kernel=3, stride=2, padding=1, dtypes=ALL),
    PoolCase("avg_exclude_pad", (2, 3, 9, 8), "padding not counted: smaller divisors at the border",
        kind="average", kernel=3, stride=2, padding=1, count_include_pad=False, dtypes=ALL),
    PoolCase("avg_divisor", (2, 3, 7, 8), "divisor of one's own",
        kind="average", kernel=(2, 3), stride=1, padding=1, divisor_override=5),
    PoolCase("avg_negative_divisor", (1, 2, 6, 6), "torch takes any divisor but 0",
        kind="average", divisor_override=-3),
    PoolCase("avg_ceil", (2, 3, 8, 7), "ceil_mode: places past the padding never count",
        kind="average", kernel=3, stride=2, padding=1, ceil_mode=True),
    PoolCase("avg_ceil_exclude_pad", (1, 3, 8, 7), "ceil_mode, padding not counted",
        kind="average", kernel=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    PoolCase("avg_ceil_divisor", (1, 2, 5, 8), "ceil_mode and a divisor",
        kind="average", kernel=4, stride=3, padding=2, ceil_mode=True, divisor_override=2),
    PoolCase("avg_stride_beyond_kernel", (1, 3, 9, 10), "places in no window",
        kind="average", kernel=2, stride=4),
    PoolCase("avg_whole_plane", (2, 33, 7, 7), "as large as the plane: ResNet's end",
        kind="average", kernel=7, schedules=True),
    PoolCase("avg_channels_last", (2, 8, 8, 6), "channels innermost",
        kind="average", kernel=3, stride=2, padding=1, layout="channels_last", dtypes=ALL),
    PoolCase("avg_sliced", (2, 3, 8, 6), "every second channel of a wider image",
        kind="average", layout="sliced"),
    PoolCase("avg_expanded", (3, 2, 6, 6), "one image as a whole batch",
        kind="average", layout="expanded", grad="expanded"),
    PoolCase("avg_offset", (2, 4, 8, 8), "starts off alignment", kind="average", layout="offset"),
    PoolCase("avg_empty_batch", (0, 3, 6, 6), "no image", kind="average"),
    PoolCase("avg_1d", (2, 3, 11), "one spatial axis",
        kind="average", kernel=3, stride=2, padding=1, count_include_pad=False),
    PoolCase("avg_3d", (1, 2, 5, 6, 4), "three spatial axes",
        kind="average", kernel=(2, 3, 2), stride=(1, 2, 2), padding=(1, 1, 0)),
    PoolCase("global", (2, 7, 6, 5), "global average: output 1",
        kind="adaptive", kernel=1, dtypes=ALL, schedules=True),
    PoolCase("global_channels_last", (2, 33, 6, 5), "global average, channels innermost",
        kind="adaptive", kernel=1, layout="channels_last"),
    PoolCase("adaptive_even", (2, 3, 8, 6), "windows of one size", kind="adaptive", kernel=(4, 3)),
    PoolCase("adaptive_uneven", (2, 3, 7, 11), "windows of several sizes that overlap",
        kind="adaptive", kernel=(3, 4), dtypes=ALL),
    PoolCase("adaptive_larger", (1, 3, 4, 5), "an output larger than the input",
        kind="adaptive", kernel=(7, 6)),
    PoolCase("adaptive_keep", (2, 3, 7, 5), "None keeps an axis",
        kind="adaptive", kernel=(None, 2)),
    PoolCase("adaptive_offset", (2, 4, 8, 8), "starts off alignment, gradient of a sum",
        kind="adaptive", kernel=3, layout="offset", grad="expanded"),
    PoolCase("adaptive_empty_batch", (0, 3, 6, 6), "no image", kind="adaptive", kernel=2),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NormCase(Case):
    """Batch norm, with `spread` and `shift` of the input; `mode` is train or eval.

    `half_parameters`: in half types, per-channel tensors are half too instead of float32.
    """

    mode: str = "train"
    affine: bool = True
    track: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    residual: bool = False
    activation: str = "none"
    half_parameters: bool = False
    spread: float = 1.0
    shift: float = 0.5

    @property
    def training(self) -> bool:
        return self.mode == "train"

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        half = dtype in (torch.float16, torch.bfloat16)
        per_channel = torch.float32 if half and not self.half_parameters else dtype
        x = laid_out(self.x, self.layout, lambda size: self._scaled(size).to(dtype))
        found = [x]
        if self.affine:
            found.append((1 + normal(2, torch.float64)(self.x[1:2]) / 4).to(per_channel))
            found.append(normal(3, per_channel)(self.x[1:2]))
        if self.residual:
            found.append(laid_out(self.x, self.layout, normal(4, dtype)))
        return [_moved(t, device) for t in found]

    def _scaled(self, size: Size) -> Tensor:
        return normal(1, torch.float64)(size) * self.spread + self.shift

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Running mean and variance, of the dtype that goes with input `like`, the same at every call."""
        if self.training and not self.track:
            return None, None
        half = like.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half and not self.half_parameters else like.dtype
        # Rounded to the coarsest type: the float64 reference starts from the same numbers.
        mean, noise = (normal(seed, torch.bfloat16)(self.x[1:2]).to(dtype) for seed in (5, 6))
        return mean.to(like.device), (noise.abs() + 0.5).to(like.device)

    def _split(self, rest: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        tensors = list(rest)
        weight, bias = (tensors.pop(0), tensors.pop(0)) if self.affine else (None, None)
        return weight, bias, tensors.pop(0) if self.residual else None

    def ours(self, x: Tensor, *rest: Tensor, statistics: Any = None) -> Tensor:
        weight, bias, residual = self._split(rest)
        mean, var = statistics or self.statistics(x)
        return C.batch_norm_act(
            x,
            mean,
            var,
            weight,
            bias,
            self.training,
            self.momentum,
            self.eps,
            residual,
            self.activation,
        )

    def theirs(self, x: Tensor, *rest: Tensor, statistics: Any = None) -> Tensor:
        weight, bias, residual = self._split(rest)
        mean, var = statistics or self.statistics(x)
        z = F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)
        return ACTIVATIONS[self.activation](z if residual is None else z + residual)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _activations() -> Iterable[NormCase]:
    for activation in ACTIVATIONS:
        for mode in ("train", "eval"):
            yield NormCase(
                f"{mode}_residual_{activation}",
                (2, 3, 6, 5),
                "residual and activation in the same pass",
                mode=mode,
                residual=True,
                activation=activation,
                dtypes=ALL if activation in ("none", "relu", "gelu") else FLOAT32,
                schedules=activation == "relu",
            )


NORM_CASES = (
    NormCase("train", (4, 3, 6, 5), "the usual one", dtypes=ALL, schedules=True),
    NormCase("eval", (4, 3, 6, 5), "with running statistics",
        mode="eval", dtypes=ALL, schedules=True),
    *_activations(),
    NormCase("train_relu", (3, 5, 4, 7), "activation without residual", activation="relu"),
    NormCase("eval_relu", (3, 5, 4, 7), "activation without residual",
        activation="relu", mode="eval"),
    NormCase("train_plain", (4, 3, 6, 5), "no weight, no bias",
        affine=False, activation="silu", residual=True),
    NormCase("eval_plain", (4, 3, 6, 5), "no weight, no bias",
        affine=False, mode="eval", dtypes=ALL),
    NormCase("untracked", (4, 3, 6, 5), "no running statistics at all", track=False),
    NormCase("half_parameters", (4, 3, 6, 5), "all tensors of the half type",
        half_parameters=True, activation="relu", dtypes=ALL),
    NormCase("eval_half_parameters", (4, 3, 6, 5), "all tensors of the half type",
        half_parameters=True, mode="eval", dtypes=ALL),
    NormCase("momentum_0", (3, 3, 4, 4), "running statistics stay", momentum=0.0),
    NormCase("momentum_1", (3, 3, 4, 4), "running statistics become the batch's", momentum=1.0),
    NormCase("large_eps", (3, 3, 4, 4), "eps of the variance's order", eps=0.5),
    NormCase("large_mean", (4, 3, 8, 8), "mean 100, deviation 0.01: E[x²] - E[x]² would be noise",
        shift=100.0, spread=0.01, eps=1e-8, aten_limit=1e-3),
    NormCase("constant", (3, 3, 4, 5), "variance 0: rstd is 1/sqrt(eps)", spread=0.0, aten_limit=1e-4),
    NormCase("two_values", (2, 3, 1, 1), "the fewest values that have a variance",
        eps=0.1),
    NormCase("two_dims", (9, 5), "N x D, behind a dense layer", residual=True, activation="relu"),
    NormCase("three_dims", (3, 5, 11), "N x C x L", dtypes=ALL),
    NormCase("five_dims", (2, 3, 4, 3, 5), "N x C x D x H x W"),
    NormCase("one_channel", (2, 1, 13, 7), "C = 1"),
    NormCase("channels_33", (2, 33, 5, 7), "odd planes, odd channels"),
    NormCase("one_image", (1, 7, 9, 9), "a batch of one"),
    NormCase("long_plane", (2, 2, 67, 65), "planes of several blocks", schedules=True),
    NormCase("many_images", (70, 3, 3, 3), "many short planes"),
    NormCase("channels_last", (3, 8, 6, 5), "channels innermost",
        layout="channels_last", residual=True, activation="relu", dtypes=ALL, schedules=True),
    NormCase("channels_last_33", (2, 33, 7, 5), "odd channels innermost", layout="channels_last"),
    NormCase("eval_channels_last", (3, 8, 6, 5), "channels innermost",
        layout="channels_last", mode="eval", activation="relu", dtypes=ALL),
    NormCase("channels_last_long", (4, 6, 33, 31), "channels-last, many blocks",
        layout="channels_last", schedules=True),
    NormCase("mixed_gradient", (3, 8, 6, 5), "channels-last, its gradient contiguous",
        layout="channels_last", grad="contiguous"),
    NormCase("sliced", (3, 4, 6, 5), "every second channel of a wider image",
        layout="sliced", residual=True, activation="relu"),
    NormCase("eval_sliced", (3, 4, 6, 5), "every second channel of a wider image",
        layout="sliced", mode="eval"),
    NormCase("transposed", (3, 4, 6, 5), "columns and rows swapped in memory", layout="transposed"),
    NormCase("expanded", (3, 4, 6, 5), "one image as a whole batch", layout="expanded"),
    NormCase("expanded_gradient", (3, 4, 6, 8), "the gradient of a sum",
        mode="eval", grad="expanded"),
    NormCase("offset", (3, 4, 8, 8), "starts off alignment",
        layout="offset", residual=True, activation="relu", dtypes=ALL),
    NormCase("offset_channels_last", (3, 8, 6, 5), "channels-last off alignment",
        layout="channels_last_offset"),
    NormCase("empty_batch", (0, 3, 4, 4), "no image: gradients are zeros"),
    NormCase("eval_empty_batch", (0, 3, 4, 4), "no image",
        mode="eval", residual=True, activation="relu"),
)  # fmt: skip


# ---- the grid -------------------------------------------------------------------------------------------


needs_emulator = pytest.mark.skipif(
    bool(emulate.available()), reason=f"CUDA kernels cannot be emulated here: {emulate.available()}"
)


def _engines() -> list[Any]:
    found: list[Any] = ["aten", "cpu", pytest.param("emulate", marks=needs_emulator)]
    if torch.cuda.is_available():
        found.append(pytest.param("cuda", marks=pytest.mark.gpu))
    return found


ENGINES = _engines()
"""For ``parametrize``: every engine that this machine may run, and "emulate" skipped with the reason."""


def device_of(engine: str) -> str:
    return "cuda" if engine == "cuda" else "cpu"


def grid(cases: Iterable[Case]) -> list[Any]:
    """Rows x engines x dtypes, as parameters (case, engine, dtype)."""
    parameters = []
    for case in cases:
        for engine in ENGINES:
            name, marks = (
                (engine, ()) if isinstance(engine, str) else (engine.values[0], engine.marks)
            )
            for dtype in case.dtypes:
                label = f"{case.id}-{name}-{str(dtype).removeprefix('torch.')}"
                parameters.append(pytest.param(case, name, dtype, id=label, marks=marks))
    return parameters


CASES: tuple[Case, ...] = (*CONV_CASES, *POOL_CASES, *NORM_CASES)
