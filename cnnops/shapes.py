"""Problem sizes: every rule about sizes, and every error about them, lives here.

Letters are those of CUTLASS's convolution problems, for one to three spatial axes:

    x       N C (D) (H) W       input, batch first
    w       K C/groups (T) (R) S   filters
    y       N K (Z) (P) Q       output

A shape is immutable and hashable, so that launch plans can be cached on it. Building one checks it: what
comes out of a constructor is a problem that every kernel may take at its word. Exceptions have the type
that PyTorch raises for the same mistake; messages say "expected …, got …".
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal, NamedTuple

from torch import SymInt

Direction = Literal["fprop", "dgrad", "wgrad"]
Axes = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Gemm(NamedTuple):
    """The implicit matrix product of one group: an M x K operand times a K x N operand."""

    M: int
    N: int
    K: int


def whole(value: object, name: str) -> int:
    """`value` as an int: ints and what stands for one (a 0-d integer tensor), but no bool, as in torch. A
    size that torch.compile or torch.export leaves open stays so.

    Raises TypeError for anything else.
    """
    if type(value) is int or isinstance(value, SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    return operator.index(value)


def axes(value: int | Sequence[int], dims: int, name: str) -> Axes:
    """`value` as a tuple of `dims` ints: one int, or one element, stands for every axis (as in torch)."""
    if not isinstance(value, (tuple, list)):
        return (whole(value, name),) * dims
    values = tuple(whole(v, name) for v in value)
    if len(values) == 1:
        return values * dims
    if len(values) != dims:
        raise RuntimeError(f"{name}: expected one int or {dims} ints, got {list(values)}")
    return values


def _positive(values: Axes, name: str) -> None:
    if any(v <= 0 for v in values):
        raise RuntimeError(f"{name}: expected every value to be at least 1, got {list(values)}")


def padding_pairs(
    padding: int | str | Sequence[int] | Sequence[tuple[int, int]],
    kernel: Axes,
    stride: Axes,
    dilation: Axes,
) -> Padding:
    """Padding of every axis as (before, after).

    Takes an int, one int an axis, one (before, after) pair an axis, "valid" or "same". "same" keeps the
    output as large as the input; where its total p is odd (an even kernel span), ``floor(p / 2)`` goes
    before and ``ceil(p / 2)`` after, as PyTorch has it. In a pair a negative value crops the input.
    Raises RuntimeError for anything else.
    """
    dims = len(kernel)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * dims
        if padding == "same":
            if any(s != 1 for s in stride):
                raise RuntimeError(f"padding='same': expected stride 1, got {list(stride)}")
            totals = [r * (k - 1) for k, r in zip(kernel, dilation, strict=True)]
            return tuple((p // 2, p - p // 2) for p in totals)
        raise RuntimeError(f"padding: expected an int, a tuple, 'same' or 'valid', got {padding!r}")
    if isinstance(padding, (tuple, list)) and any(isinstance(p, (tuple, list)) for p in padding):
        sides = [axes(p, 2, "padding") for p in padding]
        if len(sides) != dims:
            raise RuntimeError(f"padding: expected {dims} (before, after) pairs, got {sides}")
        return tuple((before, after) for before, after in sides)
    values = axes(padding, dims, "padding")  # type: ignore[arg-type]
    if any(p < 0 for p in values):
        raise RuntimeError(f"padding: expected no negative value, got {list(values)}")
    return tuple((p, p) for p in values)


def _check_padding_mode(mode: str, spatial: Axes, padding: Padding) -> None:
    if mode not in PADDING_MODES:
        raise ValueError(f"padding_mode: expected one of {', '.join(PADDING_MODES)}, got {mode!r}")
    if mode == "zeros":
        return
    for size, pair in zip(spatial, padding, strict=True):
        if any(p < 0 for p in pair):
            raise RuntimeError(
                f"padding: expected no negative value for padding_mode {mode!r}, got {list(padding)}"
            )
        most = {"reflect": size - 1, "circular": size}.get(mode, max(pair))
        if max(pair) > most:
            raise RuntimeError(
                f"padding: expected at most {most} on each side of an axis of {size} for padding_mode "
                f"{mode!r}, got {list(padding)}"
            )


def conv_output(size: int, kernel: int, stride: int, pad: tuple[int, int], dilation: int) -> int:
    """``floor((H - span + P_before + P_after) / S) + 1`` with ``span = dilation * (kernel - 1) + 1``."""
    return (size + pad[0] + pad[1] - dilation * (kernel - 1) - 1) // stride + 1


def pool_output(
    size: int, kernel: int, stride: int, pad: tuple[int, int], dilation: int, ceil_mode: bool
) -> int:
    """As `conv_output`; with `ceil_mode` rounded up, but no window may start beyond input and leading pad."""
    reach = size + pad[0] + pad[1] - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return reach // stride + 1
    out = -(-reach // stride) + 1
    return out - 1 if (out - 1) * stride >= size + pad[0] else out


def adaptive_output(output: int | Sequence[int | None], spatial: Axes) -> Axes:
    """The size that adaptive pooling is asked for: one int an axis, where None keeps that of `spatial`."""
    if not isinstance(output, (tuple, list)):
        return (whole(output, "output_size"),) * len(spatial)
    if len(output) != len(spatial):
        raise RuntimeError(
            f"output_size: expected one int or {len(spatial)} ints, got {list(output)}"
        )
    pairs = zip(output, spatial, strict=True)
    return tuple(h if o is None else whole(o, "output_size") for o, h in pairs)


class _Hashed:
    """A shape is looked up in several tables a call: its hash is computed once."""

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return self._hash


class _Spatial(_Hashed):
    """Letters for the spatial axes; an axis that a 1-D or 2-D problem lacks has size 1."""

    spatial: Axes
    kernel: Axes

    @staticmethod
    def _three(values: Axes) -> tuple[int, int, int]:
        filled = (1, 1, 1) + values
        return filled[-3], filled[-2], filled[-1]

    @property
    def dims(self) -> int:
        return len(self.spatial)

    @property
    def output(self) -> Axes:
        raise AssertionError("every shape states its output")

    @cached_property
    def DHW(self) -> tuple[int, int, int]:
        return self._three(self.spatial)

    @cached_property
    def TRS(self) -> tuple[int, int, int]:
        return self._three(self.kernel)

    @cached_property
    def ZPQ(self) -> tuple[int, int, int]:
        return self._three(self.output)


@dataclass(frozen=True)
class ConvShape(_Spatial):
    """One convolution (cross-correlation), forward or either gradient.

    ``y[n,k,p,q] = b[k] + sum_{c,r,s} w[k,c,r,s] * x[n, c, p*stride + r*dilation - pad, …]`` with c over
    the C/groups channels of k's group. Outside of its plane x is zero, or what `padding_mode` continues it
    with: for a coordinate h of an axis of size H, x at

        reflect     -h below 0, 2·(H - 1) - h from H on
        replicate   0 below 0, H - 1 from H on
        circular    h modulo H
    """

    N: int
    C: int
    K: int
    spatial: Axes
    kernel: Axes
    stride: Axes
    padding: Padding
    dilation: Axes
    groups: int = 1
    padding_mode: str = "zeros"

    __hash__ = _Hashed.__hash__  # a dataclass would write its own

    @classmethod
    def of(
        cls,
        x: Sequence[int],
        w: Sequence[int],
        bias: Sequence[int] | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] | Sequence[tuple[int, int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> ConvShape:
        """From tensor sizes and torch's arguments: x ``N C *spatial``, w ``K C/groups *kernel``, bias ``K``.

        Raises RuntimeError, as ``torch.nn.functional.conv2d`` and, for its modes, ``pad`` do, when they do
        not fit together; ValueError for an unknown `padding_mode`.
        """
        dims = len(w) - 2
        if not 1 <= dims <= 3:
            raise RuntimeError(f"weight: expected 3 to 5 dimensions, got {len(w)} ({list(w)})")
        if len(x) != dims + 2:
            raise RuntimeError(f"input: expected {dims + 2} dimensions, got {len(x)} ({list(x)})")
        if groups <= 0:
            raise RuntimeError(f"groups: expected a positive int, got {groups}")
        steps, spans = axes(stride, dims, "stride"), axes(dilation, dims, "dilation")
        _positive(steps, "stride")
        _positive(spans, "dilation")
        _positive(tuple(w[2:]), "kernel size")
        K, per_group = w[0], w[1]
        if math.prod(x[:2]) and not math.prod(x[2:]):
            raise RuntimeError(
                f"input: expected no empty axis but batch or channels, got {list(x)}"
            )
        if K < groups or K % groups:
            raise RuntimeError(
                f"weight: expected dimension 0 to be a positive multiple of groups={groups}, got {K}"
            )
        if x[1] != per_group * groups:
            raise RuntimeError(
                f"input: expected {per_group * groups} channels for weight {list(w)} and groups={groups}, "
                f"got {x[1]} channels ({list(x)})"
            )
        if bias is not None and tuple(bias) != (K,):
            raise RuntimeError(f"bias: expected size [{K}], got {list(bias)}")
        kernel = tuple(w[2:])
        pairs = padding_pairs(padding, kernel, steps, spans)
        _check_padding_mode(padding_mode, tuple(x[2:]), pairs)
        if any(h + min(a, 0) + min(b, 0) < 0 for h, (a, b) in zip(x[2:], pairs, strict=True)):
            raise RuntimeError(
                f"padding: expected to crop at most the input's {list(x[2:])}, got {list(pairs)}"
            )
        shape = cls(x[0], x[1], K, tuple(x[2:]), kernel, steps, pairs, spans, groups, padding_mode)
        padded = [h + a + b for h, (a, b) in zip(shape.spatial, pairs, strict=True)]
        span = [r * (k - 1) + 1 for k, r in zip(kernel, spans, strict=True)]
        if any(s > h for s, h in zip(span, padded, strict=True)):
            raise RuntimeError(
                f"input: expected padded sizes of at least the kernel's span {span}, got {padded}"
            )
        return shape

    @classmethod
    def transposed(
        cls,
        x: Sequence[int],
        w: Sequence[int],
        bias: Sequence[int] | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> ConvShape:
        """The convolution whose input gradient is this transposed convolution: x ``N K *output`` is its
        grad_y, w ``K C/groups *kernel`` its filters, and the result ``N C *spatial`` its grad_x, of size
        ``(P - 1)·stride - 2·padding + dilation·(R - 1) + output_padding + 1``.

        Raises RuntimeError, as ``torch.nn.functional.conv_transpose2d`` does, when they do not fit together.
        """
        dims = len(w) - 2
        if not 1 <= dims <= 3:
            raise RuntimeError(f"weight: expected 3 to 5 dimensions, got {len(w)} ({list(w)})")
        if len(x) != dims + 2:
            raise RuntimeError(f"input: expected {dims + 2} dimensions, got {len(x)} ({list(x)})")
        if groups <= 0:
            raise RuntimeError(f"groups: expected a positive int, got {groups}")
        steps, spans = axes(stride, dims, "stride"), axes(dilation, dims, "dilation")
        pads, extra = axes(padding, dims, "padding"), axes(output_padding, dims, "output_padding")
        _positive(steps, "stride")
        _positive(spans, "dilation")
        for values, name in ((pads, "padding"), (extra, "output_padding")):
            if any(v < 0 for v in values):
                raise RuntimeError(f"{name}: expected no negative value, got {list(values)}")
        kernel = tuple(w[2:])
        _positive(kernel, "kernel size")
        if any(e >= max(s, d) for e, s, d in zip(extra, steps, spans, strict=True)):
            raise RuntimeError(
                f"output_padding: expected less than stride {list(steps)} or dilation {list(spans)}, "
                f"got {list(extra)}"
            )
        if math.prod(x[:2]) and not math.prod(x[2:]):
            raise RuntimeError(
                f"input: expected no empty axis but batch or channels, got {list(x)}"
            )
        if w[0] < groups or w[0] % groups:
            raise RuntimeError(
                f"weight: expected dimension 0 to be a positive multiple of groups={groups}, got {w[0]}"
            )
        if x[1] != w[0]:
            raise RuntimeError(
                f"input: expected {w[0]} channels for weight {list(w)}, got {x[1]} channels ({list(x)})"
            )
        C = w[1] * groups
        if bias is not None and tuple(bias) != (C,):
            raise RuntimeError(f"bias: expected size [{C}], got {list(bias)}")
        out = tuple(
            (p - 1) * s - 2 * pad + r * (k - 1) + e + 1
            for p, s, pad, r, k, e in zip(x[2:], steps, pads, spans, kernel, extra, strict=True)
        )
        if any(o <= 0 for o in out):
            raise RuntimeError(
                f"input: expected sizes that leave an output, got {list(x)} -> {list(out)}"
            )
        # Rows that only output_padding adds are beyond every window. Whole strides of them would be windows
        # of the convolution: they are taken from its padding, which may so become negative.
        pairs = tuple((pad, pad - e // s * s) for pad, e, s in zip(pads, extra, steps, strict=True))
        return cls(x[0], C, x[1], out, kernel, steps, pairs, spans, groups)

    @property
    def padded(self) -> ConvShape:
        """The same convolution of an input that has its padding already."""
        spatial = tuple(h + a + b for h, (a, b) in zip(self.spatial, self.padding, strict=True))
        return replace(self, spatial=spatial, padding=((0, 0),) * self.dims, padding_mode="zeros")

    @cached_property
    def output(self) -> Axes:
        return tuple(
            conv_output(*a)
            for a in zip(
                self.spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @cached_property
    def x_size(self) -> Axes:
        return (self.N, self.C, *self.spatial)

    @cached_property
    def w_size(self) -> Axes:
        return (self.K, self.C // self.groups, *self.kernel)

    @cached_property
    def y_size(self) -> Axes:
        return (self.N, self.K, *self.output)

    def gemm_mnk(self, direction: Direction) -> Gemm:
        """The implicit GEMM of one group.

        fprop: M = N·Z·P·Q, N = K/g, K = C/g·T·R·S. dgrad: M = N·D·H·W, N = C/g, K = K/g·T·R·S.
        wgrad: M = K/g, N = C/g·T·R·S, K = N·Z·P·Q.
        """
        c, k = self.C // self.groups, self.K // self.groups
        taps = math.prod(self.kernel)
        if direction == "fprop":
            return Gemm(self.N * math.prod(self.output), k, c * taps)
        if direction == "dgrad":
            return Gemm(self.N * math.prod(self.spatial), c, k * taps)
        return Gemm(k, c * taps, self.N * math.prod(self.output))

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass, and of either gradient: N·K·Z·P·Q · C/g·T·R·S."""
        return (
            self.N
            * self.K
            * math.prod(self.output)
            * (self.C // self.groups)
            * math.prod(self.kernel)
        )

    @property
    def flops(self) -> int:
        """Two a multiply-add; the bias is not counted."""
        return 2 * self.macs

    @property
    def parameters(self) -> int:
        """Weights and one bias an output channel: K·(C/g·T·R·S + 1)."""
        return self.K * ((self.C // self.groups) * math.prod(self.kernel) + 1)

    def bytes_moved(self, direction: Direction, itemsize: int) -> int:
        """The least traffic: both operands of `direction` read once, its result written once."""
        return itemsize * (math.prod(self.x_size) + math.prod(self.w_size) + math.prod(self.y_size))


@dataclass(frozen=True)
class PoolShape(_Spatial):
    """Max or average pooling over windows of each channel's plane.

    ``adaptive`` windows of output p cover ``floor(p·H/P) … ceil((p+1)·H/P)`` (PyTorch's rule); for them
    `kernel` is the largest window, in which offsets count, too, and stride, padding and dilation are not
    used. ``count_include_pad`` and
    ``divisor_override`` concern averages only.
    """

    N: int
    C: int
    spatial: Axes
    kernel: Axes
    stride: Axes
    padding: Padding
    dilation: Axes
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    adaptive_output: Axes | None = None

    __hash__ = _Hashed.__hash__  # a dataclass would write its own

    @classmethod
    def of(
        cls,
        x: Sequence[int],
        kernel: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> PoolShape:
        """From the input's size ``N C *spatial`` and torch's arguments (stride None: the kernel's size).

        Raises RuntimeError, as ``torch.nn.functional.max_pool2d`` does, when they do not fit together.
        """
        dims = _pool_dims(x, 1)
        window = axes(kernel, dims, "kernel_size")
        steps = (
            window
            if stride is None or stride == [] or stride == ()
            else axes(stride, dims, "stride")
        )
        spans, pads = axes(dilation, dims, "dilation"), axes(padding, dims, "padding")
        for values, name in ((window, "kernel_size"), (steps, "stride"), (spans, "dilation")):
            _positive(values, name)
        if any(not 0 <= p <= k // 2 for p, k in zip(pads, window, strict=True)):
            raise RuntimeError(
                f"padding: expected 0 to half the kernel_size {list(window)}, got {list(pads)}"
            )
        if divisor_override == 0:
            raise RuntimeError("divisor_override: expected a non-zero int, got 0")
        shape = cls(
            x[0], x[1], tuple(x[2:]), window, steps, tuple((p, p) for p in pads), spans, ceil_mode,
            count_include_pad, divisor_override,
        )  # fmt: skip
        if any(o <= 0 for o in shape.output):
            raise RuntimeError(
                f"input: expected planes that hold a window of {list(window)}, got {list(x)}, "
                f"output size {list(shape.output)}"
            )
        return shape

    @classmethod
    def adaptive(cls, x: Sequence[int], output: int | Sequence[int | None]) -> PoolShape:
        """From the input's size and the output's (None keeps an axis). Raises RuntimeError on a bad size."""
        dims = _pool_dims(x, 2)
        spatial = tuple(x[2:])
        out = adaptive_output(output, spatial)
        if any(o < 0 for o in out):
            raise RuntimeError(f"output_size: expected no negative value, got {list(out)}")
        window = tuple(
            max((-(-(p + 1) * h // o) - p * h // o for p in range(o)), default=1)
            for h, o in zip(spatial, out, strict=True)
        )
        ones = (1,) * dims
        return cls(x[0], x[1], spatial, window, ones, ((0, 0),) * dims, ones, adaptive_output=out)

    @cached_property
    def output(self) -> Axes:
        if self.adaptive_output is not None:
            return self.adaptive_output
        return tuple(
            pool_output(*a, self.ceil_mode)
            for a in zip(
                self.spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @cached_property
    def x_size(self) -> Axes:
        return (self.N, self.C, *self.spatial)

    @cached_property
    def y_size(self) -> Axes:
        return (self.N, self.C, *self.output)

    @property
    def places(self) -> int:
        """Places in a window; a max-pooling offset counts them row by row from 0."""
        return math.prod(self.kernel)

    @property
    def flops(self) -> int:
        """One comparison or addition a place of every window."""
        return math.prod(self.y_size) * self.places

    def bytes_moved(self, itemsize: int, offset_bytes: int = 0) -> int:
        """Input once, output once, and an offset of `offset_bytes` for every output of max pooling."""
        return math.prod(self.x_size) * itemsize + math.prod(self.y_size) * (
            itemsize + offset_bytes
        )


def _pool_dims(x: Sequence[int], filled_from: int) -> int:
    """Spatial axes of `x`, whose sizes from axis `filled_from` on may not be zero."""
    dims = len(x) - 2
    if not 1 <= dims <= 3:
        raise RuntimeError(f"input: expected 3 to 5 dimensions, got {len(x)} ({list(x)})")
    if any(s == 0 for s in x[filled_from:]):
        raise RuntimeError(
            f"input: expected non-zero sizes from axis {filled_from} on, got {list(x)}"
        )
    return dims


@dataclass(frozen=True)
class UnpoolShape(_Hashed):
    """Values ``N C *spatial`` put at given places of planes ``N C *output`` that are zero elsewhere."""

    N: int
    C: int
    spatial: Axes
    output: Axes

    __hash__ = _Hashed.__hash__  # a dataclass would write its own

    @classmethod
    def of(cls, x: Sequence[int], indices: Sequence[int], output: Sequence[int]) -> UnpoolShape:
        """From the sizes of the values ``N C *spatial``, of their indices and of an output plane.

        Raises RuntimeError, as ``torch.nn.functional.max_unpool2d`` does, when they do not fit together.
        """
        dims = _pool_dims(x, 2)
        if tuple(indices) != tuple(x):
            raise RuntimeError(f"indices: expected the input's size {list(x)}, got {list(indices)}")
        if len(output) != dims or any(o < 0 for o in output):
            raise RuntimeError(
                f"output_size: expected {dims} ints of at least 0, got {list(output)}"
            )
        return cls(x[0], x[1], tuple(x[2:]), tuple(output))

    @property
    def x_size(self) -> Axes:
        return (self.N, self.C, *self.spatial)

    @property
    def y_size(self) -> Axes:
        return (self.N, self.C, *self.output)

    def bytes_moved(self, itemsize: int) -> int:
        """Values and their int64 indices once, the output once."""
        return math.prod(self.x_size) * (itemsize + 8) + math.prod(self.y_size) * itemsize


@dataclass(frozen=True)
class NormShape(_Hashed):
    """Normalisation of ``N C *spatial`` (spatial may be empty); statistics over N and every spatial axis."""

    N: int
    C: int
    spatial: Axes

    __hash__ = _Hashed.__hash__  # a dataclass would write its own

    @classmethod
    def of(
        cls,
        x: Sequence[int],
        weight: Sequence[int] | None = None,
        bias: Sequence[int] | None = None,
        running_mean: Sequence[int] | None = None,
        running_var: Sequence[int] | None = None,
        residual: Sequence[int] | None = None,
        training: bool = False,
    ) -> NormShape:
        """From tensor sizes. Per-channel tensors must be ``C`` long, `residual` as large as x.

        Raises RuntimeError for a size that does not fit, ValueError when training statistics would come
        from a single value a channel: both as ``torch.nn.functional.batch_norm`` does.
        """
        if len(x) < 2:
            raise RuntimeError(f"input: expected at least 2 dimensions, got {len(x)} ({list(x)})")
        shape = cls(x[0], x[1], tuple(x[2:]))
        if training and shape.count == 1:
            raise ValueError(
                f"input: expected more than 1 value per channel when training, got input size {list(x)}"
            )
        channels = {
            "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias
        }  # fmt: skip
        for name, size in channels.items():
            if size is not None and tuple(size) != (shape.C,):
                raise RuntimeError(f"{name}: expected size [{shape.C}], got {list(size)}")
        if residual is not None and tuple(residual) != tuple(x):
            raise RuntimeError(f"residual: expected size {list(x)}, got {list(residual)}")
        return shape

    @property
    def L(self) -> int:
        """Places of one channel's plane."""
        return math.prod(self.spatial)

    @property
    def count(self) -> int:
        """Values a channel's statistics are taken over."""
        return self.N * self.L

    @property
    def x_size(self) -> Axes:
        return (self.N, self.C, *self.spatial)

    def bytes_moved(self, itemsize: int, reads: int, writes: int) -> int:
        """`reads` plus `writes` passes over a tensor of the input's size, without per-channel vectors."""
        return (reads + writes) * itemsize * math.prod(self.x_size)


@dataclass(frozen=True)
class GroupShape(_Hashed):
    """Normalisation of ``N C *spatial`` in `groups` of neighbouring channels; statistics of every image and
    group over the group's C/groups channels and all spatial axes. ``groups == C`` is instance norm.
    """

    N: int
    C: int
    spatial: Axes
    groups: int

    __hash__ = _Hashed.__hash__  # a dataclass would write its own

    @classmethod
    def of(
        cls,
        x: Sequence[int],
        groups: int,
        weight: Sequence[int] | None = None,
        bias: Sequence[int] | None = None,
    ) -> GroupShape:
        """From tensor sizes: weight and bias are ``C`` long.

        Raises RuntimeError for a size that does not fit, as ``torch.nn.functional.group_norm`` does.
        """
        if len(x) < 2:
            raise RuntimeError(f"input: expected at least 2 dimensions, got {len(x)} ({list(x)})")
        if groups <= 0:
            raise RuntimeError(f"num_groups: expected a positive int, got {groups}")
        if x[1] % groups:
            raise RuntimeError(
                f"input: expected channels in a multiple of num_groups={groups}, got {x[1]} ({list(x)})"
            )
        for name, size in (("weight", weight), ("bias", bias)):
            if size is not None and tuple(size) != (x[1],):
                raise RuntimeError(f"{name}: expected size [{x[1]}], got {list(size)}")
        return cls(x[0], x[1], tuple(x[2:]), groups)

    @property
    def L(self) -> int:
        """Places of one channel's plane."""
        return math.prod(self.spatial)

    @property
    def count(self) -> int:
        """Values that one mean is taken over."""
        return self.C // self.groups * self.L

    @property
    def x_size(self) -> Axes:
        return (self.N, self.C, *self.spatial)

    @property
    def statistics_size(self) -> Axes:
        return (self.N, self.groups)

    def bytes_moved(self, itemsize: int, reads: int, writes: int) -> int:
        """`reads` plus `writes` passes over a tensor of the input's size, without vectors."""
        return (reads + writes) * itemsize * math.prod(self.x_size)


@dataclass(frozen=True)
class LayerShape(_Hashed):
    """Normalisation of rows: statistics over the last axes, of size `normalized`, of every row of `outer`."""

    outer: Axes
    normalized: Axes

    __hash__ = _Hashed.__hash__  # a dataclass would write its own

    @classmethod
    def of(
        cls,
        x: Sequence[int],
        normalized: Sequence[int],
        weight: Sequence[int] | None = None,
        bias: Sequence[int] | None = None,
    ) -> LayerShape:
        """From tensor sizes: x ends with `normalized`, weight and bias have just that size.

        Raises RuntimeError for a size that does not fit, as ``torch.nn.functional.layer_norm`` does.
        """
        row, split = tuple(normalized), len(x) - len(normalized)
        if not row:
            raise RuntimeError("normalized_shape: expected at least 1 dimension, got []")
        if split < 0 or tuple(x[split:]) != row:
            raise RuntimeError(f"input: expected size [*, {str(list(row))[1:-1]}], got {list(x)}")
        for name, size in (("weight", weight), ("bias", bias)):
            if size is not None and tuple(size) != row:
                raise RuntimeError(f"{name}: expected size {list(row)}, got {list(size)}")
        return cls(tuple(x[:split]), row)

    @property
    def N(self) -> int:
        """Rows."""
        return math.prod(self.outer)

    @property
    def D(self) -> int:
        """Values of a row."""
        return math.prod(self.normalized)

    @property
    def x_size(self) -> Axes:
        return (*self.outer, *self.normalized)

    @property
    def statistics_size(self) -> Axes:
        return self.outer

    def bytes_moved(self, itemsize: int, reads: int, writes: int) -> int:
        """`reads` plus `writes` passes over a tensor of the input's size, without vectors."""
        return (reads + writes) * itemsize * math.prod(self.x_size)


Shape = ConvShape | PoolShape | UnpoolShape | NormShape | GroupShape | LayerShape
"""Every kind of problem."""


def receptive_field(layers: Iterable[tuple[int, int]]) -> int:
    """Receptive field of one output of a stack of (kernel, stride) layers: ``r += (K - 1)·j; j *= S``."""
    field, jump = 1, 1
    for kernel, stride in layers:
        field += (kernel - 1) * jump
        jump *= stride
    return field


def floor_seconds(
    flops: float, bytes_moved: float, flops_per_s: float, bytes_per_s: float
) -> float:
    """The roofline's lower bound on a kernel's time: arithmetic or traffic, whichever takes longer."""
    return max(flops / flops_per_s, bytes_moved / bytes_per_s)
