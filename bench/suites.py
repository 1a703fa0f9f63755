"""What is measured: the layers of networks, public benchmark problems, reported cases, and sweeps.

Tables, no timing. A `Case` is a problem: an operation with its sizes. A `Row` is what is timed once: a case
in one direction, dtype and layout. `SUITES` has all cases, `rows` lists the rows of some suites, and
`reduced` scales a case down for a machine that is slow or small.

Conventions. Flops count two a multiply-add of the direct algorithm, taps that fall on padding included, as
published figures do. Bytes are the least traffic of kernels that find nothing in a cache:

    convolution   Both operands read once, the result written once. Places of x that no window covers are
                  not read.
    pooling       fwd reads x and writes y. bwd reads grad_y, for max pooling also one byte an output, and
                  writes grad_x.
    batch norm    In training fwd reads x twice (for the statistics, then for y) and writes y, and bwd reads
                  grad_y and x twice and writes grad_x. In evaluation each reads once. A residual is one more
                  read. If an activation follows, bwd needs the residual to know what was activated, and
                  writes the residual's gradient; if none does, that gradient is grad_y itself.
    group norm    Layer norm, too: fwd reads x and writes y, bwd reads grad_y and x and writes grad_x. What is
                  normalised together is small enough to be read once.

A kernel that skips padding or goes by Winograd or Fourier does fewer flops, and a tensor that fits in the L2
cache is read from memory once, not twice: such rows may beat their floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from cnnops import shapes
from cnnops.shapes import ConvShape, GroupShape, LayerShape, NormShape, PoolShape

Size = tuple[int, ...]
Form = tuple[str, str]
"""A dtype and a layout."""
Norms = NormShape | GroupShape | LayerShape
Shape = ConvShape | PoolShape | Norms

OPS: dict[str, str] = {
    **{f"conv{d}d": "conv" for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": "conv_transpose" for d in (1, 2, 3)},
    **{f"{kind}_pool{d}d": "pool" for kind in ("max", "avg", "adaptive_avg") for d in (1, 2, 3)},
    "batch_norm": "norm",
    "batch_norm_act": "norm",
    "group_norm": "group_norm",
    "layer_norm": "group_norm",
}
"""Operation -> kind of its problem."""

DIRECTIONS: dict[str, tuple[str, ...]] = {
    "conv": ("fprop", "dgrad", "wgrad"),
    "conv_transpose": ("fprop", "dgrad", "wgrad"),
    "pool": ("fwd", "bwd"),
    "norm": ("fwd", "bwd"),
    "group_norm": ("fwd", "bwd"),
}
"""Kind -> its directions."""

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

# An option with this value is not stated in a Case. (The stride of a pooling defaults to its kernel.)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "conv": {"stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    "conv_transpose": {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1},
    "pool": {"padding": 0, "dilation": 1},
    "norm": {"training": False, "residual": False, "activation": "relu"},
    "group_norm": {},
}


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at best: bytes a second from memory, flops a second by precision.

    Precisions are the names of dtypes and "tf32". One that is missing counts as float32: a CPU has no tf32,
    and computes half types in float32.
    """

    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def flops(self, dtype: str, tensor_cores: bool = False) -> float:
        """Flops a second of `dtype`; with `tensor_cores`, float32 is multiplied as tf32."""
        precision = "tf32" if dtype == "float32" and tensor_cores else dtype
        return self.flops_per_s.get(precision, self.flops_per_s["float32"])


@dataclass(frozen=True)
class Case:
    """One problem: an operation with its sizes, and the forms and directions it is timed in."""

    suite: str
    name: str
    """Unique in its suite."""
    op: str
    """A key of OPS: a function of torch.nn.functional, or `cnnops.functional.batch_norm_act`."""
    x: Size
    """Input, ``N C *spatial``."""
    w: Size | None = None
    """Weight of a convolution as torch has it: ``K C/groups *kernel``, transposed ``C K/groups *kernel``."""
    bias: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    """The function's other keyword arguments, without those at their default. For norms, weight, bias and a
    batch norm's running statistics are always given; ("residual", True) stands for a residual of the input's
    size."""
    count: int = 1
    """How many layers of the network are exactly this."""
    source: str = ""
    """Where the case was reported; empty for networks and sweeps."""
    forms: tuple[Form, ...] = (("float32", "contiguous"),)
    """(dtype, layout) pairs. "channels_last" of five dimensions is torch's channels_last_3d."""
    directions: tuple[str, ...] = ()
    """Empty: all directions of the operation."""

    @property
    def kind(self) -> str:
        return OPS[self.op]

    @cached_property
    def shape(self) -> Shape:
        """The problem's sizes. A transposed convolution gives the convolution whose dgrad it is: its x is the
        output here, output padding included, and its y the input.

        Raises RuntimeError or ValueError where the sizes make no problem.
        """
        options = dict(self.options)
        if self.kind == "norm":
            return NormShape.of(self.x, training=options.get("training", False))
        if self.op == "group_norm":
            return GroupShape.of(self.x, options["num_groups"])
        if self.op == "layer_norm":
            return LayerShape.of(self.x, options["normalized_shape"])
        if self.kind == "pool":
            if self.op.startswith("adaptive"):
                return PoolShape.adaptive(self.x, options["output_size"])
            return PoolShape.of(self.x, options.pop("kernel_size"), **options)
        assert self.w is not None, f"{self.suite}/{self.name}: a convolution needs a weight"
        if self.kind == "conv":
            return ConvShape.of(self.x, self.w, **options)
        return _transposed(self.x, self.w, **options)

    @property
    def y(self) -> Size:
        """The output's size."""
        shape = self.shape
        if isinstance(shape, Norms) or self.kind == "conv_transpose":
            return shape.x_size
        return shape.y_size

    @property
    def problem(self) -> str:
        """The sizes in a short line: ``x 32x64x56x56 w 64x64x3x3 padding=1``."""
        words = [f"x {_by(self.x)}"]
        if self.w is not None:
            words.append(f"w {_by(self.w)}")
        if self.bias:
            words.append("bias")
        for name, value in self.options:
            text = _by(value) if isinstance(value, tuple) else value
            words.append(name if value is True else f"{name}={text}")
        return " ".join(words)

    def rows(self) -> list[Row]:
        """One row for every direction and form."""
        directions = self.directions or DIRECTIONS[self.kind]
        return [Row(self, d, *form) for form in self.forms for d in directions]


@dataclass(frozen=True)
class Row:
    """What is timed once. Directions are the function's: fprop of conv_transpose2d computes its output."""

    case: Case
    direction: str
    dtype: str
    layout: str

    @property
    def id(self) -> str:
        case = self.case
        return f"{case.suite}/{case.name}/{self.direction}/{self.dtype}/{self.layout}"

    @property
    def shape(self) -> Shape:
        """`Case.shape`."""
        return self.case.shape

    @property
    def problem(self) -> str:
        """`Case.problem`."""
        return self.case.problem

    @property
    def flops(self) -> int:
        """Two a multiply-add; for pooling one a place of every window; for norms, bound by memory, 0."""
        return 0 if isinstance(self.shape, Norms) else self.shape.flops

    @property
    def bytes_moved(self) -> int:
        """The least traffic of this direction, by the conventions at the top of this file."""
        shape, size = self.shape, ITEMSIZE[self.dtype]
        if isinstance(shape, NormShape):
            return shape.bytes_moved(size, *_passes(self.direction, dict(self.case.options)))
        if isinstance(shape, (GroupShape, LayerShape)):
            return shape.bytes_moved(size, 1 if self.direction == "fwd" else 2, 1)
        if isinstance(shape, PoolShape):
            if self.direction == "fwd":
                return shape.bytes_moved(size) - size * _never_read(shape)
            return shape.bytes_moved(size, offset_bytes=int(self.case.op.startswith("max")))
        direction = self.direction
        if self.case.kind == "conv_transpose":
            direction = {"fprop": "dgrad", "dgrad": "fprop"}.get(direction, direction)
        moved = shape.bytes_moved(direction, size)  # type: ignore[arg-type]
        return moved if direction == "dgrad" else moved - size * _never_read(shape)

    def floor_seconds(self, ceilings: Ceilings, tensor_cores: bool = False) -> float:
        """The least time by the roofline of `ceilings`; pooling and norms are bound by traffic alone.

        `tensor_cores`: float32 may be multiplied as tf32.
        """
        flops = self.flops if isinstance(self.shape, ConvShape) else 0
        rate = ceilings.flops(self.dtype, tensor_cores)
        return shapes.floor_seconds(flops, self.bytes_moved, rate, ceilings.bytes_per_s)


def rows(suites: Iterable[str] | None = None) -> list[Row]:
    """The rows of the suites named, by default of all. Raises ValueError for an unknown name."""
    names = list(SUITES) if suites is None else list(suites)
    for name in names:
        if name not in SUITES:
            raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {name!r}")
    return [row for name in names for case in SUITES[name] for row in case.rows()]


def reduced(case: Case, most_flops: float, most_bytes: float) -> Case:
    """`case` with sizes halved until each of its rows has at most that many flops and bytes.

    First the batch shrinks, then the spatial axes, to no less than the kernel's span, then the channels: a
    depthwise convolution stays depthwise, any other keeps its groups. Where the limits cannot be met, the
    smallest problem on that way comes back.
    """
    for smaller in (_smaller_batch, _smaller_planes, _fewer_channels):
        while not _within(case, most_flops, most_bytes):
            less = smaller(case)
            if less == case:
                break
            case = less
    return case


def _within(case: Case, most_flops: float, most_bytes: float) -> bool:
    return all(r.flops <= most_flops and r.bytes_moved <= most_bytes for r in case.rows())


def _smaller_batch(case: Case) -> Case:
    return _halved(case, 0)


def _smaller_planes(case: Case) -> Case:
    for axis in range(2, len(case.x)):
        case = _halved(case, axis)
    return case


def _halved(case: Case, axis: int) -> Case:
    """Half the size on `axis`, or as near to that as makes a valid problem."""
    x = case.x
    for size in range(max(x[axis] // 2, 1), x[axis]):
        less = replace(case, x=(*x[:axis], size, *x[axis + 1 :]))
        if _makes_sense(less, axis):
            return less
    return case


def _makes_sense(case: Case, axis: int) -> bool:
    """Whether the sizes make a problem, in which a plane holds a window without its padding."""
    try:
        shape = case.shape
    except (RuntimeError, ValueError):
        return False
    if isinstance(shape, GroupShape):
        return shape.count > 1  # or there is no deviation
    if axis == 0 or isinstance(shape, Norms):
        return True
    i = axis - 2
    return shape.spatial[i] >= shape.dilation[i] * (shape.kernel[i] - 1) + 1


def _fewer_channels(case: Case) -> Case:
    N, channels, *spatial = case.x
    if case.w is None:
        fewer = replace(case, x=(N, max(channels // 2, 1), *spatial))
        return fewer if case.op != "group_norm" or _makes_sense(fewer, 1) else case
    options = dict(case.options)
    groups = options.get("groups", 1)
    transposed = case.kind == "conv_transpose"
    # Channels that one group reads, and that it gives.
    read, given = channels // groups, case.w[1] if transposed else case.w[0] // groups
    if groups > 1 and read == 1:
        groups = options["groups"] = max(groups // 2, 2)
    else:
        least = 1 if groups == 1 else 2  # groups that read one channel would be depthwise
        read, given = max(read // 2, least), max(given // 2, 1)
    w = (read * groups, given) if transposed else (given * groups, read)
    return replace(
        case,
        x=(N, read * groups, *spatial),
        w=(*w, *case.w[2:]),
        options=tuple((name, options[name]) for name, _ in case.options),
    )


def _transposed(
    x: Size,
    w: Size,
    stride: int | Size = 1,
    padding: int | Size = 0,
    output_padding: int | Size = 0,
    dilation: int | Size = 1,
    groups: int = 1,
) -> ConvShape:
    """The convolution whose dgrad is F.conv_transposeNd of x ``N C *`` and w ``C K/groups *kernel``.

    A strided convolution maps several input sizes to one output size: `output_padding` says which is meant.
    """
    d = len(w) - 2
    arguments = zip(
        x[2:],
        w[2:],
        shapes.axes(stride, d, "stride"),
        shapes.axes(padding, d, "padding"),
        shapes.axes(output_padding, d, "output_padding"),
        shapes.axes(dilation, d, "dilation"),
        strict=True,
    )
    output = tuple((p - 1) * s - 2 * pad + r * (k - 1) + o + 1 for p, k, s, pad, o, r in arguments)
    if any(h < 1 for h in output):
        raise RuntimeError(f"input: expected a size that leaves an output, got {list(x)}")
    shape = ConvShape.of((x[0], w[1] * groups, *output), w, None, stride, padding, dilation, groups)
    if shape.y_size != x:
        raise RuntimeError(f"output_padding: expected less than stride, got {output_padding}")
    return shape


def _never_read(shape: ConvShape | PoolShape) -> int:
    """Elements of x that no window covers: a stride beyond the kernel's span leaves gaps."""
    if isinstance(shape, PoolShape) and shape.adaptive_output is not None:
        return 0
    parameters = (shape.kernel, shape.stride, shape.padding, shape.dilation, shape.output)
    read = [_covered(*a) for a in zip(shape.spatial, *parameters, strict=True)]
    return math.prod(shape.x_size[:2]) * (math.prod(shape.spatial) - math.prod(read))


@cache
def _covered(
    size: int, kernel: int, stride: int, pad: tuple[int, int], dilation: int, output: int
) -> int:
    """Places of one axis that some window covers."""
    reach = (output - 1) * stride + 1
    line = bytearray(max(size + sum(pad), reach + dilation * (kernel - 1)))
    for k in range(kernel):
        start = k * dilation
        line[start : start + reach : stride] = b"\1" * output
    return line[pad[0] : pad[0] + size].count(1)


def _passes(direction: str, options: dict[str, Any]) -> tuple[int, int]:
    """Tensors that batch norm reads and writes."""
    twice = 2 if options.get("training") else 1
    residual = int(options.get("residual", False))
    if direction == "fwd":
        return twice + residual, 1
    if options.get("activation", "relu") == "none":
        residual = 0  # its gradient is grad_y itself
    return 2 * twice + residual, 1 + residual


def _by(sizes: Size) -> str:
    return "x".join(map(str, sizes))


# Forms: how people hold their tensors.
F32, F32_LAST = ("float32", "contiguous"), ("float32", "channels_last")
F16, F16_LAST = ("float16", "contiguous"), ("float16", "channels_last")
BF16, BF16_LAST = ("bfloat16", "contiguous"), ("bfloat16", "channels_last")

# What PyTorch does unasked, and what mixed-precision training on a GPU does.
USUAL = (F32, BF16_LAST)


def _case(
    suite: str, name: str, op: str, x: Size, w: Size | None = None, *, bias: bool = False,
    source: str = "", forms: tuple[Form, ...] = (F32,), directions: tuple[str, ...] = (), **options: Any,
) -> Case:  # fmt: skip
    """A Case whose options are those of `options` that are not defaults."""
    defaults = _DEFAULTS[OPS[op]]
    if OPS[op] == "pool":
        defaults = {**defaults, "stride": options.get("kernel_size")}
    stated = tuple((k, v) for k, v in options.items() if k not in defaults or v != defaults[k])
    return Case(
        suite, name, op, x, w, bias, stated, source=source, forms=forms, directions=directions
    )


class _Network:
    """Takes a network's layers in order; a problem that occurred before raises that case's count.

    `x` is the size that the next layer reads.
    """

    def __init__(self, suite: str, x: Size, forms: tuple[Form, ...] = USUAL) -> None:
        self.suite, self.x, self.forms = suite, x, forms
        self._cases: dict[Case, Case] = {}

    def conv(
        self, name: str, K: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1,
        bias: bool = False,
    ) -> None:  # fmt: skip
        # The first convolution reads images, of which nobody wants a gradient.
        directions = () if self._cases else ("fprop", "wgrad")
        w = (K, self.x[1] // groups, kernel, kernel)
        self._add(
            name, "conv2d", w, bias=bias, directions=directions,
            stride=stride, padding=padding, groups=groups,
        )  # fmt: skip

    def pool(self, name: str, op: str, kernel: int, stride: int, padding: int = 0) -> None:
        self._add(name, op, kernel_size=kernel, stride=stride, padding=padding)

    def global_average(self, name: str) -> None:
        self._add(name, "adaptive_avg_pool2d", output_size=1)

    def norm(self, name: str, activation: str = "relu", residual: bool = False) -> None:
        """Batch norm in training with what follows it: a residual's addition, an activation, or nothing."""
        if activation == "none" and not residual:
            self._add(name, "batch_norm", training=True)
        else:
            self._add(
                name, "batch_norm_act", training=True, residual=residual, activation=activation
            )

    def _add(self, name: str, op: str, w: Size | None = None, **options: Any) -> None:
        case = _case(self.suite, name, op, self.x, w, forms=self.forms, **options)
        problem = replace(case, name="")
        first = self._cases.get(problem)
        self._cases[problem] = case if first is None else replace(first, count=first.count + 1)
        self.x = case.y

    def cases(self) -> tuple[Case, ...]:
        return tuple(self._cases.values())


# Batches. 64 for LeNet-5's small images. 128, that of its paper, for AlexNet, whose planes shrink at once. 32
# for the others: their wide layers are past an H100's L2 cache (50 MB) even in half types, so that traffic to
# memory is measured, and the widest leave most of 80 GiB to the workspaces of rivals.

# name, output channels, kernel, stride, padding; a row without channels is pooling
_LENET5 = (
    ("conv1", 20, 5, 1, 2),
    ("pool1", None, 2, 2, 0),
    ("conv2", 50, 5, 1, 2),
    ("pool2", None, 2, 2, 0),
)
_LENET5_ORIGINAL = (
    ("conv1", 6, 5, 1, 0),
    ("pool1", None, 2, 2, 0),
    ("conv2", 16, 5, 1, 0),
    ("pool2", None, 2, 2, 0),
    ("conv3", 120, 5, 1, 0),
)
_ALEXNET = (
    ("conv1", 64, 11, 4, 2),
    ("pool1", None, 3, 2, 0),
    ("conv2", 192, 5, 1, 2),
    ("pool2", None, 3, 2, 0),
    ("conv3", 384, 3, 1, 1),
    ("conv4", 256, 3, 1, 1),
    ("conv5", 256, 3, 1, 1),
    ("pool5", None, 3, 2, 0),
)
# channels, convolutions a block
_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_VGG16_LAYERS = tuple(
    layer
    for block, (channels, convolutions) in enumerate(_VGG16, 1)
    for layer in (
        *((f"conv{block}_{i}", channels, 3, 1, 1) for i in range(1, convolutions + 1)),
        (f"pool{block}", None, 2, 2, 0),
    )
)
# blocks, width, stride of the first block
_RESNET50 = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
# expansion, output channels, blocks, stride of the first block, kernel
_MOBILENETV2 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)
_EFFICIENTNET_B0 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
# blocks, channels
_CONVNEXT_T = ((3, 96), (3, 192), (9, 384), (3, 768))


def _chain(
    suite: str,
    x: Size,
    layers: Iterable[tuple[str, int | None, int, int, int]],
    pool: str = "max_pool2d",
) -> tuple[Case, ...]:
    net = _Network(suite, x)
    for name, channels, kernel, stride, padding in layers:
        if channels is None:
            net.pool(name, pool, kernel, stride, padding)
        else:
            net.conv(name, channels, kernel, stride, padding, bias=True)
    return net.cases()


def _resnet50() -> tuple[Case, ...]:
    """Version 1.5: the stride is on the 3x3 convolution."""
    net = _Network("resnet50", (32, 3, 224, 224), (*USUAL, F16_LAST))
    net.conv("conv1", 64, 7, 2, 3)
    net.norm("bn1")
    net.pool("maxpool", "max_pool2d", 3, 2, 1)
    for stage, (blocks, width, stride) in enumerate(_RESNET50, 1):
        for block in range(blocks):
            name, x, step = f"layer{stage}.{block}", net.x, stride if block == 0 else 1
            net.conv(f"{name}.conv1", width, 1)
            net.norm(f"{name}.bn1")
            net.conv(f"{name}.conv2", width, 3, step, 1)
            net.norm(f"{name}.bn2")
            net.conv(f"{name}.conv3", 4 * width, 1)
            if block == 0:
                y, net.x = net.x, x
                net.conv(f"{name}.downsample.conv", 4 * width, 1, step)
                net.norm(f"{name}.downsample.bn", "none")
                assert net.x == y
            net.norm(f"{name}.bn3", residual=True)
    net.global_average("avgpool")
    return net.cases()


def _inverted_residuals(
    suite: str,
    stages: Iterable[tuple[int, int, int, int, int]],
    activation: str,
    squeeze: bool,
) -> tuple[Case, ...]:
    """MobileNetV2; with `squeeze`, squeeze-and-excitation to a quarter of a block's input, EfficientNet-B0.

    EfficientNet's stochastic depth, which drops residual branches in training, is left out.
    """
    net = _Network(suite, (32, 3, 224, 224))
    net.conv("stem", 32, 3, 2, 1)
    net.norm("stem.bn", activation)
    for stage, (expansion, channels, blocks, stride, kernel) in enumerate(stages, 1):
        for block in range(blocks):
            name, x, step = f"stage{stage}.{block}", net.x, stride if block == 0 else 1
            hidden = expansion * x[1]
            if expansion != 1:
                net.conv(f"{name}.expand", hidden, 1)
                net.norm(f"{name}.expand.bn", activation)
            net.conv(f"{name}.depthwise", hidden, kernel, step, kernel // 2, groups=hidden)
            net.norm(f"{name}.depthwise.bn", activation)
            if squeeze:
                y = net.x
                net.global_average(f"{name}.se.pool")
                net.conv(f"{name}.se.reduce", x[1] // 4, 1, bias=True)
                net.conv(f"{name}.se.expand", hidden, 1, bias=True)
                net.x = y
            net.conv(f"{name}.project", channels, 1)
            net.norm(f"{name}.project.bn", "none", residual=net.x == x)
    net.conv("head", 1280, 1)
    net.norm("head.bn", activation)
    net.global_average("avgpool")
    return net.cases()


def _convnext_t() -> tuple[Case, ...]:
    """The convolutions: patchify, downsampling and depthwise 7x7.

    Its pointwise layers are F.linear and its norms F.layer_norm, so they are no problems of this package; the
    pointwise ones have 93 of a hundred multiply-adds.
    """
    net = _Network("convnext_t", (32, 3, 224, 224))
    for stage, (blocks, channels) in enumerate(_CONVNEXT_T, 1):
        kernel = 4 if stage == 1 else 2
        net.conv(f"stage{stage}.downsample", channels, kernel, kernel, bias=True)
        for block in range(blocks):
            net.conv(f"stage{stage}.{block}.depthwise", channels, 7, 1, 3, channels, bias=True)
    net.global_average("avgpool")
    return net.cases()


# The convolution, pooling and batch norm problems of KernelBench, level 1, under its problem numbers.
# fmt: off
_KERNELBENCH: tuple[tuple[str, str, Size, Size | None, dict[str, Any]], ...] = (
    ("33_batch_norm", "batch_norm", (64, 64, 512, 512), None, {"training": True}),
    ("41_max_pool1d", "max_pool1d", (64, 192, 65536), None,
     {"kernel_size": 8, "stride": 1, "padding": 4, "dilation": 3}),
    ("42_max_pool2d", "max_pool2d", (32, 64, 512, 512), None, {"kernel_size": 4, "stride": 1, "padding": 1}),
    ("43_max_pool3d", "max_pool3d", (16, 32, 128, 128, 128), None,
     {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 3}),
    ("44_avg_pool1d", "avg_pool1d", (64, 128, 65536), None, {"kernel_size": 8, "stride": 1, "padding": 4}),
    ("45_avg_pool2d", "avg_pool2d", (16, 64, 2048, 2048), None, {"kernel_size": 11}),
    ("46_avg_pool3d", "avg_pool3d", (16, 32, 128, 128, 256), None,
     {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("50_conv2d", "conv2d", (256, 3, 224, 224), (96, 3, 11, 11), {"bias": True, "stride": 4, "padding": 2}),
    ("54_conv3d", "conv3d", (16, 3, 64, 64, 64), (64, 3, 3, 3, 3), {}),
    ("55_conv2d", "conv2d", (8, 64, 512, 1024), (128, 64, 3, 3), {}),
    ("56_conv2d", "conv2d", (8, 64, 512, 256), (128, 64, 5, 7), {}),
    ("57_conv_transpose2d", "conv_transpose2d", (8, 64, 1024, 1024), (64, 64, 3, 3), {}),
    ("58_conv_transpose3d", "conv_transpose3d", (16, 32, 16, 32, 64), (32, 16, 3, 5, 7), {}),
    ("59_conv3d", "conv3d", (16, 3, 256, 256, 10), (64, 3, 3, 3, 1), {}),
    ("60_conv3d", "conv3d", (16, 3, 64, 64, 64), (64, 3, 3, 5, 7), {}),
    ("61_conv_transpose3d", "conv_transpose3d", (8, 48, 64, 64, 64), (48, 48, 3, 3, 3), {}),
    ("62_conv2d", "conv2d", (8, 32, 512, 512), (64, 32, 5, 9), {}),
    ("63_conv2d", "conv2d", (16, 16, 1024, 1024), (128, 16, 3, 3), {}),
    ("64_conv_transpose1d", "conv_transpose1d", (64, 128, 65536), (128, 128, 3), {}),
    ("65_conv_transpose2d", "conv_transpose2d", (8, 64, 512, 512), (64, 64, 3, 7), {}),
    ("66_conv3d", "conv3d", (8, 3, 16, 128, 128), (64, 3, 3, 5, 7), {}),
    ("67_conv1d", "conv1d", (32, 64, 131072), (128, 64, 3), {}),
    ("68_conv_transpose3d", "conv_transpose3d", (16, 32, 64, 64, 64), (32, 64, 3, 5, 5), {}),
    ("69_conv_transpose2d", "conv_transpose2d", (64, 64, 128, 256), (64, 128, 3, 5), {}),
    ("70_conv_transpose3d", "conv_transpose3d", (8, 48, 96, 96, 96), (48, 24, 3, 3, 3), {}),
    ("71_conv_transpose2d", "conv_transpose2d", (8, 32, 512, 1024), (32, 32, 3, 3), {}),
    ("72_conv_transpose3d", "conv_transpose3d", (8, 32, 12, 24, 48), (32, 8, 3, 5, 7),
     {"stride": 2, "padding": (1, 2, 3), "output_padding": 1, "groups": 4}),
    ("73_conv_transpose3d", "conv_transpose3d", (4, 32, 32, 64, 128), (32, 32, 3, 3, 3),
     {"stride": 2, "padding": 1}),
    ("74_conv_transpose1d", "conv_transpose1d", (32, 32, 131072), (32, 64, 5), {"dilation": 3}),
    ("75_conv_transpose2d", "conv_transpose2d", (16, 32, 128, 256), (32, 16, 3, 5),
     {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1), "groups": 4}),
    ("76_conv1d", "conv1d", (64, 64, 524280), (128, 64, 3), {"stride": 3, "dilation": 4}),
    ("77_conv_transpose3d", "conv_transpose3d", (16, 32, 16, 32, 32), (32, 64, 3, 3, 3),
     {"stride": 2, "padding": 1, "dilation": 2}),
    ("78_conv_transpose2d", "conv_transpose2d", (8, 32, 512, 1024), (32, 32, 3, 7), {"padding": (1, 3)}),
    ("79_conv_transpose1d", "conv_transpose1d", (16, 32, 131072), (32, 64, 3),
     {"stride": 2, "padding": 1, "dilation": 2}),
    ("80_conv2d", "conv2d", (8, 32, 512, 512), (64, 32, 5, 9), {"padding": (2, 4), "dilation": (2, 3)}),
    ("81_conv_transpose2d", "conv_transpose2d", (16, 32, 64, 128), (32, 64, 3, 3),
     {"stride": 5, "padding": 1, "dilation": 2}),
    ("82_conv2d", "conv2d", (16, 64, 512, 512), (64, 1, 3, 3), {"groups": 64}),
    ("83_conv2d", "conv2d", (64, 8, 512, 512), (8, 1, 3, 1), {"groups": 8}),
    ("84_conv2d", "conv2d", (64, 128, 256, 512), (128, 1, 3, 3), {"groups": 128}),
    ("85_conv2d", "conv2d", (32, 128, 128, 256), (128, 1, 3, 7), {"groups": 128}),
    ("86_depthwise", "conv2d", (16, 64, 512, 512), (64, 1, 3, 3), {"padding": 1, "groups": 64}),
    ("86_pointwise", "conv2d", (16, 64, 512, 512), (128, 64, 1, 1), {}),
    ("87_conv2d", "conv2d", (16, 64, 1024, 1024), (128, 64, 1, 1), {}),
)

KERNELBENCH_H100_MS: dict[str, tuple[float, float]] = {
    "33_batch_norm": (8.77, 4.38), "41_max_pool1d": (10.7, 2.85), "42_max_pool2d": (10.8, 4.33),
    "43_max_pool3d": (3.93, 5.65), "44_avg_pool1d": (5.47, 3.13), "45_avg_pool2d": (6.4, 6.34),
    "46_avg_pool3d": (8.69, 8.7), "50_conv2d": (2.2, 1.74), "54_conv3d": (1.87, 1.86),
    "55_conv2d": (4.12, 4.38), "56_conv2d": (2.93, 2.99), "57_conv_transpose2d": (6.56, 6.47),
    "58_conv_transpose3d": (7.66, 7.74), "59_conv3d": (2.84, 2.89), "60_conv3d": (7.64, 7.71),
    "61_conv_transpose3d": (9.15, 9.08), "62_conv2d": (2.43, 2.46), "63_conv2d": (7.11, 12.7),
    "64_conv_transpose1d": (5.48, 5.33), "65_conv_transpose2d": (2.62, 2.65), "66_conv3d": (3.78, 3.8),
    "67_conv1d": (2.63, 2.65), "68_conv_transpose3d": (36.8, 36.9), "69_conv_transpose2d": (2.84, 2.83),
    "70_conv_transpose3d": (29.3, 29.3), "71_conv_transpose2d": (1.58, 1.6),
    "72_conv_transpose3d": (2.82, 2.82), "73_conv_transpose3d": (2.09, 2.2),
    "74_conv_transpose1d": (2.1, 2.35), "75_conv_transpose2d": (6.66, 6.75), "76_conv1d": (12.2, 12.3),
    "77_conv_transpose3d": (1.96, 1.96), "78_conv_transpose2d": (2.4, 2.36),
    "79_conv_transpose1d": (1.94, 1.91), "80_conv2d": (2.41, 2.68), "81_conv_transpose2d": (1.84, 1.88),
    "82_conv2d": (2.55, 2.48), "83_conv2d": (1.53, 7.63), "84_conv2d": (10.1, 9.83),
    "85_conv2d": (2.27, 13.8), "86_depthwise + 86_pointwise": (3.91, 4.18), "87_conv2d": (4.66, 13.3),
}
"""Case of the suite "kernelbench" -> milliseconds on an H100: PyTorch's eager mode, and compiled by Inductor.

Not measured by this project: results/timing/H100_Modal of github.com/ScalingIntelligence/KernelBench, commit
1f8d20f, MIT licence. Forward, float32 tensors, TF32 allowed to cuDNN (PyTorch's default), cuDNN's default
heuristics, cold L2 cache. Problem 86 is two layers timed together."""

# Problems that users reported as slow, wrong or out of memory: name, source, op, x, w, forms, options. Where
# a report does not tell the padding, it is that which keeps the size.
_HALF_BOTH = (F16, F16_LAST)
_REPORTS: tuple[tuple[str, str, str, Size, Size | None, tuple[Form, ...], dict[str, Any]], ...] = (
    # large depthwise kernels
    ("depthwise_31x31", "RepLKNet-pytorch#56", "conv2d", (64, 384, 256, 31), (384, 1, 31, 31), _HALF_BOTH,
     {"padding": 15, "groups": 384}),
    ("depthwise_31x31_square", "RepLKNet-pytorch#47", "conv2d", (64, 1000, 32, 32), (1000, 1, 31, 31), (F32,),
     {"padding": 15, "groups": 1000}),
    # depthwise against dense
    ("depthwise_512", "pytorch#18631", "conv2d", (2, 32, 512, 512), (32, 1, 3, 3), USUAL,
     {"padding": 1, "groups": 32}),
    ("dense_512", "pytorch#18631", "conv2d", (2, 32, 512, 512), (32, 32, 3, 3), USUAL, {"padding": 1}),
    ("depthwise_112", "pytorch#15513", "conv2d", (16, 32, 112, 112), (32, 1, 3, 3), USUAL,
     {"padding": 1, "groups": 32}),
    ("depthwise_56", "pytorch#15513", "conv2d", (16, 144, 56, 56), (144, 1, 3, 3), USUAL,
     {"padding": 1, "groups": 144}),
    ("depthwise_5x5_14", "pytorch#15513", "conv2d", (16, 480, 14, 14), (480, 1, 5, 5), USUAL,
     {"padding": 2, "groups": 480}),
    # grouped
    ("grouped_14", "pytorch#34977", "conv2d", (100, 2048, 14, 14), (2048, 64, 3, 3), _HALF_BOTH,
     {"stride": 2, "padding": 1, "groups": 32}),
    ("grouped_7", "pytorch#34977", "conv2d", (100, 2048, 7, 7), (2048, 64, 3, 3), _HALF_BOTH,
     {"padding": 1, "groups": 32}),
    ("grouped_224", "pytorch#70954", "conv2d", (16, 128, 224, 224), (128, 16, 3, 3), (F32, F16),
     {"bias": True, "padding": 1, "groups": 8}),
    ("dense_224", "pytorch#70954", "conv2d", (16, 128, 224, 224), (128, 128, 3, 3), (F32, F16),
     {"bias": True, "padding": 1}),
    ("grouped_64", "pytorch#53094", "conv2d", (128, 128, 64, 64), (128, 16, 3, 3), (F32, F16),
     {"bias": True, "padding": 1, "groups": 8}),
    ("depthwise_3d", "pytorch#110885", "conv3d", (1, 64, 15, 75, 315), (64, 1, 3, 3, 3), _HALF_BOTH,
     {"padding": 1, "groups": 64}),
    # dense, with sizes that a library does not expect
    ("odd_513", "pytorch#128936", "conv2d", (64, 128, 513, 513), (128, 128, 3, 3), (BF16, F32),
     {"bias": True, "stride": 2}),
    ("odd_513_batch_63", "pytorch#128936", "conv2d", (63, 128, 513, 513), (128, 128, 3, 3), (BF16,),
     {"bias": True, "stride": 2}),
    ("first_layer", "pytorch#54404", "conv2d", (512, 3, 32, 32), (64, 3, 3, 3), (F32, F16),
     {"bias": True, "padding": 1}),
    ("one_channel_51x51", "pytorch#146096", "conv2d", (75, 1, 572, 572), (1, 1, 51, 51), (F32,),
     {"padding": 25}),
    # three axes
    ("conv3d_bias", "pytorch#167420", "conv3d", (8, 384, 3, 34, 34), (384, 384, 3, 3, 3), (F32, BF16, F16),
     {"bias": True}),
    ("conv3d_planes", "pytorch#163539", "conv3d", (1, 16, 124, 1282, 722), (16, 16, 1, 3, 3), (BF16,), {}),
    ("conv3d_workspace", "pytorch#128947", "conv3d", (1, 256, 5, 1090, 1922), (64, 256, 3, 3, 3), (F32,),
     {"bias": True}),
    ("conv3d_many_filters", "pytorch#32370", "conv3d", (1, 2, 33, 33, 33), (729, 2, 2, 2, 2), (F32,), {}),
    # patches: 224x224 in 16x16 patches of two frames; 1152 is Qwen3-VL's width
    ("patchify", "sglang-omni#132", "conv3d", (196, 3, 2, 16, 16), (1152, 3, 2, 16, 16), (BF16,),
     {"bias": True, "stride": (2, 16, 16)}),
    # one axis
    ("causal_1d", "sglang#24043", "conv1d", (1, 1024, 1024), (1024, 1, 4), (BF16,),
     {"bias": True, "padding": 3, "groups": 1024}),
    ("short_1d", "pytorch#192902", "conv1d", (1, 12288, 16384), (12288, 1, 4), (BF16, F16, F32),
     {"groups": 12288}),
    ("dense_1d", "pytorch#174989", "conv1d", (3072, 128, 202), (384, 128, 3), (BF16,), {}),
    ("dense_1d_as_2d", "pytorch#174989", "conv2d", (3072, 128, 1, 202), (384, 128, 1, 3), (BF16, BF16_LAST),
     {}),
    ("long_1d", "pytorch#21462", "conv1d", (1, 64, 64000), (64, 64, 1024), (F32,), {}),
    ("transposed_1d", "pytorch#41382", "conv_transpose1d", (1, 64, 40000), (64, 32, 4), (F32,),
     {"bias": True, "stride": 2, "padding": 1}),
    ("transposed_depthwise_1d", "pytorch#47341", "conv_transpose1d", (16, 512, 32), (512, 1, 6), (F32,),
     {"bias": True, "stride": 3, "padding": 2, "output_padding": 1, "groups": 512}),
    # pooling
    ("max_pool3d_stride4", "pytorch#80748", "max_pool3d", (64, 256, 32, 32, 32), None, (F32, F32_LAST),
     {"kernel_size": 4}),
    ("max_pool3d_stride1", "pytorch#80748", "max_pool3d", (64, 256, 32, 32, 32), None, (F32, F32_LAST),
     {"kernel_size": 4, "stride": 1}),
    ("avg_pool_channels_last", "pytorch#34996", "avg_pool2d", (100, 192, 56, 56), None, (F32, F32_LAST),
     {"kernel_size": 2}),
    ("avg_pool_padded", "pytorch#107201", "avg_pool2d", (2, 3, 6, 6), None, (F32, F32_LAST),
     {"kernel_size": 2, "padding": 1}),
)
# fmt: on


def _kernelbench() -> tuple[Case, ...]:
    # Its forward problems: the first direction of each kind.
    return tuple(
        _case(
            "kernelbench", name, op, x, w, source="KernelBench level 1",
            directions=DIRECTIONS[OPS[op]][:1], **options,
        )
        for name, op, x, w, options in _KERNELBENCH
    )  # fmt: skip


def _reports() -> tuple[Case, ...]:
    return tuple(
        _case("reports", name, op, x, w, source=source, forms=forms, **options)
        for name, source, op, x, w, forms, options in _REPORTS
    )


# Sweeps: one size changes and the others stay, so that a plot shows what the cost follows. Sizes that fill no
# vector or tile (3, 7, 31) stand beside those that kernels like.


def _conv3x3(suite: str, name: str, N: int, C: int, H: int, depthwise: bool = False) -> Case:
    w, groups = ((C, 1, 3, 3), C) if depthwise else ((C, C, 3, 3), 1)
    return _case(suite, name, "conv2d", (N, C, H, H), w, forms=USUAL, padding=1, groups=groups)


# Images, C = K and H = W such that each has about ten times the flops of the one before: layers of ResNets
# for small and large images, and of a diffusion model's U-Net. Without overheads a flop takes as long in all.
_SCALING = (
    ("1_MFLOP", 1, 16, 16),
    ("10_MFLOP", 2, 32, 16),
    ("100_MFLOP", 1, 64, 40),
    ("1_GFLOP", 4, 64, 56),
    ("10_GFLOP", 2, 256, 64),
)


def _scaling() -> tuple[Case, ...]:
    return tuple(
        _case("scaling", name, "conv2d", (N, C, H, H), (C, C, 3, 3), padding=1)
        for name, N, C, H in _SCALING
    )


def _sweep_channels() -> tuple[Case, ...]:
    return tuple(
        _conv3x3("sweep_channels", f"{name}_C{C}", 32, C, 56, depthwise)
        for name, depthwise in (("dense", False), ("depthwise", True))
        for C in (3, 8, 16, 32, 64, 128, 256, 512)
    )


def _sweep_spatial() -> tuple[Case, ...]:
    return tuple(
        _conv3x3("sweep_spatial", f"{name}_H{H}", 32, 64, H, depthwise)
        for name, depthwise in (("dense", False), ("depthwise", True))
        for H in (7, 14, 28, 56, 112, 224)
    )


def _sweep_batch() -> tuple[Case, ...]:
    return tuple(
        _conv3x3("sweep_batch", f"{name}_N{N}", N, 64, 56, depthwise)
        for name, depthwise in (("dense", False), ("depthwise", True))
        for N in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    )


def _sweep_kernel() -> tuple[Case, ...]:
    depthwise = [
        _case(
            "sweep_kernel", f"depthwise_R{R}", "conv2d", (32, 96, 56, 56), (96, 1, R, R), forms=USUAL,
            padding=R // 2, groups=96,
        )
        for R in (1, 3, 5, 7, 9, 11, 13, 15, 21, 27, 31)
    ]  # fmt: skip
    dense = [
        _case(
            "sweep_kernel", f"dense_R{R}", "conv2d", (32, 64, 56, 56), (64, 64, R, R), forms=USUAL,
            padding=R // 2,
        )
        for R in (1, 3, 5, 7, 9, 11)
    ]  # fmt: skip
    return (*depthwise, *dense)


def _sweep_pool() -> tuple[Case, ...]:
    return tuple(
        _case(
            "sweep_pool", f"{kind}_{'disjoint' if stride == K else 'overlapping'}_K{K}", f"{kind}_pool2d",
            (32, 64, 112, 112), forms=USUAL, kernel_size=K, stride=stride,
        )
        for kind in ("max", "avg")
        for K in range(2, 9)
        for stride in (1, K)
    )  # fmt: skip


def _sweep_norm() -> tuple[Case, ...]:
    def norm(name: str, op: str, C: int, H: int, **options: Any) -> Case:
        return _case("sweep_norm", name, op, (32, C, H, H), forms=USUAL, **options)

    return (
        *(norm(f"C{C}", "batch_norm", C, 56, training=True) for C in (3, 16, 64, 256, 1024)),
        # C64_H56 is C64
        *(norm(f"H{H}", "batch_norm", 64, H, training=True) for H in (7, 14, 28, 112, 224)),
        # what evaluation, an activation and a residual add to or take from C256
        norm("eval", "batch_norm", 256, 56),
        norm("relu", "batch_norm_act", 256, 56, training=True),
        norm("add_relu", "batch_norm_act", 256, 56, training=True, residual=True),
        norm("eval_add_relu", "batch_norm_act", 256, 56, residual=True),
    )


def _group_norms() -> tuple[Case, ...]:
    """Group norm in a ResNet, instance norm in a generator of images (group norm with a channel a group), and
    ConvNeXt-T's layer norms, whose rows are channels-last places."""

    def norm(name: str, C: int, H: int, groups: int) -> Case:
        return _case(
            "group_norms", name, "group_norm", (32, C, H, H), forms=USUAL, num_groups=groups
        )

    return (
        *(norm(f"C{C}_H{H}", C, H, 32) for C, H in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))),
        norm("instance_C64_H64", 64, 64, 64),
        *(
            _case(
                "group_norms", f"layer_C{C}_H{H}", "layer_norm", (32, H * H, C),
                forms=(F32, ("bfloat16", "contiguous")), normalized_shape=(C,),
            )
            for C, H in ((96, 56), (192, 28), (384, 14), (768, 7))
        ),
    )  # fmt: skip


SUITES: dict[str, tuple[Case, ...]] = {
    "lenet5": _chain("lenet5", (64, 1, 28, 28), _LENET5),
    "lenet5_original": _chain("lenet5_original", (64, 1, 32, 32), _LENET5_ORIGINAL, "avg_pool2d"),
    "alexnet": _chain("alexnet", (128, 3, 227, 227), _ALEXNET),
    "vgg16": _chain("vgg16", (32, 3, 224, 224), _VGG16_LAYERS),
    "resnet50": _resnet50(),
    "mobilenetv2": _inverted_residuals("mobilenetv2", _MOBILENETV2, "relu6", squeeze=False),
    "efficientnet_b0": _inverted_residuals(
        "efficientnet_b0", _EFFICIENTNET_B0, "silu", squeeze=True
    ),
    "convnext_t": _convnext_t(),
    "kernelbench": _kernelbench(),
    "reports": _reports(),
    "sweep_channels": _sweep_channels(),
    "sweep_spatial": _sweep_spatial(),
    "sweep_batch": _sweep_batch(),
    "sweep_kernel": _sweep_kernel(),
    "sweep_pool": _sweep_pool(),
    "sweep_norm": _sweep_norm(),
    "group_norms": _group_norms(),
    "scaling": _scaling(),
}
"""Suite -> its cases."""

NETWORKS = (
    "lenet5", "lenet5_original", "alexnet", "vgg16", "resnet50", "mobilenetv2", "efficientnet_b0",
    "convnext_t",
)  # fmt: skip
"""Suites that are the layers of one network."""
