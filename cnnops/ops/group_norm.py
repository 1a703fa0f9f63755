"""Group norm, which instance norm is a case of, and layer norm:

    y = act(gamma * xhat + beta),   xhat = (x - mean) * rstd

with mean and rstd of every image's group of channels, or of every row: always those of x itself. The
gradient is a kernel. Forward-mode derivatives and the gradient's gradient are composed of PyTorch's own
operations: they compute the same y once more and differentiate it as often as is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from cnnops import registry
from cnnops.aten.norm import activate
from cnnops.epilogue import expect_activation
from cnnops.ops import (
    DTYPES,
    cached,
    call,
    define,
    empty,
    expect_bool,
    expect_float,
    expect_same,
    is_channels_last,
    is_stack,
)
from cnnops.ops.norm import batch_norm, statistics_dtype
from cnnops.ops.vmap import folded, one_by_one, unfolded
from cnnops.shapes import GroupShape, LayerShape, whole

Run = Callable[..., None]
Ints = Sequence[int]


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Group norm of x ``N C *spatial``; see `cnnops.functional.group_norm_act` for arguments and errors."""
    groups = _groups(x.shape, groups)
    expect_float("eps", eps)
    expect_activation(activation)
    x, weight, bias = _widened(x, weight, bias)
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES:
        if not torch.compiler.is_compiling():
            registry.choose("group_norm_fwd", engine, _group_shape(x.shape, groups), x.dtype)
        return activate(F.group_norm(x, groups, weight, bias, eps), None, activation)
    arguments = (groups, eps, activation, is_channels_last(x), engine)
    y: Tensor = call(_GroupNorm, group_norm_fwd, x, weight, bias, *arguments)[0]
    return y


def layer_norm(
    x: Tensor,
    normalized_shape: Ints,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm of x ``* normalized_shape``; see `cnnops.functional.layer_norm` for arguments and errors."""
    if not isinstance(normalized_shape, (tuple, list)):
        raise TypeError(f"normalized_shape: expected a tuple of ints, got {normalized_shape!r}")
    _expect_row(x.shape, tuple(normalized_shape))
    expect_float("eps", eps)
    x, weight, bias = _widened(x, weight, bias)
    axes = len(normalized_shape)
    engine = registry.engine_for(x.device)
    if x.dtype not in DTYPES:
        if not torch.compiler.is_compiling():
            registry.choose("layer_norm_fwd", engine, _layer_shape(x.shape, axes), x.dtype)
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    y: Tensor = call(_LayerNorm, layer_norm_fwd, x, weight, bias, axes, eps, engine)[0]
    return y


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Instance norm of x ``N C *spatial``; see `cnnops.functional.instance_norm` for arguments and errors."""
    expect_bool("use_input_stats", use_input_stats)
    expect_float("momentum", momentum)
    expect_float("eps", eps)
    if use_input_stats:
        _expect_places(x.shape)
    elif x.dim() < 2:
        raise IndexError(f"input: expected at least 2 dimensions, got {x.dim()} ({list(x.shape)})")
    _check_statistics(x, running_mean, running_var, use_input_stats)
    if x.dtype not in DTYPES:
        if not torch.compiler.is_compiling():
            op, shape = "group_norm_fwd", _group_shape(x.shape, x.shape[1])
            registry.choose(op, registry.engine_for(x.device), shape, x.dtype)
        statistics = (running_mean, running_var)
        return F.instance_norm(x, *statistics, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        assert running_mean is not None and running_var is not None
        mean, var, weight, bias = _of_one_dtype(x.dtype, running_mean, running_var, weight, bias)
        return batch_norm(x, mean, var, weight, bias, False, momentum, eps)
    # As in PyTorch, the result of a channels-last input is contiguous.
    arguments = (x.shape[1], eps, "none", False, registry.engine_for(x.device))
    y: Tensor
    y, means, rstds = call(_GroupNorm, group_norm_fwd, x, weight, bias, *arguments)
    if running_mean is not None and running_var is not None and x.numel():
        _update(running_mean, running_var, means, rstds, x.numel() // means.numel(), momentum, eps)
    return y


@partial(cached, traced=True)
def _groups(x: Ints, groups: int) -> int:
    """`groups` as an int; what ``torch.nn.functional.group_norm`` checks itself is checked here."""
    groups = whole(groups, "num_groups")
    if len(x) < 2:
        raise RuntimeError(f"input: expected at least 2 dimensions, got {len(x)} ({list(x)})")
    if groups == 0:
        raise ZeroDivisionError("num_groups: expected a positive int, got 0")
    values = x[0] * x[1] // groups
    for size in x[2:]:
        values *= size
    if values == 1:
        raise ValueError(f"input: expected more than 1 value per channel, got {list(x)}")
    return groups


@partial(cached, traced=True)
def _expect_row(x: Ints, normalized_shape: Ints) -> None:
    LayerShape.of(x, [whole(size, "normalized_shape") for size in normalized_shape])


@partial(cached, traced=True)
def _expect_places(x: Ints) -> None:
    places = 1
    for size in x[2:]:
        places *= size
    if places == 1:
        raise ValueError(f"input: expected more than 1 spatial element, got {list(x)}")


def _widened(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast has them for these operations: float32 on a GPU, left alone elsewhere."""
    if not (x.is_cuda and torch.is_autocast_enabled("cuda")):
        return x, *others
    return tuple(
        t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t
        for t in (x, *others)
    )


# ---- running statistics of instance norm ------------------------------------------------------------------


def _check_statistics(
    x: Tensor, mean: Tensor | None, var: Tensor | None, use_input_stats: bool
) -> None:
    if mean is None and var is None and use_input_stats:
        return
    C = x.shape[1]
    for name, t in (("running_mean", mean), ("running_var", var)):
        if t is None and not use_input_stats:
            raise RuntimeError(f"{name}: expected a Tensor without use_input_stats, got None")
        if t is None:
            raise ValueError("running_mean, running_var: expected both or neither, got one")
        if t.shape != (C,):
            raise RuntimeError(f"{name}: expected size [{C}], got {list(t.shape)}")
        if not t.is_floating_point():
            raise RuntimeError(f"{name}: expected a floating-point dtype, got {t.dtype}")
        if t.requires_grad:
            raise RuntimeError(
                f"{name}: expected a Tensor without gradient, got requires_grad=True"
            )
        if t.device != x.device:
            raise RuntimeError(
                f"{name}: expected a tensor on {x.device}, as the input, got {t.device}"
            )


def _of_one_dtype(
    dtype: torch.dtype, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The tensors per channel as batch norm takes them. Statistics may be of any floating-point dtype here;
    a half weight beside wider ones is widened, because they cannot be shortened without loss.
    """
    if dtype in (torch.float32, torch.float64):
        return mean.to(dtype), var.to(dtype), weight, bias
    affine = [t for t in (weight, bias) if t is not None]
    if all(t.dtype == dtype for t in (mean, var, *affine)):
        return mean, var, weight, bias
    # Not every mixture: one that PyTorch refuses is left for batch norm to refuse.
    if all(t.dtype == affine[0].dtype and t.dtype in (dtype, torch.float32) for t in affine):
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return mean.float(), var.float(), weight, bias


@torch.no_grad()
def _update(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, rstd: Tensor, count: int, momentum: float,
    eps: float,
) -> None:  # fmt: skip
    """Move the running statistics towards the batch's averages of mean and unbiased variance."""
    # var + eps is what rstd tells, and all that an evaluation by the same eps asks for.
    var = (rstd.double().pow(-2) - eps).clamp(min=0) * (count / (count - 1))
    pairs = ((running_mean, mean.double()), (running_var, var))
    moved = [(1 - momentum) * old.double() + momentum * found.mean(0) for old, found in pairs]
    for (running, _), result in zip(pairs, moved, strict=True):  # memory can run out no more
        running.copy_(result)


# ---- autograd -------------------------------------------------------------------------------------------

Pure = Callable[..., Any]

NAMES = ("x", "weight", "bias")


def _names(needed: Sequence[bool]) -> str:
    """Those of NAMES whose gradients are needed. One string: torch.func loses count of sequences."""
    return " ".join(name for name, need in zip(NAMES, needed, strict=False) if need)


def _present(
    function: Pure, tensors: Sequence[Tensor | None]
) -> tuple[Callable[..., Any], list[Tensor]]:
    """`function` of those of its arguments alone that are tensors, and these."""
    there = [t is not None for t in tensors]

    def of_present(*present: Tensor) -> Any:
        found = iter(present)
        return function(*(next(found) if is_there else None for is_there in there))

    return of_present, [t for t in tensors if t is not None]


def _pushed(
    function: Pure, tensors: Sequence[Tensor | None], tangents: Sequence[Tensor | None]
) -> Any:
    """The derivative of `function` at `tensors` along `tangents`, each zero where there is none.

    Pulling back is linear in what is pulled back, and the transpose of that map pushes forward.
    """
    there, inputs = _present(function, tensors)
    directions = tuple(
        torch.zeros_like(t) if tangent is None else tangent
        for t, tangent in zip(tensors, tangents, strict=True)
        if t is not None
    )
    outputs, pull = torch.func.vjp(there, *inputs)[:2]
    alone = isinstance(outputs, Tensor)
    zeros = torch.zeros_like(outputs) if alone else tuple(torch.zeros_like(o) for o in outputs)
    return torch.func.vjp(pull, zeros)[1](directions)[0]


class _GroupNorm(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = group_norm_fwd(x, weight, bias, *arguments)
        return y, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, *arguments = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        # The bias serves only to know what the activation was applied to.
        kept = None if arguments[2] == "none" else bias
        ctx.save_for_backward(x, weight, kept, mean, rstd)
        ctx.arguments, ctx.parameters = arguments, _parameters(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> Any:
        wanted = _names(ctx.needs_input_grad)
        if grad_y is None or not wanted:
            return (None,) * 8
        groups, eps, activation, last, engine = ctx.arguments
        rest = (groups, eps, activation, last, ctx.parameters, wanted, engine)
        if is_stack(grad_y):
            function = _gradients(
                _group_composed(groups, eps, activation),
                (ctx.saved_tensors[0].shape[1],),
                ctx.parameters,
                wanted,
            )
            grads = iter(function(grad_y, *ctx.saved_tensors[:3]))
        else:
            grads = iter(call(_GroupNormBwd, group_norm_bwd, grad_y, *ctx.saved_tensors, *rest))
        return *(next(grads) if name in wanted else None for name in NAMES), *(None,) * 5

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> Any:
        composed = _group_composed(*ctx.arguments[:3])
        return _pushed(composed, ctx.saved_tensors[:3], tangents[:3]), None, None


class _LayerNorm(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = layer_norm_fwd(x, weight, bias, *arguments)
        return y, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, *arguments = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.arguments, ctx.parameters = arguments, _parameters(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> Any:
        wanted = _names(ctx.needs_input_grad)
        if grad_y is None or not wanted:
            return (None,) * 6
        axes, eps, engine = ctx.arguments
        rest = (axes, eps, ctx.parameters, wanted, engine)
        if is_stack(grad_y):
            x, weight, *_ = ctx.saved_tensors
            function = _gradients(
                _layer_composed(axes, eps), x.shape[x.dim() - axes :], ctx.parameters, wanted
            )
            grads = iter(function(grad_y, x, weight, None))
        else:
            grads = iter(call(_LayerNormBwd, layer_norm_bwd, grad_y, *ctx.saved_tensors, *rest))
        return *(next(grads) if name in wanted else None for name in NAMES), *(None,) * 3

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> Any:
        composed = _layer_composed(*ctx.arguments[:2])
        return _pushed(composed, ctx.saved_tensors[:3], tangents[:3]), None, None


class _GroupNormBwd(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
        *arguments: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return tuple(group_norm_bwd(grad_y, x, weight, bias, mean, rstd, *arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_y, x, weight, bias, _, _, groups, eps, activation, _, parameters, wanted, _ = inputs
        ctx.save_for_backward(grad_y, x, weight, bias)
        ctx.function = _gradients(
            _group_composed(groups, eps, activation), x.shape[1:2], parameters, wanted
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *_second(ctx.function, ctx.saved_tensors, grads), *(None,) * 9

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> Any:
        return _pushed(ctx.function, ctx.saved_tensors[:4], tangents[:4])


class _LayerNormBwd(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_y: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *arguments: Any
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return tuple(layer_norm_bwd(grad_y, x, weight, mean, rstd, *arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_y, x, weight, _, _, axes, eps, parameters, wanted, _ = inputs
        ctx.save_for_backward(grad_y, x, weight, None)
        ctx.function = _gradients(
            _layer_composed(axes, eps), x.shape[x.dim() - axes :], parameters, wanted
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_y, x, weight, _ = _second(ctx.function, ctx.saved_tensors, grads)
        return grad_y, x, weight, *(None,) * 7

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> Any:
        return _pushed(ctx.function, (*ctx.saved_tensors[:3], None), (*tangents[:3], None))


def _xhat(rows: Tensor, eps: float) -> Tensor:
    var, mean = torch.var_mean(rows, -1, correction=0, keepdim=True)
    return (rows - mean) * torch.rsqrt(var + eps)


def _scaled(xhat: Tensor, weight: Tensor | None, bias: Tensor | None, size: Ints) -> Tensor:
    z = xhat if weight is None else xhat * weight.to(xhat.dtype).view(size)
    return z if bias is None else z + bias.to(xhat.dtype).view(size)


def _group_composed(groups: int, eps: float, activation: str) -> Pure:
    def composed(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        rows = x.to(statistics_dtype(x)).reshape(x.shape[0], groups, -1)
        xhat = _xhat(rows, eps).view(x.shape)
        z = _scaled(xhat, weight, bias, (-1, *(1,) * (x.dim() - 2)))
        return activate(z, None, activation).to(x.dtype)

    return composed


def _layer_composed(axes: int, eps: float) -> Pure:
    def composed(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = x.to(statistics_dtype(x))
        xhat = _xhat(wide.flatten(x.dim() - axes), eps).view(x.shape)
        y = _scaled(xhat, weight, bias, x.shape[x.dim() - axes :])
        return y.to(x.dtype)

    return composed


def _gradients(composed: Pure, size: Ints, parameters: torch.dtype, wanted: str) -> Pure:
    """The gradients that are wanted, of x, weight and bias, as a function of grad_y and these three."""

    def gradients(
        grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        if bias is None and "bias" in wanted:
            bias = x.new_zeros(
                size, dtype=parameters
            )  # its value decides nothing, or it were there
        inputs = (x, weight, bias)

        def of_wanted(*chosen: Tensor) -> Any:
            found = iter(chosen)
            pairs = zip(NAMES, inputs, strict=True)
            return composed(*(next(found) if name in wanted else t for name, t in pairs))

        into = [t for name, t in zip(NAMES, inputs, strict=True) if name in wanted]
        found: tuple[Tensor, ...] = torch.func.vjp(of_wanted, *into)[1](grad_y)
        return found

    return gradients


def _second(
    gradients: Pure, tensors: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients' own gradients, for each of `tensors` that is there."""
    function, inputs = _present(gradients, tensors)
    found = iter(torch.func.vjp(function, *inputs)[1](tuple(grads)))
    return [None if t is None else next(found) for t in tensors]


# ---- torch.func.vmap --------------------------------------------------------------------------------------
# Where the parameters are shared, all maps are one batch. Otherwise the channels of all maps stand side by
# side, with as many times the groups; rows of a layer norm cannot do the same.


def _vmap_group_norm_fwd(
    info: Any, in_dims: Sequence[int | None], x: Tensor, weight: Tensor | None, bias: Tensor | None,
    groups: int, *rest: Any,
) -> Any:  # fmt: skip
    maps = info.batch_size
    if in_dims[1] is None and in_dims[2] is None:
        found = group_norm_fwd(folded(x, in_dims[0], maps, 0), weight, bias, groups, *rest)
        return tuple(unfolded(t, maps, 0) for t in found), (0, 0, 0)
    x = folded(x, in_dims[0], maps, 1)
    weight, bias = _side_by_side((weight, bias), in_dims[1:3], maps)
    found = group_norm_fwd(x, weight, bias, groups * maps, *rest)
    return tuple(unfolded(t, maps, 1) for t in found), (1, 1, 1)


def _vmap_group_norm_bwd(
    info: Any, in_dims: Sequence[int | None], grad_y: Tensor, x: Tensor, weight: Tensor | None,
    bias: Tensor | None, mean: Tensor, rstd: Tensor, groups: int, eps: float, activation: str, last: bool,
    parameters: torch.dtype, wanted: str, engine: str,
) -> Any:  # fmt: skip
    maps = info.batch_size
    to_y, to_x, *to_affine, to_mean, to_rstd = in_dims[:6]
    images = ((grad_y, to_y), (x, to_x), (mean, to_mean), (rstd, to_rstd))
    grad_y, x, mean, rstd = (folded(t, d, maps, 1) for t, d in images)
    affine = _side_by_side((weight, bias), to_affine, maps)
    rest = (groups * maps, eps, activation, last, parameters, wanted, engine)
    found = iter(group_norm_bwd(grad_y, x, *affine, mean, rstd, *rest))
    dims = [axis for name, axis in zip(NAMES, (1, 0, 0), strict=True) if name in wanted]
    return [unfolded(next(found), maps, axis) for axis in dims], dims


def _side_by_side(
    vectors: Sequence[Tensor | None], dims: Sequence[int | None], maps: int
) -> list[Tensor | None]:
    pairs = zip(vectors, dims, strict=True)
    return [None if t is None else folded(t, d, maps, 0) for t, d in pairs]


def _vmap_layer_norm_fwd(
    info: Any, in_dims: Sequence[int | None], x: Tensor, weight: Tensor | None, bias: Tensor | None,
    *rest: Any,
) -> Any:  # fmt: skip
    at_x, *affine = in_dims[:3]
    if at_x is None or affine != [None, None]:
        return one_by_one(layer_norm_fwd)(info, in_dims, x, weight, bias, *rest)
    return layer_norm_fwd(x.movedim(at_x, 0), weight, bias, *rest), (0, 0, 0)


# ---- torch.library --------------------------------------------------------------------------------------


def _parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """The dtype of weight and bias."""
    return next((t.dtype for t in (weight, bias) if t is not None), x.dtype)


_group_shape = cached(GroupShape.of)


@cached
def _layer_shape(
    x: Ints, axes: int, weight: Ints | None = None, bias: Ints | None = None
) -> LayerShape:
    """The problem whose rows are the last `axes` axes of `x`."""
    return LayerShape.of(x, x[len(x) - axes :], weight, bias)


def _sizes(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.shape for t in tensors]


def _expect_parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raises RuntimeError unless they have x's dtype, or both float32 beside a half x."""
    dtype = _parameters(x, weight, bias)
    if x.dtype == torch.float64 or dtype != torch.float32:
        dtype = x.dtype
    expect_same(x, dtype, weight=weight, bias=bias)


def _statistics(x: Tensor, size: Ints) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(x)
    return empty(size, x, dtype=dtype), empty(size, x, dtype=dtype)


def _group_norm_fwd(
    run: Run, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float,
    activation: str, channels_last: bool, engine: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = _group_shape(x.shape, groups, *_sizes(weight, bias))
    _expect_parameters(x, weight, bias)
    y = empty(shape.x_size, x, channels_last)
    mean, rstd = _statistics(x, shape.statistics_size)
    if x.numel():
        arguments = (weight, bias, eps, activation, y, mean, rstd)
        run("group_norm_fwd", engine, shape, x.dtype, x, *arguments)
    else:
        mean.zero_()
        rstd.zero_()
    return y, mean, rstd


def _layer_norm_fwd(
    run: Run, x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float, engine: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = _layer_shape(x.shape, axes, *_sizes(weight, bias))
    _expect_parameters(x, weight, bias)
    y = empty(shape.x_size, x)
    mean, rstd = _statistics(x, shape.statistics_size)
    if x.numel():
        run("layer_norm_fwd", engine, shape, x.dtype, x, weight, bias, eps, y, mean, rstd)
    else:
        mean.zero_()
        rstd.zero_()
    return y, mean, rstd


def _group_norm_bwd(
    run: Run, grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    rstd: Tensor, groups: int, eps: float, activation: str, channels_last: bool, parameters: torch.dtype,
    wanted: str, engine: str,
) -> list[Tensor]:  # fmt: skip
    shape = _group_shape(x.shape, groups)
    results = [
        empty(shape.x_size, x, channels_last) if "x" in wanted else None,
        empty((shape.C,), x, dtype=parameters) if "weight" in wanted else None,
        empty((shape.C,), x, dtype=parameters) if "bias" in wanted else None,
    ]
    if x.numel():
        run(
            "group_norm_bwd", engine, shape, x.dtype, grad_y, x, weight, bias, mean, rstd, activation,
            *results,
        )  # fmt: skip
    return _filled(results, x)


def _layer_norm_bwd(
    run: Run, grad_y: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, axes: int,
    eps: float, parameters: torch.dtype, wanted: str, engine: str,
) -> list[Tensor]:  # fmt: skip
    shape = _layer_shape(x.shape, axes)
    results = [
        empty(shape.x_size, x) if "x" in wanted else None,
        empty(shape.normalized, x, dtype=parameters) if "weight" in wanted else None,
        empty(shape.normalized, x, dtype=parameters) if "bias" in wanted else None,
    ]
    if x.numel():
        run("layer_norm_bwd", engine, shape, x.dtype, grad_y, x, weight, mean, rstd, *results)
    return _filled(results, x)


def _filled(results: Sequence[Tensor | None], x: Tensor) -> list[Tensor]:
    """Those that are wanted; of an empty `x` no kernel filled them."""
    found = [r for r in results if r is not None]
    if not x.numel():
        for result in found:
            result.zero_()
    return found


_AFFINE = "Tensor x, Tensor? weight, Tensor? bias"
_GROUPS = "int groups, float eps, str activation, bool channels_last"
_WANTED = "ScalarType parameters, str wanted, str engine"

group_norm_fwd = define(
    f"group_norm_fwd({_AFFINE}, {_GROUPS}, str engine) -> (Tensor, Tensor, Tensor)",
    _group_norm_fwd,
    _vmap_group_norm_fwd,
)
group_norm_bwd = define(
    f"group_norm_bwd(Tensor grad_y, {_AFFINE}, Tensor mean, Tensor rstd, {_GROUPS}, {_WANTED}) -> Tensor[]",
    _group_norm_bwd,
    _vmap_group_norm_bwd,
)
layer_norm_fwd = define(
    f"layer_norm_fwd({_AFFINE}, int axes, float eps, str engine) -> (Tensor, Tensor, Tensor)",
    _layer_norm_fwd,
    _vmap_layer_norm_fwd,
)
layer_norm_bwd = define(
    "layer_norm_bwd(Tensor grad_y, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, int axes, "
    f"float eps, {_WANTED}) -> Tensor[]",
    _layer_norm_bwd,
)
