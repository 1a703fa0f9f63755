"""The receptive field of every tensor of a forward pass, carried along with the operations that make it.

A value sees ``r`` neighbouring places of the input, and its neighbour's sit ``j`` places further on:

    the input             r = 1, j = 1
    convolution, pooling  r += (K - 1)·dilation·j, then j *= S
    transposed            r += floor((K - 1)·dilation / S)·j, then j /= S; so do interpolations
    a sum over all n      r += (n - 1)·j: dense layers, means, softmax
    several inputs        the largest r

This is the formula of textbooks: padding counts as input, so r may exceed the image, and normalisation is an
operation on single values. What an operation that is not known here computes has no field, and neither has
what is computed from that: None, rather than a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """What a tensor sees of one spatial axis of the input.

    Its `n` places along that axis lie `inner` elements apart in dimension `dim`: 1 element, unless dimensions
    were flattened into one. `dim` None: nothing changes along the axis. `j` None: the steps differ.
    """

    r: Fraction
    j: Fraction | None
    dim: int | None
    inner: int
    n: int

    def over(self, span: int) -> Axis:
        """After an operation that reads `span` places from first to last."""
        if span == 1:
            return self
        if self.j is None:
            raise Unknown
        return replace(self, r=self.r + (span - 1) * self.j)

    def gathered(self) -> Axis:
        """After a sum over the whole axis."""
        return replace(self.over(self.n), dim=None, inner=1, n=1)

    def at(self, dim: int | None, inner: int = 1) -> Axis:
        """The same, lying elsewhere."""
        return replace(self, dim=dim, inner=inner)

    def plain(self, size: int) -> Axis:
        """With a dimension of `size` for itself: what repeats within a place (a pixel shuffle) are places."""
        if self.inner * self.n != size:
            raise Unknown
        return self.stepped(Fraction(1, self.inner), size)

    def stepped(self, stride: Fraction | int, n: int) -> Axis:
        """After an operation that moves on by `stride` places and leaves `n`."""
        return replace(self, j=None if self.j is None else self.j * stride, inner=1, n=n)


Field = tuple[Axis, ...]
"""An axis for each spatial axis of the input."""


class Unknown(Exception):
    """What an operation's result sees is not known."""


def of_input(x: Tensor) -> Field:
    """The field of a network's input ``N C *spatial``."""
    one = Fraction(1)
    return tuple(Axis(one, one, dim, 1, x.shape[dim]) for dim in range(2, x.dim()))


def size_of(field: Field | None) -> tuple[int, ...] | None:
    """r of every axis, rounded up to whole places; None where it is not known, or there are no axes."""
    return tuple(math.ceil(axis.r) for axis in field) if field else None


# ---- what operations do -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One operation: arguments by name, the field of each tensor that depends on the input, one result."""

    name: str
    arguments: dict[str, Any]
    fields: Sequence[tuple[Tensor, Field]]
    result: Tensor

    def get(self, *names: str) -> Any:
        """The argument that goes by one of these names."""
        return next((self.arguments[name] for name in names if name in self.arguments), None)

    @property
    def x(self) -> Tensor:
        """The one tensor of the input's making, beside which all others are parameters."""
        first = self.fields[0][0]
        if any(t is not first for t, _ in self.fields):
            raise Unknown
        return first

    @property
    def field(self) -> Field:
        return self.fields[0][1]


def _window(call: Call, kernel: Sequence[int], transposed: bool = False) -> Field:
    """Windows over the last ``len(kernel)`` dimensions."""
    dims, x = len(kernel), call.x

    def each(value: Any, default: Sequence[int]) -> Sequence[int]:
        given = [value] if isinstance(value, int) else list(value or default)
        return given * dims if len(given) == 1 else given

    strides = each(call.get("stride"), [1] * dims if call.name in CONV else kernel)
    spans = each(call.get("dilation"), [1] * dims)
    found = []
    for axis in call.field:
        if axis.dim is None or axis.dim < x.dim() - dims:
            found.append(axis)
            continue
        i = axis.dim - (x.dim() - dims)
        k, s, d, n = kernel[i], strides[i], spans[i], call.result.shape[axis.dim]
        axis = axis.plain(x.shape[axis.dim])
        if transposed:
            found.append(axis.over((k - 1) * d // s + 1).stepped(Fraction(1, s), n))
        else:
            found.append(axis.over((k - 1) * d + 1).stepped(s, n))
    return tuple(found)


def _conv(call: Call) -> Field:
    w = call.get("weight", "w")
    channels = call.x.dim() - w.dim() + 1
    if any(axis.dim == channels for axis in call.field):
        raise Unknown
    transposed = call.name == "conv_dgrad" or bool(call.get("transposed", "size"))
    return _window(call, w.shape[2:], transposed)


def _pool(call: Call) -> Field:
    output = call.get("output", "output_size")
    if output is None:
        kernel = call.get("kernel", "kernel_size")
        return _window(call, [kernel] if isinstance(kernel, int) else kernel)
    found = []
    for axis in call.field:
        if axis.dim is not None and axis.dim >= call.x.dim() - len(output):
            h, p = call.x.shape[axis.dim], call.result.shape[axis.dim]
            largest = max(-(-(i + 1) * h // p) - i * h // p for i in range(p))
            axis = axis.plain(h).over(largest).stepped(Fraction(h, p), p)
            axis = axis if h % p == 0 else replace(axis, j=None)
        found.append(axis)
    return tuple(found)


def _resampled(call: Call) -> Field:
    """Interpolation reads one, two or four neighbours of every place between."""
    neighbours = 4 if "cubic" in call.name else 2 if "linear" in call.name else 1
    return _scaled(call, call.x, call.field, neighbours)


def _unpooled(call: Call) -> Field:
    """The indices come from where the values do."""
    x = call.get("x", "self")
    fields = [field for t, field in call.fields if t is x]
    return _scaled(call, x, fields[0], 1)


def _scaled(call: Call, x: Tensor, field: Field, neighbours: int) -> Field:
    found = []
    for axis in field:
        if axis.dim is not None and axis.dim >= 2:
            h, p = x.shape[axis.dim], call.result.shape[axis.dim]
            axis = axis.plain(h).over(neighbours if h != p else 1).stepped(Fraction(h, p), p)
        found.append(axis)
    return tuple(found)


def _shuffled(call: Call) -> Field:
    factor, dims = call.get("upscale_factor"), call.x.dim()
    if any(axis.dim == dims - 3 for axis in call.field):
        raise Unknown
    return tuple(
        axis
        if axis.dim is None or axis.dim < dims - 2
        else axis.plain(call.x.shape[axis.dim]).stepped(Fraction(1, factor), axis.n * factor)
        for axis in call.field
    )


def _dims(value: Any, rank: int) -> list[int]:
    """The dimensions that an argument names; None and [] stand for all."""
    if value is None or value == []:
        return list(range(rank))
    return [dim % max(rank, 1) for dim in ([value] if isinstance(value, int) else value)]


def _reduced(call: Call) -> Field:
    gone = _dims(call.get("dim"), call.x.dim())
    found = []
    for axis in call.field:
        if axis.dim in gone:
            axis = axis.gathered()
        elif axis.dim is not None and call.result.dim() < call.x.dim():
            axis = axis.at(axis.dim - sum(dim < axis.dim for dim in gone), axis.inner)
        found.append(axis)
    return tuple(found)


def _softmax(call: Call) -> Field:
    (dim,) = _dims(call.get("dim"), call.x.dim())
    return tuple(axis.gathered() if axis.dim == dim else axis for axis in call.field)


def _product(call: Call) -> Field:
    """A matrix product with a matrix that does not depend on the input."""
    left, right = call.get("mat1", "batch1", "self"), call.get("mat2", "batch2")
    if call.x is not left and call.x is not right:
        raise Unknown
    summed = call.x.dim() - (1 if call.x is left else 2)
    return tuple(axis.gathered() if axis.dim == summed else axis for axis in call.field)


def _viewed(call: Call) -> Field:
    """Other dimensions for the same elements in the same order."""
    old, new = call.x.shape, call.result.shape
    found = []
    for axis in call.field:
        if axis.dim is None:
            found.append(axis)
            continue
        step = axis.inner * math.prod(old[axis.dim + 1 :])
        for dim, size in enumerate(new):
            behind = math.prod(new[dim + 1 :])
            if axis.n == 1:
                fits = size == 1 and dim - len(new) == axis.dim - len(old)
            else:
                fits = step % behind == 0 and (behind * size) % (step * axis.n) == 0
            if fits:
                found.append(axis.at(dim, step // behind if axis.n > 1 else 1))
                break
        else:
            if axis.n > 1:
                raise Unknown
            found.append(axis.at(None))
    return tuple(found)


def _permuted(call: Call) -> Field:
    rank = call.x.dim()
    order = list(range(rank))
    if call.name == "permute":
        order = [dim % rank for dim in call.get("dims")]
    elif rank > 1:
        a, b = (0, 1) if call.name == "t" else (call.get("dim0"), call.get("dim1"))
        order[a], order[b] = order[b], order[a]
    return tuple(
        axis if axis.dim is None else axis.at(order.index(axis.dim), axis.inner)
        for axis in call.field
    )


def _cut(call: Call) -> Field:
    """Part of a dimension: a slice, one piece of a split, one place of all."""
    dim, step = (call.get("dim") or 0) % call.x.dim(), call.get("step") or 1
    found = []
    for axis in call.field:
        if axis.dim == dim and call.name in ("select", "unbind"):
            axis = replace(axis, dim=None, inner=1, n=1)
        elif axis.dim == dim and call.result.shape[dim] != call.x.shape[dim]:
            axis = axis.plain(call.x.shape[dim]).stepped(step, call.result.shape[dim])
        elif axis.dim is not None and axis.dim > dim and call.name in ("select", "unbind"):
            axis = axis.at(axis.dim - 1, axis.inner)
        found.append(axis)
    return tuple(found)


def _padded(call: Call) -> Field:
    found = []
    for axis in call.field:
        if axis.dim is not None and call.result.shape[axis.dim] != call.x.shape[axis.dim]:
            axis = axis.plain(call.x.shape[axis.dim]).stepped(1, call.result.shape[axis.dim])
        found.append(axis)
    return tuple(found)


def _same(call: Call) -> Field:
    return call.field


def _written(call: Call) -> Field:
    """``copy_``: what was there before does not matter."""
    for t, field in call.fields:
        if t is call.get("src"):
            return _aligned(t, field, call.result)
    raise Unknown


def _aligned(t: Tensor, field: Field, result: Tensor) -> Field:
    """The field of `t` broadcast to `result`."""
    more = result.dim() - t.dim()
    return tuple(
        axis if axis.dim is None else axis.at(axis.dim + more, axis.inner) for axis in field
    )


def joined(call: Call) -> Field:
    """Value by value, broadcasting: the largest field of all inputs."""
    return _largest([_aligned(t, field, call.result) for t, field in call.fields])


def _concatenated(call: Call) -> Field:
    dim = (call.get("dim") or 0) % call.result.dim()
    fields = [field for _, field in call.fields]
    if any(axis.dim == dim for field in fields for axis in field):
        raise Unknown
    return _largest(fields)


def _largest(fields: Sequence[Field]) -> Field:
    """Axis by axis the largest field, where inputs lie alike: those that vary along the axis, that is."""
    if len({len(field) for field in fields}) != 1:
        raise Unknown
    found = []
    for axes in zip(*fields, strict=True):
        varying = [axis for axis in axes if axis.n > 1]
        lying = [axis for axis in axes if axis.dim is not None]
        first = (varying or lying or axes)[0]
        if any(replace(axis, r=first.r) != first for axis in varying):
            raise Unknown
        found.append(replace(first, r=max(axis.r for axis in axes)))
    return tuple(found)


Rule = Callable[[Call], Field]


def _with_residual(rule: Rule) -> Rule:
    """`rule`, for operations that may add a residual, as large as the result, in the same pass."""

    def added(call: Call) -> Field:
        residual = call.get("residual")
        own = [(t, field) for t, field in call.fields if t is not residual]
        fields = [field for t, field in call.fields if t is residual]
        # A tensor that is both is found once.
        return _largest([rule(replace(call, fields=own or call.fields)), *fields])

    return added


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


CONV = _named(_with_residual(_conv), "convolution conv_fprop conv_dgrad conv_act conv_moments")
POOL = _named(
    _pool,
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d max_pool_fwd avg_pool_fwd "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d",
)
NORM = _named(
    _with_residual(_same),
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_batch_norm_no_update _batch_norm_with_update native_group_norm native_layer_norm "
    "_fused_rms_norm batch_norm_infer batch_norm_train group_norm_fwd layer_norm_fwd",
)
PRODUCT = _named(_product, "mm addmm bmm baddbmm")
MOVED: dict[str, Rule] = {
    **_named(
        _viewed, "view _unsafe_view reshape _reshape_alias flatten unflatten unsqueeze squeeze"
    ),
    **_named(_permuted, "permute transpose t"),
    **_named(_cut, "slice select split split_with_sizes unbind"),
    **_named(_padded, "constant_pad_nd"),
    **_named(_padded, "reflection_pad1d reflection_pad2d reflection_pad3d"),
    **_named(_padded, "replication_pad1d replication_pad2d replication_pad3d"),
    **_named(_same, "detach alias clone _to_copy lift_fresh contiguous"),
    **_named(_written, "copy"),
    **_named(_concatenated, "cat"),
    **_named(_shuffled, "pixel_shuffle"),
    **_named(joined, "expand"),
}
"""Operations that compute nothing."""
# What torch does not tag as such.
VALUEWISE = _named(
    joined,
    "hardswish _prelu_kernel log_sigmoid_forward rrelu_with_noise native_dropout bernoulli where",
)
RULES: dict[str, Rule] = {
    **CONV,
    **POOL,
    **NORM,
    **PRODUCT,
    **MOVED,
    **VALUEWISE,
    **_named(_reduced, "mean sum amax amin prod var std logsumexp linalg_vector_norm"),
    **_named(_softmax, "_softmax _log_softmax"),
    **_named(_same, "max_pool_indices"),
    **_named(_resampled, "upsample_nearest1d upsample_nearest2d upsample_nearest3d"),
    **_named(_resampled, "_upsample_nearest_exact1d _upsample_nearest_exact2d"),
    **_named(_resampled, "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d"),
    **_named(_resampled, "upsample_trilinear3d upsample_bicubic2d"),
    **_named(_unpooled, "max_unpool2d max_unpool3d max_unpool_fwd"),
}


def name_of(function: Any) -> str:
    """An operation's name without its overload, and without the _ of the form that works in place."""
    name: str = function._schema.name.partition("::")[2]
    return name.rstrip("_")


def is_valuewise(function: Any) -> bool:
    """Whether each value of the result comes from one value of each input."""
    return torch.Tag.pointwise in function.tags or name_of(function) in VALUEWISE


def bound(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of an operation by name, defaults included."""
    schema = function._schema.arguments
    arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
    return arguments | dict(zip((a.name for a in schema), args, strict=False)) | dict(kwargs)
