"""What layers and operations cost by formula, and the kernel that the registry chooses for them.

Operations are multiply-adds in convolutions and dense layers; in pooling a comparison or an addition a place
of every window; in normalisation one a value, and two more where statistics are those of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnnops import registry
from cnnops.config import fallback, tf32
from cnnops.registry import Choice
from cnnops.shapes import (
    ConvShape,
    GroupShape,
    LayerShape,
    NormShape,
    PoolShape,
    Shape,
    UnpoolShape,
)
from cnnops.summary.field import (
    CONV,
    MOVED,
    NORM,
    POOL,
    PRODUCT,
    bound,
    is_valuewise,
    name_of,
)
from cnnops.summary.tracking import tensors
from cnnops.tuned import candidate, dtype_name

KINDS = ("conv", "pool", "norm", "dense", "activation", "other")
"""What rows are counted together as."""

_CONV = nn.modules.conv._ConvNd
_MAX, _AVG = nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd
_LP, _UNPOOL = nn.modules.pooling._LPPoolNd, nn.modules.pooling._MaxUnpoolNd
_ADAPTIVE_MAX = nn.modules.pooling._AdaptiveMaxPoolNd
_ADAPTIVE_AVG = nn.modules.pooling._AdaptiveAvgPoolNd
_BATCH_NORM, _INSTANCE_NORM = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm

_KNOWN: dict[type[nn.Module], str] = {
    _CONV: "conv",
    **dict.fromkeys((_MAX, _AVG, _LP, _UNPOOL, _ADAPTIVE_MAX, _ADAPTIVE_AVG), "pool"),
    **dict.fromkeys((_BATCH_NORM, _INSTANCE_NORM, nn.GroupNorm, nn.LayerNorm), "norm"),
    nn.Linear: "dense",
}


@dataclass(frozen=True)
class Cost:
    """One call of a layer or an operation. `arguments` are what its kernel would get, as far as their layout
    matters; `op` and `shape` what the registry is asked about, "" and None for PyTorch's own operations.
    """

    kind: str
    op: str
    shape: Shape | None
    operations: int
    bytes_moved: int
    arguments: tuple[Any, ...] = ()

    @property
    def flops(self) -> int:
        """What the time of arithmetic follows from: two a multiply-add. Memory bounds all other kinds: 0."""
        return 2 * self.operations if self.kind in ("conv", "dense") else 0

    def kernel(self, dtype: torch.dtype) -> tuple[str, str]:
        """The kernel that the engine cuda takes, "aten" for PyTorch's own operation, and the precision that
        it multiplies in: the dtype's name, or "tf32" where torch gives leave and the kernel makes use of it.
        """
        if self.shape is not None:
            return chosen(self.op, self.shape, dtype, self.arguments)
        allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        return "aten", "tf32" if allowed else dtype_name(dtype)


def kind_of(layer: nn.Module) -> str | None:
    """The kind of a layer whose formula is known; None for others.

    Subclasses that compute something else, by a forward of their own, are others.
    """
    kind = next((kind for known, kind in _KNOWN.items() if isinstance(layer, known)), None)
    for name in ("forward", "_conv_forward"):
        origin = getattr(getattr(type(layer), name, None), "__module__", "torch.nn.modules.")
        if not origin.startswith(("torch.nn.modules.", "cnnops.nn.")):
            return None
    return kind


def cost(layer: nn.Module, inputs: Sequence[Any], output: Tensor) -> Cost:
    """What `layer`, of a known kind, costs in turning its positional arguments into `output`.

    Raises RuntimeError and ValueError for inputs that do not fit, in the words of `cnnops.shapes`.
    """
    find: Callable[..., Cost] = {
        "conv": _conv, "pool": _pool, "norm": _norm, "dense": _dense
    }[kind_of(layer) or ""]  # fmt: skip
    return find(layer, inputs, output)


def check(layer: nn.Module, inputs: Sequence[Any]) -> None:
    """Raises what `cost` would raise for these inputs, where that can be told without an output."""
    kind = kind_of(layer)
    if kind is None or not inputs or not isinstance(inputs[0], Tensor):
        return
    if not isinstance(layer, _UNPOOL):
        cost(layer, inputs, inputs[0])


def _batched(x: Tensor, dims: int) -> tuple[int, ...]:
    return (1, *x.shape) if x.dim() == dims + 1 else tuple(x.shape)


def _conv(layer: Any, inputs: Sequence[Any], y: Tensor) -> Cost:
    x, w = inputs[0], layer.weight
    bias = None if layer.bias is None else layer.bias.shape
    size = _batched(x, w.dim() - 2)
    shape: ConvShape
    if layer.transposed:
        # Asked for an output's size, the layer finds the padding that leads to it.
        extra = layer.output_padding
        if len(inputs) > 1 and isinstance(inputs[1], (tuple, list)):
            extra = layer._output_padding(
                x, inputs[1], layer.stride, layer.padding, layer.kernel_size, w.dim() - 2, layer.dilation
            )  # fmt: skip
        rest = (layer.stride, layer.padding, extra, layer.groups, layer.dilation)
        op, shape = "conv_dgrad", ConvShape.transposed(size, w.shape, bias, *rest)
    else:
        rest = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        op, shape = "conv_fprop", ConvShape.of(size, w.shape, bias, *rest)
    moved = shape.bytes_moved("fprop", x.itemsize) + _added_bytes(inputs)
    return Cost("conv", op, shape, shape.macs, moved, (x, w, layer.bias, y))


def _added_bytes(inputs: Sequence[Any]) -> int:
    """Of a residual, which some layers add in the same pass."""
    return sum(t.nbytes for t in inputs[1:] if isinstance(t, Tensor))


def _pool(layer: Any, inputs: Sequence[Any], y: Tensor) -> Cost:
    x, dims = inputs[0], _dims(layer)
    size = _batched(x, dims)
    if isinstance(layer, _UNPOOL):
        plane = y.shape[-dims:]
        unpool = UnpoolShape.of(size, _batched(inputs[1], dims), plane)
        moved = unpool.bytes_moved(x.itemsize)
        return Cost("pool", "max_unpool_fwd", unpool, 0, moved, (x, inputs[1], y))
    largest = isinstance(layer, (_MAX, _ADAPTIVE_MAX))
    if isinstance(layer, (_ADAPTIVE_MAX, _ADAPTIVE_AVG)):
        wanted: Any = layer.output_size
        shape = PoolShape.adaptive(size, wanted)
    else:
        shape = PoolShape.of(
            size,
            layer.kernel_size,
            layer.stride,
            getattr(layer, "padding", 0),
            getattr(layer, "dilation", 1),
            layer.ceil_mode,
            getattr(layer, "count_include_pad", True),
            getattr(layer, "divisor_override", None),
        )
    arguments = (x, y, y) if largest else (x, y)  # a maximum's place lies as the maximum does
    op = "max_pool_fwd" if largest else "avg_pool_fwd"
    return Cost("pool", op, shape, shape.flops, shape.bytes_moved(x.itemsize), arguments)


def _dims(layer: nn.Module) -> int:
    """Spatial axes of a pooling layer, which its class in torch.nn is named after: AvgPool2d."""
    theirs = nn.modules.pooling.__name__
    return int(next(c.__name__ for c in type(layer).__mro__ if c.__module__ == theirs)[-2])


def _norm(layer: Any, inputs: Sequence[Any], y: Tensor) -> Cost:
    x, weight, bias = inputs[0], layer.weight, layer.bias
    shape: Shape
    arguments: tuple[Any, ...] = (x, weight, bias, y)
    if isinstance(layer, nn.LayerNorm):
        op, shape = "layer_norm_fwd", LayerShape.of(x.shape, layer.normalized_shape)
    elif isinstance(layer, nn.GroupNorm):
        op, shape = "group_norm_fwd", GroupShape.of(x.shape, layer.num_groups)
    elif getattr(layer, "running_mean", None) is not None:
        op, shape = "batch_norm_infer", NormShape.of(_of_images(layer, x))
        arguments = (x, *inputs[1:], y)
    elif isinstance(layer, _INSTANCE_NORM):
        size = _of_images(layer, x)
        op, shape = "group_norm_fwd", GroupShape.of(size, size[1])
    else:
        op, shape = "batch_norm_train", NormShape.of(x.shape)
        arguments = (x, *inputs[1:], y)
    operations = x.numel() * (1 if op == "batch_norm_infer" else 3)
    moved = shape.bytes_moved(x.itemsize, 1, 1) + _added_bytes(inputs)
    return Cost("norm", op, shape, operations, moved, arguments)


def _of_images(layer: Any, x: Tensor) -> tuple[int, ...]:
    """The size with a batch, which instance norm may lack."""
    if isinstance(layer, _INSTANCE_NORM) and x.dim() == layer._get_no_batch_dim():
        return (1, *x.shape)
    return tuple(x.shape)


def _dense(layer: Any, inputs: Sequence[Any], y: Tensor) -> Cost:
    """A 1x1 convolution of as many places as there are rows."""
    x, w = inputs[0], layer.weight
    if not x.dim() or x.shape[-1] != w.shape[1]:
        raise RuntimeError(
            f"input: expected {w.shape[1]} features in the last dimension, got {list(x.shape)}"
        )
    shape = ConvShape.of((x.shape[:-1].numel(), w.shape[1], 1), (*w.shape, 1))
    moved = shape.bytes_moved("fprop", x.itemsize)
    return Cost("dense", "", None, shape.macs, moved)


# ---- operations, where a layer has no formula of its own --------------------------------------------------


def step(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Cost | None:
    """What one operation costs; None where that is not known."""
    name, results = name_of(function), tensors(out)
    if function.is_view or name in MOVED:
        return Cost("other", "", None, 0, 0)
    if is_valuewise(function):
        return Cost("activation", "", None, sum(t.numel() for t in results), 0)
    given = bound(function, args, kwargs)
    if name in CONV:
        return _conv_step(name, given, results[0])
    if name in PRODUCT:
        left = next(given[n] for n in ("mat1", "batch1", "self") if n in given)
        return Cost("dense", "", None, results[0].numel() * left.shape[-1], 0)
    if name in POOL:
        return _pool_step(name, given, results[0])
    return _norm_step(name, given, results[0]) if name in NORM else None


def _conv_step(name: str, given: Mapping[str, Any], y: Tensor) -> Cost:
    w, pad = given.get("weight", given.get("w")), list(given["padding"])
    if name == "convolution":
        pad = [p for p in pad for _ in range(2)]
    pairs = tuple(zip(pad[::2], pad[1::2], strict=True))
    backwards = name == "conv_dgrad" or bool(given.get("transposed") or given.get("size"))
    x = _input(given)
    op, size = ("conv_dgrad", y.shape) if backwards else ("conv_fprop", x.shape)
    mode = given.get("padding_mode", "zeros")
    geometry = (given["stride"], pairs, given["dilation"], given["groups"], mode)
    shape = ConvShape.of(size, w.shape, None, *geometry)
    return Cost("conv", op, shape, shape.macs, 0, (x, w, given.get("bias"), y))


def _input(given: Mapping[str, Any]) -> Tensor:
    found: Tensor = next(given[n] for n in ("x", "grad_y", "input", "self") if n in given)
    return found


def _pool_step(name: str, given: Mapping[str, Any], y: Tensor) -> Cost:
    x = _input(given)
    output = given.get("output", given.get("output_size"))
    if output is None:
        kernel = given.get("kernel", given.get("kernel_size"))
        rest = (given["stride"], given["padding"], given.get("dilation", 1), given["ceil_mode"])
        shape = PoolShape.of(x.shape, kernel, *rest)
    else:
        shape = PoolShape.adaptive(x.shape, output)
    largest = "max" in name
    op = "max_pool_fwd" if largest else "avg_pool_fwd"
    return Cost("pool", op, shape, shape.flops, 0, (x, y, y) if largest else (x, y))


def _norm_step(name: str, given: Mapping[str, Any], y: Tensor) -> Cost:
    x, op = _input(given), ""
    shape: Shape | None = None
    if "layer_norm" in name:
        axes = given["axes"] if "axes" in given else len(given["normalized_shape"])
        op, shape = "layer_norm_fwd", LayerShape.of(x.shape, x.shape[x.dim() - axes :])
    elif "group_norm" in name:
        groups = given["groups"] if "groups" in given else given["group"]
        op, shape = "group_norm_fwd", GroupShape.of(x.shape, groups)
    elif "batch_norm" in name:
        fixed = "infer" in name or "no_training" in name or given.get("training") is False
        op = "batch_norm_infer" if fixed else "batch_norm_train"
        shape = NormShape.of(x.shape)
    operations = x.numel() * (1 if op == "batch_norm_infer" else 3)
    return Cost("norm", op, shape, operations, 0, (x, y))


# ---- the registry -----------------------------------------------------------------------------------------


def chosen(op: str, shape: Shape, dtype: torch.dtype, arguments: Sequence[Any]) -> tuple[str, str]:
    """Name and precision of the kernel that the registry decides on for the engine cuda. Nothing runs."""
    choices: list[Choice] = []

    def observe(choice: Choice, *_: Any) -> Callable[..., None]:
        choices.append(choice)
        return choice.function

    with fallback("silent"), registry.observed(observe):
        registry.choose(op, "cuda", shape, dtype)
    choice = choices[0].settled(arguments)
    by_torch = choice.engine == "aten"
    multiplies_tf32 = (by_torch and isinstance(shape, ConvShape)) or choice.row.tf32
    precision = "tf32" if multiplies_tf32 and tf32("cuda", dtype) else dtype_name(dtype)
    return "aten" if by_torch else candidate(choice.row.algorithm, choice.variant), precision
